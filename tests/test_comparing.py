"""Any snapshot compared with any other: in the library, through both doors, and by the file ``compare`` of the tree."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from snapfs import Options, Snapshotter, names
from snapfs.errors import FailedPrecondition, InvalidArgument, NotFound
from snapfs.options import Sync
from snapfs.scan.marks import LayerDirectory, Marks
from snapfs.scan.walk import path_of
from tests.daemon import Daemon
from tests.doors import DOORS, Opener
from tests.patches import ALONE
from tests.refusals import failing
from tests.tree import committed
from tests.users import BOB, run, user

# -- the library


@pytest.fixture(params=DOORS)
def open_snapshotter(request: pytest.FixtureRequest) -> Opener:
    return partial(DOORS[request.param], options=Options(sync=Sync.NONE))


async def fill(snapshotter: Snapshotter, key: str, **files: str | None) -> None:
    """Write ``files`` into the layer of an active snapshot; None for one that is opened for writing."""
    layer = Path(snapshotter.layer_path((await snapshotter.stat(key)).id))
    for name, content in files.items():
        (layer / name).write_text("same\n" if content is None else content)


async def test_what_is_asked_of_a_path_opens_few_layers(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that both stand on none, where neither has anything of the path."""
    opened: list[str] = []
    plain = Marks.read

    def read(marks: Marks, directory: LayerDirectory) -> bool | None:
        opened.append(path_of(directory))
        return plain(marks, directory)

    await snapshotter.prepare("web")
    for nth in range(10):
        await fill(snapshotter, "web", a=f"{nth}\n", **{f"b{nth}": "x\n"})
        await snapshotter.checkpoint("web")
    monkeypatch.setattr(Marks, "read", read)
    for path, few, lines in (("b3", 1, []), ("a", 2, ["C /a\n"]), ("none", 1, [])):
        opened.clear()
        assert await snapshotter.changes("web@9", list, since=8, paths=[path]) == lines
        assert len(opened) == few


