"""Baloo, the indexer of KDE.  It takes a hundred packages, so it is no part of the test run: ``make desktop`` runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.daemon import Daemon
from tests.desktop import rootfs_mounts, use_and_remove_all
from tests.processes import die_with_parent, until

pytest_plugins = ["tests.test_desktop"]  # whose fixtures are used


def test_baloo(tracked: Daemon, home: Path) -> None:
    """It follows no link, so it mounts nothing, though it indexes the whole tree."""
    documents = tracked.mnt.parent
    (home / ".config").mkdir()
    settings = {"folders[$e]": f"{documents}/", "exclude folders[$e]": "", "only basic indexing": "false"}
    lines = [f"{key}={value}\n" for key, value in settings.items()]
    (home / ".config/baloofilerc").write_text("".join(["[General]\n", *lines, "[Basic Settings]\nIndexing-Enabled=true\n"]))

    def ask(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout

    def found(path: Path) -> bool:
        return str(path) in ask("baloosearch", path.name).splitlines()

    def done() -> bool:
        shown = ask("balooctl", "status")
        return "Indexer state: Idle" in shown and "Files waiting for content indexing: 0\n" in shown

    words = ["env", "QT_QPA_PLATFORM=offscreen", "baloo_file"]  # or what reads the files wants a screen
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent) as indexer:
        try:
            until(lambda: found(documents / "letter"), "the letter is in the index")
            until(lambda: found(tracked.mnt / "committed/base/info.json"), "what the tree tells is in the index")
            until(done, "it is idle", lambda: f": {ask('balooctl', 'status')}")
            assert "Files failed to index: 0\n" in ask("balooctl", "status")
            assert rootfs_mounts(tracked) == []
            use_and_remove_all(tracked)
        finally:
            indexer.terminate()
