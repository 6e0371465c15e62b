"""How the machine starts it: mount(8), fstab, systemd's protocol and units, the journal, Prometheus."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table
from tests.command import SNAPFS
from tests.daemon import Daemon
from tests.processes import die_with_parent, until

Make = Callable[..., Daemon]

UNITS = Path(__file__).parent.parent / "examples/systemd"
ALL_UNITS = [UNITS / "snapfs.service", UNITS / "snapfs@.service", UNITS.parent / "containerd/snapfs.service"]

MAKE_A_MOUNT_NAMESPACE = {
    *("BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories", "ExtensionImages"),
    *("InaccessiblePaths", "IPCNamespacePath", "MountAPIVFS", "MountFlags", "MountImages", "NetworkNamespacePath"),
    *("NoExecPaths", "PrivateBPF", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateNetwork", "PrivatePIDs"),
    *("PrivateTmp", "ProcSubset", "ProtectControlGroups", "ProtectHome", "ProtectKernelLogs", "ProtectKernelModules"),
    *("ProtectKernelTunables", "ProtectProc", "ProtectSystem", "ReadOnlyPaths", "ReadWritePaths", "RootDirectory"),
    *("RootImage", "TemporaryFileSystem"),
}
"""The directives that do, or may do with some systemd or other."""


def is_mounted(path: Path) -> bool:
    return any(mount.target == str(path) for mount in mount_table())


def has_ended(root: Path) -> None:
    """Wait until the daemon of ``root``, which is unmounted, has let go of it."""
    subprocess.run(["flock", str(root / "lock"), "true"], timeout=30, check=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with ``mnt`` in it, and the command in /usr/local/bin, where mount.fuse3 looks for it."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/snapfs").write_text(f'#!/bin/sh\nPYTHONPATH={os.getcwd()} exec "{sys.executable}" -m snapfs.cli "$@"\n')
    (tmp_path / "bin/snapfs").chmod(0o755)
    mounting.mount_bind(str(tmp_path / "bin"), "/usr/local/bin", read_only=True)
    try:
        yield tmp_path
    finally:
        if is_mounted(tmp_path / "mnt"):
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
            has_ended(tmp_path / "root")
        mounting.unmount("/usr/local/bin")


@pytest.mark.mounts
def test_mount(place: Path) -> None:
    words = ["mount", "-t", "fuse.snapfs", str(place / "root"), str(place / "mnt"), "-o", "dirsync,rootfs_max=9,nofail,x-y=z"]
    subprocess.run(words, timeout=60, check=True)
    os.mkdir(place / "mnt/active/a")
    assert '"rootfs_max": 9' in (place / "mnt/.snapfs/options.json").read_text()
    again = subprocess.run(
        ["mount", "-t", "fuse.snapfs", str(place / "root"), str(place / "bin")], capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert "is in use by the process with pid" in again.stderr
    subprocess.run(["umount", str(place / "mnt")], check=True)
    has_ended(place / "root")
    bad = subprocess.run([*words[:-1], "nonsense"], capture_output=True, text=True, check=False)
    assert bad.returncode != 0
    assert 'unknown mount option "nonsense"' in bad.stderr
    assert not is_mounted(place / "mnt")


@pytest.mark.mounts
def test_fstab(place: Path) -> None:
    (place / "fstab").write_text(f"{place}/root {place}/mnt fuse.snapfs defaults,_netdev,nofail,x-systemd.automount 0 0\n")
    subprocess.run(["mount", "--fstab", str(place / "fstab"), str(place / "mnt")], timeout=60, check=True)
    assert is_mounted(place / "mnt")
    os.mkdir(place / "mnt/active/a")


@pytest.mark.mounts
def test_detach(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    words = [*SNAPFS, "serve", "--detach", str(tmp_path / "root"), str(tmp_path / "mnt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    try:
        assert done.stdout + done.stderr == "", "both are closed, or this would wait"
        assert is_mounted(tmp_path / "mnt")
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    has_ended(tmp_path / "root")


@pytest.mark.mounts
def test_detached_it_keeps_no_descriptor_of_who_started_it(tmp_path: Path) -> None:
    """A lock is free when its owner has closed it, and a pipe ends; what is given as /dev/fd/N stays open, and the daemon tells
    systemd that it is ready."""
    for name in ("mnt", "root"):
        (tmp_path / name).mkdir()
    serve = shlex.join([*SNAPFS, "serve", "--detach", "/dev/fd/7", "/proc/self/fd/8"])
    script = f"""
        exec 7<root 8<mnt 9>held
        flock -n 9
        LISTEN_FDS=1 LISTEN_PID=$$ {serve} 5>pipe
        exec 9>&-
        flock -n held true
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        os.mkfifo(tmp_path / "pipe")
        pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": os.getcwd()}
        try:
            subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, timeout=60, check=True)
            assert os.read(pipe, 1) == b"", "nobody has the other end"
            os.mkdir(tmp_path / "mnt/active/a")
            (tmp_path / "mnt/active/a/rootfs/file").touch()
            assert systemd.recv(4096).startswith(b"READY=1\n")
        finally:
            os.close(pipe)
            if is_mounted(tmp_path / "mnt"):
                subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    has_ended(tmp_path / "root")


