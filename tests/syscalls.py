"""Processes whose system calls are held before they are made: counted, let go, refused, or never made because of SIGKILL.

Built on seccomp's user notification (seccomp_unotify(2)).  A process that calls ``Channel.watch`` has each of its threads
stopped by the kernel before a call of the chosen kinds until this side has answered: go on, fail with an errno, or, having
been killed, nothing at all.  So a kill comes exactly between two system calls, and a disk that is broken needs no broken disk.

Starting an interpreter takes longer than most of what is to be killed.  So a server imports the program once and forks for each
process: no more than some milliseconds.  What runs in such a process is a function of a module, called with a ``Channel``, over
which it says what it likes; neither that nor what goes to standard output and error is ever held.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import importlib
import json
import os
import platform
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

CHANGING = tuple(
    """
    mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir link linkat symlink symlinkat mknod mknodat creat open
    openat write pwrite64 writev pwritev pwritev2 splice sendfile copy_file_range fsync fdatasync msync syncfs sync
    sync_file_range truncate ftruncate fallocate setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
    chmod fchmod fchmodat fchmodat2 chown lchown fchown fchownat utimensat mount umount2 move_mount fsopen fsconfig
    fsmount open_tree mount_setattr
    """.split()  # noqa: SIM905
)
"""The calls by which a process changes anything outside of itself; ``open`` only as far as it creates or truncates."""

EVERY = int(os.environ.get("EVERY", "8"))
"""A test that repeats a program for its system calls takes one of so many; all of them by ``make crash``."""

_MAKES_FILES = os.O_CREAT | os.O_TRUNC
_OPENS = {"open": 1, "openat": 2}  # which argument holds the flags
_WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")

_SHOWN = {
    **dict.fromkeys(
        ("mkdir", "rmdir", "unlink", "creat", "open", "truncate", "chmod", "chown", "lchown", "mknod", "umount2"), "p"
    ),
    **dict.fromkeys(("setxattr", "lsetxattr", "removexattr", "lremovexattr", "rename", "link", "symlink"), "pp"),
    **dict.fromkeys(
        ("mkdirat", "unlinkat", "openat", "fchmodat", "fchmodat2", "fchownat", "mknodat", "utimensat", "open_tree"), "-p"
    ),
    **dict.fromkeys(("renameat", "renameat2", "linkat"), "-p-p"),
    **dict.fromkeys((*_WRITES, "fsync", "fdatasync", "syncfs", "ftruncate", "fallocate", "fchmod", "fchown", "fsetxattr"), "f"),
    **dict.fromkeys(("fsopen",), "p"),
    "move_mount": "---p",
    "mount": "-p",
    "splice": "--f",
    "fsconfig": "--p",
}
"""For people: which arguments are paths (p) or descriptors (f)."""


# -- the filter, a program of classic BPF (seccomp(2), linux/filter.h)

_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP_SET_MODE_FILTER = 1
_TSYNC, _NEW_LISTENER, _TSYNC_ESRCH, _WAIT_KILLABLE_RECV = 1, 8, 16, 32

_RECV, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_CONTINUE = 1


@functools.cache
def numbers() -> dict[str, int]:
    """The numbers of all system calls of this machine, as the C library's headers have them."""
    headers = subprocess.run(
        ["cc", "-E", "-dM", "-"], input="#include <sys/syscall.h>\n", stdout=subprocess.PIPE, text=True, check=True
    )
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", headers.stdout)}


