"""``snapfs versions`` and ``snapfs restore``: which checkpoints of a workspace hold which version of a path, and one put back.

A version is told by the layers, which the file ``compare`` of each checkpoint looks through.  It is put back by this process,
with the rights that its user has in the file systems of both, and by nothing in the tree.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.listing import Row, rows
from snapfs.cli.place import MountedTree, file_name, find_tree, key_of
from snapfs.cli.refusal import BUSY, FAILED, NOT_FOUND, NOT_PERMITTED, USAGE, Refusal, changed
from snapfs.cli.workspace import checkpoints

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS = {"A": "added", "D": "deleted"}


class _Version:
    """What ``held`` (the numbers of checkpoints, 0 for what was before the first) show at a path; ``now``: the workspace, too.
    ``change``: how it came about ("added", "changed", "deleted"), "" where it was there before the first; ``row``: the first
    checkpoint that has it, or what was before; None for the workspace itself."""

    def __init__(self, number: int | None, change: str, row: Row | None) -> None:
        self.held = [] if number is None else [number]
        self.now = number is None
        self.change = change
        self.row = row

    def words(self) -> str:
        """Which states show it: ``0``, ``3-5``, ``6-now``."""
        states = [*map(str, self.held), *["now"] * self.now]
        return states[0] if len(states) == 1 else f"{states[0]}-{states[-1]}"


def _versions(given: Given) -> int:
    place = find_tree(given.value("at"))
    if len(given.arguments) == 2:
        key, path = place.key(given.arguments[0]), _names(given.arguments[1])
    else:
        key, path = _located(place, given.arguments[0], "versions")
    found = _found(place, key, path)
    if given.has("json"):
        table.show_json([_shown(place, key, path, each) for each in found])
        return 0
    lines = [
        (
            each.words(),
            each.change or ".",
            table.printable(each.row.name) if each.row else "",
            table.format_age(each.row.created) if each.row else "",
            table.printable(each.row.labels.get("snapfs.message", "")) if each.row else "",
        )
        for each in found
    ]
    table.show_table(("CHECKPOINTS", "CHANGE", "SINCE", "AGE", "MESSAGE"), lines)
    return 0


def _shown(place: MountedTree, key: str, path: list[str], version: _Version) -> dict[str, object]:
    """For --json."""
    row = version.row.shown() if version.row else {}
    labels = version.row.labels if version.row else {}
    return {
        "workspace": key,
        "path": "/" + "/".join(path),
        "checkpoints": version.held,
        "now": version.now,
        "change": version.change or None,
        "name": row.get("name"),
        "created": row.get("created"),
        "message": labels.get("snapfs.message"),
    }


def _found(place: MountedTree, key: str, path: list[str]) -> list[_Version]:
    """The versions of ``path``, the oldest first.  Raises Refusal where there never was any."""
    everything = rows(place)
    kept = checkpoints(everything, key)
    _refuse_others(place, key)
    by_name = {row.name: row for row in everything}
    first = next(iter(kept.values()), by_name.get(key))
    before = by_name.get(first.parent or "") if first is not None else None
    found: list[_Version] = []
    said = [_Version(0, "", before)] if before is not None else []
    previous: Row | None = None
    states: list[tuple[int | None, Row | None]] = [*kept.items(), (None, None)]
    for number, row in states:
        directory = place.directory("active", key) if row is None else place.directory("committed", row.name)
        below = by_name[key].parent if row is None else row.parent
        change = _change(place, directory, previous, path)
        if change == "changed" and previous and below != previous.name:  # one of them is a copy, or was squashed
            change = _change(place, directory, previous, path, "content")
        if change:
            if not found and change != "added":
                found += said
            found.append(_Version(number, change, row))
        else:
            of = found or said
            if of and number is not None:
                of[-1].held.append(number)
            elif of:
                of[-1].now = True
        previous = row
    if not found and said and _is_there(place, key, path):
        found = said
    if not found:
        raise Refusal(f"{_words(path)} is in no checkpoint of {key}, nor in {key} itself", NOT_FOUND)
    return found


def _change(place: MountedTree, directory: str, previous: Row | None, path: list[str], *option: str) -> str:
    """How the snapshot in ``directory`` differs at ``path`` from ``previous`` (None: its parent), with this ``option`` of
    ``compare``: "" for not at all."""
    name = [f"committed/{file_name(previous.name)}"] if previous is not None else []
    lines = place.compared(directory, " ".join(["changes", *option, *name]), ["/".join(path)] if path else [])
    with contextlib.closing(lines) as said:  # type: ignore[type-var]
        line = next(said, "")
    own = line[2:].rstrip("/").count("/") == len(path)  # what is in a directory comes after it
    return line and (_WORDS.get(line[0], "changed") if own else "changed")


def _is_there(place: MountedTree, key: str, path: list[str]) -> bool:
    """Whether the workspace shows ``path``, as far as this user may look."""
    try:
        return os.path.lexists("/".join([place.rootfs("active", key), *path]))
    except Refusal:  # without rootfs nobody knows
        return True


def _refuse_others(place: MountedTree, key: str) -> None:
    kind = place.kind_of(key)
    if kind is None:
        raise place.missing(key)
    if kind != "active":
        raise Refusal(f'"{key}" is {kind}: a workspace is an active snapshot', NOT_FOUND)


def _names(path: str) -> list[str]:
    """The names on the way to ``path``, from the root of the workspace on."""
    return [name for name in os.path.normpath(f"/{path}").split("/") if name]


def _words(path: list[str]) -> str:
    from snapfs.names import printable

    return printable("/" + "/".join(path))


# -- where a path is


def _located(place: MountedTree, word: str, verb: str) -> tuple[str, list[str]]:
    """The workspace in whose files ``word``, a path of this process, is, and where in there.  Raises Refusal, which advises the
    ``verb``."""
    path = os.path.abspath(word)
    tree = os.path.realpath(place.path)
    for here in (place.path, tree):
        kind, _, rest = path.removeprefix(f"{here}/").partition("/")
        name, _, inside = rest.partition("/")
        if path.startswith(f"{here}/") and kind == "active" and inside.partition("/")[0] == "rootfs":
            return key_of(name), _names(inside.removeprefix("rootfs"))
    number, names = _layer(place, path)
    if number:
        with contextlib.suppress(OSError):
            found = place.within.unlinked(f"{place.path}/by-id/{number}", ["by-id"])
            return key_of(found.rpartition("/")[2]), names
    raise Refusal(
        f"{_words(_names(path))} is in no workspace of {place.path}: say which, and the path in it: snapfs {verb} KEY PATH",
        NOT_FOUND,
    )


def _layer(place: MountedTree, path: str) -> tuple[int, list[str]]:
    """The id of the snapshot in whose merged file system ``path`` is, and where in there; 0 for none."""
    from snapfs.kernel.mounttable import lines_of, parse

    options = place.options()
    root, window, process = options["root"], options["window"], "self"
    if window and path.startswith(f"{window}/"):
        path, process = path.removeprefix(window), str(options["pid"])
    else:
        above, name = os.path.split(path)
        path = f"{os.path.realpath(above).rstrip('/')}/{name}"
    inside = re.match(rf"{re.escape(root)}/rootfs/([1-9][0-9]*)/fs(?=/|\Z)", path)
    if inside:
        return int(inside[1]), _names(path[inside.end() :])
    with contextlib.suppress(OSError):
        mounts = [mount for mount in map(parse, lines_of(process)) if f"{path}/".startswith(f"{mount.target.rstrip('/')}/")]
        deepest = max(mounts, key=lambda mount: len(mount.target))  # the uppermost of those at one place is the last
        uppermost = [mount for mount in mounts if mount.target == deepest.target][-1]
        upper = [option for option in uppermost.super_options if option.startswith("upperdir=")]
        for text in upper or [uppermost.root]:
            its = re.search(rf"/{re.escape(os.path.basename(root))}/snapshots/([1-9][0-9]*)/fs\Z", text)
            if its:
                return int(its[1]), _names(path[len(uppermost.target.rstrip("/")) :])
    return 0, []


# -- one put back


def _restore(given: Given) -> int:
    from snapfs.cli.cutoff import tidied

    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("restored")
    key = place.key(given.arguments[0])
    _refuse_others(place, key)
    source = _source(place, key, given.value("from"))
    paths = [_inside(place, key, word) for word in given.arguments[1:]]
    for path in paths:
        if not path:
            raise Refusal(f"give paths in {key}: {place.command('rollback', place.word_of(key))} puts all of it back", USAGE)
    options = place.options()
    its = place.word_of(key)  # before the tree is out of sight
    with tidied(), _opened(place, key, source, options) as (before, now, where):
        for path in paths:
            _refuse_mounts(where, path)
            _put_back(place, its, source, path, before, now, flush=options["options"]["sync"] != "none")
            table.show_line(f"{_words(path)} is as in {source}")
    return 0


def _inside(place: MountedTree, key: str, word: str) -> list[str]:
    """Where in workspace ``key`` the path ``word`` is: from its root on, but from the working directory on if it begins with a
    dot, and where it leads into the workspace as this process sees it."""
    if word.startswith(("./", "../")) or word in (".", "..") or word.startswith(f"{place.path}/"):
        found, path = _located(place, word, "restore")
        if found != key:
            raise Refusal(f'{_words(_names(word))} is in "{found}", and not in "{key}"', USAGE)
        return path
    return _names(word)


def _source(place: MountedTree, key: str, word: str | None) -> str:
    """The name of the committed snapshot from which it is put back: checkpoint number ``word``, or one with this name; the last
    one.  Raises Refusal."""
    everything = rows(place)
    kept = checkpoints(everything, key)
    if word is None:
        word = str(max(kept, default=0))
    if not (word.isascii() and word.isdecimal()):
        name = place.key(word)
        kind = place.kind_of(name)
        if kind != "committed":
            raise place.missing(name) if kind is None else Refusal(f'"{name}" is {kind}, and no checkpoint', NOT_FOUND)
        return name
    if int(word) in kept:
        return kept[int(word)].name
    if int(word) == 0:
        first = next(iter(kept.values()), None) or next(row for row in everything if row.name == key)
        if first.parent is not None:
            return first.parent
        raise Refusal(f'"{key}" began empty, and has no checkpoint from which something could be put back', NOT_FOUND)
    to_do = place.command("checkpoint --list", place.word_of(key))
    raise Refusal(f'"{key}" has no checkpoint {word}: {to_do} tells which there are', NOT_FOUND)


@contextlib.contextmanager
def _opened(place: MountedTree, key: str, source: str, options: dict[str, object]) -> Iterator[tuple[int, int, str]]:
    """For a block: the files of the snapshot ``source`` and those of the workspace, open, and where the latter are.  Neither
    can be unmounted, nor the workspace be kept or rolled back, until they are closed.  Raises Refusal."""
    from snapfs.cli.mount import enter
    from snapfs.kernel import inside, mounttable
    from snapfs.scan import restoring  # noqa: F401, for what may stand at its place in the daemon's namespace

    window = str(options["window"])
    links = [(kind, name, place.rootfs(kind, name)) for kind, name in (("committed", source), ("active", key))]
    if window:
        if any(not target.startswith(f"{window}/") for _, _, target in links):
            raise Refusal("from inside of a workspace no other snapshot is to be seen: leave it first, or use another shell")
        enter(place, dict(options))
    opened: list[int] = []
    try:
        for kind, name, target in links:
            path = target.removeprefix(window)
            opened.append(os.open(path, inside.FLAGS))
            is_mounted = mounttable.mount_id(os.path.dirname(path)) != mounttable.mount_id_of(opened[-1])
            if not is_mounted or not _leads(place, kind, name, path):
                raise changed(name)
            opened.append(inside.open_top(path))  # whose servers of what is mounted in there are not asked
            if not os.path.sameopenfile(*opened[-2:]):
                raise changed(name)
        yield opened[1], opened[3], path
    except FileNotFoundError:
        raise changed(key) from None
    except PermissionError:
        to_do = "run it as root" if not window and os.geteuid() != 0 else "see who may enter ROOT"
        raise Refusal(f"cannot enter the files of {key}: {os.strerror(errno.EACCES)}: {to_do}", NOT_PERMITTED) from None
    finally:
        for fd in opened:
            os.close(fd)


def _refuse_mounts(where: str, path: list[str]) -> None:
    """Raise Refusal where something is mounted in what is to be put back, or above it, in the workspace at ``where``: what is
    beneath is not what anybody sees."""
    from snapfs.kernel.mounttable import mount_table
    from snapfs.names import word

    wanted = "/".join([where, *path])
    for mount in mount_table():
        is_inside = mount.target.startswith(f"{wanted}/") or f"{wanted}/".startswith(f"{mount.target}/")
        if is_inside and mount.target.startswith(f"{where}/"):
            raise Refusal(
                f"cannot put {_words(path)} back: something is mounted on {mount.target}: unmount that first: "
                f"umount {word(mount.target)}",
                BUSY,
            )


def _leads(place: MountedTree, kind: str, name: str, path: str) -> bool:
    """Whether the link rootfs of the snapshot still leads to ``path``."""
    try:
        return place.within.readlink(f"{place.directory(kind, name)}/rootfs").endswith(path)
    except OSError:
        return False


def _put_back(place: MountedTree, its: str, source: str, path: list[str], before: int, now: int, *, flush: bool) -> None:
    """Put ``path`` of the workspace that ``its`` names in a command back.  Raises Refusal."""
    from snapfs.scan.restoring import NotRestored, restore

    words = _words(path)
    try:
        restore(before, now, path, flush=flush)
    except NotRestored as error:
        raise Refusal(f"cannot put {words} back: {error}") from None
    except RecursionError:
        raise Refusal(f"cannot put {words} back: directories are too deep in each other") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == words:
            advice = f"{place.command('versions', its, words)} tells which checkpoints have it, and rm removes it"
            raise Refusal(f"{words} is not in {source}, so there is nothing to put back: {advice}", NOT_FOUND) from None
        about = f"{error.filename}: " if error.filename and error.filename != words else ""
        status = NOT_PERMITTED if isinstance(error, PermissionError) else FAILED
        why = os.strerror(error.errno or errno.EIO)
        if error.errno in (errno.EINVAL, errno.EOVERFLOW):  # the kernel's word for ids that are not mapped
            why = "it has an owner, or in its ACL a user, who is not known where the daemon mounts: rollback puts all back"
        raise Refusal(f"cannot put {words} back, nothing of it was changed: {about}{why}", status) from None


VERBS = {
    "versions": Verb(
        "versions",
        "KEY|PATH [PATH]",
        (JSON,),
        "Show which checkpoints of a workspace hold which version of a file or directory, the oldest first: 0 is what was\n"
        "before the first, now is the workspace itself.  PATH alone is one where the workspace is mounted (rootfs, snapfs\n"
        "mount, snapfs shell); after KEY it is one from the root of the workspace on.\n"
        "A version begins where a layer has the path: changed is also what was only opened for writing, or has another mode.",
        """
snapfs versions /snap/active/web/rootfs/etc/app.conf
snapfs versions web etc/app.conf
""",
        _versions,
    ),
    "restore": Verb(
        "restore",
        "KEY PATH…",
        (Option("from", "as it was at this checkpoint; 0: before the first (default: the last one)", "NUMBER|NAME"),),
        "Put files and directories of workspace KEY back as they were at a checkpoint, with owner, mode, times, attributes\n"
        "and links, also while it is in use.  PATH is from the root of the workspace on; ./PATH from where you stand.\n"
        "Each PATH is put back whole, or not at all; what was not in a directory then goes.  A PATH that the checkpoint does\n"
        "not have is refused, and not deleted.",
        """
snapfs restore web etc/app.conf
snapfs restore web --from 3 etc/app.conf src
""",
        _restore,
    ),
}
