"""Which processes use a directory: what /proc tells of them (proc(5)), as fuser(1) reads it."""

from __future__ import annotations

import errno
import math
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

_EACH = 64  # descriptors after which it is asked how late it is: one process may have millions, by each of hundreds of threads

_Way = Callable[[str, float], bool]
"""Whether a process, by its directory in /proc, uses something; looked for until then, of time.monotonic(): raises _Late."""


class _Late(Exception):
    """There is no time left to look for it."""


def users(directory: str, *, longest: float = LONGEST) -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has its working directory, its root, its program, an open file or a mapping in
    ``directory``, as far as this process may see that; those of other mount namespaces are not found.

    What is seen quickest is looked at first, and on a machine with many processes not all are found (ENOUGH): the search is
    given up after ``longest`` seconds.  Where none is, those are asked for that ``outside`` sees.
    """

    def is_inside(path: str) -> bool:
        return path == directory or path.startswith(directory + "/")

    def by(uses: Callable[[str, float], Iterator[str]]) -> _Way:
        return lambda process, until: any(map(is_inside, uses(process, until)))

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
    number = _number(device)
    return _search(
        lambda process, until: number in _numbers_of_places(process),
        lambda process, until: number in _numbers_of_files(process, until),
        lambda process, until: number in _numbers_of_mappings(process, until),
        lambda process, until: number in _numbers_of_threads(process, until),
        longest=longest,
        enough=enough,
    )


def used_devices(devices: Collection[str], *, longest: float) -> set[str] | None:
    """Those of ``devices`` (``major:minor``) of which other processes have anything, as ``users_of_device`` finds them: in one
    walk of all processes; None where that takes longer than ``longest`` seconds."""
    wanted = {_number(device): device for device in devices}
    found: set[str] = set()
    until = time.monotonic() + longest
    for process in (f"/proc/{entry}" for entry in _processes() if int(entry) != os.getpid()):
        for numbers in (_numbers_of_places, _numbers_of_files, _numbers_of_mappings, _numbers_of_threads):
            try:
                found.update(wanted[number] for number in numbers(process, until) if number in wanted)
            except OSError:  # it has ended, or is not for us to see
                continue
            except _Late:
                return None
        if len(found) == len(wanted):
            break
    return found


def _processes() -> list[str]:
    """The pids of all processes, those with the most descriptors last (as Linux tells since 6.2): one that has millions of them
    is not to hide the others."""

    def count(entry: str) -> int:
        try:
            return os.stat(f"/proc/{entry}/fd").st_size
        except OSError:
            return 0

    return sorted(filter(str.isdigit, os.listdir("/proc")), key=count)


def _number(device: str) -> int:
    major, minor = map(int, device.split(":"))
    return os.makedev(major, minor)


def _numbers_of_places(process: str, until: float = math.inf) -> Iterator[int]:
    for link in ("cwd", "root", "exe"):
        yield libc.device_number(f"{process}/{link}")


def _numbers_of_files(process: str, until: float) -> Iterator[int]:
    for path in _descriptors(process, until):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield libc.device_number(path)


def _numbers_of_threads(process: str, until: float) -> Iterator[int]:
    """As ``_numbers_of_files``, of the threads but the first: one may have descriptors of its own."""
    first = os.path.basename(process)
    for task in os.listdir(f"{process}/task"):
        if task != first and not libc.share_files(int(first), int(task)):
            yield from _numbers_of_files(f"{process}/task/{task}", until)


def _numbers_of_mappings(process: str, until: float) -> Iterator[int]:
    for line in _maps(process, until):
        major, _, minor = line.split(b" ", 4)[3].partition(b":")
        yield os.makedev(int(major, 16), int(minor, 16))


def _maps(process: str, until: float) -> Iterator[bytes]:
    """The lines of /proc/PID/maps: tens of thousands, of thousands of bytes each, are read piece by piece.  Raises OSError, and
    _Late."""
    with open(f"{process}/maps", "rb") as maps:
        for nth, line in enumerate(maps):
            if nth % _EACH == 0 and time.monotonic() > until:
                raise _Late
            yield line


def _descriptors(process: str, until: float) -> Iterator[str]:
    """The paths of all descriptors of a process, or a thread.  Raises OSError, and _Late."""
    with os.scandir(f"{process}/fd") as entries:
        for nth, entry in enumerate(entries):
            if nth % _EACH == 0 and time.monotonic() > until:
                raise _Late
            yield entry.path


def keepers() -> Iterator[tuple[int, str]]:
    """Pid and name of each process that has a mount namespace open in which no process is, as far as they are found quickly."""
    lived_in = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                lived_in.add(os.readlink(f"/proc/{entry}/ns/mnt"))

    def keeps(process: str, until: float) -> bool:
        return any(path.startswith("mnt:[") and path not in lived_in for path in _files(process, until))

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


def _search(*ways: _Way, longest: float = LONGEST, enough: float = ENOUGH) -> Iterator[tuple[int, str]]:
    """Pid and name of each other process for whose directory in /proc one of ``ways`` is true."""
    began = time.monotonic()
    found: set[str] = set()
    left_out = {str(os.getpid())}
    with suppress(_Late):
        if is_asking := asking.get():
            with suppress(OSError):
                parent = _parent_of(is_asking)
                if any(uses(f"/proc/{parent}", began + longest) for uses in ways):
                    left_out.add(str(is_asking))
        processes = _processes()
        for uses in ways:
            for entry in processes:
                if entry in found or entry in left_out:
                    continue
                until = began + (enough if found else longest)
                if time.monotonic() > until:
                    return
                try:
                    if uses(f"/proc/{entry}", until):
                        name = _name_of(entry)
                        found.add(entry)
                        yield int(entry), name
                except OSError:  # it has ended, or is not for us to see
                    continue


def _places(process: str, until: float) -> Iterator[str]:
    for link in ("cwd", "root", "exe"):
        yield os.readlink(f"{process}/{link}")


def _files(process: str, until: float) -> Iterator[str]:
    for path in _descriptors(process, until):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(path)


def _mappings(process: str, until: float) -> Iterator[str]:
    for line in _maps(process, until):
        _, slash, path = os.fsdecode(line).rstrip("\n").partition("/")
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
