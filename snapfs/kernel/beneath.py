"""Files reached from a directory that is open: by no link, in no other mount, and never out of it (openat2(2)).

Somebody else may own parts of the directory, and exchange what is in it at any moment.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os

from snapfs.kernel import libc

LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

MOST = 10_000
"""Entries of a directory that is everybody's that are looked at (``called``)."""

_INSIDE = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_XDEV
_LONGEST = 4000  # bytes of a path that the kernel takes at once


def open_beneath(path: bytes, top: int, flags: int) -> int:
    """A descriptor of what is at ``path`` below the directory open as ``top`` ("": that itself), however long it is.

    Raises OSError: ELOOP where a link is on the way; EXDEV where something is mounted on the way, or at the end."""
    if len(path) <= _LONGEST:
        return _open(path or b".", top, flags, _INSIDE)
    here = os.dup(top)
    try:
        while len(path) > _LONGEST:
            cut = path.rindex(b"/", 0, _LONGEST)
            here, above = _open(path[:cut], here, LOOK | os.O_DIRECTORY, _INSIDE), here
            os.close(above)
            path = path[cut + 1 :]
        return _open(path, here, flags, _INSIDE)
    finally:
        os.close(here)


def called(prefix: str, directory: int) -> list[str]:
    """The names that begin with ``prefix`` among the first MOST entries of the one open as ``directory``.  It is everybody's:
    who had millions of them would have each process wait that looks for some of its own there.  Raises OSError."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in itertools.islice(entries, MOST) if entry.name.startswith(prefix)]


def open_without_links(path: str, flags: int) -> int:
    """A descriptor of what is at the absolute ``path``.  Raises OSError: ELOOP where a link is on the way, or at the end."""
    return _open(os.fsencode(path), -1, flags, 0)


def _open(path: bytes, top: int, flags: int, resolve: int) -> int:
    how = _how(flags, resolve)
    while True:
        try:
            return libc.openat2(top, path, how)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # somebody renamed something just then
                error.filename = path
                raise


@functools.cache
def _how(flags: int, resolve: int) -> libc.OpenHow:
    no_links = libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
    return libc.OpenHow(flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0, resolve | no_links)
