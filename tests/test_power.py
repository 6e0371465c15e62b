"""Power cuts: whatever a disk is left with, what was promised is there, and what was not is never passed off as whole.

POWER_CUTS (16) says how often the power is cut in each test; the instants and what is lost are chosen at random, from a seed
that a failure tells.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from snapfs import Kind, Options, Snapshotter, open_snapshotter
from snapfs.root import unflushed as unflushed_room
from tests.daemon import Daemon
from tests.disk import disk, mounted
from tests.power import Content, Left, State, Story, cut, fill

pytestmark = [pytest.mark.mounts, pytest.mark.durable]

CUTS = int(os.environ.get("POWER_CUTS", "16"))

each_kind = pytest.mark.parametrize("kind", ["ext4", "xfs"])


@pytest.fixture
def story(kind: str) -> Iterator[Story]:
    """Nothing yet, on a disk with a file system of ``kind``."""
    with disk(kind) as made:
        yield Story(made)


async def cut_often(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Left]:
    """Cut the power CUTS times."""
    monkeypatch.setattr(unflushed_room, "boot_id", lambda: "the next boot")
    seed = random.randrange(1 << 32)
    found = []
    for n, at in enumerate(story.cuts(CUTS, random.Random(seed))):
        left, _ = await cut(story, at, seed + n, tmp_path / "after", story.disk.base.with_name("cut"))
        found.append(left)
    print(
        f"\n{story.disk.kind}: {len(found)} power cuts; of {sum(left.committed for left in found)} committed snapshots "
        f"{sum(left.unflushed for left in found)} said to be unflushed, {sum(left.torn for left in found)} of these torn; "
        "lost of what was promised: 0"
    )
    return found


class Library:
    """Does with the library whatever chance says, and tells ``story``."""

    def __init__(self, story: Story, snapshotter: Snapshotter, chance: random.Random) -> None:
        self.story = story
        self.snapshotter = snapshotter
        self.chance = chance
        self.serial = 0

    def name(self, word: str) -> str:
        self.serial += 1
        return f"{word}{self.serial}"

    async def anything(self) -> None:
        commits = (self.commit, self.commit, self.commit_soon, self.commit_soon)
        calls = (self.make, *commits, self.rename, self.update, self.remove, self.squash, self.dissolve)
        await self.chance.choice(calls)()

    async def make(self, kind: Kind | None = None) -> int:
        kind = kind or self.chance.choice((Kind.ACTIVE, Kind.ACTIVE, Kind.VIEW))
        parent = self.chance.choice([0, *self.story.all(Kind.COMMITTED)])
        state = State(self.name("key"), kind, parent, {"made": "1"})
        asked = self.story.disk.now()
        number = await self.snapshotter.create(kind, state.name, parent or None, state.labels)
        self.story.tell(number, asked, state)
        return number

    async def commit(self, *, wait: bool = True) -> None:
        """Make and commit; what is above holds whatever others do meanwhile."""
        number = await self.make(Kind.ACTIVE)
        self.story.content[number] = fill(Path(self.snapshotter.layers.fs(number)), self.chance)
        state = State(self.name("name"), Kind.COMMITTED, self.story.now(number).parent, {"committed": "1"})
        asked = self.story.disk.now()
        await self.snapshotter.commit(state.name, number, state.labels, wait=wait)
        self.story.tell(number, asked, state)
        if wait:
            self.story.flushed[number] = self.story.disk.now()

    async def commit_soon(self) -> None:
        await self.commit(wait=False)

    async def squash(self) -> None:
        if numbers := self.story.all(Kind.COMMITTED):
            number, name = self.chance.choice(numbers), self.name("squash")
            asked, content = self.story.disk.now(), self.story.shown(number)
            made = await self.snapshotter.squash(number, name)
            self._tell_made(made.id, asked, State(name, Kind.COMMITTED, 0, made.labels), content)

    def _tell_made(self, number: int, asked: int, state: State, content: Content) -> None:
        self.story.content[number] = content
        self.story.tell(number, asked, state)
        self.story.flushed[number] = self.story.disk.now()

    async def dissolve(self) -> None:
        """One on which only committed ones stand, if at all."""
        story, committed = self.story, self.story.all(Kind.COMMITTED)
        if numbers := [number for number in committed if set(story.children(number)) <= set(committed)]:
            number = self.chance.choice(sorted(numbers, key=lambda number: -len(story.children(number)))[:2])
            gone, children = story.now(number), story.children(number)
            asked = story.disk.now()
            await self.snapshotter.dissolve(number)
            story.tell(number, asked, None)
            for child in children:
                before, above = story.now(child), story.children(child)
                new = (await self.snapshotter.stat(before.name)).id
                story.tell(child, asked, None)
                content = {**story.content[number], **story.content[child]}
                self._tell_made(new, asked, before._replace(parent=gone.parent), content)
                for each in above:
                    story.tell(each, asked, story.now(each)._replace(parent=new))

    async def flush(self) -> None:
        before = self.story.disk.now()
        await self.snapshotter.flush()
        self.story.tell_flushed(before)

    async def _change(self, number: int, call: Callable[[], object], state: State | None) -> None:
        asked = self.story.disk.now()
        await call()  # type: ignore[misc]
        self.story.tell(number, asked, state)

    async def rename(self) -> None:
        if numbers := self.story.all(self.chance.choice(list(Kind))):
            number, name = self.chance.choice(numbers), self.name("renamed")
            state = self.story.now(number)._replace(name=name)
            await self._change(number, lambda: self.snapshotter.rename(number, name), state)

    async def update(self) -> None:
        if numbers := self.story.all(self.chance.choice(list(Kind))):
            number, labels = self.chance.choice(numbers), {"updated": self.name("value")}
            state = self.story.now(number)._replace(labels=labels)
            await self._change(number, lambda: self.snapshotter.update(number, labels), state)

    async def remove(self) -> None:
        numbers = self.story.all(self.chance.choice(list(Kind)))
        if numbers := [number for number in numbers if not self.story.has_children(number)]:
            number = self.chance.choice(numbers)
            await self._change(number, lambda: self.snapshotter.remove(number), None)


@each_kind
async def test_the_library(story: Story, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call after the other, then many at once."""
    chance = random.Random(1)
    with mounted(story.disk.device, kind, tmp_path / "disk") as mount:
        async with open_snapshotter(mount / "root", Options(rootfs=False)) as snapshotter:
            library = Library(story, snapshotter, chance)
            for n in range(60):
                await library.anything()
                if n % 10 == 9:
                    await library.flush()
            for _ in range(5):
                async with trio.open_nursery() as nursery:
                    for _ in range(10):
                        nursery.start_soon(library.make)
                        nursery.start_soon(library.commit)
                        nursery.start_soon(library.commit_soon)
                await library.update()
                await library.remove()
        for number in story.content:
            story.flushed.setdefault(number, story.disk.now())  # since it was closed
    found = await cut_often(story, tmp_path, monkeypatch)
    assert sum(left.unflushed for left in found) > 0, "the test means something"


