"""Paths that another user could lead elsewhere: ROOT, mountpoint, socket and TARGET; and that a refusal changes nothing."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from snapfs import names
from snapfs.cli.refusal import BUSY, NOT_PERMITTED
from snapfs.errors import Unavailable
from snapfs.kernel import mounting, trusted
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.root import lock
from snapfs.root.claim import claim
from snapfs.root.layers import Layers
from tests.command import SNAPFS, forked
from tests.daemon import Daemon, refusal
from tests.mounts import is_mounted
from tests.syscalls import Server, running
from tests.tree import committed
from tests.users import ALICE, BOB, STAFF, alice, bind, run

Make = Callable[..., Daemon]

pytestmark = [pytest.mark.mounts, pytest.mark.usefixtures("users")]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of root's, with something in it."""
    (directory := tmp_path / "victim").mkdir()
    (directory / "precious").write_text("root's")
    return directory


@pytest.fixture
def theirs(open_path: Path) -> Path:
    """A directory of Alice's."""
    (directory := open_path / "theirs").mkdir()
    os.chown(directory, ALICE, ALICE)
    return directory


def everything(top: Path) -> dict[str, tuple[object, ...]]:
    """All that is in ``top``: modes, owners, contents, links and attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *top.rglob("*")]:
        shown = path.lstat()
        content: object = None
        if stat.S_ISLNK(shown.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(shown.st_mode):
            content = path.read_bytes()
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        found[str(path.relative_to(top))] = (shown.st_mode, shown.st_uid, shown.st_gid, content, attributes)
    return found


def snapfs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, as root."""
    return run((), *SNAPFS, *arguments)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    verbs = [f"snapfs.cli.{verb}" for verb in ("serve", "check", "backup", "export")]
    with running(["tests.command", *verbs, "snapfs.fuse.serve", "snapfs.images.writing"]) as server:
        yield server


def made_root(path: Path) -> Path:
    """A root of snapfs that no process serves, with a snapshot."""
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, snapfs.blocking as b\nwith b.open_snapshotter(sys.argv[1]) as s: s.prepare('a')",
            path,
        ],
        check=True,
    )
    return path


# -- the rule


def find(path: Path | str, *, inside: bool = False) -> tuple[str, tuple[str, ...]]:
    with trusted.find(str(path), inside=inside, may_lack=True) as found:
        return found.path, found.missing


def test_what_is_roots_or_ones_own_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "absolute").symlink_to(tmp_path / "a")
    (tmp_path / "circle").symlink_to("circle")
    assert find(tmp_path / "a/b") == (f"{tmp_path}/a/b", ())
    assert find(f"{tmp_path}/link/../a//./b/") == (f"{tmp_path}/a/b", ())
    assert find(f"{tmp_path}/absolute/b/new/er") == (f"{tmp_path}/a/b/new/er", ("new", "er"))
    monkeypatch.chdir(tmp_path / "a")
    assert find("b") == (f"{tmp_path}/a/b", ())
    assert find("/") == ("/", ())
    assert find("/../..") == ("/", ())
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        find(tmp_path / "circle/b")
    with pytest.raises(FileNotFoundError):
        find(tmp_path / "a/none/../b")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        find(tmp_path / "file/b")


@pytest.mark.parametrize(
    ("mode", "owner", "group", "why"),
    [
        (0o755, ALICE, 0, "belongs to the user alice, who could put anything in its place"),
        (0o700, BOB, 0, "belongs to the user bob"),
        (0o777, 0, 0, "can be written by everybody"),
        (0o775, 0, STAFF, "can be written by the group snapstaff, whose members could exchange what is in it"),
        (0o775, 0, 77_777, "can be written by the group 77777"),
        (0o1777, 0, 0, ""),
        (0o775, 0, 0, ""),  # root's own group
        (0o775, 0, 4, "can be written by the group adm"),  # of which no member is listed
        (0o755, 0, STAFF, ""),
    ],
)
def test_a_directory_on_the_way(tmp_path: Path, mode: int, owner: int, group: int, why: str) -> None:
    (tmp_path / "way/to").mkdir(parents=True)
    os.chown(tmp_path / "way", owner, group)
    (tmp_path / "way").chmod(mode)
    for path in ("way/to", "way/new"):
        if why:
            with pytest.raises(trusted.Untrusted, match=f"^{tmp_path}/way {why}"):
                find(tmp_path / path)
        else:
            find(tmp_path / path)
    if owner == 0:
        find(tmp_path / "way")
        if why:
            with pytest.raises(trusted.Untrusted, match=why):
                find(tmp_path / "way", inside=True)


