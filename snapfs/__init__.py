"""snapfs: containerd's overlay snapshotter as a file system, and as a library, for trio tasks::

    async with snapfs.open_snapshotter("/var/lib/snapfs") as snapshots:
        mounts = await snapshots.prepare("web")

and for everybody else (``snapfs/blocking.py``)::

    with snapfs.blocking.open_snapshotter("/var/lib/snapfs") as snapshots:
        mounts = snapshots.prepare("web")

Nothing is imported before it is asked for: the command would start several times slower.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own would import typing
if TYPE_CHECKING:
    from snapfs import blocking
    from snapfs.errors import (
        AlreadyExists,
        Busy,
        Closed,
        Damaged,
        FailedPrecondition,
        Forked,
        HasChildren,
        ImageTooBig,
        InvalidArgument,
        LabelTooBig,
        LeftOut,
        Named,
        NameTooLong,
        NotEmpty,
        NotFound,
        NoThread,
        NotPermitted,
        NotUtf8,
        Pinned,
        SnapshotError,
        Stale,
        TooDeep,
        TooManyNames,
        TryAgain,
        Unavailable,
        WrongParent,
    )
    from snapfs.labels import Labels
    from snapfs.model import Caller, Change, Checkpoint, Image, Info, Kind, Mount, Ref, Statistics, Usage
    from snapfs.opening import open_snapshotter
    from snapfs.options import Feature, Options, Sync
    from snapfs.snapshotter import OpenLayer, Snapshotter
    from snapfs.store.metastore import MetaStore
    from snapfs.store.reading import Reader
    from snapfs.store.schema import Record

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "Busy",
    "Caller",
    "Change",
    "Checkpoint",
    "Closed",
    "Damaged",
    "FailedPrecondition",
    "Feature",
    "Forked",
    "HasChildren",
    "Image",
    "ImageTooBig",
    "Info",
    "InvalidArgument",
    "Kind",
    "LabelTooBig",
    "Labels",
    "LeftOut",
    "MetaStore",
    "Mount",
    "NameTooLong",
    "Named",
    "NoThread",
    "NotEmpty",
    "NotFound",
    "NotPermitted",
    "NotUtf8",
    "OpenLayer",
    "Options",
    "Pinned",
    "Reader",
    "Record",
    "Ref",
    "SnapshotError",
    "Snapshotter",
    "Stale",
    "Statistics",
    "Sync",
    "TooDeep",
    "TooManyNames",
    "TryAgain",
    "Unavailable",
    "Usage",
    "WrongParent",
    "blocking",
    "open_snapshotter",
]

_ROOMS = {
    "Labels": "labels",
    "MetaStore": "store.metastore",
    "Reader": "store.reading",
    "Record": "store.schema",
    **dict.fromkeys(("OpenLayer", "Snapshotter"), "snapshotter"),
    "open_snapshotter": "opening",
    **dict.fromkeys(("Feature", "Options", "Sync"), "options"),
    **dict.fromkeys(
        ("Caller", "Change", "Checkpoint", "Image", "Info", "Kind", "Mount", "Ref", "Statistics", "Usage"), "model"
    ),
}
"""Where the exported names are; all others are errors."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "blocking":
        return import_module(f"{__name__}.{name}")
    value: object = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
