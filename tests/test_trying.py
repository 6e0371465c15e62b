"""``snapfs run --from``: a workspace for one command, which is kept, discarded or applied; ``--confine``.

Each test is done by an ordinary user, and by root.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from tests.command import SNAPFS, OnATerminal
from tests.home import Home
from tests.processes import die_with_parent, until

pytestmark = pytest.mark.mounts

CHANGE = "echo new > new; rm file; echo said; exit 3"


def active(home: Home) -> list[str]:
    return sorted(home.sh("ls tree/active").split())


def test_it_is_kept_where_nobody_can_be_asked(anybody: Home) -> None:
    said = anybody.snapfs("run", "--from", "b", "--", "sh", "-c", CHANGE, status=3)
    assert said.splitlines()[:3] == ["said", "D /file", "A /new"]
    assert said.splitlines()[3].startswith('snapfs: kept as "b-run-1": snapfs diff b-run-1, ')
    assert active(anybody) == ["b-run-1", "w"]
    assert anybody.snapfs("run", "b-run-1", "cat", "new") == "new\n"
    anybody.snapfs("run", "--from", "b", "--keep", "true")
    assert active(anybody) == ["b-run-1", "b-run-2", "w"], "an unchanged one, too, where that was said"
    anybody.snapfs("rm", "b-run-1", "b-run-2")


def test_it_is_discarded(anybody: Home) -> None:
    said = anybody.snapfs("run", "--from", "b", "--discard", "sh", "-c", CHANGE, status=3)
    assert said.splitlines() == ["said", "D /file", "A /new"]
    said = anybody.snapfs("run", "--from", "b", "--discard", "sh", "-c", "sleep 1000 > /dev/null 2>&1 & echo x > x")
    assert said == "A /x\n", "what it left running is ended"
    assert anybody.snapfs("run", "--from", "b", "cat", "file") == "base\nsnapfs: nothing changed\n"
    assert active(anybody) == ["w"]


def test_what_cannot_be_run_leaves_nothing(anybody: Home) -> None:
    assert "cannot run nope: No such file" in anybody.snapfs("run", "--from", "b", "nope", status=127)
    assert "cannot put a workspace over" in anybody.snapfs("run", "--from", "b", "--over", "/nowhere", "true", status=1)
    assert active(anybody) == ["w"]


REFUSED = {
    "--from b --keep --discard true": (2, "--keep and --discard can't go together"),
    "--keep w true": (2, "--keep goes with --from"),
    "--from w true": (2, '"w" is active, and --from wants what stays as it is: snapfs run w …,'),
    "--from none true": (3, 'snapshot "none" does not exist'),
    "--from b --apply true": (1, '"b" has no label snapfs.source'),
    "--from b": (2, "CMD… is missing"),
    "--net w true": (2, "--net goes with --confine"),
}


def test_refused(anybody: Home) -> None:
    for arguments, (status, words) in REFUSED.items():
        assert words in anybody.snapfs("run", *arguments.split(), status=status)
    said = anybody.does("env", "PATH=/nowhere", *SNAPFS, "run", "--from", "b", "--confine", "true", status=1)
    assert said == "snapfs: --confine takes bubblewrap, which is not installed: apt-get install bubblewrap\n"
    assert active(anybody) == ["w"]


@pytest.mark.parametrize("answer", ["d\n", "what?\nkee\n", "\x04"])
def test_it_is_asked_at_a_terminal(anybody: Home, answer: str) -> None:
    shown = OnATerminal("run", "--from", "b", "sh", "-c", CHANGE, by=anybody.words(*SNAPFS))
    os.write(shown.master, answer.encode())
    said = shown.said()
    assert "D /file\r\nA /new\r\n" in said
    assert "keep or discard? " in said
    assert shown.process.returncode == 3
    assert active(anybody) == (["w"] if answer == "d\n" else ["b-run-1", "w"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command(anybody: Home, number: signal.Signals) -> None:
    script = f"trap 'echo caught > caught; exit 4' {number.name[3:]}; echo up; while :; do sleep 0.01; done"
    command = anybody.words(*SNAPFS, "run", "--from", "b", "--discard", "sh", "-c", script)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=anybody.path, preexec_fn=die_with_parent
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert (said, process.returncode) == ("A /caught\n", 4)
    assert active(anybody) == ["w"]


@pytest.mark.parametrize("way", ["--discard", "--keep"])
def test_ended_while_it_tells_what_changed(anybody: Home, way: str) -> None:
    """What is to be discarded is, and what is not is known to be kept; of many changes a pipe takes the first alone."""
    script = "seq -f %0200g 500 | xargs touch"
    with subprocess.Popen(
        anybody.words(*SNAPFS, "run", "--from", "b", way, "sh", "-c", script),
        stderr=subprocess.PIPE,
        text=True,
        cwd=anybody.path,
        preexec_fn=die_with_parent,
    ) as process:
        until(lambda: Path(f"/proc/{process.pid}/syscall").read_text().split()[:2] == ["1", "0x2"])
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert ('kept as "b-run-1"' in said) == (way == "--keep")
    assert active(anybody) == [*["b-run-1"] * (way == "--keep"), "w"]


def test_confined(anybody: Home) -> None:
    """What is said of --confine, and no more."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as outside:
        os.chown(outside, anybody.uid if anybody.who else 0, -1)
        anybody.sh(f"echo secret > {outside}/secret")
        probes = {
            "echo x > file && cat file": "x",
            f"cat {outside}/secret": "secret",
            f"echo x > {outside}/secret || echo kept": "kept",
            "ls -A /run | wc -l": "0",
            "ls -A /tmp | grep -v ^tmp || :": "",  # where the workspace is, here
            "echo x > /tmp/x && cat /tmp/x": "x",
            "test -w /proc/sys/kernel/core_pattern || echo kept": "kept",  # root needs no privilege for that
            r"cat /proc/[0-9]*/comm | grep -vx 'bwrap\|sh\|cat\|grep' || :": "",
            "grep -o '[a-z0-9]*:' /proc/net/dev": "lo:",
            "grep CapEff /proc/self/status": "CapEff:\t0000000000000000",
        }
        for probe, answer in probes.items():
            said = anybody.inside("w", f"({probe}) 2> /dev/null", "--confine")
            told, _, rest = said.partition("\n")
            assert rest.rstrip("\n") == answer, probe
        assert re.fullmatch(
            "snapfs: sh may write (.*)/rootfs/[0-9]+/fs, which is the workspace, and a /tmp and a /run of its own; it has no "
            "network, and may read what you may read",
            told,
        )
        assert anybody.sh("cat tree/active/w/rootfs/file") == "x\n"
        assert "it has the network" in anybody.inside("w", "true", "--confine", "--net")


