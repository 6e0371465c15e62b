"""Whole copies of a directory, by reflinks where its file system has them; and removing one.

A copy has all that ``cp -a`` keeps: modes, times, owners as far as this user may give them, extended attributes, links to
other files of the copy.  Sockets are left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress

from snapfs.kernel import inside
from snapfs.kernel.mounttable import mount_id_of
from snapfs.scan.copying import attributes_of, attributes_unopened, clone, copy_data, open_regular
from snapfs.scan.walk import Descriptors, Directory, Entering, path_of
from snapfs.testing import capabilities

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def can_clone(directory: str) -> bool:
    """Whether the file system of ``directory`` has reflinks."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(b"x" * 8192)
        return clone(source.fileno(), target.fileno())


def is_unreadable(directory: str) -> bool:
    """Whether anything in ``directory`` has a mode that keeps its own owner from copying it."""
    return os.geteuid() != 0 and next(_unreadable(directory), None) is not None


@contextlib.contextmanager
def readable(directory: str) -> Iterator[dict[str, int]]:
    """Within it, all in ``directory`` can be copied; the modes that were changed for that, by path.  Root needs no other modes.

    Others may write in there: no link is followed, and no mode is given to anything but the file that it was of."""
    modes: dict[str, int] = {}
    changed: list[tuple[str, os.stat_result]] = []
    try:
        for path, mode in _unreadable(directory) if os.geteuid() != 0 else ():
            with _held(directory, path) as fd:
                found = os.fstat(fd)
                if found.st_mode != mode:
                    raise OSError(errno.EINVAL, "It has become another file", path)
                modes[path] = mode
                changed.append((path, found))
                os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(mode) | _readable(mode))
        yield modes
    finally:
        for path, found in reversed(changed):
            with suppress(FileNotFoundError, NotADirectoryError), _held(directory, path) as fd:
                if _identity(os.fstat(fd)) == _identity(found):
                    os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(found.st_mode))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """By what a file is the same: a new one may have gotten the inode number of one that is gone."""
    return status.st_dev, status.st_ino, status.st_uid, stat.S_IFMT(status.st_mode)


