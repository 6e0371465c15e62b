"""The merged file systems, mounted by the kernel at ROOT/rootfs/<id>/fs for as long as somebody uses them.

A mount costs a worker thread some hundred microseconds when it is first asked for, nothing afterwards.  It goes when it was
not used for ``idle`` seconds, when there are more than ``most`` and it is the one that was asked for longest ago, when its
snapshot is committed or removed, and at the end.  Nothing but mounting and unmounting happens here: which layers, and
whether they may be mounted, is the caller's to say.

No upper layer is ever mounted a second time, whoever has it mounted and in whichever mount namespace: a process that was made
with a namespace of its own, a sandbox, has a copy of each mount that it saw, and goes on writing there.  So whatever is
unmounted here is looked for everywhere else before it is given up, and before anything is mounted the kernel is asked
(``snapfs/kernel/inuse.py``).

<id> is made with each mount and removed right after it: a process that comes too late meets ENOENT, and so does one in a mount
namespace that lacks the mount (``snapfs/kernel/shelter.py``).
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from snapfs.errors import FULL, Busy, Closed, Unavailable
from snapfs.kernel import mountapi, mounting, namespaces, overlay, shelter
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.kernel.probe import why_trial_failed
from snapfs.kernel.processes import name_of, users_of_device
from snapfs.kernel.spare import Spare
from snapfs.model import Kind
from snapfs.names import parse_id
from snapfs.root import holders
from snapfs.root.inuse import FLUSHING, Closing, InUse
from snapfs.root.layers import Layers
from snapfs.root.mounted import Mounted, Place
from snapfs.rules.mounts import Stack

log = logging.getLogger(__name__)

GRACE = 0.25  # seconds after it was asked for in which a mount is not taken for another: whoever asked is about to go there

PASSING = 0.02  # seconds that whoever was told the path may need until they are in: Commit and Remove wait for them so long

MUCH = 16 << 20  # bytes in memory that are yet to be written, from which on nobody may wait for that

SEARCH = 0.5  # seconds for which it is looked who uses what is in use: the kernel may hold locks meanwhile

_GONE = (errno.EINVAL, errno.ENOENT)
"""What umount2(2) says where somebody else has unmounted it, and perhaps removed the directory."""


class _Held:
    """One mount of ours: when it was last asked for, and a detached copy of it.

    The last unmount of an overlay flushes the whole file system that holds its upper directory, which may take minutes.  The
    copy makes that the close of the copy instead, in the background: a Commit must not wait for it.  It can also be mounted
    again.

    ``number`` is the snapshot's id, ``mount`` the mount's; ``device`` that of the overlay (``major:minor``), "" of a bind, and
    ``shelter`` that of what it stands in.  ``seal``: the overlay is to be made read-only before the copy is closed.
    """

    def __init__(self, number: int, target: str) -> None:
        self.number = number
        self.asked = 0.0
        self.seal = False
        self.copy = mounting.detached_copy(target)
        self.mount = mount_id(target)
        self.device = mounting.overlay_device(target)
        self.shelter = mounting.device(os.path.dirname(target))


class Rootfs:
    """The mounts of one root.  ``run`` must be running; ``options`` go on each overlay."""

    def __init__(
        self, layers: Layers, mounted: Mounted, in_use: InUse, options: Sequence[str], *, idle: float, most: int
    ) -> None:
        self.idle = idle
        self.most = most
        self._layers = layers
        self._mounted = mounted
        self._in_use = in_use
        self._options = options
        self._directory = layers.rootfs_directory
        self._held: dict[int, _Held] = {}
        self._recovered: dict[int, _Held] = {}  # what ``recover`` took over
        self._locks: dict[int, trio.Lock] = {}
        self._making_room = trio.Lock()
        self._threads = trio.CapacityLimiter(8)
        self._closing = trio.CapacityLimiter(math.inf)  # each may wait for the disk, and nothing may wait for them
        self._coming = 0  # mounts that room was made for
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

    # -- life

    def trial(self) -> str | None:
        """Mount an overlay as ``mount`` does; why that is refused and what to do, None where it is not."""
        try:
            trial = self._layers.make_trial()
        except OSError as error:
            return _refusal(error)
        options = [*self._options, "volatile"] if mounting.kernel_version() >= (5, 10) else self._options  # so: no flush
        directory = f"{self._directory}/trial"
        try:
            shelter.prepare(directory)
            self._put(directory, [f"{trial}/lower"], f"{trial}/fs", f"{trial}/work", options)
            mounting.unmount(f"{directory}/{shelter.INSIDE}", mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            return _refusal(error)
        finally:
            self._clear(directory)
            shutil.rmtree(trial, ignore_errors=True)
        return None

    def recover(self, right: Callable[[int], bool]) -> None:
        """Unmount what a crashed daemon left, and remove its directories.

        What is in use, here or in another mount namespace, and ``right`` for its snapshot is taken over; anything else that
        is in use here is detached.  Blocks on the disk."""
        targets = [mount.target for mount in mount_table() if mount.target.startswith(self._directory + "/")]
        names = {target[len(self._directory) + 1 :].partition("/")[0] for target in targets}
        for name in sorted(names):
            directory, number = f"{self._directory}/{name}", parse_id(name)
            target = f"{directory}/{shelter.INSIDE}"
            try:
                if target in targets:
                    self._recover(number, target, right)
                else:  # somebody else's, or of a version that had no shelters
                    mounting.unmount(directory, mounting.UMOUNT_NOFOLLOW)
            except OSError:
                _detach(target if target in targets else directory)
        for name in os.listdir(self._directory):
            if parse_id(name) not in self._recovered:
                self._clear(f"{self._directory}/{name}")

    def _recover(self, number: int | None, target: str, right: Callable[[int], bool]) -> None:
        """Unmount ``target``, or take it over.  Raises OSError, also where it is in use and not ``right``."""
        held: _Held | None = _Held(number or 0, target)
        assert held is not None
        try:
            is_right = number is not None and right(number)
            try:
                mounting.unmount(target, mounting.UMOUNT_NOFOLLOW)
                shelter.remove(os.path.dirname(target))
                if not is_right or held.copy is None or not self._is_elsewhere(held):
                    return
                self._attach_again(held)
            except OSError as error:
                if not is_right or error.errno != errno.EBUSY:
                    raise
            self._recovered[held.number], held = held, None
        finally:
            if held is not None and held.copy is not None:
                os.close(held.copy)

    async def run(self, still_written: Callable[[int], Awaitable[None]], task_status: trio.TaskStatus[None]) -> None:
        """Unmount what is not used, until cancelled; then everything.

        ``still_written`` is told of each snapshot that a process went on writing which could not be found before."""
        self._still_written = still_written
        self._held = self._recovered
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
                    async with self._locked(number):
                        if number in self._held:
                            await trio.to_thread.run_sync(self._end, self._held.pop(number))

    def close(self) -> None:
        """For one that never ran."""
        self._spare.close()
        for held in self._recovered.values():
            if held.copy is not None:
                os.close(held.copy)

    def _end(self, held: _Held) -> None:
        target, shelters = self._layers.rootfs(held.number), set[int]()
        try:
            shelters = self._shelters(held)
            self._unmount(target)
        except OSError:
            _detach(target)
        try:
            self._clear(self._layers.shelter(held.number), shelters)
        except OSError as error:
            log.warning("cannot remove %s: %s", self._layers.shelter(held.number), error)
        finally:
            if held.copy is not None:
                os.close(held.copy)

    # -- mounting

    async def mount(self, number: int, stack: Callable[[], Stack]) -> str:
        """Have the file system of snapshot ``number`` mounted: where.

        ``stack`` is asked for what to mount when that is to be done; it may raise.  What somebody else has mounted is shown
        there too, and not mounted a second time.

        Raises Damaged where a layer is missing, Unavailable where the kernel refuses (with its words), Busy where ``most``
        others are mounted and all in use, or the upper layer is in use where it can't be got from."""
        if number not in self._locks and self._is_there(number):  # with the lock somebody may be unmounting it
            return self._layers.rootfs(number)
        async with self._locked(number):
            if self._is_there(number):
                return self._layers.rootfs(number)
        # room may take a while, so without the lock: a Commit or Remove would wait for it, and the whole tree for that
        async with self._room(), self._locked(number):
            if not self._is_there(number):
                work = functools.partial(self._mount, number, stack(), self._held.get(number))
                held = await trio.to_thread.run_sync(work, limiter=self._threads)
                held.asked = trio.current_time()
                self._held[number] = held
        return self._layers.rootfs(number)

    def _is_there(self, number: int) -> bool:
        """Note that snapshot ``number`` was asked for; whether it is mounted here, and nobody has unmounted it by hand."""
        held = self._held.get(number)
        if held is None:
            return False
        held.asked = trio.current_time()
        with suppress(OSError):
            if mount_id(self._layers.rootfs(number)) == held.mount:
                return True
        # something may be mounted over it
        return any(mount.id == held.mount and mount.target == self._layers.rootfs(number) for mount in mount_table())

    def _mount(self, number: int, stack: Stack, held: _Held | None) -> _Held:
        """Mount it, or again what was unmounted by hand."""
        layers = self._layers
        for below in stack.lower:
            layers.refuse_damaged(below)
        if stack.upper is not None:
            layers.refuse_damaged(stack.upper, Kind.ACTIVE)
        directory, target = layers.shelter(number), layers.rootfs(number)
        try:
            self._clear(directory)  # whoever knows the path can make something there
            shelter.prepare(directory)  # on a disk that is read-only by now an old one can't be removed
            try:
                if held is not None and held.copy is not None:
                    self._attach_again(held)
                    return held
                tree = self._taken_over(number) if stack.upper is not None else None
                if tree is not None:
                    shelter.attach(tree, directory)
                elif stack.upper is None and len(stack.lower) == 1:
                    self._put_bind(directory, layers.fs(stack.lower[0]))
                else:
                    lowers = [layers.fs(below) for below in stack.lower] or [layers.empty_layer()]
                    upper = None if stack.upper is None else layers.fs(stack.upper)
                    work = None if stack.upper is None else layers.work(stack.upper)
                    self._put(directory, lowers, upper, work, self._options)
                return _Held(number, target)
            except BaseException:
                self._clear(directory)
                raise
        except OSError as error:
            raise Unavailable(f"cannot mount the file system of snapshot {number}: {error.strerror}", error.errno) from error

    def _put(self, directory: str, lowers: Sequence[str], upper: str | None, work: str | None, options: Sequence[str]) -> None:
        read_only = upper is None
        try:
            tree = overlay.make_overlay(lowers, upper, work, options, read_only=read_only)
        except overlay.MountApiLacking:

            def mount(target: str) -> None:
                overlay.mount_overlay_classic(target, lowers, upper, work, options, read_only=read_only)

            shelter.attach_classic(mount, directory)
        else:
            shelter.attach(tree, directory)

    def _put_bind(self, directory: str, layer: str) -> None:
        try:
            tree = mounting.make_bind(layer, read_only=True)
        except OSError as error:
            if error.errno not in mounting.NO_MOUNT_API:
                raise
            shelter.attach_classic(lambda target: mounting.mount_bind_classic(layer, target, read_only=True), directory)
        else:
            shelter.attach(tree, directory)

    def _attach_again(self, held: _Held) -> None:
        """Mount what was unmounted here, and somebody else may still have: the same, not a second one.  Raises OSError."""
        assert held.copy is not None
        directory, target = self._layers.shelter(held.number), self._layers.rootfs(held.number)
        shelter.prepare(directory)
        try:
            tree = mountapi.copy_tree(held.copy)
        except OSError:
            tree, held.copy = held.copy, None
        shelter.attach(tree, directory)
        if held.copy is None:
            held.copy = mounting.detached_copy(target)
        held.mount, held.shelter = mount_id(target), mounting.device(directory)

    def _is_elsewhere(self, held: _Held) -> bool:
        """Whether the overlay that is mounted here, or was a moment ago, is mounted in another place, in whatever namespace.

        What the kernel has mounted there together with ours, it unmounts with ours: that doesn't count.  Raises OSError.
        """
        if not held.device:
            return False
        found = self._mounted.everywhere(lambda place: place.device == held.device)
        groups = {place.group for place in found if place.id == held.mount and place.group}
        count = -1
        while len(groups) != count:
            count = len(groups)
            groups |= {place.group for place in found if place.master in groups and place.group}
        return any(place.id != held.mount and not groups & {place.group, place.master} for place in found)

    def _taken_over(self, number: int) -> int | None:
        """The descriptor of a copy of the mount by which somebody else has the active snapshot ``number``; None if nobody has.

        Raises Busy where that can't be had, and OSError.
        """

        def may_be_it(place: Place) -> bool:
            return (place.bound == number or bool(place.upperdir)) and not place.inside

        closing = self._in_use.closings.get(number)
        if closing is not None and not closing.wait(FLUSHING):  # another one on the same layer would bear no mark
            raise Busy("it was unmounted a moment ago, and is still being written to the disk: try again")
        # a bind of a part of it, or one to read, is no hindrance
        found = self._mounted.everywhere(lambda place: place.bound == number and not place.inside)
        bound = any(place.writable for place in found)
        if not bound and not self._in_use.has_overlay(number, suspected=True):
            return None
        for pid, place in self._mounted.by_process(may_be_it):
            with suppress(OSError):
                there = self._mounted.open(place, number, pid)
                try:
                    return _copy_of_another(pid, there)
                finally:
                    os.close(there)
        raise Busy(f"snapshot {number} {holders.elsewhere(self._mounted, number, self._layers.rootfs(number))}")

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
                with suppress(OSError, Busy):
                    async with self._locked(number):
                        if self._held.get(number) is held:
                            await self._release(held)
                            self._let_go(held)
                        return
        if not waiting and not self._coming:
            raise Busy(f"{self.most} file systems are mounted and all in use: leave some, or raise rootfs_max")
        await trio.sleep(GRACE)

    # -- unmounting

    @asynccontextmanager
    async def unmounted(self, number: int) -> AsyncIterator[bool]:
        """For a block in which snapshot ``number`` must not be mounted here; gives whether it was, and then nobody has it.

        Raises Busy while somebody uses it, wherever; then it is mounted as before, or in use where it can't be got from.  Where
        it could not be found out wholly, nobody can write into it once the block has ended without an error.
        """
        async with self._locked(number):
            held = self._held.get(number)
            if held is None:
                yield False
                return
            # nobody is told the path from here on; in between they would find the directory beneath
            await trio.sleep_until(held.asked + PASSING)
            try:
                try:
                    await self._release(held)
                    free = bool(held.device) and await self._is_free(held)
                except OSError as error:
                    raise Unavailable.from_os("unmount its file system", error) from error
                yield free
                held.seal = free
            finally:  # not before: a journal that is made durable meanwhile waits for what is being flushed
                if self._held.get(number) is not held:
                    self._let_go(held)

    async def _is_free(self, held: _Held) -> bool:
        """Whether nobody has the overlay that was unmounted here a moment ago, and is mounted nowhere else: True, or Busy is
        raised.

        Only a mount that is attached nowhere can have it, or a descriptor.  The kernel says so once our own copy is closed,
        which flushes the disk.  Where that would take long, it is looked for a process that has it, as far as /proc shows
        them, and the copy is left open."""
        if _unwritten() >= MUCH:
            with trio.move_on_after(SEARCH):
                users = functools.partial(next, users_of_device(held.device, longest=math.inf), None)
                if await trio.to_thread.run_sync(users, abandon_on_cancel=True) is None:
                    return True
                await trio.to_thread.run_sync(self._attach_again, held, limiter=self._threads)
                self._held[held.number] = held
                raise await self._elsewhere(held)
        self._let_go(held)
        if await trio.to_thread.run_sync(self._in_use.has_overlay, held.number, limiter=self._threads):
            raise await self._elsewhere(held)
        return True

    async def _release(self, held: _Held) -> None:
        """Unmount what is held, whose lock is held, and hold it no more.

        Raises Busy if anybody uses it, and OSError; then it is held as before.
        """
        target = self._layers.rootfs(held.number)
        try:
            if await trio.to_thread.run_sync(self._give_up, held, limiter=self._threads):
                del self._held[held.number]
                return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            by = await trio.to_thread.run_sync(_by, target)
            raise Busy(f"its file system {target} is in use{by}: leave it first") from None
        raise await self._elsewhere(held)

    async def _elsewhere(self, held: _Held) -> Busy:
        """The refusal where somebody else has the overlay that was unmounted here."""
        with trio.move_on_after(SEARCH):  # it may take any time to find out who
            words = functools.partial(
                holders.elsewhere, self._mounted, held.number, self._layers.rootfs(held.number), held.device
            )
            return Busy(f"its file system {await trio.to_thread.run_sync(words, abandon_on_cancel=True)}")
        return Busy("its file system is in use elsewhere: end what uses it first")

    def _give_up(self, held: _Held) -> bool:
        """Unmount ``held`` if nobody uses it in another namespace, either: whether that is so.  Raises OSError: EBUSY while
        it is in use here.  Where it isn't unmounted nothing has changed."""
        directory = self._layers.shelter(held.number)
        if self._is_elsewhere(held):
            return False
        shelters = self._shelters(held)
        self._unmount(self._layers.rootfs(held.number))
        shelter.remove(directory)  # at once: what is left in it is an empty directory
        if held.copy is not None and self._is_elsewhere(held):  # by now
            self._attach_again(held)
            return False
        self._clear(directory, shelters)
        return True

    def _unmount(self, target: str) -> None:
        try:
            mounting.unmount(target, mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in _GONE:
                raise

    def _shelters(self, held: _Held) -> set[int]:
        """The mounts, in whatever namespace, that are on the directory in which ``held`` stands, ours among them."""
        return {place.unique for place in self._mounted.everywhere(lambda place: place.device == held.shelter)} - {0}

    def _clear(self, directory: str, shelters: Collection[int] = ()) -> None:
        """Remove ROOT/rootfs/<id>, and what is mounted there; what somebody has put in is kept.

        It stays where something is mounted on it in another namespace (of ``shelters``, which were there before ours was
        unmounted): the kernel would take that away together with it.
        """
        shelter.remove(directory)
        target = f"{directory}/{shelter.INSIDE}"
        if not self._mounted.everywhere(lambda place: place.unique in shelters or place.target == target):
            shelter.clear(directory)
            self._layers.remove_directory(directory)

    async def _expire(self, number: int) -> None:
        """Unmount ``number`` if it was not asked for, nor used by who asked earlier, for ``idle`` seconds."""

        def expire(held: _Held) -> bool:
            target = self._layers.rootfs(number)
            try:
                if self._is_elsewhere(held) or not mounting.unmount_unused(target):
                    return False
            except OSError as error:
                if error.errno not in _GONE:
                    return False
            return self._give_up(held)

        async with self._locked(number):
            held = self._held.get(number)
            if held is None or trio.current_time() - held.asked < max(self.idle, GRACE):
                return
            try:
                if await trio.to_thread.run_sync(expire, held, limiter=self._threads):
                    del self._held[number]
                    self._let_go(held)
                else:
                    held.asked = max(held.asked, trio.current_time() - self.idle / 2)
            except OSError as error:
                log.warning("cannot unmount %s: %s", self._layers.rootfs(number), error)

    def _let_go(self, held: _Held) -> None:
        """Close the copy, which may flush the disk, in the background; once."""
        if held.copy is None:
            return
        closing, held.copy = Closing(held.copy, seal=held.seal), None
        if self._nursery is not None:
            with suppress(RuntimeError):  # it is being closed
                self._nursery.start_soon(self._close, held.number, closing)
                self._in_use.closings[held.number] = closing
                return
        closing.run()

    async def _close(self, number: int, closing: Closing) -> None:
        with trio.CancelScope(shield=True):  # or the descriptor would stay open when the library is closed
            await trio.to_thread.run_sync(closing.run, limiter=self._closing)
            if closing.written and self._still_written is not None:
                await self._still_written(number)
        if self._in_use.closings.get(number) is closing:
            del self._in_use.closings[number]

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
    return None if error.errno in (*FULL, errno.EMFILE, errno.ENFILE) else why_trial_failed(error)


def _detach(target: str) -> None:
    """Unmount ``target`` though it is in use: who uses it can go on reading, nobody else gets there.

    The mount table does not show it any more, so nothing would keep its snapshot from being committed: it is made read-only,
    unless somebody has a file open for writing.
    """
    by = ""
    with suppress(OSError):  # no descriptors left
        by = _by(target)
    log.warning("%s is still in use%s; detaching it", target, by)
    with suppress(OSError):
        mounting.make_read_only(target)
    with suppress(OSError):
        mounting.unmount(target, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)


def _by(target: str) -> str:
    if found := holders.by_users(target):
        return found
    below = next((mount.target for mount in mount_table() if mount.target.startswith(target + "/")), None)
    return f" by what is mounted at {below}" if below else ""


def why_unseen(pid: int, target: str) -> str | None:
    """Why process ``pid`` does not get to what is mounted at ``target`` here, and what to do, in words: it is in another mount
    namespace.  None where it does, as far as can be known.  Blocks on /proc."""
    if namespaces.sees_mount(pid, target):
        return None
    return (
        f"process {pid} ({name_of(pid)}) is in another mount namespace, where {target} is not mounted: "
        f"follow rootfs before that is made, or enter the daemon's: nsenter --mount --target {os.getpid()}"
    )


def _unwritten() -> int:
    """Bytes that the kernel has yet to write to disks."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(words[1]) << 10 for words in lines if words[0] in ("Dirty:", "Writeback:"))


def _copy_of_another(pid: int, there: int) -> int:
    """The descriptor of a detached copy of the mount on which ``there`` is open, in the mount namespace of process ``pid``: to
    be written to.  Raises OSError."""

    def copy() -> int:
        namespaces.enter(pid)  # this thread, which ends after this
        return mountapi.copy_tree(there)

    with ThreadPoolExecutor(1) as own_thread:
        tree = own_thread.submit(copy).result()
    unwanted = mountapi.MOUNT_ATTR_RDONLY | mountapi.MOUNT_ATTR_NOSUID | mountapi.MOUNT_ATTR_NODEV | mountapi.MOUNT_ATTR_NOEXEC
    with suppress(OSError):
        mountapi.mount_setattr(tree, 0, clear=unwanted)
    return tree
