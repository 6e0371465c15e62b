"""``--confine``: a program that may write its workspace alone, by bubblewrap."""

from __future__ import annotations

import fcntl
import os
import stat

from snapfs.cli import table
from snapfs.cli.refusal import NOT_PERMITTED, USAGE, Refusal

WHAT = (
    "With --confine it may write the workspace alone, and a /tmp and a /run of its own, which are empty.  It has no network\n"
    "(but with --net), sees no process but its own, has no privileges, and of what is open gets the standard streams alone.\n"
    "It may read whatever you may read, and use sockets that lie elsewhere.  How much it computes, and how much disk it\n"
    "takes, is not limited."
)

_PSEUDO_TERMINALS = "/proc/sys/dev/tty/legacy_tiocsti"  # 0: nobody types for others into a terminal

_RESOLVER = "/etc/resolv.conf"


def find() -> str:
    """The path of bubblewrap; raises Refusal."""
    import shutil

    found = shutil.which("bwrap")
    if found is None:
        raise Refusal("--confine takes bubblewrap, which is not installed: apt-get install bubblewrap")
    return found


def words(inside: str, there: str, command: list[str], *, net: bool) -> list[str]:
    """How bubblewrap is called to run ``command`` in the workspace that is mounted at ``inside``, and is to be at ``there``;
    says what that may do."""
    reach = "it has the network" if net else "it has no network"
    table.complain(
        f"{command[0]} may write {there}, which is the workspace, and a /tmp and a /run of its own; {reach}, and may read what "
        "you may read"
    )
    called = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    called += [
        "--ro-bind",
        "/proc/sys",
        "/proc/sys",
    ]  # root writes there without any privilege, and so starts programs
    called += ["--bind", inside, there, "--unshare-all", "--cap-drop", "ALL", "--die-with-parent"]
    if net:
        resolver = os.path.realpath(_RESOLVER)  # which is often in /run
        called += ["--share-net", "--ro-bind-try", resolver, resolver]
    if _may_type_for_others():
        called += ["--new-session"]
    here = os.getcwd()
    called += ["--chdir", here if f"{here}/".startswith(f"{there}/") else there]
    return [*called, "--", *command]


def close_off() -> None:
    """Leave nothing by which a program that this process becomes could write elsewhere: descriptors that whoever started this
    has left open, mounts that are to come, and a standard stream that is a file, which /proc opens anew for writing.  The
    process gets a mount namespace of its own.  Raises Refusal."""
    from snapfs.kernel import userns

    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:  # noqa: SIM105, for contextlib takes its time
                os.set_inheritable(int(name), False)
            except OSError:  # that of the list itself
                pass
    try:
        try:
            userns.copy_mounts()
        except PermissionError:  # in a program that was started in a workspace
            userns.enter()
        userns.close_mounts()
    except OSError as error:
        raise Refusal(f"cannot confine a program here: {error.strerror}: do it outside of workspaces", NOT_PERMITTED) from None
    for fd in range(3):
        _close_for_writing(fd)


def _close_for_writing(fd: int) -> None:
    """Have the file that is open as ``fd`` for reading alone be open by a read-only mount, if it is a file of a disk.  Raises
    Refusal."""
    status = os.fstat(fd)
    is_read = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    if not is_read or not status.st_nlink or stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFBLK):
        return
    from snapfs.kernel import mountapi, mounting

    refused = Refusal("standard input is a file that could be written all the same: give a pipe (cat FILE | snapfs …)", USAGE)

    try:
        found = os.open(os.readlink(f"/proc/self/fd/{fd}"), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not os.path.samestat(os.fstat(found), status):
                raise refused
            tree = mounting.make_bind(f"/proc/self/fd/{found}", read_only=True, attributes=mountapi.MOUNT_ATTR_NODEV)
        finally:
            os.close(found)
        try:
            again = os.open(f"/proc/self/fd/{tree}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(tree)
    except OSError:
        raise refused from None
    os.lseek(again, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
    os.dup2(again, fd)
    os.close(again)


def _may_type_for_others() -> bool:
    try:
        with open(_PSEUDO_TERMINALS, encoding="ascii") as told:
            return told.read().strip() != "0"
    except OSError:
        return True
