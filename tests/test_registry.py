"""An image from a registry; a child of it back there; and from there, by another snapfs, to a containerd that runs it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.command import SNAPFS, Command
from tests.containerd_client import Containerd
from tests.containerds import SUITES
from tests.daemon import Daemon
from tests.images import Layer, Layout
from tests.processes import die_with_parent, until

pytestmark = pytest.mark.mounts

APPLETS = ("sh", "cat", "mkdir", "chmod", "rm", "ls")


class Registry:
    """Debian's docker-registry on loopback; what is asked of it is in its log."""

    def __init__(self, base: Path) -> None:
        self.log = base / "log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        (base / "config.yml").write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {base}/data}}}}\nhttp: {{addr: '{self.address}'}}\n"
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(base / "config.yml")], stdout=log, stderr=log, preexec_fn=die_with_parent
            )
        until(self.answers)

    def answers(self) -> bool:
        try:
            with urlopen(f"http://{self.address}/v2/", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def uploaded(self) -> int:
        """How many blobs it has been sent."""
        return self.log.read_text().count('"PUT /v2/')

    def layers(self, name: str, tag: str) -> list[str]:
        where = f"http://{self.address}/v2/{name}/manifests/{tag}"
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        with urlopen(Request(where, headers=accept), timeout=5) as answer:
            return [layer["digest"] for layer in json.load(answer)["layers"]]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    base = tmp_path / "registry"
    base.mkdir()
    registry = Registry(base)
    settings = tmp_path / "home/.config/containers"
    settings.mkdir(parents=True)
    (settings / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    try:
        yield registry
    finally:
        registry.process.kill()
        registry.process.wait()


def base_layers() -> list[bytes]:
    busybox = shutil.which("busybox")
    assert busybox is not None
    first = Layer().add("bin", None, 0o755).add("bin/busybox", Path(busybox).read_bytes(), 0o755)
    for applet in APPLETS:
        first.link(f"bin/{applet}", "busybox")
    second = Layer().add("etc", None, 0o755).add("etc/release", b"one\n").add("tmp", None, 0o1777).add("tmp/junk", b"x")
    return [first.done(), second.done()]


def pushed(registry: Registry, tmp_path: Path) -> str:
    """A base image in the registry."""
    layout = Layout(tmp_path / "base")
    layout.add("v", base_layers(), packed=True)
    place = f"docker://{registry.address}/base:1"
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{tmp_path}/base:v", place], check=True)
    return place


def test_from_a_registry_to_a_container_elsewhere(
    registry: Registry, make_daemon: Callable[..., Daemon], tmp_path: Path, containerd: Containerd
) -> None:
    places = [(tmp_path / f"{name}-root", tmp_path / f"{name}-mnt") for name in ("one", "two")]
    one, two = (Command(make_daemon(root=root, mnt=mnt).start().mnt) for root, mnt in places)
    base = pushed(registry, tmp_path)
    one("import", base, "base:1")
    (one.mnt / "images/base:1/active/w").mkdir()
    rootfs = one.mnt / "active/w/rootfs"
    (rootfs / "etc/release").write_text("two\n")
    (rootfs / "tmp/junk").unlink()
    os.rename(one.mnt / "active/w", one.mnt / "committed/shop")
    image = f"docker://{registry.address}/shop:1"
    one("export", "shop", image)

    sent = registry.uploaded()
    one("export", "shop", image)  # the manifest alone
    assert registry.uploaded() == sent + 1
    assert len(registry.layers("shop", "1")) == 3

    two("import", image, "shop:1")
    top = os.readlink(two.mnt / "images/shop:1").rpartition("/")[2]
    there = two.mnt / f"committed/{top}"
    assert (there / "rootfs/etc/release").read_text() == "two\n"
    assert json.loads((there / "image.json").read_text())["config"]["Cmd"] == ["/bin/sh"]
    there_ids = [json.loads((there / "image.json").read_text())["rootfs"]["diff_ids"][-1]]
    (there / "layer.tar").read_bytes()
    assert [json.loads((there / "info.json").read_text())["diff_id"]] == there_ids
    two("export", "images/shop:1", f"oci-archive:{tmp_path}/shop.tar:test.local/shop:1")

    containerd.ctr("image", "import", "--snapshotter", "overlayfs", f"{tmp_path}/shop.tar")
    runc = ("--runc-root", str(containerd.base / "runc"))
    said = containerd.ctr(
        "run",
        "--rm",
        "--snapshotter",
        "overlayfs",
        *runc,
        "test.local/shop:1",
        "c",
        "/bin/sh",
        "-c",
        "cat /etc/release; ls /tmp",
    )
    assert said == "two\n"


def test_a_push_that_is_interrupted_goes_on(registry: Registry, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """What has arrived is not sent again; and nothing is left of the one that was killed."""
    snapfs = Command(make_daemon().start().mnt)
    parent = snapfs.mnt
    for name in ("a", "b", "c"):
        (parent / "active/w").mkdir()
        (snapfs.mnt / "active/w/rootfs/file").write_bytes(os.urandom(4 << 20))
        os.rename(parent / "active/w", parent / f"committed/{name}")
        parent = snapfs.mnt / f"committed/{name}"
    image = f"docker://{registry.address}/large:1"
    place = {**os.environ, "SNAPFS": str(snapfs.mnt), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*SNAPFS, "export", "c", image], env=place, preexec_fn=die_with_parent) as process:
        until(registry.uploaded)
        process.kill()
    snapfs("export", "c", image)
    assert registry.uploaded() <= 3 + 2 + 1, "three layers, configuration and manifest, and one that was cut"
    assert len(registry.layers("large", "1")) == 3


def test_the_difference_that_an_upgrade_made(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """One layer, which makes the same of the same image elsewhere: as examples/images tells."""
    Layout(tmp_path / "base").add("v", base_layers())
    places = [(tmp_path / f"{name}-root", tmp_path / f"{name}-mnt") for name in ("one", "two")]
    one, two = (Command(make_daemon(root=root, mnt=mnt).start().mnt) for root, mnt in places)
    for each in (one, two):
        each("import", f"oci:{tmp_path}/base:v", "shop:1")
    one("prepare", "try", "--parent", "images/shop:1")
    one("run", "try", "--", "chroot", ".", "/bin/sh", "-c", "rm /tmp/junk; echo two > /etc/release")
    assert one("diff", "try") == "C /etc/release\nD /tmp/junk\n"
    one("commit", "try", "shop-2")
    shutil.copy(one.mnt / "committed/shop-2/layer.tar", tmp_path / "upgrade.tar")
    made = two("import", "--parent", "images/shop:1", str(tmp_path / "upgrade.tar"), "shop:2").strip()
    ours, theirs = one.mnt / "committed/shop-2/rootfs/", Path(made) / "rootfs/"
    assert (theirs / "etc/release").read_text() == "two\n"
    assert os.listdir(theirs / "tmp") == os.listdir(ours / "tmp") == []
    assert Path(made, "layer.tar").read_bytes() == (tmp_path / "upgrade.tar").read_bytes()


def test_a_build_of_three_steps(make_daemon: Callable[..., Daemon], tmp_path: Path, containerd: Containerd) -> None:
    """A layer a step, each with its command in the history; the workspace goes, and the image runs."""
    snapfs = Command(make_daemon().start().mnt)
    Layout(tmp_path / "base").add("v", base_layers())
    snapfs("import", f"oci:{tmp_path}/base:v", "test.local/base:1")
    script = Path(__file__).parent.parent / "examples/images/build.sh"
    archive = f"{tmp_path}/app.tar"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/snapfs"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m snapfs.cli "$@"\n')
    command.chmod(0o755)
    subprocess.run(
        ["sh", str(script), "test.local/base:1", f"oci-archive:{archive}:test.local/app:1"],
        env={**os.environ, "PATH": path, "SNAPFS": str(snapfs.mnt)},
        check=True,
    )
    assert os.listdir(snapfs.mnt / "active") == []
    containerd.ctr("image", "import", "--snapshotter", "overlayfs", archive)
    runc = ("--runc-root", str(containerd.base / "runc"))
    words = ("run", "--rm", "--snapshotter", "overlayfs", *runc, "test.local/app:1", "c", "/bin/sh")
    assert containerd.ctr(*words, "/app/run") == "built by snapfs\n"
    assert containerd.ctr(*words, "-c", "ls /tmp; ls -l /app/run").startswith("-rwxr-xr-x")
    done = subprocess.run(["skopeo", "inspect", "--config", f"oci-archive:{archive}"], capture_output=True, check=True)
    history = [each["created_by"] for each in json.loads(done.stdout)["history"]]
    assert [step.split()[0] for step in history[-3:]] == ["mkdir", "chmod", "rm"]


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Containerd]:
    its = Containerd(tmp_path / "containerd", SUITES[0], tmp_path / "none")
    try:
        yield its.start()
    finally:
        its.cleanup()
