"""The merged file systems, each of one snapshot, as the kernel mounts them at ROOT/rootfs/<id>/fs: mounting, unmounting, and
what another process has of them.

Which layers, and whether they may be mounted, is the caller's to say; when, is ``services/rootfs.py``'s.

No upper layer is ever mounted a second time, whichever process has it mounted and in whichever mount namespace: a process that
was made with a namespace of its own, a sandbox, has a copy of each mount that it saw, and goes on writing there.  So what is
unmounted here is looked for everywhere else before it is given up, and before anything is mounted the kernel is asked
(``snapfs/kernel/inuse.py``).

But a sandbox of another user has copies of mounts that it can't even get to, as ROOT is closed to that user, and would keep
everybody's snapshots from being committed.  Such an *inherited copy* stands where ours does, in a foreign namespace
(``snapfs/kernel/namespaces.py``).  If no process uses the file system, it doesn't count: it goes away with the directory <id>,
for the kernel detaches what is mounted on a directory that is removed, in all namespaces.  Should a process have had it after
all, the kernel says so when it is asked.

<id> is made with each mount and removed right after it: a process that comes too late meets ENOENT, and so does one in a mount
namespace that lacks the mount (``snapfs/kernel/shelter.py``).

Everything here blocks, on the disk or on the kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import msgspec

from snapfs.errors import FULL, Busy, NoThread, Unavailable
from snapfs.kernel import mountapi, mounting, namespaces, overlay, probe, shelter
from snapfs.kernel.mounttable import mount_id, mount_table
from snapfs.kernel.processes import name_of, users, users_of_device
from snapfs.model import Kind
from snapfs.names import parse_id
from snapfs.root import holders
from snapfs.root.inuse import FLUSHING, InUse
from snapfs.root.layers import Layers
from snapfs.root.mounted import Mounted, Place

log = logging.getLogger(__name__)

_GONE = (errno.EINVAL, errno.ENOENT)
"""What umount2(2) says where another process has unmounted it, and perhaps removed the directory."""


VOLATILE, VOLATILE_SINCE = "volatile", (5, 10)
"""The option of an overlay that flushes nothing, and the kernel from which on there is one."""

_MARK = "work/incompat/volatile"  # in the work directory of such an overlay


class Stack(msgspec.Struct, frozen=True):
    """What to mount: the ids of the read-only layers, the nearest first, and that of a writable one above them."""

    lower: tuple[int, ...]
    upper: int | None = None


class Held:
    """One mount of ours: when it was last asked for, and a detached copy of it.

    The last unmount of an overlay flushes the whole file system that holds its upper directory, which may take minutes.  The
    copy makes that the close of the copy instead, in the background: a Commit must not wait for it.  It can also be mounted
    again.

    ``number`` is the snapshot's id, ``mount`` the mount's; ``device`` that of the overlay (``major:minor``), "" of a bind, and
    ``shelters`` those of what it stands in and has stood in, where copies may still stand.  Each has a detached copy, too, or
    the kernel would give its device's number to another when the last is gone.  ``seal``: the overlay is to be made read-only
    before the copy is closed.  ``alone``: when it was unmounted nothing else showed the snapshot's layer.
    """

    def __init__(self, number: int, target: str) -> None:
        self.number = number
        self.asked = 0.0
        self.seal = self.alone = False
        self.copy = mounting.detached_copy(target)
        self.mount = mount_id(target)
        self.device = mounting.overlay_device(target)
        self.shelters: dict[str, int | None] = {}
        self.stand_in(os.path.dirname(target))

    def stand_in(self, directory: str) -> None:
        """It stands in the shelter that is mounted on ``directory`` now."""
        device = mounting.device(directory)
        if device not in self.shelters:
            self.shelters[device] = mounting.detached_copy(directory)

    def forget_shelter(self, device: str) -> None:
        """No copy of that one is left."""
        copy = self.shelters.pop(device)
        if copy is not None:
            os.close(copy)

    def take_copy(self) -> int | None:
        """The copy, for the caller to close, which may flush the disk; those of the shelters are closed."""
        for device in list(self.shelters):
            self.forget_shelter(device)
        copy, self.copy = self.copy, None
        return copy

    def close_copy(self) -> None:
        """Close all copies, which may flush the disk."""
        copy = self.take_copy()
        if copy is not None:
            os.close(copy)


class Merged:
    """The merged file systems of one root; ``options`` go on each overlay.  Where nothing is ever flushed (``flushes`` is
    false), neither does an unmount: without that the kernel then flushes the whole disk below.  Threads may share it, each at
    another snapshot."""

    def __init__(self, layers: Layers, mounted: Mounted, in_use: InUse, options: Sequence[str], *, flushes: bool) -> None:
        self._layers = layers
        self._mounted = mounted
        self._in_use = in_use
        self._options = options
        self._volatile = [VOLATILE] if mounting.kernel_version() >= VOLATILE_SINCE else []
        self.flushes = flushes
        self._of_writable = list(options) if flushes else [*options, *self._volatile]
        self.left: set[int] = set()
        """The snapshots whose directories were left, since something is mounted on them in other namespaces."""
        self._directory = layers.rootfs_directory
        self._reach = layers.held_path  # whatever is made, mounted or removed below ROOT

    def trial(self) -> str | None:
        """Mount an overlay as ``mount`` does; why that is refused and what to do, None where it is not."""
        try:
            trial = self._layers.make_trial()
        except OSError as error:
            return self._why_refused(error)
        options = [*self._options, *self._volatile]
        directory = f"{self._directory}/trial"
        try:
            shelter.prepare(self._reach(directory))
            self._put(directory, [f"{trial}/lower"], f"{trial}/fs", f"{trial}/work", options)
            mounting.unmount(self._reach(f"{directory}/{shelter.INSIDE}"), mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            return self._why_refused(error)
        finally:
            self._clear(directory)
            shutil.rmtree(trial, ignore_errors=True)
        return None

    def _why_refused(self, error: OSError) -> str | None:
        """In words why mounting is not permitted; a full disk does not tell whether it is, nor a full table of descriptors."""
        if error.errno in (*FULL, errno.EMFILE, errno.ENFILE):
            return None
        return probe.why_trial_failed(error, "ROOT", self._layers.root, self._layers.held)

    def recover(self, is_right: Callable[[int], bool]) -> dict[int, Held]:
        """Unmount what a crashed daemon left, and remove its directories; what is taken over, by snapshot id.

        That is what is in use, here or in another mount namespace, and ``is_right`` for its snapshot; anything else that is in
        use here is detached."""
        recovered: dict[int, Held] = {}
        targets = [mount.target for mount in mount_table() if mount.target.startswith(self._directory + "/")]
        names = {target[len(self._directory) + 1 :].partition("/")[0] for target in targets}
        for name in sorted(names):
            directory, number = f"{self._directory}/{name}", parse_id(name)
            target = f"{directory}/{shelter.INSIDE}"
            try:
                if target in targets:
                    held = self._recover_one(number, target, is_right)
                    if held is not None:
                        recovered[held.number] = held
                else:  # a user's, or of a version that had no shelters
                    mounting.unmount(self._reach(directory), mounting.UMOUNT_NOFOLLOW)
            except OSError:
                self._detach(target if target in targets else directory)
        for name in os.listdir(self._reach(self._directory)):
            number = parse_id(name)
            if number:  # whose mount may have been cut short
                with suppress(OSError):
                    self._take_mark_away(self._layers.work(number))
            if number not in recovered and not (number and self._may_stand_on(number)):
                self._clear(f"{self._directory}/{name}")
        return recovered

    def _may_stand_on(self, number: int) -> bool:
        """Whether a process may have the overlay of snapshot ``number`` mounted on its directory where this daemon can't
        see it: the kernel would take that away together with the directory.  So it is where each daemon has a user
        namespace of its own."""
        if not probe.in_user_namespace():
            return False
        try:
            return self._in_use.has_overlay(number, suspected=True)
        except (OSError, Busy):
            return True

    def _recover_one(self, number: int | None, target: str, is_right: Callable[[int], bool]) -> Held | None:
        """Unmount ``target``: None; or take it over.  Raises OSError, also where it is in use and not right."""
        held = Held(number or 0, target)
        with ExitStack() as undo:
            undo.callback(held.close_copy)
            right = number is not None and is_right(number)
            try:
                mounting.unmount(self._reach(target), mounting.UMOUNT_NOFOLLOW)
                shelter.remove(self._reach(os.path.dirname(target)))
                if not right or held.copy is None or not self.is_elsewhere(held):
                    return None
                self.attach_again(held)
            except OSError as error:
                if not right or error.errno != errno.EBUSY:
                    raise
            undo.pop_all()
        return held

    def mount(self, number: int, stack: Stack, held: Held | None) -> Held:
        """Mount the file system of snapshot ``number``; or ``held`` again, which a user has unmounted by hand.

        What another process has mounted is mounted here too, and no second overlay.  Raises Damaged where a layer is missing,
        Unavailable where the kernel refuses, Busy where the upper layer is in use and its mount can't be got from there.
        """
        layers = self._layers
        for below in stack.lower:
            layers.refuse_damaged(below)
        if stack.upper is not None:
            layers.refuse_damaged(stack.upper, Kind.ACTIVE)
        directory, target = layers.shelter(number), layers.rootfs(number)
        try:
            self.forget_copies(number)
            again = held is not None and held.copy is not None
            tree = self._taken_over(number) if stack.upper is not None and not again else None
            try:
                self._clear(directory)  # any process that knows the path can make something there
                shelter.prepare(self._reach(directory))  # on a disk that is read-only by now an old one can't be removed
            except BaseException:
                if tree is not None:
                    os.close(tree)
                raise
            try:
                if held is not None and again:
                    self.attach_again(held)
                    return held
                if tree is not None:
                    shelter.attach(tree, self._reach(directory))
                elif stack.upper is None and len(stack.lower) == 1:
                    self._put_bind(directory, layers.fs(stack.lower[0]))
                else:
                    lowers = [layers.fs(below) for below in stack.lower] or [layers.empty_layer()]
                    upper = None if stack.upper is None else layers.fs(stack.upper)
                    work = None if stack.upper is None else layers.work(stack.upper)
                    if work is None:
                        self._put(directory, lowers, None, None, self._options)
                    else:
                        self._put_writable(directory, lowers, upper, work)
                return Held(number, target)
            except BaseException:
                self._clear(directory)
                raise
        except OSError as error:
            raise Unavailable(f"cannot mount the file system of snapshot {number}: {error.strerror}", error.errno) from error

    def _put(self, directory: str, lowers: Sequence[str], upper: str | None, work: str | None, options: Sequence[str]) -> None:
        read_only = upper is None
        try:
            tree = overlay.make_overlay(lowers, upper, work, options, read_only=read_only)
        except overlay.MountApiLacking:

            def mount(target: str) -> None:
                overlay.mount_overlay_classic(target, lowers, upper, work, options, read_only=read_only)

            shelter.attach_classic(mount, self._reach(directory))
        else:
            shelter.attach(tree, self._reach(directory))

    def _put_writable(self, directory: str, lowers: Sequence[str], upper: str | None, work: str) -> None:
        self._take_mark_away(work)
        self._put(directory, lowers, upper, work, self._of_writable)
        self._take_mark_away(work)

    def _take_mark_away(self, work: str) -> None:
        """Remove what the kernel leaves in the work directory where it flushes nothing, and which forbids the next mount: after
        a power cut the layer may be torn.  But so is all of a root of which nothing is flushed."""
        if VOLATILE in self._of_writable:
            with suppress(FileNotFoundError):
                os.unlink(f"{self._reach(work)}/{_MARK}/dirty")
            with suppress(FileNotFoundError):
                os.rmdir(f"{self._reach(work)}/{_MARK}")

    def _put_bind(self, directory: str, layer: str) -> None:
        try:
            tree = mounting.make_bind(layer, read_only=True)
        except OSError as error:
            if error.errno not in mounting.NO_MOUNT_API:
                raise
            shelter.attach_classic(
                lambda target: mounting.mount_bind_classic(layer, target, read_only=True), self._reach(directory)
            )
        else:
            shelter.attach(tree, self._reach(directory))

    def attach_again(self, held: Held) -> None:
        """Mount again what was unmounted here, and another process may still have: the same overlay, no second one.  Raises
        OSError."""
        assert held.copy is not None
        directory, target = self._layers.shelter(held.number), self._layers.rootfs(held.number)
        shelter.prepare(self._reach(directory))
        try:
            tree = mountapi.copy_tree(held.copy)
        except OSError:
            tree, held.copy = held.copy, None
        shelter.attach(tree, self._reach(directory))
        if held.copy is None:
            held.copy = mounting.detached_copy(target)
        held.mount = mount_id(target)
        left, whole = self._shelters(held)
        if whole:
            for device in held.shelters.keys() - {place.device for place in left}:
                held.forget_shelter(device)
        held.stand_in(directory)

    def is_elsewhere(self, held: Held) -> bool:
        """Whether the overlay that is mounted here, or was a moment ago, is mounted in another place, in whatever namespace.

        What the kernel has mounted there together with ours, it unmounts with ours: that doesn't count.  Raises OSError.
        """
        return bool(self._elsewhere(held))

    def _elsewhere(self, held: Held) -> list[Place]:
        """The mounts for which that is so.  Raises OSError."""
        return _copies(held, self._mounted.everywhere(lambda place: place.device == held.device)) if held.device else []

    def _taken_over(self, number: int) -> int | None:
        """The descriptor of a copy of the mount by which another process has the active snapshot ``number``; None if none has.

        Raises Busy where that can't be had, and OSError.
        """

        def may_be_it(place: Place) -> bool:
            return (place.bound == number or bool(place.upperdir)) and not place.inside

        closing = self._in_use.closings.get(number)
        if closing is not None and not closing.wait(FLUSHING):  # another one on the same layer would bear no mark
            raise Busy("it was unmounted a moment ago, and is still being written to the disk: try again")
        # a bind of a part of it, or one to read, is no hindrance
        found = self._mounted.everywhere(lambda place: place.bound == number and not place.inside)
        bound = any(place.writable for place in found)
        if not bound and not self._in_use.has_overlay(number, suspected=True):
            return None
        for pid, place in self._mounted.by_process(may_be_it):
            with suppress(OSError):
                there = self._mounted.open(place, number, pid)
                try:
                    return _copy_of_another(pid, there)
                finally:
                    os.close(there)
        raise Busy(f"snapshot {number} {holders.elsewhere(self._mounted, number, self._layers.rootfs(number))}")

    def give_up(self, held: Held, *, is_asked: bool = False) -> bool:
        """Unmount ``held`` if no process uses it in another namespace, either: whether that is so.  Raises OSError: EBUSY while
        it is in use here.  Where it isn't unmounted nothing has changed.

        ``is_asked``: the kernel is asked next whether a process has the overlay even so.  Then this doesn't look for what has
        come in the moment of the unmount where there was nothing before."""
        directory = self._layers.shelter(held.number)
        devices = {*held.shelters, held.device} - {""}
        target = self._layers.rootfs(held.number)
        layer = {held.number} if held.device else set()

        def may_show_it(place: Place) -> bool:
            return place.bound in layer or place.upper in layer

        seen, whole = self._mounted.scan(lambda place: place.device in devices or place.target == target or may_show_it(place))
        others = [place for place in seen if place.device not in devices and place.target != target]
        seen = [place for place in seen if place not in others]
        shelters = [place for place in seen if place.device in held.shelters]
        found, unused = _copies(held, seen), False
        held.alone = not found and not others
        if whole and not _are_inherited(found, shelters):
            return False
        if not whole or any(place.foreign for place in shelters):
            unused = self._is_unused(held)
            if not unused and (found or (held.device and not whole)):
                return False
        self._unmount(target)
        shelter.remove(self._reach(directory))  # at once: what is left in it is an empty directory
        if is_asked and whole and len(seen) == 2 and {place.target for place in seen} == {target, directory}:
            self._clear_beneath(directory, ())
            return True
        kept = _keeping(directory, shelters)
        seen = self._mounted.everywhere(lambda place: place.device == held.device or kept(place))
        found = _copies(held, seen) if held.copy is not None else []
        if found and not (unused and (not whole or _are_inherited(found, shelters))):  # by now
            self.attach_again(held)
            return False
        self._clear_beneath(directory, [place for place in seen if kept(place)], inherited=unused)
        return True

    def _is_unused(self, held: Held) -> bool:
        """Whether no process uses ``held``, in whatever namespace, as far as /proc shows that in a short time."""
        found = users_of_device(held.device) if held.device else users(self._layers.rootfs(held.number))
        return next(found, None) is None

    def forget_copies(self, number: int) -> None:
        """Detach the inherited copies, which no process uses, of what an earlier daemon had mounted for snapshot ``number``,
        which is not mounted here.  Raises OSError."""
        directory = self._layers.shelter(number)
        if not os.path.lexists(self._reach(directory)):  # it stays only where a namespace has one
            return
        target = self._layers.rootfs(number)
        found, whole = self._mounted.scan(lambda place: number in (place.upper, place.bound) or place.target == target)
        if (whole and not found) or not all(place.foreign for place in found):
            return
        using = [users_of_device(device) for device in {place.device for place in found if place.bound is None}]
        if not any(next(processes, None) for processes in [*using, users(target)]):
            self._clear(directory, inherited=True)

    def expire(self, held: Held) -> bool:
        """Unmount ``held`` if no process has used it since the last call, here or in another namespace: whether that is so.
        Raises OSError."""
        try:
            found = self._elsewhere(held)
            if found and not _are_inherited(found, self._shelters(held)[0]):
                return False
            if not mounting.unmount_unused(self._reach(self._layers.rootfs(held.number))):
                return False
        except OSError as error:
            if error.errno not in _GONE:
                return False
        return self.give_up(held)

    def _unmount(self, target: str) -> None:
        try:
            mounting.unmount(self._reach(target), mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in _GONE:
                raise

    def _shelters(self, held: Held) -> tuple[list[Place], bool]:
        """The mounts, in whatever namespace, that are on the directory in which ``held`` stands, ours among them; and whether
        nothing was left unread."""
        return self._mounted.scan(lambda place: place.device in held.shelters)

    def _clear(self, directory: str, shelters: Collection[Place] = (), *, inherited: bool = False) -> None:
        """Remove ROOT/rootfs/<id>, and what is mounted there; what a user has put in is kept.

        It stays where something is mounted on it in another namespace (of ``shelters``, which were there before ours was
        unmounted): the kernel would take that away together with it.  ``inherited`` copies don't keep it: that is to happen
        to them.
        """
        if not os.path.lexists(self._reach(directory)):  # the kernel detaches what is mounted on what is removed
            self.left.discard(parse_id(os.path.basename(directory)) or 0)
            return
        shelter.remove(self._reach(directory))
        self._clear_beneath(directory, self._mounted.everywhere(_keeping(directory, shelters)), inherited=inherited)

    def _clear_beneath(self, directory: str, keeping: Sequence[Place], *, inherited: bool = False) -> None:
        """Remove ROOT/rootfs/<id>, on which nothing is mounted here any more, unless the mounts ``keeping`` keep it."""
        number = parse_id(os.path.basename(directory)) or 0
        if all(inherited and place.foreign for place in keeping):
            shelter.clear(self._reach(directory))
            self._layers.remove_directory(directory)
            self.left.discard(number)
        else:
            self.left.add(number)

    def end(self, held: Held) -> None:
        """Unmount ``held`` for good; what is in use is detached."""
        target, shelters = self._layers.rootfs(held.number), list[Place]()
        try:
            shelters = self._shelters(held)[0]
            self._unmount(target)
        except OSError:
            self._detach(target)
        try:
            self._clear(self._layers.shelter(held.number), shelters)
        except OSError as error:
            log.warning("cannot remove %s: %s", self._layers.shelter(held.number), error)
        finally:
            held.close_copy()

    def _detach(self, target: str) -> None:
        """Unmount ``target`` though it is in use: a process that uses it can go on reading, no other gets there.

        The mount table does not show it any more, so nothing would keep its snapshot from being committed: it is made
        read-only, unless a process has a file open for writing.
        """
        by = ""
        with suppress(OSError):  # no descriptors left
            by = by_users(target)
        log.warning("%s is still in use%s; detaching it", target, by)
        with suppress(OSError):
            mounting.make_read_only(self._reach(target))
        with suppress(OSError):
            mounting.unmount(self._reach(target), mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)


def _keeping(directory: str, shelters: Collection[Place]) -> Callable[[Place], bool]:
    """Tells which mounts keep ROOT/rootfs/<id>: those at its target, and of ``shelters`` those that are still there."""
    target, before = f"{directory}/{shelter.INSIDE}", {place.unique for place in shelters} - {0}
    return lambda place: place.unique in before or place.target == target


def _copies(held: Held, places: Sequence[Place]) -> list[Place]:
    """Those of ``places`` where the overlay of ``held`` is mounted, but for itself and what goes with it."""
    found = [place for place in places if held.device and place.device == held.device]
    groups = {place.group for place in found if place.id == held.mount and place.group}
    count = -1
    while len(groups) != count:
        count = len(groups)
        groups |= {place.group for place in found if place.master in groups and place.group}
    return [place for place in found if place.id != held.mount and not groups & {place.group, place.master}]


def _are_inherited(found: Sequence[Place], shelters: Sequence[Place]) -> bool:
    """Whether all that was ``found`` of an overlay are inherited copies: in foreign namespaces, in copies of its shelter."""
    standing = {place.id for place in shelters if place.foreign and place.inside == "/"}
    return all(place.foreign and place.parent in standing for place in found)


def by_users(target: str) -> str:
    if found := holders.by_users(target):
        return found
    below = next((mount.target for mount in mount_table() if mount.target.startswith(target + "/")), None)
    return f" by what is mounted at {below}" if below else ""


def why_unseen(pid: int, target: str) -> str | None:
    """Why process ``pid`` does not get to what is mounted at ``target`` here, and what to do, in words: it is in another mount
    namespace.  None where it does, as far as can be known.  Blocks on /proc."""
    if namespaces.sees_mount(pid, target):
        return None
    return (
        f"process {pid} ({name_of(pid)}) is in another mount namespace, where {target} is not mounted: "
        f"follow rootfs before that is made, or enter the daemon's: nsenter --mount --target {os.getpid()}"
    )


def _copy_of_another(pid: int, there: int) -> int:
    """The descriptor of a detached copy of the mount on which ``there`` is open, in the mount namespace of process ``pid``: to
    be written to.  Raises OSError, and NoThread."""

    def copy() -> int:
        namespaces.enter(pid)  # this thread, which ends after this
        return mountapi.copy_tree(there)

    with ThreadPoolExecutor(1) as own_thread:
        try:
            submitted = own_thread.submit(copy)
        except RuntimeError:
            raise NoThread() from None
        tree = submitted.result()
    unwanted = mountapi.MOUNT_ATTR_RDONLY | mountapi.MOUNT_ATTR_NOSUID | mountapi.MOUNT_ATTR_NODEV | mountapi.MOUNT_ATTR_NOEXEC
    with suppress(OSError):
        mountapi.mount_setattr(tree, 0, clear=unwanted)
    return tree
