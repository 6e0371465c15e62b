"""The mountpoint: whether it can be mounted on, what an earlier daemon left there, and why a mount is over."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import subprocess
from pathlib import Path

from snapfs.errors import Unavailable
from snapfs.kernel import mounting, trusted
from snapfs.kernel.mounttable import MountPoint, lines_of, mount_id, mount_table, parse
from snapfs.names import word
from snapfs.root import claim
from snapfs.root.lock import is_abandoned
from snapfs.root.mounted import origin

log = logging.getLogger(__name__)

FILE_SYSTEM = "snapfs"  # the mount table says fuse.snapfs

DETACH = ("fusermount3", "-u", "-z", "--")  # and a mountpoint


def source_of(root: str) -> str:
    """The first column of the mount table."""
    return root if root.isascii() and not set(root) & set(",\\ ") else FILE_SYSTEM  # libfuse takes plain options only


def resolve(mountpoint: str) -> str:
    """``mountpoint`` as the mount table has it, found out without a question to what is mounted there.

    Raises Unavailable where somebody else could lead it elsewhere (``kernel/trusted.py``), or where it is missing.
    """
    try:
        return trusted.above(mountpoint)
    except trusted.Untrusted as error:
        raise Unavailable(_untrusted(mountpoint, error)) from None
    except OSError as error:
        raise Unavailable(f"cannot mount on {mountpoint}: {error.strerror}{_hint(error, mountpoint)}", error.errno) from None


def _untrusted(mountpoint: str, error: Exception) -> str:
    return (
        f"cannot mount on {mountpoint}: {error}; mount on a directory of yours, below directories that nobody else can write, "
        "such as /mnt"
    )


def _hint(error: OSError, mountpoint: str) -> str:
    return f"; make it first: mkdir {word(mountpoint)}" if error.errno == errno.ENOENT else ""


def mounted_at(target: str) -> MountPoint | None:
    """The tree that is mounted on top of ``target``, None where that is something else."""
    top = None
    for mount in mount_table():
        if mount.target == target:
            top = mount
    return top if top is not None and top.type == f"fuse.{FILE_SYSTEM}" else None


def unmount(own: MountPoint) -> bool:
    """Refuse all requests that wait in the kernel for us and detach our mount ``own``, and no other that may be at its place by
    now.  False where this process may not unmount: fusermount3 can.

    Closing the device would do so too, but not while our own thread waits in it for a lock that such a request holds
    (``cache.forget_name``)."""
    now = still_there(own)
    if now is None:
        return True
    if [mount.id for mount in mount_table() if mount.target == now.target][-1:] != [now.id]:
        log.warning("something else is mounted over %s: unmount that, and then %s", now.target, now.target)
        abort(now)
        return True
    try:
        mounting.unmount(now.target, mounting.MNT_FORCE | mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
    except PermissionError:
        return False
    except OSError as error:
        log.warning("cannot unmount %s: %s", now.target, error.strerror)
    return True


def why_over(own: MountPoint) -> str:
    """Why requests have come to an end without a signal."""
    if still_there(own) is not None:
        return "the FUSE connection was aborted; the next start recovers the mountpoint"
    return "unmounted"


def still_there(own: MountPoint) -> MountPoint | None:
    """Our mount as it is now, which may have been moved."""
    return next((mount for mount in mount_table() if (mount.id, mount.device) == (own.id, own.device)), None)


def is_there(own: MountPoint) -> bool | None:
    """Whether our mount is there; None where that can't be seen now: no descriptors are left.  Quick where it is still at its
    place, however many others there are."""
    with contextlib.suppress(OSError):
        if mount_id(own.target) == own.id:
            return True
    with contextlib.suppress(OSError):
        return still_there(own) is not None
    return None


def mounted_on(own: MountPoint) -> dict[int, str]:
    """Where something is mounted over our mount, or over what is in it: paths by the ids of the mounts.  Raises OSError."""
    number = str(own.id)
    found = [parse(line) for line in lines_of("self") if line.split(" ", 2)[1] == number]
    return {mount.id: mount.target for mount in found}


def recover_mountpoint(root: str, mountpoint: str) -> None:
    """Unmount at ``mountpoint`` (``resolve``) what a daemon that is gone left; any other dead mount is not ours to touch.

    The mount table and the root's lock tell, before anybody asks the mount itself: a daemon that was killed may have left a
    thread which waits in the kernel for a client that waits for the daemon, and a process that asks would wait with them.
    """
    for _ in range(16):  # daemons may have crashed on top of each other
        mounts = [mount for mount in mount_table() if mount.target == mountpoint]
        if not mounts:
            return
        source = mounts[-1].source
        if mounts[-1].type.startswith("fuse") and trusted.server_of(mounts[-1]) not in trusted.trusted_users():
            return  # what it says of itself is worth nothing, and it may never answer
        if mounts[-1].type == f"fuse.{FILE_SYSTEM}":
            if not is_abandoned(source if source.startswith("/") else root):
                return
            log.warning("%s was left mounted by a daemon that is gone; unmounting it", mountpoint)
            detach(mounts[-1])
            continue
        try:
            os.statvfs(mountpoint)
            return
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                return
        dead = mounts[-1].type
        raise Unavailable(f"{mountpoint} is a dead mount of {dead}; unmount it first: fusermount3 -uz {word(mountpoint)}")


def detach(mount: MountPoint) -> None:
    """Refuse all requests that wait for the daemon of ``mount``, which frees what waits, and unmount it."""
    try:
        mounting.unmount(mount.target, mounting.MNT_FORCE | mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
    except PermissionError:
        abort(mount)
        subprocess.run([*DETACH, mount.target], check=False)


def abort(mount: MountPoint) -> None:
    with contextlib.suppress(OSError):  # fusectl is not mounted everywhere
        Path(f"/sys/fs/fuse/connections/{mount.device.partition(':')[2]}/abort").write_text("1")


def _overlap(root: str, mountpoint: str) -> bool:
    """Whether one lies within the other, by whatever bind mounts they are reached; both are without links."""
    inside, outside = mountpoint, root
    existing = outside
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    rest = os.path.relpath(outside, existing)
    place, above = origin(inside), origin(existing)
    pairs = [(inside, outside)]
    if place is not None and above is not None and place[0] == above[0]:
        pairs.append((place[1], os.path.normpath(os.path.join(above[1], rest))))
    return any(os.path.commonpath(pair) in pair for pair in pairs)


def ready(root: str, mountpoint: str) -> tuple[str, str]:
    """ROOT and the mountpoint without links, once what a daemon that is gone has left there is unmounted.  Raises Unavailable,
    with a sentence, for what can be known to fail."""
    try:
        root = claim.resolve(root)
        target = resolve(mountpoint)
        recover_mountpoint(root, target)
        return root, check_mountpoint(root, mountpoint, target)
    except OSError as error:
        raise Unavailable.from_os(f"mount on {mountpoint}", error) from error


def check_mountpoint(root: str, mountpoint: str, target: str) -> str:
    """``mountpoint`` without links, as ``root`` is; ``target`` is what ``resolve`` gave for it.  Raises Unavailable, with a
    sentence, for what can be known to fail."""
    if mounted_at(target) is not None:
        raise Unavailable(f"{mountpoint} is the mountpoint of another snapfs already; unmount that first")
    try:
        with trusted.find(target) as found:
            if not stat.S_ISDIR(os.fstat(found.fd).st_mode):
                raise Unavailable(f"cannot mount on {mountpoint}: it is not a directory")
            target = found.path
    except trusted.Untrusted as error:
        raise Unavailable(_untrusted(mountpoint, error)) from None
    except OSError as error:
        raise Unavailable(f"cannot mount on {mountpoint}: {error.strerror}{_hint(error, mountpoint)}", error.errno) from None
    if mounted_at(target) is not None:
        raise Unavailable(f"{mountpoint} is the mountpoint of another snapfs already; unmount that first")
    if _overlap(root, target):
        raise Unavailable(f"the root {root} and the mountpoint {mountpoint} must not lie within each other")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unavailable(f"cannot open /dev/fuse ({os.strerror(error.errno or 0)}): {_why_no_device(error)}") from None
    return target


def _why_no_device(error: OSError) -> str:
    """Why /dev/fuse can't be opened, and what to do."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return "load the module with modprobe fuse, or give the container the device"
    if os.access("/dev/fuse", os.R_OK | os.W_OK, effective_ids=True):  # its mode is not the reason
        return "let the container use the device, and have no nodev where /dev is mounted"
    found = os.stat("/dev/fuse")
    user, group = trusted.user_name(found.st_uid), trusted.group_name(found.st_gid)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o060 == 0o060:
        return f"its mode {mode:03o} lets only {user} and the group {group} open it; become a member, or chmod 666 /dev/fuse"
    return f"its mode {mode:03o} lets only {user} open it; chmod 666 /dev/fuse"
