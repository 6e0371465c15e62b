"""``snapfs diff``: what differs between a snapshot and its parent, or another one."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import MountedTree, file_name, find_tree
from snapfs.cli.refusal import NOT_FOUND, USAGE, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_COLOURS = {"A": "green", "C": "yellow", "D": "red", "R": "blue"}
_PATCH_COLOURS = {"+": "green", "-": "red", "@": "cyan"}

FORMATS = ("json", "patch", "stat")


def _diff(given: Given) -> int:
    formats = [*filter(given.has, FORMATS)]
    if len(formats) > 1:
        raise Refusal(f"--{', --'.join(FORMATS[:-1])} and --{FORMATS[-1]} can't go together", USAGE)
    form = formats[0] if formats else "patch" if given.has("binary") else ""
    if form == "json" and given.has("binary"):
        raise Refusal("--json lists names alone: leave --binary away", USAGE)
    table.colour(given.value("color") or "auto")
    lines = _lines(find_tree(given.value("at")), given, form in ("patch", "stat"))
    if form == "json":
        table.show_json([{"change": line[0], "path": line[2:]} for line in lines])
    elif form == "patch":
        _show(coloured_patch(lines))
    elif form == "stat":
        _show(stat_of(lines))
    else:
        _show(table.coloured(line, _COLOURS[line[0]]) for line in lines)
    return 0


def _lines(place: MountedTree, given: Given, as_patch: bool) -> Iterator[str]:
    """What the tree says of what is asked for; raises Refusal."""
    old, new, paths = _sides(place, given)
    kind, directory = place.find(new)
    if kind == "view" and not old:
        to_do = place.command("diff NAME", place.word_of(new))
        raise Refusal(f'"{new}" is a view, which changes nothing; {to_do} compares it with another')
    name = "changes.patch" if as_patch else "changes"
    option = "binary" if as_patch else "content"  # a patch has never what holds what it held
    if not old and not paths and not given.has(option):
        return place.lines(f"{directory}/{name}")
    words = ["patch" if as_patch else "changes", *([option] if given.has(option) else []), *([old] if old else [])]
    return place.compared(directory, " ".join(words), paths)


def _sides(place: MountedTree, given: Given) -> tuple[str, str, list[str]]:
    """What is compared: the old side as the tree takes it (the parent: nothing), the key of the new one, and of which paths;
    raises Refusal."""
    first, *rest = given.arguments
    key = place.key(first)
    since = given.value("since")
    before = (given.before or len(given.arguments)) - 1  # after --, a path; but a name that begins with - stands there, too
    second = _second(place, first, rest[0]) if rest and before > 0 else None
    if second is None:
        if since is None:
            return "", key, rest
        return since if since.isdecimal() else _named(place, place.key(since)), key, rest
    if since is not None:
        raise Refusal("--since and a second snapshot can't go together: --since says with what the first is compared", USAGE)
    return _named(place, key), second, rest[1:]


def _second(place: MountedTree, first: str, word: str) -> str | None:
    """The key of the second snapshot, if ``word`` is one, and no path; raises Refusal where it is neither."""
    from snapfs import names
    from snapfs.errors import SnapshotError

    with contextlib.suppress(SnapshotError):  # too long for a key
        key = place.key(word)
        if place.kind_of(key) is not None:
            return key
        if word.startswith(f"{place.path}/"):
            raise place.missing(key)
    if word.startswith(("/", "./")):
        return None
    advice = f"a path goes after --, as in snapfs diff {names.word(first)} -- {names.word(word)}"
    raise Refusal(f'snapshot "{word}" does not exist in {place.path}; {advice}', NOT_FOUND)


def _named(place: MountedTree, key: str) -> str:
    """``key`` as ``compare`` takes it, which would take a number for that of a checkpoint."""
    kind, _ = place.find(key)
    return f"{kind}/{file_name(key)}"


def coloured_patch(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a patch, as git colours them at a terminal."""
    for line, is_head in _with_heads(lines):
        colour = "bold" if is_head else _PATCH_COLOURS.get(line[:1], "")
        yield table.coloured(_shown(line), colour) if colour else _shown(line)


