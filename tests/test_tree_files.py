"""What the files hold, read by real tools and through every system call that reads."""

from __future__ import annotations

import io
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import snapfs
from tests.daemon import Daemon
from tests.reading import WAYS, are_content, readers
from tests.tree import committed, info, nanoseconds, remove_all, shell, usage


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    """One daemon for all tests here; each leaves it empty."""
    return module_daemon


@pytest.fixture
def tree(daemon: Daemon) -> Iterator[Path]:
    """A committed snapshot with an active child, a view, and a label."""
    base = committed(daemon.mnt, "base", content="below")
    os.mkdir(base / "active/web")
    os.mkdir(base / "view/peek")
    (daemon.mnt / "active/web/labels/team").write_text("blue")
    (daemon.mnt / "active/web/labels/long").write_text("x" * 4000)
    yield daemon.mnt
    remove_all(daemon.mnt)


FILES = [
    "README",
    ".nomedia",
    ".snapfs/version",
    "active/web/mounts.json",
    "active/web/mount.sh",
    "active/web/info.json",
    "active/web/usage.json",
    "active/web/labels/team",
    "active/web/labels/long",
    "view/peek/mounts.json",
    "view/peek/mount.sh",
    "view/peek/info.json",
    "view/peek/usage.json",
    "committed/base/info.json",
    "committed/base/usage.json",
]


def through_sendfile(path: Path) -> bytes:
    target = os.memfd_create("target")
    source = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(source).st_size
        assert os.sendfile(target, source, 0, size) == size
        return os.pread(target, size + 1, 0)
    finally:
        os.close(source)
        os.close(target)


def through_mmap(path: Path, flags: int) -> bytes:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped:
        return bytes(mapped)


def through_shutil(path: Path) -> bytes:
    target = f"/dev/shm/snapfs-{os.getpid()}"
    try:
        shutil.copyfile(path, target)
        return Path(target).read_bytes()
    finally:
        os.unlink(target)


def byte_by_byte(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(1), b""))


