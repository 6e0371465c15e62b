"""The plugin for pytest, by running pytest on the example, and on tests that go wrong: as root, and as a user without an
account, in each way in which copies are made."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.kernel import userns
from snapfs.testing import entering
from tests.mounts import loop_mounted
from tests.plugin import CLONE, FILL, NOBODY, Runner, as_user
from tests.processes import until
from tests.users import ALICE

pytestmark = pytest.mark.mounts

EXAMPLES = CLONE / "examples/pytest"

WAYS = ("overlay", "copy")

SAME = """
import os, pathlib, shutil, stat, subprocess, pytest

def fill(directory):
    (directory / "sub").mkdir(mode=0o750)
    (directory / "sub/file").write_text("hello")
    (directory / "sub/file").chmod(0o640)
    (directory / "script").write_text("#!/bin/sh\\necho ran\\n")
    (directory / "script").chmod(0o4755)
    (directory / "sticky").mkdir()
    (directory / "sticky").chmod(0o1777)
    (directory / "link").symlink_to("sub/file")
    (directory / "sparse").touch()
    os.truncate(directory / "sparse", 1 << 30)
    os.setxattr(directory / "sub", "user.mark", b"1")
    os.utime(directory / "sub/file", (1, 1))
    (directory / "locked").mkdir()
    (directory / "locked/file").touch()
    (directory / "locked").chmod(0o555)
    (directory / "secret").mkdir()
    (directory / "secret/file").write_text("secret")
    (directory / "secret/file").chmod(0)
    (directory / "secret").chmod(0)
    directory.chmod(0o2700)

@pytest.fixture
def copy(snapshot_of, fresh_copy):
    return fresh_copy(snapshot_of(fill))

def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)

def state(directory):
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = status.st_mode, status.st_size, status.st_uid
    return found

def test_it_is_as_it_was_filled(copy, snapshot_of):
    assert mode(copy) == 0o2700
    assert [mode(copy / name) for name in ("sub", "sub/file", "script", "sticky")] == [0o750, 0o640, 0o4755, 0o1777]
    assert os.readlink(copy / "link") == "sub/file"
    assert (copy / "sub/file").stat().st_mtime == 1
    assert os.getxattr(copy / "sub", "user.mark") == b"1"
    assert (copy / "sparse").stat().st_size == 1 << 30
    assert (copy / "sparse").stat().st_blocks == 0
    assert state(copy) == state(snapshot_of(fill))
    assert subprocess.run([copy / "script"], stdout=subprocess.PIPE, check=True).stdout == b"ran\\n"

def test_parents_can_be_walked_through(copy):
    for parent in list(copy.parents)[:4]:
        assert mode(parent) & 0o001, parent
    assert os.listdir(copy.parent) == [copy.name]

@pytest.mark.parametrize("again", range(2))
def test_all_may_be_changed(copy, snapshot_of, again):
    (copy / "sub/file").write_text("changed")
    (copy / "new").write_text("new")
    (copy / "sub/file").rename(copy / "sub/other")
    (copy / "sticky").rmdir()
    (copy / "link").unlink()
    assert sorted(os.listdir(copy)) == ["locked", "new", "script", "secret", "sparse", "sub"]
    assert (snapshot_of(fill) / "sub/file").read_text() == "hello"

def test_it_may_be_removed(copy):
    for name in ("locked", "secret"):
        (copy / name).chmod(0o755)
    shutil.rmtree(copy)
    assert not copy.exists()

def test_what_nobody_may_read(copy):
    assert mode(copy / "secret") == 0
    (copy / "secret").chmod(0o700)
    assert mode(copy / "secret/file") == 0
    if os.getuid():
        with pytest.raises(PermissionError):
            (copy / "secret/file").read_text()
    (copy / "secret/file").chmod(0o600)
    assert (copy / "secret/file").read_text() == "secret"

