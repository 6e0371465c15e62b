"""Disk usage of a layer, as containerd counts it (continuity's ``fs.DiskUsage``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import closing

from snapfs.model import Usage

_ANCHOR = 2000  # bytes of relative path after which a new descriptor is opened: half of what a path may have


class _Anchor:
    """An open directory that paths are relative to; closed when the last directory below it has been listed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def disk_usage(directory: str, checkpoint: Callable[[], None] = lambda: None) -> Usage:
    """What ``directory`` and all below it take: allocated blocks × 512, each inode once, whiteouts and the directory itself
    included.  What vanishes meanwhile is not counted.

    Blocks on the disk, so call it in a worker thread; ``checkpoint`` is called once a directory and may raise to stop
    the scan.  Raises OSError where ``directory`` is missing or the disk fails.
    """
    own = os.lstat(directory)
    inodes, blocks = 1, own.st_blocks
    linked: set[tuple[int, int]] = set()  # only what has several names can be met twice
    with closing(_listings(directory)) as listings:
        for entries in listings:
            checkpoint()
            for stat in entries:
                if stat.st_nlink > 1 and not _is_directory(stat):
                    if (stat.st_dev, stat.st_ino) in linked:
                        continue
                    linked.add((stat.st_dev, stat.st_ino))
                inodes += 1
                blocks += stat.st_blocks
    return Usage(inodes, blocks * 512)


def _listings(directory: str) -> Generator[list[os.stat_result], None, None]:
    """The entries of each directory at and below ``directory``.  Depth costs neither stack nor more than a few descriptors,
    and no path is too long, since each is relative to an anchor."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    pending = [(_Anchor(os.open(directory, flags)), ".")]
    while pending:
        anchor, path = pending.pop()
        try:
            fd = os.open(path, flags, dir_fd=anchor.fd)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if len(os.fsencode(path)) > _ANCHOR:
            anchor, path = _Anchor(os.dup(fd)), "."
        found = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    found.append(stat)
                    if _is_directory(stat):
                        pending.append((anchor, f"{path}/{entry.name}"))
        finally:
            os.close(fd)
        yield found


def _is_directory(stat: os.stat_result) -> bool:
    return stat.st_mode & 0o170000 == 0o040000
