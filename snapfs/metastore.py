"""The records in LMDB: what a snapshot is, durable when a call returns.

Tables (keys are compared as bytes; ids are 8 bytes, big-endian, so byte order is numeric order):

    meta         "schema" -> version;  "last_id" -> the highest id ever given out
    snapshots    id -> Record
    names        key or name, UTF-8 -> id         in this order Walk lists
    active, view, committed      id -> name       for listing one kind in id order: the last id is a place to go on from
    children     parent id, kind's first letter, id -> name
    uncounted    id -> nothing                    committed, and its usage not yet known
    unflushed    id -> boot id                    committed, and its data not yet known to be on disk (``snapfs/flushing.py``)

**Reading** takes an LMDB read transaction of its own for each call: about a microsecond, no lock, no thread, one
consistent state.  **Writing** goes through one writer (``serve``): it takes all that waits, runs each operation in a
nested transaction of its own, and makes the batch durable with one sync (group commit).  An operation that fails undoes
itself and fails alone; if the sync fails, all of the batch do.  Where the map is full it is made larger in between, and the
batch is run anew (``snapfs/reserve.py``).
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Generic, TypeVar

import lmdb
import msgspec
import trio

from snapfs.errors import Closed, Damaged, SnapshotError, Unavailable
from snapfs.model import Change, Info, Kind, Usage
from snapfs.reserve import RESERVE, Space, make_file, refuse_without_address_space

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
MAP_SIZE = 1 << 20  # to begin with: it grows with the records
BATCH = 128  # operations that one sync serves at most, so that nobody waits for an endless batch

FEW = 1 << 20  # bytes left on a disk on which a failed write is taken for want of space

_READERS = 64
_LOCK_FILE = 8192  # bytes of it that many readers take, and more

Undo = Callable[[], None]


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What the table ``snapshots`` holds, as MessagePack: an array in this order; new fields go to the end, with defaults.

    ``parent`` is the parent's id, 0 for none; ``usage`` is None except for committed snapshots that have been counted.
    """

    name: str
    kind: Kind
    parent: int
    created: int
    updated: int
    labels: dict[str, str]
    usage: Usage | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _number(key: bytes) -> int:
    return int.from_bytes(key, "big")


