"""The root directory, and the nodes in it that belong to no snapshot: README and .snapfs/."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import NotFound
from snapfs.model import Kind
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.links import ByIdDirectory
from snapfs.tree.node import Attributes, Directory, File, Node, Slot, pack

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


class FixedDirectory(Directory):
    """A directory whose entries never change."""

    def __init__(self, tree: Tree, slot: Slot, path: str, contents: dict[str, Slot]) -> None:
        super().__init__(tree, pack(0, slot))
        self._path = path
        self._contents = contents

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.tree.started)

    def lookup(self, name: str) -> Node:
        slot = self._contents.get(name)
        if slot is None:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return daemon_node(self.tree, slot)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        for name, slot in self._contents.items():
            if slot > after:
                yield slot, name, daemon_node(self.tree, slot)


class DaemonFile(File):
    """A file of the daemon's."""

    def __init__(self, tree: Tree, slot: Slot, path: str, text: Callable[[Tree], str], keep: bool) -> None:
        super().__init__(tree, pack(0, slot))
        self._path = path
        self._text = text
        self._keep = keep

    @property
    def path(self) -> str:
        return self._path

    def content(self) -> bytes:
        return self._text(self.tree).encode()

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=len(self.content()), time=self.tree.started, keep=self._keep)


README = (importlib.resources.files(__package__) / "README.txt").read_text()

_FILES: dict[Slot, tuple[str, Callable[[Tree], str], bool]] = {
    Slot.README: ("README", lambda tree: README, True),
    Slot.VERSION: (".snapfs/version", lambda tree: f"{tree.version}\n", True),
    Slot.ERROR_LOG: (".snapfs/error_log", lambda tree: tree.error_log.text(), False),
}

# in the order of their slots, which is the order of the listings
_DIRECTORIES: dict[Slot, tuple[str, dict[str, Slot]]] = {
    Slot.ROOT: (
        "",
        {**{kind.value: Slot[kind.name] for kind in Kind}, "README": Slot.README, "by-id": Slot.BY_ID, ".snapfs": Slot.DAEMON},
    ),
    Slot.DAEMON: (".snapfs", {"version": Slot.VERSION, "error_log": Slot.ERROR_LOG}),
}


def daemon_node(tree: Tree, slot: int) -> Node:
    """The node of ``slot`` that belongs to no snapshot; raises NotFound."""
    for kind in Kind:
        if slot == Slot[kind.name]:
            return KindDirectory(tree, kind)
    try:
        known = Slot(slot)
    except ValueError:
        raise NotFound(f"there is no node {slot}") from None
    if known is Slot.BY_ID:
        return ByIdDirectory(tree, pack(0, known))
    if known in _DIRECTORIES:
        return FixedDirectory(tree, known, *_DIRECTORIES[known])
    if known in _FILES:
        return DaemonFile(tree, known, *_FILES[known])
    raise NotFound(f"there is no node {slot}")
