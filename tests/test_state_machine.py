"""Library and mounted tree over one store, driven in any order against a small model of the rules.

The tree is mounted by this very process: the trio loop serves it in the main thread while Hypothesis plays client in another,
now through the library, now with system calls.  After each step both doors must show what the model says, at once.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from snapfs import (
    AlreadyExists,
    Busy,
    FailedPrecondition,
    InvalidArgument,
    Kind,
    NotFound,
    SnapshotError,
    Snapshotter,
    names,
    open_snapshotter,
)
from snapfs.fuse.serve import MountOptions, serve_tree
from snapfs.tree import Tree, replacing
from tests.syscalls import EVERY

ALL_KEYS = ["a", "b", "c/d", "e%", "f g", "."]
KEYS = st.sampled_from(ALL_KEYS)
LABELS = st.sampled_from(["x", "y.z/w"])
VALUES = st.sampled_from(["1", "two\nlines", ""])
DOORS = st.sampled_from(["library", "tree"])

NOT_FOUND = (NotFound, {errno.ENOENT})
EXISTS = (AlreadyExists, {errno.EEXIST, errno.ENOTDIR})  # the latter: rename(2) of a directory onto a child's link
HAS_CHILDREN = (FailedPrecondition, {errno.ENOTEMPTY})
NOT_ACTIVE = (FailedPrecondition, {errno.ENOENT})  # in the tree there is nothing at active/KEY
BAD_PARENT = (InvalidArgument, {errno.ENOENT})  # in the tree there is nothing at committed/PARENT
BAD_REBASE = (FailedPrecondition, {errno.ENOENT})
NOT_COMMITTED = (FailedPrecondition, {errno.ENOENT})  # in the tree there is nothing at committed/NAME
NAMED = (Busy, {errno.EBUSY})
STANDS_ON_IT = (FailedPrecondition, {errno.EPERM})
NOT_A_WORKSPACE = (FailedPrecondition, {errno.ENOENT})
ONE_LINE = (InvalidArgument, {errno.EINVAL, errno.ENOENT})
OTHER_PARENT = (InvalidArgument, {errno.EPERM})

Refusal = tuple[type[SnapshotError], set[int]]


@dataclass
class Snapshot:
    kind: Kind
    parent: str | None
    labels: dict[str, str] = field(default_factory=dict)


class Model(dict[str, Snapshot]):
    """The rules: each method says why the call is refused, or changes the model and gives None.  ``images`` are names in
    images/, each with the snapshot that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, str] = {}

    def prepare(self, kind: Kind, key: str, parent: str | None) -> Refusal | None:
        if parent is not None and parent not in self:
            return NOT_FOUND
        if parent is not None and self[parent].kind is not Kind.COMMITTED:
            return BAD_PARENT
        if key in self:
            return EXISTS
        self[key] = Snapshot(kind, parent)
        return None

    def commit(self, name: str, key: str, parent: str | None, keep: bool) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        snapshot = self[key]
        if snapshot.kind is not Kind.ACTIVE:
            return NOT_ACTIVE
        if parent == name and parent is not None:
            taken = name in self and self[name].kind is Kind.COMMITTED
            return InvalidArgument, {errno.EEXIST, errno.ENOTDIR} if taken else {errno.ENOENT}
        if name in self and name != key:
            committed = parent is None or (parent in self and self[parent].kind is Kind.COMMITTED)
            return EXISTS if committed else (AlreadyExists, {errno.ENOENT})
        if parent is not None and parent not in self:
            return (InvalidArgument if snapshot.parent else NotFound), {errno.ENOENT}
        if parent is not None and self[parent].kind is not Kind.COMMITTED:
            return (InvalidArgument if snapshot.parent else FailedPrecondition), {errno.ENOENT}
        if parent is not None and snapshot.parent not in (None, parent):
            return OTHER_PARENT
        del self[key]
        self[name] = Snapshot(Kind.COMMITTED, parent or snapshot.parent, snapshot.labels if keep else {})
        return None

    def rename(self, old: str, new: str) -> Refusal | None:
        if old not in self:
            return NOT_FOUND
        if new in self and new != old:
            return EXISTS
        self[new] = self.pop(old)
        for snapshot in self.values():
            if snapshot.parent == old:
                snapshot.parent = new
        self.images = {image: new if key == old else key for image, key in self.images.items()}
        return None

    def name(self, key: str, image: str) -> Refusal | None:
        if key not in self:
            return NOT_FOUND if image not in self.images else (SnapshotError, {errno.ENOENT, errno.EEXIST})
        if self[key].kind is not Kind.COMMITTED:
            return NOT_COMMITTED if image not in self.images else (SnapshotError, {errno.ENOENT, errno.EEXIST})
        if image in self.images:
            return EXISTS
        self.images[image] = key
        return None

    def unname(self, image: str) -> Refusal | None:
        return None if self.images.pop(image, None) else NOT_FOUND

    def rename_image(self, old: str, new: str) -> Refusal | None:
        if old not in self.images:
            return NOT_FOUND
        if new in self.images and new != old:
            return EXISTS
        self.images[new] = self.images.pop(old)
        return None

    def remove(self, key: str) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        if self.children(key):
            return HAS_CHILDREN
        if key in self.images.values():
            return NAMED
        del self[key]
        return None

    def checkpoint(self, key: str, message: str, *, copy: bool = False) -> Refusal | None:
        if "\n" in message:
            return ONE_LINE
        if key not in self:
            return NOT_FOUND
        before = self[key]
        if before.kind is not Kind.ACTIVE:
            return NOT_A_WORKSPACE
        number = max([0, *self.checkpoints(key)]) + 1
        while (name := f"{key}@{number}") in self:
            number += 1
        ours = {"snapfs.workspace": key, "snapfs.checkpoint": str(number), **({"snapfs.message": message} if message else {})}
        self[name] = Snapshot(Kind.COMMITTED, before.parent, {**before.labels, **ours})
        if not copy:
            self[key] = Snapshot(Kind.ACTIVE, name, dict(before.labels))
        return None

    def checkpoints(self, key: str) -> dict[int, str]:
        return {
            int(its.labels["snapfs.checkpoint"]): name
            for name, its in self.items()
            if its.kind is Kind.COMMITTED and its.labels.get("snapfs.workspace") == key and "snapfs.checkpoint" in its.labels
        }

    def rollback(self, key: str, to: int | str | None) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        if self[key].kind is not Kind.ACTIVE:
            return NOT_A_WORKSPACE
        known = self.checkpoints(key)
        if to is None:
            parent = self[key].parent
        elif to == 0 and 0 not in known:
            parent = self[known[min(known)]].parent if known else self[key].parent
        elif isinstance(to, int):
            if to not in known:
                return NOT_FOUND
            parent = known[to]
        elif to in known.values() or to in self.stands_on(key):
            parent = to
        else:
            return NOT_FOUND
        self[key] = Snapshot(Kind.ACTIVE, parent, self[key].labels)
        return None

    def fork(self, key: str, new: str) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        if new in self:
            return EXISTS if self[key].kind is not Kind.VIEW else (SnapshotError, {errno.EEXIST, errno.ENOENT})
        if self[key].kind is Kind.VIEW:
            return NOT_A_WORKSPACE
        base: str | None = key
        if self[key].kind is Kind.ACTIVE:
            self.checkpoint(key, f"forked as {new}")
            base = self[key].parent
        self[new] = Snapshot(Kind.ACTIVE, base)
        return None

    def chain(self, key: str) -> list[str]:
        found = []
        while (above := self[key].parent) is not None:
            found.append(key := above)
        return found

    def stands_on(self, key: str) -> set[str]:
        """Also what those that were squashed stand on."""
        found = set[str]()
        waiting = self.chain(key)
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                of = self[name].labels.get("snapfs.squash", "")
                if of in self and self[of].kind is Kind.COMMITTED:
                    waiting += [of, *self.chain(of)]
        return found

    def squash(self, key: str, new: str | None) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        if self[key].kind is not Kind.COMMITTED:
            return NOT_COMMITTED
        if new is not None and new in self:
            return EXISTS
        number = 1
        while new is None or new in self:
            new = f"{key}-squashed" + f"-{number}" * (number > 1)
            number += 1
        gone = ("snapfs.workspace", "snapfs.checkpoint", "snapfs.message")
        kept = {label: value for label, value in self[key].labels.items() if label not in gone}
        self[new] = Snapshot(Kind.COMMITTED, None, {**kept, "snapfs.squash": key})
        return None

    def dissolve(self, key: str) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        if self[key].kind is not Kind.COMMITTED:
            return NOT_COMMITTED
        if key in self.images.values():
            return NAMED
        if self.children(key) != self.children(key, Kind.COMMITTED):
            return STANDS_ON_IT
        for child in self.children(key):
            self[child].parent = self[key].parent
        del self[key]
        return None

    def label(self, key: str, label: str, value: str) -> Refusal | None:
        if key not in self:
            return NOT_FOUND
        self[key].labels.pop(label, None)
        if value:
            self[key].labels[label] = value
        return None

    def children(self, parent: str, kind: Kind | None = None) -> set[str]:
        return {key for key, its in self.items() if its.parent == parent and kind in (None, its.kind)}


