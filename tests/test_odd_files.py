"""Odd files in layers, and whatever walks layers: no hang, no answer that is wrong, memory that is bounded, and nothing opened
that is no regular file."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import shlex
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from snapfs import Options, Unavailable, open_snapshotter
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.kernel import mounting
from snapfs.model import Kind
from snapfs.offline.checking import Problem, check
from snapfs.offline.rebuilding import rebuild
from snapfs.options import Sync
from snapfs.root import imprint
from snapfs.root.layers import FsTemplate, Layers
from snapfs.root.owners import change_owners
from snapfs.scan.changes import changes
from snapfs.scan.inodes import Inodes, Numbered
from snapfs.scan.usage import disk_usage
from snapfs.scan.walk import Descriptors, directories
from tests.command import Command, run
from tests.daemon import Daemon, bounded
from tests.processes import own_descriptors
from tests.tree import remove_all

pytestmark = pytest.mark.mounts

# -- what was opened


class Opened:
    """The files below a directory that anybody opens, told by inotify(7): a FIFO, a device and a socket tell it as a regular
    file does.  That a path is looked at, or opened with O_PATH, is no opening."""

    _OPEN, _ACCESS = 0x20, 0x01

    def __init__(self, top: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names: dict[int, str] = {}
        with closing(directories(str(top))) as visited:
            for fd, entries in visited:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False) and len(self._names) < 1000:
                        path = f"/proc/self/fd/{fd}/{entry.name}"
                        watch = self._libc.inotify_add_watch(
                            self._fd, os.fsencode(path), self._OPEN | self._ACCESS | 0x02000000
                        )
                        assert watch > 0
                        self._names[watch] = entry.name

    def names(self) -> set[str]:
        """Those that were opened so far."""
        found = set()
        with suppress(BlockingIOError):
            while read := os.read(self._fd, 1 << 16):
                while read:
                    watch, mask, _, length = struct.unpack_from("iIII", read)
                    read = read[16 + length :]
                    if mask & (self._OPEN | self._ACCESS):
                        found.add(self._names[watch])
        return found

    def close(self) -> None:
        os.close(self._fd)


def test_what_is_opened_is_seen(tmp_path: Path) -> None:
    """Or the tests below would show nothing."""
    for name in ("fifo", "regular"):
        os.mknod(tmp_path / name, (stat.S_IFIFO if name == "fifo" else stat.S_IFREG) | 0o600)
    with closing(Opened(tmp_path)) as opened:
        for name in ("fifo", "regular"):
            os.lstat(tmp_path / name)
            os.close(os.open(tmp_path / name, os.O_PATH))
        assert opened.names() == set()
        for name in ("fifo", "regular"):
            os.close(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))
        assert opened.names() == {"fifo", "regular"}


# -- each odd thing, and each operation


class Made(NamedTuple):
    """What was put into a layer: how many inodes, and what ``changes`` says of it, where that is short."""

    inodes: int
    lines: list[str] | None = None


LEVELS = 10_000


def make_special(layer: Path) -> Made:
    os.mkfifo(layer / "fifo")
    os.mknod(layer / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(layer / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(layer / "terminal", stat.S_IFCHR | 0o600, os.makedev(5, 2))
    os.mknod(layer / "zero", stat.S_IFCHR | 0o4600, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as listening:
        fd = os.open(layer, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{fd}/socket")
        os.close(fd)
    return Made(6, ["A /disk", "A /fifo", "A /null", "A /socket", "A /terminal", "A /zero"])


def make_links(layer: Path) -> Made:
    for name, target in {"loop": "loop", "out": "/etc/passwd", "root": "/", "up": "../../../.."}.items():
        os.symlink(target, layer / name)
    (layer / "file").touch()
    os.link(layer / "file", layer / "hard")
    os.mkfifo(layer / "pipe")
    os.link(layer / "pipe", layer / "pipe too")
    return Made(6, [f"A /{name}" for name in ("file", "hard", "loop", "out", "pipe", "pipe too", "root", "up")])


def make_names(layer: Path) -> Made:
    names = [b"\xff" * 255, b"\n" * 255, b"\x1b[2J" * 63, b"\\" * 255, "\u202e".encode() * 85, b"-rf", b" ", b"new\nA forged"]
    for name in names:
        os.close(os.open(os.fsencode(layer) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    (layer / "d").mkdir()
    os.mkdir(os.fsencode(layer) + b"/d/" + b"\xfe" * 255)
    shown = ["\\n" * 255, "\\0033[2J" * 63, " ", "-rf", "\\\\" * 255, "d", "d/" + "\\0376" * 255, "new\\nA forged"]
    return Made(10, [f"A /{name}" for name in (*shown, "\\0342\\0200\\0256" * 85, "\\0377" * 255)])


def make_sparse(layer: Path) -> Made:
    (layer / "huge").touch()
    os.truncate(layer / "huge", 15 << 40)  # nearly as much as an ext4 takes
    return Made(1, ["A /huge"])


def make_deep(layer: Path) -> Made:
    """A directory in each other, and beside each tenth one to come back for."""
    fd = os.open(layer, os.O_RDONLY)
    for level in range(LEVELS):
        os.mkdir("d", dir_fd=fd)
        if level % 10 == 0:
            os.mkdir("z", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.mkfifo("fifo", dir_fd=fd)
    os.close(fd)
    return Made(LEVELS + LEVELS // 10 + 1)


def make_long(layer: Path) -> Made:
    """Beyond what a path can name after 16 of them."""
    fd = os.open(layer, os.O_RDONLY)
    for _ in range(100):
        os.mkdir("n" * 255, dir_fd=fd)
        os.mkfifo("fifo", dir_fd=fd)
        below = os.open("n" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    return Made(200)


def make_forged(layer: Path) -> Made:
    """What overlayfs writes into layers, by names that any user can write, and that it reads where any user may mount it."""
    (layer / "d").mkdir()
    (layer / "d/file").touch()
    for name, value in (("opaque", b"y"), ("redirect", b"/etc"), ("whiteout", b"y"), ("metacopy", b"")):
        os.setxattr(layer / "d", f"user.overlay.{name}", value)
        os.setxattr(layer / "d/file", f"user.overlay.{name}", value)
    return Made(2, ["A /d", "A /d/file"])


MAKERS = [make_special, make_links, make_names, make_sparse, make_deep, make_long, make_forged]

OLD = {UID_MAPPING: "0:1000:65536", GID_MAPPING: "0:1000:65536"}
NEW = {UID_MAPPING: "0:200000:65536", GID_MAPPING: "0:200000:65536"}
OPTIONS = Options(remap_ids=True, slow_chown=True, sync=Sync.NONE)


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A directory in which ten thousand others are made and deleted in no time: on a tmpfs, where that bears attributes."""
    (tmp_path / "fast").mkdir()
    mounting.mount("none", str(tmp_path / "fast"), "tmpfs", 0, "mode=755,nr_inodes=0")
    try:
        if not imprint.is_supported(str(tmp_path / "fast")):
            mounting.unmount(str(tmp_path / "fast"))
        yield tmp_path / "fast"
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "fast"], stderr=subprocess.DEVNULL, check=False)  # however deep it is
        with suppress(OSError):
            mounting.unmount(str(tmp_path / "fast"), mounting.MNT_DETACH)


