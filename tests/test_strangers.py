"""Trees of other users beside one's own, and what only looks like a tree: the command takes neither unless it is named, and
mounts and unmounts nothing by their word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from tests.command import SNAPFS, OnATerminal, run
from tests.daemon import Daemon
from tests.mounts import is_mounted
from tests.processes import die_with_parent
from tests.users import ALICE, alice, bind

Make = Callable[..., Daemon]

pytestmark = pytest.mark.usefixtures("open_path", "users")


@pytest.fixture(autouse=True)
def fuse_for_all(tmp_path: Path, everybodys_fuse: None) -> Iterator[None]:
    """Who mounts by fusermount3 may let others in."""
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    with ExitStack() as stack:
        bind(stack, tmp_path / "fuse.conf", "/etc/fuse.conf")
        yield


def alices_directory(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    os.chown(path, ALICE, ALICE)
    return path


@pytest.fixture
def alices(make_daemon: Make, tmp_path: Path) -> Daemon:
    """A daemon of alice's own; nobody else gets in."""
    root, mnt = (alices_directory(tmp_path / name) for name in ("alices root", "alices mnt"))
    daemon = make_daemon(root=root, mnt=mnt)
    daemon.prefix = alice
    return daemon.start()


@contextmanager
def forged(mnt: Path, files: dict[str, str]) -> Iterator[Path]:
    """Alice serves a tree on ``mnt`` in which these files are; all may enter."""
    alices_directory(mnt)
    command = [*alice, sys.executable, "-m", "tests.forged", str(mnt)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({".snapfs/version": "1\n", ".snapfs/snapshots": "", **files}))
        process.stdin.close()
        assert process.stdout.readline() == "mounted\n"
        try:
            yield mnt
        finally:
            mounting.unmount(str(mnt), mounting.MNT_DETACH)


AS_ALICE = """
import os, sys
os.chdir(sys.argv[1])  # where root may not be
from snapfs.cli import main
sys.exit(main(sys.argv[2:]))
"""


def as_alice(*words: str, cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "SNAPFS"} | {"PYTHONPATH": os.getcwd()}
    command = [*alice, sys.executable, "-c", AS_ALICE, str(cwd), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_others_trees_do_not_count(daemon: Daemon, alices: Daemon) -> None:
    (daemon.mnt / "active/old").mkdir()
    assert run("label", "old", "ttl=0s", SNAPFS=str(daemon.mnt)).returncode == 0
    listed = run("ls", "-q")
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "old\n", "")
    for words in (["prune", "--expired", "-n"], ["prune", "--expired"]):
        pruned = run(*words)
        assert (pruned.returncode, "old" in pruned.stdout) == (0, True), pruned.stderr
        line = f"snapfs: working in {daemon.mnt}, the only tree of root's that is mounted (--at names another)\n"
        assert pruned.stderr == line, "a cron job's mail says so"
    assert os.listdir(daemon.mnt / "active") == []


def test_a_terminal_is_told_which_tree_it_is(daemon: Daemon, alices: Daemon) -> None:
    for words in (["ls"], ["prune", "--kind", "view"]):
        assert f"snapfs: working in {daemon.mnt}, the only tree of root's" in OnATerminal(*words).said()
        assert "snapfs: working" not in OnATerminal(*words, "--at", str(daemon.mnt)).said()


def test_ones_own_and_roots_count(daemon: Daemon, alices: Daemon) -> None:
    several = as_alice("ls")
    assert several.returncode == 7
    assert f"several trees are mounted: say which with --at or $SNAPFS: {alices.mnt}, {daemon.mnt}\n" in several.stderr
    assert as_alice("prepare", "web", "--at", str(alices.mnt)).returncode == 0
    assert as_alice("ls", "-q", cwd=alices.mnt).stdout == "web\n"
    daemon.stop()
    assert as_alice("ls", "-q").stdout == "web\n"
    none = run("ls")
    assert none.returncode == 7
    assert none.stderr == (
        "snapfs: no tree of root's is mounted; to work in another user's, name it with --at or $SNAPFS: "
        f"{alices.mnt} (of user {ALICE})\n"
    )
    nowhere = run("ls", "--at", "/proc")
    assert nowhere.stderr == "snapfs: --at: no snapfs tree is mounted on /proc: snapfs serve ROOT MOUNTPOINT mounts one\n"


def test_who_stands_in_anothers_tree_names_it(daemon: Daemon, tmp_path: Path) -> None:
    with forged(tmp_path / "a\n\x1b[31m b", {}) as mnt:
        for words in (["ls"], ["prune", "--expired"]):
            done = run(*words, cwd=mnt)
            assert (done.returncode, done.stdout) == (7, ""), done.stderr
            named = str(mnt).replace("\n", "%0A").replace("\x1b", "%1B")
            assert done.stderr == (
                f"snapfs: you stand in {named} (of user {ALICE}), which is not root's: name it with --at if you mean it\n"
            )
        assert run("ls", "--at", ".", cwd=mnt).returncode == 0
        assert run("ls", SNAPFS=str(mnt)).returncode == 0
        assert run("ls").returncode == 0


