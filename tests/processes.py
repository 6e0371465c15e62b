"""Processes that tests start, and waiting for what they do."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1

_OF_A_PROCESS = 2
"""The clock that counts the work for a process, beside its number, in the kernel's number for that clock."""

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


def worked(pid: int) -> float:
    """Seconds that a processor has worked for process ``pid``, for all threads that it had: however busy the machine is."""
    return time.clock_gettime(~pid << 3 | _OF_A_PROCESS)


def in_fork(act: Callable[[], object]) -> str:
    """What ``act`` gives or raises in a forked process."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                said = str(act())
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(here, said.encode())
        finally:
            os._exit(0)
    os.close(here)
    with os.fdopen(there) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


def own_descriptors() -> list[str]:
    """The descriptors that this process has open, without those of other tests' objects that nobody has collected yet."""
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))
