"""Whatever comes in: names, filters, label writes and mangled records, by the thousand.  ``fuzz_atheris`` does more of it, led
by coverage."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lmdb
import msgspec
import pytest
import trio
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from snapfs import names, open_snapshotter
from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    HasChildren,
    InvalidArgument,
    LabelTooBig,
    Named,
    NotFound,
    NotUtf8,
    SnapshotError,
)
from snapfs.filters import Filters
from snapfs.labels import MAX
from snapfs.model import Info, Kind
from snapfs.options import Options, Sync
from snapfs.store.schema import IDS
from snapfs.tree import Handle, Node, Tree
from snapfs.tree.handles import BLOCK
from snapfs.tree.inodes import ROOT_INODE
from snapfs.tree.labels import LabelsDirectory
from snapfs.tree.node import Directory, File, Link
from tests import invariants
from tests.daemon import Daemon, bounded
from tests.invariants import INFOS, TABLES, Put, key
from tests.processes import until
from tests.refusals import failing
from tests.tree import KINDS

Make = Callable[..., Daemon]

any_text = st.text(st.characters(exclude_categories=[]), max_size=300)  # lone surrogates too
file_names = st.lists(
    st.sampled_from(
        ["%", "%2F", "%2f", "%2E", "%00", "%C3%A9", "%E9", "%C0%AF", "/", ".", "\0", "\x85", "é", "\udcff", "\ud800"]
    ),
    max_size=12,
).map("".join)


# -- names and filters


@settings(max_examples=1000)
@given(any_text | file_names)
@example("\ud800")
@example("%ED%A0%80")
@example("%C0%AF")
@example("x" * 256 + "\ud800")
def test_a_name_is_taken_exactly_or_refused_as_what_it_is(text: str) -> None:
    invariants.check_key(text)
    invariants.check_file_name(text)
    line = names.printable(text)
    assert "\n" not in line
    assert invariants.is_utf8(line)


@settings(max_examples=1000)
@given(st.binary(max_size=300))
@example(b"\xed\xa0\x80")
@example(b"\xc0\xaf")
def test_any_bytes_as_a_name(data: bytes) -> None:
    invariants.check_file_name(data.decode(errors="surrogateescape"))


PIECES = [
    "name",
    "kind",
    "labels",
    ".",
    ",",
    "==",
    "!=",
    "~=",
    '"',
    "/",
    "|",
    "\\",
    "\\x",
    "\\u",
    "٣",
    "41",
    "\ud800",
    "(",
    "*",
    " ",
]
filters = st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=[]), max_size=20).map("".join)
labels = st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3)
infos = st.builds(
    Info,
    name=st.text(min_size=1),
    kind=st.sampled_from(Kind),
    id=st.integers(1, IDS - 1),
    parent=st.none() | st.text(),
    labels=labels,
    created=st.integers(0, 1 << 63),
    updated=st.integers(0, 1 << 63),
)


@settings(max_examples=1000)
@given(filters | any_text, st.lists(infos, max_size=2))
@example('name=="\ud800"', [])
@example('name~="\\ud800"', [])
@example('"\\x٣٣"', [])
def test_a_filter_is_a_predicate_or_refused(text: str, some: list[Info]) -> None:
    invariants.check_filter(text, [*INFOS, *some])


@pytest.mark.parametrize(
    "text",
    [
        "name~=" + "(" * 100_000,
        "name~=" + "(a*)" * 20_000,
        "labels.labels~=" + "(a|a|b)*" * 200 + "c",
        "name~=((((x{1000}){1000}){1000}){1000})",
        'labels.a~="^(a+)+$"',
        'labels.a~="(a|aa)+$"',
        ".".join(["labels"] * 50_000),
        ",".join(["name==x"] * 50_000),
        "name==" + "\\" * 300_000,
        'name=="' + "\\x41" * 100_000 + '"',
        'name=="' + "x" * 300_000,
        " " * 300_000,
        "name" + " " * 300_000 + "==x",
    ],
    ids=lambda text: text[:16],
)
def test_a_filter_that_is_deep_or_huge_takes_no_longer_than_its_length(text: str) -> None:
    with bounded(120):
        invariants.check_filter(text)


@pytest.mark.parametrize(("digits", "is_taken"), [("41", True), ("٤١", False), ("４１", False), ("4_", False), ("+4", False)])
def test_only_ascii_digits_make_an_escape(digits: str, is_taken: bool) -> None:
    if is_taken:
        Filters([f'name=="\\x{digits}"'])
    else:
        with pytest.raises(InvalidArgument, match="illegal char escape"):
            Filters([f'name=="\\x{digits}"'])


# -- label writes

KEYS = ["a", "x/y", "é" * 100]
keys = st.sampled_from(KEYS)
data = st.sampled_from(
    [b"v", b"v\n", b"\n", b"\n\n", "é".encode(), b"\xc3", b"\xff", b"\0", b"w" * 90, b"w" * 3995, b"w" * MAX]
)
offsets = st.integers(0, 6) | st.sampled_from([90, MAX - 4, MAX, MAX + 1, 1 << 33, 1 << 40])
which = st.integers(0, 3)
step = st.one_of(
    st.tuples(st.just("create"), keys),
    st.tuples(st.just("open"), keys, st.booleans()),
    st.tuples(st.just("write"), which, st.integers(0, 3), data),
    st.tuples(st.just("write"), which, offsets, data),
    st.tuples(st.just("resize"), which, offsets),
    st.tuples(st.just("close"), which),
    st.tuples(st.just("unlink"), keys),
    st.tuples(st.just("rename"), keys, keys).filter(lambda step: step[1] != step[2]),
    st.tuples(st.just("truncate"), keys, offsets),
)
beginning: list[tuple[Any, ...]] = [("create", KEYS[0]), ("write", 0, 0, b"v\n"), ("create", KEYS[1]), ("write", 1, 0, b"w")]
steps = st.lists(step, min_size=10, max_size=30).map(lambda more: beginning + more)


class OpenFile:
    """A label's file open for writing, in the model."""

    def __init__(self, key: str, content: bytes, emptied: bool) -> None:
        self.key = key
        self.content = content
        self.emptied = emptied
        self.refused: type[InvalidArgument] | None = None


