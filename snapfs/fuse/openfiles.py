"""The files and directories that processes have open through one mount, by the number that the kernel has for each."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Hashable
from itertools import count

from pyfuse3 import EntryAttributes

from snapfs.errors import TryAgain, Unavailable
from snapfs.tree import Handle
from snapfs.tree.texts import Text

SHARE = 8 << 20  # bytes that one user may make the daemon hold by what the user has open
ALL = 4 * SHARE  # bytes that all of them may, for one user may have many ids
ALLOWANCE = 256 << 10  # bytes of each user that count apart, up to ALL too: a few who hold much leave these to the others

OPENERS_OF_USER, OPENERS = 16, 32
"""How many times a user, and all together, may have a file open for writing to which a write does something (``Handle.does``):
one write is done at a time, and who writes next waits behind all others.  Who has it open not at all may open it up to twice as
many."""

MANY_WRITERS = "as many processes as may have opened this file to write to it"


class OpenFile:
    """One open file.

    ``inode`` is the one that was opened, ``user`` who has done so (``Caller``), ``path`` where it stood then, ``handle`` what
    the tree has opened, ``entry`` what stat(2) says of it.  ``is_misfit``: its text is not that of its inode.
    """

    def __init__(
        self, inode: int, user: int | None, path: str, handle: Handle, entry: EntryAttributes, is_misfit: bool
    ) -> None:
        self.inode = inode
        self.user = user
        self.path = path
        self.handle = handle
        self.entry = entry
        self.is_misfit = is_misfit


class Held:
    """What the daemon holds for one user: handles, and the texts that they have open, each once."""

    def __init__(self) -> None:
        self.weight = 0
        self._charged: dict[Handle, int] = {}
        self._texts: Counter[Text] = Counter()

    def cost(self, handle: Handle) -> int:
        """What ``handle`` adds to that."""
        return handle.weight + (handle.text.weight if handle.text is not None and handle.text not in self._texts else 0)

    def add(self, handle: Handle) -> None:
        """``handle`` is open from now on."""
        self.weight += self.cost(handle)
        self._charged[handle] = handle.weight
        if handle.text is not None:
            self._texts[handle.text] += 1

    def remove(self, handle: Handle) -> None:
        """``handle`` is closed."""
        if handle.text is not None:
            self._texts[handle.text] -= 1
            if not self._texts[handle.text]:
                del self._texts[handle.text]
        self.weight -= self.cost(handle) - handle.weight + self._charged.pop(handle)

    def grown(self, handle: Handle) -> int:
        """By how much ``handle``, which is open, weighs more than what was counted for it."""
        return handle.weight - self._charged[handle]

    def reweigh(self, handle: Handle) -> None:
        """Count what ``handle``, which is open, weighs by now."""
        self.weight += self.grown(handle)
        self._charged[handle] = handle.weight


class OpenFiles:
    """All open files of one mount.

    A file that is open keeps its text in memory, or on the disk, whatever the file holds by now; so users who change what is
    shown and keep each text open could fill both.
    """

    def __init__(self) -> None:
        self._by_number: dict[int, OpenFile] = {}
        self._by_inode: dict[int, list[OpenFile]] = {}
        self._numbers = count(1)
        self._held: dict[int, Held] = {}  # by user
        self._users: dict[Handle, int] = {}
        self._writers: dict[Hashable, Counter[int]] = {}  # by file (``Handle.does``) and user: how many are open for writing
        self._allowed = 0  # the weight of all that is held for users, up to ALLOWANCE of each
        self._weight = 0  # of what is held besides

    def charge(self, handle: Handle, uid: int) -> None:
        """Count ``handle``, which is about to be added, as one that user ``uid`` has open, until it is removed.

        Raises Unavailable where the user, or all who are counted, would have too much open by that; TryAgain where they have it
        open for writing too often."""
        held = self._held.get(uid) or Held()
        self._refuse(uid, held.weight, held.cost(handle))
        if handle.does is not None:
            if self.has_enough_writers(handle.does, uid):
                raise TryAgain(MANY_WRITERS)
            self._writers.setdefault(handle.does, Counter())[uid] += 1
        self._count(held, -1)
        held.add(handle)
        self._count(held, 1)
        self._held[uid] = held
        self._users[handle] = uid

    def has_enough_writers(self, does: Hashable, uid: int) -> bool:
        """Whether user ``uid`` may not open the file that is known as ``does`` once more to write to it."""
        writers = self._writers.get(does, Counter())
        own = writers[uid]
        return own >= OPENERS_OF_USER or writers.total() >= (OPENERS if own else 2 * OPENERS)

    def reweigh(self, handle: Handle) -> None:
        """Count what ``handle``, which is open, weighs by now.  Raises Unavailable as ``charge`` does; then nothing has
        changed."""
        uid = self._users.get(handle)
        if uid is not None and (grown := self._held[uid].grown(handle)):
            held = self._held[uid]
            self._refuse(uid, held.weight, grown)
            self._count(held, -1)
            held.reweigh(handle)
            self._count(held, 1)

    def _refuse(self, uid: int, weight: int, cost: int) -> None:
        if cost > 0 and weight + cost > SHARE:
            raise Unavailable(
                f"user {uid} has too many files open, or too many texts of files that have changed since: close some of them",
                errno.EMFILE,
            )
        allowed = min(weight + cost, ALLOWANCE) - min(weight, ALLOWANCE)
        besides = cost - allowed
        if (allowed > 0 and self._allowed + allowed > ALL) or (besides > 0 and self._weight + besides > ALL):
            raise Unavailable(
                "users have too many files open, or too many texts of files that have changed since: some must be closed",
                errno.ENFILE,
            )

    def _count(self, held: Held, sign: int) -> None:
        allowed = min(held.weight, ALLOWANCE)
        self._allowed += sign * allowed
        self._weight += sign * (held.weight - allowed)

    def _discharge(self, handle: Handle) -> None:
        uid = self._users.pop(handle, None)
        if uid is not None:
            if handle.does is not None:
                writers = self._writers[handle.does]
                writers[uid] -= 1
                writers += Counter()  # none of those who have none
                if not writers:
                    del self._writers[handle.does]
            held = self._held[uid]
            self._count(held, -1)
            held.remove(handle)
            self._count(held, 1)
            if not held.weight:
                del self._held[uid]

    def add(self, file: OpenFile) -> int:
        """The number by which the kernel asks for ``file`` from now on."""
        fh = next(self._numbers)
        self._by_number[fh] = file
        self._by_inode.setdefault(file.inode, []).append(file)
        return fh

    def __getitem__(self, fh: int) -> OpenFile:
        return self._by_number[fh]

    def get(self, fh: int | None) -> OpenFile | None:
        """The open file with number ``fh``, if there is one."""
        return None if fh is None else self._by_number.get(fh)

    def remove(self, fh: int) -> None:
        """The file with number ``fh`` is closed."""
        file = self._by_number.pop(fh)
        self._by_inode[file.inode].remove(file)
        if not self._by_inode[file.inode]:
            del self._by_inode[file.inode]
        self._discharge(file.handle)

    def any_of(self, inode: int) -> OpenFile | None:
        """The first file that was opened under ``inode``, if one still is."""
        files = self._by_inode.get(inode)
        return files[0] if files else None

    def misfit(self, inode: int) -> OpenFile | None:
        """The first open file of ``inode`` whose text is not that of the inode."""
        for file in self._by_inode.get(inode, ()):
            if file.is_misfit:
                return file
        return None


class OpenDirectory:
    """One open directory: its ``inode``, and ``user``, who has opened it (``Caller``)."""

    __slots__ = ("inode", "user")

    def __init__(self, inode: int, user: int | None) -> None:
        self.inode = inode
        self.user = user


class OpenDirectories:
    """All open directories of one mount."""

    def __init__(self) -> None:
        self._by_number: dict[int, OpenDirectory] = {}
        self._numbers = count(1)

    def add(self, directory: OpenDirectory) -> int:
        """The number by which the kernel asks for ``directory`` from now on."""
        fh = next(self._numbers)
        self._by_number[fh] = directory
        return fh

    def __getitem__(self, fh: int) -> OpenDirectory:
        return self._by_number[fh]

    def remove(self, fh: int) -> None:
        """The directory with number ``fh`` is closed."""
        del self._by_number[fh]
