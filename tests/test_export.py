"""A chain of snapshots becomes an image: what is in it, that others read it, that it is the same each time, whole or none."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from snapfs.cli.refusal import NOT_PERMITTED
from snapfs.errors import InvalidArgument
from snapfs.images import writing
from snapfs.images.configuration import Step, architecture, configuration
from snapfs.images.held import LOCK
from tests.command import SNAPFS, Command, OnATerminal, forked, held
from tests.mounts import unanswering
from tests.syscalls import EVERY, KILL, Server, running
from tests.trees import everything
from tests.users import ALICE, alice

pytestmark = pytest.mark.mounts

TAG = "org.opencontainers.image.ref.name"


@pytest.fixture
def chain(snapfs: Command) -> Command:
    """base <- v1, with files added, changed and deleted."""
    for key, parent in (("b", ""), ("web", "base")):
        place = snapfs.mnt / (f"committed/{parent}/active/{key}" if parent else f"active/{key}")
        place.mkdir()
        rootfs = snapfs.mnt / f"active/{key}/rootfs"
        if not parent:
            (rootfs / "d").mkdir()
            for name in ("d/one", "d/two", "kept"):
                (rootfs / name).write_text(name * 100)
        else:
            (rootfs / "d/one").unlink()
            (rootfs / "new").write_text("new")
            (snapfs.mnt / "active/web/labels/snapfs.message").write_text("why\n")
        os.rename(snapfs.mnt / f"active/{key}", snapfs.mnt / f"committed/{'v1' if parent else 'base'}")
    return snapfs


def layer(chain: Command, name: str) -> bytes:
    return (chain.mnt / f"committed/{name}/layer.tar").read_bytes()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI layout, read by these tests' own eyes: each blob has the digest and the size that it is named by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        assert json.loads((path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        self.index = json.loads((path / "index.json").read_text())
        assert self.index["schemaVersion"] == 2

    def blob(self, named: dict[str, Any]) -> bytes:
        data: bytes = (self.path / "blobs/sha256" / named["digest"].removeprefix("sha256:")).read_bytes()
        assert (digest(data), len(data)) == (named["digest"], named["size"])
        return data

    def tags(self) -> list[str]:
        return [each["annotations"][TAG] for each in self.index["manifests"]]

    def image(self, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest and configuration."""
        (named,) = [each for each in self.index["manifests"] if each["annotations"][TAG] == tag]
        manifest = json.loads(self.blob(named))
        return manifest, json.loads(self.blob(manifest["config"]))

    def layers(self, tag: str) -> list[bytes]:
        """The tars, each of which has its diff id."""
        manifest, config = self.image(tag)
        found = []
        for named, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            data = self.blob(named)
            if named["mediaType"].endswith("+gzip"):
                data = gzip.decompress(data)
            elif named["mediaType"].endswith("+zstd"):
                data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
            assert digest(data) == diff_id
            found.append(data)
        return found