class Model:
    """What labels/ is to do: the labels that are stored, and what has been opened."""

    def __init__(self) -> None:
        self.stored: dict[str, str] = {}
        self.opened: list[OpenFile] = []

    def files(self) -> set[str]:
        return {*self.stored, *(file.key for file in self.opened if file.emptied)}

    def content(self, key: str) -> bytes:
        return self.stored[key].encode() + b"\n" if key in self.stored else b""

    def find(self, key: str) -> None:
        if key not in self.files():
            raise NotFound("")

    def apply(self, file: OpenFile, content: bytes) -> None:
        if len(content) > MAX + 1:
            raise LabelTooBig("")
        try:
            value = content.removesuffix(b"\n").decode()
        except UnicodeDecodeError:
            raise NotUtf8("") from None
        self.store(file.key, value)
        file.content, file.emptied = content, False

    def store(self, key: str, value: str) -> None:
        if len(key.encode()) + len(value.encode()) > MAX:
            raise LabelTooBig("")
        self.stored.pop(key, None)
        if value:
            self.stored[key] = value

    def create(self, key: str) -> None:
        if key in self.files():
            raise AlreadyExists("")
        self.opened.append(OpenFile(key, b"", True))

    def open(self, key: str, truncate: bool) -> None:
        self.find(key)
        self.opened.append(OpenFile(key, b"" if truncate else self.content(key), truncate))

    def write(self, number: int, offset: int, data: bytes) -> None:
        file = self.opened[number]
        try:
            if file.refused is not None:
                raise file.refused("")
            if offset > MAX + 1:
                raise LabelTooBig("")
            self.apply(file, file.content[:offset].ljust(offset, b"\0") + data + file.content[offset + len(data) :])
        except InvalidArgument as error:
            file.emptied = False
            if len(data) >= BLOCK and not data.endswith(b"\n"):  # a rest of it may follow
                file.refused = type(error)
            raise

    def resize(self, number: int, size: int) -> None:
        self._resize(self.opened[number], size)

    def _resize(self, file: OpenFile, size: int) -> None:
        if size == 0:
            file.content, file.emptied, file.refused = b"", True, None
        elif size > MAX + 1:
            raise LabelTooBig("")
        elif size != len(file.content):
            self.apply(file, file.content[:size].ljust(size, b"\0"))

    def close(self, number: int) -> None:
        file = self.opened.pop(number)
        if file.emptied:
            self.stored.pop(file.key, None)

    def unlink(self, key: str) -> None:
        self.find(key)
        for file in self.opened:
            file.emptied &= file.key != key
        self.stored.pop(key, None)

    def rename(self, old: str, new: str) -> None:
        self.find(old)
        if old in self.stored:
            self.store(new, self.stored[old])
        self.stored.pop(old if old in self.stored else new, None)
        for file in self.opened:
            if file.key == new:
                file.emptied = False
            elif file.key == old:
                file.key = new

    def truncate(self, key: str, size: int) -> None:
        self.find(key)
        file = OpenFile(key, self.content(key), False)
        self._resize(file, size)
        if file.emptied:
            self.stored.pop(key, None)


