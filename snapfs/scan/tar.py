"""Headers of tar archives, as POSIX says them (pax): the bytes before each file.

What fits stands in the header of 512 bytes that every tar reads (ustar): paths of ASCII that can be cut into 155 and 100 bytes,
numbers of seven octal digits (eleven for sizes and times).  All else is said again, whole, in an extended header before it, as
Go's and GNU's tar do; that says of paths that are not UTF-8 that they are mere bytes (``hdrcharset``).  Users and groups are
numbers alone, times whole seconds.  The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from zlib import adler32

BLOCK = 512
END = bytes(2 * BLOCK)
"""What stands behind the last file."""

REGULAR, HARD_LINK, LINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
"""Kinds of entries (POSIX: typeflag)."""

_NAME, _PREFIX = 100, 155  # bytes of a path that have room in a header: the last part, and what is before it
_ID, _LARGE = 0o7777777, 0o77777777777  # what has room there of a number
_MAGIC = b"ustar\x0000" + bytes(64)  # and nobody's names
_NO_DEVICE = b"0000000\x000000000\x00"
_SPACES = 8 * 32  # the checksum is made with blanks in its place
_EXTENDED = b"x"
_ASCII = bytes(byte if byte < 128 else ord("_") for byte in range(256))


def header(
    path: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    mtime: int,
    *,
    size: int = 0,
    target: bytes = b"",
    device: tuple[int, int] | None = None,
    attributes: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """What stands before the ``size`` bytes of the entry ``path`` (a directory's ends in a slash): 512 bytes, or more of them
    with an extended header.  ``target`` is where a link leads, or the path of the entry of which a hard link is another name;
    ``device`` its major and minor number; ``mtime`` in seconds since the epoch."""
    is_short = len(path) <= _NAME and path.isascii() and not target and not attributes
    if is_short and 0 <= mtime <= _LARGE and size <= _LARGE and uid <= _ID and gid <= _ID:  # as most are
        return _ustar(path, kind, mode, uid, gid, size, mtime, b"", device, b"")
    extended: dict[bytes, bytes] = {}
    name, prefix = path, b""
    if not path.isascii():
        extended[b"path"] = path
        name = _plain(path)
    elif len(path) > _NAME:
        prefix, name = _cut(path)
        if not name:
            extended[b"path"] = path
            prefix, name = b"", path[:_NAME]
    if target and (len(target) > _NAME or not target.isascii()):
        extended[b"linkpath"] = target
        target = _plain(target)
    if uid > _ID:
        extended[b"uid"], uid = b"%d" % uid, 0
    if gid > _ID:
        extended[b"gid"], gid = b"%d" % gid, 0
    if size > _LARGE:
        extended[b"size"], size = b"%d" % size, 0
    if not 0 <= mtime <= _LARGE:
        extended[b"mtime"], mtime = b"%d" % mtime, 0
    if attributes:
        for key, value in attributes.items():
            extended[b"SCHILY.xattr." + key.replace(b"%", b"%25").replace(b"=", b"%3D")] = value
    if not (_is_text(path) and _is_text(extended.get(b"linkpath", b""))):
        extended[b"hdrcharset"] = b"BINARY"
    own = _ustar(name, kind, mode, uid, gid, size, mtime, target, device, prefix)
    return _extension(path, extended) + own if extended else own


def _is_text(path: bytes) -> bool:
    """Whether ``path`` is UTF-8, as POSIX has all of an extended header be, unless that says that paths are mere bytes."""
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def padding(size: int) -> int:
    """How many zeros follow ``size`` bytes of a file."""
    return -size % BLOCK


def _plain(path: bytes) -> bytes:
    """What stands in a header of a path that has no place there, for who reads no extended headers."""
    return path[:_NAME].translate(_ASCII)


def _cut(path: bytes) -> tuple[bytes, bytes]:
    """``path`` in the two parts that have room in a header; two empty ones where there is no such place."""
    slash = path.rfind(b"/", 0, min(_PREFIX + 1, len(path) - 1))
    if slash <= 0 or len(path) - slash - 1 > _NAME:
        return b"", b""
    return path[:slash], path[slash + 1 :]


def _extension(path: bytes, records: Mapping[bytes, bytes]) -> bytes:
    """The extended header with these ``records``, as an entry of its own."""
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    above, _, last = path.rstrip(b"/").rpartition(b"/")
    name = _plain(b"PaxHeaders.0/" + last if not above else above + b"/PaxHeaders.0/" + last)
    return _ustar(name, _EXTENDED, 0, 0, 0, len(body), 0, b"", None, b"") + body + bytes(padding(len(body)))


def _record(key: bytes, value: bytes) -> bytes:
    """``key`` and ``value`` behind the length of all that, which counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _ustar(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    target: bytes,
    device: tuple[int, int] | None,
    prefix: bytes,
) -> bytes:
    """One header of 512 bytes; all that is in it is ASCII."""
    head = b"%b%b%011o\0%011o\0" % (name.ljust(_NAME, b"\0"), _owned(mode, uid, gid), size, mtime)
    tail, total = _tail(kind, target, device, prefix)
    # the sum of all bytes, which is too small for adler32 to have wrapped around
    return b"%b%06o\0 %b" % (head, total + (adler32(head) & 0xFFFF) - 1, tail)


@lru_cache(1024)  # most files have the mode and the owner of another
def _owned(mode: int, uid: int, gid: int) -> bytes:
    return b"%07o\0%07o\0%07o\0" % (mode, uid, gid)


@lru_cache(64)
def _tail(kind: bytes, target: bytes, device: tuple[int, int] | None, prefix: bytes) -> tuple[bytes, int]:
    """What stands behind the checksum, and what that and the blanks in the place of the checksum add to it."""
    devices = b"%07o\0%07o\0" % device if device is not None else _NO_DEVICE
    tail = b"%b%b%b%b%b" % (kind, target.ljust(_NAME, b"\0"), _MAGIC, devices, prefix.ljust(_PREFIX + 12, b"\0"))
    return tail, sum(tail) + _SPACES
