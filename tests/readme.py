"""The README and its recipes."""

from __future__ import annotations

import textwrap
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def recipe(title: str) -> str:
    """The commands of one of the recipes."""
    return textwrap.dedent(README.split(f"**{title}.**")[1].split("\n\n")[1])
