"""examples/agents: the hook of each agent, called as its documentation says by a stand-in (agent.py) that works in a workspace;
what is skipped, what it makes of hostile input, and the session of the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import agent
from tests.command import SNAPFS
from tests.home import Home, home_of, with_workspace
from tests.readme import read
from tests.users import alice

pytestmark = [pytest.mark.mounts, pytest.mark.usefixtures("everybodys_fuse", "users")]

AGENTS = Path(__file__).parent.parent / "examples/agents"
HOOK = ".local/share/snapfs/checkpoint.sh"


@pytest.fixture(params=["alice", "root"])
def home(request: pytest.FixtureRequest) -> Iterator[Home]:
    """With a running daemon, the workspace ``w``, and the hook where the page says that it is to be."""
    with home_of(alice if request.param == "alice" else ()) as home:
        home.daemon.start()
        with_workspace(home)
        home.sh(f"mkdir -p {os.path.dirname(HOOK)} .claude .codex .gemini")
        shutil.copy(AGENTS / "checkpoint.sh", home.path / HOOK)
        for name, (settings, *_) in agent.AGENTS.items():
            shutil.copy(AGENTS / f"{name}.json", home.path / settings)
        yield home
        assert home.daemon.stop() == 0
        assert home.mounts() == []


def works(home: Home, name: str, *calls: str | tuple[str, str], workspace: str = "w") -> str:
    """What the stand-in for the agent ``name`` says that makes these tool calls in a workspace."""
    (home.path / "calls.json").write_text(json.dumps(calls))
    program = Path(agent.__file__)
    return home.snapfs("run", workspace, "--", sys.executable, "-I", program, name, home.path / "calls.json")


def messages(home: Home, key: str = "w") -> list[str]:
    """Of its checkpoints."""
    return [line.split("\t")[3] for line in home.read(f"active/{key}/checkpoint").splitlines()]


@pytest.mark.parametrize("name", agent.AGENTS)
def test_a_checkpoint_a_step(home: Home, name: str) -> None:
    """What a shell has deleted is back, too; what was only looked at has made none."""
    said = works(home, name, "cat file", ("new", "1\n"), "cat new", "rm -r file sub; echo 2 > new; chmod 600 new", "ls", "ls")
    assert "the hook" not in said
    tool = agent.AGENTS[name][2]
    assert messages(home) == [f"before {tool}: cat new", f"before {tool}: ls"]
    looked = "cat w@1/rootfs/new w@1/rootfs/file w@2/rootfs/new; ls -Am w@1/rootfs/ w@2/rootfs/"
    assert home.sh(f"cd tree/committed; {looked}") == ("1\nbase\n2\nw@1/rootfs/:\nfile, new, sub\n\nw@2/rootfs/:\nnew\n")
    home.snapfs("rollback", "w", "1")
    assert home.sh("cd tree/active/w/rootfs/; cat new file; ls; stat -c %a new") == "1\nbase\nfile\nnew\nsub\n644\n"


def test_the_settings_are_what_the_documentation_says() -> None:
    for name, (_, event, *_) in agent.AGENTS.items():
        ((group,),) = json.loads((AGENTS / f"{name}.json").read_text())["hooks"].values()
        assert event in (AGENTS / f"{name}.json").read_text()
        assert group == {"hooks": [{"type": "command", "command": f"sh ~/{HOOK}"}]}


STEPS = {
    "contents, of the same size and time": "touch -r file t; echo BASE > file; touch -r t file; rm t",
    "again": "touch -r file t; echo Base > file; touch -r t file; rm t",
    "a mode": "chmod 600 file",
    "the mode of the top": "chmod 750 .",
    "an attribute": shlex.join([sys.executable, "-c", "import os; os.setxattr('file', 'user.a', b'b')"]),
    "a new file": "echo new > new",
    "a hard link": "ln new other",
    "an empty directory": "mkdir -p d/e",
    "a renaming": "mv new d/e/new",
    "a deletion in the layer": "rm other",
    "a deletion of what is below": "rm file",
    "a directory of what is below": "rmdir sub",
    "in a directory that hides its names": "mkdir x; echo 1 > x/y; chmod 100 x",
}


def test_each_change_makes_one_and_nothing_else_does(home: Home) -> None:
    """A checkpoint; however small the change, and though nobody but the owner may list a directory."""
    hook = f"""hook() {{ printf '{{"tool_name":"Bash","tool_input":{{"command":"%s"}}}}' "$1" | sh ~/{HOOK}; }}"""
    steps = "\n".join(f"{step}; hook {shlex.quote(name)}; hook 'nothing after it'" for name, step in STEPS.items())
    home.inside("w", f"{hook}\nhook nothing; cat file; hook nothing\n{steps}")
    unlisted = ["nothing after it"] if home.who else []  # what alice may not list counts as changed, each time
    assert messages(home) == [f"before Bash: {name}" for name in [*STEPS, *unlisted]]


def test_none_after_a_rollback(home: Home) -> None:
    works(home, "claude", ("new", "1\n"), "echo 2 > new", "ls")
    assert len(messages(home)) == 2
    home.snapfs("rollback", "w", "1")
    works(home, "claude", "ls", "cat new", "echo 3 > new", "ls")
    assert messages(home)[2:] == ["before Bash: ls"]
    home.snapfs("rm", "w@3")
    works(home, "claude", "ls")
    assert messages(home)[2:] == ["before Bash: ls"], "the last one is gone, so there is another"


HOSTILE = {
    "nothing": b"",
    "no JSON": b"\x1b[2J\0\r\ngarbage\x7f\xff\xfe" + b"x" * 5000,
    "a text of several lines": b'{"tool_name":"a","tool_input":{"command":"a\\nb\\u0000 $(touch hit) `touch hit` %s \\\\c"}}',
    "raw control characters": b'{"tool_name":"Bash","tool_input":{"command":"a\nb\tc\x1b]0;x\x07"}}',
    "letters of several bytes": b'{"tool_name":"Write","tool_input":{"file_path":"/' + "é😀".encode() * 500 + b'"}}',
    "no UTF-8": b'{"tool_name":"Bash","tool_input":{"command":"\xf7\xbf\xbf\xbf \xed\xa0\x80 \xc0\x80"}}',
    "ten megabytes": b'{"tool_name":"Write","tool_input":{"content":"' + b'\\"command\\": ' * 800_000 + b'"}}',
    "many names": b'"tool_name":"a","tool_input":{' + b'"command":"' * 6000,
    "deep": b'{"tool_name":"mcp__a__b","tool_input":' + b'{"a":' * 20_000,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_input(home: Home, what: str) -> None:
    """It is read to its end, nothing of it is done, and the checkpoint is made with a message that is one line of text."""
    (home.path / "input").write_bytes(HOSTILE[what])
    program = f"""
