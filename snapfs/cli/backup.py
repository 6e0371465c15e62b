"""``snapfs backup ROOT FILE``: a copy of a root's records, while a daemon serves it or not."""

from __future__ import annotations

import argparse
from typing import Any

from snapfs.backup import backup


def add_parser(verbs: Any) -> None:
    """Add the verb to the command's parsers."""
    parser = verbs.add_parser(
        "backup",
        help="copy a root's records to a file, also while it is served",
        description=(
            "Write a copy of ROOT's records to FILE: names, kinds, parents, labels and usage of all snapshots, as of one "
            "moment, while a daemon serves ROOT or while none does. The layers, ROOT/snapshots, are not in it. "
            "FILE must not exist; it appears when it is whole."
        ),
        epilog=(
            "To restore: stop the daemon, put FILE in place of ROOT/metadata.mdb, and remove ROOT/metadata.mdb-lock. "
            "snapfs check ROOT then says what differs: snapshots made since the backup have layers that no record names, "
            "and those removed since have records without layers."
        ),
    )
    parser.add_argument("root", metavar="ROOT", help="where the layers and records are")
    parser.add_argument("file", metavar="FILE", help="what to write, outside of ROOT")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write the backup and say what is in it; returns 0."""
    made = backup(given.root, given.file)
    snapshots = f"{made.snapshots} snapshot" + "s" * (made.snapshots != 1)
    print(f"snapfs: wrote the records of {snapshots} to {given.file}, {made.size} bytes; the layers are not in it")
    return 0
