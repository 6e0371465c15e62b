"""What `make lock` wrote agrees with pyproject.toml: each dependency, in a version that it allows; with hashes to deploy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.newest import differences, pins

HERE = Path(__file__).parent.parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEPLOYED = (HERE / "examples/deploy/requirements.txt").read_text()
CONSTRAINTS = (HERE / "tests/constraints.txt").read_text()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (DEPLOYED, [*PROJECT["dependencies"], *EXTRAS["containerd"]]),
        (CONSTRAINTS, [*PROJECT["dependencies"], *EXTRAS["containerd"], *EXTRAS["dev"]]),
    ],
    ids=["deployed", "constraints"],
)
def test_each_dependency_is_pinned(text: str, wanted: list[str]) -> None:
    pinned = pins(text)
    for requirement in map(Requirement, wanted):
        if requirement.name != "snapfs":
            assert requirement.specifier.contains(pinned.get(requirement.name, "0")), f"{requirement}: `make lock`"


def test_what_is_deployed_is_what_was_tested() -> None:
    tested = pins(CONSTRAINTS)
    assert {name: tested[name] for name in pins(DEPLOYED)} == pins(DEPLOYED)


def test_all_that_is_deployed_has_hashes() -> None:
    entries = [line for line in re.sub(r"\\\n", "", DEPLOYED).splitlines() if line and not line.lstrip().startswith("#")]
    assert len(entries) == len(pins(DEPLOYED)), "nothing but pins"
    for entry in entries:
        assert re.search("--hash=sha256:[0-9a-f]{64}", entry), entry


def test_what_is_newer() -> None:
    locked = "# by hand\na-b==1.0 ; sys_platform == 'linux'\nc==2\nd==3 \\\n    --hash=sha256:00\n"
    assert differences(locked, "a_b==1.0\nc==2\n") == [], "d is not for this Python"
    assert differences(locked, "A.B==1.1\nd==3\ne==1\n") == ["a-b 1.0 -> 1.1", "e (none) -> 1"]