@pytest.mark.mounts
def test_its_log_obeys_no_name(tmp_path: Path) -> None:
    """A key with an escape sequence and a line of its own, whose layer is lost; at standard error, detached or not."""
    (tmp_path / "mnt").mkdir()
    words = [*SNAPFS, "serve", "--detach", str(tmp_path / "root"), str(tmp_path / "mnt")]
    subprocess.run(words, timeout=60, check=True)
    os.mkdir(tmp_path / "mnt/active/%1B]0;evil%07%0Asnapfs: ended: all is well")
    subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    has_ended(tmp_path / "root")
    shutil.rmtree(tmp_path / "root/snapshots/1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    has_ended(tmp_path / "root")
    damaged = f"its directory {tmp_path}/root/snapshots/1 is missing"
    assert done.stderr == f'snapfs: snapshot "%1B]0;evil%07%0Asnapfs: ended: all is well" is damaged: {damaged}\n'


WITH_SYSLOG = """
import sys, syslog
out = sys.argv[1]
def log(priority, line):
    with open(out, "a") as file:
        print(priority, line, file=file)
syslog.syslog = log
from snapfs.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.mounts
def test_detached_it_says_why_it_ended_to_syslog(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    program = [sys.executable, "-c", WITH_SYSLOG, str(tmp_path / "said")]
    words = [*program, "serve", "--detach", str(tmp_path / "root"), str(tmp_path / "mnt")]
    subprocess.run(words, timeout=60, check=True)
    subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    said = tmp_path / "said"
    until(lambda: said.exists() and said.read_text().endswith("\n"), "it says why it ended")
    has_ended(tmp_path / "root")
    assert said.read_text() == "6 ended: unmounted\n"


# -- systemd


@pytest.mark.mounts
@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_and_stop(tmp_path: Path, abstract: bool) -> None:
    (tmp_path / "mnt").mkdir()
    address = f"@snapfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + address[1:] if abstract else address)
        systemd.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": address}
        words = [*SNAPFS, "serve", str(tmp_path / "root"), str(tmp_path / "mnt")]
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, preexec_fn=die_with_parent) as daemon:
            told = systemd.recv(4096).decode().splitlines()
            assert told[0] == "READY=1"
            assert told[1].startswith("STATUS=serving ")
            assert is_mounted(tmp_path / "mnt")
            daemon.terminate()
            assert systemd.recv(4096) == b"STOPPING=1"
            assert daemon.wait(timeout=30) == 0
        assert not is_mounted(tmp_path / "mnt")


@pytest.mark.parametrize("name", ["snapfs.service", "snapfs@srv-images.service"])
def test_units(tmp_path: Path, name: str) -> None:
    source = UNITS / re.sub("@.*[.]", "@.", name)
    (tmp_path / name).write_text(source.read_text().replace("/usr/local/bin/snapfs", shutil.which("true") or ""))
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def hardening(unit: Path) -> list[tuple[str, str]]:
    """The directives in which the units agree."""
    own = "Type|Environment.*|Exec.*|Restart.*|Runtime.*|Timeout.*|KillMode"
    lines = unit.read_text().partition("[Service]\n")[2].partition("[Install]")[0]
    return [
        (name, value) for name, value in re.findall("^([A-Za-z]+)=(.*)$", lines, re.MULTILINE) if not re.fullmatch(own, name)
    ]


@pytest.mark.parametrize("unit", ALL_UNITS, ids=lambda unit: "/".join(unit.parts[-2:]))
def test_hardened_units(unit: Path) -> None:
    """As far as goes with mounts that everybody is to see."""
    assert hardening(unit) == hardening(ALL_UNITS[0])
    assert MAKE_A_MOUNT_NAMESPACE.isdisjoint(re.findall("^([A-Za-z]+)=", unit.read_text(), re.MULTILINE))
    words = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=52", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"it is less hardened than it was:\n{done.stdout}{done.stderr}"


@pytest.mark.mounts
def test_units_under_systemd(place: Path) -> None:
    """Started they are mounted, killed they are started again, stopped they are unmounted."""
    words = ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--mount-proc", "sh", "tests/systemd.sh", str(UNITS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, preexec_fn=die_with_parent)
    assert done.returncode == 0, done.stdout + done.stderr
    status, *rest = done.stdout.split("\n")
    assert status == "serving /var/lib/snapfs on /run/snapfs"
    assert " ".join(rest).split() == ["a", "success", "success", "unmounted", "/run/snapfs"], done.stdout


LOGS = """
import logging, sys
from snapfs.cli import logs
logs.JOURNAL = sys.argv[1]
logs.set_up()
logs.say("up")
logging.getLogger().info("refused", extra={"fields": {"ERRNO": 16}})
logging.getLogger().error("a\\nsnapfs: b\\x1b]0;c\\u202e")
try:
    raise ValueError("d\\nsnapfs: e\\x1b")
except ValueError:
    logging.getLogger().exception("f")
"""
PRINTABLE = "a%0Asnapfs: b%1B]0;c%E2%80%AE"
TRACEBACK = [
    "f",
    "  Traceback (most recent call last):",
    '    File "<string>", line 10, in <module>',
    "  ValueError: d",
    "  snapfs: e%1B",
]


@pytest.mark.parametrize(
    ("journal", "takes", "wanted"),
    [
        (True, True, "<6>up\n"),
        (True, False, f"<6>up\n<3>{PRINTABLE}\n" + "".join(f"<3>{line}\n" for line in TRACEBACK)),
        (False, True, f"snapfs: up\nsnapfs: {PRINTABLE}\nsnapfs: " + "".join(f"{line}\n" for line in TRACEBACK)),
    ],
)
def test_lines_for_the_journal(tmp_path: Path, journal: bool, takes: bool, wanted: str) -> None:
    """Entries with fields where standard error is the journal; where it doesn't take them, lines with their priority.  None
    holds what a terminal would obey, and no name or error begins a line that looks like another message."""
    with (tmp_path / "stderr").open("w+") as stderr, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        if takes:
            journald.bind(str(tmp_path / "socket"))
        found = os.fstat(stderr.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + (not journal)}"}
        words = [sys.executable, "-c", LOGS, str(tmp_path / "socket")]
        subprocess.run(words, env=environment, stderr=stderr, check=True)
        assert (tmp_path / "stderr").read_text() == wanted
        if journal and takes:
            entries = [journald.recv(4096) for _ in range(3)]
            assert b"MESSAGE\n\7\0\0\0\0\0\0\0refused\n" in entries[0]
            assert b"ERRNO\n\2\0\0\0\0\0\0\00016\n" in entries[0]
            assert b"PRIORITY\n\1\0\0\0\0\0\0\0003\n" in entries[1]
            for text, entry in ((PRINTABLE, entries[1]), ("\n".join(TRACEBACK), entries[2])):
                assert b"MESSAGE\n%s%s\n" % (len(text).to_bytes(8, "little"), text.encode()) in entry


# -- .snapfs/metrics and .snapfs/snapshots


def test_metrics(mnt: Path) -> None:
    os.mkdir(mnt / "active/a")
    with pytest.raises(OSError, match="not permitted"):
        os.mkdir(mnt / "committed/a")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families((mnt / ".snapfs/metrics").read_text())}
    snapshots = {sample.labels["kind"]: sample.value for sample in families["snapfs_snapshots"].samples}
    assert snapshots == {"active": 1, "view": 0, "committed": 0}
    errors = {(sample.labels["operation"], sample.labels["errno"]) for sample in families["snapfs_request_errors"].samples}
    assert ("mkdir", "EPERM") in errors
    assert all(family.documentation and family.samples for family in families.values())


def test_snapshots_in_one_file(mnt: Path) -> None:
    listing = mnt / ".snapfs/snapshots"
    assert listing.read_text() == ""
    os.mkdir(mnt / "active/a%2Fb")
    (mnt / "active/a%2Fb/labels/k").write_text("1,2%")
    os.rename(mnt / "active/a%2Fb", mnt / "committed/base")
    os.mkdir(mnt / "committed/base/view/v")
    for _ in range(2):
        rows = [line.split("\t") for line in listing.read_text().splitlines()]
        assert [(row[0], row[1], row[2], row[3], row[-2], row[-1]) for row in rows] == [
            ("base", "committed", ".", "1", ".", "k=1%2C2%25"),
            ("v", "view", "base", "2", ".", "."),
        ]
        assert listing.stat().st_size == len(listing.read_bytes())
    assert subprocess.run(["busybox", "cat", str(listing)], capture_output=True, check=True).stdout == listing.read_bytes()
    with listing.open() as opened:
        os.rmdir(mnt / "view/v")
        assert len(opened.readlines()) == 2, "who has it open reads what it opened"
    assert len(listing.read_text().splitlines()) == 1


def test_what_nobody_sees_in_a_label_is_escaped(mnt: Path) -> None:
    """What reads the file has it back; and a file name in it is one, as it is."""
    value = "so\u00adft \u202eturned\U000e0041 m\u200dn\ufe0f"
    os.mkdir(mnt / "active/a\u00adb")
    (mnt / "active/a\u00adb/labels/k\u200b=l").write_text(value)
    name, *_, labels = (mnt / ".snapfs/snapshots").read_text().removesuffix("\n").split("\t")
    assert name == "a\u00adb"
    assert labels == "k%E2%80%8B%3Dl=so%C2%ADft %E2%80%AEturned%F3%A0%81%81 m\u200dn\ufe0f"
    done = subprocess.run([*SNAPFS, "ls", "--json", "--at", str(mnt)], capture_output=True, text=True, check=True)
    assert [row["labels"] for row in json.loads(done.stdout)] == [{"k\u200b=l": value}]
    assert "\u00ad" not in done.stdout
    done = subprocess.run([*SNAPFS, "ls", "--at", str(mnt)], capture_output=True, text=True, check=True)
    assert "a%C2%ADb" in done.stdout


def test_thousands(mnt: Path) -> None:
    for n in range(1000):
        os.mkdir(mnt / f"active/snapshot-{n}")
    assert len((mnt / ".snapfs/snapshots").read_text().splitlines()) == 1000
    done = subprocess.run([*SNAPFS, "ls", "-q", "--at", str(mnt)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1000
