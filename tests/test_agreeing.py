"""Directories say what the records say of them, whatever ended the process in the middle of a change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from snapfs import Kind, Snapshotter, open_snapshotter
from snapfs.errors import Unavailable
from snapfs.offline.checking import Problem, check
from snapfs.offline.rebuilding import rebuild
from snapfs.root import imprint
from snapfs.root.imprint import Imprint
from snapfs.root.layers import Layers
from snapfs.store.writing import Writer
from tests.daemon import Daemon
from tests.processes import until

pytestmark = pytest.mark.durable

KILLED = """
import os, signal, sys, trio
from snapfs import open_snapshotter
from snapfs.root.layers import Layers
from snapfs.store.writing import Writer

async def main():
    async with open_snapshotter(sys.argv[1]) as snapshotter:
        for key in ("k", "other"):
            await snapshotter.prepare(key, labels={"l": "1"})
        write_imprint = Layers.write_imprint
        def die(layers, number, said):
            write_imprint(layers, number, said)
            os.kill(os.getpid(), signal.SIGKILL)
        Layers.write_imprint = die  # from here on: its directory says it, and the record's transaction never ends
        await eval(sys.argv[2])
trio.run(main)
"""

CHANGES = {
    "commit": 'snapshotter.commit("c", "k")',
    "rename": 'snapshotter.rename("k", "renamed")',
    "label": 'snapshotter.update("k", {"l": "2"})',
    "prepare": 'snapshotter.prepare("new")',
}


def killed(root: Path, change: str) -> None:
    """A process that is killed between the two halves of ``change``."""
    words = [sys.executable, "-c", KILLED, str(root), CHANGES[change]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def disagreeing(snapshotter: Snapshotter) -> list[int]:
    found = []
    with snapshotter.records.reading() as reader:
        for number in reader.ids():
            record = reader.record(number)
            assert record is not None
            expected = Imprint(msgspec.structs.replace(record, usage=None), reader.unflushed_since(number))
            if imprint.read(snapshotter.layers.directory(number)) != expected:
                found.append(number)
    return found


async def agreed(snapshotter: Snapshotter) -> None:
    with trio.fail_after(20):
        await snapshotter.agreeing.settled.wait()


@pytest.mark.parametrize("change", CHANGES)
async def test_a_start_after_a_kill_mends_what_disagrees(root: Path, change: str) -> None:
    killed(root, change)
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert disagreeing(snapshotter) == []
        before = [(info.name, info.kind, info.labels) for info in await snapshotter.walk()]
    assert before == [("k", Kind.ACTIVE, {"l": "1"}), ("other", Kind.ACTIVE, {"l": "1"})]
    assert [found for found in check(str(root)) if found.problem is not Problem.NOTE] == []
    list(rebuild(str(root)))
    async with open_snapshotter(root) as snapshotter:
        assert [(info.name, info.kind, info.labels) for info in await snapshotter.walk()] == before


async def test_the_test_means_something(root: Path) -> None:
    killed(root, "commit")
    list(rebuild(str(root)))
    async with open_snapshotter(root) as snapshotter:
        assert [info.name for info in await snapshotter.walk()] == ["c", "other"], "nobody was ever told that it is committed"


class Reads:
    """How often imprints are read, and after how many reading fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._read = imprint.read
        monkeypatch.setattr(imprint, "read", self)

    def __call__(self, directory: str) -> Imprint | None:
        self.count += 1
        return self._read(directory)


async def fill(root: Path, count: int = 3) -> None:
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)  # or nothing is noted at its end
        for number in range(count):
            await snapshotter.prepare(f"k{number}")


async def test_after_a_clean_end_nothing_is_compared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(root)
    reads = Reads(monkeypatch)
    for _ in range(2):
        async with open_snapshotter(root) as snapshotter:
            await agreed(snapshotter)
    assert reads.count == 0


