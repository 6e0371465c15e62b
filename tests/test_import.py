"""Images become snapshots, a layer each: as containerd has them, found again, whole or not at all, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from snapfs.images import compression, fetching, layouts
from snapfs.images.limits import Limits
from snapfs.images.unfit import Unfit
from snapfs.kernel import beneath
from tests.command import SNAPFS, Command, OnATerminal, held
from tests.containerd_client import Containerd
from tests.daemon import Daemon
from tests.home import Home, home_of
from tests.images import MACHINE, Layer, Layout, archive_of, chain_of, digest_of, packable_tree
from tests.mounts import unanswering
from tests.processes import die_with_parent, until
from tests.rootfs import stats
from tests.syscalls import EVERY, KILL, Call, Server, running
from tests.tree import info, remove_all
from tests.trees import everything
from tests.users import ALICE, alice, run

pytestmark = pytest.mark.mounts

ROOMY = ("--max-ratio", "0")


@pytest.fixture
def command(module_daemon: Daemon) -> Iterator[Command]:
    yield Command(module_daemon.mnt)
    remove_all(module_daemon.mnt)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "oci")


def three() -> list[bytes]:
    """Layers that need each other."""
    first = Layer(tarfile.PAX_FORMAT).add("d", None, 0o2750, uid=7, gid=8, mtime=77).add("d/f", b"first", 0o4755, uid=9)
    first.add("gone", b"").add("e/old", b"old").link("l", "d/f").add("top", b"1")
    second = Layer().add("d/g", b"second").add(".wh.gone").hard("x/linked", "d/f").add("top", b"2")
    third = Layer().add("e", None, 0o700).add("e/.wh..wh..opq").add("e/new", b"new").add("top", b"3").add("d/.wh.g")
    return [each.done() for each in (first, second, third)]


def layer(mnt: Path, name: str) -> Path:
    """The files of a committed snapshot, as its layer has them."""
    return Path(os.readlink(mnt / f"committed/{name}/diff"))


def kept(mnt: Path) -> list[str]:
    """All snapshots."""
    return sorted(f"{kind}/{name}" for kind in ("active", "view", "committed") for name in os.listdir(mnt / kind))


def settled(mnt: Path, tars: list[bytes]) -> None:
    """There are these layers' snapshots and no others, each on the one below, with nothing left beside their files."""
    names = chain_of(tars)
    assert kept(mnt) == sorted(f"committed/{name}" for name in names)
    for below, name, tar in zip([None, *names], names, tars, strict=False):
        shown = info(mnt / "committed" / name)
        assert shown["parent"] == below
        assert shown["labels"] == {"snapfs.diff-id": digest_of(tar)}
        beside = os.listdir(layer(mnt, name).parent)  # an image has its configuration beside its last layer
        assert sorted(each for each in beside if not each.startswith("image-")) == ["fs", "original", "work"]


def test_each_layer_is_a_snapshot(command: Command, layout: Layout) -> None:
    tars = three()
    top = layout.add("t", tars)
    assert command("import", f"oci:{layout.top}") == f"{command.mnt}/committed/{top}\n"
    settled(command.mnt, tars)
    os.mkdir(command.mnt / f"committed/{top}/view/v")
    rootfs = command.mnt / "view/v/rootfs"
    assert {str(path.relative_to(rootfs)) for path in rootfs.rglob("*")} == {
        *("d", "d/f", "e", "e/new", "l", "top", "x", "x/linked"),
    }
    assert ((rootfs / "top").read_text(), (rootfs / "x/linked").read_text()) == ("3", "first")
    status = (rootfs / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime) == (0o2750, 7, 8, 77)
    assert (rootfs / "d/f").stat().st_ino == (rootfs / "x/linked").stat().st_ino


def test_what_is_there_is_found_again(command: Command, layout: Layout) -> None:
    tars = three()
    layout.add("small", tars[:2], packed=True)
    top = layout.add("large", tars)
    command("import", f"oci:{layout.top}:small")
    before = [layer(command.mnt, name) for name in chain_of(tars[:2])]
    assert command("import", f"oci:{layout.top}:large") == f"{command.mnt}/committed/{top}\n"
    assert [layer(command.mnt, name) for name in chain_of(tars[:2])] == before
    assert command("import", f"oci:{layout.top}:large") == f"{command.mnt}/committed/{top}\n"
    settled(command.mnt, tars)


@pytest.mark.parametrize("seed", range(2))
def test_a_layer_holds_all_that_its_tree_has(command: Command, layout: Layout, tmp_path: Path, seed: int) -> None:
    tree = packable_tree(tmp_path / "tree", seed)
    tars = [archive_of(tree)]
    command("import", f"oci:{layout.top}:{'t' if layout.add('t', tars, packed=True) else ''}")
    ours = everything(layer(command.mnt, chain_of(tars)[0]))
    for path, seen in everything(tree).items():
        if path != ".":
            assert isinstance(seen, tuple)
            assert [*ours[path][:3], *ours[path][4:]] == [*seen[:3], *seen[4:]]  # type: ignore[index]


# -- in which it comes


def gzipped(tar: bytes) -> bytes:
    return gzip.compress(tar[:1000]) + gzip.compress(tar[1000:])


def by_zstd(tar: bytes) -> bytes:
    packed = zstandard.ZstdCompressor().compress
    return b"\x50\x2a\x4d\x18\x04\0\0\0skip" + packed(tar[:1000]) + packed(tar[1000:])


@pytest.mark.parametrize(("by", "pack"), [("file", gzipped), ("pipe", bytes), ("pipe", by_zstd)], ids=["gzip", "plain", "zstd"])
def test_a_lone_layer(command: Command, tmp_path: Path, pack: Callable[[bytes], bytes], by: str) -> None:
    tars = three()[:2]
    names = chain_of(tars)
    parent: list[str] = []
    for tar, name in zip(tars, names, strict=True):
        (tmp_path / "layer").write_bytes(pack(tar))
        words = ["import", *parent]
        if by == "file":
            said = command(*words, str(tmp_path / "layer"))
        else:
            with open(tmp_path / "layer", "rb") as file:
                told = subprocess.run(
                    [*SNAPFS, *words, "-", "--at", command.mnt],
                    stdin=file,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=60,
                )
            said = told.stdout
        assert said == f"{command.mnt}/committed/{name}\n"
        parent = ["--parent", name]
    settled(command.mnt, tars)
    command("import", "--parent", names[0], str(tmp_path / "layer"))  # it is there
    settled(command.mnt, tars)
    command("import", "--parent", names[1], str(tmp_path / "layer"))  # on another it is another
    assert len(kept(command.mnt)) == 3


def test_gzip_without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_library", lambda *_: None)
    tar = three()[0]
    packed = io.BytesIO(gzipped(tar))
    assert b"".join(compression.unpacked(packed.read)) == tar
    with pytest.raises(Unfit, match="pip install zstandard"):
        compression.unpacked(io.BytesIO(by_zstd(tar)).read).__next__()
    with pytest.raises(Unfit, match="damaged"):
        b"".join(compression.unpacked(io.BytesIO(gzip.compress(tar)[:20] + b"x" * 100).read))
    assert zlib.adler32(tar)


