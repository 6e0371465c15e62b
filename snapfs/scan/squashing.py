"""Several layers become one that shows the same, made of hard links.

The new layer itself is the memory of what is hidden: layers are gone through from the nearest on, and a name that is taken
there, if only by a whiteout, is taken.  So it does not matter how many entries a directory has.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from snapfs import names
from snapfs.errors import FailedPrecondition
from snapfs.kernel import inodeflags, inside
from snapfs.kernel.mounttable import mount_id_of
from snapfs.scan.copying import clone, copy_data, open_regular
from snapfs.scan.marks import DIRECTORY, PREFIX, WHITEOUT, LayerDirectory, Marks, is_shown_by_overlay, list_xattrs, present
from snapfs.scan.walk import BATCH, PAUSED, Descriptors, Directory

_NO_LINK = (
    errno.EMLINK,
    errno.EPERM,  # immutable, append-only, fs.protected_hardlinks
    errno.EXDEV,  # another subvolume (btrfs), another project (ext4, xfs)
    errno.EOVERFLOW,  # an owner that this file system can't have
)

_ACLS = ("system.posix_acl_access", "system.posix_acl_default")


def squash(
    layers: Sequence[str],
    target: str,
    *,
    prefix: str = PREFIX,
    lowest: bool,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Fill the empty directory ``target`` with what ``layers`` show together; they are the paths that overlayfs takes, the
    nearest first, on one file system with ``target``.

    With ``lowest``, the last of ``layers`` has no parent, and ``target`` needs none: it shows alone what they show.  Else it
    shows above any other layers what ``layers`` show there: it has whiteouts and opaque directories, and a word on each path
    that one of ``layers`` has a word on, so that it may stand above some of ``layers``, too.  A single layer without parent is
    shown by a bind mount, so of that one everything stays as it is, whatever looks like a mark.

    Directories are new, and like the nearest ones.  All else are hard links to the nearest file, so that files of one inode
    stay that; or, where the file system permits no link, copies, of an inode one.  Nobody else writes in any of these
    directories meanwhile.  No link is followed, and nothing is opened but directories and regular files that are copied.
    Memory and descriptors are bounded, but for some hundred bytes for each file with several names that had to be copied.

    Blocks on the disk, so call it in a worker thread; ``checkpoint`` is called once a directory, in a large one now and then,
    and may raise.  ``prefix`` is what overlayfs's own attributes begin with where these layers are mounted.  Raises OSError
    where a layer is missing, the disk fails or is full, or something can be neither linked nor copied as it is;
    FailedPrecondition where a directory was renamed with redirect_dir=on, or a file has its data in another layer
    (metacopy=on).  What was made until then is left.
    """
    *layers, target = (os.path.realpath(path) for path in (*layers, target))
    with _Together([*layers, target]) as descriptors:
        _Squash(descriptors, prefix, checkpoint, lowest=lowest, alone=lowest and len(layers) == 1).run(layers, target)


class _Together(Descriptors):
    """Directories of one mount, without what is mounted inside: no file can be linked from one mount to another.  ``tops`` are
    paths without links."""

    def __init__(self, tops: Sequence[str]) -> None:
        super().__init__()
        self._base = os.path.commonpath(tops)
        self._fd = inside.open_top(self._base)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        os.close(self._fd)

    def open(self, name: str, parent: int | None) -> int:
        if parent is not None:
            return super().open(name, parent)
        fd = self._fd
        try:
            for part in os.path.relpath(name, self._base).split("/"):
                above, fd = fd, inside.open_directory(part, fd)
                if above != self._fd:
                    os.close(above)
        except OSError as error:
            if fd != self._fd:
                os.close(fd)
            error.filename = name
            raise
        return fd


class _Level:
    """A directory of the new layer, and those that are merged in it, the nearest first.  ``hides``: they hide what is below
    them; ``status``: what the nearest was before it was read; ``names``: of directories that are yet to be filled, ``is_lazy``:
    read from an open directory; ``has_whiteouts``: to stay."""

    __slots__ = ("has_whiteouts", "hides", "is_lazy", "names", "sources", "status", "target")

    def __init__(self, target: Directory, sources: Sequence[LayerDirectory], status: os.stat_result, *, hides: bool) -> None:
        self.target = target
        self.sources = sources
        self.status = status
        self.hides = hides
        self.names: Iterator[str] = iter(())
        self.is_lazy = False
        self.has_whiteouts = False