@contextlib.contextmanager
def _held(directory: str, path: str) -> Iterator[int]:
    """A descriptor (O_PATH) of ``path``, which is ``directory`` or in there, where no link is followed.  Raises OSError."""
    fd = os.open(directory, _LOOK)
    try:
        for name in path[len(directory) + 1 :].split("/") if path != directory else ():
            below = os.open(name, _LOOK, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _readable(mode: int) -> int:
    """The bits that the owner needs."""
    return 0o500 if stat.S_ISDIR(mode) else 0o400


def _unreadable(directory: str) -> Iterator[tuple[str, int]]:
    pending = [directory]
    while pending:
        path = pending.pop()
        mode = os.lstat(path).st_mode
        if (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) and mode & _readable(mode) != _readable(mode):
            yield path, mode
        if stat.S_ISDIR(mode):
            with suppress(PermissionError):
                pending += [f"{path}/{name}" for name in os.listdir(path)]


def copy_tree(source: str, target: str, *, clone: bool, modes: Mapping[str, int] | None = None) -> None:
    """Make ``target``, a copy of the directory ``source``; with ``clone`` files share their blocks with it where they can.
    ``modes`` are those that are not to be as they are.

    Whoever may write in ``source`` meanwhile leads nothing elsewhere: no link is followed there, and no FIFO waited for.
    However deep the directories are, they cost no more than a few descriptors.  Raises OSError, also where a file or a
    directory is another kind of file by then."""
    with Entering() as of_source, Entering() as of_target:
        _Copy(clone, modes or {}, of_source, of_target).directory(source, target)


class _Copy:
    """Targets may be named in their directories, for nobody else can enter those before all is in there."""

    def __init__(self, clone: bool, modes: Mapping[str, int], of_source: Descriptors, of_target: Descriptors) -> None:
        self._modes = modes
        self._clone = clone
        self._descriptors = of_source
        self._targets = of_target
        self._linked: dict[tuple[int, int], Directory] = {}
        self._uid, self._gid = os.geteuid(), os.getegid()

    def directory(self, source: str, target: str) -> None:
        pending = [(Directory(source), Directory(target))]
        made = []
        while pending:
            directory, new = pending.pop()
            fd = self._descriptors.get(directory)
            if fd < 0:
                raise NotADirectoryError(errno.ENOTDIR, "It was a directory, and is none any more", path_of(directory))
            status = os.fstat(fd)
            os.mkdir(new.name, 0o700, dir_fd=self.above(new))
            made.append((directory, new, status, attributes_of(fd)))
            below = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    there = Directory(entry.name, directory)
                    if stat.S_ISDIR(found.st_mode):
                        below.append((there, Directory(entry.name, new)))
                    else:
                        self.other(there, fd, Directory(entry.name, new), found)
            pending += below
            if not below:
                self._descriptors.close(directory)
                self._targets.close(new)
        for directory, new, status, more in reversed(made):  # last, for what is made in a directory changes it
            self._targets.close(new)
            self.attributes(directory, new, status, more)

    def above(self, target: Directory) -> int | None:
        """A descriptor of the directory that ``target`` is in, valid until the next call; None where ``target`` is a path."""
        return None if target.parent is None else self._targets.get(target.parent)

    def other(self, source: Directory, parent: int, target: Directory, status: os.stat_result) -> None:
        """Copy ``source``, which is no directory, in the one open as ``parent``."""
        if status.st_nlink > 1:
            first = self._linked.setdefault((status.st_dev, status.st_ino), target)
            if first != target:
                self.link(first, target)
                return
        more: dict[str, bytes] = {}
        if stat.S_ISREG(status.st_mode):
            status, more = self.file(source, parent, target)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source.name, dir_fd=parent), target.name, dir_fd=self.above(target))
        elif stat.S_ISSOCK(status.st_mode):
            return
        else:
            os.mknod(target.name, status.st_mode, status.st_rdev, dir_fd=self.above(target))
            more = attributes_unopened(source.name, parent)
        self.attributes(source, target, status, more)

    def link(self, first: Directory, target: Directory) -> None:
        """Give the file ``first`` the name ``target``, too."""
        assert first.parent is not None
        above = os.dup(self._targets.get(first.parent))  # to reach the other may close it
        try:
            os.link(first.name, target.name, src_dir_fd=above, dst_dir_fd=self.above(target), follow_symlinks=False)
        finally:
            os.close(above)

    def file(self, source: Directory, parent: int, target: Directory) -> tuple[os.stat_result, dict[str, bytes]]:
        """Copy a regular file; what was read of it besides."""
        try:
            reading = open_regular(source.name, parent)
        except OSError as error:
            error.filename = path_of(source)
            raise
        try:
            status = os.fstat(reading)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            writing = os.open(target.name, flags, 0o600, dir_fd=self.above(target))
            try:
                if status.st_size and not (self._clone and clone(reading, writing)):
                    copy_data(reading, writing, status)
            finally:
                os.close(writing)
            return status, attributes_of(reading)
        finally:
            os.close(reading)

    def attributes(self, source: Directory, target: Directory, status: os.stat_result, more: Mapping[str, bytes]) -> None:
        above = self.above(target)
        mode = stat.S_IMODE(self._modes.get(path_of(source), status.st_mode) if self._modes else status.st_mode)
        if (status.st_uid, status.st_gid) != (self._uid, self._gid):
            try:
                os.chown(target.name, status.st_uid, status.st_gid, dir_fd=above, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
                mode &= ~(stat.S_ISUID | stat.S_ISGID)
        if not stat.S_ISLNK(status.st_mode):
            for name, value in more.items():
                with suppress(OSError):  # of a kind that this user may not set
                    os.setxattr(target.name if above is None else f"/proc/self/fd/{above}/{target.name}", name, value)
            os.chmod(target.name, mode, dir_fd=above)
        os.utime(target.name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=above, follow_symlinks=False)


def size_of(directory: str) -> int:
    """The bytes on the disk of all that is in ``directory``, as far as this user may look into it."""
    total = 0
    with _Beneath() as descriptors:
        pending = [Directory(directory)]
        while pending:
            each = pending.pop()
            with suppress(OSError):
                if (fd := descriptors.get(each)) < 0:
                    continue
                total += os.fstat(fd).st_blocks * 512
                with os.scandir(fd) as entries:
                    found = list(entries)
                for entry in found:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Directory(entry.name, each))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def remove_tree(directory: str) -> None:
    """Remove ``directory`` with all that is in it, whatever modes it has.  What is mounted in there stays, with all that it
    holds, and no server of it is asked.  Raises OSError when all else is removed: EBUSY where something is mounted."""
    with capabilities.raised():
        refused = _remove(directory)
        if any(isinstance(error, PermissionError) for error in refused):
            _make_writable(directory)
            refused = _remove(directory)
    if refused:
        raise refused[0]


