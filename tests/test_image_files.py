"""image.json of committed snapshots: written, inherited and taken away, in the library and in the tree; whole, or as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import Options, Snapshotter, open_snapshotter
from snapfs.errors import (
    Damaged,
    FailedPrecondition,
    ImageTooBig,
    InvalidArgument,
    NotFound,
    NotPermitted,
    NotUtf8,
    TryAgain,
    Unavailable,
)
from snapfs.fuse import openfiles
from snapfs.fuse.openfiles import OpenFiles
from snapfs.imagejson import MOST
from snapfs.model import Caller
from snapfs.offline.checking import Problem, check
from snapfs.offline.rebuilding import rebuild
from snapfs.options import Sync
from snapfs.root import imagefile
from snapfs.rules import imagefiles as rules
from snapfs.rules.root import Root
from snapfs.tree import Tree, openimage
from tests.daemon import Daemon
from tests.doors import DOORS, Opener
from tests.records import check_indexes
from tests.refusals import failing, refused
from tests.tree import REMOVERS, committed, info, listing, remove_all, shell
from tests.users import ALICE

Make = Callable[..., Daemon]

CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Env": ["A=b"], "Cmd": ["/bin/sh"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:aa"]},
    "history": [{"created_by": "ADD it"}],
}
TEXT = json.dumps(CONFIG)


async def commit(snapshotter: Snapshotter, name: str, parent: str | None = None, **labels: str) -> None:
    await snapshotter.prepare(f"{name}-draft", parent, {f"snapfs.{label}": value for label, value in labels.items()})
    await snapshotter.commit(name, f"{name}-draft", keep_labels=True)


def files_of(root: Path) -> dict[int, list[str]]:
    """The files that are kept beside each layer."""
    beside = {int(path.name): sorted(each.name for each in path.iterdir()) for path in (root / "snapshots").iterdir()}
    return {number: found for number, names in beside.items() if (found := [name for name in names if "image" in name])}


# -- the library


@pytest.fixture(params=DOORS)
async def door(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Snapshotter]:
    opener: Opener = DOORS[request.param]
    async with opener(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "base")
        await commit(snapshotter, "v1", "base", message="why")
        await commit(snapshotter, "v2", "v1")
        yield snapshotter


async def test_what_is_set_is_inherited(door: Snapshotter, root: Path) -> None:
    assert await door.image("v2") is None
    before = await door.stat("base")
    after = await door.set_image("base", TEXT)
    assert (after.name, after.updated > before.updated) == ("base", True)
    assert await door.image("base") == TEXT
    shown = json.loads(await door.image("v2") or "")
    assert [entry["created_by"] for entry in shown["history"]] == ["ADD it", "why", "snapfs commit"]
    assert shown["rootfs"] == CONFIG["rootfs"], "of the others no digest is known"
    assert shown["created"] == shown["history"][-1]["created"]
    assert shown["config"] == CONFIG["config"]
    await door.prepare("web", "v2")
    assert await door.image("web") is None
    await door.set_image("v1", b"{}")
    assert await door.image("v1") == "{}"
    assert len(json.loads(await door.image("v2") or "")["history"]) == 1
    assert sorted(files_of(root)) == [1, 2]
    await door.set_image("v1", None)
    assert len(json.loads(await door.image("v1") or "")["history"]) == 2
    await door.set_image("base", None)
    assert await door.image("v2") is None
    assert files_of(root) == {}
    check_indexes(door.records)


async def test_writing_anew_leaves_one_file(door: Snapshotter, root: Path) -> None:
    for text in (TEXT, "{}", "{}", TEXT):
        await door.set_image("base", text)
        assert await door.image("base") == text
        assert files_of(root) == {1: [f"image-{imagefile.digest_of(text.encode())}.json"]}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InvalidArgument),
        ("[]", InvalidArgument),
        ('{"a"', InvalidArgument),
        ("{} {}", InvalidArgument),
        (b'{"a": "\xff"}', NotUtf8),
        ('{"a": "\udcff"}', NotUtf8),
        ("{" + " " * MOST + "}", ImageTooBig),
    ],
)
async def test_what_is_none_is_refused(door: Snapshotter, root: Path, text: str | bytes, error: type[Exception]) -> None:
    await door.set_image("base", TEXT)
    with pytest.raises(error):
        await door.set_image("base", text)
    assert await door.image("base") == TEXT
    assert len(files_of(root)[1]) == 1


async def test_who_has_none(door: Snapshotter) -> None:
    await door.prepare("web", "base")
    with pytest.raises(FailedPrecondition, match=r'"web" is active: only committed ones have image\.json'):
        await door.set_image("web", TEXT)
    with pytest.raises(NotFound, match=r'"base" has no image\.json of its own'):
        await door.set_image("base", None)
    for call in (door.image("nothing"), door.set_image("nothing", TEXT)):
        with pytest.raises(NotFound, match='"nothing" does not exist'):
            await call


async def test_a_squash_has_that_of_its_source_with_one_layer(door: Snapshotter, root: Path) -> None:
    await door.set_image("base", TEXT)
    for source, name in (("v2", "flat"), ("flat", "flatter"), ("base", "low")):
        await door.squash(source, name)
        shown = json.loads(await door.image(name) or "")
        assert (shown["config"], shown["rootfs"]["diff_ids"], len(shown["history"])) == (CONFIG["config"], [], 1)
    await commit(door, "on-it", "flat")
    assert len(json.loads(await door.image("on-it") or "")["history"]) == 2
    await door.set_image("base", None)
    await door.remove("flatter")
    await door.remove("low")
    assert len(json.loads(await door.image("flat") or "")["history"]) == 1
    await door.set_image("flat", TEXT)
    assert await door.image("flat") == TEXT
    assert len(files_of(root)) == 1
    check_indexes(door.records)


async def test_what_says_which_layers_there_are_is_not_dissolved(door: Snapshotter) -> None:
    await commit(door, "v3", "v2")
    for owner in ("v1", "v2", "v3"):
        await door.set_image(owner, TEXT)
        with pytest.raises(FailedPrecondition, match=f'"v1" can\'t be dissolved: image.json of "{owner}" says which layers'):
            await door.dissolve("v1")
        await door.set_image(owner, None)
    await door.set_image("base", TEXT)
    await door.dissolve("v1")
    assert len(json.loads(await door.image("v2") or "")["history"]) == 2


async def test_a_workspace_that_is_squashed_by_itself_still_inherits(root: Path) -> None:
    async with open_snapshotter(root, Options(sync=Sync.NONE, squash_depth=3)) as snapshotter:
        await commit(snapshotter, "base")
        await snapshotter.set_image("base", TEXT)
        await snapshotter.prepare("web", "base")
        for _ in range(2):
            made = await snapshotter.checkpoint("web")
        with trio.fail_after(20):
            while (await snapshotter.stat("web")).parent == made.name:
                await trio.sleep(0.01)
        await snapshotter.commit("v1", "web")
        assert json.loads(await snapshotter.image("v1") or "")["config"] == CONFIG["config"]


def spoil(path: Path) -> None:
    path.write_text(TEXT.replace("amd64", "arm64"))


@pytest.mark.parametrize(
    "how", [Path.unlink, spoil, lambda path: (path.unlink(), path.mkdir()), lambda path: path.write_text("")]
)
async def test_a_damaged_file_is_told_and_written_anew(
    snapshotter: Snapshotter, root: Path, how: Callable[[Path], object]
) -> None:
    await commit(snapshotter, "base")
    await commit(snapshotter, "v1", "base")
    await snapshotter.set_image("base", TEXT)
    path = next((root / "snapshots/1").glob("image-*"))
    how(path)
    for key in ("base", "v1"):
        with pytest.raises(Damaged, match=r"image-.*json, which has image.json, is .*; write image.json anew"):
            await snapshotter.image(key)
    assert "image.json" in [name for _, name, _ in Tree(snapshotter).walk("committed/v1").entries(0)]
    if path.is_dir():
        path.rmdir()
    await snapshotter.set_image("base", TEXT)
    assert await snapshotter.image("base") == TEXT


async def test_a_full_disk_leaves_what_there_was(snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await commit(snapshotter, "base")
    await snapshotter.set_image("base", TEXT)
    before = files_of(root)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(Exception, match=r'cannot write image.json of snapshot "base": No space left') as caught:
        await snapshotter.set_image("base", "{}")
    assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert (await snapshotter.image("base"), files_of(root)) == (TEXT, before)


async def test_many_at_once(snapshotter: Snapshotter, root: Path) -> None:
    """Readers see one or the other, whoever writes; one is left."""
    await commit(snapshotter, "base")
    texts = [json.dumps({"n": n}) for n in range(8)]
    seen: set[str | None] = set()

    async def write(text: str) -> None:
        for _ in range(5):
            await snapshotter.set_image("base", text)
            seen.add(await snapshotter.image("base"))

    async with trio.open_nursery() as nursery:
        for text in texts:
            nursery.start_soon(write, text)
    assert seen <= set(texts)
    assert len(files_of(root)[1]) == 1


async def test_removal_beside_writing(snapshotter: Snapshotter, root: Path) -> None:
    for n in range(10):
        await commit(snapshotter, f"v{n}")

        async def write(name: str = f"v{n}") -> None:
            with suppress(NotFound):
                await snapshotter.set_image(name, TEXT)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(snapshotter.remove, f"v{n}")
    assert os.listdir(root / "snapshots") == []


async def test_what_a_crash_has_left_goes(root: Path) -> None:
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "base")
        await snapshotter.set_image("base", TEXT)
    (root / "lock").write_text("1")  # as if it had not ended
    left = ["image-" + "0" * 64 + ".json", "image-" + "1" * 64 + ".json.new"]
    for name in left:
        (root / "snapshots/1" / name).write_text("{}")
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await snapshotter.agreeing.settled.wait()
        assert await snapshotter.image("base") == TEXT
    assert len(files_of(root)[1]) == 1


async def test_check_and_rebuild(root: Path) -> None:
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "base")
        await commit(snapshotter, "v1", "base")
        await snapshotter.set_image("base", TEXT)
    assert list(check(str(root))) == []
    os.unlink(root / "metadata.mdb")
    assert [finding.problem for finding in rebuild(str(root))] == [Problem.NOTE]
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        assert await snapshotter.image("base") == TEXT
        assert len(json.loads(await snapshotter.image("v1") or "")["history"]) == 2
    spoil(next((root / "snapshots/1").glob("image-*")))
    (finding,) = check(str(root))
    assert (finding.problem, 'committed "base"' in finding.text) == (Problem.DAMAGED, True)


# -- the tree, without a mount


@pytest.fixture
async def tree(snapshotter: Snapshotter) -> Tree:
    await commit(snapshotter, "base")
    await commit(snapshotter, "v1", "base")
    return Tree(snapshotter)


async def read(tree: Tree, path: str) -> str:
    node = await tree.walk(path).refresh()
    handle = await node.open()
    return handle.read(0, handle.size).decode()


async def test_it_is_read_once_for_all_who_ask_at_once(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    await tree.snapshotter.set_image("base", TEXT)
    gate, texts, count, text = threading.Event(), [], 0, rules.text

    def held(root: Root, found: rules.Found) -> str:
        nonlocal count
        count += 1
        assert gate.wait(20)
        return text(root, found)

    async def ask() -> None:
        texts.append(await read(tree, "committed/v1/image.json"))

    monkeypatch.setattr(rules, "text", held)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.02)
        gate.set()
    assert count == 1
    assert len(texts) == 20
    assert all(len(json.loads(each)["history"]) == 2 for each in texts)


async def test_who_reads_many_keeps_nobody_waiting(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    await tree.snapshotter.set_image("base", TEXT)
    await commit(tree.snapshotter, "v2", "v1")
    gate, text = threading.Event(), rules.text

    def held(root: Root, found: rules.Found) -> str:
        assert len(found.layers) == 2 or gate.wait(20)
        return text(root, found)

    async def ask(name: str) -> None:
        await tree.walk(f"committed/{name}/image.json").refresh(Caller(ALICE, 0.1))

    monkeypatch.setattr(rules, "text", held)
    async with trio.open_nursery() as nursery:
        for name in ("base", "v1"):
            nursery.start_soon(ask, name)
        await trio.testing.wait_all_tasks_blocked(0.02)
        with trio.fail_after(10):
            await tree.walk("committed/v2/image.json").refresh(Caller(ALICE + 1, 0.1))
            assert (await tree.snapshotter.set_image("v1", "{}", caller=Caller(ALICE + 1, 0.1))).name == "v1"
        gate.set()


async def test_it_is_listed_where_there_is_one(tree: Tree) -> None:
    def listed(name: str) -> bool:
        return "image.json" in [name for _, name, _ in tree.walk(f"committed/{name}").entries(0)]

    assert (listed("base"), listed("v1")) == (False, False)
    await tree.snapshotter.set_image("v1", TEXT)
    assert (listed("base"), listed("v1")) == (False, True)
    await tree.snapshotter.set_image("base", TEXT)
    await tree.snapshotter.set_image("v1", None)
    assert (listed("base"), listed("v1")) == (True, True)
    assert len(json.loads(await read(tree, "committed/v1/image.json"))["history"]) == 2


async def test_the_write_that_brings_the_end_applies_it(tree: Tree) -> None:
    base = tree.walk("committed/base")
    node, handle = await base.create("image.json")
    assert node.path == "committed/base/image.json"
    half = len(TEXT) // 2
    await handle.write(0, TEXT[:half].encode())
    with pytest.raises(NotFound):
        tree.walk("committed/base/image.json")
    await handle.write(half, TEXT[half:].encode())
    assert tree.walk("committed/base/image.json").attributes().size == len(TEXT)
    await handle.write(len(TEXT), b"\n")
    assert await read(tree, "committed/base/image.json") == TEXT + "\n"
    with pytest.raises(InvalidArgument, match="nothing behind it"):
        await handle.write(len(TEXT) + 1, b"x")
    await handle.close()
    assert await tree.snapshotter.image("base") == TEXT + "\n"
    assert tree.state.image_bytes == 0


async def test_what_is_not_whole_changes_nothing(tree: Tree) -> None:
    await tree.snapshotter.set_image("base", TEXT)
    handle = await tree.walk("committed/base/image.json").open(writing=True, truncate=True)
    await handle.close()
    handle = await tree.walk("committed/base/image.json").open(writing=True, truncate=True)
    await handle.write(0, b'{"a":')
    with pytest.raises(InvalidArgument, match="was closed before the JSON object ended, and stays as it was"):
        await handle.close()
    handle = await tree.walk("committed/base/image.json").open(writing=True)
    with pytest.raises(NotPermitted, match="from its beginning to its end"):
        await handle.write(5, b"{}")
    with pytest.raises(NotPermitted, match="can't be cut"):
        await handle.resize(100)
    await handle.resize(0)
    await handle.close()
    assert await tree.snapshotter.image("base") == TEXT
    assert tree.state.image_bytes == 0


async def test_all_that_is_being_written_is_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openimage, "MOST", 10_000)
    _, one = await tree.walk("committed/base").create("image.json")
    await one.write(0, b'{"a": "' + b"x" * 8000)
    assert one.weight > 8000
    _, other = await tree.walk("committed/v1").create("image.json")
    with pytest.raises(TryAgain):
        await other.write(0, b'{"a": "' + b"x" * 4000)
    with pytest.raises(InvalidArgument):
        await one.close()
    await other.write(0, b"{}")
    await other.close()
    assert tree.state.image_bytes == 0


async def test_what_others_write_keeps_the_owner_from_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs count as what else they have open, a share a user."""
    monkeypatch.setattr(openimage, "MOST", 10_000)
    files, theirs, begun = OpenFiles(), [], b'{"a": "' + b"x" * (openfiles.SHARE // 4)
    for uid in (61001, 61001, 61001, 61002, 61001):
        _, handle = await tree.walk("committed/base").create("image.json")
        assert isinstance(handle, openimage.OpenImage)
        handle.caller = Caller(uid)
        files.charge(handle, uid)
        await handle.write(0, begun)
        theirs.append(handle)
        if len(theirs) <= 4:
            files.reweigh(handle)
    with pytest.raises(Unavailable, match="user 61001 has too many files open"):
        files.reweigh(theirs[-1])
    _, own = await tree.walk("committed/v1").create("image.json")
    await own.write(0, b'{"a": "' + b"x" * 8000)
    await own.write(own.size, b'"}')
    for handle in theirs:
        with pytest.raises(InvalidArgument):
            await handle.close()
    await own.close()
    assert tree.state.image_bytes == 0


async def test_it_is_made_nowhere_else(tree: Tree) -> None:
    await tree.snapshotter.prepare("web", "base")
    for path, name in (("active/web", "image.json"), ("committed/base", "image"), ("committed", "image.json")):
        with pytest.raises(NotPermitted):
            await tree.walk(path).create(name)


# -- the mounted tree


@pytest.fixture
def daemon(module_daemon: Daemon) -> Iterator[Daemon]:
    yield module_daemon
    remove_all(module_daemon.mnt)


def test_cp_and_rm(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    committed(mnt, "base")
    committed(mnt, "v1", "base")
    (tmp_path / "config.json").write_text(TEXT)
    for n in range(3):
        shutil.copyfile(tmp_path / "config.json", mnt / "committed/base/image.json")
        assert (mnt / "committed/base/image.json").read_text() == TEXT + "\n" * n
        assert os.stat(mnt / "committed/base/image.json").st_size == len(TEXT) + n
        with open(tmp_path / "config.json", "a") as file:
            file.write("\n")
    inherited = json.loads((mnt / "committed/v1/image.json").read_text())
    assert [each["created_by"] for each in inherited["history"]] == ["ADD it", "snapfs commit"]
    done = shell(
        mnt, f"cp {tmp_path}/config.json committed/v1/image.json && cmp {tmp_path}/config.json committed/v1/image.json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert shell(mnt, "rm committed/base/image.json committed/v1/image.json").returncode == 0
    assert not os.path.lexists(mnt / "committed/base/image.json")
    assert "image.json" not in os.listdir(mnt / "committed/v1")


def test_a_large_one_comes_in_many_writes(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    committed(mnt, "base")
    text = json.dumps({"a": ["x" * 1000] * 4000})
    (tmp_path / "config.json").write_text(text)
    done = shell(
        mnt, f"dd if={tmp_path}/config.json of=committed/base/image.json bs=50000 2>&1 && cat committed/base/image.json"
    )
    assert done.stdout.endswith(text)
    assert os.stat(mnt / "committed/base/image.json").st_size == len(text)
    (tmp_path / "config.json").write_text(json.dumps({"a": ["x" * 1000] * 4200}))
    lines = len(daemon.error_log())
    assert shell(mnt, f"cp {tmp_path}/config.json committed/base/image.json").returncode == 1
    assert "EFBIG write committed/base/image.json: image.json would take more than 4 MiB" in daemon.error_log()[lines]
    assert (mnt / "committed/base/image.json").read_text() == text


@pytest.mark.parametrize(
    ("content", "number", "words"),
    [
        (b"[]", errno.EINVAL, "must be a JSON object"),
        (b"{,}", errno.EINVAL, "image.json is no JSON"),
        (b'{"a": "\xff"}', errno.EILSEQ, "must be UTF-8"),
    ],
)
def test_what_is_none_is_refused_in_words(daemon: Daemon, content: bytes, number: int, words: str) -> None:
    committed(daemon.mnt, "base")
    fd = os.open(daemon.mnt / "committed/base/image.json", os.O_WRONLY | os.O_CREAT)
    try:
        with refused(daemon, number, "write", "committed/base/image.json", words):
            os.write(fd, content)
    finally:
        os.close(fd)
    assert not os.path.lexists(daemon.mnt / "committed/base/image.json")


def test_calls_of_who_copies_with_everything(daemon: Daemon) -> None:
    """What cp -p and others ask of a file that they have just made, and not yet written to the end."""
    committed(daemon.mnt, "base")
    path = daemon.mnt / "committed/base/image.json"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, b'{"a"')
    os.fchmod(fd, 0o644)
    os.fchown(fd, os.geteuid(), os.getegid())
    with failing(errno.EPERM):
        os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_size >= 0
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"{}", 0)
    os.fchmod(fd, 0o644)
    os.close(fd)
    assert path.read_text() == "{}"


@pytest.mark.parametrize("remover", REMOVERS)
def test_who_deletes_all_of_a_snapshot_with_children_touches_nothing(daemon: Daemon, remover: str) -> None:
    mnt = daemon.mnt
    committed(mnt, "base")
    committed(mnt, "v1", "base")
    (mnt / "committed/base/image.json").write_text(TEXT)
    assert (mnt / "committed/v1/image.json").read_text()  # by which its size is known
    before = listing(mnt)
    assert shell(mnt, remover.format("committed/base")).returncode == 1
    assert listing(mnt) == before
    assert shell(mnt, remover.format("committed/v1")).returncode == 0
    assert os.listdir(mnt / "committed") == ["base"]


def test_a_damaged_one_is_eio_in_words(daemon: Daemon) -> None:
    committed(daemon.mnt, "base")
    (daemon.mnt / "committed/base/image.json").write_text(TEXT)
    spoil(next((daemon.root / f"snapshots/{info(daemon.mnt / 'committed/base')['id']}").glob("image-*")))
    with failing(errno.EIO):
        (daemon.mnt / "committed/base/image.json").read_text()
    assert "EIO open committed/base/image.json: " in daemon.error_log()[-1]
    assert "is not what was written; write image.json anew" in daemon.error_log()[-1]


def test_who_may_not_change_the_tree_writes_none(make_daemon: Make, users: None) -> None:
    mnt = make_daemon("-o", "allow_other").start().mnt
    committed(mnt, "base")
    (mnt / "committed/base/image.json").write_text(TEXT)
    alone = ["setpriv", "--reuid=60001", "--regid=60001", "--clear-groups"]
    for command in ("echo {} > committed/base/image.json", "rm -f committed/base/image.json"):
        done = subprocess.run([*alone, "sh", "-c", command], cwd=mnt, capture_output=True, text=True, check=False)
        assert (done.returncode != 0, "Permission denied" in done.stderr) == (True, True), command
    assert subprocess.check_output([*alone, "cat", "committed/base/image.json"], cwd=mnt, text=True) == TEXT
