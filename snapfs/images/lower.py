"""What the layers below one show: the directories and files that it takes up again (``scan/marks.py``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from snapfs.scan.marks import DIRECTORY, OTHER, WHITEOUT, LayerDirectory, Marks
from snapfs.scan.walk import Descriptors

_MOST = 4096  # directories that are remembered


class _Way(NamedTuple):
    """A directory of one layer, None where that has none; ``ends``: it, or one above it, hides what is below."""

    directory: LayerDirectory | None
    ends: bool


class Lower:
    """The ``layers``, by their paths, the nearest first, as an overlay shows them whose own attributes begin with ``prefix``.
    They are asked one after the other: the first mostly knows.  A context manager.  Its methods raise OSError where the disk
    fails."""

    def __init__(self, layers: Sequence[str], prefix: str) -> None:
        self._descriptors = Descriptors()
        self._marks = Marks(self._descriptors, prefix, lambda: None, alone=False)
        self._tops = [LayerDirectory(path, None, nth == len(layers) - 1) for nth, path in enumerate(layers)]
        self._known: dict[tuple[int, bytes], _Way] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._descriptors.__exit__(kind, error, traceback)

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory ``path`` (b"": the top), the nearest where several are merged, valid until the next
        call; -1 where there is none."""
        if not path:
            return self._descriptors.get(self._tops[0]) if self._tops else -1
        found = self._find(path)
        if found is None or found[1] != DIRECTORY:
            return -1
        above = found[0]
        return self._descriptors.get(LayerDirectory(os.fsdecode(path.rpartition(b"/")[2]), above, above.lowest))

    def file(self, path: bytes) -> tuple[int, str] | None:
        """What is at ``path`` and no directory: a descriptor of the directory that holds it, valid until the next call, and its
        name there; None where there is no such thing."""
        found = self._find(path)
        if found is None or found[1] != OTHER:
            return None
        return self._descriptors.get(found[0]), os.fsdecode(path.rpartition(b"/")[2])

    def is_directory(self, path: bytes) -> bool:
        found = self._find(path)
        return found is not None and found[1] == DIRECTORY

    def has(self, path: bytes) -> bool:
        """Whether there is anything at ``path``."""
        found = self._find(path)
        return found is not None and found[1] != WHITEOUT

    def _find(self, path: bytes) -> tuple[LayerDirectory, int] | None:
        """The nearest directory with an entry for ``path``, and what that is."""
        above, _, name = path.rpartition(b"/")
        text = os.fsdecode(name)
        for nth in range(len(self._tops)):
            way = self._way(nth, above)
            if way.directory is not None:
                kind = self._marks.kind(way.directory, text)
                if kind is not None:
                    return way.directory, kind
            if way.ends:
                return None
        return None

    def _way(self, nth: int, path: bytes) -> _Way:
        """The directory ``path`` of layer ``nth``."""
        known = self._known.get((nth, path))
        if known is None:
            known = self._found(nth, path)
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[nth, path] = known
        return known

    def _found(self, nth: int, path: bytes) -> _Way:
        directory, ends = self._tops[nth], bool(self._marks.read(self._tops[nth]))
        for name in map(os.fsdecode, path.split(b"/") if path else ()):
            below = LayerDirectory(name, directory, directory.lowest)
            hides = self._marks.read(below)
            if hides is None:
                return _Way(None, ends or self._marks.kind(directory, name) is not None)
            directory, ends = below, ends or hides or below.redirected
        return _Way(directory, ends)
