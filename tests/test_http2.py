"""HTTP/2 on the socket, frame by frame: what clients may send, what breaks a connection, and what bounds each of them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import hpack
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapfs import open_snapshotter
from snapfs.containerd import ORIGIN, http2, server
from snapfs.containerd.http2 import BACKLOG, HEADERS, PREFACE, STREAMS, Connection, Held, Stream, literals

LARGEST = 1000
DATA, HEADER, PRIORITY, RESET, SETTINGS, PUSH, PING, AWAY, WINDOW, CONTINUATION = range(10)
END, ALL, PADDED, PRIORITIZED = 1, 4, 8, 32
PROTOCOL, FLOW, SIZE, REFUSED, COMPRESSION, CALM = 1, 3, 6, 7, 9, 11
STATUS = literals([(b":status", b"200")])
ASKED = literals([(b":path", b"/x")])

Frame = tuple[int, int, int, bytes]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def request(stream: int, body: bytes = b"", flags: int = END) -> bytes:
    return frame(HEADER, ALL, stream, ASKED) + frame(DATA, flags, stream, body)


class Client:
    """The other end of a connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            received = await self.stream.receive_some()
            if not received:
                raise EOFError
            self._buffer += received
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    async def frame(self, *kinds: int) -> Frame:
        """The next frame of one of these kinds.  Raises EOFError at the end."""
        while True:
            head = await self._take(9)
            payload = await self._take(int.from_bytes(head[:3], "big"))
            if head[3] in kinds:
                return head[3], head[4], int.from_bytes(head[5:9], "big"), payload

    async def answer(self, stream: int) -> bytes:
        """The data of a whole answer."""
        found = b""
        while True:
            kind, flags, its, payload = await self.frame(DATA, HEADER)
            if its == stream:
                found += payload if kind == DATA else b""
                if flags & END:
                    return found

    async def code(self) -> int:
        """That with which the server ends the connection."""
        *_, payload = await self.frame(AWAY)
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await self.frame(AWAY)
        return int.from_bytes(payload[4:8], "big")


async def echo(stream: Stream) -> None:
    """Says what it was told, ``-`` where that was too much."""
    await stream.send(STATUS, b"-" if stream.body is None else bytes(stream.body))
    stream.end(literals([(b"grpc-status", b"0")]))


@asynccontextmanager
async def connected(
    handle: Callable[[Stream], Awaitable[None]] = echo, preface: bytes = PREFACE, held: Held | None = None
) -> AsyncIterator[Client]:
    here, there = socket.socketpair()
    there.setblocking(False)

    async def serve() -> None:
        with there:
            await Connection(there, LARGEST, handle, held).run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with trio.fail_after(20):
            async with trio.SocketStream(trio.socket.from_stdlib_socket(here)) as stream:
                client = Client(stream)
                await client.send(preface + frame(SETTINGS, 0, 0))
                yield client


