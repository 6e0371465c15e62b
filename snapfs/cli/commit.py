"""``snapfs commit``: mv into committed/, and a sync."""

from __future__ import annotations

from snapfs.cli import table
from snapfs.cli.commanding import SYNC, persistently
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import NOT_FOUND, TAKEN, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.cli.place import MountedTree


def commit(place: MountedTree, key: str, name: str, parent: str | None = None) -> str:
    """Commit the active snapshot ``key`` as ``name``, onto ``parent`` if that is given; returns the directory of ``name`` in
    the tree.  Raises Refusal."""
    target = place.made_at("committed", name, parent)
    try:
        place.do(f'commit "{key}"', ["rename"], persistently, place.within.rename, place.directory("active", key), target)
    except Refusal as refused:
        if refused.status == NOT_FOUND:
            kind = place.kind_of(key)
            if kind is None:
                raise place.missing(key) from None
            if kind != "active":
                raise Refusal(f'"{key}" is {kind}: only active snapshots can be committed', NOT_FOUND) from None
            if parent is not None:
                raise place.wrong_parent(parent) from None
        if refused.status == TAKEN:
            raise Refusal(f'snapshot "{name}" already exists ({place.kind_of(name)})', TAKEN) from None
        raise
    return place.directory("committed", name)


def _commit(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    key, name, parent = given.arguments[0], given.arguments[1], given.value("parent")
    directory = commit(place, place.key(key), place.new_key(name, "committed"), None if parent is None else place.key(parent))
    if not given.has("no-sync"):
        place.do("wait for the disk", SYNC, persistently, place.within.sync, directory)
    table.show_line(directory)
    return 0


VERBS = {
    "commit": Verb(
        "commit",
        "KEY NAME",
        (
            Option("parent", "put a snapshot that has no parent onto this one", "PARENT", short="-p"),
            Option("no-sync", "return before its data is on disk"),
        ),
        "Commit the active snapshot KEY as NAME, and print its directory.  Its labels stay.  Returns when it is on disk.",
        """
snapfs commit web v1
snapfs commit web web
snapfs commit extra v2 --parent v1 --no-sync
""",
        _commit,
    )
}
