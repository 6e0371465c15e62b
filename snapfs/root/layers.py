"""The directories on disk: ROOT/snapshots/<id>/{fs,work}, from a pool of ready-made ones into the trash.

    ROOT/            0700
      lock           held by the process that has the root open; says its pid, or a note of its end (``services/agreeing.py``)
      metadata.mdb   the records (``store/metastore.py``), and after them a megabyte that is kept for removing on a full disk
      snapshots/     0700   <id>/fs 0755, and <id>/work 0711 for active snapshots; <id> has an imprint (``imprint.py``), and it
                     may have an image.json (``imagefile.py``), and what is left of an archive (``images/original.py``)
      pool/          new-… directories, made beforehand, so that Prepare costs one rename
      trash/         directories of removed snapshots, on their way out
      rootfs/        <id>/fs: the merged file systems, while they are mounted (``services/rootfs.py``)
      empty/         the lower layer of a rootfs whose snapshot has no parent; never holds anything
      lost+found/    what stood in snapshots/ and snapfs can't have made

What is made, moved or deleted here is reached by ``held``, a descriptor of ROOT: its name may come to mean something else (a
directory that another user has made in /tmp, say, once ROOT was moved away).

All functions block on the disk: they are for worker threads.  Nothing here knows what is in the records.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from snapfs.errors import FULL, Damaged, Unavailable
from snapfs.kernel import forks, mounting, probe
from snapfs.kernel.mounttable import mount_id
from snapfs.model import Kind, Usage
from snapfs.names import NAME_MAX, parse_id
from snapfs.root import imprint
from snapfs.root import lock as rootlock
from snapfs.root.claim import RECORDS, Claim, claim, claim_existing, remove_made
from snapfs.root.paths import Paths
from snapfs.root.pool import FS_MODE, Pool, remove_empty
from snapfs.root.trash import NOT_EMPTY, Checkpoint, Trash

log = logging.getLogger(__name__)

RESERVED_AHEAD = 1000  # ids that are reserved at once

_DIGITS = 6  # of the number that tells what has the same name apart in lost+found
_NAME = 50  # characters that are left of a name that is too long for a number behind it

_PARTS = frozenset(("fs", "work", imprint.FILE, f"{imprint.FILE}.new"))


class FsTemplate(NamedTuple):
    """What the directory ``fs`` of a new snapshot is to be like: its owner (uid and gid; None: this process), its mode, and its
    extended attributes (name and value)."""

    owner: tuple[int, int] | None = None
    mode: int = FS_MODE
    attributes: Sequence[tuple[str, bytes]] = ()


class Layers(Paths):
    """One root's directories, while this process has the root.  Made by ``open`` or ``claim``; ``close`` it."""

    def __init__(self, claimed: Claim) -> None:
        super().__init__(claimed.root, claimed.held)
        self.previous_note = claimed.note
        """What the process that had the root before has noted at its end (``leave_note``)."""
        self.empty_usage = Usage()
        """What an empty layer takes on the disk: its directory."""
        self.pool = Pool(f"{self.held}/pool", f"{self.held}/snapshots", claimed.fd)
        self.trash = Trash(f"{self.root}/trash", f"{self.held}/trash")
        self._left_for_cleanup: set[int] = set()
        self._claim = claimed
        self._lock = claimed.lock
        self.supports_imprints = True
        """Whether directories can have imprints here: extended attributes of users'."""
        self.not_inherited: set[int] = set()
        """Parents of which the log has been told that their attributes are too many to be inherited."""
        self._last_reserved_id = 0
        self._owner = (os.geteuid(), os.getegid())
        forks.disown_in_children(self)

    @classmethod
    def claim(cls, root: str) -> Layers:
        """Claim ``root``, which must be one, and change nothing in it but the pid in its lock.  Raises Unavailable
        (``claim_existing``)."""
        layers = cls(claim_existing(root))
        layers.leave_note(str(os.getpid()))
        return layers

    @classmethod
    def begin(cls, root: str) -> Layers:
        """Claim ``root``, made where missing; what is in one that is there stays as it is until ``make_ready``.

        Raises Unavailable with a sentence: the root can't be claimed (``claim``), it spans several mounts, or what the
        operating system refused.
        """
        layers = cls(claim(root))
        try:
            layers._refuse_several_disks()
        except BaseException as error:
            layers.unmake()
            if isinstance(error, OSError):
                raise Unavailable.from_os(f"use {root} as root", error) from error
            raise
        return layers

    @classmethod
    def open(cls, root: str) -> Layers:
        """``begin``, and at once ``make_ready``."""
        layers = cls.begin(root)
        try:
            layers.make_ready()
        except BaseException:
            layers.unmake()
            raise
        return layers

    def make_ready(self) -> None:
        """Have all directories there, and nobody else in ROOT.

        Raises Unavailable with a sentence: the file system tells no d_type, or what the operating system refused."""
        try:
            os.chmod(self.held, 0o700)
            for name in ("snapshots", "pool", "trash", "rootfs"):
                path = f"{self.held}/{name}"
                with suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                os.chmod(path, 0o500 if name == "rootfs" and self._is_seen_from_outside() else 0o700)
            with suppress(OSError):  # one of ROOT's own would be the access ACL of each layer
                os.removexattr(self.pool.directory, "system.posix_acl_default")
            self._refuse_several_disks()
            self.trash.count_leftovers()
            self._begin_pool()
            self.supports_imprints = imprint.is_supported(self.pool.directory)
            self._last_reserved_id = imprint.read_last_reserved_id(self.snapshots) if self.supports_imprints else 0
            self.leave_note(str(os.getpid()))
        except OSError as error:
            self.naming.name(error)
            raise Unavailable.from_os(f"use {self.root} as root", error) from error

    def _is_seen_from_outside(self) -> bool:
        """Whether processes of this user in other namespaces have ROOT/rootfs without what is mounted there: what a program
        makes at a path that it has found out in a workspace must fail in there.  This process may write there all the same."""
        return os.geteuid() != 0 and probe.in_user_namespace()

    def unmake(self) -> None:
        """Close it; and where this process has made it, and it holds nothing, leave nothing of it."""
        self.pool.close()
        if self._claim.is_new and not self._closed:
            with suppress(OSError):
                for name in ("snapshots", "pool", "trash", "rootfs", "empty"):
                    with suppress(FileNotFoundError):
                        os.rmdir(f"{self.held}/{name}")
                for name in (RECORDS, f"{RECORDS}-reserve", "lock"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{self.held}/{name}")
                remove_made(self._claim.made)
        if not self._closed:
            self._claim.put_mode_back()
        self.close()

    def _refuse_several_disks(self) -> None:
        """Raise Unavailable where pool, snapshots/ and trash are not in one mount and one subvolume: directories are renamed
        from one to the next."""
        places = {name: f"{self.held}/{name}" for name in ("snapshots", "pool", "trash")}
        found = {name: (os.stat(path).st_dev, mount_id(path)) for name, path in places.items() if os.path.exists(path)}
        for name, place in found.items():
            if place != found.get("snapshots", place):
                raise Unavailable(
                    f"{self.snapshots} and {self.root}/{name} are not in one mount: nothing but the whole of {self.root} can "
                    "be mounted, or be a subvolume"
                )

    def _begin_pool(self) -> None:
        """Make the first directory of the pool, and raise Unavailable where it shows that overlayfs can't use this file system.

        A full disk has no room for a directory; but it had when the root was made, and the file system was looked at then.
        """
        try:
            made = self.pool.make_first()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.empty_usage = Usage(1, os.stat(f"{self.held}/rootfs").st_blocks * 512)
            return
        if not probe.reports_entry_types(made):
            raise Unavailable(
                f"the file system of {self.root} does not tell the types of directory entries (d_type), which overlayfs "
                "needs; if it is xfs, make it anew with: mkfs.xfs -n ftype=1"
            )
        self.empty_usage = Usage(1, os.stat(f"{made}/fs").st_blocks * 512)

    def close(self) -> None:
        """Empty the pool and release the lock; twice is fine."""
        self.pool.close()
        if not self._closed:
            os.close(self._lock)
            os.close(self._claim.fd)
            self._lock = -1

    @property
    def _closed(self) -> bool:
        return self._lock < 0

    def leave_note(self, text: str) -> None:
        """Leave ``text`` in the lock for the process that has the root next; where the disk refuses, there is no note."""
        with suppress(OSError):
            rootlock.write(self._lock, text)

    def disown_in_child(self) -> None:
        """In a forked process: let go of the root, which the parent holds, and leave the pool's directories alone."""
        self.pool.forget()
        self.close()

    # -- making

    def clear_pool(self) -> None:
        """Discard what an earlier process has left in the pool; raises OSError."""
        with self.naming:
            for leftover in self.pool.leftovers():
                try:
                    self.trash.move_here(leftover)
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    remove_empty(leftover)

    def fill_pool(self, checkpoint: Checkpoint) -> None:
        """Make directories until the pool is full (``Pool.fill``).  Raises OSError."""
        with self.naming:
            self.pool.fill(checkpoint)

    def reserve_ids(self, number: int) -> None:
        """Write an id to the directory snapshots/ that is at least ``number``, unless one is there; once for many ids.

        Records that are made anew from the directories (``offline/rebuilding.py``) give out higher ids only, so that no id is
        ever used twice.  Raises OSError.
        """
        if number > self._last_reserved_id and self.supports_imprints:
            with self.naming:
                imprint.write_last_reserved_id(f"{self.held}/snapshots", number + RESERVED_AHEAD)
            self._last_reserved_id = number + RESERVED_AHEAD

    def write_imprint(self, number: int, written: imprint.Imprint) -> None:
        """Write the imprint of snapshot ``number`` to its directory, in the place of the one it had; raises OSError.

        Does nothing where directories can't have imprints, or where the directory was taken away: calls that need the directory
        raise Damaged then.
        """
        if self.supports_imprints:
            with suppress(FileNotFoundError, NotADirectoryError), self.naming:
                imprint.write(self.held_directory(number), written)

    def place(self, number: int, kind: Kind, template: FsTemplate, name: str | None = None) -> str | None:
        """Put a fresh directory of the pool at snapshots/<number>: the one called ``name``, or any.  Its ``fs`` becomes what
        ``template`` says.  Returns the name that the directory had in the pool if it was on disk there, else None.

        The directory appears whole, by one rename; raises OSError, having left nothing.
        """
        with self.naming:
            ready = (f"{self.pool.directory}/{name}", self.pool.syncs) if name is not None else self.pool.pop_or_make()
            path, was_ready = ready
            try:
                if kind is Kind.VIEW:
                    with suppress(FileNotFoundError):
                        os.rmdir(f"{path}/work")
                if template.owner is not None and template.owner != self._owner:
                    os.lchown(f"{path}/fs", *template.owner)
                for attribute, value in template.attributes:
                    os.setxattr(f"{path}/fs", attribute, value)
                if template.mode != FS_MODE or template.attributes:
                    # last: an ACL changes the mode, and a process that the mode keeps out may set no attribute
                    os.chmod(f"{path}/fs", template.mode)
                self._rename_into_place(path, number)
            except OSError:
                remove_empty(path)
                raise
        self.pool.note_placed(number)
        return os.path.basename(path) if was_ready else None

    def make_ahead(self) -> str:
        """Make a directory that the caller fills, for a snapshot that is yet to be: its name in the pool.  Then it is placed
        (``place_made``) or thrown away (``discard_made``); the next start does the latter.  Raises OSError."""
        with self.naming:
            return os.path.basename(self.pool.make())

    def made_path(self, name: str) -> str:
        """The path of ``fs`` in a directory that ``make_ahead`` has made, by the descriptor of ROOT."""
        return f"{self.pool.directory}/{name}/fs"

    def place_made(self, number: int, name: str) -> None:
        """Put what ``make_ahead`` has made, and the caller has filled, at snapshots/<number>.  Raises OSError."""
        with self.naming:
            self._rename_into_place(f"{self.pool.directory}/{name}", number)

    def _rename_into_place(self, path: str, number: int) -> None:
        if self._exists(number):  # a crash left it before there was a record, or a user put it there
            self._move_away(number, discard=self.is_empty(number))
        os.rename(path, self.held_directory(number))

    def undo_place_made(self, number: int, name: str) -> None:
        """Undo ``place_made``.  Never raises: where the disk refuses, a later Cleanup removes it."""
        try:
            os.rename(self.held_directory(number), f"{self.pool.directory}/{name}")
        except OSError as error:
            log.warning("cannot move %s back: %s", self.directory(number), error.strerror)
        self.pool.note_undone(number)

    def discard_made(self, name: str) -> None:
        """Move what ``make_ahead`` has made into the trash, unless it was placed.  Never raises: where the disk refuses, the
        next start does it."""
        with suppress(FileNotFoundError):
            try:
                with self.naming:
                    self.trash.move_here(f"{self.pool.directory}/{name}")
            except FileNotFoundError:
                raise
            except OSError as error:
                log.warning("cannot remove %s/pool/%s: %s", self.root, name, error.strerror)

    def refuse_damaged(self, number: int, kind: Kind = Kind.COMMITTED) -> None:
        """Raise Damaged where a directory of snapshot ``number`` is missing or is not a directory, but a link, say: its own,
        ``fs``, and of an active snapshot ``work``.  Raises Unavailable where the disk refuses to tell."""
        for part in ("", "/fs", "/work") if kind is Kind.ACTIVE else ("", "/fs"):
            try:
                if stat.S_ISDIR(self._lstat(number, part).st_mode):
                    continue
                wrong = "not a directory"
            except FileNotFoundError:
                wrong = "missing"
            except OSError as error:
                raise Unavailable.from_os(f"look at the layer {self.directory(number)}{part}", error) from error
            raise Damaged(f"the layer {self.directory(number)}{part} is {wrong}; restore it from a backup")

    def _lstat(self, number: int, part: str = "") -> os.stat_result:
        """lstat(2) of snapshots/<number>, or a part of it: from ROOT on, which takes a third of the time that the whole path
        takes, and is done for each layer of what is mounted.  Raises OSError."""
        try:
            return os.stat(f"snapshots/{number}{part}", dir_fd=self._claim.fd, follow_symlinks=False)
        except OSError as error:
            error.filename = self.directory(number) + part
            raise

    def _exists(self, number: int, part: str = "") -> bool:
        try:
            self._lstat(number, part)
        except OSError:
            return False
        return True

    # -- unmaking

    @property
    def pending_deletions(self) -> int:
        """How many directories wait to be deleted: in the trash, or (``leave_for_cleanup``) in snapshots/."""
        return self.trash.count + len(self._left_for_cleanup)

    def undo_place(self, number: int) -> None:
        """Undo ``place``: remove the directory of snapshot ``number``, which no caller has seen yet.  Never raises: where the
        disk refuses, the next start removes it."""
        for name in (imprint.FILE, f"{imprint.FILE}.new"):
            with suppress(OSError):
                os.unlink(f"{self.held_directory(number)}/{name}")
        remove_empty(self.held_directory(number))
        self.pool.note_undone(number)

    def leave_for_cleanup(self, number: int) -> None:
        """Leave snapshots/<number>, whose record is removed, where it is, for the next ``sweep`` or ``empty_trash``."""
        if self._exists(number):
            self._left_for_cleanup.add(number)

    def move_to_trash(self, number: int) -> None:
        """Move snapshots/<number>, whose record is removed, into the trash, where a layer without files is gone at once.  Where
        the disk is too full for that, or the directory may not be moved, ``empty_trash`` deletes it where it is.

        What snapfs can't have made goes to lost+found.  Raises OSError.
        """
        try:
            self._move_away(number)
        except OSError as error:
            if not self._exists(number):
                self._left_for_cleanup.discard(number)
            elif error.errno in FULL or isinstance(error, PermissionError):  # it is immutable, say
                self._left_for_cleanup.add(number)
            else:
                raise

    def _move_away(self, number: int, *, discard: bool = True) -> None:
        path = self.directory(number)
        had_layer, is_gone = self._delete_empty(number) if discard else (False, False)
        if is_gone:
            pass
        elif had_layer or (discard and self._is_ours(number)):
            with self.naming:
                self.trash.move_here(self.held_directory(number))
        else:
            log.warning("%s is none of snapfs's directories; moved to %s", path, self.move_to_lost_found(path))
        self._left_for_cleanup.discard(number)

    def _delete_empty(self, number: int) -> tuple[bool, bool]:
        """Delete snapshots/<number>, if nothing but an empty layer is in it: whether that was there, and is all that was there.
        Most layers of short lives are so; it is done from ROOT on, as ``_lstat``."""
        had_layer = False
        with suppress(OSError):
            os.rmdir(f"snapshots/{number}/fs", dir_fd=self._claim.fd)
            had_layer = True
            with suppress(FileNotFoundError):  # a view has none
                os.rmdir(f"snapshots/{number}/work", dir_fd=self._claim.fd)
            os.rmdir(f"snapshots/{number}", dir_fd=self._claim.fd)
            return True, True
        return had_layer, False

    def _is_ours(self, number: int) -> bool:
        """Whether snapshots/<number> is such a directory as a Prepare makes, or what is left of one."""
        if not stat.S_ISDIR(self._lstat(number).st_mode):
            return False
        if self._exists(number, "/fs"):
            return True
        with os.scandir(self.held_directory(number)) as entries:
            return all(entry.name in _PARTS for entry in entries)

    def sweep(self, known: Collection[int], last_id: int) -> None:
        """Move what stands in snapshots/ without a record into the trash: directories of ids up to ``last_id`` that are not in
        ``known``, and abandoned ``new-…`` directories.  What snapfs can't have made goes to lost+found, unseen and whole.

        Raises OSError where anything could not be moved, after all else was.
        """
        refused: OSError | None = None
        for name in os.listdir(f"{self.held}/snapshots"):
            number = parse_id(name)
            path = f"{self.snapshots}/{name}"
            ours = name.startswith("new-") or (number is not None and number <= last_id)
            if ours and number in known:
                continue
            try:
                if ours and number is not None:
                    self.move_to_trash(number)
                elif ours and stat.S_ISDIR(os.lstat(self.held_path(path)).st_mode):
                    with self.naming:
                        self.trash.move_here(self.held_path(path))
                else:
                    log.warning("%s is none of snapfs's directories; moved to %s", path, self.move_to_lost_found(path))
            except OSError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def move_to_lost_found(self, path: str) -> str:
        """Move the file or directory ``path``, a name in ROOT, to lost+found, and return its path there: the second of a name
        is ``NAME~1``, and so on in the order in which they come.  Raises OSError."""
        with self.naming:
            directory, name = f"{self.held}/lost+found", os.path.basename(path)
            os.makedirs(directory, mode=0o700, exist_ok=True)
            if os.path.lexists(f"{directory}/{name}"):
                shown = name if len(os.fsencode(name)) + len("~") + _DIGITS <= NAME_MAX else name[:_NAME]
                first = max((0, *self.lost_of(shown))) + 1
                others = (f"{shown}~{number}" for number in itertools.count(first))
                name = next(other for other in others if not os.path.lexists(f"{directory}/{other}"))
            target = f"{self.lost_found}/{name}"
            os.rename(self.held_path(path), self.held_path(target))
        return target

    def lost_of(self, name: str) -> dict[int, str]:
        """The paths of what came to lost+found as ``name``, in the order in which it came, by number: 0 for the first, then
        those of ``NAME~1`` …; an older snapfs wrote as many "~" instead.  Raises OSError."""
        pattern = re.compile(rf"{re.escape(name)}(?:(~*)|~([1-9][0-9]{{0,{_DIGITS - 1}}}))", re.DOTALL)
        found = {}
        for other in os.listdir(f"{self.held}/lost+found"):
            if match := pattern.fullmatch(other):
                found[int(match[2] or len(match[1]))] = f"{self.lost_found}/{other}"
        return dict(sorted(found.items()))

    def remove_directory(self, path: str) -> None:
        """Remove the directory ``path``, a name in ROOT, which should be empty; one that is not goes to lost+found.  Never
        raises: where the disk refuses, that is logged."""
        try:
            os.rmdir(self.held_path(path))
        except FileNotFoundError:
            pass
        except OSError as error:
            try:
                if error.errno not in NOT_EMPTY:
                    raise
                log.warning("%s is not empty; moved to %s", path, self.move_to_lost_found(path))
            except OSError as failure:
                log.warning("cannot remove %s: %s", path, failure)

    def may_be_mounted(self, number: int) -> bool:
        """Whether an overlay may ever have had the layer of snapshot ``number`` as its upper layer; False if certainly none
        had.

        A mount makes a directory in the work directory, and since Linux 6.6 marks the upper one, unless a mount option says
        otherwise (``uuid=off``).  Raises OSError.
        """
        if not self.supports_imprints or mounting.kernel_version() < (6, 6):
            return True
        if self._exists(number, "/work/work") or self._exists(number, "/work/index"):
            return True
        try:
            return any(".overlay." in name for name in os.listxattr(self.fs(number), follow_symlinks=False))
        except OSError as error:
            if error.errno != errno.E2BIG:  # more names than the kernel can list: a mark may be among them
                raise
            return True

    def empty_layer(self) -> str:
        """The path of ROOT/empty, made where missing.  Raises OSError."""
        path = f"{self.root}/empty"
        with self.naming:
            try:
                with os.scandir(self.held_path(path)) as entries:
                    is_empty = next(entries, None) is None
                if not is_empty:
                    self.remove_directory(path)
            except FileNotFoundError:
                pass
            with suppress(FileExistsError):
                os.mkdir(self.held_path(path), 0o555)
        return path

    def make_trial(self) -> str:
        """Make a directory with ``fs``, ``work`` and ``lower``, for trying what can be mounted; its path.  The caller removes
        it.  Raises OSError."""
        with self.naming:
            path = self.pool.make()
            os.mkdir(f"{path}/lower")
        return path

    def is_empty(self, number: int) -> bool:
        """Whether the layer of snapshot ``number`` is empty, or missing."""
        try:
            with os.scandir(f"{self.held_directory(number)}/fs") as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            return True
        except NotADirectoryError:
            return False

    def existing_ids(self) -> set[int]:
        """The ids that have a directory in snapshots/, where that is there yet.  Raises OSError."""
        if not os.path.isdir(f"{self.held}/snapshots"):
            return set()
        with self.naming, os.scandir(f"{self.held}/snapshots") as entries:
            found = ((parse_id(entry.name), entry) for entry in entries)
            return {number for number, entry in found if number is not None and entry.is_dir(follow_symlinks=False)}

    def empty_trash(self, checkpoint: Checkpoint = lambda: None) -> list[OSError]:
        """Delete all that is in the trash, and the directories that could not be moved there (``move_to_trash``).

        Returns an error, with its path, for each directory that can't be deleted and stays; that is logged, too.
        ``checkpoint`` is called once an entry, and may raise to stop.
        """
        with self.naming:
            refused = self.trash.empty(checkpoint)
        for number in list(self._left_for_cleanup):
            checkpoint()
            try:
                self.move_to_trash(number)
                if number in self._left_for_cleanup and self._is_ours(number):
                    self.trash.delete(self.held_directory(number), checkpoint)
                    self._left_for_cleanup.discard(number)
            except OSError as error:
                error.filename = error.filename or self.directory(number)
                refused.append(error)
                self.trash.mark_stuck(self.held_directory(number), error)
        return refused
