"""One client: it makes the system calls, times each, remembers them, and ends at the first answer that can't be right."""

from __future__ import annotations

import errno
import mmap
import os
import random
import struct
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from snapfs import names
from snapfs.services.rootfs import GRACE

T = TypeVar("T")

SLOW = 0.5  # seconds from which on a call is kept for the report

_SLOT = 256
_CALL = struct.Struct("d200s")

ALWAYS_LOGGED = frozenset((errno.EPERM, errno.EBUSY, errno.ENOTEMPTY, errno.E2BIG, errno.EILSEQ, errno.EINVAL))
"""Refusals that only the daemon gives for what the clients do on the tree: each has its line in error_log."""


class Call(NamedTuple):
    """One system call as it was: when it began (CLOCK_MONOTONIC), seconds, what, on what, ``ok`` or the errno's name."""

    began: float
    took: float
    operation: str
    path: str
    outcome: str


class Violation(Exception):
    """What was promised was not kept; about the snapshot or file called ``name``."""

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(name, sentence)
        self.name = name
        self.sentence = sentence


class Excused(Exception):
    """A call on a shared name was refused in a way that others may have caused."""


class Board:
    """Memory that all processes share: whether to stop, and what each client is waiting for."""

    def __init__(self, clients: int) -> None:
        self._memory = mmap.mmap(-1, _SLOT * (clients + 1))

    def stop(self) -> None:
        self._memory[0] = 1

    @property
    def stopped(self) -> bool:
        return self._memory[0] == 1

    def begin(self, client: int, when: float, what: str) -> None:
        _CALL.pack_into(self._memory, _SLOT * (client + 1), when, what.encode()[:200])

    def waiting(self, client: int) -> tuple[float, str]:
        """Since when the client waits in its call (0: it doesn't), and in which."""
        when, what = _CALL.unpack_from(self._memory, _SLOT * (client + 1))
        return when, what.rstrip(b"\0").decode(errors="replace")


class Event(NamedTuple):
    """What .snapfs/events is to tell of one change."""

    operation: str
    key: str
    name: str | None = None


