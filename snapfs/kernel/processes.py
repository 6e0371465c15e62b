"""Which processes use a directory: what /proc tells of them (proc(5)), as fuser(1) reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from snapfs import names
from snapfs.kernel import libc

ENOUGH = 0.02  # seconds after which no further process is looked for, once one was found
outside: Callable[[str], list[tuple[int, str]]] | None = None
"""``users`` as a process sees them that is not in this one's user namespace, in which the kernel tells nothing of others."""

LONGEST = 0.25  # seconds after which the search is given up: the caller may hold locks that all other calls wait for


def users(directory: str) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has its working directory, its root, its program, an open file or a mapping in
    ``directory``, as far as this process may see that; those of other mount namespaces are not found.

    What is seen quickest is looked at first, and on a machine with many processes not all are found (ENOUGH, LONGEST).  Where
    none is, those are asked for that ``outside`` sees.
    """

    def is_inside(path: str) -> bool:
        return path == directory or path.startswith(directory + "/")

    def by(uses: Callable[[str], Iterator[str]]) -> Callable[[str], bool]:
        return lambda process: any(map(is_inside, uses(process)))

    found = False
    for found_here in _search(by(_places), by(_files), by(_mappings)):
        found = True
        yield found_here
    if not found and outside is not None:
        yield from outside(directory)


def users_of_device(device: str, *, longest: float = LONGEST) -> Iterator[tuple[int, str]]:
    """As ``users``, of the file system with the device ``device`` (``major:minor``), by any path and in any mount namespace.
    The search is given up after ``longest`` seconds.

    It asks the kernel for the device of every file that a process has open, and no server that these may be on: it might never
    answer.
    """
    major, minor = map(int, device.split(":"))
    number, shown = os.makedev(major, minor), f" {major:02x}:{minor:02x} ".encode()

    def stands_there(process: str) -> bool:
        return any(libc.device_number(f"{process}/{link}") == number for link in ("cwd", "root", "exe"))

    def has_open(process: str) -> bool:
        for task in os.listdir(f"{process}/task"):  # a thread may have descriptors of its own
            for fd in os.listdir(f"{process}/task/{task}/fd"):
                with suppress(FileNotFoundError):  # closed meanwhile
                    if libc.device_number(f"{process}/task/{task}/fd/{fd}") == number:
                        return True
        return False

    def has_mapped(process: str) -> bool:
        return shown in Path(f"{process}/maps").read_bytes()

    return _search(stands_there, has_open, has_mapped, longest=longest)


def keepers() -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has a mount namespace open in which no process is, as far as they are found quickly."""
    lived_in = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                lived_in.add(os.readlink(f"/proc/{entry}/ns/mnt"))

    def keeps(process: str) -> bool:
        return any(path.startswith("mnt:[") and path not in lived_in for path in _files(process))

    return _search(keeps)


def name_of(pid: int) -> str:
    """The name of process ``pid``; "?" where it has ended."""
    try:
        return _name_of(str(pid))
    except OSError:
        return "?"


def _name_of(pid: str) -> str:
    """A process gives itself any name it likes: here it is on one line, and nothing that a terminal obeys.  Raises OSError."""
    raw = Path(f"/proc/{pid}/comm").read_bytes()
    return names.printable(raw.removesuffix(b"\n").decode(errors="backslashreplace"))


def _search(*ways: Callable[[str], bool], longest: float = LONGEST) -> Iterator[tuple[int, str]]:
    """Pid and name of each other process for whose directory in /proc one of ``ways`` is true."""
    began = time.monotonic()
    found: set[str] = set()
    for uses in ways:
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or entry in found or int(entry) == os.getpid():
                continue
            if time.monotonic() - began > (ENOUGH if found else longest):
                return
            try:
                if uses(f"/proc/{entry}"):
                    name = _name_of(entry)
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
