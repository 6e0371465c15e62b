"""A file or directory put back as it was at a checkpoint: whole, with all that belongs to it, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapfs.kernel import inside, libc
from snapfs.scan import restoring
from snapfs.scan.restoring import PREFIX, NotRestored, restore
from tests.command import SNAPFS, Command
from tests.daemon import Daemon
from tests.home import home_of, with_workspace
from tests.mounts import unanswering
from tests.users import ALICE, alice, user

pytestmark = pytest.mark.mounts

Make = Callable[..., Daemon]


def filled(files: Path) -> None:
    """Some of everything."""
    (files / "etc").mkdir()
    (files / "etc/conf").write_text("0\n")
    (files / "dir/sub/deep").mkdir(parents=True)
    (files / "dir/one").write_text("one\n")
    (files / "dir/sub/two").write_text("two\n")
    os.symlink("../nowhere", files / "dir/link")
    os.mkfifo(files / "dir/fifo", 0o640)
    os.mknod(files / "dir/null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(files / "dir")
        bound.bind("socket")
        os.chdir("/")
    os.link(files / "dir/one", files / "dir/sub/one again")
    os.setxattr(files / "dir/one", "user.colour", b"red")
    os.setxattr(files / "dir/sub", "user.colour", b"blue")
    subprocess.run(["setfacl", "-m", "u:1234:r,d:u:1234:rx", files / "dir/sub"], check=True)
    subprocess.run(["setfacl", "-m", "u:1234:rw", files / "dir/sub/two"], check=True)
    for path, uid, mode, when in (("dir/one", 1000, 0o4750, 1), ("dir/sub/two", 1001, 0o664, 2), ("dir/sub", 1002, 0o2775, 3)):
        os.chown(files / path, uid, uid + 1)
        os.chmod(files / path, mode)
        os.utime(files / path, ns=(5, when * 10**9 + 7))
    os.chown(files / "dir/link", 1003, 1003, follow_symlinks=False)
    os.utime(files / "dir/link", ns=(5, 6), follow_symlinks=False)
    with open(files / "dir/sparse", "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"x" * 4096)
    os.utime(files / "dir", ns=(5, 11))


def seen(top: Path) -> dict[str, tuple[object, ...]]:
    """All that is in ``top``, itself, too: what each is, holds and belongs to it."""
    top = Path(os.path.realpath(top))
    found: dict[str, tuple[object, ...]] = {}
    names: dict[int, list[str]] = {}
    for directory, directories, files in os.walk(top):
        for path in [directory, *(f"{directory}/{name}" for name in files)] + [
            f"{directory}/{name}" for name in directories if os.path.islink(f"{directory}/{name}")
        ]:
            status = os.lstat(path)
            holds: object = ""
            if stat.S_ISREG(status.st_mode):
                holds = Path(path).read_bytes()
                if status.st_nlink > 1:
                    names.setdefault(status.st_ino, []).append(path)
            elif stat.S_ISLNK(status.st_mode):
                holds = os.readlink(path)
            attributes = {
                name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
            }
            found[os.path.relpath(path, top)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                status.st_mtime_ns,
                holds,
                sorted(attributes.items()),
            )
    for each in names.values():  # an overlay counts those of lower layers, too
        if len(each) == 1:
            continue
        key = os.path.relpath(min(each), top)
        found[key] = (*found[key], sorted(os.path.relpath(path, top) for path in each))
    return found


@pytest.fixture
def web(snapfs: Command) -> Path:
    """The files of the workspace ``web`` on ``base``, with a checkpoint."""
    files = Path(snapfs("prepare", "b").strip(), "rootfs")
    filled(files)
    snapfs("commit", "b", "base")
    return Path(snapfs("prepare", "web", "--parent", "base").strip(), "rootfs")


def keep(snapfs: Command, message: str) -> str:
    return snapfs("checkpoint", "web", "-m", message).strip()


def spoiled(files: Path) -> None:
    """What ``filled`` made, changed in every way."""
    (files / "etc/conf").write_text("changed\n")
    (files / "dir/one").write_text("changed\n")
    os.unlink(files / "dir/sub/two")
    os.unlink(files / "dir/link")
    os.mkdir(files / "dir/link")
    (files / "dir/link/in").write_text("a file stood here\n")
    os.unlink(files / "dir/fifo")
    (files / "dir/fifo").write_text("no fifo\n")
    os.unlink(files / "dir/socket")
    os.unlink(files / "dir/null")
    os.rmdir(files / "dir/sub/deep")
    (files / "dir/sub/deep").write_text("a directory stood here\n")
    (files / "dir/new/newer").mkdir(parents=True)
    (files / "dir/new/newer/file").write_text("new\n")
    os.chmod(files / "dir/sub", 0o700)
    os.removexattr(files / "dir/sub", "user.colour")
    os.setxattr(files / "dir/sub", "user.other", b"x")


def nothing_left(files: Path) -> None:
    assert [path for path in files.rglob("*") if path.name.startswith(PREFIX)] == []


# -- what is put back


def test_one_file(snapfs: Command, web: Path) -> None:
    (web / "etc/conf").write_text("1\n")
    os.chmod(web / "etc/conf", 0o640)
    os.chown(web / "etc/conf", 1000, 1001)
    os.utime(web / "etc/conf", ns=(1, 2))
    keep(snapfs, "one")
    before, others = seen(web / "etc"), seen(web / "dir")
    (web / "etc/conf").write_text("2\n")
    os.chmod(web / "etc/conf", 0o777)
    os.chown(web / "etc/conf", 0, 0)
    with open(web / "etc/conf") as reading:
        assert snapfs("restore", "web", "etc/conf") == "/etc/conf is as in web@1\n"
        assert reading.read() == "2\n", "who has it open reads on what was there"
    assert seen(web / "dir") == others
    assert seen(web / "etc")["conf"] == before["conf"]
    snapfs("restore", "web", "--from", "0", "etc/conf")
    assert (web / "etc/conf").read_text() == "0\n"
    snapfs("restore", "web", "--from", "web@1", "/etc/conf")
    assert (web / "etc/conf").read_text() == "1\n"
    nothing_left(web)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_whole_directory(snapfs: Command, web: Path, where: str) -> None:
    """With all that belongs to it, wherever its layers are; and what was not in it goes."""
    if where == "upper":
        subprocess.run(["cp", "-a", web / "dir", web / "copy"], check=True)
        subprocess.run(["rm", "-r", web / "dir"], check=True)
        os.rename(web / "copy", web / "dir")
    keep(snapfs, "one")
    before = seen(web / "dir")
    spoiled(web)
    snapfs("restore", "web", "dir")
    assert seen(web / "dir") == before
    assert (web / "etc/conf").read_text() == "changed\n"
    nothing_left(web)


def test_from_an_earlier_checkpoint(snapfs: Command, web: Path) -> None:
    """Where what has changed since is in lower layers, too."""
    keep(snapfs, "one")
    before = seen(web / "dir")
    spoiled(web)
    keep(snapfs, "two")
    snapfs("restore", "web", "--from", "1", "dir")
    assert seen(web / "dir") == before
    snapfs("restore", "web", "dir")
    assert seen(web / "dir") == seen(snapfs.mnt / "committed/web@2/rootfs/dir")
    nothing_left(web)


def test_what_is_as_it_was_is_left_alone(snapfs: Command, web: Path) -> None:
    keep(snapfs, "one")
    (web / "dir/sub/two").write_text("changed\n")
    snapfs("restore", "web", "dir")
    assert snapfs("diff", "--content", "web") == ""
    assert {line[2:] for line in snapfs("diff", "web").splitlines()} <= {"/dir", "/dir/sub", "/dir/sub/two", "/"}


@pytest.mark.parametrize("gone", ["dir", "dir/sub", "dir/sub/two"])
def test_what_is_gone(snapfs: Command, web: Path, gone: str) -> None:
    """Also the directories in which it was: as they were, with nothing else in them."""
    keep(snapfs, "one")
    before = seen(web / "dir")
    subprocess.run(["rm", "-r", web / gone], check=True)
    snapfs("restore", "web", "dir/sub/two")
    assert seen(web / "dir/sub")["two"] == before["sub/two"]
    assert os.stat(web / "dir/sub").st_mode == before["sub"][0]
    assert os.listdir(web / "dir/sub") == ["two"] or gone == "dir/sub/two"
    nothing_left(web)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_file_where_a_directory_stood(snapfs: Command, web: Path, layers: int) -> None:
    keep(snapfs, "one")
    before = seen(web)
    subprocess.run(["rm", "-r", web / "dir/sub", web / "dir/one"], check=True)
    (web / "dir/sub").write_text("a file\n")
    (web / "dir/one/below").mkdir(parents=True)
    (web / "dir/one/below/file").write_text("x\n")
    if layers == 2:
        keep(snapfs, "two")
    said = snapfs("restore", "web", "--from", "1", "dir/sub/two", status=1)
    assert "/dir/sub is no directory now, but was one: put that back, or move it away first" in said
    assert (web / "dir/sub").read_text() == "a file\n"
    snapfs("restore", "web", "--from", "1", "dir/sub", "dir/one")
    after = seen(web)
    assert after["dir/sub/two"] == before["dir/sub/two"]
    assert after["dir/one"][:5] == before["dir/one"][:5]
    nothing_left(web)


def test_while_it_is_in_use_and_from_where_one_stands(snapfs: Command, web: Path) -> None:
    keep(snapfs, "one")
    (web / "etc/conf").write_text("changed\n")
    words = [*SNAPFS, "restore", "web", "./conf"]
    environment = {**os.environ, "SNAPFS": str(snapfs.mnt), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, cwd=web / "etc", env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("/etc/conf is as in web@1\n", "")
    (web / "etc/conf").write_text("changed\n")
    snapfs("restore", "web", f"{web}/etc/conf")
    assert (web / "etc/conf").read_text() == "0\n"


def test_a_workspace_without_checkpoints(snapfs: Command, web: Path) -> None:
    """The last state that was kept is what it was made on; where there is none, it says so."""
    (web / "etc/conf").write_text("changed\n")
    assert snapfs("restore", "web", "etc/conf") == "/etc/conf is as in base\n"
    snapfs("prepare", "alone")
    assert '"alone" began empty' in snapfs("restore", "alone", "x", status=3)


# -- what is refused


def test_refusals(snapfs: Command, web: Path) -> None:
    keep(snapfs, "one")
    (web / "new").write_text("new\n")
    for words, said, status in (
        (["web", "new"], "/new is not in web@1, so there is nothing to put back", 3),
        (["web", "new/x"], "/new/x is not in web@1", 3),
        (["web", "etc/conf/x"], "/etc/conf/x is not in web@1", 3),
        (["web", "/"], "rollback web puts all of it back", 2),
        (["web", "../.."], "say which, and the path in it: snapfs restore KEY PATH", 3),
        (["web", "dir/link/x"], "/dir/link is a symbolic link: give the path that it leads to", 1),
        (["web", "--from", "7", "etc/conf"], '"web" has no checkpoint 7: snapfs checkpoint --list', 3),
        (["web", "--from", "none", "etc/conf"], 'snapshot "none" does not exist', 3),
        (["web", "--from", "web", "etc/conf"], '"web" is active, and no checkpoint', 3),
        (["web@1", "etc/conf"], '"web@1" is committed: a workspace is an active snapshot', 3),
        (["none", "etc/conf"], 'snapshot "none" does not exist', 3),
    ):
        assert said in snapfs("restore", *words, status=status)
    assert (web / "new").read_text() == "new\n"
    assert "PATH… is missing" in snapfs("restore", "web", status=2)
    nothing_left(web)


def test_what_can_not_be_written(snapfs: Command, web: Path) -> None:
    """An immutable file in the midst of a directory: what was done before that is undone."""
    keep(snapfs, "one")
    spoiled(web)
    before = seen(web)
    subprocess.run(["chattr", "+i", web / "dir/fifo"], check=True)
    try:
        said = snapfs("restore", "web", "dir", status=6)
        assert "cannot put /dir back, nothing of it was changed: /dir/fifo: Operation not permitted" in said
        assert without_times(seen(web)) == without_times(before)
    finally:
        subprocess.run(["chattr", "-i", web / "dir/fifo"], check=True)
    nothing_left(web)


def without_times(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """Without those of directories, of which entries have come and gone."""
    return {path: what if not stat.S_ISDIR(what[0]) else what[:4] + what[5:] for path, what in found.items()}  # type: ignore[arg-type]


def test_what_is_mounted_there(snapfs: Command, web: Path) -> None:
    """It is refused, and its server is not asked; beside it all goes on."""
    keep(snapfs, "one")
    spoiled(web)
    with unanswering(web / "dir/new/newer"):
        for path in ("dir", "dir/new/newer", "dir/new/newer/x"):
            said = snapfs("restore", "web", path, status=5)
            assert f"cannot put /{path} back: something is mounted on {os.path.realpath(web)}/dir/new/newer" in said
        snapfs("restore", "web", "dir/sub/two")
        assert (web / "dir/sub/two").read_text() == "two\n"
    assert (web / "dir/new/newer/file").read_text() == "new\n"
    nothing_left(web)


def test_a_full_disk(make_daemon: Make, small_disk: Path) -> None:
    """In the middle of a copy: nothing has changed, and nothing is left; also of one file that is there."""
    daemon = make_daemon(root=small_disk / "root").start()
    snapfs = Command(daemon.mnt)
    web = Path(snapfs("prepare", "web").strip(), "rootfs")
    (web / "dir").mkdir()
    (web / "dir/small").write_text("1\n")
    (web / "dir/large").write_bytes(os.urandom(3 << 20))
    keep(snapfs, "one")
    (web / "dir/small").write_text("2\n")
    (web / "dir/large").write_text("short\n")
    with open(web / "fill", "wb", buffering=0) as fill, pytest.raises(OSError, match="No space left"):
        while True:
            fill.write(b"x" * (1 << 20))
    for path in ("dir", "dir/large"):
        said = snapfs("restore", "web", path, status=1)
        assert f"cannot put /{path} back, nothing of it was changed" in said
        assert "No space left on device" in said
    assert (web / "dir/small").read_text() == "2\n"
    assert (web / "dir/large").read_text() == "short\n"
    nothing_left(web)
    (web / "fill").unlink()
    snapfs("restore", "web", "dir")
    assert (web / "dir/large").stat().st_size == 3 << 20


# -- without a tree: two directories, and calls that end in between


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Path, Path, int, int]]:
    """What was, and what is, and both open."""
    was, now = tmp_path / "was", tmp_path / "now"
    was.mkdir()
    filled(was)
    subprocess.run(["cp", "-a", was, now], check=True)
    spoiled(now)
    fds = [os.open(path, inside.FLAGS) for path in (was, now)]
    yield was, now, fds[0], fds[1]
    for fd in fds:
        os.close(fd)


class Renames:
    """renameat2(2), of which one call fails, and which doesn't move the directories with the inodes ``fixed``."""

    def __init__(self, fails: int, fixed: set[int]) -> None:
        self.left = fails
        self.fixed = fixed
        self.plain = libc.rename

    def __call__(self, name: str, directory: int, new: str, there: int, flags: int) -> None:
        moved = [(name, directory), *[(new, there)] * (flags == libc.RENAME_EXCHANGE)]
        if self.fixed & {os.lstat(f"/proc/self/fd/{fd}/{each}").st_ino for each, fd in moved}:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.plain(name, directory, new, there, flags)


