"""File managers: gio, Midnight Commander in a terminal, PCManFM and Thunar on a screen of their own; and what makes thumbnails
and indexes of files beside them.  What they do is seen in the tree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.desktop import HEIGHT, WIDTH, Desktop, rootfs_mounts, screen, use_and_remove_all
from tests.processes import die_with_parent, until

pytestmark = pytest.mark.alone  # drags and drops are too quick for a screen that has to wait


def gio(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["gio", *map(str, words)], input=stdin, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, directory in (("HOME", "home"), ("XDG_RUNTIME_DIR", "run")):
        (tmp_path / directory).mkdir(mode=0o700)
        monkeypatch.setenv(name, str(tmp_path / directory))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "run"))  # in which nothing is indexed
    monkeypatch.setenv("GSETTINGS_BACKEND", "keyfile")
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
    for path in ("committed/base", "committed/base/labels/team", "committed/base/info.json"):
        refused = gio("trash", mnt / path)
        assert refused.returncode != 0
        assert "rash" in refused.stderr, "it says that there is no trash folder"
    assert os.listdir(mnt / "committed") == ["base"]
    assert os.listdir(mnt / "committed/base/labels") == ["team"]
    assert os.listdir(home) == [], "nor has anything been copied to that at home"
    assert gio("remove", "-f", mnt / "committed/base/labels/team").returncode == 0
    os.mkdir(mnt / "committed/base/active/child")
    assert gio("move", mnt / "active/child", home).returncode != 0
    assert os.listdir(mnt / "active") == ["child"]


# -- thumbnailers and indexers


@pytest.fixture
def bus(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A session bus, which starts what is asked for."""
    words = ["dbus-daemon", "--session", "--nofork", "--print-address"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=die_with_parent,
        start_new_session=True,
    ) as daemon:
        assert daemon.stdout is not None
        try:
            monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", daemon.stdout.readline().strip())
            yield
        finally:
            os.killpg(daemon.pid, signal.SIGTERM)


def with_picture(daemon: Daemon, key: str) -> Path:
    """Prepare a snapshot with a picture in it; the picture."""
    os.mkdir(daemon.mnt / "active" / key)
    picture = daemon.mnt / "active" / key / "diff/picture.png"
    subprocess.run(["convert", "-size", "300x200", "gradient:blue-red", str(picture)], check=True)
    return picture


