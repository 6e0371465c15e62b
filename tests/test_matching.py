"""Which lines two texts have in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.scan import matching
from snapfs.scan.matching import DEPTH, PAIRS, SMALL, runs

MANY = 20_000

texts = st.lists(st.integers(0, 9), max_size=40)


def in_common(old: Sequence[int], new: Sequence[int]) -> int:
    """How many lines the runs have, which are looked at."""
    i_end, j_end, count = 0, 0, 0
    for i, j, size in runs(old, new):
        assert i >= i_end
        assert j >= j_end
        assert size > 0
        assert old[i : i + size] == new[j : j + size]
        i_end, j_end, count = i + size, j + size, count + size
    assert i_end <= len(old)
    assert j_end <= len(new)
    return count


@given(texts, texts)
def test_runs_are_in_both_in_order(old: list[int], new: list[int]) -> None:
    in_common(old, new)


@given(texts, st.sets(st.integers(0, 40)))
def test_what_was_taken_out_is_all_that_differs(text: list[int], out: set[int]) -> None:
    """Of lines that are there once each; of others, what is the same is found so far as it is at the ends."""
    numbered = list(range(len(text)))
    rest = [number for number in numbered if number not in out]
    assert in_common(numbered, rest) == in_common(rest, numbered) == len(rest)
    assert in_common(text, text) == len(text)


def test_lines_that_moved() -> None:
    assert in_common([1, 2, 3, 4, 5], [4, 5, 1, 2, 3]) == 3
    assert in_common([*range(100)], [*range(99, -1, -1)]) == 1


def test_it_begins_again_between_anchors() -> None:
    """0 is there three times, but once between two that are there once."""
    assert in_common([1, 0, 50, 2, 0, 3, 0], [1, 2, 60, 0, 3, 0]) == 5


class Counted(list[int]):
    """Lines that count how often they are looked at."""

    looks = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.looks += len(found) if isinstance(place, slice) else 1
        return found


def deep() -> tuple[list[int], list[int]]:
    """An anchor that makes another one of a line in what is left, and so on."""
    each = range(MANY // 3)
    return [x for n in each for x in (n + 1, n, MANY + n)], [x for n in each for x in (n + 1, n, 2 * MANY + n)]


def some(letters: int, seed: int, count: int = MANY) -> list[int]:
    return random.Random(seed).choices(range(letters), k=count)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([0] * MANY, [0] * (MANY - 7)),
        ([1, *[0] * MANY, 1], [2, *[0] * (MANY - 7), 2]),
        (some(2, 1), some(2, 2)),
        (some(2, 1), some(2, 2, MANY - 1)),
        (some(94, 1), some(94, 2)),
        (some(MANY, 1), some(MANY, 2)),
        ([*range(MANY)], [*range(MANY, 0, -1)]),
        deep(),
        (
            [x for n in range(MANY // 61) for x in (n + 9, *some(2, n, 60))],
            [x for n in range(MANY // 61) for x in (n + 9, *some(2, -n, 60))],
        ),
    ],
)
def test_no_text_takes_quadratic_time(old: list[int], new: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []

    def counting(junk: None, old: list[int], new: list[int], autojunk: bool) -> SequenceMatcher[int]:
        pairs.append(len(old) * len(new))
        return SequenceMatcher(junk, old, new, autojunk)

    monkeypatch.setattr(matching, "SequenceMatcher", counting)
    before, after = Counted(old), Counted(new)
    for _ in runs(before, after):
        pass
    assert before.looks + after.looks < 8 * DEPTH * (len(old) + len(new))
    assert max(pairs, default=0) <= SMALL
    assert sum(pairs) <= PAIRS


def test_a_text_of_few_letters_in_which_two_lines_were_changed() -> None:
    old = [0] * MANY
    new = [*old]
    new[100] = new[-100] = 1
    assert in_common(old, new) == MANY - 2
