"""Earlier versions in Thunar's menu and over Samba.  They take many packages, so they are no part of the test run:
``make desktop`` runs them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.desktop import Desktop, screen
from tests.processes import die_with_parent, until
from tests.readme import CLONE

pytest_plugins = ["tests.test_desktop"]  # whose fixtures are used

EXAMPLES = CLONE / "examples/desktop"


@pytest.fixture
def web(daemon: Daemon) -> Path:
    """The files of a workspace with two checkpoints, made in two seconds."""
    mnt = daemon.mnt
    os.mkdir(mnt / "active/web")
    for text in ("one", "two"):
        (mnt / "active/web/rootfs/file").write_text(f"{text}\n")
        began = int(time.time())
        until(lambda: int(time.time()) > began, "another second")  # noqa: B023
        (mnt / "active/web/checkpoint").write_text(f"{text}\n")
    (mnt / "active/web/rootfs/file").write_text("three\n")
    return mnt / "active/web/rootfs"


# -- Thunar


@pytest.mark.usefixtures("bus")
def test_thunar(daemon: Daemon, home: Path, web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of its menu shows the versions, and puts one back; a refusal is a sentence in a window."""
    (home / ".config/Thunar").mkdir(parents=True)
    shutil.copy(EXAMPLES / "uca.xml", home / ".config/Thunar")
    monkeypatch.setenv("PATH", f"{EXAMPLES}:{CLONE}/.venv/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SNAPFS", str(daemon.mnt))
    desktop = Desktop()
    with (
        screen(tmp_path, monkeypatch),
        subprocess.Popen(["thunar", web], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as thunar,
    ):
        try:
            window = desktop.window(".* - Thunar")
            for text, keys in (("two", ["Home"]), ("one", ["Home", "Down"])):
                ask(desktop, window)
                asked = desktop.window("Earlier versions")
                desktop.keys(*keys, "Return")
                desktop.window("Earlier versions", other_than=asked)
                desktop.keys("Return")
                until(lambda: (web / "file").read_text() == f"{text}\n", f"it is {text} again", desktop.picture)  # noqa: B023
        finally:
            thunar.terminate()


def ask(desktop: Desktop, window: str) -> None:
    """Have Thunar show the earlier versions of the only file: the last entry of its menu but one."""
    desktop.do("windowfocus", "--sync", window)
    desktop.keys("ctrl+a", "shift+F10")
    until(lambda: len(desktop.do("search", "--onlyvisible", "--class", "thunar").split()) > 1, "the menu", desktop.picture)
    desktop.keys("Up", "Up", "Return")


# -- Samba

SHARE = """
[global]
private dir = {here}
lock directory = {here}
state directory = {here}
cache directory = {here}
pid directory = {here}
ncalrpc dir = {here}/ncalrpc
log file = {here}/log
smb ports = {port}
interfaces = lo
bind interfaces only = yes
load printers = no
disable spoolss = yes
map to guest = Bad User
[web]
guest ok = yes
read only = no
"""


@pytest.fixture
def share(daemon: Daemon, web: Path, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """smbclient on a share as the README has it: what it says."""
    here = tmp_path / "samba"
    here.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = re.search(r"\n((?: +path = .*\n)(?: +.*\n)+)", (EXAMPLES / "README.md").read_text())
    assert lines is not None
    recipe = lines[1].replace("/snap/", f"{daemon.mnt}/")
    settings = here / "smb.conf"
    settings.write_text(SHARE.format(here=here, port=port) + recipe)

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    def ask(command: str) -> str:
        words = ["smbclient", "-N", "-s", str(settings), "-p", str(port), "//127.0.0.1/web", "-c", command]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    # in a session of its own: at its end it signals its process group
    words = ["smbd", "--foreground", "--no-process-group", "-s", str(settings)]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent) as server:
        try:
            until(answers, "smbd answers")
            yield ask
        finally:
            server.terminate()


def test_samba(daemon: Daemon, web: Path, share: Callable[[str], str], tmp_path: Path) -> None:
    """shadow_copy2 lists the checkpoints as previous versions, shows what is in them, and lets nobody write there."""
    names = sorted(os.listdir(daemon.mnt / "active/web/history"))
    told = share("allinfo file")
    assert re.findall(r"^@GMT-[-.0-9]+$", told, re.MULTILINE) == names[::-1]
    for name, text in zip([*names, ""], ["one\n", "two\n", "three\n"], strict=True):
        share(f"get {name}/file got")
        assert (tmp_path / "got").read_text() == text
    assert "NT_STATUS_MEDIA_WRITE_PROTECTED" in share(f"put got {names[0]}/file")
    assert (daemon.mnt / f"active/web/history/{names[0]}/file").read_text() == "one\n"
