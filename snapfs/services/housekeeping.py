"""Housekeeping: directories made ahead, and removed ones deleted, in the background, so that no call waits for either."""

from __future__ import annotations

import logging

import trio

from snapfs.root.layers import Layers
from snapfs.threads import at_last, in_thread, in_thread_at_last

log = logging.getLogger(__name__)


GATHER = 0.02  # seconds after a Remove in which others may come, so that a burst of them costs few threads


class Housekeeping:
    """Pool and trash of one root.  ``run`` must be running for what the others ask for to happen in the background."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._pool_wakeup = trio.Event()
        self._trash_wakeup = trio.Event()
        self.trash_lock = trio.Lock()
        """Held while the trash is being emptied."""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Do what is asked for until cancelled; fills the pool to begin with."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fill_pool, name="snapfs pool")
            nursery.start_soon(self._empty_trash, name="snapfs trash")
            self._pool_wakeup.set()
            task_status.started()

    def fill_pool_if_low(self) -> None:
        """Have directories made if half of them are used up."""
        if self._layers.pool.is_low:
            self._pool_wakeup.set()

    def empty_trash_soon(self) -> None:
        """Have what is in the trash deleted."""
        self._trash_wakeup.set()

    async def empty_trash(self) -> list[OSError]:
        """Delete what is in the trash; returns when it is gone: what can't be deleted, which is logged too.  It is tried again
        after the next Remove and at the next start.  Raises NoThread."""
        async with self.trash_lock:
            try:
                return await in_thread(self._layers.empty_trash, trio.from_thread.check_cancelled)
            except OSError as error:
                error.filename = error.filename or self._layers.trash.directory
                log.warning("cannot empty the trash: %s", error)
                return [error]

    async def _fill_pool(self) -> None:
        while True:
            await self._pool_wakeup.wait()
            self._pool_wakeup = trio.Event()
            try:
                await in_thread_at_last("filling the pool", self._layers.fill_pool, trio.from_thread.check_cancelled)
            except OSError as error:  # Prepare makes its own then, and tells its user
                log.warning("cannot make directories ahead: %s", error)

    async def _empty_trash(self) -> None:
        while True:
            await self._trash_wakeup.wait()
            await trio.sleep(GATHER)
            self._trash_wakeup = trio.Event()
            await at_last("emptying the trash", self.empty_trash)  # each time with the lock: who asks meanwhile hears of it
