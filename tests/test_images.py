"""images/: names of committed snapshots, in the library, in the tree, by the command and on containerd's socket.  Each is
given, changed and taken away whole, and what has one is not removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import trio

from snapfs import Kind, Options, Snapshotter, imagenames, open_snapshotter
from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    HasChildren,
    InvalidArgument,
    Named,
    NameTooLong,
    NotFound,
    NotPermitted,
    NotUtf8,
    Pinned,
    TooManyNames,
    Unavailable,
)
from snapfs.fuse.errno import errno_of
from snapfs.model import Change
from snapfs.offline.checking import Finding, Problem, check
from snapfs.offline.rebuilding import rebuild
from snapfs.options import Sync
from snapfs.root import imprint
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import SCHEMA, ImageName
from snapfs.tree import Tree
from snapfs.tree.replacing import LATELY, MOST, JustNamed
from tests.command import Command
from tests.containerd_client import connected
from tests.daemon import Daemon
from tests.doors import DOORS, Opener
from tests.processes import until
from tests.records import check_indexes
from tests.refusals import failing, refused
from tests.tree import REMOVERS, committed, listing, remove_all, shell, usage

Make = Callable[..., Daemon]

WORDS = 'snapshot "v1" is called "shop:1" in images/, which keeps it: take the name away first (snapfs rm --image shop:1)'


async def commit(snapshotter: Snapshotter, name: str, parent: str | None = None) -> None:
    await snapshotter.prepare(f"{name}-draft", parent)
    await snapshotter.commit(name, f"{name}-draft")


async def names_of(snapshotter: Snapshotter) -> dict[str, str]:
    return {image.name: image.info.name for image in await snapshotter.images()}


# -- the library


@pytest.fixture(params=DOORS)
async def door(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Snapshotter]:
    opener: Opener = DOORS[request.param]
    async with opener(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "v1")
        await commit(snapshotter, "v2", "v1")
        yield snapshotter


async def test_names_come_change_and_go(door: Snapshotter) -> None:
    assert await door.images() == []
    named = await door.name_image("v1", "shop:1")
    assert (named.name, named.images) == ("v1", ("shop:1",))
    await door.name_image("v1", "docker.io/library/shop:latest")
    await door.name_image("v2", "shop:2")
    assert await names_of(door) == {"shop:1": "v1", "docker.io/library/shop:latest": "v1", "shop:2": "v2"}
    assert (await door.images())[0].info == await door.stat("v1")
    await door.rename_image("shop:1", "shop:old")
    assert (await door.stat("v1")).images == ("shop:old", "docker.io/library/shop:latest")
    await door.unname_image("shop:old")
    await door.unname_image("docker.io/library/shop:latest")
    assert (await door.stat("v1")).images == ()
    assert await names_of(door) == {"shop:2": "v2"}
    check_indexes(door.records)


async def test_a_name_in_use_is_refused_or_moves(door: Snapshotter) -> None:
    await door.name_image("v1", "shop")
    for key in ("v1", "v2"):
        with pytest.raises(AlreadyExists, match=r'^snapshot "v1" is already called "shop" in images/$'):
            await door.name_image(key, "shop")
    await door.name_image("v2", "other")
    with pytest.raises(AlreadyExists, match='"v2" is already called "other"'):
        await door.rename_image("shop", "other")
    await door.name_image("v1", "shop", replace=True)
    assert await names_of(door) == {"shop": "v1", "other": "v2"}
    await door.name_image("v2", "shop", replace=True)
    assert await names_of(door) == {"other": "v2", "shop": "v2"}
    await door.rename_image("other", "shop", replace=True)
    await door.rename_image("shop", "shop")
    assert await names_of(door) == {"shop": "v2"}
    await door.name_image("v1", "one")
    await door.rename_image("one", "shop", replace=True)
    assert await names_of(door) == {"shop": "v1"}
    check_indexes(door.records)


async def test_what_is_refused_changes_nothing(door: Snapshotter) -> None:
    await door.prepare("web", "v1")
    await door.view("peek", "v1")
    for key in ("web", "peek"):
        with pytest.raises(FailedPrecondition, match=f'snapshot "{key}" is .*: only committed ones have names in images/'):
            await door.name_image(key, "shop")
    for call in (door.name_image("nothing", "shop"), door.unname_image("shop"), door.rename_image("shop", "other")):
        with pytest.raises(NotFound):
            await call
    for name, error in {"": InvalidArgument, "x" * 256: NameTooLong, "\udcff": NotUtf8, "\n" * 86: NameTooLong}.items():
        with pytest.raises(error):
            await door.name_image("v1", name)
        await door.name_image("v1", "it")
        with pytest.raises(error):
            await door.rename_image("it", name)
        await door.unname_image("it")
        with pytest.raises(NotFound):
            await door.unname_image(name)
    assert await door.images() == []


@pytest.mark.parametrize("name", [".", "..", "a/b", "line\nbreak", "%2F", "-rf", "é\u202e", "x" * 255, "\x00", " "])
async def test_any_key_can_be_a_name(door: Snapshotter, name: str) -> None:
    await door.name_image("v2", name)
    assert await names_of(door) == {name: "v2"}
    await door.rename_image(name, "shop")
    await door.rename_image("shop", name)
    with pytest.raises(Named) as refusal:
        await door.remove("v2")
    assert "\n" not in str(refusal.value)
    await door.unname_image(name)
    assert await door.images() == []


async def test_what_has_a_name_is_not_removed(door: Snapshotter) -> None:
    await door.name_image("v1", "shop:1")
    with pytest.raises(HasChildren):
        await door.remove("v1")
    await door.remove("v2")
    with pytest.raises(Named) as caught:
        await door.remove("v1")
    assert str(caught.value) == WORDS
    assert errno_of(caught.value) == errno.EBUSY
    await door.name_image("v1", "b")
    with pytest.raises(Named, match=r'is called "shop:1" and 1 more in images/'):
        await door.remove("v1")
    await door.update("v1", {"pin": "yes"})
    with pytest.raises(Pinned):
        await door.remove("v1")
    await door.update("v1", {})
    await door.unname_image("shop:1")
    with pytest.raises(Named):
        await door.remove("v1")
    await door.unname_image("b")
    await door.remove("v1")
    assert await door.walk() == []


async def test_names_follow_a_snapshot(door: Snapshotter) -> None:
    """Through another name, another label, children and their states; a squash has none of them."""
    await door.name_image("v1", "shop")
    await door.rename("v1", "renamed")
    await door.update("renamed", {"team": "blue"})
    await door.prepare("web", "renamed")
    checkpoint = await door.checkpoint("web")
    await door.name_image(checkpoint.name, "kept")
    await door.rollback("web")
    await door.rollback("web", 0)
    assert await names_of(door) == {"shop": "renamed", "kept": "web@1"}
    squash = await door.squash("v2", "flat")
    assert squash.images == ()
    assert (await door.fork("renamed", "other")).images == ()
    check_indexes(door.records)


async def test_dissolving(door: Snapshotter) -> None:
    """What has a name stays; what stands on one that goes, and becomes another snapshot, keeps its names."""
    await door.name_image("v1", "shop:1")
    with pytest.raises(Named) as caught:
        await door.dissolve("v1")
    assert str(caught.value) == WORDS
    await door.unname_image("shop:1")
    await door.name_image("v2", "shop:2")
    before = (await door.stat("v2")).id
    await door.dissolve("v1")
    after = await door.stat("v2")
    assert (after.images, after.parent, after.id > before) == (("shop:2",), None, True)
    assert await names_of(door) == {"shop:2": "v2"}
    check_indexes(door.records)


async def test_there_are_as_many_names_as_a_record_has_room_for(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await commit(snapshotter, "v1")
    for n in range(imagenames.MOST):
        await snapshotter.name_image("v1", f"{n:0255}")
    with pytest.raises(TooManyNames, match=r'"v1" has 256 names in images/; at most 256 fit') as caught:
        await snapshotter.name_image("v1", "one more")
    assert errno_of(caught.value) == errno.EMLINK
    await snapshotter.rename_image(f"{0:0255}", "renamed")
    assert len((await snapshotter.stat("v1")).images) == 256
    snapshotter.layers.write_imprint(1, imprint.Imprint(snapshotter.record(1)))
    assert (await trio.to_thread.run_sync(imprint.read, snapshotter.layers.directory(1))) is not None


async def test_names_outlive_the_process(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await commit(snapshotter, "v1")
        await snapshotter.name_image("v1", "shop")
    async with open_snapshotter(root) as snapshotter:
        assert await names_of(snapshotter) == {"shop": "v1"}
        last = snapshotter.statistics().last_id
        await snapshotter.prepare("web")
        assert (await snapshotter.stat("web")).id == last + 1, "no snapshot has the number of a name"


async def test_records_of_an_earlier_snapfs(root: Path) -> None:
    """They have neither names nor tables for them."""
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "v1")
    with closing(MetaStore(str(root / "metadata.mdb"))) as store, store.environment.env.begin(write=True) as txn:
        raw = txn.get(b"\0" * 7 + b"\1", b"", db=store.tables.snapshots)
        earlier = msgspec.msgpack.encode(msgspec.msgpack.decode(raw)[:9])
        txn.put(b"\0" * 7 + b"\1", earlier, db=store.tables.snapshots)
        txn.put(b"schema", b"2", db=store.tables.meta)
        txn.drop(store.tables.images)
        txn.drop(store.tables.image_names)
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        assert (await snapshotter.stat("v1")).images == ()
        await snapshotter.name_image("v1", "shop")
        assert await names_of(snapshotter) == {"shop": "v1"}
        assert await snapshotter.image("v1") is None
        with snapshotter.records.environment.env.begin() as txn:
            assert txn.get(b"schema", db=snapshotter.records.tables.meta) == str(SCHEMA).encode(), "an older one refuses it"
        check_indexes(snapshotter.records)


async def test_a_removal_and_a_name_at_once(snapshotter: Snapshotter) -> None:
    """Whichever comes first, the other is refused."""
    for n in range(20):
        await commit(snapshotter, f"v{n}")
        outcomes: list[object] = []

        async def attempt(call: Any, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(await call)
            except (NotFound, Named) as error:
                outcomes.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt, snapshotter.remove(f"v{n}"))
            nursery.start_soon(attempt, snapshotter.name_image(f"v{n}", f"image{n}"))
        there = {info.name for info in await snapshotter.walk()}
        assert (f"v{n}" in there) == (f"image{n}" in await names_of(snapshotter))
        assert sum(isinstance(outcome, Exception) for outcome in outcomes) == 1
    check_indexes(snapshotter.records)


async def test_two_who_want_one_name(snapshotter: Snapshotter) -> None:
    await commit(snapshotter, "v1")
    await commit(snapshotter, "v2")
    refusals = []

    async def name(key: str) -> None:
        try:
            await snapshotter.name_image(key, "shop")
        except AlreadyExists as error:
            refusals.append(error)

    async with trio.open_nursery() as nursery:
        for key in ("v1", "v2", "v1"):
            nursery.start_soon(name, key)
    assert len(refusals) == 2
    assert len(await snapshotter.images()) == 1


async def test_a_full_disk_changes_nothing(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name that moves, both snapshots and their directories stay as they were, whichever of them has no room."""
    await commit(snapshotter, "v1")
    await commit(snapshotter, "v2")
    await snapshotter.name_image("v1", "shop")
    borne = [imprint.read(snapshotter.layers.directory(number)) for number in (1, 2)]
    write = imprint.write
    for full in ("/1", "/2"):

        def refuse(directory: str, written: imprint.Imprint, full: str = full) -> None:
            if directory.endswith(full) and written not in borne:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(directory, written)

        monkeypatch.setattr(imprint, "write", refuse)
        with pytest.raises(Unavailable) as caught:
            await snapshotter.name_image("v2", "shop", replace=True)
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert await names_of(snapshotter) == {"shop": "v1"}
        assert [imprint.read(snapshotter.layers.directory(number)) for number in (1, 2)] == borne
    await snapshotter.name_image("v2", "shop", replace=True)
    check_indexes(snapshotter.records)


