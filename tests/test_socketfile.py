"""The socket's file, where another user owns the directory that it is in."""

from __future__ import annotations

import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from snapfs.containerd.socketfile import SocketFile, private_umask
from snapfs.errors import Unavailable


def bind(path: str) -> socket.socket:
    """What gRPC does, in a thread as its server has one."""
    bound = socket.socket(socket.AF_UNIX)

    def work() -> None:
        with private_umask():
            bound.bind(path)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return bound


def test_it_is_its_owners_from_the_start(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        place = SocketFile(str(tmp_path / "socket"))
        with bind(place.fresh):
            assert stat.S_IMODE(os.stat(place.fresh).st_mode) == 0o600
            place.put()
        assert stat.S_IMODE(os.stat(tmp_path / "socket").st_mode) == 0o600
        assert os.umask(0) == 0, "another thread's umask was changed"
        place.remove()
        assert os.listdir(tmp_path) == []
    finally:
        os.umask(before)


@pytest.mark.parametrize("when", ["before bind", "after bind"])
def test_what_is_swapped_meanwhile_changes_no_other_file(tmp_path: Path, when: str) -> None:
    (victim := tmp_path / "victim").write_text("root's")
    victim.chmod(0o644)
    (directory := tmp_path / "theirs").mkdir()
    place = SocketFile(str(directory / "socket"))

    def swap() -> None:
        (private,) = directory.iterdir()
        private.rename(tmp_path / "away")
        private.mkdir()
        (private / "s").symlink_to(victim)

    if when == "before bind":
        swap()
    with bind(place.fresh):
        if when == "after bind":
            swap()
        with suppress(Unavailable):  # what they have put there is in the way of being tidied
            place.put()
        place.remove()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o644
    assert victim.read_text() == "root's"
