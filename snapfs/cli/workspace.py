"""``snapfs checkpoint``, ``rollback`` and ``fork``: the state of a workspace, an active snapshot that keeps its path.

Each writes one line into a file of the tree, which does all of it or nothing (``tree/commands.py``).
"""

from __future__ import annotations

import os

from snapfs.cli import table
from snapfs.cli.commanding import SYNC, commanded, persistently
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import file_name, find_tree, key_of
from snapfs.cli.refusal import BUSY, NOT_FOUND, NOT_PERMITTED, TAKEN, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from snapfs.cli.listing import Row
    from snapfs.cli.place import MountedTree

SHOWN = 0.2  # seconds between two looks at how far a copy is


def checkpoints(everything: list[Row], key: str) -> dict[int, Row]:
    """The checkpoints of workspace ``key`` by number."""
    from snapfs.cli import keeping
    from snapfs.labels import NUMBER

    newest_first = keeping.checkpoints(everything, [key]).get(key, [])
    return {int(row.labels[NUMBER]): row for row in reversed(newest_first)}


def _kept(place: MountedTree, key: str, message: str, held: int | None = None) -> str:
    return commanded(place, "active", key, "checkpoint", message, f'keep the state of "{key}"', held=held)


def _copied(place: MountedTree, key: str, message: str) -> str:
    """Keep a copy of the workspace ``key``, while it is in use; on a terminal, tell how far that is."""
    import contextlib
    import json
    import threading

    from snapfs.cli.progress import Progress

    progress, done = Progress(), threading.Event()

    def show() -> None:
        while not done.wait(SHOWN):
            with contextlib.suppress(Refusal, ValueError, KeyError):
                number = json.loads(place.read(f"{place.directory('active', key)}/info.json"))["id"]
                for copy in json.loads(place.read(f"{place.path}/.snapfs/stats.json"))["copies"]:
                    if copy["id"] == number:
                        progress.show_count("copying", copy["files"], copy["bytes"])

    teller = threading.Thread(target=show, daemon=True)
    if progress.is_shown:
        teller.start()
    try:
        return commanded(
            place, "active", key, "checkpoint", f"copy:{message}", f'keep a copy of "{key}"', lambda call, *paths: call(*paths)
        )
    finally:
        done.set()
        if progress.is_shown:
            teller.join()
        progress.clear()


def _checkpoint(given: Given) -> int:
    place = find_tree(given.value("at"), changes=not given.has("list"))
    key = place.key(given.arguments[0])
    if given.has("list"):
        return _list(place, key, as_json=given.has("json"))
    name = (_copied if given.has("copy") else _kept)(place, key, given.value("message") or "")
    if given.has("sync"):
        place.do("wait for the disk", SYNC, persistently, place.within.sync, place.directory("committed", name))
    table.show_line(name)
    return 0


def _list(place: MountedTree, key: str, *, as_json: bool) -> int:
    from snapfs.cli.listing import rows
    from snapfs.labels import MESSAGE, OF, SQUASHED

    everything = rows(place)
    found = checkpoints(everything, key)
    if not found and place.kind_of(key) is None:
        raise place.missing(key)
    squashes = {row.labels[SQUASHED]: row.name for row in everything if row.labels.get(OF) == key and SQUASHED in row.labels}
    if as_json:
        table.show_json([{"checkpoint": n, **row.shown(), "squash": squashes.get(row.name)} for n, row in found.items()])
        return 0
    lines = [
        (
            str(n),
            table.printable(row.name),
            table.format_size(row.size),
            table.format_age(row.created),
            table.printable(squashes.get(row.name, "")),
            table.printable(row.labels.get(MESSAGE, "")),
        )
        for n, row in found.items()
    ]
    table.show_table(("NUMBER", "NAME", "SIZE", "AGE", "SQUASH", "MESSAGE"), lines, right_aligned=(0, 2, 3))
    return 0


