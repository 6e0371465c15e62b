"""A directory, and what is below it in the same mount: whatever is mounted over something in there is not asked.

A path is followed an entry at a time, and by no link; of each entry the kernel tells which mount it is on (/proc/self/fdinfo)
before anything is asked of what is there.  That takes some microseconds; for openat2(2) it takes ctypes, whose import
takes longer than a verb.
"""

from __future__ import annotations

import os

from snapfs.cli.refusal import BUSY, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapfs.kernel.mounttable import MountPoint

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40  # that are followed on one way, as in the kernel


class Within:
    """The directory ``path``, which stays open; ``mount`` is the id of the mount that it is on, as the mount table has it.

    All methods take paths that begin with ``path``, and raise OSError, or Refusal where something is mounted on the way, or at
    the end.  No link is followed, not at the end either."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._top = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.mount = _mount_of(self._top)

    def close(self) -> None:
        os.close(self._top)

    def find(self, path: str) -> int:
        """A descriptor (O_PATH) of what is at ``path``."""
        return self._follow(path.removeprefix(self.path).split("/"))

    def refuse_covered(self, path: str) -> None:
        """Raise Refusal where something is mounted at ``path``, or above it."""
        try:  # noqa: SIM105, for contextlib takes its time
            os.close(self.find(path))
        except OSError:
            pass

    def exists(self, path: str) -> bool:
        try:
            os.close(self.find(path))
        except FileNotFoundError:
            return False
        return True

    def open(self, path: str, flags: int) -> int:
        """A descriptor of the file or directory at ``path``, which is there already.

        It is opened by its name, and not by what was found for that: a file that has another text by now has another inode."""
        above, _ = self._above(path)
        try:
            return self.open_in(above, path, flags)
        finally:
            os.close(above)

    def open_in(self, above: int, path: str, flags: int) -> int:
        """The same for a file of the directory that is open as ``above``; ``path`` says how it is called, and where it was."""
        name = path.rpartition("/")[2]
        os.close(self._enter(above, name, path))
        opened = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        self._check(opened, path)  # it may have been mounted meanwhile
        return opened

    def create(self, path: str) -> int:
        """A descriptor of the new file ``path``, to write to."""
        above, name = self._above(path)
        try:
            return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC, 0o644, dir_fd=above)
        finally:
            os.close(above)

    def names(self, path: str) -> list[str]:
        """What the directory ``path`` lists."""
        found = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(found)
        finally:
            os.close(found)

    def sync(self, path: str) -> None:
        """Return when the data of the snapshot in the directory ``path`` is on disk."""
        found = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(found)
        finally:
            os.close(found)

    def readlink(self, path: str) -> str:
        found = self.find(path)
        try:
            return os.readlink("", dir_fd=found)
        finally:
            os.close(found)

    def mkdir(self, path: str) -> None:
        above, name = self._above(path)
        try:
            os.mkdir(name, dir_fd=above)
        finally:
            os.close(above)

    def symlink(self, target: str, path: str) -> None:
        """Make the link ``path``, which leads to ``target``."""
        above, name = self._above(path)
        try:
            os.symlink(target, name, dir_fd=above)
        finally:
            os.close(above)

    def rmdir(self, path: str) -> None:
        above, name = self._above(path)
        try:
            os.rmdir(name, dir_fd=above)
        finally:
            os.close(above)

    def unlink(self, path: str) -> None:
        above, name = self._above(path)
        try:
            os.unlink(name, dir_fd=above)
        finally:
            os.close(above)

    def rename(self, path: str, new: str) -> None:
        above, name = self._above(path)
        try:
            there, new_name = self._above(new)
            try:
                os.rename(name, new_name, src_dir_fd=above, dst_dir_fd=there)
            finally:
                os.close(there)
        finally:
            os.close(above)

    def unlinked(self, path: str, holders: Sequence[str]) -> str:
        """``path`` without the links on the way and at its end, as far as they stand in directories that are called as one of
        ``holders``; FileNotFoundError where they lead out of the directory."""
        way: list[str] = []
        ahead = path.removeprefix(self.path).split("/")[::-1]
        links = 0
        while ahead:
            name = ahead.pop()
            if name in ("", "."):
                continue
            if name == "..":
                del way[-1:]
                continue
            found = self._follow([*way, name])
            try:
                target = os.readlink("", dir_fd=found) if way and way[-1] in holders else ""
            except OSError:  # it is none
                target = ""
            finally:
                os.close(found)
            links += bool(target)
            if target.startswith("/") or links > _MOST_LINKS:
                raise FileNotFoundError(path)
            if target:
                ahead += target.split("/")[::-1]
            else:
                way.append(name)
        return "/".join([self.path, *way])

    def _above(self, path: str) -> tuple[int, str]:
        """The directory above ``path``, and the name in it."""
        directory, _, name = path.rpartition("/")
        return self.find(directory), name

    def _follow(self, names: Sequence[str]) -> int:
        here = os.dup(self._top)
        try:
            for nth, name in enumerate(names):
                if name:
                    below = self._enter(here, name, "/".join([self.path, *filter(None, names[: nth + 1])]))
                    os.close(here)
                    here = below
        except BaseException:
            os.close(here)
            raise
        return here

    def _enter(self, above: int, name: str, path: str) -> int:
        """A descriptor (O_PATH) of the entry ``name`` of the directory ``above``; ``path`` says where it is."""
        below = os.open(name, _LOOK, dir_fd=above)
        self._check(below, path)
        return below

    def _check(self, fd: int, path: str) -> None:
        """Close ``fd`` and raise Refusal where it is on another mount."""
        number = _mount_of(fd)
        if number != self.mount:
            os.close(fd)
            from snapfs.kernel.mounttable import mount_table

            mount = next((mount for mount in mount_table() if mount.id == number), None)
            raise covered(mount, path, f"{path}, in the tree")


def covered(mount: MountPoint | None, path: str, what: str) -> Refusal:
    """The refusal that says that ``mount`` is mounted at ``path`` over ``what``."""
    from snapfs.kernel import trusted
    from snapfs.names import word

    owner = trusted.server_of(mount) if mount is not None else -1
    whose = f" of the user {trusted.user_name(owner)}" * (owner >= 0)
    kind = f" ({mount.type}{whose})" if mount is not None else ""
    return Refusal(f"something else{kind} is mounted over {what}: unmount that first: umount {word(path)}", BUSY)


def _mount_of(fd: int) -> int:
    """The id of the mount on which ``fd`` is open; no server is asked for it."""
    told = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(told, 4096).partition(b"mnt_id:")[2].split(None, 1)[0])
    finally:
        os.close(told)
