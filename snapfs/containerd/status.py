"""snapfs's errors -> gRPC statuses: the one table.

A message ends with the words of its class, as containerd's clients (``errdefs``) print and cut them.
"""

from __future__ import annotations

import grpc

from snapfs import errors

_STATUS: tuple[tuple[type[errors.SnapshotError], grpc.StatusCode, str], ...] = (
    (errors.NotFound, grpc.StatusCode.NOT_FOUND, "not found"),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, "already exists"),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION, "failed precondition"),
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT, "invalid argument"),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE, "unavailable"),
    (errors.SnapshotError, grpc.StatusCode.INTERNAL, "internal"),  # damaged on disk
)


def status_of(error: errors.SnapshotError) -> tuple[grpc.StatusCode, str]:
    """The status that says best what ``error`` says in words, and its message."""
    return next((code, f"{error}: {words}") for kind, code, words in _STATUS if isinstance(error, kind))
