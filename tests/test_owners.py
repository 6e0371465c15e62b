"""Other owners for all files of a layer (the option ``slow_chown``): nobody but who needs them waits for them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from snapfs import Options, Snapshotter, TryAgain, Unavailable, open_snapshotter
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.kernel import mounting
from snapfs.model import Kind
from snapfs.root.owners import Shift
from snapfs.tree import Tree

pytestmark = pytest.mark.mounts


class SlowChown:
    """Stands in for ``os.chown``: the first call waits until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self._chown = os.chown
        monkeypatch.setattr("snapfs.root.owners.os.chown", self)

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        if not self.began.is_set():
            self.began.set()
            assert self.may_go_on.wait(60)
        self._chown(*arguments, **keywords)


FROM = {UID_MAPPING: "0:1000:10", GID_MAPPING: "0:3000:10"}
TO = {UID_MAPPING: "0:5000:10", GID_MAPPING: "0:7000:10"}


@pytest.fixture
async def shifting(root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Snapshotter]:
    """A root where owners are changed for want of idmapped mounts; ``web``, number 1, has one file."""
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    async with open_snapshotter(root, Options(remap_ids=True, slow_chown=True)) as snapshotter:
        await snapshotter.prepare("web", None, FROM)
        (root / "snapshots/1/fs/file").write_text("x")
        os.chown(root / "snapshots/1/fs/file", 1001, 3001)
        yield snapshotter


def owners(root: Path) -> list[tuple[int, int]]:
    found = [os.lstat(root / "snapshots/1" / name) for name in ("fs", "fs/file")]
    return [(each.st_uid, each.st_gid) for each in found]


AS_BEFORE, SHIFTED = [(1000, 3000), (1001, 3001)], [(5000, 7000), (5001, 7001)]


async def test_the_writer_serves_others_while_owners_are_changed(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowChown(monkeypatch)
    done: list[str] = []

    async def update() -> None:
        await shifting.update("web", TO)
        done.append("update")

    async def commit() -> None:
        await shifting.commit("v1", "web", keep_labels=True)
        done.append("commit")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(update)
        await trio.to_thread.run_sync(slow.began.wait)
        with trio.fail_after(30):
            await shifting.prepare("other")
            await shifting.update("web", {**FROM, "a": "b"})
            await shifting.remove("other")
        nursery.start_soon(commit)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (done, (await shifting.stat("web")).kind) == ([], Kind.ACTIVE)
        slow.may_go_on.set()
    assert done == ["update", "commit"]
    assert owners(root) == SHIFTED
    assert (await shifting.stat("v1")).labels == TO


async def test_what_keeps_others_waiting_in_the_tree_waits_for_the_owners_for_a_moment_only(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapfs.snapshotter.LOCKED", 0.05)
    slow = SlowChown(monkeypatch)
    tree = Tree(shifting)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shifting.update, "web", TO)
        await trio.to_thread.run_sync(slow.began.wait)
        with trio.fail_after(30):
            with pytest.raises(TryAgain, match="just being done to this snapshot: try again"):
                await tree.rename(tree.walk("active"), "web", tree.walk("committed"), "v1")
            with pytest.raises(TryAgain):
                await tree.walk("active").rmdir("web", 0)
        slow.may_go_on.set()
    assert owners(root) == SHIFTED
    await tree.rename(tree.walk("active"), "web", tree.walk("committed"), "v1")


async def test_updates_that_change_owners_come_one_after_the_other(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowChown(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shifting.update, "web", {UID_MAPPING: "0:8000:10", GID_MAPPING: "0:9000:10"})
        await trio.to_thread.run_sync(slow.began.wait)
        nursery.start_soon(shifting.update, "web", TO)
        await trio.testing.wait_all_tasks_blocked(0.05)
        slow.may_go_on.set()
    assert owners(root) == SHIFTED
    assert (await shifting.stat("web")).labels == TO


async def test_a_name_that_leads_elsewhere_when_the_owners_are_changed(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowChown(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shifting.update, "web", TO)
        await trio.to_thread.run_sync(slow.began.wait)
        await shifting.rename("web", "elsewhere")
        await shifting.prepare("web", None, FROM)
        slow.may_go_on.set()
    assert owners(root) == AS_BEFORE
    assert (await shifting.stat("elsewhere")).labels == FROM
    assert (await shifting.stat("web")).labels == TO
    assert os.stat(root / "snapshots/2/fs").st_uid == 5000


async def test_a_cancelled_update_puts_the_owners_back(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowChown(monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shifting.update, "web", TO)
        await trio.to_thread.run_sync(slow.began.wait)
        nursery.cancel_scope.cancel()
        slow.may_go_on.set()
    assert owners(root) == AS_BEFORE
    assert (await shifting.stat("web")).labels == FROM
    await shifting.update("web", TO)
    assert owners(root) == SHIFTED


async def test_owners_are_put_back_where_the_labels_can_not_be_written(
    shifting: Snapshotter, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr("snapfs.root.imprint.write", refuse)
        with pytest.raises(Unavailable):
            await shifting.update("web", TO)
    assert owners(root) == AS_BEFORE
    assert (await shifting.stat("web")).labels == FROM
    with monkeypatch.context() as patch:
        patch.setattr("snapfs.root.owners.os.chown", refuse)
        with pytest.raises(Unavailable, match=r"cannot change the owner of .*/snapshots/1/fs: Input/output error"):
            await shifting.update("web", TO)
    assert owners(root) == AS_BEFORE


async def test_owners_stay_changed_until_it_is_known_whether_the_labels_are_written(shifting: Snapshotter, root: Path) -> None:
    shift = Shift(shifting.layers, 1, FROM, TO)
    shift.apply(lambda: None)
    undos: list[Callable[[], None]] = []
    writer = SimpleNamespace(on_failure=undos.append)
    shift.depend_on(writer)  # type: ignore[arg-type]
    shift.fail()  # the call has failed, and the disk does not tell what it has
    assert owners(root) == SHIFTED
    undos[0]()  # now it does
    assert owners(root) == AS_BEFORE


async def test_closing_waits_for_an_update_that_changes_owners(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    options = Options(remap_ids=True, slow_chown=True)
    async with trio.open_nursery() as nursery, open_snapshotter(root, options) as snapshotter:
        await snapshotter.prepare("web", None, FROM)
        (root / "snapshots/1/fs/file").touch()
        os.chown(root / "snapshots/1/fs/file", 1001, 3001)
        slow = SlowChown(monkeypatch)
        nursery.start_soon(snapshotter.update, "web", TO)
        await trio.to_thread.run_sync(slow.began.wait)
        nursery.start_soon(snapshotter.close)
        await trio.testing.wait_all_tasks_blocked(0.05)
        slow.may_go_on.set()
    async with open_snapshotter(root, options) as snapshotter:
        assert (await snapshotter.stat("web")).labels == TO
    assert owners(root) == SHIFTED
