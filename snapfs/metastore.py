"""One LMDB environment with the records (``snapfs/records.py``), durable when a call returns.

**Reading** takes an LMDB read transaction of its own for each call: about a microsecond, no lock, no thread, one
consistent state.  It ends with its block and lets go of its place in LMDB's table of readers, whoever still holds the
``Reader`` (an error that somebody keeps does, by its traceback).

**Writing** goes through one writer (``serve``): it takes all that waits, runs each operation in a nested transaction of
its own, and makes the batch durable with one sync (group commit).  An operation that fails undoes itself and fails
alone; if the sync fails, all of the batch do.  Where the map is full it is made larger in between, while nobody reads, and
the batch is run anew (``snapfs/reserve.py``).

**Failing disks.**  Where the disk refuses LMDB's meta page, the last step of a batch, nobody knows whether the batch is on the
disk, and LMDB refuses everything from then on.  So the environment is opened anew, for reading at once.  The meta page is
written again as the kernel has it, and not before the disk has taken that is anything else written: what the records then
say is what happened, and the batch is finished or undone accordingly.  Until then nothing can be written.

**Forking** is fine as long as the child leaves all of this alone: LMDB keeps its locks by process.  So each call is refused
there, and what the child inherited is neither closed nor ended, since both would undo the parent's.  It must leave by exec
or os._exit: unwinding trio in a child breaks the parent's loop, whatever it runs.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from queue import SimpleQueue
from typing import Any, Generic, NoReturn, TypeVar

import lmdb
import trio
from lmdb.verify import VerifyError, verify

from snapfs.errors import Closed, Damaged, Forked, SnapshotError, Unavailable
from snapfs.locktable import new_table, open_environment
from snapfs.model import Change
from snapfs.records import SCHEMA, Reader, Tables, Writer
from snapfs.reserve import FULL, RESERVE, Space, make_file, refuse_without_address_space

log = logging.getLogger(__name__)

T = TypeVar("T")

MAP_SIZE = 1 << 20  # to begin with: it grows with the records
BATCH = 128  # operations that one sync serves at most, so that nobody waits for an endless batch

READERS = 1024  # that may read at once, in all processes: 64 bytes of the lock file each, and far more than there are threads
PATIENCE = 2.0  # seconds that one more than these waits for a place

FEW = 1 << 20  # bytes left on a disk on which a failed write is taken for want of space

_NONSENSE = (lmdb.Error, UnicodeDecodeError, OverflowError)  # what reading gives where pages of the file are not what they were


class _Ended:
    """The transaction of a reader whose block has ended."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("the records were read after the block that reads them had ended")


_ended: Any = _Ended()


class _Reading(Reader):
    """A reader with a transaction of its own, for one ``with`` block.

    Its place in LMDB's table of readers is free only when no object refers to the transaction any more, so that none may be
    left behind in the frames of an error's traceback.
    """

    def __init__(self, store: MetaStore, *, long: bool) -> None:
        super().__init__(store.tables)
        self._store = store
        self._long = long

    def __enter__(self) -> Reader:
        store = self._store
        if store.refusal is not None:
            raise store.refusal()
        with store._guard:
            if store._shut is not None:
                raise Unavailable(
                    f"cannot read the records: {store._shut}; the next change tries again", getattr(store._shut, "errno", None)
                )
            while self._long and store.is_growing:  # or one after the other might keep the writer waiting for ever
                store._idle.wait()
            store._readers += 1
        try:
            try:
                self._txn = store._env.begin()
            except (lmdb.ReadersFullError, lmdb.PanicError):
                self._txn = store._begin_when_possible()
            self._tables = store.tables
        except lmdb.Error as error:
            store._has_read()
            raise _refused("read the records", store.path, error) from error
        except BaseException:
            store._has_read()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        txn, self._txn = self._txn, _ended
        if self._store.refusal is Forked:
            return  # it is the parent's, and py-lmdb leaves it alone as long as nobody ends it here
        try:
            txn.abort()
        finally:
            self._store._has_read()
        if isinstance(error, _NONSENSE):
            raise Damaged(f"the records in {self._store.path} can't be read: {error}; put them back from a backup") from error


