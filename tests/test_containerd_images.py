"""Behind a real containerd: an image is imported, run, looked at, committed, removed and collected."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.containerd_client import SECONDS, Client, Containerd, connected
from tests.containerds import SUITES, binaries, version
from tests.daemon import Daemon
from tests.images import Layer, Layout
from tests.readme import read, recipe

EXAMPLES = Path(__file__).parent.parent / "examples/containerd"
IMAGE = "test.local/layers:1"
APPLETS = ("sh", "cat", "find", "md5sum", "sleep", "sort", "stat", "xargs", "touch", "rm", "mkdir")
LOOK = """cd / && find bin data etc kept -print0 | xargs -0 stat -c '%n %f %u %g %h %N' | sort &&
find data etc kept -type f | sort | xargs md5sum"""


def layers() -> list[bytes]:
    busybox = shutil.which("busybox")
    assert busybox is not None
    first = Layer().add("bin", None, 0o755).add("bin/busybox", Path(busybox).read_bytes(), 0o755)
    for applet in APPLETS:
        first.add(f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox")
    first.add("etc", None, 0o755).add("etc/release", b"one\n").add("etc/secret", b"s", 0o600, uid=12, gid=34)
    first.add("data", None, 0o1777).add("data/gone", b"x").add("data/old/deep", b"hidden").add("data/both", b"first")
    first.add("data/twin", type=tarfile.LNKTYPE, linkname="data/both").add("whole/tree/of/files", b"x").add(
        "kept/file", b"kept"
    )
    second = Layer().add("data/.wh.gone").add("data/old", None, 0o700).add("data/old/.wh..wh..opq").add("data/old/new", b"new")
    second.add("etc/release", b"two\n").add(".wh.whole")
    third = (
        Layer().add("data/gone", b"back again", 0o4755).add("kept", None, 0o750, uid=7).add("etc/pipe", type=tarfile.FIFOTYPE)
    )
    third.add("data/old/.wh.new").add("data/old/newer", b"newer")
    return [first.done(), second.done(), third.done()]


def packed(base: Path, tars: Sequence[bytes], name: str) -> Path:
    """An OCI layout in a tar, made in ``base``: the image ``name`` of these layers."""
    layout = Layout(base / "oci")
    layout.add(name.removeprefix("test.local/"), tars)
    return layout.archive(base / "image.tar")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout in a tar."""
    return packed(tmp_path_factory.mktemp("image"), layers(), IMAGE)


class Both:
    """A containerd and the snapfs that serves it."""

    def __init__(self, base: Path, snapfs: Daemon, containerd: Containerd, image: Path) -> None:
        self.snapfs = snapfs
        self.containerd = containerd
        self.image = image
        self.socket = base / "snapfs.sock"
        self.runc = ("--runc-root", str(containerd.base / "runc"))
        self.ctr, self.snapshots, self.mnt = containerd.ctr, containerd.snapshots, snapfs.mnt

    def load(self, snapshotter: str = "snapfs") -> None:
        self.ctr("image", "import", "--snapshotter", snapshotter, str(self.image))

    def run(self, *command: str, key: str = "web", snapshotter: str = "snapfs") -> str:
        return self.ctr("run", "--rm", "--snapshotter", snapshotter, *self.runc, IMAGE, key, *command)

    def shown(self) -> dict[str, list[str]]:
        return {kind: sorted(os.listdir(self.mnt / kind)) for kind in ("active", "view", "committed")}

    def collected(self) -> None:
        """All images go, and what nobody needs any more with them."""
        self.ctr("image", "rm", "--sync", IMAGE)


EMPTY: dict[str, list[str]] = {"active": [], "view": [], "committed": []}


@pytest.fixture(params=SUITES, ids=version)
def suite(request: pytest.FixtureRequest) -> str:
    """The Debian suite whose containerd is used."""
    return str(request.param)


MakeBoth = Callable[..., Both]


