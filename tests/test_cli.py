"""The command over a mounted tree: each verb, as a shell runs it, and what stands in its way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from snapfs import Options, names, open_snapshotter
from snapfs.cli import VERBS, grammar, main, mount, prune, rm, verb, workspace
from snapfs.cli.listing import Row, children_first
from snapfs.cli.place import MountedTree
from snapfs.cli.prune import seconds
from snapfs.cli.refusal import Refusal
from snapfs.cli.within import Within
from snapfs.options import Sync
from tests.command import SNAPFS, Command, OnATerminal, run
from tests.daemon import Daemon
from tests.mounts import is_mounted
from tests.processes import die_with_parent, until
from tests.tree import committed

Make = Callable[..., Daemon]


def active(snapfs: Command, key: str) -> Path:
    return snapfs.mnt / "active" / key


# -- making, committing, removing


def test_a_whole_life(snapfs: Command) -> None:
    directory = snapfs("prepare", "b").strip()
    assert directory == str(snapfs.mnt / "active/b")
    (Path(directory) / "rootfs/file").write_text("hello")
    assert snapfs("commit", "b", "base").strip() == str(snapfs.mnt / "committed/base")
    snapfs("prepare", "web", "--parent", "base", "-l", "team=blue", "--label=note=a=b, c")
    snapfs("view", "peek", "-p", "base")
    assert snapfs("tree").splitlines()[1].startswith("├── peek  view")
    assert snapfs("tree").splitlines()[2].startswith("└── web  active")
    assert json.loads(snapfs("label", "--json", "web")) == {"team": "blue", "note": "a=b, c"}
    (active(snapfs, "web") / "rootfs/file").unlink()
    assert snapfs("diff", "web") == "D /file\n"
    assert json.loads(snapfs("diff", "--json", "web")) == [{"change": "D", "path": "/file"}]
    (drawn,) = json.loads(snapfs("tree", "--json", "base"))
    assert [child["name"] for child in drawn["children"]] == ["peek", "web"]
    shown = json.loads(snapfs("show", "--json", "base", "web"))
    assert [each["children"] for each in shown if each["kind"] == "committed"] == [["peek", "web"]]
    assert "has children" not in snapfs("show", "base")
    assert 'its child "' in snapfs("rm", "base", status=5)
    assert sorted(snapfs("rm", "-rn", "base").split()) == ["base", "peek", "web"]
    assert snapfs.names() == ["base", "peek", "web"]
    assert snapfs("rm", "-r", "base").splitlines()[-1] == "removed base"
    assert snapfs.names() == []


@pytest.mark.parametrize("key", ["default/12/sha256:ab", "-x", "a\nb", "with space", ".", "%", "é", "100%/"])
def test_any_key(snapfs: Command, key: str) -> None:
    snapfs("prepare", "--label", "k/1,=v,%\n=", "--", key)
    assert snapfs.names() == [key]
    (row,) = json.loads(snapfs("ls", "--json"))
    assert (row["name"], row["labels"]) == (key, {"k/1,": "v,%\n="})
    assert snapfs("ls").count("\n") == 2, "nothing breaks a line, nor obeys a terminal"
    snapfs("commit", "--", key, "c" + key)
    snapfs("rm", "--", "c" + key)


def test_a_label_that_is_refused_leaves_nothing(snapfs: Command) -> None:
    assert "at most 4096" in snapfs("prepare", "web", "-l", "a=1", "-l", f"big={'x' * 5000}", status=1)
    assert snapfs.names() == []


def test_a_label_that_somebody_else_makes_meanwhile(snapfs: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    snapfs("prepare", "web")
    create = Within.create

    def late(within: Within, path: str) -> int:
        Path(path).write_text("a longer one\n")
        return create(within, path)

    monkeypatch.setattr(Within, "create", late)
    assert main(["label", "--at", str(snapfs.mnt), "web", "team=blue"]) == 0
    assert snapfs("label", "web") == "team=blue\n"


def test_refusals(snapfs: Command) -> None:
    snapfs("prepare", "web")
    assert 'snapshot "web" already exists (active)' in snapfs("prepare", "web", status=4)
    assert 'snapshot "web" already exists (active)' in snapfs("view", "web", status=4)
    assert 'parent snapshot "no" does not exist' in snapfs("prepare", "x", "-p", "no", status=3)
    assert "only a committed snapshot can be a parent" in snapfs("prepare", "x", "-p", "web", status=3)
    for words in (("show", "no"), ("rm", "no"), ("commit", "no", "n"), ("diff", "no"), ("label", "no"), ("usage", "no")):
        assert 'snapshot "no" does not exist' in snapfs(*words, status=3)
    snapfs("view", "peek")
    assert "is view: only active" in snapfs("commit", "peek", "n", status=3)
    assert "is a view" in snapfs("diff", "peek", status=1)
    assert "write KEY=VALUE" in snapfs("label", "web", "x", status=2)
    assert 'has no label "x"' in snapfs("label", "web", "--delete", "x", status=3)
    assert 'parent snapshot "no" does not exist' in snapfs("commit", "web", "n", "-p", "no", status=3)
    assert "only a committed snapshot can be a parent" in snapfs("commit", "web", "n", "-p", "peek", status=3)
    for word in ("ls", "prune"):
        assert '"nope" is no kind of snapshot' in snapfs(word, "--kind", "nope", status=2)
    assert "KEY is missing" in snapfs("prepare", status=2)
    assert "no option --nope" in snapfs("ls", "--nope", status=2)
    assert "too much" in snapfs("ls", "x", status=2)
    snapfs("rm", "-f", "no")
    holder = subprocess.Popen(["sleep", "60"], cwd=active(snapfs, "web") / "rootfs", preexec_fn=die_with_parent)
    with holder:
        for words in (("rm", "web"), ("commit", "web", "v1"), ("checkpoint", "web"), ("rollback", "web")):
            assert f"in use by process {holder.pid} (sleep)" in snapfs(*words, status=5)
        assert snapfs.names() == ["peek", "web"]
        assert snapfs("label", "web") == "", "a checkpoint that is refused leaves no labels"
        holder.kill()


def test_removing_many(snapfs: Command) -> None:
    parent: tuple[str, ...] = ()
    for n in range(5):
        snapfs("prepare", "x", *parent)
        snapfs("commit", "--no-sync", "x", f"layer{n}")
        parent = ("-p", f"layer{n}")
    assert snapfs("rm", "-rn", "layer1").split() == ["layer4", "layer3", "layer2", "layer1"]
    snapfs("rm", "layer2", "layer4", "layer3")
    assert snapfs.names() == ["layer0", "layer1"]


def test_children_first_whatever_the_order() -> None:
    rows = [
        Row("\t".join([name, "committed", parent, "1", "0", "0", "0.0", "0.0", ".", "."]))
        for name, parent in [("c", "b"), ("a", "."), ("b", "a"), ("d", "elsewhere")]
    ]
    order = [row.name for row in children_first(rows)]
    assert order.index("c") < order.index("b") < order.index("a")
    assert set(order) == {"a", "b", "c", "d"}


def test_the_reason_is_that_of_the_own_call(snapfs: Command) -> None:
    """Another client is refused all the time, with the same errno: its words are not taken for the own ones."""
    for key in ("evil", "mine"):
        snapfs("prepare", key, "-l", "pin=yes")
    stop = threading.Event()

    def be_refused() -> None:
        while not stop.is_set():
            with contextlib.suppress(PermissionError):
                os.rmdir(active(snapfs, "evil"))

    thread = threading.Thread(target=be_refused)
    thread.start()
    try:
        said = {snapfs("rm", "mine", status=6) for _ in range(20)}
    finally:
        stop.set()
        thread.join()
        for key in ("evil", "mine"):
            snapfs("label", key, "pin=")
    assert len(said) == 1
    assert 'snapshot "mine" has the label pin' in said.pop()


def test_the_reason_is_that_of_the_own_operation(
    snapfs: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another client does something else at the same path, which is refused with the same errno a moment later."""
    path = active(snapfs, "web")
    path.mkdir()
    (path / "labels/pin").write_text("yes")
    rmdir = Within.rmdir

    def late(within: Within, which: str) -> None:
        try:
            rmdir(within, which)
        finally:
            with pytest.raises(PermissionError):
                path.chmod(0o700)

    monkeypatch.setattr(Within, "rmdir", late)
    monkeypatch.setenv("SNAPFS", str(snapfs.mnt))
    assert main(["rm", "web"]) == 6
    (path / "labels/pin").unlink()
    assert 'snapshot "web" has the label pin' in capsys.readouterr().err


