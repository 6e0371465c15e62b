"""The library call by call: what each does, what it refuses and in which order it looks, and that a refusal changes nothing."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import (
    AlreadyExists,
    Change,
    FailedPrecondition,
    Info,
    InvalidArgument,
    Kind,
    Mount,
    NotFound,
    SnapshotError,
    Snapshotter,
    Unavailable,
    Usage,
)
from snapfs import labels as label_bounds
from snapfs.errors import Busy, HasChildren, LabelTooBig, NameTooLong, NotPermitted, NotUtf8, WrongParent
from snapfs.filters import Filters
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.kernel import mounting
from snapfs.offline.rebuilding import rebuild
from snapfs.options import Options, Sync
from snapfs.root.layers import FsTemplate
from snapfs.root.pool import POOL, POOL_LEAST
from snapfs.store.metastore import BATCH
from snapfs.store.writing import Writer
from tests.doors import DOORS, Opener
from tests.placing import DryPool
from tests.processes import own_descriptors
from tests.records import until_in_line

Call = Callable[[Snapshotter], Awaitable[object]]

async_only = pytest.mark.parametrize("door", ["async"])
"""For a test of what happens inside, on the test's own loop."""

TOO_BIG = {"k": "v" * 4096}
TOO_LONG = "x" * 256
NOT_UTF8 = "\udcff"


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    """The door at which the library is called."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def open_snapshotter(request: pytest.FixtureRequest, door: str) -> Opener:
    """``open_snapshotter`` of the door; roots flush nothing unless the test is ``durable``."""
    sync = Sync.FULL if request.node.get_closest_marker("durable") else Sync.NONE
    return partial(DOORS[door], options=Options(sync=sync))


@pytest.fixture
async def snapshotter(open_snapshotter: Opener, root: Path) -> AsyncIterator[Snapshotter]:
    """The library on a fresh root."""
    async with open_snapshotter(root) as opened:
        yield opened


@pytest.fixture
async def filled(snapshotter: Snapshotter) -> Snapshotter:
    """1 ``base`` (committed); 2 ``web`` (active on it); 3 ``peek`` (a view of it); 4 ``lone`` (active on nothing); 5 ``next``
    (committed on base); 6 ``leaf`` (committed on next)."""
    await snapshotter.prepare("b", labels={"gone": "at commit"})
    await snapshotter.commit("base", "b", {"kept": "yes"})
    await snapshotter.prepare("web", "base", {"l": "1"})
    await snapshotter.view("peek", "base")
    await snapshotter.prepare("lone")
    for name, parent in (("next", "base"), ("leaf", "next")):
        await snapshotter.prepare("tmp", parent)
        await snapshotter.commit(name, "tmp")
    for name in ("base", "next", "leaf"):
        await snapshotter.usage(name)
    await snapshotter.cleanup()  # counted and told: nothing changes by itself from here on
    return snapshotter


async def committed(snapshotter: Snapshotter, name: str, parent: str | None = None) -> None:
    await snapshotter.prepare("tmp", parent)
    await snapshotter.commit(name, "tmp")


def ids(root: Path) -> list[str]:
    return sorted(os.listdir(root / "snapshots"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def owner(path: Path) -> tuple[int, int]:
    return path.stat().st_uid, path.stat().st_gid


@asynccontextmanager
async def held_writer(snapshotter: Snapshotter) -> AsyncIterator[None]:
    """The writer is busy with something else inside the block."""
    busy, go_on = trio.Event(), threading.Event()

    def operation(writer: Writer) -> None:
        trio.from_thread.run_sync(busy.set)
        assert go_on.wait(20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshotter.records.write, operation)
        await busy.wait()
        try:
            yield
        finally:
            go_on.set()


# -- refusals: each row is one sentence; nothing has changed afterwards

REFUSALS: list[tuple[str, Call, type[SnapshotError]]] = [
    # Prepare and View: the parent is looked up before the key
    ("prepare: parent missing", lambda s: s.prepare("k", "none"), NotFound),
    ("prepare: parent missing beats key taken", lambda s: s.prepare("web", "none"), NotFound),
    ("prepare: parent active", lambda s: s.prepare("k", "web"), InvalidArgument),
    ("prepare: parent active beats key taken", lambda s: s.prepare("peek", "web"), InvalidArgument),
    ("prepare: parent a view", lambda s: s.prepare("k", "peek"), InvalidArgument),
    ("prepare: parent is itself", lambda s: s.prepare("k", "k"), NotFound),
    ("prepare: key taken by active", lambda s: s.prepare("web", "base"), AlreadyExists),
    ("prepare: key taken by view", lambda s: s.prepare("peek", "base"), AlreadyExists),
    ("prepare: key taken by committed", lambda s: s.prepare("base", "base"), AlreadyExists),
    ("prepare: key taken, no parent", lambda s: s.prepare("base"), AlreadyExists),
    ("prepare: empty key", lambda s: s.prepare("", "base"), InvalidArgument),
    ("prepare: key too long", lambda s: s.prepare(TOO_LONG, "base"), NameTooLong),
    ("prepare: key too long once encoded", lambda s: s.prepare("/" * 86), NameTooLong),
    ("prepare: key not UTF-8", lambda s: s.prepare(NOT_UTF8), NotUtf8),
    ("prepare: parent not UTF-8", lambda s: s.prepare("k", NOT_UTF8), NotFound),
    ("prepare: parent too long", lambda s: s.prepare("k", "x" * 1000), NotFound),
    ("prepare: empty label key", lambda s: s.prepare("k", None, {"": "v"}), InvalidArgument),
    ("prepare: label too big", lambda s: s.prepare("k", None, TOO_BIG), LabelTooBig),
    ("prepare: label not UTF-8", lambda s: s.prepare("k", None, {"k": NOT_UTF8}), NotUtf8),
    ("prepare: no such parent by id", lambda s: s.prepare("k", 99), NotFound),
    ("prepare: bad mapping", lambda s: s.prepare("k", None, {UID_MAPPING: "0:x:1"}), InvalidArgument),
    ("prepare: mapping without 0", lambda s: s.prepare("k", "base", {GID_MAPPING: "1:1000:1"}), InvalidArgument),
    ("view: parent missing", lambda s: s.view("k", "none"), NotFound),
    ("view: parent missing beats key taken", lambda s: s.view("web", "none"), NotFound),
    ("view: parent active", lambda s: s.view("k", "web"), InvalidArgument),
    ("view: parent a view", lambda s: s.view("k", "peek"), InvalidArgument),
    ("view: key taken by active", lambda s: s.view("web", "base"), AlreadyExists),
    ("view: key taken by view", lambda s: s.view("peek", "base"), AlreadyExists),
    ("view: key taken by committed", lambda s: s.view("next", "base"), AlreadyExists),
    ("view: empty key", lambda s: s.view(""), InvalidArgument),
    ("view: key too long", lambda s: s.view(TOO_LONG), NameTooLong),
    ("view: label too big", lambda s: s.view("k", "base", TOO_BIG), LabelTooBig),
    ("view: bad mapping", lambda s: s.view("k", None, {UID_MAPPING: "x"}), InvalidArgument),
    # Commit: the key is looked up first
    ("commit: no such key", lambda s: s.commit("n", "none"), NotFound),
    ("commit: no such key beats name taken", lambda s: s.commit("base", "none"), NotFound),
    ("commit: a view", lambda s: s.commit("n", "peek"), FailedPrecondition),
    ("commit: a committed one", lambda s: s.commit("n", "next"), FailedPrecondition),
    ("commit: a committed one as itself", lambda s: s.commit("next", "next"), FailedPrecondition),
    ("commit: a view beats name taken", lambda s: s.commit("base", "peek"), FailedPrecondition),
    ("commit: name taken by committed", lambda s: s.commit("base", "web"), AlreadyExists),
    ("commit: name taken by active", lambda s: s.commit("lone", "web"), AlreadyExists),
    ("commit: name taken by view", lambda s: s.commit("peek", "web"), AlreadyExists),
    ("commit: another parent", lambda s: s.commit("n", "web", parent="next"), WrongParent),
    ("commit: another parent that does not exist", lambda s: s.commit("n", "web", parent="none"), WrongParent),
    ("commit: another parent by id", lambda s: s.commit("n", "web", parent=5), WrongParent),
    ("commit: rebase onto nothing there", lambda s: s.commit("n", "lone", parent="none"), NotFound),
    ("commit: rebase onto an active one", lambda s: s.commit("n", "lone", parent="web"), FailedPrecondition),
    ("commit: rebase onto a view", lambda s: s.commit("n", "lone", parent="peek"), FailedPrecondition),
    ("commit: rebase onto itself", lambda s: s.commit("n", "lone", parent="lone"), FailedPrecondition),
    ("commit: rebase onto itself by id", lambda s: s.commit("n", "lone", parent=4), FailedPrecondition),
    ("commit: its own parent", lambda s: s.commit("n", "lone", parent="n"), InvalidArgument),
    ("commit: its own parent, key too", lambda s: s.commit("lone", "lone", parent="lone"), InvalidArgument),
    ("commit: own parent, though it has one", lambda s: s.commit("n", "web", parent="n"), InvalidArgument),
    ("commit: empty name", lambda s: s.commit("", "web"), InvalidArgument),
    ("commit: name too long", lambda s: s.commit(TOO_LONG, "web"), NameTooLong),
    ("commit: name not UTF-8", lambda s: s.commit(NOT_UTF8, "web"), NotUtf8),
    ("commit: empty label key", lambda s: s.commit("n", "web", {"": "x"}), InvalidArgument),
    ("commit: label too big", lambda s: s.commit("n", "web", TOO_BIG), LabelTooBig),
    # Remove
    ("remove: missing", lambda s: s.remove("none"), NotFound),
    ("remove: missing id", lambda s: s.remove(99), NotFound),
    ("remove: empty key", lambda s: s.remove(""), NotFound),
    ("remove: with children", lambda s: s.remove("base"), HasChildren),
    ("remove: with a child", lambda s: s.remove("next"), FailedPrecondition),
    # Stat, Mounts, Usage, Walk
    ("stat: missing", lambda s: s.stat("none"), NotFound),
    ("stat: empty key", lambda s: s.stat(""), NotFound),
    ("stat: a key beyond all limits", lambda s: s.stat("x" * 5000), NotFound),
    ("stat: not UTF-8", lambda s: s.stat(NOT_UTF8), NotFound),
    ("stat: missing id", lambda s: s.stat(99), NotFound),
    ("mounts: missing", lambda s: s.mounts("none"), NotFound),
    ("mounts: committed", lambda s: s.mounts("base"), FailedPrecondition),
    ("mounts: committed on another", lambda s: s.mounts("leaf"), FailedPrecondition),
    ("usage: missing", lambda s: s.usage("none"), NotFound),
    ("walk: bad filter", lambda s: s.walk("name=x"), InvalidArgument),
    ("walk: one bad filter of several", lambda s: s.walk("name==base", "name=="), InvalidArgument),
    # Update
    ("update: missing", lambda s: s.update("none", {"a": "b"}), NotFound),
    ("update: label too big", lambda s: s.update("web", TOO_BIG), LabelTooBig),
    ("update: one of several too big", lambda s: s.update("web", {"a": "b", **TOO_BIG}, ["labels.a", "labels.k"]), LabelTooBig),
    ("update: empty label key", lambda s: s.update("web", {"": "b"}), InvalidArgument),
    ("update: path name", lambda s: s.update("web", {}, ["name"]), InvalidArgument),
    ("update: path kind", lambda s: s.update("web", {"a": "b"}, ["labels.a", "kind"]), InvalidArgument),
    ("update: path parent", lambda s: s.update("web", {"a": "b"}, ["parent", "labels"]), InvalidArgument),
    ("update: path Labels", lambda s: s.update("web", {"a": "b"}, ["Labels"]), InvalidArgument),
    ("update: path labelsx", lambda s: s.update("web", {"a": "b"}, ["labelsx"]), InvalidArgument),
    ("update: path labels.", lambda s: s.update("web", {"a": "b"}, ["labels."]), InvalidArgument),
    ("update: empty path", lambda s: s.update("web", {"a": "b"}, [""]), InvalidArgument),
    ("update: bad mapping", lambda s: s.update("web", {UID_MAPPING: "0:1"}), InvalidArgument),
    # labels one by one
    ("move label: missing snapshot", lambda s: s.move_label("none", "l", "m"), NotFound),
    ("move label: missing label", lambda s: s.move_label("web", "m", "n"), NotFound),
    ("move label: taken", lambda s: s.move_label("web", "l", "l", replace=False), AlreadyExists),
    ("move label: too big", lambda s: s.move_label("web", "l", "l" * 4096), LabelTooBig),
    ("move label: empty", lambda s: s.move_label("web", "l", ""), InvalidArgument),
    # rename, which containerd lacks
    ("rename: missing", lambda s: s.rename("none", "n"), NotFound),
    ("rename: missing beats taken", lambda s: s.rename("none", "base"), NotFound),
    ("rename: taken by another kind", lambda s: s.rename("web", "base"), AlreadyExists),
    ("rename: taken by the same kind", lambda s: s.rename("web", "lone"), AlreadyExists),
    ("rename: empty", lambda s: s.rename("web", ""), InvalidArgument),
    ("rename: too long", lambda s: s.rename("web", TOO_LONG), NameTooLong),
    ("rename: not UTF-8", lambda s: s.rename("web", NOT_UTF8), NotUtf8),
]


@pytest.mark.parametrize(("call", "error"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
async def test_a_refusal_and_that_nothing_has_changed(
    filled: Snapshotter, root: Path, call: Call, error: type[SnapshotError]
) -> None:
    told: list[Change] = []
    filled.subscribe(told.append)
    before, directories = await filled.walk(), ids(root)
    with pytest.raises(error) as caught:
        await call(filled)
    assert str(caught.value).strip()
    assert await filled.walk() == before
    assert ids(root) == directories == ["1", "2", "3", "4", "5", "6"]
    assert os.listdir(root / "trash") == []
    assert told == []
    await filled.prepare("the next one")
    assert (await filled.stat("the next one")).id == 7


def test_each_error_has_containerds_class() -> None:
    """The doors tell the finer ones apart; a client of containerd's kinds need not."""
    assert issubclass(HasChildren, FailedPrecondition)
    assert issubclass(Busy, FailedPrecondition)
    assert issubclass(WrongParent, InvalidArgument)
    assert issubclass(LabelTooBig, InvalidArgument)
    assert issubclass(NameTooLong, InvalidArgument)
    assert issubclass(NotUtf8, InvalidArgument)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.stat("none"), 'snapshot "none" does not exist'),
        (lambda s: s.prepare("k", "none"), 'parent snapshot "none" does not exist'),
        (lambda s: s.prepare("base"), 'snapshot "base" already exists (committed)'),
        (lambda s: s.remove("next"), 'cannot remove snapshot "next" with children: remove its child "leaf" (committed) first'),
    ],
)
async def test_the_words_of_an_error(filled: Snapshotter, call: Call, words: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        await call(filled)
    assert str(caught.value) == words


# -- Prepare and View


@pytest.mark.parametrize("parent", [None, ""])
async def test_prepare_on_nothing(snapshotter: Snapshotter, root: Path, parent: str | None) -> None:
    assert await snapshotter.prepare("web", parent) == [Mount("bind", f"{root}/snapshots/1/fs", ("rw", "rbind"))]
    info = await snapshotter.stat("web")
    assert (info.name, info.kind, info.id, info.parent, info.labels) == ("web", Kind.ACTIVE, 1, None, {})


@pytest.mark.parametrize("parent", [None, ""])
async def test_view_of_nothing(snapshotter: Snapshotter, root: Path, parent: str | None) -> None:
    assert await snapshotter.view("peek", parent) == [Mount("bind", f"{root}/snapshots/1/fs", ("ro", "rbind"))]
    info = await snapshotter.stat("peek")
    assert (info.name, info.kind, info.parent) == ("peek", Kind.VIEW, None)


async def test_prepare_and_view_on_a_chain(filled: Snapshotter, root: Path) -> None:
    await filled.prepare("top", "leaf")
    await filled.view("look", "leaf")
    (top,), (look,) = await filled.mounts("top"), await filled.mounts("look")
    lower = ":".join(f"{root}/snapshots/{number}/fs" for number in (6, 5, 1))
    own = f"{root}/snapshots/7"
    assert top.options[:3] == (f"workdir={own}/work", f"upperdir={own}/fs", f"lowerdir={lower}")
    assert (top.type, top.source) == ("overlay", "overlay")
    assert look.options[0] == f"lowerdir={lower}"
    assert not [option for option in look.options if option.startswith(("upperdir", "workdir", "ro"))]
    assert (await filled.stat("top")).parent == (await filled.stat("look")).parent == "leaf"


async def test_a_view_of_one_parent_is_a_bind_of_it(filled: Snapshotter, root: Path) -> None:
    assert await filled.mounts("peek") == [Mount("bind", f"{root}/snapshots/1/fs", ("ro", "rbind"))]


@pytest.mark.parametrize("what", ["prepare", "view"])
async def test_what_prepare_returns_is_what_mounts_says(filled: Snapshotter, what: str) -> None:
    for number, parent in enumerate((None, "base", "leaf")):
        made = await getattr(filled, what)(f"k{number}", parent)
        assert await filled.mounts(f"k{number}") == made


async def test_a_parent_may_be_given_by_id(filled: Snapshotter) -> None:
    await filled.prepare("k", 5)
    assert (await filled.stat("k")).parent == "next"
    assert await filled.stat(7) == await filled.stat("k")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_modes_whatever_the_umask(open_snapshotter: Opener, root: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("web")
            await snapshotter.view("peek")
    finally:
        os.umask(before)
    assert mode(root) == 0o700
    assert mode(root / "snapshots") == 0o700
    assert (mode(root / "snapshots/1"), mode(root / "snapshots/1/fs"), mode(root / "snapshots/1/work")) == (0o700, 0o755, 0o711)
    assert (mode(root / "snapshots/2"), mode(root / "snapshots/2/fs")) == (0o700, 0o755)
    assert sorted(os.listdir(root / "snapshots/1")) == ["fs", "work"]
    assert os.listdir(root / "snapshots/2") == ["fs"]


@pytest.mark.mounts
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({UID_MAPPING: "0:1000:10", GID_MAPPING: "0:2000:10"}, (1000, 2000)),
        ({UID_MAPPING: "1:5:1,0:1000:1"}, (1000, 0)),
        ({GID_MAPPING: "0:2000:10"}, (0, 2000)),
        ({UID_MAPPING: "", GID_MAPPING: ""}, (71, 72)),
        ({}, (71, 72)),
    ],
)
@pytest.mark.parametrize("what", ["prepare", "view"])
async def test_the_owner_of_fs(
    filled: Snapshotter, root: Path, what: str, labels: dict[str, str], expected: tuple[int, int]
) -> None:
    """From the labels, else from the parent's fs; the directory around it stays ours."""
    os.chown(root / "snapshots/5/fs", 71, 72)
    await getattr(filled, what)("k", "next", labels)
    assert owner(root / "snapshots/7/fs") == expected
    assert owner(root / "snapshots/7") == (0, 0)
    assert mode(root / "snapshots/7/fs") == 0o755