@pytest.mark.parametrize("moves_directories", [True, False])
def test_each_rename_refused(
    sides: tuple[Path, Path, int, int], monkeypatch: pytest.MonkeyPatch, moves_directories: bool
) -> None:
    """Whichever step fails, those before it are undone; also where directories can't be moved, as in lower layers."""
    was, now, source, target = sides
    before = without_times(seen(now))
    for nth in range(1, 100):
        fixed = set() if moves_directories else {os.lstat(path).st_ino for path, _, _ in os.walk(now)}
        renames = Renames(nth, fixed)
        with monkeypatch.context() as patched:
            patched.setattr(libc, "rename", renames)
            try:
                restore(source, target, ["dir"], flush=False)
            except OSError as error:
                assert error.errno == errno.EIO
            else:
                break
        assert without_times(seen(now)) == before
        nothing_left(now)
    assert 5 < nth < 99
    assert seen(now / "dir") == seen(was / "dir")
    nothing_left(now)


KILLED = """
import os, signal, sys
from snapfs.kernel import libc
from snapfs.scan.restoring import restore
plain, left = libc.rename, int(sys.argv[3])
def rename(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(*arguments)
libc.rename = rename
restore(*(os.open(path, os.O_RDONLY) for path in sys.argv[1:3]), ["dir"], flush=False)
"""


