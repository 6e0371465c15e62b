"""A ``snapfs serve`` of its own process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import die_with_parent


class Daemon:
    """A ``snapfs serve`` of its own process.  ``mnt`` is the mounted tree, ``root`` where its layers are, ``prefix`` a command
    that runs it, ``program`` what the interpreter is given, ``flushes`` whether a power cut leaves anything of its root."""

    def __init__(self, root: Path, mnt: Path, *arguments: str, flushes: bool = True) -> None:
        self.root = root
        self.mnt = mnt
        self.arguments = arguments
        self.flushes = flushes
        self.prefix: tuple[str, ...] = ()
        self.program: tuple[str, ...] = ("-m", "snapfs.cli")
        self.process: subprocess.Popen[str] | None = None
        self.said: list[str] = []
        self.last = ""
        mnt.mkdir(exist_ok=True)

    def start(self) -> Daemon:
        """Start it and wait until it says that it is ready."""
        serve = [*self.program, "serve", str(self.root), str(self.mnt), *(() if self.flushes else ("-o", "sync=none"))]
        command = [*self.prefix, sys.executable, *serve, *self.arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.said.append(line)
            if line.startswith("snapfs: serving "):
                return self
        raise AssertionError(f"the daemon ended with {self.process.wait()}: {self.said}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; its exit status, with all that it said on standard error in ``said``, but for the line that tells
        why it ended, which is ``last``."""
        assert self.process is not None
        assert self.process.stderr is not None
        with self.process:
            lines = self.process.stderr.readlines()
            status = self.process.wait(timeout=30)
        closing = [line for line in lines if line.startswith("snapfs: ended: ")]
        self.said += [line for line in lines if line not in closing]
        assert len(closing) == 1 or status != 0, f"it did not say, or not once, why it ended: {lines}"
        self.last = closing[-1] if closing else ""
        return status

    def error_log(self) -> list[str]:
        """The lines of .snapfs/error_log."""
        return (self.mnt / ".snapfs/error_log").read_text().splitlines()

    def cleanup(self) -> None:
        if self.process is not None:
            with self.process:
                self.process.kill()
        subprocess.run(["umount", "-l", str(self.mnt)], stderr=subprocess.DEVNULL, check=False)


SERVE = [sys.executable, "-m", "snapfs.cli", "serve"]


def refusal(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> str:
    """What ``snapfs serve`` says with these arguments, which it refuses."""
    done = subprocess.run([*prefix, *SERVE, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == ""
    assert done.returncode == 1
    assert re.fullmatch(r"snapfs: [^\n]+\n", done.stderr), "one sentence"
    assert "Traceback" not in done.stderr
    return done.stderr


@contextmanager
def bounded(seconds: int, daemon: Daemon | None = None) -> Iterator[None]:
    """Whatever happens in the block, or does not, it ends.  Who waits for a ``daemon`` can't be interrupted: that is killed."""

    def end(*_: object) -> None:
        raise AssertionError(f"it has not ended within {seconds} s")

    timer = threading.Timer(seconds, os.kill, [daemon.pid if daemon else 0, signal.SIGKILL])
    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    if daemon is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