import subprocess
with subprocess.Popen(["sh", "{home.path}/{HOOK}"], stdin=-1, stdout=-1, stderr=-2) as hook:
    hook.stdin.write(open("{home.path}/input", "rb").read())  # BrokenPipeError, if it did not read that
    hook.stdin.close()
    print(hook.wait(60), hook.stdout.read())"""
    assert home.inside("w", f"echo 1 > new; {shlex.join([sys.executable, '-c', program])}; ls") == "0 b''\nfile\nnew\nsub\n"
    (message,) = messages(home)
    assert message.startswith("before ")
    assert len(message.encode()) < 320
    assert message.isprintable()


def test_it_never_stands_in_the_way(home: Home) -> None:
    """Where there is no workspace, no tree, no input, or no checkpoint to be had, the agent goes on."""
    hook = f"sh ~/{HOOK}"
    call = f'echo \'{{"tool_name":"Bash","tool_input":{{"command":"x"}}}}\' | {hook}'
    assert home.sh(f"unset SNAPFS; {call}; {call} >&-; {hook} <&-; export SNAPFS=/nonexistent SNAPFS_WORKSPACE=w; {call}") == ""
    assert home.sh(f"export SNAPFS_WORKSPACE=nonesuch; {call}; export SNAPFS_WORKSPACE=../committed/b; {call}") == ""
    assert home.inside("w", f"echo 1 > new; {hook} <&- >&- 2>&-; {call} | cat; ls") == "file\nnew\nsub\n"
    assert messages(home) == ["before "], "a closed input is an empty one"
    home.sh("mkdir tree/committed/b/active/other%2Fone")
    assert home.inside("other/one", f"echo 1 > new; {call}") == ""
    assert messages(home, "other%2Fone") == ["before Bash: x"]
    several = f"for i in 1 2 3; do {{ {call}; }} & done; wait"
    made = home.inside("other/one", f"echo 2 > new; {several}; cat {home.mnt}/active/other%2Fone/checkpoint; {call}")
    assert 2 <= len(messages(home, "other%2Fone")) == made.count("\n") <= 4, "those of three calls at once, and then none"
    home.sh("mkdir tree/active/full; for i in $(seq 256); do echo x > tree/active/full/labels/$i; done")
    assert home.inside("full", f"echo 1 > new; {call}") == ""
    assert messages(home, "full") == [], "there is no room for its labels"


# -- the page

CALLS = (
    ("answer.py", "print(6 * 7)\n"),
    "python3 answer.py",
    "sed -i s/6/7/ answer.py",
    "find . -name '*.txt' -delete",
    "ls",
)


def blocks(home: Home) -> list[list[str]]:
    """The lines of each block of the page's session, with this home's paths."""
    text = read("examples/agents").split("## A session\n")[1].split("\n## ")[0]
    text = text.replace("~/snap", "~/tree").replace("/home/ann/snap", str(home.mnt))
    return [textwrap.dedent(block).splitlines() for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]


def commands(block: list[str]) -> str:
    """As a script, which prints each of them."""
    found = [line.removeprefix("$ ") for line in block if line.startswith("$ ")]
    return "".join(f"printf '%s\\n' {shlex.quote('$ ' + command)}\n{command}\n" for command in found)


def masked(lines: list[str]) -> list[str]:
    """Without sizes and ages."""
    return [re.sub(r"^(NUMBER.*SIZE).*|( +\d  web@\d).*(?=  before)", r"\1\2", line) for line in lines]


def test_the_session(home: Home) -> None:
    first, second, third = blocks(home)
    (home.path / "calls.json").write_text(json.dumps(CALLS))
    programs = {
        "agent": shlex.join([sys.executable, "-I", agent.__file__, "claude", str(home.path / "calls.json")]),
        "snapfs": f'{shlex.join(SNAPFS)} "$@"',
    }
    home.sh("mkdir -p bin project/tests; cd project; echo ask Bob > notes.txt; echo 6 7 42 > tests/cases.txt")
    for name, command in programs.items():
        (home.path / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (home.path / "bin" / name).chmod(0o755)
    path = f"PATH={home.path}/bin:{os.environ['PATH']}"
    words = home.words(path, "bash", "-c", commands(first))
    with subprocess.Popen(words, cwd=home.path, stdin=-1, stdout=-1, text=True) as terminal:
        try:
            assert terminal.stdout is not None
            seen = [terminal.stdout.readline().rstrip("\n") for _ in first[:-1]]
            assert [*seen, terminal.stdout.read(1)] == first
            done = home.does("env", path, "bash", "-c", commands(second))
            assert masked(done.splitlines()) == masked(second)
            assert terminal.wait(20) != 0, "it was killed"
        finally:
            terminal.kill()
    assert home.does("env", path, "bash", "-c", commands(third)).splitlines() == third
    assert home.sh("cd project; ls") == "notes.txt\ntests\n", "the directory itself is as it was"