class Mounted:
    """The same through the mounted tree, as a shell would."""

    def __init__(self, story: Story, daemon: Daemon, chance: random.Random) -> None:
        self.story = story
        self.daemon = daemon
        self.chance = chance
        self.serial = 0

    def name(self, word: str) -> str:
        self.serial += 1
        return f"{word}{self.serial}"

    def path(self, number: int) -> Path:
        state = self.story.now(number)
        return self.daemon.mnt / state.kind / state.name

    def above(self, parent: int) -> Path:
        return self.path(parent) if parent else self.daemon.mnt

    def make(self, kind: Kind) -> int:
        parent = self.chance.choice([0, *self.story.all(Kind.COMMITTED)])
        state = State(self.name("key"), kind, parent, {})
        asked = self.story.disk.now()
        (self.above(parent) / kind / state.name).mkdir()
        done = self.story.disk.now()
        number = json.loads((self.daemon.mnt / kind / state.name / "info.json").read_text())["id"]
        assert isinstance(number, int)
        self.story.tell(number, asked, state)
        self.story.versions[number][-1] = self.story.versions[number][-1]._replace(done=done)
        return number

    def commit(self, sync: str | None) -> None:
        """mv, and ``sync`` of that directory: "" is that of the snapshot itself."""
        number = self.make(Kind.ACTIVE)
        self.story.content[number] = fill(self.path(number) / "diff", self.chance)
        before = self.path(number)
        state = self.story.now(number)._replace(name=self.name("name"), kind=Kind.COMMITTED)
        asked = self.story.disk.now()
        before.rename(self.above(state.parent) / "committed" / state.name)
        self.story.tell(number, asked, state)
        if "dirsync" in self.daemon.arguments:
            self.story.flushed[number] = self.story.disk.now()
        if sync is not None:
            self.sync(self.daemon.mnt / sync if sync else self.path(number))

    def sync(self, directory: Path) -> None:
        before = self.story.disk.now()
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)
        self.story.tell_flushed(before)

    def rename(self) -> None:
        if numbers := self.story.all(self.chance.choice(list(Kind))):
            number = self.chance.choice(numbers)
            state = self.story.now(number)._replace(name=self.name("renamed"))
            before, asked = self.path(number), self.story.disk.now()
            before.rename(before.with_name(state.name))
            self.story.tell(number, asked, state)

    def label(self) -> None:
        if numbers := self.story.all(self.chance.choice(list(Kind))):
            number, value = self.chance.choice(numbers), self.name("value")
            state = self.story.now(number)
            asked = self.story.disk.now()
            fd = os.open(self.path(number) / "labels/team", os.O_WRONLY | os.O_CREAT)  # not O_TRUNC: that is a change, too
            os.write(fd, value.encode())
            self.story.tell(number, asked, state._replace(labels={**state.labels, "team": value}))
            os.close(fd)

    def remove(self) -> None:
        numbers = self.story.all(self.chance.choice(list(Kind)))
        if numbers := [number for number in numbers if not self.story.has_children(number)]:
            number = self.chance.choice(numbers)
            path, asked = self.path(number), self.story.disk.now()
            path.rmdir()
            self.story.tell(number, asked, None)


