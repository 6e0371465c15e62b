"""``snapfs diff``: changes."""

from __future__ import annotations

import time

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import Refusal, refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_COLOURS = {"A": "green", "C": "yellow", "D": "red", "R": "blue"}


def _diff(given: Given) -> int:
    place = find_tree(given.value("at"))
    key = place.key(given.arguments[0])
    kind, directory = place.find(key)
    if kind == "view":
        raise Refusal(f'"{key}" is a view, which changes nothing')
    lines = _lines(place.path, f"{directory}/changes")
    if given.has("json"):
        table.show_json([{"change": line[0], "path": line[2:]} for line in lines])
    else:
        for line in lines:
            print(table.coloured(line, _COLOURS[line[0]]))
    return 0


def _lines(tree: str, path: str) -> Iterator[str]:
    """The lines of ``path``, as they are read: there may be millions.  Raises Refusal."""
    began = time.time_ns()
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")
    except OSError as error:
        raise refusal(error, tree, began, f"cannot read {path}") from None


VERBS = {
    "diff": Verb(
        "diff",
        "SOURCE",
        (JSON,),
        "Show what an active or committed snapshot changed against its parent: A added, C changed, D deleted.",
        """
snapfs diff web
snapfs diff web | grep ^D
""",
        _diff,
    )
}
