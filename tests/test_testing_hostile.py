"""The plugin for pytest, where root's tests have given directories to another user, who exchanges what is in them."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.kernel import beneath, mounting
from snapfs.kernel.mounttable import mount_table
from snapfs.testing import comparing, copying, digests, place
from tests.mounts import unanswering
from tests.plugin import NOBODY

pytestmark = pytest.mark.mounts


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The directory of a run that was killed, with a copy in which a directory is another user's."""
    made = tmp_path / f"{place.PREFIX}dead"
    path = made
    for name in ("", "copy", "1", "upper"):
        path /= name
        path.mkdir(mode=0o711)
    (path / "data/a").mkdir(parents=True)
    for name in ("data", "data/a"):
        os.chown(path / name, NOBODY, NOBODY)
    yield made
    for target in mounted(tmp_path):
        mounting.unmount(target, mounting.MNT_DETACH)


@pytest.fixture
def theirs(run: Path) -> Path:
    return run / "copy/1/upper/data"


def mounted(path: Path) -> list[str]:
    """The targets of all mounts in ``path``, the newest first."""
    return [mount.target for mount in mount_table() if mount.target.startswith(f"{path}/")][::-1]


def mount_tmpfs(target: Path) -> Path:
    """A file on a tmpfs of root's, mounted on ``target``."""
    target.mkdir(parents=True)
    mounting.mount("none", str(target), "tmpfs")
    (target / "file").write_text("x")
    return target / "file"


def once_before(monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], None]) -> None:
    """Let ``act`` happen just before the first call of a function."""
    function, left = getattr(module, name), [act]

    def called(*arguments: object, **named: object) -> object:
        while left:
            left.pop()()
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, called)


# -- runs of before


def test_what_is_mounted_at_the_name_of_a_run_is_not_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody may make such a directory, and mount on it."""
    monkeypatch.setenv("TMPDIR", str(run.parent))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with unanswering(run):
        place.Place().close()
        assert mounted(run.parent) == [str(run)]


# -- what a run that was killed has left mounted


def test_a_directory_that_becomes_a_link_while_mounts_in_it_are_unmounted(
    run: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run unmounts what that user has mounted there, wherever it is by then, and nothing that the link leads to."""
    file = mount_tmpfs(tmp_path / "elsewhere/victim")

    def exchange() -> None:
        (theirs / "a").rename(theirs / "b")
        (theirs / "a").symlink_to(tmp_path / "elsewhere")

    once_before(monkeypatch, mounting, "unmount", exchange)
    with unanswering(*(theirs / "a" / name for name in ("victim", "one", "two"))):
        place._clear_dead_runs(str(tmp_path))
    assert (theirs / "a").is_symlink() or not run.exists(), "nothing was exchanged"
    assert file.exists()
    assert mounted(tmp_path) == [str(file.parent)]
    assert not run.exists()


def test_a_mount_of_root_s_that_was_moved_there_with_a_directory(run: Path, theirs: Path, tmp_path: Path) -> None:
    """Who owns the directory above a mountpoint can move it: it stays, with what it holds."""
    file = mount_tmpfs(tmp_path / "home/mine/mnt")
    (tmp_path / "home/mine").rename(theirs / "moved")
    place._clear_dead_runs(str(tmp_path))
    assert mounted(tmp_path) == [str(theirs / "moved/mnt")]
    assert (theirs / "moved/mnt" / file.name).exists()
    assert not (theirs / "a").exists(), "all else is removed"


def test_mounts_upon_each_other(run: Path, theirs: Path, tmp_path: Path) -> None:
    """Root's tests may have mounted where nobody else could; in what is mounted something else may be, that never answers."""
    mount_tmpfs(run / "copy/m")
    mount_tmpfs(run / "copy/m/inside")
    with unanswering(run / "copy/m/served", run / "copy/m"), unanswering(theirs / "a", theirs / "a"):
        place._clear_dead_runs(str(tmp_path))
    assert mounted(tmp_path) == []
    assert not run.exists()


def test_what_is_mounted_while_a_directory_is_removed_is_not_entered(run: Path, theirs: Path, tmp_path: Path) -> None:
    """Its server may never answer, or it is one of root's that was moved there."""
    file = mount_tmpfs(theirs / "mnt")
    with unanswering(theirs / "a"), pytest.raises(OSError, match="busy") as refused:
        copying.remove_tree(str(run))
    assert refused.value.filename in (str(theirs / "mnt"), str(theirs / "a"))
    assert file.exists()


# -- what is copied


def test_a_directory_that_becomes_a_link_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base/a").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/secret").write_text("x")

    def exchange() -> None:
        (tmp_path / "base/a").rename(tmp_path / "other")
        (tmp_path / "base/a").symlink_to(tmp_path / "victim")

    once_before(monkeypatch, stat, "S_ISDIR", exchange)
    with pytest.raises(NotADirectoryError, match=f"is none any more: '{tmp_path}/base/a'"):
        copying.copy_tree(str(tmp_path / "base"), str(tmp_path / "copy"), clone=False)
    assert (tmp_path / "base/a").is_symlink()
    assert not (tmp_path / "copy/a/secret").exists()


