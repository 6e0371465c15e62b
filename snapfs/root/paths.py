"""The paths of what is in one ROOT: by name, as users, mount specs and mount tables have them; and by way of the descriptor
that holds ROOT, which leads there whatever becomes of the name."""

from __future__ import annotations

import os

from snapfs.kernel import shelter
from snapfs.root.claim import RECORDS


class Paths:
    """The paths of the root called ``root``, which is held open: ``held`` is a path of the descriptor.

    ``naming`` is for a block that reaches ROOT by that: errors that leave it tell paths by their names."""

    def __init__(self, root: str, held: str) -> None:
        self.root = root
        self.held = held
        self.records = f"{root}/{RECORDS}"
        self.snapshots = f"{root}/snapshots"
        self.rootfs_directory = f"{root}/rootfs"
        self.lost_found = f"{root}/lost+found"
        self.naming = Naming(root, held)

    def held_path(self, path: str) -> str:
        """``path``, the name of something in ROOT, by way of the descriptor."""
        return self.held + path[len(self.root) :]

    def held_directory(self, number: int) -> str:
        """``directory``, by way of the descriptor."""
        return f"{self.held}/snapshots/{number}"

    def directory(self, number: int) -> str:
        """ROOT/snapshots/<id>: the directory of snapshot ``number``."""
        return f"{self.snapshots}/{number}"

    def fs(self, number: int) -> str:
        """ROOT/snapshots/<id>/fs: the snapshot's own layer."""
        return f"{self.snapshots}/{number}/fs"

    def work(self, number: int) -> str:
        """ROOT/snapshots/<id>/work: the work directory that overlayfs needs, of an active snapshot."""
        return f"{self.snapshots}/{number}/work"

    def shelter(self, number: int) -> str:
        """ROOT/rootfs/<id>: the directory in which the snapshot's merged file system is mounted
        (``snapfs/kernel/shelter.py``)."""
        return f"{self.rootfs_directory}/{number}"

    def rootfs(self, number: int) -> str:
        """ROOT/rootfs/<id>/fs: where the snapshot's merged file system is mounted."""
        return f"{self.shelter(number)}/{shelter.INSIDE}"

    def is_rootfs(self, path: str) -> bool:
        """Whether ``path`` is the ``rootfs`` of any snapshot."""
        return os.path.basename(path) == shelter.INSIDE and os.path.dirname(os.path.dirname(path)) == self.rootfs_directory


class Naming:
    """For a block that reaches ROOT by the descriptor: errors that leave it tell paths by their names."""

    def __init__(self, root: str, held: str) -> None:
        self._root = root + "/"
        self._held = held + "/"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            self.name(error)

    def name(self, error: OSError) -> None:
        """Have ``error`` tell its paths by their names."""
        for which in ("filename", "filename2"):
            path = getattr(error, which)
            if isinstance(path, str) and path.startswith(self._held):
                setattr(error, which, self._root + path[len(self._held) :])
