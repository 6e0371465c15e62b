"""What the layers below one show: the directories and files that it takes up again (``scan/marks.py``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from snapfs.scan.marks import DIRECTORY, OTHER, WHITEOUT, LayerDirectory, Marks
from snapfs.scan.walk import Descriptors

_MOST = 4096  # directories that are remembered


class Lower:
    """The ``layers``, by their paths, the nearest first, as an overlay shows them whose own attributes begin with ``prefix``.
    A context manager.  Its methods raise OSError where the disk fails."""

    def __init__(self, layers: Sequence[str], prefix: str) -> None:
        self._descriptors = Descriptors()
        self._marks = Marks(self._descriptors, prefix, lambda: None, alone=False)
        self._tops = [LayerDirectory(path, None, nth == len(layers) - 1) for nth, path in enumerate(layers)]
        self._are_read = False
        self._known: dict[bytes, list[LayerDirectory]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._descriptors.__exit__(kind, error, traceback)

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory ``path`` (b"": the top), the nearest where several are merged, valid until the next
        call; -1 where there is none."""
        found = self._merged(path) if path else self._tops[:1]
        return self._descriptors.get(found[0]) if found else -1

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
        for directory in self._merged(above):
            kind = self._marks.kind(directory, text)
            if kind is not None:
                return directory, kind
        return None

    def _merged(self, path: bytes) -> list[LayerDirectory]:
        """The directories that are merged at ``path``."""
        if not path:
            return self._all_tops()
        known = self._known.get(path)
        if known is None:
            above, _, name = path.rpartition(b"/")
            parents = self._merged(above)
            known = self._marks.merged(os.fsdecode(name), parents)[0] if parents else []
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[path] = known
        return known

    def _all_tops(self) -> list[LayerDirectory]:
        if not self._are_read:
            self._are_read = True
            for nth, top in enumerate(self._tops):
                if self._marks.read(top):  # nothing below is shown
                    del self._tops[nth + 1 :]
                    break
        return self._tops
