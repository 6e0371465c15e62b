"""The manual pages snapfs(1), from the verbs' grammar, and snapfs-tree(7), from the tree's README.

``python -m snapfs.cli.manual`` writes them to ``snapfs/man``, from where the installation takes them; a test compares.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from pathlib import Path

import snapfs
from snapfs.cli import HELP, VERBS, verb
from snapfs.cli.grammar import Verb
from snapfs.cli.serve import MOUNT_OPTIONS

DIRECTORY = Path(__file__).parent.parent / "man"

_ESCAPED = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", '"': "\\(dq"})


def roff(text: str) -> str:
    """``text`` as roff shows it, letter by letter; a new line for each sentence that two blanks part from the one before."""
    escaped = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text.translate(_ESCAPED))
    return escaped.replace(".  ", ".\n")


def command_page() -> str:
    """snapfs(1)."""
    usage, summary, _, place, statuses, examples = HELP.strip().split("\n\n")
    lines = [
        *_head("snapfs", 1, summary.rstrip(".")),
        ".SH SYNOPSIS",
        *_verbatim(line.removeprefix("usage:").strip() for line in usage.splitlines()),
        ".SH DESCRIPTION",
        roff(place),
        ".PP",
        "What the directories and files of a tree mean is in",
        r".BR snapfs\-tree (7).",
        ".SH VERBS",
        *_verbatim(f"{name:<12}{short}" for name, (_, short) in VERBS.items()),
    ]
    for name in VERBS:
        lines += _verb(verb(name))
    lines += [".SH MOUNT OPTIONS", r"\fB\-o\fR of \fBsnapfs serve\fR and of \fBmount \-t fuse.snapfs\fR, and /etc/fstab, take"]
    lines += [roff(", ".join(name + f"={value}" * bool(value) for name, value in MOUNT_OPTIONS.items())) + ":"]
    lines += [r"they do what the flags of \fBsnapfs serve\fR do that are called so.", ".SH EXIT STATUS"]
    for line in statuses.splitlines()[1:]:
        number, meaning = line.split(maxsplit=1)
        lines += [".TP", rf"\fB{number}\fR", roff(meaning)]
    lines += [".SH EXAMPLES", *_verbatim(line.strip() for line in examples.splitlines()[1:])]
    lines += [".SH SEE ALSO", r".BR snapfs\-tree (7),", ".BR mount (8)"]
    return _page(lines)


def tree_page() -> str:
    """snapfs-tree(7)."""
    readme = (importlib.resources.files(snapfs) / "tree/README.txt").read_text()
    lines = [*_head("snapfs-tree", 7, "what the directories and files of a snapfs tree mean"), ".SH DESCRIPTION"]
    for block in readme.strip().split("\n\n"):
        if block.startswith(" "):
            lines += _verbatim(line.removeprefix("  ") for line in block.splitlines())
        else:
            lines += [".PP", *map(roff, block.splitlines())]
    return _page([*lines, ".SH SEE ALSO", ".BR snapfs (1)"])


PAGES = {"snapfs.1": command_page, "snapfs-tree.7": tree_page}


def _head(name: str, section: int, summary: str) -> list[str]:
    return [
        r".\" python -m snapfs.cli.manual writes this",
        rf'.TH {roff(name).upper()} {section} "" "snapfs {snapfs.__version__}"',
        ".nh",
        ".ad l",
        ".SH NAME",
        rf"{roff(name)} \- {roff(summary[0].lower() + summary[1:])}",
    ]


def _page(lines: list[str]) -> str:
    """All of it; a section begins a paragraph by itself."""
    kept = [line for before, line in zip(["", *lines], lines, strict=False) if line != ".PP" or not before.startswith(".SH")]
    return "\n".join(kept) + "\n"


def _verb(its: Verb) -> Iterator[str]:
    """Its part of snapfs(1)."""
    yield f".SS {roff(its.usage().removeprefix('usage: '))}"
    yield ".PP\n".join(roff(paragraph) + "\n" for paragraph in its.text.split("\n\n")).rstrip("\n")
    for option in its.options:
        yield from (".TP", rf"\fB{roff(option.words())}\fR", roff(option.meaning()))
    yield from _verbatim(its.examples.strip().splitlines())


def _verbatim(lines: Iterator[str] | list[str]) -> Iterator[str]:
    """Lines that stay as they are."""
    yield from (".PP", ".RS 4", ".nf")
    for line in lines:
        yield r"\&" + roff(line).replace("\n", "  ")  # even if it begins with a dot
    yield from (".fi", ".RE")


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DIRECTORY / name).write_text(page())
