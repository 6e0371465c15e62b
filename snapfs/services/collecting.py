"""Collecting: long lists of records, made in threads of their own; calls at the same time share one walk of the records."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import trio

from snapfs.model import Caller
from snapfs.scan.sharing import Checkpoint, Sharing, Turns

T = TypeVar("T")


class Collecting:
    """The lists of one root.  ``serve`` must be running."""

    def __init__(self) -> None:
        self._walks: Sharing[Any] = Sharing(Turns(2))  # each thread more keeps the loop from its work

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Collect until cancelled."""
        await self._walks.serve(task_status)

    async def collect(
        self,
        words: str,
        lines: Callable[[], Generator[str, None, None]],
        consume: Callable[[Iterable[str]], T],
        caller: Caller,
        *,
        also: Hashable,
    ) -> T:
        """What ``consume`` makes of ``lines``, for ``caller``.  Calls at the same time with the same ``words``, ``consume`` and
        ``also`` share what is begun after they came.  Raises TryAgain where the caller would wait for others."""

        def work(checkpoint: Checkpoint) -> T:
            with closing(lines()) as found:
                return consume(_as_long_as(checkpoint, found))

        result: T = await self._walks.run(words, work, caller, also=(consume, also))
        return result


def _as_long_as(checkpoint: Checkpoint, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        checkpoint()
        yield line
