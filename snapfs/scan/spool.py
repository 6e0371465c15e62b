"""Sorting more entries of directories than are to be in memory: they wait in a nameless file."""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from typing import BinaryIO

Entry = tuple[bytes, bytes]
"""What is sorted: a name, and a mark that tells entries of one name apart.  Neither has a NUL."""

RUN = 20_000  # entries that are sorted at once
MERGED = 1 << 20  # bytes of all runs that are read ahead, fewer where others are half read; of each at least so many:
_CHUNK = 512


class Spool:
    """A nameless file in ``directory`` (None: where temporary files are), made when it is needed.  ``close`` it.

    What is sorted last must be read to its end, or given up, first: the file ends there then.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._end = 0
        self._half_read = 0  # how many are being given

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def in_order(self, entries: Iterable[Entry]) -> Generator[Entry, None, None]:
        """All ``entries``, sorted; they are read before the first is given.  Raises OSError where the disk is full."""
        begin, runs = self._end, list[tuple[int, int]]()
        some = iter(entries)
        while part := sorted(islice(some, RUN)):
            runs.append(self._write(part))
        self._half_read += 1
        try:
            chunk = max(_CHUNK, MERGED // max(1, len(runs)) // self._half_read // 8)  # some eight bytes of memory for each
            yield from heapq.merge(*(self._read(*run, chunk) for run in runs))
        finally:
            self._half_read -= 1
        if self._file is not None:
            self._end = begin
            self._file.truncate(begin)

    def _write(self, part: list[Entry]) -> tuple[int, int]:
        """Append ``part``; from where to where it is."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        begin = self._end
        left = memoryview(b"\0".join(chain.from_iterable(part)) + b"\0")
        while left:
            written = os.pwrite(self._file.fileno(), left, self._end)
            self._end += written
            left = left[written:]
        return begin, self._end

    def _read(self, begin: int, end: int, size: int) -> Iterator[Entry]:
        rest = b""
        while begin < end and self._file is not None:
            chunk = os.pread(self._file.fileno(), min(size, end - begin), begin)
            begin += len(chunk)
            parts = (rest + chunk).split(b"\0")
            whole = (len(parts) - 1) // 2 * 2
            rest = b"\0".join(parts[whole:])
            yield from zip(parts[:whole:2], parts[1:whole:2], strict=True)
