"""Looking directories up in the kernel's memory, without the disk (openat2(2) with RESOLVE_CACHED, from Linux 5.12 on)."""

from __future__ import annotations

import ctypes
import os

from snapfs.kernel import libc

_OPENAT2 = 437  # on every architecture
_NO_SYMLINKS, _BENEATH, _CACHED = 0x04, 0x08, 0x20  # linux/openat2.h


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_how = _OpenHow(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _NO_SYMLINKS | _BENEATH | _CACHED)
_how_address, _how_size = ctypes.byref(_how), ctypes.c_size_t(ctypes.sizeof(_how))


def open_directory(fd: int, path: str) -> int:
    """A descriptor (O_PATH) of the directory ``path``, relative to the one open as ``fd`` and by way of no link.

    Raises OSError: EAGAIN where the kernel would have to read the disk, ENOSYS or EINVAL where it is too old.
    """
    return libc.call("syscall", _OPENAT2, fd, os.fsencode(path), _how_address, _how_size)


def is_directory(fd: int, path: str) -> bool:
    """Whether the kernel knows, without the disk, that ``path`` is a directory: relative to the one open as ``fd``, and by way
    of no link.  False where it is none, and where it can't be told so."""
    try:
        os.close(open_directory(fd, path))
    except OSError:
        return False
    return True
