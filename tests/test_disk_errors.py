"""A disk that fails, and a file system that becomes read-only: who is told what, and what is left when all is well again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs import Damaged, Kind, Options, Unavailable, open_snapshotter
from snapfs.kernel import probe
from snapfs.kernel.mounttable import mount_table
from snapfs.root.layers import Layers
from tests.daemon import Daemon
from tests.disk import Disk, disk, loop_device, make_file_system, mounted

pytestmark = [pytest.mark.mounts, pytest.mark.durable]

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
            assert (await snapshotter.stat("a")).kind is Kind.ACTIVE
            with pytest.raises(Damaged):
                await snapshotter.commit("base", "a")
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


def shown(tree: Path, files: str = "*") -> dict[Path, dict[str, object]]:
    """What the tree says of each active snapshot and view, but for where it is mounted."""
    texts = {path: json.loads(path.read_text()) for path in tree.glob(f"[av]*/*/{files}.json")}
    return {path: {**dict(said), "mounted": 0} if path.name == "info.json" else {"": said} for path, said in texts.items()}


def test_a_file_system_that_becomes_read_only(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """As ext4 does when it finds itself damaged.  Each change says EROFS, in words too, and changes nothing; reads go on, and
    the end is clean.  When it was checked and mounted again, all is there."""
    image = tmp_path / "image"
    make_file_system("ext4", image)
    with loop_device(image) as device:
        with mounted(device, "ext4", tmp_path / "disk") as mount:
            daemon = make_daemon(root=mount / "root").start()
            tree = daemon.mnt
            (tree / "active/a").mkdir()
            (tree / "active/a/diff/file").write_text("x")
            (tree / "active/a").rename(tree / "committed/base")
            subprocess.run(["sync", str(tree / "committed/base")], check=True)
            for name in ("web", "other"):
                (tree / f"committed/base/active/{name}").mkdir()
                (tree / f"active/{name}/labels/l").write_text("1")
                assert (tree / f"active/{name}/rootfs/file").read_text() == "x"
            (tree / "committed/base/view/peek").mkdir()
            before = shown(tree)
            assert len(before) == 9

            Path(f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error").write_text("a test")
            calls: list[tuple[str, Callable[[], object]]] = [
                ("mkdir active/new", (tree / "active/new").mkdir),
                ("mkdir committed/base/view/new", (tree / "committed/base/view/new").mkdir),
                ("rename active/web committed/n", lambda: (tree / "active/web").rename(tree / "committed/n")),
                ("rename active/web active/z", lambda: (tree / "active/web").rename(tree / "active/z")),
                ("rmdir active/web", (tree / "active/web").rmdir),
                ("rmdir view/peek", (tree / "view/peek").rmdir),
                ("write active/web/labels/new", lambda: (tree / "active/web/labels/new").write_text("2")),
                ("write active/web/labels/l", lambda: (tree / "active/web/labels/l").write_text("2")),
                ("unlink active/web/labels/l", (tree / "active/web/labels/l").unlink),
                ("readlink view/peek/rootfs", (tree / "view/peek/rootfs").readlink),  # which was never mounted
            ]
            for line, call in calls:
                said = len(daemon.error_log())
                with pytest.raises(OSError, match="Read-only file system") as refused:
                    call()
                assert refused.value.errno == errno.EROFS
                told = daemon.error_log()[said]
                assert f" EROFS {line}: cannot " in told
                assert ": Read-only file system" in told
            for name in ("web", "other"):
                with pytest.raises(OSError, match="Read-only file system"):
                    (tree / f"active/{name}/rootfs/new").write_text("2")
                assert (tree / f"active/{name}/rootfs/file").read_text() == "x"
                assert (tree / f"active/{name}/labels/l").read_text() == "1\n"
                assert os.listdir(tree / f"active/{name}/labels") == ["l"]
                assert (tree / f"active/{name}/changes").read_text() == ""
            assert shown(tree) == before
            assert sorted(os.listdir(tree / "active")) == ["other", "web"]
            assert os.listdir(tree / "committed") == ["base"]
            assert os.listdir(tree / "view") == ["peek"]
            assert daemon.stop() == 0
            assert not any("Traceback" in line for line in daemon.said)
            assert [place.target for place in mount_table() if place.target.startswith(f"{tmp_path}/")] == [str(mount)]
            daemon.said.clear()
            with pytest.raises(AssertionError):
                daemon.start()
            assert daemon.ended() == 1
            assert daemon.said == [f"snapfs: cannot use {mount}/root as root: Read-only file system ({mount}/root/lock)\n"]

        assert subprocess.run(["fsck.ext4", "-fy", device], capture_output=True, check=False).returncode in (0, 1)
        with mounted(device, "ext4", tmp_path / "disk"):
            daemon.said.clear()
            daemon.start()
            assert os.listdir(tree / "committed") == ["base"]
            assert os.listdir(tree / "view") == ["peek"]
            assert shown(tree) == before
            (tree / "active/web/rootfs/new").write_text("2")
            (tree / "active/web").rename(tree / "committed/n")
            for name in ("view/peek", "active/other", "committed/n", "committed/base"):
                (tree / name).rmdir()
            assert daemon.stop() == 0
            assert len(daemon.said) == 1
            assert os.listdir(mount / "root/snapshots") == os.listdir(mount / "root/rootfs") == []


SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of linux/fs.h


@each_kind
def test_a_file_system_that_was_shut_down(kind: str, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """As xfs does when its log fails: nothing can be written any more, nor what is mapped of it.  The daemon goes on to answer,
    changes nothing, and ends as ever; mounted again, all is there."""
    make_file_system(kind, tmp_path / "image")
    with loop_device(tmp_path / "image") as device:
        with mounted(device, kind, tmp_path / "disk") as mount:
            daemon = make_daemon("-o", "no_rootfs", root=mount / "root").start()
            tree = daemon.mnt
            (tree / "active/a").mkdir()
            (tree / "active/a").rename(tree / "committed/base")
            (tree / "active/b").mkdir()
            (tree / "committed/base/usage.json").read_text()
            subprocess.run(["sync", str(tree / "committed/base")], check=True)  # the records were in doubt if it went meanwhile
            os.sync()  # from here on the kernel asks the file system before anything mapped is written to
            fd = os.open(mount, os.O_RDONLY)
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", 2))
            os.close(fd)
            before = shown(tree, "[im]*")
            for _ in range(2):
                for call in ((tree / "active/new").mkdir, (tree / "active/b").rmdir):
                    with pytest.raises(OSError, match="Input/output error"):
                        call()
                assert os.listdir(tree / "active") == ["b"]
                assert os.listdir(tree / "committed") == ["base"]
                assert shown(tree, "[im]*") == before
            assert all(" EIO " in line for line in daemon.error_log())
            assert daemon.stop() in (0, 1)
            assert not any("Traceback" in line for line in daemon.said)
            assert len(daemon.said) < 20, "one line for each directory of the pool"
            for use in (Layers.claim, Layers.open):
                with pytest.raises(Unavailable, match="Input/output error"):
                    use(str(mount / "root"))
        with mounted(device, kind, tmp_path / "disk"):
            daemon.said.clear()
            daemon.start()
            assert shown(tree, "[im]*") == before
            (tree / "active/b").rmdir()
            assert daemon.stop() == 0


COMMIT = """
import sys
from pathlib import Path
import trio
from snapfs import Options, open_snapshotter

