"""Names that one client alone uses: its model knows what must be there, and what each call must answer."""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from snapfs.model import Kind
from snapfs.tree.tree import TEARDOWN
from tests.soak.client import Client, Event, Excused, Violation, file_name

BASE = "base"
BASE_FILES = {"f0": b"base 0\n", "f1": b"base 1\n" * 100, "f9": b"base 9\n"}

LABELS = ("x", "team", "y.z/w", "containerd.io/gc.root")
FILES = ("f0", "f1", "f2", "f3", "f4", "f5")

_COMMON = {"info.json", "usage.json", "labels", "rootfs"}
ENTRIES = {
    Kind.ACTIVE: _COMMON | {"mounts.json", "mount.sh", "changes", "diff"},
    Kind.VIEW: _COMMON | {"mounts.json", "mount.sh"},
    Kind.COMMITTED: _COMMON | {"changes", "diff", *map(str, Kind)},
}


@dataclass
class Snapshot:
    """One snapshot.  ``layer``: its own files, None for a whiteout; ``hidden``: entries that were unlinked; ``followed``:
    whether its rootfs was entered; ``refused``: begin and end of the last refusal to delete a part of it."""

    key: str
    kind: Kind
    number: int
    parent: str | None
    labels: dict[str, str] = field(default_factory=dict)
    layer: dict[str, bytes | None] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    followed: bool = False
    refused: tuple[float, float] = (-1e9, -1e9)

    @property
    def path(self) -> str:
        return f"{self.kind}/{file_name(self.key)}"

    def inside(self, parent: str) -> str:
        return f"committed/{file_name(parent)}/{self.path}"


