"""Every directory of a layer, however deep and long its paths are: what counts, changes or deletes a layer walks it so."""

from __future__ import annotations

import os
from collections.abc import Generator

Entries = list[tuple[str, os.stat_result]]

_ANCHOR = 2000  # bytes of relative path after which a new descriptor is opened: half of what a path may have


class _Anchor:
    """An open directory that paths are relative to; closed when the last directory below it has been visited."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def directories(top: str) -> Generator[tuple[int, Entries], None, None]:
    """An open descriptor of ``top`` and then of each directory below it, parents first, with its entries: names, and what
    lstat(2) says of each.

    The descriptor is valid until the next step.  What vanishes meanwhile is left out.  Depth costs neither stack nor more than
    a few descriptors, and no path is too long, since each is relative to an anchor.  Raises OSError where ``top`` is
    missing or the disk fails.  Blocks on the disk; close the generator to let go of what it has open.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    pending = [(_Anchor(os.open(top, flags)), ".")]
    while pending:
        anchor, path = pending.pop()
        try:
            fd = os.open(path, flags, dir_fd=anchor.fd)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            if len(os.fsencode(path)) > _ANCHOR:
                anchor, path = _Anchor(os.dup(fd)), "."
            found: Entries = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    found.append((entry.name, stat))
                    if is_directory(stat):
                        pending.append((anchor, f"{path}/{entry.name}"))
            yield fd, found
        finally:
            os.close(fd)


def is_directory(stat: os.stat_result) -> bool:
    """Whether ``stat`` is a directory's."""
    return stat.st_mode & 0o170000 == 0o040000
