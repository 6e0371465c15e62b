"""Patches between chains of layers: what ``git apply`` makes of one, on a copy of what the kernel shows, is the measure."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.rules.root import overlay_prefix
from snapfs.scan.lines import lines
from snapfs.scan.marks import PREFIX
from snapfs.scan.patch import patch
from tests.kernel_changes import Tree, merged, random_chain, random_layer, raw, tree

ALONE = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_CEILING_DIRECTORIES": "/"}
"""The environment in which git heeds no configuration, and no repository around."""


def text_of(old: Sequence[str], new: Sequence[str], *, prefix: str = PREFIX, binary: bool = False) -> bytes:
    pieces = list(patch(old, new, prefix=prefix, binary=binary))
    assert all(pieces), "an empty one is the end to who joins them"
    return "".join(pieces).encode(errors="surrogateescape")


def as_git_sees_it(top: str) -> dict[bytes, tuple[object, ...]]:
    """All regular files and links below ``top``: path -> (kind, whether its owner may execute it, content)."""
    found: dict[bytes, tuple[object, ...]] = {}
    start = os.fsencode(top)
    for directory, directories, files in os.walk(start):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue  # a whiteout in a directory that is not merged: listed, but not there
            if stat.S_ISLNK(mode):
                found[path[len(start) :]] = ("link", False, os.readlink(path))
            elif stat.S_ISREG(mode):
                found[path[len(start) :]] = ("file", bool(mode & 0o100), Path(os.fsdecode(path)).read_bytes())
    return found


def applied(base: str, text: bytes) -> None:
    """Have git apply ``text`` in the directory ``base``."""
    if text:
        for options in (["--check"], []):
            subprocess.run(["git", "apply", "--whitespace=nowarn", *options], input=text, cwd=base, check=True, env=ALONE)


def check_with_git(old: Sequence[str], new: Sequence[str], scratch: str, options: str) -> bytes:
    """That git makes of a copy of ``old`` what the kernel shows of ``new``; the patch."""
    base = f"{scratch}/base"
    with copied(old, scratch, options) as source:
        subprocess.run(["cp", "-a", source, base], check=True)
        for directory, directories, files in os.walk(base, topdown=False):  # git knows no others, and trips over these
            for name in (*directories, *files):
                path = f"{directory}/{name}"
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode) and not os.listdir(path):
                    os.rmdir(path)
                elif not (stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                    os.unlink(path)
    prefix = overlay_prefix(options.split(","))
    text = text_of(old, new, prefix=prefix, binary=True)
    with copied(old, scratch, options) as source:
        before = tree(source, prefix) if old else {}
    try:
        with copied(new, scratch, options) as target:
            check_lines(old, new, prefix, before, tree(target, prefix) if new else {})
            if any(loops(f"{base}/{name}") and os.path.isdir(f"{target}/{name}") for name in everything(base)):
                return text  # whatever git looks up in that directory before it makes it, is an error to it
            applied(base, text)
            assert as_git_sees_it(base) == as_git_sees_it(target), text
    finally:
        shutil.rmtree(base)
    return text


def check_lines(old: Sequence[str], new: Sequence[str], prefix: str, before: Tree, after: Tree) -> None:
    """That the lines between the two say in what these trees differ."""
    expected = {("A", path) for path in after.keys() - before.keys() - {b"/"}}
    for path in before.keys() - after.keys() - {b"/"}:
        if after.get(os.path.dirname(path), (path.count(b"/") == 1,))[0]:  # else it went with its directory
            expected.add(("D", path))
    shown = before.keys() & after.keys()
    found = [raw(line) for line in lines(old, new, prefix=prefix, content=True)]
    assert len(found) == len(set(found))
    assert set(found) == expected | {("C", path) for path in shown if before[path] != after[path]}
    more = {raw(line) for line in lines(old, new, prefix=prefix)} - set(found)
    assert all(verb == "C" and path in shown and not before[path][0] for verb, path in more)


def check_paths(random: Random, old: Sequence[str], new: Sequence[str], prefix: str) -> None:
    """That a patch of some paths is that part of the whole."""
    parts = parts_of(old, new, prefix, ())
    names = sorted(name for name, _ in parts) or [b"a"]
    paths = [b"/".join(path[: random.randint(1, len(path))]) for path in (random.choice(names).split(b"/") for _ in range(2))]
    among = [part for part in parts if any(part[0] == path or part[0].startswith(path + b"/") for path in paths)]
    assert parts_of(old, new, prefix, paths) == among
    assert parts_of(old, new, prefix, [b"no/such"]) == []


def parts_of(old: Sequence[str], new: Sequence[str], prefix: str, paths: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The patch of ``paths``, by the path that each part is of."""
    pieces = patch(old, new, prefix=prefix, paths=paths, binary=True)
    text = "".join(pieces).encode(errors="surrogateescape")
    parts = re.split(rb"^(?=diff --git )", text, flags=re.MULTILINE)[1:]
    return [(_unquoted(part[11:].partition(b"\n")[0]), part) for part in parts]


