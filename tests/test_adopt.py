"""A directory becomes a base with a workspace on it: copied or moved, exact, whole or not at all; and the workspace over it."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.cli.mount import in_use
from snapfs.kernel import libc, mounting, userns
from snapfs.names import path_as_text, path_of_text
from tests.command import SNAPFS, Command, OnATerminal, held
from tests.daemon import Daemon
from tests.disk import make_file_system
from tests.home import Home, home_of
from tests.mounts import is_mounted, loop_mounted
from tests.processes import die_with_parent, in_fork
from tests.rootfs import somebody
from tests.syscalls import EVERY, KILL, Call, Server, running
from tests.tree import info, remove_all
from tests.trees import everything, make_tree
from tests.users import ALICE, alice

pytestmark = pytest.mark.mounts

Way = tuple[str, ...]
WAYS: list[Way] = [(), ("--move",)]


@pytest.fixture
def command(module_daemon: Daemon) -> Iterator[Command]:
    yield Command(module_daemon.mnt)
    remove_all(module_daemon.mnt)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A small directory."""
    top = tmp_path / "site"
    (top / "d").mkdir(parents=True)
    (top / "page").write_text("page")
    (top / "d/deep").write_text("deep")
    top.chmod(0o750)
    return top


def layer(mnt: Path, name: str) -> Path:
    """The files of a committed snapshot, as its layer has them."""
    return Path(os.readlink(mnt / f"committed/{name}/diff"))


def kept(mnt: Path) -> list[str]:
    """All snapshots."""
    return sorted(f"{kind}/{name}" for kind in ("active", "view", "committed") for name in os.listdir(mnt / kind))


def test_a_path_as_a_label_has_it() -> None:
    for raw in (b"/srv/a b", b"/a%41/\xff\xfe/\n", "/ü/\x85".encode(), b"/%", b"/-x'\""):
        path = os.fsdecode(raw)
        text = path_as_text(path)
        assert "\n" not in text
        text.encode()
        assert path_of_text(text) == path
    assert path_as_text(os.fsdecode(b"/srv/a%b/c\xff")) == "/srv/a%25b/c%FF"


# -- by root


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
@pytest.mark.parametrize("seed", range(4))
def test_all_is_in_it_as_it_was(command: Command, tmp_path: Path, seed: int, way: Way) -> None:
    directory = make_tree(tmp_path / "site", seed)
    before, top = everything(directory), os.stat(directory)
    assert command("adopt", *way, str(directory), "w") == f"{command.mnt}/active/w\n"
    assert everything(layer(command.mnt, "w@0")) == before
    if way:
        assert os.listdir(directory) == []
        left = os.stat(directory)
        assert (left.st_mode, left.st_uid, left.st_gid) == (top.st_mode, top.st_uid, top.st_gid)
        assert os.stat(layer(command.mnt, "w@0")).st_ino == top.st_ino
    else:
        assert everything(directory) == before
    shown = info(command.mnt / "active/w")
    assert shown["parent"] == "w@0"
    assert shown["labels"] == {"snapfs.source": str(directory), "snapfs.base": "w@0"}
    assert info(command.mnt / "committed/w@0")["labels"] == {"snapfs.source": str(directory)}
    assert (command.mnt / "active/w/changes").read_text() == ""
    assert sorted(os.listdir(command.mnt / "active/w/rootfs")) == sorted(os.listdir(layer(command.mnt, "w@0")))
    assert "stale" not in os.listdir(layer(command.mnt, "w@0").parent)


def test_the_key_is_called_as_the_directory_is(command: Command, site: Path) -> None:
    os.symlink(site, site.parent / "link")
    command("adopt", str(site.parent / "link"))
    assert kept(command.mnt) == ["active/site", "committed/site@0"]
    assert info(command.mnt / "active/site")["labels"]["snapfs.source"] == str(site)


