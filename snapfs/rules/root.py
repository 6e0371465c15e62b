"""The root whose snapshots the rules speak of: all that they know of it besides its records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from snapfs.kernel import cached
from snapfs.model import Kind
from snapfs.options import Options
from snapfs.root.inuse import InUse
from snapfs.root.layers import Layers
from snapfs.root.mounted import Mounted
from snapfs.root.placing import Placing
from snapfs.root.unflushed import Unflushed
from snapfs.scan.marks import PREFIX

_FEW = 50  # layers that are looked at without a thread, if that takes no disk: a microsecond or two each


def overlay_prefix(options: Sequence[str]) -> str:
    """``Root.overlay_prefix`` of overlays that are mounted with ``options``."""
    return "user.overlay." if "userxattr" in options else PREFIX


@dataclass(eq=False)
class Root:
    """One root while it is open.

    ``fd`` is open on ROOT/snapshots.  ``overlay_options`` are those of every overlay mount.  ``maps_ids``: labels that map ids
    become options of the mounts.  ``damaged`` are the ids of the snapshots whose directory was missing at the start, to be
    looked at again before use.  ``agrees``: each directory bears what its record says, as far as this process can tell.
    ``abandoned``: it is not to be used after all, so that nothing is to be left of it if it is new.
    """

    options: Options
    layers: Layers
    fd: int
    placing: Placing
    mounted: Mounted
    in_use: InUse
    unflushed: Unflushed
    overlay_options: tuple[str, ...]
    maps_ids: bool
    damaged: set[int]
    agrees: bool
    abandoned: bool = False

    @property
    def overlay_prefix(self) -> str:
        """What the names of overlays' own extended attributes begin with here (``scan/marks.py``)."""
        return overlay_prefix(self.overlay_options)

    @property
    def shifts_owners(self) -> bool:
        """Whether other mapping labels of an active snapshot mean other owners of all files in its layer."""
        return self.options.remap_ids and self.options.slow_chown and not self.maps_ids

    def refuse_damaged(self, *numbers: int) -> None:
        """Raise Damaged if the directory of one of these snapshots was missing at the start, and still is."""
        for number in numbers:
            if number in self.damaged:
                self.layers.refuse_damaged(number)
                self.damaged.discard(number)  # it was put back

    def forget(self, number: int) -> None:
        """Snapshot ``number`` is removed."""
        self.damaged.discard(number)
        self.unflushed.lost.discard(number)

    def has_at_hand(self, number: int, kind: Kind, chain: Sequence[int]) -> bool:
        """Whether the directories of snapshot ``number`` and its chain are all there, as far as that takes no disk to tell."""
        parts = [f"{layer}/fs" for layer in (number, *chain)] + [f"{number}/work"] * (kind is Kind.ACTIVE)
        return len(chain) < _FEW and all(cached.is_directory(self.fd, part) for part in parts)

    def refuse_missing(self, number: int, kind: Kind, chain: Sequence[int]) -> None:
        """Raise Damaged where one of these directories is not there.  May wait for the disk."""
        self.layers.refuse_damaged(number, kind)
        for layer in chain:
            self.layers.refuse_damaged(layer)

    def close(self) -> None:
        """Let go of the root; its records are closed by then."""
        self.mounted.close()
        self.in_use.close()
        os.close(self.fd)
        if self.abandoned:
            self.layers.unmake()
        else:
            self.layers.close()
