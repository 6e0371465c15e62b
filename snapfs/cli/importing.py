"""``snapfs import``: the layers of an image become committed snapshots, named by their chain ids.

A layer that is being unpacked is the active snapshot import-<chain id> without a parent, locked by the command that makes it
(``drafts.py``), with the label IMPORTING; several are at once.  Once its archive is unpacked, and the layers below are whole,
it becomes what it is on top of those.  Nothing is committed before all layers are whole, and have the hashes that the image
says.  So a refusal leaves nothing, and what a command that was killed has left is whole, and taken over by the next one, where
the label DIFF_ID says so, if the machine has not been started anew since; else the next import removes it.

Where others may write the tree they may have given any snapshot that name and those labels.  There it counts as well what only
who writes ROOT can have noted: IMPORTED, an attribute of the layer's directory, there and of all that it stands on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import selectors
import time
from pathlib import Path

from snapfs import imagejson
from snapfs.cli import table
from snapfs.cli.commanding import AGAIN, SYNC, persistently
from snapfs.cli.commit import commit
from snapfs.cli.cutoff import tidied
from snapfs.cli.drafts import label_of, locked, namespaces, refuse_unwritable
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.listing import images
from snapfs.cli.place import MountedTree, file_name, find_tree, key_of
from snapfs.cli.prepare import make
from snapfs.cli.progress import Progress
from snapfs.cli.refusal import BUSY, FAILED, NOT_FOUND, NOT_PERMITTED, TAKEN, USAGE, Refusal
from snapfs.errors import Damaged, InvalidArgument, SnapshotError
from snapfs.images import fetching
from snapfs.images.layouts import ArchiveFiles, Blob, DirectoryFiles, Image, Layer, docker_image, file_blob, oci_image
from snapfs.images.limits import Limits
from snapfs.images.original import ORIGINAL
from snapfs.images.unfit import Unfit
from snapfs.images.working import FAILED as BROKEN
from snapfs.images.working import FINISHED, UNFIT, UNPACKED, Place, Worker
from snapfs.labels import DIFF_ID, IMPORTING
from snapfs.model import Kind
from snapfs.mountspec import MOST_LOWERS
from snapfs.names import printable, shown, word
from snapfs.root.trash import Trash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

IMPORTED = "user.snapfs.imported"
"""An attribute of ROOT/snapshots/<id>: the name of the layer that an import has made there, and whose hashes it has checked."""

_KEY = "import-"
_DRAFT = re.compile(rf"{_KEY}[0-9a-f]{{32,128}}")
_CHAIN = re.compile(r"sha256:[0-9a-f]{64}")
_TRANSPORT = re.compile(r"[a-z][a-z0-9+.-]*:")
_IN_REGISTRY = re.compile(r"[a-z0-9-]+\.[a-z0-9.-]+/[a-z0-9._/-]+(:[\w.-]+|@sha256:[0-9a-f]{64})?")
_ARCHIVES = ".tar", ".gz", ".tgz", ".zst"
_PATIENCE = 5.0  # seconds in which the namespace of a process that was killed is gone, where somebody looks through all
_WAITING = 4  # layers a processor that wait, unpacked, for those below
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE, _FILES, _RATIO = "100G", "10000000", "200"


class _Task:
    """A layer that is to be a snapshot: ``name``, or "" where that is not known before it is unpacked; ``number`` and ``fd``
    are of its draft."""

    def __init__(self, layer: Layer, name: str, what: str) -> None:
        self.layer = layer
        self.name = name
        self.what = what
        self.diff_id = layer.diff_id
        self.key = _KEY + (name.partition(":")[2] or os.urandom(16).hex())
        self.number = 0
        self.fd = -1
        self.worker: Worker | None = None
        self.is_held = False  # by another import, which is at the same layer
        self.is_unpacked = False
        self.is_whole = False
        self.is_committed = False  # by another import, say


class _Import:
    """One import, of layers that stand on ``parent`` (None: on nothing), in a tree whose options.json says ``options``;
    ``source`` is what it is of, for sentences."""

    def __init__(self, place: MountedTree, options: dict[str, Any], source: str, parent: str | None, limits: Limits) -> None:
        self.place = place
        self._options = options
        self._root: str = options["root"]
        self._source = source
        self._parent = parent
        self._limits = limits
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._tasks: list[_Task] = []
        self._committed: list[_Task] = []  # here
        self._below: list[str] = []  # the layers that are whole, and those of the parent, the nearest first
        self._next = 0  # how many tasks that is
        self._left = ["", "", ""]
        self._waits = ""  # for whom
        self._progress = Progress()

    def run(self, layers: Sequence[Layer], names: Sequence[str], refuse_taken: Callable[[str], None], *, archive: bool) -> str:
        """Have all layers committed, and on the disk; the name of the last.  Raises Refusal, and nothing is kept.
        ``refuse_taken`` hears, before that, what a lone layer is called, where ``names`` doesn't say; it may raise Refusal."""
        refuse_unwritable(self.place, self._root, f"cannot import {self._source}")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each layer has two
        if self._parent is not None:
            self._is_there(self._parent, label_of(self.place, self.place.directory("committed", self._parent), DIFF_ID))
        first, parent = self._found(layers, names)
        count = len(layers)
        self._tasks = [
            _Task(layers[nth], names[nth], f"layer {nth + 1} of {count}" if count > 1 else "") for nth in range(first, count)
        ]
        self._parent = parent
        if any(task.layer.blob.is_absent for task in self._tasks):
            raise fetching.Unfinished("a layer that was there when the image was fetched is gone")
        if self._tasks:
            self._below = list(self._chain())
            self._refuse_too_deep()
        self._remove_left()
        try:
            with namespaces(self.place, self._options, f"cannot import {self._source}") as process, self._ended():
                self._make(process, archive=archive)
            for task in self._tasks:
                if not task.name:
                    task.name = imagejson.chain_id(self._parent or "", task.diff_id)
                    self._note_imported(task)
                    refuse_taken(task.name)
            for task in self._tasks:
                self._commit(task)
            for task in self._committed:
                self._is_there(task.name, task.diff_id)  # and no other that has just been given its key
        except BaseException:
            self._take_back()
            raise
        for task in self._committed[-1:] + self._committed[:-1]:
            directory = self.place.directory("committed", task.name)
            self.place.do("wait for the disk", SYNC, persistently, self.place.within.sync, directory)
        for path, words in zip(self._left, _LOSSES, strict=True):
            if path:
                table.complain(f"{path}, for one, {words}")
        return self._tasks[-1].name if self._tasks else names[-1]

    # -- what is there already

    def _found(self, layers: Sequence[Layer], names: Sequence[str]) -> tuple[int, str | None]:
        """The number of the first layer that is missing with all that are above it, and what that is to stand on."""
        for nth in range(len(names) - 1, -1, -1):
            if names[nth] and self._is_there(names[nth], layers[nth].diff_id):
                return nth + 1, names[nth]
        return 0, self._parent

    def _is_there(self, name: str, diff_id: str) -> bool:
        """Whether the layer ``name`` is there, whole.  Raises Refusal where another snapshot is."""
        kind, state = _found_as(self.place, name, diff_id)
        to_do = f"rename or remove it: {self.place.command('rm', name)}"
        if kind and state is None:
            raise self._refusal(f'snapshot "{name}" already exists ({kind}), and no import has made it: {to_do}', TAKEN)
        if state:
            raise self._refusal(f'its layer "{name}" is there, but {state}: {to_do}')
        if kind is not None and not self._is_sure(self.place.directory(kind, name), name):
            words = f'snapshot "{name}" is there, but others than you may write the tree, and could have made it'
            raise self._refusal(f"{words}: {to_do}", NOT_PERMITTED)
        return kind is not None

    def _is_sure(self, directory: str, name: str, number: int = 0) -> bool:
        """Whether an import has made the layer ``name``, which is the snapshot ``number`` (0: to be found out) at
        ``directory``: its labels say so, but others may have written these."""
        if not self.place.is_labelled_by_others(directory):
            return True
        number = number or json.loads(self.place.read(f"{directory}/info.json"))["id"]
        with contextlib.suppress(OSError, Damaged):
            return self._is_made(number, name)
        return False

    def _is_made(self, number: int, name: str) -> bool:
        """Whether imports have made the snapshot ``number``, as the layer ``name``, and all that it stands on: others may have
        committed a draft onto what they like.  Raises OSError, Damaged."""
        from snapfs.root import imprint  # with what opens the records, which no other verb needs

        while self._noted(number) == name and (found := imprint.read(self._own(number))) is not None:
            record = found.record
            if record.kind is not Kind.COMMITTED:
                return not record.parent
            below = self._noted(record.parent) if record.parent else ""
            if imagejson.chain_id(below, record.labels.get(DIFF_ID, "")) != name:
                return False
            if not record.parent:
                return True
            number, name = record.parent, below
        return False

    def _noted(self, number: int) -> str:
        """The layer that an import has made as the snapshot ``number``.  Raises OSError."""
        return os.fsdecode(os.getxattr(self._own(number), IMPORTED, follow_symlinks=False))

    def _note_imported(self, task: _Task) -> None:
        with contextlib.suppress(OSError):  # it has no room for that: then the layer is not sure where others write
            os.setxattr(self._own(task.number), IMPORTED, task.name.encode(), follow_symlinks=False)

    def _refuse_too_deep(self) -> None:
        depth = len(self._tasks) + len(self._below)
        if depth > MOST_LOWERS:
            words = f"it has {depth} layers, more than the kernel can mount together ({MOST_LOWERS})"
            raise self._refusal(f"{words}: build it of fewer")

    def _remove_left(self) -> None:
        """Remove what imports of other images that were killed have left."""
        ours = {task.key for task in self._tasks}
        for key in self.place.within.names(f"{self.place.path}/active"):
            if _DRAFT.fullmatch(key) and key not in ours:
                with contextlib.suppress(Refusal):
                    number, fd = self._locked(key)
                    try:
                        if label_of(self.place, self.place.directory("active", key), IMPORTING) or self._is_empty(number):
                            self.place.remove("active", key, number)
                    finally:
                        os.close(fd)

    def _is_empty(self, number: int) -> bool:
        try:
            return not os.listdir(f"{self._own(number)}/fs")
        except OSError:
            return False

    def _locked(self, key: str, *, is_new: bool = False) -> tuple[int, int]:
        return locked(self.place, self._root, "active", key, Refusal(f'another import has "{key}"', BUSY), is_new=is_new)

    def _own(self, number: int) -> str:
        return f"{self._root}/snapshots/{number}"

    # -- drafts

    def _begin(self, task: _Task) -> bool:
        """Have the draft of ``task``, locked, or the layer, committed by another import; False while another is at it."""
        place = self.place
        if task.is_held and self._is_there(task.name, task.diff_id):
            task.is_whole = task.is_committed = True
            return True
        while True:
            is_new = True
            try:
                directory = make(place, "active", task.key, None)
            except Refusal as refused:
                is_new = False
                if refused.status != TAKEN or place.kind_of(task.key) not in (None, "active"):
                    raise
                directory = place.directory("active", task.key)
            try:
                task.number, task.fd = self._locked(task.key, is_new=is_new)
            except Refusal as refused:
                if refused.status != BUSY:
                    raise
                task.is_held = True
                self._waits = f"waiting: {refused}"
                return False
            label = "" if is_new else label_of(place, directory, IMPORTING)
            is_whole = label == self._boot and label_of(place, directory, DIFF_ID) == task.diff_id
            if is_whole and self._is_sure(directory, task.name, task.number):
                task.is_unpacked = task.is_whole = True
                return True
            if is_new or (not label and self._is_empty(task.number)):
                break
            if not label:
                self._release(task)
                raise self._refusal(f'snapshot "{task.key}" already exists (active), and has files: remove it', TAKEN)
            self._patiently(place.remove, "active", task.key, task.number)
            self._release(task)
        place.write_label(directory, IMPORTING, self._boot)
        return True

    @staticmethod
    def _release(task: _Task) -> None:
        if task.fd >= 0:
            os.close(task.fd)
            task.fd = -1

    def _take_back(self) -> None:
        """Remove all that this import has made."""
        for task in reversed(self._committed):
            with contextlib.suppress(Refusal):
                self.place.remove("committed", task.name, task.number)
        for task in self._tasks:
            if task.fd >= 0:
                with contextlib.suppress(Refusal):
                    self._patiently(self.place.remove, "active", task.key, task.number)
                self._release(task)

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """For a block, at whose end no process that it has started goes on."""
        try:
            yield
        finally:
            self._progress.clear()
            for task in self._tasks:
                if task.worker is not None:
                    task.worker.close()

    # -- unpacking

    def _make(self, process: str, *, archive: bool) -> None:
        """Have all drafts filled, and whole."""
        cores, began = len(os.sched_getaffinity(0)), time.monotonic()
        waiting, busy = self._tasks[::-1], list[_Task]()
        with selectors.DefaultSelector() as selector:
            while True:
                is_held = False
                while waiting and len(busy) < _WAITING * cores and sum(not task.is_unpacked for task in busy) < cores:
                    if not self._begin(waiting[-1]):
                        is_held = True
                        break
                    task = waiting.pop()
                    if not task.is_whole:
                        self._start(task, process, archive=archive)
                        busy.append(task)
                        selector.register(task.worker, selectors.EVENT_READ, task)  # type: ignore[arg-type]
                self._finish_next()
                if self._next == len(self._tasks):
                    return
                if is_held and not busy:
                    waited = time.monotonic() - began
                    self._progress.show_waiting(self._waits, waited)
                for key, _ in selector.select(AGAIN if is_held else None if busy else 0):
                    self._hear(key.data)
                    if key.data.is_whole:
                        selector.unregister(key.fileobj)
                        busy.remove(key.data)
                if self._progress.is_shown:
                    self._show()

    def _start(self, task: _Task, process: str, *, archive: bool) -> None:
        aside = f"{self._own(task.number)}/stale"
        try:
            os.mkdir(aside, 0o700)
        except OSError as error:
            raise self._broken(task, error) from None
        prefix = "user.overlay." if self._options["features"]["userxattr"]["on"] else "trusted.overlay."
        is_lowest = task is self._tasks[0] and self._parent is None
        place = Place(f"{self._own(task.number)}/fs", aside, is_lowest, prefix, process, task.fd)
        task.worker = Worker(task.layer, place, self._limits, has_end=archive)

    def _finish_next(self) -> None:
        """Have the next layer made what it is on those below, if it is unpacked, and they are whole."""
        while self._next < len(self._tasks) and self._tasks[self._next].is_whole:
            self._below.insert(0, self._layer_of(self._tasks[self._next]))
            self._next += 1
        task = self._tasks[self._next] if self._next < len(self._tasks) else None
        if task is not None and task.is_unpacked:
            assert task.worker is not None
            task.is_unpacked = False
            task.worker.finish(self._below, self._size() - task.worker.size)

    def _layer_of(self, task: _Task) -> str:
        if not task.number:
            directory = self.place.directory("committed", task.name)
            task.number = json.loads(self.place.read(f"{directory}/info.json"))["id"]
        return f"{self._own(task.number)}/fs"

    def _chain(self) -> Iterator[str]:
        """The layers of the parent, the nearest first."""
        name = self._parent
        while name is not None:
            told = json.loads(self.place.read(f"{self.place.directory('committed', name)}/info.json"))
            yield f"{self._own(told['id'])}/fs"
            name = told["parent"]

    def _hear(self, task: _Task) -> None:
        assert task.worker is not None
        message = task.worker.hear()
        try:
            self._limits.refuse_size(self._size())
            self._limits.refuse_files(sum(each.worker.files for each in self._tasks if each.worker is not None))
        except Unfit as unfit:
            raise self._refusal(str(unfit)) from None
        if not message:
            return
        kind, *told = message
        if kind == UNPACKED:
            task.is_unpacked = True
            task.diff_id = told[0]
        elif kind == FINISHED:
            self._left = [old or new for old, new in zip(self._left, told[0], strict=True)]
            task.worker.close()
            own = self._own(task.number)
            try:
                with contextlib.suppress(FileNotFoundError):  # of this archive nothing was kept
                    os.rename(f"{own}/stale/{ORIGINAL}", f"{own}/{ORIGINAL}")
                Trash(f"{self._root}/trash", f"{self._root}/trash").delete(f"{own}/stale", lambda: None)
            except OSError as error:
                raise self._broken(task, error) from None
            if task.name:
                self._note_imported(task)
            self.place.write_label(self.place.directory("active", task.key), DIFF_ID, task.diff_id)
            task.is_whole = True
        elif kind == UNFIT:
            raise self._refusal(f"{task.what}{': ' * bool(task.what)}{told[0]}")
        elif kind == BROKEN:
            raise self._refusal(f"{task.what}{': ' * bool(task.what)}{told[1]}; nothing is kept of it")

    def _broken(self, task: _Task, error: OSError) -> Refusal:
        """That of an ``error`` with the draft of ``task``: who may write the tree may have removed it."""
        gone = f', for "{task.key}" was removed meanwhile' * isinstance(error, FileNotFoundError)
        return self._refusal(f"{task.what}{': ' * bool(task.what)}{error.strerror}{gone}; nothing is kept of it")

    def _size(self) -> int:
        """Bytes of all layers so far."""
        return sum(task.worker.size for task in self._tasks if task.worker is not None)

    def _show(self) -> None:
        done = sum(task.is_whole for task in self._tasks)
        workers = [task.worker for task in self._tasks if task.worker is not None]
        files, size = sum(worker.files for worker in workers), sum(worker.size for worker in workers)
        self._progress.show_count(f"unpacking, {done} of {len(self._tasks)} layers are done", files, size)

    # -- the end

    def _commit(self, task: _Task) -> None:
        if not task.is_committed:
            try:
                self._patiently(commit, self.place, task.key, task.name, self._parent)
            except Refusal:
                if not self._is_there(task.name, task.diff_id):
                    raise
                self._patiently(self.place.remove, "active", task.key, task.number)  # another import was faster
            else:
                self._committed.append(task)
        self._release(task)
        self._parent = task.name

    @staticmethod
    def _patiently(call: Callable[..., object], *arguments: object) -> None:
        """Call ``call``, again while it says that the draft is in use."""
        began = time.monotonic()
        while True:
            try:
                call(*arguments)
            except Refusal as refused:
                if refused.status != BUSY or time.monotonic() - began > _PATIENCE:
                    raise
                time.sleep(AGAIN)
            else:
                return

    def _refusal(self, why: str, status: int = FAILED) -> Refusal:
        return Refusal(f"cannot import {self._source}: {why}", status)


