"""Processes that read one file again and again, in every way that there is, and check what they get."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.processes import die_with_parent

WAYS = ("at once", "by size", "in pieces", "mapped", "sendfile")

_READER = """
import json, mmap, os, sys
how, path, times, check = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
for _ in range(times):
    fd = os.open(path, os.O_RDONLY)
    if how == "at once":
        data = os.read(fd, 1 << 20)
    elif how == "by size":
        data = os.read(fd, os.fstat(fd).st_size)
    elif how == "in pieces":
        data = b"".join(iter(lambda: os.read(fd, 64), b""))
    elif how == "mapped":
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            data = bytes(mapped)
    elif how == "sendfile":
        copy = os.memfd_create("copy")
        while os.sendfile(copy, fd, None, 1 << 20):
            pass
        data = os.pread(copy, 1 << 20, 0)
        os.close(copy)
    os.close(fd)
    assert eval(check), data
"""


def readers(path: Path, times: int, check: str, ways: Sequence[str] = WAYS) -> list[subprocess.Popen[str]]:
    """A running process for each of ``ways``; ``check`` is an expression of Python about ``data`` that is to hold each time."""
    return [
        subprocess.Popen(
            [sys.executable, "-c", _READER, how, str(path), str(times), check],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        for how in ways
    ]


def are_content(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for the readers, none of which may have found anything wrong."""
    for reader in processes:
        assert reader.communicate()[1] == ""
        assert reader.returncode == 0
