"""The text of image.json, an OCI image configuration (https://github.com/opencontainers/image-spec, config.md): what may be
one, and what that of a snapshot on another one's is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from snapfs import names
from snapfs.errors import Damaged, ImageTooBig, InvalidArgument, NotUtf8

FILE = "image.json"

MOST = 4 << 20
"""Bytes of one."""

DEEPEST = 64
"""How deep objects and arrays may be in each other: those of images are five deep."""

_LAID_OUT = 256 << 10  # bytes of a text that is laid out in lines; a longer one stays as its parts are

MEMBERS = 50_000
"""Members of all its objects together: those of images have some hundreds, and to take millions apart keeps Python busy."""

_SLICE = 16 << 10  # bytes that are looked at before other threads may go on
_MARKS = re.compile(rb'["{}\[\]]')
_REST_OF_STRING = re.compile(rb'(?:[^"\\]|\\.)*+"', re.DOTALL)
_STEPS = {ord(mark): 1 if mark in "{[" else -1 for mark in "{[]}"}
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _STEPS)
_SPACE = b" \t\r\n"


def chain_id(below: str, diff_id: str) -> str:
    """What the OCI calls a layer together with those below it, which are called ``below`` ("": there are none)."""
    return f"sha256:{hashlib.sha256(f'{below} {diff_id}'.encode()).hexdigest()}" if below else diff_id


class Layer(msgspec.Struct, frozen=True):
    """What a layer adds: when it was made (RFC 3339), by what, and the digest of its tar, None where that is not known."""

    created: str
    created_by: str
    diff_id: str | None = None


class _Any(msgspec.Struct):
    """Any object: what is in it is looked at, and not kept."""


class _RootFS(msgspec.Struct):
    diff_ids: msgspec.Raw = msgspec.Raw(b"[]")


class Document:
    """A JSON object as it comes in pieces: ``content`` is what has come.  ``is_whole``: nothing of it is missing.

    Looking at a piece takes time for that piece alone, so that many little ones take no longer than one; and never long without
    letting other threads go on."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.is_whole = False
        self._has_begun = False
        self._depth = 0
        self._members = 0
        self._string = b""  # the beginning of one that has not ended, from its last backslash, or its quote, on

    def add(self, piece: bytes) -> None:
        """One more piece.  Raises ImageTooBig, and InvalidArgument where this can't be the beginning of a JSON object that
        may be an image.json; then it is to be thrown away."""
        if len(self.content) + len(piece) > MOST:
            raise ImageTooBig(f"{FILE} would take more than {MOST >> 20} MiB")
        if not self._has_begun and (begins := piece.lstrip(_SPACE)):
            if not begins.startswith(b"{"):
                raise _no_object()
            self._has_begun = True
        self._look(piece)
        self.content += piece

    def _look(self, piece: bytes) -> None:
        for at in range(0, len(piece), _SLICE):
            self._look_at(piece[at : at + _SLICE])

    def _look_at(self, piece: bytes) -> None:
        """The same of a slice.  What is outside of strings is every second part between quotes; a backslash outside of one is
        found by whoever has the whole."""
        if self.is_whole:
            if piece.strip(_SPACE):
                raise _more_behind()
            return
        text = self._string + piece
        parts = text.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[::2])
        self._members += outside.count(b":")
        if self._members > MEMBERS:
            raise InvalidArgument(f"{FILE} has more than {MEMBERS:,} members in its objects")
        depths = list(accumulate(map(_STEPS.__getitem__, outside.translate(None, _NO_BRACKETS)), initial=self._depth))
        if min(depths[1:], default=1) <= 0:
            self._end(text)
        elif max(depths) > DEEPEST:
            raise _too_deep()
        else:
            self._depth = depths[-1]
            slashes = len(text) - len(text.rstrip(b"\\"))
            self._string = (b'"\\' if slashes % 2 else b'"') if len(parts) % 2 == 0 else b""

    def _end(self, text: bytes) -> None:
        """Find where in ``text`` the object ends."""
        at = 0
        while (mark := _MARKS.search(text, at)) is not None:
            at = mark.end()
            if mark[0] == b'"':
                string = _REST_OF_STRING.match(text, at)
                at = string.end() if string is not None else len(text)
            elif mark[0] in b"{[":
                self._depth += 1
                if self._depth > DEEPEST:
                    raise _too_deep()
            else:
                self._depth -= 1
                if self._depth <= 0:
                    self.is_whole = True
                    if text[at:].strip(_SPACE):
                        raise _more_behind()
                    return
        raise _no_json()  # by a backslash outside of a string


