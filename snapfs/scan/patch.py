"""What differs between two chains of layers, as a patch that ``git apply`` takes: git's extended format.

It tells what git knows of: regular files, whether their owner may execute them, and symbolic links.  It has nothing of empty
directories, FIFOs, sockets and devices, of owners, times and attributes, and nothing for which git refuses a patch as a whole:
what is called ``.git``, or as some disks call that, links called ``.gitmodules``, and paths beyond LONGEST.
A file that another kind of file replaces is deleted and made anew.

Of files above LARGEST, and of those with a NUL, it says only that they differ, unless it is ``binary``; then of those above
LARGEST_BINARY.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import zlib
from base64 import b85encode
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain

from snapfs.errors import FailedPrecondition
from snapfs.names import printable
from snapfs.scan.copying import VANISHED, open_regular
from snapfs.scan.differing import READ, Difference, Shown, differences, hold_the_same
from snapfs.scan.marks import PREFIX, present
from snapfs.scan.matching import runs
from snapfs.scan.spool import Spool
from snapfs.scan.walk import Descriptors

LARGEST = 1 << 20  # bytes of a file that is compared by lines
LARGEST_BINARY = 100 << 20
LONGEST = 4095  # bytes of a path
CONTEXT = 3  # lines around what has changed
_PIECE = 8 << 10  # characters that are given at once

_EXECUTABLE, _REGULAR, _LINK = b"100755", b"100644", b"120000"
_NO_ID = b"0" * 40
_NO_NEWLINE = b"\n\\ No newline at end of file\n"
_QUOTED = re.compile(rb'[\x00-\x1f"\\\x7f-\xff]')
_REFUSED = re.compile(rb"(?:^|[/\\])(?:\.git|git~1)[ .]*(?:$|[/\\:])", re.IGNORECASE)  # whatever a disk takes for .git
_REFUSED_LINK = re.compile(
    rb"(?:^|[/\\])(?:\.gitmodules|gitmod~[1-4]|g?i?7?e?b?a?~[1-9][0-9]*)[ .]*(?:$|[/\\:])", re.IGNORECASE
)
_AT_ONCE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_KIND, _MAY_EXECUTE = 0o170000, 0o100
_ESCAPES = {7: b"a", 8: b"b", 9: b"t", 10: b"n", 11: b"v", 12: b"f", 13: b"r", 34: b'"', 92: b"\\"}


def patch(
    old: Sequence[str],
    new: Sequence[str],
    *,
    prefix: str = PREFIX,
    checkpoint: Callable[[], None] = lambda: None,
    spool: str | None = None,
    paths: Iterable[bytes] = (),
    binary: bool = False,
) -> Generator[str, None, None]:
    """What makes of a tree like that of the layers ``old`` one like that of ``new``: text in pieces of up to some kilobytes, in
    which bytes that are not UTF-8 are surrogates.  Only of ``paths`` (from the root on) and what is in them, if there are any.

    Takes and raises what ``scan/changes.py`` does, and FailedPrecondition where a layer was written in an overlay with
    redirects or metacopy.  Has no more than two files in memory, of LARGEST each; opens none that isn't regular.
    """
    with Descriptors() as descriptors, closing(Spool(spool)) as waiting:
        for found in differences(old, new, descriptors, waiting, prefix, checkpoint, paths, enters=_may_have_parts):
            if found.old is not None and found.new is not None and found.old.regular and found.new.regular:
                checkpoint()
                if _is_plainly_the_same(descriptors, found.old, found.new, found.name):
                    continue  # as most are that were opened for writing
            if not _may_have_parts(found):
                continue
            with ExitStack() as opened:
                try:
                    before, after = (_file(descriptors, side, found.name, opened) for side in (found.old, found.new))
                except OSError as error:
                    if error.errno in VANISHED:
                        continue
                    raise
                if _REFUSED_LINK.search(found.path):
                    before, after = (None if side is not None and side.mode == _LINK else side for side in (before, after))
                is_same = before is not None and after is not None and _holds_the_same(before, after, checkpoint)
                if is_same and before.mode == after.mode:  # type: ignore[union-attr]
                    continue
                for file in (before, after):
                    if file is not None and file.fd >= 0:
                        refuse_metacopy(file.fd, found.name, prefix)
                yield from _pieces(_compared(found.path, before, after, is_same, binary, checkpoint))


def _may_have_parts(found: Difference) -> bool:
    """Whether git takes a patch of it, or of what is in it."""
    return len(found.path) <= LONGEST and not _REFUSED.search(found.path)


def _is_plainly_the_same(descriptors: Descriptors, old: Shown, new: Shown, name: str) -> bool:
    """Whether both sides have the same file, and no more had to be done to see it than to read both once.  False says nothing:
    it may be large, have vanished, be another kind of file by now, or be where opening a device could do something."""
    for side in (old, new):
        if side.parent is None or descriptors.get(side.parent) < 0 or not descriptors.is_nodev(side.parent):
            return False
    try:
        before = os.open(name, _AT_ONCE, dir_fd=old.parent.fd)  # type: ignore[union-attr]
        try:
            after = os.open(name, _AT_ONCE, dir_fd=new.parent.fd)  # type: ignore[union-attr]
            try:
                status, other = os.fstat(before), os.fstat(after)
                size = status.st_size
                if size != other.st_size or size > LARGEST or (status.st_mode ^ other.st_mode) & (_KIND | _MAY_EXECUTE):
                    return False
                if status.st_ino == other.st_ino and status.st_dev == other.st_dev:
                    return True
                data = os.read(before, size + 1)  # that there are fewer says that it is the end
                return len(data) == size and data == os.read(after, size + 1) and stat.S_ISREG(status.st_mode)
            finally:
                os.close(after)
        finally:
            os.close(before)
    except OSError:
        return False


def refuse_metacopy(fd: int, name: str, prefix: str) -> None:
    """Raise FailedPrecondition where the file ``name``, open as ``fd``, holds nothing of what the overlay shows."""
    if present(fd, [f"{prefix}metacopy"]):
        raise metacopied(name)


def metacopied(name: str) -> FailedPrecondition:
    """That the file ``name`` holds nothing of what the overlay shows."""
    what = "was changed in an overlay with metacopy=on: its data is in another layer"
    return FailedPrecondition(f'"{printable(name)}" {what}', public=f"a file {what}")


class _File:
    """A file or link as git has it: ``data`` is None where it is too large to be in memory.  A file is open as ``fd``."""

    __slots__ = ("data", "fd", "identity", "mode", "size")

    def __init__(self, mode: bytes, data: bytes | None, fd: int, status: os.stat_result) -> None:
        self.mode = mode
        self.data = data
        self.fd = fd
        self.identity = status.st_dev, status.st_ino
        self.size = status.st_size if data is None else len(data)

    @property
    def is_text(self) -> bool:
        return self.data is not None and b"\0" not in self.data

    def parts(self, checkpoint: Callable[[], None]) -> Iterator[bytes]:
        """Its bytes, ``size`` of them.  Raises OSError where it has become shorter."""
        if self.data is not None:
            yield self.data
            return
        here = 0
        while here < self.size:
            checkpoint()
            part = os.pread(self.fd, min(READ, self.size - here), here)
            if not part:
                raise OSError(errno.EAGAIN, "A file became shorter while it was read")
            here += len(part)
            yield part

    def id(self, checkpoint: Callable[[], None]) -> bytes:
        """That of git's blob."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for part in self.parts(checkpoint):
            digest.update(part)
        return digest.hexdigest().encode()


