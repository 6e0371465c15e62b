"""A copy of a layer that is in use: exact, of one moment, whatever happens meanwhile; and checkpoints that are copies, at all
doors."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from snapfs import Options, Snapshotter, open_snapshotter
from snapfs.applying.entries import Held
from snapfs.cli import ending, main
from snapfs.cli.place import MountedTree
from snapfs.errors import NotFound, TryAgain, Unavailable
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.kernel import freezing, mounting
from snapfs.model import Info
from snapfs.options import Sync
from snapfs.scan import layercopy
from snapfs.scan.copying import attributes_of, copy_data
from snapfs.scan.layercopy import LayerCopy
from snapfs.services.shifting import Shifting
from snapfs.snapshotter import _held_still
from tests.command import SNAPFS, Command, OnATerminal
from tests.daemon import Daemon
from tests.disk import loop_device, make_file_system, mounted
from tests.processes import die_with_parent, until
from tests.refusals import failing
from tests.rootfs import somebody, stats
from tests.trees import everything

Act = Callable[[Path], object]

# -- a layer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A layer with one of everything."""
    top = tmp_path / "source"
    (top / "d/e/f").mkdir(parents=True)
    (top / "other").mkdir()
    (top / "d/file").write_text("old")
    (top / "d/e/f/deep").write_bytes(os.urandom(100_000))
    (top / "d/token").write_text("token")
    (top / "other/keep").write_text("keep")
    os.symlink("../nowhere", top / "d/link")
    os.link(top / "d/e/f/deep", top / "other/hard")
    with open(top / "sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    if os.geteuid() == 0:
        os.mknod(top / "d/whiteout", stat.S_IFCHR, 0)
        os.mknod(top / "d/device", stat.S_IFBLK | 0o640, os.makedev(7, 99))
        os.chown(top / "d/file", 1234, 5678)
        os.chown(top / "d/link", 12, 34, follow_symlinks=False)
        for path, name in (("d/e", "opaque"), ("d/link", "origin")):
            os.setxattr(top / path, f"trusted.overlay.{name}", b"y", follow_symlinks=False)
    os.mkfifo(top / "d/fifo")
    os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
    (top / "d/suid").write_text("x")
    (top / "d/suid").chmod(0o4755)
    (top / "d/e").chmod(0o3771)
    os.setxattr(top / "d/file", "user.note", b"\0x")
    os.utime(top / "d/file", ns=(1, 2))
    os.utime(top / "d/e", ns=(3, 4))
    os.utime(top / "d/link", ns=(5, 6), follow_symlinks=False)
    return top


@pytest.fixture
def copy_of(tmp_path: Path, source: Path) -> Callable[..., LayerCopy]:
    def made(**arguments: Callable[[], None]) -> LayerCopy:
        for name in ("target", "stale"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
        target, stale = str(tmp_path / "target"), str(tmp_path / "stale")
        return LayerCopy(str(source), target, stale, **{"flush": os.sync, **arguments})

    return made


def target_of(copy: LayerCopy) -> Path:
    return Path(copy.target)


@pytest.mark.mounts
def test_it_is_the_same(source: Path, copy_of: Callable[..., LayerCopy]) -> None:
    copy = copy_of()
    copy.complete()
    assert everything(target_of(copy)) == everything(source)
    assert os.stat(target_of(copy) / "sparse").st_blocks == os.stat(source / "sparse").st_blocks
    assert os.listdir(copy.stale) == []


def _exchange(top: Path) -> None:
    """Another directory with the name, whose files are older than all."""
    os.rename(top / "other", top / "x")
    os.rename(top / "d/e", top / "other")


def sh(top: Path, script: str) -> None:
    subprocess.run(["sh", "-ec", script], cwd=top, check=True)


def _mapped(top: Path) -> None:
    with open(top / "d/file", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:3] = b"map"


ACTS: dict[str, Act] = {
    "a file moves": lambda top: os.rename(top / "d/token", top / "other/token"),
    "and back": lambda top: os.rename(top / "other/keep", top / "d/keep"),
    "a directory moves": lambda top: os.rename(top / "d/e", top / "other/e"),
    "over a file": lambda top: os.rename(top / "d/token", top / "other/keep"),
    "a directory for a directory": _exchange,
    "a file for a directory": lambda top: sh(top, "rm -r other; echo file > other"),
    "a directory for a file": lambda top: sh(top, "rm d/file; mkdir d/file"),
    "removal": lambda top: shutil.rmtree(top / "d"),
    "contents": lambda top: (top / "d/file").write_text("new"),
    "as long as before": lambda top: sh(top, "printf peek 1<> other/keep"),
    "mapped": _mapped,
    "another name": lambda top: os.link(top / "d/file", top / "other/again"),
    "a name less": lambda top: os.unlink(top / "other/hard"),
    "modes": lambda top: sh(top, "chmod 700 d; chmod 600 d/file"),
    "an attribute": lambda top: os.setxattr(top / "d/e", "user.new", b"1"),
    "an attribute less": lambda top: os.removexattr(top / "d/file", "user.note"),
    "something new": lambda top: sh(top, "mkdir -p d/e/n/m; echo x > d/e/n/m/x"),
    "a link for a file": lambda top: sh(top, "ln -sf token d/file"),
}


def _difference(one: dict[str, object], other: dict[str, object]) -> dict[str, tuple[object, object]]:
    return {path: (one.get(path), other.get(path)) for path in one.keys() | other.keys() if one.get(path) != other.get(path)}


@pytest.mark.mounts
@pytest.mark.parametrize(
    ("act", "linked"),
    [*((act, 10_000) for act in ACTS), *((act, 0) for act in ("another name", "a name less"))],
)
def test_what_happens_meanwhile(
    act: str,
    linked: int,
    source: Path,
    tmp_path: Path,
    copy_of: Callable[..., LayerCopy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whichever step of the copy it comes, the copy is what was before it, or what is after it, and nothing between; also
    where files with several names are too many to be remembered."""
    monkeypatch.setattr("snapfs.scan.layercopy.LINKED", linked)
    nth, seen_after = 0, 0
    while True:
        subprocess.run(["rm", "-rf", tmp_path / "work"], check=True)
        subprocess.run(["cp", "-a", source, tmp_path / "work"], check=True)
        work = tmp_path / "work"
        before, count = everything(work), 0

        def step(work: Path = work, last: int = nth + 1) -> None:
            nonlocal count
            count += 1
            if count == last:
                ACTS[act](work)

        copy = copy_of(checkpoint=step)
        copy.source = str(work)
        copy.complete()
        if count <= nth:  # it was over before
            break
        shutil.rmtree(copy.stale)  # where files have a name more
        found = everything(target_of(copy))
        after = everything(work)
        assert found in (before, after), (nth, *(_difference(found, other) for other in (before, after)))
        seen_after += found == after
        nth += 1
    assert seen_after > nth / 3


@pytest.mark.mounts
def test_a_file_that_changes_while_it_is_copied(
    source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is copied again; where that never ends the copy is refused, and the file named."""
    (source / "d/file").write_bytes(b"a" * 100_000)
    times = [3]

    def in_parts(reading: int, writing: int, status: os.stat_result) -> None:
        if times[0] and status.st_size == 100_000 and os.pread(reading, 1, 0) in (b"a", b"b"):
            times[0] -= 1
            copy_data(reading, writing, status)
            with open(source / "d/file", "r+b") as file:
                file.write((b"b" if os.pread(reading, 1, 0) == b"a" else b"a") * 100_000)
        else:
            copy_data(reading, writing, status)

    monkeypatch.setattr("snapfs.scan.layercopy.clone", lambda reading, writing: False)
    monkeypatch.setattr("snapfs.scan.layercopy.copy_data", in_parts)
    copy = copy_of()
    copy.complete()
    assert (target_of(copy) / "d/file").read_bytes() == b"b" * 100_000
    assert everything(target_of(copy)) == everything(source)
    times[0] = 1_000_000
    with pytest.raises(TryAgain, match=r"^/d/file changes faster than it can be copied") as refused:
        copy_of().complete()
    assert "file changes" not in refused.value.public, "what is in a layer is not for all readers of error_log"


@pytest.mark.mounts
def test_a_file_whose_owner_and_mode_change_while_it_is_cloned(
    source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was secret is not in the copy with the rights that came when it was so no longer."""

    def cloned(reading: int, writing: int) -> bool:
        status = os.fstat(reading)
        copy_data(reading, writing, status)
        if status.st_size == len("secret"):
            (source / "d/file").write_text("for all")
            (source / "d/file").chmod(0o644)
        return True

    copy = copy_of()
    copy.complete()
    (source / "d/file").write_text("secret")
    (source / "d/file").chmod(0o600)
    monkeypatch.setattr("snapfs.scan.layercopy.clone", cloned)
    assert copy.walk()
    assert everything(target_of(copy)) == everything(source)


KINDS: dict[str, Act] = {
    "link": lambda path: os.symlink("nowhere", path),
    "pipe": os.mkfifo,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(99, 99)),  # which nobody can open
    "directory": os.mkdir,
}


@pytest.mark.mounts
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_becomes_another_kind_while_it_is_copied(
    kind: str, source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "large").write_bytes(b"x" * 12_345)

    def then_replaced(reading: int, writing: int, status: os.stat_result) -> None:
        copy_data(reading, writing, status)
        if status.st_size == 12_345:
            (source / "large").unlink()
            KINDS[kind](source / "large")

    monkeypatch.setattr("snapfs.scan.layercopy.clone", lambda reading, writing: False)
    monkeypatch.setattr("snapfs.scan.layercopy.copy_data", then_replaced)
    copy = copy_of()
    copy.complete()
    assert everything(target_of(copy)) == everything(source)


@pytest.mark.mounts
def test_a_link_that_becomes_a_file_while_it_is_copied(
    source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(file: int | str) -> dict[str, bytes]:
        link = source / "d/link"
        if str(file).endswith("/link") and link.is_symlink():
            link.unlink()
            link.write_text("file")
        return attributes(file)

    attributes = layercopy.attributes
    monkeypatch.setattr(layercopy, "attributes", replaced)
    copy = copy_of()
    copy.complete()
    assert everything(target_of(copy)) == everything(source)


@pytest.mark.mounts
def test_a_file_with_a_lease(source: Path, copy_of: Callable[..., LayerCopy]) -> None:
    """It isn't waited for; once the lease is gone the file is copied, though nothing has changed by that."""
    with open(source / "other/keep", "r+b") as file:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        copy = copy_of()
        assert not copy.walk()
        assert copy.unsteady == "/other/keep"
    copy.complete()
    assert everything(target_of(copy)) == everything(source)


@pytest.mark.mounts
def test_times_of_whole_seconds(tmp_path: Path) -> None:
    """An ext4 with inodes of 128 bytes has no others: what comes in the second in which a walk began is not taken for old."""
    image = tmp_path / "image"
    with image.open("xb") as made:
        made.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-I", "128", image], check=True, stderr=subprocess.DEVNULL)
    with loop_device(image) as device, mounted(device, "ext4", tmp_path / "disk") as disk:
        for name in ("source", "target", "stale"):
            (disk / name).mkdir()
        for name in ("file", "token"):
            (disk / "source" / name).write_text("old")
        until(lambda: time.time() % 1 < 0.7)
        copy = LayerCopy(*(str(disk / name) for name in ("source", "target", "stale")), flush=lambda: None)
        copy.walk()
        (disk / "source/file").write_text("new")
        os.rename(disk / "source/token", disk / "source/moved")
        copy.complete()
        assert everything(disk / "target") == everything(disk / "source")


@pytest.mark.mounts
@pytest.mark.parametrize("walks", [1, 2])
def test_one_wait_for_all_that_has_just_changed(
    source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch, walks: int
) -> None:
    """In each walk, where a file may change twice and its times once; what changes meanwhile is in the copy."""
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        (source / "d/file").write_text(f"wait {len(waits)}")
        os.rename(source / f"other/token{len(waits) - 1}", source / f"other/token{len(waits)}")

    copy = copy_of(flush=lambda: None)
    copy.tick = 3_600_000_000_000
    (source / "other/token0").write_text("token")
    monkeypatch.setattr("snapfs.scan.layercopy.time.sleep", wait)
    for _ in range(walks):
        assert not copy.walk()
    assert waits == walks * [3600.0]
    assert everything(target_of(copy)) == everything(source)


@pytest.mark.mounts
def test_the_clock_is_set_back(source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes after that has times of before."""
    ahead, clock = [10_000_000_000], time.clock_gettime_ns
    monkeypatch.setattr(
        "snapfs.scan.layercopy.time.clock_gettime_ns",
        lambda which: clock(which) + (0 if which == time.CLOCK_MONOTONIC else ahead[0]),
    )
    copy = copy_of()
    copy.walk()
    (source / "d/file").write_text("new")
    os.rename(source / "d/token", source / "moved")
    ahead[0] = 0
    until(lambda: clock(time.CLOCK_REALTIME) > os.stat(source).st_ctime_ns + 20_000_000)  # no walk begins in the same tick
    copy.complete()
    assert everything(target_of(copy)) == everything(source)


def test_directories_that_never_stay(source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.layercopy.SECONDS", 0.5)
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        (source / "other" / str(turn)).write_text("x")

    with pytest.raises(TryAgain, match="what is in its directories changes faster"):
        copy_of(checkpoint=step, flush=lambda: None).complete()


@pytest.mark.mounts
def test_a_deep_one(tmp_path: Path, copy_of: Callable[..., LayerCopy], source: Path) -> None:
    """And one that is moved away while it is copied: neither stack nor descriptors nor lengths of paths are used up."""
    depth, fd = 3000, os.open(source, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    try:
        copy = copy_of(flush=lambda: None)
        assert not copy.walk()
        files = copy.files
        os.rename(source / ("d" * 200), source / "moved")
        copy.complete()
        assert copy.files == files + 1
        fd = os.open(target_of(copy) / "moved", os.O_RDONLY)
        for _ in range(depth - 1):
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        assert os.listdir(fd) == ["bottom"]
        os.close(fd)
        assert len(os.listdir(copy.stale)) == 1
    finally:
        subprocess.run(["rm", "-rf", source, copy.target, copy.stale], check=True)


def test_memory_for_very_many_entries(
    tmp_path: Path, copy_of: Callable[..., LayerCopy], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not grow with the entries of a directory, whether these are files or directories."""
    monkeypatch.setattr("snapfs.scan.layercopy.BATCH", 20)
    peaks = {}
    for count in (200, 900):
        for kind, make in (("files", Path.touch), ("directories", Path.mkdir)):
            top = tmp_path / f"{kind}-{count}"
            top.mkdir()
            for number in range(count):
                make(top / str(number))
            copy = copy_of(flush=lambda: None)
            copy.source = str(top)
            tracemalloc.start()
            try:
                assert not copy.walk()
                (top / "new").touch()
                copy.complete()
                peaks[kind, count] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert len(os.listdir(copy.target)) == count + 1
            subprocess.run(["rm", "-rf", top], check=True)
    for kind in ("files", "directories"):
        assert peaks[kind, 900] < 120_000, peaks


def test_memory_for_very_many_files_with_several_names(
    tmp_path: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapfs.scan.layercopy.LINKED", 20)
    peaks = {}
    for count in (200, 900):
        top = tmp_path / str(count)
        for name in "ab":
            (top / name).mkdir(parents=True)
        for number in range(count):
            (top / f"a/{number}").touch()
            os.link(top / f"a/{number}", top / f"b/{number}")
        copy = copy_of(flush=lambda: None)
        copy.source = str(top)
        tracemalloc.start()
        try:
            copy.complete()
            peaks[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [os.stat(target_of(copy) / f"a/{n}").st_ino for n in range(count)] == [
            os.stat(target_of(copy) / f"b/{n}").st_ino for n in range(count)
        ]
    assert peaks[900] < peaks[200] + 30_000, peaks


@pytest.mark.mounts
@pytest.mark.parametrize("path", ["d/file", "d/e", "d/fifo"])
def test_attributes_that_are_too_long_for_the_memory(
    path: str, source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some file systems one file has hundreds of megabytes."""
    monkeypatch.setattr("snapfs.scan.copying.ATTRIBUTES", 1000)
    name = "trusted.x" if path == "d/fifo" else "user.x"
    os.setxattr(source / path, name, b"x" * 900)
    copy_of().complete()
    os.setxattr(source / path, f"{name}y", b"x" * 900)
    with pytest.raises(OSError, match="more than 4 MiB of extended attributes") as refused:
        copy_of().complete()
    assert refused.value.errno == errno.E2BIG


def test_attributes_of_a_directory_that_are_too_long_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for `snapfs restore` and `snapfs apply`."""
    monkeypatch.setattr("snapfs.scan.copying.ATTRIBUTES", 1000)
    (tmp_path / "file").touch()
    os.setxattr(tmp_path / "file", "user.x", b"x" * 900)
    os.setxattr(tmp_path / "file", "user.y", b"x" * 100)
    assert len(attributes_of(str(tmp_path / "file"))) == 2
    with Held(os.open(tmp_path, os.O_RDONLY), str(tmp_path)) as held:
        assert held.look(b"file") is not None
        os.setxattr(tmp_path / "file", "user.z", b"x")
        for look in (lambda: held.look(b"file"), lambda: attributes_of(str(tmp_path / "file"))):
            with pytest.raises(OSError, match="more than 4 MiB of extended attributes") as refused:
                look()
            assert refused.value.errno == errno.E2BIG
            assert refused.value.filename in (None, b"file")


def test_as_many_names_as_an_inode_may_have(
    source: Path, copy_of: Callable[..., LayerCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has all of them, and none besides."""
    monkeypatch.setattr("snapfs.scan.layercopy.LINKED", 0)
    most, link = 5, os.link

    def bounded(old: str, new: str, *, src_dir_fd: int | None = None, **more: Any) -> None:
        if os.stat(old, dir_fd=src_dir_fd, follow_symlinks=False).st_nlink >= most:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK), old)
        link(old, new, src_dir_fd=src_dir_fd, **more)

    for number in range(most - 1):
        os.link(source / "d/token", source / f"other/{number}")
    monkeypatch.setattr(os, "link", bounded)
    copy = copy_of(flush=lambda: None)
    copy.complete()
    shutil.rmtree(copy.stale)
    assert {os.stat(target_of(copy) / path).st_nlink for path in ("d/token", *(f"other/{n}" for n in range(most - 1)))} == {
        most
    }
    assert everything(target_of(copy)) == everything(source)


# -- the library


@pytest.fixture
def options() -> Options:
    return Options(sync=Sync.NONE)


async def with_workspace(snapshotter: Snapshotter) -> Path:
    """The layer of the workspace ``web`` on ``base``, in which is a file."""
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")
    await snapshotter.prepare("web", "base", {"team": "blue", "pin": "yes"})
    layer = Path(snapshotter.layer_path((await snapshotter.stat("web")).id))
    (layer / "file").write_text("1")
    return layer


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.NONE])
async def test_a_copy_is_a_sibling(root: Path, sync: Sync) -> None:
    async with open_snapshotter(root, Options(sync=sync)) as snapshotter:
        layer = await with_workspace(snapshotter)
        before = await snapshotter.stat("web")
        made = await snapshotter.checkpoint("web", "one", copy=True)
        ours = {"snapfs.workspace": "web", "snapfs.checkpoint": "1", "snapfs.message": "one"}
        assert (made.name, made.parent, made.labels) == ("web@1", "base", {"team": "blue", **ours})
        assert await snapshotter.stat("web") == before
        (layer / "file").write_text("2")
        named = await snapshotter.checkpoint("web", "", "v2", copy=True)
        assert (named.parent, named.labels["snapfs.checkpoint"]) == ("base", "2")
        assert [Path(snapshotter.layer_path(each.id), "file").read_text() for each in (made, named)] == ["1", "2"]
        assert (await snapshotter.usage("v2")).inodes == 2
        assert (await snapshotter.checkpoint("web", "copy: is no word here")).parent == "base"
        assert (await snapshotter.checkpoints("web"))[2].message == "copy: is no word here"
        await snapshotter.flush()
        assert not snapshotter.statistics().copies
        assert list(root.glob("pool/*/fs/*")) == []
    async with open_snapshotter(root, Options(sync=sync)) as snapshotter:
        assert [each.info.name for each in await snapshotter.checkpoints("web")] == ["web@1", "v2", "web@3"]
        await snapshotter.update("web", {}, ["labels.pin"])
        assert (await snapshotter.rollback("web", 1)).parent == "web@1"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("no",), "does not exist"),
        (("base",), "is committed"),
        (("web", "", "base"), "already exists"),
        (("web", "a\nb"), "one line"),
    ],
)
async def test_what_is_refused_leaves_nothing(root: Path, options: Options, words: tuple[str, ...], error: str) -> None:
    async with open_snapshotter(root, options) as snapshotter:
        await with_workspace(snapshotter)
        before = await snapshotter.walk(), sorted(os.listdir(root / "snapshots"))
        with pytest.raises(Exception, match=error):
            await snapshotter.checkpoint(*words, copy=True)
        assert (await snapshotter.walk(), sorted(os.listdir(root / "snapshots"))) == before
        await snapshotter.cleanup()
        assert os.listdir(root / "trash") == []


async def test_they_are_not_held_up_for_what_does_not_hold_still(
    root: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is frozen goes on soon where others go on changing the layer."""
    frozen, walks = [False], list[bool]()

    def walk(copy: LayerCopy) -> bool:
        walks.append(frozen[0])
        return False

    @contextmanager
    def held_still(device: str | None, snapshot: str, owners: Collection[int]) -> Iterator[None]:
        frozen[0] = True
        try:
            yield
        finally:
            frozen[0] = False

    monkeypatch.setattr(LayerCopy, "walk", walk)
    monkeypatch.setattr(layercopy, "SECONDS", 0.0)
    monkeypatch.setattr("snapfs.snapshotter._held_still", held_still)
    async with open_snapshotter(root, options) as snapshotter:
        await with_workspace(snapshotter)
        with pytest.raises(TryAgain):
            await snapshotter.checkpoint("web", copy=True)
    assert walks == [False] + 3 * [True] + 10 * [False]


async def test_the_workspace_becomes_another_meanwhile(root: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback the copy is one of what it is then; after a removal there is none."""
    walked, begun, go = LayerCopy.walk, threading.Event(), threading.Event()

    def held(copy: LayerCopy) -> bool:
        done = walked(copy)
        begun.set()
        assert go.wait(30)
        return done

    monkeypatch.setattr(LayerCopy, "walk", held)
    async with open_snapshotter(root, options) as snapshotter:
        await with_workspace(snapshotter)
        await snapshotter.update("web", {}, ["labels.pin"])
        refused: list[Exception] = []

        async def keep() -> None:
            try:
                await snapshotter.checkpoint("web", "a copy", copy=True)
            except NotFound as error:
                refused.append(error)

        for change in (snapshotter.rollback, snapshotter.remove):
            begun.clear()
            go.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep)
                await trio.to_thread.run_sync(begun.wait)
                assert len(snapshotter.statistics().copies) == 1
                await change("web")
                go.set()
        assert len(refused) == 1
        (kept,) = await snapshotter.checkpoints("web")
        assert os.listdir(snapshotter.layer_path(kept.info.id)) == []


async def test_a_workspace_that_becomes_another_again_and_again(
    root: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it is copied: that ends in a refusal."""
    walks, walk = 0, LayerCopy.walk

    def walked(copy: LayerCopy) -> bool:
        nonlocal walks
        walks += 1
        trio.from_thread.run(snapshotter.checkpoint, "web")
        return walk(copy)

    async with open_snapshotter(root, options) as snapshotter:
        await with_workspace(snapshotter)
        monkeypatch.setattr(LayerCopy, "walk", walked)
        with trio.fail_after(20), pytest.raises(TryAgain, match='"web" was kept or rolled back, again and again'):
            await snapshotter.checkpoint("web", copy=True)
        assert len(await snapshotter.checkpoints("web")) == walks
        await snapshotter.cleanup()
        assert os.listdir(root / "trash") == []


async def test_owners_are_not_changed_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``slow_chown`` changes those of all files: a copy has them as before, or as after."""
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    monkeypatch.setattr("snapfs.snapshotter.LOCKED", 0.1)
    begun, go = trio.Event(), trio.Event()
    shift = Shifting._shift

    async def held(shifting: Shifting, *arguments: Any) -> Info:
        begun.set()
        await go.wait()
        return await shift(shifting, *arguments)

    monkeypatch.setattr(Shifting, "_shift", held)
    async with open_snapshotter(root, Options(sync=Sync.NONE, remap_ids=True, slow_chown=True)) as snapshotter:
        await with_workspace(snapshotter)
        async with trio.open_nursery() as nursery:
            mapped = {UID_MAPPING: "0:100000:65536", GID_MAPPING: "0:100000:65536"}
            nursery.start_soon(snapshotter.update, "web", mapped)
            await begun.wait()
            try:
                with pytest.raises(TryAgain):
                    await snapshotter.checkpoint("web", copy=True)
            finally:
                go.set()
        made = await snapshotter.checkpoint("web", copy=True)
        assert made.labels.items() >= mapped.items()
        assert os.stat(Path(snapshotter.layer_path(made.id)) / "file").st_uid == 100_000


async def test_several_at_once(root: Path, options: Options) -> None:
    async with open_snapshotter(root, options) as snapshotter:
        await with_workspace(snapshotter)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(partial_checkpoint, snapshotter, bool(number % 2))
        found = await snapshotter.checkpoints("web")
        assert sorted(each.number for each in found) == list(range(1, 9))


async def partial_checkpoint(snapshotter: Snapshotter, copy: bool) -> None:
    await snapshotter.checkpoint("web", copy=copy)


@pytest.mark.mounts
async def test_a_disk_that_is_full(small_disk: Path, options: Options) -> None:
    async with open_snapshotter(small_disk / "root", options) as snapshotter:
        layer = await with_workspace(snapshotter)
        (layer / "big").write_bytes(os.urandom(8 << 20))
        before = await snapshotter.walk()
        with pytest.raises(
            Unavailable, match=r'cannot copy the layer of snapshot "web": No space left on device \(/.*big\)'
        ) as refused:
            await snapshotter.checkpoint("web", copy=True)
        assert refused.value.errno == errno.ENOSPC
        assert await snapshotter.walk() == before
        await snapshotter.cleanup()
        assert not any(path.stat().st_size > 1 << 20 for path in (small_disk / "root/pool").rglob("*"))
        (layer / "big").write_bytes(b"")
        assert (await snapshotter.checkpoint("web", copy=True)).name == "web@1"


@pytest.mark.mounts
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
async def test_reflinks(kind: str, tmp_path: Path, options: Options) -> None:
    """A copy of a large file takes no space."""
    make_file_system(kind, tmp_path / "image")
    with loop_device(tmp_path / "image") as device, mounted(device, kind, tmp_path / "disk") as disk:
        async with open_snapshotter(disk / "root", options) as snapshotter:
            layer = await with_workspace(snapshotter)
            (layer / "big").write_bytes(os.urandom(20 << 20))
            os.sync()
            free = os.statvfs(disk).f_bfree * os.statvfs(disk).f_bsize
            kept = await snapshotter.checkpoint("web", copy=True)
            os.sync()
            assert free - os.statvfs(disk).f_bfree * os.statvfs(disk).f_bsize < 4 << 20
            assert Path(snapshotter.layer_path(kept.id), "big").read_bytes() == (layer / "big").read_bytes()


# -- the tree, and the command


@pytest.fixture
def workspace(daemon: Daemon) -> Path:
    os.mkdir(daemon.mnt / "active/web")
    (daemon.mnt / "active/web/rootfs/file").write_text("1")
    return daemon.mnt / "active/web"


def test_while_a_process_stands_in_it(workspace: Path, daemon: Daemon) -> None:
    script = """
    cd rootfs/
    echo "copy: before" > $W/checkpoint
    echo 2 > file
    exec 3<>$W/checkpoint; echo "copy:second" >&3; cat <&3; exec 3>&-
    echo 3 > file; pwd -P
    cut -f 1,2,4 $W/checkpoint
    """
    environment = {**os.environ, "W": str(workspace)}
    done = subprocess.run(["bash", "-ec", script], cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    rootfs = os.readlink(workspace / "rootfs")
    assert (done.stdout, done.stderr) == (f"web@2\n{rootfs}\n1\tweb@1\tbefore\n2\tweb@2\tsecond\n", "")
    assert [(daemon.mnt / f"committed/web@{n}/rootfs/file").read_text() for n in (1, 2)] == ["1", "2\n"]
    assert (workspace / "rootfs/file").read_text() == "3\n"
    assert stats(daemon)["copies"] == []


def test_the_refusal_names_the_way_out_and_not_who_asks(workspace: Path, daemon: Daemon) -> None:
    """A command that stands there because its shell does is not named; a shell that asks by itself is."""
    ways = {"checkpoint": "--copy web", "fork": ", and fork that: snapfs checkpoint --copy web", "rollback": "--kill web"}
    with somebody(workspace / "rootfs") as pid:
        for file, way in ways.items():
            with failing(errno.EBUSY):
                (workspace / file).write_text("x\n")
            said = daemon.error_log()[-1]
            assert f"process {pid} (sleep): leave it first; or " in said
            assert said.endswith(way)
        with failing(errno.EBUSY):
            os.rename(workspace, daemon.mnt / "committed/v1")
        assert daemon.error_log()[-1].endswith("snapfs checkpoint --copy web")
    until(lambda: not Path(f"/proc/{pid}/cwd").exists())
    script = "mv $W $W/../../committed/v1; cat $W/../../.snapfs/error_log | tail -n 1; echo x > $W/checkpoint"
    shell = subprocess.run(
        ["bash", "-c", script],
        cwd=workspace / "rootfs",
        env={**os.environ, "W": str(workspace)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "(bash)" in shell.stdout
    assert "(mv)" not in shell.stdout
    assert "(bash)" in daemon.error_log()[-1]


def test_events_tell_a_copy_from_a_squash(workspace: Path, daemon: Daemon) -> None:
    (workspace / "checkpoint").write_text("copy: one\n")
    (daemon.mnt / "committed/web@1/squash").write_text("flat\n")
    lines = [json.loads(line) for line in (daemon.mnt / ".snapfs/events").read_text().splitlines()[-2:]]
    told = [tuple(line[key] for key in ("operation", "key", "name", "kind")) for line in lines]
    assert told == [("copy", "web", "web@1", "committed"), ("squash", "flat", None, "committed")]
    assert "copy     web -> web@1\n" in Command(daemon.mnt)("events")


def test_the_command_keeps_a_copy(workspace: Path, daemon: Daemon) -> None:
    snapfs = Command(daemon.mnt)
    with somebody(workspace / "rootfs"):
        assert "--copy web" in snapfs("checkpoint", "web", status=5)
        assert snapfs("checkpoint", "web", "--copy", "-m", "why", "--sync") == "web@1\n"
        assert "is one line" in snapfs("checkpoint", "web", "--copy", "-m", "a\nb", status=1)
        assert "does not exist" in snapfs("checkpoint", "no", "--copy", status=3)
    assert (daemon.mnt / "committed/web@1/labels/snapfs.message").read_text() == "why\n"


def test_on_a_terminal_it_tells_how_far_it_is(workspace: Path, daemon: Daemon) -> None:
    for number in range(40):
        (workspace / f"rootfs/{number}").write_bytes(os.urandom(2 << 20))
    said = OnATerminal("checkpoint", "--at", str(daemon.mnt), "--copy", "web").said()
    assert "web@1" in said


@contextmanager
def running(daemon: Daemon, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``snapfs run web``, once it has said a line."""
    with subprocess.Popen(
        [*SNAPFS, "run", "--at", str(daemon.mnt), "web", "--", *words],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_kill_ends_what_run_has_started(workspace: Path, daemon: Daemon, trap: str) -> None:
    """With its children, also where it ignores SIGTERM; not what came there otherwise."""
    (workspace / "rootfs/file").write_text("2")
    snapfs = Command(daemon.mnt)
    with running(daemon, "sh", "-c", f"{trap}sleep 60 & echo here; wait; sleep 60") as process:
        assert "--kill web" in snapfs("rollback", "web", status=5)
        with somebody(workspace / "rootfs") as pid:
            refused = snapfs("rollback", "web", "--kill", status=5)
            assert f"{pid} (sleep)" in refused
            assert refused.endswith("; --kill ends only what snapfs run and snapfs shell have started in it\n")
            assert " --keep --kill web\n" in snapfs("rollback", "web", "--keep", status=5)
            assert process.wait(10) == -(signal.SIGKILL if trap else signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}/cwd").exists())
    assert snapfs("rollback", "web", "--kill") == "web is as an empty one\n"
    assert os.listdir(workspace / "rootfs/") == []


def test_kill_ends_what_has_gone_elsewhere(cgroups: Path, workspace: Path, daemon: Daemon) -> None:
    """Its mount namespace has the workspace all the same."""
    with running(daemon, "sh", "-c", "cd /; echo here; sleep 60 & sleep 60") as process:
        assert "in another mount namespace" in Command(daemon.mnt)("rollback", "web", status=5)
        assert Command(daemon.mnt)("rollback", "web", "--kill") == "web is as an empty one\n"
        assert process.wait(10) == -signal.SIGTERM


def test_kill_ends_what_came_in_between(
    workspace: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever starts a process in a workspace does so at any moment: after the look for such, too, and after a checkpoint."""
    (workspace / "rootfs/file").write_text("2")
    end_all, looks = ending.end_all, 0
    with ExitStack() as started:

        def and_another_comes(place: MountedTree, key: str) -> None:
            nonlocal looks
            end_all(place, key)
            looks += 1
            if looks % ending.TRIES:
                started.enter_context(running(daemon, "sh", "-c", "echo here; exec sleep 60"))

        monkeypatch.setattr(ending, "end_all", and_another_comes)
        monkeypatch.setattr(ending, "TRIES", 2)
        assert main(["rollback", "--at", str(daemon.mnt), "--keep", "--kill", "web"]) == 0
    assert (looks, capsys.readouterr().out) == (2 * ending.TRIES, "kept as web@1\nweb is as an empty one\n")
    assert os.listdir(workspace / "rootfs/") == []


def test_kill_spares_what_was_started_elsewhere(cgroups: Path, workspace: Path, daemon: Daemon) -> None:
    """In another workspace, of which the device number is this one's now, and in what this one was before a rollback."""
    os.mkdir(daemon.mnt / "active/other")
    leave = ("nsenter", f"--mount=/proc/{os.getpid()}/ns/mnt", "--wd=/")
    with running(daemon, *leave, "sh", "-c", "echo here; exec sleep 60") as process:
        assert Command(daemon.mnt)("rollback", "web") == "web is as an empty one\n"
        for key in ("other", "web"):
            assert Command(daemon.mnt)("rollback", "--kill", key) == f"{key} is as an empty one\n"
        assert process.poll() is None


def test_kill_from_inside_is_refused(workspace: Path, daemon: Daemon) -> None:
    at = ("--at", str(daemon.mnt))
    inside = [*SNAPFS, "run", *at, "web", "--", *SNAPFS, "rollback", *at, "--kill", "web"]
    done = subprocess.run(inside, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False)
    assert (done.returncode, "leave it first" in done.stderr) == (5, True)


# -- freezing


@pytest.fixture
def cgroups(tmp_path: Path) -> Iterator[Path]:
    """Version 2, where nothing of that may be mounted."""
    top = freezing._top()
    if top is not None:
        yield Path(top)
        return
    (tmp_path / "cgroup").mkdir()
    mounting.mount("none", str(tmp_path / "cgroup"), "cgroup2")
    try:
        yield tmp_path / "cgroup"
    finally:
        mounting.unmount(str(tmp_path / "cgroup"))


def is_frozen(group: str) -> bool:
    return "frozen 1" in Path(group, "cgroup.events").read_text()


@contextmanager
def in_a_cgroup(place: Path | None = None) -> Iterator[tuple[int, str]]:
    """A process in a cgroup of ``snapfs run``'s, and the directory of that; the process stands in ``place``."""
    script = "from snapfs.kernel import freezing\nfreezing.enter()\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=place) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (group,) = freezing.cgroups([process.pid])
        try:
            yield process.pid, group
        finally:
            process.kill()
    until(lambda: not Path(group, "cgroup.procs").read_text())
    os.rmdir(group)


@pytest.mark.mounts
def test_a_cgroup_is_frozen_for_a_block(cgroups: Path) -> None:
    assert freezing.cgroups([os.getpid(), 0, 1 << 22]) == set()
    with in_a_cgroup() as (pid, group):
        assert os.path.basename(group) == f"snapfs-run-{pid}"
        with freezing.frozen([group]):
            until(lambda: is_frozen(group))
        assert not is_frozen(group)
        with suppress(ZeroDivisionError), freezing.frozen([group, f"{group}/none"]):
            raise ZeroDivisionError
        assert not is_frozen(group)


@pytest.mark.mounts
def test_who_froze_it_is_killed(cgroups: Path) -> None:
    script = (
        "import sys\nfrom snapfs.kernel import freezing\nwith freezing.frozen(sys.argv[1:]):\n    print(flush=True); input()"
    )
    with in_a_cgroup() as (_, group):
        with subprocess.Popen([sys.executable, "-c", script, group], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as freezer:
            assert freezer.stdout is not None
            freezer.stdout.readline()
            until(lambda: is_frozen(group))
            freezer.kill()
        until(lambda: not is_frozen(group))


@pytest.mark.mounts
def test_who_froze_it_is_killed_with_all_of_its_cgroup(cgroups: Path) -> None:
    """As ``systemctl kill -s KILL`` does it with a service."""
    service = cgroups / "snapfs-test-service"
    service.mkdir()
    script = (
        "import sys\nfrom pathlib import Path\nfrom snapfs.kernel import freezing\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text('0')\n"
        "with freezing.frozen(sys.argv[2:]):\n    print(flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(service)]
    try:
        with in_a_cgroup() as (_, group):
            with subprocess.Popen([*command, group], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as freezer:
                assert freezer.stdout is not None
                freezer.stdout.readline()
                until(lambda: is_frozen(group))
                (service / "cgroup.kill").write_text("1")
            until(lambda: not is_frozen(group))
    finally:
        until(lambda: not (service / "cgroup.procs").read_text())
        service.rmdir()


@pytest.mark.mounts
def test_the_shell_that_thaws_is_killed(cgroups: Path) -> None:
    with in_a_cgroup() as (_, group):
        with freezing.frozen([group]):
            until(lambda: is_frozen(group))
            (shell,) = children_of(os.getpid(), group)
            os.kill(shell, signal.SIGKILL)
        until(lambda: not is_frozen(group))


def children_of(parent: int, argument: str) -> list[int]:
    """The processes that process ``parent`` has started with such an argument."""
    found = []
    for entry in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(OSError):
            if os.fsencode(argument) in Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0"):
                found.append(int(entry))
    return found


@pytest.mark.mounts
def test_a_cgroup_that_another_takes_for_one_that_was_left(cgroups: Path) -> None:
    """Two of ``snapfs run`` that start at once have a cgroup each."""
    script = (
        "import os\nfrom snapfs.kernel import freezing\nmkdir = os.mkdir\ntimes = [2]\n"
        "def taken(path):\n    mkdir(path)\n    times[0] -= 1\n    times[0] < 0 or os.rmdir(path)\n"
        "os.mkdir = taken\nfreezing.enter()\nprint(freezing._path('self'))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert freezing.PREFIX in done.stdout
    os.rmdir(f"{cgroups}{done.stdout.strip()}")


@pytest.mark.mounts
def test_all_that_are_in_a_workspace_are_frozen(cgroups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to find them: on a machine with many processes."""
    (tmp_path / "place").mkdir()
    mounting.mount("none", str(tmp_path / "place"), "tmpfs")
    try:
        with (
            in_a_cgroup(tmp_path / "place") as (_, one),
            in_a_cgroup(tmp_path / "place") as (_, other),
            in_a_cgroup() as (pid, gone),
        ):
            number = os.stat(tmp_path / "place").st_dev
            device = f"{os.major(number)}:{os.minor(number)}"
            freezing.mark(gone, "word 1")  # it was there when it began
            assert freezing.marked("word 1") == freezing.marked("word 1", known=[one, gone]) == {gone}
            assert freezing.marked("word 2") == freezing.marked("") == set()
            assert set(freezing.members({gone})) == {(pid, gone)}
            clock = itertools.count()
            monkeypatch.setattr("snapfs.kernel.processes.time.monotonic", lambda: next(clock))
            with _held_still(device, "word 1", ()):
                monkeypatch.undo()
                until(lambda: all(map(is_frozen, (one, other, gone))))
            freezing.kill(gone)
            until(lambda: freezing.marked("word 1", known=[gone]) == set())
    finally:
        mounting.unmount(str(tmp_path / "place"), mounting.MNT_DETACH)


@contextmanager
def nested(top: Path, depth: int) -> Iterator[None]:
    """Cgroups in one another, deeper than a path can be."""
    script = 'import os\nfor _ in range(int(os.sys.argv[1])):\n    os.mkdir("a"); os.chdir("a")'
    subprocess.run([sys.executable, "-c", script, str(depth)], cwd=top, check=True)
    try:
        yield
    finally:
        script = 'import os\nwhile os.path.isdir("a"):\n    os.chdir("a")\nwhile not os.path.samefile(".", os.sys.argv[1]):\n'
        script += '    os.chdir("..")\n    os.rmdir("a")'
        subprocess.run([sys.executable, "-c", script, str(top)], cwd=top, check=True)


@pytest.mark.mounts
def test_cgroups_of_others(cgroups: Path) -> None:
    """They deny nobody anything, however many there are in one another, and count for those alone to whom they belong."""
    with in_a_cgroup() as (pid, group), nested(Path(group), 1100):
        freezing.mark(group, "word 1")
        assert freezing.marked("word 1") == {group}
        assert set(freezing.members({group})) == {(pid, group)}
        os.chown(group, 61001, 61001)
        assert freezing.marked("word 1") == freezing.marked("word 1", owners=[61002]) == set()
        assert freezing.marked("word 1", owners=[61001]) == {group}


@pytest.mark.mounts
def test_the_shell_that_thaws_goes_to_no_cgroup_of_others(cgroups: Path) -> None:
    """They could freeze it there."""
    theirs, ours = cgroups / "snapfs-test-theirs", cgroups / "snapfs-test-ours"
    groups = [str(directory / "snapfs-run-1") for directory in (theirs, ours)]
    for group in groups:
        os.makedirs(group)
    try:
        assert freezing._elsewhere(groups) == (str(cgroups), str(theirs))
        os.chown(theirs, 61001, 61001)
        assert freezing._elsewhere(groups) == (str(cgroups), str(ours))
        os.chown(groups[1], 61001, 61001)
        assert freezing._elsewhere(groups) == (str(cgroups), "")
    finally:
        for group in groups:
            os.removedirs(group)


@pytest.mark.mounts
def test_they_are_not_frozen_for_long(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the block goes on: a layer may be large."""
    monkeypatch.setattr(freezing, "HELD", 0.5)
    with in_a_cgroup() as (_, group), freezing.frozen([group]):
        until(lambda: is_frozen(group))
        until(lambda: not is_frozen(group))


@pytest.mark.mounts
def test_a_shell_that_never_answers(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for."""
    monkeypatch.setattr(freezing, "LONGEST", 1.0)  # also for the end of what was killed
    monkeypatch.setattr(freezing, "_SHELL", 'shift 2; echo 1 > "$1/cgroup.freeze"; exec sleep 60')
    with in_a_cgroup() as (_, group):
        with freezing.frozen([group]):
            until(lambda: is_frozen(group))
            (shell,) = (pid for pid in children_of(os.getpid(), "60"))
        assert not os.path.exists(f"/proc/{shell}")
        assert not is_frozen(group)


@pytest.mark.mounts
def test_cgroups_that_are_empty_go_with_the_next(cgroups: Path) -> None:
    with in_a_cgroup() as (_, group):
        left = f"{os.path.dirname(group)}/snapfs-run-1"
        os.mkdir(left)
        with in_a_cgroup():
            assert not os.path.exists(left)
        assert os.path.exists(group)


def test_what_run_has_started_is_frozen_while_it_is_copied(cgroups: Path, workspace: Path, daemon: Daemon) -> None:
    """Two files that are always written one after the other are never further apart in a copy."""
    program = "i=0; echo here; while :; do echo $i > a; echo $i > b; i=$((i+1)); done"
    with running(daemon, "sh", "-c", program):
        for number in range(1, 6):
            time.sleep(0.05)
            (workspace / "checkpoint").write_text("copy:\n")
            layer = daemon.mnt / f"committed/web@{number}/rootfs"
            a, b = (int((layer / name).read_text() or -1) for name in "ab")
            assert a - b in (0, 1) or -1 in (a, b)
