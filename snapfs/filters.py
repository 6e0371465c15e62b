r"""containerd's filter language, compiled to a predicate over Info.

A filter is a list of selectors with commas (all must hold); of several filters any may hold; the empty string, and no
filter at all, holds for everything.  A selector is ``fieldpath[operator value]``::

    name==base        kind!=view        parent~=^sha        labels."a.b/c"==x        labels.gc

Fields are ``name``, ``kind``, ``parent`` ("" where there is none) and ``labels.<key>``; an unknown field is absent.  A
bare field asks for presence.  ``!=`` holds for absent fields; ``~=`` searches with an RE2 expression (of absent fields: in
the empty string), one that doesn't compile matches nothing.  Double quotes with Go's escapes quote fields and values,
after ``~=`` the value may also stand between ``/…/`` or ``|…|``.  A blank may stand before and after the operator only.

Source: containerd ``pkg/filters`` (grammar and behaviour), Go's specification of string literals (escapes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from snapfs.errors import InvalidArgument, Unavailable
from snapfs.model import Info

Predicate = Callable[[Info], bool]

Selection = set[tuple[str, str]]
"""Pairs of a field (name, kind or parent) and a value: all snapshots that a filter selects have one of these."""

_INDEXED = ("name", "parent", "kind")  # the one that selects least comes first

_OPERATOR_CHARACTERS = "=!~"
_SIMPLE_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


FIELDS = 1000
"""Fields that filters may name: each is looked at in each snapshot, which can't be interrupted."""


class Filters:
    """Filters, compiled: ``holds`` is a predicate that is true where any of them is.

    ``selection``: ``holds`` can be true only of snapshots that have one of these names, kinds or parents; None where the
    filters don't limit it so.

    Raises InvalidArgument that says where a bad filter breaks, or that they name more than FIELDS, and Unavailable where a
    filter has ``~=`` and the package google-re2 is not installed; it comes with the extra ``containerd``.
    """

    def __init__(self, filters: Sequence[str]) -> None:
        alternatives = [_Parser(text).selectors() for text in filters if text]
        if sum(len(selector.path) for selectors in alternatives for selector in selectors) > FIELDS:
            raise InvalidArgument(f"the filters name more than {FIELDS:,} fields: ask for less at once")
        self.holds: Predicate = lambda info: True
        self.selection: Selection | None = None
        if len(alternatives) < len(filters) or not alternatives:
            return
        predicates = [[selector.holds for selector in selectors] for selectors in alternatives]
        self.holds = lambda info: any(all(holds(info) for holds in selectors) for selectors in predicates)
        equal = [{selector.path[0]: selector.equal for selector in selectors} for selectors in alternatives]
        selected = [next(((field, value) for field in _INDEXED if (value := fields.get(field))), None) for fields in equal]
        if None not in selected:
            self.selection = {one for one in selected if one is not None}


def _field(info: Info, path: list[str]) -> str | None:
    """The value of the field at ``path``, None where it is absent; what follows ``name`` and its like is ignored."""
    match path[0]:
        case "name":
            return info.name
        case "kind":
            return str(info.kind)
        case "parent":
            return info.parent or ""
        case "labels":
            return info.labels.get(".".join(path[1:]))
    return None


class _Selector(msgspec.Struct, frozen=True):
    """One condition: the field's path, the value that it must be equal to (None: another condition), and the whole of it."""

    path: list[str]
    equal: str | None
    holds: Predicate


