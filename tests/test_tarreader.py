"""The reader of archives beside Python's tarfile; and all that no archive may say."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapfs.images.tarreader import BLOCK, MOST_TEXT, Entry, Stream, TarReader
from snapfs.images.unfit import Unfit
from tests.images import Layer
from tests.invariants import check_archive, read_archive

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(archive: bytes, piece: int = 700) -> list[tuple[Entry, bytes]]:
    return read_archive(archive, piece)


def only(archive: bytes) -> Entry:
    ((entry, _),) = read(archive)
    return entry


def refused(archive: bytes) -> str:
    with pytest.raises(Unfit) as raised:
        read(archive)
    return str(raised.value)


def header(name: bytes = b"f", *, flag: bytes = b"0", size: bytes = b"00000000000", **fields: bytes) -> bytes:
    """A header of one's own making, with its check sum."""
    block = bytearray(BLOCK)
    places = {"mode": 100, "uid": 108, "gid": 116, "mtime": 136, "linkname": 157, "magic": 257, "major": 329, "minor": 337}
    places |= {"sparse": 386, "more": 482, "real": 483, "prefix": 345}
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = flag
    for field, value in {"magic": b"ustar\x0000", **fields}.items():
        block[places[field] : places[field] + len(value)] = value
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32 - sum(block[148:156]))
    return bytes(block)


