"""``snapfs ls``: all snapshots, or some."""

from __future__ import annotations

import sys

from snapfs.cli import listing, table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import checked_kinds, find_tree


def _ls(given: Given) -> int:
    wanted = [label.partition("=") for label in given.all("label")]
    kinds = checked_kinds(given.all("kind"))
    found = [
        row
        for row in listing.rows(find_tree(given.value("at")))
        if (not kinds or row.kind in kinds)
        and (not wanted or all(_has(row.labels, key, equals, value) for key, equals, value in wanted))
    ]
    found.sort(key=lambda row: row.name)
    if given.has("json"):
        table.show_json([row.shown() for row in found])
    elif given.has("null") or given.has("quiet"):
        end = "\0" if given.has("null") else "\n"
        as_it_is = given.has("null") or not sys.stdout.isatty()
        sys.stdout.write("".join((row.name if as_it_is else table.printable(row.name)) + end for row in found))
    else:
        lines = [
            (
                table.printable(row.name),
                row.kind + f" ({row.state})" * bool(row.state),
                table.printable(row.parent or ""),
                table.format_size(row.size),
                table.format_age(row.created),
                table.format_labels(row.labels),
            )
            for row in found
        ]
        table.show_table(("NAME", "KIND", "PARENT", "SIZE", "AGE", "LABELS"), lines, right_aligned=(3, 4))
    return 0


def _has(labels: dict[str, str], key: str, equals: str, value: str) -> bool:
    return key in labels and (not equals or labels[key] == value)


VERBS = {
    "ls": Verb(
        "ls",
        "",
        (
            Option("kind", "only these: active, view or committed", "KIND", many=True),
            Option("label", "only with this label", "KEY[=VALUE]", many=True),
            Option("quiet", "names alone, one a line", short="-q"),
            Option("null", "names alone, each ended by a NUL, for xargs -0", short="-0"),
            JSON,
        ),
        "List snapshots.  Sizes are bytes on disk; that of an active one is what was counted last (see snapfs usage).",
        """
snapfs ls
snapfs ls --kind active --label team=blue
snapfs ls -0 --label ci | xargs -0 snapfs rm --
snapfs ls --json | jq '.[] | select(.size > 1e9).name'
""",
        _ls,
    )
}
