"""The attributes of a snapshot: every file and link that its directory shows, in one table.

To add one, write a function that renders it and add a row.  A function takes what the tree's nodes share (``State``), the
snapshot's id and its record, and gives the file's text or the link's target, or None where this snapshot hasn't got it.
"""

from __future__ import annotations

import contextlib
import math
import stat
import sys
from collections.abc import Awaitable, Callable

import msgspec
import trio

from snapfs import mountspec, names
from snapfs.errors import Damaged, NotFound, TryAgain
from snapfs.imagejson import FILE as IMAGE
from snapfs.model import OWNER, ByNode, Caller, Kind, rfc3339
from snapfs.store.schema import Record
from snapfs.tree import commands, layertar
from snapfs.tree.advice import path_of
from snapfs.tree.commands import Command
from snapfs.tree.handles import Handle
from snapfs.tree.inodes import (
    CHANGES_SLOT,
    CHECKPOINT_SLOT,
    ENTRY_MASK,
    FIRST_ATTRIBUTE,
    IMAGE_SLOT,
    LAYER_SLOT,
    PATCH_SLOT,
    pack,
)
from snapfs.tree.node import Attributes, Link, Node
from snapfs.tree.openimage import OpenImage
from snapfs.tree.state import State
from snapfs.tree.textfile import UNKNOWN_SIZE, TextFile
from snapfs.tree.texts import Text

Render = Callable[[State, int, Record], str | Text | None]


class Attribute(msgspec.Struct, frozen=True):
    """One row: name, slot (never changed: it is in the inode), which kinds have it, and how it is rendered.

    ``present``: whether a snapshot of such a kind has it after all.
    ``fixed``: a file whose text never changes as long as the snapshot has it, or a link of which the kernel is told when it
    leads elsewhere; each text of any other file has an inode of its own.
    ``private``: it tells what is in a layer, for users alone who may read that.
    ``refresh`` is awaited when the file is opened (by a caller), for what must be looked up on disk; ``follow`` when the link
    is followed by a process (its pid), and gives where that leads.  ``is_known``: ``refresh`` has nothing to wait for.
    ``command`` is what writing to it does; ``opened`` opens a file of which the tree has no text; ``rewrite`` one that is
    written as a whole, by the number of the snapshot in inodes.
    """

    name: str
    slot: int
    kinds: tuple[Kind, ...]
    render: Render
    type: int = stat.S_IFREG | 0o444
    fixed: bool = False
    private: bool = False
    present: Callable[[State, Record], bool] = lambda state, record: True
    refresh: Callable[[State, int, Record, Caller], Awaitable[object]] | None = None
    is_known: Callable[[State, int, Record], bool] = lambda state, number, record: False
    follow: Callable[[State, int, Record, int], Awaitable[str]] | None = None
    command: Command | None = None
    opened: Callable[[State, int, Text], Handle] | None = None
    rewrite: Callable[[State, ByNode], Handle] | None = None


def json_text(value: object) -> str:
    """One JSON document as all files show it: indented by two, ending in a newline."""
    return names.plain_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()) + "\n"


def mounts_json(state: State, number: int, record: Record) -> str:
    """The mounts that make the snapshot's file system, as containerd gets them."""
    with state.reading() as reader:
        return json_text(state.snapshotter.mounts_of(reader, number, record))


def mount_sh(state: State, number: int, record: Record) -> str:
    """The same as a shell script, which mounts it on the directory that is its argument."""
    if state.window:
        return mountspec.script_inside(number, f"{state.served['mountpoint']}/by-id/{number}", sys.executable)
    with state.reading() as reader:
        spec = state.snapshotter.mounts_of(reader, number, record)
    return mountspec.script(spec, state.snapshotter.snapshots_directory, number)


async def find_layers(state: State, number: int, record: Record, caller: Caller) -> None:
    """Raise Damaged where a layer that the mounts name is missing."""
    await state.snapshotter.find_layers(number)


def info_json(state: State, number: int, record: Record) -> str:
    """What Stat shows, what registries call the layer, where that is known, and where the file system is mounted."""
    with state.reading() as reader:
        info = state.snapshotter.shown(reader.info(number, record))
        places = state.snapshotter.places(reader, number, record)
        digests = state.snapshotter.known_digests(reader, number, record)
        going = {"flushed": False} if state.snapshotter.is_being_flushed(reader, number) else {}
    times = {"created": rfc3339(info.created), "updated": rfc3339(info.updated)}
    lost = {"state": "unflushed"} if state.snapshotter.is_lost(number) else {}
    shown = [f"{state.window}{place}".encode(errors="surrogateescape").decode(errors="backslashreplace") for place in places]
    fields = {field: value for field, value in msgspec.structs.asdict(info).items() if field != "node"}
    if not info.images:
        del fields["images"]
    return json_text({**fields, **times, **digests, **lost, **going, "mounted": shown})


