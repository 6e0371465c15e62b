"""Owners: other ones for all files of a layer, as its mapping labels ask for where no mount can map ids (``slow_chown``)."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress

from snapfs import idmap, names
from snapfs.errors import Unavailable
from snapfs.kernel.mounttable import mount_table
from snapfs.labels import Labels
from snapfs.root import flags
from snapfs.root.layers import Layers
from snapfs.scan.inodes import Numbered
from snapfs.scan.walk import directories
from snapfs.store.writing import Writer

log = logging.getLogger(__name__)

Owner = tuple[int, int]
"""uid and gid."""


def mapping_labels(labels: Labels) -> tuple[str, str]:
    """Those of ``labels`` that map users and groups, "" for one that is not there."""
    return labels.get(idmap.UID_MAPPING, ""), labels.get(idmap.GID_MAPPING, "")


class Shift:
    """The change of all owners in the layer of one active snapshot, from one mapping of ids to another.

    It takes as long as the layer has files, so a caller makes it without the writer: ``apply`` changes the owners; the
    operation that then writes the new labels says so by ``depend_on``; where that operation fails, or never runs, the caller
    calls ``fail``, and the owners are again what they were.  Nobody may commit or remove the snapshot meanwhile.

    ``apply`` and ``fail`` block on the disk.
    """

    def __init__(self, layers: Layers, number: int, before: Labels, after: Labels) -> None:
        self.number = number
        self.before = mapping_labels(before)
        self.after = mapping_labels(after)
        self._layers = layers
        self._old, self._new = idmap.mappings(before), idmap.mappings(after)
        self._was = _Owners()
        self._guard = threading.Lock()  # of what follows
        self._is_undecided = False  # an operation has run whose transaction has neither failed nor become durable
        self._was_given_up = False

    def is_same(self, other: Shift) -> bool:
        """Whether ``other`` changes the same owners in the same way."""
        return (self.number, self.before, self.after) == (other.number, other.before, other.after)

    def apply(self, checkpoint: Callable[[], None]) -> None:
        """Give each file its new owner; ``checkpoint`` is called once a directory, and may raise.

        Raises Damaged where the layer is missing, and Unavailable: something is mounted inside, or an owner can't be changed.
        Some may have been changed then, until ``fail``.
        """
        self._layers.refuse_damaged(self.number)
        directory = self._layers.directory(self.number)
        _refuse_mounts(directory)
        old, new = self._old, self._new

        def shifted(entry: os.stat_result) -> Owner:
            was = entry.st_uid, entry.st_gid
            if self._was.get(entry) is not None:
                return was
            owner = idmap.remapped(entry.st_uid, old[0], new[0]), idmap.remapped(entry.st_gid, old[1], new[1])
            if owner != was:
                self._was.put(entry, was)
            return owner

        def refuse(path: str, error: OSError) -> None:
            raise _refusal(path, error) from error

        change_owners(directory, shifted, checkpoint, refuse)

    def depend_on(self, writer: Writer) -> None:
        """Within the operation that writes the labels: if it fails, the owners are to be put back."""
        with self._guard:
            self._is_undecided = True
        writer.on_failure(self._transaction_failed)

    def _transaction_failed(self) -> None:
        with self._guard:
            self._is_undecided = False
            late = self._was_given_up
        if late:  # it was unknown for a while what the disk had taken, and the caller has gone
            self._put_back()

    def fail(self) -> None:
        """Put the owners back; or leave that to the writer, where the disk has left it in doubt whether the labels are
        written."""
        with self._guard:
            self._was_given_up = True
            undecided = self._is_undecided
        if not undecided:
            self._put_back()

    def _put_back(self) -> None:
        def owner_before(entry: os.stat_result) -> Owner:
            return self._was.get(entry) or (entry.st_uid, entry.st_gid)

        def note(path: str, error: OSError) -> None:  # and go on: all others are put back
            log.warning("while undoing a failed operation: %s", _refusal(path, error))

        try:
            change_owners(self._layers.directory(self.number), owner_before, refused=note)
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)


class _Owners:
    """The owners that files had, by inode: a file with several names is met several times."""

    def __init__(self) -> None:
        self._owners: list[Owner] = []
        self._numbers: dict[Owner, int] = {}
        self._of: dict[int, Numbered] = {}  # by device, of which a layer on btrfs may have several

    def get(self, entry: os.stat_result) -> Owner | None:
        """What was put for the file that ``entry`` is of, None where nothing was."""
        of = self._of.get(entry.st_dev)
        number = of.get(entry.st_ino) if of is not None else None
        return None if number is None else self._owners[number]

    def put(self, entry: os.stat_result, owner: Owner) -> None:
        """Note that the file belonged to ``owner``."""
        number = self._numbers.setdefault(owner, len(self._owners))
        if number == len(self._owners):
            self._owners.append(owner)
        self._of.setdefault(entry.st_dev, Numbered()).put(entry.st_ino, number)


def _refuse_mounts(directory: str) -> None:
    """Raise Unavailable where something is mounted inside ``directory``: its files are not the layer's."""
    inside = f"{os.path.realpath(directory)}/"
    for mount in mount_table():
        if mount.target.startswith(inside):
            raise Unavailable(
                f"cannot change the owners of the files in {directory}: something is mounted on {names.shown(mount.target)}; "
                "unmount that first",
                errno.EBUSY,
                public="cannot change the owners of the files in the layer: something is mounted inside",
            )


