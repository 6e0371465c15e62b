"""What each call does: every row of the promise through real system calls on a real mount, each refusal with its errno, its
words in .snapfs/error_log, and nothing changed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.root.pool import POOL_LEAST
from tests.daemon import Daemon
from tests.processes import until
from tests.refusals import failing, refused
from tests.tree import KINDS, REMOVERS, committed, info, listing, made, mounted, nanoseconds, remove_all, shell, usage

AT_FDCWD = -100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    """One daemon for all tests here; each leaves it empty."""
    return module_daemon


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what a test made."""
    yield
    if "daemon" in request.fixturenames:
        remove_all(request.getfixturevalue("daemon").mnt)


# -- what the tests share


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# -- mkdir


@pytest.mark.parametrize("kind", ["active", "view"])
def test_mkdir_at_the_root_makes_a_snapshot_without_parent(daemon: Daemon, kind: str) -> None:
    path = daemon.mnt / kind / "k"
    os.mkdir(path)
    said = info(path)
    assert (said["name"], said["kind"], said["parent"], said["labels"]) == ("k", kind, None, {})
    assert said["created"] == said["updated"]
    directory = daemon.root / "snapshots" / str(said["id"])
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in directory.iterdir()}
    assert modes == ({"fs": 0o755, "work": 0o711} if kind == "active" else {"fs": 0o755})
    assert not os.path.lexists(path / "parent")
    assert os.listdir(daemon.mnt / kind) == ["k"]


@pytest.mark.parametrize("kind", ["active", "view"])
def test_mkdir_inside_a_committed_snapshot_makes_its_child(daemon: Daemon, kind: str) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / kind / "k")
    assert os.path.islink(base / kind / "k"), "at once, although the kernel has just made a directory there"
    assert os.readlink(base / kind / "k") == f"../../../{kind}/k"
    assert os.listdir(base / kind) == ["k"]
    assert not os.path.islink(daemon.mnt / kind / "k")
    assert info(daemon.mnt / kind / "k") == info(base / kind / "k")
    assert info(base / kind / "k")["parent"] == "base"
    assert os.readlink(daemon.mnt / kind / "k/parent") == "../../committed/base"
    assert os.path.samefile(daemon.mnt / kind / "k/parent", base)


def test_mkdir_p_makes_a_child_and_is_content_with_one_that_is_there(daemon: Daemon) -> None:
    committed(daemon.mnt, "base")
    for _ in range(2):
        assert shell(daemon.mnt, "mkdir -p committed/base/active/k committed/base/view/v active/x").stderr == ""
    assert [os.listdir(daemon.mnt / kind) for kind in KINDS] == [["k", "x"], ["v"], ["base"]]
    assert daemon.error_log()[-1:] == [line for line in daemon.error_log()[-1:] if "mkdir" not in line or " k" not in line]


def test_a_child_made_inside_its_parent_by_someone_who_sits_there(daemon: Daemon) -> None:
    committed(daemon.mnt, "base")
    done = shell(daemon.mnt, "cd committed/base/active && mkdir k && cd k && cat info.json && cd -P . && pwd")
    assert done.stderr == ""
    assert '"parent": "base"' in done.stdout
    assert done.stdout.splitlines()[-1] == str(daemon.mnt / "active/k")


@pytest.mark.parametrize("door", ["active", "view", "committed/base/active", "committed/base/view"])
@pytest.mark.parametrize("kind", KINDS)
def test_mkdir_of_a_key_in_use(daemon: Daemon, kind: str, door: str) -> None:
    committed(daemon.mnt, "base")
    made(daemon.mnt, kind, "k")
    if kind == door:  # the kernel sees the entry itself and does not ask
        before = listing(daemon.mnt)
        with pytest.raises(FileExistsError):
            os.mkdir(daemon.mnt / door / "k")
        assert listing(daemon.mnt) == before
    else:
        with refused(daemon, errno.EEXIST, "mkdir", f"{door}/k", rf'snapshot "k" already exists \({kind}\)'):
            os.mkdir(daemon.mnt / door / "k")


@pytest.mark.parametrize("door", ["committed", "committed/base/committed"])
def test_committed_snapshots_are_not_made_by_mkdir(daemon: Daemon, door: str) -> None:
    committed(daemon.mnt, "base")
    with refused(daemon, errno.EPERM, "mkdir", f"{door}/k", "rename an active one"):
        os.mkdir(daemon.mnt / door / "k")


@pytest.mark.parametrize(
    "door", [".", "by-id", ".snapfs", "active/a", "active/a/labels", "committed/base", "committed/base/labels"]
)
def test_mkdir_anywhere_else(daemon: Daemon, door: str) -> None:
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/a")
    with refused(daemon, errno.EPERM, "mkdir", os.path.normpath(f"{door}/k"), "director"):
        os.mkdir(daemon.mnt / door / "k")


