"""This mount namespace's mount table: /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snapfs.kernel import libc

_MOUNTINFO = Path("/proc/self/mountinfo")
_PART = 64 << 10  # bytes that are read at once


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of the table.  ``root`` is the mounted directory as a path inside its file system; ``device`` is
    ``major:minor``; ``options`` are those of the mount, ``super_options`` those of the file system.  ``group`` is the peer
    group with which it shares the mounts below it, ``master`` the group from which it receives such mounts; 0 for none.
    ``unique`` is an id that is never used again, 0 where the kernel tells none; ``parent`` is the id of the mount on which this
    one stands.  ``foreign``: it is in the mount namespace of another user (``snapfs/kernel/namespaces.py``).
    """

    id: int
    device: str
    root: str
    target: str
    options: tuple[str, ...]
    type: str
    source: str
    super_options: tuple[str, ...]
    group: int = 0
    master: int = 0
    unique: int = 0
    parent: int = 0
    foreign: bool = False


def lines_of(pid: int | str, most: int | None = None) -> list[str]:
    """The lines of the table of process ``pid``, for ``parse``; raises OSError: EFBIG if they exceed ``most`` bytes."""
    with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
        return _lines(file.fileno(), most)


def _lines(fd: int, most: int | None = None) -> list[str]:
    """The lines of the table that is open as ``fd``, from where that is; raises OSError as ``lines_of`` does."""
    table = bytearray()
    while part := os.read(fd, _PART):
        table += part
        if most is not None and len(table) > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return table.decode(errors="surrogateescape").split("\n")[:-1]


def mount_table() -> Iterator[MountPoint]:
    """All mounts that this process sees, in the order in which they were made."""
    return map(parse, lines_of("self"))


def mount_id(path: str) -> int:
    """The id, as in the table, of the mount that ``path`` is on; of a mountpoint, that of the mount on it.  Links are not
    followed.  Raises OSError."""
    if (number := libc.mount_number(path)) is not None:
        return number
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mount_id_of(fd)
    finally:
        os.close(fd)


def mount_id_of(fd: int) -> int:
    """The id, as in the table, of the mount on which ``fd`` is open.  Raises OSError."""
    if (number := libc.mount_number(fd)) is not None:  # a quarter of the time
        return number
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(int(line.partition(":")[2]) for line in file if line.startswith("mnt_id:"))


def parse(line: str, *, foreign: bool = False) -> MountPoint:
    """The mount that one line of the table describes."""
    fields, _, rest = line.partition(" - ")
    number, parent, device, root, target, options, *tags = fields.split(" ")
    propagation = dict(tag.partition(":")[::2] for tag in tags)
    kind, source, super_options = rest.split(" ", 2)
    return MountPoint(
        id=int(number),
        device=device,
        root=unescape(root),
        target=unescape(target),
        options=tuple(options.split(",")),
        type=kind,
        source=unescape(source),
        super_options=tuple(unescape(option) for option in super_options.split(",")),
        group=int(propagation.get("shared", 0)),
        master=int(propagation.get("master", 0)),
        parent=int(parent),
        foreign=foreign,
    )


class MountTable:
    """The table, for a caller that needs it again and again: ``has_changed`` tells whether it must be read again.

    ``close`` it.  Not for several threads at once."""

    def __init__(self) -> None:
        self._fd = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)  # poll(2) tells once of each change since the last call
        self._read = False

    def close(self) -> None:
        """Close the descriptor of the table."""
        os.close(self._fd)

    def has_changed(self) -> bool:
        """Whether the table may have changed since the last call; True the first time."""
        changed, self._read = bool(self._poll.poll(0)) or not self._read, True
        return changed

    def lines(self) -> list[str]:
        """The lines as they are now, for ``parse``."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        return _lines(self._fd)


def unescape(text: str) -> str:
    r"""Undo the table's octal escapes (``\040`` for a blank)."""
    if "\\" not in text:
        return text
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), text.encode(errors="surrogateescape"))
    return raw.decode(errors="surrogateescape")
