"""Where an image goes: a directory of OCI's layout, the same as one archive, or Docker's archive.

Each file gets its name once it is whole, and an image its tag once all its files are there, so that a kill leaves an image that
is whole or none; what was written before is found again by the next export.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, Protocol

from snapfs.errors import AlreadyExists, InvalidArgument
from snapfs.images.compression import MEDIA_TYPES, compressor
from snapfs.images.layouts import NAME, REF
from snapfs.kernel.unnamed import Unnamed, unnamed

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"

PIECE = 1 << 20  # bytes

LARGEST = 16 << 20  # bytes of a manifest, an index or a configuration that is there already

FILES = 0o644


class Blob(NamedTuple):
    """A file of an image: its media type, its digest (``sha256:…``) and its size in bytes."""

    media_type: str
    digest: str
    size: int

    def shown(self) -> dict[str, object]:
        """As manifests have it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class Layer(Protocol):
    """A layer that is to be written: its ``size`` in bytes and, where that is known, the ``diff_id`` of its tar."""

    size: int
    diff_id: str | None

    def pieces(self) -> Iterator[bytes]:
        """The tar."""


class Written(NamedTuple):
    """A layer that has been written: the digest of its tar, and the file in the image (None: Docker's archive has none)."""

    diff_id: str
    blob: Blob | None


class Destination(Protocol):
    """Where an image goes."""

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        """Write it, or find it there; ``told`` is called with how many bytes of the tar were read since."""

    def finish(self, config: dict[str, object], layers: list[Written]) -> None:
        """Write the configuration, and what names the image."""


def digest_of(layer: Layer, told: Callable[[int], None]) -> str:
    """The digest of the tar of ``layer``."""
    if layer.diff_id is not None:
        return layer.diff_id
    found = hashlib.sha256()
    for piece in layer.pieces():
        found.update(piece)
        told(len(piece))
    return f"sha256:{found.hexdigest()}"


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
        self._files = files
        self._how = how
        self._there = there

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        found = self._there.get(layer.diff_id or "")
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
            return f"sha256:{blob.hexdigest()}"

        digest, size = self._files.compressed(write)
        made = Blob(MEDIA_TYPES[self._how], digest, size)
        diff_id = f"sha256:{diff.hexdigest()}"
        self._there[diff_id] = made
        return Written(diff_id, made)

    def manifest(self, config: dict[str, object], layers: list[Written]) -> Blob:
        blobs = [layer.blob.shown() for layer in layers if layer.blob is not None]
        named = {"schemaVersion": 2, "mediaType": MANIFEST, "config": self._added(CONFIG, config).shown(), "layers": blobs}
        return self._added(MANIFEST, named)

    def _added(self, media_type: str, value: object) -> Blob:
        data = as_json(value)
        return Blob(media_type, self._files.add(data), len(data))


def _write(file: BinaryIO, blob: Any, data: bytes) -> None:
    if data:
        blob.update(data)
        file.write(data)


