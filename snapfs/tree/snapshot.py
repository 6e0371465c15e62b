"""A snapshot's directory: its attributes, its labels, and inside a committed one the listings of its children."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio

from snapfs import names
from snapfs.errors import Damaged, LeftOut, NotEmpty, NotFound, NotPermitted, Unavailable
from snapfs.imagejson import FILE as IMAGE
from snapfs.model import OWNER, ByNode, Caller, Kind
from snapfs.store.schema import Record
from snapfs.tree.advice import how_to_write, path_of, why_missing
from snapfs.tree.attributes import ATTRIBUTES, BY_NAME, ROOTFS, AttributeFile, attribute_node
from snapfs.tree.deleting import refuse_copied, refuse_teardown, refuse_with_children
from snapfs.tree.handles import Handle
from snapfs.tree.history import HISTORY, history_of
from snapfs.tree.inodes import KIND_SLOTS, Slot, pack
from snapfs.tree.kinds import ChildrenDirectory
from snapfs.tree.labels import LabelsDirectory
from snapfs.tree.node import Attributes, Directory, Node
from snapfs.tree.state import State

LABELS = "labels"

# The order of the listing: the children first, and something that each snapshot has before and behind the labels and
# image.json, which are deleted for good.  There a process that deletes a whole directory, from either end, is refused if the
# snapshot has children, is pinned or has a name in images/; it is known (``Teardowns``) when it comes to those.
_OFFSETS = dict(
    sorted(
        [(kind.value, 2 * slot) for kind, slot in KIND_SLOTS.items()]
        + [(attribute.name, 2 * attribute.slot) for attribute in ATTRIBUTES if attribute.name != IMAGE]
        + [(LABELS, 2 * BY_NAME["info.json"].slot + 1), (HISTORY, 2 * BY_NAME["usage.json"].slot + 1)]
        + [(IMAGE, 2 * BY_NAME["parent"].slot + 1)],
        key=lambda entry: entry[1],
    )
)

SETTLE = 1.0  # seconds that stat(2) waits for a count under way: the caller can't be interrupted, so no longer


class DamagedDirectory(Directory):
    """A snapshot whose record can't be read: it is listed and can be removed, and nothing else of it can be had."""

    keep_entry = False

    def __init__(self, state: State, number: int, kind: Kind, name: str) -> None:
        with state.reading() as reader:
            super().__init__(state, pack(reader.node_of(number), Slot.SNAPSHOT))
        self._kind = kind
        self._name = name

    @property
    def path(self) -> str:
        return f"{self._kind}/{names.encode(self._name)}"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, keep=False)


class SnapshotDirectory(Directory):
    """One snapshot: /KIND/NAME."""

    def __init__(self, state: State, number: int, record: Record, alias: int = 0) -> None:
        super().__init__(state, pack(record.node_of(number), Slot.SNAPSHOT | alias))
        self.alias = alias
        self.number = number
        self.record = record

    @property
    def path(self) -> str:
        return path_of(self.record)

    def attributes(self) -> Attributes:
        record = self.record
        size = (record.usage or self.state.snapshotter.known_usage(self.number, record)).size
        return Attributes(self.mode, size, size // 512, record.updated, not self.must_settle())

    def must_settle(self) -> bool:
        return self.record.kind is Kind.COMMITTED and self.record.usage is None

    async def settle(self, caller: Caller = OWNER) -> None:
        """A Commit returns before its layer is counted; a process that asks for the size right after gets the true one."""
        with trio.move_on_after(SETTLE), contextlib.suppress(Damaged, Unavailable):
            await self.state.snapshotter.usage(self.number, caller=caller)
        self.record = self.state.record(self.number)

    def lookup(self, name: str) -> Node:
        node = self._entry(name)
        if node is None:
            if (
                name == ROOTFS or (name == HISTORY and self.record.kind is Kind.ACTIVE)
            ) and not self.state.snapshotter.has_rootfs:
                raise LeftOut(why_missing(self.state, self.record))
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return node

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        for name, offset in _OFFSETS.items():
            node = self._entry(name) if offset > after else None
            if node is not None:
                yield offset, name, node

    def _entry(self, name: str) -> Node | None:
        if self.state.hidden.has(self.number, name):
            return None
        if attribute := BY_NAME.get(name):
            return attribute_node(self.state, self.number, self.record, attribute)
        if name == LABELS:
            return LabelsDirectory(self.state, self.number, self.record, self.alias)
        if name == HISTORY:
            return history_of(self.state, self.number, self.record)
        if self.record.kind is Kind.COMMITTED and name in KIND_SLOTS:
            return ChildrenDirectory(self.state, Kind(name), self.number, self.record, self.alias)
        return None

    def instead(self) -> str:
        return how_to_write(self.state, self.record)

    def refusal_to_set(self) -> NotPermitted:
        return NotPermitted(f"{super().refusal_to_set()}; {self.instead()}")

    async def rmdir(self, name: str, pid: int) -> None:
        node = self.lookup(name)
        refuse_with_children(self.state, self.number, pid)
        refuse_copied(self.state, self.number, pid)
        if next(node.entries(0), None):
            raise NotEmpty(f"{node.path} is not empty")
        self.state.hidden.hide(self.number, name)
        self.state.removals.note(node.inode)

    async def create(self, name: str) -> tuple[Node, Handle]:
        if name != IMAGE or self.record.kind is not Kind.COMMITTED:
            return await super().create(name)
        node = AttributeFile(self.state, self.number, self.record, BY_NAME[IMAGE])
        return node, await node.open(writing=True)

    async def unlink(self, name: str, pid: int) -> None:
        """Take a fixed entry out of the listing, so that what deletes a directory bottom-up gets to its rmdir; an image.json of
        its own is gone for good."""
        self.lookup(name)
        if name == IMAGE and self.record.image is not None:
            refuse_teardown(self.state, self.number, pid)
            if self.state.reads.was_refused(pid, self.number):
                refuse_copied(self.state, self.number, pid)
            await self.state.snapshotter.set_image(ByNode(self.record.node_of(self.number)), None)
            return
        refuse_with_children(self.state, self.number, pid)
        refuse_copied(self.state, self.number, pid, name)
        self.state.hidden.hide(self.number, name)