@pytest.fixture
def make_both(make_daemon: Callable[..., Daemon], tmp_path: Path, suite: str, image: Path) -> Iterator[MakeBoth]:
    """Started, with arguments of snapfs and ``capabilities`` in the configuration of containerd."""
    with ExitStack() as stack:

        def make(*arguments: str, capabilities: Sequence[str] = ()) -> Both:
            snapfs = make_daemon("--containerd", str(tmp_path / "snapfs.sock"), *arguments).start()
            containerd = Containerd(tmp_path / "c", suite, tmp_path / "snapfs.sock", capabilities)
            stack.callback(containerd.cleanup)
            return Both(tmp_path, snapfs, containerd.start(), image)

        yield make


@pytest.fixture
def both(make_both: MakeBoth) -> Both:
    return make_both()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_container_sees_the_same_files_as_under_overlayfs(both: Both) -> None:
    both.load()
    both.load("overlayfs")
    assert len(both.shown()["committed"]) == 3
    found = both.run("/bin/sh", "-c", LOOK)
    assert found == both.run("/bin/sh", "-c", LOOK, snapshotter="overlayfs")
    lines = {line.split()[0]: line.split()[1:] for line in found.splitlines()}
    assert "data/old/deep" not in lines
    assert {"data/old", "data/old/newer", "data/gone", "etc/pipe", "kept/file", "data/twin"} <= set(lines)
    assert lines["data/gone"][0] == f"{0o104755:x}"
    assert lines["etc/secret"][:3] == [f"{0o100600:x}", "12", "34"]
    assert lines["data/twin"][3] == "2"
    assert hashlib.md5(b"two\n").hexdigest() + "  etc/release" in found
    both.collected()
    assert both.shown() == EMPTY
    assert os.listdir(both.snapfs.root / "snapshots") == []


def stacked(mnt: Path) -> list[Path]:
    """The committed snapshots, which stand on one another, the lowest first."""
    found = {path.name: path for path in (mnt / "committed").iterdir()}
    below = {
        os.path.basename(os.readlink(path / "parent")): name for name, path in found.items() if "parent" in os.listdir(path)
    }
    (name,) = found.keys() - below.values()
    chain = [found[name]]
    while (above := below.get(chain[-1].name)) is not None:
        chain.append(found[above])
    return chain


