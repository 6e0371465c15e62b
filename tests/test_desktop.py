"""File managers: gio, Midnight Commander in a terminal, PCManFM on a screen of its own.  What they do is seen in the tree."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.kernel.mounttable import mount_table
from tests.conftest import Daemon, die_with_parent

PICTURE = Path(__file__).parent.parent / "examples/pcmanfm.png"


def until(true: Callable[[], object], what: str, shown: Callable[[], str] = str) -> None:
    """Wait for what a program does that can't tell when it has; ``shown`` says what is to be seen instead."""
    for _ in range(750):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError(f"it never came about: {what}{shown()}")


def rootfs_mounts(daemon: Daemon) -> list[str]:
    return [mount.target for mount in mount_table() if mount.target.startswith(f"{daemon.root}/rootfs/")]


def gio(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["gio", *map(str, words)], input=stdin, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, directory in (("HOME", "home"), ("XDG_RUNTIME_DIR", "run")):
        (tmp_path / directory).mkdir(mode=0o700)
        monkeypatch.setenv(name, str(tmp_path / directory))
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    return tmp_path / "home"


def test_gio(daemon: Daemon, home: Path) -> None:
    mnt = daemon.mnt
    assert gio("mkdir", mnt / "active/a").returncode == 0
    assert gio("rename", mnt / "active/a", "b").returncode == 0
    assert gio("list", mnt / "active").stdout == "b\n"
    assert json.loads(gio("cat", mnt / "active/b/info.json").stdout)["name"] == "b"
    assert gio("save", mnt / "active/b/labels/team", stdin="blue\n").returncode == 0
    assert (mnt / "active/b/labels/team").read_text() == "blue\n"
    assert gio("move", mnt / "active/b", mnt / "committed/base").returncode == 0
    assert "base" in gio("tree", mnt).stdout
    size = (mnt / "committed/base/info.json").stat().st_size
    assert f"standard::size: {size}\n" in gio("info", mnt / "committed/base/info.json").stdout
    assert len(rootfs_mounts(daemon)) <= 1, (
        "gio asks where each link leads, which mounts rootfs: in one's directory, and no more"
    )
    assert gio("trash", mnt / "committed/base").returncode != 0, "there is no trash folder to move it to"
    assert os.listdir(mnt / "committed") == ["base"]
    assert gio("remove", "-f", mnt / "committed/base/labels/team").returncode == 0
    os.mkdir(mnt / "committed/base/active/child")
    assert gio("move", mnt / "active/child", home).returncode != 0
    assert os.listdir(mnt / "active") == ["child"]


# -- Midnight Commander


class Terminal:
    """tmux with a server of its own."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]

    def run(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], capture_output=True, text=True, timeout=30, check=True).stdout

    def shows(self, text: str) -> None:
        until(lambda: text in self.run("capture-pane", "-p"), f"{text} on the screen")

    def keys(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)


@contextmanager
def commander(tmp_path: Path, left: Path, right: Path) -> Iterator[Terminal]:
    """mc with these two panels, the left one in use."""
    terminal = Terminal(tmp_path / "tmux")
    terminal.run("new-session", "-d", "-x", "120", "-y", "40", f"TERM=xterm-256color exec mc -b -X -u '{left}' '{right}'")
    try:
        terminal.shows("10Quit")
        yield terminal
    finally:
        terminal.run("kill-server")


def test_midnight_commander(daemon: Daemon, home: Path, tmp_path: Path) -> None:
    mnt = daemon.mnt
    with commander(tmp_path, mnt / "active", mnt / "committed") as mc:
        mc.keys("F7")
        mc.shows("Enter directory name")
        mc.type("web")
        mc.keys("Enter")
        until(lambda: os.listdir(mnt / "active") == ["web"], "web is prepared")
        mc.shows("/web")
        mc.keys("Home", "Down", "F6")
        mc.shows("Move directory")
        mc.keys("C-a", "C-k")
        mc.type(f"{mnt}/committed/v1")
        mc.keys("Enter")
        until(lambda: os.listdir(mnt / "committed") == ["v1"], "v1 is committed")
        assert rootfs_mounts(daemon) == []
        mc.keys("Tab", "Home", "Down", "F8")
        mc.shows("Delete directory")
        mc.keys("Enter")
        mc.shows("ecursively")
        mc.type("y")
        until(lambda: os.listdir(mnt / "committed") == [], "v1 is removed", lambda: mc.run("capture-pane", "-p"))


# -- PCManFM


@contextmanager
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An X server of the test's own, with a display that it chooses."""
    read, write = os.pipe()
    words = ["Xvfb", "-displayfd", str(write), "-screen", "0", "640x480x24", "-nolisten", "tcp"]
    with subprocess.Popen(words, pass_fds=[write], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as server:
        os.close(write)
        try:
            with open(read) as number:
                monkeypatch.setenv("DISPLAY", f":{int(number.readline())}")
            yield
        finally:
            server.terminate()


def xdotool(*words: str) -> str:
    return subprocess.run(["xdotool", *words], capture_output=True, text=True, timeout=30, check=False).stdout


def test_pcmanfm(daemon: Daemon, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnt = daemon.mnt
    for key in ("base", "v1"):
        os.mkdir(mnt / "active" / key)
        os.rename(mnt / "active" / key, mnt / "committed" / key)
    os.mkdir(mnt / "committed/base/active/web")
    with screen(tmp_path, monkeypatch):
        words = ["dbus-run-session", "--", "pcmanfm", "--no-desktop", str(mnt / "active")]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True) as manager:
            try:
                until(lambda: xdotool("search", "--onlyvisible", "--name", "^active$"), "a window")
                xdotool("search", "--onlyvisible", "--name", "^active$", "windowfocus")
                before = set(os.listdir(mnt / "active"))
                xdotool("key", "ctrl+shift+n")
                until(lambda: xdotool("search", "--onlyvisible", "--name", "Creating"), "a dialog")
                xdotool("search", "--onlyvisible", "--name", "Creating", "windowfocus")
                xdotool("key", "ctrl+a")
                xdotool("type", "made")
                xdotool("key", "Return")
                until(lambda: set(os.listdir(mnt / "active")) == before | {"made"}, "made is prepared")
                assert rootfs_mounts(daemon) == [], "no thumbnailer mounts anything"
                if os.environ.get("SNAPFS_PICTURE"):
                    subprocess.run(["import", "-window", "root", "-colors", "64", str(PICTURE)], check=True)
            finally:
                os.killpg(manager.pid, 15)
