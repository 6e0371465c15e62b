"""A user namespace, and a mount namespace in it, in which a process that is not root may mount (user_namespaces(7)).

In there each user and group has the number that it has outside, as far as it is mapped: that of this process is, alone or with
the ranges of /etc/subuid and /etc/subgid.  What other processes mount or unmount outside is mounted or unmounted in there too,
where the mounts there are shared (``systemd`` makes them so), and never the other way round.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from snapfs.kernel import libc, subids
from snapfs.kernel.forks import undisturbed
from snapfs.kernel.mounttable import mount_table

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_MS_SLAVE = 0x80000

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 2, 4
_CAP_SYS_ADMIN = 21

USER, SETGROUPS, MAP, MOUNTS, SLAVE = "user", "setgroups", "map", "mounts", "slave"
"""The steps of ``enter``; the last two are ``copy_mounts``."""

Step = Callable[[str], object]
"""A function that is told of each step before it is made."""


def _untold(_: str) -> None:
    pass


def may_mount() -> bool:
    """Whether this thread has the right to mount in its mount namespace, as far as capabilities tell."""
    lines = (line.partition(":") for line in Path("/proc/thread-self/status").read_text().splitlines())
    return any(int(value, 16) >> _CAP_SYS_ADMIN & 1 for name, _, value in lines if name == "CapEff")


def why_refused() -> str | None:
    """Why this process can't ``enter`` namespaces of its own, and what to do, in a sentence; None where it can.  This takes
    some three milliseconds."""
    failed = tried(enter)
    if failed is None:
        return None
    step, error = failed
    return in_words(step, error) if step else error.strerror


def tried(act: Callable[[Step], object]) -> tuple[str, OSError] | None:
    """The step, and the error, at which ``act`` failed in a short-lived child, since by the time that the kernel says no there
    may be no way back; None where all went well.  An error without a number is none of the kernel's."""
    there, here = os.pipe()
    with warnings.catch_warnings(), undisturbed():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child takes none of their locks
        child = os.fork()
    if child == 0:
        step = ""

        def note(next_step: str) -> None:
            nonlocal step
            step = next_step

        said = "done"
        try:
            act(note)
        except OSError as error:
            said = f"{step}\0{error.errno}\0{error.strerror}"
        except BaseException as error:
            said = f"{step}\x000\0{error}"
        finally:
            os.write(here, said.encode(errors="replace"))
            os._exit(0)
    os.close(here)
    with os.fdopen(there, errors="replace") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    if told == "done":
        return None
    step, number, words = told.split("\0", 2) if told else ("", "0", "the trial of a user namespace ended without an answer")
    return step, OSError(int(number), words)


def enter(step: Step = _untold, *, root: bool = False, lent: subids.Lent | None = None) -> str:
    """Move this process, which must have one thread, into a user namespace and a mount namespace of its own; as ``root``, user
    and group 0 in there are what this process is outside.  Raises OSError: then the process can't be used any more (``tried``).

    Returns why the ids that are ``lent`` are not in there, in a sentence; "" where they are, or none were wanted.
    """
    uid, gid = os.geteuid(), os.getegid()
    signal = ctypes.c_int()
    libc.call("prctl", _PR_GET_PDEATHSIG, ctypes.byref(signal), 0, 0, 0)
    # else one that was root before, and has started no program since, may not write its tables, and nobody can look in
    libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    step(USER)
    why_not = lent.why_none if lent is not None else ""
    if lent is None or why_not:
        libc.call("unshare", CLONE_NEWUSER)
    else:
        with subids.mapper(subids.table(uid, lent.uids, root=root), subids.table(gid, lent.gids, root=root)) as mapper:
            libc.call("unshare", CLONE_NEWUSER)
            libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # lost by the gain of capabilities
            why_not = mapper.map()
    step(SETGROUPS)
    if not _has("gid_map"):
        subids.write("/proc/self/setgroups", "deny")
    step(MAP)
    for table, own in (("uid_map", uid), ("gid_map", gid)):
        if not _has(table):
            subids.write(f"/proc/self/{table}", subids.table(own, (), root=root))
    copy_mounts(step)
    libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    libc.call("prctl", _PR_SET_PDEATHSIG, signal.value, 0, 0, 0)
    return why_not


def copy_mounts(step: Step = _untold) -> None:
    """Give this process, which must have one thread, a mount namespace of its own: a copy of the one it is in, that follows
    what is mounted there.  Raises OSError."""
    step(MOUNTS)
    libc.call("unshare", CLONE_NEWNS)
    step(SLAVE)
    _set_propagation(_MS_SLAVE)


def close_mounts() -> None:
    """Have nothing come to the mount namespace of this process, which must be its own, that is mounted elsewhere from now on.
    Raises OSError."""
    _set_propagation(_MS_PRIVATE)


def _set_propagation(kind: int) -> None:
    try:
        libc.call("mount", b"none", b"/", None, _MS_REC | kind, None)
    except OSError as error:
        if error.errno != errno.EINVAL:  # in a chroot / is no mountpoint
            raise
        for mount in list(mount_table()):
            with contextlib.suppress(OSError):
                libc.call("mount", b"none", os.fsencode(mount.target), None, kind, None)


def _has(table: str) -> bool:
    return Path(f"/proc/self/{table}").read_text() != ""


def in_words(step: str, error: OSError) -> str:
    """Why a step of ``enter`` fails with ``error``, and what to do, in a sentence."""
    number, words = error.errno, f"({error.strerror})"
    kind = "mount" if step == MOUNTS else "user"
    if number == errno.ENOSPC:
        limit = f"user.max_{'mnt' if step == MOUNTS else 'user'}_namespaces"
        return f"the limit {limit} is reached {words}: root can raise it, with sysctl -w {limit}=15000 for one"
    if step == USER and number in (errno.EINVAL, errno.ENOSYS):
        return f"this kernel has no user namespaces {words}: be root"
    if step == USER and sysctl("kernel/unprivileged_userns_clone") == "0":
        return (
            f"user namespaces are for root alone here {words}: root can let everybody make them, with "
            "sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" and os.geteuid() != 0:
        return (
            f"AppArmor restricts user namespaces here {words}: root can let a program have them, with a profile such as "
            "examples/apparmor/snapfs, or all programs, with sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if step in (USER, MOUNTS):
        return (
            f"{kind} namespaces are forbidden here {words}, by a container's filter of system calls or in a chroot: let the "
            "container make them (docker run --security-opt seccomp=unconfined), or do this outside of it"
        )
    return f"user namespaces have no rights here {words}: a security module, such as AppArmor or SELinux, takes them away"


def sysctl(name: str) -> str:
    """What sysctl(8) says of ``name`` (a path in /proc/sys), "" where there is no such thing."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def is_inside(pid: int) -> bool:
    """Whether process ``pid`` is in this process's user namespace, or in one made in there: of any other that is not root's the
    kernel tells nothing."""
    try:
        os.stat(f"/proc/{pid}/ns/user")
    except OSError:
        return False
    return True


def join(process: str, *, mounts: bool) -> None:
    """Move this process, which must have one thread, into the user namespace of the one whose directory in /proc is
    ``process``, and into its mount namespace if ``mounts`` are wanted.  Raises OSError: EPERM where that is not this user's."""
    fds = [os.open(f"{process}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (("user", "mnt") if mounts else ("user",))]
    try:
        for fd, kind in zip(fds, (CLONE_NEWUSER, CLONE_NEWNS), strict=False):
            libc.call("setns", fd, kind)
    finally:
        for fd in fds:
            os.close(fd)
