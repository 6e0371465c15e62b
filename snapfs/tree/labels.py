"""labels/: one file a label.  Writing, creating, unlinking and renaming them is Update.

A file holds the label's value and a newline; one trailing newline of what is written is dropped.  Each write is one durable
Update with all that this open has written so far, so ``write`` itself reports the error, and no reader ever sees the label
gone while a shell's ``>`` replaces it: an emptied file changes nothing until something is written, or it is closed empty,
which deletes the label (a label has no empty value).

As with all files that change, each value has an inode of its own.  So has each writer, from before it opens the file: what
it cuts and writes there is nobody else's.
"""

from __future__ import annotations

import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import AlreadyExists, InvalidArgument, LabelTooBig, NotFound, NotPermitted, NotUtf8, SnapshotError, Stale
from snapfs.labels import MAX, check_label
from snapfs.store.schema import Record
from snapfs.tree.node import Attributes, Directory, Handle, Node, OpenText, Slot, pack
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


_SWAP_FILE = re.compile(r"\..*\.sw[a-p]")
"""vim's: refused at once it goes elsewhere (its option 'directory'), refused when it is written vim complains."""


def label_slots(words: Iterable[str]) -> dict[str, int]:
    """A slot for each of ``words``, about the labels of one snapshot: its own (``label_slot``), or the next free one where two
    collide."""
    taken: dict[int, str] = {}
    for word in words:
        slot = label_slot(word)
        while taken.setdefault(slot, word) != word:
            slot = slot + 1 if slot + 1 < Slot.VERSION_OF else Slot.FIRST_LABEL
    return {word: slot for slot, word in taken.items()}


def label_slot(word: str) -> int:
    """A hash of ``word`` among the slots of labels."""
    return zlib.crc32(word.encode()) % (Slot.VERSION_OF - Slot.FIRST_LABEL) + Slot.FIRST_LABEL


class LabelText(Text):
    """What the file of the label ``key`` with ``value`` holds."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(value.encode() + b"\n")
        self.key = key


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
        try:
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
    """The file of one label: with one ``text`` of it, or (None) a writer's own."""

    mode = stat.S_IFREG | 0o666
    keep_entry = False

    def __init__(self, tree: Tree, number: int, record: Record, key: str, inode: int, text: Text | None) -> None:
        super().__init__(tree, inode)
        self.number = number
        self.record = record
        self.key = key
        self.text = text

    @property
    def path(self) -> str:
        return f"{self.record.kind}/{names.encode(self.record.name)}/labels/{names.encode(self.key)}"

    @property
    def shown_inode(self) -> int:
        return pack(self.number, label_slot(self.key))

    def now(self) -> Text:
        """What it holds now, if it is not being written."""
        value = self.record.labels.get(self.key)
        return Text(b"") if value is None else LabelText(self.key, value)

    def attributes(self) -> Attributes:
        size = (self.text or self.now()).size
        for handle in self.tree.open_labels.get(self.number, ()):
            if handle.inode == self.inode:
                size = handle.size  # a writer sees what it has made: the kernel appends there
        return Attributes(self.mode, size=size, time=self.record.updated, keep=False)

    def for_writing(self) -> Label:
        """The same label as a file of one writer's own, to be opened soon."""
        if self.text is None:
            return self
        return Label(self.tree, self.number, self.record, self.key, self.tree.new_writer(self.number, self.key), None)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        if not writing and not truncate:
            return OpenText(self.text or self.now())
        now = self.now()
        content = b"" if truncate else now.read(0, now.size)
        return OpenLabel(self.tree, self.number, self.key, self.for_writing().inode, content, emptied=truncate)

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

    def _handles(self) -> list[OpenLabel]:
        return self.tree.open_labels.get(self.number, [])

    def _inodes(self) -> dict[str, int]:
        """The inodes of the files that there are, by key: that of the value, or of who is just making the label."""
        inodes = {handle.key: handle.inode for handle in self._handles() if handle.emptied}
        words = {f"{key}\0{value}": key for key, value in self.record.labels.items()}
        return inodes | {words[word]: pack(self.number, slot) for word, slot in label_slots(words).items()}

    def _label(self, key: str, inode: int, text: Text | None) -> Label:
        return Label(self.tree, self.number, self.record, key, inode, text)

    def _node(self, key: str, inode: int) -> Label:
        value = self.record.labels.get(key)
        text = None if value is None else LabelText(key, value)
        if text is not None:
            self.tree.versions.keep(inode, text)
        return self._label(key, inode, text)

    def node(self, inode: int) -> Label:
        """The label with ``inode``; raises NotFound, or Stale where it has another value by now."""
        for handle in self._handles():
            if handle.inode == inode:
                return self._label(handle.key, inode, None)
        if inode in self.tree.writers:
            return self._label(self.tree.writers[inode], inode, None)
        text = self.tree.versions.get(inode)
        if isinstance(text, LabelText):
            return self._label(text.key, inode, text)
        for key, its in self._inodes().items():
            if its == inode:
                return self._node(key, inode)
        raise Stale(self.path)

    def lookup(self, name: str) -> Node:
        try:
            key = names.decode(name)
        except InvalidArgument as error:
            raise NotFound(str(error)) from None
        inode = self._inodes().get(key)
        if inode is None:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return self._node(key, inode)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        inodes = self._inodes()
        for key, slot in sorted(label_slots(inodes).items(), key=lambda item: item[1]):
            if slot > after:
                try:
                    name = names.encode(key)
                except InvalidArgument:  # its file name would be too long: info.json shows it
                    continue
                yield slot, name, self._node(key, inodes[key])

    async def create(self, name: str) -> tuple[Node, Handle]:
        key = names.decode(name)
        check_label(key, "")
        if _SWAP_FILE.fullmatch(key):
            raise NotPermitted(f'"{key}" is an editor\'s swap file, which is no label')
        if key in self._inodes():
            raise AlreadyExists(f'snapshot "{self.record.name}" has a label "{key}" already')
        handle = OpenLabel(self.tree, self.number, key, self.tree.new_writer(self.number, key), b"", emptied=True)
        return self._label(key, handle.inode, None), handle

    async def unlink(self, name: str, pid: int) -> None:
        node = self.lookup(name)
        assert isinstance(node, Label)
        self.tree.refuse_torn_down(self.number, pid)
        if self.tree.reads.was_refused(pid, self.number):
            self.tree.refuse_moved(self.number, pid)
        for handle in self._handles():
            if handle.key == node.key:
                handle.emptied = False  # nothing of it is left to apply
        if node.key in self.record.labels:
            await self.tree.snapshotter.update(self.number, {}, [f"labels.{node.key}"])

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename a label; one that was opened and not yet written goes along as what it is: empty."""
        node = self.lookup(old)
        assert isinstance(node, Label)
        key = names.decode(new)
        if not replace and key in self._inodes():
            raise AlreadyExists(f'snapshot "{self.record.name}" has a label "{key}" already')
        if node.key in self.record.labels:
            await self.tree.snapshotter.move_label(self.number, node.key, key, replace=replace)
        elif key in self.record.labels:
            await self.tree.snapshotter.update(self.number, {}, [f"labels.{key}"])
        for handle in self._handles():
            if handle.key == key:
                handle.emptied = False
            elif handle.key == node.key:
                handle.key = key
