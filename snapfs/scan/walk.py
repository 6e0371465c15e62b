"""Walking every directory of a layer, however deep and long its paths are, and however much is in it."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Generator
from itertools import islice
from typing import AnyStr, Generic, Protocol

from snapfs.kernel import inside

Entries = list[os.DirEntry[str]]

BATCH = 5000  # entries of a directory that are handed out at once
PAUSED = 16  # directories at most that are left half read while what is in them is walked


class Listing(Protocol):
    """What ``os.scandir`` gives."""

    def __iter__(self) -> Listing: ...

    def __next__(self) -> os.DirEntry[str]: ...

    def close(self) -> None: ...


_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def directories(top: str) -> Generator[tuple[int, Entries], None, None]:
    """An open descriptor of ``top``, and then of each directory below it, parents first; each with the directory's entries, of
    which nothing but names and types has been read.  A large directory comes several times, with some of its entries each.

    Descriptor and entries are valid until the next step.  A directory that vanishes meanwhile is left out (and an entry's
    ``stat`` may raise FileNotFoundError); no symbolic link is ever followed, also where another process puts one in the way.
    Where something is mounted inside the layer, the directory beneath is walked.  Depth costs neither stack nor more than a few
    descriptors, no path is too long, and however many entries a directory has, they cost no more memory (but the names of its
    subdirectories do, where PAUSED others around it are half read).

    Raises OSError where ``top`` is missing or the disk fails, and where something is mounted inside and this process may not
    look beneath (EBUSY).  Blocks on the disk; close the generator to close what it has open.
    """
    with Descriptors() as descriptors:
        pending: list[Directory | _Half] = [Directory(top)]
        halves = 0
        opened: list[Listing] = []
        try:
            while pending:
                following = pending.pop()
                if isinstance(following, Directory):
                    directory = following
                    fd = descriptors.get(directory)
                    if fd < 0:
                        continue
                    entries: Listing = os.scandir(fd)
                    opened.append(entries)
                else:
                    halves -= 1
                    directory, entries = following.directory, following.entries
                    fd = directory.fd
                    descriptors.let_go(directory)
                below: list[Directory] = []
                while True:
                    found = list(islice(entries, BATCH))
                    below += [Directory(entry.name, directory) for entry in found if entry.is_dir(follow_symlinks=False)]
                    yield fd, found
                    if len(found) < BATCH:
                        entries.close()
                        opened.pop()
                        break
                    if len(below) >= BATCH // 2 and halves < PAUSED:
                        halves += 1
                        descriptors.hold(directory)  # the entries to come need it
                        pending.append(_Half(directory, entries))
                        break
                pending += below
                if not below:
                    descriptors.close(directory)
        finally:
            for entries in opened:
                entries.close()


class Directory:
    """A directory, by its name in ``parent``, or without a parent by its path.  ``Descriptors`` opens it; ``fd`` is -1 while it
    is not open, and ``is_nodev`` tells whether devices can be opened by that, None while nobody knows."""

    __slots__ = ("fd", "is_nodev", "name", "parent")

    def __init__(self, name: str, parent: Directory | None = None) -> None:
        self.name = name
        self.parent = parent
        self.fd = -1
        self.is_nodev: bool | None = None


class _Half:
    """A directory that is half read, with the entries to come."""

    __slots__ = ("directory", "entries")

    def __init__(self, directory: Directory, entries: Listing) -> None:
        self.directory = directory
        self.entries = entries


class Way(Generic[AnyStr]):
    """The way down to a directory, by names that end in a slash, but for the ``first``, its top.  Its path is made when it is
    asked for: that of a deep directory is as long as the walk, and there are as many such directories."""

    def __init__(self, first: AnyStr) -> None:
        self._names: list[AnyStr] = [first]
        self._path: AnyStr = first
        self._of = 1  # how many names the path is made of

    def enter(self, name: AnyStr) -> None:
        """Go on to the directory ``name``, with its slash."""
        self._names.append(name)

    def leave(self) -> None:
        """Go back to the directory above."""
        self._names.pop()
        self._of = min(self._of, len(self._names) - 1)

    @property
    def path(self) -> AnyStr:
        """The path of the directory, with its slash."""
        if self._of != len(self._names):
            empty: AnyStr = self._path[:0]
            self._path = empty.join(self._names)
            self._of = len(self._names)
        return self._path


class Descriptors:
    """Descriptors for any number of directories, of which only the last used stay open: the others are opened again, name
    by name from the nearest open ancestor, so that no symbolic link is ever followed that was put in the way meanwhile.

    A context manager: leaving it closes all.
    """

    OPEN = 128  # descriptors at most, but for two on the way down
    NEAR = 16  # of a long way down, how many directories stay open: a walk that climbs back up needs them next
    MARKS = 16  # of a longer way, how many more stay open, far between: the next way begins at one of them, and not at the top

    def __init__(self) -> None:
        self._open: OrderedDict[Directory, None] = OrderedDict()
        self._held: set[Directory] = set()
        self._marked: set[Directory] = set()
        self._marks: dict[Directory, list[Directory]] = {}  # of each top, the higher before the deeper

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for directory in list(self._open):
            self.close(directory)

    def open(self, name: str, parent: int | None) -> int:
        """A new descriptor of the directory ``name`` in the one open as ``parent``, without a parent of a path; what is mounted
        at a name inside is not entered.  Raises OSError."""
        return inside.open_top(name) if parent is None else inside.open_directory(name, parent)

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
        marks, stride = self._marks_of(above or way[-1], len(way)) if len(way) > 2 * self.NEAR else ([], 0)
        fd, passing = (above.fd, False) if above is not None else (None, False)
        while way:
            step = way.pop()
            try:
                opened = self.open(step.name, fd)
            except OSError as error:
                if step.parent is not None and error.errno in _VANISHED:
                    return -1
                raise
            finally:
                if passing:
                    os.close(fd)  # type: ignore[arg-type]
            is_mark = stride > 0 and len(way) >= self.NEAR and len(way) % stride == 0
            fd, passing = opened, len(way) >= self.NEAR and not is_mark
            if not passing:
                step.fd = fd
                step.is_nodev = None
                self._open[step] = None
                if is_mark:
                    marks.append(step)
                    self._marked.add(step)
                if len(self._open) > max(self.OPEN, len(self._held) + len(self._marked) + 2):
                    self.close(next(each for each in self._open if each not in self._held and each not in self._marked))
        return directory.fd

    def is_nodev(self, directory: Directory) -> bool:
        """Whether no device can be opened in ``directory``, whose descriptor was got just now: so its mount says."""
        if directory.is_nodev is None:
            directory.is_nodev = bool(os.fstatvfs(directory.fd).f_flag & os.ST_NODEV)
        return directory.is_nodev

    def _marks_of(self, above: Directory, steps: int) -> tuple[list[Directory], int]:
        """The marks on the way down to ``above``, to which others can be added, and how far between: each so many of ``steps``,
        0 for none.  Other marks below the same top are closed."""
        nearest = above
        while nearest not in self._marked and nearest.parent is not None:
            nearest = nearest.parent
        top = nearest
        while top.parent is not None:
            top = top.parent
        marks = self._marks.setdefault(top, [])
        while marks and marks[-1] is not nearest:
            self.close(marks.pop())
        return marks, 0 if len(self._marked) > self.OPEN // 2 else max(steps // self.MARKS, self.NEAR)

    def hold(self, directory: Directory) -> None:
        """Keep the descriptor of ``directory`` open until ``let_go``; of few directories at a time."""
        self._held.add(directory)

    def let_go(self, directory: Directory) -> None:
        """Close the descriptor of ``directory`` as any other's, when its turn comes."""
        self._held.discard(directory)

    def close(self, directory: Directory) -> None:
        """Close the descriptor of ``directory``, which its user needs no more for now."""
        if directory.fd >= 0:
            del self._open[directory]
            self._held.discard(directory)
            self._marked.discard(directory)
            os.close(directory.fd)
            directory.fd = -1


class Entering(Descriptors):
    """Directories, with what is mounted on them."""

    def open(self, name: str, parent: int | None) -> int:
        return os.open(name, inside.FLAGS, dir_fd=parent)


def path_of(directory: Directory) -> str:
    """Its path, from the first on that has one."""
    names = [directory.name]
    while (above := directory.parent) is not None:
        directory = above
        names.append(directory.name)
    return "/".join(reversed(names))
