"""Flushing: the data of committed snapshots on its way to the disk.

A Commit makes its record durable and returns; the files in the layer are still in the kernel's memory.  So the record is
marked, and one syncfs(2) in the background serves all commits before it; then their marks are cleared, all in one write, so
that no child is ever flushed before its parent.  A mark says in which boot of the machine the data was in memory, and for which
mount of the disk: a daemon that merely crashed flushes again, but after a power cut, or where a disk that failed was mounted
anew, nobody knows what is in those files.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from snapfs.errors import Closed, Damaged, SnapshotError, Unavailable
from snapfs.kernel import mounting, probe
from snapfs.model import Kind
from snapfs.root.imprint import Imprint
from snapfs.root.layers import Layers
from snapfs.store.metastore import MetaStore
from snapfs.store.writing import Writer

log = logging.getLogger(__name__)

FAILED = "the disk failed"  # in place of a boot, whatever made it lost: no boot is called that, so it is lost to all


def boot_id() -> str:
    """What the kernel calls this boot of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Flushing:
    """The flushes of one root.  ``run`` must be running; without ``sync`` nothing is ever flushed, marked or waited for.

    ``fd`` is open on the layers' file system, from the start on: what the disk refuses is told once to each that has it open.
    ``boot`` tells this boot of the machine, and this mount of the disk, from others.  ``lost`` holds the ids of the snapshots
    whose data was in memory when the power went, or the disk refused it, or whose layer somebody could still write.
    """

    def __init__(self, layers: Layers, records: MetaStore, fd: int = -1, *, sync: bool = True) -> None:
        self._fd = fd
        self._layers = layers
        self._records = records
        self._sync = sync
        self.boot = f"{boot_id()} {probe.mount_instance(layers.snapshots)}"
        self._next: _Flush | None = None
        self._wakeup = trio.Event()
        self._running = False
        with records.reading() as reader:
            self.lost = {number for number, boot in reader.unflushed() if boot != self.boot}

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
            return [number for number, boot in reader.unflushed() if boot == self.boot and number not in self.lost]

    def _suspect(self) -> list[int]:
        """Whose data a disk that fails may just have lost: all that is marked, and what is still being written."""
        with self._records.reading() as reader:
            active = {number for number, _ in reader.listing(Kind.ACTIVE)}
        return sorted(active.union(self._marked()))

    async def _perform(self, flush: _Flush) -> None:
        error: SnapshotError | None = Closed()
        try:
            numbers = self._marked()
            try:
                await trio.to_thread.run_sync(mounting.sync_file_system, self._fd)
            except OSError as refusal:
                numbers = self._suspect()  # those committed meanwhile, too: whose pages it were the kernel doesn't tell
                self.lost.update(numbers)  # it tells once, and drops what it could not write
                error = Unavailable.from_os("flush the layers", refusal)
                log.error("%s; snapshots that may be torn: %s", error, numbers)
                if numbers:
                    await self._remember_lost(numbers)
                return
            if numbers:
                await self._records.write(
                    lambda writer: self.settle(writer, [number for number in numbers if number not in self.lost]), frees=True
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
                self.lost.add(number)
        if number in self.lost:
            await self._remember_lost([number])

    async def _remember_lost(self, numbers: list[int]) -> None:
        """Let a later daemon of the same boot know, which would flush again and find nothing wrong."""

        def operation(writer: Writer) -> None:
            for number in numbers:
                with contextlib.suppress(Damaged):
                    record = writer.record(number)
                    if record is not None:
                        writer.mark_unflushed(number, FAILED)
                        self._layers.write_imprint(number, Imprint(record, FAILED))
                        info = writer.info(number, record)
                        writer.changed(info, info, counted=True)

        try:
            await self._records.write(operation, frees=True)
        except SnapshotError as error:
            log.error("the disk can't be told either which snapshots may be torn: %s", error)

    def mark(self, writer: Writer, number: int) -> None:
        """Within the operation that commits snapshot ``number``."""
        if self._sync and not writer.unflushed_since(number):
            writer.mark_unflushed(number, self.boot)

    def settle(self, writer: Writer, numbers: Iterable[int]) -> None:
        """Within an operation: the data of these snapshots is on disk, or is taken as it is."""
        writer.clear_unflushed(numbers)
        for number in numbers:
            with contextlib.suppress(Damaged):
                record = writer.record(number)
                if record is not None:
                    self._layers.write_imprint(number, Imprint(record))

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

    def refuse_lost(self, numbers: list[int]) -> None:
        """Raise Damaged if any of these snapshots may have lost data."""
        for number in numbers:
            if number in self.lost:
                with self._records.reading() as reader:
                    record = reader.record(number)
                name = record.name if record else str(number)
                raise Damaged(
                    f'the files of snapshot "{name}" may be torn, since they had not reached the disk when the power went or '
                    f"the disk failed, or somebody was still writing: look at {self._layers.fs(number)}; then remove the "
                    f"snapshot, or stop the daemon and take it as it is: snapfs check {self._layers.root} --accept {name}"
                )


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
