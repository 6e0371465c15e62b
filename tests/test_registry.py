"""An image from a registry; a child of it back there; and from there, by another snapfs, to a containerd that runs it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import pytest

from tests.command import SNAPFS, Command
from tests.containerd_client import Containerd
from tests.containerds import SUITES
from tests.daemon import Daemon
from tests.images import MACHINE, Layer, Layout, chain_of, digest_of
from tests.processes import die_with_parent, until
from tests.tree import remove_all

pytestmark = pytest.mark.mounts


@pytest.fixture
def command(module_daemon: Daemon) -> Iterator[Command]:
    yield Command(module_daemon.mnt)
    remove_all(module_daemon.mnt)


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

    def fetched(self) -> list[str]:
        """The digests of the blobs that it was asked for, in this order."""
        return re.findall(r'"GET /v2/\S+/blobs/(\S+) ', self.log.read_text())

    def layers(self, name: str, tag: str) -> list[str]:
        where = f"http://{self.address}/v2/{name}/manifests/{tag}"
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        with urlopen(Request(where, headers=accept), timeout=5) as answer:
            return [layer["digest"] for layer in json.load(answer)["layers"]]


class Gate(ThreadingHTTPServer):
    """Hands on to a registry what it is asked for, but for the blobs that are ``shut``: who asks for one hears nothing until
    all are let through, or ``cut`` off."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.registry = registry
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.shut: set[str] = set()
        self.cut = False
        self.waiting = threading.Event()
        self.opened = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def open(self, *, cut: bool = False) -> None:
        self.cut = cut
        self.shut = set()
        self.opened.set()


class Asked(BaseHTTPRequestHandler):
    server: Gate

    def do_GET(self) -> None:
        if self.path.rpartition("/")[2] in self.server.shut:
            self.server.waiting.set()
            self.server.opened.wait()
            if self.server.cut:
                return
        headers = {"Accept": ", ".join(self.headers.get_all("Accept", []))}
        there = f"http://{self.server.registry.address}{self.path}"
        with urlopen(Request(there, headers=headers), timeout=60) as answer:
            self.send_response(answer.status)
            for name in ("Content-Type", "Content-Length", "Docker-Content-Digest"):
                self.send_header(name, answer.headers[name])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who has asked was killed
                self.end_headers()
                shutil.copyfileobj(answer, self.wfile)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gate(registry: Registry) -> Iterator[Gate]:
    with Gate(registry) as gate:
        with open(f"{os.environ['HOME']}/.config/containers/registries.conf", "a") as file:
            file.write(f'[[registry]]\nlocation = "{gate.address}"\ninsecure = true\n')
        yield gate
        gate.open(cut=True)
        gate.shutdown()


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


def test_a_base_that_others_have_made_is_not_sent_again(registry: Registry, command: Command, tmp_path: Path) -> None:
    """Also where they have packed it in another way than snapfs; a registry that lacks it gets it, with the same diff ids."""
    base = pushed(registry, tmp_path)
    theirs = registry.layers("base", "1")
    command("import", base, "base:1")
    (command.mnt / "images/base:1/active/w").mkdir()
    (command.mnt / "active/w/rootfs/etc/release").write_text("two\n")
    os.rename(command.mnt / "active/w", command.mnt / "committed/shop")

    sent = registry.uploaded()
    command("export", "shop", f"docker://{registry.address}/base:2")
    assert registry.layers("base", "2")[:2] == theirs
    assert registry.uploaded() == sent + 3, "a layer, a configuration and a manifest"

    (tmp_path / "elsewhere").mkdir()
    elsewhere = Registry(tmp_path / "elsewhere")
    try:
        with open(f"{os.environ['HOME']}/.config/containers/registries.conf", "a") as file:
            file.write(f'[[registry]]\nlocation = "{elsewhere.address}"\ninsecure = true\n')
        command("export", "shop", f"docker://{elsewhere.address}/shop:1")
        assert len(elsewhere.layers("shop", "1")) == 3
        image = f"docker://{elsewhere.address}/shop:1"
        config = subprocess.check_output(["skopeo", "inspect", "--config", "--raw", image])
        assert json.loads(config)["rootfs"]["diff_ids"][:2] == list(map(digest_of, base_layers()))
    finally:
        elsewhere.process.kill()
        elsewhere.process.wait()


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


