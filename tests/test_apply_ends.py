"""snapfs apply cut off: by kills, failing disks, somebody else who changes things meanwhile, and another apply."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.applying.plan import STAGING
from tests import applying
from tests.applying import Tree, Workspace, differing, expected, fill, looked, work_on
from tests.command import Command
from tests.daemon import Daemon
from tests.syscalls import EVERY, KILL, Call, Process, Server, running

pytestmark = pytest.mark.mounts


class Applies:
    """Applies of the workspace ``home``, whose calls are held."""

    def __init__(self, home: Workspace, server: Server, before: Path) -> None:
        self.home = home
        self.server = server
        self.said: object = ""
        """What the last one has said on standard error."""
        self._before = before
        subprocess.run(["cp", "-a", home.path, before], check=True)
        self.base = looked(home.path)
        self.wanted = expected(self.base, looked(home.work))

    def restore(self) -> None:
        """Have the directory and the tree as they were."""
        options = ("-aHX", "--delete", "--modify-window=-1")  # to the nanosecond
        subprocess.run(["rsync", *options, f"{self._before}/", f"{self.home.path}/"], check=True)
        for name in os.listdir(self.home.snapfs.mnt / "committed"):
            if "undo" in name:
                os.rmdir(self.home.snapfs.mnt / "committed" / name)

    def run(self, *arguments: str, decide: Callable[[Call], int | None] | None = None) -> int | None:
        """Apply, whose calls are decided by ``decide``; the exit status, None where it was killed."""
        with self.server.started(applying.apply, str(self.home.snapfs.mnt), decide is not None, *arguments) as process:
            assert process.hold(decide or (lambda call: None))
            assert process.errors() == []
            status, self.said = next((message[1:] for message in process.said if message[0] == "ended"), (None, ""))
        assert status is None or isinstance(status, int)
        return status

    def killed(self, *arguments: str, nth: int) -> bool:
        """Apply, and kill that before call ``nth``; whether it has come to that."""
        return self.run(*arguments, decide=lambda call: KILL if call.nth == nth else None) is None

    def end(self, base: Tree | None = None) -> bool:
        """Have the next apply end what is left, and look whether all is there, or nothing (``base``); whether all."""
        assert self.run("w", "--", "kept") == 0, self.said
        assert STAGING not in os.listdir(self.home.path)
        now = looked(self.home.path)
        is_done = not (set(differing(now, self.wanted)) - {"."})
        lost = differing(now, self.wanted if is_done else base or self.base)
        assert set(lost) <= {"."}, lost  # of which a kill in the end may leave the time
        assert self.kept() == (["w-undo-1"] if is_done else [])
        return is_done

    def kept(self) -> list[str]:
        """All undo snapshots there are, in whatever state."""
        kinds = ("active", "committed")
        return [name for kind in kinds for name in os.listdir(self.home.snapfs.mnt / kind) if "undo" in name]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(["tests.applying", "snapfs.cli.apply"]) as server:
        yield server


@pytest.fixture
def applies(module_daemon: Daemon, server: Server, tmp_path: Path) -> Iterator[Applies]:
    """On a directory and a tree in memory, where nothing waits for a disk."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True)
    command = Command(module_daemon.mnt)
    try:
        home = Workspace(command, tmp_path / "home", fill)
        work_on(home.work)
        yield Applies(home, server, tmp_path / "before")
        command("rm", "-rf", "--", *command.names())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_killed_before_each_call(applies: Applies) -> None:
    nth, done = 1, list[bool]()
    while applies.killed("w", nth=nth):
        done.append(applies.end())
        if done[-1] and len(done) % 5 == 0:
            assert applies.run("--undo") == 0
            assert set(differing(looked(applies.home.path), applies.base)) <= {"."}
        applies.restore()
        nth += EVERY
    assert not differing(looked(applies.home.path), applies.wanted)
    assert sorted(done) == done, "from one call on it is finished, and not before"
    assert nth > 50
    assert {*done} == {True, False}


def steps(call: Call) -> bool:
    """Whether it is a step of an apply, or a look whether the file system can do those."""
    return call.name == "renameat2"


def after_steps(count: int) -> Callable[[Call], int | None]:
    """Kill it before the next step after so many."""
    seen = 0

    def decide(call: Call) -> int | None:
        nonlocal seen
        seen += steps(call)
        return KILL if seen == count + 2 else None

    return decide


def test_the_end_of_a_killed_one_is_killed(applies: Applies) -> None:
    nth, is_killed = 1, True
    while is_killed:
        assert applies.run("w", decide=after_steps(3)) is None
        is_killed = applies.killed("w", "--", "kept", nth=nth)
        assert applies.end()
        applies.restore()
        nth += EVERY
    assert nth > 20


def test_taking_back_is_killed(applies: Applies) -> None:
    """Something that was still to be replaced has changed after the kill."""
    nth, is_killed = 1, True
    while is_killed:
        assert applies.run("w", decide=after_steps(3)) is None
        (applies.home.path / "private/z").write_text("changed")
        changed = {**applies.base, "private/z": looked(applies.home.path)["private/z"]}
        is_killed = applies.killed("w", "--", "kept", nth=nth)
        assert not applies.end(changed)
        applies.restore()
        nth += EVERY
    assert nth > 15


