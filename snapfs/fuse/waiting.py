"""How many requests may wait at once, for whom, and for how long while others wait for them.

Each request under way takes one of pyfuse3's tasks, and nobody can interrupt it.  So a user who asks for what takes long, many
times at once, must not have all tasks.  There are two bounds, over which a request is refused (TryAgain):

- of each kind that may take long (KINDS), so many requests of one user, and so many of all users together whom the owner lets
  in: a user with ranges in /etc/subuid is 65,536 of them.  The owner and root have a number of their own.
- For some requests the kernel holds a lock: for fsync(2) that of the directory, which each look-up there needs, for a rename
  from one directory to another that of all such renames in the mount.  Who needs the lock too waits in the kernel, where nobody
  counts them, and they have it one after the other.  So what is bounded is the time for which all users but the owner have such
  locks, together: HOLD seconds at once, and then AGAIN of each second.

A directory that is listed is locked too, by libfuse's choice (no FUSE_PARALLEL_DIROPS) even against other listings: a thousand
threads that list it wait for each other in the kernel, and each look-up and mkdir there waits for all of them.  What is locked
must be answered at once; so the number of listings is bounded, and who has to wait does so where nothing is locked, in opendir.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from snapfs.allowance import Allowance, Shares
from snapfs.errors import TryAgain
from snapfs.tree.attributes import ATTRIBUTES, ROOTFS

STAT, SYNC, CLEANUP, LISTING, OPENDIR = "stat", "sync", "cleanup", "snapshots", "directories"

KINDS = frozenset(
    (STAT, SYNC, CLEANUP, LISTING, OPENDIR, *(each.name for each in ATTRIBUTES if each.refresh or each.follow or each.command))
)
"""What may take long: opening a file whose text is found out, following a link that mounts, writing what is to be done to a
workspace, and the others."""

OF_OWNER, OF_USER = 64, 16  # requests of one kind

USERS, OF_USERS = 64, 32
"""So many users may each have one request of a kind, and all of them together so many besides: who has none has a place,
whatever a few others ask for."""

LISTINGS_OF_USER, LISTINGS_OF_USERS = 8, 32
"""The same for directories that are listed: a page of each, a millisecond, is what another request may have to wait for."""

OPENING = 1024
"""How many more may wait for that, of one user and of all: refused at once, their threads would ask again and again, and that
is a thousand requests in the kernel's queue before each page of another listing."""

LISTED = 1.0  # seconds for which a directory counts that is open and not read

OF_ROOTFS = 256  # all the owner's: every process that has a path through the link follows it, and seldom has to wait

ROOM = 136  # tasks for all that is answered soon

MAX_TASKS = (len(KINDS) - 2) * (OF_OWNER + USERS + OF_USERS) + OF_ROOTFS + USERS + OPENING + ROOM
"""For pyfuse3: one that waits takes some 11 KiB of memory (and 1 MiB of addresses), and one that has gone takes nothing."""

PATIENCE = 1.5  # seconds that a request waits for what is done for others

HOLD = 1.2  # seconds; one user may take half of that
AGAIN = 0.25  # so that who comes last waits for at most HOLD / (1 - AGAIN) seconds

LINES = 5  # in error_log, a second and operation, that say that somebody is to try again

OF_READER, OF_READERS = 10, 50
"""Lines in error_log about requests that need no right to write: of one user at once, and of all users together."""

READERS_AGAIN = 0.1  # of these, how many of one user's there may be again each second; of all users', five times as many


