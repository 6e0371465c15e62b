"""What a snapshot is -> the messages that say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.timestamp_pb2 import Timestamp

from snapfs.containerd import mount_pb2, snapshots_pb2
from snapfs.model import Info, Kind, Mount

PAGE = 100  # Infos in a message
PAGE_BYTES = 1 << 20  # a message ends with the Info that passes this: Go's clients take four times as much

_KINDS = {
    Kind.VIEW: snapshots_pb2.VIEW,
    Kind.ACTIVE: snapshots_pb2.ACTIVE,
    Kind.COMMITTED: snapshots_pb2.COMMITTED,
}


def info_message(info: Info) -> snapshots_pb2.Info:
    """``info`` as Stat, Update and List tell it."""
    return snapshots_pb2.Info(
        name=info.name,
        parent=info.parent or "",
        kind=_KINDS[info.kind],
        created_at=_timestamp(info.created),
        updated_at=_timestamp(info.updated),
        labels=info.labels,
    )


def mount_messages(mounts: Iterable[Mount]) -> list[mount_pb2.Mount]:
    """The mounts of a snapshot."""
    return [mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def pages(infos: Iterable[Info]) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
    """The messages that List answers with."""
    page, size = snapshots_pb2.ListSnapshotsResponse(), 0
    for info in infos:
        page.info.append(info_message(info))
        size += page.info[-1].ByteSize()
        if len(page.info) == PAGE or size > PAGE_BYTES:
            yield page
            page, size = snapshots_pb2.ListSnapshotsResponse(), 0
    if page.info:
        yield page


def _timestamp(ns: int) -> Timestamp:
    seconds, nanos = divmod(ns, 1_000_000_000)
    return Timestamp(seconds=seconds, nanos=nanos)
