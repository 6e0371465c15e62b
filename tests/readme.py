"""The READMEs and their recipes."""

from __future__ import annotations

import textwrap
from pathlib import Path

CLONE = Path(__file__).parent.parent

README = (CLONE / "README.md").read_text()

READMES = sorted(
    [CLONE / "README.md", *(path for room in ("examples", "snapfs", "tests") for path in (CLONE / room).rglob("README.md"))]
)


def read(path: str) -> str:
    """The README of a directory in the clone."""
    return (CLONE / path / "README.md").read_text()


def recipe(title: str, text: str = README) -> str:
    """The commands of one of the recipes."""
    return textwrap.dedent(text.split(f"**{title}.**")[1].split("\n\n")[1])
