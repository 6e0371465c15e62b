"""The same without pytest: ``snapfs.testing.copies`` in unittest and in scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import snapfs.testing
from snapfs.scan.copying import clone
from snapfs.testing import copying
from snapfs.testing.place import Place, new_name
from tests.plugin import NOBODY, Runner
from tests.processes import until

pytestmark = pytest.mark.mounts

SCRIPT = """
import os, sys
import snapfs.testing

def fill(directory):
    with open(os.environ["MADE"], "a") as made:
        made.write("made ")
    (directory / "file").write_text("x")

HOW = dict(eval(os.environ["OPTIONS"]))
"""


@pytest.fixture(params=[0, NOBODY], ids=["root", "user"])
def runner(request: pytest.FixtureRequest, open_path: Path) -> Runner:
    return Runner(open_path, uid=request.param)


def started(runner: Runner, script: str, *words: str, options: str = "{}") -> subprocess.Popen[str]:
    (runner.tests / "script.py").write_text(SCRIPT + script)
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": str(runner.temporary),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MADE": str(runner.temporary / "made"),
        "OPTIONS": options,
    }
    return subprocess.Popen(
        runner.command(sys.executable, *words, str(runner.tests / "script.py")),
        env=environment,
        cwd=runner.temporary,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ran(runner: Runner, script: str, *words: str, options: str = "{}", status: int = 0) -> str:
    with started(runner, script, *words, options=options) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    runner.nothing_is_left()
    return said


OPTIONS = ["{}", "{'how': 'copy'}"]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_needs_no_other_package(options: str, runner: Runner) -> None:
    """Some of what the daemon takes needs a compiler to install: ``pip install --no-deps snapfs`` needs nothing."""
    script = (
        "with snapfs.testing.copies(fill, **HOW) as copy:\n    print((copy / 'file').read_text())\n"
        "for name in ('msgspec', 'lmdb', 'trio', 'pyfuse3'):\n"
        "    try:\n        __import__(name)\n    except ModuleNotFoundError:\n        print('no', name)\n"
    )
    assert ran(runner, script, "-S", options=options) == "x\nno msgspec\nno lmdb\nno trio\nno pyfuse3\n"


def test_two_workers_may_try_reflinks_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one directory of their run."""
    found: list[bool] = []

    def while_another_tries(source: int, target: int) -> bool:
        monkeypatch.undo()
        found.append(copying.can_clone(str(tmp_path)))
        return clone(source, target)

    monkeypatch.setattr("snapfs.testing.copying.clone", while_another_tries)
    assert [copying.can_clone(str(tmp_path))] == found
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_taken_for_a_dead_run_s_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may remove it before it is locked, at each step."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for step in ("chmod", "lstat", "open"):
        act, left = getattr(os, step), [1]

        def removed_before(path: str, *more: int, act: Any = act, left: list[int] = left) -> Any:
            if str(path).startswith(f"{tmp_path}/snapfs-testing-") and left:
                left.pop()
                os.rmdir(path)
            return act(path, *more)

        with monkeypatch.context() as patched:
            patched.setattr(os, step, removed_before)
            made = Place(new_name(), shared=False)
        assert os.path.isdir(made.bases)
        made.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", OPTIONS)
def test_a_script(options: str, runner: Runner) -> None:
    said = ran(
        runner,
        "made = snapfs.testing.copies(fill, **HOW)\n"
        "with made as copy:\n"
        "    (copy / 'file').write_text('changed')\n"
        "    (copy / 'new').touch()\n"
        "    print(made.changes())\n"
        "    made.reset()\n"
        "    print(sorted(os.listdir(copy)), (copy / 'file').read_text(), made.changes())\n"
        "assert not copy.exists()\n"
        "with snapfs.testing.copies(fill, **HOW) as one, snapfs.testing.copies(fill, **HOW) as two:\n"
        "    (one / 'file').unlink()\n"
        "    print((two / 'file').read_text())\n"
        "with snapfs.testing.copies(os.path.dirname(__file__), **HOW) as copy:\n"
        "    print(os.listdir(copy))\n"
        "print('pytest' in sys.modules, 'trio' in sys.modules)\n",
        options=options,
    )
    assert said.splitlines() == ["['C /file', 'A /new']", "['file'] x []", "x", "['script.py']", "False False"]
    assert (runner.temporary / "made").read_text() == "made "


UNITTEST = """
import unittest

class TestShop(unittest.TestCase):
    def setUp(self):
        self.copy = self.enterContext(snapfs.testing.copies(fill, **HOW))

    def test_one(self):
        (self.copy / "file").unlink()

    def test_two(self):
        self.assertEqual((self.copy / "file").read_text(), "x")

    def test_three(self):
        self.held = open(self.copy / "file")
        self.fail("on purpose")

class TestWide(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.made = snapfs.testing.copies(fill, **HOW)
        cls.copy = cls.enterClassContext(cls.made)

    def setUp(self):
        self.made.reset()

    def test_one(self):
        (self.copy / "file").unlink()

    test_two = test_one

unittest.main()
"""


@pytest.mark.parametrize("options", OPTIONS)
def test_unittest(options: str, runner: Runner) -> None:
    said = ran(runner, UNITTEST, "-W", "ignore", options=options, status=1)
    assert "Ran 5 tests" in said
    assert "on purpose" in said
    assert (runner.temporary / "made").read_text() == "made "


@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_in_use(options: str, runner: Runner) -> None:
    """It is told at the end, unless there is another reason for that."""
    said = ran(
        runner,
        "try:\n    with snapfs.testing.copies(fill, **HOW) as copy:\n        held = open(copy / 'file')\n"
        "except OSError as error:\n    print(error.errno, error)\n"
        "with snapfs.testing.copies(fill, **HOW) as copy:\n    held = open(copy / 'file')\n    1 / 0\n",
        options=options,
        status=1,
    )
    assert said.startswith("16 [Errno 16] the copy ")
    assert "is in use by process" in said
    assert "ZeroDivisionError" in said


def test_what_it_is_asked_and_can_not_do() -> None:
    with pytest.raises(ValueError, match="how='overlays': it is one of auto, overlay, reflink, copy"):
        snapfs.testing.copies("/", how="overlays")  # type: ignore[arg-type]
    made = snapfs.testing.copies("/")
    for act in (made.reset, made.changes):
        with pytest.raises(RuntimeError, match="there is no copy: use it in the block of its with statement"):
            act()


def test_with_a_cache(runner: Runner) -> None:
    for _ in range(2):
        ran(
            runner,
            "with snapfs.testing.copies(fill, **HOW) as copy:\n    pass\n",
            options=f"{{'cache': {str(runner.temporary / 'cache')!r}}}",
        )
    assert (runner.temporary / "made").read_text() == "made "


def test_killed(runner: Runner) -> None:
    here = runner.temporary / "here"
    with started(
        runner, f"import time\nwith snapfs.testing.copies(fill):\n    open({str(here)!r}, 'w')\n    time.sleep(60)\n"
    ) as process:
        until(here.exists, "it has a copy")
        process.kill()
    assert len(runner.left()) == 1
    ran(runner, "with snapfs.testing.copies(fill):\n    pass\n")


def test_forked_children_leave_it_alone(runner: Runner) -> None:
    said = ran(
        runner,
        "with snapfs.testing.copies(fill) as copy:\n"
        "    if not os.fork():\n        sys.exit(0)\n"
        "    os.wait()\n"
        "    print((copy / 'file').read_text())\n",
    )
    assert said == "x\n"