def _no_json() -> InvalidArgument:
    return InvalidArgument(f"{FILE} is no JSON")


def _too_deep() -> InvalidArgument:
    return InvalidArgument(f"{FILE} has objects or arrays in each other, more than {DEEPEST} deep")


def _no_object() -> InvalidArgument:
    return InvalidArgument(f"{FILE} must be a JSON object, and begin with {{")


def _more_behind() -> InvalidArgument:
    return InvalidArgument(f"{FILE} must be one JSON object, with nothing behind it")


def check(content: bytes) -> None:
    """Raise InvalidArgument, ImageTooBig or NotUtf8 unless ``content`` may be an image.json."""
    document = Document()
    document.add(content)
    if not document.is_whole:
        raise InvalidArgument(f"{FILE} ends before the JSON object does")
    check_whole(content)


def check_whole(content: bytes) -> None:
    """The same of the content of a Document that is whole."""
    try:
        content.decode()
        msgspec.json.decode(content, type=_Any)
    except UnicodeDecodeError:
        raise NotUtf8(f"{FILE} must be UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"{FILE} is no JSON: {error}") from None
    _parts(content)


def _parts(content: bytes) -> tuple[dict[str, msgspec.Raw], list[bytes]]:
    """The values of the object ``content`` by key, and the bytes of its ``history`` and of its ``rootfs.diff_ids``."""
    try:
        values = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        rootfs = msgspec.json.decode(values.get("rootfs", b"{}"), type=_RootFS)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidArgument(f"{FILE} is no image configuration: {error}") from None
    lists = [bytes(values.get("history", b"[]")), bytes(rootfs.diff_ids)]
    for words, each in zip(("history", "rootfs.diff_ids"), lists, strict=True):
        if each != b"null" and not each.startswith(b"["):
            raise InvalidArgument(f"{FILE} is no image configuration: {words} must be an array")
    return values, [b"[]" if each == b"null" else each for each in lists]


def inherited(content: bytes, layers: Sequence[Layer], *, alone: bool) -> str:
    """The image.json of a snapshot that stands on one with the image.json ``content``, with ``layers`` added, the lowest first;
    ``alone``: these are all that it has, for the others were made one with them.

    ``rootfs.diff_ids`` has those of the layers up to the first of which it is not known.  Raises Damaged.
    """
    try:
        values, (history, diff_ids) = _parts(content)
    except InvalidArgument as error:
        raise Damaged(f"what is kept of {FILE} can't be read: {error}") from None
    known: list[str] = []
    for layer in layers:
        if layer.diff_id is None:
            break
        known.append(layer.diff_id)
    entries = [{"created": layer.created, "created_by": layer.created_by} for layer in layers]
    rootfs = msgspec.json.decode(values.get("rootfs", msgspec.Raw(b'{"type":"layers"}')), type=dict[str, msgspec.Raw])
    rootfs["diff_ids"] = msgspec.Raw(_appended(b"[]" if alone else diff_ids, known))
    values["rootfs"] = msgspec.Raw(msgspec.json.encode(rootfs))
    values["history"] = msgspec.Raw(_appended(b"[]" if alone else history, entries))
    if layers:
        values["created"] = msgspec.Raw(msgspec.json.encode(layers[-1].created))
    text = msgspec.json.encode(values)
    if len(text) <= _LAID_OUT:
        text = msgspec.json.format(text, indent=2)
    return names.plain_json(text.decode()) + "\n"


def _appended(array: bytes, more: Sequence[object]) -> bytes:
    """The array ``array``, as JSON, with ``more`` behind it: what is in it is not made objects of, for that may be much."""
    inside = array.strip(_SPACE)[1:-1]
    added = msgspec.json.encode(more)[1:-1]
    return b"[" + inside + b"," * bool(inside.strip(_SPACE) and added) + added + b"]"
