"""A shelter: a tiny read-only file system in which a mount stands, so that its place is no empty directory where it is missing.

The mount is at DIRECTORY/fs; DIRECTORY itself is the mountpoint of a tmpfs that holds nothing but ``fs``.  A process in
another mount namespace, where neither is mounted, finds no ``fs`` in DIRECTORY: all that it does with the path fails, instead
of reading and writing the directory beneath the mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from snapfs.kernel import mountapi, mounting

INSIDE = "fs"  # the name in DIRECTORY at which the mount stands

_BENEATH = f"not-mounted-in-this-mount-namespace/{INSIDE}"
"""The target of a link that stands in DIRECTORY beneath the mount: it leads nowhere, so that nothing can be made by way of it,
either."""


def attach(tree: int, directory: str) -> None:
    """Attach the mount ``tree`` at DIRECTORY/fs, in a shelter, and close the descriptor.

    A process never sees the shelter without the mount, where the kernel can attach both in one step (6.15).  Raises OSError.
    """
    try:
        shelter = _make()
    except OSError:
        os.close(tree)
        raise
    try:
        try:
            mountapi.move_mount(tree, f"/proc/self/fd/{shelter}/{INSIDE}")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            mountapi.move_mount(shelter, directory)
            try:
                mountapi.move_mount(tree, f"{directory}/{INSIDE}")
            except OSError:
                remove(directory)
                raise
        else:
            mountapi.move_mount(shelter, directory)
    finally:
        os.close(shelter)
        os.close(tree)


def attach_classic(mount: Callable[[str], None], directory: str) -> None:
    """``attach`` by mount(2): ``mount`` is called with the path to mount at.  Raises OSError."""
    mounting.mount("none", directory, "tmpfs", 0, "mode=0555,size=4k")
    try:
        os.mkdir(f"{directory}/{INSIDE}")
        mounting.make_read_only(directory)
        mount(f"{directory}/{INSIDE}")
    except OSError:
        remove(directory)
        raise


def prepare(directory: str) -> None:
    """Make DIRECTORY, unless it is there, and what stands in it beneath the mount.  Raises OSError."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with suppress(OSError):  # it is there; or the disk is full, or read-only by now
        os.symlink(_BENEATH, f"{directory}/{INSIDE}")


def clear(directory: str) -> None:
    """Remove what ``prepare`` has put into DIRECTORY, where nothing is mounted any more."""
    path = f"{directory}/{INSIDE}"
    with suppress(OSError):
        if os.readlink(path) == _BENEATH:
            os.unlink(path)


def remove(directory: str) -> None:
    """Detach all mounts on DIRECTORY and below, if there are any.  Raises OSError."""
    try:
        while True:
            mounting.unmount(directory, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT, errno.EPERM):  # a process that may not unmount has mounted nothing
            raise


def _make() -> int:
    """The descriptor of a tmpfs that holds ``fs``, attached nowhere yet."""
    context = mountapi.fsopen("tmpfs")
    try:
        mountapi.set_string(context, "mode", "0555")
        mountapi.set_string(context, "size", "4k")
        mountapi.create(context)
        shelter = mountapi.fsmount(context)
    finally:
        os.close(context)
    try:
        os.mkdir(INSIDE, dir_fd=shelter)
        mountapi.mount_setattr(shelter, mountapi.MOUNT_ATTR_RDONLY)
    except OSError:
        os.close(shelter)
        raise
    return shelter
