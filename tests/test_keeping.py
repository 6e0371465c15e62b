"""Which checkpoints ``snapfs prune --keep-…`` keeps, and how the others go: the choice by itself, and by the command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from snapfs.cli.keeping import Keep, Step, choose
from snapfs.cli.listing import Row
from tests.command import Command
from tests.daemon import Daemon
from tests.processes import until

Make = Callable[..., Daemon]

NOW = datetime(2026, 11, 29, 12, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def row(number: int, name: str, parent: str = ".", kind: str = "committed", ago: timedelta = timedelta(), **labels: str) -> Row:
    created = (NOW - ago).timestamp()
    said = ",".join(f"{key.replace('_', '.')}={value}" for key, value in labels.items()) or "."
    return Row(f"{name}\t{kind}\t{parent}\t{number}\t4096\t1\t{created:.9f}\t{created:.9f}\t.\t{said}")


def checkpoint(number: int, parent: str = ".", ago: timedelta = timedelta(), key: str = "web", **labels: str) -> Row:
    return row(
        number, f"{key}@{number}", parent, "committed", ago, snapfs_workspace=key, snapfs_checkpoint=str(number), **labels
    )


def history(*ago: timedelta) -> list[Row]:
    """A workspace on checkpoints on one another, the oldest first."""
    rows = [checkpoint(1, ago=ago[0])]
    rows += [checkpoint(n, f"web@{n - 1}", each) for n, each in enumerate(ago[1:], 2)]
    return [*rows, row(len(rows) + 1, "web", rows[-1].name, "active")]


def said(steps: list[Step]) -> list[str]:
    return [f"{step.row.name}{' dissolves' * step.dissolves}" for step in steps]


HOURS = [timedelta(minutes=20 * n) for n in range(12, -1, -1)]  # three an hour, for four hours: web@1 to web@13


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(last=1), {13: "last 1"}),
        (Keep(last=3), {13: "last 1", 12: "last 2", 11: "last 3"}),
        (Keep(last=100), {n: f"last {14 - n}" for n in range(1, 14)}),
        (Keep(hourly=2), {13: "hourly 1", 11: "hourly 2"}),
        (Keep(hourly=100), {13: "hourly 1", 11: "hourly 2", 8: "hourly 3", 5: "hourly 4", 2: "hourly 5"}),
        (Keep(daily=7), {13: "daily 1"}),
        (Keep(last=2, hourly=2, daily=1), {13: "last 1, hourly 1, daily 1", 12: "last 2", 11: "hourly 2"}),
        (Keep(), {13: "it is the newest"}),
    ],
)
def test_the_rules(keep: Keep, kept: dict[int, str]) -> None:
    steps, staying = choose(history(*HOURS), keep)
    assert {each.name: why for each, why in staying} == {f"web@{n}": why for n, why in kept.items()}
    assert sorted(step.row.id for step in steps) == [n for n in range(1, 14) if n not in kept]


def test_days_are_those_with_checkpoints_and_of_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As restic and borg count: a day without any is no day; and midnight is the user's."""
    days = [timedelta(days=d, hours=h) for d, h in ((40, 0), (40, -1), (9, 0), (1, 2), (1, 0), (0, 13), (0, 1))]
    _, staying = choose(history(*days), Keep(daily=3))
    assert [(each.id, why) for each, why in staying] == [(7, "daily 1"), (6, "daily 2"), (3, "daily 3")]
    monkeypatch.setenv("TZ", "XYZ-3")
    time.tzset()
    _, staying = choose(history(*days), Keep(daily=3))
    assert [(each.id, why) for each, why in staying] == [(7, "daily 1"), (5, "daily 2"), (3, "daily 3")]


def test_what_stays_whatever_the_rules_say() -> None:
    rows = [
        checkpoint(1),
        checkpoint(2, "web@1", pin="yes"),
        checkpoint(3, "web@2"),
        checkpoint(4, "web@3"),
        checkpoint(5, "web@4"),
        checkpoint(6, "web@5"),
        row(7, "peek", "web@3", "view"),
        row(8, "fork", "web@4", "active"),
        row(9, "release", "web@5"),
        row(10, "web", "web@1", "active"),
    ]
    steps, staying = choose(rows, Keep())
    assert [(each.id, why) for each, why in staying] == [
        (6, "it is the newest"),
        (4, '"fork" (active) stands on it'),
        (3, '"peek" (view) stands on it'),
        (2, "it is pinned"),
        (1, '"web" (active) stands on it'),
    ]
    assert said(steps) == ["web@5 dissolves"]