class Tracker:
    """Tracker, the indexer of GNOME, with an index of its own of all that is in ``path``."""

    def __init__(self, path: Path) -> None:
        settings = {"index-recursive-directories": [str(path)], "index-single-directories": [], "initial-sleep": 0}
        for key, value in settings.items():
            subprocess.run(
                ["gsettings", "set", "org.freedesktop.Tracker3.Miner.Files", key, str(value)], timeout=30, check=True
            )

    def run(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout

    def status(self) -> str:
        return self.run(*(["tracker3", "status"] if shutil.which("tracker3") else ["localsearch", "status"]))

    def files(self) -> set[str]:
        """All that is in the index, as URIs."""
        query = "select ?uri { ?file a nfo:FileDataObject ; nie:url ?uri }"
        command = ["tracker3", "sparql"] if shutil.which("tracker3") else ["tinysparql", "query"]  # as it is called since 3.8
        shown = self.run(*command, "--dbus-service=org.freedesktop.Tracker3.Miner.Files", "--query", query)
        return {line.strip() for line in shown.splitlines() if line.startswith("  file:")}

    def finds(self, path: Path) -> None:
        """Wait until this file is in the index and nothing is left to be done."""

        def found() -> bool:
            return path.as_uri() in self.files() and "indexing complete" in self.status()

        until(found, f"{path} in the index", lambda: f": {sorted(self.files())}, {self.run('status')}")


@pytest.fixture
def tracked(make_daemon: Callable[..., Daemon], tmp_path: Path, bus: None) -> Daemon:
    """A tree in a folder with documents, and snapshots with a picture in it."""
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter").write_text("Dear reader\n")
    daemon = make_daemon(mnt=documents / "snap").start()
    for key in ("a", "b", "base"):
        with_picture(daemon, key)
    os.rename(daemon.mnt / "active/base", daemon.mnt / "committed/base")
    os.mkdir(daemon.mnt / "committed/base/active/web")
    os.mkdir(daemon.mnt / "committed/base/view/peek")
    return daemon


def test_indexer(tracked: Daemon) -> None:
    documents = tracked.mnt.parent
    tracker = Tracker(documents)
    tracker.finds(documents / "letter")
    inside = [uri for uri in tracker.files() if uri.startswith(f"{tracked.mnt.as_uri()}/")]
    assert inside == [], "the tree asks to be left out"
    assert rootfs_mounts(tracked) == []
    use_and_remove_all(tracked)


def test_indexer_that_is_told_to_index_the_tree(tracked: Daemon) -> None:
    """It asks where each link leads, which mounts rootfs, but is in nobody's way."""
    tracker = Tracker(tracked.mnt)
    tracker.finds(tracked.mnt / "view/peek/info.json")
    use_and_remove_all(tracked)
    until(lambda: rootfs_mounts(tracked) == [], "nothing is mounted any more")


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


@pytest.fixture
def desktop(daemon: Daemon, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desktop]:
    """A PCManFM that shows ``active``, with l3afpad for whatever is text."""
    for key in ("base", "v1"):
        os.mkdir(daemon.mnt / "active" / key)
        (daemon.mnt / "active" / key / "diff/file").write_bytes(b"x" * 100_000)
        os.rename(daemon.mnt / "active" / key, daemon.mnt / "committed" / key)
    os.mkdir(daemon.mnt / "committed/base/active/web")
    (home / ".config").mkdir()
    opens = "".join(f"{kind}=l3afpad.desktop\n" for kind in ("application/json", "text/plain"))
    (home / ".config/mimeapps.list").write_text(f"[Default Applications]\n{opens}[Added Associations]\n{opens}")
    (home / ".gtkrc-2.0").write_text('style "x" { bg[SELECTED] = "#ff00ff" } widget_class "*" style "x"')
    (home / ".config/gtk-3.0").mkdir()  # which PCManFM 1.4 reads
    (home / ".config/gtk-3.0/gtk.css").write_text("*:selected { background-color: #ff00ff }")
    with screen(tmp_path, monkeypatch):
        words = ["dbus-run-session", "--", "pcmanfm", "--no-desktop", str(daemon.mnt / "active")]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True) as manager:
            try:
                desktop = Desktop()
                desktop.window("active")
                yield desktop
            finally:
                os.killpg(manager.pid, signal.SIGTERM)


def test_pcmanfm(daemon: Daemon, desktop: Desktop) -> None:
    active, committed = daemon.mnt / "active", daemon.mnt / "committed"
    desktop.keys("ctrl+shift+n")
    desktop.window("Creating.*")
    desktop.keys("ctrl+a")
    desktop.type("made")
    desktop.keys("Return")
    until(lambda: set(os.listdir(active)) == {"web", "made"}, "made is prepared", desktop.picture)
    desktop.window("active")
    desktop.select(active / "made")
    desktop.keys("F2")
    desktop.window("Rename.*")
    desktop.keys("ctrl+a")
    desktop.type("named")
    desktop.keys("Return")
    until(lambda: set(os.listdir(active)) == {"web", "named"}, "made is renamed", desktop.picture)
    desktop.folder(committed)
    desktop.select(committed / "v1")
    desktop.select(active / "named")
    desktop.keys("ctrl+x")
    desktop.window("committed")
    desktop.keys("ctrl+v")
    until(lambda: "named" in os.listdir(committed), "named is committed", desktop.picture)
    assert os.listdir(active) == ["web"]
    desktop.select(committed / "v1")
    desktop.keys("Delete")
    asked = desktop.window("Confirm")
    desktop.keys("Return")
    desktop.window("Confirm", other_than=asked)  # for there is no trash
    desktop.keys("Return")
    until(lambda: "v1" not in os.listdir(committed), "v1 is removed", desktop.picture)
    desktop.window("committed")
    assert rootfs_mounts(daemon) == [], "no thumbnailer mounts anything"