def test_a_tree_that_hides_roots(daemon: Daemon, tmp_path: Path) -> None:
    """Alice lets root mount in a directory of hers, and mounts over it."""
    with forged(tmp_path, {f"{daemon.mnt.name}/.snapfs/version": "1\n", f"{daemon.mnt.name}/.snapfs/snapshots": ""}):
        done = run("ls")
        assert done.returncode == 7
        assert done.stderr == f"snapfs: another file system hides {daemon.mnt}, where a tree of root's is mounted\n"
    os.chown(tmp_path, 0, 0)
    assert run("ls").returncode == 0


def test_a_forged_tree_mounts_and_unmounts_nothing(daemon: Daemon, tmp_path: Path) -> None:
    secret, target, busy = (tmp_path / name for name in ("secret", "target", "busy"))
    for directory in (secret, target, busy):
        directory.mkdir()
    mounting.mount_bind(str(secret), str(busy), read_only=False)
    spec = [{"type": "bind", "source": str(secret), "options": ["rbind", "rw"]}]
    files = {
        ".snapfs/options.json": json.dumps({"root": "/nowhere"}),
        "active/web/mounts.json": json.dumps(spec),
        "active/web/info.json": json.dumps({"mounted": []}),
        "active/mounted/info.json": json.dumps({"mounted": [str(busy)]}),
    }
    with forged(tmp_path / "forged", files) as mnt:
        commands = {
            "mounted": [["mount", "web", str(target)], ["mount", "mounted", str(target)]],
            "unmounted": [["umount", "mounted"]],
            "ended": [["rollback", "--kill", "web"]],
        }
        for what, words in ((what, words) for what, each in commands.items() for words in each):
            for how in ({"SNAPFS": str(mnt)}, {}):
                done = run(*words, *([] if how else ["--at", str(mnt)]), **how)
                assert done.returncode == 6, done.stderr
                by_that = f"nothing is {what} by that\n"
                assert done.stderr == f"snapfs: {mnt} is a tree of another user's, and what it says is up to them: {by_that}"
        assert not is_mounted(target)
        assert is_mounted(busy)
    mounting.unmount(str(busy))

    plain = tmp_path / "plain"
    (plain / ".snapfs").mkdir(parents=True)
    (plain / ".snapfs/version").touch()
    assert run("mount", "web", str(target), "--at", str(plain)).returncode == 6, "a plain directory is no tree of anybody's"


def test_what_is_mounted_by_the_word_of_ones_own_tree(daemon: Daemon, alices: Daemon, tmp_path: Path) -> None:
    (target := tmp_path / "target").mkdir()
    (daemon.mnt / "active/web").mkdir()
    assert run("mount", "web", str(target)).returncode == 0
    assert is_mounted(target)
    assert run("umount", "web").returncode == 0
    assert not is_mounted(target)
    assert as_alice("prepare", "mine", "--at", str(alices.mnt)).returncode == 0
    done = as_alice("mount", "mine", str(target), "--at", str(alices.mnt))
    assert done.returncode == 0, "her own she may, where nobody else sees it"
    assert not is_mounted(target)
    assert as_alice("umount", "mine", "--at", str(alices.mnt)).returncode == 0


SILENT = """
import os, socket, subprocess, sys
ours, theirs = socket.socketpair()
command = ["fusermount3", "-o", sys.argv[2], "--", sys.argv[1]]
subprocess.run(command, env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, pass_fds=[theirs.fileno()], check=True)
held = socket.recv_fds(ours, 1, 1)
print("mounted", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("options", ["fsname=hers", "fsname=hers,subtype=snapfs", "fsname=hers,allow_other"])
@pytest.mark.parametrize("parent", [None, "base"])
def test_a_workspace_that_a_user_has_mounted_over(daemon: Daemon, tmp_path: Path, parent: str | None, options: str) -> None:
    """Alice's server, on the TARGET that root has given her, never answers: root's verbs say so, and neither wait for it, nor
    take it for the workspace, nor say that nothing is mounted."""
    target, other = tmp_path / "target", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    assert run("prepare", "base").returncode == run("commit", "base", "base").returncode == 0
    assert run("prepare", "web", *(["--parent", parent] if parent else [])).returncode == 0
    assert run("mount", "web", str(target)).returncode == 0
    os.chown(target, ALICE, ALICE)
    command = [*alice, sys.executable, "-c", SILENT, str(target), options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "mounted\n"
        try:
            for words in (["umount", "web"], ["umount", str(target)], ["mount", "web", str(other)]):
                done = run(*words)
                assert done.returncode == 5, done.stderr
                assert "of the user alice) is mounted over the snapshot on" in done.stderr
                assert done.stderr.endswith(f"unmount that first: umount {target}\n")
            assert not is_mounted(other)
            with pytest.raises(OSError, match="busy"):
                os.readlink(daemon.mnt / "active/web/rootfs")
            assert f"is mounted at {target}: unmount it first" in run("commit", "web", "v1").stderr
        finally:
            server.kill()
            mounting.unmount(str(target))  # hers
    assert run("umount", "web").returncode == 0
    assert not is_mounted(target)
    assert run("commit", "web", "v1").returncode == 0


def test_a_server_that_never_answers_in_ones_tree(make_daemon: Make, tmp_path: Path) -> None:
    """Root lets alice write the tree, and she mounts over a snapshot's directory there: root's verbs neither wait for her, nor
    take her word for it."""
    daemon = make_daemon("-o", f"allow_other,uid={ALICE}").start()
    (target := tmp_path / "target").mkdir()
    assert run("prepare", "web").returncode == 0
    place = daemon.mnt / "active/web"
    command = [*alice, sys.executable, "-c", SILENT, str(place), "fsname=hers,allow_other"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "mounted\n"
        try:
            for words in (f"mount web {target}", "umount web", "run web -- true", "show web", "rm web", "commit web v1", "ls"):
                done = run(*words.split())
                if words == "ls":
                    assert done.returncode == 0, "it reads nothing there"
                    continue
                assert (done.returncode, done.stdout) == (5, ""), done.stderr
                whose = f"something else (fuse of the user alice) is mounted over {place}, in the tree"
                assert done.stderr == f"snapfs: {whose}: unmount that first: umount {place}\n"
        finally:
            server.kill()
            mounting.unmount(str(place))
    assert run("rm", "web").returncode == 0


KEEPER = """
import os, sys
child = os.fork()
if child == 0:
    os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo made; exec sleep 60"])
