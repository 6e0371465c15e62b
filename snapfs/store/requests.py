"""Requests: operations that were asked for, on their way through the writer, and what follows when their outcome is known."""

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
    """One operation that a caller wants done.

    ``frees``: it leaves less than there was, so that it may use what is kept in reserve for a full disk.  When ``done`` is set,
    ``result`` gives the outcome, and ``changes`` are what the listeners are told.
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
        """Whether the caller is the first to claim it: the writer claims it to do it, its caller to have it not done."""
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
