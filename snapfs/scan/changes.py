r"""What a layer changed against its chain: one line a path, as overlayfs shows it.

``A /path`` was added, ``C /path`` changed, ``D /path`` deleted.  A file that is no directory counts as changed as soon as the
layer has it, a directory only if its own mode, owner, group or extended attributes changed; of a deleted directory there is
one line, and none for what was in it.  ``R /path/`` comes after the line of a directory that was renamed with redirect_dir=on,
here or in the chain: its contents come from a directory of another name, and the lines below it tell what the layers have there
under this one.  Lines are sorted by the bytes of their paths, and paths are written so that
``printf %b`` of a POSIX shell gives them back: ``\\`` for a backslash, ``\n`` for a newline, ``\0ooo`` for each byte of other
control characters, for each byte of characters that break lines or turn the direction of writing, and for bytes that are not
UTF-8.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Final

from snapfs.names import UNSEEN
from snapfs.scan.marks import (
    DIRECTORY,
    OTHER,
    PREFIX,
    WHITEOUT,
    LayerDirectory,
    Marks,
    is_shown_by_overlay,
    list_xattrs,
    xattr,
)
from snapfs.scan.spool import Entry, Spool
from snapfs.scan.walk import Descriptors, Way

_SPECIAL = re.compile(f"[\\\\\x00-\x1f\x7f-\x9f{UNSEEN}\udc80-\udcff]")
_FEW = 30  # names that are looked up one by one; for more, listing the directory is faster

MANY = 120_000  # entries of one directory that are compared in memory; of a larger one they wait in a file
HELD = 250_000  # entries that all directories on the way down may have in memory
_HARDLY_ANY = 100  # entries of one directory that are compared in memory even so, where there is nothing below

# As an entry's mark says it in a spool, after six digits for the layer
_KINDS: Final = {b"o": OTHER, b"d": DIRECTORY, b"w": WHITEOUT}
_BELOW: Final = b"000001"
_END: Final = (b"", b"000000o")


class _Level:
    """A directory of the layer, and the directories of the chain that are merged below it, the nearest first.

    ``opaque``: the layer hides the directories below, so all that they have and the layer lacks is deleted.  ``items``: what
    lines are still to be made of, in order: names, and names with a slash for all that is in them.  ``verbs``: the letter for
    each name; "" for a directory over a directory.  ``plain``: no name has to be escaped.  ``is_leaf``: ``plain``, and the
    layer has no directories in it.  ``held``: how many entries it has in memory.
    """

    __slots__ = ("below", "directory", "entered", "held", "is_leaf", "items", "opaque", "plain", "verbs")

    def __init__(self, directory: LayerDirectory, below: Sequence[LayerDirectory], opaque: bool) -> None:
        self.directory = directory
        self.below = below
        self.opaque = opaque
        self.entered: dict[str, _Level] = {}
        self.items: Iterator[str] = iter(())
        self.verbs: dict[str, str] = {}
        self.plain = True
        self.is_leaf = False
        self.held = 0

    @property
    def is_redirected(self) -> bool:
        """Whether contents come from a directory of another name, in one of the layers."""
        return self.directory.redirected or any(directory.redirected for directory in self.below)


def changes(
    layers: Sequence[str],
    *,
    prefix: str = PREFIX,
    checkpoint: Callable[[], None] = lambda: None,
    spool: str | None = None,
) -> Generator[str, None, None]:
    r"""What ``layers[0]`` changed against the others, which are its parents, the nearest first: lines, each with its newline.

    ``layers`` are the paths that overlayfs takes as upperdir and lowerdir.  Without parents everything is added (but the
    root, which gets a line only where it changed).  Files that vanish meanwhile are left out.  Where something is mounted
    inside a layer, what is beneath is compared.  Open descriptors are bounded, and so is memory, but for some bytes for each
    directory from the root to where the scan is: too many entries wait in a nameless file in the directory ``spool``.

    Blocks on the disk, so step it in a worker thread; ``checkpoint`` is called once a directory, in a large one now and then,
    and may raise to stop the scan; close the generator to close what it has open.  ``prefix`` is what overlayfs's own
    attributes begin with where these layers are mounted.  Raises OSError where a layer is missing or the disk fails, and where
    something is mounted inside and this process may not look beneath (EBUSY).
    """
    roots = [LayerDirectory(layer, None, number == len(layers) - 1) for number, layer in enumerate(layers)]
    with Descriptors() as descriptors, closing(Spool(spool)) as waiting:
        marks = Marks(descriptors, prefix, checkpoint, alone=len(layers) == 1)
        scan = _Scan(descriptors, marks, prefix, waiting)
        for root in roots:
            marks.read(root)  # overlayfs merges the roots, opaque or not; this only learns of whiteouts
        level = _Level(roots[0], roots[1:], opaque=False)
        if scan.differs(level):
            yield "C /\n"
        way = Way("/")
        checkpoint()
        stack = [scan.expanded(level)]
        while stack:
            level = stack[-1]
            verbs, plain = level.verbs, level.plain
            if level.is_leaf:  # most are, and all of their lines are made at once
                stack.pop()
                scan.close(level)
                path = way.path if verbs else ""
                yield from [f"{verbs[name]} {path}{name}\n" for name in level.items]
                way.leave()
                continue
            for item in level.items:
                if verb := verbs.get(item):
                    yield f"{verb} {way.path}{item if plain else escaped(item)}\n"
                elif item[-1] != "/":
                    shown = item if plain else escaped(item)
                    if not verb:
                        entered = scan.enter(level, item)
                        if entered is None:
                            continue
                        level.entered[item] = entered
                        if not scan.differs(entered):
                            continue
                        verb = "C"
                    yield f"{verb} {way.path}{shown}\n"
                else:
                    name = item[:-1]
                    entered = scan.enter(level, name) if verbs[name] else level.entered.pop(name, None)
                    if entered is not None:
                        way.enter(f"{name if plain else escaped(name)}/")
                        if entered.is_redirected:
                            yield f"R {way.path}\n"
                        checkpoint()
                        stack.append(scan.expanded(entered))
                        break
            else:
                stack.pop()
                scan.held -= level.held
                scan.close(level)
                way.leave()


class _Scan:
    """What the scan reads from the disk."""

    def __init__(self, descriptors: Descriptors, marks: Marks, prefix: str, spool: Spool) -> None:
        self.descriptors = descriptors
        self.marks = marks
        self.held = 0  # entries of all levels that are in memory
        self._prefix = prefix
        self._spool = spool

    def close(self, level: _Level) -> None:
        """Close its directories."""
        for directory in (level.directory, *level.below):
            self.descriptors.close(directory)

    def expanded(self, level: _Level) -> _Level:
        """``level``, after its entries have been read and compared."""
        most = MANY if self.held < HELD else _HARDLY_ANY
        entries = self.entries(level.directory, most)
        if len(entries) >= most:
            return self.spooled(level)
        visible = self.visible(level.below, None if level.opaque else entries, most)
        if len(visible) >= most:
            return self.spooled(level)
        kinds = entries.values()
        directories = [f"{name}/" for name, kind in entries.items() if kind == DIRECTORY] if DIRECTORY in kinds else []
        verbs = level.verbs = dict.fromkeys(entries, "A")
        for name in [name for name, kind in entries.items() if kind == WHITEOUT] if WHITEOUT in kinds else ():
            del verbs[name]
        for name, under in visible.items():
            if under != WHITEOUT:
                verbs[name] = _verb(entries.get(name, WHITEOUT), under)
        text = "".join(verbs)
        ascii_only = text.isascii()
        level.plain = ascii_only and text.isprintable() and "\\" not in text
        level.is_leaf = level.plain and not directories
        level.items = iter(sorted([*verbs, *directories], key=None if ascii_only else os.fsencode))
        if not level.is_leaf and self.held >= HELD:  # else it goes at once
            return self.spooled(level)
        if not level.is_leaf:
            level.held = len(verbs)
            self.held += level.held
        return level

    def spooled(self, level: _Level) -> _Level:
        """``level`` with items that are compared one by one, for there are too many for the memory; ``verbs`` has those whose
        turn it is."""
        level.plain = False
        level.verbs = {}
        level.items = self.items(level)
        return level

    def items(self, level: _Level) -> Iterator[str]:
        """The items of ``level``, in order."""
        verbs, opaque = level.verbs, level.opaque
        last, own, under = b"", -1, -1  # -1: it is not there
        for name, mark in chain(self._spool.in_order(self.marked(level)), [_END]):
            if name != last:
                item = os.fsdecode(last)
                if last[-1:] == b"/":
                    if item[:-1] in verbs:
                        yield item
                        del verbs[item[:-1]]
                else:
                    verb = "A" if own in (OTHER, DIRECTORY) else None
                    if under in (OTHER, DIRECTORY) and (own >= 0 or opaque):
                        verb = _verb(own if own >= 0 else WHITEOUT, under)
                    if verb is not None:
                        verbs[item] = verb
                        yield item
                        if own != DIRECTORY:
                            del verbs[item]
                last, own, under = name, -1, -1
            if mark < _BELOW:
                own = _KINDS[mark[-1:]]
            elif under < 0:
                under = _KINDS[mark[-1:]]

    def marked(self, level: _Level) -> Iterator[Entry]:
        """All entries of ``level``, each with a mark that tells the layer, the nearest first, and what it is.  The name of a
        directory comes once more with a slash, for what is in it."""
        for number, directory in enumerate((level.directory, *level.below)):
            marks = {kind: b"%06d%b" % (number, letter) for letter, kind in _KINDS.items()}
            for name, kind in self.marks.entries(directory):
                encoded = os.fsencode(name)
                yield encoded, marks[kind]
                if kind == DIRECTORY and not number:
                    yield encoded + b"/", marks[kind]

    def enter(self, level: _Level, name: str) -> _Level | None:
        """The level of the directory ``name`` in ``level``; None where it has vanished."""
        directory = LayerDirectory(name, level.directory, level.directory.lowest)
        opaque = self.marks.read(directory)
        if opaque is None:
            return None
        below: list[LayerDirectory] = []
        if not level.verbs[name] and not directory.redirected:
            below, _ = self.marks.merged(name, level.below)
        return _Level(directory, below, opaque=level.opaque or opaque)

    def differs(self, level: _Level) -> bool:
        """Whether the directory of ``level`` itself (mode, owner, group, attributes) differs from the nearest below it."""
        if not level.below:
            return False
        own, below = (
            metadata(self.descriptors.get(directory), self._prefix) for directory in (level.directory, level.below[0])
        )
        return own is not None and own != below

    def visible(self, directories: Sequence[LayerDirectory], wanted: Collection[str] | None, most: int) -> dict[str, int]:
        """Which entries the merged ``directories`` have, by name, and what they are; only those that are ``wanted``, if that is
        not None.  Whiteouts are among them.  ``most`` or more of them, if there are too many."""
        found: dict[str, int] = {}
        for directory in directories:
            if wanted is None:
                found = self.entries(directory, most) | found
                if len(found) >= most:
                    break
            elif missing := [name for name in wanted if name not in found]:
                found |= self.among(directory, missing)
        return found

    def among(self, directory: LayerDirectory, names: Collection[str]) -> dict[str, int]:
        """Which of ``names`` the directory has, and what they are."""
        if len(names) > _FEW:
            wanted = frozenset(names)
            return {name: kind for name, kind in self.marks.entries(directory) if name in wanted}
        kinds = ((name, self.marks.kind(directory, name)) for name in names)
        return {name: kind for name, kind in kinds if kind is not None}

    def entries(self, directory: LayerDirectory, most: int) -> dict[str, int]:
        """All entries of ``directory``, or ``most`` of them, by name, and what they are; none where it has vanished."""
        fd = self.descriptors.get(directory)
        if fd < 0:
            return {}
        with os.scandir(fd) as entries:
            return self.marks.kinds(directory, islice(entries, most))


def _verb(own: int, under: int) -> str:
    """The letter for an entry that is ``own`` in the layer and ``under`` below it, where it is no whiteout."""
    return "D" if own == WHITEOUT else "" if own == under == DIRECTORY else "C"


def metadata(fd: int, prefix: str) -> object:
    """All that an overlay shows of the file or directory open as ``fd``, but what is in it, to be compared; None where it has
    vanished."""
    if fd < 0:
        return None
    own = os.fstat(fd)
    try:
        shown = [name for name in list_xattrs(fd) if is_shown_by_overlay(name, prefix)]
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return object()  # nobody can tell which attributes it has: like no other
    return own.st_mode, own.st_uid, own.st_gid, {name: _digest(xattr(fd, name)) for name in shown}


def _digest(value: bytes | None) -> bytes | None:
    """``value``, or what is as good for comparing it: there may be thousands of 64 KiB."""
    return value if value is None or len(value) < 64 else b"%064d" % len(value) + hashlib.sha256(value).digest()


def escaped(name: str) -> str:
    """``name`` with all characters escaped that could break or forge a line."""
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return _SPECIAL.sub(_escape, os.fsencode(name).decode(errors="surrogateescape"))  # UTF-8, in whatever locale


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\\":
        return "\\\\"
    if character == "\n":
        return "\\n"
    return "".join(f"\\0{byte:03o}" for byte in character.encode(errors="surrogateescape"))
