"""LMDB's lock file, in memory: its locks and its table of readers, for all processes that have one file of records open.

LMDB maps that file for writing, and the kernel ends a process that writes to a mapping of a file that the disk takes no more:
on a file system that was shut down after an error, on btrfs at its quota.  Nothing in it outlives the processes, so it is a
memfd here.  LMDB looks for it beside the data, under a name of its own: while it opens them, a temporary directory shows it
both, in memory if there is room.

Another process finds the table among the descriptors of the one that has it (``table_of``).
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import lmdb

from snapfs.errors import Unavailable
from snapfs.kernel.beneath import LOOK, called, open_beneath

_MEMORY = "/dev/shm"  # the first choice for the temporary directory; any other will do

_PREFIX = "snapfs-records-"

_NAMES = ("records", "records-lock")  # of the file, and of what LMDB looks for beside it

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
        with ExitStack() as stack:
            try:
                _clear_abandoned(place)
                directory = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
                stack.callback(_remove, directory)
                fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                stack.callback(_empty, fd)
                if not _is_ours(fd):
                    raise PermissionError(errno.EPERM, "somebody else has put another directory there", directory)
                for name, target in zip(_NAMES, (os.path.abspath(path), f"/proc/self/fd/{table}"), strict=True):
                    os.symlink(target, name, dir_fd=fd)
                    os.stat(name, dir_fd=fd)  # where links are not followed (nosymfollow) LMDB would find nothing
            except OSError as error:
                refusals.append(error)
                continue
            yield f"/proc/self/fd/{fd}/{_NAMES[0]}"
            return
    refused = "; ".join(f"{refusal.strerror}: {refusal.filename}" for refusal in refusals)
    raise Unavailable(f"a directory is needed for a moment, in {_MEMORY}, $TMPDIR or /tmp: {refused}", refusals[0].errno)


def _empty(directory: int) -> None:
    for name in _NAMES:
        with suppress(OSError):
            os.unlink(name, dir_fd=directory)


def _remove(directory: str) -> None:
    with suppress(OSError):
        os.rmdir(directory)


def _clear_abandoned(place: str) -> None:
    """Remove the directories that processes of this user have left in ``place``, which were killed in just that moment.  Others
    may make and mount there what they like, and as much: no link is followed, and no server of a file system is asked.  Raises
    OSError."""
    top = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in called(_PREFIX, top):
            with suppress(OSError):
                _remove_abandoned(top, name)
    finally:
        os.close(top)


def _remove_abandoned(top: int, name: str) -> None:
    fd = open_beneath(os.fsencode(name), top, LOOK | os.O_DIRECTORY)
    try:
        if _is_ours(fd) and time.time() - os.fstat(fd).st_mtime > _ABANDONED:
            _empty(fd)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(fd)


def _is_ours(directory: int) -> bool:
    """Whether a directory is this user's, and no other can have made anything in it."""
    found = os.fstat(directory)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _name(path: str) -> str:
    """The name of the memfd: it tells the file by device and inode, since a copy of a file, of whatever name, is another."""
    file = os.stat(path)
    return f"snapfs lock table {file.st_dev}:{file.st_ino}"
