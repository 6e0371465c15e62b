"""The entries of an archive made in the directory of a layer, as overlayfs has them there.

Somebody who means harm may have written the archive.  So no name is ever looked up but by a descriptor of the directory that
is to hold it, which is found by openat2(2), beneath the top, in its mount, and by no link; or, where a link of the archive's
own is on the way, name by name.  A name with ``..``, or from the top of the machine, is refused.  Nobody else can enter the
directory meanwhile.  Directories are closed to others, and get their owners, modes, attributes and times at the end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from snapfs.images.lower import Lower
from snapfs.images.tarreader import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARD_LINK,
    LINK,
    Entry,
    Piece,
    TarReader,
)
from snapfs.images.unfit import Unfit
from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.names import shown
from snapfs.scan.copying import copy_data, open_regular
from snapfs.scan.layercopy import attributes, set_attributes
from snapfs.scan.marks import is_shown_by_overlay

_WHITEOUT, _OPAQUE, _OTHER = b".wh.", b".wh..wh..opq", b".wh..wh."
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = LOOK | os.O_DIRECTORY
_ATTRIBUTES = b"attributes"  # in the directory beside the layer
_OPEN = 64  # directories that are kept open
_MOST_LINKS = 40  # that are followed on one way, as in the kernel
MOST_NAMES = 128 << 20
"""Bytes of paths that are remembered of one layer: of its directories, and of what it hides below."""
_SET_ID = stat.S_ISUID | stat.S_ISGID
_UNKEPT = (errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_NONE: dict[str, bytes] = {}
_ELSEWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Owners:
    """Which owners files get.  ``ids``: the uids, and the gids, by their order, that stand for those from 1 on, where this
    process's own stand for 0; None where each number stands for itself."""

    def __init__(self, ids: tuple[Sequence[range], Sequence[range]] | None = None) -> None:
        self._own = os.geteuid(), os.getegid()
        self._ids = ids
        self._known: dict[tuple[int, int], tuple[int, int, bool]] = {}

    def of(self, uid: int, gid: int) -> tuple[int, int, bool]:
        """Uid and gid of a file that belongs to these in the archive; and whether that says what the archive does."""
        if self._ids is None:
            return uid, gid, True
        found = self._known.get((uid, gid))
        if found is None:
            numbers = [_nth(ranges, own, each) for ranges, own, each in zip(self._ids, self._own, (uid, gid), strict=True)]
            users, groups = (own if number is None else number for number, own in zip(numbers, self._own, strict=True))
            found = users, groups, None not in numbers
            if len(self._known) < 4096:
                self._known[uid, gid] = found
        return found


def _nth(ranges: Sequence[range], own: int, number: int) -> int | None:
    if number == 0:
        return own
    left = number - 1
    for each in ranges:
        if left < len(each):
            return each[left]
        left -= len(each)
    return None


class Left:
    """What could not be kept, by the path of one such file; "" where there is none.  ``foreign``: its owner; ``bare``: an
    attribute; ``device``: a device, which is not there at all."""

    def __init__(self) -> None:
        self.foreign = ""
        self.bare = ""
        self.device = ""


class _Made:
    """A directory that was made in the layer: its inode, the entry that tells of it, if one does, where its attributes are
    kept, and whether it hides what is below."""

    __slots__ = ("attributes", "entry", "inode", "opaque")

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.entry: Entry | None = None
        self.attributes: tuple[int, int] | None = None
        self.opaque = False


