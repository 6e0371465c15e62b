"""What a run of tests has, with pytest or without: how copies are made and why so, the bases, and the place of them all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from snapfs.testing import copying, entering
from snapfs.testing.bases import Bases, Source
from snapfs.testing.making import Copy, How
from snapfs.testing.place import Place

Wish = Literal["auto", "overlay", "reflink", "copy"]

CACHE_LIMIT = 5 << 30


class Session:
    """``wish`` names the best way that may be taken; what isn't possible here becomes the next one.  ``run`` is the name of the
    run where several processes have a part in it."""

    def __init__(self, wish: Wish = "auto", *, run: str = "", cache: str | None = None, limit: int = CACHE_LIMIT) -> None:
        self._wish = wish
        self._run = run
        self._cache = cache
        self._limit = limit
        self._opened: tuple[Place, Bases] | None = None
        self.how: How | None = None
        self.why = ""
        self.used = False

    def decide(self) -> None:
        """Find out how copies are made, and enter a namespace for it if need be.  Raises OSError."""
        if self.how is not None:
            return
        place = self._open()[0]
        why = []
        if self._wish in ("auto", "overlay"):
            trial = place.new()
            try:
                entering.enter(trial)
            except entering.Refused as refusal:
                why.append(f"no overlay, for {refusal}")
            else:
                self.how = "overlay"
                self.why = "in a user namespace of these tests" if entering.is_user_namespace() else ""
            finally:
                copying.remove_tree(trial)
        if self.how is None and self._wish != "copy":
            if copying.can_clone(place.path):
                self.how = "reflink"
            else:
                why.append(
                    f"no reflinks, for {os.path.dirname(place.path)} is on a file system without; xfs and btrfs have them"
                )
        if self.how is None:
            self.how = "copy"
        if why or self._wish in ("reflink", "copy"):
            self.why = "; ".join(why) or "as was asked for"

    def told(self) -> str:
        """How copies are made, and why so, in a line."""
        ways = {"overlay": "overlays", "reflink": "whole copies by reflinks", "copy": "whole copies"}
        return f"copies are {ways[self.how or 'copy']}" + (f" ({self.why})" if self.why else "")

    def snapshot_of(self, source: Source, depends: Iterable[str | os.PathLike[str]] = ()) -> Path:
        """The base that ``source`` makes; raises what ``source`` raises, and OSError."""
        self.decide()
        self.used = True
        return self._open()[1].get(source, depends)

    def copy_of(self, base: Source) -> Copy:
        """A copy of a base, or of what shall be one.  Raises OSError."""
        self.decide()
        place, bases = self._open()
        made = base if isinstance(base, Path) and bases.is_one(base) else self.snapshot_of(base)
        assert self.how is not None
        return Copy(place, made, self.how)

    def close(self) -> None:
        """Remove all that it has made, but for the cache."""
        if self._opened is not None:
            place, bases = self._opened
            self._opened = None
            bases.close()
            with contextlib.suppress(OSError):
                place.close()

    def _open(self) -> tuple[Place, Bases]:
        if self._opened is None:
            place = Place(self._run, shared=bool(self._run))
            try:
                self._opened = place, Bases(place.bases, self._cache, self._limit)
            except BaseException:
                place.close()
                raise
        return self._opened
