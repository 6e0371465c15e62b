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

from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.kernel import mounting
from snapfs.rules.root import overlay_prefix
from snapfs.scan.changes import PREFIX, changes


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
        mounting.unmount(target)


def attributes(path: bytes, prefix: str) -> dict[str, bytes]:
    """All that are no marks of the overlay's, of which a bind mount shows more."""
    with contextlib.suppress(OSError):
        names = os.listxattr(path, follow_symlinks=False)
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith(prefix)}
    return {}


def tree(top: str, prefix: str) -> dict[bytes, tuple[object, ...]]:
    """All that is in ``top``: path -> (whether it is a directory, all else that can be seen of it)."""
    result: dict[bytes, tuple[object, ...]] = {}
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


@settings(max_examples=100, deadline=None, database=None)
@given(random=st.randoms(use_true_random=True))
def compare_with_kernel(random: Random, options: str) -> None:
    """Trees that are made through overlay mounts, layer on layer; the choices come seeded, so that they make dense trees."""
    steps = STEPS if "userxattr" in options else [*STEPS, forge, forge]
    scratch = tempfile.mkdtemp(prefix="changes-")
    try:
        chain: list[str] = []
        for number in range(random.randint(2, 4)):
            layer, work = f"{scratch}/{number}", f"{scratch}/work{number}"
            os.mkdir(layer)
            os.mkdir(work)
            chain.insert(0, layer)
            upper = merged(chain, f"{scratch}/mnt", options, work) if number else contextlib.nullcontext(layer)
            with upper as target:
                for _ in range(random.randint(0, 12) if number else 25):
                    step = random.choice(steps if number else MAKING)
                    with contextlib.suppress(OSError):
                        step(some_path(random, target, step in MAKING), some_path(random, target, True))
                if random.random() < 0.1:
                    os.chmod(target, 0o700)
        assert set(found(chain, overlay_prefix(options.split(",")))) == expected(chain, scratch, options)
    finally:
        shutil.rmtree(scratch)
