"""Writable copies of prepared directories for tests, by any user: a base is made once, and each test gets a copy of its own.

With pytest there is nothing to set up, for snapfs brings a plugin (``pytest_plugins = "snapfs.testing"`` in conftest.py does
where plugins aren't loaded by themselves)::

    @pytest.fixture
    def shop(snapshot_of, fresh_copy):
        return fresh_copy(snapshot_of("tests/data/shop"))  # or a function that fills the directory that it is given

Without pytest, in a ``unittest.TestCase`` or a script::

    with snapfs.testing.copies("tests/data/shop") as copy:
        (copy / "orders").unlink()

A copy takes milliseconds, and no space until it is written to, where the kernel lets this user mount an overlay; elsewhere it
is a whole copy, by reflinks if there are any.  examples/pytest/README.md tells all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType

TYPE_CHECKING = False  # typing's own would import typing, and every run of pytest imports this
if TYPE_CHECKING:
    from pathlib import Path

    from snapfs.testing.bases import Source
    from snapfs.testing.making import Copy
    from snapfs.testing.session import Session, Wish

__all__ = ["copies"]

pytest_plugins = ["snapfs.testing.plugin"]

_WISHES = ("auto", "overlay", "reflink", "copy")

_sessions: dict[tuple[str, str | None], Session] = {}


class copies:
    """A context manager: within it there is a directory that begins as the base ``base``, and is removed at the end.

    ``base`` is a directory, or a function that fills the directory that it is given.  It is copied, or called, once a process;
    with ``cache``, a directory, once for all runs, until what it depends on has changed (of a function: its source, and the
    files and directories ``depends``).  ``how`` is the best way that may be taken: "overlay" (as "auto"), "reflink", "copy".

    For an overlay the process enters a mount namespace of its own, and, where it isn't root's, a user namespace, which it never
    leaves; it has to be without threads then.

    At the end, and in ``reset``, no process may have a file open in the copy, or OSError (EBUSY) says who has.
    """

    def __init__(
        self,
        base: Source,
        *,
        depends: Iterable[str | os.PathLike[str]] = (),
        cache: str | os.PathLike[str] | None = None,
        how: Wish = "auto",
    ) -> None:
        if how not in _WISHES:
            raise ValueError(f"how={how!r}: it is one of {', '.join(_WISHES)}")
        self._base = base
        self._depends = depends
        self._cache = None if cache is None else os.path.abspath(cache)
        self._how = how
        self._copies: list[Copy] = []

    def __enter__(self) -> Path:
        session = _session(self._how, self._cache)
        self._copies.append(session.copy_of(session.snapshot_of(self._base, self._depends)))
        return self._copies[-1].path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._copies.pop().remove(quietly=error is not None)

    def reset(self) -> None:
        """Let the copy begin anew, at the same path."""
        self._copy().reset()

    def changes(self) -> list[str]:
        """What was changed in the copy so far: ``A /added``, ``C /changed``, ``D /deleted``."""
        return [line.rstrip("\n") for line in self._copy().changes()]

    def _copy(self) -> Copy:
        if not self._copies:
            raise RuntimeError("there is no copy: use it in the block of its with statement")
        return self._copies[-1]


def _session(how: Wish, cache: str | None) -> Session:
    """The session of this process that makes copies ``how``; it ends with the process."""
    import atexit

    from snapfs.testing.session import Session

    if (how, cache) not in _sessions:
        made = _sessions[how, cache] = Session(how, cache=cache)
        atexit.register(made.close)
    return _sessions[how, cache]
