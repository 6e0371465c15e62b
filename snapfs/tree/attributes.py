"""The attributes of a snapshot: every file and link that its directory shows, in one table.

To add one, write a function that renders it and add a row.  A function takes the tree, the snapshot's id and its record,
and gives the file's text or the link's target, or None where this snapshot hasn't got it.
"""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from snapfs import mountspec, names
from snapfs.errors import Damaged, NotFound
from snapfs.metastore import Record
from snapfs.model import Kind, Usage, rfc3339
from snapfs.tree.node import Attributes, File, Handle, Link, Slot, pack

if TYPE_CHECKING:
    from snapfs.tree.tree import Tree

Render = Callable[["Tree", int, Record], str | None]


class Attribute(msgspec.Struct, frozen=True):
    """One row: name, slot (never changed: it is in the inode), which kinds have it, and how it is rendered.

    ``refresh`` is awaited when the file is opened, for what must be looked up on disk; ``keep`` says that the file's size
    changes only with its own snapshot.
    """

    name: str
    slot: int
    kinds: tuple[Kind, ...]
    render: Render
    type: int = stat.S_IFREG | 0o444
    keep: bool = True
    refresh: Callable[[Tree, int, Record], Awaitable[Any]] | None = None


def json_text(value: object) -> str:
    """One JSON document as all files show it: indented by two, ending in a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def mounts_json(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        return json_text(tree.snapshotter.mounts_of(reader, number, record))


def mount_sh(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        spec = tree.snapshotter.mounts_of(reader, number, record)
    return mountspec.script(spec, tree.snapshotter.layers.snapshots, names.printable(record.name))


def info_json(tree: Tree, number: int, record: Record) -> str:
    with tree.reading() as reader:
        info = tree.snapshotter.shown(reader.info(number, record))
    times = {"created": rfc3339(info.created), "updated": rfc3339(info.updated)}
    return json_text({**msgspec.structs.asdict(info), **times})


def usage_json(tree: Tree, number: int, record: Record) -> str:
    usage: Usage = tree.snapshotter.counting.last_known(number, record)
    return json_text(usage)


async def count(tree: Tree, number: int, record: Record) -> None:
    await tree.snapshotter.counting.usage(number, record)


def parent(tree: Tree, number: int, record: Record) -> str | None:
    if not record.parent:
        return None
    with tree.reading() as reader:
        return "../../committed/" + names.encode(reader.parent_of(record).name)


def diff(tree: Tree, number: int, record: Record) -> str:
    return tree.snapshotter.layers.fs(number)


UNKNOWN_SIZE = 4096  # of a file that has content, as in sysfs

ALL = (Kind.ACTIVE, Kind.VIEW, Kind.COMMITTED)
_LINK = stat.S_IFLNK | 0o777

ATTRIBUTES = (
    Attribute("mounts.json", 16, (Kind.ACTIVE, Kind.VIEW), mounts_json),
    Attribute("mount.sh", 17, (Kind.ACTIVE, Kind.VIEW), mount_sh, type=stat.S_IFREG | 0o555),
    Attribute("info.json", 18, ALL, info_json, keep=False),  # names the parent, which may be renamed
    Attribute("usage.json", 19, ALL, usage_json, keep=False, refresh=count),
    Attribute("parent", 20, ALL, parent, type=_LINK, keep=False),
    Attribute("diff", 21, (Kind.ACTIVE, Kind.COMMITTED), diff, type=_LINK),
)

BY_SLOT = {attribute.slot: attribute for attribute in ATTRIBUTES}
BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}

assert all(Slot.FIRST_ATTRIBUTE <= attribute.slot < Slot.INSIDE for attribute in ATTRIBUTES)


class _Attribute:
    """What the two kinds of node that stand for a row share."""

    tree: Tree
    keep_entry: bool

    def __init__(self, tree: Tree, number: int, record: Record, attribute: Attribute) -> None:
        self.tree = tree
        self.inode = pack(number, attribute.slot)
        self.number = number
        self.record = record
        self.attribute = attribute
        self.keep_entry = attribute.keep  # who opens it is to know its size: a look-up tells

    @property
    def path(self) -> str:
        return f"{self.record.kind}/{names.encode(self.record.name)}/{self.attribute.name}"

    def text(self) -> str:
        text = self.attribute.render(self.tree, self.number, self.record)
        if text is None:
            raise NotFound(f"{self.path} does not exist")
        return text

    def attributes(self) -> Attributes:
        try:
            size, keep = len(self.text().encode()), self.attribute.keep
        except Damaged:  # it is listed all the same; who reads it is told
            size, keep = UNKNOWN_SIZE, False
        return Attributes(self.attribute.type, size=size, time=self.record.updated, keep=keep)


class AttributeFile(_Attribute, File):
    """A file of the table."""

    def content(self) -> bytes:
        return self.text().encode()

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        if self.attribute.refresh is not None and not writing:
            await self.attribute.refresh(self.tree, self.number, self.record)
            self.record = self.tree.record(self.number)
        return await super().open(writing, truncate)


class AttributeLink(_Attribute, Link):
    """A link of the table."""

    def target(self) -> str:
        return self.text()


def attribute_node(tree: Tree, number: int, record: Record, attribute: Attribute) -> AttributeFile | AttributeLink | None:
    """The node of a row, None where this snapshot hasn't got it."""
    if record.kind not in attribute.kinds or attribute.name in tree.hidden.get(number, ()):
        return None
    if attribute.name == "parent" and not record.parent:
        return None
    make = AttributeLink if stat.S_ISLNK(attribute.type) else AttributeFile
    return make(tree, number, record, attribute)
