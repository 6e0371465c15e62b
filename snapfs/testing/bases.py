"""Bases: each made once, by whichever process of the run needs it first, or found in a cache that outlives the run.

A base is made beside its place, under a lock, and renamed to it: there is a whole one or none.  In a cache each process locks
the bases that it uses (flock(2), shared), so that no other run removes one of them when the cache has become too large.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from snapfs.kernel import mounting, trusted
from snapfs.testing import copying, digests
from snapfs.testing.place import lock

Source = str | os.PathLike[str] | Callable[[Path], object]

DATA = "data"
_SIZE, _UNREADABLE, _OPENED = ".size", ".unreadable", ".opened"


class Bases:
    """The bases of a run, in its directory ``path``; those that can be named are in the directory ``cache`` instead, if there
    is one, which is kept within ``limit`` bytes."""

    def __init__(self, path: str, cache: str | None = None, limit: int = 0) -> None:
        self._path = path
        self._cache = cache
        self._limit = limit
        self._made: dict[object, Path] = {}
        self._locks: list[int] = []
        if cache is not None:
            _claim(cache)

    def close(self) -> None:
        """Others may remove from the cache what was used."""
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()

    def get(self, source: Source, depends: Iterable[str | os.PathLike[str]] = ()) -> Path:
        """The directory with what ``source`` makes, or holds; made if it isn't there yet.  Raises what ``source`` raises."""
        depends = tuple(depends)
        known = (source if callable(source) else os.path.realpath(source), depends)
        if known not in self._made:
            self._made[known] = self._get(source, depends)
        return self._made[known]

    def is_one(self, path: object) -> bool:
        """Whether ``path`` is the directory of a base that was made or found here."""
        return path in self._made.values()

    def _get(self, source: Source, depends: tuple[str | os.PathLike[str], ...]) -> Path:
        if inspect.iscoroutinefunction(source):
            raise TypeError(f"{source.__qualname__} is async: give snapfs a function that fills the directory and returns")
        try:
            if callable(source):
                name = digests.of_function(source, depends)
            else:
                name = digests.of_directory(os.path.realpath(source), contents=self._cache is not None)
        except digests.Unknown:
            return self._found_or_made(self._path, f"{os.getpid()}-{secrets.token_hex(4)}", source)
        if self._cache is None:
            return self._found_or_made(self._path, name, source)
        return self._in_cache(self._cache, name, source)

    def _found_or_made(self, directory: str, name: str, source: Source) -> Path:
        place = f"{directory}/{name}"
        base = Path(place, DATA)
        if _is_there(place):
            return base
        with _locked(f"{place}.lock"):
            if not _is_there(place):
                new = f"{place}.new"
                if os.path.lexists(new):  # of a process that was killed
                    copying.remove_tree(new)
                os.mkdir(new, 0o711)
                os.chmod(new, 0o711)
                alive = lock(new, fcntl.LOCK_SH)
                try:
                    _fill(f"{new}/{DATA}", source)
                    if copying.is_unreadable(f"{new}/{DATA}"):
                        Path(place + _UNREADABLE).touch()
                    if directory == self._cache:
                        Path(place + _SIZE).write_text(str(copying.size_of(new)))
                        _flush(new)
                    os.rename(new, place)
                except BaseException:
                    copying.remove_tree(new)
                    raise
                finally:
                    if alive is not None:
                        os.close(alive)
        return base

    def _in_cache(self, cache: str, name: str, source: Source) -> Path:
        place = f"{cache}/{name}"
        while True:
            _remove_opened(place)
            before = os.path.isdir(place)
            base = self._found_or_made(cache, name, source)
            fd = lock(place, fcntl.LOCK_SH)
            if fd is not None:
                self._locks.append(fd)
                os.utime(place)
                if not before:
                    _shrink(cache, self._limit)
                return base


