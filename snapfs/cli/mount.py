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
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import BUSY, FAILED, NOT_PERMITTED, Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from snapfs.cli.place import MountedTree
    from snapfs.kernel.mounttable import MountPoint
    from snapfs.kernel.trusted import Found


def _mount(given: Given) -> int:
    from snapfs.kernel import trusted

    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("mounted")
    key = place.key(given.arguments[0])
    kind, directory = place.find(key)
    if kind == "committed":
        from snapfs.names import word

        raise Refusal(f'"{key}" is committed: make a view of it and mount that: snapfs view VIEW --parent {word(key)}')
    info = json.loads(place.read(f"{directory}/info.json"))
    mounted: list[str] = info["mounted"]
    number: int = info["id"]
    specs = json.loads(place.read(f"{directory}/mounts.json"))
    target = os.path.abspath(given.arguments[1])
    with contextlib.ExitStack() as held:
        tree = os.open(place.path, os.O_PATH | os.O_DIRECTORY)  # in the daemon's namespaces its path may be none
        held.callback(os.close, tree)
        window = enter(place)
        with _trusted(f'mount "{key}" on', given.arguments[1]):
            found = held.enter_context(trusted.find(target, may_lack=True))
        if f"{found.path}/".startswith(f"{place.path}/"):
            raise Refusal(f"{given.arguments[1]} lies in the tree: mount it elsewhere")
        mounted = [each.removeprefix(window) for each in mounted]
        if _mount_at(mounted, specs, key, kind, found, _attributes(given)):
            _let_write(f"/proc/self/fd/{tree}/by-id/{number}", specs, key, kind, found.path)
        if window:
            table.complain(f"mounted for the daemon and what snapfs starts; others reach it as {window}{found.path}")
    return 0


def enter(place: MountedTree) -> str:
    """Enter the namespaces of the daemon that serves the tree, where it has some of its own, in which alone the user may mount:
    before the paths there what leads to them from outside; "" where there are none.  The working directory is another one then,
    and the tree may not be seen.  Raises Refusal."""
    options = place.options()
    window: str = options["window"]
    if window:
        from snapfs.kernel import userns

        try:
            userns.join(options["pid"], mounts=True)
        except OSError as error:
            hint = "leave the workspace that you stand in, or see whether the daemon is yours"
            raise Refusal(f"cannot mount for the daemon of {place.path}: {error.strerror}: {hint}", NOT_PERMITTED) from None
    return window


@contextlib.contextmanager
def _trusted(doing: str, target: str) -> Iterator[None]:
    """For a block that is ``doing`` something to TARGET; raises Refusal where somebody else could lead it elsewhere."""
    from snapfs.kernel.trusted import Untrusted

    try:
        yield
    except Untrusted as error:
        to_do = "use a directory of yours, below directories that nobody else can write, such as /mnt or /srv"
        raise Refusal(f"cannot {doing} {target}: {error}; {to_do}", NOT_PERMITTED) from None
    except OSError as error:
        raise Refusal(f"cannot {doing} {target}: {error.strerror}") from None


def _attributes(given: Given) -> int:
    """What holds for all that is mounted: no program gets another user's rights there, and no device node works."""
    from snapfs.kernel import mountapi

    return mountapi.MOUNT_ATTR_NOSUID * (not given.has("suid")) | mountapi.MOUNT_ATTR_NODEV * (not given.has("dev"))


def _mount_at(
    mounted: Sequence[str], specs: Sequence[dict[str, Any]], key: str, kind: str, found: Found, attributes: int
) -> bool:
    """Mount it, read-only until it is known to be still what it was; False where it is another mount of what is mounted."""
    from snapfs.kernel import mounting, overlay

    target = found.path
    if found.missing or not stat.S_ISDIR(os.fstat(found.fd).st_mode):
        from snapfs.names import word

        to_do = f"make it first: mkdir {word(target)}" if found.missing else "give a directory"
        raise Refusal(f"{target}, where it is to be mounted, is no directory: {to_do}")
    if target in mounted:
        raise Refusal(f'"{key}" is mounted on {target} already', BUSY)
    if kind == "active" and mounted and _bind(mounted[0], found.fd, attributes):
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


def _let_write(directory: str, specs: Sequence[dict[str, Any]], key: str, kind: str, target: str) -> None:
    """Make what was mounted on ``target`` by ``specs`` writable, if it is an active snapshot's, and still the one that has
    ``directory`` in the tree: what is mounted can't be committed or removed from now on.  Another user of the tree may have
    done so, or given its key to another, since it was looked up.  Raises Refusal, and then nothing is mounted."""
    from snapfs.kernel import mounting

    try:
        with _in_use(specs[0]["source"]) if specs[0]["type"] == "bind" and kind == "active" else contextlib.nullcontext():
            why = _changed(directory, specs, kind)
            if why:
                raise Refusal(f'"{key}" {why} a moment ago: it is not mounted', BUSY)
            if kind == "active":
                mounting.make_writable(target)
    except BaseException as error:
        mounting.unmount(target, mounting.MNT_DETACH | mounting.UMOUNT_NOFOLLOW)
        if isinstance(error, OSError):
            raise Refusal(f'cannot mount "{key}" on {target}: {error.strerror}') from None
        raise


