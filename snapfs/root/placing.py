"""Placing: the directories of new snapshots on their way to the disk, without a flush of their own.

A Prepare renames a directory of the pool to ROOT/snapshots/<id>, and a rename is on disk only when its file system's journal
is: a flush more for each batch, as dear as all others together.  But the directories of the pool are on disk before a Prepare
gets one.  So the record's transaction also says which directory it was, and after a power cut, which may take the rename back,
the next start renames it again, and does all that was done to the directory besides: that follows from the record.  When the
pool is filled the journal is flushed in any case, and with it everything that was placed before.

Where the pool was empty a directory is made on the spot, and flushed with its batch.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress

from snapfs import idmap
from snapfs.errors import Damaged
from snapfs.model import Kind
from snapfs.root.imprint import Imprint
from snapfs.root.layers import FsTemplate, Layers
from snapfs.scan.marks import PREFIX, is_shown_by_overlay, list_xattrs
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import Record
from snapfs.store.writing import Writer

log = logging.getLogger(__name__)

_ACLS = ("system.posix_acl_access", "system.posix_acl_default")

COUNT, TOGETHER = 64, 64 << 10
"""How many attributes ``user.`` a new snapshot gets from its parent, and how many bytes these may have together: a layer may
have thousands of 64 KiB, and while they are copied no other record is written."""


class Placing:
    """Puts directories of the pool in their places, within write operations.  ``fd`` is open on ROOT/snapshots; the overlays'
    own attributes begin with ``prefix`` (``scan/marks.py``)."""

    def __init__(self, layers: Layers, fd: int, prefix: str = PREFIX) -> None:
        self._layers = layers
        self._prefix = prefix
        self._fd = fd
        self._cleared = 0

    def place(self, writer: Writer, number: int, record: Record) -> None:
        """Put the directory of the new snapshot ``number``, whose record will be ``record``, in its place.

        When the batch is durable the directory is on disk, too, or the next start puts it in its place (``finish``).  Raises
        OSError, having left nothing.
        """
        layers, flushed = self._layers, self._layers.pool.flushed_up_to
        name = layers.place(number, record.kind, fs_template(layers, record, self._prefix))
        writer.on_failure(lambda: layers.undo_place(number))
        if name is None:
            writer.sync_directory(self._fd)
        else:
            writer.mark_placed(number, name)
        if flushed > self._cleared:
            writer.clear_placed(flushed)
            writer.when_durable(lambda: self._note(flushed))

    def place_made(self, writer: Writer, number: int, name: str) -> None:
        """Put a directory that is filled (``Layers.make_ahead``) in its place, as snapshot ``number``.  When the batch is
        durable it is there on disk; what is in it, when its files are flushed.  Raises OSError."""
        self._layers.place_made(number, name)
        writer.on_failure(lambda: self._layers.undo_place_made(number, name))
        writer.sync_directory(self._fd)

    def _note(self, flushed: int) -> None:
        self._cleared = max(flushed, self._cleared)


def fs_template(layers: Layers, record: Record, prefix: str) -> FsTemplate:
    """What ``fs`` of a new snapshot with this record is to be like: as its parent's, so that the empty layer changes nothing.

    Labels that map ids ask for another owner, and snapshots of containerd's have the mode that containerd gives them.  Raises
    OSError.
    """
    owner = idmap.root_owner(record.labels)
    if not record.parent:
        return FsTemplate(owner)
    below = layers.fs(record.parent)
    found = os.lstat(below)
    owner = owner or (found.st_uid, found.st_gid)
    if record.origin:
        return FsTemplate(owner)
    own = _of_users(below, prefix)
    if own is None and record.parent not in layers.not_inherited:
        layers.not_inherited.add(record.parent)
        log.warning(
            "the top directory of snapshot %d has more than %d attributes user., or more than %d bytes in them: new snapshots"
            " on it get none of these",
            record.parent,
            COUNT,
            TOGETHER,
        )
    acls = ((name, _value(below, name)) for name in _ACLS)
    attributes = [*(own or ()), *((name, value) for name, value in acls if value is not None)]
    return FsTemplate(owner, stat.S_IMODE(found.st_mode), attributes)


def _of_users(directory: str, prefix: str) -> list[tuple[str, bytes]] | None:
    """The attributes ``user.`` of ``directory`` that an overlay shows; None where they are too many or too large.  Raises
    OSError."""
    try:
        listed = list_xattrs(directory)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return None
    names = [name for name in listed if name.startswith("user.") and is_shown_by_overlay(name, prefix)]
    if len(names) > COUNT:
        return None
    found: list[tuple[str, bytes]] = []
    size = 0
    for name in names:
        value = os.getxattr(directory, name)
        size += len(value)
        if size > TOGETHER:
            return None
        found.append((name, value))
    return found


def _value(directory: str, name: str) -> bytes | None:
    """The value of the attribute ``name`` of ``directory``; None where it has none.  Raises OSError."""
    try:
        return os.getxattr(directory, name)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
        return None


def finish(layers: Layers, records: MetaStore, prefix: str = PREFIX) -> set[int]:
    """Put the directories in their places that a power cut has put back into the pool; the ids of their snapshots.

    Called at a start, before the pool is emptied.  Raises OSError.
    """
    with records.reading() as reader:
        placed = reader.placed()
        found: list[tuple[int, str, Imprint]] = []
        for number, name in placed:
            with suppress(Damaged):
                record = reader.record(number)
                if record is not None and not os.path.lexists(layers.directory(number)) and layers.pool.has(name):
                    found.append((number, name, Imprint(record, reader.unflushed_since(number))))
    if not found:
        return set()
    for number, name, imprint in found:
        kind = Kind.VIEW if imprint.record.kind is Kind.VIEW else Kind.ACTIVE
        template = FsTemplate()
        with suppress(FileNotFoundError):  # the parent's layer is missing: calls that need it raise Damaged
            template = fs_template(layers, imprint.record, prefix)
        layers.place(number, kind, template, name)
        layers.write_imprint(number, imprint)
    log.info("%d directories were put in place that a power cut had put back", len(found))
    layers.pool.sync()
    records.write_now(lambda writer: writer.clear_placed(placed[-1][0]), frees=True)
    return {number for number, _, _ in found}
