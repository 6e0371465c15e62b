"""Processes that tests start, and waiting for what they do."""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """For ``preexec_fn``: the child is killed when the test run is."""
    _libc.prctl(_PR_SET_PDEATHSIG, how)


def until(true: Callable[[], object], what: str = "what it waited for", shown: Callable[[], str] = str) -> None:
    """Wait at most 20 s for what another process or thread does that can't tell when it has done so: ``what``, in words; when
    it never comes about, ``shown`` says what is to be seen instead."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if true():
            return
        time.sleep(0.005)
    raise AssertionError(f"it never came about: {what}{shown()}")
