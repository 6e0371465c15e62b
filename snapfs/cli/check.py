"""``snapfs check ROOT``: look for what is damaged, orphaned, miscounted or torn, and mend what can be mended."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from snapfs.cli import table
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import given_root
from snapfs.cli.progress import Progress


def _check(given: Given) -> int:
    """Check; one line a finding, on standard output."""
    from snapfs.offline.checking import Problem, check
    from snapfs.offline.rebuilding import rebuild

    root = given_root(given.arguments[0])
    progress = Progress()
    findings = check(root, repair=given.has("repair"), accept=given.all("accept"), progress=progress.show)
    left: Counter[Problem] = Counter()
    mended = 0
    for finding in chain(rebuild(root, progress=progress.show), findings) if given.has("rebuild") else findings:
        progress.clear()
        mended += bool(finding.mended)
        if given.has("json"):
            shown = {"problem": finding.problem, "text": finding.text, "remedy": finding.remedy, "mended": finding.mended}
            table.show_json(shown, indent=None)
        else:
            print(table.printable(f"{finding.problem}: {finding.text}"))  # a name in it may be anything
            what = f"  mended: {finding.mended}" if finding.mended else f"  to do: {finding.remedy}"
            print(f"{table.printable(what)}\n" * bool(finding.mended or finding.remedy), end="")
        if finding.problem is not Problem.NOTE and not finding.mended:
            left[finding.problem] += 1
    progress.clear()
    if given.has("json"):
        return 1 if left else 0
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
            Option("json", "for programs: an object a line for each that is found"),
        ),
        "Look for damaged, orphaned, miscounted and unflushed snapshots in ROOT, which no daemon may have open.\n"
        "The exit status is 0 where nothing is wrong or all was mended, 1 where something is left to do.",
        """
snapfs check /srv/snapfs
snapfs check /srv/snapfs --repair
snapfs check /srv/snapfs --accept v1
snapfs check /srv/snapfs --json | jq -r 'select(.problem != "note").text'
""",
        _check,
        at=False,
    )
}