class _Parser:
    """A cursor over one filter; each method reads one production of the grammar and leaves the cursor behind it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def selectors(self) -> list[_Selector]:
        found = [self.selector()]
        while self.peek() == ",":
            self.at += 1
            found.append(self.selector())
        if self.peek():
            raise self.error(f"unexpected input: {self.peek()}")
        return found

    def selector(self) -> _Selector:
        path = [self.field()]
        while self.peek() == ".":
            self.at += 1
            path.append(self.field())
        if self.peek() in ("", ","):
            return _Selector(path, None, lambda info: _field(info, path) is not None)
        self.blanks()
        operator = self.operator()
        self.blanks()
        value = self.value(quotes='"/|' if operator == "~=" else '"')
        match operator:
            case "==":
                return _Selector(path, value, lambda info: _field(info, path) == value)
            case "!=":
                return _Selector(path, None, lambda info: _field(info, path) != value)
        return _Selector(path, None, _matches(path, value))

    def field(self) -> str:
        if self.peek() == '"':
            return self.quoted()
        start = self.at
        while (c := self.peek()) and c.isascii() and (c.isalnum() or c == "_"):
            self.at += 1
        if self.at == start:
            raise self.error("expected field or quoted")
        return self.text[start : self.at]

    def operator(self) -> str:
        start = self.at
        while self.peek() and self.peek() in _OPERATOR_CHARACTERS:
            self.at += 1
        operator = self.text[start : self.at]
        if not operator:
            raise self.error('expected an operator ("=="|"!="|"~=")')
        if operator not in ("==", "!=", "~="):
            raise self.error(f'unsupported operator "{operator}"', start)
        return operator

    def value(self, quotes: str) -> str:
        first = self.peek()
        if first and first in '"/|':
            if first not in quotes:
                raise self.error("invalid quote encountered")
            return self.quoted()
        start = self.at
        if first and first not in ".," + _OPERATOR_CHARACTERS:
            while (c := self.peek()) and c != "," and not c.isspace() and c.isprintable():
                self.at += 1
        if self.at == start:
            raise self.error("expected value or quoted")
        return self.text[start : self.at]

    def quoted(self) -> str:
        start, quote = self.at, self.peek()
        self.at += 1
        content = bytearray()  # bytes, since \x and octal escapes give bytes and not characters
        while (c := self.peek()) != quote:
            if c in ("", "\n"):
                raise self.error("literal not terminated", start)
            self.at += 1
            content += self.escape(quote) if c == "\\" else c.encode(errors="surrogatepass")
        self.at += 1
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self.error("the quoted text is not UTF-8", start) from None

    def escape(self, quote: str) -> bytes:
        c = self.peek()
        if c and c in _SIMPLE_ESCAPES:
            self.at += 1
            return _SIMPLE_ESCAPES[c].encode()
        if c == quote:
            self.at += 1
            return quote.encode()
        if c in _HEX_ESCAPES:
            self.at += 1
            number = self.digits(_HEX_ESCAPES[c], 16)
        else:
            number = self.digits(3, 8)
        try:
            return bytes([number]) if c not in ("u", "U") else chr(number).encode()
        except (ValueError, OverflowError):  # beyond a byte, beyond Unicode, or a surrogate
            raise self.error("illegal char escape") from None

    def digits(self, count: int, base: int) -> int:
        digits = self.text[self.at : self.at + count]
        try:
            if len(digits) < count or not digits.isalnum() or not digits.isascii():
                raise ValueError
            number = int(digits, base)
        except ValueError:
            raise self.error("illegal char escape") from None
        self.at += count
        return number

    def blanks(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def peek(self) -> str:
        """The character under the cursor, the empty string at the end."""
        return self.text[self.at : self.at + 1]

    def error(self, what: str, at: int | None = None) -> InvalidArgument:
        at = self.at if at is None else at
        text = self.text
        where = f"[{text[:at]} >|{text[at]}|< {text[at + 1 :]}]" if at < len(text) else f"[{text}]"
        return InvalidArgument(f"parse error: {where}: {what}")


def _matches(path: list[str], expression: str) -> Predicate:
    """The predicate that searches the field at ``path`` with an RE2 expression; raises Unavailable where RE2 is missing."""
    try:
        import re2  # not at the top: the package is optional, and takes a while to load
    except ImportError as error:
        raise Unavailable(f"~= needs RE2, which can't be loaded ({error}); install it: pip install google-re2") from None
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True  # groups are not needed, and looking for thousands of them takes minutes
    try:
        regex = re2.compile(expression, options)
    except (re2.error, UnicodeError):
        return lambda info: False
    return lambda info: regex.search(_field(info, path) or "") is not None
