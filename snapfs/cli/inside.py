"""``snapfs shell`` and ``snapfs run``: a program that stands inside a workspace, in a mount namespace of its own.

Where the daemon is an ordinary user's, the workspace is mounted in the daemon's namespaces.  A program that gets there through
/proc can look and copy, but learns paths of a namespace that it is not in.  So it gets a namespace of its own: a copy of all
mounts that the user sees, and the workspace in it where the daemon has it.  A child fetches that from the daemon's namespace as
a descriptor, for there is no way back from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import signal
import socket
import stat

from snapfs.cli import confining
from snapfs.cli.adopt import over_of
from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import NOT_PERMITTED, USAGE, Refusal, changed
from snapfs.kernel.forks import undisturbed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.cli.place import MountedTree

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell's

WAYS = ("keep", "apply", "discard")  # what may become of a workspace that was made for one command


def _shell(given: Given) -> int:
    shell = os.environ.get("SHELL") or ""
    if not os.access(shell, os.X_OK):
        with contextlib.suppress(KeyError):
            shell = pwd.getpwuid(os.getuid()).pw_shell
    place = find_tree(given.value("at"), changes=True)
    return work_inside(place, place.key(given.arguments[0]), [shell if os.access(shell, os.X_OK) else "/bin/sh"], given)


def _run(given: Given) -> int:
    chosen = [name for name in WAYS if given.has(name)]
    if given.has("from"):
        from snapfs.cli.trying import run_from

        return run_from(given, chosen)
    if chosen:
        raise Refusal(f"--{chosen[0]} goes with --from: what is done in KEY stays in KEY", USAGE)
    place = find_tree(given.value("at"), changes=True)
    return work_inside(place, place.key(given.arguments[0]), given.arguments[1:], given)


def work_inside(place: MountedTree, key: str, words: list[str], given: Given, over: str | None = None) -> int:
    """Go on as the program ``words``, which stands in the workspace ``key``; by default at ``over``.  Raises Refusal."""
    bubblewrap = confining.find() if given.has("confine") else ""
    if given.has("net") and not bubblewrap:
        raise Refusal("--net goes with --confine: nothing else takes the network away", USAGE)
    over = given.value("over") or over
    inside, there = _stand_inside(place, key, given, over, hide=not bubblewrap)
    if bubblewrap:
        if "/" not in words[0] and not _is_program(words[0]):
            raise Refusal(f"cannot run {words[0]}: {os.strerror(errno.ENOENT)}", NOT_FOUND)
        confining.close_off()
        words = confining.words(inside, there, words, net=given.has("net"))
        return _become(bubblewrap, words)
    return _become(words[0], words)


def _become(program: str, words: list[str]) -> int:
    """Go on as ``program``, called with ``words``: its exit status is this process's, its terminal too, and so are the signals.
    Raises Refusal."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(program, words)
    except OSError as error:
        number = error.errno or errno.ENOEXEC
        if "/" not in program and not _is_program(program):  # though the last place to look in may be closed to us
            number = errno.ENOENT
        status = NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE
        raise Refusal(f"cannot run {program}: {os.strerror(number)}", status) from None


def _is_program(word: str) -> bool:
    """Whether $PATH leads to a program of this name."""
    places = (f"{directory}/{word}" for directory in os.get_exec_path())
    return any(os.access(each, os.X_OK) and not os.path.isdir(each) for each in places)


