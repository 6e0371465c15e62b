"""What to do instead, for whoever looks for a snapshot's files where they are not: the end of many a refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapfs import names
from snapfs.model import Kind
from snapfs.store.schema import Record

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


def path_of(record: Record) -> str:
    """The snapshot's directory, from the root of the tree."""
    return f"{record.kind}/{names.encode(record.name)}"


def how_to_write(tree: Tree, record: Record) -> str:
    """Where the caller can write files of this snapshot or, where that stays as it is, of one like it."""
    if record.kind is Kind.ACTIVE:
        return _how_to_write(tree, path_of(record))
    if record.kind is Kind.COMMITTED:
        return f"it is committed and stays as it is; {how_to_make(tree, path_of(record) + '/')}"
    with tree.reading() as reader:
        parent = f"committed/{names.encode(reader.parent_of(record).name)}/" if record.parent else ""
    return f"a view stays as it is; {how_to_make(tree, parent)}"


def how_to_make(tree: Tree, above: str) -> str:
    """How to make a snapshot to write in, in the root of the tree ("") or a committed snapshot's directory ("committed/b/")."""
    return f"mkdir {above}active/K, and {_how_to_write(tree, 'active/K')}"


def _how_to_write(tree: Tree, path: str) -> str:
    if tree.snapshotter.has_rootfs:
        return f"write into {path}/rootfs/"
    return f"write where it is mounted: sh {path}/mount.sh TARGET"


def how_to_copy(tree: Tree, record: Record) -> str:
    """How to have the files of this snapshot elsewhere."""
    path = path_of(record)
    if tree.snapshotter.has_rootfs:
        return f"cp -a {path}/rootfs/. TARGET"
    return f"{_how_to_mount(record)}, and cp -a DIR/. TARGET"


def why_missing(tree: Tree, record: Record) -> str:
    """Why there is no ``rootfs``, and what to do instead."""
    return f"there is no rootfs: {why_no_rootfs(tree)}; mount the snapshot elsewhere: {_how_to_mount(record)}"


def why_no_rootfs(tree: Tree) -> str:
    return tree.snapshotter.features["rootfs"].why


def _how_to_mount(record: Record) -> str:
    path = path_of(record)
    if record.kind is Kind.COMMITTED:
        return f"mkdir {path}/view/K && sh view/K/mount.sh DIR"
    return f"sh {path}/mount.sh DIR"
