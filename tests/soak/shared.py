"""Names that all clients use at once: each knows which answers the others may cause, and what nobody may ever see."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import stat
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from snapfs.model import Kind
from tests.soak.client import Client, Excused
from tests.soak.model import BASE, inside

NAMES = tuple(f"s{n}" for n in range(14))
_LABELS = ("x", "shared")
_LAYER = re.compile(r".*/snapshots/([1-9][0-9]*)/fs")
_MOUNT = re.compile(r".*/rootfs/([1-9][0-9]*)/fs")

GONE = errno.ENOENT


class Shared:
    """The operations on names that others use too."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.pick = client.pick
        self.serial = 0

    def operations(self) -> dict[Callable[[], None], int]:
        """What to do, and how often."""
        return {
            self.make: 10,
            self.commit: 6,
            self.rename: 5,
            self.remove: 6,
            self.remove_as_a_file_manager: 1,
            self.label: 6,
            self.unlink_label: 2,
            self.rename_label: 2,
            self.write_file: 8,
            self.read_rootfs: 4,
            self.read_all: 6,
            self.look_at_committed: 8,
            self.list_one: 3,
            self.stat_any: 6,
            self.look_at_the_daemon: 2,
            self.space: 2,
            self.cleanup: 1,
            self.flush: 1,
            self.wait_for_others: 1,
        }

    def name(self) -> str:
        return self.pick.choice(NAMES)

    def path(self) -> str:
        return f"{self.pick.choice(list(Kind))}/{self.name()}"

    def parent(self) -> str | None:
        chance = self.pick.random()
        return None if chance < 0.4 else BASE if chance < 0.7 else self.name()

    # -- changing

    def make(self) -> None:
        kind, name, parent = self.pick.choice((Kind.ACTIVE, Kind.ACTIVE, Kind.VIEW)), self.name(), self.parent()
        path, excuses = f"{kind}/{name}", [errno.EEXIST]
        if parent is not None:
            path, excuses = inside(parent, path), [errno.EEXIST, GONE]
        self.client.may("mkdir", path, lambda: os.mkdir(path), *excuses)
        self.client.tell("view" if kind is Kind.VIEW else "prepare", name)

    def commit(self) -> None:
        key, name = self.name(), self.name()
        source, target = f"active/{key}", f"committed/{name}"
        excuses = [GONE, errno.EEXIST, errno.EBUSY]
        if self.pick.random() < 0.3:
            target = inside(self.pick.choice((BASE, self.name())), target)
            excuses += [errno.EPERM, errno.ENOTDIR]  # another parent; a directory onto a link
        self.client.may("rename", f"{source} {target}", lambda: os.rename(source, target), *excuses)
        self.client.tell("commit", key, name)

    def rename(self) -> None:
        kind, old, new = self.pick.choice(list(Kind)), *self.pick.sample(NAMES, 2)
        source, target = f"{kind}/{old}", f"{kind}/{new}"
        self.client.may("rename", f"{source} {target}", lambda: os.rename(source, target), GONE, errno.EEXIST)
        self.client.tell("rename", old, new)

    def remove(self) -> None:
        path = self.path()
        self.client.may("rmdir", path, lambda: os.rmdir(path), GONE, errno.ENOTEMPTY, errno.EBUSY)
        self.client.tell("remove", os.path.basename(path))

    def remove_as_a_file_manager(self) -> None:
        """rm -r, whoever does what with the snapshot meanwhile."""
        path, excuses = self.path(), (GONE, errno.ENOTEMPTY)

        def delete(directory: str) -> None:
            for name in self.client.may("list", directory, partial(os.listdir, directory), GONE):
                entry = f"{directory}/{name}"
                with suppress(Excused):
                    if stat.S_ISDIR(self.client.may("lstat", entry, partial(os.lstat, entry), GONE).st_mode):
                        delete(entry)
                        self.client.may("rmdir", entry, partial(os.rmdir, entry), *excuses)
                    else:
                        self.client.may("unlink", entry, partial(os.unlink, entry), *excuses)

        delete(path)
        self.client.may("rmdir", path, lambda: os.rmdir(path), *excuses, errno.EBUSY)
        self.client.tell("remove", os.path.basename(path))

    def label(self) -> None:
        """Written or extended by a shell; now and then nothing is written after all."""
        path = f"{self.path()}/labels/{self.pick.choice(_LABELS)}"
        flags = os.O_WRONLY | os.O_CREAT | self.pick.choice((os.O_TRUNC, os.O_TRUNC, os.O_APPEND))
        with self.client.opened(path, flags, GONE) as fd:
            if self.pick.random() < 0.9:
                value = f"{self.client.number} {self.pick.random()}\n".encode()
                with suppress(Excused):
                    self.client.may("write", path, lambda: os.write(fd, value), GONE, errno.E2BIG)

    def unlink_label(self) -> None:
        path = f"{self.path()}/labels/{self.pick.choice(_LABELS)}"
        self.client.may("unlink", path, lambda: os.unlink(path), GONE, errno.ENOTEMPTY)  # the latter: see rm -r above

    def rename_label(self) -> None:
        directory = f"{self.path()}/labels"
        old, new = self.pick.sample([f"{directory}/{label}" for label in _LABELS], 2)
        self.client.may("rename", f"{old} {new}", lambda: os.rename(old, new), GONE)

    def write_file(self) -> None:
        """A file of its own in an active snapshot, which from then on nobody may lose."""
        path = f"active/{self.name()}/rootfs"
        with self.client.followed(path, errno.EBUSY) as directory:
            found = _MOUNT.fullmatch(os.readlink(f"/proc/self/fd/{directory}"))
            self.client.check(found is not None, path, f"{path} does not lead to a rootfs")
            assert found is not None
            self.serial += 1
            name = f"{self.client.number}.{self.serial}"
            content = self.pick.randbytes(self.pick.randrange(500))
            flags = os.O_CREAT | os.O_EXCL
            self.client.put(directory, name, f"{path}/{name}", content, flags, errno.EROFS)
            self.client.report.written.setdefault(int(found[1]), {})[name] = zlib.crc32(content)

    # -- looking

    def read_rootfs(self) -> None:
        path = f"{self.path()}/rootfs"
        with self.client.followed(path, errno.EBUSY) as directory:
            for name in self.client.must("layer list", path, lambda: os.listdir(directory)):
                self.client.get(directory, name, f"{path}/{name}")

    def read_all(self) -> None:
        self.read_snapshot(self.path())

    def read_snapshot(self, path: str) -> None:
        """Read every file that there is and follow no link; what is read is whole."""
        for name in self.client.may("list", path, lambda: os.listdir(path), GONE):
            entry = f"{path}/{name}"
            with suppress(Excused):
                mode = self.client.may("lstat", entry, partial(os.lstat, entry), GONE).st_mode
                if stat.S_ISLNK(mode):
                    self.client.may("readlink", entry, partial(os.readlink, entry), GONE, errno.EBUSY)
                elif stat.S_ISDIR(mode):
                    for inner in self.client.may("list", entry, partial(os.listdir, entry), GONE):
                        self.look_inside(f"{entry}/{inner}", name == "labels")
                else:
                    self.whole(entry, self.client.read(entry, GONE))

    def look_inside(self, path: str, is_label: bool) -> None:
        with suppress(Excused):
            if not is_label:
                self.client.may("readlink", path, lambda: os.readlink(path), GONE)
                return
            content = self.client.read(path, GONE)
            # nothing: it is just being made or replaced
            self.client.check(content == b"" or content.endswith(b"\n"), path, f"{path} holds {content!r}")

    def whole(self, path: str, content: bytes) -> None:
        name = os.path.basename(path)
        if name.endswith(".json"):
            try:
                found = json.loads(content)
            except ValueError:
                found = None
            self.client.check(found is not None, path, f"{path} is no JSON: {content!r}")
        elif name == "changes":
            right = all(line[:3] in (b"A /", b"C /", b"D /") for line in content.splitlines())
            self.client.check(right, path, f"{path} says {content!r}")
        elif name == "mount.sh":
            self.client.check(content.startswith(b"#!/bin/sh\n"), path, f"{path} is no script")

    def look_at_committed(self) -> None:
        """What is committed never changes: all see the same files in it, always."""
        path = f"committed/{self.name()}/diff"
        layer = self.client.may("readlink", path, lambda: os.readlink(path), GONE)
        found = _LAYER.fullmatch(layer)
        self.client.check(found is not None, path, f"{path} leads to {layer}")
        assert found is not None
        number, sums = int(found[1]), {}
        for name in self.client.may("layer list", layer, lambda: os.listdir(layer), GONE):
            sums[name] = zlib.crc32(self.client.get(None, f"{layer}/{name}", f"{layer}/{name}", GONE))
        link = f"by-id/{number}"
        place = self.client.may("readlink", link, lambda: os.readlink(link), GONE)  # or it was removed meanwhile
        self.client.check(place.startswith("../committed/"), path, f"{link} leads to {place}")
        before = self.client.report.manifests.setdefault(number, sums)
        self.client.check(before == sums, path, f"{layer} of {path} holds {sums} and held {before}")

    def list_one(self) -> None:
        directory = self.pick.choice((*Kind, "by-id", "."))
        found = self.client.list_long(directory)
        if directory == "by-id":
            self.client.check(len(found) == len(set(found)), directory, f"an id stands twice in {directory}: {found}")

    def crawl(self) -> None:
        """Whatever looks at everything there is: updatedb, a backup, a curious user."""
        for kind in Kind:
            for name in self.client.list_long(kind):
                with suppress(Excused):
                    self.read_snapshot(f"{kind}/{name}")
                if self.client.board.stopped:
                    return

    def stat_any(self) -> None:
        path = self.path() + self.pick.choice(("", "", "/info.json", "/usage.json", "/rootfs", "/labels/x", "/none"))
        self.client.may("stat", path, lambda: os.lstat(path), GONE)

    def look_at_the_daemon(self) -> None:
        name = self.pick.choice(("stats.json", "options.json", "version", "cleanup", "error_log"))
        path = f".snapfs/{name}"
        if name != "error_log":
            self.whole(path, self.client.read(path))
            return
        with self.client.opened(path, os.O_RDONLY) as fd:
            end = self.client.must("fstat", path, lambda: os.fstat(fd)).st_size
            text = self.client.must("read", path, lambda: os.pread(fd, 1 << 16, max(0, end - 10_000)))
        self.client.check(text == b"" or text.endswith(b"\n") or len(text) == 1 << 16, path, f"{path} ends in {text[-100:]!r}")

    def space(self) -> None:
        path = self.pick.choice((".", "active", ".snapfs/version"))
        found = self.client.must("statfs", path, lambda: os.statvfs(path))
        self.client.check(found.f_namemax == 255 and found.f_blocks > 0, path, f"statfs says {found}")

    def cleanup(self) -> None:
        path = ".snapfs/cleanup"
        with self.client.opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
            self.client.must("cleanup", path, lambda: os.write(fd, b"1\n"))

    def flush(self) -> None:
        self.client.flush(self.path(), GONE)

    def wait_for_others(self) -> None:
        """Who has read all sleeps until there is more; with so many at work that is soon."""
        path = ".snapfs/events"
        with self.client.opened(path, os.O_RDONLY) as fd:
            end = os.fstat(fd).st_size
            end += len(self.client.read_on(fd, path, end))
            waiting = select.poll()
            waiting.register(fd, select.POLLIN)
            ready = waiting.poll(3000)
            after = os.fstat(fd).st_size
            self.client.check(bool(ready) or after == end, path, f"{path} has grown from {end} to {after}, and poll slept on")
