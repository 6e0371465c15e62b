"""The daemon killed at points spread over everything it does; ``make crash`` kills at each of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.crash import Arena, arena
from tests.syscalls import Call
from tests.workloads import CLIENTS, WORKLOADS, named

pytestmark = [pytest.mark.mounts, pytest.mark.durable]

STRIDE = 10
"""Of so many points one is tried; each workload begins at another, so that together they meet what they share everywhere."""

KILLS = 200
"""At least, in all of them together."""


@pytest.fixture(scope="module")
def place() -> Iterator[Arena]:
    with arena() as made:
        yield made


@pytest.mark.parametrize("name", [workload.name for workload in WORKLOADS])
def test_nothing_is_lost_through_the_library(place: Arena, name: str) -> None:
    place.tally.lost.clear()
    first = 1 + WORKLOADS.index(named(name)) % STRIDE
    calls = place.kill_at(lambda decide: place.run(named(name), decide), range(first, 100_000, STRIDE))
    assert calls >= 5
    assert place.tally.lost == []


@pytest.mark.parametrize("name", CLIENTS)
def test_nothing_is_lost_through_the_tree(place: Arena, name: str) -> None:
    place.tally.lost.clear()
    calls = place.kill_at(lambda decide: place.run_clients(name, decide), range(3, 100_000, 3 * STRIDE))
    assert calls >= 5
    assert place.tally.lost == []


def test_there_were_a_few_hundred_kills(place: Arena, request: pytest.FixtureRequest) -> None:
    """Of all that the tests above do; fewer if only some of them were run."""
    run = {item.name for item in request.session.items if item.path == request.path}
    if all(f"test_nothing_is_lost_through_the_library[{workload.name}]" in run for workload in WORKLOADS):
        assert place.tally.kills >= KILLS, str(place.tally)


def test_a_disk_that_fails_in_the_middle_of_a_commit_of_the_records(place: Arena) -> None:
    """LMDB gives up after that and is opened anew: who asked is told so, the end is not held up, the next start finds all."""
    state = {"synced": False, "failed": False}

    def at_meta_page(call: Call) -> int | None:
        if call.name == "pwrite64" and state["synced"] and not state["failed"]:
            state["failed"] = True
            return errno.EIO
        state["synced"] = call.name == "fdatasync"
        return None

    run = place.run(named("prepare"), at_meta_page, probe=True)
    assert state["failed"]
    assert run.failed == {0}
    assert run.words
    assert all("Input/output error" in words or "the next change tries again" in words for words in run.words), run.words
    assert run.problems == []


def test_a_call_that_fails_changes_nothing(place: Arena) -> None:
    """The same tool makes a disk fail: the rename that puts a new snapshot's directory in its place."""

    def at_rename(call: Call) -> int | None:
        return errno.EIO if call.name == "rename" and "snapshots/8" in str(call) else None

    run = place.run(named("prepare"), at_rename, probe=True)
    assert run.failed == {0}
    assert run.acks == [0]
    assert len(run.words) == 2
    assert all("Input/output error" in words for words in run.words), "neither it nor the next one, at the same place"
    assert run.problems == []


def test_the_kill_comes_before_the_call(place: Arena) -> None:
    """Otherwise all of the above would test nothing."""
    seen: list[str] = []

    def at_rename(call: Call) -> int | None:
        seen.append(str(call))
        return 0 if call.name == "rename" else None

    run = place.run(named("prepare"), at_rename)
    assert run.killed
    assert seen[-1].startswith("rename(")
    assert run.acks == [0]
    assert run.problems == []
