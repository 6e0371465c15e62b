"""``snapfs check ROOT``: look for what is damaged, orphaned, miscounted or torn, and mend what can be mended."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import chain
from typing import Any

_FLAGS = {
    "repair": "mend what can be mended without guessing; what nobody knows goes to ROOT/lost+found",
    "rebuild": "make the records anew from what each snapshot's directory says of itself; the old go to ROOT/lost+found",
}


def add_parser(verbs: Any) -> None:
    """Add the verb to the command's parsers."""
    parser = verbs.add_parser(
        "check",
        help="look for damage in a root that is not in use, and mend it",
        description="Look for damaged, orphaned, miscounted and unflushed snapshots in ROOT, which no daemon may have open.",
        epilog="The exit status is 0 where nothing is wrong or all was mended, 1 where something is left to do.",
    )
    parser.add_argument("root", metavar="ROOT", help="the directory that snapfs serve was given")
    for name, text in _FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="NAME",
        help="take this committed snapshot as it is, though a power cut may have torn it; may be repeated",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check; one line a finding, on standard output."""
    from snapfs.checking import Problem, check
    from snapfs.rebuilding import rebuild

    shown = Progress()
    findings = check(given.root, repair=given.repair, accept=given.accept, progress=shown.show)
    left: Counter[Problem] = Counter()
    mended = 0
    for finding in chain(rebuild(given.root), findings) if given.rebuild else findings:
        shown.clear()
        print(f"{finding.problem}: {finding.text}")
        if finding.mended:
            mended += 1
            print(f"  mended: {finding.mended}")
        elif finding.remedy:
            print(f"  to do: {finding.remedy}")
        if finding.problem is not Problem.NOTE and not finding.mended:
            left[finding.problem] += 1
    shown.clear()
    words = ", ".join(f"{count} {problem}" for problem in Problem if (count := left[problem])) or "nothing is wrong"
    print(f"{given.root}: {words}" + f"; {mended} mended" * bool(mended))
    return 1 if left else 0


class Progress:
    """What is being looked at, in one line on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._width = 0

    def show(self, what: str, done: int, total: int) -> None:
        """Say that ``what`` is being looked at."""
        if self._on:
            line = f"{done + 1}/{total} {what}"[:100]
            print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)

    def clear(self) -> None:
        """Make room for something else."""
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0