class MetaStore:
    """One LMDB environment with one writer.

    Open it (``MetaStore(path)``: the file), run ``serve`` in a nursery, ``close`` it.
    Without ``sync`` nothing is ever flushed: a power cut may take the whole store, a crash of the process takes nothing.
    Raises Unavailable where the file can't be opened or another process has it, Damaged where it is none of ours or of a
    newer schema: it is not touched then.  A file that is missing or empty becomes a new store.
    """

    def __init__(self, path: str, map_size: int = MAP_SIZE, *, sync: bool = True) -> None:
        self.path = path
        self.sync = sync
        self.listeners: list[Callable[[Change], None]] = []
        self.batches: Counter[int] = Counter()
        """How often so many operations were made durable with one sync."""
        self.refusal: type[Closed] | None = None
        """What every call raises: Closed after ``close``, Forked in a child of the process that opened it, else None."""
        self._guard = threading.Lock()  # of what follows: a map can't change its size while anybody uses it
        self._idle = threading.Condition(self._guard)
        self._readers = 0
        self._writing = False
        self.is_growing = False
        self._openings = 0
        self._shut: Unavailable | Damaged | None = None  # why there is no environment
        self._doubt: _Doubt | None = None
        self._late: list[Change] = []
        try:
            self._open(map_size)
        except lmdb.Error as error:
            raise unreadable(path, error) from error
        except OSError as error:
            raise _refused("open the records", path, error) from error
        self._queue: SimpleQueue[_Request[Any] | None] | None = None
        _open_stores.add(self)

    def _open(self, map_size: int) -> None:
        path = self.path
        with ExitStack() as undoing:
            if not os.path.lexists(path):
                undoing.callback(_remove, path)  # a database that was cut short could not be read the next time
            else:
                map_size = max(map_size, os.path.getsize(path) - RESERVE)
            make_file(path)
            self._space = Space(path)
            undoing.callback(self._space.close)
            self._table = new_table(path)
            undoing.callback(os.close, self._table)
            self._env = self._environment(map_size)
            undoing.callback(self._env.close)
            refuse_foreign(self._env, path)  # before anything is written
            self._page_size: int = self._env.stat()["psize"]
            self._space.size = self._mapped()
            self._write_heads_anew()
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        self.tables = Tables(self._env, txn)
                    break
                except lmdb.MapFullError:
                    self._grow()
            self._refill()  # not before the file is known to be ours
            undoing.pop_all()

    def _write_heads_anew(self) -> None:
        """Have the disk hold what the records are by the kernel's word: the last process may have ended in doubt."""
        try:
            if self._env.info()["last_txnid"]:
                _write_anew(self.path, (0, 1), self._page_size, sync=self.sync)
        except OSError as error:
            if error.errno not in FULL:  # btrfs at its quota refuses even this, and writes nothing in place anyway
                raise

    def _environment(self, map_size: int, *, readonly: bool = False) -> lmdb.Environment:
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

    @property
    def map_size(self) -> int:
        """Bytes that the records may take before the map has to grow."""
        return self._space.size

    def _mapped(self) -> int:
        """The same as LMDB has it, while no transaction is open."""
        size: int = self._env.info()["map_size"]
        return size

    def close(self) -> None:
        """Close the environment; twice is fine.  The writer must have ended (``serve``)."""
        if self.refusal is None:
            self.refusal = Closed
            self._env.close()
            os.close(self._table)
            self._space.close()

    def reading(self, *, long: bool = False) -> AbstractContextManager[Reader]:
        """One consistent state, for a block that must be short and must not await anything.

        In a worker thread, outside of any other such block, it may be ``long``.
        """
        return _Reading(self, long=long)

    def _begin_when_possible(self) -> lmdb.Transaction[bytes]:
        """A read transaction although all places were taken, by dead processes, or by others who read and are soon done."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._env.reader_check()
            try:
                return self._env.begin()
            except lmdb.PanicError:
                self._wait_for_opening()
                return self._env.begin()
            except lmdb.ReadersFullError:
                if time.monotonic() > deadline:
                    busy = f"cannot read the records in {self.path}: more than {READERS} others are reading them"
                    raise Unavailable(busy, errno.EAGAIN) from None
            time.sleep(0.001)

    def _has_read(self) -> None:
        with self._guard:
            self._readers -= 1
            if self.is_growing and not self._readers:
                self._idle.notify_all()

    def _wait_for_opening(self) -> None:
        """Return when the writer, which has just met a disk that fails, has opened the environment anew."""
        with self._idle:
            if self._readers > 1:  # this thread may be one of them, and the writer waits for all to end
                raise Unavailable(f"the disk has just failed under {self.path}: try again", errno.EAGAIN)
            seen = self._openings
            self._readers -= 1
            self._idle.notify_all()
            self._idle.wait_for(lambda: self._openings != seen or self._shut is not None, PATIENCE)
            self._readers += 1

    async def write(self, operation: Callable[[Writer], T], *, frees: bool = False) -> T:
        """Run ``operation`` in the writer's thread; returns its result when that is durable, or raises what it raised,
        having changed nothing.

        ``frees``: it leaves less than there was, so that it may use what is kept in reserve for a full disk.  An operation may
        be run several times, of which the last counts.

        Cancellation takes back what the writer has not begun; what it has begun is finished, so it is done or not done.
        Raises Unavailable where the disk refuses (ENOSPC …) and after ``close``.
        """
        queue = self._queue
        if queue is None or self.refusal is not None:
            raise (self.refusal or Closed)()
        request = _Request(operation, frees)
        queue.put(request)
        try:
            await request.done.wait()
        except trio.Cancelled:
            if request.claim():
                raise
            with trio.CancelScope(shield=True):
                await request.done.wait()
        return request.result()

    def write_now(self, operation: Callable[[Writer], T], *, frees: bool = False) -> T:
        """The same, blocking, for a process that serves nobody."""
        request = _Request(operation, frees)
        self._run(_Batch([request]))
        return request.result()

    def stop(self) -> None:
        """Let ``serve`` finish what waits and return; later writes are refused."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The writer: one batch after the other until ``stop``.  May be run again after that.

        It is one thread for all that time: who asks wakes it, and it wakes who asked, with no task in between.
        """
        queue: SimpleQueue[_Request[Any] | None] = SimpleQueue()
        ended = trio.Event()

        async def work() -> None:
            try:
                with trio.CancelScope(shield=True):  # a thread can't be stopped, and its outcome must be told
                    loop = trio.lowlevel.current_trio_token()
                    await trio.to_thread.run_sync(self._work, queue, loop, limiter=trio.CapacityLimiter(1))
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            self._queue = queue
            nursery.start_soon(work, name="snapfs writer's thread")
            task_status.started()
            try:
                await ended.wait()
            finally:
                self.stop()
        while not queue.empty():  # a bug has ended the writer, but nobody may wait for ever
            if (left := queue.get()) is not None:
                left.error = Closed()
                left.done.set()

    def _work(self, queue: SimpleQueue[_Request[Any] | None], loop: trio.lowlevel.TrioToken) -> None:
        """Take what waits and run it, until None comes; in the writer's thread."""
        stopping = False
        while not stopping and (first := queue.get()) is not None:
            requests = [first]
            while len(requests) < BATCH and not queue.empty():
                if (more := queue.get()) is None:
                    stopping = True
                    break
                requests.append(more)
            batch = _Batch([request for request in requests if request.claim()])
            if not batch.requests:
                continue
            with suppress(lmdb.Error):  # a backup that was killed: no page that it was reading would ever be used again
                self._env.reader_check()
            try:
                self._run(batch)
            except BaseException as error:
                for request in batch.requests:
                    request.error = request.error or error
                raise
            finally:
                late, self._late = self._late, []
                loop.run_sync_soon(self._tell, late, batch)
        if self._doubt is not None:  # the next start would find out, too, but has nothing to undo with
            with suppress(lmdb.Error, OSError, SnapshotError):
                loop.run_sync_soon(self._tell, self._settle(), None)

    def _tell(self, late: list[Change], batch: _Batch | None) -> None:
        """Let the listeners, and then who asked, know what is done; on the loop."""
        self._announce(late)
        if batch is not None:
            self.batches[len(batch.requests)] += 1
            for request in batch.requests:
                self._announce(request.changes)
                request.done.set()

    def _announce(self, changes: list[Change]) -> None:
        for change in changes:
            for listener in self.listeners:
                listener(change)

    def _run(self, batch: _Batch) -> None:
        """Run a batch in the writer's thread; leaves each request with a result or an error."""
        self._run_once(batch)
        refused = [request for request in batch.requests if request.frees and getattr(request.error, "errno", None) in FULL]
        if not refused or self._doubt is not None:
            return
        try:
            given = self._space.give_up()
        except OSError as error:
            log.warning("cannot give up the reserve: %s", error)
            return
        for request in refused if given else ():
            self._run_once(_Batch([request]))

    def _run_once(self, batch: _Batch) -> None:
        if self._doubt is not None:
            try:
                self._late += self._settle()
            except (lmdb.Error, OSError, SnapshotError) as error:
                for request in batch.requests:
                    request.error = _refused("write the records", self.path, error)
                return
        if self._space.is_short:
            self._refill()
        while not self._attempt(batch):
            try:
                self._grow()
            except (lmdb.Error, OSError) as error:
                if len(batch.requests) > 1:  # some may need no room
                    for request in batch.requests:
                        self._run_once(_Batch([request]))
                elif not (batch.requests[0].frees and self._attempt_with_reserve(batch)):
                    batch.requests[0].error = _refused("make room for the records", self.path, error)
                return

    def _attempt(self, batch: _Batch) -> bool:
        """Run a batch once; False where the map is too small for it: nothing has changed then."""
        ran: list[tuple[_Request[Any], Writer]] = []
        batch.directories.clear()
        alone = len(batch.requests) == 1
        number = 0
        with self._guard:
            self._writing = True
        try:
            with suppress(_NothingDone), self._env.begin(write=True) as txn:
                number = txn.id()
                for request in batch.requests:
                    request.error = None
                    writer = self._run_one(txn, batch, request, alone)
                    if writer is not None:
                        ran.append((request, writer))
                if not ran:
                    raise _NothingDone
                for fd in batch.directories if self.sync else ():
                    os.fsync(fd)
        except (lmdb.Error, OSError) as error:
            if isinstance(error, lmdb.MapFullError):
                _undo_all(ran)
                return False
            refusal = _refused("write the records", self.path, error)
            log.error("%s", refusal)
            for request in batch.requests:
                if request.error is None:
                    request.error = refusal
            if self._is_panicking() or (isinstance(error, lmdb.Error) and getattr(error, "code", 0) == errno.EIO):
                self._doubt = _Doubt(number, ran)
                self._settle_soon()
            else:
                _undo_all(ran)
            return True
        finally:
            self._writing = False
        _finish(ran)
        return True

    # -- a disk that fails

    def _is_panicking(self) -> bool:
        """Whether LMDB has given up, since it doesn't know what is on the disk."""
        try:
            self._env.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            pass
        return False

    def _settle_soon(self) -> None:
        """Settle what is in doubt, now if the disk allows it; else those who asked are told that it is in doubt.

        Also where LMDB has not given up: each of its descriptors would tell of this error once, and make a later batch fail.
        """
        doubt = self._doubt
        assert doubt is not None
        try:
            self._settle()
        except (lmdb.Error, OSError, SnapshotError) as error:
            log.error("%s", _refused("find out what the disk holds of the records", self.path, error))
            for request, _ in doubt.ran:
                if isinstance(request.error, Unavailable):
                    said = f"{request.error}; whether it was done will be known when the disk takes writes again"
                    request.error = Unavailable(said, request.error.errno)

    def _settle(self) -> list[Change]:
        """Find out whether the batch in doubt is on the disk, and finish or undo it; the changes made.

        Raises lmdb.Error, OSError, Unavailable or Damaged where the disk still fails: it is in doubt then as it was, and what
        could be read before can be read, if the environment can be opened at all.
        """
        doubt = self._doubt
        assert doubt is not None
        if self._shut is not None or self._is_panicking():
            self._reopen()  # the disk may take its time, and nobody who reads waits for it
        _write_anew(self.path, (doubt.number & 1,), self._page_size, sync=self.sync)
        self._reopen(writable=True)
        self._doubt = None
        if self._env.info()["last_txnid"] < doubt.number:
            _undo_all(doubt.ran)
            return []
        for request, _ in doubt.ran:
            request.error = None
        _finish(doubt.ran)
        return [change for request, _ in doubt.ran for change in request.changes]

    def _reopen(self, *, writable: bool = False) -> None:
        """Open the environment anew, while nobody reads; for reading alone on a file system that is read-only by now."""
        with self._idle:
            self.is_growing = True
            try:
                while self._readers:
                    self._idle.wait()
                self._env.close()
                try:
                    self._open_anew(writable)
                    self._shut = None
                except (lmdb.Error, OSError, SnapshotError) as error:
                    self._env.close()
                    self._shut = error if isinstance(error, Damaged) else _refused("open the records anew", self.path, error)
                    raise self._shut from error
            finally:
                self._openings += 1
                self.is_growing = False
                self._idle.notify_all()

    def _open_anew(self, writable: bool) -> None:
        try:
            self._env = self._environment(self._space.size)
        except lmdb.Error as error:
            if writable or getattr(error, "code", 0) != errno.EROFS:
                raise
            self._env = self._environment(self._space.size, readonly=True)
        refuse_foreign(self._env, self.path)
        self.tables = Tables(self._env)

    def _run_one(self, txn: lmdb.Transaction[bytes], batch: _Batch, request: _Request[Any], alone: bool) -> Writer | None:
        """Run one operation: what it wrote, None if it failed.  Raises MapFullError.

        One that is ``alone`` has the whole transaction; of several each has a nested one, for some thirty microseconds more.
        """
        writer = None
        try:
            if alone:
                writer = Writer(self.tables, txn, batch.directories)
                request.value = request.operation(writer)
                return writer
            with self._env.begin(write=True, parent=txn) as nested:
                writer = Writer(self.tables, nested, batch.directories)
                request.value = request.operation(writer)
            return writer
        except SnapshotError as error:
            request.error = error
        except (lmdb.Error, OSError) as error:
            request.error = _refused("change the store", self.path, error)
            if isinstance(error, lmdb.MapFullError):
                if writer is not None:
                    _undo(writer)
                raise
        except Exception as error:  # a bug: it must reach the caller, not end the writer
            request.error = error
        if writer is not None:
            _undo(writer)
        return None

    # -- room for the records

    def _refill(self) -> None:
        try:
            self._space.refill()
        except OSError as error:  # what is there of it may do
            log.debug("no room for the whole reserve: %s", error)

    def _grow(self) -> None:
        """Make the map larger; raises OSError where the disk, or the address space, has no room for that."""
        self._resize(self._space.more())

    def _resize(self, size: int) -> None:
        """Give the map ``size`` bytes, or what is in use if that is more, while no transaction is open."""
        if self._shut is not None:
            self._space.size = size  # which it gets when it is opened
            return
        refuse_without_address_space(size - self._mapped())
        with self._idle:
            self.is_growing = True
            try:
                while self._readers:
                    self._idle.wait()
                self._env.set_mapsize(size)
                self._space.size = self._mapped()
            finally:
                self.is_growing = False
                self._idle.notify_all()

    def _attempt_with_reserve(self, batch: _Batch) -> bool:
        """Run a batch that frees something, with all that is allocated; False where that is too small too."""
        before = self._space.size
        try:
            self._resize(self._space.held)
        except OSError:
            return False
        try:
            return self._attempt(batch)
        finally:
            self._resize(before)
            self._space.is_short = True


