"""Serving a root on a mountpoint: mounting, the loop, signals and a clean end."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial

import msgspec
import pyfuse3
import trio

from snapfs import names
from snapfs.errors import InvalidArgument, SnapshotError, Unavailable
from snapfs.fuse.access import Access
from snapfs.fuse.mountpoint import (
    FILE_SYSTEM,
    is_there,
    mounted_at,
    mounted_on,
    ready,
    source_of,
    still_there,
    unmount,
    why_over,
)
from snapfs.fuse.operations import Operations
from snapfs.fuse.outside import Outside, OutsideError
from snapfs.fuse.waiting import MAX_TASKS
from snapfs.kernel import userns
from snapfs.kernel.mounttable import MountPoint
from snapfs.kernel.spare import Spare
from snapfs.opening import open_snapshotter
from snapfs.options import Options
from snapfs.snapshotter import Snapshotter
from snapfs.threads import in_thread, in_thread_at_last
from snapfs.tree import Tree
from snapfs.tree.layertar import AHEAD

log = logging.getLogger(__name__)

IDLE_TASKS = 8  # tasks that wait for a request: with fewer, each request that has to wait makes a task, and its end ends one

LOOKING = 0.1  # seconds between two looks whether the tree is still mounted, while other mounts come and go

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
    outside: Outside | None = None,
) -> str:
    """Mount the tree of ``root`` on ``mountpoint`` (an absolute path) and serve it until SIGINT, SIGTERM, SIGHUP or
    umount; then nothing is left mounted.  Returns why it ended.

    ``on_ready`` is called when requests are being answered, ``on_stop`` when a signal is about to end that.  ``also_shown`` is
    what options.json says besides.  ``outside`` mounts, where this process is in a mount namespace of its own: then
    ``root`` and ``mountpoint`` are ``ready``.  Raises SnapshotError with a sentence where the root, the mountpoint, FUSE or
    ``beside`` can't be used.
    """
    _check_access(mount.access, options)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        target = mountpoint
        if outside is None:
            root, target = await in_thread(ready, root, mountpoint)
        refusal: SnapshotError | None = None
        async with open_snapshotter(root, options) as snapshotter, trio.open_nursery() as nursery:
            stop = trio.Event()
            received: list[str] = []
            nursery.start_soon(_set_on_signal, stop, signals, received, on_stop)
            try:
                access = {**msgspec.structs.asdict(mount.access), "umask": f"{mount.access.umask:03o}"}
                served = {"mountpoint": mountpoint, **access, "ro": mount.ro, "dirsync": mount.dirsync, **(also_shown or {})}
                window = "" if outside is None else f"/proc/{os.getpid()}/root"
                tree = Tree(snapshotter, served, dirsync=mount.dirsync, window=window, is_inside=userns.is_inside)
                reason = await serve_tree(tree, target, mount, on_ready, stop, beside, outside)
                reason = received[0] if received else reason
            except SnapshotError as error:  # kept out of the nursery, which would wrap it in a group
                refusal = error
                snapshotter.abandon()
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
    outside: Outside | None = None,
) -> str:
    """Mount ``tree`` and answer requests until ``stop`` is set or somebody unmounts it; why it is over, if not for ``stop``.
    ``mountpoint`` is as the mount table has it.  One a process at a time."""
    begun = trio.Event()

    def begin() -> None:
        begun.set()
        on_ready()

    operations = Operations(tree, mount.access, begin)
    options = _fuse_options(tree.snapshotter.root, mount)
    try:
        if outside is not None:
            pyfuse3.init(operations, f"/dev/fd/{outside.mount(options)}", set())
        else:
            pyfuse3.init(operations, mountpoint, options)
    except (RuntimeError, OutsideError) as error:  # libfuse has said why on standard error
        hint = "it takes the right to mount (CAP_SYS_ADMIN, or fusermount3 and a mountpoint that is yours)"
        if mount.access.allow_other and os.geteuid() != 0:
            hint += ", and for allow_other the line user_allow_other in /etc/fuse.conf, which is root's to add"
        raise Unavailable(f"cannot mount on {mountpoint}: {error}; {hint}") from None
    own = mounted_at(mountpoint) if outside is None else None
    spare = Spare(1)  # for the mount table at the end, when none may be left
    try:
        operations.cache.begin()
        async with beside(tree.snapshotter, operations.cache.settle), trio.open_nursery() as nursery:
            loop = trio.CancelScope()
            nursery.start_soon(_end_loop, loop, stop)
            if outside is not None:
                nursery.start_soon(_set_when_unmounted, stop, outside)
            elif own is not None:
                nursery.start_soon(_set_when_gone, stop, own)
                nursery.start_soon(_read_ahead, begun, own)
            with loop:
                await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
        return "unmounted" if own is None else spare.give_to(partial(why_over, own))
    finally:
        operations.cache.end()
        for followed in (tree.state.events, tree.state.error_log):  # changes may still become durable after the mount is gone
            followed.forget_waiting()
        if outside is not None:
            outside.close()
            pyfuse3.close(unmount=False)
        else:
            to_unmount = own is None or not spare.give_to(partial(unmount, own))
            pyfuse3.close(unmount=to_unmount)
            if to_unmount and own is not None and spare.give_to(partial(still_there, own)) is not None:
                words = "fusermount3 could not be started: unmount %s with fusermount3 -u -z %s"
                log.warning(words, own.target, names.word(own.target))
        spare.close()


async def _read_ahead(begun: trio.Event, own: MountPoint) -> None:
    """Have the kernel ask for as much at once as it can, where this process may set that, once it has agreed with libfuse on
    less: each request costs a turn of the loop, and ``layer.tar`` may be long."""
    await begun.wait()
    with contextlib.suppress(OSError):
        setting = os.open(f"/sys/class/bdi/{own.device}/read_ahead_kb", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(setting, b"%d" % (AHEAD >> 10))
        finally:
            os.close(setting)


async def _set_on_signal(
    stop: trio.Event, signals: AsyncIterator[int], received: list[str], on_stop: Callable[[], None]
) -> None:
    async for number in signals:
        received.append(signal.Signals(number).name)
        if not stop.is_set():
            on_stop()
        stop.set()


async def _set_when_unmounted(stop: trio.Event, outside: Outside) -> None:
    told: str | None = ""
    while told is not None:
        await trio.lowlevel.wait_readable(outside)
        told = outside.told()
        if told:
            _warn_of(told)
    stop.set()


def _warn_of(path: str) -> None:
    log.warning("something is mounted over %s, and hides what the tree has there: umount %s", path, names.word(path))


async def _set_when_gone(stop: trio.Event, own: MountPoint) -> None:
    """The same for a mount of this process's own namespace: the kernel tells nothing to the daemon while other namespaces have
    copies of it, such as each that was made meanwhile has, by whatever user."""
    told: set[int] = set()
    with contextlib.ExitStack() as held:
        try:
            table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, table)
            changes = held.enter_context(select.epoll())
        except OSError as error:
            log.warning("unmounting the tree may not end the daemon: %s", error)
            return
        changes.register(table, select.EPOLLPRI)
        there: bool | None = True
        pause = 0.0
        while there is not False:
            await trio.sleep(pause)
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                # before the look: the kernel tells of a change once, which is lost where nobody waits for it at that moment
                await nursery.start(_wait_for, changes)
                there, over = await in_thread_at_last("looking whether the tree is mounted", _look, own)
                for number in over.keys() - told:
                    _warn_of(over[number])
                told = set(over)
                pause = max(LOOKING, 10 * (trio.current_time() - began))  # there may be thousands of mounts, hundreds a second
                if not there:
                    nursery.cancel_scope.cancel()
        stop.set()


async def _wait_for(changes: select.epoll, task_status: trio.TaskStatus[None]) -> None:
    task_status.started()  # the caller goes on when this waits
    await trio.lowlevel.wait_readable(changes.fileno())
    changes.poll(0)


def _look(own: MountPoint) -> tuple[bool | None, dict[int, str]]:
    """Whether our mount is there (``is_there``), and what is mounted over it, or in it."""
    there = is_there(own)
    with contextlib.suppress(OSError):
        return there, mounted_on(own)
    return there, {}


async def _end_loop(loop: trio.CancelScope, stop: trio.Event) -> None:
    """End the loop once ``stop`` is set and what is under way is done, or has had its time."""
    await stop.wait()
    loop.deadline = trio.current_time() + GRACE
    pyfuse3.terminate()


def _fuse_options(root: str, mount: MountOptions) -> set[str]:
    options = {f"fsname={source_of(root)}", f"subtype={FILE_SYSTEM}", "nosuid", "nodev", "noatime"}
    if mount.ro:
        options.add("ro")
    if mount.access.allow_other:
        # Only then does the kernel have to check modes, since without it nobody but the owner gets in.  It costs an attribute
        # request for each change.
        options |= {"allow_other", "default_permissions"}
    return options


def _check_access(access: Access, options: Options) -> None:
    """Raise InvalidArgument where a label would give away files: a user who may set the mapping of a layer's ids could have
    what is in it belong to anybody, to root for one."""
    if access.others_may_write and (options.remap_ids or options.slow_chown):
        raise InvalidArgument(
            "with remap_ids or slow_chown labels decide to whom files belong, so others than the owner must not write them: "
            "leave out uid=, and let umask= have the bits 022"
        )
