"""Layers as tars: made, read in pieces, and applied as a runtime does it."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.rules.root import overlay_prefix
from snapfs.scan.layertar import LayerTar, OpenLayer, make_index
from snapfs.scan.marks import PREFIX
from tests.kernel_changes import merged, random_chain, tree


@contextmanager
def opened(layer: Path | str, *, below: Path | str | None = None, prefix: str = PREFIX) -> Iterator[OpenLayer]:
    """The tar of ``layer``, open for reading."""
    index = make_index(str(layer), below=None if below is None else str(below), prefix=prefix)
    with closing(index.open()) as found:
        yield found


def bytes_of(layer: Path | str, *, below: Path | str | None = None, prefix: str = PREFIX) -> bytes:
    """All of it, as one read gives it."""
    with opened(layer, below=below, prefix=prefix) as found:
        data = found.read(0, found.size)
        assert len(data) == found.size
        return data


def entries_of(data: bytes) -> dict[str, tarfile.TarInfo]:
    """The entries, by path as it is written, in order."""
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return {each.name + "/" * each.isdir(): each for each in tar.getmembers()}


def check_any_part(index: LayerTar, data: bytes, random: Random, *, times: int = 200) -> None:
    """That what is read at random is what is read in order."""
    with closing(index.open()) as found:
        for _ in range(times):
            begin = random.choice((random.randrange(len(data) + 600), random.randrange(0, len(data), 512)))
            size = random.choice((0, 1, 511, 512, 513, 4096, 131_072, len(data)))
            assert found.read(begin, size) == data[begin : begin + size], (begin, size)


def apply(data: bytes, top: str) -> None:
    """What a runtime makes of the tar of a layer in ``top``, which shows what is below (OCI image-spec, ``layer.md``)."""
    unpacked: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        for entry in tar:
            above, name = os.path.split(os.path.join(top, entry.name))
            if name == ".wh..wh..opq":
                for each in os.listdir(above):
                    if os.path.join(above, each) not in unpacked:
                        _remove(os.path.join(above, each))
                continue
            if name.startswith(".wh."):
                _remove(os.path.join(above, name.removeprefix(".wh.")))
                continue
            path = os.path.normpath(os.path.join(above, name))
            unpacked.add(path)
            if os.path.lexists(path) and not (entry.isdir() and stat.S_ISDIR(os.lstat(path).st_mode)):
                _remove(path)
            _make(tar, entry, path, top)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _make(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: str, top: str) -> None:
    if entry.islnk():
        os.link(os.path.join(top, entry.linkname), path, follow_symlinks=False)
        return
    if entry.issym():
        os.symlink(entry.linkname, path)
    elif entry.isdir():
        os.makedirs(path, exist_ok=True)
        for each in os.listxattr(path):
            os.removexattr(path, each)
    elif entry.isfifo():
        os.mkfifo(path)
    elif entry.isdev():
        os.mknod(path, (stat.S_IFCHR if entry.ischr() else stat.S_IFBLK) | 0o600, os.makedev(entry.devmajor, entry.devminor))
    else:
        held = tar.extractfile(entry)
        assert held is not None
        Path(path).write_bytes(held.read())
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if not entry.issym():
        os.chmod(path, entry.mode)
    for key, value in entry.pax_headers.items():
        if key.startswith("SCHILY.xattr."):
            os.setxattr(path, key.removeprefix("SCHILY.xattr."), value.encode(errors="surrogateescape"))


def apply_all(layers: Sequence[str], target: str, prefix: str) -> None:
    """The tars of ``layers``, the nearest first, applied to ``target`` from the lowest on."""
    os.mkdir(target)
    below = None
    for layer in reversed(layers):
        apply(bytes_of(layer, below=below, prefix=prefix), target)
        below = layer


@settings(max_examples=30, deadline=None, database=None)
@given(random=st.randoms(use_true_random=True))
def compare_with_kernel(random: Random, options: str) -> None:
    """A runtime that applies the tars one after the other shows what the kernel does."""
    scratch = tempfile.mkdtemp(prefix="layertar-")
    prefix = overlay_prefix(options.split(","))
    try:
        chain = random_chain(random, scratch, options)
        apply_all(chain, f"{scratch}/applied", prefix)
        with merged(chain, f"{scratch}/merged", options) as target:
            expected = tree(target, prefix)
        found = tree(f"{scratch}/applied", prefix)
        del found[b"/"], expected[b"/"]  # runtimes leave it as it is
        assert found == expected
    finally:
        shutil.rmtree(scratch)