def _found_as(place: MountedTree, name: str, diff_id: str) -> tuple[str | None, str | None]:
    """The kind of the snapshot ``name``, if there is one; and its state ("": whole) if it is the layer with this diff id."""
    kind = place.kind_of(name)
    if kind != "committed":
        return kind, None
    directory = place.directory(kind, name)
    if label_of(place, directory, DIFF_ID) != diff_id:
        return kind, None
    return kind, json.loads(place.read(f"{directory}/info.json")).get("state") or ""


_LOSSES = (
    "belongs to a user or group that can't be had here: in the snapshot it is yours",
    "has an attribute that can't be set here: the snapshot lacks it",
    "is a device, which only root can make: the snapshot lacks it",
)
"""What is said of ``Left``."""


# -- what is given


def _import(given: Given) -> int:
    named = given.arguments[1] if len(given.arguments) > 1 else None
    limits = Limits(
        _size(given.value("max-size") or _SIZE, "max-size"),
        _size(given.value("max-files") or _FILES, "max-files"),
        _size(given.value("max-ratio") or _RATIO, "max-ratio"),
    )
    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("imported")
    naming = _Naming(place, named, replaces=given.has("replace"))
    with tidied():
        try:
            top, config = _brought(given, place, naming, limits, spares=True)
        except fetching.Unfinished:
            top, config = _brought(given, place, naming, limits, spares=False)
    naming.name(top, config)
    table.show_line(place.directory("committed", top))
    return 0


