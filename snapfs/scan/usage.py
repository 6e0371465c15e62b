"""Disk usage of a layer, as containerd counts it (continuity's ``fs.DiskUsage``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from stat import S_ISDIR

from snapfs.kernel import inside
from snapfs.model import Usage
from snapfs.scan.inodes import Inodes
from snapfs.scan.walk import directories


def disk_usage(directory: str, checkpoint: Callable[[], None] = lambda: None) -> Usage:
    """What ``directory`` and all below it take on the disk: bytes (allocated blocks × 512) and inodes, each inode once, with
    whiteouts and the directory itself; and the bytes of files that have names elsewhere, too.  Files that vanish meanwhile are
    not counted.  Where something of another file system is mounted inside, what is beneath is counted.

    Blocks on the disk, so call it in a worker thread; ``checkpoint`` is called once a directory (of a large one, now and then)
    and may raise to stop the scan.  Memory is bounded but for files with several names, of which each inode takes some bytes
    (``scan/inodes.py``).  Raises OSError where ``directory`` is missing or the disk fails.
    """
    own = os.lstat(directory)
    if S_ISDIR(own.st_mode) and _is_empty(directory):  # as many layers are: nothing can be mounted inside
        checkpoint()
        return Usage(1, own.st_blocks * 512)
    inodes, blocks, device, shared = 1, own.st_blocks, own.st_dev, 0
    linked: dict[int, Inodes] = {}  # by device; only files with several names can be met twice
    again: Counter[tuple[int, int]] = Counter()  # how often a file was that has more than two
    with closing(directories(directory)) as visited:
        for fd, entries in visited:
            checkpoint()
            for entry in entries:  # a microsecond each, most of it the kernel's
                try:
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_dev != device:
                        device = os.fstat(fd).st_dev  # there may be another subvolume than before
                        if stat.st_dev != device:
                            stat = inside.stat_beneath(entry.name, fd)
                except FileNotFoundError:
                    continue
                if stat.st_nlink != 1 and not entry.is_dir(follow_symlinks=False):
                    met = linked.get(stat.st_dev)
                    if met is None:
                        met = linked[stat.st_dev] = Inodes()
                    if not met.add(stat.st_ino):
                        found = 2
                        if stat.st_nlink > 2:
                            again[stat.st_dev, stat.st_ino] += 1
                            found = again[stat.st_dev, stat.st_ino] + 1
                        if found == stat.st_nlink:  # all its names are here
                            shared -= stat.st_blocks
                            again.pop((stat.st_dev, stat.st_ino), None)
                        continue
                    shared += stat.st_blocks
                inodes += 1
                blocks += stat.st_blocks
    return Usage(inodes, blocks * 512, max(0, shared) * 512)


def _is_empty(directory: str) -> bool:
    with closing(os.scandir(directory)) as entries:
        return next(iter(entries), None) is None
