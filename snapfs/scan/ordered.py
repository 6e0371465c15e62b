"""Walking a layer in order: each entry once, those of a directory sorted by the bytes of their names, what is in a directory
right after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice

from snapfs.scan.spool import Spool
from snapfs.scan.walk import BATCH, Descriptors, Directory

MANY = 120_000  # entries of one directory that are sorted in memory; of a larger one they wait in a file
HELD = 250_000  # entries that all directories on the way down may have in memory
_HARDLY_ANY = 100  # entries of one directory that are in memory even so

_DIRECTORY, _OTHER = b"d", b"o"  # the marks of entries in a spool


def ordered(
    top: Directory, descriptors: Descriptors, spool: Spool, checkpoint: Callable[[], None]
) -> Generator[tuple[bytes, Directory, bytes, Directory | None], None, None]:
    """Each entry below ``top``: the path of the directory that it is in, with a slash at the end and without one at the begin
    (of ``top``: nothing), that directory, its name, and where it is a directory that, too.

    Directories are open in ``descriptors``, entries wait in ``spool``.  ``checkpoint`` is called once a directory, in a large
    one now and then, and may raise.  Directories that vanish meanwhile are left out.  Depth costs no stack, and memory is
    bounded but for some bytes for each directory on the way down.  Raises OSError.  Blocks on the disk.
    """
    path, held = b"", 0
    stack: list[tuple[Directory, Iterator[tuple[bytes, bytes]], int, int]] = []
    entering: Directory | None = top
    while entering is not None or stack:
        if entering is not None:
            checkpoint()
            entries, count = _sorted(entering, descriptors, spool, MANY if held < HELD else _HARDLY_ANY, checkpoint)
            held += count
            stack.append((entering, entries, len(path), count))
            entering = None
        directory, entries, _, count = stack[-1]
        for name, mark in entries:
            if mark == _OTHER:
                yield path, directory, name, None
                continue
            entering = Directory(os.fsdecode(name), directory)
            yield path, directory, name, entering
            path += name + b"/"
            break
        else:
            stack.pop()
            held -= count
            descriptors.close(directory)
            path = path[: stack[-1][2]] if stack else b""


def _sorted(
    directory: Directory, descriptors: Descriptors, spool: Spool, most: int, checkpoint: Callable[[], None]
) -> tuple[Iterator[tuple[bytes, bytes]], int]:
    """Name and mark of each entry of ``directory``, in order, and how many of them are in memory."""
    fd = descriptors.get(directory)
    if fd < 0:
        return iter(()), 0
    with os.scandir(fd) as listing:
        found = _marked(islice(listing, most))
        if len(found) < most:
            found.sort()
            return iter(found), len(found)

        def all_of_them() -> Iterator[tuple[bytes, bytes]]:
            while some := _marked(islice(listing, BATCH)):
                yield from some
                checkpoint()

        entries = spool.in_order(chain(found, all_of_them()))
        first = next(entries)  # by then all have been read
    return chain([first], entries), 0


def _marked(entries: Iterator[os.DirEntry[str]]) -> list[tuple[bytes, bytes]]:
    return [(os.fsencode(entry.name), _DIRECTORY if entry.is_dir(follow_symlinks=False) else _OTHER) for entry in entries]
