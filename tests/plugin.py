"""pytest on a directory of tests that use the plugin, as somebody would run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from snapfs.kernel.mounttable import mount_table
from tests.processes import until


def run(directory: Path, tmp_path: Path, *, interrupted_at: Path | None = None) -> subprocess.CompletedProcess[str]:
    """pytest on ``directory``, which leaves nothing mounted, and nothing in its temporary directory; with ``interrupted_at`` it
    is ended as Ctrl-C does in a terminal, once that file is there: with SIGINT to its whole process group."""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(directory), "-c", os.devnull]
    words = [sys.executable, "-m", "pytest", *options, str(directory)]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as pytest_run:
        try:
            if interrupted_at is not None:
                until(interrupted_at.exists, "the test has come so far")
                os.killpg(pytest_run.pid, signal.SIGINT)
            said, _ = pytest_run.communicate(timeout=120)
        finally:
            pytest_run.kill()
    assert not [mount.target for mount in mount_table() if str(tmp_path) in mount.target]
    assert [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("snapfs-testing")] == []
    return subprocess.CompletedProcess(words, pytest_run.returncode, said)
