"""Checking a root that no process has open: what is damaged, orphaned, miscounted or torn, and what can be done about it.

Nothing is guessed and nothing is thrown away: what is mended is either on the disk twice (indexes follow from the records, a
record from its directory's imprint, a usage from the layer itself) or moved to lost+found, whole.  Everything here blocks on
the disk.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import msgspec

from snapfs.errors import Damaged, FailedPrecondition, NotFound, Unavailable
from snapfs.model import Kind, Usage
from snapfs.names import nameable, parse_id, word
from snapfs.offline.nodes import names_told_apart, told_apart
from snapfs.root import flags, identity, imagefile, imprint, placing
from snapfs.root.imprint import Imprint
from snapfs.root.layers import Layers
from snapfs.root.trash import STUCK
from snapfs.root.unflushed import Unflushed
from snapfs.scan.usage import disk_usage
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import ImageName, Record
from snapfs.store.soundness import broken_pages
from snapfs.store.writing import Writer

Progress = Callable[[str, int, int], None]
"""A function that is called with what is being looked at, in words, how many were looked at before, and how many there are."""


class Problem(enum.StrEnum):
    """What can be wrong; the value is the word that users read."""

    DAMAGED = "damaged"  # something of a snapshot is missing or can't be read
    ORPHANED = "orphaned"  # a directory of which no record knows
    MISCOUNTED = "miscounted"  # a number or an index that doesn't say what is there
    UNFLUSHED = "unflushed"  # its files may be torn: they had not reached the disk when the power went
    NOTE = "note"  # nothing is wrong, but somebody may want to know


class Finding(msgspec.Struct, frozen=True):
    """One thing found: a sentence, and what was done (``mended``) or can be done (``remedy``) about it."""

    problem: Problem
    text: str
    remedy: str = ""
    mended: str = ""


def check(
    root: str,
    *,
    repair: bool = False,
    accept: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
) -> Iterator[Finding]:
    """A generator of what is wrong in ``root``, as it is found; with ``repair`` it mends what it can without guessing.

    ``accept``: names of unflushed snapshots that are taken as they are.  Raises Unavailable where ``root`` is in use or is no
    root, NotFound for a name in ``accept`` that no snapshot has, FailedPrecondition for one that is not unflushed.
    """
    with closing(Layers.claim(root)) as layers:
        try:
            records = MetaStore(_sound(layers.records))
        except Damaged as error:
            yield Finding(Problem.DAMAGED, str(error), "--rebuild makes them anew from what each directory says of itself")
            return
        with closing(records):
            try:
                identity.refuse_foreign(layers, records)
            except Damaged as error:
                layers.leave_note(layers.previous_note)
                yield Finding(Problem.DAMAGED, str(error))
                return
            layers.supports_imprints = imprint.is_supported(layers.snapshots)
            placing.finish(layers, records)
            changed = repair
            try:
                for name in accept:
                    found = _accept(layers, records, name)
                    changed = True
                    yield found
                yield from _Check(layers, records, repair, progress).run()
            finally:
                if not changed:  # else the next start is to compare directories and records itself
                    layers.leave_note(layers.previous_note)


def _sound(path: str) -> str:
    """``path``, if the records can be opened; raises Damaged, Unavailable."""
    try:
        if not os.path.getsize(path):
            raise Damaged(f"the records, {path}, are empty")
        broken = broken_pages(path)
    except FileNotFoundError:
        raise Damaged(f"the records, {path}, are missing") from None
    except OSError as error:
        raise Unavailable.from_os("read the records", error) from error
    if broken:
        raise Damaged(f"{len(broken)} pages of the records, {path}, are broken; the first: {broken[0]}")
    return path


def _accept(layers: Layers, records: MetaStore, name: str) -> Finding:
    unflushed = Unflushed(layers, records)

    def operation(writer: Writer) -> None:
        number = writer.id_of(name)
        if number is None:
            raise NotFound.snapshot(name)
        if number not in unflushed.lost:
            raise FailedPrecondition(f'snapshot "{name}" is not unflushed: there is nothing to accept')
        unflushed.settle(writer, [number])

    records.write_now(operation, frees=True)
    return Finding(Problem.UNFLUSHED, f'committed "{name}"', mended="accepted as it is")


class _Check:
    """One check: what the records say, then what the directories say, then what the layers take."""

    def __init__(self, layers: Layers, records: MetaStore, repair: bool, progress: Progress) -> None:
        self._layers = layers
        self._records = records
        self._repair = repair
        self._progress = progress
        self._known: dict[int, Record] = {}
        self._unreadable: set[int] = set()
        self._whole: set[int] = set()

    def run(self) -> Iterator[Finding]:
        with self._records.reading() as reader:
            numbers, self._last_id = sorted(reader.ids()), reader.last_id()
        yield from self._read_records(numbers)
        yield from self._check_nodes()
        yield from self._check_images()
        yield from self._check_indexes()
        yield from self._check_parents()
        yield from self._check_directories()
        yield from self._check_flushed()
        yield from self._find_orphans()
        yield from self._count()

    def _mend(self, operation: Callable[[Writer], None], done: str) -> str:
        """Run ``operation`` if the check is to repair; returns ``done``, which says what was done, or ""."""
        if not self._repair:
            return ""
        self._records.write_now(operation)
        return done

    def _read_records(self, numbers: list[int]) -> Iterator[Finding]:
        for number in numbers:
            with self._records.reading() as reader:
                try:
                    record = reader.record(number)
                except Damaged as error:
                    text, record = str(error), None
            if record is not None:
                self._known[number] = record
                continue
            found = self._imprint(number)
            if found is None:
                self._unreadable.add(number)
                yield Finding(Problem.DAMAGED, text, "neither does its directory say what it was; --rebuild leaves it out")
                continue
            restored = found.record

            def restore(writer: Writer, number: int = number, record: Record = restored) -> None:
                writer.overwrite(number, record)
                writer.rebuild_indexes()

            mended = self._mend(restore, f"restored {_called(restored)} from what its directory says")
            yield Finding(Problem.DAMAGED, text, f"--repair restores {_called(restored)} from what its directory says", mended)
            if mended:
                self._known[number] = restored
            else:
                self._unreadable.add(number)

    def _check_nodes(self) -> Iterator[Finding]:
        for number, node in told_apart(self._known).items():
            before = self._known[number]
            mended = self._mend_record(number, msgspec.structs.replace(before, node=node), "it has a number of its own")
            text = (
                f"{_called(before)}: in the tree it is one with another snapshot, number {before.node_of(number)} in the inodes"
            )
            yield Finding(Problem.DAMAGED, text, "--repair gives it a number of its own", mended)

    def _check_images(self) -> Iterator[Finding]:
        for number, images in names_told_apart(self._known, self._last_id).items():
            before = self._known[number]
            mended = self._mend_record(number, msgspec.structs.replace(before, images=images), told_of_images(before, images))
            text = f"{_called(before)}: some of its names in images/ are another's, too, or have a number that is"
            yield Finding(Problem.DAMAGED, text, "--repair leaves each to the snapshot that got it last", mended)

    def _mend_record(self, number: int, record: Record, done: str) -> str:
        """Make ``record`` that of snapshot ``number``, and of its directory, if the check is to repair, as ``_mend`` does."""

        def mend(writer: Writer) -> None:
            writer.overwrite(number, record)
            self._layers.write_imprint(number, Imprint(record, writer.unflushed_since(number)))
            writer.rebuild_indexes()
            writer.raise_last_id(max((image.number for image in record.images), default=0))

        mended = self._mend(mend, done)
        if mended:
            self._known[number] = record
        return mended

    def _check_indexes(self) -> Iterator[Finding]:
        if self._unreadable or len({record.name for record in self._known.values()}) < len(self._known):
            return  # it is unknown what they should hold
        if told_apart(self._known) or names_told_apart(self._known, self._last_id):
            return  # it is unknown what they should hold
        with self._records.reading() as reader:
            wrong = reader.wrong_index_entries()
        if wrong:
            text = f"the indexes of the records: {wrong} entries are missing or wrong"
            mended = self._mend(lambda writer: writer.rebuild_indexes(), "made anew from the records")
            yield Finding(Problem.MISCOUNTED, text, "--repair makes them anew from the records", mended)

    def _check_parents(self) -> Iterator[Finding]:
        names: dict[str, int] = {}
        for number, record in self._known.items():
            if names.setdefault(record.name, number) != number:
                text = f'snapshots {names[record.name]} and {number} are both called "{record.name}"'
                yield Finding(Problem.DAMAGED, text, "--rebuild gives one of them another name")
            if record.parent and record.parent not in self._unreadable:
                parent = self._known.get(record.parent)
                wrong = "has no record" if parent is None else "is not committed" if parent.kind is not Kind.COMMITTED else ""
                if wrong:
                    text = f"{_called(record)}: its parent, number {record.parent}, {wrong}"
                    yield Finding(
                        Problem.DAMAGED, text, "--rebuild makes the records anew from what each directory says of itself"
                    )
            if self._circular(number):
                text = f"{_called(record)}: it is among its own parents"
                yield Finding(Problem.DAMAGED, text, "--rebuild makes the records anew from what each directory says of itself")

    def _circular(self, number: int) -> bool:
        step, seen = self._known.get(number), set[int]()
        while step is not None and step.parent and step.parent not in seen:
            if step.parent == number:
                return True
            seen.add(step.parent)
            step = self._known.get(step.parent)
        return False

    def _check_directories(self) -> Iterator[Finding]:
        layers = self._layers
        for done, (number, record) in enumerate(self._known.items()):
            self._progress(f"directory of {_called(record)}", done, len(self._known))
            own, layer = layers.directory(number), layers.fs(number)
            missing = [path for path in (own, layer) if not _is_directory(path)]
            if closed := next(filter(None, map(_why_unseen, missing)), ""):
                yield Finding(
                    Problem.DAMAGED,
                    f"{_called(record)}: its directory {layer} can't be looked at: {closed}",
                    f"see to the mode of {own}, and to the disk",
                )
                continue
            if missing:
                text = f"{_called(record)}: its directory {missing[0]} is missing"
                remedy = "restore it from a backup, or remove the snapshot"
                yield Finding(Problem.DAMAGED, text, remedy)
                continue
            self._whole.add(number)
            if record.kind is Kind.ACTIVE and not _is_directory(layers.work(number)):
                text = f"{_called(record)}: its workdir {layers.work(number)} is missing, without which it can't be mounted"
                yield Finding(Problem.DAMAGED, text, "--repair makes an empty one", self._make_work(number))
            if layers.supports_imprints:
                yield from self._check_imprint(number, record)
            if record.image is not None:
                try:
                    imagefile.read(own, record.image.digest, own)
                except (Damaged, Unavailable) as error:
                    yield Finding(Problem.DAMAGED, f"{_called(record)}: {error}")

    def _make_work(self, number: int) -> str:
        if not self._repair:
            return ""
        path = self._layers.work(number)
        if os.path.lexists(path):
            self._layers.move_to_lost_found(path)
        os.mkdir(path)
        os.chmod(path, 0o711)
        return "made an empty one"

    def _check_imprint(self, number: int, record: Record) -> Iterator[Finding]:
        path = self._layers.directory(number)
        with self._records.reading() as reader:
            expected = Imprint(msgspec.structs.replace(record, usage=None), reader.unflushed_since(number))
        found = self._imprint(number)
        if found != expected:
            wrong = "does not bear its record" if found is None else f"says that it is {_called(found.record)}"
            if found is not None and _called(found.record) == _called(record):
                wrong = "bears another record of it, as a crash may leave"
            mended = ""
            if self._repair:
                imprint.write(path, expected)
                mended = "written anew"
            text = f"{_called(record)}: its directory {path} {wrong}, so that --rebuild would not find it as it is"
            yield Finding(Problem.MISCOUNTED, text, "--repair writes it anew", mended)

    def _check_flushed(self) -> Iterator[Finding]:
        for number in sorted(Unflushed(self._layers, self._records).lost):
            if number in self._known:
                text = f"{_called(self._known[number])}: its files, in {self._layers.fs(number)}, had not all reached the disk "
                name = self._known[number].name
                yield Finding(
                    Problem.UNFLUSHED,
                    text + "when the power went or the disk failed, or somebody was still writing",
                    f"look at them, then take it as it is with --accept {word(name)}, or remove the snapshot",
                )

    def _find_orphans(self) -> Iterator[Finding]:
        layers = self._layers
        for name in sorted(os.listdir(layers.snapshots)):
            number = parse_id(name)
            if number is None or (number not in self._known and number not in self._unreadable):
                path = f"{layers.snapshots}/{name}"
                text = f"{path}: {self._looks(path)}; {self._why(number)}"
                remedy, mended = put_away(layers, path) if self._repair else ("", "")
                yield Finding(Problem.ORPHANED, text, remedy or "--repair moves it to lost+found", mended)
        waiting = 0
        for name in sorted(os.listdir(layers.trash.directory)):
            try:
                text = os.fsdecode(os.getxattr(f"{layers.trash.directory}/{name}", STUCK, follow_symlinks=False))
            except OSError:
                waiting += 1
            else:
                yield Finding(Problem.ORPHANED, f"of a removed snapshot: {text}", "then the next start, or Cleanup, deletes it")
        if waiting:
            yield Finding(
                Problem.NOTE, f"{waiting} removed directories in {layers.trash.directory} are deleted at the next start"
            )
        if os.path.isdir(layers.lost_found):
            for name in sorted(os.listdir(layers.lost_found)):
                path = f"{layers.lost_found}/{name}"
                yield Finding(Problem.NOTE, f"{path}: {self._looks(path)}; remove it when you don't need it")

    def _why(self, number: int | None) -> str:
        if number is None:
            return "snapfs makes nothing of that name here"
        found = self._imprint(number)
        what = f", and says that it was {_called(found.record)}" if found is not None else ""
        if number > self._last_id:
            return f"it is newer than the records{what}: were they put back from a backup? --rebuild would find it"
        return f"no record names it{what}: its removal, or its making, was cut short"

    def _looks(self, path: str) -> str:
        """Size and age, in words, of the file or directory ``path``, of which the records say nothing."""
        try:
            changed = max(os.lstat(place).st_mtime for place in (path, f"{path}/fs") if os.path.lexists(place))
            usage = disk_usage(path) if _is_directory(path) else Usage(1, os.lstat(path).st_blocks * 512)
        except OSError as error:
            return f"it can't be read ({os.strerror(error.errno or 0)})"
        age = _format_age(time.time() - changed)
        return f"{format_size(usage.size)} in {usage.inodes} files and directories, changed {age} ago"

    def _count(self) -> Iterator[Finding]:
        counted = [number for number in sorted(self._whole) if self._known[number].usage is not None]
        for done, number in enumerate(counted):
            record = self._known[number]
            self._progress(f"counting {_called(record)}", done, len(counted))
            try:
                usage = disk_usage(self._layers.fs(number))
            except PermissionError:  # what the daemon may in namespaces of its own
                text = f"{_called(record)}: some of it is closed to this user, so it can't be counted here"
                yield Finding(Problem.NOTE, text)
                continue
            except OSError as error:
                yield Finding(
                    Problem.DAMAGED, f"{_called(record)}: {Unavailable.from_os('read its layer', error)}", "see to the disk"
                )
                continue
            was = record.usage or Usage()
            if (usage.inodes, usage.size) != (was.inodes, was.size):  # what is shared is told as of when it was counted
                text = (
                    f"{_called(record)}: it takes {usage.size} bytes in {usage.inodes} inodes, but when it was "
                    f"committed {was.size} in {was.inodes} were counted"
                )
                after = msgspec.structs.replace(record, usage=usage)

                def correct(writer: Writer, number: int = number, after: Record = after) -> None:
                    writer.put(number, after)

                mended = self._mend(correct, "corrected in the records")
                remedy = "if nobody changed the layer, --repair corrects the records"
                yield Finding(Problem.MISCOUNTED, text, remedy, mended)

    def _imprint(self, number: int) -> Imprint | None:
        try:
            return imprint.read(self._layers.directory(number))
        except (Damaged, OSError):
            return None


def put_away(layers: Layers, path: str) -> tuple[str, str]:
    """Move ``path`` to lost+found: what is left to do, and what was done, one of them empty."""
    try:
        return "", f"moved to {layers.move_to_lost_found(path)}"
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno == errno.EBUSY:
            reason = "something is mounted there; unmount that first"
        elif flags.is_fixed(path):
            reason = f"it is immutable or append-only; do first: chattr -i -a {word(nameable(path))}"
        return f"move it away; it can't be moved to lost+found: {reason}", ""


def told_of_images(before: Record, images: Sequence[ImageName]) -> str:
    """What has become of the names in images/ of the snapshot that had the record ``before``, and has ``images`` now."""
    kept = {image.name for image in images}
    lost = [f'"{image.name}"' for image in before.images if image.name not in kept]
    return f"it is no longer called {', '.join(lost)} in images/" if lost else "its names have numbers of their own"


def _called(record: Record) -> str:
    return f'{record.kind} "{record.name}"'


def _is_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _why_unseen(path: str) -> str:
    """In words why this process can't tell what ``path`` is; "" where it can, or where nothing is there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def format_size(size: int) -> str:
    """``size`` bytes in words: ``3.4 GiB``."""
    amount, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.0f} {units[0]}" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def _format_age(seconds: float) -> str:
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)}"
    return "less than a minute"
