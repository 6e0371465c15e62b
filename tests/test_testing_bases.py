"""The plugin for pytest: a base is made once for all workers, is kept by --snapfs-cache as long as it is good, and what it
depends on."""

from __future__ import annotations

import collections
import copy
import datetime
import enum
import functools
import importlib
import linecache
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from snapfs.testing import copying, digests
from tests.plugin import CLONE, FILL, NOBODY, Runner
from tests.processes import until

pytestmark = pytest.mark.mounts


@pytest.fixture(params=[0, NOBODY], ids=["root", "user"])
def runner(request: pytest.FixtureRequest, open_path: Path) -> Runner:
    return Runner(open_path, uid=request.param)


@pytest.fixture
def user(open_path: Path) -> Runner:
    return Runner(open_path, uid=NOBODY)


def counting(runner: Runner, text: str = "x", more: str = "") -> str:
    """A test whose base notes in a file each time that it is made."""
    return (
        "import os, pytest\n"
        f"{more}"
        "def helper():\n"
        f"    return {text!r}\n"
        "def fill(directory):\n"
        f"    with open({str(runner.temporary / 'made')!r}, 'a') as made:\n        made.write('made ')\n"
        "    (directory / 'file').write_text(helper())\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_it(snapshot_of, fresh_copy, number):\n"
        "    copy = fresh_copy(snapshot_of(fill))\n"
        f"    assert (copy / 'file').read_text() == {text!r}\n    (copy / 'file').write_text('other')\n"
    )


def made(runner: Runner) -> int:
    """How often the base was made."""
    return (runner.temporary / "made").read_text().count("made")


@pytest.mark.parametrize("way", ["overlay", "copy"])
def test_a_base_is_made_once_for_all_workers(way: str, runner: Runner) -> None:
    runner.write(test_it=counting(runner))
    assert "6 passed" in runner("-n3", f"--snapfs={way}", status=0)
    assert made(runner) == 1


def test_bases_that_differ_are_not_taken_for_each_other(runner: Runner) -> None:
    """Of one function's source, but with other values in it."""
    runner.write(
        test_it="import functools, pytest\n"
        "def of(text):\n    return lambda directory: (directory / 'file').write_text(text)\n"
        "def fill(directory, text):\n    (directory / 'file').write_text(text)\n"
        "class Filled:\n"
        "    def __init__(self, text):\n        self.text = text\n"
        "    def fill(self, directory):\n        (directory / 'file').write_text(self.text)\n"
        "makers = [of, lambda text: functools.partial(fill, text=text), lambda text: Filled(text).fill]\n"
        "@pytest.mark.parametrize('text', ['a', 'b', 'c'])\n"
        "@pytest.mark.parametrize('make', makers)\n"
        "def test_it(snapshot_of, fresh_copy, text, make):\n"
        "    assert (fresh_copy(snapshot_of(make(text))) / 'file').read_text() == text\n"
    )
    assert "9 passed" in runner("-n2", status=0)


def test_a_worker_that_is_killed_while_it_makes_a_base(runner: Runner) -> None:
    """Another one makes it anew."""
    runner.write(
        conftest="# fresh_copy\n",
        test_it="import os, pathlib, pytest\n"
        f"here = pathlib.Path({str(runner.temporary / 'here')!r})\n"
        "def fill(directory):\n    (directory / 'file').touch()\n"
        "    if not here.exists():\n        here.touch()\n        os.kill(os.getpid(), 9)\n"
        "    (directory / 'whole').touch()\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_it(snapshot_of, number):\n    assert sorted(os.listdir(snapshot_of(fill))) == ['file', 'whole']\n",
    )
    said = runner("-n2", status=1)
    assert "3 passed" in said
    assert "1 failed" in said


def test_workers_have_the_best_without_a_conftest(user: Runner) -> None:
    """They have threads before they collect tests, so that the namespace is entered by who starts them."""
    (user.tests / "sub").mkdir()
    user.write(**{"sub/test_it": counting(user)})
    os.mkfifo(user.tests / "test_pipe.py")  # as for pytest, this is no module
    for tests in (user.tests, user.tests / "sub/test_it.py"):
        said = user("-n2", tests=tests, status=0)
        assert "snapfs: copies are overlays" in said
        assert "whole copies" not in said


