"""Who may do what: each rule of ``snapfs/fuse/access.py`` as another user's process meets it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapfs.errors import Busy, SnapshotError, Unavailable
from snapfs.fuse.access import Access
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table
from tests.command import SNAPFS
from tests.containerd_client import connected
from tests.daemon import Daemon, refusal
from tests.mounts import is_mounted
from tests.tree import committed, listing
from tests.users import ALICE, BOB, STAFF, Identity, alice, bind, bob, member, run, user

Make = Callable[..., Daemon]

pytestmark = pytest.mark.usefixtures("open_path", "users")

in_own_namespace = ("unshare", "--user", "--map-root-user")


def sh(who: Identity, mnt: Path, script: str) -> subprocess.CompletedProcess[str]:
    return run(who, "env", "-C", mnt, "sh", "-c", script)


def may(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether it was permitted; nothing else may have gone wrong."""
    if done.returncode == 0:
        return True
    assert "Permission denied" in done.stderr, done.stderr
    return False


def which_may(who: Identity, mnt: Path, scripts: Sequence[str]) -> tuple[str, ...]:
    """Those of ``scripts`` that were permitted, one after the other; nothing else may have gone wrong with the others."""
    done = sh(who, mnt, "".join(f"( {script} )\necho status $? >&2\n" for script in scripts))
    if not may(done):  # who may not even go there
        return ()
    said = done.stderr
    words, status = (re.split(r"^status (\d+)\n", said, flags=re.MULTILINE)[begin::2] for begin in (0, 1))
    assert len(status) == len(scripts), said
    found = []
    for script, its_words, its_status in zip(scripts, words, status, strict=False):
        if its_status == "0":
            found.append(script)
        else:
            assert "Permission denied" in its_words, (script, its_words)
    return tuple(found)


