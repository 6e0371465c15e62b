"""Serving in the background: the process that was started returns when the tree is mounted, as mount(8) wants it, or when it is
refused."""

from __future__ import annotations

import os
import sys


class Detached:
    """Two processes, from when it is made: the child goes on and serves, the parent waits until the child is ready.  Make it
    before there are threads."""

    def __init__(self, root: str, mountpoint: str) -> None:
        self._what = f"{root} on {mountpoint}"
        sys.stdout.flush()
        sys.stderr.flush()
        self._reads, self._writes = os.pipe()
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

    def ready(self) -> None:
        """In the child: let the parent return, and leave its terminal."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(self._writes, b"1")
        os.close(self._writes)
