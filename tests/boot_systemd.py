"""A machine that starts by itself, for real: systemd as PID 1 in namespaces of its own, on an overlay of this system's /.

`make systemd` runs it.  It starts the units of examples/systemd as they and its README say, kills, stops and reboots.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from tests.processes import die_with_parent, until

HERE = Path(__file__).parent.parent
UNITS = HERE / "examples/systemd"
README = (UNITS / "README.md").read_text()
EMPTY = ("etc/systemd/system", "etc/init.d", "usr/local/bin", "var/lib", "var/log", "srv", "mnt")
"""Where nothing of this system is seen: none of its services starts, none of its data is in reach."""


class Machine:
    """The machine.  What it keeps is on a tmpfs, so that it can be booted again."""

    def __init__(self, work: Path) -> None:
        self.disk, self.cgroups = work / "disk", work / "cgroups"
        self.root = self.disk / "root"
        self.first: subprocess.Popen[bytes] | None = None
        for place, kind in ((self.disk, "tmpfs"), (self.cgroups, "cgroup2")):
            place.mkdir()
            subprocess.run(["mount", "-t", kind, "none", str(place)], check=True)
        for name in ("upper", "work", "root"):
            (self.disk / name).mkdir()
        options = f"lowerdir=/,upperdir={self.disk}/upper,workdir={self.disk}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(self.root)], check=True)
        for name in EMPTY:
            (self.disk / name).mkdir(parents=True)
            mounting.mount_bind(str(self.disk / name), str(self.root / name), read_only=False)
        (self.root / str(HERE)[1:]).mkdir(parents=True, exist_ok=True)
        mounting.mount_bind(str(HERE), str(self.root / str(HERE)[1:]), read_only=True)
        (self.root / "etc/fstab").write_text("")
        (self.root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (self.root / "var/log/journal").mkdir()
        (self.root / "usr/local/bin/snapfs").symlink_to(HERE / ".venv/bin/snapfs")
        for name in ("systemd-tmpfiles-setup.service", "systemd-tmpfiles-clean.timer"):  # /tmp has no end, here
            (self.root / "etc/systemd/system" / name).symlink_to("/dev/null")
        self.cgroup = self.cgroups / f"snapfs-boot-{os.getpid()}"
        self.cgroup.mkdir()

    def boot(self) -> None:
        (self.disk / "boot_id").write_text(f"{uuid.uuid4()}\n")
        spaces = ("--cgroup", "--pid", "--net", "--uts", "--ipc", "--mount")
        words = ["unshare", *spaces, "--fork", "--kill-child", "sh", str(HERE / "tests/boot.sh"), str(self.root)]
        self.first = subprocess.Popen([*words, str(self.disk / "boot_id")], preexec_fn=self._enter)
        until(lambda: self("systemctl is-system-running", check=False).strip() in ("running", "degraded"), "it has booted")
        assert self("systemctl --failed --quiet") == ""

    def _enter(self) -> None:
        die_with_parent()
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def __call__(self, command: str, *, check: bool = True) -> str:
        """What a command says in the machine, in a shell of root's, in this repository."""
        assert self.first is not None
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        if not children:
            return ""
        words = ["nsenter", "--target", children[0], "--all", "--", "sh", "-euc", f"cd {HERE} && {command}"]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr * (not check)

    def reboot(self) -> None:
        assert self.first is not None
        with self.first:
            self("systemctl reboot", check=False)
            self.first.wait(timeout=60)
        self.boot()

    def end(self) -> None:
        (self.cgroup / "cgroup.kill").write_text("1")
        if self.first is not None:
            self.first.wait()
        until(lambda: "populated 0" in (self.cgroup / "cgroup.events").read_text(), "all its processes are gone")
        for directory, _, _ in os.walk(self.cgroup, topdown=False):
            with suppress(FileNotFoundError):
                os.rmdir(directory)
        for place in (self.disk, self.cgroups):
            subprocess.run(["umount", "--recursive", "--lazy", str(place)], check=True)

    def mounts(self) -> list[str]:
        """Where trees, and snapshots' file systems, are mounted."""
        lines = self("cat /proc/self/mounts").splitlines()
        return sorted(
            line.split()[1] for line in lines if "fuse.snapfs" in line or ("/rootfs/" in line and " tmpfs " not in line)
        )

    def show(self, unit: str, *properties: str) -> list[str]:
        return [self(f"systemctl show --property {each} --value '{unit}'").strip() for each in properties]

    def entries(self, words: str) -> list[dict[str, str]]:
        """What the journal has, by field."""
        self("journalctl --sync")
        return [json.loads(line) for line in self(f"journalctl --boot --output json {words}").splitlines()]