class Door(Protocol):
    """The same through something real.  Each step raises the errno that it was refused with."""

    async def step(self, name: str, *arguments: Any) -> None: ...

    async def labels(self) -> dict[str, str]: ...

    async def files(self) -> dict[str, bytes]: ...


class Nodes:
    """Through the tree's nodes."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.handles: list[Handle] = []

    def directory(self) -> LabelsDirectory:
        directory = self.tree.walk("active/web/labels")
        assert isinstance(directory, LabelsDirectory)
        return directory

    async def step(self, name: str, *arguments: Any) -> None:
        match name, *arguments:
            case "create", key:
                self.handles.append((await self.directory().create(names.encode(key)))[1])
            case "open", key, truncate:
                self.handles.append(await self.directory().lookup(names.encode(key)).open(True, truncate))
            case "write", number, offset, data:
                assert await self.handles[number].write(offset, data) == len(data)
            case "resize", number, size:
                await self.handles[number].resize(size)
            case "close", number:
                await self.handles.pop(number).close()
            case "unlink", key:
                await self.directory().unlink(names.encode(key), 1)
            case "rename", old, new:
                await self.directory().rename(names.encode(old), names.encode(new), True)
            case "truncate", key, size:
                await self.directory().lookup(names.encode(key)).resize(size)

    async def labels(self) -> dict[str, str]:
        return dict((await self.tree.snapshotter.stat("web")).labels)

    async def files(self) -> dict[str, bytes]:
        found = {}
        for _, name, node in self.directory().entries(0):
            handle = await node.open()
            found[names.decode(name)] = handle.read(0, 1 << 20)
            await handle.close()
        return found


class Mounted:
    """Through a real mount."""

    def __init__(self, labels: Path) -> None:
        self.directory = labels
        self.descriptors: list[int] = []

    async def step(self, name: str, *arguments: Any) -> None:
        match name, *arguments:
            case "create", key:
                self.descriptors.append(os.open(self.path(key), os.O_RDWR | os.O_CREAT | os.O_EXCL))
            case "open", key, truncate:
                self.descriptors.append(os.open(self.path(key), os.O_RDWR | (os.O_TRUNC if truncate else 0)))
            case "write", number, offset, data:
                assert os.pwrite(self.descriptors[number], data, offset) == len(data)
            case "resize", number, size:
                os.ftruncate(self.descriptors[number], size)
            case "close", number:
                os.close(self.descriptors.pop(number))
            case "unlink", key:
                os.unlink(self.path(key))
            case "rename", old, new:
                os.rename(self.path(old), self.path(new))
            case "truncate", key, size:
                os.truncate(self.path(key), size)

    def path(self, key: str) -> Path:
        return self.directory / names.encode(key)

    async def labels(self) -> dict[str, str]:
        found = msgspec.json.decode((self.directory.parent / "info.json").read_bytes())["labels"]
        assert isinstance(found, dict)
        return found

    async def files(self) -> dict[str, bytes]:
        return {names.decode(name): (self.directory / name).read_bytes() for name in os.listdir(self.directory)}


ERRNO: dict[type[SnapshotError], int] = {
    NotFound: errno.ENOENT,
    AlreadyExists: errno.EEXIST,
    LabelTooBig: errno.E2BIG,
    NotUtf8: errno.EILSEQ,
}


async def drive(door: Door, given: list[tuple[Any, ...]]) -> None:
    """Take the same steps through ``door`` and in the model: they agree about each."""
    model = Model()
    for name, *arguments in given + [("close", 0)] * len(given):
        if name in ("write", "resize", "close"):
            if not model.opened:
                continue
            arguments[0] %= len(model.opened)
        refusal: type[SnapshotError] | None = None
        try:
            getattr(model, name)(*arguments)
        except SnapshotError as error:
            refusal = type(error)
        event(f"{name}: {refusal.__name__ if refusal else 'done'}")
        try:
            await door.step(name, *arguments)
        except SnapshotError as error:
            assert type(error) is refusal, (name, arguments)
        except OSError as error:
            assert refusal is not None, (name, arguments, error)
            assert error.errno == ERRNO[refusal], (name, arguments)
        else:
            assert refusal is None, (name, arguments)
        assert await door.labels() == model.stored
        assert await door.files() == {label: model.content(label) for label in model.files()}


@pytest.fixture(scope="module")
def quick() -> Options:
    return Options(rootfs=False, sync=Sync.NONE)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_label_writes_through_the_nodes(tmp_path_factory: pytest.TempPathFactory, quick: Options, given: list[Any]) -> None:
    async def main() -> None:
        async with open_snapshotter(tmp_path_factory.mktemp("labels") / "root", quick) as snapshotter:
            await snapshotter.prepare("web")
            await drive(Nodes(Tree(snapshotter)), given)

    with bounded(60):
        trio.run(main)


@settings(max_examples=20, deadline=None)
@given(steps)
def test_label_writes_through_a_mount(module_daemon: Daemon, given: list[Any]) -> None:
    web = module_daemon.mnt / "active/web"
    web.mkdir()
    door = Mounted(web / "labels")
    try:
        with bounded(60, module_daemon):
            trio.run(partial(drive, door, given))
    finally:
        for descriptor in door.descriptors:
            os.close(descriptor)
        web.rmdir()


@pytest.mark.parametrize("offset", [MAX + 1, 1 << 31, 1 << 33, 1 << 40, (1 << 63) - 4096])
def test_a_write_far_out_is_refused_before_it_takes_memory(module_daemon: Daemon, offset: int) -> None:
    web = module_daemon.mnt / "active/far"
    web.mkdir()
    before = memory(module_daemon.pid)
    fd = os.open(web / "labels/a", os.O_RDWR | os.O_CREAT)
    try:
        with failing(errno.E2BIG):
            os.pwrite(fd, b"x", offset)
        os.pwrite(fd, b"value", 0)
    finally:
        os.close(fd)
    assert (web / "labels/a").read_text() == "value\n"
    assert memory(module_daemon.pid) - before < 64 << 20
    web.rmdir()


def memory(pid: int) -> int:
    """The most bytes of memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


