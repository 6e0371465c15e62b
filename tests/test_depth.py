"""How many layers a snapshot may stand on: as many as the kernel mounts, and more are refused before anything is made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trio

from snapfs import Kind, Options, Snapshotter, open_snapshotter
from snapfs.errors import FailedPrecondition, TooDeep
from snapfs.fuse.errno import errno_of
from snapfs.options import Sync
from snapfs.store.schema import Record
from snapfs.store.writing import Writer
from tests.command import Command
from tests.containerd_client import connected
from tests.daemon import Daemon
from tests.processes import until

Make = Callable[..., Daemon]

MOST = 500  # lower layers of an overlay


async def stack(snapshotter: Snapshotter, depth: int) -> None:
    """Committed snapshots ``web@1`` to ``web@<depth>``, each on the one before; every hundredth has a file."""
    parent = None
    for number in range(1, depth + 1):
        await snapshotter.prepare("x", parent)
        if number % 100 == 0 or number == 1:
            Path(snapshotter.layers.fs((await snapshotter.stat("x")).id), f"file{number}").write_text(str(number))
        parent = f"web@{number}"
        await snapshotter.commit(parent, "x", {"snapfs.workspace": "web", "snapfs.checkpoint": str(number)}, wait=False)


@pytest.fixture
def deep(root: Path) -> Path:
    """A root with ``web`` on 499 checkpoints."""

    async def make() -> None:
        async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
            await stack(snapshotter, MOST - 1)
            await snapshotter.prepare("web", f"web@{MOST - 1}", {"team": "blue"})

    trio.run(make)
    return root


def test_500_checkpoints_work_and_the_next_is_refused_before_anything_is_made(deep: Path, make_daemon: Make) -> None:
    daemon = make_daemon("-o", "squash_depth=0", root=deep).start()
    snapfs = Command(daemon.mnt)
    web = daemon.mnt / "active/web"
    (web / "rootfs/last").write_text("1")
    assert snapfs("checkpoint", "web") == f"web@{MOST}\n"
    (web / "rootfs/last").write_text("2")
    before = sorted(snapfs.names())
    assert (web / "rootfs/file1").read_text() == "1"
    assert (daemon.mnt / f"committed/web@{MOST}/rootfs/file100").read_text() == "100"
    assert f"(500): make one of them, and go on on that: snapfs squash web@{MOST}" in snapfs("checkpoint", "web", status=1)
    with pytest.raises(OSError, match="Too many links") as caught:
        os.rename(web, daemon.mnt / "committed/more")
    assert caught.value.errno == errno.EMLINK
    assert "EMLINK rename active/web committed/more: snapshot" in daemon.error_log()[-1]
    assert sorted(snapfs.names()) == before
    assert snapfs("label", "web") == "team=blue\n"
    assert (web / "rootfs/last").read_text() == "2"
    (web / "rootfs/last").write_text("3")
    os.mkdir(daemon.mnt / f"committed/web@{MOST}/view/peek")
    assert (daemon.mnt / "view/peek/rootfs/last").read_text() == "1"
    assert snapfs("squash", f"web@{MOST}", "anew") == "anew\n"  # what the words say
    os.mkdir(daemon.mnt / "committed/anew/active/next")
    assert (daemon.mnt / "active/next/rootfs/last").read_text() == "1"
    assert (daemon.mnt / "active/next/rootfs/file400").read_text() == "400"
    os.rename(daemon.mnt / "active/next", daemon.mnt / "committed/more")
    assert daemon.stop() == 0


def test_so_many_become_one_by_themselves(deep: Path, make_daemon: Make) -> None:
    """The workspace, which can't be kept at first, soon can."""
    daemon = make_daemon("-o", "squash_depth=0", root=deep).start()
    web = daemon.mnt / "active/web"
    (web / "rootfs/last").write_text("1")
    (web / "checkpoint").write_text("\n")
    (web / "rootfs/more").write_text("2")
    assert daemon.stop() == 0
    daemon = make_daemon(root=deep).start()
    with pytest.raises(OSError, match="Too many links"):
        (web / "checkpoint").write_text("\n")
    assert "they are being made one: try again in a moment" in daemon.error_log()[-1]
    until(lambda: (web / "parent").resolve().name == f"web@{MOST}-squashed")
    (web / "checkpoint").write_text("\n")
    assert {path.name for path in (web / "rootfs").iterdir()} == {"last", "more", "file1", *(f"file{n}00" for n in range(1, 5))}
    assert daemon.stop() == 0


async def test_rebasing_onto_so_many_is_refused(snapshotter: Snapshotter) -> None:
    await stack(snapshotter, 3)
    snapshots = [info.name for info in await snapshotter.walk()]

    def lengthen(writer: Writer) -> None:
        """As no call would do it: from here on the chain has 500 layers."""
        below = writer.find("web@1")
        assert below is not None
        parent = 0
        for number in range(1000, 1000 + MOST - 3):
            writer.put(number, Record(f"more{number}", Kind.COMMITTED, parent, 1, 1, {}))
            parent = number
        writer.raise_last_id(parent)
        writer.put(below[0], Record("web@1", Kind.COMMITTED, parent, 1, 1, {}))

    await snapshotter.records.write(lengthen)
    await snapshotter.prepare("k")
    with pytest.raises(TooDeep, match='snapshot "n" would stand on 501 layers'):
        await snapshotter.commit("n", "k", parent="web@3")
    assert (await snapshotter.stat("k")).kind is Kind.ACTIVE
    await snapshotter.commit("n", "k", parent="web@2")
    await snapshotter.prepare("k", "n")
    with pytest.raises(TooDeep):
        await snapshotter.commit("m", "k")
    assert (await snapshotter.stat("k")).parent == "n", "500 below an active one are fine"
    assert set(snapshots) < {info.name for info in await snapshotter.walk()}


async def test_what_an_older_snapfs_has_made_too_deep_gets_no_children(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("tmp")
    await snapshotter.remove("tmp")

    def too_deep(writer: Writer) -> None:
        writer.raise_last_id(MOST + 1)
        for number in range(1, MOST + 2):
            os.makedirs(snapshotter.layers.fs(number))
            writer.put(number, Record(f"n{number}", Kind.COMMITTED, number - 1, 1, 1, {}))

    await snapshotter.records.write(too_deep)
    before = sorted(os.listdir(snapshotter.layers.snapshots))
    for kind in (Kind.ACTIVE, Kind.VIEW):
        with pytest.raises(TooDeep, match='snapshot "k" would stand on 501 layers'):
            await snapshotter.create(kind, "k", f"n{MOST + 1}")
        await snapshotter.create(kind, kind.value, f"n{MOST}")
        await snapshotter.remove(kind.value)
    assert sorted(os.listdir(snapshotter.layers.snapshots)) == before


def test_at_the_socket(deep: Path, make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("--containerd", str(tmp_path / "snapfs.sock"), root=deep).start()
    with connected(tmp_path / "snapfs.sock") as client:
        parent = f"web@{MOST - 1}"
        client.call("Prepare", key="a", parent=parent)
        client.call("Commit", name=f"n{MOST}", key="a")
        client.call("Prepare", key="b", parent=f"n{MOST}")
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Commit", name="n", key="b")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert daemon.stop() == 0


def test_its_errno() -> None:
    assert errno_of(TooDeep("")) == errno.EMLINK
    assert issubclass(TooDeep, FailedPrecondition)
