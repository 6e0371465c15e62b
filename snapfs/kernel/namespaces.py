"""The mounts of all mount namespaces, as far as this process may see them.

Linux lists the namespaces since 6.12 (NS_MNT_GET_NEXT, ioctl_nsfs(2)) and their mounts (listmount(2), statmount(2)).  A mount
has an id there that the kernel never uses again, so facts about a mount can be kept, and a scan costs some ten microseconds a
namespace.  On older kernels, and in containers, which may not list the namespaces, /proc/PID/mountinfo of one process in each
namespace is read.  Neither way shows a mount that is attached nowhere.

A mount namespace is *foreign* if it belongs to a user namespace that another user has made: a sandbox of theirs, which has
inherited a copy of every mount of that moment, also of those that its user can't get to.  Any user can make as many mounts and
namespaces there as they like, and such that the kernel needs seconds to list them.  So of foreign namespaces no more is read
than fits into MOST, EACH and ALL; what is left is *unread*, and whoever scans is told that there is such."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from snapfs.kernel import libc
from snapfs.kernel.mounttable import MountPoint, lines_of, parse, unescape
from snapfs.kernel.spare import Spare

T = TypeVar("T")

_SYS_STATMOUNT = 457  # these two on all architectures
_SYS_LISTMOUNT = 458

_REQUEST = struct.Struct("IIQQQ")  # struct mnt_id_req: size, spare, mnt_id, param, mnt_ns_id
_ALL = 2**64 - 1  # LSMT_ROOT: every mount of the namespace
_ID = struct.Struct("Q")
_AT_ONCE = 1024  # ids in one answer
_MANY = ctypes.c_size_t(_AT_ONCE)

_NAMESPACE = struct.Struct("IIQ")  # struct mnt_ns_info: size, nr_mounts, mnt_ns_id
_GET_USER_NAMESPACE, _GET_OWNER = 0xB701, 0xB704
_OWNER = struct.Struct("I")  # uid_t
_GET_INFO, _GET_NEXT, _GET_PREVIOUS = (2 << 30 | _NAMESPACE.size << 16 | 0xB7 << 8 | number for number in (10, 11, 12))

_SB_BASIC, _MNT_BASIC, _MNT_ROOT, _MNT_POINT, _FS_TYPE, _MNT_OPTS = 0x1, 0x2, 0x8, 0x10, 0x20, 0x80
_WANTED = _SB_BASIC | _MNT_BASIC | _MNT_ROOT | _MNT_POINT | _FS_TYPE | _MNT_OPTS
_RDONLY = 1  # MOUNT_ATTR_RDONLY in mnt_attr
_BUFFER = 64 << 10  # bytes for one mount, to begin with: the options of an overlay name all its layers

_CLONE_NEWNS = 0x20000

MOST = 1000  # mounts of a foreign namespace that is read
EACH = 0.05  # seconds that one scan takes for the foreign namespaces of one user
ALL = 0.25  # and for all foreign ones
_MOST_SEEN = 4 << 20  # bytes of the table of a client: longer, and it can't be known what it sees
_MOST_BYTES = 256 << 10  # of the table of a foreign namespace, where the kernel has no lists

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


def never(found: object) -> bool:
    return False


class _Patience:
    """The time that one scan may still take for foreign namespaces, by the user who has made them."""

    def __init__(self) -> None:
        self.whole = True  # nothing has been left unread
        self._left: dict[int, float] = {}
        self._all = ALL

    def left(self, owner: int) -> float:
        """The seconds left for the namespaces of ``owner``."""
        return min(self._left.get(owner, EACH), self._all)

    def spend(self, owner: int, seconds: float) -> None:
        self._left[owner] = self._left.get(owner, EACH) - seconds
        self._all -= seconds


class _Namespace(Generic[T]):
    """What is known of the mounts of one namespace: all by their ids, which are never used again, and those that are something.
    ``listed`` are the ids as the kernel has listed them, None where not all of that has been looked at; ``request`` asks for
    them."""

    def __init__(self, number: int, owner: int | None) -> None:
        self.owner = owner
        self.request = _REQUEST.pack(_REQUEST.size, 0, _ALL, 0, number)
        self.listed: bytes | None = None
        self.known: dict[int, T | None] = {}
        self.kept: list[tuple[int, T]] = []


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
        self._known: dict[int, _Namespace[T]] = {}  # by the id that is never used again
        self._ids = (ctypes.c_uint64 * _AT_ONCE)()
        self._buffer = ctypes.create_string_buffer(_BUFFER)

    def close(self) -> None:
        """Close all descriptors."""
        os.close(self._own)
        self._spare.close()

    def find(self, wanted: Callable[[T], bool]) -> list[T]:
        """All mounts that there are now, in any namespace, for which ``wanted`` is true; but for those that are unread.  Raises
        OSError.

        ``wanted`` must not depend on whether a mount is writable: what it is given may be old in that respect, but what is
        returned is not.
        """
        return self.scan(wanted)[0]

    def scan(self, wanted: Callable[[T], bool], *, settled: Callable[[T], bool] = never) -> tuple[list[T], bool]:
        """The same, and whether nothing was left unread.  Those that are ``settled`` are told as they were when they came,
        which saves asking for each: it must not matter whether these can be written, nor where they are attached."""
        patience = _Patience()
        if (listed := self._listed(wanted, patience, settled)) is not None:
            return [found for _, found in listed], patience.whole
        return self._spare.give_to(lambda: [found for _, found in self._by_tables(wanted, patience)]), patience.whole

    def by_process(self, wanted: Callable[[T], bool]) -> Iterator[tuple[int, T]]:
        """The same, each with the pid of a process in whose namespace it is, if there is one.  Raises OSError."""
        if (listed := self._listed(wanted, _Patience())) is None:
            yield from self._by_tables(wanted, _Patience())
            return
        namespaces: dict[int, list[T]] = {}
        for namespace, found in listed:
            namespaces.setdefault(namespace, []).append(found)
        for pid, namespace in _one_process_a_namespace():
            for found in namespaces.pop(namespace, ()):
                yield pid, found
            if not namespaces:
                return

    def _listed(
        self, wanted: Callable[[T], bool], patience: _Patience, settled: Callable[[T], bool] = never
    ) -> list[tuple[int, T]] | None:
        """All mounts that are ``wanted``, each with the inode number of its namespace; None where the kernel has no lists."""
        with self._lock:
            if self._lists:
                try:
                    return self._spare.give_to(lambda: list(self._find(wanted, patience, settled)))
                except OSError as error:
                    if error.errno not in (errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EINVAL):
                        raise
                    self._lists = False
        return None

    def _by_tables(self, wanted: Callable[[T], bool], patience: _Patience) -> Iterator[tuple[int, T]]:
        seen: dict[str, T | None] = {}
        for pid, _ in _one_process_a_namespace():
            began = time.monotonic()
            try:
                owner = None if pid == os.getpid() else _owner_of(pid)
                if owner is not None and patience.left(owner) <= 0:
                    patience.whole = False
                    continue
                lines = lines_of(pid, None if owner is None else _MOST_BYTES)
            except OSError as error:  # the process has ended, or is not for us to see
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                if error.errno == errno.EFBIG:
                    patience.whole = False
                continue
            matching = []
            for line in lines:
                if line not in seen:
                    seen[line] = self._classify(parse(line, foreign=owner is not None))
                found = seen[line]
                if found is not None and wanted(found):
                    matching.append((pid, found))
            if owner is not None:
                patience.spend(owner, time.monotonic() - began)
            yield from matching

    def _find(self, wanted: Callable[[T], bool], patience: _Patience, settled: Callable[[T], bool]) -> Iterator[tuple[int, T]]:
        before, self._known = self._known, {}
        for number, count, fd in _namespaces(self._own):  # some ten of them at each call that asks: each step here counts
            what = before.get(number)
            if what is None:
                what = _Namespace(number, None if fd == self._own else foreign_owner(fd))
            self._known[number] = what
            owner, deadline, began = what.owner, math.inf, 0.0
            if owner is not None:
                began = time.monotonic()
                deadline = began + patience.left(owner)
                if count > MOST or deadline <= began:
                    patience.whole = False
                    continue
            ids, whole = self._mounts(what)
            fresh: Collection[int] = ()
            if ids != what.listed:
                fresh, all_read = self._read(number, what, ids, deadline)
                whole = whole and all_read
            if not whole:
                patience.whole = False
            inode = 0
            for mount, kept in what.kept:
                if wanted(kept):
                    inode = inode or os.fstat(fd).st_ino
                    if mount in fresh or settled(kept):
                        yield inode, kept
                        continue
                    if time.monotonic() > deadline:
                        patience.whole = False
                        break
                    if (point := self._stat(mount, number, owner is not None)) is not None:
                        now = self._classify(point)
                        if now is not None and wanted(now):
                            yield inode, now
            if owner is not None:
                patience.spend(owner, time.monotonic() - began)

    def _read(self, number: int, what: _Namespace[T], listed: bytes, deadline: float) -> tuple[set[int], bool]:
        """Bring ``what`` up to date, of the namespace ``number``, of which ids were ``listed``: the ids of the mounts that have
        been asked for, and whether that was done by the ``deadline``."""
        known, what.known, what.listed, whole = what.known, {}, listed, True
        fresh: set[int] = set()
        for (mount,) in _ID.iter_unpack(listed):
            if mount in known:
                what.known[mount] = known[mount]
            elif time.monotonic() > deadline:
                what.listed, whole = None, False
            elif (point := self._stat(mount, number, what.owner is not None)) is not None:
                what.known[mount] = self._classify(point)
                fresh.add(mount)
            else:
                what.listed = None  # it may be one of which the kernel tells more later
        what.kept = [(mount, kept) for mount, kept in what.known.items() if kept is not None]
        return fresh, whole

    def _mounts(self, what: _Namespace[T]) -> tuple[bytes, bool]:
        """The ids of the mounts in the namespace ``what``, one after the other, and whether these are all."""
        ids, request = b"", what.request
        while True:
            try:
                count = libc.call("syscall", _SYS_LISTMOUNT, request, self._ids, _MANY, 0)
            except OSError as error:
                if error.errno in _VANISHED:
                    return ids, True
                raise
            ids += ctypes.string_at(self._ids, count * _ID.size)
            if count < _AT_ONCE:
                return ids, True
            if what.owner is not None:  # it had fewer when they were counted
                return ids, False
            size, spare, every, _, namespace = _REQUEST.unpack(request)
            request = _REQUEST.pack(size, spare, every, self._ids[count - 1], namespace)

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


def _namespaces(own: int) -> Iterator[tuple[int, int, int]]:
    """The ids of all mount namespaces, each with the number of its mounts and a descriptor, beginning with the one that ``own``
    is a descriptor of."""
    told = bytearray(_NAMESPACE.pack(_NAMESPACE.size, 0, 0))
    fcntl.ioctl(own, _GET_INFO, told)
    _, count, number = _NAMESPACE.unpack(told)
    yield number, count, own
    for way in (_GET_NEXT, _GET_PREVIOUS):
        here = own
        try:
            while True:
                following = fcntl.ioctl(here, way, told)
                if here != own:
                    os.close(here)
                here = following
                _, count, number = _NAMESPACE.unpack(told)
                yield number, count, here
        except OSError as error:
            if error.errno != errno.ENOENT:  # there is none any more that way
                raise
        finally:
            if here != own:
                os.close(here)


def foreign_owner(namespace: int) -> int | None:
    """The uid of the other user whose foreign mount namespace has the descriptor ``namespace``; None where it is not foreign:
    it belongs to this process's user namespace, or to one that this process's user has made.

    Of one outside of this process's user namespace the kernel tells nothing, so that is not.
    """
    try:
        owner = fcntl.ioctl(namespace, _GET_USER_NAMESPACE)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None
    try:
        if os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
            return None
        told = bytearray(_OWNER.size)
        fcntl.ioctl(owner, _GET_OWNER, told)
        uid = int(_OWNER.unpack(told)[0])
        return None if uid == os.geteuid() else uid
    except OSError:
        return None
    finally:
        os.close(owner)


def _owner_of(pid: int) -> int | None:
    """The same of the mount namespace of process ``pid``; raises OSError."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return foreign_owner(namespace)
    finally:
        os.close(namespace)


def _one_process_a_namespace() -> Iterator[tuple[int, int]]:
    """The pid of one process in each mount namespace that has any, as far as this process may see that, and the namespace's
    inode number; this one's first."""
    own = os.stat("/proc/self/ns/mnt").st_ino
    seen = {own}
    yield os.getpid(), own
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                namespace = os.stat(f"/proc/{entry}/ns/mnt").st_ino
                if namespace not in seen:
                    seen.add(namespace)
                    yield int(entry), namespace


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
        lines = lines_of(pid, _MOST_SEEN)
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
