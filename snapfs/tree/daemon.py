"""The root directory, and what in it belongs to no snapshot: README, .nomedia and .snapfs/."""

from __future__ import annotations

import importlib.resources
import stat
from collections.abc import Callable, Iterator

import trio

from snapfs import names
from snapfs.errors import InvalidArgument, NotFound, TryAgain
from snapfs.model import Kind
from snapfs.tree.advice import why_no_rootfs
from snapfs.tree.handles import Handle, OpenText
from snapfs.tree.images import IMAGES, ImagesDirectory
from snapfs.tree.inodes import KINDS, Slot, pack
from snapfs.tree.links import ByIdDirectory
from snapfs.tree.listing import ListingFile
from snapfs.tree.log import Log, OpenLog
from snapfs.tree.metrics import metrics
from snapfs.tree.node import Attributes, Directory, File, Node
from snapfs.tree.snapshots import SnapshotsDirectory
from snapfs.tree.state import State
from snapfs.tree.stats import options_json, stats_json
from snapfs.tree.textfile import TextFile
from snapfs.tree.texts import Text

AFTER_ANOTHER = 1.5  # seconds that a Cleanup waits for another to end


class FixedDirectory(Directory):
    """A directory whose entries never change."""

    def __init__(self, state: State, slot: Slot, path: str, contents: dict[str, Slot]) -> None:
        super().__init__(state, pack(0, slot))
        self._path = path
        self._contents = contents

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.state.started)

    def lookup(self, name: str) -> Node:
        slot = self._contents.get(name)
        if slot is None:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return node_outside_snapshots(self.state, slot)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        for name, slot in self._contents.items():
            if slot > after:
                yield slot, name, node_outside_snapshots(self.state, slot)


class DaemonFile(TextFile):
    """A file about the daemon itself, whose text ``rendered`` makes."""

    def __init__(
        self, state: State, slot: Slot, path: str, rendered: Callable[[State], str], fixed: bool, text: Text | None
    ) -> None:
        self._path = path
        self._rendered = rendered
        self.keep_entry = fixed
        super().__init__(state, 0, slot, fixed=fixed, text=text)

    @property
    def path(self) -> str:
        return self._path

    def render(self) -> Text:
        return self.state.sparing.text(self._path, lambda: Text(self._rendered(self.state).encode()))

    def time(self) -> int:
        return self.state.started if self.fixed else self.text().made


class LogFile(File):
    """A file that grows: each look-up tells its size anew, since sendfile(2) goes by that and asks for no other."""

    keep_entry = False

    def __init__(self, state: State, slot: Slot, path: str, log: Log) -> None:
        super().__init__(state, pack(0, slot))
        self._path = path
        self._log = log

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=self._log.size, time=self._log.changed, keep=False)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        if writing or truncate:
            return await super().open(writing, truncate)
        return OpenLog(self._log)


class CleanupFile(File):
    """cleanup: writing 1 is Cleanup."""

    mode = stat.S_IFREG | 0o666

    @property
    def path(self) -> str:
        return ".snapfs/cleanup"

    def text(self) -> Text:
        return Text(b"Write 1 here to delete what removed snapshots, and crashes, left; the write returns when it is gone.\n")

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=self.text().size, time=self.state.started)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        """Raises TryAgain while another Cleanup takes long: the kernel lets one write at a time, and the next would wait for
        that without anybody who could tell it how long."""
        if writing and self.state.cleaned is not None:
            with trio.move_on_after(AFTER_ANOTHER):
                await self.state.cleaned.wait()
            if self.state.cleaned is not None:
                raise TryAgain("the Cleanup that another process has asked for is still deleting files")
        return OpenCleanup(self.state) if writing else OpenText(self.text())

    async def resize(self, size: int) -> None:
        """A shell empties the file before it writes: nothing happens yet."""


class OpenCleanup(Handle):
    """cleanup, open for writing."""

    direct = True
    size = 0
    waits_for = does = "cleanup"

    def __init__(self, state: State) -> None:
        self._state = state

    def read(self, offset: int, size: int) -> bytes:
        return b""

    async def resize(self, size: int) -> None:
        pass

    async def write(self, offset: int, data: bytes) -> int:
        if data.strip() != b"1":
            raise InvalidArgument("write 1 to have removed files deleted")
        cleaned = self._state.cleaned = trio.Event()
        try:
            await self._state.snapshotter.cleanup()
        finally:
            cleaned.set()
            if self._state.cleaned is cleaned:
                self._state.cleaned = None
        return len(data)


