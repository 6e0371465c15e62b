"""Key <-> file name: how any key becomes one path component, and back.

``%``, ``/`` and control characters are percent-encoded as UTF-8 bytes with upper-case hex digits, and so is the
first dot of ``.`` and ``..``; everything else stands for itself:

>>> encode("default/12/sha256:ab")
'default%2F12%2Fsha256:ab'

Each key has exactly one encoding and decoding is its exact inverse, so a file name that is not the canonical encoding of
a key names nothing.  Keys are UTF-8, not empty, and at most 255 bytes *as a file name* (NAME_MAX of Linux), at every
door, so each snapshot always has a path.
"""

from __future__ import annotations

import os
import re
import shlex

from snapfs.errors import InvalidArgument, NameTooLong, NotUtf8

NAME_MAX = 255
"""Bytes that a file name may have: ``statvfs().f_namemax`` of Linux's file systems."""

_ENCODED = re.compile("[%/\x00-\x1f\x7f-\x9f]")
_ENCODED_IN_PATHS = re.compile("[%\x00-\x1f\x7f-\x9f]")
_BYTES = re.compile("[\udc80-\udcff]")  # that are not UTF-8, as Python has them in a path
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
)
"""For a class of a regular expression: characters that turn the direction of writing (Unicode's Bidi_Control) or break
lines, or that nobody sees (its Default_Ignorable_Code_Point, and annotations), by which one name looks like another.  The
joiners U+200C and U+200D, and the selectors of variants, are not among them: scripts and pictures need them."""

_DISGUISE = re.compile(f"[\x00-\x1f\x7f-\x9f{UNSEEN}]")
_RAW_IN_JSON = re.compile(f"[\x7f-\x9f{UNSEEN}]")
_DECODED = re.compile("(?:%[0-9A-F]{2})+")
_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


_SHOWN = 250  # bytes of a path that a sentence shows: an extended attribute has room for the sentence, too


def encode(key: str) -> str:
    """The file name of ``key``.

    Raises InvalidArgument for an empty key, NotUtf8 for one with lone surrogates (how Python spells bytes that are
    not UTF-8), NameTooLong where the file name would exceed 255 bytes; that first where the key is longer by itself.
    """
    if not key:
        raise InvalidArgument("a snapshot's key must not be empty")
    if len(key) > NAME_MAX:  # perhaps by millions
        raise _too_long(key, len(key))
    try:
        if key in (".", ".."):
            name = "%2E" + key[1:]
        else:
            name = _ENCODED.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), key)
        length = len(name.encode())
    except UnicodeEncodeError:
        raise NotUtf8(f'the key "{printable(key)}" is not UTF-8') from None
    if length > NAME_MAX:
        raise _too_long(key, length)
    return name


def _too_long(key: str, length: int) -> NameTooLong:
    return NameTooLong(f'the key "{printable(key[:40])}…" takes {length} bytes or more as a file name; at most {NAME_MAX} fit')


def with_suffix(key: str, suffix: str) -> str:
    """``key``, cut as far as needed to be a key, with ``suffix``."""
    while True:
        try:
            encode(key + suffix)
            return key + suffix
        except NameTooLong:
            key = key[:-1]


def decode(file_name: str) -> str:
    """The key whose canonical file name ``file_name`` is; raises InvalidArgument (or NameTooLong) for all others."""
    try:
        key = _DECODED.sub(lambda m: bytes.fromhex(m[0].replace("%", "")).decode(), file_name)
    except UnicodeDecodeError:
        raise InvalidArgument(f'"{printable(file_name)}" is no key\'s file name: the bytes are not UTF-8') from None
    if len(file_name.encode(errors="surrogatepass")) > NAME_MAX:
        raise NameTooLong(f'the name "{printable(file_name[:40])}…" is longer than {NAME_MAX} bytes')
    canonical = encode(key)
    if canonical != file_name:
        seen = _CONTROL.sub(lambda m: repr(m[0])[1:-1], file_name)  # not as it is to be written
        raise InvalidArgument(f'"{printable(seen)}" is no key\'s file name; write "{printable(canonical)}"')
    return key


def path_as_text(path: str) -> str:
    """``path`` as a label has room for it: as keys are written, but with its slashes, and with each byte that is not UTF-8
    percent-encoded, too.

    >>> path_as_text("/srv/a%b/c\\udcff")
    '/srv/a%25b/c%FF'
    """
    text = _ENCODED_IN_PATHS.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), path)
    return _BYTES.sub(lambda m: f"%{ord(m[0]) - 0xDC00:02X}", text)


def path_of_text(text: str) -> str:
    """The path that ``path_as_text`` has written as ``text``."""
    raw = re.sub(rb"%([0-9A-F]{2})", lambda m: bytes.fromhex(m[1].decode()), text.encode(errors="surrogateescape"))
    return raw.decode(errors="surrogateescape")


def parse_id(name: str) -> int | None:
    """The id that ``name`` is (of a directory in ROOT/snapshots, of a link in by-id/): decimal, from 1, without a leading zero;
    None for any other name."""
    return int(name) if name.isascii() and name.isdigit() and name[0] != "0" and len(name) < 12 else None


def printable(text: str) -> str:
    """``text`` on one line for a log or a table: bytes that are not UTF-8 as ``\\xNN``, and what a terminal would obey
    percent-encoded: control characters, and UNSEEN.
    """
    if text.isascii() and text.isprintable():  # looking for the others takes a hundred times as long
        return text
    text = _SURROGATES.sub(lambda m: f"\\u{ord(m[0]):04x}", text)  # which stand for no byte, so no file name has them
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return _DISGUISE.sub(lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), text)


def without_colons(path: str) -> str:
    """``path`` as error_log has it, where ``: `` ends it."""
    return path.replace(": ", "%3A ")


def word(text: str) -> str:
    """``text`` as one word of a command that a sentence advises: printable, and quoted where a shell would read more."""
    return shlex.quote(printable(text))


def nameable(path: str) -> str:
    """``path``, or of one that is too long for a sentence, or has characters that a terminal would obey, the nearest directory
    above that is not and has none."""
    raw = os.fsencode(path)
    if len(raw) > _SHOWN:  # at once: a path may be as long as somebody likes
        path = os.path.dirname(os.fsdecode(raw[: _SHOWN + 1]))
    while printable(path) != path:
        path = os.path.dirname(path)
    return path


def shown(path: str) -> str:
    """``path`` as a sentence shows it."""
    return printable(path) if len(os.fsencode(path)) <= _SHOWN else f"{nameable(path)}/…"


def last_word(key: str, number: int = 0) -> str:
    """``key`` as the last argument of such a command of snapfs, also where it looks like an option; of a snapshot with the id
    ``number``, if that is known, also where its characters can't be shown."""
    if number and printable(key) != key:
        return f"by-id/{number}"
    return "-- " * key.startswith("-") + word(key)


def plain_json(text: str) -> str:
    """The JSON document ``text`` with what a terminal would obey escaped as ``\\uNNNN``: JSON lets such characters stand."""
    return text if text.isascii() and "\x7f" not in text else _RAW_IN_JSON.sub(_as_json, text)


def _as_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be")  # above U+FFFF two of them
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
