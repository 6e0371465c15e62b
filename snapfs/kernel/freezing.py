"""Freezing what ``snapfs run`` has started: in a cgroup of its own, where this process may make one (cgroups(7), version 2).

A frozen process must not stay so when who froze it is killed, even together with all of its cgroup, as systemd does it.  So a
shell in another cgroup does it, which thaws them when its standard input ends.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snapfs.kernel.mounttable import mount_table

PREFIX = "snapfs-run-"
"""How the names of these cgroups begin; the number of a process follows."""

TRIES = 100  # to enter one, while others are just being entered

MOST = 1_000  # cgroups that are frozen together: a program is started with no more words than the kernel lets it have

LONGEST = 5.0  # seconds for the shell to freeze them, and to thaw them: somebody may have frozen the shell

HELD = 5.0  # seconds for which they are frozen at most, however long the block takes

_MARK = "user.snapfs.snapshot"

_SHELL = """
trap '' INT TERM HUP
{ echo $$ > "$1/cgroup.procs" || echo $$ > "$2/cgroup.procs"; } 2>/dev/null
shift 2
for group; do echo 1 > "$group/cgroup.freeze"; done 2>/dev/null
echo; read -r _
for group; do echo 0 > "$group/cgroup.freeze"; done 2>/dev/null
"""


def enter() -> str:
    """Put this process into a cgroup of its own, if it may: the directory of that, or "".  Those that others have left are
    removed."""
    with suppress(OSError):
        top, within = _top(), _path("self")
        if top is None or within is None:
            return ""
        above = top + _without(within)
        for name in os.listdir(above):
            if name.startswith(PREFIX):
                with suppress(OSError):  # it is in use
                    os.rmdir(f"{above}/{name}")
        own = f"{above}/{PREFIX}{os.getpid()}"
        for _ in range(TRIES):
            os.mkdir(own)
            try:
                Path(own, "cgroup.procs").write_text(str(os.getpid()))
                return own
            except FileNotFoundError:  # another process that enters its own has taken it for one that was left
                continue
            except OSError:
                os.rmdir(own)
                break
    return ""


def mark_of(root: str, number: int) -> str:
    """The word for snapshot ``number`` of a root whose own word (``Snapshotter.root_word``) is ``root``, for ``mark`` and
    ``marked``: no other snapshot ever has it, whatever its device number.  "" where the root has none."""
    return f"{root} {number}" if root else ""


def mark(directory: str, snapshot: str) -> None:
    """Note on a cgroup that ``enter`` has made in which ``snapshot`` (``mark_of``) its processes have been started, as far as
    the kernel has such notes (from Linux 5.7 on)."""
    if not snapshot:
        return
    with suppress(OSError):
        os.setxattr(directory, _MARK, snapshot.encode())


def marked(snapshot: str, *, known: Iterable[str] = (), owners: Collection[int] = ()) -> set[str]:
    """The directories of the cgroups that are marked with this ``snapshot``, and in which processes are, wherever these have
    gone since; but for one that this process is in.  Those of which a look at all processes tells, and those that are
    ``known`` from before: a look may miss what is just being started.

    Anybody can mark a cgroup of their own: those count that are root's, this user's, or one of the ``owners``'."""
    found = set[str]()
    for directory in cgroups(_processes() if snapshot else ()).union(known):
        with suppress(OSError):
            is_it = os.getxattr(directory, _MARK) == snapshot.encode() and _is_of(directory, {0, os.geteuid(), *owners})
            if is_it and "populated 1" in Path(directory, "cgroup.events").read_text():
                found.add(directory)
    return found


def members(directories: Collection[str]) -> Iterator[tuple[int, str]]:
    """The processes in these cgroups, and in those below them, each with that of ``directories``; also those
    that have ended, as long as nobody has asked how."""
    top = _top() or ""
    for pid in _processes():
        with suppress(OSError):
            if (directory := f"{top}{_own(_path(str(pid)) or '')}") in directories:
                yield pid, directory


def kill(directory: str) -> None:
    """End all of them at once, also those that are just being started, if this process may (from Linux 5.14 on)."""
    with suppress(OSError):
        Path(directory, "cgroup.kill").write_text("1")


