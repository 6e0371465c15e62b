"""Serving in the background: the process that was started returns when the tree is mounted, as mount(8) wants it, or when it is
refused."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress

from snapfs.kernel.forks import undisturbed

_DESCRIPTOR = re.compile("/+(?:dev|proc/+(?:thread-)?self)/+fd/+([0-9]+)(?:/|$)")


class Detached:
    """Two processes, from when it is made: the child goes on and serves, the parent waits until the child is ready.  Make it
    before there are threads."""

    def __init__(self, root: str, mountpoint: str) -> None:
        self._what = f"{root} on {mountpoint}"
        sys.stdout.flush()
        sys.stderr.flush()
        self._reads, self._writes = os.pipe()
        with undisturbed():
            self._child = os.fork()
        if self._child == 0:
            os.close(self._reads)
            os.setsid()

    def wait_in_parent(self) -> int | None:
        """In the parent: wait until the child is ready, or has ended, and return the exit status.  In the child: None, at
        once."""
        if self._child == 0:
            return None
        os.close(self._writes)
        with open(self._reads, "rb") as word:
            if word.read():
                return 0
        _, status = os.waitpid(self._child, 0)  # the child has written the reason to standard error
        return os.waitstatus_to_exitcode(status) or 1

    def close_inherited(self, paths: Iterable[str]) -> None:
        """In the child: close what the caller has left open besides the standard streams, for it may wait until nobody has that
        any more (a lock, the other end of a pipe); but not what one of ``paths`` names, as ``/dev/fd/9/root`` does.

        What this process has opened itself has close-on-exec."""
        named = {int(found[1]) for path in paths if (found := _DESCRIPTOR.match(path))}
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the one of this listing is closed by now
                if descriptor > 2 and descriptor not in named and os.get_inheritable(descriptor):
                    os.close(descriptor)

    def ready(self) -> None:
        """In the child: let the parent return, and leave its terminal."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(self._writes, b"1")
        os.close(self._writes)
