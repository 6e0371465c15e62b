"""The same snapshotter for programs without an event loop: scripts, notebooks, fixtures, threads::

    import snapfs.blocking

    with snapfs.blocking.open_snapshotter("/var/lib/snapfs") as snapshots:
        mounts = snapshots.prepare("web")
        snapshots.commit("v1", "web")

Each call does what the async one of the same name does (``snapfs/snapshotter.py``), with the same types and errors, and is
durable when it returns.  A thread runs the async snapshotter; each call is a task there, for which the caller waits.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import trio

from snapfs import opening
from snapfs.errors import Closed, Forked, NoThread
from snapfs.model import Change
from snapfs.options import Feature, Options
from snapfs.snapshotter import Snapshotter as AsyncSnapshotter
from snapfs.store.metastore import MetaStore

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., object])

_Manager = Callable[[], AbstractAsyncContextManager[AsyncSnapshotter]]

_INTERRUPTIBLE = 0.5
"""Seconds after which a thread that waits looks for a Ctrl-C: CPython overlooks one that comes just before a thread waits."""


def open_snapshotter(
    root: str | os.PathLike[str], options: Options | None = None, *, metastore: MetaStore | None = None
) -> Snapshotter:
    """Open ``root`` (made where missing) for this process, until ``close`` or the end of a ``with`` block.

    ``metastore`` puts the records elsewhere than ROOT/metadata.mdb: a store that the caller opened and closes.

    Raises Unavailable where the root can't be used (a sentence that says why and what to do), Damaged where what is on disk
    contradicts itself.
    """
    _refuse_in_trio()
    return Snapshotter(_Loop(partial(opening.open_snapshotter, root, options, metastore=metastore)))


def _awaited(method: Callable[Concatenate[AsyncSnapshotter, P], Awaitable[T]]) -> Callable[Concatenate[Snapshotter, P], T]:
    """The async ``method`` as one that returns when it is done."""

    @wraps(method)
    def call(snapshotter: Snapshotter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = snapshotter._loop
        return loop.call(lambda: method(loop.snapshotter, *args, **kwargs))

    return call


def _on_the_loop(method: Callable[Concatenate[AsyncSnapshotter, P], T]) -> Callable[Concatenate[Snapshotter, P], T]:
    """``method``, which awaits nothing, called in the loop's thread, so that nothing is closed meanwhile."""

    @wraps(method)
    def call(snapshotter: Snapshotter, /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop = snapshotter._loop

        async def step() -> T:
            return method(loop.snapshotter, *args, **kwargs)

        return loop.call(step)

    return call


def _documented_by(original: object) -> Callable[[Function], Function]:
    """The docstring of ``original`` for the decorated function."""

    def decorate(function: Function) -> Function:
        function.__doc__ = original.__doc__
        return function

    return decorate


class Snapshotter:
    """The snapshots of one root.  Made by ``open_snapshotter``; as a context manager it closes itself.

    All methods may be called by any thread at any time.  Each change is durable when its call returns.  Ctrl-C cancels the call
    for which the main thread waits: that has happened or has not when KeyboardInterrupt comes out of it (a second Ctrl-C does
    not wait for that).

    After ``close`` every call raises Closed; in a forked process every call raises Forked.  Errors of the disk are Unavailable
    with the errno.  In a thread that runs a trio loop every call raises RuntimeError, because the loop would stand still: the
    async snapshotter is for that.  An asyncio loop, as a notebook runs one, stands still meanwhile.  A listener (``subscribe``)
    is called in a thread that runs a trio loop; its errors are logged.

    A snapshotter that was never closed is closed when nothing refers to it any more, or when the interpreter ends.

    What takes or gives a Reader is the async one's alone: the records can't grow while a reader is open, and a thread that
    keeps one open would wait for itself.
    """

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __enter__(self) -> Snapshotter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._loop.leave()  # without waiting: any thread, even the loop's, may be the one that calls this

    @_documented_by(AsyncSnapshotter.close)
    def close(self) -> None:
        self._loop.close()

    # -- what never changes

    @property
    def options(self) -> Options:
        """The options with which the root was opened."""
        return self._loop.snapshotter.options

    @property
    def features(self) -> Mapping[str, Feature]:
        """What depends on kernel, file system, privileges or options, by name, and whether it is in use."""
        return self._loop.snapshotter.features

    @property
    @_documented_by(AsyncSnapshotter.root)
    def root(self) -> str:
        return self._loop.snapshotter.root

    @property
    @_documented_by(AsyncSnapshotter.snapshots_directory)
    def snapshots_directory(self) -> str:
        return self._loop.snapshotter.snapshots_directory

    @property
    @_documented_by(AsyncSnapshotter.root_word)
    def root_word(self) -> str:
        return self._loop.snapshotter.root_word

    @property
    @_documented_by(AsyncSnapshotter.overlay_options)
    def overlay_options(self) -> tuple[str, ...]:
        return self._loop.snapshotter.overlay_options

    @property
    @_documented_by(AsyncSnapshotter.has_rootfs)
    def has_rootfs(self) -> bool:
        return self._loop.snapshotter.has_rootfs

    # -- making

    prepare = _awaited(AsyncSnapshotter.prepare)
    view = _awaited(AsyncSnapshotter.view)
    create = _awaited(AsyncSnapshotter.create)
    commit = _awaited(AsyncSnapshotter.commit)

    # -- changing

    remove = _awaited(AsyncSnapshotter.remove)
    rename = _awaited(AsyncSnapshotter.rename)
    name_image = _awaited(AsyncSnapshotter.name_image)
    unname_image = _awaited(AsyncSnapshotter.unname_image)
    rename_image = _awaited(AsyncSnapshotter.rename_image)
    set_image = _awaited(AsyncSnapshotter.set_image)
    update = _awaited(AsyncSnapshotter.update)
    move_label = _awaited(AsyncSnapshotter.move_label)
    accept = _awaited(AsyncSnapshotter.accept)
    cleanup = _awaited(AsyncSnapshotter.cleanup)
    flush = _awaited(AsyncSnapshotter.flush)
    flush_committed = _awaited(AsyncSnapshotter.flush_committed)

    # -- the states of a workspace

    checkpoint = _awaited(AsyncSnapshotter.checkpoint)
    rollback = _awaited(AsyncSnapshotter.rollback)
    fork = _awaited(AsyncSnapshotter.fork)
    checkpoints = _awaited(AsyncSnapshotter.checkpoints)
    list_checkpoints = _awaited(AsyncSnapshotter.list_checkpoints)
    squash = _awaited(AsyncSnapshotter.squash)
    dissolve = _awaited(AsyncSnapshotter.dissolve)

    # -- reading

    stat = _awaited(AsyncSnapshotter.stat)
    walk = _awaited(AsyncSnapshotter.walk)
    images = _awaited(AsyncSnapshotter.images)
    image = _awaited(AsyncSnapshotter.image)
    read_image = _awaited(AsyncSnapshotter.read_image)
    usage = _awaited(AsyncSnapshotter.usage)
    changes = _awaited(AsyncSnapshotter.changes)
    patch = _awaited(AsyncSnapshotter.patch)
    layer_tar = _awaited(AsyncSnapshotter.layer_tar)
    diff_id = _awaited(AsyncSnapshotter.diff_id)
    mounts = _awaited(AsyncSnapshotter.mounts)
    hand_over = _awaited(AsyncSnapshotter.hand_over)
    mount = _awaited(AsyncSnapshotter.mount)
    find_layers = _awaited(AsyncSnapshotter.find_layers)
    space = _on_the_loop(AsyncSnapshotter.space)

    # -- how it is

    @_documented_by(AsyncSnapshotter.subscribe)
    def subscribe(self, listener: Callable[[Change], None]) -> None:
        self._subscribe(partial(_tell, listener))

    _subscribe = _on_the_loop(AsyncSnapshotter.subscribe)

    shown = _on_the_loop(AsyncSnapshotter.shown)
    record = _on_the_loop(AsyncSnapshotter.record)
    by_node = _on_the_loop(AsyncSnapshotter.by_node)
    find_image = _on_the_loop(AsyncSnapshotter.find_image)
    known_usage = _on_the_loop(AsyncSnapshotter.known_usage)
    known_tar_size = _on_the_loop(AsyncSnapshotter.known_tar_size)
    has_tar_index = _on_the_loop(AsyncSnapshotter.has_tar_index)
    rootfs_of = _on_the_loop(AsyncSnapshotter.rootfs_of)
    layer_path = _on_the_loop(AsyncSnapshotter.layer_path)
    refuse_taken = _on_the_loop(AsyncSnapshotter.refuse_taken)
    is_lost = _on_the_loop(AsyncSnapshotter.is_lost)
    refuse_lost = _on_the_loop(AsyncSnapshotter.refuse_lost)
    statistics = _on_the_loop(AsyncSnapshotter.statistics)
    why_unseen = _awaited(AsyncSnapshotter.why_unseen)


def _tell(listener: Callable[[Change], None], change: Change) -> None:
    try:
        listener(change)
    except Exception:
        log.exception("a listener of changes has failed")


class _Outcome(Generic[T]):
    """A value or an error: the loop's thread sets it once, another thread waits for it.

    It waits for a lock as such: a Ctrl-C within ``threading.Event.wait`` may leave that broken.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._value: T
        self._error: BaseException | None = None
        self._setting = threading.Lock()
        self._setting.acquire()

    def succeed(self, value: T) -> None:
        self._value = value
        self._set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._set()

    def _set(self) -> None:
        self.is_set = True
        self._setting.release()

    def wait(self) -> None:
        while not self.is_set:
            self._setting.acquire(timeout=_INTERRUPTIBLE)

    def result(self) -> T:
        """Wait for the value, or raise the error."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._value
        finally:
            del self  # else the error would refer to itself, by way of its traceback


class _Call(_Outcome[T]):
    """One call on its way: a task in the loop, for which its caller waits."""

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        super().__init__()
        self._function = function
        self._scope = trio.CancelScope()
        self._has_begun = False

    def begin(self, nursery: trio.Nursery) -> None:
        """Start the task; on the loop."""
        self._has_begun = True
        nursery.start_soon(self._run, name="snapfs call")

    def cancel(self) -> None:
        """Cancel the task, or see to it that it never begins; on the loop.  The outcome is set when the task has ended."""
        self._scope.cancel()
        if not self._has_begun and not self.is_set:
            self.fail(_Interrupted())

    async def _run(self) -> None:
        try:
            with self._scope:
                self.succeed(await self._function())
            if self._scope.cancelled_caught:
                self.fail(_Interrupted())
        except trio.Cancelled:  # not by the caller: a bug has ended the loop, which tells all callers
            raise
        except BaseException as error:
            self.fail(error)
        finally:
            del self  # else the error would refer to itself, by way of its traceback


class _Interrupted(Exception):
    """A call was cancelled.  No caller sees this: it raises what has interrupted it."""


class _Loop:
    """A thread that runs a trio loop with an async snapshotter in it, from construction to ``leave``.

    Construction returns when the root is open, and raises what opening it raises.  ``snapshotter`` is for tasks of the loop,
    but for what never changes.
    """

    snapshotter: AsyncSnapshotter

    def __init__(self, manager: _Manager) -> None:
        self._process = os.getpid()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._leaving = trio.Event()
        self._is_left = False
        self._has_ended = False
        self._failure: BaseException | None = None
        self._calls: set[_Call[Any]] = set()
        opened: _Outcome[None] = _Outcome()
        self._thread = threading.Thread(target=self._run, args=(manager, opened), name="snapfs", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            raise NoThread() from None
        try:
            opened.result()
        except BaseException:  # refused, or interrupted: then it is opened and closed
            self.leave()
            self._join()
            raise
        finally:
            del opened  # else the error would refer to itself, by way of its traceback
        atexit.register(self._close_at_exit)

    # -- in the callers' threads

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """What ``function`` returns or raises as a task of the loop."""
        if os.getpid() != self._process:
            raise Forked()
        _refuse_in_trio()
        call = _Call(function)
        self._calls.add(call)
        try:
            self._soon(partial(self._begin, call))
            return call.result()
        except BaseException:
            if not call.is_set:  # Ctrl-C, or what another signal's handler raises
                with suppress(Closed):
                    self._soon(call.cancel)
                    call.wait()
            raise
        finally:
            self._calls.discard(call)
            del call  # else an error would refer to itself, by way of its traceback

    def leave(self) -> None:
        """Have the snapshotter closed and the loop ended, without waiting for that."""
        if os.getpid() != self._process:
            return
        self._is_left = True
        if self._token is not None:
            with suppress(Closed):
                self._soon(self._leaving.set)

    def close(self) -> None:
        """Have the snapshotter closed; returns when the thread has ended, or raises the bug that has ended it."""
        if os.getpid() != self._process:
            return
        _refuse_in_trio()
        self.leave()
        self._join()
        if self._failure is not None:
            raise self._failure

    def _close_at_exit(self) -> None:
        """Close it, though since Python 3.12 no thread can be started any more: the loop's own does all then."""
        if os.getpid() == self._process:
            self.leave()
            self._join()

    def _join(self) -> None:
        while self._thread.is_alive():
            self._thread.join(_INTERRUPTIBLE)

    def _soon(self, act: Callable[[], object]) -> None:
        """Have ``act`` called on the loop; raises Closed where that has ended."""
        assert self._token is not None
        if self._has_ended:
            raise self._closed()
        try:
            self._token.run_sync_soon(act)
        except trio.RunFinishedError:
            raise self._closed() from self._failure

    def _closed(self) -> Closed:
        error = Closed()
        error.__cause__ = self._failure
        return error

    # -- in the loop's thread

    def _run(self, manager: _Manager, opened: _Outcome[None]) -> None:
        try:
            trio.run(self._serve, manager, opened)
        except BaseException as error:
            self._failure = error
        self._has_ended = True
        for call in list(self._calls):
            if not call.is_set:
                call.fail(self._closed())
        if not opened.is_set:
            opened.fail(self._failure or Closed())
        atexit.unregister(self._close_at_exit)

    async def _serve(self, manager: _Manager, opened: _Outcome[None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with manager() as self.snapshotter, trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                opened.succeed(None)
                if not self._is_left:
                    await self._leaving.wait()
                await self.snapshotter.close()  # what waits is done or refused
            finally:
                self._nursery = None

    def _begin(self, call: _Call[Any]) -> None:
        if self._nursery is None:
            call.fail(self._closed())
        else:
            call.begin(self._nursery)


def _refuse_in_trio() -> None:
    if trio.lowlevel.in_trio_run():
        raise RuntimeError(
            "a blocking call would stop the trio loop that runs in this thread: use snapfs.open_snapshotter there, "
            "or call this by trio.to_thread.run_sync"
        )
