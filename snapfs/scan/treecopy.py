"""A copy of a directory that is no layer yet, for the layer of a snapshot without a parent; whether it can be moved there.

The copy is exact, and of one moment, as that of a layer is (``layercopy.py``).  What overlayfs would read as its own is
refused: below a workspace it would hide files, or show others.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence

from snapfs.kernel import inside
from snapfs.scan.copying import VANISHED
from snapfs.scan.layercopy import LayerCopy, attributes, set_attributes
from snapfs.scan.marks import list_xattrs
from snapfs.scan.walk import Descriptors, Directory

COARSE = 1_000_000_000  # nanoseconds: a grain of times that most file systems have, or a finer one

Ids = tuple[Sequence[range], Sequence[range]]
"""Uids, and gids."""

_OF_USERS = ("user.", "system.posix_acl_")


class Unfit(Exception):
    """The directory can't become a layer as it is: something in it has no place there.  The text goes on from its ``path``."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(why)
        self.path = path


class TreeCopy(LayerCopy):
    """A copy of the directory open as ``source`` in ``target``, an empty directory, by a user who may read it; ``stale`` is
    another directory of the file system of ``target``.  Nobody else can enter the latter two.  The class's base says what the
    copy is like, and what memory it takes.

    ``prefix`` is what the attributes begin with that overlayfs reads of the layer.  ``ids``: those that owners can have there;
    None where all can.  What has another owner is the user's in the copy; ``foreign`` and ``bare`` are the path of one such
    file, and of one that lacks an attribute, which just root may set; "" where there is none.  ``size`` and ``files`` are as in
    the base.

    All that it does raises OSError, and Unfit; ``complete`` raises TryAgain, too."""

    def __init__(
        self,
        source: int,
        target: str,
        stale: str,
        *,
        prefix: str,
        ids: Ids | None,
        flush: Callable[[], None],
        checkpoint: Callable[[], None],
    ) -> None:
        super().__init__(f"/proc/self/fd/{source}/.", target, stale, flush=flush, checkpoint=checkpoint)
        self.foreign = ""
        self.bare = ""
        self._prefix = prefix
        self._ids = ids
        self._own = os.geteuid(), os.getegid()
        if os.fstat(source).st_dev != os.stat(target).st_dev:
            self.grain = max(self.grain, COARSE)  # of its times nothing is known
            self.tick = max(self.tick, self.grain)

    def sources(self) -> Descriptors:
        return Outside()

    def attributes(self, file: int | str) -> dict[str, bytes]:
        found = attributes(file)
        refuse_marks(file, found, self._prefix)
        return found

    def make_node(self, name: str, status: os.stat_result, directory: int) -> None:
        path = f"/proc/self/fd/{directory}/{name}"
        refuse_whiteout(path, status)
        try:
            super().make_node(name, status, directory)
        except PermissionError:
            raise Unfit(name_of(path), "is a device, which root alone can make") from None

    def dress(self, file: int | str, status: os.stat_result, found: dict[str, bytes], read: int) -> None:
        if self._ids is None:
            set_attributes(file, status, found, read)
            return
        follow = isinstance(file, int)
        uid = status.st_uid if _is_in(status.st_uid, self._ids[0]) else self._own[0]
        gid = status.st_gid if _is_in(status.st_gid, self._ids[1]) else self._own[1]
        try:
            os.chown(file, uid, gid, follow_symlinks=follow)
        except PermissionError:
            uid, gid = self._own
        mode = stat.S_IMODE(status.st_mode)
        if (uid, gid) != (status.st_uid, status.st_gid):
            self.foreign = self.foreign or name_of(file)
            mode &= ~(stat.S_ISUID | stat.S_ISGID) if not stat.S_ISDIR(status.st_mode) else mode
        for name in attributes(file):  # it inherits some from its directory
            if name not in found:
                os.removexattr(file, name, follow_symlinks=follow)
        for name, value in sorted(found.items(), reverse=True):  # users' before an ACL, which changes the mode
            try:
                os.setxattr(file, name, value, follow_symlinks=follow)
            except OSError as error:
                if name.startswith(_OF_USERS) or error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
                self.bare = self.bare or name_of(file)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(file, mode)
        os.utime(file, ns=(read, status.st_mtime_ns), follow_symlinks=follow)


