"""Counting: the bytes and inodes that each snapshot takes.  Calls share a count that runs, and committed snapshots store it.

An active snapshot is counted when a call asks for its usage.  A committed one is counted once: while its files are flushed for
a Commit that waits for that, where it is small, or else in the background right after its Commit, which does not wait for it;
``MetaStore``'s table ``uncounted`` carries that over a restart.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
import trio

from snapfs.errors import Closed, Damaged, NotFound, NoThread, SnapshotError, Unavailable
from snapfs.kernel import subids
from snapfs.model import BACKGROUND, Caller, Kind, Usage
from snapfs.root.layers import Layers
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.scan.usage import disk_usage
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import Record
from snapfs.store.writing import Writer
from snapfs.threads import AGAIN

log = logging.getLogger(__name__)

GATHER = 0.05  # seconds after a Commit in which others may come, so that a burst of them is counted and written together

SMALL = 8  # directories, or parts of a large one, that a layer has whose count a Commit waits for: milliseconds

TOGETHER = 64  # small layers that one thread counts, one after the other


class Counting:
    """The counts of one root.  ``run`` must be running; all methods are for trio tasks."""

    def __init__(self, layers: Layers, records: MetaStore) -> None:
        self._layers = layers
        self._records = records
        self._nursery: trio.Nursery | None = None
        self._scans: Sharing[Any] = Sharing(Turns(3))  # disks gain little from more, and each makes the loop wait
        self._pending: dict[int, _Count] = {}
        self._gathered: dict[int, None] = {}
        self._last_known: dict[int, Usage] = {}

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Run scans until cancelled; begins with what an earlier process left uncounted."""
        with self._records.reading() as reader:
            uncounted = reader.uncounted()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._scans.serve, name="snapfs counts")
            for number in uncounted:
                self.count_soon(number)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def usage(self, number: int, record: Record, caller: Caller) -> Usage:
        """What snapshot ``number`` alone takes, for ``caller``: an active one is counted now, a committed one was or just is.

        Raises NotFound where it was removed meanwhile, Damaged where its layer is missing or could not be counted, TryAgain
        where it would wait for others.
        """
        if record.kind is Kind.VIEW:
            return Usage()
        if record.kind is Kind.ACTIVE:
            return await self._scan(number, record.kind, caller)
        while record.usage is None:
            self.count_soon(number)
            pending = self._pending.get(number)
            if pending is None:
                raise Closed()
            self._count_apart(number)
            await self._scan(number, record.kind, caller)  # the same count: it begins as soon as it may for the caller
            await pending.ended.wait()
            if pending.error is not None:
                raise pending.error
            with self._records.reading() as reader:
                now = reader.record(number)
            if now is None:
                raise NotFound.snapshot(record.name)
            record = now
        return record.usage

    def last_known(self, number: int, record: Record) -> Usage:
        """The usage as far as it is known without looking: stored, or from the last scan, or else that of an empty layer."""
        if record.kind is Kind.VIEW:
            return Usage()
        return record.usage or self._last_known.get(number, self._layers.empty_usage)

    def forget(self, number: int) -> None:
        """Snapshot ``number`` is gone."""
        self._last_known.pop(number, None)
        self._gathered.pop(number, None)
        self._end(number, NotFound(f"snapshot {number} was removed meanwhile"))

    def count_small(self, number: int, stop: Callable[[], None] = lambda: None) -> Usage | None:
        """Count a layer at once, in a worker thread; None where it is not ``SMALL``, or where it is for ``count_soon`` to tell
        why it can't be counted.  ``stop`` may raise to end it."""
        left = itertools.repeat(None, SMALL)

        def checkpoint() -> None:
            stop()
            try:
                next(left)
            except StopIteration:
                raise TimeoutError from None

        try:
            self._layers.refuse_damaged(number)
            return disk_usage(self._layers.fs(number), checkpoint)
        except (OSError, SnapshotError):
            return None

    def count_soon(self, number: int) -> None:
        """Count the committed snapshot ``number``, which nothing changes any more, and store what it takes; with others that
        come soon after it, unless a call waits for it."""
        if number not in self._pending and self._nursery is not None:
            self._pending[number] = _Count()
            if not self._gathered:
                self._nursery.start_soon(self._gather, name="snapfs counts to come")
            self._gathered[number] = None

    async def _gather(self) -> None:
        numbers: list[int] = []
        try:
            await trio.sleep(GATHER)
            numbers = list(self._gathered)
            self._gathered.clear()
            for first in range(0, len(numbers), TOGETHER):
                await self._count_together(numbers[first : first + TOGETHER])
        except trio.Cancelled:
            for number in [*numbers, *self._gathered]:
                self._end(number, Closed())
            raise

    async def _count_together(self, numbers: list[int]) -> None:
        """Count the small ones of these committed snapshots in one thread, and store that; the others each apart."""
        waiting = [number for number in numbers if self._waits(number)]

        def count(checkpoint: Checkpoint) -> dict[int, Usage]:
            counted = ((number, self.count_small(number, checkpoint)) for number in waiting if self._waits(number))
            return {number: usage for number, usage in counted if usage is not None}

        if not waiting:
            return
        with suppress(SnapshotError):  # each apart tells of it
            found = await self._scans.run(f"count of snapshots {waiting}", count, BACKGROUND)
            usages = {number: usage for number, usage in found.items() if self._waits(number)}
            await self._store(usages)
            for number in usages:
                self._end(number)
        for number in waiting:
            self._count_apart(number)

    def _waits(self, number: int) -> bool:
        """Whether snapshot ``number`` is still to be counted with others."""
        pending = self._pending.get(number)
        return pending is not None and not pending.apart

    def _end(self, number: int, error: SnapshotError | None = None) -> None:
        """Snapshot ``number`` is counted, or can't be."""
        if self._waits(number):
            pending = self._pending.pop(number)
            pending.error = error
            pending.ended.set()

    def _count_apart(self, number: int) -> None:
        """Count the committed snapshot ``number`` now, and by itself, if it still is to be counted."""
        if self._nursery is None:
            self._end(number, Closed())
        elif self._waits(number):
            self._pending[number].apart = True
            self._gathered.pop(number, None)
            self._nursery.start_soon(self._count, number, name=f"snapfs count {number}")

    async def _store(self, usages: Mapping[int, Usage]) -> None:
        """Note what these committed snapshots take, in their records."""

        def operation(writer: Writer) -> None:
            for number, usage in usages.items():
                record = writer.record(number)
                if record is not None and record.kind is Kind.COMMITTED and record.usage is None:
                    info = writer.info(number, record)
                    writer.put(number, msgspec.structs.replace(record, usage=usage))
                    writer.changed(info, info, counted=True)

        if usages:
            await self._records.write(operation, short=True)

    async def _count(self, number: int) -> None:
        try:
            await self._store({number: await self._scan(number, Kind.COMMITTED, BACKGROUND)})
        except (NotFound, Closed) as error:
            self._pending[number].error = error  # removed meanwhile, or left to the next start
        except trio.Cancelled:
            self._pending[number].error = Closed()
            raise
        except NoThread as error:
            self._pending[number].error = error
            if self._nursery is not None:
                self._nursery.start_soon(self._count_later, number, name=f"snapfs count {number} to come")
        except SnapshotError as error:
            self._pending[number].error = error
            log.warning("the usage of snapshot %d is not known: %s", number, error)
        finally:
            self._pending.pop(number).ended.set()

    async def _count_later(self, number: int) -> None:
        await trio.sleep(AGAIN)
        self.count_soon(number)

    async def _scan(self, number: int, kind: Kind, caller: Caller) -> Usage:
        """Count a layer in a worker thread; calls for the same layer share the count.  In a committed one, which it is from
        before the count on, nothing changes any more, so that they share one under way, too."""

        def count(checkpoint: Checkpoint) -> Usage:
            self._layers.refuse_damaged(number)
            return disk_usage(self._layers.fs(number), checkpoint)

        try:
            usage: Usage = await self._scans.run(
                f"count of {kind} snapshot {number}", count, caller, settled=kind is Kind.COMMITTED
            )
        except (Damaged, FileNotFoundError) as error:
            with self._records.reading() as reader:
                if reader.record(number) is None:
                    raise NotFound(f"snapshot {number} was removed meanwhile") from None
            raise (
                Damaged(f"the layer {self._layers.fs(number)} went missing") if isinstance(error, OSError) else error
            ) from None
        except OSError as error:
            raise Unavailable.from_os(f"count snapshot {number}", error, subids.hint(error)) from error
        with self._records.reading() as reader:
            if reader.record(number) is not None:  # else it was removed meanwhile, and ``forget`` has been called
                self._last_known[number] = usage
        return usage


class _Count:
    """The count of one committed snapshot, until it is stored or failed.  ``apart``: it has a task of its own."""

    def __init__(self) -> None:
        self.apart = False
        self.ended = trio.Event()
        self.error: SnapshotError | None = None
