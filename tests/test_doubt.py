"""A disk that fails while a batch of the records is written: afterwards it is wholly there or not at all, and all goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from snapfs import Kind, Options, SnapshotError, Snapshotter, Unavailable, open_snapshotter
from snapfs.kernel import mounting
from snapfs.root import unflushed as unflushed_room
from tests.disk import BLOCK, Disk, Write, after_power_cut, disk, loop_device, mounted

pytestmark = [pytest.mark.mounts, pytest.mark.durable]

ROUNDS = 16
SPARED = 4
"""Of the writes of a batch each in turn is the first to fail; there are no more than so many."""
CUTS = 12
FOREVER = 1 << 62

State = dict[str, tuple[Kind, str | None]]
"""Kind and one label of each snapshot."""


class Call(NamedTuple):
    """What was asked for, what was the case before it, and what would be after it."""

    made: Awaitable[object]
    was: State
    becomes: State


class Batch(NamedTuple):
    """Calls that were made at once; what all else was; what they said; and the disk's clock: begun, answered, mended, ended."""

    calls: list[Call]
    rest: State
    said: list[SnapshotError | None]
    times: tuple[int, int, int, int]


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


def state(snapshotter: Snapshotter) -> State:
    """What is there, after a look that directories and records agree."""
    with snapshotter.records.reading() as reader:
        assert snapshotter.layers.existing_ids() == reader.ids(), "a directory without a record, or a record without one"
        assert reader.wrong_index_entries() == 0
        return {info.name: (info.kind, info.labels.get("n")) for info in reader.walk()}


def check(batch: Batch, found: State, at: int) -> None:
    """``found`` is what there was at ``at``, or what was left of that by a power cut."""
    _, answered, _, ended = batch.times
    seen: set[str] = set()
    for call, said in zip(batch.calls, batch.said, strict=True):
        keys = {*call.was, *call.becomes}
        seen |= keys
        own = {name: found[name] for name in keys & found.keys()}
        doubtful = at < answered or "when the disk takes writes again" in str(said)
        allowed = [call.was, call.becomes] if doubtful else [call.was if said else call.becomes]
        assert own in allowed, f"{said}: at {at} of {batch.times}"
    assert {name: value for name, value in found.items() if name not in seen} == batch.rest
    assert at <= ended


async def run(snapshotter: Snapshotter, n: int, failing: Disk, faults: dict[str, int], mount: Path) -> Batch:
    """A batch while the disk fails, which is mended afterwards."""
    for name in ("gone", "old"):
        await snapshotter.prepare(f"{name}-{n}", labels={"n": str(n)})
    before = state(snapshotter)
    calls = [
        Call(snapshotter.prepare(f"new-{n}", labels={"n": str(n)}), {}, {f"new-{n}": (Kind.ACTIVE, str(n))}),
        Call(
            snapshotter.commit(f"base-{n}", f"old-{n}", wait=False, keep_labels=True),
            {f"old-{n}": (Kind.ACTIVE, str(n))},
            {f"base-{n}": (Kind.COMMITTED, str(n))},
        ),
        Call(snapshotter.remove(f"gone-{n}", wait=False), {f"gone-{n}": (Kind.ACTIVE, str(n))}, {}),
        Call(snapshotter.update("label", {"n": str(n)}), {"label": before["label"]}, {"label": (Kind.ACTIVE, str(n))}),
    ]
    said: list[SnapshotError | None] = [None] * len(calls)

    async def ask(number: int) -> None:
        try:
            await calls[number].made
        except Unavailable as error:
            said[number] = error

    begun = failing.now()
    failing.fail(write=errno.EIO, spare=n % SPARED, **faults)
    async with trio.open_nursery() as nursery:
        for number in range(len(calls)):
            nursery.start_soon(ask, number)
        await trio.sleep(0)
        assert (await snapshotter.stat("reference")).name == "reference", "reads go on"
    answered = failing.now()
    assert (await snapshotter.stat("reference")).name == "reference", "reads go on"
    fd = os.open(mount, os.O_RDONLY)
    try:
        mounting.sync_file_system(fd)  # whatever was undone, say, is on the disk
    except OSError as error:
        assert error.errno == errno.EIO
    finally:
        os.close(fd)
    mended = failing.now()
    failing.fail()
    await snapshotter.update("reference", {"n": "0"})
    names = {name for call in calls for name in (*call.was, *call.becomes)}
    rest = {name: value for name, value in before.items() if name not in names}
    return Batch(calls, rest, said, (begun, answered, mended, failing.now()))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("done", [0, 1, FOREVER], ids=["refused", "the first is done", "done"])
