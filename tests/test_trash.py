"""What stands in the way of deleting a removed snapshot: put out of the way where the daemon may, else told."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from snapfs import Snapshotter, Unavailable, open_snapshotter
from snapfs.kernel import mounting
from snapfs.offline.checking import Problem, check
from snapfs.root.trash import DEPTH, STUCK
from tests.containerd_client import connected
from tests.daemon import Daemon
from tests.disk import make_file_system
from tests.mounts import loop_mounted
from tests.processes import until
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("open_path", "users")

Make = Callable[..., Daemon]

WITHOUT = ("setpriv", "--bounding-set=-linux_immutable")
"""A command that runs another as root, who may not change the flags immutable and append-only."""


def chattr(flag: str, *paths: Path) -> None:
    subprocess.run(["chattr", flag, *paths], check=True)


@pytest.fixture
def disk(small_disk: Path) -> Iterator[Path]:
    """An ext4, whatever the temporary directory is on; nothing immutable is left on it."""
    try:
        yield small_disk
    finally:
        subprocess.run(["chattr", "-R", "-i", "-a", small_disk], stderr=subprocess.DEVNULL, check=False)


def fill(layer: Path) -> None:
    (layer / "d/below").mkdir(parents=True)
    for path in (layer / "f", layer / "d/f", layer / "d/below/f"):
        path.write_text("x")
    (layer / "d/link").symlink_to("f")
    os.mkfifo(layer / "d/fifo")


FLAGS = [("+i", "f"), ("+a", "f"), ("+i", "d"), ("+a", "d"), ("+i", "d/below/f"), ("+a", "d/below"), ("+i", ""), ("+a", "")]


async def removed(snapshotter: Snapshotter, flag: str, path: str) -> None:
    """``k`` with something in it that has ``flag``, and its removal."""
    await snapshotter.prepare("k")
    layer = Path(snapshotter.layers.fs((await snapshotter.stat("k")).id))
    fill(layer)
    chattr(flag, layer / path)
    await snapshotter.remove("k")


@pytest.mark.parametrize(("flag", "path"), FLAGS)
async def test_immutable_and_append_only(disk: Path, flag: str, path: str) -> None:
    async with open_snapshotter(disk / "root") as snapshotter:
        await removed(snapshotter, flag, path)
        assert os.listdir(disk / "root/trash") == []
        await snapshotter.cleanup()


async def test_all_of_it_and_deeper_than_the_stack(disk: Path) -> None:
    async with open_snapshotter(disk / "root") as snapshotter:
        await snapshotter.prepare("k")
        layer = Path(snapshotter.layers.fs(1))
        deep = layer.joinpath(*["d"] * (2 * DEPTH + 5))
        deep.mkdir(parents=True)
        (deep / "f").write_text("x")
        subprocess.run(["chattr", "-R", "+i", layer], check=True)
        await snapshotter.remove("k")
        assert os.listdir(disk / "root/trash") == []


async def test_the_whole_directory(disk: Path) -> None:
    """Which can't even be moved to the trash."""
    async with open_snapshotter(disk / "root") as snapshotter:
        for _ in range(2):
            await snapshotter.prepare("k")
            directory = Path(snapshotter.layers.directory((await snapshotter.stat("k")).id))
            subprocess.run(["chattr", "-R", "+i", directory], check=True)
            await snapshotter.remove("k")
            assert not directory.exists()
        assert snapshotter.layers.pending_deletions == 0


def test_the_whole_directory_where_it_may_not_be_changed(disk: Path, make_daemon: Make) -> None:
    daemon = make_daemon(root=disk / "root")
    daemon.prefix = WITHOUT
    daemon.start()
    os.mkdir(daemon.mnt / "active/k")
    directory = daemon.root / "snapshots/1"
    subprocess.run(["chattr", "-R", "+i", directory], check=True)
    os.rmdir(daemon.mnt / "active/k")
    for _ in range(2):
        with pytest.raises(PermissionError):
            clean_up(daemon)
        assert re.search(r"snapshots/1\S* can't be deleted: .*as root: chattr -i -a ", daemon.error_log()[-1])
        assert daemon.stop() == 0
        daemon.start()
    subprocess.run(["chattr", "-R", "-i", directory], check=True)
    clean_up(daemon)
    assert not directory.exists()
    assert daemon.stop() == 0


