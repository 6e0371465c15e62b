"""The data of committed snapshots: when it is on disk, and what is said of it when it is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import AlreadyExists, Damaged, FailedPrecondition, Kind, Options, Snapshotter, Unavailable, open_snapshotter
from snapfs.kernel import mounting
from snapfs.options import Sync
from snapfs.root import unflushed as room
from snapfs.services import flushing
from snapfs.tree import Tree
from snapfs.tree.attributes import info_json
from tests.daemon import Daemon
from tests.mounts import copy_as_cut, loop_mounted

pytestmark = pytest.mark.durable

CONTENT = b"0123456789abcdef" * 20_000


class Gate:
    """Holds up syncfs(2) until it is opened; ``calls`` counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.open = threading.Event()
        self.error: OSError | None = None
        self.sync = mounting.sync_file_system

    def __call__(self, fd: int) -> None:
        self.calls += 1
        assert self.open.wait(timeout=30)
        if self.error is not None:
            raise self.error
        self.sync(fd)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(mounting, "sync_file_system", gate)
    yield gate
    gate.open.set()


def write(snapshotter: Snapshotter, number: int) -> None:
    for n in range(10):
        Path(snapshotter.layers.fs(number), f"file{n}").write_bytes(CONTENT)


def holds(layer: str) -> bool:
    files = [Path(layer, f"file{number}") for number in range(10)]
    return all(file.exists() and file.read_bytes() == CONTENT for file in files)


def marked(snapshotter: Snapshotter) -> list[int]:
    with snapshotter.records.reading() as reader:
        return [number for number, _ in reader.unflushed()]


