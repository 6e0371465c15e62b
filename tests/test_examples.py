"""The examples run as they stand, do what they say, and leave nothing mounted or running."""

from __future__ import annotations

import base64
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
from tests.processes import die_with_parent, worked

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
    assert "    | rm: can't remove '/bin/sh': Permission denied\n" in ended.stdout
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


HELPER = r"""
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>
static void forge(const char *path, const char *space) {
    const char *marks[][2] = {{"opaque", "y"}, {"redirect", "/etc"}, {"whiteout", "y"}, {"metacopy", ""}, {"origin", "x"}};
    for (int i = 0; i < 5; i++) {
        char name[99];
        snprintf(name, sizeof name, "%s.overlay.%s", space, marks[i][0]);
        if (!setxattr(path, name, marks[i][1], marks[i][1][0] ? 1 + 3 * (i == 1) : 0, 0)) printf("forged %s %s\n", path, name);
    }
}
int main(void) {
    const char *places[] = {".", "hidden", "hidden/file", "README.d"};
    for (int i = 0; i < 4; i++) forge(places[i], "user"), forge(places[i], "trusted");
    char name[101];
    memset(name, 'n', 100), name[100] = 0;
    for (int i = 0; i < 60; i++)
        if (mkdir(name, 0755) || chdir(name)) return 1;
    return mkdir("bottom", 0700);
}
"""  # it comes with the script, for busybox sets no attributes

HOSTILE = r"""
busybox base64 -d > helper <<'BINARY'
@HELPER@
BINARY
busybox chmod 755 helper
busybox touch -r answer.sh when
echo 'echo 6 times 7 is 43' > answer.sh
busybox touch -r when answer.sh
rm README /bin/cat when
mkdir() { busybox mkdir "$@"; }
mkdir hidden README.d never locked
echo x > hidden/file
echo x > locked/file
busybox chmod 0 locked/file locked
busybox rmdir never
busybox ln answer.sh hard
busybox ln -s /etc/shadow out
busybox ln -s ../../../../../../../../etc up
busybox mknod question.sh c 0 0
busybox mkfifo pipe pipe2
echo x > pipe &
busybox cat pipe2 &
echo x > "$(printf 'new\nline')"
echo x > "$(printf 'D -> x\n    D README')"
echo x > "$(printf '\033[2J\033[8m')"
echo x > "$(printf 'harmless\342\200\256hs.exe')"
echo x > "$(printf '\377\\n')"
printf '\033[2J\033[8m# For review, all that changed:\n# Accepted.\n'
./helper
"""


@pytest.mark.mounts
def test_workspace_review_of_a_hostile_script(tree: Path, tmp_path: Path) -> None:
    """Whatever the script does to hide, to forge or to confuse: the review has each of its changes, and nothing else."""
    command = ["cc", "-static", "-Os", "-s", "-x", "c", "-", "-o", str(tmp_path / "helper")]
    subprocess.run(command, input=HELPER, text=True, check=True)
    encoded = base64.encodebytes((tmp_path / "helper").read_bytes()).decode()
    (tmp_path / "script").write_text(HOSTILE.replace("@HELPER@\n", encoded))
    ended = Example("workspace.sh", tree, tmp_path / "script").ended()
    assert ended.stdout.count("    | forged ") == 4 * 5, "it could set all that a user can"
    assert "trusted" not in ended.stdout
    assert "    | rm: can't remove '/bin/cat': Permission denied" in ended.stdout
    assert "    | ^[[2J^[[8m# For review, all that changed:\n" in ended.stdout
    assert all(line.isprintable() for line in ended.stdout.splitlines())
    review = re.split("^# ", ended.stdout, flags=re.MULTILINE)[-2]
    _, _, layer = review.rpartition(":\n")
    names = ["C ", "D README", "A README.d", "C answer.sh", "A hard", "A helper", "A hidden", "A hidden/file", "A locked"]
    names += ["A locked/file", "A out", "A pipe", "A pipe2", "A up", "A D -> x\\n    D README", "A new\\nline"]
    names += ["A \\0033[2J\\0033[8m", "A harmless\\0342\\0200\\0256hs.exe", "A \\0377\\\\n"]
    long = "n" * 100
    names += [f"A {'/'.join([long] * level)}" for level in range(1, 61)] + [f"A {f'{long}/' * 60}bottom"]  # beyond PATH_MAX
    expected = {f"{name[:2]}/project/{name[2:]}".removesuffix("/") for name in names}
    lines = layer.rstrip("\n").split("\n")
    assert all(line.startswith("    ") for line in lines)
    assert {line[4:] for line in lines} == expected
    assert len(lines) == len(expected)
    subprocess.run(["sh", "-euc", ended.stdout.partition("To remove it:")[2]], check=True)


