"""Whether an overlay has a directory as its upper layer, in whatever mount namespace, attached or not: the kernel knows.

overlayfs marks the upper directory of each overlay for as long as the overlay lives, and refuses to mount a second overlay that
has the directory among its layers, if the second has ``index=on``.  So this module tries such a mount, which mounts nothing
either way and leaves nothing behind.  A bind is no overlay, and is not noticed.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from snapfs.kernel import mountapi
from snapfs.kernel.spare import Spare

_FREE = (0, errno.ESTALE, errno.EINVAL)
"""How the kernel answers the trial for a directory that no overlay has as its upper layer."""


class UpperLayers:
    """Asks the kernel which directories overlays have as upper layers.  Made by ``choose``.  Threads may share one; ``close``
    it."""

    def __init__(self, ask: Callable[[str, str], None] | None, own: int = -1) -> None:
        self._ask = ask
        self._own = own
        self._spare = Spare(2)  # the directory's, and the trial's
        self._lock = threading.Lock()  # two trials at once would find each other's upper layer in use

    @classmethod
    def choose(cls, directory: str, mounted: Callable[[], int]) -> UpperLayers:
        """One that asks in the way that works on this kernel and with these privileges, or else in none (``works``).

        It is tried on ``directory``: ``mounted`` mounts an overlay that has the directory as its upper layer, and returns a
        descriptor; closing that unmounts the overlay.
        """
        try:
            own = _private_tmpfs()
        except OSError:
            return cls(None)
        for ask in (_as_lower, _as_both):
            probe = cls(ask, own)
            with suppress(OSError):
                mount = mounted()
                try:
                    sees = probe.in_use(directory)
                finally:
                    os.close(mount)
                if sees and not probe.in_use(directory):
                    return probe
            probe._spare.close()
        os.close(own)
        return cls(None)

    @property
    def works(self) -> bool:
        """Whether the kernel can be asked here at all."""
        return self._ask is not None

    def close(self) -> None:
        """Close all descriptors; from now on ``works`` is False."""
        if self._own >= 0:
            os.close(self._own)
        self._own, self._ask = -1, None
        self._spare.close()

    def in_use(self, directory: str) -> bool:
        """Whether an overlay has ``directory`` as its upper layer; False where the kernel can't be asked.

        Raises OSError where the kernel fails to answer.
        """
        with self._lock:
            ask = self._ask
            return ask is not None and self._spare.give_to(lambda: self._tried(directory, ask))

    def _tried(self, directory: str, ask: Callable[[str, str], None]) -> bool:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            ask(f"/proc/self/fd/{self._own}", f"/proc/self/fd/{fd}")
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            if error.errno not in _FREE:
                raise
        finally:
            os.close(fd)
        return False


def _as_lower(own: str, directory: str) -> None:
    """Try an overlay that has ``directory`` as a lower layer, which it can't change, and all other layers in a file system of
    ours, open as ``own``.  Raises OSError.

    Our empty layer must be the first lower one: it is of that one that the kernel notes the origin.
    """
    with _context() as context:
        mountapi.set_string(context, "lowerdir", f"{own}/empty:{directory}")
        mountapi.set_string(context, "upperdir", f"{own}/upper")
        mountapi.set_string(context, "workdir", f"{own}/work")
        mountapi.set_string(context, "index", "on")
        mountapi.create(context)


def _as_both(own: str, directory: str) -> None:
    """Try an overlay that has ``directory`` as its upper layer and as its work directory, which the kernel refuses, after it
    has looked at the mark.  Raises OSError, always.

    This is for user namespaces, where ``_as_lower`` does not notice the mark.  The kernel logs a line.
    """
    with _context() as context:
        mountapi.set_string(context, "lowerdir", f"{own}/empty")
        mountapi.set_string(context, "upperdir", directory)
        mountapi.set_string(context, "workdir", directory)
        mountapi.set_string(context, "index", "on")
        mountapi.create(context)


@contextmanager
def _context() -> Iterator[int]:
    context = mountapi.fsopen("overlay")
    try:
        yield context
    finally:
        os.close(context)


def _private_tmpfs() -> int:
    """A descriptor of a file system in memory that is attached nowhere, with the directories that the trials need."""
    context = mountapi.fsopen("tmpfs")
    try:
        mountapi.create(context)
        own = mountapi.fsmount(context)
    finally:
        os.close(context)
    try:
        for name in ("empty", "upper", "work"):
            os.mkdir(name, dir_fd=own)
    except OSError:
        os.close(own)
        raise
    return own
