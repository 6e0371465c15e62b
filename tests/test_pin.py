"""The label pin: what bears it is removed at no door, and nothing of it is touched by what deletes whole directories."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from snapfs import Kind, Options, Snapshotter, open_snapshotter
from snapfs.errors import NotPermitted, Pinned
from snapfs.fuse.errno import errno_of
from snapfs.kernel.mounttable import mount_table
from tests.command import Command
from tests.containerd_client import connected
from tests.daemon import Daemon
from tests.refusals import refused
from tests.tree import KINDS, REMOVERS, listing, made, shell

Make = Callable[..., Daemon]

WORDS = 'snapshot "k" has the label pin, which keeps it: take that away first (snapfs label --delete pin k)'


@pytest.fixture
def snapfs(daemon: Daemon) -> Command:
    return Command(daemon.mnt)


@pytest.mark.parametrize("value", ["yes", "0", " "])
@pytest.mark.parametrize("wait", [True, False])
async def test_by_the_library(snapshotter: Snapshotter, value: str, wait: bool) -> None:
    await snapshotter.prepare("k", labels={"pin": value})
    with pytest.raises(Pinned) as caught:
        await snapshotter.remove("k", wait=wait)
    assert str(caught.value) == WORDS
    await snapshotter.rename("k", "renamed")
    await snapshotter.commit("c", "renamed", keep_labels=True)
    with pytest.raises(Pinned):
        await snapshotter.remove("c")
    await snapshotter.cleanup()
    assert (await snapshotter.stat("c")).labels == {"pin": value}
    await snapshotter.update("c", {}, ["labels.pin"])
    await snapshotter.remove("c")
    assert await snapshotter.walk() == []


async def test_with_async_remove(root: Path) -> None:
    async with open_snapshotter(root, Options(async_remove=True)) as snapshotter:
        await snapshotter.view("k", labels={"pin": "yes"})
        with pytest.raises(Pinned):
            await snapshotter.remove("k")
        await snapshotter.cleanup()
        assert os.listdir(root / "snapshots") == ["1"]


@pytest.mark.mounts
async def test_its_rootfs_stays_mounted(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("k", labels={"pin": "yes"})
    place = await snapshotter.mount("k")
    with pytest.raises(Pinned):
        await snapshotter.remove("k")
    assert place in [mount.target for mount in mount_table()]


def test_its_errno() -> None:
    assert errno_of(Pinned("")) == errno.EPERM
    assert issubclass(Pinned, NotPermitted)


def test_at_the_socket(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("--containerd", str(tmp_path / "snapfs.sock")).start()
    with connected(tmp_path / "snapfs.sock") as client:
        client.call("Prepare", key="k", parent="")
        (daemon.mnt / "active/k/labels/pin").write_text("yes")
        with pytest.raises(grpc.RpcError) as caught:
            client.call("Remove", key="k")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == f"{WORDS}: failed precondition"
        (daemon.mnt / "active/k/labels/pin").unlink()
        client.call("Remove", key="k")
    assert os.listdir(daemon.mnt / "active") == []


@pytest.mark.parametrize("kind", KINDS)
def test_rmdir(daemon: Daemon, kind: str) -> None:
    path = made(daemon.mnt, kind, "k")
    (path / "labels/pin").write_text("yes")
    with refused(daemon, errno.EPERM, "rmdir", f"{kind}/k", "has the label pin"):
        os.rmdir(path)
    (path / "labels/pin").unlink()
    os.rmdir(path)
    assert os.listdir(daemon.mnt / kind) == []


BACKWARDS = f"""{sys.executable} -c '
import os, sys
def delete(path):
    for name in reversed(os.listdir(path)):
        below = path + "/" + name
        if os.path.isdir(below) and not os.path.islink(below):
            delete(below)
        else:
            try:
                os.unlink(below)
            except OSError as error:
                print(error, file=sys.stderr)
    try:
        os.rmdir(path)
    except OSError as error:
        print(error, file=sys.stderr)
        if path == sys.argv[1]:
            sys.exit(1)
delete(sys.argv[1])
' {{}}"""