def _stand_inside(place: MountedTree, key: str, given: Given, over: str | None, *, hide: bool) -> tuple[str, str]:
    """Move this process to where it sees the workspace ``key``, and into it: where that is mounted, and where it is to be: at
    ``over``, if that is given.  With ``hide`` it is there, too, and hides what is.  Raises Refusal.

    All modules that are needed afterwards are imported before: the workspace may hide them, by what it holds at their place."""
    import warnings  # noqa: F401, for os.get_exec_path

    from snapfs import errors, names  # noqa: F401, for sentences
    from snapfs.cli import daemon, table  # noqa: F401
    from snapfs.kernel import freezing, mountapi, mounting, shelter, subids, trusted, userns  # noqa: F401

    place.refuse_foreign("run in")
    kind, directory = place.find(key)
    options = place.options()
    window: str = options["window"]
    if not options["features"]["rootfs"]["on"]:
        raise Refusal(f'cannot get into "{key}": there is no rootfs: {options["features"]["rootfs"]["why"]}')
    if given.has("subids") and window and not options["subids"]["on"]:
        raise Refusal(f"cannot have the ids of /etc/subuid in there: {options['subids']['why']}; then start the daemon anew")
    own = freezing.enter()
    over = over or _adopted_over(place, directory, window)
    before = os.getcwd()
    with contextlib.ExitStack() as held:
        if over is not None:
            over = _checked(place, options["root"], over)
        target = place.rootfs(kind, key)
        mark = place.mark(kind, key) if own else ""  # if it still is so when the workspace is in sight
        # what is mounted by hand, as by adopt --over, the tree doesn't tell to whoever is in another namespace
        by_hand = "" if f"{options['root']}/rootfs/" in target else place.read(f"{directory}/info.json")
        try:
            if window and target.startswith(f"{window}/"):
                target = target.removeprefix(window)
                with daemon.proven(place, options["pid"]) as process:
                    _fetch(process, target)
            elif window:
                _refuse_another(key, target)
            else:
                userns.copy_mounts()
            _refuse_changed(place, key, directory, target, by_hand)
            if own:
                freezing.mark(own, mark)
            if over is not None and hide:
                mounting.mount_bind(target, held.enter_context(trusted.find(over)).fd, read_only=False)
            if (given.has("root") or given.has("subids")) and os.geteuid() != 0:
                why_not = userns.enter(root=True, lent=subids.mapped_here() if given.has("subids") else None)
                if why_not:  # in a workspace already a program has no right to hand the ids on
                    to_do = f'leave "{inside}" first' if (inside := os.environ.get("SNAPFS_WORKSPACE")) else why_not
                    raise Refusal(f"cannot have the ids of /etc/subuid in there: {to_do}", NOT_PERMITTED)
        except OSError as error:
            _refuse_changed(place, key, directory, target, by_hand)
            hint = "run it as root" if not window and os.geteuid() != 0 else "is the daemon yours?"
            raise Refusal(f'cannot get into "{key}": {error.strerror}: {hint}', NOT_PERMITTED) from None
    os.environ["SNAPFS_WORKSPACE"] = key
    os.environ.setdefault("SNAPFS", place.path)
    if over is None:
        _go(target, target)
    elif hide:
        _go(before if f"{before}/".startswith(f"{over}/") else over, over)
    return target, over or target


def _adopted_over(place: MountedTree, directory: str, window: str) -> str | None:
    """The directory over which ``snapfs adopt --over`` has said that the workspace at ``directory`` is to stand; None where it
    hasn't, where root has mounted it there, or where others may write the tree, and so what it says of that."""
    if not window or place.is_labelled_by_others(directory):
        return None
    return over_of(place, directory)


def _checked(place: MountedTree, root: str, over: str) -> str:
    """The directory that the workspace is to hide, without links.  Raises Refusal."""
    from snapfs.kernel import trusted

    try:
        with trusted.find(over) as found:
            path = found.path
            if not stat.S_ISDIR(os.fstat(found.fd).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except (trusted.Untrusted, OSError) as error:
        words = error.strerror if isinstance(error, OSError) else error
        raise Refusal(f"cannot put a workspace over {over}: {words}") from None
    for what, hidden in (("the tree", place.path), ("its root", root)):
        if f"{hidden}/".startswith(f"{path.rstrip('/')}/"):
            raise Refusal(f"cannot put a workspace over {over}: it holds {what}, {hidden}, which would be hidden")
    return path


def _fetch(process: str, target: str) -> None:
    """Enter a mount namespace that has what the daemon, whose directory in /proc is ``process``, has at ``target``.  Raises
    OSError."""
    from snapfs.kernel import mountapi, shelter, userns

    ours, theirs = socket.socketpair()
    with undisturbed():
        child = os.fork()
    if child == 0:
        try:
            userns.join(process, mounts=True)
            socket.send_fds(theirs, [b"\0"], [mountapi.open_tree(target)])
        except OSError as error:
            theirs.send(bytes([error.errno or 1]))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        told, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)
    if not fds:
        number = told[0] if told else errno.ESRCH
        raise OSError(number, os.strerror(number))
    userns.join(process, mounts=False)
    userns.copy_mounts()
    shelter.attach(fds[0], os.path.dirname(target))