async def test_listeners_are_told(snapshotter: Snapshotter) -> None:
    await commit(snapshotter, "v1")
    await commit(snapshotter, "v2")
    changes: list[Change] = []
    snapshotter.subscribe(changes.append)
    await snapshotter.name_image("v1", "shop")
    await snapshotter.name_image("v2", "shop", replace=True)
    told = [(change.before and change.before.images, change.after and change.after.images) for change in changes]
    assert told == [((), ("shop",)), (("shop",), ()), ((), ("shop",))]


async def test_a_damaged_record_goes_with_its_names(snapshotter: Snapshotter) -> None:
    await commit(snapshotter, "v1")
    await commit(snapshotter, "v2")
    await snapshotter.name_image("v1", "shop")
    await snapshotter.name_image("v2", "other")

    def spoil(writer: Any) -> None:
        writer._txn.put((1).to_bytes(8, "big"), b"nonsense", db=writer._tables.snapshots)

    await snapshotter.records.write(spoil)
    with pytest.raises(Damaged):
        await snapshotter.images()
    with pytest.raises(Damaged):
        await snapshotter.unname_image("shop")
    tree = Tree(snapshotter)
    with pytest.raises(Damaged):
        tree.walk("images/shop").target()
    assert tree.walk("images/shop").attributes().size > 0
    await snapshotter.remove("v1")
    assert await names_of(snapshotter) == {"other": "v2"}
    check_indexes(snapshotter.records)


