"""A disk of the test's own, which remembers what a power cut would leave of it, and which fails, or waits, when told to.

The backing file of a loop device is the one file of a small FUSE file system, served by a child process.  The kernel passes on
to it what it would send to a disk: writes, and flushes (loop turns them into fsync).  The child notes all of them, in their
order, in a journal; a place in it is the clock of the disk.  So one run of a test can be cut at any instant, afterwards: a disk
holds what was written before the last flush that had ended, and of what came later whatever it likes, block by block.

The child must not touch what is stored on the disk that it serves, or it would wait for itself: its files are in memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pyfuse3
import trio

from snapfs.kernel import mounting
from tests.processes import die_with_parent

BLOCK = 4096  # what a disk writes whole or not at all; ext4 and xfs don't survive it if their own superblock is torn in 512s

_ENTRY = struct.Struct("=cQI")  # write or flush, offset, length; then the data
_WRITE, _FLUSH = b"w", b"f"
_FAULTS = struct.Struct("=iiiQQqqq")  # errno of reads, writes, flushes; bytes from, up to; spared, then failed, of these done

_MARK = 16  # bytes at the start of a block that is to wait, with zeroes at the end; none: nothing waits

_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
_OPTIONS = {"ext4": "errors=remount-ro", "xfs": "nouuid", "btrfs": ""}  # xfs mounts nothing twice, and an image is it once more
SIZES = {"ext4": 16 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}  # the least that they take; what nobody writes costs nothing


class Write(NamedTuple):
    """Something written to a disk; ``at`` is when it had arrived, by the disk's clock."""

    at: int
    offset: int
    data: bytes


class Disk:
    """A disk with a file system of ``kind`` on it, as ``device``.  Made by ``disk``."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.device = ""
        self.base = directory / "base"
        self._directory = directory
        self._journal = directory / "journal"

    def now(self) -> int:
        """The clock of the disk: how much of its journal is written.  What has been acknowledged happened before."""
        return self._journal.stat().st_size

    def fail(
        self,
        *,
        read: int = 0,
        write: int = 0,
        flush: int = 0,
        start: int = 0,
        end: int = 1 << 62,
        spare: int = 0,
        times: int = 1 << 62,
        done: int = 0,
    ) -> None:
        """From now on answer with these errors; reads and writes only between the bytes ``start`` and ``end``.  None: heal.

        The first ``spare`` of the requests that would fail don't, and no more than ``times`` do.  What the first
        ``done`` of these would have written is written all the same.
        """
        with (self._directory / "faults").open("r+b", buffering=0) as faults:
            faults.write(_FAULTS.pack(read, write, flush, start, end, spare, times, done))

    @contextmanager
    def held(self, mark: bytes) -> Iterator[None]:
        """No write that has ``mark`` at the start of a block is done meanwhile, nor for 20 seconds: who waits is seen."""
        with (self._directory / "mark").open("r+b", buffering=0) as file:
            file.write(mark.ljust(_MARK, b"\0"))
            try:
                yield
            finally:
                os.pwrite(file.fileno(), bytes(_MARK), 0)

    def history(self) -> tuple[list[Write], list[int]]:
        """All writes so far, and when flushes had ended, by the disk's clock."""
        writes, flushes = [], []
        journal = self._journal.read_bytes()
        at = 0
        while at < len(journal):
            what, offset, length = _ENTRY.unpack_from(journal, at)
            start = at + _ENTRY.size
            at = start + (length if what == _WRITE else 0)
            if what == _WRITE:
                writes.append(Write(at, offset, journal[start:at]))
            else:
                flushes.append(at)
        return writes, flushes


