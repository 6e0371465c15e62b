"""``snapfs squash``: a line into a file of the tree, which makes one layer of many (``tree/commands.py``)."""

from __future__ import annotations

from snapfs.cli import table
from snapfs.cli.commanding import commanded
from snapfs.cli.grammar import Given, Verb
from snapfs.cli.place import file_name, find_tree
from snapfs.cli.refusal import TAKEN, Refusal


def _squash(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    name = place.key(given.arguments[0])
    new = place.new_key(given.arguments[1], "committed") if len(given.arguments) > 1 else ""
    try:
        table.show_line(commanded(place, "committed", name, "squash", file_name(new) if new else "", f'squash "{name}"'))
    except Refusal as refused:
        if refused.status == TAKEN:
            raise Refusal(f'snapshot "{new}" already exists ({place.kind_of(new)})', TAKEN) from None
        raise
    return 0


VERBS = {
    "squash": Verb(
        "squash",
        "NAME [NEW]",
        (),
        "Make the committed snapshot NEW, or NAME-squashed, which shows what NAME shows and stands on nothing, and print its\n"
        "name.  It is made of hard links, and takes next to no space.  NAME and all that stands on it stay as they are.",
        """
snapfs squash v3
snapfs squash web@120 base-2
""",
        _squash,
    )
}
