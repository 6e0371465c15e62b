"""A committed layer as an OCI layer: an uncompressed tar of which nothing but the headers is ever stored.

The index, made by one walk, has the header of each entry, and of files what they were then; the rest of the tar is in the files
themselves.  So its size is exact, and any part can be read, while the layer stays as it is, as committed ones do.

What the tar holds, and in which order, follows from the layer (and a little from its parent) alone:

- entries are sorted by the bytes of their names, what is in a directory comes right after it; paths have no ``./`` before them;
- of the layer's own directory there is the entry ``./`` only where it is not what every runtime makes it, of mode 0755 and
  root's, without attributes, or where the parent's is not;
- a whiteout becomes the empty file ``.wh.NAME`` in the place of NAME, an opaque directory has ``.wh..wh..opq`` as its first
  entry.  A layer without parents hides nothing: marks are left out there, and a device 0:0 is a device;
- of an inode with several names the first is the file, the others are links to that;
- ``security.capability`` and users' attributes of files and directories are kept; all others (ACLs too, as in the layers of
  others), and overlayfs's own, are not;
- sockets are left out, times are cut to seconds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import tempfile
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import BinaryIO

from snapfs.errors import Damaged, FailedPrecondition, Unavailable
from snapfs.kernel import inside, workdir
from snapfs.names import printable, shown
from snapfs.scan import tar
from snapfs.scan.copying import VANISHED, read_attributes
from snapfs.scan.inodes import Numbered
from snapfs.scan.marks import PREFIX, list_xattrs
from snapfs.scan.ordered import ordered
from snapfs.scan.patch import metacopied
from snapfs.scan.spool import Spool
from snapfs.scan.walk import Descriptors, Directory

READ = 1 << 20  # bytes that are read at once for who reads on
PART = 10  # the index takes one in so many of the bytes that are free on the disk, at most

_SMALL = 64 << 10  # bytes of a file that is read as a whole, if that is wanted
_ENTRIES, _BYTES = 256, 256 << 10  # entries, and bytes, of the index that are compressed together
_ROW = struct.Struct("<IIQQq")  # lengths of header and path (0: it has no bytes of its own); size, inode, mtime of a file
_COUNT = struct.Struct("<I")
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TICK = 20_000_000  # nanoseconds by which the kernel's ctime may be late
_ZEROS = bytes(tar.BLOCK)
_WHITEOUT, _OPAQUE = b".wh.", b".wh..wh..opq"
_CAPABILITY, _OF_USERS = "security.capability", "user."
_KINDS = {
    stat.S_IFREG: tar.REGULAR,
    stat.S_IFLNK: tar.LINK,
    stat.S_IFIFO: tar.FIFO,
    stat.S_IFCHR: tar.CHARACTER_DEVICE,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
}


Ids = Callable[[int, int], tuple[int, int]]


def make_index(
    layer: str,
    *,
    below: str | None = None,
    prefix: str = PREFIX,
    ids: Ids = lambda uid, gid: (uid, gid),
    checkpoint: Callable[[], None] = lambda: None,
    spool: str | None = None,
) -> LayerTar:
    """The tar of the layer in the directory ``layer``, whose parent's is ``below`` (None: it has none).  ``ids`` gives the uid
    and the gid that a file has in there for those that it has.

    ``prefix``, ``checkpoint`` and ``spool`` are as for ``scan/changes.py``; the index stays in a nameless file in ``spool``.
    Blocks on the disk, so call it in a worker thread.  It works in one more, which goes from directory to directory, so that
    all paths must be absolute.  Memory is bounded, but for some bytes for each inode with several names.
    Nothing is opened but directories.  Raises OSError; FailedPrecondition where a name begins with ``.wh.``, or an overlay has
    left in the layer what is elsewhere (redirect_dir=on, metacopy=on); Unavailable (EFBIG) where the index would take more than
    a PART of what is free on the disk.
    """
    begun = time.time_ns() - _TICK

    def make(has_workdir: bool) -> LayerTar:
        with ExitStack() as undoing:
            descriptors = undoing.enter_context(Descriptors())
            waiting = undoing.enter_context(closing(Spool(spool)))
            index = undoing.enter_context(closing(_Index(spool)))
            links = undoing.enter_context(closing(_FirstNames(spool)))
            making = _Making(descriptors, index, links, prefix, ids, is_lowest=below is None, has_workdir=has_workdir)
            top = Directory(layer)
            making.add_top(top, below)
            for path, parent, name, directory in undoing.enter_context(closing(ordered(top, descriptors, waiting, checkpoint))):
                if directory is not None:
                    making.add_directory(path + name, directory)
                else:
                    making.add(path, parent, name)
            return index.finished(layer, begun)

    return workdir.with_own(make)


class _Making:
    """What the walk finds, as entries of the tar.  ``is_lowest``: the layer has no parents; ``has_workdir``: this thread may
    change its working directory."""

    def __init__(
        self,
        descriptors: Descriptors,
        index: _Index,
        links: _FirstNames,
        prefix: str,
        ids: Ids,
        *,
        is_lowest: bool,
        has_workdir: bool,
    ) -> None:
        self._ids = ids
        self._descriptors = descriptors
        self._index = index
        self._links = links
        self._prefix = prefix
        self._opaque, self._redirect = f"{prefix}opaque", f"{prefix}redirect"
        self._metacopy, self._whiteout = f"{prefix}metacopy", f"{prefix}whiteout"
        self._is_lowest = is_lowest
        self._has_workdir = has_workdir
        self._with_xwhiteouts: set[Directory] = set()
        self._parent: Directory | None = None  # the directory that was looked in last, with its descriptor, device and path
        self._fd = self._device = -1
        self._place = b""

    def add_top(self, top: Directory, below: str | None) -> None:
        """The layer's own directory, where it is to be in the tar; whether overlayfs's marks are on it or not, it is merged."""
        fd = self._descriptors.get(top)
        attributes = self._attributes(fd, list_xattrs(fd), b".")
        status = os.fstat(fd)
        is_plain = self._is_plain(status) and not attributes
        if is_plain and below is not None:
            with suppress(FileNotFoundError):
                is_plain = self._is_plain(os.lstat(below)) and not self._attributes(below, list_xattrs(below), b".")
        if not is_plain:
            self._index.add(self._header(b"./", tar.DIRECTORY, status, attributes=attributes))
        self._note_xwhiteouts(top, fd, list_xattrs(fd))

    def add_directory(self, path: bytes, directory: Directory) -> None:
        """The directory at ``path``."""
        _refuse_reserved(path)
        fd = self._open(directory, path)
        names = list_xattrs(fd)
        if not names:
            self._index.add(self._header(path + b"/", tar.DIRECTORY, os.fstat(fd)))
            return
        if self._redirect in names and not self._is_lowest:
            what = "was renamed in an overlay with redirect_dir=on: what is in it is elsewhere in the layers"
            raise FailedPrecondition(f'"{printable(os.fsdecode(path))}" {what}', public=f"a directory {what}")
        self._index.add(self._header(path + b"/", tar.DIRECTORY, os.fstat(fd), attributes=self._attributes(fd, names, path)))
        self._note_xwhiteouts(directory, fd, names)
        if not self._is_lowest and self._opaque in names and os.getxattr(fd, self._opaque) == b"y":
            self._index.add(_empty(path + b"/" + _OPAQUE))

    def _open(self, directory: Directory, path: bytes) -> int:
        """A descriptor of ``directory``, which is at ``path``, or has something there."""
        fd = self._descriptors.get(directory)
        if fd < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return fd

    def _note_xwhiteouts(self, directory: Directory, fd: int, names: list[str]) -> None:
        if not self._is_lowest and self._opaque in names and os.getxattr(fd, self._opaque) == b"x":
            self._with_xwhiteouts.add(directory)

    def _enter(self, parent: Directory, path: bytes) -> None:
        """Look in ``parent``, which has something at ``path``, from now on."""
        self._fd = self._open(parent, path)
        self._parent, self._device = parent, os.fstat(self._fd).st_dev
        if self._has_workdir:
            os.fchdir(self._fd)
        else:
            self._place = b"/proc/self/fd/%d/" % self._fd

    def add(self, above: bytes, parent: Directory, name: bytes) -> None:
        """What is no directory, at ``name`` in ``parent``, whose path is ``above``."""
        path = above + name
        if parent is not self._parent or parent.fd != self._fd:
            self._enter(parent, path)
        fd = self._fd
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if status.st_dev != self._device:
            status = inside.stat_beneath(os.fsdecode(name), fd)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:  # a socket
            return
        if name.startswith(_WHITEOUT):
            _refuse_reserved(path)
        if kind == tar.CHARACTER_DEVICE and not status.st_rdev and not self._is_lowest:
            self._index.add(_empty(above + _WHITEOUT + name))
            return
        attributes: dict[bytes, bytes] | None = None
        if kind == tar.REGULAR:
            file = self._place + name
            if names := list_xattrs(file):
                if parent in self._with_xwhiteouts and not status.st_size and self._whiteout in names:
                    self._index.add(_empty(above + _WHITEOUT + name))
                    return
                if self._metacopy in names:
                    raise metacopied(os.fsdecode(path))
                attributes = self._attributes(file, names, path)
        if status.st_nlink > 1 and (first := self._links.first(status, path)) is not None:
            self._index.add(self._header(path, tar.HARD_LINK, status, target=first))
            return
        size = status.st_size if kind == tar.REGULAR else 0
        target = os.readlink(name, dir_fd=fd) if kind == tar.LINK else b""
        device = None
        if kind in (tar.CHARACTER_DEVICE, tar.BLOCK_DEVICE):
            device = os.major(status.st_rdev), os.minor(status.st_rdev)
        header = self._header(path, kind, status, size=size, target=target, device=device, attributes=attributes)
        if size:
            self._index.add(header, path, size, status.st_ino, status.st_mtime_ns)
        else:
            self._index.add(header)

    def _attributes(self, file: int | bytes | str, names: list[str], path: bytes) -> dict[bytes, bytes]:
        """Those of the attributes ``names`` of ``file``, which is at ``path``, that the tar has.  Raises FailedPrecondition
        where they are too many for the memory."""
        of_users = (name for name in names if name.startswith(_OF_USERS) and not name.startswith(self._prefix))
        wanted = [*of_users, *(name for name in names if name == _CAPABILITY)]
        try:
            found = read_attributes(file, wanted, follow=isinstance(file, int))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            what = "has more than 4 MiB of extended attributes, which no header of a tar has room for: remove some"
            raise FailedPrecondition(f'"{shown(os.fsdecode(path))}" {what}', public=f"a file {what}") from None
        return {os.fsencode(name): value for name, value in found.items()}

    def _is_plain(self, status: os.stat_result) -> bool:
        """Whether the directory of a layer is as every runtime makes it."""
        return (stat.S_IMODE(status.st_mode), *self._ids(status.st_uid, status.st_gid)) == (0o755, 0, 0)

    def _header(
        self,
        path: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        size: int = 0,
        target: bytes = b"",
        device: tuple[int, int] | None = None,
        attributes: dict[bytes, bytes] | None = None,
    ) -> bytes:
        mode, mtime = stat.S_IMODE(status.st_mode), status.st_mtime_ns // 1_000_000_000
        uid, gid = self._ids(status.st_uid, status.st_gid)
        return tar.header(path, kind, mode, uid, gid, mtime, size=size, target=target, device=device, attributes=attributes)


def _refuse_reserved(path: bytes) -> None:
    """Raise FailedPrecondition where a name in a layer means something else in a tar."""
    if path.rpartition(b"/")[2].startswith(_WHITEOUT):
        what = "has a name that begins with .wh., which in a tar of a layer means that another file is deleted: rename it"
        raise FailedPrecondition(f'"{shown(os.fsdecode(path))}" {what}', public=f"a file {what}")


def _empty(path: bytes) -> bytes:
    """The header of an empty file that is a mark: of none of those who may have made that, and of no time."""
    return tar.header(path, tar.REGULAR, 0, 0, 0, 0)


class _FirstNames:
    """The first path of each inode with several names; the paths wait in a nameless file in ``directory``."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None
        self._end = 0
        self._places: dict[int, Numbered] = {}  # by device

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def first(self, status: os.stat_result, path: bytes) -> bytes | None:
        """The first path of the inode that ``status`` tells of, None where that is ``path``."""
        places = self._places.get(status.st_dev)
        if places is None:
            places = self._places[status.st_dev] = Numbered("Q")
        place = places.get(status.st_ino)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        if place is not None:
            (length,) = _COUNT.unpack(os.pread(self._file.fileno(), _COUNT.size, place))
            return os.pread(self._file.fileno(), length, place + _COUNT.size)
        places.put(status.st_ino, self._end)
        self._end += _write_all(self._file.fileno(), _COUNT.pack(len(path)) + path, self._end)
        return None


