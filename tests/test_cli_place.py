"""Which tree the command works on, and which snapshot a path names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import SNAPFS, OnATerminal, run
from tests.daemon import Daemon

Make = Callable[..., Daemon]


def test_which_tree(make_daemon: Make, tmp_path: Path) -> None:
    assert run("ls").returncode == 7
    assert "no snapfs tree is mounted" in run("ls").stderr
    one = make_daemon(root=tmp_path / "r 1", mnt=tmp_path / "m 1").start()
    (one.mnt / "active/one").mkdir()
    assert run("ls", "-q").stdout == "one\n"
    two = make_daemon(root=tmp_path / "r2", mnt=tmp_path / "m2").start()
    several = run("ls")
    assert several.returncode == 7
    assert "--at" in several.stderr
    assert str(one.mnt) in several.stderr
    assert run("ls", "-q", cwd=one.mnt / "active").stdout == "one\n"
    assert run("ls", "-q", "--at", str(one.mnt / "active/one")).stdout == "one\n"
    assert run("ls", "-q", SNAPFS=str(two.mnt)).stdout == ""
    nowhere = run("ls", "--at", "/proc")
    assert nowhere.returncode == 7
    assert nowhere.stderr == f"snapfs: --at: no snapfs tree is mounted on /proc: give {one.mnt}, {two.mnt}\n"
    two.stop(signal.SIGKILL)
    gone = run("ls", "--at", str(two.mnt))
    assert gone.returncode == 7
    assert "is gone" in gone.stderr


def name_of(shown: str) -> str:
    name: str = json.loads(shown)[0]["name"]
    return name


@pytest.fixture
def tree(daemon: Daemon, tmp_path: Path) -> Path:
    """A tree with some snapshots, and a link to where it is mounted."""
    for words in ("prepare x", "commit x base", "prepare x -p base", "commit x w/1", "prepare web -p base"):
        assert run(*words.split()).returncode == 0
    (tmp_path / "link").symlink_to(daemon.mnt)
    return daemon.mnt


@pytest.mark.parametrize(
    ("path", "cwd", "name"),
    [
        ("committed/base", "/", "base"),
        ("committed/base/", "/", "base"),
        ("active/web", "/", "web"),
        ("committed/w%2F1", "/", "w/1"),
        ("committed/base/active/web", "/", "web"),
        ("committed/base/committed/w%2F1", "/", "w/1"),
        ("by-id/1", "/", "base"),
        ("{tree}/active/web", "/", "web"),
        ("{tree}/committed/base/active/web/", "/", "web"),
        ("{tree}/../link/active/web", "/", "web"),
        ("./web", "{tree}/active", "web"),
        ("web/", "{tree}/active", "web"),
        ("../active/web", "{tree}/committed", "web"),
        ("active/web", "{tree}", "web"),
    ],
)
def test_a_path_is_the_snapshot_that_is_there(tree: Path, path: str, cwd: str, name: str) -> None:
    done = run("show", "--json", path.format(tree=tree), cwd=cwd.format(tree=tree))
    assert done.returncode == 0, done.stderr
    assert name_of(done.stdout) == name


def test_no_path_of_a_snapshot(tree: Path) -> None:
    for word in (
        "active/base",
        "committed/web",
        "active/no",
        "active/web/labels",
        "active",
        "/",
        "/active/web",
        f"{tree}/active/{'n' * 300}",
    ):
        done = run("show", word)
        assert done.returncode in (1, 3), word
        assert "Traceback" not in done.stderr
        assert "does not exist in" in done.stderr or "at most 255 fit" in done.stderr
    done = run("show", "active/no")
    assert done.stderr == f'snapfs: snapshot "active/no" does not exist in {tree}; snapfs ls lists all\n'
    assert os.listdir(tree.parent / "root/rootfs") == [], "nothing was mounted by looking"


def test_a_key_that_looks_like_a_path_is_meant_first(tree: Path) -> None:
    (tree / "active/committed%2Fbase").mkdir()
    assert name_of(run("show", "--json", "committed/base").stdout) == "committed/base"
    assert run("rm", "committed/base").returncode == 0
    assert name_of(run("show", "--json", "committed/base").stdout) == "base"


def test_each_verb_takes_a_path(tree: Path, tmp_path: Path) -> None:
    (target := tmp_path / "t").mkdir()
    for words in (
        "label active/web k=v",
        "diff active/web",
        "usage active/web committed/base",
        "tree committed/base",
        f"mount active/web {target}",
        "umount active/web",
        "checkpoint active/web -m one",
        "checkpoint --list active/web",
        "rollback active/web",
        "fork active/web active/other",
        "prepare active/more --parent committed/base",
        f"view {tree}/view/peek -p {tree}/committed/base",
        f"commit active/more {tree}/committed/more%2F1 --parent committed/base",
        "rm active/other view/peek",
        "rm -r committed/more%2F1",
    ):
        done = run(*words.split())
        assert (done.returncode, done.stderr) == (0, ""), words
    assert sorted(os.listdir(tree / "active")) == ["web"]
    assert sorted(os.listdir(tree / "committed")) == ["base", "w%2F1", "web@1", "web@2"]
    assert "write " in run("prepare", "active/a%2fb").stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rm web", True),
        ("label web k=v", True),
        ("checkpoint web", True),
        ("ls", False),
        ("label web", False),
        ("show web", False),
    ],
)
def test_somebody_at_a_terminal_is_told_which_tree_is_changed(
    tree: Path, words: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"snapfs: working in {tree}, the only tree that is mounted\r\n"
    assert (line in OnATerminal(*words.split()).said()) is told
    (tree / "active/web").mkdir(exist_ok=True)
    assert "snapfs: working" not in OnATerminal(*words.split(), "--at", str(tree)).said()
    (tree / "active/web").mkdir(exist_ok=True)
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert "snapfs: working" not in OnATerminal(*words.split()).said()


OF_ACTIVE = """\
show web; show --path web; usage web; diff web; label web; label web a=b; label web --delete team; commit web v1; rm web
checkpoint web; checkpoint --copy web; rollback web; rollback --keep web; fork web other; mount web TARGET; umount web
run web -- true; show active/web; tree active/web"""

HIDDEN = {
    "active": f"{OF_ACTIVE}; prepare new",
    "active/web": OF_ACTIVE,
    "active/web/info.json": "show web; mount web TARGET; umount web; label web",
    "active/web/labels": "label web a=b; label web --delete team; rollback --keep web",
    "committed": "squash base flat; prepare new -p base; commit web v1; show base; rm base; usage",
    "committed/base": "squash base flat; show base; usage; prepare new -p base; fork base new; diff base; rm base",
    "committed/base/active": "show base; prepare new -p base; fork base new",
    ".snapfs": """\
