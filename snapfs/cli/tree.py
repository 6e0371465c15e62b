"""``snapfs tree``: each snapshot below the one that it stands on."""

from __future__ import annotations

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Verb
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import find_tree


def _tree(given: Given) -> int:
    place = find_tree(given.value("at"))
    everything = sorted(rows(place), key=lambda row: row.name)
    below: dict[str | None, list[Row]] = {}
    for row in everything:
        below.setdefault(row.parent, []).append(row)
    tops = below.get(None, [])
    if given.arguments:
        name = place.key(given.arguments[0])
        tops = [row for row in everything if row.name == name]
        if not tops:
            raise place.missing(name)
    if given.has("json"):
        shown = {row.name: {**row.shown(), "children": []} for row in everything}
        for row in everything:
            children = shown[row.parent]["children"] if row.parent in shown else None
            if isinstance(children, list):
                children.append(shown[row.name])
        table.show_json([shown[row.name] for row in tops])
        return 0
    waiting = [(row, "", "", "") for row in reversed(tops)]
    while waiting:  # chains are longer than the interpreter's stack
        row, before, branch, after = waiting.pop()
        name = table.coloured(table.printable(row.name), table.KIND_COLOURS[row.kind])
        facts = [row.kind, *([row.state] if row.state else []), table.format_size(row.size), table.format_age(row.created)]
        facts.append(table.format_labels(row.labels))
        print(f"{before}{branch}{name}  " + table.coloured("  ".join(facts).rstrip(), "dim"))
        children = below.get(row.name, [])
        for n, child in enumerate(reversed(children)):
            waiting.append((child, before + after, "└── " if n == 0 else "├── ", "    " if n == 0 else "│   "))
    return 0


VERBS = {
    "tree": Verb(
        "tree",
        "[NAME]",
        (JSON,),
        "Show all snapshots, or NAME and what stands on it, as a tree: kind, size on disk, age, labels.",
        """
snapfs tree
snapfs tree base
""",
        _tree,
    )
}