def usage_json(state: State, number: int, record: Record) -> str:
    """What the snapshot takes, as far as that is known without counting."""
    return json_text(state.snapshotter.known_usage(number, record))


def is_counted(state: State, number: int, record: Record) -> bool:
    """Whether what it takes is stored, or nothing."""
    return record.usage is not None or record.kind is Kind.VIEW


async def count_usage(state: State, number: int, record: Record, caller: Caller) -> None:
    """Count what it takes, if that may have changed."""
    if is_counted(state, number, record):
        return
    await state.snapshotter.usage(number, caller=caller)


def has_parent(state: State, record: Record) -> bool:
    """Whether there is a link ``parent``."""
    return record.parent != 0


def parent(state: State, number: int, record: Record) -> str | None:
    """The link to the parent's directory."""
    if not record.parent:
        return None
    with state.reading() as reader:
        return "../../committed/" + names.encode(reader.parent_of(record).name)


def diff(state: State, number: int, record: Record) -> str:
    """The link to the layer: the directory that holds the snapshot's own files."""
    return state.snapshotter.layer_path(number)


def changes(state: State, number: int, record: Record) -> Text | None:
    """The paths that differ from the parent's, as they were found last; None before that."""
    return state.found(number, CHANGES_SLOT)


def patch(state: State, number: int, record: Record) -> Text | None:
    """The same as a patch."""
    return state.found(number, PATCH_SLOT)


def is_compared(state: State, number: int, record: Record) -> bool:
    """Whether they were found and can't be others any more."""
    return record.kind is Kind.COMMITTED and changes(state, number, record) is not None


def is_patched(state: State, number: int, record: Record) -> bool:
    """The same of the patch."""
    return record.kind is Kind.COMMITTED and patch(state, number, record) is not None


async def find_changes(state: State, number: int, record: Record, caller: Caller) -> Text | None:
    """Find them again, unless the snapshot is committed and they are known.  Hold what is found until the file is open: it may
    be too long to be remembered."""
    while not is_compared(state, number, record):
        text = await state.snapshotter.changes(number, state.spool_found, caller=caller)
        before, record = record, state.record(number)
        if record.kind is before.kind:  # a scan under way at the Commit may have missed what was written before that
            state.keep(number, CHANGES_SLOT, text)
            return text
    return changes(state, number, record)


async def find_patch(state: State, number: int, record: Record, caller: Caller) -> Text | None:
    """The same of the patch."""
    while not is_patched(state, number, record):
        text = await state.snapshotter.patch(number, state.spool_found, caller=caller)
        before, record = record, state.record(number)
        if record.kind is before.kind:
            state.keep(number, PATCH_SLOT, text)
            return text
    return patch(state, number, record)


def has_image(state: State, record: Record) -> bool:
    """Whether there is an image.json: the snapshot, or one that it stands on, has come from an image."""
    with contextlib.suppress(Damaged), state.reading() as reader:
        return state.snapshotter.has_image(reader, record)
    return False


def image_json(state: State, number: int, record: Record) -> Text | None:
    """The image configuration as it was found last; None before that."""
    return state.found(number, IMAGE_SLOT)


async def find_image_json(state: State, number: int, record: Record, caller: Caller) -> Text | None:
    """Find it.  Hold what is found until the file is open: it may be too long to be remembered."""
    found = await state.snapshotter.read_image(number, state.image_text, caller=caller)
    if found is not None:
        state.keep(number, IMAGE_SLOT, found)
    return found


def is_mountable(state: State, record: Record) -> bool:
    """Whether there is a link ``rootfs``."""
    return state.snapshotter.has_rootfs


def rootfs(state: State, number: int, record: Record) -> str | None:
    """The link to where the merged file system is, or will be, mounted."""
    target = state.snapshotter.rootfs_of(number, record)
    return target and f"{state.window}{target}"


async def mount_rootfs(state: State, number: int, record: Record, pid: int) -> str:
    """Mount it for process ``pid``, which follows the link: where.  error_log says why, if that process does not get there."""
    target = await state.snapshotter.mount(number, pid)
    if state.window:
        return target if state.is_inside(pid) else f"{state.window}{target}"
    if unseen := await state.snapshotter.why_unseen(pid, target):
        state.error_log.note("ENOENT", "readlink", f"{path_of(record)}/{ROOTFS}", unseen)
    return target