def _changed(directory: str, specs: Sequence[dict[str, Any]], kind: str) -> str:
    """What has become of the snapshot of ``kind`` with ``directory`` in the tree, whose mounts ``specs`` were; "" for nothing.

    mounts.json is read before info.json: to open it waits for a commit, or a removal, that began before there was the mount."""

    def read(name: str) -> Any:
        try:
            with open(f"{directory}/{name}", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    now, info = read("mounts.json"), read("info.json")
    number = os.path.basename(directory)
    if info is None:
        return "was removed"
    if info["kind"] != kind:
        return f"was {info['kind']}"
    own = [specs[0]["source"], *specs[0]["options"]] if kind == "active" else []
    of_it = any(each.endswith(f"/{number}/fs") and "lowerdir=" not in each for each in own) if own else True
    return "" if now == specs and str(info["id"]) == number and of_it else "became another"


@contextlib.contextmanager
def _in_use(layer: str) -> Iterator[None]:
    """For a block: the directory ``layer`` bound so that it can be written, which the daemon takes for use, where nobody gets
    at it: in the mount namespace of a child of this process.  A bind that is read-only is no use.  Raises OSError."""
    import socket

    from snapfs.kernel import mounting, userns

    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            userns.copy_mounts()
            mounting.mount_bind(layer, layer, read_only=False)
            its.send(b"0")
            its.recv(1)  # until our end is closed
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


def _bind(source: str, target: int, attributes: int) -> bool:
    """Bind the mount at ``source`` to the directory open as ``target``; False where nothing is mounted at ``source`` any more.
    A second overlay must not write to the same layer.  Raises Refusal where something else is mounted over ``source``."""
    from snapfs.kernel import mounting
    from snapfs.kernel.mounttable import mount_id_of, mount_table

    with contextlib.suppress(FileNotFoundError):
        # it asks no server; and what is held the daemon doesn't unmount
        held = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if any(mount.id == mount_id_of(held) for mount in _uncovered(mount_table(), source)):
                mounting.mount_bind(f"/proc/self/fd/{held}", target, read_only=False, attributes=attributes)
                return True
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


def _uncovered(table: Iterable[MountPoint], target: str) -> list[MountPoint]:
    """The mounts of ``table`` at ``target``.  Raises Refusal where the uppermost hides the file system of a snapshot: whoever
    may write in that can mount there."""
    mounts = [mount for mount in table if mount.target == target]
    top = mounts[-1] if mounts else None
    if top is not None and not _shows_layers(top) and any(map(_shows_layers, mounts)):
        from snapfs.kernel import trusted
        from snapfs.names import word

        owner = trusted.server_of(top)
        whose = f" of the user {trusted.user_name(owner)}" * (owner >= 0)
        what = f"something else ({top.type}{whose}) is mounted over the snapshot on {top.target}"
        raise Refusal(f"{what}: unmount that first: umount {word(top.target)}", BUSY)
    return mounts


def _umount(given: Given) -> int:
    from snapfs.kernel import mounting
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
    places = [target] if found else []
    if not places:
        place = find_tree(given.value("at"), changes=True)
        place.refuse_foreign("unmounted")
        word = place.key(word)
        kind, directory = place.find(word)
        mounted = place.mounted_by_hand(directory)
        specs = json.loads(place.read(f"{directory}/mounts.json")) if kind == "active" else []
        if window := enter(place):
            table = list(mount_table())
            shown = {mount.target: mount for mount in table}
            mounted = [each.removeprefix(window) for each in mounted]
        mounted += [each for each in _left_unwritable(table, specs) if each not in mounted]
        for each in mounted:
            _uncovered(table, each)
        ours = [each for each in mounted if each in shown and _is_ours(shown[each])]  # the daemon may see other mounts than we
        places = [_unlinked(each) for each in ours]
        if not places:
            raise Refusal(f'"{word}" ({kind}) is not mounted, but perhaps as its rootfs, which needs no umount')
    for each in places:
        try:
            mounting.unmount(each, mounting.UMOUNT_NOFOLLOW)
        except OSError as error:
            words = _why_busy(each) if error.errno == 16 else error.strerror
            raise Refusal(f"cannot unmount {each}: {words}", BUSY if error.errno == 16 else NOT_PERMITTED) from None
    return 0


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


def _left_unwritable(table: Iterable[MountPoint], specs: Sequence[dict[str, Any]]) -> list[str]:
    """Where ``table`` has what an active snapshot's ``specs`` mount, read-only: a ``snapfs mount`` that was killed has left it,
    and the daemon takes it for nobody's."""
    from snapfs.root.mounted import origin

    found = []
    for spec in specs:
        upper = [_plain(option[9:]) for option in spec["options"] if option.startswith("upperdir=")]
        layer = origin(spec["source"]) if spec["type"] == "bind" else None
        for mount in table:
            uppers = [_plain(option[9:]) for option in mount.super_options if option.startswith("upperdir=")]
            shows = mount.root == "/" and uppers == upper if upper else (mount.device, mount.root) == layer
            if shows and "ro" in mount.options:
                found.append(mount.target)
    return found


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
                enter(place)
                return shown[target]
    return None


def _unlinked(path: str) -> str:
    """``path`` without links; raises Refusal where it might be another one by the time it is unmounted.  Below what is no
    directory nothing can be mounted: that is some key."""
    from snapfs.kernel import trusted

    with _trusted("unmount what is in", os.path.dirname(path)):
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
