"""checkpoint, rollback, fork, of a committed snapshot squash and dissolve, and compare: files into which a caller writes what
is to be done, or told.

Each write is one command, whole or refused, as in sysfs.  Who has the file open for reading too finds there, after the write,
the name of the snapshot that came of it: ``exec 3<>active/web/checkpoint; echo "before the upgrade" >&3; read name <&3``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import unquote

from snapfs import names
from snapfs.errors import InvalidArgument, NotUtf8
from snapfs.model import OWNER, ByNode, Caller, Checkpoint, Kind, rfc3339
from snapfs.store.schema import Record
from snapfs.tree.handles import Handle, Pieces
from snapfs.tree.inodes import CHECKPOINT_SLOT
from snapfs.tree.state import State
from snapfs.tree.texts import OVERHEAD, Text

Command = Callable[[State, ByNode, str, Caller], Awaitable[str | Text]]
"""What a write does: to the snapshot whose directory this is, with what was written, and for whom; the name of what came of
it, or all that reading gives."""

COPY = "copy:"
"""How a message begins of a checkpoint that is a copy, taken while the workspace is in use."""


async def checkpoint(state: State, key: ByNode, text: str, caller: Caller) -> str:
    """Keep the state, with the message ``text``; the name of the checkpoint."""
    copy = text.startswith(COPY)
    message = text.removeprefix(COPY).lstrip() if copy else text
    return (await state.snapshotter.checkpoint(key, message, copy=copy, wait=state.dirsync, caller=caller)).name


async def rollback(state: State, key: ByNode, text: str, caller: Caller) -> str:
    """Go back to the checkpoint with the number or name ``text`` (or its path, committed/NAME), or where that is empty to the
    last; the name of what the workspace stands on, or nothing."""
    return (await state.snapshotter.rollback(key, _named(text, ("committed",)) if text else None)).parent or ""


def _named(text: str, kinds: Collection[str]) -> str | int:
    """The number, or the name, that ``text`` says; a name also as a path: committed/1 is the snapshot with the name 1."""
    path, _, name = text.rpartition("/")
    word = names.decode(name if path in kinds else text)
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 20 and not path else word


async def fork(state: State, key: ByNode, text: str, caller: Caller) -> str:
    """Make a second workspace with the key ``text``; that key."""
    if not text:
        raise InvalidArgument("write the key of the new workspace")
    return (await state.snapshotter.fork(key, names.decode(text), wait=state.dirsync)).name


async def squash(state: State, key: ByNode, text: str, caller: Caller) -> str:
    """Make a snapshot that shows the same and stands on nothing, called ``text``, or where that is empty NAME-squashed; its
    name."""
    return (await state.snapshotter.squash(key, names.decode(text) if text else None, caller=caller)).name


async def dissolve(state: State, key: ByNode, text: str, caller: Caller) -> str:
    """Remove the snapshot, whatever is written, and have those that stand on it take over what it had."""
    await state.snapshotter.dissolve(key, caller=caller)
    return ""


WORDS = {"changes": "content", "patch": "binary"}
"""What can be written to ``compare``, and what may follow that."""


async def compare(state: State, key: ByNode, text: str, caller: Caller) -> Text:
    """What ``changes`` or ``changes.patch`` would say, had the snapshot been made on another one: ``patch NAME``, or the number
    of a checkpoint of the same workspace.  ``changes content NAME`` leaves out what holds what it held, ``patch binary NAME``
    has what is no text.  Behind a tab each come paths (with %0A and the like), of which alone it is said."""
    request, *paths = text.split("\t")
    what, _, name = request.partition(" ")
    if what not in WORDS:
        raise InvalidArgument("write what is asked for, and the name of what this is compared with: patch NAME, changes NAME")
    option, _, rest = name.partition(" ")
    if is_special := option == WORDS[what]:
        name = rest
    to = _named(name, [*Kind]) if name else None
    limits: dict[str, Any] = {
        "against": to if isinstance(to, str) else None,
        "since": to if isinstance(to, int) else None,
        "paths": [unquote(path, errors="surrogateescape") for path in paths],
    }
    if what == "patch":
        return await state.snapshotter.patch(key, state.spool_found, binary=is_special, **limits, caller=caller)
    return await state.snapshotter.changes(key, state.spool_found, content=is_special, **limits, caller=caller)


def compare_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return (
        "Write patch NAME or changes NAME here, and read on behind it: how this snapshot differs from the snapshot NAME, or\n"
        "from the checkpoint with that number: exec 3<>compare; echo patch 1 >&3; cat <&3. Also snapfs diff NAME NAME2.\n"
    )


def checkpoint_list(state: State, number: int, record: Record) -> Text | None:
    """The checkpoints of a workspace as they were found last; None before that."""
    return state.found(number, CHECKPOINT_SLOT)


async def find_checkpoints(state: State, number: int, record: Record, caller: Caller) -> None:
    """Find them: a line each, the newest last; there may be thousands, and long messages."""
    text = await state.snapshotter.list_checkpoints(record.name, _line, state.spool, caller=caller)
    state.keep(number, CHECKPOINT_SLOT, text)


def _line(each: Checkpoint) -> str:
    """Number, name, time, message, bytes and the squash that stands in for it (``.`` for none), between tabs."""
    return (
        f"{each.number}\t{names.encode(each.info.name)}\t{rfc3339(each.info.created)}\t"
        f"{names.printable(each.message)}\t{each.usage.size}\t{names.encode(each.squash) if each.squash else '.'}\n"
    )


def rollback_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return (
        "Write the number or the name of a checkpoint here, and the workspace is as it was then; an empty line is the last,\n"
        "0 what there was before the first. What has changed since is gone.\n"
    )


def fork_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return "Write a key here: a second workspace with that key begins as this one is, on a checkpoint of it.\n"


def squash_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return (
        "Write a name here: a snapshot of that name shows what this one shows, made of hard links, and stands on nothing. An\n"
        "empty line names it as this one, with -squashed behind that.\n"
    )


def dissolve_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return "Write anything here: this snapshot goes, and the committed ones that stand on it take over what it had.\n"


class OpenCommand(Handle):
    """The file ``name`` of a snapshot, ``key``, open for writing: reading on behind what was written gives what came of
    it."""

    direct = True

    def __init__(self, state: State, name: str, key: ByNode, command: Command) -> None:
        self.waits_for = name
        self.does = key, name
        self.caller = OWNER
        self.pid = 0
        """For whom it is done; the process that has opened the file, 0 where that is not known."""
        self._state = state
        self._key = key
        self._command = command
        self._pieces = Pieces()
        self._result = Text(b"")
        self._begin = 0

    @property
    def size(self) -> int:
        return self._result.size

    @property
    def blocks(self) -> bool:
        return self._result.blocks

    def read(self, offset: int, size: int) -> bytes:
        return self._result.read(max(0, offset - self._begin), size)

    async def write(self, offset: int, data: bytes) -> int:
        with self._pieces.one(data):
            try:
                text = data.removesuffix(b"\n").decode()
            except UnicodeDecodeError:
                raise NotUtf8("what is written here must be UTF-8") from None
            self.forget()
            result = await self._command(self._state, self._key, text, self.caller)
        if isinstance(result, str):
            result = Text(f"{names.encode(result) if result else ''}\n".encode())
        self._begin = offset + len(data)
        self._result = result
        self.weight = OVERHEAD + result.weight
        return len(data)

    def forget(self) -> None:
        """There is nothing more to be read."""
        self._result = Text(b"")
        self.weight = OVERHEAD

    async def resize(self, size: int) -> None:
        """A shell empties the file before it writes: nothing happens yet."""
        self._pieces.begin_anew()
