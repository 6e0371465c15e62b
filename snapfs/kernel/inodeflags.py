"""The flags of files and directories that chattr(1) sets."""

from __future__ import annotations

import fcntl
import sys
from contextlib import suppress

FIXED = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL
_USED = FIXED | 0x08 | 0x40 | 0x80 | 0x10000  # and FS_SYNC_FL, FS_NODUMP_FL, FS_NOATIME_FL, FS_DIRSYNC_FL

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of <linux/fs.h>


def flags_of(file: int) -> int:
    """The flags of the file open as ``file``."""
    return int.from_bytes(fcntl.ioctl(file, _GET_FLAGS, bytes(8))[:4], sys.byteorder)


def set_flags(file: int, flags: int) -> None:
    """Set all flags of the file open as ``file``."""
    fcntl.ioctl(file, _SET_FLAGS, flags.to_bytes(4, sys.byteorder) + bytes(4))


def flags_to_copy(file: int) -> int:
    """Those flags of the file open as ``file`` that say how it may be used, and not how it is stored; none where the file
    system has no flags."""
    try:
        return flags_of(file) & _USED
    except OSError:
        return 0


def add_flags(file: int, flags: int) -> None:
    """Set ``flags`` of the file open as ``file`` besides those that it has, where this process may."""
    with suppress(OSError):
        if (own := flags_of(file)) | flags != own:
            set_flags(file, own | flags)
