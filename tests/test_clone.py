"""A clone in which ``make run`` serves: what works in the clone does not get into what is mounted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.kernel.mounttable import mount_table
from tests.processes import die_with_parent

HOME = Path(__file__).parent.parent


def test_each_package_is_listed() -> None:
    listed = tomllib.loads((HOME / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [path.parent.relative_to(HOME) for path in HOME.glob("snapfs/**/__init__.py")]
    assert sorted(listed) == sorted(".".join(directory.parts) for directory in there)


def end_with_parent() -> None:
    die_with_parent(signal.SIGTERM)  # which make passes on


class Served:
    """``make run`` in a clone: its process, and where it serves."""

    def __init__(self, clone: Path, demo: Path) -> None:
        self.clone, self.demo, self.tree = clone, demo, demo / "snap"
        words = ["make", "-o", ".venv/ready", "run", f"DEMO={demo}"]  # what it takes is installed
        self.process = subprocess.Popen(
            words, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=end_with_parent
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        while line := self.process.stdout.readline():
            self.said.append(line)
            if line.startswith("snapfs: serving "):
                return
        raise AssertionError(self.said)

    def requests(self) -> dict[str, int]:
        """How many requests there were, of those that a crawl makes."""
        found = json.loads((self.tree / ".snapfs/stats.json").read_text())["operations"]
        return {name: each["count"] for name, each in found.items() if name in ("opendir", "readdir", "readlink")}

    def end(self) -> None:
        assert self.process.stdout is not None
        with self.process:
            self.process.send_signal(signal.SIGTERM)
            self.said += self.process.stdout.readlines()  # until the daemon, too, has ended
        assert below(self.demo) == []


def below(directory: Path) -> list[str]:
    return [mount.target for mount in mount_table() if mount.target.startswith(f"{directory}/")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A clone that serves three stacked snapshots and an active one, with their file systems mounted."""
    clone = tmp_path_factory.mktemp("here") / "clone"
    ignored = [line.strip("/") for line in (HOME / ".gitignore").read_text().splitlines()]
    shutil.copytree(HOME, clone, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    (clone / ".venv").symlink_to(HOME / ".venv")
    subprocess.run(["git", "init", "-q", "."], cwd=clone, check=True)
    demo = tmp_path_factory.mktemp("demo")
    served = Served(clone, demo)
    try:
        parent = served.tree
        for name in ("one", "two", "three"):
            (parent / "active/b").mkdir()
            (served.tree / f"active/b/rootfs/{name}").write_text(name)
            (served.tree / "active/b").rename(parent / f"committed/{name}")
            parent = served.tree / f"committed/{name}"
        (parent / "active/web").mkdir()
        assert sorted(os.listdir(served.tree / "active/web/rootfs")) == ["one", "three", "two"]
        yield served
    finally:
        served.end()


@pytest.mark.mounts
@pytest.mark.parametrize(
    "words",
    [
        ("git", "status", "--porcelain", "--ignored"),
        ("git", "clean", "-ndx"),
        ("grep", "-rs", "import trio", "."),
        (".venv/bin/ruff", "check", "--no-cache", "--exit-zero"),
        (".venv/bin/python", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"),
        (".venv/bin/python", "-m", "mypy", "--cache-dir=/dev/null", "-m", "snapfs.names"),
        (".venv/bin/pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "wheel", "."),
    ],
    ids=lambda words: " ".join(words[:5]),
)
def test_what_works_in_the_clone_asks_the_tree_nothing(served: Served, words: tuple[str, ...]) -> None:
    assert below(served.clone) == []
    before = served.requests()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=served.clone, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert served.requests() == before


@pytest.mark.mounts
def test_make_run_says_where_it_serves(served: Served) -> None:
    assert f"The tree will be at {served.tree} until you press Ctrl-C here. In another shell:\n" in served.said
    assert served.said[-1] == f"snapfs: serving {served.demo}/root on {served.tree}\n"
    assert served.demo.stat().st_mode & 0o777 == 0o700


@pytest.mark.mounts
@pytest.mark.parametrize("whose", ["somebody else's", "a link"])
def test_make_run_serves_in_nobody_elses_directory(served: Served, whose: str, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    os.chown(tmp_path / "demo", 65534, 65534)
    if whose == "a link":
        (tmp_path / "mine").mkdir()
        (tmp_path / "demo").rmdir()
        (tmp_path / "demo").symlink_to("mine")
    words = ["make", "-s", "-o", ".venv/ready", "run", f"DEMO={tmp_path}/demo"]
    done = subprocess.run(words, cwd=served.clone, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == f"{tmp_path}/demo is somebody else's; name another: make run DEMO=/tmp/mine\n"
