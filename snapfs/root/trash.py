"""ROOT/trash: directories of removed snapshots, on their way out.

Before it is deleted, a directory that may not be written to gets the mode 0700, and the flags immutable and append-only
(chattr(1)) are cleared where the daemon may do that.  Nothing else is changed: a file that has another name elsewhere gets its
flags back.  A directory that can't be deleted all the same gets the reason as an extended attribute.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import shlex
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

from snapfs.errors import FULL, Unavailable

T = TypeVar("T")

log = logging.getLogger(__name__)

STUCK = "user.snapfs.stuck"
"""The extended attribute of a directory that could not be deleted: why, and what to do."""

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS of <linux/fs.h>
_UNDELETABLE = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL

DEPTH = 50  # directories deeper than this are deleted from the trash's top: bounds stack and descriptors

NOT_EMPTY = frozenset((errno.ENOTEMPTY, errno.EEXIST))

Checkpoint = Callable[[], None]
"""A function that is called once an entry, and may raise to stop the work."""


class Trash:
    """One root's trash, called ``directory`` and reached by ``held``.  All functions block on the disk."""

    def __init__(self, directory: str, held: str) -> None:
        self.directory = directory
        self._held = held
        self.count = 0
        """How many directories are in it."""
        self._counting = threading.Lock()
        self._serials = itertools.count(1)  # for names; several threads take from it
        self._logged: set[str] = set()

    def count_leftovers(self) -> None:
        """Count the directories that an earlier process has left in the trash; raises OSError."""
        self.count = len(os.listdir(self._held))

    def _add(self, more: int) -> None:
        with self._counting:
            self.count += more

    def move_here(self, path: str) -> None:
        """Move the directory ``path`` into the trash; raises OSError."""
        while True:
            target = f"{self._held}/{os.path.basename(path)}-{os.getpid()}-{next(self._serials)}"
            if not os.path.lexists(target):
                break
        os.rename(path, target)
        self._add(1)

    def empty(self, checkpoint: Checkpoint) -> list[OSError]:
        """Delete all that is in the trash; returns an error, with its path, for each directory that can't be deleted and stays.

        Raises OSError where the trash itself can't be read."""
        tries: Counter[str] = Counter()
        refused: list[OSError] = []
        fd = self._open()
        try:
            while names := [name for name in os.listdir(fd) if tries[name] < 2]:
                for name in names:
                    checkpoint()
                    try:
                        self._delete(fd, name, fd, 0, checkpoint)
                        self._add(-1)
                    except OSError as error:
                        tries[name] += 1 if error.errno in FULL else 2  # there may be room when the others are gone
                        if tries[name] == 2:
                            refused.append(error)
                            self.mark_stuck(f"{self._held}/{name}", error)
        finally:
            os.close(fd)
        return refused

    def mark_stuck(self, path: str, error: OSError) -> None:
        """Write to an extended attribute of the directory ``path`` why it can't be deleted, and to the log the first time."""
        sentence = why_undeletable(error)
        if sentence not in self._logged:
            self._logged.add(sentence)
            log.warning("%s", sentence)
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.setxattr(fd, STUCK, os.fsencode(sentence))
            finally:
                os.close(fd)

    def delete(self, path: str, checkpoint: Checkpoint) -> None:
        """Delete the directory ``path`` where it is; raises OSError where some of it can't be deleted, after all else was."""
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = self._open()
            try:
                self._delete(parent, os.path.basename(path), fd, 0, checkpoint)
            finally:
                os.close(fd)
        finally:
            os.close(parent)

    def _open(self) -> int:
        return os.open(self._held, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _delete(self, parent: int, name: str, trash: int, depth: int, checkpoint: Checkpoint) -> None:
        """Delete ``name`` in the directory open as ``parent``, and all below it; directories that lie too deep are moved to the
        top of the trash, which is open as ``trash``.

        Raises OSError, with the path of the file or directory that can't be deleted.
        """
        try:
            self._delete_whole(parent, name, trash, depth, checkpoint)
        except OSError as error:
            if not os.path.isabs(error.filename or ""):
                error.filename = f"{os.readlink(f'/proc/self/fd/{parent}')}/{name}"
            raise

    def _delete_whole(self, parent: int, name: str, trash: int, depth: int, checkpoint: Checkpoint) -> None:
        retried = partial(_retried, parent, name, depth > 0)
        try:
            retried(lambda: os.unlink(name, dir_fd=parent))
            return
        except FileNotFoundError:
            return
        except IsADirectoryError:
            pass
        try:
            retried(lambda: os.rmdir(name, dir_fd=parent))
            return
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
        if depth == DEPTH:
            moved = f"deep-{time.time_ns()}-{next(self._serials)}"
            retried(lambda: os.rename(name, moved, src_dir_fd=parent, dst_dir_fd=trash))
            self._add(1)
            return
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = retried(lambda: os.open(name, flags, dir_fd=parent))
        refused: OSError | None = None
        try:
            for child in os.listdir(fd):
                checkpoint()
                try:
                    self._delete(fd, child, trash, depth + 1, checkpoint)
                except OSError as error:
                    refused = error
        finally:
            os.close(fd)
        if refused is not None:  # but all the rest is gone, and has made room
            raise refused
        retried(lambda: os.rmdir(name, dir_fd=parent))


def _retried(parent: int, name: str, inside: bool, act: Callable[[], T]) -> T:
    """What ``act``, which does something to ``name`` in the directory open as ``parent``, returns.  If that is not permitted,
    ``act`` is called once more after mode and flags that forbid it are changed.

    ``inside``: ``parent`` is to be deleted too, and may be changed for that.
    """
    try:
        return act()
    except PermissionError:
        with ExitStack() as stack:
            changed = inside and _make_deletable(parent, stack)
            with suppress(OSError):
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                stack.callback(os.close, fd)
                changed |= _make_deletable(fd, stack)
            if not changed:
                raise
            return act()


def _make_deletable(fd: int, stack: ExitStack) -> bool:
    """Change mode and flags that keep the file or directory open as ``fd``, and its entries, from being deleted; whether
    anything was changed.  A file that is still there when ``stack`` ends, by another name, gets its flags back."""
    found = os.fstat(fd)
    changed = False
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):  # to open anything else may do something
        with suppress(OSError):
            changed = _clear_flags(fd, stack)
    if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o700 != 0o700:
        with suppress(OSError):
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
            changed = True
    return changed