class Pushed(NamedTuple):
    """An image in a registry, as others name it; the digests of its layers' blobs; and what its last layer is called here."""

    name: str
    blobs: list[str]
    top: str


def put(registry: Registry, tmp_path: Path, tag: str, tars: list[bytes], *, machines: bool = False) -> Pushed:
    """Push an image of these layers; among ``machines``, for another of which there is another."""
    layout = Layout(tmp_path / f"layout-{tag}")
    top = layout.add(tag, tars, packed=True)
    manifest = json.loads((layout.blobs / layout.listed[0]["digest"].partition(":")[2]).read_bytes())
    if machines:
        kind = {"os": "linux", "architecture": "s390x"}
        other = {**layout.manifest([Layer().add("s390x").done()], packed=True, machine="s390x"), "platform": kind}
        ours = {key: value for key, value in layout.listed[0].items() if key != "annotations"}
        both = [other, {**ours, "platform": {"os": "linux", "architecture": MACHINE}}]
        index = layout.document({"schemaVersion": 2, "manifests": both}, "index.v1+json")
        layout.listed = [{**index, "annotations": layout.listed[0]["annotations"]}]
        layout.write()
    place = f"docker://{registry.address}/app:{tag}"
    words = ["skopeo", "copy", "--quiet", "--insecure-policy", *(["--all"] * machines)]
    subprocess.run([*words, f"oci:{layout.top}:{tag}", place], check=True)
    return Pushed(f"app:{tag}", [each["digest"] for each in manifest["layers"]], top)


def small(*names: str) -> list[bytes]:
    return [Layer().add(name, os.urandom(2000)).done() for name in names]


def asked(registry: Registry, blobs: list[str]) -> list[str]:
    """Those of ``blobs`` that the registry was asked for, as often as that was."""
    return sorted(each for each in registry.fetched() if each in blobs)


@pytest.mark.parametrize("machines", [False, True], ids=["one", "index"])
def test_a_pull_asks_for_what_is_missing(
    registry: Registry, command: Command, tmp_path: Path, spool: Path, machines: bool
) -> None:
    tars = small("a", "b", "c")
    first, second = (put(registry, tmp_path, tag, tars[:count], machines=machines) for tag, count in (("1", 2), ("2", 3)))
    for image, there in ((first, first.blobs), (second, second.blobs[2:]), (second, [])):
        before = asked(registry, image.blobs)
        said = command("import", f"docker://{registry.address}/{image.name}", image.name)
        assert asked(registry, image.blobs) == sorted([*before, *there])
        assert said == f"{command.mnt}/committed/{image.top}\n"
    assert sorted(os.listdir(command.mnt / "images/app:2/rootfs/")) == ["a", "b", "c"]
    assert os.listdir(spool) == []


def test_a_layer_that_comes_again_higher_up(registry: Registry, command: Command, tmp_path: Path) -> None:
    """It is there, and is needed nevertheless."""
    a, b = small("a", "b")
    command("import", f"docker://{registry.address}/{put(registry, tmp_path, '1', [a]).name}")
    image = put(registry, tmp_path, "2", [a, b, a])
    command("import", f"docker://{registry.address}/{image.name}")
    assert len(command.names()) == 3
    assert (command.mnt / f"committed/{image.top}/rootfs/a").is_file()


