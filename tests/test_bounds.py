"""What users who may write can make the daemon hold, and how much work: bounded, however many labels they write and whatever
they keep open."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from pyfuse3 import EntryAttributes

from snapfs import Options, open_snapshotter
from snapfs.errors import Stale, TryAgain, Unavailable
from snapfs.fuse import retelling
from snapfs.fuse.cache import KernelCache
from snapfs.fuse.openfiles import ALL, ALLOWANCE, OPENERS, OPENERS_OF_USER, SHARE, OpenFile, OpenFiles
from snapfs.fuse.waiting import OF_READER, OF_READERS, Waiting
from snapfs.labels import COUNT, MESSAGE, NUMBER, OF, ROOM
from snapfs.model import ByNode, Caller, Change, Kind
from snapfs.options import Sync
from snapfs.tree import Handle, Tree, inodes, listing, texts
from snapfs.tree.attributes import BY_NAME
from snapfs.tree.commands import OpenCommand
from snapfs.tree.daemon import OpenCleanup
from snapfs.tree.handles import OpenText
from snapfs.tree.inodes import Slot, label_slot, pack
from snapfs.tree.labels import LabelText
from snapfs.tree.log import Log, OpenLog
from snapfs.tree.openlabels import OpenLabel
from snapfs.tree.texts import IN_MEMORY, MOST, ON_DISK, OVERHEAD, LongText, Text, Versions
from tests.daemon import Daemon
from tests.processes import until
from tests.refusals import failing
from tests.tree import info
from tests.users import ALICE, alice, bob, run

Make = Callable[..., Daemon]

VALUE = "v" * (ROOM // COUNT - 4)  # COUNT labels with keys of four bytes fill a snapshot


def resident(daemon: Daemon) -> float:
    """The memory that the daemon has, in MiB."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


@pytest.fixture
def everybodys(make_daemon: Make, open_path: None, users: None) -> Daemon:
    """A daemon of root's whose tree everybody may write."""
    return make_daemon("-o", "allow_other,umask=000").start()


@pytest.fixture
async def tree(tmp_path: Path) -> AsyncIterator[Tree]:
    async with open_snapshotter(tmp_path / "root", options=Options(sync=Sync.NONE)) as snapshotter:
        yield Tree(snapshotter)


AS_ALICE = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
os.setgroups([]); os.setgid({ALICE}); os.setuid({ALICE})
"""  # not by setpriv: she can't run this interpreter

ATTACK = """
snapshots, updates, value = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for s in range(snapshots):
    os.mkdir(f"active/a{s}")
    for n in range(256):
        with open(f"active/a{s}/labels/k{n:03}", "wb", 0) as label:
            label.write(value.encode())
kept, refused = [], 0
for n in range(updates):
    try:
        with open(f"active/a{n % snapshots}/labels/k000", "wb", 0) as label:
            label.write(b"%d" % n)
    except OSError as error:
        assert error.strerror == "Too many open files", error
        refused += 1
    for path in (f"active/a{n % snapshots}/info.json", ".snapfs/snapshots", ".snapfs/events"):
        try:
            kept.append(os.open(path, os.O_RDONLY))
            os.pread(kept[-1], 1, 0)
        except OSError as error:
            assert error.strerror == "Too many open files", error
            refused += 1
    if n % 10 == 0:
        os.listdir(f"active/a{n % snapshots}/labels")
        for key in os.listdir(f"active/a{n % snapshots}/labels"):
            os.stat(f"active/a{n % snapshots}/labels/{key}")
