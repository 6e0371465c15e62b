"""Users apart: for whom a request is answered, and what is remembered of each user, so that nobody pushes out another's.

A user is as in ``Caller``: None for the owner and root, or a uid.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, TypeVar

V = TypeVar("V")

asker: ContextVar[int | None] = ContextVar("asker", default=None)
"""The user for whom something is looked up, listed or opened now."""


class OfUsers(Generic[V]):
    """Values by number, each of one user: the ``most`` latest of each, of ``users`` users, those that had a new one last."""

    def __init__(self, most: int, users: int) -> None:
        self._most = most
        self._users = users
        self._found: dict[int, tuple[int | None, V]] = {}
        self._of: dict[int | None, dict[int, None]] = {}  # the latest is the last, of users and of numbers

    def put(self, user: int | None, number: int, value: V) -> None:
        """``user`` has ``value`` by a new ``number``."""
        own = self._of[user] = self._of.pop(user, {})
        own[number] = None
        self._found[number] = user, value
        if len(own) > self._most:
            self._forget(own)
        if len(self._of) > self._users:
            others = self._of.pop(next(iter(self._of)))
            while others:
                self._forget(others)

    def _forget(self, numbers: dict[int, None]) -> None:
        """Forget the oldest of one user's."""
        oldest = next(iter(numbers))
        del numbers[oldest], self._found[oldest]

    def get(self, number: int) -> V | None:
        """The value by that number, whoever has it; None where it is not remembered."""
        _, value = self._found.get(number, (None, None))
        return value

    def is_of(self, number: int, user: int | None) -> bool:
        """Whether the value by that number is that of ``user``."""
        return number in self._found and self._found[number][0] == user

    def __contains__(self, number: int) -> bool:
        return number in self._found
