"""What snapshots have of those that they stand on: chain ids, and whether there is an ``image.json``.

A chain has up to 500 layers, and whoever may read the tree may ask again and again.  So what was found is remembered, of all
that stand in the chain, until a snapshot becomes another.  All functions are for the loop, where no change comes between a look
at the records and what is remembered of it.
"""

from __future__ import annotations

from typing import TypeVar

from snapfs.imagejson import chain_id
from snapfs.model import Change
from snapfs.rules import digest
from snapfs.store.reading import Reader
from snapfs.store.schema import Record

T = TypeVar("T")

REMEMBERED = 20_000  # snapshots


class Descent:
    """Asks ``Reader``, and remembers.  ``note`` must be told of all changes."""

    def __init__(self) -> None:
        self._chain_ids: dict[int, str | None] = {}
        self._have_image: dict[int, bool] = {}

    def note(self, change: Change) -> None:
        """A snapshot was made, has become another, or is gone; what is remembered of others is good unless one has become
        another, which others may stand on."""
        if change.before is not None and change.after is not None:
            self._chain_ids.clear()
            self._have_image.clear()

    def chain_id(self, reader: Reader, number: int, record: Record) -> str | None:
        """``imagejson.chain_id`` of the committed snapshot ``number``; None where a diff id is not known.  Raises Damaged."""
        known = self._chain_ids
        way: list[tuple[int, Record]] = []
        while number not in known and record.diff_id and len(way) < digest.DEEPEST:
            way.append((number, record))
            if not record.parent:
                break
            number, record = record.parent, reader.parent_of(record)
        below = "" if way and not way[-1][1].parent else known.get(number)
        for above, its in reversed(way):
            below = chain_id(below, digest.shown(its.diff_id)) if below is not None else None
            _remember(known, above, below)
        return below

    def has_image(self, reader: Reader, record: Record) -> bool:
        """Whether a snapshot, or one that it stands on, has come from an image.  Raises Damaged."""
        known = self._have_image
        way: list[int] = []
        while record.image is None and record.parent and record.parent not in known and len(way) < digest.DEEPEST:
            way.append(record.parent)
            record = reader.parent_of(record)
        has = record.image is not None or known.get(record.parent, False)
        for each in way:
            _remember(known, each, has)
        return has


def _remember(known: dict[int, T], number: int, value: T) -> None:
    if len(known) >= REMEMBERED:
        known.clear()
    known[number] = value
