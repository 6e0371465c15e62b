"""Holders: the processes that use a snapshot's file system, in words, as far as the kernel shows mounts and processes.

Whether it is in use is not decided here: looking takes long, may find no process, and may name one that has just left.
"""

from __future__ import annotations

import os
from itertools import islice

from snapfs.kernel.processes import keepers, name_of, users, users_of_device
from snapfs.root.mounted import Mounted, Place

_MOST = 3  # that are named


def by_users(target: str) -> str:
    """`` by process 12 (vim)``: the processes in the mount at ``target``; empty if none is found."""
    found = [f"{pid} ({name})" for pid, name in islice(users(target), _MOST)]
    return f" by process {', '.join(found)}" if found else ""


def elsewhere(mounted: Mounted, number: int, rootfs: str, device: str = "") -> str:
    """Where the layer of snapshot ``number`` is in use, and what is to be done about it.

    Its ``rootfs``, a path, is not meant, if that is mounted; ``device`` is that of it, if it was mounted a moment ago.  Blocks.
    """

    def is_it(pid: int, place: Place) -> bool:
        if place.device == device or mounted.is_of(place, number, pid):
            return True
        return pid == os.getpid() and number in place.lowers

    here, there, foreign = [], [], []
    for pid, place in mounted.by_process(lambda place: place.bound is not None or bool(place.lowers or place.upperdir)):
        if not is_it(pid, place):
            continue
        if pid == os.getpid():
            if place.target != rootfs:
                here.append(place.target)
        elif place.foreign:
            foreign.append(pid)
        elif pid not in there:
            there.append(pid)
    if here:
        return f"is mounted at {here[0]}: unmount it first"
    using = ""
    if device and not there:  # a process of a foreign namespace need not be the one of it that uses the files
        using = ", ".join(f"{pid} ({name})" for pid, name in islice(users_of_device(device), _MOST))
    if not using and (there := there or list(dict.fromkeys(foreign))):
        found = ", ".join(f"{pid} ({name_of(pid)})" for pid in there[:_MOST])
        return f"is mounted in another mount namespace, that of process {found}: end it first"
    if using:
        return f"is in use by process {using}: end it first"
    if using := by_users(rootfs):  # in another mount of it at the same path: that of a daemon that is gone
        return f"is in use{using}: end it first"
    to_do = "rmdir the directory that it was mounted on, if snapfs mount did that"
    if keeping := ", ".join(f"{pid} ({name})" for pid, name in islice(keepers(), _MOST)):
        return f"is in use elsewhere, perhaps in a mount namespace that process {keeping} has open: end it first, or {to_do}"
    return (
        "is in use elsewhere: something has it open, or mounted where this daemon can't see it (a mount that was detached, "
        f"a namespace without a process): end that first, or {to_do}"
    )
