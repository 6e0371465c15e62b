"""Claim: a directory becomes the ROOT of this process, for as long as the process holds its lock (``lock.py``).

First everything is looked at that may be refused, then something is changed: a directory that is refused stays as it was.

ROOT is held by a descriptor, and all that makes, moves or deletes something in it goes by way of that (``Claim.held``):
whatever becomes of its name, it is the directory that was looked at.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import NamedTuple

from snapfs.errors import Unavailable
from snapfs.kernel import trusted
from snapfs.kernel.mounttable import mount_id_of, mount_table
from snapfs.root import imprint, lock
from snapfs.store.soundness import is_lmdb

RECORDS = "metadata.mdb"

_FILES = ("lock", RECORDS, f"{RECORDS}-reserve", f"{RECORDS}.new", f"{RECORDS}.new-reserve")
_BEGUN = ("lock", "snapshots", "pool", "trash", "rootfs")
_DIRECTORIES = (*_BEGUN[1:], "empty", "lost+found")


class Claim(NamedTuple):
    """A root that this process holds.

    ``root``: its path, without links.  ``fd`` (O_PATH) is open on it, ``lock`` on its lock.  ``note``: what the process that
    held it before has noted at its end (else its pid).  ``made``: the paths of the directories that were made for it, the
    highest first.  ``is_new``: it was empty, or was not there.  ``mode``: its mode bits
    before.  One that others could write is 0700 by now: they could put links in the place of what is being opened."""

    root: str
    fd: int
    lock: int
    note: str
    made: list[str]
    is_new: bool
    mode: int

    def put_mode_back(self) -> None:
        """Give the root the mode that it had, for it is refused after all."""
        with suppress(OSError):
            if stat.S_IMODE(os.fstat(self.fd).st_mode) != self.mode:
                os.chmod(self.held, self.mode)

    @property
    def held(self) -> str:
        """A path of the root that leads nowhere else, whatever is renamed."""
        return f"/proc/self/fd/{self.fd}"


def claim_existing(root: str) -> Claim:
    """Claim ``root``, which must be one, and change nothing in it.

    Raises Unavailable with a sentence: held by another process (which one), no root, not trusted (``_look``), or what the
    operating system refused.
    """
    return _claim(root, may_make=False)


def claim(root: str) -> Claim:
    """Claim ``root``, made with mode 0700 where it is missing; one that is there is not changed yet.

    Raises Unavailable with a sentence: held by another process (which one), neither empty nor a root, not trusted (``_look``),
    in a mounted tree, or what the operating system refused.
    """
    try:
        os.path.abspath(root).encode()
    except UnicodeEncodeError:
        raise Unavailable(f"the root {root!r} is not UTF-8; mount specs could not name it") from None
    return _claim(root, may_make=True)


def resolve(root: str) -> str:
    """``root`` without links, whether it is there or not; raises Unavailable where somebody else could lead it elsewhere."""
    try:
        with _find(root) as found:
            return found.path
    except OSError as error:
        raise Unavailable.from_os(f"use {root} as root", error) from error


def look(root: str) -> trusted.Found:
    """Find ``root``, which must be one, for a caller that only reads: a context manager, which closes its ``fd``.  Raises
    Unavailable."""
    try:
        found = _find(root)
        try:
            _look(found, root, may_make=False)
        except BaseException:
            os.close(found.fd)
            raise
    except OSError as error:
        raise Unavailable.from_os(f"use {root} as root", error) from error
    return found


def _claim(root: str, *, may_make: bool) -> Claim:
    try:
        with _find(root) as found:
            is_new = _look(found, root, may_make=may_make)
            made = found.make()
            fd = os.dup(found.fd)
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            claimed = Claim(found.path, fd, -1, "", made, is_new, mode)
            try:
                if mode & (stat.S_IWGRP | stat.S_IWOTH):
                    os.chmod(claimed.held, 0o700)
                    _look(found, root, may_make=may_make)  # once more: from here on nobody else can put anything in
                held, note = lock.acquire(fd, found.path)
                return claimed._replace(lock=held, note=note)
            except BaseException:
                claimed.put_mode_back()
                os.close(fd)
                remove_made(made)
                raise
    except OSError as error:
        raise Unavailable.from_os(f"use {root} as root", error) from error


def _find(root: str) -> trusted.Found:
    try:
        return trusted.find(root, may_lack=True)
    except trusted.Untrusted as error:
        raise Unavailable(
            f"cannot use {root} as root: {error}; give one of yours, below directories that nobody else can write, such as /srv"
        ) from None


def _look(found: trusted.Found, root: str, *, may_make: bool) -> bool:
    """Raise Unavailable unless ``found`` can be a root, or with ``may_make`` become one; whether there is none yet.

    It, and all that snapfs makes in it by fixed names, must be this user's or root's, and neither links nor writable by others:
    else what is done there would happen wherever somebody else likes.
    """
    lacks = f"{root} is no root of snapfs: give the one that snapfs serve was given"
    if may_make:
        _refuse_tree(found)
    elif found.missing:
        raise Unavailable(lacks)
    if found.missing:
        return True
    shown = os.fstat(found.fd)
    if not stat.S_ISDIR(shown.st_mode):
        raise Unavailable(f"cannot use {root} as root: it is not a directory" if may_make else lacks)
    if shown.st_uid != os.geteuid():
        raise Unavailable(
            f"{root} belongs to the user {shown.st_uid}, but whoever uses it must be the only one to get in: run this as that "
            "user, or give another"
        )
    held = f"/proc/self/fd/{found.fd}"
    present = os.listdir(held)
    if "lost+found" in present and _is_begun(f"{held}/lost+found"):  # mkfs has made it
        present.remove("lost+found")
    if present and not _is_root(held, present):
        raise Unavailable(f"{root} is neither empty nor a root of snapfs; give a directory of its own" if may_make else lacks)
    if not present and not may_make:
        raise Unavailable(lacks)
    _refuse_exchanged(held, found.path)
    return not present


def _is_root(held: str, present: list[str]) -> bool:
    """Whether a directory with the entries ``present`` is a root, by what only snapfs writes: its records; or, where these are
    lost, what its snapshots' directories say or its other directories; or what a start has begun."""
    if RECORDS in present and is_lmdb(f"{held}/{RECORDS}"):
        return True
    if imprint.has_some(f"{held}/snapshots"):
        return True
    if set(_BEGUN[:4]) <= set(present):
        return True
    return {*_BEGUN, RECORDS}.issuperset(present) and all(_is_begun(f"{held}/{name}") for name in present)


