"""One path back: which checkpoints hold which version of it, and history/, where they are by the time they were made."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from snapfs import Snapshotter
from snapfs.errors import Damaged, NotEmpty, NotFound, TryAgain
from snapfs.labels import NUMBER, OF
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.tree import Tree, moments
from snapfs.tree.moments import MOST, SECOND
from snapfs.tree.users import asker
from tests.command import SNAPFS, Command
from tests.daemon import Daemon
from tests.nodes import crawl
from tests.refusals import failing
from tests.tree import REMOVERS, info, shell

AT = 1_795_856_400  # 2026-11-28 09:00:00 UTC

# -- history/, without a mount


class Clock:
    """What commits take for the module ``time``."""

    def __init__(self) -> None:
        self.now = AT * SECOND

    def time_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("snapfs.rules.commit.time", clock)
    return clock


async def kept(snapshotter: Snapshotter, clock: Clock, *seconds: float) -> None:
    """Checkpoints of ``web`` that were made so many seconds after AT."""
    for second in seconds:
        clock.now = int((AT + second) * SECOND)
        await snapshotter.checkpoint("web")


def history(tree: Tree, key: str = "web") -> dict[str, str]:
    """Where each link leads, in the order of the listing."""
    return {name: node.target() for _, name, node in tree.walk(f"active/{key}/history").entries(0)}


@pytest.fixture
async def tree(snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(Snapshotter, "has_rootfs", True)  # no link is followed here
    await snapshotter.prepare("web")
    return Tree(snapshotter)


async def test_links_are_named_for_the_time(tree: Tree, clock: Clock) -> None:
    assert history(tree) == {}
    await kept(tree.snapshotter, clock, 0, 0.5, 60)
    expected = {
        "@GMT-2026.11.28-09.00.00": "../../../committed/web@2/rootfs",  # of two in one second, the later one
        "@GMT-2026.11.28-09.01.00": "../../../committed/web@3/rootfs",
    }
    assert history(tree) == expected
    for name, target in expected.items():
        link = tree.walk(f"active/web/history/{name}")
        assert (link.target(), link.path) == (target, f"active/web/history/{name}")
        assert tree.node(link.inode).target() == target
        assert link.attributes().size == len(target)
    await tree.snapshotter.rename("web@2", "kept")
    assert history(tree)["@GMT-2026.11.28-09.00.00"] == "../../../committed/kept/rootfs"


@pytest.mark.parametrize(
    "name",
    ["@GMT-2026.11.28-09.00.01", "@GMT-2026.11.28-9.0.0", "@GMT-2026.13.28-09.00.00", "@GMT-1969.11.28-09.00.00", "x", ""],
)
async def test_other_names_lead_nowhere(tree: Tree, clock: Clock, name: str) -> None:
    await kept(tree.snapshotter, clock, 0)
    with pytest.raises(NotFound):
        tree.walk("active/web/history").lookup(name)


async def test_it_is_in_the_order_of_time_and_goes_on_where_it_was(tree: Tree, clock: Clock) -> None:
    """Also where the clock was set back, and whatever comes and goes meanwhile."""
    await kept(tree.snapshotter, clock, 50, 10, 30)
    assert [target.split("/")[4] for target in history(tree).values()] == ["web@2", "web@3", "web@1"]
    entries = list(tree.walk("active/web/history").entries(0))
    await kept(tree.snapshotter, clock, 5, 40)
    rest = [name for _, name, _ in tree.walk("active/web/history").entries(entries[1][0])]
    assert rest == ["@GMT-2026.11.28-09.00.40", "@GMT-2026.11.28-09.00.50"]
    assert len({node.inode for _, node in crawl(tree.walk("active/web"))}) == len(list(crawl(tree.walk("active/web"))))


async def test_it_is_of_workspaces_alone(tree: Tree, clock: Clock) -> None:
    await kept(tree.snapshotter, clock, 0)
    link = tree.walk("active/web/history/@GMT-2026.11.28-09.00.00")
    directory = tree.walk("active/web/history")
    with pytest.raises(NotFound):
        tree.walk("committed/web@1/history")
    await tree.snapshotter.commit("v1", "web")
    with pytest.raises(NotFound):
        tree.node(directory.inode)
    assert tree.node(link.inode).target().endswith("web@1/rootfs"), "it is a checkpoint still"
    await tree.snapshotter.update("web@1", {}, [f"labels.{OF}"])
    with pytest.raises(NotFound):
        tree.node(link.inode)


async def test_the_latest_are_shown_of_very_many(tree: Tree, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST >= 1000
    monkeypatch.setattr("snapfs.tree.moments.MOST", 3)
    await kept(tree.snapshotter, clock, *range(5))
    assert [name[-2:] for name in history(tree)] == ["02", "03", "04"]


async def test_labels_by_hand(tree: Tree, clock: Clock) -> None:
    """What makes a committed snapshot a checkpoint makes it one here, too; of one second the highest number counts."""
    await kept(tree.snapshotter, clock, 0, 10)
    assert len(history(tree)) == 2
    await tree.snapshotter.update("web@1", {OF: "web", NUMBER: "9"}, [f"labels.{OF}", f"labels.{NUMBER}"])
    assert list(history(tree)) == ["@GMT-2026.11.28-09.00.00", "@GMT-2026.11.28-09.00.10"]
    await tree.snapshotter.update("web@1", {OF: "other"}, [f"labels.{OF}"])
    assert list(history(tree)) == ["@GMT-2026.11.28-09.00.10"]


async def test_finding_them_out_takes_a_share_of_the_time(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is answered meanwhile, and who looks at more workspaces than are remembered has it done each time."""
    monkeypatch.setattr("snapfs.tree.moments.REMEMBERED", 1)
    now, found = [0.0], moments._found

    def slow(reader: Reader, workspace: str) -> dict[int, int]:
        now[0] += 0.03
        return found(reader, workspace)

    monkeypatch.setattr("snapfs.tree.moments._found", slow)
    own = Tree(tree.snapshotter)
    own.state.moments = moments.Moments(lambda: now[0])
    await tree.snapshotter.prepare("web2")

    def looks(user: int | None) -> int:
        """How often ``user`` may look before there is a refusal."""
        asker.set(user)
        for count, key in enumerate(["web", "web2"] * 10):
            try:
                history(own, key)
            except TryAgain:
                assert history(own, ["web2", "web"][count % 2]) == {}, "which is remembered"
                return count
        return 20

    assert [looks(user) for user in (1001, 1002, 1003, None)] == [4, 4, 0, 20]
    now[0] += 100
    assert looks(1003) == 4


