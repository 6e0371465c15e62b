"""How much may come out of an import: archives may have been made to fill a disk."""

from __future__ import annotations

from snapfs.images.unfit import Unfit

_SHORTEST = 64 << 20  # bytes of which it does not matter how much larger than packed they are


class Limits:
    """Bytes and entries of all layers, and how many times as large as it is packed an archive may be.  0: as much as there
    is.  ``spent`` are the bytes that are on a disk before the layers are: fetched, or unpacked from the image's archive; they
    count, too."""

    def __init__(self, size: int, files: int, ratio: int) -> None:
        self.size = size
        self.files = files
        self.ratio = ratio
        self.spent = 0

    def spend(self, size: int, what: str) -> None:
        """Note that ``spent`` is this; raise Unfit where it is too much, ``what`` takes it."""
        self.spent = 0
        self.refuse_size(size, what)
        self.spent = size

    def refuse_size(self, size: int, what: str = "unpacked it takes") -> None:
        """Raise Unfit where ``size`` bytes more than are spent are too many, ``what`` takes them."""
        if self.size and self.spent + size > self.size:
            before = f" with the {self.spent} that it has taken before" * bool(self.spent)
            raise Unfit(f"{what} more than {self.size} bytes{before}, as many as --max-size allows")

    def refuse_files(self, files: int) -> None:
        if self.files and files > self.files:
            raise Unfit(f"it has more than {self.files} files, as many as --max-files allows")

    def refuse_bomb(self, unpacked: int, packed: int) -> None:
        """Raise Unfit where ``unpacked`` bytes are too many, or too many for the ``packed`` ones that they come from."""
        self.refuse_size(unpacked)
        if self.ratio and unpacked > _SHORTEST and unpacked > self.ratio * packed:
            words = f"unpacked it takes more than {self.ratio} times what it takes packed ({packed} bytes)"
            raise Unfit(f"{words}, as many as --max-ratio allows")
