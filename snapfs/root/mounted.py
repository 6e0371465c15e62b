"""Where the snapshots of a root are mounted, by whatever process: what the kernel's mount tables say of its layers."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from snapfs.kernel.handles import has_upper, open_elsewhere
from snapfs.kernel.mounttable import MountPoint, MountTable, mount_id, mount_id_of, mount_table, parse
from snapfs.kernel.namespaces import Namespaces, never
from snapfs.names import parse_id

_LAYER = re.compile(r"/([1-9][0-9]*)/fs")
_LAYER_PART = re.compile(r"/([1-9][0-9]*)/fs(?=/|\Z)")
_BOUND = re.compile(r"/snapshots/([1-9][0-9]*)/fs(?=/|\Z)")
_COLON = re.compile(r"((?:[^\\:]|\\.)*)(?::|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """One mount: its target, whether it can be written, and which directory of what it mounts it shows ("": the whole).

    ``device`` is that of the mounted file system, as ``major:minor``; ``id``, ``unique``, ``group``, ``master``, ``parent`` and
    ``foreign`` are the mount's own, as in ``MountPoint``.  ``bound`` is the snapshot whose layer is bound.  ``upper`` and
    ``lowers`` are the snapshots whose layers an overlay has, by its option ``upperdir``, whose text proves nothing: any user
    can write it in a namespace of their own, and ROOT may have been moved since.
    """

    id: int
    unique: int
    group: int
    master: int
    target: str
    writable: bool
    inside: str
    device: str
    upper: int | None = None
    lowers: tuple[int, ...] = ()
    bound: int | None = None
    upperdir: str = ""
    parent: int = 0
    foreign: bool = False
    relative: tuple[int, ...] = ()

    def may_stand_on(self, number: int) -> bool:
        """Whether it is an overlay that has, or may have, the layer of snapshot ``number`` among the lower ones."""
        return number in self.lowers or number in self.relative or 0 in self.relative


class Mounted:
    """The mounts of the layers ``snapshots``/<id>/fs.  Each call tells of this moment; threads may share it.

    Those of this mount namespace are told by the text of the mount table, which is enough to show them.  What is in use is
    asked of the kernel itself (``snapfs/root/inuse.py``)."""

    def __init__(self, snapshots: str) -> None:
        self._snapshots, self._below = snapshots, f"{snapshots}/"
        self._table = MountTable()
        self._everywhere = Namespaces(self._place)
        self._lock = threading.Lock()
        self._origin = origin(snapshots)
        self._upper: dict[int, list[Place]] = {}
        self._bound: dict[int, list[Place]] = {}
        self._stacked: dict[tuple[int, ...], list[Place]] = {}

    def close(self) -> None:
        self._table.close()
        self._everywhere.close()

    def writers(self, number: int) -> list[str]:
        """Where the layer of snapshot ``number``, or a directory in it, can be written: as the upperdir of an overlay or
        bound."""
        with self._lock:
            self._refresh()
            places = [*self._upper.get(number, ()), *self._bound.get(number, ())]
        return [place.target for place in places if place.writable]

    def active(self, number: int) -> list[str]:
        """Where the file system of the active snapshot ``number`` is mounted, whole and writable."""
        with self._lock:
            self._refresh()
            places = [*self._upper.get(number, ()), *self._bound.get(number, ())]
        return [place.target for place in places if place.writable and not place.inside]

    def stacked(self, layers: Sequence[int]) -> list[str]:
        """Where these layers, the nearest first, are mounted as one, with none to write to above them: what a committed
        snapshot, or a view of it, looks like."""
        return [place.target for place in self.shown_as_one(layers)]

    def proven(self, number: int) -> list[str]:
        """The same, as far as the kernel says that it is so, and without those over which something else is mounted, perhaps by
        whoever may write there.  Blocks."""
        with self._lock:
            self._refresh()
            places = [*self._upper.get(number, ()), *self._bound.get(number, ())]
        shown = [place for place in places if place.writable and not place.inside and _is_seen(place)]
        return [place.target for place in shown if self.is_of(place, number, os.getpid())]

    def shown(self, number: int) -> list[Place]:
        """The mounts in this namespace that are known to show the layer of the active snapshot ``number``, whole, also those
        where it can't be written.  Blocks."""
        with self._lock:
            self._refresh()
            places = [*self._upper.get(number, ()), *self._bound.get(number, ())]
        return [place for place in places if not place.inside and self.is_of(place, number, os.getpid())]

    def shown_as_one(self, layers: Sequence[int]) -> list[Place]:
        """The mounts of ``stacked``."""
        with self._lock:
            self._refresh()
            places = self._bound.get(layers[0], ()) if len(layers) == 1 else self._stacked.get(tuple(layers), ())
        return [place for place in places if not place.inside]

    def uppers_on(self, number: int) -> list[int]:
        """The snapshots whose layer is the upper one of an overlay in this mount namespace that has, or may have, the layer of
        snapshot ``number`` among the lower ones."""
        with self._lock:
            self._refresh()
            return [upper for upper, places in self._upper.items() if any(place.may_stand_on(number) for place in places)]

    def everywhere(self, wanted: Callable[[Place], bool]) -> list[Place]:
        """The ``wanted`` mounts of all mount namespaces that this process may see; ``Namespaces.find`` says what may be
        asked."""
        return self._everywhere.find(wanted)

    def scan(self, wanted: Callable[[Place], bool], *, settled: Callable[[Place], bool] = never) -> tuple[list[Place], bool]:
        """The same, and whether nothing was left unread: of another user's namespaces no more is read than can be read in a
        short time.  ``Namespaces.scan`` says what is ``settled``."""
        return self._everywhere.scan(wanted, settled=settled)

    def by_process(self, wanted: Callable[[Place], bool]) -> Iterator[tuple[int, Place]]:
        """The same, each with the pid of a process that is in its namespace.  Takes longer."""
        return self._everywhere.by_process(wanted)

    def open(self, place: Place, number: int, pid: int) -> int:
        """A descriptor (O_PATH) of what is mounted at ``place``, of the namespace of process ``pid``: the layer of the active
        snapshot ``number``, or an overlay on it.  Raises OSError: ENOENT where it is something else, or others; EBUSY
        where something is mounted over it, which is not asked, for its server may never answer."""
        fd, layer = open_elsewhere(pid, place.target), f"{self._snapshots}/{number}/fs"
        try:
            if mount_id_of(fd) != place.id:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), place.target)
            is_it = has_upper(fd, layer) if place.upperdir else os.path.samestat(os.fstat(fd), os.stat(layer))
            if not is_it:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place.target)
        except OSError:
            os.close(fd)
            raise
        return fd

    def is_of(self, place: Place, number: int, pid: int) -> bool:
        """Whether ``place``, of the namespace of process ``pid``, is known to show the layer of the active snapshot ``number``.

        In this namespace, where mounting takes privileges, the text of ``upperdir`` is enough where the kernel can't tell more.
        """
        if not place.upperdir:
            return place.bound == number
        try:
            os.close(self.open(place, number, pid))
        except FileNotFoundError:
            return False
        except OSError:
            return pid == os.getpid() and place.upper == number
        return True

    def _refresh(self) -> None:
        if not self._table.has_changed():
            return
        upper: defaultdict[int, list[Place]] = defaultdict(list)
        bound: defaultdict[int, list[Place]] = defaultdict(list)
        stacked: defaultdict[tuple[int, ...], list[Place]] = defaultdict(list)
        for line in self._table.lines():
            if "/fs" not in line or (place := self._place(parse(line))) is None:
                continue
            if place.upper is not None:
                upper[place.upper].append(place)
            elif place.lowers and not place.upperdir:
                stacked[place.lowers].append(place)
            elif place.bound is not None:
                bound[place.bound].append(place)
        self._upper, self._bound, self._stacked = upper, bound, stacked

    def _place(self, mount: MountPoint) -> Place | None:
        """What ``mount`` has to do with layers; None if nothing.  Of any overlay that can't be told by its words alone."""
        if mount.type == "overlay":
            inside = "" if mount.root == "/" else mount.root  # a part of it that is bound there
            texts = [option[9:] for option in mount.super_options if option.startswith("upperdir=")]
            above = self._number(texts[0]) if texts else None
            return _place(mount, inside, above, self._lowers(mount), None, "".join(texts), self._relative(mount))
        if found := self._bound_layer(mount):
            return _place(mount, found[1], bound=found[0])
        if mount.type == "tmpfs":  # it may be a shelter
            return _place(mount, mount.root)
        return None

    def _lowers(self, mount: MountPoint) -> tuple[int, ...]:
        numbers: list[int | None] = []
        for option in mount.super_options:  # several "lowerdir+=" of the mount API, or one "lowerdir=" of mount(2)
            key, _, value = option.partition("=")
            if key == "lowerdir+":
                numbers.append(self._number(value))
            elif key == "lowerdir":
                numbers += [self._number(part) for part in _COLON.findall(value) if part]
        return () if None in numbers else tuple(number for number in numbers if number)

    @staticmethod
    def _relative(mount: MountPoint) -> tuple[int, ...]:
        """The ids that lower directories may mean that are told by relative names; 0 for names that tell none (mount.sh)."""
        texts = [option[9:] for option in mount.super_options if option.startswith("lowerdir=")]
        parts = [part for text in texts for part in text.split(":")]
        if parts == [str(nth) for nth in range(len(parts))]:
            return (0,) if parts else ()
        found = (_LAYER.fullmatch("/" + part) for part in parts)
        return tuple(int(match[1]) for match in found if match)

    def _number(self, path: str) -> int | None:
        """The id whose layer is at ``path``, as overlayfs shows it: with or without its backslashes."""
        if path.startswith(self._below) and (found := _LAYER.fullmatch(path, len(self._snapshots))):
            return parse_id(found[1])
        return self._number(re.sub(r"\\(.)", r"\1", path, flags=re.DOTALL)) if "\\" in path else None

    def _bound_layer(self, mount: MountPoint) -> tuple[int, str] | None:
        """Id and directory inside of a bound layer.

        The target is never asked: that would be a use of it, which keeps it from being unmounted, and it may be on a server
        that does not answer, or in our own tree, where this process would wait for itself.
        """
        if self._origin is None:
            return self._bound_layer_at(mount)
        device, directory = self._origin
        if mount.device != device or not mount.root.startswith(directory + "/"):
            return None
        found = _LAYER_PART.match(mount.root, len(directory))
        number = parse_id(found[1]) if found else None
        return (number, mount.root[found.end() :]) if found and number is not None else None

    def _bound_layer_at(self, mount: MountPoint) -> tuple[int, str] | None:
        """The same where the table does not show the mount that holds the layers (in a chroot): what looks like it is asked."""
        for found in _BOUND.finditer(mount.root):
            number, inside = parse_id(found[1]), mount.root[found.end() :]
            if number is None:
                continue
            try:
                if os.path.samestat(os.stat(mount.target), os.stat(f"{self._snapshots}/{number}/fs{inside}")):
                    return number, inside
            except OSError:
                continue
        return None


