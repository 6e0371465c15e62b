"""Whether an overlay has a snapshot's layer as its upper layer: what the kernel says, and what it can't be asked while a
flush is under way."""

from __future__ import annotations

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


class Closing:
    """The close of the copy of an overlay that is mounted here no more.

    If no other process has the overlay, the close writes all that the file system below has in memory, and until then the
    kernel says that the layers are in use, though no process can get there any more.

    With ``seal`` the overlay is made read-only before, in case a process has it after all; ``written`` then tells whether a
    process has a file of it open for writing, so that it could not be made so."""

    def __init__(self, copy: int, *, seal: bool = False) -> None:
        self.written = False
        self._copy = copy
        self._seal = seal
        self._thread = 0
        self._done = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Whether it is closed, or is within ``seconds``."""
        return self._done.wait(seconds)

    def run(self) -> None:
        """Close it; blocks on the disk."""
        self._thread = threading.get_native_id()
        try:
            if self._seal:
                mounting.make_file_system_read_only(self._copy)
        except OSError as error:  # a kernel that can't
            self.written = error.errno == errno.EBUSY
        finally:
            os.close(self._copy)
            self._done.set()

    def is_flush(self) -> bool:
        """Whether it was the last of the overlay, which is being flushed; False once the close is done, for whatever reason.

        The kernel tells by what the closing thread is at.  Raises Busy where it doesn't within FLUSHING.
        """
        deadline = time.monotonic() + FLUSHING
        while not self._done.wait(0.001):
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
