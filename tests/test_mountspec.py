"""A snapshot and its chain -> the mounts, to containerd's letter; mapping labels; mount.sh."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.errors import InvalidArgument
from snapfs.idmap import GID_MAPPING, UID_MAPPING, parse_mapping, root_owner, to_host
from snapfs.model import Kind, Mount
from snapfs.mountoptions import PAGE, escape
from snapfs.mountspec import mounts, script

A, V = Kind.ACTIVE, Kind.VIEW
BOTH = {UID_MAPPING: "0:1000:10", GID_MAPPING: "0:2000:10", "other": "x"}


@pytest.mark.parametrize(
    ("kind", "parents", "options", "remap", "expected"),
    [
        (A, [], [], None, Mount("bind", "/r/9/fs", ("rw", "rbind"))),
        (V, [], [], None, Mount("bind", "/r/9/fs", ("ro", "rbind"))),
        (V, ["/r/1"], [], None, Mount("bind", "/r/1/fs", ("ro", "rbind"))),
        (
            A,
            ["/r/1"],
            [],
            None,
            Mount("overlay", "overlay", ("workdir=/r/9/work", "upperdir=/r/9/fs", "lowerdir=/r/1/fs")),
        ),
        (
            A,
            ["/r/3", "/r/2", "/r/1"],
            [],
            None,
            Mount("overlay", "overlay", ("workdir=/r/9/work", "upperdir=/r/9/fs", "lowerdir=/r/3/fs:/r/2/fs:/r/1/fs")),
        ),
        (V, ["/r/3", "/r/2"], [], None, Mount("overlay", "overlay", ("lowerdir=/r/3/fs:/r/2/fs",))),
        # configured options: after the layers, in their order, on overlay mounts only
        (
            A,
            ["/r/1"],
            ["volatile", "index=off"],
            None,
            Mount("overlay", "overlay", ("workdir=/r/9/work", "upperdir=/r/9/fs", "lowerdir=/r/1/fs", "volatile", "index=off")),
        ),
        (V, ["/r/2", "/r/1"], ["a", "b"], None, Mount("overlay", "overlay", ("lowerdir=/r/2/fs:/r/1/fs", "a", "b"))),
        (A, [], ["volatile"], None, Mount("bind", "/r/9/fs", ("rw", "rbind"))),
        (V, [], ["volatile"], None, Mount("bind", "/r/9/fs", ("ro", "rbind"))),
        (V, ["/r/1"], ["volatile"], None, Mount("bind", "/r/1/fs", ("ro", "rbind"))),
        # mappings: first, on binds too, as the labels say them
        (A, [], [], BOTH, Mount("bind", "/r/9/fs", ("uidmap=0:1000:10", "gidmap=0:2000:10", "rw", "rbind"))),
        (V, [], [], BOTH, Mount("bind", "/r/9/fs", ("uidmap=0:1000:10", "gidmap=0:2000:10", "ro", "rbind"))),
        (V, ["/r/1"], [], BOTH, Mount("bind", "/r/1/fs", ("uidmap=0:1000:10", "gidmap=0:2000:10", "ro", "rbind"))),
        (
            A,
            ["/r/1"],
            ["x"],
            BOTH,
            Mount(
                "overlay",
                "overlay",
                ("uidmap=0:1000:10", "gidmap=0:2000:10", "workdir=/r/9/work", "upperdir=/r/9/fs", "lowerdir=/r/1/fs", "x"),
            ),
        ),
        (
            V,
            ["/r/2", "/r/1"],
            [],
            BOTH,
            Mount("overlay", "overlay", ("uidmap=0:1000:10", "gidmap=0:2000:10", "lowerdir=/r/2/fs:/r/1/fs")),
        ),
        (A, [], [], {UID_MAPPING: "0:5:1,1:9:2"}, Mount("bind", "/r/9/fs", ("uidmap=0:5:1,1:9:2", "rw", "rbind"))),
        (A, [], [], {GID_MAPPING: "0:5:1"}, Mount("bind", "/r/9/fs", ("gidmap=0:5:1", "rw", "rbind"))),
        (A, [], [], {}, Mount("bind", "/r/9/fs", ("rw", "rbind"))),
    ],
)
def test_the_mounts(
    kind: Kind, parents: Sequence[str], options: Sequence[str], remap: Mapping[str, str] | None, expected: Mount
) -> None:
    assert mounts(kind, "/r/9", parents, options=options, remap=remap) == [expected]


def test_a_layer_that_gets_its_parent_later_is_an_overlay_of_itself_alone() -> None:
    """Where containerd's applier finds its directory, and the reason to write whiteouts; only an active one is written."""
    own = ("workdir=/r/9/work", "upperdir=/r/9/fs")
    assert mounts(A, "/r/9", [], alone=True) == [Mount("overlay", "overlay", own)]
    options = ("userxattr", "index=off")
    assert mounts(A, "/r/9", [], options=options, alone=True) == [Mount("overlay", "overlay", (*own, *options))]
    mapped = ("uidmap=0:1000:10", "gidmap=0:2000:10")
    assert mounts(A, "/r/9", [], remap=BOTH, alone=True) == [Mount("overlay", "overlay", (*mapped, *own))]
    assert mounts(V, "/r/9", [], alone=True) == mounts(V, "/r/9", [])
    assert mounts(A, "/r/9", ["/r/1"], alone=True) == mounts(A, "/r/9", ["/r/1"])