def cgroups(processes: Iterable[int]) -> set[str]:
    """The directories of the cgroups made by ``enter`` in which these processes are, but for one that this process is in."""
    found = set()
    for pid in processes:
        with suppress(OSError):
            if path := _own(_path(str(pid)) or ""):
                found.add(path)
    top = _top() if found else None
    return set() if top is None else {f"{top}{path}" for path in found if not f"{_path('self')}/".startswith(f"{path}/")}


@contextmanager
def frozen(directories: Iterable[str]) -> Iterator[None]:
    """For a block in which the processes in these cgroups do not run, for HELD seconds at most, as far as this process may have
    that: in MOST of them, and of other users' (but root's) just in as many as are left of that."""
    own = {0, os.geteuid()}
    wanted = sorted(directories, key=lambda directory: (not _is_of(directory, own), directory))[:MOST]
    shell = None
    if wanted:
        with suppress(OSError):
            shell = subprocess.Popen(
                ["/bin/sh", "-c", _SHELL, "sh", *_elsewhere(wanted), *wanted],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
    let_go = threading.Timer(HELD, _let_go, [shell])
    let_go.daemon = True
    try:
        if shell is not None and shell.stdout is not None:
            poll = select.poll()
            poll.register(shell.stdout, select.POLLIN)
            poll.poll(LONGEST * 1000)
            with suppress(RuntimeError):  # no thread can be started
                let_go.start()
        yield
    finally:
        let_go.cancel()
        if let_go.ident is not None:
            let_go.join()
        if shell is not None and not _has_ended(shell):
            for directory in wanted:
                with suppress(OSError):
                    Path(directory, "cgroup.freeze").write_text("0")


def _let_go(shell: subprocess.Popen[bytes]) -> None:
    """Have the shell thaw what it has frozen, now."""
    stdin, shell.stdin = shell.stdin, None
    if stdin is not None:
        stdin.close()


def _has_ended(shell: subprocess.Popen[bytes]) -> bool:
    """Have the shell thaw what it has frozen: whether it has, or else it is killed."""
    for _ in range(2):
        try:
            shell.communicate(timeout=LONGEST)
            break
        except subprocess.TimeoutExpired:
            shell.kill()
    return shell.returncode == 0


def _elsewhere(directories: list[str]) -> tuple[str, str]:
    """Two cgroups that may not be this process's, for the shell to enter one; "" for none.  Nobody may freeze it there but root
    and this user: the second is where the first of ``directories`` is that is so, with all cgroups above."""
    top = _top()
    if top is None:
        return "", ""
    own = {0, os.geteuid()}
    for directory in directories:
        above, below = [directory], directory.removeprefix(top).strip("/").split("/")
        for _ in below[1:]:
            above.append(os.path.dirname(above[-1]))
        if _is_of(directory, own) and all(_is_of(each, own | {_owner(top)}) for each in above):
            return top, os.path.dirname(directory)
    return top, ""


def _owner(directory: str) -> int:
    """-1 where it is gone."""
    with suppress(OSError):
        return os.stat(directory, follow_symlinks=False).st_uid
    return -1


def _is_of(directory: str, owners: Collection[int]) -> bool:
    return _owner(directory) in owners


def _processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _path(process: str) -> str | None:
    """The cgroup of ``process``, a name in /proc: its path below ``_top``; None where it has none there.  Raises OSError."""
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        if line.startswith("0::/") and "/.." not in line:
            return line.removeprefix("0::").rstrip("/")
    return None


def _without(path: str) -> str:
    """``path`` up to the first cgroup that ``enter`` has made."""
    return path.partition(f"/{PREFIX}")[0]


def _own(path: str) -> str:
    """``path`` up to the first cgroup that ``enter`` has made, and with that; "" where there is none in it."""
    above = _without(path)
    return "" if above == path else f"{above}/{path.removeprefix(above).split('/')[1]}"


def _top() -> str | None:
    """Where the cgroups are mounted, if this process sees that."""
    return next((mount.target for mount in mount_table() if mount.type == "cgroup2" and mount.root == "/"), None)
