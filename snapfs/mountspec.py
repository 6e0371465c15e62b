"""A snapshot and its chain -> the mounts that make its file system; pure.

The format is containerd's to the letter, since containerd reads ``upperdir=`` out of the options and writes layers
straight into it.  Sources: containerd's overlay snapshotter, the kernel's ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.model import Kind, Mount

PAGE = 4096
"""Bytes of options that mount(2) takes, the closing NUL among them; it cuts longer ones without a word."""

MOST_LOWERS = 500
"""Lower layers that the kernel mounts together (OVL_MAX_STACK of its ``fs/overlayfs/params.h``), an upper layer besides."""


def mounts(
    kind: Kind,
    directory: str,
    parents: Sequence[str],
    *,
    options: Sequence[str] = (),
    remap: Mapping[str, str] | None = None,
) -> list[Mount]:
    """The mount spec of an active snapshot or a view.

    ``directory`` is its own ``ROOT/snapshots/<id>``, ``parents`` those of its chain, the nearest first; ``options`` go on
    overlay mounts only; ``remap`` holds the labels whose mappings become ``uidmap=`` and ``gidmap=``.
    """
    remapped = [
        f"{option}={remap[label]}"
        for option, label in (("uidmap", UID_MAPPING), ("gidmap", GID_MAPPING))
        if remap and label in remap
    ]
    if not parents:
        return [Mount("bind", f"{directory}/fs", (*remapped, "rw" if kind is Kind.ACTIVE else "ro", "rbind"))]
    if kind is Kind.ACTIVE:
        own = [f"workdir={escape(directory)}/work", f"upperdir={escape(directory)}/fs"]
    elif len(parents) == 1:
        return [Mount("bind", f"{parents[0]}/fs", (*remapped, "ro", "rbind"))]
    else:
        own = []
    lower = ":".join(f"{escape(parent)}/fs" for parent in parents)
    return [Mount("overlay", "overlay", (*remapped, *own, f"lowerdir={lower}", *options))]


def escape(path: str) -> str:
    r"""``path`` as overlayfs reads it in its options: a backslash before each ``\``, ``,`` and ``:``."""
    return path.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")


def script(spec: Sequence[Mount], snapshots: str, number: int) -> str:
    """The ``mount`` commands of ``spec`` as a POSIX shell script with the target as ``$1``.

    ``snapshots`` is ROOT/snapshots: where the layers' paths together exceed a page they are written relative to it, which
    the kernel resolves from the working directory.
    """
    lines = [
        "#!/bin/sh",
        f"# Mounts snapshot {number}: sh mount.sh TARGET",
        '[ $# -eq 1 ] || { echo "usage: sh mount.sh TARGET" >&2; exit 2; }',
        'target=$(cd -- "$1" && pwd -P && echo .) && target=${target%??} || exit',  # absolute, newlines and all
    ]
    for mount in spec:
        options = ",".join(mount.options)
        if any(option.startswith(("uidmap=", "gidmap=")) for option in mount.options):
            lines.append('echo "mount.sh: mount(8) does not remap ids; let a container runtime mount mounts.json" >&2; exit 1')
        elif mount.type == "bind":
            directory, _, name = mount.source.rpartition("/")
            lines.append(f"cd {shlex.quote(directory)} || exit")  # busybox's mount cuts a source at a #
            lines.append(f'mount -o rbind {name} "$target" || exit')
            if "ro" in mount.options:  # a bind takes its ro in a second step: the kernel ignores it in the first
                lines.append('mount -o remount,bind,ro "$target" || { umount "$target"; exit 1; }')
        else:
            if len(options.encode()) >= PAGE:
                lines.append(f"cd {shlex.quote(snapshots)} || exit")
                options = ",".join(
                    option.replace(escape(snapshots) + "/", "") if option.startswith("lowerdir=") else option
                    for option in mount.options
                )
            lines.append(f'mount -t {mount.type} -o {shlex.quote(options)} {shlex.quote(mount.source)} "$target"')
    return "\n".join(lines) + "\n"
