"""Large roots, made quickly: the records in big transactions, the directories directly, as many Prepares would leave them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapfs.model import Kind, Usage
from snapfs.root import imprint
from snapfs.root.layers import Layers
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import Record
from snapfs.store.writing import Writer
from tests.bench.place import Place, settle

BATCH = 20_000


def name_of(number: int) -> str:
    """The name of snapshot ``number`` in a populated root."""
    return f"s{number:08}"


def populate(root: Path, count: int, kind: Kind = Kind.COMMITTED, *, chain: int = 0, first_parent: int = 0) -> None:
    """Make ``root`` with so many snapshots of ``kind``, with ids from 1, called ``name_of(id)``.

    The first ``chain`` of them are committed and stand on each other.  All others have the parent ``first_parent`` (0: none).
    """
    layers = Layers.open(str(root))
    layers.close()
    now = time.time_ns()
    records = {}
    for number in range(1, count + 1):
        in_chain = number <= chain
        its = Kind.COMMITTED if in_chain or number == first_parent else kind
        parent = number - 1 if in_chain else first_parent if number != first_parent else 0
        usage = Usage(1, 4096) if its is Kind.COMMITTED else None
        records[number] = Record(name_of(number), its, parent, now, now, {}, usage)
    for number, record in records.items():
        directory = f"{layers.snapshots}/{number}"
        os.mkdir(directory, 0o700)
        os.mkdir(f"{directory}/fs", 0o755)
        if record.kind is Kind.ACTIVE:
            os.mkdir(f"{directory}/work", 0o711)
        imprint.write(directory, imprint.Imprint(record))
    store = MetaStore(f"{root}/metadata.mdb", sync=False)
    try:
        for begin in range(1, count + 1, BATCH):
            numbers = range(begin, min(begin + BATCH, count + 1))

            def put(writer: Writer, numbers: range = numbers) -> None:
                writer.raise_last_id(numbers[-1])  # first: while there is none, the highest that there is counts
                for number in numbers:
                    writer.put(number, records[number])

            store.write_now(put)
    finally:
        store.close()
    imprint.write_last_reserved_id(layers.snapshots, count)
    settle(root)


def shared(place: Place, count: int) -> Path:
    """A root of this run with so many committed snapshots, for all benchmarks that leave it as it was."""

    @contextmanager
    def make() -> Iterator[Path]:
        place.say(f"making a root with {count:,} snapshots")
        with place.directory(f"root-{count}") as base:
            populate(base / "root", count)
            yield base / "root"

    return place.shared(f"root-{count}", make)