class Listings:
    """The directories that users other than the owner list just now: those that were opened, or of which a page was read,
    within the last LISTED seconds, and are still open.  An open one that nobody reads keeps nobody from listing others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: OrderedDict[int, tuple[int, float]] = OrderedDict()  # the last read is the last
        self._counts: Counter[int] = Counter()
        self._waiting: defaultdict[int, dict[trio.Event, None]] = defaultdict(dict)  # by user, in the order of coming

    async def begin(self, fh: int, user: int) -> None:
        """As ``note``, but wait until others of the user have ended, up to PATIENCE seconds, behind those that wait already."""
        if user not in self._waiting:
            with suppress(TryAgain):
                return self.note(fh, user)
        waiting, turn = self._waiting[user], trio.Event()
        waiting[turn] = None
        try:
            with trio.move_on_after(PATIENCE):
                await turn.wait()
        finally:
            waiting.pop(turn, None)
            if not waiting:
                self._waiting.pop(user, None)
        return self.note(fh, user)

    def note(self, fh: int, user: int) -> None:
        """``user`` opens or reads the directory ``fh``.  Raises TryAgain where too many are listed already."""
        now = self._clock()
        if fh not in self._found:
            while self._found and next(iter(self._found.values()))[1] < now - LISTED:
                self.end(next(iter(self._found)))
            own, users = self._counts.get(user, 0), len(self._counts)
            if own >= LISTINGS_OF_USER:
                raise TryAgain("as many directories as one user may list at once are being listed already")
            if len(self._found) - users >= LISTINGS_OF_USERS if own else users >= USERS:
                raise TryAgain("as many directories as users may list at once are being listed already")
            self._counts[user] += 1
        self._found[fh] = user, now
        self._found.move_to_end(fh)

    def end(self, fh: int) -> None:
        """Nobody lists the directory ``fh`` any more."""
        if (found := self._found.pop(fh, None)) is not None:
            user, _ = found
            self._counts[user] -= 1
            if not self._counts[user]:
                del self._counts[user]
            for turn in self._waiting.get(user, ()):
                if not turn.is_set():
                    turn.set()
                    break


class Waiting:
    """The requests of one mount that wait.  A user is None for the owner and root, or a uid."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.listings = Listings(clock)
        self._counts: Counter[tuple[str, int | None]] = Counter()
        self._users: Counter[str] = Counter()  # who have one
        self._of_users: Counter[str] = Counter()  # what they have besides
        self._held = Shares((HOLD / 2, AGAIN), (HOLD, AGAIN), clock)
        self._of_readers = Shares((OF_READER, READERS_AGAIN), (OF_READERS, 5 * READERS_AGAIN), clock)
        self._lines: defaultdict[str, Allowance] = defaultdict(lambda: Allowance(LINES, LINES, clock))

    @contextmanager
    def counted(self, kind: str | None, user: int | None) -> Iterator[None]:
        """For the time that a request of this kind (None: one that waits for nothing) may wait.  Raises TryAgain where too many
        do already."""
        if kind is None:
            yield
            return
        assert kind in KINDS
        of_user, of_users = (OPENING, OPENING) if kind == OPENDIR else (OF_USER, OF_USERS)
        most = of_user if user is not None else OF_ROOTFS if kind == ROOTFS else OF_OWNER
        if self._counts[kind, user] >= most:
            raise TryAgain(f"as many requests of this user as may be are waiting already ({kind})")
        if user is not None:
            besides = self._counts[kind, user] > 0
            if self._of_users[kind] >= of_users if besides else self._users[kind] >= USERS:
                raise TryAgain(f"as many requests of other users as may be are waiting already ({kind})")
            (self._of_users if besides else self._users)[kind] += 1
        self._counts[kind, user] += 1
        try:
            yield
        finally:
            self._counts[kind, user] -= 1
            besides = self._counts[kind, user] > 0
            if not besides:
                del self._counts[kind, user]
            if user is not None:
                (self._of_users if besides else self._users)[kind] -= 1

    @contextmanager
    def holding(self, user: int | None) -> Iterator[float]:
        """For a request that the kernel holds a lock for: how many seconds it may take to wait."""
        if user is None:
            yield PATIENCE
            return
        allowed, began = max(0.0, self._held.left(user)), self._clock()
        self._held.take(user, allowed)  # all of it, for others come meanwhile
        try:
            yield allowed
        finally:
            self._held.take(user, self._clock() - began - allowed)

    def is_news(self, operation: str) -> bool:
        """Whether error_log is to have a line that says that somebody is to try ``operation`` again: many have had one lately,
        and would push out what else is there."""
        lines = self._lines[operation]
        if lines.left < 1:
            return False
        lines.take(1)
        return True

    def is_readers_news(self, user: int) -> bool:
        """Whether error_log is to have a line about a request of ``user`` that was refused and needs no right to write: so few
        are written that it takes hours until they have pushed out what was there."""
        if self._of_readers.left(user) < 1:
            return False
        self._of_readers.take(user, 1)
        return True
