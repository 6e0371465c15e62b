"""A snapshot and its chain -> the mounts that make its file system; pure.

The format is containerd's to the letter, since containerd reads ``upperdir=`` out of the options and writes layers
straight into it.  Sources: containerd's overlay snapshotter, the kernel's ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from snapfs.errors import InvalidArgument
from snapfs.model import Kind, Mount

UID_MAPPING = "containerd.io/snapshot/uidmapping"
GID_MAPPING = "containerd.io/snapshot/gidmapping"

PAGE = 4096
"""Bytes of options that mount(2) takes, the closing NUL among them; it cuts longer ones without a word."""

Mapped = tuple[int, int, int]
"""One line of an id mapping: first id in the container, first id on the host, how many."""


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


def script(spec: Sequence[Mount], snapshots: str, what: str) -> str:
    """The ``mount`` commands of ``spec`` as a POSIX shell script with the target as ``$1``.

    ``snapshots`` is ROOT/snapshots: where the layers' paths together exceed a page they are written relative to it, which
    the kernel resolves from the working directory.  ``what`` names the snapshot in a comment.
    """
    lines = [
        "#!/bin/sh",
        f"# Mounts the snapshot {what}: sh mount.sh TARGET",
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


def parse_mapping(text: str, label: str) -> list[Mapped]:
    """``container:host:size`` with commas between several, as in the mapping labels; raises InvalidArgument."""
    lines = []
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and int(n) < 2**32 for n in numbers):
            raise InvalidArgument(f'label {label}: "{part}" is not container:host:size with three numbers')
        container, host, size = map(int, numbers)
        lines.append((container, host, size))
    return lines


def to_host(container_id: int, mapping: Sequence[Mapped]) -> int | None:
    """The host's id for ``container_id``, None where ``mapping`` has none."""
    for container, host, size in mapping:
        if container <= container_id < container + size:
            return host + container_id - container
    return None


def remapped(host_id: int, before: Sequence[Mapped], after: Sequence[Mapped]) -> int:
    """The host's id that ``after`` has for what is ``host_id`` in ``before``; an empty mapping is the identity, and an id
    without a counterpart stays."""
    inside = to_host(host_id, [(host, container, size) for container, host, size in before]) if before else host_id
    outside = None if inside is None else to_host(inside, after) if after else inside
    return host_id if outside is None else outside


def root_owner(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The host's uid and gid of the container's ids 0 after the mapping labels; None where there are none.

    With only one of the two labels the other id is 0.  Raises InvalidArgument for a mapping that doesn't parse or has
    no entry for 0.
    """
    if not labels.get(UID_MAPPING) and not labels.get(GID_MAPPING):
        return None
    owner = []
    for label in (UID_MAPPING, GID_MAPPING):
        text = labels.get(label)
        host = to_host(0, parse_mapping(text, label)) if text else 0
        if host is None:
            raise InvalidArgument(f'label {label}: "{text}" maps no host id to the container id 0')
        owner.append(host)
    return owner[0], owner[1]
