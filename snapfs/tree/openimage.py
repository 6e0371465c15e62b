"""image.json, open for writing: what comes is collected, and is the snapshot's when the JSON object is whole.

So the ``write`` that brings its end says whether all of it will do.  One that is closed before that changes nothing, and
error_log says so: close(2) waits for nobody.
"""

from __future__ import annotations

from snapfs.errors import InvalidArgument, NotPermitted, SnapshotError, TryAgain
from snapfs.imagejson import FILE, Document
from snapfs.model import OWNER, ByNode
from snapfs.threads import in_thread
from snapfs.tree.handles import Handle
from snapfs.tree.inodes import IMAGE_SLOT
from snapfs.tree.state import State
from snapfs.tree.texts import IN_MEMORY, OVERHEAD, Text

AT_ONCE = 64 << 10  # bytes that are looked at without a thread
MOST = 32 << 20
"""Bytes that all may have collected that the owner and root have open: those of other users count as what else these have open
(``fuse/openfiles.py``), so that nobody can keep the owner from writing one."""


class OpenImage(Handle):
    """That of the snapshot whose directory has the number ``key``, open for ``caller``, which is set before anything is
    written."""

    direct = True
    waits_for = FILE
    caller = OWNER

    def __init__(self, state: State, key: ByNode) -> None:
        self.does = key, FILE
        self._state = state
        self._key = key
        self._document = Document()

    @property
    def size(self) -> int:
        return len(self._document.content)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._document.content[offset : offset + size])

    async def write(self, offset: int, data: bytes) -> int:
        if offset == 0:
            self.forget()
        if offset != self.size:
            raise NotPermitted(f"{FILE} is written from its beginning to its end: write all of it anew")
        if self.caller.user is None and self._state.image_bytes + len(data) > MOST:
            raise TryAgain(f"you and root write as much of {FILE} as may be, for all snapshots together: end what hangs")
        document = self._document
        try:
            if len(data) > AT_ONCE:
                await in_thread(document.add, data, limiter=self._state.image_looks)
            else:
                document.add(data)
            self._weigh()
            if document.is_whole:
                await self._apply(bytes(document.content))
        except SnapshotError:
            self.forget()
            raise
        return len(data)

    async def _apply(self, content: bytes) -> None:
        info = await self._state.snapshotter.set_image(self._key, content, caller=self.caller)
        if len(content) <= IN_MEMORY:
            self._state.keep(info.id, IMAGE_SLOT, Text(content))  # stat(2) shows its size at once

    def forget(self) -> None:
        """Begin anew."""
        self._document = Document()
        self._weigh()

    def _weigh(self) -> None:
        weight = OVERHEAD + self.size
        if self.caller.user is None:
            self._state.image_bytes += weight - self.weight
        self.weight = weight

    async def resize(self, size: int) -> None:
        if size == 0:
            self.forget()  # nothing happens yet
        elif size != self.size:
            raise NotPermitted(f"{FILE} can't be cut: write all of it anew")

    async def close(self) -> None:
        is_cut = bool(self._document.content) and not self._document.is_whole
        self.forget()
        if is_cut:
            raise InvalidArgument(f"{FILE} was closed before the JSON object ended, and stays as it was")