def test_what_skopeo_writes(command: Command, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same image, in each form, by another program; and what it fetches itself."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    tars = three()
    top = layout.add("t", tars)
    for form, packed in (("docker-archive", False), ("oci-archive", True), ("dir", True), ("oci", True)):
        place = f"{form}:{tmp_path}/by-skopeo-{form}{':x:t' * (form == 'docker-archive')}"
        subprocess.run(
            ["skopeo", "copy", "--quiet", *(["--dest-compress"] * packed), f"oci:{layout.top}:t", place], check=True, timeout=60
        )
        assert command("import", f"{form}:{tmp_path}/by-skopeo-{form}") == f"{command.mnt}/committed/{top}\n"
        settled(command.mnt, tars)
        remove_all(command.mnt)
    written = tmp_path / "by-skopeo-docker-archive"
    with open(written, "rb") as file, gzip.open(tmp_path / "packed", "wb") as packed_file:
        shutil.copyfileobj(file, packed_file)
    assert command("import", f"docker-archive:{tmp_path}/packed:x:t") == f"{command.mnt}/committed/{top}\n"
    assert command("import", f"docker-archive:{written}:docker.io/library/x:t")
    assert 'no image "y:t"' in command("import", f"docker-archive:{written}:y:t", status=1)
    assert os.listdir(tmp_path / "spool") == []


IMPLIED = ((1, "e"), (2, "d"))
"""Directories of which a layer says nothing: containerd lets them have been changed when it fills them."""


def test_as_containerd_unpacks_it(command: Command, layout: Layout, tmp_path: Path) -> None:
    """File by file: what kinds, owners, modes, times, attributes, links and devices there are in each layer."""
    tree = packable_tree(tmp_path / "tree", 3)
    first = (
        Layer(tarfile.PAX_FORMAT).add("d", None, 0o2750, uid=7, gid=8, mtime=77).add("d/f", b"first", 0o4755, uid=9, mtime=78)
    )
    for number, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)):
        first.add(f"n{number}", type=kind, devmajor=200 + number, devminor=70_000 + number, mtime=5, uid=3)
    first.add("gone", b"").add("e/old", b"").add("lib", None, mtime=9).link("bin", "lib", mtime=7, uid=5)
    first.add("bin/through", b"x", mtime=9).add("x\ny", b"", pax_headers={"SCHILY.xattr.user.n": "v", "mtime": "5.123456789"})
    second = Layer().add("d/g", b"second", mtime=5).add(".wh.gone", mtime=5).add("e", None, mtime=6)
    second.add("e/.wh..wh..opq").add("e/new", b"", mtime=8).add("d/h", None, 0o1777, mtime=9, uid=60_001)
    tars = [archive_of(tree), first.done(), second.done()]
    names = chain_of(tars)
    layout.add("t", tars)
    command("import", f"oci:{layout.top}")
    containerd = Containerd(tmp_path / "c", "bookworm", tmp_path / "none.sock")
    try:
        containerd.start()
        containerd.ctr("image", "import", "--snapshotter", "overlayfs", str(layout.archive(tmp_path / "image.tar")))
        for nth, name in enumerate(names):
            containerd.ctr("snapshots", "--snapshotter", "overlayfs", "prepare", f"on-{nth}", name)
            told = containerd.ctr("snapshots", "--snapshotter", "overlayfs", "mounts", "/x", f"on-{nth}")
            found = re.search(r"lowerdir=([^:,\s]+)", told)
            assert found is not None, told
            theirs, ours = everything(Path(found[1])), everything(layer(command.mnt, name))
            assert ours.keys() == theirs.keys()
            for path, seen in theirs.items():
                status = (Path(found[1]) / path).lstat()
                if path == "." or (nth, path) in IMPLIED or (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0):
                    assert (nth, path, ours[path][:2]) == (nth, path, seen[:2])  # type: ignore[index]
                else:
                    assert (nth, path, ours[path]) == (nth, path, seen)
    finally:
        containerd.cleanup()


# -- what is refused: a sentence, and nothing has changed


def refused(command: Command, *arguments: str, status: int = 1) -> str:
    before = kept(command.mnt)
    said = command("import", *arguments, status=status)
    assert re.fullmatch(r"snapfs: [^\n]+\n", said), said
    assert kept(command.mnt) == before
    return said


def test_what_is_no_image(command: Command, layout: Layout, tmp_path: Path) -> None:
    top, tars = f"oci:{layout.top}", three()
    assert "has no image" in refused(command, top)
    layout.add("a", tars)
    layout.add("b", tars[:1])
    assert 'has no image "c"; there are a, b, test.local/a, test.local/b' in refused(command, f"{top}:c")
    assert "several images: say which, as in oci:DIR:TAG" in refused(command, top)
    assert "is neither a file nor an image" in refused(command, "nonsense", status=2)
    assert "no such file" in refused(command, str(tmp_path / "x.tar"), status=3)
    assert "it is the archive of an image, and none of a layer" in refused(command, str(layout.archive(tmp_path / "image.tar")))
    assert "No such file" in refused(command, f"oci:{tmp_path}/none", status=3)
    assert "is no OCI layout" in refused(command, f"oci:{tmp_path}")
    assert f"as a layout of images it is oci:{layout.top}" in refused(command, str(layout.top))
    assert "--parent is for a lone one" in refused(command, "--parent", "p", f"{top}:a", status=2)
    (tmp_path / "text").write_text("no archive " * 100)
    assert 'snapshot "p" does not exist' in refused(command, "--parent", "p", str(tmp_path / "text"), status=3)
    assert "none: " in refused(command, str(tmp_path / "text"))
    (tmp_path / "text.xz").write_bytes(b"\xfd7zXZ\0" + b"x" * 100)
    assert "packed by xz" in refused(command, str(tmp_path / "text.xz"))
    for wrong in ("20Q", "-1", "x"):
        assert "wants a number" in refused(command, f"--max-size={wrong}", f"{top}:a", status=2)
    command("prepare", "p")
    command("commit", "p", "p")
    assert "was not imported" in refused(command, "--parent", "p", str(tmp_path / "text"), status=6)


