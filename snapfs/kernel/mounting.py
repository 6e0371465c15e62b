"""Mounting, unmounting and flushing: mount(2), umount2(2), syncfs(2), mount_setattr(2)."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess

from snapfs.kernel import libc

MS_RDONLY = 1
MNT_FORCE = 1
MNT_DETACH = 2

_AT_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
_SYS_OPEN_TREE = 428  # the numbers of these two are the same on all architectures
_SYS_MOUNT_SETATTR = 442
_MOUNT_ATTR_IDMAP = 0x100000


class _MountAttr(ctypes.Structure):
    """``struct mount_attr`` of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2); raises OSError."""
    libc.call("mount", source.encode(), os.fsencode(target), kind.encode(), flags, os.fsencode(options))


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2); raises OSError."""
    libc.call("umount2", os.fsencode(target), flags)


def sync_file_system(directory: str) -> None:
    """syncfs(2): returns when all data of the file system that holds ``directory`` is on disk; raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc.call("syncfs", fd)
    finally:
        os.close(fd)


def file_system_magic(path: str) -> int:
    """``f_type`` of statfs(2), which tells the type of the file system that holds ``path``; raises OSError."""
    buffer = (ctypes.c_long * 32)()  # struct statfs begins with it; 120 bytes on 64-bit Linux
    libc.call("statfs", os.fsencode(path), ctypes.byref(buffer))
    return int(buffer[0])


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def maps_ids(directory: str) -> bool:
    """Whether overlay mounts over ``directory`` can have idmapped layers: tried, since it depends on kernel (5.19 for
    overlayfs), file system and privileges alike.  Takes some milliseconds and a short-lived process."""
    if kernel_version() < (5, 19):
        return False
    holder = subprocess.Popen(
        ["unshare", "--user", "--", "sh", "-c", "echo ready; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with holder:
        try:
            if holder.stdout is None or not holder.stdout.readline():
                return False
            for table in ("uid_map", "gid_map"):
                fd = os.open(f"/proc/{holder.pid}/{table}", os.O_WRONLY)
                try:
                    os.write(fd, b"0 0 1")
                finally:
                    os.close(fd)
            namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
                tree = libc.call("syscall", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(directory), flags)
                try:
                    wanted = _MountAttr(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=namespace)
                    size = ctypes.sizeof(wanted)
                    libc.call(
                        "syscall", _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), ctypes.c_size_t(size)
                    )
                finally:
                    os.close(tree)
            finally:
                os.close(namespace)
        except OSError:
            return False
        finally:
            holder.kill()
    return True
