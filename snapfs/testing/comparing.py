"""What a test changed in its copy: the lines of ``changes``, also where the copy is no overlay."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from snapfs.scan.changes import escaped
from snapfs.scan.walk import Descriptors, Directory, Entering


def compared(base: str, copy: str) -> Iterator[str]:
    """What the whole copy ``copy`` has other than ``base``, as ``snapfs/scan/changes.py`` tells it of a layer: lines, each with
    its newline.  A file that was written counts as changed, whatever was written, for its time is another.

    However deep the directories are, they cost no more than a few descriptors."""
    if not os.path.isdir(copy) or os.path.islink(copy):
        yield "D /\n"
        return
    if _state(os.lstat(base)) != _state(os.lstat(copy)):
        yield "C /\n"
    with Entering() as of_base, Entering() as of_copy:
        yield from _compared(_Side(Directory(base), of_base), _Side(Directory(copy), of_copy))


class _Side:
    """A directory of the base, or of the copy, opened by descriptors: what tests have given to another user may be exchanged by
    links.  Where it can't be opened, or is none any more, it is taken for empty."""

    def __init__(self, directory: Directory | None, descriptors: Descriptors) -> None:
        self._directory = directory
        self._descriptors = descriptors

    def below(self, name: str) -> _Side:
        return _Side(Directory(name, self._directory), self._descriptors)

    def none(self) -> _Side:
        return _Side(None, self._descriptors)

    def listed(self) -> dict[str, os.stat_result]:
        """What is in it, by name."""
        found = {}
        with suppress(PermissionError):  # this user may not look into it
            fd = self._open()
            if fd >= 0:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError):
                            found[entry.name] = entry.stat(follow_symlinks=False)
        return found

    def target_of(self, name: str) -> str | None:
        """Where the link ``name`` leads; None where it is none any more."""
        try:
            return os.readlink(name, dir_fd=self._open())
        except OSError:
            return None

    def close(self) -> None:
        if self._directory is not None:
            self._descriptors.close(self._directory)

    def _open(self) -> int:
        return -1 if self._directory is None else self._descriptors.get(self._directory)


class _Level:
    """A directory on the way down: what is to be told of its entries, in order, and how long its path is, with its slash."""

    def __init__(self, base: _Side, copy: _Side, length: int) -> None:
        self.base = base
        self.copy = copy
        self.length = length
        self.items = iter(list(_differing(base, copy)))


def _compared(base: _Side, copy: _Side) -> Iterator[str]:
    path = "/"
    way = [_Level(base, copy, 1)]
    while way:
        level = way[-1]
        path = path[: level.length]
        for name, verb, below in level.items:
            shown = escaped(name)
            if verb:
                yield f"{verb} {path}{shown}\n"
            if below is not None:
                path = f"{path}{shown}/"
                inside = level.base.below(name) if below else level.base.none()
                way.append(_Level(inside, level.copy.below(name), len(path)))
                break
        else:
            way.pop()
            level.base.close()
            level.copy.close()


def _differing(base: _Side, copy: _Side) -> Iterator[tuple[str, str, bool | None]]:
    """The entries of a directory of which there is something to be told: the name, the letter ("" for none), and for a
    directory, whether the base has one, too, to be compared with it."""
    before, after = base.listed(), copy.listed()
    for name in sorted({*before, *after}, key=os.fsencode):
        old, new = before.get(name), after.get(name)
        if new is None:
            yield name, "D", None
            continue
        verb = ""
        if old is None:
            verb = "A"
        elif _state(old) != _state(new) or (stat.S_ISLNK(new.st_mode) and base.target_of(name) != copy.target_of(name)):
            verb = "C"
        is_directory = stat.S_ISDIR(new.st_mode)
        if verb or is_directory:
            yield name, verb, (old is not None and stat.S_ISDIR(old.st_mode)) if is_directory else None


def _state(status: os.stat_result) -> tuple[int, ...]:
    own = (status.st_mode, status.st_uid, status.st_gid)
    return own if stat.S_ISDIR(status.st_mode) else (*own, status.st_size, status.st_mtime_ns, status.st_rdev)
