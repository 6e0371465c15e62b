"""Who uses a directory: what /proc tells of other processes (proc(5)), as fuser(1) does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

ENOUGH = 0.02  # seconds after which nobody else is looked for, once somebody was found
LONGEST = 0.25  # seconds after which the search is given up: who asks may hold locks that everybody waits for


def users(directory: str) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has its working directory, its root, its program, an open file or a mapping in
    ``directory``, as far as this process may see that; those of other mount namespaces are not found.

    What is seen quickest is looked at first, and on a machine with many processes not all are found (ENOUGH, LONGEST).
    """
    began = time.monotonic()
    found: set[str] = set()
    for uses in (_places, _files, _mappings):
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or entry in found:
                continue
            if time.monotonic() - began > (ENOUGH if found else LONGEST):
                return
            try:
                if any(path == directory or path.startswith(directory + "/") for path in uses(f"/proc/{entry}")):
                    name = Path(f"/proc/{entry}/comm").read_text().rstrip("\n")
                    found.add(entry)
                    yield int(entry), name
            except OSError:  # it has ended, or is not for us to see
                continue


def _places(process: str) -> Iterator[str]:
    for link in ("cwd", "root", "exe"):
        yield os.readlink(f"{process}/{link}")


def _files(process: str) -> Iterator[str]:
    for fd in os.listdir(f"{process}/fd"):
        try:
            yield os.readlink(f"{process}/fd/{fd}")
        except FileNotFoundError:  # closed meanwhile
            continue


def _mappings(process: str) -> Iterator[str]:
    with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            _, slash, path = line.rstrip("\n").partition("/")
            yield slash + path
