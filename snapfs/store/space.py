"""The disk space of the records, allocated before it is needed, so that removing works on a full disk.

LMDB writes each page that changes to another place: even a deletion takes new pages, some ten for each snapshot.  So the file
is longer than what is in use: its blocks are allocated ahead, a step at a time, and LMDB may use them up to ``size``, which is
the size of its map.  The last ``RESERVE`` bytes are for removing alone.  So a full disk is noticed when more blocks are to be
allocated, before anything has been changed, and other programs that fill the disk can't take the reserve away.

File systems that write nothing in place, where a quota is used up, refuse to write even to allocated blocks (EDQUOT), but still
remove files.  On these a file of its own is the reserve: it is removed where room is needed (``release_reserve``).
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import stat
from contextlib import suppress

from snapfs.errors import Unavailable
from snapfs.kernel import mounting

RESERVE = 1 << 20  # bytes
STEP = 1 << 20  # bytes that are allocated at once, at least, while the disk has plenty
MOST = 64 << 20  # bytes that are allocated at once, at most

_PAGE = mmap.PAGESIZE

_NEVER_IN_PLACE = (0x9123683E, 0x2FC12FC1, 0xCA451A4E)  # statfs(2)'s types of btrfs, zfs, bcachefs

_LEAST = 4 * _PAGE  # bytes that are allocated at once on a disk that is nearly full

_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # only musl says so; glibc writes zeros instead

_GET_FLAGS, _SET_FLAGS, _NO_COPY_ON_WRITE = 0x80086601, 0x40086602, 0x00800000  # FS_IOC_…, FS_NOCOW_FL of linux/fs.h


class Space:
    """The disk blocks of one file, which must exist.

    ``size``: how many bytes of the file LMDB may use.  ``allocated``: how many bytes have blocks on the disk.
    ``lacks_reserve``: the disk had no room for the whole reserve.

    All functions block on the disk.  The object locks the file: raises Unavailable where another process, or another such
    object, has locked it, or where it is no regular file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # kept: a full table of descriptors must not stop growth
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):  # LMDB would wait for what a fifo has to say
            os.close(self._fd)
            raise Unavailable(f"the records in {path} can't be used: that is not a file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Unavailable(f"the records in {path} are in use by another process; stop that one first") from None
        self.size = 0
        self.allocated = allocated_bytes(os.fstat(self._fd))
        self.lacks_reserve = True
        self._spare = f"{path}-reserve" if mounting.file_system_magic(path) in _NEVER_IN_PLACE else None

    def close(self) -> None:
        """Unlock and close the file; twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def refill_reserve(self) -> None:
        """Allocate the reserve; raises OSError where the disk has no room for it."""
        self._allocate_up_to(self.size + RESERVE)
        if self._spare is not None:
            _make_reserve_file(self._spare, RESERVE)
        self.lacks_reserve = False

    def release_reserve(self) -> bool:
        """Remove the file that is the reserve, and return when its blocks are free.  False where there is no such file.  Raises
        OSError."""
        if self._spare is None:
            return False
        try:
            os.unlink(self._spare)
        except FileNotFoundError:
            return False
        self.lacks_reserve = True
        mounting.sync_file_system(self._fd)  # until then what is gone counts
        return True

    def extend(self) -> int:
        """Allocate blocks for more than ``size`` bytes, and for the reserve behind them; returns the new size.  Raises OSError
        where the disk has no room."""
        space = os.fstatvfs(self._fd)
        free = space.f_bavail * space.f_frsize
        step = min(max(STEP, self.size // 2), MOST, free // 4)  # never the last room of a disk that others write to as well
        step = max(step - step % _PAGE, _LEAST)
        self._allocate_up_to(self.size + step + RESERVE)
        self.lacks_reserve = False
        return self.size + step

    def _allocate_up_to(self, wanted: int) -> None:
        before = os.fstat(self._fd).st_size
        try:
            os.posix_fallocate(self._fd, 0, wanted)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                os.ftruncate(self._fd, before)  # some blocks may have been allocated
                raise OSError(error.errno, error.strerror, self._path) from None
        self.allocated = max(self.allocated, wanted)


def _make_reserve_file(path: str, size: int) -> None:
    """Make a file ``path`` of ``size`` allocated bytes, unless it is there; raises OSError, having left no file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def refuse_without_address_space(more: int) -> None:
    """Raise OSError (ENOMEM) where the address space has no room for ``more`` bytes besides (RLIMIT_AS).

    LMDB unmaps its old map before it asks the kernel for the new one: where the kernel refuses that, LMDB has none at all.
    """
    if more > 0:
        mmap.mmap(-1, more, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()


def allocated_bytes(file: os.stat_result) -> int:
    """How many bytes of a file have blocks on the disk: a sparse one, as a copy may be, has fewer than it is long."""
    return min(file.st_size, file.st_blocks * 512)


def make_file(path: str) -> None:
    """Make an empty file ``path``, unless there is one; on btrfs one that is written in place where its blocks are allocated.
    Raises OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        with suppress(OSError):  # other file systems know no such flag, or write in place anyway
            flags = array.array("l", [0])
            fcntl.ioctl(fd, _GET_FLAGS, flags)
            flags[0] |= _NO_COPY_ON_WRITE
            fcntl.ioctl(fd, _SET_FLAGS, flags)
    finally:
        os.close(fd)
