"""The mounted tree that a verb works on: where it is, and where a snapshot is in it."""

from __future__ import annotations

import errno
import os
import sys
import time

from snapfs.cli.refusal import NO_TREE, NOT_FOUND, NOT_PERMITTED, USAGE, Refusal, changed, last_words, refusal
from snapfs.cli.within import Within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

KINDS = ("active", "committed", "view")

HOLDERS = (*KINDS, "by-id", "images")
"""The directories whose entries are snapshots, or links to them."""

MOST_ASKED = 64 << 10  # characters of a request: the kernel would cut a longer one in pieces

_AT_ONCE = 256 << 10  # bytes that are read at once

_OF_LAYERS = ("changes", "changes.patch", "compare", "layer.tar")

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_:@+,=. ")


_READING, _FOLLOWING = ("open", "read", "write"), ("lookup", "readlink")  # what is read of compare is written before
"""What reading a file, or following a link, asks of the tree, and may be refused in words."""


class Leased(OSError):
    """EAGAIN for as long as another process likes: it has a lease on the file."""


class MountedTree:
    """A mounted tree at ``path``, which the user has given after --at if ``is_named``.  The methods do nothing that a shell
    could not do there.  Whatever is in the tree is reached by way of ``within``."""

    def __init__(self, within: Within, *, is_named: bool = False) -> None:
        self.within = within
        self.path = within.path
        self.is_named = is_named

    def command(self, verb: str, *words: str) -> str:
        """What the user types for a ``verb`` (a word, or several) to do it to this tree."""
        from snapfs import names

        at = ["--at", self.path] if self.is_named else []
        dashes = ["--"] if any(word.startswith("-") for word in words) else []
        return " ".join(map(names.word, ["snapfs", *verb.split(), *at, *dashes, *words]))

    def word_for(self, key: str, number: int) -> str:
        """What names snapshot ``key``, whose id is ``number``, in such a command."""
        from snapfs import names

        return key if names.printable(key) == key else f"by-id/{number}"  # which is shown as it is

    def word_of(self, key: str) -> str:
        """The same for a snapshot that is there, whose id is not known; the key itself where there is none."""
        from snapfs import names

        if names.printable(key) == key:
            return key
        import json

        try:
            _, directory = self.find(key)
            number: int = json.loads(self.read(f"{directory}/info.json"))["id"]
        except Refusal:
            return key
        return self.word_for(key, number)

    def is_trusted(self) -> bool:
        """Whether root or the user has mounted the file system that stands at the path."""
        return any(tree.number == self.within.mount and tree.is_trusted for tree in mounted_trees())

    def connection(self) -> str:
        """The number of the FUSE connection by which the tree is served."""
        return next((tree.device.partition(":")[2] for tree in mounted_trees() if tree.number == self.within.mount), "")

    def refuse_foreign(self, what: str) -> None:
        """Raise Refusal where the tree is another user's, by whose word nothing is to be ``what`` ("mounted")."""
        if not self.is_trusted():
            raise Refusal(
                f"{self.path} is a tree of another user's, and what it says is up to them: nothing is {what} by that",
                NOT_PERMITTED,
            )

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
                if self.within.exists(self.directory(kind, key)):
                    return kind
            except OSError as error:
                raise refusal(error, self.path, f'cannot look for "{key}"') from None
        return None

    def is_labelled_by_others(self, directory: str) -> bool:
        """Whether others than root and this user may write the labels of the snapshot in ``directory``, and so have chosen what
        they say.  Raises Refusal."""
        try:
            held = self.within.find(f"{directory}/labels")
        except OSError as error:
            raise refusal(error, self.path, f"cannot look at {directory}") from None
        found = os.fstat(held)
        os.close(held)
        return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & 0o022)

    def is_directory(self, word: str) -> bool:
        """Whether ``word``, which is a snapshot or a directory, is no snapshot's, but that of a directory.  A path may well be
        what no key can be: too long, or not UTF-8."""
        from snapfs.errors import SnapshotError

        if not os.path.isdir(word):
            return False
        try:
            return self.kind_of(self.key(word)) is None
        except SnapshotError:
            return True

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
        # names of images have slashes, and no process thinks of how they are written in file names
        image = [f"{tree}/images/{file_name(path.removeprefix('images/'))}"] if path.startswith("images/") else []
        for place in (os.path.normpath(os.path.join(tree, path)), os.path.abspath(path), *image):
            if place.split("/")[-2] in HOLDERS:  # nothing else is looked at: rootfs would be mounted
                place = _within(tree, place)
                if place:
                    try:
                        found = self.within.unlinked(self.path + place.removeprefix(tree), HOLDERS)
                    except OSError:
                        continue
                    kind, _, name = found.removeprefix(f"{self.path}/").partition("/")
                    if kind in KINDS and name and "/" not in name:
                        return key_of(name)
        return None

    def new_key(self, word: str, kind: str) -> str:
        """The key that the user means by ``word`` for a snapshot of ``kind`` that is to be made: the key itself, or the path
        where the snapshot will be, as in ``key``."""
        tree = os.path.realpath(self.path)
        directory, name = os.path.split(word.rstrip("/"))
        if name and (directory == kind or (directory and _within(tree, os.path.abspath(directory)) == f"{tree}/{kind}")):
            from snapfs import names

            return names.decode(name)
        return word

    def find(self, key: str) -> tuple[str, str]:
        """Kind and directory of snapshot ``key``; raises Refusal."""
        kind = self.kind_of(key)
        if kind is None:
            raise self.missing(key)
        return kind, self.directory(kind, key)

    def missing(self, key: str) -> Refusal:
        """The refusal that says that there is no snapshot ``key``."""
        return self._no_image(key) or Refusal(f'snapshot "{key}" does not exist in {self.path}; snapfs ls lists all', NOT_FOUND)

    def _no_image(self, key: str) -> Refusal | None:
        """The same where ``key`` is what images/ calls another, or begins as the path of such a name does."""
        from snapfs.errors import SnapshotError

        if key.startswith("images/"):
            words = f'nothing is called "{key.removeprefix("images/")}" in {self.path}/images: snapfs images lists all names'
            return Refusal(words, NOT_FOUND)
        try:
            is_image = self.within.exists(f"{self.path}/images/{file_name(key)}")
        except (OSError, Refusal, SnapshotError):
            is_image = False
        words = f'no snapshot is called "{key}", but an image is: write images/{key}'
        return Refusal(words, NOT_FOUND) if is_image else None

    def do(self, what: str, operations: Sequence[str], call: Callable[..., object], *arguments: object) -> None:
        """Call ``call`` with ``arguments``; where it raises OSError, raises Refusal with the sentence that the tree has logged
        for one of these ``operations`` on the paths in it among the arguments.  ``what`` is what was being done, in words that
        go on from "cannot "."""
        began = time.time_ns()
        try:
            call(*arguments)
        except OSError as error:
            paths = [each for each in arguments if isinstance(each, str) and each.startswith(f"{self.path}/")]
            if error.errno == errno.EBUSY:  # as the kernel says of what something is mounted on
                for path in paths:
                    self.within.refuse_covered(path)
            raise refusal(error, self.path, f"cannot {what}", self._logged(error, operations, paths, began)) from None

    def _logged(self, error: OSError, operations: Sequence[str], paths: Sequence[str], began: int) -> str:
        """What the tree has logged for one of the ``operations`` on ``paths`` that failed with ``error`` and was begun at
        ``began``; "" if nothing was, or nothing can be read."""
        try:
            log = self.within.open(f"{self.path}/.snapfs/error_log", os.O_RDONLY)
        except (OSError, Refusal):
            return ""
        return last_words(log, error, operations, [path.removeprefix(f"{self.path}/") for path in paths], began)

    def read(self, path: str) -> str:
        """The text of a file of the tree; raises Refusal."""
        began, parts = time.time_ns(), []
        try:
            descriptor = self.open(path, os.O_RDONLY)
            try:
                while part := os.read(descriptor, _AT_ONCE):  # open() would ask the tree four times besides
                    parts.append(part)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unread(error, path, began) from None
        return b"".join(parts).decode(errors="surrogateescape")

    def lines(self, path: str) -> Iterator[str]:
        """The lines of a file of the tree, as they are read: there may be millions.  Raises Refusal."""
        began = time.time_ns()
        try:
            with open(path, encoding="utf-8", errors="surrogateescape", newline="\n", opener=self.open) as file:
                for line in file:
                    yield line.rstrip("\n")
        except OSError as error:
            raise self._unread(error, path, began) from None

    def compared(self, directory: str, request: str, paths: Sequence[str]) -> Iterator[str]:
        """The lines that ``compare`` of the snapshot in ``directory`` has for ``request``, as they are read; of ``paths``
        alone, if there are any.  Raises Refusal."""
        path = f"{directory}/compare"
        if paths:
            from urllib.parse import quote

            request = "\t".join([request, *(quote(each, errors="surrogateescape") for each in paths)])
        if len(request) > MOST_ASKED:
            raise Refusal("too many paths: give fewer of them, or a directory in which they are", USAGE)
        began = time.time_ns()
        try:
            descriptor = self.open(path, os.O_RDWR)
            with open(descriptor, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                os.write(descriptor, request.encode(errors="surrogateescape") + b"\n")
                for line in file:
                    yield line.rstrip("\n")
        except OSError as error:
            if error.errno == errno.EROFS:
                words = "the tree is mounted read-only, so nothing can be asked of it: compare a snapshot with its parent"
                raise Refusal(f"{words}, without paths and options", NOT_PERMITTED) from None
            raise self._unread(error, path, began) from None

    def _unread(self, error: OSError, path: str, began: int) -> Refusal:
        """Why a file can't be read: what a snapshot always has is missing only where that has just become another."""
        kind, _, rest = path.removeprefix(f"{self.path}/").partition("/")
        words = self._logged(error, _READING, [path], began)
        if error.errno == errno.EACCES and kind in KINDS and rest.rpartition("/")[2] in _OF_LAYERS and not words:
            words = f"cannot read {path}: what is in layers is for root, and the user that serves the tree, alone"
        inside = isinstance(error, FileNotFoundError) and kind in KINDS and "/" in rest
        gone = changed(key_of(rest.partition("/")[0]), NOT_FOUND) if inside else None
        return refusal(error, self.path, f"cannot read {path}", words, gone)

    def open(self, path: str, flags: int) -> int:
        """A descriptor of a file of the tree, without waiting for another process that has a lease on it.  Raises OSError, and
        Refusal."""
        return self._unleased(path, lambda: self.within.open(path, flags | os.O_NONBLOCK))

    def _open_in(self, held: int, path: str, flags: int) -> int:
        """The same of the file at ``path`` that is in the directory ``held``, whatever there is at ``path`` by now."""
        return self._unleased(path, lambda: self.within.open_in(held, path, flags | os.O_NONBLOCK))

    @staticmethod
    def _unleased(path: str, call: Callable[[], int]) -> int:
        try:
            return call()
        except BlockingIOError as error:
            raise Leased(error.errno, error.strerror, path) from None

    def rootfs(self, kind: str, key: str) -> str:
        """Where the file system of snapshot ``key`` of ``kind`` is mounted, from now on if it was not; raises Refusal."""
        began = time.time_ns()
        link = f"{self.directory(kind, key)}/rootfs"
        try:
            return self.within.readlink(link)
        except OSError as error:
            gone = changed(key) if isinstance(error, FileNotFoundError) else None
            raise refusal(
                error, self.path, f'cannot get into "{key}"', self._logged(error, _FOLLOWING, [link], began), gone
            ) from None

    def options(self) -> dict[str, Any]:
        """What options.json says; raises Refusal."""
        import json

        found: dict[str, Any] = json.loads(self.read(f"{self.path}/.snapfs/options.json"))
        return found

    def mark(self, kind: str, key: str) -> str:
        """What no snapshot but ``key`` of ``kind`` ever has, in any root (``kernel/freezing.py``); "" where that is not known.
        Raises Refusal."""
        import json

        from snapfs.kernel import freezing

        info = json.loads(self.read(f"{self.directory(kind, key)}/info.json"))
        return freezing.mark_of(self.options().get("root_word", ""), info["id"])

    def mounted_by_hand(self, directory: str) -> list[str]:
        """Where the snapshot at ``directory`` is mounted, as the daemon tells it, but for its rootfs; raises Refusal."""
        import json

        options = self.options()
        mounted: list[str] = json.loads(self.read(f"{directory}/info.json"))["mounted"]
        return [each for each in mounted if not each.startswith(f"{options['window']}{options['root']}/rootfs/")]

    def wrong_parent(self, parent: str) -> Refusal:
        """The refusal that says why no snapshot can stand on ``parent``, which is not among the committed snapshots."""
        there = self.kind_of(parent)
        if there is None and (image := self._no_image(parent)) is not None:
            return image
        why = f'"{parent}" is {there}: only a committed snapshot can be a parent' if there else ""
        lost = f'parent snapshot "{parent}" does not exist in {self.path}; snapfs ls --kind committed lists all'
        return Refusal(why or lost, NOT_FOUND)

    def hold(self, kind: str, key: str, number: int | None = None) -> int:
        """A descriptor (O_PATH) of the directory of snapshot ``key``: it is of this one, whoever has the key by then.  Raises
        Refusal; also where it isn't the one with the id ``number``, if that is given."""
        path = self.directory(kind, key)
        try:
            held = self.within.find(path)
        except OSError as error:
            raise refusal(error, self.path, f'cannot look at "{key}"') from None
        if number is not None and self._info(held, path).get("id") != number:
            os.close(held)
            raise changed(key, NOT_FOUND)
        return held

    def _info(self, held: int, path: str) -> dict[str, Any]:
        """What info.json says of the snapshot whose directory, at ``path``, is open as ``held``; nothing where it is gone.
        Raises Refusal."""
        import json

        try:
            with open(self._open_in(held, f"{path}/info.json", os.O_RDONLY), encoding="utf-8") as file:
                found: dict[str, Any] = json.load(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                return {}
            raise refusal(error, self.path, f"cannot read {path}/info.json") from None
        return found

    def remove(self, kind: str, key: str, number: int) -> None:
        """Remove the snapshot ``key`` of ``kind`` that has the id ``number``, and no other that has the key by now.  Raises
        Refusal."""
        self.do(f'remove "{key}"', ["setxattr"], self._remove, self.directory(kind, key), f"{number} {kind}/{file_name(key)}")

    def _remove(self, path: str, seen: str) -> None:
        found = self.within.find(path)
        try:
            _set_to_go(found, seen)
        finally:
            os.close(found)

    def remove_held(self, held: int, kind: str, key: str) -> None:
        """Remove the snapshot whose directory is open as ``held``, and was called ``key``, if it is still there and of this
        kind.  Raises OSError, and Refusal."""
        found = self._info(held, self.directory(kind, key))
        if found:
            try:  # noqa: SIM105, for contextlib takes its time
                _set_to_go(held, f"{found['id']} {kind}/{file_name(found['name'])}")
            except FileNotFoundError:  # it was committed or renamed just now
                pass

    def write_command(self, path: str, text: str, held: int | None = None) -> str:
        """Write the line ``text`` into a file of the tree that does what is written there, in the directory ``held`` if that is
        given: the line that says what came of it.  Raises OSError."""
        descriptor = self.open(path, os.O_RDWR) if held is None else self._open_in(held, path, os.O_RDWR)
        try:
            os.write(descriptor, text.encode(errors="surrogateescape") + b"\n")
            return os.read(descriptor, 4096).decode(errors="surrogateescape").removesuffix("\n")
        finally:
            os.close(descriptor)

    def write_label(self, directory: str, key: str, value: str) -> None:
        """Set a label, or delete it where ``value`` is empty."""
        path = f"{directory}/labels/{file_name(key)}"
        if not value:
            self.do(f'delete label "{key}"', ["unlink"], self._unlink, path)
        else:
            text = value.encode(errors="surrogateescape") + b"\n"
            self.do(f'set label "{key}"', ["open", "create", "setattr", "write"], self.put, path, text)

    def put(self, path: str, text: bytes) -> None:
        """Write ``text`` into the file ``path``, which is made if it is missing.  Raises OSError, and Refusal."""
        is_new = True
        try:
            descriptor = self.within.create(path)
        except FileExistsError:
            is_new = False
            descriptor = self.open(path, os.O_WRONLY)
        try:
            if not is_new:
                os.ftruncate(descriptor, 0)  # by now it is known to be in the tree
            while text:
                text = text[os.write(descriptor, text) :]
        finally:
            os.close(descriptor)

    def _unlink(self, path: str) -> None:
        try:  # noqa: SIM105, for contextlib takes its time
            self.within.unlink(path)
        except FileNotFoundError:
            pass


def _set_to_go(held: int, seen: str) -> None:
    """Remove the snapshot whose directory is open as ``held``, if it still is what was ``seen``: ID KIND/NAME."""
    os.setxattr(f"/proc/self/fd/{held}", "user.snapfs.remove", seen.encode())


def _within(tree: str, path: str) -> str:
    """``path`` as one in the tree, in which are no links but those that the daemon shows; "" where it is in none, or leads
    there by a link that somebody else could have made, or exchange: who does that must not choose which snapshot is meant."""
    if path.startswith(f"{tree}/"):
        return path
    from snapfs.kernel import trusted

    directory, name = os.path.split(path)
    try:
        with trusted.find(directory) as found:
            unlinked = f"{found.path.rstrip('/')}/{name}"
    except (trusted.Untrusted, OSError):
        return ""
    return unlinked if unlinked.startswith(f"{tree}/") else ""


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
    """``text`` without its percent-encoding; as it is where it is not encoded so."""
    if "%" not in text:
        return text
    escaped = text.encode(errors="surrogateescape").replace(b"\\", b"\\\\").replace(b"%", b"\\x")
    try:  # all in C: others may write megabytes of labels
        return escaped.decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
    except UnicodeDecodeError:
        return text


def find_tree(at: str | None, *, changes: bool = False, tell: bool = True) -> MountedTree:
    """The tree that ``at`` or $SNAPFS names, or that the working directory is in, or else the only one that is mounted.

    Only trees that root or the user has mounted count: a tree of somebody else's, who can make it hold whatever they like, is
    taken only where it is named.

    Where the tree is not named, and the user does not stand in it, a line on standard error says which it is (unless ``tell``
    is False): at a terminal, if the verb ``changes`` something or others' trees don't count; elsewhere, as in a cron job's
    mail, if both.  Raises Refusal.
    """
    for given, what in ((at, "--at"), (os.environ.get("SNAPFS"), "$SNAPFS")):
        if given:
            within = _above(os.path.abspath(given))
            if within is None:
                own = ", ".join(dict.fromkeys(tree.path for tree in mounted_trees() if tree.is_trusted))
                to_do = f"give {own}" if own else "snapfs serve ROOT MOUNTPOINT mounts one"
                raise Refusal(f"{what}: no snapfs tree is mounted on {given}: {to_do}", NO_TREE)
            return MountedTree(within, is_named=given is at)
    everything = mounted_trees()
    trees = list(dict.fromkeys(tree.path for tree in everything if tree.is_trusted))
    others = [tree for tree in everything if tree.path not in trees]
    whose = "root's" if os.geteuid() == 0 and not os.environ.get("SNAPFS_WORKSPACE") else "yours or root's"
    here = f"{os.getcwd()}/" if len(trees) > 1 or changes or others else ""
    inside = [tree for tree in trees if here.startswith(tree + "/")]
    stranger = next((tree for tree in others if here.startswith(tree.path + "/")), None)
    if stranger is not None and not any(len(tree) > len(stranger.path) for tree in inside):
        raise Refusal(f"you stand in {stranger.named()}, which is not {whose}: name it with --at if you mean it", NO_TREE)
    trees = inside or trees
    if not trees and others:
        named = ", ".join(tree.named() for tree in others[:5]) + ", and others" * (len(others) > 5)
        raise Refusal(
            f"no tree of {whose} is mounted; to work in another user's, name it with --at or $SNAPFS: {named}", NO_TREE
        )
    if not trees:
        raise Refusal("no snapfs tree is mounted: snapfs serve ROOT MOUNTPOINT mounts one", NO_TREE)
    if len(trees) > 1:
        raise Refusal(f"several trees are mounted: say which with --at or $SNAPFS: {', '.join(sorted(trees))}", NO_TREE)
    try:
        found = MountedTree(Within(trees[0]))
    except OSError as error:
        raise refusal(error, trees[0], f"cannot look at {trees[0]}") from None
    if not found.is_trusted():
        raise Refusal(f"another file system hides {found.path}, where a tree of {whose} is mounted", NO_TREE)
    if tell and not inside and (changes or others) and ((changes and others) or sys.stderr.isatty()):
        only = f"the only tree of {whose} that is mounted (--at names another)" if others else "the only tree that is mounted"
        from snapfs.cli import table

        table.complain(f"working in {found.path}, {only}")
    return found


def _above(path: str) -> Within | None:
    while True:
        within = None
        try:
            within = Within(path)
            if within.exists(f"{path}/.snapfs/version"):
                return within
        except Refusal:
            if within is not None and any(tree.number == within.mount for tree in mounted_trees()):
                raise
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise refusal(error, path, "") from None
            if error.errno == errno.EACCES and (closed := [tree for tree in mounted_trees() if tree.path == path]):
                words = f"{closed[-1].named()} is closed to you: allow_other and umask= say who may enter, when it is served"
                raise Refusal(words, NOT_PERMITTED) from None
        if within is not None:
            within.close()
        if path == "/":
            return None
        path = os.path.dirname(path)


def given_root(path: str) -> str:
    """``path``, which a user has given as a root; raises Refusal where it can't be one: it is the mounted tree of one, say."""
    if os.path.abspath(path) in [tree.path for tree in mounted_trees()]:
        raise Refusal(f"{path} is where a tree is mounted, not its root: findmnt -no SOURCE {path} says which that is", USAGE)
    return path


class Mounted:
    """A tree that is mounted on ``path``.  ``number`` is the mount's id; ``device`` that of its files, ``major:minor``; ``uid``
    whoever mounted it: the kernel says that, and not the file system, which anybody can make look like a tree of snapfs.  It is
    the id in the user namespace that the mount belongs to, whoever reads it."""

    def __init__(self, line: str) -> None:
        fields, _, rest = line.partition(" - ")
        number, _, self.device, self.root, path, _ = fields.split(" ", 5)
        self.number = int(number)
        for escaped, meant in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            path = path.replace(escaped, meant)
        self.path = path
        options = rest.split(" ", 2)[2].strip().split(",")
        self.uid = [-1, *(int(option[8:]) for option in options if option.startswith("user_id="))][-1]
        self._options = options

    @property
    def is_trusted(self) -> bool:
        """Whether root or the user has mounted it."""
        if self.uid == 0:
            return True
        from snapfs.kernel import servers

        return servers.is_ours(self.uid, self._options, self.path, self.device)

    def named(self) -> str:
        """It, for a sentence: its path is another user's choice."""
        from snapfs import names

        return f"{names.printable(self.path)} (of user {self.uid})"


def mounted_trees() -> list[Mounted]:
    """The trees that are mounted, as this process sees it, or what looks like one."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as table:
        mounts = [Mounted(line) for line in table if " - fuse.snapfs " in line]
    return [each for each in mounts if each.root == "/"]  # and not a directory in one that is bound elsewhere
