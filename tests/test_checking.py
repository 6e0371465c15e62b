"""``snapfs check``: each damage is told with what to do, what is said twice is mended, and lost records are made anew."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from snapfs import (
    Damaged,
    FailedPrecondition,
    Info,
    InvalidArgument,
    Kind,
    MetaStore,
    NotFound,
    Unavailable,
    open_snapshotter,
)
from snapfs.kernel import mounting
from snapfs.offline.checking import Finding, Problem, check
from snapfs.offline.rebuilding import rebuild
from snapfs.options import Options
from snapfs.root import imprint, unflushed
from snapfs.root.imprint import Imprint
from snapfs.services import flushing
from snapfs.store import space
from snapfs.store.schema import Record
from snapfs.store.writing import Writer
from tests.daemon import Daemon
from tests.placing import DryPool
from tests.records import until_in_line

pytestmark = pytest.mark.durable

WIDE = {f"label{n}": "x" * 4000 for n in range(3)}


async def fill(root: Path) -> list[Info]:
    """1 committed ``base``, 2 active ``web`` on it, 3 view ``peek`` of it, 4 committed ``v1`` on it with labels too big for an
    extended attribute of ext4, 5 active ``lone``."""
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("b")
        Path(snapshotter.layers.fs(1), "file").write_text("content")
        await snapshotter.commit("base", "b", {"l": "1"})
        await snapshotter.prepare("w", "base", {"l": "2"})
        await snapshotter.rename("w", "web")
        await snapshotter.view("peek", "base")
        await snapshotter.prepare("c", "base")
        await snapshotter.commit("v1", "c", WIDE)
        await snapshotter.prepare("lone")
        await snapshotter.update("lone", {"l": "3"})
        for name in ("base", "v1"):
            await snapshotter.usage(name)
        return await snapshotter.walk()


@pytest.fixture
async def filled(root: Path) -> Path:
    await fill(root)
    return root


def found(root: Path, *, repair: bool = False, accept: tuple[str, ...] = ()) -> list[Finding]:
    return list(check(str(root), repair=repair, accept=accept))


def wrong(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.problem is not Problem.NOTE]


def in_records(operation: Callable[[Writer], None]) -> Callable[[Path], None]:
    """A damage that ``operation`` does to the records."""

    def damage(root: Path) -> None:
        with closing(MetaStore(f"{root}/metadata.mdb")) as records:
            records.write_now(operation)

    return damage


def everything(root: Path) -> dict[str, object]:
    """All that is in ``root``, with its times, but for who has it open."""
    shown: dict[str, object] = {}
    for directory, _, files in os.walk(root):
        for path in (directory, *(f"{directory}/{name}" for name in files)):
            status = os.lstat(path)
            shown[path] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    shown[f"{root}/metadata.mdb"] = (root / "metadata.mdb").read_bytes()
    return {path: value for path, value in shown.items() if not path.endswith("/lock")}


async def test_nothing_is_wrong_and_nothing_is_changed(filled: Path) -> None:
    before = everything(filled)
    assert found(filled) == []
    assert everything(filled) == before
    assert found(filled, repair=True) == []
    assert everything(filled) == before


@in_records
def broken_record(writer: Writer) -> None:
    writer._txn.put((2).to_bytes(8, "big"), b"\xc1garbage", db=writer._tables.snapshots)


@in_records
def broken_index(writer: Writer) -> None:
    writer._txn.delete(b"web", db=writer._tables.names)
    writer._txn.put(b"nobody", (77).to_bytes(8, "big"), db=writer._tables.names)


@in_records
def stray_mark(writer: Writer) -> None:
    writer.mark_unflushed(77, "some boot")


@in_records
def low_last_id(writer: Writer) -> None:
    writer._txn.put(b"last_id", (2).to_bytes(8, "big"), db=writer._tables.meta)


@in_records
def missing_parent(writer: Writer) -> None:
    record = writer.record(2)
    assert record is not None
    writer.overwrite(2, Record(record.name, record.kind, 50, record.created, record.updated, record.labels))
    writer.rebuild_indexes()


@in_records
def own_parent(writer: Writer) -> None:
    writer.put(4, Record("v1", Kind.COMMITTED, 1, 0, 0, {}))
    writer.put(1, Record("base", Kind.COMMITTED, 4, 0, 0, {}))


@in_records
def same_name(writer: Writer) -> None:
    writer.overwrite(5, Record("web", Kind.ACTIVE, 0, 0, 0, {}))
    writer.rebuild_indexes()


def other_usage(root: Path) -> None:
    (root / "snapshots/1/fs/more").write_bytes(bytes(10_000))


def work_is_a_file(root: Path) -> None:
    (root / "snapshots/2/work").rmdir()
    (root / "snapshots/2/work").write_text("whose?")


def foreign(root: Path) -> None:
    (root / "snapshots/foreign").write_text("whose?")


@in_records
def removed_in_the_records(writer: Writer) -> None:
    record = writer.record(3)
    assert record is not None
    writer.delete(3, record)


def newer_than_the_records(root: Path) -> None:
    (root / "snapshots/5").rename(root / "snapshots/6")
    (root / "snapshots/5").mkdir()
    (root / "snapshots/5/fs").mkdir()
    (root / "snapshots/5/work").mkdir()


Damage = Callable[[Path], object]

DAMAGES: list[tuple[Damage, list[tuple[Problem, str, str]]]] = [
    # what is done; what is found: the problem, its words, and what --repair did about it
    (
        broken_record,
        [
            (Problem.DAMAGED, "record of snapshot 2 can't be read", 'restored active "web" from what its directory says'),
        ],
    ),
    (broken_index, [(Problem.MISCOUNTED, "indexes of the records: 2 entries are missing or wrong", "made anew")]),
    (stray_mark, [(Problem.MISCOUNTED, "1 entries are missing or wrong", "made anew")]),
    (low_last_id, [(Problem.MISCOUNTED, "1 entries are missing or wrong", "made anew")]),
    (
        missing_parent,
        [
            (Problem.DAMAGED, 'active "web": its parent, number 50, has no record', ""),
            (Problem.MISCOUNTED, "bears another record", "written anew"),
        ],
    ),
    (
        own_parent,
        [
            (Problem.DAMAGED, 'committed "base": it is among its own parents', ""),
            (Problem.DAMAGED, 'committed "v1": it is among its own parents', ""),
            (Problem.MISCOUNTED, '"base".*bears another record', "written anew"),
            (Problem.MISCOUNTED, '"v1".*bears another record', "written anew"),
        ],
    ),
    (
        same_name,
        [
            (Problem.DAMAGED, 'snapshots 2 and 5 are both called "web"', ""),
            (Problem.MISCOUNTED, 'says that it is active "lone"', "written anew"),
        ],
    ),
    (lambda root: shutil.rmtree(root / "snapshots/1"), [(Problem.DAMAGED, 'committed "base".*snapshots/1 is missing', "")]),
    (
        lambda root: shutil.rmtree(root / "snapshots/1/fs"),
        [(Problem.DAMAGED, 'committed "base".*snapshots/1/fs is missing', "")],
    ),
    (
        lambda root: (root / "snapshots/2/work").rmdir(),
        [(Problem.DAMAGED, 'active "web": its workdir .*/2/work is missing', "made an empty one")],
    ),
    (work_is_a_file, [(Problem.DAMAGED, 'active "web": its workdir .*/2/work is missing', "made an empty one")]),
    (
        lambda root: os.removexattr(root / "snapshots/2", imprint.ATTRIBUTE),
        [(Problem.MISCOUNTED, 'active "web".*does not bear its record', "written anew")],
    ),
    (
        lambda root: os.setxattr(root / "snapshots/2", imprint.ATTRIBUTE, b"\xc1"),
        [(Problem.MISCOUNTED, 'active "web".*does not bear its record', "written anew")],
    ),
    (
        foreign,
        [(Problem.ORPHANED, r"foreign: 4.0 KiB in 1 .* less than a minute ago; snapfs makes nothing of that name", "moved to")],
    ),
    (
        removed_in_the_records,
        [(Problem.ORPHANED, 'snapshots/3: .* no record names it, and says that it was view "peek": its removal', "moved to")],
    ),
    (
        newer_than_the_records,
        [
            (Problem.MISCOUNTED, 'active "lone".*does not bear its record', "written anew"),
            (Problem.ORPHANED, 'snapshots/6: .* newer than the records, and says that it was active "lone"', "moved to"),
        ],
    ),
    (other_usage, [(Problem.MISCOUNTED, 'committed "base": it takes .* in 3 inodes, .* in 2 were counted', "corrected")]),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
async def test_each_damage(filled: Path, damage: Damage, expected: list[tuple[Problem, str, str]]) -> None:
    damage(filled)
    before = everything(filled)
    findings = found(filled)
    assert everything(filled) == before, "without --repair nothing is changed"
    for repair in (False, True):
        findings = findings if not repair else wrong(found(filled, repair=True))
        assert [finding.problem for finding in findings] == [problem for problem, _, _ in expected]
        for finding, (_, text, mended) in zip(findings, expected, strict=True):
            assert re.search(text, finding.text), finding.text
            assert finding.remedy
            if repair:
                assert bool(finding.mended) == bool(mended)
                assert mended in finding.mended
            else:
                assert not finding.mended
    left = [problem for problem, _, mended in expected if not mended]
    assert [finding.problem for finding in wrong(found(filled))] == left, "what was mended is not found again"


# -- the records of another root


async def test_records_of_another_root_are_refused_and_nothing_is_changed(filled: Path, tmp_path: Path) -> None:
    """Put there by mistake, they would have layers go by wrong names, and --repair would write that on the directories."""
    before = await walked(filled)
    other = tmp_path / "other"
    await fill(other)
    shutil.copyfile(filled / "metadata.mdb", tmp_path / "saved")
    shutil.copyfile(other / "metadata.mdb", filled / "metadata.mdb")
    as_it_was = everything(filled)
    with pytest.raises(Damaged, match=r"metadata\.mdb holds the records of another root: put back .* --rebuild"):
        await walked(filled)
    for repair in (False, True):
        (finding,) = found(filled, repair=repair)
        assert finding.problem is Problem.DAMAGED
        assert "the records of another root" in finding.text
    assert everything(filled) == as_it_was
    list(rebuild(str(filled)))
    assert wrong(found(filled)) == []
    assert await walked(filled) == before
    shutil.copyfile(tmp_path / "saved", filled / "metadata.mdb")
    assert await walked(filled) == before


@pytest.mark.parametrize("lost", ["noted", "recorded", "both"])
async def test_a_root_that_has_lost_its_word_is_taken_as_it_is(filled: Path, lost: str) -> None:
    """By a copy without extended attributes; by records from before there was one."""
    before = await walked(filled)
    word = os.getxattr(filled / "snapshots", imprint.WORD)
    if lost != "recorded":
        os.removexattr(filled / "snapshots", imprint.WORD)
    if lost != "noted":
        in_records(lambda writer: writer.put_root_word(""))(filled)
    assert wrong(found(filled)) == []
    assert await walked(filled) == before
    with closing(MetaStore(f"{filled}/metadata.mdb")) as records, records.reading() as reader:
        recorded = reader.root_word().encode()
    assert recorded == os.getxattr(filled / "snapshots", imprint.WORD)
    assert (recorded == word) == (lost != "both")


# -- rebuilding


async def walked(root: Path) -> list[Info]:
    async with open_snapshotter(root) as snapshotter:
        return await snapshotter.walk()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


LOSSES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda root: None,
    "deleted": lambda root: (root / "metadata.mdb").unlink(),
    "garbage": lambda root: (root / "metadata.mdb").write_bytes(b"garbage" * 10_000),
    "empty": lambda root: (root / "metadata.mdb").write_bytes(b""),
    "pages of zeros": lambda root: overwrite(root / "metadata.mdb", 4096 * 2, bytes(4096 * 100)),
    "cut": lambda root: os.truncate(root / "metadata.mdb", 20_000),
    "zeros": lambda root: (root / "metadata.mdb").write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_lost_records_are_made_anew(root: Path, loss: str) -> None:
    before = await fill(root)
    LOSSES[loss](root)
    if loss != "nothing":
        if loss != "pages of zeros":  # on which LMDB aborts
            with pytest.raises(Damaged):
                await walked(root)
        assert [finding.problem for finding in found(root)] == [Problem.DAMAGED]
        assert "--rebuild" in found(root)[0].remedy
    old = "" if loss == "deleted" else f"; the old ones are in {root}/lost+found/metadata.mdb"
    assert [finding.text for finding in rebuild(str(root))] == [f"the records were made anew: 5 snapshots{old}"]
    assert wrong(found(root)) == []
    assert (root / "lost+found/metadata.mdb").exists() == (loss != "deleted")
    assert await walked(root) == before
    async with open_snapshotter(root) as snapshotter:
        assert (await snapshotter.usage("base")).inodes == 2, "counted again"
        await snapshotter.prepare("new")
        assert (await snapshotter.stat("new")).id > 5


async def test_of_many_runs_the_first_records_and_the_last_ones_stay(filled: Path) -> None:
    """With a line that says where they are, and what is gone; what is there and none of ours stays."""
    first = (filled / "metadata.mdb").read_bytes()
    (lost := filled / "lost+found").mkdir(0o700)
    others = ["metadata.mdb~old", "metadata.mdb~03", "metadata.mdb-copy", "5~7"]
    for name in others:
        (lost / name).write_text("x")
    said = [[finding.text for finding in rebuild(str(filled))] for _ in range(8)]
    names = ["metadata.mdb", *(f"metadata.mdb~{number}" for number in range(1, 8))]
    assert sorted(os.listdir(lost)) == sorted([*others, names[0], *names[4:]])
    assert (lost / names[0]).read_bytes() == first
    for number, texts in enumerate(said):
        gone = f"; {names[number - 4]} deleted there, between the first and the last 4" if number >= 5 else ""
        assert texts == [f"the records were made anew: 5 snapshots; the old ones are in {lost}/{names[number]}{gone}"]
    assert {info.id for info in await walked(filled)} == {1, 2, 3, 4, 5}
    async with open_snapshotter(filled) as snapshotter:
        await snapshotter.prepare("new")
        assert (await snapshotter.stat("new")).id > 5


async def test_an_id_that_was_given_out_never_comes_back(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        for _ in range(3):
            await snapshotter.prepare("k")
            last = (await snapshotter.stat("k")).id
            await snapshotter.remove("k")
    list(rebuild(str(root)))
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("k")
        assert (await snapshotter.stat("k")).id > last


async def test_after_anything_at_all_the_directories_say_what_the_records_say(root: Path) -> None:
    """A random history; then the records are lost."""
    chance = random.Random(7)
    async with open_snapshotter(root) as snapshotter:
        for n in range(300):
            infos = await snapshotter.walk()
            committed = [info.name for info in infos if info.kind is Kind.COMMITTED]
            name = chance.choice([info.name for info in infos] or ["none"])
            parent = chance.choice([*committed, None])
            labels = {f"l{chance.randrange(4)}": "v" * chance.choice((1, 100, 4000)) for _ in range(chance.randrange(4))}
            calls: list[Callable[[], object]] = [
                lambda: snapshotter.prepare(f"k{n}", parent, labels),  # noqa: B023
                lambda: snapshotter.view(f"v{n}", parent),  # noqa: B023
                lambda: snapshotter.commit(f"c{n}", name, labels, wait=chance.random() < 0.1),  # noqa: B023
                lambda: snapshotter.commit(f"c{n}", name, parent=parent, keep_labels=True, wait=False),  # noqa: B023
                lambda: snapshotter.rename(name, f"r{n}"),  # noqa: B023
                lambda: snapshotter.update(name, labels),  # noqa: B023
                lambda: snapshotter.remove(name),  # noqa: B023
            ]
            with contextlib.suppress(FailedPrecondition, NotFound, InvalidArgument):
                await chance.choice(calls)()  # type: ignore[misc]
        before = await snapshotter.walk()
        for info in before:
            await snapshotter.usage(info.name)
    assert len(before) > 40
    assert found(root) == []
    list(rebuild(str(root)))
    assert wrong(found(root)) == []
    assert await walked(root) == before


async def test_a_failed_operation_leaves_the_imprint_as_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(root)
    async with open_snapshotter(root) as snapshotter:
        before = [imprint.read(snapshotter.layers.directory(number)) for number in range(1, 6)]

        def fails(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            patch.setattr(snapshotter.layers.pool, "_ready", DryPool())

            async def refused(call: Callable[[], object]) -> None:
                with pytest.raises(Unavailable):
                    await call()  # type: ignore[misc]

            begun, go_on = threading.Event(), threading.Event()

            def hold(writer: Writer) -> None:
                begun.set()
                assert go_on.wait(20)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(snapshotter.records.write, hold)
                await trio.to_thread.run_sync(begun.wait)
                for call in (  # one batch: what makes a directory, whose sync fails, takes the others with it
                    lambda: snapshotter.prepare("new"),
                    lambda: snapshotter.commit("n", "lone"),
                    lambda: snapshotter.rename("web", "spider"),
                    lambda: snapshotter.update("base", WIDE),
                    lambda: snapshotter.update("v1", {"small": "now"}),
                ):
                    nursery.start_soon(refused, call)
                await until_in_line(snapshotter.records, 5)
                go_on.set()
        assert [imprint.read(snapshotter.layers.directory(number)) for number in range(1, 6)] == before


# what directories may say, and what becomes of it: name and kind by id, and the findings' words


def says(root: Path, number: int, record: Record, boot: str = "") -> None:
    imprint.write(f"{root}/snapshots/{number}", Imprint(record, boot))


async def test_of_two_of_one_name_the_later_keeps_it(filled: Path) -> None:
    says(filled, 5, Record("web", Kind.ACTIVE, 0, 5, 5, {}))
    texts = [(finding.text, finding.mended) for finding in rebuild(str(filled))]
    assert texts[0] == ('another snapshot is called "web" too, and changed later', 'number 5 is called "web~5"')
    assert {info.id: info.name for info in await walked(filled)} == {1: "base", 2: "web", 3: "peek", 4: "v1", 5: "web~5"}


def nodes(root: Path) -> dict[str, int]:
    """The number that each snapshot has in the tree's inodes."""
    with closing(MetaStore(str(root / "metadata.mdb"))) as records, records.reading() as reader:
        found = {record.name: (number, record) for number in reader.ids() if (record := reader.record(number)) is not None}
        for number, record in found.values():
            assert reader.by_node(record.node_of(number)) == (number, record)
        return {name: record.node_of(number) for name, (number, record) in found.items()}


