"""The capabilities of this thread (capabilities(7)): held back, and raised for the calls that take them."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator

from snapfs.kernel import libc

DAC_OVERRIDE, SYS_ADMIN = 1, 21

NEEDED = 1 << SYS_ADMIN | 1 << DAC_OVERRIDE
"""What mounting an overlay takes in a user namespace; without the second, overlayfs can't enter its own work directory."""

_HEADER = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_SETS = struct.Struct("6I")  # effective, permitted, inheritable: the low words, then the high ones

_PR_CAP_AMBIENT, _RAISE, _CLEAR_ALL = 47, 2, 4

_held = False  # this process holds them back: it has entered a user namespace by itself


def permitted() -> int:
    """The capabilities that may be raised, a bit each."""
    return _get()[1]


def hold_back() -> None:
    """Keep those NEEDED, with none in force: so files, processes and system calls are as for any user.  Raises OSError."""
    global _held
    libc.call("prctl", _PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
    _set(0, permitted() & NEEDED, 0)
    _held = True


def hand_on() -> None:
    """Give those NEEDED to all programs that this process starts from now on.  Raises OSError."""
    _set(0, NEEDED, NEEDED)
    for capability in (SYS_ADMIN, DAC_OVERRIDE):
        libc.call("prctl", _PR_CAP_AMBIENT, _RAISE, capability, 0, 0)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Those that are held back are in force in here."""
    before, allowed, inheritable = _get()
    if not _held or before == allowed:
        yield
        return
    _set(allowed, allowed, inheritable)
    try:
        yield
    finally:
        _set(before, allowed, inheritable)


def _get() -> tuple[int, int, int]:
    buffer = ctypes.create_string_buffer(_SETS.size)
    libc.call("capget", _HEADER, buffer)
    low = _SETS.unpack(buffer.raw)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def _set(*sets: int) -> None:
    words = [part & 0xFFFFFFFF for part in sets] + [part >> 32 for part in sets]
    libc.call("capset", _HEADER, _SETS.pack(*words))
