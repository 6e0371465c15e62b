"""The methods of containerd's snapshots service, by their names on the wire; all run as trio tasks.

``snapshotter``, the first field of every request, is the name by which containerd calls this one: it is of no account here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from google.protobuf.empty_pb2 import Empty

from snapfs.containerd import ORIGIN
from snapfs.containerd import snapshots_pb2 as wire
from snapfs.containerd.messages import info_message, mount_messages
from snapfs.errors import InvalidArgument
from snapfs.model import Info
from snapfs.snapshotter import Snapshotter

Settle = Callable[[], Awaitable[None]]
"""Awaited after each change: returns when those who watch the snapshots elsewhere see it."""


class Service:
    """The service over ``snapshotter``; each method answers one request or raises SnapshotError."""

    def __init__(self, snapshotter: Snapshotter, settle: Settle) -> None:
        self._snapshotter = snapshotter
        self._settle = settle
        self._listing = trio.CapacityLimiter(2)  # a walk of many snapshots takes a thread, which the writer needs too

    async def prepare(self, request: wire.PrepareSnapshotRequest) -> wire.PrepareSnapshotResponse:
        mounts = await self._snapshotter.prepare(request.key, request.parent, dict(request.labels), origin=ORIGIN)
        await self._settle()
        return wire.PrepareSnapshotResponse(mounts=mount_messages(mounts))

    async def view(self, request: wire.ViewSnapshotRequest) -> wire.ViewSnapshotResponse:
        mounts = await self._snapshotter.view(request.key, request.parent, dict(request.labels), origin=ORIGIN)
        await self._settle()
        return wire.ViewSnapshotResponse(mounts=mount_messages(mounts))

    async def mounts(self, request: wire.MountsRequest) -> wire.MountsResponse:
        return wire.MountsResponse(mounts=mount_messages(await self._snapshotter.hand_over(request.key)))

    async def commit(self, request: wire.CommitSnapshotRequest) -> Empty:
        parent = request.parent or None
        await self._snapshotter.commit(request.name, request.key, dict(request.labels), parent, origin=ORIGIN)
        await self._settle()
        return Empty()

    async def remove(self, request: wire.RemoveSnapshotRequest) -> Empty:
        await self._snapshotter.remove(request.key, origin=ORIGIN)
        await self._settle()
        return Empty()

    async def stat(self, request: wire.StatSnapshotRequest) -> wire.StatSnapshotResponse:
        return wire.StatSnapshotResponse(info=info_message(await self._snapshotter.stat(request.key)))

    async def update(self, request: wire.UpdateSnapshotRequest) -> wire.UpdateSnapshotResponse:
        if not request.HasField("info"):
            raise InvalidArgument("an Update must say which snapshot, and with which labels: info is missing")
        labels, paths = dict(request.info.labels), list(request.update_mask.paths)
        info = await self._snapshotter.update(request.info.name, labels, paths)
        await self._settle()
        return wire.UpdateSnapshotResponse(info=info_message(info))

    async def list(self, request: wire.ListSnapshotsRequest) -> list[Info]:
        """The snapshots that are to be told, in pages."""
        async with self._listing:
            return await self._snapshotter.walk(*request.filters, origin=ORIGIN)

    async def usage(self, request: wire.UsageRequest) -> wire.UsageResponse:
        usage = await self._snapshotter.usage(request.key)
        return wire.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def cleanup(self, request: wire.CleanupRequest) -> Empty:
        await self._snapshotter.cleanup()
        return Empty()
