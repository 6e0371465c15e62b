"""What runs short: disk, records' map, address space, descriptors; and what goes missing behind our back."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

import pytest
import trio

from snapfs import Snapshotter, open_snapshotter
from snapfs.errors import AlreadyExists, Damaged, Unavailable
from snapfs.offline.backup import backup
from snapfs.store.metastore import MetaStore
from snapfs.store.space import RESERVE
from snapfs.store.writing import Writer
from tests.daemon import Daemon
from tests.disk import loop_device, make_file_system, mounted
from tests.processes import until
from tests.records import Held, adding, check_indexes

pytestmark = pytest.mark.durable

Make = Callable[..., Daemon]

# -- the records' map

TINY = 1 << 16  # bytes: what the tables take when they are made


async def test_the_map_grows_while_there_is_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody meets a full map.  Each operation is there once, and what it did besides is done once."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    monkeypatch.setattr("snapfs.store.space.STEP", 1 << 16)
    sizes = {store.map_size}
    undone: list[str] = []
    done: list[str] = []

    def operation(name: str) -> Callable[[Writer], int]:
        def run(writer: Writer) -> int:
            writer.on_failure(lambda: undone.append(name))
            writer.when_durable(lambda: done.append(name))
            return adding(name)(writer)

        return run

    async def add(name: str) -> None:
        await store.write(operation(name))
        sizes.add(store.map_size)

    names = [f"{n:0200d}" for n in range(2000)]
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        async with trio.open_nursery() as adding_all:
            for name in names:
                adding_all.start_soon(add, name)
        store.stop()
    check_indexes(store)
    with store.reading() as reader:
        assert [info.name for info in reader.walk()] == names
        assert reader.last_id() == len(names)
    assert len(sizes) > 3
    assert sorted(done) == names
    assert len(undone) > len(set(undone)) > 0, "a batch was run again, and what it had done undone first"
    store.close()


async def test_a_file_that_is_longer_than_its_blocks_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a backup that somebody else has put back may be; the room that a file has on the disk is kept, and so is what is in
    use, also where its blocks that hold nothing were left out."""
    monkeypatch.setattr("snapfs.store.space.STEP", 1 << 16)
    path, names = tmp_path / "m", [f"{n:0200d}" for n in range(1000)]

    async def add(more: list[str]) -> int:
        """The size of the map with which it was opened."""
        store = MetaStore(str(path), map_size=TINY)
        size = store.map_size
        async with trio.open_nursery() as nursery:
            await nursery.start(store.serve)
            for name in more:
                await store.write(adding(name))
            with store.reading() as reader:
                assert [info.name for info in reader.walk()] == names[: names.index(more[-1]) + 1]
            store.stop()
        check_indexes(store)
        store.close()
        return size

    await add(names[:500])
    length = path.stat().st_size
    assert path.stat().st_blocks * 512 >= length > 3 * RESERVE // 2
    assert await add(names[500:501]) == length - RESERVE, "what was allocated is used again"
    length = path.stat().st_size
    copy = shutil.copyfile(path, tmp_path / "copy")
    subprocess.run(["cp", "--sparse=always", str(copy), str(path)], check=True)
    os.truncate(path, 256 << 20)
    used = path.stat().st_blocks * 512
    assert used < length
    assert await add(names[501:502]) <= length
    assert path.stat().st_blocks * 512 <= length + RESERVE
    await add(names[502:])
    assert length < path.stat().st_blocks * 512 < 3 * length


