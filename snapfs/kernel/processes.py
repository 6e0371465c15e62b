"""Which processes use a directory: what /proc tells of them (proc(5)), as fuser(1) reads it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

from snapfs import names
from snapfs.kernel import libc

ENOUGH = 0.02  # seconds after which no further process is looked for, once one was found
outside: Callable[[str], list[tuple[int, str]]] | None = None
"""``users`` as a process sees them that is not in this one's user namespace, in which the kernel tells nothing of others."""

asking: ContextVar[int] = ContextVar("asking", default=0)
"""The process for which something is done now; 0 where that is not known.  A command stands where the shell stands that has
started it: if the shell is found, the command is not."""

LONGEST = 0.25  # seconds after which the search is given up: the caller may hold locks that all other calls wait for


def users(directory: str, *, longest: float = LONGEST) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has its working directory, its root, its program, an open file or a mapping in
    ``directory``, as far as this process may see that; those of other mount namespaces are not found.

    What is seen quickest is looked at first, and on a machine with many processes not all are found (ENOUGH): the search is
    given up after ``longest`` seconds.  Where none is, those are asked for that ``outside`` sees.
    """

    def is_inside(path: str) -> bool:
        return path == directory or path.startswith(directory + "/")

    def by(uses: Callable[[str], Iterator[str]]) -> Callable[[str], bool]:
        return lambda process: any(map(is_inside, uses(process)))

    found = False
    for found_here in _search(by(_places), by(_files), by(_mappings), longest=longest):
        found = True
        yield found_here
    if not found and outside is not None:
        yield from outside(directory)


def users_of_device(device: str, *, longest: float = LONGEST, enough: float = ENOUGH) -> Iterator[tuple[int, str]]:
    """As ``users``, of the file system with the device ``device`` (``major:minor``), by any path and in any mount namespace.
    The search is given up after ``longest`` seconds, and after ``enough`` once one was found.

    It asks the kernel for the device of every file that a process has open, and no server that these may be on: it might never
    answer.
    """
    number, shown = _number(device), _in_maps(device)

    def has_mapped(process: str) -> bool:
        return shown in Path(f"{process}/maps").read_bytes()

    return _search(
        lambda process: number in _numbers_of_places(process),
        lambda process: number in _numbers_of_files(process),
        has_mapped,
        longest=longest,
        enough=enough,
    )


def used_devices(devices: Collection[str]) -> set[str]:
    """Those of ``devices`` (``major:minor``) of which other processes have anything, as ``users_of_device`` finds them: in one
    walk of all processes, however long that takes."""
    wanted = {_number(device): device for device in devices}
    found: set[str] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        for numbers in (_numbers_of_places, _numbers_of_files):
            with suppress(OSError):  # it has ended, or is not for us to see
                found.update(wanted[number] for number in numbers(f"/proc/{entry}") if number in wanted)
        with suppress(OSError):
            maps = Path(f"/proc/{entry}/maps").read_bytes()
            found.update(device for device in devices if _in_maps(device) in maps)
        if len(found) == len(wanted):
            break
    return found


def _number(device: str) -> int:
    major, minor = map(int, device.split(":"))
    return os.makedev(major, minor)


def _in_maps(device: str) -> bytes:
    """How a line in /proc/PID/maps has it."""
    major, minor = map(int, device.split(":"))
    return f" {major:02x}:{minor:02x} ".encode()


def _numbers_of_places(process: str) -> Iterator[int]:
    for link in ("cwd", "root", "exe"):
        yield libc.device_number(f"{process}/{link}")


def _numbers_of_files(process: str) -> Iterator[int]:
    for task in os.listdir(f"{process}/task"):  # a thread may have descriptors of its own
        for fd in os.listdir(f"{process}/task/{task}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                yield libc.device_number(f"{process}/task/{task}/fd/{fd}")


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


def is_alive(thread: int) -> bool:
    """Whether there is a process or a thread with the number ``thread``."""
    try:
        os.kill(thread, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


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


def _parent_of(pid: int) -> int:
    """The pid of the process that has started process ``pid``, or has come into its place.  Raises OSError."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()[1])


def _search(*ways: Callable[[str], bool], longest: float = LONGEST, enough: float = ENOUGH) -> Iterator[tuple[int, str]]:
    """Pid and name of each other process for whose directory in /proc one of ``ways`` is true."""
    began = time.monotonic()
    found: set[str] = set()
    left_out = {str(os.getpid())}
    if is_asking := asking.get():
        with suppress(OSError):
            parent = _parent_of(is_asking)
            if any(uses(f"/proc/{parent}") for uses in ways):
                left_out.add(str(is_asking))
    for uses in ways:
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or entry in found or entry in left_out:
                continue
            if time.monotonic() - began > (enough if found else longest):
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


def locker(fd: int) -> str:
    """The pid of the process that has the file open as ``fd`` locked, whose it may ever be; "" where nobody knows."""
    found = os.fstat(fd)
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            _, kind, _, _, pid, what, *_ = [*line.split(), *[""] * 6]
            if (kind, what) == ("FLOCK", where):
                return pid
    return ""
