"""The files and directories that processes have open through one mount, by the number that the kernel has for each."""

from __future__ import annotations

from itertools import count

from pyfuse3 import EntryAttributes

from snapfs.tree import Handle


class OpenFile:
    """One open file.

    ``inode`` is the one that was opened, ``user`` who has done so (``Caller``), ``path`` where it stood then, ``handle`` what
    the tree has opened, ``entry`` what stat(2) says of it.  ``is_misfit``: its text is not that of its inode.
    """

    def __init__(
        self, inode: int, user: int | None, path: str, handle: Handle, entry: EntryAttributes, is_misfit: bool
    ) -> None:
        self.inode = inode
        self.user = user
        self.path = path
        self.handle = handle
        self.entry = entry
        self.is_misfit = is_misfit


class OpenFiles:
    """All open files of one mount."""

    def __init__(self) -> None:
        self._by_number: dict[int, OpenFile] = {}
        self._by_inode: dict[int, list[OpenFile]] = {}
        self._numbers = count(1)

    def add(self, file: OpenFile) -> int:
        """The number by which the kernel asks for ``file`` from now on."""
        fh = next(self._numbers)
        self._by_number[fh] = file
        self._by_inode.setdefault(file.inode, []).append(file)
        return fh

    def __getitem__(self, fh: int) -> OpenFile:
        return self._by_number[fh]

    def get(self, fh: int | None) -> OpenFile | None:
        """The open file with number ``fh``, if there is one."""
        return None if fh is None else self._by_number.get(fh)

    def remove(self, fh: int) -> None:
        """The file with number ``fh`` is closed."""
        file = self._by_number.pop(fh)
        self._by_inode[file.inode].remove(file)
        if not self._by_inode[file.inode]:
            del self._by_inode[file.inode]

    def any_of(self, inode: int) -> OpenFile | None:
        """The first file that was opened under ``inode``, if one still is."""
        files = self._by_inode.get(inode)
        return files[0] if files else None

    def misfit(self, inode: int) -> OpenFile | None:
        """The first open file of ``inode`` whose text is not that of the inode."""
        for file in self._by_inode.get(inode, ()):
            if file.is_misfit:
                return file
        return None


class OpenDirectory:
    """One open directory: its ``inode``, and ``user``, who has opened it (``Caller``)."""

    __slots__ = ("inode", "user")

    def __init__(self, inode: int, user: int | None) -> None:
        self.inode = inode
        self.user = user


class OpenDirectories:
    """All open directories of one mount."""

    def __init__(self) -> None:
        self._by_number: dict[int, OpenDirectory] = {}
        self._numbers = count(1)

    def add(self, directory: OpenDirectory) -> int:
        """The number by which the kernel asks for ``directory`` from now on."""
        fh = next(self._numbers)
        self._by_number[fh] = directory
        return fh

    def __getitem__(self, fh: int) -> OpenDirectory:
        return self._by_number[fh]

    def remove(self, fh: int) -> None:
        """The directory with number ``fh`` is closed."""
        del self._by_number[fh]
