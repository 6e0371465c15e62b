"""``changes`` through a real mount: who asks at once shares a scan, memory and descriptors are bounded, a Commit in the middle
of a scan is not missed, and what can't be told is said in words."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from tests.daemon import Daemon
from tests.processes import until
from tests.refusals import failing
from tests.tree import committed

_REMOUNT = 0x20  # MS_REMOUNT of mount(2)

Make = Callable[..., Daemon]

# Whoever asks for the changes is noted in the file ``asked``.  Each scan says so in the file ``scans``; the first, once it has
# its first line, waits for whoever opens the fifo ``gate``.
GATED = """
import snapfs.cli, snapfs.services.comparing

original, number = snapfs.services.comparing.changes, 0

def gated(layers, **options):
    global number
    number += 1
    mine, lines = number, original(layers, **options)
    line = next(lines)
    with open({scans!r}, "a") as log:
        log.write(f"{{mine}}\\n")
    if mine == 1:
        open({gate!r}).close()
    yield line
    yield from lines

asking = snapfs.services.comparing.Comparing.changes

async def asked(*args):
    with open({asked!r}, "a") as log:
        log.write("asked\\n")
    return await asking(*args)

snapfs.services.comparing.Comparing.changes = asked
snapfs.services.comparing.changes = gated
raise SystemExit(snapfs.cli.main())
"""


class Gated:
    """A daemon whose first scan waits in its middle until it is let go on."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.mnt = daemon.mnt
        self._scans = directory / "scans"
        self._gate = directory / "gate"
        self._asked = directory / "asked"
        self._scans.touch()
        self._asked.touch()
        os.mkfifo(self._gate)
        files = {"scans": str(self._scans), "gate": str(self._gate), "asked": str(self._asked)}
        daemon.program = ("-c", GATED.format(**files))

    @property
    def scans(self) -> int:
        """How many have begun."""
        return len(self._scans.read_text().splitlines())

    def go_on(self) -> None:
        self._gate.write_text("")

    def until_asked(self, times: int) -> None:
        """Wait until so many have asked."""
        until(lambda: len(self._asked.read_text().splitlines()) >= times)


@pytest.fixture
def gated(make_daemon: Make, tmp_path: Path) -> Gated:
    made = Gated(make_daemon(), tmp_path)
    made.daemon.start()
    return made


class Reader(threading.Thread):
    """Sits in a snapshot's directory, whatever becomes of that, and reads ``changes``: the ``text``, or the ``errno``."""

    def __init__(self, snapshot: Path) -> None:
        super().__init__()
        self.directory = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY)
        self.text = ""
        self.errno: int | None = None
        self.start()

    def run(self) -> None:
        try:
            with open(os.open("changes", os.O_RDONLY, dir_fd=self.directory)) as file:
                self.text = file.read()
        except OSError as error:
            self.errno = error.errno
        finally:
            os.close(self.directory)


def test_who_asks_at_once_shares_a_scan(gated: Gated) -> None:
    mnt = gated.mnt
    os.mkdir(mnt / "active/web")
    (mnt / "active/web/diff/a").write_text("")
    first = Reader(mnt / "active/web")
    until(lambda: gated.scans == 1)
    (mnt / "active/web/diff/b").write_text("")  # the first scan has passed by, and is not theirs
    others = [Reader(mnt / "active/web") for _ in range(20)]
    gated.until_asked(21)
    gated.go_on()
    for reader in (first, *others):
        reader.join()
    assert first.text in ("A /a\n", "A /a\nA /b\n")
    assert {reader.text for reader in others} == {"A /a\nA /b\n"}
    assert gated.scans == 2
    assert gated.daemon.stop() == 0


def test_a_commit_during_the_scan(gated: Gated) -> None:
    """It does not wait for the scan, and who reads gets what was committed."""
    mnt = gated.mnt
    os.mkdir(mnt / "active/web")
    layer = Path(os.readlink(mnt / "active/web/diff"))
    (layer / "a").write_text("")
    reader = Reader(mnt / "active/web")
    until(lambda: gated.scans == 1)
    (layer / "b").write_text("")
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert (mnt / "committed/v1/info.json").read_text()
    assert gated.scans == 1
    gated.go_on()
    reader.join()
    assert reader.text == "A /a\nA /b\n"
    assert (mnt / "committed/v1/changes").read_text() == "A /a\nA /b\n"
    scans = gated.scans
    assert scans == 2
    assert (mnt / "committed/v1/changes").read_text() == "A /a\nA /b\n"
    assert gated.scans == scans, "nothing changes it any more"
    assert gated.daemon.error_log() == []
    assert gated.daemon.stop() == 0


def test_a_removal_during_the_scan(gated: Gated) -> None:
    mnt = gated.mnt
    os.mkdir(mnt / "active/web")
    (mnt / "active/web/diff/a").write_text("")
    reader = Reader(mnt / "active/web")
    until(lambda: gated.scans == 1)
    os.rmdir(mnt / "active/web")
    gated.go_on()
    reader.join()
    assert reader.errno == errno.ENOENT
    assert os.listdir(mnt / "active") == []
    assert gated.daemon.stop() == 0


# -- what it takes


def spools(daemon: Daemon) -> list[str]:
    """The nameless files that the daemon has open in its root."""
    found = []
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{daemon.pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith(f"{daemon.root}/") and path.endswith(" (deleted)")]


