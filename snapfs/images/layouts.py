"""Where images are kept: OCI layouts, and archives of them or of Docker's, down to the layers' blobs.

Sources: the OCI's image-spec (image-layout.md, manifest.md, image-index.md, config.md); Docker's image/spec/v1.2.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

from snapfs.images.compression import unpacked
from snapfs.images.configuration import architecture
from snapfs.images.limits import Limits
from snapfs.images.tarreader import DIRECTORY, FILE, HARD_LINK, LINK, Stream, TarReader
from snapfs.images.unfit import Elsewhere, Unfit
from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.names import printable, shown

MOST_TEXT = 16 << 20
"""Bytes of a document of an image that are read."""
MOST_FILES = 100_000
"""Files that an archive of an image may have."""
MOST_NAMES = 32 << 20
"""Bytes of the names of these files, and of where links among them lead."""
MOST_LAYERS = 10_000

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_SHOWN = 200  # characters of a string of an image's that a sentence shows
_DEEPEST = 8  # indexes in one another
REF, NAME = "org.opencontainers.image.ref.name", "io.containerd.image.name"
"""What an index says of what an image is called; the second is containerd's, for whole names."""

_NO_PLATFORM = ("unknown", "unknown")  # of what only tells of an image


class Blob(NamedTuple):
    """Bytes of a file that is open as ``fd``, ``size`` from ``start`` on; or all that can be read from it, where ``size`` is
    -1.  ``what`` is what they are, in words; ``digest``, if it is known, is what they must have.  ``is_absent``: they are not
    there, for nobody was to need them."""

    fd: int
    start: int
    size: int
    what: str
    digest: str = ""
    is_absent: bool = False

    def reader(self) -> Callable[[int], bytes]:
        """Reads on from where the last call ended.  The calls raise OSError."""
        if self.size < 0:
            return lambda count: os.read(self.fd, count)
        here, end = self.start, self.start + self.size

        def read(count: int) -> bytes:
            nonlocal here
            found = os.pread(self.fd, min(count, end - here), here)
            here += len(found)
            return found

        return read

    def content(self) -> bytes:
        """All of it, a document.  Raises Unfit, also where it has another digest; OSError."""
        if self.size > MOST_TEXT:
            raise Unfit(f"{self.what} takes {self.size} bytes: more than {MOST_TEXT} are not read")
        read, found = self.reader(), b""
        while more := read(MOST_TEXT):
            found += more
        if self.digest and f"{self.digest.partition(':')[0]}:{_hash(self.digest, found)}" != self.digest:
            raise Unfit(f"{self.what} is damaged: its digest is not {self.digest}")
        return found


class Layer(NamedTuple):
    """A layer: what holds it, and, if that is known, what it hashes to when it is unpacked."""

    blob: Blob
    diff_id: str = ""


class Image(NamedTuple):
    """The layers of an image, the lowest first; and its configuration, as it is."""

    layers: list[Layer]
    config: bytes


class Files(Protocol):
    """Files by their names, of an image in whatever place."""

    where: str

    def find(self, name: str) -> Blob | None:
        """The file ``name``; None where there is none.  Raises Unfit, and OSError."""


class DirectoryFiles:
    """The files of the directory ``path``; those that are ``absent`` are empty."""

    def __init__(self, path: str, absent: frozenset[str] = frozenset()) -> None:
        self.where = path
        self._absent = absent
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def find(self, name: str) -> Blob | None:
        what = f"{self.where}/{name}"
        try:
            found = open_beneath(os.fsencode(name), self._fd, LOOK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            if error.errno == errno.ELOOP:
                raise Unfit(
                    f"a symbolic link leads to {what}, and may lead anywhere: cp -rL makes a copy without any"
                ) from None
            if error.errno == errno.EXDEV:
                raise Unfit(f"{what} is in another file system, which is mounted in {self.where}") from None
            error.filename = what
            raise
        try:
            if stat.S_ISLNK(os.fstat(found).st_mode):
                raise Unfit(f"{what} is a symbolic link, which may lead anywhere: cp -rL makes a copy without any")
            fd, size = _opened_again(found, what)
        finally:
            os.close(found)
        return Blob(fd, 0, size, what, is_absent=name in self._absent)


def _opened_again(found: int, what: str) -> tuple[int, int]:
    """A descriptor for reading of what ``found`` is, open with O_PATH alone, and its size, -1 of a pipe.  Raises Unfit where it
    is neither a regular file nor a pipe of two processes; that is not opened: with a device that may do something, and with a
    FIFO it may take for ever."""
    status, path = os.fstat(found), f"/proc/self/fd/{found}"
    if stat.S_ISREG(status.st_mode):
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), status.st_size
    if stat.S_ISFIFO(status.st_mode) and os.readlink(path).startswith("pipe:"):  # it has no name
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), -1
    raise Unfit(f"{what} is no regular file")


