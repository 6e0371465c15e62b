"""snapfs backup: a copy of the records while they are in use, whole or not there at all, and the way back."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import snapfs.offline.backup
from snapfs import AlreadyExists, Damaged, InvalidArgument, MetaStore, Snapshotter, Unavailable, open_snapshotter
from snapfs.cli import main
from snapfs.kernel.mounttable import mount_table
from snapfs.offline.backup import Backup, backup
from snapfs.offline.checking import Problem, check
from snapfs.root import imprint
from snapfs.root.lock import shared_lock
from tests.daemon import Daemon
from tests.processes import until
from tests.records import check_indexes, readers

pytestmark = pytest.mark.durable


@pytest.fixture
def served(root: Path) -> Path:
    """A root with three snapshots, which nobody has open."""

    async def fill() -> None:
        async with open_snapshotter(root) as snapshotter:
            await snapshotter.prepare("a")
            await snapshotter.commit("base", "a", labels={"x": "1"})
            await snapshotter.usage("base")
            await snapshotter.prepare("web", "base")
            await snapshotter.view("peek", "base")

    trio.run(fill)
    return root


def names_in(file: Path) -> list[str]:
    """The snapshots that a backup names, after all its tables were compared."""
    store = MetaStore(str(file))
    try:
        check_indexes(store)
        with store.reading() as reader:
            return [info.name for info in reader.walk()]
    finally:
        store.close()


async def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snapfs.cli", "backup", *map(str, arguments)]
    done: subprocess.CompletedProcess[str] = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False
    )  # type: ignore[assignment]
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())  # type: ignore[attr-defined]


def test_of_a_root_that_nobody_has_open(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out/records"
    file.parent.mkdir()
    assert main(["backup", str(served), str(file)]) == 0
    size = file.stat().st_size
    assert capsys.readouterr().out == (
        f"snapfs: wrote the records of 3 snapshots to {file}, {size} bytes; the layers are not in it\n"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["records"]
    assert names_in(file) == ["base", "peek", "web"]


async def test_while_a_daemon_serves(daemon: Daemon, tmp_path: Path) -> None:
    (daemon.mnt / "active/web").mkdir()
    done = await run(daemon.root, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("snapfs: wrote the records of 1 snapshot to ")
    assert names_in(tmp_path / "file") == ["web"]
    (daemon.mnt / "active/more").mkdir()
    assert names_in(tmp_path / "file") == ["web"]
    done = await run(daemon.root, daemon.mnt / "active/file")
    assert done.returncode == 1
    assert "on a mount of snapfs" in done.stderr
    assert daemon.error_log() == []
    done = await run(daemon.root, daemon.mnt / "active/web/rootfs/file")
    assert done.returncode == 1
    assert f"would lie in {daemon.root}" in done.stderr


async def test_under_a_heavy_load_it_holds_all_that_was_acknowledged(
    snapshotter: Snapshotter, root: Path, tmp_path: Path
) -> None:
    acknowledged: set[str] = set()
    over = trio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            name = f"{number}-{turn}"
            await snapshotter.prepare(name)
            acknowledged.add(name)
            if turn % 3 == 0:
                await snapshotter.commit(f"c{name}", name, wait=False)
                acknowledged.remove(name)  # a moment too late, so it is not looked for
            turn += 1

    sizes = []
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(client, number)
        while len(acknowledged) < 100:
            await trio.sleep(0.01)
        for turn in range(2):
            before = {name for name in acknowledged if int(name.partition("-")[2]) % 3}
            done = await run(root, tmp_path / f"file{turn}")
            assert done.returncode == 0, done.stderr
            held = set(names_in(tmp_path / f"file{turn}"))
            assert before <= held
            assert f"the records of {len(held)} snapshots" in done.stdout
            sizes.append(len(held))
        over.set()
    assert sizes == sorted(set(sizes))
    await snapshotter.prepare("last")
    assert readers(snapshotter.records.environment.env) == ["-"]


def test_what_is_there_is_never_replaced(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "directory").mkdir()
    for name in ("file", "link", "directory"):
        with pytest.raises(AlreadyExists, match=f"{name} exists already"):
            backup(str(served), str(tmp_path / name))
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # made between the look and the end
    with pytest.raises(AlreadyExists, match="just been made by somebody else"):
        backup(str(served), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "link", "root"]


def test_without_files_that_have_no_name(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: the file has another name until it is whole."""
    real, link, seen = os.open, os.link, list[list[str]]()
    out = tmp_path / "out"
    out.mkdir()

    def without(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **options)

    def watched(*arguments: str, **options: int) -> None:
        seen.append(os.listdir(out))
        link(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without)
    monkeypatch.setattr(os, "link", watched)
    assert backup(str(served), str(out / "file")).snapshots == 3
    ((name,),) = seen
    assert name.startswith(f".snapfs-{os.getpid()}-")
    assert os.listdir(out) == ["file"]
    with pytest.raises(AlreadyExists):
        backup(str(served), str(out / "file"))
    assert os.listdir(out) == ["file"]
    assert names_in(out / "file") == ["base", "peek", "web"]


