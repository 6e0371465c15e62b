"""``snapfs diff``: changes."""

from __future__ import annotations

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import Refusal

_COLOURS = {"A": "green", "C": "yellow", "D": "red", "R": "blue"}


def _diff(given: Given) -> int:
    place = find_tree(given.value("at"))
    key = place.key(given.arguments[0])
    kind, directory = place.find(key)
    if kind == "view":
        raise Refusal(f'"{key}" is a view, which changes nothing')
    lines = place.lines(f"{directory}/changes")
    if given.has("json"):
        table.show_json([{"change": line[0], "path": line[2:]} for line in lines])
    else:
        for line in lines:
            print(table.coloured(line, _COLOURS[line[0]]))
    return 0


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