# -- the tree, without a mount


@pytest.fixture
async def tree(snapshotter: Snapshotter) -> Tree:
    await commit(snapshotter, "v1")
    await commit(snapshotter, "a/b")
    return Tree(snapshotter, {"mountpoint": "/mnt/snap"})


async def link(tree: Tree, name: str, target: str, pid: int = 1) -> str:
    return (await tree.walk("images").symlink(name, target, pid)).target()


@pytest.mark.parametrize(
    "target",
    [
        "../committed/v1",
        "../committed/v1/",
        "../committed/./v1",
        ".././committed//v1",
        "../images/../committed/v1",
        "/mnt/snap/committed/v1",
        "/mnt/../mnt/snap//committed/v1/",
        "//mnt/snap/committed/v1",
    ],
)
async def test_where_a_link_may_lead(tree: Tree, target: str) -> None:
    assert await link(tree, "shop", target) == "../committed/v1"
    assert tree.walk("images/shop").path == "images/shop"
    assert tree.node(tree.walk("images/shop").inode).target() == "../committed/v1"


@pytest.mark.parametrize(
    "target",
    [
        *("/etc", "v1", "../active/v1", "../committed", "../committed/", "../../committed/v1", "/committed/v1", "../by-id/1"),
        *("/", "../committed/v1/rootfs", "/mnt/snapcommitted/v1", "", "../committed/v1/../..", "x" * 4000),
    ],
)
async def test_where_it_may_not(tree: Tree, target: str) -> None:
    with pytest.raises(
        NotPermitted, match=r"leads elsewhere than to a committed snapshot of this tree: ln -s ../committed/"
    ) as no:
        await link(tree, "shop", target)
    assert len(str(no.value)) < 600
    assert list(tree.walk("images").entries(0)) == []


