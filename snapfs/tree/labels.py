"""labels/: one file a label.  Writing, creating, unlinking and renaming them is Update.

A file holds the label's value and a newline; one trailing newline of what is written is dropped.  No reader ever sees the
label gone while a shell's ``>`` replaces it: an emptied file changes nothing until something is written (``OpenLabel``), or
it is closed empty, which deletes the label (a label has no empty value).

As with all files that change, each value has an inode of its own, and so has each writer.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator

from snapfs import names
from snapfs.errors import AlreadyExists, InvalidArgument, NotFound, NotPermitted, Stale
from snapfs.labels import check_label
from snapfs.model import ByNode
from snapfs.store.schema import Record
from snapfs.tree.advice import path_of
from snapfs.tree.deleting import refuse_copied, refuse_teardown
from snapfs.tree.handles import Handle, OpenText
from snapfs.tree.inodes import Slot, label_slot, label_slots, pack
from snapfs.tree.node import Attributes, Directory, Node
from snapfs.tree.openlabels import OpenLabel
from snapfs.tree.state import State
from snapfs.tree.texts import Text

_SWAP_FILE = re.compile(r"\..*\.sw[a-p]")
"""vim's: if making it is refused, vim makes it elsewhere (its option 'directory'); if writing it is, vim complains."""


class LabelText(Text):
    """What the file of the label ``key`` with ``value`` holds."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(value.encode() + b"\n")
        self.weight += len(key.encode())
        self.key = key


class Label(Node):
    """The file of one label ``key``: with one ``text`` of it, or (None) one writer's own."""

    mode = stat.S_IFREG | 0o666
    keep_entry = False

    def __init__(self, state: State, number: int, record: Record, key: str, inode: int, text: Text | None) -> None:
        super().__init__(state, inode)
        self.number = number
        self.record = record
        self.whose = ByNode(record.node_of(number))
        self.key = key
        self.text = text

    @property
    def path(self) -> str:
        return f"{path_of(self.record)}/labels/{names.encode(self.key)}"

    @property
    def shown_inode(self) -> int:
        return pack(self.whose, label_slot(self.key))

    def now(self) -> Text:
        """What it holds now, if it is not being written."""
        value = self.record.labels.get(self.key)
        return Text(b"") if value is None else LabelText(self.key, value)

    def attributes(self) -> Attributes:
        handle = self.state.open_labels.at(self.inode)  # a writer sees what it has made, and appends there
        size = (handle or self.text or self.now()).size
        return Attributes(self.mode, size=size, time=self.record.updated, keep=False)

    def for_writing(self) -> Label:
        """The same label as a file of one writer's own, to be opened soon."""
        if self.text is None:
            return self
        inode = self.state.open_labels.new_writer(self.whose, self.key)
        return Label(self.state, self.number, self.record, self.key, inode, None)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        if not writing and not truncate:
            return OpenText(self.text or self.now())
        now = self.now()
        content = b"" if truncate else now.read(0, now.size)
        return OpenLabel(self.state.open_labels, self.whose, self.key, self.for_writing().inode, content, emptied=truncate)

    async def resize(self, size: int) -> None:
        handle = await self.open(writing=True)
        try:
            await handle.resize(size)
        finally:
            await handle.close()


class LabelsDirectory(Directory):
    """labels/ of one snapshot."""

    def __init__(self, state: State, number: int, record: Record, alias: int = 0) -> None:
        super().__init__(state, pack(record.node_of(number), Slot.LABELS | alias))
        self.number = number
        self.record = record
        self.whose = ByNode(record.node_of(number))

    @property
    def path(self) -> str:
        return f"{path_of(self.record)}/labels"

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.record.updated)

    def _inodes(self) -> dict[str, int]:
        """The inodes of the files that there are, by key: that of the value, or of the writer that is just making the label."""
        inodes = {handle.key: handle.inode for handle in self.state.open_labels.of(self.whose) if handle.emptied}
        return inodes | self.state.label_inodes.of(self.whose, self.record.labels)

    def _label(self, key: str, inode: int, text: Text | None) -> Label:
        return Label(self.state, self.number, self.record, key, inode, text)

    def _node(self, key: str, inode: int) -> Label:
        value = self.record.labels.get(key)
        text = None if value is None else LabelText(key, value)
        if text is not None:
            self.state.versions.keep(inode, text)
        return self._label(key, inode, text)

    def node(self, inode: int) -> Label:
        """The label with ``inode``; raises NotFound, or Stale where it has another value by now."""
        handle = self.state.open_labels.at(inode)
        if handle is not None:
            return self._label(handle.key, inode, None)
        key_written = self.state.open_labels.key_of(inode)
        if key_written is not None:
            return self._label(key_written, inode, None)
        text = self.state.versions.get(inode)
        if isinstance(text, LabelText):
            return self._label(text.key, inode, text)
        for key, other in self._inodes().items():
            if other == inode:
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
        inode = self.state.open_labels.new_writer(self.whose, key)
        handle = OpenLabel(self.state.open_labels, self.whose, key, inode, b"", emptied=True)
        return self._label(key, inode, None), handle

    async def unlink(self, name: str, pid: int) -> None:
        node = self.lookup(name)
        assert isinstance(node, Label)
        refuse_teardown(self.state, self.number, pid)
        if self.state.reads.was_refused(pid, self.number):
            refuse_copied(self.state, self.number, pid)
        for handle in self.state.open_labels.of(self.whose):
            if handle.key == node.key:
                handle.emptied = False  # nothing of it is left to apply
        if node.key in self.record.labels:
            await self.state.snapshotter.update(self.whose, {}, [f"labels.{node.key}"])

    async def rename(self, old: str, new: str, replace: bool) -> None:
        """Rename a label; one that was opened and not yet written goes along as what it is: empty."""
        node = self.lookup(old)
        assert isinstance(node, Label)
        key = names.decode(new)
        if not replace and key in self._inodes():
            raise AlreadyExists(f'snapshot "{self.record.name}" has a label "{key}" already')
        if node.key in self.record.labels:
            await self.state.snapshotter.move_label(self.whose, node.key, key, replace=replace)
        elif key in self.record.labels:
            await self.state.snapshotter.update(self.whose, {}, [f"labels.{key}"])
        for handle in self.state.open_labels.of(self.whose):
            if handle.key == key:
                handle.emptied = False
            elif handle.key == node.key:
                handle.key = key
