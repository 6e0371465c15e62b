"""The links that lead to a snapshot's real directory: from its parent's listings, and from by-id/.

Nobody may use their names without asking: they come and go with what happens elsewhere in the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import Damaged, NotFound
from snapfs.store.schema import Record
from snapfs.tree.node import Attributes, Directory, Link, Node, Slot, pack

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


class SnapshotLink(Link):
    """A link to /KIND/NAME from ``up`` directories below the root."""

    keep_entry = False

    def __init__(self, tree: Tree, number: int, record: Record, slot: Slot, path: str) -> None:
        super().__init__(tree, pack(number, slot))
        self.record = record
        self._path = path

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=len(self.target().encode()), time=self.record.updated, keep=False)

    def target(self) -> str:
        return "../" * self._path.count("/") + f"{self.record.kind}/{names.encode(self.record.name)}"


class DamagedLink(Link):
    """A link to a snapshot whose record can't be read: it is listed, and who follows it is told."""

    keep_entry = False

    def __init__(self, tree: Tree, number: int, slot: Slot, path: str, damage: Damaged) -> None:
        super().__init__(tree, pack(number, slot))
        self._path = path
        self._damage = damage

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, keep=False)

    def target(self) -> str:
        raise self._damage


def child_link(tree: Tree, number: int, record: Record) -> SnapshotLink:
    """The link in its parent's listing to the snapshot ``number``, which has a parent."""
    name = names.encode(record.name)
    with tree.reading() as reader:
        above = names.encode(reader.parent_of(record).name) if record.parent else "-"
    return SnapshotLink(tree, number, record, Slot.CHILD_LINK, f"committed/{above}/{record.kind}/{name}")


def id_link(tree: Tree, number: int, record: Record) -> SnapshotLink:
    """The link by-id/<number>."""
    return SnapshotLink(tree, number, record, Slot.ID_LINK, f"by-id/{number}")


class ByIdDirectory(Directory):
    """by-id/: whose is ROOT/snapshots/7?"""

    @property
    def path(self) -> str:
        return "by-id"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=max(self.tree.changed.values()))

    def lookup(self, name: str) -> Node:
        number = names.parse_id(name)
        if number is None:
            raise NotFound(f"by-id/{names.printable(name)} is no id")
        return id_link(self.tree, number, self.tree.record(number))

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        with self.tree.reading() as reader:
            for number in reader.numbers(after):
                node: Node
                try:
                    record = reader.record(number)
                    if record is None:
                        continue
                    node = id_link(self.tree, number, record)
                except Damaged as damage:
                    node = DamagedLink(self.tree, number, Slot.ID_LINK, f"by-id/{number}", damage)
                yield number, str(number), node
