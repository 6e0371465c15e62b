"""Where an image goes: a directory of OCI's layout, the same as one archive, or Docker's archive.

Each file gets its name once it is whole, and an image its tag once all its files are there, so that a kill leaves an image that
is whole or none; what was written before is found again by the next export.  One that fails takes back what no image has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

from snapfs.errors import AlreadyExists, InvalidArgument, SnapshotError
from snapfs.images.compression import MEDIA_TYPES, compressor
from snapfs.images.held import HeldDirectory, beside_of
from snapfs.images.layouts import NAME, REF
from snapfs.images.original import Blob as Original
from snapfs.images.original import Differs
from snapfs.kernel import trusted
from snapfs.kernel.unnamed import Unnamed

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"

PIECE = 1 << 20  # bytes

LARGEST = 16 << 20  # bytes of a manifest, an index or a configuration that is there already

FILES = 0o644  # in an archive

_LAYOUT, _INDEX = "oci-layout", "index.json"

_BEGUN = re.compile(rf"blobs|{re.escape(beside_of(_LAYOUT))}|\.snapfs-.+")
"""What is there of a layout whose first export is under way, or was killed."""

_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(rf"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?{_PART}(?:/{_PART})*(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?")
"""What an image is called, as Docker has it; whether there is a tag in it."""

_TAG_PART = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_TAG = re.compile(rf"{_TAG_PART}(?:/{_TAG_PART})*")
"""What an image is called in a layout, as OCI has it: programs refuse all else."""


class Blob(NamedTuple):
    """A file of an image: its media type, its digest (``sha256:…``) and its size in bytes."""

    media_type: str
    digest: str
    size: int

    def shown(self) -> dict[str, object]:
        """As manifests have it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class Layer(Protocol):
    """A layer that is to be written."""

    @property
    def size(self) -> int:
        """Bytes of its tar."""

    @property
    def diff_id(self) -> str | None:
        """The digest of that, where it is known."""

    @property
    def is_as_it_came(self) -> bool:
        """Whether the tar is put together anew, and may come to have another digest."""

    @property
    def blob(self) -> Original | None:
        """What the tar came in, where that is known."""

    def pieces(self) -> Iterator[bytes]:
        """The tar.  Raises Differs."""


class Written(NamedTuple):
    """A layer that has been written: the digest of its tar, and the file in the image (None: Docker's archive has none)."""

    diff_id: str
    blob: Blob | None


class Destination(Protocol):
    """Where an image goes."""

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        """Write it, or find it there; ``told`` is called with how many bytes of the tar were read since.  Raises Differs where
        it can't be as it came; nothing of it is written then."""

    def finish(self, config: bytes, layers: list[Written]) -> None:
        """Write the configuration, and what names the image."""


def digest_of(layer: Layer, told: Callable[[int], None]) -> str:
    """The digest of the tar of ``layer``.  Raises Differs."""
    if layer.diff_id is not None and not layer.is_as_it_came:
        return layer.diff_id
    found = hashlib.sha256()
    for piece in layer.pieces():
        found.update(piece)
        told(len(piece))
    return _proven(layer, f"sha256:{found.hexdigest()}")


