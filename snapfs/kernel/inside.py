"""Directories opened within one mount: what is mounted on one of them is never entered (openat2(2), RESOLVE_NO_XDEV).

An overlay sees its layers without what is mounted inside them.  So does whoever walks a layer with these functions.  Where this
process may mount, no file of another mount is so much as asked for its attributes (``open_top``): it may be on a file system of
a user's, whose server never answers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snapfs.kernel import libc, mountapi

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_HOW = libc.OpenHow(FLAGS, 0, libc.RESOLVE_NO_XDEV)  # a subvolume of btrfs is no mount, and is entered
_HOW_TO_LOOK = libc.OpenHow(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, libc.RESOLVE_NO_XDEV)


def open_top(path: str) -> int:
    """A descriptor of the directory ``path``, in which nothing is mounted for whoever goes on from there, now or later: it is
    one of a copy of its mount, in which no device can be opened.  Where this process may have none, it is a plain one.  Raises
    OSError."""
    fd = os.open(path, FLAGS)
    try:
        with _without_mounts(".", fd) as tree:
            alone = os.open(".", FLAGS, dir_fd=tree)
    except OSError:
        return fd
    os.close(fd)
    return alone


def open_directory(name: str, parent: int) -> int:
    """A descriptor of the directory ``name`` in the one that is open as ``parent``; where something is mounted on it, of the
    directory beneath.

    Raises OSError: EBUSY where something is mounted there and this process may not look beneath.
    """
    try:
        return open_unmounted(name, parent)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return _beneath(name, parent)
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # before Linux 5.6; a sandbox that is older than the call
            raise
    return os.open(name, FLAGS, dir_fd=parent)


def open_unmounted(name: str, parent: int) -> int:
    """A descriptor of the directory ``name`` in the one that is open as ``parent``; raises OSError, EXDEV where something is
    mounted on it."""
    return libc.openat2(parent, os.fsencode(name), _HOW)


def stat_beneath(name: str, parent: int) -> os.stat_result:
    """lstat(2) of ``name`` in the directory that is open as ``parent``, beneath whatever is mounted there; raises OSError, as
    ``open_directory`` does."""
    try:  # first: of a directory that is alone (``open_top``) no more copies can be had
        fd = libc.openat2(parent, os.fsencode(name), _HOW_TO_LOOK)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EPERM):
            raise
    else:
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)
    with _without_mounts(name, parent) as tree:
        return os.stat(name, dir_fd=tree, follow_symlinks=False)


def _beneath(name: str, parent: int) -> int:
    with _without_mounts(name, parent) as tree:
        return os.open(name, FLAGS, dir_fd=tree)


@contextmanager
def _without_mounts(name: str, parent: int) -> Iterator[int]:
    """For a block: the directory that is open as ``parent``, in a copy of its mount on which nothing is mounted, and in which
    no device can be opened."""
    try:
        tree = mountapi.copy_tree(parent)
    except OSError as error:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name) from error
    try:
        with suppress(OSError):  # before Linux 5.12
            mountapi.mount_setattr(tree, mountapi.MOUNT_ATTR_NODEV)
        yield tree
    finally:
        os.close(tree)
