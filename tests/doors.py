"""The two doors of the library, so that a test runs over both: the async one, and the blocking one that looks like it."""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, cast

import trio

from snapfs import Options, Snapshotter, blocking, open_snapshotter

Opener = Callable[..., AbstractAsyncContextManager[Snapshotter]]
"""``open_snapshotter``, or what looks like it."""


class InThreads:
    """A blocking snapshotter with the async one's interface: each call is made in a thread of its own.

    What the blocking one lacks is the async one's behind it, for tests that look at what it does.
    """

    def __init__(self, snapshots: blocking.Snapshotter) -> None:
        self._snapshots = snapshots

    def __getattr__(self, name: str) -> object:
        if not hasattr(blocking.Snapshotter, name):
            return getattr(self._snapshots._loop.snapshotter, name)
        value = getattr(self._snapshots, name)
        if inspect.iscoroutinefunction(getattr(Snapshotter, name, None)):
            return partial(_in_thread, value)
        return partial(_in_thread_now, value) if callable(value) else value


async def _in_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return await trio.to_thread.run_sync(partial(call, *args, **kwargs))


def _in_thread_now(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *args, **kwargs).result()


@asynccontextmanager
async def _open_in_threads(root: str | os.PathLike[str], options: Options | None = None) -> AsyncIterator[Snapshotter]:
    snapshots = await _in_thread(blocking.open_snapshotter, root, options)
    try:
        yield cast(Snapshotter, InThreads(snapshots))
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(snapshots.close)


DOORS: dict[str, Opener] = {"async": open_snapshotter, "blocking": _open_in_threads}
