"""Whole copies of a directory, by reflinks where its file system has them; and removing one.

A copy has all that ``cp -a`` keeps: modes, times, owners as far as this user may give them, extended attributes, links to
other files of the copy.  Sockets are left out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress

from snapfs.kernel import inside
from snapfs.kernel.mounttable import mount_id_of
from snapfs.scan.walk import Descriptors, Directory
from snapfs.testing import capabilities

_FICLONE = 0x40049409
_NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_PART = 1 << 30  # bytes that one call copies at most


def can_clone(directory: str) -> bool:
    """Whether the file system of ``directory`` has reflinks."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(b"x" * 8192)
        return _cloned(source.fileno(), target.fileno())


def is_unreadable(directory: str) -> bool:
    """Whether anything in ``directory`` has a mode that keeps its own owner from copying it."""
    return os.geteuid() != 0 and next(_unreadable(directory), None) is not None


@contextlib.contextmanager
def readable(directory: str) -> Iterator[dict[str, int]]:
    """Within it, all in ``directory`` can be copied; the modes that were changed for that, by path."""
    modes: dict[str, int] = {}
    try:
        for path, mode in _unreadable(directory):
            modes[path] = mode
            os.chmod(path, mode | _readable(mode))
        yield modes
    finally:
        for path in reversed(modes):
            os.chmod(path, stat.S_IMODE(modes[path]))


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
    ``modes`` are those that are not to be as they are.  Raises OSError."""
    _Copy(clone, modes or {}).directory(source, target, os.lstat(source))


class _Copy:
    def __init__(self, clone: bool, modes: Mapping[str, int]) -> None:
        self._modes = modes
        self._clone = clone
        self._linked: dict[tuple[int, int], str] = {}
        self._uid, self._gid = os.geteuid(), os.getegid()

    def directory(self, source: str, target: str, status: os.stat_result) -> None:
        pending = [(source, target, status)]
        made = []
        while pending:
            source, target, status = pending.pop()
            os.mkdir(target, 0o700)
            made.append((source, target, status))
            with os.scandir(source) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    path = f"{target}/{entry.name}"
                    if stat.S_ISDIR(found.st_mode):
                        pending.append((entry.path, path, found))
                    else:
                        self.other(entry.path, path, found)
        for source, target, status in reversed(made):  # last, for what is made in a directory changes it
            self.attributes(source, target, status)

    def other(self, source: str, target: str, status: os.stat_result) -> None:
        """Copy ``source``, which is no directory."""
        if status.st_nlink > 1:
            first = self._linked.setdefault((status.st_dev, status.st_ino), target)
            if first != target:
                os.link(first, target, follow_symlinks=False)
                return
        if stat.S_ISREG(status.st_mode):
            self.file(source, target, status)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), target)
        elif stat.S_ISSOCK(status.st_mode):
            return
        else:
            os.mknod(target, status.st_mode, status.st_rdev)
        self.attributes(source, target, status)

    def file(self, source: str, target: str, status: os.stat_result) -> None:
        reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if status.st_size and not (self._clone and _cloned(reading, writing)):
                    _copy(reading, writing, status)
            finally:
                os.close(writing)
        finally:
            os.close(reading)

    def attributes(self, source: str, target: str, status: os.stat_result) -> None:
        mode = stat.S_IMODE(self._modes.get(source, status.st_mode))
        if (status.st_uid, status.st_gid) != (self._uid, self._gid):
            try:
                os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
                mode &= ~(stat.S_ISUID | stat.S_ISGID)
        is_link = stat.S_ISLNK(status.st_mode)
        if not is_link:
            with suppress(OSError):
                for name in os.listxattr(source):
                    with suppress(OSError):  # of a kind that this user may not set
                        os.setxattr(target, name, os.getxattr(source, name))
            os.chmod(target, mode)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONES:
            raise
        return False
    return True


def _copy(source: int, target: int, status: os.stat_result) -> None:
    """Copy the bytes of ``source``; holes stay holes."""
    end = status.st_size
    if status.st_blocks * 512 >= end:
        _copy_range(source, target, 0, end)
        return
    here = 0
    while here < end:
        try:
            here = os.lseek(source, here, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                break
            raise
        hole = os.lseek(source, here, os.SEEK_HOLE)
        _copy_range(source, target, here, min(hole, end))
        here = hole
    os.truncate(target, end)


def _copy_range(source: int, target: int, here: int, end: int) -> None:
    while here < end:
        try:
            count = os.copy_file_range(source, target, min(end - here, _PART), here, here)
        except OSError as error:
            if error.errno not in (*_NO_CLONES, errno.EBADF, errno.EIO):
                raise
            count = os.pwrite(target, os.pread(source, min(end - here, 1 << 20), here), here)
        if not count:  # it has become shorter
            return
        here += count


def size_of(directory: str) -> int:
    """The bytes on the disk of all that is in ``directory``."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in (*names, "."):
            with suppress(OSError):
                total += os.lstat(f"{path}/{name}").st_blocks * 512
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


def path_of(directory: Directory) -> str:
    """Its path, from the first on that has one."""
    names = [directory.name]
    while (above := directory.parent) is not None:
        directory = above
        names.append(directory.name)
    return "/".join(reversed(names))


def _make_writable(name: str, parent: int | None = None) -> None:
    """Let the owner write each directory in the directory ``name`` of ``parent``, but none on which something is mounted.  By
    descriptors: a process of another user, whose files these may be, could put a link to any other directory in the place of
    one."""
    try:
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return
    try:
        if parent is not None and mount_id_of(fd) != mount_id_of(parent):
            return
        itself = f"/proc/self/fd/{fd}"
        with suppress(PermissionError):
            os.chmod(itself, 0o700)
        with suppress(OSError):  # removing it will tell
            with os.scandir(itself) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for each in names:
                _make_writable(each, fd)
    finally:
        os.close(fd)
