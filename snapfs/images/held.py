"""The directory that an image is written to, held open: what is in it is reached by its name, by no link, in no other mount.

Nobody but root and this process's user may be able to exchange it, or what is in it (``kernel/trusted.py``).  The topmost may
be sticky, so others may have put there what they like: each file is looked at before it is opened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self

from snapfs.errors import InvalidArgument
from snapfs.kernel import trusted
from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.kernel.unnamed import Unnamed, unnamed

LOCK = ".snapfs-lock"

_DIRECTORIES = 0o755
_FILES = 0o644


class HeldDirectory:
    """The directory open as ``fd``, called ``path`` in sentences: a context manager, which closes it."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def find(cls, path: str, *, may_make: bool = False) -> HeldDirectory:
        """The one at ``path``, which is made if it alone is missing and ``may_make``.  Raises Untrusted, InvalidArgument where
        something else is there, and OSError."""
        with trusted.find(path, inside=True, may_lack=may_make) as found:
            if not found.missing:
                return cls(_open("", found.fd, path, os.O_RDONLY | os.O_DIRECTORY), path)
            if len(found.missing) > 1:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return _directory(found.missing[0], found.fd, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        os.close(self.fd)

    def directory(self, name: str) -> HeldDirectory:
        """The directory ``name`` in it, which is made if it is missing.  Raises as ``find``."""
        return _directory(name, self.fd, f"{self.path}/{name}")

    def names(self) -> list[str]:
        """Raises OSError."""
        return os.listdir(self.fd)

    def has(self, name: str) -> bool:
        """Whether anything has the ``name``, whatever it is.  Raises OSError."""
        try:
            os.close(open_beneath(os.fsencode(name), self.fd, LOOK))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            if error.errno != errno.EXDEV:
                raise
        return True

    def has_directory(self, name: str) -> bool:
        """Whether ``name`` is a directory, on which nothing is mounted."""
        try:
            found = open_beneath(os.fsencode(name), self.fd, LOOK)
        except OSError:
            return False
        try:
            return stat.S_ISDIR(os.fstat(found).st_mode)
        finally:
            os.close(found)

    def has_whole(self, name: str, size: int) -> bool:
        """Whether ``name`` is a regular file of ``size`` bytes that nobody else can write.  Raises OSError."""
        try:
            found = open_beneath(os.fsencode(name), self.fd, LOOK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EXDEV):
                raise
            return False
        try:
            status = os.fstat(found)
            return stat.S_ISREG(status.st_mode) and status.st_size == size and trusted.is_own(found)
        finally:
            os.close(found)

    def file(self, name: str) -> int:
        """A descriptor of the regular file ``name``, for reading.  Raises InvalidArgument where it is anything else, which is
        not opened: a FIFO would wait, a device do something; and OSError."""
        path = f"{self.path}/{name}"
        found = _open(name, self.fd, path, LOOK)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise InvalidArgument(f"{path} is no regular file: remove it, or name a new directory")
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(found)

    def unnamed(self, mode: int = _FILES) -> AbstractContextManager[Unnamed]:
        """A new file, which may become one of this directory."""
        return unnamed(f"/proc/self/fd/{self.fd}", mode)

    def remove(self, name: str) -> None:
        """Raises OSError, but not where it is gone."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def replace(self, name: str, data: bytes) -> None:
        """Make ``data`` the file ``name``, within ``locked``; whoever reads it sees what was or what is.  Raises OSError."""
        beside = beside_of(name)
        with self.unnamed() as made, open(made.fd, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            self.remove(beside)  # of one that was killed
            made.become(beside)
        os.rename(beside, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For a block: no other process of this user's, or of root's, is in one for this directory.

        Whoever may read a file or a directory may lock it for as long as he likes: so it is a file that nobody else can open.
        Raises Untrusted, InvalidArgument, OSError."""
        while (fd := self._locked_file()) < 0:
            pass
        try:
            yield
        finally:
            self.remove(LOCK)
            os.close(fd)

    def _locked_file(self) -> int:
        """A descriptor of the file LOCK, locked; -1 where another process has removed it meanwhile, which had the lock."""
        with suppress(FileExistsError):
            os.close(os.open(LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.fd))
        try:
            fd = self.file(LOCK)
        except FileNotFoundError:
            return -1
        with ExitStack() as ended:
            ended.callback(os.close, fd)
            status = os.fstat(fd)
            if status.st_mode & 0o077 or status.st_nlink > 1 or not trusted.is_own(fd):
                raise InvalidArgument(f"{self.path}/{LOCK} is nothing that snapfs has made: remove it")
            fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(status, os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)):
                    ended.pop_all()
                    return fd
        return -1


def beside_of(name: str) -> str:
    """What a file is called that is to take the place of ``name``."""
    return f".{name}.snapfs"


def _directory(name: str, above: int, path: str) -> HeldDirectory:
    with suppress(FileExistsError):
        os.mkdir(name, _DIRECTORIES, dir_fd=above)
    found = HeldDirectory(_open(name, above, path, os.O_RDONLY | os.O_DIRECTORY), path)
    try:
        trusted.refuse_foreign(found.fd, path)
    except BaseException:
        os.close(found.fd)
        raise
    return found


def _open(name: str, above: int, path: str, flags: int) -> int:
    """A descriptor of ``name``, called ``path``, in the directory ``above``; raises InvalidArgument and OSError."""
    try:
        return open_beneath(os.fsencode(name), above, flags)
    except OSError as error:
        why = {
            errno.EXDEV: f"something is mounted on {path}: unmount it first, or name another directory",
            errno.ENOTDIR: f"{path} is no directory: an OCI layout is one, and no link in it is followed",
        }.get(error.errno or 0)
        if why is None:
            raise
        raise InvalidArgument(why) from None
