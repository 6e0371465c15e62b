"""Squash and dissolve: many layers become one, and a snapshot goes though others stand on it; in the library, in the tree and
by the command.  Each is whole or has not happened, and what is shown stays the same."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from snapfs import Change, Kind, Snapshotter, open_snapshotter
from snapfs.errors import (
    AlreadyExists,
    Busy,
    Closed,
    Damaged,
    FailedPrecondition,
    HasChildren,
    InvalidArgument,
    NameTooLong,
    NotFound,
    Pinned,
    TooDeep,
    TryAgain,
    Unavailable,
)
from snapfs.kernel import mounting
from snapfs.options import Options, Sync
from snapfs.root.inuse import Free
from snapfs.scan.squashing import squash as link_all
from snapfs.services import squashing
from tests.command import Command
from tests.daemon import Daemon
from tests.doors import DOORS, Opener
from tests.processes import until
from tests.records import check_indexes
from tests.refusals import failing, refused
from tests.rootfs import chain, files, somebody
from tests.tree import info, mounted, usage

Make = Callable[..., Daemon]

# -- the library


@pytest.fixture(params=DOORS)
def open_snapshotter_of(request: pytest.FixtureRequest) -> Opener:
    return partial(DOORS[request.param], options=Options(sync=Sync.NONE))


async def layer_of(snapshotter: Snapshotter, key: str) -> Path:
    return Path(snapshotter.layer_path((await snapshotter.stat(key)).id))


async def write(snapshotter: Snapshotter, key: str, **contents: str) -> None:
    layer = await layer_of(snapshotter, key)
    for name, content in contents.items():
        (layer / name).write_text(content)


async def commit(snapshotter: Snapshotter, name: str, parent: str | None = None, **contents: str) -> None:
    await snapshotter.prepare(f"{name}-draft", parent, {"team": "blue"})
    await write(snapshotter, f"{name}-draft", **contents)
    await snapshotter.commit(name, f"{name}-draft", keep_labels=True)


async def shown(snapshotter: Snapshotter, key: str | None) -> dict[str, str]:
    """The files that a snapshot shows; in these tests no layer deletes any."""
    found: dict[str, str] = {}
    while key is not None:
        found = files(await layer_of(snapshotter, key)) | found
        key = (await snapshotter.stat(key)).parent
    return found


async def depth(snapshotter: Snapshotter, key: str) -> int:
    """On how many layers a snapshot stands."""
    found, parent = 0, (await snapshotter.stat(key)).parent
    while parent is not None:
        found, parent = found + 1, (await snapshotter.stat(parent)).parent
    return found


async def settled(condition: Callable[[], Any]) -> None:
    """Return when ``condition`` (async) holds."""
    with trio.fail_after(30):
        while not await condition():
            await trio.sleep(0.01)


def nothing_left(root: Path, snapshotter: Snapshotter) -> bool:
    """Whether pool and trash hold nothing that was built in vain."""
    ready = {os.path.basename(path) for path in (*snapshotter.layers.pool._ready, *snapshotter.layers.pool._unflushed)}
    return set(os.listdir(root / "pool")) <= ready and os.listdir(root / "trash") == []


@pytest.fixture
async def three(open_snapshotter_of: Opener, root: Path) -> AsyncIterator[Snapshotter]:
    """The committed snapshots one, two and three on one another."""
    async with open_snapshotter_of(root) as snapshotter:
        await commit(snapshotter, "one", one="1", same="1")
        await commit(snapshotter, "two", "one", two="2", same="2")
        await commit(snapshotter, "three", "two", three="3")
        yield snapshotter
        check_indexes(snapshotter.records)


@pytest.fixture
async def alone(root: Path) -> AsyncIterator[Snapshotter]:
    """The same, by the async door, for tests that reach into it."""
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "one", one="1", same="1")
        await commit(snapshotter, "two", "one", two="2", same="2")
        await commit(snapshotter, "three", "two", three="3")
        yield snapshotter
        check_indexes(snapshotter.records)


async def test_a_squash(three: Snapshotter, root: Path) -> None:
    """It shows what the chain shows, stands on nothing, and is made of links; all else is as it was."""
    await three.update("three", {"pin": "yes"}, ["labels.pin"])
    before = await three.walk()
    made = await three.squash("three", "flat")
    assert (made.name, made.kind, made.parent) == ("flat", Kind.COMMITTED, None)
    assert made.labels == {"team": "blue", "snapfs.squash": "three"}
    assert await three.stat("flat") == made
    assert [each for each in await three.walk() if each != made] == before
    assert files(await layer_of(three, "flat")) == {"one": "1", "two": "2", "three": "3", "same": "2"}
    for name, of in (("one", "one"), ("two", "two"), ("same", "two"), ("three", "three")):
        assert os.path.samefile(await layer_of(three, "flat") / name, await layer_of(three, of) / name)
    await until_empty(three, root)


async def until_empty(snapshotter: Snapshotter, root: Path) -> None:
    async def empty() -> bool:
        return nothing_left(root, snapshotter)

    await settled(empty)


async def test_its_name(three: Snapshotter) -> None:
    assert (await three.squash("three")).name == "three-squashed"
    assert (await three.squash("three")).name == "three-squashed-2"
    long = "l" * 249  # which is cut where that would be too long
    await commit(three, long)
    assert (await three.squash(long)).name == f"{long[:246]}-squashed"
    assert (await three.squash(long)).name == f"{long[:244]}-squashed-2"
    again = await three.squash("three-squashed", "third")
    assert again.labels["snapfs.squash"] == "three-squashed"
    assert await shown(three, "third") == await shown(three, "three")


async def test_what_it_takes(three: Snapshotter) -> None:
    """Its files have names elsewhere, and that is said; of the others, which had them first, it is not."""
    await three.prepare("late", "three")
    await write(three, "late", late="x" * 5000)
    await three.commit("four", "late")
    made = await three.squash("four")  # before it is counted by itself
    found = await three.usage(made.name)
    own = os.stat(await layer_of(three, made.name)).st_blocks * 512
    assert found.inodes == 6
    assert found.size - found.shared == own
    for name in ("one", "two", "three", "four"):
        assert (await three.usage(name)).shared == 0


async def test_a_squash_is_a_parent(three: Snapshotter) -> None:
    await three.squash("three", "flat")
    for name in ("three", "two", "one"):
        await three.remove(name)
    await three.prepare("web", "flat")
    (mount,) = await three.mounts("web")
    assert sum(option.startswith("lowerdir=") and ":" not in option for option in mount.options) == 1
    assert await shown(three, "web") == {"one": "1", "two": "2", "three": "3", "same": "2"}


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("squash", "no"), NotFound, '"no" does not exist'),
        (("squash", "web"), FailedPrecondition, '"web" is active: only committed ones can be squashed'),
        (("squash", "peek"), FailedPrecondition, '"peek" is view: only committed ones can be squashed'),
        (("squash", "three", "one"), AlreadyExists, '"one" already exists (committed)'),
        (("squash", "three", "three"), AlreadyExists, '"three" already exists (committed)'),
        (("squash", "three", "web"), AlreadyExists, '"web" already exists (active)'),
        (("squash", "three", "x" * 256), NameTooLong, "255"),
        (("squash", "three", ""), InvalidArgument, "empty"),
        (("dissolve", "no"), NotFound, '"no" does not exist'),
        (("dissolve", "web"), FailedPrecondition, '"web" is active: only committed ones can be dissolved'),
        (("dissolve", "three"), FailedPrecondition, '"web" (active) stands on it'),
        (("dissolve", "two"), Pinned, '"two" has the label pin'),
        (("dissolve", "seen"), FailedPrecondition, '"peek" (view) stands on it'),
        (("dissolve", "theirs"), FailedPrecondition, '"theirs" is containerd\'s'),
        (("dissolve", "ours"), FailedPrecondition, '"theirs" is containerd\'s'),
    ],
)
async def test_what_is_refused_changes_nothing(
    three: Snapshotter, root: Path, words: Sequence[str], error: type[Exception], said: str
) -> None:
    await three.prepare("web", "three")
    await commit(three, "seen")
    await three.view("peek", "seen")
    await commit(three, "ours")
    await three.prepare("t", "ours", origin="containerd")
    await three.commit("theirs", "t", origin="containerd")
    await three.update("two", {"pin": "yes"}, ["labels.pin"])
    before, directories = await three.walk(), sorted(os.listdir(root / "snapshots"))
    with pytest.raises(error) as caught:
        await getattr(three, words[0])(*words[1:])
    assert said in str(caught.value)
    assert await three.walk() == before
    assert sorted(os.listdir(root / "snapshots")) == directories
    await until_empty(three, root)


async def test_two_squashes_at_once(three: Snapshotter) -> None:
    """Each has a name of its own; of two that want the same one is refused."""
    made: list[str] = []
    said: list[str] = []

    async def squash(new: str | None) -> None:
        try:
            made.append((await three.squash("three", new)).name)
        except AlreadyExists as error:
            said.append(str(error))

    async with trio.open_nursery() as nursery:
        for new in (None, None, None, "flat", "flat"):
            nursery.start_soon(squash, new)
    assert sorted(made) == ["flat", "three-squashed", "three-squashed-2", "three-squashed-3"]
    assert said == ['snapshot "flat" already exists (committed)']
    for name in made:
        assert await shown(three, name) == await shown(three, "three")


async def test_a_source_whose_data_was_lost(alone: Snapshotter, root: Path) -> None:
    alone.unflushed.lost.add((await alone.stat("one")).id)
    for call in (alone.squash("three"), alone.dissolve("one")):
        with pytest.raises(Damaged, match='"one" may be torn'):
            await call
    await until_empty(alone, root)


async def test_a_layer_that_is_missing(alone: Snapshotter, root: Path) -> None:
    (await layer_of(alone, "two")).rename(root / "elsewhere")
    for call in (alone.squash("three"), alone.dissolve("two")):
        with pytest.raises(Damaged, match="is missing; restore it from a backup"):
            await call
    (root / "elsewhere").rename(await layer_of(alone, "two"))


class Held:
    """The linking of layers, stopped in the middle: a half is made, and ``begun`` is set; it goes on with ``go_on``, or with
    ``fail`` ends in that error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = link_all
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.fail: OSError | None = None
        self.calls = 0
        monkeypatch.setattr(squashing, "link_all", self._link)

    def _link(self, layers: Sequence[str], target: str, *, checkpoint: Callable[[], None], **how: Any) -> None:
        self.calls += 1
        if not self.go_on.is_set():
            Path(target, "half").mkdir()
            self.begun.set()
            while not self.go_on.wait(0.01):
                checkpoint()
            if self.fail is not None:
                raise self.fail
            Path(target, "half").rmdir()
        self.real(layers, target, checkpoint=checkpoint, **how)

    async def has_begun(self) -> None:
        await trio.to_thread.run_sync(self.begun.wait, 30)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