def _write_all(fd: int, data: bytes, place: int) -> int:
    """Write ``data`` at ``place``; how many bytes that are.  Raises OSError where the disk is full."""
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, place)
        place, left = place + written, left[written:]
    return len(data)


class _Index:
    """The index while it is made."""

    def __init__(self, directory: str | None) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self._starts, self._places = array("Q"), array("Q")
        self._here = self._start = self._end = self._length = 0
        self._rows: list[bytes] = []
        self._headers: list[bytes] = []
        self._paths: list[bytes] = []

    def close(self) -> None:
        self._file.close()

    def add(self, header: bytes, path: bytes = b"", size: int = 0, inode: int = 0, mtime: int = 0) -> None:
        """The next entry: its header, and where a file's bytes follow, where they are, and what tells whether they are still
        the same."""
        self._rows.append(_ROW.pack(len(header), len(path), size, inode, mtime))
        self._headers.append(header)
        if path:
            self._paths.append(path)
        self._here += len(header) + size + tar.padding(size)
        self._length += len(header) + len(path)
        if len(self._rows) >= _ENTRIES or self._length > _BYTES:
            self._flush()

    def _flush(self) -> None:
        raw = _COUNT.pack(len(self._rows)) + b"".join(self._rows) + b"".join(self._headers) + b"".join(self._paths)
        part = zlib.compress(raw, 1)
        disk = os.fstatvfs(self._file.fileno())
        free = disk.f_bavail * disk.f_frsize + self._end
        if (self._end + len(part)) * PART > free:
            raise Unavailable(
                f"the headers of the tar take more than a tenth of the {free >> 20:,} MiB that are free on ROOT's disk: make "
                "room there",
                errno.EFBIG,
            )
        self._starts.append(self._start)
        self._places.append(self._end)
        self._end += _write_all(self._file.fileno(), part, self._end)
        self._start, self._length = self._here, 0
        for some in (self._rows, self._headers, self._paths):
            some.clear()

    def finished(self, layer: str, begun: int) -> LayerTar:
        """The tar of which all entries were added, since ``begun``."""
        if self._rows:
            self._flush()
        self._places.append(self._end)
        return LayerTar(layer, begun, os.dup(self._file.fileno()), self._starts, self._places, self._here)


