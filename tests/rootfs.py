"""The merged file systems of a daemon: which are mounted, and what is in them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snapfs.kernel.mounttable import MountPoint, mount_table
from tests.daemon import Daemon
from tests.processes import die_with_parent


def mounts_below(daemon: Daemon) -> list[MountPoint]:
    """What is mounted at ROOT/rootfs/* and below."""
    return [mount for mount in mount_table() if mount.target.startswith(f"{daemon.root}/rootfs/")]


def held(daemon: Daemon) -> list[int]:
    """The ids of the snapshots that are mounted; fails unless mount table, directories and stats.json tell the same."""
    numbers = sorted(int(Path(mount.target).parent.name) for mount in mounts_below(daemon) if mount.target.endswith("/fs"))
    assert sorted(map(int, os.listdir(daemon.root / "rootfs"))) == numbers
    assert stats(daemon)["mounts_held"] == len(numbers)
    return numbers


def stats(daemon: Daemon) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((daemon.mnt / ".snapfs/stats.json").read_text())
    return said


def feature(daemon: Daemon) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((daemon.mnt / ".snapfs/options.json").read_text())["features"]["rootfs"]
    return said


def chain(mnt: Path, *names: str) -> Path:
    """Committed snapshots on one another, each with a file of its own name that holds it and a file "same"."""
    parent = ""
    for name in names:
        above = mnt / "committed" / parent if parent else mnt
        os.mkdir(above / "active" / f"{name}-draft")
        diff = mnt / "active" / f"{name}-draft" / "diff"
        (diff / name).write_text(name)
        (diff / "same").write_text(name)
        os.rename(mnt / "active" / f"{name}-draft", mnt / "committed" / name)
        parent = name
    return mnt / "committed" / parent


def files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@contextmanager
def somebody(directory: Path) -> Iterator[int]:
    """A process called "sleep" whose working directory is ``directory``; its pid."""
    with subprocess.Popen(["sleep", "60"], cwd=directory, preexec_fn=die_with_parent) as process:
        try:
            yield process.pid
        finally:
            process.kill()