def test_a_layout(chain: Command, tmp_path: Path) -> None:
    """A layer a snapshot, each the bytes of layer.tar; what is there is not written again, and other images stay."""
    place = f"oci:{tmp_path}/images"
    assert chain("export", "base", f"{place}:base") == f"{place}:base\n"
    first = {each.name: each.stat().st_ino for each in (tmp_path / "images/blobs/sha256").iterdir()}
    chain("export", "v1", place)
    layout = Layout(tmp_path / "images")
    assert layout.tags() == ["base", "latest"]
    assert layout.layers("latest") == [layer(chain, "base"), layer(chain, "v1")]
    assert layout.layers("base") == [layer(chain, "base")]
    manifest, config = layout.image("latest")
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert {named["mediaType"] for named in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar+gzip"}
    assert (config["architecture"], config["os"]) == (architecture(), "linux")
    assert [each["created_by"] for each in config["history"]] == ["snapfs commit", "why"]
    assert first.items() <= {each.name: each.stat().st_ino for each in (tmp_path / "images/blobs/sha256").iterdir()}.items()
    chain("export", "v1", f"{place}:base")  # the tag moves
    assert Layout(tmp_path / "images").tags() == ["latest", "base"]
    assert sorted(os.listdir(tmp_path / "images")) == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("how", ["none", "gzip", "zstd"])
def test_compressions(chain: Command, tmp_path: Path, how: str) -> None:
    """The same snapshots give the same bytes."""
    for place in ("one", "two"):
        chain("export", "--compression", how, "v1", f"oci:{tmp_path}/{place}:v1")
    assert Layout(tmp_path / "one").layers("v1") == [layer(chain, "base"), layer(chain, "v1")]
    blobs = [sorted(os.listdir(tmp_path / place / "blobs/sha256")) for place in ("one", "two")]
    assert blobs[0] == blobs[1]
    assert (tmp_path / "one/index.json").read_bytes() == (tmp_path / "two/index.json").read_bytes()


def test_times_end_with_source_date_epoch(chain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    chain("export", "v1", f"oci:{tmp_path}/images:v1")
    _, config = Layout(tmp_path / "images").image("v1")
    assert {config["created"], *(each["created"] for each in config["history"])} == {"1970-01-02T00:00:00Z"}
    early, late = {"created": "1970-01-01T02:00:00.5+01:00"}, {"created": "2020-01-01T00:00:00Z"}  # as others write them
    (chain.mnt / "committed/base/image.json").write_text(
        json.dumps({**late, "history": [early, {"empty_layer": True, **late}]})
    )
    chain("export", "v1", f"oci:{tmp_path}/images:v1")
    _, config = Layout(tmp_path / "images").image("v1")
    assert config["created"] == "1970-01-02T00:00:00Z"
    assert [each["created"] for each in config["history"]] == [early["created"], *["1970-01-02T00:00:00Z"] * 2]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert "SOURCE_DATE_EPOCH" in chain("export", "v1", f"oci:{tmp_path}/images:v2", status=2)


def test_an_image_is_as_old_as_it_says(chain: Command, tmp_path: Path) -> None:
    """And not as its snapshots here: so what comes from another machine goes on from here as the same image."""
    said = {"created": "2020-01-01T00:00:00Z", "history": [{"created": "2019-01-01T00:00:00Z"}]}
    (chain.mnt / "committed/base/image.json").write_text(json.dumps(said))
    chain("export", "base", f"oci:{tmp_path}/images:base")
    _, config = Layout(tmp_path / "images").image("base")
    assert (config["created"], config["history"]) == (said["created"], said["history"])


def test_one_layer_is_the_same_each_time(chain: Command, tmp_path: Path) -> None:
    """It is made now, of what is older."""
    made = json.loads((chain.mnt / "committed/v1/info.json").read_text())["created"]
    time.sleep(1)
    chain("export", "--squash", "v1", f"oci:{tmp_path}/images:v1")
    _, config = Layout(tmp_path / "images").image("v1")
    assert [config["created"], *(each["created"] for each in config["history"])] == [f"{made[:19]}Z"] * 2


def test_one_layer(chain: Command, tmp_path: Path) -> None:
    """Of all that the snapshot shows; what is made meanwhile is gone afterwards."""
    chain("export", "--squash", "v1", f"oci:{tmp_path}/images:v1")
    (data,) = Layout(tmp_path / "images").layers("v1")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert sorted(name.removeprefix("./") for name in tar.getnames()) == ["", "d", "d/two", "kept", "new"] or sorted(
            tar.getnames()
        ) == ["d", "d/two", "kept", "new"]
    assert chain.names() == ["base", "v1"]
    chain("export", "--squash", "base", f"oci:{tmp_path}/images:base")
    assert Layout(tmp_path / "images").layers("base") == [layer(chain, "base")]


def test_progress_is_told(chain: Command, tmp_path: Path) -> None:
    """Of layers and bytes: nobody counts files there."""
    said = OnATerminal("export", "--at", str(chain.mnt), "v1", f"oci:{tmp_path}/images").said()
    assert re.search(r"layer 1 of 2: [\d.]+[KM]?\s", said), said
    assert "files" not in said


def unpack(archive: Path, directory: Path) -> None:
    directory.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(directory)], check=True)


