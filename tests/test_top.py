"""The top directory of a new snapshot's layer: mode, owner, ACL and attributes of its parent's, at each door and after a power
cut."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapfs import Mount, Snapshotter, open_snapshotter
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.root.layers import FsTemplate
from snapfs.root.placing import COUNT, TOGETHER
from snapfs.root.pool import Pool
from tests.command import Command
from tests.containerd_client import connected
from tests.daemon import Daemon
from tests.mounts import mounted
from tests.placing import FILL, placed
from tests.plugin import Runner

pytestmark = pytest.mark.mounts

Make = Callable[..., Daemon]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as the kernel stores it: of tag, permissions and id each (acl(5))."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF  # the id of entries that name none
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
ACCESS = acl((USER_OBJ, 7, NOBODY), (USER, 5, 1234), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 0, NOBODY))
DEFAULT = acl((USER_OBJ, 7, NOBODY), (USER, 7, 4321), (GROUP_OBJ, 0, NOBODY), (MASK, 7, NOBODY), (OTHER, 0, NOBODY))


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def bare(directory: str) -> None:
    """As it is made."""


def private(directory: str) -> None:
    os.chown(directory, 26, 26)
    os.chmod(directory, 0o700)


def shared(directory: str) -> None:
    os.chown(directory, 0, 2000)
    os.chmod(directory, 0o2770)


def sticky(directory: str) -> None:
    os.chmod(directory, 0o1777)


def closed(directory: str) -> None:
    os.chmod(directory, 0)


def listed(directory: str) -> None:
    """With ACLs, attributes, and marks of overlayfs, which are none of the directory's own."""
    os.chown(directory, 1000, 1001)
    os.chmod(directory, 0o2750)
    os.setxattr(directory, "system.posix_acl_access", ACCESS)
    os.setxattr(directory, "system.posix_acl_default", DEFAULT)
    os.setxattr(directory, "user.note", b"mine")
    os.setxattr(directory, "user.empty", b"")
    os.setxattr(directory, "user.overlay.overlay.opaque", b"y")  # set through an overlay, on an overlay inside
    os.setxattr(directory, "trusted.overlay.impure", b"y")
    os.setxattr(directory, "user.overlay.impure", b"y")


KINDS = [bare, private, shared, sticky, closed, listed]


def shown(directory: str | Path) -> tuple[object, ...]:
    """All that is to be as the parent's."""
    found = os.stat(directory)
    marks = ("trusted.", "security.")
    attributes = {name: os.getxattr(directory, name) for name in os.listxattr(directory) if not name.startswith(marks)}
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, attributes


async def made(snapshotter: Snapshotter, change: Callable[[str], None], name: str = "base") -> str:
    """A committed snapshot whose top is as ``change`` makes it: its layer."""
    await snapshotter.prepare("b")
    layer = snapshotter.layers.fs((await snapshotter.stat("b")).id)
    change(layer)
    await snapshotter.commit(name, "b")
    return layer


def layer_of(snapshotter: Snapshotter, number: int) -> str:
    return snapshotter.layers.fs(number)


@pytest.mark.parametrize("change", KINDS)
async def test_it_is_as_the_parents(snapshotter: Snapshotter, change: Callable[[str], None]) -> None:
    below = await made(snapshotter, change)
    await snapshotter.prepare("web", "base")
    await snapshotter.view("peek", "base")
    for key in ("web", "peek"):
        above = layer_of(snapshotter, (await snapshotter.stat(key)).id)
        assert shown(above) == shown(below)
        assert "trusted.overlay.impure" not in os.listxattr(above)
    assert await snapshotter.changes("web", list) == []
    os.chmod(layer_of(snapshotter, (await snapshotter.stat("web")).id), 0o751)
    assert await snapshotter.changes("web", list) == ["C /\n"]


async def test_from_one_layer_to_the_next(snapshotter: Snapshotter) -> None:
    below = await made(snapshotter, listed)
    await snapshotter.prepare("a", "base")
    await snapshotter.commit("next", "a")
    await snapshotter.prepare("web", "next")
    assert shown(layer_of(snapshotter, (await snapshotter.stat("web")).id)) == shown(below)


@pytest.mark.parametrize("change", KINDS)
async def test_containerds_has_its_mode_and_the_owner(snapshotter: Snapshotter, change: Callable[[str], None]) -> None:
    below = os.stat(await made(snapshotter, change))
    await snapshotter.prepare("web", "base", origin="containerd")
    above = layer_of(snapshotter, (await snapshotter.stat("web")).id)
    assert (mode(above), os.stat(above).st_uid, os.stat(above).st_gid) == (0o755, below.st_uid, below.st_gid)
    assert not [name for name in os.listxattr(above) if not name.startswith("security.")]