@each_kind
@pytest.mark.parametrize("option", ["mv", "dirsync"])
async def test_the_mounted_tree(
    story: Story,
    kind: str,
    option: str,
    make_daemon: Callable[..., Daemon],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mkdir, mv, sync, labels, rmdir; ``mv`` waits for the data with -o dirsync only."""
    chance = random.Random(2)
    with mounted(story.disk.device, kind, tmp_path / "disk") as mount:
        options = ("-o", "dirsync") if option == "dirsync" else ()
        daemon = make_daemon("-o", "no_rootfs", *options, root=mount / "root").start()
        tree = Mounted(story, daemon, chance)
        for n in range(60):
            if n % 2:
                tree.commit(chance.choice((None, None, "", "committed", ".")))
            else:
                chance.choice(
                    (lambda: tree.make(Kind.VIEW), lambda: tree.make(Kind.ACTIVE), tree.rename, tree.label, tree.remove)
                )()
        assert daemon.stop() == 0
        for number in story.content:
            story.flushed.setdefault(number, story.disk.now())
    found = await cut_often(story, tmp_path, monkeypatch)
    if option == "mv":  # with dirsync the data is there before, and it is a matter of chance whether a cut falls in between
        assert sum(left.unflushed for left in found) > 0, "the test means something"
    assert sum(left.committed for left in found) > 0