async def test_what_is_compared_with_what(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("draft")
        await fill(snapshotter, "draft", a="1\n", b="same\n")
        await snapshotter.commit("base", "draft")
        await snapshotter.prepare("web", "base")
        await fill(snapshotter, "web", a="2\n")
        await snapshotter.checkpoint("web")
        await fill(snapshotter, "web", b=None, c="3\n")
        await snapshotter.prepare("other")
        await fill(snapshotter, "other", a="1\n")
        await snapshotter.view("peek", "web@1")
        await snapshotter.view("nothing")
        changes = partial(snapshotter.changes, consume=list)
        assert await changes("web") == await changes("web", since=1) == ["C /b\n", "A /c\n"]
        assert await changes("web", content=True) == ["A /c\n"]
        assert await changes("web", since=1, content=True) == ["A /c\n"]
        assert await changes("web", since=0) == await changes("web", against="base") == ["C /a\n", "C /b\n", "A /c\n"]
        assert await changes("web", against="base", paths=["/a", "./c/", "no"]) == ["C /a\n", "A /c\n"]
        assert await changes("base", against="web") == ["C /a\n", "C /b\n", "D /c\n"]
        assert await changes("web@1", since=0) == ["C /a\n"]
        assert await changes("other", against="base") == ["C /a\n", "D /b\n"]
        assert await changes("other", against="base", content=True) == ["D /b\n"]
        assert await changes("peek", against="base") == ["C /a\n"]
        assert await changes("web", against="peek") == ["C /b\n", "A /c\n"]
        assert await changes("base", against="nothing") == ["A /a\n", "A /b\n"]
        assert await changes("web", against="web") == []
        text = "".join(await snapshotter.patch("web", list, against="base"))
        assert re.findall(r"^[-+]\w.*", text, re.MULTILINE) == ["-1", "+2", "+3"]
        assert "".join(await snapshotter.patch("web", list, since=0)) == text
        assert "".join(await snapshotter.patch("web", list, since=0, paths=["c"])) in text
        assert "".join(await snapshotter.patch("other", list)).count("new file") == 1, "it has no parent"


async def test_what_cannot_be_compared(open_snapshotter: Opener, root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        await snapshotter.view("peek")
        for call in (snapshotter.changes, snapshotter.patch):
            with pytest.raises(NotFound, match=r'^snapshot "no" does not exist'):
                await call("web", list, against="no")
            with pytest.raises(NotFound, match=r'^"web" has no checkpoint 7: read the file checkpoint'):
                await call("web", list, since=7)
            with pytest.raises(FailedPrecondition, match='"peek" is a view, which changes nothing: name what'):
                await call("peek", list)
            for path in ("..", "/../a", "a/../../b"):
                with pytest.raises(InvalidArgument, match="leads out of the snapshot"):
                    await call("web", list, paths=["a", path])
            for path in ("", "a\0"):
                with pytest.raises(InvalidArgument):
                    await call("web", list, paths=[path])
            assert await call("web", list, paths=["a/../b"]) == []


async def test_one_that_is_removed_meanwhile(root: Path) -> None:
    """Files that vanish are left out, but not all files of a snapshot."""
    async with DOORS["async"](root, options=Options(sync=Sync.NONE)) as snapshotter:
        for key in ("web", "other"):
            await snapshotter.prepare(key)
            await fill(snapshotter, key, a="1\n", b="1\n")

        def consume(lines: Iterable[str]) -> list[str]:
            found = [next(iter(lines))]
            trio.from_thread.run(snapshotter.remove, "other")
            return [*found, *lines]

        with pytest.raises(NotFound):
            await snapshotter.changes("web", consume, against="other")


# -- the tree


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory / "compare", os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def asked(directory: Path, request: str) -> bytes:
    """What comes of ``request``: a program writes it, and reads on behind it."""
    with opened(directory) as fd:
        os.write(fd, request.encode() + b"\n")
        text = b""
        while more := os.read(fd, 1 << 17):
            text += more
        return text


@pytest.fixture
def web(mnt: Path) -> Path:
    """A workspace on ``base`` with a checkpoint."""
    base = committed(mnt, "base", content="below\n")
    os.mkdir(base / "active/web")
    web = mnt / "active/web"
    (web / "rootfs/file").write_text("above\n")
    (web / "checkpoint").write_text("one\n")
    (web / "rootfs/new").write_text("new\n")
    return web


def test_what_is_asked(mnt: Path, web: Path) -> None:
    os.mkdir(mnt / "view/peek")
    for request, lines in {
        "changes": "A /new\n",
        "changes base": "C /file\nA /new\n",
        "changes 1": "A /new\n",
        "changes 0": "C /file\nA /new\n",
        "changes committed/web@1": "A /new\n",
        "changes content view/peek": "A /file\nA /new\n",
        "changes base\tnew\tno": "A /new\n",
        "changes content": "A /new\n",
        "patch web": "",
    }.items():
        assert asked(web, request) == lines.encode(), request
    assert asked(mnt / "committed/base", "changes web") == b"C /file\nD /new\n"
    assert asked(mnt / "committed/web@1", "changes 0") == b"C /file\n"
    assert asked(mnt / "view/peek", "changes base") == b"D /file\n"
    assert asked(web, "patch") == (web / "changes.patch").read_bytes()


def test_a_shell_asks(mnt: Path, web: Path) -> None:
    script = 'exec 3<>active/web/compare; echo "patch 0" >&3; cat <&3; echo "changes 1" >&3; cat <&3'
    said = subprocess.run(["sh", "-c", script], cwd=mnt, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said == asked(web, "patch base").decode() + "A /new\n"
    assert "patch NAME" in (web / "compare").read_text()


def test_names_that_need_quoting(daemon: Daemon, mnt: Path, web: Path) -> None:
    """A number is that of a checkpoint, unless a path says otherwise."""
    for key in ("1", "binary base", "a\tb/c"):
        os.mkdir(mnt / "active" / names.encode(key))
    (mnt / "active/1/rootfs/odd\t%\n").write_text("")
    assert asked(web, "changes active/1") == b"A /file\nA /new\nD /odd\\0011%\\n\n"
    assert asked(mnt / "active/1", "changes active/binary base\todd%09%25%0A") == rb"A /odd\0011%\n" + b"\n"
    assert asked(web, "changes a%09b%2Fc") == b"A /file\nA /new\n"
    with failing(errno.ENOENT):
        asked(web, "changes a\tb")


def test_what_is_refused(daemon: Daemon, web: Path) -> None:
    for request, number, words in (
        ("patch no", errno.ENOENT, 'snapshot "no" does not exist'),
        ("patch 9", errno.ENOENT, '"web" has no checkpoint 9'),
        ("", errno.EINVAL, "write what is asked for, and the name"),
        ("diff base", errno.EINVAL, "write what is asked for, and the name"),
        ("patch base\t../x", errno.EINVAL, 'the path "../x" leads out of the snapshot'),
    ):
        with opened(web) as fd:
            os.write(fd, b"changes 1\n")
            with failing(number):
                os.write(fd, f"{request}\n".encode())
            assert os.read(fd, 100) == b"", "what was asked before is not the answer"
        assert f"{errno.errorcode[number]} write active/web/compare: {words}" in daemon.error_log()[-1]
    with failing(errno.EILSEQ), opened(web) as fd:
        os.write(fd, b"patch \xff\n")
    with failing(errno.EINVAL):  # as an editor saves it
        (web / "compare").write_text((web / "compare").read_text())


def test_a_long_patch(mnt: Path, web: Path, tmp_path: Path) -> None:
    """It is read in pieces, whoever else asks meanwhile; git makes of the older state the newer."""
    subprocess.run(["cp", "-a", f"{mnt}/committed/base/rootfs/", tmp_path / "copy"], check=True)
    for number in range(50):
        (web / f"rootfs/{number}").write_bytes(os.urandom(30_000))
    with opened(web) as first:
        os.write(first, b"patch binary 0\n")
        text = os.read(first, 1000)
        assert asked(web, "changes 1").count(b"\n") == 51
        while more := os.read(first, 100_000):
            text += more
    assert len(text) > 1 << 20
    subprocess.run(["git", "apply"], cwd=tmp_path / "copy", input=text, check=True, env=ALONE)
    subprocess.run(["diff", "-r", tmp_path / "copy", f"{web}/rootfs/"], check=True)


KEPT = """
import os, sys
kept = []
while len(kept) < 16:
    kept.append(os.open(sys.argv[1], os.O_RDWR))
    try:
        os.write(kept[-1], b"patch 0\\n")
    except OSError as error:
        print(error.errno, len(kept), os.read(kept[-1], 10))
        break
os.close(kept[0])
os.write(kept[-1], b"patch 0\\n")
print(len(os.read(kept[-1], 10)))
"""


def test_what_others_keep_open_is_bounded(make_daemon: Callable[..., Daemon]) -> None:
    """Those whom a capability lets in, that is: a long patch is on ROOT's disk until the file is closed."""
    daemon = make_daemon("-o", "allow_other").start()
    os.mkdir(daemon.mnt / "active/web")
    for number in range(2):
        (daemon.mnt / f"active/web/diff/{number}").write_text("a" * 1_000_000)
    who = user(BOB, "--inh-caps", "+dac_override", "--ambient-caps", "+dac_override")
    done = run(who, sys.executable, "-I", "-c", KEPT, daemon.mnt / "active/web/compare")
    assert done.stdout == f"{errno.EMFILE} 16 b''\n10\n", done
    assert "user 1002 has too many files open" in daemon.error_log()[-1]
    assert daemon.stop() == 0