BROKEN = {
    "too long a frame": (frame(DATA, 0, 1, bytes(16385)), SIZE),
    "data of no request": (frame(DATA, 0, 1), PROTOCOL),
    "data of the connection": (frame(DATA, 0, 0), PROTOCOL),
    "data after the end": (
        request(1, flags=END) + frame(HEADER, ALL, 3, ASKED) + frame(DATA, END, 3) + frame(DATA, 0, 5),
        PROTOCOL,
    ),
    "padding only": (frame(HEADER, ALL, 1, ASKED) + frame(DATA, PADDED, 1, b"\x05abc"), PROTOCOL),
    "padding of nothing": (frame(HEADER, ALL | PADDED, 1), PROTOCOL),
    "headers cut off by another frame": (frame(HEADER, 0, 1, ASKED) + frame(PING, 0, 0, bytes(8)), PROTOCOL),
    "headers that go on elsewhere": (frame(HEADER, 0, 1, ASKED) + frame(CONTINUATION, ALL, 3), PROTOCOL),
    "headers that go on from nowhere": (frame(CONTINUATION, ALL, 1), PROTOCOL),
    "headers without an end": (frame(HEADER, 0, 1, ASKED) + frame(CONTINUATION, 0, 1, bytes(16000)) * 2, CALM),
    "headers that mean nothing": (frame(HEADER, ALL, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff"), COMPRESSION),
    "headers that grow": (frame(HEADER, ALL, 1, b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 100), COMPRESSION),
    "settings of no length": (frame(SETTINGS, 0, 0, bytes(5)), SIZE),
    "a window that is too large": (frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 1 << 31)), FLOW),
    "a window that grows too large": (frame(WINDOW, 0, 0, struct.pack(">L", (1 << 31) - 1)), FLOW),
    "a window of no length": (frame(WINDOW, 0, 0, bytes(3)), SIZE),
    "a ping of no length": (frame(PING, 0, 0, bytes(7)), SIZE),
    "a promise": (frame(PUSH, 0, 1, bytes(4)), PROTOCOL),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_breaks_the_protocol_ends_the_connection(what: str) -> None:
    sent, code = BROKEN[what]
    async with connected() as client:
        await client.send(sent)
        assert await client.code() == code


async def test_another_protocol_is_refused() -> None:
    async with connected(preface=b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
        assert await client.code() == PROTOCOL


async def test_what_clients_may_send() -> None:
    async with connected() as client:
        await client.send(frame(99, 255, 7, b"whatever") + frame(PRIORITY, 0, 1, bytes(5)) + request(1, b"plain"))
        assert await client.answer(1) == b"plain"
        padded = b"\x03" + bytes(5) + ASKED + bytes(3)
        await client.send(frame(HEADER, ALL | PADDED | PRIORITIZED, 3, padded) + frame(DATA, PADDED, 3, b"\x02padded\0\0"))
        await client.send(frame(HEADER, END, 3, ASKED[:3]) + frame(CONTINUATION, ALL, 3, ASKED[3:]))  # trailers
        assert await client.answer(3) == b"padded"
        await client.send(frame(HEADER, ALL | END, 5, ASKED))
        assert await client.answer(5) == b""
        await client.send(frame(PING, 0, 0, b"whatever"))
        assert (await client.frame(PING))[1:] == (1, 0, b"whatever")
        await client.send(frame(RESET, 0, 5, bytes(4)) + frame(WINDOW, 0, 5, struct.pack(">L", 1)) + frame(DATA, END, 5))
        encoder = hpack.Encoder()  # with a table and Huffman's code, as gRPC's clients have it
        for stream in (7, 9):
            await client.send(frame(HEADER, ALL | END, stream, encoder.encode([(":path", "/x"), ("user-agent", "grpc" * 20)])))
            assert await client.answer(stream) == b""


async def test_byte_by_byte() -> None:
    async with connected() as client:
        for byte in request(1, b"slowly"):
            await client.send(bytes((byte,)))
        assert await client.answer(1) == b"slowly"


async def test_a_body_that_is_too_large_is_refused_before_it_is_there() -> None:
    async with connected() as client:
        await client.send(frame(HEADER, ALL, 1, ASKED) + frame(DATA, 0, 1, bytes(LARGEST)) + frame(DATA, 0, 1, b"x"))
        assert await client.answer(1) == b"-"
        assert (await client.frame(RESET))[2:] == (1, bytes(4))
        await client.send(frame(DATA, END, 1, bytes(9000)) + request(3, b"next"))
        assert await client.answer(3) == b"next"


async def test_requests_that_are_not_whole_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "HELD", 2 * LARGEST)
    async with connected() as client:
        for stream in (1, 3, 5):
            await client.send(frame(HEADER, ALL, stream, ASKED) + frame(DATA, 0, stream, bytes(LARGEST)))
        assert await client.answer(5) == b"-"
        await client.send(frame(RESET, 0, 1, bytes(4)) + request(7, bytes(LARGEST)))
        assert await client.answer(7) == bytes(LARGEST)
        await client.send(frame(DATA, END, 3))
        assert await client.answer(3) == bytes(LARGEST)


async def test_requests_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "STREAMS", 3)
    async with connected() as client:
        for stream in (1, 3, 5, 7):
            await client.send(frame(HEADER, ALL, stream, ASKED))
        assert (await client.frame(RESET))[2:] == (7, struct.pack(">L", REFUSED))
        await client.send(frame(DATA, END, 1) + frame(HEADER, ALL | END, 9, ASKED))
        assert await client.answer(1) == b""
        assert STREAMS == 4096


