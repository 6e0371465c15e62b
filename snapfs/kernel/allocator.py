"""How the C library's allocator hands out memory in this process (mallopt(3))."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def keep_heap_small() -> None:
    """Give the memory of large blocks back when they are freed; for a daemon, before it has threads.

    LMDB takes 3 MiB for each nested transaction, a dictionary of thousands some 600 KiB each time that it grows.  glibc
    learns from the first of these that such blocks come and go, and from then on cuts them out of the heaps, of which it makes
    one for almost each thread.  Small blocks that stay then settle in the holes, and the heaps grow for as long as the daemon
    runs, to several times of what is used.  This costs some fifteen microseconds for each nested transaction.  Other C
    libraries have no mallopt, and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 256 << 10)  # bytes from which on a block has pages of its own; setting it ends the learning
        mallopt(_TRIM_THRESHOLD, 2 << 20)  # bytes at the end of the heap that are kept
        mallopt(_ARENA_MAX, 2)