def test_killed_between_two_renames(sides: tuple[Path, Path, int, int]) -> None:
    """Each file is whole, as it was or as it is to be; nothing of it is lost, and the same again makes an end of it."""
    was, now, source, target = sides
    versions = [holds(was), holds(now)]
    for nth in range(1, 100):
        done = subprocess.run([sys.executable, "-c", KILLED, was, now, str(nth)], check=False)
        for path, text in holds(now).items():
            if PREFIX not in path:
                assert text in [each.get(path) for each in versions], path
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        restore(source, target, ["dir"], flush=False)
        assert seen(now / "dir") == seen(was / "dir")
        nothing_left(now)
        subprocess.run(["rm", "-r", now / "etc"], check=True)
        (now / "etc").mkdir()
        spoiled(now)
    assert 5 < nth < 99


def holds(top: Path) -> dict[str, str]:
    """What each regular file holds, but for one that is large."""
    return {
        str(path.relative_to(top)): path.read_text()
        for path in top.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "sparse"
    }


def test_deeper_than_a_path_may_be_long(sides: tuple[Path, Path, int, int]) -> None:
    was, now, source, target = sides
    name, ends = "d" * 100, list[os.stat_result]()
    for top, is_new in ((was, True), (now, False)):
        with ExitStack() as opened:
            if not is_new:
                restore(source, target, ["dir"], flush=False)
            here = os.open(top / "dir", os.O_RDONLY)
            opened.callback(os.close, here)
            for _ in range(60):
                if is_new:
                    os.mkdir(name, dir_fd=here)
                here = os.open(name, os.O_RDONLY, dir_fd=here)
                opened.callback(os.close, here)
            if is_new:
                os.link(was / "dir/one", "bottom", dst_dir_fd=here)
            ends.append(os.stat("bottom", dir_fd=here))
            assert os.path.samestat(ends[-1], os.stat(top / "dir/one"))
    assert ends[0].st_mtime_ns == ends[1].st_mtime_ns
    nothing_left(now / "dir/sub")