@pytest.fixture
def root(fast: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root, not yet made, where owners are changed for want of idmapped mounts."""
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    return fast / "root"


class Case:
    """A root with the committed ``base``, and the active ``odd`` on it, number 2, which holds what ``make`` makes."""

    def __init__(self, root: Path, make: Callable[[Path], Made]) -> None:
        self.root = root
        self.layer = root / "snapshots/2/fs"
        self._make = make

    async def filled(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            await snapshotter.prepare("b")
            (self.root / "snapshots/1/fs/kept").touch()
            await snapshotter.commit("base", "b")
            await snapshotter.prepare("odd", "base", OLD)
            self.made = self._make(self.layer)
            await snapshotter.usage("base")

    async def usage(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            usage = await snapshotter.usage("odd")
            assert usage.inodes == self.made.inodes + 1
            assert usage.size <= 10_000 + self.made.inodes * 4096  # what a file seems to hold takes nothing

    async def changes(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            if self.made.lines is not None:
                expected = ["C /\n", *(f"{line}\n" for line in self.made.lines)]
                assert await snapshotter.changes("odd", list) == expected
            else:
                count = await snapshotter.changes("odd", lambda lines: sum(line[:-1].isprintable() for line in lines))
                assert count == self.made.inodes + 1

    async def owners(self) -> None:
        change_owners(str(self.layer.parent), lambda entry: (1001, 1002))
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            await snapshotter.update("odd", NEW)
        with closing(directories(str(self.layer))) as visited:
            stats = [entry.stat(follow_symlinks=False) for _, entries in visited for entry in entries]
        assert {(found.st_uid, found.st_gid) for found in stats} == {(200001, 200002)}
        assert [found.st_mode & 0o4000 for found in stats if found.st_rdev == os.makedev(1, 5)] in ([], [0o4000])

    async def commit(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            await snapshotter.commit("done", "odd")
            assert (await snapshotter.usage("done")).inodes == self.made.inodes + 1
            await snapshotter.prepare("next", "done")
            assert await snapshotter.changes("next", list) == []

    async def tar(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            await snapshotter.commit("done", "odd")
            with closing(await snapshotter.layer_tar("done")) as found:
                assert found.size > self.made.inodes * 512
                assert found.read(found.size - 1024, 4096) == bytes(1024)

    async def check(self) -> None:
        assert list(check(str(self.root))) == []
        assert list(check(str(self.root), repair=True)) == []

    async def check_orphaned(self) -> None:
        """Where no record knows of it, it is measured and put away."""
        os.rename(self.layer.parent, self.root / "snapshots/odd")
        found = [finding for finding in check(str(self.root), repair=True) if finding.problem is Problem.ORPHANED]
        assert f"in {self.made.inodes + 3} files and directories" in found[0].text  # with fs and work and what they are in
        assert (self.root / "lost+found/odd/fs").is_dir()

    async def rebuild(self) -> None:
        (finding,) = rebuild(str(self.root))
        assert finding.text.startswith("the records were made anew: 2 snapshots")
        assert {finding.problem for finding in check(str(self.root))} <= {Problem.NOTE}

    async def remove(self) -> None:
        async with open_snapshotter(self.root, OPTIONS) as snapshotter:
            await snapshotter.remove("odd")
            await snapshotter.cleanup()
            assert os.listdir(self.root / "snapshots") == ["1"]
            assert os.listdir(self.root / "trash") == []


OPERATIONS = ["usage", "changes", "owners", "commit", "tar", "check", "check_orphaned", "rebuild", "remove"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
async def test_each_odd_thing_in_each_operation(root: Path, make: Callable[[Path], Made], operation: str) -> None:
    case = Case(root, make)
    await case.filled()
    descriptors = len(own_descriptors())
    with closing(Opened(case.layer)) as opened, bounded(60):
        await getattr(case, operation)()
        assert opened.names() == set()
    assert len(own_descriptors()) == descriptors


# -- what another process opens, and what grows


def test_a_writer_that_waits_at_a_pipe_goes_on_waiting(tmp_path: Path) -> None:
    """Whoever opened the pipe to read it would let it go."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", "echo x > pipe"], cwd=tmp_path) as writer:
        disk_usage(str(tmp_path))
        list(changes([str(tmp_path)]))
        time.sleep(0.2)
        assert writer.poll() is None
        writer.kill()


