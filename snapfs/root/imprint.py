"""Imprints: each snapshot's directory has a copy of the snapshot's record, from which lost or broken records can be made anew.

An imprint is the extended attribute ``user.snapfs`` of ROOT/snapshots/<id>, beside the layer and not in it, so that no mount
shows it and no container can change it.  Writing one costs a few microseconds and no flush of its own: it reaches the disk with
the next flush of the file system (or a start writes it again: ``services/agreeing.py``).  It is read by ``snapfs check`` and by
a start that can't be sure that imprints and records agree.

A record that is too big for an attribute (ext4 has room for some 4,000 bytes) is in the file ``record`` beside ``fs`` instead.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from pathlib import Path

import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.store.schema import Record

ATTRIBUTE = "user.snapfs"  # of ROOT/snapshots/<id>
LAST_ID = "user.snapfs.last_id"  # of ROOT/snapshots
USERXATTR = "user.snapfs.userxattr"  # of ROOT/snapshots
WORD = "user.snapfs.root"  # of ROOT/snapshots
FILE = "record"  # in ROOT/snapshots/<id>

_ABSENT = (errno.ENODATA, errno.ENOTSUP)
_TOO_BIG = (errno.E2BIG, errno.ENOSPC, errno.ERANGE)
FEW = 100  # directories of snapshots that are looked at for an imprint, to know a root
_MOST = 64 << 20  # bytes that no record has
_ALWAYS_FITS = 256  # bytes of an attribute, on every file system


class Imprint(msgspec.Struct, frozen=True, array_like=True):
    """What a directory says of its snapshot, as MessagePack.

    ``record``: the record, without the usage.  ``boot``: where the data of a committed snapshot may be in the machine's memory
    only, the boot in which that is so (``root/unflushed.py``); "" where the data is on the disk, or not committed.
    """

    record: Record
    boot: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Imprint).decode


def is_supported(directory: str) -> bool:
    """Whether directories can have imprints on the file system of ``directory``: it must have extended attributes of users'."""
    try:
        os.getxattr(directory, ATTRIBUTE)
    except OSError as error:
        return error.errno != errno.ENOTSUP
    return True


def has_some(snapshots: str) -> bool:
    """Whether the directory ``snapshots`` says that it is a root's: it notes the last id, or one of the first directories in it
    bears an imprint.  Raises no OSError."""
    with contextlib.suppress(OSError):
        os.getxattr(snapshots, LAST_ID, follow_symlinks=False)
        return True
    with contextlib.suppress(OSError), os.scandir(snapshots) as entries:
        for entry in itertools.islice((entry for entry in entries if names.parse_id(entry.name)), FEW):
            with contextlib.suppress(OSError, Damaged):
                if read(entry.path) is not None:
                    return True
    return False


def write(directory: str, imprint: Imprint) -> None:
    """Write ``imprint`` to ``directory``, ROOT/snapshots/<id>, in the place of the one that it had; raises OSError."""
    value = _encode(Imprint(msgspec.structs.replace(imprint.record, usage=None), imprint.boot))
    try:
        os.setxattr(directory, ATTRIBUTE, value, follow_symlinks=False)
    except PermissionError:
        if os.path.islink(directory):  # which can bear none
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory) from None
        raise
    except OSError as error:
        if error.errno not in _TOO_BIG or len(value) <= _ALWAYS_FITS:
            raise
        fresh = Path(directory, f"{FILE}.new")
        fresh.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(value)
            fresh.rename(Path(directory, FILE))
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        with contextlib.suppress(OSError):  # there may be none; but ``read`` would take an old one
            os.removexattr(directory, ATTRIBUTE)


def read(directory: str) -> Imprint | None:
    """The imprint of ``directory``, None where it has none.  Raises Damaged where its bytes can't be one, and OSError."""
    try:
        value = os.getxattr(directory, ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        try:
            value = _read_file(f"{directory}/{FILE}")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        imprint = _decode(value)
        names.encode(imprint.record.name)
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidArgument) as error:
        raise Damaged(f"what {directory} says of its snapshot can't be read: {error}") from error
    return imprint


def _read_file(path: str) -> bytes:
    """What is in the file ``path``; raises Damaged where it is none, or so long that it can't hold a record, and OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # to open a pipe or a device may do something
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST:
            raise Damaged(f"{path} is no record")
        return Path(f"/proc/self/fd/{fd}").read_bytes()
    finally:
        os.close(fd)


def write_last_reserved_id(directory: str, number: int) -> None:
    """Note on ``directory``, ROOT/snapshots, that no id above ``number`` has been given out; raises OSError."""
    os.setxattr(directory, LAST_ID, str(number).encode())


def read_last_reserved_id(directory: str) -> int:
    """The id above which, as noted on ``directory``, none has been given out; 0 where there is no note."""
    try:
        return int(os.getxattr(directory, LAST_ID))
    except (OSError, ValueError):
        return 0


def write_root_word(directory: str, word: str) -> None:
    """Note the root's own word (``root/identity.py``) on ``directory``, ROOT/snapshots; raises OSError."""
    os.setxattr(directory, WORD, word.encode())


def read_root_word(directory: str) -> str:
    """The word that is noted on ``directory``, ROOT/snapshots; "" where none is."""
    try:
        return os.getxattr(directory, WORD).decode(errors="replace")
    except OSError:
        return ""


def note_userxattr(directory: str) -> None:
    """Note on ``directory``, ROOT/snapshots, that overlays have left their marks in users' extended attributes of the layers,
    where such overlays alone find them; raises OSError."""
    os.setxattr(directory, USERXATTR, b"yes")


def has_userxattr(directory: str) -> bool:
    """Whether that is noted on ``directory``."""
    try:
        return bool(os.getxattr(directory, USERXATTR))
    except OSError:
        return False
