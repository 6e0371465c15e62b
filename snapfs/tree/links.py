"""The links that lead to a snapshot's real directory: from its parent's listings, and from by-id/.

No cache may go on using their names: they come and go with what happens elsewhere in the tree.
"""

from __future__ import annotations

from collections.abc import Iterator

from snapfs import names
from snapfs.errors import Damaged, NotFound
from snapfs.store.schema import Record
from snapfs.tree.advice import path_of
from snapfs.tree.inodes import Slot, pack
from snapfs.tree.node import Attributes, Directory, Link, Node
from snapfs.tree.state import State


class SnapshotLink(Link):
    """A link at ``path`` to /KIND/NAME; ``slot`` tells which of the links to this snapshot it is."""

    keep_entry = False

    def __init__(self, state: State, number: int, record: Record, slot: Slot, path: str) -> None:
        super().__init__(state, pack(record.node_of(number), slot))
        self.record = record
        self._path = path

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=len(self.target().encode()), time=self.record.updated, keep=False)

    def target(self) -> str:
        return "../" * self._path.count("/") + path_of(self.record)


class DamagedLink(Link):
    """A link to a snapshot whose record can't be read: it is listed, and a process that follows it is told (``damage``)."""

    keep_entry = False

    def __init__(self, state: State, number: int, slot: Slot, path: str, damage: Damaged) -> None:
        with state.reading() as reader:
            super().__init__(state, pack(reader.node_of(number), slot))
        self._path = path
        self._damage = damage

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, keep=False)

    def target(self) -> str:
        raise self._damage


def child_link(state: State, number: int, record: Record) -> SnapshotLink:
    """The link in its parent's listing to the snapshot ``number``, which has a parent."""
    name = names.encode(record.name)
    with state.reading() as reader:
        above = names.encode(reader.parent_of(record).name) if record.parent else "-"
    return SnapshotLink(state, number, record, Slot.CHILD_LINK, f"committed/{above}/{record.kind}/{name}")


def id_link(state: State, number: int, record: Record) -> SnapshotLink:
    """The link by-id/<number>."""
    return SnapshotLink(state, number, record, Slot.ID_LINK, f"by-id/{number}")


class ByIdDirectory(Directory):
    """by-id/: a link for each snapshot, by which that of the directory ROOT/snapshots/7 is found."""

    @property
    def path(self) -> str:
        return "by-id"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=max(self.state.changed.values()))

    def lookup(self, name: str) -> Node:
        number = names.parse_id(name)
        if number is None:
            raise NotFound(f"by-id/{names.printable(name)} is no id")
        return id_link(self.state, number, self.state.record(number))

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        with self.state.reading() as reader:
            for number in reader.numbers(after):
                node: Node
                try:
                    record = reader.record(number)
                    if record is None:
                        continue
                    node = id_link(self.state, number, record)
                except Damaged as damage:
                    node = DamagedLink(self.state, number, Slot.ID_LINK, f"by-id/{number}", damage)
                yield number, str(number), node
