"""Which lines two texts have in common, in order: a patient comparison, of which the time is bounded.

Equal lines at the begin and the end are taken first.  Lines that both texts have once are anchors: the longest run of them that
is in the same order in both.  Between anchors it begins again, for what is there twice in a text may be there once in between.
Where there are no anchors, the few lines that are left are compared by ``difflib``; where they are many, line by line if they
are as many in both, and else not at all: nothing takes quadratic time, as finding the fewest changes would.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import pairwise

Run = tuple[int, int, int]
"""Where equal lines begin in the old and in the new text, and how many they are."""

DEPTH = 12  # times that it begins again between anchors: each takes as long as the texts are
SMALL = 4096  # pairs of lines that ``difflib`` compares at once; it may take some times as many steps
PAIRS = 64 * SMALL  # in one pair of texts

_Gap = tuple[int, int, int, int]


def runs(old: Sequence[int], new: Sequence[int]) -> Iterator[Run]:
    """The runs of lines that both texts have, in order; lines are numbers, the same for equal ones.  Two runs may touch."""
    left = PAIRS
    # What is still to be compared: parts of a gap, in order, and how often it may begin again in each
    pending: list[tuple[Iterator[_Gap], int]] = [(iter([(0, len(old), 0, len(new))]), DEPTH)]
    while pending:
        gaps, depth = pending[-1]
        gap = next(gaps, None)
        if gap is None:
            pending.pop()
            continue
        i, i_end, j, j_end = gap
        begin = i
        while i < i_end and j < j_end and old[i] == new[j]:
            i += 1
            j += 1
        if i > begin:
            yield begin, j - (i - begin), i - begin
        end = i_end
        while i < i_end and j < j_end and old[i_end - 1] == new[j_end - 1]:
            i_end -= 1
            j_end -= 1
        gap = i, i_end, j, j_end
        parts: Iterator[_Gap] = iter(())
        if i < i_end and j < j_end:
            pairs = (i_end - i) * (j_end - j)
            anchors = _anchors(old, new, gap) if depth else []
            if anchors:
                parts = _between(anchors, gap)
            elif pairs <= min(SMALL, left):
                left -= pairs
                blocks = SequenceMatcher(None, old[i:i_end], new[j:j_end], autojunk=False).get_matching_blocks()
                parts = iter([(i + a, i + a + size, j + b, j + b + size) for a, b, size in blocks if size])
            elif i_end - i == j_end - j:
                parts = _side_by_side(old, new, gap)
        if end > i_end:
            pending.append((iter([(i_end, end, j_end, j_end + end - i_end)]), 0))
        pending.append((parts, max(depth - 1, 0)))


def _anchors(old: Sequence[int], new: Sequence[int], gap: _Gap) -> list[tuple[int, int]]:
    """Where lines are that both texts have once in this gap: the most that are in the same order in both.  Of some that follow
    each other without anything between, the first."""
    i, i_end, j, j_end = gap
    theirs = _once(new, j, j_end)
    found = [(place, theirs[line]) for line, place in _once(old, i, i_end).items() if line in theirs]
    ends: list[int] = []  # where in the new text the best run of each length ends
    last: list[int] = []  # of these runs the last anchor, by its number
    before: list[int] = []  # of each anchor the one before it, in the best run that ends there
    for number, (_, place) in enumerate(found):
        length = bisect_left(ends, place)
        before.append(last[length - 1] if length else -1)
        ends[length : length + 1] = [place]
        last[length : length + 1] = [number]
    chosen: list[tuple[int, int]] = []
    number = last[-1] if last else -1
    while number >= 0:
        place, their_place = found[number]
        if chosen and chosen[-1] == (place + 1, their_place + 1):
            chosen.pop()
        chosen.append((place, their_place))
        number = before[number]
    return chosen[::-1]


def _once(lines: Sequence[int], begin: int, end: int) -> dict[int, int]:
    """Where lines are that are there once, in order."""
    places: dict[int, int] = {}
    for place in range(begin, end):
        places[lines[place]] = -1 if lines[place] in places else place
    return {line: place for line, place in places.items() if place >= 0}


def _between(anchors: Sequence[tuple[int, int]], gap: _Gap) -> Iterator[_Gap]:
    """The parts of a gap, each of which, but for the first, begins with an anchor."""
    i, i_end, j, j_end = gap
    for (a, b), (a_end, b_end) in pairwise([(i, j), *anchors, (i_end, j_end)]):
        yield a, a_end, b, b_end


def _side_by_side(old: Sequence[int], new: Sequence[int], gap: _Gap) -> Iterator[_Gap]:
    """The parts of a gap, as long in both texts, that are equal line by line."""
    i, i_end, j, _ = gap
    for a, b in zip(range(i, i_end), itertools.count(j), strict=False):
        if old[a] == new[b]:
            yield a, a + 1, b, b + 1
