"""A path of one merged file system put back as it is in another, which shows an earlier state of it.

All that is to come is copied first, into a directory of this user's alone beside it; then each piece is put in its place by one
rename, a single file by one alone.  What was there moves into that directory meanwhile, so that a step that fails undoes those
before it.  overlayfs does not rename a directory that a lower layer has (EXDEV): so directories are put back piece by piece,
and what is as it was is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from snapfs.kernel import inside, libc, mounting
from snapfs.names import printable
from snapfs.scan.copying import attributes_of, attributes_unopened, clone, copy_data, open_regular
from snapfs.scan.differing import hold_the_same
from snapfs.scan.walk import Descriptors, Directory, path_of

PREFIX = ".snapfs-restore-"
"""How the directory beside is called, which is there while it is copied; a later call removes what a killed one left."""

_NEW = ".new"

_FEW = 16  # files that are flushed one by one; of more, all that their file system has


class NotRestored(Exception):
    """Nothing was changed; the sentence says why."""


class _Tops(Descriptors):
    """Directories below the one that is open as ``top``; where something is mounted on one, it is not entered (EXDEV)."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top = top

    def __enter__(self) -> _Tops:
        return self

    def open(self, name: str, parent: int | None) -> int:
        return os.open(".", inside.FLAGS, dir_fd=self.top) if parent is None else inside.open_unmounted(name, parent)

    def must(self, directory: Directory) -> int:
        """As ``get``; raises OSError where it has vanished."""
        fd = self.get(directory)
        if fd < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(directory))
        return fd


class _Step(NamedTuple):
    """What is to become of ``name`` in the directory ``target``: what ``name`` in ``source`` is, or nothing (None)."""

    target: Directory
    name: str
    source: Directory | None
    there: bool


def shown(directory: Directory, name: str = "") -> str:
    """The path for a sentence, from the root of the file systems on."""
    path = path_of(Directory(name, directory) if name else directory)
    return printable(path) or "/"


def restore(source: int, target: int, names: Sequence[str], *, flush: bool) -> None:
    """Have ``names``, the path of a file or directory (one at least), in the directory open as ``target`` be what it is in the
    one open as ``source``: contents, owner, mode, times, attributes, and links to each other of the files in it.

    ``flush``: it is on the disk when this returns.  A parent that is missing is made, as it is in ``source``.  No link is
    followed.  Raises NotRestored, and OSError; nothing has changed then.
    """
    with _Tops(source) as sources, _Tops(target) as targets:
        _Restoring(sources, targets, flush).restore(names)


