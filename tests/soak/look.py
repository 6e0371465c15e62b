"""Looking at one client's own snapshots: whether all that the tree shows of them is what its model says."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import tarfile
import time
import zlib
from functools import partial
from typing import Any

from snapfs.model import Kind
from snapfs.tree.hiding import HIDDEN
from tests.soak.client import file_name
from tests.soak.model import ENTRIES, Model, Snapshot


class Look:
    """What only looks, and ends the run where something else is there than in ``model``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.client = model.client

    def gone(self, path: str) -> None:
        self.client.must_not(errno.ENOENT, "stat", path, lambda: os.lstat(path))

    def info(self, its: Snapshot) -> dict[str, Any]:
        path = f"{its.path}/info.json"
        found: dict[str, Any] = json.loads(self.client.read(path))
        return found

    def listing(self, its: Snapshot) -> list[str]:
        """Its entries, which must be those that it has."""
        expected = ENTRIES[its.kind] | ({"parent"} if its.parent is not None else set())
        began = time.monotonic()
        found = self.client.must("list", its.path, lambda: os.listdir(its.path))
        if began > its.unlinked[1] + HIDDEN:
            its.hidden.clear()
        elif time.monotonic() > its.unlinked[0] + HIDDEN:  # they are just coming back
            its.hidden -= set(found)
        wrong = sorted(set(found) ^ (expected - its.hidden))
        self.client.check(not wrong and len(set(found)) == len(found), its.key, f"{its.path} has {found}: what of {wrong}?")
        return found

    def check_one(self) -> None:
        its = self.model.some()
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
                check(found["mounted"] in ([], [f"{root}/rootfs/{number}/fs"]), its.key, f"mounted at {found['mounted']}")
            case "mounts.json":
                layers = [f"{snapshots}/{above.number}/fs" for above in self.model.chain(its)]
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
                above = self.model.find(its.parent)
                below = self.model.merged(above) if above is not None else {}
                letters = {file: "D" if c is None else "C" if file in below else "A" for file, c in its.layer.items()}
                lines = "".join(f"{letters[file]} /{file}\n" for file in sorted(letters))
                changes = self.client.read(path).decode()
                check(changes == lines, its.key, f"{path} says {changes!r}, not {lines!r}")
            case "changes.patch":
                above = self.model.find(its.parent)
                below = self.model.merged(above) if above is not None else {}
                heads = {
                    name.decode() for name in re.findall(rb"^diff --git a/(.*) b/\1$", self.client.read(path), re.MULTILINE)
                }
                sure = {file for file, content in its.layer.items() if content is None or file not in below}
                check(sure <= heads <= set(its.layer), its.key, f"{path} tells of {heads}, not {sure} and some of {its.layer}")
            case "layer.tar":
                with tarfile.open(fileobj=io.BytesIO(self.client.read(path))) as tar:
                    listed = {each.name: each.size for each in tar.getmembers()}
                files = {f".wh.{file}" if c is None else file: len(c or b"") for file, c in its.layer.items()}
                check(listed == files, its.key, f"{path} tells of {listed}, not {files}")
            case "checkpoint":
                check(self.client.read(path) == b"", its.key, f"{path} has lines, and nobody keeps anything")
            case "history":
                links = self.client.must("list", path, lambda: os.listdir(path))
                check(links == [], its.key, f"{path} has {links}, and nobody keeps anything")
            case "compare":
                self.check_comparison(its, path)
            case "rollback" | "fork" | "squash" | "dissolve":
                check(self.client.read(path).startswith(b"Write "), its.key, f"{path} does not say what to write")
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
                self.check_link(its, path, f"{root}/rootfs/{number}/fs")
            case _:
                children = {file_name(child.key) for child in self.model.children(its.key) if child.kind == name}
                shown = self.client.must("list", path, lambda: os.listdir(path))
                check(sorted(shown) == sorted(children), its.key, f"{path} has {shown}, not {children}")

    def check_comparison(self, its: Snapshot, path: str) -> None:
        """With any other, of whatever kind."""
        other = self.model.some() or self.model.base
        before, after = self.model.merged(other), self.model.merged(its)
        letters = {file: "D" if file not in after else "A" if file not in before else "C" for file in {**before, **after}}
        changed = [file for file in sorted(letters) if before.get(file) != after.get(file)]
        lines = "".join(f"{letters[file]} /{file}\n" for file in changed)
        with self.client.opened(path, os.O_RDWR) as fd:
            request = f"changes content {other.path}\n".encode()
            self.client.must("write", path, lambda: os.write(fd, request))
            said = self.client.read_on(fd, path, len(request)).decode()
        self.client.check(said == lines, its.key, f"{path} with {other.path} says {said!r}, not {lines!r}")

    def check_usage(self, its: Snapshot, path: str) -> None:
        usage = json.loads(self.client.read(path))
        files = sum(content is not None for content in its.layer.values())
        most = len(its.layer)  # whiteouts may be names of one inode
        least = files + (most > files)
        if its.kind is Kind.VIEW:
            self.client.check(usage == {"inodes": 0, "size": 0, "shared": 0}, its.key, f"{path} says {usage}")
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

    def check_label(self, its: Snapshot, label: str) -> None:
        path, value = its.label(label), its.labels.get(label)
        if value is None:
            self.gone(path)
        else:
            found = self.client.read(path)
            self.client.check(found == f"{value}\n".encode(), path, f"{path} holds {found!r}, not {value!r}")

    def check_what_is_gone(self) -> None:
        self.check_kinds(self.model.pick.sample(self.model.keys, 2))

    def check_kinds(self, keys: list[str]) -> None:
        """Each of these keys stands in one of the three directories, or in none."""
        for key in keys:
            for kind in Kind:
                its = self.model.snapshots.get(key)
                path = f"{kind}/{file_name(key)}"
                if its is None or its.kind is not kind:
                    self.gone(path)
                else:
                    self.client.must("stat", path, partial(os.stat, path))

    def list_all(self) -> None:
        """Each of the three directories shows its snapshots once, whatever others do meanwhile."""
        mine = {file_name(key) for key in self.model.keys}
        for kind in Kind:
            found = self.client.list_long(kind)
            own = sorted(name for name in found if name in mine)
            expected = sorted(file_name(its.key) for its in self.model.snapshots.values() if its.kind is kind)
            self.client.check(own == expected, self.model.prefix, f"{kind}/ shows {own}, not {expected}")

    def check_all(self) -> None:
        self.list_all()
        self.check_kinds(self.model.keys)
        for its in self.model.snapshots.values():
            self.check_snapshot(its)
