"""How many requests may wait at once, for whom, and for how long while others wait for them.

Each request under way takes one of pyfuse3's tasks, and nobody can interrupt it.  So a user who asks for what takes long, many
times at once, must not have all tasks.  There are two bounds, over which a request is refused (TryAgain):

- of each kind that may take long (KINDS), so many requests of one user, and so many of all users together whom the owner lets
  in: a user with ranges in /etc/subuid is 65,536 of them.  The owner and root have a number of their own.
- For some requests the kernel holds a lock: for fsync(2) that of the directory, which each look-up there needs, for a rename
  from one directory to another that of all such renames in the mount.  Who needs the lock too waits in the kernel, where nobody
  counts them, and they have it one after the other.  So what is bounded is the time for which all users but the owner have such
  locks, together: HOLD seconds at once, and then AGAIN of each second.

Making, moving and removing take the lock of the directory, too.  Each is over as soon as its record is durable, but hundreds
of threads queue for the lock in the kernel, and a look-up there waits for all that are before it.  The daemon sees one of them
at a time, and whose it is.  So it knows from how many came lately how long the queue is, and refuses those that are too many
(Crowds): the kernel is through with them in no time.

A directory that is listed is locked too, by libfuse's choice (no FUSE_PARALLEL_DIROPS) even against other listings: a thousand
threads that list it wait for each other in the kernel, and each look-up and mkdir there waits for all of them.  What is locked
must be answered at once; so the number of listings is bounded, and who has to wait does so where nothing is locked, in opendir.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

from snapfs.allowance import Allowance, Shares
from snapfs.errors import TryAgain
from snapfs.tree.attributes import ATTRIBUTES, ROOTFS
from snapfs.tree.reads import started

STAT, SYNC, CLEANUP, LISTING = "stat", "sync", "cleanup", "snapshots"
OPENDIR, CROWDING = "directories", "crowds"

KINDS = frozenset((STAT, SYNC, CLEANUP, LISTING, OPENDIR, CROWDING)) | {
    each.name for each in ATTRIBUTES if each.refresh or each.follow or each.command
}
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
is a thousand requests in the kernel's queue before each page of another listing.  As many of a crowd may wait."""

LISTED = 1.0  # seconds for which a directory counts that is open and not read

OF_ROOTFS = 256  # all the owner's: every process that has a path through the link follows it, and seldom has to wait

ROOM = 136  # tasks for all that is answered soon

MAX_TASKS = (len(KINDS) - 3) * (OF_OWNER + USERS + OF_USERS) + OF_ROOTFS + 2 * (USERS + OPENING) + ROOM
"""For pyfuse3: one that waits takes some 11 KiB of memory (and 1 MiB of addresses), and one that has gone takes nothing."""

PATIENCE = 1.5  # seconds that a request waits for what is done for others

HOLD = 1.2  # seconds; one user may take half of that
AGAIN = 0.25  # so that who comes last waits for at most HOLD / (1 - AGAIN) seconds

CROWD = 1.0
"""Seconds that others wait for whoever waits to change a directory: of all users but the owner, each has the same share."""

RECENT = 1.5  # seconds for which a thread may be in the queue again that has changed something in the directory

TURN = 0.001
"""Seconds at most that the directory counts as locked before a request: for the one before it an answer comes, the next has the
lock, and its name is looked up.  Longer than that nobody may have wanted it."""

THREADS = 10_000  # of one directory: such a turn takes a tenth of a millisecond or more, and so they are CROWD by themselves
DIRECTORIES = 4096

MANY = 64  # threads that change a directory, from which on it is watched which come

PAUSE = 0.5  # seconds that one waits that was refused and comes again: there it keeps nobody else waiting

YOUNG = CROWD / 2
"""Seconds: who waits in such a queue is older.  One shell that starts one mkdir(1) after the other has none waiting."""

ALONE = 600.0
"""Seconds after which somebody who has asked for no name, and opened nothing, uses the tree no more: for so long the kernel may
know the names on the way to a new one, and so that is what the daemon hears of first."""

BETWEEN_DIRECTORIES = 0  # in the place of an inode: what the kernel lets one at a time do in the whole mount

CROWDED = (
    "so many threads of this user are changing this directory at once that whoever else looks up a new name in it would wait "
    "for them for a second or more; have fewer do so"
)

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


