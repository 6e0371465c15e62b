"""ROOT/trash: directories whose records are gone, on their way out."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable

from snapfs.reserve import FULL

log = logging.getLogger(__name__)

DEPTH = 50  # directories deeper than this are deleted from the trash's top: bounds stack and descriptors

NOT_EMPTY = frozenset((errno.ENOTEMPTY, errno.EEXIST))

Checkpoint = Callable[[], None]
"""Is called once an entry, and may raise to stop."""


class Trash:
    """One root's trash.  All functions block on the disk."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.count = 0
        """How many directories are in it."""
        self._counting = threading.Lock()
        self._serials = itertools.count(1)  # for names; several threads take from it

    def look(self) -> None:
        """Count what an earlier process has left in it; raises OSError."""
        self.count = len(os.listdir(self.directory))

    def _add(self, more: int) -> None:
        with self._counting:
            self.count += more

    def take(self, path: str) -> None:
        """Move the directory ``path`` here; raises OSError."""
        while True:
            target = f"{self.directory}/{os.path.basename(path)}-{os.getpid()}-{next(self._serials)}"
            if not os.path.lexists(target):
                break
        os.rename(path, target)
        self._add(1)

    def empty(self, checkpoint: Checkpoint) -> None:
        """Delete what is in it.  What can't be deleted is logged and stays for the next time."""
        tries: Counter[str] = Counter()
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
                            log.warning("cannot delete %s/%s: %s", self.directory, name, error)
        finally:
            os.close(fd)

    def delete(self, path: str, checkpoint: Checkpoint) -> None:
        """Delete the directory ``path`` where it is; raises OSError when all of it that can be deleted is."""
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
        return os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _delete(self, parent: int, name: str, trash: int, depth: int, checkpoint: Checkpoint) -> None:
        """Delete ``name`` in the directory ``parent`` and all below it; what lies too deep is moved to the top of ``trash``."""
        try:
            os.unlink(name, dir_fd=parent)
            return
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):  # Linux says the former of directories, POSIX the latter
            pass
        try:
            os.rmdir(name, dir_fd=parent)
            return
        except OSError as error:
            if error.errno not in NOT_EMPTY:
                raise
        if depth == DEPTH:
            os.rename(name, f"deep-{time.time_ns()}-{next(self._serials)}", src_dir_fd=parent, dst_dir_fd=trash)
            self._add(1)
            return
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
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
        os.rmdir(name, dir_fd=parent)