@pytest.fixture
def two_of_one_number(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two groups of the number 4242; Alice is in the second."""
    (copy := tmp_path_factory.mktemp("etc") / "group").write_text(
        Path("/etc/group").read_text().rstrip("\n") + "\nadm1:x:4242:\nadm2:x:4242:alice\n"
    )
    copy.chmod(0o644)
    with ExitStack() as stack:
        bind(stack, copy, "/etc/group")
        yield


@pytest.mark.usefixtures("two_of_one_number")
def test_two_groups_of_one_number(tmp_path: Path) -> None:
    (tmp_path / "way/to").mkdir(parents=True)
    os.chown(tmp_path / "way", 0, 4242)
    (tmp_path / "way").chmod(0o775)
    with pytest.raises(trusted.Untrusted, match="can be written by the group adm1"):
        find(tmp_path / "way/to")


def test_an_acl_that_lets_another_user_write(tmp_path: Path) -> None:
    (tmp_path / "way/to").mkdir(parents=True)
    (tmp_path / "way").chmod(0o755)
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, ALICE), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)]
    parts = [tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, bits, who in entries]
    try:
        os.setxattr(tmp_path / "way", "system.posix_acl_access", (2).to_bytes(4, "little") + b"".join(parts))
    except OSError:
        mounting.mount("none", str(tmp_path), "tmpfs", 0, "mode=700")
        raise
    with pytest.raises(trusted.Untrusted, match="can be written by the group root"):
        find(tmp_path / "way/to")


def test_links_in_a_directory_of_everybodys(open_path: Path, victim: Path) -> None:
    (shared := open_path / "shared").mkdir()
    shared.chmod(0o1777)
    assert run(alice, "ln", "-s", victim, shared / "theirs").returncode == 0
    (shared / "ours").symlink_to(victim)
    with pytest.raises(trusted.Untrusted, match=f"^{shared}/theirs is a link of the user alice"):
        find(shared / "theirs/x")
    assert find(shared / "ours/x") == (f"{victim}/x", ("x",))


SERVER = """
import os, stat, sys, pyfuse3, trio

class Liar(pyfuse3.Operations):
    async def getattr(self, inode, ctx):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_uid, entry.st_nlink = inode, stat.S_IFDIR | 0o755, 0, 2
        return entry

pyfuse3.init(Liar(), sys.argv[1], {"allow_other", "fsname=x"})
print("mounted", flush=True)
trio.run(pyfuse3.main)
"""


@pytest.mark.usefixtures("everybodys_fuse")
def test_a_file_system_that_another_user_serves(open_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It says that all is root's, which the kernel believes; who has mounted it the kernel knows by itself."""
    (shared := open_path / "shared").mkdir()
    shared.chmod(0o1777)
    (shared / "mnt").mkdir()
    os.chown(shared / "mnt", ALICE, ALICE)
    (conf := tmp_path_factory.mktemp("etc") / "fuse.conf").write_text("user_allow_other\n")
    conf.chmod(0o644)
    with ExitStack() as stack:
        if not Path("/etc/fuse.conf").exists():
            Path("/etc/fuse.conf").touch()
            stack.callback(os.unlink, "/etc/fuse.conf")
        mounting.mount_bind(str(conf), "/etc/fuse.conf", read_only=False)
        stack.callback(mounting.unmount, "/etc/fuse.conf", mounting.MNT_DETACH)
        command = [*alice, sys.executable, "-c", SERVER, str(shared / "mnt")]
        served = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(served.kill)
        stack.callback(subprocess.run, ["umount", "-l", str(shared / "mnt")], check=False)
        assert served.stdout is not None
        assert served.stdout.readline() == "mounted\n"
        with pytest.raises(trusted.Untrusted, match=f"^{shared}/mnt is a file system that the user alice serves"):
            find(shared / "mnt/root")
        assert os.stat(shared / "mnt").st_uid == 0, "it lies"


# -- ROOT of another user's, or below a directory of theirs


@pytest.mark.parametrize("trap", ["lock to a file", "lock to nothing", "lock a fifo", "snapshots", "trash", "plain"])
@pytest.mark.parametrize("verb", ["serve", "check", "repair", "rebuild", "backup"])
def test_a_root_that_another_user_has_made(
    server: Server, theirs: Path, victim: Path, tmp_path: Path, verb: str, trap: str
) -> None:
    """No verb writes, moves, deletes or waits where its owner has put a link or a FIFO, also after root's chown of it."""
    (root := theirs / "root").mkdir()
    places = {"lock to a file": "lock", "lock to nothing": "lock", "snapshots": "snapshots", "trash": "trash"}
    if trap == "lock a fifo":
        os.mkfifo(root / "lock")
    elif trap == "lock to nothing":
        (root / "lock").symlink_to(victim / "new")
    elif trap == "lock to a file":
        (root / "lock").symlink_to(victim / "precious")
    elif trap != "plain":
        (root / places[trap]).symlink_to(victim)
    if trap in ("snapshots", "trash"):
        (root / "lock").touch()
    for path in (root, *root.iterdir()):
        os.lchown(path, ALICE, ALICE)
    (tmp_path / "mnt").mkdir()
    commands = {
        "serve": ("serve", root, tmp_path / "mnt"),
        "check": ("check", root),
        "repair": ("check", root, "--repair"),
        "rebuild": ("check", root, "--rebuild"),
        "backup": ("backup", root, tmp_path / "copy"),
    }
    moved = tmp_path / "root"
    for place, owner in ((root, ALICE), (root, 0), (moved, 0)):  # in their directory; so, but root's; in root's directory
        if place == moved:
            root.rename(moved)
            commands = {name: tuple(moved if word == root else word for word in words) for name, words in commands.items()}
        os.chown(place, owner, owner)
        before = everything(tmp_path)
        if trap == "plain" and verb == "serve" and place == moved:
            continue  # an empty directory of root's
        done = forked(server, *commands[verb])
        assert done.returncode != 0
        assert done.stderr.startswith("snapfs: ")
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1, "one sentence"
        assert "chown" not in done.stderr
        assert everything(tmp_path) == before


FIXED = ("lock", "metadata.mdb", "snapshots", "pool", "trash", "rootfs", "empty", "lost+found", "metadata.mdb-reserve")


WRONG = [(name, what) for name in FIXED for what in ("link", "foreign", "writable", "fifo")]
WRONG += [(name, "second name") for name in FIXED if name == "lock" or name.startswith("metadata")]


@pytest.mark.parametrize(("name", "what"), WRONG)
def test_each_fixed_entry_is_looked_at(tmp_path: Path, victim: Path, name: str, what: str) -> None:
    root = made_root(tmp_path / "root")
    path = root / name
    is_file = name == "lock" or name.startswith("metadata")
    if not path.exists():
        path.touch(0o600) if is_file else path.mkdir(0o700)
    match what:
        case "link":
            path.rename(victim / "it")
            path.symlink_to(victim / "it")
        case "foreign":
            os.chown(path, ALICE, ALICE)
        case "writable":
            path.chmod(0o770)
        case "fifo":
            path.rename(tmp_path / "away")
            os.mkfifo(path)
        case "second name":
            os.link(path, victim / "another")
    before = everything(tmp_path)
    with pytest.raises(
        Unavailable, match=f"cannot use {root} as root: {root}/{name.replace('+', '.')} .* look what is in there"
    ):
        Layers.open(str(root))
    with pytest.raises(Unavailable, match="look what is in there"):
        Layers.claim(str(root))
    assert everything(tmp_path) == before


def test_a_root_below_a_directory_of_somebody_elses(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    for root in (theirs / "root", theirs / "deep/er/root"):
        before = everything(tmp_path)
        said = refusal(root, tmp_path / "mnt")
        assert f"cannot use {root} as root: {theirs} belongs to the user alice, who could put anything in its place" in said
        assert "below directories that nobody else can write, such as /srv" in said
        assert everything(tmp_path) == before


@pytest.mark.usefixtures("open_path")
def test_another_root_in_the_place_of_one_that_was_moved_away(make_daemon: Make, tmp_path: Path, victim: Path) -> None:
    """As in /tmp, where anybody can make a directory of a name that has become free."""
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o1777)
    daemon = make_daemon(root=shared / "root").start()
    (daemon.mnt / "active/a").mkdir()
    (daemon.mnt / "active/a/rootfs/file").touch()
    (daemon.mnt / "active/b").mkdir()
    (shared / "root").rename(tmp_path / "moved")
    script = (
        f"mkdir {shared}/root && cd {shared}/root && ln -s {victim} trash && ln -s {victim} snapshots && ln -s {victim} pool"
    )
    assert run(alice, "sh", "-c", script).returncode == 0
    assert run(alice, "ln", "-s", victim, shared / "root/rootfs").returncode == 0
    before = everything(victim)
    (daemon.mnt / "active/b").rmdir()
    (daemon.mnt / "active/c").mkdir()
    (daemon.mnt / ".snapfs/cleanup").write_text("1")
    assert everything(victim) == before
    assert sorted(path.name for path in (tmp_path / "moved/snapshots").iterdir()) == ["1", "3"]
    daemon.stop()
    assert everything(victim) == before


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_root_that_others_can_write(tmp_path: Path, victim: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could put a link to the records there between two looks: it is shut before anything in it is opened."""
    (root := tmp_path / "root").mkdir()
    os.chown(root, 0, STAFF)
    root.chmod(mode)

    def acquire(fd: int, name: str) -> tuple[int, str]:
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        raise Unavailable("it is in use")

    with monkeypatch.context() as patch:
        patch.setattr(lock, "acquire", acquire)
        with pytest.raises(Unavailable, match="it is in use"):
            Layers.open(str(root))
    assert stat.S_IMODE(root.stat().st_mode) == mode, "a refusal changes nothing"
    Layers.open(str(root)).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    root.chmod(mode)
    (root / "metadata.mdb").symlink_to(victim / "precious")
    before = everything(tmp_path)
    with pytest.raises(Unavailable, match="is not a file"):
        Layers.open(str(root))
    assert everything(tmp_path) == before


# -- what is a root


@pytest.mark.parametrize(
    "entries",
    [
        ("lock/", "user/"),
        ("lock", "status", "info/"),
        ("lock", "snapshots/x"),
        ("snapshots/", "data"),
        ("metadata.mdb=x",),
        ("lock=7",),
    ],
)
def test_what_is_neither_empty_nor_a_root(server: Server, tmp_path: Path, entries: tuple[str, ...]) -> None:
    """/run has an entry ``lock``, and so has dpkg's directory."""
    (place := tmp_path / "place").mkdir(0o755)
    for entry in entries:
        name, _, content = entry.partition("=")
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).mkdir() if name.endswith("/") else (place / name).write_text(content)
    (tmp_path / "mnt").mkdir()
    before = everything(tmp_path)
    done = forked(server, "serve", place, tmp_path / "mnt")
    assert done.returncode == 1
    assert f"{place} is neither empty nor a root of snapfs" in done.stderr
    for verb in (("check", place, "--repair"), ("check", place, "--rebuild"), ("backup", place, tmp_path / "copy")):
        done = forked(server, *verb)
        assert done.returncode == 1
        assert f"{place} is no root of snapfs" in done.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "lost", [("lock",), ("metadata.mdb",), ("pool", "trash", "rootfs"), ("lock", "metadata.mdb", "pool", "trash")]
)
def test_what_is_left_of_a_root_is_one(tmp_path: Path, lost: tuple[str, ...]) -> None:
    root = made_root(tmp_path / "root")
    for name in lost:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Layers.claim(str(root)).close()