def _refuse_another(key: str, target: str) -> None:
    """Raise Refusal unless this process, which is in a workspace already, has ``target`` there."""
    if not os.path.ismount(target):
        inside = os.environ.get("SNAPFS_WORKSPACE", "another one")
        raise Refusal(f'cannot get into "{key}" from inside of "{inside}": leave that first', NOT_PERMITTED)


def _refuse_changed(place: MountedTree, key: str, directory: str, target: str, by_hand: str) -> None:
    """Raise Refusal unless what is at ``target`` still is the workspace: from now on, as this process has it, it can't be
    committed or removed, but up to now it could.  ``by_hand``: what its info.json said before, where somebody else has mounted
    it there."""
    try:
        if by_hand:
            if json.loads(place.read(f"{directory}/info.json"))["id"] == json.loads(by_hand)["id"]:
                return
            raise changed(key)
        now = place.within.readlink(f"{directory}/rootfs")
    except OSError:
        now = ""
    if not now.endswith(target):  # without what leads to it from outside
        raise changed(key)


def _go(there: str, instead: str) -> None:
    """Make ``there`` the working directory, or ``instead`` where the workspace has no such directory, or a link that leads
    out of it."""
    for path in (there, instead):
        with contextlib.suppress(OSError):
            os.chdir(path)
            if path != instead and not f"{os.getcwd()}/".startswith(f"{instead}/"):
                continue
            os.environ["PWD"] = path
            return
    raise Refusal(f"cannot work in {instead}: the directory is not yours to enter", NOT_PERMITTED)


_OPTIONS = (
    Option("over", "have the workspace at this directory's path, and hide the directory; adopt --over sets it", "DIR"),
    Option("root", "be root in there, as far as a user can be: ids other than yours stay unknown"),
    Option("subids", "be root in there, and have the ids that /etc/subuid and /etc/subgid lend you as those of others"),
)

_CONFINING = (
    Option("confine", "by bubblewrap: it may write the workspace alone, and has no network"),
    Option("net", "with --confine: it has the network"),
)

VERBS = {
    "shell": Verb(
        "shell",
        "KEY",
        (*_OPTIONS, *_CONFINING),
        "Start a shell that stands in the file system of the snapshot KEY, in a mount namespace of its own.",
        """
snapfs shell web
snapfs shell web --over ~/project
""",
        _shell,
    ),
    "run": Verb(
        "run",
        "KEY CMD…",
        (
            *_OPTIONS,
            Option(
                "from",
                "instead of KEY: a workspace for this command alone, on a snapshot or a copy of a directory",
                "NAME|DIR",
                instead="KEY",
            ),
            Option("keep", "with --from: keep the workspace"),
            Option("discard", "with --from: remove it, whatever it holds"),
            Option("apply", "with --from: bring what changed into DIR (snapfs apply), and remove it"),
            *_CONFINING,
        ),
        "Run a command that stands in the file system of the snapshot KEY, in a mount namespace of its own.\n"
        "The exit status is the command's, or 127 where there is no such command, 126 where it can't be run.\n"
        "With --from, what changed is shown afterwards, on standard error; at a terminal you are asked what becomes of it,\n"
        "elsewhere it is kept.  Of a directory, the workspace is at its path, and the directory itself stays as it is.\n"
        + confining.WHAT,
        """
snapfs run web -- make test
snapfs run web --over ~/project -- git status
snapfs run --from ~/project -- make clean
snapfs run --from v1 --discard --confine -- sh untrusted.sh
""",
        _run,
    ),
}
