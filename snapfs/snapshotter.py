"""Snapshotter: the door for trio tasks to the snapshots of one root.

Each call of containerd's snapshotter interface (``core/snapshots``) is a method here, and what it means is a function in
``snapfs/rules``.  Here that function is taken to the writer's thread, or given a reader, and whatever has to wait is waited
for.  This door knows keys and names only; file names, errno, gRPC and commands are the other doors'.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TypeVar

import trio

from snapfs import names
from snapfs.errors import (
    AlreadyExists,
    Busy,
    Closed,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    NoThread,
    NotUtf8,
    TooDeep,
    TryAgain,
    Unavailable,
)
from snapfs.filters import Filters
from snapfs.kernel import freezing
from snapfs.kernel.namespaces import shares_mount_namespace
from snapfs.kernel.processes import users_of_device
from snapfs.labels import MESSAGE, OF, PIN, Labels, pinned
from snapfs.model import OWNER, ByNode, Caller, Change, Checkpoint, Image, Info, Kind, Mount, Ref, Statistics, Usage
from snapfs.options import Feature, Options, Sync
from snapfs.root import holders
from snapfs.root.inuse import Free
from snapfs.root.merged import Stack, why_unseen
from snapfs.root.trash import cleanup_error
from snapfs.rules import commit, digest, lookup, prepare, remove, rename, workspace
from snapfs.rules import images as image_rules
from snapfs.rules import labels as label_rules
from snapfs.rules import mounts as mount_rules
from snapfs.rules.change import take_id
from snapfs.rules.prepare import PrepareRequest
from snapfs.rules.root import Root
from snapfs.rules.use import Used
from snapfs.services.agreeing import Agreeing
from snapfs.services.archiving import Archiving
from snapfs.services.archiving import OpenLayer as OpenLayer
from snapfs.services.collecting import Collecting
from snapfs.services.comparing import Comparing, Pair
from snapfs.services.copying import Copying
from snapfs.services.counting import Counting
from snapfs.services.descent import Descent
from snapfs.services.flushing import Flushing
from snapfs.services.housekeeping import Housekeeping
from snapfs.services.imagefiles import ImageFiles
from snapfs.services.locks import Locks
from snapfs.services.naming import Naming
from snapfs.services.rootfs import Rootfs
from snapfs.services.shifting import Shifting
from snapfs.services.squashing import Squashing
from snapfs.store.metastore import MetaStore
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.store.writing import Operation, Writer
from snapfs.threads import AGAIN, in_thread, in_thread_or_here

log = logging.getLogger(__name__)

T = TypeVar("T")

AFTER = 0.25  # seconds for what is to be flushed after a Commit that others wait for

TOLD = 5.0  # seconds after which it is told what an end waits for

LOOKS = 8  # threads that look whether the layers of a snapshot are there

WALKS = 4  # threads that walk all records for containerd or the library

LOCKED = 1.5  # seconds that a Commit or Remove in the tree waits for another task, since the kernel holds locks meanwhile

COPIES = 5  # of the layer of a workspace that becomes another each time, for one checkpoint


class Snapshotter:
    """The snapshots of one root.  Made by ``open_snapshotter`` (``snapfs/opening.py``).

    All methods are for trio tasks and may be called at once by many.  Each change is durable when its call returns, and a
    cancelled call has happened or has not.

    A key that a method takes (``Ref``) is a key or name, or an id, which stays right while others rename and replace.
    ``origin`` is the door at which the caller stands: "" for the tree and the library.

    After ``close`` every call raises Unavailable.  Errors of the disk are Unavailable with the errno.
    """

    def __init__(
        self, root: Root, records: MetaStore, *, owns_records: bool, rootfs: Rootfs | None, features: Mapping[str, Feature]
    ) -> None:
        self.options: Options = root.options
        self.layers = root.layers
        self.records = records
        self.features = features
        self.counting = Counting(root.layers, records)
        self.unflushed = root.unflushed
        self.flushing = Flushing(root.unflushed, records, root.fd, sync=root.options.flushes)
        self.agreeing = Agreeing(root, records)
        self.rootfs = rootfs
        self._root = root
        self._comparing = Comparing(root.layers, records, root.overlay_prefix)
        self._archiving = Archiving(root, records)
        self._copying = Copying(root.layers, root.fd, sync=root.options.flushes)
        self._housekeeping = Housekeeping(root.layers)
        self._image_files = ImageFiles(root, records)
        self._shifting = Shifting(root, records)
        self._squashing = Squashing(
            root,
            records,
            self.flushing,
            depth=root.options.squash_depth,
            usage=self.usage,
            counted=self.counting.count_soon,
            discarded=self._empty_trash_soon,
        )
        self._collecting = Collecting()
        self._descent = Descent()
        self._changing = Locks()  # by the number of a workspace in inodes, which stays
        self._looks = trio.CapacityLimiter(LOOKS)
        self._walks = trio.CapacityLimiter(WALKS)
        self._naming = rootfs.naming if rootfs is not None else Naming()
        self._owns_records = owns_records
        self._background: trio.CancelScope | None = None
        self._background_ended = _set_event()
        self._writer_ended = _set_event()
        self._closed = False
        self._endings: dict[int, list[trio.Event]] = {}
        self._listeners: list[Callable[[Change], None]] = []
        self.subscribe(self._descent.note)
        self.subscribe(self._forget_removed)

    # -- opening and closing

    async def run_writer(self, task_status: trio.TaskStatus[None]) -> None:
        """The writer of the records, until ``close``.  Raises NoThread."""
        self._writer_ended = trio.Event()
        try:
            with trio.CancelScope(shield=True):  # until ``close`` has stopped the records and what waits is done
                await self.records.serve(task_status)
        finally:
            self._writer_ended.set()

    async def run_background(self, task_status: trio.TaskStatus[None]) -> None:
        """All else that goes on besides calls, until ``close``; in a nursery of its own, so that closing cancels nothing else,
        and apart from the writer: that ends by ``close`` alone, which comes because this has ended."""
        self._background_ended = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                self._background = nursery.cancel_scope
                await nursery.start(self.counting.run, name="snapfs counting")
                await nursery.start(self.flushing.run, name="snapfs flushing")
                await nursery.start(self._comparing.serve, name="snapfs comparing")
                await nursery.start(self._archiving.serve, name="snapfs archiving")
                await nursery.start(self._image_files.serve, name="snapfs image files")
                await nursery.start(self._copying.serve, name="snapfs copying")
                await nursery.start(self._collecting.serve, name="snapfs collecting")
                if self.rootfs is not None:
                    await nursery.start(self.rootfs.run, self.flushing.doubt, name="snapfs rootfs")
                await nursery.start(self._housekeeping.run, name="snapfs housekeeping")
                await nursery.start(self._squashing.run, name="snapfs squashing")
                nursery.start_soon(self.agreeing.run, name="snapfs agreeing")
                if not self.options.async_remove:
                    self._housekeeping.empty_trash_soon()
                task_status.started()
        finally:
            self._background_ended.set()

    def abandon(self) -> None:
        """Have ``close`` leave nothing of a root that was new, and in which no snapshot was made: it can't be served."""
        self._root.abandoned = True

    async def close(self) -> None:
        """Finish the writes and the flush under way, stop all else and let go of the root; twice is fine."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                with _told("the change of owners under way"):
                    await self._shifting.finish()
                with _told("the flush of the disk"):
                    await self.flushing.finish()
            finally:
                self.records.stop()
                if self._background is not None:
                    self._background.cancel()
                with _told("the writes under way, and the disk"):
                    await self._background_ended.wait()
                    await self._writer_ended.wait()
            async with self._housekeeping.trash_lock:  # a Remove may be waiting for its files to go
                await in_thread_or_here(self._close_files)

    def _close_files(self) -> None:
        self.agreeing.note_end()
        for listener in self._listeners:
            self.records.listeners.remove(listener)
        if self._owns_records:
            self.records.close()
        self._root.close()

    # -- making

    async def prepare(
        self, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = ""
    ) -> list[Mount]:
        """Make the active snapshot ``key`` on the committed snapshot ``parent`` (None or "": on nothing); its mounts.

        Raises NotFound: no such parent; InvalidArgument: the parent is not committed, or key or labels are no good;
        AlreadyExists: the key is in use, by any kind; TooDeep: nothing that stands on so many layers could be mounted;
        FailedPrecondition: the mapping labels can't be followed.
        """
        return await self._make(prepare.prepare, Kind.ACTIVE, key, parent, labels, origin)

    async def view(self, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = "") -> list[Mount]:
        """Make the read-only view ``key`` of ``parent``; as ``prepare`` otherwise."""
        return await self._make(prepare.prepare, Kind.VIEW, key, parent, labels, origin)

    async def create(
        self, kind: Kind, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = ""
    ) -> int:
        """``prepare`` or ``view``, as ``kind`` says; the id of what was made."""
        return await self._make(prepare.make, kind, key, parent, labels, origin)

    async def _make(
        self,
        rule: Callable[[Root, Writer, PrepareRequest], T],
        kind: Kind,
        key: str,
        parent: Ref | None,
        labels: Labels | None,
        origin: str,
    ) -> T:
        request = prepare.request(self._root, kind, key, parent, labels, origin)
        made = await self._write_record(lambda writer: rule(self._root, writer, request))
        self._housekeeping.fill_pool_if_low()
        return made

    async def commit(
        self,
        name: str,
        key: Ref,
        labels: Labels | None = None,
        parent: Ref | None = None,
        *,
        keep_labels: bool = False,
        refuse_mounted: bool = False,
        wait: bool = True,
        patience: float = math.inf,
        origin: str = "",
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``: the id stays, the key is gone.

        The labels are those given here and no others, unless ``keep_labels``; created and updated are now.  ``parent`` is the
        parent that it has, or one to rebase it onto if it has none.  ``refuse_mounted`` asks for Busy while its layer can be
        written through a mount of whatever process, in whatever mount namespace, attached or held open: containerd commits even
        then, and trusts its client not to write any more.

        ``wait`` returns when the data in the layer is on disk: what was written before the call, and through its rootfs, before
        the Commit.  It is flushed first, so that the flush of the record makes it whole; without it the snapshot is committed
        for everybody at once, and the data is flushed in the background: ``flush`` waits for it.  After a power cut before
        that, the snapshot is there but refused as parent and mount (Damaged), until it is removed or accepted.  With
        ``Sync.BACKGROUND`` it is always so, but for callers with ``patience``.

        ``patience`` is how many seconds that may take, for a caller that keeps others waiting.  Then the data is flushed before
        the Commit; where that takes longer, TryAgain is raised, nothing has changed, and the flush goes on: a call soon after
        that waits for what is left of it.  What was written after the first of these calls is flushed after the Commit: where
        that takes longer, the call returns all the same, and the snapshot is what it is without ``wait``.

        The usage is counted after the flush, where that is before the Commit and a count takes but a moment; or else in the
        background, or when ``usage`` is called, which waits for it and says what is counted of what processes write after the
        Commit.

        What was made at another door than ``origin`` belongs to the tree from now on, which has given it a name of its own.

        Raises NotFound: no such key, or no such parent to rebase onto; FailedPrecondition: the snapshot is not active, or
        that parent is not committed; Busy: a process uses its rootfs; TooDeep: its layer would be one too many for the kernel
        to mount; AlreadyExists: the name is in use (the key itself is fine); InvalidArgument: another parent than its own, or
        itself.
        """
        names.encode(name)
        given = label_rules.stored_labels(self._root, labels)
        deadline = trio.current_time() + patience
        flushed: _Flushed | None = None
        wait = wait and (patience < math.inf or self.options.sync is not Sync.BACKGROUND)
        if wait and patience < math.inf:
            await self._flush_before(key, patience - AFTER)
        elif wait:
            flushed = await self._flush_whole(key, name)
        with self._way_out(key, Busy.KEEP if refuse_mounted else None):
            async with self._unmounted(key, LOCKED if refuse_mounted else math.inf) as (number, free), self._ending(number):
                if flushed is not None and (flushed.number, flushed.followed) != (number, self._followed):
                    flushed = None
                usage = None if flushed is None else flushed.usage
                await self._write_record(
                    lambda writer: commit.commit(
                        self._root,
                        writer,
                        name,
                        number,
                        key,
                        given,
                        parent,
                        origin,
                        keep_labels=keep_labels,
                        refuse_mounted=refuse_mounted,
                        free=free,
                        flushed=flushed is not None,
                        usage=usage,
                    )
                )
        if flushed is None:
            await self._follow_up(number, name, wait, deadline)
            return
        if usage is None:
            self.counting.count_soon(number)
        self._root.unflushed.refuse_lost([number])  # another flush may have failed on it meanwhile

    @property
    def _followed(self) -> int:
        """How many file systems were mounted here so far."""
        return self.rootfs.followed if self.rootfs is not None else 0

    async def _flush_whole(self, key: Ref, name: str) -> _Flushed | None:
        """Flush the snapshot ``key``, which is to be committed as ``name``.  None where that is left until after the Commit: it
        is mounted here, so that processes may write until then, or the Commit will be refused."""
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            try:
                lookup.refuse_taken(reader, name, number)
            except AlreadyExists:
                return None
        if not self.flushing.sync or record.kind is not Kind.ACTIVE or (self.rootfs is not None and self.rootfs.holds(number)):
            return None
        flushed = _Flushed(number, self._followed)

        def count() -> None:
            flushed.usage = self.counting.count_small(number)

        try:
            await self.flushing.flush(also=count)
        except NoThread:
            return None
        return flushed

    async def _follow_up(self, number: int, name: str, wait: bool, deadline: float = math.inf) -> None:
        """Snapshot ``number`` was committed as ``name``: have its data flushed, and what it takes counted.  ``wait`` returns
        when the data is on disk, or at ``deadline``."""
        lazily = not wait and self.options.sync is Sync.BACKGROUND
        count = partial(self.counting.count_soon, number)  # unless a call for its usage comes before
        self.flushing.flush_soon(then=count, lazily=lazily)
        if wait:
            await self._flush_after(name, deadline)
            self._root.unflushed.refuse_lost([number])  # another flush may have failed on it meanwhile

    async def _flush_before(self, key: Ref, patience: float) -> None:
        with self.reading() as reader:
            number = lookup.find_id(reader, key)
        await self.flushing.flush_before_commit(number, patience)

    async def _flush_after(self, name: str, deadline: float) -> None:
        """Flush what was committed as ``name``; what is not on disk by ``deadline`` goes on its way."""
        while True:
            try:
                await self.flushing.flush(max(AFTER, deadline - trio.current_time()))
                return
            except TryAgain as error:
                if deadline < math.inf:
                    log.warning('snapshot "%s" was committed, and what was written last is on its way: %s', name, error)
                    return
            await trio.sleep(AGAIN)  # no thread can be started

    # -- changing

    async def remove(
        self,
        key: Ref,
        *,
        refuse_mounted: bool = False,
        wait: bool = True,
        origin: str = "",
        seen: tuple[Kind, str] | None = None,
    ) -> None:
        """Remove a snapshot of any kind: key, record and, right after, its files; with ``async_remove`` at Cleanup.

        The key is free before the files are gone.  ``wait`` returns when they are; a failure to delete them is logged and
        never brings the snapshot back.  ``refuse_mounted`` asks for Busy while its layer is mounted by whatever process,
        wherever, as ``commit`` does; containerd removes even then.

        A snapshot whose record is damaged is removed too, if the indexes agree about which one it is.  ``seen`` is the kind and
        the name by which the caller knows it: NotFound is raised where it has others by now.

        Raises NotFound; FailedPrecondition: HasChildren, Busy: a process uses its rootfs, Pinned, Named: it has a name in
        images/, or it was made at another door than ``origin``, unless that is "", which may remove all.
        """
        self._refuse_kept(key)
        async with self._unmounted(key, LOCKED if refuse_mounted else math.inf) as (number, free), self._ending(number):
            rule = partial(remove.remove, self._root, number=number, key=key, origin=origin, seen=seen)
            await self._write_record(lambda writer: rule(writer=writer, refuse_mounted=refuse_mounted, free=free), frees=True)
        if self.options.async_remove or not self.layers.pending_deletions:
            return
        if wait:
            try:
                await self._housekeeping.empty_trash()
                return
            except NoThread:  # it is removed, and its files go as soon as may be
                pass
        self._housekeeping.empty_trash_soon()

    # -- the states of a workspace

    async def checkpoint(
        self,
        key: Ref,
        message: str = "",
        name: str | None = None,
        *,
        copy: bool = False,
        wait: bool = True,
        caller: Caller = OWNER,
    ) -> Info:
        """Keep the state of the workspace ``key``, an active snapshot, as a committed snapshot, and have the workspace go on on
        top of that, by the same key: what Stat shows of the checkpoint.  containerd lacks this.

        It is one operation, and nobody sees the workspace missing.  The checkpoint is called KEY@NUMBER, or ``name``, and bears
        the labels of the workspace, but for ``pin``, and ``labels.OF``, ``NUMBER`` and ``MESSAGE``; the workspace, which has a
        new id, keeps its labels.  ``message`` is a line of text.  ``wait`` is as in ``commit``.

        ``copy`` is for a workspace in use: what is kept is a copy of its layer, on the same parent, and the workspace goes on
        as it is, mounted and with its id.  Each file is in the copy as it was at one moment, but not all at the same one: it is
        as after a power cut.  What ``snapfs run`` has started there is frozen while the last files are copied, where it has a
        cgroup.  ``caller`` is for whom that is done.

        Raises NotFound; FailedPrecondition: the snapshot is not active, or its ids are mapped, so that it can have no child;
        Busy: its layer is in use, by whatever process; TooDeep; AlreadyExists: ``name`` is in use; NameTooLong;
        InvalidArgument: the message is no line; LabelTooBig: it, or all labels together, are too big; TryAgain: the layer
        changes faster than it can be copied, or ``caller`` would wait for others beyond its patience.
        """
        workspace.refuse_message(message)
        if name is not None:
            names.encode(name)
        rule = partial(workspace.checkpoint, message=message, name=name)
        with self._shortened(key):
            if copy:
                made = await self._keep_copy(key, partial(workspace.keep_copy, message=message, name=name), caller)
                number = made.id
            else:
                with self._way_out(key, Busy.KEEP):
                    number, made = await self._change_workspace(key, rule)
        if not copy:
            self._squashing.shorten_soon(made.labels[OF], made.id)
        await self._follow_up(number, made.name, wait)
        return made

    async def _keep_copy(self, key: Ref, rule: Callable[..., Info], caller: Caller) -> Info:
        """Do ``rule`` with a copy of the layer of the workspace ``key``.  Raises TryAgain where that becomes another, again and
        again, as it does when it is kept or rolled back."""
        for _ in range(COPIES):
            with self.reading() as reader:
                number, record = lookup.find(reader, key)
                workspace.refuse_other_kinds(record)
            device = None if self.rootfs is None else self.rootfs.device_of(number)
            owners = () if caller.user is None else (caller.user,)
            still = partial(_held_still, device, freezing.mark_of(self.root_word, number), owners)
            try:
                async with (
                    self._shifting.kept_out(number, LOCKED),
                    self._copying.copied(number, record.name, still, caller) as made,
                ):
                    new = await self._write_record(partial(take_id, self._root))
                    operation = partial(rule, self._root, number=number, key=key, new=new, made=made)
                    return await self._write_record(lambda writer: operation(writer=writer))  # noqa: B023
            except (NotFound, Damaged):
                with self.reading() as reader:
                    if lookup.find_id(reader, key) == number:
                        raise
            finally:
                self._housekeeping.empty_trash_soon()
        raise TryAgain(f'"{record.name}" was kept or rolled back, again and again, while it was copied')

    async def rollback(self, key: Ref, to: str | int | None = None) -> Info:
        """Throw away what the workspace ``key``, an active snapshot, has changed, and have it go on on the state ``to``, by the
        same key: what Stat shows of it.  containerd lacks this.

        ``to`` is the number of a checkpoint, 0 (what the workspace was before the first one), the name of a checkpoint or of a
        snapshot that it stands on, or None: what it stands on.  It is one operation; labels stay, and the id is a new one.

        Raises NotFound: no such workspace or checkpoint; FailedPrecondition: the snapshot is not active; Pinned; Busy: its
        layer is in use, by whatever process; Damaged: the data of that state may be lost.
        """
        self._refuse_kept(key)
        with self._way_out(key, Busy.END):
            _, made = await self._change_workspace(key, partial(workspace.rollback, to=to), frees=True)
        self._empty_trash_soon()
        return made

    async def fork(self, key: Ref, new: str, *, wait: bool = True) -> Info:
        """Make the active snapshot ``new``, which begins as the snapshot ``key`` is: what Stat shows of it.  containerd lacks
        this.

        It stands on ``key`` where that is committed, or else on a checkpoint of it, in one operation.  ``wait`` is as in
        ``commit``.  Raises as ``checkpoint`` and ``prepare`` do.
        """
        names.encode(new)
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            lookup.refuse_taken(reader, new)  # before its rootfs is unmounted
        if record.kind is Kind.COMMITTED:
            made = await self._write_record(
                lambda writer: workspace.fork(self._root, writer, number, key, new=new, free=Free.NO)
            )
            self._housekeeping.fill_pool_if_low()
            return made
        with self._shortened(key), self._way_out(key, Busy.FORK):
            number, made = await self._change_workspace(key, partial(workspace.fork, new=new))
        self._squashing.shorten_soon(record.name, number)
        await self._follow_up(number, made.parent or "", wait)
        return made

    async def checkpoints(self, key: str) -> list[Checkpoint]:
        """The checkpoints of the workspace ``key``, the oldest first; also those of one that is gone."""
        await trio.lowlevel.checkpoint()
        with self.reading() as reader:
            return list(self._checkpoints_of(reader, key))

    async def list_checkpoints(
        self, key: str, line: Callable[[Checkpoint], str], consume: Callable[[Iterable[str]], T], *, caller: Caller = OWNER
    ) -> T:
        """What ``consume`` makes of a ``line`` of each of ``checkpoints``, both called in a worker thread, which holds one
        checkpoint after the other.

        Calls at the same time with the same two share a walk, begun after they came, and its result.  Raises TryAgain where
        ``caller`` would wait for others beyond its patience.
        """
        self._refuse_closed()
        words = f'list of the checkpoints of "{key}"'
        return await self._collecting.collect(words, partial(self._lines, key, line), consume, caller, also=line)

    def _lines(self, key: str, line: Callable[[Checkpoint], str]) -> Generator[str, None, None]:
        with self.reading(long=True) as reader:
            for each in self._checkpoints_of(reader, key):
                yield line(each)

    def _checkpoints_of(self, reader: Reader, key: str) -> Iterator[Checkpoint]:
        for nth, number, record in workspace.checkpoints(reader, key):
            yield Checkpoint(
                nth,
                record.labels.get(MESSAGE, ""),
                self.shown(reader.info(number, record)),
                self.known_usage(number, record),
                lookup.stand_in(reader, record.name),
            )

    async def _change_workspace(self, key: Ref, rule: Callable[..., Info], *, frees: bool = False) -> tuple[int, Info]:
        """Do ``rule`` (``rules/workspace.py``) to the workspace ``key`` while no process has its layer: the id that it had, and
        what the rule gives.  Calls for one workspace are done one after the other, as they come; where something else changes
        it meanwhile, this is done after that."""
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
        async with self._changing.held(record.node_of(number)):
            return await self._change_in_turn(key, rule, frees=frees)

    async def _change_in_turn(self, key: Ref, rule: Callable[..., Info], *, frees: bool) -> tuple[int, Info]:
        while True:
            with self.reading() as reader:
                before = lookup.find_id(reader, key)
            try:
                async with self._unmounted(before, LOCKED) as (number, free), self._ending(number):
                    operation = partial(rule, self._root, number=number, key=key, free=free)
                    made = await self._write_record(lambda writer: operation(writer=writer), frees=frees)  # noqa: B023
            except NotFound:
                with self.reading() as reader:
                    if lookup.find_id(reader, key) == before:
                        raise
            else:
                self._housekeeping.fill_pool_if_low()
                return number, made

    @contextmanager
    def _way_out(self, key: Ref, words: str | None) -> Iterator[None]:
        """For a block that is refused where the workspace ``key`` is in use: ``words`` end the refusal, and a command."""
        try:
            yield
        except Busy as busy:
            if words is None:
                raise
            with self.reading() as reader:
                number, record = lookup.find(reader, key)
            raise Busy(f"{busy}; {words} {names.last_word(record.name, number)}") from None

    # -- many layers, and one

    @contextmanager
    def _shortened(self, key: Ref) -> Iterator[None]:
        """For a block that is refused where the workspace ``key`` stands on too many layers: they are made one soon, unless
        that is switched off, and the refusal says so, or what can be done."""
        try:
            yield
        except TooDeep as deep:
            with self.reading() as reader:
                number, record = lookup.find(reader, key)
            if self._squashing.shorten_soon(record.name, record.parent):
                raise TooDeep(
                    f'snapshot "{record.name}" stands on as many layers as the kernel can mount together: they are being made '
                    "one: try again in a moment"
                ) from None
            word = names.last_word(record.name, number)
            raise TooDeep(f"{deep}; or keep fewer checkpoints, and go on here: snapfs prune --keep-last 100 {word}") from None

    async def squash(self, key: Ref, new: str | None = None, *, caller: Caller = OWNER) -> Info:
        """Make the committed snapshot ``new`` (None: NAME-squashed, or a name like that), which stands on nothing and shows
        what the committed snapshot ``key`` shows: what Stat shows of it.  containerd lacks this.

        It is made of hard links, so that it takes next to no space; what can't be linked is copied.  It bears the labels of
        ``key``, but for ``pin`` and those of a checkpoint, and ``labels.SQUASHED``, the name of ``key``.  All of it is on disk
        when the call returns, and nothing of it is seen before.

        Raises NotFound; FailedPrecondition: the snapshot is not committed, or an overlay has left in it what can't be squashed;
        AlreadyExists: ``new`` is in use; NameTooLong; LabelTooBig; Damaged; TryAgain where ``caller`` would wait for others
        beyond its patience.
        """
        if new is not None:
            names.encode(new)
        self._refuse_closed()
        return await self._squashing.squash(key, new, caller)

    async def dissolve(self, key: Ref, *, caller: Caller = OWNER) -> None:
        """Remove the committed snapshot ``key`` though others stand on it: each of these takes over what it had, shows what it
        showed, and stands on its parent from now on.  containerd lacks this.

        What takes over keeps its name, labels and times, and gets a new id.  Files are linked, not copied.  All of it is one
        operation.

        Raises NotFound; FailedPrecondition: the snapshot, or what stands on it, is not committed; Busy: their files are in a
        mount, of whatever process; Pinned; Named: it has a name in images/; Damaged; TryAgain as ``squash``.
        """
        self._refuse_closed()
        going_on = await self._squashing.dissolve(key, caller, self._kept_unmounted)
        if not self.options.async_remove:
            with suppress(NoThread):  # the files go as soon as may be
                await self._housekeeping.empty_trash()
        for number in going_on:  # now that the files have no names in the trash any more
            self.counting.count_soon(number)

    @asynccontextmanager
    async def _kept_unmounted(self, numbers: Iterable[int]) -> AsyncIterator[set[int]]:
        """For a block in which none of the snapshots ``numbers``, in their order, is mounted as rootfs, and after which
        ``find_layers`` looks at them anew: those that were a moment ago, and that no process has, as in ``_unmounted``."""
        numbers, free = list(numbers), set[int]()
        if self.rootfs is not None:
            await self.rootfs.give_up(numbers)
        async with AsyncExitStack() as stack:
            for number in numbers:
                await stack.enter_async_context(self._ending(number))
                if self.rootfs is None:
                    continue
                found: Free = await stack.enter_async_context(self.rootfs.unmounted(number))
                if found:
                    free.add(number)
            yield free

    def _empty_trash_soon(self) -> None:
        if not self.options.async_remove:
            self._housekeeping.empty_trash_soon()

    def _refuse_kept(self, key: Ref) -> None:
        """Raise Pinned or Named, before the rootfs of what is to go is unmounted."""
        with suppress(Damaged), self.reading() as reader:
            number, found = lookup.find(reader, key)
            if PIN in found.labels:
                raise pinned(found.name, number)
            if found.images and reader.any_child(number) is None:  # else that is what is told
                image_rules.refuse_named(found)

    def _forget_removed(self, change: Change) -> None:
        if change.before is not None and (change.after is None or change.after.id != change.before.id):
            self.counting.forget(change.before.id)
            self._archiving.forget(change.before.id)
            self._root.forget(change.before.id)

    async def rename(self, old: Ref, new: str) -> None:
        """Give a snapshot another key or name; its kind, id, children and times stay.  containerd lacks this.

        What was made at another door belongs to the tree from now on, which has given it a name of its own.

        Raises NotFound; AlreadyExists: ``new`` is in use; NotPermitted: it has children that were made at another door too,
        which would lose the parent that they know by this name.
        """
        names.encode(new)
        await self._write_record(lambda writer: rename.rename(self._root, writer, old, new))

    # -- names in images/

    async def name_image(self, key: Ref, name: str, *, replace: bool = False) -> Info:
        """Have the committed snapshot ``key`` be called ``name`` in images/: what Stat shows of it.  containerd lacks this.

        ``name`` is a text as keys are, ``alpine:3.20`` or ``docker.io/library/alpine:3.20``; a snapshot may have 256 of them,
        and as long as it has one it is neither removed nor dissolved.  ``replace``: another snapshot that has the name loses
        it, in the same step.

        Raises NotFound; FailedPrecondition: the snapshot is not committed; AlreadyExists: the name is in use, also by this
        snapshot; TooManyNames; InvalidArgument, NameTooLong, NotUtf8: it can't be a name.
        """
        names.encode(name)
        return await self._write_record(lambda writer: image_rules.name(self._root, writer, key, name, replace=replace))

    async def unname_image(self, name: str) -> None:
        """Take ``name`` out of images/; the snapshot stays.  Raises NotFound."""
        await self._write_record(lambda writer: image_rules.unname(self._root, writer, name), frees=True)

    async def rename_image(self, old: str, new: str, *, replace: bool = False) -> None:
        """Call ``new`` in images/ what is called ``old`` there, in one step; ``replace`` as in ``name_image``.

        Raises NotFound; AlreadyExists: ``new`` is in use; InvalidArgument, NameTooLong, NotUtf8: it can't be a name.
        """
        names.encode(new)
        await self._write_record(lambda writer: image_rules.rename(self._root, writer, old, new, replace=replace))

    async def images(self) -> list[Image]:
        """All names in images/, in the order in which they were given.  Raises Damaged."""

        def collect() -> list[Image]:
            found = []
            with self.reading(long=True) as reader:
                for _, _, name in reader.images():
                    number, record, _ = image_rules.find_image(reader, name)
                    found.append(Image(name, self.shown(reader.info(number, record)), self.known_usage(number, record)))
            return found

        return await in_thread(collect, limiter=self._walks)

    async def image(self, key: Ref) -> str | None:
        """The image.json of the snapshot ``key``, an OCI image configuration; None where it has none, as has what is not
        committed.  containerd lacks this.

        It is what ``set_image`` was given, or that of the nearest snapshot below that was given one, with the layers above that
        added: ``history`` has an entry for each, with the message of a checkpoint, and ``rootfs.diff_ids`` their digests as far
        as they are known.  That of a squash has one layer.  Raises NotFound, Damaged.
        """
        return await self.read_image(key, str)

    async def read_image(self, key: Ref, consume: Callable[[str], T], *, caller: Caller = OWNER) -> T | None:
        """What ``consume`` makes of that text, in a worker thread; None where there is none.

        Calls at the same time for the same text, with the same ``consume``, share its result.  Raises what ``image`` does, and
        TryAgain where ``caller`` would wait for others beyond its patience.
        """
        self._refuse_closed()
        return await self._image_files.text(key, consume, caller)

    async def set_image(self, key: Ref, text: str | bytes | None, *, caller: Caller = OWNER) -> Info:
        """Have the committed snapshot ``key`` have the image.json ``text``, in the place of any other, or (None) none of its
        own: what Stat shows of it.  containerd lacks this.

        It is on the disk when the call returns, and whole or not there at all.  What has one of its own is not dissolved, nor
        what it stands on.

        Raises NotFound, also where there is none of its own to take away; FailedPrecondition: the snapshot is not committed;
        InvalidArgument: it is no JSON object, or has no arrays ``history`` and ``rootfs.diff_ids``; NotUtf8; ImageTooBig: more
        than 4 MiB; Damaged; TryAgain where ``caller`` would wait for others beyond its patience.
        """
        self._refuse_closed()
        return await self._image_files.set(key, _bytes(text), caller)

    def find_image(self, name: str) -> tuple[int, Record]:
        """Id and record of the snapshot that is called ``name`` in images/; raises NotFound, or Damaged where it can't be
        read."""
        with self.reading() as reader:
            number, record, _ = image_rules.find_image(reader, name)
        return number, record

    # -- labels, and what else changes

    async def update(self, key: Ref, labels: Labels, fieldpaths: Sequence[str] = ()) -> Info:
        """Change labels; what Stat now shows.

        ``fieldpaths`` are ``labels`` (all of them) and ``labels.<key>`` (that one; all that follows the first dot is the key);
        none at all means ``labels``.  A label that ``labels`` lacks or has empty is deleted.  ``updated`` moves even where
        nothing changed.

        Raises NotFound, or InvalidArgument for any other path and for labels that are no good: then nothing changes.
        """
        given, fields = label_rules.stored_labels(self._root, labels), label_rules.Fields(fieldpaths)
        self._refuse_closed()
        return await self._shifting.update(
            lambda writer, shifted: label_rules.update(self._root, writer, key, given, fields, shifted)
        )

    async def move_label(self, key: Ref, old: str, new: str, *, replace: bool = True) -> Info:
        """Rename one label of a snapshot, in one step; a label ``new`` is replaced if ``replace`` allows it.

        Raises NotFound (snapshot or label), AlreadyExists, LabelTooBig.
        """
        self._refuse_closed()
        return await self._shifting.update(
            lambda writer, shifted: label_rules.move(self._root, writer, key, old, new, replace=replace, shifted=shifted)
        )

    async def cleanup(self) -> None:
        """Delete the files of all that was removed, and ``new-…`` directories that a crash left; returns when they are gone.

        Better than containerd: what snapfs can't have made is moved to ROOT/lost+found, never deleted unseen.

        Raises Unavailable where some of it can't be deleted, with a path and what to do; all else is deleted then.
        """

        refused: list[OSError] = []

        def sweep() -> None:
            try:
                with self.records.reading() as reader:
                    self.layers.sweep(reader.ids(), reader.last_id())
            except OSError as error:
                refused.append(error)

        # in the writer, so that no directory is just being made, and of what is removed for good only
        self._refuse_closed()
        await self.records.write(lambda writer: writer.when_durable(sweep), frees=True)
        left = await self._housekeeping.empty_trash()
        if refused:
            raise Unavailable.from_os("clean up", refused[0]) from refused[0]
        if left:
            raise cleanup_error(left) from left[0]

    async def accept(self, key: Ref) -> None:
        """Take a committed snapshot as it is, whose data had not been flushed when the power went.

        Raises NotFound, or FailedPrecondition: there is nothing to accept.
        """
        number = await self._write_record(lambda writer: commit.accept(self._root, writer, key), frees=True)
        self._root.unflushed.lost.discard(number)

    # -- reading

    async def stat(self, key: Ref) -> Info:
        """One snapshot; raises NotFound."""
        await trio.lowlevel.checkpoint()
        with self.reading() as reader:
            return self.shown(reader.info(*lookup.find(reader, key)))

    async def mounts(self, key: Ref) -> list[Mount]:
        """The mounts that make the file system of an active snapshot or a view.

        Raises NotFound; FailedPrecondition for a committed snapshot; Damaged where a layer is missing.
        """
        await trio.lowlevel.checkpoint()
        await self.find_layers(key)
        with self.reading() as reader:
            return self.mounts_of(reader, *lookup.find(reader, key))

    async def hand_over(self, key: Ref) -> list[Mount]:
        """``mounts`` for a caller that is about to mount them: two overlays must not share an upper layer, so that of ``mount``
        goes.

        Raises Busy while a process uses that.
        """
        await trio.lowlevel.checkpoint()
        await self.find_layers(key)
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            mounts = mount_rules.handed_over(self._root, reader, number, record)
        if record.kind is Kind.ACTIVE and self.rootfs is not None and self.rootfs.holds(number):
            async with self.rootfs.unmounted(number):
                pass
        return mounts

    async def find_layers(self, key: Ref) -> None:
        """Raise Damaged where a directory of the snapshot, or of one that it stands on, is not there; NotFound.

        This waits for commits and removals of it that are under way: what is mounted before the call, and is not refused
        after it, they have not missed."""
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            chain = reader.chain(record)
        if number in self._endings:
            for ended in self._endings[number][:]:
                await ended.wait()
            with self.reading() as reader:
                number, record = lookup.find(reader, number)
                chain = reader.chain(record)
        if self._root.has_at_hand(number, record.kind, chain):
            return
        try:
            await in_thread(self._root.refuse_missing, number, record.kind, chain, limiter=self._looks)
        except Damaged:
            with self.reading() as reader:  # it may have been removed meanwhile
                lookup.find(reader, number)
            raise

    async def walk(self, *filters: str, origin: str = "") -> list[Info]:
        """All snapshots that ``filters`` select (``snapfs/filters.py``), ordered by the key's bytes, of one consistent state.

        Only those that were made at the door ``origin``, unless that is "".  Filters see labels as they are stored, as in
        containerd: not the one that ``upperdir_label`` adds.

        Raises InvalidArgument for a bad filter, Unavailable for one with ``~=`` where google-re2 is not installed.
        """

        def collect() -> list[Info]:
            compiled = Filters(filters)
            with self.reading(long=True) as reader:
                found = reader.walk(compiled.selection)
            return [self.shown(info) for info in found if (not origin or info.origin == origin) and compiled.holds(info)]

        return await in_thread(collect, limiter=self._walks)

    async def usage(self, key: Ref, *, caller: Caller = OWNER) -> Usage:
        """What the snapshot alone takes: an active one is scanned now, a committed one was once, a view takes nothing.

        A committed one is counted once: as its Commit has flushed its data, or in the background as soon as it is flushed, or
        when this is first called, if that is sooner.  What a process writes into its layer before the count is counted;
        what comes later never is, until ``snapfs check --repair`` counts anew.

        Raises NotFound, or Damaged where the layer is missing; TryAgain where ``caller`` would wait for others beyond its
        patience.
        """
        await trio.lowlevel.checkpoint()
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
        return await self.counting.usage(number, record, caller)

    async def changes(
        self,
        key: Ref,
        consume: Callable[[Iterable[str]], T],
        *,
        against: Ref | None = None,
        since: int | None = None,
        content: bool = False,
        paths: Sequence[str] = (),
        caller: Caller = OWNER,
    ) -> T:
        """What an active or committed snapshot changed against its parent: what ``consume`` makes of the lines, ``list`` say.

        It is called in a worker thread, with one line a path as it is found (``scan/changes.py`` says which).  Calls at
        the same time with the same ``consume`` share a scan, begun after they came, and its result.

        ``against``: against this snapshot instead, of whatever kind, as ``key`` may be then; ``since``: against this checkpoint
        of the same workspace, 0 for what that was before the first (``scan/lines.py`` says which lines there are then).
        ``content``: without what holds what it held.  ``paths``: of these alone, and what is in them, written as from the root
        of the snapshot.

        Raises NotFound; FailedPrecondition: a view, with nothing named; InvalidArgument: a path that leads out; Damaged;
        TryAgain where ``caller`` would wait for others beyond its patience.
        """
        await trio.lowlevel.checkpoint()
        if against is not None or since is not None or content or paths:
            return await self._comparing.lines(self._pair(key, against, since, paths), content, consume, caller)
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            chain = reader.chain(record)
        if record.kind is Kind.VIEW:
            raise _changes_nothing(record)
        return await self._comparing.changes(number, record.name, chain, consume, caller)

    async def patch(
        self,
        key: Ref,
        consume: Callable[[Iterable[str]], T],
        *,
        against: Ref | None = None,
        since: int | None = None,
        binary: bool = False,
        paths: Sequence[str] = (),
        caller: Caller = OWNER,
    ) -> T:
        """The patch for ``git apply`` that makes of what the parent shows, or ``against`` or ``since``, what ``key`` shows:
        what ``consume`` makes of its text, which comes in pieces of some kilobytes (``scan/patch.py`` says what it can't tell).
        ``binary``: it has what is no text, too.  The rest is as for ``changes``.
        """
        await trio.lowlevel.checkpoint()
        return await self._comparing.patch(self._pair(key, against, since, paths), binary, consume, caller)

    def _pair(self, key: Ref, against: Ref | None, since: int | None, paths: Sequence[str]) -> Pair:
        """What is compared with what; raises as ``changes`` does."""
        for path in paths:
            if not path or "\0" in path:
                raise InvalidArgument("an empty path names nothing" if not path else "no path has a NUL byte in it")
            if os.path.normpath(f"./{path}").split("/")[0] == "..":
                raise InvalidArgument(f'the path "{names.printable(path)}" leads out of the snapshot')
        wanted = tuple(os.fsencode(os.path.normpath(f"/{path}").lstrip("/")) for path in paths)
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
            new = _layers(reader, number, record)
            if against is None and since is None:
                if record.kind is Kind.VIEW:
                    raise _changes_nothing(record)
                old, other = new[1:], "its parent"
            else:
                base = workspace.kept(reader, record, since) if since is not None else lookup.find(reader, against or "")[0]
                below = lookup.find(reader, base)[1] if base else None
                old = _layers(reader, base, below) if below is not None else []
                other = f'"{below.name}"' if below is not None else "nothing"
        return Pair(tuple(old), tuple(new), wanted, f'compare snapshot "{record.name}" with {other}')

    async def layer_tar(self, key: Ref, *, caller: Caller = OWNER) -> OpenLayer:
        """The layer of the committed snapshot ``key`` as an uncompressed OCI layer, open for reading at any offset, in any
        thread; ``close`` it.  Nothing of it is stored but an index of headers (``scan/layertar.py`` says what is in it).

        Raises NotFound; FailedPrecondition: the snapshot is not committed, a name in its layer begins with ``.wh.``, or an
        overlay has left in it what is in another one (redirect_dir=on, metacopy=on); Damaged; Unavailable, also where the index
        would take too much of the disk (EFBIG); TryAgain where ``caller`` would wait for others.  Reading raises Damaged where
        a file is not what it was when the index was made.
        """
        self._refuse_closed()
        return await self._archiving.layer_tar(key, caller)

    async def diff_id(self, key: Ref, *, caller: Caller = OWNER) -> str:
        """The SHA-256 of that tar, "sha256:…" as OCI has it; all of it is read, unless somebody has done so before.  It is kept
        with the record.  Raises what ``layer_tar`` and reading it do."""
        self._refuse_closed()
        return await self._archiving.diff_id(key, caller)

    async def mount(self, key: Ref, pid: int | None = None) -> str:
        """Have the merged file system of a snapshot mounted by the kernel, read-only unless the snapshot is active: where.

        It is unmounted when no process has used it, and no call asked for it, for ``rootfs_idle`` seconds.  An active snapshot
        that another process has mounted is not mounted a second time: the answer is that place, or the same mount at the usual
        one, where it is asked for by a process ``pid`` that may not see that place, since it isn't known to be in this mount
        namespace.

        Raises NotFound; Unavailable: mounting is not permitted, or the kernel's words; Busy: too many are in use, or its
        layer is in use where its mount can't be got from; Damaged; FailedPrecondition: the snapshot's ids are remapped, which
        is left to container runtimes."""
        await trio.lowlevel.checkpoint()
        with self.reading() as reader:
            number, record = lookup.find(reader, key)
        if self.rootfs is None:
            raise Unavailable("the merged file systems can't be mounted here")
        by_hand = (
            not self.rootfs.holds(number) and self._elsewhere(number, record) and (pid is None or shares_mount_namespace(pid))
        )
        if by_hand and (found := await in_thread(self._root.mounted.proven, number)):
            return found[0]
        return await self.rootfs.mount(number, lambda: self._stack(number), pid or 0)

    def arrived(self, pid: int) -> None:
        """Process ``pid`` (a thread, in fact), for which ``mount`` may have mounted something, makes another request: so it has
        got there, and a Commit or Remove need not wait for that."""
        if self.rootfs is not None:
            self.rootfs.arrived(pid)

    def _stack(self, number: int) -> Stack:
        with self.reading() as reader:
            return mount_rules.stack(self._root, reader, number)

    def _elsewhere(self, number: int, record: Record) -> list[str]:
        return self._root.mounted.active(number) if record.kind is Kind.ACTIVE else []

    async def flush(self) -> None:
        """Return when all data written to ROOT's file system so far is on disk."""
        self._refuse_closed()
        await self.flushing.flush()

    async def flush_committed(self, number: int | None, *, patience: float) -> None:
        """Return when the data of the committed snapshot ``number``, or (None) of all that are committed, is on disk; of any
        other snapshot what ``flush`` flushes.

        Raises Damaged where some of it may be lost, Unavailable where the disk fails, and TryAgain where it takes longer than
        ``patience`` seconds: then it goes on.
        """
        self._refuse_closed()
        if not self.flushing.is_flushed(number):
            await self.flushing.flush(patience)
        self.refuse_lost(number)  # an earlier flush may have had the disk's error

    def space(self) -> os.statvfs_result:
        """The file system that holds ROOT, as statvfs(3) tells it."""
        self._refuse_closed()
        return os.fstatvfs(self._root.fd)

    def subscribe(self, listener: Callable[[Change], None]) -> None:
        """Have ``listener(change)`` called on the trio loop for each change, once it is durable, before its call returns."""
        self._listeners.append(listener)
        self.records.listeners.append(listener)

    # -- of a snapshot whose record is at hand

    def shown(self, info: Info) -> Info:
        """``info`` as Stat shows it: with the label that is never stored, where that is wanted."""
        return label_rules.shown(self._root, info)

    def mounts_of(self, reader: Reader, number: int, record: Record) -> list[Mount]:
        """``mounts`` of a snapshot; its layers are not looked at."""
        return mount_rules.mounts(self._root, reader, number, record)

    def places(self, reader: Reader, number: int, record: Record) -> list[str]:
        """Where the file system of a snapshot is mounted in this mount namespace, by whatever process: paths."""
        return mount_rules.places(self._root, reader, number, record)

    def rootfs_of(self, number: int, record: Record) -> str | None:
        """Where ``mount`` would have it; None where nothing can be mounted."""
        if self.rootfs is None:
            return None
        found = [] if self.rootfs.holds(number) else self._elsewhere(number, record)
        return found[0] if found else self.layers.rootfs(number)

    # -- what the other doors need besides: they reach into no service of this class

    @property
    def root(self) -> str:
        """ROOT, the directory of all this: an absolute path."""
        return self.layers.root

    @property
    def snapshots_directory(self) -> str:
        """ROOT/snapshots, in which each snapshot has the directory of its id."""
        return self.layers.snapshots

    @property
    def root_word(self) -> str:
        """A word that no other root has while this machine is up: one that was made at random, and where it is now, for there
        may be copies of a root; "" where the disk let none be noted."""
        with self.reading() as reader:
            word, where = reader.root_word(), os.fstat(self._root.fd)
        return f"{word} {where.st_dev:x}:{where.st_ino:x}" if word else ""

    @property
    def overlay_options(self) -> tuple[str, ...]:
        """The options of every overlay mount."""
        return self._root.overlay_options

    def layer_path(self, number: int) -> str:
        """ROOT/snapshots/<number>/fs: the directory that holds the files of snapshot ``number`` itself, its layer."""
        return self.layers.fs(number)

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """One consistent state of the records, during the block; ``long`` where reading it takes longer than a moment, in a
        worker thread.  Raises Closed."""
        self._refuse_closed()
        return self.records.reading(long=long)

    def record(self, number: int) -> Record:
        """The record of snapshot ``number`` as it is now; raises NotFound, or Damaged where it can't be read."""
        with self.reading() as reader:
            record = reader.record(number)
        if record is None:
            raise NotFound(f"snapshot {number} does not exist any more")
        return record

    def by_node(self, node: int) -> tuple[int, Record]:
        """Id and record of the snapshot for which the tree's inodes have the number ``node``; raises NotFound, or Damaged."""
        with self.reading() as reader:
            return lookup.find(reader, ByNode(node))

    def refuse_taken(self, name: str, by: int | None = None) -> None:
        """Raise AlreadyExists if ``name`` is in use as key or name, unless by snapshot ``by``.

        Every call that gives a name refuses that too, but not before the writes under way are on disk and a rootfs is
        unmounted, and for all that time its caller may hold locks for which others wait.
        """
        with self.reading() as reader:
            lookup.refuse_taken(reader, name, by)

    def known_usage(self, number: int, record: Record) -> Usage:
        """What the snapshot takes as far as that is known without looking: the stored count, the one made last, or else that of
        an empty layer.  ``usage`` looks."""
        return self.counting.last_known(number, record)

    def known_tar_size(self, number: int, record: Record) -> int | None:
        """How many bytes ``layer_tar`` has, as far as that is known without looking."""
        return self._archiving.size(number, record)

    def has_tar_index(self, number: int) -> bool:
        """Whether ``layer_tar`` has nothing to wait for."""
        return self._archiving.has_index(number)

    def known_digests(self, reader: Reader, number: int, record: Record) -> dict[str, str]:
        """``diff_id`` and ``chain_id`` (of the layer and all that it stands on, as OCI has it), as far as they are known."""
        if not record.diff_id or self.is_lost(number):
            return {}
        found = {"diff_id": digest.diff_id(record), "chain_id": self._descent.chain_id(reader, number, record)}
        return {key: value for key, value in found.items() if value is not None}

    def has_image(self, reader: Reader, record: Record) -> bool:
        """Whether a committed snapshot has an image.json, of its own or inherited.  Raises Damaged."""
        return self._descent.has_image(reader, record)

    def is_lost(self, number: int) -> bool:
        """Whether the disk may have lost data of the committed snapshot ``number``, which is refused as parent and mount until
        it is accepted."""
        return number in self.unflushed.lost

    def is_being_flushed(self, reader: Reader, number: int) -> bool:
        """Whether the committed snapshot ``number`` would be lost if the power went now, which is told where Commits don't wait
        for the disk."""
        return self.options.sync is Sync.BACKGROUND and bool(reader.unflushed_since(number)) and not self.is_lost(number)

    def refuse_lost(self, number: int | None = None) -> None:
        """Raise Damaged if ``is_lost`` is true of snapshot ``number``, or (None) of any."""
        self.unflushed.refuse_lost(sorted(self.unflushed.lost) if number is None else [number])

    @property
    def has_rootfs(self) -> bool:
        """Whether the merged file systems can be mounted here (``mount``); ``features["rootfs"].why`` tells why (not)."""
        return self.rootfs is not None

    async def why_unseen(self, pid: int, target: str) -> str | None:
        """Why process ``pid`` does not get to ``target``, where ``mount`` has mounted something, in words: the process is in
        another mount namespace.  None where it gets there, as far as can be known; so for pid 0, an unknown process."""
        if not pid or shares_mount_namespace(pid):
            return None
        return await in_thread(why_unseen, pid, target)

    def statistics(self) -> Statistics:
        """Counts of this root now, and of what was done since it was opened."""
        with self.reading() as reader:
            snapshots, last_id = {kind: reader.count(kind) for kind in Kind}, reader.last_id()
        return Statistics(
            snapshots=snapshots,
            last_id=last_id,
            batches=self.records.batches.copy(),
            mounts_held=self.rootfs.count if self.rootfs is not None else 0,
            trash_waiting=self.layers.pending_deletions,
            lost=len(self.unflushed.lost),
            copies={number: (copy.files, copy.size) for number, copy in self._copying.under_way.items()},
        )

    # -- how

    def _refuse_closed(self) -> None:
        if self._closed:  # the records may be the caller's, and open
            raise Closed()

    async def _write_record(self, operation: Operation[T], *, frees: bool = False) -> T:
        self._refuse_closed()
        return await self.records.write(operation, frees=frees, short=True)

    @asynccontextmanager
    async def _ending(self, number: int) -> AsyncIterator[None]:
        """For a block that commits or removes snapshot ``number``: ``find_layers`` waits for its end."""
        ended = trio.Event()
        self._endings.setdefault(number, []).append(ended)
        try:
            yield
        finally:
            ended.set()
            self._endings[number].remove(ended)
            if not self._endings[number]:
                del self._endings[number]

    @asynccontextmanager
    async def _unmounted(self, key: Ref, patience: float) -> AsyncIterator[tuple[int, Free]]:
        """For a block in which ``key`` must not be mounted as rootfs: its id, and what is known of its layer, where it was
        mounted a moment ago.  It waits for a shift of its owners for ``patience`` seconds.

        Where the block finds the layer in use (Used), Busy says which process has it: finding that out takes longer."""
        with self.reading() as reader:
            number = lookup.find_id(reader, key)
        try:
            async with self._shifting.kept_out(number, patience):
                if self.rootfs is None:
                    yield number, Free.NO
                else:
                    async with self.rootfs.unmounted(number) as free:
                        yield number, free
        except Used as used:
            look = partial(holders.elsewhere, self._root.mounted, number, self.layers.rootfs(number))
            words = await self._naming.words(("used", number), look)
            raise Busy(f'snapshot "{used.name}" {words or "is in use elsewhere: end what uses it first"}') from None


