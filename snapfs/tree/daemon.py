"""The root directory, and the nodes in it that belong to no snapshot: README, .nomedia and .snapfs/."""

from __future__ import annotations

import importlib.resources
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from snapfs import names
from snapfs.errors import InvalidArgument, NotFound
from snapfs.model import Kind
from snapfs.tree.advice import why_no_rootfs
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.links import ByIdDirectory
from snapfs.tree.listing import ListingFile
from snapfs.tree.log import Log, OpenLog
from snapfs.tree.metrics import metrics
from snapfs.tree.node import Attributes, Directory, File, Handle, Node, OpenText, Slot, pack, pack_version
from snapfs.tree.stats import options_json, stats_json
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree


class FixedDirectory(Directory):
    """A directory whose entries never change."""

    def __init__(self, tree: Tree, slot: Slot, path: str, contents: dict[str, Slot]) -> None:
        super().__init__(tree, pack(0, slot))
        self._path = path
        self._contents = contents

    @property
    def path(self) -> str:
        return self._path

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.tree.started)

    def lookup(self, name: str) -> Node:
        slot = self._contents.get(name)
        if slot is None:
            raise NotFound(f"{self.path}/{names.printable(name)} does not exist")
        return daemon_node(self.tree, slot)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        for name, slot in self._contents.items():
            if slot > after:
                yield slot, name, daemon_node(self.tree, slot)


class DaemonFile(File):
    """A file of the daemon's: of one text, which is its inode's unless the file is ``fixed``."""

    def __init__(
        self, tree: Tree, slot: Slot, path: str, render: Callable[[Tree], str], fixed: bool, text: Text | None
    ) -> None:
        super().__init__(tree, pack(0, slot))
        self._path = path
        self._text = text or Text(render(tree).encode())
        self._fixed = fixed
        self.keep_entry = fixed
        if not fixed:
            self.inode = pack_version(0, slot, self._text)
            known = tree.versions.get(self.inode)
            if known is not None and (known.size, known.checksum) == (self._text.size, self._text.checksum):
                self._text = known  # with the time that stat(2) has told of it
            tree.versions.keep(self.inode, self._text)

    @property
    def path(self) -> str:
        return self._path

    def text(self) -> Text:
        return self._text

    def attributes(self) -> Attributes:
        return Attributes(self.mode, size=self._text.size, time=self.tree.started if self._fixed else self._text.made)


class LogFile(File):
    """A file that grows: each look-up tells its size anew, for sendfile(2) asks for none."""

    keep_entry = False

    def __init__(self, tree: Tree, slot: Slot, path: str, log: Log) -> None:
        super().__init__(tree, pack(0, slot))
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
        return Attributes(self.mode, size=self.text().size, time=self.tree.started)

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        return OpenCleanup(self.tree) if writing else OpenText(self.text())

    async def resize(self, size: int) -> None:
        """Emptied by who is about to write: nothing happens yet."""


class OpenCleanup(Handle):
    """cleanup, open for writing."""

    direct = True
    size = 0

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def read(self, offset: int, size: int) -> bytes:
        return b""

    async def resize(self, size: int) -> None:
        pass

    async def write(self, offset: int, data: bytes) -> int:
        if data.strip() != b"1":
            raise InvalidArgument("write 1 to have removed files deleted")
        await self._tree.snapshotter.cleanup()
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


def readme(tree: Tree) -> str:
    """README, which says nothing of ``rootfs`` where there is none, but why."""
    if tree.snapshotter.has_rootfs:
        return README
    text = README
    for line, instead in _WITHOUT_ROOTFS.items():
        text = text.replace(line, instead)
    return f"{text}\nThere is no rootfs here: {why_no_rootfs(tree)}.\n"


NO_MEDIA = "This file asks what indexes files to stay out of here: it would mount every snapshot's rootfs.\n"

_TEXTS: dict[Slot, tuple[str, Callable[[Tree], str], bool]] = {
    Slot.README: ("README", readme, True),
    Slot.VERSION: (".snapfs/version", lambda tree: f"{tree.version}\n", True),
    Slot.OPTIONS: (".snapfs/options.json", options_json, True),
    Slot.STATS: (".snapfs/stats.json", stats_json, False),
    Slot.METRICS: (".snapfs/metrics", metrics, False),
    Slot.NO_MEDIA: (".nomedia", lambda tree: NO_MEDIA, True),
}

_LOGS: dict[Slot, tuple[str, Callable[[Tree], Log]]] = {
    Slot.ERROR_LOG: (".snapfs/error_log", lambda tree: tree.error_log),
    Slot.EVENTS: (".snapfs/events", lambda tree: tree.events),
}

# in the order of their slots, which is the order of the listings
_DIRECTORIES: dict[Slot, tuple[str, dict[str, Slot]]] = {
    Slot.ROOT: (
        "",
        {
            **{kind.value: Slot[kind.name] for kind in Kind},
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


def daemon_node(tree: Tree, slot: int, text: Text | None = None) -> Node:
    """The node of ``slot`` that belongs to no snapshot; ``text`` is what the file held when it was looked up.  Raises
    NotFound."""
    for kind in Kind:
        if slot == Slot[kind.name]:
            return KindDirectory(tree, kind)
    try:
        known = Slot(slot)
    except ValueError:
        raise NotFound(f"there is no node {slot}") from None
    if known is Slot.BY_ID:
        return ByIdDirectory(tree, pack(0, known))
    if known in _DIRECTORIES:
        return FixedDirectory(tree, known, *_DIRECTORIES[known])
    if known in _TEXTS:
        return DaemonFile(tree, known, *_TEXTS[known], text)
    if known is Slot.LISTING:
        return ListingFile(tree, text)
    if known is Slot.CLEANUP:
        return CleanupFile(tree, pack(0, known))
    if known in _LOGS:
        path, log = _LOGS[known]
        return LogFile(tree, known, path, log(tree))
    raise NotFound(f"there is no node {slot}")