@pytest.fixture
def window_manager(desktop: Desktop) -> Iterator[None]:
    with subprocess.Popen(["openbox"], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as manager:
        try:
            until(lambda: desktop.do("get_num_desktops"), "there is a window manager", desktop.picture)
            yield
        finally:
            manager.terminate()


@pytest.mark.usefixtures("window_manager")
def test_dragging_in_pcmanfm(daemon: Daemon, desktop: Desktop) -> None:
    active, half = desktop.window("active"), HEIGHT // 2
    committed = desktop.folder(daemon.mnt / "committed")
    desktop.resize(active, 0, half)
    desktop.resize(committed, half, half)
    desktop.select(daemon.mnt / "committed/base")  # when that is there, things can be dropped
    web = desktop.place(active, daemon.mnt / "active/web")
    desktop.drag(web, (committed, str(WIDTH - 100), str(half - 80)))
    until(lambda: "web" in os.listdir(daemon.mnt / "committed"), "web is committed", desktop.picture)
    assert os.listdir(daemon.mnt / "active") == []
    assert daemon.error_log() == []


def test_properties_in_pcmanfm(daemon: Daemon, desktop: Desktop) -> None:
    committed = daemon.mnt / "committed"
    desktop.folder(committed)
    desktop.select(committed / "base")
    size = json.loads((committed / "base/usage.json").read_text())["size"]
    assert size > 100_000
    desktop.properties(size)
    assert rootfs_mounts(daemon) == []


def test_editing_from_pcmanfm(daemon: Daemon, desktop: Desktop) -> None:
    web = daemon.mnt / "active/web"
    (web / "labels/team").write_text("blue\n")
    desktop.folder(web)
    assert len(rootfs_mounts(daemon)) <= 1, (
        "it asks where each link leads, which mounts rootfs: in one's directory, and no more"
    )
    desktop.select(web / "info.json")
    desktop.properties((web / "info.json").stat().st_size)
    desktop.window("web")
    desktop.keys("Return")
    desktop.window("<info.json>")  # as it calls what can't be saved
    desktop.keys("ctrl+q")
    desktop.window("web")
    desktop.folder(web / "labels")
    desktop.select(web / "labels/team")
    desktop.keys("Return")
    desktop.window("team")
    desktop.keys("ctrl+a")
    desktop.type("green")
    desktop.keys("ctrl+s")
    until(lambda: (web / "labels/team").read_text() == "green\n", "the label is saved", desktop.picture)
    assert os.listdir(web / "labels") == ["team"]
    assert json.loads((web / "info.json").read_text())["labels"] == {"team": "green"}


# -- Thunar


@pytest.mark.usefixtures("bus")
def test_thumbnails_in_thunar(daemon: Daemon, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made by tumblerd, while it shows a layer."""
    picture = with_picture(daemon, "web")
    thumbnail = home / ".cache/thumbnails/normal" / f"{hashlib.md5(picture.as_uri().encode()).hexdigest()}.png"
    desktop = Desktop()
    with (
        screen(tmp_path, monkeypatch),
        subprocess.Popen(["thunar", daemon.mnt / "active"], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as thunar,
    ):
        try:
            desktop.window("active - Thunar")
            subprocess.run(["thunar", picture.parent], timeout=30, check=True)
            until(thumbnail.exists, "there is a thumbnail of the picture", desktop.picture)
            assert rootfs_mounts(daemon) == []
            os.rename(daemon.mnt / "active/web", daemon.mnt / "committed/v1")
            os.rmdir(daemon.mnt / "committed/v1")
            assert daemon.error_log() == []
        finally:
            thunar.terminate()