# -- the cache


@pytest.mark.parametrize("options", [(), ("-n2",), ("--snapfs=copy",)], ids=["alone", "xdist", "copy"])
def test_the_cache(options: tuple[str, ...], runner: Runner) -> None:
    cache = f"--snapfs-cache={runner.temporary / 'cache'}"
    runner.write(test_it=counting(runner))
    for _ in range(2):
        assert "6 passed" in runner(cache, *options, status=0)
    assert made(runner) == 1
    runner.write(test_it="# a comment\n\n" + counting(runner))
    assert "6 passed" in runner(cache, *options, status=0)
    assert made(runner) == 1, "it depends on the function, not on where it stands"
    runner.write(test_it=counting(runner, "changed"))
    assert "6 passed" in runner(cache, *options, status=0)
    assert made(runner) == 2, "it depends on what the function calls, too"


def test_the_cache_by_configuration(user: Runner) -> None:
    """A relative path is one in the directory of the tests."""
    user.write(test_it=counting(user))
    (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs_cache = .cache/bases\nsnapfs_cache_size = 1M\n")
    for _ in range(2):
        assert "6 passed" in user(status=0)
    assert made(user) == 1
    assert (user.tests / ".cache/bases").is_dir()


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=["alone", "xdist"])
def test_the_cache_where_pytest_is_started(options: tuple[str, ...], user: Runner) -> None:
    """As --basetemp and --junitxml are; whatever is in pytest.ini, and wherever a conftest.py goes."""
    user.write(test_it=counting(user), conftest="import os\n\nos.chdir('/')\n")
    (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs_cache = .cache/bases\n")
    for _ in range(2):
        assert "6 passed" in user("--snapfs-cache=kept/bases", *options, status=0)
    assert made(user) == 1
    assert (user.temporary / "kept/bases").is_dir()
    assert sorted(os.listdir(user.tests)) == ["conftest.py", "pytest.ini", "test_it.py"]


@pytest.mark.parametrize("option", [True, False])
def test_the_cache_in_the_home_directory(option: bool, user: Runner) -> None:
    """Neither pytest.ini nor a shell, after ``=``, makes another path of a tilde."""
    user.write(test_it=counting(user))
    user.environment["HOME"] = str(user.temporary)
    if not option:
        (user.tests / "pytest.ini").write_text("[pytest]\nsnapfs_cache = ~/.cache/bases\n")
    assert "6 passed" in user(*(("--snapfs-cache=~/.cache/bases",) if option else ()), status=0)
    assert (user.temporary / ".cache/bases").is_dir()
    assert not (user.tests / "~").exists()


@pytest.mark.parametrize(("cache", "words"), [("/proc/bases", "No such file"), ("/proc/version", "it is no directory")])
def test_a_cache_that_can_not_be(cache: str, words: str, user: Runner) -> None:
    user.write(test_it=counting(user))
    said = user(f"--snapfs-cache={cache}", status=4)
    assert f"no bases can be kept in {cache}: {words}" in said
    assert "Traceback" not in said


def test_the_cache_and_files_that_are_named(user: Runner) -> None:
    (user.tests / "schema").mkdir()
    (user.tests / "schema/one.sql").write_text("CREATE")
    (user.tests / "data").mkdir()
    (user.tests / "data/file").write_text("x")
    user.write(
        test_it=counting(user).replace(
            "snapshot_of(fill)", "snapshot_of(fill, depends=[os.path.join(os.path.dirname(__file__), 'schema')])"
        )
        + "def test_directory(snapshot_of):\n"
        "    data = os.path.join(os.path.dirname(__file__), 'data')\n"
        "    assert (snapshot_of(data) / 'file').read_text() == open(os.path.join(data, 'file')).read()\n"
    )
    cache = f"--snapfs-cache={user.temporary / 'cache'}"

    def bases() -> int:
        return sum(path.is_dir() for path in (user.temporary / "cache").iterdir())

    for _ in range(2):
        assert "7 passed" in user(cache, status=0)
    assert (made(user), bases()) == (1, 2)
    (user.tests / "schema/one.sql").write_text("ALTER!")
    assert "7 passed" in user(cache, status=0)
    assert (made(user), bases()) == (2, 3)
    (user.tests / "data/file").write_text("other")
    assert "7 passed" in user(cache, status=0)
    assert (made(user), bases()) == (2, 4)
    (user.tests / "schema/one.sql").unlink()
    (user.tests / "schema").rmdir()
    assert "FileNotFoundError" in user(cache, status=1)


BIG = (
    "def big(number):\n    return lambda directory: (directory / str(number)).write_bytes(bytes(1 << 20))\n"
    "def test_it(snapshot_of):\n    for number in NUMBERS:\n        assert (snapshot_of(big(number)) / str(number)).exists()\n"
)


def test_the_cache_has_a_limit(user: Runner) -> None:
    """What was used longest ago goes first; what is in use stays."""
    options = [f"--snapfs-cache={user.temporary / 'cache'}", "--snapfs-cache-size=2500K"]

    def bases() -> list[str]:
        return sorted(path.name for path in (user.temporary / "cache").glob("*/data/*"))

    user.write(test_it=BIG.replace("NUMBERS", "[1]"))
    user(*options, status=0)
    user.write(test_it=BIG.replace("NUMBERS", "[2]"))
    user(*options, status=0)
    user.write(test_it=BIG.replace("NUMBERS", "[1, 3]"))
    user(*options, status=0)
    assert bases() == ["1", "3"]
    user.write(test_it=BIG.replace("NUMBERS", "[1, 2, 3, 4]"))
    user(*options, status=0)
    assert bases() == ["1", "2", "3", "4"]
    (user.temporary / "cache" / ("0" * 16 + ".new")).mkdir()
    os.chown(user.temporary / "cache" / ("0" * 16 + ".new"), NOBODY, NOBODY)
    user.write(test_it=BIG.replace("NUMBERS", "[5]"))
    user(*options, status=0)
    assert len(bases()) == 2
    assert "5" in bases()
    left = {path.name.partition(".")[2] for path in (user.temporary / "cache").iterdir() if not path.is_dir()}
    assert left <= {"size", "lock", ""}
    assert not list((user.temporary / "cache").glob("*.new")), "what a killed run left half made"


def test_two_runs_share_the_cache(runner: Runner) -> None:
    """One waits while the other makes a base, and none removes what the other uses."""
    cache = f"--snapfs-cache={runner.temporary / 'cache'}"
    here, on = runner.temporary / "here", runner.temporary / "on"
    runner.write(
        test_it=counting(runner).replace(
            "    (directory / 'file')",
            f"    import pathlib, time\n    pathlib.Path({str(here)!r}).touch()\n"
            f"    while not os.path.exists({str(on)!r}):\n        time.sleep(0.01)\n    (directory / 'file')",
        )
    )
    with runner.started(cache) as one:
        until(here.exists, "it makes the base")
        with runner.started(cache, "-n2") as two:
            on.touch()
            assert "6 passed" in one.communicate(timeout=60)[0]
            assert "6 passed" in two.communicate(timeout=60)[0]
    assert made(runner) == 1
    here.unlink()
    runner.write(
        test_it=FILL + "import pathlib, time\n"
        "def test_it(snapshot_of):\n    base = snapshot_of(fill)\n"
        f"    pathlib.Path({str(here)!r}).touch()\n"
        f"    while pathlib.Path({str(on)!r}).exists():\n        time.sleep(0.01)\n"
        "    assert (base / 'file').exists()\n"
    )
    with runner.started(cache) as one:
        until(here.exists, "it has its base")
        runner.write(test_other=BIG.replace("NUMBERS", "[1]"))
        with runner.started(cache, "--snapfs-cache-size=0K", tests=runner.tests / "test_other.py") as two:
            assert "1 passed" in two.communicate(timeout=60)[0]
        on.unlink()
        assert "1 passed" in one.communicate(timeout=60)[0]
    runner.nothing_is_left()


def test_a_base_of_unknown_dependence_is_not_kept(user: Runner) -> None:
    """What a function has closed over may be anything: then it is made anew by each process."""
    user.write(
        test_it="import pathlib\n"
        "def of(thing):\n    return lambda directory: (directory / 'file').write_text(str(thing))\n"
        "def test_it(snapshot_of):\n    assert (snapshot_of(of(pathlib)) / 'file').exists()\n"
        "    assert (snapshot_of(of(object())) / 'file').exists()\n"
    )
    cache = user.temporary / "cache"
    assert "1 passed" in user(f"--snapfs-cache={cache}", status=0)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_killed_while_what_nobody_may_read_is_copied(user: Runner) -> None:
    """A base whose modes were changed for that is made anew by the next run."""
    user.write(
        test_it="import os, signal\nfrom snapfs.testing import copying\n"
        "def fill(directory):\n    (directory / 'file').touch()\n    (directory / 'file').chmod(0)\n"
        "def test_it(snapshot_of, fresh_copy, monkeypatch):\n"
        "    base = snapshot_of(fill)\n"
        "    assert os.stat(base / 'file').st_mode & 0o777 == 0\n"
        "    if 'KILL' in os.environ:\n"
        "        monkeypatch.setattr(copying, 'copy_tree', lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))\n"
        "    assert os.stat(fresh_copy(base) / 'file').st_mode & 0o777 == 0\n",
    )
    options = (f"--snapfs-cache={user.temporary / 'cache'}", "--snapfs=copy")
    user.environment["KILL"] = "1"
    with user.started(*options) as process:
        process.communicate(timeout=60)
        assert process.returncode == -9
    del user.environment["KILL"]
    for _ in range(2):
        assert "1 passed" in user(*options, status=0)
    assert not list((user.temporary / "cache").glob("*.opened"))


# -- other users


def test_what_others_can_not_guess(user: Runner) -> None:
    """Another user may enter the directory of a run, as a server that is another user must.  What a base holds may be what that
    user could not read where it was."""
    (user.tests / "data").mkdir(mode=0o755)
    user.write(
        test_it=f"import os\nDATA = {str(user.tests / 'data')!r}\n"
        "def test_it(snapshot_of, fresh_copy):\n"
        "    for path in snapshot_of(DATA), fresh_copy(DATA):\n"
        f"        print('path', path.relative_to({str(user.temporary)!r}))\n"
        "        run = path.parents[2]\n"
        "        print('mode', f'{os.stat(run).st_mode & 0o777:o}')\n",
    )
    runs = []
    for _ in range(2):
        said = user("-s", status=0)
        assert said.count("mode 711") == 2
        runs.append([line.partition("path ")[2].split("/") for line in said.splitlines() if "path " in line])
    for one, other in zip(*runs, strict=True):
        assert one[1] != other[1]
        assert len(one[1]) >= 16


@pytest.mark.parametrize(
    ("modes", "owners", "words"),
    [
        ((0o755, 0o777), (NOBODY, NOBODY), "can be written by everybody"),
        ((0o755, 0o1777), (NOBODY, NOBODY), "others can make files there"),
        ((0o755, 0o1777), (NOBODY, 0), "it belongs to the user root"),
        ((0o755, 0o755), (1, NOBODY), "belongs to the user"),
        ((0o777, None), (NOBODY, NOBODY), "can be written by everybody"),
    ],
)
def test_a_cache_where_others_could_put_a_base(
    user: Runner, modes: tuple[int, int | None], owners: tuple[int, int], words: str
) -> None:
    cache = user.tmp_path / "above/cache"
    for path, mode, owner in zip((cache.parent, cache), modes, owners, strict=True):
        if mode is not None:
            path.mkdir()
            path.chmod(mode)
            os.chown(path, owner, owner)
    user.write(test_it=counting(user))
    said = user(f"--snapfs-cache={cache}", status=4)
    assert f"no bases can be kept in {cache}: " in said
    assert words in said
    assert "Traceback" not in said
    assert list(cache.iterdir()) == [] if modes[1] is not None else not cache.exists()


def test_a_base_that_another_user_has_put_into_the_cache(user: Runner) -> None:
    user.write(test_it=counting(user))
    cache = user.temporary / "cache"
    assert "6 passed" in user(f"--snapfs-cache={cache}", status=0)
    assert os.stat(cache).st_mode & 0o777 == 0o700
    (base,) = (path for path in cache.iterdir() if path.is_dir())
    os.chown(base, 1, 1)
    assert f"{base} is somebody else's: remove it" in user(f"--snapfs-cache={cache}", status=1)


def test_a_directory_that_becomes_a_link_while_modes_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's server has made is that user's, who may exchange it while it is removed."""
    (tmp_path / "copy/inner").mkdir(parents=True)
    (tmp_path / "victim/inner").mkdir(parents=True)
    modes = [os.stat(path).st_mode for path in (tmp_path / "victim", tmp_path / "victim/inner")]
    chmod = os.chmod

    def swapped(path: str, mode: int) -> None:
        if os.path.realpath(path) == str(tmp_path / "copy/inner"):
            (tmp_path / "copy/inner").rename(tmp_path / "copy/other")
            (tmp_path / "copy/inner").symlink_to(tmp_path / "victim")
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", swapped)
    copying._make_writable(str(tmp_path / "copy"))
    assert (tmp_path / "copy/inner").is_symlink()
    assert [os.stat(path).st_mode for path in (tmp_path / "victim", tmp_path / "victim/inner")] == modes


# -- what a function depends on


def function(text: str, **values: object) -> Callable[..., object]:
    """The function ``fill`` of a module with the source ``text``."""
    module = types.ModuleType("a_module")
    module.__dict__.update(values)
    exec(compile(text, "a_module.py", "exec"), module.__dict__)
    made: Callable[..., object] = module.fill
    return made


def digest(fill: Callable[..., object]) -> str:
    return digests.of_function(fill, [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def fill(d): return 1", "def fill(d): return 2"),
        ("N = 1\ndef fill(d): return N", "N = 2\ndef fill(d): return N"),
        ("def g(): return 1\ndef fill(d): return g()", "def g(): return 2\ndef fill(d): return g()"),
        ("N = [1, (2,)]\ndef fill(d): return [N for _ in d]", "N = [1, (3,)]\ndef fill(d): return [N for _ in d]"),
        ("def fill(d, n=1): pass", "def fill(d, n=2): pass"),
        ("def fill(d, *, n={'a': 1}): pass", "def fill(d, *, n={'a': 2}): pass"),
        ("def m(n):\n  return lambda d: n\nfill = m(1)", "def m(n):\n  return lambda d: n\nfill = m(2)"),
        ("def fill(d): return g()\ndef g(): return fill", "def fill(d): return g()\ndef g(): return fill, 1"),
    ],
)
def test_what_a_function_depends_on(one: str, other: str) -> None:
    assert digest(function(one)) == digest(function(one))
    assert digest(function(one)) != digest(function(other))


_WRITES = "def helper(d): (d / 'f').write_text('1')\n"


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        ("h", {"h": _WRITES, "m": "from h import helper\nclass B:\n def go(self, d): helper(d)\ndef fill(d): B().go(d)\n"}),
        ("m", {"m": "X = '1'\nclass B:\n @classmethod\n def go(cls, d): d.write_text(X)\ndef fill(d): B.go(d)\n"}),
        ("h", {"h": "class A:\n x = '1'\n", "m": "from h import A\nclass B(A): pass\ndef fill(d): d.write_text(B.x)\n"}),
        ("pkg/sub", {"pkg/__init__": "", "pkg/sub": _WRITES, "m": "import pkg.sub\ndef fill(d): pkg.sub.helper(d)\n"}),
        ("h2", {"h2": _WRITES, "h": "import m\nfrom h2 import helper\n", "m": "import h\ndef fill(d): h.helper(d)\n"}),
        ("m", {"m": "import functools\n@functools.cache\ndef h(): return '1'\ndef fill(d): d.write_text(h())\n"}),
    ],
)
def test_what_it_depends_on_in_other_files(
    changed: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "pkg").mkdir()

    def digest_now() -> str:
        for name in ("m", "h", "h2", "pkg", "pkg.sub"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        found = digest(importlib.import_module("m").fill)
        for name in ("m", "h", "h2", "pkg", "pkg.sub"):
            sys.modules.pop(name, None)
        return found

    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    before = digest_now()
    assert digest_now() == before
    (tmp_path / f"{changed}.py").write_text(files[changed].replace("'1'", "'2'"))
    assert digest_now() != before


# what a value is of, for one fill with another


def with_value(value: object) -> str:
    return digest(functools.partial(print, value))


ONE, TWO = ["1"], ["2"]


def nested(depth: int, twice: bool) -> object:
    found: object = "x"
    for _ in range(depth):
        found = [found, found] if twice else [found]
    return found


class Text(str):
    """Its repr doesn't tell it."""

    def __repr__(self) -> str:
        return "hidden"


class Listed(list[int]):
    more: int

    def __init__(self, *items: int, more: int = 0) -> None:
        super().__init__(items)
        self.more = more


Pair = collections.namedtuple("Pair", "one two")
Color = enum.Enum("Color", "RED BLUE")
UTC_2 = datetime.timezone(datetime.timedelta(hours=2))


def made_class(text: str, *, by: str) -> object:
    class Made:
        word = text if by == "attribute" else ""

        @classmethod
        def fill(cls, directory: Path) -> None:
            (directory / "file").write_text(text if by == "closure" else cls.word)

    return Made.fill


def attributed(text: str) -> Callable[..., object]:
    def fill(directory: Path) -> None:
        (directory / "file").write_text(fill.text)  # type: ignore[attr-defined]

    fill.text = text  # type: ignore[attr-defined]
    return fill


class Wrapper:
    def __init__(self, text: str) -> None:
        self.text = text
        self.__wrapped__ = function("def fill(d): pass")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"db": {"host": "a"}, "port": 1}, {"db": {"host": "a", "port": 1}}),
        ([["a"], "b"], [["a", "b"]]),
        ((ONE, TWO, ONE), (ONE, TWO, TWO)),
        ([ONE, ONE, [TWO]], [ONE, ONE, TWO]),
        ([], [[]]),
        ([1, 2], (1, 2)),
        ([1], [True]),
        ([1], [1.0]),
        ({1: 2}, {2: 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a", "b"}, {"a"}),
        ({1}, frozenset({1})),
        ({frozenset({"a"}), "b"}, {frozenset({"a", "b"})}),
        (Text("a"), Text("b")),
        (Text("a"), "a"),
        (Listed(1), Listed(2)),
        (Listed(1), Listed(1, more=1)),
        (Pair(1, 2), (1, 2)),
        (collections.defaultdict(list), collections.defaultdict(dict)),
        (Color.RED, Color.BLUE),
        (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, fold=1)),
        (datetime.datetime(2020, 1, 1, tzinfo=UTC_2), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)),
        (["a"].append, ["b"].append),
        (functools.partial(print, ["a"], "b"), functools.partial(print, ["a", "b"])),
        (made_class("a", by="closure"), made_class("b", by="closure")),
        (made_class("a", by="attribute"), made_class("b", by="attribute")),
        (attributed("a"), attributed("b")),
    ],
)
def test_values_that_differ(one: object, other: object) -> None:
    assert with_value(one) == with_value(copy.copy(one))
    assert with_value(one) != with_value(other)


