"""``snapfs check ROOT``: look for what is damaged, orphaned, miscounted or torn, and mend what can be mended."""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import chain
from typing import Any

from snapfs.cli.progress import Progress

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
