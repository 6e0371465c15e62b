"""FUSE requests -> the tree: inode to node, bytes to names, errors to errno.  Translation alone: what the kernel is told again,
or otherwise than the tree has it, is in ``retelling``, what it may remember in ``cache``."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import select
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from snapfs import names
from snapfs.errors import InvalidArgument, LeftOut, NotFound, NotUtf8, SnapshotError, Stale, TryAgain, Unavailable
from snapfs.fuse.access import Access
from snapfs.fuse.cache import TIMEOUT, KernelCache
from snapfs.fuse.errno import errno_of
from snapfs.fuse.openfiles import OpenDirectories, OpenDirectory, OpenFile, OpenFiles
from snapfs.fuse.retelling import Retelling
from snapfs.fuse.waiting import BETWEEN_DIRECTORIES, CROWDING, OPENDIR, PATIENCE, PAUSE, STAT, SYNC, Waiting
from snapfs.kernel.processes import asking
from snapfs.model import Caller
from snapfs.tree import Handle, Node, Tree
from snapfs.tree.attributes import AttributeFile
from snapfs.tree.commands import OpenCommand
from snapfs.tree.inodes import ROOT_INODE
from snapfs.tree.labels import Label
from snapfs.tree.log import OpenLog
from snapfs.tree.openimage import OpenImage
from snapfs.tree.openlabels import OpenLabel
from snapfs.tree.textfile import TextFile
from snapfs.tree.tree import REMOVE
from snapfs.tree.users import asker

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_ALWAYS_READY = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM  # as poll(2) says of any regular file

_DOTS = 2  # the first two entries of every directory, before the tree's own

_READING = frozenset(("lookup", "getattr", "readlink", "open", "opendir", "readdir"))
"""Requests that merely ask: that something isn't there is an answer, not an error to log."""

_OF_READERS = _READING | {"read", "poll", "fsyncdir", "statfs", "release", "releasedir"}
"""Requests that whoever may read the tree can make, the others only who may write it: the kernel sees to that."""


_LOCKING = {
    **dict.fromkeys(("mkdir", "rmdir", "unlink", "create", "mknod", "symlink", "setxattr"), (0,)),
    "link": (1,),
    "rename": (0, 2),
}
"""Requests for which the kernel keeps directories locked against all others; which of their arguments these are."""

_WAITING = {"lookup", "open", "opendir", *_LOCKING}
"""Requests by whose user another may follow that has to wait for the lock of a directory."""