NOT_PLAIN = [object(), [object()], {1: (object(),)}, Wrapper("a"), re.compile("a").match, nested(3000, False)]


@pytest.mark.parametrize("thing", NOT_PLAIN, ids=range(len(NOT_PLAIN)))
def test_values_that_can_not_be_told(thing: object) -> None:
    with pytest.raises(digests.Unknown, match=r"no plain value|nested too deep"):
        with_value(thing)


def test_values_within_themselves() -> None:
    one: list[object] = ["a"]
    one.append(one)
    other: list[object] = ["a", ["a"]]
    other[1].append(other)  # type: ignore[attr-defined]
    assert with_value(one) == with_value(one)
    assert with_value(one) != with_value(other)
    twice = nested(60, True)  # which would be endless, if each was gone through as often as it is there
    assert with_value(twice) != with_value([twice])


def told(value: object) -> object:
    """By what another value is the same."""
    if isinstance(value, list | tuple):
        return type(value), tuple(map(told, value))
    if isinstance(value, dict):
        return dict, tuple((told(key), told(item)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(told, value))
    return type(value), repr(value)


TEXTS = st.text("a1:()", max_size=3) | st.binary(max_size=2)
PLAIN = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.dates() | TEXTS
KEYS = st.recursive(
    PLAIN,
    lambda below: st.lists(below, max_size=3).map(tuple) | st.frozensets(below, max_size=3),
    max_leaves=4,
)
VALUES = st.recursive(
    KEYS,
    lambda below: (
        st.lists(below, max_size=4)
        | st.lists(below, max_size=4).map(tuple)
        | st.dictionaries(KEYS, below, max_size=3)
        | st.sets(KEYS, max_size=3)
        | below.map(lambda value: [value, value])
    ),
    max_leaves=8,
)
FEW = st.recursive(st.just("a"), lambda below: st.lists(below, max_size=3), max_leaves=3)


def rebuilt(value: object) -> object:
    """An equal value, of which nothing is the same object as anything else."""
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(rebuilt, value))
    return {rebuilt(key): rebuilt(item) for key, item in value.items()} if isinstance(value, dict) else value


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.tuples(VALUES, VALUES) | VALUES.map(lambda value: (value, rebuilt(value))) | st.tuples(FEW, FEW))
def test_any_two_values(values: tuple[object, object]) -> None:
    one, other = values
    assert (with_value(one) == with_value(other)) == (told(one) == told(other))


