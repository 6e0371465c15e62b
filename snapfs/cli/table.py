"""What people read: tables, sizes, ages and colours."""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36, "dim": 2, "bold": 1}
KIND_COLOURS = {"active": "green", "view": "blue", "committed": "bold"}


WHEN = ("auto", "always", "never")

_when = "auto"


def colour(when: str) -> None:
    """From now on there are colours ``when``; raises Refusal."""
    from snapfs.cli.refusal import USAGE, Refusal

    global _when
    if when not in WHEN:
        raise Refusal(f"--color is {', '.join(WHEN[:-1])} or {WHEN[-1]}", USAGE)
    _when = when


def coloured(text: str, colour: str) -> str:
    """``text`` in ``colour``, where standard output is a terminal and NO_COLOR (no-color.org) is not set."""
    is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if _when == "never" or (_when == "auto" and is_plain):
        return text
    return f"\033[{COLOURS[colour]}m{text}\033[0m"


def printable(text: str) -> str:
    """``text`` on one line, without characters that a terminal would obey."""
    if text.isascii() and text.isprintable():
        return text
    from snapfs import names

    return names.printable(text)


def show_line(text: str, colour: str = "") -> None:
    """Print ``text``, which a script may read: as it is, but for a terminal without characters that it would obey, and there
    in ``colour``, if that is given."""
    shown = printable(text) if sys.stdout.isatty() else text
    print(coloured(shown, colour) if colour else shown)


def complain(sentence: object) -> None:
    """Print ``sentence`` on standard error, on one line, without characters that a terminal would obey."""
    print(f"snapfs: {printable(str(sentence))}", file=sys.stderr)


def show_json(value: object, *, indent: int | None = 2) -> None:
    """Print ``value`` as a JSON document, without characters that a terminal would obey."""
    import json

    from snapfs import names

    print(names.plain_json(json.dumps(value, indent=indent, ensure_ascii=False)))


def show_table(heads: Sequence[str], lines: Sequence[Sequence[str]], right_aligned: Sequence[int] = ()) -> None:
    """Print columns, as wide as what is in them; those in ``right_aligned`` are flush right."""
    widths = (
        [max([len(head), *map(len, column)]) for head, column in zip(heads, zip(*lines, strict=True), strict=True)]
        if lines
        else [len(head) for head in heads]
    )
    form = "  ".join(f"{{:{'>' if n in right_aligned else '<'}{width}}}" for n, width in enumerate(widths))
    print(coloured(form.format(*heads).rstrip(), "dim"))
    sys.stdout.write("".join(form.format(*line).rstrip() + "\n" for line in lines))


def format_size(size: int) -> str:
    """``size`` bytes as ls -h shows them: ``3.4M``."""
    if size < 1024:
        return f"{size}B"
    amount = float(size)
    for unit in "KMGTP":  # noqa: B007
        amount /= 1024
        if amount < 1024:
            break
    return f"{amount:.1f}{unit}" if amount < 9.95 else f"{amount:.0f}{unit}"


def format_age(since: float) -> str:
    """The time from ``since`` (seconds since the epoch) until now: ``5m``, ``3h``, ``12d``."""
    seconds = max(0, int(time.time() - since))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def format_labels(labels: dict[str, str]) -> str:
    return printable(" ".join(f"{key}={value}" for key, value in sorted(labels.items())))
