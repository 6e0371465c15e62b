"""Locks: one for each snapshot that a task is at, for as long as it is."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio

from snapfs.errors import TryAgain


class Locks:
    """Locks by snapshot id; those that are held or waited for are ``in`` it."""

    def __init__(self) -> None:
        self._locks: dict[int, trio.Lock] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._locks

    def __iter__(self) -> Iterator[int]:
        return iter(self._locks)

    @asynccontextmanager
    async def held(self, number: int, patience: float = math.inf) -> AsyncIterator[None]:
        """For a block in which no other task holds the lock of snapshot ``number``; where none does, no other task runs before
        the block.  Raises TryAgain where one holds it for longer than ``patience`` seconds."""
        lock = self._locks.setdefault(number, trio.Lock())
        try:
            try:
                lock.acquire_nowait()
            except trio.WouldBlock:
                with trio.move_on_after(patience) as waiting:
                    await lock.acquire()
                if waiting.cancelled_caught:
                    raise TryAgain("something that takes long is just being done to this snapshot") from None
            try:
                yield
            finally:
                lock.release()
        finally:
            if not lock.locked() and self._locks.get(number) is lock:  # else a task that has waited holds it by now
                del self._locks[number]
