"""All snapshots at once: the lines of .snapfs/snapshots (``snapfs/tree/listing.py`` says what is in them)."""

from __future__ import annotations

from snapfs.cli.place import key_of, unquoted
from snapfs.cli.refusal import refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from snapfs.cli.place import MountedTree


class Row:
    """One snapshot.  ``parent`` is None for none; times are seconds since the epoch; ``state`` is empty where all is well."""

    __slots__ = ("_created", "_found", "_labels", "_name", "_updated", "id", "inodes", "kind", "parent", "size", "state")

    def __init__(self, line: str) -> None:
        name, kind, parent, number, size, inodes, created, updated, state, labels = line.split("\t")
        self._name, self._labels, self._created, self._updated = name, labels, created, updated
        self._found: dict[str, str] | None = None
        self.kind = kind
        self.parent = None if parent == "." else key_of(parent)
        self.id = int(number)
        self.size = int(size)
        self.inodes = int(inodes)
        self.state = "" if state == "." else state

    @property
    def name(self) -> str:
        return key_of(self._name)

    @property
    def created(self) -> float:
        return float(self._created)

    @property
    def updated(self) -> float:
        return float(self._updated)

    @property
    def labels(self) -> dict[str, str]:
        if self._found is None:
            pairs = (item.partition("=") for item in self._labels.split(",")) if self._labels != "." else ()
            self._found = {unquoted(key): unquoted(value) for key, _, value in pairs}
        return self._found

    def shown(self) -> dict[str, object]:
        """For --json: as info.json says it."""
        from snapfs.model import rfc3339

        times = {key: rfc3339(_ns(text)) for key, text in (("created", self._created), ("updated", self._updated))}
        state = {"state": self.state} if self.state else {}
        usage = {"size": self.size, "inodes": self.inodes}
        own = {"name": self.name, "kind": self.kind, "id": self.id, "parent": self.parent, "labels": self.labels}
        return {**own, **times, **state, **usage}


def _ns(text: str) -> int:
    seconds, _, fraction = text.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction)


def rows(place: MountedTree) -> list[Row]:
    """All snapshots, in the order of their ids."""
    return [Row(line) for line in place.read(f"{place.path}/.snapfs/snapshots").split("\n")[:-1]]


def images(place: MountedTree) -> list[tuple[str, str | None]]:
    """All names in images/, each with the name of the snapshot that has it, None where that is damaged.  Raises Refusal."""
    import os

    path = f"{place.path}/images"
    try:
        held = place.within.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # an older daemon serves the tree
        return []
    except OSError as error:
        raise refusal(error, place.path, f"cannot list {path}") from None
    found: list[tuple[str, str | None]] = []
    try:
        for name in os.listdir(held):
            try:
                found.append((key_of(name), key_of(os.readlink(name, dir_fd=held).rpartition("/")[2])))
            except FileNotFoundError:  # it was taken away meanwhile
                pass
            except OSError:
                found.append((key_of(name), None))
    finally:
        os.close(held)
    return found


def children_first(wanted: Iterable[Row]) -> list[Row]:
    """``wanted`` in an order in which they can be removed: children before their parents."""
    chosen = {row.name: row for row in wanted}
    depth: dict[str, int] = {}
    for start in chosen.values():
        path: list[str] = []
        name: str | None = start.name
        while name in chosen and name not in depth and name not in path:
            path.append(name)
            name = chosen[name].parent
        for step in reversed(path):
            above = chosen[step].parent
            depth[step] = depth.get(above, 0) + 1 if above is not None else 1
    return sorted(chosen.values(), key=lambda row: (-depth[row.name], row.id))


def with_descendants(everything: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The snapshots ``names`` and all that stand on them."""
    below: dict[str | None, list[Row]] = {}
    known = {}
    for row in everything:
        below.setdefault(row.parent, []).append(row)
        known[row.name] = row
    found: dict[str, Row] = {}
    waiting = [known[name] for name in names if name in known]
    while waiting:
        row = waiting.pop()
        if row.name not in found:
            found[row.name] = row
            waiting += below.get(row.name, ())
    return list(found.values())
