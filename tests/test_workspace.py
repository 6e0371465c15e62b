"""Checkpoint, rollback and fork: the states of a workspace, in the library, in the tree and by the command.  Each is whole or
has not happened, and whoever stands in the directory of the workspace stands in it afterwards."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest
import trio

from snapfs import Change, Kind, Snapshotter
from snapfs import open_snapshotter as opened
from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    LabelTooBig,
    NameTooLong,
    NotFound,
    NotUtf8,
    Pinned,
    TryAgain,
    Unavailable,
)
from snapfs.model import Caller
from snapfs.options import Options, Sync
from snapfs.services.comparing import Comparing
from snapfs.store import indexes
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import SCHEMA
from snapfs.store.writing import Writer
from snapfs.tree import Tree
from tests.command import Command
from tests.daemon import Daemon
from tests.doors import DOORS, Opener
from tests.processes import until
from tests.records import check_indexes, record
from tests.refusals import failing

Make = Callable[..., Daemon]

# -- the library


@pytest.fixture(params=DOORS)
def open_snapshotter(request: pytest.FixtureRequest) -> Opener:
    return partial(DOORS[request.param], options=Options(sync=Sync.NONE))


@pytest.fixture
async def web(open_snapshotter: Opener, root: Path) -> AsyncIterator[Snapshotter]:
    """The active snapshot ``web`` on ``base``, with a label."""
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("b")
        await snapshotter.commit("base", "b")
        await snapshotter.prepare("web", "base", {"team": "blue"})
        yield snapshotter
        check_indexes(snapshotter.records)


async def layer_of(snapshotter: Snapshotter, key: str) -> Path:
    return Path(snapshotter.layer_path((await snapshotter.stat(key)).id))


async def test_a_checkpoint(web: Snapshotter) -> None:
    """What was written is the checkpoint's; the workspace goes on, empty, on top of it, with its labels."""
    before = await web.stat("web")
    (await layer_of(web, "web") / "file").write_text("1")
    made = await web.checkpoint("web", "before the upgrade")
    assert (made.name, made.kind, made.id, made.parent) == ("web@1", Kind.COMMITTED, before.id, "base")
    ours = {"snapfs.workspace": "web", "snapfs.checkpoint": "1", "snapfs.message": "before the upgrade"}
    assert made.labels == {"team": "blue", **ours}
    assert await web.stat("web@1") == made
    assert (await layer_of(web, "web@1") / "file").read_text() == "1"
    now = await web.stat("web")
    assert (now.kind, now.parent, now.labels) == (Kind.ACTIVE, "web@1", {"team": "blue"})
    assert os.listdir(await layer_of(web, "web")) == []
    second = await web.checkpoint("web")
    assert (second.name, second.parent) == ("web@2", "web@1")
    assert second.labels == {"team": "blue", "snapfs.workspace": "web", "snapfs.checkpoint": "2"}
    named = await web.checkpoint("web", "named", "v1")
    assert (named.name, named.labels["snapfs.checkpoint"]) == ("v1", "3")
    found = await web.checkpoints("web")
    assert [(each.number, each.info.name, each.message) for each in found] == [
        (1, "web@1", "before the upgrade"),
        (2, "web@2", ""),
        (3, "v1", "named"),
    ]
    assert await web.checkpoints("other") == []


