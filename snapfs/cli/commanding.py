"""Writing into the files of a snapshot that do what is written there (``tree/commands.py``), and asking again for what the tree
puts off."""

from __future__ import annotations

import errno
import time

from snapfs.cli.place import key_of
from snapfs.cli.refusal import NOT_FOUND, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from snapfs.cli.place import MountedTree
    from snapfs.cli.progress import Progress

_OF = {"active": "a workspace is an active snapshot", "committed": "only committed snapshots can be squashed"}


SYNC = ("opendir", "fsyncdir")
"""What a sync of a directory asks of the tree."""

AGAIN = 0.2  # seconds until what the tree refuses for the moment is tried again


def persistently(call: Callable[..., object], *arguments: object) -> None:
    """Call ``call`` with ``arguments`` until the tree says nothing of trying again (EAGAIN): it does so where others would have
    to wait while it writes files to the disk."""
    progress: Progress | None = None
    began = time.monotonic()
    try:
        while True:
            try:
                call(*arguments)
            except BlockingIOError as error:
                if error.errno != errno.EAGAIN:
                    raise
                if progress is None:
                    from snapfs.cli.progress import Progress

                    progress = Progress()
                progress.show_waiting("writing its files to the disk", time.monotonic() - began)
                time.sleep(AGAIN)
            else:
                return
    finally:
        if progress is not None:
            progress.clear()


def commanded(
    place: MountedTree,
    kind: str,
    key: str,
    command: str,
    text: str,
    what: str,
    call: Callable[..., object] = persistently,
    *,
    held: int | None = None,
) -> str:
    """Write ``text`` into the file ``command`` of the snapshot ``key`` of ``kind``, by means of ``call``: the key or name that
    comes of it, or "".  ``what`` is what is being done, in words that go on from "cannot ".  ``held`` is the directory of the
    snapshot that is meant, where it is open (``MountedTree.hold``): another may have the key by now.  Raises Refusal."""
    result: list[str] = []
    path = f"{place.directory(kind, key)}/{command}"
    try:
        place.do(what, ["open", "write"], call, lambda path: result.append(place.write_command(path, text, held)), path)
    except Refusal as refused:
        there = place.kind_of(key) if refused.status == NOT_FOUND else kind
        if there is None:
            raise place.missing(key) from None
        if there != kind:
            raise Refusal(f'"{key}" is {there}: {_OF[kind]}', NOT_FOUND) from None
        raise
    return key_of(result[0])
