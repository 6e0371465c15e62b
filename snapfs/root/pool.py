"""ROOT/pool: directories made and flushed ahead; a Prepare puts one in its place with one rename, and flushes nothing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

POOL = 128  # directories that are kept ready, to begin with; refilled when half are gone, which may wait for a busy disk
POOL_MOST = 512  # directories that are kept ready after bursts of Prepares that found none left
POOL_LEAST = 16  # directories that are kept ready however small the disk is
FS_MODE = 0o755  # the mode of an empty layer, as in containerd; that of its parent may be another
POOL_SHARE = 300  # free inodes, and blocks, for each directory that is kept ready, of which it takes three


class Pool:
    """The directories ready to be put into ``snapshots``; the pool itself is ``directory``, a directory in the one that is open
    as ``root``.  All functions block on the disk."""

    def __init__(self, directory: str, snapshots: str, root: int) -> None:
        self.directory = directory
        self.syncs = True
        """Whether directories are flushed before they count as ready."""
        self.flushed_up_to = 0
        """The directories of all snapshots with ids up to this are in their places on the disk."""
        self._snapshots = snapshots
        self._root, (self._above, self._name) = root, os.path.split(directory)
        self._ready: deque[str] = deque()
        self._unflushed: list[str] = []  # made, and not ready yet
        self._wanted = self._full = POOL
        self._placing = threading.Lock()  # of the next two
        self._last_placed = 0
        self._undone = 0
        self._tag = f"{time.time_ns():x}"  # so that no name in the pool is ever used again
        self._serials = itertools.count(1)  # several threads take from it

    def forget(self) -> None:
        """In a process forked from the one that has the pool: know none of its directories any more, so that ``close`` removes
        none."""
        self._ready.clear()
        self._unflushed.clear()

    def close(self) -> None:
        """Remove the directories that are ready; where the disk refuses, the next start removes them."""
        while self._ready or self._unflushed:
            remove_empty(self._ready.popleft() if self._ready else self._unflushed.pop())

    def make_first(self) -> str:
        """Make the first directory, and return its path.  Raises OSError."""
        self._unflushed.append(self.make())
        return self._unflushed[0]

    @property
    def is_low(self) -> bool:
        """Whether at least half of the directories are used up."""
        return len(self._ready) <= self._full // 2

    def fill(self, checkpoint: Callable[[], None]) -> None:
        """Make directories until the pool is full, and flush them; ``checkpoint`` is called before each, and may raise to stop.
        Raises OSError where the disk refuses."""
        try:
            self._full = min(self._wanted, self._room())
            while len(self._ready) + len(self._unflushed) < self._full:
                checkpoint()
                self._unflushed.append(self.make())
        except OSError:  # a full disk: the directories that were made are used nevertheless
            self._flush_made()
            raise
        self._flush_made()

    def _room(self) -> int:
        """How many directories the pool may have: it must not take what others need of a small disk."""
        space = os.statvfs(self.directory)
        inodes = space.f_favail if space.f_files else POOL_MOST * POOL_SHARE  # btrfs doesn't count them
        return max(POOL_LEAST, min(inodes, space.f_bavail) // POOL_SHARE)

    def _flush_made(self) -> None:
        if self.syncs and self._unflushed:
            placed, undone = self._last_placed, self._undone
            self.sync()
            with self._placing:
                if undone == self._undone:  # else that id may have been given out again
                    self.flushed_up_to = placed
        self._ready.extend(self._unflushed)
        self._unflushed.clear()

    def sync(self) -> None:
        """Return when the directories of the pool, and those that were placed before, are on disk.  Raises OSError."""
        for directory in (self.directory, self._snapshots):
            os.utime(directory)  # xfs flushes what came before a directory's last change; this makes a change that came last
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def make(self) -> str:
        """Make a directory with ``fs`` and ``work``, not flushed, and return its path; raises OSError."""
        root, own = self._root, f"{self._name}/new-{self._tag}-{next(self._serials)}"
        path = f"{self._above}/{own}"  # which is longer to walk
        try:
            os.mkdir(own, 0o700, dir_fd=root)
            try:
                for part, mode in ((f"{own}/fs", FS_MODE), (f"{own}/work", 0o711)):
                    os.mkdir(part, mode, dir_fd=root)
                    if stat.S_IMODE(os.stat(part, dir_fd=root).st_mode) != mode:  # by another umask than most have
                        os.chmod(part, mode, dir_fd=root)
            except OSError:
                remove_empty(path)
                raise
        except OSError as error:
            error.filename = f"{self._above}/{error.filename}"
            raise
        return path

    def pop_or_make(self) -> tuple[str, bool]:
        """The path of a directory that is the caller's from now on, and whether the directory is on disk.  Where none is ready,
        one is made, which is not.  Raises OSError."""
        try:
            return self._ready.popleft(), self.syncs
        except IndexError:
            self._wanted = min(2 * self._wanted, POOL_MOST)
            return self.make(), False

    def note_placed(self, number: int) -> None:
        """Note that a directory was put in its place as snapshot ``number``."""
        self._last_placed = number

    def note_undone(self, number: int) -> None:
        """Note that the directory of snapshot ``number`` is gone, and its id may be given out again."""
        with self._placing:
            self._undone += 1
            self._last_placed, self.flushed_up_to = min(number - 1, self._last_placed), min(number - 1, self.flushed_up_to)

    def has(self, name: str) -> bool:
        """Whether the pool has a directory of this name, that this process or an earlier one has made."""
        return os.path.isdir(f"{self.directory}/{name}/fs") and "/" not in name

    def leftovers(self) -> list[str]:
        """The paths of all that an earlier process has left in the pool; raises OSError."""
        ready = {os.path.basename(path) for path in (*self._ready, *self._unflushed)}
        return [f"{self.directory}/{name}" for name in os.listdir(self.directory) if name not in ready]


def remove_empty(path: str) -> None:
    """Remove the directory ``path`` with its empty ``fs`` and ``work``.  Never raises: where the disk refuses, that is logged,
    and the next start removes it."""
    for part in (f"{path}/fs", f"{path}/work", path):
        try:
            os.rmdir(part)
        except FileNotFoundError:
            pass
        except OSError as error:
            level = (
                logging.DEBUG if error.errno in (errno.EROFS, errno.EIO) else logging.WARNING
            )  # so it is with all writes: the caller has been told
            log.log(level, "cannot remove %s: %s", part, error.strerror)
            return