def test_a_start_that_was_killed_has_begun_a_root(tmp_path: Path) -> None:
    for count in range(5):
        for name in ("lock", "snapshots", "pool", "trash", "rootfs")[:count]:
            path = tmp_path / f"root{count}" / name
            path.parent.mkdir(exist_ok=True)
            path.touch() if name == "lock" else path.mkdir()
        with closing(Layers.open(str(tmp_path / f"root{count}"))):
            pass


# -- mountpoint, socket and TARGET


def test_a_mountpoint_in_a_directory_of_somebody_elses(theirs: Path, tmp_path: Path) -> None:
    (theirs / "mnt").mkdir()
    (tmp_path / "away").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "foreign").mkdir()
    os.chown(tmp_path / "foreign", ALICE, ALICE)
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o1777)
    os.symlink(tmp_path / "mine", shared / "link")
    os.lchown(shared / "link", ALICE, ALICE)
    before = everything(tmp_path)
    for mountpoint, why in (
        (theirs / "mnt", f"{theirs} belongs to the user alice"),
        (tmp_path / "foreign", f"{tmp_path}/foreign belongs to the user alice"),
        (shared / "link", f"{shared}/link is a link of the user alice"),
    ):
        said = refusal(tmp_path / "root", mountpoint)
        assert said.startswith(f"snapfs: cannot mount on {mountpoint}: {why}, who could put anything in its place; mount on ")
    assert everything(tmp_path) == before


