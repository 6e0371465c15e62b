"""How the files of a directory come into the layer of a base: copied by whoever calls, or moved.

A base that is being made is the active snapshot KEY@adopting, locked by the command that makes it (``drafts.py``), which has
the label ADOPTING until there is a workspace on it.  What a command that was killed has left is known by that: copied files are
removed by the next call, moved ones are taken over.  Where others may write the tree, and so its labels, moved files are known
by what only who writes ROOT can have noted: MOVED_FROM, an attribute of the snapshot's directory there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os

from snapfs import names
from snapfs.cli.commanding import SYNC, persistently
from snapfs.cli.commit import commit
from snapfs.cli.drafts import label_of, locked, namespaces, refuse_unwritable
from snapfs.cli.mount import in_use, trusting
from snapfs.cli.place import MountedTree
from snapfs.cli.prepare import make
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import BUSY, FAILED, NOT_FOUND, NOT_PERMITTED, TAKEN, Refusal
from snapfs.cli.source import Source
from snapfs.cli.table import complain
from snapfs.errors import TryAgain
from snapfs.kernel import libc, mounting, subids, trusted
from snapfs.kernel.processes import users
from snapfs.labels import ADOPTING, BASE, COPIED, MOVED, SOURCE
from snapfs.root.trash import Trash
from snapfs.scan.layercopy import attributes, set_attributes
from snapfs.scan.treecopy import Ids, TreeCopy, Unfit, refuse_immovable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_ALL = [range(1 << 32)]  # ids

DRAFT = "@adopting"
"""What the key of the snapshot ends with that is to become a base."""

MOVED_FROM = "user.snapfs.moved_from"
"""An attribute of ROOT/snapshots/<id>: the directory whose files are moved there, as the label SOURCE has it."""

SEARCH = 60.0  # seconds in which all processes are asked whether they have a directory that is moved


class Draft:
    """A snapshot that is to become a base: its key, its id, its directory in ROOT; ``fd`` has it locked.
    ``is_filled``: it holds all files already, which a command has moved there that was killed."""

    def __init__(self, key: str, number: int, directory: str, fd: int, *, is_filled: bool) -> None:
        self.key = key
        self.number = number
        self.directory = directory
        self.layer = f"{directory}/fs"
        self.fd = fd
        self.is_filled = is_filled


class Adoption:
    """One adoption, of ``source`` as ``key``, in a tree whose options.json says ``options``."""

    def __init__(self, place: MountedTree, options: dict[str, Any], source: Source, key: str) -> None:
        self.place = place
        self.source = source
        self.key = key
        self.base = f"{key}@0"
        self.draft = f"{key}{DRAFT}"
        self._options = options
        self._root: str = options["root"]
        self._prefix = "user.overlay." if options["features"]["userxattr"]["on"] else "trusted.overlay."

    def refuse_taken(self) -> None:
        """Raise Refusal unless the key can be had, and ROOT be written by this user."""
        names.encode(self.draft)
        kind = self.place.kind_of(self.key)
        if kind is not None:
            raise Refusal(f'snapshot "{self.key}" already exists ({kind}): give another KEY', TAKEN)
        refuse_unwritable(self.place, self._root, f"cannot adopt {self.source.path}")

    @contextlib.contextmanager
    def committed(self, *, move: bool) -> Iterator[None]:
        """For a block: there is the base, whole, and no other call can take it.  If the block fails, it is removed again,
        unless its files were moved there.  Raises Refusal, and all is as it was."""
        with contextlib.ExitStack() as held:
            found = self._resumed(held)
            if found is None:
                draft = self._begun(held, move=move)
                found = draft.number, move or draft.is_filled
                with _one_sentence(self.source, draft):
                    self._filled(draft, move=move)
            number, is_moved = found
            try:
                self.place.do(
                    "wait for the disk",
                    SYNC,
                    persistently,
                    self.place.within.sync,
                    self.place.directory("committed", self.base),
                )
                yield
            except BaseException:
                if not is_moved:
                    with contextlib.suppress(Refusal):
                        self.place.remove("committed", self.base, number)
                raise

    def made(self, labels: list[tuple[str, str]]) -> str:
        """Make the workspace, with its ``labels`` from the first moment on; its directory.  Raises Refusal."""
        place, new = self.place, self.place.directory("active", self.key)
        given = [(SOURCE, self.source.text), (BASE, self.base), *labels]
        draft = place.directory("active", self.draft)
        is_ours = False
        try:
            make(place, "active", self.draft, self.base, given)
            is_ours = True  # else there may be another, with files that a command has moved there that was killed
            place.do(f'make "{self.key}"', ["rename"], place.within.rename, draft, new)
        except BaseException as error:
            if is_ours:
                with contextlib.suppress(Refusal):
                    place.do("remove what is left", ["rmdir"], place.within.rmdir, draft)
            if isinstance(error, Refusal) and error.status == TAKEN:
                raise Refusal(f'snapshot "{self.key}" already exists ({place.kind_of(self.key)})', TAKEN) from None
            raise
        place.write_label(place.directory("committed", self.base), ADOPTING, "")
        return new

    # -- what is there already

    def _resumed(self, held: contextlib.ExitStack) -> tuple[int, bool] | None:
        """The id of the base, which a command that was killed has moved its files to, and True; None where there is none.  A
        base that such a command has copied is removed.  Raises Refusal where there is a base that is whole."""
        place, kind = self.place, self.place.kind_of(self.base)
        if kind is None:
            return None
        directory = place.directory(kind, self.base)
        way = label_of(self.place, directory, ADOPTING)
        if kind != "committed" or not way:
            whose = label_of(self.place, directory, SOURCE)
            of = f", the base of an earlier adoption of {names.path_of_text(whose)}" if whose else ""
            to_do = f"or remove it: {place.command('rm', place.word_of(self.base))}"
            if whose == self.source.text and self.source.is_empty():  # it has all that there was
                options = ["--parent", self.base, "--label", f"{SOURCE}={whose}", "--label", f"{BASE}={self.base}"]
                to_do = f"or go on from it: {place.command('prepare', self.key)} {' '.join(map(names.word, options))}"
            raise Refusal(f'snapshot "{self.base}" already exists ({kind}){of}: give another KEY, {to_do}', TAKEN)
        number, fd = self._locked(kind, self.base)
        held.callback(os.close, fd)
        if place.kind_of(self.draft) == "active":
            inner, other = self._locked("active", self.draft)
            held.callback(os.close, other)
            parent = json.loads(place.read(f"{place.directory('active', self.draft)}/info.json"))["parent"]
            if parent == self.base:  # the workspace that was to be, which nobody has had yet
                place.remove("active", self.draft, inner)
        if way == MOVED:
            self._refuse_another(directory, self.base, number)
            return number, True
        place.remove(kind, self.base, number)
        return None

    def _begun(self, held: contextlib.ExitStack, *, move: bool) -> Draft:
        """The draft, locked.  Raises Refusal."""
        place, directory = self.place, self.place.directory("active", self.draft)
        while True:
            is_new = True
            try:
                make(place, "active", self.draft, None)
            except Refusal as refused:
                is_new = False
                if refused.status != TAKEN or place.kind_of(self.draft) not in (None, "active"):
                    raise
            number, fd = self._locked("active", self.draft, is_new=is_new)
            own, way = f"{self._root}/snapshots/{number}", label_of(self.place, directory, ADOPTING)
            try:
                is_empty = not os.listdir(f"{own}/fs")
                if is_new or (way == MOVED and not is_empty):
                    break
                if not way and not is_empty:
                    raise Refusal(f'snapshot "{self.draft}" already exists (active), and has files: give another KEY', TAKEN)
                place.remove("active", self.draft, number)  # what is left of a copy, or of nothing
            except FileNotFoundError:
                place.remove("active", self.draft, number)
                raise Refusal(f"{own}/fs, where the files would go, is missing: try again, or see what removes it") from None
            finally:
                held.callback(os.close, fd)
        if way == MOVED and not is_empty:
            self._refuse_another(directory, self.draft, number)
            return Draft(self.draft, number, own, fd, is_filled=True)
        try:
            place.write_label(directory, SOURCE, self.source.text)
            if move:
                with contextlib.suppress(OSError):  # it has no room for that: then it is not known where others write
                    os.setxattr(own, MOVED_FROM, self.source.text.encode())
            place.write_label(directory, ADOPTING, MOVED if move else COPIED)
        except BaseException:
            place.remove("active", self.draft, number)
            raise
        return Draft(self.draft, number, own, fd, is_filled=False)

    def _moved_from(self, directory: str, number: int) -> str | None:
        """From where the files were moved that are in the snapshot ``number`` at ``directory``, as SOURCE has it; None where
        others could have written that."""
        if not self.place.is_labelled_by_others(directory):
            return label_of(self.place, directory, SOURCE)
        with contextlib.suppress(OSError):
            return os.getxattr(f"{self._root}/snapshots/{number}", MOVED_FROM, follow_symlinks=False).decode()
        return None

    def _refuse_another(self, directory: str, name: str, number: int) -> None:
        """Raise Refusal unless what is in snapshot ``name`` at ``directory``, with the id ``number``, was moved from what this
        adoption is of."""
        whose = self._moved_from(directory, number)
        if whose is None:
            to_do = f"give another KEY, or remove it: {self.place.command('rm', self.place.word_for(name, number))}"
            words = (
                f'"{name}" is labelled as what an adoption has left that was cut off, but others than you may write the tree'
            )
            raise Refusal(f"{words}, and could have made it: {to_do}", NOT_PERMITTED)
        path = names.path_of_text(whose)
        if whose != self.source.text:
            to_do = f"snapfs adopt --move {names.word(path)} {names.word(self.key)} goes on with it"
            raise Refusal(f'"{name}" holds all files of {path}, whose adoption was cut off: {to_do}', TAKEN)
        if not self.source.is_empty():
            words = f'"{name}" holds the files that {path} had, whose adoption was cut off, and it has others by now'
            raise Refusal(f"{words}: move these elsewhere, and try again", TAKEN)

    def _locked(self, kind: str, name: str, *, is_new: bool = False) -> tuple[int, int]:
        words = f'another adoption as "{self.key}" is under way: wait for its end, or give another KEY'
        return locked(self.place, self._root, kind, name, Refusal(words, BUSY), is_new=is_new)

    # -- the files

    def _filled(self, draft: Draft, *, move: bool) -> None:
        """Have all files in the base, and the base committed; or the draft is removed, and all is as it was."""
        try:
            if draft.is_filled:
                self._commit_moved(draft)
            elif move:
                self._move(draft)
            else:
                self._copy(draft)
                commit(self.place, draft.key, self.base)
        except BaseException:
            # what was moved there, and could not be moved back, is all that there is of it
            if not draft.is_filled and (not move or not os.listdir(draft.layer)):
                for kind, name in (("active", draft.key), ("committed", self.base)):  # it may have just been committed
                    with contextlib.suppress(Refusal):
                        self.place.remove(kind, name, draft.number)
            raise

    @contextlib.contextmanager
    def _daemon(self) -> Iterator[tuple[str, Ids | None]]:
        """For a block: the directory in /proc of the daemon, where it has namespaces of its own, or ""; and which owners files
        can have there."""
        with namespaces(self.place, self._options, f"cannot adopt {self.source.path}") as process:
            if process:
                yield process, subids.mapped_in(process)
            else:
                yield "", None if os.geteuid() == 0 else (_ALL, _ALL)

    def _copy(self, draft: Draft) -> None:
        progress, stale = Progress(), f"{draft.directory}/stale"
        with contextlib.ExitStack() as held:
            process, ids = held.enter_context(self._daemon())
            held.callback(progress.clear)
            if process or os.geteuid() == 0:
                held.enter_context(in_use(draft.layer, process))
            os.mkdir(stale, 0o700)
            copy = TreeCopy(
                self.source.fd,
                draft.layer,
                stale,
                prefix=self._prefix,
                ids=ids,
                flush=lambda: mounting.sync_file_system(self.source.fd),
                checkpoint=lambda: progress.show_count("copying", copy.files, copy.size),
            )
            copy.complete()
            Trash(f"{self._root}/trash", f"{self._root}/trash").delete(stale, lambda: None)
        for path, words in (
            (copy.foreign, "belongs to somebody else: in the base it is yours"),
            (copy.bare, "has an attribute that only root may set: the base lacks it"),
        ):
            if path:
                complain(f"{_shown(path, self.source, draft)}, for one, {words}")

    def _move(self, draft: Draft) -> None:
        """Let the directory and the layer change places, and commit that; or put it back."""
        source, progress = self.source, Progress()
        with self._daemon() as (_, ids):
            try:
                refuse_immovable(
                    source.fd, self._prefix, ids, lambda count: progress.show_count("looking at what is to be moved", count, 0)
                )
            finally:
                progress.clear()
        directory, name = os.path.split(source.path)
        with contextlib.ExitStack() as held:
            with trusting("move", source.path):
                above = held.enter_context(trusted.find(directory, inside=True))
            layer = os.open(draft.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            held.callback(os.close, layer)

            def change_places() -> None:
                try:
                    libc.rename(name, above.fd, "fs", layer, libc.RENAME_EXCHANGE)
                except OSError as error:
                    raise _why_not_moved(source.path, self._root, error) from None

            def is_moved() -> bool:
                return os.path.samestat(os.stat("fs", dir_fd=layer, follow_symlinks=False), os.fstat(source.fd))

            is_done = False
            try:
                change_places()
                is_done = True
                if not is_moved():
                    raise Refusal(f"{source.path} has just become another directory: nothing was moved", BUSY)
                left = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above.fd)
                held.callback(os.close, left)
                was = os.fstat(source.fd)
                set_attributes(left, was, attributes(source.fd), was.st_atime_ns)
                self._commit_moved(draft)
            except BaseException:
                if not is_done and not is_moved():
                    raise
                try:
                    told = self.place.read(f"{self.place.directory('active', draft.key)}/info.json")
                    is_draft = json.loads(told)["id"] == draft.number
                except Refusal as gone:
                    if gone.status != NOT_FOUND:  # nobody knows what has become of it
                        words = f"{gone}; all that was in {source.path} is in {draft.layer} until you adopt it once more then"
                        raise Refusal(words, gone.status) from None
                    is_draft = False  # but committed
                if is_draft:
                    change_places()
                raise

    def _commit_moved(self, draft: Draft) -> None:
        """Commit what was moved.  Raises Refusal, also where a process has files of it, by which it could change the base."""
        to_do = "leave it first, or adopt it without --move"
        by = next(users(draft.layer, longest=SEARCH), None)
        if by is not None:
            words = f"{self.source.path} is in use by process {by[0]} ({by[1]}), which would go on in the base"
            raise Refusal(f"{words}: {to_do}", BUSY)
        try:
            commit(self.place, draft.key, self.base)
        except Refusal as refused:
            if refused.status != BUSY:
                raise
            words = str(refused).split(": ")[0].replace(f'snapshot "{draft.key}"', self.source.path)
            raise Refusal(f"{words}, by which the base could be changed: {to_do}", BUSY) from None


def _why_not_moved(path: str, root: str, error: OSError) -> Refusal:
    if error.errno == errno.EXDEV:
        return Refusal(f"{path} and {root} are not in one mount of one file system: adopt it without --move, as a copy")
    if error.errno == errno.EBUSY:
        return Refusal(f"{path} is a mountpoint, which can't be moved: adopt it without --move, as a copy", BUSY)
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return Refusal(f"the file system of {path} can't exchange directories: adopt it without --move, as a copy")
    status = NOT_PERMITTED if isinstance(error, PermissionError) else FAILED
    return Refusal(f"cannot move {path}: {error.strerror}: adopt it without --move, as a copy", status)


@contextlib.contextmanager
def _one_sentence(source: Source, draft: Draft) -> Iterator[None]:
    """For a block that looks at ``source``, or copies it to ``draft``: what fails becomes a Refusal."""
    begin = f"cannot adopt {source.path}"
    try:
        yield
    except Unfit as unfit:
        raise Refusal(f"{begin}: {_shown(unfit.path, source, draft)} {unfit}", NOT_PERMITTED) from None
    except TryAgain as error:
        raise Refusal(f"{begin}: in it, {error}: stop what writes there, and try again", BUSY) from None
    except OSError as error:
        where = _shown(str(error.filename), source, draft) if error.filename else source.path
        of = f"{where}: " if where != source.path else ""
        status = NOT_PERMITTED if isinstance(error, PermissionError) else FAILED
        raise Refusal(f"{begin}: {of}{error.strerror}; nothing is kept of it", status) from None


def _shown(path: str, source: Source, draft: Draft) -> str:
    """The path in ``source`` of what has ``path`` by its descriptor, or in the layer of ``draft``, for a sentence."""
    for top in (f"/proc/self/fd/{source.fd}/.", draft.layer):
        if f"{path}/".startswith(f"{top}/"):
            path = source.path + path.removeprefix(top)
    return names.shown(path)
