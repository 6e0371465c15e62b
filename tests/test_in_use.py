"""What is in use is neither mounted twice nor committed nor removed: whoever has it, in whatever mount namespace, by whatever
path, attached, detached or merely open."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

import snapfs.services.rootfs
from snapfs import Change, Kind, Options, open_snapshotter
from snapfs.errors import Damaged
from snapfs.kernel import libc, mountapi, mounting
from snapfs.kernel.inuse import UpperLayers
from snapfs.kernel.mounttable import MountPoint, mount_table
from snapfs.kernel.namespaces import Namespaces
from snapfs.kernel.processes import used_devices, users_of_device
from tests.daemon import Daemon
from tests.processes import die_with_parent, until
from tests.refusals import failing
from tests.rootfs import somebody
from tests.tree import info
from tests.users import alice

Make = Callable[..., Daemon]
Hold = Callable[[Daemon, Path], AbstractContextManager[str]]

IDLE = 0.4  # seconds after which what nobody uses here is unmounted

COPY = """
import os, sys
from snapfs.kernel import mountapi
copy = mountapi.open_tree(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""


@contextmanager
def process(*command: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """One that says "ready" once it has what it wants, and ends when it is told to."""
    started = subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    )
    with started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


READY = "echo ready; read line"


@contextmanager
def in_a_namespace(*flags: str, script: str = READY) -> Iterator[str]:
    with process("unshare", *flags, "sh", "-c", script) as started:
        yield rf"in another mount namespace, that of process {started.pid} \((?:sh|unshare)\)"


@contextmanager
def sandbox(daemon: Daemon, workspace: Path) -> Iterator[str]:
    """bubblewrap, with the workspace as its root."""
    os.listdir(workspace / "rootfs/")  # bwrap follows it from within a namespace of its own
    script = "echo x > /before; echo ready; read line"
    with process("bwrap", "--bind", f"{workspace}/rootfs", "/", "--dev", "/dev", "/bin/sh", "-c", script):
        yield r"in another mount namespace, that of process \d+ \((?:sh|busybox|bwrap)\)"


@contextmanager
def private_namespace(daemon: Daemon, workspace: Path) -> Iterator[str]:
    os.listdir(workspace / "rootfs/")
    with in_a_namespace("-m") as words:
        yield words


@contextmanager
def user_namespace(daemon: Daemon, workspace: Path) -> Iterator[str]:
    os.listdir(workspace / "rootfs/")
    with in_a_namespace("-Urm") as words:
        yield words


@contextmanager
def part_in_a_namespace(daemon: Daemon, workspace: Path) -> Iterator[str]:
    """A directory of it, bound elsewhere, and nothing else."""
    where = os.path.realpath(workspace / "rootfs")
    script = f"mount --bind {where}/dev /mnt && umount {where} && {READY}"
    with in_a_namespace("-m", script=script) as words:
        yield words


@contextmanager
def chrooted(daemon: Daemon, workspace: Path) -> Iterator[str]:
    where = os.path.realpath(workspace / "rootfs")
    with process("unshare", "-m", "chroot", where, "/bin/sh", "-c", READY):
        yield r"in another mount namespace, that of process \d+ \((?:sh|busybox|chroot)\)"


@contextmanager
def detached_copy(daemon: Daemon, workspace: Path) -> Iterator[str]:
    """A mount that is attached nowhere, as a descriptor."""
    where = os.path.realpath(workspace / "rootfs")
    with process(sys.executable, "-c", COPY, where):
        yield r"in use by process \d+ \(python\S*\)|in use elsewhere"


@contextmanager
def open_in_what_was_detached(daemon: Daemon, workspace: Path) -> Iterator[str]:
    """A file in a bind mount of it that is gone from the mount table."""
    where = os.path.realpath(workspace / "rootfs")
    script = f"mount --bind {where} /mnt && exec 3>/mnt/held && umount -l /mnt && {READY}"
    with process("sh", "-c", script):
        yield r"in use by process \d+ \(sh\)|in use elsewhere"


HELD: list[Hold] = [
    sandbox,
    private_namespace,
    user_namespace,
    part_in_a_namespace,
    chrooted,
    detached_copy,
    open_in_what_was_detached,
]


def overlay_devices(layer: str) -> set[str]:
    """The devices of the overlays that have ``layer`` as upper layer, in all mount namespaces."""

    def classify(mount: MountPoint) -> str | None:
        upper = [option for option in mount.super_options if option.startswith("upperdir=")]
        return mount.device if mount.type == "overlay" and upper and upper[0].endswith(layer) else None

    return set(Namespaces(classify).find(lambda device: True))


def layer_of(daemon: Daemon, workspace: Path) -> str:
    return f"{daemon.root}/snapshots/{info(workspace)['id']}/fs"


@pytest.fixture
def served(make_daemon: Make) -> Daemon:
    """A daemon with the committed snapshot "b", in which /bin/sh can be run, and the workspace "w" on it."""
    daemon = make_daemon(f"--rootfs-idle={IDLE}").start()
    os.mkdir(daemon.mnt / "active/draft")
    layer = daemon.mnt / "active/draft/diff"
    for name in ("bin", "dev"):
        (layer / name).mkdir()
    shutil.copy2("/bin/busybox", layer / "bin/sh")
    (layer / "file").write_text("base")
    os.rename(daemon.mnt / "active/draft", daemon.mnt / "committed/b")
    os.mkdir(daemon.mnt / "committed/b/active/w")
    return daemon


def assert_untouchable(daemon: Daemon, workspace: Path, words: str) -> None:
    """Commit, checkpoint, rollback and Remove are refused, and say who has it."""
    mnt, key = daemon.mnt, workspace.name
    with failing(errno.EBUSY):
        os.rename(workspace, mnt / "committed/v1")
    assert re.search(words, line := daemon.error_log()[-1]), line
    with failing(errno.EBUSY):
        os.rmdir(workspace)
    assert re.search(words, line := daemon.error_log()[-1]), line
    for verb in ("checkpoint", "rollback"):
        command = [sys.executable, "-m", "snapfs.cli", verb, "--at", str(mnt), key]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert re.search(words, done.stderr), done.stderr
    assert sorted(os.listdir(mnt / "committed")) == ["b"]
    assert os.listdir(mnt / "active") == [key]


@pytest.mark.parametrize("hold", HELD)
def test_nothing_is_lost_of_what_somebody_has(served: Daemon, hold: Hold) -> None:
    workspace = served.mnt / "active/w"
    layer = layer_of(served, workspace)
    with hold(served, workspace) as words:
        held_devices = overlay_devices(layer)
        assert_untouchable(served, workspace, words)
        with until_idle(served):
            pass
        with failing_or_same(workspace, held_devices):
            os.listdir(workspace / "rootfs/")
        assert len(overlay_devices(layer)) <= 1, "a second overlay on the same layer"
        assert_untouchable(served, workspace, words)
    (workspace / "rootfs/after").write_text("after")
    os.rename(workspace, served.mnt / "committed/v1")
    assert (served.mnt / "committed/v1/rootfs/after").read_text() == "after"


@contextmanager
def until_idle(daemon: Daemon) -> Iterator[None]:
    """Wait until the daemon has looked at what is not used, and has unmounted it or left it."""
    other = daemon.mnt / "view/idle"
    os.mkdir(daemon.mnt / "committed/b/view/idle")
    where = os.path.realpath(other / "rootfs")
    until(lambda: not any(mount.target == where for mount in mount_table()), "an unused one is unmounted")
    os.rmdir(other)
    yield


@contextmanager
def failing_or_same(workspace: Path, devices: set[str]) -> Iterator[None]:
    """Following rootfs shows the overlay that is there already, or is refused."""
    try:
        yield
    except OSError as error:
        assert error.errno == errno.EBUSY
        return
    device = os.stat(workspace / "rootfs").st_dev
    assert not devices or f"{os.major(device)}:{os.minor(device)}" in devices


@pytest.mark.durable
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("hold", HELD)
def test_the_next_daemon_does_not_mount_it_twice(served: Daemon, hold: Hold, how: signal.Signals) -> None:
    workspace = served.mnt / "active/w"
    layer = layer_of(served, workspace)
    with hold(served, workspace):
        devices = overlay_devices(layer)
        served.stop(how)
        served.start()
        with failing_or_same(workspace, devices):
            (workspace / "rootfs/more").write_text("more")
        assert len(overlay_devices(layer)) <= 1, "a second overlay on the same layer"
        with failing(errno.EBUSY):
            os.rename(workspace, served.mnt / "committed/v1")
        with failing(errno.EBUSY):
            os.rmdir(workspace)
    (workspace / "rootfs/after").write_text("after")
    os.rename(workspace, served.mnt / "committed/v1")
    assert (served.mnt / "committed/v1/rootfs/after").read_text() == "after"


def test_a_sandbox_goes_on_after_the_idle_time(served: Daemon) -> None:
    """It deletes and makes files in the work directory that a second overlay would have emptied."""
    workspace = served.mnt / "active/w"
    os.listdir(workspace / "rootfs/")
    script = "echo ready; read line; rm /file && echo new >/new && echo done"
    with process("bwrap", "--bind", f"{workspace}/rootfs", "/", "--dev", "/dev", "/bin/sh", "-c", script) as box:
        with until_idle(served):
            pass
        assert sorted(os.listdir(workspace / "rootfs/")) == ["bin", "dev", "file"], "what the sandbox sees is seen here too"
        out, _ = box.communicate("\n", timeout=30)
        assert out == "done\n"
        assert (workspace / "rootfs/new").read_text() == "new\n"
        assert not (workspace / "rootfs/file").exists()


# -- copies that another user's sandbox has inherited


@contextmanager
def another_users(script: str = READY, cwd: Path | None = None, *before: str) -> Iterator[int]:
    """Alice's namespaces, in which she has a copy of each mount of this moment, and can't get to that of rootfs; the pid."""
    with process(*before, *alice, "unshare", "-Urm", "--propagation", "private", "sh", "-c", script, cwd=cwd) as started:
        yield started.pid


def commit(daemon: Daemon, workspace: Path) -> None:
    os.rename(workspace, daemon.mnt / "committed/v1")
    assert (daemon.mnt / "committed/v1/rootfs/new").read_text() == "new"


def remove(daemon: Daemon, workspace: Path) -> None:
    os.rmdir(workspace)
    assert os.listdir(daemon.mnt / "active") == []


@pytest.mark.parametrize("end", [commit, remove])
@pytest.mark.parametrize("script", [READY, f"mount --rbind / /mnt && {{ {READY}; }}", f"unshare -Urm sh -c '{READY}'"])
def test_copies_that_nobody_uses_are_no_hindrance(served: Daemon, end: Callable[[Daemon, Path], None], script: str) -> None:
    workspace = served.mnt / "active/w"
    (workspace / "rootfs/new").write_text("new")
    layer = layer_of(served, workspace)
    with another_users(script) as pid:
        assert len(overlay_devices(layer)) == 1
        assert f"{os.path.realpath(workspace / 'rootfs')} " in Path(f"/proc/{pid}/mountinfo").read_text()
        end(served, workspace)
        assert overlay_devices(layer) == set(), "it is gone in all namespaces"


def test_copies_that_nobody_uses_do_not_keep_it_mounted(served: Daemon) -> None:
    workspace = served.mnt / "active/w"
    (workspace / "rootfs/new").write_text("new")
    layer = layer_of(served, workspace)
    where = Path(os.path.realpath(workspace / "rootfs"))
    with another_users():
        until(lambda: not where.parent.exists(), "it is unmounted, and its directory removed")
        assert overlay_devices(layer) == set()
        (workspace / "rootfs/more").write_text("more")
        assert len(overlay_devices(layer)) == 1
        commit(served, workspace)


def test_copies_of_what_is_committed(served: Daemon) -> None:
    """A committed snapshot without a parent is a bind, which the kernel can't be asked for."""
    os.rmdir(served.mnt / "active/w")
    os.listdir(served.mnt / "committed/b/rootfs/")
    with another_users():
        os.rmdir(served.mnt / "committed/b")
    assert os.listdir(served.mnt / "committed") == []


@pytest.mark.durable
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_copies_of_what_an_earlier_daemon_had_mounted(served: Daemon, how: signal.Signals) -> None:
    workspace = served.mnt / "active/w"
    (workspace / "rootfs/new").write_text("new")
    with another_users():
        served.stop(how)
        served.start()
        commit(served, workspace)


def test_another_user_who_is_really_in_there(served: Daemon) -> None:
    """By a working directory that a process with more rights has left to her."""
    workspace = served.mnt / "active/w"
    os.chmod(workspace / "rootfs/", 0o777)
    where = Path(os.path.realpath(workspace / "rootfs"))
    layer = layer_of(served, workspace)
    with another_users(f"echo x > hers && {READY}", where) as pid:
        assert_untouchable(served, workspace, rf"in use by process {pid} \(\w+\)")
        with until_idle(served):
            pass
        assert (workspace / "rootfs/hers").read_text() == "x\n"
        assert len(overlay_devices(layer)) == 1, "the same overlay, and no second one"
        assert_untouchable(served, workspace, rf"in use by process {pid} \(\w+\)")
    os.rename(workspace, served.mnt / "committed/v1")


def test_another_user_who_has_bound_it_elsewhere(served: Daemon) -> None:
    workspace = served.mnt / "active/w"
    where = Path(os.path.realpath(workspace / "rootfs"))
    with another_users(f"mount -c --bind . /mnt && cd / && {{ {READY}; }}", where) as pid:
        assert_untouchable(served, workspace, rf"that of process {pid} \(\w+\)")
        with until_idle(served):
            pass
        assert_untouchable(served, workspace, rf"that of process {pid} \(\w+\)")
    os.rename(workspace, served.mnt / "committed/v1")


def test_another_users_copies_beside_those_of_root(served: Daemon) -> None:
    workspace = served.mnt / "active/w"
    os.listdir(workspace / "rootfs/")
    with another_users():
        with in_a_namespace("-m") as words:
            assert_untouchable(served, workspace, words)
        os.rename(workspace, served.mnt / "committed/v1")


MANY = """
import ctypes, os, sys
mount = ctypes.CDLL(None).mount
assert mount(b"x", b"/mnt", b"tmpfs", 0, None) == 0
os.chdir("/mnt")
for _ in range(12):
    os.mkdir("x" * 250)
    os.chdir("x" * 250)
for _ in range(int(sys.argv[1])):
    assert mount(b".", b".", None, 4096, None) == 0
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.alone
def test_many_mounts_of_another_user_take_nobodys_time(served: Daemon) -> None:
    """Each on the one before, at a long path: the kernel needs the longer for each, the more there are."""
    workspace = served.mnt / "active/w"
    os.mkdir(served.mnt / "committed/b/active/x")
    (workspace / "rootfs/new").write_text("new")
    os.listdir(served.mnt / "active/x/rootfs/")
    command = (*alice, "unshare", "-Urm", "--propagation", "private", "/usr/bin/python3", "-c", MANY, "12000")
    where = os.path.realpath(workspace / "rootfs")
    with process(*command, cwd=Path("/")) as flood:
        began = time.monotonic()
        commit(served, workspace)
        os.rmdir(served.mnt / "active/x")
        with somebody(served.mnt / "committed/v1/rootfs"), failing(errno.EBUSY):
            os.rmdir(served.mnt / "committed/v1")
        assert time.monotonic() - began < 2
        assert f" {where} " not in Path(f"/proc/{flood.pid}/mountinfo").read_text(), "the copy in there is gone, too"


# -- mounted by hand


@contextmanager
def by_hand(daemon: Daemon, workspace: Path, target: Path, base: str, *, cwd: str = "/", upper: str = "") -> Iterator[None]:
    """An overlay on the layers of ``workspace``, whose root is written ``base``."""
    number = info(workspace)["id"]
    target.mkdir(exist_ok=True)
    options = (
        f"index=off,lowerdir={base}/snapshots/1/fs,upperdir={base}/snapshots/{number}/fs,workdir={base}/snapshots/{number}/work"
    )
    subprocess.run(["mount", "-i", "-t", "overlay", "-o", options, "o", str(target)], cwd=cwd, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("spelling", ["link", "bind", "//", "relative"])
def test_an_overlay_by_another_spelling(served: Daemon, tmp_path: Path, spelling: str) -> None:
    workspace, root = served.mnt / "active/w", served.root
    target, cwd, base = tmp_path / "t", "/", str(root)
    bound = tmp_path / "bound"
    bound.mkdir()
    if spelling == "link":
        base = str(tmp_path / "link")
        os.symlink(root, base)
    elif spelling == "bind":
        base = str(bound)
        mounting.mount_bind(str(root), base, read_only=False)
    elif spelling == "//":
        base = str(root).replace("/root", "//root")
    else:
        cwd, base = str(root.parent), "root"
    try:
        with by_hand(served, workspace, target, base, cwd=cwd):
            words = f"mounted at {target}" if spelling != "relative" else f"mounted at {target}|in use elsewhere"
            assert_untouchable(served, workspace, words)
            assert os.stat(workspace / "rootfs/").st_dev == target.stat().st_dev, "the same mount, and not a second one"
            assert_untouchable(served, workspace, words)
            (target / "late").write_text("late")
        os.rename(workspace, served.mnt / "committed/v1")
    finally:
        subprocess.run(["umount", "-q", str(bound)], check=False)
    assert (served.mnt / "committed/v1/rootfs/late").read_text() == "late"


def test_an_overlay_from_before_root_was_moved(make_daemon: Make, served: Daemon, tmp_path: Path) -> None:
    workspace = served.mnt / "active/w"
    with by_hand(served, workspace, tmp_path / "t", str(served.root)):
        assert served.stop() == 0
        os.rename(served.root, tmp_path / "moved")
        daemon = make_daemon(root=tmp_path / "moved").start()
        assert_untouchable(daemon, workspace, f"mounted at {tmp_path / 't'}")
    os.rename(workspace, daemon.mnt / "committed/v1")


def test_a_bind_to_be_written_in_another_namespace(served: Daemon) -> None:
    """mounts.json of a snapshot without a parent is a bind, which the kernel does not count as use of an overlay."""
    mnt = served.mnt
    os.mkdir(mnt / "active/lone")
    os.rmdir(mnt / "active/w")
    layer = layer_of(served, mnt / "active/lone")
    with in_a_namespace("-m", script=f"mount --bind {layer} /mnt && echo x > /mnt/by-hand && {READY}") as words:
        assert_untouchable(served, mnt / "active/lone", words)
        assert (mnt / "active/lone/rootfs/by-hand").read_text() == "x\n", "the same mount, and no overlay above it"
        assert overlay_devices(layer) == set()
    os.rename(mnt / "active/lone", mnt / "committed/lone")


@pytest.mark.parametrize("how", ["bind", "bind in another namespace", "overlay"])
def test_what_else_shows_the_layer_of_a_mounted_snapshot(served: Daemon, tmp_path: Path, how: str) -> None:
    """Its own overlay is no longer in use then, so that the kernel, which is asked for that, has nothing to say against it."""
    workspace, layer, target = served.mnt / "active/w", layer_of(served, served.mnt / "active/w"), tmp_path / "t"
    target.mkdir()
    os.listdir(workspace / "rootfs/")  # before the other: what is mounted is not mounted again
    below = f"{served.root}/snapshots/1/fs"
    command = f"mount --bind {layer} {target}"
    if how == "overlay":
        options = f"index=off,lowerdir={below},upperdir={layer},workdir={layer.removesuffix('fs')}work"
        command = f"mount -i -t overlay -o {options} o {target}"
    flags = ["--fork"]
    if how == "bind in another namespace":
        flags, command = ["-m"], f"{command} && umount {os.path.realpath(workspace / 'rootfs')}"
    acts: list[Callable[[], object]] = [
        lambda: os.rename(workspace, served.mnt / "committed/v1"),
        lambda: os.rmdir(workspace),
        lambda: (workspace / "checkpoint").write_text("it\n"),
        lambda: (workspace / "rollback").write_text("\n"),
    ]
    with in_a_namespace(*flags, script=f"{command} && {READY}"):
        for act in acts:
            os.listdir(workspace / "rootfs/")
            with failing(errno.EBUSY):
                act()
    subprocess.run(["umount", "-q", str(target)], check=False)
    for act in acts[2:]:
        os.listdir(workspace / "rootfs/")
        act()


def test_what_is_committed_is_not_removed_under_a_mount(served: Daemon) -> None:
    mnt = served.mnt
    os.rmdir(mnt / "active/w")
    where = os.path.realpath(mnt / "committed/b/rootfs")
    with in_a_namespace("-m", script=f"mount --bind {where} /mnt && {READY}") as words:
        with failing(errno.EBUSY):
            os.rmdir(mnt / "committed/b")
        assert re.search(words, served.error_log()[-1])
    os.rmdir(mnt / "committed/b")


# -- who can't see the mount


STRAYS = [
    "echo x > {0}/f",
    "echo x > {0}",
    "cp /etc/hostname {0}",
    "dd if=/etc/hostname of={0}",
    "mkdir -p {0}/a/b",
    "mkdir -p $(readlink {0})/a",
    'python3 -c \'import os; os.makedirs(os.readlink("{0}") + "/a", exist_ok=True)\'',
    "cp -a {0}/. out/",
    "ls {0}/",
    "cd {0}",
    "touch {0}/f",
]


@pytest.mark.parametrize("command", STRAYS)
def test_a_stray_meets_an_error(served: Daemon, tmp_path: Path, command: str) -> None:
    """The first to follow rootfs is in a mount namespace of its own, where what the daemon mounts is not seen."""
    script = command.format("active/w/rootfs")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script.replace("out/", str(tmp_path / "out/"))], cwd=served.mnt, check=False
    )
    assert done.returncode != 0
    line = next(line for line in served.error_log() if " readlink " in line)
    assert re.search(r"ENOENT readlink active/w/rootfs: process \d+ \(\w+\) is in another mount namespace", line), line
    assert f"nsenter --mount --target {served.pid}" in line
    assert sorted(os.listdir(served.mnt / "active/w/rootfs/")) == ["bin", "dev", "file"]
    assert not (served.root / "lost+found").exists()


def test_a_place_by_hand_is_told_to_those_alone_who_see_it(served: Daemon, tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    with by_hand(served, served.mnt / "active/w", target, str(served.root)):
        assert os.readlink(served.mnt / "active/w/rootfs") == str(target)
        with in_a_namespace("-m", script=f"umount {target}; cd {served.mnt}/active/w/rootfs || {READY}"):
            pass
        assert (served.mnt / "active/w/rootfs/file").read_text() == "base"


# -- what others say, and how it is said


def test_words_of_a_stranger_are_not_believed(served: Daemon) -> None:
    """In a namespace of their own anybody can mount an overlay whose options name root's layers."""
    workspace = served.mnt / "active/w"
    root = served.root / "snapshots/2"
    here = served.root.parent  # another one, in memory, with directories of the same names
    script = (
        f"mount -t tmpfs x {here}; mkdir -p {root}/fs {root}/work {here}/l {here}/o; echo evil > {root}/fs/evil; "
        f"mount -t overlay o -o userxattr,lowerdir={here}/l,upperdir={root}/fs,workdir={root}/work {here}/o; "
        f"test -e {here}/o/evil && {READY}"
    )
    assert info(workspace)["id"] == 2
    with in_a_namespace("-Urm", script=script):
        assert sorted(os.listdir(workspace / "rootfs/")) == ["bin", "dev", "file"]
        os.rename(workspace, served.mnt / "committed/v1")


def test_lower_layers_that_a_stranger_names_are_not_believed(served: Daemon) -> None:
    """So they keep nothing from being removed or dissolved; an upper one that is in use is no lie."""
    os.rename(served.mnt / "active/w", served.mnt / "committed/v1")
    root, top = served.root / "snapshots", Path("/", served.root.parts[1])
    script = (
        f"mount -t tmpfs x {top}; mkdir -p {root}/1/fs {root}/2/fs {top}/u {top}/w {top}/o; "
        f"mount -t overlay o -o userxattr,lowerdir={root}/2/fs:{root}/1/fs {top}/o && {READY}"
    )
    assert info(served.mnt / "committed/v1")["id"] == 2
    with process(*alice, "unshare", "-Urm", "--propagation", "private", "sh", "-c", script, cwd=Path("/")):
        (served.mnt / "committed/b/dissolve").write_text("yes\n")
        assert (served.mnt / "committed/v1/rootfs/file").read_text() == "base"
        os.rmdir(served.mnt / "committed/v1")


@pytest.mark.durable
def test_what_another_root_of_the_same_path_had_mounted(make_daemon: Make, served: Daemon, tmp_path: Path) -> None:
    """What the mount table says of it is true of the root that was moved away."""
    (served.mnt / "active/w/rootfs/old").write_text("old")
    assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    os.rename(served.root, tmp_path / "moved")
    try:
        served.start()
        for name in ("draft", "w"):
            os.mkdir(served.mnt / "active" / name)
        (served.mnt / "active/w/rootfs/new").write_text("new")
        assert os.listdir(served.mnt / "active/w/diff") == os.listdir(served.mnt / "active/w/rootfs/") == ["new"]
        os.rename(served.mnt / "active/w", served.mnt / "committed/v1")
        assert (tmp_path / "moved/snapshots/2/fs/old").read_text() == "old"
        assert served.stop() == 0
    finally:
        for part in ("2/fs", "2"):
            subprocess.run(["umount", "-q", "-l", str(tmp_path / "moved/rootfs" / part)], check=False)


def test_a_mount_by_way_of_the_tree_itself_is_not_asked(served: Daemon, tmp_path: Path) -> None:
    """The daemon would wait for itself, with the kernel's locks held by a client that waits for the daemon."""
    mnt, root = served.mnt, served.root
    workspace, target = mnt / "active/w", tmp_path / "t"
    target.mkdir()
    os.mkdir(mnt / "active/zz")
    upper = f"{mnt}/active/zz/../w/diff/../../2/fs"
    options = f"index=off,lowerdir={root}/snapshots/1/fs,upperdir={upper},workdir={root}/snapshots/2/work"
    subprocess.run(["mount", "-i", "-t", "overlay", "-o", options, "o", str(target)], check=True)
    try:
        os.rmdir(mnt / "active/zz")
        done = subprocess.run(["mv", workspace, mnt / "committed/w1"], timeout=30, check=False)
        assert done.returncode == 1
        assert "EBUSY rename active/w committed/w1" in served.error_log()[-1]
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_an_overlay_with_another_work_directory(served: Daemon, tmp_path: Path) -> None:
    """It leaves no trace on the layer, nor in the work directory of the snapshot."""
    link, target, work = tmp_path / "link", tmp_path / "t", tmp_path / "work"
    os.symlink(served.root, link)
    for directory in (target, work):
        directory.mkdir()
    options = f"index=off,uuid=off,lowerdir={link}/snapshots/1/fs,upperdir={link}/snapshots/2/fs,workdir={work}"
    subprocess.run(["mount", "-i", "-t", "overlay", "-o", options, "o", str(target)], check=True)
    try:
        assert_untouchable(served, served.mnt / "active/w", f"mounted at {target}")
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_a_mountpoint_with_a_carriage_return(served: Daemon) -> None:
    with in_a_namespace(
        "-Urm", script=f'd=$(printf "/mnt/a\\rb"); mount -t tmpfs x /mnt; mkdir "$d"; mount -t tmpfs y "$d"; {READY}'
    ):
        os.listdir(served.mnt / "active/w/rootfs/")
        with private_namespace(served, served.mnt / "active/w") as words:
            assert_untouchable(served, served.mnt / "active/w", words)


def test_what_is_mounted_over_rootfs_stays(served: Daemon) -> None:
    """As it is prepared for a chroot."""
    where = os.path.realpath(served.mnt / "active/w/rootfs")
    script = f"mount --bind {where} {where} && mount -t tmpfs z {where}/dev"
    subprocess.run(["sh", "-c", script], check=True)
    try:
        before = [mount.id for mount in mount_table() if mount.target.startswith(where)]
        assert (served.mnt / "active/w/rootfs/file").read_text() == "base"
        assert [mount.id for mount in mount_table() if mount.target.startswith(where)] == before
        with failing(errno.EBUSY):
            os.rename(served.mnt / "active/w", served.mnt / "committed/v1")
    finally:
        subprocess.run(["umount", f"{where}/dev", where], check=True)


# -- the end


@pytest.mark.parametrize("limit", [26, 28, 30, 32, 40])
def test_few_descriptors_leave_no_mount(make_daemon: Make, limit: int) -> None:
    daemon = make_daemon()
    daemon.prefix = ("prlimit", f"--nofile={limit}:{limit}")
    daemon.start()
    for serial in range(12):
        os.mkdir(daemon.mnt / f"active/a{serial}")
        try:
            os.listdir(daemon.mnt / f"active/a{serial}/rootfs/")
        except OSError as error:
            assert error.errno in (errno.EMFILE, errno.EBUSY), error
    assert daemon.stop() == 0
    assert [mount.target for mount in mount_table() if mount.target.startswith(f"{daemon.root}/")] == []


FILLED = """
import os, resource, sys
import pyfuse3
from snapfs.cli import main

terminate = pyfuse3.terminate

def fill():
    most = max(map(int, os.listdir("/proc/self/fd"))) + 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        while True:
            os.open("/dev/null", os.O_RDONLY)
    except OSError:
        terminate()

pyfuse3.terminate = fill
sys.exit(main())
"""


def test_no_descriptor_at_the_end(make_daemon: Make) -> None:
    """All are taken when the signal comes: nothing is left mounted, neither the tree nor what it has mounted."""
    daemon = make_daemon()
    daemon.program = ("-c", FILLED)
    daemon.start()
    os.mkdir(daemon.mnt / "active/a")
    os.listdir(daemon.mnt / "active/a/rootfs/")
    assert daemon.stop() == 0
    assert [mount.target for mount in mount_table() if mount.target.startswith(f"{daemon.root.parent}/")] == []


# -- asking the kernel


def test_asking_changes_nothing(served: Daemon) -> None:
    """Neither in the layer, nor in its work directory, whether it is in use or not."""
    workspace = served.mnt / "active/w"
    layer = Path(layer_of(served, workspace))

    def seen() -> list[object]:
        return [(p, os.listxattr(p), p.stat().st_mtime_ns, sorted(os.listdir(p))) for p in (layer, layer.parent / "work")]

    before = seen()
    for _ in range(3):
        with failing(errno.EEXIST):
            os.rename(workspace, served.mnt / "committed/b")
    os.mkdir(served.mnt / "active/other")
    os.rename(served.mnt / "active/other", served.mnt / "committed/other")
    assert seen() == before


@contextmanager
def in_flight(where: str, name: str, flags: int) -> Iterator[socket.socket]:
    """A descriptor of ``name`` below ``where``, opened through a mount that is gone, sent and not received."""
    sender, receiver = socket.socketpair()
    with sender, receiver:
        tree = mountapi.open_tree(where)
        descriptor = os.open(name, flags, dir_fd=tree)
        socket.send_fds(sender, [b"x"], [descriptor])
        os.close(descriptor)
        os.close(tree)
        yield receiver


@pytest.mark.durable
@pytest.mark.mounts
async def test_who_was_not_found_can_write_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapfs.services.rootfs, "MUCH", 0)  # as if that much waited for the disk
    async with open_snapshotter(tmp_path / "root", Options()) as snapshotter:
        await snapshotter.prepare("w")
        with in_flight(await snapshotter.mount("w"), ".", os.O_RDONLY | os.O_DIRECTORY) as receiver:
            await snapshotter.commit("v1", "w", refuse_mounted=True)
            with trio.fail_after(20):
                while snapshotter._root.in_use.closings:
                    await trio.sleep(0.001)
            directory = socket.recv_fds(receiver, 1, 1)[1][0]
            with failing(errno.EROFS):
                os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
            os.close(directory)
        await snapshotter.prepare("on it", "v1")
        assert os.listdir(await snapshotter.mount("on it")) == []


