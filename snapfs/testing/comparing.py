"""What a test changed in its copy: the lines of ``changes``, also where the copy is no overlay."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from snapfs.scan.changes import escaped
from snapfs.scan.walk import Descriptors, Directory
from snapfs.testing.copying import Entering


def compared(base: str, copy: str) -> list[str]:
    """What the whole copy ``copy`` has other than ``base``, as ``snapfs/scan/changes.py`` tells it of a layer: lines, each with
    its newline.  A file that was written counts as changed, whatever was written, for its time is another."""
    if not os.path.isdir(copy) or os.path.islink(copy):
        return ["D /\n"]
    top = ["C /\n"] if _state(os.lstat(base)) != _state(os.lstat(copy)) else []
    with Entering() as of_base, Entering() as of_copy:
        return [*top, *_compared(_Side(Directory(base), of_base), _Side(Directory(copy), of_copy), "/")]


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
        try:
            fd = self._open()
            if fd < 0:
                return {}
            with os.scandir(fd) as entries:
                return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        except PermissionError:  # this user may not look into it
            return {}

    def read_link(self, name: str) -> str:
        return os.readlink(name, dir_fd=self._open())

    def _open(self) -> int:
        return -1 if self._directory is None else self._descriptors.get(self._directory)


def _compared(base: _Side, copy: _Side, path: str) -> Iterator[str]:
    before, after = base.listed(), copy.listed()
    for name in sorted({*before, *after}, key=os.fsencode):
        old, new = before.get(name), after.get(name)
        text = path + escaped(name)
        if new is None:
            yield f"D {text}\n"
            continue
        if old is None:
            yield f"A {text}\n"
        elif _state(old) != _state(new) or (stat.S_ISLNK(new.st_mode) and base.read_link(name) != copy.read_link(name)):
            yield f"C {text}\n"
        if stat.S_ISDIR(new.st_mode):
            below = old is not None and stat.S_ISDIR(old.st_mode)
            yield from _compared(base.below(name) if below else base.none(), copy.below(name), f"{text}/")


def _state(status: os.stat_result) -> tuple[int, ...]:
    own = (status.st_mode, status.st_uid, status.st_gid)
    return own if stat.S_ISDIR(status.st_mode) else (*own, status.st_size, status.st_mtime_ns, status.st_rdev)
