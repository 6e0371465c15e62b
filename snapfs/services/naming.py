"""Naming: which processes use a snapshot, in words for a refusal, searched for in threads; and whether any does.

The kernel may hold the lock of a directory meanwhile, which each look-up there needs.  So the time is bounded for which callers
wait for searches: SEARCH seconds for one, HOLD seconds at once for all together, and then AGAIN of each second; for each
snapshot half of that.  Whoever comes beyond that is told what was found last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from contextlib import suppress

import trio

from snapfs.allowance import Allowance
from snapfs.errors import NoThread
from snapfs.kernel.processes import used_devices
from snapfs.threads import in_thread

SEARCH = 0.5  # seconds that one search may take; where less than half of that is left none is begun

HOLD, AGAIN = 1.2, 0.25  # so that who comes last waits for at most HOLD / (1 - AGAIN) seconds

LATELY = 5.0  # seconds for which what was found may be told again

SEARCHES = 16  # threads that look for processes at once, apart from all others: one may never come back


class _Search:
    """What was found last about one snapshot, and when; ``under_way`` until the search has ended that is under way."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.allowed = Allowance(HOLD / 2, AGAIN, clock)
        self.under_way: trio.Event | None = None
        self.found: str | None = None
        self.when = 0.0


class _Walk:
    """One walk of all processes, for the users of ``devices``: those that are used, once it has ended; None where it takes too
    long."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self.is_done = False
        self.used: set[str] | None = None


class Using:
    """Which file systems are used: however many ask at once, there is one walk of all processes at a time."""

    def __init__(self) -> None:
        self._next = _Walk()
        self._walking = trio.Lock()
        self._threads = trio.CapacityLimiter(SEARCHES)

    async def is_used(self, device: str) -> bool | None:
        """Whether a process uses the file system with this ``device``, as all of them are looked at from now on; None where
        that takes longer than SEARCH."""
        walk = self._next  # not that under way, which may have passed by
        walk.devices.add(device)
        async with self._walking:
            if not walk.is_done:
                if self._next is walk:
                    self._next = _Walk()
                look = functools.partial(used_devices, walk.devices, longest=SEARCH)
                walk.used = await in_thread(look, abandon_on_cancel=True, limiter=self._threads)
                walk.is_done = True
        return None if walk.used is None else device in walk.used


class Naming:
    """The searches of one root."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self._allowed: Allowance | None = None  # until the clock runs
        self._last: dict[Hashable, _Search] = {}
        self._threads = trio.CapacityLimiter(SEARCHES)

    async def words(self, what: Hashable, look: Callable[[], str]) -> str | None:
        """What ``look`` gives, in a worker thread, or has given for the same ``what`` a moment ago; None where that takes too
        long."""
        self._forget()
        if self._allowed is None:
            self._allowed = Allowance(HOLD, AGAIN, self._clock)
        search = self._last.get(what) or _Search(self._clock)
        patience = min(SEARCH, search.allowed.left, self._allowed.left)
        if search.under_way is not None:
            await search.under_way.wait()
        elif patience >= SEARCH / 2:
            self._last[what] = search
            search.under_way, began = trio.Event(), self._clock()
            for allowance in (search.allowed, self._allowed):
                allowance.take(patience)  # all of it, for others come meanwhile
            try:
                with trio.move_on_after(patience), suppress(NoThread):
                    search.found = await in_thread(look, abandon_on_cancel=True, limiter=self._threads)
                    search.when = self._clock()
            finally:
                for allowance in (search.allowed, self._allowed):
                    allowance.take(self._clock() - began - patience)
                search.under_way.set()
                search.under_way = None
        return search.found if search.when > self._clock() - LATELY else None

    def _forget(self) -> None:
        for what, search in list(self._last.items()):
            if search.under_way is None and search.allowed.is_full and search.when <= self._clock() - LATELY:
                del self._last[what]
