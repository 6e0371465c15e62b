"""``snapfs adopt`` and ``snapfs release``: a directory becomes a base with a workspace on it, which may stand over it."""

from __future__ import annotations

import os

from snapfs.cli import table
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import MountedTree, find_tree
from snapfs.cli.refusal import NOT_FOUND, NOT_PERMITTED, Refusal
from snapfs.labels import OVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.kernel.mounttable import MountPoint


def _adopt(given: Given) -> int:
    from snapfs.cli.adopting import Adoption
    from snapfs.cli.cutoff import tidied
    from snapfs.cli.mount import mount_on, trusting
    from snapfs.cli.source import Source
    from snapfs.kernel import trusted
    from snapfs.labels import SOURCE, check_label
    from snapfs.names import word

    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("adopted")
    options, over = place.options(), given.has("over")
    with Source(given.arguments[0]) as source:
        source.refuse_misplaced(place, options)
        check_label(SOURCE, source.text)
        key = place.new_key(given.arguments[1], "active") if len(given.arguments) > 1 else source.key()
        adoption = Adoption(place, options, source, key)
        adoption.refuse_taken()
        if over and not options["window"]:  # before anything is copied
            with trusting(f'mount "{key}" on', source.path):
                trusted.find(source.path).__exit__(None, None, None)
        with tidied(), adoption.committed(move=given.has("move")):
            directory = adoption.made([(OVER, source.text)] if over else [])
        table.show_line(directory)
        if over and options["window"]:
            its = place.word_of(key)
            to_do = f"{place.command('shell', its)}, and {place.command('run', its)}, have it there"
            table.complain(f'"{key}" stands over {word(source.path)} for what you start in it: {to_do}')
        elif over:
            mount_on(place, key, source.path)
    return 0


def over_of(place: MountedTree, directory: str) -> str | None:
    """The directory over which the workspace at ``directory`` is to stand, None for none.  Raises Refusal."""
    path = f"{directory}/labels/{OVER}"
    if not place.within.exists(path):
        return None
    from snapfs.names import path_of_text

    return path_of_text(place.read(path).removesuffix("\n"))


def _release(given: Given) -> int:
    from snapfs.cli.mount import mounts_of, unmount

    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("unmounted")
    key = _meant(place, given.arguments[0])
    kind, directory = place.find(key)
    over = over_of(place, directory)
    if over is None or kind != "active":
        raise Refusal(f'"{key}" ({kind}) stands over no directory: nothing to release', NOT_FOUND)
    found: list[MountPoint] = []
    if not place.options()["window"]:
        found = [mount for mount in mounts_of(place, key) if mount.target == over]
    if not found and place.is_labelled_by_others(directory):
        its = place.word_of(key)
        to_do = f"{place.command('show', its)} tells where it is mounted, {place.command(f'label --delete {OVER}', its)} takes"
        words = f'that "{key}" stands over {over} says its label {OVER} alone, which others than you may write'
        raise Refusal(f"{words}: {to_do} that away", NOT_PERMITTED)
    for mount in found:
        unmount(mount)
    place.write_label(directory, OVER, "")
    its = place.word_of(key)
    if _is_moved(over):
        from snapfs.names import word

        files, there = word(f"{directory}/rootfs/."), word(f"{over}/")
        table.show_line(f'{over} is empty, as adopt --move has left it: "{key}" has all files, and brings none back by itself;')
        table.show_line(f"cp -a {files} {there} copies them there")
        return 0
    table.show_line(f'{over} is what it was; "{key}" stays, with its changes: {place.command("diff", its)} shows them,')
    table.show_line(f"{place.command('apply', its)} makes them there, {place.command('rm', its)} throws them away")
    return 0


def _is_moved(path: str) -> bool:
    """Whether nothing is in the directory ``path``, as far as this user may look."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def _meant(place: MountedTree, word: str) -> str:
    """The key of the workspace that ``word`` names, or that stands over the directory ``word``."""
    if place.is_directory(word):
        from snapfs.cli.listing import rows
        from snapfs.names import path_as_text

        text = path_as_text(os.path.realpath(word))
        found = [row.name for row in rows(place) if row.kind == "active" and row.labels.get(OVER) == text]
        if len(found) > 1:
            raise Refusal(f"several workspaces stand over {word}: say which: {', '.join(found)}")
        if found:
            return found[0]
        if "/" in word and place.key(word) == word:
            raise Refusal(f"no workspace stands over {word}: nothing to release", NOT_FOUND)
    return place.key(word)


VERBS = {
    "adopt": Verb(
        "adopt",
        "DIR [KEY]",
        (
            Option("move", "move the files into the base, and copy nothing; DIR stays, empty"),
            Option("over", "have the workspace at the path of DIR: root for everybody, others in snapfs shell and run"),
        ),
        "Make of the directory DIR the committed snapshot KEY@0, a copy of it, which shares blocks with it where the file\n"
        "system can, and on that the workspace KEY, and print its directory.  KEY is called as DIR is, unless you say how.\n"
        "DIR may be in use meanwhile: each file is as it was at one moment, and no name is missing.",
        """
snapfs adopt ~/site
snapfs adopt --over ~/site web
snapfs adopt --move /srv/data db
""",
        _adopt,
    ),
    "release": Verb(
        "release",
        "KEY|DIR",
        (),
        "Take away what adopt --over did: DIR is what it was, empty after --move, and the workspace stays, with its changes.",
        """
snapfs release ~/site
snapfs release web
""",
        _release,
    ),
}
