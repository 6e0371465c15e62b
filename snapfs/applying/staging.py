"""Carrying a plan out: all or nothing, also where a kill comes between two system calls.

All that is to be put in place is made in a directory of the target's own, STAGING, where nobody else gets in.  There a journal
is renamed into place when all is ready and on the disk: from then on an apply is finished, before that nothing has happened.
Each step is one rename, after which what was there is in STAGING at the place of what came.  So the inode in there says whether
a step was done.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from typing import Any

from snapfs.applying.entries import Entry, Held
from snapfs.applying.filling import Changed, dress_directory
from snapfs.applying.plan import NEW, OLD, STAGING, Plan, Step, Unfit
from snapfs.kernel import libc, mounting
from snapfs.kernel.beneath import LOOK, open_beneath
from snapfs.kernel.processes import locker

_NAME = STAGING.encode()
_OWNER, _JOURNAL, _DONE = "about", "journal", "done"

FRESH, BEGUN, FINISHED = "fresh", "begun", "finished"


def lock(target: Held) -> None:
    """Have the target for this process alone, as far as others ask for it so; raises Unfit."""
    try:
        fcntl.flock(target.top, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        by, where = locker(target.top), target.name
        whose = f"process {by} has {where} locked, as an apply does" if by else f"another apply is at work in {where}"
        raise Unfit(f"{whose}: wait for its end, and try again") from None


class Staging:
    """STAGING in ``target``; ``about``: what was noted when it was made."""

    def __init__(self, target: Held, held: Held, about: dict[str, Any]) -> None:
        self._target = target
        self.held = held
        self.about = about

    @classmethod
    def make(cls, target: Held, about: dict[str, Any]) -> Staging:
        """Raises OSError, and Unfit where the owner of the target exchanges it at once."""
        top = os.fstat(target.top)
        about = {**about, "times": [top.st_atime_ns, top.st_mtime_ns]}
        os.mkdir(_NAME, 0o700, dir_fd=target.top)
        staging = cls(target, _opened(target), about)
        found = os.fstat(staging.held.top)
        about["inode"] = found.st_ino
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or staging.held.names(b""):
            staging.close()
            raise Unfit(f"somebody has put another directory at {target.name}/{STAGING} just now: move it away")
        with suppress(OSError):  # default ACLs of the target's
            os.removexattr(f"/proc/self/fd/{staging.held.top}", "system.posix_acl_default")
        os.chmod(f"/proc/self/fd/{staging.held.top}", 0o700)
        staging._write(_OWNER, lambda file: file.write(json.dumps(about)))
        return staging

    @classmethod
    def find(cls, target: Held) -> Staging | None:
        """The one that an earlier apply has left, if any.  Raises Unfit, and OSError."""
        found = target.look(_NAME)
        if found is None:
            return None
        where = f"{target.name}/{STAGING}"
        if found.kind != "d" or (found.uid != os.geteuid() and not (found.uid == 0 and os.geteuid() != 0)):
            raise Unfit(f"{where} is in the way, which is nothing of this user's apply: move it away")
        if found.uid != os.geteuid():
            raise Unfit(f"an apply of root's was cut off in {target.name}: the next one of root's ends that, so run it as root")
        if found.mode & 0o077:
            raise Unfit(f"{where} lets other users in, so it is nothing that apply has made: move it away")
        held = _opened(target)
        try:
            with open(_file(_OWNER, held), encoding="utf-8") as file:
                about = json.load(file)
        except (FileNotFoundError, ValueError):  # it had just been made
            about = {}
        staging = cls(target, held, about)
        # a copy tells of inodes that are others by now; and in what somebody else has packed it tells what they like
        is_its = isinstance(about, dict) and about.get("inode") == found.ino
        if not is_its and (staging.state == BEGUN or about != {}):
            staging.close()
            raise Unfit(f"{where} was made for another directory, and copied or unpacked here: move it away")
        return staging

    def close(self) -> None:
        self.held.close()

    @property
    def state(self) -> str:
        """How far it got: FRESH, nothing was touched; BEGUN; FINISHED."""
        names = self.held.names(b"")
        return FINISHED if _DONE.encode() in names else BEGUN if _JOURNAL.encode() in names else FRESH

    def refuse_unable(self) -> None:
        """Raise Unfit where the file system can't exchange two files."""
        names = (b"one", b"two")
        try:
            for name in names:
                os.mkdir(name, dir_fd=self.held.top)
            libc.rename(names[0], self.held.top, names[1], self.held.top, libc.RENAME_EXCHANGE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            where = self._target.name
            raise Unfit(f"the file system of {where} can't exchange two files in one step: apply it to one that can") from None
        finally:
            for name in names:
                with suppress(FileNotFoundError):
                    os.rmdir(name, dir_fd=self.held.top)

    def seal(self, plan: Plan) -> None:
        """Write the journal, when all else is on the disk: from here on the plan is carried out.  Raises OSError."""
        mounting.sync_file_system(self.held.top)
        self._write(_JOURNAL, plan.write)

    def journal(self) -> Plan:
        """The plan that was begun, or is finished.  Raises OSError; ValueError where it is none."""
        with open(_file(_DONE if self.state == FINISHED else _JOURNAL, self.held), encoding="utf-8") as file:
            return Plan.read(file)

    def carry_out(self, plan: Plan) -> None:
        """Do all that was not done yet.  Raises Changed, and OSError with the path as ``filename``: then ``take_back``."""
        for step in plan.places():
            with _naming(step.path):
                slot = b"%d" % step.number
                if _inode(self.held, slot) == plan.staged(step.number):
                    self._refuse_changed(plan, step)
                    self._exchange(plan, step, slot)
                if step.had:
                    self._refuse_other(plan, step, slot)
        for step in plan.places():
            new = plan.entry(NEW, step.path)
            if new is not None and new.kind == "d":  # which may have been writable to be moved
                dress_directory(self._target, step.path, new)
        for step in plan.directories():
            old, new, now = plan.entry(OLD, step.path), plan.entry(NEW, step.path), self._target.look(step.path)
            assert old is not None
            assert new is not None
            if now is None or now.kind != "d" or now.mode not in (old.mode, old.mode | 0o300, new.mode):
                raise Changed(step.path)
            dress_directory(self._target, step.path, new)
        mounting.sync_file_system(self._target.top)

    def finish(self) -> None:
        """Note that all is done: only what was there is left to be removed.  Raises OSError."""
        os.rename(_JOURNAL, _DONE, src_dir_fd=self.held.top, dst_dir_fd=self.held.top)
        os.fsync(self.held.top)

    def take_back(self, plan: Plan) -> list[bytes]:
        """Undo what was done; the paths at which somebody else has put something meanwhile, which stay as they are.  Raises
        OSError with the path as ``filename``."""
        self._target.forget()
        left = []
        for step in plan.places(backwards=True):
            slot = b"%d" % step.number
            with _naming(step.path):
                if _inode(self.held, slot) != plan.staged(step.number) and not self._return(plan, step, slot):
                    left.append(step.path)
        for step in plan.directories():
            old, now = plan.entry(OLD, step.path), self._target.look(step.path)
            if old is not None and now is not None and now.kind == "d":
                dress_directory(self._target, step.path, old)
        mounting.sync_file_system(self._target.top)
        if left:
            self.finish()
        else:
            os.unlink(_JOURNAL, dir_fd=self.held.top)
            os.fsync(self.held.top)
        return left

    def remove(self, top: Entry | None = None) -> None:
        """Remove the directory, and give the target the times of ``top``, or those that it had.  Raises OSError."""
        times = self.about.get("times")
        for name in self.held.names(b""):
            if name.isdigit():
                _remove(self.held, name)
        for name in (b"one", b"two"):
            with suppress(FileNotFoundError):
                os.rmdir(name, dir_fd=self.held.top)
        for last in (f"{_JOURNAL}.new", f"{_OWNER}.new", _OWNER, _JOURNAL, _DONE):
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=self.held.top)
        os.rmdir(_NAME, dir_fd=self._target.top)
        if top is not None:
            times = [top.atime, top.mtime]
        if times:
            with suppress(PermissionError):
                os.utime(f"/proc/self/fd/{self._target.top}", ns=(times[0], times[1]))

    # -- one step

    def _refuse_changed(self, plan: Plan, step: Step) -> None:
        """Raise Changed unless the target has there what the plan has found."""
        self._target.forget()
        found = 0
        for path, entry in self._target.below(step.path):
            if _sign(entry) != _sign(plan.entry(OLD, path)):
                raise Changed(path)
            found += 1
        if found != step.had:
            raise Changed(step.path)

    def _refuse_other(self, plan: Plan, step: Step, slot: bytes) -> None:
        """Raise Changed unless what was moved away is what the plan has found: here nobody else can get at it by its name."""
        found = 0
        for path, entry in self.held.below(slot):
            there = step.path + path[len(slot) :]
            old = plan.entry(OLD, there)
            if path == slot and entry.kind == "d" and old is not None:
                entry = entry._replace(mode=old.mode)
            if _sign(entry, moved=True) != _sign(old, moved=True):
                raise Changed(there)
            found += 1
        if found != step.had:
            raise Changed(step.path)

    def _exchange(self, plan: Plan, step: Step, slot: bytes) -> None:
        if not self._move(step.path, slot, plan.entry(OLD, step.path), comes=step.has, goes=step.had):
            raise Changed(step.path)

    def _return(self, plan: Plan, step: Step, slot: bytes) -> bool:
        """Whether what step did could be undone."""
        if step.has:
            if _inode(self._target, step.path) != plan.staged(step.number):
                return False
            found = 0
            for path, entry in self._target.below(step.path):
                new = plan.entry(NEW, path)
                if new is None or (entry.kind, entry.size) != (new.kind, new.size):
                    return False
                if entry.kind != "d" and entry.mtime != new.mtime:
                    return False
                found += 1
            if found != step.has:
                return False
        if not self._move(step.path, slot, plan.entry(NEW, step.path), comes=step.had, goes=step.has):
            return False
        old = plan.entry(OLD, step.path)
        if old is not None and old.kind == "d":
            dress_directory(self._target, step.path, old)
        return True

    def _move(self, path: bytes, slot: bytes, there: Entry | None, *, comes: int, goes: int) -> bool:
        """In one step, have what is in ``slot``, if something ``comes``, at ``path`` of the target, and what is ``there``, if
        it ``goes``, in the slot.  False, and nothing is done, where others have changed what is at that name.  Raises
        OSError."""
        try:
            parent, name = self._target.parent(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise
        _unlock(parent)
        if there is not None:
            _make_movable(parent, name, there)
        top = self.held.top
        try:
            if not comes:
                libc.rename(name, parent, slot, top, libc.RENAME_NOREPLACE)
            else:
                libc.rename(slot, top, name, parent, libc.RENAME_EXCHANGE if goes else libc.RENAME_NOREPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT):
                return False
            raise
        return True

    def _write(self, name: str, write: Any) -> None:
        """Make the file ``name``, whole and on the disk."""
        new = f"{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600, dir_fd=self.held.top), "w", encoding="utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, name, src_dir_fd=self.held.top, dst_dir_fd=self.held.top)
        os.fsync(self.held.top)


