"""What the kernel may remember, and telling it of every change that it did not itself ask for.

Attributes and names are handed out for minutes, so that most stat(2) calls never come here.  Two ways to take that back:
the attributes of an inode can be invalidated at once, from anywhere; a name only from another thread, since the kernel takes
the directory's lock for it, which the very request being answered may hold.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pyfuse3
import trio

from snapfs import names
from snapfs.errors import NoThread
from snapfs.model import Change, Info, Kind
from snapfs.tree.attributes import ATTRIBUTES
from snapfs.tree.inodes import DIRECTORY_SLOTS, LABELS_SLOTS, Slot, kind_inode, pack, unpack

TIMEOUT = 600.0  # seconds

SETTLE = 1.0  # seconds that ``settle`` waits for the kernel to forget a name: a request may hold the directory's lock

_FIXED = [attribute.slot for attribute in ATTRIBUTES if attribute.fixed]  # all others are looked up each time
_INNER_SLOTS = (*LABELS_SLOTS, *_FIXED)
_BITS = {slot: 1 << nth for nth, slot in enumerate((*DIRECTORY_SLOTS, *_INNER_SLOTS))}  # of a snapshot, that may become stale
_OF_DIRECTORY, _OF_ALL = sum(_BITS[slot] for slot in DIRECTORY_SLOTS), sum(_BITS.values())
_FIXED_INODES = frozenset((*map(kind_inode, Kind), pack(0, Slot.BY_ID), pack(0, Slot.IMAGES)))  # the same of no snapshot

REMEMBERED = 10_000  # snapshots of which it is remembered what the kernel knows of them


class KernelCache:
    """The kernel's cache of one mount.

    A request under way that removes or moves a name is ``asked_for``: the kernel knows of that itself.
    """

    def __init__(self) -> None:
        self._asked_for: list[tuple[int, str]] = []
        self._told = _Told()
        self._fixed_told = set(_FIXED_INODES)
        self._requests: SimpleQueue[tuple[int, bytes] | Callable[[], object] | None] = SimpleQueue()
        self._asked = self._done = 0  # names to forget; the second is the other thread's

    def begin(self) -> None:
        """Start the other thread, which stays until ``end``.  Raises NoThread."""
        try:
            threading.Thread(target=self._forget_names, name="snapfs names", daemon=True).start()
        except RuntimeError:
            raise NoThread() from None

    def end(self) -> None:
        """Have the other thread end, which may be waiting for a lock."""
        self._requests.put(None)

    @contextlib.contextmanager
    def asked_for(self, directory: int, name: str) -> Iterator[None]:
        """For the time of a request by which the kernel itself takes ``name`` out of ``directory``."""
        self._asked_for.append((directory, name))
        try:
            yield
        finally:
            self._asked_for.remove((directory, name))

    def note_told(self, inode: int) -> None:
        """Note that the kernel is told of ``inode``.  What it was not told, since it had to forget it, need not be forgotten:
        that is so for most of what is in a snapshot, and each call would cost as much as all else."""
        number, slot = unpack(inode)
        if number:
            self._told.add(number, _BITS.get(slot, 0))
        elif inode in _FIXED_INODES:
            self._fixed_told.add(inode)

    def note(self, change: Change) -> None:
        """Forget what ``change`` has made stale; called before the call that made it returns."""
        before, after = change.before, change.after
        info = after or before
        assert info is not None
        number = (before.node or before.id) if before is not None else 0
        is_told = before is not None and self._told.has(number)
        if is_told:
            self._forget_told(number, _OF_DIRECTORY if change.counted else _OF_ALL)
            if after is None and not change.goes_on:
                self._told.discard(number)
        if (gone := set(before.images if before else ())) != (come := set(after.images if after else ())):
            self._forget_fixed(pack(0, Slot.IMAGES))
            for image in gone - come:
                self._forget(pack(0, Slot.IMAGES), names.encode(image))
        if change.counted or (before and after and (before.name, before.kind) == (after.name, after.kind)):
            return
        for kind in {shown.kind for shown in (before, after) if shown}:
            self._forget_fixed(kind_inode(kind))
        self._forget_fixed(pack(0, Slot.BY_ID))
        if before is not None and is_told and not change.goes_on:
            self._forget_path(before)

    def _forget_path(self, info: Info) -> None:
        self._forget(kind_inode(info.kind), names.encode(info.name))

    def _forget(self, directory: int, name: str) -> None:
        if (directory, name) not in self._asked_for:
            self.forget_name(directory, name)

    def forget_directory(self, node: int) -> None:
        """Forget what stat(2) says of the directory of the snapshot for which inodes have the number ``node``."""
        self._forget_told(node, _OF_DIRECTORY)

    def _forget_told(self, number: int, bits: int) -> None:
        """The same of the ``bits``, as far as the kernel was told of them."""
        if told := self._told.take(number, bits):
            for slot, bit in _BITS.items():
                if told & bit:
                    self.forget_attributes(pack(number, slot))

    def _forget_fixed(self, inode: int) -> None:
        """The same of one of _FIXED_INODES."""
        if inode in self._fixed_told:
            self._fixed_told.discard(inode)
            self.forget_attributes(inode)

    def forget_attributes(self, inode: int) -> None:
        """Forget what stat(2) says of ``inode``."""
        with contextlib.suppress(OSError):  # the kernel doesn't know the inode, or is gone
            pyfuse3.invalidate_inode(inode, attr_only=True)

    def forget_name(self, directory: int, name: str) -> None:
        """Forget ``name`` in ``directory``, in another thread.

        Never before the answer to a request that holds the directory's lock: killed in between, the daemon could not die, for
        its thread waits for that lock and can't be interrupted, and the client that has it waits for the daemon.
        """
        self._asked += 1
        self._requests.put((directory, name.encode()))

    async def settle(self) -> None:
        """Return when the kernel has forgotten all names that it was told to forget.  Not to be awaited in a request, for which
        the kernel may be waiting."""
        await trio.lowlevel.checkpoint()
        if self._done < self._asked:
            done, loop = trio.Event(), trio.lowlevel.current_trio_token()
            self._requests.put(lambda: loop.run_sync_soon(done.set))
            with trio.move_on_after(SETTLE):
                await done.wait()

    def _forget_names(self) -> None:
        """In the other thread."""
        while (request := self._requests.get()) is not None:
            if isinstance(request, tuple):
                with contextlib.suppress(OSError):  # the kernel doesn't know the name, or is gone
                    pyfuse3.invalidate_entry(*request)
                self._done += 1
            else:
                with contextlib.suppress(trio.RunFinishedError):
                    request()


class _Told:
    """What the kernel was told of, as _BITS, by the number of a snapshot; new ones have higher numbers than all before.  It is
    remembered of the last REMEMBERED; of all others that are not higher it was told everything."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._below = 0

    def add(self, number: int, bits: int) -> None:
        if number > self._below:
            self._last[number] = self._last.get(number, 0) | bits
            if len(self._last) > REMEMBERED:
                self._below = max(self._last)
                self._last.clear()

    def discard(self, number: int) -> None:
        self._last.pop(number, None)

    def has(self, number: int) -> bool:
        """Whether it was told anything of that snapshot."""
        return number <= self._below or number in self._last

    def take(self, number: int, bits: int) -> int:
        """Which of ``bits`` it was told, and is to forget now."""
        if number <= self._below:
            return bits
        told = self._last.get(number, 0)
        if told & bits:
            self._last[number] = told & ~bits
        return told & bits
