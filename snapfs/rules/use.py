"""Use: whether a snapshot's layer is in a mount, of whatever process and in whatever mount namespace."""

from __future__ import annotations

from snapfs.errors import Busy, Unavailable
from snapfs.model import Kind
from snapfs.root.mounted import Place
from snapfs.rules.root import Root
from snapfs.store.schema import Record


class Used(Busy):
    """The layer of snapshot ``name`` is in use; which process uses it is yet to be found out."""

    def __init__(self, name: str) -> None:
        super().__init__(f'snapshot "{name}" is in use')
        self.name = name


def refuse_used(root: Root, number: int, record: Record, *, free: bool) -> None:
    """Raise Used if an active snapshot can be written through a mount, or a committed one's files are in one, anywhere.

    ``free``: the kernel has said that no overlay has it.  Called in the writer's thread, so that snapfs itself mounts nothing
    meanwhile.  Raises Unavailable where the kernel doesn't tell.
    """
    if record.kind is Kind.VIEW:
        return
    try:
        if record.kind is Kind.COMMITTED:
            used = root.mounted.is_lower(number) or bool(root.mounted.everywhere(lambda place: place.bound == number))
        else:
            used = _is_written(root, number, free)
    except OSError as error:
        raise Unavailable.from_os(f'find out whether snapshot "{record.name}" is in use', error) from error
    if used:
        raise Used(record.name)


def _is_written(root: Root, number: int, free: bool) -> bool:
    """Whether any process can write the layer of the active snapshot ``number`` through a mount.  Raises OSError."""
    mounted = root.mounted

    def may_show_it(place: Place) -> bool:
        return place.bound == number or (bool(place.upperdir) and place.upper in (None, number))

    # a bind in a namespace that is unread is as one that a descriptor holds: it can't be found out
    found, whole = mounted.scan(may_show_it)
    if any(place.writable for place in found if place.bound is not None):
        return True
    suspected = not whole or any(place.upperdir for place in found)
    if not free and root.in_use.has_overlay(number, suspected=suspected):
        return True
    named = [place for place in found if place.upper == number]  # a second overlay bears no mark
    if not named:
        return False
    return any(mounted.is_of(place, number, pid) for pid, place in mounted.by_process(may_show_it))
