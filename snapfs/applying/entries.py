"""Files and directories as they are seen in a directory that is held open: what tells two of them apart."""

from __future__ import annotations

import base64
import errno
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Protocol

from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.scan.copying import open_regular, read_attributes
from snapfs.scan.differing import hold_the_same

_KINDS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
}
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OF_THE_SYSTEM = ("security.selinux", "security.ima", "security.evm")  # the kernel gives them by itself


class Entry(NamedTuple):
    """One file of whatever kind: ``kind`` is f, d, l, p, s, c or b (file, directory, link, FIFO, socket, devices); times
    are ns since the epoch; ``link``: where a link leads; ``attributes``: the extended ones, values in base64."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    atime: int
    ctime: int
    dev: int
    ino: int
    nlink: int
    rdev: int
    link: str
    attributes: dict[str, str]

    @property
    def is_linked(self) -> bool:
        """Whether it has several names."""
        return self.nlink > 1 and self.kind != "d"

    @property
    def own(self) -> tuple[object, ...]:
        """All that belongs to it besides what it holds, but for its times."""
        return self.mode, self.uid, self.gid, self.attributes


class Seen(Protocol):
    """A tree of files, of which paths are bytes, without a slash at the beginning; "" is its top."""

    def look(self, path: bytes) -> Entry | None:
        """What is at ``path``; None where nothing is.  Raises OSError."""

    def below(self, path: bytes) -> Iterator[tuple[bytes, Entry]]:
        """What is at ``path``, if anything, and all that is in it, each directory before what is in it.  Raises OSError."""

    def names(self, path: bytes) -> list[bytes]:
        """What the directory ``path`` lists.  Raises OSError."""

    def content(self, path: bytes) -> int | None:
        """A descriptor of the regular file ``path``, for reading; None where nobody knows what it held.  Raises OSError."""


class Held:
    """A directory, which is held open as ``top`` until ``close``; ``name`` is what it is called in sentences.

    Nothing is opened but directories, and regular files to be read; no link is followed, and no mount entered: that is an
    OSError EXDEV, whose ``filename`` is the path, as with all others."""

    def __init__(self, top: int, name: str) -> None:
        self.top = top
        self.name = name
        self._parent = (b"", -1)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.forget()
        os.close(self.top)

    def forget(self) -> None:
        """Let go of the directory that was looked into last: by its path it may be another."""
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = (b"", -1)

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """A descriptor (O_PATH) of the directory that ``path`` is in, good until the next call, and the name in there."""
        directory, _, name = path.rpartition(b"/")
        if self._parent[1] < 0 or self._parent[0] != directory:
            self.forget()
            self._parent = directory, self._open(directory, LOOK | os.O_DIRECTORY)
        return self._parent[1], name

    def look(self, path: bytes) -> Entry | None:
        try:
            if not path:
                return entry_of(self.top)
            parent, name = self.parent(path)
            found = open_beneath(name, parent, LOOK)
        except OSError as error:
            if error.errno in _GONE:
                return None
            error.filename = path
            raise
        try:
            return entry_of(found)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(found)

    def below(self, path: bytes) -> Iterator[tuple[bytes, Entry]]:
        waiting = [path]
        while waiting:
            here = waiting.pop()
            entry = self.look(here)
            if entry is None:
                continue
            yield here, entry
            if entry.kind == "d":
                prefix = here + b"/" if here else b""
                waiting += [prefix + name for name in sorted(self.names(here), reverse=True)]

    def names(self, path: bytes) -> list[bytes]:
        """What the directory ``path`` lists; nothing where it is gone.  Raises OSError."""
        try:
            directory = self.directory(path)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        try:
            return [os.fsencode(name) for name in os.listdir(directory)]
        finally:
            os.close(directory)

    def directory(self, path: bytes) -> int:
        """A descriptor of the directory ``path``, for listing.  Raises OSError."""
        return self._open(path, os.O_RDONLY | os.O_DIRECTORY)

    def content(self, path: bytes) -> int:
        parent, name = self.parent(path)
        try:
            return open_regular(os.fsdecode(name), parent)
        except OSError as error:
            error.filename = path
            raise

    def _open(self, path: bytes, flags: int) -> int:
        try:
            return open_beneath(path, self.top, flags)
        except OSError as error:
            error.filename = path
            raise


def entry_of(fd: int) -> Entry:
    """What is open as ``fd`` (O_PATH will do).  Raises OSError."""
    found = os.fstat(fd)
    kind = _KINDS[stat.S_IFMT(found.st_mode)]
    return Entry(
        kind,
        stat.S_IMODE(found.st_mode),
        found.st_uid,
        found.st_gid,
        found.st_size if kind != "d" else 0,
        found.st_mtime_ns,
        found.st_atime_ns,
        found.st_ctime_ns,
        found.st_dev,
        found.st_ino,
        found.st_nlink,
        found.st_rdev if kind in "cb" else 0,
        os.readlink("", dir_fd=fd) if kind == "l" else "",
        _attributes(fd) if kind != "l" else {},
    )


def _attributes(fd: int) -> dict[str, str]:
    path = f"/proc/self/fd/{fd}"
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EACCES):
            raise
        return {}
    names = [name for name in names if name not in _OF_THE_SYSTEM]
    found = read_attributes(path, names, unread=(errno.ENODATA, errno.EACCES, errno.EPERM))
    return {name: base64.b64encode(value).decode() for name, value in found.items()}


def alike(path: bytes, one: Entry, tree: Seen, other: Entry, other_tree: Seen) -> bool:
    """Whether ``path`` is as good as the same in both: kind, permissions, size and where it leads; and where the time of a file
    differs, what it holds, which is read then.  A directory has no time here.  Raises OSError."""
    if (one.kind, one.mode, one.size, one.link, one.rdev) != (other.kind, other.mode, other.size, other.link, other.rdev):
        return False
    return one.kind != "f" or one.mtime == other.mtime or _hold_the_same(path, tree, other_tree, one.size)


def exact(path: bytes, one: Entry, tree: Seen, other: Entry, other_tree: Seen) -> bool:
    """Whether ``path`` is the same in both, with owners, attributes, the time of the last change, and all bytes.  Raises
    OSError."""
    before, after = ((each.kind, each.own, each.size, each.link, each.rdev) for each in (one, other))
    if before != after or (one.kind != "d" and one.mtime != other.mtime):
        return False
    return one.kind != "f" or _hold_the_same(path, tree, other_tree, one.size)


def _hold_the_same(path: bytes, tree: Seen, other_tree: Seen, size: int) -> bool:
    first = tree.content(path)
    if first is None:
        return False
    try:
        second = other_tree.content(path)
        if second is None:
            return False
        try:
            return os.fstat(first).st_size == os.fstat(second).st_size and hold_the_same(first, second, size, lambda: None)
        finally:
            os.close(second)
    finally:
        os.close(first)


def merged(base: Entry | None, wanted: Entry, there: Entry | None) -> Entry:
    """``wanted``, but with the owner, group and attributes of what is ``there``, as far as ``wanted`` has these as ``base`` has
    them: what nobody changed stays, also where the base is a copy by somebody who may not give files away."""
    if base is None or there is None:
        return wanted
    names = {*wanted.attributes, *there.attributes}
    found = {}
    for name in names:
        value = wanted.attributes.get(name)
        if value == base.attributes.get(name):
            value = there.attributes.get(name)
        if value is not None:
            found[name] = value
    return wanted._replace(
        uid=there.uid if wanted.uid == base.uid else wanted.uid,
        gid=there.gid if wanted.gid == base.gid else wanted.gid,
        attributes=found,
    )
