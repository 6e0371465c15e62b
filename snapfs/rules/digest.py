"""Digests: by which names registries know a layer, and a stack of layers (OCI image-spec, ``config.md``: DiffID, ChainID)."""

from __future__ import annotations

import msgspec

from snapfs.model import Kind
from snapfs.rules.change import rewrite
from snapfs.rules.root import Root
from snapfs.store.schema import Record
from snapfs.store.writing import Writer

DEEPEST = 1000  # layers; there can't be as many, but where the records go round in a circle


def diff_id(record: Record) -> str | None:
    """The SHA-256 of the layer as a tar, ``sha256:`` and 64 digits; None where it is not known."""
    return shown(record.diff_id) if record.diff_id else None


def shown(digest: bytes) -> str:
    """``digest`` as OCI writes it."""
    return f"sha256:{digest.hex()}"


def note(root: Root, writer: Writer, number: int, digest: bytes, size: int) -> None:
    """Note that the layer of the committed snapshot ``number`` is a tar of ``size`` bytes with this SHA-256, unless it is gone.
    Raises OSError."""
    record = writer.record(number)
    if record is None or record.kind is not Kind.COMMITTED or number in root.unflushed.lost:
        return
    rewrite(root, writer, number, record, msgspec.structs.replace(record, diff_id=digest, tar_size=size))
    info = writer.info(number, record)
    writer.changed(info, info, counted=True)


def forgotten(record: Record) -> Record:
    """``record`` of a snapshot whose layer may be another one than its diff id tells of."""
    return msgspec.structs.replace(record, diff_id=b"", tar_size=0)
