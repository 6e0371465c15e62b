"""Directories of new snapshots that a power cut has put back into the pool."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from snapfs import Kind, Snapshotter, open_snapshotter
from snapfs.offline.checking import check
from snapfs.root import imprint
from snapfs.root.layers import FsTemplate
from snapfs.root.pool import POOL, Pool
from snapfs.store.writing import Writer
from tests.mounts import copy_as_cut, loop_mounted
from tests.placing import FILL, DryPool, placed

pytestmark = pytest.mark.durable


@pytest.fixture
def nobody_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is filled by whoever calls ``FILL``, and flushed with that, and not in the background."""
    monkeypatch.setattr(Pool, "fill", lambda pool, checkpoint: None)


async def back_to_the_pool(root: Path) -> list[str]:
    """Make four snapshots of different owners, and put their directories back to where they were."""
    async with open_snapshotter(root) as snapshotter:
        FILL(snapshotter.layers.pool, lambda: None)
        mapped = {"containerd.io/snapshot/uidmapping": "0:1000:10", "containerd.io/snapshot/gidmapping": "0:2000:10"}
        await snapshotter.prepare("a", labels=mapped)
        await snapshotter.commit("base", "a", labels=mapped)
        await snapshotter.prepare("web", "base", labels={"team": "blue"})
        await snapshotter.view("peek", "base")
        found = placed(snapshotter)
        numbers = [info.id for info in await snapshotter.walk()]
        assert set(numbers) <= set(found), "they came from the pool"
    for number in numbers:
        os.rename(root / f"snapshots/{number}", root / "pool" / found[number])
    return [found[number] for number in numbers]


async def in_place(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        for info in await snapshotter.walk():
            directory = root / f"snapshots/{info.id}"
            assert sorted(os.listdir(directory)) == (["fs"] if info.kind is Kind.VIEW else ["fs", "work"])
            layer = (directory / "fs").stat()
            assert (layer.st_uid, layer.st_gid) == (1000, 2000)
            borne = imprint.read(str(directory))
            assert borne is not None
            assert (borne.record.name, borne.record.labels) == (info.name, info.labels)
        assert await snapshotter.mounts("web")


@pytest.mark.mounts
@pytest.mark.usefixtures("nobody_fills")
async def test_a_start_puts_them_in_place_again(root: Path) -> None:
    await back_to_the_pool(root)
    await in_place(root)


@pytest.mark.mounts
@pytest.mark.usefixtures("nobody_fills")
async def test_so_does_a_check(root: Path) -> None:
    await back_to_the_pool(root)
    assert list(check(str(root))) == []
    assert os.listdir(root / "pool") == []
    await in_place(root)


@pytest.mark.mounts
@pytest.mark.usefixtures("nobody_fills")
async def test_a_directory_that_is_nowhere_is_damage(root: Path) -> None:
    for name in await back_to_the_pool(root):
        shutil.rmtree(root / "pool" / name)
    async with open_snapshotter(root) as snapshotter:
        with pytest.raises(Exception, match=r"snapshots/\d+.* is missing"):
            await snapshotter.mounts("web")


@pytest.mark.usefixtures("nobody_fills")
async def test_what_is_unflushed_bears_that_again_and_a_missing_parent_stops_nothing(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        FILL(snapshotter.layers.pool, lambda: None)
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a")
        await snapshotter.prepare("web", "base")
        names = placed(snapshotter)

        def unflushed(writer: Writer) -> None:
            writer.mark_unflushed(1, "another boot")

        await snapshotter.records.write(unflushed)
    os.rename(root / "snapshots/1", root / "pool" / names[1])
    os.rename(root / "snapshots/2", root / "pool" / names[2])
    async with open_snapshotter(root) as snapshotter:
        borne = imprint.read(snapshotter.layers.directory(1))
        assert borne is not None
        assert borne.boot == "another boot"
        await snapshotter.records.write(lambda writer: writer.mark_placed(2, "new-x-1"))
    shutil.rmtree(root / "snapshots/1")
    os.rename(root / "snapshots/2", root / "pool/new-x-1")
    async with open_snapshotter(root) as snapshotter:
        assert os.listdir(root / "snapshots") == ["2"]


async def test_what_was_placed_is_settled_when_the_pool_is_filled(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        for number in range(5 * POOL):
            await snapshotter.prepare(f"k{number}")
        assert len(placed(snapshotter)) < 4 * POOL


async def test_an_id_that_was_given_back_is_not_settled_by_what_had_it(
    nobody_fills: None, snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILL(snapshotter.layers.pool, lambda: None)
    layers = snapshotter.layers
    name = layers.place(90, Kind.ACTIVE, FsTemplate())
    assert name is not None
    sync = layers.pool.sync

    def undone_meanwhile() -> None:
        sync()
        layers.undo_place(90)

    monkeypatch.setattr(layers.pool, "sync", undone_meanwhile)
    while not layers.pool.is_low:
        layers.pool._ready.pop()
    FILL(layers.pool, lambda: None)
    assert layers.pool.flushed_up_to < 90


@pytest.mark.usefixtures("nobody_fills")
@pytest.mark.parametrize("dry", [False, True])
async def test_a_power_cut_takes_no_directory(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    """The image of the disk is copied the moment the calls return: what a power cut would leave.  With a pool the
    directories mostly lack in it, and are put in their places at the next start; but the kernel may have written them."""
    missing: list[str] = []

    async def look(copy: Path, made: dict[str, int]) -> None:
        with loop_mounted(copy, tmp_path / "after") as disk:
            missing.extend({str(number) for number in made.values()} - set(os.listdir(disk / "snapshots")))
            async with open_snapshotter(disk) as survivor:
                assert {info.name: info.id for info in await survivor.walk()} == made
                for name in made:
                    await survivor.mounts(name)

    async with open_snapshotter(small_disk) as snapshotter:
        FILL(snapshotter.layers.pool, lambda: None)
        with monkeypatch.context() as patch:
            if dry:
                patch.setattr(snapshotter.layers.pool, "_ready", DryPool())
            for number in range(11):
                await (snapshotter.prepare if number % 10 else snapshotter.view)(f"k{number}")
                made = {info.name: info.id for info in await snapshotter.walk()}
                copy = copy_as_cut(tmp_path / "image", tmp_path / "copy")
                await look(copy, made)
                copy.unlink()
    assert not (dry and missing), "without a pool each is flushed by itself"
