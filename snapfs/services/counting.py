"""Counting: the bytes and inodes that each snapshot takes.  Calls share a count that runs, and committed snapshots store it.

An active snapshot is counted when a call asks for its usage.  A committed one is counted once: while its files are flushed for
a Commit that waits for that, where it is small, or else in the background right after its Commit, which does not wait for it;
``MetaStore``'s table ``uncounted`` carries that over a restart.
"""

from __future__ import annotations

import itertools
import logging

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


class Counting:
    """The counts of one root.  ``run`` must be running; all methods are for trio tasks."""

    def __init__(self, layers: Layers, records: MetaStore) -> None:
        self._layers = layers
        self._records = records
        self._nursery: trio.Nursery | None = None
        self._scans: Sharing[Usage] = Sharing(Turns(3))  # disks gain little from more, and each makes the loop wait
        self._pending: dict[int, _Count] = {}
        self._gathered: list[_Count] = []
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
            pending.begin.set()
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

    def count_small(self, number: int) -> Usage | None:
        """Count a layer at once, in a worker thread; None where it is not ``SMALL``, or where it is for ``count_soon`` to tell
        why it can't be counted."""
        left = itertools.repeat(None, SMALL)

        def checkpoint() -> None:
            try:
                next(left)
            except StopIteration:
                raise TimeoutError from None

        try:
            return disk_usage(self._layers.fs(number), checkpoint)
        except (OSError, SnapshotError):
            return None

    def count_soon(self, number: int) -> None:
        """Count the committed snapshot ``number``, which nothing changes any more, and store what it takes; with others that
        come soon after it, unless a call waits for it."""
        if number not in self._pending and self._nursery is not None:
            if not self._gathered:
                self._nursery.start_soon(self._gather, name="snapfs counts to come")
            self._pending[number] = _Count()
            self._gathered.append(self._pending[number])
            self._nursery.start_soon(self._count, number, name=f"snapfs count {number}")

    async def _gather(self) -> None:
        await trio.sleep(GATHER)
        for count in self._gathered:
            count.begin.set()
        self._gathered.clear()

    async def _count(self, number: int) -> None:
        def operation(writer: Writer) -> None:
            record = writer.record(number)
            if record is not None and record.kind is Kind.COMMITTED and record.usage is None:
                info = writer.info(number, record)
                writer.put(number, msgspec.structs.replace(record, usage=usage))
                writer.changed(info, info, counted=True)

        try:
            await self._pending[number].begin.wait()
            usage = await self._scan(number, Kind.COMMITTED, BACKGROUND)
            await self._records.write(operation, short=True)
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
            usage = await self._scans.run(f"count of {kind} snapshot {number}", count, caller, settled=kind is Kind.COMMITTED)
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
    """The count of one committed snapshot, until it is stored or failed."""

    def __init__(self) -> None:
        self.begin = trio.Event()
        self.ended = trio.Event()
        self.error: SnapshotError | None = None
