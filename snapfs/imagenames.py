"""Names in images/: how many a snapshot may have, and the refusals that tell of them."""

from __future__ import annotations

from collections.abc import Sequence

from snapfs import names
from snapfs.errors import AlreadyExists, Named, NotFound

MOST = 256
"""Names that one snapshot may have: all of them are in its record, which every request about it reads."""

_TOLD = 100  # characters of a name that a refusal tells


def named(name: str, images: Sequence[str]) -> Named:
    """The refusal to remove snapshot ``name``, which is called ``images`` in images/."""
    first, more = images[0], f" and {len(images) - 1} more" if len(images) > 1 else ""
    how = f"snapfs rm --image {names.last_word(first)}" if len(first) <= _TOLD else "rm in images/"
    shown = names.printable(first if len(first) <= _TOLD else f"{first[:_TOLD]}…")
    return Named(f'snapshot "{name}" is called "{shown}"{more} in images/, which keeps it: take the name away first ({how})')


def missing(image: str) -> NotFound:
    """The refusal of a name that is not in images/."""
    return NotFound(f'nothing is called "{names.printable(image)}" in images/')


def taken(image: str, by: str) -> AlreadyExists:
    """The refusal to give a name that snapshot ``by`` has."""
    return AlreadyExists(f'snapshot "{by}" is already called "{names.printable(image)}" in images/')