def test_a_digest_is_the_same_in_each_process() -> None:
    """Whatever the order in which a set is gone through there."""
    script = (
        "import functools\nfrom snapfs.testing import digests\n"
        "def f(): return NAMES\ndef g(): return NAMES\n"
        "NAMES = {'a', 'b', 'c', ('d', frozenset({'e', 'f', 'g'})), f, g}\n"
        "print(digests.of_function(functools.partial(f, NAMES), []))\n"
    )
    digest_of = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(CLONE)}, check=True, stdout=-1
        ).stdout
        for seed in range(4)
    ]
    assert len(set(digest_of)) == 1


def test_a_named_link_stands_for_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("a")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "again").symlink_to("link")
    fill = function("def fill(d): pass")
    for name in ("link", "again", "link/file"):
        before = digests.of_function(fill, [tmp_path / name])
        assert digests.of_function(fill, [tmp_path / name]) == before
        (tmp_path / "real/file").write_text(f"b {name}")
        assert digests.of_function(fill, [tmp_path / name]) != before
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        digests.of_function(fill, [tmp_path / "dangling"])


def test_what_a_function_does_not_depend_on() -> None:
    plain = digest(function("N = 1\ndef fill(d): return N"))
    assert plain == digest(function("M = 2\n\n\nN = 1\ndef other(): pass\ndef fill(d): return N"))
    names = {f"name {number}" for number in range(100)}
    reversed_names = set(sorted(names, reverse=True))
    assert digest(function("def fill(d): return N", N=names)) == digest(function("def fill(d): return N", N=reversed_names))


