"""FUSE requests -> the tree: inode to node, bytes to names, errors to errno.  Nothing else is decided here."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from itertools import count
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from snapfs import names
from snapfs.errors import InvalidArgument, LeftOut, NameTooLong, NotFound, NotPermitted, NotUtf8, SnapshotError, Stale
from snapfs.fuse.access import Access
from snapfs.fuse.cache import TIMEOUT, KernelCache
from snapfs.fuse.errno import errno_of
from snapfs.tree import Handle, Node, Tree
from snapfs.tree.attributes import BY_SLOT, AttributeFile
from snapfs.tree.kinds import KindDirectory
from snapfs.tree.labels import Label, OpenLabel
from snapfs.tree.log import OpenLog
from snapfs.tree.node import KIND_SLOTS, File, Slot, pack, unpack
from snapfs.tree.snapshot import SnapshotDirectory
from snapfs.tree.tree import ROOT_INODE

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K")
V = TypeVar("V")

RETRY = 10.0  # seconds within which who was told to look a file up again has done so

_ALWAYS_READY = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM  # as poll(2) says of any regular file

_DOTS = 2  # the first two entries of every directory, before the tree's own

_READING = frozenset(("lookup", "getattr", "readlink", "open", "opendir", "readdir"))
"""Requests that merely ask: that something isn't there is an answer, not an error to log."""