async def test_workspaces_that_were_rolled_back_are_apart_after_a_rebuild(root: Path) -> None:
    """Their old directories may be there, each of which says that it is the workspace."""
    async with open_snapshotter(root, Options(async_remove=True)) as snapshotter:
        await snapshotter.prepare("web")
        await snapshotter.checkpoint("web")
        for _ in range(2):
            await snapshotter.rollback("web")
        Path(snapshotter.layer_path((await snapshotter.stat("web")).id), "precious").write_text("x")
    (root / "metadata.mdb").unlink()
    list(rebuild(str(root)))
    found(root, repair=True)
    assert wrong(found(root)) == []
    assert sorted(nodes(root)) == ["web", "web@1", "web~2", "web~3"]
    assert len(set(nodes(root).values())) == 4
    async with open_snapshotter(root) as snapshotter:
        assert os.listdir(snapshotter.layer_path((await snapshotter.stat("web")).id)) == ["precious"]


@pytest.mark.parametrize("given", [(2, 2, 2, 0, 0), (0, 1, 1, 1, 0), (9, 9, 0, 0, 4), (5, 0, 0, 0, 0), (2, 1, 0, 5, 4)])
async def test_each_snapshot_has_a_number_of_its_own_in_the_inodes(filled: Path, given: tuple[int, ...]) -> None:
    """Whatever the records say."""

    def mangle(writer: Writer) -> None:
        for number, node in enumerate(given, 1):
            record = writer.record(number)
            assert record is not None
            writer.overwrite(number, msgspec.structs.replace(record, node=node))
        writer.rebuild_indexes()

    with closing(MetaStore(str(filled / "metadata.mdb"))) as records:
        records.write_now(mangle)
    numbers = [node or number for number, node in enumerate(given, 1)]
    are_apart = len(set(numbers)) == len(numbers)
    said = [finding.text for finding in found(filled) if "in the tree it is one with another" in finding.text]
    assert len(said) == len(numbers) - len(set(numbers))
    found(filled, repair=True)
    assert wrong(found(filled)) == []
    after = nodes(filled)
    assert len(set(after.values())) == 5
    assert not are_apart or sorted(after.values()) == sorted(numbers)