def test_no_name_is_taken_for_a_reason(snapfs: Command) -> None:
    """Nor is what follows in it: the first ``: `` in a line of error_log ends the path."""
    snapfs("prepare", "mine", "-l", "pin=yes")
    forged = "mine: the records are damaged; run as root: sh ("
    os.mkdir(active(snapfs, "mine").parent / forged)
    stop = threading.Event()

    def be_refused() -> None:
        while not stop.is_set():
            with contextlib.suppress(PermissionError):
                os.mkdir(active(snapfs, forged) / "x")

    thread = threading.Thread(target=be_refused)
    thread.start()
    try:
        said = {snapfs("rm", "mine", status=6) for _ in range(20)}
    finally:
        stop.set()
        thread.join()
        snapfs("label", "mine", "pin=")
        snapfs("rm", forged)
        snapfs("rm", "mine")
    assert not any("damaged" in each for each in said)
    assert any('snapshot "mine" has the label pin' in each for each in said)  # unless others push it out of what is looked at


# -- another has the name by then


def replaced(snapfs: Command, path: str, content: str = "") -> None:
    """Somebody else renames the snapshot at ``path``, which is called x from then on, and makes another there."""
    kind, name = path.split("/")
    os.rename(snapfs.mnt / path, snapfs.mnt / kind / "x")
    if kind == "committed":
        committed(snapfs.mnt, name)
    else:
        os.mkdir(snapfs.mnt / path)
        (snapfs.mnt / path / "rootfs/new").write_text(content)


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("active/web", ("prune", "--expired"), 3),
        ("active/web", ("rm", "-r", "web"), 3),
        ("active/web", ("rm", "web", "other"), 3),
        ("committed/web@1", ("prune", "--keep-last", "1"), 0),
        ("committed/web@2", ("prune", "--keep-last", "1"), 0),
        ("active/web", ("rollback", "--keep", "web"), 0),
    ],
)
def test_another_gets_the_name_of_what_was_listed(
    snapfs: Command, monkeypatch: pytest.MonkeyPatch, path: str, words: tuple[str, ...], status: int
) -> None:
    """It stays, whatever was to become of the other."""
    for key in ("web", "other"):
        os.mkdir(active(snapfs, key))
    (active(snapfs, "web") / "labels/ttl").write_text("0")
    if path.startswith("committed"):  # the first two go, of which the last that stays takes over what the second has
        for _ in range(3):
            (active(snapfs, "web") / "checkpoint").write_text("\n")
    done: list[str] = []
    call = {"prune": "remove", "rm": "remove", "rollback": "_kept"}[words[0]]
    module = {"prune": prune, "rm": rm, "rollback": workspace}[words[0]]
    call = "_do" if "--keep-last" in words else call

    def late(*arguments: Any) -> Any:
        kept = original(*arguments) if module is workspace else None
        replaced(snapfs, path)
        done.append(path)
        return kept if module is workspace else original(*arguments)

    original = getattr(module, call)
    monkeypatch.setattr(module, call, late)
    monkeypatch.setenv("SNAPFS", str(snapfs.mnt))
    assert main(list(words)) == status
    assert done == [path]
    assert {path.split("/")[1], "x"} <= set(snapfs.names())
    if path.startswith("active"):
        assert os.listdir(snapfs.mnt / path / "rootfs/") == ["new"]


