"""The kernel's mount API, a function a system call: fsopen(2), fspick(2), fsconfig(2), fsmount(2), move_mount(2),
open_tree(2), mount_setattr(2).  Their numbers are the same on all architectures.

All raise OSError, ENOSYS where the kernel lacks the call: it has the first six since 5.2, mount_setattr since 5.12.  Where
the file system has put its reason into the context's message log, that is the error's ``strerror``.
"""

from __future__ import annotations

import ctypes
import errno
import os

from snapfs.kernel import libc

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

MS_PRIVATE = 0x40000

STRING_MAX = 255
"""Bytes of a string that fsconfig(2) takes; a longer one is EINVAL."""

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_FSPICK = 433
_SYS_MOUNT_SETATTR = 442

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_SET_FD = 5
_FSCONFIG_CMD_CREATE = 6
_FSCONFIG_CMD_RECONFIGURE = 7

_MESSAGE_MAX = 4096  # read(2) of a longer message is EMSGSIZE and leaves it in the log


class _MountAttr(ctypes.Structure):
    """``struct mount_attr`` of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def fsopen(kind: str) -> int:
    """A descriptor of a new context for a file system of type ``kind``; without privileges EPERM."""
    return libc.call("syscall", _SYS_FSOPEN, os.fsencode(kind), _FSOPEN_CLOEXEC)


def fspick(tree: int) -> int:
    """A descriptor of a context for the file system of the mount ``tree``, to be changed by ``reconfigure``."""
    return libc.call("syscall", _SYS_FSPICK, tree, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)


def set_flag(context: int, key: str) -> None:
    """Set the parameter ``key`` that takes no value."""
    _fsconfig(context, _FSCONFIG_SET_FLAG, key)


def set_string(context: int, key: str, value: str) -> None:
    """Set ``key`` to a string of at most STRING_MAX bytes."""
    _fsconfig(context, _FSCONFIG_SET_STRING, key, value)


def set_descriptor(context: int, key: str, fd: int) -> None:
    """Set ``key`` to the open file ``fd``, not one of O_PATH; overlayfs takes them since 6.13."""
    _fsconfig(context, _FSCONFIG_SET_FD, key, number=fd)


def create(context: int) -> None:
    """Make the file system with the parameters set so far."""
    _fsconfig(context, _FSCONFIG_CMD_CREATE)


def reconfigure(context: int) -> None:
    """Give the file system that ``fspick`` picked the parameters set since, wherever it is mounted."""
    _fsconfig(context, _FSCONFIG_CMD_RECONFIGURE)


def fsmount(context: int, attributes: int = 0) -> int:
    """A descriptor of a mount, not yet attached anywhere, of what ``create`` made; ``attributes`` are MOUNT_ATTR_*."""
    try:
        return libc.call("syscall", _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        raise _explained(error, context) from None


def takes_value(context: int, key: str) -> bool:
    """Whether the file system of the fresh ``context`` has a parameter ``key`` that takes a value.  Nothing is set.

    Tried by setting the parameter without a value.  A file system that has the parameter calls that a bad value, one that lacks
    it an unknown parameter.  A file system that reads mount(2)'s option string inside the kernel (overlayfs before 6.5) accepts
    everything here, and would refuse it only in ``create``, with a bare EINVAL: such a context is of no more use after this.
    """
    try:
        set_flag(context, key)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return "Unknown parameter" not in (error.strerror or "")
    return False


def open_tree(path: str, *, recursive: bool = False) -> int:
    """A descriptor of a detached copy of the mount at ``path``, as a bind mount would be, with the mounts below if
    ``recursive``.  Closing the descriptor drops the copy."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return libc.call("syscall", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def copy_tree(tree: int) -> int:
    """A descriptor of another detached copy of the mount ``tree``; of a detached one the kernel makes copies since 6.15 (EINVAL
    before)."""
    return libc.call("syscall", _SYS_OPEN_TREE, tree, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)


def mount_setattr(
    tree: int, attributes: int, *, clear: int = 0, recursive: bool = False, namespace: int = 0, propagation: int = 0
) -> None:
    """Set MOUNT_ATTR_* on the mount ``tree`` and ``clear`` others, and on the mounts below if ``recursive``; ``namespace`` is
    the descriptor of the user namespace that MOUNT_ATTR_IDMAP needs.  ``propagation``: MS_PRIVATE, if anything."""
    wanted = _MountAttr(attr_set=attributes, attr_clr=clear, propagation=propagation, userns_fd=namespace)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    libc.call("syscall", _SYS_MOUNT_SETATTR, tree, b"", flags, ctypes.byref(wanted), size)


def move_mount(tree: int, target: str | int) -> None:
    """Attach the mount ``tree`` at ``target``: a path, which is not followed if it is a symbolic link, or a descriptor of a
    directory."""
    directory, path, flags = (_AT_FDCWD, target, 0) if isinstance(target, str) else (target, "", _MOVE_MOUNT_T_EMPTY_PATH)
    libc.call("syscall", _SYS_MOVE_MOUNT, tree, b"", directory, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH | flags)


def _fsconfig(context: int, command: int, key: str | None = None, value: str | None = None, number: int = 0) -> None:
    name, text = (None if word is None else os.fsencode(word) for word in (key, value))
    try:
        libc.call("syscall", _SYS_FSCONFIG, context, command, name, text, number)
    except OSError as error:
        raise _explained(error, context) from None


def _explained(error: OSError, context: int) -> OSError:
    """``error`` with the errors in the context's message log as its text, if there are any; empties the log."""
    messages = []
    try:
        while message := os.read(context, _MESSAGE_MAX):  # "e overlay: too many lower directories, limit is 500\n"
            if message.startswith(b"e "):
                messages.append(os.fsdecode(message[2:]).rstrip("\n"))
    except OSError:  # ENODATA: no more
        pass
    return OSError(error.errno, "; ".join(messages) or error.strerror)
