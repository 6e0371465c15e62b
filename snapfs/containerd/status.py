"""snapfs's errors -> gRPC statuses: the one table.

A message ends with the words of its class, as containerd's clients (``errdefs``) print and cut them.
"""

from __future__ import annotations

import enum

from snapfs import errors


class Status(enum.IntEnum):
    """The statuses of gRPC that are used here, by their numbers on the wire."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


_STATUS: tuple[tuple[type[errors.SnapshotError], Status, str], ...] = (
    (errors.NotFound, Status.NOT_FOUND, "not found"),
    (errors.AlreadyExists, Status.ALREADY_EXISTS, "already exists"),
    (errors.FailedPrecondition, Status.FAILED_PRECONDITION, "failed precondition"),
    (errors.InvalidArgument, Status.INVALID_ARGUMENT, "invalid argument"),
    (errors.Unavailable, Status.UNAVAILABLE, "unavailable"),
    (errors.SnapshotError, Status.INTERNAL, "internal"),  # damaged on disk
)


def status_of(error: errors.SnapshotError) -> tuple[Status, str]:
    """The status that says best what ``error`` says in words, and its message."""
    return next((code, f"{error}: {words}") for kind, code, words in _STATUS if isinstance(error, kind))
