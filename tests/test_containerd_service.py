"""containerd's snapshots service on its socket: every message and error, and what the tree shows then."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from snapfs.containerd import snapshots_pb2 as wire
from snapfs.containerd.messages import PAGE, pages
from snapfs.containerd.status import status_of
from snapfs.errors import (
    AlreadyExists,
    Busy,
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SnapshotError,
    Unavailable,
)
from snapfs.model import Info, Kind, rfc3339
from tests.containerd_client import SECONDS, SERVICE, Client, connected
from tests.daemon import Daemon

ROOT = Path(__file__).parent.parent
EXTRACT = "default/11/extract-969002056-w-eF sha256:" + "ab" * 32
LAYER = "default/12/sha256:" + "ab" * 32


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    return make_daemon("--containerd", str(tmp_path / "run/snapfs.sock")).start()


@pytest.fixture
def client(served: Daemon, tmp_path: Path) -> Iterator[Client]:
    with connected(tmp_path / "run/snapfs.sock") as client:
        yield client


def refused(client: Client, code: grpc.StatusCode, method: str, /, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        client.call(method, **fields)
    assert caught.value.code() is code, caught.value.details()
    return str(caught.value.details())


# -- the messages


def test_the_generated_code_is_that_of_the_proto_files(tmp_path: Path) -> None:
    protos = [f"snapfs/containerd/{name}.proto" for name in ("mount", "snapshots")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", *protos]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("mount_pb2", "snapshots_pb2"):
        for suffix in ("py", "pyi"):
            both = [(base / f"snapfs/containerd/{name}.{suffix}").read_text().splitlines() for base in (tmp_path, ROOT)]
            if suffix == "py":  # the rest differs with the compiler's version
                both = [[line for line in lines if "AddSerializedFile" in line] for lines in both]
            assert both[0] == both[1]


def test_names_and_numbers_are_the_wires() -> None:
    assert SERVICE.full_name == "containerd.services.snapshots.v1.Snapshots"
    assert [method.name for method in SERVICE.methods] == [
        "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup",
    ]  # fmt: skip
    assert [method.name for method in SERVICE.methods if method.server_streaming] == ["List"]
    fields = {
        "PrepareSnapshotRequest": "1 snapshotter, 2 key, 3 parent, 4 labels",
        "PrepareSnapshotResponse": "1 mounts",
        "ViewSnapshotRequest": "1 snapshotter, 2 key, 3 parent, 4 labels",
        "ViewSnapshotResponse": "1 mounts",
        "MountsRequest": "1 snapshotter, 2 key",
        "MountsResponse": "1 mounts",
        "RemoveSnapshotRequest": "1 snapshotter, 2 key",
        "StatSnapshotRequest": "1 snapshotter, 2 key",
        "UsageRequest": "1 snapshotter, 2 key",
        "CommitSnapshotRequest": "1 snapshotter, 2 name, 3 key, 4 labels, 5 parent",
        "Info": "1 name, 2 parent, 3 kind, 4 created_at, 5 updated_at, 6 labels",
        "StatSnapshotResponse": "1 info",
        "UpdateSnapshotResponse": "1 info",
        "UpdateSnapshotRequest": "1 snapshotter, 2 info, 3 update_mask",
        "ListSnapshotsRequest": "1 snapshotter, 2 filters",
        "ListSnapshotsResponse": "1 info",
        "UsageResponse": "1 size, 2 inodes",
        "CleanupRequest": "1 snapshotter",
    }
    described = {
        name: ", ".join(f"{field.number} {field.name}" for field in message.fields)
        for name, message in wire.DESCRIPTOR.message_types_by_name.items()
    }
    assert described == fields
    mount = wire.PrepareSnapshotResponse.DESCRIPTOR.fields_by_name["mounts"].message_type
    assert mount is not None
    assert mount.full_name == "containerd.types.Mount"
    assert [(field.number, field.name) for field in mount.fields] == [(1, "type"), (2, "source"), (3, "target"), (4, "options")]
    assert dict(wire.Kind.items()) == {"UNKNOWN": 0, "VIEW": 1, "ACTIVE": 2, "COMMITTED": 3}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NotFound("x"), grpc.StatusCode.NOT_FOUND, "x: not found"),
        (AlreadyExists("x"), grpc.StatusCode.ALREADY_EXISTS, "x: already exists"),
        (Busy("x"), grpc.StatusCode.FAILED_PRECONDITION, "x: failed precondition"),
        (FailedPrecondition("x"), grpc.StatusCode.FAILED_PRECONDITION, "x: failed precondition"),
        (InvalidArgument("x"), grpc.StatusCode.INVALID_ARGUMENT, "x: invalid argument"),
        (Unavailable("x", errno.ENOSPC), grpc.StatusCode.UNAVAILABLE, "x: unavailable"),
        (Damaged("x"), grpc.StatusCode.INTERNAL, "x: internal"),
    ],
)
def test_every_error_has_a_status(error: SnapshotError, code: grpc.StatusCode, words: str) -> None:
    assert status_of(error) == (code.value[0], words)


def test_a_message_of_list_is_small_enough_for_gos_clients() -> None:
    big = {f"l{number}": "v" * 4000 for number in range(100)}  # as a root may have from before there was a bound
    infos = [Info(name=f"{n}", kind=Kind.ACTIVE, id=1, parent=None, labels=big, created=1, updated=1) for n in range(10)]
    made = list(pages(infos))
    assert [info.name for page in made for info in page.info] == [str(number) for number in range(10)]
    assert all(page.ByteSize() < 4 << 20 for page in made)
    assert list(pages([])) == []


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_what_is_no_message_is_refused_in_words(client: Client, served: Daemon, method: str) -> None:
    """Bytes that mean nothing, a message that is cut off, a string that is not UTF-8; and nothing in the daemon's log."""
    described = SERVICE.methods_by_name[method]
    make = client.channel.unary_stream if described.server_streaming else client.channel.unary_unary
    call: Any = make(f"/{SERVICE.full_name}/{method}")
    for request in (b"\xff" * 20, b"\x0a\x7fsnapfs", b"\x0a\x01\xff"):
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, timeout=SECONDS)) if described.server_streaming else call(request, timeout=SECONDS)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        words = f"the request is no {described.input_type.full_name}: its bytes can't be decoded: invalid argument"
        assert caught.value.details() == words
    assert client.names() == []
    served.stop()
    assert len(served.said) == 1, served.said


