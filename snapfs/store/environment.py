"""One LMDB environment that can be made larger, and opened anew, while others read.

**Reading** takes an LMDB read transaction of its own for each call: about a microsecond, no lock, no thread, one
consistent state.  The transaction ends with its block and frees its place in LMDB's table of readers, also where an object
still refers to the ``Reader`` (an error that a caller keeps does, by its traceback).

**Forking** is fine as long as the child leaves all of this alone: LMDB keeps its locks by process.  So each call is refused
in the child, and the environment and the transactions that it inherited are neither closed nor ended, since both would undo
the parent's.  The child must leave by exec or os._exit: unwinding trio in a child breaks the parent's loop.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, NoReturn

import lmdb

from snapfs.errors import FULL, Closed, Damaged, Forked, SnapshotError, Unavailable
from snapfs.kernel import forks
from snapfs.store import indexes
from snapfs.store.locktable import new_table, open_environment
from snapfs.store.reading import Reader
from snapfs.store.schema import Tables
from snapfs.store.soundness import disk_error, open_error, refuse_foreign
from snapfs.store.space import RESERVE, Space, make_file, refuse_without_address_space

log = logging.getLogger(__name__)

READERS = 1024  # transactions that may read at once, in all processes: 64 bytes of the lock table each
PATIENCE = 2.0  # seconds that one more reader waits for a place

_IF_IT_STAYS_SO = (
    ", and where the disk stays so (dmesg says what it has): end the daemon, check that file system and mount it anew, and "
    "start the daemon again"
)

_NONSENSE = (lmdb.Error, UnicodeDecodeError, OverflowError)  # what reading raises where the disk has mangled pages of the file


class _Ended:
    """Stands in for the transaction of a reader whose block has ended."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("the records were read after the block that reads them had ended")


_ended: Any = _Ended()


class _Reading(Reader):
    """A reader with a transaction of its own, for one ``with`` block.

    The transaction's place in LMDB's table of readers becomes free only when no object refers to the transaction any more, so
    that no reference may be left behind in the frames of an error's traceback.
    """

    def __init__(self, environment: Environment, *, long: bool) -> None:
        super().__init__(environment.tables)
        self._environment = environment
        self._long = long

    def __enter__(self) -> Reader:
        environment = self._environment
        if environment.refusal is not None:
            raise environment.refusal()
        with environment._guard:
            if environment.reopen_error is not None:
                number = getattr(environment.reopen_error, "errno", None)
                to_do = f"; the next change tries again{_IF_IT_STAYS_SO * (number == errno.EIO)}"
                raise Unavailable(f"cannot read the records: {environment.reopen_error}{to_do}", number)
            while self._long and environment.is_changing:  # or long readers, one after the other, could keep the writer waiting
                environment._idle.wait()
            environment._readers += 1
        try:
            try:
                self._txn = environment.env.begin()
            except (lmdb.ReadersFullError, lmdb.PanicError):
                self._txn = environment._begin_when_possible()
            self._tables = environment.tables
        except lmdb.Error as error:
            environment._reader_ended()
            raise disk_error("read the records", environment.path, error) from error
        except BaseException:
            environment._reader_ended()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        txn, self._txn = self._txn, _ended
        if self._environment.refusal is Forked:
            return  # the transaction is the parent's, and py-lmdb leaves it alone as long as it is not ended here
        try:
            txn.abort()
        finally:
            self._environment._reader_ended()
        if isinstance(error, _NONSENSE):
            raise Damaged(
                f"the records in {self._environment.path} can't be read: {error}; put them back from a backup"
            ) from error


