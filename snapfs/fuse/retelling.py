"""What the kernel is told again, or otherwise than the tree has it: entries and inodes that it must look up once more.

The kernel's view of a file system has rules that the tree knows nothing of, and this module keeps them:

- An inode has one size and one set of pages.  A process that opens a file which has another text by now is told to look the
  name up again (ESTALE), and then opens the new text under the new text's inode.  The same goes for a process that is about to
  write a label, or into a file that does something where several users may: it gets an inode of its own.  What was found for
  the process is kept here until it comes back.
- A directory has one name.  A snapshot that is made, committed or renamed in its parent's listing stands there as a directory
  for the kernel, where the tree has a link: the kernel is made to forget that name.
- An inode that was removed is dead for as long as anybody holds it: what comes back under the same one has another generation
  (``tree/hiding.py``).
- close(2) waits for nobody: a label that was closed empty is deleted before anything else of its snapshot is answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

import trio
from pyfuse3 import EntryAttributes, FileInfo

from snapfs.errors import NotFound, Stale, TryAgain
from snapfs.fuse.cache import KernelCache
from snapfs.fuse.openfiles import MANY_WRITERS, OpenFile, OpenFiles
from snapfs.fuse.waiting import Waiting
from snapfs.model import Caller
from snapfs.tree import Handle, Node, Tree
from snapfs.tree.attributes import AttributeFile
from snapfs.tree.inodes import WRITERS, WRITING, Slot, entry_of, is_in_snapshot, kind_inode, pack, unpack, without_version
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.labels import Label
from snapfs.tree.log import OpenLog
from snapfs.tree.node import File
from snapfs.tree.openlabels import OpenLabel
from snapfs.tree.renaming import Rename
from snapfs.tree.textfile import TextFile
from snapfs.tree.texts import OVERHEAD

K = TypeVar("K")
V = TypeVar("V")

RETRY = 10.0  # seconds within which a process that was told to look a file up again has done so

MOST, OF_USER = 8 << 20, 1 << 20  # bytes of what was found for all processes of the owner's that were, and of another user's

READING = 32  # users whose are: those who were told last

NOT_OWN = (
    "opened by /proc/self/fd, or by a thousand processes at once, this file would keep others waiting who write to it; opened "
    "by its name it does not"
)


class Awaited(Generic[K, V]):
    """What was found for processes that were told to look a name up again, by a key that tells process and file: until the
    process has come back, or too long ago (RETRY), or so many others were told (``most`` bytes) that the oldest is forgotten.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = MOST if most is None else most
        self._found: dict[K, tuple[V, float, int]] = {}  # the latest is the last
        self._weight = 0

    def keep(self, key: K, found: V, weight: int = OVERHEAD) -> None:
        """``found``, which takes so many bytes, is for the process of ``key``, which is told to look again now."""
        self._forget(key)
        now = trio.current_time()
        self._found[key] = found, now, weight
        self._weight += weight
        while len(self._found) > 1 and (self._weight > self._most or next(iter(self._found.values()))[1] < now - RETRY):
            self._forget(next(iter(self._found)))  # the process never came back

    def _forget(self, key: K) -> None:
        self._weight -= self._found.pop(key, (None, 0.0, 0))[2]

    def get(self, key: K) -> V | None:
        """What was found for the process of ``key``; None where it was not told to look again, or too long ago."""
        found, when, _ = self._found.get(key, (None, 0.0, 0))
        return found if when > trio.current_time() - RETRY else None

    def pop(self, key: K) -> V | None:
        """The same, which is forgotten by that."""
        found = self.get(key)
        self._forget(key)
        return found


class Apart(Generic[K, V]):
    """The same of each user apart: a user's processes push out only that user's.  ``of_owner`` bytes of the owner's, and
    ``of_user`` of each other's, of the ``users`` who were told last."""

    def __init__(self, of_owner: int = WRITERS * OVERHEAD, of_user: int = WRITERS * OVERHEAD, users: int = WRITING) -> None:
        self._most = of_owner, of_user
        self._users = users
        self._of: dict[int | None, Awaited[K, V]] = {}  # who was told last is the last

    def keep(self, user: int | None, key: K, found: V, weight: int = OVERHEAD) -> None:
        own = self._of[user] = self._of.pop(user) if user in self._of else Awaited(self._most[user is not None])
        own.keep(key, found, weight)
        if len(self._of) > self._users:
            del self._of[next(iter(self._of))]

    def get(self, user: int | None, key: K) -> V | None:
        return self._of[user].get(key) if user in self._of else None

    def pop(self, user: int | None, key: K) -> V | None:
        return self._of[user].pop(key) if user in self._of else None