def backwards(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        places = range(0, os.fstat(file.fileno()).st_size, 7)
        return b"".join([os.pread(file.fileno(), 7, at) for at in reversed(places)][::-1])


CALLS: dict[str, Callable[[Path], bytes]] = {
    "sendfile": through_sendfile,
    "private mmap": lambda path: through_mmap(path, mmap.MAP_PRIVATE),
    "shared mmap": lambda path: through_mmap(path, mmap.MAP_SHARED),
    "shutil.copyfile": through_shutil,
    "byte by byte": byte_by_byte,
    "backwards": backwards,
}

TOOLS = [
    "cat {path}",
    "busybox cat {path}",
    "cp {path} {tmp} && cat {tmp}",
    "cp --sparse=always {path} {tmp} && cat {tmp}",
    "busybox cp {path} {tmp} && cat {tmp}",
    "install {path} {tmp} && cat {tmp}",
    "dd if={path} bs=1 status=none",
    "dd if={path} bs=4096 status=none",
    "busybox dd if={path} bs=7 2>/dev/null",
    "head -c 100000 {path}",
    "tail -c 100000 {path}",
    "tail -n +1 {path}",
    "busybox tail -n +1 {path}",
    "grep -a '' {path}",
    "busybox grep '' {path}",
    "awk '{{print}}' {path}",
    "sed '' {path}",
    "tac {path} | tac",
    "head -c $(wc -c < {path}) {path}",
    "tar cf - {path} | tar xOf -",
    "tar cf - {path} | busybox tar xOf -",
    "busybox tar cf - {path} | tar xOf -",
    "tar czf - {path} | tar xzOf -",
]


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_read_right(tree: Path, tmp_path: Path, path: str) -> None:
    expected = (tree / path).read_bytes()
    assert len(expected) > 1
    assert expected.endswith(b"\n")
    assert os.stat(tree / path).st_size == len(expected)
    for name, call in CALLS.items():
        assert call(tree / path) == expected, name
    for tool in TOOLS:
        done = subprocess.run(
            ["sh", "-c", tool.format(path=path, tmp=tmp_path / "copy")], cwd=tree, capture_output=True, timeout=30, check=False
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, b"", expected), tool
    assert shell(tree, f"wc -c < {path}").stdout.strip() == str(len(expected))
    assert shell(tree, f"stat -c %s {path}").stdout.strip() == str(len(expected))


def test_the_very_first_reader_after_a_start_reads_it_right(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/web")
    for number in range(40):
        (daemon.mnt / f"active/web/diff/{number}").write_bytes(b"x" * 5000)
    for tool in ("busybox cat", "busybox cp", "sendfile"):
        assert daemon.stop() == 0
        daemon.start()  # it knows nothing of the usage yet
        path = daemon.mnt / "active/web/usage.json"
        assert os.stat(path).st_size > 0, "never empty, though not yet known"
        if tool == "busybox cat":
            found = shell(daemon.mnt, "busybox cat active/web/usage.json").stdout
        elif tool == "busybox cp":
            found = shell(daemon.mnt, "busybox cp active/web/usage.json ../copy && cat ../copy").stdout
        else:
            found = through_sendfile(path).decode()
        assert json.loads(found)["inodes"] == 41, tool
        assert os.stat(path).st_size == len(found), "settled by open"
    assert daemon.stop() == 0


def unmounted(content: bytes) -> bytes:
    """``content`` without what an info.json says of where the snapshot is mounted: who reads all links has them mounted."""
    return re.sub(rb'"mounted": \[[^]]*\]', b"", content)


def test_the_whole_tree_in_a_tar(tree: Path) -> None:
    for layer in tree.glob("committed/*/layer.tar"):
        layer.read_bytes()  # as tar does, which has info.json say its digest
    for command in ("tar cf - active view committed README by-id", "busybox tar cf - active view committed README by-id"):
        done = subprocess.run(command.split(), cwd=tree, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            held = {member.name: member for member in archive.getmembers()}
            for path in FILES:
                if not path.startswith("."):
                    content = archive.extractfile(held[path])
                    assert content is not None
                    assert unmounted(content.read()) == unmounted((tree / path).read_bytes()), path
            assert held["committed/base/active/web"].linkname == "../../../active/web"
            assert held["active/web/parent"].linkname == "../../committed/base"


def test_cp_a_of_a_snapshot(tree: Path, tmp_path: Path) -> None:
    for number, command in enumerate(("cp -a", "busybox cp -a")):
        assert shell(tree, f"{command} active/web {tmp_path}/copy{number}").stderr == ""
        for name in ("mounts.json", "info.json", "labels/team", "mount.sh"):
            assert (tmp_path / f"copy{number}" / name).read_bytes() == (tree / "active/web" / name).read_bytes()
        times = [int(os.stat(path).st_mtime) for path in (tmp_path / f"copy{number}/info.json", tree / "active/web/info.json")]
        assert times[0] == times[1]


# -- shape


def test_json_is_indented_by_two_and_ends_in_a_newline(tree: Path) -> None:
    for path in FILES:
        if path.endswith(".json"):
            text = (tree / path).read_text()
            assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_json_keeps_text_as_it_is(tree: Path) -> None:
    (tree / "active/web/labels/grün").write_text('日本 "quoted" \\ \x01 \u2028\n')
    text = (tree / "active/web/info.json").read_text()
    assert json.loads(text)["labels"]["grün"] == '日本 "quoted" \\ \x01 \u2028'
    assert "日本" in text


def test_info_json(tree: Path) -> None:
    fields = ["name", "kind", "id", "parent", "labels", "created", "updated", "origin", "mounted"]
    base, web, peek = (info(tree / path) for path in ("committed/base", "active/web", "view/peek"))
    for found in (base, web, peek):
        assert list(found) == fields
        for time in ("created", "updated"):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", found[time])
        assert nanoseconds(found["created"]) <= nanoseconds(found["updated"])
    assert (base["name"], base["kind"], base["parent"], base["labels"]) == ("base", "committed", None, {})
    assert (web["name"], web["kind"], web["parent"]) == ("web", "active", "base")
    assert web["labels"] == {"team": "blue", "long": "x" * 4000}
    assert (peek["name"], peek["kind"], peek["parent"], peek["labels"]) == ("peek", "view", "base", {})
    assert [type(found["id"]) for found in (base, web, peek)] == [int] * 3


def test_usage_json(tree: Path) -> None:
    assert list(usage(tree / "active/web")) == ["inodes", "size", "shared"]
    assert usage(tree / "active/web")["inodes"] == 1
    assert usage(tree / "committed/base")["inodes"] == 2
    assert usage(tree / "view/peek") == {"inodes": 0, "size": 0, "shared": 0}


def test_mounts_json(daemon: Daemon, tree: Path) -> None:
    def layer(path: str) -> str:
        return f"{daemon.root}/snapshots/{info(tree / path)['id']}"

    def spec(path: str) -> Any:
        return json.loads((tree / path / "mounts.json").read_text())

    base, web = layer("committed/base"), layer("active/web")
    options = [f"workdir={web}/work", f"upperdir={web}/fs", f"lowerdir={base}/fs", "index=off"]
    assert spec("active/web") == [{"type": "overlay", "source": "overlay", "options": options}]
    assert spec("view/peek") == [{"type": "bind", "source": f"{base}/fs", "options": ["ro", "rbind"]}]
    os.mkdir(tree / "active/alone")
    own = layer("active/alone")
    assert spec("active/alone") == [{"type": "bind", "source": f"{own}/fs", "options": ["rw", "rbind"]}]
    os.rename(tree / "active/web", tree / "committed/v1")
    os.mkdir(tree / "committed/v1/view/deep")
    assert spec("view/deep") == [
        {"type": "overlay", "source": "overlay", "options": [f"lowerdir={web}/fs:{base}/fs", "index=off"]}
    ]


def test_version_and_readme(tree: Path) -> None:
    assert (tree / ".snapfs/version").read_text() == f"{snapfs.__version__}\n"
    readme = (tree / "README").read_text()
    assert 15 <= len(readme.splitlines()) <= 25
    for grammar in ("P/active/K", "P/view/K", "P/committed/N", "mkdir", "rmdir", "mv"):
        assert grammar in readme


def test_usage_of_an_active_snapshot_is_fresh_at_open(tree: Path) -> None:
    before = usage(tree / "active/web")
    for number in range(1, 15):
        (tree / f"active/web/diff/{number}").write_bytes(b"x" * 10_000 * number)
        subprocess.run(["sync", "-f", str(tree / "active/web/diff/")], check=True)
        with open(tree / "active/web/usage.json", "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size
            text = file.read()
        assert len(text) == size
        assert json.loads(text)["inodes"] == before["inodes"] + number
        taken = sum(entry.stat().st_blocks * 512 for entry in (tree / "active/web/diff").iterdir())
        assert json.loads(text)["size"] == before["size"] + taken


# -- one consistent content


def test_a_file_that_is_open_keeps_its_content_and_size(tree: Path) -> None:
    path = tree / "active/web/info.json"
    with open(path, "rb", 0) as first:
        before = os.fstat(first.fileno()).st_size
        (tree / "active/web/labels/long").write_text("short")
        with open(path, "rb", 0) as second:
            (tree / "active/web/labels/more").write_text("y" * 2000)
            assert json.loads(second.read())["labels"] == {"team": "blue", "long": "short"}
            text = first.read()
            assert len(text) == before
            assert json.loads(text)["labels"] == {"team": "blue", "long": "x" * 4000}
            first.seek(0)
            assert first.read() == text
    assert info(tree / "active/web")["labels"] == {"team": "blue", "long": "short", "more": "y" * 2000}
    assert os.stat(path).st_size == len(path.read_bytes())


def test_a_file_can_be_read_on_when_its_snapshot_is_gone(tree: Path) -> None:
    with open(tree / "active/web/info.json", "rb", 0) as file, open(tree / "active/web/mounts.json", "rb", 0) as spec:
        os.rmdir(tree / "active/web")
        assert json.loads(file.read())["name"] == "web"
        assert json.loads(spec.read())[0]["type"] == "overlay"


WRITER = """
import sys
for turn in range(int(sys.argv[2])):
    for key in ("a", "b"):
        with open(sys.argv[1] + "/labels/" + key, "w") as file:
            file.write(str(turn % 10) * (turn * 37 % 1900 + 1))
"""


def test_readers_beside_a_writer_see_whole_states(tree: Path) -> None:
    """Label b follows label a, so each state has both of the same turn, or a one ahead; every value is one digit repeated."""
    snapshot = tree / "active/web"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(snapshot), "150"])
    states = 0
    try:
        while writer.poll() is None:
            with open(snapshot / "info.json", "rb", 0) as held:
                now = json.loads((snapshot / "info.json").read_bytes())["labels"]
                then = json.loads(held.read())["labels"]
            for labels in (then, now):
                for value in (labels.get("a", "0"), labels.get("b", "0")):
                    assert set(value) == {value[0]}
                assert (int(labels.get("a", "0")[0]) - int(labels.get("b", "0")[0])) % 10 in (0, 1)
            states += 1
    finally:
        assert writer.wait(timeout=60) == 0
    assert states > 20


# -- mount.sh


def mounts_at(target: Path) -> list[str]:
    """The types of what is mounted there."""
    done = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "--mountpoint", str(target)], capture_output=True, text=True)
    return done.stdout.split()


