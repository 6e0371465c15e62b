"""The socket's file, where another user owns the directory that it is in."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from snapfs.containerd.socketfile import SocketFile
from snapfs.errors import Unavailable


def bound(place: SocketFile) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    place.bind(made)
    return made


def test_it_is_its_owners_from_the_start(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        place = SocketFile(str(tmp_path / "socket"))
        with bound(place):
            (made,) = tmp_path.glob("*/s")
            assert stat.S_IMODE(made.stat().st_mode) == 0o600
            place.put()
        assert stat.S_IMODE(os.stat(tmp_path / "socket").st_mode) == 0o600
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
    with bound(place):
        if when == "after bind":
            swap()
        with suppress(Unavailable):  # what they have put there is in the way of being tidied
            place.put()
        place.remove()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o644
    assert victim.read_text() == "root's"
