"""The states of a workspace: kept, restored and copied, beside what else keeps the state of a project of many files."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.files import make_files
from tests.bench.place import Place, run, settle, timed
from tests.bench.rows import Row, at_most, in_turns
from tests.disk import make_file_system
from tests.mounts import loop_mounted

PAUSE = 0.03  # seconds after a write: whoever has just followed the link rootfs has some 20 ms to get there

NOTE = f"{PAUSE * 1000:.0f} ms after one file was written; not pinned"


def states(place: Place) -> Iterator[Row]:
    """A workspace on a project, and the same project elsewhere; many layers made one."""
    yield from _layers(place)
    files = place.size(20_000, 500)
    with ExitStack() as stack:
        for sync, bound in (("none", at_most(3, absolute=True)), ("full", None)):
            mnt = stack.enter_context(place.snapfs("-o", f"sync={sync}")).mnt
            workspace = _workspace(mnt, files)
            for what, act in _acts(place, workspace).items():
                row = Row(f"{what} by a write, sync={sync}", "", "ms", bound, f"{files:,} files below; {NOTE}; in one process")
                for number in range(place.rounds):
                    _touch(workspace / "rootfs", number)
                    row.ours.append(timed(act) * 1e3)
                yield row
        ours = {what: _after_a_write(workspace / "rootfs", act) for what, act in _acts(place, workspace, shell=True).items()}
        for kind, make in (("btrfs", _on_btrfs), ("xfs", _on_xfs), ("git", _by_git)):
            directory = stack.enter_context(place.directory(kind))
            for what, against, act, project in make(stack, place, directory, files):
                row = Row(f"{what}, sync=full", against, "ms", None, f"{files:,} files; {NOTE}; each a process or a few")
                yield in_turns(place.rounds, row, ours[what], _after_a_write(project, act))


def _layers(place: Place) -> Iterator[Row]:
    """Many layers made one, beside copies of the same files; and what a checkpoint on many costs."""
    files, depth = place.size(20_000, 400), 20
    with ExitStack() as stack:
        mnt = stack.enter_context(place.snapfs("-o", "squash_depth=0")).mnt
        elsewhere = stack.enter_context(place.directory("copies"))
        top = _stacked(mnt, "s", depth, files // depth)
        plain = elsewhere / "plain"
        run("cp", "-a", f"{top / 'rootfs'}/.", plain)
        settle(top)
        made = _timed(lambda: run("sh", "-c", f"echo {place.name('flat')} > {top}/squash"))
        what = f"a squash of {depth} layers with {files:,} files together, by a write, sync=full"
        for against, source, words in (
            ("cp -al of the same files, in one directory", plain, ("cp", "-al")),
            ("cp -a of its rootfs", f"{top / 'rootfs'}/.", ("cp", "-a")),
        ):
            row = Row(what, against, "ms", None, "each a process; the copies are not flushed")
            yield in_turns(place.rounds, row, made, partial(_copied_to, place, elsewhere, *words, source))
        for key, below in (("few", 10), ("many", 120)):
            _stacked(mnt, key, below, 1)
            os.mkdir(mnt / f"committed/{key}{below}/active/{key}")
        sides = [partial(_kept, place, mnt, key, f"{key}{below}") for key, below in (("many", 120), ("few", 10))]
        row = Row(
            "a checkpoint on 120 layers", "one on 10", "ms", at_most(2), "by a write; rolled back to that depth after each"
        )
        yield in_turns(place.rounds, row, *sides)


def _stacked(mnt: Path, name: str, depth: int, files: int) -> Path:
    """Committed snapshots on one another, NAME1 to NAME<depth>, with so many files each: the last."""
    above = mnt
    for number in range(1, depth + 1):
        key = f"{name}{number}"
        os.mkdir(above / "active" / key)
        directory = Path(os.readlink(mnt / "active" / key / "diff"), key)
        directory.mkdir()
        make_files(directory, files, 1000)
        os.rename(mnt / "active" / key, mnt / "committed" / key)
        above = mnt / "committed" / key
    return above


def _copied_to(place: Place, directory: Path, *words: str | Path) -> float:
    return timed(lambda: run(*words, directory / place.name("copy"))) * 1e3


def _timed(act: Callable[[], object]) -> Callable[[], float]:
    return lambda: timed(act) * 1e3


def _kept(place: Place, mnt: Path, key: str, below: str) -> float:
    _touch(mnt / "active" / key / "rootfs", 1)
    took = timed(lambda: (mnt / "active" / key / "checkpoint").write_text("a message\n")) * 1e3
    (mnt / "active" / key / "rollback").write_text("0\n")
    return took


def _workspace(mnt: Path, files: int) -> Path:
    os.mkdir(mnt / "active/base")
    make_files(Path(os.readlink(mnt / "active/base/diff")), files, 1000)
    os.rename(mnt / "active/base", mnt / "committed/base")
    os.mkdir(mnt / "committed/base/active/web")
    settle(mnt / "committed/base")
    return mnt / "active/web"


def _touch(directory: Path, number: int) -> None:
    (directory / "changed").write_text(f"{number}\n")
    time.sleep(PAUSE)


def _after_a_write(directory: Path, act: Callable[[], object]) -> Callable[[], float]:
    """Milliseconds that ``act`` takes, each time after a write in ``directory``."""
    count = 0

    def side() -> float:
        nonlocal count
        count += 1
        _touch(directory, count)
        return timed(act) * 1e3

    return side


def _acts(place: Place, workspace: Path, *, shell: bool = False) -> dict[str, Callable[[], object]]:
    def write(file: str, text: Callable[[], str]) -> Callable[[], object]:
        if shell:
            return lambda: run("sh", "-c", f'echo "{text()}" > {workspace}/{file}')
        return lambda: (workspace / file).write_text(f"{text()}\n")

    return {
        "a checkpoint": write("checkpoint", lambda: "a message"),
        "a rollback": write("rollback", lambda: ""),
        "a fork": write("fork", lambda: place.name("fork")),
    }


Opponent = tuple[str, str, Callable[[], object], Path]


def _on_btrfs(stack: ExitStack, place: Place, directory: Path, files: int) -> Iterator[Opponent]:
    project = _disk(stack, "btrfs", directory) / "project"
    run("btrfs", "subvolume", "create", project)
    return _copied(place, "btrfs subvolume snapshot", project, files, "btrfs", "subvolume", "snapshot")


def _on_xfs(stack: ExitStack, place: Place, directory: Path, files: int) -> Iterator[Opponent]:
    project = _disk(stack, "xfs", directory) / "project"
    project.mkdir()
    return _copied(place, "cp -a --reflink on xfs", project, files, "cp", "-a", "--reflink=always")


def _disk(stack: ExitStack, kind: str, directory: Path) -> Path:
    image = directory / "image"
    make_file_system(kind, image, 2 << 30)
    return stack.enter_context(loop_mounted(image, directory / "mounted"))


def _copied(place: Place, against: str, project: Path, files: int, *copy: str) -> Iterator[Opponent]:
    make_files(project, files, 1000)
    settle(project)
    for what in ("a checkpoint", "a fork"):
        yield what, f"{against} (on a loop device)", lambda: run(*copy, project, project.parent / place.name("copy")), project


def _by_git(stack: ExitStack, place: Place, directory: Path, files: int) -> Iterator[Opponent]:
    if shutil.which("git") is None:
        return
    project = directory / "project"
    project.mkdir()
    make_files(project, files, 1000)
    git = ("git", "-C", project, "-c", "user.name=x", "-c", "user.email=x@x", "-c", "maintenance.auto=false", "-c", "gc.auto=0")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        run(*git, *words)
    settle(project)

    def stash() -> None:
        run(*git, "stash", "push", "-qu")
        run(*git, "stash", "apply", "-q")

    def worktree() -> None:
        run(*git, "worktree", "add", "-q", "--detach", directory / place.name("worktree"))

    yield "a checkpoint", "git stash push -u and apply", stash, project
    yield "a rollback", "git stash push -u", lambda: run(*git, "stash", "push", "-qu"), project
    yield "a fork", "git worktree add", worktree, project
