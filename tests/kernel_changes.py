"""What the kernel shows of overlayfs layers, beside what ``changes`` says of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.kernel import mounting
from snapfs.rules.root import overlay_prefix
from snapfs.scan.changes import changes
from snapfs.scan.marks import PREFIX


def raw(line: str) -> tuple[str, bytes]:
    """The verb and the path of a line."""
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    verb, slash, path = line[0], line[1:3], line[2:-1]
    assert slash == " /"

    def plain(match: re.Match[bytes]) -> bytes:
        return {b"\\": b"\\", b"n": b"\n"}.get(match[1]) or bytes([int(match[1], 8)])

    return verb, re.sub(rb"\\(\\|n|0[0-7]{3})", plain, path.encode())


def found(layers: Sequence[str | Path], prefix: str = PREFIX) -> list[tuple[str, bytes]]:
    """What ``changes`` says, in order, which is asserted."""
    result = [raw(line) for line in changes([str(layer) for layer in layers], prefix=prefix)]
    paths = [path for _, path in result]
    assert paths == sorted(set(paths))
    return result


def said(layers: Sequence[str | Path], prefix: str = PREFIX) -> list[str]:
    return [line[:-1] for line in changes([str(layer) for layer in layers], prefix=prefix)]


@contextlib.contextmanager
def merged(layers: Sequence[str], target: str, options: str, writable: str | None = None) -> Iterator[str]:
    """The merged ``layers`` on ``target``; ``writable``: the work directory, where the first layer is the upper one."""
    os.makedirs(target, exist_ok=True)
    if writable is None and len(layers) == 1:
        mounting.mount(layers[0], target, "", 0x1000)  # MS_BIND
    elif writable is None:
        mounting.mount("overlay", target, "overlay", 1, f"lowerdir={':'.join(layers)},{options}")
    else:
        own = f"upperdir={layers[0]},workdir={writable}"
        mounting.mount("overlay", target, "overlay", 0, f"{own},lowerdir={':'.join(layers[1:])},{options}")
    try:
        yield target
    finally:
        mounting.unmount(target, mounting.MNT_DETACH)  # another test may be looking through all of /tmp


def attributes(path: bytes, prefix: str) -> dict[str, bytes]:
    """All that are no marks of the overlay's, of which a bind mount shows more."""
    with contextlib.suppress(OSError):
        names = os.listxattr(path, follow_symlinks=False)
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith(prefix)}
    return {}


Tree = dict[bytes, tuple[object, ...]]


def tree(top: str, prefix: str) -> Tree:
    """All that is in ``top``: path -> (whether it is a directory, all else that can be seen of it)."""
    result: Tree = {}
    start = os.fsencode(top)
    pending = [start]
    while pending:
        path = pending.pop()
        try:
            own = os.lstat(path)
        except FileNotFoundError:
            continue  # a whiteout in a directory that is not merged: listed, but not there
        content: bytes | int = own.st_rdev
        if stat.S_ISDIR(own.st_mode):
            pending += [os.path.join(path, name) for name in os.listdir(path)]
        elif stat.S_ISREG(own.st_mode):
            content = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(own.st_mode):
            content = os.readlink(path)
        result[path[len(start) :] or b"/"] = (
            stat.S_ISDIR(own.st_mode),
            (own.st_mode, own.st_uid, own.st_gid, content, attributes(path, prefix)),
        )
    return result


def expected(layers: Sequence[str], scratch: str, options: str) -> set[tuple[str, bytes]]:
    """The difference of what the kernel shows without and with the layer."""
    prefix = overlay_prefix(options.split(","))
    with merged(layers[1:], f"{scratch}/lower", options) as target:
        old = tree(target, prefix)
    with merged(layers, f"{scratch}/all", options) as target:
        new = tree(target, prefix)
    result = {("A", path) for path in new.keys() - old.keys()}
    for path in old.keys() - new.keys():
        if new.get(os.path.dirname(path), (False,))[0]:  # else it went with its directory
            result.add(("D", path))
    for path in old.keys() & new.keys():
        differs = old[path] != new[path]
        if not (old[path][0] and new[path][0]):
            in_layer = os.path.lexists(os.fsencode(layers[0]) + path)
            assert in_layer or not differs
            differs = in_layer
        if differs:
            result.add(("C", path))
    return result


NAMES = ["a", "b", "a.b", "a-", "a\nb", "\\n", os.fsdecode(b"a\xff"), "a\uffff", "\x01é"]


def write(path: str, other: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK)  # a fifo would block
    os.write(fd, os.fsencode(other))
    os.close(fd)


def append(path: str, other: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))  # copied up, and not changed