class _Beneath(Descriptors):
    """Directories, and not what is mounted on them, but for what is on the first."""

    def open(self, name: str, parent: int | None) -> int:
        return os.open(name, inside.FLAGS) if parent is None else inside.open_directory(name, parent)


def _remove(directory: str) -> list[OSError]:
    """Remove what can be removed of ``directory``; the errors of all else."""
    refused: list[OSError] = []
    with _Beneath() as descriptors:
        pending = [(Directory(directory), False)]
        while pending:
            each, is_empty = pending.pop()
            with _noted(refused, each):
                if is_empty:
                    descriptors.close(each)
                    above = None if each.parent is None else descriptors.get(each.parent)
                    if above is None or above >= 0:
                        os.rmdir(each.name, dir_fd=above)
                elif (fd := descriptors.get(each)) >= 0:
                    pending.append((each, True))
                    pending += [(below, False) for below in _unlinked(fd, each, refused)]
    return refused


def _unlinked(fd: int, directory: Directory, refused: list[OSError]) -> list[Directory]:
    """Remove all in ``directory``, which is open as ``fd``, but the directories, which are returned."""
    with os.scandir(fd) as entries:
        found = list(entries)
    below = []
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            below.append(Directory(entry.name, directory))
        else:
            with _noted(refused, Directory(entry.name, directory)):
                os.unlink(entry.name, dir_fd=fd)
    return below


@contextlib.contextmanager
def _noted(refused: list[OSError], about: Directory) -> Iterator[None]:
    """Add an error in here to ``refused``, unless it is that ``about`` is gone."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        refused.append(OSError(error.errno, error.strerror, path_of(about)))


class _Opening(Descriptors):
    """Directories whose owner may write them as soon as they were opened (with O_PATH), but none on which something is mounted.
    By descriptors: a process of another user, whose files these may be, could put a link to any other directory in the place of
    one."""

    def open(self, name: str, parent: int | None) -> int:
        fd = os.open(name, _LOOK | os.O_DIRECTORY, dir_fd=parent)
        try:
            if parent is not None and mount_id_of(fd) != mount_id_of(parent):
                raise NotADirectoryError(errno.ENOTDIR, "Something is mounted there", name)
            with suppress(PermissionError):
                os.chmod(f"/proc/self/fd/{fd}", 0o700)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _make_writable(directory: str) -> None:
    """Let the owner write ``directory`` and each directory in there, but none on which something is mounted."""
    with _Opening() as descriptors:
        pending = [Directory(directory)]
        while pending:
            each = pending.pop()
            with suppress(OSError):  # removing it will tell
                if (fd := descriptors.get(each)) >= 0:
                    with os.scandir(f"/proc/self/fd/{fd}") as entries:
                        pending += [Directory(entry.name, each) for entry in entries if entry.is_dir(follow_symlinks=False)]
