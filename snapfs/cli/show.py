"""``snapfs show``: info.json, usage.json and mounts.json of a snapshot."""

from __future__ import annotations

import json

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import find_tree, key_of


def _show(given: Given) -> int:
    place = find_tree(given.value("at"))
    shown = []
    for key in map(place.key, given.arguments):
        kind, directory = place.find(key)
        if given.has("path"):
            table.show_line(directory)
            continue
        info = json.loads(place.read(f"{directory}/info.json"))
        info["usage"] = json.loads(place.read(f"{directory}/usage.json"))
        if kind == "committed":
            info["children"] = sorted(
                key_of(name) for each in ("active", "view", "committed") for name in place.within.names(f"{directory}/{each}")
            )
        else:
            info["mounts"] = json.loads(place.read(f"{directory}/mounts.json"))
        shown.append({**info, "directory": directory})
    if given.has("path"):
        return 0
    if given.has("json"):
        table.show_json(shown)
        return 0
    for n, info in enumerate(shown):
        if n:
            print()
        usage = info.pop("usage")
        info["size"] = f"{table.format_size(usage['size'])} in {usage['inodes']} inodes"
        for field, value in info.items():
            for line in _lines(value):
                print(f"{table.coloured(f'{field:<10}', 'dim')} {line}")
    return 0


def _lines(value: object) -> list[str]:
    if isinstance(value, dict):
        return [table.printable(f"{key}={each}") for key, each in value.items()]
    if isinstance(value, list):
        return [
            line for each in value for line in ([json.dumps(each)] if isinstance(each, dict) else [table.printable(str(each))])
        ]
    return [] if value in (None, "") else [table.printable(str(value))]


VERBS = {
    "show": Verb(
        "show",
        "NAME…",
        (JSON, Option("path", "only its directory in the tree")),
        "Tell all about snapshots: what they are, what they take (active ones are counted now), where they are mounted.",
        """
snapfs show web
snapfs show --json v1 | jq -r '.[0].parent'
cd "$(snapfs show --path web)"/rootfs
""",
        _show,
    )
}