# -- a life


def test_a_life_over_the_socket_as_the_tree_shows_it(client: Client, served: Daemon) -> None:
    mnt, root = served.mnt, served.root
    active, committed = mnt / "active", mnt / "committed"
    labels = {"containerd.io/snapshot.ref": "sha256:ab", "containerd.io/snapshot/x": "y", "empty": ""}
    (mount,) = client.call("Prepare", key=EXTRACT, labels=labels).mounts
    assert (mount.type, mount.source, mount.target) == ("bind", f"{root}/snapshots/1/fs", "")
    assert list(mount.options) == ["rw", "rbind"]
    name = EXTRACT.replace("/", "%2F")
    said = json.loads((active / name / "info.json").read_text())
    assert (said["origin"], said["name"]) == ("containerd", EXTRACT)
    assert said["labels"] == {label: value for label, value in labels.items() if value}
    (root / "snapshots/1/fs/file").write_text("x" * 10_000)
    client.call("Commit", key=EXTRACT, name=LAYER, labels={"a": "b"})
    assert not (active / name).exists()
    layer = committed / LAYER.replace("/", "%2F")
    assert json.loads((layer / "info.json").read_text())["labels"] == {"a": "b"}
    usage = client.call("Usage", key=LAYER)
    assert (usage.inodes, usage.size >= 12_288) == (2, True)
    assert json.loads((layer / "usage.json").read_text()) == {"inodes": usage.inodes, "size": usage.size, "shared": 0}

    (mount,) = client.call("View", key="peek", parent=LAYER).mounts
    assert (mount.source, list(mount.options)) == (f"{root}/snapshots/1/fs", ["ro", "rbind"])
    (mount,) = client.call("Prepare", key="web", parent=LAYER).mounts
    assert client.call("Mounts", key="web").mounts == [mount]
    assert mount.type == mount.source == "overlay"
    assert [option.partition("=")[0] for option in mount.options] == ["workdir", "upperdir", "lowerdir", "index"]
    assert [path.name for path in (layer / "active").iterdir()] == ["web"]

    info = client.call("Stat", key="web").info
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("web", LAYER, wire.ACTIVE, {})
    assert info.created_at == info.updated_at
    shown = json.loads((active / "web/info.json").read_text())
    assert rfc3339(info.created_at.ToNanoseconds()) == shown["created"]
    wanted = wire.Info(name="web", labels={"x.y/z": "1", "b": "2"})
    after = client.call("Update", info=wanted, update_mask=FieldMask(paths=["labels.x.y/z"])).info
    assert dict(after.labels) == {"x.y/z": "1"}
    assert os.listdir(active / "web/labels") == ["x.y%2Fz"]
    assert dict(client.call("Update", info=wanted).info.labels) == {"x.y/z": "1", "b": "2"}
    assert client.call("Stat", key="web").info == client.pages("name==web")[0][0]

    assert client.names() == sorted(["web", "peek", LAYER])
    assert client.names("kind==view", 'labels."x.y/z"==1') == ["peek", "web"]
    assert client.names(f'parent=="{LAYER}",kind==active') == ["web"]
    for key in ("web", "peek", LAYER):
        client.call("Remove", key=key)
    assert not (root / "snapshots/1").exists()
    client.call("Cleanup")
    assert (client.names(), client.pages()) == ([], [])
    assert os.listdir(active) == os.listdir(committed) == os.listdir(mnt / "view") == []
    events = [json.loads(line) for line in (mnt / ".snapfs/events").read_text().splitlines()]
    operations = [event["operation"] for event in events]
    assert operations == ["prepare", "commit", "view", "prepare", "update", "update", "remove", "remove", "remove"]


