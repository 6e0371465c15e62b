"""Files made as a plan says, in a directory that nobody else gets into: copies of what is elsewhere."""

from __future__ import annotations

import base64
import errno
import os
import stat
from contextlib import suppress

from snapfs.applying.entries import Entry, Held, Seen
from snapfs.applying.plan import NEW, OLD, Plan
from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.kernel.inodeflags import FIXED, flags_to_copy
from snapfs.scan.copying import clone, copy_data

_FORMATS = {"p": stat.S_IFIFO, "s": stat.S_IFSOCK, "c": stat.S_IFCHR, "b": stat.S_IFBLK}


class Changed(Exception):
    """What is at ``path`` is no longer what it was."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self.path = path


def stage(plan: Plan, wanted: Seen, staging: Held, found: dict[int, tuple[Held, bytes]]) -> None:
    """Make all that the plan puts in place, each step's in ``staging`` by its number.  ``found``: files that are there already,
    by the inode that the plan tells, of which what is made is to be another name.  Raises Changed, and OSError with the path
    as ``filename``."""
    for step in plan.places():
        slot = b"%d" % step.number
        directories = False
        for path, entry in plan.entries(NEW, step.path) if step.has else ():
            directories |= entry.kind == "d"
            new = slot + path[len(step.path) :]
            try:
                if entry.is_linked:
                    first = plan.first_name(entry, new)
                    if first is not None:
                        _link(staging, first, staging, new)
                        continue
                    if entry.ino in found:
                        _link(*found[entry.ino], staging, new)
                        continue
                _make(entry, wanted, path, staging, new)
                if entry.kind != "d":
                    parent, name = staging.parent(new)
                    dress(f"/proc/self/fd/{parent}/{os.fsdecode(name)}", entry, follow=False)
            except OSError as error:
                error.filename = path
                raise
        for path, entry in plan.entries(NEW, step.path, backwards=True) if directories else ():
            if entry.kind == "d":
                try:
                    parent, name = staging.parent(slot + path[len(step.path) :])
                    if path == step.path and os.geteuid() != 0:  # else it can't be moved
                        entry = entry._replace(mode=entry.mode | stat.S_IWUSR)
                    dress(f"/proc/self/fd/{parent}/{os.fsdecode(name)}", entry, follow=False)
                except OSError as error:
                    error.filename = path
                    raise
        made = staging.look(slot) if step.has else None
        plan.stage(step.number, made.ino if made is not None else 0)


def keep(plan: Plan, target: Held, kept: Held) -> None:
    """Copy what the plan replaces and deletes into ``kept``, at the same paths; of files that are no directories, regular files
    or links the plan alone tells.  Raises as ``stage`` does, also where something could not be removed afterwards."""
    made = b""  # the last directory that was made, or found
    for step in plan.places():
        if not step.had:
            continue
        above, directory = step.path.rpartition(b"/")[0], b""
        for name in above.split(b"/") if above not in (b"", made) else ():
            directory = directory + b"/" + name if directory else name
            with suppress(FileExistsError):
                parent, last = kept.parent(directory)
                os.mkdir(last, 0o755, dir_fd=parent)
        made = above
        for path, entry in plan.entries(OLD, step.path):
            if entry.kind in "dfl":
                try:
                    if entry.kind in "df":
                        _refuse_fixed(target, path, entry)
                    _make(entry, target, path, kept, path)
                    if entry.kind == "f":
                        parent, name = kept.parent(path)
                        where = f"/proc/self/fd/{parent}/{os.fsdecode(name)}"
                        os.chmod(where, entry.mode & 0o777)
                        os.utime(where, ns=(entry.atime, entry.mtime))
                except OSError as error:
                    error.filename = path
                    raise


def _refuse_fixed(target: Held, path: bytes, entry: Entry) -> None:
    """Raise PermissionError where this user can't remove what is at ``path``, or what is in there: it is immutable, or
    another's directory."""
    file = target.content(path) if entry.kind == "f" else target.directory(path)
    try:
        is_ours = entry.kind == "f" or entry.uid == os.geteuid()
        if not is_ours and not os.access(f"/proc/self/fd/{file}", os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if flags_to_copy(file) & FIXED:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
    finally:
        os.close(file)


def _make(entry: Entry, tree: Seen, path: bytes, into: Held, new: bytes) -> None:
    """Make ``new`` of what ``entry`` is in ``tree``, at ``path``; for this user alone."""
    parent, name = into.parent(new)
    if entry.kind == "d":
        os.mkdir(name, 0o700, dir_fd=parent)
    elif entry.kind == "l":
        os.symlink(entry.link, name, dir_fd=parent)
    elif entry.kind != "f":
        os.mknod(name, _FORMATS[entry.kind] | 0o600, entry.rdev, dir_fd=parent)
    else:
        source = tree.content(path)
        if source is None:
            raise Changed(path)
        try:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
            try:
                before = os.fstat(source)
                if not clone(source, file):
                    copy_data(source, file, before)
                for seen in (before, os.fstat(source)):
                    if (seen.st_size, seen.st_mtime_ns) != (entry.size, entry.mtime):
                        raise Changed(path)
            finally:
                os.close(file)
        finally:
            os.close(source)


def _link(tree: Held, path: bytes, into: Held, new: bytes) -> None:
    """Make ``new`` another name of what is at ``path``."""
    parent, name = tree.parent(path)
    source = os.dup(parent)  # ``into`` may be the same tree
    try:
        directory, last = into.parent(new)
        os.link(name, last, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(source)


def dress(path: str, entry: Entry, *, follow: bool) -> None:
    """Give what is at ``path``, which nobody else can exchange, what belongs to ``entry`` besides what it holds, as far as it
    hasn't got that.  ``follow``: the path is a link of /proc to it.  Raises OSError."""
    now = os.stat(path, follow_symlinks=follow)
    if (now.st_uid, now.st_gid) != (entry.uid, entry.gid):
        os.chown(path, entry.uid, entry.gid, follow_symlinks=follow)
    if entry.kind != "l":
        _set_attributes(path, entry.attributes, follow)
        if stat.S_IMODE(os.stat(path, follow_symlinks=follow).st_mode) != entry.mode:  # by now, for owners and ACLs change it
            os.chmod(path, entry.mode)
    if now.st_mtime_ns != entry.mtime:
        os.utime(path, ns=(entry.atime, entry.mtime), follow_symlinks=follow)


def dress_directory(held: Held, path: bytes, entry: Entry) -> None:
    """The same for a directory of ``held``; raises OSError with the path as ``filename``."""
    fd = open_beneath(path, held.top, LOOK | os.O_DIRECTORY)
    try:
        dress(f"/proc/self/fd/{fd}", entry, follow=True)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def _set_attributes(path: str, wanted: dict[str, str], follow: bool) -> None:
    try:
        there = {name for name in os.listxattr(path, follow_symlinks=follow) if not name.startswith("security.")}
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        there = set()
    for name in there - set(wanted):
        os.removexattr(path, name, follow_symlinks=follow)
    for name, value in wanted.items():
        value_now = None
        with suppress(OSError):
            value_now = os.getxattr(path, name, follow_symlinks=follow) if name in there else None
        if value_now != base64.b64decode(value):
            os.setxattr(path, name, base64.b64decode(value), follow_symlinks=follow)
