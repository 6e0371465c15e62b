"""The disk under ROOT: full, read-only, copied away and back."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from snapfs import Info, Kind, open_snapshotter
from tests.daemon import Daemon
from tests.mounts import copy_as_cut, loop_mounted, mounted

pytestmark = pytest.mark.durable


async def test_a_power_cut_after_any_call_loses_nothing_of_it(small_disk: Path, tmp_path: Path) -> None:
    """The image of the disk is copied the moment a call returns, which is what a power cut at that moment would leave:
    whatever is not flushed is still in the page cache above it.  Each copy must hold what had been acknowledged."""
    copies: list[tuple[Path, list[Info]]] = []
    async with open_snapshotter(small_disk) as snapshotter:

        async def cut() -> None:
            copy = copy_as_cut(tmp_path / "image", tmp_path / f"copy{len(copies)}")
            copies.append((copy, await snapshotter.walk()))

        await snapshotter.prepare("warm")
        for n in range(50):  # from now on LMDB reuses pages: a file that grows would flush the directories along with it
            await snapshotter.update("warm", {"n": str(n)})
        await snapshotter.prepare("a", labels={"x": "1"})
        await cut()
        await snapshotter.commit("base", "a")
        await cut()
        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(snapshotter.prepare, f"web{n}", "base")
        await cut()
        await snapshotter.view("peek", "base")
        await snapshotter.rename("base", "ground")
        await cut()
        await snapshotter.update("web1", {"team": "blue"})
        await snapshotter.remove("web2")
        await cut()
    for copy, expected in copies:
        with loop_mounted(copy, tmp_path / "after") as disk:
            async with open_snapshotter(disk) as survivor:
                assert await survivor.walk() == expected
                for info in expected:
                    assert sorted(os.listdir(survivor.layers.directory(info.id))) == (
                        ["fs"] if info.kind is Kind.VIEW else ["fs", "work"]
                    )
                    if info.kind is not Kind.COMMITTED:
                        assert await survivor.mounts(info.name)


def fill(file: Path) -> None:
    """Write to ``file`` until the disk is full."""
    with file.open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
        while True:
            out.write(b"x" * 4096)


def test_a_full_disk(make_daemon: Callable[..., Daemon], small_disk: Path) -> None:
    """mkdir says ENOSPC, in error_log too, and has changed nothing; the daemon lives on, and all is well when there is room."""
    daemon = make_daemon(root=small_disk).start()
    (daemon.mnt / "active/a").mkdir()
    fill(daemon.mnt / "active/a/diff/big")
    with pytest.raises(OSError, match="No space left") as refused:
        for n in range(2000):
            (daemon.mnt / f"active/k{n}").mkdir()
    made = int(str(refused.value.filename).rpartition("k")[2])
    assert refused.value.errno == errno.ENOSPC
    assert f" ENOSPC mkdir active/k{made}: " in daemon.error_log()[-1]
    assert len(os.listdir(daemon.mnt / "active")) == made + 1
    (daemon.mnt / "active/a/diff/big").unlink()
    (daemon.mnt / f"active/k{made}").mkdir()
    assert daemon.stop() == 0


def test_records_on_a_full_disk(make_daemon: Callable[..., Daemon], small_disk: Path) -> None:
    """No room for the records alone: the write that is refused says so, and the label is what it was."""
    daemon = make_daemon(root=small_disk).start()
    for n in range(30):
        (daemon.mnt / f"active/k{n}").mkdir()
    fill(daemon.mnt / "active/k0/diff/big")
    with pytest.raises(OSError, match="No space left") as refused:
        for n in range(3000):
            file = daemon.mnt / f"active/k{n % 30}/labels/l{n}"
            file.write_text("x" * 4000)
    assert refused.value.errno == errno.ENOSPC
    assert f" ENOSPC write {file.relative_to(daemon.mnt)}: " in daemon.error_log()[-1]
    assert not file.exists()
    (daemon.mnt / "active/k0/diff/big").unlink()
    file.write_text("now")
    assert file.read_text() == "now\n"
    assert daemon.stop() == 0


def test_a_root_that_cannot_be_written(make_daemon: Callable[..., Daemon], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    daemon = make_daemon(root=small_disk)
    with pytest.raises(AssertionError, match="Read-only file system") as ended:
        daemon.start()
    assert "ended with 1" in str(ended.value)
    assert len(daemon.said) == 1


@pytest.mark.mounts
async def test_a_copy_is_a_backup(tmp_path: Path) -> None:
    """cp -a of ROOT carries records, whiteouts and opaque directories; mount specs follow to where the copy is."""
    async with open_snapshotter(tmp_path / "root") as snapshotter:
        await snapshotter.prepare("a")
        layer = Path(snapshotter.layers.fs(1))
        (layer / "directory").mkdir()
        (layer / "directory/old").write_text("old")
        (layer / "deleted").write_text("old")
        await snapshotter.commit("base", "a", labels={"team": "blue"})
        with mounted(await snapshotter.prepare("web", "base"), tmp_path / "m") as m:
            (m / "deleted").unlink()
            (m / "directory/old").unlink()
            (m / "directory").rmdir()
            (m / "directory").mkdir()
            (m / "directory/new").write_text("new")
        assert os.getxattr(f"{snapshotter.layers.fs(2)}/directory", "trusted.overlay.opaque") == b"y"
        before = await snapshotter.walk()
    subprocess.run(["cp", "-a", str(tmp_path / "root"), str(tmp_path / "copy")], check=True)
    async with open_snapshotter(tmp_path / "copy") as restored:
        assert await restored.walk() == before
        spec = await restored.mounts("web")
        assert str(tmp_path / "copy/snapshots/2/fs") in spec[0].options[1]
        with mounted(spec, tmp_path / "m") as m:
            assert sorted(str(path.relative_to(m)) for path in m.rglob("*")) == ["directory", "directory/new"]
