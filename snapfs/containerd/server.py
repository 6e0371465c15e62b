"""gRPC over HTTP/2 on a Unix socket, as tasks of the snapshotter's own loop: a call goes to no other, and to no thread, before
what it asks for does.

What ends a call, the client's deadline or cancellation, cancels it: it has then happened or has not.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import errno
import logging
import math
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext
from typing import Any
from urllib.parse import quote

import trio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from snapfs.containerd import snapshots_pb2
from snapfs.containerd.http2 import Connection, Held, Stream, literals
from snapfs.containerd.messages import pages
from snapfs.containerd.service import Service, Settle
from snapfs.containerd.socketfile import SocketFile
from snapfs.containerd.status import Status, status_of
from snapfs.errors import InvalidArgument, SnapshotError, Unavailable
from snapfs.snapshotter import Snapshotter
from snapfs.threads import in_thread

log = logging.getLogger(__name__)

GRACE = 2.0  # seconds that calls under way have to end once the server is to stop
CALLS = 4096  # at once; further ones are refused (ResourceExhausted)
CONNECTIONS = 1024  # at once, and a quarter of the descriptors at most; for a further one an idle one is closed, or that one
QUEUE = 128  # connections that wait to be accepted

LARGEST = 256 << 10
"""Bytes of a request: several times what names and labels may have.  Others would wait while one of millions is looked at."""

LISTS = 8
"""Answers that tell of many snapshots, at once: each is in memory until its client has taken it."""

TAKING = 60.0
"""Seconds in which a client must have taken an answer: who reads none keeps nobody else from having one."""

_AGAIN = 0.1  # seconds after which a connection is accepted for which there was no descriptor
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

_SERVICE = snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"]

_HEADERS = literals([(b":status", b"200"), (b"content-type", b"application/grpc")])
_DONE = literals([(b"grpc-status", b"0")])


async def _nobody() -> None:
    """Nobody watches the snapshots elsewhere."""


def most_connections() -> int:
    """How many there may be at once in this process."""
    return min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


@asynccontextmanager
async def serving(path: str, snapshotter: Snapshotter, settle: Settle = _nobody) -> AsyncIterator[None]:
    """Serve ``snapshotter`` on the socket ``path`` during the block; the socket is there when it begins and gone after it.

    Raises InvalidArgument or Unavailable, with a sentence, where that can't be done.
    """
    try:
        snapshotter.root.encode()
    except UnicodeEncodeError:
        raise Unavailable("the path of ROOT is not UTF-8, and containerd can be told no other") from None
    place, listener = await in_thread(_listening, path)
    try:
        with listener:
            async with trio.open_nursery() as nursery:
                server = _Server(Service(snapshotter, settle), nursery)
                nursery.start_soon(server.accept, listener, name="snapfs socket")
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        await server.stop()
                    nursery.cancel_scope.cancel()
    finally:
        place.remove()


def _listening(path: str) -> tuple[SocketFile, socket.socket]:
    """A socket, and its place, ``path``.  Raises InvalidArgument, Unavailable."""
    place = SocketFile(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        place.bind(listener)
        listener.listen(QUEUE)
        place.put()
    except BaseException as error:
        listener.close()
        place.remove()
        if isinstance(error, OSError):
            raise Unavailable.from_os(f"listen on {path}", error) from error
        raise
    return place, listener


class _Method:
    """One method of the service: the messages, and what answers them."""

    def __init__(self, described: Any, service: Service) -> None:
        self.request: type[Message] = GetMessageClass(described.input_type)
        self.name: str = described.input_type.full_name
        self.call: Callable[[Message], Awaitable[Any]] = getattr(service, described.name.lower())
        self.streams: bool = described.server_streaming

    def parsed(self, body: bytes) -> Message:
        """The message in ``body``.  Raises InvalidArgument."""
        try:
            return self.request.FromString(body)
        except DecodeError:
            raise InvalidArgument(f"the request is no {self.name}: its bytes can't be decoded") from None


class _Server:
    """The server: all connections and calls."""

    def __init__(self, service: Service, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        named = ((f"/{_SERVICE.full_name}/{method.name}", _Method(method, service)) for method in _SERVICE.methods)
        self._methods = {path.encode(): method for path, method in named}
        self._accepting = trio.CancelScope()
        self._connections: set[Connection] = set()
        self._most = most_connections()
        self._held = Held()
        self._lists = trio.CapacityLimiter(LISTS)
        self._calls: set[trio.CancelScope] = set()
        self._is_stopping = False
        self._idle = trio.lowlevel.ParkingLot()

    async def accept(self, listener: socket.socket) -> None:
        """Serve whoever connects."""
        with self._accepting:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    connected, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                        raise
                    await trio.sleep(_AGAIN)
                    continue
                if len(self._connections) >= self._most and not self._drop_idle():
                    connected.close()
                    continue
                connected.setblocking(False)
                connection = Connection(connected, LARGEST + 5, self._answer, self._held)
                self._connections.add(connection)
                self._nursery.start_soon(self._connected, connected, connection, name="snapfs connection")

    def _drop_idle(self) -> bool:
        """End the connection that has been idle for longest; False where each has a request under way."""
        idle = min((each for each in self._connections if each.is_idle), key=lambda each: each.used, default=None)
        if idle is not None:
            self._connections.discard(idle)
            idle.drop()
        return idle is not None

    async def _connected(self, connected: socket.socket, connection: Connection) -> None:
        try:
            with connected:
                await connection.run()
        except Exception:  # a bug ends one connection, and nothing else
            log.exception("a bug: a connection to the socket failed")
        finally:
            self._connections.discard(connection)

    async def stop(self) -> None:
        """Take no more calls, and end those under way."""
        self._is_stopping = True
        self._accepting.cancel()
        for connection in self._connections:
            connection.end()
        for patience in (GRACE, math.inf):
            with trio.move_on_after(patience):
                while self._calls:
                    await self._idle.park()
            for call in self._calls:
                call.cancel()

    async def _answer(self, stream: Stream) -> None:
        """Answer one call."""
        if not stream.is_open:
            return
        if len(self._calls) >= CALLS:
            _end(stream, Status.RESOURCE_EXHAUSTED, f"{CALLS} calls are under way: try again when some have ended")
            return
        scope = trio.CancelScope(deadline=trio.current_time() + _timeout(stream.headers.get(b"grpc-timeout", b"")))
        stream.cancelled = scope.cancel
        self._calls.add(scope)
        try:
            with scope:
                await self._call(stream)
            if scope.cancelled_caught:
                if self._is_stopping:
                    _end(stream, Status.UNAVAILABLE, "the daemon is being stopped: unavailable")
                else:
                    _end(stream, Status.DEADLINE_EXCEEDED, "the deadline of the call is over")
        finally:
            self._calls.discard(scope)
            if not self._calls:
                self._idle.unpark_all()

    async def _call(self, stream: Stream) -> None:
        method = self._methods.get(stream.headers.get(b":path", b""))
        body = stream.body
        if method is None:
            _end(stream, Status.UNIMPLEMENTED, "there is no such method")
        elif body is None:
            _end(stream, Status.RESOURCE_EXHAUSTED, f"a request has at most {LARGEST} bytes")
        elif len(body) < 5 or len(body) - 5 != int.from_bytes(body[1:5], "big"):
            _end(stream, Status.INTERNAL, "a request is one message")
        elif body[0]:
            _end(stream, Status.UNIMPLEMENTED, "no compression is known here")
        else:
            try:
                request = method.parsed(bytes(body[5:]))
                async with self._lists if method.streams else nullcontext():
                    answer = await method.call(request)
                    with trio.move_on_after(TAKING) as taking:
                        await self._send(stream, pages(answer) if method.streams else (answer,))
                if taking.cancelled_caught:
                    _end(stream, Status.RESOURCE_EXHAUSTED, f"the answer was not taken within {TAKING:g} seconds")
            except SnapshotError as error:
                _end(stream, *status_of(error))
            except Exception as error:
                log.error("a bug: a call over the socket failed", exc_info=error)
                _end(stream, Status.INTERNAL, f"a bug: {error!r}: internal")

    @staticmethod
    async def _send(stream: Stream, messages: Iterable[Message]) -> None:
        """Answer with ``messages``."""
        for nth, message in enumerate(messages):
            if nth:
                await trio.lowlevel.checkpoint()  # a page takes a millisecond
            await stream.send(_HEADERS, _prefixed(message.SerializeToString()))
        stream.begin(_HEADERS)
        stream.end(_DONE)


def _prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def _end(stream: Stream, status: Status, words: str) -> None:
    """End a call with a status that is no success."""
    stream.begin(_HEADERS)
    said = quote(words, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace").encode()
    stream.end(literals([(b"grpc-status", b"%d" % status), (b"grpc-message", said)]))


def _timeout(text: bytes) -> float:
    """Seconds that a call may take; as long as it likes where ``text`` doesn't say, or means nothing."""
    unit = _UNITS.get(text[-1:])
    return int(text[:-1]) * unit if unit is not None and text[:-1].isdigit() and len(text) <= 9 else math.inf