def _proven(layer: Layer, diff_id: str) -> str:
    """``diff_id``, which the tar of ``layer`` has.  Raises Differs where it is to have another."""
    if layer.is_as_it_came and diff_id != layer.diff_id:
        raise Differs("a file of the layer has other contents than it came with")
    return diff_id


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(value: object) -> bytes:
    """The same value always gives the same bytes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


class _Files(Protocol):
    """Where the files of a layout go."""

    def compressed(self, write: Callable[[BinaryIO], str]) -> tuple[str, int]:
        """Make a file of what ``write`` writes, which gives its digest: that, and its size."""

    def add(self, data: bytes) -> str:
        """Make a file of ``data``: its digest."""


class _Oci:
    """The layout of OCI, in whatever ``files``."""

    def __init__(self, files: _Files, how: str, there: dict[str, Blob]) -> None:
        self.added: list[Blob] = []  # besides layers
        self._files = files
        self._how = how
        self._there = there

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        found = self._there.get(layer.diff_id or "") or self._left_out(layer)
        if found is not None:
            told(layer.size)
            return Written(layer.diff_id or "", found)
        diff = hashlib.sha256()

        def write(file: BinaryIO) -> str:
            blob, packed = hashlib.sha256(), compressor(self._how)
            for piece in layer.pieces():
                diff.update(piece)
                told(len(piece))
                _write(file, blob, packed.compress(piece))
            _write(file, blob, packed.flush())
            _proven(layer, f"sha256:{diff.hexdigest()}")
            return f"sha256:{blob.hexdigest()}"

        digest, size = self._files.compressed(write)
        made = Blob(MEDIA_TYPES[self._how], digest, size)
        diff_id = f"sha256:{diff.hexdigest()}"
        self._there[diff_id] = made
        return Written(diff_id, made)

    def _left_out(self, layer: Layer) -> Blob | None:
        """What ``layer`` came in, where that is not to be written, but only named."""
        return None

    def manifest(self, config: bytes, layers: list[Written]) -> Blob:
        blobs = [layer.blob.shown() for layer in layers if layer.blob is not None]
        named = {"schemaVersion": 2, "mediaType": MANIFEST, "config": self._added(CONFIG, config).shown(), "layers": blobs}
        return self._added(MANIFEST, as_json(named))

    def _added(self, media_type: str, data: bytes) -> Blob:
        self.added.append(Blob(media_type, self._files.add(data), len(data)))
        return self.added[-1]


def _write(file: BinaryIO, blob: Any, data: bytes) -> None:
    if data:
        blob.update(data)
        file.write(data)


class OciDirectory(_Oci):
    """The layout in the directory ``path``, which is made if it is not there, under ``tag``: a context manager.  Layers that
    came in a blob of the same compression are only named by that, and not written, where that ``leaves_out`` what DEST may have
    already; ``left_out`` are the digests of these.

    Raises InvalidArgument where something else is at ``path``; Untrusted where others could exchange it; OSError."""

    def __init__(self, path: str, tag: str, how: str, *, leaves_out: bool = False) -> None:
        _check_tag(tag)
        self.left_out: set[str] = set()
        self._tag = tag
        self._leaves_out = leaves_out
        with ExitStack() as held:
            self._top = held.enter_context(HeldDirectory.find(path, may_make=True))
            if not all(map(_BEGUN.fullmatch, self._top.names())) and not self._top.has(_LAYOUT):
                raise InvalidArgument(f"{path} holds other files, and no OCI layout: name a new directory")
            blobs = held.enter_context(held.enter_context(self._top.directory("blobs")).directory("sha256"))
            self._blobs, self._directory = blobs, _Directory(self._top, blobs)
            super().__init__(self._directory, how, _layers_in(_index(self._top), blobs))
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._held:
            if error is not None:
                with suppress(OSError, SnapshotError):
                    self._take_back()

    def _take_back(self) -> None:
        """Remove what this has written, and no image has: where the disk is full, the next one may need the room."""
        with self._top.locked():
            listed = _digests_in(_index(self._top), self._blobs)
            for name in self._directory.made:
                if f"sha256:{name}" not in listed:
                    self._blobs.remove(name)

    def _left_out(self, layer: Layer) -> Blob | None:
        came_in = layer.blob
        if not self._leaves_out or came_in is None or layer.diff_id is None or came_in.compression != self._how:
            return None
        self.left_out.add(came_in.digest)
        return Blob(MEDIA_TYPES[self._how], came_in.digest, came_in.size)

    def finish(self, config: bytes, layers: list[Written]) -> None:
        manifest = self.manifest(config, layers)
        with self._top.locked():
            index = _index(self._top)
            for blob in (*self.added, *(layer.blob for layer in layers)):
                if (
                    blob is not None
                    and blob.digest not in self.left_out
                    and not self._blobs.has_whole(_hex(blob.digest), blob.size)
                ):
                    raise InvalidArgument(f"{self._top.path} has lost {blob.digest}, to an export that failed: export again")
            others = [each for each in index["manifests"] if (each.get("annotations") or {}).get(REF) != self._tag]
            index["manifests"] = [*others, {**manifest.shown(), "annotations": _called(self._tag)}]
            if not self._top.has(_LAYOUT):
                self._top.replace(_LAYOUT, as_json({"imageLayoutVersion": "1.0.0"}))
            self._top.replace(_INDEX, as_json(index))


def _check_tag(tag: str) -> None:
    """Raise InvalidArgument where ``tag`` ("" for none) can be none."""
    if tag and not _TAG.fullmatch(tag):
        words = "letters and digits, with one of -._:@+ or / between them, are, as in test.local/shop:1"
        raise InvalidArgument(f'"{tag}" is no tag of an image: {words}')


def _called(tag: str) -> dict[str, str]:
    """The annotations that say what an image is called; containerd has one of its own for whole names."""
    return {**({REF: tag} if tag else {}), **({NAME: tag} if "/" in tag else {})}


class _Directory:
    """The ``blobs`` of the layout ``top``."""

    def __init__(self, top: HeldDirectory, blobs: HeldDirectory) -> None:
        self.made: set[str] = set()  # files that were not there before
        self._top = top
        self._blobs = blobs

    def compressed(self, write: Callable[[BinaryIO], str]) -> tuple[str, int]:
        with self._blobs.unnamed() as made:
            with open(made.fd, "wb", closefd=False) as file:
                digest = write(file)
            return digest, self._named(made, digest)

    def add(self, data: bytes) -> str:
        digest = _digest(data)
        with self._blobs.unnamed() as made, open(made.fd, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            self._named(made, digest)
        return digest

    def _named(self, made: Unnamed, digest: str) -> int:
        """Give the file its name, unless what is there is as large: its name says what is in it.  The size."""
        name, size = _hex(digest), os.fstat(made.fd).st_size
        while not self._blobs.has_whole(name, size):
            with suppress(FileExistsError):
                made.become(name)
                self.made.add(name)
                break
            with self._top.locked():
                if not self._blobs.has_whole(name, size):
                    self._blobs.remove(name)  # it is cut off, or another user's
        return size


def _index(top: HeldDirectory) -> dict[str, Any]:
    """What index.json holds; raises InvalidArgument."""
    try:
        found = _document(top.file(_INDEX), f"{top.path}/{_INDEX}")
    except FileNotFoundError:
        return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    listed = found.setdefault("manifests", [])
    if not isinstance(listed, list) or not all(
        isinstance(each, dict) and isinstance(each.get("annotations"), dict | None) for each in listed
    ):
        raise InvalidArgument(f"{top.path}/{_INDEX} is damaged: it lists no images; name a new directory")
    return found


def _document(fd: int, path: str) -> dict[str, Any]:
    """The JSON object in the file open as ``fd``, which is closed."""
    with open(fd, "rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise InvalidArgument(f"{path} takes more than {LARGEST} bytes, which are not read; name a new directory")
    try:
        found = json.loads(text)
        as_json(found)  # it goes back there
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{path} is damaged: it holds no JSON object; name a new directory")
    return found


def _layers_in(index: dict[str, Any], blobs: HeldDirectory) -> dict[str, Blob]:
    """By the digest of its tar, each layer of the images of ``index`` that is in ``blobs``.  What can't be read there, or can
    be written by others, does not count: it is written anew."""
    found: dict[str, Blob] = {}
    for named in index["manifests"]:
        with suppress(OSError, InvalidArgument, KeyError, TypeError, AttributeError, ValueError):
            manifest = _blob_document(blobs, named["digest"])
            config = _blob_document(blobs, manifest["config"]["digest"])
            for diff_id, layer in zip(config["rootfs"]["diff_ids"], manifest["layers"], strict=True):
                blob = Blob(layer["mediaType"], layer["digest"], layer["size"])
                is_named = isinstance(blob.media_type, str) and type(blob.size) is int
                if is_named and blobs.has_whole(_hex(blob.digest), blob.size):
                    found[diff_id] = blob
    return found


def _digests_in(index: dict[str, Any], blobs: HeldDirectory) -> set[str]:
    """The digests of all that the images of ``index`` have, as far as it can be read."""
    found: set[str] = set()
    for named in index["manifests"]:
        with suppress(OSError, InvalidArgument, KeyError, TypeError, AttributeError, ValueError):
            found.add(named["digest"])
            manifest = _blob_document(blobs, named["digest"])
            found.update(each["digest"] for each in (manifest["config"], *manifest["layers"]))
    return found


def _blob_document(blobs: HeldDirectory, digest: str) -> dict[str, Any]:
    fd = blobs.file(_hex(digest))
    if not trusted.is_own(fd):
        os.close(fd)
        raise InvalidArgument(f"others can write {digest}")
    return _document(fd, digest)


def _hex(digest: str) -> str:
    kind, _, rest = digest.partition(":")
    if kind != "sha256" or len(rest) != 64 or not set(rest) <= set("0123456789abcdef"):
        raise ValueError(digest)
    return rest


@contextmanager
def archive(path: str) -> Iterator[Archive]:
    """For a block: a new archive, which may become the file ``path``.  Raises AlreadyExists, Untrusted where others could
    exchange the directory, InvalidArgument, OSError."""
    directory, name = os.path.split(path)
    with HeldDirectory.find(directory) as held:
        if held.has_directory(name):
            raise AlreadyExists(f"{path} is a directory: name a file in it")
        if held.has(name):
            raise _taken(path)
        with held.unnamed() as made:
            yield Archive(path, held, made)


def _taken(path: str) -> AlreadyExists:
    return AlreadyExists(f"{path} already exists: remove it, or name another file")


class Archive:
    """A tar that gets its name once it is whole; ``directory`` is the one that it will be in."""

    def __init__(self, path: str, directory: HeldDirectory, made: Unnamed) -> None:
        self.directory = directory
        self._path = path
        self._made = made
        self._file = open(made.fd, "wb", closefd=False)  # noqa: SIM115, closed by end
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        self._names: set[str] = set()

    def add(self, name: str, file: BinaryIO, size: int) -> None:
        if name not in self._names:
            self._names.add(name)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = size, FILES
            self._tar.addfile(entry, file)

    def end(self) -> None:
        self._tar.close()
        self._file.close()
        try:
            self._made.become(os.path.basename(self._path))
        except FileExistsError:
            raise _taken(self._path) from None


class OciArchive(_Oci):
    """The layout as one ``archive``, with the image called ``tag``."""

    def __init__(self, archive: Archive, tag: str, how: str) -> None:
        _check_tag(tag)
        self._archive = archive
        self._tag = tag
        super().__init__(_InArchive(archive), how, {})

    def finish(self, config: bytes, layers: list[Written]) -> None:
        manifest = self.manifest(config, layers)
        named = {**manifest.shown(), "annotations": _called(self._tag)}
        index = as_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]})
        for name, data in ((_INDEX, index), (_LAYOUT, as_json({"imageLayoutVersion": "1.0.0"}))):
            self._archive.add(name, io.BytesIO(data), len(data))
        self._archive.end()


class _InArchive:
    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def compressed(self, write: Callable[[BinaryIO], str]) -> tuple[str, int]:
        with self._archive.directory.unnamed(0o600) as made, open(made.fd, "w+b", closefd=False) as file:
            digest = write(file)
            size = file.tell()
            file.seek(0)
            self._archive.add(f"blobs/sha256/{_hex(digest)}", file, size)
            return digest, size

    def add(self, data: bytes) -> str:
        digest = _digest(data)
        self._archive.add(f"blobs/sha256/{_hex(digest)}", io.BytesIO(data), len(data))
        return digest


class DockerArchive:
    """What ``docker load`` takes, as one ``archive``, with the image called ``tag`` (``name:tag``, or ``name``, which is its
    ``latest``; "" for none).  Raises InvalidArgument where that is no such name."""

    def __init__(self, archive: Archive, tag: str) -> None:
        self._archive = archive
        found = _REFERENCE.fullmatch(tag)
        if tag and found is None:
            raise InvalidArgument(
                f'"{tag}" is no NAME:TAG that docker load takes, as test.local/shop:1 is: names are in lower case'
            )
        self._tag = f"{tag}:latest" if found is not None and not found[1] else tag

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        diff_id = digest_of(layer, told)
        self._archive.add(f"{_hex(diff_id)}.tar", io.BufferedReader(_Reading(layer.pieces()), PIECE), layer.size)
        return Written(diff_id, None)

    def finish(self, config: bytes, layers: list[Written]) -> None:
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        tags = [self._tag] if self._tag else None
        manifest = as_json([{"Config": name, "RepoTags": tags, "Layers": [f"{_hex(each.diff_id)}.tar" for each in layers]}])
        for file, text in ((name, config), ("manifest.json", manifest)):
            self._archive.add(file, io.BytesIO(text), len(text))
        self._archive.end()


class _Reading(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
