"""The daemon's own files, and the files ``changes`` and ``changes.patch``, through the mounted tree."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.patches import ALONE
from tests.refusals import failing
from tests.tree import committed, shell


def read(mnt: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((mnt / ".snapfs" / name).read_text())
    return found


def test_stats_count_what_was_done(daemon: Daemon, mnt: Path) -> None:
    base = committed(mnt, "base")
    for n in range(3):
        os.mkdir(base / f"active/k{n}")
    os.mkdir(base / "view/peek")
    with failing(errno.EPERM):
        os.mkdir(mnt / "committed/no")
    os.listdir(mnt / "active/k0/rootfs")
    stats = read(mnt, "stats.json")
    assert stats["snapshots"] == {"active": 3, "view": 1, "committed": 1}
    assert stats["ids_handed_out"] == 5
    assert stats["operations"]["mkdir"]["count"] == 6
    assert stats["operations"]["mkdir"]["errors"] == {"EPERM": 1}
    latency = stats["operations"]["mkdir"]["milliseconds"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] < 60_000
    sizes = {int(size): times for size, times in stats["batches"]["by_size"].items()}
    assert stats["batches"]["count"] == sum(sizes.values())
    assert stats["batches"]["operations"] == sum(size * times for size, times in sizes.items()) >= 6
    assert stats["mounts_held"] == 1
    assert stats["trash_waiting"] == 0
    assert read(mnt, "stats.json")["operations"]["lookup"]["count"] > stats["operations"]["lookup"]["count"], "always of now"


def test_cleanup_returns_when_the_files_are_gone(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--async-remove").start()
    for command in ("echo 1 > .snapfs/cleanup", "printf 1 >> .snapfs/cleanup"):
        for n in range(3):
            os.mkdir(daemon.mnt / f"active/k{n}")
            (daemon.mnt / f"active/k{n}/diff/file").write_text("x")
            os.rmdir(daemon.mnt / f"active/k{n}")
        assert len(os.listdir(daemon.root / "snapshots")) == 3
        assert read(daemon.mnt, "stats.json")["trash_waiting"] == 3
        shell(daemon.mnt, command)
        assert os.listdir(daemon.root / "snapshots") == os.listdir(daemon.root / "trash") == []
        assert read(daemon.mnt, "stats.json")["trash_waiting"] == 0
    with failing(errno.EINVAL):
        os.write(os.open(daemon.mnt / ".snapfs/cleanup", os.O_WRONLY), b"2\n")
    assert daemon.error_log()[-1].endswith("EINVAL write .snapfs/cleanup: write 1 to have removed files deleted")
    assert (daemon.mnt / ".snapfs/cleanup").read_text().startswith("Write 1 here")


def test_options_say_how_it_was_started_and_what_it_found(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("-o", "upperdir_label,rootfs_max=7,mount_option=xino=off", "--no-rootfs").start()
    options = read(daemon.mnt, "options.json")
    assert (options["root"], options["mountpoint"], options["pid"]) == (str(daemon.root), str(daemon.mnt), daemon.pid)
    assert options["options"]["upperdir_label"] is True
    assert options["options"]["rootfs_max"] == 7
    assert options["overlay_options"] == ["xino=off", "index=off"]
    assert options["features"]["rootfs"] == {"on": False, "why": "it was started with no_rootfs"}
    assert all(feature["why"] for feature in options["features"].values())
    os.mkdir(daemon.mnt / "active/a")
    assert "rootfs" not in os.listdir(daemon.mnt / "active/a")
    assert daemon.stop() == 0


READERS = ("cat {}", "busybox cat {}", "cp {} ../copy && cat ../copy", "cp -a {} ../copied && cat ../copied")


@pytest.mark.parametrize("files", [3, 60_000])  # the second is more than is kept in memory
def test_changes_are_those_of_now_however_they_are_read(mnt: Path, files: int) -> None:
    base = committed(mnt, "base", content="below")
    os.mkdir(base / "active/web")
    rootfs = mnt / "active/web/rootfs"
    (rootfs / "directory").mkdir()
    script = 'cd "$1"; i=0; while [ $i -lt $2 ]; do : > "a file with a long name $i"; i=$((i+1)); done'
    subprocess.run(["sh", "-c", script, "sh", rootfs / "directory", str(files)], check=True)
    expected = ["A /directory", *sorted(f"A /directory/a file with a long name {n}" for n in range(files)), "D /file"]
    for number, reader in enumerate(READERS):
        (rootfs / "file").unlink(missing_ok=True)
        (rootfs / f"new{number}").write_text("")
        expected = sorted([*expected, f"A /new{number}"], key=lambda line: line[2:])
        assert shell(mnt, reader.format("active/web/changes")).stdout.splitlines() == expected, reader
        assert os.stat(mnt / "active/web/changes").st_size == sum(len(line) + 1 for line in expected)
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert (mnt / "committed/v1/changes").read_text().splitlines() == expected
    assert "changes" not in os.listdir(mnt / "view")


def test_a_directory_that_was_renamed_with_redirects_is_listed_as_it_is(daemon: Daemon, mnt: Path) -> None:
    base = committed(mnt, "base")
    os.mkdir(base / "active/web")
    (mnt / "active/web/diff/moved").mkdir()
    (mnt / "active/web/diff/moved/new").touch()
    os.setxattr(mnt / "active/web/diff/moved", "trusted.overlay.redirect", b"/elsewhere")
    assert (mnt / "active/web/changes").read_text() == "A /moved\nR /moved/\nA /moved/new\n"


def test_changes_as_a_patch(daemon: Daemon, mnt: Path, tmp_path: Path) -> None:
    """git makes of a copy of the parent's files those of the snapshot, active or committed; others' changes to it are seen."""
    base = committed(mnt, "base", content="below\n")
    subprocess.run(["cp", "-a", f"{base}/rootfs/", tmp_path / "copy"], check=True)
    os.mkdir(base / "active/web")
    web = mnt / "active/web"
    assert (web / "changes.patch").read_bytes() == b""
    (web / "rootfs/file").write_bytes(b"above \xff\xc3")
    (web / "rootfs/directory").mkdir()
    (web / "rootfs/directory/file").write_text("")
    for number in range(2000):
        (web / f"rootfs/{number}").write_bytes(b"%d \xe2\x82\xac\n" % number * 100)  # which pieces may cut anywhere
    text = (web / "changes.patch").read_bytes()
    assert os.stat(web / "changes.patch").st_size == len(text) > 1 << 20
    subprocess.run(["git", "apply"], cwd=tmp_path / "copy", input=text, check=True, env=ALONE)
    subprocess.run(["diff", "-r", tmp_path / "copy", f"{web}/rootfs/"], check=True)
    (web / "rootfs/0").unlink()
    os.rename(web, mnt / "committed/v1")
    text = (mnt / "committed/v1/changes.patch").read_bytes()
    assert b"b/0\n" not in text
    assert b"b/1999\n" in text
    assert (mnt / "committed/v1/changes.patch").read_bytes() == text


def test_a_patch_of_what_is_elsewhere_is_refused(daemon: Daemon, mnt: Path) -> None:
    base = committed(mnt, "base")
    os.mkdir(base / "active/web")
    (mnt / "active/web/diff/moved").mkdir()
    os.setxattr(mnt / "active/web/diff/moved", "trusted.overlay.redirect", b"/elsewhere")
    with failing(errno.EPERM):
        (mnt / "active/web/changes.patch").read_text()
    assert '"moved" was renamed in an overlay with redirect_dir=on' in daemon.error_log()[-1]
