"""The merged file systems, mounted by the kernel at ROOT/rootfs/<id> for as long as somebody uses them.

A mount costs a worker thread some hundred microseconds when it is first asked for, nothing afterwards.  It goes when it was
not used for ``idle`` seconds, when there are more than ``most`` and it is the one that was asked for longest ago, when its
snapshot is committed or removed, and at the end.  Nothing but mounting and unmounting happens here: which layers, and
whether they may be mounted, is the caller's to say.

Its directory is made with each mount and removed right after it: who comes too late meets ENOENT.  Only who was told the path
and then stood still for long enough (PASSING, GRACE) can meet the empty directory in between.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice

import msgspec
import trio

from snapfs.errors import Busy, Closed, Unavailable
from snapfs.kernel import mounting, overlay
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.kernel.processes import users
from snapfs.layers import Layers, parse_id
from snapfs.model import Kind
from snapfs.reserve import FULL

log = logging.getLogger(__name__)

GRACE = 0.25  # seconds after it was asked for in which a mount is not taken for another: whoever asked is about to go there

PASSING = 0.02  # seconds that whoever was told the path may need until they are in: Commit and Remove wait for them so long

_GONE = (errno.EINVAL, errno.ENOENT)
"""What umount2(2) says where somebody else has unmounted it, and perhaps removed the directory."""

_threads = trio.CapacityLimiter(8)
_closing = trio.CapacityLimiter(8)  # apart from all others: each may wait for the disk, and nothing else may wait for them


class Stack(msgspec.Struct, frozen=True):
    """What to mount: the ids of the read-only layers, the nearest first, and that of a writable one above them."""

    lower: tuple[int, ...]
    upper: int | None = None


class _Held:
    """One mount of ours: when it was last asked for, and a detached copy of it.

    The last unmount of an overlay flushes the whole file system that holds its upper directory, which may take minutes.  The
    copy makes that the close of the copy instead, in the background: a Commit must not wait for it.
    """

    def __init__(self, copy: int | None) -> None:
        self.copy = copy
        self.asked = trio.current_time()


class Rootfs:
    """The mounts of one root.  ``run`` must be running; ``options`` go on each overlay."""

    def __init__(self, layers: Layers, options: Sequence[str], *, idle: float, most: int) -> None:
        self.idle = idle
        self.most = most
        self._layers = layers
        self._options = options
        self._directory = layers.rootfs_directory
        self._held: dict[int, _Held] = {}
        self._recovered: dict[int, int | None] = {}  # what ``recover`` took over, and their copies
        self._locks: dict[int, trio.Lock] = {}
        self._making_room = trio.Lock()
        self._coming = 0  # mounts that room was made for
        self._nursery: trio.Nursery | None = None

    @property
    def count(self) -> int:
        """How many are mounted."""
        return len(self._held)

    def holds(self, number: int) -> bool:
        """Whether the file system of snapshot ``number`` is mounted here."""
        return number in self._held

    # -- life

    def trial(self) -> str | None:
        """Mount an overlay as ``mount`` does; in the kernel's words why that is refused, None where it is not."""
        try:
            trial = self._layers.make_trial()
        except OSError as error:
            return _refusal(error)
        options = [*self._options, "volatile"] if mounting.kernel_version() >= (5, 10) else self._options  # so: no flush
        target = f"{self._directory}/trial"
        try:
            os.makedirs(target, mode=0o700, exist_ok=True)
            overlay.mount_overlay(target, [f"{trial}/lower"], f"{trial}/fs", f"{trial}/work", options, read_only=False)
            mounting.unmount(target, mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            return _refusal(error)
        finally:
            self._layers.put_away(target)
            shutil.rmtree(trial, ignore_errors=True)
        return None

    def recover(self, right: Callable[[int], bool]) -> None:
        """Unmount what a crashed daemon left, and remove its directories.

        What is in use and ``right`` for its snapshot is taken over; anything else that is in use is detached.  Blocks on the
        disk.
        """
        kept = self._recovered
        below = [mount.target for mount in mount_table() if os.path.dirname(mount.target) == self._directory]
        for target in reversed(below):
            number = parse_id(os.path.basename(target))
            try:
                mounting.unmount(target, mounting.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno == errno.EBUSY and number is not None and number not in kept and right(number):
                    kept[number] = mounting.copy_of(target)
                else:
                    _detach(target)
        for name in os.listdir(self._directory):
            if parse_id(name) not in kept:
                self._layers.put_away(f"{self._directory}/{name}")

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Unmount what is not used, until cancelled; then everything."""
        self._held = {number: _Held(copy) for number, copy in self._recovered.items()}
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    await trio.sleep(max(self.idle, GRACE) / 4)
                    for number in list(self._held):
                        await self._expire(number)
        finally:
            self._nursery = None  # from here on nothing more is mounted
            with trio.CancelScope(shield=True):
                for number in {*self._held, *self._locks}:
                    async with self._locked(number):
                        if number in self._held:
                            await trio.to_thread.run_sync(self._end, number, self._held.pop(number))

    def _end(self, number: int, held: _Held) -> None:
        try:
            self._unmount(number)
        except OSError:
            _detach(self._layers.rootfs(number))
            self._layers.put_away(self._layers.rootfs(number))
        if held.copy is not None:
            os.close(held.copy)

    # -- mounting

    async def mount(self, number: int, stack: Callable[[], Stack]) -> str:
        """Have the file system of snapshot ``number`` mounted: where.

        ``stack`` is asked for what to mount when that is to be done; it may raise.  Raises Damaged where a layer is
        missing, Unavailable where the kernel refuses (with its words), Busy where ``most`` others are mounted and all in use.
        """
        if number not in self._locks and self._is_there(number):  # with the lock somebody may be unmounting it
            return self._layers.rootfs(number)
        async with self._locked(number):
            if self._is_there(number):
                return self._layers.rootfs(number)
        # room may take a while, so without the lock: a Commit or Remove would wait for it, and the whole tree for that
        async with self._room(), self._locked(number):
            if not self._is_there(number):
                if number in self._held:
                    self._let_go(self._held.pop(number))
                work = functools.partial(self._mount, number, stack())
                self._held[number] = _Held(await trio.to_thread.run_sync(work, limiter=_threads))
        return self._layers.rootfs(number)

    def _is_there(self, number: int) -> bool:
        """Note that snapshot ``number`` was asked for; whether it is mounted here, and nobody has unmounted it by hand."""
        held = self._held.get(number)
        if held is None:
            return False
        held.asked = trio.current_time()
        try:
            return mount_id(self._layers.rootfs(number)) != mount_id(self._directory)
        except OSError:
            return False

    def _mount(self, number: int, stack: Stack) -> int | None:
        target, layers = self._layers.rootfs(number), self._layers
        lowers = [layers.fs(below) for below in stack.lower]
        for below in stack.lower:
            layers.refuse_damaged(below)
        if stack.upper is not None:
            layers.refuse_damaged(stack.upper, Kind.ACTIVE)
        try:
            layers.put_away(target)  # whoever knows the path can make a directory there
            os.makedirs(target, mode=0o700, exist_ok=True)  # on a disk that is read-only by now an old one can't be removed
            try:
                if stack.upper is None and len(lowers) == 1:
                    mounting.mount_bind(lowers[0], target, read_only=True)
                elif stack.upper is not None and not lowers:
                    mounting.mount_bind(layers.fs(stack.upper), target, read_only=False)
                else:
                    upper = None if stack.upper is None else layers.fs(stack.upper)
                    work = None if stack.upper is None else layers.work(stack.upper)
                    overlay.mount_overlay(target, lowers, upper, work, self._options, read_only=upper is None)
            except OSError:
                layers.put_away(target)
                raise
        except OSError as error:
            raise Unavailable(f"cannot mount the file system of snapshot {number}: {error.strerror}", error.errno) from error
        return mounting.copy_of(target)

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
        """Unmount the one that was asked for longest ago among those that nobody uses."""
        now = trio.current_time()
        waiting = False
        for number, held in sorted(self._held.items(), key=lambda item: item[1].asked):
            if number in self._locks:
                waiting = True
            elif now - held.asked < GRACE:
                await trio.sleep(held.asked + GRACE - now)
                return
            else:
                with suppress(OSError):
                    async with self._locked(number):
                        self._let_go(await self._release(number))
                        return
        if not waiting and not self._coming:
            raise Busy(f"{self.most} file systems are mounted and all in use: leave some, or raise rootfs_max")
        await trio.sleep(GRACE)

    # -- unmounting

    @asynccontextmanager
    async def unmounted(self, number: int) -> AsyncIterator[None]:
        """For a block in which snapshot ``number`` must not be mounted here; raises Busy, having unmounted nothing, while
        somebody uses it."""
        async with self._locked(number):
            held = self._held.get(number)
            if held is not None:  # nobody is told the path from here on; in between they would find the directory beneath
                await trio.sleep_until(held.asked + PASSING)
            try:
                released = await self._release(number)
            except OSError as error:
                target = self._layers.rootfs(number)
                if error.errno != errno.EBUSY:
                    raise Unavailable.from_os("unmount its file system", error) from error
                by = await trio.to_thread.run_sync(_by, target)
                raise Busy(f"its file system {target} is in use{by}: leave it first") from None
            try:
                yield
            finally:  # not before: a journal that is made durable meanwhile waits for what is being flushed
                self._let_go(released)

    async def _release(self, number: int) -> _Held | None:
        """Unmount ``number``, whose lock is held: what is to be let go then, None where it is not mounted.  Raises OSError."""
        if number not in self._held:
            return None
        await trio.to_thread.run_sync(self._unmount, number, limiter=_threads)
        return self._held.pop(number)

    def _unmount(self, number: int) -> None:
        try:
            mounting.unmount(self._layers.rootfs(number), mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        self._layers.put_away(self._layers.rootfs(number))

    async def _expire(self, number: int) -> None:
        """Unmount ``number`` if it was not asked for, nor used by who asked earlier, for ``idle`` seconds."""

        def expire() -> bool:
            try:
                if not mounting.expire(self._layers.rootfs(number)):
                    return False
            except OSError as error:
                if error.errno not in _GONE:
                    return False
            self._layers.put_away(self._layers.rootfs(number))
            return True

        async with self._locked(number):
            held = self._held.get(number)
            if (
                held is not None
                and trio.current_time() - held.asked >= max(self.idle, GRACE)
                and await trio.to_thread.run_sync(expire, limiter=_threads)
            ):
                self._let_go(self._held.pop(number))

    def _let_go(self, held: _Held | None) -> None:
        """Close the copy, which may flush the disk, in the background."""
        if held is None or held.copy is None:
            return
        if self._nursery is not None:
            self._nursery.start_soon(_close, held.copy)
        else:
            os.close(held.copy)

    @asynccontextmanager
    async def _locked(self, number: int) -> AsyncIterator[None]:
        lock = self._locks.setdefault(number, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(number) is lock:
                del self._locks[number]


def _refusal(error: OSError) -> str | None:
    """In words why mounting is not permitted; a full disk does not tell whether it is, nor a full table of descriptors."""
    return None if error.errno in (*FULL, errno.EMFILE, errno.ENFILE) else error.strerror or str(error)


def _detach(target: str) -> None:
    """Unmount ``target`` though it is in use: who uses it can go on reading, nobody else gets there.

    The mount table does not show it any more, so nothing would keep its snapshot from being committed: it is made read-only,
    unless somebody has a file open for writing.
    """
    log.warning("%s is still in use%s; detaching it", target, _by(target))
    with suppress(OSError):
        mounting.make_read_only(target)
    with suppress(OSError):
        mounting.unmount(target, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)


def _by(target: str) -> str:
    found = [f"{pid} ({name})" for pid, name in islice(users(target), 3)]
    if found:
        return f" by process {', '.join(found)}"
    below = next((mount.target for mount in mount_table() if mount.target.startswith(target + "/")), None)
    return f" by what is mounted at {below}" if below else ""


async def _close(copy: int) -> None:
    with trio.CancelScope(shield=True):  # or the descriptor would stay open when the library is closed
        await trio.to_thread.run_sync(os.close, copy, limiter=_closing)
