"""LMDB's lock file, in memory: its locks and its table of readers, for all processes that have one file of records open.

LMDB maps that file for writing, and the kernel ends a process that writes to a mapping of a file that the disk takes no more:
on a file system that was shut down after an error, on btrfs at its quota.  Nothing in it outlives the processes, so it is a
memfd here.  LMDB looks for it beside the data, under a name of its own: while it opens them, a temporary directory shows it
both, in memory if there is room.

Another process finds the table among the descriptors of the one that has it (``table_of``).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lmdb

from snapfs.errors import Unavailable

_MEMORY = "/dev/shm"  # the first choice for the temporary directory; any other will do

_PREFIX = "snapfs-records-"

_ABANDONED = 60.0  # seconds after which the process that made such a directory is gone: it needs it for a millisecond


def new_table(path: str) -> int:
    """A new lock table for the file ``path``, which must exist: the descriptor of a memfd.

    Keep it open as long as LMDB has the file open: closing it would release LMDB's locks.  Raises OSError.
    """
    fd = os.memfd_create(_name(path), os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    return fd


def table_of(pid: int, path: str) -> int | None:
    """A descriptor of the lock table that process ``pid`` has for the file ``path``; None where this process can see none.

    Raises OSError where ``path`` is missing.
    """
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
    """``lmdb.open`` of the file ``path``, with the lock table open as ``table`` and further ``options`` of that function.

    Raises lmdb.Error, OSError, and Unavailable where no directory can be had for a moment."""
    with _side_by_side(path, table) as seen:
        try:
            return lmdb.open(seen, subdir=False, **options)
        except lmdb.Error as error:
            error.args = tuple(part.replace(seen, path) if isinstance(part, str) else part for part in error.args)
            raise


@contextmanager
def _side_by_side(path: str, table: int) -> Iterator[str]:
    """A name for the file ``path``, for the block: LMDB finds the lock table beside it.  It is in a temporary directory."""
    refusals = []
    for place in (_MEMORY, os.environ.get("TMPDIR", "/tmp"), os.path.dirname(os.path.abspath(path))):
        directory = ""
        try:
            _clear_abandoned(place)
            directory = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
            seen = f"{directory}/records"
            for name, target in ((seen, os.path.abspath(path)), (f"{seen}-lock", f"/proc/self/fd/{table}")):
                os.symlink(target, name)
                os.stat(name)  # where links are not followed (nosymfollow) LMDB would find nothing
        except OSError as error:
            _clear(directory)
            refusals.append(error)
            continue
        try:
            yield seen
        finally:
            _clear(directory)
        return
    refused = "; ".join(f"{refusal.strerror}: {refusal.filename}" for refusal in refusals)
    raise Unavailable(f"a directory is needed for a moment, in {_MEMORY}, $TMPDIR or /tmp: {refused}", refusals[0].errno)


def _clear(directory: str) -> None:
    for name in ("records", "records-lock"):
        with suppress(OSError):
            os.unlink(f"{directory}/{name}")
    with suppress(OSError):
        os.rmdir(directory)


def _clear_abandoned(place: str) -> None:
    """Remove the directories that processes have left in ``place``, which were killed in just that moment."""
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _ABANDONED:
                        _clear(entry.path)


def _name(path: str) -> str:
    """The name of the memfd: it tells the file by device and inode, since a copy of a file, of whatever name, is another."""
    file = os.stat(path)
    return f"snapfs lock table {file.st_dev}:{file.st_ino}"
