"""snapshots: all of them in one file, for programs that would have to ask for each, and for cut, awk and sort.

One line a snapshot, in the order of ids, with ten columns between tabs, none of them ever empty:

    name kind parent id size inodes created updated state labels

``name`` and ``parent`` are file names, ``.`` where there is no parent.  ``size`` (bytes) and ``inodes`` are what is known
without counting.  Times are seconds since the epoch with nine decimals.  ``state`` is ``unflushed``, ``damaged`` or ``.``.
``labels`` are ``key=value`` with commas between, ``.`` where there are none; in them ``%``, ``,``, ``=`` (of a key) and
control characters are percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from snapfs import names
from snapfs.errors import InvalidArgument
from snapfs.tree.node import Attributes, File, Node, Slot, pack, pack_version
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree

UNKNOWN_SIZE = 4096  # as in attributes

_IN_VALUE = re.compile("[%,\x00-\x1f\x7f-\x9f]")
_IN_KEY = re.compile("[%,=\x00-\x1f\x7f-\x9f]")


class ListingFile(File):
    """snapshots: collected by whoever opens it, unless nothing has changed since."""

    keep_entry = False

    def __init__(self, tree: Tree, text: Text | None = None) -> None:
        super().__init__(tree, pack(0, Slot.LISTING))
        self._text = text or tree.versions.get(self.inode)
        self.is_known = self._text is not None
        if self._text is not None:
            self.inode = pack_version(0, Slot.LISTING, self._text)
            tree.versions.keep(self.inode, self._text)

    @property
    def path(self) -> str:
        return ".snapfs/snapshots"

    def text(self) -> Text:
        return self._text or Text(b"")

    def attributes(self) -> Attributes:
        size = UNKNOWN_SIZE if self._text is None else self._text.size
        time = self._text.made if self._text is not None else max(self.tree.changed.values())
        return Attributes(self.mode, size=size, time=time, keep=False)

    async def refresh(self) -> Node:
        before = self.tree.changes
        if before == self.tree.listed and self.tree.versions.get(pack(0, Slot.LISTING)) is not None:
            return ListingFile(self.tree)
        text = await trio.to_thread.run_sync(lambda: self.tree.spool(_lines(self.tree)))
        self.tree.versions.keep(pack(0, Slot.LISTING), text)
        self.tree.listed = before
        return ListingFile(self.tree, text)


def _lines(tree: Tree) -> Iterator[str]:
    """In a worker thread."""
    snapshotter = tree.snapshotter
    with snapshotter.reading(long=True) as reader:
        found = list(reader.dump())
    file_names: dict[int, str] = {}
    for number, record in found:
        try:
            file_names[number] = names.encode(record.name)
        except InvalidArgument:
            continue
    for number, record in found:
        if number not in file_names:
            continue
        usage = snapshotter.known_usage(number, record)
        damaged = record.parent and record.parent not in file_names
        state = "damaged" if damaged else "unflushed" if snapshotter.is_lost(number) else "."
        yield (
            f"{file_names[number]}\t{record.kind}\t{file_names.get(record.parent, '.')}\t{number}\t{usage.size}\t"
            f"{usage.inodes}\t{_seconds(record.created)}\t{_seconds(record.updated)}\t{state}\t{_labels(record.labels)}\n"
        )


def _seconds(ns: int) -> str:
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d}"


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f"{_encode(_IN_KEY, key)}={_encode(_IN_VALUE, labels[key])}" for key in sorted(labels)) or "."


def _encode(special: re.Pattern[str], text: str) -> str:
    return special.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), text)
