"""Comparing: what a layer changed against its chain, as lines or as a patch, scanned in threads; calls at the same time share
a scan."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import trio

from snapfs.errors import Damaged, Unavailable
from snapfs.kernel import subids
from snapfs.model import Caller
from snapfs.root.layers import Layers
from snapfs.rules.lookup import find
from snapfs.scan.changes import changes
from snapfs.scan.lines import lines
from snapfs.scan.patch import patch
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.store.metastore import MetaStore

T = TypeVar("T")


class Pair(NamedTuple):
    """Two chains of layers that are compared, the nearest first, and of which paths, from the root on (none: of all).
    ``doing`` goes on from "cannot "."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    paths: tuple[bytes, ...]
    doing: str

    @property
    def layers(self) -> set[int]:
        """All that are looked at."""
        return {*self.old, *self.new}

    @property
    def words(self) -> str:
        """Which these are."""
        return f"from {list(self.old)} to {list(self.new)}" + f" of {list(self.paths)}" * bool(self.paths)


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

        def look(checkpoint: Checkpoint) -> Generator[str, None, None]:
            layers = self._directories([number, *chain])
            return changes(layers, prefix=self._prefix, checkpoint=checkpoint, spool=self._layers.root)

        words = f"comparison of snapshot {number}"
        return await self._scanned(words, look, consume, [number], f'compare snapshot "{name}" with its parents', caller)

    async def lines(self, pair: Pair, content: bool, consume: Callable[[Iterable[str]], T], caller: Caller) -> T:
        """The same of the lines (``scan/lines.py``) in which ``pair`` differs."""

        def look(checkpoint: Checkpoint) -> Generator[str, None, None]:
            return lines(*map(self._directories, pair[:2]), content=content, **self._common(pair, checkpoint))

        words = f"{'close ' * content}comparison {pair.words}"
        return await self._scanned(words, look, consume, pair.layers, pair.doing, caller)

    async def patch(self, pair: Pair, binary: bool, consume: Callable[[Iterable[str]], T], caller: Caller) -> T:
        """The same of the patch (``scan/patch.py``) for it."""

        def look(checkpoint: Checkpoint) -> Generator[str, None, None]:
            return patch(*map(self._directories, pair[:2]), binary=binary, **self._common(pair, checkpoint))

        words = f"{'binary ' * binary}patch {pair.words}"
        return await self._scanned(words, look, consume, pair.layers, pair.doing, caller)

    def _common(self, pair: Pair, checkpoint: Checkpoint) -> dict[str, Any]:
        return {"prefix": self._prefix, "checkpoint": checkpoint, "spool": self._layers.root, "paths": pair.paths}

    def _directories(self, layers: Sequence[int]) -> list[str]:
        """Those of the files of ``layers``.  Raises Damaged."""
        for layer in layers:
            self._layers.refuse_damaged(layer)
        return [self._layers.fs(layer) for layer in layers]

    async def _scanned(
        self,
        words: str,
        look: Callable[[Checkpoint], Generator[str, None, None]],
        consume: Callable[[Iterable[str]], T],
        of: Iterable[int],
        doing: str,
        caller: Caller,
    ) -> T:
        """What ``consume`` makes of what ``look`` finds in the layers of snapshots ``of``, which must still be there then;
        errors as for ``changes``."""

        def scan(checkpoint: Checkpoint) -> T:
            with closing(look(checkpoint)) as found:
                return consume(found)

        try:
            result: T = await self._scans.run(words, scan, caller, also=consume)
        except (Damaged, OSError) as error:
            self._refuse_removed(of)
            if isinstance(error, Damaged):
                raise
            if isinstance(error, FileNotFoundError):
                raise Damaged(f"cannot {doing}: the layer {error.filename} is missing") from None
            raise Unavailable.from_os(doing, error, subids.hint(error)) from error
        self._refuse_removed(of)  # what vanishes during a scan is left out
        return result

    def _refuse_removed(self, snapshots: Iterable[int]) -> None:
        """Raise NotFound where one of them was removed meanwhile."""
        with self._records.reading() as reader:
            for number in snapshots:
                find(reader, number)