def refuse_unwritable(plan: Plan, target: Held) -> None:
    """Raise OSError with the path as ``filename`` where this user may not write in a directory in which the plan puts something
    or takes it away."""
    for step in plan.places():
        with _naming(step.path):
            parent, _ = target.parent(step.path)
            if not os.access(f"/proc/self/fd/{parent}", os.W_OK | os.X_OK, effective_ids=True):
                if os.statvfs(parent).f_flag & os.ST_RDONLY:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                if os.fstat(parent).st_uid != os.geteuid():
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _opened(target: Held) -> Held:
    return Held(open_beneath(_NAME, target.top, os.O_RDONLY | os.O_DIRECTORY), f"{target.name}/{STAGING}")


def _file(name: str, held: Held) -> int:
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held.top)


def _inode(held: Held, path: bytes) -> int:
    found = held.look(path)
    return 0 if found is None else found.ino


def _sign(entry: Entry | None, *, moved: bool = False) -> object:
    """What a file has that shows whether it is as it was; ``moved``: it was renamed since."""
    if entry is None:
        return None
    shown = (entry.kind, *entry.own[:3], entry.size, entry.mtime, entry.ino, entry.link, entry.rdev)
    return shown if moved or entry.kind == "d" or entry.is_linked else (*shown, entry.ctime)


