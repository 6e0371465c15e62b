"""How much may come out of an import: archives may have been made to fill a disk."""

from __future__ import annotations

from typing import NamedTuple

from snapfs.images.unfit import Unfit

_SHORTEST = 64 << 20  # bytes of which it does not matter how much larger than packed they are


class Limits(NamedTuple):
    """Bytes and entries of all layers, and how many times as large as it is packed an archive may be.  0: as much as there
    is."""

    size: int
    files: int
    ratio: int

    def refuse_size(self, size: int, what: str = "unpacked it takes") -> None:
        """Raise Unfit where ``size`` bytes are too many, ``what`` takes them."""
        if self.size and size > self.size:
            raise Unfit(f"{what} more than {self.size} bytes, as many as --max-size allows")

    def refuse_files(self, files: int) -> None:
        if self.files and files > self.files:
            raise Unfit(f"it has more than {self.files} files, as many as --max-files allows")

    def refuse_bomb(self, unpacked: int, packed: int) -> None:
        """Raise Unfit where ``unpacked`` bytes are too many, or too many for the ``packed`` ones that they come from."""
        self.refuse_size(unpacked)
        if self.ratio and unpacked > _SHORTEST and unpacked > self.ratio * packed:
            words = f"unpacked it takes more than {self.ratio} times what it takes packed ({packed} bytes)"
            raise Unfit(f"{words}, as many as --max-ratio allows")