@pytest.mark.mounts
async def test_library_and_tree_against_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "LATELY", -1.0)  # no name replaces another
    (mnt := tmp_path / "mnt").mkdir()
    ready, stop = trio.Event(), trio.Event()
    async with open_snapshotter(tmp_path / "root") as snapshotter, trio.open_nursery() as nursery:
        nursery.start_soon(serve_tree, Tree(snapshotter), str(mnt), MountOptions(), ready.set, stop)
        await ready.wait()
        try:
            await trio.to_thread.run_sync(partial(drive, snapshotter, mnt))
        finally:
            stop.set()


def command(path: Path, text: str) -> None:
    """What a shell does by ``echo text > path``, where there is such a file."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)


def drive(snapshotter: Snapshotter, mnt: Path) -> None:
    """Run the machine, in a thread that is not the loop's."""

    def path(kind: Kind, key: str, parent: str | None = None) -> Path:
        above = mnt / "committed" / names.encode(parent) if parent is not None else mnt
        return above / kind / names.encode(key)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def do(
            self,
            door: str,
            expected: Refusal | None,
            library: Callable[[], Awaitable[Any]],
            tree: Callable[[], object],
        ) -> None:
            """The same operation through ``door``, with the outcome that the model expects."""
            try:
                if door == "library":
                    trio.from_thread.run(library)
                else:
                    tree()
            except SnapshotError as error:
                assert expected is not None, error
                assert isinstance(error, expected[0]), error
            except OSError as error:
                assert expected is not None, error
                assert error.errno in expected[1], error
            else:
                assert expected is None, f"should have been refused: {expected}"

        def pick(self, data: st.DataObject, *kinds: Kind) -> str:
            """A key, where possible mostly of one of ``kinds``."""
            fitting = sorted(key for key, its in self.model.items() if its.kind in kinds)
            mostly_fitting = bool(fitting) and data.draw(st.integers(0, 5)) > 0
            return data.draw(st.sampled_from(fitting) if mostly_fitting else KEYS)

        def pick_parent(self, data: st.DataObject) -> str | None:
            return self.pick(data, Kind.COMMITTED) if data.draw(st.booleans()) else None

        @initialize(door=DOORS)
        def begin_with_a_family(self, door: str) -> None:
            """A base with two children: most rules need something to work on."""
            for kind, key, parent in ((Kind.ACTIVE, "a", None), (Kind.ACTIVE, "b", "a"), (Kind.VIEW, "c/d", "a")):
                make = snapshotter.prepare if kind is Kind.ACTIVE else snapshotter.view
                expected = self.model.prepare(kind, key, parent)
                self.do(door, expected, partial(make, key, parent), path(kind, key, parent).mkdir)
                if key == "a":
                    expected = self.model.commit(key, key, None, keep=True)
                    move = partial(os.rename, path(kind, key), path(Kind.COMMITTED, key))
                    self.do(door, expected, partial(snapshotter.commit, key, key), move)

        @rule(kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]), key=KEYS, door=DOORS, data=st.data())
        def prepare(self, kind: Kind, key: str, door: str, data: st.DataObject) -> None:
            parent = self.pick_parent(data)
            make = snapshotter.prepare if kind is Kind.ACTIVE else snapshotter.view
            expected = self.model.prepare(kind, key, parent)
            self.do(door, expected, partial(make, key, parent), path(kind, key, parent).mkdir)

        @precondition(lambda self: bool(self.model))
        @rule(name=KEYS, door=DOORS, data=st.data())
        def commit(self, name: str, door: str, data: st.DataObject) -> None:
            key, parent = self.pick(data, Kind.ACTIVE), self.pick_parent(data)
            source, target = path(Kind.ACTIVE, key), path(Kind.COMMITTED, name, parent)
            expected = self.model.commit(name, key, parent, keep=door == "tree")
            self.do(door, expected, partial(snapshotter.commit, name, key, parent=parent), partial(os.rename, source, target))

        @precondition(lambda self: bool(self.model))
        @rule(new=KEYS, door=DOORS, data=st.data())
        def rename(self, new: str, door: str, data: st.DataObject) -> None:
            old = self.pick(data, *Kind)
            kind = self.model[old].kind if old in self.model else Kind.VIEW
            expected = self.model.rename(old, new)
            move = partial(os.rename, path(kind, old), path(kind, new))
            self.do(door, expected, partial(snapshotter.rename, old, new), move)

        @precondition(lambda self: bool(self.model))
        @rule(image=KEYS, door=DOORS, data=st.data())
        def name(self, image: str, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.COMMITTED)
            link = partial(os.symlink, f"../committed/{names.encode(key)}", mnt / "images" / names.encode(image))
            self.do(door, self.model.name(key, image), partial(snapshotter.name_image, key, image), link)

        @precondition(lambda self: bool(self.model.images))
        @rule(image=KEYS, door=DOORS)
        def unname(self, image: str, door: str) -> None:
            unlink = (mnt / "images" / names.encode(image)).unlink
            self.do(door, self.model.unname(image), partial(snapshotter.unname_image, image), unlink)

        @precondition(lambda self: bool(self.model.images))
        @rule(old=KEYS, new=KEYS, door=DOORS)
        def rename_image(self, old: str, new: str, door: str) -> None:
            move = partial(os.rename, mnt / "images" / names.encode(old), mnt / "images" / names.encode(new))
            self.do(door, self.model.rename_image(old, new), partial(snapshotter.rename_image, old, new), move)

        @precondition(lambda self: bool(self.model))
        @rule(door=DOORS, data=st.data())
        def remove(self, door: str, data: st.DataObject) -> None:
            key = self.pick(data, *Kind)
            kind = self.model[key].kind if key in self.model else Kind.COMMITTED
            self.do(door, self.model.remove(key), partial(snapshotter.remove, key), path(kind, key).rmdir)

        @precondition(lambda self: bool(self.model))
        @rule(message=VALUES, copy=st.booleans(), door=DOORS, data=st.data())
        def checkpoint(self, message: str, copy: bool, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.ACTIVE)
            message = message.lstrip() if copy else message
            expected = self.model.checkpoint(key, message, copy=copy)
            write = partial(command, path(Kind.ACTIVE, key) / "checkpoint", f"copy: {message}" if copy else message)
            self.do(door, expected, partial(snapshotter.checkpoint, key, message, copy=copy), write)

        @precondition(lambda self: bool(self.model))
        @rule(to=st.integers(0, 3) | st.none() | KEYS, door=DOORS, data=st.data())
        def rollback(self, to: int | str | None, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.ACTIVE)
            if isinstance(to, str) and data.draw(st.booleans()):
                to = f"{key}@{data.draw(st.integers(1, 3))}"
            expected = self.model.rollback(key, to)
            text = "" if to is None else names.encode(to) if isinstance(to, str) else str(to)
            write = partial(command, path(Kind.ACTIVE, key) / "rollback", text)
            self.do(door, expected, partial(snapshotter.rollback, key, to), write)

        @precondition(lambda self: bool(self.model))
        @rule(new=KEYS, door=DOORS, data=st.data())
        def fork(self, new: str, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.ACTIVE)
            if key in self.model and self.model[key].kind is Kind.COMMITTED:
                door = "library"  # in the tree that is mkdir
            expected = self.model.fork(key, new)
            write = partial(command, path(Kind.ACTIVE, key) / "fork", names.encode(new))
            self.do(door, expected, partial(snapshotter.fork, key, new), write)

        @precondition(lambda self: bool(self.model))
        @rule(new=KEYS | st.none(), door=DOORS, data=st.data())
        def squash(self, new: str | None, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.COMMITTED)
            expected = self.model.squash(key, new)
            write = partial(command, path(Kind.COMMITTED, key) / "squash", names.encode(new) if new else "")
            self.do(door, expected, partial(snapshotter.squash, key, new), write)

        @precondition(lambda self: bool(self.model))
        @rule(door=DOORS, data=st.data())
        def dissolve(self, door: str, data: st.DataObject) -> None:
            key = self.pick(data, Kind.COMMITTED)
            write = partial(command, path(Kind.COMMITTED, key) / "dissolve", "")
            self.do(door, self.model.dissolve(key), partial(snapshotter.dissolve, key), write)

        @precondition(lambda self: bool(self.model))
        @rule(label=LABELS, value=VALUES, door=DOORS, data=st.data())
        def label(self, label: str, value: str, door: str, data: st.DataObject) -> None:
            key = self.pick(data, *Kind)
            kind = self.model[key].kind if key in self.model else Kind.COMMITTED
            file = path(kind, key) / "labels" / names.encode(label)
            had = key in self.model and label in self.model[key].labels
            expected = self.model.label(key, label, value)
            library = partial(snapshotter.update, key, {label: value}, [f"labels.{label}"])
            delete = file.unlink if had else partial(file.write_text, "\n")
            self.do(door, expected, library, partial(file.write_text, value) if value else delete)

        @invariant()
        def both_doors_show_the_model(self) -> None:
            infos = trio.from_thread.run(snapshotter.walk)
            assert [info.name for info in infos] == sorted(self.model, key=str.encode)
            images = {image.name: image.info.name for image in trio.from_thread.run(snapshotter.images)}
            assert images == self.model.images
            links = {names.decode(name): os.readlink(mnt / "images" / name) for name in os.listdir(mnt / "images")}
            assert links == {image: f"../committed/{names.encode(key)}" for image, key in images.items()}
            for info in infos:
                its = self.model[info.name]
                assert (info.kind, info.parent, info.labels) == (its.kind, its.parent, its.labels)
            for kind in Kind:
                shown = {names.decode(name) for name in os.listdir(mnt / kind)}
                assert shown == {key for key, its in self.model.items() if its.kind is kind}
            assert sorted(os.listdir(mnt / "by-id"), key=int) == sorted((str(info.id) for info in infos), key=int)
            for info in infos:
                self.check_directory(path(info.kind, info.name), info.name, info.id)

        def check_directory(self, directory: Path, key: str, number: int) -> None:
            its = self.model[key]
            shown = json.loads((directory / "info.json").read_text())
            assert (shown["name"], shown["kind"], shown["id"]) == (key, its.kind, number)
            assert (shown["parent"], shown["labels"]) == (its.parent, its.labels)
            labels = {
                names.decode(name): (directory / "labels" / name).read_text() for name in os.listdir(directory / "labels")
            }
            assert labels == {label: value + "\n" for label, value in its.labels.items()}
            assert (mnt / "by-id" / str(number)).resolve() == directory
            assert (directory / "mounts.json").exists() == (its.kind is not Kind.COMMITTED)
            if its.parent is None:
                assert not (directory / "parent").is_symlink()
            else:
                assert (directory / "parent").resolve() == path(Kind.COMMITTED, its.parent)
                assert path(its.kind, key, its.parent).resolve() == directory
            for kind in Kind if its.kind is Kind.COMMITTED else ():
                children = {names.decode(name) for name in os.listdir(directory / kind)}
                assert children == self.model.children(key, kind)

        def teardown(self) -> None:
            for image in list(self.model.images):
                unlink = (mnt / "images" / names.encode(image)).unlink
                self.do("tree", self.model.unname(image), partial(snapshotter.unname_image, image), unlink)
            while self.model:
                key = next(key for key in self.model if not self.model.children(key))
                self.do("tree", self.model.remove(key), partial(snapshotter.remove, key), self.path_now(key).rmdir)

        def path_now(self, key: str) -> Path:
            return next(path(kind, key) for kind in Kind if path(kind, key).exists())

    checked = settings(
        max_examples=60 // EVERY,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(Machine, settings=checked)