def _unlock(directory: int) -> None:
    """Have this user write in the directory open as ``directory``, if it is theirs: at the end it gets its mode back."""
    path = f"/proc/self/fd/{directory}"
    found = os.fstat(directory)
    if os.geteuid() != 0 and found.st_uid == os.geteuid() and found.st_mode & 0o300 != 0o300:
        os.chmod(path, stat.S_IMODE(found.st_mode) | 0o300)


def _make_movable(parent: int, name: bytes, entry: Entry) -> None:
    """The kernel moves a directory only for who may write in it."""
    if entry.kind != "d" or os.geteuid() == 0 or entry.mode & stat.S_IWUSR:
        return
    found = open_beneath(name, parent, LOOK | os.O_DIRECTORY)
    try:
        if os.fstat(found).st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{found}", entry.mode | stat.S_IWUSR)
    finally:
        os.close(found)


def _remove(held: Held, path: bytes) -> None:
    """Remove all that is at ``path`` in ``held``."""
    try:
        os.unlink(path, dir_fd=held.top)
        return
    except FileNotFoundError:
        return
    except IsADirectoryError:
        waiting = [path]
    while waiting:
        here = waiting[-1]
        held.forget()
        directory = open_beneath(here, held.top, LOOK | os.O_DIRECTORY)
        try:
            if os.geteuid() != 0:
                os.chmod(f"/proc/self/fd/{directory}", 0o700)
            inside = []
            for name in held.names(here):
                try:
                    os.unlink(name, dir_fd=directory)
                except IsADirectoryError:
                    inside.append(here + b"/" + name)
                except OSError as error:
                    error.filename = here + b"/" + name
                    raise
        finally:
            os.close(directory)
        if inside:
            waiting += inside
        else:
            parent, name = held.parent(here)
            os.rmdir(name, dir_fd=parent)
            waiting.pop()


class _naming:
    """For a block: its OSErrors have this path."""

    def __init__(self, path: bytes) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and not isinstance(error.filename, bytes):
            error.filename = self._path
