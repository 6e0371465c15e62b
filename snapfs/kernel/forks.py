"""What a process that was forked from this one must not do: use, or keep, what belongs to its parent.

A child of fork(2) has copies of its parent's descriptors and memory.  A lock (flock(2)) is held until the last copy of its
descriptor is closed, so a child would hold the root when its parent no longer does; and what a child cleans up at its end, its
parent still needs.  So each object that holds such a thing registers itself here, and gives it up in every child.

This is the only fork hook of the package.  Its users: ``store.environment.Environment``, ``root.layers.Layers``.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Inherited(Protocol):
    """An object that a forked process has a copy of."""

    def disown_in_child(self) -> None:
        """Give up, in the forked process, what belongs to its parent.  Must not raise."""


_registered: weakref.WeakSet[Inherited] = weakref.WeakSet()


def disown_in_children(owner: Inherited) -> None:
    """Have ``owner.disown_in_child()`` called in each process that is forked from this one, for as long as ``owner`` exists."""
    _registered.add(owner)


def _disown_all() -> None:
    for owner in list(_registered):
        owner.disown_in_child()


os.register_at_fork(after_in_child=_disown_all)


@contextmanager
def undisturbed() -> Iterator[set[signal.Signals | int]]:
    """For a block that forks: no handler of a signal runs in it, and what came meanwhile is handled at its end.  It gives which
    signals were blocked before.

    Hooks run after a fork, Python's own among them, and what a handler raises there is lost: Ctrl-C, for one.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
