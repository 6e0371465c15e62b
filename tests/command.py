"""The command ``snapfs``, run as a process."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

from snapfs.cli import main
from tests.processes import die_with_parent
from tests.syscalls import Channel, Server

SNAPFS = [sys.executable, "-m", "snapfs.cli"]


class Command:
    """The command on one tree."""

    def __init__(self, mnt: Path) -> None:
        self.mnt = mnt

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """What it prints; with another ``status`` than 0 the sentence on standard error."""
        done = subprocess.run(
            [*SNAPFS, *arguments],
            env={**os.environ, "SNAPFS": str(self.mnt)},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if status:
            assert done.stderr.startswith("snapfs"), done.stderr
            return done.stderr
        assert done.stderr == ""
        return done.stdout

    def names(self, *arguments: str) -> list[str]:
        return self("ls", "-0", *arguments).split("\0")[:-1]


def run(*words: str, cwd: str | Path = "/", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "SNAPFS"} | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run([*SNAPFS, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def in_process(channel: Channel, *words: str) -> None:
    """The command, in this process (``tests/syscalls.py``): its exit status, and what it says on standard error."""
    sys.stderr = io.TextIOWrapper(io.BytesIO(), write_through=True)
    status = main(words)
    sys.stderr.seek(0)
    channel.say("ended", status, sys.stderr.read())


def held(channel: Channel, mnt: str, *words: str) -> None:
    """The command on the tree at ``mnt``, in a process whose calls are held, as are those of the processes that it starts."""
    os.environ["SNAPFS"] = mnt
    channel.watch()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())):
        channel.say("status", main(words))


def forked(server: Server, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a process of ``server``, which has imported it: most of the time of a new one goes into that.  What it
    prints is not kept."""
    with server.started(in_process, *map(str, words)) as process:
        assert process.hold(within=60)
        assert process.errors() == []
        [(status, said)] = [message[1:] for message in process.said if message[0] == "ended"]
    assert isinstance(status, int)
    return subprocess.CompletedProcess(words, status, "", str(said))


class OnATerminal:
    """The command on a terminal of its own, begun ``by`` these words; ``stopped`` as if Ctrl-S had been pressed before."""

    def __init__(self, *words: str, by: Sequence[str] = SNAPFS, stopped: bool = False) -> None:
        self.master, terminal = os.openpty()
        if stopped:
            os.write(self.master, b"\x13")
        self.process = subprocess.Popen(
            [*by, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=self._take,
        )
        os.close(terminal)

    @staticmethod
    def _take() -> None:
        die_with_parent()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def writes(self) -> bool:
        """Whether it waits for its standard error to take something."""
        return Path(f"/proc/{self.process.pid}/syscall").read_text().split()[1:2] == ["0x2"]

    def said(self) -> str:
        """All that it says until it ends."""
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while more := os.read(self.master, 4096):
                said += more
        os.close(self.master)
        self.process.wait(timeout=30)
        return said.decode()
