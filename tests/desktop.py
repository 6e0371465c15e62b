"""A screen, what is done on it with the keyboard and the mouse, and what a desktop leaves behind in a tree."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs.kernel.mounttable import mount_table
from tests.daemon import Daemon
from tests.processes import die_with_parent, until

WIDTH, HEIGHT = 640, 480  # of the screen
MARKED = b"\xff\x00\xff"


def rootfs_mounts(daemon: Daemon) -> list[str]:
    return [
        mount.target for mount in mount_table() if mount.target.startswith(f"{daemon.root}/rootfs/") and mount.type != "tmpfs"
    ]


def use_and_remove_all(daemon: Daemon) -> None:
    """Commit and remove every snapshot, and see that nothing was refused."""
    for key in ("a", "web"):
        os.rename(daemon.mnt / "active" / key, daemon.mnt / "committed" / key)
    for path in ("committed/a", "committed/web", "active/b", "view/peek", "committed/base"):
        os.rmdir(daemon.mnt / path)
    assert daemon.error_log() == []


@contextmanager
def screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An X server of the test's own, with a display that it chooses."""
    read, write = os.pipe()
    # -noreset: or it starts anew when a client leaves that was the only one, and refuses who comes just then
    # -r: or a key that is let go late, because the machine is busy, has been pressed many times
    words = ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp", "-noreset", "-r"]
    with subprocess.Popen(words, pass_fds=[write], stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as server:
        os.close(write)
        try:
            with open(read) as number:
                monkeypatch.setenv("DISPLAY", f":{int(number.readline())}")
            yield
        finally:
            server.terminate()


class Desktop:
    """PCManFM on a screen, without a window manager: whoever is to hear the keyboard is given it."""

    def window(self, name: str, other_than: str = "") -> str:
        """Wait for a window that is called so, and give it the keyboard; its id."""

        def shown() -> list[str]:
            return [one for one in self.do("search", "--onlyvisible", "--name", f"^{name}$").split() if one != other_than]

        until(shown, f"a window {name}", self.picture)
        (found,) = shown()
        self.do("windowraise", found, "windowfocus", "--sync", found)
        return found

    def do(self, *words: str) -> str:
        return subprocess.run(["xdotool", *words], capture_output=True, text=True, timeout=30, check=False).stdout

    def keys(self, *keys: str) -> None:
        self.do("key", *keys)

    def type(self, text: str) -> None:
        self.do("type", text)

    def folder(self, path: Path) -> str:
        """Show this folder in a window of its own, and give it the keyboard; its id."""
        subprocess.run(["pcmanfm", "--new-win", path], timeout=30, check=True)
        return self.window(path.name)

    def select(self, path: Path) -> None:
        """Select it in the window that shows its folder: what copying it puts on the clipboard says when it is."""
        with os.scandir(path.parent) as entries:  # all links lead to directories, which come first
            shown = sorted(
                (entry.is_file(follow_symlinks=False), entry.name.lower(), entry.name)
                for entry in entries
                if not entry.name.startswith(".")
            )
        place = [name for *_, name in shown].index(path.name)

        def selected() -> bool:
            window = self.window(path.parent.name)  # a window manager may have thought of another one meanwhile
            if not self.is_drawn(window):
                return False
            self.keys("Home", *["Right"] * place, "ctrl+c")
            return self.clipboard("x-special/gnome-copied-files") == f"copy\n{path.as_uri()}"

        until(selected, f"{path.name} selected", self.picture)

    def is_drawn(self, window: str) -> bool:
        """Whether there are icons.  A key that comes after PCManFM has read a folder and before it has drawn it kills it."""
        words = ["import", "-window", window, "-crop", "300x60+160+70", "-depth", "8", "rgb:-"]
        seen = subprocess.run(words, capture_output=True, timeout=30, check=True).stdout
        return len({seen[at : at + 3] for at in range(0, len(seen), 3)}) > 10

    def properties(self, size: int) -> None:
        """Show those of what is selected; they are to tell this size in bytes."""
        self.keys("alt+Return")
        self.window("File Properties")

        def told() -> bool:
            self.keys("shift+Tab", "ctrl+c")  # which copies one line
            return f"({size} bytes)" in self.clipboard("UTF8_STRING")

        until(told, f"a size of {size} bytes", self.picture)
        self.keys("Escape")

    def resize(self, window: str, y: int, height: int) -> None:
        """Give a window the whole width of the screen, from ``y`` on."""
        size = f"{WIDTH}x{height}"
        self.do("windowmove", window, "0", str(y), "windowsize", window, *size.split("x"))
        until(lambda: size in self.do("getwindowgeometry", window), f"a window of {size}", self.picture)

    def place(self, window: str, path: Path) -> tuple[str, str, str]:
        """Select the only entry of the folder, and look where in the window its icon is: above its name, which is MARKED then.
        (Of several the one that was selected before may still be: PCManFM answers before it draws.)"""
        self.select(path)
        place: list[int] = []

        def marked() -> bool:
            words = ["import", "-window", window, "-depth", "8", "ppm:-"]
            seen = subprocess.run(words, capture_output=True, timeout=30, check=True).stdout
            _, size, _, pixels = seen.split(b"\n", 3)
            width = int(size.split()[0])
            found = [at // 3 for at in range(0, len(pixels), 3) if pixels[at : at + 3] == MARKED]
            place[:] = [sum(at % width for at in found) // len(found), found[0] // width - 20] if found else []
            return bool(found)

        until(marked, f"the name of {path.name} is marked", self.picture)
        x, y = place
        return window, str(x), str(y)

    def drag(self, start: tuple[str, str, str], end: tuple[str, str, str]) -> None:
        """Drag with the mouse.  PCManFM is to have handled each step before the next, for it finds out meanwhile what would
        be dropped, and where; it has when it answers what is on the clipboard, which is its own."""
        self.do("mousemove", "--window", *start, "mousedown", "1")
        for step in (["mousemove_relative", "5", "5"], ["mousemove", "--window", *end], ["mousemove_relative", "1", "1"]):
            for _ in range(4):
                self.do(*step)
                self.clipboard("x-special/gnome-copied-files")
        self.do("mouseup", "1")

    def clipboard(self, target: str) -> str:
        words = ["xclip", "-selection", "clipboard", "-target", target, "-out"]
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout.strip("\0\n")

    def picture(self) -> str:
        """For what never came about: where the picture is that shows what came instead."""
        path = os.environ.get("SNAPFS_FAILURE")
        if path:
            subprocess.run(["import", "-window", "root", path], check=True)
        names = self.do("search", "--onlyvisible", "--name", ".", "getwindowname", "%@").split("\n")
        return f" among the windows {names}" + (f" (see {path})" if path else "; SNAPFS_FAILURE=FILE.png shows them")
