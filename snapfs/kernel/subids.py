"""Ids that root has lent to a user (subuid(5), subgid(5)), and the tables by which a user namespace has them."""

from __future__ import annotations

import bisect
import math
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from snapfs.kernel.forks import undisturbed
from snapfs.names import word

MOST = 100  # ranges: the kernel takes a table of one page

_DONE = "done"  # what the process that writes tables says; who is killed says nothing

_PATIENCE = 10  # seconds that newuidmap(1) may take: it may ask a directory service

_FILES = {"uid": "/etc/subuid", "gid": "/etc/subgid"}


class Range(NamedTuple):
    start: int
    length: int


class Lent(NamedTuple):
    """Which ids a user namespace is to have besides this process's own; at least one range of each, unless ``why_none``."""

    uids: tuple[Range, ...]
    gids: tuple[Range, ...]
    why_none: str = ""
    """Why there are none, and what to do, in a sentence."""


def lent_by_root() -> Lent:
    """The ranges of /etc/subuid and /etc/subgid for this process's user, outside of all user namespaces."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    found = {kind: _lines_for(path, {name, str(uid)}) for kind, path in _FILES.items()}
    for kind, path in _FILES.items():
        if not found[kind]:
            to_do = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {word(name)}"
            return Lent((), (), f"no line of {path} lends ids to {name}: root can add one: {to_do}")
    return Lent(_without(found["uid"], uid), _without(found["gid"], os.getegid()))


def mapped_here() -> Lent:
    """What the user namespace of this process has besides the process's own."""
    found = {}
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
        columns = [[int(column) for column in line.split()] for line in lines]
        found[kind] = _without((Range(first, count) for first, _, count in columns), own)
    return Lent(found["uid"], found["gid"])


def mapped_in(process: str) -> tuple[list[range], list[range]]:
    """The uids, and the gids, that the user namespace has of the process whose directory in /proc is ``process``, as this
    process numbers them.  Raises OSError."""
    found: list[list[range]] = []
    for kind in ("uid", "gid"):
        columns = [[int(column) for column in line.split()] for line in Path(f"{process}/{kind}_map").read_text().splitlines()]
        found.append([range(first, first + count) for _, first, count in columns])
    return found[0], found[1]


def hint(error: OSError) -> str:
    """What may help, as the end of a sentence, where ``error`` may come from an id that this process has not; "" elsewhere."""
    if not isinstance(error, PermissionError) or mapped_here().uids:
        return ""
    return "; or start the daemon where it gets the ids of /etc/subuid, if one is the owner: options.json says why not (subids)"


def table(own: int, ranges: Iterable[Range], *, root: bool) -> str:
    """What newuidmap(1) takes, and the kernel: three numbers for each range.  Each id keeps its number; for ``root`` ``own`` is
    number 0, and the others follow one after the other, from 1 on."""
    lines, here = [(0 if root else own, own, 1)], 1
    for first, count in ranges:
        lines.append((here if root else first, first, count))
        here += count
    return "\n".join(" ".join(map(str, line)) for line in lines)


def write(path: str, text: str) -> None:
    """Write a table, or what goes with it, as the kernel wants it: at once."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


@contextmanager
def mapper(uids: str, gids: str) -> Iterator[Mapper]:
    """For a block in which this process enters a user namespace: what writes these tables for it from where it was."""
    there, here = os.pipe()
    back, forth = os.pipe()
    parent = os.getpid()
    with undisturbed():
        child = os.fork()
    if child == 0:
        said = "it ended without an answer"
        try:
            os.close(here)
            os.close(back)
            said = _write_tables(parent, uids, gids) if os.read(there, 1) else ""
            said = said or _DONE
        except OSError as error:
            said = str(error)
        finally:
            os.write(forth, said.encode())
            os._exit(0)
    os.close(there)
    os.close(forth)
    try:
        yield Mapper(here, back)
    finally:
        os.close(here)
        os.close(back)
        os.waitpid(child, 0)


class Mapper:
    """The process that writes the tables; of ``mapper``."""

    def __init__(self, go: int, answer: int) -> None:
        self._go = go
        self._answer = answer

    def map(self) -> str:
        """Have the tables written: "" then, or why one is not, in a sentence; the other may be."""
        os.write(self._go, b"1")
        answer = b""
        while more := os.read(self._answer, 4096):
            answer += more
        said = answer.decode(errors="replace") or "the process that maps them was killed"
        return "" if said == _DONE else said


def _write_tables(process: int, uids: str, gids: str) -> str:
    """Write the tables of the user namespace that ``process`` has made; "" or why that failed."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for kind, text in (("uid", uids), ("gid", gids)):
        try:
            write(f"/proc/{process}/{kind}_map", text)  # as newuidmap does, where this process may
        except PermissionError:
            failed = _by_program(f"new{kind}map", process, text)
            if failed:
                return failed
    return ""


