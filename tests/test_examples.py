"""The examples run as they stand, do what they say, and leave nothing mounted or running."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from snapfs.kernel.mounttable import mount_table
from tests.daemon import Daemon
from tests.processes import die_with_parent

EXAMPLES = Path(__file__).parent.parent / "examples"


class Example:
    """A running example, in a session of its own."""

    def __init__(self, name: str, *arguments: str | Path) -> None:
        interpreter = sys.executable if name.endswith(".py") else "sh"
        self.process = subprocess.Popen(
            [interpreter, str(EXAMPLES / name), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.stdout = self.stderr = ""
        self.watchdog = threading.Timer(30, self.process.kill)
        self.watchdog.start()

    def left(self) -> list[int]:
        """The processes of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, session = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[3])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if session == self.process.pid:
                found.append(pid)
        return found

    def ended(self, stdin: str = "", status: int = 0) -> Example:
        """Wait for its end, which leaves none of its processes behind."""
        try:
            self.stdout, self.stderr = self.process.communicate(stdin, timeout=30)
            assert self.process.returncode == status, self.stdout + self.stderr
            assert "Traceback" not in self.stderr
            assert self.left() == []
        finally:
            self.kill()
        return self

    def follows(self, path: Path) -> None:
        """Wait until it has ``path`` open, at its end."""
        for _ in range(1000):
            for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    position = (fd.parent.parent / "fdinfo" / fd.name).read_text().split()[1]
                    if os.readlink(fd) == str(path) and int(position) == path.stat().st_size:
                        return
            time.sleep(0.01)
        raise AssertionError(f"it does not follow {path}")

    def kill(self) -> None:
        self.watchdog.cancel()
        with self.process:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def mounts() -> Iterator[None]:
    before = [mount.target for mount in mount_table()]
    yield
    assert [mount.target for mount in mount_table()] == before


@pytest.fixture
def tree(mounts: None, module_daemon: Daemon) -> Iterator[Path]:
    """A mounted tree in which an example leaves nothing but committed snapshots."""
    mnt = module_daemon.mnt
    yield mnt
    active = os.listdir(mnt / "active")
    views = os.listdir(mnt / "view")
    for left in [*(mnt / "active").iterdir(), *(mnt / "view").iterdir()]:
        left.rmdir()
    for committed in sorted((mnt / "committed").iterdir(), key=_depth, reverse=True):
        committed.rmdir()
    assert active == []
    assert views == []
    assert [mount.target for mount in mount_table() if mount.target.startswith(f"{module_daemon.root}/")] == []


def _depth(snapshot: Path) -> int:
    return 1 + _depth(snapshot / "parent") if (snapshot / "parent").exists() else 0


