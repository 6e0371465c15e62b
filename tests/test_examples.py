"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snapfs.kernel.mounttable import mount_table
from tests.conftest import die_with_parent

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_tour(tmp_path: Path) -> None:
    environment = {**os.environ, "SNAPFS": f"{sys.executable} -m snapfs.cli", "TMPDIR": str(tmp_path)}
    snapfs = tmp_path / "snapfs"
    snapfs.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m snapfs.cli "$@"\n')
    snapfs.chmod(0o755)
    tour = subprocess.run(
        ["sh", str(EXAMPLES / "tour.sh")],
        env={**environment, "SNAPFS": str(snapfs)},
        capture_output=True,
        text=True,
        preexec_fn=die_with_parent,
        timeout=60,
        check=False,
    )
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "should have been refused" not in tour.stderr
    for line in ("version 2", "Device or resource busy", "Directory not empty", "gone"):
        assert line in tour.stdout + tour.stderr
    assert not [mount.target for mount in mount_table() if mount.target.startswith(str(tmp_path))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapfs"], "the tour cleans up after itself"