def test_archives(chain: Command, tmp_path: Path) -> None:
    chain("export", "v1", f"oci-archive:{tmp_path}/oci.tar:v1")
    unpack(tmp_path / "oci.tar", tmp_path / "oci")
    assert Layout(tmp_path / "oci").layers("v1") == [layer(chain, "base"), layer(chain, "v1")]
    chain("export", "v1", f"docker-archive:{tmp_path}/docker.tar:shop:1")
    unpack(tmp_path / "docker.tar", tmp_path / "docker")
    (manifest,) = json.loads((tmp_path / "docker/manifest.json").read_text())
    assert manifest["RepoTags"] == ["shop:1"]
    layers = [(tmp_path / "docker" / name).read_bytes() for name in manifest["Layers"]]
    assert layers == [layer(chain, "base"), layer(chain, "v1")]
    config = json.loads((tmp_path / "docker" / manifest["Config"]).read_text())
    assert config["rootfs"]["diff_ids"] == [digest(data) for data in layers]
    for transport in ("oci-archive", "docker-archive"):
        taken = f"{transport}:{tmp_path}/docker.tar"
        assert "already exists" in chain("export", "v1", taken, status=1)
    assert sorted(os.listdir(tmp_path)) == ["docker", "docker.tar", "oci", "oci.tar"]


