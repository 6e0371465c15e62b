"""Key <-> file name: one encoding for each key, and decoding its exact inverse."""

from __future__ import annotations

import json
import re
import sys
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from snapfs.cli.place import unquoted
from snapfs.errors import InvalidArgument, NameTooLong, NotUtf8
from snapfs.names import NAME_MAX, decode, encode, nameable, plain_json, printable, shown

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
"""Any text that is UTF-8, not empty, and short enough however it is encoded (four bytes a character, tripled)."""
tricky = st.text(st.sampled_from("%./2EFef0ab\n\x7f\x85é"), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("key", "file_name"),
    [
        ("web", "web"),
        ("default/12/sha256:ab", "default%2F12%2Fsha256:ab"),
        ("100%", "100%25"),
        ("%2F", "%252F"),
        (".", "%2E"),
        ("..", "%2E."),
        ("...", "..."),
        (".hidden", ".hidden"),
        ("a..b", "a..b"),
        ("./x", ".%2Fx"),
        ("two words", "two words"),
        (" ", " "),
        ("line\nbreak", "line%0Abreak"),
        ("tab\t", "tab%09"),
        ("nul\0", "nul%00"),
        ("\x1f\x7f", "%1F%7F"),
        ("\x80\x9f", "%C2%80%C2%9F"),
        ("\xa0", "\xa0"),
        ("naïve 🐙", "naïve 🐙"),
        ("back\\slash:colon,comma", "back\\slash:colon,comma"),
        ("default/11/extract-969002056-w-eF sha256:" + "0" * 64, "default%2F11%2Fextract-969002056-w-eF sha256:" + "0" * 64),
    ],
)
def test_a_key_and_its_file_name(key: str, file_name: str) -> None:
    assert encode(key) == file_name
    assert decode(file_name) == key


@pytest.mark.parametrize(
    "file_name",
    [
        "%2f",  # lower case
        "%41",  # encoded without need
        "%2E%2E",
        ".%2E",
        "%2E.x",
        "%2Ehidden",
        "100%",
        "%2",
        "%",
        "%G0",
        "a%zz",
        "a/b",
        "a\nb",
        "a\x85b",
        ".",
        "..",
        "%C3%A9",  # é needs none
        "%C2%85%41",
    ],
)
def test_a_name_that_is_not_canonical_names_nothing(file_name: str) -> None:
    with pytest.raises(InvalidArgument):
        decode(file_name)


@pytest.mark.parametrize("file_name", ["%FF", "%C3", "%C0%AF", "%ED%A0%80", "%C2x%85"])
def test_encoded_bytes_that_are_not_utf8_name_nothing(file_name: str) -> None:
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        decode(file_name)


@pytest.mark.parametrize("text", ["\udcff", "a\udc80b"])
def test_bytes_that_are_not_utf8_are_told_apart_from_other_bad_names(text: str) -> None:
    """The tree says EILSEQ for them, not EINVAL."""
    with pytest.raises(NotUtf8):
        encode(text)
    with pytest.raises(NotUtf8):
        decode(text)


@pytest.mark.parametrize("function", [encode, decode])
def test_the_empty_key_is_refused(function: object) -> None:
    assert callable(function)
    with pytest.raises(InvalidArgument, match="empty"):
        function("")


@pytest.mark.parametrize(("unit", "takes"), [("x", 1), ("é", 2), ("€", 3), ("🐙", 4), ("/", 3), ("%", 3), ("\x85", 6)])
def test_255_bytes_fit_as_a_file_name_and_no_more(unit: str, takes: int) -> None:
    fits = unit * (NAME_MAX // takes) + "x" * (NAME_MAX % takes)
    assert len(encode(fits).encode()) == 255
    assert decode(encode(fits)) == fits
    with pytest.raises(NameTooLong):
        encode(fits + "x")
    with pytest.raises(NameTooLong):
        decode(encode(fits) + "x")


def test_a_key_of_millions_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over containerd's socket somebody may send one, and all others would wait."""
    monkeypatch.setattr("snapfs.names._ENCODED", None)
    with pytest.raises(NameTooLong, match='%01…" takes 1000000 bytes or more as a file name; at most 255 fit'):
        encode("\x01" * 1_000_000)


@given(keys | tricky)
def test_decoding_undoes_encoding(key: str) -> None:
    try:
        name = encode(key)
    except NameTooLong:
        assume(False)
        return
    assert decode(name) == key


@given(keys | tricky)
def test_every_encoding_is_one_path_component_of_printing_characters(key: str) -> None:
    try:
        name = encode(key)
    except NameTooLong as error:
        assert "255" in str(error)
        return
    assert name not in ("", ".", "..")
    assert not re.search("[/\x00-\x1f\x7f-\x9f]", name)
    assert len(name.encode()) <= NAME_MAX


@given(keys | tricky)
def test_a_file_name_decodes_only_if_it_is_what_encoding_gives(file_name: str) -> None:
    """No two file names for one key."""
    try:
        key = decode(file_name)
    except InvalidArgument:
        return
    assert encode(key) == file_name


@given(st.text(min_size=0, max_size=300))
def test_nothing_but_invalid_argument_comes_back(text: str) -> None:
    for function in (encode, decode):
        try:
            result = function(text)
        except InvalidArgument as error:
            assert str(error)
        else:
            assert result


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain é", "plain é"), ("a\nb", "a%0Ab"), ("\x85", "%C2%85"), ("\udcff", "\\xff"), ("100%", "100%")],
)
def test_printable_keeps_a_log_on_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_wrong_is_not_shown_as_it_is_to_be_written() -> None:
    with pytest.raises(InvalidArgument) as refused:
        decode("a\nb")
    assert str(refused.value) == '"a\\nb" is no key\'s file name; write "a%0Ab"'


