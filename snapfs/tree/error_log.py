"""The last errors in words: what errno can't say.  One line each, the newest last."""

from __future__ import annotations

import time
from collections import deque

from snapfs import names
from snapfs.model import rfc3339

LINES = 4000  # kept


class ErrorLog:
    """A bounded log in memory."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LINES)

    def add(self, errno_name: str, operation: str, path: str, reason: object) -> None:
        """``2026-11-23T23:08:38.000000123Z EEXIST rename active/web committed/base: snapshot "base" already exists …``"""
        line = f"{errno_name} {operation} {path}: {reason}"
        self._lines.append(f"{rfc3339(time.time_ns())} {names.printable(line)}\n")

    def text(self) -> str:
        return "".join(self._lines)