def _is_seen(place: Place) -> bool:
    """Whether the target of ``place``, of this namespace, leads to it, and to nothing that is mounted over it; True where the
    kernel's memory alone doesn't tell."""
    try:
        fd = open_elsewhere(os.getpid(), place.target)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.ENOSYS, errno.EINVAL)
    try:
        return mount_id_of(fd) == place.id
    finally:
        os.close(fd)


def _place(
    mount: MountPoint,
    inside: str,
    upper: int | None = None,
    lowers: tuple[int, ...] = (),
    bound: int | None = None,
    upperdir: str = "",
    relative: tuple[int, ...] = (),
) -> Place:
    ids = mount.id, mount.unique, mount.group, mount.master
    shown = mount.target, "rw" in mount.options, inside, mount.device
    return Place(*ids, *shown, upper, lowers, bound, upperdir, mount.parent, mount.foreign, relative)


def origin(directory: str) -> tuple[str, str] | None:
    """Device and path of ``directory`` as the table's ``device`` and ``root`` would have them, by whatever bind mount it is
    reached; None where the table can't tell."""
    try:
        number = mount_id(directory)
    except OSError:
        return None
    for mount in mount_table():
        if mount.id == number:
            return mount.device, os.path.normpath(os.path.join(mount.root, os.path.relpath(directory, mount.target)))
    return None
