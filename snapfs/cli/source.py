"""The directory that ``snapfs adopt`` is given, and where it must not lie."""

from __future__ import annotations

import errno
import os

from snapfs import names
from snapfs.cli.refusal import BUSY, FAILED, NOT_FOUND, NOT_PERMITTED, USAGE, Refusal
from snapfs.errors import SnapshotError
from snapfs.kernel.mounttable import mount_id_of, mount_table
from snapfs.root.mounted import origin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from snapfs.cli.place import MountedTree

_NO_FILES = (
    *("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "devpts", "bpf", "pstore"),
    *("efivarfs", "selinuxfs", "mqueue", "binfmt_misc", "fusectl", "nsfs", "autofs"),
)


class Source:
    """The directory that is adopted, open as ``fd``; ``path`` has no links, ``text`` is what the labels have for it.  A context
    manager.  Raises Refusal."""

    def __init__(self, word: str) -> None:
        try:
            self.fd = os.open(word, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            status = {errno.ENOENT: NOT_FOUND, errno.EACCES: NOT_PERMITTED}.get(error.errno or 0, FAILED)
            raise Refusal(f"cannot adopt {word}: {error.strerror}", status) from None
        self.path = os.readlink(f"/proc/self/fd/{self.fd}")
        self.text = names.path_as_text(self.path)
        try:
            is_there = os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fd))
        except OSError:
            is_there = False
        if not is_there:
            self.close()
            raise Refusal(f"cannot adopt {word}: it has no path here: it was moved, or is of a snapshot", NOT_FOUND)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def key(self) -> str:
        """What the workspace is called where nobody says how."""
        name = os.path.basename(self.path)
        try:
            names.encode(name)
        except SnapshotError:
            raise Refusal(f"{self.path} has no name that a key can have: give one: snapfs adopt DIR KEY", USAGE) from None
        return name

    def is_empty(self) -> bool:
        with os.scandir(self.fd) as entries:
            return next(entries, None) is None

    def refuse_misplaced(self, place: MountedTree, options: dict[str, Any]) -> None:
        """Raise Refusal where it lies in the tree, in ROOT or in a snapshot, or holds them, or something is mounted inside."""
        mounts, number = list(mount_table()), mount_id_of(self.fd)
        root: str = options["root"]
        own = next((mount for mount in mounts if mount.id == number), None)
        if own is None:
            raise Refusal(f"{self.path} is in another mount namespace: adopt it there")
        if own.type in _NO_FILES:
            raise Refusal(f"{self.path} shows what the kernel tells ({own.type}), and holds no files: adopt another directory")
        of_snapshot = f"{self.path} shows a snapshot: snapfs fork makes another workspace of one"
        if own.type == "overlay" and any(f"{root}/snapshots/" in option for option in own.super_options):
            raise Refusal(of_snapshot)
        if own.type == "fuse.snapfs":
            raise Refusal(f"{self.path} lies in a tree: snapfs fork makes another workspace of a snapshot")
        here, there = origin(self.path), origin(root)
        for what, path in (("the tree", os.path.realpath(place.path)), ("the tree's ROOT", os.path.realpath(root))):
            if _is_in(self.path, path):
                raise Refusal(f"{self.path} lies in {what}, {path}: snapfs fork makes another workspace of a snapshot")
            if _is_in(path, self.path):
                raise Refusal(f"{self.path} holds {what}, {path}: adopt a directory beside it")
        if here is not None and there is not None and here[0] == there[0]:  # by a bind mount, say
            if _is_in(here[1], there[1]):
                raise Refusal(of_snapshot if "/snapshots/" in here[1] else f"{self.path} lies in the tree's ROOT, {root}")
            if _is_in(there[1], here[1]):
                raise Refusal(f"{self.path} holds the tree's ROOT, {root}, by another path: adopt a directory beside it")
        inside = next((mount.target for mount in mounts if mount.target != self.path and _is_in(mount.target, self.path)), None)
        if inside is not None:
            raise Refusal(f"{inside} is mounted inside {self.path}: unmount it first (umount {names.word(inside)})", BUSY)


def _is_in(path: str, directory: str) -> bool:
    return f"{path}/".startswith(f"{directory.rstrip('/')}/")
