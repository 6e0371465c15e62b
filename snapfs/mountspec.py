"""A snapshot and its chain -> the mounts that make its file system; pure.

The format is containerd's to the letter, since containerd reads ``upperdir=`` out of the options and writes layers
straight into it.  Sources: containerd's overlay snapshotter, the kernel's ``Documentation/filesystems/overlayfs.rst``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.model import Kind, Mount
from snapfs.mountoptions import PAGE, escape

MOST_LOWERS = 500
"""Lower layers that the kernel mounts together (OVL_MAX_STACK of its ``fs/overlayfs/params.h``), an upper layer besides."""


def mounts(
    kind: Kind,
    directory: str,
    parents: Sequence[str],
    *,
    options: Sequence[str] = (),
    remap: Mapping[str, str] | None = None,
    alone: bool = False,
) -> list[Mount]:
    """The mount spec of an active snapshot or a view.

    ``directory`` is its own ``ROOT/snapshots/<id>``, ``parents`` those of its chain, the nearest first; ``options`` go on
    overlay mounts only; ``remap`` holds the labels whose mappings become ``uidmap=`` and ``gidmap=``.

    ``alone``: an active snapshot without a parent is an overlay all the same, of its own layer and no lower directory.  No
    kernel mounts that: it tells containerd's applier, which writes straight into ``upperdir=``, to write whiteouts.
    """
    remapped = [
        f"{option}={remap[label]}"
        for option, label in (("uidmap", UID_MAPPING), ("gidmap", GID_MAPPING))
        if remap and label in remap
    ]
    if not parents and not (alone and kind is Kind.ACTIVE):
        return [Mount("bind", f"{directory}/fs", (*remapped, "rw" if kind is Kind.ACTIVE else "ro", "rbind"))]
    if kind is Kind.ACTIVE:
        own = [f"workdir={escape(directory)}/work", f"upperdir={escape(directory)}/fs"]
    elif len(parents) == 1:
        return [Mount("bind", f"{parents[0]}/fs", (*remapped, "ro", "rbind"))]
    else:
        own = []
    lower = [f"lowerdir={':'.join(f'{escape(parent)}/fs' for parent in parents)}"] if parents else []
    return [Mount("overlay", "overlay", (*remapped, *own, *lower, *options))]


def script(spec: Sequence[Mount], snapshots: str, number: int) -> str:
    """The ``mount`` commands of ``spec`` as a POSIX shell script with the target as ``$1``, for mount(8) of any version and
    for busybox's.

    ``snapshots`` is ROOT/snapshots.
    """
    lines = [
        *_beginning(number),
        'target=$(cd -- "$1" && pwd -P && echo .) && target=${target%??} || exit',  # absolute, newlines and all
    ]
    for mount in spec:
        if any(option.startswith(("uidmap=", "gidmap=")) for option in mount.options):
            lines.append('echo "mount.sh: mount(8) does not remap ids; let a container runtime mount mounts.json" >&2; exit 1')
        elif mount.type == "bind":
            directory, _, name = mount.source.rpartition("/")
            lines.append(f"cd {shlex.quote(directory)} || exit")  # busybox's mount cuts a source at a #
            lines.append(f'mount -o rbind {name} "$target" || exit')
            # or what a user mounts in there would come to be in ROOT, too
            lines.append('mount --make-rprivate "$target" || { umount "$target"; exit 1; }')
            if "ro" in mount.options:  # a bind takes its ro in a second step: the kernel ignores it in the first
                lines.append('mount -o remount,bind,ro "$target" || { umount "$target"; exit 1; }')
        else:
            lines += _overlay_script(mount, snapshots)
    return "\n".join(lines) + "\n"


def script_inside(number: int, link: str, python: str) -> str:
    """The script where the daemon has a user namespace of its own, which mount(8) doesn't take for the right to mount: ``snapfs
    mount`` enters it.  ``link`` is the path in the tree of by-id/<number>, ``python`` the interpreter that has snapfs."""
    command = shlex.join([python, "-P", "-m", "snapfs.cli", "mount", "--", link])
    return "\n".join((*_beginning(number), f'exec {command} "$1"')) + "\n"


def _beginning(number: int) -> tuple[str, ...]:
    return (
        "#!/bin/sh",
        f"# Mounts snapshot {number}: sh mount.sh TARGET",
        '[ $# -eq 1 ] || { echo "usage: sh mount.sh TARGET" >&2; exit 2; }',
    )


def _overlay_script(mount: Mount, snapshots: str) -> list[str]:
    """The lines that mount an overlay by mount(2), whose options have to fit a page.

    LIBMOUNT_FORCE_MOUNT2 makes util-linux take mount(2); from 2.39 on it would hand each option to fsconfig(2), whose values
    end at 255 bytes.  Where the paths of all layers don't fit a page, they are relative to ``snapshots``; where those don't
    either, they are links with short names, which overlayfs follows once, when it mounts.  The upper directory always has its
    whole path, by which the mount table says whose file system it is.

    util-linux keeps options together between two double quotes, and refuses an odd number of these: the work directory and
    the upper directory have an even one.
    """
    lower = next(option for option in mount.options if option.startswith("lowerdir="))
    layers = lower.removeprefix("lowerdir=").replace(escape(snapshots) + "/", "").split(":")
    links = [str(n) for n in range(len(layers))]
    whole, relative, linked = (
        ",".join(option if option is not lower else text for option in mount.options)
        for text in (lower, "lowerdir=" + ":".join(layers), "lowerdir=" + ":".join(links))
    )
    ways = (relative, linked) if '"' in lower else (whole, relative, linked)
    options = next((text for text in ways if len(text.encode()) < PAGE), None)
    if options is None:
        return ['echo "mount.sh: the paths of the layers are too long for mount(8); snapfs mount takes them" >&2; exit 1']
    lines = []
    if options is not whole:
        lines.append(f"cd {shlex.quote(snapshots)} || exit")
    if options is linked:
        lines += [
            "links=$(mktemp -d) || exit",
            "trap 'rm -r \"$links\"' EXIT",
            "trap 'exit 1' HUP INT TERM",
            "count=0",
            f"for layer in {' '.join(layers)}; do",
            '    ln -s "$PWD/$layer" "$links/$count" || exit',
            "    count=$((count + 1))",
            "done",
            'cd "$links" || exit',
        ]
    lines.append(
        f'LIBMOUNT_FORCE_MOUNT2=always mount -t {mount.type} -o {shlex.quote(options)} {shlex.quote(mount.source)} "$target"'
    )
    return lines