def test_confined_over_a_directory(anybody: Home) -> None:
    project = anybody.path / "project"
    anybody.sh("mkdir project")
    said = anybody.inside("w", "pwd; cat file; echo y > file", "--confine", "--over", project)
    assert said.splitlines()[1:] == [str(project), "base"]
    assert os.listdir(project) == []
    assert anybody.sh("cat tree/active/w/rootfs/file") == "y\n"


@pytest.fixture
def outside(anybody: Home) -> Iterator[Path]:
    """A directory of theirs, which a confined program sees, with a file."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        (Path(directory) / "kept").write_text("kept\n")
        for path in (directory, f"{directory}/kept"):
            os.chown(path, anybody.uid if anybody.who else 0, -1)
        yield Path(directory)


@pytest.mark.parametrize("where", ["", "snapfs run w -- "])
def test_confined_with_descriptors_of_what_is_elsewhere(anybody: Home, outside: Path, where: str) -> None:
    """By a directory that is open a file in it can be reached, and a file that was opened for reading opened for writing."""
    snapfs = " ".join(map(str, SNAPFS))
    begin = where.replace("snapfs", snapfs) + f"{snapfs} run --confine w sh -c"
    (outside / "kept").write_text("kept\nas it is\n")
    writes = f"echo x > {outside}/kept; echo x > /proc/self/fd/7/kept; echo x > /proc/self/fd/7/new"
    said = anybody.sh(f"exec 7< {outside}; (read a; {begin} '{writes}; cat; echo x >> /proc/self/fd/0' || :) < {outside}/kept")
    assert "\nas it is\n" in said, "it goes on where it was"
    assert said.count("Read-only file system") == 2
    assert (outside / "kept").read_text() == "kept\nas it is\n"
    assert os.listdir(outside) == ["kept"]


def test_confined_beside_what_is_mounted_later(anybody: Home, outside: Path) -> None:
    """Where mounts are shared, as systemd makes them, others get what is mounted: it could be written."""
    mounting.mount("none", str(outside), "tmpfs", 0, "size=1m,mode=777")
    try:
        mounting.mount("", str(outside), "", 1 << 20)  # MS_SHARED
        (outside / "later").mkdir()
        script = f"echo up; read go; ls -d {outside}/later; echo x > {outside}/later/file"
        with subprocess.Popen(
            anybody.words(*SNAPFS, "run", "--confine", "w", "sh", "-c", script),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=anybody.path,
            preexec_fn=die_with_parent,
        ) as process:
            assert process.stdout is not None
            assert any(line == "up\n" for line in process.stdout)
            mounting.mount("none", str(outside / "later"), "tmpfs", 0, "size=1m,mode=777")
            said, _ = process.communicate("go\n", timeout=60)
        assert "Read-only file system" in said
        assert os.listdir(outside / "later") == []
    finally:
        mounting.unmount(str(outside), mounting.MNT_DETACH)


# -- of a directory


@pytest.fixture
def project(anybody: Home) -> Path:
    """A directory of theirs."""
    anybody.sh("mkdir -p project/sub; cd project; echo base > file; echo old > sub/old; chmod 640 file; ln -s file link")
    return anybody.path / "project"


def test_a_directory_is_applied(anybody: Home, project: Path) -> None:
    script = "pwd; cat file; echo new > new; rm sub/old; echo changed > file"
    said = anybody.snapfs("run", "--from", "project", "--apply", "sh", "-ec", script)
    assert said.splitlines()[:2] == [str(project), "base"]
    assert sorted(said.splitlines()[2:5]) == ["A /new", "C /file", "D /sub/old"]
    assert anybody.sh("cd project; cat new file; ls sub; stat -c %a file") == "new\nchanged\n640\n"
    assert active(anybody) == ["w"]
    anybody.snapfs("apply", "--undo")
    assert anybody.sh("cd project; cat file sub/old; ls") == "base\nold\nfile\nlink\nsub\n"


def test_a_directory_stays_as_it_is(anybody: Home, project: Path) -> None:
    anybody.snapfs("run", "--from", project, "--discard", "--", "rm", "-r", "file", "sub")
    assert anybody.sh("ls project tree/active; ls tree/committed") == "project:\nfile\nlink\nsub\n\ntree/active:\nw\nb\n"
    assert "cannot run nope" in anybody.snapfs("run", "--from", project, "nope", status=127)
    anybody.snapfs("prepare", "project")
    assert "first; the directory is ./project\n" in anybody.snapfs("run", "--from", "project", "true", status=2)
    assert anybody.snapfs("run", "--from", "./project", "cat", "file") == "base\nsnapfs: nothing changed\n"
    anybody.snapfs("rm", "project")
    assert anybody.sh("ls tree/active; ls tree/committed") == "w\nb\n"
    anybody.snapfs("run", "--from", project, "--confine", "sh", "-c", "pwd > here; rm file")
    assert anybody.snapfs("run", "project-run-1", "cat", "here") == f"{project}\n"


def test_a_directory_whose_path_no_key_can_be(anybody: Home) -> None:
    """Too long, too deep, not UTF-8."""
    for name in (b"d" * 240, b"/".join([b"long" * 20] * 4), b"bad\xff"):
        path = anybody.path / os.fsdecode(name)
        anybody.does("mkdir", "-p", path)
        anybody.snapfs("run", "--from", path, "--apply", "touch", "new")
        assert os.listdir(path) == ["new"]
    anybody.snapfs("adopt", "--over", path, "key")
    assert '"key" stays' in anybody.snapfs("release", path)
    assert "nothing to release" in anybody.snapfs("release", path, status=3)
    assert active(anybody) == ["key", "w"]


def test_what_conflicts_is_kept(anybody: Home, project: Path) -> None:
    script = "echo mine > file; echo up; read answer"
    with subprocess.Popen(
        anybody.words(*SNAPFS, "run", "--from", project, "--apply", "sh", "-c", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=anybody.path,
        preexec_fn=die_with_parent,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        anybody.sh("echo theirs > project/file")
        _, said = process.communicate("\n", timeout=60)
    assert process.returncode == 8
    assert said.endswith(": snapfs diff project-run-1, snapfs apply project-run-1, snapfs rm -r project-run-1@0\n")
    assert anybody.sh("cat project/file") == "theirs\n"
    anybody.snapfs("apply", "--force", "project-run-1")
    assert anybody.sh("cat project/file") == "mine\n"
    anybody.snapfs("rm", "-r", "project-run-1@0")
    assert anybody.sh("ls tree/active; ls -d tree/committed/project*") == "w\ntree/committed/project-run-1-undo-1\n"


def test_what_was_adopted_is_applied_from_its_base(anybody: Home, project: Path) -> None:
    """Also where checkpoints are gone."""
    anybody.snapfs("adopt", project)
    for serial in range(2):
        anybody.inside("project", f"echo {serial} > file; echo {serial} > new{serial}")
        anybody.snapfs("checkpoint", "project")
    anybody.snapfs("prune", "--keep-last", "1")
    assert "project@1" not in anybody.sh("ls tree/committed")
    said = anybody.snapfs("apply", "project")
    assert {"A /new0", "A /new1", "C /file"} <= set(said.splitlines())
    assert anybody.sh("cat project/file project/new1; ls project/sub") == "1\n1\nold\n"
