"""What every node of the tree answers, and how inode numbers are made.

An inode number is computed, never stored: the snapshot's id and a slot within that snapshot (id 0: the daemon's own nodes)
in 64 bits.  Ids are never used twice, so an inode means the same for ever, through rename and Commit.

A file whose text changes by itself (info.json, usage.json …) has another inode for each text, as if it were replaced by a
rename: what the kernel holds of an inode, its size and pages, is right for ever, and whoever has it open reads on in what
was opened, whatever happens meanwhile.  stat(2) shows one number for all of them (``shown_inode``).
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from snapfs.errors import NotFound, NotPermitted
from snapfs.model import Kind
from snapfs.tree.advice import how_to_make
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree

SLOT_BITS = 28


class Slot(enum.IntEnum):
    """The slots that are not attributes' (``attributes.ATTRIBUTES``, 16 to 127) or labels' (from 256 on)."""

    ROOT = 1  # of id 0, so that the root has inode 1, as FUSE wants it
    SNAPSHOT = 1  # of any other id
    ACTIVE = 2
    VIEW = 3
    COMMITTED = 4
    LABELS = 5
    CHILD_LINK = 6
    ID_LINK = 7
    README = 8
    BY_ID = 9
    DAEMON = 10
    VERSION = 11
    ERROR_LOG = 12
    EVENTS = 14
    CLEANUP = 15
    JUST_MADE = 13  # a child's directory where it was made: in its parent's listing, until that is looked at
    FIRST_ATTRIBUTE = 16
    OPTIONS = 16  # of id 0, whose slots from 16 on are no attributes'
    STATS = 17
    LISTING = 18
    METRICS = 19
    NO_MEDIA = 20
    INSIDE = 128  # a bit: the same directory under another inode; see Tree.bank
    FIRST_LABEL = 256
    VERSION_OF = 1 << SLOT_BITS - 1  # a bit: one text of the file whose slot is in the lowest seven bits


KIND_SLOTS = {Kind.ACTIVE: Slot.ACTIVE, Kind.VIEW: Slot.VIEW, Kind.COMMITTED: Slot.COMMITTED}


def pack(number: int, slot: int) -> int:
    """The inode of ``slot`` of snapshot ``number``."""
    return number << SLOT_BITS | slot


def pack_version(number: int, slot: int, text: Text) -> int:
    """The inode of the file in ``slot`` of snapshot ``number`` as long as it holds ``text``.

    Twenty bits tell the versions apart; two that have the same are mixed up only by who has one open when the other comes.
    """
    version = text.checksum & (1 << SLOT_BITS - 8) - 1
    return pack(number, Slot.VERSION_OF | version << 7 | slot)


def unpack(inode: int) -> tuple[int, int]:
    """Snapshot id and slot of ``inode``."""
    return inode >> SLOT_BITS, inode & (1 << SLOT_BITS) - 1


class Attributes(msgspec.Struct, frozen=True):
    """What stat(2) shows of a node: mode, bytes, blocks of 512 bytes, one time for all (ns since the epoch).

    ``mode`` is the most that anybody may do with it: whoever serves the tree takes a umask from that.  ``private``: it tells
    what is in a layer, so it belongs to those alone who may read that, whoever the tree belongs to.
    ``keep``: they stay right until the tree says otherwise, so a cache may hold them.
    """

    mode: int
    size: int = 0
    blocks: int = 0
    time: int = 0
    keep: bool = True
    private: bool = False


class Handle:
    """An open file.

    ``direct``: what it holds is its own, or grows, so that no cache of the file's pages may come between.
    """

    direct = False

    @property
    def size(self) -> int:
        """Bytes that reading it to the end gives."""
        raise NotImplementedError

    @property
    def blocks(self) -> bool:
        """Whether reading may wait for the disk."""
        return False

    def read(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    async def write(self, offset: int, data: bytes) -> int:
        raise NotPermitted("the file was opened for reading only")

    async def resize(self, size: int) -> None:
        raise NotPermitted("the file was opened for reading only")

    async def close(self) -> None:
        """The last descriptor of this open is gone."""


class OpenText(Handle):
    """A file open for reading: one consistent text, settled when it was opened."""

    def __init__(self, text: Text) -> None:
        self.text = text

    @property
    def size(self) -> int:
        return self.text.size

    @property
    def blocks(self) -> bool:
        return self.text.blocks

    def read(self, offset: int, size: int) -> bytes:
        return self.text.read(offset, size)


class Node:
    """One file, link or directory.  Made for one request and thrown away; knows the state in which it was found.

    Each method that a kind of node lacks refuses with the words for it.  ``keep_entry``: whoever has looked it up by name may
    go on using that name without asking, until the tree says otherwise.  ``is_known``: what it holds is known, and needn't be
    found out first.
    """

    keep_entry = True
    is_known = True

    def __init__(self, tree: Tree, inode: int) -> None:
        self.tree = tree
        self.inode = inode

    @property
    def path(self) -> str:
        """Where it stands below the root, for messages; the root itself is the empty string."""
        raise NotImplementedError

    def attributes(self) -> Attributes:
        raise NotImplementedError

    @property
    def shown_inode(self) -> int:
        """The inode number that stat(2) shows; tools take it that a file which has another one is another file."""
        number, slot = unpack(self.inode)
        return pack(number, slot & 0x7F) if slot & Slot.VERSION_OF else self.inode

    def must_settle(self) -> bool:
        """Whether its attributes are just being found out, and waiting a moment (``settle``) gives the right ones."""
        return False

    async def settle(self) -> None:
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
        return f"there are only snapshots, with their labels, and their files; {how_to_make(self.tree, '')}"

    async def mkdir(self, name: str) -> Node:
        raise self.refusal_to_make("a directory")

    async def rmdir(self, name: str, pid: int) -> None:
        raise NotPermitted(f"{self.path or '/'} is fixed: only snapshots can be removed")

    async def unlink(self, name: str, pid: int) -> None:
        raise NotPermitted(f"{self.path or '/'} is fixed: only snapshots and labels can be removed")

    async def create(self, name: str) -> tuple[Node, Handle]:
        raise self.refusal_to_make("a file")

    # -- files and links

    async def refresh(self) -> Node:
        """The node as it is once what must be looked up on disk for it has been: another one where that changed."""
        return self

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
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
