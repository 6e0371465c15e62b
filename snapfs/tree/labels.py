"""labels/: one file a label.  Writing, creating, unlinking and renaming them is Update.

A file holds the label's value and a newline; one trailing newline of what is written is dropped.  Each write is one durable
Update with all that this open has written so far, so ``write`` itself reports the error, and no reader ever sees the label
gone while a shell's ``>`` replaces it: an emptied file changes nothing until something is written, or it is closed empty,
which deletes the label (a label has no empty value).
"""

from __future__ import annotations

import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import AlreadyExists, InvalidArgument, LabelTooBig, NotFound, NotPermitted, NotUtf8, SnapshotError
from snapfs.labels import MAX, check_label
from snapfs.metastore import Record
from snapfs.tree.node import Attributes, Directory, Handle, Node, OpenText, Slot, pack
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


_SWAP_FILE = re.compile(r"\..*\.sw[a-p]")
"""vim's: refused at once it goes elsewhere (its option 'directory'), refused when it is written vim complains."""


def label_slots(keys: Iterable[str]) -> dict[str, int]:
    """The slot of each label of one snapshot: a hash of its key, or the next free one where two collide."""
    span = Slot.VERSION_OF - Slot.FIRST_LABEL
    taken: dict[int, str] = {}
    for key in keys:
        place = zlib.crc32(key.encode()) % span
        while taken.setdefault(place, key) != key:
            place = (place + 1) % span
    return {key: place + Slot.FIRST_LABEL for place, key in taken.items()}


def label_bytes(value: str) -> bytes:
    """What the file of a label with ``value`` holds."""
    return value.encode() + b"\n"


class OpenLabel(Handle):
    """A label's file open for writing, with a content of its own until it is closed."""

    direct = True

    def __init__(self, tree: Tree, number: int, key: str, inode: int, content: bytes, emptied: bool) -> None:
        self.content = content
        self.tree = tree
        self.number = number
        self.key = key
        self.inode = inode
        self.emptied = emptied  # and nothing written since: not yet applied
        self.appends = False  # opened with O_APPEND
        tree.open_labels.setdefault(number, []).append(self)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        if self.appends:  # wherever the caller believes the end to be
            offset = len(self.content)
        before = self.content[:offset].ljust(offset, b"\0")
        try:
            await self._apply(before + data + self.content[offset + len(data) :])
        except SnapshotError:
            self.emptied = False  # what was to replace the label is refused, so the label stays
            raise
        return len(data)

    async def resize(self, size: int) -> None:
        if size == 0:
            self.content, self.emptied = b"", True
        elif size != len(self.content):
            if size > MAX + 1:
                raise LabelTooBig(f'label "{self.key[:40]}": key and value take at most {MAX} bytes together')
            await self._apply(self.content[:size].ljust(size, b"\0"))

    async def _apply(self, content: bytes) -> None:
        try:
            value = content.removesuffix(b"\n").decode()
        except UnicodeDecodeError:
            raise NotUtf8(f'the value of label "{self.key[:40]}" must be UTF-8') from None
        await self.tree.snapshotter.update(self.number, {self.key: value}, [f"labels.{self.key}"])
        self.content, self.emptied = content, False

    async def close(self) -> None:
        handles = self.tree.open_labels[self.number]
        handles.remove(self)
        if not handles:
            del self.tree.open_labels[self.number]
        if self.emptied and self.key in self.tree.record(self.number).labels:
            await self._apply(b"")


class Label(Node):
    """The file of one label."""

    mode = stat.S_IFREG | 0o644
    keep_entry = False

    def __init__(self, tree: Tree, number: int, record: Record, key: str, inode: int) -> None:
        super().__init__(tree, inode)
        self.number = number
        self.record = record
        self.key = key

    @property
    def path(self) -> str:
        return f"{self.record.kind}/{names.encode(self.record.name)}/labels/{names.encode(self.key)}"

    def attributes(self) -> Attributes:
        handles = [handle for handle in self.tree.open_labels.get(self.number, ()) if handle.inode == self.inode]
        # a writer at work sees the size that it has made: the kernel appends there
        size = handles[-1].size if handles else len(label_bytes(self.record.labels.get(self.key, "")))
        return Attributes(self.mode, size=size, time=self.record.updated, keep=False)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        content = label_bytes(self.record.labels[self.key]) if self.key in self.record.labels else b""
        if not writing and not truncate:
            return OpenText(Text(content))
        return OpenLabel(self.tree, self.number, self.key, self.inode, b"" if truncate else content, emptied=truncate)

    async def resize(self, size: int) -> None:
        handle = await self.open(writing=True)
        try:
            await handle.resize(size)
        finally:
            await handle.close()


