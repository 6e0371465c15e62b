"""The README says what is so: its commands, options, errors and library example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from snapfs.cli.serve import _ACCESS, _FLAGS, _NUMBERS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_option_is_listed() -> None:
    table = set(re.findall(r"^\| `(\w+)(?:=[A-Z]+)?` \|", README, re.MULTILINE))
    assert {*_FLAGS, *_ACCESS, *_NUMBERS, "mount_option"} <= table


def test_the_library_example_runs(tmp_path: Path) -> None:
    example = README.split("```python\n")[1].split("```")[0]
    assert "/srv/snapfs" in example
    script = tmp_path / "example.py"
    script.write_text(example.replace("/srv/snapfs", str(tmp_path / "root")))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "['base']"


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
