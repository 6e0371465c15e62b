"""Commands that a sentence advises, about names in which a shell would read something: each name is one word, and nothing of it
runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs import Damaged, open_snapshotter
from snapfs.cli import verb
from snapfs.errors import SnapshotError
from snapfs.kernel import mounting
from snapfs.labels import pinned
from snapfs.names import last_word, word
from snapfs.offline.checking import check
from snapfs.root import trash, unflushed
from snapfs.services import flushing
from tests.command import Command
from tests.daemon import Daemon, refusal
from tests.tree import committed, remove_all, shell

Make = Callable[..., Daemon]

HOSTILE = '$(>PWNED) `>PWNED` "a\'b";>PWNED'
"""A key that makes the file PWNED where a shell reads it, also where it is but in quotation marks; its own file name."""


def words(sentence: str, command: str, directory: Path) -> list[str]:
    """The words of ``sentence`` from where it advises ``command``, as a shell reads them, which must run nothing but that
    (``directory`` is empty)."""
    before, advised = sentence.split(f"{command} ", 1)
    advised = f"{command} {advised}".strip().removesuffix(")" if before.endswith("(") else "")
    end = next(end for end in range(len(advised), 0, -1) if reads(advised[:end]) is not None)
    subprocess.run(["sh", "-c", f": {advised[:end]}"], cwd=directory, stderr=subprocess.DEVNULL, check=False, timeout=30)
    assert os.listdir(directory) == [], f"{advised} runs something"
    return shlex.split(advised[:end])


def reads(text: str) -> list[str] | None:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation that doesn't end
        return None


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture(scope="module")
def hostile(module_daemon: Daemon) -> Iterator[Daemon]:
    """A tree with a committed, pinned snapshot HOSTILE, and an active one on it called so, but for a ``w``."""
    base = committed(module_daemon.mnt, HOSTILE)
    os.mkdir(base / f"active/w{HOSTILE}")
    yield module_daemon
    remove_all(module_daemon.mnt)


def test_a_word() -> None:
    assert word("v1.2_a-b:c@d/e%20") == "v1.2_a-b:c@d/e%20"
    assert shlex.split(f"x {word(HOSTILE)}") == ["x", HOSTILE]
    assert word("a\x1b\u202e\n") == "a%1B%E2%80%AE%0A"
    assert last_word("v1") == "v1"
    assert shlex.split(f"x {last_word('-a b')}") == ["x", "--", "-a b"]


@pytest.mark.parametrize("key", [HOSTILE, "-rf", "--delete", "- x", "plain"])
def test_the_command_takes_the_name_as_it_is(key: str, empty: Path) -> None:
    advised = words(str(pinned(key)), "snapfs label", empty)
    given = verb("label").parse(advised[2:])
    assert given.arguments == [key]
    assert given.all("delete") == ["pin"]


def test_by_the_command(hostile: Daemon, empty: Path, tmp_path: Path) -> None:
    snapfs, key = Command(hostile.mnt), f"w{HOSTILE}"
    assert words(snapfs("mount", HOSTILE, str(empty), status=1), "snapfs view", empty)[-1] == HOSTILE
    assert words(snapfs("label", key, "--delete", "none", status=3), "snapfs label", empty)[2] == key
    target = tmp_path / HOSTILE
    assert words(snapfs("mount", key, str(target), status=1), "mkdir", empty) == ["mkdir", str(target)]
    target.mkdir()
    snapfs("mount", key, str(target))
    try:
        assert words(snapfs("rollback", key, status=5), "snapfs umount", empty)[2] == key
        mounting.mount("none", str(target), "tmpfs", 0, "size=1m")
        try:
            assert words(snapfs("umount", str(target), status=5), "umount", empty)[1] == str(target)
        finally:
            mounting.unmount(str(target))
    finally:
        snapfs("umount", str(target))
    snapfs("label", key, "pin=yes")
    try:
        assert words(snapfs("rm", key, status=6), "snapfs label", empty)[-1] == key
        assert words(snapfs("rollback", key, status=6), "snapfs label", empty)[-1] == key
    finally:
        snapfs("label", key, "--delete", "pin")


def test_by_the_tree(hostile: Daemon, empty: Path) -> None:
    mnt, active, base = hostile.mnt, f"active/w{HOSTILE}", f"committed/{HOSTILE}"
    for command, advised, expected in (
        (f"touch {word(f'{base}/f')}", "mkdir", f"{base}/active/K,"),
        (f"touch {word(f'{base}/active/f')}", "mkdir", f"{base}/active/K,"),
        (f"rm {word(f'{base}/{active}')}", "rmdir", active),
    ):
        assert shell(mnt, command).returncode != 0
        line = hostile.error_log()[-1].partition(": ")[2].replace("to remove that, ", "")
        assert words(line, advised, empty)[1] == expected, line
    assert shell(mnt, f"touch {word(f'{active}/f')}").returncode != 0
    assert hostile.error_log()[-1].endswith(f"write into {word(f'{active}/rootfs/')}")
    copied = Path("/dev/shm/snapfs-copied")
    try:
        assert shell(mnt, f"mv {word(active)} {copied}").returncode != 0
    finally:
        shutil.rmtree(copied, ignore_errors=True)
    line = next(line for line in hostile.error_log() if "cp -a" in line).partition("lost: ")[2]
    assert words(line, "cp -a", empty)[2] == f"{active}/rootfs/."
    assert words(line, "rmdir", empty)[1] == active


def test_without_rootfs(make_daemon: Make, empty: Path) -> None:
    daemon = make_daemon("--no-rootfs").start()
    base = committed(daemon.mnt, HOSTILE)
    os.mkdir(base / f"active/w{HOSTILE}")
    for path, command, expected in (
        (f"active/w{HOSTILE}/rootfs", "sh", f"active/w{HOSTILE}/mount.sh"),
        (f"committed/{HOSTILE}/rootfs", "mkdir", f"committed/{HOSTILE}/view/K"),
    ):
        assert not os.path.exists(daemon.mnt / path)
        assert words(daemon.error_log()[-1].partition("elsewhere: ")[2], command, empty)[1] == expected


@pytest.mark.mounts
async def test_what_was_not_flushed(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / HOSTILE

    async def nothing(*_: object) -> None:
        pass

    def refuse(*_: object) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(flushing.Flushing, "finish", nothing)
        patch.setattr(mounting, "sync_file_system", refuse)
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("a")
            await snapshotter.commit(HOSTILE, "a", wait=False)
    monkeypatch.setattr(unflushed, "boot_id", lambda: "the next boot")
    (found,) = [each.remedy for each in check(str(root)) if "--accept" in str(each.remedy)]
    assert words(found, "--accept", empty)[1] == f"{HOSTILE},"
    async with open_snapshotter(root) as snapshotter:
        with pytest.raises(Damaged) as caught:
            await snapshotter.prepare("on", HOSTILE)
    assert words(str(caught.value), "snapfs check", empty) == ["snapfs", "check", str(root), "--accept", HOSTILE]


async def test_a_root_without_records(tmp_path: Path, empty: Path) -> None:
    root = tmp_path / HOSTILE
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
    (root / "metadata.mdb").unlink()
    with pytest.raises(SnapshotError) as caught:
        async with open_snapshotter(root):
            pass
    assert words(str(caught.value), "snapfs check", empty) == ["snapfs", "check", str(root), "--rebuild"]


def test_a_mountpoint(tmp_path: Path, empty: Path) -> None:
    assert words(refusal(tmp_path / "root", tmp_path / HOSTILE), "mkdir", empty) == ["mkdir", str(tmp_path / HOSTILE)]


def test_files_that_cant_be_deleted(empty: Path) -> None:
    said = trash.why_undeletable(PermissionError(1, "no", f"/nowhere/{HOSTILE}"))
    assert words(said, "rm -rf", empty) == ["rm", "-rf", f"/nowhere/{HOSTILE}"]