class Outside(Descriptors):
    """Directories outside of ROOT, of which the first is one that is open: its path is ``/proc/self/fd/N/.``."""

    def open(self, name: str, parent: int | None) -> int:
        return os.open(name, inside.FLAGS) if parent is None else inside.open_directory(name, parent)


def refuse_marks(file: int | str, names: Sequence[str] | dict[str, bytes], prefix: str) -> None:
    """Raise Unfit where ``file``, a descriptor or a path, whose extended attributes are ``names``, has one that begins with
    ``prefix``."""
    for name in names:
        if name.startswith(prefix):
            raise Unfit(name_of(file), f"has the attribute {name}, which overlayfs reads as its own")


def refuse_whiteout(path: str, status: os.stat_result) -> None:
    """Raise Unfit where ``path`` is a device that says to overlayfs that there is no file."""
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        raise Unfit(name_of(path), "is a device 0:0, which overlayfs reads as a file that was deleted")


def name_of(file: int | str) -> str:
    """The path of ``file``, a descriptor or a path by one (``/proc/self/fd/N/NAME``)."""
    if isinstance(file, int):
        return os.readlink(f"/proc/self/fd/{file}")
    directory, _, name = file.rpartition("/")
    return f"{os.readlink(directory)}/{name}"


def refuse_immovable(source: int, prefix: str, ids: Ids | None, checkpoint: Callable[[int], None]) -> None:
    """Raise Unfit unless the directory open as ``source`` can become a layer by a rename, with all that is in it; OSError.

    ``checkpoint`` is called once a directory, with how many files were looked at so far.  Memory is bounded, but for the names
    of directories that are yet to be looked at, and a hundred bytes for each file with several names."""
    several: dict[tuple[int, int], tuple[int, str]] = {}  # of how many names are still to be found, and one of them
    count = 0
    with Outside() as descriptors:
        pending = [Directory(f"/proc/self/fd/{source}/.")]
        while pending:
            directory = pending.pop()
            fd = descriptors.get(directory)
            if fd < 0:
                continue
            checkpoint(count)
            _refuse_owner(fd, os.fstat(fd), ids)
            refuse_marks(fd, list_xattrs(fd), prefix)
            with os.scandir(fd) as entries:
                for entry in entries:
                    count += 1
                    try:
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            pending.append(Directory(entry.name, directory))
                            continue
                        path = f"/proc/self/fd/{fd}/{entry.name}"
                        _refuse_owner(path, status, ids)
                        refuse_whiteout(path, status)
                        refuse_marks(path, list_xattrs(path), prefix)
                    except OSError as error:
                        if error.errno not in VANISHED:
                            raise
                        continue
                    if status.st_nlink > 1:
                        inode = status.st_dev, status.st_ino
                        left, _ = several.get(inode, (status.st_nlink, ""))
                        several[inode] = left - 1, "" if left == 1 else name_of(path)
                        if left == 1:
                            del several[inode]
            if not pending or pending[-1].parent is not directory:
                descriptors.close(directory)
    for _, path in several.values():
        raise Unfit(path, "has another name outside of it, by which the base could be changed")


def _refuse_owner(file: int | str, status: os.stat_result, ids: Ids | None) -> None:
    if ids is not None and not (_is_in(status.st_uid, ids[0]) and _is_in(status.st_gid, ids[1])):
        raise Unfit(name_of(file), f"belongs to user {status.st_uid} and group {status.st_gid}, which it could not keep")


def _is_in(number: int, ranges: Sequence[range]) -> bool:
    return any(number in each for each in ranges)
