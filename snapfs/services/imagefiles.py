"""image.json of committed snapshots, read and written in threads (``rules/imagefiles.py`` says which there are)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import trio

from snapfs.errors import Damaged, NotFound, Unavailable
from snapfs.imagejson import FILE, check
from snapfs.model import Caller, Info, Ref
from snapfs.root import imagefile
from snapfs.rules import imagefiles
from snapfs.rules.lookup import find, find_id
from snapfs.rules.root import Root
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.services.locks import Locks
from snapfs.store.metastore import MetaStore
from snapfs.threads import in_thread_or_here

T = TypeVar("T")


class ImageFiles:
    """Those of one root.  ``serve`` must be running."""

    def __init__(self, root: Root, records: MetaStore) -> None:
        self._root = root
        self._records = records
        self._changing = Locks()
        self._work: Sharing[Any] = Sharing(Turns(2))  # each thread may hold a text of 4 MiB a few times

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Read and write until cancelled."""
        await self._work.serve(task_status)

    async def text(self, key: Ref, consume: Callable[[str], T], caller: Caller) -> T | None:
        """What ``consume`` makes, in a thread, of the image.json of snapshot ``key``, for ``caller``; None where it has none.
        Calls at the same time for one text, with the same ``consume``, share what that gives.  Raises NotFound, Damaged,
        Unavailable, and TryAgain where the caller would wait for others."""
        await trio.lowlevel.checkpoint()
        while True:
            with self._records.reading() as reader:
                found = imagefiles.find(reader, *find(reader, key))
            if found is None:
                return None

            def read(checkpoint: Checkpoint, found: imagefiles.Found = found) -> T:
                return consume(imagefiles.text(self._root, found))

            try:
                words = f"reading of {FILE} of snapshot {found.number}"
                result: T = await self._work.run(words, read, caller, also=(found, consume), settled=True)
                return result
            except Damaged:
                with self._records.reading() as reader:  # it may have been written anew meanwhile
                    if imagefiles.find(reader, *find(reader, key)) == found:
                        raise

    async def set(self, key: Ref, content: bytes | None, caller: Caller) -> Info:
        """Have snapshot ``key`` have this image.json, or (None) none of its own: what Stat shows of it.  Calls for one snapshot
        are done one after the other.  Raises TryAgain where ``caller`` would wait for others."""
        if content is not None:
            await self._in_turn(f"check of {FILE}", partial(check, content), caller)
        while True:
            with self._records.reading() as reader:
                number, record = find(reader, key)
                imagefiles.refuse_other_kinds(record)
            try:
                async with self._changing.held(number, caller.patience):
                    return await self._set(number, record.name, content, caller)
            except imagefiles.Outdated:
                pass
            except (NotFound, Damaged):
                with self._records.reading() as reader:
                    if find_id(reader, key) == number:
                        raise

    async def _in_turn(self, words: str, work: Callable[[], T], caller: Caller) -> T:
        """What ``work`` gives, which no other call shares."""
        alone: Hashable = object()
        result: T = await self._work.run(words, lambda checkpoint: work(), caller, also=alone)
        return result

    async def _set(self, number: int, name: str, content: bytes | None, caller: Caller) -> Info:
        digest = None
        if content is not None:
            try:
                digest = await self._in_turn(f"writing of {FILE}", partial(self._write, number, content), caller)
            except OSError as error:
                with self._records.reading() as reader:  # it may have been removed meanwhile
                    find(reader, number)
                raise Unavailable.from_os(f'write {FILE} of snapshot "{name}"', error) from error
        rule = partial(imagefiles.set_image, self._root, number=number, digest=digest)
        info = await self._records.write(lambda writer: rule(writer=writer), frees=content is None)
        with trio.CancelScope(shield=True):  # a file that a failing disk may still need stays
            await in_thread_or_here(imagefile.remove_others, self._root.layers.held_directory(number), digest)
        return info

    def _write(self, number: int, content: bytes) -> str:
        self._root.layers.refuse_damaged(number)
        directory = self._root.layers.held_directory(number)
        with self._root.layers.naming:
            return imagefile.write(directory, content, sync=self._root.options.flushes)
