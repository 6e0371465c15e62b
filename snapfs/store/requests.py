"""Requests: operations on their way through the writer, and what is done when it is known whether they are durable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import trio

from snapfs.model import Change
from snapfs.store.writing import Operation, Writer

log = logging.getLogger(__name__)

T = TypeVar("T")


class Request(Generic[T]):
    """One call of ``MetaStore.write``: an operation, and a caller that waits for it.

    ``frees``: the operation leaves less in the records than there was, so that on a full disk it may use the reserve.  When
    ``done`` is set, ``result`` gives the outcome, and ``changes`` is what the listeners have been told.
    """

    def __init__(self, operation: Operation[T], frees: bool) -> None:
        self.operation = operation
        self.frees = frees
        self.done = trio.Event()
        self.value: T
        self.error: BaseException | None = None
        self.changes: list[Change] = []
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """True for the first that claims the request.  The writer claims it before it runs the operation; a caller that is
        cancelled claims it so that the operation is not run."""
        return self._claimed.acquire(blocking=False)

    def result(self) -> T:
        """What the operation has returned; raises what it has raised, or why it could not be made durable."""
        if self.error is not None:
            raise self.error
        return self.value


Ran = tuple[Request[Any], Writer]
"""A request whose operation has run, and what it wrote with."""


def finish(ran: Iterable[Ran]) -> None:
    """After operations have become durable: note their changes, and do what they left for that moment."""
    for request, writer in ran:
        request.changes = writer.changes
        for act in writer.afters:
            try:
                act()
            except OSError as error:
                log.warning("after a change was made: %s", error)


def undo(ran: Sequence[Ran]) -> None:
    """After a transaction has failed: undo what its operations did besides writing records, the last first."""
    for _, writer in reversed(ran):
        undo_one(writer)


def undo_one(writer: Writer) -> None:
    """After one operation has failed: undo what it did besides writing records, the last first."""
    for act in reversed(writer.undos):
        try:
            act()
        except OSError as error:
            log.warning("while undoing a failed operation: %s", error)