def test_another_gets_the_name_of_what_was_made(snapfs: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label is refused, and what was made goes again; but not another that has its name by then."""

    def late(*arguments: object) -> None:
        replaced(snapfs, "active/web")
        raise Refusal("no")

    monkeypatch.setattr(MountedTree, "write_label", late)
    monkeypatch.setenv("SNAPFS", str(snapfs.mnt))
    assert main(["prepare", "web", "-l", "a=1"]) == 1
    assert snapfs.names() == ["web"]
    assert os.listdir(snapfs.mnt / "active/web/rootfs/") == ["new"]


# -- workspaces


def test_checkpoints(snapfs: Command) -> None:
    snapfs("prepare", "web", "-l", "team=blue")
    file = active(snapfs, "web") / "rootfs/file"
    for n in (1, 2):
        file.write_text(str(n))
        assert snapfs("checkpoint", "web", "-m", f"message {n}") == f"web@{n}\n"
    file.write_text("3")
    listed = json.loads(snapfs("checkpoint", "--list", "--json", "web"))
    assert [(each["checkpoint"], each["labels"]["snapfs.message"]) for each in listed] == [(1, "message 1"), (2, "message 2")]
    assert "message 2" in snapfs("checkpoint", "--list", "web")
    snapfs("rollback", "web")
    assert file.read_text() == "2"
    snapfs("rollback", "web", "1")
    assert file.read_text() == "1"
    assert json.loads(snapfs("label", "--json", "web")) == {"team": "blue"}
    file.write_text("4")
    assert snapfs("rollback", "--keep", "web", "2").startswith("kept as web@3\n")
    assert file.read_text() == "2"
    snapfs("rollback", "web", "3")
    assert file.read_text() == "4"
    snapfs("rollback", "web", "0")
    assert not file.exists()
    assert "no checkpoint 9" in snapfs("rollback", "web", "9", status=3)
    assert "snapfs checkpoint --list web" in snapfs("rollback", "web", "9", status=3)
    for line in ("checkpoint no", "checkpoint --list no", "rollback no", "fork no x", "tree no"):
        assert 'snapshot "no" does not exist' in snapfs(*line.split(), status=3)


def test_nothing_is_kept_before_a_rollback_that_is_refused(snapfs: Command) -> None:
    """What the workspace stands on, also behind a squash, is no reason for that."""
    os.mkdir(active(snapfs, "b"))
    os.rename(active(snapfs, "b"), snapfs.mnt / "committed/base")
    snapfs("prepare", "web", "--parent", "base")
    snapfs("checkpoint", "web")
    snapfs("view", "seen", "--parent", "base")
    snapfs("prepare", "other")
    snapfs("checkpoint", "other")
    before = snapfs.names()
    for to in ("9", "seen", "other@1", "committed/other@1", "nobody", "web"):
        assert '"web" has no checkpoint ' in snapfs("rollback", "--keep", "web", to, status=3)
    snapfs("label", "web", "pin=yes")
    for to in ("9", "base", "0"):
        assert "has the label pin" in snapfs("rollback", "--keep", "web", to, status=6)
    snapfs("label", "web", "--delete", "pin")
    assert snapfs.names() == before
    for nth, to in enumerate(("base", "0", "web@1", "committed/web@1", "1"), 2):
        snapfs("rollback", "web", "web@1")
        assert snapfs("rollback", "--keep", "web", to).startswith(f"kept as web@{nth}\n")
    snapfs("squash", "web@1", "flat")
    snapfs("prepare", "third", "--parent", "flat")
    assert snapfs("rollback", "--keep", "third", "base") == "kept as third@1\nthird is as base\n"


def test_an_odd_key_in_what_is_advised(snapfs: Command) -> None:
    """What can't be shown is named by a path that can, which the command takes."""
    key = "a b\n%"
    number = json.loads((Path(snapfs("prepare", key).strip()) / "info.json").read_text())["id"]
    with subprocess.Popen(["sleep", "60"], cwd=f"{active(snapfs, 'a b%0A%25')}/rootfs") as process:
        for words, way in ((("checkpoint",), "checkpoint --copy"), (("rollback",), "rollback --kill")):
            assert snapfs(*words, key, status=5).endswith(f"snapfs {way} by-id/{number}\n")
        assert snapfs("checkpoint", "--copy", f"by-id/{number}") == f"{key}@1\n"
        process.kill()
    assert snapfs("rollback", key, "9", status=3).endswith(f"snapfs checkpoint --list by-id/{number}\n")
    assert snapfs("checkpoint", "--list", f"by-id/{number}")
    snapfs("label", key, "pin=1")
    assert f"(snapfs label --delete pin by-id/{number})" in snapfs("rollback", key, status=6)
    snapfs("label", "--delete", "pin", f"by-id/{number}")


def test_a_key_that_leaves_no_room_for_a_number(snapfs: Command) -> None:
    key = "k" * 253
    snapfs("prepare", key)
    for _ in range(9):
        snapfs("checkpoint", key)
    for words in (("checkpoint",), ("checkpoint", "--copy")):
        assert "rename the workspace to one of 252 bytes at most" in snapfs(*words, key, status=1)
    os.rename(active(snapfs, key), active(snapfs, "k"))
    assert snapfs("checkpoint", "k") == "k@1\n"


def test_fork(snapfs: Command) -> None:
    snapfs("prepare", "web")
    (active(snapfs, "web") / "rootfs/file").write_text("both")
    assert snapfs("fork", "web", "other").strip() == str(active(snapfs, "other"))
    (active(snapfs, "other") / "rootfs/file").write_text("other")
    assert (active(snapfs, "web") / "rootfs/file").read_text() == "both"
    assert 'snapshot "other" already exists' in snapfs("fork", "web", "other", status=4)
    snapfs("fork", "web@1", "third")
    assert (active(snapfs, "third") / "rootfs/file").read_text() == "both"
    assert len(snapfs.names("--kind", "committed")) == 1


# -- pruning


def test_prune(snapfs: Command) -> None:
    for name, *labels in (
        ("old", "ttl=0s"),
        ("new", "ttl=1d"),
        ("pinned", "ttl=0s", "pin=yes"),
        ("bad", "ttl=soon"),
        ("ci", "job=7"),
    ):
        snapfs("prepare", "x", *(word for label in labels for word in ("-l", label)))
        snapfs("commit", "--no-sync", "x", name)
    snapfs("prepare", "scratch", "-l", "ttl=0s", "-p", "ci")
    assert "say what to prune" in snapfs("prune", status=2)
    assert "is no age" in snapfs("prune", "--older-than", "x", status=2)
    before = snapfs.names()
    said = snapfs("prune", "--expired", "--dry-run")
    assert "would remove old" in said
    assert "kept pinned: it is pinned" in said
    assert "kept bad: its ttl" in said
    assert snapfs.names() == before
    snapfs("prune", "--expired", "--kind", "committed")
    assert snapfs.names() == ["bad", "ci", "new", "pinned", "scratch"]
    assert 'kept ci: "scratch" stands on it' in snapfs("prune", "--label", "job=7")
    assert snapfs.names("--kind", "committed") == ["bad", "ci", "new", "pinned"]
    pruned = json.loads(snapfs("prune", "--label", "job", "--dry-run", "--json"))
    assert (pruned["removed"], pruned["kept"]) == ([], [{"name": "ci", "why": '"scratch" stands on it'}])
    snapfs("prune", "--expired")
    snapfs("prune", "--label", "job")
    assert snapfs.names() == ["bad", "new", "pinned"]
    assert snapfs("prune", "--older-than", "1h", "--kind", "committed").endswith("removed 0, 0B\n")
    snapfs("label", "pinned", "--delete", "pin")


def test_ages() -> None:
    assert [seconds(text) for text in ("90", "30m", "2h", "1.5d", "1w", "soon", "")] == [
        90,
        1800,
        7200,
        129600,
        604800,
        None,
        None,
    ]


# -- mounting, usage, events


async def test_mounting_400_layers(make_daemon: Make, root: Path, tmp_path: Path) -> None:
    async with open_snapshotter(root, Options(sync=Sync.NONE)) as snapshotter:
        for n in range(400):
            await snapshotter.prepare("x", f"l{n - 1}" if n else "")
            Path(snapshotter.layers.fs(n + 1), f"file{n}").touch()
            await snapshotter.commit(f"l{n}", "x", wait=False)
        await snapshotter.prepare("web", "l399")
        await snapshotter.view("peek", "l399")
    snapfs = Command(make_daemon("-o", "sync=none").start().mnt)
    (target := tmp_path / "t").mkdir()
    for key in ("web", "peek"):
        snapfs("mount", key, str(target))
        assert {each.name for each in target.iterdir()} == {f"file{n}" for n in range(400)}
        snapfs("umount", key)
        assert os.listdir(target) == []


@pytest.mark.parametrize("key", ["web", "a b", "-r", "it's", "ctr/1/web", "so\u00adft", "line\nbreak"])
@pytest.mark.parametrize("named", [True, False], ids=["--at", "$SNAPFS"])
def test_how_to_unmount_a_workspace_works_when_it_is_typed(
    daemon: Daemon, make_daemon: Callable[..., Daemon], tmp_path: Path, key: str, named: bool
) -> None:
    """For a key that a shell would take for something else, and where there are several trees."""
    make_daemon(root=tmp_path / "root2", mnt=tmp_path / "mnt2").start()
    at, tree = (["--at", str(daemon.mnt)], {}) if named else ([], {"SNAPFS": str(daemon.mnt)})
    (target := tmp_path / "t t").mkdir()
    assert run("mount", *at, "--", key, str(target), **tree).returncode == 3
    (daemon.mnt / "active" / names.encode(key)).mkdir()
    assert run("mount", *at, "--", key, str(target), **tree).returncode == 0
    done = run("rollback", *at, "--", key, **tree)
    assert done.returncode == 5
    typed = re.search(r"is mounted on .*/t t: unmount it first \(snapfs (.*)\)\n", done.stderr)
    assert typed, done.stderr
    environment = {key: value for key, value in os.environ.items() if key != "SNAPFS"} | tree
    subprocess.run(["sh", "-ec", f"{shlex.join(SNAPFS)} {typed[1]}"], env=environment, timeout=60, check=True)
    assert not target.is_mount()
    assert run("rollback", *at, "--", key, **tree).returncode == 0


def test_how_to_unmount_what_only_the_daemon_sees(daemon: Daemon, tmp_path: Path) -> None:
    (daemon.mnt / "active/web").mkdir()
    (target := tmp_path / "t t").mkdir()
    words = shlex.join([*SNAPFS, "rollback", "--at", str(daemon.mnt), "web"])
    elsewhere = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"echo; read _; {words} 2>&1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    with elsewhere:
        assert elsewhere.stdout is not None
        assert elsewhere.stdout.readline() == "\n"
        assert run("mount", "--at", str(daemon.mnt), "web", str(target)).returncode == 0
        said, _ = elsewhere.communicate("\n", timeout=60)
    there, _, typed = said.rstrip("\n").partition(": nsenter ")
    assert there.endswith(f"t t: unmount it there, in the mount namespace of the daemon, pid {daemon.pid}")
    subprocess.run(["sh", "-ec", f"nsenter {typed}"], timeout=60, check=True)
    assert not target.is_mount()


def test_mount_and_umount(snapfs: Command, tmp_path: Path) -> None:
    for n, parent in enumerate(((), ("-p", "l0"), ("-p", "l1"))):
        snapfs("prepare", "x", *parent)
        (active(snapfs, "x") / f"rootfs/{n}").write_text("")
        snapfs("commit", "--no-sync", "x", f"l{n}")
    (tmp_path / "t").mkdir()
    snapfs("prepare", "web", "-p", "l2")
    snapfs("view", "peek", "-p", "l2")
    for key, writable in (("web", True), ("peek", False)):
        snapfs("mount", key, str(tmp_path / "t"))
        assert sorted(os.listdir(tmp_path / "t")) == ["0", "1", "2"]
        assert os.access(tmp_path / "t", os.W_OK) is writable
        if key == "web":
            assert "is mounted on" in snapfs("rollback", "web", status=5)
        snapfs("umount", key)
        assert os.listdir(tmp_path / "t") == []
        assert "is not mounted" in snapfs("umount", key, status=1)
    snapfs("mount", "web", str(tmp_path / "t"))
    holder = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "t", preexec_fn=die_with_parent)
    with holder:
        assert f"{holder.pid} (sleep)" in snapfs("umount", str(tmp_path / "t"), status=5)
        holder.kill()
    snapfs("umount", str(tmp_path / "t"))
    assert "make a view" in snapfs("mount", "l0", str(tmp_path / "t"), status=1)
    assert "make it first: mkdir" in snapfs("mount", "web", str(tmp_path / "no"), status=1)
    assert 'snapshot "no" does not exist in ' in snapfs("mount", "no", str(tmp_path / "t"), status=3)
    assert "is no snapshot's file system" in snapfs("umount", "/proc", status=1)
    assert "lies in the tree" in snapfs("mount", "web", str(snapfs.mnt / "active"), status=1)