# -- layers that are unpacked at once, each before its parent is there (containerd 2.2 and later, where "rebase" is declared)

LAYERS: list[dict[str, str]] = [
    {"data/gone": "x", "data/old/deep": "hidden", "data/both": "first", "whole/tree/of/files": "x", "kept": "kept"},
    {"data/.wh.gone": "", "data/old/.wh..wh..opq": "", "data/old/new": "new", ".wh.whole": ""},
    {"data/gone": "back", "data/old/.wh.new": "", "data/old/newer": "newer"},
]
LEFT = {"data/gone": "back", "data/both": "first", "data/old/newer": "newer", "kept": "kept"}
PARENT_CHAIN = "containerd.io/snapshot/parent-chain-id"


def applied(mounts: Any, layer: dict[str, str]) -> None:
    """What containerd's applier does: into an overlay's upper directory with overlayfs's whiteouts; elsewhere it deletes."""
    (mount,) = mounts
    options = dict(option.partition("=")[::2] for option in mount.options)
    overlay = mount.type == "overlay"
    top = Path(options["upperdir"] if overlay else mount.source)
    for path, content in layer.items():
        directory, name = (top / path).parent, (top / path).name
        directory.mkdir(parents=True, exist_ok=True)
        if name == ".wh..wh..opq":
            if overlay:
                os.setxattr(directory, "trusted.overlay.opaque", b"y")
        elif name.startswith(".wh."):
            if overlay:
                os.mknod(directory / name[4:], stat.S_IFCHR, 0)
            else:
                shutil.rmtree(directory / name[4:], ignore_errors=True)
        else:
            (directory / name).write_text(content)


