"""snapfs apply: what changed comes home, all of it or nothing, and goes again."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from snapfs.applying.plan import STAGING
from tests.applying import Workspace, differing, expected, fill, looked, work_on
from tests.command import Command, OnATerminal, run
from tests.daemon import Daemon
from tests.home import Home, home_of
from tests.syscalls import EVERY
from tests.users import ALICE, alice

pytestmark = pytest.mark.mounts


MAKING = ["file", "file", "dir", "link", "hard", "fifo", "device", "socket"]
CHANGING = ["write", "append", "chmod", "chown", "touch", "xattr", "rm", "rm", "mv", "open"]
NAMES = [b"a", b"b", b"c.d", b"c", b"\xff\xfe", b"new\nline", "é".encode(), b"%2F", b"back\\slash"]


def change(random: Random, top: Path, times: int, *, make_only: bool = False) -> None:
    """Do so many things to what is in ``top``, at random."""
    base = os.fsencode(top)
    for _ in range(times):
        directories = [directory for directory, _, _ in os.walk(base)]
        everything = [os.path.join(directory, name) for directory, names, files in os.walk(base) for name in names + files]
        new = os.path.join(random.choice(directories), random.choice(NAMES))
        old = random.choice(everything) if everything else new
        kind = random.choice(MAKING if make_only or random.random() < 0.5 else CHANGING)
        is_file = os.path.isfile(old) and not os.path.islink(old)
        with suppress(FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if kind == "file":
                fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, random.choice([0o600, 0o644, 0o755, 0o4755]))
                os.write(fd, random.randbytes(random.choice([0, 5, 5000])))
                os.close(fd)
            elif kind == "dir":
                os.mkdir(new, random.choice([0o755, 0o700, 0o2775]))
            elif kind == "link":
                os.symlink(random.choice([b"a", b"/nowhere", b"../c"]), new)
            elif kind == "hard" and not os.path.isdir(old):
                os.link(old, new, follow_symlinks=False)
            elif kind == "fifo":
                os.mkfifo(new, 0o640)
            elif kind == "device":
                os.mknod(new, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            elif kind == "socket":
                os.mknod(new, stat.S_IFSOCK | 0o600)
            elif kind == "write" and is_file:
                Path(os.fsdecode(old)).write_bytes(random.randbytes(7))
            elif kind == "append" and is_file:
                with open(old, "ab") as file:
                    file.write(b"more")
            elif kind == "open" and is_file:
                os.close(os.open(old, os.O_RDWR))
            elif kind == "chmod" and not os.path.islink(old):
                os.chmod(old, random.choice([0o600, 0o750, 0o755]))
            elif kind == "chown":
                os.chown(old, random.choice([0, 1001]), random.choice([0, 2000]), follow_symlinks=False)
            elif kind == "touch" and not os.path.isdir(old):
                os.utime(old, ns=(1, random.randrange(10**18)), follow_symlinks=False)
            elif kind == "xattr" and (is_file or (os.path.isdir(old) and not os.path.islink(old))):
                os.setxattr(old, "user.k", random.randbytes(3))
                os.setxattr(old, "trusted.k", random.randbytes(3))
            elif kind == "rm":
                if os.path.isdir(old) and not os.path.islink(old):
                    shutil.rmtree(old)
                else:
                    os.unlink(old)
            elif kind == "mv" and not os.path.lexists(new) and not new.startswith(old + b"/"):
                subprocess.run([b"mv", b"-nT", b"--", old, new], check=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("seed", range(12 if EVERY == 1 else 4))
def test_random_trees_come_home_and_go_again(snapfs: Command, tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    home = Workspace(snapfs, tmp_path / "home", lambda path: change(random, path, 40, make_only=True))
    before = looked(home.path)
    assert set(differing(before, looked(home.work))) <= {"."}, "the base is a copy"
    change(random, home.work, 25)
    wanted = expected(before, looked(home.work))
    said = home.apply("w")
    after = looked(home.path)
    assert not differing(after, wanted), said
    assert "nothing to do" in home.apply("w")
    change(random, home.work, 15)
    wanted = expected(after, looked(home.work))
    said = home.apply("w")
    again = looked(home.path)
    assert not differing(again, wanted), said
    home.apply("--undo")
    assert not differing(looked(home.path), after)
    home.apply("--undo")
    assert not differing(looked(home.path), before)
    home.apply("--undo", "w-undo-4")
    assert not differing(looked(home.path), after), "what was undone comes back"


# -- conflicts


@pytest.fixture
def home(snapfs: Command, tmp_path: Path) -> Workspace:
    """With some of everything changed in the workspace."""
    made = Workspace(snapfs, tmp_path / "home", fill)
    work_on(made.work)
    return made


def test_the_plan_comes_first_with_what_goes_on_top(home: Workspace) -> None:
    before = looked(home.path)
    said = home.apply("w", "--dry-run")
    assert said.splitlines()[1:5] == [
        "C /becomes  (1 in it, a directory that is replaced)",
        "D /gone",
        "D /old  (2 in it)",
        "C /file",
    ]
    assert "A /new  (3 in it)" in said
    assert "2 deleted, 1 added, 4 changed" in said
    assert looked(home.path) == before
    told = json.loads(home.apply("w", "-n", "--json"))
    assert (told["applied"], told["undo"], told["conflicts"]) == (False, None, [])
    assert [(step["change"], step["path"]) for step in told["steps"]][:3] == [("C", "/becomes"), ("D", "/gone"), ("D", "/old")]
    told = json.loads(home.apply("w", "--json"))
    assert (told["applied"], told["undo"]) == (True, "w-undo-1")
    assert not differing(looked(home.path), expected(before, looked(home.work)))


def test_progress_is_told(home: Workspace) -> None:
    shown = OnATerminal("apply", "--at", str(home.snapfs.mnt), "w")
    said = shown.said()
    assert re.search(r"\rcomparing: 0 files, ", said), said
    assert re.search(r"\r\[\.{20}\] 1/\d+ getting what comes ready", said), said
    assert "\rdone; " in said, "it is wiped out at the end"
    assert shown.process.returncode == 0


def test_a_terminal_shows_its_own_colours_and_obeys_no_name(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    (home.work / "fresh").touch()
    (home.work / "\33[2J").touch()
    said = OnATerminal("apply", "--at", str(home.snapfs.mnt), "--dry-run", "w").said()
    assert "\33[32mA /fresh\33[0m" in said
    assert "\33[2J" not in said
    assert "%1B" not in said


def test_a_million_deletions_would_all_be_told(home: Workspace) -> None:
    for nth in range(150):
        (home.work / f"n{nth}").write_text("")
    said = home.apply("w", "-n")
    assert "D /gone" in said
    assert "more that are added or changed" in said


def put(path: Path) -> None:
    path.write_text("in the way")


def put_new(path: Path) -> None:
    (path / "new/deep").mkdir(parents=True)
    put(path / "new/deep/er")


def put_file(path: Path) -> None:
    shutil.rmtree(path / "private")
    put(path / "private")


def put_link(path: Path) -> None:
    shutil.rmtree(path / "private")
    (path / "private").symlink_to("/etc")


CONFLICTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file was changed": (lambda path: (path / "file").write_text("TWO"), "/file was changed"),
    "its permissions": (lambda path: (path / "file").chmod(0o600), "/file was changed"),
    "a file that goes": (lambda path: (path / "gone").write_text("more"), "/gone was changed"),
    "something in a directory that goes": (lambda path: put(path / "old/sub/x"), "/old/sub/x was changed"),
    "something new in a directory that goes": (lambda path: put(path / "old/n"), "/old/n is new"),
    "what is new was made there, too": (put_new, "/new/deep/er is new"),
    "a directory's permissions": (lambda path: (path / "private").chmod(0o711), "/private has other permissions"),
    "a file where a directory stood": (put_file, "/private is of another kind"),
    "a link where a directory stood": (put_link, "/private is of another kind"),
    "a directory is gone": (lambda path: shutil.rmtree(path / "private"), "/private is gone"),
    "a file is gone": (lambda path: (path / "file").unlink(), "/file is gone"),
}


@pytest.mark.parametrize("what", CONFLICTS)
def test_a_conflict_and_nothing_is_touched(home: Workspace, what: str) -> None:
    do, said = CONFLICTS[what]
    base = looked(home.path)
    do(home.path)
    before = looked(home.path)
    told = home.apply("w", status=8)
    assert f"conflict: {said}\n" in told
    assert "nothing was touched" in told
    assert looked(home.path) == before
    assert STAGING not in os.listdir(home.path)
    assert home.snapfs.names() == ["base", "w"]
    done = run("apply", "w", "--force", SNAPFS=str(home.snapfs.mnt))
    assert done.returncode == 0
    assert f"conflict: {said}, and is replaced\n" in done.stderr
    after, wanted = looked(home.path), expected(base, looked(home.work))
    assert not differing(after, wanted)
    assert "nothing to do" in home.apply("w")
    home.apply("--undo")
    assert not differing(looked(home.path), before), "what was there is kept"


def test_what_is_the_same_is_no_conflict(home: Workspace) -> None:
    os.utime(home.path / "file", ns=(5, 5))
    (home.path / "gone").unlink()
    (home.path / "kept").write_text("my own")
    (home.path / "private/z").write_text("zz")
    before = looked(home.path)
    home.apply("w")
    assert (home.path / "kept").read_text() == "my own"
    assert (home.path / "file").read_text() == "two"
    home.apply("--undo")
    assert not differing(looked(home.path), before)


def test_owners_that_are_others_there_stay(home: Workspace) -> None:
    os.chown(home.path / "file", ALICE, ALICE)
    os.setxattr(home.path / "file", "user.b", b"2")
    home.apply("w")
    assert (home.path / "file").stat().st_uid == ALICE
    assert {each: os.getxattr(home.path / "file", each) for each in os.listxattr(home.path / "file")} == {
        "user.a": b"1",
        "user.b": b"2",
    }
    assert "nothing to do" in home.apply("w")
    os.chown(home.work / "file", 0, ALICE)
    home.apply("w")
    assert ((home.path / "file").stat().st_uid, (home.path / "file").stat().st_gid) == (ALICE, ALICE)


def test_applied_again_after_more_work(home: Workspace) -> None:
    """What an apply has put there is nobody's change; what somebody has made of that is."""
    before = looked(home.path)
    home.apply("w")
    first = looked(home.path)
    (home.work / "file").write_text("three")
    (home.work / "gone").write_text("back")
    (home.work / "old").mkdir()
    (home.work / "old/x").write_text("again")
    (home.work / "private").chmod(0o711)
    shutil.rmtree(home.work / "new")
    home.apply("w")
    second = looked(home.path)
    assert not differing(second, expected(first, looked(home.work)))
    written = (home.path / "file").stat().st_mtime_ns
    (home.work / "file").write_text("four")
    (home.path / "file").write_text("4")
    assert "conflict: /file was changed" in home.apply("w", status=8)
    (home.path / "file").write_text("three")
    os.utime(home.path / "file", ns=(0, written))
    assert "C /file" in home.apply("w", "-n")
    home.apply("--undo", "w")
    assert set(differing(looked(home.path), first)) <= {"."}
    home.apply("--undo", "w")
    assert set(differing(looked(home.path), before)) <= {"."}
    assert "there is no apply" in home.apply("--undo", "w", status=3)