def _brought(given: Given, place: MountedTree, naming: _Naming, limits: Limits, *, spares: bool) -> tuple[str, bytes]:
    """Have what is given unpacked and committed: the name of the last layer, and the image's configuration, if it has one.
    Raises Refusal; and Unfinished where a layer was not fetched, for it was there, and is gone: not unless it ``spares``."""
    source = given.arguments[0]

    def known(diff_ids: list[str]) -> int:
        names = _chain_ids(diff_ids)
        naming.refuse_taken(names[-1] if names else "", b"")
        count = len(names) if spares else 0
        while count and _found_as(place, names[count - 1], diff_ids[count - 1]) != ("committed", ""):
            count -= 1
        return count

    with contextlib.ExitStack() as held:
        try:
            found = _opened(source, held, known, limits, foreign=given.has("force"))
        except Unfit as unfit:
            raise Refusal(f"cannot import {printable(source)}: {unfit}") from None
        except OSError as error:
            status = {FileNotFoundError: NOT_FOUND, PermissionError: NOT_PERMITTED}.get(type(error), FAILED)
            where = f"{shown(os.fsdecode(error.filename))}: " * bool(error.filename and error.filename != source)
            raise Refusal(f"cannot import {printable(source)}: {where}{error.strerror}", status) from None
        parent = given.value("parent")
        if isinstance(found, Image):
            if parent is not None:
                raise Refusal("an image has all its layers: --parent is for a lone one, in an archive", USAGE)
            layers, config = found.layers, found.config
            names = _chain_ids([layer.diff_id for layer in layers])
        else:
            layers, config, names = [found], b"", [""]
            parent = None if parent is None else _parent_of(place, parent)
        naming.refuse_taken(names[-1], config)
        if config:
            naming.check(config, printable(source))
        one = _Import(place, place.options(), printable(source), parent, limits)
        return one.run(layers, names, lambda top: naming.refuse_taken(top, b""), archive=not config), config


