"""Files whose texts snapfs makes, with versions: a text that was looked up can be opened as long as it is remembered."""

from __future__ import annotations

import contextlib

from snapfs.errors import Damaged, NotFound
from snapfs.tree.inodes import pack, pack_version
from snapfs.tree.node import Attributes, File
from snapfs.tree.state import State
from snapfs.tree.texts import Text

UNKNOWN_SIZE = 4096  # of a file that has content, as in sysfs


class TextFile(File):
    """A file whose text ``render`` makes, once for each node and when it is needed.

    ``fixed``: the text never changes as long as there is the file, which has one inode for ever.  Any other file's inode is
    that of its text (``inodes.pack_version``), which is remembered (``State.versions``), so that a process that has looked up
    a text can open it.

    ``text`` is what the file held when it was looked up, where that is remembered.  ``keep_attributes`` and ``private`` are as
    in ``Attributes``.
    """

    keep_attributes = True
    private = False

    def __init__(self, state: State, number: int, slot: int, *, fixed: bool, text: Text | None = None) -> None:
        super().__init__(state, pack(number, slot))
        self.fixed = fixed
        self._text = text
        self._is_rendered = text is not None
        if fixed:
            return
        found = self.known()
        self.is_known = found is not None
        if found is not None:
            self.inode = pack_version(number, slot, found.checksum)
            earlier = state.versions.get(self.inode)
            if earlier is not None and (earlier.size, earlier.checksum) == (found.size, found.checksum):
                self._text = found = earlier  # with the time that stat(2) has shown
            state.versions.keep(self.inode, found)

    def render(self) -> Text | None:
        """What it holds now; None where that is not known before ``refresh``.  Raises Damaged."""
        raise NotImplementedError

    def time(self) -> int:
        """When it changed last, as stat(2) shows it (ns since the epoch)."""
        raise NotImplementedError

    def known(self) -> Text | None:
        """What it holds, rendered at the first call; None where that is not known, or can't be told."""
        if not self._is_rendered:
            self._is_rendered = True
            with contextlib.suppress(Damaged):  # it is listed all the same; a process that opens it is told
                self._text = self.render()
        return self._text

    def text(self) -> Text:
        text = self.known() or self.render()
        if text is None:
            raise NotFound(f"{self.path} does not exist")
        return text

    def attributes(self) -> Attributes:
        text = self.known()
        size = UNKNOWN_SIZE if text is None else text.size
        keep = self.keep_attributes and text is not None
        return Attributes(self.mode, size, time=self.time(), keep=keep, private=self.private)
