"""The README says what is so: its commands, options, errors and library example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from snapfs.cli import VERBS
from snapfs.cli.serve import _ACCESS, _FLAGS, _NUMBERS
from snapfs.offline.checking import check
from tests.daemon import Daemon
from tests.readme import README, recipe


def test_every_option_is_listed() -> None:
    table = set(re.findall(r"^\| `(\w+)(?:=[A-Z]+)?` \|", README, re.MULTILINE))
    assert {*_FLAGS, *_ACCESS, *_NUMBERS, "mount_option"} <= table


def test_the_library_example_runs(tmp_path: Path) -> None:
    example = README.split("```python\n")[1].split("```")[0]
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


def test_a_workspace(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "snapfs").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snapfs.cli "$@"\n')
    (tmp_path / "snapfs").chmod(0o755)
    environment = {**os.environ, "SNAPFS": str(daemon.mnt), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(title: str) -> list[str]:
        words = ["sh", "-euc", recipe(title)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    assert run("Try an upgrade, and undo it")[-1] == "1"
    said = run("Checkpoint an agent's workspace")
    assert [line.split()[1] for line in said[2:4]] == ["web@1", "web@2"]
    assert said[3].endswith("the tests pass")
    assert said[4] == "kept as web@3"
    assert (daemon.mnt / "active/other/rootfs/version").read_text() == "1\n"


@pytest.mark.parametrize("program", ["cp", "tar", "rsync"])
def test_a_whole_backup(daemon: Daemon, tmp_path: Path, program: str) -> None:
    """The daemon ends a moment after umount: until then file systems are mounted in ROOT, and the records are written."""
    line = re.findall(r"^    (umount /snap && .*)$", README, re.MULTILINE)[0]
    if program != "cp":
        options = re.findall(rf"`{program} (-[^`]*)`", README.split("Instead of `cp -a`")[1])[0]
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


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
