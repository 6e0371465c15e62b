"""Tree: from an inode to its node, and what the nodes share.

Who uses it: ``snapfs/fuse`` serves it through the kernel, tests walk it without a mount.  All of it runs on the trio loop;
finding nodes and their attributes never awaits anything, so a request sees one consistent state.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import trio

import snapfs
from snapfs import names
from snapfs.errors import (
    AlreadyExists,
    HasChildren,
    InvalidArgument,
    NameTooLong,
    NotFound,
    NotPermitted,
    Pinned,
    Stale,
    WrongParent,
)
from snapfs.labels import PIN
from snapfs.model import Change, Kind
from snapfs.snapshotter import Snapshotter
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.tree.advice import how_to_copy, path_of
from snapfs.tree.attributes import BY_NAME, BY_SLOT, attribute_node, attributes_of, last_changes
from snapfs.tree.daemon import daemon_node
from snapfs.tree.events import Events
from snapfs.tree.kinds import ChildrenDirectory, KindDirectory
from snapfs.tree.labels import LabelsDirectory, OpenLabel, label_slot
from snapfs.tree.links import child_link, id_link
from snapfs.tree.log import ErrorLog
from snapfs.tree.node import KIND_SLOTS, Node, Slot, pack, unpack
from snapfs.tree.reads import Reads
from snapfs.tree.snapshot import SnapshotDirectory
from snapfs.tree.stats import Meter
from snapfs.tree.texts import LongText, Text, Versions

ROOT_INODE = pack(0, Slot.ROOT)

WRITERS = 1000  # of labels, of whom the inodes are remembered: more than open one at once

HIDDEN = 5.0  # seconds after the last unlink in a snapshot until what was unlinked there is back

TEARDOWN = 3.0  # seconds after each refusal for which its process is held to be deleting the whole snapshot


class Tree:
    """The tree over ``snapshotter``, and the little that is not in its records (all of it gone with the daemon):

    ``dirsync``: Commit waits for the data.  ``served``: where and how it is served, for options.json.  ``meters``: the
    requests, by operation, for stats.json. ``reads``: who has read what lately.  ``generations``: how often a directory was
    removed and came back, by inode: the kernel, which takes what was removed for dead as long as anybody holds it, needs
    another one each time. ``open_labels``: labels open for writing, by snapshot id. ``writers``: the inodes that were lately
    given to writers of labels, and their keys. ``committed_inside``: snapshots that were committed by a rename into their
    parent's listing, or in it.  ``versions``: texts that were looked up lately.  ``changes``: how many there were;
    ``listed``: how many of them .snapfs/snapshots shows. ``changed``: when each kind last gained or lost a snapshot (ns since
    the epoch)."""

    def __init__(self, snapshotter: Snapshotter, served: Mapping[str, object] | None = None, *, dirsync: bool = False) -> None:
        self.snapshotter = snapshotter
        self.served = served or {}
        self.dirsync = dirsync
        self.version: str = snapfs.__version__
        self.started: int = time.time_ns()
        self.error_log: ErrorLog = ErrorLog()
        self.events: Events = Events()
        self.meters: defaultdict[str, Meter] = defaultdict(Meter)
        self.versions: Versions = Versions()
        self.reads: Reads = Reads()
        self.generations: defaultdict[int, int] = defaultdict(int)
        self._hidden: dict[int, tuple[frozenset[str], float]] = {}  # by snapshot id, the one that goes on longest is the last
        self.open_labels: dict[int, list[OpenLabel]] = {}
        self.writers: dict[int, str] = {}
        self._writers_made = 0
        self.committed_inside: set[int] = set()
        self.changed = dict.fromkeys(Kind, self.started)
        self._tearing_down: dict[tuple[int, int], float] = {}
        self.changes = 0
        self.listed = -1
        snapshotter.subscribe(self._note)

    # -- finding

    def reading(self) -> AbstractContextManager[Reader]:
        """One consistent state of the records."""
        return self.snapshotter.reading()

    def record(self, number: int) -> Record:
        """The record of snapshot ``number``; raises NotFound."""
        return self.snapshotter.record(number)

    def node(self, inode: int) -> Node:
        """The node of ``inode``; raises NotFound where there is none (any more), Stale where the file has another text by now
        and the one looked up is forgotten."""
        number, slot = unpack(inode)
        if slot & Slot.VERSION_OF:
            return self._version(inode, number, slot & 0x7F)
        if number == 0:
            return daemon_node(self, slot)
        record = self.record(number)
        if slot >= Slot.FIRST_LABEL:
            return LabelsDirectory(self, number, record).node(inode)
        node: Node | None = None
        bank, slot = slot & Slot.INSIDE, slot & ~Slot.INSIDE
        if slot in (Slot.SNAPSHOT, Slot.JUST_MADE):
            node = SnapshotDirectory(self, number, record, bank)
        elif slot == Slot.LABELS:
            node = LabelsDirectory(self, number, record, bank)
        elif slot == Slot.CHILD_LINK:
            node = child_link(self, number, record)
        elif slot == Slot.ID_LINK:
            node = id_link(self, number, record)
        elif slot in BY_SLOT:
            node = attribute_node(self, number, record, BY_SLOT[slot])
        elif record.kind is Kind.COMMITTED:
            kind = next((kind for kind, its in KIND_SLOTS.items() if its == slot), None)
            node = ChildrenDirectory(self, kind, number, record, bank) if kind else None
        if node is None:
            raise NotFound(f"{record.kind}/{names.encode(record.name)} has no such entry")
        return node

    def now(self, inode: int) -> Node:
        """The node of the file of which ``inode`` is or was one text, as it is now; raises NotFound."""
        number, slot = unpack(inode)
        return self.node(pack(number, slot & 0x7F)) if slot & Slot.VERSION_OF else self.node(inode)

    def _version(self, inode: int, number: int, slot: int) -> Node:
        text = self.versions.get(inode)
        node: Node | None
        if number == 0:
            node = daemon_node(self, slot, text)
        else:
            record = self.record(number)
            node = attribute_node(self, number, record, BY_SLOT[slot], text) if slot in BY_SLOT else None
        if node is None:
            raise NotFound(f"snapshot {number} has no such file")
        if node.inode != inode:
            raise Stale(node.path)
        return node

    def bank(self, number: int, record: Record) -> int:
        """The bit that the inodes of the directories of snapshot ``number`` have, when they are looked up from the root.

        The kernel allows a directory one name.  It has seen that of a snapshot committed inside its parent move to where
        there is a link now, or seen only the link move, and would have to move it at the next look-up, which fails with
        ESTALE when it can't have the locks for that.  So the directories of such a snapshot go on under other inodes."""
        return Slot.INSIDE if record.kind is Kind.COMMITTED and number in self.committed_inside else 0

    def walk(self, path: str) -> Node:
        """The node at ``path`` below the root, links not followed; raises NotFound.  For tests and tools."""
        node = self.node(ROOT_INODE)
        for name in path.split("/") if path else []:
            node = node.lookup(name)
        return node

    def new_writer(self, number: int, key: str) -> int:
        """An inode for one writer of label ``key`` of snapshot ``number``."""
        self._writers_made += 1
        inode = pack(number, label_slot(f"{key}\0\0{self._writers_made}"))
        self.writers[inode] = key
        if len(self.writers) > WRITERS:
            del self.writers[next(iter(self.writers))]
        return inode

    def refuse_taken(self, key: str, by: int | None = None) -> None:
        """Raise AlreadyExists if ``key`` is in use, unless by snapshot ``by``.

        Whoever writes the records refuses that too, but not before the writes under way are on disk and a rootfs is unmounted,
        and for all that time the kernel would hold the locks that others wait for.
        """
        with self.reading() as reader:
            taken = reader.find(key)
        if taken is not None and taken[0] != by:
            raise AlreadyExists.snapshot(key, taken[1].kind)

    # -- renaming, the one operation on two directories

    async def rename(self, source: Node, name: str, target: Node, new_name: str, *, replace: bool = True) -> None:
        """Commit, or rename a snapshot within its kind or a label within its labels/; all else is refused."""
        if isinstance(source, LabelsDirectory) and isinstance(target, LabelsDirectory) and source.inode == target.inode:
            return await source.rename(name, new_name, replace)
        source.lookup(name)
        if isinstance(source, LabelsDirectory):
            raise NotPermitted(f"{source.path}/{names.printable(name)} can only be renamed within its own labels/")
        if not isinstance(source, KindDirectory):
            raise NotPermitted(f"{source.path}/{names.printable(name)} can't be renamed: only snapshots and labels can be")
        number, record = source.find(name)
        if isinstance(target, SnapshotDirectory):
            raise AlreadyExists.snapshot(target.record.name, target.record.kind)
        if not isinstance(target, KindDirectory) or target.kind not in (source.kind, Kind.COMMITTED):
            raise NotPermitted(f"{record.kind} snapshots can't be moved to {target.path or '/'}")
        try:
            new_key = names.decode(new_name)
        except NameTooLong:
            raise
        except InvalidArgument as error:
            raise NotPermitted(str(error)) from None  # mv misreports EINVAL
        try:
            if source.kind is Kind.ACTIVE and target.kind is Kind.COMMITTED:
                self.refuse_taken(new_key, number)
                await self._commit(number, new_key, target.parent or None, inside=bool(source.parent or target.parent))
            elif source.kind is Kind.VIEW and target.kind is Kind.COMMITTED:
                raise NotPermitted(f'snapshot "{record.name}" is a view: only active snapshots can be committed')
            elif target.parent not in (0, source.parent):
                raise NotPermitted(f"{target.path} lists children: rename the snapshot in {source.kind} itself")
            else:
                self.refuse_taken(new_key, number)
                await self.snapshotter.rename(number, new_key)
        except NotFound:
            raise NotFound.snapshot(record.name) from None
        except WrongParent as error:
            raise NotPermitted(str(error)) from None

    async def _commit(self, number: int, name: str, parent: int | None, *, inside: bool) -> None:
        if inside:
            self.committed_inside.add(number)
        try:
            await self.snapshotter.commit(name, number, parent=parent, keep_labels=True, refuse_mounted=True, wait=self.dirsync)
        except BaseException:
            self.committed_inside.discard(number)
            raise

    # -- deleting whole directories

    def hide(self, number: int, name: str) -> None:
        """Take the fixed entry ``name`` out of snapshot ``number``'s listing for as long as whatever deletes the whole snapshot
        may need until its rmdir."""
        now = trio.current_time()
        for other in [other for other, (_, until) in self._hidden.items() if until <= now]:
            del self._hidden[other]
        names_before, _ = self._hidden.pop(number, (frozenset[str](), 0.0))
        self._hidden[number] = names_before | {name}, now + HIDDEN

    def is_hidden(self, number: int, name: str) -> bool:
        """Whether the fixed entry ``name`` of snapshot ``number`` was unlinked, just now."""
        hidden, until = self._hidden.get(number, ((), 0.0))
        return name in hidden and until > trio.current_time()

    def refuse_with_children(self, number: int, pid: int) -> None:
        """Raise HasChildren if snapshot ``number`` has any, or Pinned: nothing of it is to be deleted then."""
        with self.reading() as reader:
            child = reader.any_child(number)
            record = reader.record(number)
        if record is not None and (child is not None or PIN in record.labels):
            self.tearing_down(pid, number)
            raise HasChildren.of(record.name, child[1], child[0]) if child else Pinned.of(record.name)

    def tearing_down(self, pid: int, number: int) -> None:
        """Process ``pid`` has just been refused to delete snapshot ``number``, or an entry of it."""
        now = time.monotonic()
        for key in [key for key, when in self._tearing_down.items() if when < now - TEARDOWN]:
            del self._tearing_down[key]
        self._tearing_down[pid, number] = now

    def refuse_torn_down(self, number: int, pid: int) -> None:
        """Raise HasChildren or Pinned if ``pid`` was refused an entry of snapshot ``number`` for that, and goes on deleting, as
        ``rm -r`` does.  A label on its own, pin too, can be deleted in any case."""
        if self._tearing_down.get((pid, number), 0.0) > time.monotonic() - TEARDOWN:
            self.refuse_with_children(number, pid)

    def refuse_moved(self, number: int, pid: int, name: str = "") -> None:
        """Raise NotPermitted if ``pid`` has just copied what the directory of snapshot ``number`` shows, or the one entry
        ``name`` without ever having listed the others: it moves that elsewhere, and the files would be lost."""
        record = self.record(number)
        slots = [attribute.slot for attribute in attributes_of(self, record)]
        if self.reads.was_refused(pid, number) or self.reads.has_copied(pid, number, slots):
            self.reads.note_refusal(pid, number)
            raise NotPermitted(
                f"the copy that was just made of {path_of(record)} has links in place of its files, which would be lost: "
                f"{how_to_copy(self, record)}, then rmdir {path_of(record)}"
            )
        if name in BY_NAME and self.reads.has_copied_one(pid, number, BY_NAME[name].slot):
            raise NotPermitted(f"{path_of(record)}/{name} can't be moved elsewhere: it stays as long as its snapshot")

    def spool(self, lines: Iterable[str]) -> Text:
        """A text of ``lines``; in a worker thread."""
        return LongText(lines, self.snapshotter.root)

    def _note(self, change: Change) -> None:
        self.events.note(change)
        self.changes += 1
        before, after = change.before, change.after
        if before is not None and (after is None or after.kind is not before.kind):
            self.versions.forget(last_changes(before.id))
        for info in (before, after):
            if info is not None and not (before and after and (before.name, before.kind) == (after.name, after.kind)):
                self.changed[info.kind] = max(time.time_ns(), self.changed[info.kind] + 1)
        if before is not None and after is None:
            self._hidden.pop(before.id, None)
            for inode in [inode for inode in self.generations if unpack(inode)[0] == before.id]:
                del self.generations[inode]
            self.committed_inside.discard(before.id)