def test_a_workspace_of_it_does_all_that_one_does(command: Command, site: Path) -> None:
    command("adopt", str(site), "w")
    rootfs = command.mnt / "active/w/rootfs"
    (rootfs / "page").write_text("changed")
    command("checkpoint", "w")
    (rootfs / "d/deep").unlink()
    assert command("diff", "w@0", "w") == "D /d/deep\nC /page\n"
    command("rollback", "w", "0")
    assert (rootfs / "page").read_text() == "page"
    assert info(command.mnt / "active/w")["labels"]["snapfs.base"] == "w@0"


def test_a_name_that_is_not_utf_8(command: Command, tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"\xff%")
    directory.mkdir()
    (directory / os.fsdecode(b"\xfe")).write_text("x")
    assert "give one: snapfs adopt DIR KEY" in command("adopt", str(directory), status=2)
    command("adopt", str(directory), "w")
    assert info(command.mnt / "active/w")["labels"]["snapfs.source"] == f"{tmp_path}/%FF%25"
    assert everything(layer(command.mnt, "w@0")) == everything(directory)


def test_blocks_are_shared_where_they_can_be(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    make_file_system("xfs", tmp_path / "image")
    with loop_mounted(tmp_path / "image", tmp_path / "disk") as disk:
        daemon = make_daemon(root=disk / "root").start()
        (disk / "site").mkdir()
        (disk / "site/big").write_bytes(os.urandom(32 << 20))
        os.sync()
        before = os.statvfs(disk)
        Command(daemon.mnt)("adopt", str(disk / "site"))
        os.sync()
        assert (before.f_bfree - os.statvfs(disk).f_bfree) * before.f_frsize < 8 << 20
        assert (layer(daemon.mnt, "site@0") / "big").read_bytes() == (disk / "site/big").read_bytes()
        assert daemon.stop() == 0


def test_progress_is_told(command: Command, site: Path) -> None:
    said = OnATerminal("adopt", "--at", str(command.mnt), str(site), "w").said()
    assert re.search(r"copying: \d+ files, ", said), said


# -- over


def test_over_the_directory_and_away_again(command: Command, site: Path) -> None:
    before = everything(site)
    assert command("adopt", "--over", str(site)) == f"{command.mnt}/active/site\n"
    assert is_mounted(site)
    assert everything(site).keys() == before.keys()
    (site / "page").write_text("edited")
    assert command("run", "site", "--", "cat", "page") == "edited"
    os.unlink(site / "d/deep")
    assert "over it: snapfs release site gives the directory back first" in command("apply", "site", status=1)
    assert os.statvfs(site).f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV
    assert "snapfs fork" in command("adopt", str(site), "again", status=1)
    said = command("release", str(site))
    assert f"{site} is what it was" in said
    assert "snapfs diff site" in said
    assert not is_mounted(site)
    assert everything(site) == before
    assert command("diff", "site") == "D /d/deep\nC /page\n"
    assert "nothing to release" in command("release", str(site), status=3)
    assert "nothing to release" in command("release", "site", status=3)


def test_what_is_moved_is_at_its_path_again(command: Command, site: Path) -> None:
    command("adopt", "--move", "--over", str(site), "w")
    assert (site / "page").read_text() == "page"
    said = command("release", "w").splitlines()
    assert said[0].startswith(f"{site} is empty, as adopt --move has left it")
    assert os.listdir(site) == []
    subprocess.run(["sh", "-c", said[1].removesuffix(" copies them there")], check=True)
    assert (site / "page").read_text() == "page"


def test_who_is_in_it_keeps_it(command: Command, site: Path) -> None:
    command("adopt", "--over", str(site))
    with open(site / "page"):
        assert f"{site} is in use" in command("release", "site", status=5)
    assert (site / "page").read_text() == "page"
    command("release", "site")


OTHERS_WRITE = ("-o", "allow_other", "-o", f"gid={ALICE},umask=002")


def label_as_alice(path: Path, label: str, value: str | Path) -> None:
    subprocess.run(
        [*alice, "tee", f"{path}/labels/{label}"], input=str(value), text=True, check=True, stdout=subprocess.DEVNULL
    )


@pytest.mark.usefixtures("open_path")
def test_where_a_workspace_stands_others_do_not_say(make_daemon: Callable[..., Daemon], site: Path, tmp_path: Path) -> None:
    """The mount table proves it; their label leads nobody to copy files elsewhere."""
    command = Command(make_daemon(*OTHERS_WRITE).start().mnt)
    command("adopt", "--over", str(site), "w")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    label_as_alice(command.mnt / "active/w", "snapfs.over", elsewhere)
    assert f"stands over {elsewhere} says its label snapfs.over alone, which others" in command("release", "w", status=6)
    assert is_mounted(site)
    assert (command.mnt / "active/w/labels/snapfs.over").read_text() == f"{elsewhere}\n"
    label_as_alice(command.mnt / "active/w", "snapfs.over", site)
    assert f"{site} is what it was" in command("release", "w")
    assert not is_mounted(site)


@pytest.mark.usefixtures("open_path")
def test_what_others_label_as_left_by_an_adoption(make_daemon: Callable[..., Daemon], site: Path) -> None:
    """It is not taken for what was moved, from wherever they say."""
    command = Command(make_daemon(*OTHERS_WRITE).start().mnt)
    forged = command.mnt / "active/w@adopting"
    for source in ("/etc", site):
        command("prepare", "w@adopting")
        Path(os.readlink(forged / "diff"), "evil").touch()
        label_as_alice(forged, "snapfs.source", source)
        label_as_alice(forged, "snapfs.adopting", "moved")
        said = command("adopt", "--move", str(site), "w", status=6)
        assert '"w@adopting" is labelled as what an adoption has left' in said
        assert str(source) not in said
        assert sorted(os.listdir(site)) == ["d", "page"]
        command("rm", "w@adopting")
    command("adopt", "--move", str(site), "w")
    assert (layer(command.mnt, "w@0") / "page").read_text() == "page"


def test_over_what_another_user_can_exchange(command: Command, site: Path) -> None:
    os.chown(site, ALICE, ALICE)
    assert "who could put anything in its place" in command("adopt", "--over", str(site), status=6)
    assert "who could put anything in its place" in command("adopt", "--move", str(site / "d"), status=6)
    assert kept(command.mnt) == []


# -- what is refused: a sentence, and nothing has changed


def refused(command: Command, *arguments: str, status: int = 1) -> str:
    before = kept(command.mnt)
    said = command("adopt", *arguments, status=status)
    assert re.fullmatch(r"snapfs: [^\n]+\n", said), said
    assert kept(command.mnt) == before
    return said


def test_what_is_no_directory(command: Command, site: Path) -> None:
    assert "Not a directory" in refused(command, str(site / "page"))
    assert "No such file" in refused(command, str(site / "nothing"), status=3)
    assert "what the kernel tells (proc)" in refused(command, "/proc/self", "w")


def test_what_is_in_the_tree_or_in_root_or_holds_them(command: Command, module_daemon: Daemon, site: Path) -> None:
    root = str(module_daemon.root)
    for inside in (str(command.mnt), f"{command.mnt}/active", root, f"{root}/snapshots", str(module_daemon.root.parent), "/"):
        assert re.search(r"(lies in|holds) (a|the) tree", refused(command, inside, "w"))
    command("prepare", "p")
    assert "snapfs fork" in refused(command, f"{command.mnt}/active/p/rootfs", "w")
    bound = site / "d"
    mounting.mount_bind(root, str(bound), read_only=False)
    try:
        assert "lies in the tree's ROOT" in refused(command, str(bound), "w")
        assert "shows a snapshot" in refused(command, f"{bound}/snapshots/{info(command.mnt / 'active/p')['id']}/fs", "w")
    finally:
        mounting.unmount(str(bound), mounting.MNT_DETACH)  # with what is mounted in ROOT


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
def test_a_mount_inside(command: Command, site: Path, way: Way) -> None:
    mounting.mount("none", str(site / "d"), "tmpfs")
    try:
        assert f"{site}/d is mounted inside" in refused(command, *way, str(site), status=5)
    finally:
        mounting.unmount(str(site / "d"))


def test_a_key_that_is_taken(command: Command, site: Path) -> None:
    command("adopt", str(site), "w")
    assert '"w" already exists (active)' in refused(command, str(site), "w", status=4)
    os.rmdir(command.mnt / "active/w")
    said = refused(command, str(site), "w", status=4)
    assert f"an earlier adoption of {site}: give another KEY, or remove it: snapfs rm w@0" in said
    shutil.rmtree(site / "d")
    os.unlink(site / "page")  # as after --move
    said = refused(command, str(site), "w", status=4)
    command(*shlex.split(said.partition("go on from it: snapfs ")[2]))
    assert info(command.mnt / "active/w")["labels"] == {"snapfs.source": str(site), "snapfs.base": "w@0"}
    (site / "page").write_text("page")
    command("prepare", "x@adopting")
    (command.mnt / "active/x@adopting/rootfs/mine").write_text("mine")
    assert "has files" in refused(command, str(site), "x", status=4)
    assert (command.mnt / "active/x@adopting/rootfs/mine").read_text() == "mine"
    assert "at most 255" in refused(command, str(site), "k" * 250)


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
def test_what_overlayfs_would_read(command: Command, site: Path, way: Way) -> None:
    os.setxattr(site / "d", "trusted.overlay.opaque", b"y")
    assert f"{site}/d has the attribute trusted.overlay.opaque" in refused(command, *way, str(site), status=6)
    os.removexattr(site / "d", "trusted.overlay.opaque")
    os.mknod(site / "gone", stat.S_IFCHR, 0)
    assert f"{site}/gone is a device 0:0" in refused(command, *way, str(site), status=6)
    os.unlink(site / "gone")
    os.setxattr(site / "d", "user.overlay.opaque", b"y")
    before = everything(site)
    command("adopt", *way, str(site))
    assert everything(layer(command.mnt, "site@0")) == before


def test_a_full_disk(make_daemon: Callable[..., Daemon], small_disk: Path, site: Path) -> None:
    daemon = make_daemon(root=small_disk / "root").start()
    (site / "big").write_bytes(os.urandom(32 << 20))
    before, command = everything(site), Command(daemon.mnt)
    assert "No space left on device" in refused(command, str(site))
    assert everything(site) == before
    os.unlink(site / "big")
    Path(daemon.mnt / ".snapfs/cleanup").write_text("1")
    command("adopt", str(site))
    assert everything(layer(daemon.mnt, "site@0")) == everything(site)
    assert daemon.stop() == 0


def test_what_can_not_be_moved(command: Command, site: Path, tmp_path: Path) -> None:
    before = everything(site)
    os.link(site / "page", tmp_path / "outside")
    assert f"{site}/page has another name outside" in refused(command, "--move", str(site), status=6)
    os.unlink(tmp_path / "outside")
    with somebody(site):
        assert f"{site} is in use by process" in refused(command, "--move", str(site), status=5)
    (tmp_path / "elsewhere").mkdir()
    mounting.mount_bind(str(site / "d"), str(tmp_path / "elsewhere"), read_only=False)
    try:
        said = refused(command, "--move", str(site), status=5)
        assert f"{site} is mounted at {tmp_path}/elsewhere, by which the base could be changed: leave it first" in said
    finally:
        mounting.unmount(str(tmp_path / "elsewhere"))
    assert everything(site) == before
    mounting.mount("none", str(site), "tmpfs")
    try:
        assert "without --move" in refused(command, "--move", str(site), status=5)
    finally:
        mounting.unmount(str(site))
    command("adopt", "--move", str(site))


def test_from_another_file_system(command: Command, site: Path) -> None:
    mounting.mount("none", str(site), "tmpfs")
    try:
        (site / "d").mkdir()
        (site / "d/file").write_text("x")
        before = everything(site)
        assert "without --move" in refused(command, "--move", str(site / "d"), "w")
        command("adopt", str(site), "w")
        assert {path: seen for path, seen in everything(layer(command.mnt, "w@0")).items() if path != "."} == {
            path: seen for path, seen in before.items() if path != "."
        }
    finally:
        mounting.unmount(str(site))


def test_a_directory_that_changes_meanwhile(command: Command, site: Path) -> None:
    """Each name is there once, however often it is moved."""
    for number in range(500):
        (site / f"d/{number}").write_text(str(number))
    (site / "e").mkdir()
    script = "import os, sys\nwhile 1: [os.rename('d/7', 'e/7'), os.rename('e/7', 'd/7')]"
    with subprocess.Popen([sys.executable, "-c", script], cwd=site, preexec_fn=die_with_parent) as writer:
        done = subprocess.run(
            [*SNAPFS, "adopt", "--at", str(command.mnt), str(site), "w"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        writer.kill()
    if done.returncode:
        assert "changes faster than it can be copied" in done.stderr
        assert kept(command.mnt) == []
    else:
        base = layer(command.mnt, "w@0")
        assert (base / "d/7").exists() != (base / "e/7").exists()


# -- several at once, and kills


def test_what_marks_a_copy_as_in_use_is_gone_when_it_is_whole(tmp_path: Path) -> None:
    """Also where its namespace lives on for a while."""

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    def mounts() -> str:
        libc.call("setns", held, userns.CLONE_NEWNS)
        return Path("/proc/self/mountinfo").read_text()

    before = children()
    with in_use(str(tmp_path)):
        (child,) = children() - before
        held = os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY)
        assert f" {tmp_path} " in Path(f"/proc/{child}/mountinfo").read_text()
    try:
        assert f" {tmp_path} " not in in_fork(mounts)
    finally:
        os.close(held)


def test_another_that_is_under_way(command: Command, site: Path) -> None:
    draft = command.mnt / "active/w@adopting"
    os.mkdir(draft)
    fd = os.open(Path(os.readlink(draft / "diff")).parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        words = refused(command, str(site), "w", status=5)
        assert 'another adoption as "w" is under way' in words
        assert f"(process {os.getpid()})" in words
    finally:
        os.close(fd)
    fd = os.open(draft, os.O_RDONLY)  # as everybody may whom the tree lets in
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        command("adopt", str(site), "w")
    finally:
        os.close(fd)
    assert kept(command.mnt) == ["active/w", "committed/w@0"]


def test_many_at_once(command: Command, site: Path) -> None:
    words = [*SNAPFS, "adopt", "--at", str(command.mnt), str(site), "w"]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    assert sorted(status for _, status in said).count(0) == 1, said
    assert all(re.fullmatch(r"snapfs: [^\n]+\n", words) for words, status in said if status), said
    assert kept(command.mnt) == ["active/w", "committed/w@0"]
    assert everything(layer(command.mnt, "w@0")) == everything(site)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(["snapfs.cli.adopting", "snapfs.cli.adopt", "tests.command"]) as started:
        yield started


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
def test_killed_between_any_two_calls(command: Command, server: Server, tmp_path: Path, way: Way) -> None:
    """What is left is no base that looks whole, and the next call makes one that is."""
    pristine = make_tree(tmp_path / "pristine", 1, files=8)
    expected, mnt = everything(pristine), command.mnt
    nth = 1
    while True:
        directory = tmp_path / "site"
        subprocess.run(["cp", "-a", str(pristine), str(directory)], check=True)
        with server.started(held, str(mnt), "adopt", *way, str(directory), "w") as process:
            process.hold(lambda call, nth=nth: KILL if call.nth == nth else None)  # type: ignore[misc]
            is_done = ["status", 0] in process.said
            assert process.errors() == []
        for name in os.listdir(mnt / "committed"):
            base = info(mnt / "committed" / name)
            assert everything(Path(os.readlink(mnt / f"committed/{name}/diff"))) == expected, base
        if not way:
            assert everything(directory) == expected
        if not os.path.exists(mnt / "active/w"):
            command("adopt", *way, str(directory), "w")
        assert kept(mnt) == ["active/w", "committed/w@0"]
        assert everything(layer(mnt, "w@0")) == expected
        assert info(mnt / "active/w")["labels"] == {"snapfs.source": str(directory), "snapfs.base": "w@0"}
        remove_all(mnt)
        shutil.rmtree(directory)
        if is_done:
            break
        nth += 1 if EVERY == 1 else 1 + nth // 4
    assert nth > 20


@pytest.mark.usefixtures("open_path")
def test_what_was_moved_is_found_again_where_others_write(
    make_daemon: Callable[..., Daemon], server: Server, site: Path
) -> None:
    """ROOT says from where, whatever others have made of the label."""
    command = Command(make_daemon(*OTHERS_WRITE).start().mnt)
    with server.started(held, str(command.mnt), "adopt", "--move", str(site), "w") as process:
        assert process.hold(lambda call: KILL if str(call) == "renameat(w@adopting, w@0)" else None)
    assert os.listdir(site) == []
    label_as_alice(command.mnt / "active/w@adopting", "snapfs.source", "/etc")
    (site.parent / "another").mkdir()
    said = command("adopt", "--move", str(site.parent / "another"), "w", status=4)
    assert f"holds all files of {site}, whose adoption was cut off" in said
    command("adopt", "--move", str(site), "w")
    assert (layer(command.mnt, "w@0") / "page").read_text() == "page"


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
def test_interrupted_anywhere(command: Command, server: Server, tmp_path: Path, way: Way) -> None:
    """All is as it was, or done; or, where it comes between two steps, the next call finds what is left, as after a kill.  By
    SIGTERM as by Ctrl-C."""
    pristine, directory, mnt = make_tree(tmp_path / "pristine", 1, files=8), tmp_path / "site", command.mnt
    expected, clean = everything(pristine), list[int]()
    nth, has_come = 3, True
    while has_come:
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run(["cp", "-a", str(pristine), str(directory)], check=True)

        def decide(call: Call, nth: int = nth) -> None:
            if call.nth == nth:
                process.signal(signal.SIGTERM if nth % 2 else signal.SIGINT)

        with server.started(held, str(mnt), "adopt", *way, str(directory), "w") as process:
            process.hold(decide)
            assert process.errors() == []
            is_done, has_come = ["status", 0] in process.said, process.calls >= nth
            assert is_done or ["status", 130] in process.said or nth % 2
        if not is_done and kept(mnt) == []:
            assert everything(directory) == expected
            clean.append(nth)
        elif not os.path.exists(mnt / "active/w"):
            command("adopt", *way, str(directory), "w")
        if kept(mnt):
            assert kept(mnt) == ["active/w", "committed/w@0"]
            assert everything(layer(mnt, "w@0")) == expected
            remove_all(mnt)
        nth += 1 + nth // 16
    assert len(clean) > 5


def test_the_daemon_ends_while_it_is_moved(make_daemon: Callable[..., Daemon], server: Server, site: Path) -> None:
    """Nobody knows then whether it is committed: so it stays where it is, and the next call brings it to its end."""
    daemon, before = make_daemon().start(), everything(site)
    told: list[str] = []

    def decide(call: Call) -> None:
        if call.name == "renameat" and str(call) == "renameat(w@adopting, w@0)":
            os.kill(daemon.pid, signal.SIGKILL)

    with server.started(held, str(daemon.mnt), "adopt", "--move", str(site), "w") as process:
        process.hold(decide)
        told += [str(message) for message in process.said]
        assert ["status", 7] in process.said, (told, process.errors())
    daemon.cleanup()
    assert os.listdir(site) == []
    again = make_daemon().start()
    Command(again.mnt)("adopt", str(site), "w")
    assert everything(layer(again.mnt, "w@0")) == before
    assert again.stop() == 0


# -- by an ordinary user, with a daemon of her own


@pytest.fixture
def home(everybodys_fuse: None, users: None) -> Iterator[Home]:
    with home_of(alice) as home:
        home.daemon.start()
        yield home
        assert home.daemon.stop() == 0


def hers(home: Home, seed: int) -> Path:
    script = f"from pathlib import Path; from tests.trees import make_tree; make_tree(Path('site'), {seed})"
    home.does("env", f"PYTHONPATH={os.getcwd()}", sys.executable, "-c", script)
    return home.path / "site"


@pytest.mark.parametrize("way", WAYS, ids=["copy", "move"])
@pytest.mark.parametrize("seed", range(2))
def test_all_of_hers_is_in_it_as_it_was(home: Home, seed: int, way: Way) -> None:
    site = hers(home, seed)
    before = everything(site)
    assert home.snapfs("adopt", *way, "site") == f"{home.mnt}/active/site\n"
    base = Path(home.does("readlink", home.mnt / "committed/site@0/diff").strip())
    assert everything(base) == before
    if way:
        assert os.listdir(site) == []
    else:
        assert everything(site) == before
    assert home.inside("site", "ls -A | wc -l").strip() == str(len(os.listdir(base)))
    home.inside("site", 'echo x > new; chmod -R u+w .; for each in *; do test ! -f "$each" || echo more >> "$each"; done')
    home.snapfs("checkpoint", "site")


def test_hers_is_at_its_path_in_what_she_starts(home: Home) -> None:
    home.sh("mkdir -p site/d; echo page > site/page")
    said = home.snapfs("adopt", "--over", "site")
    assert "snapfs shell site" in said
    assert home.inside("site", "pwd; echo edited > page; cat ~/site/page") == f"{home.path}/site\nedited\n"
    assert home.sh("cat site/page") == "page\n"
    home.sh("mkdir other")
    leave = "for each in '' --move; do ! snapfs adopt $each ~/other; done"
    snapfs = " ".join(SNAPFS)
    said = home.inside("site", leave.replace("snapfs", snapfs))
    assert said.count("leave the workspace that you stand in") == 2, said
    assert home.snapfs("run", "site", "--", "pwd", cwd=home.path / "site/d") == f"{home.path}/site/d\n"
    said = home.snapfs("release", "site", cwd=home.path)
    assert f"{home.path}/site is what it was" in said
    assert home.inside("site", "cat page; test $PWD != ~/site") == "edited\n"
    assert home.snapfs("diff", "site") == "C /page\n"


def test_what_is_not_hers(home: Home) -> None:
    home.sh("mkdir site; echo mine > site/mine")
    theirs = home.path / "site/theirs"
    theirs.write_text("theirs")
    assert f"{theirs} belongs to user 0 and group 0" in home.snapfs("adopt", "--move", "site", status=6)
    said = home.snapfs("adopt", "site")
    assert f"{theirs}, for one, belongs to somebody else" in said
    assert home.inside("site", "echo more >> theirs; cat theirs") == "theirsmore\n"
    os.mknod(home.path / "site/device", stat.S_IFBLK | 0o666, os.makedev(7, 99))
    said = home.snapfs("adopt", "site", "other", status=6)
    assert f"{home.path}/site/device is a device, which root alone can make" in said
    os.unlink(home.path / "site/device")
    theirs.chmod(0o600)
    assert f"{theirs}: Permission denied" in home.snapfs("adopt", "site", "other", status=6)
    assert "other" not in home.snapfs("ls")


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_who_may_not_write_root(make_daemon: Callable[..., Daemon], open_path: Path) -> None:
    daemon = make_daemon("-o", "allow_other", "-o", f"uid={ALICE}").start()
    site = open_path / "site"
    site.mkdir()
    done = subprocess.run(
        [*alice, *SNAPFS, "adopt", "--at", str(daemon.mnt), str(site)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 6, done
    assert "is for the user that serves" in done.stderr
    assert kept(daemon.mnt) == []
