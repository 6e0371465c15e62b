"""Random layers that are squashed: what the kernel shows of them before and after."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.rules.root import overlay_prefix
from snapfs.scan.squashing import squash
from tests.kernel_changes import merged, random_chain, tree

OPTIONS = "redirect_dir=off,index=off,metacopy=off"
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def acl(user: int, permissions: int) -> bytes:
    """An access control list with a word on one more user, as the kernel has them (linux/posix_acl_xattr.h)."""
    entries = [(0x01, 7, -1), (0x02, permissions, user), (0x04, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


class View(NamedTuple):
    """What the kernel shows.  ``paths``: all that can be seen of each, with its time, and the first path of its inode;
    ``unreal``: names that are listed, but not there (of whiteouts in a directory that is not merged)."""

    paths: dict[bytes, tuple[object, ...]]
    unreal: set[bytes]


def view(layers: Sequence[str | Path], scratch: str | Path, options: str = OPTIONS) -> View:
    with merged([str(layer) for layer in layers], f"{scratch}/view", options) as target:
        top = os.fsencode(target)
        paths: dict[bytes, tuple[object, ...]] = {}
        unreal: set[bytes] = set()
        first: dict[tuple[int, int], bytes] = {}
        for path, (is_directory, seen) in sorted(tree(target, overlay_prefix(options.split(","))).items()):
            place = top + path
            found = os.lstat(place)
            size = found.st_size if not is_directory else None
            paths[path] = seen, size, found.st_mtime_ns, first.setdefault((found.st_dev, found.st_ino), path)
            if is_directory:
                names = [os.path.join(path, name) for name in os.listdir(place)]
                unreal |= {name for name in names if not os.path.lexists(top + name)}
        return View(paths, unreal)


def squashed(layers: Sequence[str | Path], target: str, *, lowest: bool, options: str = OPTIONS) -> str:
    """The new directory ``target``, filled."""
    os.mkdir(target)
    prefix = overlay_prefix(options.split(","))
    squash([str(layer) for layer in layers], target, prefix=prefix, lowest=lowest)
    return target


def same(old: View, new: View) -> None:
    """Assert that ``new`` shows what ``old`` does."""
    differences = {path for path in old.paths.keys() | new.paths.keys() if old.paths.get(path) != new.paths.get(path)}
    assert {path: (old.paths.get(path), new.paths.get(path)) for path in sorted(differences)} == {}
    assert new.unreal <= old.unreal


def check(layers: Sequence[str | Path], scratch: str | Path, options: str = OPTIONS, others: Sequence[str] = ()) -> None:
    """Squash the chain ``layers``, and each of its upper parts: the kernel shows the same of the one layer, and of each part
    above all that it may stand on, ``others`` as well; and in all layers nothing has changed but how many links there are."""
    raw = [tree(str(layer), "none") for layer in layers]
    old = view(layers, scratch, options)
    whole = squashed(layers, f"{scratch}/whole", lowest=True, options=options)
    alone = view([whole], scratch, options)
    same(old, alone)
    assert not alone.unreal
    os.mkdir(f"{scratch}/empty")
    same(view([f"{scratch}/empty", *layers], scratch, options), view([f"{scratch}/empty", whole], scratch, options))
    for count in range(1, len(layers)):
        fold = squashed(layers[:count], f"{scratch}/fold{count}", lowest=False, options=options)
        for kept in range(count + 1):
            same(old, view([fold, *layers[kept:]], scratch, options))
        for other in (f"{scratch}/empty", *others):
            same(view([*layers[:count], other], scratch, options), view([fold, other], scratch, options))
    assert [tree(str(layer), "none") for layer in layers] == raw


def entries(random: Random, top: str) -> list[str]:
    """Some paths below ``top``, of which each has a chance."""
    paths = [f"{where}/{name}" for where, directories, files in os.walk(top) for name in (*directories, *files)]
    return random.sample(paths, min(len(paths), random.randint(0, 4)))


def alter(random: Random, layer: str, prefix: str) -> None:
    """Have more in a layer than random programs put there: access control lists, old times, attributes, sockets; whiteouts of
    the other kind, and some that hide nothing."""
    for path in entries(random, layer):
        found = os.lstat(path)
        with contextlib.suppress(OSError):  # of a kind that can't have it
            if stat.S_ISDIR(found.st_mode) and random.random() < 0.3:
                os.setxattr(path, DEFAULT, acl(random.choice([0, 1]), 5))
            if not stat.S_ISLNK(found.st_mode) and random.random() < 0.3:
                os.setxattr(path, ACCESS, acl(random.choice([0, 1]), 6))
            if random.random() < 0.3:
                os.setxattr(
                    path, random.choice(["user.x", f"{prefix}overlay.x", f"{prefix}impure"]), b"y", follow_symlinks=False
                )
        if random.random() < 0.3:
            os.utime(path, ns=(1, random.randrange(10**18)), follow_symlinks=False)
        directory = path if stat.S_ISDIR(found.st_mode) else os.path.dirname(path)
        if random.random() < 0.3 and not os.path.lexists(f"{directory}/a-"):
            os.mknod(f"{directory}/a-", random.choice([stat.S_IFCHR, stat.S_IFSOCK | 0o600]))
        with contextlib.suppress(OSError):  # a directory, a name in use
            os.link(path, random.choice([f"{layer}/b", f"{directory}/b"]), follow_symlinks=False)
    for directory, _, files in os.walk(layer) if random.random() < 0.5 else ():
        whiteouts = [f"{directory}/{name}" for name in files if _is_whiteout(f"{directory}/{name}")]
        if whiteouts and f"{prefix}opaque" not in os.listxattr(directory):
            os.setxattr(directory, f"{prefix}opaque", b"x")
            for path in whiteouts:
                os.unlink(path)
                Path(path).touch()
                os.setxattr(path, f"{prefix}whiteout", b"")
    if random.random() < 0.1 and f"{prefix}opaque" not in os.listxattr(layer):  # no kernel makes whiteouts that are files there
        os.setxattr(layer, f"{prefix}opaque", b"y")


def _is_whiteout(path: str) -> bool:
    found = os.lstat(path)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


@settings(max_examples=40, deadline=None, database=None)
@given(random=st.randoms(use_true_random=True))
def compare_squashes_with_kernel(random: Random, options: str) -> None:
    """Layers that are made through overlay mounts, and altered; the choices come seeded, so that they make dense trees."""
    scratch = tempfile.mkdtemp(prefix="squashing-")
    try:
        chains = []
        for name in ("one", "other"):
            os.mkdir(f"{scratch}/{name}")
            chains.append(random_chain(random, f"{scratch}/{name}", options))
            for layer in chains[-1]:
                alter(random, layer, overlay_prefix(options.split(",")))
        check(chains[0], scratch, options, chains[1])
    finally:
        shutil.rmtree(scratch)