async def test_the_owner_of_fs_without_labels_and_parent_is_ours(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("web")
    assert owner(root / "snapshots/1/fs") == (os.geteuid(), os.getegid())


async def test_ids_count_from_1_and_are_never_used_again(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await committed(snapshotter, "one")
        await snapshotter.prepare("two")
        await snapshotter.view("three")
        assert [(await snapshotter.stat(name)).id for name in ("one", "two", "three")] == [1, 2, 3]
        await snapshotter.remove("two")
        await snapshotter.remove("three")
        await snapshotter.prepare("two")
        assert (await snapshotter.stat("two")).id == 4
        await snapshotter.remove("two")
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("two")
        assert (await snapshotter.stat("two")).id == 5
    assert ids(root) == ["1", "5"]


async def test_labels_are_stored_as_given_and_empty_values_dropped(snapshotter: Snapshotter) -> None:
    given = {"a": "1", "containerd.io/gc.root": " x\n", "é": "🐙", "empty": "", "sla/sh.dot": "\0"}
    kept = {label: value for label, value in given.items() if value}
    await snapshotter.prepare("web", labels=given)
    await snapshotter.view("peek", labels=given)
    assert (await snapshotter.stat("web")).labels == (await snapshotter.stat("peek")).labels == kept
    await snapshotter.commit("base", "web", given)
    assert (await snapshotter.stat("base")).labels == kept
    assert (await snapshotter.update("peek", given)).labels == kept


@pytest.mark.parametrize(("key", "value"), [("k", "v" * 4095), ("k" * 4095, "v"), ("é", "🐙" * 1023 + "xy")])
async def test_4096_bytes_of_label_fit_and_no_more(snapshotter: Snapshotter, key: str, value: str) -> None:
    assert len(key.encode() + value.encode()) == 4096
    await snapshotter.prepare("web", labels={key: value})
    assert (await snapshotter.stat("web")).labels == {key: value}
    for call in (
        snapshotter.prepare("more", labels={key: value + "x"}),
        snapshotter.view("more", labels={key + "x": value}),
        snapshotter.commit("base", "web", {key: value + "x"}),
        snapshotter.update("web", {key + "x": value}),
        snapshotter.update("web", {key: value + "x"}, [f"labels.{key}"]),
    ):
        with pytest.raises(LabelTooBig, match="4097"):
            await call
    assert [info.labels for info in await snapshotter.walk()] == [{key: value}]


MANY = {f"k{n}": "v" for n in range(256)}
MUCH = {f"{n:02}": "v" * 4094 for n in range(15)} | {"é": "v" * 94, "k": "v" * 3999}


@pytest.mark.parametrize(
    ("most", "more", "words"),
    [
        (MANY, "another", "would have 257 labels; at most 256 fit"),
        (MUCH, "m", "would take 65538 bytes together, with keys; at most 65536 fit"),
    ],
    ids=["many", "much"],
)
async def test_256_labels_of_64_kib_together_fit_and_no_more(
    snapshotter: Snapshotter, most: dict[str, str], more: str, words: str
) -> None:
    await snapshotter.prepare("web", labels=most)
    await snapshotter.update("web", most)
    for call in (
        snapshotter.prepare("more", labels={**most, more: "w"}),
        snapshotter.view("more", labels={**most, more: "w"}),
        snapshotter.commit("base", "web", {**most, more: "w"}),
        snapshotter.commit("base", "web", {more: "w"}, keep_labels=True),
        snapshotter.update("web", {**most, more: "w"}),
        snapshotter.update("web", {more: "w"}, [f"labels.{more}"]),
    ):
        with pytest.raises(LabelTooBig, match=re.escape(words)):
            await call
    assert [(info.name, info.labels) for info in await snapshotter.walk()] == [("web", most)]
    if most is MUCH:
        with pytest.raises(LabelTooBig, match="65537 bytes"):
            await snapshotter.move_label("web", "k", "kk")
    await snapshotter.commit("base", "web", keep_labels=True)
    assert (await snapshotter.stat("base")).labels == most


async def test_more_labels_from_before_there_was_a_bound_stay_and_may_become_fewer(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = {f"key {n}": "v" * 1000 for n in range(300)}
    with monkeypatch.context() as before:
        for bound in ("COUNT", "ROOM"):
            before.setattr(label_bounds, bound, 1 << 20)
        await snapshotter.prepare("web", labels=older)
    assert (await snapshotter.stat("web")).labels == older
    for labels, paths in (({"more": "v"}, ["labels.more"]), ({"key 1": "v" * 1001}, ["labels.key 1"])):
        with pytest.raises(LabelTooBig):
            await snapshotter.update("web", labels, paths)
    with pytest.raises(LabelTooBig):
        await snapshotter.commit("base", "web", {"more": "v"}, keep_labels=True)
    await snapshotter.update("web", {"key 1": "w" * 1000}, ["labels.key 1"])
    await snapshotter.update("web", {}, ["labels.key 0"])
    await snapshotter.update("web", {"key 0": "v"}, ["labels.key 1", "labels.key 0"])
    await snapshotter.move_label("web", "key 2", "two")
    await snapshotter.rename("web", "site")
    await snapshotter.commit("base", "site", keep_labels=True)
    labels = dict((await snapshotter.stat("base")).labels)
    assert (len(labels), labels["key 0"], labels["two"]) == (299, "v", "v" * 1000)
    await snapshotter.update("base", {"only": "this"})
    with pytest.raises(LabelTooBig):
        await snapshotter.update("base", labels)


@pytest.mark.parametrize("key", ["x" * 255, "/" * 85, "%.", "..", ".", "a\nb", " ", "default/1/sha256:" + "0" * 64, "🐙" * 63])
async def test_any_key_that_fits(snapshotter: Snapshotter, key: str) -> None:
    await snapshotter.prepare(key)
    assert (await snapshotter.stat(key)).name == key
    await snapshotter.commit(key, key)
    assert [info.name for info in await snapshotter.walk()] == [key]


@pytest.mark.mounts
@pytest.mark.parametrize("function", ["lchown", "rename"])
async def test_a_prepare_that_the_disk_refuses_leaves_nothing(
    filled: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    before = await filled.walk()
    failed: list[tuple[object, ...]] = []

    def refuse(*arguments: object, **named: object) -> None:
        failed.append(arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(Unavailable, match="No space left") as caught:
            await filled.prepare("k", "base", {UID_MAPPING: "0:1000:1"})
    assert caught.value.errno == errno.ENOSPC
    assert failed
    assert await filled.walk() == before
    assert ids(root) == ["1", "2", "3", "4", "5", "6"]
    with trio.fail_after(10):  # another one may just be on its way into the pool
        while [path for path in (root / "pool").iterdir() if sorted(os.listdir(path)) != ["fs", "work"]]:
            await trio.sleep(0.01)
    assert os.listdir(root / "trash") == []
    await filled.prepare("k", "base", {UID_MAPPING: "0:1000:1"})
    assert owner(root / "snapshots/7/fs") == (1000, 0)


@pytest.mark.mounts
async def test_a_prepare_on_a_full_disk_leaves_nothing(open_snapshotter: Opener, tmp_path: Path) -> None:
    """A real one, with no inode left and the pool used up."""
    small = tmp_path / "small"
    small.mkdir()
    mounting.mount("tmpfs", str(small), "tmpfs", 0, "size=16m,nr_inodes=400")
    try:
        async with open_snapshotter(small / "root") as snapshotter:
            made = 0

            async def prepare_on_and_on() -> None:
                nonlocal made
                while True:
                    await snapshotter.prepare(f"k{made}")
                    made += 1

            with pytest.raises(Unavailable) as caught:
                await prepare_on_and_on()
            assert caught.value.errno == errno.ENOSPC
            assert made > POOL_LEAST
            assert len(await snapshotter.walk()) == made == len(ids(small / "root"))
            await snapshotter.remove("k0")
            await snapshotter.remove("k1")
            await snapshotter.prepare("k0")
            assert len(await snapshotter.walk()) == made - 1 == len(ids(small / "root"))
    finally:
        mounting.unmount(str(small))


async def test_a_burst_beyond_the_pool(snapshotter: Snapshotter, root: Path) -> None:
    for number in range(3 * POOL):
        await (snapshotter.view if number % 3 == 0 else snapshotter.prepare)(f"k{number}")
    for number in range(3 * POOL):
        expected = ["fs"] if number % 3 == 0 else ["fs", "work"]
        assert sorted(os.listdir(root / f"snapshots/{number + 1}")) == expected


# -- Commit


async def test_commit_keeps_the_id_and_frees_the_key(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("web", labels={"old": "1"})
    (root / "snapshots/1/fs/file").write_text("data")
    active = await snapshotter.stat("web")
    start = time.time_ns()
    await snapshotter.commit("base", "web", {"new": "2"})
    base = await snapshotter.stat("base")
    assert (base.id, base.kind, base.parent) == (1, Kind.COMMITTED, None)
    assert base.labels == {"new": "2"}  # none inherited
    assert base.created == base.updated
    assert active.created < start <= base.created <= time.time_ns()
    with pytest.raises(NotFound):
        await snapshotter.stat("web")
    await snapshotter.prepare("web", "base")
    assert (root / "snapshots/1/fs/file").read_text() == "data"


async def test_commit_may_keep_the_name_and_the_labels(filled: Snapshotter) -> None:
    await filled.commit("web", "web", {"m": "2"}, keep_labels=True)
    info = await filled.stat("web")
    assert (info.kind, info.labels, info.parent) == (Kind.COMMITTED, {"l": "1", "m": "2"}, "base")


@pytest.mark.parametrize("parent", [None, "", "base", 1])
async def test_commit_with_its_own_parent(filled: Snapshotter, parent: str | int | None) -> None:
    await filled.commit("v1", "web", parent=parent)
    assert (await filled.stat("v1")).parent == "base"


@pytest.mark.parametrize("parent", ["leaf", 6])
async def test_commit_rebases_what_had_no_parent(filled: Snapshotter, root: Path, parent: str | int) -> None:
    await filled.commit("v1", "lone", parent=parent)
    assert (await filled.stat("v1")).parent == "leaf"
    with pytest.raises(HasChildren):
        await filled.remove("leaf")
    (mount,) = await filled.prepare("on top", "v1")
    assert mount.options[2] == "lowerdir=" + ":".join(f"{root}/snapshots/{number}/fs" for number in (4, 6, 5, 1))


@pytest.mark.mounts
async def test_commit_can_refuse_what_is_mounted_read_write(filled: Snapshotter, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (mount,) = await filled.mounts("web")
    mounting.mount("overlay", str(tmp_path / "m"), "overlay", 0, ",".join(mount.options))
    try:
        with pytest.raises(Busy, match=str(tmp_path / "m")):
            await filled.commit("v1", "web", refuse_mounted=True)
        assert (await filled.stat("web")).kind is Kind.ACTIVE
        await filled.commit("v1", "web")  # as containerd does
    finally:
        mounting.unmount(str(tmp_path / "m"))
    await filled.commit("v2", "lone", refuse_mounted=True)


# -- Remove


@pytest.mark.parametrize(("key", "number"), [("web", 2), ("peek", 3), ("lone", 4), ("leaf", 6), (6, 6)])
async def test_remove_of_any_kind(filled: Snapshotter, root: Path, key: str | int, number: int) -> None:
    (root / f"snapshots/{number}/fs/a/b").mkdir(parents=True)
    (root / f"snapshots/{number}/fs/a/file").write_text("x")
    await filled.remove(key)
    with pytest.raises(NotFound):
        await filled.stat(key)
    assert str(number) not in ids(root)
    assert os.listdir(root / "trash") == []


@pytest.mark.parametrize("kind", list(Kind))
async def test_a_child_of_any_kind_keeps_its_parent(snapshotter: Snapshotter, kind: Kind) -> None:
    await committed(snapshotter, "base")
    if kind is Kind.COMMITTED:
        await committed(snapshotter, "child", "base")
    else:
        await (snapshotter.view if kind is Kind.VIEW else snapshotter.prepare)("child", "base")
    with pytest.raises(HasChildren, match=rf'remove its child "child" \({kind}\)'):
        await snapshotter.remove("base")
    await snapshotter.remove("child")
    await snapshotter.remove("base")
    assert await snapshotter.walk() == []


@async_only
async def test_the_key_is_free_at_once_and_the_files_go_in_the_background(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("web")
    (root / "snapshots/1/fs/file").write_text("x")
    async with snapshotter._housekeeping.trash_lock:  # so that nothing is deleted for now
        await snapshotter.remove("web", wait=False)
        await snapshotter.prepare("web")
        assert ids(root) == ["2"]
        (left,) = (root / "trash").iterdir()
        assert (left / "fs/file").read_text() == "x"
    await snapshotter.cleanup()
    assert os.listdir(root / "trash") == []
    assert (await snapshotter.stat("web")).id == 2


async def test_files_that_can_not_be_deleted_are_logged_and_the_snapshot_stays_gone(
    filled: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "snapshots/2/fs/file").write_text("x")

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        await filled.remove("web")
        assert len(os.listdir(root / "trash")) == 1  # afterwards the start's own emptying may yet come by
    assert "Input/output error" in caplog.text
    with pytest.raises(NotFound):
        await filled.stat("web")
    await filled.cleanup()
    assert os.listdir(root / "trash") == []


async def test_a_directory_that_can_not_be_moved_away_is_logged_and_left_to_cleanup(
    filled: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(filled.layers, "move_to_trash", refuse)
        await filled.remove("web")
    assert "Input/output error" in caplog.text
    with pytest.raises(NotFound):
        await filled.stat("web")
    assert "2" in ids(root)
    await filled.cleanup()
    assert ids(root) == ["1", "3", "4", "5", "6"]


# -- Stat, Update, rename


async def test_times_are_now_and_equal_until_an_update(snapshotter: Snapshotter) -> None:
    start = time.time_ns()
    await snapshotter.prepare("web")
    made = await snapshotter.stat("web")
    assert start <= made.created == made.updated <= time.time_ns()
    updated = await snapshotter.update("web", {"a": "1"})
    assert updated.created == made.created
    assert made.updated < updated.updated <= time.time_ns()
    assert await snapshotter.stat("web") == updated


OLD = {"a": "1", "b": "2", "dot.ted/x": "3"}


@pytest.mark.parametrize(
    ("given", "paths", "after"),
    [
        ({"c": "9"}, (), {"c": "9"}),
        ({"c": "9"}, ("labels",), {"c": "9"}),
        ({"c": "9", "d": ""}, (), {"c": "9"}),
        ({}, (), {}),
        ({}, ("labels",), {}),
        ({"c": "9"}, ("labels.c",), {**OLD, "c": "9"}),
        ({"a": "9"}, ("labels.a",), {**OLD, "a": "9"}),
        ({"a": "9", "b": "9"}, ("labels.a",), {**OLD, "a": "9"}),
        ({"a": "9", "b": "8"}, ("labels.a", "labels.b"), {**OLD, "a": "9", "b": "8"}),
        ({"dot.ted/x": "9"}, ("labels.dot.ted/x",), {**OLD, "dot.ted/x": "9"}),
        ({"a": ""}, ("labels.a",), {"b": "2", "dot.ted/x": "3"}),
        ({}, ("labels.a",), {"b": "2", "dot.ted/x": "3"}),
        ({}, ("labels.dot.ted/x", "labels.a"), {"b": "2"}),
        ({}, ("labels.dot",), OLD),
        ({}, ("labels.none",), OLD),
        ({"c": "9"}, ("labels", "labels.a"), {"c": "9"}),
        ({"c": "9"}, ("labels.a", "labels"), {"c": "9"}),
        (OLD, (), OLD),
    ],
)
@pytest.mark.parametrize("key", ["web", "peek", "base"])
async def test_update(
    filled: Snapshotter, key: str, given: dict[str, str], paths: tuple[str, ...], after: dict[str, str]
) -> None:
    before = await filled.update(key, OLD)
    shown = await filled.update(key, given, paths)
    assert shown.labels == after
    assert shown.updated > before.updated  # even where nothing changed
    assert (shown.created, shown.kind, shown.id, shown.parent) == (before.created, before.kind, before.id, before.parent)
    assert await filled.stat(key) == shown
    assert [info for info in await filled.walk() if info.name == key] == [shown]


async def test_updated_moves_even_if_the_clock_does_not(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    await snapshotter.prepare("web")
    first = await snapshotter.update("web", {})
    second = await snapshotter.update("web", {})
    assert 1_000 < first.updated < second.updated


async def test_move_label(filled: Snapshotter) -> None:
    await filled.update("web", {"a": "1", "b": "2"})
    assert (await filled.move_label("web", "a", "c")).labels == {"b": "2", "c": "1"}
    with pytest.raises(AlreadyExists):
        await filled.move_label("web", "c", "b", replace=False)
    assert (await filled.move_label("web", "c", "b")).labels == {"b": "1"}


@pytest.mark.parametrize("key", ["web", "peek", "base", "leaf"])
async def test_rename_within_a_kind(filled: Snapshotter, key: str) -> None:
    before = await filled.stat(key)
    mounts = [] if before.kind is Kind.COMMITTED else await filled.mounts(key)
    await filled.rename(key, "new name")
    after = await filled.stat("new name")
    assert (after.id, after.kind, after.labels, after.parent) == (before.id, before.kind, before.labels, before.parent)
    assert (after.created, after.updated) == (before.created, before.updated)
    if mounts:
        assert await filled.mounts("new name") == mounts
    with pytest.raises(NotFound):
        await filled.stat(key)
    await filled.prepare(key)


async def test_children_keep_a_renamed_parent(filled: Snapshotter) -> None:
    await filled.rename("base", "ground")
    assert {info.name for info in await filled.walk("parent==ground")} == {"web", "peek", "next"}
    await filled.prepare("more", "ground")
    with pytest.raises(HasChildren):
        await filled.remove("ground")


async def test_rename_to_the_same_name_is_fine(filled: Snapshotter) -> None:
    before = await filled.walk()
    await filled.rename("web", "web")
    assert await filled.walk() == before


# -- origins


async def origins(snapshotter: Snapshotter, origin: str = "") -> dict[str, str]:
    return {info.name: info.origin for info in await snapshotter.walk(origin=origin)}


async def test_what_is_made_at_a_door_is_listed_and_removed_there(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("k", origin="containerd")
    await snapshotter.commit("layer", "k", origin="containerd")
    await snapshotter.view("v", "layer", origin="containerd")
    await snapshotter.prepare("mine", "layer")
    assert await origins(snapshotter) == {"layer": "containerd", "mine": "", "v": "containerd"}
    assert await origins(snapshotter, "containerd") == {"layer": "containerd", "v": "containerd"}
    with pytest.raises(FailedPrecondition, match="was not made by containerd: remove it in the tree"):
        await snapshotter.remove("mine", origin="containerd")
    await snapshotter.remove("v", origin="containerd")
    with pytest.raises(HasChildren):
        await snapshotter.remove("layer", origin="containerd")
    await snapshotter.remove("mine")
    await snapshotter.remove("layer", origin="containerd")
    assert await origins(snapshotter) == {}


async def test_what_the_tree_gives_a_name_is_the_trees(snapshotter: Snapshotter) -> None:
    for key in ("a", "b", "c"):
        await snapshotter.prepare(key, origin="containerd")
    await snapshotter.commit("saved", "a")
    await snapshotter.rename("b", "kept")
    await snapshotter.rename("c", "c")
    await snapshotter.update("c", {"team": "blue"})
    await snapshotter.prepare("mine")
    await snapshotter.commit("over the socket", "mine", origin="containerd")
    assert await origins(snapshotter) == {"c": "containerd", "kept": "", "over the socket": "", "saved": ""}


async def test_a_parent_that_is_known_elsewhere_keeps_its_name(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("k", origin="containerd")
    await snapshotter.commit("layer", "k", origin="containerd")
    await snapshotter.view("mine", "layer")
    await snapshotter.prepare("web", "layer", origin="containerd")
    with pytest.raises(NotPermitted, match='its child "web"'):
        await snapshotter.rename("layer", "other")
    await snapshotter.remove("web", origin="containerd")
    await snapshotter.rename("layer", "other")
    assert await origins(snapshotter) == {"mine": "", "other": ""}


async def test_origins_survive_the_loss_of_the_records(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as first:
        await first.prepare("k", origin="containerd")
        await first.commit("layer", "k", origin="containerd")
        await first.prepare("mine", "layer")
    (root / "metadata.mdb").unlink()
    list(rebuild(str(root)))
    async with open_snapshotter(root) as second:
        assert await origins(second) == {"layer": "containerd", "mine": ""}


# -- Walk


async def test_an_empty_store_lists_nothing(snapshotter: Snapshotter) -> None:
    assert await snapshotter.walk() == []
    assert await snapshotter.walk("name==x") == []


async def test_walk_is_ordered_by_the_keys_bytes(snapshotter: Snapshotter) -> None:
    keys = ["b", "B", "a/1", "a", "a0", "é", "\uffff", "🐙", "a\n", "10", "9"]
    for key in keys:
        await snapshotter.prepare(key)
    assert [info.name for info in await snapshotter.walk()] == sorted(keys, key=str.encode)
    assert sorted(keys, key=str.encode) != sorted(keys, key=lambda key: key.encode("utf-16-be"))  # the keys tell them apart


async def test_walk_and_stat_show_identical_values(filled: Snapshotter) -> None:
    await filled.update("web", {"x": "y"})
    shown = await filled.walk()
    assert len(shown) == 6
    assert shown == [await filled.stat(info.name) for info in shown] == [await filled.stat(info.id) for info in shown]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ((), ["base", "leaf", "lone", "next", "peek", "web"]),
        (("",), ["base", "leaf", "lone", "next", "peek", "web"]),
        (("kind==committed",), ["base", "leaf", "next"]),
        (("kind==view", "name==lone"), ["lone", "peek"]),
        (("parent==base,kind!=view",), ["next", "web"]),
        (("labels.l",), ["web"]),
        (("labels.kept==yes",), ["base"]),
        (("labels.gone",), []),
        (("name~=^l",), ["leaf", "lone"]),
    ],
)
async def test_walk_with_filters(filled: Snapshotter, filters: tuple[str, ...], names: list[str]) -> None:
    assert [info.name for info in await filled.walk(*filters)] == names


async def test_walk_shows_one_consistent_state_and_stat_works_meanwhile(snapshotter: Snapshotter) -> None:
    """A snapshot that is renamed to and fro is in each listing, once."""
    for number in range(50):
        await snapshotter.prepare(f"m{number}")
    await snapshotter.prepare("a")
    walks: list[set[str]] = []

    async def walk_often() -> None:
        for _ in range(40):
            walks.append({info.name for info in await snapshotter.walk()} & {"a", "z"})
            assert (await snapshotter.stat("m7")).id == 8
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(walk_often)
        while True:
            await snapshotter.rename("a", "z")
            await snapshotter.rename("z", "a")
    assert len(walks) == 40
    assert all(len(seen) == 1 for seen in walks)


async def test_a_count_that_outlives_its_snapshot_is_not_remembered(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(path: str, checkpoint: Callable[[], None]) -> Usage:
        begun.set()
        go_on.wait(10)
        return Usage(1, 4096)

    await snapshotter.prepare("a")
    monkeypatch.setattr("snapfs.services.counting.disk_usage", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshotter.usage, "a")
        await trio.to_thread.run_sync(begun.wait)
        await snapshotter.remove("a")
        go_on.set()
    assert snapshotter.counting._last_known == {}


# -- Cleanup


async def test_cleanup_deletes_what_no_record_names(filled: Snapshotter, root: Path) -> None:
    await filled.prepare("seventh")
    await filled.remove("seventh")
    for name in ("7/fs/a", "new-123/fs", "new-"):
        (root / "snapshots" / name).mkdir(parents=True)
    await filled.cleanup()
    assert ids(root) == ["1", "2", "3", "4", "5", "6"]
    assert os.listdir(root / "trash") == []
    assert not (root / "lost+found").exists()
    assert len(await filled.walk()) == 6


@async_only
async def test_cleanup_just_before_a_remove_is_not_complained_about(
    filled: Snapshotter, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both in one batch: what Cleanup has put into the trash Remove doesn't miss."""
    await filled.prepare("seventh")
    async with trio.open_nursery() as nursery, held_writer(filled):
        nursery.start_soon(filled.cleanup)
        await until_in_line(filled.records, 1)
        nursery.start_soon(filled.remove, "seventh")
        await until_in_line(filled.records, 2)
    assert ids(root) == ["1", "2", "3", "4", "5", "6"]
    assert os.listdir(root / "trash") == []
    assert caplog.text == ""


async def test_cleanup_with_nothing_to_do(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.cleanup()
    await snapshotter.cleanup()
    assert ids(root) == []


# -- many at once


async def test_many_tasks_at_once(snapshotter: Snapshotter, root: Path) -> None:
    async def life(number: int) -> None:
        await snapshotter.prepare(f"k{number}", "base" if number % 2 else None, {"n": str(number)})
        (root / f"snapshots/{(await snapshotter.stat(f'k{number}')).id}/fs/mine").write_text(str(number))
        if number % 3 == 0:
            await snapshotter.commit(f"c{number}", f"k{number}")
            assert (await snapshotter.usage(f"c{number}")).inodes == 2
        elif number % 3 == 1:
            await snapshotter.remove(f"k{number}")
        else:
            await snapshotter.update(f"k{number}", {"n": "new"})

    await committed(snapshotter, "base")
    async with trio.open_nursery() as nursery:
        for number in range(90):
            nursery.start_soon(life, number)
    infos = {info.name: info for info in await snapshotter.walk()}
    assert set(infos) == {"base"} | {f"{'ck'[number % 3 // 2]}{number}" for number in range(90) if number % 3 != 1}
    assert len({info.id for info in infos.values()}) == 61
    assert ids(root) == sorted(str(info.id) for info in infos.values())
    for name, info in infos.items():
        if name != "base":
            assert (root / f"snapshots/{info.id}/fs/mine").read_text() == name[1:]
            assert info.labels == ({} if name[0] == "c" else {"n": "new"})


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A growing list of the descriptors that were synced."""
    seen: list[int] = []
    fsync = os.fsync

    def counting(fd: int) -> None:
        seen.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", counting)
    return seen


@pytest.mark.durable
@async_only
async def test_one_sync_serves_all_that_wait(
    snapshotter: Snapshotter, syncs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotter.layers.pool, "_ready", DryPool())
    async with trio.open_nursery() as nursery, held_writer(snapshotter):
        for number in range(BATCH):
            nursery.start_soon(snapshotter.prepare, f"k{number}")
        await until_in_line(snapshotter.records, BATCH)
        assert await snapshotter.walk() == []
        assert snapshotter._root.fd not in syncs
    assert len(await snapshotter.walk()) == BATCH
    assert snapshotter.records.batches[BATCH] == 1
    assert syncs.count(snapshotter._root.fd) == 1


@async_only
async def test_of_two_who_prepare_one_key_exactly_one_wins(snapshotter: Snapshotter, root: Path) -> None:
    outcomes: list[str] = []

    async def client(what: str) -> None:
        try:
            await getattr(snapshotter, what)("k", labels={"by": what})
            outcomes.append(what)
        except AlreadyExists:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery, held_writer(snapshotter):  # both in one batch
        for what in ("prepare", "view", "prepare"):
            nursery.start_soon(client, what)
        await until_in_line(snapshotter.records, 3)
    assert outcomes.count("refused") == 2
    (winner,) = [outcome for outcome in outcomes if outcome != "refused"]
    (info,) = await snapshotter.walk()
    assert info.labels == {"by": winner}
    assert ids(root) == ["1"]


@async_only
async def test_of_many_calls_one_after_the_other_each_finds_the_former_done(snapshotter: Snapshotter) -> None:
    """Also inside one batch: a Prepare on the snapshot that a Commit before it makes."""
    await snapshotter.prepare("b")
    done: list[str] = []

    async def call(what: str, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        await function(*arguments)
        done.append(what)

    async with trio.open_nursery() as nursery, held_writer(snapshotter):
        calls: list[tuple[str, Callable[..., Awaitable[object]], tuple[object, ...]]] = [
            ("commit", snapshotter.commit, ("base", "b")),
            ("prepare", snapshotter.prepare, ("web", "base")),
            ("update", snapshotter.update, ("web", {"a": "b"})),
            ("rename", snapshotter.rename, ("web", "web2")),
        ]
        for number, (what, function, arguments) in enumerate(calls, 1):
            nursery.start_soon(call, what, function, *arguments)
            await until_in_line(snapshotter.records, number)
    assert sorted(done) == ["commit", "prepare", "rename", "update"]
    assert (await snapshotter.stat("web2")).parent == "base"
    assert (await snapshotter.stat("web2")).labels == {"a": "b"}


@async_only
async def test_a_call_cancelled_while_it_waits_has_not_happened(snapshotter: Snapshotter, root: Path) -> None:
    ended: list[str] = []

    async def prepare() -> None:
        try:
            await snapshotter.prepare("k")
            ended.append("done")
        except trio.Cancelled:
            ended.append("cancelled")
            raise

    async with held_writer(snapshotter):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare)
            await until_in_line(snapshotter.records, 1)
            nursery.cancel_scope.cancel()
        assert ended == ["cancelled"]
    await snapshotter.prepare("after")
    assert [info.name for info in await snapshotter.walk()] == ["after"]
    assert ids(root) == ["1"]


@async_only
@pytest.mark.durable
async def test_a_call_cancelled_under_way_is_done(
    snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = trio.Event(), threading.Event()
    place = snapshotter.layers.place
    results: list[object] = []

    def slowly(number: int, kind: Kind, top: FsTemplate) -> None:
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(20)
        place(number, kind, top)

    async def prepare() -> None:
        results.append(await snapshotter.prepare("k"))

    monkeypatch.setattr(snapshotter.layers, "place", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prepare)
        await begun.wait()
        nursery.cancel_scope.cancel()
        go_on.set()
    assert results == [await snapshotter.mounts("k")]
    assert ids(root) == ["1"]


async def test_listeners_hear_of_each_change_before_its_call_returns(snapshotter: Snapshotter) -> None:
    told: list[tuple[str | None, str | None]] = []

    def listen(change: Change) -> None:
        if not change.counted:
            told.append((change.before.name if change.before else None, change.after.name if change.after else None))

    snapshotter.subscribe(listen)
    await snapshotter.prepare("a")
    assert told == [(None, "a")]
    await snapshotter.rename("a", "b")
    assert told[1:] == [("a", "b")]
    await snapshotter.commit("c", "b")
    assert told[2:] == [("b", "c")]
    await snapshotter.update("c", {"x": "y"})
    assert told[3:] == [("c", "c")]
    await snapshotter.remove("c")
    assert told[4:] == [("c", None)]


# -- close

AFTER_CLOSE: list[Call] = [
    lambda s: s.prepare("k"),
    lambda s: s.view("k"),
    lambda s: s.commit("n", "web"),
    lambda s: s.remove("web"),
    lambda s: s.rename("web", "k"),
    lambda s: s.update("web", {}),
    lambda s: s.move_label("web", "a", "b"),
    lambda s: s.stat("web"),
    lambda s: s.mounts("web"),
    lambda s: s.usage("web"),
    lambda s: s.walk(),
    lambda s: s.cleanup(),
    lambda s: s.flush(),
]


async def test_close_twice_is_fine_and_every_call_after_it_is_refused(open_snapshotter: Opener, root: Path) -> None:
    went_on = False
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        await snapshotter.close()
        await snapshotter.close()
        for call in AFTER_CLOSE:
            with pytest.raises(Unavailable, match="closed"):
                await call(snapshotter)
        with pytest.raises(Unavailable, match="closed"):
            snapshotter.space()
        went_on = True
    assert went_on
    await snapshotter.close()
    async with open_snapshotter(root) as again:
        assert [info.name for info in await again.walk()] == ["web"]


async def test_close_by_several_at_once(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as snapshotter, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(snapshotter.close)


@async_only
async def test_closing_finishes_the_writes_that_wait(open_snapshotter: Opener, root: Path) -> None:
    results: list[str] = []
    async with open_snapshotter(root) as snapshotter:

        async def prepare(key: str) -> None:
            await snapshotter.prepare(key)
            results.append(key)

        async with trio.open_nursery() as nursery, held_writer(snapshotter):
            for number in range(10):
                nursery.start_soon(prepare, f"k{number}")
            await until_in_line(snapshotter.records, 10)
            nursery.start_soon(snapshotter.close)
            await trio.testing.wait_all_tasks_blocked()
    assert len(results) == 10
    async with open_snapshotter(root) as again:
        assert len(await again.walk()) == 10


@async_only
async def test_closing_while_a_scan_is_under_way(open_snapshotter: Opener, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan is stopped; who waits for it is told that the snapshotter is closed."""
    scanning = trio.Event()

    def endless(directory: str, checkpoint: Callable[[], None]) -> Usage:
        trio.from_thread.run_sync(scanning.set)
        while True:
            checkpoint()

    outcomes: list[str] = []
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.prepare("b")
        monkeypatch.setattr("snapfs.services.counting.disk_usage", endless)
        await snapshotter.commit("c", "b")

        async def ask(key: str) -> None:
            try:
                await snapshotter.usage(key)
            except Unavailable as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a")
            nursery.start_soon(ask, "c")
            await scanning.wait()
            await snapshotter.close()
    assert outcomes == ["the snapshotter is closed"] * 2
    monkeypatch.undo()
    async with open_snapshotter(root) as again:
        assert (await again.usage("c")).inodes == 1


@pytest.fixture
def open_files() -> Iterator[None]:
    """What is open before the test is open after it, and nothing else."""
    before = set(own_descriptors())
    yield
    assert set(own_descriptors()) == before


async def test_closing_leaves_no_open_file_and_an_empty_pool(open_snapshotter: Opener, root: Path, open_files: None) -> None:
    async with open_snapshotter(root) as snapshotter:
        await committed(snapshotter, "base")
        await snapshotter.prepare("web", "base")
        await snapshotter.remove("web")
        await snapshotter.usage("base")
    assert os.listdir(root / "pool") == []
    assert os.listdir(root / "trash") == []


async def test_an_error_in_the_block_comes_out_as_it_is(open_snapshotter: Opener, root: Path) -> None:
    async def block() -> None:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("web")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await block()
    async with open_snapshotter(root) as again:
        assert (await again.stat("web")).id == 1


async def test_a_cancelled_block_is_closed(open_snapshotter: Opener, root: Path) -> None:
    with trio.move_on_after(20) as scope:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("web")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(Unavailable):
        snapshotter.space()
    async with open_snapshotter(root) as again:
        assert (await again.stat("web")).id == 1


async def test_what_was_done_is_there_after_reopening(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await committed(snapshotter, "base")
        await snapshotter.prepare("web", "base", {"a": "b"})
        await snapshotter.view("peek", "base")
        await snapshotter.update("web", {"c": "d"})
        await snapshotter.rename("peek", "look")
        before = await snapshotter.walk()
        mounts = [await snapshotter.mounts(key) for key in ("web", "look")]
    async with open_snapshotter(root) as again:
        assert await again.walk() == before
        assert [await again.mounts(key) for key in ("web", "look")] == mounts


@pytest.mark.parametrize(
    ("filters", "selected"),
    [
        (["name==c1"], 1),
        (["name==c1", "name==peek"], 2),
        (["name==nobody"], 0),
        (["kind==view"], 1),
        (["kind==active,parent==base"], 5),
        (["parent==base"], 6),
        (["parent==nobody"], 0),
        (["kind==other"], 0),
        (["name==peek,kind==active"], 0),
        (['parent==""'], 1),
        (["parent==base", "labels.x"], 6),
    ],
)
@async_only
async def test_a_walk_reads_no_more_than_filters_select(
    snapshotter: Snapshotter, filters: list[str], selected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")
    for number in range(5):
        await snapshotter.prepare(f"c{number}", "base", labels={"x": str(number)})
    await snapshotter.view("peek", "base")
    everything = await snapshotter.walk()
    read: list[str] = []

    def shown(info: Info) -> Info:
        read.append(info.name)
        return info

    monkeypatch.setattr(snapshotter, "shown", shown)
    found = await snapshotter.walk(*filters)
    assert len(found) == selected
    assert found == [info for info in everything if Filters(filters).holds(info)]
    indexed = Filters(filters).selection is not None
    assert indexed == all("labels" not in text and '""' not in text for text in filters)
    assert len(read) <= (len(found) + 5 if indexed else 7)


async def test_filters_are_read_in_a_worker_thread(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be long, and the loop is everybody's."""
    threads: list[threading.Thread] = []

    def noted(filters: tuple[str, ...]) -> Filters:
        threads.append(threading.current_thread())
        return Filters(filters)

    monkeypatch.setattr("snapfs.snapshotter.Filters", noted)
    with pytest.raises(InvalidArgument):
        await snapshotter.walk("name=")
    assert await snapshotter.walk("name==a") == []
    assert threading.main_thread() not in threads
    assert len(threads) == 2


@async_only
async def test_changes_of_what_is_removed_before_the_scan_begins(snapshotter: Snapshotter) -> None:
    """The scans run two at a time: the third begins when its layer is gone, and that is no damage."""
    for key in ("a", "b", "web"):
        await snapshotter.prepare(key)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait(lines: Iterable[str]) -> None:
        begun.release()
        go_on.wait(10)

    async def refused() -> None:
        with pytest.raises(NotFound):
            await snapshotter.changes("web", list)

    async with trio.open_nursery() as nursery:
        for key in ("a", "b"):
            nursery.start_soon(snapshotter.changes, key, wait)
            await trio.to_thread.run_sync(begun.acquire)
        nursery.start_soon(refused)
        await trio.testing.wait_all_tasks_blocked()
        await snapshotter.remove("web")
        go_on.set()
