"""A chain of snapshots becomes an image: what is in it, that others read it, that it is the same each time, whole or none."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from snapfs.images.configuration import Step, architecture, configuration
from tests.command import Command, held
from tests.syscalls import EVERY, KILL, Server, running
from tests.trees import everything

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
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert "SOURCE_DATE_EPOCH" in chain("export", "v1", f"oci:{tmp_path}/images:v2", status=2)


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


def test_podman_takes_it(chain: Command, tmp_path: Path) -> None:
    """And what it saves of it are the same layers, found again."""
    ids = [digest(layer(chain, name)) for name in ("base", "v1")]
    own = [f"--{name}={tmp_path}/podman-{name}" for name in ("root", "runroot", "tmpdir")]

    def podman(*words: str) -> str:
        return subprocess.run(
            ["podman", *own, "--storage-driver=vfs", "--runtime=runc", *words], capture_output=True, text=True, check=True
        ).stdout

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
    ):
        assert said in chain("export", *words, status=status)
    assert sorted(os.listdir(tmp_path)) == before


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
    assert len(configuration({"history": [{}, {}]}, ["sha256:1"], steps[:1])["history"]) == 1
