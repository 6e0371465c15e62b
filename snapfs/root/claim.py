"""Claim: a directory becomes the ROOT of this process, for as long as the process holds its lock (``lock.py``)."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import NamedTuple

from snapfs.errors import Unavailable
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.root import lock

_OURS = frozenset(
    ("lock", "metadata.mdb", "metadata.mdb-reserve", "snapshots", "pool", "trash", "lost+found", "rootfs", "empty")
)


class Claim(NamedTuple):
    """A root that this process holds: its real path, the descriptor of its lock, and what the process that held it before has
    noted at its end (else its pid)."""

    root: str
    lock: int
    previous_note: str


def claim_existing(root: str) -> Claim:
    """Claim ``root``, which must be one, and change nothing in it.

    Raises Unavailable with a sentence: held by another process (which one), no root, or what the operating system refused.
    """
    root = os.path.realpath(root)
    try:
        try:
            os.lstat(f"{root}/lock")
        except (FileNotFoundError, NotADirectoryError):
            raise Unavailable(f"{root} is no root of snapfs") from None
        return Claim(root, *lock.acquire(root))
    except OSError as error:
        raise Unavailable.from_os(f"use {root} as root", error) from error


def claim(root: str) -> Claim:
    """Claim ``root``, made with mode 0700 where missing.

    Raises Unavailable with a sentence: held by another process (which one), not a directory of ours or of another user, in a
    mounted tree, or what the operating system refused.
    """
    root = os.path.realpath(root)
    try:
        root.encode()
    except UnicodeEncodeError:
        raise Unavailable(f"the root {root!r} is not UTF-8; mount specs could not name it") from None
    try:
        _refuse_tree(root)
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.stat(root).st_mode):
                raise Unavailable(f"cannot use {root} as root: it is not a directory")
        os.makedirs(root, mode=0o700, exist_ok=True)
        present = os.listdir(root)
        if "lock" not in present and not _OURS.issuperset(present):
            raise Unavailable(f"{root} is neither empty nor a root of snapfs; give a directory of its own")
        found = os.stat(root)
        if found.st_uid != os.geteuid():  # its owner could put anything in the place of what we made, and have us follow it
            raise Unavailable(
                f"{root} belongs to the user {found.st_uid}, but whoever serves it must be the only one to get in: "
                f"serve it as that user, or chown {os.geteuid()} {root}"
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.chmod(root, 0o700)
        return Claim(root, *lock.acquire(root))
    except OSError as error:
        raise Unavailable.from_os(f"use {root} as root", error) from error


def _refuse_tree(root: str) -> None:
    """Raise Unavailable where ``root`` is in a mounted tree, in which nothing but snapshots can be made."""
    while not os.path.lexists(root):
        root = os.path.dirname(root)
    number = mount_id(root)
    for mount in mount_table():
        if mount.id == number and mount.type == "fuse.snapfs":
            raise Unavailable(f"cannot use {root} as root: it is in the tree that snapfs serves on {mount.target}")
