"""LMDB as it must be used: readers that end, a table of them that never fills up, forks, and files that are none of ours."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import lmdb
import pytest
import trio
from lmdb.verify import verify

import snapfs
from snapfs import (
    Damaged,
    Kind,
    MetaStore,
    NotFound,
    SnapshotError,
    Snapshotter,
    Unavailable,
    open_snapshotter,
)
from snapfs.errors import Forked
from snapfs.kernel import beneath, mounting
from snapfs.root.lock import is_abandoned
from snapfs.store import environment, locktable
from snapfs.tree import Tree
from snapfs.tree.inodes import ROOT_INODE
from tests.mounts import unanswering
from tests.nodes import crawl
from tests.processes import die_with_parent, in_fork, own_descriptors
from tests.records import adding, check_indexes, readers

pytestmark = pytest.mark.durable

PACKAGE = Path(snapfs.__file__).parent


# -- readers end


def test_no_block_that_reads_awaits_or_yields() -> None:
    """But for ``entries`` and ``_lines``, whose one consumer closes each without awaiting anything either."""
    blocks = 0
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for block in ast.walk(function):
                if isinstance(block, ast.With) and any(
                    call in ast.unparse(item) for item in block.items for call in ("reading(", ".entries(")
                ):
                    blocks += 1
                    inner = {type(found) for statement in block.body for found in ast.walk(statement)}
                    if function.name in ("entries", "_lines"):
                        inner -= {ast.Yield}
                    outlives = {ast.Await, ast.Yield, ast.YieldFrom, ast.AsyncFor, ast.AsyncWith}
                    assert not inner & outlives, (path, block.lineno)
    assert blocks > 25


async def test_what_is_read_after_the_block_is_an_error(store: MetaStore) -> None:
    for name in "abc":
        await store.write(adding(name))
    begun: list[Iterator[object]]
    with store.reading() as reader:
        begun = [reader.listing(Kind.ACTIVE), reader.numbers()]
        for generator in begun:
            next(generator)
        unbegun: list[Iterator[object]] = [reader.listing(Kind.ACTIVE), reader.children(1, Kind.ACTIVE)]
        walked = reader.walk()
    for generator in begun:
        with pytest.raises(lmdb.Error, match="closed"):
            next(generator)
    calls: list[Callable[[], object]] = [lambda: reader.id_of("a"), lambda: reader.record(1), reader.last_id]
    calls += [partial(next, each) for each in unbegun]
    for call in calls:
        with pytest.raises(RuntimeError, match="after the block"):
            call()
    assert readers(store.environment.env) == ["-"]
    await store.write(adding("d"))
    assert [info.name for info in walked] == ["a", "b", "c"]


async def test_errors_and_generators_that_are_kept_take_no_place(snapshotter: Snapshotter) -> None:
    """An error's traceback refers to all that stood in the frames that it passed, and so did each to a transaction."""
    env = snapshotter.records.environment.env
    await snapshotter.prepare("a")
    kept: list[object] = []
    for number in range(2 * environment.READERS):
        with pytest.raises(NotFound) as caught:
            await snapshotter.stat(f"nobody {number}")
        kept.append(caught.value)
    for _ in range(100):
        with snapshotter.records.reading() as reader:
            listing = reader.listing(Kind.ACTIVE)
            next(listing)
            kept.append(listing)
            kept.append(reader)
    assert len(kept) == 2 * environment.READERS + 200
    assert readers(env) == ["-"]
    assert env.info()["num_readers"] < 5


