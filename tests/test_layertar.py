"""A layer as a tar, by itself: what is in it, byte for byte, and that any part of it can be read."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import IO, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.errors import Damaged, FailedPrecondition, Unavailable
from snapfs.images.tarreader import Stream, TarReader
from snapfs.kernel import libc, mounting
from snapfs.scan import layertar, tar
from snapfs.scan.layertar import READ, make_index
from tests.disk import make_file_system
from tests.kernel_changes import Chain
from tests.layertars import bytes_of, check_any_part, compare_with_kernel, entries_of, opened
from tests.mounts import loop_mounted
from tests.processes import die_with_parent, own_descriptors
from tests.trees import everything, make_tree

pytestmark = pytest.mark.mounts


# -- what other programs make of it


def extracted(data: bytes, target: Path, *command: str) -> Path:
    """What a program makes of it in ``target``."""
    target.mkdir()
    subprocess.run([*command, "-C", str(target), "-xpf", "-"], input=data, check=True, stderr=subprocess.PIPE)
    return target


def seen_in(top: Path) -> dict[str, object]:
    """All that a tar of layers has of a tree: no fractions of seconds, holes, sockets, ACLs or root's own attributes."""
    found: dict[str, object] = {}
    for path, seen in everything(top).items():
        mode, whose, mtime, content, attributes, one, links = cast(tuple[Any, ...], seen)
        if stat.S_ISSOCK(mode) or path == ".":
            continue
        held = content[0] if isinstance(content, tuple) else content
        kept = {key: value for key, value in attributes.items() if key.startswith("user.") or key == "security.capability"}
        found[path] = (mode, whose, mtime // 10**9, held, kept, one, links)
    return found


PROGRAMS = {
    "GNU tar": ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--warning=no-timestamp"),
    "bsdtar": ("bsdtar", "--numeric-owner", "--xattrs"),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_makes_the_same_tree_of_it(tmp_path: Path, program: str, seed: int) -> None:
    layer = make_tree(tmp_path / "layer", seed)
    target = extracted(bytes_of(layer), tmp_path / "target", *PROGRAMS[program])
    assert seen_in(target) == seen_in(layer)


@pytest.mark.parametrize("seed", range(3))
def test_it_lists_what_gnu_tar_lists(tmp_path: Path, seed: int) -> None:
    """In the same order; but that comes with the layer's own directory, and says ./ before each name."""
    layer = make_tree(tmp_path / "layer", seed)
    command = ["tar", "--sort=name", "--numeric-owner", "--format=pax", "-C", str(layer), "-cf", "-", "."]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    theirs, ours = (
        [
            (os.path.normpath(each.name), each.type, each.mode, each.uid, each.gid, int(each.mtime), each.size, each.linkname)
            for each in tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape").getmembers()  # noqa: SIM115
        ]
        for data in (made, bytes_of(layer))
    )
    assert ours == [(*each[:-1], each[-1].removeprefix("./")) if each[1] == tarfile.LNKTYPE else each for each in theirs]


def test_what_stands_in_it(tmp_path: Path) -> None:
    """Byte for byte: a later snapfs, or one on another machine, is to give the same."""
    layer = tmp_path / "layer"
    (layer / "a").mkdir(parents=True)
    (layer / "a/file").write_bytes(b"text")
    os.setxattr(layer / "a/file", "user.note", b"n")
    os.symlink("../x", layer / "a/link")
    for path in ("a/file", "a/link", "a"):
        os.chown(layer / path, 1000, 5_000_000, follow_symlinks=False)
        os.utime(layer / path, ns=(0, 1_700_000_000_999_999_999), follow_symlinks=False)
    (layer / "a").chmod(0o2755)
    (layer / "a/file").chmod(0o4640)
    data = bytes_of(layer)
    assert len(data) == (1024 + 512) + (1024 + 512 + 512) + (1024 + 512) + 1024
    assert hashlib.sha256(data).hexdigest() == "e9d041fbc20b7413f750ae68c817a45fc99278c732e09da9d5f81ec2f617bace"


def test_programs_that_seek(tmp_path: Path) -> None:
    """tar looks for the next header without reading what is between them, as it does in any file."""
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "large").write_bytes(b"x" * 3_000_000)
    (layer / "small").write_bytes(b"y")
    index = make_index(str(layer))
    with closing(index.open()) as found:
        assert found.read(0, 512)[:6] == b"large\0"
        assert found.read(512 + 3_000_320, 512)[:6] == b"small\0"


# -- any part


def test_any_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_tree(tmp_path / "layer", 7, files=120)
    monkeypatch.setattr(layertar, "_ENTRIES", 5)
    monkeypatch.setattr(layertar, "READ", 10_000)
    index, data = make_index(str(layer)), bytes_of(layer)
    check_any_part(index, data, Random(1))
    for size in (1000, 4096, 70_000):
        with closing(make_index(str(layer)).open()) as found:
            assert b"".join(found.read(here, size) for here in range(0, len(data), size)) == data
            assert found.digest == hashlib.sha256(data).digest()


def test_the_digest_is_known_once_all_was_read_in_order(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    for name in "abc":
        (layer / name).write_bytes(name.encode() * READ)
    index = make_index(str(layer))
    data = bytes_of(layer)
    with closing(index.open()) as one, closing(index.open()) as other:
        for offset in (2 * READ + 5, len(data) - 700):
            one.read(offset, 4096)
        assert index.hashing.frontier == 0
        for offset in range(0, 2 * READ, 1 << 17):
            one.read(offset ^ 1 << 17, 1 << 17)  # each before the one before it, as the kernel's requests may come
        assert 2 * READ <= index.hashing.frontier < len(data)
        assert other.digest is None
        for offset in range(0, len(data), 1 << 17):  # who begins anew ends what the first has begun
            assert other.read(offset, 1 << 17) == data[offset : offset + (1 << 17)]
        assert one.digest == other.digest == hashlib.sha256(data).digest()


# -- the same files, the same bytes


def copy_in_another_order(source: Path, target: Path, random: Random) -> None:
    """Fill ``target`` with what is in the tree ``source``, one file at a time in another order, and the names of each inode,
    too."""
    names = [path.relative_to(source) for path in source.rglob("*")]
    random.shuffle(names)
    for path in names:
        (target / path.parent).mkdir(parents=True, exist_ok=True)
        status = os.lstat(source / path)
        if stat.S_ISDIR(status.st_mode):
            (target / path).mkdir(exist_ok=True)
            continue
        done = [each for each in names[: names.index(path)] if os.lstat(source / each).st_ino == status.st_ino]
        if done:
            os.link(target / done[0], target / path, follow_symlinks=False)
        else:
            subprocess.run(["cp", "-a", source / path, target / path], check=True)
    for path in sorted(names, reverse=True):  # what is in a directory before it
        if (source / path).is_dir() and not (source / path).is_symlink():
            copy_attributes(source / path, target / path)


def copy_attributes(source: Path, target: Path) -> None:
    """Owner, mode, times and attributes of a directory."""
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)


@contextmanager
def of_kind(kind: str, where: Path) -> Iterator[Path]:
    """A new file system."""
    if kind != "tmpfs":
        make_file_system(kind, where.with_suffix(".image"))
        with loop_mounted(where.with_suffix(".image"), where) as disk:
            yield disk
        return
    where.mkdir()
    mounting.mount("none", str(where), "tmpfs")
    try:
        yield where
    finally:
        mounting.unmount(str(where), mounting.MNT_DETACH)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
def test_the_same_files_give_the_same_bytes_on_any_file_system(tmp_path: Path, kind: str) -> None:
    layer = make_tree(tmp_path / "layer", 11, files=40)
    for path in [*layer.rglob("*")]:  # a tmpfs of some kernels has no users' attributes
        if not path.is_symlink() and "user.note" in os.listxattr(path):
            os.removexattr(path, "user.note")
    with of_kind(kind, tmp_path / kind) as where:
        (where / "layer").mkdir(0o755)
        copy_in_another_order(layer, where / "layer", Random(kind))
        copy_attributes(layer, where / "layer")
        assert bytes_of(where / "layer") == bytes_of(layer)


# -- what overlayfs leaves in layers


def test_applied_in_turn_they_are_what_the_kernel_shows() -> None:
    compare_with_kernel(options="redirect_dir=off,index=off,metacopy=off")


def test_applied_in_turn_they_are_what_the_kernel_shows_in_a_user_namespace() -> None:
    code = "from tests.layertars import compare_with_kernel; compare_with_kernel(options='userxattr')"
    subprocess.run(["unshare", "-Urm", sys.executable, "-c", code], check=True, preexec_fn=die_with_parent)


def test_marks(chain: Chain) -> None:
    chain.layer("a/b", "gone", "opaque/x")
    layer = chain.layer("D:gone", "opaque/-first", "a/D:b", "X:x/forgotten", "x/kept", opaque="y", x="x")
    (layer / "a/D:b").unlink()
    os.mknod(layer / "a/b", stat.S_IFCHR, 0)
    found = entries_of(bytes_of(layer, below=chain.layers[1]))
    assert list(found) == [
        "a/",
        "a/.wh.b",
        ".wh.gone",
        "opaque/",
        "opaque/.wh..wh..opq",
        "opaque/-first",
        "x/",
        "x/.wh.forgotten",
        "x/kept",
    ]
    for name in ("a/.wh.b", "opaque/.wh..wh..opq"):
        entry = found[name]
        assert (entry.type, entry.size, entry.mode, entry.mtime, entry.uid) == (tarfile.REGTYPE, 0, 0, 0, 0)
        assert entry.pax_headers == {}


def test_a_layer_without_parents_hides_nothing(chain: Chain) -> None:
    layer = chain.layer("D:device", "opaque/x", opaque="y")
    os.setxattr(layer / "opaque", "trusted.overlay.redirect", b"/etc")
    found = entries_of(bytes_of(layer))
    assert list(found) == ["device", "opaque/", "opaque/x"]
    assert (found["device"].type, found["device"].devmajor, found["device"].devminor) == (tarfile.CHRTYPE, 0, 0)


def test_overlayfs_own_attributes_are_never_in_it(chain: Chain) -> None:
    chain.layer("below")
    layer = chain.layer("d/file")
    for name in ("user.overlay.opaque", "user.overlay.overlay.x", "trusted.overlay.origin", "trusted.mine", "user.mine"):
        os.setxattr(layer / "d", name, b"z")
        os.setxattr(layer / "d/file", name, b"z")
    for prefix, expected in (
        ("trusted.overlay.", {"user.overlay.opaque", "user.overlay.overlay.x", "user.mine"}),
        ("user.overlay.", {"user.mine"}),
    ):
        for entry in entries_of(bytes_of(layer, below=chain.layers[1], prefix=prefix)).values():
            assert set(entry.pax_headers) == {f"SCHILY.xattr.{name}" for name in expected}


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("redirect", "was renamed in an overlay with redirect_dir=on"),
        ("metacopy", "was changed in an overlay with metacopy=on"),
    ],
)
def test_what_is_in_another_layer_is_refused(chain: Chain, mark: str, words: str) -> None:
    chain.layer("below")
    layer = chain.layer("d/file")
    os.setxattr(layer / ("d" if mark == "redirect" else "d/file"), f"trusted.overlay.{mark}", b"")
    with pytest.raises(FailedPrecondition, match=words) as caught:
        make_index(str(layer), below=chain.layers[1])
    assert '"' not in caught.value.public
    assert words in caught.value.public