class _Squash:
    """One squash.  ``alone``: of a layer that is none of an overlay's."""

    def __init__(
        self, descriptors: Descriptors, prefix: str, checkpoint: Callable[[], None], *, lowest: bool, alone: bool
    ) -> None:
        self._descriptors = descriptors
        self._prefix = prefix
        self._metacopy, self._whiteout = f"{prefix}metacopy", f"{prefix}whiteout"
        self._checkpoint = checkpoint
        self._lowest = lowest
        self._alone = alone
        self._marks = Marks(descriptors, prefix, checkpoint, alone=alone)
        self._lazy = 0
        self._copies: dict[tuple[int, int], tuple[Directory, str]] = {}  # by device and inode
        self._flags: list[tuple[Directory, str, int]] = []  # of these; with them no further name could be linked

    def run(self, layers: Sequence[str], target: str) -> None:
        roots = [LayerDirectory(layer, None, self._lowest and layer is layers[-1]) for layer in layers]
        for root in roots:
            self._marks.read(root)  # overlayfs merges the roots, opaque or not; this only learns of whiteouts
        stack = [self._filled(Directory(target), roots, hides=False)]
        while stack:
            level = stack[-1]
            name = next(level.names, None)
            if name is not None:
                sources, hides = self._marks.merged(name, level.sources)
                if sources[-1].redirected:
                    raise _refusal("was renamed in an overlay with redirect_dir=on: its files are elsewhere", sources[-1])
                stack.append(self._filled(Directory(name, level.target), sources, hides=hides))
            else:
                stack.pop()
                self._finish(level)
        for directory, name, flags in self._flags:
            _add_flags(self._descriptors.get(directory), name, flags)

    def _filled(self, target: Directory, sources: Sequence[LayerDirectory], *, hides: bool) -> _Level:
        """The level of ``target``, with all entries that ``sources`` show; its directories are empty as yet."""
        self._checkpoint()
        status = os.fstat(self._descriptors.get(sources[0]))
        level = _Level(target, sources, status, hides=hides)
        fd = self._descriptors.get(target)
        self._descriptors.hold(target)
        keeps_whiteouts = not self._lowest and not hides
        directories = whiteouts = 0
        for source in sources:
            self._descriptors.hold(source)
            for name, kind in self._marks.entries(source):
                if kind == DIRECTORY:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                        directories += 1
                elif kind != WHITEOUT or keeps_whiteouts or source is not sources[-1]:
                    whiteouts += self._place(source, name, target) or kind == WHITEOUT
            self._descriptors.let_go(source)
        level.has_whiteouts = keeps_whiteouts and whiteouts > 0
        if whiteouts and not keeps_whiteouts:
            _remove_whiteouts(fd)
        if directories > BATCH and self._lazy < PAUSED:
            level.is_lazy = True
            self._lazy += 1
            level.names = _directories(fd)
        elif directories:
            level.names = iter(list(_directories(fd)))
        self._descriptors.let_go(target)
        return level

    def _finish(self, level: _Level) -> None:
        """Make the directory of ``level`` like its nearest source, now that nothing more is made in it."""
        nearest, target = level.sources[0], level.target
        self._descriptors.hold(nearest)
        source = self._descriptors.get(nearest)
        fd = self._descriptors.get(target)
        with _about(nearest):
            self._dress(f"/proc/self/fd/{source}/.", f"/proc/self/fd/{fd}/.", level.status)
            for name, value in self._marks_of(level).items():
                os.setxattr(fd, name, value)
            inodeflags.add_flags(fd, inodeflags.flags_to_copy(source))
        self._lazy -= level.is_lazy
        for directory in (target, *level.sources):
            self._descriptors.close(directory)

    def _marks_of(self, level: _Level) -> dict[str, bytes]:
        """What overlayfs is to read of the new directory."""
        if level.hides and not self._lowest:
            return {f"{self._prefix}opaque": b"y"}
        if level.has_whiteouts and level.target.parent is not None:
            # With nothing to merge it with, the kernel looks for whiteouts in it only where it seems to have been copied up
            return {f"{self._prefix}origin": b""}
        return {}

    def _place(self, source: LayerDirectory, name: str, target: Directory) -> bool:
        """Put the file ``name`` of ``source``, which is no directory, in ``target``, unless that has the name; whether it was
        a whiteout that is a regular file, in the place of which there is a device now."""
        try:
            os.link(name, name, src_dir_fd=source.fd, dst_dir_fd=target.fd, follow_symlinks=False)
        except FileExistsError:
            return False
        except OSError as error:
            with _about(source, name):
                if error.errno not in _NO_LINK:
                    raise
                self._copy(source.fd, name, target)
        if self._alone:
            return False
        marks = present(f"/proc/self/fd/{source.fd}/{name}", (self._metacopy, self._whiteout))
        found = os.stat(name, dir_fd=source.fd, follow_symlinks=False) if marks else None
        if found is None or not stat.S_ISREG(found.st_mode):
            return False
        if self._metacopy in marks:
            raise _refusal("was changed in an overlay with metacopy=on: its data is in another layer", source, name)
        if found.st_size:
            return False
        os.unlink(name, dir_fd=target.fd)
        os.mknod(name, stat.S_IFCHR, dir_fd=target.fd)
        return True

    def _copy(self, source: int, name: str, target: Directory) -> None:
        """Put a copy of the file ``name``, of the directory open as ``source``, in ``target``, or a link to the one that there
        is of its inode."""
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        inode = status.st_dev, status.st_ino
        if inode in self._copies and self._is_linked(*self._copies[inode], name, target.fd):
            return
        flags = 0
        if stat.S_ISREG(status.st_mode):
            flags = _copy_regular(source, name, target.fd)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target.fd)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target.fd)
        self._dress(f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target.fd}/{name}", status)
        if status.st_nlink > 1:
            self._copies[inode] = target, name
        if flags and status.st_nlink > 1:
            self._flags.append((target, name, flags))
        elif flags:
            _add_flags(target.fd, name, flags)

    def _is_linked(self, directory: Directory, copy: str, name: str, target: int) -> bool:
        """Whether ``name``, of the directory open as ``target``, could be made a link to ``copy`` of ``directory``."""
        try:
            os.link(copy, name, src_dir_fd=self._descriptors.get(directory), dst_dir_fd=target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.ENOENT):  # the latter of a whiteout (``_place``)
                raise
            return False
        return True

    def _dress(self, source: str, target: str, status: os.stat_result) -> None:
        """Give the new file or directory ``target`` what ``source`` has besides its data: ``status``, extended attributes.  A
        directory gets those that an overlay shows, as long as it is one that shows them."""
        is_directory = stat.S_ISDIR(status.st_mode)
        os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
        listed = list_xattrs(source)
        for name in list_xattrs(target):
            if name in _ACLS and name not in listed:  # inherited
                os.removexattr(target, name, follow_symlinks=False)
        for name in listed:
            if not is_directory or self._alone or is_shown_by_overlay(name, self._prefix):
                os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(target, stat.S_IMODE(status.st_mode))  # after the ACL, which changes it, and the owner, which clears bits
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy_regular(source: int, name: str, target: int) -> int:
    """Copy the data of the regular file ``name`` from one open directory to another; its flags, which the copy is to have."""
    reading = open_regular(name, source)
    try:
        if mount_id_of(reading) != mount_id_of(source):
            raise OSError(errno.EBUSY, "Something is mounted on it")
        status = os.fstat(reading)
        writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            if status.st_size and not clone(reading, writing):
                copy_data(reading, writing, status)
        finally:
            os.close(writing)
        return inodeflags.flags_to_copy(reading)
    finally:
        os.close(reading)


