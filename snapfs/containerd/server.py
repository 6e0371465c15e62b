"""The gRPC server in a thread of its own, with an asyncio loop in it, and the way from there to the snapshotter's trio loop.

A call that waits takes no thread: it is a task here and a task there.  What ends it here, the client's deadline or
cancellation, cancels it there, where a call has then happened or has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
import trio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from snapfs.containerd import snapshots_pb2
from snapfs.containerd.messages import pages
from snapfs.containerd.service import Service, Settle
from snapfs.containerd.socketfile import SocketFile, private_umask
from snapfs.containerd.status import status_of
from snapfs.errors import InvalidArgument, SnapshotError, Unavailable
from snapfs.snapshotter import Snapshotter
from snapfs.threads import in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE = 2.0  # seconds that calls under way have to end once the server is to stop
CALLS = 4096  # at once; further ones are refused (ResourceExhausted)

LARGEST = 256 << 10
"""Bytes of a request: several times what names and labels may have.  Others would wait while one of millions is looked at."""

_OPTIONS = (
    ("grpc.server.max_pending_requests", 2 * CALLS),  # from 1000 on gRPC would end some as cancelled, without a word
    ("grpc.server.max_pending_requests_hard_limit", 2 * CALLS),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.max_send_message_length", 16 << 20),  # as containerd's own server
    ("grpc.so_reuseport", 0),
)

_SERVICE = snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"]


async def _nobody() -> None:
    """Nobody watches the snapshots elsewhere."""


@asynccontextmanager
async def serving(path: str, snapshotter: Snapshotter, settle: Settle = _nobody) -> AsyncIterator[None]:
    """Serve ``snapshotter`` on the socket ``path`` during the block; the socket is there when it begins and gone after it.

    Raises InvalidArgument or Unavailable, with a sentence, where that can't be done.
    """
    try:
        snapshotter.root.encode()
    except UnicodeEncodeError:
        raise Unavailable("the path of ROOT is not UTF-8, and containerd can be told no other") from None
    refusal: SnapshotError | None = None
    place = await in_thread(SocketFile, path)
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(Service(snapshotter, settle), nursery)
            nursery.start_soon(server.run, place)
            await server.ready.wait()
            refusal = server.refusal
            try:
                if refusal is None:
                    yield
            finally:
                server.stop()
                with trio.CancelScope(shield=True):
                    await server.ended.wait()
                nursery.cancel_scope.cancel()
    finally:
        place.remove()
    if refusal is not None:
        raise refusal


class _Server:
    """One server; ``refusal`` says, once it is ``ready``, why it serves nobody."""

    def __init__(self, service: Service, nursery: trio.Nursery) -> None:
        self.ready = trio.Event()
        self.ended = trio.Event()
        self.refusal: SnapshotError | None = None
        self._service = service
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    async def run(self, place: SocketFile) -> None:
        """Serve until ``stop``."""
        try:
            with trio.CancelScope(shield=True):
                await in_thread(lambda: asyncio.run(self._serve(place)), limiter=trio.CapacityLimiter(1))
        except SnapshotError as error:
            self.refusal = error
        finally:
            self.ready.set()
            self.ended.set()

    def stop(self) -> None:
        """Take no more calls, and end those under way."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self, place: SocketFile) -> None:
        """In the server's thread."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=CALLS)
        handlers = {method.name: self._handler(method) for method in _SERVICE.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
        try:
            with private_umask():
                server.add_insecure_port(f"unix:{place.fresh}")
        except (OSError, RuntimeError) as error:
            raise Unavailable(f"cannot listen on {place.path}: {error}") from None
        await server.start()
        try:
            place.put()
            self._token.run_sync_soon(self.ready.set)
            await self._stopping.wait()
        finally:
            await server.stop(GRACE)

    def _handler(self, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = getattr(self._service, method.name.lower())
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(partial(self._listed, call, request), None, response.SerializeToString)
        return grpc.unary_unary_rpc_method_handler(partial(self._answered, call, request), None, response.SerializeToString)

    async def _answered(
        self,
        call: Callable[[Message], Awaitable[Message]],
        kind: type[Message],
        request: bytes,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Message:
        try:
            return await self._in_trio(partial(call, _parsed(kind, request)))
        except Exception as error:
            await _refuse(context, error)

    async def _listed(
        self,
        call: Callable[[Message], Awaitable[Any]],
        kind: type[Message],
        request: bytes,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Message]:
        try:
            infos = await self._in_trio(partial(call, _parsed(kind, request)))
        except Exception as error:
            await _refuse(context, error)
        for page in pages(infos):
            yield page

    async def _in_trio(self, call: Callable[[], Awaitable[T]]) -> T:
        """What ``call`` gives as a task of the snapshotter's loop; cancelled there when it is cancelled here."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        scope = trio.CancelScope()

        async def task() -> None:
            given: list[T] = []
            error: Exception = Unavailable("the daemon is being stopped")
            try:
                with scope:
                    given.append(await call())
            except Exception as raised:
                error = raised
            finally:
                with contextlib.suppress(RuntimeError):  # nobody is there any more
                    loop.call_soon_threadsafe(_set, answer, given, error)

        self._token.run_sync_soon(self._nursery.start_soon, task)
        try:
            return await answer
        except asyncio.CancelledError:
            self._token.run_sync_soon(scope.cancel)
            raise


def _parsed(kind: type[Message], request: bytes) -> Message:
    """The message in ``request``; not left to gRPC, which answers UNKNOWN and logs a traceback.  Raises InvalidArgument."""
    try:
        return kind.FromString(request)
    except DecodeError:
        raise InvalidArgument(f"the request is no {kind.DESCRIPTOR.full_name}: its bytes can't be decoded") from None


def _set(answer: asyncio.Future[T], given: list[T], error: Exception) -> None:
    if not answer.done():
        if given:
            answer.set_result(given[0])
        else:
            answer.set_exception(error)


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a call with the status of ``error``."""
    if isinstance(error, SnapshotError):
        code, words = status_of(error)
    else:
        log.error("a bug: a call over the socket failed", exc_info=error)
        code, words = grpc.StatusCode.INTERNAL, f"a bug: {error!r}: internal"
    await context.abort(code, words)
    raise AssertionError("abort has raised")
