"""Copying files: their data, by reflinks where the file system has them, and what belongs to them besides."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Container, Iterable
from contextlib import suppress

_FICLONE = 0x40049409
_NO_CLONES = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_PART = 1 << 30  # bytes that one call copies at most
_ANY = range(1, 1 << 12)  # errnos

ATTRIBUTES = 4 << 20  # bytes in the extended attributes of one file: it may have thousands, of 64 KiB each

VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL)
"""What a look at a name is refused with that has gone meanwhile, or means another kind of file (the last is AnotherKind's)."""


class AnotherKind(OSError):
    """What was one kind of file is another by now."""


def open_regular(name: str, directory: int | None = None) -> int:
    """A descriptor for reading of the regular file ``name``, in the one open as ``directory``.  Raises AnotherKind where it is
    another kind of file, which is not opened: with a device that may do something; and OSError."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise AnotherKind(errno.EINVAL, "It was a regular file, and is none any more", name)
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        error.filename = name
        raise
    finally:
        os.close(found)


def target_of(name: str, directory: int) -> str:
    """Where the symbolic link ``name`` leads, in the directory open as ``directory``.  Raises AnotherKind, and OSError."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise AnotherKind(errno.EINVAL, "It was a link, and is none any more", name) from None
        raise


def read_attributes(
    file: int | bytes | str, names: Iterable[str], *, follow: bool = True, unread: Container[int] = ()
) -> dict[str, bytes]:
    """The extended attributes ``names`` of ``file``, but those that are refused with an errno in ``unread``.  Raises OSError:
    E2BIG where they have more than ATTRIBUTES bytes together."""
    found, size = dict[str, bytes](), 0
    for name in names:
        try:
            value = os.getxattr(file, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in unread:
                raise
            continue
        found[name] = value
        size += len(value)
        if size > ATTRIBUTES:
            raise OSError(errno.E2BIG, "It has more than 4 MiB of extended attributes")
    return found


def attributes_of(file: int | str) -> dict[str, bytes]:
    """The extended attributes of ``file``, as far as this user may read them.  Raises OSError: E2BIG, as above."""
    names = list[str]()
    with suppress(OSError):
        names = os.listxattr(file)
    return read_attributes(file, names, unread=_ANY)


def attributes_unopened(name: str, parent: int) -> dict[str, bytes]:
    """The same of a FIFO or a device: to open one may do something."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        return attributes_of(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def clone(source: int, target: int) -> bool:
    """Have the empty file open as ``target`` share all blocks with the one open as ``source``; whether that could be done.
    Raises OSError where it could but for the disk."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONES:
            raise
        return False
    return True


def copy_data(source: int, target: int, status: os.stat_result) -> None:
    """Copy the bytes of the file open as ``source``, whose ``status`` that is, into the empty one open as ``target``; holes
    stay holes.  Raises OSError."""
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
