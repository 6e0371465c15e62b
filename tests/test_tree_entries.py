"""The fixed entries of a snapshot's directory: unlinked they come back, and what moves them elsewhere is refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.processes import until
from tests.refusals import failing
from tests.tree import committed, info, listing, remove_all, shell, usage

Make = Callable[..., Daemon]


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    return module_daemon


@pytest.fixture
def web(daemon: Daemon) -> Iterator[Path]:
    """The active snapshot "web" on "base", with a file and a label."""
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/web")
    (daemon.mnt / "active/web/rootfs/file").write_text("precious")
    (daemon.mnt / "active/web/labels/team").write_text("blue")
    usage(daemon.mnt / "active/web")  # which the listings then show as last known
    yield daemon.mnt / "active/web"
    remove_all(daemon.mnt)


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system."""
    directory = Path("/dev/shm/elsewhere")
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


# -- unlinked


def test_what_was_unlinked_comes_back(web: Path) -> None:
    mnt = web.parent.parent
    before = set(os.listdir(web))
    gone = set[str]()
    for command in ("rm -rf {}/rootfs", "rm {}/info.json", "rm -f {}/parent {}/diff", "rm {}/mount.sh"):
        assert shell(mnt, command.replace("{}", "active/web")).returncode == 0
        gone |= {word.rpartition("/")[2] for word in command.split() if "/" in word}
        assert before - set(os.listdir(web)) == gone
        assert not any(os.path.lexists(web / name) for name in gone)
    until(lambda: set(os.listdir(web)) == before, "they are listed again")
    assert all(os.path.lexists(web / name) for name in before)
    assert (web / "rootfs/file").read_text() == "precious"
    assert info(web)["name"] == "web"


def test_a_removed_labels_directory_comes_back(web: Path) -> None:
    os.unlink(web / "labels/team")
    with open(web / "info.json"):  # somebody holds something in there meanwhile
        held = os.open(web / "labels", os.O_RDONLY)
        try:
            os.rmdir(web / "labels")
            assert "labels" not in os.listdir(web)
            until(lambda: os.path.isdir(web / "labels"), "it is there again")
            (web / "labels/team").write_text("red")
            assert info(web)["labels"] == {"team": "red"}
        finally:
            os.close(held)


