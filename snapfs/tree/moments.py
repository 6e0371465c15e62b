"""When the checkpoints of workspaces were made, found out once for all requests about ``history/``: each name in there needs
those of all others, for of one second only one has a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from snapfs.allowance import Shares
from snapfs.errors import Damaged, TryAgain
from snapfs.labels import OF
from snapfs.model import Change
from snapfs.store.reading import Reader
from snapfs.tree.users import asker

MOST = 4000  # checkpoints of a workspace that history/ shows, the latest by number: finding them out takes some 20 ms

REMEMBERED = 8  # workspaces whose checkpoints' times are

OF_USER, OF_USERS = (0.1, 0.05), (0.2, 0.1)
"""Seconds that finding them out may take for one user, and for all but the owner together: at once, and of each second.  No
other request is answered meanwhile."""

SECOND = 1_000_000_000


class Moments:
    """The checkpoints of the few workspaces that were asked for last: the id of each by the second since the epoch in which it
    was made, in the order of time; of those of one second, that with the highest number."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._known: dict[str, dict[int, int]] = {}  # the one that was asked for last is the last
        self._clock = clock
        self._time = Shares(OF_USER, OF_USERS, clock)

    def of(self, reader: Reader, workspace: str) -> dict[int, int]:
        """Those of ``workspace``, a key.  Of a damaged one nobody knows when it was made.  Raises TryAgain where it would have
        to be found out, and takes more of the time than ``users.asker`` may have."""
        found = self._known.pop(workspace, None)
        if found is None:
            user, began = asker.get(), self._clock()
            if user is not None and self._time.left(user) <= 0:
                raise TryAgain("the checkpoints of too many workspaces are looked up")
            found = _found(reader, workspace)
            if user is not None:
                self._time.take(user, self._clock() - began)
        self._known[workspace] = found
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return found

    def note(self, change: Change) -> None:
        """Forget what ``change`` has made stale."""
        if not change.counted:
            for info in (change.before, change.after):
                if info is not None:
                    self._known.pop(info.labels.get(OF, ""), None)


def _found(reader: Reader, workspace: str) -> dict[int, int]:
    by_second: dict[int, int] = {}
    for number in reader.latest_checkpoints(workspace, MOST):
        with suppress(Damaged):
            record = reader.record(number)
            if record is not None:
                by_second.setdefault(record.created // SECOND, number)
    return dict(sorted(by_second.items()))
