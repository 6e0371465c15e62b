"""Fuzzing that is led by coverage: ``make fuzz``, or ``python -m tests.fuzz_atheris TARGET [OPTION …]`` for longer.

The targets are ``names``, ``filters``, ``records`` and ``archives``; the options are libFuzzer's (``-max_total_time=300``, a
directory for the corpus …).  What must hold is in ``invariants``.  A finding is written to a file, and named.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris
import msgspec

with atheris.instrument_imports(include=["snapfs.names", "snapfs.filters", "snapfs.images.tarreader", "snapfs.store"]):
    from snapfs import filters, names  # noqa: F401
    from snapfs.images import tarreader  # noqa: F401
    from snapfs.store import metastore  # noqa: F401
from tests import invariants
from tests.images import Layer
from tests.invariants import TABLES, Put


def text(provider: atheris.FuzzedDataProvider) -> str:
    """A text, with or without what is not UTF-8."""
    return str(provider.ConsumeUnicode(provider.remaining_bytes()))


def fuzz_names(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    for candidate in (data.decode(errors="surrogateescape"), text(provider)):
        invariants.check_key(candidate)
        invariants.check_file_name(candidate)
        names.printable(candidate)


def fuzz_filters(data: bytes) -> None:
    for candidate in (data.decode(errors="surrogateescape"), data.decode("latin-1")):
        invariants.check_filter(candidate)


def fuzz_archives(data: bytes) -> None:
    """Blocks of an archive, whose check sums are made right: else nothing behind the first would be read."""
    archive = bytearray(data)
    for here in range(0, len(archive) - 511, 512):
        if archive[here + 255] & 1:  # it may be a header
            fields = archive[here : here + 512]
            archive[here + 148 : here + 156] = b"%06o\0 " % (sum(fields) - sum(fields[148:156]) + 256)
    invariants.check_archive(bytes(archive), 700)
    invariants.check_archive(data, 512)


def archives() -> Callable[[bytes], None]:
    """Beginning with what tar and Python's tarfile write, in the directory that is to hold the corpus, if there is one."""
    for corpus in [Path(word) for word in sys.argv[1:] if not word.startswith("-")]:
        for name, archive in seeds():
            (corpus / f"seed-{name}").write_bytes(archive)
    return fuzz_archives


def seeds() -> Iterator[tuple[str, bytes]]:
    """Archives with all that there is in layers."""
    for name, form in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        layer = Layer(form).add("d", None, 0o2750, uid=7).add("d/f", b"first", 0o4755).link("l", "d/f").hard("h", "d/f")
        layer.add("c", type=tarfile.CHRTYPE, devmajor=1, devminor=3).add("d/.wh.g").link("m", "n" * 90).add("o" * 90)
        if form != tarfile.USTAR_FORMAT:
            layer.add("x" * 120, b"a", pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}).link("y", "z" * 150)
        yield name, layer.done().rstrip(b"\0") + bytes(1024)
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/sparse", "wb") as file:
            for offset in (0, 1 << 18, 1 << 20):
                file.seek(offset)
                file.write(b"data")
        for version in ("--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"):
            words = ["tar", "-C", directory, *(["--format=posix"] * (version[2] == "s")), version, "-S", "-cf", "-", "sparse"]
            archive = subprocess.run(words, capture_output=True, check=True).stdout
            yield version.strip("-"), archive.rstrip(b"\0") + bytes(1024)


def records() -> Callable[[bytes], None]:
    directory = tempfile.mkdtemp(prefix="snapfs-fuzz-", dir="/dev/shm")
    mangled = invariants.Mangled(Path(directory) / "metadata.mdb")
    shutil.rmtree(directory)  # it is open, and libFuzzer ends without a word
    known = list(invariants.entries())

    def fuzz_records(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        puts: list[Put] = []
        while provider.remaining_bytes() and len(puts) < 4:
            if provider.ConsumeBool():  # a record says something else, in good MessagePack
                number = provider.ConsumeIntInRange(1, 8)
                field, value = provider.ConsumeIntInRange(0, 7), provider.ConsumeIntInRange(-1, 9)
                said: list[object] = [f"name{value}", "committed", 0, 1, 2, {}, None]
                said[2:3] = [value if field % 2 else provider.ConsumeInt(8)]
                if field > 5:
                    said[provider.ConsumeIntInRange(0, 6)] = provider.ConsumeInt(8)
                puts.append(("snapshots", invariants.key(number), msgspec.msgpack.encode(said)))
            elif provider.ConsumeBool():  # what is there gets another value, or another key
                table, key, value = known[provider.ConsumeIntInRange(0, len(known) - 1)]
                if provider.ConsumeBool():
                    key = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 20))
                elif provider.ConsumeBool():
                    at = provider.ConsumeIntInRange(0, len(value))
                    value = value[:at] + provider.ConsumeBytes(provider.ConsumeIntInRange(0, 12)) + value[at + 1 :]
                else:
                    value = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 200))
                puts.append((table, key, value))
            else:
                table = TABLES[provider.ConsumeIntInRange(0, len(TABLES) - 1)]
                key = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 20))
                puts.append((table, key, provider.ConsumeBytes(provider.ConsumeIntInRange(0, 200))))
        mangled.check(puts)

    return fuzz_records


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "names": lambda: fuzz_names,
    "filters": lambda: fuzz_filters,
    "records": records,
    "archives": archives,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz_atheris {'|'.join(TARGETS)} [libFuzzer's options]")
    target = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[target]())
    atheris.Fuzz()