ls; tree; usage; rm -r web; checkpoint --list web; events; prune --kind active
mount web TARGET; umount web; run web -- true""",
    ".snapfs/snapshots": "ls; tree; usage; rm -r web; checkpoint --list web; prune --kind active",
    ".snapfs/options.json": "mount web TARGET; umount web; run web -- true",
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_is_mounted_inside_a_tree_does_not_answer(tree: Path, hidden: str, tmp_path: Path) -> None:
    """It has copies of all that it hides, so that it could; nor is anything made, changed or removed there."""
    (copy := tmp_path / "copy").mkdir()
    (target := tmp_path / "target").mkdir()
    assert run("label", "web", "team=blue").returncode == run("checkpoint", "web").returncode == 0
    subprocess.run(["mount", "-t", "tmpfs", "none", copy], check=True)
    try:
        place = tree / hidden
        there = copy / "it"
        if place.is_dir():
            there.mkdir()
            for directory, names, files in os.walk(place):
                inside = there / Path(directory).relative_to(place)
                for name in names:
                    if not (Path(directory) / name).is_symlink():
                        (inside / name).mkdir()
                for name in files:
                    if name not in ("events", "error_log"):
                        (inside / name).write_bytes((Path(directory) / name).read_bytes())
        else:
            there.write_bytes(place.read_bytes())
        before = sorted(map(str, there.rglob("*")))
        shown = {each: each.read_bytes() for each in there.rglob("*") if each.is_file()}
        subprocess.run(["mount", "--bind", there, place], check=True)
        try:
            for words in HIDDEN[hidden].replace("TARGET", str(target)).replace("\n", "; ").split("; "):
                done = run(*words.split())
                assert done.stdout == "", words
                assert done.stderr == (
                    f"snapfs: something else (tmpfs) is mounted over {place}, in the tree: unmount that first: umount {place}\n"
                ), words
                assert done.returncode == 5, words
            assert os.listdir(target) == []
        finally:
            subprocess.run(["umount", place], check=True)
        assert before == sorted(map(str, there.rglob("*")))
        assert shown == {each: each.read_bytes() for each in there.rglob("*") if each.is_file()}
    finally:
        subprocess.run(["umount", copy], check=True)
    assert sorted(os.listdir(tree / "active")) == ["web"]
    assert sorted(os.listdir(tree / "committed")) == ["base", "w%2F1", "web@1"]
    for words in ("label web a=b", "label web --delete team", "show web", "fork base new", "commit web v1"):
        assert run(*words.split()).returncode == 0


def test_another_directory_of_the_tree_in_the_place_of_a_snapshot(tree: Path) -> None:
    """A bind of the same file system, with the same device."""
    assert run("prepare", "other").returncode == 0
    subprocess.run(["mount", "--bind", tree / "active/other", tree / "active/web"], check=True)
    try:
        for words in ("show web", "label web a=b", "rm web", "mount web /mnt"):
            done = run(*words.split())
            assert done.returncode == 5, words
            assert "something else (fuse.snapfs of the user root) is mounted over" in done.stderr
        assert run("show", "other").returncode == run("ls").returncode == 0
    finally:
        subprocess.run(["umount", tree / "active/web"], check=True)
    assert json.loads((tree / "active/other/info.json").read_text())["labels"] == {}


@pytest.mark.parametrize(
    "words", [("mount", "a", "b"), ("check", "x"), ("backup", "x", "y"), ("serve", "x", "y"), ("ls", "--at", "x")]
)
def test_in_a_directory_that_was_removed(tmp_path: Path, words: tuple[str, ...]) -> None:
    (gone := tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$0" && exec "$@"', gone, *SNAPFS, *words],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "snapfs: the directory that this runs in was removed: cd to another one first\n"
