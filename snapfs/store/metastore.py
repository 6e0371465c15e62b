"""The records (``schema.py``) in one LMDB environment (``environment.py``), durable when a call returns.

**Reading** is for everybody, at any time.

**Writing** goes through one thread, the writer (``serve``): it takes all requests that wait (``requests.py``) and runs them as
a batch (``batches.py``).  Where the disk fails in the middle of one, it may be in doubt for a while (``doubt.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import lmdb
import trio

from snapfs.errors import Closed, SnapshotError
from snapfs.model import Change
from snapfs.store.batches import BatchRunner
from snapfs.store.environment import Environment
from snapfs.store.reading import Reader
from snapfs.store.requests import Request
from snapfs.store.schema import Tables
from snapfs.store.writing import Operation

T = TypeVar("T")

MAP_SIZE = 1 << 20  # to begin with: it grows with the records
BATCH = 128  # operations that one sync serves at most, so that nobody waits for an endless batch


class MetaStore:
    """One LMDB environment with one writer.

    Open it (``MetaStore(path)``: the file), run ``serve`` in a nursery, ``close`` it.
    Without ``sync`` nothing is ever flushed: a power cut may take the whole store, a crash of the process takes nothing.
    Raises Unavailable where the file can't be opened or another process has it, Damaged where it is none of ours or of a
    newer schema: it is not touched then.  A file that is missing or empty becomes a new store.
    """

    def __init__(self, path: str, map_size: int = MAP_SIZE, *, sync: bool = True) -> None:
        self.path = path
        self.sync = sync
        self.environment = Environment(path, map_size, sync=sync)
        self.listeners: list[Callable[[Change], None]] = []
        self.batches: Counter[int] = Counter()
        """How often so many operations were made durable with one sync."""
        self._runner = BatchRunner(self.environment)
        self._queue: SimpleQueue[Request[Any] | None] | None = None

    @property
    def refusal(self) -> type[Closed] | None:
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        return self.environment.refusal

    @property
    def is_in_doubt(self) -> bool:
        """Whether nobody knows if the last changes are on the disk, which fails."""
        return self._runner.is_in_doubt

    @property
    def tables(self) -> Tables:
        return self.environment.tables

    @property
    def map_size(self) -> int:
        """Bytes that the records may take before the map has to grow."""
        return self.environment.space.size

    def close(self) -> None:
        """Close the environment; twice is fine.  The writer must have ended (``serve``)."""
        self.environment.close()

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """One consistent state, for a block that must be short and must not await anything.

        In a worker thread, outside of any other such block, it may be ``long``.
        """
        return self.environment.reading(long=long)

    async def write(self, operation: Operation[T], *, frees: bool = False) -> T:
        """Run ``operation`` in the writer's thread; returns its result when that is durable, or raises what it raised,
        having changed nothing.

        ``frees``: it leaves less than there was, so that it may use what is kept in reserve for a full disk.

        Cancellation takes back what the writer has not begun; what it has begun is finished, so it is done or not done.
        Raises Unavailable where the disk refuses (ENOSPC …) and after ``close``.
        """
        queue = self._queue
        if queue is None or self.refusal is not None:
            raise (self.refusal or Closed)()
        request = Request(operation, frees)
        queue.put(request)
        try:
            await request.done.wait()
        except trio.Cancelled:
            if request.claim():
                raise
            with trio.CancelScope(shield=True):
                await request.done.wait()
        return request.result()

    def write_now(self, operation: Operation[T], *, frees: bool = False) -> T:
        """The same, blocking, for a process that serves nobody."""
        request = Request(operation, frees)
        self._runner.run([request])
        return request.result()

    def stop(self) -> None:
        """Let ``serve`` finish what waits and return; later writes are refused."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The writer: one batch after the other until ``stop``.  May be run again after that.

        It is one thread for all that time: who asks wakes it, and it wakes who asked, with no task in between.
        """
        queue: SimpleQueue[Request[Any] | None] = SimpleQueue()
        ended = trio.Event()

        async def work() -> None:
            try:
                with trio.CancelScope(shield=True):  # a thread can't be stopped, and its outcome must be told
                    loop = trio.lowlevel.current_trio_token()
                    await trio.to_thread.run_sync(self._work, queue, loop, limiter=trio.CapacityLimiter(1))
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            self._queue = queue
            nursery.start_soon(work, name="snapfs writer's thread")
            task_status.started()
            try:
                await ended.wait()
            finally:
                self.stop()
        while not queue.empty():  # a bug has ended the writer, but nobody may wait for ever
            if (left := queue.get()) is not None:
                left.error = Closed()
                left.done.set()

    def _work(self, queue: SimpleQueue[Request[Any] | None], loop: trio.lowlevel.TrioToken) -> None:
        """Take what waits and run it, until None comes; in the writer's thread."""
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
            with suppress(lmdb.Error):  # a backup that was killed: no page that it was reading would ever be used again
                self.environment.env.reader_check()
            try:
                self._runner.run(batch)
            except BaseException as error:
                for request in batch:
                    request.error = request.error or error
                raise
            finally:
                loop.run_sync_soon(self._report, self._runner.take_settled_changes(), batch)
        if self._runner.is_in_doubt:  # the next start would find out, too, but has nothing to undo with
            with suppress(lmdb.Error, OSError, SnapshotError):
                self._runner.settle()
                loop.run_sync_soon(self._report, self._runner.take_settled_changes(), [])

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
                listener(change)