print(len(kept), refused, flush=True)
sys.stdin.read()
"""


@contextmanager
def attacking(daemon: Daemon, script: str, *arguments: str) -> Iterator[str]:
    """Alice runs ``script`` in the tree, up to where it has printed a line; she goes on in the block."""
    command = [sys.executable, "-c", AS_ALICE + script, *arguments]
    with subprocess.Popen(command, cwd=daemon.mnt, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline()
        process.stdin.close()
    assert process.returncode == 0


def test_labels_and_what_is_kept_open_do_not_fill_the_memory(everybodys: Daemon) -> None:
    """Each update makes another text of info.json and of .snapfs/snapshots, of 64 and 256 KiB, and she keeps all open."""
    before = resident(everybodys)
    with attacking(everybodys, ATTACK, "4", "300", VALUE) as said:
        kept, refused = map(int, said.split())
        assert refused > kept > 0
        assert resident(everybodys) - before < 48  # MiB; 100 and more where nobody counts
        assert "user 1001 has too many files open, or too many texts" in everybodys.error_log()[-1]
        assert run(bob, "cat", everybodys.mnt / "active/a1/info.json", everybodys.mnt / ".snapfs/snapshots").returncode == 0
        assert len(info(everybodys.mnt / "active/a1")["labels"]) == COUNT, "root is not counted"
    assert run(alice, "cat", everybodys.mnt / "active/a1/info.json").returncode == 0, "she has closed them"


WRITERS = """
os.mkdir("active/k")
with open("active/k/labels/l", "w") as label:
    label.write("stays")
kept, refused = [], 0
for n in range(4000):
    path, flags = (f"active/k/labels/new{n}", os.O_CREAT) if n % 2 else ("active/k/labels/l", os.O_TRUNC * (refused > 0))
    try:
        kept.append(os.open(path, os.O_WRONLY | flags))
    except OSError as error:
        assert error.strerror == "Too many open files", error
        refused += 1
print(len(kept), refused, flush=True)
sys.stdin.read()
"""


def test_labels_open_for_writing_do_not_fill_the_memory(everybodys: Daemon) -> None:
    labels = everybodys.mnt / "active/k/labels"
    with attacking(everybodys, WRITERS) as said:
        kept, refused = map(int, said.split())
        assert refused > 1000
        assert kept * OpenLabel.weight <= SHARE
        assert (labels / "l").read_text() == "stays\n", "an open that was refused has emptied nothing"
        assert len(os.listdir(labels)) == 1 + kept // 2, "nor made anything"
        (labels / "l").write_text("root's")
    until(lambda: os.listdir(labels) == ["l"], "what was never written is gone")
    assert (labels / "l").read_text() == "root's\n"


READERS = """
kept, refused = [], 0
while refused < 2000:
    try:
        kept.append(os.open("README", os.O_RDONLY))
    except OSError as error:
        assert error.strerror == "Too many open files", error
        refused += 1
for path in ("committed/base/rootfs", "active/web/mounts.json"):
    for n in range(500):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            refused += 1
