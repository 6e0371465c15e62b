"""What is in doubt: a batch of which it is unknown whether it is on the disk, since the disk fails.

Where the disk refuses LMDB's meta page, the last step of a batch, it is unknown whether the batch is on the disk, and LMDB
refuses everything from then on.  So the environment is opened anew, for reading at once.  The meta page is written again as the
kernel has it, and not before the disk has taken that is anything else written: what the records then say is what happened, and
the batch is finished or undone accordingly.  Until then nothing can be written.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lmdb

from snapfs.errors import SnapshotError, Unavailable
from snapfs.model import Change
from snapfs.store.environment import Environment
from snapfs.store.requests import Ran, finish, undo
from snapfs.store.soundness import disk_error

log = logging.getLogger(__name__)


class Doubt:
    """The batch of transaction ``number``, whose operations ``ran``.  All methods are for the writer's thread."""

    def __init__(self, environment: Environment, number: int, ran: Sequence[Ran]) -> None:
        self._environment = environment
        self._number = number
        self._ran = ran

    def settle(self) -> list[Change]:
        """Find out whether the batch is on the disk, and finish or undo it; returns the changes that it made.

        Raises lmdb.Error, OSError, Unavailable or Damaged where the disk still fails: it is in doubt then as it was, and what
        could be read before can be read, if the environment can be opened at all.
        """
        environment = self._environment
        if environment.reopen_error is not None or environment.is_panicking():
            environment.reopen()  # the disk may take its time, and no reader waits for it
        environment.rewrite_pages(self._number & 1)
        environment.reopen(writable=True)
        if environment.env.info()["last_txnid"] < self._number:
            undo(self._ran)
            return []
        for request, _ in self._ran:
            request.error = None
        finish(self._ran)
        return [change for request, _ in self._ran for change in request.changes]

    def settle_at_once(self) -> bool:
        """Settle it if the disk allows that; else its callers are told that it is in doubt.  Whether it is settled.

        Also where LMDB has not given up: each of its descriptors would tell of this error once, and make a later batch fail.
        """
        try:
            self.settle()
        except (lmdb.Error, OSError, SnapshotError) as error:
            log.error("%s", disk_error("find out what the disk holds of the records", self._environment.path, error))
            for request, _ in self._ran:
                if isinstance(request.error, Unavailable):
                    sentence = f"{request.error}; whether it was done will be known when the disk takes writes again"
                    request.error = Unavailable(sentence, request.error.errno)
            return False
        return True
