"""Layers compressed, as images have them.

gzip is ISA-L's where the package ``isal`` is installed, several times as fast as zlib's, which is taken else.  The same layer
gives the same bytes by the same version of the same library; what is in it has its own digest, which no compression changes.
"""

from __future__ import annotations

import zlib
from typing import Protocol

LEVEL = 2  # of isal's 0 to 3
ZLIB_LEVEL = 6
ZSTD_LEVEL = 3

GZIP = 16 + zlib.MAX_WBITS  # the header has no time and no name

LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_TYPES = {"none": LAYER, "gzip": f"{LAYER}+gzip", "zstd": f"{LAYER}+zstd"}
"""By what ``--compression`` takes."""


class Compressor(Protocol):
    """As zlib's: what is to be written of the data so far, and of the rest."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class NotInstalled(Exception):
    """The sentence says what to install."""


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(how: str) -> Compressor:
    """A new one for ``how``, one of MEDIA_TYPES.  Raises NotInstalled."""
    if how == "none":
        return _Plain()
    if how == "zstd":
        return _zstd()
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib.compressobj(ZLIB_LEVEL, zlib.DEFLATED, GZIP)
    made: Compressor = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, GZIP)
    return made


def _zstd() -> Compressor:
    made: Compressor
    try:
        import zstandard
    except ImportError:
        raise NotInstalled("zstd takes a Python package that is not installed: pip install zstandard; or take gzip") from None
    made = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    return made
