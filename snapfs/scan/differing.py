"""Where what one chain of layers shows differs from what another shows: the two merged views, walked side by side.

What both chains share, the same directory of the same layer below all that is merged over it, is not read: where one chain is
a part of the other, as a parent's is, the walk takes as long as the layers above.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from itertools import groupby

from snapfs.errors import FailedPrecondition
from snapfs.names import printable
from snapfs.scan.marks import DIRECTORY, FILE, OTHER, LayerDirectory, Marks
from snapfs.scan.spool import Spool
from snapfs.scan.walk import Descriptors, Way

MANY = 120_000  # entries of one directory that are compared in memory; of a larger one they wait in a file
HELD = 250_000  # entries that all directories on the way down may have in memory
_HARDLY_ANY = 100  # entries of one directory that are compared in memory even so, where there is nothing below
READ = 1 << 20  # bytes of a file that are read at once
_FILES = (FILE, OTHER)
_FEW = 30  # names that are looked up one by one; for more, listing the directory is faster

# What the layers have at a name: the number of each directory that has it, and what it is there
Kinds = list[tuple[int, int]]


class Shown:
    """What a chain shows at a name: merged ``directories``, the nearest first, or else what is no directory, in ``parent``.
    ``regular``: a regular file, as that directory says."""

    __slots__ = ("directories", "parent", "regular")

    def __init__(
        self, parent: LayerDirectory | None, directories: Sequence[LayerDirectory] = (), *, regular: bool = False
    ) -> None:
        self.parent = parent
        self.directories = directories
        self.regular = regular


class Difference:
    """What may differ: ``name`` in the directory to which ``way`` leads, while the walk stands there ("": the root of both
    chains); and what the ``old`` and the ``new`` one show there, None for nothing."""

    __slots__ = ("_way", "name", "new", "old")

    def __init__(self, way: Way[bytes], name: str, old: Shown | None, new: Shown | None) -> None:
        self._way = way
        self.name = name
        self.old = old
        self.new = new

    @property
    def path(self) -> bytes:
        """Its path, from the root of both chains on and without a slash at its begin."""
        return self._way.path + os.fsencode(self.name)


Wanted = dict[str, "Wanted | None"]
"""Names of a directory, and what is wanted of each: None for all that is there and in it."""


def wanted(paths: Iterable[bytes]) -> Wanted | None:
    """What ``paths`` want, each from the root on; None for everything, as where there are none."""
    result: Wanted = {}
    for path in paths:
        here: Wanted = result
        *above, last = [os.fsdecode(name) for name in path.split(b"/") if name] or [""]
        if not last:
            return None
        for name in above:
            below = here.setdefault(name, {})
            if below is None:  # all of that is wanted anyway
                break
            here = below
        else:
            here[last] = None
    return result or None


class _Level:
    """A directory in both chains: ``directories`` of layers, of which the first ``old`` are merged in the one alone, those up
    to ``shared`` in the other alone, and the others in both.  ``wanted``: of its entries; ``held``: how many of them it has in
    memory."""

    __slots__ = ("directories", "entries", "held", "old", "shared", "wanted")

    def __init__(self, old: Sequence[LayerDirectory], new: Sequence[LayerDirectory], wanted: Wanted | None) -> None:
        count = 0
        while count < min(len(old), len(new)) and old[-1 - count] is new[-1 - count]:
            count += 1
        self.old = len(old) - count
        self.shared = self.old + len(new) - count
        self.directories = [*old[: self.old], *new]
        self.wanted = wanted
        self.held = 0
        self.entries: Iterator[tuple[str, Kinds]] = iter(())


def differences(
    old: Sequence[str],
    new: Sequence[str],
    descriptors: Descriptors,
    spool: Spool,
    prefix: str,
    checkpoint: Callable[[], None],
    paths: Iterable[bytes] = (),
    *,
    enters: Callable[[Difference], bool],
) -> Generator[Difference, None, None]:
    """Each path that a layer has which one of the chains ``old`` and ``new`` has alone, where it may make a difference; sorted,
    but that what is in a directory comes right after it.  A directory that is gone, or new, is followed by all that is in it,
    where ``enters`` says that it is to be entered: a small layer may have directories as deep as it likes, and the path of each
    is as long.  The root, with an empty path, is the first.  Only ``paths`` and what is in them, where there are any.

    Chains are paths of layers, the nearest first, as overlayfs takes them.  Directories are open in ``descriptors``, entries
    wait in ``spool``; the rest is as for ``changes``.  Raises OSError, and FailedPrecondition where a directory's contents come
    from one of another name.
    """
    walk = _Walk(descriptors, spool, Marks(descriptors, prefix, checkpoint, alone=max(len(old), len(new)) < 2))
    lowest = {*old[-1:], *new[-1:]}
    roots = {layer: LayerDirectory(layer, None, layer in lowest) for layer in dict.fromkeys([*old, *new])}
    way = Way(b"")
    top = _Level([roots[layer] for layer in old], [roots[layer] for layer in new], wanted(paths))
    if top.wanted is None:
        walk.read_roots(top.directories)
    if top.wanted is None and top.shared:
        yield Difference(way, "", *(Shown(None, [roots[layer] for layer in side]) for side in (old, new)))
    stack = [walk.expanded(top)]
    checkpoint()
    while stack:
        level = stack[-1]
        for name, kinds in level.entries:
            before, after = walk.shown(level, name, kinds)
            if before is after:  # nothing, or the same
                continue
            inside = level.wanted[name] if level.wanted is not None else None
            found = Difference(way, name, before, after)
            if inside is None:
                yield found
            is_merged = (before is not None and before.directories) or (after is not None and after.directories)
            if is_merged and (inside is not None or enters(found)):
                way.enter(os.fsencode(name) + b"/")
                checkpoint()
                merged = [side.directories if side is not None else () for side in (before, after)]
                stack.append(walk.expanded(_Level(merged[0], merged[1], inside)))
                break
        else:
            stack.pop()
            walk.held -= level.held
            for directory in level.directories:
                descriptors.close(directory)
            way.leave()


class _Walk:
    """What the walk reads from the disk."""

    def __init__(self, descriptors: Descriptors, spool: Spool, marks: Marks) -> None:
        self.marks = marks
        self.marks.regular = FILE
        self.held = 0  # entries of all levels that are in memory
        self._descriptors = descriptors
        self._spool = spool

    def read_roots(self, directories: Iterable[LayerDirectory]) -> None:
        """Read the marks of those of ``directories`` that are layers: overlayfs merges them, opaque or not; this only learns of
        whiteouts."""
        for directory in directories:
            if directory.parent is None:
                self.marks.read(directory)

    def expanded(self, level: _Level) -> _Level:
        """``level``, after the entries have been read that can make a difference: those of the directories that both chains
        don't share."""
        most = MANY if self.held < HELD else _HARDLY_ANY
        is_lazy = level.wanted is not None  # of some hundred layers most have nothing of a path: they are not opened
        if is_lazy:
            self.read_roots(level.directories[: level.shared])
        found: dict[str, Kinds] = {}
        for number, directory in enumerate(level.directories[: level.shared]):
            some = self.marks.entries(directory) if level.wanted is None else self._among(directory, level.wanted)
            for name, kind in some:
                found.setdefault(name, []).append((number, kind))
                if len(found) > most:
                    level.entries = self._spooled(level)
                    return level
        missing = set(found)
        for number, directory in enumerate(level.directories[level.shared :], level.shared):
            if is_lazy and not missing:
                break
            if is_lazy:
                self.read_roots([directory])
            for name, kind in self._among(directory, missing):
                found[name].append((number, kind))
                if kind != DIRECTORY:
                    missing.discard(name)
        all_kinds = found.values()
        if self.held >= HELD and any(kind == DIRECTORY for kinds in all_kinds for _, kind in kinds):  # else it goes at once
            level.entries = self._spooled(level)
            return level
        level.held = sum(map(len, all_kinds))
        self.held += level.held
        level.entries = iter([(name, found[name]) for name in sorted(found, key=os.fsencode)])
        return level

    def _among(self, directory: LayerDirectory, names: Collection[str]) -> list[tuple[str, int]]:
        """Those of ``names`` that the directory has, and what they are."""
        if len(names) > _FEW:
            return [(name, kind) for name, kind in self.marks.entries(directory) if name in names]
        return [(name, kind) for name in names if (kind := self.marks.kind(directory, name)) is not None]

    def _spooled(self, level: _Level) -> Iterator[tuple[str, Kinds]]:
        """The entries of ``level``, which are too many for the memory."""
        if level.wanted is not None:
            self.read_roots(level.directories[level.shared :])
        marked = (
            (os.fsencode(name), b"%06d%d" % (number, kind))
            for number, directory in enumerate(level.directories)
            for name, kind in self.marks.entries(directory)
            if level.wanted is None or name in level.wanted
        )
        for name, entries in groupby(self._spool.in_order(marked), key=lambda entry: entry[0]):
            kinds = [(int(mark[:6]), int(mark[6:])) for _, mark in entries]
            if kinds[0][0] < level.shared:
                yield os.fsdecode(name), kinds

    def shown(self, level: _Level, name: str, kinds: Kinds) -> tuple[Shown | None, Shown | None]:
        """What the two chains show at ``name``; the same object, where it is what both share."""
        if len(kinds) == 2 and not level.old and kinds[0][0] < level.shared <= kinds[1][0]:
            (own, kind), (under, kind_below) = kinds
            if kind in _FILES and kind_below in _FILES:  # as most are: the one chain has its own version of a file of both
                directories = level.directories
                old = Shown(directories[under], regular=kind_below == FILE)
                return old, Shown(directories[own], regular=kind == FILE)
        below: Shown | None = None
        is_known = False
        found: list[Shown | None] = []
        for begin, end in ((0, level.old), (level.old, level.shared)):
            above, hides = self._merged(level, name, [each for each in kinds if begin <= each[0] < end])
            if not hides:
                if not is_known:
                    below, _ = self._merged(level, name, [each for each in kinds if each[0] >= level.shared])
                    is_known = True
                if above is None:
                    above = below
                elif below is not None and below.directories:
                    above = Shown(None, [*above.directories, *below.directories])
            found.append(above)
        return found[0], found[1]

    def _merged(self, level: _Level, name: str, kinds: Iterable[tuple[int, int]]) -> tuple[Shown | None, bool]:
        """What these directories show at ``name``, and whether they hide what those below have there."""
        directories: list[LayerDirectory] = []
        hides = False
        for number, kind in kinds:
            parent = level.directories[number]
            hides = kind != DIRECTORY
            if kind in _FILES and not directories:
                return Shown(parent, regular=kind == FILE), True
            if kind == DIRECTORY:
                directory = LayerDirectory(name, parent, parent.lowest)
                is_opaque = self.marks.read(directory)
                if is_opaque is None:
                    continue
                if directory.redirected:
                    what = "was renamed in an overlay with redirect_dir=on: what is in it is elsewhere in the layers"
                    raise FailedPrecondition(f'"{printable(name)}" {what}', public=f"a directory {what}")
                directories.append(directory)
                hides = is_opaque
            if hides:
                break
        return (Shown(None, directories) if directories else None), hides


def hold_the_same(old: int, new: int, size: int, checkpoint: Callable[[], None]) -> bool:
    """Whether two open files of ``size`` bytes have the same bytes."""
    here = 0
    while here < size:
        checkpoint()
        if size > READ and (here := min(_next_data(old, here), _next_data(new, here))) >= size:
            break
        parts = [os.pread(fd, min(READ, size - here), here) for fd in (old, new)]
        if parts[0] != parts[1]:
            return False
        here += len(parts[0]) or size
    return True


def _next_data(fd: int, here: int) -> int:
    """Where the next bytes are that a file holds, and not just a hole."""
    try:
        return os.lseek(fd, here, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return 1 << 62
        if error.errno == errno.EINVAL:  # this file system doesn't tell
            return here
        raise