@pytest.mark.parametrize("change", ["lost", "longer", "another", "manifest", "config", "diff", "kind", "count"])
def test_what_is_damaged(command: Command, layout: Layout, change: str) -> None:
    tars = three()
    layout.add("t", tars, packed=change == "diff")
    blobs = {path: json.loads(path.read_bytes()) for path in layout.blobs.iterdir() if path.read_bytes()[:1] == b"{"}
    manifest = next(each for each in blobs.values() if "layers" in each)
    config = next(path for path, each in blobs.items() if "rootfs" in each)
    blob = layout.blobs / manifest["layers"][1]["digest"].partition(":")[2]
    if change == "lost":
        blob.unlink()
    elif change == "longer":
        blob.write_bytes(blob.read_bytes() + b"x")
    elif change == "another":
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    elif change == "manifest":
        (layout.blobs / layout.listed[0]["digest"].partition(":")[2]).write_bytes(b"x" * layout.listed[0]["size"])
    elif change == "config":
        config.write_bytes(config.read_bytes().replace(b"linux", b"linuy"))
    else:
        told = blobs[config]
        if change == "diff":
            told["rootfs"]["diff_ids"][1] = digest_of(b"another")
        elif change == "count":
            told["rootfs"]["diff_ids"].pop()
        else:
            manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart"
        manifest["config"] = layout.document(told, "config.v1+json")
        layout.listed[0] |= layout.document(manifest, "manifest.v1+json")
        layout.write()
    why = {
        **{"lost": "lacks the blob", "longer": "it is cut off, or another", "another": "layer 2 of 3: it is damaged: its blob"},
        **{"manifest": "its digest is not", "config": "its digest is not", "diff": "layer 2 of 3: unpacked it hashes to"},
        **{"kind": "no archive of files", "count": "tells of 2 layers"},
    }
    assert why[change] in refused(command, f"oci:{layout.top}")
    assert kept(command.mnt) == []


@pytest.mark.parametrize(
    ("pack", "cut"),
    [(bytes, 512), (bytes, 1700), (bytes, 5000), (bytes, -1024), (gzip.compress, 5000), (gzip.compress, -10), (by_zstd, 5000)],
    ids=["header", "data", "large", "end", "gzip", "checksum", "zstd"],
)
def test_an_archive_that_is_cut_off(command: Command, tmp_path: Path, pack: Callable[[bytes], bytes], cut: int) -> None:
    tar = Layer(tarfile.PAX_FORMAT).add("x", b"x" * 600).add("y", os.urandom(9000)).done().rstrip(b"\0") + bytes(1024)
    tar += bytes(-len(tar) % 512)
    (tmp_path / "layer").write_bytes(pack(tar)[:cut])
    assert "cut off" in refused(command, str(tmp_path / "layer"))


def test_a_layer_that_is_hostile(command: Command, layout: Layout) -> None:
    """What stands in the middle of an image takes all of it along."""
    layout.add("t", [three()[0], Layer().add("ok", b"").link("etc", "/etc").add("etc/x", b"").done(), three()[2]])
    said = refused(command, f"oci:{layout.top}")
    assert "layer 2 of 3: etc/x leads through the link etc to /etc, out of the layer" in said
    assert not os.path.exists("/etc/x")
    assert kept(command.mnt) == []