def _rollback(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    key, to = place.key(given.arguments[0]), given.arguments[1] if len(given.arguments) > 1 else ""
    if to and not to.isdecimal():
        to = f"committed/{file_name(place.key(to))}"

    def do(act: Callable[[], str]) -> str:
        if not given.has("kill"):
            return act()
        from snapfs.cli.ending import once_empty

        return once_empty(place, key, act)

    held = None
    try:
        if given.has("keep"):
            if place.kind_of(key) == "active":  # else the sentence is that of the checkpoint
                _refuse_in_vain(place, key, to)
                held = place.hold("active", key)  # what is rolled back is what was kept, whoever gets the key meanwhile
            to = to or ("0" if held is None else _parent(held))
            why = f"before it was rolled back to {to.removeprefix('committed/')}"
            kept = do(lambda: _kept(place, key, why, held))
            table.show_line(f"kept as {kept}")
        parent = do(lambda: commanded(place, "active", key, "rollback", to, f'roll "{key}" back', held=held))
    except Refusal as refused:
        if refused.status != BUSY:
            raise
        raise _in_use(place, key, given, refused) from None
    table.show_line(f"{key} is as {parent or 'an empty one'}")
    return 0


def _refuse_in_vain(place: MountedTree, key: str, to: str) -> None:
    """Before there is a checkpoint: raise Refusal where the workspace ``key`` is pinned, or was never as ``to`` (as the file
    rollback takes it; empty for what the workspace stands on)."""
    from snapfs.cli.listing import rows
    from snapfs.labels import OF, PIN, SQUASHED, no_checkpoint, pinned

    everything = {row.name: row for row in rows(place)} if to else {}
    own = everything.get(key)
    if place.within.exists(f"{place.directory('active', key)}/labels/{PIN}"):
        raise Refusal(str(pinned(key, own.id if own else 0)), NOT_PERMITTED)
    if not to or own is None:
        return
    if to.isdecimal():
        if to.lstrip("0") not in ("", *map(str, checkpoints(list(everything.values()), key))):
            raise Refusal(str(no_checkpoint(key, to, own.id)), NOT_FOUND)
        return
    name, below, waiting = key_of(to.removeprefix("committed/")), set[str](), [own.parent]
    while waiting:  # and what the squashes stand in for
        row = everything.get(waiting.pop() or "")
        if row is not None and row.kind == "committed" and row.name not in below:
            below.add(row.name)
            waiting += [row.parent, row.labels.get(SQUASHED)]
    if name not in below and (name not in everything or everything[name].labels.get(OF) != key):
        raise Refusal(str(no_checkpoint(key, f'"{name}"', own.id)), NOT_FOUND)


def _in_use(place: MountedTree, key: str, given: Given, refused: Refusal) -> Refusal:
    """What ``refused`` says, that the workspace ``key`` is in use, and what can be done about that but for what was ``given``
    already."""
    elsewhere = place.mounted_by_hand(place.directory("active", key))
    if elsewhere:
        import json

        from snapfs.cli.mount import how_to_unmount

        number = json.loads(place.read(f"{place.directory('active', key)}/info.json"))["id"]
        to_do = how_to_unmount(place, place.word_for(key, number), elsewhere[0])
        return Refusal(f'"{key}" is mounted on {elsewhere[0]}: {to_do}', BUSY)
    from snapfs.errors import Busy

    by_whom, _, way = str(refused).rpartition("; ")
    if not way.startswith((Busy.KEEP, Busy.END)):
        return refused
    if given.has("kill"):
        return Refusal(f"{by_whom}; --kill ends only what snapfs run and snapfs shell have started in it", BUSY)
    if given.has("keep"):
        word = way.removeprefix(Busy.KEEP).removeprefix(Busy.END)
        return Refusal(f"{by_whom}; {Busy.END.replace('--kill', '--keep --kill')}{word}", BUSY)
    return refused


def _parent(held: int) -> str:
    """What the workspace whose directory is open as ``held`` stands on, as ``rollback`` takes it: the path of a snapshot, or
    0."""
    try:
        return f"committed/{os.path.basename(os.readlink('parent', dir_fd=held))}"
    except OSError:
        return "0"


def _fork(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    source, key = place.key(given.arguments[0]), place.new_key(given.arguments[1], "active")
    if place.kind_of(source) == "committed":
        from snapfs.cli.prepare import make

        table.show_line(make(place, "active", key, source))
        return 0
    try:
        commanded(place, "active", source, "fork", file_name(key), f'make "{key}"')
    except Refusal as refused:
        if refused.status == TAKEN:
            raise Refusal(f'snapshot "{key}" already exists ({place.kind_of(key)})', TAKEN) from None
        raise
    table.show_line(place.directory("active", key))
    return 0


VERBS = {
    "checkpoint": Verb(
        "checkpoint",
        "KEY",
        (
            Option("message", "why, in words; where they begin with copy: it is as with --copy", "TEXT", short="-m"),
            Option("list", "list the checkpoints there are", short="-l"),
            Option(
                "copy", "keep a copy, while the workspace is in use: each file as it is at one moment, as after a power cut"
            ),
            Option("sync", "return when it is on disk"),
            JSON,
        ),
        "Keep the state of workspace KEY as the committed snapshot KEY@NUMBER, and go on where you were: same key, same path.\n"
        "Nobody may be in its rootfs meanwhile, unless you --copy it.",
        """
snapfs checkpoint web -m "before the upgrade"
snapfs checkpoint --copy web -m "before make install"
snapfs checkpoint --list web
""",
        _checkpoint,
    ),
    "rollback": Verb(
        "rollback",
        "KEY [NUMBER|NAME]",
        (
            Option("keep", "make a checkpoint of the present state first"),
            Option("kill", "end what snapfs run and snapfs shell have started in it first"),
        ),
        "Put workspace KEY back to what it stands on: its last checkpoint, or what it was prepared on.  Or to checkpoint\n"
        "NUMBER, or that with this NAME; 0 is what it was before the first.  What changed since is gone, unless you --keep it.",
        """
snapfs rollback web
snapfs rollback --keep web 2
""",
        _rollback,
    ),
    "fork": Verb(
        "fork",
        "SOURCE KEY",
        (),
        "Make the active snapshot KEY as a copy of SOURCE: on it, if it is committed; else by a checkpoint on which\n"
        "both go on.",
        """
snapfs fork v1 experiment
snapfs fork web web-2
""",
        _fork,
    ),
}
