"""Work in threads that calls at the same time share; each call gets a result that was begun after it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import trio

from snapfs.errors import Closed

T = TypeVar("T")


class _Run(Generic[T]):
    """One piece of work, until it has ended."""

    def __init__(self) -> None:
        self.begun = False
        self.waiting = 0  # calls that share it and have not been cancelled
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.error: Exception | None = None
        self.value: T


class Sharing(Generic[T]):
    """Runs work by key, in worker threads that ``limiter`` bounds; ``serve`` must be running."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._runs: dict[Hashable, _Run[T]] = {}
        self._nursery: trio.Nursery | None = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the work until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises.

        Calls with the same key before it has begun share it.  Work that is under way may have passed by what the caller has
        just done, so the call waits for its end and shares the next.  A call that is cancelled stops no other's; once all are,
        the work is cancelled: it should call ``trio.from_thread.check_cancelled`` now and then.  Raises Closed once ``serve``
        has ended.
        """
        running = self._runs.get(key)
        if running is not None and running.begun:
            await running.ended.wait()
        run = self._runs.get(key)
        if run is None:
            if self._nursery is None:
                raise Closed()
            run = self._runs[key] = _Run()
            self._nursery.start_soon(self._perform, key, run, work, name=f"snapfs {key}")
        run.waiting += 1
        try:
            await run.ended.wait()
        finally:
            run.waiting -= 1
            if not run.waiting and not run.ended.is_set():
                self._forget(key, run)  # a call from now on gets another
                run.scope.cancel()
        if run.error is not None:
            raise run.error
        return run.value

    async def _perform(self, key: Hashable, run: _Run[T], work: Callable[[], T]) -> None:
        def begin() -> T:
            run.begun = True
            return work()

        try:
            with run.scope:
                run.value = await trio.to_thread.run_sync(begin, limiter=self._limiter)
        except trio.Cancelled:
            run.error = Closed()
            raise
        except Exception as error:
            run.error = error
        finally:
            self._forget(key, run)
            run.ended.set()

    def _forget(self, key: Hashable, run: _Run[T]) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
