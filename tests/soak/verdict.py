"""Whether all agree: what the clients know, what events and error_log told, the records, and the directories on disk."""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trio

from snapfs import open_snapshotter
from snapfs.model import Info, Kind
from tests.soak.client import ALWAYS_LOGGED, Call, Event, Report
from tests.soak.watch import Moment, machine_was_slow

LIMIT = 2.0  # seconds that any call may take, besides what the machine itself was slow

_REFUSAL = re.compile(r"\S+Z ([A-Z0-9]+) (\w+) (.*?)(?:: .*)?")

_KNOWN = {"EPERM", "EBUSY", "ENOTEMPTY", "E2BIG", "EILSEQ", "EINVAL", "EEXIST", "ENOENT", "ENAMETOOLONG"}


@dataclass
class Known:
    """One snapshot as events told of it."""

    name: str
    kind: str
    parent: int | None
    labels: dict[str, str]


class History:
    """The events in their order, which must be a possible one: no name twice, no id twice, no parent missing."""

    def __init__(self, lines: list[str]) -> None:
        self.snapshots: dict[int, Known] = {}
        self.by_name: dict[str, int] = {}
        self.images: dict[str, int] = {}
        self.counted: Counter[Event] = Counter()
        self.wrong: list[str] = []
        self._last_id = 0
        for number, line in enumerate(lines, start=1):
            event = json.loads(line)
            if event.get("number") != number:
                self.wrong.append(f"event {number} is {line}")
                break
            self._replay(event, line)

    def _replay(self, event: dict[str, object], line: str) -> None:
        operation, key, name, number = event["operation"], str(event["key"]), event["name"], int(str(event["id"]))
        labels = event["labels"]
        assert isinstance(labels, dict)
        self.counted[Event(str(operation), key, None if name is None else str(name))] += 1
        parent = self.by_name.get(str(event["parent"])) if event["parent"] is not None else None
        self._check(event["parent"] is None or parent is not None, "its parent is not there", line)
        if operation in ("prepare", "view"):
            self._check(key not in self.by_name, "the key is in use", line)
            self._check(number > self._last_id, "the id was used before", line)
            self._check(parent is None or self.snapshots[parent].kind == Kind.COMMITTED, "the parent is not committed", line)
            self._last_id = number
            self.snapshots[number] = Known(key, "view" if operation == "view" else "active", parent, labels)
            self.by_name[key] = number
            return
        self._check(self.by_name.get(key) == number, "there is no such snapshot", line)
        its = self.snapshots.get(number)
        if its is None:
            return
        if operation in ("name", "unname"):
            image = str(name)
            self._check(its.kind == Kind.COMMITTED, "it is not committed", line)
            self._check(
                self.images.pop(image, None) == (None if operation == "name" else number), "the name is another's", line
            )
            if operation == "name":
                self.images[image] = number
            return
        if operation == "remove":
            self._check(number not in self.images.values(), "it has a name in images/", line)
            self._check(all(other.parent != number for other in self.snapshots.values()), "it has children", line)
            del self.snapshots[number], self.by_name[its.name]
            return
        if operation == "commit":
            self._check(its.kind == Kind.ACTIVE, "it is not active", line)
            self._check(its.parent in (None, parent), "it has another parent", line)
            its.kind, its.parent = Kind.COMMITTED, parent
        self._check(its.parent == parent, "it has another parent", line)
        its.labels = labels
        if isinstance(name, str):
            self._check(self.by_name.get(name) in (None, number), "the name is in use", line)
            del self.by_name[its.name]
            its.name = name
            self.by_name[name] = number

    def _check(self, holds: bool, what: str, line: str) -> None:
        if not holds:
            self.wrong.append(f"events: {what}: {line}")


def same_events(history: History, reports: list[Report]) -> list[str]:
    """Each change that a client was told is done has its event, and no other has one: of all who race for a name one wins."""
    told: Counter[Event] = Counter()
    for report in reports:
        told += report.events
    wrong = []
    for event in sorted({*told, *history.counted}, key=str):
        if event.operation == "update" and not event.key.startswith("p"):
            continue  # who empties a shared label and closes it isn't told whether it was there
        if told[event] != history.counted[event]:
            wrong.append(f"{event.key}: clients did {event} {told[event]} times, events tell of {history.counted[event]}")
    return wrong