class _Restoring:
    def __init__(self, sources: _Tops, targets: _Tops, flush: bool) -> None:
        self._sources = sources
        self._targets = targets
        self._flush = flush
        self._undo: list[Callable[[], object]] = []
        self._steps: list[_Step] = []
        self._settled: list[tuple[Directory, Directory]] = []  # directories in both, of which something was to be put back
        self._linked: dict[tuple[int, int], tuple[Directory, str]] = {}  # where there is a copy of what has several names
        self._files = 0

    def restore(self, names: Sequence[str]) -> None:
        above, missing, last = self._find(names)
        with _made_beside(self._targets.must(above)) as beside:
            self._plan(above, missing, last)
            with _Tops(beside.fd) as copies:
                for number, step in enumerate(self._steps):
                    if step.source is not None:
                        self._copy(step.source, copies, Directory(str(number), beside.top), missing)
            if self._flush and self._files > _FEW:
                mounting.sync_file_system(beside.fd)
            with _uninterrupted():
                try:
                    self._carry_out(beside)
                except Exception as error:
                    if self._go_back():
                        raise
                    beside.keep = True
                    where = shown(above, f"{PREFIX}…")
                    raise NotRestored(f"{error}; not all of that could be undone: what was there is in {where}") from error
            if self._flush:
                self._flush_places(beside.fd)

    def _find(self, names: Sequence[str]) -> tuple[Directory, Sequence[str], Directory]:
        """The directory of the target that is nearest above the path; the names of the directories between, which are missing
        in the target; and the path in the source."""
        source, target = Directory(""), Directory("")
        missing: list[str] = []
        for nth, name in enumerate(names[:-1]):
            seen = self._status(self._sources, source, name)
            if seen is None:
                raise self._missing(names)
            if not stat.S_ISDIR(seen.st_mode):
                path = shown(source, name)
                if stat.S_ISLNK(seen.st_mode):
                    raise NotRestored(f"{path} is a symbolic link: give the path that it leads to")
                raise self._missing(names)
            source = Directory(name, source)
            if missing:
                missing.append(name)
                continue
            there = self._status(self._targets, target, name)
            if there is None:
                missing = [name]
            elif stat.S_ISDIR(there.st_mode):
                target = Directory(name, target)
            else:
                path = printable("/" + "/".join(names[: nth + 1]))
                raise NotRestored(f"{path} is no directory now, but was one: put that back, or move it away first")
        if self._status(self._sources, source, names[-1]) is None:
            raise self._missing(names)
        return target, missing, Directory(names[-1], source)

    @staticmethod
    def _missing(names: Sequence[str]) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), printable("/" + "/".join(names)))

    @staticmethod
    def _status(side: _Tops, directory: Directory, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=side.must(directory), follow_symlinks=False)
        except FileNotFoundError:
            return None

    # -- what is to be done

    def _plan(self, above: Directory, missing: Sequence[str], last: Directory) -> None:
        if missing:
            self._steps = [_Step(above, missing[0], last, there=False)]
            return
        there = self._status(self._targets, above, last.name)
        seen = self._status(self._sources, last.parent or last, last.name)
        assert seen is not None
        if there is None or not (stat.S_ISDIR(there.st_mode) and stat.S_ISDIR(seen.st_mode)):
            self._steps = [_Step(above, last.name, last, there is not None)]
            return
        self._compare(last, Directory(last.name, above))

    def _compare(self, source: Directory, target: Directory) -> None:
        """Find what differs in two directories."""
        kept: dict[tuple[int, int], list[_Step]] = {}  # files that are as they were, by the inode whose other names they have
        changed: set[tuple[int, int]] = set()
        pending = [(source, target)]
        while pending:
            source, target = pending.pop()
            fds = self._sources.must(source), self._targets.must(target)
            with os.scandir(fds[1]) as entries:
                there = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
            before = len(self._steps)
            with os.scandir(fds[0]) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
            for name, seen in found:
                now = there.pop(name, None)
                step = _Step(target, name, Directory(name, source), now is not None)
                key = seen.st_dev, seen.st_ino
                if now is not None and stat.S_ISDIR(seen.st_mode) and stat.S_ISDIR(now.st_mode):
                    pending.append((Directory(name, source), Directory(name, target)))
                elif now is not None and self._is_same(name, seen, now, fds):
                    if seen.st_nlink > 1:
                        kept.setdefault(key, []).append(step)
                else:
                    self._steps.append(step)
                    if seen.st_nlink > 1:
                        changed.add(key)
            self._steps += [_Step(target, name, None, there=True) for name in there]
            if len(self._steps) > before or not _have_same_marks(fds):
                self._settled.append((source, target))
        for key in changed:  # so that the names of one file are that again
            self._steps += kept.get(key, [])
            self._settled += [
                (step.source.parent, step.target) for step in kept.get(key, []) if step.source and step.source.parent
            ]

    def _is_same(self, name: str, seen: os.stat_result, now: os.stat_result, fds: tuple[int, int]) -> bool:
        """Whether what is no directory in both is as it was."""
        if _marks_of(seen) != _marks_of(now):
            return False
        if seen.st_ctime_ns == now.st_ctime_ns:  # the same file of the same layer
            return True
        if not stat.S_ISREG(seen.st_mode):
            return False
        files: list[int] = []
        try:
            files += [open_regular(name, fd) for fd in fds]
            return attributes_of(files[0]) == attributes_of(files[1]) and hold_the_same(
                files[0], files[1], seen.st_size, lambda: None
            )
        except PermissionError:
            return False
        finally:
            for file in files:
                os.close(file)

    # -- copies

    def _copy(self, source: Directory, copies: _Tops, copy: Directory, parents: Sequence[str]) -> None:
        """Make ``copy``, which is one of ``source``; in directories as its ``parents`` are, of which the first is there."""
        chain = [source]
        for _ in parents:
            above = chain[-1].parent
            assert above is not None
            chain.append(above)
        made = []
        for nth, each in enumerate(reversed(chain[1:])):
            _make(copies, copy)
            made.append((each, copy))
            copy = Directory(source.name if nth == len(parents) - 1 else parents[nth + 1], copy)
        pending = [(source, copy)]
        while pending:
            each, copy = pending.pop()
            above = each.parent
            assert above is not None
            status = os.stat(each.name, dir_fd=self._sources.must(above), follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                fd = self._sources.must(each)
                _make(copies, copy)
                made.append((each, copy))
                pending += [(Directory(name, each), Directory(name, copy)) for name in os.listdir(fd)]
            else:
                with _about(each):
                    self._copy_file(each, self._sources.must(above), copies, copy, status)
        for each, copy in reversed(made):  # last, for what is made in a directory changes it
            with _about(each):
                fd = self._sources.must(each)
                _set_marks(f"/proc/self/fd/{copies.must(copy)}", os.fstat(fd), attributes_of(fd))

    def _copy_file(self, source: Directory, parent: int, copies: _Tops, copy: Directory, status: os.stat_result) -> None:
        """Copy what is no directory, in the one open as ``parent``, to ``copy``."""
        key = status.st_dev, status.st_ino
        assert copy.parent is not None
        if status.st_nlink > 1 and key in self._linked:
            where, first = self._linked[key]
            held = os.dup(copies.must(where))
            try:
                os.link(first, copy.name, src_dir_fd=held, dst_dir_fd=copies.must(copy.parent), follow_symlinks=False)
            finally:
                os.close(held)
            return
        path = f"/proc/self/fd/{copies.must(copy.parent)}/{copy.name}"
        if stat.S_ISREG(status.st_mode):
            self._copy_regular(source.name, parent, path)
        else:
            attributes = dict[str, bytes]()
            if stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(source.name, dir_fd=parent), path)
            else:
                os.mknod(path, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
                attributes = attributes_unopened(source.name, parent)
            _set_marks(path, status, attributes)
        if status.st_nlink > 1:
            self._linked[key] = copy.parent, copy.name

    def _copy_regular(self, name: str, parent: int, path: str) -> None:
        reading = open_regular(name, parent)
        try:
            status = os.fstat(reading)
            writing = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if status.st_size and not clone(reading, writing):
                    copy_data(reading, writing, status)
                _set_marks(path, status, attributes_of(reading))
                self._files += 1
                if self._flush and self._files <= _FEW:
                    os.fsync(writing)
            finally:
                os.close(writing)
        finally:
            os.close(reading)

    # -- the renames

    def _carry_out(self, its: _Beside) -> None:
        beside = its.fd
        if len(self._steps) == 1 and not self._settled and self._is_plain(self._steps[0]):
            (step,) = self._steps
            place = self._targets.must(step.target)
            with _about(step.target, step.name):
                libc.rename("0", beside, its.new, place, libc.RENAME_NOREPLACE)  # a file manager understands the next one
                try:
                    os.rename(its.new, step.name, src_dir_fd=place, dst_dir_fd=place)
                except OSError:
                    os.unlink(its.new, dir_fd=place)
                    raise
            return
        for number, step in enumerate(self._steps):
            if step.there and step.source is not None and self._exchange(beside, str(number), step):
                continue
            if step.there:
                self._take_out(step.target, step.name, beside)
            if step.source is not None:
                self._move(beside, str(number), step.target, step.name, libc.RENAME_NOREPLACE)
                self._undo.append(partial(self._move_out, step.target, step.name, beside, str(number)))
        for source, target in reversed(self._settled):
            fd, place = self._sources.must(source), self._targets.must(target)
            status, attributes = os.fstat(place), attributes_of(place)
            self._undo.append(partial(self._mark, target, status, attributes))
            self._mark(target, os.fstat(fd), attributes_of(fd))

    def _is_plain(self, step: _Step) -> bool:
        """Whether it is done by one rename, which nothing has to undo."""
        if not step.there or step.source is None or step.source.parent is None:
            return False
        seen = self._status(self._sources, step.source.parent, step.source.name)
        now = self._status(self._targets, step.target, step.name)
        return all(each is not None and not stat.S_ISDIR(each.st_mode) for each in (seen, now))

    def _exchange(self, beside: int, name: str, step: _Step) -> bool:
        """Exchange the copy ``name`` with what is there; whether the file system can."""
        try:
            self._move(beside, name, step.target, step.name, libc.RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL):
                raise
            return False
        self._undo.append(partial(self._move, beside, name, step.target, step.name, libc.RENAME_EXCHANGE))
        return True

    def _take_out(self, directory: Directory, name: str, beside: int) -> None:
        """Move ``name`` of ``directory`` to the directory open as ``beside``; a directory that can't be moved with what is in
        it, entry by entry."""
        new = f"old{len(self._undo)}"
        try:
            self._move_out(directory, name, beside, new)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            self._undo.append(partial(self._move, beside, new, directory, name, libc.RENAME_NOREPLACE))
            return
        itself = Directory(name, directory)
        fd = self._targets.must(itself)
        self._undo.append(partial(self._mark, itself, os.fstat(fd), attributes_of(fd)))
        for entry in os.listdir(fd):
            self._take_out(itself, entry, beside)
        self._targets.close(itself)
        os.rmdir(name, dir_fd=self._targets.must(directory))
        self._undo.append(partial(self._make_again, directory, name))

    def _move(self, beside: int, name: str, directory: Directory, new: str, flags: int) -> None:
        with _about(directory, new):
            libc.rename(name, beside, new, self._targets.must(directory), flags)

    def _move_out(self, directory: Directory, name: str, beside: int, new: str) -> None:
        with _about(directory, name):
            libc.rename(name, self._targets.must(directory), new, beside, libc.RENAME_NOREPLACE)

    def _make_again(self, directory: Directory, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=self._targets.must(directory))

    def _mark(self, directory: Directory, status: os.stat_result, attributes: dict[str, bytes]) -> None:
        with _about(directory):
            _set_marks(f"/proc/self/fd/{self._targets.must(directory)}", status, attributes)

    def _go_back(self) -> bool:
        """Undo what was carried out; whether all of it could be."""
        try:
            while self._undo:
                self._undo.pop()()
        except OSError:
            return False
        return True

    def _flush_places(self, beside: int) -> None:
        places = dict.fromkeys([*(step.target for step in self._steps), *(target for _, target in self._settled)])
        if len(places) > _FEW:
            mounting.sync_file_system(beside)
            return
        for directory in places:
            os.fsync(self._targets.must(directory))


def _make(copies: _Tops, directory: Directory) -> None:
    """Make ``directory``, for this user alone.  Raises OSError."""
    assert directory.parent is not None
    os.mkdir(directory.name, 0o700, dir_fd=copies.must(directory.parent))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """For a block that is not to be cut off: the signals that would end it wait for its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Beside:
    """The directory ``name`` in which copies are made: open as ``fd``, and the ``top`` of what is in it; ``new`` may be the
    name of one that is about to take its place.  ``keep``: the directory stays."""

    def __init__(self, name: str, fd: int) -> None:
        self.fd = fd
        self.new = name + _NEW
        self.top = Directory("")
        self.keep = False


@contextmanager
def _made_beside(place: int) -> Iterator[_Beside]:
    """For a block: a directory of this user's alone in the one open as ``place``.  Raises OSError."""
    place = os.dup(place)  # the walk may close it
    try:
        yield from _made_in(place)
    finally:
        os.close(place)


def _made_in(place: int) -> Iterator[_Beside]:
    for left in sorted(os.listdir(place)):
        if left.startswith(PREFIX):
            with suppress(OSError):
                _remove_left(left, place)
    name = f"{PREFIX}{os.urandom(8).hex()}"
    os.mkdir(name, 0o700, dir_fd=place)
    fd = os.open(name, inside.FLAGS, dir_fd=place)
    beside = _Beside(name, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for attribute in os.listxattr(fd):
            if attribute.startswith("system.posix_acl_"):  # what is made in there would inherit it
                os.removexattr(fd, attribute)
        yield beside
    finally:
        if not beside.keep:
            with suppress(OSError):  # the next call tries again
                _empty(fd)
                os.rmdir(name, dir_fd=place)
        os.close(fd)


def _remove_left(name: str, place: int) -> None:
    """Remove the directory ``name`` of a call that was killed, or what that was about to rename (with _NEW, so it comes later),
    unless one that goes on has it."""
    if name.endswith(_NEW):
        if name.removesuffix(_NEW) not in os.listdir(place):
            os.unlink(name, dir_fd=place)
        return
    fd = os.open(name, inside.FLAGS, dir_fd=place)
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(fd)
            os.rmdir(name, dir_fd=place)
    finally:
        os.close(fd)


def _empty(top: int) -> None:
    """Remove all that is in the directory open as ``top``, which nobody else can enter."""
    with _Tops(top) as tops:
        pending = [(Directory(""), False)]
        while pending:
            each, is_empty = pending.pop()
            if is_empty and each.parent is not None:
                tops.close(each)
                os.rmdir(each.name, dir_fd=tops.must(each.parent))
            elif not is_empty:
                if each.parent is not None:
                    os.chmod(each.name, 0o700, dir_fd=tops.must(each.parent))
                fd = tops.must(each)
                pending.append((each, True))
                for name in os.listdir(fd):
                    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        pending.append((Directory(name, each), False))
                    else:
                        os.unlink(name, dir_fd=fd)


@contextmanager
def _about(directory: Directory, name: str = "") -> Iterator[None]:
    """An error in here is about that."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = shown(directory, name), None
        raise


def _have_same_marks(fds: tuple[int, int]) -> bool:
    """Whether two directories have them, and the same attributes."""
    seen, now = map(os.fstat, fds)
    return _marks_of(seen) == _marks_of(now) and attributes_of(fds[0]) == attributes_of(fds[1])


def _marks_of(status: os.stat_result) -> tuple[int, ...]:
    """What is to be the same of two files, besides what they hold."""
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return status.st_mode, status.st_uid, status.st_gid, status.st_rdev, size, status.st_mtime_ns


def _set_marks(path: str, status: os.stat_result, attributes: dict[str, bytes]) -> None:
    """Give ``path``, which is of the same kind, owner, mode, times and attributes; raises OSError where this user may not."""
    is_link = stat.S_ISLNK(status.st_mode)
    now = os.stat(path, follow_symlinks=not is_link)
    if (status.st_uid, status.st_gid) != (now.st_uid, now.st_gid):
        os.chown(path, status.st_uid, status.st_gid, follow_symlinks=not is_link)
    if not is_link:
        for name in attributes_of(path).keys() - attributes.keys():
            os.removexattr(path, name)
        for name, value in attributes.items():
            os.setxattr(path, name, value)
        os.chmod(path, stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=not is_link)
