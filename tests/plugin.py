"""pytest on a directory of tests that use the plugin, as somebody would run it: root, or a user without an account."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from snapfs.kernel.mounttable import mount_table
from tests.processes import die_with_parent, until

CLONE = Path(__file__).parent.parent

NOBODY = 54321  # has no account

FILL = "def fill(directory):\n    (directory / 'file').write_text('x')\n"


@dataclass
class Runner:
    """Who runs pytest, and where: in ``tmp_path``, of which each user may enter the parents.

    Unless it has ``every_plugin`` there are just ours and xdist: to load the others takes longer than most of these tests."""

    tmp_path: Path
    uid: int = 0
    options: Sequence[str] = ()
    through: Sequence[str] = ()  # a command that runs another, as root
    environment: dict[str, str] = field(default_factory=dict)
    every_plugin: bool = False

    def __post_init__(self) -> None:
        self.tests = self.tmp_path / "tests"
        self.temporary = self.tmp_path / "tmp"
        for directory in (self.tests, self.temporary):
            directory.mkdir(exist_ok=True)
            os.chown(directory, self.uid, self.uid)

    def write(self, **files: str) -> None:
        """Make files of tests, with the ending .py."""
        for name, text in files.items():
            (self.tests / f"{name}.py").write_text(text)

    def command(self, *words: str) -> list[str]:
        """The command that runs ``words`` as this user."""
        return as_user(self.uid, *words, through=self.through) if self.uid else [*self.through, *words]

    @contextmanager
    def started(self, *options: str, tests: Path | None = None) -> Iterator[subprocess.Popen[str]]:
        """pytest while it runs, in a process group of its own."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "HOME": "/nonexistent" if self.uid else "/root",
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(CLONE) if self.every_plugin else f"{self._in_place_of_plugins()}:{CLONE}",
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.environment,
        }
        tests = tests or self.tests
        root = tests if tests.is_dir() else tests.parent
        config = [] if (root / "pytest.ini").exists() else ["-c", os.devnull]
        quiet = ["-o", "asyncio_default_fixture_loop_scope=function"] if self.every_plugin else []
        plain = ["-p", "no:cacheprovider", "--rootdir", str(root), *config, *quiet]
        words = [sys.executable, "-m", "pytest", *plain, *self.options, *options, str(tests)]
        with subprocess.Popen(
            self.command(*words),
            cwd=self.temporary,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            preexec_fn=die_with_parent,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def __call__(
        self, *options: str, tests: Path | None = None, interrupted_at: Path | None = None, status: int | None = None
    ) -> str:
        """What pytest says; it leaves nothing mounted, and nothing in its temporary directory.  With ``interrupted_at`` it is
        ended as Ctrl-C does in a terminal, once that file is there: with SIGINT to its whole process group."""
        with self.started(*options, tests=tests) as process:
            if interrupted_at is not None:
                until(interrupted_at.exists, "the test has come so far")
                os.killpg(process.pid, signal.SIGINT)
            said, _ = process.communicate(timeout=300)
        assert status is None or process.returncode == status, said
        self.nothing_is_left()
        return said

    def _in_place_of_plugins(self) -> Path:
        """A directory with empty modules called as the plugins that are not to be loaded."""
        directory = self.tmp_path / "plugins"
        for plugin in entry_points(group="pytest11"):
            if plugin.name.partition(".")[0] not in ("snapfs", "xdist"):
                package = directory
                *packages, name = plugin.module.split(".")
                for each in packages:
                    package /= each
                    package.mkdir(parents=True, exist_ok=True)
                    (package / "__init__.py").touch()
                directory.mkdir(exist_ok=True)
                (package / f"{name}.py").touch()
        return directory

    def left(self) -> list[str]:
        """What is in the temporary directory that only a run which was killed leaves there."""
        return [path.name for path in self.temporary.iterdir() if path.name.startswith("snapfs-testing")]

    def nothing_is_left(self) -> None:
        assert not [mount.target for mount in mount_table() if str(self.tmp_path) in mount.target]
        assert self.left() == []


def as_user(uid: int, *words: str, through: Sequence[str] = ()) -> list[str]:
    """The command that runs ``words`` as user ``uid``, who gets to the interpreter and to the clone wherever they are: in a
    mount namespace of its own, in which the directories above that are root's alone have nothing else."""
    needed = {os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, CLONE)}
    hidden = [(closed, path, f"/mnt/{number}") for number, path in enumerate(sorted(needed)) if (closed := _closed(path))]
    steps = ["mount -t tmpfs none /mnt"]
    steps += [f"mkdir {kept}; mount --bind {shlex.quote(path)} {kept}" for _, path, kept in hidden]
    steps += [
        f"mount -t tmpfs -o mode=755 none {shlex.quote(closed)}" for closed in sorted({closed for closed, _, _ in hidden})
    ]
    steps += [f"mkdir -p {shlex.quote(path)}; mount --move {kept} {shlex.quote(path)}" for _, path, kept in hidden]
    script = "set -e; " + "; ".join([*steps, "umount -l /mnt", 'exec "$@"'])
    who = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *through, *who, *words]


def _closed(path: str) -> str:
    """The topmost directory above ``path`` that not everybody may enter; "" if there is none."""
    parents = [str(parent) for parent in Path(path).parents]
    return next((parent for parent in reversed(parents) if not os.stat(parent).st_mode & 0o001), "")
