"""The plugin for pytest, by running pytest on the example, and on tests that go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snapfs.kernel.mounttable import mount_table

EXAMPLE = Path(__file__).parent.parent / "examples/pytest"


def run(directory: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """pytest on ``directory``, which leaves nothing mounted, and nothing in its temporary directory."""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(directory),
        "-c",
        os.devnull,
        str(directory),
    ]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert not [mount.target for mount in mount_table() if str(tmp_path) in mount.target]
    assert [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("snapfs-testing")] == []
    return done


def test_the_example(tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_what_goes_wrong_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text('pytest_plugins = "snapfs.testing"\n')
    (tests / "test_it.py").write_text(
        "import pytest\n"
        "held = []\n"
        "def fill(directory):\n    (directory / 'file').write_text('x')\n"
        "def broken(directory):\n    raise RuntimeError('no data')\n"
        "def test_holds(snapshot_of, fresh_copy):\n    held.append(open(fresh_copy(snapshot_of(fill)) / 'file'))\n"
        "def test_after(snapshot_of, fresh_copy):\n    assert (fresh_copy(snapshot_of(fill)) / 'file').read_text() == 'x'\n"
        "def test_broken(snapshot_of):\n    snapshot_of(broken)\n"
    )
    done = run(tests, tmp_path)
    assert done.returncode == 1
    assert "2 passed" in done.stdout
    assert "is in use by process" in done.stdout
    assert "RuntimeError: no data" in done.stdout


def test_a_directory(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    (tests / "data/sub").mkdir(parents=True)
    (tests / "data/sub/file").write_text("hello")
    (tests / "data/link").symlink_to("sub/file")
    (tests / "conftest.py").write_text('pytest_plugins = "snapfs.testing"\n')
    (tests / "test_it.py").write_text(
        "from pathlib import Path\n"
        "DATA = Path(__file__).parent / 'data'\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        "    assert snapshot_of(DATA) == snapshot_of(str(DATA))\n"
        "    copy = fresh_copy(snapshot_of(DATA))\n"
        "    assert (copy / 'link').read_text() == 'hello'\n"
        "    (copy / 'sub/file').write_text('changed')\n"
        "    assert (DATA / 'sub/file').read_text() == 'hello'\n"
    )
    done = run(tests, tmp_path)
    assert done.returncode == 0, done.stdout
