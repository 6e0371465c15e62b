"""The patch between two chains of layers."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from snapfs.errors import FailedPrecondition
from snapfs.scan.changes import changes
from snapfs.scan.lines import lines
from snapfs.scan.patch import LARGEST, LONGEST, patch
from snapfs.scan.walk import Descriptors, Way
from tests.kernel_changes import Chain, have_little_wait_in_memory, make_comb
from tests.patches import ALONE, applied, check_with_git, compare_with_git, text_of
from tests.processes import die_with_parent

pytestmark = pytest.mark.mounts

# What git makes of it


def test_git_makes_the_tree_of_it() -> None:
    compare_with_git(options="redirect_dir=off,index=off,metacopy=off")


def test_git_makes_the_tree_of_it_in_a_user_namespace() -> None:
    code = "from tests.patches import compare_with_git; compare_with_git(options='userxattr')"
    subprocess.run(["unshare", "-Urm", sys.executable, "-c", code], check=True, preexec_fn=die_with_parent)


def test_git_makes_the_tree_of_it_where_entries_wait_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.walk.Descriptors.OPEN", 1)
    monkeypatch.setattr("snapfs.scan.differing.MANY", 1)
    monkeypatch.setattr("snapfs.scan.differing._HARDLY_ANY", 1)
    have_little_wait_in_memory(monkeypatch)
    compare_with_git(options="redirect_dir=off,index=off,metacopy=off")


# What it looks like


def of_git(chain: Chain, *options: str) -> bytes:
    """What git says of two layers of plain files and links, without what it says of the place at which they are."""
    old, new = reversed(chain.layers[:2])
    command = ["git", "diff", "--no-index", "--patience", "--no-renames", "--full-index", *options, old, new]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=ALONE).stdout
    for layer in (old, new):
        said = said.replace(f"a{layer}/".encode(), b"a/").replace(f"b{layer}/".encode(), b"b/")
    return re.sub(rb"^(@@ .* @@).*", rb"\1", said, flags=re.MULTILINE)  # without the function in which it is


def fill(layer: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (layer / name).write_bytes(content)


def test_it_is_what_git_says(chain: Chain) -> None:
    numbers = b"".join(b"line %d\n" % number for number in range(100))
    old = {
        "same": b"x",
        "empty": b"",
        "edited": numbers,
        "gone": b"a\nb",
        "no end": b"a",
        'tab\t"q\\é': b"1\n",
        "gone empty": b"",
    }
    new = {
        "same": b"x",
        "empty": b"now\n",
        "edited": numbers.replace(b"7\n", b"seven\n"),
        "no end": b"a\n",
        'tab\t"q\\é': b"1\n2",
        "new": b"\r\n\n",
        "new empty": b"",
        os.fsdecode(b"not \xff"): b"not \xff\n",
    }
    fill(chain.layer(), old)
    layer = chain.layer()
    fill(layer, new)
    (layer / "same").chmod(0o755)
    (layer / "link").symlink_to("some where")
    assert text_of(chain.layers[1:], chain.layers[:1]) == of_git(chain)


def test_what_is_no_text(chain: Chain) -> None:
    fill(chain.layer(), {"nul": b"a\0", "large": b"a\n" * (LARGEST // 2), "small": b"1\n"})
    fill(chain.layer(), {"nul": b"b\0", "large": b"a\n" * (LARGEST // 2) + b"b", "new": bytes(range(256)) * 5})
    text = text_of(chain.layers[1:], chain.layers)
    assert text == (
        b"diff --git a/large b/large\nBinary files a/large and b/large differ\n"
        b"diff --git a/new b/new\nnew file mode 100644\nBinary files /dev/null and b/new differ\n"
        b"diff --git a/nul b/nul\nBinary files a/nul and b/nul differ\n"
    )
    check_with_git(chain.layers[1:], chain.layers, str(chain.base), "redirect_dir=off")
    check_with_git(chain.layers, chain.layers[1:], str(chain.base), "redirect_dir=off")


def test_a_file_that_was_opened_for_writing_but_holds_what_it_held(chain: Chain) -> None:
    files = {"small": b"1\n", "large": b"x" * (LARGEST + 1)}
    fill(chain.layer(), files)
    fill(chain.layer(), files)
    assert text_of(chain.layers[1:], chain.layers) == b""


def test_a_change_behind_the_same_size_and_times(chain: Chain) -> None:
    for content in ("one\n", "two\n"):
        layer = chain.layer()
        for name in "ab":
            (layer / name).write_text(content if name == "a" else "same\n")
            os.utime(layer / name, ns=(1, 1))
    assert text_of(chain.layers[1:], chain.layers) == of_git(chain) != b""


def test_files_that_hold_the_same_are_read_once(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight calls for each: most of what was opened for writing holds what it held, and there may be 100,000 of it."""
    for _ in range(2):
        fill(chain.layer("d/x"), {str(number): b"same\n" for number in range(50)})
    calls: list[str] = []

    def spy(name: str) -> None:
        original: Callable[..., object] = getattr(os, name)

        def asks(*args: object, **options: object) -> object:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(os, name, asks)

    for name in ("stat", "lstat", "fstat", "open", "read", "pread", "readlink", "listxattr", "getxattr"):
        spy(name)
    assert text_of(chain.layers[1:], chain.layers) == b""
    for name in ("open", "fstat", "read"):
        assert calls.count(name) in range(102, 112)
    assert len(calls) < 330


