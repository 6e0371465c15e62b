"""``snapfs completion``: scripts for bash, zsh and fish.  All ask ``snapfs _complete WORD…``, which knows the snapshots."""

from __future__ import annotations

from collections.abc import Sequence

from snapfs.cli import VERBS as ALL
from snapfs.cli import verb
from snapfs.cli.grammar import NAMES, Given, Verb
from snapfs.cli.refusal import USAGE, Refusal

OWN = ("serve", "check", "backup")

SCRIPTS = {
    "bash": r"""
_snapfs() {
    local IFS=$'\n' word
    COMPREPLY=()
    while read -r word; do
        case $word in "${COMP_WORDS[COMP_CWORD]}"*) COMPREPLY+=("$(printf %q "$word")") ;; esac
    done < <(snapfs _complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    test ${#COMPREPLY[@]} -gt 0 || compopt -o default
}
complete -F _snapfs snapfs
""",
    "zsh": r"""
#compdef snapfs
_snapfs() {
    local -a found
    found=("${(@f)$(snapfs _complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then compadd -- "${found[@]}"; else _files; fi
}
if [[ $funcstack[1] == _snapfs ]]; then _snapfs "$@"; else compdef _snapfs snapfs; fi
""",
    "fish": r"""
function __snapfs_complete
    set -l words (commandline -opc) (commandline -ct)
    snapfs _complete $words[2..-1] 2>/dev/null
end
complete -c snapfs -a '(__snapfs_complete)'
""",
}


def _completion(given: Given) -> int:
    shell = given.arguments[0]
    if shell not in SCRIPTS:
        raise Refusal(f'there is none for "{shell}", but for {", ".join(SCRIPTS)}', USAGE)
    print(SCRIPTS[shell].strip())
    return 0


def complete(words: Sequence[str]) -> int:
    """Print what the last of ``words`` may become, one a line; nothing where only the shell knows (a path)."""
    try:
        for each in candidates(list(words) or [""]):
            if each.startswith(words[-1] if words else "") and "\n" not in each:
                print(each)
    except Exception:  # a shell that completes is no place for words
        return 1
    return 0


def candidates(words: list[str]) -> list[str]:
    """What may stand where the last of ``words`` is."""
    *before, last = words
    if not before:
        return [*ALL, "--help", "--version"]
    if before[0] not in ALL or before[0] in OWN:
        return []
    its = verb(before[0])
    option = next((o for o in its.options if before[-1] in (f"--{o.name}", o.short) and o.metavar), None)
    if option is not None:
        return ["active", "view", "committed"] if option.metavar == "KIND" else _snapshots(option.metavar, before)
    if last.startswith("-"):
        return [*(f"--{option.name}" for option in its.options), "--help"]
    if its.name == "completion":
        return list(SCRIPTS)
    return _snapshots(_argument(its, before[1:]), before)


def _argument(its: Verb, before: list[str]) -> str:
    """The name of the argument that comes after ``before``."""
    taking = {name for option in its.options if option.metavar for name in (f"--{option.name}", option.short)}
    count = sum(not word.startswith("-") and (n == 0 or before[n - 1] not in taking) for n, word in enumerate(before))
    names = its.arguments
    if count < len(names):
        return names[count].strip("[]…")
    return names[-1].strip("[]…") if names and "…" in names[-1] else ""


def _snapshots(argument: str, before: list[str]) -> list[str]:
    kinds = NAMES.get(argument.partition("|")[0], "").split()
    if not kinds:
        return []
    from snapfs.cli.listing import rows
    from snapfs.cli.place import find_tree

    at = before[before.index("--at") + 1] if "--at" in before[:-1] else None
    return sorted(row.name for row in rows(find_tree(at)) if row.kind in kinds)


VERBS = {
    "completion": Verb(
        "completion",
        "SHELL",
        (),
        "Print the completion script for bash, zsh or fish.",
        """
eval "$(snapfs completion bash)"                                   # in ~/.bashrc
snapfs completion zsh > ~/.zfunc/_snapfs                           # a directory of $fpath
snapfs completion fish > ~/.config/fish/completions/snapfs.fish
""",
        _completion,
    )
}
