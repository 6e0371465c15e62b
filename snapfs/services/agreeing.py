"""Agreeing: what each directory bears (``snapfs/root/imprint.py``) is what the records say, whatever ended the process before.

An imprint is written before the record's transaction is durable, and taken back if that fails.  A process that is killed in
between takes nothing back, and a power cut may keep the record and lose the imprint.  So a process that has left all of them
right notes that in ROOT/lock at its end, with what tells this boot of the machine and this mount of the disk from others: in
these nothing that was written is lost.  A start that does not find the note compares them all, in the background, and writes
anew what disagrees with the records.  It deletes files that were to be an image.json (``root/imagefile.py``), too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import islice

import msgspec
import trio

from snapfs.errors import Damaged, SnapshotError
from snapfs.root import imagefile, imprint
from snapfs.root.imprint import Imprint
from snapfs.rules.root import Root
from snapfs.store.metastore import MetaStore
from snapfs.store.reading import Reader
from snapfs.store.writing import Writer
from snapfs.threads import in_thread_at_last

log = logging.getLogger(__name__)

CHUNK = 1000  # snapshots that are compared in one transaction

WHAT = "the comparison of directories with their records"


class Agreeing:
    """Imprints and records of one root; whether they agree is ``root.agrees``."""

    def __init__(self, root: Root, records: MetaStore) -> None:
        self._root = root
        self._layers = root.layers
        self._records = records
        self._note = (
            f"agreed {root.unflushed.boot}".rstrip()
        )  # where the file system tells nothing of its mounts the boot is all
        root.agrees = not self._layers.supports_imprints or self._layers.previous_note == self._note
        self.settled = trio.Event()
        """Set when they have been compared, if they had to be."""

    async def run(self) -> None:
        """Compare them, unless the last process has noted that they agree."""
        try:
            if not self._root.agrees:
                self._root.agrees = await self._compare()
        except SnapshotError as error:  # the next start tries again
            log.warning("not all directories could be compared with their records: %s", error)
        finally:
            self.settled.set()

    def note_end(self) -> None:
        """Note in ROOT/lock, for the next start, that they agree, if they do.  Called when nothing is written any more."""
        if self._root.agrees and not self._records.is_in_doubt:
            self._layers.leave_note(self._note)

    async def _compare(self) -> bool:
        """Compare all, and mend what disagrees; whether they agree now."""
        mended, agreed = 0, True
        numbers = iter(await in_thread_at_last(WHAT, self._numbers))
        while chunk := list(islice(numbers, CHUNK)):
            wrong = await in_thread_at_last(WHAT, self._disagreeing, chunk)
            if wrong:
                done = await self._records.write(partial(self._mend, wrong), frees=True)
                mended += done
                agreed &= done == len(wrong)
        if mended:
            log.info("%d directories did not say what the records say of them, as a crash may leave it: mended", mended)
        return agreed

    def _numbers(self) -> list[int]:
        with self._records.reading(long=True) as reader:
            return list(reader.numbers())

    def _disagreeing(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` that seem to disagree; calls may change them meanwhile."""
        with self._records.reading(long=True) as reader:
            return [number for number in numbers if self._wanted(reader, number) is not None or self._left(reader, number)]

    def _left(self, reader: Reader, number: int) -> list[str]:
        """The files in the directory of snapshot ``number`` that were to be its image.json, or were (``root/imagefile.py``)."""
        with suppress(Damaged, OSError):
            record = reader.record(number)
            if record is not None:
                directory = self._layers.held_directory(number)
                return imagefile.others(directory, record.image.digest if record.image is not None else None)
        return []

    def _wanted(self, reader: Reader, number: int) -> Imprint | None:
        """What the directory of snapshot ``number`` is to bear, if it does not, and if that is known."""
        try:
            record = reader.record(number)
        except Damaged:
            return None
        if record is None:
            return None
        expected = Imprint(msgspec.structs.replace(record, usage=None), reader.unflushed_since(number))
        try:
            return expected if imprint.read(self._layers.directory(number)) != expected else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (Damaged, OSError):
            return expected

    def _mend(self, numbers: list[int], writer: Writer) -> int:
        """Within an operation, so that nothing else changes them; how many agree now."""
        agreed = 0
        for number in numbers:
            wanted = self._wanted(writer, number)
            try:
                for path in self._left(writer, number):
                    os.unlink(path)
                if wanted is not None:
                    self._layers.write_imprint(number, wanted)
                agreed += 1
            except OSError as error:
                log.warning("%s can't be told what its record says: %s", self._layers.directory(number), error)
        return agreed