RACING = """
import os, sys
from snapfs.cli import main
from snapfs.kernel import mounting, overlay
mnt, key, target, *steps = sys.argv[1:]

def first(call):
    done = []
    def act(*arguments, **keywords):
        if not done:
            done.append(call)
            try:
                for step in steps:
                    make, *words = step.split()
                    getattr(os, make)(*(f"{mnt}/{word}" for word in words))
            except OSError as error:
                print(error.strerror)
        return call(*arguments, **keywords)
    return act

overlay.mount_overlay = first(overlay.mount_overlay)
mounting.mount_bind = first(mounting.mount_bind)
sys.exit(main(["mount", "--at", mnt, key, target]))
"""
LATE = (
    RACING[: RACING.index("overlay.mount_overlay")]
    + """
mounting.make_writable = first(mounting.make_writable)
sys.exit(main(["mount", "--at", mnt, key, target]))
"""
)
BETWEEN = (
    RACING[: RACING.index("overlay.mount_overlay")]
    + """
from snapfs.cli.place import MountedTree
read, swap = MountedTree.read, first(lambda: None)
MountedTree.read = lambda place, path: (swap() if path.endswith("mounts.json") else None, read(place, path))[1]
sys.exit(main(["mount", "--at", mnt, key, target]))
"""
)


def raced(program: str, snapfs: Command, target: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    """Mount the snapshot "raced" on ``target`` by a command in which ``program`` makes another user do ``steps`` at its worst
    moment."""
    target.mkdir()
    words = [sys.executable, "-c", program, str(snapfs.mnt), "raced", str(target), *steps]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("parent", ["", "committed/b/"])
def test_mounted_while_somebody_commits_it(snapfs: Command, tmp_path: Path, parent: str) -> None:
    """A user of the tree, between the command's look at mounts.json and its mount; what is committed can't be written to."""
    snapfs("prepare", "b")
    snapfs("commit", "b", "b")
    os.mkdir(snapfs.mnt / f"{parent}active/raced")
    done = raced(RACING, snapfs, tmp_path / "target", "rename active/raced committed/raced")
    assert (done.returncode, done.stderr) == (5, 'snapfs: "raced" was committed a moment ago: it is not mounted\n')
    assert not is_mounted(tmp_path / "target")
    assert snapfs("diff", "raced") == ""


@pytest.mark.parametrize("parent", ["", "committed/b/"])
def test_committed_while_it_is_being_mounted(snapfs: Command, tmp_path: Path, parent: str) -> None:
    """Once it is known that the snapshot is active still it is in use, also where it can't be written to yet."""
    snapfs("prepare", "b")
    snapfs("commit", "b", "b")
    os.mkdir(snapfs.mnt / f"{parent}active/raced")
    done = raced(LATE, snapfs, target := tmp_path / "target", "rename active/raced committed/raced")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "Device or resource busy\n")
    (target / "file").write_text("")
    assert snapfs("diff", "raced") == "A /file\n"
    snapfs("umount", str(target))
    snapfs("commit", "raced", "raced")


@pytest.mark.parametrize(
    ("program", "steps", "why"),
    [
        (BETWEEN, ("rename active/raced active/x", "mkdir active/raced"), '"raced" became another a moment ago'),
        (RACING, ("rename active/raced active/x", "mkdir active/raced"), ""),
        (RACING, ("rename active/raced committed/x", "mkdir active/raced"), '"raced" was committed a moment ago'),
        (RACING, ("rmdir active/raced", "mkdir active/raced"), "No such file or directory"),
    ],
)
def test_another_gets_its_key_while_it_is_being_mounted(
    snapfs: Command, tmp_path: Path, program: str, steps: tuple[str, ...], why: str
) -> None:
    """What is mounted is the snapshot that was looked up, and it is active; or nothing is."""
    snapfs("prepare", "raced")
    done = raced(program, snapfs, target := tmp_path / "target", *steps)
    assert why in done.stderr
    assert (done.returncode == 0) == (not why) == is_mounted(target)
    if not why:
        (target / "file").write_text("")
        assert snapfs("diff", "x") == "A /file\n"
        snapfs("umount", str(target))
    assert snapfs("diff", "raced") == ""


