"""Who looks on while the clients work: at the daemon's memory and files, at its logs, and at how slow the machine itself is."""

from __future__ import annotations

import os
import select
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.soak.client import Board

FIELDS = ("anonymous KiB", "resident KiB", "descriptors", "threads", "maps", "objects", "records KiB")

GROWTH = {  # how much more the last fifth may have than the second: a share, and so much besides
    "anonymous KiB": (0.05, 4096),
    "resident KiB": (0.10, 8192),
    "descriptors": (0.15, 16),
    "threads": (0.15, 8),
    "maps": (0.05, 24),
    "objects": (0.05, 5000),
    "records KiB": (0.10, 1024),
}

WARM = 300.0  # seconds after which all that the daemon remembers on purpose is full: texts, log lines, inodes of writers

WARMING = {"anonymous KiB": 20480, "resident KiB": 20480, "objects": 40000, "descriptors": 64}
"""How much more besides that may be while a shorter run fills it."""

MOST = {"threads": 80}


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
    """How one value went: the medians of the second and the last fifth of the time, and the most."""

    name: str
    early: float
    late: float
    most: float
    bound: float

    @property
    def is_flat(self) -> bool:
        return self.late <= self.bound and self.most <= MOST.get(self.name, self.most)


def trends(samples: list[Sample], began: float, ended: float) -> list[Trend]:
    fifth = (ended - began) / 5
    found = []
    for name in FIELDS:
        values = [(its.when, its.values[name]) for its in samples if name in its.values]
        early = [value for when, value in values if began + fifth <= when < began + 2 * fifth]
        late = [value for when, value in values if when >= ended - fifth]
        if early and late:
            share, more = GROWTH[name]
            warming = WARMING.get(name, 0) if ended - began < WARM else 0
            bound = median(early) * (1 + share) + more + warming
            found.append(Trend(name, median(early), median(late), max(value for _, value in values), bound))
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
