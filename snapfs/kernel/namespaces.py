"""The mounts of all mount namespaces, as far as this process may see them.

Linux lists the namespaces since 6.12 (NS_MNT_GET_NEXT, ioctl_nsfs(2)) and their mounts (listmount(2), statmount(2)).  A mount
has an id there that the kernel never uses again, so facts about a mount can be kept, and a scan costs some ten microseconds a
namespace.  On older kernels, and in containers, which may not list the namespaces, /proc/PID/mountinfo of one process in each
namespace is read.  Neither way shows a mount that is attached nowhere.

A mount namespace is *foreign* if it belongs to a user namespace that another user has made: a sandbox of theirs, which has
inherited a copy of every mount of that moment, also of those that its user can't get to."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from snapfs.kernel import libc
from snapfs.kernel.mounttable import MountPoint, lines_of, parse, unescape
from snapfs.kernel.spare import Spare

T = TypeVar("T")

_SYS_STATMOUNT = 457  # these two on all architectures
_SYS_LISTMOUNT = 458

_REQUEST = struct.Struct("IIQQQ")  # struct mnt_id_req: size, spare, mnt_id, param, mnt_ns_id
_ALL = 2**64 - 1  # LSMT_ROOT: every mount of the namespace
_AT_ONCE = 1024  # ids in one answer

_NAMESPACE = struct.Struct("IIQ")  # struct mnt_ns_info: size, nr_mounts, mnt_ns_id
_GET_USER_NAMESPACE, _GET_OWNER = 0xB701, 0xB704
_OWNER = struct.Struct("I")  # uid_t
_GET_INFO, _GET_NEXT, _GET_PREVIOUS = (2 << 30 | _NAMESPACE.size << 16 | 0xB7 << 8 | number for number in (10, 11, 12))

_SB_BASIC, _MNT_BASIC, _MNT_ROOT, _MNT_POINT, _FS_TYPE, _MNT_OPTS = 0x1, 0x2, 0x8, 0x10, 0x20, 0x80
_WANTED = _SB_BASIC | _MNT_BASIC | _MNT_ROOT | _MNT_POINT | _FS_TYPE | _MNT_OPTS
_RDONLY = 1  # MOUNT_ATTR_RDONLY in mnt_attr
_BUFFER = 64 << 10  # bytes for one mount, to begin with: the options of an overlay name all its layers

_CLONE_NEWNS = 0x20000

_VANISHED = (errno.ENOENT, errno.ESRCH, errno.EINVAL)


class _StatMount(ctypes.Structure):
    """The head of ``struct statmount``; the strings stand after its 512 bytes, at the offsets that it says."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("mnt_opts", ctypes.c_uint32),
        ("mask", ctypes.c_uint64),
        ("sb_dev_major", ctypes.c_uint32),
        ("sb_dev_minor", ctypes.c_uint32),
        ("sb_magic", ctypes.c_uint64),
        ("sb_flags", ctypes.c_uint32),
        ("fs_type", ctypes.c_uint32),
        ("mnt_id", ctypes.c_uint64),
        ("mnt_parent_id", ctypes.c_uint64),
        ("mnt_id_old", ctypes.c_uint32),
        ("mnt_parent_id_old", ctypes.c_uint32),
        ("mnt_attr", ctypes.c_uint64),
        ("mnt_propagation", ctypes.c_uint64),
        ("mnt_peer_group", ctypes.c_uint64),
        ("mnt_master", ctypes.c_uint64),
        ("propagate_from", ctypes.c_uint64),
        ("mnt_root", ctypes.c_uint32),
        ("mnt_point", ctypes.c_uint32),
    )


_STRINGS = 512  # the size of struct statmount, where its strings begin


