"""Shifting: an Update of mapping labels that asks for other owners of all files in a layer (``slow_chown``).

Changing them takes as long as the layer is large, and the writer waits for nothing of that: first the writer finds the Update
sound and asks for the owners; then a worker thread changes them, while the snapshot can neither be committed nor removed; then
the writer writes the labels.  If that fails the owners are put back.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from snapfs.errors import Damaged, Unavailable
from snapfs.model import Info, Kind
from snapfs.root.owners import Shift, mapping_labels
from snapfs.rules.labels import ShiftNeeded
from snapfs.rules.root import Root
from snapfs.services.locks import Locks
from snapfs.store.metastore import MetaStore
from snapfs.store.writing import Writer
from snapfs.threads import in_thread, in_thread_or_here


class Shifting:
    """The shifts of one root.  All methods are for trio tasks."""

    def __init__(self, root: Root, records: MetaStore) -> None:
        self._root = root
        self._records = records
        self._locks = Locks()
        self._threads = trio.CapacityLimiter(2)  # disks gain little from more
        self._under_way: set[trio.Event] = set()

    @asynccontextmanager
    async def kept_out(self, number: int, patience: float = math.inf) -> AsyncIterator[None]:
        """For a block in which the owners in the layer of snapshot ``number`` stay as they are: it begins when a shift of them
        has ended.  Raises TryAgain where that takes longer than ``patience`` seconds."""
        if not self._root.shifts_owners:
            yield
            return
        async with self._locks.held(number, patience):
            yield

    async def update(self, rule: Callable[[Writer, Shift | None], Info]) -> Info:
        """Run ``rule`` in the writer, and where it asks for a shift, make that and run it again; what it returns.

        A cancelled call has happened or has not, also to the owners.  Raises what ``rule`` raises, but ShiftNeeded, and
        Unavailable where the disk refuses to change an owner.
        """
        while True:
            try:
                return await self._records.write(lambda writer: rule(writer, None))
            except ShiftNeeded as needed:
                shift = needed.shift
            ended = trio.Event()
            self._under_way.add(ended)
            try:
                async with self.kept_out(shift.number):
                    if self._is_needed(shift):  # another task may have been quicker
                        return await self._shift(shift, rule)
            except ShiftNeeded:
                continue
            finally:
                self._under_way.discard(ended)
                ended.set()

    async def _shift(self, shift: Shift, rule: Callable[[Writer, Shift | None], Info]) -> Info:
        try:
            await in_thread(shift.apply, trio.from_thread.check_cancelled, limiter=self._threads)
            return await self._records.write(lambda writer: rule(writer, shift))
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await in_thread_or_here(shift.fail)
            if isinstance(error, OSError):
                raise Unavailable.from_os("change the store", error) from error
            raise

    def _is_needed(self, shift: Shift) -> bool:
        with self._records.reading() as reader:
            try:
                record = reader.record(shift.number)
            except Damaged:
                return False
        return record is not None and record.kind is Kind.ACTIVE and mapping_labels(record.labels) == shift.before

    async def finish(self) -> None:
        """Return when no shift is under way; none may begin any more."""
        while self._under_way:
            await next(iter(self._under_way)).wait()