async def test_a_mixed_load_leaves_no_reader(snapshotter: Snapshotter) -> None:
    env = snapshotter.records.environment.env
    tree = Tree(snapshotter)
    met = crawled = 0

    async def client(number: int) -> None:
        nonlocal met, crawled
        dice = random.Random(number)
        for turn in range(30):
            key, base = f"{number}-{turn % 4}", f"base{dice.randrange(8)}"
            calls: list[Callable[[], Awaitable[object]]] = [
                partial(snapshotter.prepare, key, base if turn % 2 else None),
                partial(snapshotter.prepare, key),
                partial(snapshotter.commit, base, key, wait=False),
                partial(snapshotter.remove, key),
                partial(snapshotter.stat, key),
                partial(snapshotter.usage, key),
                partial(snapshotter.changes, key, list),
                partial(snapshotter.walk, "kind==active"),
                partial(snapshotter.update, key, {"a": "b"}),
            ]
            with suppress(SnapshotError):
                await dice.choice(calls)()
            crawled += sum(1 for _ in crawl(tree.node(ROOT_INODE)))
            met = max(met, len(readers(env)))

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(client, number)
    check_indexes(snapshotter.records)
    assert crawled > 5_000
    assert 1 <= met < 50
    with trio.fail_after(20):
        await snapshotter.cleanup()
        while readers(env) != ["-"]:  # what goes on in the background is short
            await trio.sleep(0)


# -- the table