async def test_requests_under_way_in_all_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "MOST", 2)
    held = Held()
    async with connected(held=held) as one, connected(held=held) as two:
        for client in (one, two):
            await client.send(frame(HEADER, ALL, 1, ASKED) + frame(PING, 0, 0, bytes(8)))
            await client.frame(PING)
        await two.send(frame(HEADER, ALL, 5, ASKED))
        assert (await two.frame(RESET))[3] == struct.pack(">L", REFUSED)
        await one.send(frame(RESET, 0, 1, bytes(4)) + frame(PING, 0, 0, bytes(8)))
        await one.frame(PING)
        await two.send(request(7, b"x"))
        assert await two.answer(7) == b"x"
    assert not held.count


async def test_an_answer_waits_for_the_clients_windows() -> None:
    long = bytes(range(256)) * 400  # more than both windows are at first

    async def answer(stream: Stream) -> None:
        await stream.send(STATUS, long)
        stream.end(STATUS)

    async with connected(answer) as client:
        await client.send(request(1))
        found = b""
        while len(found) < 65535:
            found += (await client.frame(DATA))[3]
        assert len(found) == 65535
        await client.send(frame(WINDOW, 0, 0, struct.pack(">L", 1 << 20)) + frame(PING, 0, 0, bytes(8)))
        assert (await client.frame(DATA, PING))[0] == PING, "the stream's own window is used up"
        await client.send(frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 65535 + 1000)))
        found += (await client.frame(DATA))[3]
        assert len(found) == 66535
        await client.send(frame(WINDOW, 0, 1, struct.pack(">L", 1 << 20)))
        assert found + await client.answer(1) == long


