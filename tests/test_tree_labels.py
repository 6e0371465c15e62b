"""labels/: one file a label, written and read by shells, editors and programs on a real mount."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.labels import COUNT, ROOM
from tests.daemon import Daemon
from tests.processes import die_with_parent
from tests.reading import are_content, readers
from tests.refusals import failing, refused
from tests.tree import info, nanoseconds, remove_all, shell

KINDS = ("active", "view", "committed")


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    """One daemon for all tests here; each leaves it empty."""
    return module_daemon


@pytest.fixture
def labels(daemon: Daemon) -> Iterator[Path]:
    """The labels/ of an active snapshot."""
    os.mkdir(daemon.mnt / "active/k")
    yield daemon.mnt / "active/k/labels"
    remove_all(daemon.mnt)


def stored(labels: Path) -> dict[str, str]:
    """The labels as info.json says them."""
    found: dict[str, str] = info(labels.parent)["labels"]
    return found


def put(label: Path, value: str) -> None:
    """Write a label with one write(2)."""
    with open(label, "wb", 0) as file:
        file.write(value.encode())


def run(labels: Path, command: str) -> str:
    """Run a shell command inside labels/; what it printed."""
    done = shell(labels, command)
    assert (done.returncode, done.stderr) == (0, ""), command
    return done.stdout


# -- one command, what is stored after it

WRITTEN = [
    ("printf blue > l", "blue"),
    ("echo blue > l", "blue"),
    ("printf 'blue\\n\\n' > l", "blue\n"),
    ("printf '\\nblue' > l", "\nblue"),
    ("printf '\\n\\n' > l", "\n"),
    ("printf 'a\\nb\\n' > l", "a\nb"),
    ("printf ' ' > l", " "),
    ("printf 'gr\\303\\274n' > l", "grün"),
    ("printf 'a\\tb\\\\c\"d' > l", 'a\tb\\c"d'),
    ("echo blue | tee l", "blue"),
    ("echo blue | dd of=l status=none", "blue"),
    ("printf blue | dd of=l bs=1 status=none", "blue"),
    ("echo blue > ../../../../source && cp ../../../../source l", "blue"),
    ("echo blue > ../../../../source && cat ../../../../source > l", "blue"),
    ("echo blue > ../../../../source && busybox cp ../../../../source l", "blue"),
    ("echo blue > ../../../../source && install -m 644 ../../../../source l", "blue"),
    ("echo blue > ../../../../source && mv ../../../../source l", "blue"),
]


@pytest.mark.parametrize(("command", "value"), WRITTEN)
@pytest.mark.parametrize("before", ["", "a rather long value that was there before"])
def test_writing_a_label(labels: Path, before: str, command: str, value: str) -> None:
    if before:
        (labels / "l").write_text(before)
    if " mv " in command or "install" in command:  # both set times, which a label doesn't take: they say so, and it is written
        shell(labels, command)
    else:
        run(labels, command)
    assert stored(labels) == {"l": value}
    content = value.encode() + b"\n"
    assert (labels / "l").read_bytes() == content
    assert os.stat(labels / "l").st_size == len(content)
    assert os.listdir(labels) == ["l"]


CHANGED = [
    ("echo two >> l", "one\ntwo"),
    ("printf two >> l", "one\ntwo"),
    ("echo two | tee -a l", "one\ntwo"),
    ("sed -i s/one/two/ l", "two"),
    ("busybox sed -i s/one/two/ l", "two"),
    ("sed -i '$a two' l", "one\ntwo"),
    ("printf '1s/one/two/\\nw\\nq\\n' | ed -s l", "two"),
    ("printf '$a\\ntwo\\n.\\nw\\nq\\n' | ed -s l", "one\ntwo"),
    ("vim -u NONE -es -c '%s/one/two/' -c wq l", "two"),
    ("vim -u NONE -es -c 'set backup nobackup writebackup backupcopy=yes' -c '%s/one/two/' -c wq l", "two"),
    ("vim -u NONE -es -c 'set backupcopy=no' -c '%s/one/two/' -c wq l", "two"),
    ("vim -u NONE -es -c 'normal Gotwo' -c x l", "one\ntwo"),
    ("vim -n -u NONE -es -c '%s/one/two/' -c wq l", "two"),
    ("busybox vi -c ':s/one/two/' -c ':wq' l < /dev/null > /dev/null", "two"),
    ("perl -pi -e s/one/two/ l", "two"),
    ("truncate -s 0 l", None),
    ("truncate -s 2 l", "on"),
    ("truncate -s 3 l", "one"),
    (": > l", None),
    ("cp /dev/null l", None),
    ("printf '' > l", None),
    ("printf '\\n' > l", None),
    ("echo > l", None),
    ("rm l", None),
    ("rm -f l", None),
    ("unlink l", None),
    ("busybox rm l", None),
    ("cat l > /dev/null", "one"),
    ("true >> l", "one"),
    ("printf X | dd of=l bs=1 seek=1 conv=notrunc status=none", "oXe"),
    ("printf XY | dd of=l bs=1 seek=2 conv=notrunc status=none", "onXY"),
    ("cp l m && mv m l", "one"),
    ("cp -p l m; mv m l", "one"),
    ("touch m; mv m l", "one"),  # there is no empty label that could be moved
    ("sed -i 1d l", "one"),
]


@pytest.mark.parametrize(("command", "value"), CHANGED)
def test_changing_a_label(labels: Path, command: str, value: str | None) -> None:
    (labels / "l").write_text("one")
    shell(labels, command)
    assert stored(labels) == ({} if value is None else {"l": value})
    assert os.listdir(labels) == ([] if value is None else ["l"])
    assert os.path.lexists(labels / "l") is (value is not None)
    assert (labels / "l").exists() is False or (labels / "l").read_text() == f"{value}\n"


def test_commands_that_change_a_label_succeed(labels: Path) -> None:
    """No tool that does its work complains about it."""
    for command, _ in CHANGED:
        (labels / "l").write_text("one")
        # The first two set times.  vi wants a terminal.
        # The last would move an empty file, and there is no empty label.
        if command.startswith(("cp -p", "touch", "busybox vi", "sed -i 1d")):
            continue
        run(labels, command)


def test_a_label_that_is_made_empty_is_none(labels: Path) -> None:
    for command in (": > l", "printf '' > l", "cp /dev/null l"):
        run(labels, command)
        assert (stored(labels), os.listdir(labels)) == ({}, [])
        assert not os.path.lexists(labels / "l")


# -- moving, making, removing


def test_mv_renames_a_label(labels: Path) -> None:
    (labels / "one").write_text("1")
    run(labels, "mv one two")
    assert stored(labels) == {"two": "1"}
    assert os.listdir(labels) == ["two"]
    assert not os.path.lexists(labels / "one")
    assert (labels / "two").read_text() == "1\n"


def test_mv_over_a_label_replaces_it_in_one_step(labels: Path) -> None:
    (labels / "one").write_text("1")
    (labels / "two").write_text("2")
    run(labels, "mv one two")
    assert stored(labels) == {"two": "1"}
    assert (labels / "two").read_text() == "1\n"
    assert os.listdir(labels) == ["two"]


def test_mv_n_keeps_what_is_there(daemon: Daemon, labels: Path) -> None:
    (labels / "one").write_text("1")
    (labels / "two").write_text("2")
    shell(labels, "mv -n one two")
    assert stored(labels) == {"one": "1", "two": "2"}


def test_a_label_renamed_onto_itself(labels: Path) -> None:
    (labels / "one").write_text("1")
    os.rename(labels / "one", labels / "one")
    assert stored(labels) == {"one": "1"}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind(daemon: Daemon, labels: Path, kind: str) -> None:
    os.mkdir(daemon.mnt / ("active" if kind == "committed" else kind) / "s")
    if kind == "committed":
        os.rename(daemon.mnt / "active/s", daemon.mnt / "committed/s")
    its = daemon.mnt / kind / "s/labels"
    run(its, "echo 1 > a && echo 2 > b && echo 3 > c && mv b d && rm c && echo 4 >> a")
    assert stored(its) == {"a": "1\n4", "d": "2"}
    assert sorted(os.listdir(its)) == ["a", "d"]
    assert stored(labels) == {}


def test_labels_stay_through_commit_and_rename(daemon: Daemon, labels: Path) -> None:
    (labels / "a").write_text("1")
    os.rename(daemon.mnt / "active/k", daemon.mnt / "committed/c")
    assert (daemon.mnt / "committed/c/labels/a").read_text() == "1\n"
    os.rename(daemon.mnt / "committed/c", daemon.mnt / "committed/d")
    assert stored(daemon.mnt / "committed/d/labels") == {"a": "1"}
    os.mkdir(daemon.mnt / "committed/d/active/child")
    assert stored(daemon.mnt / "active/child/labels") == {}, "a parent's labels are its own"


def test_a_label_is_in_info_json_at_once_and_updated_moves(labels: Path) -> None:
    snapshot, before = labels.parent, info(labels.parent)
    os.stat(snapshot / "info.json")
    (labels / "l").write_text("1")
    after = info(snapshot)
    assert after["labels"] == {"l": "1"}
    assert nanoseconds(after["updated"]) > nanoseconds(before["updated"])
    assert after["created"] == before["created"]
    assert os.stat(snapshot / "info.json").st_size == len((snapshot / "info.json").read_bytes())
    times = {os.stat(path).st_mtime_ns for path in (snapshot, snapshot / "info.json", labels, labels / "l")}
    assert times == {nanoseconds(after["updated"])}


def test_the_listing_is_stable(labels: Path) -> None:
    names = [f"label-{number}" for number in range(200)]
    for name in names:
        (labels / name).write_text(name)
    first = os.listdir(labels)
    assert sorted(first) == sorted(names)
    assert os.listdir(labels) == first
    inodes = {name: os.stat(labels / name).st_ino for name in names}
    assert len(set(inodes.values())) == len(names)
    with os.scandir(labels) as entries:
        seen = [next(entries).name]
        for name in first[1::2]:
            os.unlink(labels / name)
        seen += [entry.name for entry in entries]
    assert len(seen) == len(set(seen))
    assert [name for name in seen if name in first[::2]] == first[::2]
    assert {name: os.stat(labels / name).st_ino for name in first[::2]} == {name: inodes[name] for name in first[::2]}
    assert {name: (labels / name).read_text() for name in first[::2]} == {name: f"{name}\n" for name in first[::2]}


def test_colliding_label_keys(labels: Path) -> None:
    """Many labels of one snapshot: each keeps its own content, whatever their hashes."""
    wanted = {f"{number:x}": str(number) for number in range(COUNT)}
    for key, value in wanted.items():
        (labels / key).write_text(value)
    assert stored(labels) == wanted
    assert {key: (labels / key).read_text().rstrip("\n") for key in wanted} == wanted


# -- keys

KEYS = [
    "a/b",
    "100%",
    "with blank",
    " ",
    "line\nbreak",
    "tab\t",
    ".",
    "..",
    "...",
    "-n",
    "grün",
    "日本",
    "a=b,c",
    "\\",
    "'\"",
    "%2F",
]
KEYS += ["containerd.io/snapshot/overlay.upperdir", "containerd.io/gc.root", "info.json", "\u0085", "x" * 255, "ü" * 127]


def encoded(key: str) -> str:
    out = key.replace("%", "%25").replace("/", "%2F").replace("\n", "%0A").replace("\t", "%09").replace("\u0085", "%C2%85")
    return "%2E" + out[1:] if out in (".", "..") else out


@pytest.mark.parametrize("key", KEYS)
def test_label_keys(labels: Path, key: str) -> None:
    name = encoded(key)
    (labels / name).write_text("value")
    assert stored(labels) == {key: "value"}
    assert os.listdir(labels) == [name]
    assert (labels / name).read_text() == "value\n"
    os.rename(labels / name, labels / "other")
    os.rename(labels / "other", labels / name)
    assert stored(labels) == {key: "value"}
    os.unlink(labels / name)
    assert stored(labels) == {}


# -- refusals


def test_a_label_of_4096_bytes_fits_and_one_of_4097_does_not(daemon: Daemon, labels: Path) -> None:
    (labels / "key").write_text("x" * 4093)
    assert len(stored(labels)["key"]) == 4093
    for content in ("y" * 4094, "y" * 4095, "ü" * 2048, "y" * 100_000):
        reason = "at most 4096 fit"
        with refused(daemon, errno.E2BIG, "write", "active/k/labels/key", reason), open(labels / "key", "r+b", 0) as file:
            file.write(content.encode())
    assert stored(labels) == {"key": "x" * 4093}
    run(labels, f"printf '{'y' * 4093}\\n' > key")
    assert stored(labels) == {"key": "y" * 4093}, "the newline that is dropped does not count"


def test_more_labels_than_a_snapshot_may_have(daemon: Daemon, labels: Path) -> None:
    for number in range(COUNT):
        (labels / f"k{number}").write_text("v")
    before = stored(labels)
    with refused(daemon, errno.E2BIG, "write", "active/k/labels/more", f"257 labels; at most {COUNT} fit"):
        put(labels / "more", "v")
    assert stored(labels) == before
    (labels / "k0").rename(labels / "more")
    (labels / "k1").unlink()
    (labels / "k0").write_text("v")
    for number in range(2, 18):
        (labels / f"k{number}").write_text("v" * 3900)
    room = ROOM - sum(len(key) + len(value) for key, value in stored(labels).items())
    with refused(daemon, errno.E2BIG, "write", "active/k/labels/more", f"{ROOM + 1} bytes together, with keys; at most {ROOM}"):
        put(labels / "more", "v" * (room + 2))
    put(labels / "more", "v" * (room + 1))
    for number in range(COUNT):
        (labels / f"k{number}").unlink(missing_ok=True)
    assert list(stored(labels)) == ["more"]


def test_a_shell_that_writes_too_much_is_told_and_the_label_stays(labels: Path) -> None:
    (labels / "l").write_text("one")
    done = shell(labels, "head -c 5000 /usr/bin/env | tr -c x x | cat > l || echo failed")
    assert "Argument list too long" in done.stderr
    assert done.stdout == "failed\n"
    assert stored(labels) == {"l": "one"}
    done = shell(labels, "head -c 5000 /usr/bin/env | tr -c x x | cat > new")
    assert "Argument list too long" in done.stderr
    assert stored(labels) == {"l": "one"}
    assert os.listdir(labels) == ["l"]


@pytest.mark.parametrize("size", [4200, 9000])
@pytest.mark.parametrize("to", ["> l", ">> l", "1<> l"])
def test_the_rest_of_what_was_refused_is_not_the_label(labels: Path, size: int, to: str) -> None:
    """As bash writes what is longer than its buffer: the text, and then the newline, whatever came of the text."""
    (labels / "l").write_text("one")
    done = subprocess.run(["bash", "-c", f'echo "$0" {to}; echo $?', "x" * size], cwd=labels, capture_output=True, text=True)
    assert " write error: " in done.stderr
    assert done.stdout == "1\n"
    assert stored(labels) == {"l": "one"}


def test_what_is_emptied_begins_anew(labels: Path) -> None:
    """Through the descriptor by which too much was written."""
    fd = os.open(labels / "l", os.O_RDWR | os.O_CREAT)
    try:
        with failing(errno.E2BIG):
            os.write(fd, b"x" * 5000)
        with failing(errno.E2BIG):
            os.write(fd, b"y")
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"two\n", 0)
    finally:
        os.close(fd)
    assert stored(labels) == {"l": "two"}


@pytest.mark.parametrize(("size", "value"), [(0, None), (1, "o"), (3, "one"), (4, "one")])
def test_truncate_by_path(labels: Path, size: int, value: str | None) -> None:
    (labels / "l").write_text("one")
    os.truncate(labels / "l", size)
    assert stored(labels) == ({} if value is None else {"l": value})


def test_a_label_cannot_be_made_too_long_by_truncate(daemon: Daemon, labels: Path) -> None:
    (labels / "l").write_text("one")
    with refused(daemon, errno.E2BIG, "setattr", "active/k/labels/l", "4096"):
        os.truncate(labels / "l", 5000)


def test_appending_too_much(daemon: Daemon, labels: Path) -> None:
    (labels / "l").write_text("x" * 4000)
    with refused(daemon, errno.E2BIG, "write", "active/k/labels/l", "at most 4096 fit"), open(labels / "l", "ab", 0) as file:
        file.write(b"y" * 200)


def test_a_rename_to_a_key_with_which_it_is_too_big(daemon: Daemon, labels: Path) -> None:
    (labels / "l").write_text("x" * 4095)
    with refused(daemon, errno.E2BIG, "rename", "active/k/labels/l active/k/labels/longer", "at most 4096 fit"):
        os.rename(labels / "l", labels / "longer")


@pytest.mark.parametrize("content", [b"\xff", b"ok\xc3", b"\xed\xa0\x80"])
def test_a_value_that_is_not_utf8(daemon: Daemon, labels: Path, content: bytes) -> None:
    (labels / "l").write_text("one")
    with refused(daemon, errno.EILSEQ, "write", "active/k/labels/l", "UTF-8"), open(labels / "l", "r+b", 0) as file:
        file.write(content)


def test_a_key_that_is_not_utf8(daemon: Daemon, labels: Path) -> None:
    with refused(daemon, errno.EILSEQ, "create", "active/k/labels/%5Cxff".replace("%5C", "\\"), "UTF-8"):
        os.close(os.open(os.fsencode(labels) + b"/\xff", os.O_CREAT | os.O_WRONLY))


def test_a_key_that_is_too_long(daemon: Daemon, labels: Path) -> None:
    name = "x" * 256
    with refused(daemon, errno.ENAMETOOLONG, "create", f"active/k/labels/{name}", "255"):
        os.close(os.open(labels / name, os.O_CREAT | os.O_WRONLY))


@pytest.mark.parametrize("name", ["100%", "%2f", "%41", "a\nb", "%FF", "%"])
def test_a_key_that_is_not_encoded_as_it_should_be(daemon: Daemon, labels: Path, name: str) -> None:
    assert not os.path.lexists(labels / name)
    shown = name.replace("\n", "%0A")
    with refused(daemon, errno.EINVAL, "create", f"active/k/labels/{shown}", "no key's file name"):
        os.close(os.open(labels / name, os.O_CREAT | os.O_WRONLY))
    (labels / "l").write_text("one")
    with pytest.raises(OSError, match=r"not permitted|Invalid"):
        os.rename(labels / "l", labels / name)
    assert stored(labels) == {"l": "one"}


def test_o_excl(labels: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    fd = os.open(labels / "l", flags)
    with pytest.raises(FileExistsError):
        os.open(labels / "l", flags)
    os.write(fd, b"one\n")
    os.close(fd)
    with pytest.raises(FileExistsError):
        os.open(labels / "l", flags)
    assert stored(labels) == {"l": "one"}
    done = shell(labels, "set -C; echo two > l")
    assert done.returncode != 0
    assert stored(labels) == {"l": "one"}


def test_reading_a_label_that_is_not_there(labels: Path) -> None:
    with pytest.raises(FileNotFoundError):
        (labels / "none").read_text()
    with pytest.raises(FileNotFoundError):
        os.unlink(labels / "none")
    with pytest.raises(FileNotFoundError):
        os.rename(labels / "none", labels / "x")


def test_a_file_opened_for_reading_is_not_written(labels: Path) -> None:
    (labels / "l").write_text("one")
    with open(labels / "l", "rb", 0) as file, failing(errno.EBADF):
        os.write(file.fileno(), b"x")
    assert stored(labels) == {"l": "one"}


# -- open files


def test_r_plus_reads_and_writes_in_place(labels: Path) -> None:
    (labels / "l").write_text("one two three")
    with open(labels / "l", "r+") as file:
        assert file.read() == "one two three\n"
        file.seek(4)
        file.write("TWO")
        file.flush()
        assert stored(labels) == {"l": "one TWO three"}
        assert os.fstat(file.fileno()).st_size == 14
        file.seek(0)
        assert file.read() == "one TWO three\n"
        file.truncate(3)
        assert os.fstat(file.fileno()).st_size == 3
    assert stored(labels) == {"l": "one"}
    assert (labels / "l").read_text() == "one\n"


def test_a_write_is_applied_when_it_is_written(labels: Path) -> None:
    with open(labels / "l", "wb", 0) as file:
        assert stored(labels) == {}, "not yet: an empty value is none"
        file.write(b"on")
        assert stored(labels) == {"l": "on"}
        file.write(b"e\n")
        assert stored(labels) == {"l": "one"}
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())


def test_a_new_label_can_be_found_while_it_is_open(labels: Path) -> None:
    with open(labels / "l", "wb", 0) as file:
        assert os.path.lexists(labels / "l")
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(labels / "l"))
        file.write(b"one")
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(labels / "l"))
        assert os.listdir(labels) == ["l"]


def test_unlinked_while_open(labels: Path) -> None:
    (labels / "l").write_text("one")
    with open(labels / "l", "rb", 0) as reader:
        os.unlink(labels / "l")
        assert reader.read() == b"one\n"
    with open(labels / "m", "wb", 0):
        os.unlink(labels / "m")
        assert not os.path.lexists(labels / "m")
    assert stored(labels) == {}
    assert os.listdir(labels) == []


def test_removed_with_its_snapshot_while_open(daemon: Daemon, labels: Path) -> None:
    (labels / "l").write_text("one")
    with open(labels / "l", "rb", 0) as reader, open(labels / "l", "r+b", 0) as writer:
        os.rmdir(labels.parent)
        assert reader.read() == b"one\n"
        with failing(errno.ENOENT):
            writer.write(b"x")
    assert not os.path.lexists(labels.parent)
    os.mkdir(daemon.mnt / "active/k")
    assert stored(labels) == {}


def test_renamed_while_open(labels: Path) -> None:
    with open(labels / "one", "wb", 0) as file:
        file.write(b"1")
        os.rename(labels / "one", labels / "two")
        assert os.fstat(file.fileno()).st_size in (1, 2)
        file.write(b"2")
        assert stored(labels) == {"two": "12"}
        assert os.listdir(labels) == ["two"]
    assert stored(labels) == {"two": "12"}
    assert (labels / "two").read_text() == "12\n"


def test_renamed_while_open_and_still_empty(labels: Path) -> None:
    with open(labels / "one", "wb", 0) as file:
        os.rename(labels / "one", labels / "two")
        assert not os.path.lexists(labels / "one")
        file.write(b"1")
    assert stored(labels) == {"two": "1"}


def test_the_snapshot_is_renamed_and_committed_while_a_label_is_open(daemon: Daemon, labels: Path) -> None:
    with open(labels / "l", "wb", 0) as file:
        file.write(b"1")
        os.rename(daemon.mnt / "active/k", daemon.mnt / "active/m")
        file.write(b"2")
        os.rename(daemon.mnt / "active/m", daemon.mnt / "committed/c")
        file.write(b"3")
    assert stored(daemon.mnt / "committed/c/labels") == {"l": "123"}


def test_an_atomic_replacement_as_editors_do_it(labels: Path) -> None:
    (labels / "l").write_text("one")
    with open(labels / "l", "rb", 0) as reader:
        with open(labels / ".l.new", "xb") as file:
            file.write(b"two\n")
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fchown(file.fileno(), os.getuid(), os.getgid())
            os.fsync(file.fileno())
        os.rename(labels / ".l.new", labels / "l")
        assert reader.read() == b"one\n"
    assert stored(labels) == {"l": "two"}
    assert (labels / "l").read_text() == "two\n"


# -- at the same time


def test_two_writers_each_apply_what_they_wrote(labels: Path) -> None:
    with open(labels / "l", "wb", 0) as one, open(labels / "l", "wb", 0) as two:
        one.write(b"first")
        assert stored(labels) == {"l": "first"}
        two.write(b"second")
        assert stored(labels) == {"l": "second"}, "the last write wins, wholly"
    assert stored(labels) == {"l": "second"}


def test_writers_of_different_labels_do_not_lose_each_others(labels: Path) -> None:
    script = "for i in $(seq 40); do echo $i > $0; done"
    writers = [subprocess.Popen(["sh", "-c", script, f"w{number}"], cwd=labels) for number in range(5)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 5
    assert stored(labels) == {f"w{number}": "40" for number in range(5)}


READER = """
import json, os, sys
seen = set()
while not os.path.exists(sys.argv[2]):
    seen.add(open(sys.argv[1] + "/labels/l").read())
    seen.add(json.load(open(sys.argv[1] + "/info.json"))["labels"].get("l", "MISSING") + "\\n")
