"""Snapshots that the command fills in ROOT itself, and that are to be committed by it alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os

from snapfs.cli import daemon
from snapfs.cli.place import MountedTree
from snapfs.cli.refusal import NOT_PERMITTED, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def refuse_unwritable(place: MountedTree, root: str, begin: str) -> None:
    """Raise Refusal, which begins as ``begin``, unless this user may write in ``root``, the tree's ROOT."""
    if not os.access(f"{root}/snapshots", os.R_OK | os.W_OK | os.X_OK):
        words = f"{root}, where the files would go, is for the user that serves {place.path} alone"
        raise Refusal(f"{begin}: {words}, and for root", NOT_PERMITTED)


@contextlib.contextmanager
def namespaces(place: MountedTree, options: dict[str, Any], begin: str) -> Iterator[str]:
    """For a block: the directory in /proc of the daemon, where it has namespaces of its own, or "".  Raises Refusal, which
    begins as ``begin``."""
    if not options["window"]:
        yield ""
        return
    with contextlib.ExitStack() as held:
        try:
            process = held.enter_context(daemon.proven(place, options["pid"]))
            os.stat(f"{process}/ns/user")
        except OSError as error:
            to_do = "leave the workspace that you stand in, or see whether the daemon is yours"
            words = f"{begin} for the daemon of {place.path}: {error.strerror}: {to_do}"
            raise Refusal(words, NOT_PERMITTED) from None
        yield process


def locked(place: MountedTree, kind: str, name: str, busy: Refusal) -> tuple[int, int]:
    """Id of the snapshot ``name`` of ``kind``, and a descriptor by which this process alone has it locked.  Raises Refusal:
    ``busy`` where another process has it, or it is gone."""
    path = place.directory(kind, name)
    try:
        fd = place.within.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other = place.hold(kind, name)
            is_same = os.fstat(other).st_ino == os.fstat(fd).st_ino
            os.close(other)
            if not is_same:
                raise busy
            number: int = json.loads(place.read(f"{path}/info.json"))["id"]
        except BaseException:
            os.close(fd)
            raise
    except (BlockingIOError, FileNotFoundError):
        raise busy from None
    return number, fd


def label_of(place: MountedTree, directory: str, label: str) -> str:
    """The ``label`` of the snapshot at ``directory``; "" where it has none.  Raises Refusal."""
    path = f"{directory}/labels/{label}"
    return place.read(path).removesuffix("\n") if place.within.exists(path) else ""
