"""What an archive of a layer says, entry by entry: ustar, PAX, GNU's long names, big numbers and sparse files.

Nothing is made here, and no name is looked up.  What is no such archive, contradicts itself, or is out of range is refused
(Unfit); memory is bounded by the longest piece of the stream and by MOST_TEXT.  Where formats leave a choice it is read as
containerd does, with Go's archive/tar: another reader of the same bytes must not see other files.

Sources: POSIX.1-2017, pax; GNU tar's manual, "Tar Internals"; Go's archive/tar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from snapfs.images.unfit import Unfit
from snapfs.names import printable, shown

BLOCK = 512
MOST_TEXT = 1 << 20
"""Bytes that a long name, or the records of one entry, may take."""
MOST_HOLES = 1 << 16
"""Pieces that a sparse file may have: a fragmented one of gigabytes has some thousand."""
LONGEST = 4095
"""Bytes of a path, or of where a link leads: the kernel takes no more."""

FILE: Final = "file"
HARD_LINK: Final = "hard link"
LINK: Final = "symbolic link"
CHARACTER: Final = "character device"
BLOCK_DEVICE: Final = "block device"
DIRECTORY: Final = "directory"
FIFO: Final = "FIFO"

_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,  # one that was to lie in one piece
    b"S": FILE,  # GNU's sparse one
    b"1": HARD_LINK,
    b"2": LINK,
    b"3": CHARACTER,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}
_MOST = (1 << 63) - 1
_MOST_ID = (1 << 32) - 2  # the highest number is no user's
_MAJORS, _MINORS = 1 << 12, 1 << 20
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_NUMBER = re.compile(rb"[0-9]{1,19}")
_MOMENT = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]{0,40}))?")
_BILLION = 1_000_000_000

Piece = bytes | memoryview


class Span(NamedTuple):
    """``length`` bytes of a sparse file, from ``start`` on."""

    start: int
    length: int


class Entry:
    """One entry.  ``name``: as the archive has it; ``target``: where a link leads, of either kind; ``size``: bytes that follow
    in the archive; ``length``: of the file; ``spans``: where those bytes go in a sparse file, else None; times are ns since the
    epoch, none of them negative, ``read`` (atime) is never before ``modified``; ``attributes``: the extended ones."""

    __slots__ = (
        *("attributes", "gid", "kind", "length", "major", "minor", "mode", "modified", "name", "read", "size", "spans"),
        *("target", "uid"),
    )

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = b""
        self.target = b""
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.size = 0
        self.length = 0
        self.modified = 0
        self.read = 0
        self.major = 0
        self.minor = 0
        self.spans: list[Span] | None = None
        self.attributes: dict[str, bytes] = {}


class Stream:
    """Bytes in their order, of ``pieces`` of any length; ``taken`` are how many were taken."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._at = 0
        self._before = 0

    @property
    def taken(self) -> int:
        return self._before + self._at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer at the end."""
        end = self._at + count
        if end <= len(self._piece):
            found = self._piece[self._at : end]
            self._at = end
            return found
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[Piece]:
        """The next ``count`` bytes, in pieces; fewer at the end."""
        while count:
            left = len(self._piece) - self._at
            if not left:
                if not self._next():
                    return
                continue
            if self._at == 0 and left <= count:
                self._at = left
                count -= left
                yield self._piece
                continue
            step = min(left, count)
            start = self._at
            self._at += step
            count -= step
            yield memoryview(self._piece)[start : start + step]

    def skip(self, count: int) -> bool:
        """Leave ``count`` bytes out; whether there were so many."""
        while count:
            step = min(len(self._piece) - self._at, count)
            self._at += step
            count -= step
            if count and not self._next():
                return False
        return True

    def drain(self) -> None:
        """Leave out all that is left."""
        while self._next():
            pass

    def _next(self) -> bool:
        self._before += len(self._piece)
        self._at = 0
        self._piece = next(self._pieces, b"")
        while not self._piece:
            found = next(self._pieces, None)
            if found is None:
                return False
            self._piece = found
        return True


class TarReader:
    """The entries of the archive in ``stream``.  ``has_end``: whether the blocks that mark its end have come.

    The methods raise Unfit, and what the stream raises."""

    def __init__(self, stream: Stream) -> None:
        self.has_end = False
        self._stream = stream
        self._left = 0  # bytes of the entry's data that were not taken, and what fills its last block
        self._padding = 0

    def next(self) -> Entry | None:
        """The next entry; None behind the last."""
        records: dict[bytes, bytes] = {}
        long_name = long_target = b""
        while True:
            self._leave()
            block = self._stream.take(BLOCK)
            if len(block) < BLOCK:
                if block and self._stream.taken == len(block):
                    raise Unfit(f"the archive is cut off, or none: there are {len(block)} bytes of it")
                if block:
                    raise Unfit("the archive is cut off in the middle of an entry's header")
                return None
            if block[0] == 0 and not block.strip(b"\0"):
                second = self._stream.take(BLOCK)
                if second.strip(b"\0"):
                    raise Unfit("in the archive stands something behind an empty block, which marks its end")
                self.has_end = True
                return None
            _check_sum(block)
            flag = block[156:157]
            if flag == b"x":
                records = _records(self._text(block, "an entry's records"))
            elif flag == b"g":
                self._expect(_size(block))  # of all that follow: what there is in them containerd ignores, too
            elif flag == b"L":
                long_name = self._text(block, "a name").partition(b"\0")[0]
            elif flag == b"K":
                long_target = self._text(block, "where a link leads").partition(b"\0")[0]
            elif flag == b"V":  # the archive's own name
                self._expect(_size(block))
            else:
                return self._entry(block, flag, records, long_name, long_target)

    def data(self, entry: Entry) -> Iterator[tuple[int, Piece]]:
        """The bytes of the ``entry`` that came last, in pieces, each with where it goes in the file."""
        spans = [Span(0, entry.size)] if entry.spans is None else entry.spans
        for here, length in spans:
            for piece in self._stream.pieces(length):
                self._left -= len(piece)
                yield here, piece
                here += len(piece)
        if self._left:
            raise Unfit("the archive is cut off in the middle of a file")

    # -- how far the stream is

    def _expect(self, size: int) -> None:
        self._left = size
        self._padding = -size % BLOCK

    def _leave(self) -> None:
        """Leave out what is left of the entry before."""
        count = self._left + self._padding
        self._left = self._padding = 0
        if count and not self._stream.skip(count):
            raise Unfit("the archive is cut off in the middle of a file")

    def _text(self, block: bytes, what: str) -> bytes:
        size = _size(block)
        if size > MOST_TEXT:
            raise Unfit(f"{what} in the archive takes {size} bytes: more than {MOST_TEXT} are not read")
        self._expect(size)
        text = self._stream.take(size)
        self._left = 0
        if len(text) < size:
            raise Unfit("the archive is cut off in the middle of an entry's header")
        return text

    # -- one entry

    def _entry(self, block: bytes, flag: bytes, records: dict[bytes, bytes], name: bytes, target: bytes) -> Entry:
        kind = _KINDS.get(flag)
        if kind is None:
            raise Unfit(f'the archive has an entry of the unknown kind "{printable(flag.decode("latin-1"))}"')
        entry = Entry(kind)
        _read_header(entry, block)
        size = _size(block) if b"size" not in records else _number_in(records, b"size")
        if records:
            _read_records(entry, records)
        entry.name = name or entry.name
        entry.target = target or entry.target
        if kind is FILE and entry.name.endswith(b"/") and flag != b"S":  # as archives older than ustar have it
            kind = entry.kind = DIRECTORY
        entry.size = entry.length = size if kind is FILE else 0
        self._expect(entry.size)
        if flag == b"S":
            self._read_old_spans(entry, block)
        elif kind is FILE and records:
            self._read_spans(entry, records)
        if len(entry.name) > LONGEST or len(entry.target) > LONGEST:
            raise Unfit(f"the archive has a name of more than {LONGEST} bytes, which the kernel doesn't take")
        if b"\0" in entry.name or b"\0" in entry.target:
            raise Unfit("the archive has a name with a NUL in it")
        entry.modified = entry.modified if 0 <= entry.modified <= _MOST else 0  # as containerd bounds them
        entry.read = entry.read if entry.modified <= entry.read <= _MOST else entry.modified
        if not (0 <= entry.uid <= _MOST_ID and 0 <= entry.gid <= _MOST_ID):
            raise Unfit(f"{_of(entry)} belongs to user {entry.uid} and group {entry.gid}: there are no such numbers")
        if kind in (CHARACTER, BLOCK_DEVICE) and not (0 <= entry.major < _MAJORS and 0 <= entry.minor < _MINORS):
            raise Unfit(f"{_of(entry)} is the device {entry.major}:{entry.minor}: there are no such numbers")
        return entry

    def _read_old_spans(self, entry: Entry, block: bytes) -> None:
        """What GNU's own format says of a sparse file, in the header and the blocks behind it."""
        if block[257:265] != b"ustar  \0":
            raise Unfit(f"{_of(entry)} is a sparse file in no format of GNU's")
        size, entry.length = entry.size, _number(block[483:495])
        spans = _old_spans(block, 386, 4)
        more = block[482]
        while more:
            block = self._stream.take(BLOCK)
            if len(block) < BLOCK:
                raise Unfit("the archive is cut off in the middle of an entry's header")
            spans += _old_spans(block, 0, 21)
            more = block[504]
            _refuse_many(entry, len(spans))
        self._set_spans(entry, spans, size)

    def _read_spans(self, entry: Entry, records: dict[bytes, bytes]) -> None:
        """What PAX records say of a sparse file (GNU tar's versions 0.0, 0.1 and 1.0)."""
        major, minor = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
        if (major, minor) == (b"1", b"0"):
            numbers, taken = self._numbers(entry)
        elif b"GNU.sparse.map" in records and major in (b"", b"0"):
            text, taken = records[b"GNU.sparse.map"], 0
            numbers = [_decimal(each) for each in text.split(b",")] if text else []
            if _number_in(records, b"GNU.sparse.numblocks") * 2 != len(numbers):
                raise Unfit(f"{_of(entry)} is a sparse file with a map of another length than it says")
        elif major or minor:
            raise Unfit(f"{_of(entry)} is a sparse file of an unknown version")
        else:
            return
        name = records.get(b"GNU.sparse.name")
        entry.name = name or entry.name
        for key in (b"GNU.sparse.realsize", b"GNU.sparse.size"):
            if key in records:
                entry.length = _number_in(records, key)
        _refuse_many(entry, len(numbers) // 2)
        spans = [Span(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
        self._set_spans(entry, spans, entry.size - taken)

    def _numbers(self, entry: Entry) -> tuple[list[int], int]:
        """The map at the begin of a sparse file's data: its numbers, one a line, and how many bytes it takes."""
        text, lines, numbers, wanted = b"", 0, [-1], 1
        while lines < wanted:
            if self._left < BLOCK or len(text) > MOST_TEXT:
                raise Unfit(f"{_of(entry)} is a sparse file with a map that does not end")
            block = self._stream.take(BLOCK)
            if len(block) < BLOCK:
                raise Unfit("the archive is cut off in the middle of a file")
            self._left -= BLOCK
            text += block
            lines += block.count(b"\n")
            if numbers[0] < 0 and lines:
                numbers[0] = _decimal(text.partition(b"\n")[0])
                _refuse_many(entry, numbers[0])
                wanted = 2 * numbers[0] + 1
        words = text.split(b"\n", wanted)[:wanted]
        return [_decimal(word) for word in words[1:]], len(text)

    def _set_spans(self, entry: Entry, spans: list[Span], size: int) -> None:
        """Give ``entry``, of whose data ``size`` bytes are its contents, these ``spans``, if they make sense."""
        here = 0
        for start, length in spans:
            if start < here or start + length > entry.length:
                raise Unfit(f"{_of(entry)} is a sparse file whose pieces lie over each other, or beyond its end")
            here = start + length
        if sum(length for _, length in spans) != size:
            raise Unfit(f"{_of(entry)} is a sparse file whose pieces are not as long as its data")
        entry.size, entry.spans = size, spans


def _check_sum(block: bytes) -> None:
    try:
        stored = _number(block[148:156])
    except Unfit:
        stored = -1
    plain = sum(block) - sum(block[148:156]) + 8 * 32
    if stored == plain:
        return
    others = block[:148] + block[156:]
    if stored != plain - 256 * sum(byte > 127 for byte in others):  # as some old programs count
        raise Unfit("the archive is damaged, or none: the check sum of an entry's header is wrong")


def _read_header(entry: Entry, block: bytes) -> None:
    entry.name = block[:100].partition(b"\0")[0]
    entry.target = block[157:257].partition(b"\0")[0]
    entry.mode = _number(block[100:108]) & 0o7777
    entry.uid, entry.gid = _number(block[108:116]), _number(block[116:124])
    entry.modified = _number(block[136:148], negative=True) * _BILLION
    magic = block[257:265]
    if magic[:5] != b"ustar":
        return
    if entry.kind in (CHARACTER, BLOCK_DEVICE):
        entry.major, entry.minor = _number(block[329:337]), _number(block[337:345])
    if magic == b"ustar  \0":  # GNU's, which has no prefix
        if block[345]:
            entry.read = _number(block[345:357], negative=True) * _BILLION
        return
    prefix = block[345 : 476 if block[508:512] == b"tar\0" else 500].partition(b"\0")[0]  # the former is star's
    if prefix:
        entry.name = prefix + b"/" + entry.name


def _read_records(entry: Entry, records: dict[bytes, bytes]) -> None:
    entry.name = records.get(b"path") or entry.name
    entry.target = records.get(b"linkpath") or entry.target
    for key, value in records.items():
        if key == b"uid":
            entry.uid = _decimal(value)
        elif key == b"gid":
            entry.gid = _decimal(value)
        elif key == b"mtime":
            entry.modified = _moment(value)
        elif key == b"atime":
            entry.read = _moment(value)
        elif key.startswith(_XATTR):
            entry.attributes[_attribute_name(key)] = value


def _attribute_name(key: bytes) -> str:
    name = key.removeprefix(_XATTR).replace(b"%3D", b"=").replace(b"%25", b"%")  # as GNU tar writes them, too
    if not name or len(name) > 255 or b"\0" in name:
        raise Unfit("the archive has an extended attribute with no name that there can be")
    return name.decode(errors="surrogateescape")


def _records(text: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header, ``LENGTH KEY=VALUE\\n`` each; of several with one key the last, but of GNU's first sparse
    format, which repeats keys, a map as its second has it.  One without a value takes what came before away."""
    found: dict[bytes, bytes] = {}
    spans: list[bytes] = []
    here = 0
    while here < len(text):
        space = text.find(b" ", here, here + 20)
        digits = text[here:space] if space > 0 else b""
        end = here + int(digits) if _NUMBER.fullmatch(digits) else 0
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(text) or text[end - 1 : end] != b"\n" or not equals or not key or b"\0" in key:
            raise Unfit("the archive is damaged: an entry's records are none")
        here = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.numbytes") != len(spans) % 2 or b"," in value:
                raise Unfit("the archive is damaged: the map of a sparse file is none")
            spans.append(value)
            continue
        if value:
            found[key] = value
        else:
            found.pop(key, None)
            if key.startswith(_XATTR):
                found[key] = value  # an attribute may be empty
    if spans:
        found[b"GNU.sparse.map"] = b",".join(spans)
    return found


def _old_spans(block: bytes, start: int, count: int) -> list[Span]:
    found = []
    for here in range(start, start + 24 * count, 24):
        if not block[here]:
            break
        found.append(Span(_number(block[here : here + 12]), _number(block[here + 12 : here + 24])))
    return found


def _refuse_many(entry: Entry, count: int) -> None:
    if count > MOST_HOLES:
        raise Unfit(f"{_of(entry)} is a sparse file of more than {MOST_HOLES} pieces")


def _size(block: bytes) -> int:
    return _number(block[124:136])


def _number(field: bytes, *, negative: bool = False) -> int:
    """The number in a header's field: octal digits, or, where that begins with its highest bit, binary ones (GNU's)."""
    if field[0] & 0x80:
        found = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            found -= 1 << (8 * len(field) - 1)
        if not (-_MOST if negative else 0) <= found <= _MOST:
            raise Unfit("a number in the archive is out of range")
        return found
    text = field.strip(b" \0").partition(b"\0")[0]
    if not text:
        return 0
    try:
        if text.isdigit():
            return int(text, 8)
    except ValueError:
        pass
    raise Unfit("the archive is damaged, or none: a number in it is none")


def _decimal(text: bytes) -> int:
    if not _NUMBER.fullmatch(text) or (found := int(text)) > _MOST:
        raise Unfit("the archive is damaged: a number in an entry's records is none, or out of range")
    return found


def _number_in(records: dict[bytes, bytes], key: bytes) -> int:
    return _decimal(records.get(key, b""))


def _moment(text: bytes) -> int:
    """The nanoseconds since the epoch of a time in seconds, with a fraction."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        raise Unfit("the archive is damaged: a time in an entry's records is none, or out of range")
    moment = int(found[2]) * _BILLION + int((found[3] or b"")[:9].ljust(9, b"0"))
    return -moment if found[1] else moment


def _of(entry: Entry) -> str:
    return shown(entry.name[:200].decode(errors="surrogateescape"))
