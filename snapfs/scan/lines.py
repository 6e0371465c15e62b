"""What differs between two chains of layers: one line a path, written as in ``scan/changes.py``.

``A /path`` is there in the new one alone, ``D /path`` in the old one alone, and of a directory that is gone there is one line.
``C /path`` is in both: a directory whose own mode, owner, group or attributes differ, and whatever else is not the very same
file of the same layer; with ``content`` none that is shown as it was.  What is in a directory comes right after it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing

from snapfs.scan.changes import escaped, metadata
from snapfs.scan.copying import VANISHED, open_regular
from snapfs.scan.differing import Difference, Shown, differences, hold_the_same
from snapfs.scan.marks import PREFIX
from snapfs.scan.patch import refuse_metacopy
from snapfs.scan.spool import Spool
from snapfs.scan.walk import Descriptors


def lines(
    old: Sequence[str],
    new: Sequence[str],
    *,
    prefix: str = PREFIX,
    checkpoint: Callable[[], None] = lambda: None,
    spool: str | None = None,
    paths: Iterable[bytes] = (),
    content: bool = False,
) -> Generator[str, None, None]:
    """The lines, each with its newline; takes and raises what ``scan/patch.py`` does."""
    with Descriptors() as descriptors, closing(Spool(spool)) as waiting:
        for found in differences(old, new, descriptors, waiting, prefix, checkpoint, paths, enters=_has_lines):
            verb = "A" if found.old is None else "D" if found.new is None else "C"
            if verb == "C" and _is_shown_the_same(descriptors, found, prefix, checkpoint, content):
                continue
            yield f"{verb} /{escaped(os.fsdecode(found.path))}\n"


def _has_lines(found: Difference) -> bool:
    """Whether what is in it has lines of its own."""
    return found.old is None or (found.new is not None and bool(found.new.directories))


def _is_shown_the_same(
    descriptors: Descriptors, found: Difference, prefix: str, checkpoint: Callable[[], None], content: bool
) -> bool:
    """Whether both sides show the same there, as far as that is to be known; also where it has vanished."""
    old, new = found.old, found.new
    assert old is not None
    assert new is not None
    if old.directories or new.directories or not found.name:
        if not (old.directories and new.directories):
            return not found.name  # a root that one side hasn't got
        before, after = (metadata(descriptors.get(side.directories[0]), prefix) for side in (old, new))
        return before == after or before is None or after is None
    if not content:
        return False
    try:
        with ExitStack() as opened:
            (before, old_file), (after, new_file) = (
                _seen(descriptors, side, found.name, prefix, opened) for side in (old, new)
            )
            if before != after or old_file < 0:
                return before == after
            is_same = hold_the_same(old_file, new_file, os.fstat(old_file).st_size, checkpoint)
            for file in (old_file, new_file) if not is_same else ():
                refuse_metacopy(file, found.name, prefix)
            return is_same
    except OSError as error:
        if error.errno in VANISHED:
            return True
        raise


def _seen(descriptors: Descriptors, side: Shown, name: str, prefix: str, opened: ExitStack) -> tuple[object, int]:
    """All that is shown of what is no directory, but for the bytes of a regular file: that is open then, until ``opened``
    closes it; -1 for anything else.  Raises OSError, also where it has vanished."""
    directory = descriptors.get(side.parent) if side.parent is not None else -1
    if directory < 0:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    own = status.st_mode, status.st_uid, status.st_gid
    if stat.S_ISLNK(status.st_mode):
        return (own, os.readlink(name, dir_fd=directory)), -1
    if not stat.S_ISREG(status.st_mode):
        return (own, status.st_rdev), -1
    file = open_regular(name, directory)
    opened.callback(os.close, file)
    return (metadata(file, prefix), os.fstat(file).st_size), file
