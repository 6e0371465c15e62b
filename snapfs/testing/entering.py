"""A place in which this process may mount overlays: a mount namespace of its own and, for who isn't root, a user namespace.

Whether there can be one is tried by a child, for a user namespace can't be left any more.  Inside, this process has its uid,
and no capability is in force but while it mounts; so what it does to files is refused as ever.  What is different there is told
in examples/pytest/README.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from snapfs.kernel import libc, mounting, overlay
from snapfs.kernel.mounttable import mount_table
from snapfs.kernel.probe import in_user_namespace, overlay_knows, why_trial_failed
from snapfs.testing import capabilities

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 2, 4

_USER, _SETGROUPS, _MAP, _MOUNTS, _SLAVE, _OVERLAY = "user", "setgroups", "map", "mounts", "slave", "overlay"

_here: int | None = None  # the mount namespace that this process has entered, by its inode number


class Refused(Exception):
    """There can be no overlay here; the message says why, and what to do, as the end of a sentence."""


def enter(directory: str) -> None:
    """Be where overlays over ``directory`` can be mounted, if need be in a new namespace; once a process, and not to be undone.

    Raises Refused, and then nothing has changed.
    """
    global _here
    if _here == mount_namespace():
        return
    privileged = capabilities.effective() >> capabilities.SYS_ADMIN & 1
    if not privileged and os.geteuid() == 0:
        raise Refused("this container may not mount: give it CAP_SYS_ADMIN")
    if not privileged and len(os.listdir("/proc/self/task")) > 1:
        raise Refused(
            "threads were running already, and a user namespace can be entered by none but a process without: "
            "snapfs = overlay in pytest.ini (or --snapfs=overlay) enters it before conftest.py is read"
        )
    if failed := _tried(_own_mounts if privileged else _own_users, directory):
        raise Refused(_why(*failed))
    if not privileged:
        _own_users(_ignore)
        capabilities.hold_back()
    elif not _other_threads():  # those would stay outside, and not see the mounts
        _own_mounts(_ignore)
    _here = mount_namespace()


def join(namespace: int) -> bool:
    """Take over what the parent of this process has entered; False where that is not so."""
    global _here
    if namespace != mount_namespace():
        return False
    if os.geteuid() != 0:
        capabilities.hold_back()
    _here = namespace
    return True


def is_user_namespace() -> bool:
    """Whether what has been entered is a user namespace."""
    return _here is not None and os.geteuid() != 0 and in_user_namespace()


def mount_namespace() -> int:
    """This process's mount namespace, by its inode number."""
    return os.stat("/proc/self/ns/mnt").st_ino


def overlay_options() -> list[str]:
    """The options of all overlay mounts here: nothing is flushed, and directories can be renamed where that is possible."""
    options = ["volatile"] if mounting.kernel_version() >= (5, 10) else []
    if in_user_namespace():
        return ["userxattr", *options]
    return [*options, *(f"{key}={value}" for key, value in (("index", "off"), ("redirect_dir", "on")) if overlay_knows(key))]


Step = Callable[[str], object]  # is told what comes next


def _own_users(step: Step) -> None:
    uid, gid = os.geteuid(), os.getegid()
    signal = ctypes.c_int()
    libc.call("prctl", _PR_GET_PDEATHSIG, ctypes.byref(signal), 0, 0, 0)
    step(_USER)
    libc.call("unshare", _CLONE_NEWUSER)
    step(_SETGROUPS)
    _write("/proc/self/setgroups", "deny")
    step(_MAP)
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _own_mounts(step)
    libc.call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # these two are lost by the gain of capabilities
    libc.call("prctl", _PR_SET_PDEATHSIG, signal.value, 0, 0, 0)


def _own_mounts(step: Step) -> None:
    step(_MOUNTS)
    libc.call("unshare", _CLONE_NEWNS)
    step(_SLAVE)
    try:
        libc.call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
    except OSError as error:
        if error.errno != errno.EINVAL:  # in a chroot / is no mountpoint
            raise
        for mount in list(mount_table()):
            with contextlib.suppress(OSError):
                libc.call("mount", b"none", os.fsencode(mount.target), None, _MS_SLAVE, None)


def _tried(enter: Callable[[Step], object], directory: str) -> tuple[str, OSError] | None:
    """What failed in a child that entered and mounted an overlay in ``directory``, and how; None where all went well."""
    there, here = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child takes none of their locks
        child = os.fork()
    if child == 0:
        step = ""

        def note(next_step: str) -> None:
            nonlocal step
            step = next_step

        try:
            enter(note)
            note(_OVERLAY)
            _try_overlay(directory)
        except OSError as error:
            os.write(here, f"{step}\0{error.errno}\0{error.strerror}".encode())
        except BaseException as error:
            os.write(here, f"{step}\x000\0{error}".encode())
        finally:
            os._exit(0)
    os.close(here)
    with os.fdopen(there) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return None
    step, number, words = said.split("\0")
    return step, OSError(int(number), words)


def _try_overlay(directory: str) -> None:
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{directory}/{name}")
    Path(directory, "lower/file").write_text("lower")
    overlay.mount_overlay(
        f"{directory}/merged",
        [f"{directory}/lower"],
        f"{directory}/upper",
        f"{directory}/work",
        overlay_options(),
        read_only=False,
    )
    Path(directory, "merged/file").write_text("upper")


def _why(step: str, error: OSError) -> str:
    """The end of a sentence that begins with "no overlay, for "."""
    number = error.errno
    if step == _USER and number == errno.ENOSPC:
        return "there may be no more user namespaces: sysctl user.max_user_namespaces=10000"
    if step == _MOUNTS and number == errno.ENOSPC:
        return "there may be no more mount namespaces: sysctl user.max_mnt_namespaces=10000"
    if step == _USER and number == errno.EINVAL:
        return "this kernel has no user namespaces, or threads are running"
    if step in (_USER, _MOUNTS) and number == errno.EPERM and _sysctl("kernel/unprivileged_userns_clone") == "0":
        return "user namespaces are root's alone here: sysctl kernel.unprivileged_userns_clone=1"
    restricted = _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1"
    if step not in (_USER, _OVERLAY) and (number == errno.EACCES or (number == errno.EPERM and (restricted or step == _MAP))):
        if restricted:
            return (
                "AppArmor takes the rights away that a user namespace gives: it needs a profile with `userns,` for python "
                "(or sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
            )
        return "something takes the rights away that a user namespace gives: AppArmor, or a container's profile"
    if step in (_USER, _MOUNTS) and number in (errno.EPERM, errno.ENOSYS):
        return "a filter forbids namespaces, as containers have it: give this one a seccomp profile that allows unshare"
    if number == errno.EPERM and os.geteuid() != 0:
        return "this kernel lets none but root mount overlays: it takes Linux 5.11"
    return why_trial_failed(error).replace("ROOT's", "TMPDIR's").replace("put ROOT", "put TMPDIR")


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _other_threads() -> bool:
    """Whether threads of Python's are running besides this one."""
    return any(
        thread is not threading.current_thread() and not isinstance(thread, threading._DummyThread)
        for thread in threading.enumerate()
    )


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _ignore(_: str) -> None:
    pass
