"""images/: names of committed snapshots, as links to their directories.

``ln -s ../committed/v1 images/shop:1`` names one, ``rm`` takes the name away, ``mv`` gives another name.  Only a process that
has just made a name replaces one by that, as ``ln -sf`` does; ``mv`` replaces nothing.  A link leads to where its snapshot is,
whatever it was made with.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator

from snapfs import names
from snapfs.errors import Damaged, InvalidArgument, NotFound, NotPermitted, NotUtf8
from snapfs.imagenames import missing, taken
from snapfs.model import Kind
from snapfs.store.reading import Reader
from snapfs.store.schema import Record
from snapfs.tree.advice import path_of
from snapfs.tree.inodes import Slot, pack
from snapfs.tree.node import Attributes, Directory, Link, Node
from snapfs.tree.state import State
from snapfs.tree.textfile import UNKNOWN_SIZE

IMAGES = "images"

_PLACE = f"/{Kind.COMMITTED}"  # from the root of the tree

HOW = "ln -s ../committed/SNAPSHOT images/NAME names a committed snapshot"


class ImageLink(Link):
    """The link ``name``, with the number ``nth``, to the committed snapshot with this record; ``damage``: why it has none."""

    def __init__(self, state: State, nth: int, name: str, record: Record | None, damage: Damaged | None) -> None:
        super().__init__(state, pack(nth, Slot.IMAGE))
        self.nth = nth
        self._name = name
        self._record = record
        self._damage = damage

    @property
    def path(self) -> str:
        return f"{IMAGES}/{names.encode(self._name)}"

    def attributes(self) -> Attributes:
        if self._record is None:
            return Attributes(self.mode, size=UNKNOWN_SIZE, keep=False)
        return Attributes(self.mode, size=len(self.target().encode()), time=self._record.updated, keep=False)

    def target(self) -> str:
        if self._record is None:
            raise self._damage or missing(self._name)
        return f"../{path_of(self._record)}"


def image_link(state: State, nth: int) -> ImageLink:
    """The link with the number ``nth``; raises NotFound."""
    with state.reading() as reader:
        found = reader.image_at(nth)
        if found is None:
            raise NotFound(f"there is no name with the number {nth} in {IMAGES}/ any more")
        return _link(state, reader, nth, *found)


def _link(state: State, reader: Reader, nth: int, number: int, name: str) -> ImageLink:
    """A link to a snapshot whose record can't be read is listed all the same, and a process that follows it is told."""
    try:
        record = reader.record(number)
        if record is None or all((image.number, image.name) != (nth, name) for image in record.images):
            raise Damaged(f'the name "{name}" in {IMAGES}/ leads to snapshot {number}, which has no such name')
    except Damaged as damage:
        return ImageLink(state, nth, name, None, damage)
    return ImageLink(state, nth, name, record, None)


class ImagesDirectory(Directory):
    """images/."""

    @property
    def path(self) -> str:
        return IMAGES

    def attributes(self) -> Attributes:
        return Attributes(self.mode, time=self.state.names_changed)

    def lookup(self, name: str) -> Node:
        return self._find(name)

    def _find(self, name: str) -> ImageLink:
        try:
            image = names.decode(name)
        except InvalidArgument as error:
            raise NotFound(str(error)) from None
        with self.state.reading() as reader:
            found = reader.image(image)
            if found is None:
                raise missing(image)
            return _link(self.state, reader, *found, image)

    def entries(self, after: int) -> Iterator[tuple[int, str, Node]]:
        with self.state.reading() as reader:
            for nth, number, image in reader.images(after):
                with contextlib.suppress(InvalidArgument):
                    yield nth, names.encode(image), _link(self.state, reader, nth, number, image)

    def instead(self) -> str:
        return f"it has names of committed snapshots alone; {HOW}"

    async def symlink(self, name: str, target: str, pid: int) -> Node:
        image, snapshot = names.decode(name), self._snapshot(target)
        self._refuse_taken(image)  # at once, for the kernel holds a lock meanwhile
        with self.state.reading() as reader:
            number = reader.id_of(snapshot)
            record = reader.record(number) if number is not None else None
        if number is None or record is None or record.kind is not Kind.COMMITTED:
            raise NotFound(f'there is no committed snapshot "{snapshot}" to be called "{names.printable(image)}"')
        try:
            await self.state.snapshotter.name_image(number, image)
        except NotFound:
            raise NotFound.snapshot(snapshot) from None
        link = self._find(name)
        self.state.just_named.note(link.nth, pid)
        return link

    def _snapshot(self, target: str) -> str:
        """The name of the snapshot to which a link with this target would lead.

        Raises NotPermitted where it leads elsewhere than into committed/, NotFound where it can't lead to a snapshot."""
        mountpoint = str(self.state.served.get("mountpoint") or "").rstrip("/")
        place = f"/{target.lstrip('/')}" if target.startswith("/") else f"{mountpoint}/{IMAGES}/{target}"
        directory, name = posixpath.split(posixpath.normpath(place))
        if directory != f"{mountpoint}{_PLACE}" or not name:
            raise NotPermitted(f"{names.shown(target)} leads elsewhere than to a committed snapshot of this tree: {HOW}")
        return self._key(name)

    async def unlink(self, name: str, pid: int) -> None:
        await self.state.snapshotter.unname_image(self._key(name))

    async def rmdir(self, name: str, pid: int) -> None:
        self._find(name)
        raise NotPermitted(f"{self.path}/{names.printable(name)} is a link: rm takes it away, and the snapshot stays")

    def _refuse_taken(self, image: str) -> None:
        with contextlib.suppress(NotFound):
            _, record = self.state.snapshotter.find_image(image)
            raise taken(image, record.name)

    def _key(self, name: str) -> str:
        try:
            return names.decode(name)
        except NotUtf8:
            raise
        except InvalidArgument as error:
            raise NotFound(str(error)) from None

    def refuse_to_rename(self, name: str, new: str, pid: int, *, replace: bool) -> bool:
        """Whether renaming ``name`` to ``new`` may replace what is called so.  Raises NotFound, and AlreadyExists where it may
        not; what the new name can't be is NotPermitted, for mv misreports EINVAL."""
        link, image = self._find(name), names.decode(new)
        may = replace and self.state.just_named.is_by(link.nth, pid)
        if not may and new != name:
            self._refuse_taken(image)
        return may

    async def rename(self, name: str, new: str, *, replace: bool) -> None:
        """Give another name."""
        await self.state.snapshotter.rename_image(self._key(name), names.decode(new), replace=replace)
