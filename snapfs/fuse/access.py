"""Who may do what in the mounted tree.

Without ``allow_other`` the kernel lets nobody in but processes whose user and group ids all are the owner's, root no more than
others, and asks for no modes.  With it everybody is let in, and the kernel (``default_permissions``) decides by what is shown
here, as on other file systems:

- everything belongs to ``uid`` and ``gid`` (but for files that nobody may write), with all permissions that make sense less
  ``umask``: a user who may write may prepare, commit, rename, label and remove every snapshot and clean up, one who may read
  sees their names, labels and mounts;
- what is in a layer is for users alone who may read ROOT, which is the daemon's own with mode 0700.  So ``diff`` and ``rootfs``
  lead others to EACCES, ``changes``, ``changes.patch``, ``compare`` and ``layer.tar`` belong to the daemon's user alone
  whatever the options say, and error_log leaves out what it would tell of a layer.  How much a layer takes is no secret, nor
  where it is mounted and which processes use it, as far as /proc tells the daemon.

To let another user work in a snapshot, mount it elsewhere as root (``mount.sh``): its files' own modes decide there, and
``rootfs`` leads to that place for all.
"""

from __future__ import annotations

import os
import stat

import msgspec

from snapfs.errors import SnapshotError
from snapfs.kernel.subids import Owners
from snapfs.tree import Attributes

_LENT = Owners()


class Access(msgspec.Struct, frozen=True):
    """Options of the mount.  ``allow_other``: users other than the owner may enter; ``uid``, ``gid``, ``umask``: whose the
    tree is, and what its modes lack."""

    allow_other: bool = False
    uid: int = msgspec.field(default_factory=os.geteuid)
    gid: int = msgspec.field(default_factory=os.getegid)
    umask: int = 0o022

    @property
    def others_may_write(self) -> bool:
        """Whether anybody but root and the user that the daemon runs as may change the tree."""
        granted = 0o222 & ~self.umask
        return self.allow_other and bool(granted & (0o022 if self.uid == os.geteuid() else 0o222))

    def owner(self, found: Attributes) -> tuple[int, int]:
        """User and group of a node."""
        if found.private:
            return os.geteuid(), os.getegid()
        return self.uid if self._apart(found) is None else os.geteuid(), self.gid

    def mode(self, found: Attributes) -> int:
        """Type and permissions of a node; nobody heeds those of a link."""
        if stat.S_ISLNK(found.mode):
            return found.mode
        mode = self._apart(found)
        return found.mode & ~self.umask if mode is None else mode

    def _apart(self, found: Attributes) -> int | None:
        """The mode of a file that nobody may write, which is the daemon's own though the tree is another user's; None for any
        other node.

        Its owner could put a lease on it (F_SETLEASE), and the kernel would have each process wait that opens it, for a minute
        or so, and not tell the daemon.  So ``uid`` reads it as the group or all others do.  These may, then, whatever ``umask``
        says, if it keeps them from entering any directory, and so from getting to the file.  Where it lets them enter and
        takes reading from them alone, as 006 does, the file is the user's after all."""
        if not stat.S_ISREG(found.mode) or found.mode & 0o222 or found.private or self.uid == os.geteuid():
            return None
        kept_out = sum(0o7 << shift for shift in (0, 3, 6) if self.umask >> shift & 0o1)
        mode = found.mode & ~(self.umask & ~kept_out)
        return mode if mode & 0o444 == 0o444 else None

    def may_enter_root(self, uid: int) -> bool:
        """Whether a process with this user id gets into ROOT; others may have a capability for that, which is not known."""
        return uid in (0, os.geteuid())

    def user(self, uid: int) -> int | None:
        """The user with this id, as ``Caller`` has it: None for the owner and root.  All ids that root has lent to a user count
        as one (``kernel/subids.py``): whoever has 65,536 could take the places of as many users."""
        return None if self.may_enter_root(uid) else _LENT.one_of(uid)

    def words(self, error: Exception) -> str:
        """What error_log, which every user of the tree may read, says of ``error``."""
        if isinstance(error, SnapshotError):
            return error.public if self.allow_other else str(error)
        if self.allow_other:
            return error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return str(error) if isinstance(error, OSError) else repr(error)