async def test_without_rootfs_there_is_none(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshotter, "has_rootfs", False)
    assert "history" not in [name for _, name, _ in tree.walk("active/web").entries(0)]
    with pytest.raises(NotFound, match="there is no rootfs"):
        tree.walk("active/web/history")


async def test_deleting_the_whole(tree: Tree, clock: Clock) -> None:
    """What has listed the links can unlink each of them, and then the directory; nobody else sees half of it."""
    await kept(tree.snapshotter, clock, 0, 1, 2)
    directory, pid = tree.walk("active/web/history"), os.getpid()
    with pytest.raises(NotEmpty):
        await tree.walk("active/web").rmdir("history", pid)
    for name in history(tree):
        await directory.unlink(name, pid)
        assert history(tree) == {}
    await tree.walk("active/web").rmdir("history", pid)
    with pytest.raises(NotFound):
        tree.walk("active/web/history")


async def test_a_damaged_checkpoint_is_left_out(tree: Tree, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it was known before when it was made."""
    await kept(tree.snapshotter, clock, 0, 1)
    number, whole = (await tree.snapshotter.stat("web@1")).id, Reader.record

    def record(reader: Reader, asked: int) -> Record | None:
        if asked == number:
            raise Damaged("it can't be read")
        return whole(reader, asked)

    for is_known in (True, False):
        if is_known:
            assert len(history(tree)) == 2
        monkeypatch.setattr(Reader, "record", record)
        assert list(history(tree).values()) == ["../../../committed/web@2/rootfs"]
        monkeypatch.undo()
        monkeypatch.setattr(Snapshotter, "has_rootfs", True)
        await tree.snapshotter.update("web@1", {"a": str(is_known)}, ["labels.a"])


# -- history/, mounted


@pytest.fixture
def web(snapfs: Command) -> Path:
    """The files of the workspace ``web`` on ``base``, which has some."""
    files = Path(snapfs("prepare", "b").strip(), "rootfs")
    (files / "etc").mkdir()
    (files / "etc/conf").write_text("0\n")
    (files / "big").write_text("base\n")
    (files / "dir/sub").mkdir(parents=True)
    (files / "dir/one").write_text("one\n")
    (files / "dir/sub/two").write_text("two\n")
    snapfs("commit", "b", "base")
    return Path(snapfs("prepare", "web", "--parent", "base").strip(), "rootfs")


def keep(snapfs: Command, message: str, *options: str) -> str:
    return snapfs("checkpoint", "web", "-m", message, *options).strip()


def test_earlier_states_by_their_time(snapfs: Command, web: Path, module_daemon: Daemon) -> None:
    (web / "etc/conf").write_text("1\n")
    keep(snapfs, "one")
    history = snapfs.mnt / "active/web/history"
    (name,) = os.listdir(history)
    made = info(snapfs.mnt / "committed/web@1")["created"]
    assert time.strptime(name, "@GMT-%Y.%m.%d-%H.%M.%S")[:6] == time.strptime(made[:19], "%Y-%m-%dT%H:%M:%S")[:6]
    (web / "etc/conf").write_text("2\n")
    assert (history / name / "etc/conf").read_text() == "1\n"
    assert os.path.realpath(history / name) == os.path.realpath(snapfs.mnt / "committed/web@1/rootfs")
    with failing(errno.EPERM):
        os.mkdir(history / "x")
    assert "writing a message to active/web/checkpoint makes one" in module_daemon.error_log()[-1]


@pytest.mark.parametrize("remove", [*REMOVERS, "python3 -c \"import shutil; shutil.rmtree('{}')\""])
def test_rm_of_a_workspace_with_a_history(snapfs: Command, web: Path, remove: str) -> None:
    keep(snapfs, "one")
    done = shell(snapfs.mnt, remove.format("active/web"))
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(snapfs.mnt / "active") == []
    assert sorted(os.listdir(snapfs.mnt / "committed")) == ["base", "web@1"]


def test_rm_of_one_link_is_undone_in_a_moment(snapfs: Command, web: Path) -> None:
    keep(snapfs, "one")
    history = snapfs.mnt / "active/web/history"
    (name,) = os.listdir(history)
    snapfs("label", "web", "pin=yes")
    with failing(errno.EPERM):
        os.unlink(history / name)
    snapfs("label", "web", "--delete", "pin")
    os.unlink(history / name)
    assert os.listdir(history) == []
    assert os.readlink(history / name) == "../../../committed/web@1/rootfs"


# -- versions


def versions(snapfs: Command, *words: str) -> list[tuple[str, str, str]]:
    """Which checkpoints hold it, how it came about, and since which snapshot: of each version."""
    lines = [line.split() for line in snapfs("versions", *words).splitlines()[1:]]
    return [(line[0], line[1], line[2] if len(line) > 2 else "") for line in lines]


def test_which_checkpoints_hold_which_version(snapfs: Command, web: Path) -> None:
    assert versions(snapfs, "web", "etc/conf") == [("0-now", ".", "base")]
    (web / "etc/conf").write_text("1\n")
    keep(snapfs, "one")
    keep(snapfs, "nothing")
    (web / "etc/conf").unlink()
    (web / "new").write_text("n\n")
    keep(snapfs, "gone")
    (web / "etc/conf").write_text("4\n")
    keep(snapfs, "again")
    os.chmod(web / "etc/conf", 0o600)
    expected = [
        ("0", ".", "base"),
        ("1-2", "changed", "web@1"),
        ("3", "deleted", "web@3"),
        ("4", "added", "web@4"),
        ("now", "changed", ""),
    ]
    assert versions(snapfs, "web", "etc/conf") == versions(snapfs, "web", "/etc//conf") == expected
    assert versions(snapfs, "web", "new") == [("3-now", "added", "web@3")]
    assert [each[:2] for each in versions(snapfs, "web", "etc")] == [each[:2] for each in expected[:2]] + [
        ("3", "changed"),
        ("4", "changed"),
        ("now", "changed"),
    ]
    assert versions(snapfs, "web", "big") == versions(snapfs, "web", "dir/sub") == [("0-now", ".", "base")]
    found = json.loads(snapfs("versions", "--json", "web", "etc/conf"))
    assert [(each["checkpoints"], each["now"], each["change"], each["message"]) for each in found] == [
        ([0], False, None, None),
        ([1, 2], False, "changed", "one"),
        ([3], False, "deleted", "gone"),
        ([4], False, "added", "again"),
        ([], True, "changed", None),
    ]
    assert (found[1]["workspace"], found[1]["path"], found[1]["name"]) == ("web", "/etc/conf", "web@1")


def test_versions_beside_copies(snapfs: Command, web: Path) -> None:
    """A checkpoint that is a copy has all that the layer has: what holds what it held is no new version."""
    (web / "etc/conf").write_text("1\n")
    with open(web / "big"):  # somebody stands there
        for message in ("a", "b"):
            keep(snapfs, message, "--copy")
        (web / "etc/conf").write_text("2\n")
        keep(snapfs, "c", "--copy")
    expected = [("0", ".", "base"), ("1-2", "changed", "web@1"), ("3-now", "changed", "web@3")]
    assert versions(snapfs, "web", "etc/conf") == expected


def test_versions_of_a_path_where_one_is(snapfs: Command, web: Path, tmp_path: Path) -> None:
    """By the tree, by where rootfs leads, from inside, and where it is mounted by hand or over a project."""
    keep(snapfs, "one")
    (web / "etc/conf").write_text("1\n")
    expected = versions(snapfs, "web", "etc/conf")
    assert expected == [("0-1", ".", "base"), ("now", "changed", "")]
    assert versions(snapfs, f"{web}/etc/conf") == versions(snapfs, f"{os.readlink(web)}/etc/conf") == expected
    words = [*SNAPFS, "versions", "--json", "conf"]
    environment = {**os.environ, "SNAPFS": str(snapfs.mnt), "PYTHONPATH": os.getcwd()}
    told = subprocess.run(words, cwd=web / "etc", env=environment, capture_output=True, text=True, check=True).stdout
    assert told == snapfs("versions", "--json", "web", "etc/conf")
    project = tmp_path / "project"
    project.mkdir()
    script = f"cd {project}/etc && exec {' '.join(words)}"
    assert snapfs("run", "--over", str(project), "web", "--", "sh", "-c", script) == told
    snapfs("mount", "web", str(project))
    assert versions(snapfs, f"{project}/etc/conf") == expected
    snapfs("umount", str(project))
    os.symlink(web / "etc", tmp_path / "link")
    assert versions(snapfs, f"{tmp_path}/link/conf") == expected


def test_what_versions_refuses(snapfs: Command, web: Path, tmp_path: Path) -> None:
    keep(snapfs, "one")
    for words, said, status in (
        (["web", "etc/none"], "/etc/none is in no checkpoint of web, nor in web itself", 3),
        (["web@1", "etc/conf"], '"web@1" is committed: a workspace is an active snapshot', 3),
        (["none", "etc/conf"], 'snapshot "none" does not exist', 3),
        ([f"{tmp_path}/x"], f"{tmp_path}/x is in no workspace of {snapfs.mnt}: say which, and the path in it", 3),
        ([str(snapfs.mnt / "committed/web@1/rootfs/etc/conf")], '"web@1" is committed', 3),
    ):
        assert said in snapfs("versions", *words, status=status)
    assert "KEY|PATH is missing" in snapfs("versions", status=2)


def test_names_that_are_not_utf_8(snapfs: Command, web: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n*")
    (web / name).write_text("1\n")
    keep(snapfs, "one")
    (web / name).write_text("2\n")
    assert versions(snapfs, "web", name) == [("1", "added", "web@1"), ("now", "changed", "")]
    assert json.loads(snapfs("versions", "--json", "web", name))[0]["checkpoints"] == [1]
    assert json.loads(snapfs("versions", "--json", "web", name))[0]["path"] == f"/{name}"
    snapfs("restore", "web", name)
    assert (web / name).read_text() == "1\n"