def _unquoted(names: bytes) -> bytes:
    """The path in the two names, which have the same length."""
    name = names[: len(names) // 2]
    if name[:1] != b'"':
        return name[2:]
    escapes = {b"n": b"\n", b"\\": b"\\"}
    return re.sub(rb"\\([n\\]|[0-7]{3})", lambda found: escapes.get(found[1]) or bytes([int(found[1], 8)]), name[3:-1])


def everything(top: str) -> list[str]:
    return [os.path.relpath(f"{above}/{name}", top) for above, below, files in os.walk(top) for name in (*below, *files)]


def loops(path: str) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def copied(layers: Sequence[str], scratch: str, options: str) -> AbstractContextManager[str]:
    """What the kernel shows of them, or of none, for a block."""
    if not layers:
        os.makedirs(f"{scratch}/nothing", exist_ok=True)
        layers = [f"{scratch}/nothing"]
    return merged(layers, f"{scratch}/shown", options)


TEXTS = [
    b"",
    b"one",
    b"one\n",
    b"\n",
    b"1\n2\n3\n4\n5\n6\n7\n8\n9\n",
    b"\r\nx\r\n",
    b"nul\0\n",
    b"\xff\xfe\n",
    b"-- \n+\n@@ -1 +1 @@\n",
    b"\\ No\n",
]


def edited(random: Random) -> Callable[[str, str], None]:
    """A step that edits a file by lines, or makes it."""

    def edit(path: str, other: str) -> None:
        if os.path.isdir(path):
            path += "/text"
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            return
        lines = Path(path).read_bytes().splitlines(keepends=True) if os.path.exists(path) else []
        lines = lines or random.choices([b"a\n", b"b\n", b"c\n", b"%d\n" % random.randrange(100)], k=random.randrange(60))
        for _ in range(random.randrange(4)):
            place = random.randrange(len(lines) + 1)
            lines[place : place + random.randrange(3)] = [random.choice(TEXTS)]
        Path(path).write_bytes(b"".join(lines))

    return edit


def make_executable(path: str, other: str) -> None:
    os.chmod(path, 0o755 if os.lstat(path).st_mode & 0o111 == 0 else 0o644)


@settings(max_examples=10, deadline=None, database=None)
@given(random=st.randoms(use_true_random=True))
def compare_with_git(random: Random, options: str) -> None:
    """Trees that are made through overlay mounts: a snapshot beside its parent, both ways round, beside a sibling, beside one
    that it has nothing in common with, and beside nothing."""
    scratch = tempfile.mkdtemp(prefix="patch-")
    more = [edited(random)] * 12 + [make_executable] * 2
    try:
        chain = random_chain(random, scratch, options, more)
        fork = chain[random.randrange(len(chain)) :]
        sibling = [random_layer(random, scratch, options, fork, "sibling", more), *fork]
        stranger = [random_layer(random, scratch, options, [], "stranger", more)]
        pairs = [
            (chain[1:], chain),
            (chain, chain[1:]),
            (chain, sibling),
            (sibling, chain[1:]),
            (stranger, chain),
            ([], chain),
            (chain, []),
        ]
        for old, new in pairs:
            check_with_git(old, new, scratch, options)
            check_paths(random, old, new, overlay_prefix(options.split(",")))
        assert text_of(chain, chain) == b""
    finally:
        shutil.rmtree(scratch)
