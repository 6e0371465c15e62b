"""The plugin for pytest, by running pytest on the example, and on tests that go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin import run

pytestmark = pytest.mark.mounts

EXAMPLE = Path(__file__).parent.parent / "examples/pytest"


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


def test_the_working_directory_has_no_modules_for_the_daemon(tmp_path: Path) -> None:
    """It may be anybody's: pytest itself takes none from there."""
    (tests := tmp_path / "tests").mkdir()
    (tests / "conftest.py").write_text('pytest_plugins = "snapfs.testing"\n')
    (tests / "test_it.py").write_text("def test_it(snapfs_tree):\n    assert (snapfs_tree / 'README').exists()\n")
    (hostile := tmp_path / "hostile").mkdir()
    (hostile / "trio.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tests)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "1 passed" in done.stdout, done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "test",
    [
        "def test_it(snapshot_of, fresh_copy):\n    copy = fresh_copy(snapshot_of(fill))\n    wait(copy)\n",
        "def test_it(snapshot_of, fresh_copy):\n    file = open(fresh_copy(snapshot_of(fill)) / 'file')\n    wait()\n",
        "def test_it(snapshot_of):\n    snapshot_of(wait)\n",
        "def hold(directory):\n    file = open(directory / 'file', 'w')\n    wait()\n"
        "def test_it(snapshot_of):\n    snapshot_of(hold)\ndef test_next():\n    pass\n",
        "@pytest.fixture\ndef after(fresh_copy, snapshot_of):\n    yield fresh_copy(snapshot_of(fill))\n    wait()\n"
        "def test_it(after):\n    pass\n",
    ],
    ids=["in a test", "in a test with a file open", "in a base", "in a base with a file open", "in a fixture's end"],
)
def test_ctrl_c_ends_it_in_order(test: str, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text('pytest_plugins = "snapfs.testing"\n')
    (tests / "test_it.py").write_text(
        "import pathlib, pytest, time\n"
        "def fill(directory):\n    (directory / 'file').write_text('x')\n"
        f"def wait(directory=None):\n    pathlib.Path({str(tmp_path / 'here')!r}).touch()\n    time.sleep(60)\n" + test
    )
    done = run(tests, tmp_path, interrupted_at=tmp_path / "here")
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in done.stdout
    assert "Traceback" not in done.stdout
    assert "not connected" not in done.stdout
    assert len(done.stdout.splitlines()) < 15, done.stdout


def test_ctrl_c_while_the_daemon_starts(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    here = tmp_path / "here"
    (tests / "conftest.py").write_text('pytest_plugins = "snapfs.testing"\n')
    (tests / "slow").write_text(f'#!/bin/sh\ntouch "{here}"\nexec sleep 60\n')
    (tests / "slow").chmod(0o755)
    (tests / "test_it.py").write_text(
        f"import sys\nsys.executable = {str(tests / 'slow')!r}\ndef test_it(snapfs_tree):\n    pass\n"
    )
    done = run(tests, tmp_path, interrupted_at=here)
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert len(done.stdout.splitlines()) < 15, done.stdout
