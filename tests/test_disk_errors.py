"""A disk that fails, and a file system that becomes read-only: who is told what, and what is left when all is well again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs import Damaged, Options, Unavailable, open_snapshotter
from tests.conftest import Daemon
from tests.disk import Disk, disk, mounted

each_kind = pytest.mark.parametrize("kind", ["ext4", "xfs"])


@pytest.fixture
def failing(kind: str) -> Iterator[Disk]:
    """A disk that is well, so far."""
    with disk(kind) as made:
        yield made
        made.fail()


@each_kind
async def test_data_that_the_disk_refused_is_never_passed_off_as_whole(failing: Disk, kind: str, tmp_path: Path) -> None:
    """The kernel tells of it once; whoever opens the root later in the same boot must know, too."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            await snapshotter.prepare("a")
            layer = Path(snapshotter.layers.fs(1))
            needle = os.urandom(4096)
            (layer / "file").write_bytes(needle)
            os.sync()
            fd = os.open(layer / "file", os.O_RDWR)
            os.pwrite(fd, b"y" * 4096, 0)  # in place: the disk refuses the data, and no journal is in the way
            os.close(fd)
            (place,) = {write.offset + write.data.index(needle) for write in failing.history()[0] if needle in write.data}
            failing.fail(write=errno.EIO, start=place, end=place + 4096)
            with pytest.raises(Unavailable, match="cannot flush the layers: Input/output error") as refused:
                await snapshotter.commit("base", "a")
            assert refused.value.errno == errno.EIO
            failing.fail()
            await snapshotter.prepare("b")
            await snapshotter.commit("other", "b")
            with pytest.raises(Damaged):
                await snapshotter.prepare("web", "base")
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            with pytest.raises(Damaged):
                await snapshotter.prepare("web", "base")
            await snapshotter.prepare("web", "other")
            await snapshotter.accept("base")
            await snapshotter.prepare("web2", "base")


@each_kind
def test_a_remount_by_hand(failing: Disk, kind: str, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """While the daemon runs the kernel refuses it, since the records are open for writing; nothing is disturbed."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        daemon = make_daemon("-o", "no_rootfs", root=mount / "root").start()
        remounted = subprocess.run(["mount", "-o", "remount,ro", str(mount)], stderr=subprocess.PIPE, check=False)
        assert remounted.returncode == 32
        assert b"busy" in remounted.stderr
        (daemon.mnt / "active/a").mkdir()
        (daemon.mnt / "active/a").rename(daemon.mnt / "committed/base")
        assert daemon.stop() == 0


@each_kind
def test_a_disk_that_takes_no_writes(failing: Disk, kind: str, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Each change says EIO or EROFS, with a line in error_log; reads go on; after a mount of the disk that is well again, what
    was acknowledged is there."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        daemon = make_daemon("-o", "no_rootfs", root=mount / "root").start()
        tree = daemon.mnt
        for name in ("a", "b"):
            (tree / "active" / name).mkdir()
        (tree / "active/b").rename(tree / "committed/base")
        fd = os.open(tree / "committed/base", os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        failing.fail(write=errno.EIO, flush=errno.EIO)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("mkdir active/new", (tree / "active/new").mkdir),
            ("rename active/a committed/n", lambda: (tree / "active/a").rename(tree / "committed/n")),
            ("rename active/a active/z", lambda: (tree / "active/a").rename(tree / "active/z")),
            ("rmdir active/a", (tree / "active/a").rmdir),
            ("write active/a/labels/x", lambda: (tree / "active/a/labels/x").write_text("1")),
        ]
        for line, call in calls:
            with pytest.raises(OSError, match=r"error|Read-only") as refused:
                call()
            assert refused.value.errno in (errno.EIO, errno.EROFS), line
            word = errno.errorcode[refused.value.errno]
            assert any(f" {word} {line}: " in said for said in daemon.error_log()), (line, daemon.error_log())
            assert os.listdir(tree / "active") == ["a"]
            assert json.loads((tree / "committed/base/info.json").read_text())["name"] == "base"
        os.close(fd)
        daemon.stop()
    failing.fail()
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        daemon = make_daemon("-o", "no_rootfs", root=mount / "root").start()
        tree = daemon.mnt
        assert os.listdir(tree / "committed") == ["base"]
        assert set(os.listdir(tree / "active")) <= {"a", "z", "new"}
        (tree / "committed/base/active/web").mkdir()
        assert daemon.stop() == 0


@each_kind
def test_sync_tells_of_a_flush_that_failed_before_it(
    failing: Disk, kind: str, make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """mv starts a flush in the background, and the kernel tells of an error once: a later sync must say EIO all the same."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        daemon = make_daemon("-o", "no_rootfs", root=mount / "root").start()
        tree = daemon.mnt
        (tree / "active/a").mkdir()
        needle = os.urandom(4096)
        file = tree / "active/a/diff/file"
        file.write_bytes(needle)
        os.sync()
        (place,) = {write.offset + write.data.index(needle) for write in failing.history()[0] if needle in write.data}
        with file.open("r+b", buffering=0) as opened:
            opened.write(b"y" * 4096)
        failing.fail(write=errno.EIO, start=place, end=place + 4096)
        (tree / "active/a").rename(tree / "committed/base")
        for _ in range(2):
            fd = os.open(tree / "committed/base", os.O_RDONLY | os.O_DIRECTORY)
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(fd)
            os.close(fd)
            failing.fail()
        assert any(" EIO fsyncdir committed/base: " in line for line in daemon.error_log()), daemon.error_log()
        assert json.loads((tree / "committed/base/info.json").read_text())["state"] == "unflushed"
        with pytest.raises(OSError, match="Input/output error"):
            (tree / "committed/base/active/web").mkdir()
        daemon.stop()