def served(mnt: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((mnt / ".snapfs" / name).read_text())
    return found


def fill(mnt: Path) -> None:
    """A committed snapshot with a file, and active ones on it."""
    base = committed(mnt, "base", content="content")
    for name in ("a", "old", "older", "oldest", "eldest"):
        os.mkdir(base / "active" / name)
    for label in ("l", "m", "n"):
        (mnt / "active/a/labels" / label).write_text("1")


READING = (
    "ls -l . active committed view by-id .snapfs",
    "cat README active/a/info.json active/a/mounts.json active/a/usage.json active/a/labels/l committed/base/info.json",
    "cat .snapfs/version .snapfs/options.json .snapfs/stats.json .snapfs/error_log .snapfs/events",
    "readlink active/a/diff active/a/rootfs active/a/parent",
    "active/a/mount.sh; [ $? -eq 2 ]",
)

WRITING = (  # each can be done, whether those before it were or not
    "mkdir active/b",
    "mkdir view/v",
    "mkdir committed/base/active/c",
    "mkdir committed/base/view/w",
    "echo 2 > active/a/labels/l",
    "echo 3 > active/a/labels/new",
    "mv active/a/labels/l active/a/labels/newer",
    "rm active/a/labels/m",
    "truncate -s 0 active/a/labels/n",
    "rm active/a/usage.json",
    "mv active/a active/renamed",
    "mv active/old committed/done",
    "mv active/older committed/base/committed/child",
    "rmdir active/oldest",
    f"""{sys.executable} -c 'import os; os.setxattr("active/eldest", "user.snapfs.remove", b"6 active/eldest")'""",
    "echo 1 > .snapfs/cleanup",
)


@pytest.mark.parametrize(
    ("options", "neither", "reads", "writes"),
    [
        ("", [], [bob, user(BOB, gid=0), (*bob, *in_own_namespace)], None),
        (",umask=077", [bob], [], None),
        (",umask=000", [], [], bob),
        (f",umask=002,gid={STAFF}", [], [bob], member),
        (f",umask=027,gid={STAFF}", [bob], [member], None),
        (f",umask=077,uid={ALICE}", [bob], [], alice),
        (f",umask=077,uid={ALICE}", [], [], ()),  # root
        (f",umask=027,uid={ALICE},gid={STAFF}", [], [member], None),
    ],
)
def test_uid_gid_and_umask_decide_who_reads_and_who_writes(
    make_daemon: Make, options: str, neither: list[Identity], reads: list[Identity], writes: Identity | None
) -> None:
    daemon = make_daemon("-o", f"allow_other{options}").start()
    fill(daemon.mnt)
    before = listing(daemon.mnt)
    for who in (*neither, *reads):
        assert which_may(who, daemon.mnt, READING) == (READING if who in reads else ())
        assert which_may(who, daemon.mnt, WRITING) == ()
        assert listing(daemon.mnt) == before
    if writes is not None:
        assert which_may(writes, daemon.mnt, READING) == READING
        assert which_may(writes, daemon.mnt, WRITING) == WRITING
    assert daemon.error_log() == []
    assert daemon.stop() == 0


def shown(mnt: Path, path: str) -> tuple[int, int, int]:
    found = os.lstat(mnt / path)
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


MODES = {
    ".": 0o777,
    "active": 0o777,
    "active/a": 0o777,
    "active/a/labels": 0o777,
    "committed/base/active": 0o777,
    ".snapfs": 0o777,
    "active/a/labels/l": 0o666,
    ".snapfs/cleanup": 0o666,
    "active/a/mount.sh": 0o555,
    "active/a/info.json": 0o444,
    "active/a/usage.json": 0o444,
    ".snapfs/error_log": 0o444,
    ".snapfs/events": 0o444,
    ".snapfs/stats.json": 0o444,
    "README": 0o444,
    ".nomedia": 0o444,
}


@pytest.mark.parametrize(
    ("arguments", "owner", "umask"),
    [
        ([], (0, 0), 0o022),
        (["-o", "allow_other"], (0, 0), 0o022),
        (["-o", f"allow_other,uid={ALICE},gid={STAFF},umask=27"], (ALICE, STAFF), 0o027),
        (["--allow-other", "--uid", str(ALICE), "--gid", str(STAFF), "--umask", "0002"], (ALICE, STAFF), 0o002),
        (["-o", "allow_other,uid=alice,gid=snapstaff,umask=0"], (ALICE, STAFF), 0),
    ],
)
def test_what_stat_shows(make_daemon: Make, arguments: list[str], owner: tuple[int, int], umask: int) -> None:
    daemon = make_daemon(*arguments).start()
    fill(daemon.mnt)
    for path, mode in MODES.items():
        fixed = not mode & 0o222  # which its owner could keep others from opening
        expected = (mode if fixed and owner[0] else mode & ~umask, 0 if fixed else owner[0], owner[1])
        assert shown(daemon.mnt, path) == expected, path
        assert shown(daemon.mnt, path) == expected, path
    for link in ("active/a/diff", "active/a/rootfs", "active/a/parent", "committed/base/active/a", "by-id/1"):
        assert shown(daemon.mnt, link) == (0o777, *owner)
    for _ in range(2):  # before and after it is known
        assert shown(daemon.mnt, "active/a/changes") == (0o400 & ~umask, 0, 0), "of the layers' owner, whoever has the tree"
        (daemon.mnt / "active/a/changes").read_text()
    options = served(daemon.mnt, "options.json")
    assert (options["uid"], options["gid"], options["umask"]) == (*owner, f"{umask:03o}")
    assert options["allow_other"] == bool(arguments)
    assert daemon.stop() == 0
    assert len(daemon.said) == 1


LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = []
for path in sys.argv[1:]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, 1024, fcntl.F_WRLCK)  # F_SETLEASE
        held.append(path)
    except PermissionError:
        os.close(descriptor)
