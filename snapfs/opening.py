"""Opening a root: what is checked, what is found out about kernel and file system, what is recovered after a crash."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress

import trio

from snapfs.errors import Damaged, Unavailable
from snapfs.kernel import mounting, probe
from snapfs.kernel.inuse import UpperLayers
from snapfs.kernel.overlay import MountApiLacking, make_overlay
from snapfs.names import word
from snapfs.options import Feature, Options
from snapfs.root import identity, imprint, placing
from snapfs.root.inuse import InUse
from snapfs.root.layers import Layers
from snapfs.root.merged import Merged
from snapfs.root.mounted import Mounted
from snapfs.root.placing import Placing
from snapfs.root.unflushed import Unflushed
from snapfs.rules.mounts import is_rightly_mounted
from snapfs.rules.root import Root, overlay_prefix
from snapfs.services.rootfs import Rootfs
from snapfs.snapshotter import Snapshotter
from snapfs.store.metastore import MetaStore
from snapfs.threads import in_thread

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_snapshotter(
    root: str | os.PathLike[str], options: Options | None = None, *, metastore: MetaStore | None = None
) -> AsyncIterator[Snapshotter]:
    """Open ``root`` (made where missing) for this process; on leaving the block everything is closed.

    ``metastore`` puts the records elsewhere than ROOT/metadata.mdb: a store that the caller opened and closes.

    Raises Unavailable where the root can't be used (a sentence that says why and what to do), Damaged where what is on disk
    contradicts itself.
    """
    failure: BaseException | None = None
    snapshotter = await in_thread(_open, os.fspath(root), options or Options(), metastore)
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(snapshotter.run_writer, name="snapfs writer")
            await nursery.start(snapshotter.run_background, name="snapfs background")
            yield snapshotter
        except trio.Cancelled:
            raise
        except BaseException as error:  # kept out of the nursery, which would wrap it in a group
            failure = error
        finally:
            await snapshotter.close()
    if failure is not None:
        raise failure


def _open(root: str, options: Options, metastore: MetaStore | None) -> Snapshotter:
    with ExitStack() as opened:
        try:
            snapshotter = _opened(root, options, metastore, opened)
        except OSError as error:  # no descriptors left, say
            raise Unavailable.from_os(f"use {root} as root", error) from error
        opened.pop_all()  # closing it is the snapshotter's from here on
    return snapshotter


def _opened(root: str, options: Options, metastore: MetaStore | None, opened: ExitStack) -> Snapshotter:
    layers = Layers.begin(root)
    opened.callback(layers.unmake)
    layers.pool.syncs = options.flushes
    present = layers.existing_ids()
    records = metastore
    if records is None:
        _refuse_lost_records(layers, present)
        records = MetaStore(layers.records, sync=options.flushes)  # refuses those of others before it writes
        opened.callback(records.close)
    with records.reading() as reader:
        known, last_id = reader.ids(), reader.last_id()
    identity.refuse_foreign(layers, records)
    _refuse_unrecorded(layers, records, present - known, last_id)
    layers.make_ready()
    identity.note(layers, records)
    fd = os.open(layers.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    mounted = Mounted(layers.snapshots)
    opened.callback(mounted.close)
    features = {"imprints": _imprints(layers)}
    overlay_options = _overlay_options(options.mount_options, layers.snapshots, features)
    in_use = InUse(layers, _upper_layers(layers, overlay_options, features))
    opened.callback(in_use.close)
    state = Root(
        options=options,
        layers=layers,
        fd=fd,
        placing=Placing(layers, fd, overlay_prefix(overlay_options)),
        mounted=mounted,
        in_use=in_use,
        unflushed=Unflushed(layers, records, marks=options.flushes),
        overlay_options=overlay_options,
        maps_ids=_maps_ids(options, layers.snapshots, features),
        damaged=set(),
        agrees=True,
    )
    rootfs = _rootfs(state, records, features)
    present |= placing.finish(layers, records, state.overlay_prefix)
    layers.clear_pool()
    _put_away(layers, present - known, last_id, to_trash=not options.async_remove)
    _tell_damaged(layers, records, known - present)
    state.damaged |= known - present
    return Snapshotter(state, records, owns_records=metastore is None, rootfs=rootfs, features=features)


def _overlay_options(given: Sequence[str], directory: str, features: dict[str, Feature]) -> tuple[str, ...]:
    """The options of every overlay mount: those given, and what this kernel needs besides."""
    found = list(given)
    keys = _keys(given)
    has_marks = imprint.has_userxattr(directory)
    if "userxattr" in keys:
        features["userxattr"] = Feature(True, "a mount option asks for it")
    elif probe.needs_userxattr(directory):
        found.append("userxattr")
        features["userxattr"] = Feature(True, "this user namespace can't write overlayfs's own extended attributes")
    elif has_marks:  # or what was replaced in these layers would come back
        found.append("userxattr")
        features["userxattr"] = Feature(True, "a daemon in a user namespace has served this root: its layers have such marks")
    elif probe.in_user_namespace():
        features["userxattr"] = Feature(
            False, "overlayfs can't write users' extended attributes here, either (a kernel before 5.11, tmpfs before 6.6 …)"
        )
    else:
        features["userxattr"] = Feature(False, "not needed outside of user namespaces")
    if features["userxattr"].on and not has_marks:
        with suppress(OSError):
            imprint.note_userxattr(directory)
    if "index" in keys:
        features["index=off"] = Feature(False, "a mount option says otherwise")
    elif probe.overlay_knows("index"):
        found.append("index=off")
        features["index=off"] = Feature(True, "so that layers can be copied and shared")
    else:
        features["index=off"] = Feature(False, "this kernel's overlayfs has no index")
    return tuple(found)


def _upper_layers(layers: Layers, options: Sequence[str], features: dict[str, Feature]) -> UpperLayers:
    """What asks the kernel whether a layer is in use, having been tried here."""
    try:
        trial = layers.make_trial()
    except OSError:  # a full disk, or no descriptors left: the one that most kernels have
        trial = ""
    own = [option for option in options if option.partition("=")[0] in ("userxattr", "index")] + ["volatile"]

    def mounted() -> int:
        shutil.rmtree(f"{trial}/work/work", ignore_errors=True)  # else the kernel refuses what was volatile before
        try:
            return make_overlay([f"{trial}/lower"], f"{trial}/fs", f"{trial}/work", own, read_only=False)
        except MountApiLacking:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None

    try:
        uppers = UpperLayers.choose(f"{trial}/fs", mounted)
    finally:
        if trial:
            shutil.rmtree(trial, ignore_errors=True)
    if uppers.works:
        features["in_use"] = Feature(True, "the kernel says whether a layer is mounted, wherever it is")
    else:
        features["in_use"] = Feature(
            False, "the kernel can't be asked here: what is mounted is known by the mount tables alone"
        )
    return uppers


def _imprints(layers: Layers) -> Feature:
    if layers.supports_imprints:
        return Feature(True, "directories can bear extended attributes here")
    return Feature(False, "directories can't bear extended attributes here; without the records, nobody knows what they were")


def _keys(options: Sequence[str]) -> set[str]:
    return {option.partition("=")[0] for option in options}


def _maps_ids(options: Options, directory: str, features: dict[str, Feature]) -> bool:
    """Whether mapping labels become options of the mounts."""
    if not options.remap_ids:
        features["remap_ids"] = Feature(False, "not asked for")
    elif mounting.maps_ids(directory):
        features["remap_ids"] = Feature(True, "layers can be mounted idmapped here")
    else:
        features["remap_ids"] = Feature(False, "layers can't be mounted idmapped here (kernel, file system or privileges)")
    return features["remap_ids"].on


def _rootfs(root: Root, records: MetaStore, features: dict[str, Feature]) -> Rootfs | None:
    """The service that mounts the merged file systems, None where that is not wanted or not permitted; what a crashed daemon
    left mounted is taken over or cleared."""
    own = [option for option in root.overlay_options if option != "volatile"]  # with it nothing can be mounted a second time
    keys = _keys(own)
    if not keys & {"userxattr", "redirect_dir", "metacopy"}:  # whatever this kernel's defaults: a layer is to be whole
        own += [f"{key}=off" for key in ("redirect_dir", "metacopy") if probe.overlay_knows(key)]
    options = root.options
    merged = Merged(root.layers, root.mounted, root.in_use, own, flushes=root.options.flushes)
    rootfs = Rootfs(merged, root.layers, root.mounted, root.in_use, idle=options.rootfs_idle, most=options.rootfs_max)
    refusal = merged.trial() if options.rootfs else options.why_no_rootfs

    def is_right(number: int) -> bool:
        if refusal:
            return False
        with suppress(Damaged), records.reading() as reader:
            return is_rightly_mounted(root, reader, number)
        return False

    rootfs.recover(is_right)
    features["rootfs"] = Feature(not refusal, refusal or "mounting overlays is permitted here")
    if refusal:
        rootfs.close()
        return None
    return rootfs


def _put_away(layers: Layers, unknown: set[int], last_id: int, *, to_trash: bool) -> None:
    """Put away the directories that no record names: into the trash if ``to_trash``, and in any case what a Prepare that was
    cut short has left."""
    for number in unknown:
        if number > last_id:
            layers.undo_place(number)
        elif to_trash:
            layers.move_to_trash(number)
        else:
            layers.leave_for_cleanup(number)


def _tell_damaged(layers: Layers, records: MetaStore, damaged: set[int]) -> None:
    """Log which snapshots have lost their directory, or have something else there: reported, never guessed."""
    with records.reading() as reader:
        for number in sorted(damaged):
            try:
                record = reader.record(number)
            except Damaged:
                record = None
            name = record.name if record else "?"
            wrong = "is not a directory" if os.path.lexists(layers.directory(number)) else "is missing"
            log.error('snapshot "%s" is damaged: its directory %s %s', name, layers.directory(number), wrong)


def _refuse_unrecorded(layers: Layers, records: MetaStore, unknown: set[int], last_id: int) -> None:
    """Raise Damaged where the records can't be this root's, as directories that they don't name show: without the right ones
    every layer would look abandoned."""
    for number in unknown:
        if number > last_id and not layers.is_empty(number):  # no Prepare that was cut short leaves that
            raise Damaged(
                f"{layers.directory(number)} holds files, but no such snapshot was ever recorded in {records.path}: "
                "put back the records that belong to this root, or have them made anew: "
                f"snapfs check {word(layers.root)} --rebuild"
            )


def _refuse_lost_records(layers: Layers, present: set[int]) -> None:
    """Without records every layer would look abandoned and be deleted; better to stop."""
    path = layers.records
    if present and not (os.path.exists(path) and os.path.getsize(path)):
        raise Damaged(
            f"{layers.snapshots} holds layers but {path} is missing or empty: "
            f"put the records back from a backup, or have them made anew: snapfs check {word(layers.root)} --rebuild"
        )