def pax(*records: bytes) -> bytes:
    """The header and the records before an entry."""
    text = b""
    for record in records:
        length = len(record) + 2
        while len(b"%d " % length) + len(record) + 1 != length:
            length += 1
        text += b"%d %s\n" % (length, record)
    return header(b"x", flag=b"x", size=b"%011o" % len(text)) + text + bytes(-len(text) % BLOCK)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_what_tarfile_has_written(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    layer = Layer(FORMATS[kind])
    long = 90 if kind == "ustar" else 400
    for number in range(40):
        name = f"{number}/" + chance.choice(("ü", "new\nline", "x" * long, "-rf", "a b"))
        moment = chance.randrange(1 << 31) + (0.25 if kind == "pax" else 0)
        owners: dict[str, Any] = {"uid": chance.randrange(70_000), "gid": chance.randrange(70_000), "mtime": moment}
        which = chance.randrange(5)
        if which == 0:
            layer.add(name, None, chance.randrange(0o10000), **owners)
        elif which == 1:
            layer.link(name, "y" * long, **owners)
        elif which == 2:
            layer.add(name, type=tarfile.BLKTYPE, devmajor=7, devminor=number, **owners)
        else:
            layer.add(name, chance.randbytes(chance.randrange(2000)), chance.randrange(0o10000), **owners)
    archive = layer.done()
    ours = read(archive, chance.randrange(1, 3000))
    with tarfile.open(fileobj=io.BytesIO(archive)) as theirs:
        members = theirs.getmembers()
        assert len(ours) == len(members) == 40
        for (entry, data), member in zip(ours, members, strict=True):
            assert entry.name.decode().rstrip("/") == member.name
            assert entry.target.decode() == member.linkname
            assert (entry.mode, entry.uid, entry.gid, entry.major, entry.minor) == (
                *(member.mode, member.uid, member.gid, member.devmajor, member.devminor),
            )
            assert entry.modified == entry.read == int(member.mtime * 4) * 250_000_000
            file = theirs.extractfile(member) if member.isfile() else None
            assert data == (file.read() if file else b"")


@pytest.mark.parametrize("version", ["", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [1, 3, 30])
def test_sparse_files(tmp_path: Path, version: str, pieces: int) -> None:
    options = ["--format=pax", f"--sparse-version={version}"] if version else ["--format=gnu"]
    file = tmp_path / ("s" * 120)
    with file.open("wb") as out:
        for number in range(pieces):
            out.seek((2 * number + 1) << 16)
            out.write(b"data" * 2000)
        out.truncate((2 * pieces + 1) << 16)
    archive = subprocess.run(
        ["tar", "-C", str(tmp_path), "--sparse", *options, "-cf", "-", file.name, "--transform=s,^,in/,"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    ((entry, data),) = read(archive)
    assert entry.name == b"in/" + b"s" * 120
    assert entry.spans is not None
    assert data == file.read_bytes()


def test_extended_attributes_and_times() -> None:
    records = (
        b"SCHILY.xattr.user.note=a\0b=c\n",
        b"SCHILY.xattr.user.none=",
        b"mtime=12.5",
        b"atime=13.000000001",
        b"comment=x",
    )
    entry = only(pax(*records) + header() + END)
    assert entry.attributes == {"user.note": b"a\0b=c\n", "user.none": b""}
    assert (entry.modified, entry.read) == (12_500_000_000, 13_000_000_001)
    entry = only(pax(b"mtime=-5.5", b"atime=1") + header() + END)
    assert (entry.modified, entry.read) == (0, 1_000_000_000)
    assert only(pax(b"path=long", b"path=longer") + header() + END).name == b"longer"
    assert only(pax(b"path=long", b"path=") + header(b"short") + END).name == b"short"


def test_numbers_in_base_256_and_check_sums_of_old() -> None:
    assert only(header(uid=b"\x80\0\0\0\0\x01\0\0") + END).uid == 65536
    entry = only(header(mtime=b"\xff" * 12) + END)
    assert entry.modified == 0
    block = bytearray(header(b"\xff" * 50))
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256 - 50 * 256)
    assert only(bytes(block) + END).name == b"\xff" * 50
    old = header(b"d/", magic=bytes(8))
    assert only(old + END).kind == "directory"
    assert only(header(b"name", prefix=b"above") + END).name == b"above/name"


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"x" * BLOCK, "damaged, or none: the check sum"),
        (b"\xff" * BLOCK, "damaged, or none: the check sum"),
        (b"hello\n", "cut off, or none: there are 6 bytes"),
        (b"\0" * 100 + b"x" + b"\0" * 411, "check sum"),
        (header()[:300], "cut off"),
        (header(size=b"00000001000") + b"short", "cut off"),
        (header(size=b"00000001000"), "cut off"),
        (header(flag=b"Z") + END, 'unknown kind "Z"'),
        (header(flag=b"M") + END, 'unknown kind "M"'),
        (header(flag=b"\x9b") + END, 'unknown kind "%C2%9B"'),
        (header(uid=b"\x80\0\0\0\xff\xff\xff\xff") + END, "there are no such numbers"),
        (header(uid=b"\xff" * 8) + END, "out of range"),
        (header(size=b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff") + END, "out of range"),
        (header(size=b"99") + END, "a number in it is none"),
        (header(size=b"0_7") + END, "a number in it is none"),
        (header(flag=b"3", major=b"0010000") + END, "there are no such numbers"),
        (header(flag=b"4", minor=b"\x80\0\0\0\x7f\xff\xff\xff") + END, "there are no such numbers"),
        (header(flag=b"x", size=b"%011o" % (MOST_TEXT + 1)) + END, "more than"),
        (header(flag=b"L", size=b"00000777777") + b"x" * 100, "cut off"),
        (pax(b"path=a\0b") + header() + END, "NUL"),
        (pax(b"path=" + b"a" * 5000) + header() + END, "more than 4095 bytes"),
        (pax(b"size=" + b"9" * 19) + header() + END, "out of range"),
        (pax(b"uid=-1") + header() + END, "out of range"),
        (pax(b"mtime=" + b"9" * 400_000) + header() + END, "a time"),
        (pax(b"SCHILY.xattr.=x") + header() + END, "no name"),
        (header(flag=b"x", size=b"00000000010") + b"99 a=b\n" + bytes(505) + END, "records are none"),
        (header(flag=b"x", size=b"00000000010") + b"7 a=bc\n" + bytes(505) + END, "records are none"),
        (header() + bytes(BLOCK) + header(), "behind an empty block"),
        (header(flag=b"S") + END, "no format of GNU's"),
        (
            header(flag=b"S", magic=b"ustar  \0", sparse=b"00000000007\x0000000000777", real=b"000000000100") + END,
            "beyond its end",
        ),
        (pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + header(size=b"00000000777") + b"1" * BLOCK, "does not end"),
        (pax(b"GNU.sparse.major=2", b"GNU.sparse.minor=0") + header() + END, "unknown version"),
        (pax(b"GNU.sparse.numblocks=9", b"GNU.sparse.map=1,1") + header() + END, "another length"),
        (pax(b"GNU.sparse.numblocks=1", b"GNU.sparse.map=1,1", b"GNU.sparse.size=2") + header() + END, "not as long"),
        (pax(b"GNU.sparse.offset=1", b"GNU.sparse.offset=1") + header() + END, "the map of a sparse file is none"),
    ],
)
def test_what_no_archive_may_say(archive: bytes, why: str) -> None:
    assert why in refused(archive)


def test_a_sparse_map_of_millions() -> None:
    block = bytearray(header(flag=b"S", magic=b"ustar  \0", more=b"\1"))
    more = struct.pack("504sB7x", b"00000000000\0" * 42, 1)
    assert "pieces" in refused(bytes(block) + more * 4000)


def test_an_archive_that_ends_without_its_mark() -> None:
    reader = TarReader(Stream(iter([header()])))
    assert reader.next() is not None
    assert reader.next() is None
    assert not reader.has_end
    reader = TarReader(Stream(iter([header(), bytes(BLOCK)])))
    assert reader.next() is not None
    assert reader.next() is None
    assert reader.has_end


KEYS = [b"path", b"size", b"uid", b"mtime", b"GNU.sparse.map", b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.offset"]
FLAGS = [b"0", b"1", b"2", b"3", b"5", b"x", b"L", b"S", b"g"]

pieces = st.lists(
    st.one_of(
        st.builds(lambda flag, name: header(name, flag=flag), st.sampled_from(FLAGS), st.binary(max_size=20)),
        st.builds(lambda key, value: pax(key + b"=" + value), st.sampled_from(KEYS), st.binary(max_size=12)),
        st.builds(lambda size: header(size=b"%011o" % size), st.integers(0, 2000)),
        st.binary(max_size=600),
        st.just(bytes(BLOCK)),
    ),
    max_size=8,
).map(b"".join)


@given(pieces, st.integers(1, 2000))
@example(END, 1)
def test_whatever_comes_in(archive: bytes, piece: int) -> None:
    check_archive(archive, piece)


@given(st.integers(0, 2999), st.integers(0, 255))
def test_one_byte_is_another(at: int, byte: int) -> None:
    archive = bytearray(Layer(tarfile.PAX_FORMAT).add("x" * 200, b"data" * 100).link("l", "t").done()[:3000])
    archive[at % len(archive)] = byte
    check_archive(bytes(archive), 512)