UNWRITABLE = """
import os, sys
import snapfs.cli.mount
snapfs.cli.mount._let_write = lambda *_: os._exit(99)
sys.exit(snapfs.cli.main())
"""


@pytest.mark.parametrize("parent", [(), ("-p", "base")])
def test_umount_finds_what_a_mount_has_left_that_was_killed(snapfs: Command, tmp_path: Path, parent: tuple[str, ...]) -> None:
    """Before it was made writable, so that the daemon tells of no mount."""
    snapfs("prepare", "b")
    snapfs("commit", "--no-sync", "b", "base")
    target = tmp_path / "t"
    target.mkdir()
    for key in ("web", "other"):
        snapfs("prepare", key, *parent)
    words = [sys.executable, "-c", UNWRITABLE, "mount", "--at", str(snapfs.mnt), "web", str(target)]
    assert subprocess.run(words, check=False).returncode == 99
    assert is_mounted(target)
    assert "is not mounted" in snapfs("umount", "other", status=1)
    snapfs("umount", "web")
    assert not is_mounted(target)
    assert "is not mounted" in snapfs("umount", "web", status=1)


@pytest.mark.parametrize("steps", ["umount t; mount -t tmpfs none t", "mount -t tmpfs none t", "umount t; rmdir t; ln -s u t"])
def test_umount_leaves_what_has_come_there_since(
    snapfs: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    """Between the command's look at the mount table and the unmount."""
    os.mkdir(active(snapfs, "web"))
    (tmp_path / "t").mkdir()
    (tmp_path / "u").mkdir()
    snapfs("mount", "web", str(tmp_path / "t"))
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "u")], check=True)
    uncovered = mount._uncovered

    def late(*arguments: Any) -> None:
        uncovered(*arguments)
        subprocess.run(["sh", "-ec", steps], cwd=tmp_path, check=True)

    monkeypatch.setattr(mount, "_uncovered", late)
    try:
        assert main(["umount", str(tmp_path / "t")]) == 5
        assert "has just been unmounted, or covered" in capsys.readouterr().err
        assert [is_mounted(tmp_path / name) for name in "tu"] == ["tmpfs" in steps, True]
    finally:
        for name in ("t", "t", "u"):
            subprocess.run(["umount", "-q", "--no-canonicalize", str(tmp_path / name)], check=False)


def test_what_is_mounted_inside_is_named_by_umount(snapfs: Command, tmp_path: Path) -> None:
    snapfs("prepare", "w")
    (target := tmp_path / "target").mkdir()
    snapfs("mount", "w", str(target))
    (target / "d/e").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", target / "d/e"], check=True)
    try:
        for word in ("w", str(target)):
            said = snapfs("umount", word, status=5)
            assert f"cannot unmount {target}: {target}/d/e is mounted inside it: unmount that first" in said
    finally:
        subprocess.run(["umount", target / "d/e"], check=True)
    snapfs("umount", "w")


def test_mounted_twice(snapfs: Command, tmp_path: Path) -> None:
    """All places show one file system: the kernel answers for nothing where two overlays write to one layer."""
    snapfs("prepare", "x")
    snapfs("commit", "--no-sync", "x", "base")
    snapfs("prepare", "web", "-p", "base")
    rootfs = active(snapfs, "web") / "rootfs"
    places = [tmp_path / "one", tmp_path / "two"]
    os.listdir(f"{rootfs}/")
    for place in places:
        place.mkdir()
        snapfs("mount", "web", str(place))
        assert "already" in snapfs("mount", "web", str(place), status=5)
        assert place.stat().st_dev == (rootfs / ".").stat().st_dev
    (places[0] / "file").write_text("1")
    assert (places[1] / "file").read_text() == "1"
    snapfs("umount", "web")
    assert [os.listdir(place) for place in places] == [[], []]


def test_usage(snapfs: Command) -> None:
    snapfs("prepare", "web")
    (active(snapfs, "web") / "rootfs/file").write_bytes(b"x" * 100_000)
    snapfs("prepare", "empty")
    usage = {each["name"]: each for each in json.loads(snapfs("usage", "--json"))}
    assert usage["web"]["inodes"] == 2
    assert usage["web"]["size"] == json.loads((active(snapfs, "web") / "usage.json").read_text())["size"] > 100_000
    assert snapfs("usage").splitlines()[-1].startswith("total")
    assert snapfs("usage", "web").splitlines()[1].startswith("web")


def test_usage_of_a_squash(snapfs: Command) -> None:
    """What it shares is said, and is in the total once."""
    snapfs("prepare", "web")
    (active(snapfs, "web") / "rootfs/file").write_bytes(b"x" * 1_000_000)
    snapfs("commit", "web", "v1")
    before = snapfs("usage", "v1", "--json")
    assert snapfs("squash", "v1") == "v1-squashed\n"
    usage = {each["name"]: each for each in json.loads(snapfs("usage", "--json"))}
    assert usage["v1"] == json.loads(before)[0]
    assert (usage["v1"]["shared"], usage["v1-squashed"]["shared"] > 1_000_000) == (0, True)
    lines = [line.split() for line in snapfs("usage").splitlines()]
    assert lines[0] == ["NAME", "KIND", "INODES", "SIZE", "SHARED"]
    assert lines[-1][2].endswith("K"), lines


def test_squash(snapfs: Command) -> None:
    for name in ("one", "two"):
        snapfs("prepare", "web", *(("--parent", "one") if name == "two" else ()))
        (active(snapfs, "web") / f"rootfs/{name}").write_text(name)
        snapfs("commit", "web", name)
    assert snapfs("squash", "two", "flat") == "flat\n"
    assert sorted(os.listdir(snapfs.mnt / "committed/flat/rootfs/")) == ["one", "two"]
    snapfs("prepare", "web")
    for words, status, said in (
        (("two", "flat"), 4, 'snapshot "flat" already exists (committed)'),
        (("two", "web"), 4, 'snapshot "web" already exists (active)'),
        (("no",), 3, 'snapshot "no" does not exist'),
        (("web",), 3, '"web" is active: only committed snapshots can be squashed'),
    ):
        assert said in snapfs("squash", *words, status=status)


def test_events(snapfs: Command) -> None:
    snapfs("prepare", "web")
    snapfs("commit", "--no-sync", "web", "v1")
    assert snapfs("events").splitlines()[-1].endswith("commit   web -> v1")
    assert json.loads(snapfs("events", "--json").splitlines()[-1])["name"] == "v1"


def test_events_follow_until_the_daemon_ends(daemon: Daemon) -> None:
    words = [*SNAPFS, "events", "-f", "--at", str(daemon.mnt)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    ) as events:
        assert events.stdout is not None
        assert events.stderr is not None
        (daemon.mnt / "active/a").mkdir()
        assert events.stdout.readline().endswith(" prepare  a\n")
        assert daemon.stop() == 0
        assert "the daemon that served" in events.stderr.read()
        assert events.wait(timeout=30) == 7


# -- patches