@pytest.mark.parametrize("suite", ["bookworm", "sid"], indirect=True, ids=version)
def test_layer_tars_are_layers_of_an_image(both: Both, tmp_path: Path) -> None:
    """containerd makes of them what they were made of, calls them what info.json says, and their own tars are the same."""
    both.load()
    expected = both.run("/bin/sh", "-c", LOOK)
    tars = [(path / "layer.tar").read_bytes() for path in stacked(both.mnt)]
    assert len(tars) == 3
    both.collected()
    eventually(lambda: both.shown() == EMPTY)
    (tmp_path / "again").mkdir()
    both.image = packed(tmp_path / "again", tars, IMAGE)
    both.load()
    assert both.run("/bin/sh", "-c", LOOK) == expected
    for path, data in zip(stacked(both.mnt), tars, strict=True):
        assert (path / "layer.tar").read_bytes() == data
        said = json.loads((path / "info.json").read_text())
        assert said["diff_id"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert said["name"].endswith(said["chain_id"])


USER_NAMESPACE = ("--remap-labels", "--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
LOOK_AT_OWNERS = LOOK.replace(" %h", "").replace(" %f", "")  # a copy has other numbers of links, and 1.7's no set-user-ID bits


def in_a_user_namespace(both: Both, *, fails: bool = False) -> str:
    command = (IMAGE, "mapped", "/bin/sh", "-c", LOOK_AT_OWNERS)
    return both.ctr("run", "--rm", "--snapshotter", "snapfs", *USER_NAMESPACE, *both.runc, *command, fails=fails)


@pytest.mark.parametrize(
    ("suite", "remap_ids"),
    [("trixie", False), ("sid", False), ("sid", True)],  # 1.6 maps no ids of files, and 1.7 knows no mount that does
    indirect=["suite"],
    ids=[f"{version('trixie')}-copied", f"{version('sid')}-copied", f"{version('sid')}-mounted"],
)
@pytest.mark.usefixtures("open_path")  # the container's root is another user here
def test_ids_are_mapped_once(make_both: MakeBoth, remap_ids: bool) -> None:
    """By containerd, in a copy of the image, or by the mount: a container in a user namespace sees what any other does."""
    both = make_both("-o", "remap_ids", capabilities=["remap-ids"]) if remap_ids else make_both()
    both.load()
    expected = both.run("/bin/sh", "-c", LOOK_AT_OWNERS)
    assert in_a_user_namespace(both) == expected
    assert len(both.shown()["committed"]) == (3 if remap_ids else 4)
    assert ((100012, 200034) in owners(both.snapfs.root)) is not remap_ids
    both.collected()
    assert both.shown() == EMPTY


def owners(root: Path) -> set[tuple[int, int]]:
    """Of all that is in layers, on the host."""
    found = map(os.lstat, (root / "snapshots").rglob("*"))
    return {(entry.st_uid, entry.st_gid) for entry in found}


@pytest.mark.parametrize("suite", ["trixie", "sid"], indirect=True, ids=version)
def test_a_containerd_that_was_not_told_of_remap_ids_is_told_now(make_both: MakeBoth) -> None:
    both = make_both("-o", "remap_ids")
    both.load()
    said = in_a_user_namespace(both, fails=True)
    assert "has the host's ids already (its top directory belongs to 100000:200000)" in said
    assert 'capabilities = ["remap-ids"]' in said
    assert both.shown()["active"] == []
    both.collected()
    assert both.shown() == EMPTY


def test_a_running_container_is_watched_in_the_tree(both: Both) -> None:
    both.load()
    both.ctr("run", "-d", "--snapshotter", "snapfs", *both.runc, IMAGE, "web", "/bin/sleep", "1000")
    (key,) = both.shown()["active"]
    assert key.endswith("%2Fweb")
    web = both.mnt / "active" / key
    both.ctr("task", "exec", "--exec-id", "e1", "web", "/bin/sh", "-c", "echo hello > /data/hello; rm /kept/file")
    assert (web / "rootfs/data/hello").read_text() == "hello\n"
    said = json.loads((web / "info.json").read_text())
    assert said["origin"] == "containerd"
    tasks = both.containerd.base / "state/io.containerd.runtime.v2.task"
    assert said["mounted"] == [str(tasks / both.containerd.namespace / "web/rootfs")]
    assert os.readlink(web / "rootfs") == said["mounted"][0], "nothing is mounted a second time"
    assert {"A /data/hello", "D /kept/file"} < set((web / "changes").read_text().splitlines()), "and runc's mountpoints"
    done = subprocess.run(
        ["sh", "-euc", recipe("Look into a running container", read("examples/containerd"))],
        cwd=both.mnt,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {key, "A /data/hello", "D /kept/file", "etc"} < set(done.stdout.splitlines())
    with pytest.raises(OSError, match="busy"):
        web.rename(both.mnt / "committed/saved")
    both.ctr("task", "kill", "--signal", "KILL", "web")
    eventually(lambda: "STOPPED" in both.ctr("task", "ls"))
    both.ctr("task", "rm", "web")
    both.snapshots("commit", "saved", "web")
    assert both.shown()["active"] == []
    (saved,) = (name for name in both.shown()["committed"] if name.endswith("%2Fsaved"))
    assert (both.mnt / "committed" / saved / "rootfs/data/hello").read_text() == "hello\n"
    both.ctr("container", "rm", "web")
    both.snapshots("rm", "saved")
    both.collected()
    assert both.shown() == EMPTY


def test_collection_spares_what_the_tree_needs(both: Both) -> None:
    """What the tree made is not seen; a layer of containerd's under it stays as long as it lives."""
    both.load()
    top = next(name for name in both.shown()["committed"] if not os.listdir(both.mnt / "committed" / name / "committed"))
    (both.mnt / "active/mine").mkdir()
    (both.mnt / "committed" / top / "active/web").mkdir()
    (both.mnt / "active/web/rootfs/data/note").write_text("x")
    both.collected()
    assert both.shown()["active"] == ["mine", "web"]
    assert len(both.shown()["committed"]) == 3
    assert (both.mnt / "active/web/rootfs/etc/release").read_text() == "two\n"
    assert "failed to remove snapshot" in both.containerd.log()
    (both.mnt / "active/web").rmdir()
    both.load()
    assert both.run("/bin/sh", "-c", "cat /etc/release") == "two\n"
    both.collected()
    assert both.shown() == {**EMPTY, "active": ["mine"]}


def test_what_was_saved_in_the_tree_is_not_collected(both: Both) -> None:
    both.load()
    both.ctr("container", "create", "--snapshotter", "snapfs", IMAGE, "web", "/bin/sh")
    (key,) = both.shown()["active"]
    (both.mnt / "active" / key / "rootfs/data/note").write_text("x")
    os.rename(both.mnt / "active" / key, both.mnt / "committed/saved")
    both.ctr("container", "rm", "web")
    both.collected()
    assert "saved" in both.shown()["committed"]
    assert (both.mnt / "committed/saved/rootfs/data/note").read_text() == "x"


def test_every_verb_of_ctr_snapshots(both: Both, tmp_path: Path) -> None:
    snapshots = both.snapshots
    snapshots("prepare", "b")
    (name,) = both.shown()["active"]
    (both.mnt / "active" / name / "diff/file").write_text("hello\n")
    snapshots("commit", "base", "b")
    said = snapshots("prepare", "--target", "/mnt/x", "web", "base")
    assert "mount -t overlay overlay /mnt/x" in said
    assert said == snapshots("mounts", "/mnt/x", "web")
    assert f"{both.snapfs.root}/snapshots/1/fs" in snapshots("view", "--target", "/mnt/x", "peek", "base")
    info = json.loads(snapshots("info", "web"))
    assert (info["Kind"], info["Name"], info["Parent"]) == ("Active", "web", "base")
    snapshots("label", "web", "containerd.io/snapshot/team=blue")
    assert json.loads(snapshots("info", "web"))["Labels"]["containerd.io/snapshot/team"] == "blue"
    assert [line.split()[0] for line in snapshots("ls").splitlines()[1:]] == ["base", "peek", "web"]
    assert [line.strip(" \\_") for line in snapshots("tree").splitlines()] == ["base", "peek", "web"]
    assert "base" in snapshots("usage", "base")
    snapshots("rm", "peek")  # containerd collects a view that nothing refers to, when it comes to that
    target = next((both.mnt / "active").iterdir()) / "rootfs"
    (target / "more").write_text("x")
    diff = both.containerd.command("snapshots", "--snapshotter", "snapfs", "diff", "web")
    layer = subprocess.run(diff, stdout=subprocess.PIPE, check=True)
    assert b"more" in subprocess.run(["tar", "-tz"], input=layer.stdout, stdout=subprocess.PIPE, check=True).stdout
    assert "cannot remove snapshot with child" in snapshots("rm", "base", fails=True)
    assert "already exists" in snapshots("prepare", "web", fails=True)
    assert "not found" in snapshots("info", "none", fails=True)
    for key in ("web", "base"):
        snapshots("rm", key)
    both.load()
    (digest,) = {line.split()[2] for line in both.ctr("image", "ls").splitlines() if line.startswith(IMAGE)}
    snapshots("unpack", digest)
    both.collected()
    assert both.shown() == EMPTY


@pytest.mark.durable
def test_either_may_restart_under_the_other(both: Both, make_daemon: Callable[..., Daemon]) -> None:
    both.load()
    both.ctr("run", "-d", "--snapshotter", "snapfs", *both.runc, IMAGE, "web", "/bin/sleep", "1000")
    before = both.shown()
    assert both.snapfs.stop() == 0
    said = both.snapshots("prepare", "k", fails=True).lower()
    assert "unavailable" in said or "error while dialing" in said
    make_daemon("--containerd", str(both.socket)).start()
    assert both.shown() == before
    listing = both.containerd.command("snapshots", "--snapshotter", "snapfs", "ls")
    eventually(lambda: subprocess.run(listing, capture_output=True, check=False).returncode == 0)
    assert both.run("/bin/cat", "/etc/release", key="other") == "two\n"
    both.containerd.stop(signal.SIGKILL)
    both.containerd.start()
    both.ctr("task", "exec", "--exec-id", "e1", "web", "/bin/touch", "/data/hello")
    assert (both.mnt / "active" / before["active"][0] / "rootfs/data/hello").exists()
    both.ctr("task", "rm", "--force", "web")
    both.ctr("container", "rm", "web")
    both.collected()
    assert both.shown() == EMPTY


@pytest.mark.durable
@pytest.mark.parametrize("layer", [1, 3])
def test_the_daemon_is_killed_during_an_import(both: Both, layer: int) -> None:
    """While a layer is being unpacked: the next import goes on from there, and nothing of the first is left in the end."""
    load = both.containerd.command("image", "import", "--snapshotter", "snapfs", str(both.image))
    with subprocess.Popen(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as importing:
        eventually(lambda: f'"id": {layer}' in (both.mnt / ".snapfs/events").read_text())
        both.snapfs.stop(signal.SIGKILL)
        importing.wait(timeout=60)
    both.snapfs.start()
    eventually(lambda: subprocess.run(load, capture_output=True, check=False).returncode == 0)  # containerd dials once a second
    assert both.run("/bin/cat", "/etc/release", "/data/old/newer") == "two\nnewer"
    both.collected()
    assert both.shown() == EMPTY


def test_two_containers_at_once(both: Both) -> None:
    both.load()
    names = ("one", "two")
    for name in names:
        both.ctr("run", "-d", "--snapshotter", "snapfs", *both.runc, IMAGE, name, "/bin/sleep", "1000")
        both.ctr("task", "exec", "--exec-id", "e", name, "/bin/sh", "-c", f"echo {name} > /data/both")
    for key, name in zip(both.shown()["active"], names, strict=True):
        assert (both.mnt / "active" / key / "rootfs/data/both").read_text() == f"{name}\n"
        assert both.ctr("task", "exec", "--exec-id", "f", name, "/bin/cat", "/data/both") == f"{name}\n"
    for name in names:
        both.ctr("task", "rm", "--force", name)
        both.ctr("container", "rm", name)
    both.collected()
    assert both.shown() == EMPTY


def test_a_collection_removes_bottom_up_what_containerd_does_not_know(both: Both) -> None:
    """As after a containerd that was killed between the socket and its own records."""
    with connected(both.socket) as client:
        stranger(client)
        with pytest.raises(grpc.RpcError):
            client.call("Remove", key="stranger 0")
    both.load()
    both.collected()
    assert both.shown() == EMPTY


def stranger(client: Client) -> None:
    for number in range(3):
        client.layer(f"stranger {number}", f"stranger {number - 1}" if number else "")


@pytest.mark.parametrize(("major", "suite"), [("1.6", "bookworm"), ("1.7", "trixie"), ("2", "sid")])
def test_the_examples_configuration(major: str, suite: str) -> None:
    path = EXAMPLES / f"config-{major}.toml"
    config = tomllib.loads(path.read_text())
    assert config["version"] == (3 if major == "2" else 2)
    proxy = config["proxy_plugins"]["snapfs"]
    where = {"address": "/run/snapfs/snapfs.sock", "exports": {"root": "/var/lib/snapfs"}}
    known = {"capabilities": ["rebase"]} if major == "2" else {}
    assert proxy == {"type": "snapshot", **where, **known}, "remap-ids is for those who serve with remap_ids"
    unit = (EXAMPLES / "snapfs.service").read_text()
    assert re.search(
        rf"^ExecStart=\S+ serve {proxy['exports']['root']} \S+ --containerd {proxy['address']}$", unit, re.MULTILINE
    )
    dump = [str(binaries(suite) / "containerd"), "--config", str(path), "config", "dump"]
    merged = tomllib.loads(subprocess.run(dump, stdout=subprocess.PIPE, text=True, check=True).stdout)
    plugins = merged["plugins"]
    cri = plugins["io.containerd.cri.v1.images"] if major == "2" else plugins["io.containerd.grpc.v1.cri"]["containerd"]
    assert cri["snapshotter"] == "snapfs"
    assert merged["proxy_plugins"]["snapfs"]["address"] == proxy["address"]
    assert merged["proxy_plugins"]["snapfs"].get("capabilities", []) == known.get("capabilities", [])


def test_the_examples_unit(tmp_path: Path) -> None:
    unit = (EXAMPLES / "snapfs.service").read_text().replace("/usr/local/bin/snapfs", shutil.which("true") or "")
    (tmp_path / "snapfs.service").write_text(unit)
    command = ["systemd-analyze", "verify", str(tmp_path / "snapfs.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