def _file(descriptors: Descriptors, side: Shown | None, name: str, opened: ExitStack) -> _File | None:
    """The file that is shown there, if it is one that git knows; what it needs open, ``opened`` closes.  Raises OSError, also
    where it has vanished."""
    if side is None or side.parent is None:
        return None
    directory = descriptors.get(side.parent)
    if directory < 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return _File(_LINK, os.fsencode(os.readlink(name, dir_fd=directory)), -1, status)
    if not stat.S_ISREG(status.st_mode):
        return None
    fd = open_regular(name, directory)
    opened.callback(os.close, fd)
    status = os.fstat(fd)
    data = _read(fd, status.st_size) if status.st_size <= LARGEST else None
    return _File(_EXECUTABLE if status.st_mode & 0o100 else _REGULAR, data, fd, status)


def _read(fd: int, size: int) -> bytes | None:
    """All that the file has, ``size`` bytes a moment ago; None where it has become too much."""
    data = b""
    wanted = size + 1  # that there are fewer says that it is the end
    while len(data) <= LARGEST:
        part = os.pread(fd, wanted, len(data))
        data += part
        if len(part) < wanted:
            return data
        wanted = LARGEST + 1 - len(data)
    return None


def _compared(
    path: bytes, old: _File | None, new: _File | None, is_same: bool, binary: bool, checkpoint: Callable[[], None]
) -> Iterator[bytes]:
    """The part of a patch that is about one path; ``is_same``: both hold the same."""
    if old is not None and new is not None and (old.mode == _LINK) != (new.mode == _LINK):
        yield from _compared(path, old, None, False, binary, checkpoint)
        yield from _compared(path, None, new, False, binary, checkpoint)
        return
    if old is None and new is None:
        return
    old_name, new_name = _quoted(b"a/" + path), _quoted(b"b/" + path)
    head = [b"diff --git %b %b\n" % (old_name, new_name)]
    mode = b""
    if old is None:
        head.append(b"new file mode %b\n" % new.mode)  # type: ignore[union-attr]
        old_name = b"/dev/null"
    elif new is None:
        head.append(b"deleted file mode %b\n" % old.mode)
        new_name = b"/dev/null"
    elif old.mode == new.mode:
        mode = b" " + new.mode
    else:
        head.append(b"old mode %b\nnew mode %b\n" % (old.mode, new.mode))
    yield b"".join(head)
    if is_same:
        return
    sides = [side for side in (old, new) if side is not None]
    is_text = all(side.is_text for side in sides)
    if not is_text and (not binary or max(side.size for side in sides) > LARGEST_BINARY):
        yield b"Binary files %b and %b differ\n" % (old_name, new_name)
        return
    ids = [side.id(checkpoint) if side is not None else _NO_ID for side in (old, new)]
    yield b"index %b..%b%b\n" % (*ids, mode)
    if not is_text:
        yield b"GIT binary patch\n"
        for side in (new, old):
            yield from _literal(side, checkpoint)
        return
    hunks = _hunks(*[(side.data or b"") if side is not None else b"" for side in (old, new)])
    first = next(hunks, None)
    if first is not None:  # None: an empty file came, or went
        end = b"\t\n" if b" " in path else b"\n"
        ends = [b"\n" if name == b"/dev/null" else end for name in (old_name, new_name)]
        yield b"--- %b%b+++ %b%b" % (old_name, ends[0], new_name, ends[1])
        yield first
        yield from hunks


