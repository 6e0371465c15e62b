"""What may be deleted inside a snapshot, and when that is refused, which takes more than one request to know.

Two things are kept from harm.  ``rm -r`` of a snapshot that has children, is pinned or has a name in images/ is to leave it
whole, though it deletes the entries first.  And mv and file managers, which copy a directory elsewhere and then delete it, copy
links and not files.
"""

from __future__ import annotations

from snapfs import names
from snapfs.errors import HasChildren, NotPermitted
from snapfs.imagenames import named
from snapfs.labels import PIN, pinned
from snapfs.tree.advice import how_to_copy, path_of
from snapfs.tree.attributes import BY_NAME, attributes_of
from snapfs.tree.inodes import LAYER_SLOT, PATCH_SLOT
from snapfs.tree.state import State


def refuse_with_children(state: State, number: int, pid: int) -> None:
    """Raise HasChildren if snapshot ``number`` has any, or Pinned or Named: nothing of it is to be deleted then."""
    with state.reading() as reader:
        child = reader.any_child(number)
        record = reader.record(number)
    if record is not None and (child is not None or PIN in record.labels or record.images):
        state.teardowns.note(pid, number)
        if child is not None:
            raise HasChildren.of(record.name, child[1], child[0])
        raise (
            pinned(record.name, number) if PIN in record.labels else named(record.name, [image.name for image in record.images])
        )


def refuse_teardown(state: State, number: int, pid: int) -> None:
    """Raise HasChildren, Pinned or Named if process ``pid`` was refused an entry of snapshot ``number`` for that, and goes on
    deleting, as ``rm -r`` does.  A label on its own, pin too, can be deleted in any case."""
    if state.teardowns.has(pid, number):
        refuse_with_children(state, number, pid)


def refuse_copied(state: State, number: int, pid: int, name: str = "") -> None:
    """Raise NotPermitted if process ``pid`` has just copied what the directory of snapshot ``number`` shows, or the one entry
    ``name`` without ever having listed the others: it moves that elsewhere, and the files would be lost."""
    record = state.record(number)
    entries = [attribute for attribute in attributes_of(state, record) if attribute.command is None]
    # the one may be empty, as a command's, which tar doesn't read; of the other, which may be refused, not all is read by then
    slots = {attribute.slot for attribute in entries} - {PATCH_SLOT, LAYER_SLOT}
    if state.reads.was_refused(pid, number) or state.reads.has_copied(pid, number, slots):
        state.reads.note_refusal(pid, number)
        raise NotPermitted(
            f"the copy that was just made of {path_of(record)} has links in place of its files, which would be lost: "
            f"{how_to_copy(state, record)}, then rmdir {names.word(path_of(record))}"
        )
    if name in BY_NAME and state.reads.has_copied_one(pid, number, BY_NAME[name].slot):
        raise NotPermitted(f"{path_of(record)}/{name} can't be moved elsewhere: it stays as long as its snapshot")
