"""snapshots: all of them in one file, for programs that would have to ask for each, and for cut, awk and sort.

One line a snapshot, in the order of ids, with ten columns between tabs, none of them ever empty:

    name kind parent id size inodes created updated state labels

``name`` and ``parent`` are file names, ``.`` where there is no parent.  ``size`` (bytes) and ``inodes`` are what is known
without counting.  Times are seconds since the epoch with nine decimals.  ``state`` is ``unflushed``, ``damaged`` or ``.``.
``labels`` are ``key=value`` with commas between, ``.`` where there are none; in them ``%``, ``,``, ``=`` (of a key), control
characters and what nobody sees (``names.UNSEEN``) are percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import closing, suppress

from snapfs import names
from snapfs.errors import InvalidArgument
from snapfs.model import OWNER, Caller
from snapfs.threads import in_thread
from snapfs.tree.inodes import Slot, pack
from snapfs.tree.node import Node
from snapfs.tree.state import State
from snapfs.tree.textfile import TextFile
from snapfs.tree.texts import Text

_RANGES = f"%,=\x00-\x1f\x7f-\x9f{names.UNSEEN}"
_SPECIAL = re.compile(f"[{_RANGES}]")
_IN_KEY = {
    number: "".join(f"%{byte:02X}" for byte in chr(number).encode())
    for first, last in re.findall("(.)(?:-(.))?", _RANGES, re.DOTALL)
    for number in range(ord(first), ord(last or first) + 1)
}
_IN_VALUE = {number: text for number, text in _IN_KEY.items() if number != ord("=")}


class ListingFile(TextFile):
    """snapshots: collected when a process opens it, unless nothing has changed since."""

    keep_entry = False
    keep_attributes = False
    waits_for = "snapshots"

    def __init__(self, state: State, text: Text | None = None) -> None:
        super().__init__(state, 0, Slot.LISTING, fixed=False, text=text)

    @property
    def path(self) -> str:
        return ".snapfs/snapshots"

    def render(self) -> Text | None:
        return self.state.versions.get(pack(0, Slot.LISTING))

    def text(self) -> Text:
        return self.known() or Text(b"")

    def time(self) -> int:
        text = self.known()
        return text.made if text is not None else max(self.state.changed.values())

    async def refresh(self, caller: Caller = OWNER) -> Node:
        """Raises TryAgain where the list is collected for others for longer than the caller's patience."""
        if self._is_right():
            return ListingFile(self.state)
        collecting = self.state.collecting
        begun = collecting.begun
        async with collecting.held_for(caller):
            if collecting.done <= begun and not self._is_right():  # else what was begun since then serves this one too
                collecting.begun += 1
                before = self.state.changes
                text = await in_thread(_collected, self.state)
                self.state.versions.keep(pack(0, Slot.LISTING), text)
                self.state.listed = before
                collecting.done = collecting.begun
            return ListingFile(self.state)

    def _is_right(self) -> bool:
        return self.state.changes == self.state.listed and self.state.versions.get(pack(0, Slot.LISTING)) is not None


def _collected(state: State) -> Text:
    """The text of the file; for a worker thread."""
    with closing(_lines(state)) as lines:  # or, where the disk is full, the records would be read until nobody has the error
        return state.spool(lines)


def _lines(state: State) -> Generator[str, None, None]:
    """The lines of the file; for a worker thread."""
    snapshotter = state.snapshotter
    with snapshotter.reading(long=True) as reader:  # of one moment; each record is held alone, for labels may be long
        file_names: dict[int, str] = {}
        for number, record in reader.dump():
            with suppress(InvalidArgument):
                file_names[number] = names.encode(record.name)
        for number, record in reader.dump():
            if number not in file_names:
                continue
            usage = snapshotter.known_usage(number, record)
            damaged = record.parent and record.parent not in file_names
            word = "damaged" if damaged else "unflushed" if snapshotter.is_lost(number) else "."
            yield (
                f"{file_names[number]}\t{record.kind}\t{file_names.get(record.parent, '.')}\t{number}\t{usage.size}\t"
                f"{usage.inodes}\t{_seconds(record.created)}\t{_seconds(record.updated)}\t{word}\t{_labels(record.labels)}\n"
            )


def _seconds(ns: int) -> str:
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d}"


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f"{_encode(_IN_KEY, key)}={_encode(_IN_VALUE, labels[key])}" for key in sorted(labels)) or "."


def _encode(special: dict[int, str], text: str) -> str:
    """``text`` encoded; without a call for each character, for users make labels of special ones alone."""
    return text.translate(special) if _SPECIAL.search(text) else text
