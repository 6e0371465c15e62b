"""A mounted tree, as any program makes, sees and removes what is in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

KINDS = ("active", "view", "committed")


def remove_all(mnt: Path) -> None:
    """Remove all snapshots, children first, and the names that they have."""
    for name in os.listdir(mnt / "images"):
        os.unlink(mnt / "images" / name)
    parents = {path.parent.name: os.readlink(path).rpartition("/")[2] for path in mnt.glob("by-id/*/parent")}
    depth = {link: 0 for link in os.listdir(mnt / "by-id")}
    names = {os.readlink(mnt / "by-id" / link).rpartition("/")[2]: link for link in depth}
    for link in depth:  # whatever the ids are: a snapshot may be put onto a later one
        above: str | None = link
        while above in parents:
            depth[link] += 1
            above = names.get(parents[above])
    for link in sorted(depth, key=lambda link: (depth[link], int(link)), reverse=True):
        os.rmdir(os.path.realpath(mnt / "by-id" / link))
    assert [os.listdir(mnt / kind) for kind in KINDS] == [[], [], []]


def listing(mnt: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of the snapshots: of each path the stat fields, where it leads or what it holds.

    Not of what changes by being looked at: ``rootfs`` is mounted, ``changes``, ``changes.patch``, ``layer.tar`` and
    ``checkpoint`` are found out.
    """
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(mnt):
        if directory == str(mnt):
            directories.remove(".snapfs")
        for name in {*directories, *files} - {"rootfs", "changes", "changes.patch", "layer.tar", "checkpoint"}:
            path = f"{directory}/{name}"
            seen = os.lstat(path)
            if stat.S_ISLNK(seen.st_mode):
                holds = os.readlink(path)
            elif stat.S_ISREG(seen.st_mode):
                holds = Path(path).read_text()
            else:
                holds = ""
            fields = (seen.st_ino, seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_size, seen.st_blocks, seen.st_mtime_ns)
            found[os.path.relpath(path, mnt)] = (*fields, holds)
    return found


def info(snapshot: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((snapshot / "info.json").read_text())
    return found


def usage(snapshot: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((snapshot / "usage.json").read_text())
    return found


def nanoseconds(rfc3339: str) -> int:
    seconds, fraction = rfc3339.removesuffix("Z").split(".")
    return int(datetime.fromisoformat(seconds + "+00:00").timestamp()) * 10**9 + int(fraction)


def committed(mnt: Path, name: str, parent: str = "", content: str = "") -> Path:
    """Make the committed snapshot ``name``."""
    above = mnt / "committed" / parent if parent else mnt
    os.mkdir(above / "active" / f"{name}-draft")
    if content:
        (mnt / "active" / f"{name}-draft" / "diff" / "file").write_text(content)
    os.rename(mnt / "active" / f"{name}-draft", mnt / "committed" / name)
    return mnt / "committed" / name


def made(mnt: Path, kind: str, name: str) -> Path:
    """Make a snapshot of this kind without a parent."""
    if kind == "committed":
        return committed(mnt, name)
    os.mkdir(mnt / kind / name)
    return mnt / kind / name


def shell(mnt: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], cwd=mnt, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def mounted(snapshot: Path, target: Path) -> Iterator[Path]:
    """What mounts.json says, mounted on ``target``."""
    target.mkdir(exist_ok=True)
    (spec,) = json.loads((snapshot / "mounts.json").read_text())
    options = ["-t", spec["type"]] if spec["type"] != "bind" else []
    subprocess.run(["mount", *options, "-o", ",".join(spec["options"]), spec["source"], str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


REMOVERS = ["rm -r {}", "rm -rf {}", "busybox rm -r {}", "find {} -depth -delete"]