_Entry = tuple[int, int, int, int, bytes, int, int, int]
"""An entry: where it begins in the tar, where its header is in a part of the index, where in the tar the bytes of a file begin,
and where the next entry; the path of the file, of so many bytes; and its inode and mtime, which tell whether it is still the
same."""


class LayerTar:
    """One layer as a tar of ``size`` bytes: the index, in a nameless file of ``on_disk`` bytes as long as this object lives.
    It may be read by many at once (``open``).  ``hashing``: its digest, as far as it was read."""

    def __init__(self, layer: str, begun: int, fd: int, starts: array[int], places: array[int], end: int) -> None:
        self.layer = layer
        self.begun = begun  # a directory whose ctime is before that is as the index says
        self.end = end  # of the last entry
        self.size = end + len(tar.END)
        self.on_disk = places[-1]
        self.hashing = Hashing(self.size)
        self._fd = fd
        self._starts = starts
        self._places = places

    def __del__(self) -> None:
        os.close(self._fd)

    def open(self) -> OpenLayer:
        """Open it for reading.  ``close`` what that gives."""
        return OpenLayer(self)

    def part_at(self, offset: int) -> int:
        """Which part of the index tells of the byte at ``offset`` of the tar, before ``end``."""
        return bisect_right(self._starts, offset) - 1

    def part(self, number: int) -> tuple[bytes, list[_Entry]]:
        """Part ``number`` of the index, and the entries that are in it.  Raises Damaged where the disk has mangled it, and
        OSError."""
        begin, end = self._places[number], self._places[number + 1]
        try:
            raw = zlib.decompress(os.pread(self._fd, end - begin, begin))
        except zlib.error as error:
            raise Damaged("the disk under ROOT has mangled the headers of the tar") from error
        (count,) = _COUNT.unpack_from(raw)
        header = _COUNT.size + count * _ROW.size
        rows = list(_ROW.iter_unpack(raw[_COUNT.size : header]))
        path = header + sum([row[0] for row in rows])
        here = self._starts[number]
        entries: list[_Entry] = []
        for length, path_length, size, inode, mtime in rows:
            body = here + length
            stop = body + size + -size % tar.BLOCK
            entries.append((here, header, body, stop, raw[path : path + path_length], size, inode, mtime))
            here, header, path = stop, header + length, path + path_length
        return raw, entries