def remove(path: str, other: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def make_anew(path: str, other: str) -> None:
    remove(path, other)
    os.mkdir(path)


def replace(path: str, other: str) -> None:
    was_directory = os.path.isdir(path)
    remove(path, other)
    if was_directory:
        write(path, other)
    else:
        os.makedirs(f"{path}/a/b")


def move(path: str, other: str) -> None:
    try:
        os.rename(path, other)
    except OSError:
        if os.path.isdir(path) and not os.path.lexists(other) and os.path.isdir(os.path.dirname(other)):
            subprocess.run(["mv", "-T", path, other], stderr=subprocess.DEVNULL, check=False)


def fill(path: str, other: str) -> None:
    for name in ("a", "a.b"):
        os.makedirs(f"{path}/{name}")
        write(f"{path}/{name}/a", other)


FORGED = {"opaque": (b"y", b"x"), "redirect": (b"/a", b"b"), "whiteout": (b"",), "metacopy": (b"",), "origin": (b"",)}


def forge(path: str, other: str) -> None:
    """What any user can set, and the kernel obeys only where the overlay is mounted with userxattr."""
    mark = list(FORGED)[len(other) % len(FORGED)]
    os.setxattr(path, f"user.overlay.{mark}", FORGED[mark][len(path) % len(FORGED[mark])])


MAKING: list[Callable[[str, str], None]] = [
    write,
    fill,
    lambda path, other: os.mkdir(path),
    lambda path, other: os.symlink(os.path.basename(other), path),
    lambda path, other: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
]

STEPS: list[Callable[[str, str], None]] = [
    *MAKING,
    append,
    remove,
    make_anew,
    make_anew,
    replace,
    move,
    lambda path, other: os.chmod(path, 0o700),
    lambda path, other: os.chown(path, 5, 6, follow_symlinks=False),
    os.link,
    lambda path, other: os.mkfifo(other),
    lambda path, other: os.setxattr(path, "user.test", other.encode(errors="replace")[-5:]),
]


def some_path(random: Random, target: str, new: bool) -> str:
    """A path below ``target``: of something that is there, or a new one in a directory that is there."""
    paths = [(directory, name) for directory, below, files in os.walk(target) for name in (*below, *files)]
    directory, name = random.choice(paths) if paths else (target, "a")
    if new:
        name = random.choice(NAMES)
        return f"{directory}/{name}" if random.random() < 0.5 else f"{random.choice([target, directory])}/{name}"
    return f"{directory}/{name}"


def random_chain(random: Random, scratch: str, options: str, more: Sequence[Callable[[str, str], None]] = ()) -> list[str]:
    """Layers, the nearest first, made in the directory ``scratch`` through overlay mounts, layer on layer; also by the steps
    ``more``."""
    chain: list[str] = []
    for number in range(random.randint(2, 4)):
        chain.insert(0, random_layer(random, scratch, options, chain, str(number), more))
    return chain


def random_layer(
    random: Random, scratch: str, options: str, chain: Sequence[str], name: str, more: Sequence[Callable[[str, str], None]] = ()
) -> str:
    """One more of them, on ``chain``, called ``name``."""
    steps = [*STEPS, *more] if "userxattr" in options else [*STEPS, forge, forge, *more]
    layer, work = f"{scratch}/{name}", f"{scratch}/work{name}"
    os.mkdir(layer)
    os.mkdir(work)
    upper = merged([layer, *chain], f"{scratch}/mnt", options, work) if chain else contextlib.nullcontext(layer)
    with upper as target:
        for _ in range(random.randint(0, 12) if chain else 25):
            step = random.choice(steps if chain else [*MAKING, *more])
            with contextlib.suppress(OSError):
                step(some_path(random, target, step in MAKING), some_path(random, target, True))
        if random.random() < 0.1:
            os.chmod(target, 0o700)
    return layer


@settings(max_examples=100, deadline=None, database=None)
@given(random=st.randoms(use_true_random=True))
def compare_with_kernel(random: Random, options: str) -> None:
    """Trees that are made through overlay mounts; the choices come seeded, so that they make dense trees."""
    scratch = tempfile.mkdtemp(prefix="changes-")
    try:
        chain = random_chain(random, scratch, options)
        assert set(found(chain, overlay_prefix(options.split(",")))) == expected(chain, scratch, options)
    finally:
        shutil.rmtree(scratch)


# Layers made by hand


def have_little_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may wait in a file does, in pieces of some bytes, and few names are looked at at once."""
    monkeypatch.setattr("snapfs.scan.spool.RUN", 3)
    monkeypatch.setattr("snapfs.scan.spool._CHUNK", 7)
    monkeypatch.setattr("snapfs.scan.spool.MERGED", 0)
    monkeypatch.setattr("snapfs.scan.marks.BATCH", 2)


class Chain:
    """Layers, the nearest first, each made on top of the last; names that end in a slash are directories."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.layers: list[str] = []

    def layer(self, *paths: str, **marks: str) -> Path:
        """``D:path`` is a whiteout, ``X:path`` one with an extended attribute."""
        made = self.base / f"layer{len(self.layers)}"
        made.mkdir()
        self.layers.insert(0, str(made))
        for path in paths:
            kind, name = path.split(":") if path[1:2] == ":" else ("", path)
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (made / name).mkdir(exist_ok=True)
            elif kind == "D":
                os.mknod(made / name, stat.S_IFCHR, os.makedev(0, 0))
            else:
                (made / name).write_text("" if kind else "text")
                if kind:
                    os.setxattr(made / name, "trusted.overlay.whiteout", b"")
        for path, mark in marks.items():
            os.setxattr(made / path, "trusted.overlay.opaque", mark.encode())
        return made

    def check(self, *lines: str) -> None:
        """That ``changes`` says ``lines``, and the kernel shows the same."""
        assert said(self.layers) == list(lines)
        options = "redirect_dir=off,index=off,metacopy=off"
        assert expected(self.layers, str(self.base), options) == {raw(f"{line}\n") for line in lines}


def make_comb(directory: Path, levels: int, name: str) -> None:
    """Directories in directories, beyond what a path can name, each with one to come back for."""
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        os.mkdir(f"z{name[:2]}", dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
