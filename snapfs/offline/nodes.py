"""Nodes: each snapshot has a number of its own in the tree's inodes (``Record.node``), and each name in images/ a number and a
snapshot of its own; where two have one they are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

from snapfs.model import Kind
from snapfs.store.schema import ImageName, Record


def told_apart(records: Mapping[int, Record]) -> dict[int, int]:
    """The ids of the snapshots of ``records`` that must have another number, each with one that no other has: 0 for its id.

    Of two with the same number the one that was changed last keeps it."""
    by_change = sorted(records.items(), key=lambda item: (item[1].updated, item[0]), reverse=True)
    keepers: dict[int, int] = {}
    for number, record in by_change:
        keepers.setdefault(record.node_of(number), number)
    others = [number for number, record in by_change if keepers[record.node_of(number)] != number]
    free = set(records) - set(keepers)
    result = {number: 0 for number in others if number in free}
    rest = iter(sorted(free.difference(result)))
    return result | {number: next(rest) for number in others if number not in result}


def names_told_apart(records: Mapping[int, Record], last_id: int) -> dict[int, tuple[ImageName, ...]]:
    """The ids of the snapshots of ``records`` that must have other names in images/, each with those that it is to have.

    Of two of one name that which was given later, by its number, keeps it; one whose number is another's, too, gets a new one,
    above ``last_id``.  What is not committed has none."""
    claims = [(image.number, number, image.name) for number, record in records.items() for image in record.images]
    fresh = count(max([last_id, *records, *(nth for nth, _, _ in claims)], default=last_id) + 1)
    used = set(records) | {record.node for record in records.values()}
    taken: set[str] = set()
    kept: dict[int, list[ImageName]] = {number: [] for _, number, _ in claims}
    for nth, number, name in sorted(claims, reverse=True):
        if name not in taken and records[number].kind is Kind.COMMITTED:
            taken.add(name)
            own = nth if nth not in used else next(fresh)
            used.add(own)
            kept[number].insert(0, ImageName(own, name))
    return {number: tuple(images) for number, images in kept.items() if tuple(images) != records[number].images}
