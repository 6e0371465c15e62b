"""The records (``schema.py``) in one LMDB environment (``environment.py``), durable when a call returns.

**Reading** is for everybody, at any time.

**Writing** goes through one writer (``serve``): it takes all that waits, runs each operation in a nested transaction of
its own, and makes the batch durable with one sync (group commit).  An operation that fails undoes itself and fails
alone; if the sync fails, all of the batch do.  Where the map is full it is made larger in between, while nobody reads, and
the batch is run anew (``snapfs/store/space.py``).

**Failing disks.**  Where the disk refuses LMDB's meta page, the last step of a batch, nobody knows whether the batch is on the
disk, and LMDB refuses everything from then on.  So the environment is opened anew, for reading at once.  The meta page is
written again as the kernel has it, and not before the disk has taken that is anything else written: what the records then
say is what happened, and the batch is finished or undone accordingly.  Until then nothing can be written.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import lmdb
import trio

from snapfs.errors import FULL, Closed, SnapshotError, Unavailable
from snapfs.model import Change
from snapfs.store.environment import Environment
from snapfs.store.reading import Reader
from snapfs.store.schema import Tables
from snapfs.store.soundness import disk_error
from snapfs.store.writing import Operation, Writer

log = logging.getLogger(__name__)

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
        self._doubt: _Doubt | None = None
        self._settled_changes: list[Change] = []
        self._queue: SimpleQueue[_Request[Any] | None] | None = None

    @property
    def refusal(self) -> type[Closed] | None:
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        return self.environment.refusal

    @property
    def is_in_doubt(self) -> bool:
        """Whether nobody knows if the last changes are on the disk, which fails."""
        return self._doubt is not None

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
        request = _Request(operation, frees)
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
        request = _Request(operation, frees)
        self._run(_Batch([request]))
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
        queue: SimpleQueue[_Request[Any] | None] = SimpleQueue()
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

    def _work(self, queue: SimpleQueue[_Request[Any] | None], loop: trio.lowlevel.TrioToken) -> None:
        """Take what waits and run it, until None comes; in the writer's thread."""
        stopping = False
        while not stopping and (first := queue.get()) is not None:
            requests = [first]
            while len(requests) < BATCH and not queue.empty():
                if (more := queue.get()) is None:
                    stopping = True
                    break
                requests.append(more)
            batch = _Batch([request for request in requests if request.claim()])
            if not batch.requests:
                continue
            with suppress(lmdb.Error):  # a backup that was killed: no page that it was reading would ever be used again
                self.environment.env.reader_check()
            try:
                self._run(batch)
            except BaseException as error:
                for request in batch.requests:
                    request.error = request.error or error
                raise
            finally:
                late, self._settled_changes = self._settled_changes, []
                loop.run_sync_soon(self._report, late, batch)
        if self._doubt is not None:  # the next start would find out, too, but has nothing to undo with
            with suppress(lmdb.Error, OSError, SnapshotError):
                loop.run_sync_soon(self._report, self._settle(), None)

    def _report(self, late: list[Change], batch: _Batch | None) -> None:
        """Let the listeners, and then who asked, know what is done; on the loop."""
        self._announce(late)
        if batch is not None:
            self.batches[len(batch.requests)] += 1
            for request in batch.requests:
                self._announce(request.changes)
                request.done.set()

    def _announce(self, changes: list[Change]) -> None:
        for change in changes:
            for listener in self.listeners:
                listener(change)

    def _run(self, batch: _Batch) -> None:
        """Run a batch in the writer's thread; leaves each request with a result or an error."""
        self._run_once(batch)
        refused = [request for request in batch.requests if request.frees and getattr(request.error, "errno", None) in FULL]
        if not refused or self._doubt is not None:
            return
        try:
            given = self.environment.space.release_reserve()
        except OSError as error:
            log.warning("cannot give up the reserve: %s", error)
            return
        for request in refused if given else ():
            self._run_once(_Batch([request]))

    def _run_once(self, batch: _Batch) -> None:
        if self._doubt is not None:
            try:
                self._settled_changes += self._settle()
            except (lmdb.Error, OSError, SnapshotError) as error:
                for request in batch.requests:
                    request.error = disk_error("write the records", self.path, error)
                return
        if self.environment.space.lacks_reserve:
            self.environment.refill_reserve()
        while not self._attempt(batch):
            try:
                self.environment.grow()
            except (lmdb.Error, OSError) as error:
                if len(batch.requests) > 1:  # some may need no room
                    for request in batch.requests:
                        self._run_once(_Batch([request]))
                elif not (batch.requests[0].frees and self._attempt_with_reserve(batch)):
                    batch.requests[0].error = disk_error("make room for the records", self.path, error)
                return

    def _attempt(self, batch: _Batch) -> bool:
        """Run a batch once; False where the map is too small for it: nothing has changed then."""
        ran: list[tuple[_Request[Any], Writer]] = []
        batch.directories.clear()
        alone = len(batch.requests) == 1
        number = 0
        try:
            with suppress(_NothingDone), self.environment.env.begin(write=True) as txn:
                number = txn.id()
                for request in batch.requests:
                    request.error = None
                    writer = self._run_one(txn, batch, request, alone)
                    if writer is not None:
                        ran.append((request, writer))
                if not ran:
                    raise _NothingDone
                for fd in batch.directories if self.sync else ():
                    os.fsync(fd)
        except (lmdb.Error, OSError) as error:
            if isinstance(error, lmdb.MapFullError):
                _undo_all(ran)
                return False
            refusal = disk_error("write the records", self.path, error)
            log.error("%s", refusal)
            for request in batch.requests:
                if request.error is None:
                    request.error = refusal
            if self.environment.is_panicking() or (isinstance(error, lmdb.Error) and getattr(error, "code", 0) == errno.EIO):
                self._doubt = _Doubt(number, ran)
                self._settle_soon()
            else:
                _undo_all(ran)
            return True
        _finish(ran)
        return True

    # -- a disk that fails

    def _settle_soon(self) -> None:
        """Settle what is in doubt, now if the disk allows it; else those who asked are told that it is in doubt.

        Also where LMDB has not given up: each of its descriptors would tell of this error once, and make a later batch fail.
        """
        doubt = self._doubt
        assert doubt is not None
        try:
            self._settle()
        except (lmdb.Error, OSError, SnapshotError) as error:
            log.error("%s", disk_error("find out what the disk holds of the records", self.path, error))
            for request, _ in doubt.ran:
                if isinstance(request.error, Unavailable):
                    said = f"{request.error}; whether it was done will be known when the disk takes writes again"
                    request.error = Unavailable(said, request.error.errno)

    def _settle(self) -> list[Change]:
        """Find out whether the batch in doubt is on the disk, and finish or undo it; the changes made.

        Raises lmdb.Error, OSError, Unavailable or Damaged where the disk still fails: it is in doubt then as it was, and what
        could be read before can be read, if the environment can be opened at all.
        """
        doubt = self._doubt
        assert doubt is not None
        if self.environment.reopen_error is not None or self.environment.is_panicking():
            self.environment.reopen()  # the disk may take its time, and nobody who reads waits for it
        self.environment.rewrite_pages(doubt.number & 1)
        self.environment.reopen(writable=True)
        self._doubt = None
        if self.environment.env.info()["last_txnid"] < doubt.number:
            _undo_all(doubt.ran)
            return []
        for request, _ in doubt.ran:
            request.error = None
        _finish(doubt.ran)
        return [change for request, _ in doubt.ran for change in request.changes]

    def _run_one(self, txn: lmdb.Transaction[bytes], batch: _Batch, request: _Request[Any], alone: bool) -> Writer | None:
        """Run one operation: what it wrote, None if it failed.  Raises MapFullError.

        One that is ``alone`` has the whole transaction; of several each has a nested one, for some thirty microseconds more.
        """
        writer = None
        try:
            if alone:
                writer = Writer(self.tables, txn, batch.directories)
                request.value = request.operation(writer)
                return writer
            with self.environment.env.begin(write=True, parent=txn) as nested:
                writer = Writer(self.tables, nested, batch.directories)
                request.value = request.operation(writer)
            return writer
        except SnapshotError as error:
            request.error = error
        except (lmdb.Error, OSError) as error:
            request.error = disk_error("change the store", self.path, error)
            if isinstance(error, lmdb.MapFullError):
                if writer is not None:
                    _undo(writer)
                raise
        except Exception as error:  # a bug: it must reach the caller, not end the writer
            request.error = error
        if writer is not None:
            _undo(writer)
        return None

    def _attempt_with_reserve(self, batch: _Batch) -> bool:
        """Run a batch that frees something, with all that is allocated; False where that is too small too."""
        before = self.environment.space.size
        try:
            self.environment.resize(self.environment.space.allocated)
        except OSError:
            return False
        try:
            return self._attempt(batch)
        finally:
            self.environment.resize(before)
            self.environment.space.lacks_reserve = True