@pytest.mark.durable
@pytest.mark.mounts
async def test_what_is_still_written_by_somebody_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapfs.services.rootfs, "MUCH", 0)
    root = tmp_path / "root"
    async with open_snapshotter(root, Options()) as snapshotter:
        doubted = trio.Event()

        def listen(change: Change) -> None:
            if snapshotter.unflushed.lost:
                doubted.set()

        snapshotter.subscribe(listen)
        await snapshotter.prepare("w")
        with in_flight(await snapshotter.mount("w"), "file", os.O_CREAT | os.O_WRONLY):
            await snapshotter.commit("v1", "w", refuse_mounted=True, wait=False)
            with trio.fail_after(20):
                await doubted.wait()
            assert 'file of snapshot "v1" open for writing' in caplog.text
            with pytest.raises(Damaged, match="somebody was still writing"):
                await snapshotter.prepare("on it", "v1")
    async with open_snapshotter(root) as snapshotter:
        with pytest.raises(Damaged, match="somebody was still writing"):
            await snapshotter.prepare("on it", "v1")
        await snapshotter.accept("v1")
        await snapshotter.prepare("on it", "v1")


def test_where_the_kernel_can_not_be_asked_nothing_is_in_use(tmp_path: Path) -> None:
    def mounted() -> int:
        raise OSError(errno.EPERM, "no")

    uppers = UpperLayers.choose(str(tmp_path), mounted)
    assert not uppers.works
    assert not uppers.in_use(str(tmp_path))
    uppers.close()


