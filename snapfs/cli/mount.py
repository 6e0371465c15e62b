"""``snapfs mount`` and ``snapfs umount``: what mounts.json says, by the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from itertools import islice

from snapfs.cli import table
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.listing import rows
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import BUSY, FAILED, NOT_PERMITTED, Refusal
from snapfs.cli.within import covered
from snapfs.kernel.forks import undisturbed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from snapfs.cli.place import MountedTree
    from snapfs.kernel.mounttable import MountPoint
    from snapfs.kernel.trusted import Found
    from snapfs.root.mounted import Place


def _mount(given: Given) -> int:
    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("mounted")
    mount_on(place, place.key(given.arguments[0]), given.arguments[1], suid=given.has("suid"), dev=given.has("dev"))
    return 0


def mount_on(place: MountedTree, key: str, directory: str, *, suid: bool = False, dev: bool = False) -> None:
    """Mount the file system of the active snapshot or view ``key`` on ``directory``, in the namespaces of the daemon, where it
    has some of its own; this process is in there then.  ``suid`` and ``dev``: let setuid programs and device nodes in it work.
    Raises Refusal."""
    from snapfs.kernel import trusted

    kind, shown_at = place.find(key)
    if kind == "committed":
        from snapfs.names import word

        raise Refusal(f'"{key}" is committed: make a view of it and mount that: snapfs view VIEW --parent {word(key)}')
    number: int = json.loads(place.read(f"{shown_at}/info.json"))["id"]
    specs = json.loads(place.read(f"{shown_at}/mounts.json"))
    layers = _layers(place, key, kind, number)
    target = os.path.abspath(directory)
    options = place.options()
    with contextlib.ExitStack() as held:
        window = enter(place, options)
        with trusting(f'mount "{key}" on', directory):
            found = held.enter_context(trusted.find(target, may_lack=True))
        if f"{found.path}/".startswith(f"{place.path}/"):
            raise Refusal(f"{directory} lies in the tree: mount it elsewhere")
        shown = _shown(options["root"], layers, kind)
        if _mount_at(shown, specs, key, kind, found, _attributes(suid=suid, dev=dev)):
            _let_write(place, number, specs, key, kind, found.path)
        if window:
            table.complain(f"mounted for the daemon and what snapfs starts; others reach it as {window}{found.path}")


def enter(place: MountedTree, options: dict[str, Any]) -> str:
    """Enter the namespaces of the daemon that serves the tree and has these ``options``, where it has some of its own, in which
    alone the user may mount: before the paths there what leads to them from outside; "" where there are none.  The working
    directory is another one then, and the tree may not be seen.  Raises Refusal.

    What is needed afterwards is imported before: in there something else may stand at the place of a module."""
    window: str = options["window"]
    if window:
        from snapfs import errors, names  # noqa: F401
        from snapfs.cli import daemon, within  # noqa: F401
        from snapfs.kernel import mountapi, mounting, mounttable, overlay, processes, trusted, userns  # noqa: F401
        from snapfs.root import mounted  # noqa: F401

        try:
            with daemon.proven(place, options["pid"]) as process:
                userns.join(process, mounts=True)
        except OSError as error:
            hint = "leave the workspace that you stand in, or see whether the daemon is yours"
            raise Refusal(f"cannot mount for the daemon of {place.path}: {error.strerror}: {hint}", NOT_PERMITTED) from None
    return window


@contextlib.contextmanager
def trusting(doing: str, target: str) -> Iterator[None]:
    """For a block that is ``doing`` something to TARGET; raises Refusal where somebody else could lead it elsewhere."""
    from snapfs.kernel.trusted import Untrusted

    try:
        yield
    except Untrusted as error:
        to_do = "use a directory of yours, below directories that nobody else can write, such as /mnt or /srv"
        raise Refusal(f"cannot {doing} {target}: {error}; {to_do}", NOT_PERMITTED) from None
    except OSError as error:
        raise Refusal(f"cannot {doing} {target}: {error.strerror}") from None


def _attributes(*, suid: bool, dev: bool) -> int:
    """What holds for all that is mounted: no program gets another user's rights there, and no device node works."""
    from snapfs.kernel import mountapi

    return mountapi.MOUNT_ATTR_NOSUID * (not suid) | mountapi.MOUNT_ATTR_NODEV * (not dev)


def _layers(place: MountedTree, key: str, kind: str, number: int) -> list[int]:
    """The ids of the layers that the snapshot ``key`` with the id ``number`` shows as one, the nearest first; that of an active
    one alone."""
    if kind == "active":
        return [number]
    known = {row.name: row for row in rows(place)}
    row = known.get(key)
    found = []
    while row is not None:
        found += [row.id] * (row.kind == "committed")
        row = known.pop(row.parent, None) if row.parent is not None else None
    return found or [number]


