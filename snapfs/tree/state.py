"""State: the little that the nodes of a tree share and that is in no record.  All of it is gone when the daemon ends.

Every node has it (``Node.state``); nothing here knows a node.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager

import trio

import snapfs
from snapfs.errors import TryAgain
from snapfs.model import Caller, Change, Kind
from snapfs.snapshotter import Snapshotter
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.tree.events import Events
from snapfs.tree.hiding import Hidden, Removals, Teardowns
from snapfs.tree.inodes import ALIAS, CHANGES_SLOT, CHECKPOINT_SLOT, IMAGE_SLOT, PATCH_SLOT, LabelInodes, Writers, pack
from snapfs.tree.log import ErrorLog
from snapfs.tree.meters import Meter
from snapfs.tree.moments import Moments
from snapfs.tree.openlabels import OpenLabels
from snapfs.tree.reads import Reads
from snapfs.tree.replacing import JustNamed
from snapfs.tree.texts import LongText, Sparing, Text, Versions

LOOKS = 2  # threads that look at what is written of an image.json


class Collecting:
    """Work that one does at a time and those share who came before it began: how many times it was begun, and which of these
    was the last to be done."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self.begun = 0
        self.done = 0

    @asynccontextmanager
    async def held_for(self, caller: Caller) -> AsyncIterator[None]:
        """For the time that ``caller`` does the work, or finds that it was done.  Raises TryAgain where others do it for longer
        than the caller's patience."""
        with trio.move_on_after(caller.patience) as waiting:
            await self._lock.acquire()
        if waiting.cancelled_caught:
            raise TryAgain("the snapshots are being listed for others")
        try:
            yield
        finally:
            self._lock.release()


class State:
    """What the nodes of one tree share.

    ``snapshotter``: the snapshots that the tree shows.  ``served``: where and how the tree is served, for options.json.
    ``dirsync``: Commit waits for the data.  ``window``: what leads a process that is not in the daemon's user namespace to the
    daemon's mounts, before their paths; "" where there is no such namespace; ``is_inside``: whether the process with this pid
    is in it.  ``version``, ``started``: of the daemon (ns
    since the epoch).

    ``error_log``, ``events``: the logs in .snapfs/.  ``meters``: the requests, by operation, for stats.json.  ``reads``: which
    process has read what lately.  ``versions``: texts that were looked up lately.  ``sparing``: makes those about the daemon.
    ``open_labels``: labels that are open for writing; ``label_inodes``: the inodes of those that are not.  ``writers``: those
    of who writes into files that do something.  ``moments``: when checkpoints were made.  ``hidden``: entries that were just
    unlinked.  ``teardowns``: processes that were just refused to delete.  ``just_named``: names in images/ that were just made.
    ``image_bytes``: what each image.json weighs that the owner or root has open to write it;
    ``image_looks``: for threads that look at what somebody writes of one, each for some milliseconds.

    ``removals``: of directories inside snapshots.  ``aliased``: the ids of committed snapshots whose directories are found
    under their other inode (``inodes.ALIAS``): the server of the tree says which.  ``changes``: how many changes there were;
    ``listed``: how many of them .snapfs/snapshots shows.  ``changed``: when each kind last gained or lost a snapshot (ns since
    the epoch); ``names_changed``: when images/ did.  ``collecting``: who collects what .snapfs/snapshots shows.  ``cleaned``:
    is set when the Cleanup under way has ended; None where none is.
    """

    def __init__(
        self,
        snapshotter: Snapshotter,
        served: Mapping[str, object],
        *,
        dirsync: bool,
        window: str,
        is_inside: Callable[[int], bool],
    ) -> None:
        self.snapshotter = snapshotter
        self.served = served
        self.dirsync = dirsync
        self.window = window
        self.is_inside = is_inside
        self.version: str = snapfs.__version__
        self.started = time.time_ns()
        self.error_log = ErrorLog()
        self.events = Events()
        self.meters: defaultdict[str, Meter] = defaultdict(Meter)
        self.reads = Reads()
        self.versions = Versions()
        self.sparing = Sparing()
        self.open_labels = OpenLabels(snapshotter)
        self.label_inodes = LabelInodes()
        self.writers = Writers()
        self.moments = Moments()
        self.hidden = Hidden()
        self.teardowns = Teardowns()
        self.just_named = JustNamed()
        self.image_bytes = 0
        self.image_looks = trio.CapacityLimiter(LOOKS)
        self.removals = Removals()
        self.aliased: set[int] = set()
        self.changes = 0
        self.listed = -1
        self.collecting = Collecting()
        self.cleaned: trio.Event | None = None
        self.changed = dict.fromkeys(Kind, self.started)
        self.names_changed = self.started
        snapshotter.subscribe(self._note)

    def reading(self) -> AbstractContextManager[Reader]:
        """One consistent state of the records, during the block."""
        return self.snapshotter.reading()

    def record(self, number: int) -> Record:
        """The record of snapshot ``number``; raises NotFound."""
        return self.snapshotter.record(number)

    def snapshot(self, node: int) -> tuple[int, Record]:
        """Id and record of the snapshot for which inodes have the number ``node``; raises NotFound, Damaged."""
        return self.snapshotter.by_node(node)

    def alias(self, number: int, record: Record) -> int:
        """The bit that the inodes of the directories of snapshot ``number`` have when they are looked up from the root: ALIAS,
        or none."""
        return ALIAS if record.kind is Kind.COMMITTED and number in self.aliased else 0

    def spool(self, lines: Iterable[str]) -> Text:
        """A text of ``lines``, which tell of records; in a worker thread."""
        return LongText(lines, self.snapshotter.root)

    def spool_found(self, lines: Iterable[str]) -> Text:
        """A text of ``lines``, which tell what is in layers: a small layer can make as many of them as it likes."""
        return LongText(lines, self.snapshotter.root, is_bounded=True)

    def image_text(self, content: str) -> Text:
        """An image.json with this ``content``; in a worker thread."""
        return self.spool_found([content])

    def found(self, number: int, slot: int) -> Text | None:
        """The text of a file of snapshot ``number`` (``CHANGES_SLOT`` and the like) that was found last; those of
        ``changes`` and ``changes.patch`` stay right once the snapshot is committed."""
        return self.versions.get(pack(number, slot))

    def keep(self, number: int, slot: int, text: Text) -> None:
        """Remember ``text`` as that of a file of snapshot ``number``, until another one is found or the kind changes."""
        self.versions.keep(pack(number, slot), text)

    def _note(self, change: Change) -> None:
        self.events.note(change)
        self.moments.note(change)
        self.changes += 1
        before, after = change.before, change.after
        if before is not None and (after is None or (after.kind, after.id) != (before.kind, before.id)):
            for slot in (CHANGES_SLOT, CHECKPOINT_SLOT, PATCH_SLOT):
                self.versions.forget(pack(before.id, slot))
        if before is not None and not change.counted:
            self.versions.forget(pack(before.id, IMAGE_SLOT))
        if (before.images if before else ()) != (after.images if after else ()):
            self.names_changed = max(time.time_ns(), self.names_changed + 1)
        for info in (before, after):
            if info is not None and not (before and after and (before.name, before.kind) == (after.name, after.kind)):
                self.changed[info.kind] = max(time.time_ns(), self.changed[info.kind] + 1)
        if before is not None and after is None:
            self.hidden.forget(before.id)
            self.removals.forget(before.node or before.id)
            self.aliased.discard(before.id)
        elif before is not None and after is not None and before.id in self.aliased:
            self.aliased.add(after.id)