# -- mangled records

RECORDS = invariants.make_records()
NAMES = {record.name: number for number, record in RECORDS.items()}
LEAVES = ("web", "peek", "job", "apart")

ids = st.integers(0, 9).map(key) | st.sampled_from([b"", b"\0", key(1)[1:], key(IDS), key(IDS - 1), b"\xff" * 8, b"\xff" * 16])
odd_names = st.sampled_from([*map(str.encode, NAMES), b"new", b"..", b"\xff", b"\n", b"x" * 300, b"\xc2\x85" * 60])
numbers = st.integers(-1, 9) | st.sampled_from([IDS, 1 << 63, (1 << 64) - 1, -(1 << 63)])
fields: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*NAMES, "new", "", "a/b", "..", "x" * 255, "x" * 256, "\n" * 100, "é" * 200]) | st.none(),
        "kind": st.sampled_from([*KINDS, "dead", ""]) | st.integers(0, 3),
        "parent": numbers | st.none(),
        "created": numbers | st.floats(),
        "updated": numbers,
        "labels": st.sampled_from([{}, {"": ""}, {"a": 1}, {1: "a"}, {"x" * 5000: "x" * 5000}, [], {"a\n/": "b\n"}, None]),
        "usage": st.none()
        | st.fixed_dictionaries({}, optional=dict.fromkeys(("inodes", "size", "shared"), numbers))
        | st.just([]),
    },
)