def test_how_they_go() -> None:
    """A branch that nothing that stays stands on is removed from its end; the others take over what goes."""
    rows = [
        *(checkpoint(n, f"web@{n - 1}" if n > 1 else ".") for n in range(1, 5)),
        checkpoint(5, "web@1"),
        checkpoint(6, "web@5"),
        row(7, "web", "web@6", "active"),
    ]
    steps, _ = choose(rows, Keep())
    assert said(steps) == ["web@4", "web@3", "web@2", "web@5 dissolves", "web@1 dissolves"]


def test_bases_go_with_what_stood_on_them() -> None:
    def base(number: int, name: str, **labels: str) -> Row:
        return row(number, f"{name}-squashed", ago=timedelta(), snapfs_squash=name, snapfs_workspace="web", **labels)

    rows = [
        checkpoint(1),
        base(20, "web@1"),
        checkpoint(2, "web@1-squashed"),
        base(21, "web@2"),
        checkpoint(3, "web@2-squashed"),
        base(22, "web@0", pin="yes"),
        row(23, "flat", snapfs_squash="web@1"),  # somebody has made that by hand
        row(24, "other@1-squashed", snapfs_squash="other@1", snapfs_workspace="other"),
        row(25, "web", "web@3", "active"),
    ]
    steps, _ = choose(rows, Keep(last=1))
    assert said(steps) == ["web@1", "web@2", "web@1-squashed"]
    steps, _ = choose(rows, Keep(last=2))
    assert said(steps) == ["web@1"]


def test_workspaces_apart_and_by_name() -> None:
    rows = [checkpoint(n, key=key) for key in ("web", "db") for n in (1, 2)]
    steps, staying = choose(rows, Keep(last=1))
    assert sorted(said(steps)) == ["db@1", "web@1"]
    assert len(staying) == 2
    assert said(choose(rows, Keep(last=1), ["db"])[0]) == ["db@1"]


# -- the command


def write(path: str | os.PathLike[str], text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def test_prune(make_daemon: Make) -> None:
    daemon = make_daemon("-o", "squash_depth=6").start()
    snapfs, mnt = Command(daemon.mnt), daemon.mnt
    os.mkdir(mnt / "active/web")
    for n in range(1, 11):
        write(mnt / f"active/web/rootfs/f{n}", str(n))
        write(mnt / "active/web/rootfs/same", str(n))
        write(mnt / "active/web/checkpoint", f"step {n}\n")
        if n == 6:
            until(lambda: os.readlink(mnt / "active/web/parent").endswith("-squashed"))
    write(mnt / "active/web/rootfs/late", "x")
    expected = {name: (mnt / f"active/web/rootfs/{name}").read_text() for name in os.listdir(mnt / "active/web/rootfs/")}
    snapfs("label", "web@4", "pin=yes")
    before = sorted(snapfs.names())
    for words, status, why in (
        (("--keep-last", "x"), 2, "is no number"),
        (("--keep-last", "1", "--expired"), 2, "give them without the others"),
        (("web", "--kind", "view"), 2, "a workspace is named with --keep-last"),
        (("nobody", "--keep-last", "1"), 3, '"nobody" does not exist'),
    ):
        assert why in snapfs("prune", *words, status=status)
    own = os.stat(mnt / "committed/web@8/diff").st_blocks // 2  # KiB: a directory takes none on a tmpfs
    dry = snapfs("prune", "web", "--keep-last", "2", "--dry-run")
    assert sorted(snapfs.names()) == before
    done = snapfs("prune", "web", "--keep-last", "2")
    assert done == dry.replace("would remove", "removed")
    assert "kept web@4: it is pinned\n" in done
    assert "kept web@10: last 1\n" in done
    assert done.splitlines()[-1] == f"removed 7, {2 * (8 + own)}K; what 5 of them had stays, in what stands on them"
    now = set(snapfs.names())
    assert (
        {"web", "web@4", "web@9", "web@10"}
        <= now
        <= {"web", "web@4", "web@9", "web@10", *(n for n in before if "squashed" in n)}
    )
    assert {name: (mnt / f"active/web/rootfs/{name}").read_text() for name in expected} == expected
    assert set(os.listdir(mnt / "committed/web@4/rootfs/")) == {"f1", "f2", "f3", "f4", "same"}
    assert (mnt / "committed/web@9/rootfs/same").read_text() == "9"
    write(mnt / "active/web/rollback", "9\n")
    assert "f10" not in os.listdir(mnt / "active/web/rootfs/")
    found = json.loads(snapfs("prune", "--keep-last", "1", "--dry-run", "--json"))
    assert [each["name"] for each in found["removed"]] == []
    assert {each["name"]: each["why"] for each in found["kept"]} == {
        "web@10": "last 1",
        "web@9": '"web" (active) stands on it',
        "web@4": "it is pinned",
    }
    assert daemon.stop() == 0
