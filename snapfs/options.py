"""How a root is used, and what was found out about where it is."""

from __future__ import annotations

import enum

import msgspec


class Sync(enum.StrEnum):
    """What is flushed to the disk before a call returns: records and committed data; records alone, and the data right after
    that, in the background; or nothing at all, ever, for a root that may be thrown away."""

    FULL = "full"
    BACKGROUND = "background"
    NONE = "none"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a root is used; each means what it means to containerd's overlay snapshotter.

    ``async_remove``: Remove leaves the files to Cleanup.  ``upperdir_label``: Stat, Update and Walk return each snapshot's
    layer as a label.  ``mount_options``: put on every overlay mount (never on binds).  ``remap_ids``: the mapping labels
    become ``uidmap=`` and ``gidmap=`` of the mounts.  ``slow_chown``: where layers can't be idmapped, change the owners in
    the upper layer instead; without it such a Prepare is refused.

    Not containerd's: ``sync``: how much survives a power cut.  ``rootfs``: mount the merged file systems that are asked for;
    ``why_no_rootfs``: why they are not; ``rootfs_idle``: seconds until one that no process uses is unmounted; ``rootfs_max``:
    how many may be mounted at once; ``squash_depth``: how many layers a workspace stands on, after a checkpoint, when they are
    made one in the background: 0 for never.
    """

    async_remove: bool = False
    upperdir_label: bool = False
    mount_options: tuple[str, ...] = ()
    remap_ids: bool = False
    slow_chown: bool = False
    sync: Sync = Sync.FULL
    rootfs: bool = True
    why_no_rootfs: str = "it was started with no_rootfs"
    rootfs_idle: float = 60.0
    rootfs_max: int = 128
    squash_depth: int = 128

    @property
    def flushes(self) -> bool:
        """Whether anything is flushed at all."""
        return self.sync is not Sync.NONE


class Feature(msgspec.Struct, frozen=True):
    """Whether something is in use that depends on kernel, file system, privileges or options, and why (not)."""

    on: bool
    why: str