ROOTFS = "rootfs"

ALL = (Kind.ACTIVE, Kind.VIEW, Kind.COMMITTED)
MOUNTABLE = (Kind.ACTIVE, Kind.VIEW)
WORKSPACES = (Kind.ACTIVE,)
COMMITTED = (Kind.COMMITTED,)
WITH_LAYER = (Kind.ACTIVE, Kind.COMMITTED)
_LINK = stat.S_IFLNK | 0o777
_SCRIPT = stat.S_IFREG | 0o555
_PRIVATE = stat.S_IFREG | 0o400
_COMMAND = stat.S_IFREG | 0o666
_WRITTEN = stat.S_IFREG | 0o666
_PRIVATE_COMMAND = stat.S_IFREG | 0o600

ATTRIBUTES = (
    Attribute("mounts.json", 16, MOUNTABLE, mounts_json, refresh=find_layers),
    Attribute("mount.sh", 17, MOUNTABLE, mount_sh, type=_SCRIPT, refresh=find_layers),
    Attribute("info.json", 18, ALL, info_json),
    Attribute("usage.json", 19, ALL, usage_json, refresh=count_usage, is_known=is_counted),
    Attribute("parent", 20, ALL, parent, type=_LINK, present=has_parent),
    Attribute("diff", 21, WITH_LAYER, diff, type=_LINK, fixed=True),
    Attribute(ROOTFS, 22, ALL, rootfs, type=_LINK, follow=mount_rootfs, present=is_mountable),
    Attribute(
        "changes", CHANGES_SLOT, WITH_LAYER, changes, type=_PRIVATE, private=True, refresh=find_changes, is_known=is_compared
    ),
    Attribute(
        "checkpoint",
        CHECKPOINT_SLOT,
        WORKSPACES,
        commands.checkpoint_list,
        type=_COMMAND,
        refresh=commands.find_checkpoints,
        command=commands.checkpoint,
    ),
    Attribute("rollback", 25, WORKSPACES, commands.rollback_text, type=_COMMAND, fixed=True, command=commands.rollback),
    Attribute("fork", 26, WORKSPACES, commands.fork_text, type=_COMMAND, fixed=True, command=commands.fork),
    Attribute("squash", 32, COMMITTED, commands.squash_text, type=_COMMAND, fixed=True, command=commands.squash),
    Attribute("dissolve", 33, COMMITTED, commands.dissolve_text, type=_COMMAND, fixed=True, command=commands.dissolve),
    Attribute(
        "changes.patch", PATCH_SLOT, WITH_LAYER, patch, type=_PRIVATE, private=True, refresh=find_patch, is_known=is_patched
    ),
    Attribute(
        "compare", 35, ALL, commands.compare_text, type=_PRIVATE_COMMAND, fixed=True, private=True, command=commands.compare
    ),
    Attribute(
        "layer.tar",
        LAYER_SLOT,
        COMMITTED,
        layertar.layer_tar,
        type=_PRIVATE,
        private=True,
        refresh=layertar.index_layer,
        is_known=layertar.is_indexed,
        opened=layertar.open_layer,
    ),
    Attribute(
        IMAGE, IMAGE_SLOT, COMMITTED, image_json, type=_WRITTEN, present=has_image, refresh=find_image_json, rewrite=OpenImage
    ),
)


def attributes_of(state: State, record: Record) -> list[Attribute]:
    """The rows that a snapshot with ``record`` has."""
    return [attribute for attribute in ATTRIBUTES if record.kind in attribute.kinds and attribute.present(state, record)]


BY_SLOT = {attribute.slot: attribute for attribute in ATTRIBUTES}
BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}

assert [attribute.slot for attribute in ATTRIBUTES] == sorted(BY_SLOT)  # the listing goes by slots
assert all(FIRST_ATTRIBUTE <= attribute.slot <= ENTRY_MASK for attribute in ATTRIBUTES)


