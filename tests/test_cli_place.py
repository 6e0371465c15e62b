"""Which tree the command works on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Daemon
from tests.test_cli import run

Make = Callable[..., Daemon]


def test_which_tree(make_daemon: Make, tmp_path: Path) -> None:
    assert run("ls").returncode == 7
    assert "no snapfs tree is mounted" in run("ls").stderr
    one = make_daemon(root=tmp_path / "r 1", mnt=tmp_path / "m 1").start()
    (one.mnt / "active/one").mkdir()
    assert run("ls", "-q").stdout == "one\n"
    two = make_daemon(root=tmp_path / "r2", mnt=tmp_path / "m2").start()
    several = run("ls")
    assert several.returncode == 7
    assert "--at" in several.stderr
    assert str(one.mnt) in several.stderr
    assert run("ls", "-q", cwd=one.mnt / "active").stdout == "one\n"
    assert run("ls", "-q", "--at", str(one.mnt / "active/one")).stdout == "one\n"
    assert run("ls", "-q", SNAPFS=str(two.mnt)).stdout == ""
    nowhere = run("ls", "--at", "/proc")
    assert nowhere.returncode == 7
    assert nowhere.stderr == f"snapfs: --at: no snapfs tree is mounted on /proc: give {one.mnt}, {two.mnt}\n"
    two.stop(signal.SIGKILL)
    gone = run("ls", "--at", str(two.mnt))
    assert gone.returncode == 7
    assert "is gone" in gone.stderr
