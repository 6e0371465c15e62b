"""A user namespace, and a mount namespace in it, in which a process that is not root may mount (user_namespaces(7)).

In there each user and group has the number that it has outside, as far as it is mapped: that of this process is, alone or with
the ranges of /etc/subuid and /etc/subgid.  What other processes mount or unmount outside is mounted or unmounted in there too,
where the mounts there are shared (``systemd`` makes them so), and never the other way round.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from snapfs.kernel import libc

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000
_MS_SLAVE = 0x80000

_PR_SET_DUMPABLE = 4
_CAP_SYS_ADMIN = 21

_STEPS = ("user", "setgroups", "uid_map", "gid_map", "mount", "slave")


def may_mount() -> bool:
    """Whether this process has the right to mount in its mount namespace, as far as capabilities tell."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return any(int(value, 16) >> _CAP_SYS_ADMIN & 1 for name, _, value in lines if name == "CapEff")


def why_refused() -> str | None:
    """Why this process can't ``enter`` namespaces of its own, and what to do, in a sentence; None where it can.

    A short-lived process tries it, since by the time that the kernel says no there may be no way back.  Call it before there
    are threads: this takes some three milliseconds.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writes, bytes(_enter()))
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads, "rb") as words:
        told = words.read()
    os.waitpid(child, 0)
    if not told:
        return "the trial of a user namespace ended without an answer"
    step, number = _STEPS[told[0]], told[1]
    return _in_words(step, number) if number else None


def enter() -> None:
    """Move this process, which must have one thread, into a user namespace and a mount namespace of its own.  Raises OSError:
    then the process can't be used any more (``why_refused``)."""
    step, number = _enter()
    if number:
        raise OSError(number, f"{os.strerror(number)} ({_STEPS[step]})")


def become_root() -> None:
    """``enter``, and be root in there: user and group 0, which are outside what this process is."""
    step, number = _enter(0, 0)
    if number:
        raise OSError(number, f"{os.strerror(number)} ({_STEPS[step]})")


def _enter(inner_uid: int | None = None, inner_gid: int | None = None) -> tuple[int, int]:
    """The step that came last, and the error that it met, or 0."""
    uid, gid = os.geteuid(), os.getegid()
    users = f"{uid if inner_uid is None else inner_uid} {uid} 1"
    groups = f"{gid if inner_gid is None else inner_gid} {gid} 1"
    step = 0
    try:
        # else one that was root before, and has started no program since, may not write its tables, and nobody can look in
        libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
        libc.call("unshare", CLONE_NEWUSER)
        for step, text in enumerate(("deny", users, groups), start=1):
            with open(f"/proc/self/{_STEPS[step]}", "w", encoding="ascii") as table:
                table.write(text)
        step = 4
        libc.call("unshare", CLONE_NEWNS)
        step = 5
        libc.call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
    except OSError as error:
        return step, error.errno or errno.EIO
    return step, 0


def _in_words(step: str, number: int) -> str:
    words = f"({os.strerror(number)})"
    if number == errno.ENOSPC:
        limit = "user.max_mnt_namespaces" if step == "mount" else "user.max_user_namespaces"
        return f"the limit {limit} is reached {words}: root can raise it, with sysctl -w {limit}=15000 for one"
    if step == "user" and number in (errno.EINVAL, errno.ENOSYS):
        return f"this kernel has no user namespaces {words}: run the daemon as root"
    if step == "user" and _is(b"0", "/proc/sys/kernel/unprivileged_userns_clone"):
        return (
            f"user namespaces are for root alone here {words}: root can let everybody make them, with "
            "sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if _is(b"1", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"):
        return (
            f"AppArmor restricts user namespaces here {words}: root can let snapfs have them, with the profile "
            "examples/apparmor/snapfs, or all programs, with sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if step == "user":
        return (
            f"user namespaces are forbidden here {words}, by a container's filter of system calls or in a chroot: let the "
            "container make them (docker run --security-opt seccomp=unconfined), or run the daemon outside of it"
        )
    return f"user namespaces have no rights here {words}: a security module, such as AppArmor or SELinux, takes them away"


def _is(value: bytes, path: str) -> bool:
    try:
        return Path(path).read_bytes().strip() == value
    except OSError:
        return False


def is_inside(pid: int) -> bool:
    """Whether process ``pid`` is in this process's user namespace, or in one made in there: of any other that is not root's the
    kernel tells nothing."""
    try:
        os.stat(f"/proc/{pid}/ns/user")
    except OSError:
        return False
    return True


def join(pid: int, *, mounts: bool) -> None:
    """Move this process, which must have one thread, into the user namespace of process ``pid``, and into its mount
    namespace if
    ``mounts`` are wanted.  Raises OSError: EPERM where that is not this user's."""
    fds = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (("user", "mnt") if mounts else ("user",))]
    try:
        for fd, kind in zip(fds, (CLONE_NEWUSER, CLONE_NEWNS), strict=False):
            libc.call("setns", fd, kind)
    finally:
        for fd in fds:
            os.close(fd)


def copy_mounts() -> None:
    """Give this process, which must have one thread, a mount namespace of its own: a copy of the one it is in, that follows
    what is mounted there.  Raises OSError."""
    libc.call("unshare", CLONE_NEWNS)
    libc.call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
