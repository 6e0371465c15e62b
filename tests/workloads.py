"""What is under way when a daemon is killed: steps through the library or the tree, and what must be true after each.

The same list of steps runs in the process that is killed and, as a model, in the test that judges what is left.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from snapfs import Kind, Options, SnapshotError, Snapshotter, open_snapshotter
from snapfs.fuse.serve import MountOptions, serve
from snapfs.options import Sync
from snapfs.root import pool
from tests.crash_invariants import Snapshot, State
from tests.syscalls import Channel

Labels = dict[str, str]
Then = Callable[[State], None]


@dataclass(frozen=True)
class Step:
    """One call of the library: ``do`` makes it, ``then`` is what it does to the model."""

    text: str
    do: Callable[[Snapshotter], Awaitable[object]]
    then: Then = lambda state: None


@dataclass(frozen=True)
class Deed:
    """One system call, or a few that change one thing together, on the mounted tree."""

    text: str
    do: Callable[[Path], object]
    then: Then = lambda state: None


def _made(kind: Kind, key: str, parent: str | None, labels: Labels | None = None) -> Then:
    return lambda state: state.update({key: Snapshot(kind, parent, tuple(sorted((labels or {}).items())))})


def _committed(name: str, key: str, parent: str | None, labels: Labels | None) -> Then:
    def then(state: State) -> None:
        before = state.pop(key)
        kept = before.labels if labels is None else tuple(sorted(labels.items()))
        state[name] = replace(before, kind=Kind.COMMITTED, parent=before.parent or parent, labels=kept)

    return then


def _renamed(old: str, new: str) -> Then:
    def then(state: State) -> None:
        state[new] = state.pop(old)
        for name, snapshot in state.items():
            if snapshot.parent == old:
                state[name] = replace(snapshot, parent=new)

    return then


def _labelled(key: str, change: Labels) -> Then:
    """Labels set, or deleted where the value is empty."""

    def then(state: State) -> None:
        labels = {label: value for label, value in {**dict(state[key].labels), **change}.items() if value}
        state[key] = replace(state[key], labels=tuple(sorted(labels.items())))

    return then


def _kept(key: str, name: str, message: str) -> Then:
    """``key`` goes on on a checkpoint of it, the first or the next."""

    def then(state: State) -> None:
        before = dict(state[key].labels)
        number = name.rpartition("@")[2]
        ours = {"snapfs.workspace": key, "snapfs.checkpoint": number, "snapfs.message": message}
        _committed(name, key, None, {**before, **{label: value for label, value in ours.items() if value}})(state)
        _made(Kind.ACTIVE, key, name, before)(state)

    return then


def _kept_a_copy(key: str, name: str, message: str) -> Then:
    """``key`` goes on beside a checkpoint of it."""

    def then(state: State) -> None:
        before = state[key]
        _kept(key, name, message)(state)
        state[key] = before

    return then


def _rolled_back(key: str, parent: str | None) -> Then:
    return lambda state: state.update({key: replace(state[key], parent=parent, files=())})


def _forked(key: str, name: str, new: str) -> Then:
    def then(state: State) -> None:
        _kept(key, name, f"forked as {new}")(state)
        _made(Kind.ACTIVE, new, name)(state)

    return then


def prepare(key: str, parent: str | None = None, labels: Labels | None = None) -> Step:
    return Step(f"prepare {key}", lambda s: s.prepare(key, parent, labels), _made(Kind.ACTIVE, key, parent, labels))


def view(key: str, parent: str | None = None) -> Step:
    return Step(f"view {key}", lambda s: s.view(key, parent), _made(Kind.VIEW, key, parent))


def commit(name: str, key: str, *, onto: str | None = None, labels: Labels | None = None, wait: bool = True) -> Step:
    return Step(
        f"commit {name}",
        lambda s: s.commit(name, key, labels, onto, wait=wait),
        _committed(name, key, onto, labels or {}),
    )


def remove(key: str, *, wait: bool = True) -> Step:
    return Step(f"remove {key}", lambda s: s.remove(key, wait=wait), lambda state: state.__delitem__(key))


def rename(old: str, new: str) -> Step:
    return Step(f"rename {old}", lambda s: s.rename(old, new), _renamed(old, new))


def checkpoint(key: str, name: str, message: str = "", *, wait: bool = True) -> Step:
    return Step(f"checkpoint {key}", lambda s: s.checkpoint(key, message, wait=wait), _kept(key, name, message))


def keep_copy(key: str, name: str, message: str = "") -> Step:
    return Step(f"copy {key}", lambda s: s.checkpoint(key, message, copy=True), _kept_a_copy(key, name, message))


def rollback(key: str, to: str | int | None, parent: str | None) -> Step:
    return Step(f"rollback {key}", lambda s: s.rollback(key, to), _rolled_back(key, parent))


def fork(key: str, name: str, new: str) -> Step:
    return Step(f"fork {key}", lambda s: s.fork(key, new), _forked(key, name, new))


def _shown(state: State, name: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    above: str | None = name
    while above is not None:
        found = dict(state[above].files) | found
        above = state[above].parent
    return tuple(sorted(found.items()))


_OURS = ("pin", "snapfs.workspace", "snapfs.checkpoint", "snapfs.message")


def _squashed(name: str, new: str, **more: str) -> Then:
    def then(state: State) -> None:
        kept = {label: value for label, value in state[name].labels if label not in _OURS}
        labels = {**kept, "snapfs.squash": name, **more}
        state[new] = Snapshot(Kind.COMMITTED, None, tuple(sorted(labels.items())), _shown(state, name))

    return then


def _moved(key: str, name: str) -> Then:
    """A squash was made of ``name``, and ``key`` stands on that."""

    def then(state: State) -> None:
        _squashed(name, f"{name}-squashed", **{"snapfs.workspace": key})(state)
        state[key] = replace(state[key], parent=f"{name}-squashed")

    return then


def _dissolved(name: str) -> Then:
    def then(state: State) -> None:
        gone = state.pop(name)
        for child, snapshot in state.items():
            if snapshot.parent == name:
                files = tuple(sorted((dict(gone.files) | dict(snapshot.files)).items()))
                state[child] = replace(snapshot, parent=gone.parent, files=files)

    return then


def squash(name: str, new: str) -> Step:
    return Step(f"squash {name}", lambda s: s.squash(name, new), _squashed(name, new))


def _flat() -> Step:
    """A squash of what inherits an image.json, which it has of its own then."""

    def then(state: State) -> None:
        _squashed("leaf", "flat")(state)
        state["flat"] = replace(state["flat"], image=state["base"].image)

    return Step("squash leaf", lambda s: s.squash("leaf", "flat"), then)


def dissolve(name: str) -> Step:
    return Step(f"dissolve {name}", lambda s: s.dissolve(name), _dissolved(name))


def shortened(key: str, name: str) -> Step:
    """What a checkpoint ``name`` of ``key`` has begun is done."""

    async def do(snapshotter: Snapshotter) -> None:
        while (await snapshotter.stat(key)).parent == name:
            await trio.sleep(0.001)

    return Step(f"shorten {key}", do, _moved(key, name))


def label(key: str, **change: str) -> Step:
    paths = [f"labels.{name}" for name in change]
    return Step(f"label {key}", lambda s: s.update(key, change, paths), _labelled(key, change))


def move_label(key: str, old: str, new: str) -> Step:
    def then(state: State) -> None:
        _labelled(key, {new: dict(state[key].labels)[old], old: ""})(state)

    return Step(f"move label of {key}", lambda s: s.move_label(key, old, new), then)


def _called(key: str, *names: str) -> Then:
    """From now on these are the names of ``key`` in images/, which no other has."""

    def then(state: State) -> None:
        for other, snapshot in state.items():
            left = tuple(name for name in snapshot.images if name not in names)
            state[other] = replace(snapshot, images=tuple(sorted(names)) if other == key else left)

    return then


def name_image(key: str, name: str, *names: str, replace: bool = False) -> Step:
    """Give ``key`` the name; ``names`` are those that it has besides."""
    return Step(f"name {key}", lambda s: s.name_image(key, name, replace=replace), _called(key, name, *names))


def rename_image(key: str, old: str, new: str, *names: str, replace: bool = False) -> Step:
    return Step(f"rename {old} in images", lambda s: s.rename_image(old, new, replace=replace), _called(key, new, *names))


def unname_image(key: str, name: str, *names: str) -> Step:
    return Step(f"unname {name}", lambda s: s.unname_image(name), _called(key, *names))


def set_image(key: str, text: str | None) -> Step:
    def then(state: State) -> None:
        state[key] = replace(state[key], image=text or "")

    return Step(f"image of {key}", lambda s: s.set_image(key, text), then)


def mount(key: str) -> Step:
    return Step(f"mount {key}", lambda s: s.mount(key))


def cleanup() -> Step:
    return Step("cleanup", lambda s: s.cleanup())


def usage(key: str) -> Step:
    return Step(f"usage {key}", lambda s: s.usage(key))


def flush() -> Step:
    return Step("flush", lambda s: s.flush())


def write(key: str, file: str, text: str) -> Step:
    """Put a file into the layer of the active snapshot ``key``, as whoever has mounted it would."""

    async def do(snapshotter: Snapshotter) -> None:
        path = Path(snapshotter.layers.fs((await snapshotter.stat(key)).id), file)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def then(state: State) -> None:
        state[key] = replace(state[key], files=tuple(sorted({**dict(state[key].files), file: text}.items())))

    return Step(f"write {key}", do, then)


GROUND = [
    prepare("0"),
    write("0", "etc/hosts", "ground"),
    commit("base", "0", labels={"team": "blue"}),
    prepare("1", "base"),
    write("1", "top.txt", "top"),
    commit("top", "1"),
    prepare("web", "top", {"team": "red", "n": "1"}),
    write("web", "index.html", "hello"),
    prepare("loose"),
    write("loose", "file", "loose"),
    write("loose", "more/file", "more"),
    view("peek", "base"),
    prepare("old", "top"),
    write("old", "a/b", "c"),
    prepare("2", "top"),
    commit("leaf", "2"),
]
"""What each root holds to begin with: a chain, actives on it and on nothing, a view, something to remove."""


@dataclass(frozen=True)
class Workload:
    """Several ``actors`` at once, each taking its steps one after the other, on a root that holds GROUND.

    From ``whole`` on opening the root is part of what is watched.  ``before`` was done, on top of GROUND, by a process that was
    killed when it had done it; while ``held`` names a snapshot, somebody has its rootfs open from then on.
    """

    name: str
    actors: list[list[Step]] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    whole: bool = False
    fresh: bool = False
    before: list[Step] = field(default_factory=list)
    held: str = ""
    pool: int = 2
    close: bool = True

    def ground(self) -> State:
        return {} if self.fresh else after(GROUND)


def after(steps: Sequence[Step] | Sequence[Deed], state: State | None = None) -> State:
    """What a root holds after ``steps``."""
    state = dict(state or {})
    for step in steps:
        step.then(state)
    return state


_ASYNC = Options(async_remove=True)

_MOUNTED = [mount("web"), mount("top"), mount("peek"), mount("base")]

WORKLOADS = [
    Workload("opening a fresh root", whole=True, fresh=True),
    Workload("opening and closing", whole=True),
    Workload("opening with a full pool", whole=True, pool=pool.POOL),
    Workload(
        "opening after a crash",
        whole=True,
        before=[*_MOUNTED, remove("old", wait=False), remove("leaf"), commit("loose2", "loose", wait=False), prepare("late")],
    ),
    Workload("opening after a crash with a rootfs in use", whole=True, before=[*_MOUNTED, prepare("late", "top")], held="web"),
    Workload(
        "opening after a crash with async_remove",
        whole=True,
        before=[*_MOUNTED, remove("old"), remove("leaf")],
        options=_ASYNC,
    ),
    Workload("prepare", [[prepare("new", "top", {"a": "b"})]]),
    Workload("prepare on nothing", [[prepare("new"), prepare("newer"), prepare("newest")]]),
    Workload("prepare with an empty pool", [[prepare("new", "top")]], pool=0),
    Workload("view", [[view("new", "top")]]),
    Workload("commit", [[commit("web", "web", labels={"a": "b"}), usage("web")]]),
    Workload("commit without wait", [[commit("v1", "web", wait=False), usage("v1"), flush()]]),
    Workload("commit with sync=none", [[commit("v1", "web"), usage("v1")]], options=Options(sync=Sync.NONE)),
    Workload("rebase commit", [[commit("v1", "loose", onto="top"), usage("v1")]]),
    Workload("commit while mounted", [[mount("web"), commit("v1", "web"), mount("v1"), usage("v1")]]),
    Workload("remove an active", [[remove("old")]]),
    Workload("remove without wait", [[remove("old", wait=False), cleanup()]]),
    Workload("remove a committed", [[remove("leaf")]]),
    Workload("remove a view", [[remove("peek")]]),
    Workload("remove while mounted", [[mount("old"), remove("old")]]),
    Workload("rename", [[rename("web", "web2"), rename("base", "ground")]]),
    Workload("checkpoint", [[checkpoint("web", "web@1", "one"), checkpoint("web", "web@2", wait=False)]]),
    Workload("checkpoint while mounted", [[mount("web"), checkpoint("web", "web@1"), mount("web")]]),
    Workload(
        "a copy", [[mount("web"), keep_copy("web", "web@1", "one"), keep_copy("web", "web@2"), rollback("web", 1, "web@1")]]
    ),
    Workload("rollback", [[rollback("web", None, "top"), checkpoint("web", "web@1"), rollback("web", 0, "top")]]),
    Workload("rollback with async_remove", [[rollback("web", "top", "top"), cleanup()]], options=_ASYNC),
    Workload("fork", [[fork("web", "web@1", "other"), fork("other", "other@1", "third")]]),
    Workload("squash", [[squash("leaf", "flat"), usage("flat"), prepare("next", "flat")]]),
    Workload("squash with sync=none", [[squash("base", "flat"), usage("flat")]], options=Options(sync=Sync.NONE)),
    Workload("squash by itself", [[checkpoint("old", "old@1"), shortened("old", "old@1")]], options=Options(squash_depth=3)),
    Workload(
        "dissolve",
        [[remove("web"), checkpoint("old", "old@1"), dissolve("top"), usage("leaf"), remove("peek"), dissolve("base")]],
    ),
    Workload("dissolve with async_remove", [[remove("web"), remove("old"), dissolve("top"), cleanup()]], options=_ASYNC),
    Workload("labels", [[label("web", team="green", more="x"), label("web", n=""), move_label("base", "team", "crew")]]),
    Workload(
        "names in images",
        [
            [
                name_image("top", "shop"),
                name_image("base", "b"),
                name_image("base", "shop", "b", replace=True),
                rename_image("base", "b", "c", "shop"),
                rename("base", "ground"),
                unname_image("ground", "c", "shop"),
                name_image("leaf", "l"),
                rename_image("leaf", "l", "shop", replace=True),
            ]
        ],
    ),
    Workload(
        "names of what goes on",
        [[remove("web"), remove("old"), name_image("leaf", "l"), dissolve("top"), unname_image("leaf", "l"), remove("leaf")]],
    ),
    Workload(
        "image.json",
        [[set_image("base", '{"a": 1}'), set_image("base", '{"b": 2}'), set_image("leaf", "{}"), set_image("base", None)]],
    ),
    Workload("image.json of a squash", [[set_image("base", '{"a": 1}'), _flat(), usage("flat"), prepare("next", "flat")]]),
    Workload("cleanup", [[cleanup()]]),
    Workload("cleanup with async_remove", [[remove("old"), remove("leaf"), cleanup()]], options=_ASYNC),
    Workload("mount", [[mount("web"), mount("top"), mount("loose"), mount("base")]]),
    Workload("closing while mounted", [_MOUNTED]),
    Workload("a life", [[prepare("a"), commit("b", "a"), prepare("c", "b"), remove("c"), remove("b"), prepare("a")]]),
    Workload(
        "all at once",
        [
            [prepare("n1", "top"), commit("n1c", "n1", wait=False), usage("n1c"), rename("n1c", "n1d")],
            [prepare("n2"), label("n2", a="1", b="2"), commit("n2c", "n2", onto="base"), prepare("n3", "n2c")],
            [remove("old"), prepare("old", "base"), remove("old", wait=False)],
            [view("n4", "base"), mount("n4"), remove("n4"), cleanup()],
            [mount("web"), label("web", team="green"), commit("web", "web")],
            [rename("loose", "free"), commit("freed", "free", wait=False), mount("freed")],
            [prepare("w", "base"), checkpoint("w", "w@1", "a"), fork("w", "w@2", "w2"), rollback("w", 1, "w@1"), remove("w2")],
            [name_image("leaf", "l"), rename_image("leaf", "l", "m"), set_image("leaf", "{}"), unname_image("leaf", "m")],
        ],
    ),
    Workload(
        "all at once with async_remove",
        [
            [prepare("n1", "top"), remove("n1"), prepare("n1", "base"), commit("n1", "n1")],
            [remove("old"), cleanup(), prepare("old")],
            [remove("leaf"), view("leaf", "top"), cleanup()],
            [mount("web"), commit("web2", "web"), remove("web2")],
        ],
        options=_ASYNC,
    ),
]


def named(name: str) -> Workload:
    return next(workload for workload in WORKLOADS if workload.name == name)


# -- in the process that is killed


def lay_ground(channel: Channel, root: str) -> None:
    """Make the root that all begin with."""

    async def run() -> None:
        async with open_snapshotter(root) as snapshotter:
            for step in GROUND:
                await step.do(snapshotter)

    trio.run(run)


def go_before(channel: Channel, root: str, name: str) -> None:
    """Do what was done before, and wait to be killed."""
    workload = named(name)
    pool.POOL = workload.pool

    async def run() -> None:
        async with open_snapshotter(root, workload.options) as snapshotter:
            for step in workload.before:
                await step.do(snapshotter)
            _tell_ids(channel, snapshotter)
            if workload.held:
                channel.say("rootfs", await snapshotter.mount(workload.held))
            channel.say("ready")
            channel.wait()

    trio.run(run)


def _tell_ids(channel: Channel, snapshotter: Snapshotter) -> None:
    with snapshotter.records.reading() as reader:
        channel.say("ids", max(reader.ids(), default=0))


def library(channel: Channel, root: str, name: str, probe: bool) -> None:
    """Run a workload, and if ``probe`` see whether the store still answers.

    Says ["done", actor] after each step, ["failed", actor, errno, words] where one is refused.
    """
    workload = named(name)
    pool.POOL = workload.pool
    if workload.whole:
        channel.watch(all_opens=probe)

    async def act(snapshotter: Snapshotter, number: int) -> None:
        for step in workload.actors[number]:
            try:
                await step.do(snapshotter)
            except SnapshotError as error:
                channel.say("failed", number, getattr(error, "errno", None), str(error))
                return
            channel.say("done", number)
            _tell_ids(channel, snapshotter)

    async def run() -> None:
        async with open_snapshotter(root, workload.options) as snapshotter:
            if not workload.whole:
                while len(snapshotter.layers.pool._ready) < workload.pool:
                    await trio.sleep(0)
                channel.watch(all_opens=probe)
            channel.say("opened")
            async with trio.open_nursery() as nursery:
                for number in range(len(workload.actors)):
                    nursery.start_soon(act, snapshotter, number)
            if probe:
                await _still_works(channel, snapshotter)
        channel.say("closed")

    try:
        trio.run(run)
    except SnapshotError as error:
        channel.say("refused", str(error))


async def _still_works(channel: Channel, snapshotter: Snapshotter) -> None:
    try:
        await snapshotter.walk()
        await snapshotter.prepare("a trial")
        await snapshotter.update("a trial", {"a": "b"})
        await snapshotter.commit("a trial", "a trial")
        await snapshotter.remove("a trial")
    except SnapshotError as error:
        channel.say("mute", str(error))


def daemon(channel: Channel, root: str, mountpoint: str, watch: bool) -> None:
    """What ``snapfs serve`` does; says ["ready"]."""
    pool.POOL = 2

    def ready() -> None:
        if watch:
            channel.watch()
        channel.say("ready")

    trio.run(serve, root, mountpoint, Options(), MountOptions(), ready)


# -- clients of the mounted tree


def mkdir(path: str) -> Deed:
    *above, kind, key = path.split("/")
    parent = above[-1] if above else None
    return Deed(f"mkdir {path}", lambda mnt: os.mkdir(mnt / path), _made(Kind(kind), key, parent))


def mv(old: str, new: str) -> Deed:
    *_, old_kind, key = old.split("/")
    *above, kind, name = new.split("/")
    if kind == "committed" and old_kind != kind:
        then = _committed(name, key, above[-1] if above else None, None)
    else:
        then = _renamed(key, name)
    return Deed(f"mv {old} {new}", lambda mnt: os.rename(mnt / old, mnt / new), then)


def rmdir(path: str) -> Deed:
    return Deed(f"rmdir {path}", lambda mnt: os.rmdir(mnt / path), lambda state: state.__delitem__(path.rpartition("/")[2]))


def echo(text: str, path: str, then: Then) -> Deed:
    """What a shell does by ``echo text > path``, for the files that do what is written."""
    return Deed(f"echo {text} > {path}", lambda mnt: (mnt / path).write_text(f"{text}\n"), then)


def write_label(directory: str, key: str, value: str) -> Deed:
    def do(mnt: Path) -> None:
        fd = os.open(mnt / directory / "labels" / key, os.O_WRONLY | os.O_CREAT)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    return Deed(f"label {directory}", do, _labelled(directory.rpartition("/")[2], {key: value}))


def unlink_label(directory: str, key: str) -> Deed:
    return Deed(
        f"unlink label of {directory}",
        lambda mnt: os.unlink(mnt / directory / "labels" / key),
        _labelled(directory.rpartition("/")[2], {key: ""}),
    )


def mv_label(directory: str, old: str, new: str) -> Deed:
    def then(state: State) -> None:
        snapshot = directory.rpartition("/")[2]
        _labelled(snapshot, {new: dict(state[snapshot].labels)[old], old: ""})(state)

    labels = f"{directory}/labels"
    return Deed(f"mv label of {directory}", lambda mnt: os.rename(mnt / labels / old, mnt / labels / new), then)


def ln(key: str, name: str, *names: str) -> Deed:
    """Give ``key`` the name in images/; ``names`` are those that it has besides."""
    link = f"../committed/{key}"
    return Deed(f"ln {key} {name}", lambda mnt: os.symlink(link, mnt / "images" / name), _called(key, name, *names))


def mv_image(key: str, old: str, new: str) -> Deed:
    return Deed(f"mv images/{old}", lambda mnt: os.rename(mnt / "images" / old, mnt / "images" / new), _called(key, new))


def unlink_image(key: str, name: str) -> Deed:
    return Deed(f"rm images/{name}", lambda mnt: os.unlink(mnt / "images" / name), _called(key))


def write_image(key: str, text: str) -> Deed:
    def then(state: State) -> None:
        state[key] = replace(state[key], image=text)

    return Deed(f"write image.json of {key}", lambda mnt: (mnt / "committed" / key / "image.json").write_text(text), then)


def read(path: str, text: str) -> Deed:
    def do(mnt: Path) -> None:
        seen = (mnt / path).read_text()
        assert seen == text, f"{path} holds {seen!r}"

    return Deed(f"read {path}", do)


def look(path: str) -> Deed:
    def do(mnt: Path) -> None:
        for name in os.listdir(mnt / path):
            with suppress(FileNotFoundError):  # removed meanwhile
                os.stat(mnt / path / name)

    return Deed(f"look {path}", do)


def sync(path: str) -> Deed:
    def do(mnt: Path) -> None:
        fd = os.open(mnt / path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    return Deed(f"sync {path}", do)


def put(key: str, file: str, text: str) -> Deed:
    """Write a file through the merged file system of the active snapshot ``key``."""

    def do(mnt: Path) -> None:
        (mnt / "active" / key / "rootfs" / file).write_text(text)

    def then(state: State) -> None:
        state[key] = replace(state[key], files=tuple(sorted({**dict(state[key].files), file: text}.items())))

    return Deed(f"put {key}", do, then)


def sweep() -> Deed:
    return Deed("cleanup", lambda mnt: (mnt / ".snapfs/cleanup").write_text("1\n"))


CLIENTS: dict[str, list[list[Deed]]] = {
    "mkdir": [[mkdir("active/m1"), mkdir("committed/top/active/m2"), mkdir("committed/base/view/m3")]],
    "mv": [
        [
            mv("active/web", "committed/v1"),
            sync("committed/v1"),
            mv("active/loose", "committed/top/committed/v2"),
            mv("committed/v1", "committed/v3"),
            mv("view/peek", "view/peek2"),
        ]
    ],
    "rmdir": [[rmdir("active/old"), rmdir("committed/leaf"), rmdir("view/peek"), sweep()]],
    "labels in the tree": [
        [write_label("active/web", "n", "2"), write_label("committed/top", "new", "x"), unlink_label("active/web", "team")],
        [mv_label("committed/base", "team", "crew"), look("committed/base/labels")],
    ],
    "states of a workspace": [
        [
            put("web", "index.html", "1"),
            echo("one", "active/web/checkpoint", _kept("web", "web@1", "one")),
            put("web", "index.html", "2"),
            echo("other", "active/web/fork", _forked("web", "web@2", "other")),
            put("web", "index.html", "3"),
            echo("copy: three", "active/web/checkpoint", _kept_a_copy("web", "web@3", "three")),
            echo("1", "active/web/rollback", _rolled_back("web", "web@1")),
            read("active/web/rootfs/index.html", "1"),
            read("committed/web@3/rootfs/index.html", "3"),
        ],
        [echo("", "active/old/rollback", _rolled_back("old", "top")), look("active"), look("committed")],
    ],
    "many layers": [
        [
            echo("flat", "committed/leaf/squash", _squashed("leaf", "flat")),
            read("committed/flat/rootfs/top.txt", "top"),
            echo("one", "active/old/checkpoint", _kept("old", "old@1", "one")),
            echo("two", "active/old/checkpoint", _kept("old", "old@2", "two")),
            echo("", "committed/old@1/dissolve", _dissolved("old@1")),
            read("committed/old@2/rootfs/a/b", "c"),
        ],
    ],
    "images": [
        [
            ln("top", "shop"),
            ln("base", "b"),
            mv_image("base", "b", "c"),
            write_image("base", '{"a": 1}'),
            read("committed/base/image.json", '{"a": 1}'),
            ln("leaf", "shop.new"),
            mv_image("leaf", "shop.new", "shop"),
            unlink_image("base", "c"),
            look("images"),
        ],
        [mkdir("active/m1"), look("images"), rmdir("active/m1"), look("committed")],
    ],
    "rootfs": [
        [read("active/web/rootfs/etc/hosts", "ground"), put("web", "index.html", "hello again"), look("active/web/rootfs")],
        [read("committed/top/rootfs/top.txt", "top"), read("view/peek/rootfs/etc/hosts", "ground")],
    ],
    "all clients at once": [
        [mkdir("committed/top/active/m1"), put("m1", "x", "y"), mv("active/m1", "committed/m1c"), sync("committed")],
        [rmdir("active/old"), mkdir("active/old"), mv("active/old", "committed/top/committed/old")],
        [write_label("active/web", "n", "2"), put("web", "a", "b"), unlink_label("active/web", "team"), rmdir("active/web")],
        [mkdir("committed/base/view/m2"), read("view/m2/rootfs/etc/hosts", "ground"), rmdir("view/m2"), sweep()],
        [look("active"), look("committed"), read("committed/leaf/rootfs/top.txt", "top"), look("committed/top/active")],
    ],
}


def client(channel: Channel, mountpoint: str, name: str, number: int) -> None:
    """Run one client's deeds; says ["done"] after each, ["failed", errno, words] where one fails, and stops."""
    for deed in CLIENTS[name][number]:
        try:
            deed.do(Path(mountpoint))
        except OSError as error:
            channel.say("failed", error.errno, f"{deed.text}: {error}")
            return
        channel.say("done")
    channel.say("over")