@pytest.mark.parametrize("name", [".wh.file", "d/.wh.", ".wh.directory/", "d/.wh..wh..opq"])
def test_a_name_that_means_something_else_in_a_tar_is_refused(chain: Chain, name: str) -> None:
    layer = chain.layer(name)
    with pytest.raises(FailedPrecondition, match=r'"[d/]*\.wh\..*" has a name that begins with \.wh\..*: rename it'):
        make_index(str(layer))


@pytest.mark.parametrize("name", ["file", "directory", "."])
def test_attributes_that_are_too_long_for_the_memory_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some file systems one file has hundreds of megabytes."""
    monkeypatch.setattr("snapfs.scan.copying.ATTRIBUTES", 1000)
    layer = tmp_path / "layer"
    (layer / "directory").mkdir(parents=True)
    (layer / "file").touch()
    os.setxattr(layer / name, "user.a", b"x" * 999)
    bytes_of(layer)
    os.setxattr(layer / name, "user.b", b"xx")
    with pytest.raises(FailedPrecondition, match=f'"{re.escape(name)}" has more than 4 MiB of extended attributes'):
        make_index(str(layer))


# -- the layer's own directory


@pytest.mark.parametrize(
    ("own", "parents", "listed"),
    [
        ((0o755, 0), None, False),
        ((0o755, 0), (0o755, 0), False),
        ((0o2770, 0), None, True),
        ((0o755, 1000), None, True),
        ((0o755, 0), (0o700, 0), True),
        ((0o700, 0), (0o700, 0), True),
    ],
)
def test_the_directory_itself(chain: Chain, own: tuple[int, int], parents: tuple[int, int] | None, listed: bool) -> None:
    """It is in the tar where it is not as every runtime makes it, or hides one that isn't."""
    layers = [chain.layer() for _ in ("below",) if parents] + [chain.layer("file")]
    for layer, (mode, owner) in zip(layers, [each for each in (parents, own) if each], strict=True):
        os.chown(layer, owner, owner)
        layer.chmod(mode)
    found = entries_of(bytes_of(layers[-1], below=layers[0] if parents else None))
    assert list(found) == ["./", "file"][not listed :]
    if listed:
        assert (found["./"].mode, found["./"].uid) == own