@pytest.fixture
def edited(snapfs: Command) -> Path:
    """The files of an active snapshot "web", some of which are others than its parent's."""
    snapfs("prepare", "draft")
    files = active(snapfs, "draft") / "rootfs"
    (files / "some text").write_text("".join(f"{number}\n" for number in range(9)))
    (files / "gone").write_text("-- a\n")
    snapfs("commit", "draft", "base")
    snapfs("prepare", "web", "-p", "base")
    files = active(snapfs, "web") / "rootfs"
    (files / "some text").write_text(
        "".join(f"{number}\n" for number in (0, 1, 2, "three", 4, 5, 6, 7, 8, "diff --git a/x b/x"))
    )
    (files / "gone").unlink()
    (files / "nul").write_bytes(b"\0")
    (files / "é").write_text("\33[31mred\n")
    return files


def test_a_patch(snapfs: Command, edited: Path) -> None:
    said = snapfs("diff", "--patch", "web")
    assert said == (active(snapfs, "web") / "changes.patch").read_text()
    assert "\n-3\n+three\n" in said
    assert snapfs("diff", "-p", "base").count("new file mode") == 2
    assert "can't go together" in snapfs("diff", "--patch", "--stat", "web", status=2)


def test_how_many_lines_each_file_has(snapfs: Command, edited: Path) -> None:
    assert snapfs("diff", "--stat", "web").splitlines() == [
        " gone       | 1 -",
        " nul        | Bin",
        " some text  | 3 ++-",
        ' "\\303\\251" | 1 +',
        " 4 files changed, 3 insertions(+), 2 deletions(-)",
    ]
    snapfs("prepare", "same", "-p", "base")
    assert snapfs("diff", "--stat", "same") == snapfs("diff", "--patch", "same") == ""


def test_two_snapshots(snapfs: Command, edited: Path) -> None:
    snapfs("checkpoint", "web", "-m", "one")
    (edited / "nul").unlink()
    (edited / "é").write_text("\33[31mred\n")
    snapfs("view", "peek", "-p", "base")
    snapfs("prepare", "7")
    for words, lines in {
        "base web": ["D /gone", "C /some text", "A /é"],
        "web base": ["A /gone", "C /some text", "D /é"],
        "--since 1 web": ["D /nul", "C /é"],
        "--since 0 web": ["D /gone", "C /some text", "A /é"],
        "--since web@1 --content active/web": ["D /nul"],
        "--content web": ["D /nul"],
        "peek web /some\\ text": ["C /some text"],
        "base committed/web@1 nul gone": ["D /gone", "A /nul"],
        "base web@1 -- nul": ["A /nul"],
        "web -- é": ["C /é"],
        "base peek": [],
        "7 web /nul": [],
    }.items():
        assert snapfs("diff", *shlex.split(words)).splitlines() == lines, words
    assert json.loads(snapfs("diff", "--json", "--since", "1", "web"))[0] == {"change": "D", "path": "/nul"}
    assert snapfs("diff", "--stat", "base", "web@1") == snapfs("diff", "--stat", "web@1")
    assert "GIT binary patch" in snapfs("diff", "--binary", "base", "web@1")
    assert snapfs("diff", "--color=always", "web").startswith("\33[31mD /nul\33[0m")


def test_what_is_no_comparison(snapfs: Command, edited: Path) -> None:
    """Each mistake has a sentence that says what to do."""
    snapfs("view", "peek")
    for words, status, said in (
        ("nix web", 3, 'snapshot "nix" does not exist in'),
        ("web nix", 3, "; a path goes after --, as in snapfs diff web -- nix\n"),
        (f"web {snapfs.mnt}/committed/nix", 3, "snapfs ls lists all"),
        ("--since nix web", 3, 'snapshot "nix" does not exist in'),
        ("--since 7 web", 3, '"web" has no checkpoint 7'),
        ("--since 1 base web", 2, "--since says with what the first is compared"),
        ("peek", 1, "snapfs diff NAME peek compares it with another"),
        ("--color=no web", 2, "--color is auto, always or never"),
        ("--json --binary web", 2, "leave --binary away"),
        ("base web ../x", 1, 'the path "../x" leads out of the snapshot'),
        ("base web ''", 1, "an empty path names nothing"),
        (f"web -- {'a' * (64 << 10)}", 2, "too many paths"),
        ("", 2, "NAME is missing"),
    ):
        assert said in snapfs("diff", *shlex.split(words), status=status), words
    for name in ("-a", "-b"):
        snapfs("prepare", "--", name)
    assert snapfs("diff", "--", "-a", "-b") == snapfs("diff", "--", "-a") == ""


