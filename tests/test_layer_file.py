"""``layer.tar`` of a committed snapshot, by the library and through the mounted tree; diff ids and chain ids, and how they are
kept."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import subprocess
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from snapfs import Damaged, FailedPrecondition, NotFound, OpenLayer, Snapshotter, open_snapshotter
from snapfs.model import Kind
from snapfs.offline.checking import check
from snapfs.offline.rebuilding import rebuild
from snapfs.root import imprint
from snapfs.services import archiving
from snapfs.store.schema import Record
from tests.daemon import Daemon, bounded
from tests.doors import DOORS, Opener
from tests.home import Home
from tests.layertars import bytes_of, entries_of
from tests.refusals import failing
from tests.tree import committed, info
from tests.trees import make_tree

pytestmark = pytest.mark.mounts


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chained(*diff_ids: str) -> str:
    """As OCI has it (image-spec, ``config.md``)."""
    chain = diff_ids[0]
    for each in diff_ids[1:]:
        chain = sha256(f"{chain} {each}".encode())
    return chain


async def made(snapshotter: Snapshotter, name: str, content: str, parent: str | None = None) -> Path:
    """Make the committed snapshot ``name``: its layer."""
    await snapshotter.prepare(f"{name}-draft", parent)
    layer = Path(snapshotter.layer_path((await snapshotter.stat(f"{name}-draft")).id))
    (layer / "file").write_text(content)
    await snapshotter.commit(name, f"{name}-draft")
    return layer


# -- the library


@pytest.fixture(params=DOORS)
def opener(request: pytest.FixtureRequest) -> Opener:
    return DOORS[request.param]


async def test_the_library_has_it(root: Path, opener: Opener) -> None:
    async with opener(root) as snapshotter:
        layer = await made(snapshotter, "base", "text")
        found: OpenLayer = await snapshotter.layer_tar("base")
        with closing(found):
            assert found.read(0, 1 << 20) == bytes_of(layer)
            assert await snapshotter.diff_id("base") == sha256(bytes_of(layer))


async def test_what_has_none(snapshotter: Snapshotter) -> None:
    await made(snapshotter, "base", "text")
    await snapshotter.prepare("web", "base")
    await snapshotter.view("peek", "base")
    for call in (snapshotter.layer_tar, snapshotter.diff_id):
        with pytest.raises(NotFound):
            await call("no")
        for key in ("web", "peek"):
            with pytest.raises(FailedPrecondition, match="only committed ones have a layer that is a tar"):
                await call(key)


async def test_indexes_are_kept_and_made_anew(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads one that was pushed out goes on."""
    monkeypatch.setattr(archiving, "MOST", 2)
    opened = []
    for name in ("a", "b", "c"):
        await made(snapshotter, name, name * 1000)
        opened.append(await snapshotter.layer_tar(name))
    numbers = {name: (await snapshotter.stat(name)).id for name in ("a", "b", "c")}
    assert [snapshotter.has_tar_index(number) for number in numbers.values()] == [False, True, True]
    assert snapshotter.known_tar_size(numbers["a"], snapshotter.record(numbers["a"])) == opened[0].size
    again = await snapshotter.layer_tar("a")
    assert not snapshotter.has_tar_index(numbers["b"])
    assert again.read(0, 1 << 20) == opened[0].read(0, 1 << 20)
    for each in (*opened, again):
        each.close()
    await snapshotter.remove("c")
    assert not snapshotter.has_tar_index(numbers["c"])


