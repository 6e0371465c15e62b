"""Imprints: the record that each snapshot's directory bears itself, so that a lost or broken database can be made anew.

It is the extended attribute ``user.snapfs`` of ROOT/snapshots/<id>, beside the layer and not in it, so that no mount shows it
and no container can change it.  It costs a few microseconds and no flush of its own: it reaches the disk with the next flush of
the file system (or a start writes it again: ``snapfs/root/placing.py``), and nobody reads it while the database is whole.

What is too big for an attribute (ext4 has room for some 4,000 bytes) is in the file ``record`` beside ``fs`` instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument
from snapfs.store.schema import Record

ATTRIBUTE = "user.snapfs"
LAST_ID = "user.snapfs.last_id"
FILE = "record"

_ABSENT = (errno.ENODATA, errno.ENOTSUP)
_TOO_BIG = (errno.E2BIG, errno.ENOSPC, errno.ERANGE)
_ALWAYS_FITS = 256


class Imprint(msgspec.Struct, frozen=True, array_like=True):
    """What a directory says of its snapshot, as MessagePack: the record, without the usage, and the boot of the machine in
    whose memory the data of a committed snapshot may still be ("": it is on disk, or not committed)."""

    record: Record
    boot: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Imprint).decode


def is_supported(directory: str) -> bool:
    """Whether directories can bear imprints there: not on file systems without extended attributes of users'."""
    try:
        os.getxattr(directory, ATTRIBUTE)
    except OSError as error:
        return error.errno != errno.ENOTSUP
    return True


def write(directory: str, imprint: Imprint) -> None:
    """Let ``directory``, ROOT/snapshots/<id>, bear ``imprint`` instead of what it bore; raises OSError."""
    value = _encode(Imprint(msgspec.structs.replace(imprint.record, usage=None), imprint.boot))
    try:
        os.setxattr(directory, ATTRIBUTE, value)
    except OSError as error:
        if error.errno not in _TOO_BIG or len(value) <= _ALWAYS_FITS:
            raise
        fresh = Path(directory, f"{FILE}.new")
        try:
            fresh.write_bytes(value)
            fresh.rename(Path(directory, FILE))
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        with contextlib.suppress(OSError):  # there may be none; an old one would be believed
            os.removexattr(directory, ATTRIBUTE)


def read(directory: str) -> Imprint | None:
    """What ``directory`` bears, None where that is nothing.  Raises Damaged where it can't be read, OSError."""
    try:
        value = os.getxattr(directory, ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        try:
            value = Path(directory, FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        said = _decode(value)
        names.encode(said.record.name)
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidArgument) as error:
        raise Damaged(f"what {directory} says of its snapshot can't be read: {error}") from error
    return said


def write_last_reserved_id(directory: str, number: int) -> None:
    """Let ``directory``, ROOT/snapshots, say that no id above ``number`` was given out; raises OSError."""
    os.setxattr(directory, LAST_ID, str(number).encode())


def read_last_reserved_id(directory: str) -> int:
    """The id that ``directory`` says was not exceeded; 0 where it says nothing."""
    try:
        return int(os.getxattr(directory, LAST_ID))
    except (OSError, ValueError):
        return 0