async def test_after_another_boot_all_is_compared_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may have taken what was written to directories last, even after a clean end."""
    await fill(root)
    os.removexattr(root / "snapshots/2", imprint.ATTRIBUTE)
    reads = Reads(monkeypatch)
    monkeypatch.setattr("snapfs.root.unflushed.boot_id", lambda: "another boot")
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert reads.count == 4, "three, and that which disagrees once more"
        assert disagreeing(snapshotter) == []
    before = reads.count
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert reads.count == before


async def test_whoever_ends_before_all_is_compared_leaves_it_to_the_next(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(root, "commit")
    begun, go_on = trio.Event(), trio.Event()

    async def never(*_: object, **__: object) -> None:
        begun.set()
        await go_on.wait()

    with monkeypatch.context() as patch:
        patch.setattr("snapfs.services.agreeing.Agreeing._compare", never)
        async with open_snapshotter(root):
            await begun.wait()
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert disagreeing(snapshotter) == []


async def test_a_disk_that_refuses_it_is_asked_again_at_the_next_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(root, "commit")

    def refuse(layers: Layers, number: int, said: Imprint) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Layers, "write_imprint", refuse)
        async with open_snapshotter(root) as snapshotter:
            await agreed(snapshotter)
            assert disagreeing(snapshotter) == [1]
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert disagreeing(snapshotter) == []


async def test_what_could_not_be_taken_back_is_mended_by_the_next_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(root, 2)
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        write_imprint = Layers.write_imprint
        times = 0

        def once(layers: Layers, number: int, said: Imprint) -> None:
            nonlocal times
            times += 1
            if times > 1:
                raise OSError(5, "Input/output error")
            write_imprint(layers, number, said)

        def fails(writer: Writer, number: int, record: object) -> None:
            raise Unavailable("a test")

        with monkeypatch.context() as patch:
            patch.setattr(Layers, "write_imprint", once)
            patch.setattr(Writer, "put", fails)
            with pytest.raises(Unavailable):
                await snapshotter.rename("k0", "renamed")
        assert disagreeing(snapshotter) == [1]
    async with open_snapshotter(root) as snapshotter:
        await agreed(snapshotter)
        assert disagreeing(snapshotter) == []


async def test_damage_and_changes_meanwhile_stop_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be told is left as it is, and while all is compared snapshots come, go and change."""
    monkeypatch.setattr("snapfs.services.agreeing.CHUNK", 2)
    await fill(root, 20)

    async with open_snapshotter(root) as snapshotter:

        def damage(writer: Writer) -> None:
            writer._txn.put((3).to_bytes(8, "big"), b"\xc1", db=writer._tables.snapshots)

        await snapshotter.records.write(damage)
    os.rename(root / "snapshots/5", root / "elsewhere")
    os.setxattr(root / "snapshots/6", imprint.ATTRIBUTE, b"\xc1")
    (root / "lock").write_text("1\n")
    async with open_snapshotter(root) as snapshotter:
        for number in range(7, 20):
            with suppress(Unavailable):
                await snapshotter.rename(f"k{number}", f"renamed {number}")
                await snapshotter.remove(f"renamed {number}")
                await snapshotter.prepare(f"again {number}")
        await agreed(snapshotter)
        assert snapshotter._root.agrees
        borne = imprint.read(str(root / "snapshots/6"))
        assert borne is not None
        assert borne.record.name == "k5"
        with snapshotter.records.reading() as reader:
            for number in reader.ids() - {3, 5}:
                record, borne = reader.record(number), imprint.read(snapshotter.layers.directory(number))
                assert borne is not None
                assert borne.record == record


def test_a_daemon_that_is_killed(daemon: Daemon) -> None:
    for number in range(5):
        os.mkdir(daemon.mnt / f"active/k{number}")
    os.removexattr(daemon.root / "snapshots/3", imprint.ATTRIBUTE)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    subprocess.run(["umount", "-l", daemon.mnt], check=True)
    daemon.said.clear()
    daemon.start()
    until(lambda: imprint.read(str(daemon.root / "snapshots/3")), "its directory says again what it is")
    assert daemon.stop() == 0
    assert len(daemon.said) == 1
