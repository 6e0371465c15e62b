"""ROOT/trash: directories of removed snapshots, on their way out.

Before it is deleted, a directory that may not be written to gets the mode 0700, and the flags immutable and append-only
(chattr(1)) are cleared where the daemon may do that.  Nothing else is changed: a file that has another name elsewhere gets its
flags back.  Subvolumes (btrfs) that users have made are made writable and moved to the trash's top, whence nothing can be moved
out of them.  A directory that can't be deleted all the same gets the reason as an extended attribute.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

from snapfs import names
from snapfs.errors import FULL, Unavailable
from snapfs.kernel import subids
from snapfs.kernel.inodeflags import FIXED, flags_of, set_flags
from snapfs.root.flags import is_fixed, make_subvolume_writable

T = TypeVar("T")

log = logging.getLogger(__name__)

STUCK = "user.snapfs.stuck"
"""The extended attribute of a directory that could not be deleted: why, and what to do."""

DEPTH = 50  # directories deeper than this are deleted from the trash's top: bounds stack and descriptors

_NAME = 100  # bytes of a name that go into one in the trash
_PATH_MAX = 4096

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
        with os.scandir(self._held) as entries:
            self.count = sum(1 for _ in entries)

    def _add(self, more: int) -> None:
        with self._counting:
            self.count += more

    def move_here(self, path: str) -> None:
        """Delete the directory ``path`` if nothing but the empty directories of a layer is in it, else move it into the trash;
        raises OSError."""
        with suppress(OSError):
            for part in (f"{path}/fs", f"{path}/work"):
                with suppress(FileNotFoundError):  # a view has no work
                    os.rmdir(part)
            os.rmdir(path)
            return
        while True:
            name = os.fsdecode(os.fsencode(os.path.basename(path))[:_NAME])  # a foreign one may be as long as names can be
            target = f"{self._held}/{name}-{os.getpid()}-{next(self._serials)}"
            if not os.path.lexists(target):
                break
        self._add(1)  # first: as soon as it is there another thread may delete it
        try:
            os.rename(path, target)
        except OSError:
            self._add(-1)
            raise

    def empty(self, checkpoint: Checkpoint) -> list[OSError]:
        """Delete all that is in the trash; returns an error, with its path, for each directory that can't be deleted and stays.

        Raises OSError where the trash itself can't be read."""
        tries: Counter[str] = Counter()
        refused: list[OSError] = []
        fd = self._open()
        try:
            while self._delete_untried(fd, tries, refused, checkpoint):
                pass  # what lies deep has come to the top meanwhile
        finally:
            os.close(fd)
        return refused

    def _delete_untried(self, fd: int, tries: Counter[str], refused: list[OSError], checkpoint: Checkpoint) -> bool:
        """Delete what is in the trash, which is open as ``fd``, but for what was tried in vain; whether there was any."""
        found = False
        with os.scandir(fd) as entries:
            for name in (entry.name for entry in entries if tries[entry.name] < 2):
                found = True
                checkpoint()
                error = self._delete(fd, name, fd, fd, 0, checkpoint)
                if error is None:
                    self._add(-1)
                    continue
                tries[name] += 1 if error.errno in FULL else 2  # there may be room when the others are gone
                if tries[name] == 2:
                    error.filename = f"{self.directory}/{error.filename}"
                    refused.append(error.with_traceback(None))
                    self.mark_stuck(f"{self._held}/{name}", error)
        return found

    def mark_stuck(self, path: str, error: OSError) -> None:
        """Write to an extended attribute of the directory ``path`` why it can't be deleted, and to the log the first time."""
        sentence = why_undeletable(error)
        if sentence not in self._logged:
            self._logged.add(sentence)
            log.warning("%s", sentence)
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                try:
                    os.setxattr(fd, STUCK, os.fsencode(sentence))
                except OSError:  # there may be no room for so much
                    os.setxattr(fd, STUCK, os.fsencode(f"a file in {path} can't be deleted"))
            finally:
                os.close(fd)

    def delete(self, path: str, checkpoint: Checkpoint) -> None:
        """Delete the directory ``path`` where it is; raises OSError where some of it can't be deleted, after all else was."""
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = self._open()
            try:
                error = self._delete(parent, os.path.basename(path), fd, fd, 0, checkpoint)
            finally:
                os.close(fd)
            if error is not None:
                error.filename = f"{os.path.dirname(path)}/{error.filename}"
                raise error
        finally:
            os.close(parent)

    def _open(self) -> int:
        return os.open(self._held, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _delete(self, parent: int, name: str, top: int, trash: int, depth: int, checkpoint: Checkpoint) -> OSError | None:
        """Delete ``name`` in the directory open as ``parent``, and all below it.  Directories that lie too deep are moved up to
        the directory open as ``top``: the trash, or within a subvolume that users have made its own top.  ``trash`` is open on
        the trash.

        Returns the error of a file or directory that can't be deleted, with its path from ``parent`` on, after all else was.
        """
        try:
            return self._delete_whole(parent, name, top, trash, depth, checkpoint)
        except FileNotFoundError:  # somebody else has deleted it meanwhile
            return None
        except OSError as error:
            error.filename = name
            return error

    def _delete_whole(self, parent: int, name: str, top: int, trash: int, depth: int, checkpoint: Checkpoint) -> OSError | None:
        retried = partial(_retried, parent, name, depth > 0)
        try:
            retried(lambda: os.unlink(name, dir_fd=parent))
            return None
        except IsADirectoryError:
            pass
        try:
            retried(lambda: os.rmdir(name, dir_fd=parent))
            return None
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = retried(lambda: os.open(name, flags, dir_fd=parent))
        try:
            if os.fstat(fd).st_dev != os.fstat(parent).st_dev:
                make_subvolume_writable(fd)
                if depth:  # also where it is not deep: so subvolumes within each other cost no stack
                    self._move_up(parent, name, trash, trash)
                    return None
                top = fd
            if depth == DEPTH:
                self._move_up(parent, name, top, trash)
                return None
            refused, gone = self._delete_entries(fd, top, trash, depth + 1, checkpoint)
            while refused is None:  # and all entries are gone, but those that reading the directory has passed by
                try:
                    retried(lambda: os.rmdir(name, dir_fd=parent))
                    return None
                except OSError as error:
                    if error.errno not in NOT_EMPTY or not gone:
                        raise
                refused, gone = self._delete_entries(fd, top, trash, depth + 1, checkpoint)
        finally:
            os.close(fd)
        refused.filename = f"{name}/{refused.filename}"
        return refused  # but all the rest is gone, and has made room

    def _move_up(self, parent: int, name: str, top: int, trash: int) -> None:
        """Move the directory ``name`` in the one open as ``parent`` up, where it is met again.  Raises OSError."""
        moved = f"deep-{time.time_ns()}-{next(self._serials)}"

        def rename() -> None:
            _retried(parent, name, True, lambda: os.rename(name, moved, src_dir_fd=parent, dst_dir_fd=top))

        try:
            rename()
        except PermissionError:
            with ExitStack() as stack:
                if top == trash or not _make_deletable(top, stack):
                    raise
                rename()
        if top == trash:
            self._add(1)

    def _delete_entries(self, fd: int, top: int, trash: int, depth: int, checkpoint: Checkpoint) -> tuple[OSError | None, int]:
        """Delete all entries of the directory open as ``fd``, as they are read: there may be millions; the error of one that
        can't be deleted, and how many are gone."""
        refused: OSError | None = None
        gone = 0
        with os.scandir(fd) as entries:
            for entry in entries:
                checkpoint()
                error = self._delete(fd, entry.name, top, trash, depth, checkpoint)
                if error is None:
                    gone += 1
                else:
                    refused = error.with_traceback(None)
        return refused, gone


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
    flags = flags_of(file)
    if not flags & FIXED:
        return False
    set_flags(file, flags & ~FIXED)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:

        def restore() -> None:
            with suppress(OSError):
                if os.fstat(file).st_nlink:
                    set_flags(file, flags)

        stack.callback(restore)
    return True


def why_undeletable(error: OSError) -> str:
    """The sentence that says why the file or directory that ``error`` names can't be deleted, and what to do."""
    path, reason = str(error.filename), os.strerror(error.errno or 0)
    what = f"{names.shown(path)} can't be deleted"
    named = names.nameable(path)
    if error.errno == errno.EBUSY:
        return f"{what}: something is mounted there; unmount that first"
    if isinstance(error, PermissionError):
        for place in (path, os.path.dirname(path)):
            if is_fixed(place):
                which = "it" if place == path else names.shown(place)
                of_all = "" if names.nameable(place) == place else "-R "
                return (
                    f"{what}: {which} is immutable or append-only, and this daemon may not change that; do it as root: "
                    f"chattr {of_all}-i -a {names.word(names.nameable(place))}"
                )
        if len(os.fsencode(path)) >= _PATH_MAX:  # chattr can't be told of it, and it can't be told here whether that would help
            remedy = f"find {names.word(named)} -execdir chattr -f -i -a {{}} +; rm -rf {names.word(named)}"
        else:
            remedy = f"rm -rf {names.word(named)}"
        return f"{what}: {reason}; do it as its owner or as root: {remedy}{subids.hint(error)}"
    if error.errno in (errno.EXDEV, errno.EROFS):
        return f"{what}: {reason}; do it as root: rm -rf {names.word(named)}, or btrfs subvolume delete for a subvolume"
    return f"{what}: {reason}"


def cleanup_error(refused: Sequence[OSError]) -> Unavailable:
    """The error of a Cleanup that could not delete some directories: one of ``refused`` for each."""
    more = f" (and so it is with {len(refused) - 1} more, which the daemon has logged)" if len(refused) > 1 else ""
    public = f"files of {len(refused)} removed snapshots can't be deleted; the daemon's log says which and what to do"
    return Unavailable(f"{why_undeletable(refused[0])}; then clean up again{more}", refused[0].errno, public=public)
