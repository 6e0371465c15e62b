"""What a layer takes on disk: allocated blocks, each inode once; and when it is counted."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import NotFound, Snapshotter, Unavailable, Usage, open_snapshotter
from snapfs.scan.usage import disk_usage
from tests.disk import make_file_system
from tests.mounts import loop_mounted
from tests.processes import own_descriptors


def counted_by_du(directory: Path) -> int:
    """GNU du: allocated blocks, hard links once."""
    return int(subprocess.check_output(["du", "-s", "--block-size=512", str(directory)]).split()[0]) * 512


SUBVOLUMES = """
import fcntl, os, struct
for name in (b"above", b"above/inside"):
    os.makedirs(os.path.dirname(name) or b".", exist_ok=True)
    parent = os.open(os.path.dirname(name) or b".", os.O_RDONLY)
    fcntl.ioctl(parent, 0x5000940E, bytearray(struct.pack("q4088s", 0, os.path.basename(name))))  # BTRFS_IOC_SUBVOL_CREATE
    open(name + b"/file", "w").write("x")
"""


@pytest.mark.mounts
async def test_subvolumes_that_users_have_made(tmp_path: Path) -> None:
    """Of btrfs: each has a device number of its own, though nothing is mounted there."""
    make_file_system("btrfs", tmp_path / "image")
    with loop_mounted(tmp_path / "image", tmp_path / "disk") as disk:
        async with open_snapshotter(disk / "root") as snapshotter:
            await snapshotter.prepare("k")
            layer = disk / "root/snapshots/1/fs"
            subprocess.run([sys.executable, "-c", SUBVOLUMES], cwd=layer, check=True)
            assert (await snapshotter.usage("k")).inodes == 5
            await snapshotter.commit("c", "k")
            assert (await snapshotter.usage("c")).inodes == 5


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    (tmp_path / "fs").mkdir()
    return tmp_path / "fs"


def build_empty(layer: Path) -> int:
    return 1


def build_small_file(layer: Path) -> int:
    (layer / "a").write_text("x")
    return 2


def build_sparse_file(layer: Path) -> int:
    (layer / "a").write_bytes(b"")
    os.truncate(layer / "a", 1 << 30)
    return 2


def build_big_file(layer: Path) -> int:
    (layer / "a").write_bytes(os.urandom(1 << 20))
    return 2


def build_hard_links(layer: Path) -> int:
    (layer / "d").mkdir()
    (layer / "a").write_bytes(os.urandom(100_000))
    os.link(layer / "a", layer / "b")
    os.link(layer / "a", layer / "d/c")
    return 3


def build_whiteouts(layer: Path) -> int:
    for name in ("gone", "gone too"):
        os.mknod(layer / name, stat.S_IFCHR, os.makedev(0, 0))
    return 3


def build_linked_whiteouts(layer: Path) -> int:
    """As the kernel makes them: one inode for many."""
    os.mknod(layer / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.link(layer / "gone", layer / "gone too")
    return 2


def build_special_files(layer: Path) -> int:
    os.mkfifo(layer / "fifo")
    os.symlink("/nowhere", layer / "short")
    os.symlink("x" * 300, layer / "long")
    os.symlink(layer, layer / "up")
    return 5


def build_tree(layer: Path) -> int:
    for number in range(50):
        (layer / f"{number % 5}/{number}").mkdir(parents=True)
        (layer / f"{number % 5}/{number}/file").write_text("x" * number * 100)
    return 1 + 5 + 50 + 50


BUILDERS: list[Callable[[Path], int]] = [
    build_empty,
    build_small_file,
    build_sparse_file,
    build_big_file,
    build_hard_links,
    build_whiteouts,
    build_linked_whiteouts,
    build_special_files,
    build_tree,
]


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__.removeprefix("build_"))
def test_what_a_layer_takes(layer: Path, build: Callable[[Path], int]) -> None:
    inodes = build(layer)
    assert disk_usage(str(layer)) == Usage(inodes, counted_by_du(layer))


def test_an_empty_layer_is_its_directory(layer: Path) -> None:
    assert disk_usage(str(layer)) == Usage(1, layer.stat().st_blocks * 512)


def test_allocated_bytes_and_not_lengths(layer: Path) -> None:
    empty = disk_usage(str(layer))
    (layer / "hole").write_bytes(b"")
    os.truncate(layer / "hole", 1 << 40)
    assert disk_usage(str(layer)) == Usage(2, empty.size)


def make_deep(directory: Path, levels: int) -> None:
    """Beyond what a path can name; a file at the bottom."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("down", dir_fd=fd)
        below = os.open("down", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


async def test_a_directory_of_3000_levels_is_counted_and_deleted(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("deep")
    make_deep(root / "snapshots/1/fs", 3000)
    open_before = len(own_descriptors())
    assert (await snapshotter.usage("deep")).inodes == 3002
    assert len(own_descriptors()) == open_before
    await snapshotter.commit("deeper", "deep")
    assert (await snapshotter.usage("deeper")).inodes == 3002
    await snapshotter.remove("deeper")
    assert os.listdir(root / "trash") == []


def test_what_vanishes_meanwhile_is_not_counted(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories go after they have been listed, one becomes a file, and files go before they are looked at."""
    for name in ("a", "b", "c"):
        (layer / name / "below").mkdir(parents=True)
        (layer / name / "file").write_text("x")
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            for name in ("a", "b"):
                (layer / name / "file").unlink()
                (layer / name / "below").rmdir()
                (layer / name).rmdir()
            (layer / "b").write_text("now a file")

    assert disk_usage(str(layer), checkpoint).inodes == 1 + 2 + 2  # a is gone, b a file; c and what is in it
    assert calls > 1


def test_a_file_that_vanishes_between_listing_and_looking(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Vanishing:
        name = "gone"

        def is_dir(self, *, follow_symlinks: bool) -> bool:
            return False

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            raise FileNotFoundError

    class Listing:
        def __iter__(self) -> Iterator[Vanishing]:
            return iter([Vanishing()])

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda fd: Listing())
    assert disk_usage(str(layer)).inodes == 1


def test_a_scan_can_be_stopped_and_closes_what_it_opened(layer: Path) -> None:
    build_tree(layer)
    before = set(own_descriptors())

    class StopError(Exception):
        pass

    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopError

    with pytest.raises(StopError):
        disk_usage(str(layer), checkpoint)
    assert set(own_descriptors()) == before


def test_what_is_shared(layer: Path) -> None:
    """Files that have names elsewhere, each once; not those of which all names are in the layer."""
    (layer / "d").mkdir()
    for name, here, elsewhere in (("one", 1, 0), ("two", 2, 0), ("three", 3, 0), ("out", 1, 1), ("both", 2, 1), ("many", 3, 4)):
        (layer / name).write_bytes(b"x" * 100_000)
        for number in range(1, here):
            os.link(layer / name, layer / f"d/{name}-{number}")
        for number in range(elsewhere):
            os.link(layer / name, layer.parent / f"{name}-{number}")
    found = disk_usage(str(layer))
    assert found.inodes == 8
    assert found.shared == sum(os.stat(layer / name).st_blocks for name in ("out", "both", "many")) * 512


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk_usage(str(tmp_path / "none"))


# -- when it is counted


async def test_active_is_scanned_now_committed_is_stored_and_a_view_takes_nothing(snapshotter: Snapshotter, root: Path) -> None:
    layer = root / "snapshots/1/fs"
    await snapshotter.prepare("b")
    assert await snapshotter.usage("b") == Usage(1, layer.stat().st_blocks * 512)
    (layer / "file").write_bytes(b"x" * 50_000)
    grown = await snapshotter.usage("b")
    assert grown == Usage(2, counted_by_du(layer))
    await snapshotter.commit("base", "b")
    assert await snapshotter.usage("base") == grown
    (layer / "more").write_bytes(b"x" * 50_000)  # nobody should; it shows that nothing is scanned again
    assert await snapshotter.usage("base") == grown
    await snapshotter.rename("base", "ground")
    await snapshotter.update("ground", {"a": "b"})
    assert await snapshotter.usage("ground") == grown
    await snapshotter.view("peek", "ground")
    assert await snapshotter.usage("peek") == Usage(0, 0)
    await snapshotter.view("alone")
    assert await snapshotter.usage("alone") == Usage(0, 0)


async def test_what_is_written_after_a_commit_is_counted_until_somebody_asks(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapfs.services.counting.GATHER", 3600.0)  # the background would count as late as that
    await snapshotter.prepare("k")
    layer = Path(snapshotter.layers.fs((await snapshotter.stat("k")).id))
    await snapshotter.commit("c", "k")
    (layer / "late").write_bytes(b"x" * 5000)
    counted = await snapshotter.usage("c")
    assert counted == disk_usage(str(layer))
    assert counted.inodes == 2
    (layer / "later").write_bytes(b"x" * 5000)
    assert await snapshotter.usage("c") == counted


async def test_usage_is_of_the_snapshot_alone(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("b")
    (root / "snapshots/1/fs/file").write_bytes(b"x" * 50_000)
    await snapshotter.commit("base", "b")
    await snapshotter.prepare("web", "base")
    assert (await snapshotter.usage("web")).inodes == 1


async def test_the_stored_usage_survives_reopening(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("b")
        (root / "snapshots/1/fs/file").write_bytes(b"x" * 50_000)
        await snapshotter.commit("base", "b")
        stored = await snapshotter.usage("base")
    (root / "snapshots/1/fs/file").unlink()
    async with open_snapshotter(root) as again:
        assert await again.usage("base") == stored


async def test_what_was_not_yet_counted_is_counted_at_the_next_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: str, checkpoint: Callable[[], None]) -> Usage:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("snapfs.services.counting.disk_usage", refuse)
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("b")
            await snapshotter.commit("base", "b")
            with pytest.raises(Unavailable, match="Input/output error"):
                await snapshotter.usage("base")
    async with open_snapshotter(root) as again:
        assert (await again.usage("base")).inodes == 1


class Scanner:
    """A ``disk_usage`` that waits to be let go on, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = trio.Event()
        self.go_on = threading.Event()

    def __call__(self, directory: str, checkpoint: Callable[[], None]) -> Usage:
        self.asked.append(directory)
        trio.from_thread.run_sync(self.begun.set)
        while not self.go_on.wait(0.01):
            checkpoint()
        return disk_usage(directory, checkpoint)


@pytest.fixture
def scanner(monkeypatch: pytest.MonkeyPatch) -> Scanner:
    made = Scanner()
    monkeypatch.setattr("snapfs.services.counting.disk_usage", made)
    return made


async def test_all_who_ask_at_once_share_one_scan(snapshotter: Snapshotter, scanner: Scanner) -> None:
    results: list[Usage] = []

    async def ask() -> None:
        results.append(await snapshotter.usage("web"))

    await snapshotter.prepare("web")
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        scanner.go_on.set()
    assert len(scanner.asked) == 1
    assert len(set(results)) == 1
    assert len(results) == 10
    await snapshotter.usage("web")  # and who asks later gets a new one
    assert len(scanner.asked) == 2


async def test_one_who_gives_up_does_not_stop_the_others_scan(snapshotter: Snapshotter, scanner: Scanner) -> None:
    results: list[Usage] = []
    hurried = trio.CancelScope()

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            results.append(await snapshotter.usage("web"))

    await snapshotter.prepare("web")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, hurried)
        nursery.start_soon(ask, trio.CancelScope())
        await scanner.begun.wait()
        hurried.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert hurried.cancelled_caught
        scanner.go_on.set()
    assert len(results) == 1
    assert len(scanner.asked) == 1


async def test_a_scan_for_which_nobody_waits_any_more_ends(
    snapshotter: Snapshotter, scanner: Scanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads for scans, and none would ever end: whoever asks then gets a thread."""
    keys = [f"k{number}" for number in range(10)]
    for key in keys:
        await snapshotter.prepare(key)
    async with trio.open_nursery() as nursery:
        for key in [*keys, *keys]:
            nursery.start_soon(snapshotter.usage, key)
        await scanner.begun.wait()
        nursery.cancel_scope.cancel()
    monkeypatch.setattr("snapfs.services.counting.disk_usage", disk_usage)
    with trio.fail_after(20):
        for key in keys:
            assert (await snapshotter.usage(key)).inodes == 1


async def test_commit_does_not_wait_for_the_count_and_usage_does(snapshotter: Snapshotter, scanner: Scanner) -> None:
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")
    await scanner.begun.wait()
    with snapshotter.records.reading() as reader:
        assert reader.uncounted() == [1]
    results: list[Usage] = []

    async def ask() -> None:
        results.append(await snapshotter.usage("base"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert results == []
        scanner.go_on.set()
    assert results[0].inodes == 1
    with snapshotter.records.reading() as reader:
        assert reader.uncounted() == []
    assert len(scanner.asked) == 2, "together with others, and at once for whoever asks: those may take long"


async def test_small_layers_are_counted_together(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of Commits takes one thread, and one write, for all that are small; what is not is counted apart."""
    threads: list[int] = []

    def counted(directory: str, checkpoint: Callable[[], None]) -> Usage:
        threads.append(threading.get_ident())
        return disk_usage(directory, checkpoint)

    monkeypatch.setattr("snapfs.services.counting.disk_usage", counted)
    monkeypatch.setattr("snapfs.services.counting.GATHER", 3600.0)
    for number in range(10):
        await snapshotter.prepare(f"k{number}")
        if number == 5:
            layer = Path(snapshotter.layers.fs((await snapshotter.stat("k5")).id))
            for deep in range(20):
                (layer / str(deep)).mkdir()
        await snapshotter.commit(f"c{number}", f"k{number}", wait=False)
    gathered = list(snapshotter.counting._gathered)
    assert len(gathered) == 10
    batches = snapshotter.records.batches.total()
    await snapshotter.counting._count_together(gathered)
    assert len(set(threads)) == 1
    with snapshotter.records.reading() as reader:
        assert reader.uncounted() == [gathered[5]]
    assert snapshotter.records.batches.total() == batches + 1
    assert [(await snapshotter.usage(f"c{number}")).inodes for number in range(10)] == [1] * 5 + [21] + [1] * 4
    assert len(threads) == 11, "of the one that is not small a part was looked at before"


async def test_what_is_removed_soon_is_not_counted(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.services.counting.GATHER", 3600.0)
    await snapshotter.prepare("k")
    await snapshotter.commit("c", "k", wait=False)
    gathered = list(snapshotter.counting._gathered)
    await snapshotter.remove("c")
    assert len(gathered) == 1
    assert snapshotter.counting._gathered == snapshotter.counting._pending == {}
    await snapshotter.counting._count_together(gathered)


async def test_a_scan_begun_before_the_commit_is_not_what_is_stored(
    snapshotter: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = trio.Event(), threading.Event()

    def looks_at_once(directory: str, checkpoint: Callable[[], None]) -> Usage:
        found = disk_usage(directory, checkpoint)
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(20)
        return found

    monkeypatch.setattr("snapfs.services.counting.disk_usage", looks_at_once)
    await snapshotter.prepare("b")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshotter.usage, "b")
        await begun.wait()
        (root / "snapshots/1/fs/file").write_text("x")
        await snapshotter.commit("base", "b")
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert (await snapshotter.usage("base")).inodes == 2


async def test_a_snapshot_removed_while_it_is_scanned(snapshotter: Snapshotter, scanner: Scanner) -> None:
    await snapshotter.prepare("web")

    async def ask() -> None:
        with pytest.raises(NotFound):
            await snapshotter.usage("web")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await scanner.begun.wait()
        await snapshotter.remove("web")
        scanner.go_on.set()
    assert len(scanner.asked) == 1


async def test_a_snapshot_removed_while_it_is_counted(snapshotter: Snapshotter, scanner: Scanner) -> None:
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")
    await scanner.begun.wait()

    async def ask() -> None:
        with pytest.raises(NotFound):
            await snapshotter.usage("base")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await snapshotter.remove("base")
        scanner.go_on.set()
    assert await snapshotter.walk() == []
