"""``snapfs serve``: how it starts, what its options do, how it ends, and what it refuses to begin with."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import trio

from snapfs.fuse import serve
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import MountPoint
from tests.daemon import SERVE, Daemon, refusal
from tests.mounts import is_mounted
from tests.processes import die_with_parent, until
from tests.refusals import failing
from tests.tree import committed, info, shell

Make = Callable[..., Daemon]


# -- starting


def test_it_says_in_one_line_when_it_is_ready(make_daemon: Make) -> None:
    daemon = make_daemon()
    process = subprocess.Popen(
        [*SERVE, str(daemon.root), str(daemon.mnt)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == f"snapfs: serving {daemon.root} on {daemon.mnt}\n"
        assert is_mounted(daemon.mnt)
        os.mkdir(daemon.mnt / "active/a")
        process.terminate()
        assert process.stderr.read() == "snapfs: ended: SIGTERM\n"
        assert process.stdout.read() == ""
        assert process.wait(timeout=30) == 0


def test_who_reads_no_further_than_that_it_is_ready_does_it_no_harm(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    daemon.process.stderr.close()
    daemon.process.terminate()
    assert daemon.process.wait(timeout=30) == 0


def test_the_root_is_made_where_it_is_missing(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon(root=tmp_path / "not/yet/there").start()
    assert [oct(os.stat(path).st_mode & 0o777) for path in (daemon.root, daemon.root / "snapshots")] == ["0o700", "0o700"]
    assert daemon.stop() == 0


@pytest.mark.mounts
def test_relative_paths_and_a_mountpoint_that_is_a_link(tmp_path: Path) -> None:
    for name in ("mnt", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("mnt")
    for mountpoint in ("mnt", "link", "./mnt/"):
        process = subprocess.Popen(
            [*SERVE, "root", mountpoint], cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        with process:
            assert process.stderr is not None
            assert process.stderr.readline() == f"snapfs: serving root on {mountpoint}\n"
            assert sorted(os.listdir(tmp_path / "mnt"))[-1] == "view"
            process.terminate()
            assert process.wait(timeout=30) == 0
        assert not is_mounted(tmp_path / "mnt")


def test_the_mount_table_says_what_it_is(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    command = ["findmnt", "-n", "-o", "FSTYPE,SOURCE", "--mountpoint", str(daemon.mnt)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "fuse.snapfs",
        str(daemon.root),
    ]
    assert daemon.stop() == 0


# -- ending


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(make_daemon: Make, how: signal.Signals) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    assert daemon.stop(how) == 0
    assert len(daemon.said) == 1
    assert daemon.last == f"snapfs: ended: {how.name}\n"
    assert not is_mounted(daemon.mnt)
    assert os.listdir(daemon.mnt) == []
    assert os.listdir(daemon.root / "pool") == []
    assert os.listdir(daemon.root / "trash") == []
    assert os.listdir(daemon.root / "snapshots") == ["1"]


@pytest.mark.parametrize("command", ["umount", "umount -l", "fusermount3 -u", "fusermount3 -uz"])
def test_umount_ends_it(make_daemon: Make, command: str) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    subprocess.run([*command.split(), str(daemon.mnt)], check=True)
    assert daemon.ended() == 0
    assert len(daemon.said) == 1
    assert daemon.last == "snapfs: ended: unmounted\n"
    assert not is_mounted(daemon.mnt)
    assert os.listdir(daemon.root / "pool") == []


def test_umount_ends_it_while_another_user_has_a_copy(make_daemon: Make, tmp_path: Path) -> None:
    """In a mount namespace that was made meanwhile, by somebody who may do nothing in the tree; a mount more or less, and one
    that is moved, don't end it."""
    daemon = make_daemon().start()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    mounting.mount("none", str(tmp_path / "here"), "tmpfs")
    subprocess.run(["mount", "--move", tmp_path / "here", tmp_path / "there"], check=True)
    mounting.unmount(str(tmp_path / "there"))
    script = "echo here; exec sleep 60"
    stranger = ["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups", "unshare", "-Urm", "sh", "-c", script]
    with subprocess.Popen(stranger, stdout=subprocess.PIPE, preexec_fn=die_with_parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        os.mkdir(daemon.mnt / "active/a")
        subprocess.run(["umount", daemon.mnt], check=True)
        assert daemon.ended() == 0
        assert daemon.last == "snapfs: ended: unmounted\n"
        daemon.said.clear()
        daemon.start()
        assert os.listdir(daemon.mnt / "active") == ["a"]
        process.kill()


def test_an_aborted_connection_ends_it(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    connection = os.minor(os.stat(daemon.mnt).st_dev)
    (tmp_path / "connections").mkdir()
    mounting.mount("none", str(tmp_path / "connections"), "fusectl")
    try:
        (tmp_path / f"connections/{connection}/abort").write_text("1")
    finally:
        mounting.unmount(str(tmp_path / "connections"))
    assert daemon.ended() == 0
    assert len(daemon.said) == 1
    assert daemon.last == "snapfs: ended: the FUSE connection was aborted; the next start recovers the mountpoint\n"
    daemon.start()
    assert daemon.stop() == 0
    assert daemon.last == "snapfs: ended: SIGTERM\n"


FAULTY = """
import sys
import snapfs.fuse.serve
from snapfs.cli import main

async def serve(root, mountpoint, options, mount, on_ready, on_stop):
    print("snapfs: serving nothing", file=sys.stderr)
    raise ExceptionGroup("two", [ValueError("one"), KeyError("other")])

snapfs.fuse.serve.serve = serve
sys.exit(main(sys.argv[1:]))
"""


def test_a_fault_of_its_own_ends_it(make_daemon: Make) -> None:
    """The traceback is there, and the last line says what it was, which a traceback of a group does not."""
    daemon = make_daemon()
    daemon.program = ("-c", FAULTY)
    daemon.start()
    assert daemon.ended() == 1
    assert "a fault of snapfs has ended it" in daemon.said[1]
    assert any("Traceback" in line for line in daemon.said)
    assert daemon.last == "snapfs: ended: ExceptionGroup: two (2 sub-exceptions)\n"


@pytest.mark.parametrize("signals", [[signal.SIGINT] * 2, [signal.SIGTERM] * 2, [signal.SIGTERM, signal.SIGINT] * 5])
def test_signalled_more_than_once(make_daemon: Make, signals: list[signal.Signals]) -> None:
    daemon = make_daemon().start()
    for one in signals:
        os.kill(daemon.pid, one)
    assert daemon.ended() == 0
    assert len(daemon.said) == 1
    assert daemon.last in {f"snapfs: ended: {one.name}\n" for one in signals}
    assert not is_mounted(daemon.mnt)


def test_stopped_while_somebody_sits_inside(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    command = ["sh", "-c", "echo in; read line; ls . ; exit 0"]
    sitter = subprocess.Popen(
        command, cwd=daemon.mnt / "active/a", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    held = os.open(daemon.mnt / "active/a/info.json", os.O_RDONLY)
    try:
        assert sitter.stdout is not None
        assert sitter.stdout.readline() == "in\n"
        assert daemon.stop() == 0
        with failing(errno.ENOTCONN):
            os.pread(held, 1, 0)
        assert not is_mounted(daemon.mnt)
    finally:
        with contextlib.suppress(OSError):  # as its daemon is gone
            os.close(held)
        _, said = sitter.communicate("\n", timeout=30)
    assert "Transport endpoint is not connected" in said
    daemon.start()
    assert os.listdir(daemon.mnt / "active") == ["a"]
    assert daemon.stop() == 0


BUSY = """
import os, sys
made = 0
try:
    while True:
        os.mkdir(f"{sys.argv[1]}/active/{sys.argv[2]}-{made}")
        made += 1
        if made == 5:
            print("busy", flush=True)
except OSError:
    print(made, flush=True)
"""


@pytest.mark.durable
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "umount -l"])
def test_ended_while_requests_are_under_way(make_daemon: Make, how: signal.Signals | str) -> None:
    """However it ends, everything that was acknowledged is there afterwards, and at most what was under way besides."""
    daemon = make_daemon().start()
    clients = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(daemon.mnt), str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "busy\n"
        if isinstance(how, signal.Signals):
            status = daemon.stop(how)
        else:
            subprocess.run([*how.split(), str(daemon.mnt)], check=True)
            status = None  # those who are inside by then go on; it ends with the last of them
    finally:
        if how == "umount -l":
            daemon.ended()
        made = [int(client.communicate(timeout=30)[0]) for client in clients]
    assert status in (0, None) or status == -signal.SIGKILL
    assert len(daemon.said) == 1
    daemon.start()
    names = os.listdir(daemon.mnt / "active")
    for number, count in enumerate(made):
        own = sorted((name for name in names if name.startswith(f"{number}-")), key=lambda name: int(name.split("-")[1]))
        assert own[:count] == [f"{number}-{serial}" for serial in range(count)]
        assert len(own) <= count + 1
    for name in names:
        assert info(daemon.mnt / "active" / name)["name"] == name
        assert (daemon.mnt / "active" / name / "diff").is_dir()
    assert len(os.listdir(daemon.root / "snapshots")) == len(names)
    assert daemon.stop() == 0
    assert os.listdir(daemon.root / "pool") == []


@pytest.mark.durable
def test_after_kill_9_everything_acknowledged_is_there(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    base = committed(daemon.mnt, "base", content="x" * 10_000)
    os.mkdir(base / "active/web")
    (daemon.mnt / "active/web/labels/team").write_text("blue")
    os.rename(daemon.mnt / "active/web", daemon.mnt / "active/site")
    os.mkdir(base / "view/peek")
    os.mkdir(daemon.mnt / "active/gone")
    os.rmdir(daemon.mnt / "active/gone")
    paths = ("committed/base", "active/site", "view/peek")
    before = [info(daemon.mnt / path) for path in paths]
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    daemon.start()
    assert [info(daemon.mnt / path) for path in paths] == before
    assert [os.listdir(daemon.mnt / kind) for kind in ("active", "view", "committed")] == [["site"], ["peek"], ["base"]]
    assert json.loads((daemon.mnt / "committed/base/usage.json").read_text())["inodes"] == 2
    assert (daemon.mnt / "committed/base/diff/file").read_text() == "x" * 10_000
    until(lambda: len(os.listdir(daemon.root / "snapshots")) == 3 and not os.listdir(daemon.root / "trash"))
    os.mkdir(daemon.mnt / "active/next")
    assert info(daemon.mnt / "active/next")["id"] == 5, "no id is used twice"
    assert daemon.stop() == 0


@pytest.mark.durable
def test_a_crashed_daemons_mountpoint_is_recovered(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    for _ in range(2):
        daemon.stop(signal.SIGKILL)
        with failing(errno.ENOTCONN):
            os.stat(daemon.mnt)
        daemon.start()
        assert "README" in os.listdir(daemon.mnt)
    assert daemon.stop() == 0
    assert not is_mounted(daemon.mnt), "nothing is left beneath"
    said = [line for line in daemon.said if "serving" not in line]
    assert said == [f"snapfs: {daemon.mnt} was left mounted by a daemon that is gone; unmounting it\n"] * 2


# -- options


@pytest.mark.parametrize("arguments", [["-o", "ro"], ["--ro"], ["-o", "nosuid,ro,nodev"]])
def test_ro(make_daemon: Make, arguments: list[str]) -> None:
    daemon = make_daemon().start()
    committed(daemon.mnt, "base")
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/l").write_text("1")
    assert daemon.stop() == 0
    daemon.arguments = tuple(arguments)
    daemon.start()
    assert info(daemon.mnt / "active/a")["labels"] == {"l": "1"}
    calls: list[Callable[[], object]] = [
        lambda: os.mkdir(daemon.mnt / "active/b"),
        lambda: os.rmdir(daemon.mnt / "active/a"),
        lambda: os.rename(daemon.mnt / "active/a", daemon.mnt / "committed/c"),
        lambda: (daemon.mnt / "active/a/labels/l").write_text("2"),
        lambda: os.unlink(daemon.mnt / "active/a/labels/l"),
    ]
    for call in calls:
        with failing(errno.EROFS):
            call()
    assert info(daemon.mnt / "active/a")["labels"] == {"l": "1"}
    assert daemon.stop() == 0


@pytest.mark.parametrize("arguments", [["-o", "async_remove"], ["--async-remove"]])
def test_async_remove_leaves_the_files_to_cleanup(make_daemon: Make, arguments: list[str]) -> None:
    daemon = make_daemon(*arguments).start()
    base = committed(daemon.mnt, "base", content="x")
    number = info(base)["id"]
    os.rmdir(base)
    assert os.listdir(daemon.mnt / "committed") == []
    assert daemon.stop() == 0
    daemon.start()
    assert (daemon.root / f"snapshots/{number}/fs/file").read_text() == "x"
    assert os.listdir(daemon.mnt / "by-id") == []
    assert daemon.stop() == 0
    daemon.arguments = ()
    daemon.start()
    until(lambda: not os.listdir(daemon.root / "snapshots") and not os.listdir(daemon.root / "trash"))
    assert daemon.stop() == 0


@pytest.mark.parametrize("arguments", [["-o", "upperdir_label"], ["--upperdir-label"]])
def test_upperdir_label(make_daemon: Make, arguments: list[str]) -> None:
    daemon = make_daemon(*arguments).start()
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/l").write_text("1")
    found = info(daemon.mnt / "active/a")
    upper = os.readlink(daemon.mnt / "active/a/diff")
    assert found["labels"] == {"l": "1", "containerd.io/snapshot/overlay.upperdir": upper}
    assert os.path.isdir(upper)
    assert daemon.stop() == 0
    daemon.arguments = ()
    daemon.start()
    assert info(daemon.mnt / "active/a")["labels"] == {"l": "1"}, "it is never stored"
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["-o", "mount_option=volatile"], ["volatile", "index=off"]),
        (["--mount-option", "volatile", "--mount-option", "metacopy=on"], ["volatile", "metacopy=on", "index=off"]),
        (["-o", "mount_option=index=on,mount_option=xino=off"], ["index=on", "xino=off"]),
        (["-o", "rw,noatime", "-o", r"mount_option=a\,b"], ["a,b", "index=off"]),
        ([], ["index=off"]),
    ],
)
def test_mount_option(make_daemon: Make, arguments: list[str], options: list[str]) -> None:
    daemon = make_daemon(*arguments).start()
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/web")
    os.mkdir(daemon.mnt / "active/alone")
    (spec,) = json.loads((daemon.mnt / "active/web/mounts.json").read_text())
    assert spec["options"][3:] == options
    (bind,) = json.loads((daemon.mnt / "active/alone/mounts.json").read_text())
    assert bind["options"] == ["rw", "rbind"]
    assert daemon.stop() == 0


@pytest.mark.parametrize("arguments", [["-o", "remap_ids"], ["--remap-ids"], []])
def test_remap_ids(make_daemon: Make, arguments: list[str]) -> None:
    daemon = make_daemon(*arguments).start()
    base = committed(daemon.mnt, "base")
    os.mkdir(base / "active/web")
    for label in ("uid", "gid"):
        (daemon.mnt / f"active/web/labels/containerd.io%2Fsnapshot%2F{label}mapping").write_text("0:1000:65536")
    (spec,) = json.loads((daemon.mnt / "active/web/mounts.json").read_text())
    remapped = [option for option in spec["options"] if option.startswith(("uidmap", "gidmap"))]
    assert remapped == (["uidmap=0:1000:65536", "gidmap=0:1000:65536"] if arguments else [])
    assert spec["options"][: len(remapped)] == remapped, "they come first"
    assert daemon.stop() == 0


def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_other_users_are_kept_out(make_daemon: Make, open_path: Path) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    for command in (f"ls {daemon.mnt}", f"cat {daemon.mnt}/active/a/info.json", f"mkdir {daemon.mnt}/active/b"):
        done = as_nobody(command)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    assert os.listdir(daemon.mnt / "active") == ["a"]
    assert daemon.stop() == 0


@pytest.mark.parametrize("arguments", [["-o", "allow_other"], ["--allow-other"]])
def test_allow_other_lets_them_in_and_the_kernel_checks_modes(make_daemon: Make, open_path: Path, arguments: list[str]) -> None:
    daemon = make_daemon(*arguments).start()
    os.mkdir(daemon.mnt / "active/a")
    (daemon.mnt / "active/a/labels/l").write_text("1")
    assert as_nobody(f"cat {daemon.mnt}/active/a/labels/l").stdout == "1\n"
    assert '"name": "a"' in as_nobody(f"cat {daemon.mnt}/active/a/info.json").stdout
    for command in (
        "mkdir active/b",
        "rmdir active/a",
        "mv active/a committed/c",
        "echo 2 > active/a/labels/l",
        "rm active/a/labels/l",
    ):
        done = as_nobody(f"cd {daemon.mnt} && {command}")
        assert done.returncode != 0
        assert "Permission denied" in done.stderr, command
    assert as_nobody(f"ls {daemon.mnt}/active/a/diff/").returncode != 0, "ROOT is 0700"
    assert info(daemon.mnt / "active/a")["labels"] == {"l": "1"}
    os.mkdir(daemon.mnt / "active/b")  # the owner may all the same
    assert daemon.stop() == 0


@pytest.mark.parametrize("option", ["nonsense", "allow_others", "ro=1", "mount_option", "mount_option=", "async_remove,x=y"])
def test_an_unknown_option(tmp_path: Path, option: str) -> None:
    (tmp_path / "mnt").mkdir()
    said = refusal(tmp_path / "root", tmp_path / "mnt", "-o", option)
    assert f'unknown mount option "{option.split(",")[-1]}"' in said
    assert "allow_other" in said
    assert not (tmp_path / "root").exists()


# -- refusals


def test_a_second_daemon_on_the_same_root(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    (tmp_path / "other").mkdir()
    said = refusal(daemon.root, tmp_path / "other")
    assert f"in use by the process with pid {daemon.pid};" in said
    assert not is_mounted(tmp_path / "other")
    os.mkdir(daemon.mnt / "active/a")  # the first one is none the worse for it
    assert daemon.stop() == 0


def test_a_second_daemon_on_the_same_mountpoint(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    assert "mountpoint of another snapfs" in refusal(tmp_path / "root2", daemon.mnt)
    assert "README" in os.listdir(daemon.mnt)
    assert daemon.stop() == 0
    assert not is_mounted(daemon.mnt)


def test_a_missing_mountpoint(tmp_path: Path) -> None:
    said = refusal(tmp_path / "root", tmp_path / "missing")
    hint = f"; make it first: mkdir {tmp_path}/missing"
    assert said == f"snapfs: cannot mount on {tmp_path}/missing: No such file or directory{hint}\n"
    assert not (tmp_path / "root").exists(), "nothing was begun"


def test_a_mountpoint_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a directory" in refusal(tmp_path / "root", tmp_path / "file")
    assert "Not a directory" in refusal(tmp_path / "root", tmp_path / "file/below")


@pytest.mark.mounts
def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").write_text("precious")
    assert f"{tmp_path}/file" in refusal(tmp_path / "file", tmp_path / "mnt")
    assert (tmp_path / "file").read_text() == "precious"
    refusal(tmp_path / "file/below", tmp_path / "mnt")


@pytest.mark.mounts
def test_a_root_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home/photo").write_text("precious")
    assert "neither empty nor a root of snapfs" in refusal(tmp_path / "home", tmp_path / "mnt")
    assert os.listdir(tmp_path / "home") == ["photo"]
    assert os.stat(tmp_path / "home").st_mode & 0o777 == 0o755


@pytest.mark.mounts
def test_a_root_on_a_read_only_disk(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], check=True)
    try:
        assert "Read-only file system" in refusal(disk / "root", tmp_path / "mnt")
        assert "Read-only file system" in refusal(disk, tmp_path / "mnt")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert not is_mounted(tmp_path / "mnt")


@pytest.mark.durable
def test_records_that_are_damaged(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    assert daemon.stop() == 0
    records = daemon.root / "metadata.mdb"
    whole = records.read_bytes()
    records.write_bytes(b"no records at all" * 1000)
    assert "metadata.mdb" in refusal(daemon.root, daemon.mnt)
    records.unlink()
    assert "metadata.mdb is missing" in refusal(daemon.root, daemon.mnt)
    assert os.listdir(daemon.root / "snapshots") == ["1"]
    records.write_bytes(whole)
    daemon.start()
    assert os.listdir(daemon.mnt / "active") == ["a"]
    assert daemon.stop() == 0


@pytest.mark.parametrize(("root", "mountpoint"), [("a/b", "a"), ("a", "a/b"), ("a", "a"), ("a/../a/b", "./a")])
def test_root_and_mountpoint_within_each_other(tmp_path: Path, root: str, mountpoint: str) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert "must not lie within each other" in refusal(tmp_path / root, tmp_path / mountpoint)
    assert not is_mounted(tmp_path / "a")


@pytest.mark.mounts
def test_without_dev_fuse(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "empty").mkdir()
    hide = ("unshare", "-m", "sh", "-c", 'mount --bind "$0" /dev && exec "$@"', str(tmp_path / "empty"))
    said = refusal(tmp_path / "root", tmp_path / "mnt", prefix=hide)
    assert said.startswith("snapfs: cannot open /dev/fuse (No such file or directory)")
    assert "modprobe fuse" in said


AS_NOBODY = """
import os, sys
import snapfs.cli.detach, snapfs.cli.logs, snapfs.cli.notify, snapfs.cli.serve, snapfs.fuse.serve
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(snapfs.cli.main(["serve", *sys.argv[1:]]))
"""


@pytest.mark.mounts
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("600", "open it; chmod 666 /dev/fuse"),
        ("660", "and the group root open it; become a member, or chmod 666 /dev/fuse"),
        ("644", "open it; chmod 666 /dev/fuse"),
    ],
)
def test_a_user_who_may_not_use_dev_fuse(open_path: Path, mode: str, words: str) -> None:
    for name in ("mnt", "root"):
        (open_path / name).mkdir()
        os.chown(open_path / name, 65534, 65534)
    make = f"mknod -m {mode} /dev/fuse c 10 229"
    hide = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none /dev && {make} && exec "$@"', "sh")
    command = [*hide, sys.executable, "-c", AS_NOBODY, str(open_path / "root"), str(open_path / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    words = f"its mode {mode} lets only root {words}"
    assert done.stderr == f"snapfs: cannot open /dev/fuse (Permission denied): {words}\n"


@pytest.mark.mounts
def test_dev_fuse_that_no_mode_forbids(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    make = "mknod /dev/fuse c 10 229 && chmod 666 /dev/fuse"
    hide = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o nodev none /dev && {make} && exec "$@"', "sh")
    said = refusal(tmp_path / "root", tmp_path / "mnt", prefix=hide)
    assert said.startswith("snapfs: cannot open /dev/fuse (Permission denied): let the container use the device")
    assert "mode" not in said


@pytest.mark.parametrize("arguments", [[], ["root"], ["root", "mnt", "more"], ["root", "mnt", "--nonsense"]])
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run([*SERVE, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("snapfs serve: ")
    assert "usage: snapfs serve [OPTION…] ROOT MOUNTPOINT" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_help_names_every_option() -> None:
    said = subprocess.run([*SERVE, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    for flag in (
        "--allow-other",
        "--ro",
        "--async-remove",
        "--upperdir-label",
        "--remap-ids",
        "--slow-chown",
        "--mount-option",
        "-o",
    ):
        assert flag in said


def test_two_daemons_of_one_process_group_do_not_disturb_each_other(make_daemon: Make, tmp_path: Path) -> None:
    one = make_daemon(root=tmp_path / "r1", mnt=tmp_path / "m1").start()
    two = make_daemon(root=tmp_path / "r2", mnt=tmp_path / "m2").start()
    os.mkdir(one.mnt / "active/a")
    assert os.listdir(two.mnt / "active") == []
    assert one.stop() == 0
    os.mkdir(two.mnt / "active/b")
    assert shell(two.mnt, "cat active/b/info.json").returncode == 0
    assert two.stop() == 0


def test_stopped_while_threads_read(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    under_way, errors = threading.Barrier(5), []

    def read() -> None:
        path = daemon.mnt / "active/a/info.json"
        first = path.read_text()
        under_way.wait()
        try:
            while path.read_text() == first:
                pass
        except OSError as error:
            errors.append(error.errno)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    under_way.wait()
    assert daemon.stop() == 0
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(errors) == 4
    assert set(errors) <= {errno.ENOTCONN, errno.ENOENT, errno.ECONNABORTED, errno.EIO, errno.ENODEV}


@pytest.mark.durable
def test_a_dead_mount_that_the_kernel_remembers_is_recovered(make_daemon: Make) -> None:
    """stat(2) of what a killed daemon left is answered from the kernel's cache, as if it lived."""
    daemon = make_daemon().start()
    os.stat(daemon.mnt)
    daemon.stop(signal.SIGKILL)
    os.stat(daemon.mnt)
    daemon.start()
    assert os.listdir(daemon.mnt / "active") == []
    assert daemon.stop() == 0


@pytest.mark.mounts
def test_a_mount_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-m", "snapfs.cli", "serve", str(tmp_path / "root"), str(tmp_path / "mnt")]
    weakened = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", *command]
    done = subprocess.run(weakened, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"snapfs: cannot mount on {tmp_path / 'mnt'}: ")
    assert "CAP_SYS_ADMIN" in done.stderr


def test_what_is_mounted_in_the_tree_is_told_once(make_daemon: Make, tmp_path: Path) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    for name in ("a b", "c"):
        os.mkdir(daemon.mnt / "active" / name)
    places = [daemon.mnt / "active/a b", daemon.mnt / "active/a b/inside", tmp_path / "other", daemon.mnt / "active/c"]
    (tmp_path / "other").mkdir()
    told = []
    with contextlib.ExitStack() as stack:
        for place in places:
            place.mkdir(exist_ok=True)
            mounting.mount("none", str(place), "tmpfs", 0)
            stack.callback(mounting.unmount, str(place))
            if place.name in ("a b", "c"):
                told.append(daemon.process.stderr.readline())
    ends = [f"over {daemon.mnt}/active/a b", f"umount '{daemon.mnt}/active/a b'\n", f"over {daemon.mnt}/active/c,"]
    assert all(end in line for end, line in zip(ends, [told[0], told[0], told[1]], strict=True)), told
    assert daemon.stop() == 0
    assert len(daemon.said) == 1, "and nothing else"


async def test_no_change_of_the_mounts_goes_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of each once: also what changes after a look, and before this waits for the next change, is seen."""
    looks = 0

    def look(own: object) -> tuple[bool, dict[int, str]]:
        nonlocal looks
        looks += 1
        if looks == 1:
            mounting.mount("none", str(tmp_path), "tmpfs", 0)
        return looks == 1, {}

    monkeypatch.setattr(serve, "_look", look)
    stop = trio.Event()
    try:
        with trio.fail_after(20):
            await serve._set_when_gone(stop, cast(MountPoint, None))
    finally:
        mounting.unmount(str(tmp_path))
    assert stop.is_set()
    assert looks == 2


def test_a_trash_that_cannot_be_emptied_does_not_end_the_daemon(make_daemon: Make) -> None:
    daemon = make_daemon().start()
    os.mkdir(daemon.mnt / "active/a")
    (daemon.root / "trash").rename(daemon.root / "elsewhere")
    os.rmdir(daemon.mnt / "active/a")
    os.mkdir(daemon.mnt / "active/b")
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    for line in iter(daemon.process.stderr.readline, ""):  # it tries a moment later
        daemon.said.append(line)
        if "cannot empty the trash" in line:
            break
    (daemon.root / "elsewhere").rename(daemon.root / "trash")
    os.rmdir(daemon.mnt / "active/b")
    assert os.listdir(daemon.mnt / "active") == []
    assert daemon.stop() == 0
    assert any("cannot empty the trash" in line for line in daemon.said)
    assert not any("Traceback" in line for line in daemon.said)


KILLED = """
import os, signal, sys, time
from pathlib import Path
import pyfuse3
from snapfs.cli import main
from snapfs.fuse.cache import KernelCache

def waits_in_the_kernel():
    states = [path.read_text().rpartition(") ")[2][0] for path in Path("/proc/self/task").glob("*/stat")]
    return "D" in states

def note(self, change, original=KernelCache.note):
    original(self, change)
    if change.after is not None and change.after.name == "n" and change.after.kind == "committed":
        if sys.argv[1] == "stuck":
            pyfuse3.invalidate_entry_async(1 << 28 | 4, b"n", ignore_enoent=True)
            while not waits_in_the_kernel():
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

KernelCache.note = note
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@pytest.mark.durable
@pytest.mark.parametrize("how", ["between", "stuck"])
def test_killed_between_a_commit_and_its_answer(make_daemon: Make, how: str) -> None:
    """The client has the directory's lock in the kernel then.  "stuck": one of the daemon's own threads waits for that lock and
    can't die.  The next start frees all of them."""
    daemon = make_daemon()
    command = [sys.executable, "-c", KILLED, how, str(daemon.root), str(daemon.mnt)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent) as killed:
        assert killed.stderr is not None
        assert killed.stderr.readline().startswith("snapfs: serving ")
        base = committed(daemon.mnt, "base")
        os.mkdir(base / "active/k")
        ended: list[int | None] = []

        def commit() -> None:
            try:
                os.rename(daemon.mnt / "active/k", base / "committed/n")
            except OSError as error:
                ended.append(error.errno)
            else:
                ended.append(None)

        client = threading.Thread(target=commit)
        client.start()
        until(lambda: "State:\tZ" in Path(f"/proc/{killed.pid}/status").read_text())
        daemon.start()
        client.join(timeout=30)
        assert ended in ([errno.ENOTCONN], [errno.ECONNABORTED], [errno.EIO])
        assert info(daemon.mnt / "committed/n")["parent"] == "base", "it was durable"
        assert daemon.stop() == 0
    assert killed.returncode == -signal.SIGKILL


WEIGHED = """
import atexit, ctypes, sys
from snapfs.cli import main

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def weigh():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    found = mallinfo2()
    print(found.arena, found.fordblks, file=sys.stderr)

atexit.register(weigh)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.durable  # else each change is made at once, and none waits for others
def test_the_heap_is_not_full_of_holes(make_daemon: Make) -> None:
    """Many changes at once share a transaction, in which each has a nested one, for which LMDB takes and frees 3 MiB."""
    daemon = make_daemon()
    daemon.program = ("-c", WEIGHED)
    daemon.start()
    parents = [committed(daemon.mnt, f"base{n}") for n in range(16)]

    def prepare(parent: Path) -> None:
        for n in range(20):
            os.mkdir(parent / f"active/{parent.name}.{n}")

    threads = [threading.Thread(target=prepare, args=[parent]) for parent in parents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batches = json.loads((daemon.mnt / ".snapfs/stats.json").read_text())["batches"]
    assert batches["operations"] - batches["by_size"]["1"] > 50, "most were made alone"
    assert daemon.stop() == 0
    heap, unused = map(int, daemon.said[-1].split())
    assert unused < 2 << 20, f"{unused} of {heap} bytes"
