"""Ids that root has lent to alice in /etc/subuid and /etc/subgid: ``snapfs run --subids`` has them, and the daemon does what is
to be done to the files of those ids."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from snapfs.kernel import servers, subids
from snapfs.kernel.subids import Range
from tests.command import SNAPFS
from tests.home import Home, home_of, with_workspace
from tests.processes import until
from tests.users import ALICE, BOB, alice, bind, bob

FIRST = 300000


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Alice has ids from two lines, one of which has her number; and Bob none."""
    with ExitStack() as stack:
        for name in ("subuid", "subgid"):
            file = tmp_path_factory.mktemp("etc") / name
            file.write_text(
                f"alice:{FIRST}:65536\nroot:100000:65536\nnonsense\nalice:x:y\nalice:5:{'9' * 5000}\n{ALICE}:{ALICE - 1}:3\n"
            )
            file.chmod(0o644)
            bind(stack, file, f"/etc/{name}")
        yield


pytestmark = [pytest.mark.mounts, pytest.mark.usefixtures("everybodys_fuse", "users", "lent")]


@pytest.fixture
def home() -> Iterator[Home]:
    with home_of(alice) as found:
        found.daemon.start()
        yield with_workspace(found)


def subids_of(home: Home) -> object:
    return home.options()["subids"]


def test_who_installs_packages_has_all_ids(home: Home) -> None:
    """Number 0 is hers, and from 1 on they are those of the lines; all that needs a capability for files of several owners."""
    script = """
        test "$(id -u) $(id -g)" = "0 0"
        mkdir private; touch private/file made; chown 0:0 made
        chown 3:34 private/file; chown 33:33 private; chmod 700 private
        stat -c "%u:%g" private private/file made
    """
    assert home.inside("w", script, "--subids") == "33:33\n3:34\n0:0\n"
    rootfs = Path(home.rootfs("w"))
    owners = [
        (os.stat(path).st_uid, os.stat(path).st_gid) for path in (rootfs / "private/file", rootfs / "private", rootfs / "made")
    ]
    # 1 and 2 are the numbers before and after hers
    assert owners == [(FIRST, FIRST + 31), (FIRST + 30, FIRST + 30), (ALICE, ALICE)]
    assert subids_of(home) == {"on": True, "why": "newuidmap and newgidmap have mapped them"}
    assert home.inside("w", "id -u; id -un; cat private/file", status=1).startswith(
        f"{ALICE}\nalice\ncat: private/file: Permission"
    )
    assert home.inside("w", "id -u; chown 1 made", "--root", status=1).startswith("0\nchown: changing ownership of 'made'")
    assert home.inside("w", "id -u; ls private", "--root", "--subids") == "0\nfile\n"


def test_an_image_has_the_owners_that_are_seen_there(home: Home) -> None:
    """And what is imported of it is the same layer."""
    home.inside("w", "touch private made; chown 3:34 private; chown 0:65000 made", "--subids")
    home.snapfs("commit", "w", "v1")
    home.sh("cp tree/committed/v1/layer.tar .")
    owners = home.sh("tar --numeric-owner -tvf layer.tar | awk '{print $2, $6}'").splitlines()
    assert {"3/34 private", "0/65000 made"} <= set(owners)
    (there,) = home.snapfs("import", "layer.tar").split()
    for name in ("private", "made"):
        ours, theirs = (home.sh(f"stat -c %u:%g {each}/rootfs/{name}") for each in ("tree/committed/v1", there))
        assert ours == theirs
    home.sh(f"cmp layer.tar {there}/layer.tar")


def test_from_within_a_workspace_they_can_not_be_had(home: Home) -> None:
    """A program that stands in one has no right over them, so it is told."""
    command = f"{shlex.join(SNAPFS)} run --subids w -- id"
    assert home.inside("w", command, status=6) == 'snapfs: cannot have the ids of /etc/subuid in there: leave "w" first\n'


