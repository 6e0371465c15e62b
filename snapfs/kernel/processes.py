"""Who uses a directory: what /proc tells of other processes (proc(5)), as fuser(1) does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def users(directory: str) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has its working directory, its root, its program, an open file or a mapping in
    ``directory``, as far as this process may see that; those of other mount namespaces are not found."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if any(path == directory or path.startswith(directory + "/") for path in _uses(f"/proc/{entry}")):
                    yield int(entry), Path(f"/proc/{entry}/comm").read_text().rstrip("\n")
            except OSError:  # it has ended, or is not for us to see
                continue


def _uses(process: str) -> Iterator[str]:
    for link in ("cwd", "root", "exe"):
        yield os.readlink(f"{process}/{link}")
    for fd in os.listdir(f"{process}/fd"):
        try:
            yield os.readlink(f"{process}/fd/{fd}")
        except FileNotFoundError:  # closed meanwhile
            continue
    with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            _, slash, path = line.rstrip("\n").partition("/")
            yield slash + path