def answering(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Turn every error of ``handler`` into an errno and a line in error_log; any other exception would end the mount."""

    locking, waiting = _LOCKING.get(handler.__name__, ()), handler.__name__ in _WAITING

    async def answer(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        began, number = time.perf_counter(), 0
        user, thread, directories = None, 0, []
        if isinstance(args[-1], RequestContext):
            thread, user = args[-1].pid, self.rights.user(args[-1].uid)
            asking.set(thread)
            self.tree.snapshotter.arrived(thread)
            asker.set(user)
            if waiting:
                self.waiting.crowds.note_use(user, began)
        try:
            if locking and user is not None:
                directories = _directories(args, locking)
                self.waiting.crowds.enter(directories, user, thread, began)
            if self.retelling.is_emptying and isinstance(args[0], int):
                await self.retelling.emptied(args[0])
            return await handler(self, *args, **kwargs)
        except SnapshotError as error:
            number = errno_of(error)
            answer_enough = number == errno.ENOENT and handler.__name__ in _READING and not isinstance(error, LeftOut)
            if not answer_enough and not isinstance(error, Stale) and self._is_news(handler.__name__, args, error):
                self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        except FUSEError as error:
            number = error.errno
            raise
        except OSError as error:
            number = error.errno or errno.EIO
            if self._is_news(handler.__name__, args, error):
                self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        except Exception as error:
            number = errno.EIO
            if self._is_news(handler.__name__, args, error):
                log.exception("a bug: %s failed", handler.__name__)
                self.log_refusal(number, handler.__name__, args, error)
            raise FUSEError(number) from None
        finally:
            now = time.perf_counter()
            took = now - began
            if directories and user is not None:
                for directory in self.waiting.crowds.leave(directories, user, thread, now, took):
                    self.cache.forget_attributes(directory)
            self.tree.state.meters[handler.__name__].note(took, errno.errorcode.get(number, str(number)) if number else None)

    functools.update_wrapper(answer, handler)
    return answer


def _directories(args: Sequence[object], locking: Sequence[int]) -> list[int]:
    """The inodes of the directories that are locked for a request with these arguments."""
    inodes = list({inode for number in locking if isinstance(inode := args[number], int)})
    return inodes if len(inodes) == 1 else [*inodes, BETWEEN_DIRECTORIES]


class Operations(pyfuse3.Operations):
    """One mount of one tree.  The handle of a file or a directory is a number for an open one."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, tree: Tree, rights: Access, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.tree = tree
        self.rights = rights
        self.cache = KernelCache()
        self.files = OpenFiles()
        self.directories = OpenDirectories()
        self.waiting = Waiting(trio.current_time)
        self.retelling = Retelling(tree, self.cache, self.files, self.waiting, writers_apart=rights.others_may_write)
        self._on_ready = on_ready
        tree.snapshotter.subscribe(self.cache.note)

    def init(self) -> None:
        self._on_ready()

    # -- translation

    def caller(self, ctx: RequestContext) -> Caller:
        """Who has made a request, as those are told who have to wait for something."""
        return Caller(self.rights.user(ctx.uid), PATIENCE)

    def entry(self, node: Node) -> EntryAttributes:
        """What the kernel wants to know of ``node``, and for how long it may believe that."""
        return self._describe(EntryAttributes(), node)

    def _describe(self, entry: EntryAttributes, node: Node) -> EntryAttributes:
        """The same in ``entry``, which may have served for another."""
        found = node.attributes()
        inode, time = node.inode, found.time
        self.cache.note_told(inode)
        entry.st_ino = inode
        entry.generation = self.tree.state.removals.of(inode)
        entry.st_mode = self.rights.mode(found)
        entry.st_uid, entry.st_gid = self.rights.owner(found)
        entry.st_size = found.size
        entry.st_blocks = found.blocks
        if entry.st_mtime_ns != time:
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time
        entry.entry_timeout = TIMEOUT if node.keep_entry else 0
        # the kernel takes the number that stat(2) shows from here too, unless it asks once more (``getattr``)
        keep = found.keep and inode == node.shown_inode and inode not in self.waiting.crowds.watched
        entry.attr_timeout = TIMEOUT if keep else 0
        return entry

    def log_refusal(self, number: int, operation: str, args: tuple[object, ...], error: Exception) -> None:
        """One line in error_log for a request with these arguments, and one in the log of the daemon's owner; that is a warning
        where it says what is not for all who may read error_log."""
        name, where, words = (
            errno.errorcode.get(number, str(number)),
            self._where(operation, args),
            self.rights.words(error),
        )
        hidden = isinstance(error, SnapshotError | OSError) and words != str(error)
        fields = {"ERRNO": number, "SNAPFS_ERROR": name, "SNAPFS_OPERATION": operation, "SNAPFS_PATH": where}
        level = logging.WARNING if hidden else logging.INFO
        log.log(level, "%s %s %s: %s", name, operation, where, error, extra={"fields": fields})
        self.tree.state.error_log.note(name, operation, where, words)

    def _is_news(self, operation: str, args: tuple[object, ...], error: Exception) -> bool:
        """Whether the refusal of a request with these arguments is to have a line in error_log.  Users who may not write can
        have as many requests refused as they like, and would push out what else is there."""
        if isinstance(error, TryAgain) and not self.waiting.is_news(operation):
            return False
        user = self._reader(operation, args)
        return user is None or self.waiting.is_readers_news(user)

    def _reader(self, operation: str, args: tuple[object, ...]) -> int | None:
        """Who has made a request that needs no right to write; None for the owner and root, and for all other requests."""
        if operation not in _OF_READERS:
            return None
        if args and isinstance(args[-1], RequestContext):
            writes = operation == "open" and isinstance(args[1], int) and args[1] & (os.O_ACCMODE | os.O_TRUNC)
            return None if writes else self.rights.user(args[-1].uid)
        if not args or not isinstance(args[0], int):
            return None
        if operation in ("read", "release"):
            file = self.files.get(args[0])
            return file.user if file is not None and not isinstance(file.handle, OpenLabel) else None
        return self.directories[args[0]].user

    def _where(self, operation: str, args: tuple[object, ...]) -> str:
        """The paths that a request is about, by the types of its arguments: inode, name, inode, name …"""
        if operation in ("read", "write", "release", "fsync"):
            file = self.files.get(args[0]) if isinstance(args[0], int) else None
            return file.path if file is not None else str(args[0])
        if operation == "setxattr":
            args = args[:1]
        if operation in ("readdir", "fsyncdir") and isinstance(args[0], int):
            args = (self.directories[args[0]].inode,)
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
        if len(name) > names.NAME_MAX:  # nothing has it; to make it is refused in words
            raise FUSEError(errno.ENOENT)
        try:
            return self.entry(self.retelling.look_up(directory, name.decode(), ctx.pid, self.rights.user(ctx.uid)))
        except LeftOut:
            raise
        except (NotFound, UnicodeDecodeError):
            raise FUSEError(errno.ENOENT) from None  # never cached: names may appear by what happens elsewhere

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode in self.waiting.crowds.watched:
            await self._pause(inode, self.rights.user(ctx.uid), ctx.pid)
        node = self.retelling.look_at(inode)
        if isinstance(node, OpenFile):
            return node.entry
        if node.must_settle():
            caller = self.caller(ctx)
            with contextlib.suppress(TryAgain), self.waiting.counted(STAT, caller.user):  # else it is what is known
                await node.settle(caller)
        entry = self.entry(node)
        if entry.st_ino != node.shown_inode:
            entry.st_ino = node.shown_inode
            if isinstance(node, TextFile) and node.attributes().keep:
                entry.attr_timeout = TIMEOUT  # of this text, whoever reads it; the kernel would ask before each read(2)
        return entry

    async def _pause(self, inode: int, user: int | None, thread: int) -> None:
        """Have ``thread`` wait that was refused to change the directory ``inode`` and comes again, while it has no lock.
        Raises TryAgain."""
        if user is None or not self.waiting.crowds.comes_again(inode, user, thread, time.perf_counter()):
            return
        try:
            with self.waiting.counted(CROWDING, user):
                await trio.sleep(PAUSE)
        except TryAgain:
            return  # in the kernel's queue it takes less time than if it asked again and again
        self.waiting.crowds.enter((inode,), user, thread, time.perf_counter())

    @answering
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._to_set(inode)
        now = self.entry(node)
        now.st_ino = node.shown_inode
        if fields.update_size:
            if (file := self.files.get(fh)) is not None:
                await file.handle.resize(attr.st_size)
            else:
                await self.retelling.to_write(inode, ctx.pid, self.rights.user(ctx.uid)).resize(attr.st_size)
            if isinstance(node, Label):
                now.st_size = attr.st_size  # whatever became of it: a label that was cut to nothing is gone
            return now
        same = (
            (not fields.update_mode or attr.st_mode & 0o7777 == now.st_mode & 0o7777)
            and (not fields.update_uid or attr.st_uid == now.st_uid)
            and (not fields.update_gid or attr.st_gid == now.st_gid)
        )
        # editors set the mode and owner of what they have just made: where that changes nothing it is fine
        is_written = isinstance(node, Label) or (isinstance(node, AttributeFile) and node.attribute.rewrite is not None)
        if not is_written or not same or fields.update_atime or fields.update_mtime:
            raise node.refusal_to_set()
        return now

    def _to_set(self, inode: int) -> Node:
        """The node of ``inode``, of which something is to be set; also that of an image.json of which not all has come yet."""
        try:
            return self.tree.node(inode)
        except NotFound:
            if (file := self.files.any_of(inode)) is None or not isinstance(file.handle, OpenImage):
                raise
            return self.tree.node_being_made(inode)

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = self.tree.node(inode)
        self.tree.note_read(inode, self.rights.user(ctx.uid), ctx.pid)
        # mounted for a process that can't get there, a file system would only push out another
        if not self.rights.may_enter_root(ctx.uid):
            return node.target().encode(errors="surrogateescape")
        with self.waiting.counted(node.waits_for, None):
            return (await node.follow(ctx.pid)).encode(errors="surrogateescape")

    # -- changing

    @answering
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        inode = await self.tree.node(parent_inode).mkdir(_text(name))
        entry = self.entry(self.tree.node(inode))
        self.retelling.made(parent_inode, entry)
        return entry

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        with self.cache.asked_for(parent_inode, _text(name)):
            await self.tree.node(parent_inode).rmdir(_text(name), ctx.pid)

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        first, blank, path = value.decode(errors="replace").partition(" ")
        number = names.parse_id(first) if name == REMOVE and blank else None
        if number is None:
            raise FUSEError(errno.ENOTSUP)
        await self.tree.remove(inode, number, path)
        await self.cache.settle()  # the kernel has no lock of the directory in which the name is

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        with self.cache.asked_for(parent_inode, _text(name)):
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
        old, new = _text(name_old), _text(name_new)
        source, target = self.tree.node(parent_inode_old), self.tree.node(parent_inode_new)
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        rename = self.tree.what_rename_means(source, old, target, new, replace=replace, pid=ctx.pid)
        user = self.rights.user(ctx.uid)
        with (
            self.waiting.holding(user) if rename.flushes else contextlib.nullcontext(math.inf) as patience,
            self.retelling.renaming(rename, source, old, target, new),
            self.cache.asked_for(target.inode, new),  # in images/ one may be there
        ):
            await rename.carry_out(patience)

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node, handle = await self.tree.node(parent_inode).create(_text(name))
        await self._charge(handle, ctx.uid)
        if isinstance(handle, OpenImage):
            handle.caller = self.caller(ctx)
        user = self.rights.user(ctx.uid)
        return self.retelling.opened(node.inode, user, node, handle, self.entry(node)), self.entry(node)

    @answering
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        raise self.tree.node(parent_inode).refusal_to_make("a special file")

    @answering
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        directory = self.tree.node(parent_inode)
        return self.entry(await directory.symlink(_text(name), target.decode(errors="surrogateescape"), ctx.pid))

    @answering
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise self.tree.node(new_parent_inode).refusal_to_make("a link")

    # -- files

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        self.tree.note_read(inode, self.rights.user(ctx.uid), ctx.pid)
        writing, truncate = flags & os.O_ACCMODE != os.O_RDONLY, bool(flags & os.O_TRUNC)
        if writing or truncate:
            node = self.retelling.to_write(inode, ctx.pid, self.rights.user(ctx.uid))
        else:
            node = await self.retelling.to_read(inode, ctx.pid, self.caller(ctx))
        handle = await node.open(writing, truncate)
        await self._charge(handle, ctx.uid)
        if isinstance(handle, OpenLabel):
            handle.appends = bool(flags & os.O_APPEND)
        if isinstance(handle, OpenCommand | OpenImage):
            handle.caller = self.caller(ctx)
        if isinstance(handle, OpenCommand):
            handle.pid = ctx.pid
        return self.retelling.opened(inode, self.rights.user(ctx.uid), node, handle, self.entry(node))

    async def _charge(self, handle: Handle, uid: int) -> None:
        """Refuse to open ``handle`` for a user who has too much open; those who may fill the disk below ROOT may this too."""
        user = self.rights.user(uid)
        if user is None:
            return
        try:
            self.files.charge(handle, user)
        except Unavailable:
            if isinstance(handle, OpenLabel):
                handle.emptied = False  # the label stays
            await handle.close()
            raise

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # it takes any buffer
        handle = self.files[fh].handle
        if handle.blocks:
            return await handle.fetch(off, size)
        if isinstance(handle, OpenLog):
            with handle.reading():
                data = handle.read(off, size)
                self.files.reweigh(handle)
                return data
        return handle.read(off, size)

    @answering
    async def poll(self, inode: int, fh: int, poll_handle: pyfuse3.PollHandle | None, ctx: RequestContext) -> int:
        handle = self.files[fh].handle
        if not isinstance(handle, OpenLog):
            return _ALWAYS_READY
        if poll_handle is not None:  # ready or not: an edge-triggered epoll(7) doesn't ask again when all is read
            handle.wake_with(functools.partial(_notify, poll_handle))
        if handle.is_ready():
            return select.POLLIN | select.POLLRDNORM
        return 0

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self.files[fh]
        asking.set(file.handle.pid if isinstance(file.handle, OpenCommand) else 0)
        with self.waiting.counted(file.handle.waits_for, file.user):
            written = await file.handle.write(off, buf)
        if isinstance(file.handle, OpenCommand | OpenImage):
            try:
                self.files.reweigh(file.handle)
            except Unavailable:
                file.handle.forget()
                self.files.reweigh(file.handle)
                raise
        return written

    @answering
    async def release(self, fh: int) -> None:
        file = self.files[fh]
        with self.retelling.closing(file):
            try:
                await file.handle.close()
            finally:
                self.files.remove(fh)

    # -- directories

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        self.tree.note_read(inode, self.rights.user(ctx.uid), ctx.pid)
        user = self.rights.user(ctx.uid)
        fh = self.directories.add(OpenDirectory(self.tree.node(inode).inode, user))
        if user is not None:
            try:
                with self.waiting.counted(OPENDIR, user):
                    await self.waiting.listings.begin(fh, user)
            except BaseException:
                self.directories.remove(fh)
                raise
        return fh

    @answering
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        directory = self.directories[fh]
        inode = directory.inode
        asker.set(directory.user)
        if directory.user is not None:
            self.waiting.listings.note(fh, directory.user)
        if self.retelling.is_emptying:
            await self.retelling.emptied(inode)
        node = self.tree.node(inode)
        for offset, name in enumerate((b".", b".."), start=1):
            if start_id < offset:
                dot = EntryAttributes()
                dot.st_ino = inode if name == b"." else ROOT_INODE
                dot.st_mode = 0o040755
                if not pyfuse3.readdir_reply(token, name, dot, offset):
                    return
        entry = EntryAttributes()  # one for all: readdir_reply copies it, and making one costs as much as all else
        reply, describe = pyfuse3.readdir_reply, self._describe
        with closing(node.entries(max(0, start_id - _DOTS))) as entries:  # type: ignore[type-var]
            for offset, text, child in entries:
                if not reply(token, text.encode(), describe(entry, child), offset + _DOTS):
                    return

    @answering
    async def releasedir(self, fh: int) -> None:
        self.waiting.listings.end(fh)
        self.directories.remove(fh)

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        directory = self.directories[fh]
        number = self.tree.id_of(directory.inode)
        with self.waiting.counted(SYNC, directory.user), self.waiting.holding(directory.user) as patience:
            # Whoever looks something up in the directory waits meanwhile.  In one that belongs to one snapshot alone, the owner
            # may let them; and where there are no others.
            if directory.user is None and (number or not self.rights.allow_other):
                patience = math.inf
            await self.tree.snapshotter.flush_committed(number or None, patience=patience)

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        space = self.tree.snapshotter.space()
        answer = StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{field}", getattr(space, f"f_{field}"))
        answer.f_namemax = names.NAME_MAX
        return answer


def _notify(poll_handle: pyfuse3.PollHandle) -> None:
    with contextlib.suppress(OSError):  # the mount is gone, and with it the process that waited
        poll_handle.notify()


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise NotUtf8(f"the name {name!r} is not UTF-8") from None