class _NothingDone(Exception):
    """All operations of a batch have failed: its transaction is to be dropped."""


class _Request(Generic[T]):
    """One operation on its way through the writer."""

    def __init__(self, operation: Operation[T], frees: bool) -> None:
        self.operation = operation
        self.frees = frees
        self.done = trio.Event()
        self.value: T
        self.error: BaseException | None = None
        self.changes: list[Change] = []
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller is the first to ask: the writer, which then does it, or who wants it done no more."""
        return self._claimed.acquire(blocking=False)

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class _Batch:
    """What one sync makes durable."""

    def __init__(self, requests: list[_Request[Any]]) -> None:
        self.requests = requests
        self.directories: set[int] = set()


class _Doubt:
    """The batch of transaction ``number``, with what its operations wrote, of which nobody knows whether it is on the disk."""

    def __init__(self, number: int, ran: list[tuple[_Request[Any], Writer]]) -> None:
        self.number = number
        self.ran = ran


def _finish(ran: list[tuple[_Request[Any], Writer]]) -> None:
    """What is to be done after operations that are durable now."""
    for request, writer in ran:
        request.changes = writer.changes
        for act in writer.afters:
            try:
                act()
            except OSError as error:
                log.warning("after a change was made: %s", error)


def _undo_all(ran: list[tuple[_Request[Any], Writer]]) -> None:
    for _, writer in reversed(ran):
        _undo(writer)


def _undo(writer: Writer) -> None:
    for undo in reversed(writer.undos):
        try:
            undo()
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)