async def test_a_client_that_takes_nothing_is_not_read_any_more() -> None:
    async with connected() as client:
        pings = frame(PING, 0, 0, bytes(8)) * 1000
        with trio.move_on_after(0.5) as scope:
            for _ in range(1 + 8 * BACKLOG // len(pings)):
                await client.send(pings)
        assert scope.cancelled_caught
        assert (await client.frame(PING))[1] == 1


async def test_what_is_cancelled_is_told_and_forgotten() -> None:
    told = trio.Event()
    begun = trio.Event()

    async def wait(stream: Stream) -> None:
        stream.cancelled = told.set
        begun.set()
        await told.wait()
        stream.end(STATUS)

    async with connected(wait) as client:
        await client.send(request(1))
        await begun.wait()
        await client.send(frame(RESET, 0, 1, bytes(4)) + frame(PING, 0, 0, bytes(8)))
        await told.wait()
        assert (await client.frame(PING, HEADER))[0] == PING


async def test_who_goes_has_what_is_under_way_cancelled() -> None:
    begun, cancelled = trio.Event(), trio.Event()

    async def wait(stream: Stream) -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with connected(wait) as client:
        await client.send(request(1))
        await begun.wait()
        await client.stream.aclose()
        await cancelled.wait()


async def test_no_frame_takes_longer_for_what_else_is_under_way() -> None:
    """Settings that change the windows of thousands of requests, again and again: others have their turn meanwhile."""
    worst, sent = 0.0, trio.Event()

    async def others() -> None:
        nonlocal worst
        while not sent.is_set():
            began = time.process_time()
            await trio.lowlevel.checkpoint()
            worst = max(worst, time.process_time() - began)

    async def wait(stream: Stream) -> None:
        await trio.sleep_forever()

    async with connected(wait) as client:
        for stream in range(1, 2 * STREAMS, 2):
            await client.send(frame(HEADER, ALL, stream, ASKED))
        many = frame(SETTINGS, 0, 0, struct.pack(">HL", 4, 65535) * 2730)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            await client.send(many * 8 + frame(PING, 0, 0, bytes(8)))
            await client.frame(PING)
            sent.set()
    assert worst < 0.3


async def test_answers_share_a_window_that_opens_slowly() -> None:
    async def answer(stream: Stream) -> None:
        await stream.send(STATUS, bytes(3000))
        stream.end(STATUS)

    async with connected(answer) as client:
        streams = range(1, 101, 2)
        await client.send(b"".join(request(stream) for stream in streams))
        left = {stream: 3000 for stream in streams}
        taken = 0
        while any(left.values()):
            _, _, stream, data = await client.frame(DATA)
            left[stream] -= len(data)
            taken += len(data)
            if taken >= 65535 and len(data):
                await client.send(frame(WINDOW, 0, 0, struct.pack(">L", 700)))
        assert set(left.values()) == {0}


async def test_of_headers_what_says_nothing_is_not_kept() -> None:
    kept: list[dict[bytes, bytes]] = []

    async def answer(stream: Stream) -> None:
        kept.append(stream.headers)
        stream.end(STATUS)

    async with connected(answer) as client:
        more = literals([(b"grpc-timeout", b"1S"), (b"a", bytes(8000))])
        await client.send(frame(HEADER, ALL | END, 1, ASKED + more))
        await client.frame(HEADER)
    assert kept == [{b":path": b"/x", b"grpc-timeout": b"1S"}]


async def test_requests_of_all_connections_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are whole count, too, until they are answered."""
    monkeypatch.setattr(http2, "HELD", 2 * LARGEST)
    held, begun = Held(), trio.Event()

    async def wait(stream: Stream) -> None:
        if stream.body is not None:
            begun.set()
            await trio.sleep_forever()
        await echo(stream)

    async with connected(wait, held=held) as one, connected(wait, held=held) as two:
        await one.send(request(1, bytes(LARGEST)) + frame(HEADER, ALL, 3, ASKED) + frame(DATA, 0, 3, bytes(LARGEST)))
        await begun.wait()
        await one.send(frame(PING, 0, 0, bytes(8)))
        await one.frame(PING)
        await two.send(request(1, b"x"))
        assert await two.answer(1) == b"-"
        await one.stream.aclose()
        while held.size:
            await trio.lowlevel.checkpoint()


# -- the server


STAT = "/containerd.services.snapshots.v1.Snapshots/Stat"
LIST = "/containerd.services.snapshots.v1.Snapshots/List"


def call(stream: int, path: str, body: bytes = b"") -> bytes:
    message = b"\0" + len(body).to_bytes(4, "big") + body
    return frame(HEADER, ALL, stream, literals([(b":path", path.encode())])) + frame(DATA, END, stream, message)


@asynccontextmanager
async def client_of(path: Path, first_window: int = 65535) -> AsyncIterator[Client]:
    with trio.fail_after(20):
        async with await trio.open_unix_socket(path) as stream:
            client = Client(stream)
            await client.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HL", 4, first_window)))
            yield client


async def status(client: Client) -> bytes:
    """That of the next call that ends."""
    while True:
        _, flags, _, payload = await client.frame(HEADER)
        if flags & END:
            return dict(hpack.Decoder(HEADERS).decode(payload, raw=True))[b"grpc-status"]


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    monkeypatch.setattr(server, "CONNECTIONS", 6)
    async with open_snapshotter(tmp_path / "root") as snapshotter:
        await snapshotter.prepare("a", origin=ORIGIN)
        async with server.serving(str(tmp_path / "s"), snapshotter):
            yield tmp_path / "s"


async def test_who_takes_no_answer_keeps_nobody_else_from_having_one(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told of many snapshots is in memory meanwhile: of few answers, and for a while."""
    monkeypatch.setattr(server, "TAKING", 0.5)
    async with client_of(served, first_window=0) as lazy, client_of(served) as other:
        streams = range(1, 2 * server.LISTS + 4, 2)
        await lazy.send(b"".join(call(stream, LIST) for stream in streams))
        await trio.sleep(0.1)
        await other.send(call(1, STAT))
        assert await status(other) == b"5"
        await other.send(call(3, LIST))
        assert await status(other) == b"0"
        assert {await status(lazy) for _ in streams} == {b"8"}


async def test_an_idle_connection_makes_room_for_another(served: Path) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(served)) for _ in range(7)]
        await clients[0].send(call(1, STAT))
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await status(clients[0])
        await clients[-1].send(call(1, STAT))
        assert await status(clients[-1]) == b"5"


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 63), st.integers(0, 7), st.binary(max_size=40)), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_frame_is_more_than_a_connection(frames: list[Frame]) -> None:
    """Whatever comes, the connection goes on, or ends; no error gets out of it."""

    async def main() -> None:
        async with connected() as client:
            await client.send(b"".join(frame(*each) for each in frames))
            await client.stream.send_eof()
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                while True:
                    await client.frame()

    trio.run(main)


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 4000, HEADERS - 50])
def test_texts_of_any_length_are_encoded(size: int) -> None:
    assert hpack.Decoder(HEADERS).decode(literals([(b"a", b"v" * size)]), raw=True) == [(b"a", b"v" * size)]
