"""Mapping: ids of a container that are other ids on the host, and the mistakes that can be made with them."""

from __future__ import annotations

import os

from snapfs.errors import FailedPrecondition, Unavailable
from snapfs.rules.root import Root
from snapfs.store.reading import Reader


def refuse_mapped_twice(root: Root, reader: Reader, parent: int, owner: tuple[int, int] | None) -> None:
    """Raise FailedPrecondition if a mount on snapshot ``parent`` would map ids that are the host's already.

    ``owner`` is what the mapping labels make of the container's ids 0.  A containerd that was not told that this
    snapshotter maps ids (the capability ``remap-ids``) does it by itself: it makes a copy of the image with the host's
    ids, commits it and prepares the container on that, with the same labels.  With ``remap_ids`` the mount would map the
    copy's ids once more, and all files would be nobody's.  The top directory tells such a copy from an image.

    Whatever has such a top is refused: what was itself prepared with these labels, too, has the host's ids in its layer.
    Nothing is where the labels do not reach the mount, without ``remap_ids`` or where layers can't be mounted idmapped:
    there such copies are right.  Nor where the container's root is the host's, since that is every image's top.
    """
    if not root.maps_ids or owner is None or owner == (0, 0):
        return
    try:
        top = os.lstat(root.layers.fs(parent))
    except OSError as error:
        raise Unavailable.from_os(f"look at the layer of snapshot {parent}", error) from error
    if (top.st_uid, top.st_gid) == owner:
        record = reader.record(parent)
        raise FailedPrecondition(
            f'snapshot "{record.name if record else parent}" has the host\'s ids already (its top directory belongs to '
            f"{owner[0]}:{owner[1]}), and the mapping labels would map them again: declare "
            'capabilities = ["remap-ids"] for snapfs in the configuration of containerd 2.x, or serve without remap_ids'
        )