async def test_what_commit_waited_for_is_whole_after_a_power_cut(
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The image of the disk is copied the moment the call returns: what a power cut would leave."""
    async with open_snapshotter(small_disk) as snapshotter:
        await snapshotter.prepare("a")
        write(snapshotter, 1)
        await snapshotter.commit("base", "a")
        copy_as_cut(tmp_path / "image", tmp_path / "copy")
    monkeypatch.setattr(room, "boot_id", lambda: "the next boot")
    with loop_mounted(tmp_path / "copy", tmp_path / "after") as disk:
        async with open_snapshotter(disk) as survivor:
            assert holds(survivor.layers.fs(1))
            assert await survivor.prepare("web", "base")


async def test_what_nobody_waited_for_is_not_passed_off_as_whole(
    small_disk: Path,
    tmp_path: Path,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_snapshotter(small_disk) as snapshotter:
        await snapshotter.prepare("a")
        write(snapshotter, 1)
        await snapshotter.commit("base", "a", wait=False)
        copy_as_cut(tmp_path / "image", tmp_path / "copy")
        await snapshotter.prepare("web", "base")
        gate.open.set()
    with loop_mounted(tmp_path / "copy", tmp_path / "after") as disk:
        assert not holds(str(disk / "snapshots/1/fs")), "the test means something"
        with monkeypatch.context() as patch:
            patch.setattr(room, "boot_id", lambda: "the next boot")
            async with open_snapshotter(disk) as survivor:
                tree = Tree(survivor)
                info = tree.walk("committed/base/info.json")
                shown = json.loads((await info.open()).read(0, 4096))
                assert shown["state"] == "unflushed"
                for refused in (
                    lambda: survivor.prepare("web", "base"),
                    lambda: survivor.view("peek", "base"),
                    lambda: survivor.mount("base"),
                ):
                    with pytest.raises(Damaged, match=r'"base" may be torn.*snapshots/1/fs'):
                        await refused()
                await survivor.prepare("other")
                with pytest.raises(Damaged):
                    await survivor.commit("child", "other", parent="base")
                with pytest.raises(FailedPrecondition, match="whole"):
                    await survivor.accept("other")
                await survivor.accept("base")
                assert await survivor.prepare("web", "base")
                assert marked(survivor) == []
                assert "state" not in json.loads((await tree.walk("committed/base/info.json").open()).read(0, 4096))


@pytest.mark.parametrize("end", ["remove", "crash"])
async def test_removing_it_or_a_mere_crash_settles_it(
    root: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a", wait=False)
        shutil.copytree(root, tmp_path / "copy")  # as it was when the daemon was killed
        gate.open.set()
    if end == "remove":
        monkeypatch.setattr(room, "boot_id", lambda: "the next boot")
    async with open_snapshotter(tmp_path / "copy") as survivor:
        if end == "remove":
            with pytest.raises(Damaged):
                await survivor.prepare("web", "base")
            await survivor.remove("base")
            assert survivor.unflushed.lost == set()
        else:
            assert await survivor.prepare("web", "base"), "the kernel still has the data"
            await survivor.flush()
        assert marked(survivor) == []


async def test_what_is_closed_properly_is_flushed_whatever_boot_comes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a", wait=False)
    with trio.CancelScope() as cancelled:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("b")
            await snapshotter.commit("top", "b", wait=False)
            cancelled.cancel()
            await trio.sleep_forever()
    monkeypatch.setattr(room, "boot_id", lambda: "the next boot")
    async with open_snapshotter(root) as survivor:
        assert survivor.unflushed.lost == set()


async def test_one_flush_serves_all_commits_before_it(snapshotter: Snapshotter, gate: Gate) -> None:
    parent = ""
    for n in range(5):
        await snapshotter.prepare(f"k{n}", parent)
        await snapshotter.commit(f"n{n}", f"k{n}", wait=False)
        parent = f"n{n}"
    seen = [marked(snapshotter)]
    assert seen == [[1, 2, 3, 4, 5]]
    gate.open.set()
    while marked(snapshotter):
        await trio.sleep(0.001)
        seen.append(marked(snapshotter))
    for marks in seen:
        assert marks == sorted(marks)
        assert marks == list(range(6 - len(marks), 6)), "a child is never flushed before its parent"
    assert gate.calls <= 3


async def test_commit_returns_at_once_or_when_the_data_is_on_disk(snapshotter: Snapshotter, gate: Gate) -> None:
    for key in ("a", "b"):
        await snapshotter.prepare(key)
    await snapshotter.commit("n", "a", wait=False)
    ended = trio.Event()

    async def wait_for(call: Callable[[], object]) -> None:
        await call()  # type: ignore[misc]
        ended.set()

    tree = Tree(snapshotter, dirsync=True)
    calls = (
        lambda: snapshotter.commit("m", "b"),
        snapshotter.flush,
        lambda: tree.rename(tree.walk("active"), "c", tree.walk("committed"), "o"),
    )
    await snapshotter.prepare("c")
    for call in calls:
        gate.open.clear()
        ended = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for, call)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not ended.is_set()
            gate.open.set()
        assert marked(snapshotter) == []
    assert sorted(info.name for info in await snapshotter.walk()) == ["m", "n", "o"]


async def test_a_disk_that_fails_is_told_and_never_forgotten(snapshotter: Snapshotter, gate: Gate) -> None:
    gate.error = OSError(errno.EIO, os.strerror(errno.EIO))
    gate.open.set()
    await snapshotter.prepare("a")
    with pytest.raises(Unavailable, match="cannot flush the layers: Input/output error") as caught:
        await snapshotter.commit("base", "a")
    assert caught.value.errno == errno.EIO
    assert (await snapshotter.stat("a")).kind is Kind.ACTIVE, "what can't be flushed is not committed"
    gate.error = None
    await snapshotter.flush()
    with pytest.raises(Damaged):
        await snapshotter.commit("base", "a")
    assert marked(snapshotter) == [1], "the kernel reports an error once; what it lost stays lost"
    with pytest.raises(Damaged):
        await snapshotter.prepare("web", "base")


async def test_a_commit_that_waits_is_one_flush_of_data_and_one_of_records(snapshotter: Snapshotter, gate: Gate) -> None:
    """Its files are on the disk before it is committed, and counted: nothing is left to be written after that."""
    await snapshotter.prepare("a")
    with open(f"{snapshotter.layer_path(1)}/file", "wb") as file:
        file.write(bytes(8192))
    gate.open.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshotter.commit, "base", "a")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await snapshotter.stat("a")).kind is Kind.ACTIVE
        batches = sum(snapshotter.statistics().batches.values())
        gate.open.set()
    assert marked(snapshotter) == []
    assert snapshotter.record(1).usage is not None
    assert snapshotter.record(1).usage == await snapshotter.usage("base")
    assert sum(snapshotter.statistics().batches.values()) == batches + 1


async def test_what_will_be_refused_is_not_flushed(snapshotter: Snapshotter, gate: Gate) -> None:
    gate.open.set()
    await snapshotter.prepare("a")
    await snapshotter.commit("base", "a")
    await snapshotter.prepare("b")
    gate.open.clear()
    with trio.fail_after(20):
        with pytest.raises(AlreadyExists):
            await snapshotter.commit("base", "b")
        with pytest.raises(FailedPrecondition):
            await snapshotter.commit("new", "base")
    gate.open.set()


async def test_a_commit_does_not_wait_with_sync_background_and_that_is_told(root: Path, gate: Gate) -> None:
    """Until its files are on the disk, or for good where they can't get there."""
    gate.open.clear()
    async with open_snapshotter(root, Options(sync=Sync.BACKGROUND)) as snapshotter:
        tree = Tree(snapshotter)

        def told() -> dict[str, object]:
            found: dict[str, object] = json.loads(info_json(tree.state, 1, snapshotter.record(1)))
            return {key: found[key] for key in ("flushed", "state") if key in found}

        await snapshotter.prepare("a")
        with trio.fail_after(20):
            await snapshotter.commit("base", "a")
        assert marked(snapshotter) == [1]
        assert told() == {"flushed": False}
        await snapshotter.prepare("web", "base")
        gate.open.set()
        await snapshotter.flush()
        assert marked(snapshotter) == []
        assert told() == {}
        await snapshotter.commit("second", "web", patience=20)
        assert marked(snapshotter) == [], "who waits at a door where that is bounded has asked for it"
        gate.error = OSError(errno.EIO, os.strerror(errno.EIO))
        await snapshotter.prepare("b")
        await snapshotter.commit("third", "b")
        with pytest.raises(Unavailable):
            await snapshotter.flush()
        assert snapshotter.is_lost(3)


@pytest.mark.parametrize("asked", [True, False])
async def test_with_sync_background_the_flush_begins_when_no_more_commits_come(
    root: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Or when somebody asks for it, or after a while in any case."""
    monkeypatch.setattr(flushing, "QUIET", 3600)
    gate.open.set()
    async with open_snapshotter(root, Options(sync=Sync.BACKGROUND)) as snapshotter:
        for number in range(5):
            await snapshotter.prepare(f"k{number}")
            await snapshotter.commit(f"c{number}", f"k{number}")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert gate.calls == 0
        assert marked(snapshotter) == [1, 2, 3, 4, 5]
        if asked:
            await snapshotter.flush()
            assert marked(snapshotter) == []
        else:
            monkeypatch.setattr(flushing, "LONGEST", 0.0)
            await snapshotter.prepare("last")
            await snapshotter.commit("last", "last")
            with trio.fail_after(20):
                while marked(snapshotter):
                    await trio.sleep(0.005)
        assert gate.calls == 1


async def test_nothing_is_flushed_with_sync_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be flushed")

    monkeypatch.setattr(mounting, "sync_file_system", refuse)
    monkeypatch.setattr(os, "fsync", refuse)
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a")
        await snapshotter.flush()
        assert marked(snapshotter) == []


def test_sync_of_a_directory_waits_and_mv_does_not(
    make_daemon: Callable[..., Daemon], small_disk: Path, tmp_path: Path
) -> None:
    daemon = make_daemon(root=small_disk).start()
    for n, waited in enumerate(("committed/n0", "committed", ".")):
        os.mkdir(daemon.mnt / "active/k")
        for number in range(5):
            (daemon.mnt / f"active/k/diff/file{number}").write_bytes(CONTENT)
        os.rename(daemon.mnt / "active/k", daemon.mnt / f"committed/n{n}")
        fd = os.open(daemon.mnt / waited, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
        copy_as_cut(tmp_path / "image", tmp_path / "copy")
        with loop_mounted(tmp_path / "copy", tmp_path / "after") as disk:
            assert all((disk / f"snapshots/{n + 1}/fs/file{number}").read_bytes() == CONTENT for number in range(5))
    assert daemon.stop() == 0


async def test_what_was_being_written_when_the_disk_failed_is_suspect_when_it_is_committed(
    snapshotter: Snapshotter, gate: Gate
) -> None:
    gate.open.set()
    await snapshotter.prepare("a")
    gate.error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(Unavailable):
        await snapshotter.flush()
    gate.error = None
    await snapshotter.prepare("later")
    await snapshotter.commit("fine", "later")
    with pytest.raises(Damaged, match='"torn" may be torn'):
        await snapshotter.commit("torn", "a")
    assert await snapshotter.prepare("x", "fine")
    with pytest.raises(Damaged):
        await snapshotter.prepare("y", "torn")
    await snapshotter.accept("torn")
    assert await snapshotter.prepare("y", "torn")
