"""Descriptors that are kept for work that must be possible when the process has none left."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 0.25  # seconds for which work is tried again, while other threads have taken the descriptors given up for it


class Spare:
    """``count`` descriptors, kept in reserve.  Not for several threads at once; ``close`` it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[int] = []
        self._keep()

    def _keep(self) -> None:
        with suppress(OSError):  # another thread was quicker; the next time there may be some again
            while len(self._kept) < self._count:
                self._kept.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Close all of them."""
        while self._kept:
            os.close(self._kept.pop())

    def give_to(self, work: Callable[[], T]) -> T:
        """Do ``work``, which opens as many at most; where the process has none left they are given up for it, and it is done
        once more.  Returns what it returns, and raises what it raises."""
        try:
            return work()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        deadline = time.monotonic() + PATIENCE
        while True:
            self.close()
            try:
                return work()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() > deadline:
                    raise
            finally:
                self._keep()
            time.sleep(0.005)
