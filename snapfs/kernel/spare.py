"""Descriptors that are kept for what must be possible when none are left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Spare:
    """``count`` descriptors.  Not for several threads at once; ``close`` it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[int] = []
        self._keep()

    def _keep(self) -> None:
        with suppress(OSError):  # another thread was quicker; the next time there may be some again
            while len(self._kept) < self._count:
                self._kept.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        while self._kept:
            os.close(self._kept.pop())

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """For a block that takes as many."""
        self.close()
        try:
            yield
        finally:
            self._keep()
