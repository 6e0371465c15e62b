"""Inside a parent its children are links: moving one does what moving the child itself does, and removing one is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.processes import until
from tests.refusals import failing, refused
from tests.tree import committed, info, listing, remove_all, shell


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    return module_daemon


@pytest.fixture(autouse=True)
def base(daemon: Daemon) -> Iterator[Path]:
    """The committed snapshot "base" with an active child, "child", and a view, "peek"."""
    parent = committed(daemon.mnt, "base")
    os.mkdir(parent / "active/child")
    os.mkdir(parent / "view/peek")
    yield parent
    remove_all(daemon.mnt)


def shown(mnt: Path) -> dict[str, list[str]]:
    """What is listed, at the root and in "base", and that each name can be looked up where it is, and nowhere else."""
    found = {}
    for above in (mnt, mnt / "committed/base"):
        for kind in ("active", "view", "committed"):
            names = sorted(os.listdir(above / kind))
            assert all((above / kind / name / "info.json").read_text() for name in names)
            found[f"{above.name}/{kind}" if above != mnt else kind] = names
    return found


@pytest.mark.parametrize("door", ["committed", "committed/base/committed"])
@pytest.mark.parametrize("source", ["active/child", "committed/base/active/child"])
@pytest.mark.parametrize("name", ["child", "v2"])
def test_commit(daemon: Daemon, source: str, door: str, name: str) -> None:
    mnt = daemon.mnt
    number = info(mnt / "active/child")["id"]
    for path in ("active/child", "committed/base/active/child", f"{door}/{name}"):
        os.path.lexists(mnt / path)  # the kernel has heard of all of them
    os.rename(mnt / source, mnt / door / name)
    gone = [path for path in ("active/child", "committed/base/active/child") if f"{door}/{name}" != path]
    until(lambda: not any(os.path.lexists(mnt / path) for path in gone), "the kernel has forgotten the old names")
    assert shown(mnt) == {
        "active": [],
        "view": ["peek"],
        "committed": sorted(["base", name]),
        "base/active": [],
        "base/view": ["peek"],
        "base/committed": [name],
    }
    assert info(mnt / "committed" / name)["id"] == number
    assert os.readlink(mnt / "committed/base/committed" / name) == f"../../../committed/{name}"
    if name != "child":
        os.mkdir(mnt / "committed/base/active/child")  # the key is free again


@pytest.mark.parametrize("target", ["committed/base/{kind}/other", "{kind}/other"])
@pytest.mark.parametrize(("kind", "name"), [("active", "child"), ("view", "peek")])
def test_rename(daemon: Daemon, kind: str, name: str, target: str) -> None:
    mnt = daemon.mnt
    source = mnt / f"committed/base/{kind}/{name}"
    inside = os.open(mnt / kind / name, os.O_RDONLY)  # somebody stands in it
    try:
        os.rename(source, mnt / target.format(kind=kind))
        assert not os.path.lexists(source)
        until(lambda: not os.path.lexists(mnt / kind / name), "the kernel has forgotten the old name")
        assert info(mnt / kind / "other")["name"] == "other"
        assert os.readlink(mnt / f"committed/base/{kind}/other") == f"../../../{kind}/other"
        assert os.listdir(mnt / kind) == os.listdir(mnt / f"committed/base/{kind}") == ["other"]
        assert "info.json" in os.listdir(inside)
    finally:
        os.close(inside)


def test_back_and_forth(daemon: Daemon) -> None:
    """By either path in turn, which the kernel's cache has to follow."""
    mnt = daemon.mnt
    doors = ["active", "committed/base/active"]
    ways = [(doors[0], doors[0]), (doors[1], doors[1]), (doors[1], doors[0])]
    names = ["child", "second"]

    def forgotten(name: str) -> bool:
        return not any(os.path.lexists(mnt / door / name) for door in doors)

    for turn in range(60):
        old, new = names[turn % 2], names[(turn + 1) % 2]
        source, target = ways[turn % 3]
        os.rename(mnt / source / old, mnt / target / new)
        until(partial(forgotten, old), "the old name is forgotten")
        for door in doors:
            assert os.listdir(mnt / door) == [new]
            assert info(mnt / door / new)["name"] == new


def test_onto_what_is_there(daemon: Daemon) -> None:
    link = daemon.mnt / "committed/base/active/child"
    for name in ("committed/peek", "active/peek", "committed/base/active/peek"):
        with refused(daemon, errno.EEXIST, "rename", f"committed/base/active/child {name}", "already exists"):
            os.rename(link, daemon.mnt / name)
    with failing(errno.EISDIR):  # the kernel says that by itself
        os.rename(link, committed(daemon.mnt, "other"))


@pytest.mark.parametrize(("kind", "name"), [("active", "child"), ("view", "peek")])
def test_removing_a_link_is_refused(daemon: Daemon, kind: str, name: str) -> None:
    """In words that name the child and where it is removed."""
    mnt, link = daemon.mnt, f"committed/base/{kind}/{name}"
    before = listing(mnt)
    for command in (f"rm {link}", f"rm -f {link}", f"rm -rf {link}", f"busybox rm {link}"):
        assert shell(mnt, command).returncode == 1
        line = daemon.error_log()[-1]
        assert f"EPERM unlink {link}: {link} is a link to a snapshot: to remove that, rmdir {kind}/{name}" in line
    with failing(errno.ENOTDIR):  # the kernel says that by itself
        os.rmdir(mnt / link)
    assert listing(mnt) == before


@pytest.mark.parametrize("command", ["rm -r {}", "rm -rf {}", "busybox rm -rf {}", "find {} -delete"])
def test_deleting_the_parent_touches_nothing(daemon: Daemon, command: str) -> None:
    mnt = daemon.mnt
    (mnt / "committed/base/labels/team").write_text("blue")
    before = listing(mnt)
    assert shell(mnt, command.format("committed/base")).returncode != 0
    assert listing(mnt) == before
