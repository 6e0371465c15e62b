"""Who has a root open: one process at most, by a lock on ROOT/lock."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from snapfs.errors import FULL, Unavailable

log = logging.getLogger(__name__)

NAME = "lock"

DYING = 2.0  # seconds for which ``acquire`` waits until a killed process has released the lock, or a backup has ended


def acquire(directory: int, root: str) -> tuple[int, str]:
    """Lock the file ``lock`` in the directory open as ``directory``, ROOT, called ``root``; it is made where missing, and not
    written yet.

    Returns the descriptor that holds the lock until it is closed, or the process ends, and the text that the last holder has
    left: its pid, or its note.  Raises Unavailable where another process holds it (which one), OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(NAME, flags, 0o600, dir_fd=directory)
    except OSError as error:
        error.filename = f"{root}/{NAME}"
        raise
    try:
        deadline = time.monotonic() + DYING
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd, os.pread(fd, 4096, 0).decode(errors="replace").strip()
            except BlockingIOError:
                holder = _holder(fd)
                gone = _is_dying(holder) or not os.path.exists(f"/proc/{holder}")
                if gone and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                by = f"the process with pid {holder or 'unknown'}; stop that one first"
                if gone:
                    by = "a backup, or by a process that can't be seen from here: wait for it, or stop that one first"
                raise Unavailable(f"{root} is in use by {by}") from None
    except BaseException:
        os.close(fd)
        raise


def write(fd: int, text: str) -> None:
    """Write ``text`` to the lock that is open as ``fd``, unless the disk is full; raises OSError."""
    line = f"{text}\n".encode()
    try:
        os.pwrite(fd, line, 0)  # over what was there, for which there is room on a full disk too
        os.ftruncate(fd, len(line))
    except OSError as error:
        if error.errno not in FULL:
            raise
        log.debug("the lock does not say %s: %s", text, error)


def is_abandoned(root: str) -> bool:
    """Whether no living process has ``root`` open.

    A process that was killed may still hold the lock, while one of its threads is stuck in the kernel: it counts as dead.
    """
    try:
        fd = _open(root)
    except OSError:
        return not os.path.isdir(root)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as a backup has it, which is no daemon
        return True
    except BlockingIOError:
        return _is_dying(_holder(fd))
    finally:
        os.close(fd)


@contextmanager
def shared_lock(root: str) -> Iterator[int | None]:
    """A context manager: keeps all processes from opening ``root`` within the block, if none has it open; then it gives None.

    Otherwise it gives the pid of the process that has ``root`` open, 0 where the lock does not say which.  Several processes
    may be in such blocks at once.  Raises OSError.
    """
    try:
        fd = _open(root)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd)
            yield int(holder) if holder.isdigit() else 0
        else:
            yield None
    finally:
        os.close(fd)


def _open(root: str) -> int:
    """A descriptor of the lock, to read; whatever it is, that doesn't wait.  Raises OSError."""
    return os.open(f"{root}/{NAME}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _holder(fd: int) -> str:
    return os.pread(fd, 20, 0).decode(errors="replace").strip()


def _is_dying(pid: str) -> bool:
    """Whether process ``pid`` was killed and is not gone yet."""
    try:
        with open(f"/proc/{int(pid)}/stat") as file:
            return file.read().rpartition(") ")[2][:1] in ("Z", "X")
    except (OSError, ValueError):
        return False
