"""A file system on pyfuse3 whose handlers do nothing: what pyfuse3, trio and the interpreter cost by themselves."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from tests.bench.place import ALL_CPUS, Place

_FIXED = {b"active": 2, b"committed": 3}
_FILE, _TEXT = 4, b"{}\n"


class Nothing(pyfuse3.Operations):
    """Two directories, in which there is what was made there, and in each of these one file, whatever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[int, bytes], int] = {}
        self._inodes = itertools.count(100)

    def _entry(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444 if inode == _FILE else stat.S_IFDIR | 0o755
        entry.st_size = len(_TEXT)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        inode = _FILE if parent_inode >= 100 else _FIXED.get(name) or self._made.get((parent_inode, name))
        if inode is None:
            raise FUSEError(errno.ENOENT)
        return self._entry(inode)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(inode)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        inode = self._made[parent_inode, name] = next(self._inodes)
        return self._entry(inode)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self._made[parent_inode_new, name_new] = self._made.pop((parent_inode_old, name_old))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        del self._made[parent_inode, name]

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=1)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return _TEXT[off : off + size]

    async def release(self, fh: int) -> None:
        pass


@contextmanager
def nothing(place: Place, cpus: set[int] = ALL_CPUS) -> Iterator[tuple[Path, int]]:
    """It, mounted for a block: where, and its process."""
    with (
        place.directory("nothing") as mountpoint,
        place.ready([sys.executable, "-m", "tests.bench.nothing", str(mountpoint)], cpus) as pid,
    ):
        try:
            yield mountpoint, pid
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=False)


def main(mountpoint: str) -> None:
    """Serve it until it is unmounted."""
    pyfuse3.init(Nothing(), mountpoint, {"fsname=nothing", "subtype=nothing", "nosuid", "nodev", "noatime"})
    print("ready", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