def _add_flags(directory: int, name: str, flags: int) -> None:
    """Set ``flags`` of the regular file ``name`` in the directory open as ``directory``."""
    fd = open_regular(name, directory)
    try:
        inodeflags.add_flags(fd, flags)
    finally:
        os.close(fd)


def _listed(fd: int) -> Iterator[os.DirEntry[str]]:
    """The entries of the directory open as ``fd``, read as they are needed.  It is opened anew: btrfs tells of no entry that is
    younger than the descriptor."""
    fresh = os.open(".", inside.FLAGS, dir_fd=fd)
    try:
        with os.scandir(fresh) as entries:
            yield from entries
    finally:
        os.close(fresh)


def _directories(fd: int) -> Iterator[str]:
    """The names of the directories in the one open as ``fd``, read as they are needed."""
    return (entry.name for entry in _listed(fd) if entry.is_dir(follow_symlinks=False))


def _remove_whiteouts(fd: int) -> None:
    """Remove all devices 0/0 from the directory open as ``fd``."""
    for entry in _listed(fd):
        if not (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False) or entry.is_symlink()):
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
                os.unlink(entry.name, dir_fd=fd)


def _path(directory: Directory, name: str | None = None) -> str:
    """The path of ``directory``, or of ``name`` in it, as a sentence shows it."""
    parts = [] if name is None else [name]
    above: Directory | None = directory
    while above is not None:
        parts.append(above.name)
        above = above.parent
    return names.shown("/".join(reversed(parts)))


def _refusal(why: str, directory: Directory, name: str | None = None) -> FailedPrecondition:
    """That ``directory``, or ``name`` in it, can't be part of a layer that stands for several."""
    what = "file" if name is not None else "directory"
    return FailedPrecondition(
        f"{_path(directory, name)} {why}, so that this layer can't be merged with others",
        public=f"a {what} {why}, so that this layer can't be merged with others",
    )


@contextmanager
def _about(directory: Directory, name: str | None = None) -> Iterator[None]:
    """An OSError in here names ``directory``, or ``name`` in it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, _path(directory, name)) from error
