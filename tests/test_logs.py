"""events and error_log: files that grow, of which the last lines are kept, and that are followed."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs import Change, Info, Kind
from snapfs.tree import log as log_module
from snapfs.tree.events import Events
from snapfs.tree.log import LINES, ErrorLog, Log, OpenLog
from tests.daemon import Daemon
from tests.processes import die_with_parent
from tests.tree import info, nanoseconds, remove_all, shell

READY = select.POLLIN | select.POLLRDNORM


@pytest.fixture(scope="module")
def daemon(module_daemon: Daemon) -> Daemon:
    return module_daemon


@pytest.fixture
def mnt(daemon: Daemon) -> Iterator[Path]:
    yield daemon.mnt
    remove_all(daemon.mnt)


# -- the model: a reader gets each line whole and in order, or is told exactly how many it did not get


def replay(text: bytes, position: int = 0) -> int:
    """The number of the line that comes after ``text``: lines ``<number>-xxx``, and ``missed <count>``."""
    for line in text.decode().splitlines():
        if line.startswith("missed "):
            assert int(line[7:]) > 0
            position += int(line[7:])
        else:
            assert re.fullmatch(rf"{position}-x*", line), line
            position += 1
    return position


@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12), st.sampled_from([1, 1, 2, 3, 7, 20, 500]))),
    kept=st.integers(1, 8),
    slack=st.integers(1, 4),
    most=st.sampled_from([1 << 20, 60, 25]),
)
@settings(max_examples=400, deadline=None)
def test_a_sequential_reader_gets_all_or_is_told(steps: list[tuple[int, int, int]], kept: int, slack: int, most: int) -> None:
    with mock.patch.multiple(log_module, LINES=kept, _SLACK=slack, MOST=most):
        log = Log(lambda missed: f"missed {missed}\n")
        reader = OpenLog(log)
        text, lines = b"", 0

        def read(size: int) -> bytes:
            ready = reader.is_ready()
            data = reader.read(len(text), size)
            assert len(data) <= size
            assert bool(data) is ready
            return data

        for added, reads, size in steps:
            for _ in range(added):
                log.add(f"{lines}-{'x' * (lines * 7 % 23)}\n")
                lines += 1
            for _ in range(reads):
                text += read(size)
        while data := read(5):
            text += data
        assert not text or text.endswith(b"\n")
        assert replay(text) == lines


@given(
    lengths=st.lists(st.integers(0, 20), max_size=40),
    kept=st.integers(1, 8),
    slack=st.integers(1, 4),
    most=st.sampled_from([1 << 20, 60, 25]),
    reads=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 100)), max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_reading_anywhere(lengths: list[int], kept: int, slack: int, most: int, reads: list[tuple[int, int]]) -> None:
    with mock.patch.multiple(log_module, LINES=kept, _SLACK=slack, MOST=most):
        log = Log(lambda missed: f"missed {missed}\n")
        lines = [f"{number}-{'x' * length}\n".encode() for number, length in enumerate(lengths)]
        sizes = [log.size]
        for line in lines:
            log.add(line.decode())
            sizes.append(log.size)
        everything = b"".join(lines)
        assert sizes == sorted(sizes)
        assert log.size == len(everything)
        assert log.start == len(b"".join(lines[: log.dropped]))
        assert len(lines) - log.dropped < kept + slack
        assert log.size - log.start <= most or len(lines) - log.dropped == 1
        if most > log.size:
            assert min(kept, len(lines)) <= len(lines) - log.dropped
        for offset, size in reads:
            if offset >= log.start:
                assert log.read(offset, size) == everything[offset : offset + size]
        if not log.dropped:
            reader = OpenLog(log)
            for offset, size in reads:
                assert reader.read(offset, size) == everything[offset : offset + size]
        for offset, _ in reads:  # who comes late, wherever it begins
            if offset < log.start:
                assert OpenLog(log).read(offset, 1000) == f"missed {log.dropped}\n".encode() + everything[log.start :]
        reader = OpenLog(log)
        for offset, size in reads:
            reader.read(offset, size)
        assert replay(reader.read(0, 10000)) == len(lines), "seeking back to the start begins anew"


def test_lines_that_are_dropped_while_a_notice_is_read() -> None:
    with mock.patch.object(log_module, "LINES", 2), mock.patch.object(log_module, "_SLACK", 1):
        log = Log(lambda missed: f"missed {missed}\n")
        reader = OpenLog(log)
        for number in range(10):
            log.add(f"{number}-\n")
        text = reader.read(0, 1)
        for number in range(10, 20):
            log.add(f"{number}-\n")
            text += reader.read(len(text), 1)
        while data := reader.read(len(text), 1000):
            text += data
        assert replay(text) == 20


async def test_waiters_are_woken_once_and_dropped_on_close() -> None:
    log = ErrorLog()
    reader, other, woken = OpenLog(log), OpenLog(log), []
    assert not reader.is_ready()
    reader.wake_with(lambda: woken.append(1))
    other.wake_with(lambda: woken.append(2))
    await other.close()
    log.note("EPERM", "mkdir", "committed/x", "no\nnewline")
    log.note("EPERM", "mkdir", "committed/y", "no")
    assert woken == [1]
    assert reader.is_ready()
    assert reader.read(0, 10000).count(b"\n") == 2
    await reader.close()
    assert log.followers == []


def test_of_events_the_last_few_thousand_are_kept() -> None:
    events = Events()
    slow = OpenLog(events)
    slow_text = b""

    def shown(name: str) -> Info:
        return Info(name=name, kind=Kind.ACTIVE, id=1, parent=None, labels={"a\nb": "\u2028"}, created=1, updated=1)

    for number in range(3 * LINES):
        events.note(Change(shown(f"{number}") if number else None, shown(f"{number + 1}")))
        if number == 10:
            slow_text = slow.read(0, 70)
    for reader, text in ((OpenLog(events), b""), (slow, slow_text)):
        while data := reader.read(len(text), 100_000):
            text += data
        position = kept = 0
        for line in text.splitlines():
            event = json.loads(line)
            position += event.get("missed", 1)
            kept += "missed" not in event
            assert "missed" in event or event["number"] == position
        assert position == 3 * LINES
        assert LINES <= kept < 2 * LINES


# -- what events says


class Following:
    """A reader that remembers where it was."""

    def __init__(self, path: Path, at_end: bool = True) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.text = b""
        if at_end:
            self.read()
            self.text = b""

    def __enter__(self) -> Following:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, size: int = 1 << 16) -> list[dict[str, Any]]:
        """All events that are new."""
        while data := os.read(self.fd, size):
            self.text += data
        return [json.loads(line) for line in self.text.splitlines()]


def test_each_operation_is_told(mnt: Path) -> None:
    with Following(mnt / ".snapfs/events") as events:
        os.mkdir(mnt / "active/b")
        os.rename(mnt / "active/b", mnt / "committed/base")
        os.mkdir(mnt / "committed/base/active/web")
        os.mkdir(mnt / "committed/base/view/default%2F1")
        (mnt / "active/web/labels/team").write_text("blue")
        os.rename(mnt / "active/web", mnt / "active/net")
        os.rename(mnt / "committed/base", mnt / "committed/ground")
        os.unlink(mnt / "active/net/labels/team")
        os.rmdir(mnt / "active/net")
        (mnt / "committed/ground/usage.json").read_text()  # counted by now, which is nobody's doing
        (mnt / "view/default%2F1/info.json").read_text()
        found = events.read()
        first = info(mnt / "committed/ground")["id"]
    fields = ["number", "time", "operation", "key", "name", "parent", "kind", "id", "labels"]
    assert all(list(event) == fields for event in found)
    assert [tuple(event.values())[2:] for event in found] == [
        ("prepare", "b", None, None, "active", first, {}),
        ("commit", "b", "base", None, "committed", first, {}),
        ("prepare", "web", None, "base", "active", first + 1, {}),
        ("view", "default/1", None, "base", "view", first + 2, {}),
        ("update", "web", None, "base", "active", first + 1, {"team": "blue"}),
        ("rename", "web", "net", "base", "active", first + 1, {"team": "blue"}),
        ("rename", "base", "ground", None, "committed", first, {}),
        ("update", "net", None, "ground", "active", first + 1, {}),
        ("remove", "net", None, "ground", "active", first + 1, {}),
    ]
    numbers = [event["number"] for event in found]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    times = [nanoseconds(event["time"]) for event in found]
    assert times == sorted(times)
    assert abs(times[-1] - time.time_ns()) < 60e9


def test_numbers_begin_at_1_with_the_daemon(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    for name in ("a", "b"):
        assert (daemon.mnt / ".snapfs/events").read_text() == ""
        assert os.stat(daemon.mnt / ".snapfs/events").st_size == 0
        os.mkdir(daemon.mnt / "active" / name)
        (event,) = (daemon.mnt / ".snapfs/events").read_text().splitlines()
        assert (json.loads(event)["number"], json.loads(event)["key"]) == (1, name)
        assert daemon.stop() == 0
        daemon.start()


def test_what_fails_is_no_event(mnt: Path) -> None:
    os.mkdir(mnt / "active/k")
    with Following(mnt / ".snapfs/events") as events:
        for refused in (
            lambda: os.mkdir(mnt / "active/k"),
            lambda: os.mkdir(mnt / "committed/x"),
            lambda: os.rename(mnt / "active/k", mnt / "view/k"),
            lambda: os.rmdir(mnt / "active/none"),
            lambda: (mnt / "active/k/labels/a").write_text("x" * 5000),
        ):
            with pytest.raises(OSError, match=r"\[Errno"):
                refused()
        assert events.read() == []


def test_many_clients_each_operation_once(mnt: Path) -> None:
    clients, rounds = 8, 12

    def client(number: int) -> None:
        for turn in range(rounds):
            key = f"{number}-{turn}"
            os.mkdir(mnt / "active" / key)
            with pytest.raises(FileExistsError):
                os.mkdir(mnt / "view" / key)
            os.rename(mnt / "active" / key, mnt / "committed" / key)
            (mnt / "committed" / key / "labels/turn").write_text(str(turn))
            os.rmdir(mnt / "committed" / key)

    with Following(mnt / ".snapfs/events") as events, ThreadPoolExecutor(clients + 1) as threads:
        done = [threads.submit(client, number) for number in range(clients)]
        while not all(future.done() for future in done):
            events.read(61)
        for future in done:
            future.result()
        found = events.read()
    numbers = [event["number"] for event in found]
    assert numbers == list(range(numbers[0], numbers[0] + clients * rounds * 4))
    by_key: dict[str, list[str]] = {}
    for event in found:
        by_key.setdefault(event["key"], []).append(event["operation"])
    assert by_key == {
        f"{number}-{turn}": ["prepare", "commit", "update", "remove"] for number in range(clients) for turn in range(rounds)
    }
    for number in range(clients):  # and what one client did comes in its order
        turns = [int(event["key"].split("-")[1]) for event in found if event["key"].startswith(f"{number}-")]
        assert turns == sorted(turns)


# -- reading


READERS = [
    "dd if={} bs=1 status=none",  # while it is short
    "cat {}",
    "busybox cat {}",
    "cp {} ../copy && cat ../copy",
    "busybox cp {} ../copy && cat ../copy",
    "dd if={} bs=7777 status=none",
    "head -c 100000000 {}",
    "head -n 100000 {}",
    "tail -n +1 {}",
    "tail -n 100000 {}",
    "tail -c 100000000 {}",
    "busybox tail -n +1 {}",
    "grep -a '' {}",
    "tac {} | tac",
    "tar cf - {} | tar xOf -",
    "busybox tar cf - {} | tar xOf -",
]


@pytest.mark.parametrize("name", ["events", "error_log"])
def test_read_by_tools_and_calls(mnt: Path, name: str) -> None:
    path = mnt / ".snapfs" / name
    for number in range(3):  # each time it has grown since it was looked up last
        for reader in READERS[number > 0 :]:
            os.mkdir(mnt / "active/k")
            os.rmdir(mnt / "active/k")
            with pytest.raises(PermissionError):
                os.mkdir(mnt / f"committed/{number}")
            done = subprocess.run(["sh", "-c", reader.format(f".snapfs/{name}")], cwd=mnt, capture_output=True, timeout=30)
            expected = path.read_bytes()
            assert (done.returncode, done.stderr) == (0, b""), reader
            assert done.stdout == expected, reader
            assert os.stat(path).st_size == len(expected)
    assert shell(mnt, f"wc -c < .snapfs/{name}").stdout == f"{len(expected)}\n"
    assert int(shell(mnt, f"wc -l < .snapfs/{name}").stdout) == len(expected.splitlines())
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in (0, 1, 7, 4095, 4096, len(expected) - 3, len(expected), len(expected) + 1, 1 << 40):
            for size in (1, 3, 4096, 100_000):
                assert os.pread(fd, size, offset) == expected[offset : offset + size]
        assert os.lseek(fd, 0, os.SEEK_END) == len(expected)
        assert os.read(fd, 10) == b"", "never blocks"
        os.lseek(fd, -20, os.SEEK_CUR)
        assert os.read(fd, 100) == expected[-20:]
        os.lseek(fd, 5, os.SEEK_SET)
        assert os.read(fd, 100) == expected[5:105]
        target = os.memfd_create("target")
        try:
            assert os.sendfile(target, fd, 3, len(expected)) == len(expected) - 3
            assert os.pread(target, len(expected), 0) == expected[3:]
        finally:
            os.close(target)
        with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
            assert bytes(mapped) == expected
    finally:
        os.close(fd)
    with open(path) as lines:
        assert "".join(lines) == expected.decode()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(PermissionError):
            os.close(os.open(path, flags))


def refuse(mnt: Path, times: int) -> None:
    """So many lines in error_log."""
    for number in range(times):
        try:
            os.mkdir(mnt / f"committed/{number}")
        except PermissionError:
            continue
        raise AssertionError


def error_lines(text: bytes) -> tuple[list[str], list[int]]:
    """The lines, each of which must be whole, and the counts of those that are not there."""
    lines, missed = [], []
    for line in text.decode().splitlines():
        if found := re.fullmatch(r"(\d+) earlier lines are not kept", line):
            missed.append(int(found[1]))
        else:
            assert re.fullmatch(r"2\S+Z EPERM mkdir committed/\w+: committed snapshots can't be made by mkdir: .*", line), line
            lines.append(line)
    return lines, missed


def test_who_falls_behind_is_told_and_no_line_is_torn(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    path = daemon.mnt / ".snapfs/error_log"
    total, step = 3 * LINES, 1500
    sizes, texts = (1, 13, 90, 4096, 1 << 17), []
    fds = [os.open(path, os.O_RDONLY) for _ in sizes]
    found = [b""] * len(fds)
    seen = []
    try:
        for _ in range(total // step):
            with ThreadPoolExecutor(1) as threads:
                growing = threads.submit(refuse, daemon.mnt, step)
                while not growing.done():  # the small readers fall behind, the large ones follow
                    for index, fd in enumerate(fds):
                        found[index] += os.read(fd, sizes[index])
                    seen.append(os.stat(path).st_size)
                growing.result()
        for index, fd in enumerate(fds):
            while data := os.read(fd, max(sizes[index], 1000)):
                found[index] += data
    finally:
        for fd in fds:
            os.close(fd)
    assert seen == sorted(seen)
    texts = [error_lines(text) for text in found]
    for lines, missed in texts:
        assert len(lines) + sum(missed) == total
        assert lines == sorted(lines)
        assert len(set(lines)) == len(lines)
    assert texts[0][1], "who reads byte by byte did fall behind"
    assert not texts[-1][1]
    # who comes now
    for command in ("cat", "busybox cat", "tail -n +1", "busybox tail -n +1", "grep ''", "dd status=none bs=1000 if="):
        done = subprocess.run(
            ["sh", "-c", f"{command}{'' if command.endswith('=') else ' '}{path}"], capture_output=True, timeout=30
        )
        assert (done.returncode, done.stderr) == (0, b""), command
        lines, missed = error_lines(done.stdout)
        assert len(lines) + sum(missed) == total, command
        assert len(missed) == 1, command
        assert LINES <= len(lines) < 2 * LINES, command
        assert lines == texts[-1][0][-len(lines) :], command
    for command in ("tail -n 5", "busybox tail -n 5"):
        done = subprocess.run([*command.split(), str(path)], capture_output=True, timeout=30)
        assert error_lines(done.stdout) == (texts[-1][0][-5:], []), command
    assert daemon.stop() == 0


# -- following


def next_lines(process: subprocess.Popen[bytes], count: int) -> list[bytes]:
    """The next ``count`` lines that it says; fails when they take too long."""
    assert process.stdout is not None
    lines = []
    for _ in range(count):
        assert select.select([process.stdout], [], [], 20)[0], "nothing came"
        lines.append(process.stdout.readline())
    return lines


TAILS = [
    "tail -s 0.02 -n 0 -f",
    "tail -s 0.02 -n +1 -f",
    "tail -s 0.02 -n 1 -F",
    "tail -s 0.02 -c +1 -f",
    "busybox tail -s 1 -n 1 -f",
    "busybox tail -s 1 -n +1 -f",
    "busybox tail -s 1 -n 1 -F",
]


@pytest.mark.parametrize("name", ["events", "error_log"])
def test_tail_follows(make_daemon: Callable[..., Daemon], name: str) -> None:
    daemon = make_daemon().start()
    mnt, path = daemon.mnt, daemon.mnt / ".snapfs" / name

    def one_more() -> None:
        if name == "events":
            os.mkdir(mnt / f"active/{time.time_ns()}")
        else:
            refuse(mnt, 1)

    one_more()
    tails = [
        subprocess.Popen([*command.split(), str(path)], stdout=subprocess.PIPE, bufsize=0, preexec_fn=die_with_parent)
        for command in TAILS
    ]
    try:
        for command, tail in zip(TAILS, tails, strict=True):
            if "-n 0" not in command:
                assert next_lines(tail, 1) == path.read_bytes().splitlines(True), command
        # the one that says nothing about what is there has begun when it sleeps
        while "nanosleep" not in Path(f"/proc/{tails[0].pid}/wchan").read_text() + "nanosleep" * (tails[0].poll() is not None):
            if Path(f"/proc/{tails[0].pid}/wchan").read_text() == "0":  # not told here
                time.sleep(0.3)
                break
        for count in (1, 3, 40):
            for _ in range(count):
                one_more()
            expected = path.read_bytes().splitlines(True)[-count:]
            for command, tail in zip(TAILS, tails, strict=True):
                assert next_lines(tail, count) == expected, command
    finally:
        for tail in tails:
            tail.kill()
            tail.communicate()
    assert daemon.stop() == 0


def poll_wait(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    found = poll.poll(timeout * 1000)
    assert found in ([], [(fd, select.POLLIN)])
    return bool(found)


def select_wait(fd: int, timeout: float) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def epoll_wait(fd: int, timeout: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return bool(epoll.poll(timeout))


def edge_wait(fd: int, timeout: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
        return bool(epoll.poll(timeout))


@pytest.mark.parametrize("wait", [poll_wait, select_wait, epoll_wait, edge_wait])
@pytest.mark.parametrize("name", ["events", "error_log"])
def test_poll_follows(mnt: Path, wait: Callable[[int, float], bool], name: str) -> None:
    os.mkdir(mnt / "active/k")
    refuse(mnt, 1)
    fd = os.open(mnt / ".snapfs" / name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert wait(fd, 0), "there is something to read"
        while os.read(fd, 1 << 17):
            pass
        for turn in range(5):
            assert not wait(fd, 0)
            assert os.read(fd, 100) == b"", "never blocks"
            waiting = ThreadPoolExecutor(2)
            with waiting:
                woken = [waiting.submit(wait, fd, 20) for _ in range(2)]
                if turn % 2:
                    assert not wait(fd, 0.02), "others wait too by now"
                os.rename(mnt / "active/k", mnt / "active/l")
                os.rename(mnt / "active/l", mnt / "active/k")
                refuse(mnt, 2)
                assert [future.result() for future in woken] == [True, True]
            assert os.read(fd, 1 << 17).count(b"\n") == 2
    finally:
        os.close(fd)


def test_one_epoll_follows_both_and_many_readers(mnt: Path) -> None:
    """Registered once, as event loops do, told of each change; edge-triggered too."""
    names = ["events", "error_log"] * 20
    fds = {os.open(mnt / ".snapfs" / name, os.O_RDONLY): name for name in names}
    try:
        with select.epoll() as epoll:
            for number, fd in enumerate(fds):
                while os.read(fd, 1 << 17):
                    pass
                epoll.register(fd, select.EPOLLIN | (select.EPOLLET if number % 3 else 0))
            epoll.poll(0)
            assert epoll.poll(0) == []
            for turn in range(10):
                os.mkdir(mnt / f"active/{turn}")
                refuse(mnt, 1)
                waiting = set(fds)
                deadline = time.monotonic() + 20
                while waiting and time.monotonic() < deadline:
                    for fd, what in epoll.poll(1):
                        assert what & select.EPOLLIN
                        text = os.read(fd, 1 << 17)
                        if text:
                            assert fds[fd] == "error_log" or json.loads(text)["key"] == str(turn)
                            waiting.discard(fd)
                assert not waiting
    finally:
        for fd in fds:
            os.close(fd)


def test_everything_else_is_always_ready(mnt: Path) -> None:
    os.mkdir(mnt / "active/k")
    (mnt / "active/k/labels/a").write_text("b")
    paths = ["README", ".snapfs/version", ".snapfs/stats.json", ".snapfs/cleanup"]
    paths += [f"active/k/{name}" for name in ("info.json", "usage.json", "changes", "mounts.json", "mount.sh", "labels/a")]
    for path in paths:
        with open(mnt / path, "rb") as file:
            assert poll_wait(file.fileno(), 0), path
            assert select.select([file], [file], [], 0)[:2] == ([file], [file]), path
            file.read()
            assert poll_wait(file.fileno(), 0), path


def test_pollers_that_are_killed_hinder_nobody(daemon: Daemon, mnt: Path) -> None:
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    code = "import os,select,sys; f=os.open(sys.argv[1],0)\nwhile os.read(f,1<<17): pass\nprint(flush=True)\n"
    code += "select.select([f],[],[])"
    pollers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(mnt / ".snapfs/events")], stdout=subprocess.PIPE, preexec_fn=die_with_parent
        )
        for _ in range(4)
    ]
    try:
        for poller in pollers:
            next_lines(poller, 1)
        for poller in pollers[:2]:
            poller.kill()
            poller.wait()
        os.mkdir(mnt / "active/k")
        for poller in pollers[2:]:
            assert poller.wait(timeout=20) == 0
    finally:
        for poller in pollers:
            with poller:
                poller.kill()
    assert (mnt / ".snapfs/events").read_text().splitlines()[-1].count('"k"') == 1
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) <= before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_daemon_wakes_who_polls(make_daemon: Callable[..., Daemon], how: signal.Signals) -> None:
    daemon = make_daemon().start()
    fds = [os.open(daemon.mnt / ".snapfs" / name, os.O_RDONLY) for name in ("events", "error_log")]
    try:
        with ThreadPoolExecutor(3) as threads:

            def wait(fd: int) -> list[tuple[int, int]]:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                return poll.poll(20_000)

            woken = [threads.submit(wait, fd) for fd in fds]
            with pytest.raises(TimeoutError):
                woken[0].result(timeout=0.05)
            assert daemon.stop(how) == (0 if how is signal.SIGTERM else -how)
            if how is signal.SIGTERM:
                assert len(daemon.said) == 1, "it complained on standard error"
            began = time.monotonic()
            assert all(future.result() for future in woken)
            assert time.monotonic() - began < 10
        for fd in fds:
            with pytest.raises(OSError, match=r"\[Errno"):
                os.read(fd, 10)
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):  # as its daemon is gone
                os.close(fd)


def test_reads_and_polls_while_lines_come_from_many_threads(mnt: Path) -> None:
    """A follower that polls and reads misses nothing and gets nothing twice."""
    total, threads_count = 400, 4
    stop = threading.Event()
    with Following(mnt / ".snapfs/error_log", at_end=False) as errors, ThreadPoolExecutor(threads_count) as threads:
        while os.read(errors.fd, 1 << 17):
            pass
        done = [threads.submit(refuse, mnt, total // threads_count) for _ in range(threads_count)]
        deadline = time.monotonic() + 30
        while errors.text.count(b"\n") < total and not stop.is_set():
            assert time.monotonic() < deadline
            assert poll_wait(errors.fd, 20), "never woken"
            data = os.read(errors.fd, 333)
            assert data, "ready, so there is something"
            errors.text += data
        for future in done:
            future.result()
        assert os.read(errors.fd, 100) == b""
        lines, missed = error_lines(errors.text)
        assert (len(lines), missed) == (total, [])