class Namespaces(Generic[T]):
    """The mounts of all namespaces, each as ``classify`` returns it; mounts for which it returns None are left out.

    Threads may share one.  ``close`` it.  It keeps the descriptors that a scan takes, so that a scan is possible when the
    process has none left."""

    def __init__(self, classify: Callable[[MountPoint], T | None]) -> None:
        self._own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._spare = Spare(2)  # a namespace's, and the next one's
        self._classify = classify
        self._lock = threading.Lock()
        self._lists = True
        self._known: dict[int, T | None] = {}  # by the id that is never used again
        self._foreign: dict[int, bool] = {}  # by that of the namespace
        self._ids = (ctypes.c_uint64 * _AT_ONCE)()
        self._buffer = ctypes.create_string_buffer(_BUFFER)

    def close(self) -> None:
        """Close all descriptors."""
        os.close(self._own)
        self._spare.close()

    def find(self, wanted: Callable[[T], bool]) -> list[T]:
        """All mounts that there are now, in any namespace, for which ``wanted`` is true.  Raises OSError.

        ``wanted`` must not depend on whether a mount is writable: what it is given may be old in that respect, but what is
        returned is not.
        """
        with self._lock:
            if self._lists:
                try:
                    return self._spare.give_to(lambda: self._find(wanted))
                except OSError as error:
                    if error.errno not in (errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EINVAL):
                        raise
                    self._lists = False
            return self._spare.give_to(lambda: [found for _, found in self.by_process(wanted)])

    def by_process(self, wanted: Callable[[T], bool]) -> Iterator[tuple[int, T]]:
        """All mounts for which ``wanted`` is true, each with the pid of a process in whose namespace it is.  Raises OSError."""
        seen: dict[str, T | None] = {}
        for pid in _one_process_a_namespace():
            try:
                lines, foreign = lines_of(pid), _is_of_another_user(pid)
            except OSError as error:  # the process has ended, or is not for us to see
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                continue
            for line in lines:
                if line not in seen:
                    seen[line] = self._classify(parse(line, foreign=foreign))
                found = seen[line]
                if found is not None and wanted(found):
                    yield pid, found

    def _find(self, wanted: Callable[[T], bool]) -> list[T]:
        known, found, foreigners = self._known, list[T](), self._foreign
        self._known, self._foreign = {}, {}
        for namespace, fd in _namespaces(self._own):
            self._foreign[namespace] = foreign = foreigners[namespace] if namespace in foreigners else is_foreign(fd)
            for mount in self._mounts(namespace):
                if mount in known:
                    self._known[mount] = what = known[mount]
                    if what is None or not wanted(what):
                        continue
                if (point := self._stat(mount, namespace, foreign)) is None:
                    continue
                self._known[mount] = what = self._classify(point)
                if what is not None and wanted(what):
                    found.append(what)
        return found

    def _mounts(self, namespace: int) -> list[int]:
        """The ids of the mounts in ``namespace``."""
        ids: list[int] = []
        while True:
            request = _REQUEST.pack(_REQUEST.size, 0, _ALL, ids[-1] if ids else 0, namespace)
            try:
                count = libc.call("syscall", _SYS_LISTMOUNT, request, self._ids, ctypes.c_size_t(_AT_ONCE), 0)
            except OSError as error:
                if error.errno in _VANISHED:
                    return ids
                raise
            ids += self._ids[:count]
            if count < _AT_ONCE:
                return ids

    def _stat(self, mount: int, namespace: int, foreign: bool) -> MountPoint | None:
        """The mount with the id ``mount`` in ``namespace``; None where the kernel tells nothing of it."""
        request = _REQUEST.pack(_REQUEST.size, 0, mount, _WANTED, namespace)
        while True:
            try:
                size = ctypes.c_size_t(len(self._buffer))
                libc.call("syscall", _SYS_STATMOUNT, request, self._buffer, size, 0)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.EPERM):
                    raise
                if error.errno != errno.EOVERFLOW:  # it is gone, or its disk is (EIO)
                    return None
                self._buffer = ctypes.create_string_buffer(2 * len(self._buffer))
        head = _StatMount.from_buffer(self._buffer)
        options = self._string(head.mnt_opts) if head.mask & _MNT_OPTS else ""
        return MountPoint(
            id=head.mnt_id_old,
            device=f"{head.sb_dev_major}:{head.sb_dev_minor}",
            root=self._string(head.mnt_root),
            target=self._string(head.mnt_point) if head.mask & _MNT_POINT else "",
            options=("ro" if head.mnt_attr & _RDONLY else "rw",),
            type=self._string(head.fs_type),
            source="",
            super_options=tuple(map(unescape, options.split(","))),
            group=head.mnt_peer_group,
            master=head.mnt_master,
            unique=head.mnt_id,
            parent=head.mnt_parent_id_old,
            foreign=foreign,
        )

    def _string(self, offset: int) -> str:
        return os.fsdecode(ctypes.string_at(ctypes.addressof(self._buffer) + _STRINGS + offset))


def _namespaces(own: int) -> Iterator[tuple[int, int]]:
    """The ids of all mount namespaces, each with a descriptor, beginning with the one that ``own`` is a descriptor of."""
    told = bytearray(_NAMESPACE.pack(_NAMESPACE.size, 0, 0))
    fcntl.ioctl(own, _GET_INFO, told)
    yield _NAMESPACE.unpack(told)[2], own
    for way in (_GET_NEXT, _GET_PREVIOUS):
        here = own
        try:
            while True:
                following = fcntl.ioctl(here, way, told)
                if here != own:
                    os.close(here)
                here = following
                yield _NAMESPACE.unpack(told)[2], here
        except OSError as error:
            if error.errno != errno.ENOENT:  # there is none any more that way
                raise
        finally:
            if here != own:
                os.close(here)


def is_foreign(namespace: int) -> bool:
    """Whether the mount namespace with the descriptor ``namespace`` is known to be another user's: it belongs to a user
    namespace that is not this process's, and was made by another user.

    Of one outside of this process's user namespace the kernel tells nothing, so that is not.
    """
    try:
        owner = fcntl.ioctl(namespace, _GET_USER_NAMESPACE)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return False
    try:
        if os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
            return False
        told = bytearray(_OWNER.size)
        fcntl.ioctl(owner, _GET_OWNER, told)
        return bool(_OWNER.unpack(told)[0] != os.geteuid())
    except OSError:
        return False
    finally:
        os.close(owner)


def _is_of_another_user(pid: int) -> bool:
    """The same of the mount namespace of process ``pid``; raises OSError."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return is_foreign(namespace)
    finally:
        os.close(namespace)


def _one_process_a_namespace() -> Iterator[int]:
    """The pid of one process in each mount namespace that has any, as far as this process may see that; this one's first."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    yield os.getpid()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                namespace = os.readlink(f"/proc/{entry}/ns/mnt")
                if namespace not in seen:
                    seen.add(namespace)
                    yield int(entry)


def shares_mount_namespace(pid: int) -> bool:
    """Whether process ``pid`` is known to be in the mount namespace of this one."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return False


def sees_mount(pid: int, target: str) -> bool:
    """Whether something is mounted at ``target`` in the mount namespace of process ``pid``, as far as that can be known: True
    where it can't."""
    try:
        lines = lines_of(pid)
    except OSError:
        return True
    return any(parse(line).target == target for line in lines)


def enter(pid: int) -> None:
    """Move this thread, and no other, into the mount namespace of process ``pid``, for good; raises OSError."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc.separate_thread()
        libc.call("setns", namespace, _CLONE_NEWNS)
    finally:
        os.close(namespace)