def file_blob(path: str) -> Blob:
    """The file ``path``, or the pipe that it stands for, as /dev/stdin may.  Raises Unfit, and OSError."""
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        fd, size = _opened_again(found, "it")
    except Unfit as unfit:
        raise Unfit(f"{unfit}: cat can give it to /dev/stdin, which is read") from None
    finally:
        os.close(found)
    return Blob(fd, 0, size, path)


class ArchiveFiles:
    """The files of the archive ``path``, which is read from beginning to end for their places, and unpacked to a nameless file
    before where it is packed, within ``limits``.  Raises Unfit, and OSError."""

    def __init__(self, path: str, limits: Limits) -> None:
        self.where = path
        whole = file_blob(path)
        if whole.size < 0 or os.pread(whole.fd, 262, 0)[257:] != b"ustar":  # a pipe, or packed
            whole = _unpacked_to_disk(whole, limits)
        self._fd = whole.fd
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._index(whole)

    def find(self, name: str) -> Blob | None:
        for _ in range(8):
            target = self._links.get(name)
            if target is None:
                break
            name = os.path.normpath(target)
        place = self._places.get(name)
        return None if place is None else Blob(self._fd, *place, f"{self.where}: {shown(name)}")

    def _index(self, whole: Blob) -> None:
        stream = _Seeking(whole)
        reader, length = TarReader(stream), 0
        while (entry := reader.next()) is not None:
            length += len(entry.name) + len(entry.target)
            if length > MOST_NAMES:
                raise Unfit(f"the names in it take more than {MOST_NAMES} bytes: those of an image never do")
            name = os.path.normpath(os.fsdecode(entry.name)).lstrip("/")
            if entry.kind is FILE and entry.spans is None:
                self._places[name] = stream.taken, entry.size
            elif entry.kind is LINK:
                self._links[name] = os.path.join(os.path.dirname(name), os.fsdecode(entry.target))
            elif entry.kind is HARD_LINK:
                self._links[name] = os.fsdecode(entry.target)
            elif entry.kind is not DIRECTORY:
                raise Unfit(f"{shown(name)} in it is a {entry.kind}, which no image has")
            if len(self._places) + len(self._links) > MOST_FILES:
                raise Unfit(f"it has more than {MOST_FILES} files: an image never has so many")


class _Seeking(Stream):
    """The bytes of a file, of which those that are left out are not read."""

    def __init__(self, blob: Blob) -> None:
        super().__init__(iter(()))
        self._blob = blob
        self._here = 0

    @property
    def taken(self) -> int:
        return self._here

    def take(self, count: int) -> bytes:
        found = os.pread(self._blob.fd, count, self._here)
        self._here += len(found)
        return found

    def skip(self, count: int) -> bool:
        self._here += count
        return self._here <= self._blob.size


def _unpacked_to_disk(blob: Blob, limits: Limits) -> Blob:
    """What is in ``blob``, in a nameless file in TMPDIR or /var/tmp."""
    read, packed, place = blob.reader(), 0, spool()

    def counted(count: int) -> bytes:
        nonlocal packed
        found = read(count)
        packed += len(found)
        return found

    try:
        made = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115, closed by with
    except OSError as error:
        raise no_spool(error) from None
    with made as file:
        for piece in unpacked(counted):
            try:
                file.write(piece)
            except OSError as error:
                raise Unfit(f"{place}, where it is unpacked first: {error.strerror}: $TMPDIR names another place") from None
            limits.refuse_bomb(file.tell(), packed)
        limits.spend(file.tell(), "unpacked it takes")
        fd = os.dup(file.fileno())
    return Blob(fd, 0, os.fstat(fd).st_size, blob.what)


def spool() -> str:
    """Where images are kept for as long as an import or an export takes."""
    return os.environ.get("TMPDIR") or "/var/tmp"


def no_spool(error: OSError) -> Unfit:
    """The refusal where that can't be had."""
    return Unfit(f"{spool()}, where images are kept meanwhile: {error.strerror}: $TMPDIR names another place")


# -- from files to an image


def machine() -> str:
    """What images of this machine run on: ``linux/amd64``."""
    return f"linux/{architecture()}"


