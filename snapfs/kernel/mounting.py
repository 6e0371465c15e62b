"""Mounting, binding, unmounting and flushing."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess

from snapfs.errors import NoThread
from snapfs.kernel import libc, mountapi
from snapfs.mountoptions import PAGE

MS_RDONLY = 1
MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

_MS_REMOUNT = 0x20
_MS_BIND = 0x1000
_MS_REC = 0x4000
_KEPT_FLAGS = 2 | 4 | 8 | 1024 | 2048  # nosuid, nodev, noexec, noatime, nodiratime: the same in f_flag of statvfs and in MS_*

_OVERLAYFS_MAGIC = 0x794C7630

NO_MOUNT_API = (errno.ENOSYS, errno.EPERM)
"""The errors of a kernel without the mount API, or of a container runtime's filter that doesn't know it.  EPERM may also mean
that mounting is not permitted; then mount(2) fails with it, too."""


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2); raises OSError: E2BIG where ``options`` exceed the page that the kernel reads of them."""
    data = os.fsencode(options)
    if len(data) >= PAGE:
        raise OSError(errno.E2BIG, f"Mount options of {len(data)} bytes, and mount(2) takes {PAGE - 1}", target)
    try:
        libc.call("mount", os.fsencode(source), os.fsencode(target), os.fsencode(kind), flags, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from None


def mount_bind(source: str, target: str | int, *, read_only: bool, attributes: int = 0) -> None:
    """Make ``source``, an absolute path, and all that is mounted below it appear at ``target`` too (``rbind``): an absolute
    path, or a descriptor of a directory, O_PATH for one.

    With ``read_only`` none of it can be written through ``target``, not for an instant, and so it is with ``attributes``, of
    MOUNT_ATTR_NOSUID, NODEV, NOEXEC; the file systems themselves and other ways to them are left as they are.  Raises OSError,
    and nothing has been mounted.  Kernels before 5.12 keep to ``mount_bind_classic``.
    """
    try:
        attach(make_bind(source, read_only=read_only, attributes=attributes), target)
    except OSError as error:
        if error.errno not in NO_MOUNT_API:
            raise OSError(error.errno, error.strerror, source, None, str(target)) from None
        mount_bind_classic(source, path_of(target), read_only=read_only, attributes=attributes)


def make_bind(source: str, *, read_only: bool, attributes: int = 0) -> int:
    """The descriptor of such a mount as ``mount_bind`` makes, attached nowhere yet; raises OSError.

    It is private: what a process mounts in there doesn't come to be in ``source``, as it does with a plain bind of what is
    mounted shared."""
    tree = mountapi.open_tree(source, recursive=True)
    attributes |= mountapi.MOUNT_ATTR_RDONLY if read_only else 0
    try:
        mountapi.mount_setattr(tree, attributes, recursive=True, propagation=mountapi.MS_PRIVATE)
    except OSError:
        os.close(tree)
        raise
    return tree


def path_of(target: str | int) -> str:
    """``target``, or a path of the directory that it is a descriptor of."""
    return target if isinstance(target, str) else f"/proc/self/fd/{target}"


def attach(tree: int, target: str | int) -> None:
    """Attach the mount ``tree`` at ``target`` (as in ``mount_bind``) and close the descriptor of the tree; raises OSError, and
    then the mount is gone."""
    try:
        mountapi.move_mount(tree, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path_of(target)) from None
    finally:
        os.close(tree)


def mount_bind_classic(source: str, target: str, *, read_only: bool, attributes: int = 0) -> None:
    """``mount_bind`` by mount(2), which changes a bind's attributes in a second step, and not those of the mounts below it: so
    with any the mounts below ``source`` are left out, and ``target`` is without them for an instant."""
    attributes |= MS_RDONLY if read_only else 0
    mount(source, target, "", _MS_BIND | (0 if attributes else _MS_REC))
    try:
        mount("", target, "", mountapi.MS_PRIVATE | _MS_REC)
        if attributes:
            _remount(target, attributes)
    except OSError:
        unmount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
        raise


def make_read_only(target: str) -> None:
    """Let no process write any more through the mount at ``target``, not even one that works in there.  Raises OSError: EBUSY
    while a file is open for writing."""
    _remount(target, MS_RDONLY)


def make_writable(target: str) -> None:
    """Undo ``read_only`` of the mount at ``target``, and of those below it.  Raises OSError."""
    fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mountapi.mount_setattr(fd, 0, clear=mountapi.MOUNT_ATTR_RDONLY, recursive=True)
    except OSError as error:
        if error.errno not in NO_MOUNT_API:
            raise
        _remount(target, 0)
    finally:
        os.close(fd)


def _remount(target: str, flags: int) -> None:
    kept = os.statvfs(target).f_flag & _KEPT_FLAGS  # a remount drops what it isn't told, or may not (EPERM)
    mount("", target, "", _MS_REMOUNT | _MS_BIND | flags | kept)


def make_file_system_read_only(tree: int) -> None:
    """Let no process write any more into the file system of the mount ``tree``, through any mount of it, not even one that
    works in there.  The kernel flushes an overlay first.  Raises OSError: EBUSY while a file of it is open for writing."""
    context = mountapi.fspick(tree)
    try:
        mountapi.set_flag(context, "ro")
        mountapi.reconfigure(context)
    finally:
        os.close(context)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2); raises OSError."""
    try:
        libc.call("umount2", os.fsencode(target), flags)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from None


def detached_copy(target: str) -> int | None:
    """A descriptor of a detached copy of the mount at ``target``, None where none can be had (a kernel before 5.2, no
    descriptors left).

    The last unmount of an overlay flushes the whole file system that holds its upper directory, which may take minutes.  Where
    there is a copy, the umount2(2) of ``target`` is done at once, and the close(2) of the copy flushes: it returns when all is
    flushed, and does not report errors.  A copy does not count as use of ``target`` (but making one does), and the mount table
    does not show it.

    Until the copy is closed the overlay holds its upper and work directory: another overlay on them is EBUSY with
    ``index=on``, and with ``index=off`` a warning in the kernel's log (harmless here: no process uses the first any more).
    """
    try:
        return mountapi.open_tree(target)
    except OSError:
        return None


def overlay_device(target: str) -> str:
    """The device of the overlay that is mounted at ``target``, as ``major:minor``; "" if that is no overlay.  Raises
    OSError."""
    return device(target) if file_system_magic(target) == _OVERLAYFS_MAGIC else ""


def device(path: str) -> str:
    """The device of the file system that holds ``path``, as mount tables show it.  Raises OSError."""
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def unmount_unused(target: str) -> bool:
    """Unmount ``target`` if no process has used it, or so much as looked at it, since the last call; True then.

    Otherwise False, and the kernel marks the mount for the next call.  Raises OSError: EBUSY while the mount is in use, or
    anything is mounted below it.  The unmount may take minutes unless there is a copy (``detached_copy``).
    """
    try:
        unmount(target, MNT_EXPIRE | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        raise
    return True


def sync_file_system(fd: int) -> None:
    """syncfs(2): returns when all data of the file system on which ``fd`` is open is on disk.

    Raises OSError, also for what could not be written since ``fd`` was opened, or since the last call with it.
    """
    libc.call("syncfs", fd)


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
    """Whether overlays can have idmapped layers in ``directory``.  This is tried, since it depends on kernel (5.19 for
    overlayfs), file system and privileges alike; it takes some milliseconds and a short-lived process.  Raises NoThread."""
    if kernel_version() < (5, 19):
        return False
    try:
        holder = subprocess.Popen(
            ["unshare", "--user", "--", "sh", "-c", "echo ready; read _"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except BlockingIOError:
        raise NoThread() from None
    with holder:
        try:
            if holder.stdout is None or not holder.stdout.readline():
                return False
            tables = {"setgroups": b"deny", "uid_map": b"0 0 1", "gid_map": b"0 0 1"}  # denied, the last takes no CAP_SETGID
            for table, line in tables.items():
                fd = os.open(f"/proc/{holder.pid}/{table}", os.O_WRONLY)
                try:
                    os.write(fd, line)
                finally:
                    os.close(fd)
            namespace = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                tree = mountapi.open_tree(directory)
                try:
                    mountapi.mount_setattr(tree, mountapi.MOUNT_ATTR_IDMAP, namespace=namespace)
                finally:
                    os.close(tree)
            finally:
                os.close(namespace)
        except OSError:
            return False
        finally:
            holder.kill()
    return True
