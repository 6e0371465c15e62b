"""Where the daemon's words go: standard error, with the priority of each line where that is the journal; syslog once detached.

Sources: sd-daemon(3) for ``<3>`` before a line, systemd.exec(5) for $JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
import sys
import syslog

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def priority(level: int) -> int:
    """syslog(3)'s number for a level of logging."""
    return next((number for least, number in _PRIORITIES if level >= least), 7)


def is_journal() -> bool:
    """Whether standard error goes to the journal."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _ForJournal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")  # a traceback would be as many entries, each with a priority of its own
        return "\n".join(f"<{priority(record.levelno)}>{line}" for line in lines)


class _Syslog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).split("\n"):
            syslog.syslog(priority(record.levelno), line)


def set_up() -> None:
    """Warnings and worse to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_ForJournal("%(message)s") if is_journal() else logging.Formatter("snapfs: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def to_syslog() -> None:
    """From now on to syslog: nobody reads standard error any more."""
    syslog.openlog("snapfs", syslog.LOG_PID, syslog.LOG_DAEMON)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Syslog())


def say(line: str) -> None:
    """A line that is no complaint."""
    print(f"<6>{line}" if is_journal() else f"snapfs: {line}", file=sys.stderr, flush=True)