def _is_begun(path: str) -> bool:
    """Whether ``path`` is an empty file or directory, whichever its name is for."""
    found = os.lstat(path)
    if os.path.basename(path) in _FILES:
        return stat.S_ISREG(found.st_mode) and found.st_size == 0
    return stat.S_ISDIR(found.st_mode) and not os.listdir(path)


def _refuse_exchanged(held: str, root: str) -> None:
    """Raise Unavailable where an entry of the root (``held`` leads there, ``root`` is its name) that has a fixed name is not
    what snapfs makes: a link, somebody else's, writable by others.  Raises OSError."""
    users = trusted.trusted_users()
    for name in (*_FILES, *_DIRECTORIES):
        try:
            found = os.lstat(f"{held}/{name}")
        except FileNotFoundError:
            continue
        path, is_file = f"{root}/{name}", name in _FILES
        if not (stat.S_ISREG if is_file else stat.S_ISDIR)(found.st_mode):
            wrong = f"is not a {'file' if is_file else 'directory'}"
        elif found.st_uid not in users:
            wrong = f"belongs to the user {found.st_uid}"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            wrong = "can be written by others"
        elif is_file and found.st_nlink != 1:
            wrong = "has another name somewhere, by which it could be changed (or is a copy by hard links, as of cp -l)"
        else:
            continue
        raise Unavailable(
            f"cannot use {root} as root: {path} {wrong}, and snapfs made no such thing: look what is in there, and whose it is"
        )


def _refuse_tree(found: trusted.Found) -> None:
    """Raise Unavailable where ``found`` is in a mounted tree, in which nothing but snapshots can be made."""
    number = mount_id_of(found.fd)
    for mount in mount_table():
        if mount.id == number and mount.type == "fuse.snapfs":
            raise Unavailable(f"cannot use {found.path} as root: it is in the tree that snapfs serves on {mount.target}")


def remove_made(made: list[str]) -> None:
    """Remove the directories of ``Claim.made`` that are still empty."""
    for path in reversed(made):
        with suppress(OSError):
            os.rmdir(path)