async def test_what_becomes_another_all_the_time_is_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader is told so once the workspace was rolled back again and again for as long as the reader has patience."""
    looks = 0
    async with opened(root, options=Options(sync=Sync.NONE)) as web:
        await web.prepare("web")
        looked = Comparing.changes

        async def rolled_back(*arguments: Any) -> object:
            nonlocal looks
            looks += 1
            await web.rollback("web")
            return await looked(*arguments)

        monkeypatch.setattr(Comparing, "changes", rolled_back)
        changes = Tree(web).walk("active/web/changes")
        with pytest.raises(TryAgain, match=r"^active/web was kept or rolled back, again and again, meanwhile: try again"):
            await changes.refresh(Caller(None, 0.05))
    assert looks > 1


async def test_numbers_go_on_and_pass_by_names_that_are_taken(web: Snapshotter) -> None:
    await web.view("web@1")
    assert (await web.checkpoint("web")).name == "web@2"
    await web.checkpoint("web")
    await web.rollback("web", 2)
    await web.remove("web@3")
    assert (await web.checkpoint("web")).name == "web@3"
    await web.rename("web@3", "kept")
    assert (await web.checkpoint("web")).labels["snapfs.checkpoint"] == "4"


async def test_a_rollback(web: Snapshotter) -> None:
    for number in (1, 2):
        (await layer_of(web, "web") / "file").write_text(str(number))
        await web.checkpoint("web")
    layer = await layer_of(web, "web")
    (layer / "file").write_text("3")
    for to, parent in ((None, "web@2"), (1, "web@1"), ("web@2", "web@2"), ("base", "base"), (2, "web@2"), (0, "base")):
        now = await web.rollback("web", to)
        assert (now.name, now.kind, now.parent, now.labels) == ("web", Kind.ACTIVE, parent, {"team": "blue"})
        assert os.listdir(await layer_of(web, "web")) == []
    await web.cleanup()
    assert not layer.exists()
    assert [info.name for info in await web.walk()] == ["base", "web", "web@1", "web@2"]


async def test_a_workspace_on_nothing(web: Snapshotter) -> None:
    await web.prepare("lone")
    assert (await web.checkpoint("lone")).parent is None
    assert (await web.rollback("lone", 0)).parent is None
    assert (await web.rollback("lone", 1)).parent == "lone@1"


async def test_a_fork(web: Snapshotter) -> None:
    (await layer_of(web, "web") / "file").write_text("both")
    other = await web.fork("web", "other")
    assert (other.name, other.kind, other.parent, other.labels) == ("other", Kind.ACTIVE, "web@1", {})
    assert (await web.stat("web")).parent == "web@1"
    assert (await web.stat("web@1")).labels["snapfs.message"] == "forked as other"
    third = await web.fork("web@1", "third")
    assert third.parent == "web@1"
    assert [each.info.name for each in await web.checkpoints("web")] == ["web@1"]


async def test_a_pinned_workspace(web: Snapshotter) -> None:
    """Its state is not thrown away; a checkpoint is not pinned by that."""
    await web.update("web", {"pin": "yes"}, ["labels.pin"])
    assert "pin" not in (await web.checkpoint("web")).labels
    assert (await web.stat("web")).labels == {"team": "blue", "pin": "yes"}
    before = await web.walk()
    with pytest.raises(Pinned):
        await web.rollback("web")
    assert await web.walk() == before


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (("checkpoint", "no"), NotFound, '"no" does not exist'),
        (("checkpoint", "base"), FailedPrecondition, '"base" is committed: a workspace is an active snapshot'),
        (("checkpoint", "peek"), FailedPrecondition, '"peek" is view: a workspace is an active snapshot'),
        (("checkpoint", "web", "a\nb"), InvalidArgument, "is one line"),
        (("checkpoint", "web", "a\0b"), InvalidArgument, "is one line"),
        (("checkpoint", "web", "x" * 5000), LabelTooBig, "at most 4082 fit"),
        (("checkpoint", "web", "\udce9"), NotUtf8, "not UTF-8"),
        (("checkpoint", "web", "", "base"), AlreadyExists, '"base" already exists (committed)'),
        (("checkpoint", "web", "", "web"), AlreadyExists, '"web" already exists (active)'),
        (("checkpoint", "web", "", "x" * 256), NameTooLong, "255"),
        (("checkpoint", "w" * 254), NameTooLong, "255"),
        (("rollback", "no"), NotFound, '"no" does not exist'),
        (("rollback", "base"), FailedPrecondition, "is committed"),
        (("rollback", "web", 7), NotFound, '"web" has no checkpoint 7'),
        (("rollback", "web", "peek"), NotFound, '"web" has no checkpoint "peek"'),
        (("rollback", "web", "other"), NotFound, '"web" has no checkpoint "other"'),
        (("rollback", "web", "nobody"), NotFound, '"web" has no checkpoint "nobody"'),
        (("fork", "no", "x"), NotFound, '"no" does not exist'),
        (("fork", "web", "base"), AlreadyExists, '"base" already exists'),
        (("fork", "web", "web"), AlreadyExists, '"web" already exists'),
        (("fork", "base", "web"), AlreadyExists, '"web" already exists'),
        (("fork", "peek", "x"), FailedPrecondition, "is view"),
        (("fork", "web", ""), InvalidArgument, "empty"),
    ],
)
async def test_what_is_refused_changes_nothing(
    web: Snapshotter, root: Path, words: tuple[object, ...], error: type[Exception], said: str
) -> None:
    await web.view("peek", "base")
    await web.prepare("w" * 254)
    await web.prepare("o")
    await web.commit("other", "o")
    before, directories = await web.walk(), sorted(os.listdir(root / "snapshots"))
    with pytest.raises(error) as caught:
        await getattr(web, str(words[0]))(*words[1:])
    assert said in str(caught.value)
    assert await web.walk() == before
    assert sorted(os.listdir(root / "snapshots")) == directories
    assert (await web.checkpoint("web")).name == "web@1"


async def test_a_disk_that_refuses_the_second_half(web: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is taken back where the workspace can't be made anew."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = await web.walk()
    (await layer_of(web, "web") / "file").write_text("kept")
    with monkeypatch.context() as patched:
        patched.setattr("snapfs.root.layers.Layers.place", full)
        for call in (web.checkpoint("web"), web.rollback("web"), web.fork("web", "other")):
            with pytest.raises(Unavailable, match="No space left"):
                await call
    assert await web.walk() == before
    await web.cleanup()
    assert (await layer_of(web, "web") / "file").read_text() == "kept"
    assert (await web.checkpoint("web")).id == before[1].id


async def test_a_state_whose_data_was_lost(web: Snapshotter) -> None:
    await web.checkpoint("web")
    await web.rollback("web", 0)
    lost = (await web.stat("web@1")).id
    web._root.unflushed.lost.add(lost)
    before = await web.walk()
    with pytest.raises(Damaged):
        await web.rollback("web", 1)
    assert await web.walk() == before


async def test_no_state_without_the_workspace_is_ever_seen(web: Snapshotter) -> None:
    """Readers in other threads, while it is kept and thrown away a hundred times."""
    stop, wrong = threading.Event(), list[str]()
    seen = 0

    def read() -> None:
        nonlocal seen
        while not stop.is_set():
            with web.records.reading() as reader:
                found = reader.find("web")
                names = [name for _, name in reader.listing(Kind.ACTIVE)]
                last = reader.last_checkpoint("web")
                seen += 1
                if found is None or names != ["web"] or len(list(reader.checkpoints("web"))) != last:
                    wrong.append(f"{found} {names} {last}")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(50):
            await web.checkpoint("web")
            await web.rollback("web")
    finally:
        stop.set()
        await trio.to_thread.run_sync(thread.join)
    assert wrong == []
    assert seen > 50


async def test_what_listeners_hear(web: Snapshotter) -> None:
    heard: list[Change] = []
    web.subscribe(heard.append)
    made = await web.checkpoint("web")
    now = await web.stat("web")
    assert [(each.before and each.before.name, each.after) for each in heard if not each.counted] == [
        ("web", made),
        (None, now),
    ]
    heard.clear()
    await web.rollback("web")
    changes = [(each.before, each.after) for each in heard if not each.counted]
    assert changes == [(now, None), (None, await web.stat("web"))]


async def test_two_at_once(web: Snapshotter) -> None:
    """Both have their checkpoint."""
    made: list[str] = []

    async def keep() -> None:
        made.append((await web.checkpoint("web")).name)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(keep)
    assert sorted(made) == [f"web@{number}" for number in range(1, 9)]
    assert [each.info.parent for each in await web.checkpoints("web")] == ["base", *(f"web@{n}" for n in range(1, 8))]


def test_records_of_an_earlier_snapfs_are_indexed(tmp_path: Path) -> None:
    """They have no table of the checkpoints."""
    labels = {"snapfs.workspace": "web", "snapfs.checkpoint": "3"}
    labelled = msgspec.structs.replace(record("web@3", Kind.COMMITTED), labels=labels)
    store = MetaStore(str(tmp_path / "m"), sync=False)
    with store.environment.env.begin(write=True) as txn:
        writer = Writer(store.tables, txn, set())
        writer.put(writer.next_id(), labelled)
        txn.drop(store.tables.checkpoints)
        assert not indexes.has_checkpoints(txn)
        txn.put(b"schema", b"1", db=store.tables.meta)
    store.close()
    store = MetaStore(str(tmp_path / "m"), sync=False)
    with store.environment.env.begin() as txn:
        assert txn.get(b"schema", db=store.tables.meta) == str(SCHEMA).encode(), "which an older snapfs refuses"
    with store.reading() as reader:
        assert list(reader.checkpoints("web")) == [(3, 1)]
        assert reader.wrong_index_entries() == 0
    store.close()


# -- the tree


def write(path: Path, text: str) -> str:
    """Write one line; what can be read then."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.write(fd, text.encode() + b"\n")
        return os.read(fd, 1000).decode()
    finally:
        os.close(fd)