async def test_a_file_that_has_another_name_elsewhere_keeps_its_flags(disk: Path) -> None:
    outside, twice = disk / "outside", "one"
    outside.write_text("x")
    async with open_snapshotter(disk / "root") as snapshotter:
        await snapshotter.prepare("k")
        layer = Path(snapshotter.layers.fs(1))
        os.link(outside, layer / "f")
        (layer / twice).write_text("x")
        os.link(layer / twice, layer / "two")
        chattr("+i", outside, layer / twice)
        await snapshotter.remove("k")
        assert os.listdir(disk / "root/trash") == []
    with pytest.raises(PermissionError):
        outside.write_text("y")
    assert outside.stat().st_nlink == 1


def clean_up(daemon: Daemon) -> None:
    with (daemon.mnt / ".snapfs/cleanup").open("wb", buffering=0) as file:
        file.write(b"1")


def flagged_and_removed(daemon: Daemon, flag: str = "+i", path: str = "d/f") -> str:
    """The path in the trash of what can't be deleted of the snapshot ``k``, which was removed."""
    os.mkdir(daemon.mnt / "active/k")
    number = json.loads((daemon.mnt / "active/k/info.json").read_text())["id"]
    layer = daemon.root / f"snapshots/{number}/fs"
    fill(layer)
    chattr(flag, layer / path)
    os.rmdir(daemon.mnt / "active/k")
    trash = daemon.root / "trash"
    until(lambda: any(STUCK in os.listxattr(each) for each in trash.iterdir()), "it says why it is still there")
    (stuck,) = trash.iterdir()
    return f"{stuck}/fs/{path}"


