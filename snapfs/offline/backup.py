"""A copy of the records, also while a process has them open: of one consistent state, whole or not there at all.

The copy is made by LMDB, without the free pages.  The layers are not in it: they are directories, and any program that copies
directories copies them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import ExitStack

import lmdb
import msgspec

from snapfs.errors import AlreadyExists, InvalidArgument, Unavailable
from snapfs.kernel import trusted
from snapfs.kernel.mounttable import mount_table
from snapfs.kernel.unnamed import unnamed
from snapfs.root import identity, imprint
from snapfs.root.claim import RECORDS, look
from snapfs.root.lock import shared_lock
from snapfs.store.environment import READERS
from snapfs.store.locktable import open_environment, table_of
from snapfs.store.schema import root_word
from snapfs.store.soundness import open_error, refuse_foreign
from snapfs.store.space import allocated_bytes

ROOM = 1 << 30  # bytes of address space, not of memory or disk, that the records may grow by while they are copied

PATIENCE = 5.0  # seconds in which a daemon that is being started, or stopped, opens or closes the records


class Backup(msgspec.Struct, frozen=True):
    """What was written: ``snapshots`` is how many the copy has, ``size`` the file's length in bytes."""

    snapshots: int
    size: int


def backup(root: str, file: str) -> Backup:
    """Write a copy of the records of ``root`` to ``file``, mode 0600, on disk when this returns.

    The copy holds all changes whose calls had returned before this one began.  ``file`` appears whole or not at all, and a file
    that is there is never replaced.  Every process may call this but the one that has the root open; blocks on the disk.

    Raises AlreadyExists; InvalidArgument: ``file`` lies within the root or on a mount of snapfs; Damaged: the records can't be
    read, or are another root's; Unavailable: there are none, or the operating system refused.
    """
    with look(root) as found:
        return _backup(found.path, root, file)


def _backup(root: str, given: str, file: str) -> Backup:
    records = f"{root}/{RECORDS}"
    try:
        if os.stat(records).st_size == 0:
            raise Unavailable(f"there are no records in {given} yet: {records} is empty")
    except FileNotFoundError:
        raise Unavailable(f"there are no records in {given}: {records} is missing") from None
    except OSError as error:
        raise Unavailable.from_os("read the records", error) from error
    directory, name = os.path.split(os.path.abspath(file))
    try:
        with trusted.find(directory, inside=True) as found:
            _refuse_place(root, found.path, file)
            if os.path.lexists(f"/proc/self/fd/{found.fd}/{name}"):
                raise AlreadyExists(f"{file} exists already, and a backup never replaces anything: give another name")
            return _write(root, records, f"/proc/self/fd/{found.fd}", name)
    except trusted.Untrusted as error:
        to_do = "write it to a directory below those that nobody else can write, such as /var/backups"
        raise Unavailable(f"cannot write the backup {file}: {error}; {to_do}") from None
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise AlreadyExists(f"{file} has just been made by somebody else: give another name") from None
        raise Unavailable.from_os(f"write the backup {file}", error) from error


def _refuse_place(root: str, directory: str, file: str) -> None:
    if os.path.commonpath([root, directory]) == root:
        raise InvalidArgument(f"the backup {file} would lie in {root}, and be lost with it: write it elsewhere")
    holding = [mount for mount in mount_table() if os.path.commonpath([mount.target, directory]) == mount.target]
    nearest = max(holding, key=lambda mount: len(mount.target), default=None)
    if nearest is not None and nearest.type == "fuse.snapfs":
        raise InvalidArgument(
            f"the backup {file} would lie on a mount of snapfs, which holds snapshots only: write it elsewhere"
        )


def _write(root: str, records: str, directory: str, name: str) -> Backup:
    """Copy ``records`` to a file without a name, where the file system has such files (else to one with a name that tells), and
    give it its name when the copy is on disk."""
    with unnamed(directory) as copy:
        _copy(root, records, copy.fd)
        made = Backup(_count(copy.fd, root, records), os.fstat(copy.fd).st_size)
        copy.become(name)
        return made


def _copy(root: str, records: str, fd: int) -> None:
    room = 2 * allocated_bytes(os.stat(records)) + ROOM  # it may grow before the copy begins
    deadline = time.monotonic() + PATIENCE
    while True:
        with shared_lock(root) as holder, ExitStack() as ended:
            if holder is None and not _keep_unwritten(records, ended):
                holder = 0  # ROOT/lock was removed
            table = None if holder is None else table_of(holder, records)
            if table is not None:
                ended.callback(os.close, table)
            if holder is None or table is not None:
                _copy_with(records, table, room, fd)
                if table is None or _is_of(holder, records, table):
                    return
                os.ftruncate(fd, 0)  # another process has the root by now, and did not know that the records were being read
                os.lseek(fd, 0, os.SEEK_SET)
        if time.monotonic() > deadline:
            raise Unavailable(
                f"cannot read the records: the process with pid {holder or 'unknown'} has them open, and can't be seen from "
                "here: run this where that one runs"
            )
        time.sleep(0.01)  # it is being started or stopped


def _keep_unwritten(records: str, ended: ExitStack) -> bool:
    """Keep every process from opening ``records`` until ``ended``; False where one has them open (``Space``)."""
    fd = os.open(records, os.O_RDONLY | os.O_CLOEXEC)
    ended.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _copy_with(records: str, table: int | None, room: int, fd: int) -> None:
    """Copy ``records`` to the file open as ``fd``.  ``table`` is the lock table of the process that may be writing to them,
    None where no process is."""
    try:
        if table is None:
            environment = lmdb.open(records, room, subdir=False, readonly=True, lock=False, max_dbs=16)
        else:
            environment = open_environment(records, table, map_size=room, readonly=True, max_dbs=16, max_readers=READERS)
        with environment as env:
            refuse_foreign(env, records)
            env.copyfd(fd, compact=True)
    except lmdb.Error as error:
        code = getattr(error, "code", 0)
        if code > 0:
            raise OSError(code, os.strerror(code)) from error
        raise open_error(records, error) from error


def _is_of(holder: int | None, records: str, table: int) -> bool:
    """Whether process ``holder`` still has this lock table."""
    now = table_of(holder or 0, records)
    if now is None:
        return False
    try:
        return os.path.sameopenfile(now, table)
    finally:
        os.close(now)


def _count(fd: int, root: str, records: str) -> int:
    """How many snapshots the copy, open as ``fd``, has.  This opens it, which shows that it can be read.  Raises Damaged, also
    where the copy is of the records of another root."""
    try:
        with (
            lmdb.open(f"/proc/self/fd/{fd}", subdir=False, readonly=True, lock=False, max_dbs=16) as env,
            env.begin() as txn,
        ):
            recorded = root_word(txn, env.open_db(b"meta", txn, create=False))
            identity.refuse_other(root, records, imprint.read_root_word(f"{root}/snapshots"), recorded)
            entries: int = txn.stat(env.open_db(b"snapshots", txn, create=False))["entries"]
            return entries
    except lmdb.Error as error:
        raise open_error(records, error) from error