def _clear_flags(fd: int, stack: ExitStack) -> bool:
    file = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, file)
    flags = _flags(file)
    if not flags & _UNDELETABLE:
        return False
    _set_flags(file, flags & ~_UNDELETABLE)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:

        def restore() -> None:
            with suppress(OSError):
                if os.fstat(file).st_nlink:
                    _set_flags(file, flags)

        stack.callback(restore)
    return True


def _flags(file: int) -> int:
    """The flags of the file open as ``file``, as chattr(1) sets them."""
    return int.from_bytes(fcntl.ioctl(file, _GET_FLAGS, bytes(8))[:4], sys.byteorder)


def _set_flags(file: int, flags: int) -> None:
    fcntl.ioctl(file, _SET_FLAGS, flags.to_bytes(4, sys.byteorder) + bytes(4))


def why_undeletable(error: OSError) -> str:
    """The sentence that says why the file or directory that ``error`` names can't be deleted, and what to do."""
    path, reason = str(error.filename), os.strerror(error.errno or 0)
    if error.errno == errno.EBUSY:
        return f"{path} can't be deleted: something is mounted there; unmount that first"
    if isinstance(error, PermissionError):
        for place in (path, os.path.dirname(path)):
            if _is_undeletable(place):
                which = "it" if place == path else place
                return (
                    f"{path} can't be deleted: {which} is immutable or append-only, and this daemon may not change that; do it "
                    f"as root: chattr -i -a {shlex.quote(place)}"
                )
        return f"{path} can't be deleted: {reason}; do it as its owner or as root: rm -rf {shlex.quote(path)}"
    return f"{path} can't be deleted: {reason}"


def _is_undeletable(path: str) -> bool:
    try:
        found = os.lstat(path)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return False
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return bool(_flags(file) & _UNDELETABLE)
        finally:
            os.close(file)
    except OSError:
        return False


def cleanup_error(refused: Sequence[OSError]) -> Unavailable:
    """The error of a Cleanup that could not delete some directories: one of ``refused`` for each."""
    more = f" (and so it is with {len(refused) - 1} more, which the daemon has logged)" if len(refused) > 1 else ""
    public = f"files of {len(refused)} removed snapshots can't be deleted; the daemon's log says which and what to do"
    return Unavailable(f"{why_undeletable(refused[0])}; then clean up again{more}", refused[0].errno, public=public)
