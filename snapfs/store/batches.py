"""Batches: the writer runs several requests in one transaction, each nested in it, and makes them durable with one sync.

A request that fails is undone, and fails alone; if the sync fails, the whole batch does.  Where the map is too small it is made
larger in between, while nobody reads, and the batch is run anew; so is a request that frees something, with the reserve, where
the disk is full (``space.py``).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import lmdb

from snapfs.errors import FULL, SnapshotError
from snapfs.model import Change
from snapfs.store.doubt import Doubt
from snapfs.store.environment import Environment
from snapfs.store.requests import Ran, Request, finish, undo, undo_one
from snapfs.store.soundness import disk_error
from snapfs.store.writing import Writer

log = logging.getLogger(__name__)


class BatchRunner:
    """Runs batches on one environment.  All methods are for one thread, the writer's."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._path = environment.path
        self._doubt: Doubt | None = None
        self._settled_late: list[Change] = []

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is unknown if the last batch is on the disk, since it fails."""
        return self._doubt is not None

    def run(self, requests: Sequence[Request[Any]]) -> None:
        """Run a batch; leaves each request with a result or an error."""
        self._run(requests)
        refused = [request for request in requests if request.frees and getattr(request.error, "errno", None) in FULL]
        if not refused or self._doubt is not None:
            return
        try:
            given = self._environment.space.release_reserve()
        except OSError as error:
            log.warning("cannot give up the reserve: %s", error)
            return
        for request in refused if given else ():
            self._run([request])

    def run_if_quick(self, request: Request[Any]) -> bool:
        """Run one request as ``run``, unless that would wait for a disk that is full or fails, or for readers: False then, and
        nothing has changed."""
        if self._doubt is not None or self._environment.space.lacks_reserve or not self._attempt([request]):
            return False
        return not (request.frees and getattr(request.error, "errno", None) in FULL)

    def settle(self) -> None:
        """Settle what is in doubt, if anything is (``Doubt.settle``)."""
        if self._doubt is not None:
            self._settled_late += self._doubt.settle()
            self._doubt = None

    def take_settled_changes(self) -> list[Change]:
        """The changes of batches that were in doubt for a while, and are durable now; each is returned once."""
        changes, self._settled_late = self._settled_late, []
        return changes

    def _run(self, requests: Sequence[Request[Any]]) -> None:
        try:
            self.settle()
        except (lmdb.Error, OSError, SnapshotError) as error:
            for request in requests:
                request.error = disk_error("write the records", self._path, error)
            return
        if self._environment.space.lacks_reserve:
            self._environment.refill_reserve()
        while not self._attempt(requests):
            try:
                self._environment.grow()
            except (lmdb.Error, OSError) as error:
                if len(requests) > 1:  # some may need no room
                    for request in requests:
                        self._run([request])
                elif not (requests[0].frees and self._attempt_with_reserve(requests)):
                    requests[0].error = disk_error("make room for the records", self._path, error)
                return

    def _attempt(self, requests: Sequence[Request[Any]]) -> bool:
        """Run a batch once; False where the map is too small for it: nothing has changed then."""
        ran: list[Ran] = []
        directories: set[int] = set()
        number = 0
        try:
            with suppress(_NothingDone), self._environment.env.begin(write=True) as txn:
                number = txn.id()
                for request in requests:
                    request.error = None
                    writer = self._run_one(txn, directories, request, alone=len(requests) == 1)
                    if writer is not None:
                        ran.append((request, writer))
                if not ran:
                    raise _NothingDone
                for fd in directories if self._environment.sync else ():
                    os.fsync(fd)
        except (lmdb.Error, OSError) as error:
            if isinstance(error, lmdb.MapFullError):
                undo(ran)
                return False
            refusal = disk_error("write the records", self._path, error)
            log.error("%s", refusal)
            for request in requests:
                if request.error is None:
                    request.error = refusal
            if self._environment.is_panicking() or (isinstance(error, lmdb.Error) and getattr(error, "code", 0) == errno.EIO):
                self._doubt = Doubt(self._environment, number, ran)
                if self._doubt.settle_at_once():
                    self._doubt = None
            else:
                undo(ran)
            return True
        finish(ran)
        return True

    def _run_one(
        self, txn: lmdb.Transaction[bytes], directories: set[int], request: Request[Any], *, alone: bool
    ) -> Writer | None:
        """Run one operation: what it wrote with, None if it failed.  Raises MapFullError.

        One that is ``alone`` has the whole transaction; of several each has a nested one, for some thirty microseconds more.
        """
        writer, tables = None, self._environment.tables
        try:
            if alone:
                writer = Writer(tables, txn, directories)
                request.value = request.operation(writer)
                return writer
            with self._environment.env.begin(write=True, parent=txn) as nested:
                writer = Writer(tables, nested, directories)
                request.value = request.operation(writer)
            return writer
        except SnapshotError as error:
            request.error = error
        except (lmdb.Error, OSError) as error:
            request.error = disk_error("change the store", self._path, error)
            if isinstance(error, lmdb.MapFullError):
                if writer is not None:
                    undo_one(writer)
                raise
        except Exception as error:  # a bug: it must reach the caller, not end the writer
            request.error = error
        if writer is not None:
            undo_one(writer)
        return None

    def _attempt_with_reserve(self, requests: Sequence[Request[Any]]) -> bool:
        """Run a batch that frees something, with all that is allocated; False where that is too small too."""
        before = self._environment.space.size
        try:
            self._environment.resize(self._environment.space.allocated)
        except OSError:
            return False
        try:
            return self._attempt(requests)
        finally:
            self._environment.resize(before)
            self._environment.space.lacks_reserve = True


class _NothingDone(Exception):
    """All operations of a batch have failed: its transaction is to be dropped."""
