"""A user's home directory, with a daemon of that user's."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapfs.kernel.mounttable import lines_of, parse
from tests.command import SNAPFS
from tests.daemon import Daemon
from tests.users import ALICE, alice


class Home:
    """A user's directory, with a daemon of hers."""

    def __init__(self, path: Path, who: tuple[str, ...] = alice, uid: int = ALICE) -> None:
        self.path = path
        self.who = who
        self.uid = uid
        self.mnt = path / "tree"
        self.root = path / "root"
        self.daemon = self.another()

    def another(self, *arguments: str) -> Daemon:
        daemon = Daemon(self.root, self.mnt, *arguments, flushes=False)
        daemon.prefix = self.who
        if self.who:
            os.chown(self.mnt, self.uid, self.uid)
        return daemon

    def words(self, *command: str | Path, who: tuple[str, ...] | None = None) -> list[str]:
        environment = (f"HOME={self.path}", f"SNAPFS={self.mnt}", "GIT_CONFIG_GLOBAL=/dev/null", "LC_ALL=C.UTF-8")
        return [*(self.who if who is None else who), "env", *environment, *map(str, command)]

    def does(self, *command: str | Path, status: int = 0, cwd: Path | None = None, who: tuple[str, ...] | None = None) -> str:
        """What a command of hers says, which ends with ``status``."""
        done = subprocess.run(
            self.words(*command, who=who),
            cwd=cwd or self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def sh(self, script: str, status: int = 0, *, cwd: Path | None = None) -> str:
        return self.does("sh", "-ec", script, status=status, cwd=cwd)

    def snapfs(self, *arguments: str | Path, status: int = 0, cwd: Path | None = None) -> str:
        return self.does(*SNAPFS, *arguments, status=status, cwd=cwd)

    def inside(self, key: str, script: str, *options: str | Path, status: int = 0) -> str:
        """What a shell script says that stands in a workspace."""
        return self.snapfs("run", *options, key, "--", "sh", "-ec", script, status=status)

    def read(self, path: str) -> str:
        """A file of the tree, into which root does not get."""
        return self.does("cat", self.mnt / path)

    def rootfs(self, key: str) -> str:
        return self.does("readlink", self.mnt / f"active/{key}/rootfs").strip()

    def last_error(self) -> str:
        return self.read(".snapfs/error_log").splitlines()[-1]

    def options(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.read(".snapfs/options.json"))
        return found

    def mounts(self) -> list[str]:
        """What everybody sees mounted in her directory."""
        return [mount.target for mount in map(parse, lines_of("self")) if mount.target.startswith(f"{self.path}/")]


@contextmanager
def home_of(who: tuple[str, ...], uid: int = ALICE) -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as directory:  # pytest's are for root only
        path = Path(directory)
        path.chmod(0o755)
        if who:
            os.chown(path, uid, uid)
        home = Home(path, who, uid)
        try:
            yield home
        finally:
            home.daemon.cleanup()


def with_workspace(home: Home) -> Home:
    home.sh("cd tree; mkdir active/b; echo base > active/b/rootfs/file; mkdir active/b/rootfs/sub; mv active/b committed/b")
    home.sh("mkdir tree/committed/b/active/w")
    return home