def test_no_link_is_followed(sides: tuple[Path, Path, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that stands where a directory stood, nor one that comes meanwhile."""
    was, now, source, target = sides
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "sub/two").write_text("another's\n")
    subprocess.run(["rm", "-r", now / "dir/sub"], check=True)
    (now / "dir/sub").symlink_to(outside / "sub")
    before = seen(outside)
    with pytest.raises(NotRestored, match="/dir/sub is no directory now"):
        restore(source, target, ["dir", "sub", "two"], flush=False)
    restore(source, target, ["dir"], flush=False)
    assert seen(now / "dir") == seen(was / "dir")
    plain = restoring._Restoring._carry_out

    def swapped(self: restoring._Restoring, beside: restoring._Beside) -> None:
        os.rename(now / "dir", now / "moved")
        (now / "dir").symlink_to(outside)
        plain(self, beside)

    (now / "dir/sub/two").unlink()
    monkeypatch.setattr(restoring._Restoring, "_carry_out", swapped)
    restore(source, target, ["dir", "sub", "two"], flush=False)
    assert (now / "moved/sub/two").read_text() == "two\n"
    assert seen(outside) == before


def test_what_a_killed_one_left_is_removed_by_the_next(sides: tuple[Path, Path, int, int]) -> None:
    """But not what one has that goes on."""
    was, now, source, target = sides
    script = "import os, sys; from snapfs.scan import restoring\n"
    script += "restoring._Restoring._carry_out = lambda *_: (print('ready', flush=True), __import__('time').sleep(60))\n"
    script += "fds = [os.open(p, os.O_RDONLY) for p in sys.argv[1:3]]; restoring.restore(*fds, ['dir'], flush=False)\n"
    with subprocess.Popen([sys.executable, "-c", script, was, now], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (left,) = [path for path in now.iterdir() if path.name.startswith(PREFIX)]
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
        restore(source, target, ["etc"], flush=False)
        assert left.exists()
        process.send_signal(signal.SIGTERM)  # it waits for the end of the renames
        process.kill()
    (now / f"{left.name}.new").write_text("what was to be renamed next\n")
    (now / f"{PREFIX}of another.new").mkdir()
    restore(source, target, ["etc"], flush=False)
    assert [path.name for path in now.iterdir() if path.name.startswith(PREFIX)] == [f"{PREFIX}of another.new"]
    assert (now / "dir/one").read_text() == "changed\n"


def test_flushing(sides: tuple[Path, Path, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the renames, and after them; not where nothing is to be flushed."""
    _, _, source, target = sides
    calls: list[str] = []
    plain = os.rename

    def rename(name: str, new: str, **where: int) -> None:
        calls.append("rename")
        plain(name, new, **where)

    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]))
    monkeypatch.setattr(os, "rename", rename)
    restore(source, target, ["etc", "conf"], flush=True)
    assert calls == ["0", "rename", "etc"]
    calls.clear()
    restore(source, target, ["etc", "conf"], flush=False)
    assert calls == ["rename"]