def test_a_read_only_tree_compares_with_the_parent_alone(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    Command(daemon.mnt)("prepare", "web")
    assert daemon.stop() == 0
    daemon = make_daemon("-o", "ro").start()
    snapfs = Command(daemon.mnt)
    assert snapfs("diff", "web") == snapfs("diff", "-p", "web") == ""
    assert "mounted read-only, so nothing can be asked of it" in snapfs("diff", "web", "web", status=6)


def test_a_patch_at_a_terminal(snapfs: Command, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In git's colours, through the pager that the user has; nothing in a file is obeyed by the terminal."""
    monkeypatch.setenv("SNAPFS", str(snapfs.mnt))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("LESS", raising=False)
    monkeypatch.setenv("PAGER", f"tee {tmp_path}/paged; echo $LESS")
    said = OnATerminal("diff", "--patch", "web").said()
    assert said.endswith("FRX\r\n")
    assert said.replace("\r\n", "\n").removesuffix("FRX\n") == (tmp_path / "paged").read_text()
    for line in (
        "\33[1mdiff --git a/gone b/gone",
        "\33[36m@@ -1,9 +1,10 @@",
        "\33[31m-3",
        "\33[32m+three",
        "\33[32m+%1B[31mred",
    ):
        assert f"{line}\33[0m" in said
    monkeypatch.setenv("PAGER", "head -n 1")  # it ends before it has read all
    assert OnATerminal("diff", "--patch", "web").said().count("\n") == 1
    monkeypatch.setenv("PAGER", "there-is-none --such")
    assert "+three" in OnATerminal("diff", "--patch", "web").said()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\33" not in OnATerminal("diff", "--patch", "web").said()


# -- the terminal


def test_standard_output_that_is_closed(snapfs: Command) -> None:
    for n in range(50):
        (snapfs.mnt / f"active/{n}").mkdir()
    words = [*SNAPFS, "ls", "--json", "--at", str(snapfs.mnt)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_parent) as ls:
        assert ls.stdout is not None
        assert ls.stderr is not None
        ls.stdout.close()
        assert ls.stderr.read() == b""
        assert ls.wait(timeout=30) == 141


def test_colours_only_where_they_are_wanted(snapfs: Command) -> None:
    snapfs("prepare", "web")
    assert "\033[" not in snapfs("tree")
    words = " ".join([*SNAPFS, "tree", "--at", str(snapfs.mnt)])
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        environment = {**os.environ, "TERM": "xterm", **variables}
        done = subprocess.run(
            ["script", "-qec", words, "/dev/null"], env=environment, capture_output=True, text=True, check=True
        )
        assert ("\033[" in done.stdout) is coloured


@pytest.fixture
def long_ones(daemon: Daemon) -> Callable[[str], tuple[str, ...]]:
    """The command lines of what takes long, on a tree with something to do for them."""
    for name in ("a", "b", "c"):
        (daemon.mnt / "active/x").mkdir()
        os.rename(daemon.mnt / "active/x", daemon.mnt / "committed" / name)

    def words(verb: str) -> tuple[str, ...]:
        if verb.startswith("check"):
            assert daemon.stop() == 0
            return (*verb.split(), str(daemon.root))
        rest = {"rm": ("-r", "a", "b", "c"), "usage": (), "prune": ("--kind", "committed")}[verb]
        return (verb, "--at", str(daemon.mnt), *rest)

    return words


LONG = {
    "rm": "removing",
    "prune": "removing",
    "usage": "counting",
    "check": "directory of committed",
    "check --rebuild": "reading what directory 1",
}


@pytest.mark.parametrize("verb", LONG)
def test_progress_on_a_terminal(long_ones: Callable[[str], tuple[str, ...]], verb: str) -> None:
    shown = OnATerminal(*long_ones(verb))
    said = shown.said()
    assert shown.process.returncode == 0
    bar, rest = said.split("\r", 2)[1:]
    assert re.match(rf"\[\.{{20}}\] 1/3 {LONG[verb]} ", bar)
    assert "[" not in said.rsplit("\r", 1)[1], "it is wiped out at the end"
    assert rest


@pytest.mark.parametrize("verb", LONG)
def test_control_c(long_ones: Callable[[str], tuple[str, ...]], verb: str) -> None:
    shown = OnATerminal(*long_ones(verb), stopped=True)
    until(shown.writes, "it says how far it is")
    os.write(shown.master, b"\x03")
    said = shown.said()
    assert shown.process.returncode == 130
    assert "Traceback" not in said


# -- help, completion, start


@pytest.mark.parametrize("word", VERBS)
def test_help(word: str) -> None:
    shown = run(word, "--help")
    assert shown.returncode == 0
    assert f"snapfs {word}" in shown.stdout
    assert "\nexamples:\n  " in shown.stdout


@pytest.mark.parametrize("words", [("--help",), ("ls",), ("ls", "--json"), ("diff", "--patch", "web")])
def test_standard_output_on_a_full_disk(snapfs: Command, edited: Path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*SNAPFS, *words], stdout=full, stderr=subprocess.PIPE, env={**os.environ, "SNAPFS": str(snapfs.mnt)}, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"snapfs: cannot write to standard output: No space left on device\n")


def test_the_command_alone() -> None:
    assert run().returncode == 2
    assert all(f"\n  {word} " in run("--help").stdout for word in VERBS)
    assert run("--version").stdout.startswith("snapfs ")
    assert run("nope").returncode == 2


@pytest.mark.parametrize("word", VERBS)
def test_examples_in_help_are_options_that_there_are(word: str) -> None:
    its = verb(word)
    mine = [line for line in its.examples.strip().splitlines() if line.startswith(f"snapfs {word} ")]
    for line in mine:
        its.parse(list(takewhile(lambda each: each not in ("|", ">", "#"), shlex.split(line)[2:])))
    assert mine or word in ("completion",)


def test_completion(snapfs: Command) -> None:
    for key in ("web", "wobble", "other"):
        snapfs("prepare", key)
    snapfs("commit", "--no-sync", "wobble", "wobbly")
    words = snapfs("_complete", "che")
    assert set(words.split()) == {"check", "checkpoint"}
    assert snapfs("_complete", "show", "w").split() == ["web", "wobbly"]
    assert snapfs("_complete", "prepare", "x", "--parent", "").split() == ["wobbly"]
    assert snapfs("_complete", "commit", "w").split() == ["web"]
    assert "--dry-run" in snapfs("_complete", "prune", "--").split()
    assert snapfs("_complete", "serve", "root", "mnt", "--rootfs-").split() == ["--rootfs-idle", "--rootfs-max"]
    assert snapfs("_complete", "serve", "root", "mnt", "--sync", "").split() == ["full", "background", "none"]
    assert snapfs("_complete", "check", "--re").split() == ["--repair", "--rebuild"]
    assert snapfs("_complete", "backup", "--").split() == ["--help"]
    for before in (("serve", ""), ("check", "w"), ("backup", "root", "w"), ("serve", "--containerd", "")):
        assert snapfs("_complete", *before) == "", "a path, which the shell knows"


def test_completion_offers_only_words_that_work(snapfs: Command) -> None:
    """Keys that look like options where they are none; none that a terminal obeys, that nobody sees, or that a shell cuts."""
    for key in ("-x", "--at", "a\tb", "a\nb", "a\x1b]0;", "a\u202eb", "a\u200bb", "a b", "aé"):
        snapfs("prepare", "--", key)
    snapfs("prepare", "c")
    snapfs("commit", "--no-sync", "c", "--", "-c")
    for words, offered in (
        (("show", ""), ["a b", "aé"]),
        (("show", "--", ""), ["--at", "-c", "-x", "a b", "aé"]),
        (("show", "--", "-"), ["--at", "-c", "-x"]),
        (("rm", "a b", "--", "-x", "-"), ["--at", "-c", "-x"]),
        (("rm", "--", "--at", "-"), ["--at", "-c", "-x"]),
        (("prepare", "n", "--parent", ""), ["-c"]),
        (("prepare", "n", "--parent", "-"), ["-c"]),
        (("prepare", "--", "n", "--parent", ""), []),
        (("show", "--pa"), ["--path"]),
        (("show", "--at", str(snapfs.mnt), "a"), ["a b", "aé"]),
        (("show", "--at", str(snapfs.mnt), "--", "--at", "-x"), ["-x"]),
    ):
        found = snapfs("_complete", *words).splitlines()
        assert found == offered, words
    for word in snapfs("_complete", "show", "--", "").splitlines():
        assert snapfs("show", "--path", "--", word).endswith(f"/{word}\n")


@contextlib.contextmanager
def shell_at(home: Path, shell: str, mnt: Path) -> Iterator[int]:
    """A shell on a terminal of its own, which has the completion and no other configuration; the terminal's master."""
    (home / "snapfs").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snapfs.cli "$@"\n')
    (home / "snapfs").chmod(0o755)
    start = {
        "bash": ["bash", "--norc", "--noprofile", "-i"],
        "zsh": ["zsh", "-f", "-i"],
        "fish": ["fish", "--no-config", "--interactive"],
    }
    set_up = {"bash": "", "zsh": "PS1='$ '; autoload -U compinit; compinit -u; ", "fish": ""}
    load = {
        "bash": 'eval "$(snapfs completion bash)"',
        "zsh": 'eval "$(snapfs completion zsh)"',
        "fish": "snapfs completion fish | source",
    }
    environment = {**os.environ, "SNAPFS": str(mnt), "PATH": f"{home}:{os.environ['PATH']}", "PS1": "$ "}
    environment |= {"HOME": str(home), "PYTHONPATH": os.getcwd(), "TERM": "xterm", "LANG": "C.UTF-8"}
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (50, 200))
    with subprocess.Popen(
        start[shell],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=home,
        env=environment,
        start_new_session=True,
        preexec_fn=OnATerminal._take,
    ) as process:
        os.close(terminal)
        try:
            os.write(master, f"{set_up[shell]}{load[shell]}; echo re''ady\n".encode())
            heard(master, "ready")
            yield master
        finally:
            process.kill()
            os.close(master)


