"""Labels of one client's own snapshots: written as shells and editors do, renamed and unlinked."""

from __future__ import annotations

import errno
import json
import os
import select
import time

from snapfs.tree.hiding import TEARDOWN
from tests.soak.client import Violation
from tests.soak.look import Look
from tests.soak.model import Model, Snapshot

LABELS = ("x", "team", "y.z/w", "containerd.io/gc.root")


class Labels:
    """The operations on labels."""

    def __init__(self, model: Model, look: Look) -> None:
        self.model = model
        self.look = look
        self.client = model.client
        self.pick = model.pick

    def some_labelled(self) -> tuple[Snapshot, str, str] | None:
        """One of its snapshots, mostly one of its labels, and the path of that."""
        its = self.model.some(without="labels")
        if its is None:
            return None
        there = bool(its.labels) and self.pick.random() < 0.7
        label = self.pick.choice(list(its.labels) if there else LABELS)
        return its, label, its.label(label)

    def write_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            value = self.pick.choice(["1", "blue", "zwei\nZeilen", "ü" * self.pick.randrange(1, 300)])
            self.write(*found, os.O_TRUNC, f"{value}\n".encode())

    def append_to_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            self.write(*found, os.O_APPEND, f"{self.pick.randrange(1000)}\n".encode())

    def empty_label(self) -> None:
        """An empty line, or nothing at all, which is how a shell empties it: both delete the label."""
        found = self.some_labelled()
        if found is not None:
            self.write(*found, os.O_TRUNC, self.pick.choice([b"", b"\n"]))

    def refused_label(self) -> None:
        found = self.some_labelled()
        if found is not None:
            content, number = self.pick.choice([(b"x" * 4100, errno.E2BIG), (b"\xff\n", errno.EILSEQ)])
            self.write(*found, os.O_TRUNC, content, number)

    def write(self, its: Snapshot, label: str, path: str, flags: int, content: bytes, refused: int = 0) -> None:
        """Open, write and close it."""
        before = its.labels.get(label)
        if flags == os.O_APPEND and before is not None:
            value = f"{before}\n{content.decode()}"
            refused = errno.E2BIG if len(label) + len(value.removesuffix("\n").encode()) > 4096 else 0
        else:
            value = content.decode(errors="replace")
        value = value.removesuffix("\n")
        with self.client.opened(path, os.O_WRONLY | os.O_CREAT | flags) as fd:
            if content and self.client.expect(refused, "write", path, lambda: os.write(fd, content)):
                self.client.tell("update", its.key)
        if not content and before is not None:
            self.client.tell("update", its.key)
        if refused:
            return
        its.labels.pop(label, None)
        if value:
            its.labels[label] = value
        self.look.check_label(its, label)

    def rename_label(self) -> None:
        found = self.some_labelled()
        if found is None:
            return
        its, label, path = found
        new = self.pick.choice(LABELS)
        if new == label:
            return
        target = its.label(new)
        expected = 0 if label in its.labels else errno.ENOENT
        if self.client.expect(expected, "rename", f"{path} {target}", lambda: os.rename(path, target)):
            its.labels[new] = its.labels.pop(label)
            self.client.tell("update", its.key)
            self.look.gone(path)
            self.look.check_label(its, new)

    def unlink_label(self) -> None:
        found = self.some_labelled()
        if found is None:
            return
        its, label, path = found
        if label not in its.labels:
            self.client.must_not(errno.ENOENT, "unlink", path, lambda: os.unlink(path))
        elif self.model.children(its.key) and time.monotonic() - its.refused[1] < TEARDOWN + 1:
            # who is refused to delete a part of a snapshot with children and goes on with labels is deleting it whole
            began = time.monotonic()
            try:
                self.client.call("unlink", path, lambda: os.unlink(path))
            except OSError as error:
                fits = error.errno == errno.ENOTEMPTY and began - its.refused[1] < TEARDOWN
                self.client.check(fits, path, f"unlink {path}: {error}")
                self.client.report.refusals[f"ENOTEMPTY unlink {path}"] += 1
                its.refused = began, time.monotonic()
            else:
                fits = time.monotonic() - its.refused[0] > TEARDOWN
                self.client.check(fits, path, f"unlink {path} worked, right after a refusal")
                del its.labels[label]
                self.client.tell("update", its.key)
        else:
            self.unlinked(its, label)

    def unlinked(self, its: Snapshot, label: str) -> None:
        path = its.label(label)
        self.client.must("unlink", path, lambda: os.unlink(path))
        del its.labels[label]
        self.client.tell("update", its.key)
        self.look.gone(path)

    def follow_events(self) -> None:
        """What is done is told at once: to who reads, and to who waits."""
        found = self.some_labelled()
        if found is None:
            return
        its, path = found[0], ".snapfs/events"
        with self.client.opened(path, os.O_RDONLY) as fd:
            end = os.fstat(fd).st_size
            self.client.must("read", path, lambda: os.pread(fd, 1 << 16, end))
            self.write(*found, os.O_TRUNC, b"followed\n")
            self.client.must("poll", path, lambda: _wait_for(fd, path))
            told = self.client.read_on(fd, path, end)
        lines = [json.loads(line) for line in told[: told.rfind(b"\n") + 1].splitlines()]
        own = [line for line in lines if line["id"] == its.number]
        right = [line for line in own if line["operation"] == "update" and line["labels"] == its.labels]
        self.client.check(bool(right), its.key, f"{path} does not tell of the update of {its.key}: {own}")


def _wait_for(fd: int, path: str) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(5000):
        raise Violation(path, f"poll of {path} does not see what was told")