def said(number: int, **other: object) -> bytes:
    """The record of snapshot ``number`` with other fields."""
    return msgspec.msgpack.encode(list({**msgspec.structs.asdict(RECORDS[number]), **other}.values()))


existing = st.sampled_from(list(invariants.entries()))
number = st.integers(1, 7)
values = st.binary(max_size=20) | ids | odd_names | st.builds(said, number)


def put_fields(number: int, other: dict[str, object]) -> Put:
    return "snapshots", key(number), said(number, **other)


def put_value(entry: tuple[str, bytes, bytes], value: bytes | None) -> Put:
    return entry[0], entry[1], value


def put_spliced(entry: tuple[str, bytes, bytes], at: int, new: bytes, length: int) -> Put:
    return entry[0], entry[1], entry[2][:at] + new + entry[2][at + length :]


put = st.one_of(
    st.builds(put_fields, number, fields),
    st.builds(put_fields, number, st.fixed_dictionaries({"parent": st.integers(0, 8)})),
    st.builds(put_value, existing, values | st.none()),
    st.builds(put_spliced, existing, st.integers(0, 30), st.binary(max_size=4), st.integers(0, 4)),
    st.tuples(st.sampled_from(TABLES), ids | odd_names | st.binary(max_size=20), values | st.none()),
)
puts = st.lists(put, min_size=1, max_size=3)

CYCLE: list[Put] = [("snapshots", key(1), said(1, parent=3))]


@settings(max_examples=400, deadline=None)
@given(puts)
@example(CYCLE)
@example([("snapshots", key(4), b"[\xbc\xc5\xa4\x8e")])  # what is not UTF-8 is another error of msgspec's
def test_every_read_of_mangled_records_says_what_is_there_or_damaged(mangled: invariants.Mangled, puts: list[Put]) -> None:
    with bounded(30):
        mangled.check(puts)


@pytest.fixture(scope="module")
def mangled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[invariants.Mangled]:
    made = invariants.Mangled(tmp_path_factory.mktemp("mangled") / "metadata.mdb")
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick: Options) -> Path:
    """A root with those records, and a file in each layer."""
    root = tmp_path_factory.mktemp("whole") / "root"

    async def main() -> None:
        async with open_snapshotter(root, quick) as snapshotter:
            for number in RECORDS:
                await snapshotter.prepare(f"x{number}")
                (root / f"snapshots/{number}/fs/file").write_text(f"{number}")
        async with open_snapshotter(root, quick):
            pass

    trio.run(main)
    with lmdb.open(str(root / "metadata.mdb"), subdir=False, max_dbs=16, map_size=1 << 30) as env:
        for table in TABLES:
            with env.begin(write=True) as txn:
                txn.drop(env.open_db(table.encode(), txn), delete=False)
        invariants.fill(env)
    return root