def _chain_ids(diff_ids: Sequence[str]) -> list[str]:
    found: list[str] = []
    for each in diff_ids:
        found.append(imagejson.chain_id(found[-1] if found else "", each))
    return found


def _parent_of(place: MountedTree, given: str) -> str:
    """The committed snapshot that a lone layer is to stand on.  Raises Refusal: what is on it is called by its name."""
    parent = place.key(given)
    kind = place.kind_of(parent)
    if kind is None:
        raise place.missing(parent)
    if kind != "committed":
        raise place.wrong_parent(parent)
    if not _CHAIN.fullmatch(parent) or not label_of(place, place.directory(kind, parent), DIFF_ID):
        words = f'"{parent}" was not imported, so what stands on it has no chain id'
        to_do = (
            f"{place.command('export', parent, 'oci:DIR')}, and snapfs import oci:DIR, make the same of layers that have one"
        )
        raise Refusal(f"cannot import a layer onto it: {words}: {to_do}", NOT_PERMITTED)
    return parent


def _opened(
    source: str, held: contextlib.ExitStack, known: Callable[[list[str]], int], limits: Limits, *, foreign: bool
) -> Image | Layer:
    """What ``source`` names; ``known`` is as in ``fetched``.  Raises Refusal, Unfit, and OSError."""
    transport, colon, rest = source.partition(":")
    if source == "-":
        return Layer(Blob(0, 0, -1, "standard input"))
    if colon and transport == "oci":
        path, tag = _split(rest, os.path.isdir)
        return oci_image(DirectoryFiles(path), tag, foreign=foreign)
    if colon and transport in ("oci-archive", "docker-archive"):
        path, tag = _split(rest, lambda path: os.path.exists(path) and not os.path.isdir(path))
        files = ArchiveFiles(path, limits)
        return (oci_image if transport == "oci-archive" else docker_image)(files, tag, foreign=foreign)
    if os.path.lexists(source):
        return _archive(source)
    if not _TRANSPORT.match(source):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
            os.lstat(source)  # it may be one that can't be looked at
        is_archive = source.endswith(_ARCHIVES)
        if "/" in source or is_archive:
            is_elsewhere = not is_archive and _IN_REGISTRY.fullmatch(source)
            to_do = f"; an image of a registry is docker://{source}" if is_elsewhere else ""
            raise Refusal(f"cannot import {printable(source)}: there is no such file{to_do}", NOT_FOUND)
        sources = "oci:DIR, oci-archive:FILE, docker-archive:FILE, docker://HOST/NAME:TAG, and an archive of a layer, are"
        raise Refusal(f"cannot import {printable(source)}: it is neither a file nor an image: {sources}", USAGE)
    progress = Progress()

    def wanted(size: int) -> None:
        limits.spend(size, "what is fetched takes")

    def told(size: int) -> None:
        progress.show_size("fetching", size)
        wanted(size)

    try:
        layout = held.enter_context(fetching.fetched(source, foreign=foreign, known=known, wanted=wanted, told=told))
    finally:
        progress.clear()
    return oci_image(DirectoryFiles(layout.path, layout.absent), fetching.TAG, foreign=foreign)


