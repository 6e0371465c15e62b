"""The tree without a mount: inodes, offsets, and that every node is found again by its inode."""

from __future__ import annotations

import errno
import os
import subprocess
import time
import zlib
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing
from msgspec import structs

from snapfs import NotFound, Snapshotter, errors
from snapfs.errors import Stale
from snapfs.fuse import cache
from snapfs.fuse.errno import errno_of
from snapfs.model import Change, Kind
from snapfs.tree import Tree
from snapfs.tree.attributes import ATTRIBUTES
from snapfs.tree.inodes import FIRST_LABEL, ROOT_INODE, Slot, kind_inode, label_slots, pack, unpack
from snapfs.tree.node import Directory, Link
from snapfs.tree.reads import LATELY, MOST_OF_USER, Reads
from snapfs.tree.texts import MOST, Text
from tests.nodes import crawl


@pytest.fixture
async def tree(snapshotter: Snapshotter) -> Tree:
    """A base with two children, labels on both sides."""
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b", labels={"x": "1", "y/z": "2"})
    await snapshotter.prepare("web", "base", labels={"x": "3"})
    await snapshotter.view("peek", "base")
    await snapshotter.usage("base")  # from then on nothing changes any more
    return Tree(snapshotter)


async def test_every_node_has_an_inode_of_its_own_that_leads_back_to_it(tree: Tree) -> None:
    nodes = list(crawl(tree.node(ROOT_INODE)))
    assert len({node.inode for _, node in nodes}) == len(nodes) > 30
    for path, node in nodes:
        found = tree.node(node.inode)
        assert type(found) is type(node)
        shown = [other.attributes() for other in (found, node, tree.walk(path))]
        if path in (".snapfs/stats.json", ".snapfs/metrics"):  # which are always new
            shown = [structs.replace(other, size=0, time=0) for other in shown]
        assert shown == [shown[0]] * 3
        assert found.path == node.path == path
        if isinstance(node, Link):
            assert found.target() == node.target() == tree.walk(path).target()


async def test_links_lead_to_nodes(tree: Tree) -> None:
    for path, node in crawl(tree.node(ROOT_INODE)):
        if isinstance(node, Link) and not node.target().startswith("/"):
            parts = path.split("/")[:-1]
            for part in node.target().split("/"):
                parts = parts[:-1] if part == ".." else [*parts, part]
            assert isinstance(tree.walk("/".join(parts)), Directory)


async def test_a_name_that_is_in_use_is_refused_without_waiting_for_the_disk(tree: Tree) -> None:
    active, committed = tree.walk("active"), tree.walk("committed")
    batches = tree.snapshotter.records.batches.total()
    for attempt in (
        active.mkdir("peek"),
        tree.walk("committed/base/view").mkdir("web"),
        tree.rename(active, "web", active, "peek"),
        tree.rename(active, "web", committed, "base"),
    ):
        with pytest.raises(errors.AlreadyExists):
            await attempt
    assert tree.snapshotter.records.batches.total() == batches
    await tree.rename(active, "web", committed, "web")  # its own name is not in its way


async def test_an_inode_means_the_same_through_rename_and_commit(tree: Tree) -> None:
    inode = tree.walk("active/web").inode
    diff = tree.walk("active/web/diff").inode
    await tree.snapshotter.rename("web", "w2")
    assert tree.walk("active/w2").inode == inode
    await tree.snapshotter.commit("v1", "w2")
    assert tree.walk("committed/v1").inode == inode
    assert tree.node(inode).path == "committed/v1"
    assert tree.walk("committed/v1/diff").inode == diff
    await tree.snapshotter.remove("v1")
    with pytest.raises(NotFound):
        tree.node(inode)
    await tree.snapshotter.prepare("web", "base")
    assert tree.walk("active/web").inode != inode, "another snapshot, another inode"


