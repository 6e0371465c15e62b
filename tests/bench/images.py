"""An image's layers unpacked, beside containerd."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.containerd import NAMESPACE, containerd
from tests.bench.place import Place, run, settle
from tests.bench.rows import Row, at_most, in_turns
from tests.containerds import binaries
from tests.images import Layer, Layout, chain_of

LAYERS = 12
NOTE = "each a process, as root, from one oci-archive; ours is on the disk, theirs is flushed then; not pinned"


def images(place: Place) -> Iterator[Row]:
    """snapfs import of an image of 12 layers, packed and not."""
    files, size = place.size(20_000, 240), place.size(300 << 20, 3 << 20)
    with place.directory("images") as base:
        tars = _layers(files // LAYERS, size // LAYERS)
        for packed in (True, False):
            layout = Layout(base / f"oci{packed}")
            layout.add("bench:1", tars, packed=packed)
            archive = layout.archive(base / f"{packed}.tar")
            how = "packed by gzip" if packed else "not packed"
            what = f"an image of {LAYERS} layers, {files:,} files, {size >> 20} MiB, {how}"
            yield _beside(place, base, archive, what, chain_of(tars))


def through_containerd(place: Place) -> Iterator[Row]:
    """The same unpacked by a containerd, into snapfs and into its own snapshotter."""
    files, size = place.size(20_000, 240), place.size(300 << 20, 3 << 20)
    folder = binaries("sid")  # those before it know no --sync-fs
    with ExitStack() as stack:
        base = stack.enter_context(place.directory("images"))
        layout = Layout(base / "oci")
        layout.add("bench:1", _layers(files // LAYERS, size // LAYERS), packed=True)
        archive = layout.archive(base / "packed.tar")
        proxied = {}
        for sync in ("full", "background"):
            stack.enter_context(place.snapfs("-o", f"sync={sync}", "--containerd", str(base / sync)))
            proxied[f"snapfs-{sync}"] = str(base / sync)
        running = stack.enter_context(containerd(place, proxied=proxied, program=folder / "containerd"))
        ctr = (folder / "ctr", "--address", running.address, "--namespace", NAMESPACE, "image")

        def seconds(snapshotter: str, *more: str) -> float:
            settle(base)
            took = run(*ctr, "import", "--local", "--snapshotter", snapshotter, *more, archive)
            run(*ctr, "rm", "--sync", "test.local/bench:1")
            return took

        what = f"ctr image import of {LAYERS} layers, {files:,} files, {size >> 20} MiB, into snapfs"
        note = "containerd 2.1, each time from the archive, all of it removed again after that; not pinned"
        for sync, against, more, most in (
            ("full", "its overlayfs with --sync-fs", ("--sync-fs",), 1.0),
            ("background", "its overlayfs, which flushes nothing", (), 1.05),
        ):
            row = Row(f"{what} with sync={sync}", against, "s", at_most(most), note)
            ours, theirs = partial(seconds, f"snapfs-{sync}"), partial(seconds, "overlayfs", *more)
            ours(), theirs()  # once before it counts
            yield in_turns(place.rounds, row, ours, theirs)


def _layers(files: int, size: int) -> list[bytes]:
    """Archives of so many files, with so many bytes each: some large, most small; half of each is hard to pack."""
    chance = random.Random(1)
    found = []
    for number in range(LAYERS):
        layer = Layer()
        large = size // 2
        layer.add(f"usr/lib/{number}/large", chance.randbytes(large // 2) + bytes(large // 2), 0o755)
        each = (size - large) // (files - 1)
        for nth in range(files - 1):
            if nth % 20 == 0:
                layer.add(f"usr/share/{number}/{nth // 20}", None, 0o755)
            layer.add(f"usr/share/{number}/{nth // 20}/{nth}", chance.randbytes(each // 2) + b"text " * (each // 10))
        found.append(layer.done())
    return found


def _beside(place: Place, base: Path, archive: Path, what: str, names: list[str]) -> Row:
    program = Path(sys.executable).with_name("snapfs")
    with place.snapfs() as daemon, containerd(place) as running:

        def ours() -> float:
            settle(base)
            took = run(program, "import", "--at", daemon.mnt, f"oci-archive:{archive}") * 1e3
            for name in reversed(names):
                os.rmdir(daemon.mnt / "committed" / name)
            (daemon.mnt / ".snapfs/cleanup").write_text("1")
            return took

        def theirs() -> float:
            settle(base)
            ctr = ("ctr", "--address", running.address, "--namespace", NAMESPACE, "image")
            took = run(*ctr, "import", "--snapshotter", "overlayfs", archive)
            took += run("sync", "-f", base)
            run(*ctr, "rm", "--sync", "test.local/bench:1")
            return took * 1e3

        return in_turns(place.rounds, Row(f"snapfs import of {what}", "ctr image import", "ms", at_most(1), NOTE), ours, theirs)
