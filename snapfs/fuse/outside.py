"""The process that stays outside, where the daemon of an ordinary user has gone into a mount namespace of its own: it
mounts the tree where everybody sees it, and unmounts it when the daemon is gone, however that ended.

Both take fusermount3, which is setuid root: in there it would be nothing of the kind.  The daemon gets the open device, and
gives that to pyfuse3 in place of a mountpoint.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from itertools import islice, pairwise

from snapfs.errors import NoThread
from snapfs.fuse.mountpoint import DETACH, abort, mounted_at, mounted_on, still_there
from snapfs.kernel.forks import undisturbed
from snapfs.kernel.mounttable import MountPoint
from snapfs.kernel.processes import asking, users

ANSWER = 0.4  # seconds that a question to the process outside may take

_PATIENCE = 20  # seconds that fusermount3 may take: it looks at the mountpoint, whose server may never answer

_MOST = 8192  # bytes of a question, or an answer

_NO_PROCESS = b"no process"  # said of fusermount3, where it could not be started

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""What a terminal or a service manager sends to all processes at once: the daemon ends, and this one after it."""


class OutsideError(Exception):
    """fusermount3 refused: its words."""


class Outside:
    """The daemon's end.  Make it before there are threads, and before the daemon enters its namespaces.  ``close`` it."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        """Where the tree is to be, as the mount table has it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asks, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with undisturbed():
            self._pid = os.fork()
        if self._pid == 0:
            try:
                ours.close()
                asks.close()
                _stay(theirs, answers, mountpoint)
            finally:
                os._exit(0)
        theirs.close()
        answers.close()
        self._channel = ours
        self._asks = asks
        self._asking = threading.Lock()
        asks.settimeout(ANSWER)

    def mount(self, options: set[str]) -> int:
        """Mount the tree: the descriptor of the device.  Raises OutsideError, and NoThread."""
        self._channel.send(",".join(sorted(options)).encode())
        words, fds, _, _ = socket.recv_fds(self._channel, 65536, 1)
        if words == _NO_PROCESS:
            raise NoThread()
        if not fds:
            raise OutsideError(words.decode(errors="replace").strip() or "the process that mounts has ended")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def users(self, directory: str) -> list[tuple[int, str]]:
        """``kernel.processes.users``, as the process outside sees them; none where it takes too long to tell.  Threads may
        share it."""
        try:
            with self._asking:
                while select.select([self._asks], [], [], 0)[0]:  # an answer that came too late
                    if not self._asks.recv(_MOST):
                        return []
                self._asks.send(b"%d %b" % (asking.get(), os.fsencode(directory)[:_MOST]))
                words = self._asks.recv(_MOST).decode(errors="surrogateescape").splitlines()
        except OSError:
            return []
        return [(int(pid), name) for pid, _, name in (line.partition(" ") for line in words if line)]

    def fileno(self) -> int:
        """Becomes readable when ``told`` has something."""
        return self._channel.fileno()

    def told(self) -> str | None:
        """Where something was mounted over the tree, or over what is in it; None once the tree is no longer mounted."""
        return os.fsdecode(self._channel.recv(_MOST)) or None

    def close(self) -> None:
        """Refuse all requests that wait in the kernel, unmount the tree, if it is still mounted, and nothing else; returns when
        that is done.  Twice is fine."""
        if self._channel.fileno() >= 0:
            self._channel.close()
            self._asks.close()
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)


def _stay(channel: socket.socket, answers: socket.socket, mountpoint: str) -> None:
    """What the process outside does with its life."""
    os.setsid()
    kept = sorted((2, channel.fileno(), answers.fileno(), 1 << 20))
    for first, end in pairwise(kept):  # whatever others wait for the end of
        os.closerange(first + 1, end)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    options = channel.recv(65536)
    if not options:
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = ["fusermount3", "-o", os.fsdecode(options), "--", mountpoint]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        try:
            done = subprocess.run(
                words,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            channel.send(f"{words[0]} did not answer within {_PATIENCE} s: see whether {mountpoint} does".encode())
            return
        except BlockingIOError:
            channel.send(_NO_PROCESS)
            return
        except OSError as error:
            channel.send(f"{words[0]}: {error.strerror}; install it (Debian: apt-get install fuse3)".encode())
            return
        if done.returncode != 0:
            channel.send(done.stderr[:60000] or b"fusermount3 failed")
            return
        theirs.close()  # or a program that has sent nothing would be waited for
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not fds:
            channel.send(f"{words[0]} gave no device: is it libfuse's?".encode())
            return
    own = mounted_at(mountpoint)
    socket.send_fds(channel, [b"1"], fds)
    os.close(fds[0])
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # whoever reads what the daemon says is to see its end
        os.dup2(nothing, descriptor)
    if _watch(channel, answers, own) and own is not None:
        _unmount(own)


def _watch(channel: socket.socket, answers: socket.socket, own: MountPoint | None) -> bool:
    """Return when the daemon is gone: True; or when ``own`` is no longer mounted, of which the daemon is told: False.  Until
    then, answer.

    The daemon would not learn that from the kernel while a mount namespace that was made meanwhile has a copy of the mount.
    It is also told what is mounted over that."""
    told: set[int] = set()
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        poll.register(answers, select.POLLIN)
        poll.register(table, select.POLLPRI)  # and POLLERR, which is always told
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if channel.fileno() in ready:
                return True
            if answers.fileno() in ready:
                pid, _, directory = answers.recv(2 * _MOST).partition(b" ")
                if not directory:
                    return True
                asking.set(int(pid))
                found = islice(users(os.fsdecode(directory)), 5)
                answers.send("\n".join(f"{pid} {name}" for pid, name in found).encode(errors="replace") or b"\n")
            if own is None:
                continue
            if still_there(own) is None:
                return False
            over = mounted_on(own)
            for number in over.keys() - told:
                with suppress(BlockingIOError):
                    channel.send(os.fsencode(over[number])[:_MOST], socket.MSG_DONTWAIT)
            told = set(over)


def _unmount(own: MountPoint) -> None:
    if still_there(own) is None:
        return
    now = mounted_at(own.target)
    abort(own)
    if now is not None and now.id == own.id:  # else something is mounted over it
        os.execvp(DETACH[0], [*DETACH, own.target])  # a process for it could perhaps not be started
