"""Inode numbers: computed, never stored.  Everything that knows a bit of one is in this module.

An inode number has 64 bits: the id of a snapshot (0 for what belongs to no snapshot), and a slot of 28 bits, which says what
of that snapshot it is.  Ids are never used twice, so an inode number means the same for ever, through rename and Commit.  A
workspace keeps its number through checkpoint and rollback, too, though it gets another id (``Record.node``).

    bit    63 ........ 28  27  26 ....... 8  7   6 ..... 0
           snapshot's id   0   0             0   entry        a file, link or directory that each snapshot has: 1 to 127
           snapshot's id   0   0             1   entry        the same directory under its other inode (ALIAS)
           name's number   0   0             0   entry        the link of a name in images/: no snapshot has that number
           snapshot's id   0   label, from 256 on             one value of a label, or one writer of a label
           snapshot's id   1   checksum (26 to 7)    entry    one text of a file whose text changes by itself (VERSION), or one
                                                              writer of a file that does something

A file whose text changes by itself (info.json, usage.json …) has another inode for each text, as if each text were put there
by a rename: whatever a cache holds of an inode, its size and pages, stays right for ever, and a process that has the file open
reads on in the text that it opened.  stat(2) shows one number for all texts of a file (``without_version``).
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterable

from snapfs.model import Kind
from snapfs.tree.users import OfUsers

SLOT_BITS = 28
SLOT_MASK = (1 << SLOT_BITS) - 1

ENTRY_BITS = 7
ENTRY_MASK = (1 << ENTRY_BITS) - 1

ALIAS = 1 << ENTRY_BITS
VERSION = 1 << SLOT_BITS - 1
CHECKSUM_MASK = (VERSION - 1) >> ENTRY_BITS

FIRST_ATTRIBUTE = 16  # of a snapshot; the attributes go up to ENTRY_MASK
FIRST_LABEL = 256
WRITERS = 1000  # of one user, whose inodes are remembered: more than write at once
WRITING = 64  # users whose are: those who had a new one last
REMEMBERED = 8  # snapshots whose labels' inodes are
LABELS = VERSION - FIRST_LABEL  # slots that labels have


class Slot(enum.IntEnum):
    """The entries that are no attributes (``attributes.ATTRIBUTES`` has those of a snapshot, from 16 on)."""

    ROOT = 1  # of id 0, so that the root has inode 1, as FUSE wants it
    SNAPSHOT = 1  # of any other id
    ACTIVE = 2
    VIEW = 3
    COMMITTED = 4
    IMAGES = 5  # of id 0
    LABELS = 5  # of any other id
    CHILD_LINK = 6
    ID_LINK = 7
    README = 8  # of id 0
    IMAGE = 8  # of the number of a name in images/
    BY_ID = 9
    DAEMON = 10
    VERSION = 11
    ERROR_LOG = 12
    JUST_MADE = 13  # a snapshot's directory where it was made: in its parent's listing, which shows a link from then on
    EVENTS = 14  # of id 0
    HISTORY = 14  # of any other id
    CLEANUP = 15
    HISTORY_LINK = 15
    OPTIONS = 16  # of id 0, which has no attributes; so all below
    STATS = 17
    LISTING = 18
    METRICS = 19
    NO_MEDIA = 20


# Of the attributes under which the text that was found last is remembered
CHANGES_SLOT, CHECKPOINT_SLOT, PATCH_SLOT, IMAGE_SLOT = 23, 24, 34, 37

LAYER_SLOT = 36  # of layer.tar

KIND_SLOTS = {Kind.ACTIVE: Slot.ACTIVE, Kind.VIEW: Slot.VIEW, Kind.COMMITTED: Slot.COMMITTED}
KINDS = {slot: kind for kind, slot in KIND_SLOTS.items()}

DIRECTORY_SLOTS = (Slot.SNAPSHOT, Slot.SNAPSHOT | ALIAS)  # a snapshot's directory, under either inode
LABELS_SLOTS = (Slot.LABELS, Slot.LABELS | ALIAS)


def pack(number: int, slot: int) -> int:
    """The inode of ``slot`` of snapshot ``number``."""
    return number << SLOT_BITS | slot


def unpack(inode: int) -> tuple[int, int]:
    """Snapshot id and slot of ``inode``."""
    return inode >> SLOT_BITS, inode & SLOT_MASK


def pack_version(number: int, slot: int, checksum: int) -> int:
    """The inode of the file in ``slot`` of snapshot ``number`` as long as its text has ``checksum``.

    Twenty bits tell the texts apart; two texts that have the same are mixed up only by a process that has one open when the
    other comes.
    """
    return pack(number, VERSION | (checksum & CHECKSUM_MASK) << ENTRY_BITS | slot)


def without_version(inode: int) -> int:
    """The one inode number that stat(2) shows for all texts of a file; any other inode is its own."""
    number, slot = unpack(inode)
    return pack(number, slot & ENTRY_MASK) if slot & VERSION else inode


def entry_of(slot: int) -> int:
    """The entry of a snapshot that ``slot`` stands for, whichever text or inode of it; the slot of a label is its own."""
    if slot & VERSION or slot < FIRST_LABEL:
        return slot & ENTRY_MASK
    return slot


def kind_inode(kind: Kind) -> int:
    """The inode of active/, view/ or committed/ in the root."""
    return pack(0, KIND_SLOTS[kind])


def is_in_snapshot(inode: int) -> bool:
    """Whether it belongs to a snapshot, and not to the fixed part of the tree."""
    return inode > SLOT_MASK


ROOT_INODE = pack(0, Slot.ROOT)


def label_slots(words: Iterable[str]) -> dict[str, int]:
    """A slot for each of ``words``, about the labels of one snapshot: its own (``label_slot``), or the next free one where two
    collide."""
    taken: dict[int, str] = {}
    for word in words:
        slot = label_slot(word)
        while taken.setdefault(slot, word) != word:
            slot = slot + 1 if slot + 1 < VERSION else FIRST_LABEL
    return {word: slot for slot, word in taken.items()}


class Writers:
    """The inodes that were lately given to those who write into files that do something, each its own: the kernel lets one
    process at a time write to an inode.  A user's new ones push out only that user's.  A user is as in ``Caller``."""

    def __init__(self) -> None:
        self._given: OfUsers[None] = OfUsers(WRITERS, WRITING)
        self._made = 0

    def new(self, node: int, slot: int, user: int | None) -> int:
        """One for ``user``, for the file in ``slot`` of the snapshot for which inodes have the number ``node``."""
        self._made += 1
        while (inode := pack_version(node, slot, self._made)) in self._given:  # there are more numbers than remembered ones
            self._made += 1
        self._given.put(user, inode, None)
        return inode

    def is_of(self, inode: int, user: int | None) -> bool:
        """Whether ``inode`` was lately given to ``user``."""
        return self._given.is_of(inode, user)

    def __contains__(self, inode: int) -> bool:
        return inode in self._given


class LabelInodes:
    """The inodes of the values of labels, found out once for all requests about them: listing the labels of a snapshot asks
    for each, and to find one out takes all.  Those of the few snapshots that were asked for last."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[dict[str, str], dict[str, int]]] = {}

    def of(self, node: int, labels: dict[str, str]) -> dict[str, int]:
        """The inode of the value of each of ``labels``, by key, of the snapshot for which inodes have the number ``node``."""
        known = self._known.pop(node, None)
        if known is None or known[0] != labels:
            words = {f"{key}\0{value}": key for key, value in labels.items()}
            known = labels, {words[word]: pack(node, slot) for word, slot in label_slots(words).items()}
        self._known[node] = known  # the last
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return known[1]


def label_slot(word: str) -> int:
    """A hash of ``word`` among the slots of labels."""
    return zlib.crc32(word.encode()) % LABELS + FIRST_LABEL
