"""What this kernel and this file system offer to overlayfs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from snapfs.kernel import libc, mounting
from snapfs.mountspec import escape

_TMPFS_MAGIC = 0x01021994
_WHOLE_RANGE = ["0", "0", "4294967295"]


def tells_types(directory: str) -> bool:
    """Whether the file system of ``directory``, which has entries, tells d_type, which overlayfs needs to see whiteouts."""
    return libc.directory_types(directory) != {0}


def mounted_as(directory: str) -> str:
    """What tells this time that the file system of ``directory`` is mounted from all others in this boot, in whatever mount
    namespace; "" where the kernel shows nothing of the kind (btrfs, tmpfs …).

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
    """Whether this process runs in another user namespace than the initial one (user_namespaces(7))."""
    try:
        return Path("/proc/self/uid_map").read_text().split() != _WHOLE_RANGE
    except FileNotFoundError:  # a kernel without user namespaces
        return False


def needs_userxattr(directory: str) -> bool:
    """Whether overlay mounts over ``directory`` need ``userxattr``: only inside a user namespace, never on tmpfs; kernels
    from 5.11 on know the option, older ones may (patched) or may not, which a trial mount tells."""
    if not in_user_namespace() or on_tmpfs(directory):
        return False
    if mounting.kernel_version() >= (5, 11):
        return True
    trial = tempfile.mkdtemp(prefix="new-", dir=directory)
    try:
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{trial}/{name}")
        layers = "userxattr,lowerdir=lower,upperdir=upper,workdir=work".replace("=", f"={escape(trial)}/")
        mounting.mount("overlay", f"{trial}/merged", "overlay", mounting.MS_RDONLY, layers)
        mounting.unmount(f"{trial}/merged", mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
        return True
    except OSError:
        return False
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def overlay_knows(parameter: str) -> bool:
    """Whether this kernel's overlayfs has ``parameter``: ``redirect_dir`` from 4.10 on, ``index`` 4.13, ``metacopy`` 4.19."""
    return os.path.exists(f"/sys/module/overlay/parameters/{parameter}")


def on_tmpfs(directory: str) -> bool:
    """Whether ``directory`` is on a tmpfs (statfs(2))."""
    return mounting.file_system_magic(directory) == _TMPFS_MAGIC