def test_what_is_unmounted_at_the_end_is_our_own(make_daemon: Make, tmp_path: Path) -> None:
    """Not what is at the mountpoint's name by then: a mount over it, or on another directory that has got the name."""
    (parent := tmp_path / "parent").mkdir()
    daemon = make_daemon(mnt=parent / "mnt").start()
    parent.rename(tmp_path / "moved")
    (parent / "mnt").mkdir(parents=True)
    with ExitStack() as stack:
        mounting.mount("other", str(parent / "mnt"), "tmpfs")
        stack.callback(mounting.unmount, str(parent / "mnt"))
        assert daemon.stop() == 0
        assert is_mounted(parent / "mnt")
        assert not is_mounted(tmp_path / "moved/mnt")

    daemon = make_daemon(mnt=tmp_path / "under").start()
    with ExitStack() as stack:
        stack.callback(mounting.unmount, str(tmp_path / "under"), mounting.MNT_DETACH)
        mounting.mount("other", str(tmp_path / "under"), "tmpfs")
        stack.callback(mounting.unmount, str(tmp_path / "under"))
        assert daemon.stop() == 0
        assert any(f"something else is mounted over {tmp_path}/under" in line for line in daemon.said)
        assert [mount.source for mount in mount_table() if mount.target == f"{tmp_path}/under"][-1] == "other"


