"""The READMEs say what is so: commands, options, sessions, backups, the library's examples; the first is short."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from snapfs.cli import VERBS
from snapfs.cli.serve import _ACCESS, _FLAGS, _NUMBERS
from snapfs.kernel import mounting
from snapfs.offline.checking import check
from tests.command import SNAPFS
from tests.daemon import Daemon
from tests.home import Home
from tests.processes import until
from tests.readme import CLONE, README, READMES, read, recipe


def test_every_option_is_listed() -> None:
    cells = re.findall(r"^\| (`[^|]*) \|", README, re.MULTILINE)
    table = {name for cell in cells for name in re.findall(r"`(\w+)(?:=[A-Z]+)?`", cell)}
    assert {*_FLAGS, *_ACCESS, *_NUMBERS, "mount_option"} <= table


@pytest.mark.parametrize("door", ["import snapfs.blocking", "import trio"])
def test_the_library_example_runs(door: str, tmp_path: Path) -> None:
    (example,) = re.findall(rf"^```python\n({door}\n.*?)^```", read("examples"), re.MULTILINE | re.DOTALL)
    assert "/srv/snapfs" in example
    script = tmp_path / "example.py"
    script.write_text(example.replace("/srv/snapfs", str(tmp_path / "root")))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "['base']"


def test_every_verb_is_told() -> None:
    table = README.split("## The command")[1].split("## Recipes")[0]
    assert all(re.search(rf"[`, ]{verb}[ `]", table) for verb in VERBS)


def test_the_first_steps(daemon: Daemon) -> None:
    steps = README.split("    cd /tmp/snapfs/snap\n")[1].split("\n\n")[0]
    done = subprocess.run(["sh", "-euc", textwrap.dedent(steps)], cwd=daemon.mnt, capture_output=True, text=True, check=True)
    assert done.stdout == "hostname\n"


@pytest.fixture
def does(anybody: Home) -> Callable[..., list[str]]:
    """What the commands of a recipe say."""
    anybody.sh("mkdir bin app project project/src project/docs")
    scripts = {
        "bin/snapfs": f'exec {shlex.join(SNAPFS)} "$@"',
        "app/upgrade.sh": "echo 2 > version; rm old; ln -s version new",
        "project/agent.sh": "echo good > src/code; echo bad > docs/text; pwd > docs/where",
    }
    for name, script in scripts.items():
        (anybody.path / name).write_text(f"#!/bin/sh\n{script}\n")
        (anybody.path / name).chmod(0o755)
    anybody.sh("cd app; echo 1 > version; echo old > old; cd ..; find app | sort > before; echo text > project/docs/text")

    def does(title: str, *exchanged: tuple[str, str]) -> list[str]:
        script = recipe(title)
        for old, new in exchanged:
            assert old in script
            script = script.replace(old, new)
        return anybody.sh(f"PATH={anybody.path}/bin:$PATH\n{script}").splitlines()

    return does


def test_an_upgrade(anybody: Home, does: Callable[[str], list[str]]) -> None:
    said = does("Try an upgrade of a whole directory, and undo it")
    assert {"C /version", "D /old", "A /new"} <= set(said)
    assert anybody.sh("cat app/version; find app | sort | diff - before") == "1\n"
    assert "new" in anybody.sh("ls tree/active/app/rootfs/")


def test_a_review(anybody: Home, does: Callable[[str], list[str]]) -> None:
    said = does("Review what an agent did, and take half of it")
    assert {"+good", "-text", "+bad", f"+{anybody.path}/project"} <= set(said)
    assert anybody.sh("cd project; cat src/code docs/text; ls docs") == "good\ntext\ntext\n"
    assert anybody.sh("ls tree/active") == "w\n"


def test_an_agents_workspace(anybody: Home, does: Callable[..., list[str]]) -> None:
    began = anybody.path / "began"
    anybody.sh("mkfifo began")
    agent = f"sh -c 'echo >{began}; exec sleep 60'"
    said = does("Checkpoint an agent's workspace", ("sleep 60 &", f"{agent} & read began <{began};"))  # whoever types is slower
    assert [line.split()[1] for line in said if line.lstrip()[:1].isdigit()] == ["web@1"]
    assert next(line for line in said if line.endswith("the tests pass")).split()[1] == "web@1"
    assert "web is as web@1" in said
    assert anybody.sh("ls tree/active") == "other\nw\nweb\n"


def free(disk: Path) -> int:
    """How many bytes are free, when all is written."""
    fd = os.open(disk, os.O_RDONLY)
    mounting.sync_file_system(fd)
    os.close(fd)
    found = os.statvfs(disk)
    return found.f_bfree * found.f_bsize


@pytest.mark.mounts
def test_big_files(tmp_path: Path) -> None:
    """What is first written to shares all else with the file that it was."""
    commands = recipe("Write into big files on ext4").replace("100G", "512M")
    for given, here in (
        ("/srv/", f"{tmp_path}/"),
        ("/mnt/snapfs", f"{tmp_path}/mnt"),
        ("snapfs serve", f"{shlex.join(SNAPFS)} serve"),
    ):
        commands = commands.replace(given, here)
    root, mnt = tmp_path / "snapfs", tmp_path / "mnt"
    mnt.mkdir()
    try:
        subprocess.run(["sh", "-euc", commands], check=True)
        (mnt / "active/base").mkdir()
        (mnt / "active/base/rootfs/big").write_bytes(os.urandom(16 << 20))
        (mnt / "active/base").rename(mnt / "committed/base")
        (mnt / "committed/base/active/web").mkdir()
        before = free(root)
        with open(mnt / "active/web/rootfs/big", "r+b") as big:
            big.write(b"S")
        assert before - free(root) < 4 << 20
        assert (mnt / "committed/base/diff/big").stat().st_size == (mnt / "active/web/diff/big").stat().st_size == 16 << 20
    finally:
        subprocess.run(["umount", str(mnt)], check=False)
        until(lambda: subprocess.run(["umount", str(root)], capture_output=True, check=False).returncode == 0)


@pytest.mark.durable
@pytest.mark.parametrize("program", ["cp", "tar", "rsync"])
def test_a_whole_backup(daemon: Daemon, tmp_path: Path, program: str) -> None:
    """The daemon ends a moment after umount: until then file systems are mounted in ROOT, and the records are written."""
    backup = read("examples/backup")
    line = re.findall(r"^    (umount /snap && .*)$", backup, re.MULTILINE)[0]
    if program != "cp":
        options = re.findall(rf"`{program} (-[^`]*)`", backup)[0]
        how = {
            "tar": f'sh -c "mkdir /backup/snapfs && tar {options} -C /srv/snapfs -c . | tar {options} -C /backup/snapfs -x"',
            "rsync": f"rsync {options} /srv/snapfs/ /backup/snapfs",
        }
        line = line.replace("cp -a /srv/snapfs /backup/snapfs", how[program])
    for given, here in (
        ("/snap ", f"{daemon.mnt} "),
        ("/srv/snapfs", str(daemon.root)),
        ("/backup/snapfs", str(tmp_path / "copy")),
    ):
        line = line.replace(given, here)
    for number in range(5):
        (daemon.mnt / f"active/{number}").mkdir()
        (daemon.mnt / f"active/{number}/rootfs/file").write_text("x")
    (daemon.mnt / "active/0/rootfs/big").write_bytes(os.urandom(64 << 20))  # to be flushed at the end
    with open(daemon.mnt / "active/0/rootfs/sparse", "wb") as sparse:
        sparse.truncate(1 << 30)
        sparse.seek(1 << 29)
        sparse.write(b"x")
    (daemon.mnt / "active/0").rename(daemon.mnt / "committed/base")
    subprocess.run(["sh", "-euc", line], check=True)
    assert daemon.ended() == 0
    assert os.listdir(tmp_path / "copy/rootfs") == []
    assert os.listdir(tmp_path / "copy/pool") == []
    assert list(check(str(tmp_path / "copy"))) == []
    (copied,) = (tmp_path / "copy/snapshots").glob("*/fs/sparse")
    assert copied.stat().st_size == 1 << 30
    assert copied.stat().st_blocks * 512 < 1 << 20


def test_a_session(daemon: Daemon, tmp_path: Path) -> None:
    """What each command prints, but for times and process numbers."""
    session = textwrap.dedent(README.split("## A session\n")[1].split("\n\n")[1])
    (tmp_path / "home/site").mkdir(parents=True)
    for name in ("index.html", "style.css"):
        (tmp_path / "home/site" / name).write_text("x")
    commands = [line.removeprefix("$ ") for line in session.splitlines() if line.startswith("$ ")]
    script = "".join(f"printf '%s\\n' {shlex.quote('$ ' + command)}\n{command}\n" for command in commands)
    script, session = (
        re.sub(r"/snap\b", str(daemon.mnt), text.replace("/srv/snapfs", str(daemon.root))) for text in (script, session)
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "HOME": str(tmp_path / "home"), "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    changing = r"\d+ (?=\((bash|mv)\))|[A-Z][a-z]{2} +\d+ \d\d:\d\d"
    assert re.sub(changing, "…", done.stdout).splitlines() == re.sub(changing, "…", session).splitlines()


def test_the_first_is_read_in_five_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(CLONE)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
        there = path.parent / target if target else path
        assert there.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings], heading


def test_each_is_led_to() -> None:
    """From the first one."""
    led_to = {CLONE / target for target in re.findall(r"\]\(([^)#:]+)\)", README)}
    assert {path for path in READMES if path.parent != CLONE} <= led_to


def test_each_test_is_on_the_map() -> None:
    words = set(re.findall(r"\w+", read("tests")))
    assert {path.stem for path in (CLONE / "tests").iterdir() if path.suffix in (".py", ".sh")} - words == {"__init__"}


def test_make_targets_exist() -> None:
    makefile = (CLONE / "Makefile").read_text()
    for path in READMES:
        for target in re.findall(r"(?:^    |`)make (\w+)", path.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
