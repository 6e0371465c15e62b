"""This mount namespace's mount table: /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snapfs.mountspec import escape


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of the table.  ``root`` is the mounted directory as a path inside its file system; ``device`` is
    ``major:minor``; ``options`` are those of the mount, ``super_options`` those of the file system."""

    id: int
    device: str
    root: str
    target: str
    options: tuple[str, ...]
    type: str
    source: str
    super_options: tuple[str, ...]


def mount_table() -> Iterator[MountPoint]:
    """All mounts that this process sees, in the order in which they were made."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.split("\n")[:-1]:
        fields, _, rest = line.partition(" - ")
        number, _parent, device, root, target, options = fields.split(" ")[:6]
        kind, source, super_options = rest.split(" ", 2)
        yield MountPoint(
            id=int(number),
            device=device,
            root=_unescape(root),
            target=_unescape(target),
            options=tuple(options.split(",")),
            type=kind,
            source=_unescape(source),
            super_options=tuple(_unescape(option) for option in super_options.split(",")),
        )


def writers(directory: str) -> list[str]:
    """Where the layer ``directory`` (ROOT/snapshots/<id>/fs) is mounted so that it can be written: as the upperdir of an
    overlay, or bound with ``rw``; paths of targets in this mount namespace."""
    uppers = (f"upperdir={directory}", f"upperdir={escape(directory)}")  # as either mount API shows it
    tail = "/".join(["", *directory.split("/")[-3:]])
    found = []
    for mount in mount_table():
        if "rw" not in mount.options:
            continue
        if mount.type == "overlay":
            if any(option in uppers for option in mount.super_options):
                found.append(mount.target)
        elif f"{tail}/" in f"{mount.root}/":  # the layer, or a directory in it
            inside = mount.root.partition(tail)[2]
            if _is_at(mount.target, directory + inside):
                found.append(mount.target)
    return found


def _is_at(target: str, path: str) -> bool:
    """Whether what is at ``path`` stands at ``target``; only asked of binds that look like it, for stat(2) of any other mount
    may wait for its server, or be our own."""
    try:
        return os.path.samestat(os.stat(target), os.stat(path))
    except OSError:
        return False


def _unescape(text: str) -> str:
    r"""Undo the table's octal escapes (``\040`` for a blank)."""
    if "\\" not in text:
        return text
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), text.encode(errors="surrogateescape"))
    return raw.decode(errors="surrogateescape")
