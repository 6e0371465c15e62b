"""Other users: their names, and commands that run as one of them."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

ALICE, BOB, STAFF = 1001, 1002, 2000

Identity = tuple[str, ...]  # a command that runs another as somebody


def user(uid: int, *more: str, gid: int | None = None, groups: str = "") -> Identity:
    which = ("--groups", groups) if groups else ("--clear-groups",)
    return ("setpriv", "--reuid", str(uid), "--regid", str(uid if gid is None else gid), *which, *more)


alice, bob = user(ALICE), user(BOB)

member = user(BOB, groups=str(STAFF))


def run(who: Identity, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*who, *map(str, command)], capture_output=True, text=True, errors="replace", timeout=60, check=False)


def bind(stack: ExitStack, source: Path, target: str) -> None:
    subprocess.run(["mount", "--bind", str(source), target], check=True)
    stack.callback(subprocess.run, ["umount", target], check=True)