def test_bombs(command: Command, layout: Layout, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb", "wb", 9) as file:
        file.write(Layer().add("zeros", bytes(70 << 20)).done())
    assert "more than 200 times what it takes packed" in refused(command, str(tmp_path / "bomb"))
    assert "more than 1048576 bytes, as many as --max-size" in refused(command, "--max-size=1M", *ROOMY, str(tmp_path / "bomb"))
    tar = Layer()
    for number in range(300):
        tar.add(f"{number}/x", b"")
    layout.add("t", [tar.done(), three()[0]])
    assert "more than 400 files, as many as --max-files" in refused(command, "--max-files=400", f"oci:{layout.top}")
    command("import", *ROOMY, str(tmp_path / "bomb"))


def test_bombs_on_their_way(command: Command, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an archive of an image becomes before its layers are unpacked counts, and what skopeo fetches."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    layout.add("t", [Layer().add("zeros", bytes(70 << 20)).done()])
    with layout.archive(tmp_path / "tar").open("rb") as file, gzip.open(tmp_path / "bomb", "wb") as packed:
        shutil.copyfileobj(file, packed)
    assert "more than 200 times what it takes packed" in refused(command, f"oci-archive:{tmp_path}/bomb")
    for words in ((f"oci-archive:{tmp_path}/bomb", *ROOMY), (f"docker-archive:{tmp_path}/bomb", *ROOMY)):
        assert "unpacked it takes more than 1048576 bytes, as many as --max-size" in refused(command, "--max-size=1M", *words)
    place = f"dir:{tmp_path}/copied"
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout.top}:t", place], check=True)
    assert "what is fetched takes more than 1048576 bytes, as many as --max-size" in refused(command, "--max-size=1M", place)
    assert os.listdir(tmp_path / "spool") == []


def test_all_that_an_import_writes_counts(
    command: Command, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unpacked, or fetched, on the way, with the layers, and with what their hard links bring up."""
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    data = os.urandom(700_000)
    layout.add("t", [Layer().add("f", data).done(), Layer().hard("g", "f").done()])
    with layout.archive(tmp_path / "tar").open("rb") as file, gzip.open(tmp_path / "packed", "wb", 1) as packed:
        shutil.copyfileobj(file, packed)
    place = f"dir:{tmp_path}/copied"
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout.top}:t", place], check=True)
    for source in (f"oci-archive:{tmp_path}/packed", place):
        assert "2000000 bytes with the 7" in refused(command, "--max-size=2000000", source)
    command("import", "--max-size=2300K", source)
    remove_all(command.mnt)
    assert "layer 2 of 2: unpacked it takes more than 1200000 bytes" in refused(
        command, "--max-size=1200000", f"oci:{layout.top}"
    )
    command("import", "--max-size=1410000", f"oci:{layout.top}")
    assert os.listdir(tmp_path / "spool") == []


def test_files_that_are_none(command: Command, layout: Layout, tmp_path: Path) -> None:
    """Links, FIFOs and devices where a layout, or an archive, has a file: they are not opened."""
    layout.add("t", three())
    [listed] = layout.listed
    blob = layout.blobs / listed["digest"].partition(":")[2]

    def why() -> str:
        with pytest.raises(Unfit) as unfit:
            layouts.oci_image(layouts.DirectoryFiles(str(layout.top)), "", foreign=False)
        return str(unfit.value)

    for path in (layout.top / "oci-layout", layout.top / "index.json", blob, layout.blobs):
        kept_as = path.rename(tmp_path / "kept")
        path.symlink_to(kept_as)
        assert re.search("symbolic link.* may lead anywhere: cp -rL makes a copy", why())
        path.unlink()
        if path != layout.blobs:
            for kind in (stat.S_IFIFO, stat.S_IFCHR):
                os.mknod(path, kind | 0o600, os.makedev(1, 7))
                assert why() == f"{path} is no regular file"
                path.unlink()
        kept_as.rename(path)
    layouts.oci_image(layouts.DirectoryFiles(str(layout.top)), "", foreign=False)
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 7))
    for name in ("fifo", "device"):
        with pytest.raises(Unfit, match="it is no regular file: cat can give it to /dev/stdin"):
            layouts.ArchiveFiles(str(tmp_path / name), Limits(0, 0, 0))
    assert "it is no regular file: cat can give it" in refused(command, str(tmp_path / "fifo"))


def test_an_archive_by_a_pipe(command: Command, layout: Layout, tmp_path: Path) -> None:
    top = layout.add("t", three())
    with layout.archive(tmp_path / "tar").open("rb") as file:
        words = [*SNAPFS, "import", "oci-archive:/dev/stdin", "--at", str(command.mnt)]
        with subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat:
            said = subprocess.run(words, stdin=cat.stdout, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout == f"{command.mnt}/committed/{top}\n"


def test_a_server_in_a_layout(command: Command, layout: Layout) -> None:
    """What is mounted in a layout is not asked."""
    layout.add("t", three())
    with unanswering(layout.blobs):
        assert f"is in another file system, which is mounted in {layout.top}" in refused(command, f"oci:{layout.top}")


def copied(layout: Layout, path: Path) -> str:
    """The image ``t`` in the form dir:, which is of skopeo's own, and the layer in it at its blob's name."""
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout.top}:t", f"dir:{path}"], check=True)
    return f"dir:{path}"


def test_what_would_be_fetched_is_asked_first(
    layout: Layout, tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.add("t", [Layer().add("f", os.urandom(1 << 20)).done()])
    place, limits, ran = copied(layout, tmp_path / "copied"), Limits(1 << 20, 0, 0), list[str]()
    run, wanted = fetching._ran, functools.partial(limits.spend, what="what is fetched takes")

    def noted(command: list[str], *more: Any, **named: Any) -> tuple[bytes, str]:
        ran.append(command[1])
        return run(command, *more, **named)

    monkeypatch.setattr(fetching, "_ran", noted)
    with (
        pytest.raises(Unfit, match="what is fetched takes more than 1048576 bytes"),
        fetching.fetched(place, foreign=False, known=len, wanted=wanted, told=lambda _: None),
    ):
        pass
    assert ran == ["inspect"]
    assert os.listdir(spool) == []


def test_more_is_fetched_than_was_told(command: Command, layout: Layout, tmp_path: Path, spool: Path) -> None:
    layout.add("t", [Layer().add("f", b"").done()])
    place = copied(layout, tmp_path / "copied")
    manifest = json.loads((tmp_path / "copied/manifest.json").read_bytes())
    os.truncate(tmp_path / "copied" / manifest["layers"][0]["digest"].partition(":")[2], 4 << 30)
    assert "what is fetched takes more than 1048576 bytes" in refused(command, "--max-size=1M", place)
    assert os.listdir(spool) == []


@pytest.fixture
def endless_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins to fetch, and goes on for ever."""
    script = tmp_path / "bin/skopeo"
    script.parent.mkdir()
    lines = '[ "$1" = copy ] || { echo {}; exit 0; }', 'mkdir -p "$TMPDIR/oci/blobs"', 'echo >"$TMPDIR/oci/blobs/x"'
    script.write_text("\n".join(("#!/bin/sh", *lines, "exec sleep 1000", "")))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("endless_skopeo")
def test_skopeo_that_comes_to_no_end(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", 1.0)
    with (
        pytest.raises(Unfit, match=r"skopeo can't fetch it: it has fetched nothing for 1 seconds, and was ended$"),
        fetching.fetched("dir:/nowhere", foreign=False, known=len, wanted=lambda _: None, told=lambda _: None),
    ):
        pass
    assert os.listdir(spool) == [], "what it keeps for itself is there, too"


@pytest.mark.usefixtures("endless_skopeo")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_was_fetched_goes_with_a_signal(command: Command, spool: Path, number: signal.Signals) -> None:
    words = [*SNAPFS, "import", "--at", str(command.mnt), "dir:/nowhere"]
    with subprocess.Popen(words, preexec_fn=die_with_parent, stderr=subprocess.DEVNULL) as process:
        until(lambda: bool(list(spool.glob("snapfs-image-*/oci/blobs/x"))))
        process.send_signal(number)
        assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    assert os.listdir(spool) == []
    assert kept(command.mnt) == []


def test_files_that_are_none_are_not_for_skopeo(command: Command, layout: Layout, tmp_path: Path, spool: Path) -> None:
    layout.add("t", [Layer().add("f", b"").done()])
    place, strange = copied(layout, tmp_path / "copied"), tmp_path / "copied" / ("1" * 64)
    os.mkfifo(strange)
    assert f"{strange} is no regular file" in refused(command, place)
    strange.unlink()
    strange.symlink_to("/dev/full")
    assert f"{strange} is a symbolic link, which may lead anywhere" in refused(command, place)
    assert os.listdir(spool) == []


def test_a_server_where_imports_keep_what_they_fetch(command: Command, layout: Layout, tmp_path: Path, spool: Path) -> None:
    """It has a name like theirs, and is not asked whose it is."""
    layout.add("t", three())
    (spool / "snapfs-image-x").mkdir()
    (spool / "snapfs-export-x").mkdir()
    with unanswering(spool / "snapfs-image-x", spool / "snapfs-export-x"):
        command("import", copied(layout, tmp_path / "copied"), "app")
        command("export", "images/app", f"dir:{tmp_path}/out")


@pytest.mark.parametrize("more", [{"x": "y" * (4 << 20)}, {"x": "\ud800"}, {"history": 5}], ids=["long", "surrogate", "shape"])
def test_a_configuration_that_can_not_be_kept(command: Command, layout: Layout, more: dict[str, object]) -> None:
    """It is refused before anything is unpacked."""
    layout.add("t", three())
    manifest = json.loads((layout.blobs / layout.listed[0]["digest"].partition(":")[2]).read_bytes())
    config = json.loads((layout.blobs / manifest["config"]["digest"].partition(":")[2]).read_bytes())
    manifest["config"] = layout.document({**config, **more}, "config.v1+json")
    layout.listed[0] |= layout.document(manifest, "manifest.v1+json")
    layout.write()
    assert "its configuration can't be kept: image.json " in refused(command, f"oci:{layout.top}", "app")
    assert (kept(command.mnt), os.listdir(command.mnt / "images")) == ([], [])


def test_names_of_an_archive_are_bounded(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.add("t", three())
    monkeypatch.setattr(layouts, "MOST_NAMES", 2000)
    assert layouts.ArchiveFiles(str(layout.archive(tmp_path / "tar")), Limits(0, 0, 0)).find("index.json")
    tar = Layer()
    for number in range(40):
        tar.link("n" * 30 + str(number), "t" * 30)
    (tmp_path / "links").write_bytes(tar.done())
    with pytest.raises(Unfit, match="take more than 2000 bytes"):
        layouts.ArchiveFiles(str(tmp_path / "links"), Limits(0, 0, 0))


HOSTILE = "\x1b[2J\ud800" * 100_000


@pytest.mark.parametrize(
    "told",
    [
        *(
            [{"RepoTags": 5}],
            [{"RepoTags": {"a": 1}}],
            [{"RepoTags": [["a"]]}, {"RepoTags": [5]}],
            [{"Layers": 5, "Config": "x"}],
        ),
        *([{"Config": 5}], [{"Config": HOSTILE}], [{"RepoTags": [HOSTILE]}, {"RepoTags": ["b"]}], [{"Config": "a\0b"}]),
        *([{"Config": "manifest.json", "Layers": {"manifest.json": 1}}], {"a": 1}, [], 5, [5]),
    ],
)
def test_a_manifest_of_dockers_that_is_none(tmp_path: Path, told: object) -> None:
    (tmp_path / "tar").write_bytes(Layer().add("manifest.json", json.dumps(told).encode()).done())
    for tag in ("", "x"):
        with pytest.raises(Unfit) as unfit:
            layouts.docker_image(layouts.ArchiveFiles(str(tmp_path / "tar"), Limits(0, 0, 0)), tag, foreign=False)
        assert str(unfit.value).isprintable()
        assert len(str(unfit.value)) < 2000


@pytest.mark.parametrize("where", ["architecture", "platform", "tag", "kind", "size"])
def test_what_an_image_says_is_cut(layout: Layout, where: str) -> None:
    layout.add(HOSTILE if where == "tag" else "t", three(), machine=HOSTILE if where == "architecture" else MACHINE)
    if where == "tag":
        layout.add("b", three()[:1])
    elif where == "platform":
        layout.listed[0]["platform"] = {"os": [HOSTILE], "architecture": {"a": HOSTILE}}
    elif where == "size":
        layout.listed[0]["size"] = 10**4000
    elif where == "kind":
        manifest = json.loads((layout.blobs / layout.listed[0]["digest"].partition(":")[2]).read_bytes())
        manifest["layers"][0]["mediaType"] = HOSTILE
        layout.listed[0] |= layout.document(manifest, "manifest.v1+json")
    layout.write()
    with pytest.raises(Unfit) as unfit:
        layouts.oci_image(layouts.DirectoryFiles(str(layout.top)), "", foreign=False)
    assert str(unfit.value).isprintable()
    assert len(str(unfit.value)) < 2000


def test_an_image_for_another_machine(command: Command, layout: Layout) -> None:
    other = "s390x"
    top = layout.add("t", three(), machine=other)
    said = refused(command, f"oci:{layout.top}")
    assert f"the image is for linux/{other}, and this machine is linux/{MACHINE}: --force takes it nevertheless" in said
    assert command("import", "--force", f"oci:{layout.top}") == f"{command.mnt}/committed/{top}\n"
    remove_all(command.mnt)
    ours, theirs = three()[:2], three()[:1]
    both = [
        {**layout.manifest(tars, machine=machine), "platform": {"os": "linux", "architecture": machine}}
        for tars, machine in ((theirs, other), (ours, MACHINE))
    ]
    both.append({**layout.manifest(theirs), "platform": {"os": "unknown", "architecture": "unknown"}})
    layout.listed = [{**layout.document({"manifests": each}, "index.v1+json")} for each in (both, both[:1])]
    for each, tag in zip(layout.listed, ("both", "theirs"), strict=True):
        each["annotations"] = {"org.opencontainers.image.ref.name": tag}
    layout.write()
    assert command("import", f"oci:{layout.top}:both").endswith(f"{chain_of(ours)[-1]}\n")
    assert f"the image is for linux/{other}, and" in refused(command, f"oci:{layout.top}:theirs")
    assert command("import", "--force", f"oci:{layout.top}:theirs").endswith(f"{chain_of(theirs)[-1]}\n")


def test_skopeo_and_what_it_does_not_know(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = "an image of a registry is docker://HOST/NAME:TAG, as docker://docker.io/library/alpine:3.20"
    for place in ("nowhere:x", "alpine:3.20"):
        said = refused(command, place)
        assert f'"{place.partition(":")[0]}" is no transport that is known: oci docker ' in said
        assert said.endswith(f" are some; {registry}\n")
    assert "skopeo can't fetch it: " in refused(command, f"dir:{tmp_path}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "skopeo is not installed, which knows docker: images" in refused(command, "docker://host/name:tag")
    assert '"nowhere" is no transport that is known' in refused(command, "nowhere:x")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            'pinging registry: Get \\"https://r/v2/\\": http: server gave HTTP response to HTTPS client',
            "it has no TLS; ~/.config/containers/registries.conf can say so",
        ),
        ("reading manifest 1 in r/a: unauthorized: authentication required", "skopeo login HOST, once"),
        (
            "getting username: 1 error occurred:\\n\\t* open auth.json: denied\\n\\n",
            "1 error occurred: * open auth.json: denied",
        ),
    ],
)
def test_what_skopeo_says(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, shown: str) -> None:
    """What to do is said with it, and its lines become one."""
    (tmp_path / "said").write_text(f'time="2026-11-30T07:05:19Z" level=fatal msg="{words}"\n')
    (tmp_path / "skopeo").write_text(f"#!/bin/sh\ncat {tmp_path}/said >&2; exit 1\n")
    (tmp_path / "skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert shown in refused(command, "docker://r/a:1")


def test_what_is_there_in_no_form(command: Command, tmp_path: Path) -> None:
    """Each refusal says what was meant, perhaps."""
    (tmp_path / "empty").touch()
    assert "there is nothing in it" in refused(command, f"{tmp_path}/empty")
    for transport in ("oci", "oci-archive", "docker-archive"):
        assert "it says no path" in refused(command, f"{transport}:")
    image = "docker.io/library/alpine:3.20"
    said = refused(command, image, status=3)
    assert said == f"snapfs: cannot import {image}: there is no such file; an image of a registry is docker://{image}\n"
    for path in (f"{tmp_path}/none", "./a.b/none", "a.b/none.tar"):
        assert refused(command, path, status=3) == f"snapfs: cannot import {path}: there is no such file\n"


def test_another_snapshot_with_that_name(command: Command, layout: Layout) -> None:
    top = layout.add("t", three())
    command("prepare", "p")
    command("commit", "p", top)
    assert "already exists (committed), and no import has made it: rename or remove it" in refused(
        command, f"oci:{layout.top}", status=4
    )


def test_a_full_disk(make_daemon: Callable[..., Daemon], small_disk: Path, layout: Layout) -> None:
    daemon = make_daemon(root=small_disk / "root").start()
    command, tars = Command(daemon.mnt), [*three(), Layer().add("big", os.urandom(64 << 20)).done()]
    layout.add("large", tars)
    layout.add("small", tars[:3])
    assert "layer 4 of 4: No space left on device; nothing is kept of it" in refused(command, f"oci:{layout.top}:large")
    assert kept(daemon.mnt) == []
    (daemon.mnt / ".snapfs/cleanup").write_text("1")
    command("import", f"oci:{layout.top}:small")
    settled(daemon.mnt, tars[:3])
    assert daemon.stop() == 0


def test_no_place_on_the_way(command: Command, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to set is said; and what is set to nothing is not set."""
    layout.add("t", [Layer().add("f").done()])
    with layout.archive(tmp_path / "tar").open("rb") as file, gzip.open(tmp_path / "packed", "wb", 1) as packed:
        shutil.copyfileobj(file, packed)
    places = f"dir:{tmp_path}/new", f"oci-archive:{tmp_path}/packed"
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/none")
    said = f"{tmp_path}/none, where images are kept meanwhile: No such file or directory: $TMPDIR names another place\n"
    for place in places:
        assert refused(command, place) == f"snapfs: cannot import {place}: {said}"
    command("prepare", "w")
    command("commit", "w", "v1")
    assert command("export", "v1", "docker://localhost:1/v1", status=1) == f"snapfs: {said}"
    monkeypatch.setenv("TMPDIR", "")
    command("import", places[1])


def test_a_full_disk_on_the_way(
    command: Command, small_disk: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where archives are unpacked first, and where skopeo puts what it fetches."""
    monkeypatch.setenv("TMPDIR", str(small_disk))
    before = os.listdir(small_disk)
    layout.add("t", [Layer().add("big", os.urandom(32 << 20)).done()])
    with layout.archive(tmp_path / "tar").open("rb") as file, gzip.open(tmp_path / "packed", "wb", 1) as packed:
        shutil.copyfileobj(file, packed)
    said = refused(command, f"oci-archive:{tmp_path}/packed")
    assert f"{small_disk}, where it is unpacked first: No space left on device: $TMPDIR names another place" in said
    place = f"dir:{tmp_path}/copied"
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout.top}:t", place], check=True)
    said = refused(command, place)
    assert f"{small_disk}/snapfs-image-" in said
    assert "no space left on device" in said
    assert os.listdir(small_disk) == before


def test_more_layers_than_can_be_mounted(command: Command, layout: Layout) -> None:
    tars = [Layer().add(f"{number}", b"").done() for number in range(501)]
    layout.add("many", tars)
    assert "more than the kernel can mount together (500)" in refused(command, f"oci:{layout.top}")
    assert kept(command.mnt) == []


def test_each_layer_takes_the_same(make_daemon: Callable[..., Daemon], layout: Layout) -> None:
    """However many there are: the tree is asked no more of each."""
    daemon = make_daemon().start()
    asked = []
    for count in (8, 24):
        layout.add(f"{count}", [Layer().add(f"d/{count}-{number}", b"").done() for number in range(count)])
        before = sum(each["count"] for each in stats(daemon)["operations"].values())
        Command(daemon.mnt)("import", f"oci:{layout.top}:{count}")
        asked.append((sum(each["count"] for each in stats(daemon)["operations"].values()) - before) / count)
    assert max(asked) < 55, asked
    assert asked[1] < asked[0] + 2, asked


# -- several at once, and kills


def test_several_of_the_same_at_once(command: Command, layout: Layout) -> None:
    tars = three()
    layout.add("a", tars)
    layout.add("b", tars[:2])
    words = [[*SNAPFS, "import", "--at", str(command.mnt), f"oci:{layout.top}:{tag}"] for tag in "abab"]
    started = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in words]
    said = [(process.communicate(timeout=60), process.returncode) for process in started]
    assert [status for _, status in said] == [0] * 4, said
    settled(command.mnt, tars)


def test_what_another_import_is_at(command: Command, layout: Layout) -> None:
    """It waits for the end of that, and says which process it is."""
    tars = three()
    layout.add("t", tars)
    key = command.mnt / f"active/import-{chain_of(tars)[0].partition(':')[2]}"
    os.mkdir(key)
    fd = os.open(Path(os.readlink(key / "diff")).parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    waiting = OnATerminal("import", "--at", str(command.mnt), f"oci:{layout.top}")
    said = b""
    while f"(process {os.getpid()})".encode() not in said:
        said += os.read(waiting.master, 4096)
    assert b"waiting: another import has" in said
    os.close(fd)
    assert chain_of(tars)[-1] in waiting.said()
    settled(command.mnt, tars)


def test_nobody_is_waited_for_who_has_the_draft_locked_in_the_tree(command: Command, layout: Layout) -> None:
    """Whoever may read a directory can lock it, and the tree's everybody may whom it lets in."""
    tars = three()
    layout.add("t", tars)
    key = command.mnt / f"active/import-{chain_of(tars)[0].partition(':')[2]}"
    os.mkdir(key)
    fd = os.open(key, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        command("import", f"oci:{layout.top}")
    finally:
        os.close(fd)
    settled(command.mnt, tars)


def test_progress_is_told(command: Command, layout: Layout) -> None:
    layout.add("t", three())
    said = OnATerminal("import", "--at", str(command.mnt), f"oci:{layout.top}").said()
    assert re.search(r"unpacking, \d of 3 layers are done: \d+ files, ", said), said


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(["snapfs.cli.importing", "tests.command"]) as started:
        yield started


def test_killed_between_any_two_calls(command: Command, server: Server, layout: Layout) -> None:
    """What is committed is whole, and the next call goes on, and leaves nothing behind."""
    tars, mnt = three()[:2], command.mnt
    layout.add("t", tars)
    command("import", f"oci:{layout.top}")
    expected = {name: everything(layer(mnt, name)) for name in chain_of(tars)}
    remove_all(mnt)
    nth, is_done = 1, False
    while not is_done:
        with server.started(held, str(mnt), "import", f"oci:{layout.top}") as process:
            process.hold(lambda call, nth=nth: KILL if call.nth == nth else None)  # type: ignore[misc]
            is_done = ["status", 0] in process.said
            assert process.errors() == []
        for name in os.listdir(mnt / "committed"):
            assert alike(everything(layer(mnt, name)), expected[name])
        with server.started(held, str(mnt), "import", f"oci:{layout.top}") as process:
            process.hold()
            assert ["status", 0] in process.said
        settled(mnt, tars)
        for name in chain_of(tars):
            assert alike(everything(layer(mnt, name)), expected[name])
        remove_all(mnt)
        nth += 1 if EVERY == 1 else 1 + nth // 2
    assert nth > 40


def alike(found: dict[str, object], expected: dict[str, object]) -> bool:
    """But for when whiteouts were made, and directories of which no layer tells."""
    untold = (".", "x", "e", "gone")
    return {path: seen for path, seen in found.items() if path not in untold} == {
        path: seen for path, seen in expected.items() if path not in untold
    }


def test_what_a_killed_one_has_unpacked_is_not_unpacked_again(command: Command, server: Server, layout: Layout) -> None:
    tars, mnt = three(), command.mnt
    layout.add("t", tars)

    def decide(call: Call) -> int | None:
        return KILL if call.name == "renameat" and "import-" in str(call) else None

    with server.started(held, str(mnt), "import", f"oci:{layout.top}") as process:
        assert process.hold(decide)
    left = {name: os.readlink(mnt / f"active/{name}/diff") for name in os.listdir(mnt / "active")}
    assert len(left) == 3
    command("import", f"oci:{layout.top}")
    settled(mnt, tars)
    assert {str(layer(mnt, name)) for name in chain_of(tars)} == set(left.values())


def test_what_is_left_of_another_goes(command: Command, server: Server, layout: Layout) -> None:
    layout.add("a", three())
    layout.add("b", [Layer().add("b", b"").done()])
    with server.started(held, str(command.mnt), "import", f"oci:{layout.top}:a") as process:
        process.hold(lambda call: KILL if call.name == "mknodat" else None)
    assert any(name.startswith("import-") for name in os.listdir(command.mnt / "active"))
    command("import", f"oci:{layout.top}:b")
    settled(command.mnt, [Layer().add("b", b"").done()])


def test_interrupted(command: Command, server: Server, layout: Layout) -> None:
    layout.add("t", three())
    told: list[str] = []

    def decide(call: Call) -> None:
        if call.name == "symlinkat" and not told:
            told.append(str(call))
            process.signal(signal.SIGINT)

    with server.started(held, str(command.mnt), "import", f"oci:{layout.top}") as process:
        process.hold(decide)
        assert process.errors() == []
        assert told
        assert ["status", 130] in process.said
    assert os.listdir(command.mnt / "committed") == []
    command("import", f"oci:{layout.top}")  # there may be a draft, if it came as that was made
    settled(command.mnt, three())


def test_an_interrupt_while_a_process_is_forked_is_not_lost() -> None:
    """It comes while a hook runs, as Python's own do after each fork."""
    program = """
import os, signal
from snapfs.kernel.forks import undisturbed
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    with undisturbed():
        child = os.fork()
        if child == 0:
            os._exit(0)
except KeyboardInterrupt:
    print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_as_much_as_others_like_beside_what_is_fetched_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(beneath, "MOST", 10)
    for number in range(50):
        (tmp_path / f"snapfs-image-{number}").mkdir()
    assert len(list(fetching._left("snapfs-image-"))) == 10


# -- by an ordinary user, with a daemon of her own


@pytest.fixture
def home(everybodys_fuse: None, users: None) -> Iterator[Home]:
    with home_of(alice) as home:
        home.daemon.start()
        yield home
        assert home.daemon.stop() == 0


def test_a_file_in_a_directory_that_is_closed(home: Home) -> None:
    """It is not told that it was not there."""
    home.sh("mkdir closed; touch closed/layer.tar; chmod 0 closed")
    said = home.snapfs("import", home.path / "closed/layer.tar", status=6)
    home.sh("chmod 700 closed")
    assert said == f"snapfs: cannot import {home.path}/closed/layer.tar: Permission denied\n"


def test_hers(home: Home) -> None:
    layout = Layout(home.path / "oci")
    layers = [
        Layer().add("d/f", b"first", uid=33, gid=34).add("d/own", b"").add("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
    ]
    layers.append(Layer().add("d/.wh.f").hard("x", "d/own").add("e", None).add("e/.wh..wh..opq"))
    tars = [each.done() for each in layers]
    top = layout.add("t", tars)
    said = home.snapfs("import", f"oci:{layout.top}")
    assert f"{home.mnt}/committed/{top}\n" in said
    assert "null, for one, is a device" in said
    on = home.options()["subids"]
    assert isinstance(on, dict)
    assert ("d/f, for one, belongs to a user or group" in said) == (not on["on"])
    home.snapfs("prepare", "w", "--parent", top)
    assert home.inside("w", "find . | sort | tr '\\n' ' '") == ". ./d ./d/own ./e ./x "
    assert home.snapfs("import", f"oci:{layout.top}") == f"{home.mnt}/committed/{top}\n"


@pytest.mark.usefixtures("everybodys_fuse", "users")
def test_who_may_not_write_root(make_daemon: Callable[..., Daemon], open_path: Path) -> None:
    daemon = make_daemon("-o", "allow_other", "-o", f"uid={ALICE}").start()
    (open_path / "layer").write_bytes(three()[0])
    words = [*alice, *SNAPFS, "import", "--at", str(daemon.mnt), str(open_path / "layer")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 6, done
    assert "is for the user that serves" in done.stderr
    assert kept(daemon.mnt) == []


OTHERS_WRITE = ("-o", "allow_other", "-o", f"gid={ALICE},umask=002")


def forged(command: Command, kind: str, key: str, labels: list[str]) -> None:
    """Make what anybody can make who may write the tree: a snapshot with a file and ``labels``, under the name of a layer."""
    command("prepare", "forged", *(word for label in labels for word in ("-l", label)))
    (layer_of(command, "forged") / "passwd").write_text("evil")
    if kind == "active":
        os.rename(command.mnt / "active/forged", command.mnt / "active" / key)
    else:
        command("commit", "--no-sync", "forged", key)


def layer_of(command: Command, key: str) -> Path:
    return Path(os.readlink(command.mnt / f"active/{key}/diff"))


def test_a_layer_that_others_could_have_made(make_daemon: Callable[..., Daemon], layout: Layout) -> None:
    """Where they may write the tree its labels prove nothing: it is refused, and one that was imported is found again."""
    command, tars = Command(make_daemon(*OTHERS_WRITE).start().mnt), three()
    layout.add("t", tars)
    names = chain_of(tars)
    for name, tar in zip(names, tars, strict=True):
        forged(command, "committed", name, [f"snapfs.diff-id={digest_of(tar)}"])
        words = refused(command, f"oci:{layout.top}", status=6)
        assert f'snapshot "{name}" is there, but others than you may write the tree, and could have made it' in words
        command("rm", name)
    command("import", f"oci:{layout.top}")
    settled(command.mnt, tars)
    before = info(command.mnt / "committed" / names[2])["id"]
    command("import", f"oci:{layout.top}")
    assert info(command.mnt / "committed" / names[2])["id"] == before
    os.rename(command.mnt / "committed" / names[2], command.mnt / "committed/away")
    command("prepare", "w", "-p", names[1])
    command("commit", "--no-sync", "w", names[2])
    command("label", names[2], f"snapfs.diff-id={digest_of(tars[2])}")
    assert f'snapshot "{names[2]}" is there, but others' in refused(command, f"oci:{layout.top}", status=6)


def test_a_draft_that_others_could_have_made_is_made_anew(make_daemon: Callable[..., Daemon], layout: Layout) -> None:
    command, tars = Command(make_daemon(*OTHERS_WRITE).start().mnt), three()[:1]
    layout.add("t", tars)
    key = f"import-{chain_of(tars)[0].partition(':')[2]}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    forged(command, "active", key, [f"snapfs.importing={boot}", f"snapfs.diff-id={digest_of(tars[0])}"])
    command("import", f"oci:{layout.top}")
    settled(command.mnt, tars)
    assert not (layer(command.mnt, chain_of(tars)[0]) / "passwd").exists()


@pytest.mark.usefixtures("open_path")
def test_a_draft_that_others_have_committed_onto_what_they_like(
    make_daemon: Callable[..., Daemon], server: Server, layout: Layout
) -> None:
    """A layer that an import has made is none of the image's where it stands on others than the image's."""
    command, tars = Command(make_daemon(*OTHERS_WRITE).start().mnt), three()
    layout.add("t", tars)
    names = chain_of(tars)
    command("prepare", "evil")
    (layer_of(command, "evil") / "passwd").write_text("evil")
    command("commit", "--no-sync", "evil", "evil")
    for nth in range(3):
        with server.started(held, str(command.mnt), "import", f"oci:{layout.top}") as process:
            assert process.hold(lambda call: KILL if call.name == "renameat" and "import-" in str(call) else None)
        key = f"import-{names[nth].partition(':')[2]}"
        moved = run(alice, "mv", command.mnt / "active" / key, command.mnt / "committed/evil/committed" / names[nth])
        assert moved.returncode == 0, moved.stderr
        assert info(command.mnt / "committed" / names[nth])["parent"] == "evil"
        words = refused(command, f"oci:{layout.top}", status=6)
        assert f'snapshot "{names[nth]}" is there, but others than you may write the tree, and could have made it' in words
        command("rm", names[nth])
    command("rm", "evil")
    command("import", f"oci:{layout.top}")
    settled(command.mnt, tars)


@pytest.mark.parametrize("what", ["removed", "full"])
def test_a_draft_in_which_nothing_can_be_made(command: Command, server: Server, layout: Layout, what: str) -> None:
    """Who may write the tree may have removed it, or the disk is full: a sentence says so."""
    layout.add("t", three()[:1])

    def decide(call: Call) -> int | None:
        if call.name == "mkdir" and "/stale" in str(call):
            if what == "full":
                return errno.ENOSPC
            for name in os.listdir(command.mnt / "active"):
                os.rmdir(command.mnt / "active" / name)
        return None

    with server.started(held, str(command.mnt), "import", f"oci:{layout.top}") as process:
        process.hold(decide)
        assert process.errors() == []
        assert ["status", 1] in process.said
    assert kept(command.mnt) == []


# -- images/, in trees that have it


def test_a_name_that_is_taken(command: Command, layout: Layout) -> None:
    """Another image loses neither its name nor its configuration to one that is imported, unless that is asked for."""
    one, two = three()[:1], three()[:2]
    first, second = layout.add("one", one), layout.add("two", two)
    command("import", f"oci:{layout.top}:one", "app")
    said = command("import", f"oci:{layout.top}:two", "app", status=4)
    assert "--replace gives the name to this one" in said
    assert kept(command.mnt) == [f"committed/{first}"], "nothing was unpacked"
    command("import", "--replace", f"oci:{layout.top}:two", "app")
    assert os.readlink(command.mnt / "images/app") == f"../committed/{second}"
    assert os.listdir(command.mnt / "images") == ["app"]
    path = command.mnt / f"committed/{second}/image.json"
    others = {**json.loads(path.read_text()), "config": {"Cmd": ["/other"]}}
    path.write_text(json.dumps(others))
    assert "another configuration" in command("import", f"oci:{layout.top}:two", "again", status=4)
    assert json.loads(path.read_text()) == others
    command("import", "--replace", f"oci:{layout.top}:two", "again")
    assert json.loads(path.read_text())["config"]["Cmd"] == ["/bin/sh"]
    assert sorted(os.listdir(command.mnt / "images")) == ["again", "app"]


def test_a_name_for_a_lone_layer(command: Command, layout: Layout, tmp_path: Path) -> None:
    """What it is called is not known before it is unpacked; it is refused whole nevertheless."""
    layout.add("t", three()[:1])
    command("import", f"oci:{layout.top}", "app")
    (tmp_path / "layer").write_bytes(Layer().add("other").done())
    said = refused(command, str(tmp_path / "layer"), "app", status=4)
    assert said == 'snapfs: "app" is another image in images/: --replace gives the name to this one\n'
    for name, why in (("", "must not be empty"), ("x" * 256, "at most 255 fit"), ("x\udcff", "is not UTF-8")):
        for source in (str(tmp_path / "layer"), f"oci:{layout.top}"):
            said = refused(command, source, name, status=2)
            assert said.startswith("snapfs: no image can be called so: ")
            assert why in said
    top = command("import", "--replace", str(tmp_path / "layer"), "app").rpartition("/")[2].strip()
    assert os.readlink(command.mnt / "images/app") == f"../committed/{top}"
    command("import", str(tmp_path / "layer"), "app")  # it has that name
    assert os.listdir(command.mnt / "images") == ["app"]


def test_a_parent_that_was_not_imported(command: Command, tmp_path: Path) -> None:
    """What to do instead does it."""
    (command.mnt / "active/w").mkdir()
    (command.mnt / "active/w/rootfs/file").write_text("below")
    os.rename(command.mnt / "active/w", command.mnt / "committed/base")
    (tmp_path / "layer").write_bytes(Layer().add(".wh.file").add("new").done())
    said = refused(command, "--parent", "base", str(tmp_path / "layer"), status=6)
    assert "snapfs export base oci:DIR, and snapfs import oci:DIR, make the same of layers that have one" in said
    command("export", "base", f"oci:{tmp_path}/dir")
    name = command("import", f"oci:{tmp_path}/dir").rpartition("/")[2].strip()
    top = command("import", "--parent", name, str(tmp_path / "layer")).strip()
    assert os.listdir(f"{top}/rootfs/") == ["new"]


def test_a_name_that_is_not_written_as_an_image(command: Command, layout: Layout, tmp_path: Path) -> None:
    top = layout.add("t", three())
    command("import", f"oci:{layout.top}", "host/app:1.0")
    said = 'no snapshot is called "host/app:1.0", but an image is: write images/host/app:1.0\n'
    for words in (["prepare", "w", "--parent"], ["rm"], ["export"], ["diff"]):
        after = [f"oci:{tmp_path}/out"] * (words == ["export"])
        assert command(*words, "host/app:1.0", *after, status=3) == f"snapfs: {said}"
    assert command("prepare", "w", "--parent", "images/host/app:1.0")
    assert info(command.mnt / "active/w")["parent"] == top


def test_a_name_in_images(command: Command, layout: Layout) -> None:
    """The seam between import and images/: a link, and the configuration in image.json."""
    top = layout.add("t", three())
    command("import", f"oci:{layout.top}", "app:1.0")
    assert os.readlink(command.mnt / "images/app:1.0") == f"../committed/{top}"
    told = json.loads((command.mnt / f"committed/{top}/image.json").read_text())
    assert told["config"]["Cmd"] == ["/bin/sh"]
    command("import", f"oci:{layout.top}", "app:1.0")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(command.mnt / "images/app:1.0")