def _program(known: dict[str, int], all_opens: bool) -> bytes:
    instructions = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _ARCHES[platform.machine()]), (_RETURN, 0, 0, _ALLOW)]
    instructions.append((_LOAD, 0, 0, _NUMBER))
    for name in CHANGING:
        if name not in known:  # what an architecture lacks
            continue
        if name in _OPENS and not all_opens:
            body = [(_LOAD, 0, 0, _ARGUMENTS + 8 * _OPENS[name]), (_ANY_BIT, 0, 1, _MAKES_FILES)]
            body += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        elif name in _WRITES:
            body = [(_LOAD, 0, 0, _ARGUMENTS), (_GREATER, 0, 1, 2), (_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        else:
            body = [(_RETURN, 0, 0, _NOTIFY)]
        instructions += [(_EQUAL, 0, len(body), known[name]), *body]
    instructions.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _install(known: dict[str, int], all_opens: bool) -> int:
    """Have all threads of this process watched from here on; the listener's descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    text = _program(known, all_opens)
    program = _Program(len(text) // 8, text)
    flags = _TSYNC | _NEW_LISTENER | _TSYNC_ESRCH | _WAIT_KILLABLE_RECV
    listener = libc.syscall(known["seccomp"], _SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(listener)


# -- in the process

Message = list[object]
Answer = Callable[["Call"], "int | None"]

KILL = 0
"""What ``Process.hold``'s ``decide`` answers for a call that is never to be made; an errno lets it fail, None lets it go."""


class Channel:
    """A process's own end: how it speaks to whoever started it.  Threads may share it."""

    def __init__(self, end: socket.socket, known: dict[str, int]) -> None:
        self._end = end
        self._known = known

    def say(self, *message: object) -> None:
        """Tell the other side, at once and whole."""
        self._end.send(json.dumps(message).encode())

    def watch(self, *, all_opens: bool = False) -> None:
        """From here on all threads are held before each call that changes something, or opens a file if ``all_opens``."""
        listener = _install(self._known, all_opens)
        socket.send_fds(self._end, [b"[]"], [listener])
        os.close(listener)

    def wait(self) -> None:
        """Return when the other side is gone, or has said that this one may go on."""
        self._end.recv(1)


def _serve(control: socket.socket) -> None:
    """Fork for each request; a request is [module, function, arguments] with the child's end of a channel."""
    while True:
        request, ends, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not request:
            return
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # who asks has let go of all earlier ones
                pass
        pid = os.fork()
        if pid == 0:
            control.close()
            _run(socket.socket(fileno=ends[0]), request)
        os.close(ends[0])
        control.send(str(pid).encode())


def _run(end: socket.socket, request: bytes) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
    module, function, known, arguments = json.loads(request)
    channel = Channel(end, known)
    try:
        getattr(importlib.import_module(module), function)(channel, *arguments)
        os._exit(0)
    except BaseException:
        channel.say("error", traceback.format_exc())
        os._exit(1)


# -- outside of it


@dataclass(frozen=True)
class Call:
    """A call that a thread is about to make; the ``nth`` of its process."""

    nth: int
    name: str
    thread: int
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        """As strace(1) would show it, as far as it says what is changed.  Only while it is held."""
        shown = []
        for kind, argument in zip(_SHOWN.get(self.name, ""), self.arguments, strict=False):
            if kind == "p":
                shown.append(self._text(argument))
            elif kind == "f":
                with suppress(OSError):
                    shown.append(os.readlink(f"/proc/{self.thread}/fd/{argument}"))
        return f"{self.name}({', '.join(shown)})"

    def _text(self, address: int) -> str:
        text = b""
        with suppress(OSError), open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            while address and b"\0" not in text and len(text) < 4096:
                memory.seek(address)
                part = memory.read(min(256, 4096 - address % 4096))  # the next page may not be there
                text, address = text + part, address + len(part)
        return os.fsdecode(text.partition(b"\0")[0])


class Process:
    """A process that ``Server.start`` has started."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid = pid
        self.said: list[Message] = []
        """All that it has said so far."""
        self.calls = 0
        """How many of its calls were held so far."""
        self._pidfd = os.pidfd_open(pid)
        self._end = end
        self._listener = -1
        self._names = {number: name for name, number in numbers().items()}
        self._held: list[tuple[int, Call]] = []
        self._open = True

    @property
    def ended(self) -> bool:
        """Whether it has ended, with all its threads."""
        return bool(select.select([self._pidfd], [], [], 0)[0])

    @property
    def gone(self) -> bool:
        """Whether it has closed its end of the channel, so that it says nothing more."""
        return not self._open

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds; takes what it has said."""
        ended = bool(select.select([self._pidfd], [], [], seconds)[0])
        self._listen()
        return ended

    def kill(self, *, within: float = 10.0) -> bool:
        """End it now.  False if a thread of it is still stuck in the kernel after ``within`` seconds."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return self.wait(within)

    def signal(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def go_on(self) -> None:
        """Let ``Channel.wait`` return."""
        self._end.send(b"x")

    def close(self) -> None:
        """Kill it and let go of it; twice is fine."""
        if self._pidfd < 0:
            return
        self.kill()
        self._open = False
        self._end.close()
        os.close(self._pidfd)
        self._pidfd = -1
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1

    def errors(self) -> list[str]:
        """What it has said of exceptions that ended it."""
        return [str(message[1]) for message in self.said if message and message[0] == "error"]

    def hold(
        self,
        decide: Answer = lambda call: None,
        *,
        until: Callable[[], bool] = lambda: False,
        others: Sequence[Process] = (),
        order: Random | None = None,
        within: float = 10.0,
    ) -> bool:
        """Answer the process's calls as ``decide`` says until it has ended, or was killed (True), or ``until`` holds (False).

        ``until`` is asked after each message, also of ``others``.  With ``order``, calls of several threads that come together
        are answered in random order.  Raises TimeoutError after ``within`` seconds.
        """
        deadline = time.monotonic() + within
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} said {self.said[-5:]} and then nothing for {within} s")
            waiting: list[int] = [self._pidfd, *(process._end.fileno() for process in (self, *others) if process._open)]
            if self._listener >= 0:
                waiting.append(self._listener)
            ready = select.select(waiting, [], [], 0.0002 if self._held else 1.0)[0]
            for process in (self, *others):
                if process._open and process._end.fileno() in ready:
                    process._listen()
            if until():
                return False
            if self._listener in ready:
                call = self._receive()
                if call is not None and order is not None:
                    self._held.append(call)
                elif call is not None and self._answer(call, decide):
                    return True
            elif self._held and order is not None and self._answer(self._held.pop(order.randrange(len(self._held))), decide):
                return True
            if self._pidfd in ready:
                self._listen()
                return True
        return False

    def _listen(self) -> None:
        """Take what it has said."""
        while self._open and select.select([self._end], [], [], 0)[0]:
            try:
                message, descriptors = socket.recv_fds(self._end, 1 << 16, 1)[:2]
            except ConnectionResetError:
                message, descriptors = b"", []
            if descriptors:
                self._listener = descriptors[0]
            elif message:
                self.said.append(json.loads(message))
            else:
                self._open = False

    def _receive(self) -> tuple[int, Call] | None:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECV, buffer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # its thread was killed meanwhile
                raise
            return None
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        self.calls += 1
        return identity, Call(self.calls, self._names[number], thread, tuple(arguments))

    def _answer(self, held: tuple[int, Call], decide: Answer) -> bool:
        """Whether the process is at its end."""
        identity, call = held
        decision = decide(call)
        if decision == KILL and decision is not None:
            self.kill(within=1.0)  # a thread that is stuck in the kernel is for whoever looks at the end to free
            return True
        answer = _ANSWER.pack(identity, 0, -(decision or 0), 0 if decision else _CONTINUE)
        with suppress(FileNotFoundError):  # killed by somebody else
            fcntl.ioctl(self._listener, _SEND, bytearray(answer))
        return False


class Server:
    """Forks processes that have imported ``modules``; of ``running``."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._processes: list[Process] = []

    def start(self, function: Callable[..., None], *arguments: object) -> Process:
        """Run ``function(channel, *arguments)``, of one of the modules; the arguments go there as JSON."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([function.__module__, function.__qualname__, numbers(), arguments]).encode()
        with theirs:
            socket.send_fds(self._control, [request], [theirs.fileno()])
            process = Process(int(self._control.recv(20)), ours)
        self._processes.append(process)
        return process

    @contextmanager
    def started(self, function: Callable[..., None], *arguments: object) -> Iterator[Process]:
        """``start`` for a block, at whose end the process is killed."""
        process = self.start(function, *arguments)
        try:
            yield process
        finally:
            process.close()


@contextmanager
def running(modules: Collection[str]) -> Iterator[Server]:
    """A server that has imported ``modules``; it and all that it started end with the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [sys.executable, "-m", "tests.syscalls", str(theirs.fileno()), *modules]
            where = Path(__file__).parent.parent
            server = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=where, stderr=subprocess.DEVNULL)
        with server:
            try:
                yield Server(ours)
            finally:
                server.kill()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for name in sys.argv[2:]:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a thread would be lost by forking"
    _serve(socket.socket(fileno=int(sys.argv[1])))
