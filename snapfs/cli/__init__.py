"""The command ``snapfs``.  Each verb has a module of its own, imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import snapfs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 refused (with a sentence on standard error), 2 wrong usage."""
    from snapfs.cli import backup, check, serve

    parser = argparse.ArgumentParser(prog="snapfs", description="Copy-on-write snapshots for overlayfs, as a file system.")
    parser.add_argument("--version", action="version", version=f"snapfs {snapfs.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (serve, check, backup):
        verb.add_parser(verbs)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
    except snapfs.SnapshotError as error:
        print(f"snapfs: {error}", file=sys.stderr)
        return 1
    return status