# What is in the way


def test_only_regular_files_are_opened(chain: Chain) -> None:
    """To open one of the others would wait, or do something."""
    base, layer = chain.layer("a", "b", "c"), chain.layer("d", "e")
    for name in ("a", "f"):
        os.mkfifo(layer / name)
    os.mknod(layer / "b", stat.S_IFCHR | 0o600, os.makedev(10, 130))  # a watchdog, which restarts the machine
    os.mknod(base / "d", stat.S_IFBLK | 0o600, os.makedev(7, 99))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(layer / "s"))
    said = text_of(chain.layers[1:], chain.layers).decode()
    heads = [line for line in said.splitlines() if line.startswith(("diff", "new file", "deleted"))]
    assert heads == [
        *("diff --git a/a b/a", "deleted file mode 100644", "diff --git a/b b/b", "deleted file mode 100644"),
        *("diff --git a/d b/d", "new file mode 100644", "diff --git a/e b/e", "new file mode 100644"),
    ]


def test_what_git_refuses_is_left_out(chain: Chain) -> None:
    chain.layer(".git/config", "sub/.GIT/config", "sub/file")
    layer = chain.layer(".git/config", ".git/new", "sub/.Git", ".gitignore")
    (layer / ".git/config").write_text("other")
    text = text_of(chain.layers[1:], chain.layers)
    assert text.count(b"diff --git") == 1
    applied(chain.layers[1], text)


def test_names_that_git_takes_for_its_own_are_left_out(chain: Chain) -> None:
    """As disks of other systems would; links called .gitmodules are refused, files not."""
    own = ["git~1", "GIT~1 .", ".git.", ".git ", ".git:x", ".git::$INDEX_ALLOCATION", "a\\.git"]
    of_links = [".gitmodules", ".gitmodules ", "gitmod~1", "gi7eba~1", ".GITMODULES:x"]
    layer = chain.layer(*own, *(f"{name}/x" for name in ("sub/git~1", "sub/.git.")), "git~2", ".gitx", "d/.gitmodules")
    for name in (*of_links, ".gitattributes"):
        (layer / name).symlink_to("target")
    text = text_of([], chain.layers)
    assert re.findall(rb"^diff --git a/(\S*) ", text, re.MULTILINE) == [b".gitattributes", b".gitx", b"d/.gitmodules", b"git~2"]
    (chain.base / "empty").mkdir()
    applied(str(chain.base / "empty"), text)


