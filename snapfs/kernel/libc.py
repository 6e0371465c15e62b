"""The C library's functions as ctypes sees them; every call goes through ``call``, which raises OSError."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from typing import Any

_CLONE_FS = 0x200

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_WRITE_AND_WAIT = 0x7  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
_SIZE_OF_STATX, _STX_DEV, _STX_MNT_ID = 256, 136, 144
"""Of struct statx (statx(2)), and where in it the device's major and minor number are, and the mount's."""

_STATX_MNT_ID = 0x1000  # in its mask, from Linux 5.8 on

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long


RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h

RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_CACHED = 0x01, 0x02, 0x04, 0x08, 0x20
"""Of linux/openat2.h."""


class OpenHow(ctypes.Structure):
    """``struct open_how``: O_* as flags, a mode, and RESOLVE_*."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)  # where it isn't known, or can't be asked, nothing is known
_KCMP_FILES = 2
_OPENAT2 = 437  # on every architecture
_SIZE_OF_HOW = ctypes.c_size_t(ctypes.sizeof(OpenHow))


class Dirent(ctypes.Structure):
    """``struct dirent`` of glibc and musl on 64-bit Linux (readdir(3))."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


_libc.readdir.restype = ctypes.POINTER(Dirent)


def call(function: str, *arguments: Any) -> int:
    """Call ``function`` of the C library (the interpreter's lock is released meanwhile); raises OSError where it fails."""
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def device_number(path: str) -> int:
    """``st_dev`` of the file at ``path``, as the kernel has it in memory: a server of a file system, which may never answer, is
    not asked.  Links are followed, by name too.  Raises OSError."""
    found = ctypes.create_string_buffer(_SIZE_OF_STATX)
    call("statx", _AT_FDCWD, os.fsencode(path), _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC, 0, found)
    major, minor = struct.unpack_from("II", found, _STX_DEV)
    return os.makedev(major, minor)


def mount_number(path: str | int) -> int | None:
    """The id of the mount that ``path`` is on, or on which that descriptor is open; of a mountpoint, that of the mount on it.
    Links are not followed, no server of a file system is asked, and this process need not be let in.  None where the kernel
    doesn't tell that in this way: before Linux 5.8, and where a file system, shut down, say, tells nothing of its files."""
    found = ctypes.create_string_buffer(_SIZE_OF_STATX)
    if isinstance(path, str):
        where, flags = (_AT_FDCWD, os.fsencode(path)), _AT_SYMLINK_NOFOLLOW
    else:
        where, flags = (path, b""), _AT_EMPTY_PATH
    try:
        call("statx", *where, flags | _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC, 0, found)
    except OSError:
        return None
    told, number = struct.unpack_from("I", found)[0], struct.unpack_from("Q", found, _STX_MNT_ID)[0]
    return int(number) if told & _STATX_MNT_ID else None


def share_files(one: int, other: int) -> bool:
    """Whether two threads are known to have the same descriptors, and not their own (kcmp(2)).  Raises no OSError."""
    with contextlib.suppress(OSError):
        return _KCMP is not None and call("syscall", _KCMP, one, other, _KCMP_FILES, 0, 0) == 0
    return False


def openat2(directory: int, path: bytes, how: OpenHow) -> int:
    """A descriptor of what is at ``path``, from the directory open as ``directory`` on (openat2(2), from Linux 5.6 on).  Raises
    OSError."""
    return call("syscall", _OPENAT2, directory, path, ctypes.byref(how), _SIZE_OF_HOW)


def rename(name: str | bytes, directory: int, new: str | bytes, there: int, flags: int) -> None:
    """renameat2(2): ``name`` in the directory open as ``directory`` becomes ``new`` in the one open as ``there``, both of one
    mount.  RENAME_NOREPLACE fails with EEXIST where ``new`` is there, RENAME_EXCHANGE exchanges both, in one step.  Raises
    OSError; EINVAL where the file system can't do that."""
    call("renameat2", directory, os.fsencode(name), there, os.fsencode(new), flags)


def write_out(file: int) -> None:
    """Return when what memory holds of ``file``, a descriptor, has been written to the disk, which may still have it in a cache
    (sync_file_range(2)).  Raises OSError."""
    call("sync_file_range", file, 0, 0, _WRITE_AND_WAIT)


def separate_thread() -> None:
    """Give this thread a root, a working directory and an umask of its own, for good; threads share them otherwise (unshare(2),
    CLONE_FS).  Raises OSError."""
    call("unshare", _CLONE_FS)


def directory_types(path: str) -> set[int]:
    """The ``d_type`` of all entries of the directory ``path`` but ``.`` and ``..``; 0 is DT_UNKNOWN."""
    stream = _libc.opendir(os.fsencode(path))
    if not stream:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    try:
        found = set()
        while entry := _libc.readdir(stream):
            if entry.contents.d_name not in (b".", b".."):
                found.add(entry.contents.d_type)
        return found
    finally:
        _libc.closedir(stream)
