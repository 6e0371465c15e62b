"""Paths that only root and this process's user can lead elsewhere: the rule of sshd's StrictModes.

Whoever may write a directory can put another one, or a link, in the place of what is in it.  A process with more rights than
that user must not find its way through there: what it then makes, mounts or deletes is wherever the user likes.

In a user namespace all users that are not mapped look alike, root among them; they are trusted there, as ``/`` itself must be.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from snapfs.kernel import probe, servers
from snapfs.kernel.mounttable import MountPoint, mount_id_of, mount_table

_MOST_LINKS = 40  # that are followed on one way, as in the kernel

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(Exception):
    """Somebody else could lead a path elsewhere; the text says which directory or link of it is to blame, and why."""


class Found:
    """The directory, or what else it is, at the end of a trusted path: a context manager, which closes ``fd``.

    ``path``: as the kernel has it, without links.  ``fd`` (O_PATH) is open on it; where ``missing`` names what is not there
    yet, on the last directory that is."""

    def __init__(self, path: str, fd: int, missing: Sequence[str]) -> None:
        self.path = path
        self.fd = fd
        self.missing = tuple(missing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        os.close(self.fd)

    def make(self) -> list[str]:
        """Make the directories that are missing, each 0700, and go there; the paths of those that were made here, the highest
        first.  Raises OSError: FileExistsError where another user was faster."""
        made: list[str] = []
        above = self.path[: len(self.path) - sum(len(name) + 1 for name in self.missing)]
        for name in self.missing:
            above = f"{above}/{name}"
            try:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=self.fd)
                    made.append(above)
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            except OSError as error:
                error.filename = above
                raise
            os.close(self.fd)
            self.fd = fd
            if os.fstat(fd).st_uid != os.geteuid():
                raise FileExistsError(errno.EEXIST, "another user has made it first", above)
        self.missing = ()
        return made


def find(path: str, *, inside: bool = False, may_lack: bool = False) -> Found:
    """Follow ``path`` a directory at a time; its end may be missing if ``may_lack``.

    Each directory on the way must belong to root or to this process's user, and be writable by nobody else, unless it is
    sticky; links must be theirs too.  What is at the end must belong to them, whoever can write it, unless something ``inside``
    is to be reached by its name.

    Raises Untrusted, and OSError: NotADirectoryError, PermissionError …
    """
    trusted = trusted_users()
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    way: list[tuple[str, int]] = []  # name, and the descriptor of the directory that has it
    whole = path if path.startswith("/") else os.path.join(os.getcwd(), path)
    ahead = [part for part in reversed(whole.split("/")) if part not in ("", ".")]
    links = 0
    mount = mount_id_of(fd)
    try:
        while ahead:
            name = ahead.pop()
            here = "/" + "/".join(name for name, _ in way)
            if name == "..":
                if way:
                    os.close(fd)
                    _, fd = way.pop()
                    mount = mount_id_of(fd)
                continue
            _refuse_writable(fd, here, trusted)
            there = f"{here.rstrip('/')}/{name}"
            try:
                below = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                missing = [name, *reversed(ahead)]
                if not may_lack or ".." in missing:
                    raise
                found = Found("/".join([here.rstrip("/"), *missing]), fd, missing)
                fd = -1
                return found
            except OSError as error:
                error.filename = there
                raise
            number = mount_id_of(below)
            way.append((name, fd))
            fd = below
            if number != mount:
                mount = number
                _refuse_server(number, there)
            shown = os.fstat(fd)
            _refuse_owner(shown, there, trusted)
            if stat.S_ISLNK(shown.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink("", dir_fd=fd)
                os.close(fd)
                _, fd = way.pop()
                if target.startswith("/"):
                    while way:
                        os.close(fd)
                        _, fd = way.pop()
                mount = mount_id_of(fd)
                ahead += [part for part in reversed(target.split("/")) if part not in ("", ".")]
        there = "/" + "/".join(name for name, _ in way)
        if inside:
            _refuse_writable(fd, there, trusted)
        found = Found(there, fd, ())
        fd = -1
        return found
    finally:
        for _, each in way:
            os.close(each)
        if fd >= 0:
            os.close(fd)


def above(path: str) -> str:
    """``path`` without links in the directories above it; what is at its end is not asked, for that may never answer.

    Raises as ``find`` does, for what is ``inside`` the directory above."""
    directory, name = os.path.split(os.path.abspath(path))
    with find(directory, inside=True) as found:
        return f"{found.path.rstrip('/')}/{name}"


def refuse_foreign(fd: int, path: str) -> None:
    """Raise Untrusted where the directory open as ``fd``, called ``path``, belongs to others than root and this process's user,
    or others can write it, be it sticky; what is above it is not looked at."""
    trusted = trusted_users()
    _refuse_owner(os.fstat(fd), path, trusted)
    _refuse_writable(fd, path, trusted, sticky=False)


def is_own(fd: int) -> bool:
    """Whether the file open as ``fd`` (O_PATH will do) belongs to root or to this process's user, and nobody else can write
    it."""
    found, trusted = os.fstat(fd), trusted_users()
    if found.st_uid not in trusted or found.st_mode & stat.S_IWOTH:
        return False
    return not found.st_mode & stat.S_IWGRP or _is_private(fd, found, trusted)


def trusted_users() -> set[int]:
    """The uids that may lead this process anywhere: root, and its own; in a user namespace also that of all who are not
    mapped."""
    trusted = {0, os.geteuid()}
    if probe.in_user_namespace():
        with suppress(OSError):
            trusted.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return trusted


def _refuse_owner(found: os.stat_result, path: str, trusted: set[int]) -> None:
    if found.st_uid not in trusted:
        what = "is a link of" if stat.S_ISLNK(found.st_mode) else "belongs to"
        raise Untrusted(f"{path} {what} the user {user_name(found.st_uid)}, who could put anything in its place")


def _refuse_writable(fd: int, path: str, trusted: set[int], *, sticky: bool = True) -> None:
    """Raise Untrusted where others than ``trusted`` can exchange what is in the directory ``fd``, called ``path``; they can't
    in a ``sticky`` one, unless that is not to count."""
    found = os.fstat(fd)
    if (sticky and found.st_mode & stat.S_ISVTX) or not found.st_mode & _OTHERS_WRITE or not stat.S_ISDIR(found.st_mode):
        return
    if found.st_mode & stat.S_IWOTH:
        raise Untrusted(f"{path} can be written by everybody, who could exchange what is in it")
    if not _is_private(fd, found, trusted):
        raise Untrusted(
            f"{path} can be written by the group {group_name(found.st_gid)}, whose members could exchange what is in it"
        )


def _is_private(fd: int, found: os.stat_result, trusted: set[int]) -> bool:
    """Whether the group of a directory has no member but ``trusted``: many systems give each user a group of the same name, and
    an umask that lets it write.  An ACL may let others write than the group."""
    with suppress(OSError):
        os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access")
        return False
    entries = [group for group in grp.getgrall() if group.gr_gid == found.st_gid]  # there may be several of one number
    if not entries:  # no user can be in a group that there isn't, but by its number
        return False
    names = {name for group in entries for name in group.gr_mem}
    users = [user for user in pwd.getpwall() if user.pw_gid == found.st_gid or user.pw_name in names]
    # where users come from a directory service not all are listed, so the group must be one that is made for a single user
    own = any(user.pw_gid == found.st_gid and user.pw_name in (group.gr_name for group in entries) for user in users)
    return own and {user.pw_uid for user in users} <= trusted and names <= {user.pw_name for user in users}


def _refuse_server(number: int, path: str) -> None:
    """Raise Untrusted where the mount ``number`` at ``path`` is a file system that somebody else's process serves: it says of
    each file what it likes, whose it is for one."""
    mount = next((mount for mount in mount_table() if mount.id == number), None)
    if mount is None or not mount.type.startswith("fuse") or (owner := server_of(mount)) == 0:
        return
    if not servers.is_ours(owner, mount.super_options, mount.target, mount.device):
        raise Untrusted(f"{path} is a file system that the user {user_name(owner)} serves, and shows what that user likes")


def server_of(mount: MountPoint) -> int:
    """The uid of the user who has mounted a FUSE file system, as the kernel knows it; -1 where it doesn't tell."""
    return next((int(option[8:]) for option in mount.super_options if option.startswith("user_id=")), -1)


def user_name(uid: int) -> str:
    """The name of a user, or the number of one without."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of a group, or the number of one without."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