@contextmanager
def becomes_a_fifo(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For a block: ``file``, once it was found to be a regular one.  Who waits for a writer is let go after ten seconds, and
    the test fails."""

    def exchange() -> None:
        file.unlink()
        os.mkfifo(file)

    late = threading.Event()

    def let_go() -> None:
        late.set()
        os.close(os.open(file, os.O_RDWR))

    timer = threading.Timer(10, let_go)
    timer.start()
    once_before(monkeypatch, stat, "S_ISREG", exchange)
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    assert file.is_fifo()
    assert not late.is_set(), "it has waited for a writer"


def test_a_file_that_becomes_a_fifo_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "base/file"
    file.parent.mkdir()
    file.write_text("x")
    with becomes_a_fifo(file, monkeypatch), pytest.raises(OSError, match=f"is none any more: '{file}'"):
        copying.copy_tree(str(file.parent), str(tmp_path / "copy"), clone=False)


def test_a_file_that_becomes_a_fifo_while_it_is_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with becomes_a_fifo(file, monkeypatch), pytest.raises(OSError, match=f"is none any more: '{file}'"):
        list(digests._contents(str(file)))


def test_root_changes_no_modes_to_copy(tmp_path: Path) -> None:
    """What it changes that of may have become a link by then."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").touch(mode=0o200)
    (tmp_path / "base/file").chmod(0o200)
    with copying.readable(str(tmp_path / "base")) as modes:
        copying.copy_tree(str(tmp_path / "base"), str(tmp_path / "copy"), clone=False, modes=modes)
        assert (tmp_path / "base/file").stat().st_mode & 0o777 == 0o200
    assert (tmp_path / "copy/file").stat().st_mode & 0o777 == 0o200


@pytest.mark.parametrize("at", [0, 1], ids=["changed", "given back"])
def test_a_file_that_becomes_a_link_while_its_mode_is_changed(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a user's own, for which the user's rights are enough."""
    victim, file = tmp_path / "victim", tmp_path / "base/d/file"
    file.parent.mkdir(parents=True)
    for path, mode in ((file, 0o266), (victim, 0o600)):
        path.touch()
        path.chmod(mode)

    def exchange() -> None:
        file.unlink()
        file.symlink_to(victim)

    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    if not at:
        once_before(monkeypatch, os, "chmod", exchange)
    with copying.readable(str(tmp_path / "base")) as modes:
        assert modes == {str(file): stat.S_IFREG | 0o266}
        if at:
            exchange()
    assert file.is_symlink()
    assert victim.stat().st_mode & 0o777 == 0o600


def test_attributes_of_a_fifo_are_copied(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base/fifo")
    os.setxattr(tmp_path / "base/fifo", "trusted.x", b"1")
    os.setxattr(tmp_path / "base", "user.x", b"2")
    copying.copy_tree(str(tmp_path / "base"), str(tmp_path / "copy"), clone=False)
    assert os.getxattr(tmp_path / "copy/fifo", "trusted.x") == b"1"
    assert os.getxattr(tmp_path / "copy", "user.x") == b"2"


def test_a_directory_that_becomes_a_link_while_it_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "copy/a", "victim"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "victim/secret").write_text("x")

    def exchange() -> None:
        (tmp_path / "copy/a").rename(tmp_path / "other")
        (tmp_path / "copy/a").symlink_to(tmp_path / "victim")

    once_before(monkeypatch, comparing, "escaped", exchange)
    assert list(comparing.compared(str(tmp_path / "base"), str(tmp_path / "copy"))) == ["A /a\n"]
    assert (tmp_path / "copy/a").is_symlink()


# -- directories deeper than any path is long, and than Python's stack


def deepen(directory: Path, depth: int) -> None:
    """Make a chain of ``depth`` directories in ``directory``, each beside a file that sorts after it."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.close(os.open("b", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
        os.mkdir("aaa", dir_fd=fd)
        below = os.open("aaa", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
    os.close(fd)


@contextmanager
def few_descriptors() -> Iterator[None]:
    """For a block: this process may have 400 more open at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 400, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_directories_1_500_deep_are_compared_copied_digested_and_removed(tmp_path: Path) -> None:
    depth = 1500
    base, copy, kept = tmp_path / "base", tmp_path / "copy", tmp_path / "kept"
    for path in (base, copy):
        path.mkdir()
    deepen(copy, depth)
    with few_descriptors():
        lines = list(comparing.compared(str(base), str(copy)))
        assert len(lines) == 2 * depth + 1
        assert lines[0] == "A /aaa\n"
        assert lines[depth] == f"A {'/aaa' * depth}/bottom\n"
        assert lines[-1] == "A /b\n"
        copying.copy_tree(str(copy), str(kept), clone=False)
        assert list(comparing.compared(str(copy), str(kept))) == []
        assert digests.of_directory(str(copy), contents=True)
        found = list(digests._states(str(copy)))
        assert found == list(digests._states(str(kept)))
        assert found[depth + 1].startswith(f"{'/aaa' * depth}/bottom 100600 0 ")
        assert sum(1 for _ in digests._contents(str(copy))) == 1 + depth + 2 * (depth + 1)
        copying._make_writable(str(copy))
        copying.remove_tree(str(copy))
        copying.remove_tree(str(kept))
    assert os.listdir(tmp_path) == ["base"]


def test_the_modes_of_directories_1_500_deep_are_given(tmp_path: Path) -> None:
    deepen(tmp_path, 1500)
    fd = os.open(tmp_path / ("aaa/" * 1000), os.O_RDONLY)
    os.chmod("aaa", 0, dir_fd=fd)
    with few_descriptors():
        copying._make_writable(str(tmp_path))
    assert os.stat("aaa", dir_fd=fd).st_mode & 0o777 == 0o700
    os.close(fd)
    copying.remove_tree(str(tmp_path / "aaa"))


def test_as_much_as_others_like_beside_the_runs_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    monkeypatch.setattr(beneath, "MOST", 10)
    monkeypatch.setattr(place, "_is_of_this_user", lambda path: looked_at.append(path))
    for number in range(50):
        (tmp_path / f"{place.PREFIX}{number}").mkdir()
    place._clear_dead_runs(str(tmp_path))
    assert len(looked_at) == 10
