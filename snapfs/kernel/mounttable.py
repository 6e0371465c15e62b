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


def mount_of(path: str) -> MountPoint:
    """The mount that holds ``path``, which must exist."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    number = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:"))
    return next(mount for mount in mount_table() if mount.id == number)


def writers(directory: str) -> list[str]:
    """Where the layer ``directory`` (ROOT/snapshots/<id>/fs) is mounted so that it can be written: as the upperdir of an
    overlay, or bound with ``rw``; paths of targets in this mount namespace."""
    own = mount_of(directory)
    inside = os.path.normpath(f"{own.root}/{os.path.relpath(directory, own.target)}")
    uppers = (f"upperdir={directory}", f"upperdir={escape(directory)}")  # as either mount API shows it
    found = []
    for mount in mount_table():
        if "rw" not in mount.options:
            continue
        if mount.type == "overlay":
            busy = any(option in uppers for option in mount.super_options)
        else:
            busy = mount.root == inside and mount.device == own.device
        if busy:
            found.append(mount.target)
    return found


def _unescape(text: str) -> str:
    r"""Undo the table's octal escapes (``\040`` for a blank)."""
    if "\\" not in text:
        return text
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), text.encode(errors="surrogateescape"))
    return raw.decode(errors="surrogateescape")
