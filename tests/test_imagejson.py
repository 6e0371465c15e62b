"""The text of image.json: what may be one, however it comes, and what is inherited."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs import imagejson
from snapfs.errors import Damaged, ImageTooBig, InvalidArgument, NotUtf8, SnapshotError
from snapfs.imagejson import DEEPEST, MEMBERS, MOST, Document, Layer, check, check_whole, inherited

CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2026-01-01T00:00:00Z",
    "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:aa"], "x": 1},
    "history": [{"created_by": "ADD it"}],
    "unknown": {"kept": 10**30},
}
TEXT = json.dumps(CONFIG).encode()


@pytest.mark.parametrize("content", [TEXT, b"{}", b'\n {"a": "}\\"{", "b": ["\\\\"]}\n\t ', b'{"history": null, "rootfs": {}}'])
def test_what_may_be_one(content: bytes) -> None:
    check(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends before"),
        (b"  ", "ends before"),
        (b"[]", r"must be a JSON object, and begin with \{"),
        (b'"{}"', "must be a JSON object"),
        (b"\x1f\x8b\x08", "must be a JSON object"),
        (b'{"a": 1', "ends before"),
        (b'{"a": "}', "ends before"),
        (b'{"a": "\\"}', "ends before"),
        (b"{}{}", "nothing behind it"),
        (b"{} x", "nothing behind it"),
        (b"{a: 1}", "is no JSON"),
        (b"{]", "is no JSON"),
        (b'{"a": 1,}', "is no JSON"),
        (b'{"history": {}}', "history must be an array"),
        (b'{"rootfs": 1}', "no image configuration"),
        (b'{"rootfs": {"diff_ids": "x"}}', "rootfs.diff_ids must be an array"),
        (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", f"more than {DEEPEST} deep"),
        (b"{" + b" " * MOST + b"}", "more than 4 MiB"),
    ],
)
def test_what_may_not(content: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check(content)


def test_what_is_not_utf8() -> None:
    with pytest.raises(NotUtf8):
        check(b'{"a": "\xff"}')


def test_the_largest_one() -> None:
    check(b'{"a": "' + b"x" * (MOST - 9) + b'"}')
    with pytest.raises(ImageTooBig):
        check(b'{"a": "' + b"x" * (MOST - 8) + b'"}')


LARGE = {
    "a text": b'{"a": "' + b"x" * (MOST - 9) + b'"}',
    "backslashes": b'{"a": "' + b"\\\\" * (MOST // 2 - 5) + b'"}',
    "objects": b'{"a": [' + b"{}," * (MOST // 3 - 5) + b"1]}",
    "texts": b'{"a": [' + b'"",' * (MOST // 3 - 5) + b"1]}",
}


@pytest.mark.parametrize("what", LARGE)
def test_a_large_one_is_looked_at_soon_and_others_go_on_meanwhile(what: str) -> None:
    """A daemon's other threads, of which one answers everybody: no call keeps Python for itself for long."""
    turns, ended = 0, threading.Event()

    def others() -> None:
        nonlocal turns
        while not ended.is_set():
            time.sleep(0)
            turns += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=others)
    try:
        thread.start()
        began, before = time.thread_time(), turns
        Document().add(LARGE[what])
        took, had = time.thread_time() - began, turns - before
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert took < 1
    assert had > 5  # it had none, or one, where all was done in one call


def test_members_are_bounded() -> None:
    """To take an object with hundreds of thousands apart keeps Python for a third of a second."""
    members = b",".join(b'"%d": ":"' % number for number in range(MEMBERS + 1))
    with pytest.raises(InvalidArgument, match="more than 50,000 members"):
        check(b"{" + members + b"}")
    check(b"{" + members.rpartition(b",")[0] + b"}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('{}[]"\\a é\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('{"\\'), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text('a"{\\'), VALUES, max_size=3), st.lists(st.integers(1, 7), max_size=200), st.booleans())
def test_in_whatever_pieces_it_comes(value: dict[str, object], sizes: list[int], ascii_only: bool) -> None:
    """It is whole exactly when its last brace has come."""
    content = json.dumps(value, ensure_ascii=ascii_only).encode()
    document, at = Document(), 0
    for size in [*sizes, len(content)]:
        document.add(content[at : at + size])
        at += size
        assert document.is_whole == (at >= len(content))
        if at >= len(content):
            break
    assert document.content == content
    check_whole(bytes(document.content))


@given(st.binary(max_size=40) | st.text('{}[]",:\\1 ', max_size=40).map(str.encode))
def test_anything_else_is_refused_in_words(content: bytes) -> None:
    with suppress(SnapshotError):
        check(content)
        assert isinstance(json.loads(content), dict)


LAYER = Layer("2026-02-02T00:00:00Z", "snapfs commit", "sha256:bb")


def test_a_layer_is_added() -> None:
    text = inherited(TEXT, [LAYER, Layer("2026-03-03T00:00:00Z", "why")], alone=False)
    assert json.loads(text) == {
        **CONFIG,
        "created": "2026-03-03T00:00:00Z",
        "rootfs": {"type": "layers", "diff_ids": ["sha256:aa", "sha256:bb"], "x": 1},
        "history": [
            {"created_by": "ADD it"},
            {"created": "2026-02-02T00:00:00Z", "created_by": "snapfs commit"},
            {"created": "2026-03-03T00:00:00Z", "created_by": "why"},
        ],
    }
    assert text.endswith("\n")
    assert text.startswith('{\n  "architecture": "amd64",\n  "os"')
    check(text.encode())


def test_what_comes_behind_one_that_is_not_known_is_not_listed() -> None:
    text = inherited(TEXT, [Layer("t", "a"), LAYER], alone=False)
    assert json.loads(text)["rootfs"]["diff_ids"] == ["sha256:aa"]
    assert len(json.loads(text)["history"]) == 3


def test_of_a_squash_it_has_one_layer() -> None:
    shown = json.loads(inherited(TEXT, [LAYER], alone=True))
    assert (shown["rootfs"]["diff_ids"], len(shown["history"])) == (["sha256:bb"], 1)
    assert shown["config"] == CONFIG["config"]


@pytest.mark.parametrize("content", [b"{}", b'{"history": null, "rootfs": {"diff_ids": null}}', b'{"history": [ ]}'])
def test_what_is_missing_is_made(content: bytes) -> None:
    shown = json.loads(inherited(content, [LAYER], alone=False))
    assert shown["history"] == [{"created": LAYER.created, "created_by": LAYER.created_by}]
    assert shown["rootfs"]["diff_ids"] == ["sha256:bb"]


def test_a_long_one_is_not_laid_out() -> None:
    """Laid out in lines, a text of nested brackets would take many times as much."""
    content = b'{"a": [' + b"[],".join([b""] * 100_000) + b"[]]}"
    assert len(inherited(content, [LAYER], alone=False)) < len(content) + 500


def test_what_is_kept_and_is_none_is_damaged() -> None:
    with pytest.raises(Damaged, match=r"what is kept of image.json can't be read"):
        inherited(b'{"rootfs": 1}', [], alone=False)


def test_what_a_terminal_would_obey_is_escaped() -> None:
    text = inherited('{"a": "\u202e\x7f"}'.encode(), [], alone=False)
    assert json.loads(text)["a"] == "\u202e\x7f"
    assert text.isascii()
    assert imagejson.FILE == "image.json"