def heard(master: int, wanted: str) -> str:
    """What the terminal is told, until ``wanted`` comes, but for the escape sequences."""
    said = b""
    deadline = time.monotonic() + 30
    while wanted not in (
        plain := re.sub(r"\x1b(\[[0-9;?>]*[a-zA-Z]|[()].|\][^\a]*\a|[=>])|\r|\x08", "", said.decode(errors="ignore"))
    ):
        assert time.monotonic() < deadline, f"{wanted!r} is not in {said!r}"
        if select.select([master], [], [], 0.1)[0]:
            said += os.read(master, 4096)
    return plain


TABS = {
    "snapfs show wo": "wobbly",
    "snapfs show wi": "with\\ space",
    "snapfs show with\\ s": "with\\ space",
    "snapfs show --at . default/1/sha256:a": "sha256:abc",
    "snapfs serve r m -o allow_other,dir": "dirsync",
    "snapfs serve r m -o allow_other,sync=n": "sync=none",
    "snapfs serve r m -o gid=sys,rootfs_m": "rootfs_max=",
    "snapfs serve r m -o ro,uid=daem": "uid=daemon",
    "snapfs ./r m -o no_ro": "no_rootfs",
    "snapfs show -- -da": "-dash",
}
"""What a line becomes by TAB."""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_tab_in_the_shell(snapfs: Command, shell: str, tmp_path: Path) -> None:
    for key in ("web", "wobbly", "with space", "default/1/sha256:abc", "-dash"):
        snapfs("prepare", "--", key)
    with shell_at(tmp_path, shell, snapfs.mnt) as master:
        for line, wanted in TABS.items():
            line = line.replace("--at .", f"--at {snapfs.mnt}")
            os.write(master, f"{line}\t".encode())
            heard(master, wanted)
            os.write(master, b"\x15")  # Ctrl-U
        os.write(master, b"snapfs serve r m -o ro,sync=\t\t")
        heard(master, "none")


ALL_OF = {"", "cli", "cli.grammar", "cli.place", "cli.refusal", "cli.table", "cli.within"}
"""The modules that each verb needs."""

QUICK = {
    "ls": ({"cli.ls", "cli.listing"}, {"lookup": 2, "open": 1, "read": 1, "getattr": 2}),
    "prepare new": ({"cli.prepare"}, {"lookup": 1, "mkdir": 1}),
    "checkpoint web": ({"cli.workspace", "cli.commanding"}, {"lookup": 3, "open": 1, "write": 1, "read": 1}),
    "rollback web": ({"cli.workspace", "cli.commanding"}, {"lookup": 3, "open": 1, "write": 1, "read": 1}),
    "commit --no-sync web v1": ({"cli.commit", "cli.commanding"}, {"lookup": 2, "rename": 1}),
    "rm web": ({"cli.rm", "cli.listing", "cli.progress"}, {"lookup": 1, "rmdir": 1}),
}
"""What a script does in a loop: which modules besides it loads, and the most that it asks of the daemon.  Who lists, opens
nothing twice; nobody looks whether a snapshot is there before it is asked to change."""

FREE = {"__future__", "errno", "time"}
"""Of Python's own modules those that are in it already, and one of a few lines."""


@pytest.mark.parametrize("line", QUICK)
def test_a_quick_verb_loads_little_and_asks_little(snapfs: Command, line: str) -> None:
    modules, most = QUICK[line]
    program = "import os, sys; before = set(sys.modules); from snapfs.cli import main; main(sys.argv[1:]); "
    program += "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    snapfs("prepare", "web")
    snapfs("ls")  # which the tree remembers until something changes
    before = requests(snapfs)
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *line.split()],
        env={**os.environ, "SNAPFS": str(snapfs.mnt)},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = requests(snapfs) - before
    assert set(done.stderr.split()) <= FREE | {f"snapfs.{name}".rstrip(".") for name in ALL_OF | modules}
    asked.subtract(requests(snapfs) - before - asked)  # what this has asked itself
    assert {what: asked[what] for what in asked if asked[what] > most.get(what, 0)} == {}


def requests(snapfs: Command) -> Counter[str]:
    """How many requests of each kind the daemon has answered so far, but for those that the kernel makes afterwards."""
    operations = json.loads((snapfs.mnt / ".snapfs/stats.json").read_text())["operations"]
    return Counter({what: each["count"] for what, each in operations.items() if not what.startswith("release")})


ENDING = """
import atexit, sys
from snapfs.cli import main
{before}
try:
    sys.exit(main())
finally:
    print("Python ends")
"""


@pytest.mark.parametrize(
    ("before", "ends"),
    [
        ("del sys.modules['atexit']", False),
        ("atexit.register(print, 'as was asked')", True),
        ("del sys.modules['atexit']; import threading", True),
        ("del sys.modules['atexit']; sys.setprofile(lambda *_: None)", True),
    ],
)
def test_python_need_not_end_where_nobody_asks_for_it(before: str, ends: bool) -> None:
    """That would take a fifth of the time of a verb; but for that, all is as ever: the exit status, and what is printed."""
    program = ENDING.format(before=before)
    done = subprocess.run([sys.executable, "-S", "-c", program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("snapfs ")
    assert ("Python ends" in done.stdout) == ends
    assert ("as was asked" in done.stdout) == ("register" in before)
    assert done.stderr == ""
    wrong = subprocess.run([sys.executable, "-S", "-c", program, "ls", "--odd"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_no_verb_waits_for_what_only_the_daemon_needs(snapfs: Command, tmp_path: Path) -> None:
    lines = """prepare x; commit --no-sync x base; prepare web -p base; view peek -p base; ls; tree; show web; usage
    label web a=b; diff web; events; checkpoint web; rollback web; fork base other; prune --expired; rm other
    mount peek TARGET; umount TARGET; completion bash; _complete show w; _complete serve -o a; help"""
    program = f"""
import sys
from snapfs.cli import VERBS, main
for line in {lines!r}.replace("TARGET", {str(tmp_path)!r}).replace(";", "\\n").splitlines():
    assert main(line.split()) == 0, line
for word in VERBS:
    assert main([word, "--help"]) == 0, word
print(*{{"trio", "pyfuse3", "lmdb", "hpack"}} & set(sys.modules), file=sys.stderr, end="")
"""
    environment = {**os.environ, "SNAPFS": str(snapfs.mnt)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [("serve", "root", "mnt"), ("check", "root"), ("backup", "root", "copy"), ("root/", "mnt")])
def test_where_it_was_installed_without_what_the_daemon_needs(words: tuple[str, ...], tmp_path: Path) -> None:
    """As for the plugin for pytest, where there is no compiler."""
    for name in ("root", "mnt"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-S", *SNAPFS[1:], *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"snapfs: \w+ is not installed, which {words[0]} takes: install snapfs anew, without --no-deps\n", done.stderr
    )


def test_grammar() -> None:
    its = grammar.Verb(
        "x",
        "A [B…]",
        (grammar.Option("flag", "", short="-f"), grammar.Option("with", "", "V", short="-w")),
        "",
        "",
        lambda given: 0,
    )
    given = its.parse(["-fw1", "a", "--with=2", "--", "-b"])
    assert given.arguments == ["a", "-b"]
    assert given.all("with") == ["1", "2"]
    assert given.has("flag")
    for wrong in ([], ["--flag=1", "a"], ["a", "--with"], ["a", "-z"]):
        with pytest.raises(grammar.WrongUsage):
            its.parse(wrong)