_open_stores: weakref.WeakSet[MetaStore] = weakref.WeakSet()


def _refuse_in_child() -> None:
    for store in _open_stores:
        if store.refusal is None:
            store.refusal = Forked
            store._space.close()  # or the child would hold the file when its parent no longer does


os.register_at_fork(after_in_child=_refuse_in_child)


def _keep_from_children(path: str) -> None:
    """Close on exec what LMDB has open of the file: it forgets that of one descriptor."""
    mine = os.stat(path)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), mine):
                os.set_inheritable(fd, False)


def broken_pages(path: str) -> list[str]:
    """What is wrong with the pages of the LMDB file ``path``, found without LMDB, which aborts the process on some."""
    try:
        problems: list[str] = verify(path, subdir=False)  # type: ignore[no-untyped-call]
    except VerifyError as error:
        problems = [str(error)]
    return problems


def _refuse_cut(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged where the end of the file is missing, on which LMDB would die of SIGBUS."""
    size, needed = os.stat(path).st_size, (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if size >= needed:
        return
    if broken_pages(path):  # the last ones may be free ones that were never written
        raise Damaged(f"{path} is cut short: {size} bytes of {needed}; put it back from a backup")


def refuse_foreign(env: lmdb.Environment, path: str) -> None:
    """Raise Damaged unless ``env`` is new, or of this schema, and all there."""
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
    if found == str(SCHEMA).encode():
        return
    version = found.decode(errors="replace")
    if found.isdigit() and int(found) > SCHEMA:
        raise Damaged(
            f"the records in {path} were written by a newer snapfs (schema {version}; this one reads {SCHEMA}): use that one"
        )
    raise Damaged(f'the records in {path} have the schema "{version}", which no snapfs writes; this one reads {SCHEMA}')


class _NothingDone(Exception):
    """All operations of a batch have failed: its transaction is to be dropped."""


class _Request(Generic[T]):
    """One operation on its way through the writer."""

    def __init__(self, operation: Callable[[Writer], T], frees: bool) -> None:
        self.operation = operation
        self.frees = frees
        self.done = trio.Event()
        self.value: T
        self.error: BaseException | None = None
        self.changes: list[Change] = []
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Whether the caller is the first to ask: the writer, which then does it, or who wants it done no more."""
        return self._claimed.acquire(blocking=False)

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class _Batch:
    """What one sync makes durable."""

    def __init__(self, requests: list[_Request[Any]]) -> None:
        self.requests = requests
        self.directories: set[int] = set()


class _Doubt:
    """The batch of transaction ``number``, with what its operations wrote, of which nobody knows whether it is on the disk."""

    def __init__(self, number: int, ran: list[tuple[_Request[Any], Writer]]) -> None:
        self.number = number
        self.ran = ran


def _finish(ran: list[tuple[_Request[Any], Writer]]) -> None:
    """What is to be done after operations that are durable now."""
    for request, writer in ran:
        request.changes = writer.changes
        for act in writer.afters:
            try:
                act()
            except OSError as error:
                log.warning("after a change was made: %s", error)


def _undo_all(ran: list[tuple[_Request[Any], Writer]]) -> None:
    for _, writer in reversed(ran):
        _undo(writer)


def _write_anew(path: str, pages: Iterable[int], size: int, *, sync: bool) -> None:
    """Write pages of a file as the kernel has them in memory, so that the disk has the same.  Raises OSError.

    The descriptor is a fresh one: an old one would tell of errors of the past.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for page in pages:
            os.pwrite(fd, os.pread(fd, size, page * size), page * size)
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _undo(writer: Writer) -> None:
    for undo in reversed(writer.undos):
        try:
            undo()
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)


def unreadable(path: str, error: lmdb.Error) -> Damaged | Unavailable:
    """Why the records can't be opened, as a sentence."""
    if isinstance(error, (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError)):
        return Damaged(f"the records in {path} can't be read: {error}; put them back from a backup")
    return _refused("open the records", path, error)


def _refused(doing: str, path: str, error: lmdb.Error | OSError | SnapshotError) -> Unavailable:
    """The refusal of LMDB or of the operating system, while ``doing`` something with the records in ``path``, as a sentence."""
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
