"""``snapfs export``: a chain of committed snapshots becomes an image, a layer a snapshot, by reading files of the tree."""

from __future__ import annotations

import contextlib
import os
import time

from snapfs.cli import table
from snapfs.cli.commanding import commanded
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import MountedTree, file_name, find_tree
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import FAILED, NOT_FOUND, NOT_PERMITTED, USAGE, Refusal
from snapfs.labels import DIFF_ID, MESSAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from snapfs.images.original import Blob, Original
    from snapfs.images.writing import Destination, Written

PIECE = 1 << 20  # bytes that are read of a layer at once

_KEPT = 64
"""Layers of which the tree keeps what it found out when they were opened: these are opened before anything is made, so that
nothing is left where one can't be read."""

OCI, OCI_ARCHIVE, DOCKER_ARCHIVE = "oci", "oci-archive", "docker-archive"


class _Layer:
    """A committed snapshot as a layer; ``info`` is what its info.json says.  It is ``original``, the archive that it was
    imported from, where that can be had, and else its layer.tar."""

    def __init__(self, place: MountedTree, name: str, info: dict[str, Any], original: Original | None) -> None:
        self.name = name
        self.info = info
        self.original = original
        self._place = place
        self._path = f"{place.directory('committed', name)}/layer.tar"
        self._size = 0  # of that

    @property
    def diff_id(self) -> str | None:
        return self.info.get("diff_id") if self.original is None else self.original.diff_id

    @property
    def size(self) -> int:
        return self._size if self.original is None else self.original.size

    @property
    def is_as_it_came(self) -> bool:
        return self.original is not None

    @property
    def blob(self) -> Blob | None:
        return None if self.original is None else self.original.blob

    def open(self) -> None:
        """Have the tree look through the layer: its size is known then.  Raises Refusal."""
        self._fd = -1
        self._place.do(f'read the layer of "{self.name}"', ["open"], self._open, self._path)
        self._size = os.fstat(self._fd).st_size

    def _open(self, path: str) -> None:
        self._fd = self._place.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._fd)

    def pieces(self) -> Iterator[bytes]:
        """Raises Refusal, and Differs where it can't be as it came."""
        if self.original is not None:
            yield from self.original.pieces(self._read, self._size)
            return
        offset = 0
        while offset < self._size:
            piece = self._read(offset, PIECE)
            if not piece:
                raise Refusal(f'the layer of "{self.name}" ended too early: see {self._place.path}/.snapfs/error_log', FAILED)
            offset += len(piece)
            yield piece

    def _read(self, offset: int, count: int) -> bytes:
        read = [b""]

        def take(path: str) -> None:
            read[0] = os.pread(self._fd, count, offset)

        self._place.do(f'read the layer of "{self.name}"', ["read"], take, self._path)
        return read[0]


def _export(given: Given) -> int:
    from snapfs.errors import AlreadyExists, InvalidArgument
    from snapfs.images.compression import MEDIA_TYPES
    from snapfs.images.unfit import Unfit
    from snapfs.kernel.trusted import Untrusted

    place = find_tree(given.value("at"), changes=given.has("squash"))
    how = given.value("compression") or "gzip"
    if how not in MEDIA_TYPES:
        raise Refusal(f'"{how}" is no compression: there are {", ".join(MEDIA_TYPES)}', USAGE)
    name, destination = place.key(given.arguments[0]), given.arguments[1]
    kind = place.kind_of(name)
    if kind is None:
        raise place.missing(name)
    if kind != "committed":
        to_do = place.command("checkpoint", name) if kind == "active" else "name what it stands on"
        raise Refusal(f'"{name}" is {kind}: only committed snapshots have layers that stay as they are; {to_do}', NOT_FOUND)
    try:
        with _squashed(place, name) if given.has("squash") else contextlib.nullcontext(name) as top:
            layers = _chain(place, top)
            if top != name:  # it was made just now, and shows what is older
                layers[-1].info["created"] = _info(place, name)["created"]
            _send(place, name, layers, destination, how)
    except (AlreadyExists, InvalidArgument, Unfit) as why:
        raise Refusal(str(why)) from None
    except Untrusted as why:
        to_do = "name a directory of yours, below directories that nobody else can write, such as /srv"
        raise Refusal(f"cannot write {destination}: {why}; {to_do}", NOT_PERMITTED) from None
    except OSError as error:
        raise Refusal(f"cannot write {destination}: {error.strerror}") from None
    return 0


@contextlib.contextmanager
def _squashed(place: MountedTree, name: str) -> Iterator[str]:
    """The name of a snapshot that shows what ``name`` shows, and stands on nothing: itself, or one that is there meanwhile."""
    if _info(place, name).get("parent") is None:
        yield name
        return
    new = f"{name}.export-{os.getpid()}"
    commanded(place, "committed", name, "squash", file_name(new), f'squash "{name}"')
    number = _info(place, new)["id"]
    try:
        yield new
    finally:
        place.remove("committed", new, number)


def _info(place: MountedTree, name: str) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(place.read(f"{place.directory('committed', name)}/info.json"))
    return found


def _chain(place: MountedTree, name: str | None) -> list[_Layer]:
    """The layers of ``name``, the lowest first."""
    from snapfs.images.original import Original

    found: list[_Layer] = []
    root = place.options()["root"]
    while name is not None:
        info = _info(place, name)
        original = Original.find(f"{root}/snapshots/{info['id']}") if DIFF_ID in info["labels"] else None
        found.append(_Layer(place, name, info, original))
        name = info.get("parent")
    return found[::-1]


