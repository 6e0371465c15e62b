"""Open files: what a process reads from and writes to, whatever becomes of the node that it opened."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial

from snapfs.errors import InvalidArgument, NotPermitted
from snapfs.threads import in_thread
from snapfs.tree.texts import OVERHEAD, Text

BLOCK = 4096
"""Bytes of the smallest buffer that a shell's echo, and stdio, has for these files: what is no longer is written at once."""


class Pieces:
    """What is written through one open file.  A text that is longer than a buffer comes in pieces, and the last one, though it
    be a newline alone, also where the first was refused: that is not to be taken for a text of its own."""

    def __init__(self) -> None:
        self._refused: Callable[[], InvalidArgument] | None = None

    def begin_anew(self) -> None:
        """What comes next is no rest, for the file was emptied."""
        self._refused = None

    @contextmanager
    def one(self, data: bytes) -> Iterator[None]:
        """For a block that takes ``data``, and raises InvalidArgument where that can't be.  Raises the same where ``data`` is
        the rest of what was refused so."""
        if self._refused is not None:
            raise self._refused()
        try:
            yield
        except InvalidArgument as error:
            if len(data) >= BLOCK and not data.endswith(b"\n"):
                again = "what follows may be the rest of it, so open the file anew"
                self._refused = partial(type(error), f"{error}; {again}", public=f"{error.public}; {again}")
            raise


class Handle:
    """An open file.

    ``direct``: what it holds is its own, or grows, so that no cache of the file's pages may come between.  ``weight``: bytes of
    memory that it takes at most, besides ``text``, which other handles may have too.  ``waits_for``: what ``write`` waits for,
    in a word, if that may take long.  ``does``: the file to which it writes, if that does something at once, so that who writes
    there too has to wait.
    """

    direct = False
    weight = OVERHEAD
    text: Text | None = None
    waits_for: str | None = None
    does: Hashable = None

    @property
    def size(self) -> int:
        """Bytes that reading it to the end gives."""
        raise NotImplementedError

    @property
    def blocks(self) -> bool:
        """Whether reading may wait for the disk, so that it is ``fetch`` that reads."""
        return False

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``; fewer at the end alone."""
        raise NotImplementedError

    async def fetch(self, offset: int, size: int) -> bytes | memoryview:
        """``read``, in a worker thread; what it gives may change as soon as something else is awaited."""
        return await in_thread(self.read, offset, size)

    async def write(self, offset: int, data: bytes) -> int:
        """Write ``data`` at ``offset``; how many bytes of it were taken.  Raises SnapshotError."""
        raise NotPermitted("the file was opened for reading only")

    async def resize(self, size: int) -> None:
        """Cut the file, or lengthen it with zeros, to ``size`` bytes.  Raises SnapshotError."""
        raise NotPermitted("the file was opened for reading only")

    async def close(self) -> None:
        """The last descriptor of this open is gone."""


class OpenText(Handle):
    """A file open for reading: one consistent text, settled when it was opened."""

    text: Text

    def __init__(self, text: Text) -> None:
        self.text = text

    @property
    def size(self) -> int:
        return self.text.size

    @property
    def blocks(self) -> bool:
        return self.text.blocks

    def read(self, offset: int, size: int) -> bytes:
        return self.text.read(offset, size)