def test_files_of_terabytes(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are holes, but for a byte here and there."""
    for last in (b"a", b"a", b"b"):
        layer = chain.layer()
        with open(layer / "sparse", "wb") as file:
            for place in (1 << 20, 3 << 40):
                os.pwrite(file.fileno(), last if place > 1 << 30 else b"x", place)
    reads: list[int] = []
    read = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        reads.append(offset)
        assert len(reads) < 100
        return read(fd, size, offset)

    monkeypatch.setattr("snapfs.scan.patch.os.pread", counting)
    assert text_of(chain.layers[2:], chain.layers[1:]) == b""
    assert text_of(chain.layers[1:], chain.layers, binary=True).endswith(b"Binary files a/sparse and b/sparse differ\n")
    assert len(reads) > 3


def test_a_file_that_grows_while_it_is_read(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.layer("a")
    chain.layer("a")
    read = os.pread

    def growing(fd: int, size: int, offset: int) -> bytes:
        return read(fd, size, offset).ljust(size, b"x")

    monkeypatch.setattr("snapfs.scan.patch.os.pread", growing)
    assert text_of([], chain.layers).endswith(b"Binary files /dev/null and b/a differ\n")


def test_a_file_that_vanishes(chain: Chain) -> None:
    chain.layer("a", "b")
    layer = chain.layer("a", "b")
    for name in "ab":
        (layer / name).write_text("new")
    found = patch(chain.layers[1:], chain.layers)
    assert "a/a" in next(found)
    (layer / "b").unlink()
    assert list(found) == []


def _make_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


@pytest.mark.parametrize("how", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd"), _make_device])
def test_a_file_that_becomes_another_kind_just_before_it_is_opened(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], None]
) -> None:
    chain.layer("a", "b")
    layer = chain.layer("a", "b")
    (layer / "a").write_text("new")
    openings = 0

    def replacing(path: str, flags: int, *options: int, dir_fd: int | None = None) -> int:
        nonlocal openings
        if path == "b" and (layer / "b").is_file() and not (layer / "b").is_symlink():
            (layer / "b").unlink()
            how(layer / "b")
        opened = original(path, flags, *options, dir_fd=dir_fd)
        openings += path == "b"
        assert flags & os.O_PATH or not stat.S_ISCHR(os.fstat(opened).st_mode), "a device was opened"
        return opened

    original = os.open
    monkeypatch.setattr(os, "open", replacing)
    text = text_of(chain.layers[1:], chain.layers)
    assert openings > 1
    assert b"diff --git a/a b/a\n" in text
    assert b"root:" not in text
    assert set(re.findall(rb"^diff --git a/(.)", text, re.MULTILINE)) <= {b"a", b"b"}


@pytest.mark.parametrize("how", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_a_file_that_becomes_another_kind_of_file(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path], None]
) -> None:
    """Between the look at it and its opening: it is neither waited for nor followed."""
    chain.layer("a", "b")
    layer = chain.layer("a", "b")

    def replacing(path: str, **options: object) -> os.stat_result:
        found = stat_of(path, **options)  # type: ignore[arg-type]
        if path == "b" and (layer / "b").stat(follow_symlinks=False).st_ino == found.st_ino and stat.S_ISREG(found.st_mode):
            (layer / "b").unlink()
            how(layer / "b")
        return found

    stat_of = os.stat
    (layer / "a").write_text("new")
    (layer / "b").write_text("new")
    monkeypatch.setattr("snapfs.scan.patch.os.stat", replacing)
    assert text_of(chain.layers[1:], chain.layers).count(b"diff --git") == 1
    (layer / "b").rmdir() if (layer / "b").is_dir() else (layer / "b").unlink()
    (layer / "b").write_text("text")
    assert list(lines(chain.layers[1:], chain.layers, content=True)) == ["C /a\n"]


def test_lines_open_regular_files_alone(chain: Chain) -> None:
    """FIFOs, devices and links are looked at; which device it is counts, and where a link leads."""
    base, layer = chain.layer("file"), chain.layer("file")
    for number, directory in enumerate((base, layer)):
        os.mkfifo(directory / "fifo")
        (directory / "link").symlink_to("same")
        (directory / "moved").symlink_to(str(number))
        os.mknod(directory / "watchdog", stat.S_IFCHR | 0o600, os.makedev(10, 130))  # which restarts the machine
        os.mknod(directory / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 4 + number))
    os.mkfifo(base / "d")
    (layer / "d/e").mkdir(parents=True)
    every = ["C /d\n", "A /d/e\n", *(f"C /{name}\n" for name in ("fifo", "file", "link", "moved", "watchdog", "zero"))]
    assert list(lines(chain.layers[1:], chain.layers)) == every
    assert list(lines(chain.layers[1:], chain.layers, content=True)) == [*every[:2], "C /moved\n", "C /zero\n"]
    assert list(lines(chain.layers[1:], chain.layers, content=True, paths=[b"d/e", b"zero/", b"link"])) == [every[1], every[-1]]
    (layer / "file").chmod(0o600)
    assert "C /file\n" in list(lines(chain.layers[1:], chain.layers, content=True))


@pytest.mark.parametrize(("mark", "value"), [("metacopy", b""), ("redirect", b"/elsewhere")])
def test_layers_whose_files_are_elsewhere(chain: Chain, mark: str, value: bytes) -> None:
    """Of an overlay of somebody's own: a patch would say what nobody sees."""
    chain.layer("d/a")
    layer = chain.layer("d/a")
    (layer / "d/a").write_text("new")
    path = layer / ("d/a" if mark == "metacopy" else "d")
    os.setxattr(path, f"user.overlay.{mark}", value)
    assert text_of(chain.layers[1:], chain.layers) != b"", "which is any user's to forge"
    os.setxattr(path, f"trusted.overlay.{mark}", value)
    with pytest.raises(FailedPrecondition, match=f'^"{path.name}" was .* in an overlay with .*=on: '):
        text_of(chain.layers[1:], chain.layers)


def test_directories_deeper_than_paths_are_long(chain: Chain) -> None:
    make_comb(chain.layer(), 4_000, "n")
    assert text_of([], chain.layers) == b"", "git takes no path beyond 4,095 bytes"


def test_what_no_line_or_part_comes_of_is_not_walked(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are as deep as a small layer likes, and to look at the path of each takes as long as that is."""
    levels, name = 300, "n" * 200
    fd = os.open(chain.layer(), os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    opened, open_directory = Counter[str](), Descriptors.open

    def counted(self: Descriptors, name: str, parent: int | None) -> int:
        opened[name] += 1
        return open_directory(self, name, parent)

    monkeypatch.setattr(Descriptors, "open", counted)
    assert "".join(patch([], chain.layers)) == "".join(patch(chain.layers, [])) == ""
    assert opened[name] <= 2 * (LONGEST // len(name) + 1)
    opened.clear()
    assert list(lines(chain.layers, [])) == [f"D /{name}\n"]
    assert opened[name] <= 1
    assert list(lines(chain.layers, [], paths=[f"{name}/{name}".encode()])) == [f"D /{name}/{name}\n"]


def test_long_paths_are_made_for_lines_alone(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file at the bottom of very many directories is written to, so that all of them are in the layer: to put the path of
    each together would take as long as that of the last, as often as there are directories."""
    for _ in range(2):
        make_comb(chain.layer(), 300, "n" * 200)
    made, path_of = list[object](), vars(Way)["path"].fget

    def counted(way: object) -> object:
        made.append(way)
        return path_of(way)

    monkeypatch.setattr(Way, "path", property(counted))
    path = f"/{'n' * 200}" * 300
    assert list(changes(list(map(str, chain.layers)))) == [f"C {path}/file\n"]
    assert list(lines(chain.layers[1:], chain.layers)) == [f"C {path}/file\n"]
    assert len(made) < 5


def test_texts_that_have_much_in_common(chain: Chain) -> None:
    """Finding the fewest lines would never end (test_matching counts the steps)."""
    random = Random(1)
    old, new = chain.layer(), chain.layer()
    for name, letters in (("two", b"ab"), ("many", bytes(range(33, 127)))):
        for layer in (old, new):
            (layer / name).write_bytes(b"".join(b"%c\n" % letter for letter in random.choices(letters, k=LARGEST // 2)))
    (old / "turned").write_bytes(b"".join(b"%07d\n" % number for number in range(LARGEST // 8)))
    (new / "turned").write_bytes(b"".join(b"%07d\n" % number for number in reversed(range(LARGEST // 8))))
    check_with_git(chain.layers[1:], chain.layers, str(chain.base), "redirect_dir=off")


def test_memory_is_bounded(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.differing.MANY", 300)
    layer = chain.layer("d/")
    for number in range(3_000):
        os.close(os.open(layer / f"d/{number:0200}", os.O_CREAT))
    for number in range(3):
        (layer / f"large{number}").write_bytes(b"x" * LARGEST)
    tracemalloc.start()
    try:
        count = sum(piece.count("new file mode") for piece in patch([], chain.layers))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3_003
    assert peak < 16 << 20
