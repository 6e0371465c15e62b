"""``snapfs label``: the files of labels/."""

from __future__ import annotations

import json

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import file_name, find_tree
from snapfs.cli.prepare import read_labels
from snapfs.cli.refusal import NOT_FOUND, Refusal


def _label(given: Given) -> int:
    labels = read_labels(given.arguments[1:])
    place = find_tree(given.value("at"), changes=bool(labels) or given.has("delete"))
    name = place.key(given.arguments[0])
    _, directory = place.find(name)
    for key in given.all("delete"):
        if not place.within.exists(f"{directory}/labels/{file_name(key)}"):
            raise Refusal(f'"{name}" has no label "{key}"; {place.command("label", place.word_of(name))} lists them', NOT_FOUND)
    for key, value in [*labels, *((key, "") for key in given.all("delete"))]:
        place.write_label(directory, key, value)
    if labels or given.has("delete"):
        return 0
    now: dict[str, str] = json.loads(place.read(f"{directory}/info.json"))["labels"]
    if given.has("json"):
        table.show_json(now)
    else:
        for key, value in sorted(now.items()):
            print(table.printable(f"{key}={value}"))
    return 0


VERBS = {
    "label": Verb(
        "label",
        "NAME [KEY=VALUE…]",
        (Option("delete", "delete this label; so does KEY= with nothing after it", "KEY", short="-d", many=True), JSON),
        "Show the labels of a snapshot, or set and delete some.",
        """
snapfs label v1
snapfs label v1 team=blue ttl=7d
snapfs label v1 --delete team
""",
        _label,
    )
}