def test_files_that_grow_and_directories_that_fill_while_they_are_walked(tmp_path: Path) -> None:
    """A scan ends: it does not run after whoever makes files as fast as it counts them."""
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "log").touch()
    for number in range(2000):
        (layer / f"{number}").touch()
    ended = threading.Event()

    def grow() -> None:
        number = 0
        with (layer / "log").open("ab", buffering=0) as log:
            while not ended.is_set():
                number += 1
                log.write(b"x" * 65536)
                (layer / f"more{number}").touch()
                if number % 100 == 0:
                    log.truncate(0)
                    for old in range(number - 99, number + 1):
                        (layer / f"more{old}").unlink()

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        with bounded(30):
            for _ in range(20):
                assert disk_usage(str(layer)).inodes >= 2002
                lines = list(changes([str(layer)]))
                assert {"A /log\n", "A /0\n", "A /1999\n"} <= set(lines)
                assert lines == sorted(set(lines))
    finally:
        ended.set()
        thread.join()


# -- very many


def make_many(directory: Path, count: int) -> None:
    """So many names, quickly: of few files, for an ext4 takes 65,000 of each."""
    directory.mkdir(parents=True)
    fd = os.open(directory, os.O_RDONLY)
    for number in range(count):
        name = f"a name of some length {number}"
        if number % 60_000:
            os.link(f"a name of some length {number // 60_000 * 60_000}", name, src_dir_fd=fd, dst_dir_fd=fd)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def lines_of(*layers: Path | str) -> int:
    """How many lines ``changes`` has."""
    return sum(1 for _ in changes([str(layer) for layer in layers]))


