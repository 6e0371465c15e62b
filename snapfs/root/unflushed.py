"""Unflushed: the committed snapshots whose data is not known to be on the disk, and those that have lost some of it.

A Commit makes its record durable and returns; the files in the layer are still in the kernel's memory.  So the record is marked
with the boot of the machine in whose memory they are, and the mount of the disk.  Whoever has flushed them takes the mark back
(``services/flushing.py``).  A daemon that merely crashed flushes again; but after a power cut, or where a disk that failed was
mounted anew, nobody knows what is in those files: they are lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from snapfs import names
from snapfs.errors import Damaged
from snapfs.kernel import probe
from snapfs.root.imprint import Imprint
from snapfs.root.layers import Layers
from snapfs.store.metastore import MetaStore
from snapfs.store.reading import Reader
from snapfs.store.writing import Writer

FAILED = "the disk failed"  # in place of a boot, whatever made it lost: no boot is called that, so it is lost to all


def boot_id() -> str:
    """What the kernel calls this boot of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Unflushed:
    """The marks of one root.  With ``marks`` false nothing is ever marked, since nothing is ever flushed.

    ``boot`` tells this boot of the machine, and this mount of the disk, from others.  ``lost`` holds the ids of the snapshots
    whose data was in memory when the power went, or the disk refused it, or whose layer a process could still write after the
    Commit.
    """

    def __init__(self, layers: Layers, records: MetaStore, *, marks: bool = True) -> None:
        self.boot = f"{boot_id()} {probe.mount_instance(layers.snapshots)}"
        self._layers = layers
        self._records = records
        self._marks = marks
        with records.reading() as reader:
            self.lost = {number for number, boot in reader.unflushed() if boot != self.boot}

    def marked(self, reader: Reader) -> list[int]:
        """The ids of the snapshots that a flush can still save."""
        return [number for number, boot in reader.unflushed() if boot == self.boot and number not in self.lost]

    def mark(self, writer: Writer, number: int) -> None:
        """Within the operation that commits snapshot ``number``."""
        if self._marks and not writer.unflushed_since(number):
            writer.mark_unflushed(number, self.boot)

    def mark_lost(self, writer: Writer, numbers: Iterable[int]) -> None:
        """Within an operation: let a later daemon of the same boot know, which would flush again and find nothing wrong.

        Raises OSError."""
        for number in numbers:
            with contextlib.suppress(Damaged):
                record = writer.record(number)
                if record is not None:
                    writer.mark_unflushed(number, FAILED)
                    self._layers.write_imprint(number, Imprint(record, FAILED))
                    info = writer.info(number, record)
                    writer.changed(info, info, counted=True)

    def settle(self, writer: Writer, numbers: Iterable[int]) -> None:
        """Within an operation: the data of these snapshots is on disk, or is taken as it is.  Raises OSError."""
        writer.clear_unflushed(numbers)
        for number in numbers:
            with contextlib.suppress(Damaged):
                record = writer.record(number)
                if record is not None:
                    self._layers.write_imprint(number, Imprint(record))

    def refuse_lost(self, numbers: Iterable[int]) -> None:
        """Raise Damaged if any of these snapshots may have lost data."""
        for number in numbers:
            if number in self.lost:
                with self._records.reading() as reader:
                    record = reader.record(number)
                name = record.name if record else str(number)
                how = f"snapfs check {names.word(self._layers.root)} --accept {names.word(name)}"
                raise Damaged(
                    f'the files of snapshot "{name}" may be torn, since they had not reached the disk when the power went or '
                    f"the disk failed, or somebody was still writing: look at {self._layers.fs(number)}; then remove the "
                    f"snapshot, or stop the daemon and take it as it is: {how}"
                )
