"""active/, view/ and committed/ in the root: every snapshot of that kind, by its name."""

from __future__ import annotations

from collections.abc import Iterator

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.model import Kind
from snapfs.tree.inodes import kind_inode
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.node import Node
from snapfs.tree.snapshot import DamagedDirectory, SnapshotDirectory
from snapfs.tree.state import State


class SnapshotsDirectory(KindDirectory):
    """All snapshots of one kind."""

    def __init__(self, state: State, kind: Kind) -> None:
        super().__init__(state, kind, kind_inode(kind))

    def lookup(self, name: str) -> Node:
        state = self.state
        try:
            number, record = self.find(name)
        except Damaged as damage:
            return DamagedDirectory(state, self.id_of_damaged(name, damage), self.kind, self.key(name))
        return SnapshotDirectory(state, number, record, state.alias(number, record))

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        state = self.state
        with state.reading() as reader:
            for number, key, record in reader.records(self.kind, after):
                try:
                    name = names.encode(key)
                except InvalidArgument:  # not even the name can be read: nothing is known of it
                    continue
                if record is not None:
                    yield number, name, SnapshotDirectory(state, number, record, state.alias(number, record))
                else:
                    yield number, name, DamagedDirectory(state, number, self.kind, key)
