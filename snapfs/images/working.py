"""A layer is unpacked by a process of its own, so that several are at once, on as many processors.

In there one thread reads, hashes and unpacks what the layer's blob holds, and another makes the files.  Meanwhile the layer's
directory is bound, in a mount namespace that ends with the process, where the daemon takes it for use.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from snapfs.images.compression import packed_by, unpacked
from snapfs.images.layouts import Layer
from snapfs.images.limits import Limits
from snapfs.images.original import Blob, Recording
from snapfs.images.tarreader import TarReader
from snapfs.images.unfit import Unfit
from snapfs.images.unpacking import Owners, Unpacking
from snapfs.kernel import libc, mounting, subids, userns
from snapfs.kernel.forks import undisturbed

_AHEAD = 8  # pieces that are unpacked before somebody wants them
_EVERY = 0.1  # seconds between two messages of how far it is
_PR_SET_PDEATHSIG = 1
_OF_AN_IMAGE = re.compile(rb"(\./)?(blobs/|oci-layout$|index\.json$|manifest\.json$|[0-9a-f]{64}(/|\.json|\.tar))")

PROGRESS, UNPACKED, FINISHED, UNFIT, FAILED = "progress", "unpacked", "finished", "unfit", "failed"
"""What a worker says: [PROGRESS, files, bytes]; [UNPACKED, diff id]; [FINISHED, [foreign, bare, device]], as of ``Left``;
[UNFIT, why]; [FAILED, errno, words]."""


class Place(NamedTuple):
    """Where a layer goes: its directory, and an empty one beside it; ``lowest``: no layers are below; ``prefix``: what
    overlayfs's own attributes begin with; ``process``: the directory in /proc of the daemon, where its namespaces are needed;
    ``lock``: a descriptor that is kept open."""

    directory: str
    aside: str
    lowest: bool
    prefix: str
    process: str
    lock: int


class Worker:
    """The process that unpacks ``layer`` in ``place``; it begins at once."""

    def __init__(self, layer: Layer, place: Place, limits: Limits, *, has_end: bool) -> None:
        self.files = 0
        self.size = 0
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = 0
        try:
            with undisturbed():
                self._pid = os.fork()
                if self._pid == 0:
                    try:
                        self._end.close()
                        _Work(theirs, layer, place, limits, has_end=has_end).run()
                    finally:
                        os._exit(0)
            theirs.close()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._end.fileno()

    def hear(self) -> list[Any]:
        """The next message but PROGRESS, which is noted; [] where that was the one that there was."""
        try:
            text = self._end.recv(1 << 16)
        except ConnectionResetError:
            text = b""
        if not text:
            return [FAILED, errno.ECHILD, "the process that unpacks it was killed"]
        message: list[Any] = json.loads(text)
        if message[0] == PROGRESS:
            self.files, self.size = message[1:]
            return []
        return message

    def finish(self, layers: Sequence[str], others: int) -> None:
        """Have the layer made what it is on these layers, the nearest first, by their paths; all others take so many bytes."""
        file = os.memfd_create("layers")  # a message has an end
        try:
            os.write(file, json.dumps([layers, others]).encode())
            socket.send_fds(self._end, [b"finish"], [file])
        finally:
            os.close(file)

    def close(self) -> None:
        """End it, whatever it is doing; twice is fine."""
        if self._pid:
            self._end.close()
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


class _Work:
    """What the process does."""

    def __init__(self, end: socket.socket, layer: Layer, place: Place, limits: Limits, *, has_end: bool) -> None:
        self._end = end
        self._layer = layer
        self._place = place
        self._limits = limits
        self._has_end = has_end
        self._told = 0.0
        self._is_bound = False
        self._left: list[str] = []

    def run(self) -> None:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
            os.umask(0)
            self._close_others()
            try:
                self._unpack()
            finally:
                self._unbind()
            if self._left:
                self._say(FINISHED, self._left)
        except Unfit as unfit:
            self._say(UNFIT, str(unfit))
        except OSError as error:
            self._say(FAILED, error.errno or 0, error.strerror or str(error))
        except BaseException as error:
            self._say(FAILED, 0, f"{type(error).__name__}: {error}")

    def _close_others(self) -> None:
        """No lock of another layer, and no end of another worker's, outlives who holds it."""
        kept = sorted({0, 1, 2, self._end.fileno(), self._place.lock, self._layer.blob.fd, *self._process()})
        for before, after in zip(kept, [*kept[1:], 1 << 16], strict=True):
            os.closerange(before + 1, after)

    def _process(self) -> list[int]:
        return [int(self._place.process.rpartition("/")[2])] if self._place.process else []

    def _enter(self) -> Owners:
        """Have the rights, and the ids, of the daemon's namespace, if there is one, and the layer in use."""
        place = self._place
        ids: tuple[Sequence[range], Sequence[range]] | None = None if os.geteuid() == 0 else ((), ())
        if place.process:
            userns.join(place.process, mounts=False)
            lent = subids.mapped_here()
            ids = _ranges(lent.uids), _ranges(lent.gids)
        if place.process or os.geteuid() == 0:
            userns.copy_mounts()
            mounting.mount_bind(place.directory, place.directory, read_only=False)
            self._is_bound = True
        libc.call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after all that takes it away
        return Owners(ids)

    def _unbind(self) -> None:
        """Take the bind away before the end: whoever looks through all namespaces may keep this one a while longer."""
        if self._is_bound:
            mounting.unmount(self._place.directory, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)

    def _unpack(self) -> None:
        place = self._place
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        top, aside = os.open(place.directory, flags), os.open(place.aside, flags)  # in one mount: before there is another
        unpacking = Unpacking(top, aside, lowest=place.lowest, prefix=place.prefix, owners=self._enter())
        with _Feed(self._layer, self._limits) as feed, closing(Recording(iter(feed), aside)) as stream:
            reader = TarReader(stream)
            is_first = self._has_end
            while (entry := reader.next()) is not None:
                if is_first and _OF_AN_IMAGE.match(entry.name):
                    words = "it is the archive of an image, and none of a layer"
                    raise Unfit(f"{words}: write docker-archive: or oci-archive: before its name")
                is_first &= entry.name in (b".", b"./")
                path = unpacking.add(entry, reader)
                if path is not None:
                    stream.in_file(path, entry.size)
                if unpacking.has_replaced or entry.spans is not None:
                    stream.give_up()
                self._tell(unpacking.files, unpacking.size + stream.size)
            if self._has_end and feed.is_empty:
                raise Unfit("there is nothing in it")
            if self._has_end and not reader.has_end:
                raise Unfit("the archive is cut off: the empty blocks that mark its end are missing")
            stream.drain()
            diff_id = feed.checked()
            stream.finish(diff_id, feed.blob)
            kept = stream.size
        self._say(PROGRESS, unpacking.files, unpacking.size + kept)
        self._say(UNPACKED, diff_id)
        message, files, _, _ = socket.recv_fds(self._end, 16, 1)
        if message:
            with open(files[0], encoding="utf-8") as file:
                file.seek(0)
                layers, others = json.load(file)
            unpacking.finish(layers, lambda: self._limits.refuse_size(others + unpacking.size + kept))
            self._say(PROGRESS, unpacking.files, unpacking.size + kept)
            left = unpacking.left
            self._left = [left.foreign, left.bare, left.device]

    def _tell(self, files: int, size: int) -> None:
        self._limits.refuse_files(files)
        now = time.monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            self._say(PROGRESS, files, size)

    def _say(self, *message: object) -> None:
        self._end.send(json.dumps(message).encode())