@pytest.mark.parametrize(
    ("path", "escaped"),
    [
        ("/a", "/a"),
        ("/a:b", "/a\\:b"),
        ("/a,b", "/a\\,b"),
        ("/a\\b", "/a\\\\b"),
        ("/\\:,", "/\\\\\\:\\,"),
        ("/a b\n", "/a b\n"),
    ],
)
def test_escaping(path: str, escaped: str) -> None:
    assert escape(path) == escaped


def test_each_path_of_an_overlay_is_escaped_and_the_separators_are_not() -> None:
    (mount,) = mounts(A, "/a:b/9", ["/a:b/2", "/c,d/1"])
    assert mount.options == ("workdir=/a\\:b/9/work", "upperdir=/a\\:b/9/fs", "lowerdir=/a\\:b/2/fs:/c\\,d/1/fs")


def test_the_source_of_a_bind_is_a_plain_path() -> None:
    assert mounts(A, "/a:b,c\\d/9", [])[0].source == "/a:b,c\\d/9/fs"
    assert mounts(V, "/a:b/9", ["/a:b,c\\d/1"])[0].source == "/a:b,c\\d/1/fs"


@given(st.lists(st.text(st.sampled_from("ab:,\\ "), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_lowerdir_can_be_taken_apart_again(parents: list[str]) -> None:
    """By the kernel's rule: a backslash takes the next character as it is, a colon separates."""
    (mount,) = mounts(A, "/x", parents)
    text = mount.options[2].removeprefix("lowerdir=")
    parts, at = [""], 0
    while at < len(text):
        if text[at] == ":":
            parts.append("")
        else:
            at += text[at] == "\\"
            parts[-1] += text[at]
        at += 1
    assert parts == [f"{parent}/fs" for parent in parents]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:1000:65536", [(0, 1000, 65536)]),
        ("0:1000:1,1:100000:65535", [(0, 1000, 1), (1, 100000, 65535)]),
        ("0:0:4294967295", [(0, 0, 4294967295)]),
    ],
)
def test_a_mapping_parses(text: str, expected: list[tuple[int, int, int]]) -> None:
    assert parse_mapping(text, UID_MAPPING) == expected


BAD_MAPPINGS = [
    "0",
    "0:1",
    "0:1:2:3",
    "a:1:2",
    "0:b:2",
    "0:1:c",
    ":1:2",
    "0::2",
    "0:1:",
    "-1:1:2",
    "+0:1:2",
    "0:1:2,",
    ",0:1:2",
    "0:1:2;1:2:3",
    " 0:1:2",
    "0:1_0:2",
    "0:٣:2",
    "0:4294967296:1",
]


@pytest.mark.parametrize("text", BAD_MAPPINGS)
@pytest.mark.parametrize("label", [UID_MAPPING, GID_MAPPING])
def test_a_mapping_that_does_not_parse_is_an_invalid_argument(text: str, label: str) -> None:
    with pytest.raises(InvalidArgument, match=label):
        root_owner({label: text})


@pytest.mark.parametrize("text", ["1:1000:10", "5:0:1,7:0:1", "0:1000:0"])
@pytest.mark.parametrize("label", [UID_MAPPING, GID_MAPPING])
def test_a_mapping_without_an_entry_for_0_is_an_invalid_argument(text: str, label: str) -> None:
    with pytest.raises(InvalidArgument, match=label):
        root_owner({label: text})


@pytest.mark.parametrize(
    ("labels", "owner"),
    [
        ({}, None),
        ({"other": "0:1:2"}, None),
        ({UID_MAPPING: "", GID_MAPPING: ""}, None),
        ({UID_MAPPING: "0:1000:10", GID_MAPPING: "0:2000:10"}, (1000, 2000)),
        ({UID_MAPPING: "0:1000:10"}, (1000, 0)),
        ({GID_MAPPING: "0:2000:10"}, (0, 2000)),
        ({UID_MAPPING: "0:1000:10", GID_MAPPING: ""}, (1000, 0)),
        ({UID_MAPPING: "5:9:1,0:7:2", GID_MAPPING: "0:8:1,5:9:1"}, (7, 8)),
    ],
)
def test_the_host_ids_of_the_containers_id_0(labels: dict[str, str], owner: tuple[int, int] | None) -> None:
    assert root_owner(labels) == owner


@pytest.mark.parametrize(("container", "host"), [(0, 1000), (9, 1009), (10, None), (20, 5), (21, 6), (22, None)])
def test_to_host(container: int, host: int | None) -> None:
    assert to_host(container, [(0, 1000, 10), (20, 5, 2)]) == host


def sourced(text: str, tmp_path: Path, *arguments: str, quiet: bool = False) -> tuple[int, list[list[str]]]:
    """Run a script with a ``mount`` that only notes its arguments (and working directory) and fails as util-linux from 2.39 on
    does with options of more than 255 bytes, if it is not told to take mount(2); status and calls."""
    fake = tmp_path / "bin"
    fake.mkdir(exist_ok=True)
    log = tmp_path / "calls"
    log.write_bytes(b"")
    for name in ("mount", "umount"):
        (fake / name).write_text(
            '#!/bin/sh\n[ "$1" != -t ] || [ "$LIBMOUNT_FORCE_MOUNT2" = always ] || exit 32\n'
            f'printf "%s\\0" {name} "$PWD" "$@" "" >> {shlex.quote(str(log))}\n'
        )
        (fake / name).chmod(0o755)
    (tmp_path / "mount.sh").write_text(text)
    done = subprocess.run(
        ["sh", str(tmp_path / "mount.sh"), *arguments],
        env={"PATH": f"{fake}:/usr/bin:/bin"},
        cwd=tmp_path,
        stderr=subprocess.DEVNULL if quiet else None,
        check=False,
    )
    calls = [call.split("\0") for call in log.read_text().split("\0\0") if call]
    return done.returncode, calls


NASTY = "/r 'q' $(x)\\\n\"*"


@pytest.mark.parametrize("target", ["/mnt", "m n t'$x\"", "-target", "#"])
def test_the_script_of_a_bind(tmp_path: Path, target: str) -> None:
    """The source is named from its own directory, the target by its whole path: no mount(8) finds anything odd in them."""
    snapshots = f"{tmp_path}/{NASTY.replace('/', '_')}"
    Path(snapshots, "9").mkdir(parents=True)
    (tmp_path / target).mkdir(exist_ok=True)
    text = script(mounts(A, f"{snapshots}/9", []), snapshots, 9)
    calls = [["mount", f"{snapshots}/9", "-o", "rbind", "fs", str(tmp_path / target)]]
    calls += [["mount", f"{snapshots}/9", "--make-rprivate", str(tmp_path / target)]]
    assert sourced(text, tmp_path, target) == (0, calls)


def test_the_script_of_a_read_only_bind_makes_it_read_only_in_a_second_step(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    text = script(mounts(V, f"{tmp_path}/9", [f"{tmp_path}/1"]), str(tmp_path), 9)
    status, calls = sourced(text, tmp_path, "/mnt")
    assert status == 0
    assert [call[1:] for call in calls] == [
        [f"{tmp_path}/1", "-o", "rbind", "fs", "/mnt"],
        [f"{tmp_path}/1", "--make-rprivate", "/mnt"],
        [f"{tmp_path}/1", "-o", "remount,bind,ro", "/mnt"],
    ]


def test_the_script_of_an_overlay(tmp_path: Path) -> None:
    snapshots = NASTY.replace('"', "")
    spec = mounts(A, f"{snapshots}/9", [f"{snapshots}/1"], options=["index=off"])
    status, calls = sourced(script(spec, snapshots, 9), tmp_path, "/mnt")
    assert status == 0
    assert [call[2:] for call in calls] == [["-t", "overlay", "-o", ",".join(spec[0].options), "overlay", "/mnt"]]


def test_the_script_of_more_layers_than_a_page_holds_names_them_relative_to_the_snapshots(tmp_path: Path) -> None:
    snapshots = tmp_path / "snap:shots"
    snapshots.mkdir()
    target = tmp_path / "m n t\n"
    target.mkdir()
    chain = [f"{snapshots}/{number}" for number in range(128, 0, -1)]
    spec = mounts(A, f"{snapshots}/129", chain)
    assert len(",".join(spec[0].options)) >= PAGE
    status, calls = sourced(script(spec, str(snapshots), 9), tmp_path, "m n t\n")
    assert status == 0
    ((_, directory, *rest),) = calls
    assert directory == str(snapshots)
    assert rest[:2] == ["-t", "overlay"]
    assert len(rest[3]) < PAGE
    assert rest[3].endswith("lowerdir=" + ":".join(f"{number}/fs" for number in range(128, 0, -1)))
    assert rest[4:] == ["overlay", str(target)]


@pytest.mark.parametrize("arguments", [(), ("/a", "/b")])
def test_the_script_wants_one_target(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert sourced(script(mounts(A, "/r/9", []), "/r", 9), tmp_path, *arguments, quiet=True) == (2, [])


def test_the_script_refuses_what_mount_can_not_do(tmp_path: Path) -> None:
    text = script(mounts(A, "/r/9", [], remap=BOTH), "/r", 9)
    assert sourced(text, tmp_path, "/mnt", quiet=True) == (1, [])


@pytest.mark.parametrize("text", ["0:4294967295:1", "0:1:4294967295", "4294967295:0:1", "0:0:0", "0:5:0"])
def test_a_mapping_beyond_the_last_id_or_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="beyond the last id"):
        parse_mapping(text, UID_MAPPING)


def test_the_mapping_of_all_ids_onto_themselves() -> None:
    assert parse_mapping("0:0:4294967295", UID_MAPPING) == [(0, 0, 4294967295)]
