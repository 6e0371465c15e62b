"""Directories that list the snapshots of one kind: what those in the root (``snapshots``) share with those inside a committed
snapshot, which hold links to its children.  Here mkdir is Prepare or View, and rmdir Remove."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument, NotFound, NotPermitted
from snapfs.model import Kind
from snapfs.store.schema import Record
from snapfs.tree.advice import how_to_make
from snapfs.tree.deleting import refuse_copied
from snapfs.tree.inodes import KIND_SLOTS, Slot, pack
from snapfs.tree.links import DamagedLink, child_link
from snapfs.tree.node import Attributes, Directory, Node
from snapfs.tree.state import State


class KindDirectory(Directory):
    """The snapshots of ``kind``: all of them, or the children of ``parent`` (an id, 0 for none)."""

    parent = 0

    def __init__(self, state: State, kind: Kind, inode: int) -> None:
        super().__init__(state, inode)
        self.kind = kind

    @property
    def path(self) -> str:
        return self.kind

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.state.changed[self.kind])

    def find(self, name: str) -> tuple[int, Record]:
        """The snapshot whose file name here is ``name``; raises NotFound."""
        with self.state.reading() as reader:
            found = reader.find(self.key(name))
            if found is not None and found[1].kind is not self.kind and reader.indexed_as(found[0])[0] is self.kind:
                raise Damaged(f"the record of {self.path}/{name} says that it is {found[1].kind}")
        if found is None or found[1].kind is not self.kind:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return found

    def key(self, name: str) -> str:
        """The key or name of the snapshot whose file name is ``name``; raises NotFound where none can be."""
        try:
            return names.decode(name)
        except InvalidArgument as error:
            raise NotFound(str(error)) from None

    def id_of_damaged(self, name: str, damage: Damaged) -> int:
        """The id of the snapshot ``name``, whose record can't be read; raises ``damage`` where even that is not certain."""
        key = self.key(name)
        with self.state.reading() as reader:
            number = reader.id_of(key)
            if number is None or reader.indexed_as(number) != (self.kind, key):
                raise damage
        return number

    def instead(self) -> str:
        return f"it lists snapshots; {how_to_make(self.state, self.path.removesuffix(self.kind))}"

    async def mkdir(self, name: str) -> int:
        """Prepare or View."""
        if self.kind is Kind.COMMITTED:
            raise NotPermitted("committed snapshots can't be made by mkdir: rename an active one into committed/")
        key = names.decode(name)
        self.state.snapshotter.refuse_taken(key)
        number = await self.state.snapshotter.create(self.kind, key, self.parent or None)
        return pack(number, Slot.SNAPSHOT)

    async def rmdir(self, name: str, pid: int) -> None:
        """Remove; the files are deleted in the background."""
        try:
            number, _ = self.find(name)
        except Damaged as damage:
            number = self.id_of_damaged(name, damage)
        if self.state.reads.was_refused(pid, number):  # tar --remove-files comes here after any refusal
            refuse_copied(self.state, number, pid)
        try:
            await self.state.snapshotter.remove(number, refuse_mounted=True, wait=False, seen=(self.kind, self.key(name)))
        except NotFound:
            raise NotFound.snapshot(self.key(name)) from None

    async def unlink(self, name: str, pid: int) -> None:
        self.find(name)
        raise NotPermitted(f"{self.path}/{names.printable(name)} is a directory: use rmdir")


class ChildrenDirectory(KindDirectory):
    """The children of one kind of a committed snapshot, as links."""

    def __init__(self, state: State, kind: Kind, number: int, record: Record, alias: int = 0) -> None:
        super().__init__(state, kind, pack(record.node_of(number), KIND_SLOTS[kind] | alias))
        self.parent = number
        self.record = record

    @property
    def path(self) -> str:
        return f"committed/{names.encode(self.record.name)}/{self.kind}"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=max(self.record.updated, self.state.changed[self.kind]), keep=False)

    def find(self, name: str) -> tuple[int, Record]:
        number, record = super().find(name)
        if record.parent != self.parent:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return number, record

    def lookup(self, name: str) -> Node:
        try:
            number, record = self.find(name)
        except Damaged as damage:
            return DamagedLink(self.state, self.id_of_damaged(name, damage), Slot.CHILD_LINK, f"{self.path}/{name}", damage)
        return child_link(self.state, number, record)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        with self.state.reading() as reader:
            for number, key in reader.children(self.parent, self.kind, after):
                with contextlib.suppress(InvalidArgument):
                    name = names.encode(key)
                    node: Node
                    try:
                        record = reader.record(number)
                        if record is None or (record.name, record.kind, record.parent) != (key, self.kind, self.parent):
                            raise Damaged(f"the record of {self.path}/{name} contradicts the indexes")
                        node = child_link(self.state, number, record)
                    except Damaged as damage:
                        node = DamagedLink(self.state, number, Slot.CHILD_LINK, f"{self.path}/{name}", damage)
                    yield number, name, node

    async def mkdir(self, name: str) -> int:
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
        self.state.teardowns.note(pid, self.parent)
        shown = names.printable(name)
        raise NotPermitted(
            f"{self.path}/{shown} is a link to a snapshot: to remove that, rmdir {names.word(f'{self.kind}/{name}')}"
        )
