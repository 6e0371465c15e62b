"""What must hold whatever comes in: of names, of filters, of mangled records.  Hypothesis (``test_fuzz``) and atheris
(``fuzz_atheris``) bring the input; each function raises AssertionError, or whatever escaped, where something does not hold."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import msgspec

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument, NameTooLong, NotFound, NotUtf8
from snapfs.filters import Filters
from snapfs.images.tarreader import Entry, Stream, TarReader
from snapfs.images.unfit import Unfit
from snapfs.model import Info, Kind, Usage
from snapfs.rules.images import find_image
from snapfs.store.metastore import MetaStore
from snapfs.store.reading import Reader
from snapfs.store.schema import ImageName, Record

KINDS = ("active", "view", "committed")
TABLES = ("meta", "snapshots", "names", *KINDS, "children", "checkpoints", "uncounted", "unflushed", "images", "image_names")

Put = tuple[str, bytes, bytes | None]
"""A table, a key in it, and the value to be put there (None: taken out)."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- names


def check_key(key: str) -> None:
    """``key`` has one file name that leads back to it, or is refused as what it is."""
    try:
        name = names.encode(key)
    except NameTooLong:
        assert len(key) > names.NAME_MAX or len(key.encode()) > names.NAME_MAX // 6
    except NotUtf8:
        assert not is_utf8(key)
    except InvalidArgument:
        assert key == ""
    else:
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert not _CONTROL.search(name)
        assert len(name.encode()) <= names.NAME_MAX
        assert names.decode(name) == key
        with suppress(InvalidArgument):  # a name that is a key too has another file name, unless they are the same
            assert (names.encode(name) == name) == (name == key)


def check_file_name(name: str) -> None:
    """``name`` is the one file name of a key, or is refused as what it is."""
    try:
        key = names.decode(name)
    except NotUtf8:
        assert not is_utf8(name)
    except NameTooLong:
        assert len(name.encode(errors="surrogatepass")) > names.NAME_MAX or len(_longest(name).encode()) > names.NAME_MAX
    except InvalidArgument as error:
        assert not _CONTROL.search(str(error))
    else:
        assert names.encode(key) == name
        assert key