class Environment:
    """One LMDB environment, which many threads and processes read, and to which one thread writes, the writer.

    ``env`` is py-lmdb's object, ``tables`` are the tables in it, ``space`` are the file's blocks on the disk.

    Raises Unavailable where the file can't be opened or another process has it open, Damaged where it is no file of snapfs or
    has a newer schema: it is not touched then.  A file that is missing or empty becomes a new one.
    """

    def __init__(self, path: str, map_size: int, *, sync: bool) -> None:
        self.path = path
        self.sync = sync
        self.refusal: type[Closed] | None = None
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        self.reopen_error: Unavailable | Damaged | None = None
        """Why the environment, closed since the disk failed, could not be opened again; None as long as it is open."""
        self.is_changing = False
        """Whether the writer makes the map larger, or opens the environment again, or waits for the readers in order to."""
        self._guard = threading.Lock()  # of what follows: a map can't change its size while a transaction is open
        self._idle = threading.Condition(self._guard)
        self._readers = 0
        self._openings = 0
        try:
            self._open(map_size)
        except lmdb.Error as error:
            raise open_error(path, error) from error
        except OSError as error:
            raise disk_error("open the records", path, error) from error
        forks.disown_in_children(self)

    def _open(self, map_size: int) -> None:
        path = self.path
        with ExitStack() as undoing:
            if not os.path.lexists(path):
                undoing.callback(_remove, path)  # a database that was left half made could not be read the next time
            make_file(path)
            self.space = Space(path)
            undoing.callback(self.space.close)
            map_size = max(map_size, self.space.allocated - RESERVE)  # LMDB makes that as much as is in use, if that is more
            self._table = new_table(path)
            undoing.callback(os.close, self._table)
            self.env = self._open_lmdb(map_size)
            undoing.callback(self.env.close)
            refuse_foreign(self.env, path)  # before anything is written
            self._page_size: int = self.env.stat()["psize"]
            self.space.size = self._map_size()
            self._rewrite_meta_pages()
            while True:
                try:
                    with self.env.begin(write=True) as txn:
                        older = txn.stat()["entries"] and not indexes.has_checkpoints(txn)
                        self.tables = Tables(self.env, txn)
                        if older:
                            indexes.add_checkpoints(txn, self.tables)
                    break
                except lmdb.MapFullError:
                    self.grow()
            self.refill_reserve()  # not before the file is known to be ours
            undoing.pop_all()

    def _rewrite_meta_pages(self) -> None:
        """Have the disk hold the meta pages as the kernel has them in memory: the last process may have ended while a disk that
        failed left it in doubt whether they were written."""
        try:
            if self.env.info()["last_txnid"]:
                self.rewrite_pages(0, 1)
        except OSError as error:
            if error.errno not in FULL:  # btrfs at its quota refuses even this, and writes nothing in place anyway
                raise

    def _open_lmdb(self, map_size: int, *, readonly: bool = False) -> lmdb.Environment:
        env = open_environment(
            self.path,
            self._table,
            readonly=readonly,
            sync=self.sync,
            map_size=map_size,
            mode=0o600,
            max_dbs=16,
            max_spare_txns=1,
            max_readers=READERS,
        )
        try:
            _keep_from_children(self.path)
        except BaseException:
            env.close()
            raise
        return env

    def _map_size(self) -> int:
        """The size of the map as LMDB has it, while no transaction is open."""
        size: int = self.env.info()["map_size"]
        return size

    def close(self) -> None:
        """Close the environment; twice is fine.  The writer must have ended."""
        if self.refusal is None:
            self.refusal = Closed
            self.env.close()
            os.close(self._table)
            self.space.close()

    def disown_in_child(self) -> None:
        """In a forked process: refuse every call from now on, and let go of the file, which the parent has locked."""
        if self.refusal is None:
            self.refusal = Forked
            self.space.close()

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """A context manager: one consistent state, for a block that must be short and must not await anything.

        In a worker thread, outside of any other such block, the block may be ``long``: it begins when the writer is not just
        waiting for all readers to end.  Raises Closed, Forked, and Unavailable where the disk fails or READERS others read.
        """
        return _Reading(self, long=long)

    def _begin_when_possible(self) -> lmdb.Transaction[bytes]:
        """A read transaction, although all places were taken: by processes that are dead, or by readers that end soon."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.env.reader_check()
            try:
                return self.env.begin()
            except lmdb.PanicError:
                self._wait_for_opening()
                return self.env.begin()
            except lmdb.ReadersFullError:
                if time.monotonic() > deadline:
                    busy = f"cannot read the records in {self.path}: more than {READERS} others are reading them"
                    raise Unavailable(busy, errno.EAGAIN) from None
            time.sleep(0.001)

    def _reader_ended(self) -> None:
        with self._guard:
            self._readers -= 1
            if self.is_changing and not self._readers:
                self._idle.notify_all()

    def _wait_for_opening(self) -> None:
        """Return when the writer, whose disk has just failed, has opened the environment again."""
        with self._idle:
            if self._readers > 1:  # this thread may be one of them, and the writer waits for all to end
                raise Unavailable(f"the disk has just failed under {self.path}: try again", errno.EAGAIN)
            seen = self._openings
            self._readers -= 1
            self._idle.notify_all()
            self._idle.wait_for(lambda: self._openings != seen or self.reopen_error is not None, PATIENCE)
            self._readers += 1

    # -- a disk that fails

    def is_panicking(self) -> bool:
        """Whether LMDB refuses everything, since it doesn't know what the disk has taken."""
        try:
            self.env.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            pass
        return False

    def rewrite_pages(self, *pages: int) -> None:
        """Write these pages of the file, by their numbers, as the kernel has them in memory, so that the disk has the same.

        Uses a fresh descriptor: an old one would report errors of the past.  Raises OSError.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for page in pages:
                os.pwrite(fd, os.pread(fd, self._page_size, page * self._page_size), page * self._page_size)
            if self.sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def reopen(self, *, writable: bool = False) -> None:
        """Wait until all readers have ended, and open the environment again.  Where the file system has become read-only, open
        it for reading alone, unless it must be ``writable``.  Raises Unavailable, or Damaged."""
        with self._idle:
            self.is_changing = True
            try:
                while self._readers:
                    self._idle.wait()
                self.env.close()
                try:
                    self._open_anew(writable)
                    self.reopen_error = None
                except (lmdb.Error, OSError, SnapshotError) as error:
                    self.env.close()
                    self.reopen_error = (
                        error if isinstance(error, Damaged) else disk_error("open the records anew", self.path, error)
                    )
                    raise self.reopen_error from error
            finally:
                self._openings += 1
                self.is_changing = False
                self._idle.notify_all()

    def _open_anew(self, writable: bool) -> None:
        try:
            self.env = self._open_lmdb(self.space.size)
        except lmdb.Error as error:
            if writable or getattr(error, "code", 0) != errno.EROFS:
                raise
            self.env = self._open_lmdb(self.space.size, readonly=True)
        refuse_foreign(self.env, self.path)
        self.tables = Tables(self.env)

    # -- room for the records

    def refill_reserve(self) -> None:
        """Make the reserve whole, as far as the disk has room for it."""
        try:
            self.space.refill_reserve()
        except OSError as error:  # the part of it that is there may be enough
            log.debug("no room for the whole reserve: %s", error)

    def grow(self) -> None:
        """Make the map larger, by a step; raises OSError where the disk, or the address space, has no room for that."""
        self.resize(self.space.extend())

    def resize(self, size: int) -> None:
        """Wait until no transaction is open, and give the map ``size`` bytes, or as many as are in use if that is more."""
        if self.reopen_error is not None:
            self.space.size = size  # the map gets this size when the environment is opened
            return
        refuse_without_address_space(size - self._map_size())
        with self._idle:
            self.is_changing = True
            try:
                while self._readers:
                    self._idle.wait()
                self.env.set_mapsize(size)
                self.space.size = self._map_size()
            finally:
                self.is_changing = False
                self._idle.notify_all()


def _keep_from_children(path: str) -> None:
    """Set close-on-exec on all descriptors that LMDB has of the file: it forgets to on one of them."""
    mine = os.stat(path)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), mine):
                os.set_inheritable(fd, False)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