class AttributeFile(TextFile):
    """A file of the table."""

    def __init__(self, state: State, number: int, record: Record, attribute: Attribute, text: Text | None = None) -> None:
        self.number = number
        self.record = record
        self.attribute = attribute
        self.mode = attribute.type
        self.waits_for = attribute.name if attribute.refresh and not attribute.is_known(state, number, record) else None
        self.private = attribute.private
        self.keep_entry = _keeps_its_name(attribute)
        super().__init__(state, record.node_of(number), attribute.slot, fixed=attribute.fixed, text=text)

    @property
    def path(self) -> str:
        return f"{path_of(self.record)}/{self.attribute.name}"

    def render(self) -> Text | None:
        text = self.attribute.render(self.state, self.number, self.record)
        return Text(text.encode(errors="surrogateescape")) if isinstance(text, str) else text

    def time(self) -> int:
        return self.record.updated

    async def open(self, writing: bool = False, truncate: bool = False) -> Handle:
        command, opened, rewrite = self.attribute.command, self.attribute.opened, self.attribute.rewrite
        if opened is not None and not writing and not truncate:
            return opened(self.state, self.number, self.text())
        if rewrite is not None and (writing or truncate):
            return rewrite(self.state, ByNode(self.record.node_of(self.number)))
        if command is None or not writing:
            return await super().open(writing, truncate and command is None)
        return commands.OpenCommand(self.state, self.attribute.name, ByNode(self.record.node_of(self.number)), command)

    async def resize(self, size: int) -> None:
        if self.attribute.command is None and (self.attribute.rewrite is None or size):
            await super().resize(size)

    async def refresh(self, caller: Caller = OWNER) -> Node:
        refresh = self.attribute.refresh
        if refresh is None:
            return self
        self.known()  # of the record as it is now, whatever comes while the disk is looked at
        found: list[object] = []

        async def look(number: int, record: Record) -> None:
            found[:] = [await refresh(self.state, number, record, caller)]  # held until the node has it

        number, record = await _of_the_same(self.state, self.number, self.record, look, caller.patience)
        node = attribute_node(self.state, number, record, self.attribute)
        if node is None:
            raise NotFound(f"{path_of(record)} has no such entry")
        return node


class AttributeLink(Link):
    """A link of the table."""

    def __init__(self, state: State, number: int, record: Record, attribute: Attribute) -> None:
        super().__init__(state, pack(record.node_of(number), attribute.slot))
        self.number = number
        self.record = record
        self.attribute = attribute
        self.keep_entry = _keeps_its_name(attribute)
        self.waits_for = attribute.name if attribute.follow else None

    @property
    def path(self) -> str:
        return f"{path_of(self.record)}/{self.attribute.name}"

    def target(self) -> str:
        target = self.attribute.render(self.state, self.number, self.record)
        if target is None:
            raise NotFound(f"{self.path} does not exist")
        assert isinstance(target, str)
        return target

    async def follow(self, pid: int) -> str:
        follow = self.attribute.follow
        if follow is None:
            return self.target()
        found: list[str] = []

        async def look(number: int, record: Record) -> None:
            found.append(await follow(self.state, number, record, pid))

        await _of_the_same(self.state, self.number, self.record, look)
        return found[-1]

    def attributes(self) -> Attributes:
        try:
            size, keep = len(self.target().encode(errors="surrogateescape")), self.attribute.fixed
        except Damaged:  # it is listed all the same; a process that follows it is told
            size, keep = UNKNOWN_SIZE, False
        return Attributes(self.attribute.type, size=size, time=self.record.updated, keep=keep)


async def _of_the_same(
    state: State,
    number: int,
    record: Record,
    look: Callable[[int, Record], Awaitable[object]],
    patience: float = math.inf,
) -> tuple[int, Record]:
    """Do ``look`` for snapshot ``number``, or for what it has become meanwhile, if it is a workspace: id and record of that, by
    whatever name it goes.  Raises TryAgain where it has become another, again and again, for ``patience`` seconds."""
    node = record.node_of(number)
    became: float | None = None
    while True:
        missing: NotFound | None = None
        try:
            await look(number, record)
        except NotFound as error:
            missing = error
        looked_at = number
        number, record = state.snapshot(node)
        if number == looked_at:
            if missing is not None:
                raise missing
            return number, record
        now = trio.current_time()
        became = now if became is None else became
        if now > became + patience:
            raise TryAgain(f"{path_of(record)} was kept or rolled back, again and again, meanwhile")


def _keeps_its_name(attribute: Attribute) -> bool:
    """Whether the name leads to the same inode for as long as the snapshot's directory has one: a Commit takes the names away
    that not every kind has."""
    return attribute.fixed and len(attribute.kinds) == len(Kind)


def attribute_node(
    state: State, number: int, record: Record, attribute: Attribute, text: Text | None = None
) -> AttributeFile | AttributeLink | None:
    """The node of a row, None where this snapshot hasn't got it; ``text`` is what the file held when it was looked up."""
    if record.kind not in attribute.kinds or not attribute.present(state, record) or state.hidden.has(number, attribute.name):
        return None
    if stat.S_ISLNK(attribute.type):
        return AttributeLink(state, number, record, attribute)
    return AttributeFile(state, number, record, attribute, text)
