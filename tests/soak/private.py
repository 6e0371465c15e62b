"""Names that one client alone uses: it knows what must be there, and what each call must answer."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from snapfs.model import Kind
from tests.soak.client import Client, file_name
from tests.soak.files import Files
from tests.soak.labels import Labels
from tests.soak.look import Look
from tests.soak.model import Model, Snapshot, inside

T = TypeVar("T")


def by_another(work: Callable[[], T]) -> T:
    """``work`` by a thread of its own, which has read nothing: who has read all of a snapshot and deletes it moves it."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


class Private:
    """The operations on one client's own names; those on whole snapshots are here."""

    def __init__(self, client: Client, base: int) -> None:
        self.client = client
        self.pick = client.pick
        self.model = Model(client, base)
        self.look = Look(self.model)
        self.labels = Labels(self.model, self.look)
        self.files = Files(self.model)

    def operations(self) -> dict[Callable[[], None], int]:
        """What to do, and how often."""
        return {
            self.make: 12,
            self.commit: 8,
            self.rename: 5,
            self.remove: 5,
            self.remove_as_a_file_manager: 3,
            self.forbidden: 4,
            self.name: 3,
            self.labels.write_label: 6,
            self.labels.append_to_label: 3,
            self.labels.empty_label: 2,
            self.labels.rename_label: 3,
            self.labels.unlink_label: 4,
            self.labels.refused_label: 2,
            self.files.write_file: 10,
            self.files.delete_file: 4,
            self.files.read_files: 6,
            self.files.write_what_is_read_only: 2,
            self.look.check_one: 10,
            self.look.check_what_is_gone: 4,
            self.look.list_all: 2,
            self.hide: 1,
            self.flush: 1,
            self.labels.follow_events: 3,
        }

    def make(self) -> None:
        kind = Kind.VIEW if self.pick.random() < 0.2 else Kind.ACTIVE
        key, parent = self.pick.choice(self.model.keys), self.model.some_parent()
        path = f"{kind}/{file_name(key)}"
        if parent is not None:
            path = inside(parent, path)
        other, expected = self.model.snapshots.get(key), 0
        if parent is not None and not self.model.is_committed(parent):
            expected = errno.ENOENT
        elif other is not None:
            expected = errno.EEXIST
        logged = other is not None and other.kind is not kind and expected == errno.EEXIST
        if not self.client.expect(expected, "mkdir", path, lambda: os.mkdir(path), logged=logged):
            return
        self.client.tell("view" if kind is Kind.VIEW else "prepare", key)
        its = self.model.snapshots[key] = Snapshot(key, kind, 0, parent)
        its.number = self.look.info(its)["id"]

    def commit(self) -> None:
        key, name = self.model.some_key(Kind.ACTIVE), self.pick.choice(self.model.keys)
        its, other = self.model.snapshots.get(key), self.model.snapshots.get(name)
        parent = self.model.some_parent() if self.pick.random() < 0.4 else None
        if its is not None and its.parent is not None and self.pick.random() < 0.3:
            parent = its.parent
        source, target = f"active/{file_name(key)}", f"committed/{file_name(name)}"
        if parent is not None:
            target = inside(parent, target)
        with self.model.perhaps_held(its if its and its.kind is Kind.ACTIVE else None) as held:
            expected = 0
            if (parent is not None and not self.model.is_committed(parent)) or its is None or its.kind is not Kind.ACTIVE:
                expected = errno.ENOENT
            elif parent is not None and other is not None and (other.kind, other.parent) == (Kind.COMMITTED, parent):
                expected = errno.ENOTDIR  # rename(2) of a directory onto a link
            elif other not in (None, its):
                expected = errno.EEXIST
            elif held:
                expected = errno.EBUSY
            elif parent is not None and its.parent not in (None, parent):
                expected = errno.EPERM
            logged = expected == errno.EEXIST
            both = f"{source} {target}"
            if not self.client.expect(expected, "rename", both, lambda: os.rename(source, target), logged=logged):
                return
        assert its is not None
        self.client.tell("commit", key, name)
        its.kind, its.parent = Kind.COMMITTED, parent or its.parent
        self.moved(its, name, source, target)

    def rename(self) -> None:
        key, new = self.model.some_key(), self.pick.choice(self.model.keys)
        its, kind = self.model.snapshots.get(key), self.model.some_kind(key)
        if key == new:
            return
        source, target = f"{kind}/{file_name(key)}", f"{kind}/{file_name(new)}"
        expected = 0
        if its is None or its.kind is not kind:
            expected = errno.ENOENT
        elif new in self.model.snapshots:
            expected = errno.EEXIST
        logged = expected == errno.EEXIST
        both = f"{source} {target}"
        if not self.client.expect(expected, "rename", both, lambda: os.rename(source, target), logged=logged):
            return
        assert its is not None
        self.client.tell("rename", key, new)
        self.moved(its, new, source, target)

    def moved(self, its: Snapshot, key: str, source: str, target: str) -> None:
        """From now on its key is ``key``."""
        for child in self.model.children(its.key):
            child.parent = key
        del self.model.snapshots[its.key]
        self.model.snapshots[key] = its
        its.key = key
        self.look.gone(source)
        self.client.must("stat", target, lambda: os.stat(target))

    def remove(self) -> None:
        key = self.model.some_key()
        its, kind = self.model.snapshots.get(key), self.model.some_kind(key)
        path = f"{kind}/{file_name(key)}"
        its = its if its is not None and its.kind is kind else None
        with self.model.perhaps_held(its) as held:
            expected = 0
            if its is None:
                expected = errno.ENOENT
            elif held:
                expected = errno.EBUSY
            elif self.model.children(key):
                expected = errno.ENOTEMPTY
            if not self.client.expect(expected, "rmdir", path, lambda: os.rmdir(path)):
                return
        self.removed(key, path)

    def removed(self, key: str, path: str) -> None:
        its = self.model.snapshots.pop(key)
        self.client.tell("remove", key)
        self.look.gone(path)
        self.client.must_not(errno.ENOENT, "readlink", f"by-id/{its.number}", lambda: os.readlink(f"by-id/{its.number}"))

    def remove_as_a_file_manager(self) -> None:
        """rm -r: entry by entry, going on after a refusal, the directories that were not emptied left alone."""
        its = self.model.some()
        if its is None:
            return
        if self.model.children(its.key):
            self.fail_to_remove(its)
            return
        with self.model.perhaps_held(its) as held:
            by_another(lambda: self.delete_entries(its))
            removed = self.client.expect(errno.EBUSY if held else 0, "rmdir", its.path, lambda: os.rmdir(its.path))
        if not removed:
            self.client.must("rmdir", its.path, lambda: os.rmdir(its.path))
        self.removed(its.key, its.path)

    def delete_entries(self, its: Snapshot) -> None:
        for name in self.look.listing(its):
            path = f"{its.path}/{name}"
            if not stat.S_ISDIR(self.client.must("lstat", path, partial(os.lstat, path)).st_mode):
                its.hide(name, partial(self.client.must, "unlink", path, partial(os.unlink, path)))
            else:
                if name == "labels":
                    for label in list(its.labels):
                        self.labels.unlinked(its, label)
                its.hide(name, partial(self.client.must, "rmdir", path, partial(os.rmdir, path)))

    def fail_to_remove(self, its: Snapshot) -> None:
        for name in self.look.listing(its):
            path, refusals = f"{its.path}/{name}", 0
            if name in list(Kind):
                for child in self.model.children(its.key):
                    if child.kind == name:
                        self.refused_part(its, "unlink", child.inside(its.key), os.unlink, errno.EPERM)
                        refusals += 1
            elif name == "labels":
                for label in its.labels:
                    self.refused_part(its, "unlink", its.label(label), os.unlink)
                    refusals += 1
            else:
                self.refused_part(its, "unlink", path, os.unlink)
                refusals += 1
            if not refusals:
                self.refused_part(its, "rmdir", path, os.rmdir)
        self.look.check_snapshot(its)

    def refused_part(
        self, its: Snapshot, operation: str, path: str, work: Callable[[str], None], number: int = errno.ENOTEMPTY
    ) -> None:
        began = time.monotonic()
        self.client.must_not(number, operation, path, lambda: work(path))
        its.refused = began, time.monotonic()

    def name(self) -> None:
        """Give a committed one a name in images/, change it, and take it away; meanwhile it can't be removed."""
        its = self.model.some(Kind.COMMITTED)
        if its is None:
            return
        path, new = (f"images/{file_name(name)}" for name in (f"{self.model.prefix}/a", f"{self.model.prefix} b"))
        self.client.must("symlink", path, lambda: os.symlink(f"../{its.path}", path))
        self.client.tell("name", its.key, f"{self.model.prefix}/a")
        self.look.check_link(its, path, f"../{its.path}")
        self.client.must_not(errno.EBUSY, "rmdir", its.path, lambda: os.rmdir(its.path))
        self.client.must("rename", f"{path} {new}", lambda: os.rename(path, new))
        self.client.tell("unname", its.key, f"{self.model.prefix}/a")
        self.client.tell("name", its.key, f"{self.model.prefix} b")
        self.look.gone(path)
        self.look.check_link(its, new, f"../{its.path}")
        self.client.must("unlink", new, lambda: os.unlink(new))
        self.client.tell("unname", its.key, f"{self.model.prefix} b")
        self.look.gone(new)

    def hide(self) -> None:
        """Unlink one of the fixed entries."""
        its = self.model.some()
        if its is None or self.pick.random() < 0.5:
            return
        names = [name for name in by_another(partial(self.look.listing, its)) if name not in ("labels", "rootfs", *Kind)]
        if not names:
            return
        path = f"{its.path}/{self.pick.choice(names)}"
        if self.model.children(its.key):
            self.refused_part(its, "unlink", path, os.unlink)
        else:
            its.hide(
                os.path.basename(path), lambda: by_another(lambda: self.client.must("unlink", path, lambda: os.unlink(path)))
            )

    def forbidden(self) -> None:
        """What has no meaning."""
        its, key = self.model.some() or self.model.base, self.pick.choice(self.model.keys)
        other = self.model.snapshots.get(key)
        where, new = its.path, f"{its.path}/{self.model.prefix}"
        taken = other is not None and other.kind is Kind.COMMITTED
        committed, odd = f"committed/{file_name(key)}", f"active/{self.model.prefix}"

        def create() -> None:
            os.close(os.open(new, os.O_CREAT | os.O_WRONLY))

        def write() -> None:
            os.close(os.open(f"{where}/info.json", os.O_WRONLY))

        forbid = self.client.must_not
        match self.pick.randrange(13):
            case 0:
                forbid(errno.EEXIST if taken else errno.EPERM, "mkdir", committed, lambda: os.mkdir(committed))
            case 1:
                forbid(errno.EINVAL, "mkdir", f"{odd}%41", lambda: os.mkdir(f"{odd}%41"))
            case 2:
                forbid(errno.EILSEQ, "mkdir", f"{odd}\\xff", lambda: os.mkdir(f"{odd}\udcff"))
            case 3:
                forbid(errno.ENAMETOOLONG, "mkdir", odd + "n" * 255, lambda: os.mkdir(odd + "n" * 255))
            case 4 if its.kind is Kind.VIEW and not taken:
                forbid(errno.EPERM, "rename", f"{where} {committed}", lambda: os.rename(where, committed))
            case 4 if its.kind is Kind.ACTIVE:
                target = f"view/{self.model.prefix}.none"
                forbid(errno.EPERM, "rename", f"{where} {target}", lambda: os.rename(where, target))
            case 5 if its.kind is Kind.ACTIVE:
                target = f"{self.model.base.path}/{self.model.prefix}"
                forbid(errno.EEXIST, "rename", f"{where} {target}", lambda: os.rename(where, target), logged=True)
            case 6 if "info.json" not in its.hidden:
                info = f"{where}/info.json"
                forbid(errno.EPERM, "rename", f"{info} {new}", lambda: os.rename(info, new))
            case 7:
                forbid(errno.EPERM, "create", new, create)
            case 8 if "info.json" not in its.hidden:
                forbid(errno.EPERM, "open", f"{where}/info.json", write)
            case 9:
                forbid(errno.EPERM, "setattr", where, lambda: os.chmod(where, 0o700))
            case 10:
                forbid(errno.EPERM, "setattr", where, lambda: os.utime(where, (1, 1)))
            case 11:
                forbid(errno.EPERM, "symlink", new, lambda: os.symlink("anywhere", new))
            case 12 if its.parent is not None:
                link = its.inside(its.parent)
                forbid(errno.ENOTDIR, "rmdir", link, lambda: os.rmdir(link))

    def flush(self) -> None:
        its = self.model.some() or self.model.base
        self.client.flush(self.pick.choice([its.path, "committed", "."]))