class _Flushed:
    """A snapshot whose files were flushed in order to be committed: its ``number``, what ``Snapshotter._followed`` was before,
    and what the files take, where that was soon counted."""

    def __init__(self, number: int, followed: int) -> None:
        self.number = number
        self.followed = followed
        self.usage: Usage | None = None


@contextmanager
def _held_still(device: str | None, snapshot: str, owners: Collection[int]) -> Iterator[None]:
    """For a block in which what ``snapfs run`` has started in the overlay with this ``device`` does not run, nor what it has
    started in ``snapshot`` (``freezing.mark``) for one of the ``owners``, as far as that can be had.  Blocks."""
    found = freezing.marked(snapshot, owners=owners)
    if device:
        found |= freezing.cgroups(pid for pid, _ in users_of_device(device, longest=math.inf, enough=math.inf))
    with freezing.frozen(found):
        yield


def _layers(reader: Reader, number: int, record: Record) -> list[int]:
    """Of which layers the file system of snapshot ``number`` is made, the nearest first."""
    chain = reader.chain(record)
    return chain if record.kind is Kind.VIEW else [number, *chain]


def _bytes(text: str | bytes | None) -> bytes | None:
    try:
        return text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise NotUtf8("an image.json must be UTF-8") from None


def _changes_nothing(record: Record) -> FailedPrecondition:
    return FailedPrecondition(f'snapshot "{record.name}" is a view, which changes nothing: name what it is to be compared with')


def _set_event() -> trio.Event:
    event = trio.Event()
    event.set()
    return event


@contextmanager
def _told(what: str) -> Iterator[None]:
    """For a block of the end that waits for ``what``: where it takes long, the log says so."""
    timer = threading.Timer(TOLD, log.warning, (f"the end is waiting for {what}",))
    timer.daemon = True
    with suppress(RuntimeError):  # no thread can be started
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
