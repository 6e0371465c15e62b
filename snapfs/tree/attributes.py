"""The attributes of a snapshot: every file and link that its directory shows, in one table.

To add one, write a function that renders it and add a row.  A function takes the tree, the snapshot's id and its record,
and gives the file's text or the link's target, or None where this snapshot hasn't got it.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from snapfs import mountspec, names
from snapfs.errors import Damaged, NotFound
from snapfs.model import Kind, rfc3339
from snapfs.store.schema import Record
from snapfs.tree.node import Attributes, File, Link, Node, Slot, pack, pack_version
from snapfs.tree.texts import Text

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree

Render = Callable[["Tree", int, Record], str | Text | None]


class Attribute(msgspec.Struct, frozen=True):
    """One row: name, slot (never changed: it is in the inode), which kinds have it, and how it is rendered.

    ``present``: whether a snapshot of such a kind has it after all.
    ``fixed``: its text never changes as long as the snapshot has it; each text of any other file has an inode of its own.
    ``private``: it tells what is in a layer, for those alone who may read that.
    ``refresh`` is awaited when the file is opened, for what must be looked up on disk; ``follow`` when the link is followed by
    a process (its pid): where that leads.
    """

    name: str
    slot: int
    kinds: tuple[Kind, ...]
    render: Render
    type: int = stat.S_IFREG | 0o444
    fixed: bool = False
    private: bool = False
    present: Callable[[Tree, Record], bool] = lambda tree, record: True
    refresh: Callable[[Tree, int, Record], Awaitable[object]] | None = None
    follow: Callable[[Tree, int, Record, int], Awaitable[str]] | None = None


def json_text(value: object) -> str:
    """One JSON document as all files show it: indented by two, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def mounts_json(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        return json_text(tree.snapshotter.mounts_of(reader, number, record))


def mount_sh(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        spec = tree.snapshotter.mounts_of(reader, number, record)
    return mountspec.script(spec, tree.snapshotter.snapshots_directory, number)


async def find_layers(tree: Tree, number: int, record: Record) -> None:
    await tree.snapshotter.find_layers(number)


def info_json(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        info = tree.snapshotter.shown(reader.info(number, record))
        places = tree.snapshotter.places(reader, number, record)
    times = {"created": rfc3339(info.created), "updated": rfc3339(info.updated)}
    state = {"state": "unflushed"} if tree.snapshotter.is_lost(number) else {}
    shown = [place.encode(errors="surrogateescape").decode(errors="backslashreplace") for place in places]
    return json_text({**msgspec.structs.asdict(info), **times, **state, "mounted": shown})


def usage_json(tree: Tree, number: int, record: Record) -> str:
    return json_text(tree.snapshotter.known_usage(number, record))


async def count(tree: Tree, number: int, record: Record) -> None:
    await tree.snapshotter.usage(number)


def has_parent(tree: Tree, record: Record) -> bool:
    return record.parent != 0


def parent(tree: Tree, number: int, record: Record) -> str | None:
    if not record.parent:
        return None
    with tree.reading() as reader:
        return "../../committed/" + names.encode(reader.parent_of(record).name)


def diff(tree: Tree, number: int, record: Record) -> str:
    return tree.snapshotter.layer_path(number)


def last_changes(number: int) -> int:
    """Under which inode the text of ``changes`` is remembered that was found last; it stays right once committed."""
    return pack(number, BY_NAME["changes"].slot)


def changes(tree: Tree, number: int, record: Record) -> Text | None:
    return tree.versions.get(last_changes(number))


async def compare(tree: Tree, number: int, record: Record) -> None:
    while record.kind is not Kind.COMMITTED or changes(tree, number, record) is None:
        text = await tree.snapshotter.changes(number, tree.spool)
        before, record = record, tree.record(number)
        if record.kind is before.kind:  # a scan under way at the Commit may have missed what was written before that
            tree.versions.keep(last_changes(number), text)
            return


def is_mountable(tree: Tree, record: Record) -> bool:
    return tree.snapshotter.has_rootfs


def rootfs(tree: Tree, number: int, record: Record) -> str | None:
    return tree.snapshotter.rootfs_of(number, record)


async def mount(tree: Tree, number: int, record: Record, pid: int) -> str:
    target = await tree.snapshotter.mount(number, pid)
    if unseen := await tree.snapshotter.why_unseen(pid, target):
        tree.error_log.note("ENOENT", "readlink", f"{record.kind}/{names.encode(record.name)}/rootfs", unseen)
    return target


ROOTFS = "rootfs"

UNKNOWN_SIZE = 4096  # of a file that has content, as in sysfs

ALL = (Kind.ACTIVE, Kind.VIEW, Kind.COMMITTED)
_LINK = stat.S_IFLNK | 0o777
_SCRIPT = stat.S_IFREG | 0o555
_PRIVATE = stat.S_IFREG | 0o400

ATTRIBUTES = (
    Attribute("mounts.json", 16, (Kind.ACTIVE, Kind.VIEW), mounts_json, fixed=True, refresh=find_layers),
    Attribute("mount.sh", 17, (Kind.ACTIVE, Kind.VIEW), mount_sh, type=_SCRIPT, fixed=True, refresh=find_layers),
    Attribute("info.json", 18, ALL, info_json),
    Attribute("usage.json", 19, ALL, usage_json, refresh=count),
    Attribute("parent", 20, ALL, parent, type=_LINK, present=has_parent),
    Attribute("diff", 21, (Kind.ACTIVE, Kind.COMMITTED), diff, type=_LINK, fixed=True),
    Attribute(ROOTFS, 22, ALL, rootfs, type=_LINK, follow=mount, present=is_mountable),
    Attribute("changes", 23, (Kind.ACTIVE, Kind.COMMITTED), changes, type=_PRIVATE, private=True, refresh=compare),
)


def attributes_of(tree: Tree, record: Record) -> list[Attribute]:
    """The rows that a snapshot with ``record`` has."""
    return [attribute for attribute in ATTRIBUTES if record.kind in attribute.kinds and attribute.present(tree, record)]


BY_SLOT = {attribute.slot: attribute for attribute in ATTRIBUTES}
BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}

assert [attribute.slot for attribute in ATTRIBUTES] == sorted(BY_SLOT)  # the listing goes by slots
assert all(Slot.FIRST_ATTRIBUTE <= attribute.slot < Slot.INSIDE for attribute in ATTRIBUTES)


class _Attribute(Node):
    """What the two kinds of node that stand for a row share."""

    def __init__(self, tree: Tree, number: int, record: Record, attribute: Attribute) -> None:
        super().__init__(tree, pack(number, attribute.slot))
        self.number = number
        self.record = record
        self.attribute = attribute
        # a Commit takes the names away that not every kind has
        self.keep_entry = attribute.fixed and len(attribute.kinds) == len(Kind)

    @property
    def path(self) -> str:
        return f"{self.record.kind}/{names.encode(self.record.name)}/{self.attribute.name}"

    def render(self) -> Text | None:
        text = self.attribute.render(self.tree, self.number, self.record)
        return Text(text.encode(errors="surrogateescape")) if isinstance(text, str) else text

    async def refresh(self) -> Node:
        if self.attribute.refresh is None:
            return self
        await self.attribute.refresh(self.tree, self.number, self.record)
        if self.attribute.fixed:
            return self
        return self.tree.node(pack(self.number, self.attribute.slot))  # by whatever name the snapshot goes now


class AttributeFile(_Attribute, File):
    """A file of the table: of one text, if that is known.  Its inode is that text's, unless the file is fixed."""

    def __init__(self, tree: Tree, number: int, record: Record, attribute: Attribute, text: Text | None = None) -> None:
        super().__init__(tree, number, record, attribute)
        self._text = text
        if text is None:
            with contextlib.suppress(Damaged):  # it is listed all the same; who opens it is told
                self._text = self.render()
        self.is_known = self._text is not None
        if self._text is not None and not attribute.fixed:
            self.inode = pack_version(number, attribute.slot, self._text)
            tree.versions.keep(self.inode, self._text)

    def text(self) -> Text:
        text = self._text or self.render()
        if text is None:
            raise NotFound(f"{self.path} does not exist")
        return text

    def attributes(self) -> Attributes:
        known = self._text is not None
        size = self._text.size if self._text is not None else UNKNOWN_SIZE
        private = self.attribute.private
        return Attributes(self.attribute.type, size, time=self.record.updated, keep=known, private=private)


class AttributeLink(_Attribute, Link):
    """A link of the table."""

    def target(self) -> str:
        text = self.render()
        if text is None:
            raise NotFound(f"{self.path} does not exist")
        return text.read(0, text.size).decode(errors="surrogateescape")

    async def follow(self, pid: int) -> str:
        if self.attribute.follow is None:
            return self.target()
        return await self.attribute.follow(self.tree, self.number, self.record, pid)

    def attributes(self) -> Attributes:
        try:
            size, keep = len(self.target().encode(errors="surrogateescape")), self.attribute.fixed
        except Damaged:  # as with files
            size, keep = UNKNOWN_SIZE, False
        return Attributes(self.attribute.type, size=size, time=self.record.updated, keep=keep)


def attribute_node(
    tree: Tree, number: int, record: Record, attribute: Attribute, text: Text | None = None
) -> AttributeFile | AttributeLink | None:
    """The node of a row, None where this snapshot hasn't got it; ``text`` is what the file held when it was looked up."""
    if tree.is_hidden(number, attribute.name) or record.kind not in attribute.kinds or not attribute.present(tree, record):
        return None
    if stat.S_ISLNK(attribute.type):
        return AttributeLink(tree, number, record, attribute)
    return AttributeFile(tree, number, record, attribute, text)
