"""Files in one client's own snapshots, through rootfs and in the layer itself."""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from snapfs.model import Kind
from tests.soak.client import Excused
from tests.soak.model import Model

FILES = ("f0", "f1", "f2", "f3", "f4", "f5")


class Files:
    """The operations on files."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.client = model.client
        self.pick = model.pick

    def write_file(self) -> None:
        its = self.model.some(Kind.ACTIVE)
        if its is None:
            return
        name, content = self.pick.choice(FILES), self.pick.randbytes(self.pick.randrange(3000))
        path, flags = f"{its.path}/diff/{name}", os.O_CREAT | os.O_TRUNC
        # what is written beneath an overlay that somebody looked into need not be seen through it
        if "diff" not in its.hidden and (its.parent is None or not its.followed) and self.pick.random() < 0.5:
            self.client.put(None, path, path, content, flags)
        elif "rootfs" not in its.hidden:
            with suppress(Excused), self.model.followed(its) as directory:
                self.client.put(directory, name, f"{its.path}/rootfs/{name}", content, flags)
                its.layer[name] = content
            return
        else:
            return
        its.layer[name] = content

    def delete_file(self) -> None:
        its = self.model.some(Kind.ACTIVE, without="rootfs")
        files = sorted(self.model.merged(its)) if its is not None else []
        if its is None or not files:
            return
        name = self.pick.choice(files)
        below = self.model.merged(above) if (above := self.model.find(its.parent)) else {}
        with suppress(Excused), self.model.followed(its) as directory:
            self.client.must("layer unlink", f"{its.path}/rootfs/{name}", lambda: os.unlink(name, dir_fd=directory))
            its.layer.pop(name, None)
            if name in below:
                its.layer[name] = None

    def read_files(self) -> None:
        its = self.model.some(without="rootfs") or self.model.base
        with suppress(Excused), self.model.followed(its) as directory:
            where = f"{its.path}/rootfs"
            expected = self.model.merged(its)
            found = sorted(self.client.must("layer list", where, lambda: os.listdir(directory)))
            self.client.check(found == sorted(expected), its.key, f"{where} has {found}, not {sorted(expected)}")
            for name in found:
                content = self.client.get(directory, name, f"{where}/{name}")
                self.client.check(content == expected[name], its.key, f"{where}/{name} holds something else")

    def write_what_is_read_only(self) -> None:
        its = self.model.some(Kind.VIEW, Kind.COMMITTED, without="rootfs") or self.model.base

        with suppress(Excused), self.model.followed(its) as directory:
            path = f"{its.path}/rootfs/f0"
            opened = lambda: os.open("f0", os.O_CREAT | os.O_WRONLY, dir_fd=directory)  # noqa: E731
            self.client.must_not(errno.EROFS, "layer open", path, opened)
