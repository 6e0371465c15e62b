"""A directory, and a workspace made of it; what can be seen of a tree; and an apply as a process whose calls are held."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

from snapfs.applying.plan import STAGING
from tests.command import Command, in_process
from tests.syscalls import Channel

Tree = dict[str, tuple[tuple[object, ...], object, str]]


class Workspace:
    """A directory that ``fill`` fills, and the workspace ``w`` on a copy of it."""

    def __init__(self, snapfs: Command, path: Path, fill: Callable[[Path], object]) -> None:
        self.snapfs = snapfs
        self.path = path
        path.mkdir()
        fill(path)
        snapfs("prepare", "b")
        subprocess.run(["cp", "-a", f"{path}/.", f"{snapfs.mnt}/active/b/rootfs/"], check=True)
        snapfs("commit", "--no-sync", "b", "base")
        snapfs("prepare", "w", "--parent", "base", "-l", f"snapfs.source={os.fsencode(path).decode(errors='replace')}")

    @property
    def work(self) -> Path:
        return Path(os.readlink(self.snapfs.mnt / "active/w/rootfs"))

    def apply(self, *arguments: str, status: int = 0) -> str:
        return self.snapfs("apply", *arguments, status=status)


def fill(path: Path) -> None:
    """Some of everything that ``work_on`` changes."""
    (path / "kept").write_text("kept")
    (path / "file").write_text("one")
    (path / "gone").write_text("gone")
    (path / "old/sub").mkdir(parents=True)
    (path / "old/sub/x").write_text("x")
    (path / "becomes").mkdir()
    (path / "becomes/y").write_text("y")
    (path / "private").mkdir(0o755)
    (path / "private/z").write_text("z")
    os.link(path / "kept", path / "kept too")
    os.setxattr(path / "file", "user.a", b"1")


def work_on(work: Path) -> None:
    """Change it."""
    (work / "file").write_text("two")
    (work / "gone").unlink()
    shutil.rmtree(work / "old")
    shutil.rmtree(work / "becomes")
    (work / "becomes").write_text("a file")
    (work / "private").chmod(0o700)
    (work / "private/z").write_text("zz")
    (work / "new/deep").mkdir(parents=True)
    (work / "new/deep/er").write_text("new")
    os.link(work / "new/deep/er", work / "new/too")


def looked(top: Path) -> Tree:
    """All that can be seen of a tree, by path: what belongs to each, what it holds, and the first of its names."""
    found: Tree = {}
    inodes: dict[tuple[int, int], list[str]] = {}
    for directory, names, files in os.walk(os.fsencode(top)):
        for name in [b"", *names, *files]:
            path = os.path.join(directory, name) if name else directory
            if path == os.path.join(os.fsencode(top), STAGING.encode()):
                continue
            status = os.lstat(path)
            at = os.fsdecode(os.path.relpath(path, os.fsencode(top)))
            attributes = {} if stat.S_ISLNK(status.st_mode) else {each: os.getxattr(path, each) for each in os.listxattr(path)}
            own = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, tuple(sorted(attributes.items())))
            held: object = None
            if stat.S_ISREG(status.st_mode):
                held = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                held = os.readlink(path)
            elif not stat.S_ISDIR(status.st_mode):
                held = status.st_rdev
            if not stat.S_ISDIR(status.st_mode):
                inodes.setdefault((status.st_dev, status.st_ino), []).append(at)
            found[at] = own, held, at
    for same in inodes.values():
        for at in same:
            found[at] = (*found[at][:2], min(same))
    return found


def differing(one: Tree, other: Tree) -> dict[str, object]:
    """What differs, by path."""
    return {path: (one.get(path), other.get(path)) for path in {*one, *other} if one.get(path) != other.get(path)}


def expected(before: Tree, wanted: Tree) -> Tree:
    """What an apply makes of ``before``, a copy of the base: a directory gets a time only where something in it changed."""
    others = [path for path in differing(before, wanted) if path != "." and not only_time(path, before, wanted)]
    changed = {os.path.dirname(path) or "." for path in others}
    return {
        path: before[path] if path not in changed and only_time(path, before, wanted) else one for path, one in wanted.items()
    }


def only_time(path: str, before: Tree, wanted: Tree) -> bool:
    """Whether ``path`` is a directory of which nothing but its time differs."""
    if path not in before or path not in wanted:
        return False
    (own, held, _), (own_then, held_then, _) = wanted[path], before[path]
    assert isinstance(own[0], int)
    return stat.S_ISDIR(own[0]) and (own[:3], own[4], held) == (own_then[:3], own_then[4], held_then)


def apply(channel: Channel, mnt: str, watch: bool, *arguments: str) -> None:
    """The command, in this process, as ``in_process`` runs it."""
    if watch:
        channel.watch()
    in_process(channel, "apply", "--at", mnt, *arguments)