@pytest.mark.parametrize("times", [1, 2, FOREVER], ids=["once", "twice", "until it is mended"])
async def test_a_batch_is_there_or_not(
    failing: Disk, kind: str, done: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a power cut at any time.  Who was told that it failed finds it undone; who was told that nobody knows finds it
    done or undone."""
    batches = []
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            for name in ("reference", "label"):
                await snapshotter.prepare(name, labels={"n": "0"})
            await snapshotter.flush()
            start, end = beginning(mount / "root/metadata.mdb")
            for n in range(ROUNDS):
                batch = await run(snapshotter, n, failing, {"start": start, "end": end, "times": times, "done": done}, mount)
                check(batch, state(snapshotter), batch.times[-1])
                if any(batch.said):
                    batches.append(batch)
            last = state(snapshotter)
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            assert state(snapshotter) == last
    assert batches, "the test means something"
    monkeypatch.setattr(unflushed_room, "boot_id", lambda: "the next boot")
    history = failing.history()
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    points = [(at, batch) for batch in batches for at in {*batch.times, *instants(batch, history[0])}]
    for at, batch in chance.sample(points, min(CUTS, len(points))):
        image = failing.base.with_name("cut")
        how = after_power_cut(failing, history, at, chance, image)
        try:
            with loop_device(image) as device, mounted(device, kind, tmp_path / "after") as mount:
                async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
                    check(batch, state(snapshotter), at)
        except BaseException as error:
            error.add_note(f"power cut {how}, of {batch.times} (seed {seed})")
            raise


async def test_a_file_system_that_is_shut_down_says_what_to_do(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel lets nobody open its files any more, so the records can't be opened anew; after that all is there."""
    async with open_snapshotter(small_disk / "root", Options(rootfs=False)) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.flush()
        monkeypatch.setattr(snapshotter.records.environment, "is_panicking", lambda: True)  # as where the meta page is refused
        fd = os.open(small_disk, os.O_RDONLY)
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))  # EXT4_IOC_SHUTDOWN, without its log
        os.close(fd)
        with pytest.raises(Unavailable, match="Input/output error"):
            await snapshotter.records.write(lambda writer: writer.raise_last_id(100))
        to_do = "end the daemon, check that file system and mount it anew, and start the daemon again$"
        with pytest.raises(Unavailable, match=to_do) as refused:
            await snapshotter.stat("a")
        assert refused.value.errno == errno.EIO


def instants(batch: Batch, writes: list[Write]) -> list[int]:
    """When something was written since the batch began."""
    begun, *_, ended = batch.times
    return [write.at for write in writes if begun < write.at <= ended]


DIES = """
import os, sys
import trio
from snapfs import Options, SnapshotError, open_snapshotter

async def main():
    async with open_snapshotter(sys.argv[1], Options(rootfs=False)) as snapshotter:
        print("open", flush=True)
        sys.stdin.readline()
        try:
            await snapshotter.prepare("new")
        except SnapshotError as error:
            print(error, flush=True)
        os._exit(0)

trio.run(main)
"""


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_what_a_start_finds_is_on_the_disk(
    failing: Disk, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last process ended in doubt: the disk may then have what it said it had not, and the kernel has not."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            await snapshotter.prepare("reference")
        command = [sys.executable, "-c", DIES, f"{mount}/root"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"open\n"
            start, _ = beginning(mount / "root/metadata.mdb")
            failing.fail(write=errno.EIO, start=start, end=start + 2 * BLOCK, done=1)
            said, _ = child.communicate(b"\n", timeout=60)
        assert b"whether it was done will be known when the disk takes writes again" in said
        failing.fail()
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            found, at = state(snapshotter), failing.now()
    monkeypatch.setattr(unflushed_room, "boot_id", lambda: "the next boot")
    image, history = failing.base.with_name("cut"), failing.history()
    writes, flushes = history
    flushed = max(flush for flush in flushes if flush <= at)
    after_power_cut(failing, ([write for write in writes if write.at <= flushed], flushes), at, random.Random(0), image)
    with loop_device(image) as device, mounted(device, kind, tmp_path / "after") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            assert state(snapshotter) == found