class Retelling:
    """What one mount of ``tree`` tells the kernel besides what the tree has; ``cache``, ``files`` and ``waiting`` are that
    mount's.  ``writers_apart``: several users may write, and none is to wait until others have been served."""

    def __init__(
        self, tree: Tree, cache: KernelCache, files: OpenFiles, waiting: Waiting, *, writers_apart: bool = False
    ) -> None:
        self._writers_apart = writers_apart
        self._commanders: Apart[tuple[int, int], int] = Apart()  # inodes for who writes commands, by process and file
        self._tree = tree
        self._waiting = waiting
        self._cache = cache
        self._files = files
        self._writers: Apart[tuple[int, str], int] = Apart()  # inodes for writers of labels, by process and label
        # Files with another text, by process and slot; and the same processes, for long texts are soon forgotten
        self._refreshed: Apart[tuple[int, int], Node] = Apart(MOST, OF_USER, READING)
        self._told: Apart[tuple[int, int], bool] = Apart(MOST, OF_USER, READING)
        self._emptied: list[tuple[int, trio.Event]] = []  # snapshots with a label that was closed empty, until it is deleted

    # -- looking up

    def look_up(self, directory: Node, name: str, pid: int, user: int | None) -> Node:
        """The entry ``name`` of ``directory`` for process ``pid`` of ``user``: a label, or a file that does something, under
        the inode that the process was told to look up, if it is about to write it.  Raises NotFound."""
        node = directory.lookup(name)
        if isinstance(node, Label) and self._writers.get(user, _writer(node, pid)) is not None:
            return self._tree.node(self._inode_for_writing(node, pid, user))
        if self._writers_apart and isinstance(node, AttributeFile) and node.attribute.command is not None:
            inode = self._commanders.get(user, (pid, without_version(node.inode)))
            if inode is not None and self._tree.state.writers.is_of(inode, user):
                return self._tree.node(inode)
        return node

    def look_at(self, inode: int) -> Node | OpenFile:
        """What has ``inode``, for stat(2): the node, or the open file that is all that is left of it, or has another text than
        that of its inode.  Raises NotFound."""
        if (file := self._files.misfit(inode)) is not None:
            return file
        try:
            return self._tree.node(inode)
        except (NotFound, Stale) as error:
            if (file := self._files.any_of(inode)) is not None:
                return file  # removed, or of another text, while a process reads it
            if isinstance(error, NotFound):
                raise
            return self._tree.present_node(inode)  # of another text, while a process holds it with O_PATH

    # -- opening

    def to_write(self, inode: int, pid: int, user: int | None) -> Node:
        """What process ``pid`` of ``user`` is to write that opens or cuts ``inode``.  A process that writes a label, or into a
        file that does something, has an inode of its own: raises Stale the first time, on which the kernel looks the name up
        again.  Raises TryAgain where the process comes back to a file that does something with an inode that others may have.

        Processes in pid namespaces that can't be seen from here all have the pid 0: they share one inode, which stays theirs.
        """
        node = self._tree.node(inode)
        if isinstance(node, AttributeFile) and node.attribute.command is not None and self._writers_apart and pid:
            key = pid, without_version(inode)
            told = self._commanders.pop(user, key)
            number, slot = unpack(key[1])
            if user is not None and self._files.has_enough_writers((number, node.attribute.name), user):
                raise TryAgain(MANY_WRITERS)
            if told is None:
                self._commanders.keep(user, key, self._tree.state.writers.new(number, slot, user))
                raise Stale(node.path)
            if not self._tree.state.writers.is_of(inode, user):  # there was no name to look up
                raise TryAgain(NOT_OWN)
        if not isinstance(node, Label):
            return node
        if node.text is not None:
            self._inode_for_writing(node, pid, user)
            raise Stale(node.path)
        if pid:
            self._writers.pop(user, _writer(node, pid))
        return node

    def _inode_for_writing(self, node: Label, pid: int, user: int | None) -> int:
        """The inode that the writer ``pid`` was told of, or a new one: the name may be another snapshot's by now."""
        inode = self._writers.get(user, _writer(node, pid))
        if inode is None or not self._tree.state.open_labels.is_writers(inode) or unpack(inode)[0] != unpack(node.inode)[0]:
            inode = node.for_writing().inode
        self._writers.keep(user, _writer(node, pid), inode)
        return inode

    async def to_read(self, inode: int, pid: int, caller: Caller) -> Node:
        """What process ``pid`` of ``caller`` is to read that opens ``inode``: the node as it is now; raises Stale if that has
        another inode, TryAgain.

        A process that has the size and pages of one inode can't be given another text.  So the kernel is made to look the name
        up again: then the new text's inode is opened, for which nothing more is to be found out.  It does so once: a process
        that comes back with an inode that won't do, because many texts have come since, the name is another snapshot's by now
        or none was looked up, gets the text past the pages.
        """
        number, slot = unpack(inode)
        key = pid, entry_of(slot)
        found, told = self._refreshed.pop(caller.user, key), self._told.pop(caller.user, key)
        try:
            node = self._tree.node(inode)
        except Stale:
            node = self._tree.present_node(inode)
        if found is not None and unpack(found.inode)[0] == number:
            return node if node.inode == inode and node.is_known else found
        if not isinstance(node, File):
            return node
        with self._waiting.counted(node.waits_for, caller.user):
            now = await node.refresh(caller)
        if isinstance(node, AttributeFile) and now is not node:  # the directory shows what was found out
            self._cache.forget_directory(unpack(node.inode)[0])
        # pid 0: a process that can't be seen from here, so it would not be known again
        if now.inode != inode and not told and pid:
            self._told.keep(caller.user, key, True)
            text = now.known() if isinstance(now, TextFile) else None
            self._refreshed.keep(caller.user, key, now, text.weight if text is not None else OVERHEAD)
            raise Stale(node.path)
        return now

    def opened(self, inode: int, user: int | None, node: Node, handle: Handle, entry: EntryAttributes) -> FileInfo:
        """``handle`` of ``node``, of which the kernel is told ``entry``, for the process of ``user`` that opened ``inode``:
        what the kernel may remember of it."""
        misfit = node.inode != inode
        apart = handle.direct or misfit or (isinstance(node, Label) and node.text is None)
        entry.st_ino, entry.st_size, entry.attr_timeout = node.shown_inode, handle.size, 0
        fh = self._files.add(OpenFile(inode, user, node.path, handle, entry, misfit))
        if misfit:
            self._cache.forget_attributes(inode)
        return FileInfo(fh=fh, direct_io=apart, keep_cache=apart and not isinstance(handle, OpenLog))

    # -- closing labels

    @property
    def is_emptying(self) -> bool:
        """Whether a label was closed empty and is not yet deleted."""
        return bool(self._emptied)

    async def emptied(self, inode: int) -> None:
        """Wait until each label that was closed empty, of the snapshot of ``inode``, is deleted."""
        for number, deleted in list(self._emptied):
            if unpack(inode)[0] == number:
                await deleted.wait()

    @contextlib.contextmanager
    def closing(self, file: OpenFile) -> Iterator[None]:
        """For the time that closing ``file`` takes.

        close(2) does not wait for this request, but the kernel has sent it before any that comes after that: a process that
        asks for something of this snapshot next is to find the label deleted.
        """
        emptied = unpack(file.inode)[0], trio.Event()
        if isinstance(file.handle, OpenLabel) and file.handle.emptied:
            self._emptied.append(emptied)
        try:
            yield
        finally:
            if emptied in self._emptied:
                self._emptied.remove(emptied)
            emptied[1].set()

    # -- making and renaming

    def made(self, directory: int, entry: EntryAttributes) -> None:
        """The answer ``entry`` to mkdir in ``directory`` (an inode) as the kernel is to have it.

        In its parent's listing the next look-up is to find the link to the new snapshot.  Until then the kernel has an inode of
        its own there: one that stands in two directories it moves from name to name, which it can't (ESTALE) while a rename
        looks it up.
        """
        if is_in_snapshot(directory):
            entry.entry_timeout = 0
            entry.st_ino = pack(unpack(entry.st_ino)[0], Slot.JUST_MADE)

    @contextlib.contextmanager
    def renaming(self, rename: Rename, source: Node, old: str, target: Node, new: str) -> Iterator[None]:
        """For the time that ``rename`` takes, of ``old`` in ``source`` to ``new`` in ``target``.

        The kernel allows a directory one name.  It has seen that of a snapshot committed inside its parent move to where there
        is a link now, or seen only the link move, and would have to move it at the next look-up, which fails with ESTALE when
        it can't have the locks for that.  So the directories of such a snapshot go on under other inodes (``State.aliased``).
        """
        listed = kind_inode(source.kind) if isinstance(source, KindDirectory) else source.inode
        held = listed in (source.inode, target.inode)
        aliased = self._tree.state.aliased
        if rename.committed_inside:
            aliased.add(rename.committed_inside)
        try:
            with self._cache.asked_for(listed, old) if held else contextlib.nullcontext():
                yield
        except BaseException:
            aliased.discard(rename.committed_inside)
            raise
        stale = None
        if listed != source.inode and held:
            stale = listed, old  # the kernel has moved a link; the directory that it leads to it still has under the old name
        elif is_in_snapshot(target.inode):
            stale = target.inode, new  # the kernel now has the snapshot's directory where there is a link to it
        if stale is not None:
            # the kernel is made to forget that in the loop's next round; the answer to this request is sent in this one
            trio.lowlevel.current_trio_token().run_sync_soon(self._cache.forget_name, *stale)


def _writer(node: Label, pid: int) -> tuple[int, str]:
    """The process that writes the label, as far as can be known, or (0) some of the snapshot's."""
    return pid or -node.number, node.key
