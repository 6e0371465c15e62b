"""The records (``schema.py``) in one LMDB environment (``environment.py``), durable when a call returns.

**Reading** (``reading.py``) is possible in every thread at any time, and waits for no writing.

**Writing** goes through one thread, the writer (``serve``): it takes all requests that wait (``requests.py``) and runs them as
a batch (``batches.py``).  Where the disk fails in the middle of one, it may be in doubt for a while (``doubt.py``).

Where nothing is flushed, most of what a write takes would be to wake that thread, and to be woken by it.  So a short one before
which no other waits is run where it was asked for, on the loop, as long as the disk is quick.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import lmdb
import trio

from snapfs.errors import Closed, NoThread, SnapshotError
from snapfs.model import Change
from snapfs.store.batches import BatchRunner
from snapfs.store.environment import Environment
from snapfs.store.reading import Reader
from snapfs.store.requests import Request
from snapfs.store.schema import Tables
from snapfs.store.writing import Operation
from snapfs.threads import in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")

MAP_SIZE = 1 << 20  # to begin with: it grows with the records
BATCH = 128  # operations that one sync serves at most, so that nobody waits for an endless batch

SHORT = 0.05  # seconds that a write on the loop may take: after a longer one the writer's thread has them all for a while
BUSY = 2.0  # seconds that it has them
TURN = 0.005  # seconds of writes on the loop, one after the other, after which other tasks have their turn


class MetaStore:
    """One LMDB environment with one writer.

    Make one (``path`` is the file), run ``serve`` in a nursery, and ``close`` it at the end.  ``map_size``: bytes for the
    records to begin with.  Without ``sync`` nothing is ever flushed: a power cut may take the whole store, a crash of the
    process takes nothing.

    ``listeners`` are called on the trio loop with each change that has become durable, before the call that made it returns.

    Raises Unavailable where the file can't be opened or another process has it open, Damaged where it is no file of snapfs or
    has a newer schema: it is not touched then.  A file that is missing or empty becomes a new store.
    """

    def __init__(self, path: str, map_size: int = MAP_SIZE, *, sync: bool = True) -> None:
        self.path = path
        self.sync = sync
        self.environment = Environment(path, map_size, sync=sync)
        self.listeners: list[Callable[[Change], None]] = []
        self.batches: Counter[int] = Counter()
        """How many batches there were of so many operations: the keys are sizes of batches."""
        self._runner = BatchRunner(self.environment)
        self._queue: SimpleQueue[Request[Any] | None] | None = None
        self._under_way = 0  # requests that the writer's thread was given, and of which it has not told yet
        self._long_at = -math.inf  # when a write on the loop has taken long
        self._turn_at = -math.inf  # when other tasks had their turn

    @property
    def refusal(self) -> type[Closed] | None:
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        return self.environment.refusal

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is unknown if the last changes are on the disk, since it fails."""
        return self._runner.is_in_doubt

    @property
    def tables(self) -> Tables:
        """The tables in the environment."""
        return self.environment.tables

    @property
    def map_size(self) -> int:
        """Bytes that the records may take before the map has to grow."""
        return self.environment.space.size

    def close(self) -> None:
        """Close the environment; twice is fine.  ``serve`` must have returned."""
        self.environment.close()

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """A context manager that gives one consistent state of the records (``Environment.reading``)."""
        return self.environment.reading(long=long)

    async def write(self, operation: Operation[T], *, frees: bool = False, short: bool = False) -> T:
        """Run ``operation`` in the writer's thread; returns what it returned when its changes are durable, or raises what it
        raised, and nothing has changed then.

        ``frees``: the operation leaves less in the records than there was, so that on a full disk it may use the reserve.
        ``short``: it takes a few calls of the kernel at most, and may run on the loop.

        A cancelled call either has not happened, where the writer had not begun with it, or returns as if it was not cancelled.
        Raises Unavailable where the disk refuses (ENOSPC …), Closed before ``serve`` and after ``stop``, Forked.
        """
        queue = self._queue
        if queue is None or self.refusal is not None:
            raise (self.refusal or Closed)()
        request = Request(operation, frees)
        if short and not self.sync and not self._under_way and time.perf_counter() > self._long_at + BUSY:
            await trio.lowlevel.checkpoint_if_cancelled()
            if await self._write_here(request):
                return request.result()
        queue.put(request)
        self._under_way += 1
        try:
            await request.done.wait()
        except trio.Cancelled:
            if request.claim():
                self._under_way -= 1
                raise
            with trio.CancelScope(shield=True):
                await request.done.wait()
        return request.result()

    async def _write_here(self, request: Request[Any]) -> bool:
        """Run ``request`` on the loop, while the writer's thread has nothing to do and nothing to tell.  False where it must be
        run there after all, as what would wait must: nothing has changed then."""
        began = time.perf_counter()
        self._check_readers()
        if not self._runner.run_if_quick(request):
            return False
        self._report(self._runner.take_settled_changes(), [request])
        ended = time.perf_counter()
        if ended > began + SHORT:
            self._long_at = ended
        if ended > self._turn_at + TURN:
            self._turn_at = ended
            await trio.lowlevel.cancel_shielded_checkpoint()
        return True

    def write_now(self, operation: Operation[T], *, frees: bool = False) -> T:
        """``write`` without a loop and a writer's thread: blocks, in a thread that is the only one to write."""
        request = Request(operation, frees)
        self._runner.run([request])
        return request.result()

    def stop(self) -> None:
        """Have ``serve`` run the requests that wait, and return; later requests are refused."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the writer, one batch after the other, until ``stop``.  ``serve`` may be called again after that.

        The writer is one thread for all that time: a caller's ``write`` wakes it, and it wakes the caller, with no task in
        between.  Raises NoThread where that can't be started.
        """
        queue: SimpleQueue[Request[Any] | None] = SimpleQueue()
        begun, ended = trio.Event(), trio.Event()
        refusal: NoThread | None = None

        async def work() -> None:
            nonlocal refusal
            loop = trio.lowlevel.current_trio_token()

            def write() -> None:
                loop.run_sync_soon(begun.set)
                self._work(queue, loop)

            try:
                with trio.CancelScope(shield=True):  # a thread can't be stopped, and callers wait for its results
                    await in_thread(write, limiter=trio.CapacityLimiter(1))
            except NoThread as error:  # kept out of the nursery, which would wrap it in a group
                refusal = error
            finally:
                begun.set()
                ended.set()

        async with trio.open_nursery() as nursery:
            self._queue = queue
            nursery.start_soon(work, name="snapfs writer's thread")
            try:
                await begun.wait()
                if refusal is None:
                    task_status.started()
                await ended.wait()
            finally:
                self.stop()
        while not queue.empty():  # a bug has ended the writer, but no caller may wait for ever
            if (left := queue.get()) is not None:
                left.error = Closed()
                left.done.set()
        if refusal is not None:
            raise refusal

    def _work(self, queue: SimpleQueue[Request[Any] | None], loop: trio.lowlevel.TrioToken) -> None:
        """In the writer's thread: take the requests that wait from ``queue`` and run them, until None comes."""
        stopping = False
        while not stopping and (first := queue.get()) is not None:
            requests = [first]
            while len(requests) < BATCH and not queue.empty():
                if (more := queue.get()) is None:
                    stopping = True
                    break
                requests.append(more)
            batch = [request for request in requests if request.claim()]
            if not batch:
                continue
            try:
                self._run(batch)
            except BaseException as error:
                for request in batch:
                    request.error = request.error or error
                raise
            finally:
                loop.run_sync_soon(self._tell, self._runner.take_settled_changes(), batch)
        if self._runner.is_in_doubt:  # the next start would find out, too, but has nothing to undo with
            with suppress(lmdb.Error, OSError, SnapshotError):
                self._runner.settle()
                loop.run_sync_soon(self._report, self._runner.take_settled_changes(), [])

    def _run(self, batch: list[Request[Any]]) -> None:
        self._check_readers()
        self._runner.run(batch)

    def _check_readers(self) -> None:
        with suppress(lmdb.Error):  # else no page that a killed backup was reading would ever be used again
            self.environment.env.reader_check()

    def _tell(self, settled: list[Change], batch: list[Request[Any]]) -> None:
        """On the loop: what the writer's thread has done."""
        self._under_way -= len(batch)
        self._report(settled, batch)

    def _report(self, settled: list[Change], batch: list[Request[Any]]) -> None:
        """On the loop: tell the listeners what has changed, and then the callers that their requests are done."""
        self._announce(settled)
        if batch:
            self.batches[len(batch)] += 1
        for request in batch:
            self._announce(request.changes)
            request.done.set()

    def _announce(self, changes: list[Change]) -> None:
        for change in changes:
            for listener in self.listeners:
                try:
                    listener(change)
                except Exception:  # a bug of one listener keeps no caller waiting, and no other listener from hearing of it
                    log.exception("a listener of changes has failed")