def _claim(cache: str) -> None:
    """Make the directory ``cache``, unless it is there.  Its bases have names that others can guess, and tests run what is in
    them.  Raises PermissionError where anybody else could have made one, or will be able to, and where it can't be made."""
    to_do = "keep bases in a directory of your own, below directories that nobody else can write"
    try:
        with trusted.find(cache, inside=True, may_lack=True) as found:
            for path in found.make():
                if os.geteuid() == 0:  # what fills a base may be a server, as another user
                    os.chmod(path, 0o711)
            status = os.fstat(found.fd)
    except trusted.Untrusted as error:
        raise PermissionError(f"no bases can be kept in {cache}: {error}; {to_do}") from None
    except OSError as error:
        words = f"{error.strerror} ({error.filename or cache})"
        raise PermissionError(f"no bases can be kept in {cache}: {words}; {to_do}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"no bases can be kept in {cache}: it is no directory; {to_do}")
    if status.st_uid != os.geteuid():
        whose = trusted.user_name(status.st_uid)
        raise PermissionError(f"no bases can be kept in {cache}: it belongs to the user {whose}; {to_do}")
    if status.st_mode & stat.S_ISVTX and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"no bases can be kept in {cache}: others can make files there; {to_do}")


def _is_there(place: str) -> bool:
    """Whether the base ``place`` was made.  Raises PermissionError where another user has done so, before ``_claim``."""
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        return False
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{place} is somebody else's: remove it")
    return True


def _flush(directory: str) -> None:
    """Or a power cut could leave half a base with its name."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mounting.sync_file_system(fd)
    finally:
        os.close(fd)


def copy_whole(base: Path, target: str, *, clone: bool) -> None:
    """Make ``target`` a whole copy of ``base``; one process at a time where modes have to be changed for it.

    Raises OSError.
    """
    place = str(base.parent)
    if not os.path.exists(place + _UNREADABLE):
        copying.copy_tree(str(base), target, clone=clone)
        return
    with _locked(f"{place}.lock"):
        Path(place + _OPENED).touch()
        with copying.readable(str(base)) as modes:
            copying.copy_tree(str(base), target, clone=clone, modes=modes)
        Path(place + _OPENED).unlink(missing_ok=True)


def _remove_opened(place: str) -> None:
    """Remove the base ``place``, unless it is in use, where a process was killed while modes were changed in it."""
    if not os.path.exists(place + _OPENED):
        return
    with _locked(f"{place}.lock"):  # or a process is at it
        if os.path.exists(place + _OPENED) and (fd := lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            try:
                _remove(place)
            finally:
                os.close(fd)


def _remove(place: str) -> None:
    gone = f"{place}.gone-{secrets.token_hex(4)}"
    os.rename(place, gone)  # whole or not at all
    copying.remove_tree(gone)
    for mark in (_SIZE, _UNREADABLE, _OPENED):
        Path(place + mark).unlink(missing_ok=True)


def _fill(directory: str, source: Source) -> None:
    if callable(source):
        os.mkdir(directory)
        os.chmod(directory, 0o755)
        source(Path(directory))
    else:
        copying.copy_tree(os.path.realpath(source), directory, clone=True)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _shrink(cache: str, limit: int) -> None:
    """Remove what was used longest ago, until all that is left takes at most ``limit`` bytes, or is in use; and what killed
    processes left half made, or half removed."""
    with _locked(f"{cache}/lock"):
        found = []
        for name in os.listdir(cache):
            if ".gone-" in name:
                copying.remove_tree(f"{cache}/{name}")
            elif name.endswith(".new") and (fd := lock(f"{cache}/{name}", fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                copying.remove_tree(f"{cache}/{name}")
                os.close(fd)
            elif name.endswith(_SIZE):
                place = f"{cache}/{name.removesuffix(_SIZE)}"
                with contextlib.suppress(OSError, ValueError):
                    found.append((os.stat(place).st_mtime_ns, place, int(Path(place + _SIZE).read_text())))
        total = sum(size for _, _, size in found)
        for _, place, size in sorted(found):
            if total <= limit:
                break
            fd = lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd is not None:
                try:
                    _remove(place)
                    total -= size
                finally:
                    os.close(fd)
