"""Mounts of the tests: a mount namespace that nothing gets out of, and what is mounted in it."""

from __future__ import annotations

import ctypes
import filecmp
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapfs import Mount
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_id, mount_table

_CLONE_NEWNS = 0x20000
_MS_PRIVATE = 0x40000
_MS_REC_PRIVATE = 0x4000 | _MS_PRIVATE

_libc = ctypes.CDLL(None, use_errno=True)


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


@contextmanager
def loop_mounted(image: Path, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
    try:
        yield target
    finally:
        mounting.unmount(str(target), mounting.MNT_DETACH)


def copy_as_cut(image: Path, copy: Path) -> Path:
    """Copy ``image``, on which a disk is mounted, as a power cut would leave it: all blocks of one moment, though something is
    written meanwhile, and nothing flushed that isn't."""
    while True:
        shutil.copyfile(image, copy)
        if filecmp.cmp(image, copy, shallow=False):  # no block has changed since it was copied
            return copy


@contextmanager
def mounted(spec: Sequence[Mount], target: Path) -> Iterator[Path]:
    """``spec`` mounted on ``target`` with mount(8), as any client would."""
    target.mkdir(exist_ok=True)
    done = 0
    try:
        for mount in spec:
            kind = ["-t", mount.type] if mount.type != "bind" else []
            command = ["mount", *kind, "-o", ",".join(mount.options), mount.source, str(target)]
            subprocess.run(command, check=True)
            done += 1
        yield target
    finally:
        for _ in range(done):
            mounting.unmount(str(target))


def is_mounted(path: Path) -> bool:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ")[4] == str(path) for line in table)


@contextmanager
def unanswering(*targets: Path) -> Iterator[None]:
    """For a block: file systems of another user's on directories and files, which answer nothing.  Who waits for them for a
    minute is let go, and the test fails."""
    devices, ours = [], set()
    kinds = ["100644" if target.is_file() else "40755" for target in targets]  # before one of them is asked in vain
    for target, kind in zip(targets, kinds, strict=True):
        with suppress(FileExistsError):
            target.mkdir()
        devices.append(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        options = f"fd={devices[-1]},rootmode={kind},user_id=60001,group_id=60001,allow_other"
        mounting.mount("x", str(target), "fuse", 0, options)
        ours.add(mount_id(str(target)))
    late = threading.Event()

    def let_go() -> None:
        late.set()
        for device in devices:
            os.close(device)

    timer = threading.Timer(60, let_go)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if not late.is_set():
            let_go()
            late.clear()
        for mount in [mount for mount in mount_table() if mount.id in ours]:  # wherever they are by now
            with suppress(OSError):
                mounting.unmount(mount.target, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
    assert not late.is_set(), "it has waited for a server that never answers"
