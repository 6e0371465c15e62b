"""The benchmarks in short: that each can still be measured.  ``make bench`` says how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.bench import table, wire
from tests.bench.rows import Row, at_least, at_most
from tests.processes import die_with_parent


@pytest.mark.mounts
def test_everything_can_be_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--quick", "--rounds=1", f"--where={tmp_path}", f"--out={tmp_path}/out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent
    ) as running:
        told = running.communicate(timeout=180)[0]
    assert running.returncode == 0, told
    results = json.loads((tmp_path / "out/figures.json").read_text())["results"]
    for rows in results.values():
        assert rows
        for row in rows:
            assert row["missing"] or row["ours"], row
    plots = list((tmp_path / "out").glob("*.svg"))
    assert plots
    for plot in plots:
        assert ET.parse(plot).getroot().tag.endswith("svg")
    assert os.listdir(tmp_path) == ["out"]


def test_a_row_says_by_how_much_it_was_missed() -> None:
    row = Row("a", "b", "ms", at_most(0.5), "", ours=[3, 2, 4], theirs=[2, 4, 4])
    assert row.ratios == [1.5, 0.5, 1]
    assert table.verdict(row) == "MISSED by 2.00 x"
    row.target = at_most(1)
    assert table.verdict(row) == "met"
    row.target = at_least(4)
    assert table.verdict(row) == "MISSED by 4.00 x"
    row.target = at_most(2.5, absolute=True)
    assert table.verdict(row) == "MISSED by 1.20 x"
    row.target = at_most(0, absolute=True)
    assert table.verdict(row) == "MISSED"


def test_protobuf_as_it_is_on_the_wire() -> None:
    message = wire.text(2, "key") + wire.text(3, "") + wire.string_map(4, {"a": "b"})
    assert message == b"\x12\x03key\x22\x06\x0a\x01a\x12\x01b"
    assert wire.fields(message + b"\x08\xac\x02") == [(2, b"key"), (4, b"\n\x01a\x12\x01b"), (1, 300)]
    assert wire.messages(b"\0\0\0\0\x02ab\0\0\0\0\0") == [b"ab", b""]
