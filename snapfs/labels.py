"""Labels: what may be stored as one, and which have a meaning of their own."""

from __future__ import annotations

from collections.abc import Mapping

from snapfs.errors import InvalidArgument, LabelTooBig, NotUtf8

Labels = Mapping[str, str]

UPPERDIR = "containerd.io/snapshot/overlay.upperdir"
"""containerd's name: the path of the snapshot's layer; shown where the option ``upperdir_label`` asks for it, never stored."""

PIN = "pin"
"""A snapshot with this label, of any value, is not removed at any door."""

PARENT_CHAIN = "containerd.io/snapshot/parent-chain-id"
"""The name of the layer below: on a snapshot without a parent, the parent that its Commit is going to name."""

MAX = 4096
"""Bytes that a label's key and value may take together."""


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
