"""Comparing: what a layer changed against its chain, scanned in threads; calls at the same time share a scan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, TypeVar

import trio

from snapfs.errors import Damaged, Unavailable
from snapfs.kernel import subids
from snapfs.model import Caller
from snapfs.root.layers import Layers
from snapfs.rules.lookup import find
from snapfs.scan.changes import changes
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.store.metastore import MetaStore

T = TypeVar("T")


class Comparing:
    """The scans of one root, with overlays' own attributes that begin with ``prefix``.  ``serve`` must be running."""

    def __init__(self, layers: Layers, records: MetaStore, prefix: str) -> None:
        self._layers = layers
        self._prefix = prefix
        self._records = records
        self._scans: Sharing[Any] = Sharing(Turns(2))  # disks gain little from more

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Scan until cancelled."""
        await self._scans.serve(task_status)

    async def changes(
        self, number: int, name: str, chain: list[int], consume: Callable[[Iterable[str]], T], caller: Caller
    ) -> T:
        """What ``consume`` makes of the lines (``scan/changes.py``) of snapshot ``number``, called ``name``, with this chain;
        for ``caller``.

        Raises NotFound where it was removed meanwhile; Damaged; Unavailable, and TryAgain where it would wait for others.
        """

        def scan(checkpoint: Checkpoint) -> T:
            for layer in (number, *chain):
                self._layers.refuse_damaged(layer)
            directories = [self._layers.fs(layer) for layer in (number, *chain)]
            found = changes(directories, prefix=self._prefix, checkpoint=checkpoint, spool=self._layers.root)
            with closing(found) as lines:
                return consume(lines)

        try:
            result: T = await self._scans.run(f"comparison of snapshot {number}", scan, caller, also=consume)
        except (Damaged, OSError) as error:
            with self._records.reading() as reader:  # it may have been removed meanwhile
                find(reader, number)
            if isinstance(error, Damaged):
                raise
            if isinstance(error, FileNotFoundError):
                raise Damaged(f'the layer {error.filename} of snapshot "{name}" or of a parent is missing') from None
            raise Unavailable.from_os(f'compare snapshot "{name}" with its parents', error, subids.hint(error)) from error
        return result