async def test_a_full_disk_in_the_middle(alone: Snapshotter, root: Path, held: Held) -> None:
    before = await alone.walk()
    held.fail = OSError(errno.ENOSPC, "No space left on device")
    for call, said in ((alone.squash, "three"), (alone.dissolve, "one")):
        held.go_on.clear()
        held.begun.clear()

        async def fails(call: Callable[..., Any] = call, said: str = said) -> None:
            with pytest.raises(Unavailable, match=r"cannot squash snapshot .*No space left") as caught:
                await call(said)
            assert caught.value.errno == errno.ENOSPC

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await held.has_begun()
            held.go_on.set()
        assert await alone.walk() == before
        await until_empty(alone, root)
    held.fail = None
    await alone.squash("three")


@pytest.mark.durable
async def test_a_disk_that_is_full(small_disk: Path) -> None:
    """Really: directories by the hundred, for which there is no room."""
    async with open_snapshotter(small_disk / "root") as snapshotter:
        await snapshotter.prepare("draft")
        for number in range(200):
            ((await layer_of(snapshotter, "draft")) / str(number) / "deep").mkdir(parents=True)
        await snapshotter.commit("one", "draft")
        await commit(snapshotter, "two", "one", two="2")
        big = small_disk / "big"
        with big.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        before = await snapshotter.walk()
        for call in (partial(snapshotter.squash, "two"), partial(snapshotter.dissolve, "one")):
            with pytest.raises(Unavailable, match="No space left"):
                await call()
            assert await snapshotter.walk() == before
            await until_empty(snapshotter, small_disk / "root")
        big.unlink()
        made = await snapshotter.squash("two")
        await snapshotter.dissolve("one")
        assert sorted(os.listdir(await layer_of(snapshotter, made.name))) == sorted(
            os.listdir(await layer_of(snapshotter, "two"))
        )


