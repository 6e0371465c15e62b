"""What must hold of a root whenever it was opened, whatever ended the process that had it open before: stated once."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import msgspec
import trio

from snapfs import Kind, Options, SnapshotError, Snapshotter, Usage, open_snapshotter
from snapfs.kernel.mounttable import mount_table
from snapfs.names import parse_id
from snapfs.root import imagefile, imprint
from snapfs.scan.usage import disk_usage
from snapfs.store.metastore import MetaStore

Files = dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """One snapshot as its users see it; ``files`` is what its own layer holds, ``images`` its names in images/, ``image`` the
    image.json that it has of its own."""

    kind: Kind
    parent: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    images: tuple[str, ...] = ()
    image: str = ""


State = dict[str, Snapshot]
"""All snapshots by key or name."""


@dataclass
class Found:
    """What a root holds, and what is wrong with it in words."""

    state: State = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


async def examine(
    root: Path, options: Options | None = None, *, given_out: Collection[int] = (), in_use: Collection[str] = ()
) -> Found:
    """Open ``root`` as the next daemon would, look at everything, and close it.

    ``given_out`` are ids that somebody has seen; ``in_use`` are rootfs that somebody has open, which are to stay mounted until
    the end.  Whoever adds to what is on disk adds here what must be true of it.
    """
    found = Found()
    options = options or Options()
    async with open_snapshotter(root, options) as snapshotter:
        with trio.fail_after(60):
            await snapshotter.agreeing.settled.wait()
        _tables(found, snapshotter.records)
        _state(found, snapshotter)
        _mounts(found, root, in_use)
        if snapshotter.unflushed.lost:
            found.problems.append(f"taken for torn: {snapshotter.unflushed.lost}")
        await snapshotter.cleanup()
        _directories(found, snapshotter)
        await _works(found, snapshotter, given_out)
        await snapshotter.flush()
        _imprints(found, snapshotter)
        with snapshotter.records.reading() as reader:
            if marks := reader.unflushed():
                found.problems.append(f"flushed, and still marked: {marks}")
        in_use = ()
    _mounts(found, root, in_use)
    for directory in ("pool", "trash", "rootfs"):
        if left := os.listdir(root / directory):
            found.problems.append(f"{directory}/ holds {left} after the end")
    return found


def _tables(found: Found, records: MetaStore) -> None:
    """Each table must say what the records say, no more and no less."""
    with records.reading() as reader:
        stored = {number: record for number in reader.numbers() if (record := reader.record(number)) is not None}

        def table(database: lmdb._Database) -> dict[bytes, bytes]:
            with reader._txn.cursor(db=database) as cursor:
                return dict(cursor)

        def key(number: int) -> bytes:
            return number.to_bytes(8, "big")

        actual: dict[str, dict[bytes, bytes]] = {
            "names": table(records.tables.names),
            "children": table(records.tables.children),
            "checkpoints": table(records.tables.checkpoints),
            "uncounted": table(records.tables.uncounted),
            "images": table(records.tables.images),
            "image_names": table(records.tables.image_names),
            **{kind.value: table(records.tables.kinds[kind]) for kind in Kind},
        }
        expected: dict[str, dict[bytes, bytes]] = {
            "names": {record.name.encode(): key(n) for n, record in stored.items()},
            "children": {
                key(record.parent) + record.kind[0].encode() + key(n): record.name.encode()
                for n, record in stored.items()
                if record.parent
            },
            "checkpoints": {
                len(of.encode()).to_bytes(2, "big") + of.encode() + key(int(record.labels["snapfs.checkpoint"])) + key(n): b""
                for n, record in stored.items()
                if record.kind is Kind.COMMITTED
                and (of := record.labels.get("snapfs.workspace", ""))
                and "snapfs.checkpoint" in record.labels  # the squash of one has none
            },
            "images": {
                image.name.encode(): key(image.number) + key(n) for n, record in stored.items() for image in record.images
            },
            "image_names": {
                key(image.number): key(n) + image.name.encode() for n, record in stored.items() for image in record.images
            },
            "uncounted": {key(n): b"" for n, record in stored.items() if record.kind is Kind.COMMITTED and not record.usage},
            **{
                kind.value: {key(n): record.name.encode() for n, record in stored.items() if record.kind is kind}
                for kind in Kind
            },
        }
        for name, content in expected.items():
            if actual[name] != content:
                found.problems.append(f"table {name} holds {actual[name]}, and the records say {content}")
        if len({record.name for record in stored.values()}) != len(stored):
            found.problems.append("two snapshots share a name")
        for number, _ in reader.unflushed():
            if number not in stored or stored[number].kind is not Kind.COMMITTED:
                found.problems.append(f"marked unflushed, and not committed: {number}")
        for number, record in stored.items():
            if record.parent and (record.parent not in stored or stored[record.parent].kind is not Kind.COMMITTED):
                found.problems.append(f"{record.name}: its parent {record.parent} is not committed")
            if record.images and record.kind is not Kind.COMMITTED:
                found.problems.append(f"{record.name} is {record.kind}, and called {record.images}")
            if max(number, *(image.number for image in record.images), 0) > reader.last_id():
                found.problems.append(f"{record.name} has the id {number}, and the last given out is {reader.last_id()}")
        found.ids = {record.name: number for number, record in stored.items()}


def _state(found: Found, snapshotter: Snapshotter) -> None:
    with snapshotter.records.reading() as reader:
        for info in reader.walk():
            layer = snapshotter.layers.fs(info.id)
            files = {}
            for directory, _, names in os.walk(layer):
                for name in names:
                    path = os.path.join(directory, name)
                    files[os.path.relpath(path, layer)] = Path(path).read_text()
            labels = tuple(sorted(info.labels.items()))
            directory = snapshotter.layers.directory(info.id)
            record, own = reader.record(info.id), ""
            inside = {"fs"} if info.kind is Kind.VIEW else {"fs", "work"}
            if record is not None and record.image is not None:
                inside.add(os.path.basename(imagefile.file_of(directory, record.image.digest)))
                with suppress(SnapshotError):
                    own = imagefile.read(directory, record.image.digest, directory).decode()
            its = Snapshot(info.kind, info.parent, labels, tuple(sorted(files.items())), tuple(sorted(info.images)), own)
            found.state[info.name] = its
            try:
                if set(os.listdir(directory)) != inside:
                    found.problems.append(f"{info.name} is not whole: {directory} holds {os.listdir(directory)}")
                for path, mode in ((directory, 0o700), (layer, 0o755)):
                    if stat.S_IMODE(os.stat(path).st_mode) != mode:
                        found.problems.append(f"{path} has mode {os.stat(path).st_mode:o}")
            except OSError as error:
                found.problems.append(f"{info.name} is not whole: {error}")


def _directories(found: Found, snapshotter: Snapshotter) -> None:
    """After a Cleanup, no directory without a record, none deleted half, and none that snapfs did not know for its own."""
    present = {name: parse_id(name) for name in os.listdir(snapshotter.layers.snapshots)}
    if set(present.values()) != set(found.ids.values()):
        found.problems.append(f"snapshots/ holds {sorted(present)}, and there are records of {sorted(found.ids.values())}")
    for name in present:
        if imprint.read(snapshotter.layers.directory(int(name))) is None:
            found.problems.append(f"the directory {name} does not say what it is")
    for directory in ("trash", "lost+found"):
        path = f"{snapshotter.layers.root}/{directory}"
        if left := os.listdir(path) if os.path.isdir(path) else []:
            found.problems.append(f"{directory}/ holds {left}")


def _imprints(found: Found, snapshotter: Snapshotter) -> None:
    """Each directory bears the record of its snapshot, and nothing that was never acknowledged."""
    with snapshotter.records.reading() as reader:
        for number in reader.ids():
            record = reader.record(number)
            assert record is not None
            borne = imprint.read(snapshotter.layers.directory(number))
            if borne != imprint.Imprint(msgspec.structs.replace(record, usage=None), reader.unflushed_since(number)):
                found.problems.append(f"the directory {number} says {borne}, its record {record}")


def _mounts(found: Found, root: Path, in_use: Collection[str]) -> None:
    below = [mount for mount in mount_table() if mount.target.startswith(f"{root}/")]
    mounted = {mount.target for mount in below if mount.type != "tmpfs" or f"{mount.target}/fs" not in in_use}  # no shelters
    if mounted != set(in_use):
        found.problems.append(f"mounted below the root: {sorted(mounted)}; in use: {sorted(in_use)}")


async def _works(found: Found, snapshotter: Snapshotter, given_out: Collection[int]) -> None:
    """Each snapshot serves its purpose, and there can be new ones."""
    for name, number in found.ids.items():
        snapshot = found.state[name]
        try:
            if snapshot.kind is not Kind.COMMITTED:
                await snapshotter.mounts(name)
            usage = Usage() if snapshot.kind is Kind.VIEW else disk_usage(snapshotter.layers.fs(number))
            counted = await snapshotter.usage(name)
            if (counted.inodes, counted.size) != (usage.inodes, usage.size):  # what was shared may be shared no more
                found.problems.append(f"{name} takes {usage}, and {counted} is said")
            merged: Files = {}
            above: str | None = name
            while above is not None:
                merged = dict(found.state[above].files) | merged
                above = found.state[above].parent
            place = Path(await snapshotter.mount(name))
            if seen := {file: text for file, text in merged.items() if (place / file).read_text() != text}:
                found.problems.append(f"the merged file system of {name} lacks {seen}")
        except Exception as error:
            found.problems.append(f"{name} can't be used: {error!r}")
    try:
        await snapshotter.prepare("a new one")
        number = (await snapshotter.stat("a new one")).id
        if number <= max([*given_out, *found.ids.values()], default=0):
            found.problems.append(f"the id {number} was given out before")
        await snapshotter.commit("a new one", "a new one")
        await snapshotter.remove("a new one")
    except Exception as error:
        found.problems.append(f"nothing new can be made: {error!r}")
