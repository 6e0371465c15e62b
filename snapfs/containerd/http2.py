"""HTTP/2 as far as a server of gRPC needs it (RFC 9113): one connection, as tasks of trio's loop.

An answer goes to the socket from the task that has it; only where the client takes no more is it left to another task.  What a
client may have at once is bounded: bytes of headers, of requests and of answers that it doesn't take, and requests under way.
No frame takes longer for what else is under way, and other tasks have their turn between two of them.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import hpack
import trio

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

STREAMS = 4096
"""Requests that a connection may have under way."""

HEADERS = 16 << 10
"""Bytes of a request's headers, as they are sent, and as they are meant."""

HELD = 16 << 20
"""Bytes of requests that are not answered, in all connections that share a ``Held``."""

MOST = 4 * STREAMS
"""Requests under way in all of these connections."""

KEPT = (b":path", b"grpc-timeout")
"""The headers of a request that say something here."""

BACKLOG = 1 << 20
"""Bytes of answers that a client has not taken, from which on nothing more is read of it."""

TURN = 0.005
"""Seconds of frames of one connection, after which other tasks have their turn."""

_FRAME = 16 << 10  # bytes of one: what is allowed as long as nobody says otherwise
_CHUNK = 64 << 10  # read at once
_WINDOW = 1 << 20  # bytes that a client may send, of each stream and of all, until it is told that they have come

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = range(10)
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITIZED = 0x4, 0x8, 0x20
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_HEADER_LIST_SIZE = 3, 4, 6
_NO_ERROR, _PROTOCOL_ERROR, _FLOW_CONTROL_ERROR, _FRAME_SIZE_ERROR, _REFUSED_STREAM = 0, 1, 3, 6, 7
_COMPRESSION_ERROR, _ENHANCE_YOUR_CALM = 9, 11
_MOST = (1 << 31) - 1

_HEAD = struct.Struct(">HBBBL")