async def test_a_call_that_is_cancelled_in_the_middle(alone: Snapshotter, root: Path, held: Held) -> None:
    before = await alone.walk()
    for call in (partial(alone.squash, "three"), partial(alone.dissolve, "two")):
        held.begun.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await held.has_begun()
            nursery.cancel_scope.cancel()
        assert await alone.walk() == before
        await until_empty(alone, root)


async def test_an_end_in_the_middle(root: Path, held: Held) -> None:
    """The call is refused, and nothing stays; nor does what a killed process leaves, after the next start."""
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await commit(snapshotter, "one", one="1")

        async def fails() -> None:
            with pytest.raises(Closed):
                await snapshotter.squash("one")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await held.has_begun()
            await snapshotter.close()
    assert os.listdir(root / "pool") == []
    (root / "pool/new-left/fs/deep").mkdir(parents=True)
    os.link(root / "snapshots/1/fs/one", root / "pool/new-left/fs/one")
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        await until_empty(snapshotter, root)
        assert [each.name for each in await snapshotter.walk()] == ["one"]
        assert (await layer_of(snapshotter, "one") / "one").read_text() == "1"


async def test_it_is_removed_in_the_middle(alone: Snapshotter, root: Path, held: Held) -> None:
    async def fails(call: Callable[..., Any]) -> None:
        with pytest.raises(NotFound, match=r"snapshot [0-9]+ does not exist any more"):
            await call("three")

    for call in (alone.squash, alone.dissolve):
        held.go_on.clear()
        held.begun.clear()
        await alone.prepare("upper", "three")
        await alone.commit("four", "upper")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, call)
            await held.has_begun()
            await alone.remove("four")
            await alone.remove("three")
            held.go_on.set()
        assert [each.name for each in await alone.walk()] == ["one", "two"]
        await until_empty(alone, root)
        await commit(alone, "three", "two", three="3")