class OciDirectory(_Oci):
    """The layout in the directory ``path``, which is made if it is not there, under ``tag``.

    Raises InvalidArgument where something else is at ``path``, and OSError."""

    def __init__(self, path: str, tag: str, how: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(path)
        if not os.path.isdir(path):
            raise InvalidArgument(f"{path} is no directory: an OCI layout is one")
        if os.listdir(path) and not os.path.exists(f"{path}/oci-layout"):
            raise InvalidArgument(f"{path} holds other files, and no OCI layout: name a new directory")
        self._path = path
        self._tag = tag
        os.makedirs(f"{path}/blobs/sha256", exist_ok=True)
        files = _Directory(f"{path}/blobs/sha256")
        super().__init__(files, how, _layers_in(path))

    def finish(self, config: dict[str, object], layers: list[Written]) -> None:
        manifest = self.manifest(config, layers)
        with _locked(self._path):
            index = _index(self._path)
            others = [each for each in index.get("manifests", []) if each.get("annotations", {}).get(REF) != self._tag]
            index["manifests"] = [*others, {**manifest.shown(), "annotations": _called(self._tag)}]
            if not os.path.exists(f"{self._path}/oci-layout"):
                _replace(self._path, "oci-layout", as_json({"imageLayoutVersion": "1.0.0"}))
            _replace(self._path, "index.json", as_json(index))


def _called(tag: str) -> dict[str, str]:
    """The annotations that say what an image is called; containerd has one of its own for whole names."""
    return {**({REF: tag} if tag else {}), **({NAME: tag} if "/" in tag else {})}


class _Directory:
    def __init__(self, path: str) -> None:
        self._path = path

    def compressed(self, write: Callable[[BinaryIO], str]) -> tuple[str, int]:
        with unnamed(self._path, FILES) as made:
            with open(made.fd, "wb", closefd=False) as file:
                digest = write(file)
            self._named(made, digest)
            return digest, os.fstat(made.fd).st_size

    def add(self, data: bytes) -> str:
        digest = _digest(data)
        with unnamed(self._path, FILES) as made, open(made.fd, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            self._named(made, digest)
        return digest

    @staticmethod
    def _named(made: Unnamed, digest: str) -> None:
        with suppress(FileExistsError):  # it is there already: its name says what is in it
            made.become(digest.removeprefix("sha256:"))


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Nobody else adds an image to the layout in ``path`` meanwhile."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: str, name: str, data: bytes) -> None:
    """Make ``data`` the file ``name``; whoever reads it sees what was or what is."""
    with unnamed(path, FILES) as made, open(made.fd, "wb", closefd=False) as file:
        file.write(data)
        file.flush()
        beside = f".{name}.snapfs"
        with suppress(FileNotFoundError):
            os.unlink(f"{path}/{beside}")  # of one that was killed
        made.become(beside)
    os.rename(f"{path}/{beside}", f"{path}/{name}")


def _index(path: str) -> dict[str, Any]:
    """What index.json holds; raises InvalidArgument."""
    try:
        return _document(f"{path}/index.json")
    except FileNotFoundError:
        return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}


def _document(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        text = file.read(LARGEST + 1)
    try:
        found = json.loads(text) if len(text) <= LARGEST else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{path} is damaged: it holds no JSON object; name a new directory")
    return found


def _layers_in(path: str) -> dict[str, Blob]:
    """By the digest of its tar, each layer of the images in the layout at ``path`` that is there.  What can't be read there is
    not looked at: it is written anew."""
    found: dict[str, Blob] = {}
    blobs = f"{path}/blobs/sha256"
    for named in _index(path).get("manifests", []):
        with suppress(OSError, InvalidArgument, KeyError, TypeError, AttributeError, ValueError):
            manifest = _document(f"{blobs}/{_hex(named['digest'])}")
            config = _document(f"{blobs}/{_hex(manifest['config']['digest'])}")
            for diff_id, layer in zip(config["rootfs"]["diff_ids"], manifest["layers"], strict=True):
                blob = Blob(layer["mediaType"], layer["digest"], layer["size"])
                if os.stat(f"{blobs}/{_hex(blob.digest)}").st_size == blob.size:
                    found[diff_id] = blob
    return found


def _hex(digest: str) -> str:
    kind, _, rest = digest.partition(":")
    if kind != "sha256" or len(rest) != 64 or not set(rest) <= set("0123456789abcdef"):
        raise ValueError(digest)
    return rest


class _Archive:
    """A tar that gets its name once it is whole."""

    def __init__(self, path: str, made: Unnamed) -> None:
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
            raise taken(self._path) from None


def taken(path: str) -> AlreadyExists:
    """The refusal where something has the name of an archive."""
    return AlreadyExists(f"{path} already exists: remove it, or name another file")


class OciArchive(_Oci):
    """The layout as one archive, ``path``, with the image called ``tag``; ``made`` is its file."""

    def __init__(self, path: str, tag: str, how: str, made: Unnamed) -> None:
        self._archive = _Archive(path, made)
        self._tag = tag
        super().__init__(_InArchive(self._archive, os.path.dirname(path) or "."), how, {})

    def finish(self, config: dict[str, object], layers: list[Written]) -> None:
        manifest = self.manifest(config, layers)
        named = {**manifest.shown(), "annotations": _called(self._tag)}
        index = as_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]})
        for name, data in (("index.json", index), ("oci-layout", as_json({"imageLayoutVersion": "1.0.0"}))):
            self._archive.add(name, io.BytesIO(data), len(data))
        self._archive.end()


class _InArchive:
    def __init__(self, archive: _Archive, directory: str) -> None:
        self._archive = archive
        self._directory = directory

    def compressed(self, write: Callable[[BinaryIO], str]) -> tuple[str, int]:
        with unnamed(self._directory) as made, open(made.fd, "w+b", closefd=False) as file:
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
    """What ``docker load`` takes, ``path``, with the image called ``tag`` (``name:tag``; "" for none); ``made`` is its file."""

    def __init__(self, path: str, tag: str, made: Unnamed) -> None:
        self._archive = _Archive(path, made)
        self._tag = tag

    def layer(self, layer: Layer, told: Callable[[int], None]) -> Written:
        diff_id = digest_of(layer, told)
        self._archive.add(f"{_hex(diff_id)}.tar", io.BufferedReader(_Reading(layer.pieces()), PIECE), layer.size)
        return Written(diff_id, None)

    def finish(self, config: dict[str, object], layers: list[Written]) -> None:
        data = as_json(config)
        name = f"{hashlib.sha256(data).hexdigest()}.json"
        tags = [self._tag] if self._tag else None
        manifest = as_json([{"Config": name, "RepoTags": tags, "Layers": [f"{_hex(each.diff_id)}.tar" for each in layers]}])
        for file, text in ((name, data), ("manifest.json", manifest)):
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
