"""Squashing: many layers become one, in worker threads, while calls go on.

The files are linked into a directory of the pool, and flushed; then one operation makes that a snapshot's.  What was built in
vain goes to the trash; what a killed process leaves, the next start throws away with the rest of the pool.

A workspace that stands on many layers is made to stand on one in the background, after the checkpoint that was one too many:
whoever asked for that waits for nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial

import trio

from snapfs.errors import Closed, Damaged, NotFound, SnapshotError, TryAgain, Unavailable
from snapfs.kernel import subids
from snapfs.model import BACKGROUND, ByNode, Caller, Info, Ref
from snapfs.root import imagefile
from snapfs.root.layers import Layers
from snapfs.rules import dissolve, imagefiles, squash
from snapfs.rules.change import take_id
from snapfs.rules.dissolve import Plan
from snapfs.rules.lookup import refuse_taken
from snapfs.rules.root import Root
from snapfs.rules.squash import Made, Outdated, Source
from snapfs.scan.sharing import Checkpoint, Sharing, Turns
from snapfs.scan.squashing import squash as link_all
from snapfs.services.flushing import Flushing
from snapfs.store.metastore import MetaStore
from snapfs.threads import at_last, in_thread, in_thread_or_here

log = logging.getLogger(__name__)

TRIES = 20  # to dissolve a snapshot while others make and remove what stands on it


class Squashing:
    """The squashes of one root.  ``run`` must be running.

    ``usage`` counts what a snapshot takes, ``counted`` has a new one be counted soon, and ``discarded`` is called when
    something has come into the trash.  ``depth``: on so many layers a workspace does not stand for long; 0: on any number."""

    def __init__(
        self,
        root: Root,
        records: MetaStore,
        flushing: Flushing,
        *,
        depth: int,
        usage: Callable[[int], Awaitable[object]],
        counted: Callable[[int], None],
        discarded: Callable[[], None],
    ) -> None:
        self._root = root
        self._layers = root.layers
        self._records = records
        self._flushing = flushing
        self._depth = depth
        self._usage = usage
        self._counted = counted
        self._discarded = discarded
        self._builds: Sharing[None] = Sharing(Turns(2))  # disks gain little from more
        self._waiting: dict[str, int] = {}
        self._wakeup = trio.Event()
        self._told: set[str] = set()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Do what is asked for until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._builds.serve, name="snapfs builds")
            task_status.started()
            while True:
                await self._wakeup.wait()
                self._wakeup = trio.Event()
                while self._waiting:
                    await self._shorten(self._waiting.pop(next(iter(self._waiting))))

    # -- squash

    async def squash(self, key: Ref, new: str | None, caller: Caller, *, for_children: bool = False) -> Info:
        """Make the committed snapshot ``new``, which shows what ``key`` shows (``rules/squash.py``): what Stat shows of it.

        Nothing of it is seen before its files are on disk.  Raises as ``squash.source`` and ``squash.squash`` do; Unavailable
        where the disk refuses, FailedPrecondition where a layer has what can't be squashed, TryAgain where ``caller`` would
        wait for others."""
        while True:
            with self._records.reading() as reader:
                source = squash.source(self._root, reader, key)
                if new is not None:
                    refuse_taken(reader, new)
            key = source.node
            with suppress(Outdated):
                async with self._built(source, caller, lowest=True, image=True) as made:
                    operation = partial(squash.squash, self._root, source=source, made=made, new=new, for_children=for_children)
                    info = await self._records.write(lambda writer: operation(writer=writer))  # noqa: B023
                self._counted(info.id)
                return info
            with self._records.reading() as reader:
                if for_children and not squash.is_wanted(reader, source.number):
                    raise NotFound(f'nothing stands on snapshot "{source.name}" any more')

    def shorten_soon(self, workspace: str, number: int) -> bool:
        """The workspace called so stands on the committed snapshot ``number`` now: have it stand on one layer, if these are
        too many; whether that is so."""
        with suppress(SnapshotError):
            if self._is_deep(number):
                self._waiting[workspace] = number
                self._wakeup.set()
                return True
        return False

    def _is_deep(self, number: int) -> bool:
        with self._records.reading() as reader:
            record = reader.record(number)
            return bool(self._depth) and record is not None and len(reader.chain(record)) + 1 >= self._depth

    async def _shorten(self, number: int) -> None:
        try:
            if self._is_deep(number):  # it may have been shortened by now
                what = f"the squash of snapshot {number}"
                await at_last(what, lambda: self.squash(number, None, BACKGROUND, for_children=True))
        except (Closed, NotFound):
            pass
        except SnapshotError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                log.warning("a workspace stands on many layers, which can't be made one: %s", error)

    # -- dissolve

    async def dissolve(
        self, key: Ref, caller: Caller, unmounted: Callable[[Iterable[int]], AbstractAsyncContextManager[set[int]]]
    ) -> list[int]:
        """Remove the committed snapshot ``key``, which those that stand on it take over (``rules/dissolve.py``): the ids that
        these have now.

        ``unmounted`` is for a block in which none of the snapshots with these ids is mounted as rootfs; it gives those that
        were, and that no process has.  Raises as the functions of ``rules/dissolve.py`` and ``unmounted`` do, and as
        ``squash``; and TryAgain where what stands on it changes all the time."""
        built: dict[tuple[int, int, bool], Made] = {}  # what is built for a child, of which layers
        async with AsyncExitStack() as builds:
            for _ in range(TRIES):
                plan = await in_thread(self._plan, key)
                key, lowest = plan.node, not plan.parent
                with suppress(Outdated):
                    for child in plan.children:
                        if (child, plan.number, lowest) not in built:
                            both = Source(child, plan.name, ByNode(0), [plan.number])
                            made = await builds.enter_async_context(self._built(both, caller, lowest=lowest))
                            built[child, plan.number, lowest] = made
                    for_each = {child: built[child, plan.number, lowest] for child in plan.children}
                    operation = partial(dissolve.dissolve, self._root, planned=plan, made=for_each)
                    async with unmounted(sorted((plan.number, *plan.above))) as free:
                        await in_thread(self._refuse_used, plan, free)
                        return await self._records.write(lambda writer: operation(writer=writer), frees=True)  # noqa: B023
            raise TryAgain(f'what stands on snapshot "{plan.name}" changes all the time')

    def _plan(self, key: Ref) -> Plan:
        with self._records.reading(long=True) as reader:
            return dissolve.plan(self._root, reader, key)

    def _refuse_used(self, plan: Plan, free: Collection[int]) -> None:
        with self._records.reading(long=True) as reader:
            dissolve.refuse_used(self._root, reader, plan, free)

    # -- building

    @asynccontextmanager
    async def _built(self, source: Source, caller: Caller, *, lowest: bool, image: bool = False) -> AsyncIterator[Made]:
        """For a block that may make a snapshot of all layers of ``source``, which are one, and on disk; ``lowest`` as in
        ``scan/squashing.py``.  ``image``: beside it is the image.json of the source, or from which the source inherits.

        Raises Outdated where one of them was removed meanwhile; else as ``squash``."""
        build = _Build(self._layers, partial(self._link, source, lowest=lowest, image=image), self._discarded)
        failed = self._flushing.failed
        try:
            for number in source.layers:  # once they are linked, their files are shared
                with suppress(SnapshotError):
                    await self._usage(number)
            try:
                await self._builds.run(f"squash of snapshot {source.number}", build.run, caller, also=build)
                await self._flushing.flush()
            except (Damaged, OSError) as error:
                with self._records.reading() as reader:
                    if any(reader.record(number) is None for number in source.layers):
                        raise Outdated(f'snapshot "{source.name}" has changed meanwhile') from None
                if isinstance(error, Damaged):
                    raise
                raise Unavailable.from_os(f'squash snapshot "{source.name}"', error, subids.hint(error)) from error
            if self._flushing.failed != failed:  # another flush was told what the disk refused
                raise Unavailable(f'cannot squash snapshot "{source.name}": the disk failed meanwhile', errno.EIO)
            yield Made(await self._records.write(partial(take_id, self._root)), build.name)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread_or_here(build.drop)

    def _link(self, source: Source, target: str, checkpoint: Checkpoint, *, lowest: bool, image: bool) -> None:
        for number in source.layers:
            self._layers.refuse_damaged(number)
        layers = [f"{self._layers.held_directory(number)}/fs" for number in source.layers]
        link_all(layers, target, prefix=self._root.overlay_prefix, lowest=lowest, checkpoint=checkpoint)
        if image:
            self._link_image(source, os.path.dirname(target))

    def _link_image(self, source: Source, target: str) -> None:
        """Have the directory ``target`` have that file; the rule sees whether it is still the one."""
        found = self._image_of(source)
        if found is None:
            return
        try:
            imagefile.link(self._layers.held_directory(found.number), found.image.digest, target)
        except FileNotFoundError:
            if self._image_of(source) == found:
                raise Damaged(f'the image.json of snapshot "{source.name}" is missing: write it anew') from None

    def _image_of(self, source: Source) -> imagefiles.Found | None:
        with self._records.reading() as reader:
            record = reader.record(source.number)
            return imagefiles.find(reader, source.number, record) if record is not None else None


class _Build:
    """A directory of the pool, which ``work`` fills, until it is a snapshot's or in the trash, of which ``discarded`` is told.
    It may be dropped while its thread is still at work."""

    def __init__(self, layers: Layers, work: Callable[[str, Checkpoint], None], discarded: Callable[[], None]) -> None:
        self.name = ""
        self._layers = layers
        self._work = work
        self._discarded = discarded
        self._loop = trio.lowlevel.current_trio_token()
        self._dropping = threading.Lock()
        self._dropped = False

    def run(self, checkpoint: Checkpoint) -> None:
        """Fill it; for a worker thread.  Raises OSError, and what ``work`` raises."""
        name = self._layers.make_ahead()
        try:
            with self._layers.naming:
                self._work(self._layers.made_path(name), checkpoint)
        except BaseException:
            self._discard(name)
            raise
        with self._dropping:
            self.name, dropped = name, self._dropped
        if dropped:
            self._discard(name)

    def drop(self) -> None:
        """Discard it, unless it is a snapshot's by now."""
        with self._dropping:
            self._dropped = True
        if self.name:
            self._discard(self.name)

    def _discard(self, name: str) -> None:
        self._layers.discard_made(name)
        with suppress(trio.RunFinishedError):
            self._loop.run_sync_soon(self._discarded)