README = (importlib.resources.files(__package__) / "README.txt").read_text()

_WITHOUT_ROOTFS = {
    "cp -a FILES active/b/rootfs/          its file system, mounted when you follow the link": (
        "sh active/b/mount.sh DIR              its file system, mounted on DIR; cp -a FILES DIR, umount DIR"
    ),
    "cd active/web/rootfs                  the two as one; or mount it yourself: mounts.json, mount.sh": (
        "sh active/web/mount.sh DIR            the two as one; mounts.json says the same"
    ),
    "leave its rootfs first": "unmount it first",
}
assert all(line in README for line in _WITHOUT_ROOTFS)


WINDOW = """
rootfs leads into a namespace of the daemon's: look and copy there. To work in a snapshot (git, make,
a build), stand inside: snapfs shell KEY, or snapfs run KEY -- CMD.
"""


def readme(state: State) -> str:
    """README, which tells where to work if ``rootfs`` isn't where others see it, and which says nothing of ``rootfs`` where
    there is none, but why."""
    if state.snapshotter.has_rootfs:
        return README + WINDOW if state.window else README
    text = README
    for line, instead in _WITHOUT_ROOTFS.items():
        text = text.replace(line, instead)
    return f"{text}\nThere is no rootfs here: {why_no_rootfs(state)}.\n"


NO_MEDIA = "This file asks what indexes files to stay out of here: it would mount every snapshot's rootfs.\n"

_TEXTS: dict[Slot, tuple[str, Callable[[State], str], bool]] = {
    Slot.README: ("README", readme, True),
    Slot.VERSION: (".snapfs/version", lambda state: f"{state.version}\n", True),
    Slot.OPTIONS: (".snapfs/options.json", options_json, True),
    Slot.STATS: (".snapfs/stats.json", stats_json, False),
    Slot.METRICS: (".snapfs/metrics", metrics, False),
    Slot.NO_MEDIA: (".nomedia", lambda state: NO_MEDIA, True),
}

_LOGS: dict[Slot, tuple[str, Callable[[State], Log]]] = {
    Slot.ERROR_LOG: (".snapfs/error_log", lambda state: state.error_log),
    Slot.EVENTS: (".snapfs/events", lambda state: state.events),
}

# in the order of their slots, which is the order of the listings
_DIRECTORIES: dict[Slot, tuple[str, dict[str, Slot]]] = {
    Slot.ROOT: (
        "",
        {
            **{kind.value: Slot[kind.name] for kind in Kind},
            IMAGES: Slot.IMAGES,
            "README": Slot.README,
            "by-id": Slot.BY_ID,
            ".snapfs": Slot.DAEMON,
            ".nomedia": Slot.NO_MEDIA,
        },
    ),
    Slot.DAEMON: (
        ".snapfs",
        {
            "version": Slot.VERSION,
            "error_log": Slot.ERROR_LOG,
            "events": Slot.EVENTS,
            "cleanup": Slot.CLEANUP,
            "options.json": Slot.OPTIONS,
            "stats.json": Slot.STATS,
            "snapshots": Slot.LISTING,
            "metrics": Slot.METRICS,
        },
    ),
}


def node_outside_snapshots(state: State, slot: int, text: Text | None = None) -> Node:
    """The node of ``slot``; ``text`` is what the file held when it was looked up.  Raises NotFound."""
    try:
        known = Slot(slot)
    except ValueError:
        raise NotFound(f"there is no node {slot}") from None
    if known in KINDS:
        return SnapshotsDirectory(state, KINDS[known])
    if known is Slot.IMAGES:
        return ImagesDirectory(state, pack(0, known))
    if known is Slot.BY_ID:
        return ByIdDirectory(state, pack(0, known))
    if known in _DIRECTORIES:
        return FixedDirectory(state, known, *_DIRECTORIES[known])
    if known in _TEXTS:
        return DaemonFile(state, known, *_TEXTS[known], text)
    if known is Slot.LISTING:
        return ListingFile(state, text)
    if known is Slot.CLEANUP:
        return CleanupFile(state, pack(0, known))
    if known in _LOGS:
        path, log = _LOGS[known]
        return LogFile(state, known, path, log(state))
    raise NotFound(f"there is no node {slot}")
