"""Where the daemon logs to: the journal, if standard error leads there; else standard error, and syslog(3) once detached.

Sources: systemd's "Native Journal Protocol" and systemd.journal-fields(7); sd-daemon(3) for ``<3>`` before a line;
systemd.exec(5) for $JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import syslog
from typing import Any

from snapfs import names

JOURNAL = "/run/systemd/journal/socket"

_detached = False  # of this process

_PRIORITIES = (
    (logging.CRITICAL, syslog.LOG_CRIT),
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
)


def priority(level: int) -> int:
    """syslog(3)'s number for a level of logging."""
    return next((number for least, number in _PRIORITIES if level >= least), syslog.LOG_DEBUG)


def is_journal() -> bool:
    """Whether standard error goes to the journal."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _Printable(logging.Formatter):
    """The message on one line, and a traceback on lines that are indented, all without characters that a terminal would obey:
    no name or error in it looks like another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return names.printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {names.printable(line)}" for line in super().formatException(ei).split("\n"))


class _Stream(_Printable):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")  # a traceback would be as many entries, each with a priority of its own
        return "\n".join(f"<{priority(record.levelno)}>{line}" for line in lines)


class _Syslog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Printable("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).split("\n"):
            syslog.syslog(priority(record.levelno), line)


class _Journal(logging.Handler):
    """Writes each record to the journal as one entry, however many lines it has, with the ``fields`` that the record has.

    Never waits for the journal: where it takes no entry, warnings and worse go to ``instead``.
    """

    def __init__(self, instead: logging.Handler) -> None:
        super().__init__()
        self.setFormatter(_Printable("%(message)s"))
        self._instead = instead
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": priority(record.levelno),
            "SYSLOG_IDENTIFIER": "snapfs",
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            **getattr(record, "fields", {}),
        }
        entry = b""
        for name, value in fields.items():
            text = str(value).encode(errors="surrogateescape")
            entry += b"%s\n%s%s\n" % (name.encode(), len(text).to_bytes(8, "little"), text)
        try:
            self._socket.sendto(entry, JOURNAL)
        except OSError:
            if record.levelno >= logging.WARNING:
                self._instead.handle(record)


def set_up() -> None:
    """Have warnings and worse logged to standard error; where that leads to the journal, also refusals (INFO)."""
    stream = logging.StreamHandler()
    journal = is_journal()
    stream.setFormatter(_Stream("%(message)s") if journal else _Printable("snapfs: %(message)s"))
    level = logging.INFO if journal else logging.WARNING
    logging.basicConfig(level=level, handlers=[_Journal(stream) if journal else stream])


def detach() -> None:
    """Log to the journal from now on, or to syslog where there is none: standard error leads nowhere any more."""
    syslog.openlog("snapfs", syslog.LOG_PID, syslog.LOG_DAEMON)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_Journal(_Syslog()))
    root.setLevel(logging.INFO)
    global _detached
    _detached = True


def is_detached() -> bool:
    """Whether ``detach`` was called: standard error leads nowhere any more."""
    return _detached


def say(line: str, level: int = logging.INFO) -> None:
    """Write ``line``, printable, to standard error, also one that is no complaint (INFO); once detached, to syslog, whose lines
    the journal has too."""
    if _detached:
        _Syslog().emit(logging.makeLogRecord({"msg": line, "levelno": level}))
        return
    line = names.printable(line)
    print(f"<{priority(level)}>{line}" if is_journal() else f"snapfs: {line}", file=sys.stderr, flush=True)