def oci_image(files: Files, tag: str, *, foreign: bool) -> Image:
    """The image ``tag`` ("": the only one) of the OCI layout that ``files`` are.  Raises Elsewhere where it is for another
    machine, unless ``foreign``; Unfit; OSError."""
    if files.find("oci-layout") is None or (index := files.find("index.json")) is None:
        raise Unfit(f"{files.where} is no OCI layout: it has no oci-layout and index.json")
    listed = _listed(_document(index), index.what)
    if tag:
        found = [each for each in listed if tag in _tags(each)]
        if not found:
            raise Unfit(f'{files.where} has no image "{tag}"{_has(listed)}')
    else:
        found = listed
        if len({frozenset(_tags(each)) for each in listed if _platform(each) != _NO_PLATFORM}) > 1:
            raise Unfit(f"{files.where} has several images: say which, as in oci:DIR:TAG{_has(listed)}")
    descriptor = _chosen(found, files.where, foreign=foreign)
    for _ in range(_DEEPEST):
        blob = _blob(files, descriptor)
        document = _document(blob)
        if "manifests" not in document:
            return _by_manifest(files, document, blob.what, foreign=foreign)
        descriptor = _chosen(_listed(document, blob.what), files.where, foreign=foreign)
    raise Unfit(f"{files.where} has more than {_DEEPEST} indexes in one another")


def docker_image(files: Files, tag: str, *, foreign: bool) -> Image:
    """The image ``tag`` ("": the only one) of what ``docker save`` has written, which ``files`` are.  Raises as
    ``oci_image``."""
    manifest = files.find("manifest.json")
    if manifest is None:
        raise Unfit(f"{files.where} is nothing that docker save writes: it has no manifest.json")
    listed = _json(manifest)
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed) or not listed:
        raise Unfit(f"{manifest.what} lists no images")
    tags = [_strings(each.get("RepoTags"), f"{manifest.what} has RepoTags that are") for each in listed]
    found = [each for each, its in zip(listed, tags, strict=True) if not tag or tag in its or f"docker.io/library/{tag}" in its]
    if not found or len(found) > 1:
        there = sorted(each for its in tags for each in its)
        what = f'no image "{tag}"' if tag else "several images: say which, as in docker-archive:FILE:NAME:TAG"
        raise Unfit(f"{files.where} has {what}; there {_counted(there)}")
    names = _strings(found[0].get("Layers"), f"{manifest.what} has Layers that are")
    names = [*_strings([found[0].get("Config")], f"{manifest.what} has a Config that is"), *names]
    if len(names) > MOST_LAYERS:
        raise Unfit(f"{manifest.what} tells of {len(names)} layers: no image has so many")
    blobs = [files.find(os.path.normpath(name)) for name in names]
    for name, blob in zip(names, blobs, strict=True):
        if blob is None:
            raise Unfit(f"{files.where} lacks {_quoted(name)}, which its manifest.json names")
    there_are = [_with_digest(blob, name) for blob, name in zip(blobs, names, strict=True) if blob is not None]
    return _image(there_are[0].content(), there_are[1:], there_are[0].what, foreign=foreign)


def _strings(found: Any, what: str) -> list[str]:
    """``found``, a list of strings, or nothing.  Raises Unfit where it is something else, ``what`` it is."""
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Unfit(f"{what} no names")
    return found


def _quoted(text: object) -> str:
    """What an image says, as a sentence shows it."""
    said = str(text)
    return printable(said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…")


def _with_digest(blob: Blob, name: str) -> Blob:
    """``blob`` with the digest that its name says, if it does (``blobs/sha256/…``)."""
    parts = name.split("/")
    digest = ":".join(parts[1:]) if len(parts) == 3 and parts[0] == "blobs" else ""
    return blob._replace(digest=digest) if _DIGEST.fullmatch(digest) else blob


def _by_manifest(files: Files, manifest: dict[str, Any], what: str, *, foreign: bool) -> Image:
    config, layers = manifest.get("config"), manifest.get("layers")
    if not isinstance(config, dict) or not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        old = " (of Docker's first format, which skopeo copy can turn into a new one)" * ("fsLayers" in manifest)
        raise Unfit(f"{what} is no manifest of an image{old}")
    for each in layers:
        kind = each.get("mediaType", "") if isinstance(each, dict) else ""
        if not isinstance(kind, str) or "tar" not in kind or "encrypted" in kind:
            raise Unfit(f'{what} has a layer of the kind "{_quoted(kind)}", which is no archive of files')
    blob = _blob(files, config)
    return _image(blob.content(), [_blob(files, each) for each in layers], blob.what, foreign=foreign)


def _image(config: bytes, blobs: list[Blob], what: str, *, foreign: bool) -> Image:
    ids = told_of(config, what, foreign=foreign)
    if len(ids) != len(blobs):
        raise Unfit(f"{what} tells of {len(ids)} layers, and the image has {len(blobs)}")
    if not blobs:
        raise Unfit("the image has no layers")
    return Image([Layer(blob, each) for blob, each in zip(blobs, ids, strict=True)], config)


def told_of(config: bytes, what: str, *, foreign: bool) -> list[str]:
    """What the layers of an image hash to, as its configuration says, which is ``what`` in sentences.  Raises as
    ``oci_image``."""
    document = _parsed(config, what)
    told = document.get("rootfs") if isinstance(document, dict) else None
    ids = told.get("diff_ids") if isinstance(told, dict) else None
    if not isinstance(ids, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in ids):
        raise Unfit(f"{what} is no configuration of an image: it doesn't say what its layers hash to")
    _refuse_foreign(f"{document.get('os') or 'linux'}/{document.get('architecture') or 'unknown'}", foreign=foreign)
    return ids


def digests_in(listed: bytes) -> list[str]:
    """The digests of the layers' blobs, as skopeo lists them; none where it says something else."""
    document = _parsed(listed, "what skopeo says of it")
    found = document.get("Layers") if isinstance(document, dict) else None
    return found if isinstance(found, list) and all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in found) else []


