"""Flushing: the data of committed snapshots on its way to the disk.

One syncfs(2) in the background serves all commits before it; then their marks (``root/unflushed.py``) are cleared, all in one
write, so that no child is ever flushed before its parent.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import trio

from snapfs.errors import Closed, SnapshotError, Unavailable
from snapfs.kernel import mounting
from snapfs.model import Kind
from snapfs.root.unflushed import Unflushed
from snapfs.store.metastore import MetaStore

log = logging.getLogger(__name__)


class Flushing:
    """The flushes of one root.  ``run`` must be running; without ``sync`` nothing is ever flushed or waited for.

    ``fd`` is open on the layers' file system, from the start on: what the disk refuses is told once to each that has it open.
    """

    def __init__(self, unflushed: Unflushed, records: MetaStore, fd: int, *, sync: bool = True) -> None:
        self._fd = fd
        self._unflushed = unflushed
        self._records = records
        self._sync = sync
        self._next: _Flush | None = None
        self._wakeup = trio.Event()
        self._running = False

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Flush whatever is asked for, until cancelled; begins with what a crashed daemon left."""
        self._running = True
        if self._marked():
            self.flush_soon()
        task_status.started()
        try:
            while True:
                await self._wakeup.wait()
                self._wakeup = trio.Event()
                if self._next is not None:
                    flush, self._next = self._next, None
                    await self._perform(flush)
        finally:
            self._running = False
            if self._next is not None:
                self._next.end(Closed())

    async def finish(self) -> None:
        """Flush what is marked, before the end: a machine that shuts down after us loses nothing, though the boot changes."""
        with contextlib.suppress(SnapshotError):  # the records may be the caller's, and closed already, or the disk has failed
            if self._marked():
                await self._perform(_Flush())

    def _marked(self) -> list[int]:
        with self._records.reading() as reader:
            return self._unflushed.marked(reader)

    def _suspect(self) -> list[int]:
        """The snapshots whose data a disk that fails may just have lost: all that are marked, and all that are active."""
        with self._records.reading() as reader:
            active = {number for number, _ in reader.listing(Kind.ACTIVE)}
        return sorted(active.union(self._marked()))

    async def _perform(self, flush: _Flush) -> None:
        error: SnapshotError | None = Closed()
        lost = self._unflushed.lost
        try:
            numbers = self._marked()
            try:
                await trio.to_thread.run_sync(mounting.sync_file_system, self._fd)
            except OSError as refusal:
                numbers = self._suspect()  # those committed meanwhile, too: whose pages it were the kernel doesn't tell
                lost.update(numbers)  # it tells once, and drops what it could not write
                error = Unavailable.from_os("flush the layers", refusal)
                log.error("%s; snapshots that may be torn: %s", error, numbers)
                if numbers:
                    await self._remember_lost(numbers)
                return
            if numbers:
                await self._records.write(
                    lambda writer: self._unflushed.settle(writer, [number for number in numbers if number not in lost]),
                    frees=True,
                )
            error = None
        except SnapshotError as refusal:
            error = refusal
            log.error("the layers are flushed, but not marked so: %s", error)
        finally:
            flush.end(error)

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

    def flush_soon(self, then: Callable[[], None] = lambda: None) -> None:
        """Flush in the background what was written so far, and call ``then`` when that has ended, or if nothing is flushed."""
        if self._sync and self._running:
            self._next = self._next or _Flush()
            self._next.then.append(then)
            self._wakeup.set()
        else:
            then()

    async def flush(self) -> None:
        """Return when all that was written so far is on disk, and known to be.  Raises Unavailable where the disk fails."""
        if not self._sync:
            return
        if not self._running:
            raise Closed()
        self.flush_soon()
        flush = self._next
        assert flush is not None
        await flush.ended.wait()
        if flush.error is not None:
            raise flush.error


class _Flush:
    """One flush that was asked for, until it has ended."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.error: SnapshotError | None = None
        self.then: list[Callable[[], None]] = []

    def end(self, error: SnapshotError | None) -> None:
        self.error = error
        self.ended.set()
        for call in self.then:
            call()
