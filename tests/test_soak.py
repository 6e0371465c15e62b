"""The load test in short, and that it notices what is wrong.  ``make soak`` is the long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import die_with_parent


def soak(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--place", str(place), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )


def test_many_clients_do_everything_at_once(tmp_path: Path) -> None:
    with soak(tmp_path, "--seconds=15", "--clients=16", "--seed=1") as running:
        told = running.communicate(timeout=180)[0]
    assert running.returncode == 0, told
    assert told.endswith("\nall was well\n")
    assert os.listdir(tmp_path) == []


def test_it_notices_what_somebody_else_does(tmp_path: Path) -> None:
    """A label that no client has written, in the snapshots of one: its model and the history of that name tell."""
    with soak(tmp_path, "--seconds=20", "--clients=2", "--seed=1") as running:
        meddle = 0
        while running.poll() is None and not meddle:
            for tree in Path(f"/proc/{running.pid}/root").joinpath(*tmp_path.parts[1:]).glob("soak-*/mnt/*/p0.*/labels"):
                try:
                    (tree / "meddled").write_text("somebody else\n")
                    meddle += 1
                except OSError:
                    continue  # renamed or removed since it was listed
        told = running.communicate(timeout=60)[0]
    assert meddle
    assert running.returncode == 1, told
    assert "what is known of p0." in told