class Private:
    """The operations on one client's own names, and the model of what they have made."""

    def __init__(self, client: Client, base: int) -> None:
        self.client = client
        self.pick = client.pick
        self.prefix = f"p{client.number}"
        self.keys = [*(f"{self.prefix}.{n}" for n in range(6)), *(f"{self.prefix}/é {n}%" for n in range(4))]
        self.snapshots: dict[str, Snapshot] = {}
        self.base = Snapshot(BASE, Kind.COMMITTED, base, None, layer=dict(BASE_FILES))

    def operations(self) -> dict[Callable[[], None], int]:
        """What to do, and how often."""
        return {
            self.make: 12,
            self.commit: 8,
            self.rename: 5,
            self.remove: 5,
            self.remove_as_a_file_manager: 3,
            self.forbidden: 4,
            self.write_label: 6,
            self.append_to_label: 3,
            self.empty_label: 2,
            self.rename_label: 3,
            self.unlink_label: 4,
            self.refused_label: 2,
            self.write_file: 10,
            self.delete_file: 4,
            self.read_files: 6,
            self.write_what_is_read_only: 2,
            self.check_one: 10,
            self.check_what_is_gone: 4,
            self.list_all: 2,
            self.hide: 1,
            self.flush: 1,
            self.follow_events: 3,
        }

    # -- the model

    def find(self, key: str | None) -> Snapshot | None:
        return self.base if key == BASE else self.snapshots.get(key or "")

    def children(self, key: str) -> list[Snapshot]:
        return [its for its in self.snapshots.values() if its.parent == key]

    def chain(self, its: Snapshot) -> list[Snapshot]:
        """Its parents, the nearest first."""
        found: list[Snapshot] = []
        above = self.find(its.parent)
        while above is not None:
            found.append(above)
            above = self.find(above.parent)
        return found

    def merged(self, its: Snapshot) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for layer in reversed([its, *self.chain(its)]):
            for name, content in layer.layer.items():
                if content is None:
                    files.pop(name, None)
                else:
                    files[name] = content
        return files

    def some(self, *kinds: Kind, without: str = "") -> Snapshot | None:
        """One of its snapshots of these kinds, whose entry ``without`` was not unlinked."""
        fitting = [its for its in self.snapshots.values() if its.kind in (kinds or Kind) and without not in its.hidden]
        return self.pick.choice(fitting) if fitting else None

    def some_key(self, *kinds: Kind) -> str:
        """Mostly that of such a snapshot."""
        its = self.some(*kinds)
        return its.key if its is not None and self.pick.random() < 0.85 else self.pick.choice(self.keys)

    def some_parent(self) -> str | None:
        chance = self.pick.random()
        if chance < 0.3:
            return None
        if chance < 0.45:
            return BASE
        return self.some_key(Kind.COMMITTED)

    def is_committed(self, key: str) -> bool:
        its = self.find(key)
        return its is not None and its.kind is Kind.COMMITTED

    @contextmanager
    def perhaps_held(self, its: Snapshot | None) -> Iterator[bool]:
        """Sometimes with a descriptor in its rootfs, which keeps it from being committed or removed."""
        with ExitStack() as stack:
            held = its is not None and "rootfs" not in its.hidden and self.pick.random() < 0.15
            if held and its is not None:
                stack.enter_context(self.followed(its))
            yield held

    @contextmanager
    def followed(self, its: Snapshot) -> Iterator[int]:
        with self.client.followed(f"{its.path}/rootfs") as directory:
            its.followed = True
            yield directory

    def tell(self, operation: str, key: str, name: str | None = None) -> None:
        self.client.report.events[Event(operation, key, name)] += 1

    # -- snapshots

    def make(self) -> None:
        kind = Kind.VIEW if self.pick.random() < 0.2 else Kind.ACTIVE
        key, parent = self.pick.choice(self.keys), self.some_parent()
        path = f"{kind}/{file_name(key)}"
        if parent is not None:
            path = f"committed/{file_name(parent)}/{path}"
        other, expected = self.snapshots.get(key), 0
        if parent is not None and not self.is_committed(parent):
            expected = errno.ENOENT
        elif other is not None:
            expected = errno.EEXIST
        logged = other is not None and other.kind is not kind and expected == errno.EEXIST
        if not self.client.expect(expected, "mkdir", path, lambda: os.mkdir(path), logged=logged):
            return
        self.tell("view" if kind is Kind.VIEW else "prepare", key)
        its = self.snapshots[key] = Snapshot(key, kind, 0, parent)
        its.number = self.info(its)["id"]

    def commit(self) -> None:
        key, name = self.some_key(Kind.ACTIVE), self.pick.choice(self.keys)
        its, other = self.snapshots.get(key), self.snapshots.get(name)
        parent = self.some_parent() if self.pick.random() < 0.4 else None
        if its is not None and its.parent is not None and self.pick.random() < 0.3:
            parent = its.parent
        source, target = f"active/{file_name(key)}", f"committed/{file_name(name)}"
        if parent is not None:
            target = f"committed/{file_name(parent)}/{target}"
        with self.perhaps_held(its if its and its.kind is Kind.ACTIVE else None) as held:
            expected = 0
            if (parent is not None and not self.is_committed(parent)) or its is None or its.kind is not Kind.ACTIVE:
                expected = errno.ENOENT
            elif parent is not None and other is not None and (other.kind, other.parent) == (Kind.COMMITTED, parent):
                expected = errno.ENOTDIR  # rename(2) of a directory onto a link
            elif held:
                expected = errno.EBUSY
            elif other not in (None, its):
                expected = errno.EEXIST
            elif parent is not None and its.parent not in (None, parent):
                expected = errno.EPERM
            logged = expected == errno.EEXIST
            both = f"{source} {target}"
            if not self.client.expect(expected, "rename", both, lambda: os.rename(source, target), logged=logged):
                return
        assert its is not None
        self.tell("commit", key, name)
        del self.snapshots[key]
        its.key, its.kind, its.parent = name, Kind.COMMITTED, parent or its.parent
        self.snapshots[name] = its
        self.gone(source)
        self.client.must("stat", target, lambda: os.stat(target))

    def rename(self) -> None:
        key, new = self.some_key(), self.pick.choice(self.keys)
        its, other = self.snapshots.get(key), self.snapshots.get(new)
        kind = its.kind if its is not None and self.pick.random() < 0.9 else self.pick.choice(list(Kind))
        if key == new:
            return
        source, target = f"{kind}/{file_name(key)}", f"{kind}/{file_name(new)}"
        expected = 0
        if its is None or its.kind is not kind:
            expected = errno.ENOENT
        elif other is not None:
            expected = errno.EEXIST
        logged = expected == errno.EEXIST
        both = f"{source} {target}"
        if not self.client.expect(expected, "rename", both, lambda: os.rename(source, target), logged=logged):
            return
        assert its is not None
        self.tell("rename", key, new)
        del self.snapshots[key]
        self.snapshots[new] = its
        for child in self.children(key):
            child.parent = new
        its.key = new
        self.gone(source)
        self.client.must("stat", target, lambda: os.stat(target))

    def remove(self) -> None:
        key = self.some_key()
        its = self.snapshots.get(key)
        kind = its.kind if its is not None and self.pick.random() < 0.9 else self.pick.choice(list(Kind))
        path = f"{kind}/{file_name(key)}"
        its = its if its is not None and its.kind is kind else None
        with self.perhaps_held(its) as held:
            expected = 0
            if its is None:
                expected = errno.ENOENT
            elif held:
                expected = errno.EBUSY
            elif self.children(key):
                expected = errno.ENOTEMPTY
            if not self.client.expect(expected, "rmdir", path, lambda: os.rmdir(path)):
                return
        self.removed(key, path)

    def removed(self, key: str, path: str) -> None:
        its = self.snapshots.pop(key)
        self.tell("remove", key)
        self.gone(path)
        self.client.must_not(errno.ENOENT, "readlink", f"by-id/{its.number}", lambda: os.readlink(f"by-id/{its.number}"))

    def remove_as_a_file_manager(self) -> None:
        """rm -r: entry by entry, going on after a refusal, the directories that were not emptied left alone."""
        its = self.some()
        if its is None:
            return
        if self.children(its.key):
            self.fail_to_remove(its)
            return
        with self.perhaps_held(its) as held:
            for name in self.listing(its):
                path = f"{its.path}/{name}"
                if not stat.S_ISDIR(self.client.must("lstat", path, partial(os.lstat, path)).st_mode):
                    self.client.must("unlink", path, partial(os.unlink, path))
                else:
                    if name == "labels":
                        for label in list(its.labels):
                            self.unlinked(its, label)
                    self.client.must("rmdir", path, partial(os.rmdir, path))
                its.hidden.add(name)
            removed = self.client.expect(errno.EBUSY if held else 0, "rmdir", its.path, lambda: os.rmdir(its.path))
        if not removed:
            self.client.must("rmdir", its.path, lambda: os.rmdir(its.path))
        self.removed(its.key, its.path)

    def fail_to_remove(self, its: Snapshot) -> None:
        for name in self.listing(its):
            path, refusals = f"{its.path}/{name}", 0
            if name in list(Kind):
                for child in self.children(its.key):
                    if child.kind == name:
                        self.refused_part(its, "unlink", child.inside(its.key), os.unlink)
                        refusals += 1
            elif name == "labels":
                for label in its.labels:
                    self.refused_part(its, "unlink", self.label_path(its, label), os.unlink)
                    refusals += 1
            elif name != "labels":
                self.refused_part(its, "unlink", path, os.unlink)
                refusals += 1
            if not refusals:
                self.refused_part(its, "rmdir", path, os.rmdir)
        self.check_snapshot(its)

    def refused_part(self, its: Snapshot, operation: str, path: str, work: Callable[[str], None]) -> None:
        began = time.monotonic()
        self.client.must_not(errno.ENOTEMPTY, operation, path, lambda: work(path))
        its.refused = began, time.monotonic()

    def hide(self) -> None:
        """Unlink one of the fixed entries."""
        its = self.some()
        if its is None or self.pick.random() < 0.5:
            return
        names = [name for name in self.listing(its) if name not in ("labels", "rootfs", *Kind)]
        if not names:
            return
        path = f"{its.path}/{self.pick.choice(names)}"
        if self.children(its.key):
            self.refused_part(its, "unlink", path, os.unlink)
        else:
            self.client.must("unlink", path, lambda: os.unlink(path))
            its.hidden.add(os.path.basename(path))

    def forbidden(self) -> None:
        """What has no meaning."""
        its, new = self.some() or self.base, self.pick.choice(self.keys)
        other = self.snapshots.get(new)
        where, inside = its.path, f"{its.path}/{self.prefix}"
        taken = other is not None and other.kind is Kind.COMMITTED
        committed, odd = f"committed/{file_name(new)}", f"active/{self.prefix}"

        def create() -> None:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))

        def write() -> None:
            os.close(os.open(f"{where}/info.json", os.O_WRONLY))

        forbid = self.client.must_not
        match self.pick.randrange(13):
            case 0:
                forbid(errno.EEXIST if taken else errno.EPERM, "mkdir", committed, lambda: os.mkdir(committed))
            case 1:
                forbid(errno.EINVAL, "mkdir", f"{odd}%41", lambda: os.mkdir(f"{odd}%41"))
            case 2:
                forbid(errno.EILSEQ, "mkdir", f"{odd}\\xff", lambda: os.mkdir(f"{odd}\udcff"))
            case 3:
                forbid(errno.ENAMETOOLONG, "mkdir", odd + "n" * 255, lambda: os.mkdir(odd + "n" * 255))
            case 4 if its.kind is Kind.VIEW and not taken:
                forbid(errno.EPERM, "rename", f"{where} {committed}", lambda: os.rename(where, committed))
            case 4 if its.kind is Kind.ACTIVE:
                target = f"view/{self.prefix}.none"
                forbid(errno.EPERM, "rename", f"{where} {target}", lambda: os.rename(where, target))
            case 5 if its.kind is Kind.ACTIVE:
                target = f"{self.base.path}/{self.prefix}"
                forbid(errno.EEXIST, "rename", f"{where} {target}", lambda: os.rename(where, target), logged=True)
            case 6 if "info.json" not in its.hidden:
                info = f"{where}/info.json"
                forbid(errno.EPERM, "rename", f"{info} {inside}", lambda: os.rename(info, inside))
            case 7:
                forbid(errno.EPERM, "create", inside, create)
            case 8 if "info.json" not in its.hidden:
                forbid(errno.EPERM, "open", f"{where}/info.json", write)
            case 9:
                forbid(errno.EPERM, "setattr", where, lambda: os.chmod(where, 0o700))
            case 10:
                forbid(errno.EPERM, "setattr", where, lambda: os.utime(where, (1, 1)))
            case 11:
                forbid(errno.EPERM, "symlink", inside, lambda: os.symlink("anywhere", inside))
            case 12 if its.parent is not None:
                link = its.inside(its.parent)
                forbid(errno.ENOTDIR, "rmdir", link, lambda: os.rmdir(link))

    # -- labels

    def label_path(self, its: Snapshot, label: str) -> str:
        return f"{its.path}/labels/{file_name(label)}"

    def some_labelled(self) -> tuple[Snapshot, str, str] | None:
        """One of its snapshots, mostly one of its labels, and the path of that."""
        its = self.some(without="labels")
        if its is None:
            return None
        there = bool(its.labels) and self.pick.random() < 0.7
        label = self.pick.choice(list(its.labels) if there else LABELS)
        return its, label, self.label_path(its, label)

    def write_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            value = self.pick.choice(["1", "blue", "zwei\nZeilen", "ü" * self.pick.randrange(1, 300)])
            self.write(*found, os.O_TRUNC, f"{value}\n".encode())

    def append_to_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            self.write(*found, os.O_APPEND, f"{self.pick.randrange(1000)}\n".encode())

    def empty_label(self) -> None:
        """An empty line, or nothing at all, which is how a shell empties it: both delete the label."""
        found = self.some_labelled()
        if found is not None:
            self.write(*found, os.O_TRUNC, self.pick.choice([b"", b"\n"]))

    def refused_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            content, number = self.pick.choice([(b"x" * 4100, errno.E2BIG), (b"\xff\n", errno.EILSEQ)])
            self.write(*found, os.O_TRUNC, content, number)

    def write(self, its: Snapshot, label: str, path: str, flags: int, content: bytes, refused: int = 0) -> None:
        """Open, write and close it."""
        before = its.labels.get(label)
        if flags == os.O_APPEND and before is not None:
            value = f"{before}\n{content.decode()}"
            refused = errno.E2BIG if len(label) + len(value.removesuffix("\n").encode()) > 4096 else 0
        else:
            value = content.decode(errors="replace")
        value = value.removesuffix("\n")
        fd = self.client.must("open", path, lambda: os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644))
        try:
            if content and self.client.expect(refused, "write", path, lambda: os.write(fd, content)):
                self.tell("update", its.key)
        finally:
            self.client.must("close", path, lambda: os.close(fd))
        if not content and before is not None:
            self.tell("update", its.key)
        if refused:
            return
        its.labels.pop(label, None)
        if value:
            its.labels[label] = value
        self.check_label(its, label)

    def check_label(self, its: Snapshot, label: str) -> None:
        path, value = self.label_path(its, label), its.labels.get(label)
        if value is None:
            self.gone(path)
        else:
            found = self.client.read(path)
            self.client.check(found == f"{value}\n".encode(), path, f"{path} holds {found!r}, not {value!r}")

    def rename_label(self) -> None:
        found = self.some_labelled()
        if found is None:
            return
        its, label, path = found
        new = self.pick.choice(LABELS)
        if new == label:
            return
        target = self.label_path(its, new)
        expected = 0 if label in its.labels else errno.ENOENT
        if self.client.expect(expected, "rename", f"{path} {target}", lambda: os.rename(path, target)):
            its.labels[new] = its.labels.pop(label)
            self.tell("update", its.key)
            self.gone(path)
            self.check_label(its, new)

    def unlink_label(self) -> None:
        found = self.some_labelled()
        if found is None:
            return
        its, label, path = found
        if label not in its.labels:
            self.client.must_not(errno.ENOENT, "unlink", path, lambda: os.unlink(path))
        elif self.children(its.key) and time.monotonic() - its.refused[1] < TEARDOWN + 1:
            # who is refused to delete a part of a snapshot with children and goes on with labels is deleting it whole
            began = time.monotonic()
            try:
                self.client.call("unlink", path, lambda: os.unlink(path))
            except OSError as error:
                fits = error.errno == errno.ENOTEMPTY and began - its.refused[1] < TEARDOWN
                self.client.check(fits, path, f"unlink {path}: {error}")
                self.client.report.refusals[f"ENOTEMPTY unlink {path}"] += 1
                its.refused = began, time.monotonic()
            else:
                fits = time.monotonic() - its.refused[0] > TEARDOWN
                self.client.check(fits, path, f"unlink {path} worked, right after a refusal")
                del its.labels[label]
                self.tell("update", its.key)
        else:
            self.unlinked(its, label)

    def unlinked(self, its: Snapshot, label: str) -> None:
        path = self.label_path(its, label)
        self.client.must("unlink", path, lambda: os.unlink(path))
        del its.labels[label]
        self.tell("update", its.key)
        self.gone(path)

    # -- files

    def write_file(self) -> None:
        its = self.some(Kind.ACTIVE)
        if its is None:
            return
        name, content = self.pick.choice(FILES), self.pick.randbytes(self.pick.randrange(3000))
        path, flags = f"{its.path}/diff/{name}", os.O_CREAT | os.O_TRUNC
        # what is written beneath an overlay that somebody looked into need not be seen through it
        if "diff" not in its.hidden and (its.parent is None or not its.followed) and self.pick.random() < 0.5:
            self.client.put(None, path, path, content, flags)
        elif "rootfs" not in its.hidden:
            with suppress(Excused), self.followed(its) as directory:
                self.client.put(directory, name, f"{its.path}/rootfs/{name}", content, flags)
                its.layer[name] = content
            return
        else:
            return
        its.layer[name] = content

    def delete_file(self) -> None:
        its = self.some(Kind.ACTIVE, without="rootfs")
        files = sorted(self.merged(its)) if its is not None else []
        if its is None or not files:
            return
        name = self.pick.choice(files)
        below = self.merged(above) if (above := self.find(its.parent)) else {}
        with suppress(Excused), self.followed(its) as directory:
            self.client.must("layer unlink", f"{its.path}/rootfs/{name}", lambda: os.unlink(name, dir_fd=directory))
            its.layer.pop(name, None)
            if name in below:
                its.layer[name] = None

    def read_files(self) -> None:
        its = self.some(without="rootfs") or self.base
        with suppress(Excused), self.followed(its) as directory:
            where = f"{its.path}/rootfs"
            expected = self.merged(its)
            found = sorted(self.client.must("layer list", where, lambda: os.listdir(directory)))
            self.client.check(found == sorted(expected), its.key, f"{where} has {found}, not {sorted(expected)}")
            for name in found:
                content = self.client.get(directory, name, f"{where}/{name}")
                self.client.check(content == expected[name], its.key, f"{where}/{name} holds something else")

    def write_what_is_read_only(self) -> None:
        its = self.some(Kind.VIEW, Kind.COMMITTED, without="rootfs") or self.base

        with suppress(Excused), self.followed(its) as directory:
            path = f"{its.path}/rootfs/f0"
            opened = lambda: os.open("f0", os.O_CREAT | os.O_WRONLY, dir_fd=directory)  # noqa: E731
            self.client.must_not(errno.EROFS, "layer open", path, opened)

    # -- looking

    def gone(self, path: str) -> None:
        self.client.must_not(errno.ENOENT, "stat", path, lambda: os.lstat(path))

    def info(self, its: Snapshot) -> dict[str, Any]:
        path = f"{its.path}/info.json"
        found: dict[str, Any] = json.loads(self.client.read(path))
        return found

    def listing(self, its: Snapshot) -> list[str]:
        """Its entries, which must be those that it has."""
        expected = ENTRIES[its.kind] | ({"parent"} if its.parent is not None else set())
        found = self.client.must("list", its.path, lambda: os.listdir(its.path))
        wrong = sorted(set(found) ^ (expected - its.hidden))
        self.client.check(not wrong and len(set(found)) == len(found), its.key, f"{its.path} has {found}: what of {wrong}?")
        return found

    def check_one(self) -> None:
        its = self.some()
        if its is not None:
            self.check_snapshot(its)

    def check_snapshot(self, its: Snapshot) -> None:
        """All that its directory shows."""
        names = self.listing(its)
        self.client.must("stat", its.path, lambda: os.stat(its.path))
        for name in names:
            self.check_entry(its, name)
        link = f"by-id/{its.number}"
        self.check_link(its, link, f"../{its.path}")
        if its.parent is not None:
            self.check_link(its, its.inside(its.parent), f"../../../{its.path}")

    def check_link(self, its: Snapshot, path: str, expected: str) -> None:
        found = self.client.must("readlink", path, lambda: os.readlink(path))
        self.client.check(found == expected, its.key, f"{path} leads to {found}, not {expected}")

    def check_entry(self, its: Snapshot, name: str) -> None:
        path, root, number = f"{its.path}/{name}", self.client.root, its.number
        snapshots = f"{root}/snapshots"
        check = self.client.check
        match name:
            case "info.json":
                found = self.info(its)
                told = found["name"], found["kind"], found["id"], found["parent"], found["labels"]
                known = its.key, its.kind, number, its.parent, its.labels
                check(told == known, its.key, f"{path} says {told}, not {known}")
                check(found["mounted"] in ([], [f"{root}/rootfs/{number}"]), its.key, f"mounted at {found['mounted']}")
            case "mounts.json":
                layers = [f"{snapshots}/{above.number}/fs" for above in self.chain(its)]
                spec = json.loads(self.client.read(path))
                options = dict(option.split("=", 1) for option in spec[0]["options"] if "=" in option)
                if spec[0]["type"] == "overlay":
                    check(options["lowerdir"] == ":".join(layers), its.key, f"{path}: {spec}")
                    upper = f"{snapshots}/{number}/fs" if its.kind is Kind.ACTIVE else None
                    check(options.get("upperdir") == upper, its.key, f"{path}: {spec}")
                else:
                    source = (layers or [f"{snapshots}/{number}/fs"])[0]
                    check(spec[0]["source"] == source and len(layers) < 2, its.key, f"{path}: {spec}")
            case "mount.sh":
                check(self.client.read(path).startswith(b"#!"), its.key, f"{path} is no script")
            case "usage.json":
                self.check_usage(its, path)
            case "changes":
                above = self.find(its.parent)
                below = self.merged(above) if above is not None else {}
                letters = {file: "D" if c is None else "C" if file in below else "A" for file, c in its.layer.items()}
                lines = "".join(f"{letters[file]} /{file}\n" for file in sorted(letters))
                changes = self.client.read(path).decode()
                check(changes == lines, its.key, f"{path} says {changes!r}, not {lines!r}")
            case "labels":
                labels = self.client.must("list", path, lambda: os.listdir(path))
                check(sorted(labels) == sorted(map(file_name, its.labels)), its.key, f"{path} has {labels}: {its.labels}")
                for label in its.labels:
                    self.check_label(its, label)
            case "parent":
                self.check_link(its, path, f"../../committed/{file_name(its.parent or '')}")
            case "diff":
                self.check_link(its, path, f"{snapshots}/{number}/fs")
                self.check_layer(its)
            case "rootfs":
                self.check_link(its, path, f"{root}/rootfs/{number}")
            case _:
                children = {file_name(child.key) for child in self.children(its.key) if child.kind == name}
                shown = self.client.must("list", path, lambda: os.listdir(path))
                check(sorted(shown) == sorted(children), its.key, f"{path} has {shown}, not {children}")

    def check_usage(self, its: Snapshot, path: str) -> None:
        usage = json.loads(self.client.read(path))
        files = sum(content is not None for content in its.layer.values())
        most = len(its.layer)  # whiteouts may be names of one inode
        least = files + (most > files)
        if its.kind is Kind.VIEW:
            self.client.check(usage == {"inodes": 0, "size": 0}, its.key, f"{path} says {usage}")
            return
        fits = least < usage["inodes"] <= most + 1 and usage["size"] % 512 == 0
        self.client.check(fits, its.key, f"{path} says {usage} of {least} to {most} files")
        size = self.client.must("stat", its.path, lambda: os.stat(its.path)).st_blocks * 512
        self.client.check(size == usage["size"], its.key, f"{its.path} takes {size}, {path} says {usage}")

    def check_layer(self, its: Snapshot) -> None:
        """The files of its own layer, byte for byte."""
        where = f"{self.client.root}/snapshots/{its.number}/fs"
        found = self.client.must("layer list", where, lambda: os.listdir(where))
        self.client.check(sorted(found) == sorted(its.layer), its.key, f"{where} has {found}, not {sorted(its.layer)}")
        for name, content in its.layer.items():
            path = f"{where}/{name}"
            if content is None:
                its_mode = os.lstat(path).st_mode
                self.client.check(stat.S_ISCHR(its_mode), its.key, f"{path} is no whiteout")
            else:
                self.client.check(self.client.get(None, path, path) == content, its.key, f"{path} holds something else")
        if its.kind is Kind.COMMITTED:
            sums = {name: zlib.crc32(content) for name, content in its.layer.items() if content is not None}
            self.client.report.manifests[its.number] = sums

    def check_what_is_gone(self) -> None:
        self.check_kinds(self.pick.sample(self.keys, 2))

    def check_kinds(self, keys: list[str]) -> None:
        """Each of these keys stands in one of the three directories, or in none."""
        for key in keys:
            for kind in Kind:
                its = self.snapshots.get(key)
                path = f"{kind}/{file_name(key)}"
                if its is None or its.kind is not kind:
                    self.gone(path)
                else:
                    self.client.must("stat", path, partial(os.stat, path))

    def list_all(self) -> None:
        """Each of the three directories shows its snapshots once, whatever others do meanwhile."""
        mine = {file_name(key) for key in self.keys}
        for kind in Kind:
            found = self.client.list_long(kind)
            own = sorted(name for name in found if name in mine)
            expected = sorted(file_name(its.key) for its in self.snapshots.values() if its.kind is kind)
            self.client.check(own == expected, self.prefix, f"{kind}/ shows {own}, not {expected}")

    def check_all(self) -> None:
        self.list_all()
        self.check_kinds(self.keys)
        for its in self.snapshots.values():
            self.check_snapshot(its)

    def flush(self) -> None:
        its = self.some() or self.base
        path = self.pick.choice([its.path, "committed", "."])
        fd = self.client.must("open", path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        try:
            self.client.must("fsync", path, lambda: os.fsync(fd))
        finally:
            self.client.must("close", path, lambda: os.close(fd))

    def follow_events(self) -> None:
        """What is done is told at once: to who reads, and to who waits."""
        found = self.some_labelled()
        if found is None:
            return
        its, path = found[0], ".snapfs/events"
        fd = self.client.must("open", path, lambda: os.open(path, os.O_RDONLY))
        try:
            end = os.fstat(fd).st_size
            self.client.must("read", path, lambda: os.pread(fd, 1 << 16, end))
            self.write(*found, os.O_TRUNC, b"followed\n")
            self.client.must("poll", path, lambda: _wait_for(fd, path))
            told = b""
            while part := self.client.must("read", path, partial(os.pread, fd, 1 << 16, end + len(told))):
                told += part
                if len(told) > 1 << 20:
                    break
        finally:
            self.client.must("close", path, lambda: os.close(fd))
        lines = [json.loads(line) for line in told[: told.rfind(b"\n") + 1].splitlines()]
        own = [line for line in lines if line["id"] == its.number]
        right = [line for line in own if line["operation"] == "update" and line["labels"] == its.labels]
        self.client.check(bool(right), its.key, f"{path} does not tell of the update of {its.key}: {own}")


def _wait_for(fd: int, path: str) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(5000):
        raise Violation(path, f"poll of {path} does not see what was told")