def test_what_another_workspace_has_applied_is_a_conflict(home: Workspace) -> None:
    home.snapfs("prepare", "v", "--parent", "base")
    Path(os.readlink(home.snapfs.mnt / "active/v/rootfs"), "file").write_text("v's")
    home.apply("v", str(home.path))
    assert "conflict: /file was changed" in home.apply("w", status=8)


def test_a_read_only_target(home: Workspace) -> None:
    subprocess.run(["mount", "--bind", str(home.path), str(home.path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(home.path)], check=True)
        assert "Read-only file system: mount it so" in home.apply("w", status=6)
    finally:
        subprocess.run(["umount", str(home.path)], check=True)


def test_a_directory_that_was_made_there_too(home: Workspace) -> None:
    (home.path / "new/own").mkdir(parents=True)
    put(home.path / "new/mine")
    before = looked(home.path)
    home.apply("w")
    assert (home.path / "new/mine").read_text() == "in the way"
    assert (home.path / "new/deep/er").read_text() == "new"
    assert (home.path / "new/too").samefile(home.path / "new/deep/er")
    home.apply("--undo")
    assert not differing(looked(home.path), before)


def test_undo_sees_what_was_done_since(home: Workspace) -> None:
    home.apply("w")
    (home.path / "new/mine").write_text("mine")
    before = looked(home.path)
    assert "conflict: /new/mine is new" in home.apply("--undo", "w", status=8)
    assert looked(home.path) == before
    (home.path / "new/mine").unlink()
    home.apply("--undo", "w")
    assert "there is no apply" in home.apply("--undo", status=3)


def test_paths(home: Workspace) -> None:
    home.apply("w", str(home.path), "private", "/gone")
    assert (home.path / "private/z").read_text() == "zz"
    assert not (home.path / "gone").exists()
    assert (home.path / "file").read_text() == "one"
    home.apply("w", "--", "file")
    assert (home.path / "file").read_text() == "two"
    assert "give that" in home.apply("w", "--", "new/deep/er", status=1)
    assert "there is no nothing" in home.apply("w", "--", "nothing", status=3)
    home.apply("--undo")
    home.apply("--undo")
    assert (home.path / "file").read_text() == "one"
    assert (home.path / "gone").exists()


def test_a_workspace_with_checkpoints_and_what_has_no_parent(home: Workspace, tmp_path: Path) -> None:
    before = looked(home.path)
    home.snapfs("checkpoint", "w")
    (home.work / "later").write_text("later")
    home.snapfs("checkpoint", "w")
    home.snapfs("fork", "w", "f")
    (home.work / "last").write_text("last")
    home.apply("w")
    assert not differing(looked(home.path), expected(before, looked(home.work)))
    home.apply("--undo")
    home.apply("f")
    assert (home.path / "later").exists()
    assert not (home.path / "last").exists()
    home.apply("--undo")
    home.apply("w@1")
    assert not (home.path / "later").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    home.apply("base", str(empty))
    assert set(differing(looked(empty), before)) <= {"."}
    home.apply("--undo")
    assert os.listdir(empty) == []


# -- what can't be done, in a sentence


def test_where_nothing_can_be_applied(home: Workspace, module_daemon: Daemon, tmp_path: Path) -> None:
    before = looked(home.path)
    (tmp_path / "link").symlink_to(home.path)
    refused = {
        str(home.snapfs.mnt / "active"): "is in the tree",
        str(module_daemon.root): "in the data of the tree",
        str(home.work): "in the data of the tree",
        str(tmp_path / "nothing"): "make it first (mkdir",
        str(home.path / "file"): "it is no directory",
        str(tmp_path / "link"): f"name {home.path}",
    }
    for target, sentence in refused.items():
        assert sentence in home.apply("w", target, status=2 if " the " in sentence else 1), target
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", str(module_daemon.root), str(bound)], check=True)
    try:
        assert "in the data of the tree" in home.apply("w", f"{bound}/snapshots", status=2), "by whatever path"
    finally:
        subprocess.run(["umount", str(bound)], check=True)
    home.snapfs("view", "v", "--parent", "base")
    assert "is a view" in home.apply("v", status=3)
    home.snapfs("prepare", "alone")
    assert "has no label snapfs.source" in home.apply("alone", status=1)
    assert "does not exist" in home.apply("nobody", status=3)
    assert "KEY is missing" in home.apply(status=2)
    assert "there is no apply that could be undone" in home.apply("--undo", status=3)
    assert looked(home.path) == before


@pytest.mark.parametrize("where", ["private", "old/sub", "file", "gone"])
def test_something_is_mounted_there(home: Workspace, where: str) -> None:
    before = looked(home.path)
    place = home.path / where
    kind = ["-t", "tmpfs", "tmpfs"] if place.is_dir() else ["--bind", "/etc/hostname"]
    subprocess.run(["mount", *kind, str(place)], check=True)
    try:
        said = home.apply("w", status=1)
        assert f"cannot apply /{where}" in said
        assert "another file system is mounted there: unmount it" in said
        assert "nothing was changed" in said
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert looked(home.path) == before
    assert home.snapfs.names() == ["base", "w"]


@pytest.mark.parametrize("path", ["file", "gone", "private", "old/sub/x"])
def test_an_immutable_file(home: Workspace, path: str) -> None:
    """Which not even root can replace, delete, or delete with the directory in which it is."""
    before = looked(home.path)
    subprocess.run(["chattr", "+i", str(home.path / path)], check=True)
    try:
        said = home.apply("w", status=6)
        assert "lsattr shows whether it is immutable" in said
        assert "nothing was changed" in said
        assert set(differing(looked(home.path), before)) == set()
        assert home.snapfs.names() == ["base", "w"]
    finally:
        subprocess.run(["chattr", "-i", str(home.path / path)], check=True)
    home.apply("w")


def test_what_is_called_as_the_directory_of_an_apply(home: Workspace) -> None:
    (home.path / STAGING).write_text("mine")
    assert "move it away" in home.apply("w", status=1)
    (home.path / STAGING).unlink()
    (home.path / STAGING).mkdir()
    assert "lets other users in" in home.apply("w", status=1)
    os.chown(home.path / STAGING, ALICE, ALICE)
    assert "move it away" in home.apply("w", status=1)
    (home.path / STAGING).rmdir()
    (home.work / STAGING).mkdir()
    assert "remove it there" in home.apply("w", status=1)


def test_names_that_are_not_utf_8(snapfs: Command, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xe9%"
    home = Workspace(snapfs, Path(os.fsdecode(path)), lambda path: None)
    Path(os.fsdecode(os.fsencode(home.work) + b"/\xfe")).write_text("odd")
    snapfs("label", "w", "snapfs.source=somewhere")
    assert "is no path" in home.apply("w", status=1)
    snapfs("label", "w", f"snapfs.source={tmp_path}/%FF%E9%25")
    assert "A /\\0376" in home.apply("w")
    assert os.listdir(path) == [b"\xfe"]
    home.apply("--undo", "w")
    assert os.listdir(path) == []


# -- an ordinary user, with a daemon of her own


@pytest.fixture
def alices() -> Iterator[Home]:
    with home_of(alice) as home:
        home.daemon.start()
        yield home
        assert home.daemon.stop() == 0


def test_an_ordinary_user(everybodys_fuse: None, users: None, alices: Home) -> None:
    alices.sh(
        """mkdir -p p/d p/locked; echo 1 > p/d/f; echo 1 > p/locked/f; echo 1 > p/locked/g; ln p/d/f p/d/g; chmod 555 p/locked
        cp -a p before; mkdir tree/active/b; cp -a p/. tree/active/b/rootfs/; mv tree/active/b tree/committed/b
        mkdir tree/committed/b/active/w; echo "$PWD/p" > tree/active/w/labels/snapfs.source"""
    )
    alices.inside(
        "w",
        """chmod 755 locked; echo 2 > locked/f; rm locked/g; chmod 555 locked; mkdir new; echo 2 > new/f; chmod 555 new; rm -r d
        mkdir d; ln -s f d/link; mkfifo d/fifo""",
    )
    before = looked(alices.path / "p")
    assert "A /new" in alices.snapfs("apply", "w")
    after = looked(alices.path / "p")
    alices.sh("diff -r --no-dereference p/locked/ tree/active/w/rootfs/locked/; stat -c %a p/locked p/new > modes")
    assert (alices.path / "modes").read_text() == "555\n555\n"
    assert {path: each[0][1:3] for path, each in after.items()} == dict.fromkeys(after, (ALICE, ALICE))
    alices.snapfs("apply", "--undo")
    assert not differing(looked(alices.path / "p"), before)
    alices.snapfs("apply", "--undo", "w-undo-2")
    assert not differing(looked(alices.path / "p"), after)
    alices.snapfs("apply", "--undo", "w-undo-1")
    assert not differing(looked(alices.path / "p"), before)


def test_what_a_user_may_not_touch(everybodys_fuse: None, users: None, alices: Home) -> None:
    """Files of root's in her directory, readable or not, and a directory of root's."""
    alices.sh(
        """mkdir -p p/hers p/roots; echo 1 > p/hers/f; echo 1 > p/hers/secret; echo 1 > p/roots/f
        mkdir tree/active/b; cp -a p/. tree/active/b/rootfs/; mv tree/active/b tree/committed/b
        mkdir tree/committed/b/active/w; echo "$PWD/p" > tree/active/w/labels/snapfs.source"""
    )
    os.chown(alices.path / "p/roots", 0, 0)
    os.chown(alices.path / "p/hers/f", 0, 0)
    os.chown(alices.path / "p/hers/secret", 0, 0)
    (alices.path / "p/hers/secret").chmod(0o600)
    before = looked(alices.path / "p")
    alices.inside("w", "echo 2 > roots/f")
    assert "cannot apply /roots/f" in alices.snapfs("apply", "w", status=6)
    alices.inside("w", "echo 1 > roots/f; echo 2 > hers/f")
    assert "Operation not permitted" in alices.snapfs("apply", "w", "--", "hers/f", status=6), "she can't give it to root again"
    alices.inside("w", "rm hers/f hers/secret; chmod 600 roots/f")
    said = alices.snapfs("apply", "w", "--force", "--", "hers", status=6)
    assert "cannot apply /hers/secret" in said
    assert "nothing was changed" in said
    assert not differing(looked(alices.path / "p"), before)
    assert set(os.listdir(alices.path / "p")) == {"hers", "roots"}


# -- what others say, and what was not made here


def test_names_with_control_characters_can_be_typed_as_advised(home: Workspace) -> None:
    key = "w\x1b[2J\n"
    home.snapfs("fork", "w", key)
    home.snapfs("label", key, f"snapfs.source={home.path}", "snapfs.base=base")
    before = looked(home.path)
    said = home.apply(key).splitlines()[-1]
    advised = re.fullmatch("done; snapfs (apply --undo by-id/[0-9]+) undoes it", said)
    assert advised, said
    (number,) = re.findall("[0-9]+", advised[1])
    kept = os.path.basename(os.readlink(home.snapfs.mnt / "by-id" / number))
    assert advised[1] in home.apply(f"committed/{kept}", status=2)
    home.snapfs(*advised[1].split())
    assert not differing(looked(home.path), before)
    home.snapfs("prepare", f"{key}2")
    assert re.search("snapfs apply by-id/[0-9]+ DIRECTORY$", home.apply(f"{key}2", status=1))


def test_what_is_empty_means_nothing_else(home: Workspace) -> None:
    before = looked(home.path)
    for words in (["w", ""], ["w", str(home.path), ""]):
        assert "an argument is empty" in home.apply(*words, status=2)
    assert looked(home.path) == before


def test_who_has_it_locked_is_named(home: Workspace) -> None:
    """Whoever may read a directory can lock it."""
    held = os.open(home.path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert f"process {os.getpid()} has {home.path} locked" in home.apply("w", status=1)
    finally:
        os.close(held)


def test_the_directory_above_what_a_link_leads_to(home: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """link/.. is that directory for the kernel, and not the one that has the link."""
    (tmp_path / "here/other").mkdir(parents=True)
    (tmp_path / "here/link").symlink_to(home.path / "old")
    monkeypatch.chdir(tmp_path / "here")
    assert "cannot apply anything" in home.apply("w", "link/..", status=1)
    assert os.listdir("other") == []
    home.apply("w", "--", "new")
    assert (home.path / "new").is_dir()
    home.apply("w", "other/../../home", "gone")
    assert not (home.path / "gone").exists()


@pytest.mark.parametrize("options", [("-o", f"uid={ALICE}"), ("-o", f"gid={ALICE},umask=002")])
def test_what_others_could_have_written_is_not_followed(
    make_daemon: Callable[..., Daemon], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Where they may write the tree: neither its labels, nor an undo that they have made up."""
    snapfs = Command(make_daemon("-o", "allow_other", *options).start().mnt)
    home = Workspace(snapfs, tmp_path / "home", fill)
    work_on(home.work)
    before = looked(home.path)
    assert re.search('named by the label snapfs.source of "w", .*: snapfs apply w DIRECTORY$', home.apply("w", status=6))
    assert not differing(looked(home.path), before)
    home.apply("w", str(home.path))
    (tmp_path / "elsewhere").mkdir()
    snapfs("label", "w-undo-1", f"snapfs.source={tmp_path}/elsewhere")
    home.apply("--undo", "w")
    assert not differing(looked(home.path), before)
    assert os.listdir(tmp_path / "elsewhere") == []
    kept = Path(os.readlink(snapfs.mnt / "committed/w-undo-1/rootfs"))
    snapfs("prepare", "forged", "-l", "snapfs.undo=w", "-l", f"snapfs.source={home.path}")
    layer = Path(os.readlink(snapfs.mnt / "active/forged/rootfs"))
    subprocess.run(["cp", "-a", f"{kept}/.", str(layer)], check=True)
    os.chown(layer / "plan", ALICE, ALICE)
    snapfs("commit", "--no-sync", "forged", "forged")
    assert '"forged" was made by another user' in home.apply("--undo", "forged", status=6)


@pytest.mark.parametrize("about", ['{"undo": "w", "root": "ROOT", "token": null}', '{"undo": "w", "root": "ROOT"}', "[]"])
@pytest.mark.parametrize("journal", [None, '["about", {"undo": "w", "root": "ROOT", "token": null}]\n'])
def test_what_somebody_has_packed_is_no_apply_that_was_cut_off(
    home: Workspace, module_daemon: Daemon, about: str, journal: str | None
) -> None:
    """An archive may have a directory that is called as that of an apply, and a copy of a home directory has it, too."""
    home.snapfs("prepare", "other", "--parent", "base", "-l", f"snapfs.source={home.path}")
    (home.path / STAGING).mkdir(mode=0o700)
    for name, text in (("about", about), ("journal", journal)):
        if text is not None:
            (home.path / STAGING / name).write_text(text.replace("ROOT", str(module_daemon.root)))
    before = looked(home.path)
    assert "copied or unpacked here: move it away" in home.apply("other", status=1)
    assert looked(home.path) == before
    assert home.snapfs.names() == ["base", "other", "w"]
