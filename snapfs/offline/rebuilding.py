"""Making the records anew from what each snapshot's directory says of itself (``snapfs/root/imprint.py``).

For a root whose database is lost or broken, or was put back from a backup that is too old.  The old one goes to lost+found;
of many runs the first one's, which has what nothing made here has, and the last ones' stay there.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import msgspec

from snapfs.errors import Damaged, Unavailable
from snapfs.model import Kind
from snapfs.names import parse_id, with_suffix
from snapfs.offline.checking import Finding, Problem, Progress, put_away, told_of_images
from snapfs.offline.nodes import names_told_apart, told_apart
from snapfs.root import identity, imprint
from snapfs.root.claim import RECORDS
from snapfs.root.imprint import Imprint
from snapfs.root.layers import Layers
from snapfs.store.metastore import MetaStore
from snapfs.store.schema import Record
from snapfs.store.writing import Writer

BATCH = 10_000  # records that one transaction writes

KEPT = 5  # old databases in lost+found

UNKNOWN_BOOT = "unknown"  # in the mark of a snapshot of which it is unknown whether its data was ever flushed


def rebuild(root: str, *, progress: Progress = lambda what, done, total: None) -> Iterator[Finding]:
    """Make the records of ``root`` anew: a generator of what is worth knowing of that, as it is done.

    A directory without an imprint goes to lost+found.  Of two snapshots of one name the one changed last keeps the name.  A
    parent that has no directory any more comes back as a damaged snapshot, so that its children are not taken for whole.

    Raises Unavailable where ``root`` is in use or is no root, or the disk refuses; then the old records are still there.
    """
    with closing(Layers.claim(root)) as layers:
        found = {}
        names = sorted(os.listdir(layers.snapshots))
        for done, name in enumerate(names):
            progress(f"reading what directory {name} says", done, len(names))
            number = parse_id(name)
            path = f"{layers.snapshots}/{name}"
            try:
                read = imprint.read(path) if number is not None else None
                why = "says nothing of a snapshot"
            except (Damaged, OSError) as error:
                read, why = None, f"can't be read: {error}"
            if number is None or read is None:
                yield Finding(Problem.ORPHANED, f"{path} {why}", *put_away(layers, path))
            else:
                found[number] = read
        yield from _break_circles(layers, found)
        yield from _put_parents(found)
        yield from _tell_apart(found)
        for number, node in told_apart({number: each.record for number, each in found.items()}).items():
            found[number] = msgspec.structs.replace(
                found[number], record=msgspec.structs.replace(found[number].record, node=node)
            )
        yield from _tell_names_apart(found)
        old = _write(layers, found, progress)
        words = f"the records were made anew: {len(found)} snapshots"
        if old:
            words += f"; the old ones are in {old}{_bound_old(layers)}"
        yield Finding(Problem.NOTE, words)


def _break_circles(layers: Layers, found: dict[int, Imprint]) -> Iterator[Finding]:
    """Take out snapshots that are among their own parents, by what the imprints say."""
    for number in list(found):
        above, seen = number, set[int]()
        while above in found and above not in seen:
            seen.add(above)
            above = found[above].record.parent
        if above == number:
            path = layers.directory(number)
            del found[number]
            yield Finding(Problem.ORPHANED, f"{path} says that it is its own parent", *put_away(layers, path))


def _put_parents(found: dict[int, Imprint]) -> Iterator[Finding]:
    """Add parents that are missing, and make parents committed that are not."""
    for child in list(found.values()):
        above = child.record.parent
        if not above:
            continue
        if above not in found:
            record = child.record
            lost = Record(f"lost-{above}", Kind.COMMITTED, 0, record.created, record.created, {})
            found[above] = Imprint(lost)
            text = f'the parent of {record.kind} "{record.name}", number {above}, has no directory'
            yield Finding(Problem.DAMAGED, text, "remove what stands on it", f'it is listed as "{lost.name}", which is damaged')
        elif found[above].record.kind is not Kind.COMMITTED:
            record = msgspec.structs.replace(found[above].record, kind=Kind.COMMITTED)
            found[above] = Imprint(record, UNKNOWN_BOOT)
            text = f'number {above} says that it is not committed, but "{child.record.name}" stands on it'
            yield Finding(Problem.UNFLUSHED, text, mended=f'it is committed as "{record.name}", and may be torn')


def _tell_apart(found: dict[int, Imprint]) -> Iterator[Finding]:
    """Give new names to snapshots whose name another one has, too."""
    taken: set[str] = set()
    for number, each in sorted(found.items(), key=lambda item: (item[1].record.updated, item[0]), reverse=True):
        name = each.record.name
        while name in taken:
            name = with_suffix(name, f"~{number}")
        taken.add(name)
        if name != each.record.name:
            found[number] = msgspec.structs.replace(each, record=msgspec.structs.replace(each.record, name=name))
            text = f'another snapshot is called "{each.record.name}" too, and changed later'
            yield Finding(Problem.DAMAGED, text, mended=f'number {number} is called "{name}"')


def _tell_names_apart(found: dict[int, Imprint]) -> Iterator[Finding]:
    """Leave each name in images/ to one snapshot."""
    for number, images in names_told_apart({number: each.record for number, each in found.items()}, 0).items():
        before = found[number].record
        found[number] = msgspec.structs.replace(found[number], record=msgspec.structs.replace(before, images=images))
        text = f'names in images/ of "{before.name}" are another\'s, too, which got them later, or have a number that is'
        yield Finding(Problem.DAMAGED, text, mended=told_of_images(before, images))


def _write(layers: Layers, found: dict[int, Imprint], progress: Progress) -> str:
    """Write the records beside the old ones, then put them in their place; where the old ones are then, "" if there were
    none."""
    old = ""
    place, fresh = layers.records, f"{layers.records}.new"
    _remove(fresh)
    numbers = sorted(found)
    with closing(MetaStore(fresh)) as records:
        for start in range(0, len(numbers), BATCH):
            progress("writing records", start, len(numbers))
            part = {number: found[number] for number in numbers[start : start + BATCH]}
            records.write_now(partial(_put, part))
        nths = [image.number for each in found.values() for image in each.record.images]
        records.write_now(lambda writer: writer.raise_last_id(_last_id(layers, numbers + nths)))
        identity.note(layers, records)
    try:
        if os.path.lexists(place):
            old = layers.move_to_lost_found(place)
        os.rename(fresh, place)
        _remove(fresh)
        for directory in (layers.root, layers.snapshots):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise Unavailable.from_os("put the new records in place", error) from error
    return old


def _bound_old(layers: Layers) -> str:
    """Delete old databases in lost+found but for the first and the last ones, KEPT together; what was done, as the end of a
    sentence."""
    old = [path for path in layers.lost_of(RECORDS).values() if stat.S_ISREG(os.lstat(layers.held_path(path)).st_mode)]
    deleted = []
    for path in old[1 : 1 - KEPT]:
        with contextlib.suppress(OSError):
            os.unlink(layers.held_path(path))
            deleted.append(os.path.basename(path))
    return f"; {', '.join(deleted)} deleted there, between the first and the last {KEPT - 1}" if deleted else ""


def _remove(records: str) -> None:
    """Remove the file ``records`` and the file that is its reserve (``store/space.py``), if they are there."""
    for path in (records, f"{records}-reserve"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _put(part: dict[int, Imprint], writer: Writer) -> None:
    for number, each in part.items():
        writer.put(number, each.record)
        if each.boot:
            writer.mark_unflushed(number, each.boot)


def _last_id(layers: Layers, numbers: list[int]) -> int:
    """The highest id that may ever have been given out."""
    seen = [*numbers, imprint.read_last_reserved_id(layers.snapshots)]
    for directory in (layers.trash.directory, layers.lost_found):
        with contextlib.suppress(FileNotFoundError):
            seen += [number for name in os.listdir(directory) if (number := parse_id(re.split("[-~]", name)[0]))]
    return max(seen)