SHELLS = ["dash", "bash", "busybox sh", "bash --posix"]
TARGETS = [
    "target",
    "with blanks  in it",
    "quote'd",
    'double"quote',
    "back\\slash",
    "$HOME`id`",
    "semi;colon",
    "co,mma:colon",
    "-dash",
    "ünï",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shell_name", SHELLS)
def test_mount_sh_mounts(tree: Path, tmp_path: Path, shell_name: str, target: str) -> None:
    os.mkdir(tree / "active/alone")
    (tree / "active/alone/diff/own").write_text("alone")
    (tmp_path / target).mkdir()
    for kind, name, file, content in (
        ("active", "web", "file", "below"),
        ("view", "peek", "file", "below"),
        ("active", "alone", "own", "alone"),
    ):
        script = [*shell_name.split(), str(tree / kind / name / "mount.sh"), target]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
        try:
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert (tmp_path / target / file).read_text() == content
            assert os.access(tmp_path / target, os.W_OK) is (kind == "active")
            if kind == "active":
                (tmp_path / target / "new").write_text("x")
                assert (tree / kind / name / "diff/new").read_text() == "x"
        finally:
            subprocess.run(["umount", "--", str(tmp_path / target)], check=True)


def test_mount_sh_is_executable(tree: Path, tmp_path: Path) -> None:
    subprocess.run([tree / "active/web/mount.sh", tmp_path], check=True, timeout=30)
    try:
        assert mounts_at(tmp_path) == ["overlay"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("arguments", [[], ["one", "two"]])
@pytest.mark.parametrize("path", ["active/web", "view/peek"])
def test_mount_sh_without_exactly_one_target(tree: Path, path: str, arguments: list[str]) -> None:
    done = subprocess.run(["sh", tree / path / "mount.sh", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: sh mount.sh TARGET\n")


@pytest.mark.parametrize("path", ["active/web", "view/peek"])
def test_mount_sh_fails_where_mount_does(tree: Path, tmp_path: Path, path: str) -> None:
    script = ["sh", str(tree / path / "mount.sh"), str(tmp_path / "missing")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "missing" in done.stderr


ROOTS = ["a:b", "a,b", "a\\b", "a b", "it's", 'q"q', "a:b,c\\d e'f", "$x`y`", "\\:", "new\nline", "a%2Fb#c", "ünï"]


@pytest.mark.parametrize("name", ROOTS)
def test_roots_with_awkward_paths(make_daemon: Callable[..., Daemon], tmp_path: Path, name: str) -> None:
    daemon = make_daemon(root=tmp_path / name / "root").start()
    tree = daemon.mnt
    base = committed(tree, "base", content="below")
    committed(tree, "middle", parent="base")
    os.mkdir(tree / "committed/middle/active/web")
    os.mkdir(tree / "committed/middle/view/deep")
    os.mkdir(base / "view/peek")
    os.mkdir(tree / "active/alone")
    target = tmp_path / "target"
    target.mkdir()
    for path, file in (("active/web", "file"), ("view/deep", "file"), ("view/peek", "file"), ("active/alone", None)):
        for shell_name in ("dash", "bash", "busybox sh"):
            script = [*shell_name.split(), str(tree / path / "mount.sh"), str(target)]
            done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr) == (0, ""), path
            try:
                if file is not None:
                    assert (target / file).read_text() == "below"
                if path.startswith("active"):
                    (target / "new").write_text("x")
                    assert Path(tree, path, "diff/new").read_text() == "x"
                    with pytest.raises(OSError, match="busy"):
                        os.rename(tree / path, tree / "committed/v")
            finally:
                subprocess.run(["umount", str(target)], check=True)
    assert daemon.stop() == 0


def test_readers_of_a_file_that_changes_all_the_time_see_one_text_each(daemon: Daemon, tree: Path) -> None:
    check = r'data.endswith(b"}\n") and json.loads(data)'
    running = readers(tree / "active/web/info.json", 100, check, [*WAYS, "by size", "sendfile"])
    lengths = random.Random(2)
    while any(reader.poll() is None for reader in running):
        (tree / "active/web/labels/team").write_text("x" * lengths.choice((1, 40, 3000)))
    are_content(running)


REPLACING = """
import errno, sys
from pyfuse3 import FUSEError
from snapfs.cli import main
from snapfs.fuse.operations import Operations

opened = Operations.open

async def replacing(self, *args):
    try:
        return await opened(self, *args)
    except FUSEError as error:
        if error.errno == errno.ESTALE and not hasattr(self, "replaced"):
            self.replaced = True
            await self.tree.snapshotter.remove("web", wait=False)
            await self.tree.snapshotter.prepare("web", labels={"team": "red"})
        raise

Operations.open = replacing
sys.exit(main(sys.argv[1:]))
"""
"""A daemon in which another snapshot has the name "web" when the kernel looks up again who has it."""


@pytest.fixture
def replaced(make_daemon: Callable[..., Daemon]) -> Path:
    """An active snapshot with one file and a label, which is another one, with another label, when it is looked at twice."""
    daemon = make_daemon()
    daemon.program = ("-c", REPLACING)
    web = daemon.start().mnt / "active/web"
    os.mkdir(web)
    (web / "diff/file").write_text("old")
    return web


def test_who_reads_a_file_while_its_snapshot_is_replaced_reads_that_of_the_new_one(replaced: Path) -> None:
    assert (replaced / "changes").read_text() == ""
    assert info(replaced)["labels"] == {"team": "red"}


def test_who_writes_a_label_while_its_snapshot_is_replaced_writes_that_of_the_new_one(replaced: Path) -> None:
    (replaced / "labels/team").write_text("blue")  # made: nobody had to look twice
    assert info(replaced)["id"] == 1
    with open(replaced / "labels/team", "a") as label:
        label.write("green")
    assert info(replaced)["id"] == 2
    assert info(replaced)["labels"] == {"team": "red\ngreen"}
