"""Tree: from an inode to its node.

``snapfs/fuse`` serves it through the kernel, tests walk it without a mount.  All of it runs on the trio loop; finding nodes and
their attributes never awaits anything, so a request sees one consistent state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from snapfs import names
from snapfs.errors import Damaged, NotFound, Stale
from snapfs.model import Kind
from snapfs.snapshotter import Snapshotter
from snapfs.tree.advice import path_of
from snapfs.tree.attributes import BY_SLOT, AttributeFile, attribute_node
from snapfs.tree.daemon import node_outside_snapshots
from snapfs.tree.history import history_link, history_of
from snapfs.tree.images import image_link
from snapfs.tree.inodes import (
    ALIAS,
    ENTRY_MASK,
    FIRST_LABEL,
    KINDS,
    ROOT_INODE,
    VERSION,
    Slot,
    entry_of,
    unpack,
    without_version,
)
from snapfs.tree.kinds import ChildrenDirectory
from snapfs.tree.labels import LabelsDirectory
from snapfs.tree.links import child_link, id_link
from snapfs.tree.node import Node
from snapfs.tree.renaming import Rename, what_rename_means
from snapfs.tree.snapshot import SnapshotDirectory
from snapfs.tree.state import State

REMOVE = b"user.snapfs.remove"
"""The extended attribute of a snapshot's directory that removes it when it is set to the snapshot's id: rmdir(2) takes a name,
which may be another's by then."""


class Tree:
    """The tree over ``snapshotter``; the arguments are those of ``State``, which is what its nodes share."""

    def __init__(
        self,
        snapshotter: Snapshotter,
        served: Mapping[str, object] | None = None,
        *,
        dirsync: bool = False,
        window: str = "",
        is_inside: Callable[[int], bool] = lambda pid: False,
    ) -> None:
        self.snapshotter = snapshotter
        self.state = State(snapshotter, served or {}, dirsync=dirsync, window=window, is_inside=is_inside)

    def node(self, inode: int) -> Node:
        """The node of ``inode``; raises NotFound where there is none (any more), Stale where the file has another text by now
        and the one that was looked up is forgotten."""
        number, slot = unpack(inode)
        if slot & VERSION:
            return self._version(inode, number, slot & ENTRY_MASK)
        if number == 0:
            return node_outside_snapshots(self.state, slot)
        if slot == Slot.IMAGE:
            return image_link(self.state, number)
        number, record = self.state.snapshot(number)
        if slot >= FIRST_LABEL:
            return LabelsDirectory(self.state, number, record).node(inode)
        node: Node | None = None
        alias, entry = slot & ALIAS, slot & ENTRY_MASK
        if entry in (Slot.SNAPSHOT, Slot.JUST_MADE):
            node = SnapshotDirectory(self.state, number, record, alias)
        elif entry == Slot.LABELS:
            node = LabelsDirectory(self.state, number, record, alias)
        elif entry == Slot.CHILD_LINK:
            node = child_link(self.state, number, record)
        elif entry == Slot.ID_LINK:
            node = id_link(self.state, number, record)
        elif entry == Slot.HISTORY:
            node = history_of(self.state, number, record)
        elif entry == Slot.HISTORY_LINK:
            node = history_link(self.state, number, record)
        elif entry in BY_SLOT:
            node = attribute_node(self.state, number, record, BY_SLOT[entry])
        elif record.kind is Kind.COMMITTED and entry in KINDS:
            node = ChildrenDirectory(self.state, KINDS[Slot(entry)], number, record, alias)
        if node is None:
            raise NotFound(f"{path_of(record)} has no such entry")
        return node

    def _version(self, inode: int, number: int, slot: int) -> Node:
        text = self.state.versions.get(inode)
        node: Node | None
        if number == 0:
            node = node_outside_snapshots(self.state, slot, text)
        else:
            number, record = self.state.snapshot(number)
            node = attribute_node(self.state, number, record, BY_SLOT[slot], text) if slot in BY_SLOT else None
        if node is None:
            raise NotFound(f"snapshot {number} has no such file")
        if node.inode != inode:
            if inode not in self.state.writers:
                raise Stale(node.path)
            node.inode = inode
        return node

    def present_node(self, inode: int) -> Node:
        """The node of the file of which ``inode`` is or was one text, as it is now; raises NotFound."""
        return self.node(without_version(inode))

    def node_being_made(self, inode: int) -> Node:
        """The node of a file of a snapshot that was created, and is not there before all of it has come; raises NotFound."""
        node, slot = unpack(inode)
        return AttributeFile(self.state, *self.state.snapshot(node), BY_SLOT[slot])

    def walk(self, path: str) -> Node:
        """The node at ``path`` below the root, links not followed; raises NotFound.  For tests and tools."""
        node = self.node(ROOT_INODE)
        for name in path.split("/") if path else []:
            node = node.lookup(name)
        return node

    def what_rename_means(
        self, source: Node, name: str, target: Node, new_name: str, *, replace: bool = True, pid: int = 0
    ) -> Rename:
        """What a rename by process ``pid``, the one operation on two directories, means (``renaming.py``); it is not yet
        done."""
        return what_rename_means(self.state, source, name, target, new_name, replace=replace, pid=pid)

    async def rename(self, source: Node, name: str, target: Node, new_name: str, *, replace: bool = True) -> None:
        """Rename at once.  For tests and tools."""
        await self.what_rename_means(source, name, target, new_name, replace=replace).carry_out()

    async def remove(self, inode: int, number: int, path: str) -> None:
        """Remove snapshot ``number``, as rmdir of ``path`` (KIND/NAME) does, if ``inode`` is that of its directory, and it is
        still there; raises NotFound where it is not."""
        kind, _, name = path.partition("/")
        if kind not in list(Kind) or not name:
            raise NotFound(f"{names.printable(path)} is no path of a snapshot")
        node, slot = unpack(inode)
        with self.state.reading() as reader:
            try:
                record = reader.record(number)
                its = record.node_of(number) if record is not None else 0
            except Damaged:  # it can be removed all the same
                its = reader.node_of(number)
        if its != node or entry_of(slot) not in (Slot.SNAPSHOT, Slot.JUST_MADE):
            raise NotFound(f"snapshot {number} is not here any more")
        seen = Kind(kind), names.decode(name)
        await self.snapshotter.remove(number, refuse_mounted=True, wait=False, seen=seen)

    def note_read(self, inode: int, user: int | None, pid: int) -> None:
        """Process ``pid`` of ``user`` (as in ``Caller``) opens, follows or lists what has ``inode``: by that it is known later
        which process copies."""
        entry = entry_of(unpack(inode)[1])
        if (entry in BY_SLOT or entry == Slot.SNAPSHOT) and (number := self.id_of(inode)):
            self.state.reads.note(user, pid, number, entry)

    def id_of(self, inode: int) -> int:
        """The id of the snapshot to which ``inode`` belongs; 0 where it belongs to none, or is of one that is gone."""
        node, _ = unpack(inode)
        with contextlib.suppress(NotFound, Damaged):
            return self.state.snapshot(node)[0] if node else 0
        return 0
