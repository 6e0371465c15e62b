"""A file system that looks like a tree of snapfs and is none: whoever runs it says what its files hold.

python -m tests.forged MOUNTPOINT < JSON of {path: text}        prints a line when it is mounted, and ends with its mount
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys

import pyfuse3
import trio


class _Forged(pyfuse3.Operations):
    def __init__(self, files: dict[str, str]) -> None:
        super().__init__()
        directories = {path[:at] for path in files for at in range(len(path)) if path[at] == "/"}
        self._paths = ["", *sorted(directories), *files]
        self._files = {path: text.encode() for path, text in files.items()}

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        path = f"{self._paths[parent_inode - 1]}/{os.fsdecode(name)}".lstrip("/")
        if path not in self._paths:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(self._paths.index(path) + 1, ctx)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        content = self._files.get(self._paths[inode - 1])
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o777 if content is None else stat.S_IFREG | 0o666
        entry.st_size = len(content or b"")
        return entry

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """It lists nothing."""

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return self._files[self._paths[fh - 1]][off : off + size]


if __name__ == "__main__":
    pyfuse3.init(_Forged(json.load(sys.stdin)), sys.argv[1], {"fsname=forged", "subtype=snapfs", "allow_other"})
    print("mounted", flush=True)
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)
