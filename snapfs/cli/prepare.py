"""``snapfs prepare`` and ``snapfs view``: mkdir."""

from __future__ import annotations

import os

from snapfs.cli import table
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import NOT_FOUND, TAKEN, USAGE, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapfs.cli.place import MountedTree


def read_labels(items: Sequence[str]) -> list[tuple[str, str]]:
    """The labels that the command line gives as ``key=value``, as pairs; raises Refusal."""
    found = []
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise Refusal(f'"{item}" is no label: write KEY=VALUE', USAGE)
        found.append((key, value))
    return found


def make(place: MountedTree, kind: str, key: str, parent: str | None, labels: Sequence[tuple[str, str]] = ()) -> str:
    """Make a snapshot with these labels; returns its directory in the tree.  Raises Refusal, and no snapshot is left."""
    directory = place.directory(kind, key)
    try:
        place.do(f'make "{key}"', ["mkdir"], place.within.mkdir, place.made_at(kind, key, parent))
    except Refusal as refused:
        if refused.status == NOT_FOUND and parent is not None:
            raise place.wrong_parent(parent) from None
        if refused.status == TAKEN:
            raise Refusal(f'snapshot "{key}" already exists ({place.kind_of(key)})', TAKEN) from None
        raise
    if not labels:
        return directory
    held = place.hold(kind, key)
    try:
        for label, value in labels:
            if value:
                place.write_label(directory, label, value)
    except BaseException:
        place.remove_held(held, kind, key)
        raise
    finally:
        os.close(held)
    return directory


def _make(kind: str, given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    labels = read_labels(given.all("label"))
    parent = given.value("parent")
    table.show_line(
        make(place, kind, place.new_key(given.arguments[0], kind), None if parent is None else place.key(parent), labels)
    )
    return 0


_OPTIONS = (
    Option("parent", "the committed snapshot that it stands on", "PARENT", short="-p"),
    Option("label", "a label", "KEY=VALUE", short="-l", many=True),
)

VERBS = {
    "prepare": Verb(
        "prepare",
        "KEY",
        _OPTIONS,
        "Make the active snapshot KEY, and print its directory.  Its files are in rootfs/ there.",
        """
snapfs prepare web
snapfs prepare web --parent v1 --label team=blue
cd "$(snapfs prepare web --parent v1)/rootfs"
""",
        lambda given: _make("active", given),
    ),
    "view": Verb(
        "view",
        "KEY",
        _OPTIONS,
        "Make the read-only view KEY, and print its directory.  Its files are in rootfs/ there.",
        """
snapfs view peek --parent v1
ls "$(snapfs view peek --parent v1)/rootfs"
""",
        lambda given: _make("view", given),
    ),
}
