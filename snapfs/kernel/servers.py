"""Whose a FUSE file system is: it shows whatever the user likes who has mounted it.

The kernel tells that user by number (``user_id=`` in the mount table), as the user namespace counts in which it was mounted,
whoever reads.  In a namespace of its own a process may have another number: as ``snapfs run --root`` has it, 0.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_ALL = [(0, 0, 4294967295)]  # the map of the initial namespace


def is_ours(uid: int, options: Sequence[str], target: str, device: str) -> bool:
    """Whether this process's user has mounted the FUSE file system at ``target`` that has ``uid``, these ``options`` and this
    ``device`` (major:minor) in the mount table.

    Where the number alone doesn't tell, the kernel is asked: it lets nobody else so much as look, unless all are allowed to."""
    ids = uid_map()
    return is_number_ours(uid, os.geteuid(), ids) or (
        ids != _ALL and "allow_other" not in options and _device_seen(target) == device
    )


def is_number_ours(uid: int, own: int, ids: Sequence[tuple[int, int, int]]) -> bool:
    """Whether ``uid`` can be nobody but this process's user, whose number is ``own`` in its namespace with the map ``ids``: in
    the namespace around that, and in it."""
    outside = next((there + own - here for here, there, count in ids if here <= own < here + count), -1)
    return uid == outside >= 0 and (uid == own or not any(here <= uid < here + count for here, _, count in ids))


def uid_map() -> list[tuple[int, int, int]]:
    """The ranges of users that this process's user namespace has: the first one there, the first in the namespace around it,
    and how many."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as table:
            rows = [tuple(map(int, line.split())) for line in table]
    except FileNotFoundError:  # a kernel without user namespaces
        return list(_ALL)
    return [(here, there, count) for here, there, count in rows]


def _device_seen(path: str) -> str:
    try:
        device = os.stat(path).st_dev
    except OSError:
        return ""
    return f"{os.major(device)}:{os.minor(device)}"