def _archive(path: str) -> Layer:
    if os.path.isdir(path):
        is_layout = "oci-layout" in os.listdir(path)
        to_do = (
            f"as a layout of images it is oci:{word(path)}" if is_layout else f"snapfs adopt {word(path)} makes a base of it"
        )
        raise Unfit(f"it is a directory: {to_do}")
    return Layer(file_blob(path))


def _split(text: str, is_place: Any) -> tuple[str, str]:
    """Path and tag in ``PATH[:TAG]``: both may have colons, and the shortest path that is there counts."""
    ends = [each.start() for each in re.finditer(":", text)] + [len(text)]
    for end in ends:
        if is_place(text[:end]):
            return text[:end], text[end + 1 :]
    path = text.partition(":")[0] or text
    if not path:
        raise Unfit("it says no path")
    os.stat(path)
    raise Unfit(f"{shown(path)} is {'no' if is_place is os.path.isdir else 'a'} directory")


def _size(text: str, option: str) -> int:
    """The number that ``text`` says, as ``20G`` does.  Raises Refusal."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16 and unit in _SIZES):
        raise Refusal(f'--{option} wants a number, 0 for as much as there is, such as 20G or 5000, and not "{text}"', USAGE)
    return int(digits) * _SIZES[unit]


def _is_same(text: str, config: bytes) -> bool:
    """Whether the file's ``text`` says what ``config`` does, however it is laid out."""
    try:
        return bool(json.loads(text) == json.loads(config))
    except ValueError:
        return False