async def test_a_parent_without_a_directory_comes_back_damaged(filled: Path) -> None:
    shutil.rmtree(filled / "snapshots/1")
    first, *_ = list(rebuild(str(filled)))
    assert re.search("the parent of .*, number 1, has no directory", first.text)
    async with open_snapshotter(filled) as snapshotter:
        assert {info.parent for info in await snapshotter.walk()} == {None, "lost-1"}
        with pytest.raises(Damaged, match="snapshots/1 is missing"):
            await snapshotter.mounts("web")
        with pytest.raises(Damaged, match="snapshots/1 is missing"):
            await snapshotter.prepare("x", "v1")


async def test_a_parent_that_says_that_it_is_active_is_not_taken_for_whole(filled: Path) -> None:
    says(filled, 1, Record("b", Kind.ACTIVE, 0, 1, 1, {}))
    findings = list(rebuild(str(filled)))
    assert any(finding.problem is Problem.UNFLUSHED and "may be torn" in finding.mended for finding in findings)
    async with open_snapshotter(filled) as snapshotter:
        assert (await snapshotter.stat("b")).kind is Kind.COMMITTED
        with pytest.raises(Damaged, match="may be torn"):
            await snapshotter.prepare("x", "b")


async def test_what_says_nothing_or_nonsense_goes_to_lost_and_found(filled: Path) -> None:
    os.removexattr(filled / "snapshots/2", imprint.ATTRIBUTE)
    os.setxattr(filled / "snapshots/5", imprint.ATTRIBUTE, b"\xc1")
    says(filled, 1, Record("base", Kind.COMMITTED, 4, 1, 1, {}))
    (filled / "snapshots/foreign").mkdir()
    texts = [finding.text.partition("snapshots/")[2] for finding in rebuild(str(filled))]
    assert [text.split(":")[0] for text in texts[:4]] == [
        "2 says nothing of a snapshot",
        "5 can't be read",
        "foreign says nothing of a snapshot",
        "1 says that it is its own parent",
    ]
    assert sorted(os.listdir(filled / "lost+found")) == ["1", "2", "5", "foreign", "metadata.mdb"]
    assert (filled / "lost+found/1/fs/file").read_text() == "content"


