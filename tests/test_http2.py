"""HTTP/2 on the socket, frame by frame: what clients may send, what breaks a connection, and what bounds each of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import hpack
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapfs.containerd import http2
from snapfs.containerd.http2 import BACKLOG, HEADERS, PREFACE, STREAMS, Connection, Stream, literals

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
async def connected(handle: Callable[[Stream], Awaitable[None]] = echo, preface: bytes = PREFACE) -> AsyncIterator[Client]:
    here, there = socket.socketpair()
    there.setblocking(False)

    async def serve() -> None:
        with there:
            await Connection(there, LARGEST, handle).run()

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