# -- odd files


def test_odd_names(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    names = [b"\xff" * 255, b"\n" * 255, b"\x1b[2J" * 63, b"-rf", b" ", "\u202e".encode() * 85, b"a" * 100, b"b" * 101]
    deep = b"/".join([b"n" * 50] * 6)
    os.makedirs(os.fsencode(layer) + b"/" + deep)
    for name in (*names, *(deep + b"/" + name for name in names), deep[:152] + b"/file"):
        with open(os.fsencode(layer) + b"/" + name, "wb") as file:
            file.write(name)
        above, last = os.path.split(os.fsencode(layer) + b"/" + name)
        os.link(above + b"/" + last, above + b"/z" + last[-200:])
    data = bytes_of(layer)
    assert len(entries_of(data)) == 6 + 2 * (2 * len(names) + 1)
    for number, command in enumerate(PROGRAMS.values()):
        assert seen_in(extracted(data, tmp_path / f"{number}", *command)) == seen_in(layer)


def test_names_of_attributes_that_stand_for_themselves(tmp_path: Path) -> None:
    """In a tar the name ends at the first "=": GNU tar and this write it, and "%", in hexadecimal digits, and read these."""
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").touch()
    wanted = {f"user.{name}": name.encode() for name in ("a=b", "a%3Db", "a%b", "%253D", "=")}
    for name, value in wanted.items():
        os.setxattr(layer / "file", name, value)
    data = bytes_of(layer)
    out = extracted(data, tmp_path / "out", *PROGRAMS["GNU tar"])
    assert {name: os.getxattr(out / "file", name) for name in os.listxattr(out / "file")} == wanted
    entry = TarReader(Stream(iter([data]))).next()
    assert entry is not None
    assert entry.attributes == wanted


def test_large_numbers(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    moments = {"old": -1, "very old": -(2**31), "new": 2**33 + 5, "at once": 1_700_000_000_999_999_999 // 10**9}
    for name, moment in moments.items():
        (layer / name).touch()
        os.utime(layer / name, ns=(0, moment * 10**9 + 999_999_999))
        os.chown(layer / name, 4_294_967_294, 2_097_152)
    found = entries_of(bytes_of(layer))
    assert {name: entry.mtime for name, entry in found.items()} == moments
    assert {(entry.uid, entry.gid) for entry in found.values()} == {(4_294_967_294, 2_097_152)}
    os.mknod(layer / "device", stat.S_IFBLK | 0o600, os.makedev(4095, 1_048_575))
    entry = entries_of(bytes_of(layer))["device"]
    assert (entry.type, entry.devmajor, entry.devminor) == (tarfile.BLKTYPE, 4095, 1_048_575)


def test_terabytes_of_nothing(tmp_path: Path) -> None:
    """Its size is exact, and its zeros take no memory."""
    layer = tmp_path / "layer"
    layer.mkdir()
    size = 15 << 40
    (layer / "huge").touch()
    os.truncate(layer / "huge", size)
    (layer / "z").write_bytes(b"z")
    with opened(layer) as found:
        before = 3 * 512  # the extended header
        assert found.size == before + size + 512 + 512 + 1024
        assert found.read(before + size, 512)[:2] == b"z\0"
        assert found.read(before + (7 << 40) + 3, 1 << 20) == bytes(1 << 20)
        with tarfile.open(fileobj=cast(IO[bytes], Raw(found))) as read:
            assert [(each.name, each.size) for each in read] == [("huge", size), ("z", 1)]


class Raw(io.RawIOBase):
    """An open tar as Python's file."""

    def __init__(self, layer: layertar.OpenLayer) -> None:
        self._layer = layer
        self._here = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._here = offset + (0, self._here, self._layer.size)[whence]
        return self._here

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._layer.read(self._here, len(buffer))
        buffer[: len(data)] = data
        self._here += len(data)
        return len(data)


def test_sockets_are_left_out_and_nothing_special_is_opened(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    os.mkfifo(layer / "fifo")
    os.mknod(layer / "terminal", stat.S_IFCHR | 0o600, os.makedev(5, 2))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(layer / "socket"))
    with subprocess.Popen(["sh", "-c", "echo x > fifo"], cwd=layer) as writer:
        assert list(entries_of(bytes_of(layer))) == ["fifo", "terminal"]
        assert writer.poll() is None
        writer.kill()


def test_what_is_mounted_inside_is_not_in_it(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    (layer / "d").mkdir(parents=True)
    (layer / "d/beneath").write_bytes(b"beneath")
    (layer / "file").write_bytes(b"own")
    (tmp_path / "other").write_bytes(b"other")
    expected = bytes_of(layer)
    mounting.mount("none", str(layer / "d"), "tmpfs")
    mounting.mount_bind(str(tmp_path / "other"), str(layer / "file"), read_only=False)
    try:
        assert bytes_of(layer) == expected
    finally:
        for name in ("d", "file"):
            mounting.unmount(str(layer / name), mounting.MNT_DETACH)


def put_another(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_link(path: Path) -> None:
    path.rename(path.with_name("new"))
    path.symlink_to("new")


CHANGES: dict[str, Callable[[Path], None]] = {
    "longer": lambda path: os.truncate(path, 3_000_001),
    "written": lambda path: os.utime(path, ns=(1, 1)),
    "another": put_another,
    "gone": Path.unlink,
    "a FIFO": put_fifo,
    "a link": put_link,
    "a directory that is a link": lambda path: put_link(path.parent),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_that_is_not_what_it_was(tmp_path: Path, change: str, is_open: bool) -> None:
    path = tmp_path / "layer/d/file"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 3_000_000)
    descriptors = len(own_descriptors())
    with opened(tmp_path / "layer") as found:
        if is_open:
            found.read(1_000_000, 10)
        CHANGES[change](path)
        if is_open and change not in ("longer", "written"):
            assert found.read(2_900_000, 10) == b"x" * 10  # it goes on in the file that it has
            return
        with pytest.raises(Damaged, match='"d/file" is not what it was when the headers') as caught:
            found.read(2_900_000, 10)
        assert "d/file" not in caught.value.public
        assert found.read(0, 512)[:2] == b"d/"
    del found
    assert len(own_descriptors()) <= descriptors + 1  # the index goes with the last who knows of it


def test_files_are_looked_at_first_where_something_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO that has come is not opened; while nothing has come, looking at each file would cost time for nothing."""
    monkeypatch.setattr(layertar, "_TICK", 0)
    layer = tmp_path / "layer/d"
    layer.mkdir(parents=True)
    for name in ("a", "b"):
        (layer / name).write_bytes(name.encode() * 100)
    index = make_index(str(layer.parent))
    calls: list[tuple[str, object]] = []

    def noted(call: str, does: Callable[..., object]) -> Callable[..., object]:
        def noting(name: object, *args: object, **more: object) -> object:
            calls.append((call, name))
            return does(name, *args, **more)

        return noting

    for call in ("open", "stat"):
        monkeypatch.setattr(os, call, noted(call, getattr(os, call)))
    with closing(index.open()) as found:
        assert found.read(512, 515)[512:] == b"aaa"
        assert [each for each in calls if each[1] in (b"a", b"b")] == [("open", b"a"), ("open", b"b")]  # all is read at once
        calls.clear()
        put_fifo(layer / "b")
        while layer.lstat().st_ctime_ns < index.begun:  # the kernel's clock has not moved
            os.utime(layer)
        with closing(index.open()) as other, pytest.raises(Damaged, match='"d/b" is not what it was'):
            other.read(4 * 512, 100)
        with pytest.raises(Damaged, match='"d/b" is not what it was'):
            found.load(4 * 512, 100)
        assert {each for each in calls if each[1] in (b"a", b"b")} == {("stat", b"b")}


@pytest.mark.parametrize("missing", [None, "unshare", "thread"])
def test_the_process_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None) -> None:
    """The thread that makes the index goes from directory to directory, if it may; it gives the same if it may not."""
    layer = make_tree(tmp_path / "layer", 3)
    expected = bytes_of(layer)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread") if missing == "thread" else OSError(errno.EPERM, "Not permitted")

    if missing == "unshare":
        monkeypatch.setattr(libc, "separate_thread", refuse)
    elif missing == "thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    here, entered, fchdir = os.getcwd(), list[int](), os.fchdir

    def enter(fd: int) -> None:
        entered.append(fd)
        fchdir(fd)

    monkeypatch.setattr(os, "fchdir", enter)
    assert bytes_of(layer) == expected
    assert os.getcwd() == here
    assert bool(entered) == (missing is None)


def test_directories_ten_thousand_deep(tmp_path: Path) -> None:
    """On a tmpfs, where these are made and deleted in no time."""
    with of_kind("tmpfs", tmp_path / "fast") as layer:
        fd = os.open(layer, os.O_RDONLY)
        for level in range(10_000):
            os.mkdir("d", dir_fd=fd)
            if level % 1000 == 0:
                file = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
                os.write(file, b"%d" % level)
                os.close(file)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        os.chmod(layer, 0o755)
        descriptors = len(own_descriptors())
        with opened(layer) as found:
            assert found.size > sum(2 * level for level in range(10_000))  # their paths alone
            digest = hashlib.sha256()
            for here in range(0, found.size, 1 << 20):
                digest.update(found.read(here, 1 << 20))
            assert found.digest == digest.digest()
            assert len(own_descriptors()) < descriptors + 20
        subprocess.run(["rm", "-rf", f"{layer}/d"], check=True)


def test_a_million_entries_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer, and less in memory, in the same proportion."""
    layer = tmp_path / "layer"
    (layer / "many").mkdir(parents=True)
    for number in range(12_000):
        os.mknod(layer / f"many/{number:0100}")
    monkeypatch.setattr("snapfs.scan.ordered.MANY", 1000)
    monkeypatch.setattr("snapfs.scan.spool.RUN", 1000)
    tracemalloc.start()
    try:
        index = make_index(str(layer))
        with closing(index.open()) as found:
            assert found.size == 12_001 * 512 + 12_000 * 512 * 0 + 1024
            while found.digest is None:
                found.read(index.hashing.frontier, 1 << 17)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert index.on_disk < 12_000 * 30


def test_an_index_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    chance = Random(1)
    for number in range(600):
        (layer / f"{number}").touch()
        os.setxattr(layer / f"{number}", "user.random", chance.randbytes(500))
    (tmp_path / "small").mkdir()
    mounting.mount("none", str(tmp_path / "small"), "tmpfs", 0, "size=512k")
    try:
        with pytest.raises(Unavailable, match="a tenth of the 0 MiB that are free on ROOT's disk: make room there") as caught:
            make_index(str(layer), spool=str(tmp_path / "small"))
        assert caught.value.errno == errno.EFBIG
        assert os.listdir(tmp_path / "small") == []
    finally:
        mounting.unmount(str(tmp_path / "small"))


# -- headers


@given(
    path=st.binary(min_size=1, max_size=400).map(lambda path: path.replace(b"\0", b"x").strip(b"/") or b"x"),
    mode=st.integers(0, 0o7777),
    ids=st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 2**32 - 2)),
    mtime=st.integers(-(2**40), 2**40),
    size=st.integers(0, 2**60),
    attributes=st.dictionaries(st.sampled_from([b"user.a", b"user.\xc3\xa9", b"security.capability"]), st.binary(max_size=300)),
)
def test_python_reads_what_a_header_says(
    path: bytes, mode: int, ids: tuple[int, int], mtime: int, size: int, attributes: dict[bytes, bytes]
) -> None:
    data = tar.header(path, tar.REGULAR, mode, *ids, mtime, size=size, attributes=attributes)
    assert len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data + tar.END), errors="surrogateescape") as read:
        entry = read.next()
        assert entry is not None
        assert os.fsencode(entry.name) == path
        assert (entry.mode, entry.uid, entry.gid, entry.mtime, entry.size) == (mode, *ids, mtime, size)
        found = {key: value for key, value in entry.pax_headers.items() if key.startswith("SCHILY")}
        assert {key.encode(): value.encode(errors="surrogateescape") for key, value in found.items()} == {
            b"SCHILY.xattr." + key: value for key, value in attributes.items()
        }
