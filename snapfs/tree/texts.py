"""Texts: what a file held at one moment.  A process that has it open reads that, whatever the file holds by now."""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import BinaryIO

MOST = 8 << 20  # bytes of texts that are remembered
OVERHEAD = 1000  # bytes that a text takes besides its content, or an open file
ON_DISK = 16  # bytes on the disk that weigh as much as one in memory
LINES = 500  # that are taken at once, at most
AT_ONCE = 64 << 10  # bytes; where lines take more, fewer of them are
SHARE, SPARE = 0.1, 0.1  # of the time, and seconds at once, that making the daemon's own texts may take
IN_MEMORY = 1 << 20  # bytes of one text that is made line by line; a longer one goes to the disk


class Text:
    """A text in memory.  ``size`` is in bytes, ``checksum`` its CRC-32, ``weight`` what keeping it costs, in bytes of memory,
    ``made`` when that was (ns since the epoch).

    ``blocks``: reading may wait for the disk.
    """

    blocks = False

    def __init__(self, content: bytes) -> None:
        self.made = time.time_ns()
        self._content = content
        self.size = len(content)
        self.weight = OVERHEAD + self.size
        self.checksum = zlib.crc32(content)

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]


class LongText(Text):
    """A text made from many lines, which need not fit into memory: beyond IN_MEMORY it is a nameless file in ``directory``,
    until nobody needs the text any more.

    Making it blocks on the disk: do that in a worker thread.  Raises OSError where the disk is full.
    """

    def __init__(self, lines: Iterable[str], directory: str) -> None:
        self._file: BinaryIO | None = None
        self.made = time.time_ns()
        self.size = self.checksum = 0
        buffer = bytearray()
        try:
            some, count = iter(lines), 1
            while part := "".join(islice(some, count)):
                count = min(2 * count, LINES) if len(part) < AT_ONCE else max(count // 2, 1)
                buffer += part.encode()
                if len(buffer) > IN_MEMORY:
                    if self._file is None:
                        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
                    self._note(buffer)
                    _write(self._file, buffer)
                    buffer.clear()
            self._note(buffer)
            if self._file is None:
                self._content = bytes(buffer)
            else:
                _write(self._file, buffer)
                self.blocks = True
        except BaseException:
            if self._file is not None:
                self._file.close()  # now, and not when nobody looks at the traceback any more
            raise
        if self._file is None:
            self.weight = OVERHEAD + self.size
        else:
            self.weight = self.weigh(self.size)

    @staticmethod
    def weigh(size: int) -> int:
        """The weight of so many bytes on the disk, with their descriptor: two such texts can be remembered, however long."""
        return min(max(IN_MEMORY // 2, size // ON_DISK), MOST // 3)

    def _note(self, part: bytearray) -> None:
        self.size += len(part)
        self.checksum = zlib.crc32(part, self.checksum)

    def read(self, offset: int, size: int) -> bytes:
        if self._file is None:
            return super().read(offset, size)
        return os.pread(self._file.fileno(), size, offset)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def _write(file: BinaryIO, data: bytearray) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


class Sparing:
    """Texts about the daemon that are another at each moment, since each request counts.  They are made anew for each that
    asks, but for no more than SHARE of the time: in a flood all get the same for some moments."""

    def __init__(self) -> None:
        self._last: dict[str, Text] = {}
        self._left = SPARE
        self._when = 0.0

    def text(self, path: str, make: Callable[[], Text]) -> Text:
        """That of the file at ``path``, which ``make`` makes."""
        now = time.monotonic()
        self._left = min(SPARE, self._left + (now - self._when) * SHARE)
        self._when = now
        if self._left <= 0 and path in self._last:
            return self._last[path]
        text = self._last[path] = make()
        self._left -= time.monotonic() - now
        return text


class Versions:
    """The texts that were looked up lately, by inode, so that a process that has looked up a file can open what was found.
    Together they weigh MOST at most: the text that was used longest ago goes first."""

    def __init__(self) -> None:
        self._texts: OrderedDict[int, Text] = OrderedDict()
        self._weight = 0

    def keep(self, inode: int, text: Text) -> None:
        """Remember ``text`` as that of ``inode``, in place of any other."""
        self.forget(inode)
        self._texts[inode] = text
        self._weight += text.weight
        while self._weight > MOST:
            self.forget(next(iter(self._texts)))

    def forget(self, inode: int) -> None:
        """Remember no text of ``inode``."""
        text = self._texts.pop(inode, None)
        self._weight -= text.weight if text else 0

    def get(self, inode: int) -> Text | None:
        """The text of ``inode``, if it is still remembered."""
        text = self._texts.get(inode)
        if text is not None:
            self._texts.move_to_end(inode)
        return text
