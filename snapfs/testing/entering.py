"""A place in which this process may mount overlays: a mount namespace of its own and, for who isn't root, a user namespace.

Whether there can be one is tried by a child, for a user namespace can't be left any more.  Inside, this process has its uid,
and no capability is in force but while it mounts; so what it does to files is refused as ever.  What is different there is told
in examples/pytest/README.md.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

from snapfs.kernel import mounting, overlay, userns
from snapfs.kernel.probe import in_user_namespace, overlay_knows, why_trial_failed
from snapfs.testing import capabilities

_OVERLAY = "overlay"  # the step after those of userns

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
    privileged = userns.may_mount()
    if not privileged and os.geteuid() == 0:
        raise Refused("this container may not mount: give it CAP_SYS_ADMIN")
    if not privileged and len(os.listdir("/proc/self/task")) > 1:
        raise Refused(
            "threads were running already, and a user namespace can be entered by none but a process without: "
            "snapfs = overlay in pytest.ini (or --snapfs=overlay) enters it before conftest.py is read"
        )
    enter_namespaces = userns.copy_mounts if privileged else userns.enter

    def act(step: userns.Step) -> None:
        enter_namespaces(step)
        step(_OVERLAY)
        _try_overlay(directory)

    if failed := userns.tried(act):
        raise Refused(_why(*failed, directory))
    if not privileged:
        userns.enter()
        capabilities.hold_back()
    elif not _other_threads():  # those would stay outside, and not see the mounts
        userns.copy_mounts()
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


def _why(step: str, error: OSError, directory: str) -> str:
    """The end of a sentence that begins with "no overlay, for "."""
    if step not in ("", _OVERLAY):
        return userns.in_words(step, error)
    if error.errno == errno.EPERM and os.geteuid() != 0:
        return "this kernel lets none but root mount overlays: it takes Linux 5.11"
    return why_trial_failed(error, "TMPDIR", tempfile.gettempdir(), directory)


def _other_threads() -> bool:
    """Whether threads of Python's are running besides this one."""
    return any(
        thread is not threading.current_thread() and not isinstance(thread, threading._DummyThread)
        for thread in threading.enumerate()
    )
