"""Who may do what in the mounted tree.

Without ``allow_other`` the kernel lets nobody in but processes whose user and group ids all are the owner's, root no more than
others, and asks for no modes.  With it everybody is let in, and the kernel (``default_permissions``) decides by what is shown
here, as on other file systems:

- everything belongs to ``uid`` and ``gid`` (but for files that all may read and nobody write), with all permissions that make
  sense less ``umask``: a user who may write may prepare, commit, rename, label and remove every snapshot and clean up, one
  who may read sees their names, labels and mounts;
- what is in a layer is for users alone who may read ROOT, which is the daemon's own with mode 0700.  So ``diff`` and ``rootfs``
  lead others to EACCES, ``changes`` belongs to the daemon's user with mode 0400 whatever the options say, and error_log leaves
  out what it would tell of a layer.  How much a layer takes is no secret, nor where it is mounted and which processes use it,
  as far as /proc tells the daemon.

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
        """User and group of a node.

        A file that nobody may write and everybody may read is the daemon's own: its owner could put a lease on it (F_SETLEASE),
        and the kernel would have each process wait that opens it, for a minute or so, and not tell the daemon."""
        if found.private:
            return os.geteuid(), os.getegid()
        fixed = stat.S_ISREG(found.mode) and not found.mode & 0o222 and not self.umask & 0o004
        return os.geteuid() if fixed else self.uid, self.gid

    def mode(self, found: Attributes) -> int:
        """Type and permissions of a node; nobody heeds those of a link."""
        return found.mode if stat.S_ISLNK(found.mode) else found.mode & ~self.umask

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