async def test_diff_ids_are_kept(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        layers = [await made(snapshotter, "base", "one"), await made(snapshotter, "above", "two", "base")]
        expected = [await snapshotter.diff_id("base"), await snapshotter.diff_id("above")]
        assert expected == [sha256(bytes_of(layers[0])), sha256(bytes_of(layers[1], below=layers[0]))]
        await snapshotter.rename("above", "renamed")
        await snapshotter.update("renamed", {"a": "b"})
    async with open_snapshotter(root) as snapshotter:
        (layers[1] / "file").unlink()  # nobody reads it
        assert await snapshotter.diff_id("renamed") == expected[1]
        number = (await snapshotter.stat("renamed")).id
        record = snapshotter.record(number)
        assert snapshotter.known_tar_size(number, record) == record.tar_size == len(bytes_of(layers[0]))
    (root / "metadata.mdb").unlink()
    list(rebuild(str(root)))
    assert [finding for finding in check(str(root)) if "renamed" in finding.text] == []
    async with open_snapshotter(root) as snapshotter:
        assert await snapshotter.diff_id("renamed") == expected[1]
        with snapshotter.reading() as reader:
            known = snapshotter.known_digests(reader, number, snapshotter.record(number))
        assert known == {"diff_id": expected[1], "chain_id": chained(*expected)}


async def test_a_chain_id_takes_all_diff_ids(snapshotter: Snapshotter) -> None:
    async def known(name: str) -> dict[str, str]:
        number = (await snapshotter.stat(name)).id
        with snapshotter.reading() as reader:
            return snapshotter.known_digests(reader, number, snapshotter.record(number))

    for name, parent in (("a", None), ("b", "a"), ("c", "b")):
        await made(snapshotter, name, name, parent)
    assert await known("c") == {}
    found = {"c": await snapshotter.diff_id("c"), "a": await snapshotter.diff_id("a")}
    assert await known("c") == {"diff_id": found["c"]}
    assert await known("a") == {"diff_id": found["a"], "chain_id": found["a"]}
    found["b"] = await snapshotter.diff_id("b")
    assert await known("c") == {"diff_id": found["c"], "chain_id": chained(found["a"], found["b"], found["c"])}


async def test_what_takes_over_a_dissolved_layer_has_another(snapshotter: Snapshotter) -> None:
    for name, parent in (("a", None), ("b", "a"), ("c", "b")):
        layer = await made(snapshotter, name, name, parent)
        (layer / name).touch()
    before = await snapshotter.diff_id("c")
    await snapshotter.dissolve("b")
    number = (await snapshotter.stat("c")).id
    assert snapshotter.record(number).diff_id == b""
    assert await snapshotter.diff_id("c") != before
    with closing(await snapshotter.layer_tar("c")) as found:
        assert list(entries_of(found.read(0, found.size))) == ["b", "c", "file"]


async def test_a_squash_of_parents_changes_no_diff_id(snapshotter: Snapshotter) -> None:
    for name, parent in (("a", None), ("b", "a")):
        await made(snapshotter, name, name, parent)
    await snapshotter.diff_id("b")
    await snapshotter.squash("b", "flat")
    assert snapshotter.record((await snapshotter.stat("flat")).id).diff_id == b""
    assert snapshotter.record((await snapshotter.stat("b")).id).diff_id != b""


async def test_a_layer_whose_data_may_be_lost_has_none(snapshotter: Snapshotter) -> None:
    """Until it is taken as it is; what was known of it is no longer so."""
    await made(snapshotter, "base", "text")
    await snapshotter.diff_id("base")
    number = (await snapshotter.stat("base")).id
    snapshotter.unflushed.lost.add(number)
    with snapshotter.reading() as reader:
        assert snapshotter.known_digests(reader, number, snapshotter.record(number)) == {}
    with pytest.raises(Damaged, match="may be torn"):
        await snapshotter.layer_tar("base")
    await snapshotter.accept("base")
    assert snapshotter.record(number).diff_id == b""
    found = imprint.read(os.path.dirname(snapshotter.layer_path(number)))
    assert found is not None
    assert found.record.diff_id == b""
    (await snapshotter.layer_tar("base")).close()


def test_an_earlier_snapfs_reads_records_that_have_one() -> None:
    class Earlier(msgspec.Struct, array_like=True):
        name: str
        kind: str
        parent: int
        created: int
        updated: int
        labels: dict[str, str]
        usage: object
        origin: str
        node: int

    new = msgspec.msgpack.encode(Record("web", Kind.COMMITTED, 0, 1, 2, {}, diff_id=b"x" * 32, tar_size=5))
    assert msgspec.msgpack.decode(new, type=Earlier).name == "web"


# -- the mounted tree


def filled(mnt: Path, seed: int = 1) -> tuple[Path, bytes]:
    """The committed snapshot ``base`` with all kinds of files, and what its tar holds."""
    os.mkdir(mnt / "active/b")
    layer = Path(os.readlink(mnt / "active/b/diff"))
    layer.rmdir()
    make_tree(layer, seed)
    (layer / "large").write_bytes(os.urandom(3_000_001))
    os.rename(mnt / "active/b", mnt / "committed/base")
    return mnt / "committed/base/layer.tar", bytes_of(layer)


def test_all_ways_of_reading(mnt: Path, tmp_path: Path) -> None:
    path, data = filled(mnt)
    before = os.lstat(path)
    assert (before.st_size, oct(before.st_mode), before.st_uid) == (4096, "0o100400", 0)  # as of all that is not known yet
    assert "diff_id" not in info(path.parent)
    commands = {
        f"cp {path} {tmp_path}/copy && sha256sum < {tmp_path}/copy": hashlib.sha256(data).hexdigest(),
        f"sha256sum {path}": hashlib.sha256(data).hexdigest(),
        f"busybox cat {path} | sha256sum": hashlib.sha256(data).hexdigest(),
        f"dd if={path} bs=777777 status=none | sha256sum": hashlib.sha256(data).hexdigest(),
        f"tail -c 5000 {path} | sha256sum": hashlib.sha256(data[-5000:]).hexdigest(),
        f"tar tf {path} --quoting-style=literal --show-transformed | wc -l": str(
            b"\n".join(os.fsencode(name) for name in entries_of(data)).count(b"\n") + 1
        ),
        f"curl -sS -T {path} file://{tmp_path}/sent && sha256sum < {tmp_path}/sent": hashlib.sha256(data).hexdigest(),
    }
    for command, expected in commands.items():
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == expected, command
        assert os.lstat(path).st_size == len(data)
    fd = os.open(path, os.O_RDONLY)
    with closing(mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as mapped:
        assert mapped[:] == data
    with (tmp_path / "sendfile").open("wb") as target:
        here = 0
        while sent := os.sendfile(target.fileno(), fd, here, 1 << 20):
            here += sent
    os.close(fd)
    assert (tmp_path / "sendfile").read_bytes() == data
    assert info(path.parent)["diff_id"] == info(path.parent)["chain_id"] == sha256(data)


def test_the_kernel_asks_for_much_at_once(mnt: Path) -> None:
    """Or each 128 KiB would cost a turn of the loop."""
    device = os.stat(mnt).st_dev
    assert Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text() == "1024\n"


def test_the_kernel_asks_for_nothing_but_the_bytes(mnt: Path) -> None:
    """Or each read(2) would begin by asking how long the file is."""
    path, data = filled(mnt)
    path.read_bytes()

    def asked() -> int:
        found: int = json.loads((mnt / ".snapfs/stats.json").read_text())["operations"]["getattr"]["count"]
        return found

    with path.open("rb", buffering=0) as file:
        before = asked()
        assert len(b"".join(iter(lambda: file.read(65536), b""))) == len(data)
        assert asked() - before < 10 < len(data) // 65536
        assert os.fstat(file.fileno()).st_size == os.lstat(path).st_size == len(data)
        assert os.fstat(file.fileno()).st_ino == os.lstat(path).st_ino


def test_whoever_has_read_it_finds_the_diff_id(mnt: Path) -> None:
    path, data = filled(mnt)
    with path.open("rb") as file:
        file.read(len(data) // 2)
    assert "diff_id" not in info(path.parent)
    assert path.read_bytes() == data
    assert info(path.parent)["diff_id"] == sha256(data)


def test_it_outlives_the_daemon(daemon: Daemon) -> None:
    path, data = filled(daemon.mnt)
    path.read_bytes()
    assert daemon.stop() == 0
    daemon.start()
    assert info(path.parent)["diff_id"] == sha256(data)
    assert os.lstat(path).st_size == len(data)  # known before the index is made
    assert path.read_bytes() == data


def test_it_is_read_while_it_is_pushed_out_renamed_and_removed(mnt: Path) -> None:
    path, data = filled(mnt)
    with path.open("rb") as file:
        assert file.read(1000) == data[:1000]
        os.rename(mnt / "committed/base", mnt / "committed/other")
        assert file.read(1 << 20) == data[1000 : 1000 + (1 << 20)]
        os.rmdir(mnt / "committed/other")
        (mnt / ".snapfs/cleanup").write_text("1")
        with failing(errno.EIO):
            file.read()


def test_refusals_are_told(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base", content="text" * 1_000_000)
    layer = Path(os.readlink(base / "diff"))
    (layer / ".wh.x").touch()
    with failing(errno.EPERM):
        (base / "layer.tar").read_bytes()
    assert 'EPERM open committed/base/layer.tar: ".wh.x" has a name that begins with .wh., which' in daemon.error_log()[-1]
    (layer / ".wh.x").unlink()
    with failing(errno.EPERM):
        os.open(base / "layer.tar", os.O_WRONLY)
    with (base / "layer.tar").open("rb") as file:
        file.read(1)
        (layer / "file").write_text("another")
        with failing(errno.EIO):
            file.read()
    assert 'EIO read committed/base/layer.tar: "file" is not what it was when the headers' in daemon.error_log()[-1]


def test_others_are_answered_while_a_layer_is_indexed_and_read(daemon: Daemon) -> None:
    base = committed(daemon.mnt, "base")
    layer = Path(os.readlink(base / "diff"))
    (layer / "huge").touch()
    os.truncate(layer / "huge", 1 << 40)
    with subprocess.Popen(["cat", base / "layer.tar"], stdout=subprocess.DEVNULL) as reader, bounded(30):
        for number in range(50):
            os.mkdir(daemon.mnt / f"active/{number}")
            assert json.loads((daemon.mnt / f"active/{number}/info.json").read_text())["id"]
        assert reader.poll() is None
        reader.kill()


def test_whoever_serves_a_tree_has_them(anybody: Home) -> None:
    """Also where overlays leave their marks in users' attributes."""
    home = anybody
    home.sh("cd tree/active/w/rootfs; rm file; echo n > n; rm -r sub; mkdir sub; echo 2 > sub/f")
    home.snapfs("checkpoint", "w")
    listed = home.sh("tar tf tree/committed/w@1/layer.tar").split()
    assert listed == [".wh.file", "n", "sub/", "sub/.wh..wh..opq", "sub/f"]
    owners = home.sh("tar --numeric-owner -tvf tree/committed/w@1/layer.tar | awk '{print $2}'").split()
    assert set(owners) == {"0/0"}, "an image's root is who serves the tree"
    home.sh("! grep -a -q overlay tree/committed/w@1/layer.tar")
    digest = home.sh("sha256sum tree/committed/w@1/layer.tar").split()[0]
    assert json.loads(home.read("committed/w@1/info.json"))["diff_id"] == f"sha256:{digest}"
