"""Copying: layers that processes go on writing, copied in threads (``scan/layercopy.py``)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

import trio

from snapfs import names
from snapfs.errors import Damaged, TryAgain, Unavailable
from snapfs.kernel import mounting, subids
from snapfs.model import Caller
from snapfs.root.layers import Layers
from snapfs.scan.layercopy import LayerCopy
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.threads import in_thread_or_here

WALKS = 3
"""How often a layer is walked at most (``LayerCopy.complete``) while those that write it are held up."""


class Copying:
    """The copies of one root, in which ``fd`` is open; with ``sync`` its disk is flushed before each walk of a layer.
    ``serve`` must be running."""

    def __init__(self, layers: Layers, fd: int, *, sync: bool) -> None:
        self.under_way: dict[int, LayerCopy] = {}
        """The copy of each snapshot's layer that is being made."""
        self._layers = layers
        self._fd = fd
        self._sync = sync
        self._copies: Sharing[None] = Sharing(Turns(2))
        self._serials = 0

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Copy until cancelled."""
        await self._copies.serve(task_status)

    @asynccontextmanager
    async def copied(
        self, number: int, name: str, still: Callable[[], AbstractContextManager[None]], caller: Caller
    ) -> AsyncIterator[str]:
        """For a block: a copy of the layer of the active snapshot ``number``, called ``name``, as a directory in the pool
        (``Layers.make_ahead``), which the block puts in its place.  ``still`` is entered when most is copied, and left when all
        is, or when that does not keep it from being written: it may hold up who writes.

        Raises Unavailable, with TryAgain where the layer changes faster than it can be copied, or ``caller`` would wait for
        others; Damaged."""
        layers, made = self._layers, list[str]()
        self._serials += 1

        def copy(checkpoint: Checkpoint) -> None:
            layers.refuse_damaged(number)
            made.append(layers.make_ahead())
            made.append(layers.make_ahead())
            copy = LayerCopy(
                layers.held_directory(number) + "/fs",
                layers.made_path(made[0]),
                layers.made_path(made[1]),
                flush=self._flush,
                checkpoint=checkpoint,
            )
            self.under_way[number] = copy
            try:
                with layers.naming:
                    copy.walk()
                    try:
                        with still():
                            copy.complete(WALKS)
                    except TryAgain:  # who writes does not hold still
                        copy.complete()
            finally:
                if self.under_way.get(number) is copy:
                    del self.under_way[number]

        try:
            try:
                await self._copies.run(f"copy of snapshot {number}", copy, caller, also=self._serials)
            except FileNotFoundError as error:
                words = f'the layer of snapshot "{name}" went missing'
                raise Damaged(f"{words}: {names.shown(str(error.filename))}", public=words) from error
            except OSError as error:
                error.filename = names.shown(str(error.filename)) if error.filename else None
                raise Unavailable.from_os(f'copy the layer of snapshot "{name}"', error, subids.hint(error)) from error
            yield made[0]
        finally:
            with trio.CancelScope(shield=True):
                await in_thread_or_here(self._discard, made)

    def _discard(self, made: list[str]) -> None:
        for name in made:
            self._layers.discard_made(name)

    def _flush(self) -> None:
        if self._sync:
            mounting.sync_file_system(self._fd)