async def test_an_error_of_the_first_run_is_not_that_of_the_second(tmp_path: Path) -> None:
    """An operation that another one of its batch made fail is run again with it."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    told: list[object] = []

    def refused(writer: Writer) -> None:
        if not told:
            told.append("first")
            raise AlreadyExists("only in the first run")

    def big(writer: Writer) -> None:
        for n in range(400):
            adding(f"{n:0200d}")(writer)

    held = Held(store)
    held.add("refused", refused)
    held.add("big", big)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await held.run()
        store.stop()
    store.close()
    assert held.outcomes == {"refused": None, "big": None}
    assert told == ["first"]


async def test_growing_waits_for_who_reads_and_nobody_else_waits(tmp_path: Path) -> None:
    """LMDB can't resize a map that is in use: who reads in a thread sees its state to the end.  Meanwhile the loop reads on,
    though who begins to read at length waits its turn, so that the writer's comes."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    go_on = threading.Event()
    late_begun = trio.Event()
    order: list[str] = []

    def read(name: str, begun: Callable[[], None]) -> list[str]:
        with store.reading(long=True) as reader:
            found = reader.walk()
            first = [next(found).name]
            trio.from_thread.run_sync(begun)
            assert go_on.wait(20)
            order.append(name)
            return first + [info.name for info in found]

    async def grow() -> None:
        for n in range(1, 400):
            await store.write(adding(f"{n:0200d}"))
        order.append("grown")

    async def read_late() -> None:
        await trio.to_thread.run_sync(read, "late", late_begun.set)

    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await store.write(adding("0"))
        async with trio.open_nursery() as both:
            begun = trio.Event()

            async def read_early() -> None:
                assert await trio.to_thread.run_sync(read, "early", begun.set) == ["0"]

            both.start_soon(read_early)
            await begun.wait()
            both.start_soon(grow)
            while not store.environment.is_changing:
                await trio.sleep(0.001)
            both.start_soon(read_late)
            for _ in range(100):
                await trio.sleep(0.001)
                with store.reading() as outer, store.reading() as inner:
                    assert outer.last_id() == inner.last_id() < 399
            assert store.environment.is_changing
            assert not late_begun.is_set()
            go_on.set()
        store.stop()
    assert order[0] == "early"
    assert sorted(order) == ["early", "grown", "late"]
    check_indexes(store)
    store.close()


def test_the_map_grows_for_who_serves_nobody_and_a_backup_holds_it_all(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    store = MetaStore(str(tmp_path / "root/metadata.mdb"), map_size=TINY)

    def add_many(writer: Writer) -> None:
        for n in range(20_000):
            adding(f"{n:0200d}")(writer)

    store.write_now(add_many)
    assert store.map_size > 1 << 22
    with store.reading() as reader:
        assert reader.wrong_index_entries() == 0
    store.close()
    made = backup(str(tmp_path / "root"), str(tmp_path / "copy"))
    assert made.snapshots == 20_000
    copy = MetaStore(str(tmp_path / "copy"))
    copy.write_now(adding("one more"))
    with copy.reading() as reader:
        assert reader.wrong_index_entries() == 0
    copy.close()


async def test_no_room_for_what_a_directory_says_of_its_snapshot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused like any other want of room, and nothing is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "")

    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("before")
        with monkeypatch.context() as patch:
            patch.setattr("snapfs.root.imprint.write", full)
            with pytest.raises(Unavailable) as caught:
                await snapshotter.prepare("web")
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(root / "snapshots") == ["1"]
        await snapshotter.prepare("web")


# -- the reserve


def removing(name: str) -> Callable[[Writer], None]:
    def operation(writer: Writer) -> None:
        number = writer.id_of(name)
        assert number is not None
        record = writer.record(number)
        assert record is not None
        writer.delete(number, record)

    return operation


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_the_reserve_is_for_removing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """On a full disk, or at the end of a quota, everything is refused that takes room; removing goes on, batch after batch."""
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)
    monkeypatch.setattr("snapfs.store.space.STEP", 1 << 16)

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    async def take_until_refused() -> None:
        """Small writes to one table, which leave but a few pages free: a Remove takes more, since it changes most tables."""
        with pytest.raises(Unavailable, match=os.strerror(code)) as caught:
            for n in count(1):
                await store.write(functools.partial(Writer.mark_unflushed, number=n, boot="x" * 1000))
        assert caught.value.errno == code

    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        names = [f"{n:0200d}" for n in range(60)]
        for name in names:
            await store.write(adding(name))
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", refuse)
            await take_until_refused()
            with pytest.raises(Unavailable):
                await store.write(removing(names[0]))
            held = Held(store)
            held.add("refused", adding("x" * 200))
            held.add("also refused", removing(names[0]))
            await held.run()
            assert all(isinstance(outcome, Unavailable) for outcome in held.outcomes.values())
            while names:
                await store.write(removing(names.pop()), frees=True)
                assert os.path.getsize(store.path) - store.map_size > RESERVE // 2, "the rest is out of reach for others"
                if len(names) == 30:
                    await take_until_refused()
        await store.write(adding("and now"))
        with store.reading() as reader:
            assert [info.name for info in reader.walk()] == ["and now"]
        assert os.path.getsize(store.path) - store.map_size >= RESERVE, "it is whole again"
        store.stop()
    store.close()