async def test_more_readers_than_places_wait_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "READERS", 4)
    store = MetaStore(str(tmp_path / "m"), map_size=1 << 20)
    assert store.environment.env.info()["max_readers"] == 4
    all_there, refused, met = threading.Barrier(64), list[BaseException](), list[int]()

    def read() -> None:
        all_there.wait(20)
        try:
            for _ in range(20):
                with store.reading() as reader:
                    met.append(len(readers(store.environment.env)))
                    reader.ids()
        except BaseException as error:
            refused.append(error)

    threads = [threading.Thread(target=read) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert refused == []
    assert len(met) == 64 * 20
    assert max(met) <= 4
    store.close()


async def test_who_waits_too_long_for_a_place_is_told(store: MetaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PATIENCE", 0.0)
    held = []
    while True:
        try:
            held.append(store.environment.env.begin())
        except lmdb.ReadersFullError:
            break
    assert len(held) == environment.READERS
    with pytest.raises(Unavailable, match="more than 1024 others are reading"), store.reading():
        pass
    del held
    with store.reading() as reader:
        assert reader.ids() == set()


KILLED_READER = """
import os, signal, sys
from snapfs.store.locktable import open_environment, table_of
env = open_environment(sys.argv[1], table_of(os.getppid(), sys.argv[1]), readonly=True)
kept = [env.begin() for _ in range(int(sys.argv[2]))]
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_reader(path: str, places: int) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED_READER, path, str(places)], check=False).returncode == -signal.SIGKILL


def test_nobody_else_can_open_what_is_open(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    store = MetaStore(path)
    script = "import sys; from snapfs import *\ntry: MetaStore(sys.argv[1])\nexcept SnapshotError as error: print(error)"
    command = [sys.executable, "-c", script, path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"the records in {path} are in use by another process; stop that one first\n"
    with pytest.raises(Unavailable, match="in use by another process"):
        MetaStore(path)
    store.close()
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == ""


def test_nothing_is_beside_the_records_nor_left_in_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm")), set(own_descriptors())
    store = MetaStore(str(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]
    store.close()
    assert (set(os.listdir("/dev/shm")), set(own_descriptors())) == before


@pytest.mark.mounts
@pytest.mark.parametrize("options", ["ro", "nr_inodes=1", "size=4k", "nosymfollow", None])
def test_memory_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str | None) -> None:
    """/dev/shm may be full of what others put there, as in a small container, or not be there: another directory does."""
    memory, elsewhere, beside = tmp_path / "memory", tmp_path / "elsewhere", tmp_path / ("long" * 50)
    for directory in (memory, elsewhere, beside):
        directory.mkdir()
    monkeypatch.setattr(locktable, "_MEMORY", str(memory if options else tmp_path / "none"))
    for name in (str(elsewhere), str(memory), ""):  # at last the records' own directory is what is left
        monkeypatch.setenv("TMPDIR", name)
        with ExitStack() as ended:
            if options:
                subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(memory)], check=True)
                ended.callback(mounting.unmount, str(memory), mounting.MNT_DETACH)
                with suppress(OSError), (memory / "fill").open("wb", buffering=0) as fill:
                    fill.write(bytes(1 << 20))
            store = MetaStore(str(beside / "m"))
            store.write_now(adding(f"in {name}"))
            store.close()
            assert set(os.listdir(memory)) <= {"fill"}
        assert os.listdir(elsewhere) == []
        assert os.listdir(beside) == ["m"]


@pytest.mark.mounts
def test_no_directory_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locktable, "_MEMORY", "/proc/none")
    monkeypatch.setenv("TMPDIR", "/proc")
    MetaStore(str(tmp_path / "file")).close()
    shut = tmp_path / "shut"
    shut.mkdir()
    (shut / "m").touch()
    with ExitStack() as ended:
        for options, source, target in (("ro", shut, shut), ("rw", tmp_path / "file", shut / "m")):
            subprocess.run(["mount", "--bind", "-o", options, str(source), str(target)], check=True)
            ended.callback(mounting.unmount, str(target), mounting.MNT_DETACH)
        with pytest.raises(Unavailable, match=r"needed for a moment, in /proc/none, \$TMPDIR or /tmp: .*Read-only file system"):
            MetaStore(str(shut / "m"))


def test_what_a_killed_process_left_in_memory_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of no use, and nobody else would remove it before the machine starts anew."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(locktable, "_MEMORY", str(memory))
    killed = (
        "import os, signal, sys, lmdb; from snapfs import MetaStore\n"
        "from snapfs.store import locktable; locktable._MEMORY = sys.argv[2]\n"
        "lmdb.open = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\nMetaStore(sys.argv[1])"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / "m"), str(memory)], check=False)
    first, second = os.listdir(memory)
    os.utime(memory / first, (0, 0))
    (memory / "snapfs-of-somebody").mkdir()
    os.utime(memory / "snapfs-of-somebody", (0, 0))
    MetaStore(str(tmp_path / "n")).close()
    assert sorted(os.listdir(memory)) == sorted([second, "snapfs-of-somebody"])  # the second may be at it


@pytest.mark.mounts
@pytest.mark.parametrize("what", ["server", "link", "others", "open"])
def test_what_others_put_into_memory_is_left_alone(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody may make directories there, of such a name too, and mount on them."""
    memory, secret = tmp_path / "memory", tmp_path / "secret"
    theirs = memory / "snapfs-records-x"
    monkeypatch.setattr(locktable, "_MEMORY", str(memory))
    monkeypatch.setattr(locktable, "_ABANDONED", -1.0)
    for directory in (memory, secret):
        directory.mkdir()
    (secret / "records-lock").touch()
    with ExitStack() as ended:
        if what == "link":
            theirs.symlink_to(secret)
        else:
            theirs.mkdir(0o777 if what == "open" else 0o700)
            theirs.chmod(0o777 if what == "open" else 0o700)
        if what == "server":
            ended.enter_context(unanswering(theirs))
        elif what != "link":
            (theirs / "records-lock").touch()
            if what == "others":
                os.chown(theirs, 60001, 60001)
        MetaStore(str(tmp_path / "m")).close()
    assert os.listdir(memory) == ["snapfs-records-x"]
    assert os.listdir(secret) == ["records-lock"]
    assert what in ("link", "server") or os.listdir(theirs) == ["records-lock"]


def test_as_much_as_others_like_in_memory_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody may make a million directories there, of such a name too, and each start would wait for that."""
    memory, looked_at = tmp_path / "memory", []
    memory.mkdir()
    monkeypatch.setattr(locktable, "_MEMORY", str(memory))
    monkeypatch.setattr(locktable, "_remove_abandoned", lambda top, name: looked_at.append(name))
    monkeypatch.setattr(beneath, "MOST", 10)
    for number in range(50):
        (memory / f"snapfs-records-{number}").mkdir()
    MetaStore(str(tmp_path / "m")).close()
    assert len(looked_at) == 10


async def test_places_of_a_killed_process_are_free_while_running(store: MetaStore) -> None:
    """Else no page that it was reading would be used again, and the file grow for ever."""
    kill_a_reader(store.path, 3)
    assert len(readers(store.environment.env)) == 4
    await store.write(adding("a"))
    assert readers(store.environment.env) == ["-"]
    kill_a_reader(store.path, environment.READERS - 1)
    with store.reading(), store.reading():  # the second one finds no place
        assert len(readers(store.environment.env)) == 2


# -- forks


REFUSED = f"Forked: {Forked()}"


async def test_a_forked_process_is_refused_and_harms_nothing(snapshotter: Snapshotter, root: Path) -> None:
    await snapshotter.prepare("web")
    store = snapshotter.records
    pool = set(os.listdir(root / "pool"))

    def read() -> None:
        with store.reading():
            pass

    def step(call: Callable[[], object]) -> object:
        coroutine = call()
        try:
            while True:
                coroutine.send(None)  # type: ignore[attr-defined]
        except StopIteration as stop:
            return stop.value

    assert in_fork(read) == REFUSED
    assert in_fork(partial(step, partial(store.write, adding("a")))) == REFUSED
    assert in_fork(partial(step, partial(snapshotter._write_record, adding("a")))) == REFUSED
    assert in_fork(lambda: snapshotter.reading().__enter__()) == REFUSED
    with store.reading() as reader:
        assert reader.id_of("web") == 1
        before = readers(store.environment.env)
        assert in_fork(store.close) == "None"
        assert in_fork(snapshotter.layers.close) == "None"
        assert readers(store.environment.env) == before
        assert reader.id_of("web") == 1
    assert set(os.listdir(root / "pool")) >= pool
    await snapshotter.prepare("more")
    assert not is_abandoned(str(root))


async def test_a_fork_within_a_block_that_reads_leaves_the_parents_transaction(store: MetaStore) -> None:
    await store.write(adding("a"))
    block = store.reading()
    reader = block.__enter__()
    listing = reader.listing(Kind.ACTIVE)
    next(listing)
    before = readers(store.environment.env)
    assert in_fork(lambda: block.__exit__(None, None, None)) == "None"
    assert readers(store.environment.env) == before != ["-"]
    block.__exit__(None, None, None)
    assert readers(store.environment.env) == ["-"]


HOLDER = """
import os, sys, time, trio
from snapfs import open_snapshotter
async def main():
    async with open_snapshotter(sys.argv[1]) as snapshotter:
        await snapshotter.prepare("web")
        if os.fork() == 0:
            print("forked", flush=True)
            time.sleep(60)
        os.kill(os.getpid(), 9)
trio.run(main)
"""


async def test_a_forked_process_that_outlives_the_holder_does_not_hold_the_root(root: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)], stdout=subprocess.PIPE, preexec_fn=die_with_parent, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"forked\n"
        assert holder.wait(20) == -signal.SIGKILL
        async with open_snapshotter(root) as snapshotter:
            assert [info.name for info in await snapshotter.walk()] == ["web"]
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        assert holder.stdout is not None
        holder.stdout.close()


async def test_the_descriptors_are_not_inherited(snapshotter: Snapshotter, root: Path) -> None:
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        assert not target.startswith(str(root)) or not os.get_inheritable(int(fd)), target


# -- files that are none of ours


def somebody_elses(path: Path, table: bytes | None = b"things") -> None:
    with lmdb.open(str(path), subdir=False, max_dbs=4) as env, env.begin(write=True) as txn:
        txn.put(b"a", b"b", db=env.open_db(table, txn) if table else None)


def a_store(path: Path) -> None:
    store = MetaStore(str(path), map_size=1 << 24)
    with store.environment.env.begin(write=True) as txn:
        for number in range(3000):
            txn.put(f"name {number}".encode(), (1).to_bytes(8, "big"), db=store.tables.names)
    store.close()


def cut_to(size: int, path: Path) -> None:
    a_store(path)
    os.truncate(path, size)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("not LMDB at all\n" * 1000), "can't be read"),
    "zeros": (lambda path: path.write_bytes(bytes(65536)), "can't be read"),
    "short": (lambda path: path.write_bytes(b"x"), "can't be read"),
    "cut in its head": (partial(cut_to, 100), "can't be read"),
    "cut": (partial(cut_to, 16384), "is cut short"),
    "other tables": (somebody_elses, "LMDB file, but not of snapfs"),
    "no tables": (partial(somebody_elses, table=None), "LMDB file, but not of snapfs"),
    "a key called meta": (partial(somebody_elses, table=b"meta"), "LMDB file, but not of snapfs"),
    "directory": (lambda path: path.mkdir(), "Is a directory"),
    "fifo": (os.mkfifo, "that is not a file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "that is not a file"),
    "dangling link": (lambda path: path.symlink_to("nowhere/x"), "No such file"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    make, words = FOREIGN[what]
    path = tmp_path / "m"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):
        with pytest.raises((Damaged, Unavailable), match=words) as caught:
            MetaStore(str(path), map_size=1 << 24)
        assert str(path) in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_an_empty_file_becomes_a_store_unless_there_are_layers(tmp_path: Path, root: Path) -> None:
    """A first start that was cut short leaves one."""

    async def use() -> None:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("web")

    root.mkdir()
    (root / "lock").touch()
    (root / "metadata.mdb").touch()
    trio.run(use)
    os.truncate(root / "metadata.mdb", 0)
    for _ in range(2):
        with pytest.raises(Damaged, match=r"metadata\.mdb is missing or empty"):
            trio.run(use)
    assert os.listdir(root / "snapshots") == ["1"]
    assert (root / "metadata.mdb").stat().st_size == 0


@pytest.mark.mounts
def test_records_that_one_may_not_read(tmp_path: Path) -> None:
    a_store(tmp_path / "m")
    script = "import sys; from snapfs import *\ntry: MetaStore(sys.argv[1])\nexcept SnapshotError as error: print(error)"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    said = subprocess.run(
        [*as_nobody, sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("cannot open the records: ")
    assert said.endswith(f"Permission denied ({tmp_path}/m)\n")


# -- damage

READ_ALL = """
import sys
from snapfs import *
try:
    store = MetaStore(sys.argv[1], map_size=1 << 24)
    with store.reading() as reader:
        records = [repr((number, reader.record(number))) for number in reader.numbers()]
        infos = list(reader.walk())
        for kind in Kind:
            list(reader.listing(kind)), list(reader.children(1, kind)), reader.count(kind)
        for info in infos:
            reader.id_of(info.name)
    print(*records, sep=chr(10))
except Damaged as error:
    print("Damaged:", error)
"""


def read_all(path: Path) -> str:
    """What another process reads, or that it was killed: LMDB aborts on some pages, and nobody can stop it."""
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGABRT), done.stderr
    return done.stdout if done.returncode == 0 else "aborted"


async def test_a_damaged_page_is_told_and_never_read_as_other_records(tmp_path: Path) -> None:
    """The reader says Damaged, or dies; what reads the file without LMDB tells each such page."""
    path = tmp_path / "m"
    store = MetaStore(str(path), map_size=1 << 24)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.serve)
        await store.write(adding("base", Kind.COMMITTED))
        for part in range(5):
            await store.write(lambda writer, part=part: [adding(f"{part}-{n}", parent=1)(writer) for n in range(200)])
        store.stop()
    store.close()
    whole = path.read_bytes()
    pages = -(-len(whole.rstrip(b"\0")) // 4096)  # the rest was never written
    right = read_all(path)
    assert right.count("Record(") == 1001
    outcomes = []
    for seed in range(12):
        dice = random.Random(seed)
        page = dice.randrange(2, pages) * 4096
        other = dice.randrange(2, pages) * 4096
        instead = [dice.randbytes(4096), bytes(4096), whole[other : other + 4096]][seed % 3]
        path.write_bytes(whole[:page] + instead + whole[page + 4096 :])
        said = read_all(path)
        outcomes.append(said.partition(":")[0] if said != right else "right")
        assert outcomes[-1] in ("Damaged", "aborted", "right"), said[:300]
        assert (outcomes[-1] == "right") >= (verify(str(path), subdir=False) == [])  # type: ignore[no-untyped-call]
    assert "Damaged" in outcomes
