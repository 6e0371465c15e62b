"""The archive of which a layer was made, as far as the layer's files don't have it: so that it can leave as it came.

``layer.tar``, what snapfs itself makes of a layer, is written in one way, and images that others have made name their layers by
what archives hash to that were written in another.  So an import keeps all of an archive but the contents of files, in the file
ORIGINAL beside the layer, in ROOT/snapshots/<id>, some tens of bytes a file: a line of facts (JSON, filled up to HEADER bytes),
and, packed by zlib, rows.  Each has the lengths of bytes of the archive and of a path, and how many bytes of the file at that
path follow in the archive; then those bytes, and the path.

An export takes the contents from ``layer.tar``.  What comes of it is right where it has the hash that the facts say, and is
thrown away where it has another: something may have written in the layer.

The idea is that of tar-split, which Docker has.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

from snapfs.images.tarreader import FILE, HARD_LINK, LONGEST, Piece, Stream, TarReader
from snapfs.images.unfit import Unfit

ORIGINAL = "original"
HEADER = 512
MOST = 128 << 20
"""Bytes that are kept of one archive, at most: of an archive that would take more nothing is kept."""

_ROW = struct.Struct("<IIQ")
_PART = 64 << 10  # bytes that are packed together
_PACKED = 256 << 10  # bytes that are read at once
_PIECE = 1 << 20
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIFF_ID, _BLOB, _SIZE, _HOW = "diff_id", "blob", "size", "compression"


class Differs(Exception):
    """The layer, or what was kept, is no longer what it was: the archive can't be had."""


class Blob(NamedTuple):
    """The file that held the archive: its digest, its size in bytes, and how it was compressed (a key of MEDIA_TYPES)."""

    digest: str
    size: int
    compression: str


class Recording(Stream):
    """A stream of which everything is kept that is not told to be in a file, in the file ORIGINAL of the directory open as
    ``place``.  ``size`` are the bytes that it takes."""

    def __init__(self, pieces: Iterator[bytes], place: int) -> None:
        super().__init__(pieces)
        self.size = HEADER
        self._place = place
        self._fd = os.open(ORIGINAL, _NEW, 0o600, dir_fd=place)
        os.lseek(self._fd, HEADER, os.SEEK_SET)
        self._packer = zlib.compressobj(1)
        self._rows: list[bytes] = []  # that are not packed yet
        self._rows_length = 0
        self._kept: list[bytes] = []  # that are in no row yet
        self._kept_length = 0

    def close(self) -> None:
        """Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def take(self, count: int) -> bytes:
        found = super().take(count)
        self._keep(found)
        return found

    def skip(self, count: int) -> bool:
        if self._fd < 0:
            return super().skip(count)
        for piece in self.pieces(count):
            count -= len(piece)
            self._keep(piece)
        return not count

    def drain(self) -> None:
        while self.take(_PART):
            pass

    def in_file(self, path: bytes, size: int) -> None:
        """The last ``size`` bytes are what the file at ``path`` holds."""
        if self._fd >= 0 and size:
            self._add_row(path, size)

    def give_up(self) -> None:
        """Keep nothing of this archive: it can't be had from the layer."""
        if self._fd >= 0:
            os.unlink(ORIGINAL, dir_fd=self._place)
            self.close()
            self.size = 0
            for some in (self._rows, self._kept):
                some.clear()

    def finish(self, diff_id: str, blob: Blob | None) -> None:
        """All has come: that is what it hashes to, and what held it, if that is known.  Raises OSError."""
        if not diff_id.startswith("sha256:"):  # what an export writes has no other hash to be known by
            self.give_up()
        self._add_row(b"", 0)
        self._pack()
        self._write(self._packer.flush())
        if self._fd < 0:
            return
        facts = {_DIFF_ID: diff_id, _SIZE: self.taken, _BLOB: None if blob is None else blob._asdict()}
        os.pwrite(self._fd, json.dumps(facts).encode().ljust(HEADER - 1) + b"\n", 0)
        self.close()

    def _keep(self, piece: Piece) -> None:
        if self._fd >= 0:
            self._kept.append(bytes(piece))
            self._kept_length += len(piece)
            if self._kept_length >= _PART:
                self._add_row(b"", 0)

    def _add_row(self, path: bytes, size: int) -> None:
        self._rows += (_ROW.pack(self._kept_length, len(path), size), *self._kept, path)
        self._rows_length += _ROW.size + self._kept_length + len(path)
        self._kept.clear()
        self._kept_length = 0
        if self._rows_length >= _PART:
            self._pack()

    def _pack(self) -> None:
        self._write(self._packer.compress(b"".join(self._rows)))
        self._rows.clear()
        self._rows_length = 0

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            return
        if self.size + len(data) > MOST:
            self.give_up()
            return
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]
        self.size += len(data)


Read = Callable[[int, int], bytes]
"""So many bytes of ``layer.tar`` from an offset on; fewer at the end alone."""


