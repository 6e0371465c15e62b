"""Many clients at once, each a process of its own, so that no interpreter's lock stands between them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from tests.processes import die_with_parent


@dataclass(frozen=True)
class Together:
    """What many clients did: operations a second, and the share of one processor's time that they took themselves."""

    rate: float
    own_share: float


def together(clients: int, each: int, begin: Callable[[int], Callable[[int], object]]) -> Together:
    """Have so many clients do ``each`` operations at once: ``begin(number)`` makes one ready and gives what does operation n.

    Measured from when all are ready until the last is done.
    """
    ready, tell_ready = os.pipe()
    start, tell_start = os.pipe()
    children = []
    for number in range(clients):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                die_with_parent()
                os.close(tell_start)
                act = begin(number)
                os.write(tell_ready, b".")
                os.read(start, 1)  # ends when the parent closes its end
                for operation in range(each):
                    act(operation)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    os.close(start)
    os.close(tell_ready)
    try:
        waiting = clients
        while waiting:
            told = os.read(ready, waiting)
            if not told:
                raise RuntimeError("a client could not begin")
            waiting -= len(told)
        began = time.perf_counter()
    finally:
        os.close(ready)
        os.close(tell_start)
        failed, used = 0, 0.0
        for child in children:
            _, status, usage = os.wait4(child, 0)
            failed += status != 0
            used += usage.ru_utime + usage.ru_stime
    took = time.perf_counter() - began
    if failed:
        raise RuntimeError(f"{failed} of {clients} clients failed")
    return Together(clients * each / took, used / took)