SILENT = """
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, kind, options):
    if libc.mount(source, target.encode(), kind, 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)

mount(b"none", "/mnt", b"tmpfs", "")
for name in ("served", "empty", "merged"):
    os.mkdir(f"/mnt/{name}")
device = os.open("/dev/fuse", os.O_RDWR)
mount(b"x", "/mnt/served", b"fuse", f"fd={device},rootmode=40755,user_id=0,group_id=0")
ends, begins = os.pipe()
if os.fork() == 0:
    libc.prctl(1, 9)  # it dies with its parent
    silent = False
    while True:
        request = os.read(device, 1 << 20)
        _, operation, unique, *_ = struct.unpack_from("<IIQQIIII", request)
        body, error = b"", 0
        if operation == 26:  # INIT
            body = struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0) + bytes(24)
        elif operation == 3:  # GETATTR
            os.set_blocking(ends, False)
            try:
                silent = silent or bool(os.read(ends, 1))
            except BlockingIOError:
                pass
            if silent:
                continue
            body = struct.pack("<QII", 0, 0, 0) + struct.pack("<6Q10I", 1, *[0] * 8, 0o40755, 2, 0, 0, 0, 4096, 0)
        elif operation == 27:  # OPENDIR
            body = struct.pack("<QII", 1, 0, 0)
        elif operation == 17:  # STATFS
            body = struct.pack("<5Q4I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0) + bytes(24)
        elif operation in (2, 42):  # FORGET
            continue
        else:
            error = -38 if operation != 1 else -2
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
mount(b"o", "/mnt/merged", b"overlay", "lowerdir=/mnt/served:/mnt/empty")
held = os.open("/mnt/merged", os.O_RDONLY | os.O_DIRECTORY)
os.fstat(held)
os.write(begins, b"x")
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.usefixtures("everybodys_fuse")
def test_a_server_of_another_users_is_not_asked(served: Daemon) -> None:
    """A process of alice's has a file on an overlay of hers over a server of hers, which doesn't answer any more: whoever asks
    for that file's attributes waits, root too."""
    workspace = served.mnt / "active/w"
    os.listdir(workspace / "rootfs/")
    look = "from snapfs.kernel.processes import users_of_device; print(list(users_of_device('99:99', longest=10)))"
    with process(*alice, "unshare", "-Urm", "/usr/bin/python3", "-c", SILENT, cwd=Path("/")):
        looking = subprocess.Popen([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True)  # which nothing can end
        moving = subprocess.Popen(["mv", workspace, served.mnt / "committed/v1"])
        until(lambda: looking.poll() == 0 and moving.poll() == 0)
    with looking:
        assert looking.stdout is not None
        assert looking.stdout.read() == "[]\n"


DESCRIPTORS = """
import os, resource, sys, threading
most = min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
device = os.open("/dev/null", os.O_RDONLY)
for _ in range(most - 100):
    os.dup(device)
threading.stack_size(1 << 16)
for _ in range(100):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.alone
def test_millions_of_descriptors_of_another_users(served: Daemon) -> None:
    """One process of alice's, by each of its threads: who looks for users of a snapshot has no time for all of them, looks at
    others first, and gives up within one process, too.  A namespace of hers has a copy of the mount, so it is looked."""
    workspace = served.mnt / "active/w"
    os.listdir(workspace / "rootfs/")
    with (
        process(*alice, "/usr/bin/python3", "-c", DESCRIPTORS, cwd=Path("/")),
        process(*alice, "unshare", "-Urm", "--propagation", "private", "sh", "-c", READY, cwd=Path("/")),
    ):
        with process("sh", "-c", READY, cwd=workspace / "rootfs") as inside:
            began = time.monotonic()
            device = libc.device_number(f"/proc/{inside.pid}/cwd")
            used = f"{os.major(device)}:{os.minor(device)}"
            assert inside.pid in dict(users_of_device(used))
            assert used_devices([used, "99:99"], longest=20) == {used}
            assert used_devices([used, "99:99"], longest=0) is None
            assert time.monotonic() - began < 2
        began = time.monotonic()
        os.rename(workspace, served.mnt / "committed/v1")
        assert time.monotonic() - began < 2, "everybody waits meanwhile"


MAPPINGS = """
import ctypes, os, sys
for _ in range(15):
    os.mkdir("x" * 250)
    os.chdir("x" * 250)
file = os.open("file", os.O_RDWR | os.O_CREAT)
mmap = ctypes.CDLL(None).mmap
mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
for nth in range(60_000):
    mmap(None, 4096, 1, 2, file, 4096 * (nth % 2))  # which the kernel can't make one with that before
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.alone
def test_a_hundred_megabytes_about_the_mappings_of_one_process(served: Daemon, tmp_path: Path) -> None:
    """What /proc tells of a file of alice's that she has mapped often, at a long path: it is read in pieces, and not all."""
    long = tmp_path / "long"
    long.mkdir(mode=0o777)
    long.chmod(0o777)
    look = "; ".join(
        [
            "import resource, time",
            "from snapfs.kernel.processes import used_devices, users, users_of_device",
            "before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()",
            "list(users_of_device('99:99')), list(users('/nowhere')), used_devices(['99:99'], longest=0.25)",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.monotonic() - began)",
        ]
    )
    with process(*alice, "/usr/bin/python3", "-c", MAPPINGS, cwd=long):
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60)
    memory, took = map(float, done.stdout.split())
    assert memory < 20_000, "KiB"
    assert took < 2


async def test_who_asks_for_the_layers_has_waited_for_a_commit_that_had_begun(root: Path) -> None:
    """So does `snapfs mount`, once it has mounted: such a commit may have missed the mount, and would be seen too late."""
    async with open_snapshotter(root) as snapshotter, trio.open_nursery() as nursery:
        await snapshotter.prepare("k")
        await snapshotter.prepare("other")
        busy, go_on, order = trio.Event(), threading.Event(), list[object]()

        def hold(_: object) -> None:
            trio.from_thread.run_sync(busy.set)
            assert go_on.wait(20)

        async def commit() -> None:
            await snapshotter.commit("v", 1, wait=False)
            order.append("committed")

        async def find() -> None:
            await snapshotter.find_layers(1)
            order.append((await snapshotter.stat(1)).kind)

        nursery.start_soon(snapshotter.records.write, hold)
        await busy.wait()
        try:
            nursery.start_soon(commit)
            with trio.fail_after(20):
                while not snapshotter._endings:
                    await trio.sleep(0.01)
            nursery.start_soon(find)
            await trio.testing.wait_all_tasks_blocked()
            await snapshotter.find_layers("other")
            assert order == []
        finally:
            go_on.set()
    assert Kind.COMMITTED in order