def same_refusals(errors: list[str], reports: list[Report]) -> list[str]:
    """Each refusal of a call on a private name has its line in error_log, and no other has one."""
    known: Counter[str] = Counter()
    for report in reports:
        known += report.refusals
    names = {errno.errorcode[number] for number in ALWAYS_LOGGED}
    logged: Counter[str] = Counter()
    wrong = []
    for line in errors:
        found = _REFUSAL.fullmatch(line)
        if found is None or found[1] not in _KNOWN:
            wrong.append(f"error_log: {line}")
            continue
        logged[f"{found[1]} {found[2]} {found[3]}"] += 1
    private = re.compile(r"\S+ \S+ (?:\S+/)?(?:active|view|committed)/p[0-9]+(?:%2F|\.|\\|%41|/|n| )")
    for refusal in sorted({*known, *logged}):
        is_always = refusal.split(" ", 1)[0] in names
        ours = refusal in known or (is_always and private.match(refusal) is not None)
        if ours and (known[refusal] > logged[refusal] if not is_always else known[refusal] != logged[refusal]):
            wrong.append(f"error_log has {logged[refusal]} lines of {refusal}, which was refused {known[refusal]} times")
    return wrong


def same_contents(root: Path, history: History, reports: list[Report]) -> list[str]:
    """What was committed has not changed since anybody saw it, and what was written before is in it."""
    wrong: list[str] = []
    seen: dict[int, dict[str, int]] = {}
    for report in reports:
        for number, sums in report.manifests.items():
            if seen.setdefault(number, sums) != sums:
                wrong.append(f"snapshot {number} was committed with {seen[number]}, client {report.number} saw {sums}")
    for number, its in history.snapshots.items():
        if its.kind == Kind.COMMITTED:
            layer = root / f"snapshots/{number}/fs"
            files = {path.name: zlib.crc32(path.read_bytes()) for path in layer.iterdir() if path.is_file()}
            if seen.setdefault(number, files) != files:
                wrong.append(f"{its.name}: {layer} holds {files}, and held {seen[number]}")
    for report in reports:
        for number, written in report.written.items():
            lost = {name for name, crc in written.items() if number in seen and seen[number].get(name) != crc}
            if lost:
                wrong.append(
                    f"snapshot {number} was committed without {sorted(lost)}, which client {report.number} wrote before"
                )
    return wrong


def same_records(root: Path, history: History, reports: list[Report]) -> list[str]:
    """The records, opened anew, hold what events told and what each client knows of its own; the directories are theirs."""

    async def walk() -> list[Info]:
        async with open_snapshotter(root) as snapshotter:
            return await snapshotter.walk()

    wrong = []
    infos = trio.run(walk)
    recorded = {its.id: (its.name, str(its.kind), its.parent, dict(its.labels)) for its in infos}
    told = {
        number: (its.name, its.kind, self_name(history, its.parent), its.labels) for number, its in history.snapshots.items()
    }
    for number in sorted({*recorded, *told}):
        if recorded.get(number) != told.get(number):
            wrong.append(f"snapshot {number}: the records say {recorded.get(number)}, events {told.get(number)}")
    own = {number: its for report in reports for number, its in report.holds.items()}
    for number in sorted({*own, *(number for number, its in recorded.items() if its[0].startswith("p"))}):
        if recorded.get(number) != own.get(number):
            wrong.append(f"snapshot {number}: the records say {recorded.get(number)}, its client {own.get(number)}")
    directories = sorted(os.listdir(root / "snapshots"))
    if directories != sorted(map(str, recorded)):
        wrong.append(f"snapshots/ has {directories}, the records {sorted(recorded)}")
    for number, (name, kind, *_) in recorded.items():
        parts = {"fs"} if kind == Kind.VIEW else {"fs", "work"}
        if set(os.listdir(root / f"snapshots/{number}")) != parts:
            wrong.append(f"{name}: snapshots/{number} has {os.listdir(root / f'snapshots/{number}')}")
    for place in ("trash", "rootfs", "pool", "lost+found"):
        if (root / place).exists() and (found := os.listdir(root / place)):
            wrong.append(f"{place}/ has {found}")
    return wrong


def self_name(history: History, number: int | None) -> str | None:
    return None if number is None else history.snapshots[number].name


def too_slow(reports: list[Report], moments: list[Moment]) -> list[str]:
    """Calls that took longer than LIMIT and what the machine was slow at that time."""
    found = []
    for call in sorted(slow_calls(reports), key=lambda call: -call.took):
        excuse = machine_was_slow(moments, call.began, call.began + call.took)
        if call.took > LIMIT + excuse:
            found.append(f"{call.operation} {call.path} took {call.took:.2f} s (the machine itself was {excuse:.2f} s slow)")
    return found if len(found) <= 20 else [*found[:20], f"and {len(found) - 20} more calls were too slow"]


def slow_calls(reports: list[Report]) -> list[Call]:
    return [call for report in reports for call in report.slow]
