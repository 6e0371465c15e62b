"""The manual pages say what the command and the tree say, and come with the installation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from snapfs.cli import VERBS, verb
from snapfs.cli.manual import DIRECTORY, PAGES, roff

CLONE = Path(__file__).parent.parent


@pytest.mark.parametrize("name", PAGES)
def test_it_is_as_the_command_makes_it(name: str) -> None:
    assert (DIRECTORY / name).read_text() == PAGES[name](), "python -m snapfs.cli.manual writes it anew"


def test_each_is_installed_in_its_section() -> None:
    files = tomllib.loads((CLONE / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    pages = {f"share/man/man{name[-1]}": [str((DIRECTORY / name).relative_to(CLONE))] for name in PAGES}
    assert pages == files
    assert sorted(PAGES) == sorted(path.name for path in DIRECTORY.iterdir())


def test_every_verb_and_option_is_told() -> None:
    page = PAGES["snapfs.1"]()
    for name in VERBS:
        part = page.split(f".SS snapfs {name} ")[1].split("\n.S")[0]
        for option in verb(name).options:
            assert rf"\fB{roff(option.words())}\fR" in part, f"{name} --{option.name}"


def test_no_line_of_the_tree_is_lost() -> None:
    readme = (CLONE / "snapfs/tree/README.txt").read_text()
    page = PAGES["snapfs-tree.7"]()
    assert all(roff(line.strip()).replace("\n", "  ") in page.replace("\n", "  ") for line in readme.splitlines())


def test_roff_takes_nothing_for_a_command() -> None:
    assert roff("-x \\, 'a' …") == r"\-x \e, \(aqa\(aq \[u2026]"
    assert not [line for page in PAGES.values() for line in page().splitlines() if re.match(r"\.(?![A-Za-z\\])|'", line)]
