"""containerd's filter language, rule by rule."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs.errors import InvalidArgument, Unavailable
from snapfs.filters import Filters
from snapfs.model import Info, Kind


def info(name: str = "web", labels: dict[str, str] | None = None) -> Info:
    return Info(name=name, kind=Kind.ACTIVE, id=1, parent="base", labels=labels or {}, created=1, updated=1)


LABELS = {"gc": "root", "a.b/c": "x y", "dot.ted": "1", "containerd.io/snapshot.ref": "sha256:ab", 'quo"te': "z", "bell": "\a"}
WEB = Info(name="web", kind=Kind.ACTIVE, id=7, parent="base", labels=LABELS, created=1, updated=1)
BASE = Info(name="base", kind=Kind.COMMITTED, id=1, parent=None, labels={}, created=1, updated=1)
PEEK = Info(name="default/1/pe.ek", kind=Kind.VIEW, id=2, parent="base", labels={"gc": "other"}, created=1, updated=1)


@pytest.mark.parametrize("filters", [["name," * 1000 + "name"], ["name"] * 1001, ["labels" + ".a" * 1000]])
def test_how_much_may_be_asked_is_bounded(filters: list[str]) -> None:
    """A walk of many snapshots would take for ever, in a thread that nothing ends."""
    with pytest.raises(InvalidArgument, match="more than 1,000 fields"):
        Filters(filters)
    Filters([",".join(["name"] * 1000)])


def selects(text: str, *more: str) -> str:
    """Which of the three snapshots the filters select, by their initials."""
    holds = Filters([text, *more]).holds
    return "".join(initial for initial, snapshot in (("w", WEB), ("b", BASE), ("p", PEEK)) if holds(snapshot))


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        # fields and ==
        ("name==web", "w"),
        ("name==we", ""),
        ("name==default/1/pe.ek", "p"),
        ("kind==active", "w"),
        ("kind==view", "p"),
        ("kind==committed", "b"),
        ("kind==Active", ""),  # lower case
        ("kind==ACTIVE", ""),
        ("parent==base", "wp"),
        ('parent==""', "b"),  # the empty string where there is none
        ("parent!=base", "b"),
        ('parent!=""', "wp"),
        ("labels.gc==root", "w"),
        ("labels.gc==roo", ""),
        # what follows the first dot is the label's key, quoted or not
        ("labels.dot.ted==1", "w"),
        ('labels."dot.ted"==1', "w"),
        ('labels."containerd.io/snapshot.ref"==sha256:ab', "w"),
        ('labels."a.b/c"=="x y"', "w"),
        ('labels."quo\\"te"==z', "w"),
        ('"labels"."gc"==root', "w"),
        ('"name"==web', "w"),
        # a bare field asks for presence
        ("name", "wbp"),
        ("kind", "wbp"),
        ("parent", "wbp"),
        ("labels", ""),
        ("labels.gc", "wp"),
        ('labels."a.b/c"', "w"),
        ("labels.none", ""),
        ("unknown", ""),
        ("id", ""),
        # != holds for absent fields, an unknown field is absent
        ("labels.gc!=root", "bp"),
        ("labels.none!=x", "wbp"),
        ("unknown!=x", "wbp"),
        ("unknown==x", ""),
        ('unknown==""', ""),
        ('labels.none==""', ""),
        ("created!=x", "wbp"),
        ("name!=web", "bp"),
        # ~= searches, it needn't match from the start or to the end
        ("name~=e", "wbp"),
        ("name~=^w", "w"),
        ("name~=b$", "w"),
        ("name~=^we$", ""),
        ("kind~=active|view", "wp"),
        ('name~="^default/[0-9]+/"', "p"),
        ("labels.gc~=o", "wp"),
        ("labels.gc~=^root$", "w"),
        ("labels.none~=x", ""),
        ("parent~=^$", "b"),
        ("name~=(?i)WEB", "w"),
        # quotes of other kinds after ~= only
        ("name~=/^default/", "p"),
        ("name~=|^web$|", "w"),
        ("name~=/default\\/1\\/pe/", "p"),
        ("name~=/a,b|web/", "w"),
        ('name~="web"', "w"),
        # an expression that doesn't compile matches nothing: RE2 has no look-around and no back references
        ("name~=(", ""),
        ("name~=[", ""),
        ('name~="*"', ""),
        ("name~=w(?=e)", ""),
        ('name~="(e)\\\\1"', ""),
        ("name~=(?P<n>e", ""),
        # comma: and
        ("name==web,kind==active", "w"),
        ("name==web,kind==view", ""),
        ("parent==base,labels.gc", "wp"),
        ("parent==base,labels.gc,kind!=active", "p"),
        ("labels.gc,name", "wp"),
        # a blank before and after the operator
        ("name ==web", "w"),
        ("name== web", "w"),
        ("name == web", "w"),
        ('labels."a.b/c" ~= /x y/', "w"),
        # unquoted values take anything that prints, up to a comma
        ("name==we=b", ""),
        ("labels.gc!=a==b", "wbp"),
        ("name!='web'", "wbp"),  # single quotes don't quote
        ("name=='web'", ""),
        ("", "wbp"),
    ],
)
def test_what_a_filter_selects(text: str, selected: str) -> None:
    assert selects(text) == selected


def test_no_filter_at_all_holds_for_everything() -> None:
    assert Filters([]).holds(WEB)
    assert Filters(()).holds(BASE)


@pytest.mark.parametrize(
    ("filters", "selected"),
    [
        (("name==web", "name==base"), "wb"),
        (("name==web", "kind==view"), "wp"),
        (("name==web,kind==view", "name==base"), "b"),
        (("name==none", "name==nothing"), ""),
        (("name==none", ""), "wbp"),
        (("", "name==none"), "wbp"),
        (("name==web", "name==web"), "w"),
    ],
)
def test_of_several_filters_any_may_hold(filters: tuple[str, ...], selected: str) -> None:
    assert selects(*filters) == selected


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        (r'"\a\b\f\n\r\t\v"', "\a\b\f\n\r\t\v"),
        (r'"\\"', "\\"),
        (r'"\""', '"'),
        (r'"\x41"', "A"),
        (r'"\101"', "A"),
        (r'"\000"', "\0"),
        (r'"\u00e9"', "é"),
        (r'"\u00E9"', "é"),
        (r'"\U0001F419"', "🐙"),
        (r'"\xc3\xa9"', "é"),  # \x and octal escapes are bytes, together UTF-8
        (r'"\303\251"', "é"),
        ('"é🐙"', "é🐙"),
        ('"a,b.c==d"', "a,b.c==d"),
        ('"a\tb"', "a\tb"),
        ('""', ""),
        ('"it\'s"', "it's"),
    ],
)
def test_gos_escapes_in_double_quotes(literal: str, value: str) -> None:
    assert Filters([f"name=={literal}"]).holds(info(name=value))
    assert not Filters([f"name=={literal}"]).holds(info(name=value + "x"))
    if value:
        assert Filters([f"labels.{literal}==there"]).holds(info(labels={value: "there"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name=la", '[name >|=|< la]: unsupported operator "="'),
        ("name===la", '[name >|=|< ==la]: unsupported operator "==="'),
        ("name=!la", '[name >|=|< !la]: unsupported operator "=!"'),
        ("name~la", '[name >|~|< la]: unsupported operator "~"'),
        ("name!la", '[name >|!|< la]: unsupported operator "!"'),
        ("a==b,name=~la", '[a==b,name >|=|< ~la]: unsupported operator "=~"'),
        ("name la", '[name  >|l|< a]: expected an operator ("=="|"!="|"~=")'),
        ("name==", "[name==]: expected value or quoted"),
        ("name== ", "[name== ]: expected value or quoted"),
        ("name==,kind", "[name== >|,|< kind]: expected value or quoted"),
        ("==x", "[ >|=|< =x]: expected field or quoted"),
        (",", "[ >|,|< ]: expected field or quoted"),
        ("name,", "[name,]: expected field or quoted"),
        ("name,,kind", "[name, >|,|< kind]: expected field or quoted"),
        ("labels.", "[labels.]: expected field or quoted"),
        ("labels..x", "[labels. >|.|< x]: expected field or quoted"),
        ("na-me==x", '[na >|-|< me==x]: expected an operator ("=="|"!="|"~=")'),
        ("'name'==x", "[ >|'|< name'==x]: expected field or quoted"),
        ("name=='a b'", "[name=='a >| |< b']: unexpected input:  "),
        ("name==/x/", "[name== >|/|< x/]: invalid quote encountered"),
        ("name!=|x|", "[name!= >|||< x|]: invalid quote encountered"),
        ('name=="x', '[name== >|"|< x]: literal not terminated'),
        ("name~=/x", "[name~= >|/|< x]: literal not terminated"),
        ('name=="x"y', '[name=="x" >|y|< ]: unexpected input: y'),
    ],
)
def test_a_bad_filter_says_where(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Filters(["name==fine", text])
    assert str(caught.value) == f"parse error: {message}"


@pytest.mark.parametrize(
    "text",
    [
        " name==x",  # a blank anywhere but around the operator
        "name==x ",
        "name==x ,kind==y",
        "name==x, kind==y",
        "labels .x==y",
        "labels. x==y",
        "name = = x",
        " ",
        "name ",
        r'name=="\q"',
        r'name=="\x4"',
        r'name=="\xg0"',
        r'name=="\08"',
        r'name=="\400"',  # beyond a byte
        r'name=="\ud800"',  # a surrogate
        r'name=="\U00110000"',  # beyond Unicode
        r'name=="\xff"',  # not UTF-8
        r'name=="\x1_0"',  # what int() takes and Go doesn't
        r'name=="\u+0e9"',
        'name=="\\\'"',  # Go escapes in a literal its own quote only
        'name=="a\nb"',
        'name=="\\',
        'labels."x==y',
        "labels./x/==y",
        "name==x\ty",
        "é==x",
        "name==\udcff",
    ],
)
def test_more_bad_filters(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^parse error: \["):
        Filters([text])


def test_without_re2_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(Unavailable, match=r"~= needs RE2, .*; install it: pip install google-re2$"):
        Filters(["name~=w"])
    assert Filters(["name==web", "labels.gc"]).holds(WEB)


pieces = st.sampled_from(
    [
        "name",
        "kind",
        "labels",
        "x",
        ".",
        ",",
        "==",
        "!=",
        "~=",
        "=",
        '"',
        "/",
        "|",
        "\\",
        " ",
        "\n",
        "\\x",
        "41",
        "é",
        "(",
        "[",
        "*",
        "'",
        "\0",
    ]
)
filters_text = st.lists(pieces, max_size=12).map("".join) | st.text(max_size=20)


@given(filters_text)
def test_the_parser_raises_nothing_but_invalid_argument(text: str) -> None:
    try:
        holds: Callable[[Info], bool] = Filters([text]).holds
    except InvalidArgument as error:
        assert str(error).startswith("parse error: [")
        return
    assert all(holds(snapshot) in (True, False) for snapshot in (WEB, BASE, PEEK))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_value_can_be_quoted(value: str) -> None:
    quoted = '"' + re.sub(r'[\\"\n]', lambda m: {"\\": "\\\\", '"': '\\"', "\n": "\\n"}[m[0]], value) + '"'
    assert Filters([f"name=={quoted}"]).holds(info(name=value))
    assert not Filters([f"name!={quoted}"]).holds(info(name=value))
    assert not Filters([f"name=={quoted}"]).holds(info(name=value + "!"))


@given(st.sampled_from(["name", "kind", "parent", "labels.gc", "other"]), st.from_regex(r"[a-z]{1,3}", fullmatch=True))
def test_not_equal_is_the_opposite_of_equal(field: str, value: str) -> None:
    same, other = Filters([f"{field}=={value}"]).holds, Filters([f"{field}!={value}"]).holds
    assert all(same(snapshot) is not other(snapshot) for snapshot in (WEB, BASE, PEEK))