class Hashing:
    """The SHA-256 of ``size`` bytes that come in order, in however many goes, and possibly more than once."""

    def __init__(self, size: int) -> None:
        self.frontier = 0
        """How many bytes have come so far."""
        self.digest: bytes | None = None
        """What came of it; None before the last byte."""
        self._size = size
        self._sha = hashlib.sha256()
        self._lock = threading.Lock()

    def feed(self, begin: int, data: memoryview) -> None:
        """``data`` is there from ``begin`` on; what is known already, or too far ahead, is passed over.  Any thread."""
        with self._lock:
            known = self.frontier - begin
            if self.digest is None and 0 <= known < len(data):
                self._sha.update(data[known:])
                self.frontier = begin + len(data)
                if self.frontier == self._size:
                    self.digest = self._sha.digest()


class _Near(Descriptors):
    """Those of whoever reads on: few, for there may be many."""

    OPEN, NEAR, MARKS = 4, 4, 4


class OpenLayer:
    """A layer's tar that is open for reading.  ``read`` and ``load`` block: any thread may call them, one at a time; ``close``
    it when no call is under way.  It has READ bytes of memory, always the same: the kernel would zero fresh ones first."""

    def __init__(self, layer_tar: LayerTar) -> None:
        self._tar = layer_tar
        self._lock = threading.Lock()
        self._descriptors = _Near()
        self._way = [Directory(layer_tar.layer)]
        self._directory = b""  # in which a file was opened last, with its device and descriptor
        self._device = self._fd = -1
        self._is_as_it_was = False  # nothing in that has been exchanged, and no device can be opened
        self._file = -1  # the file of which a part was read last
        self._file_path = b""
        self._part: tuple[int, bytes, list[_Entry]] = (-1, b"", [])
        self._view = memoryview(b"")  # what was read last: from _begin to _end
        self._begin = self._end = self._next = 0

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        return self._tar.size

    @property
    def digest(self) -> bytes | None:
        """The SHA-256 of the tar, once all of it was read in order, here or elsewhere."""
        return self._tar.hashing.digest

    def close(self) -> None:
        """Close what is open of the layer."""
        self._let_go()
        self._fd = -1
        self._descriptors.__exit__()

    def at_hand(self, offset: int, size: int) -> memoryview | None:
        """As ``read``, until the next call; None where that is not in memory."""
        size = min(size, self.size - offset)
        if size <= 0:
            return self._view[:0]
        if not self._begin <= offset <= offset + size <= self._end:
            return None
        self._next = offset + size
        return self._view[offset - self._begin : offset - self._begin + size]

    def load(self, offset: int, size: int) -> None:
        """Have ``size`` bytes from ``offset`` on, READ of them at most, at hand, and what is behind them, too, if the last that
        were asked for were before them.  Raises as ``read`` does."""
        end = min(offset + size, self.size)
        hashing = self._tar.hashing
        with self._lock:
            self._view = self._view or memoryview(bytearray(min(READ, self.size)))
            if hashing.digest is None and 0 < offset - hashing.frontier <= READ:
                self._fill(hashing.frontier, offset)  # the kernel's requests may overtake one another
                self._next = offset
            if offset == self._next:
                try:
                    self._fill(offset, max(end, min(offset + READ, self.size)))
                    return
                except (Damaged, OSError):  # what is behind that may be wanted by nobody
                    pass
            self._fill(offset, end)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on; fewer at the end alone.

        Raises Damaged where a file of the layer is not what it was when the index was made, and OSError."""
        pieces = []
        end = min(offset + size, self.size)
        while offset < end:
            length = min(end - offset, READ)
            if (found := self.at_hand(offset, length)) is None:
                self.load(offset, length)
                found = self.at_hand(offset, length)
                assert found is not None
            pieces.append(bytes(found))
            offset += length
        return b"".join(pieces)

    def _fill(self, begin: int, end: int) -> None:
        """Have the bytes of the tar from ``begin`` to ``end`` in memory, READ of them at most."""
        view, last = self._view, min(end, self._tar.end)
        self._end = self._begin = begin
        self._fd = -1  # its directory is looked at again
        number = self._tar.part_at(begin)
        here = begin
        while here < last:
            if self._part[0] != number:
                self._part = number, *self._tar.part(number)
            _, raw, entries = self._part
            begun, pieces = here, list[bytes]()  # of what is there as a whole, as most files are that are not large
            for start, header, body, stop, path, size, inode, mtime in entries:
                if stop <= here:
                    continue
                if here == start and stop <= last and size <= _SMALL:
                    pieces.append(raw[header : header + body - start])
                    if size:
                        pieces.append(self._small(path, size, inode, mtime))
                        pieces.append(_ZEROS[: stop - body - size])
                    here = stop
                    continue
                if pieces:
                    view[begun - begin : here - begin] = b"".join(pieces)
                    pieces.clear()
                if here < body:
                    to = min(body, last)
                    view[here - begin : to - begin] = raw[header + here - start : header + to - start]
                if size and last > body:
                    from_, to = max(here, body), min(last, body + size)
                    if from_ < to:
                        place = view[from_ - begin : to - begin]
                        self._content(place, path, from_ - body, size, inode, mtime)
                    from_, to = max(here, body + size), min(last, stop)
                    if from_ < to:
                        view[from_ - begin : to - begin] = _ZEROS[: to - from_]
                here = begun = min(stop, last)
                if here >= last:
                    break
            if pieces:
                view[begun - begin : here - begin] = b"".join(pieces)
            number += 1
        if end > self._tar.end:
            from_ = max(begin, self._tar.end)
            view[from_ - begin : end - begin] = tar.END[from_ - self._tar.end : end - self._tar.end]
        self._end = end
        self._tar.hashing.feed(begin, view[: end - begin])

    def _small(self, path: bytes, size: int, inode: int, mtime: int) -> bytes:
        """All of the file at ``path``."""
        file = self._opened(path, size, inode, mtime)
        try:
            data = os.read(file, size)
        finally:
            os.close(file)
        if len(data) != size:
            raise _changed(path)
        return data

    def _content(self, place: memoryview, path: bytes, begin: int, size: int, inode: int, mtime: int) -> None:
        """Put bytes of the file at ``path``, which must still be what the index says, into ``place``, from ``begin`` on."""
        length = len(place)
        whole = length == size
        if whole or self._file < 0 or self._file_path != path:
            file = self._opened(path, size, inode, mtime)
            if not whole:
                self._let_go()
                self._file, self._file_path = file, path
        else:
            file = self._file
            if not _is_same(os.fstat(file), size, inode, mtime):
                raise _changed(path)
        try:
            done = os.preadv(file, [place], begin)
            while done < length:  # a signal, or it has become shorter
                more = os.preadv(file, [place[done:]], begin + done)
                if not more:
                    raise _changed(path)
                done += more
        finally:
            if whole:
                os.close(file)
            elif begin + length == size:
                self._let_go()

    def _let_go(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _opened(self, path: bytes, size: int, inode: int, mtime: int) -> int:
        """A descriptor of the file at ``path``.  What is not the regular file that it was is not opened: with a device that may
        do something.  So it is looked at first, unless its directory tells that it is what it was."""
        above, _, name = path.rpartition(b"/")
        try:
            if above != self._directory or self._fd < 0:
                self._fd = self._entered(above)
            if not self._is_as_it_was:
                status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                if not _is_same(status, size, inode, mtime) or status.st_dev != self._device:
                    raise _changed(path)
            file = os.open(name, _FILE, dir_fd=self._fd)
        except OSError as error:
            if error.errno in VANISHED:
                raise _changed(path) from None
            error.filename = os.fsdecode(path)
            raise
        status = os.fstat(file)
        if not _is_same(status, size, inode, mtime) or status.st_dev != self._device:
            os.close(file)
            raise _changed(path)
        return file

    def _entered(self, path: bytes) -> int:
        """A descriptor of the directory at ``path``.  Raises OSError."""
        way, self._fd = self._way, -1
        names = [os.fsdecode(name) for name in path.split(b"/")] if path else []
        same = 0
        while same < min(len(names), len(way) - 1) and way[same + 1].name == names[same]:
            same += 1
        for directory in way[same + 1 :]:
            self._descriptors.close(directory)
        del way[same + 1 :]
        for name in names[same:]:
            way.append(Directory(name, way[-1]))
        fd = self._descriptors.get(way[-1])
        if fd < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        status = os.fstat(fd)
        self._directory, self._device = path, status.st_dev
        changed = status.st_ctime_ns
        is_precise = changed % 1_000_000_000 != 0  # some file systems have whole seconds alone
        self._is_as_it_was = is_precise and changed < self._tar.begun and self._descriptors.is_nodev(way[-1])
        return fd


def _is_same(status: os.stat_result, size: int, inode: int, mtime: int) -> bool:
    """Whether a file is the same one as ever, and was not written."""
    return status.st_ino == inode and status.st_size == size and status.st_mtime_ns == mtime and stat.S_ISREG(status.st_mode)


def _changed(path: bytes) -> Damaged:
    what = "is not what it was when the headers of this tar were made: nothing may write in the layer of a committed snapshot"
    return Damaged(f'"{shown(os.fsdecode(path))}" {what}', public=f"a file of the layer {what}")