def test_a_new_store_on_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    fill(small_disk / "big")
    with pytest.raises(Unavailable, match="No space left") as caught:
        MetaStore(str(small_disk / "m"))
    assert caught.value.errno == errno.ENOSPC
    (small_disk / "big").unlink()
    assert os.listdir(small_disk) == ["lost+found"]
    MetaStore(str(small_disk / "m")).close()


# -- a full disk


def fill(file: Path, until: str = "No space left") -> None:
    """Append to ``file`` until the disk, or the quota, has not one block left."""
    with file.open("ab", buffering=0) as out:
        for size in (1 << 20, 4096, 1):
            with pytest.raises(OSError, match=until):
                while True:
                    out.write(bytes(size))


def stats(daemon: Daemon) -> dict[str, object]:
    found: dict[str, object] = json.loads((daemon.mnt / ".snapfs/stats.json").read_text())
    return found


def answers(daemon: Daemon, name: str) -> None:
    """That the daemon answers what needs no room."""
    assert name in os.listdir(daemon.mnt / "active")
    assert stat.S_ISDIR(os.stat(daemon.mnt / "active" / name).st_mode)
    assert stats(daemon)["snapshots"]
    assert json.loads((daemon.mnt / "active" / name / "mounts.json").read_text())
    assert json.loads((daemon.mnt / "active" / name / "usage.json").read_text())
    assert (daemon.mnt / "active" / name / "changes").read_text().startswith("A /") == (name == "giant")


def test_removing_on_a_full_disk(make_daemon: Make, small_disk: Path) -> None:
    """Whoever fills the disk takes whatever becomes free at once, and still each Remove is done; also after a restart."""
    daemon = make_daemon(root=small_disk).start()
    mnt = daemon.mnt
    (mnt / "active/giant").mkdir()
    big = small_disk / "snapshots/1/fs/big"
    for n in range(100):
        (mnt / f"active/k{n}").mkdir()
    fill(big)
    with pytest.raises(OSError, match="No space left") as refused:
        for n in range(10_000):  # a label of each in turn, so that many pages are taken
            label = mnt / f"active/k{n % 100}/labels/l{n}"
            label.write_text("x" * 3000)
    assert refused.value.errno == errno.ENOSPC
    assert f" ENOSPC write {label.relative_to(mnt)}: " in daemon.error_log()[-1]
    assert not label.exists()
    with pytest.raises(OSError, match="No space left"):
        for n in range(10_000):
            (mnt / f"active/more{n}").mkdir()
    answers(daemon, "giant")
    (mnt / f"active/k{0}").rmdir()
    until(lambda: os.listdir(small_disk / "trash") == [], "what was removed is deleted")
    fill(big)
    assert daemon.stop() == 0
    assert not any("Traceback" in line for line in daemon.said)
    fill(big)

    daemon.start()
    answers(daemon, "giant")
    with pytest.raises(OSError, match="No space left"):
        (mnt / "active/k1/rootfs").readlink()
    assert " ENOSPC readlink active/k1/rootfs: cannot mount" in daemon.error_log()[-1]
    for name in sorted(set(os.listdir(mnt / "active")) - {"giant"}):
        (mnt / "active" / name).rmdir()
        fill(big)
    (mnt / "active/giant").rmdir()
    (mnt / ".snapfs/cleanup").write_text("1")
    assert os.listdir(mnt / "active") == os.listdir(small_disk / "trash") == os.listdir(small_disk / "snapshots") == []
    assert os.statvfs(small_disk).f_bavail * 4096 > 10 << 20
    (mnt / "active/web").mkdir()
    assert os.listdir(mnt / "active/web/rootfs/") == []
    assert daemon.stop() == 0
    assert not any("Traceback" in line for line in daemon.said)


