"""Looking directories up in the kernel's memory, without the disk (openat2(2) with RESOLVE_CACHED, from Linux 5.12 on)."""

from __future__ import annotations

import os
from contextlib import suppress

from snapfs.kernel import libc

TRIES = 20
"""How often a directory is looked up: the kernel gives up, as if it had to read the disk, also where anything is mounted or
renamed on the machine just then."""

_HOW = libc.OpenHow(
    os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_BENEATH | libc.RESOLVE_CACHED
)


def open_directory(fd: int, path: str) -> int:
    """A descriptor (O_PATH) of the directory ``path``, relative to the one open as ``fd`` and by way of no link.

    Raises OSError: EAGAIN where the kernel would have to read the disk, ENOSYS or EINVAL where it is too old.
    """
    name = os.fsencode(path)
    for _ in range(TRIES - 1):
        with suppress(BlockingIOError):
            return libc.openat2(fd, name, _HOW)
    return libc.openat2(fd, name, _HOW)


def is_directory(fd: int, path: str) -> bool:
    """Whether the kernel knows, without the disk, that ``path`` is a directory: relative to the one open as ``fd``, and by way
    of no link.  False where it is none, and where it can't be told so."""
    try:
        os.close(open_directory(fd, path))
    except OSError:
        return False
    return True
