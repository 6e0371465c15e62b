"""``snapfs completion``: scripts for bash, zsh and fish.  All call ``snapfs _complete WORD…``, which knows the snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snapfs.cli import VERBS as ALL
from snapfs.cli import table, verb
from snapfs.cli.grammar import AT, NAMES, Given, Option, Verb
from snapfs.cli.refusal import USAGE, Refusal


def _users() -> list[str]:
    import pwd

    return sorted(user.pw_name for user in pwd.getpwall())


def _groups() -> list[str]:
    import grp

    return sorted(group.gr_name for group in grp.getgrall())


CHOICES: dict[str, Callable[[], list[str]]] = {
    "KIND": lambda: ["active", "view", "committed"],
    "full|background|none": lambda: ["full", "background", "none"],
    "USER": _users,
    "GROUP": _groups,
    "WHEN": lambda: ["auto", "always", "never"],
}
"""The values that an option can have, by its metavar."""

SCRIPTS = {
    "bash": r"""
_snapfs() {
    local IFS=$'\n' rest=$COMP_LINE words=() number word before breaks=${COMP_WORDBREAKS//[^=:]/}
    for ((number = 0; number <= COMP_CWORD; number++)); do  # bash has split words at = and :
        word=${COMP_WORDS[number]} before=${rest%%[^[:blank:]]*}
        rest=${rest#"$before"} rest=${rest#"$word"} word=${word//\\/}
        if ((number == 0)) || [[ $before ]]; then words+=("$word"); else words[-1]+=$word; fi
    done
    word=${words[-1]} before=
    if [[ $breaks ]]; then before=${word%"${word##*[$breaks]}"}; fi
    COMPREPLY=()
    while read -r number; do
        case $number in "$word"*) COMPREPLY+=("$(printf %q "${number#"$before"}")") ;; esac
    done < <(snapfs _complete "${words[@]:1}" 2>/dev/null)
    case ${words[-2]} in -o | --options) compopt -o nospace ;; esac
    test ${#COMPREPLY[@]} -gt 0 || compopt -o default
}
complete -F _snapfs snapfs
""",
    "zsh": r"""
#compdef snapfs
_snapfs() {
    local -a found list
    found=("${(@f)$(snapfs _complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    [[ $words[CURRENT-1] != (-o|--options) ]] || list=(-S '')
    if (( ${#found} )); then compadd $list -- "${found[@]}"; else _files; fi
}
if [[ $funcstack[1] == _snapfs ]]; then _snapfs "$@"; else compdef _snapfs snapfs; fi
""",
    "fish": r"""
function __snapfs_complete
    set -l words (commandline -opc) (string replace --all -- \\ '' (commandline -ct))
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
    """Print the words that the last of ``words`` can be completed to, one a line; none where the shell has to complete a path,
    and none that a terminal would not show as it is, or a shell would cut.  Returns the exit status."""
    try:
        for each in candidates(list(words) or [""]):
            if each.startswith(words[-1] if words else "") and table.printable(each) == each:
                print(each)
    except Exception:  # a shell that completes must not show error messages
        return 1
    return 0


def candidates(words: list[str]) -> list[str]:
    """The words that may stand in the place of the last of ``words``."""
    *before, last = words
    if not before:
        return [*ALL, "--help", "--version"]
    if "/" in before[0]:
        before = ["serve", *before]  # as mount(8) calls it
    if before[0] not in ALL:
        return []
    its = verb(before[0])
    count, option, only_arguments = _read(its, before[1:])
    if option is not None:
        if option.metavar == "OPT,…":
            return _in_list(last)
        if option.metavar in CHOICES:
            return CHOICES[option.metavar]()
        return _snapshots(its, option.metavar, before)
    if last.startswith("-") and not only_arguments:
        return [*(f"--{option.name}" for option in its.options), "--help"]
    if its.name == "completion":
        return list(SCRIPTS)
    found = _snapshots(its, _argument(its, count), before)
    return [name for name in found if only_arguments or name == "-" or not name.startswith("-")]  # it would be an option


def _in_list(text: str) -> list[str]:
    """The lists that ``text``, the beginning of a comma-separated list of mount options, can be completed to."""
    import re

    from snapfs.cli.serve import MOUNT_OPTIONS

    *given, last = re.split(r"(?<!\\),", text)
    head = text.removesuffix(last)
    name, equals, _ = last.partition("=")
    if equals:
        values = CHOICES.get(MOUNT_OPTIONS.get(name, ""), list)()
        return [f"{head}{name}={value}" for value in values]
    had = {option.partition("=")[0] for option in given} - {"mount_option"}
    return [head + name + "=" * bool(metavar) for name, metavar in MOUNT_OPTIONS.items() if name not in had]


def _read(its: Verb, words: list[str]) -> tuple[int, Option | None, bool]:
    """What ``Verb.parse`` takes ``words`` for: how many arguments, the option whose value comes next, whether all that comes
    is an argument, since there was ``--``."""
    count, option = 0, None
    for n, word in enumerate(words):
        if option is not None:
            option = None
        elif word == "--":
            return count + len(words) - n - 1, None, True
        elif word == "-" or not word.startswith("-"):
            count += 1
        else:
            option = next((o for o in its.options if o.metavar and word in (f"--{o.name}", o.short)), None)
    return count, option, False


def _argument(its: Verb, count: int) -> str:
    """The name of the argument that comes after ``count`` others."""
    names = its.arguments
    if count < len(names):
        return names[count].strip("[]…")
    return names[-1].strip("[]…") if names and "…" in names[-1] else ""


def _snapshots(its: Verb, argument: str, before: list[str]) -> list[str]:
    kinds = NAMES.get(argument.partition("|")[0], "").split()
    if not kinds or AT not in its.options:
        return []
    from snapfs.cli.listing import images, rows
    from snapfs.cli.place import find_tree

    options = before[: before.index("--")] if "--" in before else before
    place = find_tree(options[options.index("--at") + 1] if "--at" in options[:-1] else None, tell=False)
    if its.name == "rm" and "--image" in options:
        return sorted(name for name, _ in images(place))
    return sorted(row.name for row in rows(place) if row.kind in kinds)


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
