"""The plugin for pytest: copies that are kept, with their path and their changes in the report."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.plugin import NOBODY, Runner

pytestmark = pytest.mark.mounts

TESTS = """
import pytest

def fill(directory):
    (directory / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (directory / name).write_text(name)
    (directory / "secret").touch(mode=0)

@pytest.fixture
def copy(snapshot_of, fresh_copy):
    yield fresh_copy(snapshot_of(fill))

def test_passes(copy):
    (copy / "passed").touch()

def test_fails(copy):
    (copy / "a").unlink()
    (copy / "sub/c").write_text("changed")
    (copy / "new\\nline").touch(mode=0o600)
    held = open(copy / "b")
    assert False, "as it must"

@pytest.fixture
def broken(copy):
    (copy / "broken").touch()
    raise RuntimeError("in a fixture")

def test_error(broken):
    pass

@pytest.fixture(scope="module")
def wide(snapshot_of, module_fresh_copy):
    return module_fresh_copy(snapshot_of(fill))

@pytest.mark.parametrize("number", range(2))
def test_wide(wide, number):
    (wide / f"wide {number}").touch()
    assert number

def test_many(copy):
    for number in range(300):
        (copy / f"{number:03}").touch()
    assert False

def test_none(fresh_copy):
    assert False
"""


@pytest.fixture(params=[0, NOBODY], ids=["root", "user"])
def runner(request: pytest.FixtureRequest, open_path: Path) -> Runner:
    made = Runner(open_path, uid=request.param)
    made.write(test_it=TESTS, conftest="# fresh_copy\n")
    return made


def kept(said: str) -> dict[str, list[str]]:
    """The copies that the report names, each with its changes."""
    found = re.findall(r"-+ snapfs: a copy is kept: (\S+) -+\n((?:[ACDR] .*\n|and .*\n)*)", said)
    return {path: changes.splitlines() for path, changes in found}


@pytest.mark.parametrize("options", [(), ("-n2",), ("--snapfs=copy",)], ids=["alone", "xdist", "copy"])
def test_copies_of_tests_that_failed(options: tuple[str, ...], runner: Runner) -> None:
    base = runner.temporary / "base"
    said = runner("--snapfs-keep=failed", f"--basetemp={base}", *options, status=1)
    found = {re.sub(r"\d+/copy$", "", path.split("/")[-2] + "/copy"): (Path(path), lines) for path, lines in kept(said).items()}
    assert sorted(found) == ["test_error", "test_fails", "test_many", "test_wide_0_"]
    path, lines = found["test_fails"]
    assert lines == ["D /a", "A /new\\nline", "C /sub/c"]
    assert sorted(os.listdir(path)) == ["b", "new\nline", "secret", "sub"]
    assert (path / "sub/c").read_text() == "changed"
    assert (path / "new\nline").stat().st_mode & 0o777 == 0o600
    assert found["test_error"][1] == ["A /broken"]
    path, lines = found["test_wide_0_"]
    assert lines == ["A /wide 0"]
    assert sorted(os.listdir(path)) == ["a", "b", "secret", "sub", "wide 0"], "as it was when the test failed"
    path, lines = found["test_many"]
    assert len(lines) == 101
    assert lines[-1] == "and 200 lines more"
    assert len(os.listdir(path)) == 304


def test_copies_of_all_tests(runner: Runner) -> None:
    (runner.tests / "pytest.ini").write_text("[pytest]\nsnapfs_keep = all\n")
    said = runner(f"--basetemp={runner.temporary / 'base'}", status=1)
    assert len(kept(said)) == 4, "and those of tests that passed are named at the end"
    passed = said.partition("snapfs: copies of tests that passed")[2].splitlines()[1:3]
    one, two = (sorted(os.listdir(path)) for path in passed)
    assert one == ["a", "b", "passed", "secret", "sub"]
    assert two == ["a", "b", "secret", "sub", "wide 0", "wide 1"]


def test_none_are_kept(runner: Runner) -> None:
    said = runner(f"--basetemp={runner.temporary / 'base'}", status=1)
    assert kept(said) == {}
    assert "is kept" not in said
    assert list((runner.temporary / "base").glob("**/copy")) == []


CANNOT = """
import pytest
from snapfs.testing.making import Copy

def keep(self, target):
    raise OSError(5, "as of a disk", target)

Copy.keep = keep

def test_of_module(tmp_path, module_fresh_copy):
    module_fresh_copy(tmp_path)
    assert False

def test_alone(tmp_path, fresh_copy):
    fresh_copy(tmp_path)
    assert False

def test_next():
    pass
"""


def test_a_copy_that_cannot_be_kept_ends_no_run(tmp_path: Path) -> None:
    """Whoever else may write in it can see to that."""
    run = Runner(tmp_path)
    run.write(test_it=CANNOT)
    said = run("--snapfs=copy", "--snapfs-keep=failed", status=1)
    assert "INTERNALERROR" not in said
    assert re.search(r"snapfs: a copy can't be kept: .*/copy -+\n.*as of a disk", said)
    assert "2 failed, 1 passed, 1 error" in said
