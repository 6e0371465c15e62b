"""Logs: files that grow line by line, the newest last, and can be followed (``tail -f``, ``poll``).

The size of the file only ever grows, so that a program which follows it goes on where it was, but only the last few thousand
lines are kept, and fewer of long ones.  A reader that begins late or fell behind, so that what it asks for is not kept any
more, gets a line that says how many lines it missed, and after that the first line that there is.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapfs import names
from snapfs.model import rfc3339
from snapfs.tree.handles import Handle
from snapfs.tree.texts import OVERHEAD

LINES = 4000  # kept at least, if they are not long
MOST = 4 << 20  # bytes of lines kept at most: any user who may write can make long ones
_SLACK = 1000  # lines that are dropped at once


class Log:
    """A bounded log in memory.  ``size`` is the bytes of all lines ever; ``start`` those of the ``dropped`` first ones.

    ``tell_missed`` makes the line for a reader that missed so many lines.
    """

    def __init__(self, tell_missed: Callable[[int], str]) -> None:
        self.size = 0
        self.start = 0
        self.dropped = 0
        self.changed = time.time_ns()
        self.tell_missed = tell_missed
        self.followers: list[OpenLog] = []
        self._lines: list[bytes] = []
        self._ends: list[int] = []

    def add(self, line: str) -> None:
        """Add one line, which ends in a newline, and wake the readers that wait for it."""
        encoded = line.encode()
        self._lines.append(encoded)
        self.size += len(encoded)
        self._ends.append(self.size)
        self.changed = max(time.time_ns(), self.changed + 1)
        if len(self._lines) >= LINES + _SLACK:
            self._drop(_SLACK)
        if self.size - self.start > MOST:
            self._drop(bisect_left(self._ends, self.size - MOST // 2) + 1)  # half of it: the next lines need not drop any
        for follower in self.followers:
            follower.wake()

    def _drop(self, count: int) -> None:
        """Drop the first ``count`` lines, but not the last that there is."""
        count = min(count, len(self._lines) - 1)
        if count > 0:
            self.start = self._ends[count - 1]
            self.dropped += count
            del self._lines[:count], self._ends[:count]

    def forget_waiting(self) -> None:
        """Wake none of the readers that wait now: what would wake them is about to go."""
        for follower in self.followers:
            follower.wake_with(lambda: None)

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, which is not before ``start``."""
        at = bisect_left(self._ends, offset + 1)
        found, length = [], 0
        skip = offset - (self._ends[at] - len(self._lines[at])) if at < len(self._lines) else 0
        while length < skip + size and at < len(self._lines):
            found.append(self._lines[at])
            length += len(found[-1])
            at += 1
        return b"".join(found)[skip : skip + size]

    def begun(self, offset: int) -> tuple[int, bytes]:
        """How many lines begin before ``offset``, which is not before ``start``, and what the last of them has after it."""
        at = bisect_left(self._ends, offset)
        if offset == self.start or at == len(self._ends):
            return self.dropped + at, b""
        return self.dropped + at + 1, self._lines[at][len(self._lines[at]) - (self._ends[at] - offset) :]


class OpenLog(Handle):
    """One reader of a log.

    The reader reads a stream of its own: at ``_base`` bytes of it stands ``_notice``, how many lines it missed, and after that
    the log from ``_origin`` on.  A line of which the reader has a part it gets whole: the rest stands before the notice.
    """

    direct = True

    def __init__(self, log: Log) -> None:
        self._log = log
        self._base = self._origin = 0
        self._notice = b""
        self._position = 0  # where the next read is expected
        self._seen = 0  # lines of the log that begin before that
        self._rest = b""  # what the last of them has after it
        self._waiting: Callable[[], None] | None = None
        log.followers.append(self)

    @property
    def size(self) -> int:
        return self._log.size

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For a read that may be refused in the end, by an exception: then the reader holds what it held before."""
        before = self.weight, self._base, self._origin, self._notice, self._position, self._seen, self._rest
        try:
            yield
        except BaseException:
            self.weight, self._base, self._origin, self._notice, self._position, self._seen, self._rest = before
            raise

    def read(self, offset: int, size: int) -> bytes:
        if offset < self._base:
            self._base, self._origin, self._notice = 0, 0, b""
        if offset - self._base >= len(self._notice) and self._in_log(offset) < self._log.start:
            seen, rest = (self._seen, self._rest) if offset == self._position else (0, b"")
            missed = self._log.dropped - seen
            self._notice = rest + (self._log.tell_missed(missed).encode() if missed else b"")
            self._base, self._origin = offset, self._log.start
            self._seen, self._rest = self._log.dropped, b""
        data = self._notice[offset - self._base :][:size]
        at = self._in_log(offset + len(data))
        if at >= self._log.start and len(data) < size:
            data += self._log.read(at, size - len(data))
            self._seen, self._rest = self._log.begun(self._in_log(offset + len(data)))
        self._position = offset + len(data)
        self.weight = OVERHEAD + len(self._notice) + len(self._rest)
        return data

    def _in_log(self, offset: int) -> int:
        return max(self._origin, self._origin + offset - self._base - len(self._notice))

    def is_ready(self) -> bool:
        """Whether there is something to read after what was read last."""
        return self._in_log(self._position) < self._log.size

    def wake_with(self, notify: Callable[[], None]) -> None:
        """Call ``notify`` once when there is more to read."""
        self._waiting = notify

    def wake(self) -> None:
        """There is more to read: call what ``wake_with`` was given."""
        notify, self._waiting = self._waiting, None
        if notify is not None:
            notify()

    async def close(self) -> None:
        self._log.followers.remove(self)


class ErrorLog(Log):
    """The last errors in words: what errno can't say."""

    def __init__(self) -> None:
        super().__init__(lambda missed: f"{missed} earlier lines are not kept\n")

    def note(self, errno_name: str, operation: str, path: str, reason: object) -> None:
        """``2026-11-23T23:08:38.000000123Z EEXIST rename active/web committed/base: snapshot "base" already exists …``

        The first ``: `` ends the path: who chooses names chooses no reasons."""
        line = f"{errno_name} {operation} {names.without_colons(path)}: {reason}"
        self.add(f"{rfc3339(time.time_ns())} {names.printable(line)}\n")