def files(mount: Any, target: Path) -> dict[str, str]:
    """All files of what ``mount`` mounts."""
    target.mkdir(exist_ok=True)
    command = ["mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, str(target)]
    subprocess.run(command, check=True)
    try:
        return {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_layers_that_are_unpacked_at_once_keep_their_deletions(client: Client, tmp_path: Path) -> None:
    """Each is prepared without its parent, and committed onto it in turn: the same files as one after the other."""
    for number, layer in enumerate(LAYERS):
        mounts = client.call("Prepare", key=f"extract {number}", parent=f"one {number - 1}" if number else "").mounts
        applied(mounts, layer)
        client.call("Commit", key=f"extract {number}", name=f"one {number}")
    prepared = []
    for number in range(len(LAYERS)):
        labels = {"containerd.io/snapshot.ref": f"{number}", **({PARENT_CHAIN: f"{number - 1}"} if number else {})}
        prepared.append(client.call("Prepare", key=f"extract {number}", labels=labels).mounts)
    for mounts, layer in reversed([*zip(prepared, LAYERS, strict=True)]):
        applied(mounts, layer)
    for number in range(len(LAYERS)):
        parent = f"{number - 1}" if number else ""
        client.call("Commit", key=f"extract {number}", name=f"{number}", parent=parent)
        assert client.call("Stat", key=f"{number}").info.parent == parent
    last = len(LAYERS) - 1
    for method in ("View", "Prepare"):
        found = [client.call(method, key=f"{method} {name}", parent=name).mounts[0] for name in (f"one {last}", f"{last}")]
        assert [files(mount, tmp_path / "target") for mount in found] == [LEFT, LEFT]


def test_a_layer_that_gets_its_parent_later_is_an_overlay_over_the_socket(client: Client, served: Daemon) -> None:
    """And a bind for everybody else, who can mount that."""
    labels = {PARENT_CHAIN: "sha256:ab"}
    client.layer("base")
    (ordinary,) = client.call("Prepare", key="on a parent", parent="base", labels=labels).mounts
    configured = list(ordinary.options)[3:]
    assert ordinary.options[2].startswith("lowerdir=")
    (mount,) = client.call("Prepare", key="web", labels=labels).mounts
    own = f"{served.root}/snapshots/3"
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert list(mount.options) == [f"workdir={own}/work", f"upperdir={own}/fs", *configured]
    assert list(client.call("Mounts", key="web").mounts) == [mount]
    shown = json.loads((served.mnt / "active/web/mounts.json").read_text())
    assert [(mount["type"], mount["source"]) for mount in shown] == [("bind", f"{own}/fs")]
    assert [mount.type for mount in client.call("View", key="peek", labels=labels).mounts] == ["bind"]
    assert [mount.type for mount in client.call("Prepare", key="first", labels={}).mounts] == ["bind"]
    (served.mnt / "active/web").rename(served.mnt / "active/mine")
    assert [mount.type for mount in client.call("Mounts", key="mine").mounts] == ["bind"], "it is the tree's now"


def test_what_is_refused_says_why(client: Client) -> None:
    code = grpc.StatusCode
    client.layer("base")
    client.call("Prepare", key="web", parent="base")
    client.call("View", key="peek", parent="base")
    for name in ("Mounts", "Remove", "Stat", "Usage"):
        assert refused(client, code.NOT_FOUND, name, key="none") == 'snapshot "none" does not exist: not found'
    assert refused(client, code.NOT_FOUND, "Prepare", key="web", parent="none").endswith(": not found")
    assert refused(client, code.ALREADY_EXISTS, "Prepare", key="web").endswith(": already exists")
    assert refused(client, code.INVALID_ARGUMENT, "Prepare", key="k", parent="web").endswith(": invalid argument")
    assert refused(client, code.INVALID_ARGUMENT, "View", key="").endswith(": invalid argument")
    assert refused(client, code.INVALID_ARGUMENT, "Prepare", key="x" * 256).endswith(": invalid argument")
    assert refused(client, code.INVALID_ARGUMENT, "Prepare", key="k", labels={"": "x"}).endswith(": invalid argument")
    many = {f"k{number}": "x" for number in range(257)}
    too_many = "would have 257 labels; at most 256 fit: invalid argument"  # as containerd refuses a label that is too big
    assert refused(client, code.INVALID_ARGUMENT, "Prepare", key="k", labels=many) == f'snapshot "k" {too_many}'
    assert refused(client, code.INVALID_ARGUMENT, "View", key="k", labels=many) == f'snapshot "k" {too_many}'
    assert refused(client, code.INVALID_ARGUMENT, "Commit", key="web", name="n", labels=many) == f'snapshot "n" {too_many}'
    info = wire.Info(name="web", labels=many)
    assert refused(client, code.INVALID_ARGUMENT, "Update", info=info) == f'snapshot "web" {too_many}'
    assert refused(client, code.NOT_FOUND, "Commit", key="none", name="base").endswith(": not found")
    assert refused(client, code.ALREADY_EXISTS, "Commit", key="web", name="base").endswith(": already exists")
    assert refused(client, code.FAILED_PRECONDITION, "Commit", key="peek", name="n").endswith(": failed precondition")
    assert refused(client, code.FAILED_PRECONDITION, "Mounts", key="base").endswith(": failed precondition")
    assert "remove" in refused(client, code.FAILED_PRECONDITION, "Remove", key="base")
    assert refused(client, code.INVALID_ARGUMENT, "Update").endswith(": invalid argument")
    mask = FieldMask(paths=["kind"])
    assert refused(client, code.INVALID_ARGUMENT, "Update", info=wire.Info(name="web"), update_mask=mask)
    with pytest.raises(grpc.RpcError) as caught:
        client.pages("name >|=|< la")
    assert caught.value.code() is code.INVALID_ARGUMENT
    where = "[name  >|>|< |=|< la]"
    assert caught.value.details() == f'parse error: {where}: expected an operator ("=="|"!="|"~="): invalid argument'
    unknown: Any = client.channel.unary_unary(f"/{SERVICE.full_name}/Nothing")
    with pytest.raises(grpc.RpcError) as caught:
        unknown(b"", timeout=5)
    assert caught.value.code() is code.UNIMPLEMENTED
    assert client.names() == ["base", "peek", "web"], "nothing has changed"


def test_what_the_tree_made_is_its_own(client: Client, mnt: Path, served: Daemon) -> None:
    client.layer("base")
    (mnt / "active/mine").mkdir()
    (mnt / "committed/base/active/web").mkdir()
    assert client.names() == ["base"]
    said = refused(client, grpc.StatusCode.FAILED_PRECONDITION, "Remove", key="mine")
    assert said == 'snapshot "mine" was not made by containerd: remove it in the tree: failed precondition'
    assert "remove its child" in refused(client, grpc.StatusCode.FAILED_PRECONDITION, "Remove", key="base")
    assert refused(client, grpc.StatusCode.ALREADY_EXISTS, "Prepare", key="mine")
    assert json.loads((mnt / "active/mine/info.json").read_text())["origin"] == ""
    (mnt / "active/web").rmdir()
    client.call("Remove", key="base")
    assert (os.listdir(mnt / "active"), os.listdir(mnt / "committed")) == (["mine"], [])


@pytest.fixture
def mnt(served: Daemon) -> Path:
    return served.mnt


def test_the_tree_forgets_what_went_over_the_socket(client: Client, mnt: Path) -> None:
    """Whatever the kernel remembers: it is told before the call returns."""
    for number in range(100):
        key, name = f"k{number}", f"n{number}"
        client.call("Prepare", key=key)
        os.stat(mnt / "active" / key)
        client.call("Commit", key=key, name=name)
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / "active" / key)
        os.stat(mnt / "committed" / name)
        client.call("Update", info=wire.Info(name=name, labels={"a": str(number)}))
        assert (mnt / "committed" / name / "labels/a").read_text() == f"{number}\n"
        client.call("Remove", key=name)
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / "committed" / name)


