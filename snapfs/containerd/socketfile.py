"""The file of a Unix socket: taken over where it is stale, refused where somebody listens, there when it is ready, 0600."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import time

from snapfs.errors import InvalidArgument, Unavailable
from snapfs.kernel import trusted

PATIENCE = 2.0  # seconds for which daemons that want the same place wait for each other

LONGEST = 107  # bytes of a path that connect(2) takes


class SocketFile:
    """The socket at ``path``, an absolute one, whose directory is made where missing.

    ``bind`` a socket, then ``put`` it in its place in one step.  Meanwhile other daemons that want
    the same place wait a while: the directory is locked.  A directory that another user could exchange is refused.  What
    others do in it (it may be /tmp) can change no file of ours: all is done by descriptors, to what was made here.  Blocks on
    the disk.  Raises InvalidArgument or Unavailable where the path can't be used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        if len(os.fsencode(path)) > LONGEST:
            raise InvalidArgument(f"the path of a socket has at most {LONGEST} bytes: {path} is longer")
        try:
            with trusted.find(os.path.dirname(path), inside=True, may_lack=True) as found:
                found.make()
                self._directory = os.open(f"/proc/self/fd/{found.fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _lock(self._directory)
                self._refuse_taken()
                self._name, self._private = _private_directory(self._directory)
            except BaseException:
                os.close(self._directory)
                raise
        except trusted.Untrusted as error:
            raise Unavailable(
                f"cannot make the socket {path}: {error}; put it below directories that nobody else can write, such as /run"
            ) from None
        except OSError as error:
            raise Unavailable.from_os(f"make the socket {path}", error) from error

    def _refuse_taken(self) -> None:
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise Unavailable(f"{self.path} is in the way of the socket, and is none: move it away", errno.EEXIST)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(self.path)
            except (ConnectionRefusedError, FileNotFoundError):
                return
            except TimeoutError:
                pass  # its queue is full: somebody has it
        raise Unavailable(f"another server listens on {self.path}: stop that one, or name another socket", errno.EADDRINUSE)

    def bind(self, listener: socket.socket) -> None:
        """Bind ``listener``, which nobody can reach before it is ``put`` in its place.  Raises OSError."""
        os.fchmod(listener.fileno(), 0o600)  # what is bound has at most these rights, from the start
        listener.bind(f"/proc/self/fd/{self._private}/s")

    def put(self) -> None:
        """Put what was bound in its place, over what is stale there."""
        try:
            found = os.stat("s", dir_fd=self._private, follow_symlinks=False)
            os.rename("s", os.path.basename(self.path), src_dir_fd=self._private, dst_dir_fd=self._directory)
            os.rmdir(self._name, dir_fd=self._directory)
        except OSError as error:
            raise Unavailable.from_os(f"make the socket {self.path}", error) from error
        self._identity = found.st_dev, found.st_ino
        fcntl.flock(self._directory, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove it, unless another daemon has taken the place since."""
        with contextlib.suppress(OSError):
            name = os.path.basename(self.path)
            found = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == self._identity:
                os.unlink(name, dir_fd=self._directory)
        with contextlib.suppress(OSError):
            os.unlink("s", dir_fd=self._private)
        with contextlib.suppress(OSError):
            os.rmdir(self._name, dir_fd=self._directory)
        os.close(self._private)
        os.close(self._directory)


def _lock(directory: int) -> None:
    """Wait for other daemons that make a socket in ``directory``, but not for ever: whoever may read it may lock it, too."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _private_directory(directory: int) -> tuple[str, int]:
    """Name and descriptor of a new directory in ``directory``, 0700.  Raises OSError."""
    name = f".{secrets.token_hex(8)}"
    os.mkdir(name, 0o700, dir_fd=directory)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if os.fstat(fd).st_uid != os.geteuid() or os.listdir(fd):
            raise PermissionError(errno.EPERM, "another user has put something in its place")
    except BaseException:
        os.close(fd)
        raise
    return name, fd