def _ranges(lent: Sequence[subids.Range]) -> list[range]:
    return [range(first, first + count) for first, count in lent]


class _Feed:
    """The bytes of ``layer``, unpacked, in pieces, which a thread makes ahead.  A context manager."""

    def __init__(self, layer: Layer, limits: Limits) -> None:
        self._layer = layer
        self._limits = limits
        self._packed = 0
        self._unpacked = 0
        self._first = b""
        algorithms = [(text.partition(":")[0] or "sha256") for text in (layer.blob.digest, layer.diff_id)]
        self._hash, self._diff = (hashlib.new(algorithm) for algorithm in algorithms)
        self._pieces: queue.Queue[bytes | BaseException] = queue.Queue(_AHEAD)
        self._left = False  # by who takes the pieces
        self._ended = False

    def __enter__(self) -> _Feed:
        threading.Thread(target=self._make, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        with suppress(queue.Empty):
            while True:
                self._pieces.get_nowait()

    def __iter__(self) -> Iterator[bytes]:
        while not self._ended:
            piece = self._pieces.get()
            self._ended = isinstance(piece, BaseException) or not piece
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing, at the end."""
        return not self._unpacked

    @property
    def blob(self) -> Blob | None:
        """What it came in, at the end, where that has a digest."""
        digest = self._layer.blob.digest
        return Blob(digest, self._packed, packed_by(self._first)) if digest.startswith("sha256:") else None

    def checked(self) -> str:
        """What the layer hashes to, unpacked.  Raises Unfit where that, or what its blob hashes to, is not what it is to be."""
        for what, wanted, found in (
            ("it is damaged: its blob", self._layer.blob.digest, self._hash),
            ("unpacked it", self._layer.diff_id, self._diff),
        ):
            if wanted and wanted != f"{found.name}:{found.hexdigest()}":
                raise Unfit(f"{what} hashes to {found.name}:{found.hexdigest()}, and not to {wanted}")
        return f"{self._diff.name}:{self._diff.hexdigest()}"

    def _make(self) -> None:
        last: bytes | BaseException = b""
        try:
            for piece in unpacked(self._reader()):
                self._diff.update(piece)
                self._unpacked += len(piece)
                self._limits.refuse_bomb(self._unpacked, self._packed)
                self._pieces.put(piece)
                if self._left:
                    return
        except BaseException as error:
            last = error
        self._pieces.put(last)

    def _reader(self) -> Callable[[int], bytes]:
        read = self._layer.blob.reader()
        if not self._layer.blob.digest:

            def counted(count: int) -> bytes:
                found = read(count)
                self._packed += len(found)
                return found

            return counted

        def hashed(count: int) -> bytes:
            found = read(count)
            self._packed += len(found)
            self._first = self._first or found[:6]
            self._hash.update(found)
            return found

        return hashed
