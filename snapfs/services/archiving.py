"""Archiving: committed layers as tars.  Their indexes are made in threads and kept, what they hash to is noted for ever."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TypeVar

import trio

from snapfs.errors import Damaged, FailedPrecondition, Unavailable
from snapfs.kernel import subids
from snapfs.model import Caller, Kind, Ref
from snapfs.rules import digest
from snapfs.rules.lookup import find
from snapfs.rules.root import Root
from snapfs.scan.layertar import READ, LayerTar, make_index
from snapfs.scan.layertar import OpenLayer as OpenLayer
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import Record

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST = 64  # indexes that are kept, each with a descriptor
MOST_ON_DISK = 128 << 20  # bytes of them; the one that was used last may be larger


class Archiving:
    """The tars of one root's layers.  ``serve`` must be running; all methods are for trio tasks."""

    def __init__(self, root: Root, records: MetaStore) -> None:
        self._root = root
        self._records = records
        self._indexing: Sharing[LayerTar] = Sharing(Turns(2))  # disks gain little from more
        self._hashing: Sharing[None] = Sharing(Turns(2))  # which takes longer, and keeps no index waiting
        self._kept: OrderedDict[int, LayerTar] = OrderedDict()  # the one that was used last is the last
        self._sizes: dict[int, int] = {}

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Make indexes and digests until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._indexing.serve, name="snapfs indexes of tars")
            await nursery.start(self._hashing.serve, name="snapfs digests")
            task_status.started()

    def size(self, number: int, record: Record) -> int | None:
        """How many bytes the tar of snapshot ``number`` has; None where that is not known."""
        return self._sizes.get(number) or record.tar_size or None

    def has_index(self, number: int) -> bool:
        """Whether the index of that is kept."""
        return number in self._kept

    def forget(self, number: int) -> None:
        """Snapshot ``number`` is gone."""
        self._kept.pop(number, None)
        self._sizes.pop(number, None)

    async def layer_tar(self, key: Ref, caller: Caller) -> OpenLayer:
        """The tar of the committed snapshot ``key``, open for reading.

        Raises NotFound; FailedPrecondition: the snapshot is not committed, or its layer can't be told in a tar; Damaged;
        Unavailable, and TryAgain where ``caller`` would wait for others."""
        _, found = await self._indexed(key, caller)
        return found.open()

    async def diff_id(self, key: Ref, caller: Caller) -> str:
        """The SHA-256 of that tar, ``sha256:`` and 64 digits, which is noted.  Raises the same."""
        number, record = self._found(key)
        known = digest.diff_id(record)
        if known is not None and record.tar_size == self.size(number, record):
            return known
        number, found = await self._indexed(number, caller)
        if found.hashing.digest is None:
            doing = f'read the layer of snapshot "{record.name}"'
            hashed = partial(_hash, found)
            await self._in_turn(self._hashing, f"digest of snapshot {number}", hashed, number, doing, caller)
        assert found.hashing.digest is not None
        noted = partial(digest.note, self._root, number=number, digest=found.hashing.digest, size=found.size)
        try:
            await self._records.write(lambda writer: noted(writer=writer))
        except Unavailable as error:  # it is right all the same
            log.warning('the diff id of snapshot "%s" can\'t be kept: %s', record.name, error)
        return digest.shown(found.hashing.digest)

    async def _indexed(self, key: Ref, caller: Caller) -> tuple[int, LayerTar]:
        """The id of ``key``, and its tar, with an index."""
        number, record = self._found(key)
        if (kept := self._kept.get(number)) is not None:
            self._kept.move_to_end(number)
            return number, kept
        layers = self._root.layers
        below = layers.fs(record.parent) if record.parent else None

        def make(checkpoint: Checkpoint) -> LayerTar:
            layers.refuse_damaged(number)
            prefix, ids = self._root.overlay_prefix, subids.as_in_images()
            return make_index(layers.fs(number), below=below, prefix=prefix, ids=ids, checkpoint=checkpoint, spool=layers.root)

        doing = f'make a tar of the layer of snapshot "{record.name}"'
        made = await self._in_turn(self._indexing, f"index of the tar of snapshot {number}", make, number, doing, caller)
        return number, self._keep(number, record, made)

    def _found(self, key: Ref) -> tuple[int, Record]:
        """The committed snapshot ``key``, whose layer is whole: id and record."""
        with self._records.reading() as reader:
            number, record = find(reader, key)
        if record.kind is not Kind.COMMITTED:
            raise FailedPrecondition(
                f'snapshot "{record.name}" is {record.kind}: only committed ones have a layer that is a tar'
            )
        self._root.unflushed.refuse_lost([number])
        return number, record

    def _keep(self, number: int, record: Record, made: LayerTar) -> LayerTar:
        """Keep ``made``, or what another call for the same has brought, and no more of the others than may be."""
        kept = self._kept.setdefault(number, made)
        self._kept.move_to_end(number)
        self._sizes[number] = kept.size
        if record.tar_size == kept.size:
            kept.hashing.digest = record.diff_id or kept.hashing.digest  # which needn't be found out again
        elif record.tar_size:
            log.warning('the tar of snapshot "%s" is not what it was: something has written in its layer', record.name)
        while len(self._kept) > 1 and (
            len(self._kept) > MOST or sum(each.on_disk for each in self._kept.values()) > MOST_ON_DISK
        ):
            self._kept.popitem(last=False)
        return kept

    async def _in_turn(
        self, turns: Sharing[T], words: str, work: Callable[[Checkpoint], T], number: int, doing: str, caller: Caller
    ) -> T:
        """What ``work`` gives, which looks at the layer of snapshot ``number``.  ``doing`` goes on from "cannot "."""
        try:
            return await turns.run(words, work, caller, settled=True)
        except (Damaged, OSError) as error:
            with self._records.reading() as reader:
                find(reader, number)  # it was removed meanwhile
            if isinstance(error, Damaged):
                raise
            if isinstance(error, FileNotFoundError):
                raise Damaged(f"cannot {doing}: {error.filename} went missing meanwhile") from None
            raise Unavailable.from_os(doing, error, subids.hint(error)) from error


def _hash(found: LayerTar, checkpoint: Checkpoint) -> None:
    """Read what has not yet been read."""
    with closing(found.open()) as opened:
        while found.hashing.digest is None:
            checkpoint()
            opened.load(found.hashing.frontier, min(READ, found.size - found.hashing.frontier))