class _Kept:
    """Attributes of directories, which these get at the end: they are kept in a file in the directory open as ``aside``."""

    def __init__(self, aside: int) -> None:
        self._aside = aside
        self._fd = -1
        self._end = 0

    def add(self, attributes: dict[str, bytes]) -> tuple[int, int]:
        """Keep them; where they are."""
        if self._fd < 0:
            self._fd = os.open(_ATTRIBUTES, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._aside)
            os.unlink(_ATTRIBUTES, dir_fd=self._aside)
        data = memoryview(msgspec.msgpack.encode({os.fsencode(name): value for name, value in attributes.items()}))
        start = self._end
        while self._end - start < len(data):
            self._end += os.pwrite(self._fd, data[self._end - start :], self._end)
        return start, len(data)

    def get(self, start: int, length: int) -> dict[str, bytes]:
        found = msgspec.msgpack.decode(os.pread(self._fd, length, start), type=dict[bytes, bytes])
        return {os.fsdecode(name): value for name, value in found.items()}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Open:
    """A directory of the layer that is open; ``path`` is the one without links."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: bytes) -> None:
        self.fd = fd
        self.path = path


class Unpacking:
    """A layer that is unpacked into the directory open as ``top``; ``aside`` is an empty one beside it, for what another entry
    replaces.  ``lowest``: it has no layers below.  ``prefix``: what overlayfs's own attributes begin with there.

    ``files`` and ``size`` tell how many entries, with how many bytes, those of their attributes too, were made so far; ``left``
    what could not be kept; ``has_replaced`` whether any entry has taken the place of another.

    The methods raise Unfit, and OSError.  Memory is bounded but for some hundred bytes for each directory, and MOST_NAMES.  The
    process has no umask meanwhile.
    """

    def __init__(self, top: int, aside: int, *, lowest: bool, prefix: str, owners: Owners) -> None:
        self.files = 0
        self.size = 0
        self.left = Left()
        self.has_replaced = False
        self._top = _Open(top, b"")
        self._aside = aside
        self._lowest = lowest
        self._prefix = prefix
        self._owners = owners
        self._as_made = os.geteuid(), os.getegid(), True
        self._moved = 0  # directories, and to where
        self._names = 0  # bytes of paths that are remembered
        self._kept = _Kept(aside)
        self._made: dict[bytes, _Made] = {b"": _Made(os.fstat(top).st_ino)}
        self._opened: OrderedDict[bytes, _Open] = OrderedDict()  # by the path that was asked for
        self._stale: list[_Open] = []  # of which the entry at hand may still need one
        self._last: tuple[bytes, _Open] = b"", self._top
        self._hidden: set[bytes] = set()  # paths of whiteouts
        self._awaited: dict[bytes, tuple[bytes, str]] = {}
        """Files of a layer below with a name in this one, by their path: an empty file stands for each, which has that name in
        ``aside``, too; and the path that the archive has for it."""

    def close(self) -> None:
        """Close all but what was given."""
        self._forget()
        self._close_stale()
        self._kept.close()

    # -- entries

    def add(self, entry: Entry, reader: TarReader) -> bytes | None:
        """Make what ``entry`` says, the last one of ``reader``.  Where that was a file: its path, without links."""
        names = _names(entry.name)
        if not names:  # the top: as containerd leaves it
            return None
        if self._stale:
            self._close_stale()
        base = names.pop()
        above = b"/".join(names)
        parent = self._last[1] if above == self._last[0] else self._directory(above, _shown(entry.name))
        self.files += 1
        if base.startswith(_WHITEOUT):
            self._hide(parent, base, entry)
        elif entry.kind is FILE:
            self._make_file(parent, base, entry, reader)
            return _joined(parent.path, base)
        elif entry.kind is DIRECTORY:
            self._make_directory(parent, base, entry)
        elif entry.kind is LINK:
            self._make_link(parent, base, entry)
        elif entry.kind is HARD_LINK:
            self._make_name(parent, base, entry)
        else:
            self._make_node(parent, base, entry)
        return None

    def _make_file(self, parent: _Open, base: bytes, entry: Entry, reader: TarReader) -> None:
        owner = self._owners.of(entry.uid, entry.gid)
        plain = owner == self._as_made and parent.path and not entry.attributes and not entry.mode & 0o7000
        fd = self._opened_new(parent, base, entry.mode if plain else 0o600)
        try:
            for here, piece in reader.data(entry):
                self._write(fd, here, piece)
            if entry.spans is not None:
                os.truncate(fd, entry.length)
            if not plain:
                self._dress(fd, entry, owner)
            os.utime(fd, ns=(entry.read, entry.modified))
        finally:
            os.close(fd)

    def _opened_new(self, parent: _Open, base: bytes, mode: int) -> int:
        try:
            return os.open(base, _NEW, mode, dir_fd=parent.fd)
        except FileExistsError:
            self._take_away(parent, base)
            return os.open(base, _NEW, mode, dir_fd=parent.fd)

    def _write(self, fd: int, here: int, piece: Piece) -> None:
        done = os.pwrite(fd, piece, here)
        self.size += len(piece)
        while done < len(piece):
            done += os.pwrite(fd, memoryview(piece)[done:], here + done)

    def _make_directory(self, parent: _Open, base: bytes, entry: Entry) -> None:
        path = _joined(parent.path, base)
        made = self._made.get(path)
        try:
            os.mkdir(base, 0o700, dir_fd=parent.fd)
        except FileExistsError:
            there = os.stat(base, dir_fd=parent.fd, follow_symlinks=False)
            if not stat.S_ISDIR(there.st_mode):
                self._take_away(parent, base)
                made = self._new_directory(parent, base, path, opaque=True)  # what it was hid all that is below
        else:
            made = self._noted(parent, base, path)
        assert made is not None
        made.attributes = self._kept.add(self._counted(entry.attributes)) if entry.attributes else None
        entry.attributes, entry.name, entry.target = _NONE, path, b""  # what is not needed is not kept
        made.entry = entry

    def _new_directory(self, parent: _Open, base: bytes, path: bytes, *, opaque: bool) -> _Made:
        os.mkdir(base, 0o700, dir_fd=parent.fd)
        made = self._noted(parent, base, path)
        made.opaque = opaque
        return made

    def _noted(self, parent: _Open, base: bytes, path: bytes) -> _Made:
        made = _Made(os.stat(base, dir_fd=parent.fd, follow_symlinks=False).st_ino)
        if path not in self._made:
            self._remember(path)
        self._made[path] = made
        return made

    def _remember(self, path: bytes) -> None:
        self._names += len(path)
        if self._names > MOST_NAMES:
            raise Unfit(f"the paths of its directories, and of what it hides, take more than {MOST_NAMES} bytes")

    def _make_link(self, parent: _Open, base: bytes, entry: Entry) -> None:
        if not entry.target:
            raise Unfit(f"{_shown(entry.name)} is a symbolic link that leads nowhere")
        try:
            os.symlink(entry.target, base, dir_fd=parent.fd)
        except FileExistsError:
            self._take_away(parent, base)
            os.symlink(entry.target, base, dir_fd=parent.fd)
        self._dress_unopened(parent, base, entry)

    def _make_node(self, parent: _Open, base: bytes, entry: Entry) -> None:
        kinds = {CHARACTER: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK, FIFO: stat.S_IFIFO}
        mode, device = kinds[entry.kind] | 0o600, os.makedev(entry.major, entry.minor)
        if entry.kind is CHARACTER and device == 0:
            raise Unfit(f"{_shown(entry.name)} is a device 0:0, which overlayfs reads as a file that was deleted")
        try:
            os.mknod(base, mode, device, dir_fd=parent.fd)
        except FileExistsError:
            self._take_away(parent, base)
            return self._make_node(parent, base, entry)
        except PermissionError:
            if entry.kind is FIFO:
                raise
            self.left.device = self.left.device or _shown(entry.name)
            return None
        return self._dress_unopened(parent, base, entry)

    # -- hard links

    def _make_name(self, parent: _Open, base: bytes, entry: Entry) -> None:
        names = _names(entry.target)
        if not names:
            raise Unfit(f"{_shown(entry.name)} is a hard link to a directory")
        target = names.pop()
        above = b"/".join(names)
        found = self._found(above, _shown(entry.name))
        if found is not None:
            if (found.path, target) == (parent.path, base):
                raise Unfit(f"{_shown(entry.name)} is a hard link to itself")
            try:
                there = os.stat(target, dir_fd=found.fd, follow_symlinks=False)
            except FileNotFoundError:
                pass
            else:
                if stat.S_ISDIR(there.st_mode) or _is_whiteout(there):
                    what = "a directory" if stat.S_ISDIR(there.st_mode) else "what the layer itself deletes"
                    raise Unfit(f"{_shown(entry.name)} is a hard link to {what}, {_shown(entry.target)}")
                self._link(found.fd, target, parent, base)
                return
        if self._lowest:
            raise Unfit(f"{_shown(entry.name)} is a hard link to {_shown(entry.target)}, which is not there")
        path = _joined(found.path if found is not None else above, target)
        name, _ = self._awaited.get(path, (b"", ""))
        if not name:
            self._remember(path)
            name = b"awaited-%d" % len(self._awaited)
            os.close(os.open(name, _NEW, 0o600, dir_fd=self._aside))
            self._awaited[path] = name, _shown(entry.name)
        self._link(self._aside, name, parent, base)

    def _link(self, there: int, target: bytes, parent: _Open, base: bytes) -> None:
        for _ in range(2):
            try:
                os.link(target, base, src_dir_fd=there, dst_dir_fd=parent.fd, follow_symlinks=False)
                return
            except FileExistsError:
                self._take_away(parent, base)
        raise AssertionError("what was taken away is there again")

    def _bring_up(self, lower: Lower, told: Callable[[], None]) -> None:
        """Fill the files that stand for those of layers below, and give them their names there, as writing to one would."""
        for path, (name, asked) in self._awaited.items():
            self._close_stale()
            own = os.stat(name, dir_fd=self._aside)
            if own.st_nlink == 1:  # other entries have replaced all its names
                continue
            found = lower.file(path)
            if found is None:
                what = "is a directory there" if lower.is_directory(path) else "is not there"
                raise Unfit(f"{asked} is a hard link to {_shown(path)} of a layer below, which {what}")
            directory, text = found
            status = os.stat(text, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise Unfit(f"{asked} is a hard link to {_shown(path)} of a layer below, which is no regular file")
            source = open_regular(text, directory)
            try:
                target = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._aside)
                try:
                    given = self._shown_attributes(source)
                    self.size += min(status.st_size, status.st_blocks * 512)
                    told()
                    copy_data(source, target, status)
                    set_attributes(target, status, given, status.st_atime_ns)
                finally:
                    os.close(target)
            finally:
                os.close(source)
            above, _, base = path.rpartition(b"/")
            parent = self._directory(above, asked)
            with suppress(FileExistsError):  # the layer has a file of its own there, or deletes it
                os.link(name, base, src_dir_fd=self._aside, dst_dir_fd=parent.fd, follow_symlinks=False)

    def _shown_attributes(self, file: int) -> dict[str, bytes]:
        """Those of a file of a layer below that one of this layer takes over; they count."""
        return self._counted({key: value for key, value in attributes(file).items() if is_shown_by_overlay(key, self._prefix)})

    def _counted(self, attributes: dict[str, bytes]) -> dict[str, bytes]:
        self.size += sum(map(len, attributes.values()))
        return attributes

    # -- what overlayfs reads

    def _hide(self, parent: _Open, base: bytes, entry: Entry) -> None:
        """What a ``.wh.`` file says: it is of the layers below, whether it comes before or after what this layer has there."""
        if base.startswith(_OTHER):
            if base == _OPAQUE and not self._lowest:
                self._made[parent.path].opaque = True
            return  # of aufs's own
        name = base.removeprefix(_WHITEOUT)
        if name in (b"", b".", b".."):
            raise Unfit(f"{_shown(entry.name)} is a whiteout of nothing")
        if self._lowest:
            return
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent.fd)
        except FileExistsError:
            there = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
            if stat.S_ISDIR(there.st_mode):
                self._made[_joined(parent.path, name)].opaque = True
            return
        path = _joined(parent.path, name)
        if path not in self._hidden:
            self._remember(path)
            self._hidden.add(path)
        try:
            os.chown(name, *self._owners.of(entry.uid, entry.gid)[:2], dir_fd=parent.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _UNKEPT:
                raise

    def _hides(self, path: bytes, lower: Lower) -> bool:
        """Whether there is something below that a whiteout at ``path`` hides."""
        above = path
        while above:
            above = above.rpartition(b"/")[0]
            if self._made[above].opaque:
                return False
        return lower.has(path)

    def _show(self, path: bytes) -> None:
        """Remove the whiteout at ``path``, if it is still there: in a directory that is not merged the kernel would list it."""
        above, _, name = path.rpartition(b"/")
        with suppress(FileNotFoundError, NotADirectoryError):
            fd = open_beneath(above, self._top.fd, _DIRECTORY)
            try:
                if _is_whiteout(os.stat(name, dir_fd=fd, follow_symlinks=False)):
                    os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)

    # -- owners, modes, attributes, times

    def _dress(self, fd: int, entry: Entry, owner: tuple[int, int, bool]) -> None:
        """Give the file open as ``fd`` all but its times."""
        mode = self._chown(fd, entry, owner)
        self._set_attributes(fd, entry, self._counted(entry.attributes))
        os.chmod(fd, mode)

    def _dress_unopened(self, parent: _Open, base: bytes, entry: Entry) -> None:
        owner = self._owners.of(entry.uid, entry.gid)
        if entry.kind is LINK and owner == self._as_made and parent.path and not entry.attributes:
            os.utime(base, ns=(entry.read, entry.modified), dir_fd=parent.fd, follow_symlinks=False)
            return
        path = b"/proc/self/fd/%d/%s" % (parent.fd, base)
        mode = self._chown(path, entry, owner)
        self._set_attributes(path, entry, self._counted(entry.attributes))
        if entry.kind is not LINK:
            os.chmod(path, mode)  # it is no link: it has just been made
        os.utime(path, ns=(entry.read, entry.modified), follow_symlinks=False)

    def _chown(self, file: int | bytes, entry: Entry, owner: tuple[int, int, bool]) -> int:
        """Give ``file`` its ``owner``, as far as this process may; the mode that it can have then."""
        uid, gid, is_kept = owner
        try:
            os.chown(file, uid, gid, follow_symlinks=isinstance(file, int))
        except OSError as error:
            if error.errno not in _UNKEPT:
                raise
            is_kept = False
        if is_kept:
            return entry.mode
        self.left.foreign = self.left.foreign or _shown(entry.name)
        return entry.mode if entry.kind is DIRECTORY else entry.mode & ~_SET_ID

    def _set_attributes(self, file: int | bytes, entry: Entry, attributes: dict[str, bytes]) -> None:
        for name, value in sorted(attributes.items(), reverse=True):  # users' before an ACL, which changes the mode
            if name.startswith(self._prefix):
                raise Unfit(f"{_shown(entry.name)} has the attribute {shown(name)}, which overlayfs reads as its own")
            if name.startswith("trusted."):  # containerd takes none from archives, either
                self.left.bare = self.left.bare or _shown(entry.name)
                continue
            try:
                os.setxattr(file, name, value, follow_symlinks=isinstance(file, int))
            except OSError as error:
                if error.errno not in _UNKEPT:
                    raise
                self.left.bare = self.left.bare or _shown(entry.name)

    def finish(self, layers: Sequence[str], told: Callable[[], None]) -> None:
        """Make the layer what it is to be on top of ``layers``, by their paths, the nearest first, which are whole by now.
        ``told`` is called whenever ``size`` has grown, before that is written, and may raise Unfit."""
        with Lower(layers, self._prefix) as lower:
            self._bring_up(lower, told)
            for path in self._hidden:
                if not self._hides(path, lower):
                    self._show(path)
            for path in sorted(self._made, reverse=True):  # what is in a directory before it
                self._finish_directory(path, self._made[path], lower, told)
        for name in [name for name, _ in self._awaited.values()]:
            os.unlink(name, dir_fd=self._aside)
        self._awaited.clear()

    def _finish_directory(self, path: bytes, made: _Made, lower: Lower, told: Callable[[], None]) -> None:
        try:
            fd = open_beneath(path, self._top.fd, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno not in _ELSEWHERE:
                raise
            return  # another entry has replaced it
        try:
            if os.fstat(fd).st_ino != made.inode:
                return
            below = lower.directory(path) if made.entry is None and not made.opaque else -1
            if made.entry is not None:
                mode = self._chown(fd, made.entry, self._owners.of(made.entry.uid, made.entry.gid))
                if made.attributes is not None:
                    self._set_attributes(fd, made.entry, self._kept.get(*made.attributes))
                os.chmod(fd, mode)
            elif below >= 0:
                status = os.fstat(below)
                given = self._shown_attributes(below)
                told()
                set_attributes(fd, status, given, status.st_atime_ns)
            elif path:  # as containerd makes those of which nothing is known
                os.chown(fd, *self._owners.of(0, 0)[:2])
                os.chmod(fd, 0o755)
            if made.opaque and not self._lowest:
                os.setxattr(fd, f"{self._prefix}opaque", b"y")
            if made.entry is not None:
                os.utime(fd, ns=(made.entry.read, made.entry.modified))
        finally:
            os.close(fd)

    # -- directories by their names

    def _directory(self, path: bytes, asked: str) -> _Open:
        """The directory ``path``, which is made where it is missing: then nothing is known of it but what layers below say.
        ``asked`` is what is to be in it, for sentences."""
        found = self._found(path, asked, makes=True)
        assert found is not None
        self._last = path, found
        return found

    def _found(self, path: bytes, asked: str, *, makes: bool = False) -> _Open | None:
        """The same; None where it is missing, and nobody ``makes`` it."""
        if not path:
            return self._top
        found = self._opened.get(path)
        if found is not None:
            self._opened.move_to_end(path)
            return found
        found = self._way(path, asked, makes=makes)
        return None if found is None else self._keep(path, found)

    def _way(self, path: bytes, asked: str, *, makes: bool) -> _Open | None:
        """The directory at the end of ``path``, also by links that stay below the top."""
        names, links = path.split(b"/"), 0
        while True:
            here, count = self._as_far(names)
            if count == len(names):
                return _Open(here, b"/".join(names))
            try:
                name = names[count]
                try:
                    there = os.stat(name, dir_fd=here, follow_symlinks=False)
                except FileNotFoundError:
                    if not makes:
                        return None
                    self._make_way(here, names, count)
                    continue
                if stat.S_ISLNK(there.st_mode):
                    links += 1
                    names = _joined_link(names, count, os.readlink(name, dir_fd=here), asked)
                    if links > _MOST_LINKS:
                        raise Unfit(f"{asked} leads through more than {_MOST_LINKS} links")
                elif not makes:
                    return None
                elif _is_whiteout(there):
                    os.unlink(name, dir_fd=here)
                    above = _Open(here, b"/".join(names[:count]))
                    self._new_directory(above, name, _joined(above.path, name), opaque=True)
                else:
                    raise Unfit(f"{asked} is to be in {_shown(b'/'.join(names[: count + 1]))}, which is no directory")
            finally:
                os.close(here)

    def _as_far(self, names: Sequence[bytes]) -> tuple[int, int]:
        """A descriptor of the last directory on the way by ``names`` that is there, without links, and how many names lead to
        it."""
        whole = self._end_of(names)
        if whole is not None:
            return whole, len(names)
        count, beyond = 0, len(names)  # names that lead to a directory, and names that don't
        while beyond - count > 1:
            middle = (count + beyond) // 2
            found = self._end_of(names[:middle])
            if found is None:
                beyond = middle
            else:
                os.close(found)
                count = middle
        return open_beneath(b"/".join(names[:count]), self._top.fd, _DIRECTORY), count

    def _end_of(self, names: Sequence[bytes]) -> int | None:
        """A descriptor of the directory to which ``names`` lead without links; None where they don't."""
        try:
            return open_beneath(b"/".join(names), self._top.fd, _DIRECTORY)
        except OSError as error:
            if error.errno in _ELSEWHERE:
                return None
            raise

    def _make_way(self, here: int, names: Sequence[bytes], count: int) -> None:
        """Make the directories ``names`` behind the first ``count``, which are open as ``here``."""
        parent = _Open(os.dup(here), b"/".join(names[:count]))
        try:
            for name in names[count:]:
                path = _joined(parent.path, name)
                self._new_directory(parent, name, path, opaque=False)
                self.files += 1
                below = os.open(name, _DIRECTORY, dir_fd=parent.fd)
                os.close(parent.fd)
                parent = _Open(below, path)
        finally:
            os.close(parent.fd)

    def _keep(self, path: bytes, found: _Open) -> _Open:
        self._opened[path] = found
        if len(self._opened) > _OPEN:
            self._stale.append(self._opened.popitem(last=False)[1])
            if self._last[1] is self._stale[-1]:
                self._last = b"", self._top
        return found

    def _forget(self) -> None:
        """Look all directories up anew from now on: one of them may have another name, or none."""
        self._last = b"", self._top
        self._stale += self._opened.values()
        self._opened.clear()

    def _close_stale(self) -> None:
        for found in self._stale:
            os.close(found.fd)
        self._stale.clear()

    def _take_away(self, parent: _Open, base: bytes) -> None:
        """Make room at ``base``, for another entry of the same name."""
        self.has_replaced = True
        try:
            os.unlink(base, dir_fd=parent.fd)
        except (IsADirectoryError, PermissionError):
            os.rename(base, b"%d" % self._moved, src_dir_fd=parent.fd, dst_dir_fd=self._aside)
            self._moved += 1
        self._forget()


def _names(path: bytes) -> list[bytes]:
    """The names that lead to ``path`` from the top; none for the top itself."""
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise Unfit(f"{_shown(path)} leads out of the layer: there is a .. in it")
    if path.startswith(b"/") and names:
        raise Unfit(f"{_shown(path)} is an absolute path, and no place in a layer")
    return names


def _joined(above: bytes, name: bytes) -> bytes:
    return above + b"/" + name if above else name


def _joined_link(names: Sequence[bytes], count: int, target: bytes, asked: str) -> list[bytes]:
    """``names``, of which the one behind the first ``count`` is a link to ``target``, without that link."""
    way = list(names[:count])
    link = f"{asked} leads through the link {_shown(b'/'.join(names[: count + 1]))} to {_shown(target)}"
    if target.startswith(b"/"):
        raise Unfit(f"{link}, out of the layer")
    for name in target.split(b"/"):
        if name == b"..":
            if not way:
                raise Unfit(f"{link}, out of the layer")
            way.pop()
        elif name not in (b"", b"."):
            way.append(name)
    return [*way, *names[count + 1 :]]


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _shown(path: bytes) -> str:
    return shown(os.fsdecode(path))
