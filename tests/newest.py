"""``make newest``: which versions in .venv/newest are others than those of constraints.txt, as ``name old -> new``."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def pins(text: str) -> dict[str, str]:
    """The versions that a list of requirements pins, by name."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in found}


def differences(locked: str, installed: str) -> list[str]:
    """What is installed in another version than is locked; not all that is locked is for each Python."""
    before = pins(locked)
    return [f"{name} {before.get(name, '(none)')} -> {new}" for name, new in pins(installed).items() if before.get(name) != new]


if __name__ == "__main__":
    print(", ".join(differences((Path(__file__).parent / "constraints.txt").read_text(), sys.stdin.read())))