def test_what_another_makes_meanwhile_is_not_replaced(
    sides: tuple[Path, Path, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, now, source, target = sides
    os.unlink(now / "etc/conf")
    plain = restoring._Restoring._carry_out

    def late(self: restoring._Restoring, beside: restoring._Beside) -> None:
        (now / "etc/conf").write_text("another's\n")
        plain(self, beside)

    monkeypatch.setattr(restoring._Restoring, "_carry_out", late)
    with pytest.raises(FileExistsError):
        restore(source, target, ["etc", "conf"], flush=False)
    assert (now / "etc/conf").read_text() == "another's\n"
    nothing_left(now)


AS_A_USER = """
import os, sys
from snapfs.scan.restoring import restore
try:
    restore(*(os.open(path, os.O_RDONLY) for path in sys.argv[1:3]), ["dir"], flush=False)
except OSError as error:
    print(error.filename, error.strerror)
"""


@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [(0, 0o600, "/dir/it Permission denied"), (0, 0o644, "/dir/it Operation not permitted"), (61234, 0o400, "")],
)
def test_what_a_user_can_not_read_or_make_as_it_was(open_path: Path, owner: int, mode: int, said: str) -> None:
    """Another's file stays another's: it is refused, rather than made one of the user's own."""
    sides = [open_path / name for name in ("was", "now")]
    for side in sides:
        (side / "dir").mkdir(parents=True)
        (side / "dir/a").write_text(f"{side.name}\n")
        for path in (side, side / "dir", side / "dir/a"):
            os.chown(path, 61234, 61234)
    (sides[0] / "dir/it").write_text("it\n")
    os.chmod(sides[0] / "dir/it", mode)
    os.chown(sides[0] / "dir/it", owner, owner)
    words = [*user(61234), sys.executable, "-c", AS_A_USER, *map(str, sides)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == said
    assert (sides[1] / "dir/a").read_text() == ("now\n" if said else "was\n")
    assert sorted(os.listdir(sides[1] / "dir")) == (["a"] if said else ["a", "it"])
    nothing_left(sides[1])


# -- an ordinary user


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_an_ordinary_user() -> None:
    """Through the daemon's namespaces; from inside of a workspace it is refused in words."""
    with home_of(alice) as home:
        home.daemon.start()
        with_workspace(home)
        home.snapfs("checkpoint", "w", "-m", "one")
        home.sh("echo changed > tree/active/w/rootfs/file; rmdir tree/active/w/rootfs/sub")
        assert home.snapfs("restore", "w", "file", "sub") == "/file is as in w@1\n/sub is as in w@1\n"
        assert home.sh("cat tree/active/w/rootfs/file; ls tree/active/w/rootfs") == "base\nfile\nsub\n"
        assert home.sh("cd tree/active/w/history; cat */file") == "base\n"
        home.sh("echo changed > tree/active/w/rootfs/file")
        shown = [line.split()[0] for line in home.snapfs("versions", home.mnt / "active/w/rootfs/file").splitlines()]
        assert shown == ["CHECKPOINTS", "0-1", "now"]
        by_path, by_key = (home.snapfs("versions", "--json", *words) for words in ([f"{home.rootfs('w')}/file"], ["w", "file"]))
        assert by_path == by_key
        inside_it = f"{' '.join(SNAPFS)} versions file; {' '.join(SNAPFS)} restore w file"
        said = home.inside("w", f"export PYTHONPATH={os.getcwd()}; {inside_it}", status=1)
        assert "0-1" in said
        assert "leave it first" in said
        assert os.stat(home.path).st_uid == ALICE
