"""Mounts in all mount namespaces, by the kernel's lists and by /proc; and mounts in their shelters, on kernels old and new."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from snapfs import open_snapshotter
from snapfs.errors import Busy
from snapfs.kernel import cached, mountapi, mounting, namespaces, overlay, shelter
from snapfs.kernel.mounttable import MountPoint, mount_table
from snapfs.kernel.namespaces import Namespaces, sees_mount, shares_mount_namespace
from tests.processes import die_with_parent, own_descriptors
from tests.users import Identity, alice

pytestmark = [pytest.mark.mounts, pytest.mark.alone]  # other tests have namespaces, too

Put = Callable[[str, str], None]


@contextmanager
def namespace_with(script: str, *flags: str, who: Identity = ()) -> Iterator[int]:
    """A process in a mount namespace of its own, in which ``script`` has been run; its pid."""
    command = [*who, "unshare", "-m", *flags, "sh", "-ec", f"{script}\necho ready; read line"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.kill()


def below(directory: Path) -> Namespaces[MountPoint]:
    return Namespaces(lambda mount: mount if mount.target.startswith(f"{directory}/") else None)


def everything(mount: MountPoint) -> bool:
    return True


@pytest.mark.parametrize("lists", [True, False])
def test_mounts_of_another_namespace_are_found(tmp_path: Path, lists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (target := tmp_path / "t\n,x").mkdir()
    found = below(tmp_path)
    found._lists = lists
    assert found.find(everything) == []
    with namespace_with(f"mount -t tmpfs -o ro none '{target}'") as pid:
        (mount,) = found.find(everything)
        assert (mount.target, mount.type, mount.root, mount.options[0]) == (str(target), "tmpfs", "/", "ro")
        assert [(who, each.target) for who, each in found.by_process(everything)] == [(pid, str(target))]
        assert not shares_mount_namespace(pid)
        assert sees_mount(pid, str(target))
        assert not sees_mount(os.getpid(), str(target))
        subprocess.run(["nsenter", "-m", "-t", str(pid), "mount", "-o", "remount,bind,rw", str(target)], check=True)
        (mount,) = found.find(everything)
        assert mount.options[0] == "rw", "what may change is asked each time"
        if found._lists:  # the kernel may allow none here
            monkeypatch.setattr(found, "_stat", None)
            assert found.scan(everything, settled=everything) == ([replace(mount, options=("ro",))], True)
            monkeypatch.undo()
    assert found.find(everything) == []


def test_both_ways_tell_the_same_of_this_namespace() -> None:
    def told(lists: bool) -> set[tuple[str, str, str, str]]:
        found = Namespaces(lambda mount: mount)
        found._lists = lists
        return {(mount.device, mount.root, mount.target, mount.type) for mount in found.find(everything)}

    own = {(mount.device, mount.root, mount.target, mount.type) for mount in mount_table()}
    assert own <= told(True)
    assert own <= told(False)


@pytest.mark.parametrize("lists", [True, False])
def test_no_more_is_read_of_another_users_namespaces_than_is_bearable(
    tmp_path: Path, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def classify(mount: MountPoint) -> MountPoint | None:
        asked.append(mount.target)
        return mount if mount.foreign and mount.target in ours else None  # others on this machine have namespaces, too

    found = Namespaces(classify)
    found._lists = lists
    names = [f"{number:0200}" for number in range(400)]
    ours = {f"/mnt/{name}" for name in names}
    many = "mount -t tmpfs x /mnt; cd /mnt; mkdir " + " ".join(names)
    with namespace_with(f"{many}; for d in *; do mount --bind $d $d; done", "-Ur", who=alice):
        mounts, whole = found.scan(everything)
        there = {mount.target for mount in mounts}
        assert whole
        assert ours == there
        monkeypatch.setattr(namespaces, "MOST", 300)
        monkeypatch.setattr(namespaces, "_MOST_BYTES", 50_000)
        asked.clear()
        assert found.scan(everything) == ([], False)
        assert not ours & set(asked)
        monkeypatch.undo()
        for bound in ("EACH", "ALL"):
            monkeypatch.setattr(namespaces, bound, 0)
            assert found.scan(everything) == ([], False)
            monkeypatch.undo()
        assert found.scan(everything)[1], "what was left out is read again"
    assert found.scan(everything) == ([], True)


def test_a_namespace_of_the_same_user_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "MOST", 0)
    found = Namespaces(lambda mount: mount if mount.target == "/mnt" else None)
    with namespace_with("mount -t tmpfs x /mnt", "-Ur"):
        mounts, _ = found.scan(everything)  # whole only where no other user has one
        assert [mount.foreign for mount in mounts] == [False]


def test_more_layers_than_fit_into_a_buffer(tmp_path: Path) -> None:
    """What the kernel says of one mount may be longer than any fixed buffer."""
    names = [tmp_path / f"{number:0200}" for number in range(400)]
    for name in names:
        name.mkdir()
    (target := tmp_path / "t").mkdir()
    overlay.mount_overlay(str(target), [str(name) for name in names], None, None, [], read_only=True)
    try:
        (mount,) = below(tmp_path).find(everything)
        assert sum(option.startswith("lowerdir+=") for option in mount.super_options) == 400
    finally:
        mounting.unmount(str(target))


# -- shelters


def by_the_mount_api(source: str, directory: str) -> None:
    shelter.attach(mounting.make_bind(source, read_only=False), directory)


def by_mount_2(source: str, directory: str) -> None:
    shelter.attach_classic(lambda target: mounting.mount_bind_classic(source, target, read_only=False), directory)


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that neither mounts onto what is detached nor copies it: before Linux 6.15."""
    move_mount = mountapi.move_mount

    def refuse(tree: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def move(tree: int, target: str) -> None:
        if re.fullmatch(r"/proc/self/fd/\d+/fs", target):  # in a shelter that is attached nowhere yet
            refuse(tree)
        move_mount(tree, target)

    monkeypatch.setattr(mountapi, "move_mount", move)
    monkeypatch.setattr(mountapi, "copy_tree", refuse)


@pytest.mark.parametrize("put", [by_the_mount_api, by_mount_2])
@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_shelter_hides_the_mountpoint(tmp_path: Path, request: pytest.FixtureRequest, put: Put, kernel: str) -> None:
    if kernel == "old":
        request.getfixturevalue("old_kernel")
    source, directory = tmp_path / "source", tmp_path / "1"
    (source / "sub").mkdir(parents=True)
    directory.mkdir()
    before = sorted(own_descriptors())
    with namespace_with("true") as stray:
        put(str(source), str(directory))
        try:
            assert os.listdir(directory) == ["fs"]
            assert os.listdir(directory / "fs") == ["sub"]
            (directory / "fs/new").touch()
            for refused in ("other", "fs2"):
                with pytest.raises(OSError, match="Read-only"):
                    (directory / refused).mkdir()
            assert not sees_mount(stray, str(directory / "fs"))
            there = subprocess.run(
                ["nsenter", "-m", "-t", str(stray), "ls", str(directory / "fs")], capture_output=True, check=False
            )
            assert b"No such file" in there.stderr
        finally:
            shelter.remove(str(directory))
    assert os.listdir(directory) == []
    shelter.remove(str(directory))  # of nothing
    assert sorted(own_descriptors()) == before


@pytest.mark.parametrize("put", [by_the_mount_api, by_mount_2])
def test_what_can_not_be_mounted_leaves_no_shelter(tmp_path: Path, put: Put) -> None:
    (tmp_path / "1").mkdir()
    before = sorted(own_descriptors())
    with pytest.raises(FileNotFoundError):
        put(str(tmp_path / "missing"), str(tmp_path / "1"))
    assert [mount for mount in mount_table() if mount.target.startswith(str(tmp_path))] == []
    assert sorted(own_descriptors()) == before


@pytest.mark.usefixtures("old_kernel")
async def test_an_old_kernel_mounts_again_what_another_namespace_has(root: Path) -> None:
    """The detached copy itself, of which it makes no copies."""
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("b")
        await snapshotter.commit("base", "b")
        await snapshotter.prepare("web", "base")
        where = await snapshotter.mount("web")
        device = os.stat(where).st_dev
        with namespace_with("true"):
            for _ in range(2):
                with pytest.raises(Busy, match="in another mount namespace"):
                    await snapshotter.commit("v1", "web")
                assert os.stat(where).st_dev == device
        await snapshotter.commit("v1", "web")
    assert [mount for mount in mount_table() if mount.target.startswith(str(root))] == []


def test_a_directory_in_the_kernels_memory_is_found_while_others_mount_and_unmount(tmp_path: Path) -> None:
    """The kernel says then now and then that it would have to read the disk."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    (target := tmp_path / "t").mkdir()
    is_over = threading.Event()

    def mount_and_unmount() -> None:
        while not is_over.is_set():
            mounting.mount("none", str(target), "tmpfs", 0, "size=4k")
            mounting.unmount(str(target), mounting.MNT_DETACH)

    top = os.open("/", os.O_PATH)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(mount_and_unmount)
        try:
            for _ in range(3000):
                os.close(cached.open_directory(top, f"{tmp_path}/a/b/c".lstrip("/")))
        finally:
            is_over.set()
            os.close(top)
        ended.result()