print(*held, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("options", ["", f",gid={ALICE},umask=027", f",gid={STAFF},umask=027", ",umask=077", ",umask=023"])
def test_nobody_keeps_others_from_reading(make_daemon: Make, options: str) -> None:
    """The kernel has whoever opens a file wait for the end of a lease, which its owner may take, for 45 seconds."""
    daemon = make_daemon("-o", f"allow_other,uid={ALICE}{options}").start()
    fill(daemon.mnt)
    more = ("active/a/mounts.json", ".snapfs/version", ".snapfs/snapshots", ".snapfs/options.json", ".snapfs/metrics")
    for script in READING:
        assert may(sh(alice, daemon.mnt, script)), script
    paths = [str(path) for path in map(daemon.mnt.joinpath, (*MODES, *more)) if path.is_file()]
    command = [*alice, sys.executable, "-c", LEASE, *paths]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        held = holder.stdout.readline().split()
        assert {Path(path).name for path in held} <= {"l", "cleanup"}, "those alone that she may write"
        for path in set(paths) - set(held):
            Path(path).read_bytes()
        done = run((), *SNAPFS, "label", "--at", daemon.mnt, "a", "l=2")
        assert "another process has a lease on it" in done.stderr
        assert holder.poll() is None
        holder.communicate()
    commands = [str(daemon.mnt / "active/a" / name) for name in ("checkpoint", "rollback", "fork")]
    command = [*alice, sys.executable, "-c", LEASE, *commands]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == commands
        for words in (["checkpoint", "a"], ["checkpoint", "--copy", "a"], ["rollback", "a"], ["fork", "a", "c"]):
            done = run((), *SNAPFS, words[0], "--at", daemon.mnt, *words[1:])
            assert "another process has a lease on it" in done.stderr
        holder.communicate()
    assert run((), *SNAPFS, "label", "--at", daemon.mnt, "a", "l=2").returncode == 0


@pytest.mark.parametrize("options", [f"gid={STAFF},umask=027", "umask=077"])
def test_whom_the_umask_keeps_out_reads_no_file(make_daemon: Make, options: str) -> None:
    """Whatever modes the files show: not by a path, and not by a directory that somebody else has opened."""
    daemon = make_daemon("-o", f"allow_other,uid={ALICE},{options}").start()
    fill(daemon.mnt)
    paths = [path for path in MODES if (daemon.mnt / path).is_file()]
    done = sh(bob, daemon.mnt.parent, f"for path in {' '.join(paths)}; do cat {daemon.mnt.name}/$path; done")
    assert (done.stdout, done.stderr.count("Permission denied")) == ("", len(paths))
    for path in paths:
        fd = os.open(daemon.mnt / os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        name = os.path.basename(path)
        words = ["-c", f"import os; os.open({name!r}, os.O_RDONLY, dir_fd={fd})"]
        done = subprocess.run([*bob, sys.executable, *words], pass_fds=[fd], capture_output=True, text=True, check=False)
        os.close(fd)
        assert "PermissionError" in done.stderr, path


def test_the_command_waits_for_no_lease(make_daemon: Make) -> None:
    """Where others may enter and only the owner may read, it is the owner's, who may take one."""
    daemon = make_daemon("-o", f"allow_other,uid={ALICE},umask=066").start()
    os.mkdir(daemon.mnt / "active/a")
    paths = [str(daemon.mnt / path) for path in (".snapfs/snapshots", "active/a/info.json")]
    command = [*alice, sys.executable, "-c", LEASE, *paths]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == paths
        for words in (["ls", "--at", str(daemon.mnt)], ["show", "--at", str(daemon.mnt), "a"]):
            assert "another process has a lease on it" in run((), *SNAPFS, *words).stderr
        holder.communicate()


def test_without_allow_other_they_are_only_shown(make_daemon: Make) -> None:
    daemon = make_daemon("-o", f"uid={ALICE},umask=077").start()
    assert shown(daemon.mnt, "active") == (0o700, ALICE, 0)
    assert not may(run(alice, "ls", daemon.mnt))
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/l").write_text("1")
    assert daemon.stop() == 0
    words = "snapfs: without allow_other nobody but the owner gets in: uid, umask only change what ls -l shows\n"
    assert words in daemon.said


@pytest.mark.parametrize(
    "arguments",
    [
        ["--uid=-1"],
        ["-o", f"uid={2**32 - 1}"],
        ["-o", "uid=no such user"],
        ["-o", "gid=1.5"],
        ["--gid=no such group"],
        ["-o", "gid=٣"],
        ["--umask=8"],
        ["-o", "umask=1000"],
        ["-o", "umask=-1"],
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "mnt").mkdir()
    said = refusal(tmp_path / "root", tmp_path / "mnt", *arguments)
    assert said.startswith(f"snapfs: {arguments[-1].removeprefix('--')}: ")
    assert ": give a number, or a name that there is" in said or ": write three octal digits" in said
    assert not (tmp_path / "root").exists()


# -- the kernel's part


def options_of(mnt: Path) -> set[str]:
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == str(mnt)]
    return {*line.split()[5].split(","), *line.split()[-1].split(",")}


def test_what_the_kernel_is_told(make_daemon: Make) -> None:
    """Nothing that is made in the tree could be run with another's rights, whatever is asked for; and modes are checked (which
    costs an attribute request for each change) only where others may enter."""
    daemon = make_daemon().start()
    assert options_of(daemon.mnt) >= {"nosuid", "nodev"}
    assert not options_of(daemon.mnt) & {"allow_other", "default_permissions"}
    assert daemon.stop() == 0
    daemon.arguments = ("-o", "allow_other")
    daemon.start()
    assert options_of(daemon.mnt) >= {"nosuid", "nodev", "allow_other", "default_permissions"}
    assert daemon.stop() == 0
    daemon.arguments = ("-o", "suid,dev")  # mount.fuse3 says so of every file system that root mounts
    daemon.start()
    assert options_of(daemon.mnt) >= {"nosuid", "nodev"}
    assert daemon.stop() == 0
    for option in ("default_permissions", "user_id=0"):
        assert "unknown mount option" in refusal(daemon.root, daemon.mnt, "-o", option)


def requests(daemon: Daemon) -> int:
    operations = served(daemon.mnt, "stats.json")["operations"]
    return sum(operations[name]["count"] for name in ("lookup", "getattr", "mkdir", "rmdir") if name in operations)


@pytest.mark.parametrize(
    ("arguments", "more"), [([], False), (["-o", "uid=alice,umask=077"], False), (["-o", "allow_other"], True)]
)
def test_the_owners_own_mount_has_no_request_more(make_daemon: Make, arguments: list[str], more: bool) -> None:
    """A mkdir is a look-up and the mkdir, a rmdir the rmdir: only where others may enter is more asked."""
    daemon = make_daemon(*arguments).start()
    os.mkdir(daemon.mnt / "active/warm")
    first, second = requests(daemon), requests(daemon)
    for n in range(10):
        os.mkdir(daemon.mnt / f"active/k{n}")
    for n in range(10):
        os.rmdir(daemon.mnt / f"active/k{n}")
    cost = requests(daemon) - second - (second - first)  # without those of looking
    assert (cost > 10 * 2 + 10) if more else (cost == 10 * 2 + 10)
    assert daemon.stop() == 0


def test_without_allow_other_the_mount_is_its_owners_alone(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    fill(daemon.mnt)
    before = listing(daemon.mnt)
    set_user_id = ("setpriv", "--ruid", str(BOB), "--rgid", str(BOB), "--clear-groups")  # bob runs a program that is root's
    owners = ((), in_own_namespace, ("setpriv", "--bounding-set", "-all"))
    for who in (bob, user(BOB, gid=0), user(0, gid=BOB), (*bob, *in_own_namespace), set_user_id):
        for command in (("ls", daemon.mnt), ("stat", daemon.mnt / "active"), ("cat", daemon.mnt / "README")):
            assert not may(run(who, *command)), who
        for change in (("mkdir", daemon.mnt / "active/b"), ("rmdir", daemon.mnt / "active/a")):
            assert not may(run(who, *change)), who
    for who in owners:
        assert may(run(who, "cat", daemon.mnt / "active/a/info.json", daemon.mnt / "active/a/changes")), who
    assert listing(daemon.mnt) == before
    assert daemon.stop() == 0


# -- a daemon that is not root's


@pytest.fixture
def alices(make_daemon: Make, tmp_path: Path, everybodys_fuse: None) -> Iterator[Callable[..., Daemon]]:
    """Make daemons that alice runs, with fusermount3; the first argument is the content of /etc/fuse.conf."""
    with ExitStack() as stack:

        def make(fuse_conf: str, *arguments: str) -> Daemon:
            (tmp_path / "fuse.conf").write_text(fuse_conf)
            daemon = make_daemon(*arguments)
            daemon.prefix = alice
            for directory in (daemon.root, daemon.mnt):
                directory.mkdir(exist_ok=True)
                os.chown(directory, ALICE, ALICE)
            return daemon

        (tmp_path / "fuse.conf").touch()
        bind(stack, tmp_path / "fuse.conf", "/etc/fuse.conf")
        yield make


@pytest.mark.durable
@pytest.mark.parametrize("end", ["stop", "unmount", "kill"])
def test_an_ordinary_user_serves_containerd_too(alices: Callable[..., Daemon], end: str) -> None:
    """fusermount3 mounts and unmounts, a child of the daemon's."""
    daemon = alices("")
    path = daemon.root / "run/snapfs.sock"
    daemon.arguments = ("--containerd", str(path))
    for turn in range(2):
        daemon.said.clear()
        daemon.start()
        assert path.stat().st_uid == ALICE
        with connected(path) as client:
            client.call("Prepare", key="k")
            assert "k" in sh(alice, daemon.mnt, "ls active").stdout.split()
            client.call("Remove", key="k")
            calls = [client.start("Prepare", key=f"{turn}-{number}") for number in range(50)]
            if end == "unmount":
                assert run(alice, "fusermount3", "-u", "-z", daemon.mnt).returncode == 0
                assert daemon.ended() == 0
            elif end == "stop":
                assert daemon.stop() == 0
            else:
                daemon.stop(signal.SIGKILL)  # the next one takes over the socket and the mountpoint
            assert {call.code() for call in calls} <= {
                grpc.StatusCode.OK,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.CANCELLED,
            }
        if end != "kill":
            assert not path.exists()
            assert not is_mounted(daemon.mnt)
            assert len(daemon.said) == 1, daemon.said


def test_an_ordinary_users_mount_is_that_users_alone(alices: Callable[..., Daemon]) -> None:
    daemon = alices("").start()
    mnt = daemon.mnt
    script = """
        mkdir active/b && echo content > active/b/diff/file && mv active/b committed/base && mkdir committed/base/active/a
        echo 1 > active/a/labels/l && cat committed/base/changes && echo 1 > .snapfs/cleanup && stat -c '%a %u %g' active
    """
    assert sh(alice, mnt, script).stdout.splitlines() == ["A /file", f"755 {ALICE} {ALICE}"]
    options = options_of(mnt)
    assert options >= {"nosuid", "nodev", f"user_id={ALICE}", f"group_id={ALICE}"}
    set_user_id = ("setpriv", "--ruid", str(BOB), "--euid", str(ALICE), "--regid", str(ALICE), "--clear-groups")
    for who in ((), bob, user(BOB, gid=ALICE), user(ALICE, gid=BOB), set_user_id):
        for command in (("ls", mnt), ("cat", mnt / "committed/base/info.json"), ("mkdir", mnt / "active/c")):
            assert not may(run(who, *command)), who
    for who in (alice, user(ALICE, groups=str(STAFF)), (*alice, *in_own_namespace)):
        assert run(who, "ls", mnt / "active").stdout == "a\n", who
    assert not may(run(bob, "ls", daemon.root))
    assert sh(alice, mnt, "rmdir active/a committed/base").returncode == 0
    assert daemon.stop() == 0
    assert len(daemon.said) == 1
    assert not is_mounted(mnt)


def test_an_ordinary_user_needs_roots_leave_for_allow_other(alices: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = alices("", "-o", "allow_other")
    command = [*alice, sys.executable, "-m", "snapfs.cli", "serve", str(daemon.root), str(daemon.mnt), "-o", "allow_other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"snapfs: cannot mount on {daemon.mnt}: ")
    assert "for allow_other the line user_allow_other in /etc/fuse.conf" in done.stderr
    assert not is_mounted(daemon.mnt)

    os.chown(daemon.mnt, BOB, BOB)
    done = subprocess.run(command[:-2], capture_output=True, text=True, timeout=30, check=False)
    assert f"{daemon.mnt} belongs to the user " in done.stderr.splitlines()[-1]
    assert "user_allow_other" not in done.stderr, "what has nothing to do with it is not said"
    os.chown(daemon.mnt, ALICE, ALICE)

    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    daemon.start()
    assert sh(alice, daemon.mnt, "mkdir active/a && echo content > active/a/diff/file").returncode == 0
    assert may(sh(bob, daemon.mnt, "cat active/a/info.json"))
    for script in ("mkdir active/b", "cat active/a/changes", "ls active/a/diff/", "echo 1 > .snapfs/cleanup"):
        assert not may(sh(bob, daemon.mnt, script)), script
    assert sh(alice, daemon.mnt, "cat active/a/changes").stdout == "A /file\n"
    assert shown(daemon.mnt, "active/a/changes") == (0o400, ALICE, ALICE)
    assert daemon.stop() == 0


# -- nothing in the tree lets a user read a layer that they could not read otherwise


@pytest.mark.parametrize(
    "who",
    [
        (),
        ("setpriv", "--bounding-set", "-all"),
        in_own_namespace,
        alice,
        user(ALICE, gid=0),
        bob,
        user(BOB, gid=0),
        member,
        (*alice, *in_own_namespace),
        user(BOB, "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
    ],
    ids=" ".join,
)
def test_who_may_read_changes_is_who_may_read_the_layer(make_daemon: Make, who: Identity) -> None:
    """Also to whom all else in the tree belongs, and who has been given everything that umask= can give."""
    daemon = make_daemon("-o", f"allow_other,umask=000,uid={ALICE},gid={STAFF}").start()
    fill(daemon.mnt)
    expected = who in ((), ("setpriv", "--bounding-set", "-all"), in_own_namespace) or "--ambient-caps" in who
    (daemon.mnt / "active/a/diff/new").touch()
    for _ in range(2):  # before and after the text is known
        for directory in ("active/a", "committed/base"):
            assert may(run(who, "ls", daemon.mnt / directory / "diff/")) == expected
            for name in ("changes", "changes.patch", "compare"):
                assert may(run(who, "cat", daemon.mnt / directory / name)) == expected
        for path in ("active/a/changes", "committed/base/changes", "active/a/changes.patch", "committed/base/changes.patch"):
            assert (daemon.mnt / path).read_text()
        assert may(run(who, "cat", daemon.mnt / "committed/base/layer.tar")) == expected
        assert (daemon.mnt / "committed/base/layer.tar").read_bytes()
    for path in ("active/a/changes", "committed/base/changes.patch"):
        for change in (("chmod", "444"), ("chown", str(BOB))):
            assert run(who, *change, daemon.mnt / path).returncode != 0
    for name in ("changes", "changes.patch"):
        assert shown(daemon.mnt, f"active/a/{name}") == (0o400, 0, 0)
    assert shown(daemon.mnt, "committed/base/layer.tar") == (0o400, 0, 0)
    assert shown(daemon.mnt, "active/a/compare") == (0o600, 0, 0)
    asked = run(who, "sh", "-c", 'exec 3<>"$1" && echo "changes base" >&3 && cat <&3', "sh", daemon.mnt / "active/a/compare")
    assert (asked.returncode == 0 and asked.stdout.endswith("A /new\n")) == (expected and "--ambient-caps" not in who)
    assert daemon.stop() == 0


def test_who_may_not_compare_is_told_who_may(make_daemon: Make) -> None:
    """The owner of all else in the tree, too."""
    daemon = make_daemon("-o", f"allow_other,umask=000,uid={ALICE}").start()
    fill(daemon.mnt)
    for words in ("a", "-p a", "a base", "--stat --since 0 a"):
        done = run(alice, *SNAPFS, "diff", "--at", daemon.mnt, *words.split())
        assert done.returncode == 6
        assert "what is in layers is for root, and the user that serves the tree, alone" in done.stderr
        assert run((), *SNAPFS, "diff", "--at", daemon.mnt, *words.split()).returncode == 0
    assert daemon.stop() == 0


@pytest.mark.parametrize("who", [alice, bob])
def test_who_may_not_look_into_layers_is_told_who_may(make_daemon: Make, tmp_path: Path, who: Identity) -> None:
    daemon = make_daemon("-o", f"allow_other,umask=000,uid={ALICE}").start()
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/rootfs/file").write_text("new")
    target = str(tmp_path / "target")
    os.mkdir(target)
    os.chmod(target, 0o777)
    assert run((), *SNAPFS, "apply", "--at", daemon.mnt, "a", target).returncode == 0
    for words in (["rollback", "--kill"], ["rollback", "--keep", "--kill"], ["apply"], ["apply", "--undo"]):
        done = run(who, *SNAPFS, words[0], "--at", daemon.mnt, *words[1:], "a", *([target] if words == ["apply"] else []))
        assert (done.returncode, done.stdout) == (6, "")
        assert re.fullmatch("snapfs: .*: Permission denied: the tree's owner and root may\n", done.stderr)
    assert daemon.stop() == 0


CRAWL = (
    "find . -printf '%p %l\\n'; find . -type f -exec cat {} +; ls -lR; for d in */*/diff */*/rootfs; do ls $d/; cat $d/*; done"
)


@pytest.mark.parametrize("who", [bob, member, alice])
def test_no_name_of_a_layers_file_is_to_be_found(make_daemon: Make, who: Identity) -> None:
    """Whatever was done, and went wrong, in the tree before."""
    daemon = make_daemon("-o", f"allow_other,umask=002,uid={ALICE},gid={STAFF}", "--async-remove").start()
    mnt = daemon.mnt
    fill(mnt)
    for name in ("secret-file", "secret-directory"):
        (mnt / "active/a/rootfs" / name).mkdir()
    (mnt / "active/a/rootfs/secret-directory/file").write_text("secret-content")
    os.symlink("secret-target", mnt / "active/a/rootfs/secret-link")
    (mnt / "active/old/diff/secret-moved").mkdir()
    os.setxattr(mnt / "active/old/diff/secret-moved", "trusted.overlay.redirect", b"/secret-origin")
    assert "R /secret-moved/" in (mnt / "active/old/changes").read_text()
    for name in ("changes", "usage.json", "info.json"):
        (mnt / "active/a" / name).read_text()
    os.mkdir(mnt / "active/b")
    (mnt / "active/b/diff/secret-removed").touch()
    (mnt / "active/b/diff/secret-mounted").mkdir()
    mounting.mount("none", os.path.realpath(mnt / "active/b/diff/secret-mounted"), "tmpfs")
    os.rmdir(mnt / "active/b")
    with pytest.raises(OSError, match="busy"):
        (mnt / ".snapfs/cleanup").write_text("1")
    for mount in mount_table():
        if mount.target.endswith("/secret-mounted"):
            mounting.unmount(mount.target)
    os.rename(mnt / "active/a", mnt / "committed/done")
    assert "/secret-directory/file" in (mnt / "committed/done/changes").read_text()

    found = sh(who, mnt, CRAWL)
    assert '"name": "done"' in found.stdout, "it did crawl"
    assert "EBUSY write .snapfs/cleanup" in found.stdout, "and was told what went wrong"
    assert "secret" not in found.stdout
    assert "secret" not in found.stderr
    assert daemon.stop() == 0
    assert "secret-mounted" in daemon.said[1], "the owner is told more"


@pytest.mark.parametrize(
    ("error", "alone", "shared"),
    [
        (Busy("it is in use"), "it is in use", "it is in use"),
        (
            Unavailable.from_os("count snapshot 7", OSError(errno.EIO, "x", "secret")),
            "cannot count snapshot 7: Input/output error (secret)",
            "cannot count snapshot 7: Input/output error",
        ),
        (SnapshotError("a secret", public="something"), "a secret", "something"),
        (FileNotFoundError(errno.ENOENT, "No such file", "secret"), "[Errno 2] No such file: 'secret'", "No such file"),
        (OSError("secret"), "secret", "OSError"),
        (KeyError("secret"), "KeyError('secret')", "KeyError"),
    ],
)
def test_what_error_log_says_to_whom(error: Exception, alone: str, shared: str) -> None:
    assert Access().words(error) == alone
    assert Access(allow_other=True).words(error) == shared


@pytest.mark.parametrize("options", ["rootfs_max=1", "rootfs_max=2"])
def test_who_may_not_go_there_mounts_nothing(make_daemon: Make, options: str) -> None:
    """They are told where rootfs leads, and neither hold a place among the mounts nor push out another's."""
    daemon = make_daemon("-o", f"allow_other,umask=000,{options}").start()
    fill(daemon.mnt)
    for link in ("active/a/rootfs", "committed/base/rootfs"):
        target = run(bob, "readlink", daemon.mnt / link).stdout.rstrip()
        assert target == run((), "readlink", daemon.mnt / link).stdout.rstrip()
        assert os.path.dirname(os.path.dirname(target)) == str(daemon.root / "rootfs")
    assert os.listdir(daemon.mnt / "active/a/rootfs") == ["file"]
    held = os.listdir(daemon.root / "rootfs")
    for link in ("active/old/rootfs", "committed/base/rootfs", "active/a/rootfs"):
        assert not may(run(bob, "ls", f"{daemon.mnt}/{link}/"))
        assert os.listdir(daemon.root / "rootfs") == held
    assert served(daemon.mnt, "stats.json")["mounts_held"] == len(held)
    assert daemon.stop() == 0


# -- giving a workspace to another user


@pytest.mark.parametrize("how", ["mount.sh", "bind"])
def test_a_workspace_is_given_by_mounting_it_elsewhere(make_daemon: Make, tmp_path: Path, how: str) -> None:
    daemon = make_daemon("-o", "allow_other").start()
    mnt = daemon.mnt
    fill(mnt)
    work = tmp_path / "work"
    work.mkdir()
    give = f"sh active/a/mount.sh {work}" if how == "mount.sh" else f"mount --bind active/a/rootfs/ {work}"
    try:
        assert sh((), mnt, f"{give} && mount -o remount,bind,nosuid,nodev {work} && chown {BOB} {work}").returncode == 0
        assert may(run(bob, "sh", "-c", f"cd {work} && cat file && echo new > new"))
        assert may(run(alice, "cat", work / "new")), "by its modes"
        assert not may(run(alice, "sh", "-c", f"cd {work} && echo more >> new"))
        if how == "mount.sh":
            assert run(bob, "cat", mnt / "active/a/rootfs/new").stdout == "new\n", "rootfs leads there"
        for script in ("cat active/a/changes", "ls active/a/diff/", "ls committed/base/rootfs/", "mv active/a committed/n"):
            assert not may(sh(bob, mnt, script)), script
        assert "A /new" in (mnt / "active/a/changes").read_text()
        with pytest.raises(OSError, match=r"\[Errno 16\]"):
            os.rename(mnt / "active/a", mnt / "committed/n")
    finally:
        subprocess.run(["umount", str(work)], check=True)
    os.rename(mnt / "active/a", mnt / "committed/n")
    assert daemon.stop() == 0


# -- labels that decide to whom files belong


@pytest.mark.parametrize("mapping", ["remap_ids", "slow_chown"])
@pytest.mark.parametrize("others", ["umask=002", "umask=020", f"uid={ALICE}", f"uid={ALICE},umask=077"])
def test_mappings_are_not_for_others_to_set(tmp_path: Path, mapping: str, others: str) -> None:
    (tmp_path / "mnt").mkdir()
    said = refusal(tmp_path / "root", tmp_path / "mnt", "-o", f"allow_other,{others},{mapping}")
    assert "labels decide to whom files belong" in said
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "options", ["allow_other", "uid=1001,umask=000", "allow_other,uid=0,umask=077", "allow_other,uid=1001,umask=222"]
)
def test_mappings_where_no_other_writes(make_daemon: Make, options: str) -> None:
    daemon = make_daemon("-o", f"{options},slow_chown,remap_ids").start()
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/containerd.io%2Fsnapshot%2Fuidmapping").write_text("0:1000:65536")
    assert daemon.stop() == 0


# -- ROOT


@pytest.mark.parametrize("umask", ["000", "077", "777"])
def test_what_is_made_in_root_whatever_the_callers_umask(make_daemon: Make, tmp_path: Path, umask: str) -> None:
    daemon = make_daemon("-o", "allow_other,umask=000", root=tmp_path / "parent/root")
    daemon.prefix = ("sh", "-c", f'umask {umask}; exec "$@"', "sh")
    mnt, root = daemon.start().mnt, daemon.root
    fill(mnt)
    os.mkdir(mnt / "view/v")
    (root / "snapshots/stray").mkdir()
    (mnt / ".snapfs/cleanup").write_text("1")
    assert os.listdir(root / "lost+found") == ["stray"]
    deep = mnt / "active/a/diff" / "/".join("d" * 200 for _ in range(5))
    deep.mkdir(parents=True)
    for number in range(1200):
        os.close(os.open(deep / str(number), os.O_CREAT))
    assert len((mnt / "active/a/changes").read_text()) > 1 << 20
    os.listdir(mnt / "active/old/rootfs")

    modes = {path.relative_to(root).as_posix(): stat.S_IMODE(path.lstat().st_mode) for path in [root, *root.iterdir()]}
    files = dict.fromkeys(("lock", "metadata.mdb"), 0o600)
    directories = dict.fromkeys((".", "snapshots", "pool", "trash", "rootfs", "lost+found"), 0o700)
    assert modes == files | directories
    assert stat.S_IMODE((tmp_path / "parent").stat().st_mode) & 0o077 == 0
    for directory in (root / "snapshots").iterdir():
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "fs").stat().st_mode) == 0o755
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in (root / "pool").iterdir()} == {0o700}, "fs may come later"
    opened = [path for path in Path(f"/proc/{daemon.pid}/fd").iterdir() if os.readlink(path).startswith(str(root))]
    nameless = [path for path in opened if "(deleted)" in os.readlink(path)]
    assert nameless, "the long list of changes"
    assert {stat.S_IMODE(path.stat().st_mode) for path in nameless} == {0o600}
    for path in ("", "snapshots", "snapshots/1/fs", "lock", "metadata.mdb"):
        assert not may(run(bob, "ls", root / path))
    assert daemon.stop() == 0


def test_a_root_that_others_could_enter_is_shut(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    fill(daemon.mnt)
    assert daemon.stop() == 0
    (daemon.root).chmod(0o755)
    (daemon.root / "snapshots").chmod(0o755)
    assert may(run(bob, "ls", daemon.root / "snapshots"))
    daemon.start()
    assert not may(run(bob, "ls", daemon.root))
    assert not may(run(bob, "ls", daemon.root / "snapshots/1/fs"))
    daemon.root.chmod(0o755)
    assert not may(run(bob, "ls", daemon.root / "snapshots")), "a second door"
    assert daemon.stop() == 0


def test_a_root_of_another_users_is_refused(tmp_path: Path) -> None:
    """Its owner could put a link in the place of the trash and have root empty what it leads to."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    assert run((), "chown", str(ALICE), tmp_path / "root").returncode == 0
    assert may(run(alice, "ln", "-s", "../precious", tmp_path / "root/trash"))
    said = refusal(tmp_path / "root", tmp_path / "mnt")
    assert f"{tmp_path}/root belongs to the user alice, who could put anything in its place" in said
    assert "chown" not in said, "what is in it would still be whatever its owner has put there"
    assert os.listdir(tmp_path / "precious") == ["file"]
    assert os.listdir(tmp_path / "root") == ["trash"]
