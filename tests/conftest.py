"""Fixtures: a library on a fresh root, and a daemon on a real mount.

Root's whole run has a mount namespace of its own, made here before anything is mounted, and every process that it starts dies
with it: whatever interrupts it, nothing stays mounted or running.  Where there can be none, tests that are marked ``mounts``
fail, by their mark or because they ask for one of the fixtures that mount; the others run as any user.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
import trio

from snapfs import Snapshotter, open_snapshotter
from snapfs.kernel import mounting
from snapfs.options import Options, Sync
from snapfs.store.metastore import MetaStore
from tests.command import Command
from tests.daemon import Daemon
from tests.home import Home, home_of, with_workspace
from tests.kernel_changes import Chain
from tests.mounts import loop_mounted, own_mount_namespace
from tests.syscalls import EVERY
from tests.users import ALICE, BOB, STAFF, alice, bind

NO_MOUNTS = pytest.StashKey[str]()  # why there can be none
MOUNTING = {"make_daemon", "module_daemon", "everybodys_fuse", "small_disk", "users"}  # fixtures that do


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background; what tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "mounts: it mounts for real, or does what only root may; needs root and /dev/fuse")
    config.addinivalue_line(
        "markers", "alone: it measures time, or what there is on the whole machine: nothing else runs meanwhile"
    )
    config.addinivalue_line(
        "markers", "durable: its root flushes, as everybody's does; those of other tests may be thrown away"
    )
    hypothesis.settings.register_profile("quick", database=None)  # for a clone that is another user's
    try:
        own_mount_namespace()
    except pytest.UsageError as refusal:
        config.stash[NO_MOUNTS] = str(refusal)


def pytest_itemcollected(item: pytest.Item) -> None:
    if not MOUNTING.isdisjoint(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.mounts)


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("mounts") and NO_MOUNTS in item.config.stash:
        pytest.fail(item.config.stash[NO_MOUNTS], pytrace=False)


LONGEST = 600 if EVERY > 1 else 7200
"""Seconds after which a test hangs."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """While a test runs that is marked ``alone``, the other processes of ``pytest -n`` run none.  One that hangs ends its
    process, of which ``pytest -n`` says which test that was, and the others run in another."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with open(__file__) as turnstile, open(f"{os.path.dirname(__file__)}/__init__.py") as room:
        fcntl.flock(turnstile, fcntl.LOCK_EX)  # or who wants to be alone would wait for ever
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            fcntl.flock(room, fcntl.LOCK_UN)  # also for children, which have the file, too


def flushes(request: pytest.FixtureRequest) -> bool:
    """Whether the roots of the test, or of the module, flush: where it is marked ``durable``."""
    return request.node.get_closest_marker("durable") is not None


@pytest.fixture
def make_daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons (not yet started) on ROOT ``tmp_path/root`` and ``tmp_path/mnt`` unless told otherwise; they flush nothing
    unless the test is ``durable``."""
    made: list[Daemon] = []

    def make(*arguments: str, root: Path | None = None, mnt: Path | None = None) -> Daemon:
        daemon = Daemon(root or tmp_path / "root", mnt or tmp_path / "mnt", *arguments, flushes=flushes(request))
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.cleanup()


@pytest.fixture(scope="module")
def module_daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon for all tests of a module, which must not make it complain."""
    base = tmp_path_factory.mktemp("module")
    served = Daemon(base / "root", base / "mnt", flushes=flushes(request)).start()
    try:
        yield served
        assert served.stop() == 0
        assert len(served.said) == 1, "it complained on standard error"
    finally:
        served.cleanup()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A running daemon."""
    return make_daemon().start()


@pytest.fixture
def mnt(daemon: Daemon) -> Path:
    """The mounted tree of a running daemon."""
    return daemon.mnt


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root for the library, not yet made."""
    return tmp_path / "root"


@pytest.fixture
async def snapshotter(request: pytest.FixtureRequest, root: Path) -> AsyncIterator[Snapshotter]:
    """The library on a fresh root, which flushes nothing unless the test is ``durable``."""
    async with open_snapshotter(root, Options(sync=Sync.FULL if flushes(request) else Sync.NONE)) as opened:
        yield opened


@pytest.fixture
def everybodys_fuse(tmp_path: Path) -> Iterator[None]:
    """/dev/fuse for every user, as udev makes it; on a tmpfs, for /tmp may be one without devices."""
    (tmp_path / "devices").mkdir()
    mounting.mount("none", str(tmp_path / "devices"), "tmpfs", 0, "size=1m,mode=755")
    try:
        os.mknod(tmp_path / "devices/fuse", stat.S_IFCHR, os.makedev(10, 229))
        (tmp_path / "devices/fuse").chmod(0o666)
        mounting.mount_bind(str(tmp_path / "devices/fuse"), "/dev/fuse", read_only=False)
        try:
            yield
        finally:
            mounting.unmount("/dev/fuse", mounting.MNT_DETACH)
    finally:
        mounting.unmount(str(tmp_path / "devices"), mounting.MNT_DETACH)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    """Layers made by hand."""
    yield Chain(tmp_path)
    subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)  # however deep


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 16 MiB on a loop device."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 << 20)
    at_once = "lazy_itable_init=0,lazy_journal_init=0"  # so that the kernel writes nothing later that nobody asked for
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", at_once, str(image)], check=True)
    with loop_mounted(image, tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MetaStore]:
    """Records by themselves, which flush nothing unless the test is ``durable``."""
    made = MetaStore(str(tmp_path / "records.mdb"), map_size=1 << 24, sync=flushes(request))
    async with trio.open_nursery() as nursery:
        await nursery.start(made.serve)
        yield made
        made.stop()
    made.close()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """As pytest's; but with ``open_path`` it is not in those, which each other run of root's closes to all users again."""
    if "open_path" not in request.fixturenames:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="open-") as directory:
        path = Path(directory).resolve()
        path.chmod(0o755)
        yield path


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    """``tmp_path``, which every user may enter."""
    return tmp_path


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Alice, Bob and the group staff have names; fusermount3 serves nobody else."""
    lines = {"passwd": [f"alice:x:{ALICE}:{ALICE}::/:", f"bob:x:{BOB}:{BOB}::/:"], "group": [f"snapstaff:x:{STAFF}:bob"]}
    with ExitStack() as stack:
        for name, more in lines.items():
            copy = tmp_path_factory.mktemp("etc") / name
            copy.write_text(Path("/etc", name).read_text().rstrip("\n") + "\n" + "\n".join(more) + "\n")
            copy.chmod(0o644)
            bind(stack, copy, f"/etc/{name}")
        yield


@pytest.fixture
def snapfs(module_daemon: Daemon) -> Iterator[Command]:
    """The command on a tree that is empty before and after."""
    command = Command(module_daemon.mnt)
    yield command
    names = command.names()
    if names:
        command("rm", "-rf", "--", *names)
    assert command.names() == []


@pytest.fixture(params=["alice", "root"])
def anybody(everybodys_fuse: None, users: None, request: pytest.FixtureRequest) -> Iterator[Home]:
    """The home of an ordinary user, and one of root's, each with a daemon, a base ``b`` and the workspace ``w`` on it."""
    with home_of(alice if request.param == "alice" else ()) as home:
        home.daemon.start()
        yield with_workspace(home)
        assert home.daemon.stop() == 0
        assert home.mounts() == []


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where imports keep what they fetch."""
    place = tmp_path / "spool"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    return place
