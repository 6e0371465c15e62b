"""The mounted tree that a verb works on: where it is, and where a snapshot is in it."""

from __future__ import annotations

import os
import sys
import time

from snapfs.cli.refusal import NO_TREE, NOT_FOUND, USAGE, Refusal, missing, refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("active", "committed", "view")

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_:@+,=. ")


class MountedTree:
    """A mounted tree at ``path``.  The methods do nothing that a shell could not do there."""

    def __init__(self, path: str) -> None:
        self.path = path

    def directory(self, kind: str, key: str) -> str:
        """The path in the tree at which snapshot ``key`` of ``kind`` is, or would be."""
        return f"{self.path}/{kind}/{file_name(key)}"

    def made_at(self, kind: str, key: str, parent: str | None) -> str:
        """The path at which mkdir, or mv, makes the snapshot ``key`` of ``kind`` on ``parent``."""
        return (
            f"{self.path}/{kind}/{file_name(key)}"
            if parent is None
            else (f"{self.path}/committed/{file_name(parent)}/{kind}/{file_name(key)}")
        )

    def kind_of(self, key: str) -> str | None:
        """The kind of snapshot ``key``, None where there is none."""
        for kind in KINDS:
            try:
                os.stat(self.directory(kind, key))
                return kind
            except FileNotFoundError:
                continue
            except OSError as error:
                raise refusal(error, self.path, 0, f'cannot look for "{key}"') from None
        return None

    def key(self, word: str) -> str:
        """The key that the user means by ``word``: the key itself, or the path of a snapshot, from the root of the tree or from
        the working directory.  Where there is a snapshot whose key is ``word``, it is meant, and not the one at that path."""
        found = self._at(word) if "/" in word else None
        if found is None:
            return word
        from snapfs.errors import SnapshotError

        try:
            return word if self.kind_of(word) else found
        except SnapshotError:  # it is too long for a key
            return found

    def _at(self, path: str) -> str | None:
        """The key of the snapshot at ``path``."""
        tree = os.path.realpath(self.path)
        for place in (os.path.normpath(os.path.join(tree, path)), os.path.abspath(path)):
            if place.split("/")[-2] in (*KINDS, "by-id"):  # nothing else is looked at: rootfs would be mounted
                directory, name = os.path.split(os.path.realpath(place))
                if directory in [f"{tree}/{kind}" for kind in KINDS] and os.path.lexists(f"{directory}/{name}"):
                    return key_of(name)
        return None

    def new_key(self, word: str, kind: str) -> str:
        """The key that the user means by ``word`` for a snapshot of ``kind`` that is to be made: the key itself, or the path
        where the snapshot will be, as in ``key``."""
        tree = os.path.realpath(self.path)
        directory, name = os.path.split(word.rstrip("/"))
        if name and (directory == kind or (directory and os.path.realpath(directory) == f"{tree}/{kind}")):
            from snapfs import names

            return names.decode(name)
        return word

    def find(self, key: str) -> tuple[str, str]:
        """Kind and directory of snapshot ``key``; raises Refusal."""
        kind = self.kind_of(key)
        if kind is None:
            raise missing(key, self.path)
        return kind, self.directory(kind, key)

    def do(self, what: str, call: Callable[..., object], *arguments: object) -> None:
        """Call ``call`` with ``arguments``; where it raises OSError, raises Refusal with the sentence that the tree has logged
        for that.  ``what`` is what was being done, in words that go on from "cannot "."""
        began = time.time_ns()
        try:
            call(*arguments)
        except OSError as error:
            raise refusal(error, self.path, began, f"cannot {what}") from None

    def read(self, path: str) -> str:
        """The text of a file of the tree; raises Refusal."""
        began = time.time_ns()
        try:
            with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return file.read()
        except OSError as error:
            raise refusal(error, self.path, began, f"cannot read {path}") from None

    def wrong_parent(self, parent: str) -> Refusal:
        """The refusal that says why no snapshot can stand on ``parent``, which is not among the committed snapshots."""
        there = self.kind_of(parent)
        why = f'"{parent}" is {there}: only a committed snapshot can be a parent' if there else ""
        lost = f'parent snapshot "{parent}" does not exist in {self.path}; snapfs ls --kind committed lists all'
        return Refusal(why or lost, NOT_FOUND)

    def write_label(self, directory: str, key: str, value: str) -> None:
        """Set a label, or delete it where ``value`` is empty."""
        path = f"{directory}/labels/{file_name(key)}"
        if not value:
            self.do(f'delete label "{key}"', _unlink, path)
        else:
            self.do(f'set label "{key}"', _write, path, value)


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, value.encode(errors="surrogateescape") + b"\n")
    finally:
        os.close(descriptor)