def resident(daemon: Daemon, what: str) -> int:
    """Bytes of memory: VmRSS, what it has, or VmHWM, the most that it had."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


@pytest.fixture
def in_memory(make_daemon: Make, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose root is in memory, where many files are soon made."""
    with tmpfs(tmp_path / "fast") as fast:
        daemon = make_daemon(root=fast / "root").start()
        yield daemon
        daemon.cleanup()


@contextmanager
def tmpfs(target: Path) -> Iterator[Path]:
    target.mkdir()
    mounting.mount("none", str(target), "tmpfs")
    try:
        yield target
    finally:
        mounting.unmount(str(target), mounting.MNT_DETACH)


def make_files(directory: Path, count: int, length: int) -> None:
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(count):
            os.mknod(f"{number:0{length}}", dir_fd=fd)
    finally:
        os.close(fd)


def test_long_texts_take_a_bounded_number_of_descriptors_and_none_where_they_fail(in_memory: Daemon) -> None:
    mnt = in_memory.mnt
    os.mkdir(mnt / "active/web")
    layer = Path(os.readlink(mnt / "active/web/diff"))
    make_files(layer / "d", 6000, 200)
    most = 0
    with open(mnt / "active/web/changes", "rb") as first:
        begun = first.read(1)
        for number in range(25):
            (layer / f"new{number}").write_text("")
            assert (mnt / "active/web/changes").stat().st_size > 1 << 20
            with open(mnt / "active/web/changes", "rb") as file:
                file.seek(-100, os.SEEK_END)
                assert f"A /new{number}\n".encode() in file.read()
            most = max(most, len(spools(in_memory)))
        assert 1 <= most <= 18
        rest = first.read()
        assert begun + rest.splitlines(keepends=True)[0] == b"A /d\n"
        assert len(rest.splitlines()) == 6001, "who has it open reads what it opened"
    os.rmdir(mnt / "active/web")
    os.mkdir(mnt / "active/odd")
    make_files(Path(os.readlink(mnt / "active/odd/diff")) / "d", 6000, 200)
    target = os.path.dirname(in_memory.root)
    taken = os.statvfs(target)
    size = (taken.f_blocks - taken.f_bfree) * taken.f_frsize + (256 << 10)  # what is left is less than the text takes
    mounting.mount("none", target, "tmpfs", _REMOUNT, f"size={size}")
    before = len(spools(in_memory))
    for _ in range(10):
        with failing(errno.EFBIG):
            (mnt / "active/odd/changes").read_text()
    assert len(spools(in_memory)) <= before
    assert in_memory.stop() == 0


def test_memory_does_not_grow_with_the_lines(in_memory: Daemon) -> None:
    """200,000 lines of 200 bytes each: forty megabytes, were they held."""
    mnt = in_memory.mnt
    os.mkdir(mnt / "active/web")
    layer = Path(os.readlink(mnt / "active/web/diff"))
    (layer / "file").write_text("")
    assert (mnt / "active/web/changes").read_text() == "A /file\n"
    for number in range(200):
        make_files(layer / f"d{number}", 999, 190)
    Path(f"/proc/{in_memory.pid}/clear_refs").write_text("5")  # so that the most is what it has now
    before = resident(in_memory, "VmRSS")
    with open(mnt / "active/web/changes", "rb") as file:
        lines, size = 0, 0
        for line in file:
            lines += 1
            size += len(line)
        assert (lines, size > 39e6) == (200_001, True)
        assert size == os.stat(mnt / "active/web/changes").st_size
    assert resident(in_memory, "VmHWM") - before < 20e6
    assert in_memory.stop() == 0


# -- what can't be told


@pytest.mark.parametrize("which", ["its own", "its parent's"])
def test_a_missing_layer(make_daemon: Make, which: str) -> None:
    daemon = make_daemon("--no-rootfs").start()
    mnt = daemon.mnt
    committed(mnt, "base", content="below")
    os.mkdir(mnt / "committed/base/active/web")
    (mnt / "active/web/diff/a").write_text("")
    os.mkdir(mnt / "active/other")
    assert (mnt / "active/web/changes").read_text() == "A /a\n"
    layer = os.readlink(mnt / ("active/web/diff" if which == "its own" else "committed/base/diff"))
    os.rename(layer, f"{layer}.gone")
    with failing(errno.EIO):
        (mnt / "active/web/changes").read_text()
    words = f"the layer {layer} is missing; restore it from a backup"
    assert f"EIO open active/web/changes: {words}" in daemon.error_log()[-1]
    assert (mnt / "active/other/changes").read_text() == ""
    assert sorted(os.listdir(mnt / "active/web")) == sorted(
        [
            "changes",
            "changes.patch",
            "checkpoint",
            "compare",
            "diff",
            "fork",
            "info.json",
            "labels",
            "mount.sh",
            "mounts.json",
            "parent",
            "rollback",
            "usage.json",
        ]
    )
    os.rename(f"{layer}.gone", layer)
    assert (mnt / "active/web/changes").read_text() == "A /a\n"
    shutil.rmtree(layer)
    with failing(errno.EIO):
        (mnt / "active/web/changes").read_text()
    assert daemon.stop() == 0