def test_two_copies(snapshot_of, fresh_copy):
    one, two = (fresh_copy(snapshot_of(fill)) for _ in range(2))
    (one / "sub/file").unlink()
    assert (two / "sub/file").read_text() == "hello"
    assert fresh_copy.changes(one) == ["D /sub/file"]
    assert fresh_copy.changes(two) == []

def test_reset(copy, fresh_copy, snapshot_of):
    for _ in range(3):
        (copy / "new").write_text("new")
        shutil.rmtree(copy / "sub")
        (copy / "script").chmod(0o600)
        assert fresh_copy.changes(copy) == ["A /new", "C /script", "D /sub"]
        fresh_copy.reset()
        assert fresh_copy.changes(copy) == []
        assert state(copy) == state(snapshot_of(fill))

def test_reset_of_one(snapshot_of, fresh_copy):
    one, two = (fresh_copy(snapshot_of(fill)) for _ in range(2))
    (one / "new").touch()
    (two / "new").touch()
    fresh_copy.reset(one)
    assert not (one / "new").exists()
    assert (two / "new").exists()

@pytest.fixture(scope="class")
def directory(snapshot_of, class_fresh_copy):
    return class_fresh_copy(snapshot_of(fill))

class TestClass:
    def test_one(self, directory):
        (directory / "of the class").touch()

    def test_two(self, directory, class_fresh_copy):
        assert (directory / "of the class").exists()
        class_fresh_copy.reset()
        assert not (directory / "of the class").exists()
        type(self).seen = directory

def test_that_of_the_class_is_gone():
    assert not TestClass.seen.exists()

@pytest.fixture(scope="module")
def module_directory(snapshot_of, module_fresh_copy):
    return module_fresh_copy(snapshot_of(fill))

def test_module_one(module_directory):
    (module_directory / "of the module").touch()

def test_module_two(module_directory):
    assert (module_directory / "of the module").exists()

def test_a_base_by_the_way(fresh_copy):
    assert (fresh_copy(fill) / "sub/file").read_text() == "hello"

def test_who_it_is(copy):
    assert (copy / "sub/file").stat().st_uid == os.getuid() == WHO
    assert (copy / "sub/file").stat().st_gid == os.getgid()