class Broken(Exception):
    """The client does not keep to the protocol: the connection ends, with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Held:
    """``count``: requests that are not answered; ``size``: their bytes."""

    def __init__(self) -> None:
        self.count = 0
        self.size = 0


class Stream:
    """One request, and its answer.

    ``headers`` are those of the request that are KEPT, ``body`` is what came with them, None where that was more than may be.
    ``cancelled`` is called when the client wants no answer any more.
    """

    def __init__(self, connection: Connection, number: int, headers: dict[bytes, bytes]) -> None:
        self.headers = headers
        self.body: bytearray | None = bytearray()
        self.is_open = True
        self.cancelled: Callable[[], None] = lambda: None
        self.number = number
        self.more = 0
        """Bytes that the client takes yet of this stream, beyond ``Connection.first_window``."""
        self.room = trio.lowlevel.ParkingLot()
        """Woken when these become more."""
        self.is_whole = False  # nothing more comes
        self.is_begun = False
        self._connection = connection

    def begin(self, headers: bytes) -> None:
        """Begin the answer with these headers, encoded, if it has not begun."""
        if not self.is_begun and self.is_open:
            self.is_begun = True
            self._connection.write(_frame(_HEADERS, _END_HEADERS, self.number, headers))

    async def send(self, headers: bytes, data: bytes) -> None:
        """Send a part of the answer, as fast as the client takes it, behind ``headers``, as ``begin`` takes them."""
        self.begin(headers)
        connection = self._connection
        at = 0
        try:
            while at < len(data) and self.is_open:
                own = connection.first_window + self.more
                if own > 0 and connection.has_room:
                    size = min(own, connection.window, _FRAME, len(data) - at)
                    self.more -= size
                    connection.window -= size
                    connection.write(_frame(_DATA, 0, self.number, data[at : at + size]))
                    at += size
                    continue
                connection.flush()
                if own <= 0:
                    connection.pass_on()
                    await self.room.park()
                elif not connection.has_room:
                    await connection.room.park()
        finally:
            connection.pass_on()

    def end(self, headers: bytes) -> None:
        """End the answer with these headers, encoded."""
        if self.is_open:
            connection = self._connection
            connection.write(_frame(_HEADERS, _END_HEADERS | _END_STREAM, self.number, headers))
            if not self.is_whole:
                connection.write(_frame(_RST_STREAM, 0, self.number, struct.pack(">L", _NO_ERROR)))
            connection.close(self)
            connection.flush()


class Connection:
    """One connection, on ``connected``, a socket that does not block; ``largest`` are the bytes that a request's body may have.

    ``handle`` answers one request, in a task of its own, which is cancelled when the connection ends.
    """

    def __init__(
        self, connected: socket.socket, largest: int, handle: Callable[[Stream], Awaitable[None]], held: Held | None = None
    ) -> None:
        self.window = 65535  # bytes that the client takes yet, of all streams
        self.first_window = 65535  # and of each, from its beginning
        self.room = trio.lowlevel.ParkingLot()
        """Woken when the client takes more: the first that waits, and that the next, if it leaves anything."""
        self.used = trio.current_time()
        """When it was read last."""
        self._socket = connected
        self._largest = largest
        self._handle = handle
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._held = held or Held()
        self._received = 0  # bytes of data of which the client has not been told
        self._is_ending = False
        self._unsent = bytearray()
        self._is_draining = False
        self._taken = trio.lowlevel.ParkingLot()  # woken when there is less unsent
        self._scope = trio.CancelScope()
        self._hpack = hpack.Decoder(max_header_list_size=HEADERS)
        self._wakes_all = False  # what waits for its own stream's window
        self._block: tuple[int, int, bytearray] | None = None  # headers that go on: their stream, its flags, what came
        self._nursery: trio.Nursery | None = None

    # -- the client

    async def run(self) -> None:
        """Answer what comes, until the client is gone, or breaks the protocol."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    with suppress(OSError):
                        try:
                            await self._read()
                        except Broken as broken:
                            self._go_away(broken.code)
                        except (hpack.HPACKError, UnicodeError):
                            self._go_away(_COMPRESSION_ERROR)
                    self._nursery = None  # nobody begins anything any more
                    nursery.cancel_scope.cancel()
        finally:
            for stream in list(self._streams.values()):
                self.close(stream)

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._streams

    def drop(self) -> None:
        """End it at once."""
        self._go_away(_NO_ERROR)
        self._scope.cancel()

    def end(self) -> None:
        """Take no more requests; those under way go on."""
        self._is_ending = True
        self._go_away(_NO_ERROR)

    def _go_away(self, code: int) -> None:
        self.write(_frame(_GOAWAY, 0, 0, struct.pack(">LL", self._last, code)))
        self.flush()

    async def _read(self) -> None:
        settings = ((_MAX_CONCURRENT_STREAMS, STREAMS), (_INITIAL_WINDOW_SIZE, _WINDOW), (_MAX_HEADER_LIST_SIZE, HEADERS))
        self.write(_frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HL", *setting) for setting in settings)))
        self.write(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", _WINDOW - 65535)))
        self.flush()
        buffer = bytearray()
        while len(buffer) < len(PREFACE):
            if not await self._receive(buffer):
                return
        if not buffer.startswith(PREFACE):
            raise Broken(_PROTOCOL_ERROR)
        at = len(PREFACE)
        while True:
            began = time.perf_counter()
            while len(buffer) - at >= 9:
                high, low, kind, flags, stream = _HEAD.unpack_from(buffer, at)
                size = high << 8 | low
                if size > _FRAME:
                    raise Broken(_FRAME_SIZE_ERROR)
                if len(buffer) - at < 9 + size:
                    break
                self._take(kind, flags, stream & _MOST, bytes(buffer[at + 9 : at + 9 + size]))
                at += 9 + size
                if time.perf_counter() > began + TURN:
                    self._wake_all()
                    self.flush()
                    await trio.lowlevel.checkpoint()
                    began = time.perf_counter()
            del buffer[:at]
            at = 0
            self._wake_all()
            self.flush()
            if not await self._receive(buffer):
                return

    async def _receive(self, buffer: bytearray) -> bool:
        """Whether there was more to read."""
        while len(self._unsent) > BACKLOG:
            await self._taken.park()
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                received = self._socket.recv(_CHUNK)
            except BlockingIOError:
                continue
            buffer += received
            self.used = trio.current_time()
            return bool(received)

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        """Act on one frame.  Raises Broken."""
        if self._block is not None and kind != _CONTINUATION:
            raise Broken(_PROTOCOL_ERROR)
        if kind == _DATA:
            self._take_data(number, flags, _unpadded(payload, flags), len(payload))
        elif kind == _HEADERS:
            content = _unpadded(payload, flags)
            self._take_headers(number, flags, bytearray(content[5 if flags & _PRIORITIZED else 0 :]))
        elif kind == _CONTINUATION:
            if self._block is None or self._block[0] != number:
                raise Broken(_PROTOCOL_ERROR)
            (_, first, block), self._block = self._block, None
            self._take_headers(number, first | flags & _END_HEADERS, block + payload)
        elif kind == _RST_STREAM:
            if (stream := self._streams.get(number)) is not None:
                self.close(stream)
                stream.cancelled()
        elif kind == _SETTINGS:
            self._take_settings(flags, payload)
        elif kind == _PING:
            if len(payload) != 8:
                raise Broken(_FRAME_SIZE_ERROR)
            if not flags & _ACK:
                self.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            self._take_window(number, payload)
        elif kind == _PUSH_PROMISE:
            raise Broken(_PROTOCOL_ERROR)  # all others say nothing to a server

    def _take_headers(self, number: int, flags: int, block: bytearray) -> None:
        if len(block) > HEADERS:
            raise Broken(_ENHANCE_YOUR_CALM)
        if not flags & _END_HEADERS:
            self._block = number, flags, block
            return
        found = self._hpack.decode(bytes(block), raw=True)  # in any case: what it says of its tables holds for the next, too
        stream = self._streams.get(number)
        if stream is None:
            if number <= self._last or not number & 1:  # it has ended
                return
            self._last = number
            if self._is_ending or len(self._streams) >= STREAMS or self._held.count >= MOST:
                self.write(_frame(_RST_STREAM, 0, number, struct.pack(">L", _REFUSED_STREAM)))
                return
            headers = {bytes(name): bytes(value) for name, value in found if name in KEPT}
            stream = self._streams[number] = Stream(self, number, headers)
            self._held.count += 1
        if flags & _END_STREAM:
            self._complete(stream)

    def _take_data(self, number: int, flags: int, content: bytes, counted: int) -> None:
        self._received += counted
        if self._received > _WINDOW // 2:
            self.write(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">L", self._received)))
            self._received = 0
        stream = self._streams.get(number)
        if stream is None:
            if number > self._last or not number:
                raise Broken(_PROTOCOL_ERROR)
            return
        if stream.is_whole:
            raise Broken(_PROTOCOL_ERROR)
        if stream.body is not None:
            if len(stream.body) + len(content) > self._largest or self._held.size + len(content) > HELD:
                self._held.size -= len(stream.body)
                stream.body = None
                self._begin(stream)  # to be refused, without the rest
            else:
                stream.body += content
                self._held.size += len(content)
        if flags & _END_STREAM:
            self._complete(stream)

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6:
            raise Broken(_FRAME_SIZE_ERROR)
        if flags & _ACK:
            return
        for name, value in struct.iter_unpack(">HL", payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _MOST:
                    raise Broken(_FLOW_CONTROL_ERROR)
                if value > self.first_window:
                    self._wakes_all = True
                self.first_window = value
        self.write(_frame(_SETTINGS, _ACK, 0, b""))

    def _take_window(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Broken(_FRAME_SIZE_ERROR)
        more = int.from_bytes(payload, "big") & _MOST
        if not number:
            self.window += more
            if self.window > _MOST:
                raise Broken(_FLOW_CONTROL_ERROR)
            self.pass_on()
        elif (stream := self._streams.get(number)) is not None:
            stream.more += more
            if self.first_window + stream.more > _MOST:
                raise Broken(_FLOW_CONTROL_ERROR)
            stream.room.unpark_all()

    def _wake_all(self) -> None:
        """After some frames: of the settings in them the last counts."""
        if self._wakes_all:
            self._wakes_all = False
            for stream in self._streams.values():
                stream.room.unpark_all()

    def _complete(self, stream: Stream) -> None:
        if stream.is_whole:
            raise Broken(_PROTOCOL_ERROR)
        stream.is_whole = True
        if stream.body is not None:
            self._begin(stream)

    def _begin(self, stream: Stream) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._handle, stream, name="snapfs call")

    def close(self, stream: Stream) -> None:
        """Forget ``stream``, which has ended."""
        stream.is_open = False
        if stream.body is not None:
            self._held.size -= len(stream.body)
            stream.body = None
        if self._streams.pop(stream.number, None) is not None:
            self._held.count -= 1
        stream.room.unpark_all()

    # -- to the client

    @property
    def backlog(self) -> int:
        """Bytes that the client has not taken."""
        return len(self._unsent)

    @property
    def has_room(self) -> bool:
        """Whether the client takes more data, and what was written is not too much already."""
        return self.window > 0 and len(self._unsent) <= BACKLOG

    def pass_on(self) -> None:
        """Wake the first that waits for ``room``, if there is any."""
        if self.room and self.has_room:
            self.room.unpark()

    def write(self, frame: bytes) -> None:
        """Have ``frame`` sent with the next ``flush``."""
        self._unsent += frame

    def flush(self) -> None:
        """Send what was written, as far as the client takes it now; the rest as soon as it does."""
        if self._unsent and not self._is_draining:
            self._send()
            if self._unsent and self._nursery is not None:
                self._is_draining = True
                self._nursery.start_soon(self._drain, name="snapfs answers")

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:  # it is gone, as is read next
            sent = len(self._unsent)
        del self._unsent[:sent]

    async def _drain(self) -> None:
        while self._unsent:
            await trio.lowlevel.wait_writable(self._socket)
            self._send()
            self.pass_on()
            if len(self._unsent) <= BACKLOG:
                self._taken.unpark_all()
        self._is_draining = False


def literals(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """``headers``, encoded (RFC 7541) without a table that the client would have to keep."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(text: bytes) -> bytes:
    size = len(text)
    if size < 0x7F:
        return bytes((size,)) + text
    encoded, size = bytearray((0x7F,)), size - 0x7F
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + text


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def _unpadded(payload: bytes, flags: int) -> bytes:
    """What a frame of data or headers holds.  Raises Broken."""
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Broken(_PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]
