"""Names: any key becomes one file name and back, through a real mount."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from snapfs import names
from snapfs.errors import NameTooLong
from tests.daemon import Daemon
from tests.refusals import failing, refused
from tests.tree import committed, info, nanoseconds, remove_all, shell


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    """One daemon for all tests here; each leaves it empty."""
    return module_daemon


@pytest.fixture(autouse=True)
def emptied(daemon: Daemon) -> Iterator[None]:
    """Remove what a test made."""
    yield
    remove_all(daemon.mnt)


NAMES = [
    ("default/12/sha256:ab", "default%2F12%2Fsha256:ab"),
    ("default/11/extract-969002056-w-eF sha256:" + "0" * 64, "default%2F11%2Fextract-969002056-w-eF sha256:" + "0" * 64),
    ("/", "%2F"),
    ("//", "%2F%2F"),
    ("a/../b", "a%2F..%2Fb"),
    ("100%", "100%25"),
    ("%2F", "%252F"),
    ("%", "%25"),
    (".", "%2E"),
    ("..", "%2E."),
    ("...", "..."),
    (".hidden", ".hidden"),
    ("./", ".%2F"),
    ("with blank", "with blank"),
    (" ", " "),
    (" leading and trailing ", " leading and trailing "),
    ("line\nbreak", "line%0Abreak"),
    ("tab\tand\rreturn", "tab%09and%0Dreturn"),
    ("bell\a\x7f", "bell%07%7F"),
    ("next\u0085line", "next%C2%85line"),
    ("-rf", "-rf"),
    ("--help", "--help"),
    ("*?[a]", "*?[a]"),
    ("$HOME`id`'\"\\", "$HOME`id`'\"\\"),
    ("grün", "grün"),
    ("gru\u0308n", "gru\u0308n"),
    ("日本語", "日本語"),
    ("🐧", "🐧"),
    ("\u200b\u202e", "\u200b\u202e"),
    ("active", "active"),
    ("labels", "labels"),
    ("x" * 255, "x" * 255),
    ("ü" * 127, "ü" * 127),
    ("/" * 85, "%2F" * 85),
]


@pytest.mark.parametrize("door", ["active", "view", "committed/base/active", "committed/base/view"])
@pytest.mark.parametrize(("key", "name"), NAMES, ids=range(len(NAMES)))
def test_a_key_and_its_file_name(daemon: Daemon, key: str, name: str, door: str) -> None:
    base = committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / door / name)
    kind = os.path.basename(door)
    path = daemon.mnt / kind / name
    assert os.listdir(daemon.mnt / kind) == [name]
    assert info(path)["name"] == key
    number = info(path)["id"]
    assert os.readlink(daemon.mnt / f"by-id/{number}") == f"../{kind}/{name}"
    if door != kind:
        assert os.readlink(base / kind / name) == f"../../../{kind}/{name}"
        assert info(base / kind / name)["name"] == key
    os.rmdir(path)
    assert os.listdir(daemon.mnt / kind) == []


@pytest.mark.parametrize(("key", "name"), NAMES, ids=range(len(NAMES)))
def test_a_committed_snapshots_name(daemon: Daemon, key: str, name: str) -> None:
    os.mkdir(daemon.mnt / "active/draft")
    os.rename(daemon.mnt / "active/draft", daemon.mnt / "committed" / name)
    os.mkdir(daemon.mnt / "committed" / name / "active/child")
    assert info(daemon.mnt / "active/child")["parent"] == key
    assert os.readlink(daemon.mnt / "active/child/parent") == f"../../committed/{name}"
    assert os.path.samefile(daemon.mnt / "active/child/parent", daemon.mnt / "committed" / name)
    os.rename(daemon.mnt / "committed" / name, daemon.mnt / "committed/plain")
    os.rename(daemon.mnt / "committed/plain", daemon.mnt / "committed" / name)
    assert os.listdir(daemon.mnt / "committed") == [name]


def test_shell_tools_with_any_name(daemon: Daemon) -> None:
    for _, name in NAMES:
        os.mkdir(daemon.mnt / "active" / name)
    count = str(len(NAMES))
    assert shell(daemon.mnt, "find active -mindepth 1 -maxdepth 1 -print0 | tr -cd '\\0' | wc -c").stdout.strip() == count
    assert shell(daemon.mnt, "ls -1A active | wc -l").stdout.strip() == count, "no name breaks a line"
    done = shell(daemon.mnt, 'for one in active/*/ active/.[!.]*/ active/...*/; do cat "$one/info.json" || exit; done')
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r'^  "name":', done.stdout, re.M)) == len(NAMES)
    assert shell(daemon.mnt, "rm -r active/* active/.[!.]* active/...*").stderr == ""
    assert os.listdir(daemon.mnt / "active") == []


TOO_LONG = ["x" * 256, "ü" * 128, "x" * 1000, "%2F" * 86]


@pytest.mark.parametrize("door", ["active", "view"])
@pytest.mark.parametrize("name", TOO_LONG, ids=range(len(TOO_LONG)))
def test_names_of_more_than_255_bytes(daemon: Daemon, name: str, door: str) -> None:
    with refused(daemon, errno.ENAMETOOLONG, "mkdir", f"{door}/{name}", "255"):
        os.mkdir(daemon.mnt / door / name)


def test_looking_for_names_that_are_too_long_pushes_nothing_out_of_the_log(daemon: Daemon) -> None:
    """Any reader can do that; and a name that nothing can have is a name that nothing has."""
    before = daemon.error_log()
    for name in TOO_LONG:
        with failing(errno.ENOENT):
            os.stat(daemon.mnt / "active" / name)
    assert daemon.error_log() == before


@pytest.mark.parametrize("kind", ["active", "committed"])
def test_a_rename_to_a_name_that_is_too_long(daemon: Daemon, kind: str) -> None:
    os.mkdir(daemon.mnt / "active/k")
    with refused(daemon, errno.ENAMETOOLONG, "rename", f"active/k {kind}/{'x' * 256}", "255"):
        os.rename(daemon.mnt / "active/k", daemon.mnt / kind / ("x" * 256))


NOT_CANONICAL = [
    "%",
    "100%",
    "%2",
    "%2f",
    "a%41",
    "%20",
    "%2E%2E",
    "%2Ea",
    "%FF",
    "%C2",
    "%ZZ",
    "line\nbreak",
    "\t",
    "a\x7f",
    "%ED%A0%80",
]


@pytest.mark.parametrize("door", ["active", "view", "committed/base/active", "committed/base/view"])
@pytest.mark.parametrize("name", NOT_CANONICAL)
def test_an_encoding_that_is_not_canonical(daemon: Daemon, name: str, door: str) -> None:
    committed(daemon.mnt, "base")
    path = daemon.mnt / door / name
    with failing(errno.ENOENT):
        os.lstat(path)
    shown = re.sub("[\x00-\x1f\x7f]", lambda m: f"%{ord(m[0]):02X}", name)
    with refused(daemon, errno.EINVAL, "mkdir", f"{door}/{shown}", "no key's file name"):
        os.mkdir(path)


@pytest.mark.parametrize("name", NOT_CANONICAL)
def test_a_rename_to_what_is_no_name(daemon: Daemon, name: str) -> None:
    """EPERM as any other rename that is refused, since mv misreports EINVAL."""
    os.mkdir(daemon.mnt / "active/k")
    for door in ("active", "committed"):
        shown = re.sub("[\x00-\x1f\x7f]", lambda m: f"%{ord(m[0]):02X}", name)
        with refused(daemon, errno.EPERM, "rename", f"active/k {door}/{shown}", "no key's file name"):
            os.rename(daemon.mnt / "active/k", daemon.mnt / door / name)


@pytest.mark.parametrize("name", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf8\x88\x80\x80\x80"])
def test_bytes_that_are_not_utf8(daemon: Daemon, name: bytes) -> None:
    active = os.fsencode(daemon.mnt / "active")
    with failing(errno.ENOENT):
        os.lstat(active + b"/" + name)
    shown = name.decode(errors="backslashreplace")
    for kind in ("active", "view"):
        with refused(daemon, errno.EILSEQ, "mkdir", f"{kind}/{shown}", "not UTF-8"):
            os.mkdir(os.fsencode(daemon.mnt) + b"/" + kind.encode() + b"/" + name)
    os.mkdir(daemon.mnt / "active/k")
    for kind in ("active", "committed"):
        with refused(daemon, errno.EILSEQ, "rename", f"active/k {kind}/{shown}", "not UTF-8"):
            os.rename(active + b"/k", os.fsencode(daemon.mnt) + b"/" + kind.encode() + b"/" + name)


def test_unicode_is_not_normalised(daemon: Daemon) -> None:
    for name in ("gr\u00fcn", "gru\u0308n", "GR\u00dcN"):
        os.mkdir(daemon.mnt / "active" / name)
    assert [info(daemon.mnt / "active" / name)["name"] for name in os.listdir(daemon.mnt / "active")] == [
        "gr\u00fcn",
        "gru\u0308n",
        "GR\u00dcN",
    ]


def test_names_in_the_error_log_stay_on_their_line(daemon: Daemon) -> None:
    os.mkdir(daemon.mnt / "active/a%0Ab c")
    before = len(daemon.error_log())
    with failing(errno.EEXIST):
        os.mkdir(daemon.mnt / "view/a%0Ab c")
    (line,) = daemon.error_log()[before:]
    assert line.split(" ", 1)[1] == 'EEXIST mkdir view/a%0Ab c: snapshot "a%0Ab c" already exists (active)'
    assert nanoseconds(line.split(" ")[0]) > 0


keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)
awkward = st.text(st.sampled_from("/%.\n\x00\x7f 2Faü"), min_size=1, max_size=30)


@given(key=keys | awkward)
@example(key="\x00")
@example(key="%2F/")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_key_goes_round_through_the_mount(daemon: Daemon, key: str) -> None:
    try:
        name = names.encode(key)
    except NameTooLong:
        return
    path = daemon.mnt / "active" / name
    os.mkdir(path)
    try:
        assert info(path)["name"] == key
        assert os.listdir(daemon.mnt / "active") == [name]
        assert names.decode(os.listdir(daemon.mnt / "active")[0]) == key
        (path / "labels" / name).write_text("value")
        assert info(path)["labels"] == {key: "value"}
    finally:
        os.rmdir(path)


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00/"), min_size=1, max_size=40))
@example(name="%2f")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_name_is_taken_as_it_is_or_refused(daemon: Daemon, name: str) -> None:
    if name in (".", ".."):
        return
    path = daemon.mnt / "view" / name
    assert not os.path.lexists(path)
    try:
        os.mkdir(path)
    except OSError as error:
        assert error.errno == errno.EINVAL
        assert os.listdir(daemon.mnt / "view") == []
    else:
        assert os.listdir(daemon.mnt / "view") == [name]
        assert names.encode(info(path)["name"]) == name
        os.rmdir(path)
