"""``layer.tar`` of a committed snapshot: its layer as an OCI layer.  It is the one file of which the tree has no text: the
library reads it from the layer's own files."""

from __future__ import annotations

import logging
import time
import zlib

import trio

from snapfs.errors import SnapshotError
from snapfs.model import Caller
from snapfs.snapshotter import OpenLayer
from snapfs.store.schema import Record
from snapfs.threads import in_thread, in_thread_or_here
from snapfs.tree.handles import Handle
from snapfs.tree.state import State
from snapfs.tree.texts import OVERHEAD, Text

log = logging.getLogger(__name__)

AHEAD = 1 << 20  # bytes of one that are in memory for who reads on


class LayerText(Text):
    """What stands for the text of one: it is ``size`` bytes long, and can't be read here.  A committed layer never changes, so
    that one size is one text."""

    blocks = True

    def __init__(self, size: int) -> None:
        self.made = time.time_ns()
        self.size = size
        self.weight = OVERHEAD
        self.checksum = zlib.crc32(b"%d" % size)


def layer_tar(state: State, number: int, record: Record) -> Text | None:
    """What stands for it, where its size is known."""
    size = state.snapshotter.known_tar_size(number, record)
    return None if size is None else LayerText(size)


def is_indexed(state: State, number: int, record: Record) -> bool:
    """Whether it can be read without anything to wait for."""
    return state.snapshotter.has_tar_index(number)


async def index_layer(state: State, number: int, record: Record, caller: Caller) -> None:
    """Have its headers made, which takes a walk of the layer."""
    opened = await state.snapshotter.layer_tar(number, caller=caller)
    opened.close()  # nothing of the layer has been opened


def open_layer(state: State, number: int, text: Text) -> Handle:
    """The file, open for reading."""
    return OpenLayerTar(state, number, text)


class OpenLayerTar(Handle):
    """One that is open.  It reads in a thread, one part after the other; what the kernel asks for next was mostly read with
    that."""

    blocks = True
    weight = OVERHEAD + AHEAD
    text: Text

    def __init__(self, state: State, number: int, text: Text) -> None:
        self.text = text
        self._state = state
        self._number = number
        self._layer: OpenLayer | None = None
        self._in_order = trio.Lock()  # requests come as they are in the file, mostly
        self._noted = False

    @property
    def size(self) -> int:
        return self.text.size

    async def fetch(self, offset: int, size: int) -> bytes | memoryview:
        async with self._in_order:
            if self._layer is None:
                self._layer = await self._state.snapshotter.layer_tar(self._number)  # again, where the index was forgotten
            if size > AHEAD:  # no kernel asks for so much
                return await in_thread(self._layer.read, offset, size)
            data = self._layer.at_hand(offset, size)
            if data is None:
                try:
                    await in_thread(self._layer.load, offset, size, abandon_on_cancel=True)
                except trio.Cancelled:  # the daemon ends, and does not wait for a disk that may never answer
                    self._layer = None  # the thread has it
                    raise
                data = self._layer.at_hand(offset, size)
                assert data is not None
            if self._layer.digest is not None and not self._noted:
                self._noted = True
                await self._note()
            return data

    async def _note(self) -> None:
        """Have the diff id kept, which has become known, before whoever has read the last byte can ask for it."""
        try:
            await self._state.snapshotter.diff_id(self._number)
        except SnapshotError as error:  # the snapshot is just being removed
            log.info("a diff id was not kept: %s", error)

    async def close(self) -> None:
        async with self._in_order:
            if self._layer is not None:
                await in_thread_or_here(self._layer.close)
