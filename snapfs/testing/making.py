"""Making copies of a base, in the best way that there is here, starting them anew, and removing them."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from snapfs.kernel import mounting, overlay, processes
from snapfs.kernel.probe import in_user_namespace
from snapfs.scan.changes import changes
from snapfs.scan.marks import PREFIX
from snapfs.testing import capabilities, comparing, copying, entering
from snapfs.testing.bases import DATA, copy_whole
from snapfs.testing.place import Place

How = Literal["overlay", "reflink", "copy"]


class InUse(OSError):
    """A copy can't be removed or started anew: a process has a file open in it."""


class Copy:
    """A directory ``path`` that begins as the base ``base`` does."""

    def __init__(self, place: Place, base: Path, how: How) -> None:
        self.base = base
        self._how = how
        self._pid = os.getpid()
        self._home = place.new()
        self._merged = f"{self._home}/m"
        self.path = Path(self._merged, DATA)
        self._layers = 0
        self._begin()

    def reset(self) -> None:
        """Let it begin anew, at the same path.  Raises InUse, and then nothing has changed."""
        if self._how == "overlay":
            self._unmount()
            copying.remove_tree(self._upper)
        else:
            self._refuse_if_used()
            copying.remove_tree(self._merged)
        self._begin()

    def changes(self) -> Iterator[str]:
        """What was changed in it so far: lines, each with its newline."""
        if self._how != "overlay":
            yield from comparing.compared(str(self.base), str(self.path))
            return
        layers = [f"{self._upper}/upper", str(self.base.parent)]
        prefix = "user.overlay." if in_user_namespace() else PREFIX
        with capabilities.raised(), contextlib.closing(changes(layers, prefix=prefix)) as lines:
            # the layer has the copy as one directory
            for line in lines:
                if line[2:] != "/\n":
                    yield line[:2] + (line[3 + len(DATA) :].strip("\n") or "/") + "\n"

    def keep(self, target: str) -> None:
        """Make ``target`` a whole copy of what it holds now."""
        if self.path.is_dir() and not self.path.is_symlink():
            with contextlib.ExitStack() as stack:
                stack.enter_context(capabilities.raised())
                modes = {} if self._how == "overlay" else stack.enter_context(copying.readable(str(self.path)))
                copying.copy_tree(str(self.path), target, clone=True, modes=modes)

    def remove(self, *, quietly: bool = False) -> None:
        """Remove it.  Raises InUse, though it is removed even so; but not ``quietly``.  Nothing is done in a forked child."""
        if self._pid != os.getpid():
            return
        used = None
        try:
            if self._how == "overlay":
                self._unmount()
            elif not quietly:
                self._refuse_if_used()
        except InUse as error:
            used = error
            if self._how == "overlay":
                with capabilities.raised():
                    mounting.unmount(self._merged, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
        copying.remove_tree(self._home)
        if used is not None and not quietly:
            raise used

    @property
    def _upper(self) -> str:
        return f"{self._home}/{self._layers}"

    def _begin(self) -> None:
        if self._how != "overlay":
            os.mkdir(self._merged, 0o711)
            os.chmod(self._merged, 0o711)
            copy_whole(self.base, str(self.path), clone=self._how == "reflink")
            return
        self._layers += 1  # overlayfs refuses directories that an overlay has used that flushed nothing
        os.mkdir(self._upper, 0o711)
        os.mkdir(f"{self._upper}/upper", 0o711)
        os.mkdir(f"{self._upper}/work", 0o700)
        if self._layers == 1:
            os.mkdir(self._merged, 0o711)
        if os.stat(f"{self._upper}/upper").st_mode & 0o777 != 0o711:
            for path in (self._upper, f"{self._upper}/upper", self._merged):
                os.chmod(path, 0o711)
        layers = [str(self.base.parent)], f"{self._upper}/upper", f"{self._upper}/work"
        with capabilities.raised():
            overlay.mount_overlay(self._merged, *layers, entering.overlay_options(), read_only=False)

    def _unmount(self) -> None:
        """Unmount the overlay; raises InUse."""
        for attempt in range(2):
            try:
                with capabilities.raised():
                    mounting.unmount(self._merged, mounting.UMOUNT_NOFOLLOW)
                return
            except OSError as error:
                if error.errno == errno.EINVAL:  # somebody else has unmounted it
                    return
                if error.errno != errno.EBUSY:
                    raise
            if not attempt:
                gc.collect()  # what is open may be garbage only
        raise InUse(errno.EBUSY, self._in_use(list(_users(self._merged)) or ["a process that isn't found"]))

    def _refuse_if_used(self) -> None:
        if list(_own_uses(self._merged)):
            gc.collect()
        if used := list(_users(self._merged, children_only=True)):
            raise InUse(errno.EBUSY, self._in_use(used))

    def _in_use(self, users: list[str]) -> str:
        return (
            f"the copy {self.path} is in use by {', '.join(users)}: end it, or close its files, before the copy is thrown away"
        )


def _users(directory: str, *, children_only: bool = False) -> Iterator[str]:
    """Who uses ``directory``, in words."""
    if own := list(_own_uses(directory)):
        which = ", ".join(own)
        yield f"process {os.getpid()} ({processes.name_of(os.getpid())}, these tests themselves: {which})"
    if children_only:
        for pid in _descendants(os.getpid()):
            if list(_uses(pid, directory)):
                yield f"process {pid} ({processes.name_of(pid)})"
    else:
        for pid, name in processes.users(directory):
            yield f"process {pid} ({name})"


def _own_uses(directory: str) -> Iterator[str]:
    return _uses(os.getpid(), directory)


def _uses(pid: int, directory: str) -> Iterator[str]:
    """The files that process ``pid`` has open in ``directory``, and its working directory if that is in there."""
    with contextlib.suppress(OSError):
        links = [f"/proc/{pid}/cwd", *(f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))]
        for link in links:
            with contextlib.suppress(OSError):
                path = os.readlink(link)
                if path == directory or path.startswith(f"{directory}/"):
                    yield path[len(directory) + 1 :].removeprefix(DATA).lstrip("/") or "its directory"


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))
