"""Sets of inode numbers, which take little memory where the numbers lie close together, as a file system gives them out."""

from __future__ import annotations

_BITS = 6
_MASK = (1 << _BITS) - 1


class Inodes:
    """A set of inode numbers: of each 64 in a row one number has the bits of those that are in it.

    A million inodes that were made one after the other take 3 MiB; that many of which each is far from all others, some 100.
    """

    __slots__ = ("_rows",)

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def add(self, number: int) -> bool:
        """Put ``number`` in; False where it was there."""
        row, bit = number >> _BITS, 1 << (number & _MASK)
        bits = self._rows.get(row, 0)
        if bits & bit:
            return False
        self._rows[row] = bits | bit
        return True

    def __contains__(self, number: int) -> bool:
        return bool(self._rows.get(number >> _BITS, 0) & 1 << (number & _MASK))