async def test_each_text_of_a_file_has_an_inode_of_its_own(tree: Tree) -> None:
    before = tree.walk("active/web/info.json")
    assert tree.walk("active/web/info.json").inode == before.inode
    await tree.snapshotter.update("web", {"team": "blue"})
    after = tree.walk("active/web/info.json")
    assert after.inode != before.inode
    handles = [await tree.node(node.inode).open() for node in (before, after)]
    assert [b"blue" in handle.read(0, 4096) for handle in handles] == [False, True], "who was told of a text can open it"
    for n in range(MOST // 4000 + 10):
        tree.state.versions.keep(-n, Text(b"x" * 4000))
    with pytest.raises(Stale):
        tree.node(before.inode)
    assert tree.node(after.inode).path == "active/web/info.json", "the present text can be made again"


async def test_a_listing_goes_on_where_it_was_whatever_comes_and_goes(tree: Tree) -> None:
    for n in range(10):
        await tree.snapshotter.prepare(f"k{n}")
    directory = tree.walk("active")
    seen = [(offset, name) for offset, name, _ in directory.entries(0)][:5]
    for gone in (seen[-1][1], "k7", "web"):
        await tree.snapshotter.remove(gone)
    await tree.snapshotter.prepare("late")
    rest = [name for _, name, _ in tree.walk("active").entries(seen[-1][0])]
    assert rest == ["k4", "k5", "k6", "k8", "k9", "late"]


async def test_children_come_first(tree: Tree) -> None:
    """So that what deletes a whole directory meets them before it has touched anything.  And labels neither first nor last, so
    that it has met something of the snapshot's own before it deletes a label."""
    for path in ("committed/base", "active/web", "view/peek"):
        names = [name for _, name, _ in tree.walk(path).entries(0)]
        assert "labels" in names[1:-1]
        assert path != "committed/base" or names[:3] == ["active", "view", "committed"]


def test_colliding_labels_get_slots_of_their_own() -> None:
    span = (1 << 28) - FIRST_LABEL
    by_slot: dict[int, str] = {}
    pair = None
    for n in range(200_000):
        key = f"label{n}"
        other = by_slot.setdefault(zlib.crc32(key.encode()) % span, key)
        if other != key:
            pair = other, key
            break
    assert pair is not None, "two of 200,000 keys collide in 28 bits"
    slots = label_slots(pair)
    assert len(set(slots.values())) == 2
    assert slots[pair[0]] == label_slots(pair[:1])[pair[0]], "the earlier one keeps its slot"


def test_slots_of_attributes_are_unique_and_fixed() -> None:
    """They are part of inode numbers: a new attribute takes a new slot."""
    assert {attribute.name: attribute.slot for attribute in ATTRIBUTES} == {
        "mounts.json": 16,
        "mount.sh": 17,
        "info.json": 18,
        "usage.json": 19,
        "parent": 20,
        "diff": 21,
        "rootfs": 22,
        "changes": 23,
        "checkpoint": 24,
        "rollback": 25,
        "fork": 26,
        "squash": 32,
        "dissolve": 33,
        "changes.patch": 34,
        "compare": 35,
        "layer.tar": 36,
        "image.json": 37,
    }


@pytest.mark.parametrize("number", [0, 1, 7, 2**35])
@pytest.mark.parametrize("slot", [1, 16, 256, 2**28 - 1])
def test_inodes_pack_and_unpack(number: int, slot: int) -> None:
    assert unpack(pack(number, slot)) == (number, slot)
    assert 0 < pack(number, slot) < 2**64


@pytest.mark.parametrize("inode", [0, 100, pack(0, 255), pack(99, 1), pack(1, 255), pack(1, 2**27), pack(2, Slot.ACTIVE)])
async def test_no_node(tree: Tree, inode: int) -> None:
    with pytest.raises(NotFound):
        tree.node(inode)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.NotFound(""), errno.ENOENT),
        (errors.AlreadyExists(""), errno.EEXIST),
        (errors.HasChildren(""), errno.ENOTEMPTY),
        (errors.NotEmpty(""), errno.ENOTEMPTY),
        (errors.Busy(""), errno.EBUSY),
        (errors.NotPermitted(""), errno.EPERM),
        (errors.FailedPrecondition(""), errno.EPERM),
        (errors.NameTooLong(""), errno.ENAMETOOLONG),
        (errors.NotUtf8(""), errno.EILSEQ),
        (errors.LabelTooBig(""), errno.E2BIG),
        (errors.WrongParent(""), errno.EPERM),
        (errors.InvalidArgument(""), errno.EINVAL),
        (errors.Damaged(""), errno.EIO),
        (errors.Unavailable(""), errno.EIO),
        (errors.Unavailable("", errno.ENOSPC), errno.ENOSPC),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else errno.errorcode[value],
)
def test_errno(error: errors.SnapshotError, number: int) -> None:
    assert errno_of(error) == number


def test_every_error_has_an_errno() -> None:
    def kinds(kind: type[errors.SnapshotError]) -> Iterator[type[errors.SnapshotError]]:
        for sub in kind.__subclasses__():
            yield sub
            yield from kinds(sub)

    for kind in kinds(errors.SnapshotError):
        assert errno_of(kind() if issubclass(kind, errors.Closed | errors.NoThread) else kind("")) > 0


# -- what was read, before it is deleted

ALL = (17, 18, 20)
LISTED = Slot.SNAPSHOT


def copy(reads: Reads, pid: int, number: int, user: int | None = None) -> None:
    for slot in (LISTED, *ALL):
        reads.note(user, pid, number, slot)


