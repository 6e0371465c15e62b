"""Fixtures: a library on a fresh root, and a daemon on a real mount.

The whole run has a mount namespace of its own, made here before anything is mounted, and every process that it starts dies
with it: whatever interrupts it, nothing stays mounted or running.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs import Snapshotter, open_snapshotter
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table

_CLONE_NEWNS = 0x20000
_MS_PRIVATE = 0x40000
_MS_REC_PRIVATE = 0x4000 | _MS_PRIVATE
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background; what tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    own_mount_namespace()


def own_mount_namespace() -> None:
    """Give this process a mount namespace of which nothing gets out."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        raise pytest.UsageError("the tests mount for real: run them as root, with /dev/fuse")
    if _libc.unshare(_CLONE_NEWNS):
        raise pytest.UsageError(f"no mount namespace to be had: {os.strerror(ctypes.get_errno())}")
    if _libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None):  # in a chroot / is no mountpoint
        for mount in mount_table():
            _libc.mount(b"none", os.fsencode(mount.target), None, _MS_PRIVATE, None)
    for mount in list(mount_table()):
        if mount.type == "fuse.snapfs":  # somebody's outside; the command would find it
            mounting.unmount(mount.target, mounting.MNT_DETACH)
    if os.path.isdir("/dev/shm"):  # what killed processes leave there goes with the namespace
        mounting.mount("none", "/dev/shm", "tmpfs", 0, "mode=1777")


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """For ``preexec_fn``: the child is killed when the test run is."""
    _libc.prctl(_PR_SET_PDEATHSIG, how)


def until(true: Callable[[], object], what: str, shown: Callable[[], str] = str) -> None:
    """Wait for what a program does that can't tell when it has; ``shown`` says what is to be seen instead."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if true():
            return
        time.sleep(0.02)
    raise AssertionError(f"it never came about: {what}{shown()}")


class Daemon:
    """A ``snapfs serve`` of its own process.  ``mnt`` is the mounted tree, ``root`` where its layers are, ``prefix`` a command
    that runs it, ``program`` what the interpreter is given."""

    def __init__(self, root: Path, mnt: Path, *arguments: str) -> None:
        self.root = root
        self.mnt = mnt
        self.arguments = arguments
        self.prefix: tuple[str, ...] = ()
        self.program: tuple[str, ...] = ("-m", "snapfs.cli")
        self.process: subprocess.Popen[str] | None = None
        self.said: list[str] = []
        self.last = ""
        mnt.mkdir(exist_ok=True)

    def start(self) -> Daemon:
        """Start it and wait until it says that it is ready."""
        command = [*self.prefix, sys.executable, *self.program, "serve", str(self.root), str(self.mnt), *self.arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.said.append(line)
            if line.startswith("snapfs: serving "):
                return self
        raise AssertionError(f"the daemon ended with {self.process.wait()}: {self.said}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; its exit status, with all that it said on standard error in ``said``, but for the line that tells
        why it ended, which is ``last``."""
        assert self.process is not None
        assert self.process.stderr is not None
        with self.process:
            lines = self.process.stderr.readlines()
            status = self.process.wait(timeout=30)
        closing = [line for line in lines if line.startswith("snapfs: ended: ")]
        self.said += [line for line in lines if line not in closing]
        assert len(closing) == 1 or status != 0, f"it did not say, or not once, why it ended: {lines}"
        self.last = closing[-1] if closing else ""
        return status

    def error_log(self) -> list[str]:
        """The lines of .snapfs/error_log."""
        return (self.mnt / ".snapfs/error_log").read_text().splitlines()

    def cleanup(self) -> None:
        if self.process is not None:
            with self.process:
                self.process.kill()
        subprocess.run(["umount", "-l", str(self.mnt)], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Make daemons (not yet started) on ROOT ``tmp_path/root`` and ``tmp_path/mnt`` unless told otherwise."""
    made: list[Daemon] = []

    def make(*arguments: str, root: Path | None = None, mnt: Path | None = None) -> Daemon:
        daemon = Daemon(root or tmp_path / "root", mnt or tmp_path / "mnt", *arguments)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.cleanup()


@pytest.fixture(scope="module")
def module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running daemon for all tests of a module, which must not make it complain."""
    base = tmp_path_factory.mktemp("module")
    served = Daemon(base / "root", base / "mnt").start()
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
async def snapshotter(root: Path) -> AsyncIterator[Snapshotter]:
    """The library on a fresh root."""
    async with open_snapshotter(root) as opened:
        yield opened


class DryPool(deque[str]):
    """In place of a pool of ready-made directories: there are never any, so each Prepare makes and flushes its own."""

    def popleft(self) -> str:
        raise IndexError

    def extend(self, _: object) -> None:
        pass


@contextmanager
def loop_mounted(image: Path, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
    try:
        yield target
    finally:
        mounting.unmount(str(target), mounting.MNT_DETACH)


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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 16 MiB on a loop device."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with loop_mounted(image, tmp_path / "disk") as disk:
        yield disk