@pytest.fixture
def workspace(daemon: Daemon) -> Path:
    os.mkdir(daemon.mnt / "active/web")
    (daemon.mnt / "active/web/labels/team").write_text("blue\n")
    return daemon.mnt / "active/web"


def test_a_session_with_echo(workspace: Path) -> None:
    """In a shell that stands in the workspace's directory all the time."""
    script = """
    echo 1 > rootfs/file
    echo "before the upgrade" > checkpoint
    echo 2 > rootfs/file; echo second > checkpoint
    echo 3 > rootfs/file; cat changes
    echo > rollback; cat rootfs/file
    echo 1 > rollback; cat rootfs/file; cat labels/team
    echo web@2 > rollback; cat rootfs/file
    echo other > fork; ls .. ; cat ../other/rootfs/file
    echo 4 > rootfs/file; echo 0 > rollback; ls rootfs/
    cut -f 1,2,4 checkpoint
    exec 3<>checkpoint; echo again >&3; cat <&3; echo more >&3; cat <&3; exec 3>&-
    pwd
    """
    done = subprocess.run(["bash", "-e"], input=script, cwd=workspace, capture_output=True, text=True, check=False)
    expected = ["C /file", "2", "1", "blue", "2", "other", "web", "2", "1\tweb@1\tbefore the upgrade", "2\tweb@2\tsecond"]
    expected += ["3\tweb@3\tforked as other", "web@4", "web@5", str(workspace)]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_what_the_kernel_remembers_is_right_at_once(workspace: Path, daemon: Daemon) -> None:
    """Files, links, listings and inodes, right after each of many changes; the directory stays the same one."""
    inode = os.stat(workspace).st_ino
    held = os.open(workspace, os.O_RDONLY)
    try:
        for number in range(1, 21):
            for name in ("mounts.json", "mount.sh", "info.json", "checkpoint"):
                (workspace / name).read_text()
            os.readlink(workspace / "diff")
            (workspace / "rootfs/file").write_text(str(number))
            assert write(workspace / "checkpoint", f"n {number}") == f"web@{number}\n"
            identity = os.path.basename(os.path.dirname(os.readlink(workspace / "diff")))
            assert f"/{identity}/fs" in (workspace / "mounts.json").read_text()
            assert f"{identity}/fs" in (workspace / "mount.sh").read_text()
            assert os.readlink(workspace / "parent") == f"../../committed/web@{number}"
            assert (workspace / "checkpoint").read_text().count("\n") == number
            assert (daemon.mnt / f"committed/web@{number}/rootfs/file").read_text() == str(number)
            assert os.stat(workspace).st_ino == os.fstat(held).st_ino == inode
            assert os.listdir(held) == os.listdir(workspace)
            assert os.readlink(daemon.mnt / f"by-id/{identity}") == "../active/web"
    finally:
        os.close(held)
    assert len({os.stat(each).st_ino for each in (daemon.mnt / "committed").iterdir()} | {inode}) == 21