def _longest(name: str) -> str:
    """``name`` with everything encoded that can be."""
    return re.sub("[^0-9A-Za-z]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode(errors="surrogatepass")), name)


# -- filters

INFOS = [
    Info(name=name, kind=kind, id=1, parent=parent, labels=labels, created=1, updated=2)
    for name, kind, parent, labels in (
        ("web", Kind.ACTIVE, "base", {"gc": "yes", "a.b/c": 'x"y'}),
        ("\0\n/\U0010ffff", Kind.VIEW, None, {}),
        ("x" * 255, Kind.COMMITTED, "é" * 100, {"": "", "a": "a" * 4000 + "b", "labels": "(" * 3000}),
    )
]

SECONDS_A_CHARACTER = 100e-6  # thirty times what it takes
SECONDS_AT_LEAST = 1.0


def check_filter(text: str, infos: list[Info] = INFOS) -> None:
    """``text`` gives a predicate that tells of any snapshot, or InvalidArgument, in time that its length bounds."""
    began = time.process_time()
    try:
        holds: Callable[[Info], bool] = Filters([text]).holds
    except InvalidArgument as error:
        assert str(error).startswith(("parse error: [", "the filters name more than "))
    else:
        for info in infos:
            assert holds(info) in (True, False)
    took = time.process_time() - began
    assert took < SECONDS_AT_LEAST + SECONDS_A_CHARACTER * len(text), f"{took:.1f} s for {len(text)} characters"


# -- records


def key(number: int) -> bytes:
    """An id as the tables have it."""
    return number.to_bytes(8, "big")


def make_records() -> dict[int, Record]:
    """Records of a small root: a chain of three with a view and two active snapshots on it, one apart."""

    def record(name: str, kind: Kind, parent: int = 0, usage: Usage | None = None) -> Record:
        images = (ImageName(8, "shop:1"), ImageName(9, "a/b")) if name == "base" else ()
        whose = "containerd" if name == "middle" else ""
        return Record(name, kind, parent, 1, 2, {"label": name}, usage, whose, images=images)

    return {
        1: record("base", Kind.COMMITTED, 0, Usage(3, 4096)),
        2: record("middle", Kind.COMMITTED, 1, Usage(3, 4096)),
        3: record("top", Kind.COMMITTED, 2),
        4: record("web", Kind.ACTIVE, 3),
        5: record("peek", Kind.VIEW, 3),
        6: record("job", Kind.ACTIVE, 1),
        7: record("apart", Kind.ACTIVE),
    }


def fill(env: lmdb.Environment) -> None:
    """Put those records and their indexes into an environment, or back into it."""
    for table, key_, value in entries():
        with env.begin(write=True) as txn:
            txn.put(key_, value, db=env.open_db(table.encode(), txn))


def entries() -> Iterator[tuple[str, bytes, bytes]]:
    """All that the tables hold for those records."""
    yield "meta", b"schema", b"1"
    yield "meta", b"last_id", key(9)
    for number, record in make_records().items():
        name = record.name.encode()
        yield "snapshots", key(number), msgspec.msgpack.encode(record)
        yield "names", name, key(number)
        yield record.kind, key(number), name
        if record.parent:
            yield "children", key(record.parent) + record.kind[0].encode() + key(number), name
        if record.kind is Kind.COMMITTED and record.usage is None:
            yield "uncounted", key(number), b""
        for image in record.images:
            yield "images", image.name.encode(), key(image.number) + key(number)
            yield "image_names", key(image.number), key(number) + image.name.encode()


def mangle(env: lmdb.Environment, txn: lmdb.Transaction[bytes], puts: list[Put]) -> None:
    """Do what a bad disk does."""
    for table, key_, value in puts:
        if (table, key_) == ("meta", b"schema"):
            continue  # which is asked once, when the store is opened
        db = env.open_db(table.encode(), txn)
        with suppress(lmdb.BadValsizeError):  # no disk makes an empty key, or one of more than 511 bytes
            if value is None:
                txn.delete(key_, db=db)
            else:
                txn.put(key_, value, db=db)


def check_reader(reader: Reader) -> None:
    """Every read tells what is there or raises Damaged, and ends."""
    for number in {*range(10), *reader.ids()}:
        _read(lambda number=number: reader.record(number))  # type: ignore[misc]
        _read(lambda number=number: reader.indexed_as(number))  # type: ignore[misc]
        for kind in Kind:
            assert all(isinstance(name, str) for _, name in reader.children(number, kind))
        reader.any_child(number)
        with suppress(Damaged):
            record = reader.record(number)
            if record is not None:
                assert names.decode(names.encode(record.name)) == record.name
                assert 0 <= record.parent != number
                _read(lambda record=record: reader.parent_of(record))  # type: ignore[misc]
                _read(lambda number=number, record=record: reader.info(number, record))  # type: ignore[misc]
                _read(lambda number=number, record=record: reader.lowers(number, record))  # type: ignore[misc]
    for kind in Kind:
        listed = list(reader.listing(kind))
        assert listed == sorted(listed, key=lambda entry: entry[0])
        for number, name in listed:
            assert number
            with suppress(Damaged, InvalidArgument):
                found = reader.find(name)
                assert found is None or found[1].name == name
    for name in ("", "nobody", *(record.name for record in make_records().values())):
        with suppress(Damaged):
            found = reader.find(name)
            assert found is None or found[1].name == name
    listed_images = list(reader.images())
    assert listed_images == sorted(listed_images)
    for nth, _, name in [*listed_images, (8, 1, "shop:1"), (9, 1, "")]:
        _read(lambda name=name: reader.image(name))  # type: ignore[misc]
        _read(lambda nth=nth: reader.image_at(nth))  # type: ignore[misc]
        with suppress(Damaged, NotFound):
            number, record, image = find_image(reader, name)
            assert (image in record.images, image.name, number > 0) == (True, name, True)
    _read(lambda: list(reader.walk()))
    assert list(reader.numbers()) == sorted(reader.ids())
    for workspace in ("", "web", "b" * 300):
        reader.last_checkpoint(workspace)
        assert all(isinstance(nth, int) for nth, _ in reader.checkpoints(workspace))
    reader.uncounted()
    reader.unflushed()
    assert reader.last_id() >= 0


def _read(what: Callable[[], object]) -> None:
    with suppress(Damaged):
        what()


class Mangled:
    """A store whose records are mangled for one look at a time."""

    def __init__(self, path: Path) -> None:
        self.store = MetaStore(str(path), sync=False, map_size=1 << 24)
        fill(self.store.environment.env)

    def check(self, puts: list[Put]) -> None:
        """Check all reads as they are after ``puts``, and forget those."""
        env = self.store.environment.env
        with env.begin(write=True) as txn:
            mangle(env, txn, puts)
            reader = Reader(self.store.tables)
            reader._txn = txn
            check_reader(reader)
            txn.abort()


# -- archives of layers


def read_archive(archive: bytes, piece: int) -> list[tuple[Entry, bytes]]:
    """All entries, each with its bytes, of an archive that comes in pieces of so many bytes.  Raises Unfit."""
    reader = TarReader(Stream(archive[here : here + piece] for here in range(0, len(archive), piece)))
    found = []
    while (entry := reader.next()) is not None:
        data = bytearray()
        for here, part in reader.data(entry):
            assert here >= len(data)
            data += bytes(here - len(data)) + part
        found.append((entry, bytes(data) + bytes(min(entry.length, 1 << 24) - len(data))))
    return found


def check_archive(archive: bytes, piece: int) -> None:
    """It is read, with nothing out of range, and the same however it comes; or refused in one sentence."""
    try:
        found = read_archive(archive, piece)
    except Unfit as unfit:
        assert names.printable(str(unfit)) == str(unfit)
        try:
            read_archive(archive, 1 << 20)
        except Unfit:
            return
        raise AssertionError("it is refused only in other pieces") from unfit
    for entry, data in found:
        assert 0 <= entry.mode < 0o10000
        assert 0 <= entry.uid < 1 << 32
        assert 0 <= entry.gid < 1 << 32
        assert 0 <= entry.modified <= entry.read < 1 << 63
        assert 0 <= entry.major < 1 << 12
        assert 0 <= entry.minor < 1 << 20
        assert len(entry.name) < 4096
        assert b"\0" not in entry.name + entry.target
        assert entry.size <= len(archive)
        assert entry.length <= 1 << 24 or entry.spans is not None
        assert entry.kind == "file" or not data
    again = read_archive(archive, 1 << 20)
    assert [(entry.name, entry.spans, data) for entry, data in again] == [
        (entry.name, entry.spans, data) for entry, data in found
    ]
