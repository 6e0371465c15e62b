"""Archives that are compressed: found out by their first bytes, and read in bounded pieces; and compressing layers.

gzip is ``isal``'s where that is installed, several times as fast as zlib's; zstd that of ``zstandard``, or from Python 3.14
on of the standard library.  The same layer gives the same bytes by the same version of the same library; what is in it has a
digest of its own, which no compression changes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from snapfs.images.unfit import Unfit

Read = Callable[[int], bytes]
"""Reads so many bytes at most; none at the end."""

PIECE = 512 << 10
"""Bytes, unpacked, of a piece; the last of each is shorter."""

_PACKED = 256 << 10
_LEAST = 512  # of these that are tried at first
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPED = b"\x2a\x4d\x18"  # of a frame that zstd leaves out; the byte before is 0x50 to 0x5f
_OTHERS = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x5d\0\0": "lzma", b"LZIP": "lzip", b"\x04\x22\x4d\x18": "lz4"}


LEVEL, ZLIB_LEVEL, ZSTD_LEVEL = 2, 6, 3  # isal has 0 to 3
_WITH_HEADER = 16 + zlib.MAX_WBITS  # of gzip, without a time or a name

_LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_TYPES = {"none": _LAYER, "gzip": f"{_LAYER}+gzip", "zstd": f"{_LAYER}+zstd"}
"""Of a layer, by how it is compressed."""


def unpacked(read: Read) -> Iterator[bytes]:
    """What ``read`` gives, unpacked if it is packed, in pieces.  Raises Unfit, and what ``read`` raises."""
    first = b""
    while len(first) < 6 and (more := read(_PACKED)):
        first += more
    for begin, name in _OTHERS.items():
        if first.startswith(begin):
            raise Unfit(f"it is packed by {name}, which layers never are: unpack it first, or pack it by gzip or zstd")
    return {"gzip": _by_gzip, "zstd": _by_zstd, "none": _plain}[packed_by(first)](first, read)


def packed_by(first: bytes) -> str:
    """How what begins with these bytes is compressed, a key of MEDIA_TYPES."""
    if first.startswith(_GZIP):
        return "gzip"
    return "zstd" if first.startswith(_ZSTD) or (first[1:4] == _SKIPPED and first[0] >> 4 == 5) else "none"


def _plain(first: bytes, read: Read) -> Iterator[bytes]:
    while first:
        yield first
        first = read(PIECE)


def _library(*names: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _by_gzip(packed: bytes, read: Read) -> Iterator[bytes]:
    """One member, or several; of a small one little is tried at first, since what comes behind it is copied each time."""
    library = _library("isal.isal_zlib") or zlib
    damaged = (zlib.error, getattr(library, "error", zlib.error), EOFError)
    at = 0  # in ``packed``
    while at < len(packed):
        member, size, part = library.decompressobj(31), _LEAST, b""
        while not member.eof:
            if not part:
                if at == len(packed):
                    at, packed = 0, read(_PACKED)
                if not packed:
                    raise Unfit("it is cut off: its compression does not end")
                part = packed[at : at + size]
                at, size = at + len(part), min(2 * size, _PACKED)
            try:
                piece = member.decompress(part, PIECE)
            except damaged as error:
                raise Unfit(f"it is damaged: {error}") from None
            part = member.unconsumed_tail
            if piece:
                yield piece
        at -= len(member.unused_data)
        if at == len(packed):
            at, packed = 0, read(_PACKED)
        while packed and not packed[at] and not packed[at:].strip(b"\0"):  # a tape's last block
            at, packed = 0, read(_PACKED)


def _by_zstd(packed: bytes, read: Read) -> Iterator[bytes]:
    zstandard = _library("zstandard")
    if zstandard is not None:
        source = _Source(packed, read)
        reader = zstandard.ZstdDecompressor().stream_reader(source, read_size=_PACKED, read_across_frames=True)
        damaged, take = zstandard.ZstdError, reader.read
    else:
        zstd = _library("compression.zstd")
        if zstd is None:
            raise Unfit("it is packed by zstd, which takes the Python package zstandard: pip install zstandard")
        damaged, take = zstd.ZstdError, zstd.ZstdFile(_Source(packed, read)).read
    while True:
        try:
            piece = take(PIECE)
        except (damaged, EOFError) as error:
            raise Unfit(f"it is damaged, or cut off: {error}") from None
        if not piece:
            return
        yield piece


class _Source:
    """A file, to a library that wants one."""

    def __init__(self, first: bytes, read: Read) -> None:
        self._first = first
        self._read = read

    def read(self, count: int = -1) -> bytes:
        if self._first:
            found, self._first = self._first[:count], self._first[count:]
            return found
        return self._read(count)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class Compressor(Protocol):
    """As zlib's: what is to be written of the data so far, and of the rest."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(how: str) -> Compressor:
    """A new one for ``how``, a key of MEDIA_TYPES.  Raises Unfit."""
    made: Compressor
    if how == "none":
        return _Plain()
    if how == "gzip":
        isal = _library("isal.isal_zlib")
        if isal is None:
            return zlib.compressobj(ZLIB_LEVEL, zlib.DEFLATED, _WITH_HEADER)
        made = isal.compressobj(LEVEL, isal.DEFLATED, _WITH_HEADER)
        return made
    zstandard, zstd = _library("zstandard"), _library("compression.zstd")
    if zstandard is not None:
        made = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    elif zstd is not None:
        made = zstd.ZstdCompressor(level=ZSTD_LEVEL)
    else:
        raise Unfit("zstd takes the Python package zstandard (pip install zstandard); gzip takes none")
    return made