DISGUISES = [
    "\x9b31m",
    "\u202egpj.exe",
    "a\u2066b\u2069",
    "\u200f",
    "line\u2028break",
    "\x7f",
    "a\u200bb",
    "\ufeff",
    "\U000e0041",
    "soft\u00adhyphen",
    "a\u034fb",
    "\u3164",
    "\u206a",
    "note\ufff9",
    "\U000e0fff",
]


@pytest.mark.parametrize("text", DISGUISES)
def test_what_a_terminal_would_obey_is_shown_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) != text, "a filler is printable, to Python"
    document = json.dumps({text: [text]}, ensure_ascii=False)
    plain = plain_json(document)
    assert plain.isprintable()
    assert plain != document
    assert json.loads(plain) == {text: [text]}


JOINERS = "\u200c\u200d"
VARIANTS = "\u180b\u180c\u180d\u180f" + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
SEEN = "".join(map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440))))
"""Format characters that are signs of their own: numbers' and verses' in Arabic and Kaithi, how hieroglyphs stand."""


def test_all_format_characters_are_escaped_but_those_that_scripts_need() -> None:
    formats = {character for character in map(chr, range(0x110000)) if unicodedata.category(character) == "Cf"}
    assert {character for character in formats if printable(character) == character} == {*JOINERS, *SEEN} & formats
    for text in (JOINERS, VARIANTS, SEEN):
        assert printable(text) == text
        assert plain_json(text) == text


def test_json_that_is_plain_stays_as_it_is() -> None:
    document = json.dumps({"grün": "日本", "😀": "\n"}, ensure_ascii=False)
    assert plain_json(document) == document


@given(st.lists(st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=200), max_size=6))
def test_a_path_that_is_too_long_for_a_sentence_is_shown_as_the_nearest_that_is_not(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    above = [path[:at] or "/" for at in range(len(path)) if path[at] == "/"]
    fitting = [each for each in above if len(each.encode()) <= 250 and printable(each) == each]
    is_short = len(path.encode()) <= 250
    assert nameable(path) == (path if is_short and printable(path) == path else fitting[-1])
    assert shown(path) == (printable(path) if is_short else f"{fitting[-1]}/…")


def test_how_long_a_path_is_does_not_matter_for_that() -> None:
    """To try one directory above after the other takes minutes where there are ten thousand."""
    calls = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    path = f"/{'n' * 100}" * 1000
    sys.setprofile(counted)
    try:
        text = shown(path)
    finally:
        sys.setprofile(None)
    assert text == f"{path[:202]}/…"
    assert calls < 30


@given(
    st.lists(
        st.sampled_from(
            ["a", "\\", "n", "x41", "u0041", "é", "🐙", "\udcff", "%", "%4", "%zz", "%41", "%ff", "%C3%A9", "%5C", "%0a"]
        )
    )
)
def test_the_command_reads_what_is_encoded(parts: list[str]) -> None:
    """Whatever others have written; and as it is where that is no encoding."""
    text = "".join(parts)
    if re.search("%(?![0-9a-fA-F]{2})", text):
        assert unquoted(text) == text
    else:
        expected = re.sub(
            b"%(..)", lambda found: bytes.fromhex(found[1].decode()), text.encode(errors="surrogateescape"), flags=re.DOTALL
        )
        assert unquoted(text) == expected.decode(errors="surrogateescape")