def recipe(unit: str) -> list[str]:
    """How to install a unit, as it says itself."""
    return re.findall("^#     (.*[a-z].*)", (UNITS / unit).read_text(), re.MULTILINE)[:2]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("machine"))
    try:
        made.boot()
        yield made
    finally:
        made.end()


def test_units_as_they_say(machine: Machine) -> None:
    """Installed as their first lines say; active as soon as, and not before, the tree is there."""
    machine("mkdir -p /srv/images")
    for unit in ("snapfs.service", "snapfs@.service"):
        for line in recipe(unit):
            machine(line)
    assert machine.mounts() == ["/run/snapfs", "/run/snapfs-srv-images"]
    machine("mkdir /run/snapfs/active/b && echo 1 > /run/snapfs/active/b/rootfs/file")
    machine("mv /run/snapfs/active/b /run/snapfs/committed/base && mkdir /run/snapfs/committed/base/active/web")
    assert machine("snapfs ls -q --at /run/snapfs").split() == ["base", "web"]
    assert machine("cat /run/snapfs/active/web/rootfs/file") == "1\n"
    assert machine.show("snapfs", "StatusText") == ["serving /var/lib/snapfs on /run/snapfs"]
    assert machine.entries("--unit snapfs --grep '^serving '")[0]["PRIORITY"] == "6"


def test_not_ready_before_it_is_mounted(machine: Machine) -> None:
    machine("mkfifo /run/gate && mkdir -p /etc/systemd/system/snapfs@srv-late.service.d /srv/late")
    serve = "/usr/local/bin/snapfs serve /srv/late /run/snapfs-srv-late"
    gate = f"[Service]\nExecStart=\nExecStart=/bin/sh -c 'read go < /run/gate; exec {serve}'\n"
    machine(f'printf "{gate.encode("unicode_escape").decode()}" > /etc/systemd/system/snapfs@srv-late.service.d/gate.conf')
    machine("systemctl daemon-reload && systemctl start --no-block snapfs@srv-late")
    until(lambda: machine("pgrep -f 'read [g]o'", check=False), "it waits at the gate")
    assert machine.show("snapfs@srv-late", "ActiveState") == ["activating"]
    assert "/run/snapfs-srv-late" not in machine.mounts()
    machine("echo > /run/gate && systemctl start snapfs@srv-late && test -d /run/snapfs-srv-late/active")
    machine("systemctl stop snapfs@srv-late")
    assert machine.entries("--unit snapfs@srv-late --grep '^ended: SIGTERM$'")[0]["PRIORITY"] == "6"


def test_refusals_in_the_journal(machine: Machine) -> None:
    assert "not permitted" in machine("mkdir /run/snapfs/committed/no", check=False)
    assert "not empty" in machine("rmdir /run/snapfs/committed/base", check=False)
    (entry,) = machine.entries("--unit snapfs SNAPFS_OPERATION=rmdir")
    assert entry["MESSAGE"].startswith('ENOTEMPTY rmdir committed/base: cannot remove snapshot "base" with children')
    assert (entry["ERRNO"], entry["SNAPFS_PATH"], entry["PRIORITY"]) == ("39", "committed/base", "6")
    assert [entry["SNAPFS_PATH"] for entry in machine.entries("ERRNO=1 _SYSTEMD_UNIT=snapfs.service")] == ["committed/no"]
    assert machine.entries("--unit snapfs --priority warning") == [], "it did not complain"


def test_killed_it_comes_back(machine: Machine) -> None:
    (pid,) = machine.show("snapfs", "MainPID")
    machine(f"kill -KILL {pid}")
    until(lambda: machine.show("snapfs", "NRestarts", "ActiveState") == ["1", "active"], "it is started again")
    assert machine("snapfs ls -q --at /run/snapfs").split() == ["base", "web"]
    assert machine("cat /run/snapfs/active/web/rootfs/file") == "1\n"