class _Crowd:
    """The threads that have lately changed one directory, each with its last request that was not refused."""

    def __init__(self) -> None:
        self.threads: OrderedDict[int, tuple[float, int, float]] = OrderedDict()  # when, whose, how many seconds; latest last
        self.refused: set[int] = set()  # those of them that were refused since
        self.took: dict[int, float] = {}  # by user
        self.waits_until = 0.0  # until when it counts that one was seen that has waited
        self._ended = 0.0  # when the last request was over
        self._counts: Counter[int] = Counter()

    def is_too_long(self, user: int, now: float) -> bool:
        """Whether who comes now would wait for too long, and that is because of ``user``, too."""
        self.forget_old(now)
        return sum(self.took.values()) >= CROWD and self.took.get(user, 0.0) >= CROWD / len(self.took)

    def is_many(self, now: float) -> bool:
        return len(self.threads) >= MANY or now < self.waits_until

    def note(self, thread: int, now: float, user: int, took: float) -> None:
        took += min(max(0.0, now - took - self._ended), TURN)
        self._ended = now
        if thread in self.refused:
            return
        if thread in self.threads:
            self._forget(thread)
        self.threads[thread] = now, user, took
        self._counts[user] += 1
        self.took[user] = self.took.get(user, 0.0) + took
        self.forget_old(now)

    def forget_old(self, now: float) -> None:
        while self.threads:
            thread = next(iter(self.threads))
            if len(self.threads) <= THREADS and self.threads[thread][0] >= now - RECENT:
                return
            self._forget(thread)

    def _forget(self, thread: int) -> None:
        _, user, took = self.threads.pop(thread)
        self.refused.discard(thread)
        self._counts[user] -= 1
        if self._counts[user]:
            self.took[user] -= took
        else:
            del self._counts[user], self.took[user]


class Crowds:
    """Threads of users other than the owner that change the same directories, so that others wait for those that wait to do so.

    A thread is in the queue for a lock once, so nobody waits for longer than the last requests of all threads took that came
    lately.  But one that comes again at once may have the lock before those that wait: it is still running when the next is
    being woken, and the kernel puts up with that for 4 ms.  So a directory that many threads change is ``watched``: the kernel
    may not keep its attributes, and asks for them when a thread is on its way there and has no lock yet.  Who was refused
    waits there, where that keeps nobody else waiting.

    Times are of one clock that is given with each call, in seconds.
    """

    def __init__(self) -> None:
        self.watched: set[int] = set()  # inodes
        self._crowds: OrderedDict[int, _Crowd] = OrderedDict()  # by inode; the last changed is the last
        self._unknown = itertools.count(-1, -1)
        self._user: int | None = None  # who has used the tree last
        self._used = self._used_by_others = -ALONE  # when; and when another than that user did

    def note_use(self, user: int | None, now: float) -> None:
        """``user`` looks something up, opens or changes it: whoever does might have to wait for others."""
        if user != self._user:
            self._user, self._used_by_others = user, self._used
        self._used = now

    def _is_alone(self, user: int, now: float) -> bool:
        return now - (self._used_by_others if user == self._user else self._used) >= ALONE

    def enter(self, directories: Sequence[int], user: int, thread: int, now: float) -> None:
        """``thread`` (0: in a pid namespace that can't be seen from here) is to change ``directories``.  Raises TryAgain where
        too many wait to do that, this user's among them, and somebody else uses the tree."""
        crowds = [self._crowds[inode] for inode in directories if inode in self._crowds]
        for crowd in crowds:
            if not crowd.is_too_long(user, now) or self._is_alone(user, now):
                continue
            if now < crowd.waits_until or not _is_young(thread):
                crowd.waits_until = now + RECENT
                if thread:
                    if thread not in crowd.threads:
                        crowd.note(thread, now, user, 0.0)
                    crowd.refused.add(thread)
                raise TryAgain(CROWDED)
        for crowd in crowds:
            crowd.refused.discard(thread)

    def leave(self, directories: Sequence[int], user: int, thread: int, now: float, took: float) -> list[int]:
        """What ``thread`` was to do is done, or was refused, and took so many seconds.  Of which directories the kernel is to
        forget the attributes."""
        watched = []
        for inode in directories:
            if (crowd := self._crowds.get(inode)) is None:
                crowd = self._crowds[inode] = _Crowd()
                while len(self._crowds) > DIRECTORIES:
                    self.watched.discard(self._crowds.popitem(last=False)[0])
            self._crowds.move_to_end(inode)
            # those that can't be told apart are all taken for others: whoever waits for them must not wait for too many
            crowd.note(thread or next(self._unknown), now, user, took)
            if inode in self.watched or inode == BETWEEN_DIRECTORIES or self._is_alone(user, now):
                continue
            if crowd.is_many(now):
                self.watched.add(inode)
                watched.append(inode)
        return watched

    def comes_again(self, inode: int, user: int | None, thread: int, now: float) -> bool:
        """Whether ``thread``, which is on its way to the watched ``inode``, was refused there, and would be again.  That is
        told once, for it may have the lock when the kernel asks the next time."""
        crowd = self._crowds[inode]
        was_refused = thread in crowd.refused
        crowd.refused.discard(thread)
        if user is None or not was_refused or not crowd.is_too_long(user, now):
            if not crowd.is_many(now):
                self.watched.remove(inode)
                crowd.refused.clear()
            return False
        return not self._is_alone(user, now)


def _is_young(thread: int) -> bool:
    """Whether ``thread`` was started so short a time ago that it can't have waited in a long queue."""
    return bool(thread) and time.clock_gettime(time.CLOCK_BOOTTIME) - started(thread) < YOUNG


class Waiting:
    """The requests of one mount that wait.  A user is None for the owner and root, or a uid."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.listings = Listings(clock)
        self.crowds = Crowds()
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
        of_user, of_users = (OPENING, OPENING) if kind in (OPENDIR, CROWDING) else (OF_USER, OF_USERS)
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