def test_inodes_stay_what_they_are_over_a_restart(workspace: Path, daemon: Daemon) -> None:
    write(workspace / "checkpoint", "one")
    write(workspace / "checkpoint", "two")
    write(workspace / "rollback", "1")
    places = [workspace, *(daemon.mnt / f"committed/web@{n}" for n in (1, 2))]
    before = [(os.stat(place).st_ino, os.stat(place / "labels").st_ino) for place in places]
    assert len({inode for each in before for inode in each}) == 6
    assert daemon.stop() == 0
    daemon.start()
    assert [(os.stat(place).st_ino, os.stat(place / "labels").st_ino) for place in places] == before


@pytest.mark.parametrize(
    ("file", "text", "number", "said"),
    [
        ("checkpoint", "x" * 5000, errno.E2BIG, "the message of a checkpoint takes 5000 bytes; at most 4082 fit"),
        ("checkpoint", "a\nb", errno.EINVAL, "is one line"),
        ("checkpoint", "a\0b", errno.EINVAL, "is one line"),
        ("rollback", "7", errno.ENOENT, '"web" has no checkpoint 7'),
        ("rollback", "9" * 30, errno.ENOENT, "has no checkpoint"),
        ("rollback", "nobody", errno.ENOENT, '"web" has no checkpoint "nobody"'),
        ("rollback", "..", errno.EINVAL, "%2E"),
        ("fork", "web", errno.EEXIST, '"web" already exists'),
        ("fork", "", errno.EINVAL, "write the key"),
        ("fork", "x" * 256, errno.ENAMETOOLONG, "255"),
        ("fork", "a/b", errno.EINVAL, "%2F"),
    ],
)
def test_the_error_is_that_of_write(workspace: Path, daemon: Daemon, file: str, text: str, number: int, said: str) -> None:
    before = os.listdir(daemon.mnt / "active"), os.listdir(daemon.mnt / "committed")
    with failing(number):
        write(workspace / file, text)
    line = daemon.error_log()[-1]
    assert f" {errno.errorcode[number]} write active/web/{file}: " in line
    assert said in line
    assert (os.listdir(daemon.mnt / "active"), os.listdir(daemon.mnt / "committed")) == before