@pytest.mark.parametrize("how", [(), ("--root",), ("--root", "--subids")], ids=str)
def test_her_own_tree_is_hers_whatever_her_number_is_in_there(home: Home, how: tuple[str, ...]) -> None:
    """And another's isn't, though all may enter it, and is not taken for one by anything that mounts or runs."""
    snapfs = shlex.join(SNAPFS)
    with home_of(bob, BOB) as other, ExitStack() as stack:
        (conf := other.path / "fuse.conf").write_text("user_allow_other\n")
        bind(stack, conf, "/etc/fuse.conf")
        other.daemon = other.another("-o", "allow_other")
        other.daemon.start()
        other.sh("mkdir tree/active/theirs")
        script = f"unset SNAPFS; {snapfs} ls -q; {snapfs} run w -- pwd; {snapfs} run --at {other.mnt} theirs -- true"
        told = f"snapfs: working in {home.mnt}, the only tree of yours or root's that is mounted (--at names another)"
        assert home.inside("w", script, *how, status=6).splitlines() == [
            "b",
            "w",
            told,
            home.rootfs("w").removeprefix(str(home.options()["window"])),
            f"snapfs: {other.mnt} is a tree of another user's, and what it says is up to them: nothing is run in by that",
        ]


HOST = [(0, 0, 4294967295)]
HERS = [(0, ALICE, 1), (1, FIRST, 65536)]


@pytest.mark.parametrize(
    ("uid", "own", "ids", "ours"),
    [
        (ALICE, ALICE, HOST, True),
        (BOB, ALICE, HOST, False),
        (ALICE, ALICE, [(ALICE, ALICE, 1)], True),
        (BOB, ALICE, [(ALICE, ALICE, 1)], False),
        (ALICE, 0, [(0, ALICE, 1)], True),
        (BOB, 0, [(0, ALICE, 1)], False),
        (ALICE, 0, HERS, False),  # or it is that of number 1001 in there, who is another
        (FIRST, 0, HERS, False),
        (BOB, BOB, [(BOB, ALICE, 1)], False),  # or it is bob's, outside
        (ALICE, BOB, [(BOB, ALICE, 1)], True),
        (ALICE, 65534, [(0, ALICE, 1)], False),
        (65534, 65534, [(0, ALICE, 1)], False),
        (-1, 65534, [(0, ALICE, 1)], False),
    ],
)
def test_whom_a_number_can_mean(uid: int, own: int, ids: list[tuple[int, int, int]], ours: bool) -> None:
    assert servers.is_number_ours(uid, own, ids) is ours


def test_who_maps_them_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are not there, and nobody says that they are."""
    monkeypatch.setattr(subids, "_write_tables", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with subids.mapper("", "") as mapper:
        assert mapper.map() == "the process that maps them was killed"


def test_capabilities_and_groups(home: Home) -> None:
    """What package managers do besides, and tar: groups of a process, programs with capabilities."""
    script = """
import os, struct
os.setgroups([5, 6]); print(os.getgroups())
open("tool", "w").close()
os.setxattr("tool", "security.capability", struct.pack("<IIIII", 0x02000000, 1 << 13, 0, 0, 0))
os.setgid(33); os.setuid(33); print(os.getuid(), os.getgid())
"""
    assert home.snapfs("run", "--subids", "w", "--", "python3", "-c", script) == "[5, 6]\n33 33\n"
    assert "tool" in home.read("active/w/changes")


def test_a_check_of_what_is_closed_to_her(home: Home) -> None:
    """The check runs in no namespace of its own: it can't count such a layer, which is no damage."""
    home.inside("w", "mkdir -m 700 theirs; echo x > theirs/file; chown -R 5 theirs", "--subids")
    home.sh("mv tree/active/w tree/committed/v; cat tree/committed/v/usage.json")
    home.daemon.stop()
    said = home.snapfs("check", home.root)
    assert 'note: committed "v": some of it is closed to this user' in said
    assert f"{home.root}: nothing is wrong" in said
    (layer,) = home.root.glob("snapshots/*/fs/theirs")
    layer.parent.parent.chmod(0)
    said = home.snapfs("check", home.root, status=1)
    assert f'committed "v": its directory {layer.parent} can\'t be looked at: Permission denied' in said
    assert "missing" not in said
    layer.parent.parent.chmod(0o700)