def test_ended_by_a_signal(applies: Applies) -> None:
    """As after Ctrl-C: all is as it was before, or as it is to be, and nothing is left."""
    nth, left = 1, 0
    while True:
        with applies.server.started(applying.apply, str(applies.home.snapfs.mnt), True, "w") as process:

            def decide(call: Call, nth: int = nth, process: Process = process) -> None:
                if call.nth == nth:
                    process.signal(signal.SIGTERM)

            assert process.hold(decide)
            assert process.errors() == []
            if any(message[0] == "ended" for message in process.said):
                break
        left += STAGING in os.listdir(applies.home.path)
        assert applies.end() in (True, False)
        applies.restore()
        nth += 1 if EVERY == 1 else 1 + nth // 4
    assert nth > 20
    assert left <= nth // 10, "a call may be between two steps of tidying up"


def test_each_call_fails(applies: Applies) -> None:
    """The disk is full, or broken, in the middle."""
    nth, failed = 1 - EVERY, True
    while failed:
        nth, failed = nth + EVERY, False

        def decide(call: Call) -> int | None:
            nonlocal failed
            failed |= call.nth == nth  # noqa: B023
            number = errno.ENOSPC if nth // EVERY % 2 else errno.EIO  # noqa: B023
            return number if call.nth == nth else None  # noqa: B023

        status = applies.run("w", decide=decide)
        is_done = applies.end()
        assert is_done or status != 0, nth
        applies.restore()
    assert nth > 50


def test_somebody_changes_what_is_replaced(applies: Applies) -> None:
    """Between the last look at a path and its step."""
    changes = ["becomes/new one", "file", "gone", "new", "old/sub/x", "private/z"]
    for nth, path in enumerate(changes):
        seen = 0

        def decide(call: Call) -> None:
            nonlocal seen
            if steps(call):
                seen += 1
                if seen == nth + 2:  # noqa: B023
                    (applies.home.path / path).write_text("mine")  # noqa: B023

        assert applies.run("w", decide=decide) == 5, path
        now = looked(applies.home.path)
        assert (applies.home.path / path).read_text() == "mine"
        assert set(differing(now, applies.base)) <= {path, os.path.dirname(path) or "."}, path
        assert STAGING not in os.listdir(applies.home.path)
        assert applies.kept() == []
        applies.restore()


def test_two_at_once(applies: Applies) -> None:
    """The second is refused, wherever the first is."""
    statuses = []

    def decide(call: Call) -> None:
        if call.nth % 40 == 1:
            statuses.append(applies.run("w"))

    assert applies.run("w", decide=decide) == 0
    assert statuses == [1] * len(statuses)
    assert len(statuses) > 2
    assert not differing(looked(applies.home.path), applies.wanted)


def test_a_directory_becomes_a_link_meanwhile(applies: Applies) -> None:
    """Somebody who owns parts of the directory leads root elsewhere: nothing outside is touched, at whichever call."""
    outside = applies.home.path.parent / "outside"
    outside.mkdir()
    for name in ("z", "f"):
        (outside / name).write_text("not yours")
    before = looked(outside)
    private, aside = applies.home.path / "private", applies.home.path / "aside"
    nth, swapped = 0, True
    while swapped:
        nth, swapped = nth + max(EVERY, 3), False

        def decide(call: Call) -> None:
            nonlocal swapped
            if call.nth == nth:  # noqa: B023
                private.rename(aside)
                private.symlink_to(outside)
                swapped = True

        status = applies.run("w", decide=decide)
        assert not differing(looked(outside), before)
        assert status in (0, 5, 1)
        if swapped:
            assert private.is_symlink()
            private.unlink()
            aside.rename(private)
        assert applies.run("w", "--", "kept") == 0
        assert (private / "z").read_text() in ("z", "zz")
        kept = [Path(os.readlink(applies.home.snapfs.mnt / "committed" / name / "rootfs")) for name in applies.kept()]
        assert (private / "z").read_text() == "z" or (kept[0] / "before/private/z").read_text() == "z"
        applies.restore()
    assert nth > 50


def test_what_somebody_changes_after_a_kill_is_not_lost(applies: Applies) -> None:
    """It was put in place, and changed; then something else can't be put in place, and all is to be taken back."""
    assert applies.run("w", decide=after_steps(4)) is None
    done = [path for path in ("becomes", "file", "gone", "new") if path in differing(looked(applies.home.path), applies.base)]
    assert "file" in done
    (applies.home.path / "file").write_text("mine")
    (applies.home.path / "private/z").write_text("mine, too")
    assert applies.run("w", "--", "kept") == 0
    now = looked(applies.home.path)
    assert set(differing(now, applies.base)) <= {"file", "private/z", "."}
    assert (applies.home.path / "file").read_text() == "mine"
    assert applies.kept() == ["w-undo-1"], "where the first one is"
    assert (applies.home.snapfs.mnt / "committed/w-undo-1/rootfs/before/file").read_text() == "one"


def test_a_journal_that_is_damaged(applies: Applies) -> None:
    assert applies.run("w", decide=after_steps(2)) is None
    with (applies.home.path / STAGING / "journal").open("a") as file:
        file.write("garbage\n")
    before = looked(applies.home.path)
    assert applies.run("w") == 1
    assert looked(applies.home.path) == before