async def test_what_it_stands_on_goes_in_the_middle(alone: Snapshotter, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built anew: what has gone may have been half deleted when it was linked."""
    before = await shown(alone, "three")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alone.squash, "three", "flat")
        await held.has_begun()
        with monkeypatch.context() as patched:
            patched.setattr(squashing, "link_all", held.real)
            await alone.dissolve("one")
        held.go_on.set()
    assert held.calls == 2
    assert await shown(alone, "flat") == before == await shown(alone, "three")


@pytest.mark.durable
async def test_a_disk_that_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not flushed becomes no snapshot, whichever flush was told of that."""
    async with open_snapshotter(root) as snapshotter:
        await commit(snapshotter, "one", one="1")
        real = mounting.sync_file_system
        failures = [OSError(errno.EIO, "Input/output error")]

        def fail(fd: int) -> None:
            if failures:
                raise failures.pop()
            real(fd)

        monkeypatch.setattr("snapfs.kernel.mounting.sync_file_system", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            await snapshotter.squash("one")
        assert [each.name for each in await snapshotter.walk()] == ["one"]

        async def another(*_: object) -> None:
            failures.append(OSError(errno.EIO, "Input/output error"))
            with pytest.raises(Unavailable):
                await snapshotter.flush()

        def link(layers: Sequence[str], target: str, **_: object) -> None:
            trio.from_thread.run(another)

        monkeypatch.setattr(squashing, "link_all", link)
        with pytest.raises(Unavailable, match="the disk failed meanwhile"):
            await snapshotter.squash("one")
        assert [each.name for each in await snapshotter.walk()] == ["one"]
        await until_empty(snapshotter, root)


async def test_what_listeners_hear(three: Snapshotter) -> None:
    heard: list[Change] = []
    three.subscribe(heard.append)
    made = await three.squash("three")
    assert [(each.before, each.after) for each in heard if not each.counted] == [(None, made)]
    heard.clear()
    before = await three.stat("three")
    gone = await three.stat("two")
    await three.dissolve("two")
    after = await three.stat("three")
    assert (before.id, before.node) != (after.id, after.node)
    assert [(each.before, each.after) for each in heard if not each.counted] == [(before, after), (gone, None)]


# -- dissolve


@pytest.mark.mounts
async def test_a_dissolve_while_much_waits_for_the_disk(three: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the kernel isn't asked who has what was mounted, for that takes long, but all processes are looked at."""
    monkeypatch.setattr("snapfs.services.rootfs.MUCH", 0)
    await three.prepare("web", "three")
    await three.mount("web")
    await three.dissolve("two")
    assert (await three.stat("three")).parent == "one"


@pytest.mark.mounts
async def test_who_needs_one_of_many_that_are_unmounted_waits_for_that_one_alone(
    alone: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes some hundredths of a second, and there may be hundreds."""
    for number in range(3):
        await alone.prepare(f"on-{number}", "three")
        await alone.mount(f"on-{number}")
    rootfs, kept = alone.rootfs, list[int]()
    assert rootfs is not None
    unmount = rootfs.unmounted

    @asynccontextmanager
    async def unmounted(number: int) -> AsyncIterator[Free]:
        if rootfs.holds(number):
            kept.append(len(alone._endings))
        async with unmount(number) as free:
            yield free

    monkeypatch.setattr(rootfs, "unmounted", unmounted)
    await alone.dissolve("two")
    assert kept == [0, 0, 0], "others that are kept unmounted meanwhile"
    await alone.mount("on-0")


@pytest.mark.parametrize("name", ["one", "two"])
async def test_a_dissolve(three: Snapshotter, root: Path, name: str) -> None:
    """What stood on it shows what it showed, is called so, and keeps its times; on that the others stand."""
    await three.prepare("web", "three")
    await three.view("peek", "three")
    expected = {key: await shown(three, key) for key in ("one", "two", "three", "web") if key != name}
    before = {each.name: each for each in await three.walk()}
    await three.dissolve(name)
    now = {each.name: each for each in await three.walk()}
    assert set(now) == set(before) - {name}
    assert {key: await shown(three, key) for key in expected} == expected
    child = "two" if name == "one" else "three"
    assert now[child].parent == before[name].parent
    for field in ("kind", "labels", "created", "updated", "origin"):
        assert getattr(now[child], field) == getattr(before[child], field)
    assert now[child].id > before["peek"].id
    assert {key: each.parent for key, each in now.items() if key != child} == {
        key: each.parent for key, each in before.items() if key not in (child, name)
    }
    assert sorted(os.listdir(root / "snapshots"), key=int) == [str(each) for each in sorted(each.id for each in now.values())]
    assert (await three.usage(child)).shared == 0
    await until_empty(three, root)


async def test_all_children_take_over(three: Snapshotter) -> None:
    await commit(three, "other", "two", other="x", same="x")
    await three.dissolve("two")
    assert await shown(three, "three") == {"one": "1", "two": "2", "three": "3", "same": "2"}
    assert await shown(three, "other") == {"one": "1", "two": "2", "other": "x", "same": "x"}
    assert {(await three.stat(name)).parent for name in ("three", "other")} == {"one"}


async def test_a_leaf_is_removed(three: Snapshotter) -> None:
    await three.dissolve("three")
    assert [each.name for each in await three.walk()] == ["one", "two"]


async def test_two_dissolves_at_once(three: Snapshotter) -> None:
    expected = await shown(three, "three")
    said: list[str] = []

    async def dissolve(name: str) -> None:
        try:
            await three.dissolve(name)
        except NotFound as error:
            said.append(str(error))

    async with trio.open_nursery() as nursery:
        for name in ("one", "two", "two"):
            nursery.start_soon(dissolve, name)
    assert [each.name for each in await three.walk()] == ["three"]
    assert len(said) == 1
    assert await shown(three, "three") == expected


async def test_a_child_that_comes_in_the_middle(alone: Snapshotter, held: Held) -> None:
    """A committed one takes over, too; an active one keeps it from going."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alone.dissolve, "two")
        await held.has_begun()
        await commit(alone, "late", "two", late="x")
        held.go_on.set()
    assert await shown(alone, "late") == {"one": "1", "two": "2", "same": "2", "late": "x"}
    held.go_on.clear()
    held.begun.clear()

    async def fails() -> None:
        with pytest.raises(FailedPrecondition, match='"active" \\(active\\) stands on it'):
            await alone.dissolve("one")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails)
        await held.has_begun()
        await alone.prepare("active", "one")
        held.go_on.set()


async def test_what_comes_and_goes_above_keeps_nothing_from_being_dissolved(
    alone: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built for a child is right, whatever stands on that by now."""
    builds = list[Sequence[str]]()

    def linked(layers: Sequence[str], target: str, **more: Any) -> None:
        builds.append(layers)
        trio.from_thread.run(alone.prepare, f"on-{len(builds)}", "three")
        link_all(layers, target, **more)

    monkeypatch.setattr(squashing, "link_all", linked)
    with trio.fail_after(20):
        await alone.dissolve("two")
    assert len(builds) == 1
    assert await shown(alone, "three") == {"one": "1", "two": "2", "same": "2", "three": "3"}


async def test_what_changes_all_the_time_is_not_waited_for(
    alone: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who makes and removes workspaces as fast as may be can keep a dissolve from its end; it says so."""
    service, looks = alone._squashing, 0
    look = service._refuse_used

    def looked(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        trio.from_thread.run(alone.prepare, f"on-{looks}", "three")
        look(*arguments)

    monkeypatch.setattr(service, "_refuse_used", looked)
    with trio.fail_after(20), pytest.raises(TryAgain, match='what stands on snapshot "two" changes all the time: try again'):
        await alone.dissolve("two")
    assert looks == squashing.TRIES
    await settled(lambda: trio.to_thread.run_sync(nothing_left, root, alone))
    monkeypatch.undo()
    await alone.dissolve("two")


async def test_what_goes_above_meanwhile_does_not_matter(alone: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    await alone.prepare("on", "three")
    looks, look = 0, alone._squashing._refuse_used

    def linked(layers: Sequence[str], target: str, **more: Any) -> None:
        trio.from_thread.run(alone.remove, "on")
        link_all(layers, target, **more)

    def looked(*arguments: Any) -> None:
        nonlocal looks
        looks += 1
        look(*arguments)

    monkeypatch.setattr(squashing, "link_all", linked)
    monkeypatch.setattr(alone._squashing, "_refuse_used", looked)
    await alone.dissolve("two")
    assert looks == 1


async def test_what_too_many_stand_on_stays(alone: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer would look at all of them."""
    monkeypatch.setattr("snapfs.rules.dissolve.MOST", 1)
    with pytest.raises(FailedPrecondition, match="more than 1 snapshots stand on it"):
        await alone.dissolve("one")
    await alone.dissolve("two")


async def test_who_uses_many_is_found_out_while_others_write(alone: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one look at the mounts, and not in the writer's thread, whatever stands on it."""
    for number in range(5):
        await alone.prepare(f"on-{number}", "three")
    looks, asked = list[threading.Thread](), list[threading.Thread]()

    def noting(function: Callable[..., Any], threads: list[threading.Thread]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            threads.append(threading.current_thread())
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(alone._root.mounted, "scan", noting(alone._root.mounted.scan, looks))
    monkeypatch.setattr(alone._root.in_use, "has_overlay", noting(alone._root.in_use.has_overlay, asked))
    await alone.dissolve("two")
    assert len(looks) == 1
    assert len(asked) == 5
    writer = await alone._write_record(lambda _: threading.current_thread())
    assert writer not in (*looks, *asked)


# -- by itself


async def workspace(snapshotter: Snapshotter, count: int) -> None:
    """The workspace ``web`` on ``base``, with so many checkpoints."""
    await commit(snapshotter, "base", base="b")
    await snapshotter.prepare("web", "base", {"team": "blue"})
    for number in range(1, count + 1):
        await write(snapshotter, "web", **{f"f{number}": str(number), "same": str(number)})
        await snapshotter.checkpoint("web")


def deep(count: int) -> Options:
    return Options(sync=Sync.NONE, squash_depth=count)


async def test_checkpoints_squash_by_themselves(root: Path) -> None:
    async with open_snapshotter(root, deep(5)) as snapshotter:
        await workspace(snapshotter, 3)
        await snapshotter.view("peek", "web@3")
        assert await depth(snapshotter, "web") == 4
        await write(snapshotter, "web", f4="4")
        await snapshotter.checkpoint("web")

        async def short() -> bool:
            return await depth(snapshotter, "web") == 1

        await settled(short)
        base = await snapshotter.stat("web@4-squashed")
        assert base.labels == {"team": "blue", "snapfs.squash": "web@4", "snapfs.workspace": "web"}
        now = await snapshotter.stat("web")
        assert (now.parent, now.labels) == ("web@4-squashed", {"team": "blue"})
        assert await shown(snapshotter, "web") == await shown(snapshotter, "web@4")
        assert [(each.info.name, each.squash) for each in await snapshotter.checkpoints("web")] == [
            ("web@1", ""),
            ("web@2", ""),
            ("web@3", ""),
            ("web@4", "web@4-squashed"),
        ]
        assert (await snapshotter.checkpoint("web")).parent == "web@4-squashed"
        for to, parent in ((2, "web@2"), (5, "web@5"), ("web@4-squashed", "web@4-squashed"), (5, "web@5"), ("base", "base")):
            assert (await snapshotter.rollback("web", to)).parent == parent
        check_indexes(snapshotter.records)


async def test_never_by_itself(root: Path) -> None:
    async with open_snapshotter(root, deep(0)) as snapshotter:
        await workspace(snapshotter, 20)
        await trio.testing.wait_all_tasks_blocked()
        assert await depth(snapshotter, "web") == 21


async def test_what_stands_on_it_moves_but_views_and_containerds(root: Path, held: Held) -> None:
    async with open_snapshotter(root, deep(3)) as snapshotter:
        await workspace(snapshotter, 1)
        await snapshotter.checkpoint("web")
        await held.has_begun()
        await snapshotter.view("peek", "web@2")
        await snapshotter.prepare("theirs", "web@2", origin="containerd")
        await snapshotter.fork("web@2", "other")
        await snapshotter.checkpoint("web")  # nobody waits for the squash
        await snapshotter.update("web@3", {"x": "y"}, ["labels.x"])
        held.go_on.set()

        async def moved() -> bool:
            return (await snapshotter.stat("other")).parent == "web@2-squashed"

        await settled(moved)
        parents = {each.name: each.parent for each in await snapshotter.walk()}
        assert parents["web@3"] == "web@2-squashed"
        assert parents["peek"] == parents["theirs"] == "web@2"
        with pytest.raises(HasChildren):
            await snapshotter.remove("web@2")


async def test_nothing_is_made_for_nobody(root: Path, held: Held) -> None:
    """The workspace has gone while its layers were linked."""
    async with open_snapshotter(root, deep(2)) as snapshotter:
        await workspace(snapshotter, 1)
        await held.has_begun()
        await snapshotter.remove("web")
        held.go_on.set()
        await until_empty(snapshotter, root)
        await trio.testing.wait_all_tasks_blocked()
        assert [each.name for each in await snapshotter.walk()] == ["base", "web@1"]


async def test_what_keeps_it_from_that_is_told_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise FailedPrecondition("it has what can't be squashed")

    monkeypatch.setattr(squashing, "link_all", fail)
    async with open_snapshotter(root, deep(2)) as snapshotter:
        await workspace(snapshotter, 3)

        async def tried() -> bool:
            return calls >= 2

        await settled(tried)
        assert await depth(snapshotter, "web") == 4
    said = [each.message for each in caplog.records if "squashed" in each.message]
    assert said == ["a workspace stands on many layers, which can't be made one: it has what can't be squashed"]


async def test_many_checkpoints_while_somebody_reads(root: Path) -> None:
    """Three hundred; the workspace shows all that was ever written, in each moment, and stands on few layers in the end."""
    async with open_snapshotter(root, deep(10)) as snapshotter:
        stop, wrong, seen = threading.Event(), list[str](), 0

        def read() -> None:
            nonlocal seen
            while not stop.is_set():
                with snapshotter.records.reading() as reader:
                    found = reader.find("web")
                    if found is None:
                        wrong.append("no workspace")
                        return
                    lowers = [snapshotter.layer_path(number) for number in reader.chain(found[1])]
                    last = reader.last_checkpoint("web")
                names = {name for lower in lowers for name in os.listdir(lower)}
                seen += 1
                if not names >= {f"f{number}" for number in range(1, last + 1)}:
                    wrong.append(f"{last}: {sorted(names)}")

        await workspace(snapshotter, 1)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            for number in range(2, 301):
                await write(snapshotter, "web", **{f"f{number}": str(number), "same": str(number)})
                await snapshotter.checkpoint("web")
        finally:
            stop.set()
            await trio.to_thread.run_sync(thread.join)
        assert wrong == []
        assert seen > 10

        async def short() -> bool:
            return await depth(snapshotter, "web") < 10

        await settled(short)
        assert await shown(snapshotter, "web") == {f"f{n}": str(n) for n in range(1, 301)} | {"base": "b", "same": "300"}
        check_indexes(snapshotter.records)


async def test_too_deep_says_what_to_do(root: Path) -> None:
    """By hand, where it does not happen by itself; and the command that it names helps."""
    async with open_snapshotter(root, deep(0)) as snapshotter:
        await workspace(snapshotter, 499)
        for call in (partial(snapshotter.checkpoint, "web"), partial(snapshotter.fork, "web", "other")):
            with pytest.raises(TooDeep, match=r"snapfs squash web@499; or .*: snapfs prune --keep-last 100 web$"):
                await call()
        assert (await snapshotter.squash("web@499")).parent is None
        await snapshotter.prepare("next", "web@499-squashed")
    async with open_snapshotter(root, deep(128)) as snapshotter:
        with pytest.raises(TooDeep, match=r"they are being made one: try again in a moment$"):
            await snapshotter.fork("web", "other")

        async def short() -> bool:
            return await depth(snapshotter, "web") < 10

        await settled(short)
        await snapshotter.fork("web", "other")


# -- the tree


def command(path: Path, text: str = "") -> str:
    """Write one line; what can be read then."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.write(fd, text.encode() + b"\n")
        return os.read(fd, 1000).decode()
    finally:
        os.close(fd)


def tops(directory: Path) -> dict[str, str]:
    """What the kernel's merged file system of a snapshot shows at its top."""
    return files(directory / "rootfs")


def test_a_session_with_echo(daemon: Daemon) -> None:
    three = chain(daemon.mnt, "one", "two", "three")
    script = """
    echo flat > three/squash; ls flat/rootfs/ | tr '\\n' ' '; cat flat/labels/snapfs.squash
    exec 3<>three/squash; echo >&3; cat <&3; exec 3>&-
    cat one/dissolve
    echo yes > two/dissolve; ls; readlink three/parent
    """
    done = subprocess.run(
        ["bash", "-e"], input=script, cwd=daemon.mnt / "committed", capture_output=True, text=True, check=False
    )
    text = "Write anything here: this snapshot goes, and the committed ones that stand on it take over what it had."
    expected = ["one same three two three", "three-squashed", text, "flat", "one", "three", "three-squashed"]
    assert (done.stdout.splitlines(), done.stderr) == ([*expected, "../../committed/one"], "")
    assert tops(three) == tops(daemon.mnt / "committed/flat") == {"one": "one", "two": "two", "three": "three", "same": "three"}


def test_what_the_kernel_remembers_is_right_at_once(daemon: Daemon) -> None:
    """Of what has taken over: links, listings, changes and sizes; its directory stays the same one, also over a restart."""
    three = chain(daemon.mnt, "one", "two", "three")
    os.mkdir(three / "active/web")
    inode, before = os.stat(three).st_ino, info(three)
    standing = os.open(three, os.O_RDONLY)
    try:
        assert (three / "changes").read_text() == "C /same\nA /three\n"
        for name in ("parent", "diff"):
            os.readlink(three / name)
        for name in ("info.json", "usage.json"):
            (three / name).read_text()
        assert os.listdir(three / "active") == ["web"]
        command(daemon.mnt / "committed/two/dissolve")
        assert (three / "changes").read_text() == "C /same\nA /three\nA /two\n"
        now = info(three)
        assert {**now, "id": 0, "parent": ""} == {**before, "id": 0, "parent": ""}
        assert (now["parent"], now["id"] > before["id"]) == ("one", True)
        assert os.readlink(three / "parent") == "../../committed/one"
        assert os.readlink(three / "diff") == f"{daemon.root}/snapshots/{now['id']}/fs"
        assert usage(three)["inodes"] == 4
        assert os.listdir(three / "active") == ["web"]
        assert f"/{now['id']}/fs:" in (daemon.mnt / "active/web/mounts.json").read_text()
        assert os.readlink(daemon.mnt / "active/web/parent") == "../../committed/three"
        assert os.readlink(daemon.mnt / f"by-id/{now['id']}") == "../committed/three"
        assert sorted(os.listdir(daemon.mnt / "committed")) == ["one", "three"]
        assert os.listdir(daemon.mnt / "committed/one/committed") == ["three"]
        assert os.fstat(standing).st_ino == os.stat(three).st_ino == inode
        assert os.listdir(standing) == os.listdir(three)
    finally:
        os.close(standing)
    assert daemon.stop() == 0
    daemon.start()
    assert os.stat(three).st_ino == inode
    assert info(three) == now


def test_the_error_is_that_of_write(daemon: Daemon) -> None:
    three = chain(daemon.mnt, "one", "two", "three")
    os.mkdir(three / "view/peek")
    for file, text, number, said in (
        ("squash", "one", errno.EEXIST, '"one" already exists'),
        ("squash", "a/b", errno.EINVAL, "%2F"),
        ("squash", "x" * 256, errno.ENAMETOOLONG, "255"),
        ("dissolve", "", errno.EPERM, '"peek" \\(view\\) stands on it'),
    ):
        with refused(daemon, number, "write", f"committed/three/{file}", said):
            command(three / file, text)
    for kind in ("active", "view"):
        os.mkdir(daemon.mnt / kind / f"k-{kind}")
        for file in ("squash", "dissolve"):
            assert file not in os.listdir(daemon.mnt / kind / f"k-{kind}")


def test_events(daemon: Daemon) -> None:
    three = chain(daemon.mnt, "one", "two", "three")
    seen = len((daemon.mnt / ".snapfs/events").read_text().splitlines())
    command(three / "squash", "flat")
    command(daemon.mnt / "committed/two/dissolve")
    lines = [json.loads(line) for line in (daemon.mnt / ".snapfs/events").read_text().splitlines()[seen:]]
    assert [(line["operation"], line["key"], line["parent"]) for line in lines] == [
        ("squash", "flat", None),
        ("update", "three", "one"),
        ("remove", "two", "one"),
    ]


def test_layers_that_are_in_use(daemon: Daemon, tmp_path: Path) -> None:
    """What is mounted on them anywhere, by whomever, keeps a snapshot from being dissolved; what the daemon itself has mounted
    and nobody uses does not."""
    three = chain(daemon.mnt, "one", "two", "three")
    os.mkdir(three / "active/web")
    os.mkdir(three / "view/peek")
    web, two = daemon.mnt / "active/web", daemon.mnt / "committed/two"
    expected = tops(web)
    with somebody(web / "rootfs") as pid, failing(errno.EBUSY):
        command(two / "dissolve")
    assert f"process {pid} (sleep)" in daemon.error_log()[-1]
    until(lambda: not Path(f"/proc/{pid}/cwd").exists())
    for snapshot in (web, daemon.mnt / "view/peek"):
        with mounted(snapshot, tmp_path / "target"):
            with failing(errno.EBUSY):
                command(two / "dissolve")
            assert "can't be dissolved while its files are in use by way of \"" in daemon.error_log()[-1]
            assert files(tmp_path / "target") == expected
    assert tops(web) == tops(daemon.mnt / "view/peek") == expected
    command(two / "dissolve")
    assert tops(web) == tops(daemon.mnt / "view/peek") == expected
    (web / "rootfs/one").unlink()
    assert (web / "changes").read_text() == "D /one\n"


def test_layers_that_mount_sh_names_by_links_or_numbers(daemon: Daemon, tmp_path: Path) -> None:
    """A mount whose text names layers otherwise than by their paths."""
    chain(daemon.mnt, "one", "two", "three")
    target = tmp_path / "target"
    target.mkdir()
    numbers = [info(daemon.mnt / "committed" / name)["id"] for name in ("three", "two", "one")]
    os.symlink(daemon.root / f"snapshots/{numbers[0]}/fs", tmp_path / "0")
    os.symlink(daemon.root / f"snapshots/{numbers[1]}/fs", tmp_path / "1")
    for where, text in ((daemon.root / "snapshots", ":".join(f"{number}/fs" for number in numbers)), (tmp_path, "0:1")):
        mount = ["mount", "-t", "overlay", "-o", f"lowerdir={text}", "overlay", str(target)]
        subprocess.run(mount, cwd=where, check=True, env={**os.environ, "LIBMOUNT_FORCE_MOUNT2": "always"})
        try:
            with failing(errno.EBUSY):
                command(daemon.mnt / "committed/two/dissolve")
        finally:
            subprocess.run(["umount", str(target)], check=True)
    command(daemon.mnt / "committed/two/dissolve")


@pytest.mark.mounts
async def test_a_workspace_that_somebody_is_in_moves(root: Path, held: Held) -> None:
    """It goes on beneath that process as it was; what it was mounted on stays until it is left."""
    async with open_snapshotter(root, deep(3)) as snapshotter:
        await snapshotter.prepare("web")
        await write(snapshotter, "web", **{"1": "1", "2": "2"})
        await snapshotter.checkpoint("web")
        (Path(await snapshotter.mount("web")) / "1").unlink()
        for number in (2, 3):
            await write(snapshotter, "web", **{str(number): str(number)})
            await snapshotter.checkpoint("web")
        await held.has_begun()
        rootfs = Path(await snapshotter.mount("web"))
        with somebody(rootfs) as pid:
            here = Path(f"/proc/{pid}/cwd")
            held.go_on.set()

            async def moved() -> bool:
                return (await snapshotter.stat("web")).parent == "web@3-squashed"

            await settled(moved)
            (here / "4").write_text("4")
            for call in (
                partial(snapshotter.remove, "web@3"),
                partial(snapshotter.remove, "web@3", refuse_mounted=True),
                partial(snapshotter.dissolve, "web@1"),
                partial(snapshotter.dissolve, "web@2"),
                partial(snapshotter.checkpoint, "web"),
            ):
                with pytest.raises(Busy):
                    await call()
            assert files(here) == files(rootfs) == {"2": "2", "3": "3", "4": "4"}
        await trio.to_thread.run_sync(until, lambda: not here.exists())
        await snapshotter.checkpoint("web")
        assert (await snapshotter.stat("web@4")).parent == "web@3-squashed"
        assert await snapshotter.changes("web@4", list) == ["A /4\n"]
        rootfs = Path(await snapshotter.mount("web"))
        for name in ("web@3", "web@2"):
            await snapshotter.remove(name, refuse_mounted=True)
        assert files(rootfs) == {"2": "2", "3": "3", "4": "4"}


def test_the_list_of_checkpoints_says_it(make_daemon: Make) -> None:
    daemon = make_daemon("-o", "squash_depth=2").start()
    os.mkdir(daemon.mnt / "active/web")
    web = daemon.mnt / "active/web"
    for _ in range(2):
        command(web / "checkpoint")
    until(lambda: os.readlink(web / "parent") == "../../committed/web@2-squashed")
    lines = [line.split("\t") for line in (web / "checkpoint").read_text().splitlines()]
    assert [(line[1], line[5]) for line in lines] == [("web@1", "."), ("web@2", "web@2-squashed")]
    said = Command(daemon.mnt)("checkpoint", "--list", "web")
    assert [line.split()[-1] == "web@2-squashed" for line in said.splitlines()] == [False, False, True]
    assert daemon.stop() == 0
