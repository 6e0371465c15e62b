"""How far a long piece of work has got, in one line on standard error, if that is a terminal."""

from __future__ import annotations

import sys
import time

from snapfs.cli import table

WIDTH = 20  # of the bar
EVERY = 0.05  # seconds between two pictures


class Progress:
    """The line, which each ``show`` overwrites and ``clear`` wipes out."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._width = 0
        self._shown = 0.0

    def show(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done, and that ``what`` (in words) is being done now."""
        full = WIDTH * done // max(total, 1)
        self._show(f"[{'#' * full}{'.' * (WIDTH - full)}] {done + 1}/{total} {what}"[:100])

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal."""
        return self._on

    def show_count(self, what: str, files: int, size: int) -> None:
        """Show that ``what`` (in words) is done to so many files and bytes so far."""
        self._show(f"{what}: {files} files, {table.format_size(size)}")

    def show_size(self, what: str, size: int) -> None:
        """Show that ``what`` (in words) is done to so many bytes so far."""
        self._show(f"{what}: {table.format_size(size)}")

    def show_waiting(self, what: str, seconds: float) -> None:
        """Show that ``what`` (in words) has taken ``seconds`` so far, and that nobody knows how long it will take."""
        self._show(f"{what} ({seconds:.0f} s)")

    def _show(self, line: str) -> None:
        now = time.monotonic()
        if self._on and now - self._shown >= EVERY:
            self._shown = now
            line = table.printable(line)
            print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)

    def clear(self) -> None:
        """Wipe the line out, so that other output can follow."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width, self._shown = 0, 0.0
