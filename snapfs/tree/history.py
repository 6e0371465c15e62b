"""history/ of a workspace: a link to the files of each of its checkpoints, by the time at which that was made.

The names are those that Samba's shadow_copy2, and whatever else reads names with strptime(3), take as they are (NAME).
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterator
from contextlib import suppress

from snapfs import names
from snapfs.errors import Damaged, NotFound
from snapfs.labels import OF
from snapfs.model import Kind
from snapfs.store.schema import Record
from snapfs.tree.advice import path_of
from snapfs.tree.deleting import refuse_copied, refuse_with_children
from snapfs.tree.inodes import Slot, pack
from snapfs.tree.moments import SECOND
from snapfs.tree.node import Attributes, Directory, Link, Node
from snapfs.tree.state import State

HISTORY = "history"

NAME = "@GMT-%Y.%m.%d-%H.%M.%S"
"""How a link is called, in UTC; of checkpoints of one second the one with the highest number has a link."""

_LINKS = f"{HISTORY}/"  # in State.hidden


def name_of(second: int) -> str:
    """What the link to a checkpoint that was made in that second since the epoch is called."""
    return time.strftime(NAME, time.gmtime(second))


def _second_of(name: str) -> int | None:
    """The inverse; None where ``name`` is not one that ``name_of`` gives."""
    try:
        second = calendar.timegm(time.strptime(name, NAME))
    except ValueError:
        return None
    return second if name_of(second) == name else None


class HistoryLink(Link):
    """The link to the files of the checkpoint ``number``."""

    keep_entry = False

    def __init__(self, state: State, number: int, record: Record) -> None:
        super().__init__(state, pack(record.node_of(number), Slot.HISTORY_LINK))
        self.record = record

    @property
    def path(self) -> str:
        return f"active/{names.encode(self.record.labels.get(OF, '-'))}/{HISTORY}/{name_of(self.record.created // SECOND)}"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=len(self.target().encode()), time=self.record.created, keep=False)

    def target(self) -> str:
        return f"../../../{path_of(self.record)}/rootfs"


class HistoryDirectory(Directory):
    """history/ of the workspace ``number``."""

    keep_entry = False

    def __init__(self, state: State, number: int, record: Record) -> None:
        super().__init__(state, pack(record.node_of(number), Slot.HISTORY))
        self.number = number
        self.record = record

    @property
    def path(self) -> str:
        return f"{path_of(self.record)}/{HISTORY}"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.record.updated, keep=False)

    def instead(self) -> str:
        return f"it has a link for each checkpoint; writing a message to {path_of(self.record)}/checkpoint makes one"

    def lookup(self, name: str) -> Node:
        second = _second_of(name)
        node = None if second is None else self._link(self._moments().get(second, 0))
        if node is None:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist: no checkpoint was made then")
        return node

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        if self.state.hidden.has(self.number, _LINKS):
            return
        for second, number in self._moments().items():
            node = self._link(number) if second + 1 > after else None
            if node is not None:
                yield second + 1, name_of(second), node

    def _moments(self) -> dict[int, int]:
        with self.state.reading() as reader:
            return self.state.moments.of(reader, self.record.name)

    def _link(self, number: int) -> HistoryLink | None:
        """The link to the checkpoint with the id ``number``, None where there is none any more, or it is damaged."""
        record = None
        with self.state.reading() as reader, suppress(Damaged):
            record = reader.record(number) if number else None
        return None if record is None else HistoryLink(self.state, number, record)

    async def unlink(self, name: str, pid: int) -> None:
        """As with any fixed entry of a snapshot, but that all links are hidden at once: they are found by name all the same, so
        that a process that has listed them can unlink each."""
        self.lookup(name)
        refuse_with_children(self.state, self.number, pid)
        refuse_copied(self.state, self.number, pid)
        self.state.hidden.hide(self.number, _LINKS)


def history_of(state: State, number: int, record: Record) -> HistoryDirectory | None:
    """history/ of snapshot ``number``, None where that has none."""
    if record.kind is not Kind.ACTIVE or not state.snapshotter.has_rootfs or state.hidden.has(number, HISTORY):
        return None
    return HistoryDirectory(state, number, record)


def history_link(state: State, number: int, record: Record) -> HistoryLink | None:
    """The link to snapshot ``number`` in the history of its workspace, None where it is no checkpoint."""
    return HistoryLink(state, number, record) if record.kind is Kind.COMMITTED and OF in record.labels else None