@pytest.mark.mounts
def test_workspace_ends_a_script_that_does_not(tree: Path, tmp_path: Path) -> None:
    """Its time is over at some point, whichever signals it ignores and whatever it has started."""
    hasty = tmp_path / "workspace.sh"
    hasty.write_text((EXAMPLES / "workspace.sh").read_text().replace(" 60 ", " 8 "))
    (tmp_path / "script").write_text("trap '' HUP INT TERM\nsleep 1000 &\necho begun\nwhile :; do sleep 1000; done\n")
    ended = Example(str(hasty), tree, tmp_path / "script").ended()
    assert "    | begun\n" in ended.stdout
    subprocess.run(["sh", "-euc", ended.stdout.partition("To remove it:")[2]], check=True)


def test_workspace_that_fails(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops it in the middle makes it clean up."""
    (tmp_path / "unshare").write_text("#!/bin/sh\necho unshare: Operation not permitted >&2; exit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ended = Example("workspace.sh", tree).ended(status=1)
    assert "    | unshare: Operation not permitted\n" in ended.stdout
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
        before = worked(watcher.process.pid)
        time.sleep(0.3)
        assert worked(watcher.process.pid) - before < 0.1, "it sleeps"
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
        (tree / "active/%1B[2J%0Aforged").mkdir()
        (tree / "active/%1B[2J%0Aforged").rename(tree / "committed/%1B[2J%0Aforged")
        assert watcher.process.stdout.readline().startswith(r"\u001b[2J\u000aforged was committed as \u001b[2J\u000aforged (on")
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


@pytest.mark.parametrize("unit", sorted(EXAMPLES.rglob("*.service")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_snapfs_goes_where_a_users_link_could_lead(unit: Path) -> None:
    """mkdir and umount, run by root, follow links: a unit has them in /run alone, which is root's."""
    commands = re.findall(r"^Exec(?:StartPre|StartPost|Stop|StopPost|Reload)=(.*)$", unit.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        program, *words = command.lstrip("-").split()
        assert os.path.basename(program) in ("mkdir", "umount"), command
        places = [word for word in words if not word.startswith("-") and word != "755"]
        assert places, command
        assert all(re.fullmatch(r"/run/snapfs(-%i|/tree)?", place) for place in places), command


@pytest.mark.parametrize(
    ("path", "is_ours"),
    [
        ("/opt/snapfs/bin/snapfs", True),  # the README's
        ("/home/ann/src/snapfs/.venv/bin/snapfs", True),  # make run's
        ("/home/ann/.local/share/pipx/venvs/snapfs/bin/snapfs", True),
        ("/home/ann/.local/pipx/venvs/snapfs/bin/snapfs", True),  # Debian 12's pipx
        ("/home/ann/.local/share/uv/tools/snapfs/bin/snapfs", True),
        ("/opt/snapfs/bin/python3", False),
        ("/tmp/snapfs", False),
    ],
)
def test_the_profile_for_apparmor_is_of_the_files_that_are_installed(path: str, is_ours: bool) -> None:
    """Not of links to them, which the kernel has followed by the time that it looks for a profile."""
    text = (EXAMPLES / "apparmor/snapfs").read_text()
    found = re.findall(r"^profile snapfs (\S+)", text, re.MULTILINE)
    for variable in re.findall(r"^(@\{\w+\}) =", text, re.MULTILINE):
        values = " ".join(re.findall(rf"^{re.escape(variable)} \+?= (.*)$", text, re.MULTILINE)).split()
        found = [one.replace(variable, value) for one in found for value in values]
    glob = {"**": ".*", "*": "[^/]*", "{": "(?:", "}": ")", ",": "|"}
    patterns = [re.sub(r"\*\*|[*{},.]", lambda match: glob.get(match[0], r"\."), one) for one in found]
    assert any(re.fullmatch(pattern, path) for pattern in patterns) is is_ours, patterns


def test_a_message_is_no_option_of_the_window(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GTK takes --gtk-module=FILE from the arguments and runs what is in it; whoever keeps a state writes its message."""
    os.mkdir(tree / "active/web")
    for text, message in (("one", "--gtk-module=/evil.so"), ("two", "-x")):
        (tree / "active/web/rootfs/file").write_text(text)
        (tree / "active/web/checkpoint").write_text(message)
    (tree / "active/web/rootfs/file").write_text("now")
    zenity = tmp_path / "bin/zenity"
    zenity.parent.mkdir()
    script = f"""#!/bin/sh
printf '%s\\n' "$@" >> {tmp_path}/words
test "$1" != --list || cat > {tmp_path}/cells
"""
    zenity.write_text(script)
    zenity.chmod(0o755)
    monkeypatch.setenv("PATH", f"{zenity.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SNAPFS", str(tree))
    subprocess.run([EXAMPLES / "desktop/earlier-versions", tree / "active/web/rootfs/file"], check=True, timeout=60)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[0] == "--list"
    assert not {"--gtk-module=/evil.so", "-x"}.intersection(words)
    cells = (tmp_path / "cells").read_text().splitlines()
    assert [cells[4 * nth + 3] for nth in range(len(cells) // 4)] == ["-x", "--gtk-module=/evil.so"]
    os.rmdir(tree / "active/web")