print(refused, flush=True)
sys.stdin.read()
"""


def test_what_is_refused_to_readers_pushes_nothing_out_of_the_log(make_daemon: Make, open_path: None, users: None) -> None:
    """Too many open files, an entry that this tree leaves out, and a damaged snapshot."""
    daemon = make_daemon("-o", "allow_other,no_rootfs").start()
    os.mkdir(daemon.mnt / "active/a")
    os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/base")
    os.mkdir(daemon.mnt / "committed/base/active/web")
    with failing(errno.ENOTEMPTY):
        os.rmdir(daemon.mnt / "committed/base")
    shutil.rmtree(daemon.root / "snapshots/1")
    with attacking(daemon, READERS) as said:
        assert int(said) == 3000
        assert " ENOTEMPTY rmdir committed/base" in daemon.error_log()[0]
        assert len(daemon.error_log()) <= 1 + OF_READERS
        assert sum(" EMFILE open README" in line for line in daemon.error_log()) >= OF_READER
        for _ in range(2 * OF_READERS):
            with failing(errno.ENOENT):
                os.stat(daemon.mnt / "committed/base/rootfs")
        assert sum(" ENOENT lookup" in line for line in daemon.error_log()) >= 2 * OF_READERS, "root has them all"


def handle(size: int) -> OpenText:
    return OpenText(Text(b"x" * size))


def opened(files: OpenFiles, handle: Handle, uid: int) -> int:
    files.charge(handle, uid)
    return files.add(OpenFile(2, None, "f", handle, EntryAttributes(), False))


def test_the_share_of_a_user_and_of_all() -> None:
    files = OpenFiles()
    size = SHARE // 4
    mine = [opened(files, handle(size), 1) for _ in range(3)]
    with pytest.raises(Unavailable, match="user 1 has too many files open") as refused:
        opened(files, handle(size), 1)
    assert refused.value.errno == errno.EMFILE
    files.remove(mine.pop())
    shared = Text(b"x" * size)
    again = [opened(files, OpenText(shared), 1) for _ in range(100)]  # a text counts once, a handle each time
    with pytest.raises(Unavailable):
        opened(files, handle(size), 1)
    for fh in again[1:]:
        files.remove(fh)
    with pytest.raises(Unavailable):
        opened(files, handle(size), 1)
    files.remove(again[0])
    opened(files, handle(size), 1)
    others: list[int] = []
    with pytest.raises(Unavailable, match="some must be closed") as refused:
        others += (opened(files, handle(size), uid) for uid in range(2, 99))
    assert refused.value.errno == errno.ENFILE
    assert ALL // size - 4 <= len(others) + 3 <= ALL // (size - ALLOWANCE)
    opened(files, handle(ALLOWANCE // 2), 100)  # who has nothing open may open something
    files.remove(others.pop())
    opened(files, handle(size), 99)


@pytest.mark.parametrize("name", ["cleanup", "checkpoint", "rollback", "fork", "squash", "dissolve"])
async def test_how_often_a_file_may_be_open_for_writing(tree: Tree, name: str) -> None:
    """The kernel lets one write at a time, and all others wait for that."""
    files = OpenFiles()

    def of(snapshot: int) -> Handle:
        if name == "cleanup":
            return OpenCleanup(tree.state)
        command = BY_NAME[name].command
        assert command is not None
        return OpenCommand(tree.state, name, ByNode(snapshot), command)

    def open_one(uid: int) -> int:
        return opened(files, of(1), uid)

    of_one = [open_one(1) for _ in range(OPENERS_OF_USER)]
    with pytest.raises(TryAgain):
        open_one(1)
    for uid in range(2, 2 + OPENERS - OPENERS_OF_USER):
        open_one(uid)
    with pytest.raises(TryAgain):
        open_one(2)
    files.remove(of_one.pop())
    open_one(2)
    for uid in range(100, 100 + OPENERS):  # who has none
        open_one(uid)
    with pytest.raises(TryAgain):
        open_one(99)
    if name != "cleanup":
        opened(files, of(2), 1)  # another file
    for fh in list(files._by_number):
        files.remove(fh)
    assert (files._held, files._writers) == ({}, {})


def test_a_reader_of_a_log_weighs_what_it_holds() -> None:
    """That is the rest of a line of which it has read a part."""
    log, files = Log(str), OpenFiles()
    log.add("x" * 60_000 + "\n")
    readers = [OpenLog(log) for _ in range(SHARE // 1000)]
    for reader in readers[:1000]:
        opened(files, reader, 1)
    assert files._held[1].weight < 1100 * 1000
    read: list[OpenLog] = []
    with pytest.raises(Unavailable, match="user 1 has too many files open"):
        for reader in readers[:1000]:
            read.append(reader)
            with reader.reading():
                reader.read(0, 10)
                files.reweigh(reader)
    assert 100 < len(read) <= SHARE // 60_000
    reader = read[-1]
    assert reader.weight == readers[-1].weight, "it holds nothing"
    readers[0].read(10, 60_000)
    files.reweigh(readers[0])
    with reader.reading():
        assert reader.read(0, 10) == b"x" * 10
        files.reweigh(reader)
    for fh in range(1, 1001):
        files.remove(fh)
    assert (files._held, files._weight, files._allowed) == ({}, 0, 0)


def test_texts_that_are_remembered_weigh_what_they_cost(tmp_path: Path) -> None:
    """By bytes, whatever they are: thousands of small ones, long ones on the disk, and still two of the longest."""
    texts: tuple[tuple[Callable[[int], Text], int], ...] = (
        (lambda n: LabelText("k" * 255, "v"), MOST // 1255),
        (lambda n: Text(b""), MOST // OVERHEAD),
        (lambda n: LongText(["x" * (IN_MEMORY + 1)], str(tmp_path)), 2 * MOST // IN_MEMORY),
        (lambda n: LongText(["x" * IN_MEMORY] * 30, str(tmp_path)), MOST * ON_DISK // (30 * IN_MEMORY)),
    )
    for make, most in texts:
        versions = Versions()
        count = 2 * most
        for n in range(count):
            versions.keep(n, make(n))
        kept = [n for n in range(count) if versions.get(n) is not None]
        assert kept == list(range(count))[-len(kept) :], "the newest"
        assert 0.9 * most <= len(kept) <= most
    longest = LongText(["x" * IN_MEMORY] * 100, str(tmp_path))
    longest.weight = LongText.weigh(1 << 40)
    for n in (-1, -2):
        versions.keep(n, longest)
    assert versions.get(-1) is versions.get(-2) is longest


def free_on(disk: Path) -> int:
    space = os.statvfs(disk)
    return space.f_bavail * space.f_frsize


def test_a_text_takes_a_part_of_what_is_free_on_the_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it is written, and leaves nothing; so it is where others have filled the disk meanwhile."""
    before = free_on(small_disk)
    part = ["x" * IN_MEMORY]
    with pytest.raises(Unavailable, match="the text is longer than a tenth of the 1") as no:
        LongText(part * 3, str(small_disk), is_bounded=True)
    assert no.value.errno == errno.EFBIG
    assert free_on(small_disk) == before
    assert LongText(part * 3, str(small_disk)).size == 3 * IN_MEMORY, "one that has another bound"
    monkeypatch.setattr(texts, "PART", 2)

    def meanwhile() -> Iterator[str]:
        yield from part * 4
        (small_disk / "others").write_bytes(b"x" * (before // 2))
        yield from part * 2

    assert LongText(part * 5, str(small_disk), is_bounded=True).on_disk == 5 * IN_MEMORY
    with pytest.raises(Unavailable, match="the text is longer"):
        LongText(meanwhile(), str(small_disk), is_bounded=True)


def test_a_small_layer_does_not_fill_the_disk(make_daemon: Make, small_disk: Path) -> None:
    """Of each of many names of one file a patch has all lines."""
    daemon = make_daemon(root=small_disk).start()
    web = daemon.mnt / "active/web"
    web.mkdir()
    (web / "diff/0").write_text("a line of text\n" * 60_000)
    for number in range(1, 30):
        os.link(web / "diff/0", web / f"diff/{number}")
    before = free_on(small_disk)
    with failing(errno.EFBIG):
        (web / "changes.patch").read_text()
    assert "EFBIG open active/web/changes.patch: the text is longer than a tenth of the " in daemon.error_log()[-1]
    with pytest.raises(OSError, match="File too large"), (web / "compare").open("w") as file:
        file.write("patch\n")
    assert before - free_on(small_disk) < 100_000
    assert (web / "changes").read_text().count("\n") == 30


async def test_a_long_text_is_on_the_disk_until_it_is_closed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is found by who has been told to look its name up again, and by others meanwhile."""
    monkeypatch.setattr(texts, "MOST_ON_DISK", IN_MEMORY)
    await tree.snapshotter.prepare("web")
    number = (await tree.snapshotter.stat("web")).id
    for name in "abc":
        (Path(tree.snapshotter.layer_path(number)) / name).write_text("a line of text\n" * 60_000)
    told = retelling.Retelling(tree, KernelCache(), OpenFiles(), Waiting(trio.current_time))
    with pytest.raises(Stale):
        await told.to_read(tree.walk("active/web/changes.patch").inode, 1, Caller(ALICE, 1))
    looked_up = tree.walk("active/web/changes.patch").inode
    node = await told.to_read(looked_up, 1, Caller(ALICE, 1))
    assert node.inode == looked_up, "and not past the pages"
    handle = await node.open()
    del node
    assert handle.size > 2 << 20
    assert tree.walk("active/web/changes.patch").attributes().size == handle.size
    del handle
    gc.collect()  # of the Stale, which has all frames
    assert tree.state.found(number, inodes.PATCH_SLOT) is None
    await tree.snapshotter.commit("v1", "web")
    node = await tree.walk("committed/v1/changes.patch").refresh()
    assert (await node.open()).size > 2 << 20


def peak(work: Callable[[], object]) -> float:
    """The memory that ``work`` takes at most, in MiB."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def test_a_text_of_long_lines_is_never_whole_in_memory(tmp_path: Path) -> None:
    lines = ("x" * 64 * 1024 + "\n" for _ in range(1000))
    assert peak(lambda: LongText(lines, str(tmp_path))) < 8


async def test_the_listing_of_many_labels_holds_one_record_after_the_other(tree: Tree) -> None:
    labels = {f"k{n:03}": VALUE for n in range(COUNT)}
    for n in range(200):
        await tree.snapshotter.prepare(f"k{n}", labels=labels)
    assert peak(lambda: listing._collected(tree.state)) < 6, "MiB: the records are 12, and lines go to the disk from 1 on"


async def kept(tree: Tree, key: str, count: int, message: str) -> None:
    """Give the workspace ``key`` so many checkpoints."""

    async def keep(number: int) -> None:
        await tree.snapshotter.prepare(f"{key}-{number}")
        labels = {OF: key, NUMBER: str(number), MESSAGE: message}
        await tree.snapshotter.commit(f"{key}@{number}", f"{key}-{number}", labels)

    await tree.snapshotter.prepare(key)
    async with trio.open_nursery() as nursery:
        for number in range(1, count + 1):
            nursery.start_soon(keep, number)


def counted(tree: Tree) -> bool:
    """Whether it is known what each committed snapshot takes."""
    with tree.snapshotter.records.reading() as reader:
        return reader.uncounted() == []


async def test_a_long_list_of_checkpoints_can_be_read_and_is_never_whole_in_memory(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is longer than all texts that are remembered may be together."""
    monkeypatch.setattr(texts, "MOST", IN_MEMORY)
    count, message = 500, "m" * 3900
    await kept(tree, "web", count, message)
    with trio.fail_after(60):
        while not counted(tree):  # which takes memory, too
            await trio.sleep(0.01)
    tracemalloc.start()
    try:
        node = await tree.walk("active/web/checkpoint").refresh()
        handle = await node.open()
        most = tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()
    assert handle.size > texts.MOST
    assert handle.read(handle.size - 10_000, 10_000).splitlines()[-1].startswith(f"{count}\tweb@{count}\t".encode())
    assert tree.walk("active/web/checkpoint").attributes().size == handle.size
    assert most < 4, "MiB: the records are 2, and lines go to the disk from 1 on"


async def test_each_of_many_readers_opens_a_text_that_has_changed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is told once to look the name up again, however long the texts are that were found for others."""
    monkeypatch.setattr(retelling, "OF_USER", 8 * OVERHEAD)
    await kept(tree, "web", 10, "m" * 3900)
    told = retelling.Retelling(tree, KernelCache(), OpenFiles(), Waiting(trio.current_time))
    for pid in range(1, 6):
        with pytest.raises(Stale):
            await told.to_read(tree.walk("active/web/checkpoint").inode, pid, Caller(ALICE, 1))
        await tree.snapshotter.checkpoint("web", f"for {pid}")
    for pid in range(1, 6):
        node = await told.to_read(tree.walk("active/web/checkpoint").inode, pid, Caller(ALICE, 1))
        handle = await node.open()
        assert "for 4" in handle.read(0, handle.size).decode()
        await tree.snapshotter.checkpoint("web", "and another")


def test_the_work_of_encoding_labels_does_not_depend_on_what_is_in_them() -> None:
    """A call for each character takes 20 times as long."""
    special = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) + "%,="
    assert listing._labels({"a=b%": special}) == "a%3Db%25=" + "".join(
        c if c == "=" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in special
    )
    calls = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(note)
    try:
        listing._labels({"k": "%" * 4000})
    finally:
        sys.setprofile(None)
    assert calls < 50


async def test_what_is_kept_for_processes_that_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: retelling.Awaited[int, str] = retelling.Awaited()
    size = retelling.MOST // 4
    for pid in range(10):
        awaited.keep(pid, f"for {pid}", size)
    assert [awaited.get(pid) for pid in range(5, 10)] == [None, "for 6", "for 7", "for 8", "for 9"]
    awaited.keep(6, "again", size)
    awaited.keep(10, "for 10", size)
    assert [awaited.pop(pid) for pid in (6, 7, 8, 9, 10, 10)] == ["again", None, "for 8", "for 9", "for 10", None]
    for pid in range(4):
        awaited.keep(pid, f"for {pid}", size)
    assert awaited.get(0) == "for 0", "what was fetched counts no more"
    monkeypatch.setattr(retelling, "RETRY", -1.0)
    assert awaited.get(0) is None


# -- how much work it is


async def test_the_work_of_listing_labels_grows_as_their_number(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ls -l`` and ``cat labels/*``: the directory is listed, each label looked up, looked at and read."""
    found_out = Counter[str]()

    def counted(word: str) -> int:
        found_out[word] += 1
        return label_slot(word)

    monkeypatch.setattr(inodes, "label_slot", counted)
    work = {}
    for count in (COUNT // 8, COUNT):
        await tree.snapshotter.prepare(f"k{count}", labels={f"k{n:03}": VALUE for n in range(count)})
        directory = tree.walk(f"active/k{count}/labels").inode
        found_out.clear()
        for name in [name for _, name, _ in tree.node(directory).entries(0)]:
            inode = tree.node(directory).lookup(name).inode
            label = tree.node(inode)
            assert label.attributes().size == len(VALUE) + 1
            assert (await label.open()).read(0, 4096) == VALUE.encode() + b"\n"
        work[count] = found_out.total()
    assert work[COUNT] <= 8 * work[COUNT // 8], work


async def test_the_work_of_removing_does_not_grow_with_what_was_removed_in_others(tree: Tree) -> None:
    """Directories in a snapshot are removed, and are back: of each it is remembered as long as there is the snapshot."""
    work = {}
    await tree.snapshotter.prepare("k")
    for count in (1, 300):
        numbers = [await tree.snapshotter.create(Kind.ACTIVE, f"{count}-{n}") for n in range(count)]
        for n in range(count):
            directory = tree.walk(f"active/{count}-{n}")
            await directory.rmdir("labels", 0)
            assert tree.state.removals.of(tree.node(pack(numbers[n], Slot.LABELS)).inode) == 1
        calls = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        change = Change(await tree.snapshotter.stat("k"), None)
        sys.setprofile(counted)
        try:
            tree.state._note(change)
        finally:
            sys.setprofile(None)
        work[count] = calls
    assert work[300] < work[1] + 10, work


async def test_an_update_is_seen_whatever_inodes_are_remembered(tree: Tree) -> None:
    for n in range(20):
        await tree.snapshotter.prepare(f"k{n}", labels={"a": "1", "b": "1"})
    for _ in range(2):
        seen = {tree.walk(f"active/k{n}/labels/{key}").inode for n in range(20) for key in "ab"}
        assert len(seen) == 40
    before = tree.walk("active/k0/labels/a").inode
    await tree.snapshotter.update("k0", {"a": "2"}, ["labels.a"])
    after = tree.walk("active/k0/labels/a")
    assert after.inode != before
    assert after.attributes().size == 2
    assert (await tree.node(before).open()).read(0, 9) == b"1\n", "what was looked up can still be opened"
    await tree.snapshotter.update("k0", {}, ["labels.b"])
    assert [name for _, name, _ in tree.walk("active/k0/labels").entries(0)] == ["a"]