"""


@pytest.fixture
def short_path(users: None) -> Iterator[Path]:
    """A directory with a path that leaves room for a server's socket."""
    with tempfile.TemporaryDirectory(prefix="t-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(params=[0, NOBODY], ids=["root", "user"])
def runner(request: pytest.FixtureRequest, open_path: Path) -> Runner:
    return Runner(open_path, uid=request.param)


@pytest.fixture
def user(open_path: Path) -> Runner:
    return Runner(open_path, uid=NOBODY)


@pytest.mark.parametrize(
    ("who", "options"),
    [(0, ("--snapfs=auto",)), (ALICE, ("--snapfs=copy",)), (ALICE, ("-n2",))],
    ids=["root alone", "user copy", "user xdist"],
)
@pytest.mark.parametrize(("recipe", "tests"), [("shop", 5), ("postgres", 4), ("git", 3)], ids=["sqlite", "postgresql", "git"])
def test_the_recipes(recipe: str, tests: int, who: int, options: tuple[str, ...], users: None, short_path: Path) -> None:
    said = Runner(short_path, uid=who)(*options, tests=EXAMPLES / f"test_{recipe}.py", status=0)
    assert f" {tests} passed in" in said


def test_the_recipe_for_a_site(users: None, open_path: Path) -> None:
    """On a disk of its own: where there is no journal, ext4 takes minutes to make as many files as were just removed."""
    runner = Runner(open_path, uid=ALICE)
    with disk(runner, "mkfs.ext4", "-N", "200000", size=1 << 30), runner.started(tests=EXAMPLES / "test_site.py") as process:
        said, _ = process.communicate(timeout=300)
        assert " 3 passed in" in said
        assert runner.left() == []


@contextmanager
def disk(runner: Runner, *mkfs: str, size: int) -> Iterator[None]:
    """The directory for temporary files is on a disk of its own."""
    image = runner.tmp_path / "image"
    image.touch()
    os.truncate(image, size)
    subprocess.run([*mkfs, "-q", str(image)], check=True)
    with loop_mounted(image, runner.temporary):
        os.chown(runner.temporary, runner.uid, runner.uid)
        yield


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_the_same(way: str, runner: Runner) -> None:
    runner.write(test_it=SAME.replace("WHO", str(runner.uid)))
    said = runner(f"--snapfs={way}", status=0)
    assert "16 passed" in said
    assert f"snapfs: copies are {'overlays' if way == 'overlay' else 'whole copies (as was asked for)'}" in said


def test_reflinks_give_the_same(runner: Runner) -> None:
    """On a file system that has them; big files take no space."""
    with disk(runner, "mkfs.btrfs", size=256 << 20):
        big = (
            "\ndef big(directory):\n    (directory / 'big').write_bytes(os.urandom(100 << 20))\n"
            "def test_big(snapshot_of, fresh_copy):\n"
            "    for _ in range(4):\n        assert (fresh_copy(snapshot_of(big)) / 'big').stat().st_size == 100 << 20\n"
        )
        runner.write(test_it=SAME.replace("WHO", str(runner.uid)) + big)
        with runner.started("--snapfs=reflink") as process:
            said, _ = process.communicate(timeout=120)
        assert "17 passed" in said
        assert "snapfs: copies are whole copies by reflinks (as was asked for)" in said
        assert runner.left() == []


# -- what it says, and why


HEADER = "def test_it(fresh_copy):\n    pass\n"


def header(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("snapfs: ")]
    assert len(lines) == 1, said
    return lines[0]


def test_the_line_that_says_how(runner: Runner) -> None:
    runner.write(test_it=HEADER, conftest="# snapshot_of is used here\n")
    where = " (in a user namespace of these tests)" if runner.uid else ""
    assert header(runner()) == f"snapfs: copies are overlays{where}"
    said = runner("-n2", status=0)
    assert header(said) == f"snapfs: copies are overlays{where}"
    assert said.index("snapfs:") < said.index("1 passed")
    runner.write(conftest="")
    assert header(runner()) == f"snapfs: copies are overlays{where}", "once it is known that a test wants copies"


def test_nobody_wants_it(runner: Runner) -> None:
    """Then no namespace is entered, no word said, and nothing else of snapfs imported."""
    runner.write(
        test_it="import os, sys\n"
        "def test_it():\n"
        "    for kind in ('mnt', 'user'):\n"
        "        assert os.readlink(f'/proc/self/ns/{kind}') == os.readlink(f'/proc/{os.getppid()}/ns/{kind}')\n"
        "    loaded = {name for name in sys.modules if name.partition('.')[0] == 'snapfs'}\n"
        "    assert loaded == {'snapfs', 'snapfs.testing', 'snapfs.testing.plugin'}\n"
    )
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(runner.tests)]
    program = f"import subprocess, sys; sys.exit(subprocess.run({pytest_run!r}).returncode)"
    done = subprocess.run(
        runner.command(sys.executable, "-c", program),
        env={**os.environ, "PYTHONPATH": str(CLONE), "HOME": "/nonexistent", "TMPDIR": str(runner.temporary)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "snapfs" not in done.stdout


def test_loading_it_takes_no_time() -> None:
    """It is loaded for everybody who has snapfs: less than 20 ms, at best."""
    program = (
        "import pytest, time; began = time.perf_counter(); import snapfs.testing, snapfs.testing.plugin; "
        "print((time.perf_counter() - began) * 1000)"
    )
    taken = [float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) for _ in range(5)]
    assert min(taken) < 20


def test_all_that_pytest_tells_without_tests(user: Runner) -> None:
    """It enters nothing for that."""
    user.write(test_it=HEADER, conftest="# fresh_copy\n")
    assert "--snapfs-keep" in user("--help")
    assert "snapshot_of" in user("--fixtures")
    assert "test_it" in user("--collect-only", "-q")
    assert "snapfs: copies" not in user("--collect-only")


THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"


def test_threads_that_run_already(user: Runner) -> None:
    user.write(test_it=HEADER, conftest=THREAD)
    assert "no overlay, for threads were running already" in header(user(status=0))
    assert "snapfs = overlay" in header(user())
    (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs = overlay\n")
    assert header(user(status=0)) == "snapfs: copies are overlays (in a user namespace of these tests)"


def test_threads_that_run_already_see_the_copies_of_root(open_path: Path) -> None:
    """Then root's copies are mounted where everybody sees them; and go even so."""
    runner = Runner(open_path)
    runner.write(
        test_it=FILL + "def test_it(snapshot_of, fresh_copy, seen_by_thread):\n"
        "    assert seen_by_thread(fresh_copy(snapshot_of(fill)) / 'file')\n",
        conftest="import concurrent.futures, os, pytest\n"
        "pool = concurrent.futures.ThreadPoolExecutor(1)\npool.submit(print).result()\n"
        "@pytest.fixture\ndef seen_by_thread():\n    return lambda path: pool.submit(path.exists).result()\n",
    )
    assert "1 passed" in runner(status=0)


def test_xdist_where_nothing_says_that_copies_are_wanted(user: Runner) -> None:
    """The workers can't enter a user namespace; the end of the run says how to have it."""
    fixture = "@pytest.fixture\ndef work(snapshot_of, fresh_copy):\n    return fresh_copy(snapshot_of(fill))\n"
    user.write(
        helpers=f"import pytest\n{FILL}{fixture}", test_it='pytest_plugins = "helpers"\n\ndef test_it(work):\n    pass\n'
    )
    said = user("-n2", status=0)
    assert "snapfs = overlay in pytest.ini" in header(said)


IN_NAMESPACE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
here, there = os.pipe()
ready, done = os.pipe()
child = os.fork()
if not child:
    assert not libc.unshare(0x10000000)
    os.write(there, b"x")
    os.read(ready, 1)
    open("/proc/sys/user/%s" % sys.argv[1], "w").write("0")
    os.execvp(sys.argv[2], sys.argv[2:])
os.read(here, 1)
for name in ("uid_map", "gid_map"):
    open(f"/proc/{child}/{name}", "w").write("0 0 100000")
os.write(done, b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""A command in a user namespace with all users, but with one kind of namespace fewer."""

FILTERED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
assert not libc.prctl(38, 1, 0, 0, 0)
assert not libc.prctl(22, 2, ctypes.byref((ctypes.c_void_p * 2)(len(code), ctypes.addressof(program))), 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""A command that unshare(2) is refused, as a container's seccomp profile does."""

WITHOUT_RIGHTS = "import os, sys; os.execvp('setpriv', ['setpriv', '--bounding-set=-sys_admin', *sys.argv[1:]])"


@pytest.mark.parametrize(
    ("through", "uid", "words"),
    [
        ([IN_NAMESPACE, "max_user_namespaces"], NOBODY, "the limit user.max_user_namespaces is reached"),
        ([IN_NAMESPACE, "max_mnt_namespaces"], NOBODY, "the limit user.max_mnt_namespaces is reached"),
        ([WITHOUT_RIGHTS], 0, "this container may not mount: give it CAP_SYS_ADMIN"),
        ([FILTERED], NOBODY, "user namespaces are forbidden here (Operation not permitted)"),
        ([FILTERED], 0, "mount namespaces are forbidden here (Operation not permitted)"),
    ],
    ids=["no user namespace left", "no mount namespace left", "root without rights", "filter", "filter for root"],
)
def test_why_there_is_no_overlay(through: list[str], uid: int, words: str, open_path: Path) -> None:
    """Each refusal of the kernel's has its sentence, and the tests pass all the same."""
    runner = Runner(open_path, uid=uid, through=[sys.executable, "-c", *through])
    runner.write(test_it=SAME.replace("WHO", str(runner.uid)), conftest="# fresh_copy\n")
    said = runner(status=0)
    assert header(said).startswith("snapfs: copies are whole copies (no overlay, for ")
    assert words in header(said)


def test_what_can_not_be_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """AppArmor's way, and Debian's switch: by the errors that the kernel was seen to give."""
    monkeypatch.setattr(userns, "sysctl", lambda name: "1" if "apparmor" in name else "0")
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    for step in ("setgroups", "map", "mounts"):
        assert "examples/apparmor/snapfs" in entering._why(step, PermissionError(13, "Permission denied"), "/tmp/x")
    assert "unprivileged_userns_clone=1" in entering._why("user", PermissionError(1, "Operation not permitted"), "/tmp/x")


def test_a_temporary_directory_that_can_not_have_overlays() -> None:
    """It is named, and what was tried in it is not."""
    refused = OSError(22, "overlay: filesystem on /run/x y/upper not supported as upperdir")
    place = tempfile.gettempdir()
    assert entering._why("overlay", refused, "/run/x y") == (
        f"the file system of {place} can't hold overlayfs's upper layers: put TMPDIR on ext4, xfs, btrfs or tmpfs, "
        f"in a container on a volume (overlay: filesystem on {place} not supported as upperdir)"
    )


def test_an_option_that_there_is_not(user: Runner) -> None:
    user.write(test_it=HEADER)
    (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs = best\n")
    assert "it is one of auto, overlay, reflink, copy" in user(status=4)
    (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs_cache_size = much\n")
    assert "give it as 500M or 5G" in user()


# -- what tests see in the namespace


@pytest.mark.parametrize("options", [(), ("-n1",)], ids=["alone", "xdist"])
def test_a_user_is_a_user_as_before(options: tuple[str, ...], user: Runner) -> None:
    """The uid is kept; what is not allowed to them is refused; programs have no capabilities; more namespaces can be made."""
    user.write(
        conftest="# fresh_copy\n",
        test_it="import os, pytest, subprocess\n"
        "def test_it(fresh_copy, tmp_path):\n"
        "    copy = fresh_copy(lambda directory: (directory / 'file').touch())\n"
        f"    assert os.getuid() == os.geteuid() == {NOBODY}\n"
        "    (tmp_path / 'closed').touch(mode=0)\n"
        "    with pytest.raises(PermissionError):\n        (tmp_path / 'closed').read_text()\n"
        "    with pytest.raises(PermissionError):\n        open('/etc/hostname', 'a')\n"
        "    with pytest.raises(PermissionError):\n        os.listdir('/proc/1/fd')\n"
        "    for status in ('/proc/self/status', ''):\n"
        "        lines = open(status).read() if status else subprocess.check_output(['cat', '/proc/self/status'], text=True)\n"
        "        sets = dict(line.split(':') for line in lines.splitlines() if line.startswith('Cap'))\n"
        "        for name in ('CapEff', 'CapInh', 'CapAmb', *(['CapPrm'] if not status else [])):\n"
        "            assert int(sets[name], 16) == 0, (status, sets)\n"
        "    assert subprocess.check_output(['unshare', '-Urm', 'id', '-u']) == b'0\\n'\n"
        "    bwrap = ['bwrap', '--bind', '/', '/', '--dev', '/dev', 'cat', str(copy / 'file')]\n"
        "    subprocess.run(bwrap, check=True)\n",
    )
    assert "1 passed" in user(*options, status=0)


def test_what_an_overlay_does_otherwise(runner: Runner) -> None:
    """As the README says; and what shutil does about it."""
    runner.write(
        test_it="import errno, os, pytest, shutil\n"
        "def fill(directory):\n    (directory / 'one').write_text('x')\n    os.link(directory / 'one', directory / 'two')\n"
        "    (directory / 'sub').mkdir()\n    (directory / 'sub/file').touch()\n"
        "@pytest.fixture\ndef copy(snapshot_of, fresh_copy):\n    return fresh_copy(snapshot_of(fill))\n"
        "def test_links(copy):\n"
        "    (copy / 'one').write_text('new')\n    assert (copy / 'two').read_text() == 'x'\n"
        "def test_directories(copy):\n"
        "    if os.getuid():\n"
        "        with pytest.raises(OSError) as refused:\n            (copy / 'sub').rename(copy / 'other')\n"
        "        assert refused.value.errno == errno.EXDEV\n        shutil.move(copy / 'sub', copy / 'other')\n"
        "    else:\n        (copy / 'sub').rename(copy / 'other')\n"
        "    assert os.listdir(copy / 'other') == ['file']\n"
    )
    assert "2 passed" in runner("--snapfs=overlay", status=0)


def test_who_does_not_see_the_mount_meets_an_error(user: Runner) -> None:
    """Another shell finds no empty directory where the copy is, but the copy through /proc."""
    user.write(
        test_it=FILL + "import pathlib, time\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        f"    copy = fresh_copy(snapshot_of(fill))\n    pathlib.Path({str(user.temporary / 'here')!r}).write_text(str(copy))\n"
        "    time.sleep(60)\n"
    )
    with user.started() as process:
        until((user.temporary / "here").exists, "the test has its copy")
        until((user.temporary / "here").read_text, "the test has told")
        copy = (user.temporary / "here").read_text()
        shown = subprocess.run(as_user(NOBODY, "ls", copy), capture_output=True, text=True, check=False)
        assert "No such file or directory" in shown.stderr
        pid = process.pid
        seen = subprocess.run(as_user(NOBODY, "ls", f"/proc/{pid}/root{copy}"), capture_output=True, text=True, check=False)
        assert seen.stdout == "file\n", seen.stderr


# -- what goes wrong


@pytest.mark.parametrize("way", WAYS)
def test_what_goes_wrong_is_told_and_leaves_nothing(way: str, runner: Runner) -> None:
    runner.write(
        test_it=FILL + "import subprocess\nheld = []\n"
        "def broken(directory):\n    raise RuntimeError('no data')\n"
        "async def never(directory):\n    pass\n"
        "def test_holds(snapshot_of, fresh_copy):\n    held.append(open(fresh_copy(snapshot_of(fill)) / 'file'))\n"
        "def test_after(snapshot_of, fresh_copy):\n    assert (fresh_copy(snapshot_of(fill)) / 'file').read_text() == 'x'\n"
        "def test_broken(snapshot_of):\n    snapshot_of(broken)\n"
        "def test_async(snapshot_of):\n    snapshot_of(never)\n"
        "def test_child(snapshot_of, fresh_copy):\n"
        "    held.append(subprocess.Popen(['sleep', '60'], cwd=fresh_copy(snapshot_of(fill))))\n"
        "def test_kill():\n    held[-1].kill(); held[-1].wait()\n"
        "def test_reset(snapshot_of, fresh_copy):\n"
        "    with open(fresh_copy(snapshot_of(fill)) / 'file'):\n        fresh_copy.reset()\n"
        "def test_garbage(snapshot_of, fresh_copy):\n"
        "    circle = [open(fresh_copy(snapshot_of(fill)) / 'file')]\n    circle.append(circle)\n"
        "def test_fails(snapshot_of, fresh_copy):\n"
        "    file = open(fresh_copy(snapshot_of(fill)) / 'file')\n    assert False, 'its own reason'\n"
    )
    said = runner(f"--snapfs={way}", "-W", "ignore", status=1)
    assert "5 passed" in said
    assert "4 failed" in said
    assert "2 errors" in said, "who fails has its file open with good reason"
    assert "is in use by process" in said
    assert "these tests themselves: file)" in said
    assert "(sleep)" in said
    assert "RuntimeError: no data" in said
    assert "never is async" in said


def test_a_directory(runner: Runner) -> None:
    (runner.tests / "data/sub").mkdir(parents=True)
    (runner.tests / "data/sub/file").write_text("hello")
    (runner.tests / "data/link").symlink_to("sub/file")
    runner.write(
        test_it="from pathlib import Path\n"
        "DATA = Path(__file__).parent / 'data'\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        "    assert snapshot_of(DATA) == snapshot_of(str(DATA))\n"
        "    copy = fresh_copy(snapshot_of(DATA))\n"
        "    assert (copy / 'link').read_text() == 'hello'\n"
        "    (copy / 'sub').rename(copy / 'sub') \n"
        "    (copy / 'sub/file').unlink()\n"
        "    (copy / 'sub/file').write_text('changed')\n"
        "    assert (DATA / 'sub/file').read_text() == 'hello'\n"
    )
    assert "1 passed" in runner(status=0)


def test_the_working_directory_has_no_modules_for_it(tmp_path: Path) -> None:
    """It may be anybody's: pytest itself takes none from there."""
    (tests := tmp_path / "tests").mkdir()
    (tests / "test_it.py").write_text(FILL + "def test_it(fresh_copy):\n    assert (fresh_copy(fill) / 'file').exists()\n")
    (hostile := tmp_path / "hostile").mkdir()
    for name in ("ctypes", "secrets", "inspect", "trio"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tests)]
    environment = {**os.environ, "PYTHONPATH": str(CLONE)}
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "1 passed" in done.stdout, done.stdout
    assert not (tmp_path / "ran").exists()


# -- how it ends


WAIT = "import pathlib, pytest, time\ndef wait(directory=None):\n    pathlib.Path({here!r}).touch()\n    time.sleep(60)\n"


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=["alone", "xdist"])
@pytest.mark.parametrize(
    "test",
    [
        "def test_it(snapshot_of, fresh_copy):\n    copy = fresh_copy(snapshot_of(fill))\n    wait(copy)\n",
        "def test_it(snapshot_of, fresh_copy):\n    file = open(fresh_copy(snapshot_of(fill)) / 'file')\n    wait()\n",
        "def test_it(snapshot_of):\n    snapshot_of(wait)\n",
        "def hold(directory):\n    file = open(directory / 'file', 'w')\n    wait()\n"
        "def test_it(snapshot_of):\n    snapshot_of(hold)\ndef test_next():\n    pass\n",
        "@pytest.fixture\ndef after(fresh_copy, snapshot_of):\n    yield fresh_copy(snapshot_of(fill))\n    wait()\n"
        "def test_it(after):\n    pass\n",
    ],
    ids=["in a test", "in a test with a file open", "in a base", "in a base with a file open", "in a fixture's end"],
)
def test_ctrl_c_ends_it_in_order(test: str, options: tuple[str, ...], runner: Runner) -> None:
    here = runner.temporary / "here"
    runner.write(test_it=FILL + WAIT.format(here=str(here)) + test, conftest="# fresh_copy\n")
    said = runner("-q", *options, interrupted_at=here, status=pytest.ExitCode.INTERRUPTED)
    assert "KeyboardInterrupt" in said
    if "-n2" not in options:
        assert "Traceback" not in said
        assert len(said.splitlines()) < 15, said


@pytest.mark.parametrize("victim", ["alone", "controller", "worker"])
def test_killed(victim: str, runner: Runner) -> None:
    """What is left takes no lock, and the next run removes it; a worker's goes with its own run."""
    here = runner.temporary / "here"
    runner.write(
        conftest="# fresh_copy\n",
        test_it=FILL + "import os, pathlib, time\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        f"    copy, here = fresh_copy(snapshot_of(fill)), pathlib.Path({str(here)!r})\n    (copy / 'new').touch()\n"
        "    if not here.exists():\n"
        "        here.with_suffix('.new').write_text(str(os.getpid()))\n        here.with_suffix('.new').rename(here)\n"
        "        time.sleep(60)\n",
    )
    with runner.started(*(() if victim == "alone" else ("-n2",))) as process:
        until(here.exists, "a test runs")
        pid = int(here.read_text())
        assert len(runner.left()) == 1
        if victim == "worker":
            os.kill(pid, 9)
            said, _ = process.communicate(timeout=60)
            assert "crashed while running" in said
        else:
            process.kill()
            process.communicate(timeout=60)
            until(lambda: not Path(f"/proc/{pid}").exists(), "the worker has ended")
            assert len(runner.left()) == 1
            runner.write(test_it=HEADER)
            runner(status=0)
    runner.nothing_is_left()


def test_the_next_run_leaves_alone_what_is_in_use(runner: Runner) -> None:
    here = runner.temporary / "here"
    runner.write(
        test_it=FILL + "import pathlib, time\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        f"    copy, here = fresh_copy(snapshot_of(fill)), pathlib.Path({str(here)!r})\n"
        "    if not here.exists():\n        here.touch()\n"
        "        while here.exists():\n            time.sleep(0.01)\n"
        "        assert (copy / 'file').read_text() == 'x'\n",
    )
    with runner.started() as process:
        until(here.exists, "a test runs")
        with runner.started() as second:
            assert "1 passed" in second.communicate(timeout=60)[0]
        here.unlink()
        assert "1 passed" in process.communicate(timeout=60)[0]
    runner.nothing_is_left()


def test_what_is_not_ours_is_left_alone(user: Runner) -> None:
    """A directory of that name that another user has made, or a link, is neither used nor removed."""
    (user.temporary / "snapfs-testing-other").mkdir()
    (user.temporary / "snapfs-testing-link").symlink_to(user.tests)
    user.write(test_it=HEADER)
    with user.started() as process:
        assert "1 passed" in process.communicate(timeout=60)[0]
    assert sorted(user.left()) == ["snapfs-testing-link", "snapfs-testing-other"]


# -- asyncio, trio


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=["alone", "xdist"])
def test_async_tests(options: tuple[str, ...], runner: Runner) -> None:
    runner.every_plugin = True
    runner.write(
        test_it=FILL + "import asyncio, pytest, trio\n"
        "async def changed(copy, run):\n"
        "    await run((copy / 'file').write_text, 'new')\n"
        "    assert await run((copy / 'file').read_text) == 'new'\n"
        "@pytest.fixture\ndef copy(snapshot_of, fresh_copy):\n    return fresh_copy(snapshot_of(fill))\n"
        "@pytest.mark.asyncio\nasync def test_asyncio(copy):\n    await changed(copy, asyncio.to_thread)\n"
        "@pytest.mark.trio\nasync def test_trio(copy):\n    await changed(copy, trio.to_thread.run_sync)\n"
        "@pytest.mark.trio\nasync def test_made_within(snapshot_of, fresh_copy):\n"
        "    await changed(fresh_copy(snapshot_of(fill)), trio.to_thread.run_sync)\n"
        "def test_plain(copy):\n    assert (copy / 'file').read_text() == 'x'\n",
        conftest="# fresh_copy\n",
    )
    assert "4 passed" in runner(*options, status=0)


# -- what it costs


@pytest.mark.alone
def test_a_copy_takes_three_milliseconds(runner: Runner) -> None:
    """Setup and teardown of a small base, at best: as the README says.  In memory, so that no disk is measured."""
    runner.temporary = Path(tempfile.mkdtemp(dir="/dev/shm"))
    os.chown(runner.temporary, runner.uid, runner.uid)
    runner.write(
        test_it="import pytest, time\n"
        "def fill(directory):\n    for number in range(10):\n        (directory / str(number)).write_text('x' * 1000)\n"
        "taken = []\n"
        "@pytest.fixture\ndef clock():\n    times = [time.perf_counter()]\n    yield times\n"
        "    taken.append(times[1] - times[0] + time.perf_counter() - times[2])\n"
        "@pytest.fixture\ndef copy(clock, snapshot_of, fresh_copy):\n    made = fresh_copy(snapshot_of(fill))\n"
        "    clock.append(time.perf_counter())\n    yield made\n    clock.append(time.perf_counter())\n"
        "@pytest.mark.parametrize('number', range(60))\n"
        "def test_it(copy, number):\n    (copy / 'new').touch()\n"
        "def test_taken():\n    assert sorted(taken)[6] < 0.003, sorted(taken)\n"
    )
    assert "61 passed" in runner(status=0)