def test_what_it_may_not_change_is_told_at_cleanup_in_the_log_and_by_check(disk: Path, make_daemon: Make) -> None:
    daemon = make_daemon(root=disk / "root")
    daemon.prefix = WITHOUT
    daemon.start()
    path = flagged_and_removed(daemon)
    words = f"{path} can't be deleted: it is immutable or append-only, and this daemon may not change that; do it as root: "
    command = f"chattr -i -a {path}"
    with refused(daemon, errno.EPERM, "write", ".snapfs/cleanup", "immutable or append-only"):
        clean_up(daemon)
    assert daemon.error_log()[-1].endswith(f"{words}{command}; then clean up again")
    assert not Path(path).with_name("below").exists(), "all else is deleted"
    assert json.loads((daemon.mnt / ".snapfs/stats.json").read_text())["trash_waiting"] == 1
    os.mkdir(daemon.mnt / "active/another")
    os.rmdir(daemon.mnt / "active/another")
    assert daemon.stop() == 0
    assert [line for line in daemon.said if words in line] == [f"snapfs: {words}{command}\n"], "and once is enough"
    (finding,) = [found for found in check(str(disk / "root")) if found.problem is not Problem.NOTE]
    assert finding.problem is Problem.ORPHANED
    assert finding.text == f"of a removed snapshot: {words}{command}"
    assert "next start" in finding.remedy
    words_of_check = [sys.executable, "-m", "snapfs.cli", "check", str(disk / "root")]
    done = subprocess.run(words_of_check, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert command in done.stdout
    subprocess.run(command.split(), check=True)
    daemon.said.clear()
    daemon.start()
    clean_up(daemon)
    assert os.listdir(disk / "root/trash") == []
    assert daemon.stop() == 0
    assert list(check(str(disk / "root"))) == []


def test_whoever_may_not_read_the_layers_is_told_no_path_of_theirs(disk: Path, make_daemon: Make) -> None:
    daemon = make_daemon("-o", "allow_other", root=disk / "root")
    daemon.prefix = WITHOUT
    daemon.start()
    flagged_and_removed(daemon)
    with refused(daemon, errno.EPERM, "write", ".snapfs/cleanup", "files of 1 removed snapshots can't be deleted"):
        clean_up(daemon)
    assert "d/f" not in daemon.error_log()[-1]


def test_at_the_socket(disk: Path, make_daemon: Make, tmp_path: Path) -> None:
    """Remove is done all the same, as in containerd; a Cleanup tells."""
    daemon = make_daemon("--containerd", str(tmp_path / "snapfs.sock"), root=disk / "root")
    daemon.prefix = WITHOUT
    daemon.start()
    with connected(tmp_path / "snapfs.sock") as client:
        client.call("Prepare", key="k", parent="")
        fill(daemon.root / "snapshots/1/fs")
        chattr("+i", daemon.root / "snapshots/1/fs/f")
        client.call("Remove", key="k")
        assert os.listdir(daemon.mnt / "active") == []
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Cleanup")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "chattr -i -a" in str(caught.value.details())


async def test_what_is_mounted_in_it_is_left_alone_and_told(disk: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    async with open_snapshotter(disk / "root") as snapshotter:
        await snapshotter.prepare("k")
        place = Path(snapshotter.layers.fs(1), "mnt")
        place.mkdir()
        subprocess.run(["mount", "--bind", outside, place], check=True)
        await snapshotter.remove("k")
        with pytest.raises(Unavailable, match=r"/fs/mnt can't be deleted: something is mounted there") as told:
            await snapshotter.cleanup()
        assert told.value.errno == errno.EBUSY
        assert (outside / "file").read_text() == "x"
        (stuck,) = (disk / "root/trash").iterdir()
        mounting.unmount(str(stuck / "fs/mnt"))
        await snapshotter.cleanup()
        assert os.listdir(disk / "root/trash") == []


async def test_all_of_several_is_tried_and_the_first_is_named(disk: Path, tmp_path: Path) -> None:
    async with open_snapshotter(disk / "root") as snapshotter:
        for number in (1, 2, 3):
            await snapshotter.prepare("k")
            place = Path(snapshotter.layers.fs(number), "mnt")
            place.mkdir()
            if number != 2:
                subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
            await snapshotter.remove("k")
        with pytest.raises(Unavailable, match="and so it is with 1 more"):
            await snapshotter.cleanup()
        for stuck in (disk / "root/trash").iterdir():
            mounting.unmount(str(stuck / "fs/mnt"))
        await snapshotter.cleanup()
        assert os.listdir(disk / "root/trash") == []


SCRIPT = """
import os, sys, trio
from snapfs import open_snapshotter
async def main():
    async with open_snapshotter(sys.argv[1]) as snapshotter:
        for modes in ((0o555, 0o555), (0o000, 0o755), (0o500, 0o300), (0o111, 0o000)):
            await snapshotter.prepare("k")
            layer = snapshotter.layers.fs((await snapshotter.stat("k")).id)
            os.makedirs(layer + "/go/pkg/mod" + 60 * "/x")
            for directory, _, _ in os.walk(layer):
                with open(directory + "/file", "w") as file:
                    os.fchmod(file.fileno(), 0o444)
            found = [directory for directory, _, _ in os.walk(layer)]
            for place in reversed(found):
                os.chmod(place, modes[len(place) % 2])
            await snapshotter.remove("k")
            assert os.listdir(sys.argv[1] + "/trash") == []
        await snapshotter.cleanup()
trio.run(main)
"""


def alice(place: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """What an ordinary user meets, whose ``place`` is."""
    place.mkdir(exist_ok=True)
    os.chown(place, 1001, 1001)
    words = ["setpriv", "--reuid=1001", "--regid=1001", "--clear-groups", *command]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_an_ordinary_users_directories_that_may_not_be_written(tmp_path: Path) -> None:
    """As Go's module cache makes them."""
    done = alice(tmp_path / "alice", sys.executable, "-c", SCRIPT, tmp_path / "alice/root")
    assert done.returncode == 0, done.stderr


def test_what_belongs_to_another_user_is_told(tmp_path: Path) -> None:
    prepare = SCRIPT[: SCRIPT.index("        for modes")] + '        await snapshotter.prepare("k")\ntrio.run(main)\n'
    root = tmp_path / "alice/root"
    assert alice(tmp_path / "alice", sys.executable, "-c", prepare, root).returncode == 0
    foreign = root / "snapshots/1/fs/foreign"
    foreign.mkdir()
    (foreign / "file").write_text("x")
    remove = prepare.replace("prepare(", "remove(").replace("trio.run", "        await snapshotter.cleanup()\ntrio.run")
    done = alice(tmp_path / "alice", sys.executable, "-c", remove, root)
    assert done.returncode == 1
    assert "/fs/foreign/file can't be deleted: Permission denied; do it as its owner or as root: rm -rf " in done.stderr
    (stuck,) = (root / "trash").iterdir()
    assert stat.S_IMODE((stuck / "fs/foreign").stat().st_mode) == 0o755
    found = alice(tmp_path / "alice", sys.executable, "-m", "snapfs.cli", "check", root, "--json")  # root's is refused there
    assert [json.loads(line)["problem"] for line in found.stdout.splitlines()] == [Problem.ORPHANED]


def test_the_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    """Neither by chmod nor by chattr."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").write_text("x")
    os.chown(outside, 1001, 1001)
    outside.chmod(0o555)
    script = SCRIPT.replace('"/go/pkg/mod" + 60 * "/x")', f'"/go"); os.symlink({str(outside)!r}, layer + "/go/link")')
    done = alice(tmp_path / "alice", sys.executable, "-c", script, tmp_path / "alice/root")
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(outside.stat().st_mode) == 0o555
    assert (outside / "file").read_text() == "x"


SUBVOLUME = """
import fcntl, os, struct, sys
def make(name):
    arguments = bytearray(struct.pack("<q", 0) + name.encode().ljust(4088, b"\\0"))
    fcntl.ioctl(os.open(".", os.O_RDONLY), 0x5000940E, arguments)
def descend(count):
    for _ in range(count):
        os.mkdir("d")
        os.chdir("d")
def fix():
    fcntl.ioctl(os.open(".", os.O_RDONLY), 0x4008941A, struct.pack("<Q", 2))
made = []
for part in sys.argv[1].split("/"):
    if part.isdecimal():
        descend(int(part))
    else:
        make("s")
        os.chdir("s")
        made += [os.open(".", os.O_RDONLY)] if part == "ro" else []
    open("file", "w").write("x")
for top in reversed(made):
    os.fchdir(top)
    fix()
"""


@pytest.mark.parametrize(
    "what",
    [
        *("rw/120", "ro/120", "60/rw/120", "rw/60/ro/120/ro/3", "48/ro/1/rw/1/rw/2/ro/49/rw/51/rw", "ro", "rw/1/ro"),
        *("/".join(["rw"] * 300), "/".join(["ro/48"] * 5)),
    ],
)
async def test_subvolumes_that_users_have_made(tmp_path: Path, what: str) -> None:
    """On btrfs anybody who works in a snapshot without parent can make them, deep, within each other, or read-only."""
    make_file_system("btrfs", tmp_path / "image")
    with loop_mounted(tmp_path / "image", tmp_path / "disk") as disk:
        async with open_snapshotter(disk / "root") as snapshotter:
            await snapshotter.prepare("k")
            layer = disk / "root/snapshots/1/fs"
            layer.chmod(0o777)
            subprocess.run([sys.executable, "-c", SUBVOLUME, what], cwd=layer, check=True)
            await snapshotter.remove("k")
            await snapshotter.cleanup()
            assert os.listdir(disk / "root/trash") == []
            assert snapshotter.statistics().trash_waiting == 0
