"""``snapfs images``: names in images/, and the committed snapshots that have them."""

from __future__ import annotations

from snapfs.cli import listing, table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import find_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.cli.listing import Row


def _images(given: Given) -> int:
    place = find_tree(given.value("at"))
    found = sorted(listing.images(place))
    if given.has("quiet"):
        for name, _ in found:
            table.show_line(name)
        return 0
    known = {row.name: row for row in listing.rows(place)}
    sizes: dict[str, int] = {}
    if given.has("json"):
        shown = [{"name": name, "snapshot": snapshot, **_told(known, sizes, snapshot)} for name, snapshot in found]
        table.show_json(shown)
        return 0
    lines = []
    for name, snapshot in found:
        row = known.get(snapshot or "")
        created = f"{table.format_age(row.created)} ago" if row is not None else ""
        size = table.format_size(_size(known, sizes, row)) if row is not None else ""
        lines.append((table.printable(name), table.printable(snapshot or "(damaged)"), created, size))
    table.show_table(("NAME", "SNAPSHOT", "CREATED", "SIZE"), lines, right_aligned=(3,))
    return 0


def _told(known: dict[str, Row], sizes: dict[str, int], snapshot: str | None) -> dict[str, object]:
    row = known.get(snapshot or "")
    if row is None:
        return {}
    shown = row.shown()
    return {"id": row.id, "created": shown["created"], "size": _size(known, sizes, row), "labels": shown["labels"]}


def _size(known: dict[str, Row], sizes: dict[str, int], row: Row) -> int:
    """Bytes on disk of a snapshot and of all that it stands on; ``sizes`` are those that were summed up before."""
    way = []
    step: Row | None = row
    while step is not None and step.name not in sizes:
        sizes[step.name] = 0  # the records of a damaged root may go round in a circle
        way.append(step)
        step = known.get(step.parent) if step.parent is not None else None
    size = sizes[step.name] if step is not None else 0
    for each in reversed(way):
        size += each.size
        sizes[each.name] = size
    return size


VERBS = {
    "images": Verb(
        "images",
        "",
        (Option("quiet", "names alone, one a line", short="-q"), JSON),
        "List the names in images/ and the committed snapshots that have them.  Sizes are bytes on disk, of the snapshot and\n"
        "of all that it stands on.\n"
        "\n"
        "ln -s ../committed/SNAPSHOT images/NAME names one, snapfs rm --image NAME takes the name away.  What has a name is\n"
        "neither removed nor pruned.",
        """
snapfs images
snapfs images --json | jq -r '.[] | select(.size > 1e9).name'
""",
        _images,
    )
}
