"""Texts: what a file held at one moment.  Whoever has it open reads that, whatever the file holds by now."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterable
from tempfile import SpooledTemporaryFile

MOST = 8 << 20  # bytes of texts that are remembered
IN_MEMORY = 1 << 20  # bytes of one text that is made line by line; longer ones go to the disk


class Text:
    """A text in memory.  ``size`` is in bytes, ``checksum`` its CRC-32, ``weight`` the bytes of memory that it takes."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = self.weight = len(content)
        self.checksum = zlib.crc32(content)

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]


class LongText(Text):
    """A text made from many lines, which need not fit into memory: beyond IN_MEMORY it is a nameless file in ``directory``.

    Making it blocks on the disk: do that in a worker thread.  Raises OSError where the disk is full.
    """

    def __init__(self, lines: Iterable[str], directory: str) -> None:
        super().__init__(b"")
        self._file = SpooledTemporaryFile(IN_MEMORY, dir=directory)  # noqa: SIM115 - closed with the text, by whoever is the last
        for line in lines:
            encoded = line.encode()
            self._file.write(encoded)
            self.size += len(encoded)
            self.checksum = zlib.crc32(encoded, self.checksum)
        self.weight = min(self.size, IN_MEMORY)

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


class Versions:
    """The texts that were told of lately, by inode, so that whoever has looked up a file can open what was found.  Bounded:
    the one that was used longest ago goes first."""

    def __init__(self) -> None:
        self._texts: OrderedDict[int, Text] = OrderedDict()
        self._weight = 0

    def keep(self, inode: int, text: Text) -> None:
        before = self._texts.pop(inode, None)
        self._texts[inode] = text
        self._weight += text.weight - (before.weight if before else 0)
        while self._weight > MOST and len(self._texts) > 1:
            _, oldest = self._texts.popitem(last=False)
            self._weight -= oldest.weight

    def get(self, inode: int) -> Text | None:
        """The text of ``inode``, if it is still remembered."""
        text = self._texts.get(inode)
        if text is not None:
            self._texts.move_to_end(inode)
        return text
