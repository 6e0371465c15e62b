"""What this kernel and this file system offer to overlayfs."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

from snapfs.errors import FULL
from snapfs.kernel import libc, mounting, overlay, userns

_UNTOLD = (*FULL, errno.EMFILE, errno.ENFILE, errno.EPERM)
"""Errors of a trial that tell nothing of what was tried."""

_NO_UPPER_LAYERS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EREMOTE, errno.EXDEV, errno.ENOSYS, errno.EIO)
"""How overlayfs refuses an upper directory, or what it has to make in the work directory, on a file system that can't."""

_WHOLE_RANGE = ["0", "0", "4294967295"]


def reports_entry_types(directory: str) -> bool:
    """Whether the file system of ``directory``, which must not be empty, reports the types of entries (d_type), without which
    overlayfs can't see whiteouts."""
    return libc.directory_types(directory) != {0}


def mount_instance(directory: str) -> str:
    """A text that is the same in all mount namespaces for as long as the file system of ``directory`` stays mounted anywhere,
    and never the same again in this boot; "" where the kernel shows nothing of the kind (btrfs, tmpfs …).

    ext4, xfs and some others have a directory in sysfs from their first mount to their last unmount, and no two directories of
    sysfs have ever had the same inode number.
    """
    device = os.stat(directory).st_dev
    try:
        name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    except OSError:
        return ""
    return next((str(shown.stat().st_ino) for shown in Path("/sys/fs").glob(f"*/{name}")), "")


def in_user_namespace() -> bool:
    """Whether this process runs in a user namespace other than the initial one (user_namespaces(7))."""
    try:
        return Path("/proc/self/uid_map").read_text().split() != _WHOLE_RANGE
    except FileNotFoundError:  # a kernel without user namespaces
        return False


def needs_userxattr(directory: str) -> bool:
    """Whether overlay mounts over ``directory`` need ``userxattr``: inside a user namespace, where overlayfs can't write its
    own extended attributes, and only if it can write those of users there.

    Tried, since it depends on kernel (5.11, or patched) and file system (tmpfs bears them since 6.6).  Where it can't be
    tried, on a full disk or without the right to mount, the kernel's version decides.
    """
    if not in_user_namespace():
        return False
    try:
        with tempfile.TemporaryDirectory(prefix="new-", dir=directory, ignore_cleanup_errors=True) as trial:
            return _marks_as_opaque(trial)
    except OSError as error:
        return error.errno in _UNTOLD and mounting.kernel_version() >= (5, 11)


def _marks_as_opaque(trial: str) -> bool:
    """Whether an overlay with ``userxattr``, of layers in the empty directory ``trial``, hides a lower directory that was
    replaced: by an attribute of the new one.  Raises OSError."""
    for name in ("lower/d", "upper", "work", "merged"):
        os.makedirs(f"{trial}/{name}")
    Path(f"{trial}/lower/d/f").touch()
    lowers, upper, work = [f"{trial}/lower"], f"{trial}/upper", f"{trial}/work"
    options = ["userxattr", "volatile"] if mounting.kernel_version() >= (5, 10) else ["userxattr"]  # volatile: no flush
    try:
        tree = overlay.make_overlay(lowers, upper, work, options, read_only=False)
    except overlay.MountApiLacking:
        merged = f"{trial}/merged"
        overlay.mount_overlay_classic(merged, lowers, upper, work, options, read_only=False)
        try:
            return _comes_back_empty(f"{merged}/d")
        finally:
            mounting.unmount(merged, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
    try:
        return _comes_back_empty(f"/proc/self/fd/{tree}/d")
    finally:
        os.close(tree)


def _comes_back_empty(directory: str) -> bool:
    shutil.rmtree(directory)
    os.mkdir(directory)
    return not os.listdir(directory)


def overlay_knows(parameter: str) -> bool:
    """Whether this kernel's overlayfs has ``parameter``: ``redirect_dir`` from 4.10 on, ``index`` 4.13, ``metacopy`` 4.19."""
    return os.path.exists(f"/sys/module/overlay/parameters/{parameter}")


def why_trial_failed(error: OSError, what: str, path: str, reached: str) -> str:
    """Why the trial of mounting an overlay over the directory ``path`` met ``error``, and what to do; the kernel's words in
    parentheses.  ``what``: that by which the user chose the directory ("ROOT"); ``reached``: what paths in it began with."""
    words = re.sub(rf"{re.escape(reached)}(/\S*)?", lambda _: path, error.strerror or str(error))
    if error.errno in (errno.EPERM, errno.EACCES):
        reason = _why_not_permitted()
    elif error.errno == errno.ENODEV:
        reason = "this kernel has no overlayfs: modprobe overlay"
    elif "parameter" in words or "Bad value" in words:
        reason = "overlayfs refuses a mount option: leave out the mount_option= that it names, or correct it"
    elif error.errno in _NO_UPPER_LAYERS:
        to_do = f"put {what} on ext4, xfs, btrfs or tmpfs, in a container on a volume"
        reason = f"the file system of {path} can't hold overlayfs's upper layers: {to_do}"
    else:
        reason = "mounting an overlay for trial failed"
    return f"{reason} ({words})"


def _why_not_permitted() -> str:
    if userns.may_mount():
        return (
            "mounting is forbidden here: a user namespace needs a mount namespace of its own, as `unshare -Urm` makes it, and "
            "a kernel from 5.11 on; a container needs profiles of seccomp and AppArmor that let it mount"
        )
    if os.geteuid() == 0:
        return "this container may not mount: give it CAP_SYS_ADMIN"
    return "mounting takes the right to: run it as root, or inside `unshare -Urm`"
