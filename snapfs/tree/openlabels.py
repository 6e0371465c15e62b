"""Labels that are open for writing, and the inodes of their writers.

Each process that writes a label has an inode of its own, from before it opens the file: no other process sees what it cuts and
writes there.  Each write is one durable Update with all that this open has written so far, so ``write`` itself reports errors.
"""

from __future__ import annotations

from snapfs.errors import LabelTooBig, NotUtf8, SnapshotError
from snapfs.labels import MAX
from snapfs.model import ByNode
from snapfs.snapshotter import Snapshotter
from snapfs.tree.handles import Handle, Pieces
from snapfs.tree.inodes import WRITERS, WRITING, label_slot, pack
from snapfs.tree.texts import OVERHEAD
from snapfs.tree.users import OfUsers, asker


class OpenLabels:
    """The labels of all snapshots that are open for writing, and the inodes that were lately given to writers, of each user
    apart."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self.snapshotter = snapshotter
        self._open: dict[int, list[OpenLabel]] = {}  # by the number of the snapshot in inodes
        self._by_inode: dict[int, list[OpenLabel]] = {}
        self._keys: OfUsers[str] = OfUsers(WRITERS, WRITING)  # by the inode of a writer
        self._writers_made = 0

    def of(self, node: int) -> list[OpenLabel]:
        """Those of the snapshot for which inodes have the number ``node``."""
        return self._open.get(node, [])

    def at(self, inode: int) -> OpenLabel | None:
        """The one that was opened last under ``inode``."""
        handles = self._by_inode.get(inode)
        return handles[-1] if handles else None

    def new_writer(self, node: int, key: str) -> int:
        """An inode for one writer, of ``users.asker``, of label ``key`` of the snapshot for which inodes have the number
        ``node``."""
        inode = 0
        while not inode or inode in self._keys:
            self._writers_made += 1
            inode = pack(node, label_slot(f"{key}\0\0{self._writers_made}"))
        self._keys.put(asker.get(), inode, key)
        return inode

    def key_of(self, inode: int) -> str | None:
        """The label for a writer of which ``inode`` was lately made; None for any other inode."""
        return self._keys.get(inode)

    def is_writers(self, inode: int) -> bool:
        """Whether ``inode`` was lately made for a writer."""
        return inode in self._keys

    def add(self, handle: OpenLabel) -> None:
        """``handle`` is open from now on."""
        self._open.setdefault(handle.node, []).append(handle)
        self._by_inode.setdefault(handle.inode, []).append(handle)

    def remove(self, handle: OpenLabel) -> None:
        """``handle`` is about to be closed."""
        for handles, key in ((self._open, handle.node), (self._by_inode, handle.inode)):
            handles[key].remove(handle)
            if not handles[key]:
                del handles[key]


class OpenLabel(Handle):
    """A label's file open for writing, with a content of its own until it is closed.

    ``emptied``: it was cut to nothing and nothing was written since, which is not yet applied.  ``appends``: every write goes
    to the end, wherever the writer believes that to be (O_APPEND).
    """

    direct = True
    weight = OVERHEAD + MAX

    def __init__(self, labels: OpenLabels, node: ByNode, key: str, inode: int, content: bytes, emptied: bool) -> None:
        self.content = content
        self.node = node
        self.key = key
        self.inode = inode
        self.emptied = emptied
        self.appends = False
        self._pieces = Pieces()
        self._labels = labels
        labels.add(self)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        if self.appends:
            offset = len(self.content)
        try:
            with self._pieces.one(data):
                self._refuse_beyond(offset + len(data))
                before = self.content[:offset].ljust(offset, b"\0")
                await self._apply(before + data + self.content[offset + len(data) :])
        except SnapshotError:
            self.emptied = False  # what was to replace the label is refused, so the label stays
            raise
        return len(data)

    async def resize(self, size: int) -> None:
        if size == 0:
            self.content, self.emptied = b"", True
            self._pieces.begin_anew()
        elif size != len(self.content):
            self._refuse_beyond(size)
            await self._apply(self.content[:size].ljust(size, b"\0"))

    def _refuse_beyond(self, size: int) -> None:
        """Raise LabelTooBig, before any memory is taken for it, where the content can't have ``size`` bytes."""
        if size > MAX + 1:  # with a newline
            raise LabelTooBig(
                f'label "{self.key[:40]}": the value alone would take {size} bytes; with the key at most {MAX} fit'
            )

    async def _apply(self, content: bytes) -> None:
        try:
            value = content.removesuffix(b"\n").decode()
        except UnicodeDecodeError:
            raise NotUtf8(f'the value of label "{self.key[:40]}" must be UTF-8') from None
        await self._labels.snapshotter.update(self.node, {self.key: value}, [f"labels.{self.key}"])
        self.content, self.emptied = content, False

    async def close(self) -> None:
        self._labels.remove(self)
        if self.emptied and self.key in self._labels.snapshotter.by_node(self.node)[1].labels:
            await self._apply(b"")
