"""What came from elsewhere leaves as it came: the archive of a layer, put together of what was kept of it, and its files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.images import original
from snapfs.images.original import HEADER, ORIGINAL, Blob, Differs, Original, Recording
from snapfs.images.tarreader import FILE, TarReader
from snapfs.images.unfit import Unfit
from snapfs.images.unpacking import Owners, Unpacking
from tests.command import Command, run
from tests.daemon import Daemon
from tests.images import Layer, Layout, archive_of, chain_of, digest_of, packable_tree
from tests.layertars import opened
from tests.tree import remove_all

pytestmark = pytest.mark.mounts

BLOB = Blob("sha256:" + "1" * 64, 5, "gzip")


def kept(archive: bytes, top: Path, piece: int = 5000) -> Original | None:
    """Unpack ``archive`` into the new directory ``top``; what was kept of it, beside that."""
    aside = top.parent / f"{top.name}-aside"
    for each in (top, aside):
        each.mkdir()
    fds = [os.open(each, os.O_RDONLY) for each in (top, aside)]
    before = os.umask(0)
    unpacking = Unpacking(*fds, lowest=True, prefix="trusted.overlay.", owners=Owners())
    try:
        pieces = (archive[here : here + piece] for here in range(0, len(archive), piece))
        with closing(Recording(pieces, fds[1])) as stream:
            reader = TarReader(stream)
            while (entry := reader.next()) is not None:
                path = unpacking.add(entry, reader)
                if path is not None:
                    stream.in_file(path, entry.size)
                if unpacking.has_replaced:
                    stream.give_up()
            stream.drain()
            stream.finish(digest_of(archive), BLOB)
        unpacking.finish([], lambda: None)
        found = Original.find(str(aside))
        assert stream.size == ((aside / ORIGINAL).stat().st_size if found is not None else 0)
        return found
    finally:
        os.umask(before)
        unpacking.close()
        for fd in fds:
            os.close(fd)


def put_together(found: Original, top: Path) -> bytes:
    with opened(top) as tar:
        return b"".join(found.pieces(tar.read, tar.size))


def shuffled(top: Path, seed: int) -> bytes:
    """What GNU tar makes of a tree whose entries come in no order, but parents first."""
    found = subprocess.check_output(["find", ".", "-mindepth", "1", "-printf", r"%P\0"], cwd=top)
    names: list[bytes] = found.split(b"\0")[:-1]
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: name.count(b"/"))
    (listed := top.parent / "listed").write_bytes(b"\0".join(names))
    words = ["tar", "-C", str(top), "--no-recursion", "--null", "--verbatim-files-from", "-T", str(listed)]
    words += ["--format=gnu", "-c"]
    return subprocess.check_output(words, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("writer", [archive_of, lambda top: shuffled(top, 3)], ids=["as it is walked", "shuffled"])
def test_any_tree(tmp_path: Path, seed: int, writer: Callable[[Path], bytes]) -> None:
    archive = writer(packable_tree(tmp_path / "tree", seed))
    found = kept(archive, tmp_path / "layer", piece=5000 + 997 * seed)
    assert found is not None
    assert (found.diff_id, found.size, found.blob) == (digest_of(archive), len(archive), BLOB)
    assert put_together(found, tmp_path / "layer") == archive


def odd() -> dict[str, bytes]:
    """Archives that are written in other ways than most, and are right nevertheless."""
    plain = Layer().add("d", None, 0o755).add("d/f", b"x" * 1000).add("g", b"")
    data = plain.done()
    (large := Layer()).add("b", os.urandom(3 << 20)).add("a", os.urandom((2 << 20) + 1)).add("c", os.urandom(700))
    padded = bytearray(data)
    padded[512 + 512 + 1000 : 512 + 512 + 1024] = b"what tapes had there...."
    whiteout = Layer().add(".wh.gone", b"not empty").add("f", b"f")
    comment = Layer(tarfile.PAX_FORMAT)
    comment.tar.pax_headers = {"comment": "of a git archive"}
    return {
        "no blocks at the end": data[: 5 * 512],
        "much behind the end": data + bytes(200_000) + b"more",
        "from the top": Layer().add(".", None, 0o755).add("./d", None, 0o755).add("./d/f", b"f").done(),
        "old": Layer(tarfile.USTAR_FORMAT).add("f", b"f", type=tarfile.AREGTYPE).done(),
        "large": large.done(),
        "something in the padding": bytes(padded),
        "a mark with contents": whiteout.done(),
        "links": Layer().add("z", b"z" * 600).hard("a", "z").link("l", "d").add("d", None).add("l/through", b"t" * 9).done(),
        "a comment for all": _with_global_header(),
        "a directory twice": Layer().add("d", None, 0o700).add("d/f", b"f").add("d", None, 0o755).done(),
        "nothing": Layer().done(),
    }


def _with_global_header() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of a commit"}) as tar:
        entry = tarfile.TarInfo("f")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    return made.getvalue()


@pytest.mark.parametrize("what", odd())
def test_whatever_is_not_in_files(tmp_path: Path, what: str) -> None:
    archive = odd()[what]
    found = kept(archive, tmp_path / "layer")
    assert found is not None
    assert put_together(found, tmp_path / "layer") == archive


SEEDS = [archive[:40_000] for archive in odd().values()]


def damaged(random: random.Random) -> bytes:
    """An archive of which something is changed, left out, there twice, or behind it; mostly with check sums that are right."""
    archive = bytearray(random.choice(SEEDS))
    for _ in range(random.randrange(4)):
        here = random.randrange(len(archive) or 1) // 512 * 512
        match random.randrange(4):
            case 0:
                archive[here : here + 1] = random.randbytes(1)
            case 1:
                del archive[here : here + 512 * random.randrange(1, 3)]
            case 2:
                archive[here:here] = random.choice(SEEDS)[: 512 * random.randrange(1, 6)]
            case _:
                archive += random.randbytes(random.randrange(3000))
    for here in range(0, len(archive) - 511, 512):
        block = archive[here : here + 512]
        if block[257:262] == b"ustar" and random.random() < 0.7:
            archive[here + 148 : here + 156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    return bytes(archive)


@given(st.randoms(use_true_random=True))
def test_of_any_archive_all_is_kept_or_in_files(random: random.Random) -> None:
    archive, step, files = damaged(random), random.randrange(1, 3000), list[bytes]()
    with tempfile.TemporaryDirectory() as place:
        fd = os.open(place, os.O_RDONLY)
        try:
            pieces = (archive[here : here + step] for here in range(0, len(archive), step))
            with closing(Recording(pieces, fd)) as stream:
                reader = TarReader(stream)
                while (entry := reader.next()) is not None:
                    if entry.kind == FILE and entry.spans is None and random.random() < 0.9:  # others are in no file
                        files.append(b"".join(bytes(piece) for _, piece in reader.data(entry)))
                        stream.in_file(b"%d" % (len(files) - 1), entry.size)
                stream.drain()
                stream.finish(digest_of(archive), None)
        except Unfit:
            return
        finally:
            os.close(fd)
        found = [kept + (files[int(path)] if path else b"") for kept, path, _ in original._rows(f"{place}/{ORIGINAL}")]
    assert b"".join(found) == archive


def test_of_what_replaces_other_entries_nothing_is_kept(tmp_path: Path) -> None:
    """The layer does not have what was replaced."""
    assert kept(Layer().add("f", b"one").add("f", b"two").done(), tmp_path / "layer") is None


@pytest.mark.parametrize("rest", [20_000, 100_000], ids=["at the end", "before"])
def test_of_more_than_can_be_kept_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: int) -> None:
    monkeypatch.setattr(original, "MOST", 10_000)
    archive = Layer().add("f", b"x").done() + os.urandom(rest)
    assert kept(archive, tmp_path / "layer") is None
    assert os.listdir(tmp_path / "layer-aside") == []


def test_of_what_is_known_by_another_hash_nothing_is_kept(command: Command, layout: Layout) -> None:
    """An export could not tell whether it is what it was."""
    tar = foreign()[0]
    layout.add("t", [tar])
    found = layout.blobs / json.loads((layout.blobs / layout.listed[0]["digest"][7:]).read_bytes())["config"]["digest"][7:]
    config = json.loads(found.read_bytes())
    config["rootfs"]["diff_ids"] = [f"sha512:{hashlib.sha512(tar).hexdigest()}"]
    manifest = json.loads((layout.blobs / layout.listed[0]["digest"][7:]).read_bytes())
    manifest["config"] = layout.document(config, "config.v1+json")
    layout.listed = [{**layout.listed[0], **layout.document(manifest, "manifest.v1+json")}]
    layout.write()
    (top,) = [command("import", f"oci:{layout.top}").strip()]
    assert original.ORIGINAL not in os.listdir(Path(os.readlink(f"{top}/diff")).parent)
    assert command("export", "--compression", "none", os.path.basename(top), f"oci-archive:{layout.top}.tar")


def test_what_became_of_it_is_seen(tmp_path: Path) -> None:
    """Whatever was written in the layer, or to what was kept, since: it is never passed off as the archive."""
    (archive := Layer()).add("a", b"a" * 5000).add("b", b"b" * 5000)
    data = archive.done()
    found = kept(data, layer := tmp_path / "layer")
    assert found is not None

    def now() -> bytes | None:
        try:
            return put_together(found, layer)
        except Differs:
            return None

    assert now() == data
    (layer / "b").write_bytes(b"c" * 5000)
    other = now()
    assert other is not None  # who takes it looks at its hash
    assert other != data
    (layer / "b").write_bytes(b"b" * 5001)
    assert now() is None
    (layer / "b").unlink()
    assert now() is None
    (layer / "b").write_bytes(b"b" * 5000)
    assert now() == data
    file = tmp_path / "layer-aside" / ORIGINAL
    whole = file.read_bytes()
    for cut in (HEADER, HEADER + 1, len(whole) - 5, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert now() is None, cut
    for place in range(HEADER, len(whole)):
        mangled = bytearray(whole)
        mangled[place] ^= 0xFF
        file.write_bytes(mangled)
        assert now() in (None, data), place
    file.write_bytes(whole[:HEADER] + zlib.compress(struct.pack("<IIQ", 1 << 31, 1, 1)))
    assert now() is None
    file.write_bytes(b"{}".ljust(HEADER))
    assert Original.find(str(file.parent)) is None
    file.unlink()
    os.mkfifo(file)
    assert Original.find(str(file.parent)) is None
    assert now() is None


# -- images


@pytest.fixture
def command(module_daemon: Daemon) -> Iterator[Command]:
    yield Command(module_daemon.mnt)
    remove_all(module_daemon.mnt)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "oci")


def foreign() -> list[bytes]:
    """Layers as others write them, in an order of their own, with fractions of seconds."""
    first = Layer(tarfile.PAX_FORMAT).add("z", b"z" * 700, pax_headers={"mtime": "7.25"}).add("d/", None, 0o755)
    first.add("d/f", os.urandom(9000), 0o4755).hard("d/a", "z")
    second = Layer(tarfile.GNU_FORMAT).add("d/.wh.f").add("n" * 130, b"long").add("new", b"x" * 511)
    return [first.done() + bytes(10_240), second.done()]


def image_in(layout: Path, tag: str) -> tuple[dict[str, Any], bytes, list[bytes]]:
    """Manifest, configuration, and the layers, unpacked, of an image in a layout."""

    def blob(named: dict[str, Any]) -> bytes:
        data: bytes = (layout / "blobs" / named["digest"].replace(":", "/")).read_bytes()
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == named["digest"]
        return data

    listed = json.loads((layout / "index.json").read_text())["manifests"]
    (found,) = [each for each in listed if each["annotations"]["org.opencontainers.image.ref.name"] == tag]
    manifest = json.loads(blob(found))
    tars = [blob(each) for each in manifest["layers"]]
    return manifest, blob(manifest["config"]), [gzip.decompress(tar) if tar[:2] == b"\x1f\x8b" else tar for tar in tars]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_an_image_leaves_as_it_came(command: Command, layout: Layout, tmp_path: Path, packed: bool) -> None:
    tars = foreign()
    layout.add("t", tars, packed=packed)
    command("import", f"oci:{layout.top}", "app:1")
    command("export", "images/app:1", f"oci:{tmp_path}/out:t")
    _, config, layers = image_in(tmp_path / "out", "t")
    assert layers == tars
    assert config == image_in(layout.top, "t")[1], "so it is the same image, by its id"
    command("export", "images/app:1", f"docker-archive:{tmp_path}/docker.tar:app:1")
    with tarfile.open(tmp_path / "docker.tar") as archive:
        for tar in tars:
            file = archive.extractfile(f"{digest_of(tar).partition(':')[2]}.tar")
            assert file is not None
            assert file.read() == tar
    assert not [name for name in os.listdir(command.mnt / "active")]


def test_what_stands_on_it_has_its_layers(command: Command, layout: Layout, tmp_path: Path) -> None:
    """A layout that has the image gets the child's layer alone; the history of the image goes on."""
    tars = foreign()
    layout.add("t", tars, packed=True)
    command("import", f"oci:{layout.top}", "app:1")
    os.mkdir(command.mnt / "images/app:1/active/w")
    (command.mnt / "active/w/rootfs/mine").write_text("mine")
    os.rename(command.mnt / "active/w", command.mnt / "committed/v1")
    blobs = set(os.listdir(layout.blobs))
    command("export", "v1", f"oci:{layout.top}:v1")
    manifest, config, layers = image_in(layout.top, "v1")
    assert layers[:2] == tars
    assert len(set(os.listdir(layout.blobs)) - blobs) == 3, "a layer, a configuration, a manifest"
    assert manifest["layers"][:2] == image_in(layout.top, "t")[0]["layers"]
    assert json.loads(config)["rootfs"]["diff_ids"] == list(map(digest_of, layers))


def test_a_layer_that_something_has_written_in_leaves_as_it_is(command: Command, layout: Layout, tmp_path: Path) -> None:
    tars = foreign()
    layout.add("t", tars)
    command("import", f"oci:{layout.top}", "app:1")
    names = chain_of(tars)
    diff = Path(os.readlink(command.mnt / f"committed/{names[0]}/diff"))
    changed = (diff / "d/f").stat()
    (diff / "d/f").write_bytes(bytes(9000))
    os.utime(diff / "d/f", ns=(changed.st_atime_ns, changed.st_mtime_ns))
    for place in (f"oci:{tmp_path}/out:t", f"docker-archive:{tmp_path}/docker.tar"):
        done = run("export", "--at", str(command.mnt), "images/app:1", place)
        assert done.returncode == 0
        assert done.stderr == (
            f'snapfs: "{names[0]}" is exported as it is now, and not as it was imported: a file of the layer has other contents'
            " than it came with\n"
        )
    layers = image_in(tmp_path / "out", "t")[2]
    assert layers == [(command.mnt / f"committed/{names[0]}/layer.tar").read_bytes(), tars[1]]
