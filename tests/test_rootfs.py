"""rootfs: following it is standing in the merged file system.  Each sentence of the promise on real mounts, and what a hostile
user, a crash or many clients at once make of them."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from snapfs import open_snapshotter
from snapfs.errors import AlreadyExists, Busy, Closed, NotFound
from snapfs.kernel import mounting, processes
from snapfs.kernel.mounttable import mount_table
from snapfs.kernel.processes import used_devices
from snapfs.model import Kind
from snapfs.options import Options
from snapfs.root.inuse import Closing
from snapfs.services import rootfs
from snapfs.services.rootfs import GRACE, PASSING
from tests import disk
from tests.daemon import Daemon
from tests.processes import die_with_parent, own_descriptors, until
from tests.refusals import failing, refused
from tests.rootfs import chain, feature, files, held, mounts_below, somebody, stats
from tests.tree import info, mounted, remove_all, shell, usage

pytestmark = pytest.mark.mounts

Make = Callable[..., Daemon]


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    """One daemon for the tests that need no options; each leaves it empty."""
    return module_daemon


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what a test made, and find nothing of it left."""
    yield
    if "daemon" in request.fixturenames:
        daemon = request.getfixturevalue("daemon")
        remove_all(daemon.mnt)
        assert held(daemon) == []


# -- what the tests share


def until_held(daemon: Daemon, numbers: list[int]) -> None:
    """Wait until just these are mounted: what ``held`` compares changes one after the other."""

    def is_so() -> bool:
        with suppress(AssertionError):
            return held(daemon) == numbers
        return False

    until(is_so)


def place(snapshot: Path) -> Path:
    """ROOT/rootfs/<id>/fs of a snapshot, without mounting it."""
    root = Path(json.loads((snapshot / "../../.snapfs/options.json").read_text())["root"])
    return root / "rootfs" / str(info(snapshot)["id"]) / "fs"