@pytest.mark.parametrize("tag", ["v1", "A.b-c_d+e", "host.local:5000/a/b:1", "a--b"])
def test_a_tag_that_others_take(chain: Command, tmp_path: Path, tag: str) -> None:
    chain("export", "base", f"oci:{tmp_path}/images:{tag}")
    skopeo = ["skopeo", "inspect", f"oci:{tmp_path}/images:{tag}"]
    assert subprocess.run(skopeo, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "name"),
    [("shop", "shop:latest"), ("host:5000/a/b_c", "host:5000/a/b_c:latest"), ("Host.local/shop:A_1", "Host.local/shop:A_1")],
)
def test_a_name_that_docker_takes(chain: Command, tmp_path: Path, given: str, name: str) -> None:
    chain("export", "base", f"docker-archive:{tmp_path}/docker.tar:{given}")
    with tarfile.open(tmp_path / "docker.tar") as tar:
        (manifest,) = json.load(tar.extractfile("manifest.json") or io.BytesIO())
    assert manifest["RepoTags"] == [name]
    skopeo = ["skopeo", "inspect", f"docker-archive:{tmp_path}/docker.tar:{name}"]
    assert subprocess.run(skopeo, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("place", ["oci:images:v1", "oci-archive:oci.tar:v1", "docker-archive:docker.tar:shop:1"])
def test_skopeo_reads_it(chain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Digests verified, by a program that knows nothing of this one."""
    transport, _, rest = place.partition(":")
    chain("export", "v1", f"{transport}:{tmp_path}/{rest}")
    monkeypatch.chdir(tmp_path)
    words = ["skopeo", "copy", "--quiet", "--insecure-policy", place, "oci:read:v1"]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    assert Layout(tmp_path / "read").layers("v1") == [layer(chain, "base"), layer(chain, "v1")]


def test_skopeo_tells_of_it(chain: Command, tmp_path: Path) -> None:
    for place in (f"oci:{tmp_path}/images:v1", f"oci-archive:{tmp_path}/oci.tar:v1", f"docker-archive:{tmp_path}/d.tar:shop:1"):
        chain("export", "v1", place)
        told = json.loads(subprocess.run(["skopeo", "inspect", place], capture_output=True, check=True).stdout)
        assert (told["Architecture"], told["Os"], len(told["Layers"])) == (architecture(), "linux", 2)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory for podman, which takes paths of 50 letters at most."""
    with tempfile.TemporaryDirectory(prefix="podman") as path:
        yield Path(path)


def test_podman_takes_it(chain: Command, tmp_path: Path, short_path: Path) -> None:
    """And what it saves of it are the same layers, found again."""
    ids = [digest(layer(chain, name)) for name in ("base", "v1")]
    own = [f"--{name}={short_path}/{name}" for name in ("root", "runroot", "tmpdir")]

    def podman(*words: str) -> str:
        command = ["podman", *own, "--storage-driver=vfs", "--runtime=runc", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        return done.stdout

    (tmp_path / "ours").mkdir()
    found = set()
    for transport in ("docker-archive", "oci-archive"):
        name = f"test.local/{transport}:1"
        chain("export", "v1", f"{transport}:{tmp_path}/ours/{transport}:{name}")
        assert podman("load", "--input", f"{tmp_path}/ours/{transport}") == f"Loaded image: {name}\n"
        assert json.loads(podman("image", "inspect", name))[0]["RootFS"]["Layers"] == ids
        podman("save", "--quiet", "--format", transport, "--output", f"{tmp_path}/{transport}", name)
        found.add(chain("import", f"{transport}:{tmp_path}/{transport}").strip())
    (top,) = found
    assert json.loads((Path(top) / "image.json").read_text())["rootfs"]["diff_ids"] == ids
    assert (Path(top) / "layer.tar").read_bytes() == layer(chain, "v1")
    assert sorted(os.listdir(f"{top}/rootfs/")) == ["d", "kept", "new"]


def test_umoci_unpacks_it(chain: Command, tmp_path: Path) -> None:
    chain("export", "v1", f"oci:{tmp_path}/images:v1")
    words = ["umoci", "unpack", "--image", f"{tmp_path}/images:v1", str(tmp_path / "bundle")]
    subprocess.run(words, capture_output=True, check=True)
    ours, theirs = everything((chain.mnt / "committed/v1/rootfs").resolve()), everything(tmp_path / "bundle/rootfs")
    assert theirs.keys() == {".", "d", "d/two", "kept", "new"}
    for path, seen in theirs.items():  # its times are whole seconds
        assert [seen[nth] for nth in (0, 1, 3)] == [ours[path][nth] for nth in (0, 1, 3)]  # type: ignore[index]
    told = subprocess.run(
        ["umoci", "stat", "--json", "--image", f"{tmp_path}/images:v1"], capture_output=True, check=True
    ).stdout
    assert [each["created_by"] for each in json.loads(told)["history"]] == ["snapfs commit", "why"]


def test_places_of_skopeo(chain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain("export", "v1", f"dir:{tmp_path}/copied")
    manifest = json.loads((tmp_path / "copied/manifest.json").read_text())
    layers = [
        gzip.decompress((tmp_path / "copied" / each["digest"].removeprefix("sha256:")).read_bytes())
        for each in manifest["layers"]
    ]
    assert layers == [layer(chain, "base"), layer(chain, "v1")]
    assert '"nowhere" is no transport that is known: oci docker ' in chain(
        "export", "v1", f"nowhere:{tmp_path}/copied", status=1
    )
    assert "skopeo can't take it there" in chain("export", "v1", f"dir:{tmp_path}/none/copied", status=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "skopeo is not installed" in chain("export", "v1", "docker://localhost/v1", status=1)


def test_refusals(chain: Command, tmp_path: Path) -> None:
    """One sentence each, and nothing is made."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    (tmp_path / "file").touch()
    (chain.mnt / "committed/v1/active/w").mkdir()
    before = sorted(os.listdir(tmp_path))
    for words, status, said in (
        (["v1", "images"], 2, "says no place"),
        (["v1", "oci:"], 2, "says no place"),
        (["--compression", "lzma", "v1", "oci:x"], 2, "there are none, gzip, zstd"),
        (["w", f"oci:{tmp_path}/images"], 3, "snapfs checkpoint"),
        (["gone", f"oci:{tmp_path}/images"], 3, "does not exist"),
        (["v1", f"oci:{tmp_path}/other"], 1, "no OCI layout"),
        (["v1", f"oci:{tmp_path}/file"], 1, "is no directory"),
        (["v1", f"oci:{tmp_path}/no/such"], 1, "No such file or directory"),
        (["v1", f"oci-archive:{tmp_path}/no/such"], 1, "No such file or directory"),
        (["v1", f"oci-archive:{tmp_path}/other"], 1, "is a directory: name a file in it"),
        (["v1", f"docker-archive:{tmp_path}/"], 1, "is a directory: name a file in it"),
        *(
            (["v1", f"{transport}:{tmp_path}/new:{tag}"], 1, f'"{tag}" is no tag of an image')
            for tag in ("a b", "-a", "a__b", "a/", "..")
            for transport in ("oci", "oci-archive")
        ),
        *(
            (["v1", f"docker-archive:{tmp_path}/docker.tar:{name}"], 1, f'"{name}" is no NAME:TAG that docker load takes')
            for name in ("Shop:1", "shop:", "shop:x/2", "shop@1", "a//b", "-a", "shop:.1")
        ),
    ):
        assert said in chain("export", *words, status=status)
    assert sorted(os.listdir(tmp_path)) == before


def test_nothing_is_made_of_what_can_not_be_read(chain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the layers below could be."""
    (chain.mnt / "committed/v1/active/w").mkdir()
    (chain.mnt / "active/w/rootfs/.wh.x").touch()
    os.rename(chain.mnt / "active/w", chain.mnt / "committed/v2")
    for place in (f"oci:{tmp_path}/images", f"docker-archive:{tmp_path}/file"):
        assert ".wh.x" in chain("export", "v2", place, status=6)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "now")
    chain("export", "v1", f"oci:{tmp_path}/images", status=2)
    assert os.listdir(tmp_path) == []


def test_a_full_disk(chain: Command, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, and nothing is left, wherever the image goes; nor of what skopeo is to take there."""
    (chain.mnt / "committed/v1/active/big").mkdir()
    (chain.mnt / "active/big/rootfs/big").write_bytes(os.urandom(32 << 20))
    os.rename(chain.mnt / "active/big", chain.mnt / "committed/v2")
    chain("export", "v1", f"oci:{small_disk}/images:v1")
    before = sorted(str(path) for path in small_disk.rglob("*"))
    for transport in ("oci", "oci-archive", "docker-archive"):
        place = f"{transport}:{small_disk}/{'images' if transport == 'oci' else 'archive'}:v2"
        assert "No space left on device" in chain("export", "v2", place, status=1)
        assert sorted(str(path) for path in small_disk.rglob("*")) == before
    assert len(Layout(small_disk / "images").layers("v1")) == 2
    (chain.mnt / "active/other").mkdir()
    (chain.mnt / "active/other/rootfs/big").write_bytes(os.urandom(8 << 20))
    (chain.mnt / "active/other/rootfs/copy").write_bytes(os.urandom(1 << 20))
    os.rename(chain.mnt / "active/other", chain.mnt / "committed/o1")
    (chain.mnt / "committed/o1/active/other").mkdir()
    (chain.mnt / "active/other/rootfs/big").write_bytes(os.urandom(32 << 20))
    os.rename(chain.mnt / "active/other", chain.mnt / "committed/o2")
    for place in ("images", "new"):  # a layer fits, and would keep the room for nobody's use
        assert "No space left on device" in chain("export", "o2", f"oci:{small_disk}/{place}:o2", status=1)
        assert {str(path) for path in small_disk.rglob("*") if path.is_file()} <= set(before)
    assert len(Layout(small_disk / "images").layers("v1")) == 2
    shutil.rmtree(small_disk / "new")
    monkeypatch.setenv("TMPDIR", str(small_disk))
    said = chain("export", "v2", "docker://localhost:1/v2", status=1)
    assert f"{small_disk}, where it is made first: No space left on device: $TMPDIR names another place" in said
    assert sorted(str(path) for path in small_disk.rglob("*")) == before


def test_a_layout_that_was_damaged(chain: Command, tmp_path: Path) -> None:
    """What is there counts only if it is what it is named by; an index that can't be read is not replaced."""
    place = f"oci:{tmp_path}/images"
    chain("export", "base", f"{place}:base")
    for blob in (tmp_path / "images/blobs/sha256").iterdir():
        blob.unlink()
    chain("export", "v1", f"{place}:v1")
    assert Layout(tmp_path / "images").layers("v1") == [layer(chain, "base"), layer(chain, "v1")]
    (tmp_path / "images/index.json").write_text("[]")
    assert "is damaged" in chain("export", "v1", f"{place}:v2", status=1)
    assert (tmp_path / "images/index.json").read_text() == "[]"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(["snapfs.cli.export", "snapfs.images.writing", "snapfs.images.configuration", "tests.command"]) as started:
        yield started


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_killed_between_any_two_calls(chain: Command, server: Server, tmp_path: Path, transport: str) -> None:
    """There is a whole image or none, what was there before stays, and no file is left that no image has."""
    chain("export", "base", f"oci:{tmp_path}/pristine:base")
    expected = [layer(chain, "base"), layer(chain, "v1")]
    nth, is_done, ends = 1, False, set()
    while not is_done:
        target = tmp_path / "target"
        if transport == "oci":
            shutil.copytree(tmp_path / "pristine", target)
        with server.started(held, str(chain.mnt), "export", "v1", f"{transport}:{target}:v1") as process:
            process.hold(lambda call, nth=nth: KILL if call.nth == nth else None)  # type: ignore[misc]
            is_done = ["status", 0] in process.said
            assert process.errors() == []
        if transport == "oci":
            tags = Layout(target).tags()
            assert tags in (["base"], ["base", "v1"])
            for tag in tags:
                assert Layout(target).layers(tag) == expected[: 1 + (tag == "v1")]
            ends.add(len(tags))
            chain("export", "v1", f"oci:{target}:v1")
            assert Layout(target).layers("v1") == expected
            assert not [name for name in os.listdir(target) if name.startswith(".")]
            shutil.rmtree(target)
        else:
            assert os.listdir(tmp_path) in (["pristine"], ["pristine", "target"], ["target", "pristine"])
            ends.add(target.exists())
            if target.exists():
                with tarfile.open(target) as tar:
                    assert {"index.json", "manifest.json"} & set(tar.getnames())
                target.unlink()
        nth += 1 if EVERY == 1 else 1 + nth // 4
    assert len(ends) == 2
    assert nth > 5


# -- what others have put where an image is to go


def export(chain: Command, server: Server, name: str, place: str, status: int = 0) -> str:
    """Its sentence on standard error."""
    done = forked(server, "export", name, place, "--at", chain.mnt)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == (status > 0), "one sentence"
    return done.stderr


def test_what_is_no_regular_file_in_a_layout(chain: Command, server: Server, tmp_path: Path) -> None:
    """It is neither waited for nor followed."""
    images = tmp_path / "images"
    export(chain, server, "base", f"oci:{images}:base")
    index = (images / "index.json").read_bytes()
    manifest = images / "blobs/sha256" / json.loads(index)["manifests"][0]["digest"].removeprefix("sha256:")
    manifest.rename(tmp_path / "manifest")
    os.mkfifo(manifest)
    export(chain, server, "base", f"oci:{images}:other")
    assert manifest.is_file(), "it is written anew"
    (images / "index.json").unlink()
    os.mkfifo(images / "index.json")
    assert f"{images}/index.json is no regular file" in export(chain, server, "v1", f"oci:{images}:v1", status=1)
    (images / "index.json").unlink()
    (tmp_path / "elsewhere").write_bytes(index)
    (images / "index.json").symlink_to(tmp_path / "elsewhere")
    assert f"{images}/index.json is no regular file" in export(chain, server, "v1", f"oci:{images}:v1", status=1)
    assert (tmp_path / "elsewhere").read_bytes() == index


@pytest.mark.parametrize(
    "text",
    [
        '{"manifests": 5}',
        '{"manifests": [5]}',
        '{"manifests": [{"annotations": 5}]}',
        '{"manifests": [{"digest": "\\ud800"}]}',
        "[" * 100_000,
        '{"manifests": [' + '{"a":' * 100_000,
        " " * (writing.LARGEST + 1),
    ],
    ids=["number", "numbers", "annotations", "surrogate", "brackets", "braces", "large"],
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/oci-layout").write_text("{}")
    (tmp_path / "images/index.json").write_text(text)
    with pytest.raises(InvalidArgument, match=r"/images/index.json .*; name a new directory$"):
        writing.OciDirectory(str(tmp_path / "images"), "v1", "gzip")
    assert (tmp_path / "images/index.json").read_text() == text


def test_other_entries_of_an_index_stay(tmp_path: Path) -> None:
    others = [{}, {"annotations": None, "x": [1]}, {"digest": 5, "annotations": {TAG: "a"}}, {"digest": "sha256:../../x"}]
    for document in ({"manifests": others, "more": 1}, {"more": 1}):
        (images := tmp_path / f"images{len(document)}").mkdir()
        (images / "oci-layout").write_text("{}")
        (images / "index.json").write_text(json.dumps(document))
        with writing.OciDirectory(str(images), "v1", "gzip") as made:
            made.finish(b"{}", [])
        index = json.loads((images / "index.json").read_text())
        assert index["more"] == 1
        assert index["manifests"][:-1] == document.get("manifests", [])
        assert index["manifests"][-1]["annotations"] == {TAG: "v1"}


def test_a_layout_that_was_begun(chain: Command, server: Server, tmp_path: Path) -> None:
    """By an export that was killed before it had made oci-layout."""
    (tmp_path / "images/blobs/sha256").mkdir(parents=True)
    (tmp_path / f"images/{LOCK}").touch(0o600)
    export(chain, server, "v1", f"oci:{tmp_path}/images:v1")
    assert Layout(tmp_path / "images").tags() == ["v1"]
    assert sorted(os.listdir(tmp_path / "images")) == ["blobs", "index.json", "oci-layout"]


def test_which_blobs_count(chain: Command, server: Server, tmp_path: Path) -> None:
    """Regular files of root's or the caller's, as large as the manifest says; any other is written anew."""
    place, blobs = f"oci:{tmp_path}/images", tmp_path / "images/blobs/sha256"
    export(chain, server, "v1", f"{place}:v1")
    first, second = (blobs / each["digest"][7:] for each in Layout(tmp_path / "images").image("v1")[0]["layers"])
    whole = first.read_bytes()
    for spoiled in ("cut off", "another user's", "written by all", "a link", "a FIFO"):
        match spoiled:
            case "cut off":
                os.truncate(first, 5)
            case "another user's":
                os.chown(first, ALICE, ALICE)
            case "written by all":
                first.chmod(0o646)
            case "a link":
                first.rename(tmp_path / "moved")
                first.symlink_to(tmp_path / "moved")
            case "a FIFO":
                first.unlink()
                os.mkfifo(first)
        kept = second.stat().st_ino
        export(chain, server, "v1", f"{place}:v1")
        status = first.lstat()
        assert (status.st_mode, status.st_uid) == (0o100644, 0)
        assert (first.read_bytes(), second.stat().st_ino) == (whole, kept)
    assert (tmp_path / "moved").read_bytes() == whole


@pytest.mark.usefixtures("users")
def test_who_may_read_a_layout_keeps_nobody_from_writing_it(chain: Command, server: Server, open_path: Path) -> None:
    images = open_path / "images"
    export(chain, server, "base", f"oci:{images}:base")
    locked = [images, images / "blobs", images / "blobs/sha256", images / "index.json", images / "oci-layout"]
    script = "".join(f"exec {9 + nth}<{path}; flock -s {9 + nth}; " for nth, path in enumerate(locked))
    command = [*alice, "bash", "-c", f"set -e; {script} echo locked; read _"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        export(chain, server, "v1", f"oci:{images}:v1")
        process.stdin.close()
    assert Layout(images).tags() == ["base", "v1"]
    for mode, owner in ((0o644, 0), (0o600, ALICE)):
        (images / LOCK).touch()
        (images / LOCK).chmod(mode)
        os.chown(images / LOCK, owner, owner)
        assert f"{images}/{LOCK} is nothing that snapfs has made: remove it" in export(
            chain, server, "v1", f"oci:{images}:v2", status=1
        )
        (images / LOCK).unlink()
    assert Layout(images).tags() == ["base", "v1"]


def test_one_fails_while_another_goes_on(tmp_path: Path) -> None:
    """What they share goes, and the other says so; what is part of an image by then stays."""
    path = str(tmp_path / "images")

    def fails(meanwhile: Callable[[], None]) -> None:
        with pytest.raises(KeyboardInterrupt), writing.OciDirectory(path, "one", "gzip") as one:
            one.layer(_Small(), lambda _: None)
            meanwhile()
            raise KeyboardInterrupt

    def finishes() -> None:
        with writing.OciDirectory(path, "two", "gzip") as two:
            made = two.layer(_Small(), lambda _: None)
            two.finish(json.dumps({"rootfs": {"diff_ids": [made.diff_id]}}).encode(), [made])

    with writing.OciDirectory(path, "three", "gzip") as three:
        taken: list[writing.Written] = []
        fails(lambda: taken.append(three.layer(_Small(), lambda _: None)))
        assert os.listdir(tmp_path / "images/blobs/sha256") == []
        with pytest.raises(InvalidArgument, match=r"has lost sha256:.*: export again"):
            three.finish(b"{}", taken)
    fails(finishes)
    assert Layout(Path(path)).layers("two") == [b"abc"]


def test_several_at_once(chain: Command, tmp_path: Path) -> None:
    """To one layout, which is new."""
    environment = {**os.environ, "SNAPFS": str(chain.mnt)}
    tags = ["one", "two", "three"]
    commands = [[*SNAPFS, "export", "v1", f"oci:{tmp_path}/images:{tag}"] for tag in tags]
    processes = [subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) for words in commands]
    assert [process.wait(60) for process in processes] == [0] * 3
    layout = Layout(tmp_path / "images")
    assert sorted(layout.tags()) == sorted(tags)
    for tag in tags:
        assert layout.layers(tag) == [layer(chain, "base"), layer(chain, "v1")]
    assert sorted(os.listdir(tmp_path / "images")) == ["blobs", "index.json", "oci-layout"]


def test_servers_that_never_answer(chain: Command, server: Server, tmp_path: Path) -> None:
    """On what a layout consists of, or where it or an archive is to be: they are not asked."""
    images = tmp_path / "images"
    export(chain, server, "base", f"oci:{images}:base")
    (tmp_path / "file").touch()
    for target in (images / "blobs", images / "blobs/sha256", images / "index.json"):
        with unanswering(target):
            said = export(chain, server, "v1", f"oci:{images}:v1", status=1)
        assert f"something is mounted on {target}: unmount it first" in said
    with unanswering(images):
        for place in (f"oci:{images}:v1", f"oci:{images}/new", f"oci-archive:{images}/new"):
            assert f"{images} is a file system that the user" in export(chain, server, "v1", place, status=NOT_PERMITTED)
    with unanswering(tmp_path / "file"):
        assert "already exists" in export(chain, server, "v1", f"docker-archive:{tmp_path}/file", status=1)
    assert Layout(images).tags() == ["base"]


class _Small:
    """A layer of some bytes."""

    size = 3
    diff_id: str | None = None
    is_as_it_came = False
    blob = None

    def pieces(self) -> Iterator[bytes]:
        yield b"abc"


def test_a_directory_that_is_exchanged_meanwhile(tmp_path: Path) -> None:
    """All goes on in the one that was found."""
    (victim := tmp_path / "victim").mkdir()
    (tmp_path / "place").mkdir()
    with (
        writing.OciDirectory(str(tmp_path / "place/images"), "v1", "gzip") as layout,
        writing.archive(str(tmp_path / "place/oci.tar")) as oci,
        writing.archive(str(tmp_path / "place/docker.tar")) as docker,
    ):
        (tmp_path / "place").rename(tmp_path / "moved")
        (tmp_path / "place").symlink_to(victim)
        (tmp_path / "moved/images/blobs").rename(tmp_path / "blobs")
        (tmp_path / "moved/images/blobs").symlink_to(victim)
        for made in (layout, writing.OciArchive(oci, "v1", "gzip"), writing.DockerArchive(docker, "v1")):
            made.finish(b"{}", [made.layer(_Small(), lambda size: None)])
    assert os.listdir(victim) == []
    assert sorted(os.listdir(tmp_path / "moved")) == ["docker.tar", "images", "oci.tar"]
    assert len(os.listdir(tmp_path / "blobs/sha256")) == 3
    assert sorted(os.listdir(tmp_path / "moved/images")) == ["blobs", "index.json", "oci-layout"]


def test_without_files_that_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS."""
    real = os.open

    def without(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", without)
    with writing.OciDirectory(str(tmp_path / "images"), "v1", "gzip") as layout, writing.archive(f"{tmp_path}/a") as archive:
        for made in (layout, writing.OciArchive(archive, "v1", "gzip")):
            made.finish(b"{}", [made.layer(_Small(), lambda size: None)])
    assert sorted(os.listdir(tmp_path)) == ["a", "images"]
    assert Layout(tmp_path / "images").tags() == ["v1"]
    with tarfile.open(tmp_path / "a") as tar:
        assert len(tar.getnames()) == 5


def test_what_is_known_of_an_image() -> None:
    """Its own history stays, as far as it fits."""
    known = {"architecture": "arm64", "config": {"Cmd": ["sh"]}, "history": [{"created_by": "a"}, {"empty_layer": True}]}
    steps = [Step(0, ""), Step(86400, "why")]
    made = configuration(known, ["sha256:1", "sha256:2"], steps)
    assert made == {
        "architecture": "arm64",
        "os": "linux",
        "config": {"Cmd": ["sh"]},
        "created": "1970-01-02T00:00:00Z",
        "rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2"]},
        "history": [
            {"created": "1970-01-01T00:00:00Z", "created_by": "snapfs commit"},
            *known["history"],
        ],
    }
    assert len(configuration(known, ["sha256:1"], steps[:1])["history"]) == 2
    for none in (None, 5, "", "yesterday", "2020-01-01", "2020-13-01T00:00:00Z", "0001-01-01T00:00:00"):
        made = configuration({"created": none, "history": [{"created": none}]}, ["sha256:1"], steps[1:], 5)
        assert (made["created"], made["history"]) == ("1970-01-01T00:00:05Z", [{"created": none}])
    never = "0001-01-01T00:00:00Z"  # as Go writes what is not known
    assert configuration({"created": never}, ["sha256:1"], steps[1:], 5)["created"] == never
    assert len(configuration({"history": [{}, {}]}, ["sha256:1"], steps[:1])["history"]) == 1
