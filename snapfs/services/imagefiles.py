"""image.json of committed snapshots, read and written in threads (``rules/imagefiles.py`` says which there are)."""

from __future__ import annotations

from functools import partial

import trio

from snapfs.errors import Damaged, NotFound, Unavailable
from snapfs.imagejson import FILE, check
from snapfs.model import Info, Ref
from snapfs.options import Sync
from snapfs.root import imagefile
from snapfs.rules import imagefiles
from snapfs.rules.lookup import find, find_id
from snapfs.rules.root import Root
from snapfs.services.locks import Locks
from snapfs.store.metastore import MetaStore
from snapfs.threads import in_thread, in_thread_or_here

THREADS = 2  # each of which may hold a text of 4 MiB a few times


class ImageFiles:
    """Those of one root."""

    def __init__(self, root: Root, records: MetaStore) -> None:
        self._root = root
        self._records = records
        self._changing = Locks()
        self._threads = trio.CapacityLimiter(THREADS)

    async def text(self, key: Ref) -> str | None:
        """The image.json of snapshot ``key``, None where it has none.  Raises NotFound, Damaged, Unavailable."""
        await trio.lowlevel.checkpoint()
        while True:
            with self._records.reading() as reader:
                found = imagefiles.find(reader, *find(reader, key))
            if found is None:
                return None
            try:
                return await in_thread(imagefiles.text, self._root, found, limiter=self._threads)
            except Damaged:
                with self._records.reading() as reader:  # it may have been written anew meanwhile
                    if imagefiles.find(reader, *find(reader, key)) == found:
                        raise

    async def set(self, key: Ref, content: bytes | None) -> Info:
        """Have snapshot ``key`` have this image.json, or (None) none of its own: what Stat shows of it.  Calls for one snapshot
        are done one after the other."""
        if content is not None:
            await in_thread(check, content, limiter=self._threads)
        while True:
            with self._records.reading() as reader:
                number, record = find(reader, key)
                imagefiles.refuse_other_kinds(record)
            try:
                async with self._changing.held(number):
                    return await self._set(number, record.name, content)
            except imagefiles.Outdated:
                pass
            except (NotFound, Damaged):
                with self._records.reading() as reader:
                    if find_id(reader, key) == number:
                        raise

    async def _set(self, number: int, name: str, content: bytes | None) -> Info:
        digest = None
        if content is not None:
            try:
                digest = await in_thread(self._write, number, content, limiter=self._threads)
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
            return imagefile.write(directory, content, sync=self._root.options.sync is Sync.FULL)