def test_mkdir_in_a_parent_that_is_gone(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    here = os.open(base / "active", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rmdir(base)
        with pytest.raises(FileNotFoundError):
            os.mkdir("k", dir_fd=here)
        with pytest.raises(FileNotFoundError):
            os.mkdir(base / "active/k")
    finally:
        os.close(here)
    assert os.listdir(daemon.mnt / "active") == []


@pytest.mark.durable
@pytest.mark.parametrize("limit", ["nr_inodes=120", "size=400k"])
def test_mkdir_on_a_full_disk_fails_whole_and_works_again_later(
    make_daemon: Callable[..., Daemon], tmp_path: Path, limit: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    daemon = make_daemon("--no-rootfs", root=disk / "root")  # a mount takes inodes too
    subprocess.run(["mount", "-t", "tmpfs", "-o", limit, "none", str(disk)], check=True)
    try:
        daemon.start()
        os.mkdir(daemon.mnt / "active/first")
        fillers: list[Path] = []

        def fill() -> None:
            """Take all that is left, also what the daemon gave back since the last time."""
            with contextlib.suppress(OSError):
                while True:
                    filler = disk / f"filler{len(fillers)}"
                    fillers.append(filler)
                    with filler.open("wb", buffering=0) as file:
                        while limit.startswith("size") and file.write(bytes(4096)) == 4096:
                            pass

        for number in range(1000):
            fill()
            try:
                os.mkdir(daemon.mnt / "active" / str(number))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        else:
            pytest.fail("a full disk took a thousand snapshots")
        assert re.search(rf"ENOSPC mkdir active/{number}: cannot .*No space left on device", daemon.error_log()[-1])
        known = os.listdir(daemon.mnt / "active")
        assert known == ["first", *map(str, range(number))]
        until(lambda: len(os.listdir(disk / "root/trash")) == 0)  # where the one that failed went
        assert len(os.listdir(disk / "root/snapshots")) == len(known)
        for number in range(1000):  # what the daemon deletes is free a moment later, so that the next may find room
            fill()
            before = listing(daemon.mnt)
            try:
                os.mkdir(daemon.mnt / f"active/more{number}")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
        else:
            pytest.fail("a full disk took a thousand snapshots")
        assert listing(daemon.mnt) == before
        for filler in fillers:
            filler.unlink(missing_ok=True)
        os.mkdir(daemon.mnt / "active/after")
        assert info(daemon.mnt / "active/after")["name"] == "after"
        assert daemon.stop() == 0
    finally:
        daemon.cleanup()
        subprocess.run(["umount", str(disk)], check=True)


# -- mv: Commit


def test_mv_commits_and_the_id_and_the_parent_stay(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base", content="below")
    os.mkdir(base / "active/web")
    before = info(daemon.mnt / "active/web")
    (daemon.mnt / "active/web/diff/index").write_text("hello")
    assert shell(daemon.mnt, "mv active/web committed/v1").stderr == ""
    after = info(daemon.mnt / "committed/v1")
    assert after["id"] == before["id"]
    assert (after["name"], after["kind"], after["parent"]) == ("v1", "committed", "base")
    assert after["created"] == after["updated"] > before["updated"]
    assert (daemon.mnt / "committed/v1/diff/index").read_text() == "hello"
    assert [os.listdir(daemon.mnt / kind) for kind in KINDS] == [[], [], ["base", "v1"]]
    assert [os.listdir(base / kind) for kind in KINDS] == [[], [], ["v1"]]
    entries = set(os.listdir(daemon.mnt / "committed/v1"))
    assert {"info.json", "usage.json", "labels", "parent", "diff", *KINDS} <= entries
    assert not {"mounts.json", "mount.sh"} & entries
    for gone in ("mounts.json", "mount.sh"):
        assert not os.path.lexists(daemon.mnt / "committed/v1" / gone)


def test_entries_that_were_looked_up_before_a_commit_do_not_linger(daemon: Daemon) -> None:
    os.mkdir(daemon.mnt / "active/web")
    here = os.open(daemon.mnt / "active/web", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(here):
            os.stat(name, dir_fd=here, follow_symlinks=False)
        os.rename(daemon.mnt / "active/web", daemon.mnt / "committed/v1")
        assert not os.path.lexists(daemon.mnt / "active/web")
        assert "mounts.json" not in os.listdir(here)
        until(lambda: not os.path.lexists(daemon.mnt / "committed/v1/mounts.json"))  # told from another thread
        with pytest.raises(FileNotFoundError):
            os.stat("mount.sh", dir_fd=here)
        os.mkdir("active/child", dir_fd=here)
    finally:
        os.close(here)
    assert info(daemon.mnt / "active/child")["parent"] == "v1"


def test_commit_from_inside_its_own_parent(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/web")
    os.rename(daemon.mnt / "active/web", base / "committed/v1")
    until(lambda: os.path.islink(base / "committed/v1"))
    assert os.readlink(base / "committed/v1") == "../../../committed/v1"
    assert info(daemon.mnt / "committed/v1")["parent"] == "base"
    assert os.listdir(base / "active") == []


def test_commit_rebases_what_had_no_parent(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/web")
    assert shell(daemon.mnt, "mv active/web committed/base/committed/v1").stderr == ""
    until(lambda: os.path.islink(base / "committed/v1"))
    assert info(daemon.mnt / "committed/v1")["parent"] == "base"
    assert os.readlink(daemon.mnt / "committed/v1/parent") == "../../committed/base"
    os.mkdir(daemon.mnt / "committed/v1/active/next")
    (spec,) = json.loads((daemon.mnt / "active/next/mounts.json").read_text())
    numbers = [info(daemon.mnt / "committed" / name)["id"] for name in ("v1", "base")]
    assert f"lowerdir={':'.join(f'{daemon.root}/snapshots/{number}/fs' for number in numbers)}" in spec["options"]


def test_commit_into_another_parent(daemon: Daemon) -> None:
    committed(daemon.mnt, "base")
    committed(daemon.mnt, "other")
    os.mkdir(daemon.mnt / "committed/base/active/web")
    reason = 'the parent of snapshot "web" is "base", not "other"'
    with refused(daemon, errno.EPERM, "rename", "active/web committed/other/committed/v1", reason):
        os.rename(daemon.mnt / "active/web", daemon.mnt / "committed/other/committed/v1")


@pytest.mark.parametrize("door", ["committed", "committed/base/committed"])
def test_a_view_cannot_be_committed(daemon: Daemon, door: str) -> None:
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "committed/base/view/peek")
    with refused(daemon, errno.EPERM, "rename", f"view/peek {door}/v1", "is a view"):
        os.rename(daemon.mnt / "view/peek", daemon.mnt / door / "v1")


@pytest.mark.parametrize("flags", [0, NOREPLACE])
@pytest.mark.parametrize("door", ["committed", "committed/base/committed"])
@pytest.mark.parametrize("kind", KINDS)
def test_commit_never_replaces(daemon: Daemon, kind: str, door: str, flags: int) -> None:
    committed(daemon.mnt, "base")
    made(daemon.mnt, kind, "n")
    os.mkdir(daemon.mnt / "active/web")
    if flags and f"{kind}/n" == f"{door}/n":  # the kernel sees the entry itself and does not ask
        with pytest.raises(FileExistsError):
            renameat2(daemon.mnt / "active/web", daemon.mnt / door / "n", flags)
    else:
        with refused(daemon, errno.EEXIST, "rename", f"active/web {door}/n", rf'snapshot "n" already exists \({kind}\)'):
            renameat2(daemon.mnt / "active/web", daemon.mnt / door / "n", flags)


@pytest.mark.parametrize("flags", [0, NOREPLACE])
@pytest.mark.parametrize("door", ["committed", "committed/base/committed"])
def test_commit_under_its_own_key(daemon: Daemon, door: str, flags: int) -> None:
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "committed/base/active/web")
    renameat2(daemon.mnt / "active/web", daemon.mnt / door / "web", flags)
    assert info(daemon.mnt / "committed/web")["parent"] == "base"
    assert os.listdir(daemon.mnt / "active") == []


@pytest.mark.parametrize("command", ["mv active/web committed/base", "busybox mv active/web committed/base"])
def test_mv_into_a_snapshot_says_that_it_exists(daemon: Daemon, command: str) -> None:
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/web")
    before = listing(daemon.mnt)
    done = shell(daemon.mnt, command)
    assert done.returncode == 1
    assert done.stderr.startswith("mv: ")
    assert listing(daemon.mnt) == before
    assert daemon.error_log()[-1].endswith(
        'EEXIST rename active/web committed/base/web: snapshot "base" already exists (committed)'
    )


def test_commit_while_mounted_read_write(daemon: Daemon, tmp_path: Path) -> None:
    base = committed(daemon.mnt, "base", content="x")
    os.mkdir(base / "active/web")
    for door in ("committed", "committed/base/committed"):
        with mounted(daemon.mnt / "active/web", tmp_path / "merged") as target:
            assert (target / "file").read_text() == "x"
            reason = f'snapshot "web" is mounted at {re.escape(str(target))}'
            with refused(daemon, errno.EBUSY, "rename", f"active/web {door}/v1", reason):
                os.rename(daemon.mnt / "active/web", daemon.mnt / door / "v1")
    os.rename(daemon.mnt / "active/web", daemon.mnt / "committed/v1")
    assert os.listdir(daemon.mnt / "active") == []


def test_commit_while_bound_read_write(daemon: Daemon, tmp_path: Path) -> None:
    os.mkdir(daemon.mnt / "active/b")
    with mounted(daemon.mnt / "active/b", tmp_path / "merged") as target:
        (target / "new").write_text("y")
        usage(daemon.mnt / "active/b")  # which the listings then show as last known
        with refused(daemon, errno.EBUSY, "rename", "active/b committed/base", "is mounted at"):
            os.rename(daemon.mnt / "active/b", daemon.mnt / "committed/base")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
        os.rename(daemon.mnt / "active/b", daemon.mnt / "committed/base")  # read-only harms nobody
        assert (daemon.mnt / "committed/base/diff/new").read_text() == "y"


def test_a_view_of_the_parent_that_is_mounted_is_no_hindrance(daemon: Daemon, tmp_path: Path) -> None:
    base = committed(daemon.mnt, "base", content="x")
    os.mkdir(base / "active/web")
    os.mkdir(base / "view/peek")
    with mounted(daemon.mnt / "view/peek", tmp_path / "merged"):
        os.rename(daemon.mnt / "active/web", daemon.mnt / "committed/v1")
    assert os.listdir(daemon.mnt / "active") == []


# -- mv: renaming


@pytest.mark.parametrize("kind", KINDS)
def test_mv_within_a_kind_renames(daemon: Daemon, kind: str) -> None:
    before = info(made(daemon.mnt, kind, "one"))
    assert shell(daemon.mnt, f"mv {kind}/one {kind}/two").stderr == ""
    assert info(daemon.mnt / kind / "two") == {**before, "name": "two"}
    assert os.listdir(daemon.mnt / kind) == ["two"]
    assert not os.path.lexists(daemon.mnt / kind / "one")
    renameat2(daemon.mnt / kind / "two", daemon.mnt / kind / "three", NOREPLACE)
    assert os.listdir(daemon.mnt / kind) == ["three"]


def test_a_renamed_parent_keeps_its_children(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/web")
    os.mkdir(base / "view/peek")
    committed(daemon.mnt, "v1", parent="base")
    children = [daemon.mnt / child for child in ("active/web", "view/peek", "committed/v1")]
    for child in children:  # what the kernel now has in its cache
        assert (info(child)["parent"], os.readlink(child / "parent")) == ("base", "../../committed/base")
        (child / "parent/info.json").read_text()
    renamed = daemon.mnt / "committed/ground floor"
    os.rename(base, renamed)
    for child in children:
        assert (info(child)["parent"], os.readlink(child / "parent")) == ("ground floor", "../../committed/ground floor")
        assert os.path.samefile(child / "parent", renamed)
        assert os.lstat(child / "parent").st_size == len("../../committed/ground floor")
        assert os.stat(child / "info.json").st_size == len((child / "info.json").read_bytes())
    assert [os.listdir(renamed / kind) for kind in KINDS] == [["web"], ["peek"], ["v1"]]
    os.rename(daemon.mnt / "active/web", renamed / "committed/v2")
    assert info(daemon.mnt / "committed/v2")["parent"] == "ground floor"


def test_a_renamed_child_is_listed_by_its_new_name(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/one")
    assert os.path.samefile(base / "active/one", daemon.mnt / "active/one")
    os.rename(daemon.mnt / "active/one", daemon.mnt / "active/two")
    assert os.listdir(base / "active") == ["two"]
    assert os.readlink(base / "active/two") == "../../../active/two"
    assert not os.path.lexists(base / "active/one")


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rename_never_replaces(daemon: Daemon, kind: str, other: str) -> None:
    made(daemon.mnt, kind, "one")
    made(daemon.mnt, other, "two")
    with refused(daemon, errno.EEXIST, "rename", f"{kind}/one {kind}/two", rf'snapshot "two" already exists \({other}\)'):
        os.rename(daemon.mnt / kind / "one", daemon.mnt / kind / "two")


OTHER_RENAMES = [
    ("active/a", "view/x"),
    ("active/a", "x"),
    ("active/a", "by-id/x"),
    ("active/a", ".snapfs/x"),
    ("active/a", "active/b/labels/x"),
    ("active/a", "committed/base/active/x"),
    ("active/child", "committed/base/active/x"),
    ("view/v", "active/x"),
    ("view/v", "committed/base/view/x"),
    ("committed/base", "active/x"),
    ("committed/base", "view/x"),
    ("committed/base", "committed/other/committed/x"),
    ("committed/base/active/child", "view/x"),
    ("committed/base/active/child", "committed/other/active/x"),
    ("committed/base/active/child", "committed/other/committed/x"),
    ("active", "x"),
    ("README", "x"),
    (".snapfs", "x"),
    (".snapfs/version", ".snapfs/x"),
    ("active/a/info.json", "active/a/x"),
    ("active/a/info.json", "active/x"),
    ("active/a/labels", "active/a/x"),
    ("active/a/labels/l", "active/b/labels/l"),
    ("active/a/labels/l", "active/x"),
]


@pytest.mark.parametrize(("old", "new"), OTHER_RENAMES)
def test_any_other_rename_is_refused(daemon: Daemon, old: str, new: str) -> None:
    committed(daemon.mnt, "base")
    committed(daemon.mnt, "other")
    for path in ("active/a", "active/b", "view/v", "committed/base/active/child"):
        os.mkdir(daemon.mnt / path)
    (daemon.mnt / "active/a/labels/l").write_text("1")
    with refused(
        daemon,
        errno.EPERM,
        "rename",
        f"{old} {new}",
        "(can't be|rename the snapshot in|can only be renamed within|the parent of)",
    ):
        os.rename(daemon.mnt / old, daemon.mnt / new)


def test_an_id_link_cannot_be_renamed(daemon: Daemon) -> None:
    number = info(made(daemon.mnt, "active", "a"))["id"]
    with refused(daemon, errno.EPERM, "rename", f"by-id/{number} by-id/x", "can't be"):
        os.rename(daemon.mnt / f"by-id/{number}", daemon.mnt / "by-id/x")


@pytest.mark.parametrize("old", ["active/a", "view/v", "committed/other"])
def test_a_rename_into_a_snapshots_directory(daemon: Daemon, old: str) -> None:
    committed(daemon.mnt, "base")
    committed(daemon.mnt, "other")
    os.mkdir(daemon.mnt / "active/a")
    os.mkdir(daemon.mnt / "view/v")
    with refused(daemon, errno.EEXIST, "rename", f"{old} committed/base/x", r'snapshot "base" already exists \(committed\)'):
        os.rename(daemon.mnt / old, daemon.mnt / "committed/base/x")


@pytest.mark.parametrize("flags", [EXCHANGE, WHITEOUT])
@pytest.mark.parametrize(("old", "new"), [("active/a", "active/b"), ("active/a", "committed/base")])
def test_special_renames(daemon: Daemon, old: str, new: str, flags: int) -> None:
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/a")
    os.mkdir(daemon.mnt / "active/b")
    with refused(daemon, errno.EINVAL, "rename", f"{old} {new}", "exchange"):
        renameat2(daemon.mnt / old, daemon.mnt / new, flags)


def test_renaming_what_is_not_there(daemon: Daemon) -> None:
    for old, new in (("active/none", "committed/x"), ("committed/none", "committed/x")):
        with pytest.raises(FileNotFoundError):
            os.rename(daemon.mnt / old, daemon.mnt / new)


# -- rmdir and rm -r


@pytest.mark.parametrize("kind", KINDS)
def test_rmdir_removes_a_snapshot_and_soon_its_files(daemon: Daemon, kind: str) -> None:
    path = made(daemon.mnt, kind, "k")
    number = info(path)["id"]
    (daemon.root / f"snapshots/{number}/fs/deep/er").mkdir(parents=True)
    (daemon.root / f"snapshots/{number}/fs/deep/er/file").write_text("x")
    assert shell(daemon.mnt, f"rmdir {kind}/k").stderr == ""
    assert not os.path.lexists(path)
    assert not os.path.lexists(daemon.mnt / f"by-id/{number}")
    until(lambda: not os.path.exists(daemon.root / f"snapshots/{number}") and not os.listdir(daemon.root / "trash"))
    again = made(daemon.mnt, kind, "k")
    assert info(again)["id"] > number


@pytest.mark.parametrize("kind", KINDS)
def test_rmdir_of_a_parent(daemon: Daemon, kind: str) -> None:
    base = committed(daemon.mnt, "base")
    if kind == "committed":
        committed(daemon.mnt, "child", parent="base")
    else:
        os.mkdir(base / kind / "child")
    with refused(daemon, errno.ENOTEMPTY, "rmdir", "committed/base", rf'child "child" \({kind}\)'):
        os.rmdir(base)
    os.rmdir(daemon.mnt / kind / "child")
    os.rmdir(base)
    assert os.listdir(daemon.mnt / "committed") == []


def removed_as(path: Path, number: int, name: str = "user.snapfs.remove", seen: str = "") -> None:
    os.setxattr(path, name, f"{number} {seen or f'{path.parent.name}/{path.name}'}".encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_removed_by_its_id(daemon: Daemon, kind: str) -> None:
    """As by rmdir, but no other that has its name by then; the name is free when the call returns."""
    path = made(daemon.mnt, kind, "k")
    number = info(path)["id"]
    os.rename(path, daemon.mnt / kind / "other")
    path = made(daemon.mnt, kind, "k")
    with refused(daemon, errno.ENOENT, "setxattr", f"{kind}/k", f"snapshot {number} is not here any more"):
        removed_as(path, number)
    for value in range(1, 4):
        removed_as(path, info(path)["id"])
        assert not os.path.lexists(daemon.root / f"snapshots/{number + value}")
        path = made(daemon.mnt, kind, "k")
    other = daemon.mnt / kind / "other"
    with refused(
        daemon, errno.ENOENT, "setxattr", f"{kind}/other", 'snapshot "k" was committed or renamed a moment ago, to "other"'
    ):
        removed_as(other, number, seen=f"{kind}/k")
    removed_as(other, number)
    assert os.listdir(daemon.mnt / kind) == ["k"]


def test_what_was_committed_meanwhile_is_not_removed(daemon: Daemon) -> None:
    """Neither by who has its directory open, nor by who asked while it was being committed."""
    path = made(daemon.mnt, "active", "k")
    number, held = info(path)["id"], os.open(path, os.O_PATH)
    try:
        os.rename(path, daemon.mnt / "committed/v")
        with failing(errno.ENOENT):
            removed_as(Path(f"/proc/self/fd/{held}"), number, seen="active/k")
    finally:
        os.close(held)

    def moved(path: Path, new: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # the other was quicker
            os.rename(path, new)

    for serial in range(4):
        path, new = made(daemon.mnt, "active", "k"), daemon.mnt / f"committed/v{serial}"
        number = info(path)["id"]
        (path / "rootfs/precious").write_text("x")  # whoever has just followed the link is waited for
        moving = threading.Thread(target=moved, args=(path, new))
        moving.start()
        is_removed = False
        with contextlib.suppress(FileNotFoundError):
            removed_as(path, number)
            is_removed = True
        moving.join()
        assert new.exists() != is_removed


def test_what_is_not_removed_by_its_id(daemon: Daemon, tmp_path: Path) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/k")
    with refused(daemon, errno.ENOTEMPTY, "setxattr", "committed/base", r'child "k" \(active\)'):
        removed_as(base, info(base)["id"])
    (daemon.mnt / "active/k/labels/pin").write_text("yes")
    number = info(daemon.mnt / "active/k")["id"]
    with refused(daemon, errno.EPERM, "setxattr", "active/k", "has the label pin"):
        removed_as(daemon.mnt / "active/k", number)
    (daemon.mnt / "active/k/labels/pin").unlink()
    with mounted(daemon.mnt / "active/k", tmp_path / "m"), failing(errno.EBUSY):
        removed_as(daemon.mnt / "active/k", number)
    assert re.search(r" EBUSY setxattr active/k: .* is mounted", daemon.error_log()[-1])
    before, lines = listing(daemon.mnt), daemon.error_log()
    for path, name, value in (
        ("active/k", "user.other", number),
        ("active/k", "user.snapfs.remove", 0),
        ("active", "user.snapfs.remove", 0),
    ):
        with failing(errno.ENOTSUP):
            removed_as(daemon.mnt / path, value, name)
    assert (listing(daemon.mnt), daemon.error_log()) == (before, lines)
    for path in ("active/k/labels", "active/k/info.json", "active", "."):
        with failing(errno.ENOENT):
            removed_as(daemon.mnt / path, number)
    assert listing(daemon.mnt) == before


@pytest.mark.parametrize("path", ["active", "view", "committed", "by-id", "images", ".snapfs"])
def test_the_fixed_directories_stay(daemon: Daemon, path: str) -> None:
    with refused(daemon, errno.EPERM, "rmdir", path, "fixed"):
        os.rmdir(daemon.mnt / path)


@pytest.mark.parametrize("path", ["README", ".snapfs/version", ".snapfs/error_log"])
def test_the_daemons_files_stay(daemon: Daemon, path: str) -> None:
    with refused(daemon, errno.EPERM, "unlink", path, "only snapshots and labels"):
        os.unlink(daemon.mnt / path)


def test_an_id_link_stays(daemon: Daemon) -> None:
    number = info(made(daemon.mnt, "active", "a"))["id"]
    with refused(daemon, errno.EPERM, "unlink", f"by-id/{number}", "only snapshots and labels"):
        os.unlink(daemon.mnt / f"by-id/{number}")


@pytest.mark.parametrize("remover", REMOVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_rm_r_is_remove(daemon: Daemon, kind: str, remover: str) -> None:
    path = made(daemon.mnt, kind, "k")
    (path / "labels/one").write_text("1")
    keep = made(daemon.mnt, kind, "keep")
    before, number = os.listdir(keep), info(path)["id"]
    outside = Path(daemon.root, f"snapshots/{number}/fs/file")
    outside.write_text("not by following a link")
    done = shell(daemon.mnt, remover.format(f"{kind}/k"))
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(daemon.mnt / kind) == ["keep"]
    assert os.listdir(keep) == before
    assert sorted(os.listdir(made(daemon.mnt, kind, "k"))) == sorted(before), "a new one of that name has all entries"


def test_shutils_rmtree_is_remove(daemon: Daemon) -> None:
    for kind in KINDS:
        shutil.rmtree(made(daemon.mnt, kind, "k"))
        assert os.listdir(daemon.mnt / kind) == []


@pytest.mark.parametrize("remover", [*REMOVERS, "rmtree"])
@pytest.mark.parametrize("kind", KINDS)
def test_rm_r_touches_nothing_of_a_parent(daemon: Daemon, kind: str, remover: str) -> None:
    base = committed(daemon.mnt, "base", content="x")
    for label in ("one", "two"):
        (base / "labels" / label).write_text(label)
    if kind == "committed":
        committed(daemon.mnt, "child", parent="base")
    else:
        os.mkdir(base / kind / "child")
    before = listing(daemon.mnt)
    if remover == "rmtree":
        shutil.rmtree(base, ignore_errors=True)
    else:
        done = shell(daemon.mnt, remover.format("committed/base"))
        assert done.returncode == 1
        assert "Directory not empty" in done.stderr
    assert listing(daemon.mnt) == before
    assert (base / "diff/file").read_text() == "x"
    assert re.search(r' ENOTEMPTY (rmdir|unlink) committed/base.*child "child"', daemon.error_log()[-1])
    assert shell(daemon.mnt, "rm committed/base/labels/one").stderr == "", "someone else may delete just this"
    assert os.listdir(base / "labels") == ["two"]


def test_a_fixed_entry_that_was_unlinked_is_hidden_until_a_restart(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    snapshot = daemon.mnt / "active/k"
    os.mkdir(snapshot)
    all_of_it = os.listdir(snapshot)
    os.unlink(snapshot / "usage.json")
    os.unlink(snapshot / "diff")
    os.rmdir(snapshot / "labels")
    left = [name for name in all_of_it if name not in ("usage.json", "diff", "labels")]
    assert os.listdir(snapshot) == left
    for name in ("usage.json", "diff", "labels"):
        assert not os.path.lexists(snapshot / name)
    os.rename(snapshot, daemon.mnt / "active/renamed")
    assert os.listdir(daemon.mnt / "active/renamed") == left
    os.mkdir(daemon.mnt / "active/other")
    assert os.listdir(daemon.mnt / "active/other") == all_of_it
    assert daemon.stop() == 0
    daemon.start()
    assert os.listdir(daemon.mnt / "active/renamed") == all_of_it
    assert Path(daemon.mnt / "active/renamed/diff").is_dir()
    assert daemon.stop() == 0


def test_labels_of_others_are_not_emptied_by_rmdir(daemon: Daemon) -> None:
    snapshot = made(daemon.mnt, "active", "k")
    (snapshot / "labels/one").write_text("1")
    with refused(daemon, errno.ENOTEMPTY, "rmdir", "active/k/labels", "not empty"):
        os.rmdir(snapshot / "labels")


# -- what nobody may do

NODES = [
    "active",
    "committed/base",
    "committed/base/active",
    "active/a",
    "active/a/info.json",
    "active/a/mount.sh",
    "active/a/labels",
    "by-id",
    "images",
    "README",
    ".nomedia",
    ".snapfs",
    ".snapfs/version",
]

ATTRIBUTE_CALLS: dict[str, Callable[[Path], None]] = {
    "utimens": lambda path: os.utime(path, (1, 1)),
    "utimens to now": lambda path: os.utime(path),
    "chmod": lambda path: os.chmod(path, 0o700),
    "chown": lambda path: os.chown(path, 65534, -1),
    "chgrp": lambda path: os.chown(path, -1, 65534),
}


@pytest.fixture
def two(daemon: Daemon) -> Daemon:
    return with_two(daemon)


def with_two(daemon: Daemon) -> Daemon:
    """A daemon with an active snapshot that has a label, and a committed one."""
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/l").write_text("1")
    return daemon


@pytest.mark.parametrize("node", [*NODES, "active/a/labels/l"])
@pytest.mark.parametrize("call", ATTRIBUTE_CALLS)
def test_attributes_cannot_be_set(two: Daemon, call: str, node: str) -> None:
    with refused(two, errno.EPERM, "setattr", node, "can't be set"):
        ATTRIBUTE_CALLS[call](two.mnt / node)


def test_attributes_of_the_mount_itself(two: Daemon) -> None:
    with refused(two, errno.EPERM, "setattr", "/", "can't be set"):
        os.chmod(two.mnt, 0o700)


CREATIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "open": ("create", lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY))),
    "mkfifo": ("mknod", os.mkfifo),
    "mknod": ("mknod", lambda path: os.mknod(path, stat.S_IFREG | 0o600)),
    "whiteout": ("mknod", lambda path: os.mknod(path, stat.S_IFCHR, 0)),
    "symlink": ("symlink", lambda path: os.symlink("target", path)),
}


@pytest.mark.parametrize("door", [".", "active", "view", "committed", "committed/base/active", "active/a", "by-id", ".snapfs"])
@pytest.mark.parametrize("call", CREATIONS)
def test_nothing_else_can_be_created(two: Daemon, call: str, door: str) -> None:
    operation, create = CREATIONS[call]
    with refused(two, errno.EPERM, operation, os.path.normpath(f"{door}/x"), "made"):
        create(two.mnt / door / "x")


@pytest.mark.parametrize("call", sorted(set(CREATIONS) - {"open"}))
def test_a_label_is_a_file_and_nothing_else(two: Daemon, call: str) -> None:
    operation, create = CREATIONS[call]
    with refused(two, errno.EPERM, operation, "active/a/labels/x", "made"):
        create(two.mnt / "active/a/labels/x")


def test_no_hard_links(two: Daemon) -> None:
    with refused(two, errno.EPERM, "link", "active/a/labels/l active/a/labels/m", "a link can't be made"):
        os.link(two.mnt / "active/a/labels/l", two.mnt / "active/a/labels/m")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND])
@pytest.mark.parametrize("path", ["active/a/info.json", "active/a/mount.sh", "committed/base/usage.json", "README"])
def test_what_is_computed_cannot_be_written(two: Daemon, path: str, flags: int) -> None:
    with refused(two, errno.EPERM, "(open|setattr)", path, "can't be (written|changed)"):
        os.close(os.open(two.mnt / path, flags))


def test_what_is_computed_cannot_be_truncated(two: Daemon) -> None:
    with refused(two, errno.EPERM, "setattr", "active/a/info.json", "can't be changed"):
        os.truncate(two.mnt / "active/a/info.json", 0)


# -- fsync, statfs


@pytest.mark.durable
@pytest.mark.parametrize("node", [node for node in NODES if not node.endswith(("json", "sh", "README", ".nomedia", "version"))])
def test_fsync_of_any_directory(make_daemon: Callable[..., Daemon], node: str) -> None:
    two = with_two(make_daemon().start())
    lines = two.error_log()
    fd = os.open(two.mnt / node, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    assert shell(two.mnt, f"sync {node}").stderr == ""
    assert two.error_log() == lines


def test_statfs_is_that_of_the_file_system_that_holds_the_root(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m,nr_inodes=3000", "none", str(disk)], check=True)
    try:
        daemon = make_daemon(root=disk / "root").start()
        until(lambda: len(os.listdir(disk / "root/pool")) == POOL_LEAST)
        os.mkdir(daemon.mnt / "active/a")
        for size in (0, 1 << 20):
            (daemon.mnt / "active/a/diff/file").write_bytes(bytes(size))
            below, here = os.statvfs(disk), os.statvfs(daemon.mnt / "active/a")
            fields = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")
            assert [getattr(here, field) for field in fields] == [getattr(below, field) for field in fields]
            numbers = [shell(daemon.mnt, f"df -k --output=size,used,avail,pcent {where}").stdout for where in (".", str(disk))]
            assert numbers[0] == numbers[1]
        assert here.f_blocks * here.f_frsize == 7 << 20
        assert daemon.stop() == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- ls -l, stat, du


@pytest.mark.parametrize("kind", KINDS)
def test_the_times_are_those_of_the_record(daemon: Daemon, kind: str) -> None:
    path = made(daemon.mnt, kind, "k")
    seen = set()
    for value in ("", "one", "two"):
        if value:
            (path / "labels/l").write_text(value)
        updated = nanoseconds(info(path)["updated"])
        for node in (path, path / "info.json", path / "usage.json", path / "labels"):
            now = os.stat(node)
            assert (now.st_mtime_ns, now.st_ctime_ns) == (updated, updated), node
        seen.add(updated)
    assert len(seen) == 3
    assert nanoseconds(info(path)["created"]) < max(seen)
    shown = shell(daemon.mnt, f"stat -c %.9Y:%.9Z {kind}/k").stdout.strip()
    assert shown == ":".join([f"{max(seen) // 10**9}.{max(seen) % 10**9:09d}"] * 2)


@pytest.mark.parametrize("directory", ["active", "by-id"])
def test_a_directorys_time_moves_when_what_it_lists_changes(daemon: Daemon, directory: str) -> None:
    times = [os.stat(daemon.mnt / directory).st_mtime_ns]
    os.mkdir(daemon.mnt / "active/a")
    times.append(os.stat(daemon.mnt / directory).st_mtime_ns)
    os.rename(daemon.mnt / "active/a", daemon.mnt / "active/b")
    times.append(os.stat(daemon.mnt / directory).st_mtime_ns)
    os.rmdir(daemon.mnt / "active/b")
    times.append(os.stat(daemon.mnt / directory).st_mtime_ns)
    assert times == sorted(set(times))


def fill(directory: Path) -> int:
    """Put files, directories and hard links into ``directory``; what it takes in bytes after that."""
    directory = directory.resolve()
    for outer in range(20):
        (directory / str(outer)).mkdir()
        for inner in range(60):
            (directory / str(outer) / str(inner)).write_bytes(b"x" * (inner * 700))
    os.link(directory / "1/59", directory / "again")
    subprocess.run(["sync", "-f", str(directory)], check=True)  # some file systems allocate late
    sizes = {}
    for where, _, files in os.walk(directory):
        for path in (where, *(f"{where}/{name}" for name in files)):
            entry = os.lstat(path)
            sizes[entry.st_ino] = entry.st_blocks * 512
    return sum(sizes.values())


def test_du_and_ls_tell_the_truth_right_after_mv(daemon: Daemon) -> None:
    os.mkdir(daemon.mnt / "active/big")
    taken = fill(daemon.mnt / "active/big/diff")
    assert os.stat(daemon.mnt / "active/big").st_blocks * 512 < taken, "last known: nobody has looked yet"
    os.rename(daemon.mnt / "active/big", daemon.mnt / "committed/big")
    assert os.stat(daemon.mnt / "committed/big").st_blocks * 512 == taken
    assert usage(daemon.mnt / "committed/big") == {"inodes": 20 + 20 * 60 + 1, "size": taken, "shared": 0}
    assert shell(daemon.mnt, "du -s --block-size=1 committed/big").stdout.split()[0] == str(taken)
    assert shell(daemon.mnt, "ls -ls --block-size=1 committed").stdout.splitlines()[1].split()[0] == str(taken)


@pytest.mark.parametrize(
    "command", ["du -s --block-size=512 committed/big", "ls -s --block-size=512 committed", "busybox du -s"]
)
def test_the_very_first_question_after_mv_is_answered_right(daemon: Daemon, command: str) -> None:
    os.mkdir(daemon.mnt / "active/big")
    taken = fill(daemon.mnt / "active/big/diff")
    busybox = command.startswith("busybox")
    done = shell(daemon.mnt, f"mv active/big committed/big && {command}{' committed/big' if busybox else ''}")
    assert done.stdout.split()[2 if command.startswith("ls") else 0] == str(taken // (1024 if busybox else 512))


def test_an_active_snapshots_blocks_are_the_last_known(daemon: Daemon) -> None:
    path = made(daemon.mnt, "active", "k")
    assert os.stat(path).st_blocks * 512 == usage(path)["size"] == os.stat(path / "diff").st_blocks * 512
    taken = fill(path / "diff")
    assert usage(path)["size"] == taken
    assert os.stat(path).st_blocks * 512 == taken, "known by now"
    assert shell(daemon.mnt, "du -s --block-size=1 active/k").stdout.split()[0] == str(taken)


def test_a_view_takes_nothing(daemon: Daemon) -> None:
    path = made(daemon.mnt, "view", "k")
    assert usage(path) == {"inodes": 0, "size": 0, "shared": 0}
    assert os.stat(path).st_blocks == 0


def test_du_of_the_whole_tree_counts_each_layer_once(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base", content="x" * 100_000)
    os.mkdir(base / "active/web")
    committed(daemon.mnt, "v1", parent="base", content="y" * 50_000)
    layers = [usage(daemon.mnt / path)["size"] for path in ("committed/base", "committed/v1", "active/web")]
    assert shell(daemon.mnt, "du -s --block-size=1 .").stdout.split()[0] == str(sum(layers))


# -- where the links lead


def test_childrens_links_and_ids(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/a b")
    os.mkdir(base / "view/v%2F1")
    committed(daemon.mnt, "c", parent="base")
    for kind, name in (("active", "a b"), ("view", "v%2F1"), ("committed", "c")):
        target = f"../../../{kind}/{name}"
        assert os.listdir(base / kind) == [name]
        assert os.readlink(base / kind / name) == target
        assert os.lstat(base / kind / name).st_size == len(target)
        real = daemon.mnt / kind / name
        assert os.path.realpath(base / kind / name) == str(real)
        number = info(real)["id"]
        assert os.readlink(daemon.mnt / f"by-id/{number}") == f"../{kind}/{name}"
        assert os.path.samefile(daemon.mnt / f"by-id/{number}", real)
        assert os.path.isdir(daemon.root / f"snapshots/{number}/fs")
    assert sorted(os.listdir(daemon.mnt / "by-id"), key=int) == os.listdir(daemon.mnt / "by-id")
    assert len(os.listdir(daemon.mnt / "by-id")) == 4
    assert shell(daemon.mnt, "find . -name info.json | wc -l").stdout.strip() == "4", "nothing is met twice"


@pytest.mark.parametrize("name", ["0", "01", "x", "999999999", "-1", "1 ", "99999999999999999999"])
def test_what_is_no_id(daemon: Daemon, name: str) -> None:
    os.mkdir(daemon.mnt / "active/a")
    assert not os.path.lexists(daemon.mnt / "by-id" / name)


def test_by_id_follows_commit_rename_and_removal(daemon: Daemon) -> None:
    os.mkdir(daemon.mnt / "active/a")
    link = daemon.mnt / f"by-id/{info(daemon.mnt / 'active/a')['id']}"
    assert os.readlink(link) == "../active/a"
    os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/c")
    assert os.readlink(link) == "../committed/c"
    os.rename(daemon.mnt / "committed/c", daemon.mnt / "committed/d")
    assert os.readlink(link) == "../committed/d"
    assert os.lstat(link).st_size == len("../committed/d")
    os.rmdir(daemon.mnt / "committed/d")
    assert not os.path.lexists(link)


def test_diff_is_the_real_directory(daemon: Daemon) -> None:
    path = made(daemon.mnt, "active", "a")
    assert os.readlink(path / "diff") == f"{daemon.root}/snapshots/{info(path)['id']}/fs"
    assert not os.path.lexists(made(daemon.mnt, "view", "v") / "diff")


def test_what_is_listed_of_each_kind(daemon: Daemon) -> None:
    assert sorted(os.listdir(daemon.mnt)) == sorted([*KINDS, "images", "README", "by-id", ".snapfs", ".nomedia"])
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/a")
    os.mkdir(base / "view/v")
    record = ["info.json", "labels", "usage.json", "compare"]
    expected = {
        "active/a": [*record, "diff", "mount.sh", "mounts.json", "parent", "checkpoint", "rollback", "fork", "history"],
        "view/v": [*record, "mount.sh", "mounts.json", "parent"],
        "committed/base": [*record, "diff", *KINDS, "squash", "dissolve"],
    }
    for path, entries in expected.items():
        listed = set(os.listdir(daemon.mnt / path)) - {"changes", "changes.patch", "layer.tar", "rootfs"}
        assert listed == set(entries)
        assert all(os.path.lexists(daemon.mnt / path / name) for name in entries)


# -- long listings and many clients


def test_a_listing_goes_on_while_entries_come_and_go(daemon: Daemon) -> None:
    names = [f"{number:03d}-{'x' * 100}" for number in range(300)]
    for name in names:
        os.mkdir(daemon.mnt / "active" / name)
    assert os.listdir(daemon.mnt / "active") == names
    with os.scandir(daemon.mnt / "active") as entries:
        seen = [next(entries).name]
        for name in names[::3]:
            os.rmdir(daemon.mnt / "active" / name)
        os.mkdir(daemon.mnt / "active/later")
        seen += [entry.name for entry in entries]
    stayed = [name for name in names if name not in names[::3]]
    assert len(seen) == len(set(seen))
    assert [name for name in seen if name in set(stayed)] == stayed
    assert os.listdir(daemon.mnt / "active") == [*stayed, "later"]


def test_many_who_want_one_key(daemon: Daemon) -> None:
    command = 'for i in $(seq 50); do mkdir "$0/k$i" 2>/dev/null && echo "$i"; done'
    doors = [str(daemon.mnt / "active"), str(daemon.mnt / "view")] * 2
    racers = [subprocess.Popen(["sh", "-c", command, door], stdout=subprocess.PIPE, text=True) for door in doors]
    won = [number for racer in racers for number in racer.communicate(timeout=60)[0].split()]
    assert sorted(won, key=int) == [str(number) for number in range(1, 51)]
    assert len(os.listdir(daemon.mnt / "active")) + len(os.listdir(daemon.mnt / "view")) == 50


# -- what is damaged


def test_a_layer_that_is_missing_on_disk(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    base = committed(daemon.mnt, "base", content="x")
    os.mkdir(base / "active/web")
    (base / "labels/l").write_text("1")
    number = info(base)["id"]
    assert daemon.stop() == 0
    shutil.rmtree(daemon.root / f"snapshots/{number}")
    daemon.start()
    for path, operation in (("active/web/mounts.json", "open"), ("active/web/mount.sh", "open")):
        with failing(errno.EIO):
            (daemon.mnt / path).read_text()
        assert re.search(rf" EIO {operation} {path}: .*snapshots/{number} is missing", daemon.error_log()[-1])
    with failing(errno.EIO):
        os.mkdir(base / "view/peek")
    assert re.search(rf" EIO mkdir committed/base/view/peek: .*snapshots/{number} is missing", daemon.error_log()[-1])
    assert {"mounts.json", "info.json"} <= set(os.listdir(daemon.mnt / "active/web")), "what is there is listed"
    assert os.stat(daemon.mnt / "active/web/mounts.json").st_size > 0
    assert info(base)["labels"] == {"l": "1"}
    assert info(daemon.mnt / "active/web")["parent"] == "base"
    assert shell(daemon.mnt, "rm -r active/web committed/base").stderr == ""
    assert os.listdir(daemon.mnt / "committed") == []
    assert daemon.stop() == 0
