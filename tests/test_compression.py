"""What is packed by gzip, unpacked in pieces."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from random import Random
from typing import Any

import pytest

from snapfs.images import compression


class Handed:
    """A library of gzip that counts how many bytes it is given, those that it gives back again too."""

    error = zlib.error

    def __init__(self) -> None:
        self.bytes = 0

    def decompressobj(self, how: int) -> Any:
        library, member = self, zlib.decompressobj(how)

        class Counted:
            def decompress(self, part: bytes, most: int) -> bytes:
                library.bytes += len(part)
                return member.decompress(part, most)

            def __getattr__(self, name: str) -> Any:
                return getattr(member, name)

        return Counted()


@pytest.mark.parametrize("sizes", [[0] * 2000, [1, 700, 300_000, 0, 70_000, 5], [2_000_000]], ids=["empty", "mixed", "one"])
@pytest.mark.parametrize("piece", [1 << 20, 1000, 7])
def test_gzip_of_many_members(sizes: list[int], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, little more is unpacked than there is."""
    if piece == 7 and sum(sizes) > 1 << 20:
        piece = 777
    handed = Handed()
    monkeypatch.setattr(compression, "_library", lambda *names: handed)
    data = Random(1).randbytes(max(sizes))
    packed = b"".join(gzip.compress(data[:size], mtime=0) for size in sizes)
    source = io.BytesIO(packed + bytes(1000))
    found = hashlib.sha256()
    for part in compression.unpacked(lambda most: source.read(min(most, piece))):
        found.update(part)
    assert found.digest() == hashlib.sha256(b"".join(data[:size] for size in sizes)).digest()
    assert handed.bytes < 30 * len(packed) + 10_000