def test_a_socket_in_a_directory_of_somebody_elses(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    before = everything(tmp_path)
    for path in (theirs / "socket", theirs / "new/socket"):
        said = refusal(tmp_path / "root", tmp_path / "mnt", "--containerd", path)
        assert f"cannot make the socket {path}: {theirs} belongs to the user alice" in said
    assert everything(tmp_path) == before, "a root that was new is gone again"
    assert not is_mounted(tmp_path / "mnt")


def test_a_socket_whose_directory_another_user_has_locked(make_daemon: Make, open_path: Path) -> None:
    (run_directory := open_path / "run").mkdir()
    run_directory.chmod(0o755)
    command = [*alice, "flock", "-x", str(run_directory), "sh", "-c", "echo locked; read _"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as locked:
        assert locked.stdin is not None
        assert locked.stdout is not None
        assert locked.stdout.readline() == "locked\n"
        daemon = make_daemon("--containerd", str(run_directory / "s.sock")).start()
        assert (run_directory / "s.sock").is_socket()
        assert daemon.stop() == 0
        locked.stdin.close()


CALLED = """
import ast, ctypes, os, sys
ctypes.CDLL(None).prctl(15, ast.literal_eval(sys.argv[2]), 0, 0, 0)  # PR_SET_NAME
os.chdir(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", [b"\x9bboo", b"\x1b[2Jx\nsn"])
def test_the_name_of_a_process_that_is_in_the_way(daemon: Daemon, tmp_path: Path, name: bytes) -> None:
    """A process calls itself what it likes."""
    (daemon.mnt / "active/a").mkdir()
    (target := tmp_path / "target").mkdir()
    assert snapfs("mount", "a", target, "--at", daemon.mnt).stderr == ""
    command = [sys.executable, "-c", CALLED, str(target), repr(name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdin is not None
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"\n"
        for words in (("umount", target), ("rm", "a"), ("commit", "a", "c")):
            done = snapfs(*words, "--at", daemon.mnt)
            assert done.returncode == BUSY, done.stderr
            assert done.stderr.startswith("snapfs: ")
            assert done.stderr.rstrip("\n").isprintable(), done.stderr
        busy.stdin.close()
    assert snapfs("umount", target).stderr == ""


@pytest.mark.usefixtures("everybodys_fuse")
def test_links_in_the_working_directory(daemon: Daemon, open_path: Path, tmp_path: Path) -> None:
    """Another user's, in a directory of everybody's: they say neither which snapshot nor which mount is meant."""
    (shared := open_path / "shared").mkdir()
    shared.chmod(0o1777)
    committed(daemon.mnt, "base", content="content")
    (daemon.mnt / "active/db").mkdir()
    (other := tmp_path / "other").mkdir()
    assert snapfs("mount", "db", other, "--at", daemon.mnt).stderr == ""
    links = f"mkdir {shared}/active && ln -s {daemon.mnt}/committed/base {shared}/active/web && ln -s {other} {shared}/web"
    assert run(alice, "sh", "-c", f"{links} && ln -s {daemon.mnt} {shared}/tree").returncode == 0

    def there(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "SNAPFS": str(daemon.mnt)}
        command = [*SNAPFS, *words]
        return subprocess.run(command, cwd=shared, env=environment, capture_output=True, text=True, check=False, timeout=60)

    for words in (
        ("rm", "active/web"),
        ("rm", "./active/web"),
        ("umount", "web"),
        ("umount", "./web"),
        ("umount", "tree"),
        ("umount", "./tree"),
        ("rm", "tree/committed/base"),
    ):
        done = there(*words)
        assert done.returncode != 0, words
        assert done.stderr.startswith("snapfs: ")
    assert (daemon.mnt / "committed/base").is_dir()
    assert is_mounted(other)
    (tmp_path / "mine").symlink_to(daemon.mnt)
    done = there("show", f"{tmp_path}/mine/committed/base")
    assert done.returncode == 0, "a link of one's own"
    assert snapfs("umount", other).stderr == ""


def test_a_backup_in_a_directory_of_somebody_elses(theirs: Path, tmp_path: Path) -> None:
    root = made_root(tmp_path / "root")
    (theirs / "there").symlink_to(tmp_path)
    before = everything(tmp_path)
    for file in (theirs / "copy", theirs / "there/copy"):
        done = snapfs("backup", root, file)
        assert done.returncode == 1
        assert f"cannot write the backup {file}: {theirs} belongs to the user alice" in done.stderr
    assert everything(tmp_path) == before


def test_an_image_in_a_directory_of_somebody_elses(
    daemon: Daemon, server: Server, theirs: Path, victim: Path, tmp_path: Path
) -> None:
    """Root makes nothing there, nor where a link of theirs leads."""
    committed(daemon.mnt, "v1", content="content")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "images").mkdir()
    for layout in (theirs / "images", tmp_path / "linked", tmp_path / "blobs", tmp_path / "digests", tmp_path / "written"):
        layout.mkdir()
        (layout / "oci-layout").write_text("{}")
        (layout / "blobs").symlink_to(victim) if layout.name in ("images", "linked") else (layout / "blobs").mkdir()
    (theirs / "link").symlink_to(victim)
    (tmp_path / "digests/blobs/sha256").mkdir()
    (tmp_path / "shared/theirs").symlink_to(victim)
    for path in (
        *(theirs / name for name in ("images", "images/blobs", "link")),
        *(tmp_path / name for name in ("blobs/blobs", "digests/blobs/sha256", "shared/theirs")),
    ):
        os.lchown(path, ALICE, ALICE)
    (tmp_path / "written/blobs").chmod(0o1777)
    before = [everything(place) for place in tmp_path.iterdir() if place.name not in ("root", "mnt")]
    of_alice = "belongs to the user alice, who could put anything in its place"
    for place, why, status in (
        (f"oci:{theirs}/images:v1", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"oci:{theirs}/link:v1", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"oci:{theirs}/new:v1", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"oci:{theirs}:v1", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"oci:{tmp_path}/shared/theirs:v1", f"{tmp_path}/shared/theirs is a link of the user alice", NOT_PERMITTED),
        (f"oci:{tmp_path}/blobs", f"{tmp_path}/blobs/blobs {of_alice}", NOT_PERMITTED),
        (f"oci:{tmp_path}/digests", f"{tmp_path}/digests/blobs/sha256 {of_alice}", NOT_PERMITTED),
        (f"oci:{tmp_path}/linked", f"{tmp_path}/linked/blobs is no directory", 1),
        (f"oci-archive:{theirs}/new", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"docker-archive:{theirs}/link/new", f"{theirs} {of_alice}", NOT_PERMITTED),
        (f"docker-archive:{tmp_path}/shared/theirs/new", "is a link of the user alice", NOT_PERMITTED),
        (f"oci-archive:{tmp_path}/shared/theirs", "already exists", 1),
        (f"oci:{tmp_path}/written", f"{tmp_path}/written/blobs can be written by everybody", NOT_PERMITTED),
    ):
        done = forked(server, "export", "v1", place, "--at", daemon.mnt)
        assert done.returncode == status, done.stderr
        assert why in done.stderr, place
        assert done.stderr.startswith("snapfs: ")
        assert done.stderr.count("\n") == 1, "one sentence"
        assert [everything(here) for here in tmp_path.iterdir() if here.name not in ("root", "mnt")] == before
    for place in (f"oci:{tmp_path}/shared/new", f"docker-archive:{tmp_path}/shared/file", f"oci:{tmp_path}/images"):
        assert forked(server, "export", "v1", place, "--at", daemon.mnt).stderr == ""
    assert stat.S_IMODE((tmp_path / "shared/new/blobs").stat().st_mode) == 0o755


def attributes_of(target: Path) -> set[str]:
    return set(next(mount.options for mount in mount_table() if mount.target == str(target)))


def test_a_target_is_mounted_on_without_setuid_and_devices(daemon: Daemon, tmp_path: Path) -> None:
    committed(daemon.mnt, "base", content="content")
    (daemon.mnt / "committed/base/active/a").mkdir()
    (daemon.mnt / "committed/base/view/v").mkdir()
    (daemon.mnt / "active/alone").mkdir()
    below = mount_id(str(daemon.root))  # what a bind shows has the attributes of the mount that it is on, too
    inherited = set(next(mount.options for mount in mount_table() if mount.id == below))
    for key, more, expected in (
        ("a", (), {"nosuid", "nodev"}),
        ("v", (), {"nosuid", "nodev"}),
        ("alone", (), {"nosuid", "nodev"}),
        ("a", ("--suid",), {"nodev"}),
        ("v", ("--dev",), {"nosuid"}),
        ("alone", ("--suid", "--dev"), set()),
    ):
        (target := tmp_path / "target").mkdir(exist_ok=True)
        done = snapfs("mount", key, target, *more, "--at", daemon.mnt)
        assert done.stderr == ""
        try:
            found = attributes_of(target) & {"nosuid", "nodev"}
            assert found - inherited == expected - inherited, (key, more)
            assert found >= expected
            second = tmp_path / "second"
            second.mkdir(exist_ok=True)
            if key == "a":  # a bind of the first
                assert snapfs("mount", key, second, "--at", daemon.mnt).stderr == ""
                assert attributes_of(second) >= {"nosuid", "nodev"}
                assert snapfs("umount", second).stderr == ""
        finally:
            assert snapfs("umount", target).stderr == ""


def test_a_target_that_somebody_else_could_exchange(daemon: Daemon, theirs: Path, victim: Path) -> None:
    (daemon.mnt / "active/a").mkdir()
    (theirs / "link").symlink_to(victim)
    (theirs / "mine").mkdir()
    for target in (theirs / "link", theirs / "mine", theirs):
        done = snapfs("mount", "a", target, "--at", daemon.mnt)
        assert done.returncode == NOT_PERMITTED
        assert f'cannot mount "a" on {target}: {theirs} belongs to the user alice' in done.stderr
        assert not is_mounted(target)
    assert not is_mounted(victim)
    mounting.mount_bind(str(daemon.root / "snapshots/1/fs"), str(theirs / "mine"), read_only=False)
    try:
        done = snapfs("umount", theirs / "mine", "--at", daemon.mnt)
        assert done.returncode == NOT_PERMITTED
        assert f"cannot unmount what is in {theirs}: {theirs} belongs to the user alice" in done.stderr
    finally:
        mounting.unmount(str(theirs / "mine"))


# -- a refusal changes nothing


def _newer(root: Path, place: Path) -> None:
    import lmdb

    with lmdb.open(str(root / "metadata.mdb"), subdir=False, max_dbs=16) as env, env.begin(write=True) as txn:
        txn.put(b"schema", b"99", db=env.open_db(b"meta", txn))
    (root / "metadata.mdb-lock").unlink()


def _unrecorded(root: Path, place: Path) -> None:
    (root / "snapshots/77/fs").mkdir(parents=True)
    (root / "snapshots/77/fs/file").touch()


def _lost(root: Path, place: Path) -> None:
    (root / "metadata.mdb").unlink()


def _broken(root: Path, place: Path) -> None:
    (root / "metadata.mdb").write_bytes(b"x" * 9000)


REFUSED: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...], str]] = {
    "records of a newer snapfs": (_newer, ("serve", "R", "M"), "written by a newer snapfs"),
    "no records": (_lost, ("serve", "R", "M"), "is missing or empty"),
    "broken records": (_broken, ("serve", "R", "M"), "can't be read"),
    "a layer that no record knows": (_unrecorded, ("serve", "R", "M"), "no such snapshot was ever recorded"),
    "no mountpoint": (lambda root, place: None, ("serve", "R", "M/none"), "make it first"),
    "a file for a mountpoint": (lambda root, place: (place / "f").touch(), ("serve", "R", "P/f"), "not a directory"),
    "a mountpoint in ROOT": (lambda root, place: None, ("serve", "R", "R/snapshots"), "must not lie within each other"),
    "ROOT in the mountpoint": (lambda root, place: None, ("serve", "M/root", "M"), "must not lie within each other"),
    "a file for ROOT": (lambda root, place: (place / "f").touch(), ("serve", "P/f", "M"), "not a directory"),
    "below a file": (lambda root, place: (place / "f").touch(), ("serve", "P/f/root", "M"), "Not a directory"),
    "an option": (lambda root, place: None, ("serve", "P/new", "M", "-o", "nosuch"), "unknown mount option"),
    "a file for a socket": (
        lambda root, place: (place / "f").touch(),
        ("serve", "P/new/er", "M", "--containerd", "P/f"),
        "is in the way of the socket",
    ),
    "a socket's path that is too long": (
        lambda root, place: None,
        ("serve", "P/new", "M", "--containerd", f"P/{'s' * 100}"),
        "has at most 107 bytes",
    ),
    "accept without a snapshot": (lambda root, place: None, ("check", "R", "--accept", "none"), "does not exist"),
    "accept what is whole": (lambda root, place: None, ("check", "R", "--accept", "a"), "nothing to accept"),
    "a backup in ROOT": (lambda root, place: None, ("backup", "R", "R/copy"), "would lie in"),
    "a backup over a file": (lambda root, place: (place / "f").touch(), ("backup", "R", "P/f"), "exists already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_changes_nothing(tmp_path: Path, name: str) -> None:
    prepare, words, why = REFUSED[name]
    root = made_root(tmp_path / "root")
    (tmp_path / "mnt").mkdir()
    prepare(root, tmp_path)
    root.chmod(0o750)  # which a start would change
    places = {"R": root, "M": tmp_path / "mnt", "P": tmp_path}
    given = [
        str(places[head]) + word[1:] if (head := word[:1]) in places and word[1:2] in ("", "/") else word for word in words
    ]
    before = everything(tmp_path)
    done = snapfs(*given)
    assert done.returncode != 0
    assert why in done.stderr
    assert everything(tmp_path) == before
    assert not is_mounted(tmp_path / "mnt")


def test_a_mount_that_the_kernel_refuses_leaves_nothing_of_a_new_root(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    before = everything(tmp_path)
    done = subprocess.run(
        [
            "setpriv",
            "--bounding-set",
            "-sys_admin",
            sys.executable,
            "-m",
            "snapfs.cli",
            "serve",
            tmp_path / "a/root",
            tmp_path / "mnt",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"cannot mount on {tmp_path}/mnt" in done.stderr
    assert everything(tmp_path) == before


def test_a_root_in_use_is_not_changed(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    lock = (daemon.root / "lock").read_text()
    assert "is in use by the process with pid" in refusal(daemon.root, tmp_path / "other")
    assert (daemon.root / "lock").read_text() == lock


def test_a_socket_that_another_server_has(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "s"))
        taken.listen()
        before = everything(tmp_path)
        assert "another server listens on" in refusal(tmp_path / "root", tmp_path / "mnt", "--containerd", tmp_path / "s")
        assert everything(tmp_path) == before


def test_a_claim_says_what_it_made(tmp_path: Path) -> None:
    found = claim(str(tmp_path / "a/b"))
    try:
        assert found.made == [f"{tmp_path}/a", f"{tmp_path}/a/b"]
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    finally:
        os.close(found.lock)
        os.close(found.fd)


def test_no_refusal_has_what_a_terminal_obeys(daemon: Daemon) -> None:
    """Whoever may write the tree gives snapshots any names."""
    key = "\x1b[2J\x1b]0;pwned\x07\u202ex\u009b"
    (daemon.mnt / "active" / names.encode(key)).mkdir()
    (daemon.mnt / "active" / names.encode(key)).rename(daemon.mnt / "committed" / names.encode(key))
    (daemon.mnt / "committed" / names.encode(key) / "active/child").mkdir()
    for words in (("rm", key), ("rm", key, "other"), ("commit", key, "x"), ("show", key + "y"), ("prune", "--kind", key)):
        done = snapfs(*words, "--at", daemon.mnt)
        assert done.returncode != 0, words
        assert all(line.isprintable() for line in done.stderr.split("\n")), done.stderr
