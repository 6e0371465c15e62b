"""No thread can be started for a while, since others have as many as there may be: what is refused says so and succeeds later,
what goes on in the background is done later, and the end waits for nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from snapfs import NoThread, Snapshotter, blocking, open_snapshotter
from snapfs.containerd.server import serving
from snapfs.fuse.cache import KernelCache
from snapfs.options import Options, Sync
from snapfs.store.metastore import MetaStore
from snapfs.threads import in_thread, in_thread_at_last, in_thread_or_here
from tests.daemon import Daemon, refusal
from tests.home import Home, home_of, with_workspace
from tests.mounts import is_mounted
from tests.processes import until
from tests.shortage import SHORT_LIVED, no_threads, no_threads_for, threads_of
from tests.users import alice

WORDS = "no thread or process can be started"

THROWN_AWAY = Options(sync=Sync.NONE)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a thread asks again at once."""
    for module in (
        "threads",
        "snapshotter",
        "services.counting",
        "services.flushing",
        "services.rootfs",
    ):
        monkeypatch.setattr(f"snapfs.{module}.AGAIN", 0.01)


async def come_about(true: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not true():
            await trio.sleep(0.005)


# -- the one place


async def test_only_what_has_not_begun_is_a_want_of_threads() -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start"):
        await in_thread(fail)
    with no_threads():
        with pytest.raises(NoThread, match=WORDS) as refusal:
            await in_thread(fail)
        assert refusal.value.errno == errno.EAGAIN
        with pytest.raises(RuntimeError, match="can't start"):
            await in_thread_or_here(fail)


async def test_a_refusal_keeps_no_turn() -> None:
    limiter = trio.CapacityLimiter(1)
    with no_threads(), pytest.raises(NoThread):
        await in_thread(int, limiter=limiter)
    assert await in_thread(int, limiter=limiter) == 0


async def test_what_must_be_done_is_done_here() -> None:
    with no_threads():
        assert await in_thread_or_here(partial(int, "5")) == 5


async def test_what_may_wait_waits_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    found: list[int] = []

    async def ask() -> None:
        found.append(await in_thread_at_last("counting to five", partial(int, "5")))

    async with trio.open_nursery() as nursery:
        with no_threads():
            nursery.start_soon(ask)
            await trio.sleep(0.1)
            assert not found
    assert found == [5]
    assert caplog.text.count("counting to five has to wait: no thread") == 1


# -- each service


@pytest.mark.durable
async def test_the_flush(snapshotter: Snapshotter, caplog: pytest.LogCaptureFixture) -> None:
    """Also of a snapshot that was committed meanwhile: nothing of it counts as lost."""
    await snapshotter.prepare("a")
    with no_threads():
        await snapshotter.commit("c", "a", wait=False)
        with pytest.raises(NoThread):
            await snapshotter.flush()
        with pytest.raises(NoThread):
            await snapshotter.flush_committed(1, patience=5)
        await snapshotter.prepare("b")
        with pytest.raises(NoThread):
            await snapshotter.commit("d", "b", patience=5)
        assert (await snapshotter.stat("b")).kind == "active"
        assert not snapshotter.flushing.is_flushed(None)
    await come_about(lambda: snapshotter.flushing.is_flushed(None))
    assert not snapshotter.is_lost(1)
    assert caplog.text.count("the flush of the disk has to wait") == 1
    await snapshotter.commit("d", "b", patience=5)


@pytest.mark.durable
async def test_a_commit_that_returns_when_its_data_is_on_the_disk(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("a")
    async with trio.open_nursery() as nursery:
        with no_threads():
            nursery.start_soon(snapshotter.commit, "c", "a")
            await come_about(lambda: snapshotter.record(1).name == "c")
            await trio.sleep(0.05)
            assert not snapshotter.flushing.is_flushed(1)
    assert snapshotter.flushing.is_flushed(1)


async def test_the_counts(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("a")
    await snapshotter.prepare("b")
    (root / "snapshots/2/fs/file").touch()
    with no_threads():
        await snapshotter.commit("c", "a", wait=False)
        for key in "bc":
            with pytest.raises(NoThread):
                await snapshotter.usage(key)
        with pytest.raises(NoThread):
            await snapshotter.changes("b", list)
    await come_about(lambda: snapshotter.record(1).usage)
    assert (await snapshotter.usage("b")).inodes == 2
    assert await snapshotter.changes("b", list) == ["A /file\n"]


async def test_the_trash(snapshotter: Snapshotter, caplog: pytest.LogCaptureFixture) -> None:
    await snapshotter.prepare("a")
    await snapshotter.prepare("b")
    for number in (1, 2):
        Path(snapshotter.layers.fs(number), "file").touch()  # else nothing is left to be deleted
    with no_threads():
        await snapshotter.remove("a")
        await snapshotter.remove("b", wait=False)
        with pytest.raises(NoThread):
            await snapshotter.cleanup()
        assert snapshotter.statistics().trash_waiting == 2
        await trio.sleep(0.05)
    await come_about(lambda: snapshotter.statistics().trash_waiting == 0)
    assert caplog.text.count("emptying the trash has to wait") == 1


async def test_the_pool(snapshotter: Snapshotter) -> None:
    await come_about(lambda: not snapshotter.layers.pool.is_low)
    with no_threads():
        for number in range(200):
            await snapshotter.prepare(f"k{number}")
        assert snapshotter.layers.pool.is_low
    await come_about(lambda: not snapshotter.layers.pool.is_low)


async def test_agreeing(root: Path) -> None:
    """The comparison of a start waits."""
    async with open_snapshotter(root, THROWN_AWAY) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.agreeing.settled.wait()
        snapshotter._root.agrees = False
        again = trio.Event()
        snapshotter.agreeing.settled = again
        async with trio.open_nursery() as nursery:
            with no_threads():
                nursery.start_soon(snapshotter.agreeing.run)
                await trio.sleep(0.05)
                assert not again.is_set()
        assert snapshotter._root.agrees


@pytest.mark.mounts
async def test_mounts(root: Path) -> None:
    """What is mounted stays so, and is unmounted later; what can't be mounted is refused."""
    async with open_snapshotter(root, Options(sync=Sync.NONE, rootfs_idle=0.05)) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.prepare("b")
        target = await snapshotter.mount("a")
        with no_threads():
            with pytest.raises(NoThread):
                await snapshotter.mount("b")
            for call in (partial(snapshotter.commit, "c", "a"), partial(snapshotter.remove, "a")):
                with pytest.raises(NoThread):
                    await call()
            await trio.sleep(0.5)
            assert os.path.ismount(target)
        assert snapshotter.rootfs is not None
        rootfs = snapshotter.rootfs
        await come_about(lambda: not rootfs.count)
        await snapshotter.mount("a")
        await snapshotter.commit("c", "a")
        await snapshotter.mount("b")


@pytest.mark.mounts
@pytest.mark.parametrize("ends", [False, True])
async def test_the_close_of_an_overlay(root: Path, ends: bool) -> None:
    """The last part is done in the background, and at the end if it could not be done before."""
    async with open_snapshotter(root, THROWN_AWAY) as snapshotter:
        assert snapshotter.rootfs is not None
        await snapshotter.prepare("a")
        await snapshotter.mount("a")
        held = snapshotter.rootfs._held[1]
        await snapshotter.rootfs._release(held)
        closings = snapshotter._root.in_use.closings
        with no_threads():
            snapshotter.rootfs._let_go(held)
            await trio.sleep(0.05)
            assert 1 in closings
            if ends:
                await snapshotter.close()
                assert 1 not in closings
        if not ends:
            await come_about(lambda: 1 not in closings)


@pytest.mark.mounts
async def test_what_is_let_go_keeps_no_descriptor_though_it_has_no_copy(root: Path) -> None:
    async with open_snapshotter(root, THROWN_AWAY) as snapshotter:
        assert snapshotter.rootfs is not None
        await snapshotter.prepare("a")
        await snapshotter.mount("a")
        held = snapshotter.rootfs._held[1]
        assert held.copy is not None
        os.close(held.copy)
        held.copy = None  # as where there was no descriptor left for it
        await snapshotter.rootfs._release(held)
        assert held.shelters
        snapshotter.rootfs._let_go(held)
        assert not held.shelters


# -- beginning and ending


@pytest.mark.mounts
@pytest.mark.durable
async def test_the_end(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        target = await snapshotter.mount("a")
        (Path(target) / "file").touch()
        await snapshotter.prepare("b")
        with no_threads():
            await snapshotter.commit("c", "b", wait=False)
            await snapshotter.close()
            assert not os.path.ismount(target)
    with MetaStore(str(root / "metadata.mdb")).reading() as reader:
        assert not reader.unflushed()


async def test_the_beginning(root: Path, tmp_path: Path) -> None:
    with no_threads():
        with pytest.raises(NoThread):
            async with open_snapshotter(root, THROWN_AWAY):
                pass
        with pytest.raises(NoThread):
            await MetaStore(str(tmp_path / "m")).serve()


async def test_the_writer_has_no_thread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first did begin."""
    monkeypatch.setattr("snapfs.store.metastore.in_thread", _refuse)
    with pytest.raises(NoThread):
        async with open_snapshotter(root, THROWN_AWAY):
            pass
    monkeypatch.undo()
    async with open_snapshotter(root, THROWN_AWAY):
        pass


async def _refuse(*_: object, **__: object) -> None:
    raise NoThread()


async def test_the_server_for_containerd_has_no_thread(
    snapshotter: Snapshotter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapfs.containerd.server.in_thread", _refuse)
    with pytest.raises(NoThread):
        async with serving(str(tmp_path / "socket"), snapshotter):
            pass
    assert not (tmp_path / "socket").exists()


def test_the_thread_that_tells_the_kernel_of_names() -> None:
    with no_threads(), pytest.raises(NoThread):
        KernelCache().begin()


def test_the_beginning_for_threads(root: Path) -> None:
    with no_threads(), pytest.raises(NoThread):
        blocking.open_snapshotter(root, THROWN_AWAY)


async def test_a_bug_in_the_background_ends_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes on without it."""
    with pytest.raises(ExceptionGroup) as failed, trio.fail_after(20):
        async with open_snapshotter(root, THROWN_AWAY) as snapshotter:
            await snapshotter.prepare("a")

            def bug(*_: object) -> None:
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr(snapshotter.layers, "fill_pool", bug)
            snapshotter._housekeeping._pool_wakeup.set()
            await trio.sleep_forever()
    assert "ZeroDivisionError" in repr(failed.value)
    async with open_snapshotter(root, THROWN_AWAY) as again:
        assert (await again.stat("a")).id == 1


# -- daemons


@pytest.fixture
def home() -> Iterator[Home]:
    """Alice's, with a daemon whose threads end at once, and the workspace ``w``."""
    with home_of(alice) as home:
        home.daemon.program, home.daemon.flushes = ("-c", SHORT_LIVED), True
        home.daemon.start()
        yield with_workspace(home)


@contextmanager
def no_threads_but_its_own(daemon: Daemon) -> Iterator[None]:
    """The daemon has no thread for work in this block, not even an idle one, and gets none: there are its own, the writer's,
    and the one that tells the kernel of names."""

    def until_ended() -> None:
        until(lambda: threads_of(daemon) <= 3, "its threads have ended", lambda: f": {threads_of(daemon)} threads")

    until_ended()
    with no_threads_for(daemon):
        until_ended()  # one may have begun meanwhile
        yield


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_a_users_daemon(home: Home) -> None:
    home.sh(
        "cd tree; mkdir active/x active/y; touch active/w/rootfs/new active/y/rootfs/f active/x/diff/f; rm active/y/rootfs/f"
    )
    with no_threads_but_its_own(home.daemon):
        for command in ("cat active/w/changes", "cat active/w/usage.json", "sync active/w", "ls active/x/rootfs/"):
            assert "Resource temporarily unavailable" in home.sh(f"cd tree; ! {command} 2>&1")
            assert WORDS in home.last_error()
        home.sh("cd tree; mkdir active/z; rmdir active/x; mv active/z committed/z")
        assert json.loads(home.read(".snapfs/stats.json"))["trash_waiting"] == 1
    assert home.sh("cd tree; sync committed/b; cat active/w/changes") == "A /new\n"
    assert (
        home.sh("cd tree; ls active/w/rootfs/; cat active/y/usage.json > ../usage; mv active/w committed/v")
        == "file\nnew\nsub\n"
    )
    until(lambda: os.listdir(home.root / "trash") == [], "the trash is empty")
    assert home.daemon.stop() == 0
    said = {line.split(" has to wait")[0] for line in home.daemon.said[1:]}
    assert said <= {"snapfs: emptying the trash", "snapfs: the flush of the disk"}


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_a_users_daemon_ends_meanwhile(home: Home) -> None:
    home.sh("cd tree; echo kept > active/w/rootfs/kept")
    with no_threads_but_its_own(home.daemon):
        assert home.daemon.stop() == 0
    assert home.daemon.last == "snapfs: ended: SIGTERM\n"
    assert home.mounts() == []
    assert os.listdir(home.root / "rootfs") == []
    home.daemon = home.another().start()
    assert home.sh("cat tree/active/w/rootfs/kept") == "kept\n"


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_a_users_daemon_without_namespaces_ends_meanwhile() -> None:
    """Unmounting takes a process then; what is left is told, and the next daemon finds it."""
    with home_of(alice) as home:
        home.daemon = home.another("--no-userns").start()
        home.sh("mkdir tree/active/w")
        with no_threads_for(home.daemon):
            assert home.daemon.stop() == 0
        assert f"unmount {home.mnt} with fusermount3 -u -z {home.mnt}" in "".join(home.daemon.said)
        home.daemon.start()
        assert home.sh("ls tree/active") == "w\n"


@pytest.mark.usefixtures("everybodys_fuse", "users")
@pytest.mark.parametrize("options", [(), ("--no-userns",), ("--detach",)])
def test_a_users_daemon_can_start_nothing(options: tuple[str, ...]) -> None:
    with home_of(alice) as home:
        said = refusal(home.root, home.mnt, *options, prefix=(*alice, "prlimit", "--nproc=1"))
        assert said.startswith(f"snapfs: {WORDS}")
        assert home.mounts() == []


BUGGY = """
import os, sys
from snapfs.root.trash import Trash
empty = Trash.empty
def bug(trash, checkpoint):
    if os.listdir(trash._held): raise ZeroDivisionError("a bug")
    return empty(trash, checkpoint)
Trash.empty = bug
from snapfs.cli import main
sys.exit(main())
"""


def test_a_daemon_that_a_bug_has_ended(make_daemon: Callable[..., Daemon]) -> None:
    """It is gone, so that a service manager starts it again."""
    daemon = make_daemon()
    daemon.program = ("-c", BUGGY)
    daemon.start()
    os.mkdir(daemon.mnt / "active/w")
    assert os.listdir(daemon.mnt / "active/w/rootfs/") == []
    (daemon.mnt / "active/w/rootfs/kept").touch()
    os.mkdir(daemon.mnt / "active/x")
    (daemon.root / "snapshots/2/fs/file").touch()  # else nothing goes to the trash
    os.rmdir(daemon.mnt / "active/x")
    assert daemon.ended() == 1
    assert "a bug" in "".join(daemon.said)
    assert "Traceback" in "".join(daemon.said)
    assert daemon.last.startswith("snapfs: ended: ExceptionGroup")
    assert not is_mounted(daemon.mnt)
    assert os.listdir(daemon.root / "rootfs") == []
    daemon.program = ("-m", "snapfs.cli")
    daemon.said.clear()
    daemon.start()
    assert os.listdir(daemon.mnt / "active/w/rootfs/") == ["kept"]
