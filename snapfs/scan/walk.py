"""Walking every directory of a layer, however deep and long its paths are."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Generator

Entries = list[os.DirEntry[str]]

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def directories(top: str) -> Generator[tuple[int, Entries], None, None]:
    """An open descriptor of ``top``, and then of each directory below it, parents first; each with the directory's entries, of
    which nothing but names and types has been read.

    Descriptor and entries are valid until the next step.  A directory that vanishes meanwhile is left out (and an entry's
    ``stat`` may raise FileNotFoundError); no symbolic link is ever followed, also where another process puts one in the way.
    Depth costs neither stack nor more than a few descriptors, and no path is too long.

    Raises OSError where ``top`` is missing or the disk fails.  Blocks on the disk; close the generator to close what it has
    open.
    """
    with Descriptors() as descriptors:
        pending = [Directory(top)]
        while pending:
            directory = pending.pop()
            fd = descriptors.get(directory)
            if fd < 0:
                continue
            with os.scandir(fd) as entries:
                found = list(entries)
                below = [Directory(entry.name, directory) for entry in found if entry.is_dir(follow_symlinks=False)]
                yield fd, found
            pending += below
            if not below:
                descriptors.close(directory)


class Directory:
    """A directory, by its name in ``parent``, or without a parent by its path.  ``Descriptors`` opens it; ``fd`` is -1 while it
    is not open."""

    __slots__ = ("fd", "name", "parent")

    def __init__(self, name: str, parent: Directory | None = None) -> None:
        self.name = name
        self.parent = parent
        self.fd = -1


class Descriptors:
    """Descriptors for any number of directories, of which only the last used stay open: the others are opened again, name
    by name from the nearest open ancestor, so that no symbolic link is ever followed that was put in the way meanwhile.

    A context manager: leaving it closes all.
    """

    OPEN = 128  # descriptors at most, but for two on the way down
    NEAR = 16  # of a long way down, how many directories stay open: a walk that climbs back up needs them next

    def __init__(self) -> None:
        self._open: OrderedDict[Directory, None] = OrderedDict()

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for directory in list(self._open):
            self.close(directory)

    def get(self, directory: Directory) -> int:
        """A descriptor of ``directory``, valid until the next call; -1 where the directory has vanished, or is none any more.

        Raises OSError where a directory without a parent is missing, or the disk fails.
        """
        if directory.fd >= 0:
            self._open.move_to_end(directory)
            return directory.fd
        way = [directory]
        while (above := way[-1].parent) is not None and above.fd < 0:
            way.append(above)
        fd, passing = (above.fd, False) if above is not None else (None, False)
        while way:
            step = way.pop()
            try:
                opened = os.open(step.name, _FLAGS, dir_fd=fd)
            except OSError as error:
                if step.parent is not None and error.errno in _VANISHED:
                    return -1
                raise
            finally:
                if passing:
                    os.close(fd)  # type: ignore[arg-type]
            fd, passing = opened, len(way) >= self.NEAR
            if not passing:
                step.fd = fd
                self._open[step] = None
                if len(self._open) > self.OPEN:
                    self.close(next(iter(self._open)))
        return directory.fd

    def close(self, directory: Directory) -> None:
        """Close the descriptor of ``directory``, which its user needs no more for now."""
        if directory.fd >= 0:
            del self._open[directory]
            os.close(directory.fd)
            directory.fd = -1
