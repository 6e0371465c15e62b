"""What a desktop leaves behind in a tree."""

from __future__ import annotations

import os

from snapfs.kernel.mounttable import mount_table
from tests.daemon import Daemon


def rootfs_mounts(daemon: Daemon) -> list[str]:
    return [
        mount.target for mount in mount_table() if mount.target.startswith(f"{daemon.root}/rootfs/") and mount.type != "tmpfs"
    ]


def use_and_remove_all(daemon: Daemon) -> None:
    """Commit and remove every snapshot, and see that nothing was refused."""
    for key in ("a", "web"):
        os.rename(daemon.mnt / "active" / key, daemon.mnt / "committed" / key)
    for path in ("committed/a", "committed/web", "active/b", "view/peek", "committed/base"):
        os.rmdir(daemon.mnt / path)
    assert daemon.error_log() == []