def test_what_containerd_is_about_to_mount_is_not_mounted_twice(client: Client, mnt: Path) -> None:
    client.layer("base")
    client.call("Prepare", key="web", parent="base")
    rootfs = mnt / "active/web/rootfs"
    with (rootfs / "file").open("w"):
        said = refused(client, grpc.StatusCode.FAILED_PRECONDITION, "Mounts", key="web")
        assert f"its file system {os.readlink(rootfs)} is in use by process {os.getpid()}" in said
    (mount,) = client.call("Mounts", key="web").mounts
    upper = next(option.partition("=")[2] for option in mount.options if option.startswith("upperdir="))
    assert os.listdir(upper) == ["file"]
    assert json.loads((mnt / "active/web/info.json").read_text())["mounted"] == []


def test_pages_of_a_hundred(client: Client) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: client.call("Prepare", key=f"{number:03}"), range(2 * PAGE + 50)))
    found = client.pages()
    assert [len(page) for page in found] == [PAGE, PAGE, 50]
    assert [info.name for page in found for info in page] == [f"{number:03}" for number in range(250)]


def test_128_layers(client: Client, mnt: Path) -> None:
    parent = ""
    for number in range(128):
        name = f"default/{number}/sha256:{number:064x}"
        client.layer(name, parent)
        parent = name
    (mount,) = client.call("Prepare", key="web", parent=parent).mounts
    (lower,) = (option for option in mount.options if option.startswith("lowerdir="))
    assert lower.count("/fs") == 128
    assert json.loads((mnt / "active/web/mounts.json").read_text())[0]["options"] == list(mount.options)


