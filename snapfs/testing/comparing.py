"""What a test changed in its copy: the lines of ``changes``, also where the copy is no overlay."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from snapfs.scan.changes import escaped


def compared(base: str, copy: str) -> list[str]:
    """What the whole copy ``copy`` has other than ``base``, as ``snapfs/scan/changes.py`` tells it of a layer: lines, each with
    its newline.  A file that was written counts as changed, whatever was written, for its time is another."""
    if not os.path.isdir(copy):
        return ["D /\n"]
    top = ["C /\n"] if _state(os.lstat(base)) != _state(os.lstat(copy)) else []
    return [*top, *_compared(base, copy, "/")]


def _compared(base: str, copy: str, path: str) -> Iterator[str]:
    before, after = _listed(base), _listed(copy)
    for name in sorted({*before, *after}, key=os.fsencode):
        old, new = before.get(name), after.get(name)
        text = path + escaped(name)
        if new is None:
            yield f"D {text}\n"
            continue
        is_directory = stat.S_ISDIR(new.st_mode)
        if old is None:
            yield f"A {text}\n"
        elif _state(old) != _state(new) or (
            stat.S_ISLNK(new.st_mode) and os.readlink(f"{base}/{name}") != os.readlink(f"{copy}/{name}")
        ):
            yield f"C {text}\n"
        if is_directory:
            below = old is not None and stat.S_ISDIR(old.st_mode)
            yield from _compared(f"{base}/{name}" if below else "", f"{copy}/{name}", f"{text}/")


def _listed(directory: str) -> dict[str, os.stat_result]:
    if not directory:
        return {}
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    except PermissionError:  # this user may not look into it
        return {}


def _state(status: os.stat_result) -> tuple[int, ...]:
    own = (status.st_mode, status.st_uid, status.st_gid)
    return own if stat.S_ISDIR(status.st_mode) else (*own, status.st_size, status.st_mtime_ns, status.st_rdev)
