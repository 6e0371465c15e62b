"""A disk that fails while a batch of the records is written: afterwards it is wholly there or not at all, and all goes on."""

from __future__ import annotations

import errno
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from snapfs import Kind, Options, SnapshotError, Snapshotter, Unavailable, open_snapshotter
from snapfs import flushing as flushing_room
from tests.disk import Disk, after_power_cut, disk, loop_device, mounted

STEPS = 40
"""Writes, or flushes, of which each in turn is the first to fail; a batch takes fewer."""

each_kind = pytest.mark.parametrize("kind", ["ext4", "xfs"])
each_fault = pytest.mark.parametrize("done", [False, True], ids=["refused", "done all the same"])
each_end = pytest.mark.parametrize("times", [1, 2, 1 << 62], ids=["once", "twice", "until it is mended"])


@pytest.fixture
def failing(kind: str) -> Iterator[Disk]:
    with disk(kind) as made:
        yield made
        made.fail()


def beginning(file: Path) -> tuple[int, int]:
    """From and up to which byte of its disk the beginning of ``file`` lies in one piece: LMDB's meta pages, and some more."""
    said = subprocess.run(["filefrag", "-v", "-b1024", str(file)], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"^ *0: +0\.\. +\d+: +(\d+)\.\. +(\d+):", said, re.MULTILINE)
    assert found, said
    return int(found[1]) * 1024, (int(found[2]) + 1) * 1024


async def state(snapshotter: Snapshotter) -> dict[str, tuple[Kind, str | None]]:
    """What is there, after a look that directories and records agree."""
    with snapshotter.records.reading() as reader:
        assert snapshotter.layers.present() == reader.ids(), "a directory without a record, or a record without one"
        assert reader.misindexed() == 0
        return {info.name: (info.kind, info.labels.get("n")) for info in reader.walk()}


@each_kind
@each_fault
@each_end
async def test_a_batch_is_there_or_not(
    failing: Disk, kind: str, done: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors begin at each write, or flush, of the records in turn; the disk is mended later."""
    cuts: list[tuple[int, dict[str, tuple[Kind, str | None]]]] = []
    met = 0
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            await snapshotter.prepare("gone-0", labels={"n": "0"})
            await snapshotter.prepare("old-0", labels={"n": "0"})
            await snapshotter.prepare("label", labels={"n": "0"})
            await snapshotter.flush()
            start, end = beginning(mount / "root/metadata.mdb")
            for n in range(1, STEPS):
                await snapshotter.prepare(f"gone-{n}", labels={"n": str(n)})
                await snapshotter.prepare(f"old-{n}", labels={"n": str(n)})
                before = await state(snapshotter)
                outcomes: dict[str, SnapshotError | None] = {}

                async def call(name: str, made: object, outcomes: dict[str, SnapshotError | None] = outcomes) -> None:
                    try:
                        await made  # type: ignore[misc]
                        outcomes[name] = None
                    except Unavailable as error:
                        outcomes[name] = error

                calls = {
                    "new": snapshotter.prepare(f"new-{n}", labels={"n": str(n)}),
                    "commit": snapshotter.commit(f"base-{n}", f"old-{n}", wait=False, keep_labels=True),
                    "remove": snapshotter.remove(f"gone-{n}", wait=False),
                    "update": snapshotter.update("label", {"n": str(n)}),
                }
                failing.fail(write=errno.EIO, start=start, end=end, spare=(n - 1) % 10, times=times, done=done)
                async with trio.open_nursery() as nursery:
                    for name, made in calls.items():
                        nursery.start_soon(call, name, made)
                    await trio.sleep(0)
                    assert (await snapshotter.stat("old-0")).name == "old-0"
                if any(outcomes.values()):
                    met += 1
                    assert (await snapshotter.stat("old-0")).name == "old-0", "reads go on"
                if snapshotter.records._doubt is not None:
                    assert any("when the disk takes writes again" in str(error) for error in outcomes.values())
                failing.fail()
                await snapshotter.update("old-0", {"n": "0"})
                after = await state(snapshotter)
                results = {
                    "new": ({}, {f"new-{n}": (Kind.ACTIVE, str(n))}),
                    "commit": (
                        {f"old-{n}": (Kind.ACTIVE, str(n))},
                        {f"base-{n}": (Kind.COMMITTED, str(n))},
                    ),
                    "remove": ({f"gone-{n}": (Kind.ACTIVE, str(n))}, {}),
                    "update": ({"label": before["label"]}, {"label": (Kind.ACTIVE, str(n))}),
                }
                for name, (was, becomes) in results.items():
                    own = {key: value for key, value in after.items() if key in {*was, *becomes}}
                    said = outcomes[name]
                    if said is None:
                        assert own == becomes, (name, n)
                    elif "when the disk takes writes again" in str(said):
                        assert own in (was, becomes), (name, n)
                    else:
                        assert own == was, (name, n)
                cuts.append((failing.now(), after))
        assert met, "the test means something"
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            assert await state(snapshotter) == cuts[-1][1]
    monkeypatch.setattr(flushing_room, "boot_id", lambda: "the next boot")
    history = failing.history()
    chance = random.Random(4)
    for at, expected in chance.sample(cuts, 8):
        image = failing.base.with_name("cut")
        after_power_cut(failing, history, at, chance, image)
        with loop_device(image) as device, mounted(device, kind, tmp_path / "after") as mount:
            async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
                assert await state(snapshotter) == expected
