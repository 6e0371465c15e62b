"""The load test in short, and that it notices what is wrong.  ``make soak`` is the long one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import die_with_parent
from tests.soak.watch import A_CALL, MOST, Sample, trends


def soak(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--place", str(place), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )


@pytest.mark.mounts
def test_many_clients_do_everything_at_once(tmp_path: Path) -> None:
    with soak(tmp_path, "--seconds=6", "--clients=16", "--seed=1") as running:
        told = running.communicate(timeout=180)[0]
    assert running.returncode == 0, told
    assert told.endswith("\nall was well\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.mounts
def test_it_notices_what_somebody_else_does(tmp_path: Path) -> None:
    """A label that no client has written, in the snapshots of one: its model and the history of that name tell."""
    with soak(tmp_path, "--seconds=20", "--clients=2", "--seed=1") as running:
        meddle = 0
        while running.poll() is None and not meddle:
            for tree in Path(f"/proc/{running.pid}/root").joinpath(*tmp_path.parts[1:]).glob("soak-*/mnt/*/p0.*/labels"):
                try:
                    (tree / "meddled").write_text("somebody else\n")
                    meddle += 1
                except OSError:
                    continue  # renamed or removed since it was listed
        told = running.communicate(timeout=60)[0]
    assert meddle
    assert running.returncode == 1, told
    assert "what is known of p0." in told


# -- the rule that says what is flat


CALLS = 1_800_000


def judged(value: Callable[[float], float], *, calls: int = CALLS) -> bool:
    """Whether a heap is flat if ``value`` of the share of the time that has passed, and some noise, is what samples say."""
    noise = random.Random(1)
    times = [1000.0 + n for n in range(600)]
    samples = [Sample(when, {"heap KiB": round(value((when - 1000) / 600) + noise.gauss(0, 150))}) for when in times]
    [trend] = trends(samples, 1000.0, 1600.0, calls)
    return trend.is_flat


def caches(passed: float) -> float:
    """KiB of a daemon whose caches are full after a third of the time."""
    return 6_000 + 3_000 * min(1.0, passed * 3)


def test_caches_that_fill_up_are_flat_once_they_are_full() -> None:
    assert judged(caches)


def test_a_byte_a_call_is_a_leak() -> None:
    assert not judged(lambda passed: caches(passed) + passed * CALLS / 1024)


def test_peaks_are_none() -> None:
    assert judged(lambda passed: caches(passed) + (5_000 if passed * 600 % 40 < 1 and passed > 0.7 else 0))


def test_a_peak_that_is_too_high_is_none_either_but_is_too_much() -> None:
    assert not judged(lambda passed: caches(passed) + (8_000 if passed == 0.5 else 0))


def test_caches_that_are_not_full_at_half_time_are_no_excuse() -> None:
    assert not judged(lambda passed: 6_000 + 3_000 * passed)


def test_a_short_run_is_not_blamed_for_warming_up_but_for_what_it_takes() -> None:
    assert judged(lambda passed: 6_000 + 3_000 * passed, calls=100_000)
    assert not judged(lambda passed: 6_000 + 11_000 * passed, calls=100_000)


@pytest.mark.parametrize("name", A_CALL)
def test_whatever_goes_on_growing_is_found(name: str) -> None:
    times = [float(n) for n in range(0, 600, 10)]
    for leak, is_flat in ((0.0, True), (2.0, False)):
        grown = leak * A_CALL[name] * CALLS
        samples = [Sample(when, {name: round(MOST[name] / 2 + grown * when / 600)}) for when in times]
        assert [trend.is_flat for trend in trends(samples, 0.0, 600.0, CALLS)] == [is_flat]
