"""The file of a Unix socket: taken over where it is stale, refused where somebody listens, there when it is ready, 0600."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile

from snapfs.errors import InvalidArgument, Unavailable

LONGEST = 107  # bytes of a path that connect(2) takes


class SocketFile:
    """The socket at ``path``, an absolute one, whose directory is made where missing.

    Bind at ``fresh``, then ``put`` it in its place in one step.  Meanwhile other daemons that want the same place wait: the
    directory is locked.  Blocks on the disk.  Raises InvalidArgument or Unavailable where the path can't be used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        if len(os.fsencode(path)) > LONGEST:
            raise InvalidArgument(f"the path of a socket has at most {LONGEST} bytes: {path} is longer")
        directory = os.path.dirname(path)
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._directory, fcntl.LOCK_EX)
                self._refuse_taken()
                self._private = tempfile.mkdtemp(prefix=".", dir=directory)  # nobody else gets in there
            except BaseException:
                os.close(self._directory)
                raise
        except OSError as error:
            raise Unavailable.from_os(f"make the socket {path}", error) from error
        self.fresh = f"/proc/self/fd/{self._directory}/{os.path.basename(self._private)}/s"

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

    def put(self) -> None:
        """Put what was bound at ``fresh`` in its place, over what is stale there."""
        try:
            os.chmod(self.fresh, 0o600)
            found = os.lstat(self.fresh)
            os.rename(self.fresh, self.path)
            os.rmdir(self._private)
        except OSError as error:
            raise Unavailable.from_os(f"make the socket {self.path}", error) from error
        self._identity = found.st_dev, found.st_ino
        fcntl.flock(self._directory, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove it, unless another daemon has taken the place since."""
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._identity:
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            os.unlink(self.fresh)
        with contextlib.suppress(OSError):
            os.rmdir(self._private)
        os.close(self._directory)
