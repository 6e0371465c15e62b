"""Rootfs: when the merged file systems are mounted at ROOT/rootfs/<id>/fs, and for how long.

A mount costs a worker thread some hundred microseconds when it is first asked for, nothing afterwards.  It is unmounted when
no process has used it for ``idle`` seconds, when there are more than ``most`` and it is the one that was asked for longest
ago, when its snapshot is committed or removed, and at the end.  How it is mounted, and that no upper layer ever is twice, is
``root/merged.py``'s.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from snapfs.errors import Busy, Closed, NoThread, Unavailable
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.kernel.processes import is_alive
from snapfs.kernel.spare import Spare
from snapfs.root import holders
from snapfs.root.inuse import Closing, Free, InUse
from snapfs.root.layers import Layers
from snapfs.root.merged import Held, Merged, Stack, by_users
from snapfs.root.mounted import Mounted
from snapfs.services.locks import Locks
from snapfs.services.naming import SEARCH, Naming, Using
from snapfs.threads import AGAIN, in_thread, in_thread_or_here

log = logging.getLogger(__name__)

GRACE = 0.25  # seconds after a call for it in which a mount does not make room for another: the caller is about to go there

PASSING = 0.02  # seconds that a caller may need from learning the path to being there: Commit and Remove wait so long at most

WRITTEN = 60.0  # seconds for which ``give_up`` waits for the disk at most

MUCH = 16 << 20  # bytes in memory that the kernel has yet to write, from which on no call may wait for that


class Rootfs:
    """The mounts of one root: at most ``most``, each for ``idle`` seconds after its last use.  ``run`` must be running."""

    def __init__(self, merged: Merged, layers: Layers, mounted: Mounted, in_use: InUse, *, idle: float, most: int) -> None:
        self.idle = idle
        self.most = most
        self.followed = 0
        """How many file systems were mounted so far, also those that others had mounted."""
        self.naming = Naming()
        self._merged = merged
        self._layers = layers
        self._mounted = mounted
        self._in_use = in_use
        self._held: dict[int, Held] = {}
        self._locks = Locks()
        self._making_room = trio.Lock()
        self._threads = trio.CapacityLimiter(8)
        self._using = Using()
        self._closing = trio.CapacityLimiter(math.inf)  # each may wait for the disk, and nothing may wait for them
        self._coming = 0  # mounts that room was made for
        self._under_way: dict[int, tuple[int, float]] = {}  # thread (-id: unknown): the snapshot to which it goes, since when
        self._nursery: trio.Nursery | None = None
        self._still_written: Callable[[int], Awaitable[None]] | None = None
        self._spare = Spare(1)  # which the end needs

    @property
    def count(self) -> int:
        """How many are mounted."""
        return len(self._held)

    def holds(self, number: int) -> bool:
        """Whether the file system of snapshot ``number`` is mounted here."""
        return number in self._held

    def device_of(self, number: int) -> str | None:
        """The device (``major:minor``) of the file system of snapshot ``number``, if that is mounted here and an overlay."""
        held = self._held.get(number)
        return held.device or None if held is not None else None

    # -- life

    async def run(self, still_written: Callable[[int], Awaitable[None]], task_status: trio.TaskStatus[None]) -> None:
        """Unmount what is not used, until cancelled; then everything.

        ``still_written`` is told of each snapshot that a process went on writing which could not be found before."""
        self._still_written = still_written
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    await trio.sleep(max(self.idle, GRACE) / 4)
                    for number in list(self._held):
                        await self._expire(number)
        finally:
            self._nursery = None  # from here on nothing more is mounted
            self._spare.close()
            with trio.CancelScope(shield=True):
                for number in {*self._held, *self._locks}:
                    async with self._locks.held(number):
                        if number in self._held:
                            await in_thread_or_here(self._merged.end, self._held.pop(number))

    def recover(self, is_right: Callable[[int], bool]) -> None:
        """Take over what a crashed daemon left mounted (``Merged.recover``), before ``run``.  Blocks."""
        self._held = self._merged.recover(is_right)

    def close(self) -> None:
        """For one that never ran."""
        self._spare.close()
        for held in self._held.values():
            held.close_copy()

    # -- mounting

    async def mount(self, number: int, stack: Callable[[], Stack], thread: int = 0) -> str:
        """Have the file system of snapshot ``number`` mounted: where.

        ``stack`` is asked for what to mount when that is to be done; it may raise.  What another process has mounted is
        mounted here too, and no second overlay.  ``thread`` is about to go there, and tells by its next request that it has
        (``arrived``); 0 where the caller is not known.

        Raises Damaged where a layer is missing, Unavailable where the kernel refuses (with its words), Busy where ``most``
        others are mounted and all in use, or the upper layer is in use where it can't be got from."""
        if number not in self._locks and self._is_there(number):  # a task with the lock may be unmounting it
            return self._told(number, thread)
        async with self._locks.held(number):
            if self._is_there(number):
                return self._told(number, thread)
        # room may take a while, so without the lock: a Commit or Remove would wait for it, and the whole tree for that
        async with self._room(), self._locks.held(number):
            if not self._is_there(number):
                self.followed += 1
                work = functools.partial(self._merged.mount, number, stack(), self._held.get(number))
                held = await in_thread(work, limiter=self._threads)
                held.asked = trio.current_time()
                self._held[number] = held
            return self._told(number, thread)

    def _told(self, number: int, thread: int) -> str:
        """Where the file system of snapshot ``number`` is, for ``thread``, which is on its way from now on."""
        now, key = trio.current_time(), thread or -number
        self._under_way.pop(key, None)
        while self._under_way and next(iter(self._under_way.values()))[1] < now - PASSING:
            del self._under_way[next(iter(self._under_way))]
        self._under_way[key] = number, now
        return self._layers.rootfs(number)

    def arrived(self, thread: int) -> None:
        """``thread`` makes another request: it is where it was about to go."""
        if thread:
            self._under_way.pop(thread, None)

    def _last_arrival(self, number: int) -> float:
        """When all will be there who are on their way to the file system of snapshot ``number``."""
        return max(
            (
                since + PASSING
                for thread, (where, since) in list(self._under_way.items())
                if where == number and (thread < 0 or is_alive(thread))
            ),
            default=-math.inf,
        )

    def _is_there(self, number: int) -> bool:
        """Note that snapshot ``number`` was asked for; whether it is mounted here, and no user has unmounted it by hand."""
        held = self._held.get(number)
        if held is None:
            return False
        held.asked = trio.current_time()
        with suppress(OSError):
            if mount_id(self._layers.rootfs(number)) == held.mount:
                return True
        # something may be mounted over it
        return any(mount.id == held.mount and mount.target == self._layers.rootfs(number) for mount in mount_table())

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """Hold one of the ``most`` places."""
        async with self._making_room:
            if self._nursery is None:
                raise Closed()
            while len(self._held) + self._coming >= self.most:
                await self._make_room()
            self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def _make_room(self) -> None:
        """Unmount the one that was asked for longest ago among those that no process uses."""
        now = trio.current_time()
        waiting = False
        for number, held in sorted(self._held.items(), key=lambda item: item[1].asked):
            if number in self._locks:
                waiting = True
            elif now - held.asked < GRACE:
                await trio.sleep(held.asked + GRACE - now)
                return
            else:
                with suppress(OSError, Busy):
                    async with self._locks.held(number):
                        if self._held.get(number) is held:
                            await self._release(held)
                            self._let_go(held)
                        return
        if not waiting and not self._coming:
            raise Busy(f"{self.most} file systems are mounted and all in use: leave some, or raise rootfs_max")
        await trio.sleep(GRACE)

    # -- unmounting

    @asynccontextmanager
    async def unmounted(self, number: int) -> AsyncIterator[Free]:
        """For a block in which snapshot ``number`` must not be mounted here; gives what is known of its layer by that.

        Raises Busy while a process uses it, wherever; then it is mounted as before, or in use where it can't be got from.
        Where it could not be found out wholly, no process can write into it once the block has ended without an error.
        """
        async with self._locks.held(number):
            held = self._held.get(number)
            if held is None:
                if number in self._merged.left:
                    try:
                        await in_thread(self._merged.forget_copies, number, limiter=self._threads)
                    except OSError as error:
                        log.warning("cannot remove %s: %s", self._layers.shelter(number), error)
                yield Free.NO
                return
            # no call answers with the path from here on: a caller in between would find the directory beneath
            if trio.current_time() < (arrival := self._last_arrival(number)):
                await trio.sleep_until(arrival)
            try:
                try:
                    free = await self._end_use(held)
                except OSError as error:
                    raise Unavailable.from_os("unmount its file system", error) from error
                yield free
                held.seal = bool(free)
            finally:  # not before: a journal that is made durable meanwhile waits for what is being flushed
                if self._held.get(number) is not held:
                    self._let_go(held)

    async def give_up(self, numbers: Iterable[int]) -> None:
        """Unmount those of the snapshots ``numbers`` that are mounted here, and return when they are written to the disk, which
        the kernel can't be asked about before: for a caller that needs many of them unmounted at once.  Who needs one of them
        meanwhile waits for that one alone, and may have it mounted again.  Raises as ``unmounted``."""
        given_up = [number for number in numbers if number in self._held]
        for number in given_up:
            async with self.unmounted(number):
                pass
        for number in given_up:
            closing = self._in_use.closings.get(number)
            if closing is not None:
                await in_thread(closing.wait, WRITTEN, limiter=self._closing)

    async def _end_use(self, held: Held) -> Free:
        """``_release`` it; Busy is raised where another process has its overlay.

        Once it is unmounted only a mount that is attached nowhere can have it, or a descriptor.  The kernel tells when our own
        copy is closed, which flushes the disk.  Where that would take long, it is looked for a process that has it, as far as
        /proc shows them, and the copy is left open."""
        if held.device and (not self._merged.flushes or _unwritten() < MUCH):
            await self._release(held, Closing())
            return Free.OF_MOUNTS if held.alone else Free.OF_OVERLAYS
        await self._release(held)
        if not held.device:
            return Free.NO
        with trio.move_on_after(SEARCH):
            is_used = await self._using.is_used(held.device)
            if is_used is not None and not is_used:
                return Free.OF_OVERLAYS
            if is_used:
                await in_thread_or_here(self._merged.attach_again, held, limiter=self._threads)
                self._held[held.number] = held
                raise await self._elsewhere(held)
        self._let_go(held)
        if await in_thread(self._in_use.has_overlay, held.number, limiter=self._threads):
            raise await self._elsewhere(held)
        return Free.OF_OVERLAYS

    async def _release(self, held: Held, closing: Closing | None = None) -> None:
        """Unmount what is held, whose lock is held, and hold it no more.  With ``closing``, which is new, the copy is closed by
        that at once, and the kernel is asked whether a process has the overlay even so: all in one thread, while that of
        ``closing`` is being started, for somebody waits for it.

        Raises Busy if a process uses it, and OSError.  It is held as before then, unless only the kernel's answer told.
        """
        target = self._layers.rootfs(held.number)
        if closing is not None:
            if self._merged.flushes:
                self._close_soon(held.number, closing)
            else:  # it is over at once
                closing.leave()

        def release() -> bool:
            if not self._merged.give_up(held, is_asked=closing is not None):
                return False
            del self._held[held.number]
            if closing is None:
                return True
            self._close_copy(held, closing)
            return not self._in_use.has_overlay(held.number, suspected=True)  # it has the traces of ours

        try:
            if await in_thread(release, limiter=self._threads):
                return
        except OSError as error:
            if error.errno != errno.EBUSY or held.number not in self._held:
                raise
            by = await self.naming.words(("users", held.number), functools.partial(by_users, target))
            raise Busy(f"its file system {target} is in use{by or ''}: leave it first") from None
        finally:
            if closing is not None:
                closing.cancel()
        raise await self._elsewhere(held)

    async def _elsewhere(self, held: Held) -> Busy:
        """The refusal where another process has the overlay that was unmounted here."""
        look = functools.partial(holders.elsewhere, self._mounted, held.number, self._layers.rootfs(held.number), held.device)
        words = await self.naming.words(("unmounted", held.number), look)
        return Busy(f"its file system {words or 'is in use elsewhere: end what uses it first'}")

    async def _expire(self, number: int) -> None:
        """Unmount ``number`` if no call asked for it and no process used it for ``idle`` seconds."""

        async with self._locks.held(number):
            held = self._held.get(number)
            if held is None or trio.current_time() - held.asked < max(self.idle, GRACE):
                return
            try:
                if await in_thread(self._merged.expire, held, limiter=self._threads):
                    del self._held[number]
                    self._let_go(held)
                else:
                    held.asked = max(held.asked, trio.current_time() - self.idle / 2)
            except NoThread:
                log.debug("%s stays mounted until a thread can be started", self._layers.rootfs(number))
            except OSError as error:
                log.warning("cannot unmount %s: %s", self._layers.rootfs(number), error)

    def _let_go(self, held: Held) -> None:
        """Close the copy, which may flush the disk, in the background; once."""
        if held.copy is None:
            held.close_copy()  # those of the shelters may be there
        else:
            closing = Closing()
            self._close_soon(held.number, closing)
            self._close_copy(held, closing)

    def _close_soon(self, number: int, closing: Closing) -> None:
        """Have a thread of its own for ``closing``."""
        if self._nursery is not None:
            with suppress(RuntimeError):  # it is being closed
                self._nursery.start_soon(self._close, number, closing)
                return
        closing.leave()

    def _close_copy(self, held: Held, closing: Closing) -> None:
        """Have the copy closed by ``closing``.  In whatever thread."""
        copy = held.take_copy()
        if copy is None:
            closing.cancel()
            return
        self._in_use.closings[held.number] = closing
        if not closing.begin(copy, seal=held.seal):
            closing.run()
            self._in_use.closings.pop(held.number, None)

    async def _close(self, number: int, closing: Closing) -> None:
        try:
            while not await self._has_closed(closing):
                try:
                    await trio.sleep(AGAIN)
                except trio.Cancelled:  # the end waits for no thread
                    if not closing.leave():
                        closing.run()
                    raise
        finally:
            with trio.CancelScope(shield=True):
                if closing.written and self._still_written is not None:
                    await self._still_written(number)
            if self._in_use.closings.get(number) is closing:
                del self._in_use.closings[number]

    async def _has_closed(self, closing: Closing) -> bool:
        """Close it in a thread; False where none can be started."""
        with trio.CancelScope(shield=True), suppress(NoThread):  # or the descriptor would stay open when the library is closed
            await in_thread(closing.run, limiter=self._closing)
            return True
        return False


def _unwritten() -> int:
    """Bytes that the kernel has yet to write to disks."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0] in ("Dirty:", "Writeback:"))