sys.stdin.readline()
held = os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY)
os.kill(child, 9)
os.waitpid(child, 0)
print("kept", flush=True)
sys.stdin.read()
"""


@pytest.mark.alone
def test_a_namespace_that_is_kept_by_a_descriptor_alone(daemon: Daemon, tmp_path: Path) -> None:
    """No process is in Alice's namespace, which has a copy of what was mounted: the refusal names hers that keeps it, and the
    other way out, which works.  (Of a bind, which has no parent, a daemon in a pid namespace can't know that.)"""
    (target := tmp_path / "target").mkdir()
    for words in (
        ["prepare", "b"],
        ["commit", "b", "base"],
        ["prepare", "web", "--parent", "base"],
        ["mount", "web", str(target)],
    ):
        assert run(*words).returncode == 0
    command = [*alice, sys.executable, "-c", KEEPER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "made\n"
        keeper.stdin.write("\n")
        keeper.stdin.flush()
        assert keeper.stdout.readline() == "kept\n"
        assert run("umount", "web").returncode == 0
        done = run("rm", "web")
        assert done.returncode == 5
        assert f"in a mount namespace that process {keeper.pid} (" in done.stderr
        assert "has open: end it first, or rmdir the directory that it was mounted on" in done.stderr
        target.rmdir()
        done = run("rm", "web")
        assert done.returncode == 0, done.stderr
        keeper.kill()


@pytest.mark.parametrize("parent", [(), ("-p", "base")])
def test_another_snapshot_at_the_target_in_another_mount_namespace(
    daemon: Daemon, tmp_path: Path, parent: tuple[str, ...]
) -> None:
    """The daemon tells of the mounts that it sees: what this process's own mount table doesn't prove to be the snapshot's is
    neither bound nor unmounted."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    assert run("prepare", "base").returncode == run("commit", "base", "base").returncode == 0
    for key in ("web", "other"):
        assert run("prepare", key, *parent).returncode == 0
        (daemon.mnt / f"active/{key}/rootfs/is {key}").touch()
    assert run("mount", "web", str(target)).returncode == 0
    script = """
        umount "$0" && sh "$1/active/other/mount.sh" "$0" && shift 2; ls "$0"
        "$@" umount web; echo $?; ls "$0"
        "$@" mount web "$OTHER"; ls "$OTHER"; "$@" umount web; echo $?; ls "$0"
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(target), str(daemon.mnt), "", *SNAPFS],
        env={**os.environ, "OTHER": str(elsewhere)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert '"web" (active) is not mounted' in done.stderr
    assert done.stdout == "is other\n1\nis other\nis web\n0\nis other\n", done.stderr
    assert is_mounted(target)
    assert run("umount", "web").returncode == 0
    assert daemon.stop() == 0  # with the rootfs of both


def test_what_stands_at_a_target_in_another_mount_namespace_stays(daemon: Daemon, tmp_path: Path) -> None:
    """The daemon tells of the mounts that it sees: a user of another mount namespace may have something else there."""
    (target := tmp_path / "target").mkdir()
    (daemon.mnt / "active/web").mkdir()
    assert run("mount", "web", str(target)).returncode == 0
    script = """
        umount "$0" && mount -t tmpfs mine "$0" && touch "$0/file" && "$@"
        echo $? && ls "$0"
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(target), *SNAPFS, "umount", "web"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "1\nfile\n"
    assert '"web" (active) is not mounted' in done.stderr
    assert is_mounted(target)
    assert run("umount", "web").returncode == 0
    assert not is_mounted(target)
