"""What a file's handle tells (name_to_handle_at(2)): whether an overlay has a directory as its upper layer."""

from __future__ import annotations

import ctypes
import errno
import os

from snapfs.kernel import cached, libc

_AT_EMPTY_PATH = 0x1000
_AT_HANDLE_FID = 0x200  # an identifier, also from file systems that open no file by its handle; from Linux 6.5 on
_OVL_FILEID_V1 = 0xF8  # the type of an overlay's handle that contains another
_MOST = 128  # bytes of a handle: MAX_HANDLE_SZ


class _FileHandle(ctypes.Structure):
    """``struct file_handle``."""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * _MOST))


def has_upper(overlay: int, upper: str) -> bool:
    """Whether the overlay whose top directory is open as ``overlay`` has the directory ``upper`` as its upper layer.

    The handle of an overlay's directory contains that of the upper one.  Raises OSError where the kernel doesn't tell.
    """
    fd = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        kind, handle = _handle(overlay)
        if kind != _OVL_FILEID_V1:  # one made in a user namespace has plain numbers instead
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), upper)
        return _handle(fd)[1] in handle
    finally:
        os.close(fd)


def open_elsewhere(pid: int, path: str) -> int:
    """A descriptor (O_PATH) of the directory ``path``, an absolute path in the mount namespace and root of process ``pid``.

    The kernel looks into its memory alone, and follows no link: the path may lead over a server that does not answer, or
    through a tree of our own.  Raises OSError.
    """
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return cached.open_directory(root, path.lstrip("/") or ".")
    finally:
        os.close(root)


def _handle(fd: int) -> tuple[int, bytes]:
    """Its type, and the handle."""
    found = _FileHandle(bytes=_MOST)
    mount = ctypes.c_int()
    libc.call("name_to_handle_at", fd, b"", ctypes.byref(found), ctypes.byref(mount), _AT_EMPTY_PATH | _AT_HANDLE_FID)
    return found.type, bytes(found.handle[: found.bytes])