def test_many_clients_at_once(client: Client, served: Daemon, tmp_path: Path) -> None:
    client.layer("base")

    def life(number: int) -> None:
        with connected(tmp_path / "run/snapfs.sock") as own:
            for turn in range(5):
                key = f"{number}-{turn}"
                own.call("Prepare", key=key, parent="base")
                assert own.call("Mounts", key=key).mounts
                own.call("Commit", key=key, name=f"n{key}")
                own.call("Remove", key=f"n{key}")

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(life, range(20)))
    assert client.names() == ["base"]


def test_a_deadline_or_a_cancelled_call_leaves_all_or_nothing(client: Client, mnt: Path, served: Daemon) -> None:
    started = []
    for number in range(60):
        call = client.start("Prepare", key=f"k{number}", timeout=0.0005 * (number % 6) + 0.0001)
        started.append(call)
        if number % 2:
            call.cancel()
    for call in started:
        try:
            call.result()
        except grpc.FutureCancelledError:
            pass
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    client.call("Cleanup")
    names = client.names()
    assert sorted(os.listdir(mnt / "active")) == sorted(names)
    for name in names:
        assert client.call("Mounts", key=name).mounts
    assert len(os.listdir(served.root / "snapshots")) == len(names)
    for call in started:
        if not call.cancelled() and call.code() is grpc.StatusCode.OK:
            assert len(call.result().mounts) == 1


ENDLESS = """
from snapfs.services import counting
from snapfs.cli import main

def disk_usage(directory, checkpoint):
    while os.path.exists(f"{directory}/endless"):
        open(f"{directory}/begun", "w").close()
        checkpoint()
        time.sleep(0.001)
    return counted(directory, checkpoint)

import os, sys, time
counted, counting.disk_usage = counting.disk_usage, disk_usage
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["deadline", "cancel", "disconnect"])
def test_a_scan_ends_with_the_call_that_wants_it(make_daemon: Callable[..., Daemon], tmp_path: Path, how: str) -> None:
    """Of a layer without an end, more than there are threads for scans: those who ask for others get one."""
    daemon = make_daemon("--containerd", str(tmp_path / "s"))
    daemon.program = ("-c", ENDLESS)
    daemon.start()
    with connected(tmp_path / "s") as client, connected(tmp_path / "s") as other:
        for number in range(10):
            client.call("Prepare", key=f"k{number}")
            (daemon.root / f"snapshots/{number + 1}/fs/endless").touch()
        client.call("Prepare", key="small")
        scans = [client.start("Usage", key=f"k{number}", timeout=3 if how == "deadline" else 60) for number in range(10)]
        deadline = time.monotonic() + SECONDS
        while len(list(daemon.root.glob("snapshots/*/fs/begun"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if how == "disconnect":
            client.close()
        for scan in scans:
            if how == "deadline":
                assert scan.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                scan.cancel()
        assert other.call("Usage", key="small").inodes == 1
        for number in range(10):
            other.call("Remove", key=f"k{number}")
        assert other.names() == ["small"]
    assert daemon.stop() == 0
    assert len(daemon.said) == 1, daemon.said


def test_slow_calls_keep_nobody_waiting(client: Client, served: Daemon) -> None:
    """More scans than any pool has threads: they queue, the others go on, and a deadline ends them."""
    for number in range(100):
        client.call("Prepare", key=f"k{number}")
    fs = served.root / "snapshots/1/fs"
    for directory in range(30):
        (fs / f"{directory}").mkdir()
        for file in range(300):
            (fs / f"{directory}/{file}").touch()
    scans = [client.start("Usage", key=f"k{number % 100}") for number in range(400)]
    client.call("Prepare", key="quick", timeout=5)
    assert client.call("Stat", key="quick", timeout=5).info.name == "quick"
    assert scans[0].result().inodes == 30 * 301 + 1
    assert all(scan.result().inodes for scan in scans)


def test_requests_of_megabytes_keep_nobody_waiting(client: Client) -> None:
    """They are refused unread."""
    most = client.call("Prepare", key="k" * 255, labels={f"{number}": "v" * 200 for number in range(256)})
    assert len(most.mounts) == 1
    large = 1 << 20
    for method, fields in (
        ("Prepare", {"key": "\x01" * large}),
        ("Prepare", {"key": "k", "parent": "p" * large}),
        ("Prepare", {"key": "k", "labels": {f"{number}": "v" for number in range(large // 8)}}),
        ("Update", {"update_mask": {"paths": ["labels"] * (large // 8)}}),
        ("List", {"filters": ["name==a"] * (large // 8)}),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            list(client.call(method, **fields))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# -- the socket


def test_the_socket(served: Daemon, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run/snapfs.sock"
    found = path.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(path.parent) == ["snapfs.sock"]
    assert json.loads((served.mnt / ".snapfs/options.json").read_text())["containerd"] == str(path)
    client.call("Prepare", key="k")
    assert served.stop() == 0
    assert os.listdir(path.parent) == []
    assert len(served.said) == 1, served.said


def test_a_daemon_that_comes_back(served: Daemon, client: Client, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Killed, so that a stale socket is left; the same channel goes on."""
    path = tmp_path / "run/snapfs.sock"
    client.layer("base")
    assert served.process is not None
    served.process.kill()
    served.ended()
    assert path.is_socket()
    make_daemon("--containerd", str(path), mnt=tmp_path / "again").start()
    with connected(path) as again:
        assert again.names() == ["base"]
    call, request = client.method("Stat")
    assert call(request(key="base"), timeout=20, wait_for_ready=True).info.kind == wire.COMMITTED


