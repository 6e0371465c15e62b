"""snapfs: containerd's overlay snapshotter as a file system, and as a library::

async with open_snapshotter("/var/lib/snapfs") as snapshotter:
    mounts = await snapshotter.prepare("work")
"""

from snapfs.errors import (
    AlreadyExists,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotError,
    Unavailable,
)
from snapfs.metastore import MetaStore
from snapfs.model import Change, Info, Kind, Mount, Usage
from snapfs.opening import open_snapshotter
from snapfs.options import Options
from snapfs.snapshotter import Snapshotter

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "Change",
    "Damaged",
    "FailedPrecondition",
    "Info",
    "InvalidArgument",
    "Kind",
    "MetaStore",
    "Mount",
    "NotFound",
    "Options",
    "SnapshotError",
    "Snapshotter",
    "Unavailable",
    "Usage",
    "open_snapshotter",
]