@pytest.mark.parametrize("file", ["checkpoint", "rollback", "fork"])
@pytest.mark.parametrize("size", [4200, 5000, 9000])
def test_the_rest_of_what_was_refused_does_nothing(workspace: Path, daemon: Daemon, file: str, size: int) -> None:
    """As bash writes what is longer than its buffer: the text, and then the newline, whatever came of the text."""
    (workspace / "rootfs/file").write_text("1")
    done = subprocess.run(["bash", "-c", f'echo "$0" > {file}', "x" * size], cwd=workspace, capture_output=True, text=True)
    assert done.returncode == 1
    assert " write error: " in done.stderr
    assert (workspace / "rootfs/file").read_text() == "1"
    assert (os.listdir(daemon.mnt / "active"), os.listdir(daemon.mnt / "committed")) == (["web"], [])
    assert daemon.error_log()[-1].endswith("; what follows may be the rest of it, so open the file anew")


def test_what_is_refused_and_ends_can_be_tried_again(workspace: Path, daemon: Daemon) -> None:
    """Through the same descriptor."""
    fd = os.open(workspace / "checkpoint", os.O_RDWR)
    try:
        for text in ("x" * 5000 + "\n", "a\0b", "\udcff"):
            with pytest.raises(OSError):  # noqa: PT011
                os.write(fd, text.encode(errors="surrogateescape"))
        os.write(fd, b"short\n")
        assert os.read(fd, 100) == b"web@1\n"
    finally:
        os.close(fd)


def test_in_use(workspace: Path, daemon: Daemon) -> None:
    """While a process stands in its rootfs it is busy, for each of the three, and what it has written stays."""
    with subprocess.Popen(["sleep", "60"], cwd=workspace / "rootfs") as process:
        try:
            for file, text in (("checkpoint", "x"), ("rollback", ""), ("fork", "other")):
                with failing(errno.EBUSY):
                    write(workspace / file, text)
                assert f"process {process.pid} (sleep)" in daemon.error_log()[-1]
        finally:
            process.kill()
    assert os.listdir(daemon.mnt / "active") == ["web"]
    assert os.listdir(daemon.mnt / "committed") == []
    until(lambda: not Path(f"/proc/{process.pid}/cwd").exists())
    assert write(workspace / "checkpoint", "x") == "web@1\n"


def test_views_and_committed_ones_have_no_such_files(workspace: Path, daemon: Daemon) -> None:
    write(workspace / "checkpoint", "")
    os.mkdir(daemon.mnt / "view/v")
    for place in (daemon.mnt / "view/v", daemon.mnt / "committed/web@1"):
        for name in ("checkpoint", "rollback", "fork"):
            assert name not in os.listdir(place)
            with pytest.raises(PermissionError):
                (place / name).write_text("x\n")