def mangle(whole: Path, root: Path, puts: list[Put]) -> Path:
    """A copy of the root ``whole`` whose records are mangled."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root, ignore=shutil.ignore_patterns("*-lock"))
    with lmdb.open(str(root / "metadata.mdb"), subdir=False, max_dbs=16, map_size=1 << 30) as env, env.begin(write=True) as txn:
        invariants.mangle(env, txn, puts)
    return root


def touched(puts: list[Put]) -> set[str]:
    """The snapshots that may be the worse for ``puts``: those that are named there by id or name, and their descendants."""
    found = set()
    for number, record in RECORDS.items():
        for table, where, value in puts:
            if table != "meta" and (key(number) in where or record.name.encode() in (where, value)):
                found.add(number)
    for _ in RECORDS:
        found |= {number for number, record in RECORDS.items() if record.parent in found}
    return {RECORDS[number].name for number in found}


async def crawl(tree: Tree, node: Node) -> int:
    """Read all of ``tree`` below ``node`` as programs do; how many of its entries are damaged.  No listing fails, and nothing
    but Damaged (or that it isn't there) comes back."""
    damaged = 0
    for _, name, child in list(node.entries(0)):
        names.printable(name).encode()
        seen = child.attributes()
        assert 0 <= seen.size < 1 << 63
        assert 0 <= seen.time < 1 << 63
        assert 0 < child.inode < 1 << 64
        assert child.path
        try:
            child = node.lookup(name)
            child.attributes()
            if isinstance(child, Link):
                (await child.follow(0)).encode(errors="surrogateescape")
            elif isinstance(child, Directory):
                damaged += await crawl(tree, tree.node(child.inode))
            elif isinstance(child, File):
                handle = await (await child.refresh()).open()
                data = await handle.fetch(0, 1 << 30) if handle.blocks else handle.read(0, 1 << 30)
                assert handle.size == len(data)
                await handle.close()
        except (Damaged, NotFound):
            damaged += 1
    return damaged


async def inspect(root: Path, quick: Options, puts: list[Put]) -> None:
    """Read all that there is, then remove all that can be."""
    async with open_snapshotter(root, quick) as snapshotter:
        tree = Tree(snapshotter)
        event(f"damaged entries: {min(10, await crawl(tree, tree.node(ROOT_INODE)))}")
        for name in (*NAMES, "new"):
            for read in (snapshotter.stat, snapshotter.usage, snapshotter.mounts, partial(snapshotter.changes, consume=list)):
                try:
                    await read(name)
                except (Damaged, NotFound, FailedPrecondition) as error:
                    assert str(error)
        with suppress(Damaged):
            await snapshotter.walk()
        for name in NAMES.keys() - touched(puts):
            number = NAMES[name]
            info = await snapshotter.stat(name)
            assert (info.id, info.name, info.kind) == (number, name, RECORDS[number].kind)
            await snapshotter.usage(name)
        with suppress(Damaged, NotFound, AlreadyExists, InvalidArgument):
            await snapshotter.prepare("one more", "base")
        images = tree.walk("images")
        for _, name, _ in list(images.entries(0)):
            with suppress(Damaged, NotFound):
                await images.unlink(name, 1)
        for kind in KINDS * 4:  # children first, whichever they are
            directory = tree.walk(kind)
            for _, name, _ in reversed(list(directory.entries(0))):
                with suppress(Damaged, NotFound, HasChildren, Named):
                    await directory.rmdir(name, 1)
        await crawl(tree, tree.node(ROOT_INODE))
        for name in LEAVES:
            if name not in touched(puts):
                with pytest.raises(NotFound):
                    await snapshotter.stat(name)


@settings(max_examples=100, deadline=None)
@given(puts)
@example(CYCLE)
@example([("snapshots", key(4), said(4, parent=4))])
@example([("names", b"web", key(6))])
@example([("meta", b"last_id", b"")])
@example([("meta", b"last_id", key(2))])
def test_a_root_whose_records_are_mangled(whole: Path, quick: Options, puts: list[Put]) -> None:
    root = mangle(whole, whole.parent / "mangled", puts)
    with bounded(60):
        try:
            trio.run(inspect, root, quick, puts)
        except Damaged as error:  # at the start
            assert any(table == "meta" or value is None for table, _, value in puts) or "holds files" in str(error)


def test_damage_through_a_mount(whole: Path, make_daemon: Make, tmp_path: Path) -> None:
    """It is listed, what asks for it is told, everybody else goes on, and it can be removed."""
    puts = [put_fields(7, {"parent": 7}), put_fields(5, {"parent": 99}), ("snapshots", key(4), b"\xc1 no record")]
    daemon = make_daemon(root=mangle(whole, tmp_path / "root", puts)).start()
    mnt = daemon.mnt
    assert sorted(os.listdir(mnt / "active")) == ["apart", "job", "web"]
    assert os.listdir(mnt / "committed/top/active") == ["web"]
    assert sorted(os.listdir(mnt / "by-id"), key=int) == list("1234567")
    assert os.readlink(mnt / "by-id/6") == "../active/job"
    assert (mnt / "active/job/info.json").read_text()
    assert (mnt / "active/job/mounts.json").read_text()
    for ask in (
        lambda: os.stat(mnt / "active/web"),
        lambda: os.listdir(mnt / "active/web"),
        lambda: (mnt / "active/web/info.json").read_text(),
        lambda: os.readlink(mnt / "by-id/4"),
        lambda: os.readlink(mnt / "committed/top/active/web"),
        lambda: os.rename(mnt / "active/web", mnt / "committed/v1"),
        lambda: os.rename(mnt / "active/web", mnt / "active/web2"),
        lambda: os.listdir(mnt / "active/apart"),
        lambda: (mnt / "view/peek/mounts.json").read_text(),
        lambda: os.readlink(mnt / "view/peek/parent"),
    ):
        with failing(errno.EIO):
            ask()
    until(lambda: any("the record of snapshot 4 can't be read" in line for line in daemon.error_log()))
    for name in ("active/web", "active/apart", "view/peek"):
        os.rmdir(mnt / name)
    assert os.listdir(mnt / "active") == ["job"]
    assert os.listdir(mnt / "view") == os.listdir(mnt / "committed/top/active") == []
    until(lambda: sorted(os.listdir(daemon.root / "snapshots")) == list("1236"))
    os.rmdir(mnt / "committed/top")
    os.mkdir(mnt / "committed/middle/active/web")
    assert msgspec.json.decode((mnt / "active/web/info.json").read_bytes())["id"] == 10
    removed = [msgspec.json.decode(line) for line in (mnt / ".snapfs/events").read_bytes().splitlines()]
    assert [event["key"] for event in removed if event["operation"] == "remove"] == ["web", "apart", "peek", "top"]
    assert daemon.stop() == 0


def test_parents_that_go_round_in_a_circle(whole: Path, make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon(root=mangle(whole, tmp_path / "root", CYCLE)).start()
    mnt = daemon.mnt
    with bounded(30, daemon):
        for path in ("active/web/mounts.json", "active/web/changes", "active/job/mounts.json", "view/peek/mount.sh"):
            with failing(errno.EIO):
                (mnt / path).read_text()
        with failing(errno.EIO):
            os.listdir(mnt / "committed/top/rootfs/")
        assert sorted(os.listdir(mnt / "committed")) == ["base", "middle", "top"]
        assert (mnt / "active/apart/mounts.json").read_text()
        with failing(errno.ENOTEMPTY):
            os.rmdir(mnt / "committed/base")
        os.rmdir(mnt / "active/web")
    assert any("circle" in line for line in daemon.error_log())
    assert daemon.stop() == 0


@pytest.mark.parametrize("last", [b"", b"\xff" * 8, key(2), key(IDS - 1), b"7"])
async def test_no_id_is_used_twice_whatever_the_records_say_was_the_last(
    whole: Path, quick: Options, tmp_path: Path, last: bytes
) -> None:
    async with open_snapshotter(mangle(whole, tmp_path / "root", [("meta", b"last_id", last)]), quick) as snapshotter:
        assert (await snapshotter.stat("apart")).id == 7
        with pytest.raises(Damaged, match="the last id is"):
            await snapshotter.prepare("new", "base")
        await snapshotter.remove("apart")


async def test_damage_does_not_spread(whole: Path, quick: Options, tmp_path: Path) -> None:
    """A record that says another's name is not written anywhere by what goes on in the background, nor by a rename."""
    root = mangle(whole, tmp_path / "root", [put_fields(3, {"name": "base"})])
    async with open_snapshotter(root, quick) as snapshotter:
        for call in (
            partial(snapshotter.usage, "top"),
            partial(snapshotter.rename, 3, "other"),
            partial(snapshotter.update, 3, {}),
        ):
            with pytest.raises(Damaged, match="base"):
                await call()
        assert (await snapshotter.stat("base")).id == 1
        for name in ("web", "peek", "top"):
            await snapshotter.remove(name)
        assert (await snapshotter.stat("base")).id == 1
        assert [info.name for info in await snapshotter.walk()] == ["apart", "base", "job", "middle"]
