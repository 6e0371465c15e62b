"""image.json of a snapshot, as it is kept beside the layer: the file ``image-DIGEST.json`` in ROOT/snapshots/<id>, mode 0600.

The snapshot's record, and so the directory's imprint, says by its digest which file is meant.  A new one is written and flushed
beside the old one before the record names it, and the old one is deleted after that: whatever ends the process, the one that
the record names is whole.  Everything here blocks on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat

from snapfs.errors import Damaged, Unavailable
from snapfs.imagejson import FILE, MOST

_OURS = re.compile(r"image-[0-9a-f]{64}\.json(?:\.new)?")


def digest_of(content: bytes) -> str:
    """The digest by which a record names the file that has this ``content``: SHA-256, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def file_of(directory: str, digest: str) -> str:
    """The path of the file with this ``digest`` in ``directory``, ROOT/snapshots/<id>."""
    return f"{directory}/image-{digest}.json"


def is_there(directory: str, digest: str) -> bool:
    """Whether that file is there."""
    return os.path.lexists(file_of(directory, digest))


def write(directory: str, content: bytes, *, sync: bool) -> str:
    """Write ``content`` to the file of its digest in ``directory``; the digest.  With ``sync`` it is on the disk then.  Raises
    OSError, having left nothing."""
    digest = digest_of(content)
    path = file_of(directory, digest)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.new")
    try:
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(fd)
        os.rename(f"{path}.new", path)
        if sync:
            _sync(directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.new")
        raise
    return digest


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(directory: str, digest: str, shown: str) -> bytes:
    """The content of that file; ``shown`` is its directory for a sentence.  Raises Damaged where it is missing, or not what was
    written, and Unavailable where the disk refuses."""
    path = file_of(directory, digest)
    words = f"{file_of(shown, digest)}, which has {FILE}, "
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # to open a pipe or a device may do something
    except FileNotFoundError:
        raise Damaged(f"{words}is missing; write {FILE} anew, or restore it from a backup") from None
    except OSError as error:
        raise Unavailable.from_os(f"read {FILE}", error) from error
    try:
        found = os.fstat(fd)
        content = b""
        if stat.S_ISREG(found.st_mode) and found.st_size <= MOST:
            with open(f"/proc/self/fd/{fd}", "rb") as file:
                content = file.read(MOST + 1)
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damaged(f"{words}can't be read: {os.strerror(errno.EIO)}; see to the disk") from error
        raise Unavailable.from_os(f"read {FILE}", error) from error
    finally:
        os.close(fd)
    if digest_of(content) != digest:
        raise Damaged(f"{words}is not what was written; write {FILE} anew, or restore it from a backup")
    return content


def link(directory: str, digest: str, target: str) -> None:
    """Have the directory ``target`` have that file of ``directory``, too.  Raises OSError."""
    os.link(file_of(directory, digest), file_of(target, digest))


def others(directory: str, digest: str | None) -> list[str]:
    """The paths of all such files in ``directory`` but that with this ``digest``.  Raises OSError."""
    kept = None if digest is None else os.path.basename(file_of(directory, digest))
    return [f"{directory}/{name}" for name in os.listdir(directory) if _OURS.fullmatch(name) and name != kept]


def remove_others(directory: str, digest: str | None) -> None:
    """Remove them.  Never raises: where the disk refuses, they stay until the snapshot goes."""
    with contextlib.suppress(OSError):
        for path in others(directory, digest):
            with contextlib.suppress(OSError):
                os.unlink(path)
