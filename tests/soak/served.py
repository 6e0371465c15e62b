"""``snapfs`` as it is, in a process that can be looked into: on SIGUSR1 it writes a line of JSON, when it is and what it
uses of memory, to the file named first; on SIGUSR2 all its stacks to standard error."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import signal
import sys
import time

from snapfs.cli import main


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


if __name__ == "__main__":
    told = open(sys.argv[1], "a")  # noqa: SIM115
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo

    def tell(*_: object) -> None:
        used = {"blocks": sys.getallocatedblocks(), "heap KiB": mallinfo().uordblks >> 10}
        print(json.dumps([time.monotonic(), used]), file=told, flush=True)

    signal.signal(signal.SIGUSR1, tell)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    sys.exit(main(sys.argv[2:]))