def test_a_layer_that_goes_meanwhile(registry: Registry, gate: Gate, command: Command, tmp_path: Path, spool: Path) -> None:
    """What was not fetched, for it was there, is fetched then; what has arrived is not fetched again."""
    tars = small("a", "b", "c")
    image = put(registry, tmp_path, "1", tars[:2])
    command("import", f"docker://{registry.address}/{image.name}")
    image = put(registry, tmp_path, "2", tars)
    gate.shut = {image.blobs[2]}
    words = [*SNAPFS, "import", "--at", str(command.mnt), f"docker://{gate.address}/{image.name}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
        assert gate.waiting.wait(60)
        command("rm", *reversed(chain_of(tars[:2])))
        gate.open()
        assert process.communicate(timeout=60)[0] == f"{command.mnt}/committed/{image.top}\n"
    assert len(command.names()) == 3
    assert asked(registry, image.blobs) == sorted([*image.blobs, *image.blobs[:2]])
    assert os.listdir(spool) == []


@pytest.mark.parametrize("how", ["killed", "interrupted", "cut"])
def test_a_pull_that_is_interrupted_goes_on(
    registry: Registry, gate: Gate, command: Command, tmp_path: Path, spool: Path, how: str
) -> None:
    """What has arrived is not asked for again, and nothing is left."""
    image = put(registry, tmp_path, "1", small("a", "b", "c"))
    gate.shut = {image.blobs[1]}
    words = [*SNAPFS, "import", "--at", str(command.mnt), f"docker://{gate.address}/{image.name}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as process:
        assert gate.waiting.wait(60)
        until(lambda: len(list(spool.glob("*/oci/blobs/sha256/*"))) >= 2)
        if how != "cut":
            process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
            process.wait(60)
        gate.open(cut=True)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == {"killed": -signal.SIGKILL, "interrupted": 130, "cut": 1}[how]
    assert ("what has arrived is kept for the next import of it" in said) == (how == "cut")
    assert len(os.listdir(spool)) == 1
    assert command.names() == []
    assert asked(registry, image.blobs) == sorted([image.blobs[0], image.blobs[2]])
    command("import", f"docker://{registry.address}/{image.name}")
    assert asked(registry, image.blobs) == sorted(image.blobs)
    assert os.listdir(spool) == []
    assert len(command.names()) == 3


def test_what_is_refused_is_not_fetched(registry: Registry, command: Command, tmp_path: Path) -> None:
    """An image for another machine, and one whose name is taken."""
    first, second = (put(registry, tmp_path, tag, small(tag)) for tag in "12")
    layout = Layout(tmp_path / "layout-s390x")
    layout.add("s390x", small("a"), machine="s390x")
    other = f"docker://{registry.address}/app:s390x"
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout.top}:s390x", other], check=True)
    command("import", f"docker://{registry.address}/{first.name}", "app")
    before = len(registry.fetched())
    said = command("import", f"docker://{registry.address}/{second.name}", "app", status=4)
    assert "--replace gives the name to this one" in said
    assert "the image is for linux/s390x, and this machine is" in command("import", other, status=1)
    assert len(registry.fetched()) == before + 2, "a configuration each"
    command("import", "--force", other)
    listed = {**layout.listed[0], "platform": {"os": "linux", "architecture": "s390x"}}
    layout.listed = [layout.document({"schemaVersion": 2, "manifests": [listed]}, "index.v1+json")]
    layout.write()
    subprocess.run(["skopeo", "copy", "--quiet", "--insecure-policy", "--all", f"oci:{layout.top}", other], check=True)
    assert "the image is for linux/s390x, and this machine is" in command("import", other, status=1)
    command("import", "--force", other)


def test_what_is_left_of_a_pull_is_looked_at(registry: Registry, command: Command, tmp_path: Path, spool: Path) -> None:
    """Of a pull that was killed: it must hash to what it is named by; what is empty, or another user's, or an image's that
    nobody wants any more, is no blob of it."""
    image = put(registry, tmp_path, "1", small("a", "b", "c"))
    place = f"docker://{registry.address}/{image.name}"

    def leave(name: str, blob: str, data: bytes) -> Path:
        path = spool / f"snapfs-image-{name}/oci/blobs" / blob.replace(":", "/")
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return path

    leave("damaged", image.blobs[0], b"x" * (tmp_path / "layout-1/blobs" / image.blobs[0].replace(":", "/")).stat().st_size)
    assert "damaged" in command("import", place, status=1)
    assert (os.listdir(spool), command.names()) == ([], [])
    leave("empty", image.blobs[1], b"")
    theirs = leave("theirs", image.blobs[2], b"x")
    os.chown(spool / "snapfs-image-theirs", 60_001, 60_001)
    long_ago = leave("old", digest_of(b""), b"x").parents[3]
    os.utime(long_ago, (1e9, 1e9))
    before = asked(registry, image.blobs)
    command("import", place)
    assert asked(registry, image.blobs) == sorted([*before, *image.blobs])
    assert len(command.names()) == 3
    assert theirs.exists()
    assert not long_ago.exists()


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