def test_the_daemon_does_what_it_does_to_files_of_others(home: Home) -> None:
    private = "mkdir -p d/e; touch d/e/f; chown -R 7:7 d; chmod 700 d d/e; chmod 600 d/e/f"
    home.inside("w", private, "--subids")
    assert home.read("active/w/changes") == "A /d\nA /d/e\nA /d/e/f\n"
    home.sh("mv tree/active/w tree/committed/c; mkdir tree/committed/c/active/x")
    assert home.inside("x", "stat -c %u:%g d/e/f; rm d/e/f; touch d/e/g; chown 8 d/e/g", "--subids") == "7:7\n"
    assert home.read("active/x/changes") == "D /d/e/f\nA /d/e/g\n"
    home.sh("rmdir tree/active/x tree/committed/c; echo 1 > tree/.snapfs/cleanup")
    assert os.listdir(home.root / "trash") == []
    assert home.daemon.stop() == 0
    home.daemon = home.another().start()
    assert home.read("committed/b/changes") == "A /file\nA /sub\n"


def test_without_them_all_else_works() -> None:
    """Bob has no line, so he is alone in there; what he may do about that is said where he asks for more."""
    with home_of(bob, BOB) as home:
        home.daemon.start()
        with_workspace(home)
        to_do = "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 bob"
        why = f"no line of /etc/subuid lends ids to bob: root can add one: {to_do}"
        assert subids_of(home) == {"on": False, "why": why}
        assert home.inside("w", "id -u", "--root") == "0\n"
        said = home.inside("w", "true", "--subids", status=1)
        assert said == f"snapfs: cannot have the ids of /etc/subuid in there: {why}; then start the daemon anew\n"


@pytest.mark.parametrize(
    ("program", "text", "words"),
    [
        ("newuidmap", None, "newuidmap is not installed: root can install it (Debian: apt-get install uidmap)"),
        ("newgidmap", None, "newgidmap is not installed: root can install it (Debian: apt-get install uidmap)"),
        ("newuidmap", "#!/bin/sh\necho newuidmap: not today >&2\nexit 1\n", "newuidmap refuses: not today"),
        ("newgidmap", "#!/bin/sh\nexit 3\n", "newgidmap refuses: status 3"),
        ("newuidmap", "no program\n", "newuidmap can't be run: Exec format error"),
    ],
)
def test_why_they_are_not_mapped(tmp_path: Path, program: str, text: str | None, words: str) -> None:
    with home_of(alice) as home:
        bin_ = home.path / "bin"
        bin_.mkdir()
        for name in {"fusermount3", "newuidmap", "newgidmap"} - {program}:
            found = shutil.which(name)
            assert found is not None
            (bin_ / name).symlink_to(found)
        if text is not None:
            (bin_ / program).write_text(text)
            (bin_ / program).chmod(0o755)
        home.daemon.prefix = (*alice, "/usr/bin/env", f"PATH={bin_}")
        home.daemon.start()
        with_workspace(home)
        assert subids_of(home) == {"on": False, "why": words}
        assert words in home.inside("w", "true", "--subids", status=1)
        assert home.inside("w", "touch made; stat -c %u made") == f"{ALICE}\n"


def test_a_daemon_that_has_lost_them_says_what_to_do(home: Home) -> None:
    """It can't look into directories of theirs: nobody is told less than there is without a word."""
    home.inside("w", "mkdir d; touch d/f; chown 5:6 d d/f; chmod 700 d", "--subids")
    assert home.daemon.stop() == 0
    (home.path / "bin").mkdir()
    (home.path / "bin/fusermount3").symlink_to(str(shutil.which("fusermount3")))
    home.daemon = home.another()
    home.daemon.prefix = (*alice, "/usr/bin/env", f"PATH={home.path}/bin")
    home.daemon.start()
    hint = "or start the daemon where it gets the ids of /etc/subuid, if one is the owner: options.json says why not (subids)\n"
    for command in ("usage w", "diff w", "diff -p w", "diff b w"):
        assert home.snapfs(*command.split(), status=6).endswith(hint)
    home.sh("rmdir tree/active/w")
    home.does("sh", "-c", "echo 1 > tree/.snapfs/cleanup", status=1)
    assert hint.strip() in home.last_error()
    assert home.daemon.stop() == 0
    home.daemon = home.another().start()
    home.sh("echo 1 > tree/.snapfs/cleanup")
    assert os.listdir(home.root / "trash") == []