@dataclass
class Report:
    """All that a client knows at its end."""

    number: int
    violation: tuple[str, str] | None = None
    history: list[Call] = field(default_factory=list)
    latencies: dict[str, array[float]] = field(default_factory=dict)
    slow: list[Call] = field(default_factory=list)
    events: Counter[Event] = field(default_factory=Counter)
    """The changes that it was told are done."""
    refusals: Counter[str] = field(default_factory=Counter)
    """``ERRNO operation path``: those of its own names that only the daemon can have given."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """``operation outcome``: all calls."""
    manifests: dict[int, dict[str, int]] = field(default_factory=dict)
    """What committed snapshots held, by id: the checksum of each file."""
    written: dict[int, dict[str, int]] = field(default_factory=dict)
    """Files that it wrote into shared active snapshots, by id, with their checksums."""
    holds: dict[int, tuple[str, str, str | None, dict[str, str]]] = field(default_factory=dict)
    """Its own snapshots at the end, by id: name, kind, parent, labels."""
    late: int = 0
    """How often it stood still between being told where a rootfs is and going there, for so long that it was gone."""


class Client:
    """One client.  It stands in the mountpoint: all paths are relative, as error_log has them."""

    def __init__(self, number: int, root: str, seed: int, board: Board) -> None:
        self.number = number
        self.root = root
        self.pick = random.Random(f"{seed}.{number}")
        self.board = board
        self.report = Report(number)
        self.history: deque[Call] = deque(maxlen=8000)
        self._latencies: defaultdict[str, array[float]] = defaultdict(lambda: array("f"))
        self._root_device = os.stat(root).st_dev

    # -- calls

    def call(self, operation: str, path: str, work: Callable[[], T]) -> T:
        """Make a system call; raises OSError."""
        began = time.monotonic()
        self.board.begin(self.number, began, f"{operation} {path}")
        outcome = "ok"
        try:
            return work()
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise
        finally:
            took = time.monotonic() - began
            self.board.begin(self.number, 0.0, "")
            call = Call(began, took, operation, path, outcome)
            self.history.append(call)
            self._latencies[operation].append(took)
            self.report.outcomes[f"{operation} {outcome}"] += 1
            if took > SLOW:
                self.report.slow.append(call)

    def must(self, operation: str, path: str, work: Callable[[], T]) -> T:
        """A call that can't be refused."""
        try:
            return self.call(operation, path, work)
        except OSError as error:
            raise Violation(path, f"{operation} {path} should have worked: {error}") from error

    def must_not(self, number: int, operation: str, path: str, work: Callable[[], object], *, logged: bool = False) -> None:
        """A call that must be refused with errno ``number``.  ``logged``: the kernel can't have decided that itself."""
        name = errno.errorcode[number]
        try:
            self.call(operation, path, work)
        except OSError as error:
            if error.errno != number:
                raise Violation(path, f"{operation} {path} should have given {name}: {error}") from error
        else:
            raise Violation(path, f"{operation} {path} worked, and should have given {name}")
        if number in ALWAYS_LOGGED or logged:
            self.report.refusals[f"{name} {operation} {path}"] += 1

    def expect(self, number: int, operation: str, path: str, work: Callable[[], object], *, logged: bool = False) -> bool:
        """A call that must give errno ``number``, or work where that is 0; whether it worked."""
        if number:
            self.must_not(number, operation, path, work, logged=logged)
        else:
            self.must(operation, path, work)
        return not number

    def may(self, operation: str, path: str, work: Callable[[], T], *excuses: int) -> T:
        """A call that may be refused with one of ``excuses``, which raises Excused."""
        try:
            return self.call(operation, path, work)
        except OSError as error:
            if error.errno in excuses:
                raise Excused from None
            raise Violation(path, f"{operation} {path}: {error}") from error

    # -- what consists of several calls

    @contextmanager
    def opened(self, path: str, flags: int, *excuses: int) -> Iterator[int]:
        """A descriptor of ``path``."""
        fd = self.may("open", path, lambda: os.open(path, flags, 0o644), *excuses)
        try:
            yield fd
        finally:
            self.must("close", path, lambda: os.close(fd))

    def read(self, path: str, *excuses: int) -> bytes:
        """What the file holds, as most programs read it: to its end, wherever stat(2) says that is."""
        parts = []
        with self.opened(path, os.O_RDONLY, *excuses) as fd:
            while part := self.may("read", path, lambda: os.read(fd, 1 << 16)):
                parts.append(part)
        return b"".join(parts)

    def read_on(self, fd: int, path: str, offset: int) -> bytes:
        """What a file that grows holds from ``offset`` on."""
        told = b""
        while part := self.must("read", path, partial(os.pread, fd, 1 << 16, offset + len(told))):
            told += part
        return told

    def flush(self, path: str, *excuses: int) -> None:
        """fsync of a directory."""
        with self.opened(path, os.O_RDONLY | os.O_DIRECTORY, *excuses) as fd:
            self.may("fsync", path, lambda: os.fsync(fd), *excuses)

    def list_long(self, directory: str) -> list[str]:
        """ls -l: the names, each with its attributes; those that went meanwhile are left out."""
        found = []
        for name in self.must("list", directory, lambda: os.listdir(directory)):
            path = f"{directory}/{name}"
            with suppress(Excused):
                self.may("lstat", path, partial(os.lstat, path), errno.ENOENT)
                found.append(name)
        return found

    @contextmanager
    def followed(self, path: str, *excuses: int) -> Iterator[int]:
        """A descriptor of the directory to which ``path``, a rootfs, leads; raises Excused for who came too late."""
        began = time.monotonic()
        try:
            fd = self.may("follow", path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY), errno.ENOENT, *excuses)
        except Excused:
            if not excuses:
                self.check(time.monotonic() - began >= GRACE, path, f"follow {path}: it is not there")
                self.report.late += 1
            raise
        try:
            found = os.fstat(fd)
            if found.st_dev == self._root_device and found.st_mode & 0o777 == 0o700:
                self.check(bool(excuses) or time.monotonic() - began >= GRACE, path, f"follow {path}: nothing is mounted there")
                self.report.late += 1
                raise Excused
            yield fd
        finally:
            self.must("close", path, lambda: os.close(fd))

    def put(self, directory: int | None, path: str, shown: str, content: bytes, flags: int, *excuses: int) -> None:
        """Write a file of a layer: not snapfs's doing, but its data."""
        fd = self.may("layer open", shown, lambda: os.open(path, flags | os.O_WRONLY, 0o644, dir_fd=directory), *excuses)
        try:
            self.must("layer write", shown, lambda: os.write(fd, content))
        finally:
            self.must("layer close", shown, lambda: os.close(fd))

    def get(self, directory: int | None, path: str, shown: str, *excuses: int) -> bytes:
        """Read a file of a layer."""
        fd = self.may("layer open", shown, lambda: os.open(path, os.O_RDONLY, dir_fd=directory), *excuses)
        try:
            return self.must("layer read", shown, lambda: os.read(fd, 1 << 16))
        finally:
            self.must("layer close", shown, lambda: os.close(fd))

    def check(self, holds: bool, name: str, sentence: str) -> None:
        """Raise Violation unless ``holds``."""
        if not holds:
            raise Violation(name, sentence)

    # -- its report

    def tell(self, operation: str, key: str, name: str | None = None) -> None:
        """It was told that this change is done."""
        self.report.events[Event(operation, key, name)] += 1

    def ended(self) -> Report:
        self.report.history = list(self.history)
        self.report.latencies = dict(self._latencies)
        return self.report


def file_name(key: str) -> str:
    """The file name of a key, as the tree has it."""
    return names.encode(key)
