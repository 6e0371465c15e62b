"""snapfs: containerd's overlay snapshotter as a file system, and as a library::

async with open_snapshotter("/var/lib/snapfs") as snapshotter:
    mounts = await snapshotter.prepare("work")

Nothing is imported before it is asked for: the command would start several times slower.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own would import typing
if TYPE_CHECKING:
    from snapfs.errors import (
        AlreadyExists,
        Damaged,
        FailedPrecondition,
        InvalidArgument,
        NotFound,
        SnapshotError,
        Unavailable,
    )
    from snapfs.model import Change, Info, Kind, Mount, Usage
    from snapfs.opening import open_snapshotter
    from snapfs.options import Options
    from snapfs.snapshotter import Snapshotter
    from snapfs.store.metastore import MetaStore

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

_ROOMS = {
    "MetaStore": "store.metastore",
    "Options": "options",
    "Snapshotter": "snapshotter",
    "open_snapshotter": "opening",
    **dict.fromkeys(("Change", "Info", "Kind", "Mount", "Usage"), "model"),
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