def peak(act: Callable[[], object]) -> int:
    """Bytes of memory that ``act`` takes at most."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_for_very_many_entries_of_a_directory(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation takes no more of it for 48,000 than for 12,000."""
    monkeypatch.setattr("snapfs.scan.changes.MANY", 8_000)
    monkeypatch.setattr("snapfs.scan.spool.RUN", 8_000)
    peaks: dict[str, list[int]] = {}

    def measure(name: str, act: Callable[[], object]) -> None:
        peaks.setdefault(name, []).append(peak(act))

    with closing(Layers.open(str(fast / "root"))) as layers:
        for number, count in ((1, 12_000), (2, 48_000)):
            layers.place(number, Kind.ACTIVE, FsTemplate())
            layer = Path(layers.fs(number))
            make_many(layer / "d", count)
            assert disk_usage(str(layer)).inodes == 2 + (count + 59_999) // 60_000
            assert lines_of(layer) == count + 1
            measure("usage", partial(disk_usage, str(layer)))
            measure("changes", partial(lines_of, layer))
            measure("owners", partial(change_owners, layers.directory(number), lambda entry: (1, 1)))
        empty = fast / "opaque"
        (empty / "d").mkdir(parents=True)
        os.setxattr(empty / "d", "trusted.overlay.opaque", b"y")
        for number in (1, 2):
            measure("all hidden", partial(lines_of, empty, layers.fs(number)))
        for number in (1, 2):
            layers.move_to_trash(number)
            measure("removal", layers.empty_trash)
            assert os.listdir(layers.trash.directory) == []
    for name, (few, many) in peaks.items():
        assert many < 1.5 * few + 100_000, f"{name}: {peaks}"
        assert many < 8_000_000, f"{name}: {peaks}"


