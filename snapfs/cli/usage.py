"""``snapfs usage``: usage.json of some snapshots, or all."""

from __future__ import annotations

import json

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Verb
from snapfs.cli.listing import rows
from snapfs.cli.place import find_tree
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import NOT_FOUND, Refusal


def _usage(given: Given) -> int:
    place = find_tree(given.value("at"))
    if given.arguments:
        wanted = [(name, *place.find(name)) for name in map(place.key, given.arguments)]
    else:
        wanted = [(row.name, row.kind, place.directory(row.kind, row.name)) for row in rows(place)]
    found: list[dict[str, object]] = []
    total = [0, 0]
    progress = Progress()
    try:
        for done, (name, kind, directory) in enumerate(wanted):
            progress.show(f"counting {table.printable(name)}", done, len(wanted))
            try:
                usage = json.loads(place.read(f"{directory}/usage.json"))
            except Refusal as refused:
                if given.arguments or refused.status != NOT_FOUND:
                    raise
                continue  # removed meanwhile
            found.append({"name": name, "kind": kind, **usage})
            total[0] += usage["inodes"]
            total[1] += usage["size"] - usage["shared"]
    finally:
        progress.clear()
    if given.has("json"):
        table.show_json(found)
        return 0
    found.sort(key=lambda each: -int(str(each["size"])))
    lines = [
        (
            table.printable(str(each["name"])),
            str(each["kind"]),
            str(each["inodes"]),
            table.format_size(int(str(each["size"]))),
            table.format_size(int(str(each["shared"]))) if each["shared"] else "",
        )
        for each in found
    ]
    if len(found) != 1:
        lines.append(("total", "", str(total[0]), table.format_size(total[1]), ""))
    table.show_table(("NAME", "KIND", "INODES", "SIZE", "SHARED"), lines, right_aligned=(2, 3, 4))
    return 0


VERBS = {
    "usage": Verb(
        "usage",
        "[NAME…]",
        (JSON,),
        "Count what snapshots take on disk, each alone, without its parents; all of them where none is named.  SHARED is what\n"
        "of that is in files that were others' too when it was counted, as those of a squash are; the total is without it.",
        """
snapfs usage
snapfs usage web
""",
        _usage,
    )
}
