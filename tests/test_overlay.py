"""The mount specs mounted for real: what the kernel makes of them is what a snapshot is."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from snapfs import Options, Snapshotter, open_snapshotter
from snapfs.kernel import mounting
from tests.daemon import Daemon
from tests.mounts import mounted

pytestmark = pytest.mark.mounts


async def test_a_parentless_snapshot_is_its_own_layer(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with mounted(await snapshotter.prepare("a"), tmp_path / "m") as m:
        (m / "file").write_text("text")
    assert Path(snapshotter.layers.fs(1), "file").read_text() == "text"


async def test_children_share_a_base_and_keep_their_changes_apart(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with mounted(await snapshotter.prepare("b"), tmp_path / "m") as m:
        (m / "kept").write_text("base")
        (m / "changed").write_text("base")
        (m / "deleted").write_text("base")
        (m / "directory/below").mkdir(parents=True)
    await snapshotter.commit("base", "b")
    one, two = await snapshotter.prepare("one", "base"), await snapshotter.prepare("two", "base")
    with mounted(one, tmp_path / "1") as m1, mounted(two, tmp_path / "2") as m2:
        (m1 / "changed").write_text("one")
        (m1 / "deleted").unlink()
        (m1 / "directory/below").rmdir()
        (m2 / "new").write_text("two")
        assert sorted(os.listdir(m1)) == ["changed", "directory", "kept"]
        assert sorted(os.listdir(m2)) == ["changed", "deleted", "directory", "kept", "new"]
        assert (m2 / "changed").read_text() == "base"
    whiteout = os.lstat(f"{snapshotter.layers.fs(2)}/deleted")
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert Path(snapshotter.layers.fs(1), "changed").read_text() == "base"


async def test_a_view_is_read_only(snapshotter: Snapshotter, tmp_path: Path) -> None:
    await snapshotter.prepare("a")
    Path(snapshotter.layers.fs(1), "file").write_text("1")
    await snapshotter.commit("base", "a")
    await snapshotter.prepare("b", "base")
    Path(snapshotter.layers.fs(2), "second").write_text("2")
    await snapshotter.commit("top", "b")
    several, two = await snapshotter.view("several", "top"), tmp_path / "several"
    with mounted(several, two) as m:
        assert sorted(os.listdir(m)) == ["file", "second"]
        with pytest.raises(OSError, match="Read-only file system"):
            (m / "new").write_text("")
    single = await snapshotter.view("single", "base")
    with mounted(single, tmp_path / "single") as m:
        assert os.listdir(m) == ["file"]


async def test_rebase_puts_a_layer_onto_another(snapshotter: Snapshotter, tmp_path: Path) -> None:
    await snapshotter.prepare("a")
    Path(snapshotter.layers.fs(1), "lower").write_text("1")
    await snapshotter.commit("base", "a")
    await snapshotter.prepare("b")
    Path(snapshotter.layers.fs(2), "upper").write_text("2")
    await snapshotter.commit("top", "b", parent="base")
    with mounted(await snapshotter.prepare("c", "top"), tmp_path / "m") as m:
        assert sorted(os.listdir(m)) == ["lower", "upper"]


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b", "a b", "ä'\"$;&", "a\\,:b"])
async def test_odd_paths(name: str, tmp_path: Path) -> None:
    """overlayfs's own separators in the root's path; given to mount(2) itself, since mount(8) has separators of its own."""
    async with open_snapshotter(tmp_path / name) as snapshotter:
        await snapshotter.prepare("a")
        Path(snapshotter.layers.fs(1), "file").write_text(name)
        await snapshotter.commit("base", "a")
        spec = await snapshotter.prepare("b", "base")
        (target := tmp_path / "m").mkdir()
        mounting.mount("overlay", str(target), "overlay", 0, ",".join(spec[0].options))
        try:
            assert (target / "file").read_text() == name
            (target / "new").write_text("x")
        finally:
            mounting.unmount(str(target))
        assert Path(snapshotter.layers.fs(2), "new").read_text() == "x"


async def test_configured_options_reach_the_kernel(root: Path, tmp_path: Path) -> None:
    async with open_snapshotter(root, Options(mount_options=("volatile", "index=on"))) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a")
        with mounted(await snapshotter.prepare("b", "base"), tmp_path / "m") as m:
            line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(m) in line)
            assert "volatile" in line
            assert "index=on" in line


def test_128_layers_through_the_tree(daemon: Daemon, tmp_path: Path) -> None:
    """Every layer's file is there, however long the paths of all layers together are: more than a page of options."""
    mnt = daemon.mnt
    for n in range(128):
        parent = mnt / f"committed/l{n - 1}" if n else mnt
        (parent / f"active/w{n}").mkdir()
        (mnt / f"active/w{n}/diff/file{n}").write_text(str(n))
        os.rename(mnt / f"active/w{n}", mnt / f"committed/l{n}")
    (mnt / "committed/l127/active/top").mkdir()
    (mnt / "committed/l127/view/peek").mkdir()
    assert len((mnt / "active/top/mounts.json").read_text()) > 4096
    (target := tmp_path / "m").mkdir()
    for script in ("active/top/mount.sh", "view/peek/mount.sh"):
        subprocess.run(["sh", str(mnt / script), "m"], cwd=tmp_path, check=True)
        try:
            assert {path.name: path.read_text() for path in target.iterdir()} == {f"file{n}": str(n) for n in range(128)}
            if script.startswith("active"):
                (target / "file0").unlink()
                (target / "new").write_text("x")
                assert os.listdir(mnt / "active/top/diff") != []
                with pytest.raises(OSError, match="busy"):
                    os.rename(mnt / "active/top", mnt / "committed/top")
                (target / "file0").write_text("0")
                (target / "new").unlink()
        finally:
            mounting.unmount(str(target))


@pytest.mark.parametrize("inside", ["", "sub", "sub/deep"])
def test_a_bind_of_a_layer_or_of_a_part_of_it_keeps_it_from_being_committed(
    daemon: Daemon, tmp_path: Path, inside: str
) -> None:
    (daemon.mnt / "active/a").mkdir()
    (daemon.mnt / "active/a/diff/sub/deep").mkdir(parents=True)
    (target := tmp_path / "m").mkdir()
    subprocess.run(["mount", "--bind", str(daemon.mnt / "active/a/diff" / inside), str(target)], check=True)
    try:
        with pytest.raises(OSError, match="busy"):
            os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/a")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/a")
    finally:
        mounting.unmount(str(target))
