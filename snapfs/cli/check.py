"""``snapfs check ROOT``: look for what is damaged, orphaned, miscounted or torn, and mend what can be mended."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.progress import Progress


def _check(given: Given) -> int:
    """Check; one line a finding, on standard output."""
    from snapfs.checking import Problem, check
    from snapfs.rebuilding import rebuild

    (root,) = given.arguments
    shown = Progress()
    findings = check(root, repair=given.has("repair"), accept=given.all("accept"), progress=shown.show)
    left: Counter[Problem] = Counter()
    mended = 0
    for finding in chain(rebuild(root, progress=shown.show), findings) if given.has("rebuild") else findings:
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
    print(f"{root}: {words}" + f"; {mended} mended" * bool(mended))
    return 1 if left else 0


VERBS = {
    "check": Verb(
        "check",
        "ROOT",
        (
            Option("repair", "mend what can be mended without guessing; what nobody knows goes to ROOT/lost+found"),
            Option("rebuild", "make the records anew from what each directory says; the old go to ROOT/lost+found"),
            Option("accept", "take this committed snapshot as it is, though a power cut may have torn it", "NAME", many=True),
        ),
        "Look for damaged, orphaned, miscounted and unflushed snapshots in ROOT, which no daemon may have open.\n"
        "The exit status is 0 where nothing is wrong or all was mended, 1 where something is left to do.",
        """
snapfs check /srv/snapfs
snapfs check /srv/snapfs --repair
snapfs check /srv/snapfs --accept v1
""",
        _check,
        at=False,
    )
}
