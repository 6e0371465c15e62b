"""Fixtures for pytest: a committed base once a session, and a fresh writable copy of it for each test.

    pytest_plugins = "snapfs.testing"          # in conftest.py

    @pytest.fixture(scope="session")
    def shop(snapshot_of):
        return snapshot_of("tests/data/shop")  # or a function that fills the directory that it is given

    def test_it(shop, fresh_copy):
        directory = fresh_copy(shop)           # a pathlib.Path, to be written to at will

A copy takes milliseconds, and no space until it is written to.  The daemon is started when the first test wants it, on a
temporary root that flushes nothing, and ends with the session, as do its mounts: this process gets a mount namespace of
its own.
Run it as root; it takes /dev/fuse and overlayfs.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.kernel import libc

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000
_PR_SET_PDEATHSIG = 1

_numbers = itertools.count(1)

SnapshotOf = Callable[[str | os.PathLike[str] | Callable[[Path], object]], Path]
FreshCopy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def snapfs_tree() -> Iterator[Path]:
    """The mounted tree of a daemon of this session's own."""
    if os.geteuid() != 0:
        pytest.fail(
            "snapfs.testing mounts file systems: run the tests as root (sudo, or a container with /dev/fuse)", pytrace=False
        )
    try:
        libc.call("unshare", _CLONE_NEWNS)
        libc.call("mount", b"none", b"/", None, _MS_REC_PRIVATE, None)
    except OSError:
        pass  # then the mounts are seen by others, and go at the end all the same
    base = Path(tempfile.mkdtemp(prefix="snapfs-testing-"))
    try:
        (base / "tree").mkdir()
        words = [sys.executable, "-P", "-m", "snapfs.cli", "serve", "--sync=none", str(base / "root"), str(base / "tree")]
        with subprocess.Popen(
            words,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for this process, which needs the daemon to throw copies away
            preexec_fn=_die_with_parent,
        ) as daemon:
            assert daemon.stderr is not None
            try:
                said = daemon.stderr.readline()
                if not said.startswith("snapfs: serving "):
                    pytest.fail(f"the daemon did not start: {said}{daemon.stderr.read()}", pytrace=False)
                yield base / "tree"
            finally:
                daemon.send_signal(signal.SIGTERM)
                daemon.stderr.read()
    finally:
        shutil.rmtree(base)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="session")
def snapshot_of(snapfs_tree: Path) -> SnapshotOf:
    """``snapshot_of(source)``: the directory in the tree of a committed snapshot with what the directory ``source`` holds, or
    with what ``source``, a function, puts into the directory that it is given.  Each is made once a session."""
    made: dict[object, Path] = {}

    def snapshot_of(source: str | os.PathLike[str] | Callable[[Path], object]) -> Path:
        known = source if callable(source) else os.path.realpath(source)
        if known not in made:
            active = snapfs_tree / "active" / f"filling-{next(_numbers)}"
            active.mkdir()
            try:
                if callable(source):
                    source(active / "rootfs")
                else:
                    shutil.copytree(source, active / "rootfs", symlinks=True, dirs_exist_ok=True)
                target = snapfs_tree / "committed" / f"base-{next(_numbers)}"
                _do(snapfs_tree, lambda: active.rename(target))
            except BaseException:
                with contextlib.suppress(OSError):  # who fills it may still have a file open, and has a reason of its own
                    active.rmdir()
                raise
            made[known] = target
        return made[known]

    return snapshot_of


@pytest.fixture
def fresh_copy(snapfs_tree: Path, request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    """``fresh_copy(base)``: a directory that begins as the snapshot ``base`` and is thrown away after the test.

    Whatever has a file open in it must have closed it by then.
    """
    made: list[Path] = []

    def fresh_copy(base: Path) -> Path:
        key = f"test-{next(_numbers)}"
        _do(snapfs_tree, (base / "active" / key).mkdir)
        made.append(snapfs_tree / "active" / key)
        return Path(os.readlink(made[-1] / "rootfs"))

    yield fresh_copy
    if request.session.exitstatus == pytest.ExitCode.INTERRUPTED:
        return  # the test was cut short with whatever it has open, and the tree goes at once
    for active in made:
        _do(snapfs_tree, active.rmdir)


def _do(tree: Path, call: Callable[[], object]) -> None:
    """``call``; where the tree refuses it the test fails with its words."""
    try:
        call()
    except OSError as error:
        lines = (tree / ".snapfs/error_log").read_text().splitlines()
        pytest.fail(lines[-1] if lines else str(error), pytrace=False)
