"""The command where the locale is not UTF-8: it reads and writes UTF-8 all the same, as the names in the tree are."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import syslog
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapfs.cli import logs
from tests.command import SNAPFS
from tests.daemon import Daemon

NAME = "é ě… ├─ 日本 \x9b31m/ß"

Command = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For $LOCPATH: a German of Latin-1."""
    directory = tmp_path_factory.mktemp("locales")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(directory / "de_DE.ISO-8859-1")], check=True)
    return directory


def command(environment: dict[str, str], at: Path) -> Command:
    unset = ("LANG", "LC_CTYPE", "PYTHONUTF8", "PYTHONIOENCODING", "SNAPFS")
    clean = {key: value for key, value in os.environ.items() if key not in unset}

    def run(*words: str | bytes, status: int = 0) -> subprocess.CompletedProcess[bytes]:
        environ = {**clean, **environment, "SNAPFS": str(at)}
        done = subprocess.run([*SNAPFS, *words], env=environ, capture_output=True, timeout=60, check=False)
        assert b"Traceback" not in done.stderr
        assert done.returncode == status, done.stderr
        assert (done.stderr == b"") is (status == 0)
        return done

    return run


@pytest.fixture(params=["Latin-1", "ASCII", "output alone"])
def odd(request: pytest.FixtureRequest, locales: Path, module_daemon: Daemon) -> Iterator[Command]:
    """The command on a tree, with an environment that asks for another charset."""
    environment = {
        "Latin-1": {"LC_ALL": "de_DE.ISO-8859-1", "LOCPATH": str(locales)},
        "ASCII": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        "output alone": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
    }[request.param]
    run = command(environment, module_daemon.mnt)
    yield run
    left = run("ls", "-0").stdout.split(b"\0")[:-1]
    if left:
        run("rm", "-r", "--", *left)


@pytest.fixture
def usual(module_daemon: Daemon) -> Command:
    """The command on the same tree in UTF-8."""
    return command({"LC_ALL": "C.UTF-8"}, module_daemon.mnt)


def test_help(odd: Command, usual: Command) -> None:
    assert "snapfs VERB …" in odd("--help").stdout.decode()
    for words in (["--help"], ["rm", "--help"], ["serve", "-h"], ["completion", "bash"]):
        assert odd(*words).stdout == usual(*words).stdout


def test_a_life(odd: Command, usual: Command, module_daemon: Daemon, tmp_path: Path) -> None:
    """Names and labels are the bytes that were typed, and are shown as in any other locale."""
    name = NAME
    directory = Path(odd("prepare", name, "-l", f"{name}={name}").stdout.decode().removesuffix("\n"))
    assert directory.parent == module_daemon.mnt / "active"
    (directory / "rootfs/ä").touch()
    (directory / "rootfs" / os.fsdecode(b"\xe9\x80")).touch()
    os.mkdir(tmp_path / "mé")
    odd("mount", name, str(tmp_path / "mé"))
    odd("umount", name)
    odd("checkpoint", name, "-m", f"für {name}")
    odd("fork", name, f"{name}2")
    odd("label", name, f"k={name}")
    odd("commit", name, f"{name}3")
    for words in (
        *(["ls", *each] for each in ([], ["-q"], ["-0"], ["--json"], ["--label", f"k={name}"])),
        *(["show", *each, f"{name}3"] for each in ([], ["--json"], ["--path"])),
        *([verb, *each] for verb in ("tree", "usage", "events", "prune -n --label k") for each in ([], ["--json"])),
        *(["diff", f"{name}@1", *each] for each in ([], ["--json"])),
        ["checkpoint", "--list", name],
        ["label", f"{name}3"],
        ["_complete", "show", ""],
    ):
        words = [*words[0].split(), *words[1:]]
        said, wanted = (re.sub(rb" *\b[0-9]+s\b", b"", run(*words).stdout) for run in (odd, usual))  # without ages
        assert said == wanted
    assert f"{name}3\n" in odd("ls", "-q").stdout.decode()


REFUSED = [
    ("prepare X", 1),
    ("prepare y -p X", 1),
    ("show X", 1),
    ("rm X", 1),
    ("commit X v1", 1),
    ("commit web X", 1),
    ("label web k=X", 1),
    ("label web X=k", 1),
    ("label web -d X", 1),
    ("mount X /", 1),
    ("mount web /X", 1),
    ("umount /X", 1),
    ("fork web X", 1),
    ("rollback web X", 1),
    ("tree X", 3),
    ("X", 2),
    ("ls --kind X", 2),
    ("ls --X", 2),
    ("ls X", 2),
    ("prune --older-than X", 2),
    ("completion X", 2),
    ("ls --at /X", 7),
    ("check /X", 1),
    ("backup /X /X", 1),
]


def test_what_is_not_utf_8_is_refused_in_words(odd: Command) -> None:
    odd("prepare", "web")
    for words, status in REFUSED:
        done = odd(*(word.encode().replace(b"X", b"\xe9") for word in words.split()), status=status)
        assert done.stderr.startswith(b"snapfs")
        done.stderr.decode()


def test_serving(locales: Path, tmp_path: Path, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-1")
    monkeypatch.setenv("LOCPATH", str(locales))
    daemon = make_daemon(root=tmp_path / "rööt", mnt=tmp_path / "mnt€").start()
    assert daemon.said == [f"snapfs: serving {tmp_path}/rööt on {tmp_path}/mnt€\n"]
    (daemon.mnt / "active/ě…").mkdir()
    (daemon.mnt / "active/ě…/rootfs/ä").touch()
    assert (daemon.mnt / "active/ě…/changes").read_text() == "A /ä\n"
    with pytest.raises(OSError, match="not permitted"):
        (daemon.mnt / "committed/ě…").mkdir()
    assert "ě…" in daemon.error_log()[-1]
    assert daemon.stop() == 0
    assert len(daemon.said) == 1


def test_what_is_no_text_gets_to_syslog(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda priority, line: said.append(line.encode().decode()))
    logs._Syslog().emit(logging.LogRecord("snapfs", logging.ERROR, "", 0, "cannot unmount /\udce9", None, None))
    assert said == ["cannot unmount /\\xe9"]
    said.clear()
    logs._Syslog().emit(logging.LogRecord("snapfs", logging.ERROR, "", 0, "%s", ("a\nsnapfs: ended: b\x1b]0;c\x07",), None))
    assert said == ["a%0Asnapfs: ended: b%1B]0;c%07"]