def test_it_does_not_depend_on_where_its_modules_are(tmp_path: Path) -> None:
    """Another clone of the tests finds the same base."""
    found = set()
    for name in ("one", "other"):
        module = types.ModuleType("h")
        module.__file__ = str(tmp_path / name / "h.py")
        Path(module.__file__).parent.mkdir()
        Path(module.__file__).write_text("X = 1")
        found.add(digest(function("def fill(d): return h.X", h=module)))
    assert len(found) == 1


def test_two_functions_on_a_line() -> None:
    one, other = lambda directory: (directory / "a").touch(), lambda directory: (directory / "b").touch()
    assert digest(one) != digest(other)


def test_a_function_of_anything() -> None:
    digest(function("def fill(d): return N", N=object()))  # only named: as the source says
    with pytest.raises(digests.Unknown):
        digest(functools.partial(function("def fill(d, n): pass"), n=object()))
    assert digest(functools.partial(print, 1)) != digest(functools.partial(print, 2))
    assert digest(function("def fill(d): return os.path.join(d)", os=os)) == digest(
        function("def fill(d): return os.path.join(d)", os=os)
    )
    assert digest(function("def fill(d): return trio.run(d)", trio=sys.modules["pytest"])) != digest(
        function("def fill(d): return trio.run(d)", trio=sys.modules["os"])
    )
