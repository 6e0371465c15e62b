"""The process that serves a tree: whose namespaces may be joined by what the tree says of it."""

from __future__ import annotations

import os
from contextlib import contextmanager

from snapfs.cli.refusal import NOT_PERMITTED, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from snapfs.cli.place import MountedTree


@contextmanager
def proven(place: MountedTree, pid: int) -> Iterator[str]:
    """For a block: the directory in /proc of process ``pid``, which the tree calls its daemon, open, so that no other process
    gets to be there, as a path for this process.

    Raises Refusal where the process is not this process's user's, or does not hold the tree's FUSE device; OSError."""
    process = os.open(f"/proc/{int(pid)}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{process}"
        if os.stat(process).st_uid != os.geteuid():
            raise Refusal(f"process {pid}, which {place.path} calls its daemon, is another user's: be that user", NOT_PERMITTED)
        if not _serves(path, place.connection()):
            raise Refusal(f"process {pid} does not serve {place.path}, which calls it its daemon: start the daemon anew")
        yield path
    finally:
        os.close(process)


def _serves(process: str, connection: str) -> bool:
    """Whether a process has the FUSE device open on this ``connection``, or, on kernels before 6.16 or so, which don't tell,
    on any."""
    for fd in os.listdir(f"{process}/fd"):
        try:
            if os.readlink(f"{process}/fd/{fd}") == "/dev/fuse":
                with open(f"{process}/fdinfo/{fd}", encoding="ascii") as told:
                    found = [line.split()[1] for line in told if line.startswith("fuse_connection:")]
                if found in ([], [connection]):
                    return True
        except FileNotFoundError:  # it was closed meanwhile
            continue
    return False
