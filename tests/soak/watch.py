"""Who looks on while the clients work: at the daemon's memory and files, at its logs, and at how slow the machine itself is."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from itertools import combinations
from math import inf
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.soak.client import Board

A_CALL = {  # how much of each may come to stay with a call, on average
    "blocks": 1 / 200,  # of up to 512 bytes each, most around 60: a third of a byte
    "heap KiB": 1 / 2048,  # half a byte of all larger ones, and of what others than the interpreter take
    "anonymous KiB": 1 / 400,  # what it takes to hold these
    "resident KiB": 1 / 400,
    "descriptors": 1 / 50_000,
    "threads": 1 / 50_000,
    "maps": 1 / 20_000,
    "records KiB": 1 / 2048,
}

MOST = {  # at any time
    "blocks": 500_000,
    "heap KiB": 16 << 10,
    "anonymous KiB": 48 << 10,
    "resident KiB": 80 << 10,
    "descriptors": 250,
    "threads": 80,
    "maps": 500,
    "records KiB": 8 << 10,
}

WARM = 500_000
"""Calls after which all that the daemon remembers on purpose is full (see texts.py, log.py, stats.py), and the allocator has
the room that it needs."""


class Sample(NamedTuple):
    """The daemon at one moment (CLOCK_MONOTONIC)."""

    when: float
    values: dict[str, int]


def sample(pid: int, root: Path) -> Sample:
    """What /proc says of process ``pid``."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    values = {
        "anonymous KiB": int(status["RssAnon"].split()[0]),
        "resident KiB": int(status["VmRSS"].split()[0]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "maps": Path(f"/proc/{pid}/maps").read_bytes().count(b"\n"),
        "records KiB": os.stat(root / "metadata.mdb").st_blocks // 2,
    }
    return Sample(time.monotonic(), values)


class Trend(NamedTuple):
    """How one value went: what the line through the second half of its samples says of half-time and of the end, what that may
    say of the end, and the most that was seen."""

    name: str
    middle: float
    end: float
    bound: float
    most: int

    @property
    def is_flat(self) -> bool:
        return self.end <= self.bound and self.most <= MOST[self.name]


def trends(samples: list[Sample], began: float, ended: float, calls: int) -> list[Trend]:
    """Whether the daemon kept what it took: the rule.

    No value may ever be above MOST.  And in the second half of the time it may grow by A_CALL for each of the ``calls`` that
    were made in it: a leak goes on for ever, caches are full by then.  Where the first half had fewer calls than WARM nobody
    can tell one from the other, so only MOST counts.

    A leak of a byte a call shows in what the allocators say is in use.  What the kernel says is coarser: it grows in steps of
    up to a MiB, when an allocator takes another piece of memory for a peak of what is in use, and keeps some of it.

    The line is the one of Theil and Sen: of the slopes between any two samples the median, so that peaks don't count.
    """
    half, of_half = (ended - began) / 2, calls // 2
    found = []
    for name, each in A_CALL.items():
        values = [(its.when, its.values[name]) for its in samples if name in its.values]
        late = [(when, value) for when, value in values if began + half <= when <= ended]
        if len(late) > 1:
            slope = median((after - before) / (then - when) for (when, before), (then, after) in combinations(late, 2))
            middle = median(value for _, value in late) - slope * half / 2
            bound = middle + each * of_half if of_half >= WARM else inf
            found.append(Trend(name, middle, middle + slope * half, bound, max(value for _, value in values)))
    return found


@dataclass
class Followed:
    """What two followers were told: the lines of .snapfs/events and of .snapfs/error_log."""

    events: list[str]
    errors: list[str]


def follow(board: Board) -> Followed:
    """Read both logs with poll(2) until the board says stop, and then what is left."""
    paths = (".snapfs/events", ".snapfs/error_log")
    texts = {os.open(path, os.O_RDONLY): bytearray() for path in paths}
    waiting = select.poll()
    for fd in texts:
        waiting.register(fd, select.POLLIN)
    while True:
        stopped = board.stopped
        ready = [fd for fd, _ in waiting.poll(200)]
        for fd in texts if stopped else ready:
            while part := os.read(fd, 1 << 17):
                texts[fd] += part
        if stopped:
            break
    events, errors = (text.decode().splitlines() for text in texts.values())
    return Followed(events, errors)


class Moment(NamedTuple):
    """How slow the machine itself was: seconds that a sleeper overslept, and that an fsync of one page took."""

    when: float
    overslept: float
    fsync: float


def measure(board: Board, directory: Path) -> list[Moment]:
    """Sleep, write and flush a page beside ROOT until the board says stop; each time what took longer than it should."""
    moments: list[Moment] = []
    fd = os.open(directory / "yardstick", os.O_CREAT | os.O_WRONLY, 0o600)
    nap = 0.05
    while not board.stopped:
        began = time.monotonic()
        time.sleep(nap)
        awake = time.monotonic()
        fsync = 0.0
        if len(moments) % 5 == 0:
            os.pwrite(fd, os.urandom(4096), 0)
            os.fsync(fd)
            fsync = time.monotonic() - awake
        moments.append(Moment(began, awake - began - nap, fsync))
    os.close(fd)
    return moments


def machine_was_slow(moments: list[Moment], began: float, ended: float) -> float:
    """How long the machine itself kept everybody waiting at worst, around that time."""
    fitting = [its for its in moments if began - 2 < its.when < ended + 1]
    return max((its.overslept + its.fsync for its in fitting), default=0.0)