class LabelsDirectory(Directory):
    """labels/ of one snapshot."""

    def __init__(self, tree: Tree, number: int, record: Record, bank: int = 0) -> None:
        super().__init__(tree, pack(number, Slot.LABELS | bank))
        self.number = number
        self.record = record

    @property
    def path(self) -> str:
        return f"{self.record.kind}/{names.encode(self.record.name)}/labels"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.record.updated)

    def _slots(self) -> dict[str, int]:
        """The slots of all labels, those among them that are open and not yet, or no more, stored."""
        handles = self.tree.open_labels.get(self.number, ())
        return label_slots([*self.record.labels, *(handle.key for handle in handles)])

    def _node(self, key: str, slot: int) -> Label:
        return Label(self.tree, self.number, self.record, key, pack(self.number, slot))

    def node(self, inode: int) -> Label:
        """The label with ``inode``; raises NotFound."""
        for key, slot in self._slots().items():
            if pack(self.number, slot) == inode:
                return self._node(key, slot)
        for handle in self.tree.open_labels.get(self.number, ()):  # renamed while it was open
            if handle.inode == inode:
                return Label(self.tree, self.number, self.record, handle.key, inode)
        raise NotFound(f"a label of {self.record.name} does not exist any more")

    def _exists(self, key: str) -> bool:
        if key in self.record.labels:
            return True
        return any(handle.key == key and handle.emptied for handle in self.tree.open_labels.get(self.number, ()))

    def lookup(self, name: str) -> Node:
        try:
            key = names.decode(name)
        except InvalidArgument as error:
            raise NotFound(str(error)) from None
        if not self._exists(key):
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return self._node(key, self._slots()[key])

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        for key, slot in sorted(self._slots().items(), key=lambda item: item[1]):
            if slot > after and self._exists(key):
                try:
                    name = names.encode(key)
                except InvalidArgument:  # its file name would be too long: info.json shows it
                    continue
                yield slot, name, self._node(key, slot)

    async def create(self, name: str) -> tuple[Node, Handle]:
        key = names.decode(name)
        check_label(key, "")
        if _SWAP_FILE.fullmatch(key):
            raise NotPermitted(f'"{key}" is an editor\'s swap file, which is no label')
        if self._exists(key):
            raise AlreadyExists(f'snapshot "{self.record.name}" has a label "{key}" already')
        slot = label_slots([*self._slots(), key])[key]
        handle = OpenLabel(self.tree, self.number, key, pack(self.number, slot), b"", emptied=True)
        return self._node(key, slot), handle

    async def unlink(self, name: str, pid: int) -> None:
        node = self.lookup(name)
        assert isinstance(node, Label)
        self.tree.refuse_torn_down(self.number, pid)
        for handle in self.tree.open_labels.get(self.number, ()):
            if handle.key == node.key:
                handle.emptied = False  # nothing of it is left to apply
        if node.key in self.record.labels:
            await self.tree.snapshotter.update(self.number, {}, [f"labels.{node.key}"])

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename a label; one that was opened and not yet written goes along as what it is: empty."""
        node = self.lookup(old)
        assert isinstance(node, Label)
        key = names.decode(new)
        if not replace and self._exists(key):
            raise AlreadyExists(f'snapshot "{self.record.name}" has a label "{key}" already')
        if node.key in self.record.labels:
            await self.tree.snapshotter.move_label(self.number, node.key, key, replace=replace)
        elif key in self.record.labels:
            await self.tree.snapshotter.update(self.number, {}, [f"labels.{key}"])
        for handle in self.tree.open_labels.get(self.number, ()):
            if handle.key == key:
                handle.emptied = False
            elif handle.key == node.key:
                handle.key = key