@pytest.mark.parametrize("name", ["", "n" * 256, "é" * 200, "n" * 1000, None])
async def test_who_has_no_name_that_there_can_be_goes_there_too(filled: Path, name: str | None) -> None:
    """One directory whose attribute is broken must not stop the others from coming back."""
    written = msgspec.msgpack.encode(Imprint(Record("torn" if name is None else name, Kind.ACTIVE, 0, 1, 1, {})))
    os.setxattr(filled / "snapshots/5", imprint.ATTRIBUTE, written.replace(b"torn", b"\xff\xfern"))
    assert any("does not bear its record" in finding.text for finding in check(str(filled)))
    findings = list(rebuild(str(filled)))
    assert findings[0].text.startswith(f"{filled}/snapshots/5 can't be read: ")
    assert sorted(os.listdir(filled / "lost+found")) == ["5", "metadata.mdb"]
    assert {info.id for info in await walked(filled)} == {1, 2, 3, 4}


async def test_the_other_name_of_two_fits(filled: Path) -> None:
    says(filled, 2, Record("é" * 127, Kind.ACTIVE, 0, 5, 5, {}))
    says(filled, 5, Record("é" * 127, Kind.ACTIVE, 0, 6, 6, {}))
    list(rebuild(str(filled)))
    assert {info.name for info in await walked(filled) if info.id in (2, 5)} == {"é" * 127, "é" * 126 + "~2"}


