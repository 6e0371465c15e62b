"""What the command refuses, or was refused: the sentence and the exit status."""

from __future__ import annotations

import errno
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, USAGE, NOT_FOUND, TAKEN, BUSY, NOT_PERMITTED, NO_TREE, CONFLICT = range(1, 9)

_STATUS = {
    errno.ENOENT: NOT_FOUND,
    errno.EEXIST: TAKEN,
    errno.EBUSY: BUSY,
    errno.ENOTEMPTY: BUSY,
    errno.EPERM: NOT_PERMITTED,
    errno.EACCES: NOT_PERMITTED,
    errno.EROFS: NOT_PERMITTED,
    errno.ENOTCONN: NO_TREE,
    errno.ECONNABORTED: NO_TREE,
}

_TAIL, _MOST = 64 << 10, 4 << 20  # bytes of error_log that are searched at first, and at most: no more is kept


class Refusal(Exception):
    """The command was not carried out: ``str`` is the sentence that says why, ``status`` the exit status."""

    def __init__(self, sentence: str, status: int = FAILED) -> None:
        super().__init__(sentence)
        self.status = status


def changed(key: str, status: int = BUSY) -> Refusal:
    """The refusal that says that the snapshot ``key`` is no longer what it was."""
    return Refusal(f'"{key}" was committed or removed a moment ago: see snapfs ls, and try again', status)


def refusal(error: OSError, tree: str, otherwise: str, words: str = "", unlogged: Refusal | None = None) -> Refusal:
    """The refusal for a call in the tree at ``tree`` that failed with ``error``, with the ``words`` that the tree has logged
    (``last_words``).  Where it has logged none, since the kernel itself refused: ``otherwise``, and the kernel's words; or
    ``unlogged``, if that is given."""
    number = error.errno or 0
    status = _STATUS.get(number, FAILED)
    if status == NO_TREE:
        from snapfs.names import word

        return Refusal(f"the daemon that served {tree} is gone: start it again (snapfs serve ROOT {word(tree)})", NO_TREE)
    if unlogged is not None and not words:
        return unlogged
    if number == errno.EAGAIN and not words:
        words = f"{otherwise}: another process has a lease on it, or many ask for it: try again"
    return Refusal(words or f"{otherwise}: {os.strerror(number)}", status)


def last_words(descriptor: int, error: OSError, operations: Sequence[str], paths: Sequence[str], began: int) -> str:
    """The reason in the last line of the error_log that is open as ``descriptor``, which is closed, with the errno of
    ``error``, one of these ``operations`` and these ``paths``, that is no older than ``began`` (ns since the epoch).  Other
    users' calls have lines there, too, and must not choose what is said here."""
    from snapfs.names import printable, without_colons

    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    where = printable(without_colons(" ".join(paths))) + ": "
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(began // 1_000_000_000)) + f".{began % 1_000_000_000:09d}Z"
    most = _TAIL
    with open(descriptor, "rb") as log:
        while True:
            try:
                size = os.fstat(descriptor).st_size
                log.seek(max(0, size - most))
                lines = log.read(most).decode(errors="replace").splitlines()
            except OSError:
                return ""
            for line in reversed(lines):
                when, _, rest = line.partition(" ")
                if when < since:
                    return ""
                number, _, what = rest.partition(" ")
                operation, _, told = what.partition(" ")
                if number == name and operation in operations and told.startswith(where):
                    return told.removeprefix(where)
            if most >= min(size, _MOST):
                return ""
            most *= 8  # others are refused all the time