def _shown(root: str, layers: Sequence[int], kind: str) -> list[Place]:
    """The mounts of a snapshot, in this process's own mount table, whatever the tree tells of them; the kernel says what they
    show, as far as it does."""
    from snapfs.root.mounted import Mounted

    mounted = Mounted(f"{root}/snapshots")
    try:
        return mounted.shown(layers[0]) if kind == "active" else mounted.shown_as_one(layers)
    finally:
        mounted.close()


def _mount_at(
    shown: Sequence[Place], specs: Sequence[dict[str, Any]], key: str, kind: str, found: Found, attributes: int
) -> bool:
    """Mount it, read-only until it is known to be still what it was; False where it is another mount of what is mounted."""
    from snapfs.kernel import mounting, overlay

    target = found.path
    if found.missing or not stat.S_ISDIR(os.fstat(found.fd).st_mode):
        from snapfs.names import word

        to_do = f"make it first: mkdir {word(target)}" if found.missing else "give a directory"
        raise Refusal(f"{target}, where it is to be mounted, is no directory: {to_do}")
    if target in (each.target for each in shown):
        raise Refusal(f'"{key}" is mounted on {target} already', BUSY)
    writable = [each for each in shown if each.writable]
    if kind == "active" and writable and _bind(writable[0], found.fd, attributes):
        return False
    for spec in specs:
        options: list[str] = spec["options"]
        if any(option.startswith(("uidmap=", "gidmap=")) for option in options):
            raise Refusal(f'"{key}" wants its ids mapped, which a container runtime does from mounts.json')
        try:
            if spec["type"] == "bind":
                mounting.mount_bind(spec["source"], found.fd, read_only=True, attributes=attributes)
                continue
            given = dict(option.partition("=")[::2] for option in options)
            lowers = [_plain(part) for part in re.findall(r"((?:[^\\:]|\\.)+)(?::|\Z)", given.pop("lowerdir"))]
            upper, work = (_plain(given.pop(name)) if name in given else None for name in ("upperdir", "workdir"))
            others = [f"{name}={value}" if value else name for name, value in given.items()]
            overlay.mount_overlay(found.fd, lowers, upper, work, others, read_only=True, attributes=attributes)
        except OSError as error:
            status = NOT_PERMITTED if isinstance(error, PermissionError) else FAILED
            raise Refusal(f'cannot mount "{key}" on {target}: {error.strerror}', status) from None
    return True