def answering(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Turn every error of ``handler`` into an errno and a line in error_log; any other exception would end the mount."""

    async def answer(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        began, number = time.perf_counter(), 0
        try:
            for emptied_number, emptied in list(self._emptying):
                if isinstance(args[0], int) and unpack(args[0])[0] == emptied_number:
                    await emptied.wait()
            return await handler(self, *args, **kwargs)
        except SnapshotError as error:
            number = errno_of(error)
            answer_enough = number == errno.ENOENT and handler.__name__ in _READING and not isinstance(error, LeftOut)
            if not answer_enough and not isinstance(error, Stale):
                self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        except FUSEError as error:
            number = error.errno
            raise
        except OSError as error:
            number = error.errno or errno.EIO
            self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        except Exception as error:
            number = errno.EIO
            log.exception("a bug: %s failed", handler.__name__)
            self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        finally:
            took = time.perf_counter() - began
            self.tree.meters[handler.__name__].note(took, errno.errorcode.get(number, str(number)) if number else None)

    functools.update_wrapper(answer, handler)
    return answer


class Told(Generic[K, V]):
    """What was found for those who were told to look a name up again, until they have, or too long ago (RETRY)."""

    def __init__(self) -> None:
        self._told: dict[K, tuple[V, float]] = {}

    def tell(self, who: K, what: V) -> None:
        now = trio.current_time()
        for other in [other for other, (_, when) in self._told.items() if when < now - RETRY]:
            del self._told[other]  # it never came back
        self._told[who] = what, now

    def get(self, who: K) -> V | None:
        what, when = self._told.get(who, (None, 0.0))
        return what if when > trio.current_time() - RETRY else None

    def pop(self, who: K) -> V | None:
        what = self.get(who)
        self._told.pop(who, None)
        return what


class OpenFile:
    """One open file, with what stat(2) said of it then.  ``strange``: its text is not that of its inode."""

    def __init__(self, inode: int, path: str, handle: Handle, entry: EntryAttributes, strange: bool) -> None:
        self.inode = inode
        self.path = path
        self.handle = handle
        self.entry = entry
        self.strange = strange


class Operations(pyfuse3.Operations):
    """One mount of one tree.  A file's handle is a number for an open file; a directory's handle is its inode."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: Tree, rights: Access, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.tree = tree
        self.rights = rights
        self.cache = KernelCache()
        self._on_ready = on_ready
        self._open: dict[int, OpenFile] = {}  # by handle
        self._open_inodes: dict[int, list[OpenFile]] = {}
        self._emptying: list[tuple[int, trio.Event]] = []  # snapshots with a label that was closed empty, until it is deleted
        self._writers: Told[tuple[int, str], int] = Told()  # inodes for writers of labels, by process and label
        self._refreshed: Told[tuple[int, int], Node] = Told()  # files with another text than was looked up, by process, slot
        self._handles = count(1)
        tree.snapshotter.subscribe(self.cache.note)

    def init(self) -> None:
        self._on_ready()

    # -- translation

    def entry(self, node: Node) -> EntryAttributes:
        """What the kernel wants to know of ``node``, and for how long it may believe it."""
        return self._describe(EntryAttributes(), node)

    def _describe(self, entry: EntryAttributes, node: Node) -> EntryAttributes:
        """The same in ``entry``, which may have served for another."""
        found = node.attributes()
        inode, time = node.inode, found.time
        entry.st_ino = inode
        entry.generation = self.tree.generations.get(inode, 0)
        entry.st_mode = self.rights.mode(found)
        entry.st_uid, entry.st_gid = self.rights.owner(found)
        entry.st_size = found.size
        entry.st_blocks = found.blocks
        if entry.st_mtime_ns != time:
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time
        entry.entry_timeout = TIMEOUT if node.keep_entry else 0
        # the kernel takes the number that stat(2) shows from here too, unless it asks once more (``getattr``)
        entry.attr_timeout = TIMEOUT if found.keep and inode == node.shown_inode else 0
        return entry

    def log_refusal(self, number: int, operation: str, args: tuple[object, ...], error: Exception) -> None:
        """One line in error_log for a request with these arguments, and in the owner's log, where what is not for all who may
        read the former is a warning."""
        name, where, words = errno.errorcode.get(number, str(number)), self._where(operation, args), self.rights.words(error)
        hidden = isinstance(error, SnapshotError | OSError) and words != str(error)
        fields = {"ERRNO": number, "SNAPFS_ERROR": name, "SNAPFS_OPERATION": operation, "SNAPFS_PATH": where}
        level = logging.WARNING if hidden else logging.INFO
        log.log(level, "%s %s %s: %s", name, operation, where, error, extra={"fields": fields})
        self.tree.error_log.note(name, operation, where, words)

    def _where(self, operation: str, args: tuple[object, ...]) -> str:
        """The paths that a request is about; told by the types of its arguments: inode, name, inode, name …"""
        if operation in ("read", "write", "release", "fsync"):
            return self._open[args[0]].path if args[0] in self._open else str(args[0])
        paths: list[str] = []
        for arg in args:
            if isinstance(arg, int) and len(paths) < (2 if operation in ("rename", "link") else 1):
                try:
                    paths.append(self.tree.node(arg).path)
                except SnapshotError:
                    paths.append(f"inode {arg}")
            elif isinstance(arg, bytes) and paths:
                paths[-1] = f"{paths[-1]}/{arg.decode(errors='surrogateescape')}".lstrip("/")
                if operation not in ("rename", "link"):
                    break
        return " ".join(paths) or "/"

    # -- names and attributes

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        directory = self.tree.node(parent_inode)
        if len(name) > names.NAME_MAX:  # the kernel asks this first, whatever is to be done with the name
            raise NameTooLong(f"the name is longer than {names.NAME_MAX} bytes")
        try:
            node = directory.lookup(name.decode())
            if isinstance(node, Label) and self._writers.get(_writer(node, ctx.pid)) is not None:
                node = self.tree.node(self._inode_for_writing(node, ctx.pid))
            return self.entry(node)
        except LeftOut:
            raise
        except (NotFound, UnicodeDecodeError):
            raise FUSEError(errno.ENOENT) from None  # never cached: names may appear by what happens elsewhere

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        opened = self._open_inodes.get(inode, ())
        for file in opened:
            if file.strange:
                return file.entry
        try:
            node = self.tree.node(inode)
        except (NotFound, Stale) as error:
            if opened:
                return opened[0].entry  # removed, or of another text, while somebody reads it
            if isinstance(error, NotFound):
                raise
            node = self.tree.now(inode)  # of another text, while somebody holds it with O_PATH
        if node.must_settle():
            await node.settle()
        entry = self.entry(node)
        entry.st_ino = node.shown_inode
        return entry

    @answering
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self.tree.node(inode)
        now = self.entry(node)
        now.st_ino = node.shown_inode
        if fields.update_size:
            if fh is not None and fh in self._open:
                await self._open[fh].handle.resize(attr.st_size)
            else:
                if isinstance(node, Label):
                    self._give_writer(node, ctx.pid)
                await node.resize(attr.st_size)
            if isinstance(node, Label):
                now.st_size = attr.st_size  # whatever became of it: a label that was cut to nothing is gone
            return now
        same = (
            (not fields.update_mode or attr.st_mode & 0o7777 == now.st_mode & 0o7777)
            and (not fields.update_uid or attr.st_uid == now.st_uid)
            and (not fields.update_gid or attr.st_gid == now.st_gid)
        )
        # editors set the mode and owner of what they have just made: where that changes nothing it is fine
        if not isinstance(node, Label) or not same or fields.update_atime or fields.update_mtime:
            hint = f"; {node.instead()}" if isinstance(node, SnapshotDirectory) else ""
            raise NotPermitted(f"the mode, owner and times of {node.path or '/'} can't be set{hint}")
        return now

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = self.tree.node(inode)
        self._note_read(inode, ctx.pid)
        # a file system for who can't get there would only push out another
        target = await node.follow(ctx.pid) if self.rights.may_enter_root(ctx.uid) else node.target()
        return target.encode(errors="surrogateescape")

    # -- changing

    @answering
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        node = await self.tree.node(parent_inode).mkdir(_text(name))
        entry = self.entry(node)
        if self.tree.node(parent_inode).inode not in _ROOT_DIRECTORIES:
            # The next look-up is to find the link to it.  Until then the kernel has an inode of its own there: one that stands
            # in two directories it moves from name to name, which it can't (ESTALE) while a rename looks it up.
            entry.entry_timeout = 0
            entry.st_ino = pack(unpack(node.inode)[0], Slot.JUST_MADE)
        return entry

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        with self.cache.asked_for(parent_inode, _text(name)):
            await self.tree.node(parent_inode).rmdir(_text(name), ctx.pid)

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self.tree.node(parent_inode).unlink(_text(name), ctx.pid)

    @answering
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise InvalidArgument("names can't be exchanged, and no other special kind of rename is known")
        old, new, source = _text(name_old), _text(name_new), self.tree.node(parent_inode_old)
        listed = pack(0, KIND_SLOTS[source.kind]) if isinstance(source, KindDirectory) else parent_inode_old
        held = listed in (parent_inode_old, parent_inode_new)
        with self.cache.asked_for(listed, old) if held else contextlib.nullcontext():
            target, replace = self.tree.node(parent_inode_new), not flags & pyfuse3.RENAME_NOREPLACE
            await self.tree.rename(source, old, target, new, replace=replace)
        stale = None
        if listed != parent_inode_old and held:
            stale = listed, old  # the kernel has moved a link; the directory that it leads to it still has under the old name
        elif parent_inode_new not in _ROOT_DIRECTORIES:
            stale = parent_inode_new, new  # the kernel now has the snapshot's directory where there is a link to it
        if stale is not None:
            # it is made to forget that in the loop's next round; the answer to this request is sent in this one
            trio.lowlevel.current_trio_token().run_sync_soon(self.cache.forget_name, *stale)

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node, handle = await self.tree.node(parent_inode).create(_text(name))
        return self._opened(node.inode, node, handle), self.entry(node)

    @answering
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise self.tree.node(parent_inode).refusal_to_make("a special file")

    @answering
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        raise self.tree.node(parent_inode).refusal_to_make("a link")

    @answering
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise self.tree.node(new_parent_inode).refusal_to_make("a link")

    # -- files

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        self._note_read(inode, ctx.pid)
        writing, truncate = flags & os.O_ACCMODE != os.O_RDONLY, bool(flags & os.O_TRUNC)
        reading = not writing and not truncate
        node = await self._refreshed_node(inode, ctx.pid) if reading else self.tree.node(inode)
        if isinstance(node, Label) and not reading:
            self._give_writer(node, ctx.pid)
        handle = await node.open(writing, truncate)
        if isinstance(handle, OpenLabel):
            handle.appends = bool(flags & os.O_APPEND)
        return self._opened(inode, node, handle)

    def _note_read(self, inode: int, pid: int) -> None:
        """Process ``pid`` opens, follows or lists what has ``inode``."""
        number, slot = unpack(inode)
        slot = slot & 0x7F if slot & Slot.VERSION_OF else slot & ~Slot.INSIDE
        if number and (slot in BY_SLOT or slot == Slot.SNAPSHOT):
            self.tree.reads.note(pid, number, slot)

    def _give_writer(self, node: Label, pid: int) -> None:
        """Let a writer have an inode of its own: raises Stale the first time, on which the kernel looks the name up again.

        Processes in pid namespaces that can't be seen from here all have the pid 0: they share one inode, which stays theirs.
        """
        if node.text is None:
            if pid:
                self._writers.pop(_writer(node, pid))
            return
        self._inode_for_writing(node, pid)
        raise Stale(node.path)

    def _inode_for_writing(self, node: Label, pid: int) -> int:
        """The inode that the writer ``pid`` was told of, or a new one: the name may be another snapshot's by now."""
        inode = self._writers.get(_writer(node, pid))
        if inode is None or inode not in self.tree.writers or unpack(inode)[0] != node.number:
            inode = node.for_writing().inode
        self._writers.tell(_writer(node, pid), inode)
        return inode

    async def _refreshed_node(self, inode: int, pid: int) -> Node:
        """What is to be read by who opens ``inode``: the node as it is now; raises Stale if that has another inode.

        Who has the size and pages of one inode can't be given another text.  So the kernel is made to look the name up again:
        then the new text's inode is opened, for which nothing more is to be found out.  It does so once: who comes back with
        an inode that won't do, because many texts have come since, the name is another snapshot's by now or none was looked
        up, gets the text past the pages.
        """
        number, slot = unpack(inode)
        asker = pid, slot & 0x7F if slot & Slot.VERSION_OF else slot
        told = self._refreshed.pop(asker)
        try:
            node = self.tree.node(inode)
        except Stale:
            node = self.tree.now(inode)
        if told is not None and unpack(told.inode)[0] == number:
            return node if node.inode == inode and node.is_known else told
        if not isinstance(node, File):
            return node
        now = await node.refresh()
        if isinstance(node, AttributeFile) and now is not node:  # the directory shows what was found out
            self.cache.forget_directory(node.number)
        # pid 0: a process that can't be seen from here, so it would not be known again
        if now.inode != inode and told is None and pid:
            self._refreshed.tell(asker, now)
            raise Stale(node.path)
        return now

    def _opened(self, inode: int, node: Node, handle: Handle) -> FileInfo:
        """``handle`` of ``node`` for who opened ``inode``."""
        strange = node.inode != inode
        apart = handle.direct or strange or (isinstance(node, Label) and node.text is None)
        entry = self.entry(node)
        entry.st_ino, entry.st_size, entry.attr_timeout = node.shown_inode, handle.size, 0
        fh = next(self._handles)
        self._open[fh] = OpenFile(inode, node.path, handle, entry, strange)
        self._open_inodes.setdefault(inode, []).append(self._open[fh])
        if strange:
            self.cache.forget_attributes(inode)
        return FileInfo(fh=fh, direct_io=apart, keep_cache=apart and not isinstance(handle, OpenLog))

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._open[fh].handle
        if handle.blocks:
            return await trio.to_thread.run_sync(handle.read, off, size)
        return handle.read(off, size)

    @answering
    async def poll(self, inode: int, fh: int, poll_handle: pyfuse3.PollHandle | None, ctx: RequestContext) -> int:
        handle = self._open[fh].handle
        if not isinstance(handle, OpenLog):
            return _ALWAYS_READY
        if poll_handle is not None:  # ready or not: an edge-triggered epoll(7) doesn't ask again when all is read
            handle.wake_with(functools.partial(_notify, poll_handle))
        if handle.is_ready():
            return select.POLLIN | select.POLLRDNORM
        return 0

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._open[fh].handle.write(off, buf)

    @answering
    async def release(self, fh: int) -> None:
        file = self._open[fh]
        emptied = unpack(file.inode)[0], trio.Event()
        if isinstance(file.handle, OpenLabel) and file.handle.emptied:
            # close(2) does not wait for this request, but the kernel has sent it before any that comes after that: whoever
            # asks for something of this snapshot next is to find the label deleted
            self._emptying.append(emptied)
        try:
            await file.handle.close()
        finally:
            if emptied in self._emptying:
                self._emptying.remove(emptied)
            emptied[1].set()
            del self._open[fh]
            self._open_inodes[file.inode].remove(file)
            if not self._open_inodes[file.inode]:
                del self._open_inodes[file.inode]

    # -- directories

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        self._note_read(inode, ctx.pid)
        return self.tree.node(inode).inode

    @answering
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        node = self.tree.node(fh)
        for offset, name in enumerate((b".", b".."), start=1):
            if start_id < offset:
                dot = EntryAttributes()
                dot.st_ino = fh if name == b"." else ROOT_INODE
                dot.st_mode = 0o040755
                if not pyfuse3.readdir_reply(token, name, dot, offset):
                    return
        entry = EntryAttributes()  # one for all: what is told is copied, and making one costs as much as all else
        reply, describe = pyfuse3.readdir_reply, self._describe
        with closing(node.entries(max(0, start_id - _DOTS))) as entries:  # type: ignore[type-var]
            for offset, text, child in entries:
                if not reply(token, text.encode(), describe(entry, child), offset + _DOTS):
                    return

    @answering
    async def releasedir(self, fh: int) -> None:
        pass

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        number, _ = unpack(fh)
        await self.tree.snapshotter.flush()
        self.tree.snapshotter.refuse_lost(number or None)  # an earlier flush may have been told instead

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self.tree.snapshotter.space()
        answer = StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{field}", getattr(space, f"f_{field}"))
        answer.f_namemax = names.NAME_MAX
        return answer


_ROOT_DIRECTORIES = frozenset(range(ROOT_INODE, 16))


def _writer(node: Label, pid: int) -> tuple[int, str]:
    """Who writes the label, as far as can be known: a process, or (0) some of the snapshot's."""
    return pid or -node.number, node.key


def _notify(poll_handle: pyfuse3.PollHandle) -> None:
    with contextlib.suppress(OSError):  # the mount is gone, and with it who waited
        poll_handle.notify()


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise NotUtf8(f"the name {name!r} is not UTF-8") from None
