"""A time in which no thread can be started, in this process or in a daemon's."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from trio._core._thread_cache import ThreadCache

from tests.daemon import Daemon


@contextmanager
def no_threads() -> Iterator[None]:
    """In this process: threads that run go on, and none begins anything new."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        patch.setattr(ThreadCache, "start_thread_soon", refuse)
        yield


SHORT_LIVED = """
import sys
import trio._core._thread_cache as cache
cache.IDLE_TIMEOUT = 0.01
from snapfs.cli import main
sys.exit(main())
"""
"""The program of a daemon whose threads end as soon as they have nothing to do, as they do in 10 seconds otherwise."""


def processes_of(daemon: Daemon) -> list[int]:
    """The daemon's, and those that it has started: pids."""
    found = [daemon.pid]
    for pid in found:
        found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


@contextmanager
def no_threads_for(daemon: Daemon) -> Iterator[None]:
    """The same in the process of an ordinary user's daemon, and in those that it has started: the kernel refuses."""
    pids = processes_of(daemon)
    before = [_limit(daemon, pid, "1") for pid in pids]
    try:
        yield
    finally:
        for pid, limit in zip(pids, before, strict=True):
            if os.path.exists(f"/proc/{pid}/fd"):
                _limit(daemon, pid, limit)


def _limit(daemon: Daemon, pid: int, most: str) -> str:
    """Bound the processes of the user of process ``pid``, for that process, as that user; what the bound was."""
    words = [*daemon.prefix, "prlimit", "--pid", str(pid)]
    before = subprocess.check_output([*words, "--nproc", "--output=SOFT", "--noheadings"], text=True).strip()
    subprocess.run([*words, f"--nproc={most}:"], check=True)
    return before


def threads_of(daemon: Daemon) -> int:
    """How many the process of the daemon has."""
    return len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))