def _let_write(place: MountedTree, number: int, specs: Sequence[dict[str, Any]], key: str, kind: str, target: str) -> None:
    """Make what was mounted on ``target`` by ``specs`` writable, if it is an active snapshot's, and still the one that has the
    id ``number`` in the tree: what is mounted can't be committed or removed from now on.  Another user of the tree may have
    done so, or given its key to another, since it was looked up.  Raises Refusal, and then nothing is mounted."""
    from snapfs.kernel import mounting

    try:
        with in_use(specs[0]["source"]) if specs[0]["type"] == "bind" and kind == "active" else contextlib.nullcontext():
            why = _changed(place, number, specs, kind)
            if why:
                raise Refusal(f'"{key}" {why} a moment ago: it is not mounted', BUSY)
            if kind == "active":
                mounting.make_writable(target)
    except BaseException as error:
        mounting.unmount(target, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
        if isinstance(error, OSError):
            raise Refusal(f'cannot mount "{key}" on {target}: {error.strerror}') from None
        raise


def _changed(place: MountedTree, number: int, specs: Sequence[dict[str, Any]], kind: str) -> str:
    """What has become of the snapshot of ``kind`` with this id in the tree, whose mounts ``specs`` were; "" for nothing.

    mounts.json is read before info.json: to open it waits for a commit, or a removal, that began before there was the mount."""

    def read(name: str) -> Any:
        try:
            path = place.within.unlinked(f"{place.path}/by-id/{number}", ["by-id"])
            with open(place.within.open(f"{path}/{name}", os.O_RDONLY), encoding="utf-8", errors="surrogateescape") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    now, info = read("mounts.json"), read("info.json")
    if info is None:
        return "was removed"
    if info["kind"] != kind:
        return f"was {info['kind']}"
    own = [specs[0]["source"], *specs[0]["options"]] if kind == "active" else []
    of_it = any(each.endswith(f"/{number}/fs") and "lowerdir=" not in each for each in own) if own else True
    return "" if now == specs and info["id"] == number and of_it else "became another"


@contextlib.contextmanager
def in_use(layer: str, process: str = "") -> Iterator[None]:
    """For a block: the directory ``layer`` bound so that it can be written, which the daemon takes for use, where nobody gets
    at it: in the mount namespace of a child of this process; a bind that is read-only is no use.  ``process``: the directory in
    /proc of the daemon, where its user namespace is needed to mount.  Raises OSError."""
    import socket

    from snapfs.kernel import mounting, userns

    ours, its = socket.socketpair()
    with undisturbed():
        child = os.fork()
    if child == 0:
        try:
            if process:
                userns.join(process, mounts=False)
            userns.copy_mounts()
            os.closerange(3, its.fileno())  # no lock of the parent's outlives it
            os.closerange(its.fileno() + 1, 1 << 16)
            mounting.mount_bind(layer, layer, read_only=False)
            its.send(b"0")
            its.recv(1)  # until the parent's end is closed
            # by itself it would go some time after this process, or when somebody else lets go of the namespace
            mounting.unmount(layer, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            its.send(str(error.errno).encode())
        finally:
            os._exit(0)
    its.close()
    try:
        number = int(ours.recv(16) or b"5")
        if number:
            raise OSError(number, os.strerror(number))
        yield
    finally:
        ours.close()
        os.waitpid(child, 0)


def _bind(source: Place, target: int, attributes: int) -> bool:
    """Bind the mount ``source`` to the directory open as ``target``; False where it is not mounted any more.  A second overlay
    must not write to the same layer.  Raises Refusal where something else is mounted over it."""
    from snapfs.kernel import mounting
    from snapfs.kernel.mounttable import mount_id_of, mount_table

    with contextlib.suppress(FileNotFoundError):
        # it asks no server; and what is held the daemon doesn't unmount
        held = os.open(source.target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if mount_id_of(held) == source.id:
                mounting.mount_bind(f"/proc/self/fd/{held}", target, read_only=False, attributes=attributes)
                return True
            _uncovered(mount_table(), source.target)
        finally:
            os.close(held)
    return False


def _plain(path: str) -> str:
    return re.sub(r"\\(.)", r"\1", path)


def _is_ours(mount: MountPoint) -> bool:
    """Whether ``mount`` is a tree of snapfs, or shows layers of a snapshot."""
    return mount.type == "fuse.snapfs" or _shows_layers(mount)


def _shows_layers(mount: MountPoint) -> bool:
    layers = [mount.root] if mount.type != "overlay" else [each for each in mount.super_options if "dir" in each]
    return any(re.search(r"(?:^|[=:/])[1-9][0-9]*/fs(?=[/:]|\Z)", each) for each in layers)


def _uncovered(table: Iterable[MountPoint], target: str) -> None:
    """Raise Refusal where the uppermost of the mounts of ``table`` at ``target`` hides the file system of a snapshot: whoever
    may write in that can mount there."""
    mounts = [mount for mount in table if mount.target == target]
    top = mounts[-1] if mounts else None
    if top is not None and not _shows_layers(top) and any(map(_shows_layers, mounts)):
        raise covered(top, top.target, f"the snapshot on {top.target}")


def _umount(given: Given) -> int:
    from snapfs.kernel.mounttable import mount_table

    word = given.arguments[0]
    table = list(mount_table())
    shown = {mount.target: mount for mount in table}  # the uppermost is the last
    target = _unlinked(word) if "/" in word else ""  # else it is a key, whatever is called so in the working directory
    found = shown.get(target)
    if target and found is None:
        found = _entered(given, target)
    if found is not None:
        _uncovered(table, target)
    if found is not None and not _is_ours(found):
        raise Refusal(f"{target} is no snapshot's file system: nothing for snapfs to unmount")
    places = [found] if found else []
    if not places:
        place = find_tree(given.value("at"), changes=True)
        place.refuse_foreign("unmounted")
        word = place.key(word)
        kind, _ = place.find(word)
        places = mounts_of(place, word)
        if not places:
            raise Refusal(f'"{word}" ({kind}) is not mounted, but perhaps as its rootfs, which needs no umount')
    for mount in places:
        unmount(mount)
    return 0


def mounts_of(place: MountedTree, key: str) -> list[MountPoint]:
    """The mounts of snapshot ``key`` but for its rootfs, the uppermost first, in the namespaces of the daemon, where it has
    some of its own; this process is in there then.  Raises Refusal where something else is mounted over one."""
    from snapfs.kernel.mounttable import mount_table

    kind, directory = place.find(key)
    layers = _layers(place, key, kind, json.loads(place.read(f"{directory}/info.json"))["id"])
    options = place.options()
    enter(place, options)
    by_hand = [
        each for each in _shown(options["root"], layers, kind) if not each.target.startswith(f"{options['root']}/rootfs/")
    ]
    table = list(mount_table())
    top = {mount.target: mount for mount in table}
    numbers = {each.id for each in by_hand}
    for each in by_hand:
        if each.target in top and top[each.target].id not in numbers:
            raise covered(top[each.target], each.target, f"the snapshot on {each.target}")
    return [mount for mount in reversed(table) if mount.id in numbers]


def unmount(mount: MountPoint) -> None:
    """Unmount ``mount``, and nothing that has come to its place since.  Raises Refusal.

    umount2(2) takes a path alone.  It is one below the directory that is held, which nobody else can exchange, and a moment
    before the kernel tells what is mounted there: what is held itself it would not unmount.  The id of a mount that is gone
    goes to the next one."""
    from snapfs.kernel import mounting, trusted
    from snapfs.kernel.mounttable import mount_id_of, mount_table

    def what(mount: MountPoint) -> tuple[object, ...]:
        return mount.id, mount.device, mount.root, mount.type, mount.super_options

    path = mount.target
    directory, name = os.path.split(path)
    with trusting("unmount what is in", directory):
        above = trusted.find(directory, inside=True)
    with above:
        try:
            held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above.fd)
            try:
                number = mount_id_of(held)
                there = [what(each) for each in mount_table() if each.id == number]
            finally:
                os.close(held)
            if there != [what(mount)]:
                raise Refusal(f"what was mounted on {path} has just been unmounted, or covered: it is left as it is", BUSY)
            mounting.unmount(f"/proc/self/fd/{above.fd}/{name}", mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            words = _why_busy(path) if error.errno == 16 else error.strerror
            raise Refusal(f"cannot unmount {path}: {words}", BUSY if error.errno == 16 else NOT_PERMITTED) from None


def how_to_unmount(place: MountedTree, word: str, target: str) -> str:
    """What to do about a snapshot, which ``word`` names, that is mounted by hand on ``target``, as the daemon has it: words
    that go on from a colon."""
    from snapfs import names
    from snapfs.kernel.mounttable import mount_table

    if not place.is_trusted():
        return "whoever has mounted it can unmount it"
    options = place.options()
    if not options["window"] and not any(mount.target == target for mount in mount_table()):
        where = f"in the mount namespace of the daemon, pid {options['pid']}"
        return f"unmount it there, {where}: nsenter -t {options['pid']} -m umount {names.word(target)}"
    whose = ", as root" * (not options["window"] and os.geteuid() != 0)
    return f"unmount it first{whose} ({place.command('umount', word)})"


def _why_busy(target: str) -> str:
    """Why what is mounted at ``target`` can't be unmounted: the mount inside it that is in the way, or who uses it."""
    from snapfs.kernel.mounttable import mount_table
    from snapfs.kernel.processes import users

    inside = next((mount.target for mount in reversed(list(mount_table())) if mount.target.startswith(f"{target}/")), "")
    if inside:
        return f"{inside} is mounted inside it: unmount that first"
    by = ", ".join(f"{pid} ({name})" for pid, name in islice(users(target), 5))
    return f"{target} is in use" + f" by process {by}" * bool(by)


def _entered(given: Given, target: str) -> MountPoint | None:
    """What the daemon of the tree, where it has namespaces of its own, has mounted at ``target``; this process is in there
    then. None where there is no such thing, and this process is where it was."""
    from snapfs.kernel.mounttable import lines_of, parse

    with contextlib.suppress(Refusal, OSError):
        place = find_tree(given.value("at"), tell=False)
        options = place.options()
        if options["window"] and place.is_trusted():
            shown = {mount.target: mount for mount in map(parse, lines_of(options["pid"]))}
            if target in shown:
                enter(place, options)
                return shown[target]
    return None


def _unlinked(path: str) -> str:
    """``path`` without links; raises Refusal where it might be another one by the time it is unmounted.  Below what is no
    directory nothing can be mounted: that is some key."""
    from snapfs.kernel import trusted

    with trusting("unmount what is in", os.path.dirname(path)):
        try:
            return trusted.above(path)
        except (FileNotFoundError, NotADirectoryError):
            return path


VERBS = {
    "mount": Verb(
        "mount",
        "KEY TARGET",
        (
            Option("suid", "let setuid programs in it work"),
            Option("dev", "let device nodes in it work"),
        ),
        "Mount the file system of an active snapshot or a view on the directory TARGET, as its mounts.json says.\n"
        "TARGET must be yours or root's, and below directories that nobody else can write.",
        """
snapfs mount web /mnt/web
""",
        _mount,
    ),
    "umount": Verb(
        "umount",
        "KEY|TARGET",
        (),
        "Unmount a snapshot's file system from TARGET, or wherever the snapshot KEY is mounted.",
        """
snapfs umount /mnt/web
snapfs umount web
""",
        _umount,
    ),
}
