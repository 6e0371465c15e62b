"""When the checkpoints of workspaces were made, found out once for all requests about ``history/``: each name in there needs
those of all others, for of one second only one has a name."""

from __future__ import annotations

from contextlib import suppress

from snapfs.errors import Damaged
from snapfs.labels import OF
from snapfs.model import Change
from snapfs.store.reading import Reader

MOST = 4000  # checkpoints of a workspace that history/ shows, the latest by number: finding them out takes some 20 ms

REMEMBERED = 8  # workspaces whose checkpoints' times are

SECOND = 1_000_000_000


class Moments:
    """The checkpoints of the few workspaces that were asked for last: the id of each by the second since the epoch in which it
    was made, in the order of time; of those of one second, that with the highest number."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, int]] = {}  # the one that was asked for last is the last

    def of(self, reader: Reader, workspace: str) -> dict[int, int]:
        """Those of ``workspace``, a key.  Of a damaged one nobody knows when it was made."""
        found = self._known.pop(workspace, None)
        if found is None:
            by_second: dict[int, int] = {}
            for number in reader.latest_checkpoints(workspace, MOST):
                with suppress(Damaged):
                    record = reader.record(number)
                    if record is not None:
                        by_second.setdefault(record.created // SECOND, number)
            found = dict(sorted(by_second.items()))
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
