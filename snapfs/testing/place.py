"""The directory of one run of the tests, in the system's directory for temporary files: bases, copies, all of them.

Each process of the run holds a lock on it for as long as it lives (flock(2), shared).  Where nobody holds one the run has been
killed, and the next one of the same user removes the directory, with what may still be mounted there.

    snapfs-testing-<run>/            0711: a server that is another user gets to its copy, and nobody sees the names of others
        <bases>/<digest>/data/       what a base holds
        <bases>/<digest>.lock        held by who makes it
        <copy>/m/data/               what a test works in; m is where the overlay is mounted
        <copy>/upper <copy>/work     the layers of that overlay

<run> is seen by everybody.  <bases> and <copy> can't be guessed, for what others may read there was perhaps in a directory that
they could not enter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile

from snapfs.kernel import mounting, trusted
from snapfs.kernel.beneath import called, open_beneath
from snapfs.kernel.mounttable import MountPoint, lines_of, mount_id_of, mount_table, parse
from snapfs.testing import capabilities, copying

PREFIX = "snapfs-testing-"

_ROUNDS = 16  # at most, for others may mount again and again
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC  # asks no server of a file system
_SEEN = 8  # characters of the name of a run


class Place:
    """The directory of the run ``name`` (``new_name``), made if it isn't there yet; ``shared``: with other processes, one of
    which removes it.  Raises OSError."""

    def __init__(self, name: str = "", *, shared: bool = False) -> None:
        self._pid = os.getpid()
        self._shared = shared
        top = os.path.realpath(tempfile.gettempdir())
        _clear_dead_runs(top)
        name = name or new_name()
        self.path = f"{top}/{PREFIX}{name[:_SEEN]}"
        self.bases = f"{self.path}/{name[_SEEN:]}"
        self._fd = _joined(self.path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.bases, 0o711)
            os.chmod(self.bases, 0o711)

    def new(self) -> str:
        """A new directory in it, with a name that can't be guessed."""
        path = f"{self.path}/{secrets.token_hex(8)}"
        os.mkdir(path, 0o711)
        os.chmod(path, 0o711)
        return path

    def close(self) -> None:
        """Leave it, and remove it unless others of the run may still need it."""
        if self._pid != os.getpid():  # a forked child, whose parent still needs it
            return
        if not self._shared:
            remove(self.path)
        os.close(self._fd)


def remove(path: str) -> None:
    """Remove the directory of a run, and unmount what is mounted there.  Raises OSError: EBUSY where something stays mounted,
    which somebody else may have moved there (``_unmounted``)."""
    with capabilities.raised(), contextlib.suppress(FileNotFoundError):
        top = os.open(path, _LOOK | os.O_DIRECTORY)
        try:
            for _ in range(_ROUNDS):
                if not _unmounted(path, top):
                    break
        finally:
            os.close(top)
    with contextlib.suppress(FileNotFoundError):
        copying.remove_tree(path)


def _unmounted(path: str, top: int) -> bool:
    """Unmount each mount that stands in the directory ``path``, which is open as ``top``, with all that is mounted in there;
    whether there was any, for meanwhile others may have been hidden by it, or moved."""
    own = mount_id_of(top)
    targets = [mount.target for mount in mount_table() if mount.parent == own and mount.target.startswith(f"{path}/")]
    done = False
    for target in reversed(targets):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd, are_ours = _followed(target[len(path) + 1 :], top, own, stack)
            number = mount_id_of(fd)
            # the descriptor keeps the mount: none but this one has its number in the table that is read now
            lines = [line for line in lines_of("self") if line.startswith(f"{number} ")]
            if number != own and (are_ours or any(_is_of_others(parse(line)) for line in lines)):
                mounting.unmount(f"/proc/self/fd/{fd}", mounting.MNT_DETACH)
                done = True
    return done


def _followed(target: str, top: int, own: int, stack: contextlib.ExitStack) -> tuple[int, bool]:
    """A descriptor of what is at ``target``, a path from ``top`` on, and whether nobody else could have put it there.  Users to
    whom tests have given directories may exchange what is in them, so no link is followed on the way, and no other mount than
    ``own`` entered: its server may never answer.  Raises OSError."""
    fd, are_ours = top, True
    *above, name = target.split("/")
    for each in above:
        fd = os.open(each, _LOOK | os.O_DIRECTORY, dir_fd=fd)
        stack.callback(os.close, fd)
        if mount_id_of(fd) != own:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), target)
        found = os.fstat(fd)
        are_ours = are_ours and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    fd = os.open(name, _LOOK, dir_fd=fd)
    stack.callback(os.close, fd)
    return fd, are_ours


def _is_of_others(mount: MountPoint) -> bool:
    """Whether another user has mounted it.  One of ours, in a directory of theirs, they may have moved with that directory."""
    return mount.type.startswith("fuse") and trusted.server_of(mount) not in trusted.trusted_users()


def new_name() -> str:
    """A name for a run: others see the beginning of it, and can't guess the rest, by which its processes find its bases."""
    return secrets.token_hex(_SEEN // 2 + 8)


def path_of_run(name: str) -> str:
    """Where the directory of the run ``name`` is, or would be."""
    return f"{os.path.realpath(tempfile.gettempdir())}/{PREFIX}{name[:_SEEN]}"


def lock(path: str, how: int) -> int | None:
    """A descriptor of the directory ``path``, locked with ``how``; None where it is gone or, without waiting, the lock is
    another's.  Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, how)
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _joined(path: str) -> int:
    """The descriptor that keeps the directory ``path``, which is made where it is missing.  Until it is locked, another process
    that starts takes it for that of a dead run, and may remove it."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
                raise PermissionError(f"{path} is somebody else's")
            os.chmod(path, 0o711)
            fd = lock(path, fcntl.LOCK_SH)
            if fd is not None:
                return fd


def _is_of_this_user(path: str) -> bool:
    """Whether ``path`` is a directory of this user's, and not what somebody has mounted there, whose server may never answer.
    Raises OSError."""
    top = os.open(os.path.dirname(path), _LOOK | os.O_DIRECTORY)
    try:
        found = open_beneath(os.fsencode(os.path.basename(path)), top, _LOOK | os.O_DIRECTORY)
    finally:
        os.close(top)
    try:
        return os.fstat(found).st_uid == os.geteuid()
    finally:
        os.close(found)


def _clear_dead_runs(top: str) -> None:
    held = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        runs = called(PREFIX, held)
    finally:
        os.close(held)
    for path in (f"{top}/{name}" for name in runs):
        with contextlib.suppress(OSError):
            if _is_of_this_user(path) and (fd := lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
                try:
                    remove(path)
                finally:
                    os.close(fd)
