"""The pool of ready-made directories: dry, or filled by hand; and where the layers of snapshots are placed."""

from __future__ import annotations

from collections import deque

from snapfs import Snapshotter
from snapfs.root.pool import Pool


class DryPool(deque[str]):
    """In place of a pool of ready-made directories: there are never any, so each Prepare makes and flushes its own."""

    def popleft(self) -> str:
        raise IndexError

    def extend(self, _: object) -> None:
        pass


def placed(snapshotter: Snapshotter) -> dict[int, str]:
    with snapshotter.records.reading() as reader:
        return dict(reader.placed())


FILL = Pool.fill
