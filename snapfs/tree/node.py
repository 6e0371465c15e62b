"""What every node of the tree answers: each kind of node overrides what it can do, and refuses the rest in words."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import msgspec

from snapfs.errors import NotFound, NotPermitted
from snapfs.model import OWNER, Caller
from snapfs.tree.advice import how_to_make
from snapfs.tree.handles import Handle, OpenText
from snapfs.tree.inodes import without_version
from snapfs.tree.state import State
from snapfs.tree.texts import Text


class Attributes(msgspec.Struct, frozen=True):
    """What stat(2) shows of a node: mode, bytes, blocks of 512 bytes, one time for all (ns since the epoch).

    ``mode`` is the most that anybody may do with it: the server of the tree takes a umask from that.  ``private``: it tells
    what is in a layer, so it belongs to users alone who may read that, whatever the tree's owner is.
    ``keep``: they stay right until the tree says otherwise, so a cache may hold them.
    """

    mode: int
    size: int = 0
    blocks: int = 0
    time: int = 0
    keep: bool = True
    private: bool = False


class Node:
    """One file, link or directory.  Made for one request and thrown away; knows the state in which it was found.

    ``keep_entry``: a cache may go on using the name by which the node was looked up, until the tree says otherwise.
    ``is_known``: what it holds is known, and needn't be found out first (``refresh``).
    ``waits_for``: what ``refresh`` and ``follow`` wait for, in a word, if that may take long.
    """

    keep_entry = True
    is_known = True
    waits_for: str | None = None

    def __init__(self, state: State, inode: int) -> None:
        self.state = state
        self.inode = inode

    @property
    def path(self) -> str:
        """Where it stands below the root, for messages; the root itself is the empty string."""
        raise NotImplementedError

    def attributes(self) -> Attributes:
        """What stat(2) shows of it."""
        raise NotImplementedError

    @property
    def shown_inode(self) -> int:
        """The inode number that stat(2) shows; tools take it that a file which has another one is another file."""
        return without_version(self.inode)

    def must_settle(self) -> bool:
        """Whether ``attributes`` are just being found out, and waiting a moment (``settle``) gives the right ones."""
        return False

    async def settle(self, caller: Caller = OWNER) -> None:
        """Wait until they are known."""

    # -- directories

    def lookup(self, name: str) -> Node:
        """The entry ``name``; raises NotFound."""
        raise NotFound(f"{self.path} is no directory")

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        """Offset, name and node of each entry whose offset is above ``after``, in the order of offsets.

        Offsets are from 1 on, and an entry keeps its own whatever comes and goes.
        """
        raise NotFound(f"{self.path} is no directory")

    def refusal_to_make(self, what: str) -> NotPermitted:
        """That ``what`` ("a file") can't be made in this directory, and what to do instead."""
        return NotPermitted(f"{what} can't be made in {self.path or '/'}: {self.instead()}")

    def instead(self) -> str:
        """What to do instead of making something here."""
        return f"there are only snapshots, with their labels, and their files; {how_to_make(self.state, '')}"

    def refusal_to_set(self) -> NotPermitted:
        """That its mode, owner and times can't be set."""
        return NotPermitted(f"the mode, owner and times of {self.path or '/'} can't be set")

    async def mkdir(self, name: str) -> int:
        """Make the directory ``name``: the inode of what was made.  Raises SnapshotError."""
        raise self.refusal_to_make("a directory")

    async def rmdir(self, name: str, pid: int) -> None:
        """Remove the directory ``name`` for process ``pid``.  Raises SnapshotError."""
        raise NotPermitted(f"{self.path or '/'} is fixed: only snapshots can be removed")

    async def unlink(self, name: str, pid: int) -> None:
        """Remove the file or link ``name`` for process ``pid``.  Raises SnapshotError."""
        raise NotPermitted(f"{self.path or '/'} is fixed: only snapshots and labels can be removed")

    async def symlink(self, name: str, target: str, pid: int) -> Node:
        """Make the link ``name`` to ``target`` for process ``pid``; the link as it is then.  Raises SnapshotError."""
        raise self.refusal_to_make("a link")

    async def create(self, name: str) -> tuple[Node, Handle]:
        """Make the file ``name``, open for writing.  Raises SnapshotError."""
        raise self.refusal_to_make("a file")

    # -- files and links

    async def refresh(self, caller: Caller = OWNER) -> Node:
        """The node as it is once what must be looked up on disk for it has been, for ``caller``: another one where that
        changed.  Raises SnapshotError."""
        return self

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        """Open the file, ``truncate``: and cut it to nothing.  Raises SnapshotError."""
        raise NotPermitted(f"{self.path} can't be opened")

    async def resize(self, size: int) -> None:
        """truncate(2)."""
        raise NotPermitted(f"{self.path} can't be changed")

    def target(self) -> str:
        """Where a link leads."""
        raise NotFound(f"{self.path} is no link")

    async def follow(self, pid: int) -> str:
        """Where a link leads, for process ``pid``, which is about to go there."""
        return self.target()


class Directory(Node):
    """What all directories share."""

    mode = stat.S_IFDIR | 0o777


class File(Node):
    """A file with text that snapfs makes up; read-only."""

    mode = stat.S_IFREG | 0o444

    def text(self) -> Text:
        """What it holds."""
        raise NotImplementedError

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        if writing or truncate:
            raise NotPermitted(f"{self.path} can't be written: it says what is; of a snapshot only labels/ can be changed")
        return OpenText(self.text())


class Link(Node):
    """A symbolic link."""

    mode = stat.S_IFLNK | 0o777

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=len(self.target().encode()), keep=False)
