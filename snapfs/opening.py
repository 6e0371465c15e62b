"""Opening a root: what is checked, what is found out about kernel and file system, what is recovered after a crash."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from snapfs.errors import Damaged
from snapfs.kernel import mounting, probe
from snapfs.layers import Layers
from snapfs.metastore import MetaStore
from snapfs.snapshotter import Options, Snapshotter

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
    snapshotter = await trio.to_thread.run_sync(_open, os.fspath(root), options or Options(), metastore)
    async with trio.open_nursery() as nursery:
        try:
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
    layers = Layers.open(root)
    records = metastore
    try:
        if records is None:
            _refuse_lost_records(layers)
            records = MetaStore(f"{layers.root}/metadata.mdb")
        return Snapshotter(
            options,
            layers,
            records,
            owns_records=metastore is None,
            overlay_options=_overlay_options(options.mount_options, layers.snapshots),
            maps_ids=options.remap_ids and mounting.maps_ids(layers.snapshots),
            damaged=_recover(layers, records, retire=not options.async_remove),
        )
    except BaseException:
        if records is not None and metastore is None:
            records.close()
        layers.close()
        raise


def _overlay_options(given: Sequence[str], directory: str) -> tuple[str, ...]:
    """The options of every overlay mount: those given, and what this kernel needs besides."""
    found = list(given)
    keys = {option.partition("=")[0] for option in given}
    if "userxattr" not in keys and probe.needs_userxattr(directory):
        found.append("userxattr")
    if "index" not in keys and probe.knows_index():
        found.append("index=off")
    return tuple(found)


def _recover(layers: Layers, records: MetaStore, *, retire: bool) -> frozenset[int]:
    """Bring records and directories together after whatever happened; the ids of damaged snapshots.

    What no record names goes to the trash if ``retire``.  A record whose directory is missing is reported as damaged, never
    guessed.  Raises Damaged where the records can't be this root's: without the right ones every layer would look abandoned.
    """
    with records.reading() as reader:
        known, last_id = reader.ids(), reader.last_id()
        present = layers.present()
        damaged = frozenset(known - present)
        for number in sorted(damaged):
            record = reader.record(number)
            name = record.name if record else "?"
            log.error('snapshot "%s" is damaged: its directory %s is missing', name, layers.directory(number))
    unknown = present - known
    for number in unknown:
        if number > last_id and not layers.is_empty(number):  # no Prepare that was cut short leaves that
            raise Damaged(
                f"{layers.directory(number)} holds files, but no such snapshot was ever recorded in {records.path}: "
                "put back the records that belong to this root, or move that directory away"
            )
    if retire:
        for number in unknown:
            layers.retire(number)
    return damaged


def _refuse_lost_records(layers: Layers) -> None:
    """Without records every layer would look abandoned and be deleted; better to stop."""
    if layers.present() and not os.path.exists(f"{layers.root}/metadata.mdb"):
        raise Damaged(
            f"{layers.snapshots} holds layers but {layers.root}/metadata.mdb is missing: "
            "put the records back from a backup, or move the layers away"
        )
