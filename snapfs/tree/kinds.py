"""active/, view/ and committed/: at the root they hold every snapshot of that kind, inside a committed snapshot links to
its children of that kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument, NotFound, NotPermitted
from snapfs.model import Kind
from snapfs.store.schema import Record
from snapfs.tree.advice import how_to_make
from snapfs.tree.links import DamagedLink, child_link
from snapfs.tree.node import KIND_SLOTS, Attributes, Directory, Node, Slot, pack
from snapfs.tree.snapshot import DamagedDirectory, SnapshotDirectory

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


class KindDirectory(Directory):
    """All snapshots of one kind."""

    parent = 0  # the id of the committed snapshot that it stands in

    def __init__(self, tree: Tree, kind: Kind, inode: int | None = None) -> None:
        super().__init__(tree, pack(0, KIND_SLOTS[kind]) if inode is None else inode)
        self.kind = kind

    @property
    def path(self) -> str:
        return self.kind

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.tree.changed[self.kind])

    def find(self, name: str) -> tuple[int, Record]:
        """The snapshot whose file name here is ``name``; raises NotFound."""
        with self.tree.reading() as reader:
            found = reader.find(self._key(name))
            if found is not None and found[1].kind is not self.kind and reader.indexed_as(found[0])[0] is self.kind:
                raise Damaged(f"the record of {self.path}/{name} says that it is {found[1].kind}")
        if found is None or found[1].kind is not self.kind:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return found

    def _key(self, name: str) -> str:
        try:
            return names.decode(name)
        except InvalidArgument as error:
            raise NotFound(str(error)) from None

    def _damaged(self, name: str, damage: Damaged) -> int:
        """The id of the snapshot ``name``, whose record can't be read; raises ``damage`` where even that is not certain."""
        key = self._key(name)
        with self.tree.reading() as reader:
            number = reader.id_of(key)
            if number is None or reader.indexed_as(number) != (self.kind, key):
                raise damage
        return number

    def lookup(self, name: str) -> Node:
        try:
            number, record = self.find(name)
        except Damaged as damage:
            return DamagedDirectory(self.tree, self._damaged(name, damage), self.kind, self._key(name))
        return SnapshotDirectory(self.tree, number, record, self.tree.bank(number, record))

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        tree = self.tree
        with tree.reading() as reader:
            for number, key, record in reader.records(self.kind, after):
                try:
                    name = names.encode(key)
                except InvalidArgument:  # not even the name can be read: nothing is known of it
                    continue
                if record is not None:
                    yield number, name, SnapshotDirectory(tree, number, record, tree.bank(number, record))
                else:
                    yield number, name, DamagedDirectory(tree, number, self.kind, key)

    def instead(self) -> str:
        return f"it lists snapshots; {how_to_make(self.tree, self.path.removesuffix(self.kind))}"

    async def mkdir(self, name: str) -> Node:
        """Prepare or View."""
        if self.kind is Kind.COMMITTED:
            raise NotPermitted("committed snapshots can't be made by mkdir: rename an active one into committed/")
        key = names.decode(name)
        self.tree.refuse_taken(key)
        number = await self.tree.snapshotter.create(self.kind, key, self.parent or None)
        return SnapshotDirectory(self.tree, number, self.tree.record(number))

    async def rmdir(self, name: str, pid: int) -> None:
        """Remove; the files are deleted in the background."""
        try:
            number, _ = self.find(name)
        except Damaged as damage:
            number = self._damaged(name, damage)
        if self.tree.reads.was_refused(pid, number):  # tar --remove-files comes here after any refusal
            self.tree.refuse_moved(number, pid)
        try:
            await self.tree.snapshotter.remove(number, refuse_mounted=True, wait=False)
        except NotFound:
            raise NotFound.snapshot(self._key(name)) from None

    async def unlink(self, name: str, pid: int) -> None:
        self.find(name)
        raise NotPermitted(f"{self.path}/{names.printable(name)} is a directory: use rmdir")


class ChildrenDirectory(KindDirectory):
    """The children of one kind of a committed snapshot, as links."""

    def __init__(self, tree: Tree, kind: Kind, number: int, record: Record, bank: int = 0) -> None:
        super().__init__(tree, kind, pack(number, KIND_SLOTS[kind] | bank))
        self.parent = number
        self.record = record

    @property
    def path(self) -> str:
        return f"committed/{names.encode(self.record.name)}/{self.kind}"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=max(self.record.updated, self.tree.changed[self.kind]), keep=False)

    def lookup(self, name: str) -> Node:
        try:
            number, record = self.find(name)
        except Damaged as damage:
            return DamagedLink(self.tree, self._damaged(name, damage), Slot.CHILD_LINK, f"{self.path}/{name}", damage)
        if record.parent != self.parent:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return child_link(self.tree, number, record)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        with self.tree.reading() as reader:
            for number, key in reader.children(self.parent, self.kind, after):
                with contextlib.suppress(InvalidArgument):
                    name = names.encode(key)
                    node: Node
                    try:
                        record = reader.record(number)
                        if record is None or (record.name, record.kind, record.parent) != (key, self.kind, self.parent):
                            raise Damaged(f"the record of {self.path}/{name} contradicts the indexes")
                        node = child_link(self.tree, number, record)
                    except Damaged as damage:
                        node = DamagedLink(self.tree, number, Slot.CHILD_LINK, f"{self.path}/{name}", damage)
                    yield number, name, node

    async def mkdir(self, name: str) -> Node:
        try:
            return await super().mkdir(name)
        except NotFound:
            raise NotFound.parent(self.record.name) from None

    async def rmdir(self, name: str, pid: int) -> None:
        self._refuse_to_remove(name, pid)

    async def unlink(self, name: str, pid: int) -> None:
        self._refuse_to_remove(name, pid)

    def _refuse_to_remove(self, name: str, pid: int) -> None:
        """Raise NotPermitted: ``rm -r`` of the parent, which goes on with its other entries, is to leave them alone."""
        self.lookup(name)
        self.tree.tearing_down(pid, self.parent)
        shown = names.printable(name)
        raise NotPermitted(f"{self.path}/{shown} is a link to a snapshot: to remove that, rmdir {self.kind}/{shown}")