def _holds_the_same(old: _File, new: _File, checkpoint: Callable[[], None]) -> bool:
    """Whether both have the same bytes."""
    if old.identity == new.identity:
        return True
    if old.data is not None or new.data is not None:
        return old.data == new.data
    return old.size == new.size and hold_the_same(old.fd, new.fd, old.size, checkpoint)


def _hunks(old: bytes, new: bytes) -> Iterator[bytes]:
    """What differs between the two, by lines, with CONTEXT around it."""
    numbers: dict[bytes, int] = {}
    before, after = _numbered(old, numbers), _numbered(new, numbers)
    lines = list(numbers)
    numbers.clear()
    for group in _groups(before, after):
        (begin, _, their_begin, _), (_, end, _, their_end) = group[0], group[-1]
        lead = min(CONTEXT, begin)
        tail = min(CONTEXT, len(before) - end)
        yield b"@@ -%b +%b @@\n" % (_range(begin - lead, end + tail), _range(their_begin - lead, their_end + tail))
        here = begin - lead
        for i, i_end, j, j_end in (*group, (end + tail, end + tail, 0, 0)):
            for sign, some in ((b" ", before[here:i]), (b"-", before[i:i_end]), (b"+", after[j:j_end])):
                for number in some:
                    line = lines[number]
                    yield b"%b%b" % (sign, line if line.endswith(b"\n") else line + _NO_NEWLINE)
            here = i_end


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[list[tuple[int, int, int, int]]]:
    """What differs, as begin and end in both; in one group what is so near that the CONTEXT of both meets."""
    group: list[tuple[int, int, int, int]] = []
    here, there = 0, 0
    for i, j, count in chain(runs(before, after), [(len(before), len(after), 0)]):
        if i > here or j > there:
            if group and here - group[-1][1] > 2 * CONTEXT:
                yield group
                group = []
            group.append((here, i, there, j))
        here, there = i + count, j + count
    if group:
        yield group


def _numbered(data: bytes, numbers: dict[bytes, int]) -> list[int]:
    """The lines of ``data``, each as the number that it has in ``numbers``, or gets there."""
    *lines, last = data.split(b"\n")
    found = [numbers.setdefault(line + b"\n", len(numbers)) for line in lines]
    return [*found, numbers.setdefault(last, len(numbers))] if last else found


def _range(begin: int, end: int) -> bytes:
    count = end - begin
    return b"%d" % (begin + 1) if count == 1 else b"%d,%d" % (begin + (count > 0), count)


def _literal(file: _File | None, checkpoint: Callable[[], None]) -> Iterator[bytes]:
    """The bytes of a file as git writes them: deflated, 52 of them a line, whose first letter tells how many they are."""
    yield b"literal %d\n" % (file.size if file is not None else 0)
    deflating = zlib.compressobj()
    left = b""
    for part in file.parts(checkpoint) if file is not None else ():
        left += deflating.compress(part)
        whole = len(left) // 52 * 52
        yield from _in_85(left[:whole])
        left = left[whole:]
    yield from _in_85(left + deflating.flush())
    yield b"\n"


def _in_85(data: bytes) -> Iterator[bytes]:
    for begin in range(0, len(data), 52):
        line = data[begin : begin + 52]
        yield b"%c%b\n" % (len(line) + (64 if len(line) <= 26 else 70), b85encode(line, pad=True))


def _quoted(path: bytes) -> bytes:
    """``path`` as git writes it: in quotation marks, where there is anything but plain ASCII in it."""
    return b'"%b"' % _QUOTED.sub(_escape, path) if _QUOTED.search(path) else path


def _escape(match: re.Match[bytes]) -> bytes:
    byte = match[0][0]
    return b"\\" + (_ESCAPES.get(byte) or b"%03o" % byte)


def _pieces(parts: Iterable[bytes]) -> Iterator[str]:
    """``parts`` together as text, in pieces of which none is empty."""
    waiting = bytearray()
    for part in parts:
        waiting += part
        while len(waiting) > _PIECE:
            yield waiting[:_PIECE].decode(errors="surrogateescape")
            del waiting[:_PIECE]
    if waiting:
        yield waiting.decode(errors="surrogateescape")