def _send(place: MountedTree, name: str, layers: list[_Layer], destination: str, how: str) -> None:
    transport, colon, rest = destination.partition(":")
    path, _, tag = rest.partition(":")
    if not colon or not path:
        raise Refusal(f'"{destination}" says no place: {OCI}:DIR[:TAG], {OCI_ARCHIVE}:FILE, docker://HOST/NAME:TAG', USAGE)
    _latest()
    for layer in layers[-_KEPT:]:
        layer.open()
        layer.close()
    if transport not in (OCI, OCI_ARCHIVE, DOCKER_ARCHIVE):
        _by_skopeo(place, name, layers, destination, how)
        return
    from snapfs.images import writing

    if transport == OCI:
        with writing.OciDirectory(path, tag or "latest", how) as layout:
            _write(place, name, layers, layout)
    else:
        with writing.archive(path) as made:
            archive: Destination = (
                writing.OciArchive(made, tag, how) if transport == OCI_ARCHIVE else writing.DockerArchive(made, tag)
            )
            _write(place, name, layers, archive)
    table.show_line(destination)


def _write(place: MountedTree, name: str, layers: list[_Layer], destination: Destination) -> None:
    import json

    from snapfs.images.configuration import Step, configuration
    from snapfs.images.writing import as_json

    progress, read, written, steps, latest = Progress(), 0, [], [], _latest()
    try:
        for nth, layer in enumerate(layers):

            def told(size: int, nth: int = nth) -> None:
                nonlocal read
                read += size
                progress.show_size(f"layer {nth + 1} of {len(layers)}", read)

            layer.open()
            with contextlib.closing(layer):
                written.append(_written(destination, layer, told))
            steps.append(Step(_when(layer.info), layer.info["labels"].get(MESSAGE, "")))
        text = _known(place, name)
        known = json.loads(text) if text else {}
        made = configuration(known, [each.diff_id for each in written], steps, latest)
        destination.finish(text if made == known else as_json(made), written)
    finally:
        progress.clear()


def _written(destination: Destination, layer: _Layer, told: Callable[[int], None]) -> Written:
    from snapfs.images.original import Differs

    try:
        return destination.layer(layer, told)
    except Differs as why:
        table.complain(f'"{layer.name}" is exported as it is now, and not as it was imported: {why}')
        layer.original = None
        return destination.layer(layer, told)


def _when(info: dict[str, Any]) -> int:
    """When the snapshot was made, in seconds since the epoch."""
    import calendar

    return calendar.timegm(time.strptime(info["created"][:19], "%Y-%m-%dT%H:%M:%S"))


def _latest() -> int | None:
    """The latest time that an image may tell of, as $SOURCE_DATE_EPOCH says it."""
    latest = os.environ.get("SOURCE_DATE_EPOCH")
    if latest is None:
        return None
    if not (latest.isascii() and latest.isdigit() and len(latest) < 12):
        raise Refusal(f'SOURCE_DATE_EPOCH is "{latest}", which is no number of seconds: set it right, or unset it', USAGE)
    return int(latest)


def _known(place: MountedTree, name: str) -> bytes:
    """What image.json of ``name`` says; nothing where it came from no image."""
    path = f"{place.directory('committed', name)}/image.json"
    return place.read(path).encode() if place.within.exists(path) else b""


def _by_skopeo(place: MountedTree, name: str, layers: list[_Layer], destination: str, how: str) -> None:
    """Make a layout in a directory of its own, which skopeo takes to ``destination``."""
    from snapfs.images import fetching, layouts, writing

    progress, began = Progress(), time.monotonic()
    told = (lambda: progress.show_waiting(f"to {destination}", time.monotonic() - began)) if progress.is_shown else None
    try:
        with fetching.outgoing(destination) as layout:
            for leaves_out in (True, False):  # at first what came from a registry, which it may still have
                with writing.OciDirectory(layout, fetching.TAG, how, leaves_out=leaves_out) as made:
                    _write(place, name, layers, made)
                began = time.monotonic()
                try:
                    fetching.send(layout, destination, told)
                except fetching.Lacking:
                    if not made.left_out:
                        raise
                else:
                    break
    except OSError as error:
        words = f"{layouts.spool()}, where it is made first: {error.strerror}: $TMPDIR names another place"
        raise Refusal(f"cannot write {destination}: {words}") from None
    finally:
        progress.clear()
    table.show_line(destination)


VERBS = {
    "export": Verb(
        "export",
        "NAME DEST",
        (
            Option("compression", "of the layers: gzip, zstd or none", "HOW"),
            Option("squash", "one layer, of all that NAME shows"),
        ),
        "Make an image of the committed snapshot NAME: a layer for each snapshot of its chain.  DEST is oci:DIR[:TAG],\n"
        "oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG], or what skopeo knows, which then takes it there:\n"
        "docker://HOST/NAME:TAG.  What DEST has already is not written again.  What was imported leaves as it came, and the\n"
        "same snapshots give the same image; no time in its configuration is later than $SOURCE_DATE_EPOCH, if that is set.\n"
        "DIR and FILE must be below directories that nobody else can write, and DIR yours or root's.",
        """
snapfs export v1 oci:images:v1
snapfs export v1 oci-archive:v1.tar
snapfs export --squash v1 docker://registry.example/shop:1
""",
        _export,
    )
}
