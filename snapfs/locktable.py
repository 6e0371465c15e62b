"""LMDB's lock file, in memory: its locks and its table of readers, for all processes that have one file of records open.

LMDB maps that file for writing, and the kernel ends a process that writes to a mapping of a file that the disk takes no more:
on a file system that was shut down after an error, on btrfs at its quota.  Nothing in it outlives the processes, so it is a
memfd here.  LMDB looks for it beside the data, under a name of its own: while it opens them, a directory in memory shows it
both.

Another process finds the table among the descriptors of the one that has it (``table_of``).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import Any

import lmdb

_MEMORY = "/dev/shm"  # where the system has it; any other directory does as well


def new_table(path: str) -> int:
    """A lock table for the file ``path``, which is there: the descriptor of a memfd, to be kept as long as LMDB has it open,
    since closing it would let go of LMDB's locks."""
    fd = os.memfd_create(_name(path), os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    return fd


def table_of(pid: int, path: str) -> int | None:
    """The lock table that process ``pid`` has for the file ``path``, opened; None where none can be seen from here."""
    try:
        theirs = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None
    for fd in theirs:
        with suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{fd}") == f"/memfd:{_name(path)} (deleted)":
                return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    return None


def open_environment(path: str, table: int, **options: Any) -> lmdb.Environment:
    """``lmdb.open`` of the one file ``path``, with the lock table ``table``.  Raises lmdb.Error, OSError."""
    directory = tempfile.mkdtemp(prefix="snapfs-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
    seen = f"{directory}/records"
    try:
        os.symlink(os.path.abspath(path), seen)
        os.symlink(f"/proc/self/fd/{table}", f"{seen}-lock")
        return lmdb.open(seen, subdir=False, **options)
    except lmdb.Error as error:
        error.args = tuple(argument.replace(seen, path) if isinstance(argument, str) else argument for argument in error.args)
        raise
    finally:
        for name in (seen, f"{seen}-lock"):
            with suppress(OSError):
                os.unlink(name)
        os.rmdir(directory)


def _name(path: str) -> str:
    """Of the memfd: copies of a file are other files, whatever they are called."""
    file = os.stat(path)
    return f"snapfs lock table {file.st_dev}:{file.st_ino}"