class _Naming:
    """The name that an image gets in images/, where one is wanted; and its configuration.  With ``replaces`` another image
    loses its name to it, and those with the same layers get its configuration."""

    def __init__(self, place: MountedTree, name: str | None, *, replaces: bool) -> None:
        self._place = place
        self._name = name
        self._replaces = replaces
        self._has_images = place.within.exists(f"{place.path}/images")
        if name is not None and not self._has_images:
            raise Refusal(f"{place.path} has no images/, where a NAME would be: import without one, or start the daemon anew")
        if name is not None:
            try:
                file_name(name)
            except SnapshotError as error:
                raise Refusal(f"no image can be called so: {error}", USAGE) from None

    def refuse_taken(self, top: str, config: bytes) -> None:
        """Raise Refusal where a name, or the configuration of another image, would be replaced, and is not to be.  ``top`` is
        the snapshot that will be called so, "" where that is not known yet."""
        if self._replaces or not self._has_images or not top:
            return
        if self._name is not None and self._named() not in (None, top):
            raise Refusal(f'"{self._name}" is another image in images/: --replace gives the name to this one', TAKEN)
        if not config or self._place.kind_of(top) is None:
            return
        others = sorted(name for name, snapshot in images(self._place) if snapshot == top and name != self._name)
        if others and not _is_same(self._place.read(f"{self._place.directory('committed', top)}/image.json"), config):
            words = f'"{others[0]}" in images/ has the same layers, and another configuration, which all that have them share'
            raise Refusal(f"{words}: --replace makes it that of this image", TAKEN)

    def check(self, config: bytes, source: str) -> None:
        """Raise Refusal where ``config``, of the image ``source``, can be no image.json."""
        if self._has_images:
            try:
                imagejson.check(config)
            except InvalidArgument as error:
                raise Refusal(f"cannot import {source}: its configuration can't be kept: {error}") from None

    def _named(self) -> str | None:
        """The snapshot that has the name; None where none has."""
        path = f"{self._place.path}/images/{file_name(self._name or '')}"
        return key_of(os.path.basename(self._place.within.readlink(path))) if self._place.within.exists(path) else None

    def name(self, top: str, config: bytes) -> None:
        """Give the committed snapshot ``top`` the image's ``config``, if there is one, and the name.  Raises Refusal."""
        place = self._place
        if not self._has_images:
            return
        if config:
            path = f"{place.directory('committed', top)}/image.json"
            if place.within.exists(path) and _is_same(place.read(path), config):
                config = b""
        if config:
            place.do("keep the image's configuration", ["open", "create", "setattr", "write"], place.put, path, config)
        if self._name is None:
            return
        named = self._named()
        if named == top:
            return
        target, path = f"../committed/{file_name(top)}", f"{place.path}/images/{file_name(self._name)}"
        made = path if named is None or not self._replaces else f"{place.path}/images/import-{os.getpid()}"
        place.do(f'call it "{self._name}"', ["symlink"], place.within.symlink, target, made)
        if made != path:
            place.do(f'call it "{self._name}"', ["rename"], place.within.rename, made, path)


