"""Work in threads, where one may not be had for a while: the limit of processes counts threads, and others can use it up.

trio knows two ends of what a thread is asked for: a result, and what the work has raised.  Here is the third: it never began.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import trio

from snapfs.errors import NoThread

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

AGAIN = 1.0  # seconds after which what goes on in the background asks for a thread again


async def in_thread(
    work: Callable[[*Ts], T], *args: *Ts, abandon_on_cancel: bool = False, limiter: trio.CapacityLimiter | None = None
) -> T:
    """``trio.to_thread.run_sync``; raises NoThread where no thread can be started: then ``work`` has not been called."""
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return work(*args)

    name = f"{getattr(work, '__name__', None)} from {trio.lowlevel.current_task().name}"  # as trio names it
    try:
        return await trio.to_thread.run_sync(begin, thread_name=name, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    except RuntimeError:
        if begun:
            raise
        raise NoThread() from None


async def in_thread_or_here(work: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter | None = None) -> T:
    """``in_thread``, for what must be done now, as at an end: where no thread can be started it is done in the loop's own."""
    try:
        return await in_thread(work, *args, limiter=limiter)
    except NoThread:
        return work(*args)


async def in_thread_at_last(what: str, work: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter | None = None) -> T:
    """``in_thread``, for what goes on in the background, which is ``what`` (``at_last``)."""
    return await at_last(what, lambda: in_thread(work, *args, limiter=limiter))


async def at_last(what: str, do: Callable[[], Awaitable[T]]) -> T:
    """``do``, again and again until a thread can be started for it.  ``what`` that is, in words for the log."""
    told = False
    while True:
        try:
            return await do()
        except NoThread as error:
            if not told:
                log.warning("%s has to wait: %s", what, error)
                told = True
            await trio.sleep(AGAIN)
