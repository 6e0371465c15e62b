"""checkpoint, rollback, fork: the files of a workspace into which a caller writes what is to be done.

Each write is one command, whole or refused, as in sysfs.  Who has the file open for reading too finds there, after the write,
the name of the snapshot that came of it: ``exec 3<>active/web/checkpoint; echo "before the upgrade" >&3; read name <&3``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from snapfs import names
from snapfs.errors import InvalidArgument, NotUtf8
from snapfs.model import ByNode, Caller, rfc3339
from snapfs.store.schema import Record
from snapfs.threads import in_thread
from snapfs.tree.handles import Handle
from snapfs.tree.inodes import CHECKPOINT_SLOT
from snapfs.tree.state import State
from snapfs.tree.texts import Text

Command = Callable[[State, ByNode, str], Awaitable[str]]
"""What a write does: to the workspace whose directory this is, with what was written; the name of what came of it."""


async def checkpoint(state: State, key: ByNode, text: str) -> str:
    """Keep the state, with the message ``text``; the name of the checkpoint."""
    return (await state.snapshotter.checkpoint(key, text, wait=state.dirsync)).name


async def rollback(state: State, key: ByNode, text: str) -> str:
    """Go back to the checkpoint with the number or name ``text`` (or its path, committed/NAME), or where that is empty to the
    last; the name of what the workspace stands on, or nothing."""
    path, _, name = text.rpartition("/")  # committed/1 is the snapshot with the name 1
    word = names.decode(name if path == "committed" else text) if text else ""
    to = int(word) if word.isascii() and word.isdecimal() and len(word) < 20 and not path else word or None
    return (await state.snapshotter.rollback(key, to)).parent or ""


async def fork(state: State, key: ByNode, text: str) -> str:
    """Make a second workspace with the key ``text``; that key."""
    if not text:
        raise InvalidArgument("write the key of the new workspace")
    return (await state.snapshotter.fork(key, names.decode(text), wait=state.dirsync)).name


def checkpoint_list(state: State, number: int, record: Record) -> Text | None:
    """The checkpoints of a workspace as they were found last; None before that."""
    return state.found(number, CHECKPOINT_SLOT)


async def find_checkpoints(state: State, number: int, record: Record, caller: Caller) -> None:
    """Find them, in a thread, for there may be thousands: a line each, with number, name, time, message and bytes between tabs,
    the newest last."""
    state.keep(number, CHECKPOINT_SLOT, await in_thread(_collected, state, record.name))


def _collected(state: State, key: str) -> Text:
    with state.snapshotter.reading(long=True) as reader:
        found = state.snapshotter.checkpoints_of(reader, key)
    lines = (
        f"{each.number}\t{names.encode(each.info.name)}\t{rfc3339(each.info.created)}\t"
        f"{names.printable(each.message)}\t{each.usage.size}\n"
        for each in found
    )
    return Text("".join(lines).encode())


def rollback_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return (
        "Write the number or the name of a checkpoint here, and the workspace is as it was then; an empty line is the last,\n"
        "0 what there was before the first. What has changed since is gone.\n"
    )


def fork_text(state: State, number: int, record: Record) -> str:
    """What the file says."""
    return "Write a key here: a second workspace with that key begins as this one is, on a checkpoint of it.\n"


class OpenCommand(Handle):
    """The file ``name`` of a workspace, ``key``, open for writing: reading on behind what was written gives what came of
    it."""

    direct = True

    def __init__(self, state: State, name: str, key: ByNode, command: Command) -> None:
        self.waits_for = name
        self._state = state
        self._key = key
        self._command = command
        self._result = b""
        self._begin = 0

    @property
    def size(self) -> int:
        return len(self._result)

    def read(self, offset: int, size: int) -> bytes:
        offset = max(0, offset - self._begin)
        return self._result[offset : offset + size]

    async def write(self, offset: int, data: bytes) -> int:
        try:
            text = data.removesuffix(b"\n").decode()
        except UnicodeDecodeError:
            raise NotUtf8("what is written here must be UTF-8") from None
        name = await self._command(self._state, self._key, text)
        self._begin = offset + len(data)
        self._result = f"{names.encode(name) if name else ''}\n".encode()
        return len(data)

    async def resize(self, size: int) -> None:
        """A shell empties the file before it writes: nothing happens yet."""