def _refusal(path: str, error: OSError) -> Unavailable:
    """Why the owner of ``path`` can't be changed, and what to do."""
    reason = os.strerror(error.errno or 0)
    if isinstance(error, PermissionError) and flags.is_fixed(path):
        reason = f"it is immutable or append-only; do first: chattr -R -i -a {names.word(names.nameable(path))}"
    return Unavailable(
        f"cannot change the owner of {names.shown(path)}: {reason}",
        error.errno,
        public=f"cannot change the owner of a file in the layer: {os.strerror(error.errno or 0)}",
    )


def _raise(path: str, error: OSError) -> None:
    raise error


def change_owners(
    directory: str,
    owner: Callable[[os.stat_result], Owner],
    checkpoint: Callable[[], None] = lambda: None,
    refused: Callable[[str, OSError], None] = _raise,
) -> None:
    """Give the layer in ``directory`` (ROOT/snapshots/<id>), and all that is in it, the owner that ``owner`` says for it.

    Modes stay as they are, set-user-ID bits included, and no symbolic link is followed.  What vanishes meanwhile is left out.
    ``checkpoint`` is called once a directory, of a large one now and then, and may raise.  ``refused`` is called with the path
    of a file whose owner can't be changed, and the error; where it doesn't raise, the others follow.  Blocks on the disk;
    raises OSError.
    """

    def change(parent: int, name: str, entry: os.stat_result, top: str, place: str) -> None:
        try:
            _chown(parent, name, entry, owner)
        except FileNotFoundError:
            pass
        except OSError as error:
            try:
                path = f"{place}{_link(parent).removeprefix(top)}/{name}"
            except OSError:  # too long
                path = f"{place}/…"
            refused(path, error)

    base = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        change(base, "fs", os.stat("fs", dir_fd=base), _link(base), directory)
    finally:
        os.close(base)
    top: str | None = None
    with closing(directories(f"{directory}/fs")) as visited:
        for fd, entries in visited:
            checkpoint()
            top = _link(fd) if top is None else top
            for entry in entries:
                with suppress(FileNotFoundError):
                    change(fd, entry.name, entry.stat(follow_symlinks=False), top, f"{directory}/fs")


def _link(fd: int) -> str:
    """What the kernel calls the directory open as ``fd``: a path, or one from the top of a mount that is attached nowhere."""
    return os.readlink(f"/proc/self/fd/{fd}").rstrip("/")


def _chown(parent: int, name: str, entry: os.stat_result, owner: Callable[[os.stat_result], Owner]) -> None:
    wanted = owner(entry)
    if wanted != (entry.st_uid, entry.st_gid):
        os.chown(name, *wanted, dir_fd=parent, follow_symlinks=False)
        if entry.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(entry.st_mode):  # chown drops these bits
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)  # chmod would follow a link put there
            try:
                if os.path.samestat(os.fstat(fd), entry):
                    os.chmod(f"/proc/self/fd/{fd}", stat.S_IMODE(entry.st_mode))
            finally:
                os.close(fd)
