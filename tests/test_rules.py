"""The rules as plain functions: what each call means, with no task, no daemon and no mount about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from snapfs import Kind, Options
from snapfs.errors import (
    AlreadyExists,
    Busy,
    Damaged,
    FailedPrecondition,
    HasChildren,
    InvalidArgument,
    NotFound,
    Pinned,
    SnapshotError,
    TooDeep,
    WrongParent,
)
from snapfs.kernel.inuse import UpperLayers
from snapfs.mountspec import MOST_LOWERS
from snapfs.root.inuse import Free, InUse
from snapfs.root.layers import Layers
from snapfs.root.mounted import Mounted
from snapfs.root.placing import Placing
from snapfs.root.unflushed import Unflushed
from snapfs.rules import commit, labels, lookup, mounts, prepare, remove, rename
from snapfs.rules.root import Root
from snapfs.store.metastore import MetaStore
from snapfs.store.writing import Writer

T = TypeVar("T")


class Ground(NamedTuple):
    """A root and its records.  ``write`` runs an operation and returns when it is done, in this thread."""

    root: Root
    records: MetaStore

    def write(self, operation: Callable[[Root, Writer], T]) -> T:
        return self.records.write_now(lambda writer: operation(self.root, writer))

    def prepare(
        self, key: str, parent: str | int | None = None, kind: Kind = Kind.ACTIVE, given: dict[str, str] | None = None
    ) -> int:
        request = prepare.request(self.root, kind, key, parent, given, "")
        return self.write(lambda root, writer: prepare.make(root, writer, request))

    def commit(self, name: str, key: str, parent: str | None = None, **given: str) -> int:
        with self.records.reading() as reader:
            number = lookup.find_id(reader, key)
        options: dict[str, Any] = {"keep_labels": False, "refuse_mounted": False, "free": False}
        self.write(lambda root, writer: commit.commit(root, writer, name, number, key, given, parent, "", **options))
        return number

    def remove(self, key: str, origin: str = "") -> None:
        with self.records.reading() as reader:
            number = lookup.find_id(reader, key)
        self.write(lambda root, writer: remove.remove(root, writer, number, key, origin, refuse_mounted=False, free=Free.NO))

    def kinds(self) -> dict[str, Kind]:
        with self.records.reading() as reader:
            found = reader.walk()
        return {info.name: info.kind for info in found}


def _not_permitted() -> int:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    with ExitStack() as opened:
        layers = Layers.open(str(tmp_path / "root"))
        layers.pool.syncs = False
        records = MetaStore(f"{layers.root}/metadata.mdb", sync=False)
        fd = os.open(layers.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        root = Root(
            options=Options(),
            layers=layers,
            fd=fd,
            placing=Placing(layers, fd),
            mounted=Mounted(layers.snapshots),
            in_use=InUse(layers, UpperLayers.choose(layers.root, _not_permitted)),
            unflushed=Unflushed(layers, records),
            overlay_options=("index=off",),
            maps_ids=False,
            damaged=set(),
            agrees=True,
        )
        opened.callback(root.close)
        opened.callback(records.close)
        yield Ground(root, records)


def test_a_life(ground: Ground) -> None:
    number = ground.prepare("draft")
    assert ground.commit("base", "draft") == number
    child = ground.prepare("work", "base")
    ground.prepare("look", "base", Kind.VIEW)
    assert ground.kinds() == {"base": Kind.COMMITTED, "look": Kind.VIEW, "work": Kind.ACTIVE}
    with ground.records.reading() as reader:
        spec = mounts.mounts(ground.root, reader, child, lookup.find(reader, "work")[1])
    assert [mount.type for mount in spec] == ["overlay"]
    assert spec[0].options[-1] == "index=off"
    ground.remove("work")
    assert ground.kinds() == {"base": Kind.COMMITTED, "look": Kind.VIEW}
    assert not os.path.exists(ground.root.layers.directory(child))


def _prepare(key: str, parent: str | None = None, given: dict[str, str] | None = None) -> Callable[[Ground], object]:
    return lambda ground: ground.prepare(key, parent, given=given)


def _commit(name: str, key: str, parent: str | None = None) -> Callable[[Ground], object]:
    return lambda ground: ground.commit(name, key, parent)


def _rename(old: str, new: str) -> Callable[[Ground], object]:
    return lambda ground: ground.write(lambda root, writer: rename.rename(root, writer, old, new))


def _move_label(key: str, old: str, new: str) -> Callable[[Ground], object]:
    return lambda ground: ground.write(lambda root, writer: labels.move(root, writer, key, old, new, replace=False))


REFUSED: list[tuple[Callable[[Ground], object], type[SnapshotError]]] = [
    (_prepare("work"), AlreadyExists),
    (_prepare("base"), AlreadyExists),
    (_prepare("new", "none"), NotFound),
    (_prepare("new", "work"), InvalidArgument),
    (_prepare("new", "look"), InvalidArgument),
    (_prepare(""), InvalidArgument),
    (_prepare("new", given={"": "a label without a key"}), InvalidArgument),
    (_commit("new", "none"), NotFound),
    (_commit("new", "base"), FailedPrecondition),
    (_commit("new", "look"), FailedPrecondition),
    (_commit("base", "work"), AlreadyExists),
    (_commit("new", "work", "new"), InvalidArgument),
    (_commit("new", "work", "other"), WrongParent),
    (_commit("new", "alone", "none"), NotFound),
    (_commit("new", "alone", "look"), FailedPrecondition),
    (lambda ground: ground.remove("none"), NotFound),
    (lambda ground: ground.remove("base"), HasChildren),
    (lambda ground: ground.remove("pinned"), Pinned),
    (lambda ground: ground.remove("alone", origin="containerd"), FailedPrecondition),
    (_rename("none", "new"), NotFound),
    (_rename("work", "base"), AlreadyExists),
    (_move_label("alone", "none", "new"), NotFound),
    (_move_label("alone", "a", "b"), AlreadyExists),
]


@pytest.mark.parametrize(("call", "error"), REFUSED)
def test_what_is_refused_changes_nothing(ground: Ground, call: Callable[[Ground], object], error: type[SnapshotError]) -> None:
    ground.prepare("draft")
    ground.commit("base", "draft")
    ground.prepare("draft")
    ground.commit("other", "draft")
    ground.prepare("work", "base")
    ground.prepare("look", "base", Kind.VIEW)
    ground.prepare("alone", given={"a": "1", "b": "2"})
    ground.prepare("pinned", given={"pin": "yes"})

    def everything() -> object:
        with ground.records.reading() as reader:
            return list(reader.dump()), sorted(os.listdir(ground.root.layers.snapshots)), reader.last_id()

    before = everything()
    with pytest.raises(error):
        call(ground)
    assert everything() == before


def test_an_operation_that_runs_twice_counts_once(ground: Ground) -> None:
    """As where the map was too small for its batch: what the first run did is undone before the second."""
    request = prepare.request(ground.root, Kind.ACTIVE, "work", None, None, "")

    def fail_late(root: Root, writer: Writer) -> None:
        prepare.make(root, writer, request)
        raise Busy("not now")

    with pytest.raises(Busy):
        ground.write(fail_late)
    assert os.listdir(ground.root.layers.snapshots) == []
    assert ground.write(lambda root, writer: prepare.make(root, writer, request)) == 1


def test_labels_by_field_paths(ground: Ground) -> None:
    ground.prepare("work", given={"a": "1", "b": "2"})

    def update(given: dict[str, str], *paths: str) -> dict[str, str]:
        fields = labels.Fields(paths)
        info = ground.write(lambda root, writer: labels.update(root, writer, "work", given, fields))
        return dict(info.labels)

    assert update({"a": "3", "c": "4"}, "labels.a") == {"a": "3", "b": "2"}
    assert update({}, "labels.b") == {"a": "3"}
    assert update({"c.d": "4"}, "labels.c.d") == {"a": "3", "c.d": "4"}
    assert update({"z": "0"}) == {"z": "0"}
    with pytest.raises(InvalidArgument, match='cannot update "name"'):
        labels.Fields(["name"])


def test_a_rebase_finds_its_parent_at_the_commit(ground: Ground) -> None:
    ground.prepare("draft")
    base = ground.commit("base", "draft")
    ground.prepare("layer")
    number = ground.commit("upper", "layer", "base")
    with ground.records.reading() as reader:
        assert reader.chain(lookup.find(reader, "upper")[1]) == [base]
        assert reader.lowers(number, lookup.find(reader, "upper")[1]) == [number, base]


def test_what_could_not_be_mounted_is_not_made(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.mountspec.MOST_LOWERS", 2)
    assert MOST_LOWERS > 2
    for serial in range(2):
        ground.prepare("draft", (serial and f"v{serial - 1}") or None)
        ground.commit(f"v{serial}", "draft")
    ground.prepare("draft", "v1")
    with pytest.raises(TooDeep):
        ground.commit("v2", "draft")


def test_a_missing_layer_is_damaged_until_it_is_back(ground: Ground) -> None:
    ground.prepare("draft")
    number = ground.commit("base", "draft")
    directory = ground.root.layers.directory(number)
    os.rename(directory, directory + ".away")
    ground.root.damaged.add(number)
    with pytest.raises(Damaged):
        ground.prepare("work", "base")
    os.rename(directory + ".away", directory)
    ground.prepare("work", "base")
    assert ground.root.damaged == set()
