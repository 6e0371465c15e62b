"""Mounts: how a snapshot's file system is made, by the caller or by snapfs, and where it is mounted."""

from __future__ import annotations

from snapfs import idmap, mountspec
from snapfs.errors import FailedPrecondition
from snapfs.labels import PARENT_CHAIN
from snapfs.model import Kind, Mount
from snapfs.root.merged import Stack
from snapfs.rules.lookup import find
from snapfs.rules.root import Root
from snapfs.store.reading import Reader
from snapfs.store.schema import Record


def mounts(root: Root, reader: Reader, number: int, record: Record, *, alone: bool = False) -> list[Mount]:
    """The mounts that make the file system of snapshot ``number``, whose record is at hand; ``alone`` as in
    ``mountspec.mounts``.

    Raises FailedPrecondition for a committed snapshot; Damaged where a layer is known to be missing or has lost data."""
    if record.kind is Kind.COMMITTED:
        raise FailedPrecondition(f'snapshot "{record.name}" is committed: mount an active snapshot or a view on it')
    chain = reader.chain(record)
    if root.damaged:
        root.refuse_damaged(number, *chain)
    if root.unflushed.lost:
        root.unflushed.refuse_lost(chain)
    return mountspec.mounts(
        record.kind,
        root.layers.directory(number),
        [root.layers.directory(parent) for parent in chain],
        options=root.overlay_options,
        remap=record.labels if root.maps_ids else None,
        alone=alone,
    )


def handed_over(root: Root, reader: Reader, number: int, record: Record) -> list[Mount]:
    """``mounts`` of a snapshot for the door at which it was made.  Of a view they are the same at all doors.

    containerd 2.2 and later unpacks an image's layers at once where its configuration says ``rebase``: each is prepared
    without a parent, which its Commit names.  What the layer deletes is written down only if the answer is an overlay,
    and containerd makes one of a bind for its own overlayfs alone.  The tree and the library keep the bind, which can
    be mounted.
    """
    return mounts(root, reader, number, record, alone=bool(record.origin) and PARENT_CHAIN in record.labels)


def stack(root: Root, reader: Reader, number: int) -> Stack:
    """What to mount as the rootfs of snapshot ``number``.

    Raises NotFound, Damaged, or FailedPrecondition: the snapshot's ids are remapped, which is left to container runtimes."""
    _, record = find(reader, number)
    lowers = reader.lowers(number, record)
    root.unflushed.refuse_lost(lowers)
    if root.maps_ids and any(idmap.mappings(record.labels)):
        raise FailedPrecondition(
            f'snapshot "{record.name}" has its ids remapped: let a container runtime mount what mounts.json says'
        )
    return Stack(tuple(lowers), number if record.kind is Kind.ACTIVE else None)


def places(root: Root, reader: Reader, number: int, record: Record) -> list[str]:
    """Where the file system of a snapshot is mounted in this mount namespace, by whatever process: paths.

    A view and its parent look the same, so both are shown at all places but each other's rootfs.
    """
    if record.kind is Kind.ACTIVE:
        return root.mounted.active(number)
    own, found = root.layers.rootfs(number), root.mounted.stacked(reader.lowers(number, record))
    return [place for place in found if place == own or not root.layers.is_rootfs(place)]


def is_rightly_mounted(root: Root, reader: Reader, number: int) -> bool:
    """Whether what is mounted as the rootfs of snapshot ``number``, by a daemon that is gone, is its file system."""
    record = reader.record(number)
    if record is None:
        return False
    lowers, target = reader.lowers(number, record), root.layers.rootfs(number)
    if record.kind is Kind.ACTIVE:
        return target in root.mounted.active(number)
    return target in root.mounted.stacked(lowers) and target not in root.mounted.writers(lowers[0])
