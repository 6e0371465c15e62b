"""The flags immutable and append-only (chattr(1)), which stand in everybody's way, and how sentences name a file that has one.

To open anything but a regular file or a directory may do something, so that is never done here.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from contextlib import suppress

from snapfs import names

FIXED = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of <linux/fs.h>
_SUBVOL_GETFLAGS, _SUBVOL_SETFLAGS = 0x80089419, 0x4008941A  # BTRFS_IOC_SUBVOL_… of <linux/btrfs.h>
_SUBVOL_RDONLY = 2
_SHOWN = 250  # bytes of a path that a sentence shows: an extended attribute has room for the sentence, too


def flags_of(file: int) -> int:
    """The flags of the file open as ``file``, as chattr(1) sets them."""
    return int.from_bytes(fcntl.ioctl(file, _GET_FLAGS, bytes(8))[:4], sys.byteorder)


def set_flags(file: int, flags: int) -> None:
    """Set all flags of the file open as ``file``."""
    fcntl.ioctl(file, _SET_FLAGS, flags.to_bytes(4, sys.byteorder) + bytes(4))


def make_subvolume_writable(directory: int) -> None:
    """Let the subvolume (btrfs) whose top is open as ``directory`` be changed, if it is read-only and this process may do
    that."""
    with suppress(OSError):
        flags = int.from_bytes(fcntl.ioctl(directory, _SUBVOL_GETFLAGS, bytes(8)), sys.byteorder)
        if flags & _SUBVOL_RDONLY:
            fcntl.ioctl(directory, _SUBVOL_SETFLAGS, (flags & ~_SUBVOL_RDONLY).to_bytes(8, sys.byteorder))


def is_fixed(path: str) -> bool:
    """Whether the file or directory ``path`` is immutable or append-only; False where that can't be told."""
    try:
        held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(held)
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                return False
            file = os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(held)
        try:
            return bool(flags_of(file) & FIXED)
        finally:
            os.close(file)
    except OSError:
        return False


def nameable(path: str) -> str:
    """``path``, or of one that is too long for a sentence, or has characters that a terminal would obey, the nearest directory
    above that is not and has none."""
    while len(os.fsencode(path)) > _SHOWN or names.printable(path) != path:
        path = os.path.dirname(path)
    return path


def shown(path: str) -> str:
    """``path`` as a sentence shows it."""
    return names.printable(path) if len(os.fsencode(path)) <= _SHOWN else f"{nameable(path)}/…"
