"""``--confine``: a program that may write its workspace alone, by bubblewrap."""

from __future__ import annotations

import os

from snapfs.cli import table
from snapfs.cli.refusal import Refusal

WHAT = (
    "With --confine it may write the workspace alone, and a /tmp and a /run of its own, which are empty.  It has no network\n"
    "(but with --net), sees no process but its own, and has no privileges.  It may read whatever you may read, and use\n"
    "sockets that lie elsewhere.  How much it computes, and how much disk it takes, is not limited."
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
    called += ["--bind", inside, there, "--unshare-all", "--cap-drop", "ALL", "--die-with-parent"]
    if net:
        resolver = os.path.realpath(_RESOLVER)  # which is often in /run
        called += ["--share-net", "--ro-bind-try", resolver, resolver]
    if _may_type_for_others():
        called += ["--new-session"]
    here = os.getcwd()
    called += ["--chdir", here if f"{here}/".startswith(f"{there}/") else there]
    return [*called, "--", *command]


def _may_type_for_others() -> bool:
    try:
        with open(_PSEUDO_TERMINALS, encoding="ascii") as told:
            return told.read().strip() != "0"
    except OSError:
        return True
