"""A copy of a layer that processes go on writing: each file is in it as it was at one moment, and no name is missing.

The layer is walked several times.  The first pass copies everything, each later one what has changed since the one before
began, as the times of inodes tell (ctime), which no process can set.  Once a pass finds that no directory has changed, the copy
has all names that the layer had at one moment: a file that was moved from one directory to another is not missed in both.  A
file that changes while it is copied is copied again, unless the file system copies it in one step (reflinks).

Where a file may change twice while its times change once, one that has just changed is put off, and copied in a second half of
the pass, once that cannot be so any more: one wait for all of them.

A store to mapped memory changes a file's times only where its page was clean.  So the disk is flushed as each pass begins, and
what has changed since then is flushed by itself.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from snapfs.errors import TryAgain
from snapfs.kernel import libc
from snapfs.names import shown
from snapfs.scan.copying import AnotherKind, clone, copy_data, open_regular, read_attributes, target_of
from snapfs.scan.inodes import Inodes, Numbered
from snapfs.scan.walk import BATCH, PAUSED, Descriptors, Directory, Entering, path_of

PASSES, SECONDS = 10, 2.0
"""How often a layer is walked at most, unless it takes less than so many seconds; then as often as it takes."""

TRIES, TRIES_OF_LARGE = 20, 2  # how often one pass copies a file at most, and one of more than LARGE bytes
LARGE = 4 << 20

LINKED = 10_000  # files with several names of which one walk remembers where the copy has them; others have a name in ``stale``

BACK = 100_000_000  # nanoseconds by which the clock is set back, if it is, and does not only go slower

TICK = 20_000_000  # nanoseconds in which a file may change twice, and its times once: a tick of the kernel's clock, and more

_CLOCK = 5  # CLOCK_REALTIME_COARSE, the one that the times of inodes are of
_KERNELS_OWN = ("security.selinux", "security.SMACK64", "security.ima", "security.evm", "security.apparmor")
_GONE = (FileNotFoundError, NotADirectoryError)
_MEANWHILE = (*_GONE, AnotherKind, FileExistsError, IsADirectoryError)  # the name has come to mean something else


class LayerCopy:
    """A copy of the layer ``source`` in ``target``, an empty directory of the same file system; ``stale`` is another, for
    directories of the copy that the layer no longer has.  Nobody else can enter the two.

    Memory and descriptors are bounded, but for ten bytes for each directory.

    All functions block on the disk.  ``flush`` flushes it.  ``checkpoint`` is called once a file, and may raise to stop.
    ``files`` and ``size`` tell how many files, with how many bytes, have been copied so far, each copy of a file counted.
    """

    def __init__(
        self,
        source: str,
        target: str,
        stale: str,
        *,
        flush: Callable[[], None],
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.source = source
        self.target = target
        self.stale = stale
        self.checkpoint = checkpoint
        self.files = 0
        self.size = 0
        self.unsteady = ""
        """The path in the layer of a file that the last pass could not copy, for it changed all the time."""
        self.same = Numbered("Q")
        """The inode of the directory of the layer of which each directory, by its inode, is the copy."""
        self.again = Inodes()
        """The inodes of files with several names that the next pass copies, with all of their names."""
        self._flush = flush
        self._began = 0
        self._ahead = _ahead()
        self.grain, self.tick = _times_of(stale)
        """Nanoseconds: each time of an inode here is a multiple of the former, and one change may have that of another that
        was made less than the latter before."""

    def complete(self, most: int = PASSES) -> None:
        """Walk the layer until the copy is whole, ``most`` times or for SECONDS.  Raises OSError, with a path in the layer; and
        TryAgain where the layer changes faster than it can be copied."""
        passes, began = 0, time.monotonic()
        while passes < most or time.monotonic() - began < SECONDS:
            if self.walk():
                return
            passes += 1
        what = shown(self.unsteady) if self.unsteady else "what is in its directories"
        raise TryAgain(
            f"{what} changes faster than it can be copied", public="what is in it changes faster than it can be copied"
        )

    def walk(self) -> bool:
        """Walk it once: whether the copy is whole.  Raises OSError."""
        since, self._began = self._began, time.clock_gettime_ns(_CLOCK) // self.grain * self.grain
        if self._is_set_back():
            since = 0
        self._flush()
        is_missing, self.unsteady = bool(self.unsteady), ""
        again, self.again = self.again, Inodes()
        one_pass = _Pass(self, since, self._began, again, is_missing=is_missing)
        has_changed = one_pass.walk()
        if one_pass.put_off:
            time.sleep(self.tick / 1e9)
            second = _Pass(self, self._began, self._began, one_pass.put_off, is_missing=False, only=True)
            has_changed |= second.walk()
            if has_changed:  # it may have missed some of them
                self.again.update(one_pass.put_off)
        if self._is_set_back():
            self._began = 0
        return not (has_changed or self.unsteady or self.again or not self._began)

    # -- what a copy of another kind does otherwise (``treecopy.py``)

    def sources(self) -> Descriptors:
        """Those of the directories that are copied."""
        return Descriptors()

    def attributes(self, file: int | str) -> dict[str, bytes]:
        """All extended attributes of ``file``, a descriptor or a path, but those that the kernel makes by itself.  Raises
        OSError."""
        return attributes(file)

    def make_node(self, name: str, status: os.stat_result, directory: int) -> None:
        """Make ``name``, a FIFO, a socket or a device.  Raises OSError."""
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=directory)

    def dress(self, file: int | str, status: os.stat_result, found: dict[str, bytes], read: int) -> None:
        """Give ``file``, a descriptor or a path, this owner, mode and times, and the extended attributes that were ``found``
        and no others; ``read`` is when it was read last, in nanoseconds, before it was read for the copy.  Raises OSError."""
        set_attributes(file, status, found, read)

    def _is_set_back(self) -> bool:
        """Whether the clock was set back since this was asked last: then what changes has times of before, and all is to be
        copied again."""
        before, self._ahead = self._ahead, _ahead()
        return self._ahead < before - BACK


class _Pass:
    """One walk, which copies what has changed since ``since``, and the inodes ``again``; the disk was flushed at ``flushed``
    (nanoseconds).  ``is_missing``: the pass before has left a file out.  ``only``: of the files that were there it copies just
    ``again``, and puts nothing off."""

    def __init__(
        self, copy: LayerCopy, since: int, flushed: int, again: Inodes, *, is_missing: bool, only: bool = False
    ) -> None:
        self.has_changed = False
        self.put_off = Inodes()
        self._copy = copy
        self._since = since
        self._flushed = flushed
        self._is_missing = is_missing
        self._again = again
        self._only = only
        self._linked: dict[tuple[int, int], tuple[Directory, str]] = {}  # where the copy has a file with several names
        self._links = ""  # the directory for those that are too many to be remembered
        self._stale = len(os.listdir(copy.stale))
        self._paused = 0  # directories that are left half read while what is in them is copied

    def walk(self) -> bool:
        """Whether something has changed, but for what is in files."""
        with self._copy.sources() as self._sources, Entering() as self._targets:
            self._walk()
        return self.has_changed

    def _walk(self) -> None:
        under_way = [iter([(Directory(self._copy.source), Directory(self._copy.target))])]
        while under_way:
            both = next(under_way[-1], None)
            if both is None:
                under_way.pop()
            else:
                under_way.append(self._directory(*both))

    def _directory(self, source: Directory, target: Directory) -> Iterator[tuple[Directory, Directory]]:
        """Copy what is in the directory ``source``, but for what is in directories: these are given, each with its copy, to be
        copied before this goes on.  Of very many some are given before all else is copied."""
        self._copy.checkpoint()
        fd = self._sources.get(source)
        if fd < 0:
            self.has_changed = True
            return
        self._sources.hold(source)
        self._targets.hold(target)
        to_fd = self._targets.get(target)
        status, to_inode = os.fstat(fd), os.fstat(to_fd).st_ino
        is_new = self._copy.same.get(to_inode) != status.st_ino
        self._copy.same.put(to_inode, status.st_ino)
        has_changed = is_new or status.st_ctime_ns >= self._since
        self.has_changed |= has_changed
        if not is_new and os.geteuid() != 0:
            os.fchmod(to_fd, 0o700)
            has_changed = True
        if has_changed and not is_new:
            self._remove_stale(fd, to_fd)
        is_touched, below = has_changed, list[str]()
        with os.scandir(fd) as entries:
            for entry in entries:
                self._copy.checkpoint()
                try:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        if not self._has_same(entry.name, found, to_fd):
                            os.mkdir(entry.name, 0o700, dir_fd=to_fd)
                        below.append(entry.name)
                    elif (
                        is_new
                        or self._is_recent(found)
                        or ((has_changed or self._is_missing) and not _exists(entry.name, to_fd))
                    ):
                        is_touched = True
                        self._other(Directory(entry.name, source), fd, found, target, to_fd)
                except _MEANWHILE:
                    self.has_changed = True
                if len(below) == BATCH and self._paused < PAUSED:
                    self._paused += 1
                    yield from _both(below, source, target)
                    self._paused -= 1
                    below.clear()
        if os.fstat(fd).st_ctime_ns >= self._flushed:  # what was found is perhaps of two moments
            self.has_changed = True
        self._sources.let_go(source)
        self._targets.let_go(target)
        yield from _both(below, source, target)
        if is_touched:
            fd = self._sources.get(source)
            if fd < 0:
                self.has_changed = True
            else:
                self._copy.dress(self._targets.get(target), os.fstat(fd), self._copy.attributes(fd), status.st_atime_ns)
        self._sources.close(source)
        self._targets.close(target)

    def _is_recent(self, status: os.stat_result) -> bool:
        return (status.st_ctime_ns >= self._since and not self._only) or status.st_ino in self._again

    def _has_same(self, name: str, status: os.stat_result, to_fd: int) -> bool:
        """Whether the copy has the directory ``name``, as a copy of that one."""
        try:
            kept = os.stat(name, dir_fd=to_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISDIR(kept.st_mode) and self._copy.same.get(kept.st_ino) == status.st_ino

    def _remove_stale(self, from_fd: int, to_fd: int) -> None:
        """Remove from the copy what the layer has no longer, or has as another directory."""
        with os.scandir(to_fd) as entries:
            for entry in entries:
                is_directory = entry.is_dir(follow_symlinks=False)
                with suppress(FileNotFoundError):
                    found = os.stat(entry.name, dir_fd=from_fd, follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode) == is_directory and (
                        not is_directory or self._copy.same.get(entry.inode()) == found.st_ino
                    ):
                        continue
                if is_directory:
                    self._stale += 1
                    os.rename(entry.name, f"{self._copy.stale}/{self._stale}", src_dir_fd=to_fd)
                else:
                    os.unlink(entry.name, dir_fd=to_fd)

    # -- what is no directory

    def _other(self, source: Directory, from_fd: int, status: os.stat_result, target: Directory, to_fd: int) -> None:
        """Copy ``source``, which is no directory, into the directory ``target``; both are open.  Raises one of _GONE where it
        has vanished."""
        name = source.name
        with suppress(FileNotFoundError):
            had_others = os.stat(name, dir_fd=to_fd, follow_symlinks=False).st_nlink > 1
            if had_others and status.st_ctime_ns >= self._flushed:  # they may have been passed by as unchanged
                self.has_changed = True
            os.unlink(name, dir_fd=to_fd)
        if status.st_nlink > 1:
            if not self._is_recent(status):  # its directory was moved: the other names are those of an earlier copy
                self._copy.again.add(status.st_ino)
            with suppress(*_GONE):  # it was not copied there, or is gone from there
                if self._has_linked(status, target, name, to_fd):
                    return
        if stat.S_ISREG(status.st_mode):
            if not self._file(source, from_fd, to_fd, TRIES if status.st_size <= LARGE else TRIES_OF_LARGE):
                return
        else:
            attributes = self._copy.attributes(f"/proc/self/fd/{from_fd}/{name}")
            if stat.S_ISLNK(status.st_mode):
                os.symlink(target_of(name, from_fd), name, dir_fd=to_fd)
            else:
                self._copy.make_node(name, status, to_fd)
            self._copy.dress(f"/proc/self/fd/{to_fd}/{name}", status, attributes, status.st_atime_ns)
        if status.st_nlink > 1 and (status.st_dev, status.st_ino) not in self._linked:
            with suppress(FileNotFoundError, FileExistsError):  # it is unsteady; it was there and is gone
                os.link(name, self._kept(status), src_dir_fd=to_fd, follow_symlinks=False)
        self._copy.files += 1

    def _has_linked(self, status: os.stat_result, target: Directory, name: str, to_fd: int) -> bool:
        """Make ``name`` a link to the copy of the same file, if this walk has made one; whether that is so.  If not, note where
        one is going to be.  Raises OSError."""
        inode = status.st_dev, status.st_ino
        if inode not in self._linked and len(self._linked) < LINKED:
            self._linked[inode] = target, name
            return False
        if inode in self._linked:
            where, first = self._linked[inode]
            if (where, first) == (target, name):
                return False
            os.link(first, name, src_dir_fd=self._targets.get(where), dst_dir_fd=to_fd, follow_symlinks=False)
            return True
        try:
            os.link(self._kept(status), name, dst_dir_fd=to_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            os.rename(self._kept(status), name, dst_dir_fd=to_fd)  # it is the last name that it can have
        return True

    def _kept(self, status: os.stat_result) -> str:
        """The name of the copy of a file in the directory for links, which is made where it is missing.  Raises OSError."""
        if not self._links:
            self._stale += 1
            self._links = f"{self._copy.stale}/{self._stale}"
            os.mkdir(self._links, 0o700)
        return f"{self._links}/{status.st_dev:x}-{status.st_ino:x}"

    def _file(self, source: Directory, from_fd: int, to_fd: int, tries: int) -> bool:
        """Copy a regular file as it is at one moment, or note that it is unsteady; False where it is put off."""
        try:
            for _ in range(tries):
                reading = open_regular(source.name, from_fd)
                try:
                    if self._is_put_off(os.fstat(reading)):
                        return False
                    if self._has_copied(reading, source.name, to_fd):
                        return True
                finally:
                    os.close(reading)
                self._copy.checkpoint()
        except BlockingIOError:  # a process has a lease on it
            pass
        except OSError as error:
            error.filename = error.filename if isinstance(error, _GONE) else path_of(source)
            raise
        self._copy.unsteady = path_of(source).removeprefix(self._copy.source)
        return True

    def _is_put_off(self, status: os.stat_result) -> bool:
        """Whether a file is to be copied in the second half of this pass, for it may change yet without its times."""
        if self._only or not self._copy.tick or status.st_ctime_ns < time.clock_gettime_ns(_CLOCK) - self._copy.tick:
            return False
        self.put_off.add(status.st_ino)
        return True

    def _has_copied(self, reading: int, name: str, to_fd: int) -> bool:
        """Copy the file open as ``reading``; False, and nothing is there, where it has changed meanwhile."""
        before = os.fstat(reading)
        if before.st_mtime_ns >= self._flushed:
            with suppress(OSError):  # a file system without it has no mapped memory that outlives the flush either
                libc.write_out(reading)
        writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=to_fd)
        try:
            attributes = self._copy.attributes(reading)
            is_of_one_moment = not before.st_size or clone(reading, writing)
            if not is_of_one_moment:
                copy_data(reading, writing, before)
            after = os.fstat(reading)
            if (before.st_ctime_ns, before.st_size) == (after.st_ctime_ns, after.st_size) or (
                is_of_one_moment and _rights(before) == _rights(after) and self._copy.attributes(reading) == attributes
            ):
                self._copy.dress(writing, after, attributes, before.st_atime_ns)
                self._copy.size += after.st_size
                return True
        finally:
            os.close(writing)
        os.unlink(name, dir_fd=to_fd)
        return False


def _ahead() -> int:
    """Nanoseconds by which the clock that can be set is ahead of the one that can't."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _times_of(directory: str) -> tuple[int, int]:
    """The grain of the times on its file system, and what may be between two changes of one time: 0 where the kernel tells
    each change from what was seen before (from Linux 6.13 on, but not on every file system)."""
    fd, times = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), list[int]()
    try:
        for _ in range(4):
            os.fchmod(fd, 0o700)
            times.append(os.fstat(fd).st_ctime_ns)
    finally:
        os.close(fd)
    grain = math.gcd(1_000_000_000, *times)  # a second on an ext4 with inodes of 128 bytes
    return grain, 0 if len(set(times)) == len(times) else max(TICK, grain)