def few(directory: str) -> None:
    for n in range(COUNT):
        os.setxattr(directory, f"user.n{n}", bytes(TOGETHER // COUNT))


def many(directory: str) -> None:
    for n in range(COUNT + 1):
        os.setxattr(directory, f"user.n{n}", b"")


def large(directory: str) -> None:
    os.setxattr(directory, "user.a", bytes(TOGETHER - 1))
    os.setxattr(directory, "user.b", b"12")


def unlistable(directory: str) -> None:
    """The kernel lists no more than 64 KiB of names."""
    for n in range(300):
        os.setxattr(directory, f"user.{n:0240}", b"")


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A root on a file system with room for attributes."""
    mount = Mount("tmpfs", "tmpfs", ("mode=700",))
    with mounted([mount], tmp_path / "roomy") as directory:
        yield directory


@pytest.mark.parametrize("change", [few, many, large, unlistable])
async def test_thousands_of_attributes_are_not_inherited(
    roomy: Path, change: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ACLs are, in any case; and the log says it once."""
    async with open_snapshotter(roomy) as snapshotter:

        def changed(directory: str) -> None:
            os.chmod(directory, 0o2750)
            change(directory)

        below = await made(snapshotter, changed)
        read: list[int] = []
        getxattr = os.getxattr

        def noted(*arguments: Any, **more: Any) -> bytes:
            value = getxattr(*arguments, **more)
            read.append(len(value))
            return value

        monkeypatch.setattr(os, "getxattr", noted)
        for n in range(2):
            await snapshotter.prepare(f"web{n}", "base")
        monkeypatch.undo()
        assert sum(read) <= 2 * (TOGETHER + 1000)
        above = layer_of(snapshotter, (await snapshotter.stat("web0")).id)
        assert shown(above)[:3] == (0o2750, os.geteuid(), os.getegid())
        names = [name for name in os.listxattr(above) if name.startswith("user.")]
        assert len(names) == (COUNT if change is few else 0)
        assert await snapshotter.changes("web0", list) == ([] if change is few else ["C /\n"])
        told = [record for record in caplog.records if "new snapshots on it get none of these" in record.getMessage()]
        assert len(told) == (change is not few)
    assert mode(below) == 0o2750


async def test_a_layer_whose_attributes_cannot_be_listed(roomy: Path) -> None:
    """It may be an overlay's, and a mark on it may be one of them."""
    async with open_snapshotter(roomy) as snapshotter:
        below = await made(snapshotter, lambda layer: os.makedirs(f"{layer}/d/x"))
        await snapshotter.prepare("web", "base")
        layer = layer_of(snapshotter, (await snapshotter.stat("web")).id)
        os.mkdir(f"{layer}/d")
        os.setxattr(f"{layer}/d", "trusted.overlay.opaque", b"y")
        for directory in (f"{layer}/d", layer):
            unlistable(directory)
        assert snapshotter.layers.may_be_mounted((await snapshotter.stat("web")).id)
        assert await snapshotter.changes("web", list) == ["C /\n", "C /d\n", "D /d/x\n"]
        await snapshotter.commit("next", "web")
        assert os.listdir(f"{below}/d") == ["x"]


async def test_mapped_ids_change_the_owner_alone(snapshotter: Snapshotter) -> None:
    below = await made(snapshotter, shared)
    await snapshotter.prepare("web", "base", labels={UID_MAPPING: "0:1000:10", GID_MAPPING: "0:3000:10"})
    above = layer_of(snapshotter, (await snapshotter.stat("web")).id)
    assert (mode(above), os.stat(above).st_uid, os.stat(above).st_gid) == (mode(below), 1000, 3000)


async def test_acls_of_root_itself_are_no_layers(root: Path) -> None:
    root.mkdir(mode=0o700)
    os.setxattr(root, "system.posix_acl_default", DEFAULT)
    async with open_snapshotter(root) as snapshotter:
        below = await made(snapshotter, bare)
        assert shown(below) == (0o755, 0, 0, {})
        await snapshotter.prepare("web", "base")
        assert await snapshotter.changes("web", list) == []


@pytest.mark.durable
@pytest.mark.parametrize("change", KINDS)
async def test_it_is_so_again_after_a_power_cut(
    root: Path, change: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "fill", lambda pool, checkpoint: None)
    async with open_snapshotter(root) as snapshotter:
        FILL(snapshotter.layers.pool, lambda: None)
        below = await made(snapshotter, change)
        expected = shown(below)
        await snapshotter.prepare("web", "base")
        await snapshotter.prepare("theirs", "base", origin="containerd")
        names = placed(snapshotter)
        numbers = [(await snapshotter.stat(key)).id for key in ("web", "theirs")]
    for number in numbers:  # what a power cut takes back: the rename, and all that was done to the directory
        away = root / "pool" / names[number]
        os.rename(root / f"snapshots/{number}", away)
        os.rmdir(away / "fs")
        (away / "fs").mkdir(mode=0o755)
    async with open_snapshotter(root) as snapshotter:
        assert shown(layer_of(snapshotter, numbers[0])) == expected
        assert mode(layer_of(snapshotter, numbers[1])) == 0o755
        assert await snapshotter.changes("web", list) == []


async def test_a_disk_that_refuses_an_attribute_leaves_nothing(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(snapshotter, bare)
    monkeypatch.setattr(
        "snapfs.root.placing.fs_template", lambda layers, record, marks: FsTemplate(attributes=[("user.x", bytes(70000))])
    )
    with pytest.raises(Exception, match='cannot make the directories of snapshot "web"'):
        await snapshotter.prepare("web", "base")
    assert sorted(os.listdir(snapshotter.layers.snapshots)) == ["1"]


@pytest.mark.parametrize("change", KINDS)
def test_a_workspace_stays_as_it_is(daemon: Daemon, change: Callable[[str], None]) -> None:
    """Through each verb, as the mounted file system shows it."""
    snapfs = Command(daemon.mnt)
    web = daemon.mnt / "active/web"
    snapfs("prepare", "web")
    change(str(web / "diff"))
    expected = shown(web / "diff")[:3]
    for words in (("checkpoint", "web"), ("rollback", "web"), ("rollback", "--keep", "web", "1"), ("checkpoint", "web")):
        snapfs(*words)
        assert shown(web / "rootfs")[:3] == shown(web / "diff")[:3] == expected
        assert snapfs("diff", "web") == ""
    snapfs("fork", "web", "other")
    os.mkdir(daemon.mnt / "committed/web@1/active/third")
    for key in ("other", "third"):
        assert shown(daemon.mnt / f"active/{key}/rootfs")[:3] == expected
        assert (daemon.mnt / f"active/{key}/changes").read_text() == ""


def test_a_mode_that_is_changed_in_the_workspace_is_kept_by_its_checkpoint(daemon: Daemon) -> None:
    snapfs = Command(daemon.mnt)
    web = daemon.mnt / "active/web"
    snapfs("prepare", "b")
    snapfs("commit", "b", "base")
    snapfs("prepare", "web", "-p", "base")
    os.chmod(web / "rootfs", 0o2770)
    assert snapfs("diff", "web") == "C /\n"
    snapfs("checkpoint", "web")
    assert mode(web / "rootfs") == 0o2770
    assert snapfs("diff", "web") == ""


def test_at_the_socket(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("--containerd", str(tmp_path / "snapfs.sock")).start()
    os.mkdir(daemon.mnt / "active/b")
    shared(str(daemon.mnt / "active/b/diff"))
    os.rename(daemon.mnt / "active/b", daemon.mnt / "committed/base")
    with connected(tmp_path / "snapfs.sock") as client:
        client.call("Prepare", key="theirs", parent="base")
        client.call("View", key="their view", parent="base")
    for path in ("active/theirs/diff", "view/their view"):
        layer = daemon.mnt / path
        if path.startswith("view"):
            layer = daemon.root / "snapshots/3/fs"
        assert (mode(layer), layer.stat().st_uid, layer.stat().st_gid) == (0o755, 0, 2000)


TESTS = """
import os
from pathlib import Path

DATA = Path(__file__).parent / "data"

def fill(directory):
    os.chmod(directory, 0o2750)
    (directory / "file").write_text("x")

def test_filled(snapshot_of, fresh_copy):
    assert os.stat(fresh_copy(snapshot_of(fill))).st_mode & 0o7777 == 0o2750

def test_copied(snapshot_of, fresh_copy):
    assert os.stat(fresh_copy(snapshot_of(DATA))).st_mode & 0o7777 == 0o700
"""


def test_in_the_fixtures_for_pytest(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    (runner.tests / "data").mkdir(mode=0o700)
    runner.write(conftest='pytest_plugins = "snapfs.testing"\n', test_it=TESTS)
    assert "2 passed" in runner(status=0)


def test_an_ordinary_users(open_path: Path) -> None:
    """Whoever may not write into the parent's top makes one like it all the same."""
    script = """
import os, stat, sys, trio
from snapfs import open_snapshotter
async def main():
    async with open_snapshotter(sys.argv[1]) as snapshotter:
        for n, mode in enumerate((0o555, 0o2770, 0o500)):
            await snapshotter.prepare("b")
            layer = snapshotter.layers.fs((await snapshotter.stat("b")).id)
            os.setxattr(layer, "user.note", b"mine")
            os.chmod(layer, mode)
            await snapshotter.commit(f"base{n}", "b")
            await snapshotter.prepare(f"web{n}", f"base{n}")
            above = snapshotter.layers.fs((await snapshotter.stat(f"web{n}")).id)
            assert stat.S_IMODE(os.stat(above).st_mode) == mode, oct(os.stat(above).st_mode)
            assert os.getxattr(above, "user.note") == b"mine"
            assert await snapshotter.changes(f"web{n}", list) == []
trio.run(main)
"""
    place = open_path / "alice"
    place.mkdir()
    os.chown(place, 1001, 1001)
    words = ["setpriv", "--reuid=1001", "--regid=1001", "--clear-groups", sys.executable, "-c", script, str(place / "root")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
