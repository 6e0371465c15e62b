"""Whether a file of records can be used, and in words why not."""

from __future__ import annotations

import errno
import os
import stat
import sys

import lmdb
from lmdb.verify import VerifyError, verify

from snapfs.errors import Damaged, SnapshotError, Unavailable
from snapfs.store.schema import READ, SCHEMA

_MAGIC, _MAGIC_AT = 0xBEEFC0DE, 16  # of LMDB's first meta page, after its page header

FEW = 1 << 20  # bytes left on a disk on which a failed write is taken for want of space


def broken_pages(path: str) -> list[str]:
    """What is wrong with the pages of the LMDB file ``path``, found without LMDB, which aborts the process on some."""
    try:
        problems: list[str] = verify(path, subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    return problems


def is_lmdb(path: str) -> bool:
    """Whether ``path`` is a file, no link, that begins as LMDB's files do.  Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and int.from_bytes(os.pread(fd, 4, _MAGIC_AT), sys.byteorder) == _MAGIC
    finally:
        os.close(fd)


def _refuse_cut(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged where the end of the file is missing: the kernel would end a process that reads it (SIGBUS)."""
    size, needed = os.stat(path).st_size, (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if size >= needed:
        return
    if broken_pages(path):  # the last ones may be free ones that were never written
        raise Damaged(f"{path} is cut short: {size} bytes of {needed}; put it back from a backup")


def refuse_foreign(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged unless ``env``, LMDB's environment of the file ``path``, is new, or has a schema that can be read (READ)
    and is all there."""
    _refuse_cut(env, path)
    with env.begin() as txn:
        if txn.stat()["entries"] == 0:
            return
        try:
            meta = env.open_db(b"meta", txn, create=False)
            found = txn.get(b"schema", db=meta)
        except (lmdb.NotFoundError, lmdb.IncompatibleError):
            found = None
    if found is None:
        raise Damaged(f"{path} is an LMDB file, but not of snapfs: move it away, and put back the records from a backup")
    if found in {str(version).encode() for version in READ}:
        return
    version = found.decode(errors="replace")
    if found.isdigit() and int(found) > SCHEMA:
        raise Damaged(
            f"the records in {path} were written by a newer snapfs (schema {version}; this one reads {SCHEMA}): use that one"
        )
    raise Damaged(f'the records in {path} have the schema "{version}", which no snapfs writes; this one reads {SCHEMA}')


def open_error(path: str, error: lmdb.Error) -> Damaged | Unavailable:
    """The error, with a sentence, that says why LMDB could not open the records in ``path``."""
    if isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError)):
        return Damaged(f"the records in {path} can't be read: {error}; put them back from a backup")
    return disk_error("open the records", path, error)


def disk_error(doing: str, path: str, error: lmdb.Error | OSError | SnapshotError) -> Unavailable:
    """The error, with a sentence, that says what LMDB or the operating system refused: ``doing`` is what was being done with
    the records in ``path``, as words that go on from "cannot "."""
    if isinstance(error, OSError):
        return Unavailable.from_os(doing, error)
    if isinstance(error, SnapshotError):
        return Unavailable(f"cannot {doing}: {error}", getattr(error, "errno", None))
    if isinstance(error, lmdb.PanicError):
        return Unavailable(f"cannot {doing}: the disk failed while they were written; the next change tries again", errno.EIO)
    code = getattr(error, "code", 0)  # LMDB's own codes are negative, the system's positive; py-lmdb's own errors have none
    if code == errno.EIO:  # also LMDB's word for a short write, which is how a full disk begins
        space = os.statvfs(os.path.dirname(path))
        if space.f_bavail * space.f_frsize < FEW:
            return Unavailable.from_os(doing, OSError(errno.ENOSPC, "", path))
    return Unavailable(f"cannot {doing}: {error}", code if code > 0 else None)
