"""Which process has just made which name in images/: that one may put it in the place of another name, as ``ln -sf`` does."""

from __future__ import annotations

import time

LATELY = 10.0  # seconds from the making of a name to the rename by which it replaces another
MOST = 1000  # names that are remembered


class JustNamed:
    """The names in images/ that were made just now, by their numbers, each with the process that did it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[int, float]] = {}  # the latest is the last

    def note(self, nth: int, pid: int) -> None:
        """Process ``pid`` has just made the name with the number ``nth``."""
        now = time.monotonic()
        self._made[nth] = pid, now
        while self._made and (len(self._made) > MOST or next(iter(self._made.values()))[1] < now - LATELY):
            del self._made[next(iter(self._made))]

    def is_by(self, nth: int, pid: int) -> bool:
        """Whether process ``pid`` has just made the name with the number ``nth``."""
        by, when = self._made.get(nth, (-1, 0.0))
        return by == pid and when >= time.monotonic() - LATELY