def test_a_descriptor_stays_that_of_its_workspace(workspace: Path, daemon: Daemon) -> None:
    """Whatever bears its key by then: after a commit it is refused, after a rename it does what it says."""
    files = {name: os.open(workspace / name, os.O_WRONLY) for name in ("checkpoint", "rollback")}
    label = os.open(workspace / "labels/team", os.O_WRONLY | os.O_APPEND)
    try:
        os.rename(workspace, daemon.mnt / "active/other")
        os.mkdir(workspace)
        (workspace / "rootfs/precious").write_text("x")
        (daemon.mnt / "active/other/rootfs/file").write_text("1")
        os.write(files["checkpoint"], b"one\n")
        os.write(label, b", green\n")
        assert os.listdir(daemon.mnt / "committed") == ["other@1"]
        assert (daemon.mnt / "active/other/labels/team").read_text() == "blue\n, green\n"
        assert (daemon.mnt / "committed/other@1/labels/team").read_text() == "blue\n"
        (daemon.mnt / "active/other/rootfs/file").write_text("2")
        os.write(files["rollback"], b"\n")
        assert (daemon.mnt / "active/other/rootfs/file").read_text() == "1"
        os.rename(daemon.mnt / "active/other", daemon.mnt / "committed/done")
        for name in files:
            with failing(errno.EPERM):
                os.write(files[name], b"\n")
        assert (workspace / "rootfs/precious").read_text() == "x"
        assert sorted(os.listdir(daemon.mnt / "committed")) == ["done", "other@1"]
    finally:
        for fd in (*files.values(), label):
            os.close(fd)


@pytest.mark.parametrize("command", ["mv active/web {}", "tar -cf {}/tar --remove-files active/web"])
def test_moving_it_elsewhere_loses_nothing(workspace: Path, daemon: Daemon, command: str) -> None:
    """What is copied of a directory are links; whoever deletes it after that is refused, also where the id is another than
    the number in the inodes."""
    write(workspace / "checkpoint", "")
    (workspace / "rootfs/precious").write_text("x")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        done = subprocess.run(["bash", "-c", command.format(elsewhere)], cwd=daemon.mnt, capture_output=True, check=False)
    assert done.returncode != 0
    assert (workspace / "rootfs/precious").read_text() == "x"


@pytest.mark.parametrize("name", ["mounts.json", "mount.sh"])
def test_no_text_of_before_comes_back(workspace: Path, name: str) -> None:
    """Somebody has the file open from before, and reads it into the kernel's cache again and again."""
    held = os.open(workspace / name, os.O_RDONLY)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
            os.pread(held, 65536, 0)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            write(workspace / "checkpoint", "")
            number = os.path.basename(os.path.dirname(os.readlink(workspace / "diff")))
            for _ in range(10):
                text = (workspace / name).read_text()
                assert f"{number}/fs" in text
                assert "\0" not in text
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(held)


def test_what_is_always_there_is_found_beside_rollbacks(workspace: Path) -> None:
    stop = threading.Event()
    missed: list[str] = []
    seen = 0

    def look() -> None:
        nonlocal seen
        while not stop.is_set():
            for name in ("mounts.json", "mount.sh", "usage.json", "info.json", "changes"):
                try:
                    (workspace / name).read_text()
                    seen += 1
                except OSError as error:
                    if error.errno != errno.EAGAIN:  # where it became another, again and again, for too long
                        missed.append(f"{name}: {error}")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        number = 0
        while number < 60 or seen < 20:
            write(workspace / ("rollback" if number % 3 or number > 60 else "checkpoint"), "")
            number += 1
    finally:
        stop.set()
        thread.join()
    assert missed == []


def test_killed_beside_makers_of_directories(make_daemon: Make) -> None:
    """The name of a workspace stays what it is for the kernel: nothing waits for the lock of its directory, or the daemon could
    not die."""
    daemon = make_daemon().start()
    loops = f"""
    cd {daemon.mnt}; (while mkdir active/t; do rmdir active/t; done) & (while mkdir active/u; do rmdir active/u; done) &
    while echo x > active/web/checkpoint && echo 0 > active/web/rollback; do :; done; wait
    """
    for _ in range(2):
        os.mkdir(daemon.mnt / "active/web")
        with subprocess.Popen(["bash", "-c", loops], stderr=subprocess.DEVNULL) as clients:
            until(lambda: len(os.listdir(daemon.mnt / "committed")) > 5)
            daemon.stop(signal.SIGKILL)
            clients.wait(30)
        daemon.said.clear()
        daemon.start()
        for kind in ("active", "committed"):
            for name in os.listdir(daemon.mnt / kind):
                os.rmdir(daemon.mnt / kind / name)


