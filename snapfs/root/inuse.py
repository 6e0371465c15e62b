"""Whether an overlay has a snapshot's layer as its upper layer: what the kernel says, and what it can't be asked while a
flush is under way."""

from __future__ import annotations

import enum
import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from snapfs.errors import Busy
from snapfs.kernel import mounting
from snapfs.kernel.inuse import UpperLayers
from snapfs.root.layers import Layers

FLUSHING = 1.0  # seconds in which it must turn out whether the close of a copy is a flush


class Free(enum.IntEnum):
    """What is known of a layer whose file system was unmounted here a moment ago."""

    NO = 0
    """Nothing: it was not mounted, or that could not be found out."""
    OF_OVERLAYS = 1
    """No overlay has it as its upper layer, as far as the kernel tells, or /proc."""
    OF_MOUNTS = 2
    """Nor was anything else mounted, in whatever mount namespace, that showed it, when ours was unmounted."""


class Closing:
    """The close of the copy of an overlay that is mounted here no more.

    If no other process has the overlay, the close writes all that the file system below has in memory, and until then the
    kernel says that the layers are in use, though no process can get there any more.

    ``run`` is called in a thread of its own, which may be there before it is known whether there is anything to close: it waits
    for ``begin`` or ``cancel``.  Where none is to be had, ``leave`` says so.  ``written`` tells whether a process had a file of
    the overlay open for writing, so that it could not be made read-only."""

    def __init__(self) -> None:
        self.written = False
        self._copy: int | None = None
        self._seal = False
        self._thread = 0
        self._left = False
        self._deciding = threading.Lock()
        self._decided = threading.Event()
        self._done = threading.Event()

    def begin(self, copy: int, *, seal: bool = False) -> bool:
        """Have the descriptor ``copy`` closed; with ``seal`` the overlay is made read-only before, in case a process has it.
        False where there is no thread for it: the caller is to ``run`` it."""
        with self._deciding:
            self._copy, self._seal = copy, seal
            self._decided.set()
            return not self._left

    def cancel(self) -> None:
        """There is nothing to close, unless it has begun."""
        self._decided.set()

    def leave(self) -> bool:
        """There is no thread for it; False where it has begun, so that the caller is to ``run`` it."""
        with self._deciding:
            self._left = True
            return not self._decided.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it is closed, or is within ``seconds``."""
        return self._done.wait(seconds)

    def run(self) -> None:
        """Close it; blocks on the disk."""
        self._thread = threading.get_native_id()
        self._decided.wait()
        try:
            if self._seal and self._copy is not None:
                mounting.make_file_system_read_only(self._copy)
        except OSError as error:  # a kernel that can't
            self.written = error.errno == errno.EBUSY
        finally:
            if self._copy is not None:
                os.close(self._copy)
            self._done.set()

    def is_flush(self) -> bool:
        """Whether it was the last of the overlay, which is being flushed; False once the close is done, for whatever reason.

        The kernel tells by what the closing thread is at.  Raises Busy where it doesn't within FLUSHING.
        """
        deadline, wait = time.monotonic() + FLUSHING, 0.0002
        while not self._done.wait(wait):
            wait = min(2 * wait, 0.005)
            with suppress(OSError):
                if "generic_shutdown_super" in Path(f"/proc/self/task/{self._thread}/stack").read_text():
                    return True
            if time.monotonic() > deadline:
                raise Busy("it was unmounted a moment ago, and is still being written to the disk: try again")
        return False


class InUse:
    """Asks about the layers of one root.  ``closings``: the copies that are being closed, by snapshot id.  Threads may share
    it."""

    def __init__(self, layers: Layers, uppers: UpperLayers) -> None:
        self.closings: dict[int, Closing] = {}
        self._layers = layers
        self._uppers = uppers

    def close(self) -> None:
        self._uppers.close()

    def has_overlay(self, number: int, *, suspected: bool = False) -> bool:
        """Whether an overlay has the layer of snapshot ``number`` as its upper layer, wherever, as far as the kernel tells.

        What is being flushed counts as gone: no process can get there any more.  If it is not ``suspected``, a layer that
        shows no trace of a mount is not asked for.  Raises OSError where the kernel doesn't tell, and Busy where it will in a
        moment. Blocks.
        """
        try:
            if not suspected and not self._layers.may_be_mounted(number):
                return False
            closing = self.closings.get(number)
            return not (closing is not None and closing.is_flush()) and self._uppers.in_use(self._layers.fs(number))
        except (FileNotFoundError, NotADirectoryError):  # it is a view, or was damaged behind our back: no process can have it
            return False
