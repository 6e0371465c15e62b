"""Nodes: each snapshot has a number of its own in the tree's inodes (``Record.node``); where two have one they are told
apart."""

from __future__ import annotations

from collections.abc import Mapping

from snapfs.store.schema import Record


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
