"""Texts: what a file held at one moment.  A process that has it open reads that, whatever the file holds by now."""

from __future__ import annotations

import errno
import os
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import BinaryIO
from weakref import WeakValueDictionary

from snapfs.errors import Unavailable

MOST = 8 << 20  # bytes of texts that are remembered
OVERHEAD = 1000  # bytes that a text takes besides its content, or an open file
MOST_ON_DISK = 32 << 20  # bytes of those that are on the disk
PART = 10  # a text of what is in layers takes one in so many of the bytes that are free on the disk, at most
ON_DISK = 16  # bytes on the disk that weigh as much as one in memory
LINES = 500  # that are taken at once, at most
AT_ONCE = 64 << 10  # bytes; where lines take more, fewer of them are
SHARE, SPARE = 0.1, 0.1  # of the time, and seconds at once, that making the daemon's own texts may take
IN_MEMORY = 1 << 20  # bytes of one text that is made line by line; a longer one goes to the disk


class Text:
    """A text in memory.  ``size`` is in bytes, ``checksum`` its CRC-32, ``weight`` what keeping it costs, in bytes of memory,
    ``made`` when that was (ns since the epoch).

    ``blocks``: reading may wait for the disk.  ``on_disk``: how many bytes it takes there, if there is no
    other bound to them.
    """

    blocks = False
    on_disk = 0

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

    Making it blocks on the disk: do that in a worker thread.  Raises OSError where the disk is full; and where ``is_bounded``,
    Unavailable (EFBIG) where the file would take more than a PART of what is free without it.
    """

    def __init__(self, lines: Iterable[str], directory: str, *, is_bounded: bool = False) -> None:
        self._file: BinaryIO | None = None
        self.made = time.time_ns()
        self.size = self.checksum = 0
        buffer = bytearray()
        try:
            some, count = iter(lines), 1
            while part := "".join(islice(some, count)):
                count = min(2 * count, LINES) if len(part) < AT_ONCE else max(count // 2, 1)
                buffer += part.encode(errors="surrogateescape")
                if len(buffer) > IN_MEMORY:
                    if self._file is None:
                        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
                    if is_bounded:
                        _refuse_too_long(self._file, self.size, len(buffer))
                    self._note(buffer)
                    _write(self._file, buffer)
                    buffer.clear()
            self._note(buffer)
            if self._file is None:
                self._content = bytes(buffer)
            else:
                _write(self._file, buffer)
                self.blocks = True
                self.on_disk = self.size if is_bounded else 0
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
        """The weight of so many bytes on the disk, with their descriptor: two such texts can be open, however long."""
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


def _refuse_too_long(file: BinaryIO, size: int, more: int) -> None:
    """Raise Unavailable where ``file``, which has ``size`` bytes, would be too long with so many ``more``."""
    disk = os.fstatvfs(file.fileno())
    free = disk.f_bavail * disk.f_frsize + size
    if (size + more) * PART > free:
        raise Unavailable(
            f"the text is longer than a tenth of the {free >> 20:,} MiB that are free on ROOT's disk: make room there, or ask "
            "for some paths alone (snapfs diff)",
            errno.EFBIG,
        )


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
    Together they weigh MOST at most, and take MOST_ON_DISK: the text that was used longest ago goes first.  One that has gone
    for the sake of the disk is still found as long as somebody has it."""

    def __init__(self) -> None:
        self._texts: OrderedDict[int, Text] = OrderedDict()
        self._had: WeakValueDictionary[int, Text] = WeakValueDictionary()  # those on the disk
        self._weight = self._on_disk = 0

    def keep(self, inode: int, text: Text) -> None:
        """Remember ``text`` as that of ``inode``, in place of any other."""
        self.forget(inode)
        self._texts[inode] = text
        self._weight += text.weight
        self._on_disk += text.on_disk
        while self._weight > MOST or self._on_disk > MOST_ON_DISK:
            self._drop(next(iter(self._texts)))
        if text.on_disk:
            self._had[inode] = text

    def forget(self, inode: int) -> None:
        """Remember no text of ``inode``."""
        self._had.pop(inode, None)
        self._drop(inode)

    def _drop(self, inode: int) -> None:
        text = self._texts.pop(inode, None)
        if text is not None:
            self._weight -= text.weight
            self._on_disk -= text.on_disk

    def get(self, inode: int) -> Text | None:
        """The text of ``inode``, if it is still remembered."""
        text = self._texts.get(inode)
        if text is None:
            return self._had.get(inode)
        self._texts.move_to_end(inode)
        return text