class Original:
    """What was kept of the archive of a layer.  ``diff_id`` is what that hashes to, ``size`` are its bytes, ``blob`` is what it
    came in, where that is known."""

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        """Raises ValueError, KeyError, TypeError where the ``facts`` are none."""
        self.diff_id = str(facts[_DIFF_ID])
        self.size = int(facts[_SIZE])
        told = facts[_BLOB]
        self.blob = None if told is None else Blob(str(told["digest"]), int(told[_SIZE]), str(told[_HOW]))
        self._path = path

    @classmethod
    def find(cls, directory: str) -> Original | None:
        """That of the layer in ROOT/snapshots/<id>, the ``directory``; None where there is none, or none that may be read."""
        path = f"{directory}/{ORIGINAL}"
        with suppress(OSError, ValueError, KeyError, TypeError), _opened(path) as file:
            return cls(path, json.loads(file.read(HEADER)))
        return None

    def pieces(self, read: Read, size: int) -> Iterator[bytes]:
        """The archive, in pieces; the contents of files are in the ``layer.tar`` of ``size`` bytes.  Raises Differs, and what
        ``read`` raises."""
        files, waiting, length = _Files(read, size), list[bytes](), 0
        for kept, path, count in _rows(self._path):
            waiting.append(kept)
            length += len(kept)
            for piece in files.content(path, count) if path else ():
                waiting.append(piece)
                length += len(piece)
                if length >= _PIECE:
                    yield b"".join(waiting)
                    waiting, length = [], 0
        if waiting:
            yield b"".join(waiting)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The regular file at ``path``, for a block.  Raises OSError, ValueError where it is anything else."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(path)
        yield file


def _rows(path: str) -> Iterator[tuple[bytes, bytes, int]]:
    """Bytes of the archive, the path of a file, and how many bytes of that follow.  Raises Differs."""
    try:
        with _opened(path) as file:
            file.seek(HEADER)
            unpacked = _Unpacked(file)
            while row := unpacked.take(_ROW.size, may_end=True):
                kept, length, count = _ROW.unpack(row)
                if kept > 2 * MOST or length > LONGEST:
                    raise Differs("what was kept of its archive is damaged")
                yield unpacked.take(kept), unpacked.take(length), count
    except (OSError, ValueError, zlib.error) as error:
        raise Differs("what was kept of its archive can't be read") from error


class _Unpacked:
    """What is packed in the rest of ``file``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._unpacker = zlib.decompressobj()
        self._data = b""
        self._at = 0

    def take(self, count: int, *, may_end: bool = False) -> bytes:
        """The next ``count`` bytes; none at the end, if that ``may_end``.  Raises Differs, OSError, zlib.error."""
        while len(self._data) - self._at < count:
            more = self._more()
            if not more:
                if may_end and self._unpacker.eof and self._at == len(self._data):
                    return b""
                raise Differs("what was kept of its archive is cut off")
            self._data, self._at = self._data[self._at :] + more, 0
        self._at += count
        return self._data[self._at - count : self._at]

    def _more(self) -> bytes:
        while not self._unpacker.eof:
            packed = self._unpacker.unconsumed_tail or self._file.read(_PACKED)
            found = self._unpacker.decompress(packed, _PIECE)
            if found or not packed:
                return found
        return b""


class _Files:
    """The contents of the files in a ``layer.tar``, each of which is wanted once; mostly in their order."""

    def __init__(self, read: Read, size: int) -> None:
        self._stream = _Ahead(read, size)
        self._reader = TarReader(self._stream)
        self._passed: dict[bytes, tuple[int, int]] = {}  # offset and size of what was not wanted yet
        self._links: dict[bytes, bytes] = {}

    def content(self, path: bytes, size: int) -> Iterator[bytes]:
        """The ``size`` bytes of the file at ``path``.  Raises Differs."""
        here, there_are = self._find(path)
        if there_are != size:
            raise Differs("a file of the layer has become longer or shorter")
        while size:
            piece = self._stream.at(here, min(size, _PIECE))
            yield piece
            here, size = here + len(piece), size - len(piece)

    def _find(self, path: bytes) -> tuple[int, int]:
        while True:
            found = self._passed.pop(self._links.get(path, path), None)
            if found is not None:
                return found
            try:
                entry = self._reader.next()
            except Unfit as unfit:
                raise Differs(str(unfit)) from None
            if entry is None:
                raise Differs("a file of the layer is gone")
            if entry.kind is FILE:
                if entry.size:
                    self._passed[entry.name] = self._stream.taken, entry.size
            elif entry.kind is HARD_LINK:
                self._links[entry.name] = entry.target


class _Ahead(Stream):
    """An archive of ``size`` bytes, of which large pieces are read where it is read on."""

    def __init__(self, read: Read, size: int) -> None:
        super().__init__(iter(()))
        self._read = read
        self._size = size
        self._here = 0
        self._begin = 0  # of what is at hand
        self._data = b""

    @property
    def taken(self) -> int:
        return self._here

    def take(self, count: int) -> bytes:
        if not self._has(self._here, count):
            self._fill(self._here)
        begin = self._here - self._begin
        found = self._data[begin : begin + count]
        self._here += len(found)
        return found

    def skip(self, count: int) -> bool:
        self._here += count
        return self._here <= self._size

    def at(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on.  Raises Differs where there are fewer."""
        if not self._has(offset, count):
            if not self._begin <= offset <= self._begin + len(self._data):
                return self._all(offset, count)
            self._fill(offset)
        begin = offset - self._begin
        found = self._data[begin : begin + count]
        return found if len(found) == count else found + self._all(offset + len(found), count - len(found))

    def _has(self, offset: int, count: int) -> bool:
        return self._begin <= offset and offset + count <= self._begin + len(self._data)

    def _fill(self, offset: int) -> None:
        self._begin, self._data = offset, self._read(offset, min(_PIECE, max(self._size - offset, 0)))

    def _all(self, offset: int, count: int) -> bytes:
        found = self._read(offset, count)
        while len(found) < count:
            more = self._read(offset + len(found), count - len(found))
            if not more:
                raise Differs("the layer has become shorter")
            found += more
        return found
