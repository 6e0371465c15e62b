"""Labels: what may be stored as one, and which have a meaning of their own."""

from __future__ import annotations

from collections.abc import Mapping

from snapfs.errors import InvalidArgument, LabelTooBig, NotFound, NotUtf8, Pinned

Labels = Mapping[str, str]

UPPERDIR = "containerd.io/snapshot/overlay.upperdir"
"""containerd's name: the path of the snapshot's layer; shown where the option ``upperdir_label`` asks for it, never stored."""

PIN = "pin"
"""A snapshot with this label, of any value, is not removed at any door."""

PARENT_CHAIN = "containerd.io/snapshot/parent-chain-id"
"""The name of the layer below: on a snapshot without a parent, the parent that its Commit is going to name."""

OF, NUMBER, MESSAGE = "snapfs.workspace", "snapfs.checkpoint", "snapfs.message"
"""What the committed snapshot that is a checkpoint bears: the key of the workspace, its number there, and a line of text."""

SQUASHED = "snapfs.squash"
"""What a committed snapshot that was made of a chain bears: the name of the snapshot whose files it shows."""

SOURCE, BASE, OVER = "snapfs.source", "snapfs.base", "snapfs.over"
"""What a workspace bears that ``snapfs adopt`` has made of a directory: the directory's path without links, as
``names.path_as_text`` writes it; the name of its base, the committed snapshot that is as the directory was, and bears SOURCE,
too; and the path, written so, of the directory over which it is to stand, if any."""

ADOPTING = "snapfs.adopting"
"""What a snapshot bears while ``snapfs adopt`` makes the base of it: COPIED or MOVED, the way in which the files come there."""

COPIED, MOVED = "copied", "moved"

IMPORTING, DIFF_ID = "snapfs.importing", "snapfs.diff-id"
"""What a snapshot bears while ``snapfs import`` makes a layer of an image of it: the id of the boot of this machine; and, once
it is whole, what the layer hashes to, unpacked."""

UNDO, APPLY, UNDONE = "snapfs.undo", "snapfs.apply", "snapfs.undone"
"""What the committed snapshot bears that keeps what an apply has replaced: the key of what was applied, a word that no other
apply has, and whether it has been undone."""

MAX = 4096
"""Bytes that a label's key and value may take together."""

COUNT = 256
"""Labels that one snapshot may have.  containerd bounds only each label; but whoever may write labels decides how much memory
and time each request about the snapshot takes, for everybody."""

ROOM = 64 << 10
"""Bytes that all keys and values of one snapshot may take together."""


def pinned(name: str, number: int = 0) -> Pinned:
    """The refusal to remove snapshot ``name``, which has the label PIN, and the id ``number``, if that is known."""
    from snapfs.names import last_word  # the command's verbs load it where they need it

    how = f"snapfs label --delete {PIN} {last_word(name, number)}"
    return Pinned(f'snapshot "{name}" has the label {PIN}, which keeps it: take that away first ({how})')


def no_checkpoint(key: str, which: str, number: int = 0) -> NotFound:
    """The refusal that says that the workspace ``key``, which has the id ``number``, if that is known, has no checkpoint
    ``which``."""
    from snapfs.names import last_word

    how = f"snapfs checkpoint --list {last_word(key, number)}"
    return NotFound(f'"{key}" has no checkpoint {which}: read the file checkpoint for those that there are, or {how}')


def check_label(label: str, value: str) -> None:
    """Raise InvalidArgument unless ``label`` with ``value`` may be stored: not without a key, UTF-8, 4,096 bytes together."""
    if not label:
        raise InvalidArgument("a label's key must not be empty")
    try:
        size = len(label.encode()) + len(value.encode())
    except UnicodeEncodeError:
        raise NotUtf8(f"the label {label!r} is not UTF-8") from None
    if size > MAX:
        raise LabelTooBig(f'label "{label[:40]}": key and value take {size} bytes together; at most {MAX} fit')


def refuse_too_many(name: str, labels: Labels, before: Labels) -> None:
    """Raise LabelTooBig where ``labels`` are more, by number or bytes, than snapshot ``name`` may have.

    ``before`` are those that it has.  They may be more, from before there was this bound: what makes them no more than they
    are is allowed."""
    if len(labels) > max(COUNT, len(before)):
        raise LabelTooBig(f'snapshot "{name}" would have {len(labels)} labels; at most {COUNT} fit')
    size = _size(labels)
    if size > ROOM and size > _size(before):
        raise LabelTooBig(f'the labels of snapshot "{name}" would take {size} bytes together, with keys; at most {ROOM} fit')


def _size(labels: Labels) -> int:
    return sum(len(label.encode()) + len(value.encode()) for label, value in labels.items())
