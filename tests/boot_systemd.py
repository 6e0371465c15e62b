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
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from tests.processes import die_with_parent, until

HERE = Path(__file__).parent.parent
UNITS = HERE / "examples/systemd"
README = (UNITS / "README.md").read_text()
EMPTY = ("etc/systemd/system", "etc/init.d", "usr/local/bin", "var/lib", "var/log", "srv", "mnt")
"""Where nothing of this system is seen: none of its services starts, none of its data is in reach."""


IMAGES = "/run/snapfs-srv-images"

CAPABILITIES = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_DAC_READ_SEARCH": 2, "CAP_FOWNER": 3, "CAP_FSETID": 4}
CAPABILITIES |= {"CAP_LINUX_IMMUTABLE": 9, "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}
CAPABILITIES |= {"CAP_MKNOD": 27, "CAP_SETFCAP": 31}
"""Their numbers, in linux/capability.h."""

FEATURES = {
    "CAP_CHOWN": """
        touch active/a/rootfs/file
        chown 1000:1000 active/a/rootfs/file""",
    "CAP_DAC_OVERRIDE": """
        install -d -m 700 -o 1000 active/a/rootfs/hers
        install -m 600 -o 1000 /etc/hostname active/a/rootfs/hers/file
        mv active/a committed/base
        mkdir committed/base/active/b
        echo more >>active/b/rootfs/hers/file
        grep '^C /hers/file' active/b/changes
        rm -r active/b/rootfs/hers""",
    "CAP_DAC_READ_SEARCH": """
        feature in_use
        said() { dmesg | grep -c 'overlayfs: workdir and upperdir must be separate' || :; }
        before=$(said)
        mv active/a committed/base
        test "$(said)" = "$before" """,  # without, the kernel is asked in a way of which its log tells
    "CAP_FOWNER": """
        touch active/a/rootfs/file
        chown 1000 active/a/rootfs/file
        chmod 640 active/a/rootfs/file""",
    "CAP_FSETID": """
        touch active/a/rootfs/file
        chown 1000:1000 active/a/rootfs/file
        chmod 2711 active/a/rootfs/file
        test -g active/a/rootfs/file""",
    "CAP_LINUX_IMMUTABLE": """
        touch active/a/rootfs/immutable
        chattr +i "$(readlink -f active/a/diff)/immutable"
        rmdir active/a
        timeout 5 sh -c 'while find /srv/images -name immutable | grep .; do sleep 0.1; done'""",
    "CAP_MKNOD": """
        mknod active/a/rootfs/device c 1 11""",
    "CAP_SETFCAP": """
        feature remap_ids""",
    "CAP_SYS_ADMIN": """
        touch active/a/rootfs/file""",
    "CAP_SYS_CHROOT": """
        timeout 5 unshare -m sh -c 'sh active/a/mount.sh /mnt; touch /mnt/file /run/there; sleep 5' &
        until test -e /run/there; do sleep 0.05; done
        test -e active/a/rootfs/file""",
    "CAP_SYS_PTRACE": """
        cd active/a/rootfs
        timeout 5 sleep 5 &
        cd ../../..
        ! mv active/a committed/no
        grep 'is in use by process [0-9]* (timeout)' .snapfs/error_log""",
}
"""What works, in a tree, because of one capability that the units leave.  All of them need most of the others besides."""


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
        (self.root / "etc/systemd/system.conf.d").mkdir(exist_ok=True)  # a test is quicker than the limit of starts
        (self.root / "etc/systemd/system.conf.d/tests.conf").write_text("[Manager]\nDefaultStartLimitIntervalSec=0\n")
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


def works(machine: Machine, capability: str) -> str:
    """What goes wrong in the tree of /srv/images; "" where nothing does."""
    feature = """feature() { tr -d ' \\n' <.snapfs/options.json | grep "\\"$1\\":{\\"on\\":true"; }"""
    try:
        machine(f"exec 2>&1; {feature}; cd {IMAGES}; mkdir active/a{FEATURES[capability]}")
    except AssertionError as failure:
        return str(failure)
    finally:
        machine("set +e; pkill -x timeout; rm -f /run/there; chattr -R -f -i /srv/images/snapshots", check=False)
        machine(f"set +e; cd {IMAGES}; rmdir active/*; rmdir committed/*", check=False)
    return ""


@pytest.fixture(scope="module")
def images(machine: Machine) -> Machine:
    """With /srv/images served with all options that take rights."""
    machine("mkdir -p /etc/snapfs && echo 'OPTIONS=-o allow_other,remap_ids,slow_chown' >/etc/snapfs/srv-images.conf")
    machine("systemctl restart snapfs@srv-images")
    return machine


@contextmanager
def changed(machine: Machine, *lines: str) -> Iterator[bool]:
    """With these lines added to the unit of /srv/images; whether it starts."""
    drop_in = "/run/systemd/system/snapfs@srv-images.service.d"
    text = "".join(f"{line}\\n" for line in ("[Service]", *lines))
    machine(f"mkdir -p {drop_in} && printf '{text}' >{drop_in}/changed.conf && systemctl daemon-reload")
    try:
        yield "failed" not in machine("systemctl restart snapfs@srv-images", check=False)
    finally:
        machine(f"rm -r {drop_in} && systemctl daemon-reload && systemctl restart snapfs@srv-images")


@pytest.mark.parametrize("capability", FEATURES)
def test_what_the_unit_leaves(images: Machine, capability: str) -> None:
    assert works(images, capability) == ""


@pytest.mark.parametrize("capability", FEATURES)
def test_the_unit_leaves_no_more(images: Machine, capability: str) -> None:
    """Without the capability it is for, the feature does not work."""
    with changed(images, f"CapabilityBoundingSet=~{capability}", "Restart=no") as started:
        assert not started or works(images, capability) != ""


def test_mounts_are_taken_over(images: Machine) -> None:
    """Who works in a snapshot when the daemon is killed works on, and is named by the next one."""
    images(f"mkdir {IMAGES}/active/a; cd {IMAGES}/active/a/rootfs; touch file; setsid sleep 60 >/dev/null 2>&1 &")
    before, (pid,) = images.mounts(), images.show("snapfs@srv-images", "MainPID")
    images(f"kill -KILL {pid}")
    until(lambda: images.show("snapfs@srv-images", "NRestarts", "ActiveState") == ["1", "active"], "it is started again")
    assert images.mounts() == before
    assert "busy" in images(f"mv {IMAGES}/active/a {IMAGES}/committed/a", check=False)
    assert re.search(r"is in use by process \d+ \(sleep\)", images(f"tail -n 1 {IMAGES}/.snapfs/error_log"))
    images(f"pkill -x sleep; cd {IMAGES} && mv active/a committed/a && ls committed/a/rootfs/file && rmdir committed/a")


def test_owners_by_slow_chown(images: Machine) -> None:
    """Where the daemon may make no user namespace, and so finds that layers can't be mounted idmapped."""
    with changed(images, "RestrictNamespaces=", "RestrictNamespaces=mnt"):
        images(f"cd {IMAGES}; mkdir active/a; cd active/a/rootfs; touch file; chmod 6755 file; mknod device c 1 11")
        for kind in "ug":
            images(f"echo 0:100000:65536 >'{IMAGES}/active/a/labels/containerd.io%2Fsnapshot%2F{kind}idmapping'")
        assert images(f"stat -c %u:%g:%a {IMAGES}/active/a/rootfs/*").split() == ["100000:100000:644", "100000:100000:6755"]
        assert "A /device" in images(f"cd {IMAGES}; mv active/a committed/b; cat committed/b/changes committed/b/usage.json")
        images(f"rmdir {IMAGES}/committed/b")


def test_what_a_user_may_enter(images: Machine) -> None:
    """The unit's umask is not that of the directories that it makes on the way to the tree."""
    images(f"mkdir {IMAGES}/active/a && cd / && setpriv --reuid 1000 --regid 1000 --clear-groups ls {IMAGES}/active")
    images(f"rmdir {IMAGES}/active/a; systemctl stop snapfs@srv-images")
    images("mkdir -p /mnt/far/away && chmod 755 /mnt/far /mnt/far/away")
    images("echo MOUNTPOINT=/mnt/far/away >>/etc/snapfs/srv-images.conf; systemctl start snapfs@srv-images")
    assert images("cd /; setpriv --reuid 1000 --regid 1000 --clear-groups ls /mnt/far/away/active") == ""
    images("systemctl stop snapfs@srv-images")


def test_hardened_as_it_says(images: Machine) -> None:
    """What systemd has made of the unit: no mount namespace of its own, no device but FUSE's, no socket but a local one."""
    images("systemctl start snapfs@srv-images")
    (pid,) = images.show("snapfs@srv-images", "MainPID")
    assert images(f"readlink /proc/{pid}/ns/mnt") == images("readlink /proc/1/ns/mnt")
    status = dict(line.split(":\t", 1) for line in images(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    wanted = sum(1 << CAPABILITIES[name] for name in FEATURES)
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {wanted}
    assert "Max core file size 0 0" in " ".join(images(f"cat /proc/{pid}/limits").split())
    assert images.show("snapfs@srv-images", "MemoryMax") == [str(1 << 30)]