def test_restart_and_stop(machine: Machine) -> None:
    machine("systemctl restart snapfs && snapfs commit --at /run/snapfs web v1 && snapfs view --at /run/snapfs v -p v1")
    assert machine("cat /run/snapfs/view/v/rootfs/file") == "1\n"
    assert len(machine.mounts()) == 3
    machine("systemctl stop snapfs snapfs@srv-images")
    assert machine.mounts() == []
    assert machine.show("snapfs", "ActiveState", "Result") == ["inactive", "success"]
    assert "no snapfs tree is mounted" in machine("snapfs ls", check=False)


def test_fstab_and_a_reboot(machine: Machine) -> None:
    """All that is enabled, or in /etc/fstab, is there after a boot, with what was committed before."""
    (line,) = re.findall("`(/srv/snapfs .*?)`", README)
    machine(f"echo '{line}' >> /etc/fstab && mkdir -p /mnt/snapfs && systemctl daemon-reload && mount -a")
    assert machine.mounts() == ["/mnt/snapfs"]
    machine("mkdir /mnt/snapfs/active/a && mv /mnt/snapfs/active/a /mnt/snapfs/committed/kept")
    assert "not permitted" in machine("mkdir /mnt/snapfs/committed/no", check=False)
    assert machine.entries("SYSLOG_IDENTIFIER=snapfs SNAPFS_OPERATION=mkdir")[-1]["SNAPFS_PATH"] == "committed/no"
    machine("systemctl start snapfs")
    machine.reboot()
    assert machine.mounts() == ["/mnt/snapfs", "/run/snapfs", "/run/snapfs-srv-images"]
    fstab = machine.show("mnt-snapfs.mount", "ActiveState", "FragmentPath")
    assert fstab == ["active", "/run/systemd/generator/mnt-snapfs.mount"]
    assert machine("snapfs ls -q --at /mnt/snapfs").split() == ["kept"]
    assert machine("snapfs ls -q --at /run/snapfs").split() == ["base", "v", "v1"]
    assert "unflushed" not in machine("cat /mnt/snapfs/committed/*/info.json /run/snapfs/committed/*/info.json")
    machine("systemctl stop mnt-snapfs.mount && umount /run/snapfs")
    until(lambda: machine.show("snapfs", "ActiveState", "Result") == ["inactive", "success"], "umount ends it cleanly")
    machine("systemctl stop snapfs@srv-images")
    assert machine.mounts() == []
    machine("flock /srv/snapfs/lock true")


def test_what_is_wrong_is_in_the_journal(machine: Machine) -> None:
    """A start that fails says why, to whoever looks at systemctl status."""
    machine("snapfs serve --detach /var/lib/snapfs /mnt/snapfs")
    assert "failed" in machine("systemctl start snapfs", check=False)
    machine("systemctl stop snapfs")
    (entry, *_) = machine.entries("--unit snapfs --grep 'is in use by the process'")
    assert entry["PRIORITY"] == "3"
    machine("umount /mnt/snapfs")


def test_stopped_while_somebody_stands_in_it(machine: Machine) -> None:
    machine("systemctl start snapfs")
    machine("cd /run/snapfs/view/v/rootfs && systemctl stop snapfs")
    assert machine.mounts() == []
    assert machine.show("snapfs", "Result") == ["success"]
    assert any("is still in use" in entry["MESSAGE"] for entry in machine.entries("--unit snapfs --priority warning"))


def test_behind_containerd(machine: Machine) -> None:
    """As examples/containerd/README.md says, with its unit for good."""
    assert machine("command -v containerd"), "make systemd installs it"
    machine("mkdir -p /etc/containerd && cp examples/containerd/config-1.6.toml /etc/containerd/config.toml")
    machine("systemctl stop snapfs")  # the other unit of that name
    machine("cp examples/containerd/snapfs.service /etc/systemd/system/ && systemctl daemon-reload")
    machine("systemctl enable --now snapfs && systemctl restart containerd")
    assert re.search("snapfs .* ok", machine("ctr plugins ls"))
    machine("ctr snapshots --snapshotter snapfs prepare web")
    (pid,) = machine.show("snapfs", "MainPID")
    machine(f"kill -KILL {pid}")
    until(lambda: machine.show("snapfs", "NRestarts", "ActiveState") == ["1", "active"], "it is started again")
    until(lambda: "web" in machine("ctr snapshots --snapshotter snapfs ls", check=False), "containerd has dialled again")
    assert "default%2F1%2Fweb" in machine("ls /run/snapfs/tree/active").split()
    machine("systemctl stop snapfs")
    assert machine.mounts() == []
