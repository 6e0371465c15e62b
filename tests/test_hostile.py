"""Hostile hands: what stands in a layer, who changes it under a scan, names that want to lead out of the tree, roots and
mountpoints within each other, two at one root."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from snapfs import names, open_snapshotter
from snapfs.errors import Unavailable
from snapfs.kernel import mounting
from snapfs.model import Kind
from snapfs.root.layers import FsTemplate, Layers
from snapfs.root.owners import change_owners
from snapfs.root.trash import DEPTH
from snapfs.scan.changes import changes
from snapfs.scan.usage import disk_usage
from snapfs.scan.walk import Descriptors, directories
from tests.daemon import Daemon, bounded, refusal
from tests.mounts import is_mounted
from tests.processes import die_with_parent, until
from tests.refusals import failing
from tests.tree import committed, info, remove_all, shell, usage

Make = Callable[..., Daemon]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What nobody may touch, or even see: /outside beside the root."""
    outside = tmp_path / "outside"
    (outside / "b/secret directory").mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (outside / "b/secret").write_text("secret")
    (outside / "b/secret").chmod(0o600)
    return outside


def state(top: Path) -> dict[str, tuple[int, ...]]:
    """All that changes where somebody writes there."""
    paths = [top, *sorted(top.rglob("*"))]
    stats = {str(path): os.lstat(path) for path in paths}
    return {
        path: (s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()
    }


@pytest.fixture(autouse=True)
def untouched(outside: Path) -> Iterator[None]:
    before = state(outside)
    yield
    assert state(outside) == before


# -- what stands in a layer

LONG = 250
LEVELS = 40  # of so many bytes each: more than PATH_MAX, twice

NAMES = [b"\xff\xfe", b"new\nline", "é".encode() * 127 + b"x", b"\x7f", b"-rf", b"%2F", b" ", b"\\", b"\xc0\xaf", b"...", b"*"]


def make_zoo(layer: Path, outside: Path) -> int:
    """Everything that a layer can hold; the number of inodes."""
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    count = 0
    try:
        for name, target in {
            "to root": "/",
            "up": "../../../..",
            "out": str(outside),
            "out relative": "../../../../outside",
            "dangling": "/nowhere/at/all",
            "loop1": "loop2",
            "loop2": "loop1",
            "self": "self",
            "to proc": "/proc/self/root",
            "long": "x" * 4000,
        }.items():
            os.symlink(target, name, dir_fd=fd)
            count += 1
        for name, kind, device in (
            ("whiteout", stat.S_IFCHR, (0, 0)),
            ("tty", stat.S_IFCHR, (5, 0)),
            ("watchdog", stat.S_IFCHR, (10, 130)),
            ("disk", stat.S_IFBLK, (7, 200)),
            ("fifo", stat.S_IFIFO, (0, 0)),
        ):
            os.mknod(name, kind | 0o644, os.makedev(*device), dir_fd=fd)
            count += 1
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{fd}/socket")
            count += 1
        for odd in NAMES:
            os.close(os.open(odd, os.O_WRONLY | os.O_CREAT, dir_fd=fd))
            os.mkdir(odd + b"d" if len(odd) < 255 else b"D" * 255, dir_fd=fd)
            count += 2
        for level in range(LEVELS):
            name = f"{level:0{LONG}}"
            os.mkdir(name, dir_fd=fd)
            os.symlink(outside, "out of a level", dir_fd=fd)
            os.mkfifo("fifo of a level", dir_fd=fd)
            count += 3
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
    finally:
        os.close(fd)
    return count + 1


@pytest.mark.durable
def test_whatever_stands_in_a_layer_it_is_counted_compared_committed_and_deleted(make_daemon: Make, outside: Path) -> None:
    """No link is followed, nothing is opened that could block, no path is too long."""
    daemon = make_daemon("--async-remove").start()
    mnt = daemon.mnt
    with bounded(60, daemon):
        committed(mnt, "base", content="x")
        os.mkdir(mnt / "committed/base/active/zoo")
        inodes = make_zoo(mnt / "active/zoo/diff", outside)
        assert usage(mnt / "active/zoo")["inodes"] == inodes
        lines = (mnt / "active/zoo/changes").read_bytes().splitlines()
        assert len(lines) == inodes - 2  # without the root, and the whiteout, which hides nothing
        assert not [line for line in lines if b"secret" in line or not line.startswith(b"A /")]
        assert max(map(len, lines)) > LEVELS * LONG
        assert b"A /new\\nline" in lines
        assert b"A /\\0377\\0376" in lines
        os.rename(mnt / "active/zoo", mnt / "committed/zoo")
        assert usage(mnt / "committed/zoo")["inodes"] == inodes
        assert (mnt / "committed/zoo/changes").read_bytes().splitlines() == lines
        size = int(shell(mnt, "du -s --block-size=1 committed/zoo").stdout.split()[0])
        assert size == usage(mnt / "committed/zoo")["size"]
        with subprocess.Popen(["sync", mnt / "committed/zoo"]) as syncing:
            assert syncing.wait() == 0
        os.rmdir(mnt / "committed/zoo")
        assert sorted(os.listdir(daemon.root / "snapshots")) == ["1", "2"]
        (mnt / ".snapfs/cleanup").write_text("1")
        assert os.listdir(daemon.root / "snapshots") == ["1"]
        assert os.listdir(daemon.root / "trash") == []
    assert daemon.error_log() == []
    assert daemon.stop() == 0
    assert len(daemon.said) == 1


def test_the_merged_file_system_of_such_a_layer(make_daemon: Make, outside: Path) -> None:
    daemon = make_daemon().start()
    with bounded(60, daemon):
        committed(daemon.mnt, "base", content="x")
        os.mkdir(daemon.mnt / "committed/base/view/look")
        os.mkdir(daemon.mnt / "committed/base/active/zoo")
        make_zoo(daemon.mnt / "active/zoo/diff", outside)
        rootfs = daemon.mnt / "active/zoo/rootfs"
        assert os.readlink(rootfs / "out") == str(outside)
        assert "whiteout" not in os.listdir(rootfs)
        for attribute in ("usage.json", "changes", "info.json"):
            assert (daemon.mnt / "active/zoo" / attribute).read_bytes()
        os.rename(daemon.mnt / "active/zoo", daemon.mnt / "committed/zoo")
        os.rmdir(daemon.mnt / "committed/zoo")
        until(lambda: os.listdir(daemon.root / "trash") == [])
    assert daemon.stop() == 0
    assert len(daemon.said) == 1


@pytest.mark.mounts
def test_owners_are_changed_of_links_and_not_of_what_they_lead_to(root: Path, outside: Path) -> None:
    with closing(Layers.open(str(root))) as layers:
        layers.place(1, Kind.ACTIVE, FsTemplate())
        inodes = make_zoo(root / "snapshots/1/fs", outside)
        change_owners(layers.directory(1), lambda entry: (12345, 23456))
        with closing(directories(layers.fs(1))) as visited:
            found = (entry.stat(follow_symlinks=False) for _, entries in visited for entry in entries)
            owners = [(stat.st_uid, stat.st_gid) for stat in found]
        assert owners == [(12345, 23456)] * (inodes - 1)
        layers.move_to_trash(1)
        layers.empty_trash()
        assert os.listdir(root / "trash") == []


# -- who swaps a directory for a link under a scan


def make_layer(layer: Path) -> None:
    """Like what is outside, with no secret in it."""
    (layer / "a/b/c").mkdir(parents=True)
    (layer / "a/b/file").write_text("")
    for deep in range(DEPTH // 10):
        (layer / f"x{deep}/b/c").mkdir(parents=True)
        (layer / f"x{deep}/b/file").write_text("")


def swap(directory: Path, outside: Path) -> None:
    os.rename(directory, directory.with_name(directory.name + " that was"))
    os.symlink(outside, directory)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("steps", range(1, 12))
def test_no_link_is_followed_that_is_put_in_the_way_of_a_scan(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, steps: int, few: bool
) -> None:
    if few:
        monkeypatch.setattr(Descriptors, "OPEN", 1)
    layer = tmp_path / "layer"
    make_layer(layer)
    forbidden = {os.stat(path).st_ino for path in (outside, *outside.rglob("*"))}
    met: list[str] = []
    with closing(directories(str(layer))) as visited:
        for number, (fd, entries) in enumerate(visited, start=1):
            assert os.fstat(fd).st_ino not in forbidden
            met += [entry.name for entry in entries]
            if number == steps:
                for directory in layer.iterdir():
                    if not directory.is_symlink():
                        swap(directory, outside)
    assert "secret" not in met
    assert len(met) >= 6


def test_a_directory_is_swapped_while_it_is_deleted(root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each directory in turn, when it has been found not to be empty and is about to be entered."""
    rmdir = os.rmdir
    left = swapped = 0

    def swap_then(name: str, *, dir_fd: int | None = None) -> None:
        nonlocal left, swapped
        try:
            rmdir(name, dir_fd=dir_fd)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                left -= 1
                if left == 0:
                    os.rename(name, f"{name} that was", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                    os.symlink(outside, name, dir_fd=dir_fd)
                    swapped += 1
            raise

    with closing(Layers.open(str(root))) as layers:
        monkeypatch.setattr(os, "rmdir", swap_then)
        for stop in range(1, 21):
            left = stop
            layers.place(stop, Kind.ACTIVE, FsTemplate())
            make_layer(Path(layers.fs(stop)))
            layers.move_to_trash(stop)
            layers.empty_trash()
            assert sorted(os.listdir(outside)) == ["b", "secret"]
            layers.empty_trash()  # what was in the way
            assert os.listdir(root / "trash") == []
        monkeypatch.undo()
    assert swapped >= 10


@pytest.mark.mounts
def test_a_file_is_swapped_for_a_link_while_its_owner_is_changed(root: Path, outside: Path) -> None:
    """chown(2) takes the set-user-ID bit away: when it is put back it is not put on what the link leads to."""
    with closing(Layers.open(str(root))) as layers:
        layers.place(1, Kind.ACTIVE, FsTemplate())
        file = Path(layers.fs(1)) / "file"
        file.write_text("")
        file.chmod(0o6755)

        def owner(entry: os.stat_result) -> tuple[int, int]:
            if stat.S_ISREG(entry.st_mode):
                os.rename(file, root / "snapshots/1/that was")
                os.symlink(outside / "b/secret", file)
            return 12345, 23456

        change_owners(layers.directory(1), owner)
        assert os.lstat(file).st_uid == 12345
    assert stat.S_IMODE(os.stat(outside / "b/secret").st_mode) == 0o600


@contextmanager
def swapping(layer: Path, outside: Path) -> Iterator[None]:
    """Meanwhile a thread swaps directories for links and back, as fast as it can."""
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not ended.is_set():
                for name in ("a", "x1", "x2/b"):
                    away = layer / name.replace("/", "-away-") if "/" in name else layer / f"{name} away"
                    os.rename(layer / name, away)
                    os.symlink(outside, layer / name)
                    os.unlink(layer / name)
                    os.rename(away, layer / name)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert failures == []


def test_scans_beside_somebody_who_swaps_directories_for_links(tmp_path: Path, outside: Path) -> None:
    layer, below = tmp_path / "layer", tmp_path / "below"
    make_layer(layer)
    make_layer(below)
    own = disk_usage(str(layer)).inodes
    forbidden = {os.stat(path).st_ino for path in (outside, *outside.rglob("*"))}
    with bounded(60), swapping(layer, outside):
        for _ in range(300):
            assert disk_usage(str(layer)).inodes <= own + 3 * 4  # a directory that moves is met twice at most
            assert not [line for line in changes([str(layer)]) if "secret" in line]
            assert not [line for line in changes([str(layer), str(below)]) if "secret" in line]
            assert not [line for line in changes([str(below), str(layer)]) if "secret" in line]
            with closing(directories(str(layer))) as visited:
                assert not forbidden & {os.fstat(fd).st_ino for fd, _ in visited}


# -- a layer that changes under a scan


def test_a_layer_that_changes_while_it_is_read_through_the_mount(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    mnt = daemon.mnt
    committed(mnt, "base", content="x")
    os.mkdir(mnt / "committed/base/active/busy")
    layer = Path(os.readlink(mnt / "active/busy/diff"))
    (layer / "stays").mkdir()
    (layer / "stays/file").write_text("")
    ended = threading.Event()
    rounds = 0

    def work() -> None:
        nonlocal rounds
        while not ended.is_set():
            for number in range(20):
                path = layer / f"d{number}"
                path.write_text("a file")
                path.unlink()
                path.mkdir()
                (path / "file").write_text("in a directory")
                (path / "file").unlink()
                (path / "file").mkdir()
                shutil.rmtree(path)
                os.mkfifo(path)
                path.unlink()
            rounds += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with bounded(60, daemon):
            for _ in range(100):
                assert usage(mnt / "active/busy")["inodes"] >= 3
                lines = (mnt / "active/busy/changes").read_text().splitlines()
                assert {"A /stays", "A /stays/file"} <= set(lines)
                assert lines == sorted(lines, key=lambda line: os.fsencode(line[2:]))
                assert all(re.fullmatch(r"A /(stays(/file)?|d\d+(/file)?)", line) for line in lines)
            until(lambda: rounds > 5)
    finally:
        ended.set()
        thread.join()
    assert daemon.error_log() == []
    os.rmdir(mnt / "active/busy")
    assert daemon.stop() == 0
    assert len(daemon.said) == 1


# -- names that want to lead out of the tree

REFUSED = [
    "..%2f",
    "%2e",
    "%2e%2e",
    "%2E%2e",
    ".%2E",
    "%2E.%2F..",
    "%00%0",
    "%C0%AF",
    "%C0%AE%C0%AE",
    "%E0%80%AF",
    "%F0%80%80%AF",
]
REFUSED += ["%F4%90%80%80", "%u002f", "%252f%", "%%32%46", "%2F%2f"]

TAKEN = {
    "..%2F..%2Fetc": "../../etc",
    "%2E.": "..",
    "%2E": ".",
    "%2F": "/",
    "%00": "\0",
    "%2Fetc%2Fpasswd": "/etc/passwd",
    "%252F": "%2F",
}


def test_names_that_want_to_lead_out_of_the_tree(module_daemon: Daemon) -> None:
    """Each is refused, or is a key like any other, whose directories are where all are."""
    mnt, root = module_daemon.mnt, module_daemon.root
    before = sorted(os.listdir(root)), sorted(os.listdir(root.parent))
    for name in REFUSED:
        for door in ("active", "view"):
            with failing(errno.EINVAL):
                os.mkdir(mnt / door / name)
            with failing(errno.ENOENT):
                os.lstat(mnt / door / name)
    for dots in (".", ".."):
        with failing(errno.EEXIST):
            os.mkdir(f"{mnt}/active/{dots}")
    for name, key in TAKEN.items():
        os.mkdir(mnt / "active" / name)
        assert info(mnt / "active" / name)["name"] == key
        layer = os.readlink(mnt / "active" / name / "diff")
        assert re.fullmatch(re.escape(str(root)) + r"/snapshots/\d+/fs", layer)
        (mnt / "active" / name / "labels" / name).write_text("value")
        os.rename(mnt / "active" / name, mnt / "committed" / name)
        view = names.encode(f"look {key}")
        os.mkdir(mnt / "committed" / name / "view" / view)
        assert os.path.realpath(mnt / "committed" / name / "view" / view) == str(mnt / "view" / view)
        assert os.path.realpath(mnt / "view" / view / "parent") == str(mnt / "committed" / name)
    assert sorted(os.listdir(mnt / "committed")) == sorted(TAKEN)
    assert (sorted(os.listdir(root)), sorted(os.listdir(root.parent))) == before
    remove_all(mnt)


def test_the_tree_ends_at_its_root(module_daemon: Daemon) -> None:
    mnt = module_daemon.mnt
    assert os.path.samefile(f"{mnt}/active/../..", mnt.parent)
    fd = os.open(mnt / "active", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.path.samestat(os.stat("..", dir_fd=fd), os.stat(mnt))
        assert os.path.samestat(os.stat(".", dir_fd=fd), os.stat(mnt / "active"))
    finally:
        os.close(fd)
    for path, number in {"active/..": errno.ENOTEMPTY, "active/.": errno.EINVAL, "view/../active": errno.EPERM}.items():
        with failing(number):
            os.rmdir(f"{mnt}/{path}")


# -- two at one root


@contextmanager
def bound(source: Path, target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    mounting.mount_bind(str(source), str(target), read_only=False)
    try:
        yield target
    finally:
        mounting.unmount(str(target), mounting.MNT_DETACH)


def test_a_second_daemon_by_another_path(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    (tmp_path / "mnt2").mkdir()
    (tmp_path / "link").symlink_to("root")
    (tmp_path / "link to link").symlink_to(tmp_path / "link")
    told = f"is in use by the process with pid {daemon.pid}; stop that one first"
    with bound(daemon.root, tmp_path / "bound"), bound(tmp_path, tmp_path / "around"):
        for path in ("link", "link to link", "bound", "around/root", "mnt2/../root"):
            assert told in refusal(tmp_path / path, tmp_path / "mnt2"), path
        assert told in refusal(daemon.root, tmp_path / "mnt2", prefix=("unshare", "--mount", "--propagation", "private"))
    assert not is_mounted(tmp_path / "mnt2")
    os.mkdir(daemon.mnt / "active/a")
    assert daemon.stop() == 0
    assert make_daemon().start().stop() == 0


async def test_a_library_and_a_daemon(make_daemon: Make, root: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt2").mkdir()
    (tmp_path / "link").symlink_to(root)
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("a")
        assert f"in use by the process with pid {os.getpid()};" in refusal(tmp_path / "link", tmp_path / "mnt2")
        assert (await snapshotter.stat("a")).id == 1
    daemon = make_daemon().start()
    with pytest.raises(Unavailable, match=f"in use by the process with pid {daemon.pid};"):
        async with open_snapshotter(tmp_path / "link"):
            pass
    assert os.listdir(daemon.mnt / "active") == ["a"]
    assert daemon.stop() == 0


@pytest.mark.mounts
def test_of_many_at_once_one_gets_the_root(tmp_path: Path) -> None:
    commands = []
    for number in range(5):
        (tmp_path / f"mnt{number}").mkdir()
        commands.append([sys.executable, "-m", "snapfs.cli", "serve", str(tmp_path / "root"), str(tmp_path / f"mnt{number}")])
    daemons = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        first = []
        for daemon in daemons:
            assert daemon.stderr is not None
            first.append(daemon.stderr.readline())
        serving = [daemon for daemon, line in zip(daemons, first, strict=True) if "snapfs: serving" in line]
        assert len(serving) == 1
        assert sum("is in use by the process with pid" in line for line in first) == 4, first
        assert sum(is_mounted(tmp_path / f"mnt{number}") for number in range(5)) == 1
        serving[0].terminate()
        assert serving[0].wait(timeout=30) == 0
    finally:
        for daemon in daemons:
            with daemon:
                daemon.kill()


# -- roots and mountpoints within each other

WITHIN = "must not lie within each other"


@pytest.mark.mounts
def test_root_and_mountpoint_within_each_other_by_links_and_binds(tmp_path: Path) -> None:
    root, around = tmp_path / "root", tmp_path / "around"
    (root / "in/side").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "link inside").symlink_to(root / "in")
    with bound(tmp_path, around), bound(root, tmp_path / "bound"), bound(root / "in", tmp_path / "bound inside"):
        for of_root, mountpoint in (
            ("root", "link"),
            ("link", "root"),
            ("root", "link inside"),
            ("root", "link/in/side"),
            ("link inside", "root"),
            ("root", "bound"),
            ("bound", "root"),
            ("root", "bound inside"),
            ("root", "bound inside/side"),
            ("root", "around/root/in"),
            ("around/root/in", "root"),
            ("bound inside", "link"),
            ("bound inside/not yet/made", "root"),
            ("root/in/not yet", "bound inside"),
            ("around/root", "root"),
        ):
            assert WITHIN in refusal(tmp_path / of_root, tmp_path / mountpoint), (of_root, mountpoint)
            assert sorted(os.listdir(root)) == ["in"], (of_root, mountpoint)


def test_a_root_beside_the_mountpoint_is_taken_though_one_name_begins_with_the_other(make_daemon: Make, tmp_path: Path) -> None:
    assert make_daemon(root=tmp_path / "snap.root", mnt=tmp_path / "snap").start().stop() == 0
    with bound(tmp_path / "snap.root", tmp_path / "bound"):
        assert make_daemon(root=tmp_path / "bound", mnt=tmp_path / "snap").start().stop() == 0


def test_a_root_in_a_mounted_tree(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    (tmp_path / "mnt2").mkdir()
    (tmp_path / "link").symlink_to(daemon.mnt)
    for path in ("mnt", "mnt/active", "mnt/active/new", "mnt/active/a", "mnt/active/a/labels", "link", "mnt/not/there"):
        said = refusal(tmp_path / path, tmp_path / "mnt2")
        assert f"it is in the tree that snapfs serves on {daemon.mnt}" in said, path
    with bound(daemon.mnt / "active", tmp_path / "bound"):
        assert "in the tree that snapfs serves on" in refusal(tmp_path / "bound/b", tmp_path / "mnt2")
    assert os.listdir(daemon.mnt / "active") == ["a"]
    assert daemon.error_log() == []
    assert daemon.stop() == 0


async def test_a_root_in_a_mounted_tree_is_refused_by_the_library_too(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    with pytest.raises(Unavailable, match="in the tree that snapfs serves on"):
        async with open_snapshotter(daemon.mnt / "active"):
            pass
    assert daemon.stop() == 0


STUCK_SERVER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
for target, mode in zip(sys.argv[1:], ("40755", "100644")):
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode={mode},user_id=1000,group_id=1000,allow_other"
    if libc.mount(b"x", target.encode(), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)
    request = os.read(device, 1 << 20)
    unique, = struct.unpack_from("<Q", request, 8)
    body = struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0) + bytes(24)
    os.write(device, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)
print("ready", flush=True)
sys.stdin.readline()
"""


@contextmanager
def unanswering(*places: Path) -> Iterator[None]:
    """For a block: file systems on a directory, and on a file, whose server answers nothing, as any user can have them."""
    words = [sys.executable, "-c", STUCK_SERVER, *map(str, places)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        try:
            yield
        finally:
            for place in places:
                mounting.unmount(str(place), mounting.MNT_FORCE | mounting.MNT_DETACH)
            server.kill()


def test_what_is_mounted_inside_a_layer_is_not_asked(make_daemon: Make, outside: Path) -> None:
    """Neither a directory nor a file, by any of the files that say what is in the layer."""
    daemon = make_daemon()
    daemon.start()
    workspace = daemon.mnt / "active/w"
    workspace.mkdir()
    layer = daemon.root / "snapshots/1/fs"
    (layer / "d/e").mkdir(parents=True)
    (layer / "d/f").write_text("")
    (daemon.mnt / "active/other").mkdir()
    shutil.copytree(layer, daemon.root / "snapshots/2/fs", dirs_exist_ok=True)
    program = (
        f"import os; os.chdir('{workspace}')\n"
        "for name in ('changes', 'usage.json', 'changes.patch'): print(open(name).read())\n"
        "file = os.open('compare', os.O_RDWR); os.write(file, b'changes content other'); print(os.read(file, 100))"
    )
    with unanswering(layer / "d/e", layer / "d/f"):
        reader = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)  # which nothing can end
        until(lambda: reader.poll() == 0)
    with reader:
        assert reader.stdout is not None
        said = reader.stdout.read()
    assert said.startswith("A /d\nA /d/e\nA /d/f\n")
    assert "diff --git a/d/f b/d/f\nnew file mode 100644\n" in said
    assert said.endswith("\nb''\n")


def test_a_layer_that_does_not_answer_holds_up_no_end(make_daemon: Make) -> None:
    """Its disk is one of the network, say, that is gone: whoever reads `changes` waits, but not the end of the daemon, which
    says what it has left."""
    daemon = make_daemon().start()
    for key in "ab":
        os.mkdir(daemon.mnt / f"active/{key}")
    with unanswering(daemon.root / "snapshots/1/fs"):
        reader = subprocess.Popen(["cat", daemon.mnt / "active/a/changes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(lambda: "request_wait_answer" in "".join(stacks(daemon.pid)))
        os.mkdir(daemon.mnt / "active/c")  # nobody else waits
        assert daemon.stop() == 0
        assert (
            "snapfs: the comparison of snapshot 1 does not end: the disk does not answer; it is not waited for\n" in daemon.said
        )
        assert not is_mounted(daemon.mnt)
    reader.communicate()


def stacks(pid: int) -> Iterator[str]:
    """Where in the kernel the threads of process ``pid`` are."""
    return (stack.read_text() for stack in Path(f"/proc/{pid}/task").glob("*/stack"))