def sizes_in(manifest: bytes) -> dict[str, int]:
    """The sizes of the blobs that a manifest names, as far as it does, by their digests."""
    document = _parsed(manifest, "its manifest")
    document = document if isinstance(document, dict) else {}
    listed = document.get("layers")
    blobs = [document.get("config"), *(listed if isinstance(listed, list) else [])]
    told = [(each.get("digest"), each.get("size")) for each in blobs if isinstance(each, dict)]
    return {
        digest: size
        for digest, size in told
        if isinstance(digest, str) and _DIGEST.fullmatch(digest) and isinstance(size, int) and size > 0
    }


def refuse_others(index: bytes, what: str) -> NoReturn:
    """Raise Elsewhere: none of the images in this ``index``, which is ``what`` in sentences, is for this machine."""
    document = _parsed(index, what)
    if isinstance(document, dict):
        _chosen(_listed(document, what), what, foreign=False)
    raise Elsewhere(f"the image is for others than this machine, which is {machine()}: --force takes what there is")


def _refuse_foreign(runs_on: str, *, foreign: bool) -> None:
    if runs_on != machine() and not foreign:
        raise Elsewhere(f"the image is for {_quoted(runs_on)}, and this machine is {machine()}: --force takes it nevertheless")


def _chosen(listed: list[dict[str, Any]], where: str, *, foreign: bool) -> dict[str, Any]:
    """The descriptor for this machine.  One that says nothing of machines will do if it is the only one."""
    images = [each for each in listed if _platform(each) != _NO_PLATFORM]
    ours = [each for each in images if "/".join(_platform(each)) == machine()]
    if ours:
        return ours[0]
    if not images:
        raise Unfit(f"{where} has no image")
    if len(images) == 1 and (foreign or not _platform(images[0])):
        return images[0]
    there = sorted({"/".join(_platform(each)) or "a machine that is not said" for each in images})
    if foreign:
        raise Unfit(f"the image is there for several machines, and none is {machine()}: there {_counted(there)}")
    raise Elsewhere(
        f"the image is for {_quoted(', '.join(there))}, and this machine is {machine()}: --force takes it nevertheless"
    )


def _platform(descriptor: dict[str, Any]) -> tuple[str, ...]:
    found = descriptor.get("platform")
    if not isinstance(found, dict):
        return ()
    return str(found.get("os", "")), str(found.get("architecture", ""))


def _tags(descriptor: dict[str, Any]) -> set[str]:
    notes = descriptor.get("annotations")
    return {str(notes[key]) for key in (REF, NAME) if key in notes} if isinstance(notes, dict) else set()


def _has(listed: list[dict[str, Any]]) -> str:
    return f"; there {_counted(sorted({tag for each in listed for tag in _tags(each)}))}"


def _counted(names: list[str]) -> str:
    if not names:
        return "is none with a name"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{'are' if len(names) > 1 else 'is'} {', '.join(_quoted(name) for name in names[:20])}{more}"


def _listed(document: dict[str, Any], what: str) -> list[dict[str, Any]]:
    found = document.get("manifests")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise Unfit(f"{what} lists no images")
    return found


def _blob(files: Files, descriptor: dict[str, Any]) -> Blob:
    """The blob of which a ``descriptor`` tells."""
    digest, size = descriptor.get("digest"), descriptor.get("size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(size, int):
        raise Unfit(f"{files.where} names a blob by no digest and size that there can be")
    found = files.find(f"blobs/{digest.replace(':', '/')}")
    if found is None:
        raise Unfit(f"{files.where} lacks the blob {digest}")
    if found.size != size and not found.is_absent:
        raise Unfit(f"{found.what} takes {found.size} bytes, and is to take {_quoted(size)}: it is cut off, or another")
    return found._replace(digest=digest)


def _document(blob: Blob) -> dict[str, Any]:
    found = _json(blob)
    if not isinstance(found, dict):
        raise Unfit(f"{blob.what} is no JSON object")
    return found


def _json(blob: Blob) -> Any:
    return _parsed(blob.content(), blob.what)


def _parsed(text: bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unfit(f"{what} is no JSON") from None


def _hash(digest: str, content: bytes) -> str:
    return hashlib.new(digest.partition(":")[0], content).hexdigest()