def test_memory_for_very_many_subdirectories(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.walk.BATCH", 500)
    monkeypatch.setattr("snapfs.scan.marks.BATCH", 500)
    monkeypatch.setattr("snapfs.scan.changes.MANY", 1000)
    monkeypatch.setattr("snapfs.scan.spool.RUN", 1000)
    monkeypatch.setattr("snapfs.scan.spool.MERGED", 1 << 16)
    peaks: dict[str, list[int]] = {}
    for count in (3_000, 12_000):
        layer = fast / f"{count}"
        for number in range(count):
            os.makedirs(layer / f"d{number}")
        assert disk_usage(str(layer)).inodes == count + 1
        assert lines_of(layer) == count
        peaks.setdefault("usage", []).append(peak(partial(disk_usage, str(layer))))
        peaks.setdefault("changes", []).append(peak(partial(lines_of, layer)))
    for name, (few, many) in peaks.items():
        assert many < 1.5 * few, f"{name}: {peaks}"


def test_memory_for_half_a_million_inodes() -> None:
    """Of files with several names, and of files whose owner was changed; numbers as a file system gives them out."""
    inodes, numbered = Inodes(), Numbered()

    def fill() -> None:
        for number in range(5_000_000, 5_500_000):
            inodes.add(number)
            numbered.put(number, number & 7)

    assert peak(fill) < 6_000_000
    assert numbered.get(5_000_009) == 5_000_009 & 7
    assert numbered.get(4_999_999) is None
    chosen = random.Random(1)
    some = [chosen.randrange(2**64) for _ in range(1000)]
    assert [inodes.add(number) for number in (*some, *some)] == [True] * 1000 + [False] * 1000


def test_a_walk_that_stops_half_way_through_large_directories_meets_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has few descriptors open."""
    monkeypatch.setattr("snapfs.scan.walk.BATCH", 4)
    monkeypatch.setattr("snapfs.scan.walk.PAUSED", 3)
    monkeypatch.setattr(Descriptors, "OPEN", 2)
    expected = {tmp_path.stat().st_ino}
    chosen = random.Random(7)
    places = [tmp_path]
    for number in range(600):
        place = chosen.choice(places[-40:] if number % 2 else places) / f"{number}"
        if number % 3:
            place.mkdir()
            places.append(place)
        else:
            place.touch()
        expected.add(os.lstat(place).st_ino)
    before, most = len(own_descriptors()), 0
    met = [tmp_path.stat().st_ino]
    with closing(directories(str(tmp_path))) as visited:
        for _, entries in visited:
            most = max(most, len(os.listdir("/proc/self/fd")))
            met += [entry.stat(follow_symlinks=False).st_ino for entry in entries]
            assert len(entries) <= 4
    assert sorted(met) == sorted(expected)
    assert most <= before + 14
    assert len(own_descriptors()) == before
    with closing(directories(str(tmp_path))) as visited:  # given up half way
        for _ in range(30):
            next(visited)
    assert len(own_descriptors()) == before


def test_a_file_appears_in_a_spool_no_longer_than_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.changes.MANY", 3)
    (tmp_path / "layer/d").mkdir(parents=True)
    (tmp_path / "spool").mkdir()
    for name in "abcdef":
        (tmp_path / "layer" / name).touch()
        (tmp_path / "layer/d" / name).touch()
    before = len(own_descriptors())
    lines = changes([str(tmp_path / "layer")], spool=str(tmp_path / "spool"))
    assert next(lines) == "A /a\n"
    assert any(str(tmp_path / "spool") in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1])
    assert os.listdir(tmp_path / "spool") == []
    lines.close()
    assert len(own_descriptors()) == before


# -- what is mounted inside a layer


@contextmanager
def mounted_inside(layer: Path, outside: Path) -> Iterator[list[str]]:
    """A layer with two directories and two files, on which others are mounted, of this and of another file system; the paths
    of the mounts."""
    outside.mkdir(exist_ok=True)
    (outside / "secret").touch()
    (outside / "file").write_bytes(os.urandom(1 << 20))
    layer.mkdir(exist_ok=True)
    for name in ("bound", "other"):
        (layer / name / "below").mkdir(parents=True)
        (layer / name / "below/file").touch()
        (layer / f"{name} file").write_text("small")
    before = disk_usage(str(layer))
    assert before.inodes == 9
    done: list[str] = []
    try:
        mounting.mount_bind(str(outside), str(layer / "bound"), read_only=False)
        done.append(str(layer / "bound"))
        mounting.mount("none", str(layer / "other"), "tmpfs", 0, "size=9m,mode=700")
        done.append(str(layer / "other"))
        (layer / "other/secret").write_bytes(os.urandom(1 << 20))
        mounting.mount_bind(str(layer / "other/secret"), str(layer / "other file"), read_only=False)
        done.append(str(layer / "other file"))
        yield done
    finally:
        for target in reversed(done):
            with suppress(OSError):
                mounting.unmount(target)


def test_what_is_mounted_inside_is_not_the_layers(tmp_path: Path) -> None:
    """An overlay shows what is beneath, and so do usage and changes, of the layer and of the chain."""
    layer, base = tmp_path / "layer", tmp_path / "base"
    (base / "other").mkdir(parents=True)

    def seen() -> list[object]:
        chains = ([layer], [layer, base], [base, layer])
        return [disk_usage(str(layer)), *(list(changes([str(each) for each in chain])) for chain in chains)]

    with mounted_inside(layer, tmp_path / "outside") as mounts:
        covered = seen()
        for target in reversed(mounts):
            mounting.unmount(target)
        mounts.clear()
    assert covered == seen()


async def test_owners_are_not_changed_where_something_is_mounted(root: Path, tmp_path: Path) -> None:
    async with open_snapshotter(root, OPTIONS) as snapshotter:
        await snapshotter.prepare("odd", None, OLD)
        with mounted_inside(root / "snapshots/1/fs", tmp_path / "outside") as mounts:
            with pytest.raises(Unavailable, match=r"something is mounted on .*/fs/bound; unmount that first") as told:
                await snapshotter.update("odd", NEW)
            assert told.value.errno == errno.EBUSY
            assert (await snapshotter.stat("odd")).labels == OLD
            assert (root / "snapshots/1/fs").stat().st_uid == 1000
            for target in reversed(mounts):
                mounting.unmount(target)
            mounts.clear()
        await snapshotter.update("odd", NEW)
    assert (tmp_path / "outside/secret").stat().st_uid == 0


async def test_such_a_snapshot_is_committed_checked_rebuilt_and_refused_by_words(root: Path, tmp_path: Path) -> None:
    async with open_snapshotter(root, OPTIONS) as snapshotter:
        await snapshotter.prepare("odd")
    with mounted_inside(root / "snapshots/1/fs", tmp_path / "outside") as mounts:
        async with open_snapshotter(root, OPTIONS) as snapshotter:
            await snapshotter.commit("done", "odd")
            assert (await snapshotter.usage("done")).inodes == 9
        assert list(check(str(root), repair=True)) == []
        assert len(list(rebuild(str(root)))) == 1
        async with open_snapshotter(root, OPTIONS) as snapshotter:
            await snapshotter.remove("done")
            with pytest.raises(Unavailable, match="can't be deleted: something is mounted there"):
                await snapshotter.cleanup()
        assert (tmp_path / "outside/secret").exists()
        moved = [line.split()[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for target in reversed([each for each in moved if each.startswith(f"{root}/trash/")]):
            mounting.unmount(target)
        mounts.clear()
        async with open_snapshotter(root, OPTIONS) as snapshotter:
            await snapshotter.cleanup()
        assert os.listdir(root / "trash") == []


def test_who_may_not_look_beneath_a_mount_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tree: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("snapfs.kernel.mountapi.copy_tree", refuse)
    with mounted_inside(tmp_path / "layer", tmp_path / "outside"):
        for act in (lambda: disk_usage(str(tmp_path / "layer")), lambda: list(changes([str(tmp_path / "layer")]))):
            with pytest.raises(OSError, match="busy") as told:
                act()
            assert told.value.errno == errno.EBUSY


def test_where_the_kernel_is_too_old_directories_are_opened_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)

    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("snapfs.kernel.libc.call", refuse)
    assert disk_usage(str(tmp_path)).inodes == 3


# -- what may not be changed


@pytest.fixture
def disk(small_disk: Path) -> Iterator[Path]:
    """An ext4, for there are flags; nothing immutable is left on it."""
    yield small_disk
    subprocess.run(["chattr", "-R", "-i", "-a", small_disk], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("flag", ["+i", "+a"])
async def test_owners_of_immutable_files_are_told_by_words_and_none_is_changed(
    disk: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    layer = disk / "root/snapshots/1/fs"
    async with open_snapshotter(disk / "root", OPTIONS) as snapshotter:
        await snapshotter.prepare("odd", None, OLD)
        for name in ("a", "d/b", "d/fixed", "z"):
            (layer / name).parent.mkdir(exist_ok=True)
            (layer / name).touch()
            os.chown(layer / name, 1001, 1001)
        subprocess.run(["chattr", flag, layer / "d/fixed"], check=True)
        with pytest.raises(
            Unavailable, match=r"/fs/d/fixed: it is immutable or append-only; do first: chattr .*/fixed"
        ) as told:
            await snapshotter.update("odd", NEW)
        assert told.value.errno == errno.EPERM
        assert "fixed" not in told.value.public
        assert (await snapshotter.stat("odd")).labels == OLD
        assert [(layer / name).stat().st_uid for name in (".", "a", "d/b", "d/fixed", "z")] == [1000, *[1001] * 4]
        usage = await snapshotter.usage("odd")
        assert usage.inodes == 6
        assert len(await snapshotter.changes("odd", list)) == 5
    assert list(check(str(disk / "root"), repair=True)) == []
    subprocess.run(["chattr", "-i", "-a", layer / "d/fixed"], check=True)
    async with open_snapshotter(disk / "root", OPTIONS) as snapshotter:
        await snapshotter.update("odd", NEW)
        assert {(layer / name).stat().st_uid for name in ("a", "d/b", "d/fixed", "z")} == {200001}


async def test_what_became_immutable_meanwhile_keeps_no_other_file_from_getting_its_owner_back(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    layer = disk / "root/snapshots/1/fs"
    async with open_snapshotter(disk / "root", OPTIONS) as snapshotter:
        await snapshotter.prepare("odd", None, OLD)
        for name in ("a", "b", "c"):
            (layer / name).touch()
            os.chown(layer / name, 1001, 1001)

        def refuse(*_: object, **__: object) -> None:
            subprocess.run(["chattr", "+i", layer / "b"], check=True)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr("snapfs.root.imprint.write", refuse)
            with pytest.raises(Unavailable):
                await snapshotter.update("odd", NEW)
        assert [(layer / name).stat().st_uid for name in "abc"] == [1001, 200001, 1001]


def deep_and_fixed(layer: Path, levels: int, name: str) -> str:
    """An immutable file at the bottom of so many directories; the path of its directory, which may be too long to be used."""
    fd = os.open(layer, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("fixed", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    subprocess.run(["chattr", "+i", f"/proc/self/fd/{fd}/fixed"], check=True, pass_fds=[fd])
    os.close(fd)
    return f"{layer}{f'/{name}' * levels}"


REMOVE = """
import sys, trio
from contextlib import suppress
from snapfs import NotFound, Unavailable, open_snapshotter
async def main():
    async with open_snapshotter(sys.argv[1]) as snapshotter:
        with suppress(NotFound):
            await snapshotter.remove("odd")
        try:
            await snapshotter.cleanup()
        except Unavailable as refusal:
            print(refusal)
trio.run(main)
"""


@pytest.mark.parametrize(
    ("levels", "name"), [(3, "n"), (8, "n" * 200), (30, "n" * 250), (3, "\x1b[2J\nsnapfs: all is well"), (2, "\u202e")]
)
def test_what_can_not_be_deleted_is_told_in_a_sentence_of_one_line_that_helps(disk: Path, levels: int, name: str) -> None:
    """However long its path is, and whatever is in it; where chattr can't take the path, a directory that it can take."""

    async def prepare() -> None:
        async with open_snapshotter(disk / "root", OPTIONS) as snapshotter:
            await snapshotter.prepare("odd")

    trio.run(prepare)
    deep_and_fixed(disk / "root/snapshots/1/fs", levels, name)
    command: list[str | Path] = ["setpriv", "--bounding-set=-linux_immutable", sys.executable, "-c", REMOVE, disk / "root"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    (sentence,) = done.stdout.splitlines()
    assert sentence.isprintable()
    assert "can't be deleted: " in sentence
    assert len(sentence) < 4000
    (finding,) = check(str(disk / "root"))
    assert finding.problem is Problem.ORPHANED
    assert finding.text.isprintable()
    remedy = re.search(r"chattr (?:-R )?-i -a \S+|find \S+ -execdir [^;]*", finding.text)
    assert remedy is not None
    subprocess.run(shlex.split(remedy[0]), check=True)
    assert subprocess.check_output(command[2:]) == b""
    assert os.listdir(disk / "root/trash") == []


# -- beside the layers


@pytest.mark.parametrize("what", ["pipe", "device", "sparse", "link", "directory"])
async def test_a_record_is_a_regular_file(root: Path, what: str) -> None:
    """What stands in its place is not opened, and not read to an end that is terabytes away."""
    async with open_snapshotter(root, OPTIONS) as snapshotter:
        await snapshotter.prepare("odd")
    directory = root / "snapshots/1"
    os.removexattr(directory, imprint.ATTRIBUTE)
    record = directory / imprint.FILE
    if what == "sparse":
        record.touch()
        os.truncate(record, 10 << 40)
    elif what == "link":
        record.symlink_to("/dev/zero")
    elif what == "directory":
        record.mkdir()
    else:
        os.mknod(record, (stat.S_IFIFO if what == "pipe" else stat.S_IFCHR) | 0o600, os.makedev(1, 5))
    with bounded(20):
        assert [finding.problem for finding in check(str(root))] == [Problem.MISCOUNTED]
        async with open_snapshotter(root, OPTIONS) as snapshotter:
            assert (await snapshotter.usage("odd")).inodes == 1
        os.removexattr(directory, imprint.ATTRIBUTE) if imprint.ATTRIBUTE in os.listxattr(directory) else None
        findings = list(rebuild(str(root)))
        assert [finding.problem for finding in findings] == [Problem.ORPHANED, Problem.NOTE]


def test_whatever_stands_in_snapshots_is_measured_and_put_away(disk: Path, tmp_path: Path) -> None:
    """Or it is told that it can't be; the others are."""

    async def make() -> None:
        async with open_snapshotter(disk / "root", OPTIONS) as snapshotter:
            await snapshotter.prepare("kept")

    trio.run(make)
    snapshots = disk / "root/snapshots"
    os.mkfifo(snapshots / "77")
    os.mkfifo(snapshots / "pipe")
    os.mknod(snapshots / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    (snapshots / "link").symlink_to("/")
    for name in ("fixed", "mounted"):
        (snapshots / name / "in it").mkdir(parents=True)
    for round_ in range(3):
        (snapshots / ("n" * 255)).mkdir()
        if not round_:
            os.mkdir(snapshots / "\x1b[2J\nnote: all is well")
            subprocess.run(["chattr", "+i", snapshots / "fixed"], check=True)
            mounting.mount("none", str(snapshots / "mounted"), "tmpfs", 0, "")
        try:
            with bounded(20):
                done = run("check", str(disk / "root"), "--repair")
        finally:
            if not round_:
                mounting.unmount(str(snapshots / "mounted"))
                subprocess.run(["chattr", "-i", snapshots / "fixed"], check=True)
        assert "Traceback" not in done.stderr
        assert not [line for line in done.stdout.splitlines() if not line.isprintable()]
        assert not re.search("^note: all is well", done.stdout, re.MULTILINE)
        assert done.returncode == (0 if round_ else 1), done.stdout + done.stderr
        assert sorted(os.listdir(snapshots)) == (["1"] if round_ else ["1", "fixed", "mounted"])
    kept = os.listdir(disk / "root/lost+found")
    assert {"77", "pipe", "zero", "link", "fixed", "mounted", "n" * 255} <= set(kept)
    assert len([name for name in kept if name.startswith("nnn")]) == 3


def test_the_command_shows_a_renamed_directory_and_reads_as_it_shows(module_daemon: Daemon) -> None:
    mnt = module_daemon.mnt
    os.mkdir(mnt / "active/b")
    os.rename(mnt / "active/b", mnt / "committed/base")
    os.mkdir(mnt / "committed/base/active/odd")
    layer = Path(os.readlink(mnt / "active/odd/diff"))
    for name in ("moved", "many"):
        (layer / name).mkdir()
    os.setxattr(layer / "moved", "trusted.overlay.redirect", b"/elsewhere")
    for number in range(3000):
        (layer / f"many/{number}").touch()
    lines = Command(mnt)("diff", "odd").splitlines()
    assert lines[:2] == ["A /many", "A /many/0"]
    assert lines[-2:] == ["A /moved", "R /moved/"]
    assert len(lines) == 3003
    remove_all(mnt)
