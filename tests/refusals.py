"""Calls that fail: with which errno, which line in the error log, and with nothing changed."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.daemon import Daemon
from tests.tree import listing, nanoseconds


@contextmanager
def failing(number: int) -> Iterator[None]:
    """The block's call fails with errno ``number``."""
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}] {os.strerror(number)}")):
        yield


@contextmanager
def refused(daemon: Daemon, number: int, operation: str, paths: str, reason: str) -> Iterator[None]:
    """The block's call fails with errno ``number``, changes nothing, and leaves one line in error_log that says what was done
    to which paths and why (``reason``: a regular expression)."""
    before, lines = listing(daemon.mnt), daemon.error_log()
    with failing(number):
        yield
    new = daemon.error_log()[len(lines) :]
    expected = rf"{errno.errorcode[number]} {operation} {re.escape(paths)}: .*{reason}.*"
    assert len(new) == 1
    when, what = new[0].split(" ", 1)
    assert re.fullmatch(expected, what), what
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", when)
    assert abs(nanoseconds(when) - time.time_ns()) < 60e9
    assert listing(daemon.mnt) == before