def test_thousands_of_checkpoints_keep_nobody_waiting(daemon: Daemon) -> None:
    """Whoever lists the directory of the workspace does not have them all looked up."""
    os.mkdir(daemon.mnt / "active/web")
    for _ in range(20):  # for each layer makes the next checkpoint slower
        for _ in range(20):
            write(daemon.mnt / "active/web/checkpoint", "a message")
        write(daemon.mnt / "active/web/rollback", "0")
    text = (daemon.mnt / "active/web/checkpoint").read_text()
    assert [line.split("\t")[0] for line in text.splitlines()] == [str(number) for number in range(1, 401)]
    began = time.monotonic()
    for _ in range(100):
        os.stat(daemon.mnt / "active/web/checkpoint")
    stat = time.monotonic() - began
    began = time.monotonic()
    for _ in range(100):
        os.stat(daemon.mnt / "active/web/info.json")
    assert stat < 3 * (time.monotonic() - began) + 0.1


def test_reading_them_and_emptying_them_does_nothing(workspace: Path, daemon: Daemon) -> None:
    for name in ("checkpoint", "rollback", "fork"):
        (workspace / name).read_text()
        subprocess.run(["sh", "-c", f": > {name}; truncate -s 0 {name}"], cwd=workspace, check=True)
    assert os.listdir(daemon.mnt / "committed") == []
    assert (workspace / "checkpoint").read_text() == ""


def test_an_odd_key(daemon: Daemon) -> None:
    name = "a%2Fb%0A\u00e9"
    os.mkdir(daemon.mnt / "active" / name)
    assert write(daemon.mnt / "active" / name / "checkpoint", "tab\there") == f"{name}@1\n"
    line = (daemon.mnt / "active" / name / "checkpoint").read_text()
    assert line.split("\t")[:2] == ["1", f"{name}@1"]
    assert line.split("\t")[3] == "tab%09here"
    assert write(daemon.mnt / "active" / name / "fork", f"{name}2") == f"{name}2\n"
    assert write(daemon.mnt / "active" / name / "rollback", f"{name}@1") == f"{name}@1\n"


@pytest.mark.durable
def test_with_dirsync_the_write_waits_for_the_disk(make_daemon: Make) -> None:
    daemon = make_daemon("-o", "dirsync").start()
    os.mkdir(daemon.mnt / "active/web")
    (daemon.mnt / "active/web/rootfs/file").write_text("x" * 100000)
    assert write(daemon.mnt / "active/web/checkpoint", "x") == "web@1\n"
    with lmdb.open(str(daemon.root / "metadata.mdb"), subdir=False, readonly=True, lock=False, max_dbs=16) as env:
        table = env.open_db(b"unflushed", create=False)
        with env.begin() as txn:
            assert txn.stat(table)["entries"] == 0


# -- the command


def test_the_command_says_what_was_kept(workspace: Path, daemon: Daemon) -> None:
    snapfs = Command(daemon.mnt)
    (workspace / "rootfs/file").write_text("1")
    assert snapfs("checkpoint", "web", "-m", "one", "--sync") == "web@1\n"
    (workspace / "rootfs/file").write_text("2")
    assert snapfs("rollback", "web", "--keep") == "kept as web@2\nweb is as web@1\n"
    assert (workspace / "rootfs/file").read_text() == "1"
    assert snapfs("rollback", "web", "web@2") == "web is as web@2\n"
    os.rename(daemon.mnt / "committed/web@1", daemon.mnt / "committed/2")
    assert snapfs("rollback", "web", "committed/2") == "web is as 2\n"
    assert snapfs("rollback", "web", "2") == "web is as web@2\n"
    snapfs("rollback", "web", "committed/2")
    (workspace / "rootfs/file").write_text("3")
    assert snapfs("rollback", "web", "--keep") == "kept as web@3\nweb is as 2\n"
    assert (workspace / "rootfs/file").read_text() == "1"
    assert "is one line" in snapfs("checkpoint", "web", "-m", "a\nb", status=1)
    assert '"2" is committed: a workspace' in snapfs("checkpoint", "2", status=3)
