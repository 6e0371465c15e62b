"""What must be there of one client's own snapshots: its model of what it has made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from snapfs.model import Kind
from tests.soak.client import Client, file_name

BASE = "base"
BASE_FILES = {"f0": b"base 0\n", "f1": b"base 1\n" * 100, "f9": b"base 9\n"}

_COMMON = {"info.json", "usage.json", "labels", "rootfs", "compare"}
ENTRIES = {
    Kind.ACTIVE: _COMMON
    | {"mounts.json", "mount.sh", "changes", "changes.patch", "diff", "checkpoint", "rollback", "fork", "history"},
    Kind.VIEW: _COMMON | {"mounts.json", "mount.sh"},
    Kind.COMMITTED: _COMMON | {"changes", "changes.patch", "layer.tar", "diff", "squash", "dissolve", *map(str, Kind)},
}


@dataclass
class Snapshot:
    """One snapshot.  ``layer``: its own files, None for a whiteout; ``hidden``: entries that were unlinked, and ``unlinked``:
    begin and end of the last time; ``followed``: whether its rootfs was entered; ``refused``: begin and end of the last refusal
    to delete a part of it."""

    key: str
    kind: Kind
    number: int
    parent: str | None
    labels: dict[str, str] = field(default_factory=dict)
    layer: dict[str, bytes | None] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    unlinked: tuple[float, float] = (-1e9, -1e9)
    followed: bool = False
    refused: tuple[float, float] = (-1e9, -1e9)

    @property
    def path(self) -> str:
        return f"{self.kind}/{file_name(self.key)}"

    def hide(self, name: str, unlink: Callable[[], object]) -> None:
        """Unlink its entry ``name``."""
        began = time.monotonic()
        unlink()
        self.hidden.add(name)
        self.unlinked = began, time.monotonic()

    def label(self, label: str) -> str:
        """The path of one of its labels."""
        return f"{self.path}/labels/{file_name(label)}"

    def inside(self, parent: str) -> str:
        """Where it stands in its parent's listing."""
        return inside(parent, self.path)


def inside(parent: str, path: str) -> str:
    """``path`` below the committed snapshot ``parent`` instead of the root."""
    return f"committed/{file_name(parent)}/{path}"


class Model:
    """The snapshots of one client by key, beside the one that is always there."""

    def __init__(self, client: Client, base: int) -> None:
        self.client = client
        self.pick = client.pick
        self.prefix = f"p{client.number}"
        self.keys = [*(f"{self.prefix}.{n}" for n in range(6)), *(f"{self.prefix}/é {n}%" for n in range(4))]
        self.snapshots: dict[str, Snapshot] = {}
        self.base = Snapshot(BASE, Kind.COMMITTED, base, None, layer=dict(BASE_FILES))

    def find(self, key: str | None) -> Snapshot | None:
        return self.base if key == BASE else self.snapshots.get(key or "")

    def children(self, key: str) -> list[Snapshot]:
        return [its for its in self.snapshots.values() if its.parent == key]

    def chain(self, its: Snapshot) -> list[Snapshot]:
        """Its parents, the nearest first."""
        found: list[Snapshot] = []
        above = self.find(its.parent)
        while above is not None:
            found.append(above)
            above = self.find(above.parent)
        return found

    def merged(self, its: Snapshot) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for layer in reversed([its, *self.chain(its)]):
            for name, content in layer.layer.items():
                if content is None:
                    files.pop(name, None)
                else:
                    files[name] = content
        return files

    def some(self, *kinds: Kind, without: str = "") -> Snapshot | None:
        """One of its snapshots of these kinds, whose entry ``without`` was not unlinked."""
        fitting = [its for its in self.snapshots.values() if its.kind in (kinds or Kind) and without not in its.hidden]
        return self.pick.choice(fitting) if fitting else None

    def some_key(self, *kinds: Kind) -> str:
        """Mostly that of such a snapshot."""
        its = self.some(*kinds)
        return its.key if its is not None and self.pick.random() < 0.85 else self.pick.choice(self.keys)

    def some_parent(self) -> str | None:
        chance = self.pick.random()
        if chance < 0.3:
            return None
        if chance < 0.45:
            return BASE
        return self.some_key(Kind.COMMITTED)

    def some_kind(self, key: str) -> Kind:
        """Mostly that of the snapshot with that key."""
        its = self.snapshots.get(key)
        return its.kind if its is not None and self.pick.random() < 0.9 else self.pick.choice(list(Kind))

    def is_committed(self, key: str) -> bool:
        its = self.find(key)
        return its is not None and its.kind is Kind.COMMITTED

    @contextmanager
    def perhaps_held(self, its: Snapshot | None) -> Iterator[bool]:
        """Sometimes with a descriptor in its rootfs, which keeps it from being committed or removed."""
        with ExitStack() as stack:
            held = its is not None and "rootfs" not in its.hidden and self.pick.random() < 0.15
            if held and its is not None:
                stack.enter_context(self.followed(its))
            yield held

    @contextmanager
    def followed(self, its: Snapshot) -> Iterator[int]:
        with self.client.followed(f"{its.path}/rootfs") as directory:
            its.followed = True
            yield directory
