"""Snapshotter: containerd's snapshotter interface over records (``metastore``) and directories (``layers``).

Source of the semantics: containerd ``core/snapshots`` and its overlay snapshotter.  Where snapfs does better the
docstrings say "better".  Everything here knows keys and names only; file names, errno, gRPC and commands are the doors'.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing, suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio

from snapfs import idmap, mountspec, names
from snapfs.errors import (
    AlreadyExists,
    Busy,
    Closed,
    Damaged,
    FailedPrecondition,
    HasChildren,
    InvalidArgument,
    NotFound,
    NotPermitted,
    Pinned,
    TooDeep,
    Unavailable,
    WrongParent,
)
from snapfs.filters import Filters
from snapfs.kernel import cached
from snapfs.kernel.namespaces import is_neighbour
from snapfs.labels import PARENT_CHAIN, PIN, UPPERDIR, Labels, check_label
from snapfs.model import Change, Info, Kind, Mount, Statistics, Usage
from snapfs.options import Feature, Options, Sync
from snapfs.root import holders
from snapfs.root.imprint import Imprint
from snapfs.root.inuse import InUse
from snapfs.root.layers import Layers
from snapfs.root.mounted import Mounted, Place
from snapfs.root.placing import Placing
from snapfs.root.trash import undeletable
from snapfs.scan.changes import changes
from snapfs.scan.sharing import Sharing
from snapfs.services.agreeing import Agreeing
from snapfs.services.counting import Counting
from snapfs.services.flushing import Flushing
from snapfs.services.housekeeping import Housekeeping
from snapfs.services.rootfs import Rootfs, Stack, why_unseen
from snapfs.store.metastore import MetaStore
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.store.writing import Operation, Writer

T = TypeVar("T")

_FEW = 50  # layers that are looked at without a thread, if that takes no disk: a microsecond or two each


class _InUse(Busy):
    """The layer of snapshot ``name`` is in use; who uses it is yet to be found out."""

    def __init__(self, name: str) -> None:
        super().__init__(f'snapshot "{name}" is in use')
        self.name = name


Ref = str | int
"""A snapshot by its key or name, or by its id, which stays right while others rename and replace."""


class Snapshotter:
    """The snapshots of one root.  Made by ``open_snapshotter`` (``snapfs/opening.py``).

    All methods are for trio tasks and may be called at once by many.  Each change is durable when its call returns, and a
    cancelled call has happened or has not.

    After ``close`` every call raises Unavailable.  Errors of the disk are Unavailable with the errno.
    """

    def __init__(
        self,
        options: Options,
        layers: Layers,
        records: MetaStore,
        *,
        owns_records: bool,
        overlay_options: Sequence[str],
        maps_ids: bool,
        mounted: Mounted,
        in_use: InUse,
        rootfs: Rootfs | None,
        features: Mapping[str, Feature],
        damaged: frozenset[int],
    ) -> None:
        self.options = options
        self.layers = layers
        self.records = records
        self.features = features
        self.counting = Counting(layers, records)
        self._snapshots_fd = os.open(layers.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._placing = Placing(layers, self._snapshots_fd)
        self.flushing = Flushing(layers, records, self._snapshots_fd, sync=options.sync is Sync.FULL)
        self.agreeing = Agreeing(layers, records, self.flushing.boot)
        self.mounted = mounted
        self._in_use = in_use
        self.rootfs = rootfs
        self._scans: Sharing[Any] = Sharing(trio.CapacityLimiter(2))  # disks gain little from more
        self._owns_records = owns_records
        self.overlay_options = overlay_options
        self._maps_ids = maps_ids
        self._damaged = set(damaged)  # as it was found at the start; whatever is used is looked at again
        self._background: trio.CancelScope | None = None
        self._background_ended = trio.Event()
        self._closed = False
        self._housekeeping = Housekeeping(layers)
        self._listeners: list[Callable[[Change], None]] = []
        self.subscribe(self._forget_removed)

    # -- opening and closing

    async def run_background(self, task_status: trio.TaskStatus[None]) -> None:
        """All that goes on besides calls, until ``close``; in a nursery of its own, so that closing cancels nothing else."""
        try:
            async with trio.open_nursery() as nursery:
                self._background = nursery.cancel_scope
                await nursery.start(self._write, name="snapfs writer")
                await nursery.start(self.counting.run, name="snapfs counting")
                await nursery.start(self.flushing.run, name="snapfs flushing")
                await nursery.start(self._scans.serve, name="snapfs scans")
                if self.rootfs is not None:
                    await nursery.start(self.rootfs.run, self.flushing.doubt, name="snapfs rootfs")
                await nursery.start(self._housekeeping.run, name="snapfs housekeeping")
                nursery.start_soon(self.agreeing.run, name="snapfs agreeing")
                if not self.options.async_remove:
                    self._housekeeping.empty_trash_soon()
                task_status.started()
        finally:
            self._background_ended.set()

    async def close(self) -> None:
        """Finish the writes and the flush under way, stop all else and let go of the root; twice is fine."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                await self.flushing.finish()
            finally:
                self.records.stop()
                if self._background is not None:
                    self._background.cancel()
                    await self._background_ended.wait()
            async with self._housekeeping.trash_lock:  # a Remove may be waiting for its files to go
                await trio.to_thread.run_sync(self._close_files)

    def _close_files(self) -> None:
        self.agreeing.note_end()
        self.mounted.close()
        self._in_use.close()
        os.close(self._snapshots_fd)
        for listener in self._listeners:
            self.records.listeners.remove(listener)
        if self._owns_records:
            self.records.close()
        self.layers.close()

    async def _write(self, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope(shield=True):  # until ``close`` has stopped the records and what waits is done
            await self.records.serve(task_status)

    # -- making

    async def prepare(
        self, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = ""
    ) -> list[Mount]:
        """Make the active snapshot ``key`` on the committed snapshot ``parent`` (None or "": on nothing); its mounts.

        ``origin``, here as elsewhere, is the door at which the caller stands: "" for the tree and the library.

        Raises NotFound: no such parent; InvalidArgument: the parent is not committed, or key or labels are no good;
        AlreadyExists: the key is in use, by any kind; TooDeep: nothing that stands on so many layers could be mounted;
        FailedPrecondition: the mapping labels can't be followed.
        """
        return await self._create(Kind.ACTIVE, key, parent, labels, origin, self._handed_over)

    async def view(self, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = "") -> list[Mount]:
        """Make the read-only view ``key`` of ``parent``; as ``prepare`` otherwise."""
        return await self._create(Kind.VIEW, key, parent, labels, origin, self.mounts_of)

    async def create(
        self, kind: Kind, key: str, parent: Ref | None = None, labels: Labels | None = None, *, origin: str = ""
    ) -> int:
        """``prepare`` or ``view``, as ``kind`` says; the id of what was made."""
        return await self._create(kind, key, parent, labels, origin, lambda reader, number, record: number)

    async def _create(
        self,
        kind: Kind,
        key: str,
        parent: Ref | None,
        labels: Labels | None,
        origin: str,
        answer: Callable[[Reader, int, Record], T],
    ) -> T:
        names.encode(key)
        stored = self._checked_labels(labels)
        owner = idmap.root_owner(stored)
        if owner is not None and self.options.remap_ids and not self._maps_ids and not self.options.slow_chown:
            raise FailedPrecondition(
                f"cannot remap ids: layers in {self.layers.root} can't be mounted idmapped here "
                "(kernel, file system or privileges); set slow_chown to change owners instead"
            )

        def operation(writer: Writer) -> T:
            above = self._committed(writer, parent, InvalidArgument) if parent else None
            self._refuse_taken(writer, key)
            number = writer.next_id()
            now = time.time_ns()
            record = Record(key, kind, above or 0, now, now, stored, None, origin)
            if above:
                self.layers.refuse_damaged(above)
                self._refuse_mapped_twice(writer, above, owner)
                self._refuse_too_deep(writer, number, record)
            try:
                self.layers.promise(number)
                self._placing.place(writer, number, record)
            except OSError as error:
                raise Unavailable.from_os(f'make the directories of snapshot "{key}"', error) from error
            self._imprint(number, record, "")
            writer.add(number, record)
            writer.changed(None, writer.info(number, record))
            return answer(writer, number, record)

        answered = await self._write_record(operation)
        self._housekeeping.fill_pool_if_low()
        return answered

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
        origin: str = "",
    ) -> None:
        """Make the active snapshot ``key`` the committed snapshot ``name``: the id stays, the key is gone.

        The labels are those given here and no others, unless ``keep_labels``; created and updated are now.  ``parent`` is the
        parent that it has, or one to rebase it onto if it has none.  ``refuse_mounted`` asks for Busy while its layer can be
        written through a mount of whomever, in whatever mount namespace, attached or held open: containerd commits even then,
        and trusts its client not to write any more.

        ``wait`` returns when the data in the layer is on disk; without it the snapshot is committed for everybody at once, and
        the data is flushed in the background: ``flush`` waits for it.  After a power cut before that, the snapshot is there
        but refused as parent and mount (Damaged), until it is removed or accepted.

        The usage is counted after that, in the background, or when somebody asks: ``usage`` waits for it, and says what is
        counted of what is written meanwhile by those who go on after the Commit.

        What was made at another door than ``origin`` belongs to the tree from now on, which has given it a name of its own.

        Raises NotFound: no such key, or no such parent to rebase onto; FailedPrecondition: the snapshot is not active, or
        that parent is not committed; Busy: somebody uses its rootfs; TooDeep: its layer would be one too many for the kernel to
        mount; AlreadyExists: the name is in use (the key itself is fine); InvalidArgument: another parent than its own, or
        itself.
        """
        names.encode(name)
        given = self._checked_labels(labels)

        def operation(writer: Writer) -> None:
            record = self._find_again(writer, number, key)
            if record.kind is not Kind.ACTIVE:
                raise FailedPrecondition(f'snapshot "{record.name}" is {record.kind}: only active ones can be committed')
            self.layers.refuse_damaged(number)
            if parent == name:
                raise InvalidArgument(f'snapshot "{name}" cannot be its own parent')
            self._refuse_taken(writer, name, number)
            above = self._new_parent(writer, record, parent) if parent else record.parent
            if refuse_mounted:
                self._refuse_used(number, record, free)
            now = time.time_ns()
            kept = record.labels if keep_labels else {}
            whose = origin if record.origin == origin else ""
            after = Record(name, Kind.COMMITTED, above, now, now, {**kept, **given}, None, whose)
            if above:
                self._refuse_too_deep(writer, number, after)
            self._put(writer, number, record, after)

        async with self._unmounted(key) as (number, free), self._told_by_whom(number):
            await self._write_record(operation)
        self.flushing.flush_soon(then=partial(self.counting.count_soon, number))  # unless somebody asks for it before
        if wait:
            await self.flushing.flush()
            self.flushing.refuse_lost([number])  # another flush may have failed on it meanwhile

    def _new_parent(self, writer: Writer, record: Record, parent: Ref) -> int:
        """The id of the parent that a Commit asks for."""
        if not record.parent:
            return self._committed(writer, parent, FailedPrecondition)
        own = writer.parent_of(record).name
        if parent not in (own, record.parent):
            asked = writer.record(parent) if isinstance(parent, int) else None
            raise WrongParent(f'the parent of snapshot "{record.name}" is "{own}", not "{asked.name if asked else parent}"')
        return record.parent

    # -- changing

    async def remove(self, key: Ref, *, refuse_mounted: bool = False, wait: bool = True, origin: str = "") -> None:
        """Remove a snapshot of any kind: key, record and, right after, its files; with ``async_remove`` at Cleanup.

        The key is free before the files are gone.  ``wait`` returns when they are; a failure to delete them is logged and
        never brings the snapshot back.  ``refuse_mounted`` asks for Busy while its layer is mounted by whomever, wherever, as
        ``commit`` does; containerd removes even then.

        A snapshot whose record is damaged is removed too, if the indexes agree about which one it is.

        Raises NotFound; FailedPrecondition: HasChildren, Busy: somebody uses its rootfs, Pinned, or it was made at another door
        than ``origin``, unless that is "", which may remove all.
        """

        def operation(writer: Writer) -> None:
            before, record = self._last_seen(writer, number, key)
            if origin and before.origin != origin:
                raise FailedPrecondition(f'snapshot "{before.name}" was not made by {origin}: remove it in the tree')
            if PIN in before.labels:
                raise Pinned.of(before.name)
            if child := writer.a_child(number):
                raise HasChildren.of(before.name, child[1], child[0])
            if refuse_mounted and record is not None:
                self._refuse_used(number, record, free)
            if record is None:
                writer.delete_unreadable(number, before.kind, before.name)
            else:
                writer.delete(number, record)
            writer.changed(before, None)
            writer.when_durable(lambda: (self.layers.leave if self.options.async_remove else self.layers.retire)(number))

        with suppress(Damaged), self._reading() as reader:  # before its rootfs is unmounted
            _, found = self._find(reader, key)
            if PIN in found.labels:
                raise Pinned.of(found.name)
        async with self._unmounted(key) as (number, free), self._told_by_whom(number):
            await self._write_record(operation, frees=True)
        if self.options.async_remove:
            return
        if wait:
            await self._housekeeping.empty_trash()
        else:
            self._housekeeping.empty_trash_soon()

    def _last_seen(self, writer: Writer, number: int, key: Ref) -> tuple[Info, Record | None]:
        """A snapshot that is to be removed; without its record where that is damaged, but the indexes agree about it."""
        try:
            record = self._find_again(writer, number, number)
            if writer.listed(number) != (record.kind, record.name):
                raise Damaged(f'the record of snapshot {number}, "{record.name}", contradicts the indexes')
            return writer.info(number, self._find_again(writer, number, key)), record
        except Damaged:
            kind, name = writer.listed(number)
            if isinstance(key, str) and name != key:
                raise
            return Info(name=name, kind=kind, id=number, parent=None, labels={}, created=0, updated=0), None

    def _forget_removed(self, change: Change) -> None:
        if change.before is not None and change.after is None:
            self.counting.forget(change.before.id)
            self._damaged.discard(change.before.id)
            self.flushing.lost.discard(change.before.id)

    async def rename(self, old: Ref, new: str) -> None:
        """Give a snapshot another key or name; its kind, id, children and times stay.  containerd lacks this.

        What was made at another door belongs to the tree from now on, which has given it a name of its own.

        Raises NotFound; AlreadyExists: ``new`` is in use; NotPermitted: it has children that were made at another door too,
        which would lose the parent that they know by this name.
        """
        names.encode(new)

        def operation(writer: Writer) -> None:
            number, before = self._find(writer, old)
            self._refuse_taken(writer, new, number)
            record = before
            if record.origin and new != record.name:
                self._refuse_children_of(writer, number, record)
                record = msgspec.structs.replace(record, origin="")
            self._put(writer, number, before, msgspec.structs.replace(record, name=new))

        await self._write_record(operation)

    def _refuse_children_of(self, writer: Writer, number: int, record: Record) -> None:
        """Raise NotPermitted if snapshot ``number`` has a child of the same origin."""
        for kind in Kind:
            for child, name in writer.children(number, kind):
                below = writer.record(child)
                if below is not None and below.origin == record.origin:
                    raise NotPermitted(
                        f'snapshot "{record.name}" is {record.origin}\'s, and so is its child "{name}" ({kind}), '
                        "which knows it by this name: make a child of it in the tree instead"
                    )

    async def update(self, key: Ref, labels: Labels, fieldpaths: Sequence[str] = ()) -> Info:
        """Change labels; what Stat now shows.

        ``fieldpaths`` are ``labels`` (all of them) and ``labels.<key>`` (that one; all that follows the first dot is the key);
        none at all means ``labels``.  A label that ``labels`` lacks or has empty is deleted.  ``updated`` moves even where
        nothing changed.

        Raises NotFound, or InvalidArgument for any other path and for labels that are no good: then nothing changes.
        """
        given = self._checked_labels(labels)
        wholly = not fieldpaths or "labels" in fieldpaths
        single = []
        for path in fieldpaths:
            field, dot, label = path.partition(".")
            if field != "labels" or (dot and not label):
                raise InvalidArgument(f'cannot update "{path}": only "labels" and "labels.<key>" can be')
            if dot:
                single.append(label)

        def operation(writer: Writer) -> Info:
            number, record = self._find(writer, key)
            after = dict(given) if wholly else dict(record.labels)
            for label in () if wholly else single:
                after.pop(label, None)
                if label in given:
                    after[label] = given[label]
            return self._relabel(writer, number, record, after)

        return await self._write_record(operation)

    async def move_label(self, key: Ref, old: str, new: str, *, replace: bool = True) -> Info:
        """Rename one label of a snapshot, in one step; a label ``new`` is replaced if ``replace`` allows it.

        Raises NotFound (snapshot or label), AlreadyExists, LabelTooBig.
        """

        def operation(writer: Writer) -> Info:
            number, record = self._find(writer, key)
            if old not in record.labels:
                raise NotFound(f'snapshot "{record.name}" has no label "{old}"')
            if not replace and new in record.labels:
                raise AlreadyExists(f'snapshot "{record.name}" has a label "{new}" already')
            after = {label: value for label, value in record.labels.items() if label != old}
            after.update(self._checked_labels({new: record.labels[old]}))
            return self._relabel(writer, number, record, after)

        return await self._write_record(operation)

    def _relabel(self, writer: Writer, number: int, record: Record, labels: dict[str, str]) -> Info:
        mapped = (idmap.UID_MAPPING, idmap.GID_MAPPING)
        if any(record.labels.get(label) != labels.get(label) for label in mapped):
            owner = idmap.root_owner(labels)
            if record.kind is not Kind.COMMITTED and record.parent:
                self._refuse_mapped_twice(writer, record.parent, owner)
            if record.kind is Kind.ACTIVE and self.options.remap_ids and self.options.slow_chown and not self._maps_ids:
                self.layers.refuse_damaged(number)
                self._shift_owners(writer, number, record.labels, labels)
        updated = max(time.time_ns(), record.updated + 1)
        info = self._put(writer, number, record, msgspec.structs.replace(record, labels=labels, updated=updated))
        return self.shown(info)

    def _shift_owners(self, writer: Writer, number: int, before: Labels, after: Labels) -> None:
        """Change the owners in the layer of snapshot ``number`` from one mapping to another; undone if the Update fails."""
        old, new = idmap.mappings(before), idmap.mappings(after)
        was: dict[int, tuple[int, int]] = {}  # by inode: what has several names is met several times

        def shifted(entry: os.stat_result) -> tuple[int, int]:
            if entry.st_ino in was:
                return entry.st_uid, entry.st_gid
            was[entry.st_ino] = entry.st_uid, entry.st_gid
            return idmap.remapped(entry.st_uid, old[0], new[0]), idmap.remapped(entry.st_gid, old[1], new[1])

        writer.on_failure(lambda: self.layers.chown(number, lambda entry: was.get(entry.st_ino, (entry.st_uid, entry.st_gid))))
        self.layers.chown(number, shifted)

    def _put(self, writer: Writer, number: int, before: Record, after: Record) -> Info:
        was = writer.info(number, before)
        since = writer.unflushed_since(number)
        if before.kind is not after.kind:
            self.flushing.mark(writer, number)
        writer.on_failure(lambda: self._imprint_again(number, before, since))
        self._imprint(number, after, writer.unflushed_since(number))
        writer.put(number, after)
        info = writer.info(number, after)
        writer.changed(was, info)
        return info

    def _imprint(self, number: int, record: Record, unflushed_since: str) -> None:
        """Let the directory of snapshot ``number`` bear ``record``; raises OSError."""
        if number not in self._damaged:
            self.layers.bear(number, Imprint(record, unflushed_since))

    def _imprint_again(self, number: int, record: Record, unflushed_since: str) -> None:
        """The same, where it bears more by now than has happened; if that fails, too, the next start mends it."""
        try:
            self._imprint(number, record, unflushed_since)
        except OSError:
            self.agreeing.is_known = False
            raise

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
        await self._write_record(lambda writer: writer.when_durable(sweep), frees=True)
        left = await self._housekeeping.empty_trash()
        if refused:
            raise Unavailable.from_os("clean up", refused[0]) from refused[0]
        if left:
            raise undeletable(left) from left[0]

    # -- reading

    async def stat(self, key: Ref) -> Info:
        """One snapshot; raises NotFound."""
        await trio.lowlevel.checkpoint()
        with self._reading() as reader:
            return self.shown(reader.info(*self._find(reader, key)))

    async def mounts(self, key: Ref) -> list[Mount]:
        """The mounts that make the file system of an active snapshot or a view.

        Raises NotFound; FailedPrecondition for a committed snapshot; Damaged where a layer is missing.
        """
        await trio.lowlevel.checkpoint()
        await self.find_layers(key)
        with self._reading() as reader:
            return self.mounts_of(reader, *self._find(reader, key))

    async def hand_over(self, key: Ref) -> list[Mount]:
        """``mounts`` for who is about to mount them: two overlays must not share an upper layer, so that of ``mount`` goes.

        Raises Busy while somebody uses that.
        """
        await trio.lowlevel.checkpoint()
        await self.find_layers(key)
        with self._reading() as reader:
            number, record = self._find(reader, key)
            mounts = self._handed_over(reader, number, record)
        if record.kind is Kind.ACTIVE and self.rootfs is not None and self.rootfs.holds(number):
            async with self.rootfs.unmounted(number):
                pass
        return mounts

    async def find_layers(self, key: Ref) -> None:
        """Raise Damaged where a directory of the snapshot, or of one that it stands on, is not there; NotFound."""
        with self._reading() as reader:
            number, record = self._find(reader, key)
            chain = reader.chain(record)

        parts = [f"{layer}/fs" for layer in (number, *chain)] + [f"{number}/work"] * (record.kind is Kind.ACTIVE)
        if len(chain) < _FEW and all(cached.is_directory(self._snapshots_fd, part) for part in parts):
            return

        def look() -> None:
            self.layers.refuse_damaged(number, record.kind)
            for layer in chain:
                self.layers.refuse_damaged(layer)

        try:
            await trio.to_thread.run_sync(look)
        except Damaged:
            with self._reading() as reader:  # it may have been removed meanwhile
                self._find(reader, number)
            raise

    async def walk(self, *filters: str, origin: str = "") -> list[Info]:
        """All snapshots that ``filters`` select (``snapfs/filters.py``), ordered by the key's bytes, of one consistent state.

        Only those that were made at the door ``origin``, unless that is "".  Filters see labels as they are stored, as in
        containerd: not the one that ``upperdir_label`` adds.

        Raises InvalidArgument for a bad filter.
        """
        compiled = Filters(filters)

        def collect() -> list[Info]:
            with self._reading(long=True) as reader:
                found = reader.walk(compiled.selection)
            return [self.shown(info) for info in found if (not origin or info.origin == origin) and compiled.holds(info)]

        return await trio.to_thread.run_sync(collect)

    async def usage(self, key: Ref) -> Usage:
        """What the snapshot alone takes: an active one is scanned now, a committed one was once, a view takes nothing.

        A committed one is counted once: in the background as soon as its data is flushed, or when this is first called, if that
        is sooner.  What somebody writes into its layer between Commit and count (through ``mounts``, or ``diff``) is counted;
        what comes later never is, until ``snapfs check --repair`` counts anew.

        Raises NotFound, or Damaged where the layer is missing.
        """
        await trio.lowlevel.checkpoint()
        with self._reading() as reader:
            number, record = self._find(reader, key)
        return await self.counting.usage(number, record)

    async def changes(self, key: Ref, consume: Callable[[Iterable[str]], T]) -> T:
        """What an active or committed snapshot changed against its parent: what ``consume`` makes of the lines, ``list`` say.

        It is called in a worker thread, with one line a path as it is found (``scan/changes.py`` says which).  All who ask at
        once with the same ``consume`` share a scan, begun after they asked, and its result.

        Raises NotFound; FailedPrecondition: a view, or a directory that was renamed with redirect_dir=on; Damaged.
        """
        await trio.lowlevel.checkpoint()
        with self._reading() as reader:
            number, record = self._find(reader, key)
            chain = reader.chain(record)
        if record.kind is Kind.VIEW:
            raise FailedPrecondition(f'snapshot "{record.name}" is a view, which changes nothing')

        def scan() -> T:
            for layer in (number, *chain):
                self.layers.refuse_damaged(layer)
            directories = [self.layers.fs(layer) for layer in (number, *chain)]
            with closing(changes(directories, checkpoint=trio.from_thread.check_cancelled)) as lines:
                return consume(lines)

        try:
            result: T = await self._scans.run((number, consume), scan)
        except (Damaged, OSError) as error:
            with self._reading() as reader:  # it may have been removed meanwhile
                self._find(reader, number)
            if isinstance(error, Damaged):
                raise
            if isinstance(error, FileNotFoundError):
                raise Damaged(f'the layer {error.filename} of snapshot "{record.name}" or of a parent is missing') from None
            raise Unavailable.from_os(f'compare snapshot "{record.name}" with its parents', error) from error
        return result

    async def mount(self, key: Ref, pid: int | None = None) -> str:
        """Have the merged file system of a snapshot mounted by the kernel, read-only unless the snapshot is active: where.

        It is unmounted when nobody has used it, nor called this, for ``rootfs_idle`` seconds.  An active snapshot that somebody
        else has mounted is not mounted a second time: the answer is that place, or the same mount at the usual one, where it is
        asked for by a process ``pid`` that may not see that place, since it isn't known to be in this mount namespace.

        Raises NotFound; Unavailable: mounting is not permitted, or the kernel's words; Busy: too many are in use, or its
        layer is in use where its mount can't be got from; Damaged; FailedPrecondition: the snapshot's ids are remapped, which
        is left to container runtimes."""
        await trio.lowlevel.checkpoint()
        with self._reading() as reader:
            number, record = self._find(reader, key)
        if self.rootfs is None:
            raise Unavailable("the merged file systems can't be mounted here")
        by_hand = not self.rootfs.holds(number) and self._elsewhere(number, record) and (pid is None or is_neighbour(pid))
        if by_hand and (places := await trio.to_thread.run_sync(self.mounted.proven, number)):
            return places[0]
        return await self.rootfs.mount(number, lambda: self._stack(number))

    def _stack(self, number: int) -> Stack:
        with self._reading() as reader:
            _, record = self._find(reader, number)
            lowers = reader.lowers(number, record)
        self.flushing.refuse_lost(lowers)
        if self._maps_ids and any(idmap.mappings(record.labels)):
            raise FailedPrecondition(
                f'snapshot "{record.name}" has its ids remapped: let a container runtime mount what mounts.json says'
            )
        return Stack(tuple(lowers), number if record.kind is Kind.ACTIVE else None)

    def _elsewhere(self, number: int, record: Record) -> list[str]:
        return self.mounted.active(number) if record.kind is Kind.ACTIVE else []

    def rootfs_of(self, number: int, record: Record) -> str | None:
        """Where ``mount`` would have it; None where nothing can be mounted."""
        if self.rootfs is None:
            return None
        places = [] if self.rootfs.holds(number) else self._elsewhere(number, record)
        return places[0] if places else self.layers.rootfs(number)

    def places(self, reader: Reader, number: int, record: Record) -> list[str]:
        """Where the file system of a snapshot is mounted in this mount namespace, by whomever: paths.

        A view and its parent look the same, so both are shown at all places but each other's rootfs.
        """
        if record.kind is Kind.ACTIVE:
            return self.mounted.active(number)
        own, places = self.layers.rootfs(number), self.mounted.stacked(reader.lowers(number, record))
        return [place for place in places if place == own or not self.layers.is_rootfs(place)]

    async def flush(self) -> None:
        """Return when all data written to ROOT's file system so far is on disk."""
        self._refuse_closed()
        await self.flushing.flush()

    async def accept(self, key: Ref) -> None:
        """Take a committed snapshot as it is, whose data had not been flushed when the power went.

        Raises NotFound, or FailedPrecondition: there is nothing to accept.
        """

        def operation(writer: Writer) -> int:
            number, record = self._find(writer, key)
            if number not in self.flushing.lost:
                raise FailedPrecondition(f'snapshot "{record.name}" is whole: there is nothing to accept')
            self.flushing.settle(writer, [number])
            info = writer.info(number, record)
            writer.changed(info, info, counted=True)
            return number

        self.flushing.lost.discard(await self._write_record(operation, frees=True))

    def space(self) -> os.statvfs_result:
        """The file system that holds ROOT, as statvfs(3) tells it."""
        self._refuse_closed()
        return os.fstatvfs(self._snapshots_fd)

    def subscribe(self, listener: Callable[[Change], None]) -> None:
        """Have ``listener(change)`` called on the trio loop for each change, once it is durable, before its call returns."""
        self._listeners.append(listener)
        self.records.listeners.append(listener)

    # -- how

    # What the tree and the other doors need besides containerd's calls; they reach into no service of this class.

    @property
    def root(self) -> str:
        """ROOT, the directory of all this: an absolute path."""
        return self.layers.root

    @property
    def snapshots_directory(self) -> str:
        """ROOT/snapshots, in which each snapshot has the directory of its id."""
        return self.layers.snapshots

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

    def known_usage(self, number: int, record: Record) -> Usage:
        """What the snapshot takes as far as that is known without looking: the stored count, the one made last, or else that of
        an empty layer.  ``usage`` looks."""
        return self.counting.last_known(number, record)

    def is_lost(self, number: int) -> bool:
        """Whether the disk may have lost data of the committed snapshot ``number``, which is refused as parent and mount until
        it is accepted."""
        return number in self.flushing.lost

    def refuse_lost(self, number: int | None = None) -> None:
        """Raise Damaged if ``is_lost`` is true of snapshot ``number``, or (None) of any."""
        self.flushing.refuse_lost(sorted(self.flushing.lost) if number is None else [number])

    @property
    def has_rootfs(self) -> bool:
        """Whether the merged file systems can be mounted here (``mount``); ``features["rootfs"].why`` tells why (not)."""
        return self.rootfs is not None

    async def why_unseen(self, pid: int, target: str) -> str | None:
        """Why process ``pid`` does not get to ``target``, where ``mount`` has mounted something, in words: the process is in
        another mount namespace.  None where it gets there, as far as can be known; so for pid 0, an unknown process."""
        if not pid or is_neighbour(pid):
            return None
        return await trio.to_thread.run_sync(why_unseen, pid, target)

    def statistics(self) -> Statistics:
        """Counts of this root now, and of what was done since it was opened."""
        with self.reading() as reader:
            snapshots, last_id = {kind: reader.count(kind) for kind in Kind}, reader.last_id()
        return Statistics(
            snapshots=snapshots,
            last_id=last_id,
            batches=self.records.batches.copy(),
            mounts_held=self.rootfs.count if self.rootfs is not None else 0,
            trash_waiting=self.layers.waiting,
            lost=len(self.flushing.lost),
        )

    # (here the façade ends)

    def _refuse_closed(self) -> None:
        if self._closed:  # the records may be the caller's, and open
            raise Closed()

    def _reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        self._refuse_closed()
        return self.records.reading(long=long)

    async def _write_record(self, operation: Operation[T], *, frees: bool = False) -> T:
        self._refuse_closed()
        return await self.records.write(operation, frees=frees)

    def _find(self, reader: Reader, key: Ref) -> tuple[int, Record]:
        if isinstance(key, str):
            found = reader.find(key)
            if found is None:
                raise NotFound.snapshot(key)
            return found
        record = reader.record(key)
        if record is None:
            raise NotFound.snapshot(str(key))
        return key, record

    def _find_again(self, reader: Reader, number: int, key: Ref) -> Record:
        """The record of ``number``, which was called ``key`` a moment ago."""
        record = reader.record(number)
        if record is None or (isinstance(key, str) and record.name != key):
            raise NotFound.snapshot(str(key))
        return record

    @asynccontextmanager
    async def _unmounted(self, key: Ref) -> AsyncIterator[tuple[int, bool]]:
        """For a block in which ``key`` must not be mounted as rootfs: its id, and whether it was a moment ago, in which case
        the kernel has said that nobody else has that."""
        with self._reading() as reader:
            try:
                number, _ = self._find(reader, key)
            except Damaged:
                found = reader.id_of(key) if isinstance(key, str) else key
                if found is None:
                    raise
                number = found
        if self.rootfs is None:
            yield number, False
        else:
            async with self.rootfs.unmounted(number) as free:
                yield number, free

    def _refuse_used(self, number: int, record: Record, free: bool) -> None:
        """Raise _InUse if an active snapshot can be written through a mount, or a committed one's files are in one, anywhere.

        ``free``: the kernel has said that no overlay has it.  In the writer, for nobody is to mount it meanwhile.
        """
        if record.kind is Kind.VIEW:
            return
        try:
            if record.kind is Kind.COMMITTED:
                used = self.mounted.is_lower(number) or bool(self.mounted.everywhere(lambda place: place.bound == number))
            else:
                used = self._is_written(number, free)
        except OSError as error:
            raise Unavailable.from_os(f'find out whether snapshot "{record.name}" is in use', error) from error
        if used:
            raise _InUse(record.name)

    def _is_written(self, number: int, free: bool) -> bool:
        """Whether the layer of the active snapshot ``number`` can be written through a mount of whomever.  Raises OSError."""

        def may_show_it(place: Place) -> bool:
            return place.bound == number or (bool(place.upperdir) and place.upper in (None, number))

        found = self.mounted.everywhere(may_show_it)
        if any(place.writable for place in found if place.bound is not None):
            return True
        suspected = any(place.upperdir for place in found)
        if not free and self._in_use.has_overlay(number, suspected=suspected):
            return True
        named = [place for place in found if place.upper == number]  # a second overlay bears no mark
        if not named:
            return False
        return any(self.mounted.is_of(place, number, pid) for pid, place in self.mounted.by_process(may_show_it))

    @asynccontextmanager
    async def _told_by_whom(self, number: int) -> AsyncIterator[None]:
        """Say in words who has snapshot ``number``, which the writer has found in use: finding that out takes longer."""
        try:
            yield
        except _InUse as used:
            words = await trio.to_thread.run_sync(holders.elsewhere, self.mounted, number, self.layers.rootfs(number))
            raise Busy(f'snapshot "{used.name}" {words}') from None

    def _committed(self, reader: Reader, parent: Ref, wrong_kind: type[InvalidArgument | FailedPrecondition]) -> int:
        """The id of ``parent``, which is to get a child."""
        try:
            number, record = self._find(reader, parent)
        except NotFound:
            raise NotFound.parent(str(parent)) from None
        if record.kind is not Kind.COMMITTED:
            raise wrong_kind(f'parent snapshot "{record.name}" is not committed but {record.kind}')
        if self._damaged or self.flushing.lost:
            chain = reader.chain(record)
            self._refuse_damaged(number, *chain)
            self.flushing.refuse_lost([number, *chain])
        return number

    def _refuse_taken(self, reader: Reader, name: str, by: int | None = None) -> None:
        """Raise AlreadyExists if ``name`` is in use, unless by snapshot ``by``."""
        taken = reader.find(name)
        if taken is not None and taken[0] != by:
            raise AlreadyExists.snapshot(name, taken[1].kind)

    def _refuse_too_deep(self, reader: Reader, number: int, record: Record) -> None:
        """Raise TooDeep if snapshot ``number``, which is to become ``record``, could not be mounted."""
        try:
            layers = len(reader.lowers(number, record))
        except Damaged:  # whoever needs the chain will be told
            return
        if layers > mountspec.MOST_LOWERS:
            raise TooDeep(
                f'snapshot "{record.name}" would stand on {layers} layers, more than the kernel can mount together '
                f"({mountspec.MOST_LOWERS}): copy what its rootfs shows (cp -a) into a new snapshot without a parent, and go "
                "on with that"
            )

    def _refuse_damaged(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._damaged:
                self.layers.refuse_damaged(number)
                self._damaged.discard(number)  # it was put back

    def _handed_over(self, reader: Reader, number: int, record: Record) -> list[Mount]:
        """``mounts`` of a snapshot for the door at which it was made.

        containerd 2.2 and later unpacks an image's layers at once where its configuration says ``rebase``: each is prepared
        without a parent, which its Commit names.  What the layer deletes is written down only if the answer is an overlay,
        and containerd makes one of a bind for its own overlayfs alone.  The tree and the library keep the bind, which can
        be mounted.
        """
        return self.mounts_of(reader, number, record, alone=bool(record.origin) and PARENT_CHAIN in record.labels)

    def _refuse_mapped_twice(self, reader: Reader, parent: int, owner: tuple[int, int] | None) -> None:
        """Raise FailedPrecondition if a mount on snapshot ``parent`` would map ids that are the host's already.

        ``owner`` is what the mapping labels make of the container's ids 0.  A containerd that was not told that this
        snapshotter maps ids (the capability ``remap-ids``) does it by itself: it makes a copy of the image with the host's
        ids, commits it and prepares the container on that, with the same labels.  With ``remap_ids`` the mount would map the
        copy's ids once more, and all files would be nobody's.  The top directory tells such a copy from an image.

        Whatever has such a top is refused: what was itself prepared with these labels, too, has the host's ids in its layer.
        Nothing is where the labels do not reach the mount, without ``remap_ids`` or where layers can't be mounted idmapped:
        there such copies are right.  Nor where the container's root is the host's, since that is every image's top.
        """
        if not self._maps_ids or owner is None or owner == (0, 0):
            return
        try:
            top = os.lstat(self.layers.fs(parent))
        except OSError as error:
            raise Unavailable.from_os(f"look at the layer of snapshot {parent}", error) from error
        if (top.st_uid, top.st_gid) == owner:
            record = reader.record(parent)
            raise FailedPrecondition(
                f'snapshot "{record.name if record else parent}" has the host\'s ids already (its top directory belongs to '
                f"{owner[0]}:{owner[1]}), and the mapping labels would map them again: declare "
                'capabilities = ["remap-ids"] for snapfs in the configuration of containerd 2.x, or serve without remap_ids'
            )

    def mounts_of(self, reader: Reader, number: int, record: Record, *, alone: bool = False) -> list[Mount]:
        """``mounts`` of a snapshot whose record is at hand; ``alone`` as in ``mountspec.mounts``."""
        if record.kind is Kind.COMMITTED:
            raise FailedPrecondition(f'snapshot "{record.name}" is committed: mount an active snapshot or a view on it')
        chain = reader.chain(record)
        if self._damaged:
            self._refuse_damaged(number, *chain)
        if self.flushing.lost:
            self.flushing.refuse_lost(chain)
        return mountspec.mounts(
            record.kind,
            self.layers.directory(number),
            [self.layers.directory(parent) for parent in chain],
            options=self.overlay_options,
            remap=record.labels if self._maps_ids else None,
            alone=alone,
        )

    def shown(self, info: Info) -> Info:
        """``info`` as Stat shows it: with the label that is never stored, where that is wanted."""
        if not self.options.upperdir_label:
            return info
        return msgspec.structs.replace(info, labels={**info.labels, UPPERDIR: self.layers.fs(info.id)})

    def _checked_labels(self, labels: Labels | None) -> dict[str, str]:
        """``labels`` as they are stored: without empty ones, and without the one that is never stored."""
        kept = {}
        for label, value in (labels or {}).items():
            check_label(label, value)
            if value and not (self.options.upperdir_label and label == UPPERDIR):
                kept[label] = value
        return kept
