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

_MEMORY = "/dev/shm"  # any other directory does as well, for that moment

_PREFIX = "snapfs-records-"

_ABANDONED = 60.0  # seconds, after which whoever made such a directory is gone: it has it for a millisecond


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
    with _side_by_side(path, table) as seen:
        try:
            return lmdb.open(seen, subdir=False, **options)
        except lmdb.Error as error:
            error.args = tuple(part.replace(seen, path) if isinstance(part, str) else part for part in error.args)
            raise


@contextmanager
def _side_by_side(path: str, table: int) -> Iterator[str]:
    """A name for the file ``path``, beside which LMDB finds the lock table; in the first directory that takes both."""
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
    said = "; ".join(f"{refusal.strerror}: {refusal.filename}" for refusal in refusals)
    raise Unavailable(f"a directory is needed for a moment, in {_MEMORY}, $TMPDIR or /tmp: {said}", refusals[0].errno)


def _clear(directory: str) -> None:
    for name in ("records", "records-lock"):
        with suppress(OSError):
            os.unlink(f"{directory}/{name}")
    with suppress(OSError):
        os.rmdir(directory)


def _clear_abandoned(place: str) -> None:
    """Remove what processes that were killed in just that moment have left in ``place``."""
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _ABANDONED:
                        _clear(entry.path)


def _name(path: str) -> str:
    """Of the memfd: copies of a file are other files, whatever they are called."""
    file = os.stat(path)
    return f"snapfs lock table {file.st_dev}:{file.st_ino}"