async def test_where_files_are_never_written_in_place_a_rebuild_leaves_nothing_beside(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on btrfs: both records have had a file beside them that could be given up."""
    monkeypatch.setattr(space, "_NEVER_IN_PLACE", (mounting.file_system_magic(str(filled)),))
    async with open_snapshotter(filled):
        pass
    for name in ("metadata.mdb.new", "metadata.mdb.new-reserve"):
        (filled / name).touch()  # which one that was killed has left
    assert [finding.problem for finding in rebuild(str(filled))] == [Problem.NOTE]
    assert [name for name in os.listdir(filled) if name.startswith("metadata")] == ["metadata.mdb", "metadata.mdb-reserve"]
    (filled / "lock").unlink()  # as a copy may leave it out
    async with open_snapshotter(filled) as snapshotter:
        assert await snapshotter.walk()


async def test_what_was_not_flushed_when_the_power_went_is_known_after_a_rebuild(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing.Flushing, "finish", _nothing)
    monkeypatch.setattr(mounting, "sync_file_system", _refuse)
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        await snapshotter.commit("base", "a", wait=False)
        await snapshotter.rename("base", "ground")
    list(rebuild(str(root)))
    monkeypatch.setattr(unflushed, "boot_id", lambda: "the next boot")
    assert [finding.problem for finding in wrong(found(root))] == [Problem.UNFLUSHED]
    assert "--accept ground" in found(root)[0].remedy
    with pytest.raises(NotFound):
        found(root, accept=("base",))
    assert found(root, accept=("ground",))[0].mended
    assert wrong(found(root)) == []
    with pytest.raises(FailedPrecondition, match="nothing to accept"):
        found(root, accept=("ground",))


async def _nothing(self: flushing.Flushing) -> None:
    pass


def _refuse(fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# -- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snapfs.cli", "check", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command(daemon: Daemon) -> None:
    os.mkdir(daemon.mnt / "active/a")
    os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/base")
    running = command(str(daemon.root))
    assert (running.returncode, running.stdout) == (1, "")
    assert f"is in use by the process with pid {daemon.pid}" in running.stderr
    mistaken = command(str(daemon.mnt))
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert "where a tree is mounted, not its root" in mistaken.stderr
    assert daemon.stop() == 0
    assert command(str(daemon.root)).stdout == f"{daemon.root}: nothing is wrong\n"
    (daemon.root / "snapshots/1/work").rmdir()
    os.removexattr(daemon.root / "snapshots/1", imprint.ATTRIBUTE)
    (daemon.root / "snapshots/strange").mkdir()
    seen = command(str(daemon.root))
    assert seen.returncode == 1
    assert seen.stdout.splitlines()[-1] == f"{daemon.root}: 1 orphaned, 1 miscounted"
    for_programs = [json.loads(line) for line in command(str(daemon.root), "--json").stdout.splitlines()]
    assert [each["problem"] for each in for_programs] == ["miscounted", "orphaned"]
    mended = command(str(daemon.root), "--repair")
    assert (mended.returncode, mended.stderr) == (0, "")
    assert mended.stdout.splitlines()[-1] == f"{daemon.root}: nothing is wrong; 2 mended"
    (daemon.root / "metadata.mdb").unlink()
    assert command(str(daemon.root)).returncode == 1
    assert command(str(daemon.root), "--rebuild").returncode == 0
    daemon.start()
    assert os.listdir(daemon.mnt / "committed") == ["base"]
    assert daemon.stop() == 0
    nowhere = command(str(daemon.root / "none"))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert nowhere.stderr.startswith(f"snapfs: {daemon.root}/none is no root of snapfs: ")


async def test_where_directories_can_bear_nothing_nobody_misses_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "getxattr", refuse)
    monkeypatch.setattr(os, "setxattr", refuse)
    await fill(root)
    async with open_snapshotter(root) as snapshotter:
        assert not snapshotter.features["imprints"].on
    assert found(root) == []


async def test_what_a_squash_shares_is_no_damage(root: Path) -> None:
    """Neither of its own files, nor of those that were counted before they had a second name."""
    async with open_snapshotter(root, Options(squash_depth=2)) as snapshotter:
        await snapshotter.prepare("web")
        for number in range(3):
            Path(snapshotter.layer_path((await snapshotter.stat("web")).id), str(number)).write_text("x" * 5000)
            await snapshotter.checkpoint("web")
        await snapshotter.squash("web@3", "flat")
        await snapshotter.dissolve("web@1")
        for info in await snapshotter.walk():
            await snapshotter.usage(info.name)
    assert found(root) == []