def _by_program(name: str, process: int, text: str) -> str:
    words = [name, str(process), *text.split()]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_PATIENCE, check=False
        )
    except FileNotFoundError:
        return f"{name} is not installed: root can install it (Debian: apt-get install uidmap)"
    except OSError as error:
        return f"{name} can't be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"{name} took longer than {_PATIENCE} s: see what getsubids says, and how long that takes"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
    return f"{name} refuses: {said[0].removeprefix(f'{name}: ')}"


def as_in_images() -> Callable[[int, int], tuple[int, int]]:
    """What gives the uid and the gid that an image has for those that a file has here: this user's own are 0, and those that
    root has lent, and this process's user namespace has, count from 1 on (``images/unpacking.py`` has the other way).  All
    others are the same, and for root all are."""
    own, lent = (os.geteuid(), os.getegid()), mapped_here()
    if own[0] == 0:
        return lambda uid, gid: (uid, gid)
    # where it has the ids of the machine, 0 is among them
    ranges = [() if any(first == 0 for first, _ in each) else each for each in (lent.uids, lent.gids)]
    return lambda uid, gid: (_in_image(ranges[0], own[0], uid), _in_image(ranges[1], own[1], gid))


def _in_image(ranges: Sequence[Range], own: int, number: int) -> int:
    if number == own:
        return 0
    before = 1
    for first, count in ranges:
        if first <= number < first + count:
            return before + number - first
        before += count
    return number


class Owners:
    """To whom /etc/subuid lends each id, as it is now.  The file is looked at once a second at most."""

    def __init__(self, path: str = _FILES["uid"]) -> None:
        self._path = path
        self._looked = -math.inf
        self._state: tuple[int, int, int] | None = None
        self._ranges: list[tuple[Range, int]] = []  # in order, apart, each with the id that stands for its owner

    def one_of(self, uid: int) -> int:
        """The same id for all that are lent to one user, the first of those; ``uid`` itself where it is lent to nobody."""
        if (now := time.monotonic()) >= self._looked + 1:
            self._looked = now
            self._look()
        place = bisect.bisect_right(self._ranges, uid, key=lambda entry: entry[0].start) - 1
        if place < 0:
            return uid
        (first, count), owner = self._ranges[place]
        return owner if uid < first + count else uid

    def _look(self) -> None:
        try:
            found = os.stat(self._path)
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            state = None
        if state == self._state:
            return
        self._state = state
        firsts: dict[str, int] = {}
        self._ranges, end = [], 0
        for name, (start, length) in sorted(_lines(self._path), key=lambda line: (line[1].start, -line[1].length)):
            owner = firsts.setdefault(name, start)
            if start + length > end:  # where two have an id, it counts for the range that begins before the other
                self._ranges.append((Range(max(start, end), start + length - max(start, end)), owner))
                end = start + length


def _lines_for(path: str, names: set[str]) -> list[Range]:
    return [found for name, found in _lines(path) if name in names]


def _lines(path: str) -> Iterator[tuple[str, Range]]:
    """To whom each range is lent, by name or id, and the range."""
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        name, *numbers = line.split(":")
        if len(numbers) == 2 and all(number.isascii() and number.isdigit() and len(number) <= 10 for number in numbers):
            first, count = map(int, numbers)
            if count and first + count < 1 << 32:
                yield name, Range(first, count)


def _without(ranges: Iterable[Range], own: int) -> tuple[Range, ...]:
    """The ranges in order, each id once, and ``own`` in none."""
    found: list[Range] = []
    end = 0
    for first, count in sorted(ranges):
        start, stop = max(first, end), first + count
        end = max(end, stop)
        pieces = ((start, min(stop, own)), (max(start, own + 1), stop)) if start <= own < stop else ((start, stop),)
        found.extend(Range(low, high - low) for low, high in pieces if low < high)
    return tuple(found[:MOST])