@contextmanager
def tmpfs(target: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


# -- standing in the merged file system


def test_following_it_is_standing_in_the_merged_file_system(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base", "top") / "active/web")
    assert held(daemon) == []
    web = mnt / "active/web"
    assert shell(mnt, "cat active/web/rootfs/base").stdout == "base", "in one path walk, the first time"
    number = info(web)["id"]
    assert os.readlink(web / "rootfs") == f"{daemon.root}/rootfs/{number}/fs"
    assert stat.S_ISDIR(os.lstat(daemon.root / "rootfs" / str(number)).st_mode)
    assert held(daemon) == [number]
    assert files(web / "rootfs") == {"base": "base", "top": "top", "same": "top"}
    (web / "rootfs/new").write_text("x" * 100_000)
    (web / "rootfs/same").unlink()
    assert (web / "diff/new").stat().st_size == 100_000
    assert stat.S_ISCHR(os.lstat(web / "diff/same").st_mode)
    assert (web / "changes").read_text() == "A /new\nD /same\n"
    assert shell(mnt, "cd active/web/rootfs && pwd -P && ls").stdout.split() == [str(place(web)), "base", "new", "top"]


def test_each_kind_and_each_depth(daemon: Daemon) -> None:
    """An overlay, or a bind of a single layer; what nobody may write is read-only, whatever the mode of access."""
    mnt = daemon.mnt
    for depth in range(4):
        names = [f"n{depth}{serial}" for serial in range(depth)]
        base = chain(mnt, *names) if names else mnt
        os.mkdir(base / f"active/a{depth}")
        os.mkdir(base / f"view/v{depth}")
        expected = {name: name for name in names} | ({"same": names[-1]} if names else {})
        snapshots = {mnt / f"active/a{depth}": True, mnt / f"view/v{depth}": False}
        if names:
            snapshots[base] = False
        for snapshot, writable in snapshots.items():
            rootfs = snapshot / "rootfs"
            assert files(rootfs) == expected
            if writable:
                (rootfs / "new").write_text("y")
                assert (snapshot / "diff/new").read_text() == "y"
                continue
            for path in (rootfs, *((rootfs / "same",) if names else ())):
                with failing(errno.EROFS):
                    os.utime(path)
            with failing(errno.EROFS):
                (rootfs / "new").write_text("y")
    assert len(held(daemon)) == 3 + 4 + 4


def test_a_tree_walk_leaves_links_alone(daemon: Daemon) -> None:
    """stat(2), listing and reading what is beside it mount nothing; only readlink(2) and path walks do."""
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    assert (
        shell(mnt, "stat -c %s active/web/rootfs && find . -name same && du -a . >/dev/null && ls active/web").returncode == 0
    )
    assert held(daemon) == []


def test_400_layers_under_long_paths(make_daemon: Make, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200)
    deep.mkdir(parents=True)
    daemon = make_daemon(root=deep).start()
    top = chain(daemon.mnt, *(f"layer{number}" for number in range(400)))
    os.mkdir(top / "active/web")
    os.mkdir(top / "view/peek")
    for snapshot in (daemon.mnt / "active/web", daemon.mnt / "view/peek", top):
        assert len(files(snapshot / "rootfs")) == 401
        assert (snapshot / "rootfs/layer0").read_text() == "layer0"
        assert (snapshot / "rootfs/same").read_text() == "layer399"
    assert len(held(daemon)) == 3
    assert daemon.stop() == 0
    assert mounts_below(daemon) == []


# -- Commit, Remove and rename


@contextmanager
def cwd_inside(rootfs: Path) -> Iterator[str]:
    with somebody(rootfs) as pid:
        yield rf"by process {pid} \(sleep\)"


@contextmanager
def open_file_inside(rootfs: Path) -> Iterator[str]:
    with open(rootfs / "base"):
        yield rf"by process {os.getpid()} \("


@contextmanager
def mount_below(rootfs: Path) -> Iterator[str]:
    (rootfs / "below").mkdir(exist_ok=True)
    with tmpfs(rootfs / "below"):
        yield f"by what is mounted at {rootfs}/below"


@pytest.mark.parametrize("use", [cwd_inside, open_file_inside, mount_below])
def test_commit_and_remove_are_refused_while_it_is_in_use(daemon: Daemon, use: Callable[[Path], Any]) -> None:
    mnt = daemon.mnt
    base = chain(mnt, "base")
    os.mkdir(base / "active/web")
    web, number = mnt / "active/web", info(base / "active/web")["id"]
    with ExitStack() as stack:
        by = stack.enter_context(use(Path(os.path.realpath(web / "rootfs"))))
        usage(web)  # which the listings then show as last known
        mounts = [mount for mount in mounts_below(daemon) if f"/rootfs/{number}" in mount.target]
        for door in ("committed", "committed/base/committed"):
            with refused(daemon, errno.EBUSY, "rename", f"active/web {door}/v1", f"{daemon.root}/rootfs/{number}/fs .*{by}"):
                os.rename(web, mnt / door / "v1")
        with refused(daemon, errno.EBUSY, "rmdir", "active/web", f"{daemon.root}/rootfs/{number}/fs .*{by}"):
            os.rmdir(web)
        os.rename(web, mnt / "active/web2")  # harms nobody
        os.rename(mnt / "active/web2", web)
        assert [mount for mount in mounts_below(daemon) if f"/rootfs/{number}" in mount.target] == mounts
        assert (web / "rootfs/base").read_text() == "base"
        (web / "rootfs/still").write_text("writable")
    os.rename(web, mnt / "committed/v1")
    assert number not in held(daemon)
    assert (mnt / "committed/v1/diff/still").read_text() == "writable"
    assert (mnt / "committed/v1/rootfs/still").read_text() == "writable"
    with failing(errno.EROFS):
        (mnt / "committed/v1/rootfs/still").write_text("y")


def test_remove_of_views_and_committed_snapshots_in_use(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base", "top") / "view/peek")
    for snapshot in ("view/peek", "committed/top"):
        with cwd_inside(mnt / snapshot / "rootfs") as by, refused(daemon, errno.EBUSY, "rmdir", snapshot, by):
            os.rmdir(mnt / snapshot)
        number = info(mnt / snapshot)["id"]
        os.rmdir(mnt / snapshot)
        assert not os.path.lexists(mnt / snapshot)
        assert number not in held(daemon)


def test_a_commit_that_is_refused_for_another_reason_leaves_everything(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    (mnt / "active/web/rootfs/new").write_text("x")
    with failing(errno.EEXIST):
        os.rename(mnt / "active/web", mnt / "committed/base")
    assert (mnt / "active/web/rootfs/new").read_text() == "x"
    (mnt / "active/web/rootfs/new").write_text("y")


def test_rename_while_somebody_is_inside(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    os.mkdir(mnt / "committed/base/view/peek")
    for kind, old in (("active", "web"), ("view", "peek"), ("committed", "base")):
        where = os.path.realpath(mnt / kind / old / "rootfs")
        with somebody(Path(where)):
            os.rename(mnt / kind / old, mnt / kind / f"{old}2")
            assert os.path.realpath(mnt / kind / f"{old}2" / "rootfs") == where
            assert files(Path(where)) == {"base": "base", "same": "base"}


def test_a_label_or_child_made_from_inside(daemon: Daemon) -> None:
    """Standing in rootfs is no hindrance to anything but Commit and Remove of this very snapshot."""
    mnt = daemon.mnt
    base = chain(mnt, "base")
    with somebody(base / "rootfs"):
        os.mkdir(base / "active/web")
        with somebody(mnt / "active/web/rootfs"):
            (mnt / "active/web/labels/team").write_text("blue")
            os.mkdir(base / "active/other")
            (mnt / "active/other/rootfs/x").write_text("x")
            os.rename(mnt / "active/other", mnt / "committed/other")
    assert (mnt / "committed/other/rootfs/x").read_text() == "x"


# -- mounted by others


def test_what_somebody_else_has_mounted_is_not_mounted_twice(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    top = chain(mnt, "base", "top")
    for name, above in (("web", top), ("lone", mnt)):
        os.mkdir(above / "active" / name)
        active, target = mnt / "active" / name, tmp_path / f"by-{name}"
        target.mkdir()
        subprocess.run(["sh", str(active / "mount.sh"), str(target)], check=True)
        try:
            assert os.readlink(active / "rootfs") == str(target)
            (active / "rootfs/new").write_text("x")
            assert info(active)["mounted"] == [str(target)]
            assert info(active)["id"] not in held(daemon)
            usage(active)
            reason = f'snapshot "{name}" is mounted at {re.escape(str(target))}: unmount it first'
            with refused(daemon, errno.EBUSY, "rename", f"active/{name} committed/{name}", reason):
                os.rename(active, mnt / "committed" / name)
        finally:
            subprocess.run(["umount", str(target)], check=True)
        assert info(active)["mounted"] == []
        assert (active / "rootfs/new").read_text() == "x"
        assert os.readlink(active / "rootfs") == str(place(active)), "from now on it is ours"
        with mounted(active, target):  # the first stays
            assert os.readlink(active / "rootfs") == str(place(active))
            assert info(active)["mounted"] == [str(place(active)), str(target)]


def test_a_part_of_a_layer_or_a_read_only_bind_is_not_the_snapshot(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    os.mkdir(mnt / "active/lone")
    (mnt / "active/lone/diff/part").mkdir()
    target = tmp_path / "part"
    target.mkdir()
    for source, options in (("diff/part", "bind"), ("diff", "bind,ro")):
        subprocess.run(["mount", "-o", options, os.path.realpath(mnt / "active/lone" / source), str(target)], check=True)
        try:
            assert os.readlink(mnt / "active/lone/rootfs") == str(place(mnt / "active/lone"))
            assert info(mnt / "active/lone")["mounted"] == [str(place(mnt / "active/lone"))]
        finally:
            subprocess.run(["umount", str(target)], check=True)


def test_a_part_of_its_rootfs_that_is_bound_elsewhere_is_not_the_snapshot(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    top = chain(mnt, "base", "top")
    os.mkdir(top / "active/web")
    (mnt / "active/web/rootfs/part").mkdir()
    (target := tmp_path / "part").mkdir()
    for name in ("active/web", "committed/top"):
        source = os.path.realpath(mnt / name / "rootfs")
        os.makedirs(mnt / "committed/base/diff/sub", exist_ok=True)
        inside = "part" if name == "active/web" else "sub"
        subprocess.run(["mount", "--bind", f"{source}/{inside}", str(target)], check=True)
        try:
            assert info(mnt / name)["mounted"] == [source]
            subprocess.run(["umount", source], check=True)
            assert (mnt / name / "rootfs/base").read_text() == "base"
            assert info(mnt / name)["mounted"] == [source]
            if name == "active/web":
                with failing(errno.EBUSY):
                    os.rename(mnt / name, mnt / "committed/v1")
        finally:
            subprocess.run(["umount", str(target)], check=True)


def test_info_json_says_where_each_kind_is_mounted(daemon: Daemon, tmp_path: Path) -> None:
    mnt = daemon.mnt
    top = chain(mnt, "base", "top")
    os.mkdir(top / "active/web")
    os.mkdir(top / "view/peek")
    snapshots = [mnt / "active/web", mnt / "view/peek", top]
    for snapshot in snapshots:
        assert info(snapshot)["mounted"] == []
        os.readlink(snapshot / "rootfs")
        assert info(snapshot)["mounted"] == [str(place(snapshot))]
    with mounted(mnt / "view/peek", tmp_path / "m") as elsewhere:
        assert info(mnt / "view/peek")["mounted"] == [str(place(mnt / "view/peek")), str(elsewhere)]
        assert info(top)["mounted"] == [str(place(top)), str(elsewhere)]
        assert info(mnt / "active/web")["mounted"] == [str(place(mnt / "active/web"))]
    os.rename(mnt / "active/web", mnt / "committed/web")
    assert info(mnt / "committed/web")["mounted"] == []


# -- what users do by hand


def test_unmounted_by_hand_it_is_mounted_again(daemon: Daemon) -> None:
    mnt = daemon.mnt
    chain(mnt, "base")
    os.mkdir(mnt / "committed/base/active/web")
    os.mkdir(mnt / "active/lone")
    (mnt / "active/lone/diff/base").write_text("base")
    for name in ("web", "lone"):
        for command in ("umount", "umount -l"):
            rootfs = mnt / "active" / name / "rootfs"
            assert (rootfs / "base").read_text() == "base"
            where = os.path.realpath(rootfs)
            subprocess.run([*command.split(), where], check=True)
            assert (rootfs / "base").read_text() == "base", "the empty directory beneath was shown"
        subprocess.run(["umount", where], check=True)
        os.rename(rootfs.parent, mnt / "committed" / name)
    assert held(daemon) == []


def test_what_was_written_beneath_is_kept_and_out_of_the_way(make_daemon: Make) -> None:
    """Who remembers the path beyond the mount can make the directory, and files in it: nothing of that is ever deleted."""
    daemon = make_daemon().start()
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    where = place(mnt / "active/web").parent
    (where / "fs/mine").mkdir(parents=True)
    assert files(mnt / "active/web/rootfs") == {"base": "base", "same": "base"}
    assert (daemon.root / "lost+found" / where.name / "fs/mine").is_dir()
    subprocess.run(["umount", str(where / "fs"), str(where)], check=True)
    (where / "mine").write_text("x")
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert (daemon.root / "lost+found" / f"{where.name}~1" / "mine").read_text() == "x"
    assert not where.exists()


def test_no_other_file_system_is_taken_for_a_shelter_that_is_gone(daemon: Daemon, tmp_path: Path) -> None:
    """The kernel gives the least number that is free to the next: a tmpfs of whoever may have the shelter's then."""
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    shelter = Path(os.path.realpath(mnt / "active/web/rootfs")).parent
    device = os.stat(shelter).st_dev
    subprocess.run(["umount", str(shelter / "fs"), str(shelter)], check=True)
    others: list[Path] = []
    try:
        for number in range(8):
            (other := tmp_path / str(number)).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", str(other)], check=True)
            others.append(other)
        assert device not in [os.stat(other).st_dev for other in others]
        os.rename(mnt / "active/web", mnt / "committed/v1")
        assert held(daemon) == []
    finally:
        for other in others:
            subprocess.run(["umount", str(other)], check=True)


@pytest.mark.parametrize(
    "what",
    [
        "umount X && umount P && rm X && rmdir P",
        "umount X && umount P && rm -r $(dirname P)",
        "umount -l P",
        "umount X && umount P && rm X && mkdir -p X/y && mount -t tmpfs none X/y",
    ],
)
def test_whatever_is_done_to_the_mountpoint_the_daemon_goes_on(make_daemon: Make, what: str) -> None:
    """The snapshot can be committed, another be mounted, and the daemon lives; also where it finds out by itself."""
    daemon = make_daemon("--rootfs-idle=0.5").start()
    mnt = daemon.mnt
    base = chain(mnt, "base")
    for name in ("one", "two"):
        os.mkdir(base / f"active/{name}")
        where = os.path.realpath(mnt / f"active/{name}/rootfs")
        script = what.replace("X", where).replace("P", os.path.dirname(where))
        subprocess.run(["sh", "-ec", script], check=True)
        if name == "one":
            os.rename(mnt / "active/one", mnt / "committed/one")
        else:
            until(lambda: stats(daemon)["mounts_held"] == 0)
            assert (mnt / "active/two/rootfs/base").read_text() == "base"
        subprocess.run(["umount", f"{where}/y"], stderr=subprocess.DEVNULL, check=False)
    assert (mnt / "committed/one/rootfs/base").read_text() == "base"
    assert daemon.stop() == 0
    assert mounts_below(daemon) == []


IMPATIENT = """
import sys
from snapfs.cli import main
from snapfs.fuse import operations
operations.TIMEOUT = 0.05
sys.exit(main(sys.argv[1:]))
"""


def test_a_layer_that_is_bound_inside_the_tree(make_daemon: Make) -> None:
    """The daemon is never to ask what is there: once the kernel's entries have timed out, it would wait for itself."""
    daemon = make_daemon()
    daemon.program = ("-c", IMPATIENT)
    daemon.start()
    mnt = daemon.mnt
    for name in ("lone", "other"):
        os.mkdir(mnt / "active" / name)
    target = mnt / "active/lone/labels"
    subprocess.run(["sh", str(mnt / "active/lone/mount.sh"), str(target)], check=True)
    time.sleep(0.1)  # until the kernel has to ask anew
    command = ["cat", str(mnt / "active/other/info.json"), str(mnt / "active/lone/info.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as cat:
        try:
            out, _ = cat.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.cleanup()  # or the client could never end
            raise
    assert f'"mounted": [\n    "{target}"\n  ]' in out
    assert os.readlink(mnt / "active/lone/rootfs") == str(target)
    subprocess.run(["umount", str(target)], check=True)


# -- what programs do with the link


def test_deleting_and_moving(daemon: Daemon, tmp_path: Path) -> None:
    """Nothing that is done to the link is done to what it leads to."""
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    (mnt / "active/web/rootfs/new").write_text("x")
    layer = daemon.root / "snapshots" / str(info(mnt / "active/web")["id"]) / "fs"
    assert shell(mnt, "rmdir active/web/rootfs").returncode == 1
    assert shell(mnt, "mv active/web/rootfs active/web/other").returncode == 1
    assert shell(mnt, f"ln -sfn {tmp_path} active/web/rootfs; mkdir active/web/rootfs").returncode == 1
    assert (layer / "new").read_text() == "x"
    assert os.readlink(mnt / "active/web/rootfs") == str(place(mnt / "active/web"))
    assert shell(mnt, f"cp -a active/web/rootfs {tmp_path}/link && cp -a active/web/rootfs/. {tmp_path}/copy").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert files(tmp_path / "copy") == {"base": "base", "same": "base", "new": "x"}
    with somebody(mnt / "active/web/rootfs"):
        assert shell(mnt, "rm -r active/web").returncode == 1
        assert (layer / "new").read_text() == "x"
        assert (mnt / "active/web/info.json").exists() is False, "rm has taken out the entries before it came to the rmdir"
    assert shell(mnt, "rm -r active/web").returncode == 0
    assert not (mnt / "active/web").exists()


def test_an_entry_that_was_taken_out_of_the_listing_mounts_nothing(daemon: Daemon) -> None:
    mnt = daemon.mnt
    os.mkdir(mnt / "active/web")
    os.unlink(mnt / "active/web/rootfs")
    with failing(errno.ENOENT):
        os.readlink(mnt / "active/web/rootfs")
    assert held(daemon) == []


# -- how long they are held


def test_unused_ones_are_unmounted(make_daemon: Make) -> None:
    daemon = make_daemon("--rootfs-idle=0.3").start()
    mnt = daemon.mnt
    base = chain(mnt, "base")
    for name in ("cwd", "file", "unused"):
        os.mkdir(base / f"active/{name}")
    numbers = {name: info(mnt / "active" / name)["id"] for name in ("cwd", "file", "unused")}
    with somebody(mnt / "active/cwd/rootfs"), open(mnt / "active/file/rootfs/base"):
        (mnt / "active/unused/rootfs/new").write_text("x")
        until_held(daemon, [numbers["cwd"], numbers["file"]])
        began = time.monotonic()
        until(lambda: time.monotonic() > began + 0.6)  # some rounds that find them in use
        assert held(daemon) == [numbers["cwd"], numbers["file"]]
    until_held(daemon, [])
    assert (mnt / "active/unused/rootfs/new").read_text() == "x"


@pytest.mark.parametrize("parent", ["base", ""])
def test_use_through_a_path_that_was_resolved_earlier_keeps_it(make_daemon: Make, parent: str) -> None:
    """For an overlay and for a bind, also while others read the mount table, which is no use."""
    daemon = make_daemon("--rootfs-idle=0.3").start()
    mnt = daemon.mnt
    chain(mnt, "base")
    above = mnt / "committed" / parent if parent else mnt
    os.mkdir(above / "active/web")
    os.mkdir(above / "active/other")
    where = Path(os.path.realpath(mnt / "active/web/rootfs"))
    os.readlink(mnt / "active/other/rootfs")
    numbers = [info(mnt / f"active/{name}")["id"] for name in ("web", "other")]
    began = time.monotonic()
    while time.monotonic() < began + 1.0:
        (where / "new").write_text("x")
        assert info(mnt / "active/other")["name"] == "other"
        time.sleep(0.01)
    assert numbers[0] in held(daemon)
    assert numbers[1] not in held(daemon)
    until_held(daemon, [])


def test_a_bind_expires_though_the_mount_table_changes_and_is_read(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("--rootfs-idle=0.3").start()
    os.mkdir(daemon.mnt / "active/lone")
    os.readlink(daemon.mnt / "active/lone/rootfs")
    (target := tmp_path / "t").mkdir()

    def is_gone() -> bool:
        with tmpfs(target):
            return not info(daemon.mnt / "active/lone")["mounted"]

    until(is_gone)
    until_held(daemon, [])  # the directory goes right after


def test_no_more_than_the_cap_are_held(make_daemon: Make) -> None:
    """The one that was asked for longest ago goes, unless it is in use; where all are, the next is refused with words."""
    daemon = make_daemon("--rootfs-max=3").start()
    mnt = daemon.mnt
    base = chain(mnt, "base")
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        os.mkdir(base / "active" / name)
    number = {name: info(mnt / "active" / name)["id"] for name in names}
    with ExitStack() as inside:
        for name in "abc":
            assert (mnt / "active" / name / "rootfs/base").read_text() == "base"
        os.readlink(mnt / "active/a/rootfs")
        assert (mnt / "active/d/rootfs/base").read_text() == "base"
        assert held(daemon) == [number["a"], number["c"], number["d"]], "not b, which was asked for longest ago"
        inside.enter_context(somebody(mnt / "active/c/rootfs"))
        assert (mnt / "active/e/rootfs/base").read_text() == "base"
        assert held(daemon) == [number["c"], number["d"], number["e"]]
        inside.enter_context(somebody(mnt / "active/d/rootfs"))
        inside.enter_context(somebody(mnt / "active/e/rootfs"))
        with failing(errno.EBUSY):
            os.readlink(mnt / "active/a/rootfs")
        assert "EBUSY readlink active/a/rootfs: 3 file systems are mounted and all in use" in daemon.error_log()[-1]
        assert held(daemon) == [number["c"], number["d"], number["e"]]
        assert (mnt / "active/c/rootfs/base").read_text() == "base"
    assert (mnt / "active/a/rootfs/base").read_text() == "base"
    assert len(held(daemon)) == 3


def test_volatile_mounts_can_be_followed_again(make_daemon: Make) -> None:
    """overlayfs refuses to mount a second time what was mounted with that option."""
    daemon = make_daemon("--mount-option=volatile").start()
    os.mkdir(chain(daemon.mnt, "base") / "active/web")
    for _ in range(3):
        assert (daemon.mnt / "active/web/rootfs/base").read_text() == "base"
        subprocess.run(["umount", str(place(daemon.mnt / "active/web"))], check=True)


def test_no_mark_of_a_volatile_mount_is_left(make_daemon: Make) -> None:
    """Where nothing is flushed rootfs is mounted volatile, and the kernel marks the work directory: who mounts mounts.json
    afterwards, even after a crash in the middle of a mount, would be refused."""
    daemon = make_daemon().start()
    web = daemon.mnt / "active/web"
    os.mkdir(chain(daemon.mnt, "base") / "active/web")
    os.readlink(web / "rootfs")
    assert any("volatile" in option for mount in mounts_below(daemon) for option in mount.super_options)
    mark = daemon.root / f"snapshots/{info(web)['id']}/work/work/incompat/volatile"
    assert not mark.exists()
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    mark.mkdir()
    (mark / "dirty").touch()  # as the kernel leaves it
    daemon.start()
    assert "volatile" not in json.loads((web / "mounts.json").read_text())[0]["options"]
    with mounted(web, daemon.mnt.parent / "elsewhere") as elsewhere:
        assert (elsewhere / "base").read_text() == "base"


# -- the end and the next start


def test_at_the_end_all_are_unmounted(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    base = chain(daemon.mnt, "base")
    for serial in range(5):
        os.mkdir(base / f"active/a{serial}")
        (daemon.mnt / f"active/a{serial}/rootfs/x").write_text("x")
    assert len(held(daemon)) == 5
    assert daemon.stop() == 0
    assert daemon.said[1:] == []
    assert mounts_below(daemon) == []
    assert os.listdir(daemon.root / "rootfs") == []


def test_at_the_end_what_is_in_use_is_detached_with_a_warning(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    os.mkdir(chain(daemon.mnt, "base") / "active/web")
    where = os.path.realpath(daemon.mnt / "active/web/rootfs")
    with somebody(Path(where)) as pid, open(f"{where}/base") as file:
        assert daemon.stop() == 0
        (line,) = daemon.said[1:]
        assert where in line
        assert f"{pid} (sleep)" in line
        assert file.read() == "base", "who is inside goes on"
        assert mounts_below(daemon) == []
        assert os.listdir(daemon.root / "rootfs") == []
        daemon.start()
        assert held(daemon) == []
        with failing(errno.EBUSY):
            os.readlink(daemon.mnt / "active/web/rootfs")
        assert "is in use elsewhere" in daemon.error_log()[-1]
    assert (daemon.mnt / "active/web/rootfs/base").read_text() == "base"


def test_who_sat_inside_at_the_end_cannot_change_what_is_committed_later(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    mnt = daemon.mnt
    base = chain(mnt, "base")
    for name, above in (("web", base), ("lone", mnt)):
        os.mkdir(above / "active" / name)
        (mnt / "active" / name / "rootfs/new").write_text("new")
        script = "read line; cat new; echo late > late; echo late > new; rm new; exit 0"
        sitter = subprocess.Popen(
            ["sh", "-c", script],
            cwd=mnt / "active" / name / "rootfs",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        try:
            assert daemon.stop() == 0
            daemon.start()
            usage(mnt / "active" / name)  # which the listings then show as last known
            with refused(daemon, errno.EBUSY, "rename", f"active/{name} committed/{name}", "is in use elsewhere"):
                os.rename(mnt / "active" / name, mnt / "committed" / name)
        finally:
            out, err = sitter.communicate("\n", timeout=30)
        assert out == "new"
        assert err.count("Read-only file system") == 3
        os.rename(mnt / "active" / name, mnt / "committed" / name)
        assert files(mnt / "committed" / name / "diff") == {"new": "new"}


@pytest.mark.durable
def test_what_a_crashed_daemon_left_is_cleared_or_taken_over(make_daemon: Make) -> None:
    daemon = make_daemon("--rootfs-idle=0.3").start()
    mnt = daemon.mnt
    top = chain(mnt, "base", "top")
    kept = {"active/web": top, "active/lone": mnt, "view/peek": top, "view/single": mnt / "committed/base"}
    for path, above in kept.items():
        os.mkdir(above / path)
    os.mkdir(top / "active/unused")
    os.readlink(mnt / "active/unused/rootfs")
    places = {path: Path(os.path.realpath(mnt / path / "rootfs")) for path in kept}
    numbers = sorted(int(where.parent.name) for where in places.values())
    with ExitStack() as inside:
        for where in places.values():
            inside.enter_context(somebody(where))
        before = {mount.target: mount.id for mount in mounts_below(daemon)}
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        daemon.start()
        assert held(daemon) == numbers
        assert all(before[mount.target] == mount.id for mount in mounts_below(daemon)), "not the same mounts"
        for path, where in places.items():
            assert os.readlink(mnt / path / "rootfs") == str(where)
            assert info(mnt / path)["mounted"] == [str(where)]
        for path in ("active/web", "active/lone"):
            (mnt / path / "rootfs/new").write_text("x")
            with failing(errno.EBUSY):
                os.rename(mnt / path, mnt / "committed/v1")
    until_held(daemon, [])
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert daemon.stop() == 0
    assert [line for line in daemon.said if "detach" in line or "still" in line] == []


@pytest.mark.durable
def test_what_does_not_fit_is_never_taken_over(make_daemon: Make) -> None:
    """Mounts at ROOT/rootfs/* that are in use and are not what following would mount there: all are detached at the start."""
    daemon = make_daemon().start()
    mnt = daemon.mnt
    top = chain(mnt, "base", "top")
    for path in ("active/lone", "active/alone", "view/other", "active/over"):
        os.mkdir(mnt / path)
    os.mkdir(top / "view/peek")
    number = {
        name: info(mnt / name)["id"] for name in ("committed/base", "active/lone", "active/alone", "view/peek", "view/other")
    }
    over = Path(os.path.realpath(mnt / "active/over/rootfs"))
    layer = {name: f"{daemon.root}/snapshots/{serial}/fs" for name, serial in number.items()}
    wrong = {
        "committed/base": ["-o", "bind", layer["committed/base"]],  # writable
        "active/lone": ["-o", "bind,ro", layer["active/lone"]],
        "active/alone": ["-o", "bind", layer["active/lone"]],  # another's
        "view/peek": ["-t", "tmpfs", "none"],
        "view/other": ["-t", "overlay", "-o", f"lowerdir={layer['committed/base']}:{layer['view/other']}", "none"],
    }
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    targets = [daemon.root / "rootfs" / str(number[name]) for name in wrong] + [
        daemon.root / "rootfs/99",
        daemon.root / "rootfs/x y",
    ]
    try:
        with ExitStack() as inside:
            for target, arguments in zip(targets, [*wrong.values(), *[["-t", "tmpfs", "none"]] * 2], strict=True):
                target.mkdir()
                subprocess.run(["mount", *arguments, str(target)], check=True)
                inside.enter_context(somebody(target))
            subprocess.run(["mount", "-t", "tmpfs", "none", str(over)], check=True)
            (daemon.root / "rootfs/junk").mkdir()
            (daemon.root / "rootfs/junk/file").write_text("mine")
            (daemon.root / "rootfs/98").mkdir()
            daemon.start()
            assert held(daemon) == []
            assert sum("detaching" in line for line in daemon.said) == len(targets)
            assert (daemon.root / "lost+found/junk/file").read_text() == "mine"
            for name in wrong:
                os.readlink(mnt / name / "rootfs")
            assert files(mnt / "committed/base/rootfs") == {"base": "base", "same": "base"}
            assert files(mnt / "view/peek/rootfs") == {"base": "base", "top": "top", "same": "top"}
    finally:
        for target in targets:
            subprocess.run(["umount", "-l", str(target)], stderr=subprocess.DEVNULL, check=False)


# -- where it is not wanted or not permitted


def assert_left_out(daemon: Daemon, why: str) -> None:
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base") / "active/web")
    os.mkdir(mnt / "committed/base/view/peek")
    for snapshot in ("active/web", "view/peek", "committed/base"):
        assert "rootfs" not in os.listdir(mnt / snapshot)
        with failing(errno.ENOENT):
            os.readlink(mnt / snapshot / "rootfs")
    assert feature(daemon)["on"] is False
    assert re.search(why, feature(daemon)["why"])
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert held(daemon) == []


@pytest.mark.durable
def test_no_rootfs(make_daemon: Make) -> None:
    """It clears what a crashed one with rootfs has left, used or not."""
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    assert feature(daemon)["on"] is True
    with somebody(daemon.mnt / "active/a/rootfs"):
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        daemon.arguments = ("--no-rootfs",)
        daemon.start()
        assert_left_out(daemon, "no_rootfs")
    assert daemon.stop() == 0


def test_where_root_cannot_be_an_upper_layer(make_daemon: Make, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", str(merged)], check=True)
    daemon = make_daemon(root=merged / "root")
    try:
        root = re.escape(str(daemon.root))
        why = f"the file system of {root} can't hold overlayfs's upper layers: put ROOT on ext4, xfs, btrfs or tmpfs, "
        what = f"overlay: filesystem on {root} not supported as upperdir"
        assert_left_out(daemon.start(), rf"{why}in a container on a volume \({what}\)$")
        assert daemon.stop() == 0
        assert daemon.said[1:] == []
    finally:
        daemon.cleanup()
        subprocess.run(["umount", "-l", str(merged)], check=True)


@pytest.mark.usefixtures("everybodys_fuse")
def test_where_mounting_is_not_permitted(tmp_path: Path) -> None:
    """An ordinary user, for whom fusermount3 mounts the tree and nobody an overlay."""
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    with ExitStack() as stack:
        subprocess.run(["mount", "--bind", str(tmp_path / "fuse.conf"), "/etc/fuse.conf"], check=True)
        stack.callback(subprocess.run, ["umount", "/etc/fuse.conf"], check=True)
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # pytest's are for root only
        (base / "root").mkdir()
        daemon = Daemon(base / "root", base / "mnt", "--allow-other", "--no-userns")
        for path in (base, base / "root", base / "mnt"):
            os.chown(path, 65534, 65534)
        daemon.prefix = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
        stack.callback(daemon.cleanup)
        assert_left_out(daemon.start(), r"leave out --no-userns, or run it as root$")
        assert daemon.stop() == 0
        assert daemon.said[1:] == []


ROOTLESS = """
import json, os, subprocess, sys
from pathlib import Path
from snapfs.options import Options
from tests.daemon import Daemon
from tests.rootfs import chain, feature, files, held, somebody
from snapfs.kernel.mounttable import mount_table

base = Path(sys.argv[1])
daemon = Daemon(base / "root", base / "mnt").start()
try:
    assert feature(daemon)["on"], feature(daemon)
    mnt = daemon.mnt
    os.mkdir(chain(mnt, "base", "top") / "active/web")
    os.mkdir(mnt / "active/lone")
    assert files(mnt / "active/web/rootfs") == {"base": "base", "top": "top", "same": "top"}
    (mnt / "active/web/rootfs/base").unlink()
    (mnt / "active/web/rootfs/new").write_text("new")
    (mnt / "active/lone/rootfs/new").write_text("new")
    os.mkdir(mnt / "active/lone/rootfs/tree")
    (mnt / "active/lone/rootfs/tree/file").write_text("old")
    os.rename(mnt / "active/lone", mnt / "committed/lone")
    os.mkdir(mnt / "committed/lone/active/replaced")
    os.mkdir(mnt / "committed/lone/active/by-hand")
    script, target = mnt / "active/by-hand/mount.sh", base / "target"
    target.mkdir()
    subprocess.run(["sh", script, target], check=True)
    for merged in (mnt / "active/replaced/rootfs", target):  # a directory of a lower layer
        subprocess.run(["rm", "-r", merged / "tree"], check=True)
        os.mkdir(merged / "tree")
        assert os.listdir(merged / "tree") == []
        (merged / "tree/other").write_text("new")
        assert files(merged / "tree") == {"other": "new"}
    subprocess.run(["umount", target], check=True)
    os.rmdir(target)
    (mount,) = [mount for mount in mount_table() if mount.target == os.path.realpath(mnt / "active/web/rootfs")]
    assert mount.type == "overlay" and "userxattr" in mount.super_options
    with somebody(mnt / "active/web/rootfs"):
        try:
            os.rename(mnt / "active/web", mnt / "committed/v1")
            raise AssertionError("it was in use")
        except OSError as error:
            assert error.errno == 16
    os.rename(mnt / "active/web", mnt / "committed/v1")
    assert files(mnt / "committed/v1/rootfs") == {"top": "top", "same": "top", "new": "new"}
    try:
        (mnt / "committed/v1/rootfs/new").write_text("no")
        raise AssertionError("it was writable")
    except OSError as error:
        assert error.errno == 30
    assert len(held(daemon)) == 2
    assert daemon.stop() == 0
    assert not [mount for mount in mount_table() if f"{base}/" in mount.target]
    assert os.listdir(base / "root/rootfs") == []
    assert daemon.said[1:] == [], daemon.said
    print("done")
finally:
    daemon.cleanup()
"""


@pytest.mark.parametrize("on_tmpfs", [False, True])
def test_rootless(small_disk: Path, on_tmpfs: bool) -> None:
    """As the root of a user namespace, which has all rights in it and none outside."""
    (small_disk / "base").mkdir()
    command = ["unshare", "-Urm", sys.executable, "-c", ROOTLESS, str(small_disk / "base")]
    if on_tmpfs:
        command[2:2] = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(small_disk / "base")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=die_with_parent, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


# -- many clients at once

CLIENT = """
import errno, json, os, random, sys, time
mnt, me, seed, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
pick = random.Random(seed)
told = {"wrong": [], "committed": {}, "did": {}}
os.chdir("/")

def manifest(directory):
    found = {}
    for name in sorted(os.listdir(directory)):
        with open(f"{directory}/{name}") as file:
            found[name] = file.read()
    return found

def expect(error, *numbers):
    if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ECONNABORTED, *numbers):
        told["wrong"].append(f"{name} {what}: {error!r}")

serial, gone = 0, False
end = time.monotonic() + seconds
while time.monotonic() < end and not gone:
    serial += 1
    name = f"a{pick.randrange(6)}"
    active, rootfs = f"{mnt}/active/{name}", f"{mnt}/active/{name}/rootfs"
    what = pick.choice("list list read write write sit commit remove rename stable stable info".split())
    told["did"][what] = told["did"].get(what, 0) + 1
    try:
        if what == "list":
            if not os.listdir(rootfs):
                told["wrong"].append(f"{name}: empty")
        elif what == "read":
            with open(f"{rootfs}/base") as file:
                assert file.read() == "base"
        elif what == "write":
            with open(f"{rootfs}/f-{me}-{serial}", "x") as file:
                file.write(f"{me} {serial}")
        elif what == "sit":
            os.chdir(rootfs)
            with open("sat", "a") as file:
                file.write(me)
            os.chdir("/")
        elif what == "stable":  # nobody changes these: there is no excuse
            snapshot = pick.choice(["view/peek", "committed/base", "active/stays"])
            try:
                with open(f"{mnt}/{snapshot}/rootfs/base") as file:
                    assert file.read() == "base"
            except FileNotFoundError as error:
                told["wrong"].append(f"{snapshot}: {error!r}")
        elif what == "info":
            with open(f"{active}/info.json") as file:
                json.load(file)
        elif what == "commit":
            os.rename(active, f"{mnt}/committed/c-{me}-{serial}")
            told["committed"][f"c-{me}-{serial}"] = manifest(f"{mnt}/committed/c-{me}-{serial}/diff")
        elif what == "remove":
            if told["committed"] and pick.random() < 0.5:
                which = pick.choice(sorted(told["committed"]))
                os.readlink(f"{mnt}/committed/{which}/rootfs")
                os.rmdir(f"{mnt}/committed/{which}")
                del told["committed"][which]
            else:
                os.rmdir(active)
        elif what == "rename":
            os.rename(active, f"{mnt}/active/a{pick.randrange(6)}")
        if what in ("commit", "remove"):
            os.mkdir(f"{mnt}/committed/base/active/{name}")
    except OSError as error:
        gone = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        # whoever comes too late to write meets the committed snapshot, which is read-only
        excused = {"write": [errno.EROFS], "sit": [errno.EROFS]}.get(what, [errno.EEXIST])
        expect(error, errno.EBUSY, *excused)
print(json.dumps(told))
"""


class Clients:
    """Processes that follow, write, commit, rename and remove, until their time is over or the mount is gone."""

    def __init__(self, mnt: Path, count: int, seed: int, seconds: float) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", CLIENT, str(mnt), f"{seed}.{number}", str(seed * 100 + number), str(seconds)],
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent,
            )
            for number in range(count)
        ]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with process:
                process.kill()

    def tell(self) -> tuple[list[str], dict[str, dict[str, str]]]:
        """What went wrong, and what each committed snapshot had in its layer right after the commit."""
        wrong: list[str] = []
        manifests: dict[str, dict[str, str]] = {}
        for process in self.processes:
            told = json.loads(process.communicate(timeout=60)[0])
            wrong += told["wrong"]
            manifests |= told["committed"]
        return wrong, manifests


def until_followed(daemon: Daemon, times: int) -> None:
    until(lambda: bool(stats(daemon)["operations"].get("readlink", {}).get("count", 0) >= times))


def playground(mnt: Path) -> None:
    """What the clients expect."""
    base = chain(mnt, "bottom", "base")
    for name in ("stays", *(f"a{number}" for number in range(6))):
        os.mkdir(base / "active" / name)
    os.mkdir(base / "view/peek")


def assert_as_committed(mnt: Path, manifests: dict[str, dict[str, str]]) -> None:
    for name in os.listdir(mnt / "committed"):
        if name in manifests:
            assert files(mnt / "committed" / name / "diff") == manifests[name], name


def test_many_clients_at_once(make_daemon: Make) -> None:
    """Nobody sees an empty directory or writes beneath a mount, nothing changes after its Commit, nothing is left behind."""
    daemon = make_daemon("--rootfs-idle=0.3", "--rootfs-max=6").start()
    playground(daemon.mnt)
    with Clients(daemon.mnt, 4, 1, 2) as clients:
        wrong, manifests = clients.tell()
    assert wrong == []
    assert_as_committed(daemon.mnt, manifests)
    assert not (daemon.root / "lost+found").exists(), "somebody wrote beneath a mount"
    until_held(daemon, [])
    assert daemon.stop() == 0
    assert daemon.said[1:] == []
    assert mounts_below(daemon) == []


@pytest.mark.durable
def test_kill_9_in_the_middle_of_it(make_daemon: Make) -> None:
    """Again and again, with clients at work: the next start takes over what is in use, and nothing else is left."""
    daemon = make_daemon("--rootfs-idle=0.3", "--rootfs-max=6").start()
    mnt = daemon.mnt
    playground(mnt)
    manifests: dict[str, dict[str, str]] = {}
    for serial in range(3):
        with Clients(mnt, 3, 10 + serial, 30) as clients, ExitStack() as inside:
            until_followed(daemon, 20 + 10 * serial)
            expected = []
            if serial % 2:
                inside.enter_context(somebody(mnt / "active/stays/rootfs"))
                expected = [info(mnt / "active/stays")["id"]]
            assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
            wrong, committed = clients.tell()
            assert wrong == []
            manifests |= committed
            daemon.start()
            assert held(daemon) == expected
            assert_as_committed(mnt, manifests)
        for name in {f"a{number}" for number in range(6)} - set(os.listdir(mnt / "active")):
            os.mkdir(mnt / "committed/base/active" / name)
    until_held(daemon, [])
    assert daemon.stop() == 0
    assert mounts_below(daemon) == []
    assert not (daemon.root / "lost+found").exists()


# -- the disk


@pytest.mark.alone
@pytest.mark.durable
@pytest.mark.parametrize("how", ["committed", "removed", "evicted", "expired"])
def test_no_request_waits_for_the_flush(make_daemon: Make, tmp_path: Path, how: str) -> None:
    """The last unmount of an overlay writes all that the file system below it has in memory: never while somebody waits."""
    mark = b"not yet"
    disk.make_file_system("ext4", image := tmp_path / "image", 128 << 20)
    with (
        disk.disk("ext4", image, parallel=True) as slow,
        disk.mounted(slow.device, "ext4", tmp_path / "disk", "data=writeback") as directory,  # no journal waits for data
    ):
        daemon = make_daemon("--rootfs-idle=0.3" if how == "expired" else "--rootfs-max=1", root=directory / "root").start()

        def written() -> bool:
            """Whether the disk has been given what nobody has asked to be flushed."""
            return any(mark in write.data for write in slow.history()[0])

        try:
            mnt = daemon.mnt
            os.mkdir(chain(mnt, "base") / "active/web")
            os.mkdir(mnt / "active/other")
            os.sync()
            with slow.held(mark):
                (mnt / "active/web/rootfs/much").write_bytes(mark.ljust(4096) * 64)
                if how == "committed":
                    os.rename(mnt / "active/web", mnt / "committed/v1")
                elif how == "removed":
                    os.rmdir(mnt / "active/web")
                elif how == "evicted":
                    os.readlink(mnt / "active/other/rootfs")
                else:
                    until_held(daemon, [])
                if how in ("committed", "removed"):
                    assert held(daemon) == []
                assert not written()
            if how != "removed":
                until(written)
            assert daemon.stop() == 0
        finally:
            daemon.cleanup()


def test_a_full_disk(make_daemon: Make, tmp_path: Path) -> None:
    """Following may fail, with words; what is mounted can be left, unmounted, removed."""
    (directory := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=400", "none", str(directory)], check=True)
    daemon = make_daemon(root=directory / "root").start()
    try:
        mnt = daemon.mnt
        base = chain(mnt, "base")
        for name in ("web", "late"):
            os.mkdir(base / "active" / name)
        os.readlink(mnt / "active/web/rootfs")
        with suppress(OSError):
            for serial in range(400):
                (directory / f"fill{serial}").touch()
        assert (mnt / "active/web/rootfs/base").read_text() == "base"
        with failing(errno.ENOSPC):
            os.readlink(mnt / "active/late/rootfs")
        assert "ENOSPC readlink active/late/rootfs: cannot mount the file system of snapshot" in daemon.error_log()[-1]
        os.rmdir(mnt / "active/web")
        assert held(daemon) == []
        for path in directory.glob("fill*"):
            path.unlink()
        assert (mnt / "active/late/rootfs/base").read_text() == "base"
        assert daemon.stop() == 0
    finally:
        daemon.cleanup()
        subprocess.run(["umount", "-l", str(directory)], check=True)


# -- the crawl

CRAWLS = {
    "find": "find {mnt} -ls",
    "ls": "ls -lR {mnt}",
    "du": "du -a {mnt}",
    "tree": "tree -a {mnt}",
    "rsync": "rsync -n -a {mnt}/ {tmp}/copy",
    "rsync -L": "rsync -n -a -L --exclude=changes --exclude=parent {mnt}/active {tmp}/copy",
    "tar": "tar -cf /dev/null {mnt}/active {mnt}/committed {mnt}/view",
    "updatedb": "updatedb -l 0 -U {mnt} -o {tmp}/db --prunefs= --prunepaths= --prune-bind-mounts no",
    "python": "{python} -c 'import os; print(sum(len(files) for _, _, files in os.walk(\"{mnt}\")))'",
}


def test_whatever_crawls_the_tree_ends_and_mounts_no_more_than_the_cap(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon("--rootfs-max=12").start()
    mnt = daemon.mnt
    base = chain(mnt, "bottom", "base")
    for serial in range(9):
        os.mkdir(base / f"active/a{serial}")
        os.mkdir(base / f"view/v{serial}")
    most, took = {}, {}
    for name, command in CRAWLS.items():
        began = time.monotonic()
        done = shell(tmp_path, command.format(mnt=mnt, tmp=tmp_path, python=sys.executable))
        most[name], took[name] = len(held(daemon)), time.monotonic() - began
        assert done.stdout or name in ("tar", "updatedb", "rsync", "rsync -L"), name
        assert done.returncode == 0, (name, done.stderr)
    assert 0 < max(most.values()) <= 12
    assert max(took.values()) < 10
    assert daemon.stop() == 0
    assert mounts_below(daemon) == []


# -- the library, cancelled in the middle


@pytest.mark.parametrize("seed", range(4))
async def test_cancelled_or_closed_in_the_middle_nothing_is_left(root: Path, seed: int) -> None:
    """No mount, no directory, no descriptor, no lock; and it goes on where it was not closed."""
    pick = random.Random(seed)
    before = sorted(own_descriptors())
    async with open_snapshotter(root, Options(rootfs_max=4, rootfs_idle=0.3)) as snapshotter:
        await snapshotter.prepare("draft")
        await snapshotter.commit("base", "draft")
        for number in range(8):
            await snapshotter.prepare(f"a{number}", "base")

        async def turn(number: int) -> None:
            key = f"a{pick.randrange(8)}"
            what = pick.randrange(6)
            if what < 4:
                where = await snapshotter.mount(key)
                assert snapshotter.layers.is_rootfs(where)
            elif what == 4:
                await snapshotter.commit(f"c{number}-{key}", key)
                await snapshotter.prepare(key, f"c{number}-{key}")
            else:
                await snapshotter.remove(key)
                await snapshotter.prepare(key, "base")

        async def work(number: int, scope: trio.CancelScope) -> None:
            with scope, suppress(Closed):
                while True:
                    try:
                        await turn(number)
                    except (NotFound, AlreadyExists, Busy):
                        await trio.lowlevel.checkpoint()

        scopes = [trio.CancelScope() for _ in range(6)]
        with trio.move_on_after(0.4):
            async with trio.open_nursery() as nursery:
                for number, scope in enumerate(scopes):
                    nursery.start_soon(work, number, scope)
                for scope in scopes[:3]:
                    await trio.sleep(pick.uniform(0.0, 0.1))
                    scope.cancel()
                if seed % 2:
                    await trio.sleep(pick.uniform(0.0, 0.1))
                    await snapshotter.close()  # with calls under way
                await trio.sleep_forever()
        if not seed % 2:
            assert snapshotter.rootfs is not None
            with suppress(AlreadyExists):
                await snapshotter.prepare("a0", "base")
            assert os.listdir(await snapshotter.mount("a0")) == []
            assert snapshotter.rootfs.count <= 4
            targets = [mount for mount in mount_table() if snapshotter.layers.is_rootfs(mount.target)]
            assert len(targets) == snapshotter.rootfs.count
    assert [mount for mount in mount_table() if mount.target.startswith(f"{root}/rootfs/")] == []
    assert os.listdir(root / "rootfs") == []
    assert not (root / "lost+found").exists()
    assert sorted(own_descriptors()) == before


async def test_who_follows_while_it_is_being_unmounted_waits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is told the path of a mount that stays, not of one that is about to go."""
    begun, go_on, unmount = threading.Event(), threading.Event(), mounting.unmount

    def slowly(target: str, flags: int = 0) -> None:
        begun.set()
        assert go_on.wait(20)
        unmount(target, flags)

    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        (root / "snapshots/1/fs/file").touch()
        async with trio.open_nursery() as nursery:
            where = await snapshotter.mount("a")
            with monkeypatch.context() as patched:
                patched.setattr(mounting, "unmount", slowly)
                nursery.start_soon(snapshotter.commit, "v1", "a")
                await trio.to_thread.run_sync(begun.wait)
                with trio.move_on_after(0.1) as scope:
                    await snapshotter.mount(1)
                go_on.set()
                assert scope.cancelled_caught, "it was told the path"
                assert await snapshotter.mount(1) == where
            assert os.listdir(where) == ["file"]
        assert [info.kind for info in await snapshotter.walk()] == [Kind.COMMITTED]


async def test_who_was_just_told_the_path_gets_there(root: Path) -> None:
    """Neither Commit nor another that needs the place unmounts what was asked for in this very moment."""
    async with open_snapshotter(root, Options(rootfs_max=1)) as snapshotter:
        for name in "abc":
            await snapshotter.prepare(name)
        began = trio.current_time()
        await snapshotter.mount("a")
        await snapshotter.commit("v1", "a")
        assert trio.current_time() - began >= PASSING
        began = trio.current_time()
        await snapshotter.mount("b")
        await snapshotter.mount("c")
        assert trio.current_time() - began >= GRACE


async def test_nobody_waits_for_who_is_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that makes another request, or has ended, is no more on its way: Commit and Remove wait for no time."""
    monkeypatch.setattr(rootfs, "PASSING", 3600.0)
    me, ended = threading.get_native_id(), list[int]()
    thread = threading.Thread(target=lambda: ended.append(threading.get_native_id()))
    thread.start()
    thread.join()
    async with open_snapshotter(root) as snapshotter:
        for name in "abc":
            await snapshotter.prepare(name)
            await snapshotter.mount(name, ended[0])
        await snapshotter.mount("c", me)
        with trio.fail_after(60):
            await snapshotter.remove("a")
            with trio.move_on_after(0.1) as scope:
                await snapshotter.commit("v1", "c")
            assert scope.cancelled_caught, "it is on its way"
            snapshotter.arrived(me)
            await snapshotter.commit("v1", "c")
            await snapshotter.mount("b", me)
            await snapshotter.mount("v1", me)  # it can be on its way to one alone
            await snapshotter.remove("b")


PATIENT = """
import sys
from snapfs.cli import main
from snapfs.services import rootfs
rootfs.PASSING = 3600.0
sys.exit(main())
"""


def test_a_thread_that_removes_what_it_has_followed_waits_for_no_time(make_daemon: Make) -> None:
    daemon = make_daemon()
    daemon.program = ("-c", PATIENT)
    web = daemon.start().mnt / "active/web"
    for _ in range(2):
        os.mkdir(web)
        (web / "rootfs/new").write_text("new")
        os.rmdir(web)
    os.mkdir(web)
    (web / "rootfs/new").write_text("new")
    (web / "checkpoint").write_text("kept\n")
    shell(web, "cat rootfs/new")
    os.rename(web, daemon.mnt / "committed/v1")


async def test_nobody_waits_for_who_waits_for_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Commit holds locks of the kernel that the whole tree needs, and room may take a quarter of a second to come."""
    waiting, go_on = trio.Event(), trio.Event()
    async with open_snapshotter(root, Options(rootfs_max=1)) as snapshotter:
        assert snapshotter.rootfs is not None
        make_room = snapshotter.rootfs._make_room

        async def slowly() -> None:
            waiting.set()
            await go_on.wait()
            await make_room()

        monkeypatch.setattr(snapshotter.rootfs, "_make_room", slowly)
        await snapshotter.prepare("a")
        await snapshotter.prepare("b")
        await snapshotter.mount("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshotter.mount, "b")
            await waiting.wait()
            with trio.fail_after(10):
                await snapshotter.commit("v1", "b")
            go_on.set()
        assert snapshotter.rootfs.holds(2)


def test_the_search_for_who_uses_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with somebody(tmp_path), somebody(tmp_path):
        assert len(list(processes.users(str(tmp_path)))) == 2
        found = processes.users(str(tmp_path))
        next(found)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2 * processes.ENOUGH)
        assert list(found) == []


def test_below_a_shared_mount(make_daemon: Make, tmp_path: Path) -> None:
    """As under systemd, with a service beside it that has a mount namespace of its own, and so a copy of each mount."""
    (shared := tmp_path / "shared").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(shared)], check=True)
    subprocess.run(["mount", "--make-shared", str(shared)], check=True)
    daemon = make_daemon("--rootfs-idle=0.3", root=shared / "root").start()
    service = subprocess.Popen(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", "echo ready; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert service.stdout is not None
        assert service.stdout.readline() == "ready\n"
        base = chain(daemon.mnt, "base")
        for name in ("one", "two", "three"):
            os.mkdir(base / "active" / name)
            (daemon.mnt / "active" / name / "rootfs/new").write_text("new")
        os.rename(daemon.mnt / "active/one", daemon.mnt / "committed/one")
        with somebody(daemon.mnt / "active/two/rootfs"):
            until_held(daemon, [info(daemon.mnt / "active/two")["id"]])
        until_held(daemon, [])
        assert daemon.stop() == 0
        assert daemon.said[1:] == []
    finally:
        service.communicate("\n", timeout=30)
        daemon.cleanup()
        subprocess.run(["umount", "-l", str(shared)], check=True)


@pytest.mark.durable
async def test_what_is_being_flushed_is_not_mounted_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would mount a second overlay on the layer without a word, and not see later that it is there."""
    flushed, run = threading.Event(), Closing.run

    def flush(closing: Closing) -> None:
        assert flushed.wait(20)
        run(closing)

    monkeypatch.setattr(Closing, "run", flush)
    monkeypatch.setattr(Closing, "is_flush", lambda closing: True)
    monkeypatch.setattr("snapfs.root.merged.FLUSHING", 0.05)
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("b")
        await snapshotter.commit("base", "b")
        await snapshotter.prepare("web", "base")
        assert os.listdir(await snapshotter.mount("web")) == []
        await snapshotter.hand_over("web")
        with pytest.raises(Busy, match="still being written to the disk"):
            await snapshotter.mount("web")
        flushed.set()
        monkeypatch.setattr("snapfs.root.merged.FLUSHING", 20)
        assert os.listdir(await snapshotter.mount("web")) == []


async def test_a_commit_that_is_cancelled_while_it_looks_for_users_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching, go_on = trio.Event(), threading.Event()

    def search(devices: set[str], *, longest: float) -> set[str]:
        trio.from_thread.run_sync(searching.set)
        assert go_on.wait(20)
        return set()

    async with open_snapshotter(root) as snapshotter, trio.open_nursery() as nursery:
        await snapshotter.prepare("web")
        await snapshotter.mount("web")
        monkeypatch.setattr("snapfs.services.rootfs.MUCH", 0)
        monkeypatch.setattr("snapfs.services.naming.used_devices", search)
        with trio.CancelScope() as scope:
            nursery.start_soon(_when, searching, scope.cancel)
            await snapshotter.commit("v1", "web")
        assert scope.cancelled_caught
        go_on.set()
        monkeypatch.setattr("snapfs.services.rootfs.MUCH", 1 << 40)
        assert os.listdir(await snapshotter.mount("web")) == []
        await snapshotter.commit("v1", "web")


async def test_one_search_for_all_who_ask_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty commits while much waits for the disk: who comes while all processes are looked at waits for the next time."""
    searched, go_on = list[set[str]](), threading.Event()

    def search(devices: set[str], *, longest: float) -> set[str] | None:
        searched.append(set(devices))
        assert go_on.wait(20)
        return used_devices(devices, longest=20)

    monkeypatch.setattr("snapfs.services.rootfs.MUCH", 0)
    monkeypatch.setattr("snapfs.services.rootfs.SEARCH", 20)
    monkeypatch.setattr("snapfs.services.naming.used_devices", search)
    async with open_snapshotter(root) as snapshotter:
        for n in range(20):
            await snapshotter.prepare(f"k{n}")
            await snapshotter.mount(f"k{n}")
        busy = os.open(f"{await snapshotter.mount('k7')}/file", os.O_CREAT | os.O_WRONLY)
        assert snapshotter.rootfs is not None
        using, refused = snapshotter.rootfs._using, list[str]()

        async def commit(key: str) -> None:
            try:
                await snapshotter.commit(f"c{key}", key, wait=False)
            except Busy:
                refused.append(key)

        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(commit, f"k{n}")
            while not searched or len(using._next.devices) + len(searched[0]) < 19:
                await trio.sleep(0.001)
            go_on.set()
        os.close(busy)
    assert refused == ["k7"], "which could not even be unmounted"
    assert [len(devices) for devices in searched] == [len(searched[0]), 19 - len(searched[0])]


async def _when(event: trio.Event, call: Callable[[], None]) -> None:
    await event.wait()
    call()
