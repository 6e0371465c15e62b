"""``snapfs serve ROOT MOUNTPOINT``: mount a root's tree and serve it in the foreground."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from snapfs.cli.grammar import Given, Option, Verb
from snapfs.errors import InvalidArgument, NoThread, SnapshotError, Unavailable
from snapfs.kernel import processes, subids, userns
from snapfs.options import Options, Sync

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.fuse.outside import Outside

N = TypeVar("N", int, float)

_DEFAULTS = Options()

_FLAGS = {
    "allow_other": "let other users enter (the kernel then checks modes)",
    "ro": "mount the tree read-only",
    "dirsync": "let mv to committed return when the data is on disk; it is to be tried again (EAGAIN) where that takes long",
    "async_remove": "leave the files of removed snapshots to Cleanup",
    "upperdir_label": "show each layer's path as a label in info.json",
    "remap_ids": "put uidmap= and gidmap= from the mapping labels into the mount specs",
    "slow_chown": "change owners where layers can't be mounted idmapped",
    "no_rootfs": "never mount a snapshot's file system; leaves out rootfs",
    "no_userns": "make no user namespace, without which nobody but root can mount: leaves out rootfs, too",
}

_NUMBERS = {
    "rootfs_idle": ("SECONDS", f"unmount a file system that was not used for so long (default {_DEFAULTS.rootfs_idle:g})"),
    "rootfs_max": ("N", f"hold at most so many file systems mounted (default {_DEFAULTS.rootfs_max})"),
    "squash_depth": (
        "N",
        f"make one of the layers of a workspace, in the background, when a checkpoint leaves it on N or more "
        f"(default {_DEFAULTS.squash_depth}; 0: never)",
    ),
}

_ACCESS = {
    "uid": ("USER", "whose the tree is: a name or a number (default: whose the daemon is)"),
    "gid": ("GROUP", "of which group it is, likewise"),
    "umask": ("OCTAL", "what modes lack (default 022: others may look)"),
}

MOUNT_OPTIONS = {
    **dict.fromkeys(_FLAGS, ""),
    **{name: metavar for name, (metavar, _) in (_ACCESS | _NUMBERS).items()},
    "sync": "full|background|none",
    "containerd": "SOCKET",
    "mount_option": "OPT",
}
"""What -o takes: the metavar of the value of each, empty where it has none."""

_IGNORED = frozenset(
    ("rw", "defaults", "auto", "noauto", "nofail", "_netdev", "nosuid", "nodev", "noatime", "dev", "suid", "exec")
)
"""What /etc/fstab and mount(8) say of every file system, and what is so anyway."""


def _serve(given: Given) -> int:
    """Serve; returns 0 when it was ended cleanly."""
    import logging  # --help and completion need none of these, and wait for none
    import signal

    import msgspec
    import trio

    from snapfs.cli import logs
    from snapfs.cli.detach import Detached
    from snapfs.cli.notify import notify

    given_root, given_mountpoint = given.arguments
    valued = [name for name, metavar in MOUNT_OPTIONS.items() if metavar and name != "mount_option"]
    flags = {name for name in _FLAGS if given.has(_dashed(name))}
    values = {name: value for name in valued if (value := given.value(_dashed(name))) is not None}
    overlay = given.all("mount-option")
    for option in _split(given.all("options")):
        name, equals, value = option.partition("=")
        if name == "mount_option" and value:
            overlay.append(value)
        elif name in _FLAGS and not equals:
            flags.add(name)
        elif name in valued and value:
            values[name] = value
        elif option not in _IGNORED and not option.startswith("x-"):
            known = ", ".join(name + "=…" * bool(metavar) for name, metavar in MOUNT_OPTIONS.items())
            raise InvalidArgument(f'unknown mount option "{option}"; there are {known}')
    access = {name: values[name] for name in _ACCESS if name in values}
    sync = values.get("sync", Sync.FULL)
    if sync not in tuple(Sync):
        raise InvalidArgument(f"sync={sync}: there are {', '.join(Sync)}")
    logs.set_up()
    options = Options(
        async_remove="async_remove" in flags,
        upperdir_label="upperdir_label" in flags,
        mount_options=tuple(overlay),
        remap_ids="remap_ids" in flags,
        slow_chown="slow_chown" in flags,
        sync=Sync(sync),
        rootfs="no_rootfs" not in flags,
        rootfs_idle=_number("rootfs_idle", values.get("rootfs_idle", _DEFAULTS.rootfs_idle), float, 0.0),
        rootfs_max=_number("rootfs_max", values.get("rootfs_max", _DEFAULTS.rootfs_max), int, 1),
        squash_depth=_number("squash_depth", values.get("squash_depth", _DEFAULTS.squash_depth), int, 0),
    )
    try:
        from snapfs.fuse.access import Access
        from snapfs.fuse.serve import MountOptions, serve
        from snapfs.kernel.allocator import keep_heap_small
    except ImportError as error:
        raise Unavailable(f"pyfuse3 can't be loaded ({error}); install libfuse3 (Debian: apt-get install fuse3)") from None

    with _forking():
        detached = Detached(given_root, given_mountpoint) if given.has("detach") else None
    if detached is not None and (status := detached.wait_in_parent()) is not None:
        return status
    if detached is not None:
        detached.close_inherited((given_root, given_mountpoint, values.get("containerd", "")))

    def say_ready() -> None:
        line = f"serving {given_root} on {given_mountpoint}"
        if detached is not None:
            detached.ready()
            logs.detach()
        else:
            logs.say(line)
        notify(f"READY=1\nSTATUS={line}")

    wanted = Access(allow_other="allow_other" in flags, **_access(access))
    if access and not wanted.allow_other:
        logging.getLogger(__name__).warning(
            "without allow_other nobody but the owner gets in: %s only change what ls -l shows", ", ".join(access)
        )
    mount = MountOptions(wanted, ro="ro" in flags, dirsync="dirsync" in flags)
    keep_heap_small()
    os.umask(0o077)  # whatever it makes in ROOT, and above it, is its own
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # serve takes them; one that comes after its end is late
        signal.signal(number, signal.SIG_IGN)
    root, mountpoint = given_root if detached is None else os.path.abspath(given_root), os.path.abspath(given_mountpoint)
    more = _containerd(values["containerd"]) if values.get("containerd") else {}
    if detached is not None:
        os.chdir("/")
    outside = None
    if options.rootfs and os.geteuid() != 0 and not userns.may_mount():
        refusal: str | None = "mounting takes the right to: leave out --no-userns, or run it as root"
        if "no_userns" not in flags:
            with _forking():
                root, mountpoint, outside, refusal = _go_inside(root, mountpoint, more)
            if refusal:
                logging.getLogger(__name__).warning("there is no rootfs: %s", refusal)
        if refusal:
            options = msgspec.structs.replace(options, rootfs=False, why_no_rootfs=refusal)
    stopping = partial(notify, "STOPPING=1")
    try:
        reason = trio.run(partial(serve, root, mountpoint, options, mount, say_ready, stopping, **more))
    except SnapshotError as error:
        if not logs.is_detached():
            raise
        logs.say(f"ended: {error}", logging.ERROR)
        return 1
    except Exception as error:
        logging.getLogger(__name__).critical("a fault of snapfs has ended it", exc_info=True)
        logs.say(f"ended: {type(error).__name__}: {error}", logging.ERROR)
        return 1
    finally:
        if outside is not None:
            outside.close()
    try:
        logs.say(f"ended: {reason}")
    except BrokenPipeError:  # the process that waited for the tree may not read any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or the interpreter's end would try to write it again
    return 0


@contextlib.contextmanager
def _forking() -> Iterator[None]:
    """For a block that starts processes.  Raises NoThread where none can be started."""
    try:
        yield
    except BlockingIOError:
        raise NoThread() from None


def _go_inside(root: str, mountpoint: str, more: dict[str, Any]) -> tuple[str, str, Outside | None, str | None]:
    """Enter a mount namespace in which this process may mount: ROOT and the mountpoint (``ready``), what mounts the tree
    outside of it, and None; or as they are, and why there is no such namespace.  ``more`` of the arguments of
    ``fuse.serve.serve`` are put to those.  Raises SnapshotError."""
    from snapfs.fuse.mountpoint import ready
    from snapfs.fuse.outside import Outside

    ready_root, ready_mountpoint = ready(root, mountpoint)
    refusal = userns.why_refused()
    if refusal:
        return root, mountpoint, None, refusal
    outside = Outside(ready_mountpoint)
    processes.outside = outside.users
    why_alone = userns.enter(lent=subids.lent_by_root())
    ids = {"subids": {"on": not why_alone, "why": why_alone or "newuidmap and newgidmap have mapped them"}}
    more |= {"outside": outside, "also_shown": more.get("also_shown", {}) | ids}
    return ready_root, ready_mountpoint, outside, None


def _containerd(path: str) -> dict[str, Any]:
    """The arguments of ``fuse.serve.serve`` for serving containerd beside the tree, on the socket ``path``.  Raises Unavailable
    where what that takes is not installed."""
    try:
        from snapfs.containerd.server import serving
    except ImportError as error:
        raise Unavailable(
            f"containerd's messages can't be loaded ({error}); install it: pip install 'snapfs[containerd]'"
        ) from None
    path = os.path.abspath(path)
    return {"beside": partial(serving, path), "also_shown": {"containerd": path}}


def _access(given: dict[str, str]) -> dict[str, int]:
    """The values of ``uid``, ``gid`` and ``umask``, as far as they are given."""
    found = {}
    for name, text in given.items():
        try:
            found[name] = _READ[name](text)
        except (KeyError, ValueError):
            to_do = "write three octal digits, as in 027" if name == "umask" else "give a number, or a name that there is"
            raise InvalidArgument(f"{name}={text}: {to_do}") from None
    return found


def _uid(text: str) -> int:
    return int(text) if _is_id(text) else pwd.getpwnam(text).pw_uid


def _gid(text: str) -> int:
    return int(text) if _is_id(text) else grp.getgrnam(text).gr_gid


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < (1 << 32) - 1  # that one means none


def _umask(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise ValueError(text)
    return value


_READ: dict[str, Callable[[str], int]] = {"uid": _uid, "gid": _gid, "umask": _umask}


def _number(name: str, text: str | float, convert: Callable[[str | float], N], least: N) -> N:
    """The value of the option ``name``: a number from ``least`` to a million."""
    with contextlib.suppress(ValueError):
        value = convert(text)
        if least <= value <= 1_000_000:
            return value
    raise InvalidArgument(f"{name}={text}: a number from {least:g} to a million is wanted")


def _split(lists: list[str]) -> list[str]:
    """The options of all ``-o``, split at commas that have no backslash before them."""
    return [option.replace("\\,", ",") for text in lists for option in re.split(r"(?<!\\),", text) if option]


def _dashed(name: str) -> str:
    """The flag of a mount option."""
    return name.replace("_", "-")


VERBS = {
    "serve": Verb(
        "serve",
        "ROOT MOUNTPOINT",
        (
            Option("options", "options as mount(8) writes them: allow_other,rootfs_idle=5", "OPT,…", short="-o", many=True),
            *(Option(_dashed(name), text) for name, text in _FLAGS.items()),
            *(Option(_dashed(name), text, metavar) for name, (metavar, text) in (_ACCESS | _NUMBERS).items()),
            Option("mount-option", "an option for every overlay mount", "OPT", many=True),
            Option(
                "sync",
                "background: containerd's Commit returns before its files are flushed; none: flush nothing",
                "full|background|none",
            ),
            Option("containerd", "serve containerd's snapshots service on SOCKET too", "SOCKET"),
            Option("detach", "return when it is mounted, and serve in the background"),
        ),
        "Mount the tree of ROOT, where the layers and records are and which is made if missing, on the directory MOUNTPOINT.\n"
        "Serve it until SIGINT, SIGTERM, SIGHUP or umount MOUNTPOINT.  In -o, write a comma in a value as \\,.",
        """
snapfs serve --detach /srv/snapfs /mnt/snapfs
snapfs serve /srv/snapfs /mnt/snapfs -o allow_other,gid=staff,umask=002
snapfs serve /srv/snapfs /mnt/snapfs --containerd /run/snapfs/snapfs.sock
""",
        _serve,
        at=False,
    )
}