VERBS = {
    "import": Verb(
        "import",
        "IMAGE [NAME]",
        (
            Option("parent", "the committed snapshot that a lone layer stands on", "PARENT", short="-p"),
            Option("force", "take an image that is for another kind of machine, too"),
            Option("replace", "let NAME be this image, whatever it was, and image.json what this one says"),
            Option(
                "max-size",
                f"refuse what takes more bytes, fetched and unpacked, as 20G does ({_SIZE}; 0 sets no limit)",
                "SIZE",
            ),
            Option("max-files", f"refuse what has more files ({_FILES})", "COUNT"),
            Option("max-ratio", f"refuse a layer that grows to so many times its size ({_RATIO})", "TIMES"),
        ),
        "Make of each layer of IMAGE a committed snapshot, which is called by its chain id (sha256:…), and print\n"
        "the directory of the last; what is there already is not unpacked again.  NAME is what it is called in images/.\n"
        "IMAGE is oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG], an archive of one layer (.tar,\n"
        ".tar.gz, .tar.zst, or - for standard input), or what else skopeo knows.  All of it is taken, or nothing.",
        """
snapfs import oci:./app:1.0 app:1.0
snapfs import docker://docker.io/library/alpine:3.20 alpine:3.20
docker save app:1.0 | snapfs import docker-archive:/dev/stdin
snapfs import --parent sha256:6c3e… layer.tar.gz
""",
        _import,
    ),
}
