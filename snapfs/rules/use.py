"""Use: whether a snapshot's layer is in a mount, of whatever process and in whatever mount namespace."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from snapfs.errors import Busy, Unavailable
from snapfs.model import Kind
from snapfs.root.inuse import Free
from snapfs.root.mounted import Place
from snapfs.rules.root import Root
from snapfs.store.reading import Reader
from snapfs.store.schema import Record


class Used(Busy):
    """The layer of snapshot ``name`` is in use; which process uses it is yet to be found out."""

    def __init__(self, name: str) -> None:
        super().__init__(f'snapshot "{name}" is in use')
        self.name = name


def refuse_used(root: Root, number: int, record: Record, *, free: Free) -> None:
    """Raise Used if an active snapshot can be written through a mount, or a committed one's files are in one, anywhere.

    ``free`` is what the unmount of its file system has shown: what was found out then is not asked again.  Called where snapfs
    itself mounts nothing meanwhile: in the writer's thread, or while the rootfs is kept unmounted.  Raises Unavailable where
    the kernel doesn't tell.
    """
    if free is Free.OF_MOUNTS and record.kind is Kind.ACTIVE:
        return
    refuse_any_used(root, {number: record}, [number] if free else ())


def refuse_any_used(root: Root, records: Mapping[int, Record], free: Collection[int]) -> None:
    """The same of many, with one look at all mounts; no overlay has those that are ``free``.  Blocks for as long as the kernel
    is asked of each other active one that was ever mounted, some tenths of a millisecond."""
    records = {number: record for number, record in records.items() if record.kind is not Kind.VIEW}
    if not records:
        return
    name, committed = "", [number for number, record in records.items() if record.kind is Kind.COMMITTED]

    def may_show(place: Place) -> bool:
        return (
            place.bound in records
            or (bool(place.upperdir) and (place.upper is None or place.upper in records))
            or any(place.may_stand_on(number) for number in committed)
        )

    def names_no_layer(place: Place) -> bool:  # as all overlays of other programs: a machine may have hundreds
        return bool(place.upperdir) and place.upper is None

    try:
        found, whole = root.mounted.scan(may_show, settled=names_no_layer)
        for number, record in records.items():
            name = record.name
            if record.kind is Kind.COMMITTED:
                places = [place for place in found if place.bound == number or place.may_stand_on(number)]
                used = any(place.bound == number or _is_real(root, place) for place in places)
            else:
                used = _is_written(root, number, found, whole, number in free)
            if used:
                raise Used(name)
    except OSError as error:
        raise Unavailable.from_os(f'find out whether snapshot "{name}" is in use', error) from error


def refuse_below_active(root: Root, reader: Reader, number: int, name: str) -> None:
    """Raise Used if snapshot ``number``, called ``name``, is a lower layer of an active one, as that is mounted here."""
    for upper in root.mounted.uppers_on(number):
        record = reader.record(upper)
        if record is not None and record.kind is Kind.ACTIVE:
            raise Used(name)


def _is_real(root: Root, place: Place) -> bool:
    """Whether the overlay at ``place`` has the layers that its options name, as far as another user can't have forged these."""
    return not place.foreign or (place.upper is not None and root.in_use.has_overlay(place.upper, suspected=True))


def _is_written(root: Root, number: int, found: Sequence[Place], whole: bool, free: bool) -> bool:
    """Whether any process can write the layer of the active snapshot ``number`` through a mount; ``found`` are mounts that may
    show it, all of them if ``whole``.  Raises OSError."""

    def may_show_it(place: Place) -> bool:
        return place.bound == number or (bool(place.upperdir) and place.upper in (None, number))

    # a bind in a namespace that is unread is as one that a descriptor holds: it can't be found out
    found = list(filter(may_show_it, found))
    if any(place.writable for place in found if place.bound is not None):
        return True
    suspected = not whole or any(place.upperdir for place in found)
    if not free and root.in_use.has_overlay(number, suspected=suspected):
        return True
    named = [place for place in found if place.upper == number]  # a second overlay bears no mark
    if not named:
        return False
    return any(root.mounted.is_of(place, number, pid) for pid, place in root.mounted.by_process(may_show_it))