def _both(names: Iterable[str], source: Directory, target: Directory) -> Iterator[tuple[Directory, Directory]]:
    return ((Directory(name, source), Directory(name, target)) for name in names)


@contextmanager
def _suppressed(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise


def _rights(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_uid, status.st_gid


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def attributes(file: int | str) -> dict[str, bytes]:
    """All extended attributes of ``file``, a descriptor or a path, but those that the kernel makes by itself.  Raises
    OSError: E2BIG where they are too many (``read_attributes``)."""
    return read_attributes(file, _listed(file), follow=isinstance(file, int), unread=(errno.ENODATA,))  # it has vanished


def _listed(file: int | str) -> list[str]:
    with _suppressed(errno.ENOTSUP):
        names = os.listxattr(file, follow_symlinks=isinstance(file, int))
        return [name for name in names if name not in _KERNELS_OWN]
    return []


def set_attributes(file: int | str, status: os.stat_result, wanted: dict[str, bytes], read: int) -> None:
    """Give ``file``, a descriptor or a path, this owner, mode and times, and these extended attributes and no others; ``read``
    is the time at which it was read last, in nanoseconds.  Raises OSError."""
    follow = isinstance(file, int)
    os.chown(file, status.st_uid, status.st_gid, follow_symlinks=follow)
    for name in _listed(file):  # a file inherits some from its directory
        if name not in wanted:
            os.removexattr(file, name, follow_symlinks=follow)
    for name, value in wanted.items():
        os.setxattr(file, name, value, follow_symlinks=follow)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(file, stat.S_IMODE(status.st_mode))
    os.utime(file, ns=(read, status.st_mtime_ns), follow_symlinks=follow)