@pytest.mark.mounts
def test_tour(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    snapfs = tmp_path / "snapfs"
    snapfs.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snapfs.cli "$@"\n')
    snapfs.chmod(0o755)
    tour = subprocess.run(
        ["sh", str(EXAMPLES / "tour.sh")],
        env={**environment, "SNAPFS_COMMAND": str(snapfs)},
        capture_output=True,
        text=True,
        preexec_fn=die_with_parent,
        timeout=60,
        check=False,
    )
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "should have been refused" not in tour.stderr
    for line in ("version 2", "Device or resource busy", "Directory not empty", "gone"):
        assert line in tour.stdout + tour.stderr
    assert not [mount.target for mount in mount_table() if mount.target.startswith(str(tmp_path))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapfs"], "the tour cleans up after itself"


@pytest.mark.parametrize("name", ["database_fixture.py", "layered_build.sh", "watch_commits.py", "workspace.sh"])
def test_no_tree(name: str, tmp_path: Path) -> None:
    """Where nothing is mounted, one sentence says so."""
    ended = Example(name, tmp_path).ended(status=1)
    assert ended.stderr.count("\n") == 1
    assert f"no snapfs tree is mounted on {tmp_path}; `make run` mounts one" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["database_fixture.py", "layered_build.sh", "workspace.sh"])
def test_no_rootfs(name: str, make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--no-rootfs").start()
    assert "no rootfs" in Example(name, daemon.mnt).ended("echo hello\n", status=1).stderr
    assert os.listdir(daemon.mnt / "by-id") == []


# -- database_fixture.py


def test_database_fixture(tree: Path) -> None:
    first = Example("database_fixture.py", tree).ended()
    assert re.search(r"^Ran 5 tests", first.stdout, re.MULTILINE)
    assert re.search(
        r"^from mkdir to an open copy of [0-9,]{6,} bytes: [0-9.]+ ms \(the median of 5\)$", first.stdout, re.MULTILINE
    )
    assert os.listdir(tree / "committed") == ["shop-1"]
    assert os.listdir(tree / "committed/shop-1/rootfs") == ["shop.db"]
    filled = (tree / "committed/shop-1/info.json").read_text()
    Example("database_fixture.py", tree).ended()
    assert (tree / "committed/shop-1/info.json").read_text() == filled, "the second run found it there"


def test_two_fill_the_database_at_once(tree: Path) -> None:
    both = [Example("database_fixture.py", tree) for _ in range(2)]
    for one in both:
        one.ended()
    assert os.listdir(tree / "committed") == ["shop-1"]


# -- workspace.sh


def test_workspace(tree: Path) -> None:
    ended = Example("workspace.sh", tree).ended()
    assert "/bin/sh': Permission denied" in ended.stderr
    assert "roll back" in ended.stdout
    review = ended.stdout.partition("# For review")[2].partition("# Accepted")[0].splitlines()
    assert [line.strip() for line in review if line.startswith(" ")] == [
        "C /project/answer.sh",
        "C /project/README",
        "A /project/question.sh",
    ]
    (accepted,) = (tree / "committed").glob("*-accepted")
    assert sorted(os.listdir(accepted / "rootfs/project")) == ["README", "answer.sh", "question.sh"]
    assert (accepted / "rootfs/project/answer.sh").read_text() == "echo 6 times 7 is 42\n"
    assert (accepted / "rootfs/bin/sh").is_symlink()
    assert len(os.listdir(tree / "committed")) == 3
    remove = ended.stdout.partition("To remove it:")[2]
    subprocess.run(["sh", "-euc", remove], check=True)
    assert os.listdir(tree / "committed") == []


def test_workspace_that_fails(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops it in the middle makes it clean up."""
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare: Operation not permitted >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ended = Example("workspace.sh", tree).ended(status=1)
    assert "unshare: Operation not permitted" in ended.stderr
    assert os.listdir(tree / "committed") == []


# -- layered_build.sh


STEPS = [
    "mkdir src && echo 'hello from the first step' > src/hello",
    "tr a-z A-Z < src/hello > shouted",
    "cat src/hello shouted > release",
]


def build(tree: Path, steps: list[str], status: int = 0) -> Example:
    return Example("layered_build.sh", tree).ended("\n".join(["# steps", "", *steps]), status)


def verbs(ended: Example) -> list[str]:
    return re.findall(r"^(ran|reused) ", ended.stdout, re.MULTILINE)


def result(ended: Example) -> str:
    (rootfs,) = re.findall(r"^result (.*)$", ended.stdout, re.MULTILINE)
    return (Path(rootfs) / "release").read_text()


def test_layered_build(tree: Path) -> None:
    first = build(tree, STEPS)
    assert verbs(first) == ["ran", "ran", "ran"]
    assert result(first) == "hello from the first step\nHELLO FROM THE FIRST STEP\n"
    assert len(os.listdir(tree / "committed")) == 3
    again = build(tree, STEPS)
    assert verbs(again) == ["reused", "reused", "reused"]
    assert result(again) == result(first)
    third = build(tree, [*STEPS[:2], "cat shouted > release"])
    assert verbs(third) == ["reused", "reused", "ran"]
    assert result(third) == "HELLO FROM THE FIRST STEP\n"
    second = build(tree, [STEPS[0], "rev src/hello > shouted", STEPS[2]])
    assert verbs(second) == ["reused", "ran", "ran"]
    assert result(second) == "hello from the first step\npets tsrif eht morf olleh\n"
    assert verbs(build(tree, STEPS)) == ["reused", "reused", "reused"], "all that was made is still there"
    assert len(os.listdir(tree / "committed")) == 6
    labels = {(snapshot / "labels/step").read_text().strip() for snapshot in (tree / "committed").iterdir()}
    assert labels == {*STEPS, "cat shouted > release", "rev src/hello > shouted"}


def test_layered_build_step_that_fails(tree: Path) -> None:
    failed = build(tree, [STEPS[0], "touch half-done; false; touch more", STEPS[2]], status=1)
    assert verbs(failed) == ["ran"]
    assert "touch half-done" in failed.stderr
    assert len(os.listdir(tree / "committed")) == 1
    assert verbs(build(tree, STEPS)) == ["reused", "ran", "ran"]


def test_two_layered_builds_at_once(tree: Path) -> None:
    """One of them is too late to commit, and goes on with what the other made."""
    steps = ["echo hello > hello; sleep 0.3", "cat hello hello > release"]
    both = [Example("layered_build.sh", tree) for _ in range(2)]
    for one in both:
        assert one.process.stdin is not None
        one.process.stdin.write("\n".join(steps))
        one.process.stdin.flush()
    assert [result(one.ended()) for one in both] == ["hello\nhello\n"] * 2
    assert len(os.listdir(tree / "committed")) == 2


# -- watch_commits.py


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_watch_commits(tree: Path, how: signal.Signals) -> None:
    early = f"early-{how.name}"
    (tree / "active" / early).mkdir()
    (tree / "active" / early).rename(tree / "committed/early-layer")
    watcher = Example("watch_commits.py", tree, "--all")
    try:
        assert watcher.process.stdout is not None
        while not (line := watcher.process.stdout.readline()).startswith(
            f"{early} was committed as early-layer (on nothing), "
        ):
            assert line
        before = cpu_seconds(watcher.process.pid)
        time.sleep(0.3)
        assert cpu_seconds(watcher.process.pid) - before < 0.1, "it sleeps"
        (tree / "committed/early-layer/active/k%2F1").mkdir()
        (tree / "active/k%2F1/rootfs/file").write_text("x" * 100_000)
        (tree / "active/k%2F1/labels/team").write_text("blue")
        (tree / "active/k%2F1").rename(tree / "committed/n%2F1")
        size = json.loads((tree / "committed/n%2F1/usage.json").read_text())["size"]
        assert watcher.process.stdout.readline() == f"k/1 was committed as n/1 (on early-layer), {size} bytes\n"
        watcher.process.send_signal(how)
        watcher.ended()
        assert watcher.stdout + watcher.stderr == ""
    finally:
        watcher.kill()


def test_watch_commits_only_new(tree: Path) -> None:
    (tree / "active/old").mkdir()
    (tree / "active/old").rename(tree / "committed/old")
    watcher = Example("watch_commits.py", tree)
    try:
        watcher.follows(tree / ".snapfs/events")
        (tree / "active/new").mkdir()
        (tree / "active/new").rename(tree / "committed/new")
        assert watcher.process.stdout is not None
        assert watcher.process.stdout.readline().startswith("new was committed as new (on nothing), ")
        watcher.process.terminate()
        watcher.ended()
    finally:
        watcher.kill()


def test_watch_commits_until_the_daemon_ends(daemon: Daemon) -> None:
    watcher = Example("watch_commits.py", daemon.mnt)
    try:
        watcher.follows(daemon.mnt / ".snapfs/events")
        assert daemon.stop() == 0
        assert watcher.ended(status=1).stderr == f"the daemon of {daemon.mnt} has ended\n"
    finally:
        watcher.kill()


def test_watch_commits_reads_in_pieces(tmp_path: Path) -> None:
    """Lines that come in pieces, and a stump before the notice of what was missed."""
    spec = importlib.util.spec_from_file_location("watch_commits", EXAMPLES / "watch_commits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.mkfifo(tmp_path / "events")
    wanted = [{"operation": "commit", "name": "é"}, {"missed": 12}, {"operation": "commit", "name": "b"}]
    whole = "\n".join(json.dumps(event, ensure_ascii=False) for event in wanted)
    text = whole.replace('{"missed"', '{"operation": "com\n{"missed"').encode() + b"\n"

    def write() -> None:
        with (tmp_path / "events").open("wb", buffering=0) as fifo:
            for byte in range(len(text)):
                fifo.write(text[byte : byte + 1])

    writer = threading.Thread(target=write)
    writer.start()
    events = module.follow(tmp_path / "events", old=True)
    try:
        assert list(islice(events, 3)) == wanted
    finally:
        writer.join()
        events.close()
