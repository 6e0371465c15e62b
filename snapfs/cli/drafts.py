"""Snapshots that the command fills in ROOT itself, and that are to be committed by it alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os

from snapfs.cli import daemon
from snapfs.cli.place import MountedTree
from snapfs.cli.refusal import NOT_FOUND, NOT_PERMITTED, Refusal
from snapfs.kernel import processes

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


def locked(place: MountedTree, root: str, kind: str, name: str, busy: Refusal, *, is_new: bool = False) -> tuple[int, int]:
    """Id of the snapshot ``name`` of ``kind``, and a descriptor by which this process alone has it locked.  What is locked is
    its directory in ``root``, the tree's ROOT: that in the tree others may open, too, and who may open it may lock it.

    Raises Refusal: ``busy`` where another process has it, or it is gone.  Where ROOT is not to be seen, one that ``is_new``,
    which this process has just made, is removed again."""
    path = place.directory(kind, name)
    number = _id_of(place, path, busy)
    try:
        fd = os.open(f"{root}/snapshots/{number}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise Refusal(f"cannot lock {root}/snapshots/{number}: {error.strerror}", NOT_PERMITTED) from None
        if _id_of(place, path, busy) != number:
            raise busy from None
        if is_new:
            place.remove(kind, name, number)
        words = f"{root}/snapshots/{number}, where the files would go, is not to be seen here"
        raise Refusal(f"{words}: do this where the daemon runs") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _id_of(place, path, busy) != number:
            raise busy
    except BlockingIOError:
        by = processes.locker(fd)
        os.close(fd)
        raise (Refusal(f"{busy} (process {by})", busy.status) if by else busy) from None
    except BaseException:
        os.close(fd)
        raise
    return number, fd


def _id_of(place: MountedTree, path: str, gone: Refusal) -> int:
    """The id of the snapshot at ``path``.  Raises Refusal: ``gone`` where there is none."""
    try:
        number: int = json.loads(place.read(f"{path}/info.json"))["id"]
    except Refusal as refused:
        raise (gone if refused.status == NOT_FOUND else refused) from None
    return number


def label_of(place: MountedTree, directory: str, label: str) -> str:
    """The ``label`` of the snapshot at ``directory``; "" where it has none.  Raises Refusal."""
    path = f"{directory}/labels/{label}"
    return place.read(path).removesuffix("\n") if place.within.exists(path) else ""