def after_power_cut(disk: Disk, history: tuple[list[Write], list[int]], at: int, chance: random.Random, image: Path) -> str:
    """Make ``image`` what a power cut at ``at`` may leave of ``disk``; says in words what it was."""
    writes, flushes = history
    flushed = max((flush for flush in flushes if flush <= at), default=0)
    certain = [write for write in writes if write.at <= flushed]
    doubtful = [write for write in writes if flushed < write.at <= at]
    how = chance.choice(("none", "all", "first", "some", "blocks"))
    if how == "none":
        kept: list[Write] = []
    elif how == "all":
        kept = doubtful
    elif how == "first":  # and the last of these is torn
        kept = doubtful[: chance.randint(0, len(doubtful))]
        if kept:
            last = kept.pop()
            kept.append(last._replace(data=last.data[: chance.randrange(len(last.data) // BLOCK + 1) * BLOCK]))
    elif how == "some":
        kept = [write for write in doubtful if chance.random() < 0.5]
    else:
        kept = [
            Write(write.at, write.offset + start, write.data[start : start + BLOCK])
            for write in doubtful
            for start in range(0, len(write.data), BLOCK)
            if chance.random() < 0.5
        ]
    _copy(disk.base, image)
    with image.open("r+b", buffering=0) as file:
        for write in (*certain, *kept):
            os.pwrite(file.fileno(), write.data, write.offset)
    return f"at {at}, of {len(doubtful)} writes after the last flush: {how}"


@contextmanager
def disk(kind: str, image: Path | None = None, *, parallel: bool = False) -> Iterator[Disk]:
    """A disk with a new file system of ``kind`` on it, or with the one in ``image``; not mounted.

    ``parallel``: what is written doesn't wait for what was written before it, as long as these are less than a dozen requests.
    """
    directory = Path(tempfile.mkdtemp(prefix="snapfs-disk-", dir="/dev/shm"))
    try:
        served = Disk(kind, directory)
        if image is None:
            make_file_system(kind, served.base)
        else:
            _copy(image, served.base)
        _copy(served.base, directory / "image")
        (directory / "journal").touch()
        (directory / "faults").write_bytes(_FAULTS.pack(0, 0, 0, 0, 0, 0, 0, 0))
        (directory / "mark").write_bytes(bytes(_MARK))
        (directory / "fuse").mkdir()
        with _child(directory), loop_device(directory / "fuse/disk", direct=parallel) as served.device:
            yield served
    finally:
        shutil.rmtree(directory)


def make_file_system(kind: str, image: Path, size: int = 0) -> None:
    """Make the file ``image``, with a new file system of ``kind`` in it, of ``size`` bytes or the least that it takes."""
    with image.open("xb") as made:
        made.truncate(size or SIZES[kind])
    subprocess.run([*_MAKE[kind], str(image)], check=True)


def _copy(image: Path, copy: Path) -> None:
    subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)


@contextmanager
def _child(directory: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.disk", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=die_with_parent) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            yield
        finally:
            with suppress(OSError):
                mounting.unmount(str(directory / "fuse"), mounting.MNT_DETACH)
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                raise


@contextmanager
def loop_device(file: Path, *, direct: bool = False) -> Iterator[str]:
    """The path of a loop device over ``file``; ``direct``: which hands on what comes without waiting for what came before."""
    command = ["losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", str(file)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(device: str, kind: str, target: Path, options: str = "") -> Iterator[Path]:
    """The file system on ``device``, mounted at ``target``."""
    target.mkdir(exist_ok=True)
    mounting.mount(device, str(target), kind, 0, ",".join(filter(None, (_OPTIONS[kind], options))))
    try:
        yield target
        mounting.unmount(str(target))
    except BaseException:  # of the test, or something is still open: it says what, and the disk must not stay
        mounting.unmount(str(target), mounting.MNT_DETACH)
        raise


# -- the child


class _RefusedTooLate(pyfuse3.FUSEError):
    """An error in place of the acknowledgement of what was done."""


class _Served(pyfuse3.Operations):
    """One file, ``disk``."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._image = os.open(directory / "image", os.O_RDWR)
        self._journal = os.open(directory / "journal", os.O_WRONLY | os.O_APPEND)
        faults = os.open(directory / "faults", os.O_RDWR)
        self._faults = mmap.mmap(faults, _FAULTS.size)
        mark = os.open(directory / "mark", os.O_RDWR)
        self._mark = mmap.mmap(mark, _MARK)
        self._size = os.fstat(self._image).st_size

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(2, ctx)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = 0o100600 if inode == 2 else 0o040700
        entry.st_nlink = 1
        entry.st_size = self._size if inode == 2 else 0
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._refuse(0, off, size)
        return os.pread(self._image, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        with trio.move_on_after(20) as patience:
            while self._is_held(buf):
                await trio.sleep(0.01)
        if patience.cancelled_caught:
            self._mark[:] = bytes(_MARK)
        try:
            self._refuse(1, off, len(buf))
        except _RefusedTooLate:
            self._write(off, buf)
            raise
        return self._write(off, buf)

    def _write(self, offset: int, data: bytes) -> int:
        os.writev(self._journal, [_ENTRY.pack(_WRITE, offset, len(data)), data])
        return os.pwrite(self._image, data, offset)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._refuse(2, 0, 1 << 62)
        os.write(self._journal, _ENTRY.pack(_FLUSH, 0, 0))

    def _is_held(self, data: bytes) -> bool:
        mark = self._mark[:].rstrip(b"\0")
        return bool(mark) and any(data.startswith(mark, start) for start in range(0, len(data), BLOCK))

    def _refuse(self, what: int, offset: int, size: int) -> None:
        *errors, start, end, spare, times, done = _FAULTS.unpack(self._faults)
        if not errors[what] or offset >= end or offset + size <= start:
            return
        if spare or times:
            left = (spare - 1, times, done) if spare else (0, times - 1, max(done - 1, 0))
            self._faults[:] = _FAULTS.pack(*errors, start, end, *left)
            if not spare:
                raise (_RefusedTooLate if done else pyfuse3.FUSEError)(errors[what])


def _serve(directory: Path) -> None:
    pyfuse3.init(_Served(directory), str(directory / "fuse"), {"fsname=snapfs-test-disk"})
    os.write(1, b"ready\n")
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
