"""Flushing: the data of committed snapshots on its way to the disk.

One syncfs(2) in the background serves all commits before it; then their marks (``root/unflushed.py``) are cleared, all in one
write, so that no child is ever flushed before its parent.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence

import trio

from snapfs.errors import Closed, NoThread, SnapshotError, TryAgain, Unavailable
from snapfs.kernel import mounting
from snapfs.model import Kind
from snapfs.root.unflushed import Unflushed
from snapfs.store.metastore import MetaStore
from snapfs.threads import AGAIN, in_thread, in_thread_or_here

log = logging.getLogger(__name__)

QUIET, LONGEST = 2.0, 30.0
"""Seconds without another Commit after which a flush for which nobody waits begins, and after which it does in any case: the
disk would have to serve both, and others wait for the Commits."""

LATELY = 10.0  # seconds from the end of a flush within which the Commit that was told to try again does so


class Flushing:
    """The flushes of one root.  ``run`` must be running; without ``sync`` nothing is ever flushed or waited for.

    ``fd`` is open on the layers' file system, from the start on: what the disk refuses is told once to each that has it open.
    """

    def __init__(self, unflushed: Unflushed, records: MetaStore, fd: int, *, sync: bool = True) -> None:
        self.failed = 0
        """How many flushes the disk has refused."""
        self._fd = fd
        self._unflushed = unflushed
        self._records = records
        self.sync = sync
        self._next: _Flush | None = None
        self._before: dict[int, _Flush] = {}  # a Commit, by the snapshot's id
        self._wakeup = trio.Event()
        self._running = False

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Flush whatever is asked for, until cancelled; begins with what a crashed daemon left."""
        self._running = True
        if self._marked():
            self.flush_soon()
        task_status.started()
        told = False
        try:
            while True:
                with trio.move_on_at(math.inf if self._next is None else self._next.due):
                    await self._wakeup.wait()
                self._wakeup = trio.Event()
                if self._next is not None and self._next.due <= trio.current_time():
                    flush, self._next = self._next, None
                    refusal = await self._perform(flush)
                    if refusal is not None and not told:
                        log.warning("the flush of the disk has to wait: %s", refusal)
                    told = refusal is not None
                    if refusal is not None:
                        with trio.move_on_after(AGAIN):  # who asks meanwhile is to hear of it at once
                            await self._wakeup.wait()
                        self.flush_soon()
        finally:
            self._running = False
            if self._next is not None:
                self._next.end(Closed())

    async def finish(self) -> None:
        """Flush what is marked, before the end: a machine that shuts down after us loses nothing, though the boot changes."""
        with contextlib.suppress(SnapshotError):  # the records may be the caller's, and closed already, or the disk has failed
            if self._marked():
                await self._perform(_Flush(), at_end=True)

    def _marked(self) -> list[int]:
        with self._records.reading() as reader:
            return self._unflushed.marked(reader)

    def _suspect(self) -> list[int]:
        """The snapshots whose data a disk that fails may just have lost: all that are marked, and all that are active."""
        with self._records.reading() as reader:
            active = {number for number, _ in reader.listing(Kind.ACTIVE)}
        return sorted(active.union(self._marked()))

    async def _perform(self, flush: _Flush, *, at_end: bool = False) -> NoThread | None:
        """Flush, and tell those who wait for ``flush``.  NoThread is returned where no thread can be started: then nothing was
        flushed.  ``at_end`` it is then done in the loop's own."""
        error: SnapshotError | None = Closed()
        lost = self._unflushed.lost
        try:
            numbers = self._marked()
            try:
                await (in_thread_or_here if at_end else in_thread)(self._flush, flush.also)
            except OSError as refusal:
                self.failed += 1
                numbers = self._suspect()  # those committed meanwhile, too: whose pages it were the kernel doesn't tell
                lost.update(numbers)  # it tells once, and drops what it could not write
                error = Unavailable.from_os("flush the layers", refusal)
                log.error("%s; snapshots that may be torn: %s", error, numbers)
                if numbers:
                    await self._remember_lost(numbers)
                return None
            if numbers:
                await self._records.write(
                    lambda writer: self._unflushed.settle(writer, [number for number in numbers if number not in lost]),
                    frees=True,
                )
            error = None
        except NoThread as refusal:
            error = refusal
            return refusal
        except SnapshotError as refusal:
            error = refusal
            log.error("the layers are flushed, but not marked so: %s", error)
        finally:
            flush.end(error)
        return None

    def _flush(self, also: Sequence[Callable[[], None]]) -> None:
        """In a thread; raises OSError."""
        mounting.sync_file_system(self._fd)
        for act in also:
            act()

    async def doubt(self, number: int) -> None:
        """The committed snapshot ``number`` is not whole: a process that nothing had shown has a file of its layer open for
        writing.  What is not committed is left as it is."""
        with contextlib.suppress(SnapshotError), self._records.reading() as reader:
            record = reader.record(number)
            if record is not None and record.kind is Kind.COMMITTED:
                log.error(
                    'a process that could not be found has a file of snapshot "%s" open for writing, which was committed '
                    "meanwhile: it may change",
                    record.name,
                )
                self._unflushed.lost.add(number)
        if number in self._unflushed.lost:
            await self._remember_lost([number])

    async def _remember_lost(self, numbers: list[int]) -> None:
        try:
            await self._records.write(lambda writer: self._unflushed.mark_lost(writer, numbers), frees=True)
        except SnapshotError as error:
            log.error("the disk can't be told either which snapshots may be torn: %s", error)

    def flush_soon(self, then: Callable[[], None] = lambda: None, *, lazily: bool = False) -> None:
        """Flush in the background what was written so far, and call ``then`` when that has ended, or if nothing is flushed.
        ``lazily``: not before there are no more such calls for a while, unless another call wants it."""
        if self.sync and self._running:
            now = trio.current_time()
            flush = self._next = self._next or _Flush()
            flush.then.append(then)
            flush.latest = min(flush.latest, now + LONGEST if lazily else now)
            flush.due = min(flush.latest, now + QUIET)
            self._wakeup.set()
        else:
            then()

    async def flush(self, patience: float = math.inf, *, also: Callable[[], None] | None = None) -> None:
        """Return when all that was written so far is on disk, and known to be, and ``also`` was called in the same thread.

        Raises Unavailable where the disk fails, TryAgain where it takes longer than ``patience`` seconds, and NoThread: then it
        goes on.
        """
        if self.sync:
            flush = self._ask()
            if also is not None:
                flush.also.append(also)
            await flush.wait(patience)

    def is_flushed(self, number: int | None) -> bool:
        """Whether the files of the committed snapshot ``number``, or (None) of all committed ones, are known to be on disk."""
        with self._records.reading() as reader:
            if number is None:
                return not reader.unflushed()
            record = reader.record(number)
            return record is not None and record.kind is Kind.COMMITTED and not reader.unflushed_since(number)

    async def flush_before_commit(self, number: int, patience: float) -> None:
        """Return when all that was written when this was first asked for the active snapshot ``number`` is on disk.

        Raises Unavailable where the disk fails, and TryAgain where it takes longer than ``patience`` seconds: then it goes on,
        and who asks again within LATELY waits for the same.
        """
        if not self.sync:
            return
        long_ago = trio.current_time() - LATELY
        for other in [other for other, flush in self._before.items() if flush.when < long_ago]:
            del self._before[other]
        flush = self._before.get(number)
        if flush is None:
            flush = self._before[number] = self._ask()
        try:
            await flush.wait(patience)
        finally:
            if flush.ended.is_set():
                self._before.pop(number, None)

    def _ask(self) -> _Flush:
        """A flush that is still to begin.  Raises Closed."""
        if not self._running:
            raise Closed()
        self.flush_soon()
        assert self._next is not None
        return self._next


class _Flush:
    """One flush that was asked for, until it has ended."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: SnapshotError | None = None
        self.then: list[Callable[[], None]] = []
        self.also: list[Callable[[], None]] = []  # done in the thread that flushes
        self.due = self.latest = math.inf  # when it is to begin; and that if more is asked for
        self.when = math.inf  # it ended

    async def wait(self, patience: float) -> None:
        """Return when it has ended; raises what it has met, and TryAgain where that takes longer than ``patience`` seconds."""
        with trio.move_on_after(max(0, patience)):
            await self.ended.wait()
        if not self.ended.is_set() or patience < 0:
            raise TryAgain("its files are still being written to the disk")
        if self.error is not None:
            raise self.error

    def end(self, error: SnapshotError | None) -> None:
        self.error = error
        self.when = trio.current_time()
        self.ended.set()
        for call in self.then:
            call()
