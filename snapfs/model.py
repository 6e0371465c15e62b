"""What a snapshot is, as plain frozen values: no I/O, no behaviour.

The words are containerd's (``core/snapshots``): a snapshot is *active* (writable), a *view* (read-only) or
*committed* (may be a parent).  A *key* names an active snapshot or a view, a *name* a committed one; all share one
key space.  Times are nanoseconds since the Unix epoch, UTC, and beside them datetimes that know that they are UTC; sizes
are bytes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated

import msgspec

Ref = str | int
"""A snapshot by its key or name, or by its id (or ``ByNode``), which stays right while others rename and replace."""


class ByNode(int):
    """The snapshot whose directory in the tree has this number in its inodes: whichever that is when it is looked up, within
    the operation.  A workspace goes on as another snapshot when it is kept or rolled back, and its directory stays."""


class Kind(enum.StrEnum):
    """The three kinds of snapshot; the value is the word that users read and write."""

    ACTIVE = "active"
    VIEW = "view"
    COMMITTED = "committed"


class Caller(msgspec.Struct, frozen=True):
    """For whom something is done that may take long.

    ``user``: the uid of somebody whom the owner of the tree lets in; None: the owner, root, or a program with the library.
    ``patience``: how many seconds it may wait for what is done for others; for its own work it waits as long as that takes.
    """

    user: int | None = None
    patience: float = math.inf


OWNER = Caller()

BACKGROUND = Caller(user=-1)
"""For nobody who waits."""


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot as Stat and Walk show it.

    ``id`` is the number of its directory ``ROOT/snapshots/<id>``: from 1, kept by Commit and rename, never used
    twice.  ``parent`` is the parent's name, or None.  ``created`` equals ``updated`` until the first Update.
    ``node`` is the number that the inodes of the tree have for it, 0 where that is the id: a workspace keeps its directory
    when it goes on on a checkpoint, with another id.
    ``origin`` says at which door it was made, and got its name: "containerd" on the socket, "" in the tree or by the library.
    ``images`` are the names that it has in images/, in the order in which they came.
    """

    name: str
    kind: Kind
    id: int
    parent: str | None
    labels: Mapping[str, str]
    created: int
    updated: int
    origin: str = ""
    node: int = 0
    images: tuple[str, ...] = ()

    @property
    def created_at(self) -> datetime:
        """``created`` as an aware datetime in UTC, cut to whole microseconds."""
        return _utc(self.created)

    @property
    def updated_at(self) -> datetime:
        """``updated`` as an aware datetime in UTC, cut to whole microseconds."""
        return _utc(self.updated)


_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Usage(msgspec.Struct, frozen=True):
    """What a snapshot alone takes on disk: distinct inodes, and allocated bytes (blocks of 512); of these, as of when it was
    counted, the bytes of files that have names outside of it, too, as those of a squash have."""

    inodes: _Count = 0
    size: _Count = 0
    shared: _Count = 0


class Checkpoint(msgspec.Struct, frozen=True):
    """A state of a workspace that was kept: its number there, why, in words (may be empty), what Stat shows of the committed
    snapshot, and what that alone takes, as far as it is known without counting.  ``squash``: the name of the snapshot that
    shows the same and stands on nothing, if there is one, and its name tells."""

    number: int
    message: str
    info: Info
    usage: Usage
    squash: str = ""


class Image(msgspec.Struct, frozen=True):
    """A name in images/: what Stat shows of the committed snapshot that has it, and what that alone takes, as far as it is
    known without counting."""

    name: str
    info: Info
    usage: Usage


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one root, and of the process that has it open.

    ``snapshots``: how many there are of each kind.  ``last_id``: the highest id that was ever given out.  ``batches``: how many
    batches of so many changes were made durable since the root was opened.  ``mounts_held``: file systems mounted as rootfs.
    ``trash_waiting``: removed layers that are not yet deleted.  ``lost``: snapshots whose data the disk may have lost.
    ``copies``: how many files, with how many bytes, have been copied so far of each workspace of which a copy is being made, by
    its id.
    """

    snapshots: Mapping[Kind, int]
    last_id: int
    batches: Mapping[int, int]
    mounts_held: int
    trash_waiting: int
    lost: int
    copies: Mapping[int, tuple[int, int]]


class Mount(msgspec.Struct, frozen=True):
    """One mount of a mount spec; the fields are those of mount(8) and of the OCI runtime spec."""

    type: str
    source: str
    options: tuple[str, ...]


class Change(msgspec.Struct, frozen=True):
    """One durable change of one snapshot: created (no ``before``), removed (no ``after``), or both differ.

    ``counted`` marks the one change that is no client's doing: the usage of a committed snapshot has become known.
    ``goes_on``: a workspace was kept or rolled back, and the next change is that which it has become; or a snapshot has become
    another, with another id and what was dissolved beneath it.
    """

    before: Info | None
    after: Info | None
    counted: bool = False
    goes_on: bool = False


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _utc(ns: int) -> datetime:
    return _EPOCH + timedelta(microseconds=ns // 1000)


def rfc3339(ns: int) -> str:
    """``ns`` since the epoch as RFC 3339 in UTC with nine digits: ``2026-11-23T23:08:38.000000123Z``."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{_of_second(seconds)}.{fraction:09d}Z"


@lru_cache(maxsize=64)  # of one second there are many, each asked for again
def _of_second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"