def test_deleting_the_whole_takes_no_longer_than_it_may(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(mnt / "active/k")
    assert shell(mnt, "rm -r active/k").returncode == 0
    assert os.listdir(mnt / "active") == []


# -- moved to another file system


MOVERS = [
    "mv active/web {}",
    "mv -f active/web/ {}/",
    "busybox mv active/web {}",
    "gio move active/web {}/web",
    "python3 -c \"import shutil; shutil.move('active/web', '{}')\"",
    "tar -cf {}/tar --remove-files active/web",
]


@pytest.mark.parametrize("mover", MOVERS)
def test_moving_it_elsewhere_deletes_nothing(daemon: Daemon, web: Path, elsewhere: Path, mover: str) -> None:
    mnt = daemon.mnt
    before = listing(mnt)
    done = shell(mnt, mover.format(elsewhere))
    assert done.returncode != 0, done
    assert listing(mnt) == before
    assert (web / "rootfs/file").read_text() == "precious"
    words = "active/web has links in place of its files, which would be lost: cp -a active/web/rootfs/. TARGET"
    refusals = [line for line in daemon.error_log() if words in line]
    assert refusals
    assert all(line.split()[1] == "EPERM" for line in refusals)


@pytest.mark.parametrize("kind", ["view", "committed"])
def test_moving_others_elsewhere_deletes_nothing(daemon: Daemon, web: Path, elsewhere: Path, kind: str) -> None:
    mnt = daemon.mnt
    os.rmdir(web)
    os.mkdir(mnt / "committed/base/view/peek")
    if kind == "view":
        path = "view/peek"
    else:
        os.rmdir(mnt / "view/peek")
        path = "committed/base"
        (mnt / path / "layer.tar").read_bytes()  # as mv does, which has info.json say its digest
    before = listing(mnt)
    assert shell(mnt, f"mv {path} {elsewhere}").returncode == 1
    assert listing(mnt) == before


def test_a_moved_entry_stays(daemon: Daemon, web: Path, elsewhere: Path) -> None:
    mnt = daemon.mnt
    before = listing(mnt)
    for name in ("rootfs", "info.json", "diff"):
        assert shell(mnt, f"mv active/web/{name} {elsewhere}/x").returncode == 1
        assert "can't be moved elsewhere" in daemon.error_log()[-1]
        (elsewhere / "x").unlink()
    assert listing(mnt) == before


@pytest.mark.parametrize("remover", ["rm -r {}", "rm -rf {}", "busybox rm -rf {}", "find {} -delete", "gio remove -f {}"])
def test_plain_deletion_stays_what_it_is(daemon: Daemon, web: Path, remover: str) -> None:
    """Also right after another process has read everything."""
    mnt = daemon.mnt
    assert shell(mnt, "cp -a active/web /dev/shm/copied && rm -r /dev/shm/copied").returncode == 0
    if remover.startswith("gio"):
        os.rmdir(web)  # it deletes no directory that is not empty
        os.mkdir(mnt / "committed/base/active/web")
        return
    assert shell(mnt, remover.format("active/web")).returncode == 0
    assert os.listdir(mnt / "active") == []


def test_after_the_files_were_copied_as_told(daemon: Daemon, web: Path, elsewhere: Path) -> None:
    """The commands that the refusal names do what is wanted."""
    mnt = daemon.mnt
    assert shell(mnt, f"mv active/web {elsewhere}").returncode == 1
    done = shell(mnt, f"cp -a active/web/rootfs/. {elsewhere}/files && rmdir active/web")
    assert done.returncode == 0, done
    assert (elsewhere / "files/file").read_text() == "precious"


# -- who writes beside rootfs


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mkdir active/web/src", "write into active/web/rootfs/"),
        ("touch active/web/f", "write into active/web/rootfs/"),
        ("cp /etc/hostname active/web/", "write into active/web/rootfs/"),
        ("ln -s x active/web/l", "write into active/web/rootfs/"),
        ("mkfifo active/web/p", "write into active/web/rootfs/"),
        ("touch committed/base/f", "mkdir committed/base/active/K, and write into active/K/rootfs/"),
        ("touch active/f", "mkdir active/K, and write into active/K/rootfs/"),
        ("touch f", "mkdir active/K, and write into active/K/rootfs/"),
    ],
)
def test_who_writes_beside_rootfs_is_told_where(daemon: Daemon, web: Path, command: str, words: str) -> None:
    assert shell(daemon.mnt, command).returncode == 1
    line = daemon.error_log()[-1]
    assert words in line
    assert "diff" not in line
    assert " EPERM " in line


def test_a_copied_directory_is_told_of_rootfs(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index").write_text("x")
    assert shell(daemon.mnt, f"cp -r {tmp_path}/site active/").returncode == 1
    assert "write into active/site/rootfs/" in daemon.error_log()[-1]
    os.rmdir(daemon.mnt / "active/site")


def test_without_rootfs_the_words_are_others(make_daemon: Make) -> None:
    """Why there is none, and what to do instead; in the tree's README too."""
    daemon = make_daemon("--no-rootfs").start()
    mnt = daemon.mnt
    os.mkdir(committed(mnt, "base") / "active/web")
    for command in ("cp /etc/hostname active/web/rootfs/", "ls active/web/rootfs", "cd active/web/rootfs"):
        assert shell(mnt, command).returncode != 0
        line = daemon.error_log()[-1]
        assert re.search(r"ENOENT lookup active/web/rootfs: there is no rootfs: it was started with no_rootfs", line)
        assert "sh active/web/mount.sh DIR" in line
    with failing(errno.EPERM):
        (mnt / "active/web/file").touch()
    assert "sh active/web/mount.sh TARGET" in daemon.error_log()[-1]
    readme = (mnt / "README").read_text()
    assert "active/b/rootfs" not in readme
    assert "There is no rootfs here: it was started with no_rootfs." in readme
    subprocess.run(["ls", "-lR", str(mnt)], check=True, stdout=subprocess.DEVNULL)
    assert "rootfs" not in os.listdir(mnt / "active/web")
