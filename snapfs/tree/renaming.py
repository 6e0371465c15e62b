"""What a rename in the tree means: a Commit, another name for a snapshot, or another one in images/, another key for a label.
All else is refused."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial

from snapfs import names
from snapfs.errors import AlreadyExists, InvalidArgument, NameTooLong, NotFound, NotPermitted, WrongParent
from snapfs.model import Kind
from snapfs.tree.images import HOW, IMAGES, ImagesDirectory
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.labels import LabelsDirectory
from snapfs.tree.node import Node
from snapfs.tree.snapshot import SnapshotDirectory
from snapfs.tree.state import State


class Rename:
    """One rename that is allowed, as far as can be told, and not yet done: ``carry_out`` does it.

    ``committed_inside`` is the id of the snapshot if this commits one out of its parent's listing, or into it; otherwise 0.
    ``flushes``: it waits for data that is to be written to the disk, and others may wait for it meanwhile, so ``carry_out`` is
    told for how many seconds it may.
    """

    def __init__(
        self, carry_out: Callable[[float], Awaitable[object]], committed_inside: int = 0, *, flushes: bool = False
    ) -> None:
        self._carry_out = carry_out
        self.flushes = flushes
        self.committed_inside = committed_inside

    async def carry_out(self, patience: float = math.inf) -> None:
        """Rename, and return when that is durable.  Raises SnapshotError; TryAgain where it would wait longer."""
        await self._carry_out(patience)


def what_rename_means(
    state: State, source: Node, name: str, target: Node, new_name: str, *, replace: bool = True, pid: int = 0
) -> Rename:
    """What it means that process ``pid`` renames ``name`` in the directory ``source`` to ``new_name`` in the directory
    ``target``; without ``replace`` nothing that is there may be replaced.

    Raises NotFound, AlreadyExists, NameTooLong, Damaged; NotPermitted for a rename that means nothing.
    """
    if isinstance(source, LabelsDirectory) and isinstance(target, LabelsDirectory) and source.inode == target.inode:
        return Rename(lambda patience: source.rename(name, new_name, replace))
    if isinstance(source, ImagesDirectory) and isinstance(target, ImagesDirectory):
        _key(new_name)
        may_replace = source.refuse_to_rename(name, new_name, pid, replace=replace)
        return Rename(lambda patience: source.rename(name, new_name, replace=may_replace))
    if not isinstance(source, KindDirectory):
        source.lookup(name)
        shown = f"{source.path}/{names.printable(name)}"
        if isinstance(source, LabelsDirectory):
            raise NotPermitted(f"{shown} can only be renamed within its own labels/")
        if isinstance(source, ImagesDirectory):
            raise NotPermitted(f"{shown} can only be renamed within {IMAGES}/")
        raise NotPermitted(f"{shown} can't be renamed: only snapshots, labels and names in {IMAGES}/ can be")
    number, record = source.find(name)
    if isinstance(target, SnapshotDirectory):
        raise AlreadyExists.snapshot(target.record.name, target.record.kind)
    if isinstance(target, ImagesDirectory):
        raise NotPermitted(f"{record.kind} snapshots can't be moved to {IMAGES}/: {HOW}")
    if not isinstance(target, KindDirectory) or target.kind not in (source.kind, Kind.COMMITTED):
        raise NotPermitted(f"{record.kind} snapshots can't be moved to {target.path or '/'}")
    new_key = _key(new_name)
    if source.kind is Kind.ACTIVE and target.kind is Kind.COMMITTED:
        state.snapshotter.refuse_taken(new_key, number)
        committed_inside = number if source.parent or target.parent else 0
        carry_out = partial(_commit, state, number, record.name, new_key, target.parent)
        return Rename(carry_out, committed_inside, flushes=state.dirsync)
    if source.kind is Kind.VIEW and target.kind is Kind.COMMITTED:
        raise NotPermitted(f'snapshot "{record.name}" is a view: only active snapshots can be committed')
    if target.parent not in (0, source.parent):
        raise NotPermitted(f"{target.path} lists children: rename the snapshot in {source.kind} itself")
    state.snapshotter.refuse_taken(new_key, number)
    return Rename(partial(_rename, state, number, record.name, new_key))


def _key(file_name: str) -> str:
    try:
        return names.decode(file_name)
    except NameTooLong:
        raise
    except InvalidArgument as error:
        raise NotPermitted(str(error)) from None  # mv misreports EINVAL


async def _commit(state: State, number: int, key: str, name: str, parent: int, patience: float) -> None:
    try:
        await state.snapshotter.commit(
            name,
            number,
            parent=parent or None,
            keep_labels=True,
            refuse_mounted=True,
            wait=state.dirsync,
            patience=patience,
        )
    except NotFound:
        raise NotFound.snapshot(key) from None
    except WrongParent as error:
        raise NotPermitted(str(error)) from None


async def _rename(state: State, number: int, key: str, new_key: str, patience: float) -> None:
    try:
        await state.snapshotter.rename(number, new_key)
    except NotFound:
        raise NotFound.snapshot(key) from None