@pytest.mark.parametrize("named", [False, True])
def test_nothing_is_left_when_it_fails(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Path, named: bool
) -> None:
    subprocess.run(["fallocate", "-l", "1G", str(small_disk / "fill")], check=False, stderr=subprocess.DEVNULL)
    with (small_disk / "fill").open("ab", buffering=0) as fill, pytest.raises(OSError, match="No space"):
        while True:
            fill.write(bytes(1024))
    if named:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # EISDIR, as where it is not known
    with pytest.raises(Unavailable, match=r"cannot write the backup .*No space left") as caught:
        backup(str(served), str(small_disk / "file"))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(small_disk)) == ["fill", "lost+found"]
    (small_disk / "fill").unlink()

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        backup(str(served), str(small_disk / "file"))
    assert os.listdir(small_disk) == ["lost+found"]


def test_places_that_make_no_sense(served: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(served)
    for place in (served / "file", served / "snapshots/1/fs/file", tmp_path / "alias/file"):
        with pytest.raises(InvalidArgument, match="be lost with it"):
            backup(str(served), str(place))
    with pytest.raises(Unavailable, match="No such file"):
        backup(str(served), str(tmp_path / "none/file"))
    with pytest.raises(Unavailable, match="is no root of snapfs"):
        backup(str(tmp_path / "nobody"), str(tmp_path / "file"))
    os.truncate(served / "metadata.mdb", 0)
    with pytest.raises(Unavailable, match="is empty"):
        backup(str(served), str(tmp_path / "file"))
    (served / "metadata.mdb").write_text("rubbish" * 1000)
    with pytest.raises(Damaged, match="can't be read"):
        backup(str(served), str(tmp_path / "file"))
    assert sorted(os.listdir(tmp_path)) == ["alias", "root"]


def test_a_newer_schema_is_not_copied(served: Path, tmp_path: Path) -> None:
    store = MetaStore(str(served / "metadata.mdb"))
    with store.environment.env.begin(write=True) as txn:
        txn.put(b"schema", b"7", db=store.tables.meta)
    store.close()
    with pytest.raises(Damaged, match=r"newer snapfs \(schema 7"):
        backup(str(served), str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


def test_the_records_of_another_root_are_not_copied(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put in the place of this root's by mistake: the backup would be one of the wrong root."""

    async def begin() -> None:
        async with open_snapshotter(tmp_path / "other"):
            pass

    trio.run(begin)
    shutil.copyfile(tmp_path / "other/metadata.mdb", served / "metadata.mdb")
    before = (served / "metadata.mdb").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert main(["backup", served.name, "file"]) != 0
    assert capsys.readouterr().err.splitlines() == [
        f"snapfs: {served}/metadata.mdb holds the records of another root: put back those that belong to {served}, or have "
        f"them made anew: snapfs check {served} --rebuild"
    ]
    assert not [name for name in os.listdir(tmp_path) if name not in ("other", "root", "alias")]
    assert (served / "metadata.mdb").read_bytes() == before
    os.removexattr(served / "snapshots", imprint.WORD)
    assert backup(str(served), str(tmp_path / "file")).snapshots == 0, "whoever has only one of the two is taken as it is"


# -- who has the root meanwhile


def test_a_start_waits_for_a_backup_to_end(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would not be seen by what starts, and be given pages of two states."""
    waited = list[float]()

    async def start() -> None:
        async with open_snapshotter(served) as snapshotter:
            assert len(await snapshotter.walk()) == 3

    def wait(seconds: float) -> None:
        waited.append(seconds)
        copying.close()

    with subprocess.Popen(["true"]) as ended:
        pass
    (served / "lock").write_text(f"{ended.pid}\n")  # who had it last
    with ExitStack() as copying:
        assert copying.enter_context(shared_lock(str(served))) is None
        monkeypatch.setattr("snapfs.root.lock.DYING", 0.0)
        with pytest.raises(Unavailable, match=r"is in use by a backup, .* wait for it"):
            trio.run(start)
        monkeypatch.setattr("snapfs.root.lock.DYING", 60.0)
        monkeypatch.setattr("snapfs.root.lock.time.sleep", wait)
        trio.run(start)
    assert len(waited) == 1


def test_a_mountpoint_is_recovered_while_a_backup_is_made(daemon: Daemon) -> None:
    """The daemon was killed: its mount is dead, whoever reads the records meanwhile."""
    (daemon.mnt / "active/web").mkdir()
    daemon.stop(signal.SIGKILL)
    with ExitStack() as copying, ThreadPoolExecutor() as pool:
        assert copying.enter_context(shared_lock(str(daemon.root))) is None

        def end() -> None:
            with copying:
                until(lambda: all(mount.target != str(daemon.mnt) for mount in mount_table()), "the dead mount goes")

        ended = pool.submit(end)
        daemon.start()
        ended.result()
    assert os.listdir(daemon.mnt / "active") == ["web"]


def test_a_daemon_that_came_while_it_was_copied(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not know of the copy, which is therefore made again."""
    real, copies = snapfs.offline.backup._copy_with, list[int | None]()
    (daemon.mnt / "active/web").mkdir()

    def copy(records: str, table: int | None, room: int, fd: int) -> None:
        copies.append(table)
        if len(copies) == 1:
            daemon.stop()
            daemon.start()
            os.write(fd, b"torn" * 10_000)
        else:
            real(records, table, room, fd)

    monkeypatch.setattr(snapfs.offline.backup, "_copy_with", copy)
    assert backup(str(daemon.root), str(tmp_path / "file")).snapshots == 1
    assert len(copies) == 2
    assert None not in copies
    assert names_in(tmp_path / "file") == ["web"]


def test_who_has_the_root_and_cannot_be_seen(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container of its own."""
    monkeypatch.setattr(snapfs.offline.backup, "PATIENCE", 0.0)
    (daemon.root / "lock").write_text("1\n")
    with pytest.raises(Unavailable, match="the process with pid 1 has them open, and can't be seen from here"):
        backup(str(daemon.root), str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


def test_whoever_has_the_records_though_nobody_has_the_lock(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removed ROOT/lock: a copy that nobody knows of could be of two states."""
    monkeypatch.setattr(snapfs.offline.backup, "PATIENCE", 0.0)
    (daemon.root / "lock").unlink()
    with pytest.raises(Unavailable, match="the process with pid unknown has them open"):
        backup(str(daemon.root), str(tmp_path / "file"))
    daemon.stop()
    assert backup(str(daemon.root), str(tmp_path / "file")).snapshots == 0


# -- the way back


@asynccontextmanager
async def restored(root: Path, after: Callable[[Snapshotter], object]) -> AsyncIterator[Snapshotter]:
    """``root`` with the records of before ``after``."""
    file = root.parent / "file"
    assert await trio.to_thread.run_sync(partial(backup, str(root), str(file))) == Backup(3, file.stat().st_size)
    async with open_snapshotter(root) as snapshotter:
        await after(snapshotter)  # type: ignore[misc]
    shutil.copyfile(file, root / "metadata.mdb")
    async with open_snapshotter(root) as snapshotter:
        yield snapshotter


def test_restored_records_of_the_same_layers(served: Path) -> None:
    async def nothing(snapshotter: Snapshotter) -> None:
        await snapshotter.update("web", {"later": "yes"})

    async def check() -> None:
        async with restored(served, nothing) as snapshotter:
            check_indexes(snapshotter.records)
            assert [info.name for info in await snapshotter.walk()] == ["base", "peek", "web"]
            assert (await snapshotter.stat("web")).labels == {}
            await snapshotter.prepare("more", "base")

    trio.run(check)


def test_restored_records_that_are_long_and_sparse(served: Path, tmp_path: Path) -> None:
    """They are served, checked and backed up as what they hold, and take no more of the disk than that, and the reserve."""
    records = served / "metadata.mdb"
    backup(str(served), str(tmp_path / "saved"))
    shutil.copyfile(tmp_path / "saved", records)
    os.truncate(records, 256 << 20)

    async def serve() -> None:
        async with open_snapshotter(served) as snapshotter:
            assert [info.name for info in await snapshotter.walk()] == ["base", "peek", "web"]
            await snapshotter.prepare("more")

    trio.run(serve)
    assert records.stat().st_blocks * 512 <= 4 << 20
    assert [finding for finding in check(str(served)) if finding.problem is not Problem.NOTE] == []
    assert records.stat().st_blocks * 512 <= 4 << 20
    assert backup(str(served), str(tmp_path / "again")).size < 1 << 20
    assert sorted(names_in(tmp_path / "again")) == ["base", "more", "peek", "web"]


def test_restored_records_that_are_older_than_the_layers(served: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One was removed since, one made and left empty: both are said or cleared, and all else works."""

    async def change(snapshotter: Snapshotter) -> None:
        await snapshotter.remove("peek")
        await snapshotter.prepare("empty")

    async def check() -> None:
        async with restored(served, change) as snapshotter:
            assert 'snapshot "peek" is damaged: its directory' in caplog.text
            with pytest.raises(Damaged, match="3 is missing"):
                await snapshotter.mounts("peek")
            await snapshotter.remove("peek")
            assert [info.name for info in await snapshotter.walk()] == ["base", "web"]

    trio.run(check)


def test_restored_records_that_do_not_know_a_layer_with_files(served: Path) -> None:
    async def change(snapshotter: Snapshotter) -> None:
        await snapshotter.prepare("newer")
        (served / "snapshots/4/fs/file").write_text("precious")

    async def check() -> None:
        with pytest.raises(Damaged, match=r"4 holds files, but no such snapshot was ever recorded.*put back the records"):
            async with restored(served, change):
                pass

    trio.run(check)
    assert (served / "snapshots/4/fs/file").read_text() == "precious"
