"""Everything that can go wrong, each with the sentence that the user reads.

The seven direct kinds are containerd's (``errdefs``) as far as a snapshotter needs them.  Their subclasses exist
where another door has a finer answer: the tree gives each its own errno (``snapfs/fuse/errno.py``), the command its
exit code.  ``str(error)`` is always one sentence that says what was wrong and, where something can be done, what.
"""

from __future__ import annotations

import os
from errno import EAGAIN, EDQUOT, ENOSPC, ESTALE

TYPE_CHECKING = False  # typing's own would import typing, which takes the command longer than all that it does
if TYPE_CHECKING:
    from snapfs.model import Kind


FULL = (ENOSPC, EDQUOT)
"""How a disk says that it is full, or that the owner's share of it is."""


class SnapshotError(Exception):
    """The base of all errors that a caller can cause or must handle; anything else that escapes is a bug.

    ``public``: the sentence for users who may not read the layers, where the whole one names something that is in them.
    """

    def __init__(self, sentence: str, *, public: str | None = None) -> None:
        super().__init__(sentence)
        self.public = sentence if public is None else public


class NotFound(SnapshotError):
    """There is no such snapshot, label or file."""

    @classmethod
    def snapshot(cls, name: str) -> NotFound:
        return cls(f'snapshot "{name}" does not exist')

    @classmethod
    def parent(cls, name: str) -> NotFound:
        return cls(f'parent snapshot "{name}" does not exist')


class LeftOut(NotFound):
    """An entry that other roots have is missing here, because it is switched off or not permitted; the sentence says why."""


class AlreadyExists(SnapshotError):
    """The key or name is taken; all kinds share one key space."""

    @classmethod
    def snapshot(cls, name: str, kind: Kind) -> AlreadyExists:
        return cls(f'snapshot "{name}" already exists ({kind})')


class FailedPrecondition(SnapshotError):
    """The snapshot is not in the state that the call needs."""


class NotEmpty(FailedPrecondition):
    """What was to be removed still holds something."""


class HasChildren(NotEmpty):
    """A snapshot with children was to be removed."""

    @classmethod
    def of(cls, name: str, child: str, kind: Kind) -> HasChildren:
        return cls(f'cannot remove snapshot "{name}" with children: remove its child "{child}" ({kind}) first')


class Busy(FailedPrecondition):
    """Somebody still uses the snapshot's files in a way that the call would break."""

    KEEP = "or keep a copy of it as it is: snapfs checkpoint --copy"
    FORK = "or keep a copy of it as it is, and fork that: snapfs checkpoint --copy"
    END = "or end what snapfs run has started in it: snapfs rollback --kill"
    """How the sentence goes on behind "; ", with what else can be done, where it is about a workspace; a word that names this
    is the end of it."""


class Named(Busy):
    """A snapshot that has a name in images/ was to be removed (``rules/images.py``)."""


class TooManyNames(FailedPrecondition):
    """A snapshot would have more names in images/ than one may have."""


class NotPermitted(FailedPrecondition):
    """The tree has no meaning for this operation at this place."""


class Pinned(NotPermitted):
    """A snapshot that bears the label ``pin`` was to be removed (``labels.pinned``)."""


class TooDeep(FailedPrecondition):
    """A snapshot would stand on more layers than the kernel can mount together."""


class InvalidArgument(SnapshotError):
    """The request makes no sense, whatever the state of the store."""


class NameTooLong(InvalidArgument):
    """A key that would not fit into a file name of 255 bytes."""


class NotUtf8(InvalidArgument):
    """Text that is not UTF-8."""


class LabelTooBig(InvalidArgument):
    """A label that is too big, or one that is too much for its snapshot (``snapfs/labels.py`` has the bounds)."""


class ImageTooBig(InvalidArgument):
    """An image.json that is longer than one may be."""


class WrongParent(InvalidArgument):
    """A Commit that names another parent than the snapshot has."""


class Unavailable(SnapshotError):
    """The store can't do it now: closed, held by another process, or the disk refused.

    ``errno`` is the operating system's reason where there is one (ENOSPC, EIO, EROFS …), else None.
    """

    def __init__(self, sentence: str, errno: int | None = None, *, public: str | None = None) -> None:
        super().__init__(sentence, public=public)
        self.errno = errno

    @classmethod
    def from_os(cls, doing: str, error: OSError, hint: str = "") -> Unavailable:
        """The refusal of the operating system while ``doing`` ("prepare snapshot …") as a sentence, that ends with ``hint``."""
        where = f" ({error.filename})" if error.filename else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        return cls(f"cannot {doing}: {reason}{where}{hint}", error.errno, public=f"cannot {doing}: {reason}{hint}")


class Closed(Unavailable):
    """The snapshotter, or its store, was closed."""

    def __init__(self) -> None:
        super().__init__("the snapshotter is closed")


class Forked(Closed):
    """The snapshotter belongs to the process that this one was forked from."""

    def __init__(self) -> None:
        Unavailable.__init__(
            self, "the snapshotter belongs to the process that opened it; a process forked from that can't use it"
        )


class Stale(Unavailable):
    """A file's text has changed since its name was looked up; looking it up again finds the new one."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} has changed since it was looked up", ESTALE)


class TryAgain(Unavailable):
    """The call would wait too long for what is done for others.  Nothing has changed, and the same call soon succeeds."""

    def __init__(self, why: str, *, public: str | None = None) -> None:
        then = "try again in a moment"
        super().__init__(f"{why}: {then}", EAGAIN, public=None if public is None else f"{public}: {then}")


class NoThread(TryAgain):
    """The call takes a thread or a process, and none can be started."""

    def __init__(self) -> None:
        Unavailable.__init__(
            self,
            "no thread or process can be started: the user that snapfs runs as, or its cgroup, has as many as it may have; "
            "end some, or raise that limit (ulimit -u, TasksMax=), and try again",
            EAGAIN,
        )


class Damaged(SnapshotError):
    """What is on disk contradicts itself; nothing is guessed."""
