"""What a root was asked for, and when by the clock of its disk; and what must be left of that after a power cut."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from snapfs import Damaged, FailedPrecondition, Kind, Options, Snapshotter, open_snapshotter
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from tests.disk import Disk, after_power_cut, loop_device, mounted

Content = Mapping[str, bytes]
"""The files of a layer."""


class State(NamedTuple):
    """What is promised of a record."""

    name: str
    kind: Kind
    parent: int
    labels: Mapping[str, str]


class Version(NamedTuple):
    """A state of a snapshot (None: removed), when it was asked for, and when that was acknowledged."""

    asked: int
    done: int
    state: State | None


class Story:
    """All that was asked of the root ``root`` on ``disk``; times are the disk's."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.versions: dict[int, list[Version]] = {}
        self.content: dict[int, Content] = {}
        """What the layer of each committed snapshot held when it was committed."""
        self.flushed: dict[int, int] = {}
        """When it was known to be on disk."""

    def now(self, number: int) -> State:
        state = self.versions[number][-1].state
        assert state is not None
        return state

    def all(self, kind: Kind) -> list[int]:
        """The ids of all snapshots of ``kind``."""
        last = {number: versions[-1].state for number, versions in self.versions.items()}
        return [number for number, state in last.items() if state is not None and state.kind is kind]

    def has_children(self, number: int) -> bool:
        return bool(self.children(number))

    def children(self, number: int) -> list[int]:
        last = {child: versions[-1].state for child, versions in self.versions.items()}
        return [child for child, state in last.items() if state is not None and state.parent == number]

    def shown(self, number: int) -> Content:
        """What a committed snapshot shows; no layer deletes anything."""
        found: Content = {}
        while number:
            found = {**self.content[number], **found}
            number = self.now(number).parent
        return found

    def tell(self, number: int, asked: int, state: State | None) -> None:
        """Snapshot ``number`` was to become ``state``, and this has just been acknowledged."""
        self.versions.setdefault(number, []).append(Version(asked, self.disk.now(), state))

    def tell_flushed(self, before: int) -> None:
        """All that was acknowledged ``before`` is said to be on disk."""
        for number in self.content:
            if self.versions[number][-1].done <= before:
                self.flushed.setdefault(number, self.disk.now())

    def possible(self, number: int, at: int) -> list[State | None]:
        """What snapshot ``number`` may be after a power cut: what was acknowledged last, or anything asked for since."""
        versions = self.versions.get(number, [])
        acknowledged = [None, *(version.state for version in versions if version.done <= at)]
        return [acknowledged[-1], *(version.state for version in versions if version.asked <= at < version.done)]

    def cuts(self, count: int, chance: random.Random) -> list[int]:
        """When to cut the power: after flushes, when something was acknowledged or asked for, and at other times."""
        writes, flushes = self.disk.history()
        calls = {time for versions in self.versions.values() for version in versions for time in (version.asked, version.done)}
        chosen = {0, self.disk.now()}
        for source in (flushes, sorted(calls), [write.at for write in writes]):
            chosen.update(chance.sample(source, min(len(source), count // 3)))
        return sorted(chosen)


class Left(NamedTuple):
    """How many of the committed snapshots were there, said to be unflushed, and of these really torn."""

    committed: int
    unflushed: int
    torn: int


def fill(layer: Path, chance: random.Random) -> Content:
    """Write files into ``layer``; all that it now holds."""
    for _ in range(chance.randint(0, 5)):
        file = layer / f"d{chance.randint(0, 2)}/f{chance.randint(0, 9)}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(chance.randbytes(chance.choice((1, 700, 5000, 90_000))))
    return content(layer)


def content(layer: Path) -> Content:
    """All that ``layer`` holds: directories have no bytes and a slash."""
    found: dict[str, bytes] = {}
    for path in sorted(layer.rglob("*")):
        name = str(path.relative_to(layer))
        found.update({f"{name}/": b""} if path.is_dir() else {name: path.read_bytes()})
    return found


def records_of(reader: Reader) -> dict[int, Record]:
    return {number: record for number in reader.numbers() if (record := reader.record(number)) is not None}


def states(reader: Reader) -> dict[int, State]:
    return {number: State(r.name, r.kind, r.parent, r.labels) for number, r in records_of(reader).items()}


@contextmanager
def left(disk: Disk, image: Path, target: Path) -> Iterator[Path]:
    """What is left of ``disk`` in ``image``, mounted; the root in it."""
    with loop_device(image) as device, mounted(device, disk.kind, target) as mount:
        yield mount / "root"


async def check(story: Story, root: Path, at: int, chance: random.Random) -> Left:
    """Open what a power cut at ``at`` left as ``root``, in the next boot; check all that was promised, and settle the rest."""
    async with open_snapshotter(root, Options(rootfs=False)) as snapshotter:
        with snapshotter.records.reading() as reader:
            found, last_id, marked = states(reader), reader.last_id(), {number for number, _ in reader.unflushed()}
            chains = {number: reader.chain(record) for number, record in records_of(reader).items()}
        for number in found.keys() | story.versions.keys():
            assert found.get(number) in story.possible(number, at), f"snapshot {number}"
        given = [number for number, versions in story.versions.items() if versions[0].done <= at]
        assert last_id >= max(given, default=0), "an id may be given out twice"

        assert snapshotter.layers.existing_ids() == found.keys(), "no directory without a record, no record without a directory"
        for number, state in found.items():
            parts = {"fs"} if state.kind is Kind.VIEW else {"fs", "work"}
            assert set(os.listdir(snapshotter.layers.directory(number))) == parts

        lost = set(snapshotter.unflushed.lost)
        assert lost == marked
        torn = set()
        for number, state in found.items():
            if state.kind is Kind.COMMITTED:
                if content(Path(snapshotter.layers.fs(number))) != story.content[number]:
                    torn.add(number)
                if number not in lost:
                    assert not lost.intersection(chains[number]), "a child was flushed before its parent"
        assert torn <= lost, "torn in silence"
        known = {number for number, flushed in story.flushed.items() if flushed <= at}
        assert not known & lost, "said to be on disk, and isn't known to be"

        await _settle(snapshotter, found, chains, chance)
        committed = sum(state.kind is Kind.COMMITTED for state in found.values())
        await snapshotter.prepare("afterwards")
        assert (await snapshotter.stat("afterwards")).id > last_id
        remaining = {info.id: info for info in await snapshotter.walk()}
    async with open_snapshotter(root, Options(rootfs=False)) as snapshotter:
        assert snapshotter.unflushed.lost == set()
        assert {info.id: info for info in await snapshotter.walk()} == remaining
    return Left(committed, len(lost), len(torn))


async def _settle(
    snapshotter: Snapshotter, found: Mapping[int, State], chains: Mapping[int, list[int]], chance: random.Random
) -> None:
    """Accept some of the unflushed snapshots, remove the others with their children; each is refused before and not after."""
    for number in sorted(snapshotter.unflushed.lost):
        name = found[number].name
        for refused in (snapshotter.prepare, snapshotter.view):
            with pytest.raises(Damaged, match="may be torn"):
                await refused("refused", name)
        if chance.random() < 0.5:
            await snapshotter.accept(name)
            with pytest.raises(FailedPrecondition):
                await snapshotter.accept(name)
            if not snapshotter.unflushed.lost.intersection(chains[number]):
                await snapshotter.view("allowed", name)
                await snapshotter.remove("allowed")
    for number in sorted(snapshotter.unflushed.lost, reverse=True):
        for other in sorted(found, reverse=True):
            if other == number or number in chains[other]:
                with snapshotter.records.reading() as reader:
                    here = reader.record(other) is not None
                if here:
                    await snapshotter.remove(other)
    assert snapshotter.unflushed.lost == set()


async def cut(story: Story, at: int, seed: int, target: Path, image: Path) -> tuple[Left, str]:
    """Cut the power at ``at`` and ``check``; what was left, and how in words."""
    chance = random.Random(seed)
    how = after_power_cut(story.disk, story.disk.history(), at, chance, image)
    try:
        with left(story.disk, image, target) as root:
            return await check(story, root, at, chance), how
    except BaseException as error:
        error.add_note(f"power cut {how} (seed {seed})")
        raise