@pytest.mark.parametrize("name", ["v2", "V1", "a", "%41", "a%2fb", "x" * 300])
async def test_where_there_is_no_snapshot(tree: Tree, name: str) -> None:
    with pytest.raises(NotFound):
        await link(tree, "shop", f"../committed/{name}")


async def test_where_there_is_no_committed_one(tree: Tree, snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("web")
    with pytest.raises(NotFound, match='there is no committed snapshot "web" to be called "shop"'):
        await link(tree, "shop", "../committed/web")
    with pytest.raises(NotUtf8):
        await link(tree, "shop", "../committed/\udcff")


async def test_file_names_are_those_of_keys(tree: Tree) -> None:
    assert await link(tree, "docker.io%2Flibrary%2Fshop:1", "../committed/a%2Fb") == "../committed/a%2Fb"
    assert await names_of(tree.snapshotter) == {"docker.io/library/shop:1": "a/b"}
    for name, error in {"a%2fb": InvalidArgument, "x" * 256: NameTooLong, "\udcff": NotUtf8, "..": InvalidArgument}.items():
        with pytest.raises(error):
            await link(tree, name, "../committed/v1")
        with pytest.raises(NotFound):
            tree.walk(f"images/{name}")
        with pytest.raises((NotPermitted, NameTooLong, NotUtf8)):
            tree.what_rename_means(tree.walk("images"), "docker.io%2Flibrary%2Fshop:1", tree.walk("images"), name)


async def test_listing_goes_on_where_it_was(tree: Tree) -> None:
    """An entry keeps its offset whatever comes and goes, and its inode through a rename."""
    for n in range(5):
        await link(tree, f"i{n}", "../committed/v1")
    images = tree.walk("images")
    with closing(images.entries(0)) as entries:  # type: ignore[type-var]
        listed = {name: (offset, node.inode) for offset, name, node in entries}
    assert list(listed) == ["i0", "i1", "i2", "i3", "i4"]
    await images.unlink("i0", 1)
    await images.unlink("i2", 1)
    await tree.rename(images, "i3", images, "renamed")
    with closing(images.entries(listed["i1"][0])) as entries:  # type: ignore[type-var]
        rest = {name: (offset, node.inode) for offset, name, node in entries}
    assert rest == {"renamed": listed["i3"], "i4": listed["i4"]}
    with pytest.raises(NotFound):
        tree.node(listed["i0"][1])


async def test_only_who_has_just_made_a_name_replaces_one_by_it(tree: Tree) -> None:
    await link(tree, "shop", "../committed/v1")
    await link(tree, "tmp", "../committed/a%2Fb", 7)
    images = tree.walk("images")
    for pid, replace in ((8, True), (7, False)):
        with pytest.raises(AlreadyExists):
            tree.what_rename_means(images, "tmp", images, "shop", pid=pid, replace=replace)
    await tree.what_rename_means(images, "tmp", images, "shop", pid=7).carry_out()
    assert await names_of(tree.snapshotter) == {"shop": "a/b"}


def test_what_was_just_made_is_soon_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    made = JustNamed()
    made.note(1, 7)
    assert made.is_by(1, 7)
    assert not made.is_by(1, 8)
    now += LATELY + 1
    assert not made.is_by(1, 7)
    for nth in range(2, MOST + 10):
        made.note(nth, 7)
    assert not made.is_by(1, 7)
    assert len(made._made) == MOST


async def test_all_else_in_images_is_refused(tree: Tree) -> None:
    await link(tree, "shop", "../committed/v1")
    images, active = tree.walk("images"), tree.walk("active")
    with pytest.raises(NotPermitted, match=r"a directory can't be made in images: it has names of .*; ln -s"):
        await images.mkdir("x")
    with pytest.raises(NotPermitted, match=r"a file can't be made in images: .*; ln -s"):
        await images.create("x")
    with pytest.raises(NotPermitted, match="images/shop is a link: rm takes it away"):
        await images.rmdir("shop", 1)
    with pytest.raises(NotPermitted, match="can only be renamed within images/"):
        tree.what_rename_means(images, "shop", active, "x")
    with pytest.raises(NotPermitted, match=r"committed snapshots can't be moved to images/: ln -s"):
        tree.what_rename_means(tree.walk("committed"), "v1", images, "x")
    with pytest.raises(NotPermitted, match="a link can't be made in active"):
        await active.symlink("x", "../committed/v1", 1)
    assert await names_of(tree.snapshotter) == {"shop": "v1"}


async def test_info_json_tells_the_names(tree: Tree) -> None:
    info = tree.walk("committed/v1/info.json")
    assert "images" not in json.loads(info.text().read(0, 9999))  # type: ignore[attr-defined]
    await link(tree, "b/c".replace("/", "%2F"), "../committed/v1")
    shown = json.loads(tree.walk("committed/v1/info.json").text().read(0, 9999))  # type: ignore[attr-defined]
    assert shown["images"] == ["b/c"]


# -- the mounted tree


@pytest.fixture
def daemon(module_daemon: Daemon) -> Iterator[Daemon]:
    yield module_daemon
    remove_all(module_daemon.mnt)


@pytest.fixture
def mnt(daemon: Daemon) -> Path:
    return daemon.mnt


def ln(mnt: Path, *words: str) -> None:
    done = subprocess.run(["ln", *words], cwd=mnt, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_life_of_names(daemon: Daemon) -> None:
    mnt = daemon.mnt
    committed(mnt, "v1", content="one")
    committed(mnt, "v2", content="two")
    ln(mnt, "-s", "../committed/v1", "images/shop:1")
    ln(mnt, "-s", str(mnt / "committed/v2"), "images/shop:2")
    assert {name: os.readlink(mnt / "images" / name) for name in os.listdir(mnt / "images")} == {
        "shop:1": "../committed/v1",
        "shop:2": "../committed/v2",
    }
    (mnt / "images/shop:1/active/web").mkdir()
    assert json.loads((mnt / "active/web/info.json").read_text())["parent"] == "v1"
    os.rename(mnt / "committed/v1", mnt / "committed/renamed")
    assert os.readlink(mnt / "images/shop:1") == "../committed/renamed"
    assert os.lstat(mnt / "images/shop:1").st_size == len("../committed/renamed")
    os.rename(mnt / "images/shop:1", mnt / "images/shop:old")
    assert (mnt / "images/shop:old/diff/file").read_text() == "one"
    assert not os.path.lexists(mnt / "images/shop:1")
    os.unlink(mnt / "images/shop:old")
    assert os.listdir(mnt / "images") == ["shop:2"]
    with refused(daemon, errno.EBUSY, "rmdir", "committed/v2", 'is called "shop:2" in images/, which keeps it'):
        os.rmdir(mnt / "committed/v2")
    os.unlink(mnt / "images/shop:2")
    os.rmdir(mnt / "committed/v2")


@pytest.mark.parametrize("by", ["ln", "busybox ln"])
def test_ln_moves_a_name(daemon: Daemon, by: str) -> None:
    mnt = daemon.mnt
    committed(mnt, "v1")
    committed(mnt, "v2")
    ln(mnt, "-s", "../committed/v1", "images/shop")
    for target in ("v2", "v2", "v1", "v1"):
        done = shell(mnt, f"{by} -sfn ../committed/{target} images/shop")
        assert (done.returncode, done.stderr) == (0, ""), target
        assert os.listdir(mnt / "images") == ["shop"]
        assert os.readlink(mnt / "images/shop") == f"../committed/{target}"
    done = shell(mnt, f"{by} -sf ../committed/v2 images/other && cd images && {by} -sfT ../committed/v2 shop")
    assert (done.returncode, done.stderr) == (0, "")
    assert {os.readlink(mnt / "images" / name) for name in os.listdir(mnt / "images")} == {"../committed/v2"}
    assert shell(mnt, f"{by} -sfn ../committed/v3 images/shop").returncode == 1
    assert os.listdir(mnt / "images") == (["other", "shop"] if by == "ln" else ["other"])


def test_python_replaces_a_link(mnt: Path) -> None:
    committed(mnt, "v1")
    committed(mnt, "v2")
    os.symlink("../committed/v1", mnt / "images/shop")
    os.symlink("../committed/v2", mnt / "images/new")
    os.replace(mnt / "images/new", mnt / "images/shop")
    assert os.readlink(mnt / "images/shop") == "../committed/v2"
    assert os.listdir(mnt / "images") == ["shop"]


def test_mv_replaces_nothing(daemon: Daemon) -> None:
    mnt = daemon.mnt
    committed(mnt, "v1")
    committed(mnt, "v2")
    ln(mnt, "-s", "../committed/v1", "images/a")
    ln(mnt, "-s", "../committed/v2", "images/b")
    before = listing(mnt)
    done = shell(mnt, "mv -T images/a images/b")
    assert (done.returncode, "File exists" in done.stderr) == (1, True)
    assert 'EEXIST rename images/a images/b: snapshot "v2" is already called "b" in images/' in daemon.error_log()[-1]
    assert listing(mnt) == before
    assert shell(mnt, "mv -T images/a images/c").returncode == 0
    assert sorted(os.listdir(mnt / "images")) == ["b", "c"]


REFUSALS = [
    ("ln -s ../committed/none images/x", errno.ENOENT, 'there is no committed snapshot "none"'),
    ("ln -s /etc images/x", errno.EPERM, "/etc leads elsewhere than to a committed snapshot"),
    ("ln -s ../active/web images/x", errno.EPERM, "leads elsewhere"),
    ("ln -s ../committed/v1 images/%2e", errno.EINVAL, "no key's file name"),
    ("touch images/x", errno.EPERM, "a file can't be made in images: it has names"),
    ("mkdir images/x", errno.EPERM, "a directory can't be made in images"),
    ("mkfifo images/x", errno.EPERM, "a special file can't be made in images"),
    ("ln images/shop images/x", errno.EPERM, "a link can't be made in images"),
    ("rmdir images", errno.EPERM, "fixed"),
    ("mv images pictures", errno.EPERM, "can't be renamed"),
    ("mv images/shop active/", errno.EPERM, "can only be renamed within images/"),
    ("mv committed/v1 images/x", errno.EPERM, "can't be moved to images/: ln -s"),
    ("ln -s ../images/shop committed/x", errno.EPERM, "a link can't be made in committed"),
    ("chmod 700 images", errno.EPERM, "mode, owner and times of images can't be set"),
    ("touch -h images/shop", errno.EPERM, "mode, owner and times of images/shop can't be set"),
    ("ln -s ../committed/v1 images/$(printf '\\377')", errno.EILSEQ, "not UTF-8"),
]


def test_what_is_refused_in_words(daemon: Daemon) -> None:
    mnt = daemon.mnt
    committed(mnt, "v1")
    os.mkdir(mnt / "active/web")
    ln(mnt, "-s", "../committed/v1", "images/shop")
    before = listing(mnt)
    for command, number, words in REFUSALS:
        lines = len(daemon.error_log())
        done = shell(mnt, command)
        assert (done.returncode, os.strerror(number) in done.stderr) == (1, True), done
        (said,) = daemon.error_log()[lines:]
        assert errno.errorcode[number] in said
        assert words in said, command
    assert listing(mnt) == before


@pytest.mark.parametrize("remover", REMOVERS)
def test_who_deletes_all_of_it_touches_nothing(daemon: Daemon, remover: str) -> None:
    mnt = daemon.mnt
    committed(mnt, "v1")
    (mnt / "committed/v1/labels/a").write_text("b")
    os.symlink("../committed/v1", mnt / "images/shop")
    before = listing(mnt)
    assert shell(mnt, remover.format("committed/v1")).returncode == 1
    assert listing(mnt) == before
    os.unlink(mnt / "images/shop")
    until(lambda: shell(mnt, remover.format("committed/v1")).returncode == 0)  # no longer taken for who was refused
    assert os.listdir(mnt / "committed") == []


def test_events_tell_of_names(mnt: Path) -> None:
    committed(mnt, "v1")
    committed(mnt, "v2")
    before = (mnt / ".snapfs/events").read_text().count("\n")
    os.symlink("../committed/v1", mnt / "images/a%2Fb")
    os.rename(mnt / "images/a%2Fb", mnt / "images/c")
    ln(mnt, "-sfn", "../committed/v2", "images/c")
    os.unlink(mnt / "images/c")
    told = [json.loads(line) for line in (mnt / ".snapfs/events").read_text().splitlines()[before:]]
    said = [(event["operation"], event["key"], event["name"]) for event in told]
    assert said[:3] == [("name", "v1", "a/b"), ("unname", "v1", "a/b"), ("name", "v1", "c")]
    temporary = said[3][2]
    assert said[3:] == [
        ("name", "v2", temporary),
        ("unname", "v1", "c"),
        ("unname", "v2", temporary),
        ("name", "v2", "c"),
        ("unname", "v2", "c"),
    ]
    assert [event["number"] for event in told] == list(range(before + 1, before + 1 + len(told)))


@pytest.mark.mounts
async def test_the_kernel_is_told_of_what_it_did_not_ask_for(tmp_path: Path) -> None:
    """Names that come, change and go by the library are seen in the tree at once, also by who has just looked."""
    from snapfs.fuse.serve import MountOptions, serve_tree

    (mnt := tmp_path / "mnt").mkdir()
    ready, stop = trio.Event(), trio.Event()
    async with open_snapshotter(tmp_path / "root") as snapshotter, trio.open_nursery() as nursery:
        await commit(snapshotter, "v1")
        await commit(snapshotter, "v2")
        nursery.start_soon(serve_tree, Tree(snapshotter), str(mnt), MountOptions(), ready.set, stop)
        await ready.wait()

        def seen() -> dict[str, str]:
            times.append(os.stat(mnt / "images").st_mtime_ns)
            found: dict[str, str] = {}
            for name in ("a", "b"):
                with contextlib.suppress(FileNotFoundError):
                    found[name] = os.readlink(mnt / "images" / name)
            return found

        async def settled(expected: dict[str, str]) -> None:
            with trio.fail_after(10):
                while await trio.to_thread.run_sync(seen) != expected:
                    await trio.sleep(0.01)

        times: list[int] = []
        try:
            await settled({})
            await snapshotter.name_image("v1", "a")
            await settled({"a": "../committed/v1"})
            await snapshotter.name_image("v2", "a", replace=True)
            await settled({"a": "../committed/v2"})
            await snapshotter.rename("v2", "w2")
            await settled({"a": "../committed/w2"})
            await snapshotter.rename_image("a", "b")
            await settled({"b": "../committed/w2"})
            await snapshotter.unname_image("b")
            await settled({})
            assert len(set(times)) == 5
        finally:
            stop.set()


def test_who_may_not_change_the_tree_names_nothing(make_daemon: Make, users: None) -> None:
    mnt = make_daemon("-o", "allow_other").start().mnt
    committed(mnt, "v1")
    os.symlink("../committed/v1", mnt / "images/shop")
    alone = ["setpriv", "--reuid=60001", "--regid=60001", "--clear-groups"]
    for command in ("ln -s ../committed/v1 images/x", "rm -f images/shop", "mv images/shop images/x"):
        done = subprocess.run([*alone, "sh", "-c", command], cwd=mnt, capture_output=True, text=True, check=False)
        assert (done.returncode, "Permission denied" in done.stderr) == (1, True), command
    assert os.listdir(mnt / "images") == ["shop"]
    assert subprocess.check_output([*alone, "ls", "images"], cwd=mnt, text=True) == "shop\n"


def test_a_tree_for_reading_has_names_too(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    committed(daemon.mnt, "v1")
    os.symlink("../committed/v1", daemon.mnt / "images/shop")
    assert daemon.stop() == 0
    mnt = make_daemon("-o", "ro").start().mnt
    assert os.readlink(mnt / "images/shop") == "../committed/v1"
    with failing(errno.EROFS):
        os.unlink(mnt / "images/shop")


# -- containerd's socket


def test_containerd_removes_nothing_that_has_a_name(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("-o", f"containerd={tmp_path}/socket").start()
    with connected(tmp_path / "socket") as client:
        client.call("Prepare", key="draft")
        client.call("Commit", name="v1", key="draft")
        os.symlink("../committed/v1", daemon.mnt / "images/shop:1")
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Remove", key="v1")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert WORDS in (caught.value.details() or "")
        os.unlink(daemon.mnt / "images/shop:1")
        client.call("Remove", key="v1")


# -- the command


@pytest.fixture
def snapfs(daemon: Daemon) -> Command:
    committed(daemon.mnt, "v1", content="x" * 10_000)
    committed(daemon.mnt, "v2", "v1", content="y" * 10_000)
    os.symlink("../committed/v2", daemon.mnt / "images/shop:2")
    os.symlink("../committed/v1", daemon.mnt / "images/a%2Fb")
    return Command(daemon.mnt)


def test_snapfs_images(snapfs: Command) -> None:
    for name in ("v1", "v2"):
        usage(snapfs.mnt / "committed" / name)  # it is counted now, and not in a moment
    heads, *lines = snapfs("images").splitlines()
    assert heads.split() == ["NAME", "SNAPSHOT", "CREATED", "SIZE"]
    assert [line.split()[:2] for line in lines] == [["a/b", "v1"], ["shop:2", "v2"]]
    assert snapfs("images", "-q") == "a/b\nshop:2\n"
    one, two = json.loads(snapfs("images", "--json"))
    own = {row["name"]: row for row in json.loads(snapfs("ls", "--json"))}
    assert one == {
        "name": "a/b",
        "snapshot": "v1",
        "id": own["v1"]["id"],
        "created": own["v1"]["created"],
        "size": own["v1"]["size"],
        "labels": {},
    }
    assert (two["name"], two["size"]) == ("shop:2", own["v1"]["size"] + own["v2"]["size"])


def test_a_name_in_images_is_a_path_of_a_snapshot(snapfs: Command) -> None:
    said = f'snapfs: nothing is called "shop:3" in {snapfs.mnt}/images: snapfs images lists all names\n'
    for words in (["show"], ["prepare", "x", "--parent"], ["rm"]):
        assert snapfs(*words, "images/shop:3", status=3) == said
    assert snapfs("show", "--path", "images/shop:2") == f"{snapfs.mnt}/committed/v2\n"
    snapfs("prepare", "web", "--parent", "images/a%2Fb")
    assert json.loads((snapfs.mnt / "active/web/info.json").read_text())["parent"] == "v1"


def test_snapfs_rm_image(snapfs: Command) -> None:
    assert "which keeps it: take the name away first (snapfs rm --image shop:2)" in snapfs("rm", "v2", status=5)
    assert snapfs("rm", "--image", "images/shop:2", "a/b") == ""
    assert os.listdir(snapfs.mnt / "images") == []
    for name in ("a/b", "images/a/b", "images/a%2Fb"):  # the name, and its path, as --parent takes it and as ls shows it
        os.symlink("../committed/v2", snapfs.mnt / "images/a%2Fb")
        assert snapfs("rm", "--image", name) == ""
    for name in ("images/", "images/.", "images/..", "images/../active"):
        assert f'nothing is called "{name}"' in snapfs("rm", "--image", name, status=3)
    assert 'nothing is called "shop:2" in' in snapfs("rm", "--image", "shop:2", status=3)
    assert snapfs("rm", "--image", "-f", "shop:2") == ""
    assert "no snapshot: leave" in snapfs("rm", "--image", "-r", "shop:2", status=2)
    snapfs("rm", "-r", "v1")


def test_snapfs_prune_leaves_names(snapfs: Command) -> None:
    said = snapfs("prune", "--kind", "committed")
    assert 'kept v2: it is called "shop:2" in images/' in said
    assert 'kept v1: it is called "a/b" in images/' in said
    assert "removed 0" in said
    snapfs("rm", "--image", "a/b")
    assert 'kept v1: "v2" stands on it' in snapfs("prune", "--kind", "committed")
    snapfs("rm", "--image", "shop:2")
    assert "removed 2" in snapfs("prune", "--kind", "committed")


def test_thinning_leaves_names(make_daemon: Make) -> None:
    snapfs = Command(make_daemon().start().mnt)
    snapfs("prepare", "web")
    for _ in range(4):
        snapfs("checkpoint", "web")
    os.symlink("../committed/web@2", snapfs.mnt / "images/web")
    said = snapfs("prune", "web", "--keep-last", "1")
    assert 'kept web@2: it is called "web" in images/' in said
    assert "removed 2" in said
    assert os.readlink(snapfs.mnt / "images/web") == "../committed/web@2"
    assert sorted(snapfs.names("--kind", "committed")) == ["web@2", "web@4"]


def test_completion_of_names(snapfs: Command) -> None:
    assert snapfs("_complete", "rm", "--image", "") == "a/b\nshop:2\n"


# -- offline


async def filled(root: Path) -> None:
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "v1")
        await commit(snapshotter, "v2")
        await snapshotter.name_image("v1", "shop")
        await snapshotter.name_image("v1", "a/b")
        await snapshotter.name_image("v2", "other")


def found(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.problem is not Problem.NOTE]


async def test_check_has_nothing_to_say_and_rebuild_keeps_names(root: Path) -> None:
    await filled(root)
    assert found(check(str(root))) == []
    os.unlink(root / "metadata.mdb")
    assert found(rebuild(str(root))) == []
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        assert await names_of(snapshotter) == {"shop": "v1", "a/b": "v1", "other": "v2"}
        await snapshotter.prepare("web")
        assert (await snapshotter.stat("web")).id > 5, "the numbers of names are not given out again"
        check_indexes(snapshotter.records)


def forge(root: Path, images: dict[int, tuple[ImageName, ...]]) -> None:
    """Records and imprints with these names, which no snapfs writes."""
    with closing(MetaStore(str(root / "metadata.mdb"))) as records:

        def put(writer: Any) -> None:
            for number, names in images.items():
                record = msgspec.structs.replace(writer.record(number), images=names)
                writer.overwrite(number, record)
                imprint.write(str(root / f"snapshots/{number}"), imprint.Imprint(record))

        records.write_now(put)


@pytest.mark.parametrize(
    "images",
    [
        {1: (ImageName(3, "shop"),), 2: (ImageName(4, "shop"),)},
        {1: (ImageName(3, "a"),), 2: (ImageName(3, "shop"), ImageName(4, "shop"))},
        {1: (ImageName(1, "shop"),), 2: (ImageName(2, "shop"),)},
        {1: (), 2: (ImageName(99, "shop"),)},
    ],
)
@pytest.mark.parametrize("how", ["repair", "rebuild"])
async def test_names_that_contradict_each_other_are_told_apart(root: Path, images: Any, how: str) -> None:
    """The one that was given later stays where it is."""
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "v1")
        await commit(snapshotter, "v2")
    forge(root, images)
    wanted = {"shop": "v2", **({"a": "v1"} if images[1] and images[1][0].name == "a" else {})}
    if how == "rebuild":
        os.unlink(root / "metadata.mdb")
        list(rebuild(str(root)))
    else:
        assert found(check(str(root), repair=True))
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await snapshotter.agreeing.settled.wait()
        assert await names_of(snapshotter) == wanted
        await snapshotter.name_image("v1", "another")
        assert len({snapshotter.record(number).images for number in (1, 2)}) == 2
        check_indexes(snapshotter.records)
    assert found(check(str(root))) == []


async def test_a_backup_has_names(root: Path, tmp_path: Path) -> None:
    await filled(root)
    done = subprocess.run(
        [sys.executable, "-m", "snapfs.cli", "backup", str(root), str(tmp_path / "copy")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await snapshotter.unname_image("shop")
    shutil.copy(tmp_path / "copy", root / "metadata.mdb")
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        assert await names_of(snapshotter) == {"shop": "v1", "a/b": "v1", "other": "v2"}


async def test_a_million_names_are_found_by_an_index(snapshotter: Snapshotter) -> None:
    """Nothing that asks for one name, or for some of a listing, reads them all."""
    await commit(snapshotter, "v1")
    await snapshotter.name_image("v1", "shop")

    def fill(writer: Any) -> None:
        for nth in range(1000, 21_000):
            writer._txn.put(f"n{nth}".encode(), nth.to_bytes(8, "big") + (1).to_bytes(8, "big"), db=writer._tables.images)
            value = (1).to_bytes(8, "big") + f"n{nth}".encode()
            writer._txn.put(nth.to_bytes(8, "big"), value, db=writer._tables.image_names)

    await snapshotter.records.write(fill)
    with snapshotter.reading() as reader:
        assert next(reader.images(15_000)) == (15_001, 1, "n15001")
        assert reader.image("n20999") == (20_999, 1)
        assert reader.image_at(20_999) == (1, "n20999")
        assert reader.image_at(21_000) is None
    assert snapshotter.find_image("shop")[0] == 1
    assert Kind.COMMITTED is (await snapshotter.stat("v1")).kind