class Reader:
    """One consistent state of the store; valid inside ``MetaStore.reading`` or a write operation only."""

    def __init__(self, store: MetaStore, txn: lmdb.Transaction[bytes]) -> None:
        self._store = store
        self._txn = txn

    def id_of(self, name: str) -> int | None:
        """The id of the snapshot called ``name``."""
        try:
            found = self._txn.get(name.encode(), db=self._store.names)
        except (lmdb.BadValsizeError, UnicodeEncodeError):  # empty or too long or no UTF-8: no key can be that
            return None
        return _number(found) if found else None

    def record(self, number: int) -> Record | None:
        """The record of snapshot ``number``; raises Damaged where it can't be decoded."""
        found = self._txn.get(_key(number), db=self._store.snapshots)
        if found is None:
            return None
        try:
            return _decode(found)
        except msgspec.MsgspecError as error:
            raise Damaged(f"the record of snapshot {number} can't be read: {error}") from error

    def parent_of(self, record: Record) -> Record:
        """The record of the parent of ``record``, which must have one; raises Damaged where there is none."""
        parent = self.record(record.parent)
        if parent is None:
            raise Damaged(f'the parent of snapshot "{record.name}", number {record.parent}, has no record')
        return parent

    def info(self, number: int, record: Record) -> Info:
        """What Stat shows of ``record``."""
        return Info(
            name=record.name,
            kind=record.kind,
            id=number,
            parent=self.parent_of(record).name if record.parent else None,
            labels=record.labels,
            created=record.created,
            updated=record.updated,
        )

    def chain(self, record: Record) -> list[int]:
        """The ids of the parents of ``record``, the nearest first."""
        chain = []
        while record.parent:
            chain.append(record.parent)
            record = self.parent_of(record)
        return chain

    def lowers(self, number: int, record: Record) -> list[int]:
        """The ids of the layers that are only read where snapshot ``number`` is mounted, the nearest first: its own among them
        unless it is active, or a view, which shows its parents."""
        chain = self.chain(record)
        return chain if record.kind is Kind.ACTIVE or (record.kind is Kind.VIEW and chain) else [number, *chain]

    def listing(self, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """Id and name of all snapshots of ``kind`` with an id above ``after``, in id order."""
        with self._txn.cursor(db=self._store.kinds[kind]) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key, name in cursor:
                    yield _number(key), name.decode()

    def children(self, parent: int, kind: Kind, after: int = 0) -> Iterator[tuple[int, str]]:
        """The same for the children of snapshot ``parent``."""
        prefix = _key(parent) + kind[0].encode()
        with self._txn.cursor(db=self._store.child_table) as cursor:
            if cursor.set_range(prefix + _key(after + 1)):
                for key, name in cursor:
                    if not key.startswith(prefix):
                        return
                    yield _number(key[9:]), name.decode()

    def a_child(self, parent: int) -> tuple[Kind, str] | None:
        """Kind and name of one of the children of snapshot ``parent``, None where it has none."""
        return next(((kind, name) for kind in Kind for _, name in self.children(parent, kind)), None)

    def records(self, after: int = 0) -> Iterator[tuple[int, Record]]:
        """Id and record of all snapshots with an id above ``after``, in id order."""
        with self._txn.cursor(db=self._store.snapshots) as cursor:
            if cursor.set_range(_key(after + 1)):
                for key, value in cursor:
                    yield _number(key), _decode(value)

    def ids(self) -> set[int]:
        """The ids of all snapshots."""
        with self._txn.cursor(db=self._store.snapshots) as cursor:
            return {_number(key) for key in cursor.iternext(values=False)}

    def walk(self) -> Iterator[Info]:
        """All snapshots in the order of their keys' bytes."""
        with self._txn.cursor(db=self._store.names) as cursor:
            for _, key in cursor:
                record = self.record(_number(key))
                if record is None:
                    raise Damaged(f"snapshot {_number(key)} has a name but no record")
                yield self.info(_number(key), record)

    def uncounted(self) -> list[int]:
        """The ids of committed snapshots whose usage is not yet known."""
        with self._txn.cursor(db=self._store.uncounted_table) as cursor:
            return [_number(key) for key in cursor.iternext(values=False)]

    def unflushed(self) -> list[tuple[int, str]]:
        """The ids of committed snapshots whose data may be in memory only, each with the boot of the machine whose memory."""
        with self._txn.cursor(db=self._store.unflushed_table) as cursor:
            return [(_number(key), boot.decode()) for key, boot in cursor]

    def count(self, kind: Kind) -> int:
        """How many snapshots of ``kind`` there are."""
        entries: int = self._txn.stat(self._store.kinds[kind])["entries"]
        return entries

    def last_id(self) -> int:
        """The highest id ever given out."""
        return _number(self._txn.get(b"last_id", b"", db=self._store.meta))


class Writer(Reader):
    """What a write operation may do besides reading.  It runs in the writer's thread, one operation at a time."""

    def __init__(self, store: MetaStore, txn: lmdb.Transaction[bytes], batch: _Batch) -> None:
        super().__init__(store, txn)
        self._batch = batch
        self.undos: list[Undo] = []
        self.afters: list[Undo] = []
        self.changes: list[Change] = []

    def on_failure(self, undo: Undo) -> None:
        """Run ``undo`` if this operation, or the sync of its batch, fails after all."""
        self.undos.append(undo)

    def when_durable(self, act: Undo) -> None:
        """Run ``act`` in the writer's thread once the batch is on disk; what it raises is logged."""
        self.afters.append(act)

    def sync_directory(self, fd: int) -> None:
        """Flush the directory open as ``fd`` before the batch's records, once a batch: no record without its directory."""
        self._batch.directories.add(fd)

    def changed(self, before: Info | None, after: Info | None, *, counted: bool = False) -> None:
        """Tell the listeners, once it is durable."""
        self.changes.append(Change(before, after, counted))

    def next_id(self) -> int:
        """An id that was never given out; given back if the operation fails, since then nobody has seen it."""
        number = self.last_id() + 1
        self._txn.put(b"last_id", _key(number), db=self._store.meta)
        return number

    def put(self, number: int, record: Record) -> None:
        """Write ``record`` as snapshot ``number``, in place of what that was, with all indexes."""
        before = self.record(number)
        if before is not None:
            self._unindex(number, before, keep_name=before.name == record.name)
        store, txn, key, name = self._store, self._txn, _key(number), record.name.encode()
        txn.put(key, _encode(record), db=store.snapshots)
        txn.put(name, key, db=store.names)
        txn.put(key, name, db=store.kinds[record.kind])
        if record.parent:
            txn.put(_key(record.parent) + record.kind[0].encode() + key, name, db=store.child_table)
        if record.kind is Kind.COMMITTED and record.usage is None:
            txn.put(key, b"", db=store.uncounted_table)

    def mark_unflushed(self, number: int, boot: str) -> None:
        """Note that the data of snapshot ``number`` may be in the memory of this boot only."""
        self._txn.put(_key(number), boot.encode(), db=self._store.unflushed_table)

    def clear_unflushed(self, numbers: Iterable[int]) -> None:
        """Note that the data of these snapshots is on disk."""
        for number in numbers:
            self._txn.delete(_key(number), db=self._store.unflushed_table)

    def delete(self, number: int, record: Record) -> None:
        """Take snapshot ``number`` out, with all indexes."""
        self.clear_unflushed([number])
        self._unindex(number, record, keep_name=False)
        self._txn.delete(_key(number), db=self._store.snapshots)

    def _unindex(self, number: int, record: Record, keep_name: bool) -> None:
        store, txn, key = self._store, self._txn, _key(number)
        if not keep_name:
            txn.delete(record.name.encode(), db=store.names)
        txn.delete(key, db=store.kinds[record.kind])
        txn.delete(key, db=store.uncounted_table)
        if record.parent:
            txn.delete(_key(record.parent) + record.kind[0].encode() + key, db=store.child_table)


class MetaStore:
    """One LMDB environment with one writer.

    Open it (``MetaStore(path)``: the file, with ``path-lock`` beside it), run ``serve`` in a nursery, ``close`` it.
    Without ``sync`` nothing is ever flushed: a power cut may take the whole store, a crash of the process takes nothing.
    Raises Unavailable where the file can't be opened, Damaged where it is none of ours or of a newer schema.
    """

    def __init__(self, path: str, map_size: int = MAP_SIZE, *, sync: bool = True) -> None:
        self.path = path
        self.sync = sync
        self.listeners: list[Callable[[Change], None]] = []
        self.batches: Counter[int] = Counter()
        """How often so many operations were made durable with one sync."""
        self._guard = threading.Lock()  # of what follows: a map can't change its size while anybody uses it
        self._idle = threading.Condition(self._guard)
        self._readers = 0
        self._writing = False
        self.is_growing = False
        try:
            self._open(map_size)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
            raise Damaged(f"the records in {path} can't be read: {error}") from error
        except (lmdb.Error, OSError) as error:
            raise _refused("open the records", path, error) from error
        self._send: trio.MemorySendChannel[_Request[Any]] | None = None
        self._closed = False

    def _open(self, map_size: int) -> None:
        path = self.path
        with ExitStack() as undoing:
            if not os.path.lexists(path):
                undoing.callback(_remove_files, path)  # a database that was cut short could not be read the next time
            else:
                map_size = max(map_size, os.path.getsize(path) - RESERVE)
            make_file(path)
            make_file(f"{path}-lock", _LOCK_FILE)
            self._env = lmdb.open(
                path,
                subdir=False,
                sync=self.sync,
                map_size=map_size,
                mode=0o600,
                max_dbs=16,
                max_spare_txns=1,
                max_readers=_READERS,
            )
            undoing.callback(self._env.close)
            self._env.reader_check()
            self._space = Space(path, self.map_size)
            undoing.callback(self._space.close)
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        self._open_tables(txn)
                    break
                except lmdb.MapFullError:
                    self._grow()
            self._refill()  # not before the file is known to be ours
            undoing.pop_all()

    def _open_tables(self, txn: lmdb.Transaction[bytes]) -> None:
        self.meta = self._env.open_db(b"meta", txn)
        self.snapshots = self._env.open_db(b"snapshots", txn)
        self.names = self._env.open_db(b"names", txn)
        self.kinds = {kind: self._env.open_db(kind.value.encode(), txn) for kind in Kind}
        self.child_table = self._env.open_db(b"children", txn)
        self.uncounted_table = self._env.open_db(b"uncounted", txn)
        self.unflushed_table = self._env.open_db(b"unflushed", txn)
        found = txn.get(b"schema", db=self.meta)
        if found is None:
            txn.put(b"schema", str(SCHEMA).encode(), db=self.meta)
        elif found != str(SCHEMA).encode():
            version = found.decode(errors="replace")
            raise Damaged(f"the records in {self.path} have schema {version}; this snapfs reads schema {SCHEMA}")

    @property
    def map_size(self) -> int:
        """Bytes that the records may take before the map has to grow."""
        size: int = self._env.info()["map_size"]
        return size

    def close(self) -> None:
        """Close the environment; twice is fine.  The writer must have ended (``serve``)."""
        self._closed = True
        self._env.close()
        self._space.close()

    @contextmanager
    def reading(self, *, long: bool = False) -> Iterator[Reader]:
        """One consistent state, for a block that must be short and must not await anything.

        In a worker thread, outside of any other such block, it may be ``long``.
        """
        if self._closed:
            raise Closed()
        with self._guard:
            while long and self.is_growing:  # or one after the other might keep the writer waiting for ever
                self._idle.wait()
            self._readers += 1
        try:
            try:
                txn = self._env.begin()
            except lmdb.MapResizedError:
                txn = self._begin_anew()
            with txn:
                yield Reader(self, txn)
        finally:
            with self._guard:
                self._readers -= 1
                if self.is_growing and not self._readers:
                    self._idle.notify_all()

    def _begin_anew(self) -> lmdb.Transaction[bytes]:
        """A transaction after another process, which should have left the records alone, has made them larger than the map."""
        with self._guard:
            if self._writing or self.is_growing or self._readers > 1:
                raise Unavailable(f"another process has written to {self.path}: try again", errno.EAGAIN)
            self._env.set_mapsize(self.map_size)  # or what is in use, if that is more
        return self._env.begin()

    async def write(self, operation: Callable[[Writer], T], *, frees: bool = False) -> T:
        """Run ``operation`` in the writer's thread; returns its result when that is durable, or raises what it raised,
        having changed nothing.

        ``frees``: it leaves less than there was, so that it may use what is kept in reserve for a full disk.  An operation may
        be run several times, of which the last counts.

        Cancellation takes back what the writer has not begun; what it has begun is finished, so it is done or not done.
        Raises Unavailable where the disk refuses (ENOSPC …) and after ``close``.
        """
        if self._send is None:
            raise Closed()
        request = _Request(operation, frees)
        self._send.send_nowait(request)
        try:
            await request.done.wait()
        except trio.Cancelled:
            if not request.begun:
                request.withdrawn = True
                raise
            with trio.CancelScope(shield=True):
                await request.done.wait()
        return request.result()

    def stop(self) -> None:
        """Let ``serve`` finish what waits and return; later writes are refused."""
        if self._send is not None:
            self._send.close()
            self._send = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The writer: one batch after the other until ``stop``.  May be run again after that."""
        self._send, receive = trio.open_memory_channel[_Request[Any]](math.inf)
        task_status.started()
        async for first in receive:
            batch = _Batch([first])
            while len(batch.requests) < BATCH:
                try:
                    batch.requests.append(receive.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            batch.requests = [request for request in batch.requests if not request.withdrawn]
            for request in batch.requests:
                request.begun = True
            if not batch.requests:
                continue
            self.batches[len(batch.requests)] += 1
            try:
                with trio.CancelScope(shield=True):  # a thread can't be stopped, and its outcome must be told
                    await trio.to_thread.run_sync(self._run, batch)
            except BaseException as error:  # a bug: the writer ends, but nobody may wait for ever
                for request in batch.requests:
                    request.error = request.error or error
                    request.done.set()
                raise
            for request in batch.requests:
                for change in request.changes:
                    for listener in self.listeners:
                        listener(change)
                request.done.set()

    def _run(self, batch: _Batch) -> None:
        """Run a batch in the writer's thread; leaves each request with a result or an error."""
        if self._space.is_short:
            self._refill()
        while not self._attempt(batch):
            try:
                self._grow()
            except (lmdb.Error, OSError) as error:
                if len(batch.requests) > 1:  # some may need no room
                    for request in batch.requests:
                        self._run(_Batch([request]))
                elif not (batch.requests[0].frees and self._attempt_with_reserve(batch)):
                    batch.requests[0].error = _refused("make room for the records", self.path, error)
                return

    def _attempt(self, batch: _Batch) -> bool:
        """Run a batch once; False where the map is too small for it: nothing has changed then."""
        writers: list[Writer] = []
        batch.directories.clear()
        with self._guard:
            self._writing = True
        try:
            with self._env.begin(write=True) as txn:
                for request in batch.requests:
                    request.error = None
                    writer = self._run_one(txn, batch, request)
                    if writer is not None:
                        writers.append(writer)
                for fd in batch.directories if self.sync else ():
                    os.fsync(fd)
        except (lmdb.Error, OSError) as error:
            for writer in reversed(writers):
                _undo(writer)
            if isinstance(error, (lmdb.MapFullError, lmdb.MapResizedError)):
                return False
            refusal = _refused("write the records", self.path, error)
            log.error("%s", refusal)
            for request in batch.requests:
                if request.error is None:
                    request.error = refusal
            return True
        finally:
            self._writing = False
        for request, writer in zip((r for r in batch.requests if r.error is None), writers, strict=True):
            request.changes = writer.changes
            for act in writer.afters:
                try:
                    act()
                except OSError as error:
                    log.warning("after a change was made: %s", error)
        return True

    def _run_one(self, txn: lmdb.Transaction[bytes], batch: _Batch, request: _Request[Any]) -> Writer | None:
        """Run one operation: what it wrote, None if it failed.  Raises MapFullError."""
        writer = None
        try:
            with self._env.begin(write=True, parent=txn) as nested:
                writer = Writer(self, nested, batch)
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
        refuse_without_address_space(size - self.map_size)
        with self._idle:
            self.is_growing = True
            try:
                while self._readers:
                    self._idle.wait()
                self._env.set_mapsize(size)
                self._space.size = self.map_size
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


class _Request(Generic[T]):
    """One operation on its way through the writer."""

    def __init__(self, operation: Callable[[Writer], T], frees: bool) -> None:
        self.operation = operation
        self.frees = frees
        self.done = trio.Event()
        self.begun = False
        self.withdrawn = False
        self.value: T
        self.error: BaseException | None = None
        self.changes: list[Change] = []

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class _Batch:
    """What one sync makes durable."""

    def __init__(self, requests: list[_Request[Any]]) -> None:
        self.requests = requests
        self.directories: set[int] = set()


def _remove_files(path: str) -> None:
    for made in (path, f"{path}-lock"):
        with suppress(OSError):
            os.unlink(made)


def _undo(writer: Writer) -> None:
    for undo in reversed(writer.undos):
        try:
            undo()
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)


def _refused(doing: str, path: str, error: lmdb.Error | OSError) -> Unavailable:
    """The refusal of LMDB or of the operating system, while ``doing`` something with the records in ``path``, as a sentence."""
    if isinstance(error, OSError):
        return Unavailable.from_os(doing, error)
    code = getattr(error, "code", 0)  # LMDB's own codes are negative, the system's positive; py-lmdb's own errors have none
    if code == errno.EIO:  # also LMDB's word for a short write, which is how a full disk begins
        space = os.statvfs(os.path.dirname(path))
        if space.f_bavail * space.f_frsize < FEW:
            return Unavailable.from_os(doing, OSError(errno.ENOSPC, "", path))
    return Unavailable(f"cannot {doing}: {error}", code if code > 0 else None)
