"""What overlayfs reads of a layer: whiteouts, opaque directories, redirects, which attributes are its own.

Source: the kernel's ``Documentation/filesystems/overlayfs.rst`` and, where that is silent, ``fs/overlayfs/namei.c``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from snapfs.scan.walk import BATCH, Descriptors, Directory

PREFIX = "trusted.overlay."
"""What the names of overlayfs's own attributes begin with; "user.overlay." where overlays are mounted with userxattr.  The
kernel obeys those alone, and shows the others like any attribute: every user can set them."""

# What an entry of a layer is; a name without one is looked for in the next layer below.
OTHER: Final = 0
DIRECTORY: Final = 1
WHITEOUT: Final = 2
FILE: Final = 3
"""OTHER that is a regular file, where that is asked for (``Marks.regular``)."""


class LayerDirectory(Directory):
    """A directory of one layer.  ``xwhiteouts``: empty files in it may be whiteouts; ``lowest``: of the last layer;
    ``redirected``: its contents come from a directory of another name."""

    __slots__ = ("lowest", "redirected", "xwhiteouts")

    def __init__(self, name: str, parent: LayerDirectory | None, lowest: bool) -> None:
        super().__init__(name, parent)
        self.lowest = lowest
        self.xwhiteouts = False
        self.redirected = False


class Marks:
    """Reads the marks of layers whose directories ``descriptors`` opens; names of marks begin with ``prefix``.  ``alone``: the
    layer has no parents.  Then it is bind-mounted, and what looks like a whiteout is shown as the device or file that it is;
    once it is a lower layer of a child's overlay, the kernel hides it there.

    Each method raises OSError where the disk fails."""

    def __init__(self, descriptors: Descriptors, prefix: str, checkpoint: Callable[[], None], *, alone: bool) -> None:
        self._descriptors = descriptors
        self._alone = alone
        self._checkpoint = checkpoint
        self.regular = OTHER
        """What an entry is that is a regular file: OTHER, or FILE."""
        self._opaque, self._redirect, self._whiteout = f"{prefix}opaque", f"{prefix}redirect", f"{prefix}whiteout"

    def read(self, directory: LayerDirectory) -> bool | None:
        """Whether overlayfs's marks on ``directory`` hide the directories below it; None where it has vanished.  Notes what
        else they say: that empty files in it may be whiteouts, that its contents come from a directory of another name."""
        fd = self._descriptors.get(directory)
        if fd < 0:
            return None
        redirected = False
        for name in present(fd, (self._opaque, self._redirect)):
            if name == self._opaque:
                value = xattr(fd, name)
                if value == b"y":
                    return True  # and overlayfs does not look for a redirect
                directory.xwhiteouts |= value == b"x" and not self._alone
            elif name == self._redirect:
                redirected = directory.parent is not None and not directory.lowest
        directory.redirected = redirected
        return False

    def merged(self, name: str, parents: Sequence[LayerDirectory]) -> tuple[list[LayerDirectory], bool]:
        """The directories ``name`` in ``parents``, which are merged, that are merged there, the nearest first; and whether they
        hide what layers below have at that name."""
        found: list[LayerDirectory] = []
        for parent in parents:
            directory = LayerDirectory(name, parent, parent.lowest)
            ends = self.read(directory)
            if ends is not None:
                found.append(directory)
            elif self.kind(parent, name) is not None:
                return found, True
            if ends or directory.redirected:
                return found, True
        return found, False

    def entries(self, directory: LayerDirectory) -> Iterator[tuple[str, int]]:
        """All entries of ``directory``, a batch at a time, and what they are; none where it has vanished."""
        fd = self._descriptors.get(directory)
        if fd >= 0:
            with os.scandir(fd) as entries:
                while some := list(islice(entries, BATCH)):
                    yield from self.kinds(directory, some).items()
                    self._checkpoint()

    def kinds(self, directory: LayerDirectory, entries: Iterable[os.DirEntry[str]]) -> dict[str, int]:
        """What these entries of ``directory`` are, by name."""
        found: dict[str, int] = {}
        xwhiteouts, regular = directory.xwhiteouts, self.regular
        for entry in entries:
            if not xwhiteouts and entry.is_file(follow_symlinks=False):
                found[entry.name] = regular
            elif entry.is_symlink():
                found[entry.name] = OTHER
            elif entry.is_dir(follow_symlinks=False):
                found[entry.name] = DIRECTORY
            elif (kind := self.kind(directory, entry.name)) is not None:
                found[entry.name] = kind
        return found

    def kind(self, directory: LayerDirectory, name: str) -> int | None:
        """What the entry ``name`` of ``directory`` is; None where there is no such entry."""
        fd = self._descriptors.get(directory)
        if fd < 0:
            return None
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                return DIRECTORY
            if stat.S_ISCHR(found.st_mode):
                return WHITEOUT if found.st_rdev == 0 and not self._alone else OTHER
            if directory.xwhiteouts and stat.S_ISREG(found.st_mode) and found.st_size == 0:
                # Not opened, since it may be a device by now; and there is no listxattrat(2) before Linux 6.13.
                return WHITEOUT if _has(f"/proc/self/fd/{fd}/{name}", self._whiteout) else OTHER
        except FileNotFoundError:
            return None
        return self.regular if stat.S_ISREG(found.st_mode) else OTHER


def is_shown_by_overlay(name: str, prefix: str = PREFIX) -> bool:
    """Whether an overlay shows the extended attribute ``name`` of its layers; its own, which begin with ``prefix``, it
    doesn't, but those that an overlay inside it has set."""
    return not name.startswith(prefix) or name.startswith(f"{prefix}overlay.")


def list_xattrs(file: int | bytes | str) -> list[str]:
    """The names of all extended attributes of ``file``, a descriptor or a path, of which no last link is followed; none where
    the file system has no attributes.  Raises OSError."""
    try:
        return os.listxattr(file, follow_symlinks=isinstance(file, int))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise


def xattr(fd: int, name: str) -> bytes | None:
    """The value of an extended attribute of the file open as ``fd``; None where the attribute has vanished."""
    try:
        return os.getxattr(fd, name)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise


def present(file: int | str, names: Sequence[str]) -> list[str]:
    """Which of the extended attributes ``names`` has ``file``, a descriptor or a path, of which no last link is followed.
    Raises OSError."""
    try:
        listed = list_xattrs(file)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        return [name for name in names if _has(file, name)]
    return [name for name in names if name in listed] if listed else []


def _has(file: int | str, name: str) -> bool:
    """Whether ``file`` has one attribute; there may be too many to be listed."""
    try:
        os.getxattr(file, name, follow_symlinks=isinstance(file, int))
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP):
            raise
        return False
    return True