async def main():
    async with open_snapshotter(sys.argv[1], Options(rootfs=False)) as snapshotter:
        await snapshotter.prepare("a")
        Path(snapshotter.layers.fs(1), "file").write_bytes(b"x" * 8192)
        await snapshotter.commit("base", "a", wait=False)
        print("committed", flush=True)  # and the flush has not begun
        sys.stdin.readline()
        try:
            await snapshotter.flush()
        finally:
            print("ended")

trio.run(main)
"""


@each_kind
async def test_what_a_disk_lost_that_could_not_be_told(failing: Disk, kind: str, tmp_path: Path) -> None:
    """A disk that fails for good takes no note of what it loses.  Mounted anew in the same boot, it is not believed."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        command = [sys.executable, "-c", COMMIT, f"{mount}/root"]
        # a process of its own: LMDB's lock file is a map of that disk as well, on which SIGBUS can be the end
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"committed\n"
            failing.fail(write=errno.EIO, flush=errno.EIO)
            child.communicate(b"\n", timeout=20)
        assert child.returncode != 0
    failing.fail()
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        file = mount / "root/snapshots/1/fs/file"
        assert not file.exists() or file.read_bytes() != b"x" * 8192, "the test means something"
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            with pytest.raises(Damaged, match='"base" may be torn'):
                await snapshotter.prepare("web", "base")
            await snapshotter.remove("base")


@each_kind
def test_one_mount_is_told_from_the_next(failing: Disk, kind: str, tmp_path: Path) -> None:
    """But not where it is seen: a daemon that was killed may be started again in another mount namespace."""
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        before = probe.mount_instance(str(mount))
        asking = f"from snapfs.kernel import probe; print(probe.mount_instance({str(mount)!r}))"
        elsewhere = subprocess.run(
            ["unshare", "--mount", sys.executable, "-c", asking], check=True, stdout=subprocess.PIPE, text=True
        )
        assert elsewhere.stdout == f"{before}\n" != "\n"
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        assert probe.mount_instance(str(mount)) == before
    with mounted(failing.device, kind, tmp_path / "disk") as mount:
        assert probe.mount_instance(str(mount)) not in ("", before)


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
