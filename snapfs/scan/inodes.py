"""Sets of inode numbers, and numbers by inode, small where inodes lie close together, as a file system gives them out."""

from __future__ import annotations

from array import array
from typing import Literal

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

    def update(self, others: Inodes) -> None:
        """Put all ``others`` in."""
        for row, bits in others._rows.items():
            self._rows[row] = self._rows.get(row, 0) | bits

    def __contains__(self, number: int) -> bool:
        return bool(self._rows.get(number >> _BITS, 0) >> (number & _MASK) & 1)

    def __bool__(self) -> bool:
        return bool(self._rows)


class Numbered:
    """A number from 0 on for each of some inodes; ``kind`` says how large (``array``).  A million that were made one after the
    other take 6 MiB, or 10 ("Q"); that many of which each is far from all others, some 400, or 700."""

    __slots__ = ("_kind", "_rows")

    def __init__(self, kind: Literal["I", "Q"] = "I") -> None:
        self._kind = kind
        self._rows: dict[int, array[int]] = {}

    def get(self, inode: int) -> int | None:
        """The number of ``inode``, None where it has none."""
        row = self._rows.get(inode >> _BITS)
        return row[inode & _MASK] - 1 if row is not None and row[inode & _MASK] else None

    def put(self, inode: int, number: int) -> None:
        """Give ``inode`` a number."""
        row = self._rows.get(inode >> _BITS)
        if row is None:
            row = self._rows[inode >> _BITS] = array(self._kind, [0]) * (_MASK + 1)
        row[inode & _MASK] = number + 1
