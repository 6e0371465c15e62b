"""Ending what ``snapfs run`` and ``snapfs shell`` have started in a workspace."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from snapfs.cli.place import MountedTree
from snapfs.cli.refusal import BUSY, NOT_PERMITTED, Refusal
from snapfs.kernel import freezing, libc
from snapfs.kernel.processes import users_of_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

PATIENCE, LONGEST = 5.0, 20.0  # seconds that a process has to end by itself (or is looked for), and all of them together

AGAIN = 0.2  # seconds until it is looked for more of them

TRIES = 5  # to do what takes that nobody is there, as others may come meanwhile


def once_empty(place: MountedTree, key: str, act: Callable[[], str]) -> str:
    """What ``act`` gives, once the processes in the workspace ``key`` have been ended (``end_all``).

    A ``snapfs run`` may come in between, and one that is about to start its command is not yet known as such: where the daemon
    says that somebody is there, both are done again, TRIES times at most.  Raises Refusal."""
    for _ in range(1, TRIES):
        end_all(place, key)
        try:
            return act()
        except Refusal as refused:
            if refused.status != BUSY:
                raise
        time.sleep(AGAIN)
    end_all(place, key)
    return act()


def end_all(place: MountedTree, key: str) -> None:
    """End the processes in the workspace ``key`` that ``snapfs run`` or ``snapfs shell`` has started there, and those that they
    have started, wherever these have gone, as far as they have a cgroup: SIGTERM, and SIGKILL to those that are there PATIENCE
    seconds later.  Raises Refusal."""
    if os.environ.get("SNAPFS_WORKSPACE") == key:
        raise Refusal(f'this command was started in "{key}" itself, and would be ended too: leave it first', BUSY)
    place.refuse_foreign("ended")
    try:
        number = libc.device_number(place.rootfs("active", key))
    except OSError as error:
        to_do = "the tree's owner and root may" if error.errno == errno.EACCES else "try again"
        status = NOT_PERMITTED if error.errno == errno.EACCES else BUSY
        raise Refusal(f'cannot find out who is in "{key}": {error.strerror}: {to_do}', status) from None
    device, began, told = f"{os.major(number)}:{os.minor(number)}", time.monotonic(), set()
    snapshot, groups = place.mark("active", key), set[str]()
    while True:
        with ExitStack() as held:
            groups = freezing.marked(snapshot, known=groups)
            found = _started_in(key, device, groups, held)
            if not found and not groups:
                return
            is_late = time.monotonic() - began > PATIENCE
            if time.monotonic() - began > LONGEST:
                raise Refusal(f'what was started in "{key}" starts other processes faster than they can be ended', BUSY)
            for group in groups if is_late else ():
                freezing.kill(group)
            for pid, fd in found.items():
                if is_late or pid not in told:
                    told.add(pid)
                    try:
                        signal.pidfd_send_signal(fd, signal.SIGKILL if is_late else signal.SIGTERM)
                    except ProcessLookupError:
                        pass
                    except PermissionError:
                        raise Refusal(
                            f'cannot end process {pid}, which is in "{key}": it is not yours', NOT_PERMITTED
                        ) from None
            select.select(list(found.values()), [], [], AGAIN)


def _started_in(key: str, device: str, groups: Collection[str], held: ExitStack) -> dict[int, int]:
    """The pids of those that use the file system with this ``device``, or are in one of the ``groups``, each with a descriptor
    of the process."""
    found = {}

    def note(pid: int, is_it: Callable[[int], bool]) -> None:
        with suppress(OSError):
            fd = os.pidfd_open(pid)
            held.callback(os.close, fd)
            if is_it(pid) and not select.select([fd], [], [], 0)[0]:  # it has not ended
                found[pid] = fd

    for pid, _ in users_of_device(device, longest=PATIENCE, enough=PATIENCE):
        note(pid, partial(_has_word, f"SNAPFS_WORKSPACE={key}".encode()))
    for pid, group in freezing.members(groups) if groups else ():
        note(pid, partial(_is_in, group))
    return found


def _has_word(word: bytes, pid: int) -> bool:
    return word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _is_in(group: str, pid: int) -> bool:
    return group in freezing.cgroups([pid])
