"""The directories on disk: ROOT/snapshots/<id>/{fs,work}, from a pool of ready-made ones into the trash.

    ROOT/            0700
      lock           held by the process that has the root open; says its pid
      metadata.mdb   the records (``snapfs/metastore.py``), and after them a megabyte that is kept for removing on a full disk
      snapshots/     0700   <id>/fs 0755, and <id>/work 0711 for active snapshots; <id> bears its record (``snapfs/imprint.py``)
      pool/          new-… directories, made beforehand, so that Prepare costs one rename
      trash/         what was removed and is being deleted
      rootfs/        <id>: the merged file systems, while they are mounted (``snapfs/rootfs.py``)
      lost+found/    what stood in snapshots/ and nobody knows

All functions block on the disk: they are for worker threads.  Nothing here knows what is in records.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import stat
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import closing, suppress

from snapfs import imprint
from snapfs.errors import Damaged, Unavailable
from snapfs.kernel import probe
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.model import Kind, Usage
from snapfs.reserve import FULL
from snapfs.walk import directories

log = logging.getLogger(__name__)

POOL = 128  # directories that are kept ready, to begin with; refilled when half are gone, which may wait for a busy disk
POOL_MOST = 512  # that a burst of Prepares, which finds none left, makes it
POOL_LEAST = 16  # however small the disk is
POOL_SHARE = 300  # of how many free inodes and blocks, of which each takes three, there may be one
PROMISED = 1000  # ids that one mark on snapshots/ covers
DEPTH = 50  # directories deeper than this are deleted from the trash's top: bounds stack and descriptors

_OURS = frozenset(("lock", "metadata.mdb", "metadata.mdb-lock", "snapshots", "pool", "trash", "lost+found", "rootfs"))


class Layers:
    """One root's directories.  Made by ``open``; ``close`` gives up the lock and the pool, and may be called twice."""

    def __init__(self, root: str, lock: int) -> None:
        self.root = root
        self.empty = Usage()
        """What a layer with nothing in it takes: its directory."""
        self.snapshots = f"{root}/snapshots"
        self.rootfs_directory = f"{root}/rootfs"
        self._pool_directory = f"{root}/pool"
        self.trash = f"{root}/trash"
        self.lost = f"{root}/lost+found"
        self._in_trash = 0
        self._waiting = threading.Lock()
        self._left: set[int] = set()
        self._lock = lock
        self.bears_imprints = True
        """Whether directories can bear their records here."""
        self._promised = 0
        self.syncs = True
        """Whether directories are flushed before they are ready."""
        self.settled = 0
        """All snapshots with ids up to this have their directories in place on disk."""
        self._pool: deque[str] = deque()
        self._pool_size = self._pool_full = POOL
        self._unflushed: list[str] = []  # made for the pool, and not ready yet
        self._placing = threading.Lock()  # of the next two
        self._last_placed = 0
        self._unmade = 0
        self._tag = f"{time.time_ns():x}"  # so that no name in the pool is ever used again
        self._serials = itertools.count(1)  # for names; several threads take from it
        self._owner = (os.geteuid(), os.getegid())
        _open_layers.add(self)

    @classmethod
    def hold(cls, root: str) -> Layers:
        """Take ``root``, which must be one, and change nothing in it.

        Raises Unavailable with a sentence: held by another process (which one), no root, or what the operating system refused.
        """
        root = os.path.realpath(root)
        try:
            if not os.path.lexists(f"{root}/lock"):
                raise Unavailable(f"{root} is no root of snapfs")
            return cls(root, _lock(root))
        except OSError as error:
            raise Unavailable.from_os(f"use {root} as root", error) from error

    @classmethod
    def open(cls, root: str) -> Layers:
        """Take ``root``, made with mode 0700 where missing.

        Raises Unavailable with a sentence: held by another process (which one), not a directory of ours or of another user, a
        file system without d_type, or what the operating system refused.
        """
        root = os.path.realpath(root)
        try:
            root.encode()
        except UnicodeEncodeError:
            raise Unavailable(f"the root {root!r} is not UTF-8; mount specs could not name it") from None
        try:
            _refuse_tree(root)
            if os.path.lexists(root) and not os.path.isdir(root):
                raise Unavailable(f"cannot use {root} as root: it is not a directory")
            os.makedirs(root, mode=0o700, exist_ok=True)
            present = os.listdir(root)
            if "lock" not in present and not _OURS.issuperset(present):
                raise Unavailable(f"{root} is neither empty nor a root of snapfs; give a directory of its own")
            found = os.stat(root)
            if found.st_uid != os.geteuid():  # who could put anything in the place of what we made, and have us follow it
                raise Unavailable(
                    f"{root} belongs to the user {found.st_uid}, but whoever serves it must be the only one to get in: "
                    f"serve it as that user, or chown {os.geteuid()} {root}"
                )
            if stat.S_IMODE(found.st_mode) & 0o077:
                os.chmod(root, 0o700)
            lock = _lock(root)
        except OSError as error:
            raise Unavailable.from_os(f"use {root} as root", error) from error
        layers = cls(root, lock)
        try:
            for directory in (layers.snapshots, layers._pool_directory, layers.trash, layers.rootfs_directory):
                os.makedirs(directory, mode=0o700, exist_ok=True)
                os.chmod(directory, 0o700)
            layers._in_trash = len(os.listdir(layers.trash))
            layers._begin_pool()
            layers.bears_imprints = imprint.possible(layers._pool_directory)
            layers._promised = imprint.promised(layers.snapshots) if layers.bears_imprints else 0
        except OSError as error:
            layers.close()
            raise Unavailable.from_os(f"use {root} as root", error) from error
        except BaseException:
            layers.close()
            raise
        return layers

    def _begin_pool(self) -> None:
        """Make the first directory of the pool, by which the file system is judged.  A full disk has none for us; but then it
        was judged when the root was made."""
        try:
            self._unflushed.append(self._make())
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.empty = Usage(1, os.stat(self.rootfs_directory).st_blocks * 512)
            return
        if not probe.tells_types(self._unflushed[0]):
            raise Unavailable(
                f"the file system of {self.root} does not tell the types of directory entries (d_type), which overlayfs "
                "needs; if it is xfs, make it anew with: mkfs.xfs -n ftype=1"
            )
        self.empty = Usage(1, os.stat(f"{self._unflushed[0]}/fs").st_blocks * 512)

    def close(self) -> None:
        """Empty the pool and let go of the root."""
        while self._pool or self._unflushed:
            _remove_empty(self._pool.popleft() if self._pool else self._unflushed.pop())
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def leave_to_parent(self) -> None:
        """In a process forked from the one that holds the root: hold it no longer than that one does, and touch nothing."""
        self._pool.clear()
        self._unflushed.clear()
        self.close()

    def directory(self, number: int) -> str:
        """ROOT/snapshots/<id>."""
        return f"{self.snapshots}/{number}"

    def fs(self, number: int) -> str:
        """ROOT/snapshots/<id>/fs: the snapshot's own layer."""
        return f"{self.snapshots}/{number}/fs"

    def work(self, number: int) -> str:
        """ROOT/snapshots/<id>/work: overlayfs's, of an active snapshot."""
        return f"{self.snapshots}/{number}/work"

    def rootfs(self, number: int) -> str:
        """ROOT/rootfs/<id>: where its merged file system is mounted."""
        return f"{self.rootfs_directory}/{number}"

    def is_rootfs(self, path: str) -> bool:
        """Whether ``path`` is such a place."""
        return os.path.dirname(path) == self.rootfs_directory

    # -- making

    @property
    def pool_is_low(self) -> bool:
        return len(self._pool) <= self._pool_full // 2

    def fill_pool(self, checkpoint: Callable[[], None]) -> None:
        """Make directories until the pool is full, and flush them; ``checkpoint`` may raise between two of them."""
        try:
            self._pool_full = min(self._pool_size, self._pool_room())
            while len(self._pool) + len(self._unflushed) < self._pool_full:
                checkpoint()
                self._unflushed.append(self._make())
        except OSError:  # a full disk: what there is of it is used up
            self._flush_made()
            raise
        self._flush_made()

    def _pool_room(self) -> int:
        """How many directories the pool may have: it is not to take what others need of a small disk."""
        space = os.statvfs(self._pool_directory)
        inodes = space.f_favail if space.f_files else POOL_MOST * POOL_SHARE  # btrfs doesn't count them
        return max(POOL_LEAST, min(inodes, space.f_bavail) // POOL_SHARE)

    def _flush_made(self) -> None:
        if self.syncs and self._unflushed:
            placed, unmade = self._last_placed, self._unmade
            self.sync()
            with self._placing:
                if unmade == self._unmade:  # else that id may have been given out again
                    self.settled = placed
        self._pool.extend(self._unflushed)
        self._unflushed.clear()

    def sync(self) -> None:
        """Return when the directories of the pool, and those that were placed before, are on disk.  Raises OSError."""
        for directory in (self._pool_directory, self.snapshots):
            os.utime(directory)  # xfs flushes what was done until its last change; what is in the last one made came after that
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def has_ready(self, name: str) -> bool:
        """Whether the pool has a directory of this name, of this process or an earlier one."""
        return os.path.isdir(f"{self._pool_directory}/{name}/fs") and "/" not in name

    def clear_pool(self) -> None:
        """Discard what an earlier process has left in the pool; raises OSError."""
        ready = {os.path.basename(path) for path in (*self._pool, *self._unflushed)}
        for leftover in os.listdir(self._pool_directory):
            if leftover not in ready:
                self._discard(f"{self._pool_directory}/{leftover}", _remove_empty)

    def promise(self, number: int) -> None:
        """Let snapshots/ bear, once in a while, an id that ``number`` and many after it don't exceed: whoever makes the records
        anew gives out higher ones.  Raises OSError."""
        if number > self._promised and self.bears_imprints:
            imprint.promise(self.snapshots, number + PROMISED)
            self._promised = number + PROMISED

    def bear(self, number: int, said: imprint.Imprint) -> None:
        """Let the directory of snapshot ``number`` bear ``said``; raises OSError.

        One that was taken away behind our back bears nothing, as whoever needs it will be told.
        """
        if self.bears_imprints:
            with suppress(FileNotFoundError, NotADirectoryError):
                imprint.write(self.directory(number), said)

    def place(self, number: int, kind: Kind, owner: tuple[int, int] | None, name: str | None = None) -> str | None:
        """Put a fresh directory at snapshots/<number>, its ``fs`` owned by ``owner`` (uid, gid): that called ``name`` in the
        pool, or any.  Which one, if it was on disk there, else None.

        It appears whole by one rename; raises OSError, having left nothing.
        """
        was_ready = self.syncs
        if name is not None:
            path = f"{self._pool_directory}/{name}"
        else:
            try:
                path = self._pool.popleft()
            except IndexError:
                self._pool_size = min(2 * self._pool_size, POOL_MOST)
                path, was_ready = self._make(), False
        try:
            if kind is Kind.VIEW:
                with suppress(FileNotFoundError):
                    os.rmdir(f"{path}/work")
            if owner is not None and owner != self._owner:
                os.lchown(f"{path}/fs", *owner)
            if os.path.lexists(self.directory(number)):  # a crash left it before there was a record, or somebody put it there
                self._put_aside(number)
            os.rename(path, self.directory(number))
        except OSError:
            _remove_empty(path)
            raise
        self._last_placed = number
        return os.path.basename(path) if was_ready else None

    def _make(self) -> str:
        path = f"{self._pool_directory}/new-{self._tag}-{next(self._serials)}"
        os.mkdir(path, 0o700)
        try:
            for name, mode in (("fs", 0o755), ("work", 0o711)):
                os.mkdir(f"{path}/{name}")
                os.chmod(f"{path}/{name}", mode)  # whatever the umask
        except OSError:
            _remove_empty(path)
            raise
        return path

    def chown(self, number: int, owner: Callable[[os.stat_result], tuple[int, int]]) -> None:
        """Give all that snapshot ``number`` has in its layer the owner (uid, gid) that ``owner`` says for it."""
        base = os.open(self.directory(number), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _chown(base, "fs", os.stat("fs", dir_fd=base), owner)
        finally:
            os.close(base)
        with closing(directories(self.fs(number))) as visited:
            for fd, entries in visited:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        _chown(fd, entry.name, entry.stat(follow_symlinks=False), owner)

    def refuse_damaged(self, number: int, kind: Kind = Kind.COMMITTED) -> None:
        """Raise Damaged where a directory of snapshot ``number`` is missing or is none; links count as none."""
        for part in ("", "/fs", "/work") if kind is Kind.ACTIVE else ("", "/fs"):
            path = self.directory(number) + part
            try:
                wrong = None if stat.S_ISDIR(os.lstat(path).st_mode) else "not a directory"
            except FileNotFoundError:
                wrong = "missing"
            except OSError as error:
                raise Unavailable.from_os(f"look at the layer {path}", error) from error
            if wrong:
                raise Damaged(f"the layer {path} is {wrong}; restore it from a backup")

    # -- unmaking

    @property
    def waiting(self) -> int:
        """How many directories wait to be deleted: in the trash, or where they were."""
        return self._in_trash + len(self._left)

    def unmake(self, number: int) -> None:
        """Take back ``place``: nobody has had the directory yet.  Never raises; what doesn't go is left for the next start."""
        for name in (imprint.FILE, f"{imprint.FILE}.new"):
            with suppress(OSError):
                os.unlink(f"{self.directory(number)}/{name}")
        _remove_empty(self.directory(number))
        with self._placing:
            self._unmade += 1
            self._last_placed, self.settled = min(number - 1, self._last_placed), min(number - 1, self.settled)

    def leave(self, number: int) -> None:
        """Leave snapshots/<number>, whose record is gone, to the next ``sweep`` or ``empty_trash``."""
        if os.path.lexists(self.directory(number)):
            self._left.add(number)

    def retire(self, number: int) -> None:
        """Move snapshots/<number>, whose record is gone, into the trash, or leave it where it is on a disk too full for that.

        What is no directory goes to lost+found.  Raises OSError.
        """
        try:
            self._put_aside(number)
        except OSError as error:
            if not os.path.lexists(self.directory(number)):
                self._left.discard(number)
            elif error.errno in FULL:
                self._left.add(number)
            else:
                raise

    def _put_aside(self, number: int) -> None:
        path = self.directory(number)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            self._discard(path)
        else:
            log.warning("%s is not a directory; moved to %s", path, self.lose(path))
        self._left.discard(number)

    def _discard(self, path: str, otherwise: Callable[[str], None] | None = None) -> None:
        """Move the directory ``path`` into the trash, or do ``otherwise`` with it if the disk is too full for that."""
        while True:
            target = f"{self.trash}/{os.path.basename(path)}-{os.getpid()}-{next(self._serials)}"
            if not os.path.lexists(target):
                break
        try:
            os.rename(path, target)
        except OSError as error:
            if otherwise is None or error.errno not in FULL:
                raise
            return otherwise(path)
        self._wait(1)

    def _wait(self, more: int) -> None:
        with self._waiting:
            self._in_trash += more

    def sweep(self, known: Collection[int], last_id: int) -> None:
        """Move what stands in snapshots/ without a record into the trash: ids up to ``last_id`` that are not in ``known``, and
        abandoned ``new-…`` directories.  What snapfs can't have made goes to lost+found, unseen and whole.  Raises OSError when
        all that could be moved is."""
        refused: OSError | None = None
        for name in os.listdir(self.snapshots):
            number = parse_id(name)
            path = f"{self.snapshots}/{name}"
            ours = name.startswith("new-") or (number is not None and number <= last_id)
            if ours and number in known:
                continue
            try:
                if ours and number is not None:
                    self.retire(number)
                elif ours and stat.S_ISDIR(os.lstat(path).st_mode):
                    self._discard(path)
                else:
                    log.warning("%s is none of snapfs's directories; moved to %s", path, self.lose(path))
            except OSError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def lose(self, path: str) -> str:
        """Move what is at ``path`` to lost+found; where it is now.  Raises OSError."""
        os.makedirs(self.lost, mode=0o700, exist_ok=True)
        target = f"{self.lost}/{os.path.basename(path)}"
        while os.path.lexists(target):
            target += "~"
        os.rename(path, target)
        return target

    def put_away(self, path: str) -> None:
        """Remove the empty directory ``path``; if it holds anything it goes to lost+found.  What doesn't go is logged."""
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            try:
                if error.errno not in _NOT_EMPTY:
                    raise
                log.warning("%s is not empty; moved to %s", path, self.lose(path))
            except OSError as failure:
                log.warning("cannot remove %s: %s", path, failure)

    def make_trial(self) -> str:
        """A directory with ``fs``, ``work`` and ``lower``, for trying what can be mounted; remove it."""
        path = self._make()
        os.mkdir(f"{path}/lower")
        return path

    def is_empty(self, number: int) -> bool:
        """Whether nothing was ever written to the layer of snapshot ``number``, as far as can be seen."""
        try:
            return not os.listdir(self.fs(number))
        except FileNotFoundError:
            return True

    def present(self) -> set[int]:
        """The ids that have a directory."""
        with os.scandir(self.snapshots) as entries:
            found = ((parse_id(entry.name), entry) for entry in entries)
            return {number for number, entry in found if number is not None and entry.is_dir(follow_symlinks=False)}

    def empty_trash(self, checkpoint: Callable[[], None] = lambda: None) -> None:
        """Delete what is in the trash, and what a full disk kept out of it; ``checkpoint`` is called once an entry and may
        raise to stop.

        What can't be deleted is logged and stays for the next time.
        """
        trash = os.open(self.trash, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            tries: Counter[str] = Counter()
            while names := [name for name in os.listdir(trash) if tries[name] < 2]:
                for name in names:
                    checkpoint()
                    try:
                        self._delete(trash, name, trash, 0, checkpoint)
                        self._wait(-1)
                    except OSError as error:
                        tries[name] += 1 if error.errno in FULL else 2  # there may be room when the others are gone
                        if tries[name] == 2:
                            log.warning("cannot delete %s/%s: %s", self.trash, name, error)
            for number in list(self._left):
                checkpoint()
                self._delete_left(number, trash, checkpoint)
        finally:
            os.close(trash)

    def _delete_left(self, number: int, trash: int, checkpoint: Callable[[], None]) -> None:
        try:
            self.retire(number)
            if number in self._left and stat.S_ISDIR(os.lstat(self.directory(number)).st_mode):
                snapshots = os.open(self.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    self._delete(snapshots, str(number), trash, 0, checkpoint)
                finally:
                    os.close(snapshots)
                self._left.discard(number)
        except OSError as error:
            log.warning("cannot delete %s: %s", self.directory(number), error)

    def _delete(self, parent: int, name: str, trash: int, depth: int, checkpoint: Callable[[], None]) -> None:
        """Delete ``name`` in the directory ``parent`` and all below it; what lies too deep is moved to the top of ``trash``."""
        try:
            os.unlink(name, dir_fd=parent)
            return
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):  # Linux says the former of directories, POSIX the latter
            pass
        try:
            os.rmdir(name, dir_fd=parent)
            return
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        if depth == DEPTH:
            os.rename(name, f"deep-{time.time_ns()}-{next(self._serials)}", src_dir_fd=parent, dst_dir_fd=trash)
            self._wait(1)
            return
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        refused: OSError | None = None
        try:
            for child in os.listdir(fd):
                checkpoint()
                try:
                    self._delete(fd, child, trash, depth + 1, checkpoint)
                except OSError as error:
                    refused = error
        finally:
            os.close(fd)
        if refused is not None:  # but all the rest is gone, and has made room
            raise refused
        os.rmdir(name, dir_fd=parent)


_NOT_EMPTY = frozenset((errno.ENOTEMPTY, errno.EEXIST))


def parse_id(name: str) -> int | None:
    """The id whose directory is called ``name``: decimal, from 1, no leading zero; None for any other name."""
    return int(name) if name.isascii() and name.isdigit() and name[0] != "0" and len(name) < 12 else None


def _chown(parent: int, name: str, entry: os.stat_result, owner: Callable[[os.stat_result], tuple[int, int]]) -> None:
    wanted = owner(entry)
    if wanted != (entry.st_uid, entry.st_gid):
        os.chown(name, *wanted, dir_fd=parent, follow_symlinks=False)
        if entry.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(entry.st_mode):  # chown drops these bits
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)  # chmod would follow a link put there
            try:
                if os.path.samestat(os.fstat(fd), entry):
                    os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(entry.st_mode))
            finally:
                os.close(fd)


def _remove_empty(path: str) -> None:
    """Remove a fresh directory; what doesn't go is left for the next start."""
    for part in (f"{path}/fs", f"{path}/work", path):
        try:
            os.rmdir(part)
        except FileNotFoundError:
            pass
        except OSError as error:
            level = logging.DEBUG if error.errno == errno.EROFS else logging.WARNING  # so it is with all: who asked is told
            log.log(level, "cannot remove %s: %s", part, error.strerror)
            return


def _refuse_tree(root: str) -> None:
    """Raise Unavailable where ``root`` is in a mounted tree, in which nothing but snapshots can be made."""
    while not os.path.lexists(root):
        root = os.path.dirname(root)
    number = mount_id(root)
    for mount in mount_table():
        if mount.id == number and mount.type == "fuse.snapfs":
            raise Unavailable(f"cannot use {root} as root: it is in the tree that snapfs serves on {mount.target}")


def is_abandoned(root: str) -> bool:
    """Whether no living process has ``root`` open.

    One that was killed may still hold the lock, if a thread of it is stuck in the kernel: it counts as gone.
    """
    try:
        fd = os.open(f"{root}/lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return not os.path.isdir(root)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return _is_dying(_holder(fd))
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    return os.pread(fd, 20, 0).decode(errors="replace").strip()


def _is_dying(pid: str) -> bool:
    """Whether process ``pid`` was killed and is not gone yet."""
    try:
        with open(f"/proc/{int(pid)}/stat") as file:
            return file.read().rpartition(") ")[2][:1] in ("Z", "X")
    except (OSError, ValueError):
        return False


DYING = 2.0  # seconds that a killed process has to let go of its root


_open_layers: weakref.WeakSet[Layers] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for layers in _open_layers:
        layers.leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)


def _lock(root: str) -> int:
    """Take ROOT/lock for this process; the descriptor holds it until it is closed, by whatever end."""
    fd = os.open(f"{root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + DYING
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(fd)
            if _is_dying(holder) and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(fd)
            pid = holder or "unknown"
            raise Unavailable(f"{root} is in use by the process with pid {pid}; stop that one first") from None
        except BaseException:
            os.close(fd)
            raise
    try:
        line = f"{os.getpid()}\n".encode()
        os.pwrite(fd, line, 0)  # over the last one's, for which there is room on a full disk too
        os.ftruncate(fd, len(line))
    except OSError as error:
        if error.errno not in FULL:
            os.close(fd)
            raise
        log.debug("the lock does not say whose it is: %s", error)
    return fd
