"""Serving a root on a mountpoint: checks, mounting, the loop, signals and a clean end."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import pwd
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pyfuse3
import trio

from snapfs.errors import InvalidArgument, SnapshotError, Unavailable
from snapfs.fuse.access import Access
from snapfs.fuse.operations import Operations
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import MountPoint, mount_table
from snapfs.opening import open_snapshotter
from snapfs.options import Options
from snapfs.root.lock import is_abandoned
from snapfs.root.mounted import origin
from snapfs.snapshotter import Snapshotter
from snapfs.tree import Tree

log = logging.getLogger(__name__)

FILE_SYSTEM = "snapfs"  # the mount table says fuse.snapfs

IDLE_TASKS = 8  # tasks that wait for a request: with fewer, each request that has to wait makes a task, and its end ends one

GRACE = 5.0  # seconds that requests under way have to end once the daemon is to stop


class MountOptions(msgspec.Struct, frozen=True):
    """Options of the FUSE mount: ``access``: who may do what; ``ro``: read-only; ``dirsync``: a Commit waits until its data is
    on disk."""

    access: Access = msgspec.field(default_factory=Access)
    ro: bool = False
    dirsync: bool = False


Beside = Callable[[Snapshotter, Callable[[], Awaitable[None]]], AbstractAsyncContextManager[None]]
"""A server of the same snapshotter at another door (containerd's socket), which runs while the tree is mounted.  It may await
the second argument, which returns when the tree shows all changes so far."""


@contextlib.asynccontextmanager
async def _nothing(snapshotter: Snapshotter, settle: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    yield


async def serve(
    root: str,
    mountpoint: str,
    options: Options,
    mount: MountOptions,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
    *,
    beside: Beside = _nothing,
    also_shown: Mapping[str, object] | None = None,
) -> str:
    """Mount the tree of ``root`` on ``mountpoint`` (an absolute path) and serve it until SIGINT, SIGTERM, SIGHUP or
    umount; then nothing is left mounted.  Returns why it ended.

    ``on_ready`` is called when requests are being answered, ``on_stop`` when a signal is about to end that.  ``also_shown`` is
    what options.json says besides.  Raises SnapshotError with a sentence where the root, the mountpoint, FUSE or ``beside``
    can't be used.
    """
    _check_access(mount.access, options)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        try:
            await trio.to_thread.run_sync(_recover_mountpoint, root, mountpoint)
            await trio.to_thread.run_sync(_check, root, mountpoint)
        except OSError as error:
            raise Unavailable.from_os(f"mount on {mountpoint}", error) from error
        refusal: SnapshotError | None = None
        async with open_snapshotter(root, options) as snapshotter, trio.open_nursery() as nursery:
            stop = trio.Event()
            received: list[str] = []
            nursery.start_soon(_set_on_signal, stop, signals, received, on_stop)
            try:
                access = {**msgspec.structs.asdict(mount.access), "umask": f"{mount.access.umask:03o}"}
                served = {"mountpoint": mountpoint, **access, "ro": mount.ro, "dirsync": mount.dirsync, **(also_shown or {})}
                tree = Tree(snapshotter, served, dirsync=mount.dirsync)
                await serve_tree(tree, mountpoint, mount, on_ready, stop, beside)
                reason = received[0] if received else _why_over(snapshotter.root, mountpoint)
            except SnapshotError as error:  # kept out of the nursery, which would wrap it in a group
                refusal = error
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
        return reason


async def serve_tree(
    tree: Tree,
    mountpoint: str,
    mount: MountOptions,
    on_ready: Callable[[], None],
    stop: trio.Event,
    beside: Beside = _nothing,
) -> None:
    """Mount ``tree`` and answer requests until ``stop`` is set or somebody unmounts it.  One a process at a time."""
    operations = Operations(tree, mount.access, on_ready)
    try:
        pyfuse3.init(operations, mountpoint, _fuse_options(tree.snapshotter.root, mount))
    except RuntimeError as error:  # libfuse has said why on standard error
        hint = "it takes the right to mount (CAP_SYS_ADMIN, or fusermount3 and a mountpoint that is yours)"
        if mount.access.allow_other and os.geteuid() != 0:
            hint += ", and for allow_other the line user_allow_other in /etc/fuse.conf, which is root's to add"
        raise Unavailable(f"cannot mount on {mountpoint}: {error}; {hint}") from None
    try:
        async with beside(tree.snapshotter, operations.cache.settle), trio.open_nursery() as nursery:
            loop = trio.CancelScope()
            nursery.start_soon(_end_loop, loop, stop)
            with loop:
                await pyfuse3.main(min_tasks=IDLE_TASKS)
            nursery.cancel_scope.cancel()
    finally:
        for followed in (tree.state.events, tree.state.error_log):  # changes may still become durable after the mount is gone
            followed.forget_waiting()
        if stop.is_set():
            _abort(mountpoint)
        pyfuse3.close(unmount=True)


async def _set_on_signal(
    stop: trio.Event, signals: AsyncIterator[int], received: list[str], on_stop: Callable[[], None]
) -> None:
    async for number in signals:
        received.append(signal.Signals(number).name)
        if not stop.is_set():
            on_stop()
        stop.set()


async def _end_loop(loop: trio.CancelScope, stop: trio.Event) -> None:
    """End the loop once ``stop`` is set and what is under way is done, or has had its time."""
    await stop.wait()
    loop.deadline = trio.current_time() + GRACE
    pyfuse3.terminate()


def _abort(mountpoint: str) -> None:
    """Refuse all requests that wait in the kernel and detach the mount.  Closing the device would do so too, but not while our
    own thread waits in it for a lock that such a request holds (``cache.forget_name``)."""
    try:
        mounting.unmount(mountpoint, mounting.MNT_FORCE | mounting.MNT_DETACH)
    except OSError as error:  # not root: fusermount3 detaches it when pyfuse3 closes
        log.debug("cannot unmount %s directly: %s", mountpoint, error)


def _fuse_options(root: str, mount: MountOptions) -> set[str]:
    options = {f"fsname={_source(root)}", f"subtype={FILE_SYSTEM}", "nosuid", "nodev", "noatime"}
    if mount.ro:
        options.add("ro")
    if mount.access.allow_other:
        # Only then does the kernel have to check modes, since without it nobody but the owner gets in.  It costs an attribute
        # request for each change.
        options |= {"allow_other", "default_permissions"}
    return options


def _source(root: str) -> str:
    """The first column of the mount table."""
    return root if root.isascii() and not set(root) & set(",\\ ") else FILE_SYSTEM  # libfuse takes plain options only


def _resolved(mountpoint: str) -> str:
    """As the mount table has it; found out without a question to what is mounted there."""
    return os.path.realpath(os.path.dirname(mountpoint)) + "/" + os.path.basename(mountpoint)


def _why_over(root: str, mountpoint: str) -> str:
    """Why requests have come to an end without a signal."""
    ours = (_resolved(mountpoint), _source(root))
    if any((mount.target, mount.source) == ours for mount in mount_table()):
        return "the FUSE connection was aborted; the next start recovers the mountpoint"
    return "unmounted"


def _recover_mountpoint(root: str, mountpoint: str) -> None:
    """Unmount what a daemon that is gone left; any other dead mount is not ours to touch.

    The mount table and the root's lock tell, before anybody asks the mount itself: a daemon that was killed may have left a
    thread which waits in the kernel for a client that waits for the daemon, and a process that asks would wait with them.
    """
    target = _resolved(mountpoint)
    for _ in range(16):  # daemons may have crashed on top of each other
        mounts = [mount for mount in mount_table() if mount.target == target]
        if not mounts:
            return
        source = mounts[-1].source
        if mounts[-1].type == f"fuse.{FILE_SYSTEM}":
            if not is_abandoned(source if source.startswith("/") else os.path.realpath(root)):
                return
            log.warning("%s was left mounted by a daemon that is gone; unmounting it", mountpoint)
            _detach(mounts[-1])
            continue
        try:
            os.statvfs(mountpoint)
            return
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                return
        dead = mounts[-1].type
        raise Unavailable(f"{mountpoint} is a dead mount of {dead}; unmount it first: fusermount3 -uz {mountpoint}")


def _detach(mount: MountPoint) -> None:
    """Refuse all requests that wait for the daemon of ``mount``, which frees what waits, and unmount it."""
    try:
        mounting.unmount(mount.target, mounting.MNT_FORCE | mounting.MNT_DETACH)
    except PermissionError:
        with contextlib.suppress(OSError):  # fusectl is not mounted everywhere
            Path(f"/sys/fs/fuse/connections/{mount.device.partition(':')[2]}/abort").write_text("1")
        subprocess.run(["fusermount3", "-u", "-z", "--", mount.target], check=False)


def _overlap(root: str, mountpoint: str) -> bool:
    """Whether one lies within the other, by whatever links and bind mounts they are reached."""
    inside, outside = os.path.realpath(mountpoint), os.path.realpath(root)
    existing = outside
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    rest = os.path.relpath(outside, existing)
    place, above = origin(inside), origin(existing)
    pairs = [(inside, outside)]
    if place is not None and above is not None and place[0] == above[0]:
        pairs.append((place[1], os.path.normpath(os.path.join(above[1], rest))))
    return any(os.path.commonpath(pair) in pair for pair in pairs)


def _check_access(access: Access, options: Options) -> None:
    """Raise InvalidArgument where a label would give away files: a user who may set the mapping of a layer's ids could have
    what is in it belong to anybody, to root for one."""
    if access.others_may_write and (options.remap_ids or options.slow_chown):
        raise InvalidArgument(
            "with remap_ids or slow_chown labels decide to whom files belong, so others than the owner must not write them: "
            "leave out uid=, and let umask= have the bits 022"
        )


def _check(root: str, mountpoint: str) -> None:
    """Raise Unavailable, with a sentence, for what can be known to fail."""
    try:
        mode = os.stat(mountpoint).st_mode
    except OSError as error:
        hint = f"; make it first: mkdir {mountpoint}" if error.errno == errno.ENOENT else ""
        raise Unavailable(f"cannot mount on {mountpoint}: {error.strerror}{hint}", error.errno) from None
    if not stat.S_ISDIR(mode):
        raise Unavailable(f"cannot mount on {mountpoint}: it is not a directory")
    if any(mount.target == os.path.realpath(mountpoint) and mount.type == f"fuse.{FILE_SYSTEM}" for mount in mount_table()):
        raise Unavailable(f"{mountpoint} is the mountpoint of another snapfs already; unmount that first")
    if _overlap(root, mountpoint):
        raise Unavailable(f"the root {root} and the mountpoint {mountpoint} must not lie within each other")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unavailable(f"cannot open /dev/fuse ({os.strerror(error.errno or 0)}): {_why_no_device(error)}") from None


def _why_no_device(error: OSError) -> str:
    """Why /dev/fuse can't be opened, and what to do."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return "load the module with modprobe fuse, or give the container the device"
    if os.access("/dev/fuse", os.R_OK | os.W_OK, effective_ids=True):  # its mode is not the reason
        return "let the container use the device, and have no nodev where /dev is mounted"
    found = os.stat("/dev/fuse")
    user, group = _name(pwd.getpwuid, found.st_uid), _name(grp.getgrgid, found.st_gid)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o060 == 0o060:
        return f"its mode {mode:03o} lets only {user} and the group {group} open it; become a member, or chmod 666 /dev/fuse"
    return f"its mode {mode:03o} lets only {user} open it; chmod 666 /dev/fuse"


def _name(entry: Callable[[int], Sequence[object]], number: int) -> object:
    """The name of a user or group, or the number of one without."""
    try:
        return entry(number)[0]
    except KeyError:
        return number
