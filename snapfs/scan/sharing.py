"""Work in threads that calls at the same time share; each call gets a result that was begun after it.

``Turns`` says how many threads there are, and for whom: whatever one user asks for, the work of the others begins soon, or they
are told to try again.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import trio

from snapfs.errors import Closed, TryAgain
from snapfs.model import BACKGROUND, OWNER, Caller
from snapfs.threads import in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")

ENDING = 2.0  # seconds that work under way has at the end of ``serve``: a file system that never answers would hold it for ever

USERS = 1000  # of which it is known when they had a turn

Checkpoint = Callable[[], None]


class Turns:
    """How many pieces of work may run at once: ``most`` for the owner, ``most`` for all other users, of whom one has half of
    that, and half of it for what goes on in the background.  None of the three waits for another.

    Users are those of ``Caller``.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._running: Counter[int | None] = Counter()
        self._latest: dict[int | None, int] = {}  # the number of the turn that each user had last, the latest at the end
        self._taken = 0

    def latest(self, user: int | None) -> int:
        """The number of the turn that ``user`` had last: the higher, the later; 0 where it had none for long."""
        return self._latest.get(user, 0)

    def has_all(self, user: int | None) -> bool:
        """Whether ``user`` has as many as it may have, however few the others have."""
        return self._running[user] >= (self._most if user is OWNER.user else max(1, self._most // 2))

    def take(self, user: int | None) -> bool:
        """Take one for ``user``, if it may have one more now; whether that is so."""
        if self.has_all(user):
            return False
        apart = (OWNER.user, BACKGROUND.user)
        others = sum(count for whose, count in self._running.items() if whose not in apart)
        if user not in apart and others >= self._most:
            return False
        self._running[user] += 1
        self._taken += 1
        self._latest.pop(user, None)
        self._latest[user] = self._taken
        if len(self._latest) > USERS:
            del self._latest[next(iter(self._latest))]
        return True

    def give_back(self, user: int | None) -> None:
        """What was taken for ``user`` has ended."""
        self._running[user] -= 1
        if not self._running[user]:
            del self._running[user]


class _Stopped(Exception):
    """Nobody needs the work any more; raised in its thread."""


class _Run(Generic[T]):
    """One piece of work, until it has ended."""

    def __init__(self, words: str) -> None:
        self.words = words
        self.turn = trio.Event()  # it may begin
        self.begun = False
        self.users: Counter[int | None] = Counter()  # of calls that share it and have not been cancelled
        self.taken_for: int | None = None  # whose turn it was
        self.scope = trio.CancelScope()
        self.thread = trio.CancelScope(shield=True)  # a thread has its turn for as long as it goes on
        self.ended = trio.Event()
        self.error: Exception | None = None
        self.value: T
        self._stopped = False

    def stop(self) -> None:
        """Have it end soon."""
        self._stopped = True
        self.scope.cancel()

    def checkpoint(self) -> None:
        """Raise _Stopped if it is to end; for its thread."""
        if self._stopped:
            raise _Stopped()


class Sharing(Generic[T]):
    """Runs work by key, in worker threads that ``turns`` bounds; ``serve`` must be running."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._threads = trio.CapacityLimiter(math.inf)
        self._runs: dict[Hashable, _Run[T]] = {}
        self._in_threads: set[_Run[T]] = set()
        self._waiting: list[_Run[T]] = []  # for their turn; of one user's the oldest first
        self._nursery: trio.Nursery | None = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the work until cancelled; then leave to itself what doesn't end within ENDING seconds."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                for run in self._in_threads:
                    run.stop()
                    run.thread.deadline = trio.current_time() + ENDING

    async def run(
        self,
        words: str,
        work: Callable[[Checkpoint], T],
        caller: Caller = OWNER,
        *,
        also: Hashable = None,
        settled: bool = False,
    ) -> T:
        """What ``work`` gives or raises, for ``caller``; ``words`` say what it is, and are its key, together with ``also``.

        Calls with the same key before it has begun share it.  Work that is under way may have passed by what the caller has
        just done, so the call waits for its end and shares the next; where that can't be (``settled``) it shares what is under
        way.  A call that is cancelled stops no other's; once all are, the work is stopped: it should call what it is given now
        and then, and let pass what that raises.

        Raises Closed once ``serve`` has ended, and TryAgain where the work could not be begun within the caller's patience,
        because of others.
        """
        key = (words, also)
        deadline = trio.current_time() + caller.patience
        running = self._runs.get(key)
        if running is not None and running.begun and not settled:
            with trio.move_on_at(math.inf if caller.user in running.users else deadline):
                await running.ended.wait()
            if not running.ended.is_set():
                raise TryAgain("this is just being found out for somebody else, and would be again for you")
        run = self._runs.get(key)
        if run is None:
            if self._nursery is None:
                raise Closed()
            run = self._runs[key] = _Run(words)
            self._waiting.append(run)
            self._nursery.start_soon(self._perform, key, run, work, name=f"snapfs {words}")
        run.users[caller.user] += 1
        self._give_turns()
        try:
            await self._wait_for_turn(run, caller, deadline)
            await run.ended.wait()
        finally:
            run.users[caller.user] -= 1
            run.users += Counter()  # none of those that are gone
            if not run.users and not run.ended.is_set():
                self._forget(key, run)  # a call from now on gets another
                run.stop()
        if run.error is not None:
            raise run.error
        return run.value

    async def _wait_for_turn(self, run: _Run[T], caller: Caller, deadline: float) -> None:
        while True:
            with trio.move_on_at(deadline):
                await run.turn.wait()
            if run.turn.is_set():
                return
            if not self._turns.has_all(caller.user):
                raise TryAgain("as much is being found out for others as can be at once")
            deadline = trio.current_time() + caller.patience  # it waits for other work of its own

    def _give_turns(self) -> None:
        """Let begin what may: first that of users who had no turn for longest, however much others have waiting."""
        for run in sorted(self._waiting, key=lambda run: min(map(self._turns.latest, run.users), default=0)):
            for user in run.users:
                if self._turns.take(user):
                    run.taken_for = user
                    self._waiting.remove(run)
                    run.turn.set()
                    break

    async def _perform(self, key: Hashable, run: _Run[T], work: Callable[[Checkpoint], T]) -> None:
        def begin() -> T:
            run.begun = True
            return work(run.checkpoint)

        try:
            with run.scope:
                await run.turn.wait()
                self._in_threads.add(run)
                with run.thread:
                    run.value = await in_thread(begin, abandon_on_cancel=True, limiter=self._threads)
                if run.thread.cancelled_caught:
                    log.warning("the %s does not end: the disk does not answer; it is not waited for", run.words)
                    run.error = Closed()
        except trio.Cancelled:
            run.error = Closed()
            raise
        except _Stopped:
            run.error = Closed()
        except Exception as error:
            run.error = error
        finally:
            self._in_threads.discard(run)
            self._forget(key, run)
            if run.turn.is_set():
                self._turns.give_back(run.taken_for)
            else:
                self._waiting.remove(run)
            run.ended.set()
            self._give_turns()

    def _forget(self, key: Hashable, run: _Run[T]) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
