"""What another user can do with a descriptor that root has opened, and by ways into the tree that need no path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.users import alice

pytestmark = [pytest.mark.mounts, pytest.mark.usefixtures("everybodys_fuse", "users")]

TRIED = """
import ctypes, errno, json, os, sys
from snapfs.kernel import libc

daemon, fd = map(int, sys.argv[1:3])
found = {}

def tries(name, act):
    try:
        act()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]

def handle():
    class Handle(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_char * 128))
    handle, mount = Handle(bytes=128), ctypes.c_int()
    libc.call("name_to_handle_at", fd, b"", ctypes.byref(handle), ctypes.byref(mount), 0x1000)
    libc.call("open_by_handle_at", fd, ctypes.byref(handle), os.O_RDONLY)

for name in sys.argv[3:]:
    tries(f"read {name}", lambda: os.open(name, os.O_RDONLY, dir_fd=fd))
    tries(f"write {name}", lambda: os.open(name, os.O_WRONLY, dir_fd=fd))
tries("create", lambda: os.open("made", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=fd))
tries("mkdir", lambda: os.mkdir("made", dir_fd=fd))
tries("rename", lambda: os.rename("renamed", "again", src_dir_fd=fd, dst_dir_fd=fd))
tries("above", lambda: os.open("..", os.O_RDONLY, dir_fd=os.open("..", os.O_RDONLY, dir_fd=fd)))
tries("chmod", lambda: os.fchmod(fd, 0o777))
tries("handle", handle)
for number in (3, 5, 8):
    tries(f"getfd {number}", lambda: libc.call("syscall", 438, os.pidfd_open(daemon), number, 0))
print(json.dumps(found))
"""


def tried(daemon: Daemon, directory: str | Path, *names: str) -> dict[str, str]:
    """What becomes of all that alice tries with a descriptor of ``directory``, which is open for reading, as root had it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        words = [*alice, sys.executable, "-c", TRIED, str(daemon.pid), str(fd), *names]
        done = subprocess.run(words, pass_fds=[fd], capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture
def served(daemon: Daemon) -> Daemon:
    """A tree of root's which everybody may enter, with the workspace ``w`` on ``b``."""
    mnt = daemon.mnt
    os.mkdir(mnt / "active/b")
    (mnt / "active/b/rootfs/secret").write_text("x")
    (mnt / "active/b/rootfs/secret").chmod(0o600)
    os.rename(mnt / "active/b", mnt / "committed/b")
    os.mkdir(mnt / "committed/b/active/w")
    return daemon


@pytest.fixture
def daemon(make_daemon: object) -> Daemon:
    assert callable(make_daemon)
    started: Daemon = make_daemon("--allow-other").start()
    return started


def test_a_directory_of_the_tree(served: Daemon) -> None:
    found = tried(served, served.mnt / "active/w", "changes", "label.x", "diff", "checkpoint")
    shown = {name: how for name, how in found.items() if how not in ("EACCES", "EPERM", "ENOENT")}
    assert shown == {"above": "done", "read checkpoint": "done"}, "the tree's root, and the list, are for all to see"
    assert found["write checkpoint"] == "EACCES"
    assert found["read changes"] == found["read diff"] == "EACCES"
    assert found["handle"] == "EPERM"
    assert {found[f"getfd {number}"] for number in (3, 5, 8)} == {"EPERM"}


def test_the_file_system_of_a_workspace(served: Daemon) -> None:
    found = tried(served, os.path.realpath(served.mnt / "active/w/rootfs"), "secret")
    assert {name: how for name, how in found.items() if how not in ("EACCES", "EPERM", "ENOENT", "ENOTSUP")} == {}
    assert found["read secret"] == found["write secret"] == found["create"] == found["above"] == "EACCES"