def _unlink(path: str) -> None:
    try:  # noqa: SIM105, for contextlib takes its time
        os.unlink(path)
    except FileNotFoundError:
        pass


def file_name(key: str) -> str:
    """The file name of ``key``; raises SnapshotError."""
    if key and _PLAIN.issuperset(key) and len(key) < 256 and key not in (".", ".."):
        return key
    from snapfs import names

    return names.encode(key)


def checked_kinds(words: list[str]) -> list[str]:
    """``words``, if all are kinds of snapshots; raises Refusal."""
    for word in words:
        if word not in KINDS:
            raise Refusal(f'"{word}" is no kind of snapshot: there are {", ".join(KINDS)}', USAGE)
    return words


def key_of(name: str) -> str:
    """The key whose file name is ``name``."""
    return unquoted(name)


def unquoted(text: str) -> str:
    """``text`` without its percent-encoding."""
    if "%" not in text:
        return text
    first, *rest = text.encode(errors="surrogateescape").split(b"%")
    return b"".join((first, *(bytes.fromhex(part[:2].decode()) + part[2:] for part in rest))).decode(errors="surrogateescape")


def find_tree(at: str | None, *, changes: bool = False) -> MountedTree:
    """The tree that ``at`` or $SNAPFS names, or that the working directory is in, or else the only one that is mounted.

    ``changes``: the verb changes something; where it is the only tree that is meant, and a user is at the terminal, a line says
    which tree that is.  Raises Refusal.
    """
    for given, what in ((at, "--at"), (os.environ.get("SNAPFS"), "$SNAPFS")):
        if given:
            path = _above(os.path.abspath(given))
            if path is None:
                others = ", ".join(mounted_trees())
                to_do = f"give {others}" if others else "snapfs serve ROOT MOUNTPOINT mounts one"
                raise Refusal(f"{what}: no snapfs tree is mounted on {given}: {to_do}", NO_TREE)
            return MountedTree(path)
    trees = mounted_trees()
    here = f"{os.getcwd()}/" if len(trees) > 1 or changes else ""
    if len(trees) > 1:
        trees = [tree for tree in trees if here.startswith(tree + "/")] or trees
    if not trees:
        raise Refusal("no snapfs tree is mounted: snapfs serve ROOT MOUNTPOINT mounts one", NO_TREE)
    if len(trees) > 1:
        raise Refusal(f"several trees are mounted: say which with --at or $SNAPFS: {', '.join(sorted(trees))}", NO_TREE)
    if changes and not here.startswith(trees[0] + "/") and sys.stderr.isatty():
        print(f"snapfs: working in {trees[0]}, the only tree that is mounted", file=sys.stderr)
    return MountedTree(trees[0])


def _above(path: str) -> str | None:
    while True:
        try:
            os.stat(f"{path}/.snapfs/version")
            return path
        except OSError as error:
            import errno

            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise refusal(error, path, 0, "") from None
        if path == "/":
            return None
        path = os.path.dirname(path)


def given_root(path: str) -> str:
    """``path``, which a user has given as a root; raises Refusal where it can't be one: it is the mounted tree of one, say."""
    if os.path.realpath(path) in mounted_trees():
        raise Refusal(f"{path} is where a tree is mounted, not its root: findmnt -no SOURCE {path} says which that is", USAGE)
    return path


def mounted_trees() -> list[str]:
    """Where trees are mounted, as this process sees it."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        targets = [line.split(" ", 5)[4] for line in table if " - fuse.snapfs " in line]
    for escaped, meant in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        targets = [target.replace(escaped, meant) for target in targets]
    return list(dict.fromkeys(targets))
