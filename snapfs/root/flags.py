"""The flags immutable and append-only (chattr(1)), which stand in everybody's way.

To open anything but a regular file or a directory may do something, so that is never done here.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from contextlib import suppress

from snapfs.kernel.inodeflags import FIXED, flags_of

_SUBVOL_GETFLAGS, _SUBVOL_SETFLAGS = 0x80089419, 0x4008941A  # BTRFS_IOC_SUBVOL_… of <linux/btrfs.h>
_SUBVOL_RDONLY = 2


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
