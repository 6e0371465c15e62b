"""``snapfs shell`` and ``snapfs run``: a program that stands inside a workspace, in a mount namespace of its own.

Where the daemon is an ordinary user's, the workspace is mounted in the daemon's namespaces.  A program that gets there through
/proc can look and copy, but learns paths of a namespace that it is not in.  So it gets a namespace of its own: a copy of all
mounts that the user sees, and the workspace in it where the daemon has it.  A child fetches that from the daemon's namespace as
a descriptor, for there is no way back from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import signal
import socket
import stat

from snapfs.cli.grammar import Given, Option, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import NOT_PERMITTED, Refusal, changed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from snapfs.cli.place import MountedTree

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell's


def _shell(given: Given) -> int:
    shell = os.environ.get("SHELL") or ""
    if not os.access(shell, os.X_OK):
        with contextlib.suppress(KeyError):
            shell = pwd.getpwuid(os.getuid()).pw_shell
    _stand_inside(given)
    return _become([shell if os.access(shell, os.X_OK) else "/bin/sh"])


def _run(given: Given) -> int:
    _stand_inside(given)
    return _become(given.arguments[1:])


def _become(words: list[str]) -> int:
    """Go on as the program ``words``: its exit status is this process's, its terminal too, and so are the signals.  Raises
    Refusal."""
    from shutil import which

    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        number = error.errno or errno.ENOEXEC
        if "/" not in words[0] and which(words[0]) is None:  # though the last place to look in may be closed to us
            number = errno.ENOENT
        status = NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE
        raise Refusal(f"cannot run {words[0]}: {os.strerror(number)}", status) from None


def _stand_inside(given: Given) -> None:
    """Move this process to where it sees the workspace, and into it.  Raises Refusal."""
    from snapfs.kernel import mounting, subids, trusted, userns

    place = find_tree(given.value("at"), changes=True)
    place.refuse_foreign("run in")
    key = place.key(given.arguments[0])
    kind, directory = place.find(key)
    options = place.options()
    window: str = options["window"]
    if not options["features"]["rootfs"]["on"]:
        raise Refusal(f'cannot get into "{key}": there is no rootfs: {options["features"]["rootfs"]["why"]}')
    if given.has("subids") and window and not options["subids"]["on"]:
        raise Refusal(f"cannot have the ids of /etc/subuid in there: {options['subids']['why']}; then start the daemon anew")
    over = given.value("over")
    before = os.getcwd()
    with contextlib.ExitStack() as held:
        if over is not None:
            over = _checked(place, options["root"], over)
        target = place.rootfs(kind, key)
        try:
            if window and target.startswith(f"{window}/"):
                target = target.removeprefix(window)
                _fetch(options["pid"], target)
            elif window:
                _refuse_another(key, target)
            else:
                userns.copy_mounts()
            _refuse_changed(key, directory, target)
            if over is not None:
                mounting.mount_bind(target, held.enter_context(trusted.find(over)).fd, read_only=False)
            if (given.has("root") or given.has("subids")) and os.geteuid() != 0:
                why_not = userns.enter(root=True, lent=subids.mapped_here() if given.has("subids") else None)
                if why_not:  # in a workspace already a program has no right to hand the ids on
                    to_do = f'leave "{inside}" first' if (inside := os.environ.get("SNAPFS_WORKSPACE")) else why_not
                    raise Refusal(f"cannot have the ids of /etc/subuid in there: {to_do}", NOT_PERMITTED)
        except OSError as error:
            _refuse_changed(key, directory, target)
            hint = "run it as root" if not window and os.geteuid() != 0 else "is the daemon yours?"
            raise Refusal(f'cannot get into "{key}": {error.strerror}: {hint}', NOT_PERMITTED) from None
    _go(target if over is None else before if f"{before}/".startswith(f"{over}/") else over, over or target)
    os.environ["SNAPFS_WORKSPACE"] = key
    os.environ.setdefault("SNAPFS", place.path)


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


def _fetch(daemon: int, target: str) -> None:
    """Enter a mount namespace that has what process ``daemon`` has mounted at ``target``, where that has it.  Raises
    OSError."""
    from snapfs.kernel import mountapi, shelter, userns

    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            userns.join(daemon, mounts=True)
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
    userns.join(daemon, mounts=False)
    userns.copy_mounts()
    shelter.attach(fds[0], os.path.dirname(target))


def _refuse_another(key: str, target: str) -> None:
    """Raise Refusal unless this process, which is in a workspace already, has ``target`` there."""
    if not os.path.ismount(target):
        inside = os.environ.get("SNAPFS_WORKSPACE", "another one")
        raise Refusal(f'cannot get into "{key}" from inside of "{inside}": leave that first', NOT_PERMITTED)


def _refuse_changed(key: str, directory: str, target: str) -> None:
    """Raise Refusal unless what is at ``target`` still is the workspace: from now on, as this process has it, it can't be
    committed or removed, but up to now it could."""
    try:
        now = os.readlink(f"{directory}/rootfs")
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
    Option("over", "have the workspace at this directory's path, and hide the directory", "DIR"),
    Option("root", "be root in there, as far as a user can be: ids other than yours stay unknown"),
    Option("subids", "be root in there, and have the ids that /etc/subuid and /etc/subgid lend you as those of others"),
)

VERBS = {
    "shell": Verb(
        "shell",
        "KEY",
        _OPTIONS,
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
        _OPTIONS,
        "Run a command that stands in the file system of the snapshot KEY, in a mount namespace of its own.\n"
        "The exit status is the command's, or 127 where there is no such command, 126 where it can't be run.",
        """
snapfs run web -- make test
snapfs run web --over ~/project -- git status
""",
        _run,
    ),
}
