"""What to do instead, where a caller looks for a snapshot's files where they are not: the end of many a refusal."""

from __future__ import annotations

from snapfs import names
from snapfs.model import Kind
from snapfs.store.schema import Record
from snapfs.tree.state import State


def path_of(record: Record) -> str:
    """The snapshot's directory, from the root of the tree."""
    return f"{record.kind}/{names.encode(record.name)}"


def how_to_write(state: State, record: Record) -> str:
    """Where the caller can write files of this snapshot or, where that stays as it is, of one like it."""
    if record.kind is Kind.ACTIVE:
        return _how_to_write(state, path_of(record))
    if record.kind is Kind.COMMITTED:
        return f"it is committed and stays as it is; {how_to_make(state, path_of(record) + '/')}"
    with state.reading() as reader:
        parent = f"committed/{names.encode(reader.parent_of(record).name)}/" if record.parent else ""
    return f"a view stays as it is; {how_to_make(state, parent)}"


def how_to_make(state: State, above: str) -> str:
    """How to make a snapshot to write in, in the root of the tree ("") or a committed snapshot's directory ("committed/b/")."""
    return f"mkdir {names.word(f'{above}active/K')}, and {_how_to_write(state, 'active/K')}"


def _how_to_write(state: State, path: str) -> str:
    if state.snapshotter.has_rootfs:
        return f"write into {names.word(f'{path}/rootfs/')}"
    return f"write where it is mounted: sh {names.word(f'{path}/mount.sh')} TARGET"


def how_to_copy(state: State, record: Record) -> str:
    """How to have the files of this snapshot elsewhere."""
    path = path_of(record)
    if state.snapshotter.has_rootfs:
        return f"cp -a {names.word(f'{path}/rootfs/.')} TARGET"
    return f"{_how_to_mount(record)}, and cp -a DIR/. TARGET"


def why_missing(state: State, record: Record) -> str:
    """Why there is no ``rootfs``, and what to do instead."""
    return f"there is no rootfs: {why_no_rootfs(state)}; mount the snapshot elsewhere: {_how_to_mount(record)}"


def why_no_rootfs(state: State) -> str:
    """Why merged file systems can't be mounted here."""
    return state.snapshotter.features["rootfs"].why


def _how_to_mount(record: Record) -> str:
    path = path_of(record)
    if record.kind is Kind.COMMITTED:
        return f"mkdir {names.word(f'{path}/view/K')} && sh view/K/mount.sh DIR"
    return f"sh {names.word(f'{path}/mount.sh')} DIR"