print(json.dumps(sorted(seen)))
"""


@pytest.mark.parametrize(
    "command", ["echo {} > l", "printf %s {} > l", "sed -i s/.*/{}/ l", "echo {} > n; mv n l", "cp ../../../../{} l"]
)
def test_a_reader_never_misses_a_label_that_is_being_replaced(labels: Path, tmp_path: Path, command: str) -> None:
    values = ["a" * 3000, "b"]
    for value in values:
        (labels.parents[3] / value[:200]).write_text(value)
    (labels / "l").write_text(values[0])
    stop = tmp_path / "stop"
    arguments = [sys.executable, "-c", READER, str(labels.parent), str(stop)]
    readers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for turn in range(60):
            run(labels, command.format(values[turn % 2][:200] if "cp" in command else values[turn % 2]))
    finally:
        stop.touch()
        results = [reader.communicate(timeout=60)[0] for reader in readers]
    for reader, said in zip(readers, results, strict=True):
        assert reader.returncode == 0, "a label was missing"
        assert set(json.loads(said)) <= {f"{value}\n" for value in values}


def test_a_reader_keeps_the_content_that_it_opened(labels: Path) -> None:
    (labels / "l").write_text("one")
    with open(labels / "l", "rb", 0) as first:
        (labels / "l").write_text("a longer one")
        with open(labels / "l", "rb", 0) as second:
            (labels / "l").write_text("3")
            assert second.read() == b"a longer one\n"
            assert first.read() == b"one\n"
            first.seek(0)
            assert first.read() == b"one\n"
    assert (labels / "l").read_bytes() == b"3\n"


def test_appending_threads(labels: Path) -> None:
    """Each append is one write by an open of its own; none is torn."""

    def append(letter: str) -> None:
        for _ in range(20):
            with open(labels / letter, "a") as file:
                file.write(letter)

    threads = [threading.Thread(target=append, args=(letter,)) for letter in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: value.replace("\n", "") for key, value in stored(labels).items()} == {key: key * 20 for key in "xyz"}


def test_a_label_goes_though_its_snapshot_could_not(daemon: Daemon, labels: Path) -> None:
    """One process is refused to remove a snapshot for its children, and then deletes a label of it: that is no rm -r."""
    base = daemon.mnt / "committed/parent"
    os.mkdir(daemon.mnt / "active/parent")
    os.rename(daemon.mnt / "active/parent", base)
    os.mkdir(base / "active/child")
    (base / "labels/l").write_text("one")
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(base)
    os.unlink(base / "labels/l")
    assert os.listdir(base / "labels") == []
    os.rmdir(daemon.mnt / "active/child")
    os.rmdir(base)


def test_readers_of_a_label_that_is_replaced_all_the_time_see_one_value_each(labels: Path) -> None:
    path = labels / "l"
    path.write_text("A" * 65 * 13 + "\n")
    running = readers(path, 200, r'data == data[:1] * data[0] * 13 + b"\n"')
    values = random.Random(3)
    while any(reader.poll() is None for reader in running):
        byte = values.randrange(65, 123)
        path.write_text(chr(byte) * byte * 13 + "\n")  # opens with O_TRUNC
    are_content(running)


WRITER = """
import os, sys
for number in range(int(sys.argv[2])):
    with open(sys.argv[1], "w") as label:
        label.write(sys.argv[3] * (100 + number))
"""


@pytest.mark.mounts
def test_writers_whose_pids_the_daemon_cannot_see(tmp_path: Path) -> None:
    """To a daemon in a pid namespace of its own they are all the same process."""
    (tmp_path / "mnt").mkdir()
    serve = [sys.executable, "-m", "snapfs.cli", "serve", str(tmp_path / "root"), str(tmp_path / "mnt")]
    command = ["unshare", "--pid", "--fork", "--kill-child", *serve]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as daemon:
        try:
            assert daemon.stderr is not None
            assert daemon.stderr.readline().startswith("snapfs: serving ")
            os.mkdir(tmp_path / "mnt/active/a")
            path = tmp_path / "mnt/active/a/labels/l"
            path.write_text("first")
            writers = [
                subprocess.Popen([sys.executable, "-c", WRITER, str(path), "300", letter], stderr=subprocess.PIPE, text=True)
                for letter in "xyz"
            ]
            while any(writer.poll() is None for writer in writers):
                seen = path.read_text()
                assert seen == "first\n" or (len(set(seen[:-1])) == 1 and seen.endswith("\n")), "one value, whole"
            for writer in writers:
                assert writer.communicate()[1] == ""
                assert writer.returncode == 0
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