@pytest.mark.mounts
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_all_is_removed_from_a_disk_filled_to_the_last_block(kind: str, tmp_path: Path) -> None:
    """Under a library that has it open, by somebody who takes what becomes free at once.  Each Remove is done, and in the end
    there is room as before."""
    make_file_system(kind, tmp_path / "image")
    with loop_device(tmp_path / "image") as device, mounted(device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root") as snapshotter:
            layers = snapshotter.layers
            await snapshotter.prepare("giant")
            big = Path(layers.fs(1), "big")
            free = os.statvfs(mount).f_bavail
            for n in range(40):
                await snapshotter.prepare(f"k{n}", "base" if n > 20 else None)
                for file in ("a", "b", "c"):
                    Path(layers.fs(n + 2), file).write_bytes(bytes(5000))
                if n in (19, 20):
                    await snapshotter.commit(["base", "other"][n - 20], f"k{n}")
            fill(big)
            os.sync()
            fill(big)
            if kind != "btrfs":  # which keeps its names, and small files, where large ones don't go
                with pytest.raises(Unavailable, match="No space left on device") as refused:
                    for n in range(1000):
                        await snapshotter.prepare(f"more{n}")
                assert refused.value.errno == errno.ENOSPC
            names = [info.name for info in await snapshotter.walk() if info.name not in ("giant", "base")]
            assert len(names) >= 39
            for name in (*names, "base"):
                await snapshotter.remove(name)
                fill(big)
            assert [info.name for info in await snapshotter.walk()] == ["giant"]
            await snapshotter.remove("giant")
            assert os.listdir(layers.snapshots) == os.listdir(layers.trash.directory) == []
            os.sync()
            assert os.statvfs(mount).f_bavail > 0.9 * free
            for n in range(40):
                await snapshotter.prepare(f"k{n}")


@pytest.mark.mounts
@pytest.mark.parametrize("where", ["in the root", "elsewhere"])
async def test_a_quota_that_is_used_up(where: str, tmp_path: Path) -> None:
    """The layers' owner has no more: Prepare says EDQUOT in words, each Remove is done, and then there is room again.

    btrfs at its limit refuses to overwrite a file, even in place; so records in the root have one file to give up, once.
    """
    make_file_system("btrfs", tmp_path / "image")
    with loop_device(tmp_path / "image") as device, mounted(device, "btrfs", tmp_path / "disk") as mount, ExitStack() as ended:
        for command in (("quota", "enable", mount), ("subvolume", "create", mount / "own")):
            subprocess.run(["btrfs", *command], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["btrfs", "qgroup", "limit", "24M", mount / "own"], check=True)
        elsewhere = ended.enter_context(closing(MetaStore(str(tmp_path / "records")))) if where == "elsewhere" else None
        async with open_snapshotter(mount / "own/root", metastore=elsewhere) as snapshotter:
            layers = snapshotter.layers
            await snapshotter.prepare("giant")
            for n in range(40):
                await snapshotter.prepare(f"k{n}")
                Path(layers.fs(n + 2), "file").write_bytes(bytes(5000))
            fill(Path(layers.fs(1), "big"), "Disk quota exceeded")
            for make in (snapshotter.prepare("new"), snapshotter.view("new")):
                with pytest.raises(Unavailable, match=r'cannot .* snapshot "new": Disk quota exceeded') as refused:
                    await make
                assert refused.value.errno == errno.EDQUOT
            assert len(await snapshotter.walk()) == 41
            assert (await snapshotter.usage("k1")).size >= 5000
            for n in range(40):
                await snapshotter.remove(f"k{n}")
                if elsewhere is not None:
                    fill(Path(layers.fs(1), "big"), "Disk quota exceeded")
            await snapshotter.remove("giant")
            assert os.listdir(layers.snapshots) == os.listdir(layers.trash.directory) == []
            os.sync()  # until then btrfs counts what is gone
            await snapshotter.prepare("new")
            Path(layers.fs((await snapshotter.stat("new")).id), "file").write_bytes(bytes(10 << 20))
            assert elsewhere is not None or (mount / "own/root/metadata.mdb-reserve").stat().st_size == RESERVE, "made again"


def test_no_inode_left(make_daemon: Make, small_disk: Path) -> None:
    daemon = make_daemon(root=small_disk).start()
    (daemon.mnt / "active/giant").mkdir()
    with pytest.raises(OSError, match="No space left"):
        for n in range(10_000):
            (small_disk / f"snapshots/1/fs/{n}").touch()
    with pytest.raises(OSError, match="No space left"):
        for n in range(1000):
            (daemon.mnt / f"active/k{n}").mkdir()
    assert f" ENOSPC mkdir active/k{n}: " in daemon.error_log()[-1]
    assert daemon.stop() == 0
    with pytest.raises(OSError, match="No space left"):
        for n in range(10_000):
            (small_disk / f"snapshots/1/fs/more{n}").touch()
    daemon.start()
    answers(daemon, "giant")
    for name in os.listdir(daemon.mnt / "active"):
        (daemon.mnt / "active" / name).rmdir()
    (daemon.mnt / ".snapfs/cleanup").write_text("1")
    assert os.listdir(small_disk / "trash") == []
    (daemon.mnt / "active/web").mkdir()
    assert daemon.stop() == 0


async def test_what_the_trash_has_no_room_for_is_deleted_where_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that must grow to take one more name is refused on a full disk: so nothing depends on the trash."""
    rename = os.rename

    def refuse(source: str, target: str, **fds: int) -> None:
        if "/trash/" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target, **fds)

    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        (root / "snapshots/1/fs/directory").mkdir()
        (root / "snapshots/1/fs/directory/file").write_text("x")
        monkeypatch.setattr(os, "rename", refuse)
        await snapshotter.remove("web")
        assert os.listdir(root / "snapshots") == os.listdir(root / "trash") == []
        assert snapshotter.layers.pending_deletions == 0
        await snapshotter.prepare("web")
        assert (await snapshotter.stat("web")).id == 2


# -- address space and descriptors


def test_little_address_space(make_daemon: Make) -> None:
    """RLIMIT_AS is no reason to end; what is refused for it is refused alone."""
    daemon = make_daemon()
    daemon.prefix = ("prlimit", f"--as={300 << 20}")
    daemon.start()
    for n in range(50):
        (daemon.mnt / f"active/k{n}").mkdir()
    for n in range(600):
        (daemon.mnt / f"active/k{n % 50}/labels/l{n}").write_text("x" * 3000)
    assert os.path.getsize(daemon.root / "metadata.mdb") > 3 << 20, "it grew"
    assert daemon.stop() == 0
    assert not any("Traceback" in line for line in daemon.said)


async def test_no_address_space_to_grow_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MetaStore(str(tmp_path / "m"), map_size=TINY)

    def refuse(more: int) -> None:
        if more > 0:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        with monkeypatch.context() as patch:
            patch.setattr("snapfs.store.environment.refuse_without_address_space", refuse)
            with pytest.raises(Unavailable, match="Cannot allocate memory") as caught:
                for n in range(1000):
                    await store.write(adding(f"{n:0200d}"))
            assert caught.value.errno == errno.ENOMEM
            check_indexes(store)
        await store.write(adding("and now"))
        store.stop()
    store.close()


def descriptors(daemon: Daemon) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_no_descriptors_left(make_daemon: Make, left: int) -> None:
    """Each call works or is refused with EMFILE, in words; none is lost; all is well again when there are some."""
    daemon = make_daemon("--rootfs-idle=0").start()
    mnt = daemon.mnt
    (mnt / "active/b").mkdir()
    (mnt / "active/b/diff/x").mkdir()
    (mnt / "active/b").rename(mnt / "committed/base")
    subprocess.run(["sync", str(mnt / "committed")], check=True)
    for name in ("web", "gone"):
        (mnt / f"committed/base/active/{name}").mkdir()
        (mnt / f"active/{name}/diff/file").write_text("x")
    before = descriptors(daemon)
    resource.prlimit(
        daemon.pid, resource.RLIMIT_NOFILE, (next(number for number in range(4096) if number not in before) + left, 4096)
    )

    refused = 0
    for call in (
        lambda: (mnt / "active/web/mounts.json").read_text(),
        lambda: (mnt / "active/web/usage.json").read_text(),
        lambda: (mnt / "active/web/changes").read_text(),
        lambda: (mnt / "active/web/rootfs").readlink(),
        lambda: (mnt / "committed/base/changes").read_text(),
        lambda: (mnt / "active/new").mkdir(),
        lambda: (mnt / "committed/base/view/peek").mkdir(),
        lambda: (mnt / "active/web/labels/l").write_text("1"),
        lambda: (mnt / "active/new").rename(mnt / "committed/new"),
        lambda: (mnt / "active/gone").rmdir(),
        lambda: (mnt / ".snapfs/cleanup").write_text("1"),
        lambda: (mnt / ".snapfs/stats.json").read_text(),
        lambda: os.listdir(mnt / "active"),
    ):
        lines = len(daemon.error_log())
        try:
            call()
        except OSError as error:
            refused += 1
            assert error.errno == errno.EMFILE
            assert " EMFILE " in daemon.error_log()[lines], "it says so"
            assert "Too many open files" in daemon.error_log()[lines]
    assert refused > 0 or left > 2
    assert sorted(os.listdir(mnt / "committed")) == ["base", "new"]
    assert os.listdir(mnt / "active") == ["web"]

    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    assert (mnt / "active/web/changes").read_text() == "A /file\n"
    assert (mnt / "active/web/rootfs/x").is_dir()
    assert "unflushed" not in (mnt / "committed/new/info.json").read_text()
    (mnt / "committed/new/active/child").mkdir()
    (mnt / ".snapfs/cleanup").write_text("1")
    assert os.listdir(daemon.root / "trash") == []
    assert daemon.stop() == 0
    assert not any("Traceback" in line for line in daemon.said)


@pytest.mark.parametrize("most", range(8, 24))
def test_started_with_few_descriptors(make_daemon: Make, most: int) -> None:
    """It starts, or says in one sentence why not."""
    daemon = make_daemon()
    daemon.prefix = ("prlimit", f"--nofile={most}:4096")
    try:
        daemon.start()
    except AssertionError:
        assert "Too many open files" in daemon.said[-1] or "fuse_session_mount failed" in daemon.said[-1]
        assert not any("Traceback" in line for line in daemon.said)
    else:
        (daemon.mnt / "active/web").mkdir()
        assert daemon.stop() == 0


# -- what goes missing


def gone(path: Path) -> None:
    shutil.rmtree(path)


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("precious")


def link_instead(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("when", ["running", "stopped"])
@pytest.mark.parametrize("part", ["", "/fs", "/work"])
@pytest.mark.parametrize("damage", [gone, file_instead, link_instead])
def test_a_directory_that_is_not_there(make_daemon: Make, damage: Callable[[Path], None], part: str, when: str) -> None:
    """Of a snapshot whose directory is gone, or none, what its record says can be read, and all else is EIO; it can be removed,
    and nothing happens to the others, nor to what stands in its place."""
    daemon = make_daemon().start()
    mnt = daemon.mnt
    (mnt / "active/web").mkdir()
    (mnt / "active/fine").mkdir()
    if when == "stopped":
        assert daemon.stop() == 0
    damage(daemon.root / f"snapshots/1{part}")
    if when == "stopped":
        daemon.start()
    files = ["mounts.json", "mount.sh"] + (["usage.json", "changes"] if part != "/work" else [])
    for name in files:
        with pytest.raises(OSError, match="Input/output error") as refused:
            (mnt / "active/web" / name).read_text()
        assert refused.value.errno == errno.EIO
        assert f" EIO open active/web/{name}: the layer {daemon.root}/snapshots/1" in daemon.error_log()[-1]
    with pytest.raises(OSError, match="Input/output error"):
        (mnt / "active/web/rootfs").readlink()
    assert " EIO readlink active/web/rootfs: the layer " in daemon.error_log()[-1]
    assert json.loads((mnt / "active/web/info.json").read_text())["name"] == "web"
    if part != "/work":
        with pytest.raises(OSError, match="Input/output error"):
            (mnt / "active/web").rename(mnt / "committed/base")
        assert " EIO rename active/web committed/base: the layer " in daemon.error_log()[-1]
    assert json.loads((mnt / "active/fine/mounts.json").read_text())
    assert list((mnt / "active/fine/rootfs").iterdir()) == []
    (mnt / "active/web").rmdir()
    (mnt / ".snapfs/cleanup").write_text("1")
    assert os.listdir(daemon.root / "snapshots") == ["2"]
    assert os.listdir(daemon.root / "trash") == []
    if not part and damage is file_instead:
        assert (daemon.root / "lost+found/1").read_text() == "precious"
    if damage is link_instead:
        assert (daemon.root / ("elsewhere" if not part else "snapshots/elsewhere")).exists() != bool(part)
    assert daemon.stop() == 0
    assert not any("Traceback" in line for line in daemon.said)


@pytest.mark.mounts
async def test_a_parent_that_went_missing(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("a")
    await snapshotter.commit("base", "a")
    await snapshotter.prepare("web", "base")
    (root / "snapshots/1").rename(root / "snapshots/away")
    for call in (
        snapshotter.prepare("k", "base"),
        snapshotter.view("k", "base"),
        snapshotter.mounts("web"),
        snapshotter.changes("web", list),
        snapshotter.mount("web"),
    ):
        with pytest.raises(Damaged, match=f"{root}/snapshots/1 is missing"):
            await call
    (root / "snapshots/away").rename(root / "snapshots/1")
    assert await snapshotter.mounts("web")
    await snapshotter.view("k", "base")


async def test_a_directory_of_others_where_a_snapshot_belongs_or_was(root: Path) -> None:
    """It goes to lost+found with all that is in it, and not the way of a removed layer."""

    def put(number: int, name: str) -> None:
        (root / f"snapshots/{number}/{name}").mkdir(parents=True)
        (root / f"snapshots/{number}/{name}/precious").write_text("x")

    async with open_snapshotter(root) as snapshotter:
        for key in ("a", "b"):
            await snapshotter.prepare(key)
        put(3, "fs")  # a layer that was copied here, say
        put(4, "mine")
        for key in ("c", "d"):
            await snapshotter.prepare(key)
        await snapshotter.remove("a")
        put(1, "mine")
        await snapshotter.cleanup()
        assert sorted(os.listdir(root / "snapshots")) == ["2", "3", "4"]
        await snapshotter.remove("b")
    put(2, "mine")
    put(9, "mine")
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.cleanup()
        assert sorted(os.listdir(root / "snapshots")) == ["3", "4"]
    lost = {path.relative_to(root / "lost+found") for path in root.rglob("precious")}
    assert lost == {Path(path, "precious") for path in ("1/mine", "2/mine", "3/fs", "4/mine", "9/mine")}
    assert os.listdir(root / "trash") == []


async def test_a_file_of_others_in_place_of_the_layer_of_the_next_snapshot(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        (root / "snapshots/1").mkdir()
        (root / "snapshots/1/fs").write_text("precious")
        await snapshotter.prepare("a")
    assert (root / "lost+found/1/fs").read_text() == "precious"
    assert (root / "snapshots/1/fs").is_dir()


async def test_what_stands_where_the_next_snapshot_belongs(root: Path, tmp_path: Path) -> None:
    """Links are never followed, and nothing of others is deleted unseen."""
    (outside := tmp_path / "outside").mkdir()
    (outside / "precious").write_text("x")
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        (root / "snapshots/2").symlink_to(outside)
        (root / "snapshots/3").write_text("precious")
        for key in ("b", "c"):
            await snapshotter.prepare(key)
        await snapshotter.remove("c")
        (root / "snapshots/3").symlink_to(outside)
        (root / "snapshots/new-link").symlink_to(outside)
        await snapshotter.cleanup()
    async with open_snapshotter(root) as snapshotter:
        (root / "snapshots/3").symlink_to(outside)
    async with open_snapshotter(root) as snapshotter:
        assert [info.name for info in await snapshotter.walk()] == ["a", "b"]
        await snapshotter.cleanup()
    assert sorted(os.listdir(root / "snapshots")) == ["1", "2"]
    assert (root / "snapshots/2/fs").is_dir()
    assert sorted(os.listdir(root / "lost+found")) == ["2", "3", "3~1", "3~2", "new-link"]
    assert (root / "lost+found/3").read_text() == "precious"
    assert (outside / "precious").read_text() == "x"


# -- the end


async def test_the_end_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("snapfs.snapshotter.TOLD", 0.01)
    go_on, begun = threading.Event(), threading.Event()

    def slow(writer: Writer) -> None:
        begun.set()
        assert go_on.wait(20)

    async with open_snapshotter(tmp_path / "root") as snapshotter, trio.open_nursery() as nursery:
        nursery.start_soon(snapshotter.records.write, slow)
        await trio.to_thread.run_sync(begun.wait, 20)
        nursery.start_soon(snapshotter.close)
        await trio.to_thread.run_sync(until, lambda: "the end is waiting for the writes under way, and the disk" in caplog.text)
        go_on.set()