def stat_of(lines: Iterable[str]) -> Iterator[str]:
    """How many lines a patch adds and deletes in each file, and in all, in git's words."""
    files: list[tuple[str, int, int, bool]] = []
    for line, is_head in _with_heads(lines):
        if is_head and line.startswith("diff --git "):
            name = line[11 : 11 + (len(line) - 11) // 2]  # both have the same length
            files.append((f'"{name[3:]}' if name[0] == '"' else name[2:], 0, 0, False))
            continue
        name, added, deleted, is_binary = files[-1]
        if is_head:
            files[-1] = name, added, deleted, is_binary or line.startswith(("Binary files ", "GIT binary patch"))
        else:
            files[-1] = name, added + (line[0] == "+"), deleted + (line[0] == "-"), is_binary
    if not files:
        return
    width = max(len(name) for name, *_ in files)
    most = max(added + deleted for _, added, deleted, _ in files)
    digits = len(str(most))
    room = max(10, 80 - width - digits - 5)
    for name, added, deleted, is_binary in files:
        if is_binary:
            yield f" {_shown(name):<{width}} | Bin"
            continue
        parts = (added, deleted)
        if most > room:
            parts = (-(-added * room // most), -(-deleted * room // most))
        signs = table.coloured("+" * parts[0], "green") * bool(added) + table.coloured("-" * parts[1], "red") * bool(deleted)
        yield f" {_shown(name):<{width}} | {added + deleted:>{digits}} {signs}".rstrip()
    total = [sum(each) for each in zip(*[(added, deleted) for _, added, deleted, _ in files], strict=True)]
    words = [f"{len(files)} file{'s' * (len(files) != 1)} changed"]
    for count, what, sign in zip(total, ("insertion", "deletion"), "+-", strict=True):
        if count or not any(total):
            words.append(f"{count} {what}{'s' * (count != 1)}({sign})")
    yield " " + ", ".join(words)


def _with_heads(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each line of a patch, and whether it is of a head, and not of a file that begins as one does."""
    left = [0, 0]  # lines of the hunk that are to come
    for line in lines:
        in_hunk = any(left)
        if in_hunk and line[:1] in " +-":
            left = [left[0] - (line[0] != "+"), left[1] - (line[0] != "-")]
        elif not in_hunk and line.startswith("@@ -"):
            left = [int(part[1:].partition(",")[2] or 1) for part in line.split(" ", 3)[1:3]]
            in_hunk = True
        yield line, not in_hunk and not line.startswith("\\ ")


def _shown(line: str) -> str:
    """``line``, at a terminal without characters that it would obey."""
    return "\t".join(map(table.printable, line.split("\t"))) if sys.stdout.isatty() else line


def _show(lines: Iterable[str]) -> None:
    """Print ``lines``, byte for byte; at a terminal through a pager, as git does: $PAGER, or less."""
    encoded: Iterator[bytes] = (line.encode(errors="surrogateescape") + b"\n" for line in lines)
    first = next(encoded, None)  # what is refused is refused before there is a pager
    if first is None:
        return
    encoded = itertools.chain([first], encoded)
    pager = os.environ.get("PAGER", "less").strip()
    if not sys.stdout.isatty() or pager in ("", "cat"):
        sys.stdout.flush()
        for line in encoded:
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        return
    import shutil
    import subprocess

    if not shutil.which(pager.split()[0]):
        pager = "cat"
    environment = {"LESS": "FRX", **os.environ}
    paging = subprocess.Popen(pager, shell=True, stdin=subprocess.PIPE, env=environment)  # as git does
    assert paging.stdin is not None
    try:
        with paging.stdin as pipe:
            for line in encoded:
                pipe.write(line)
    except BrokenPipeError:  # the reader has seen enough
        pass
    finally:
        while True:
            try:
                paging.wait()
                break
            except KeyboardInterrupt:  # it is the pager's
                continue


VERBS = {
    "diff": Verb(
        "diff",
        "NAME [NAME] [PATH…]",
        (
            Option("patch", "as a patch, which git apply takes; of what is no text with --binary alone", short="-p"),
            Option("stat", "how many lines of each file"),
            Option("since", "against a checkpoint of the same workspace; 0: what it was before the first", "NUMBER|NAME"),
            Option("content", "leave out what was opened for writing, but holds what it held"),
            Option("binary", "a patch that has what is no text, too"),
            Option("color", "auto, always or never; auto heeds $NO_COLOR", "WHEN"),
            JSON,
        ),
        "Show what a snapshot changed against its parent: A added, C changed, D deleted.  Of two, of whatever kind, what\n"
        "makes the second of the first.  PATH… limits that to these paths, from the root of the snapshots on.\n"
        "The second word must be a snapshot, unless it begins with /: else a path goes after --.\n"
        "At a terminal $PAGER (less) shows it.  A patch has nothing of empty directories, owners, times and devices,\n"
        "nor of what is called .git: the names, without -p, tell of all that.",
        """
snapfs diff web
snapfs diff web | grep ^D
snapfs diff --patch web > web.patch
snapfs diff --stat v1 v2
snapfs diff -p --since 3 web /etc
snapfs diff v1 v2 -- etc/passwd
""",
        _diff,
    )
}
