"""Files that get their name once they are whole: whoever is killed before that leaves none behind."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_NOT_WITHOUT_A_NAME = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # what those say that have no such files

_numbers = itertools.count()


class Unnamed:
    """A file that is being written, open as ``fd``, in a directory that is open as ``place``."""

    def __init__(self, fd: int, place: int, partial: str) -> None:
        self.fd = fd
        self._place = place
        self._partial = partial

    def become(self, name: str) -> None:
        """Make what was written durable, under this ``name`` in its directory.  Raises OSError; FileExistsError where the name
        is in use."""
        os.fsync(self.fd)
        source = self._partial or f"/proc/self/fd/{self.fd}"
        os.link(source, name, src_dir_fd=self._place, dst_dir_fd=self._place, follow_symlinks=True)
        os.fsync(self._place)


@contextmanager
def unnamed(directory: str, mode: int = 0o600) -> Iterator[Unnamed]:
    """A new file in ``directory``, without a name where the file system has such files, else with one that tells.  Raises
    OSError."""
    with ExitStack() as ended:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        ended.callback(os.close, place)
        partial = ""
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        except OSError as error:
            if error.errno not in _NOT_WITHOUT_A_NAME:
                raise
            partial = f".snapfs-{os.getpid()}-{next(_numbers)}.partial"
            fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=place)
            ended.callback(os.unlink, partial, dir_fd=place)
        ended.callback(os.close, fd)
        yield Unnamed(fd, place, partial)