def test_root_has_all_ids_anyway(tmp_path: Path) -> None:
    with home_of(()) as home:
        home.daemon.start()
        with_workspace(home)
        assert home.inside("w", "touch made; chown 12345 made; stat -c %u made", "--subids") == "12345\n"
        assert home.daemon.stop() == 0


def test_ids_come_back_as_they_were(home: Home) -> None:
    """After the daemon has been killed, and was started anew, a file has the owner that it had."""
    home.inside("w", "mkdir d; touch d/f; chown 5:6 d d/f; chmod 700 d", "--subids")
    assert home.daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: home.mounts() == [], "nothing is mounted")
    home.daemon = home.another().start()
    assert home.inside("w", "stat -c %u:%g:%a d d/f", "--subids") == "5:6:700\n5:6:644\n"
    assert stat.S_IMODE(os.stat(f"{home.rootfs('w')}/d").st_mode) == 0o700


@pytest.mark.parametrize(
    ("given", "own", "wanted"),
    [
        ([], 5, []),
        ([(10, 5)], 5, [(10, 5)]),
        ([(4, 3)], 5, [(4, 1), (6, 1)]),
        ([(5, 3)], 5, [(6, 2)]),
        ([(3, 3)], 5, [(3, 2)]),
        ([(5, 1)], 5, []),
        ([(20, 10), (10, 15)], 5, [(10, 15), (25, 5)]),
        ([(20, 5), (10, 30), (12, 3)], 5, [(10, 30)]),
    ],
)
def test_each_id_once_and_ones_own_in_none(given: list[tuple[int, int]], own: int, wanted: list[tuple[int, int]]) -> None:
    assert subids._without([Range(*each) for each in given], own) == tuple(Range(*each) for each in wanted)


def test_tables() -> None:
    ranges = [Range(300, 10), Range(500, 5)]
    assert subids.table(1001, ranges, root=False) == "1001 1001 1\n300 300 10\n500 500 5"
    assert subids.table(1001, ranges, root=True) == "0 1001 1\n1 300 10\n11 500 5"


def test_a_table_is_no_longer_than_the_kernel_takes() -> None:
    ranges = subids._without([Range(4_000_000_000 + 2 * number, 1) for number in range(1000)], 5)
    assert len(subids.table(4_294_967_000, ranges, root=False)) < os.sysconf("SC_PAGE_SIZE")


def test_all_ids_that_are_lent_to_one_user_count_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each user has a place, but not one for each of 65,536 ids; the file may change while the daemon runs."""
    clock = 0.0
    monkeypatch.setattr("snapfs.kernel.subids.time.monotonic", lambda: clock)
    path = tmp_path / "subuid"
    owners = subids.Owners(str(path))
    assert owners.one_of(1001) == owners.one_of(100_000) - 98_999 == 1001
    path.write_text("alice:100000:65536\nbob:165536:65536\nalice:400000:10\nbroken\nx:y:z\n1003:500000:1\n")
    clock += 2
    found = {
        uid: owners.one_of(uid)
        for uid in (1001, 99_999, 100_000, 165_535, 165_536, 231_071, 231_072, 400_009, 400_010, 500_000)
    }
    assert found == {
        1001: 1001,
        99_999: 99_999,
        100_000: 100_000,
        165_535: 100_000,
        165_536: 165_536,
        231_071: 165_536,
        231_072: 231_072,
        400_009: 100_000,
        400_010: 400_010,
        500_000: 500_000,
    }
    path.write_text("alice:700000:65536\nbob:710000:10\ncarol:760000:65536\ndan:700000:5\n")
    clock += 2
    found = {uid: owners.one_of(uid) for uid in (700_000, 710_005, 710_010, 765_535, 765_536, 825_535, 825_536)}
    assert found == {
        **dict.fromkeys((700_000, 710_005, 710_010, 765_535), 700_000),
        765_536: 760_000,
        825_535: 760_000,
        825_536: 825_536,
    }
    path.write_text("alice:100000:65536\n")
    clock += 2
    assert owners.one_of(165_535) == 100_000
    path.write_text("")
    assert owners.one_of(165_535) == 100_000, "it is not looked at each time"
    clock += 2
    assert owners.one_of(165_535) == 165_535
