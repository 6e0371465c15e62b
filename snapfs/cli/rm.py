"""``snapfs rm``: rmdir, the children first."""

from __future__ import annotations

from snapfs.cli import table
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.listing import children_first, rows, with_descendants
from snapfs.cli.place import file_name, find_tree
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import NOT_FOUND, USAGE, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snapfs.cli.listing import Row
    from snapfs.cli.place import MountedTree


def remove(place: MountedTree, wanted: Sequence[Row]) -> tuple[list[Row], list[Refusal]]:
    """Remove ``wanted``, in this order, and no others that have their names by then; returns those that were removed, and the
    refusals."""
    removed, refused = [], []
    progress = Progress()
    try:
        for done, row in enumerate(wanted):
            progress.show(f"removing {table.printable(row.name)}", done, len(wanted))
            try:
                place.remove(row.kind, row.name, row.id)
                removed.append(row)
            except Refusal as refusal:
                refused.append(Refusal(f"{row.name}: {refusal}", refusal.status))
    finally:
        progress.clear()
    return removed, refused


def _paths(place: MountedTree, word: str) -> Iterator[str]:
    """Where the name ``word`` in images/ may be: it is the name itself, or its path in the tree, as all verbs take that."""
    yield f"{place.path}/images/{file_name(word)}"
    image = word.removeprefix("images/")
    if image and image != word:
        yield f"{place.path}/images/{file_name(image)}"
        if "/" not in image and image not in (".", ".."):
            yield f"{place.path}/images/{image}"


def _unname(place: MountedTree, given: Given) -> int:
    """Take names in images/ away, each that can be."""
    if given.has("recursive") or given.has("dry-run"):
        raise Refusal("--image takes names in images/ away, and no snapshot: leave --recursive and --dry-run out", USAGE)
    status = 0
    for word in given.arguments:
        path = next(filter(place.within.exists, _paths(place, word)), f"{place.path}/images/{file_name(word)}")
        try:
            place.do(f'take the name "{word}" away', ["unlink"], place.within.unlink, path)
        except Refusal as refusal:
            if refusal.status != NOT_FOUND:
                raise
            if not given.has("force"):
                table.complain(f'nothing is called "{word}" in {place.path}/images: snapfs images lists all names')
                status = NOT_FOUND
    return status


def _rm(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    if given.has("image"):
        return _unname(place, given)
    names = [place.key(word) for word in given.arguments]
    status = 0
    if len(names) == 1 and not given.has("recursive") and not given.has("dry-run"):
        kind = place.kind_of(names[0])
        if kind is not None:
            place.do(f'remove "{names[0]}"', ["rmdir"], place.within.rmdir, place.directory(kind, names[0]))
            return 0
    everything = rows(place)
    known = {row.name: row for row in everything}
    for name in names:
        if name not in known and not given.has("force"):
            table.complain(place.missing(name))
            status = NOT_FOUND
    if given.has("recursive"):
        wanted = with_descendants(everything, names)
    else:
        wanted = [known[name] for name in dict.fromkeys(names) if name in known]
    wanted = children_first(wanted)
    if given.has("dry-run"):
        for row in wanted:
            print(table.printable(row.name))
        return status
    removed, refused = remove(place, wanted)
    if given.has("recursive"):
        for row in removed:
            print(f"removed {table.printable(row.name)}")
    for refusal in refused:
        table.complain(refusal)
        status = refusal.status
    return status


VERBS = {
    "rm": Verb(
        "rm",
        "NAME…",
        (
            Option("recursive", "also all that stand on it, children first", short="-r"),
            Option("force", "what does not exist is no error", short="-f"),
            Option("dry-run", "only say what would be removed", short="-n"),
            Option("image", "take names in images/ away: the snapshots stay"),
        ),
        "Remove snapshots.  One that has children, a name in images/, or a rootfs in use, is refused, and the others go.",
        """
snapfs rm web
snapfs rm -r base
snapfs rm -rn base
snapfs rm --image alpine:3.20
""",
        _rm,
    )
}