def test_a_socket_that_is_in_use_is_refused(served: Daemon, make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    path = tmp_path / "run/snapfs.sock"
    other = make_daemon("--containerd", str(path), root=tmp_path / "other", mnt=tmp_path / "elsewhere")
    with pytest.raises(AssertionError, match=f"ended with 1.*another server listens on {path}: stop that one"):
        other.start()
    assert path.is_socket()
    assert not os.path.ismount(tmp_path / "elsewhere")
    with connected(path) as client:
        assert client.names() == []


def test_thousands_of_calls_at_once(client: Client) -> None:
    """None that may be under way at once is ended as cancelled, which its caller never wanted."""
    calls = [client.start("Prepare", key=f"k{number}") for number in range(3000)]
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}


@pytest.mark.parametrize("what", ["file", "long", "directory"])
def test_a_path_that_can_be_no_socket(make_daemon: Callable[..., Daemon], tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("precious")
    path = {"file": tmp_path / "file", "long": tmp_path / ("x" * 120), "directory": tmp_path / "file/s"}[what]
    with pytest.raises(AssertionError, match=r"ended with 1: .*(is in the way|at most 107 bytes|cannot make the socket)"):
        make_daemon("--containerd", str(path)).start()
    assert (tmp_path / "file").read_text() == "precious"
    assert not os.path.ismount(tmp_path / "mnt")


def test_stopped_while_calls_are_under_way(served: Daemon, client: Client, tmp_path: Path) -> None:
    client.layer("base")
    calls = [client.start("Prepare", key=f"k{number}", parent="base") for number in range(200)]
    assert served.stop() == 0
    done = {call.code() for call in calls if not call.exception()}
    assert done <= {grpc.StatusCode.OK}
    assert {call.code() for call in calls} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert len(served.said) == 1, served.said


def test_without_its_packages_a_sentence_says_what_to_install(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    (tmp_path / "hpack.py").write_text("raise ImportError('No module named hpack')")
    daemon = make_daemon("--containerd", str(tmp_path / "s"))
    daemon.prefix = ("env", f"PYTHONPATH={tmp_path}")
    with pytest.raises(AssertionError, match=r"ended with 1: .*install it: pip install 'snapfs\[containerd\]'"):
        daemon.start()


def test_two_daemons_want_one_stale_socket(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    both = [make_daemon("-o", f"containerd={path}", root=tmp_path / f"r{n}", mnt=tmp_path / f"m{n}") for n in range(2)]
    failed: list[AssertionError] = []
    tried = threading.Barrier(3)
    asked = threading.Event()

    def start(daemon: Daemon) -> None:
        try:
            daemon.start()
        except AssertionError as error:
            failed.append(error)
        tried.wait(20)  # a daemon dies with the thread that started it
        asked.wait(20)

    threads = [threading.Thread(target=start, args=(daemon,)) for daemon in both]
    for thread in threads:
        thread.start()
    try:
        tried.wait(20)
        assert len(failed) == 1
        with connected(path) as client:
            assert client.names() == []
    finally:
        asked.set()
        for thread in threads:
            thread.join()