@pytest.mark.parametrize("remover", [*REMOVERS, "busybox rm -rf {}", "find {} -delete", BACKWARDS, "rmtree"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_deletes_a_whole_directory_touches_nothing(daemon: Daemon, kind: str, remover: str) -> None:
    path = made(daemon.mnt, kind, "k")
    for label in ("a", "pin", "z"):
        (path / "labels" / label).write_text("yes")
    before = listing(daemon.mnt)
    if remover == "rmtree":
        shutil.rmtree(path, ignore_errors=True)
    else:
        done = shell(daemon.mnt, remover.format(f"{kind}/k"))
        assert done.returncode == 1
        assert "Operation not permitted" in done.stderr
    assert listing(daemon.mnt) == before
    assert WORDS in daemon.error_log()[-1]
    assert shell(daemon.mnt, f"rm {kind}/k/labels/pin && rm -r {kind}/k").stderr == "", "so it is unpinned"
    assert os.listdir(daemon.mnt / kind) == []


def test_one_process_may_be_refused_and_unpin_it_then(daemon: Daemon) -> None:
    path = made(daemon.mnt, "active", "k")
    (path / "labels/pin").write_text("yes")
    with pytest.raises(PermissionError):
        os.rmdir(path)
    os.unlink(path / "labels/pin")
    os.rmdir(path)


def test_a_move_to_another_file_system_does_not_remove_it(daemon: Daemon) -> None:
    path = made(daemon.mnt, "active", "k")
    (path / "labels/pin").write_text("yes")
    before = listing(daemon.mnt)
    assert shell(daemon.mnt, "mv active/k /dev/shm/k; status=$?; rm -r /dev/shm/k; exit $status").returncode == 1
    assert listing(daemon.mnt) == before


def test_rm_and_prune(snapfs: Command) -> None:
    snapfs("prepare", "k", "-l", "pin=1", "-l", "ttl=0s")
    assert WORDS in snapfs("rm", "k", status=6)
    assert WORDS in snapfs("rm", "-rf", "k", status=6)
    kept = json.loads(snapfs("prune", "--json", "--expired"))
    assert (kept["removed"], kept["kept"]) == ([], [{"name": "k", "why": "it is pinned"}])
    snapfs("label", "k", "--delete", "pin")
    snapfs("rm", "k")


def test_a_pinned_workspace_is_not_rolled_back(snapfs: Command) -> None:
    snapfs("prepare", "k")
    file = snapfs.mnt / "active/k/rootfs/file"
    file.write_text("1")
    snapfs("checkpoint", "k")
    file.write_text("2")
    snapfs("label", "k", "pin=yes")
    for words in (("rollback", "k"), ("rollback", "k", "1"), ("rollback", "k", "0"), ("rollback", "--keep", "k")):
        assert WORDS in snapfs(*words, status=6)
        assert file.read_text() == "2"
        assert snapfs.names() == ["k", "k@1"]
    snapfs("label", "k", "pin=")
    snapfs("rollback", "k")
    assert file.read_text() == "1"


def test_a_checkpoint_of_a_pinned_workspace_is_not_pinned_by_that(snapfs: Command) -> None:
    snapfs("prepare", "k", "-l", "pin=yes", "-l", "team=blue")
    snapfs("checkpoint", "k")
    snapfs("fork", "k", "other")
    assert json.loads(snapfs("label", "--json", "k")) == {"pin": "yes", "team": "blue"}
    assert snapfs("label", "other") == ""
    for name in ("k@1", "k@2"):
        assert "pin" not in json.loads(snapfs("label", "--json", name))
    snapfs("label", "k@1", "pin=yes")
    snapfs("label", "k", "pin=")
    snapfs("rm", "k", "other", "k@2")
    assert "pin" in snapfs("rm", "k@1", status=6)


async def test_a_damaged_record_can_be_removed_all_the_same(snapshotter: Snapshotter) -> None:
    """Nobody can say what labels it had, and nobody could take them away."""
    await snapshotter.prepare("k", labels={"pin": "yes"})

    def damage(writer: object) -> None:
        from snapfs.store.writing import Writer

        assert isinstance(writer, Writer)
        writer._txn.put((1).to_bytes(8, "big"), b"\xc1", db=writer._tables.snapshots)

    await snapshotter.records.write(damage)
    await snapshotter.remove("k")
    assert await snapshotter.walk() == []
    assert (await snapshotter.create(Kind.ACTIVE, "k")) == 2