async def test_who_copies_may_take_long(autojump_clock: trio.testing.MockClock) -> None:
    """It may be busy with others in between; when it has read nothing at all for ten minutes, it no longer moves anything."""
    reads, pid = Reads(), os.getpid()
    copy(reads, pid, 1)
    for number in range(2, 200):
        await trio.sleep(60)
        copy(reads, pid, number)
    assert all(reads.has_copied(pid, number, ALL) for number in range(1, 200))
    reads.note_refusal(pid, 7)
    assert [number for number in range(200) if reads.was_refused(pid, number)] == [7]
    reads.note(None, pid, 7, LISTED)  # it reads on
    assert not reads.was_refused(pid, 7)
    await trio.sleep(LATELY - 1)
    assert reads.has_copied(pid, 1, ALL)
    await trio.sleep(2)
    assert not reads.has_copied(pid, 1, ALL)


async def test_nobody_makes_another_user_s_reads_forgotten() -> None:
    """Nor is more remembered than there is room for; a process of which something had to be forgotten may have copied all."""
    reads, pid = Reads(), os.getpid()
    copy(reads, pid, 1)
    reads.note(None, pid, 2, ALL[0])
    for thread in range(5 * MOST_OF_USER):
        reads.note(1234, 1_000_000 + thread, 1, ALL[0])
    for number in range(5 * MOST_OF_USER):
        reads.note(5678, 2_000_000, number, ALL[0])
    assert reads.has_copied(pid, 1, ALL)
    assert not reads.has_copied(pid, 2, ALL)
    assert len(reads._processes) <= 2 + MOST_OF_USER
    assert reads.has_copied(2_000_000, 5 * MOST_OF_USER + 1, ALL)
    assert reads._processes[2_000_000].seen == {}
    assert reads.has_copied_one(pid, 2, ALL[0])
    assert not reads.has_copied_one(pid, 1, ALL[0])


async def test_a_thousand_are_moved_at_once() -> None:
    reads, pid = Reads(), os.getpid()
    for number in range(5000):
        copy(reads, pid, number)
    assert all(reads.has_copied(pid, number, ALL) for number in range(5000))


async def test_another_process_with_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads()
    with subprocess.Popen(["sleep", "60"]) as process:
        copy(reads, process.pid, 1)
        assert reads.has_copied(process.pid, 1, ALL)
        monkeypatch.setattr(reads._processes[process.pid], "known_since", time.clock_gettime(time.CLOCK_BOOTTIME) - 60)
        assert not reads.has_copied(process.pid, 1, ALL)
        process.kill()


async def test_what_is_copied_by_a_process_whose_number_another_had(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can have a number remembered, by what they read, so that the next who has it is let delete what it has copied."""
    reads = Reads()
    with subprocess.Popen(["sleep", "60"]) as process:
        reads.note(1234, process.pid, 7, LISTED)
        monkeypatch.setattr(reads._processes[process.pid], "known_since", time.clock_gettime(time.CLOCK_BOOTTIME) - 60)
        await trio.sleep(30)
        copy(reads, process.pid, 1)
        assert reads.has_copied(process.pid, 1, ALL)
        assert reads._processes[process.pid].user is None
        assert not reads.has_copied_one(process.pid, 7, LISTED)
        process.kill()


async def test_the_kernel_forgets_what_it_was_told_and_not_what_it_was_not(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once, until it is told again."""
    forgotten: list[int] = []
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda inode, attr_only: forgotten.append(inode))
    monkeypatch.setattr(cache, "REMEMBERED", 3)
    kernel, info = cache.KernelCache(), await tree.snapshotter.stat("web")
    change, counted = Change(info, structs.replace(info, updated=1)), Change(info, info, counted=True)

    def forgets(change: Change) -> list[int]:
        forgotten.clear()
        kernel.note(change)
        return sorted(forgotten)

    directory, labels, diff = (tree.walk(f"active/web{path}").inode for path in ("", "/labels", "/diff"))
    assert forgets(change) == []
    for inode in (directory, labels, diff):
        kernel.note_told(inode)
    assert forgets(counted) == [directory]
    assert forgets(change) == sorted([labels, diff])
    assert forgets(change) == forgets(counted) == []
    kernel.note_told(diff)
    kernel.note_told(directory)
    assert forgets(change) == sorted([directory, diff])
    everything = [kind_inode(Kind.ACTIVE), pack(0, Slot.BY_ID)]
    assert forgets(Change(info, None)) == everything, "whatever it was told at the beginning"
    assert forgets(Change(info, None)) == []
    kernel.note_told(kind_inode(Kind.ACTIVE))
    assert forgets(Change(None, info)) == everything[:1]
    for number in range(1, 9):
        kernel.note_told(pack(info.id + number, Slot.SNAPSHOT))
    assert {directory, labels, diff} < set(forgets(change)), "it isn't remembered of so many what they were told of it"
