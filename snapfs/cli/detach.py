"""Serving in the background: whoever started it returns when the tree is mounted, as mount(8) wants it, or with the refusal."""

from __future__ import annotations

import os
import sys


class Detached:
    """Forks when it is made, before there are threads: the child goes on and serves, the parent waits for word from it."""

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
        """In the parent the exit status, once it is known; None in the child."""
        if self._child == 0:
            return None
        os.close(self._writes)
        with open(self._reads, "rb") as word:
            if word.read():
                return 0
        _, status = os.waitpid(self._child, 0)  # it has said why on standard error
        return os.waitstatus_to_exitcode(status) or 1

    def ready(self) -> None:
        """Let the parent return, and let go of its terminal."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(nothing)
        os.write(self._writes, b"1")
        os.close(self._writes)
