"""Opening a root: whose it is, what it stands on, what a crash left in it, and the options."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from snapfs import (
    Damaged,
    FailedPrecondition,
    InvalidArgument,
    MetaStore,
    Mount,
    NotFound,
    Options,
    Snapshotter,
    Unavailable,
    open_snapshotter,
)
from snapfs.idmap import GID_MAPPING, UID_MAPPING
from snapfs.kernel import mountapi, mounting, overlay, probe
from snapfs.labels import UPPERDIR as UPPERDIR_LABEL
from snapfs.store.schema import SCHEMA
from tests.processes import die_with_parent


async def use(root: str | Path, options: Options | None = None) -> None:
    async with open_snapshotter(root, options) as snapshotter:
        await snapshotter.walk()


async def overlay_of(root: Path, options: Options | None = None) -> Mount:
    """The mount of an active snapshot on one parent."""
    async with open_snapshotter(root, options) as snapshotter:
        await snapshotter.prepare("b")
        await snapshotter.commit("base", "b")
        (mount,) = await snapshotter.prepare("web", "base")
    return mount


def python(code: str, *arguments: str, inside: tuple[str, ...] = ()) -> str:
    """What another process prints."""
    return subprocess.check_output(
        [*inside, sys.executable, "-c", code, *arguments], text=True, stderr=subprocess.STDOUT, timeout=60
    )


USER_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")

PRELUDE = """
import os, sys, trio
from snapfs import *
root = sys.argv[1]
def run(body, **options):
    async def main():
        async with open_snapshotter(root, Options(**options)) as snapshotter:
            await body(snapshotter)
    trio.run(main)
"""


# -- whose root it is


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_a_root_is_made_with_its_parents(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        await use(tmp_path / "a/b/root")
    finally:
        os.umask(before)
    root = tmp_path / "a/b/root"
    for directory in (root, root / "snapshots"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "metadata.mdb").stat().st_mode) & 0o077 == 0


async def test_an_empty_directory_becomes_a_root_that_nobody_else_can_read(root: Path) -> None:
    root.mkdir(mode=0o755)
    await use(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.mounts
@pytest.mark.parametrize("name", ["with blank", "co:lon,com\\ma", "é", "new\nline"])
async def test_any_path_of_a_root(tmp_path: Path, name: str) -> None:
    """Escaped as overlayfs wants it: the mount works."""
    root, target = tmp_path / name, tmp_path / "mnt"
    target.mkdir()
    mount = await overlay_of(root)
    (root / "snapshots/1/fs/below").write_text("x")
    mounting.mount("overlay", str(target), "overlay", 0, ",".join(mount.options))
    try:
        (target / "above").write_text("y")
        assert sorted(os.listdir(target)) == ["above", "below"]
    finally:
        mounting.unmount(str(target))
    assert (root / "snapshots/2/fs/above").read_text() == "y"


async def test_a_root_through_a_link_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    async with open_snapshotter("link") as snapshotter:
        assert (await snapshotter.prepare("web"))[0].source == f"{tmp_path}/real/snapshots/1/fs"


async def test_a_second_process_is_told_the_pid_of_the_holder(root: Path) -> None:
    code = PRELUDE + "async def body(s):\n  print('open', flush=True)\n  sys.stdin.read()\nrun(body)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(Unavailable, match=rf"{root} is in use by the process with pid {holder.pid};"):
            await use(root)
        holder.kill()  # however it ends, the root is free again
    await use(root)


async def test_the_same_process_can_not_open_a_root_twice(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        with pytest.raises(Unavailable, match=f"pid {os.getpid()}"):
            await use(root)
        await snapshotter.prepare("still working")
    await use(root)


async def test_several_roots_in_one_process(tmp_path: Path) -> None:
    async with open_snapshotter(tmp_path / "a") as a, open_snapshotter(tmp_path / "b") as b:
        await a.prepare("web")
        assert await b.walk() == []


@pytest.mark.parametrize("name", ["file", "metadata.db", ".hidden"])
async def test_a_directory_of_somebody_else_is_refused_and_left_alone(root: Path, name: str) -> None:
    root.mkdir()
    root.chmod(0o755)
    (root / name).write_text("mine")
    with pytest.raises(Unavailable, match="neither empty nor a root of snapfs"):
        await use(root)
    assert os.listdir(root) == [name]
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


async def test_a_root_that_is_no_directory(root: Path) -> None:
    root.write_text("")
    with pytest.raises(Unavailable, match=f"cannot use {root} as root"):
        await use(root)


@pytest.mark.mounts
async def test_a_root_on_a_read_only_file_system(tmp_path: Path) -> None:
    mounting.mount("tmpfs", str(tmp_path), "tmpfs", mounting.MS_RDONLY)
    try:
        with pytest.raises(Unavailable, match="Read-only file system"):
            await use(tmp_path / "root")
    finally:
        mounting.unmount(str(tmp_path))


@pytest.mark.mounts
@pytest.mark.parametrize("part", ["snapshots", "pool", "trash"])
@pytest.mark.parametrize("how", ["tmpfs", "bind"])
async def test_a_root_of_several_mounts(root: Path, part: str, how: str) -> None:
    """No directory could be moved from one to the other."""
    await use(root)
    words = ["-t", "tmpfs", "-o", "mode=700", "tmpfs"] if how == "tmpfs" else ["--bind", str(root / part)]
    subprocess.run(["mount", *words, str(root / part)], check=True)
    try:
        with pytest.raises(Unavailable, match=f"{root}/snapshots and {root}/.* are not in one mount: nothing but the whole"):
            await use(root)
    finally:
        mounting.unmount(str(root / part))
    await use(root)


async def test_a_refused_root_is_let_go(root: Path) -> None:
    await use(root)
    (root / "metadata.mdb").write_bytes(b"x" * 9000)
    for _ in range(2):  # the second time it is not "in use"
        with pytest.raises(Damaged, match="can't be read"):
            await use(root)


# -- what it stands on


@contextmanager
def loop_mounted(image: Path, target: Path, *make: str) -> Iterator[None]:
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    subprocess.run([*make, str(image)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)  # which releases the loop device, too


@pytest.mark.mounts
async def test_a_file_system_without_d_type_is_refused(tmp_path: Path) -> None:
    """A real one: ext2 without ``filetype``.  (xfs with ftype=0 needs its format V4, which many kernels no longer have.)"""
    with loop_mounted(tmp_path / "image", tmp_path / "mnt", "mkfs.ext2", "-q", "-O", "^filetype"):
        with pytest.raises(Unavailable, match=r"d_type.*mkfs\.xfs -n ftype=1"):
            await use(tmp_path / "mnt/root")
        for _ in range(2):  # let go each time
            with pytest.raises(Unavailable, match="d_type"):
                await use(tmp_path / "mnt/root")


@pytest.mark.mounts
async def test_the_same_file_system_with_d_type_is_taken(tmp_path: Path) -> None:
    with loop_mounted(tmp_path / "image", tmp_path / "mnt", "mkfs.ext2", "-q", "-O", "filetype"):
        await use(tmp_path / "mnt/root")


OVERLAY = """
async def body(s):
    await s.prepare("b")
    await s.commit("base", "b")
    print((await s.prepare("web", "base"))[0].options[3:])
"""


@pytest.fixture
def disk_root(small_disk: Path) -> Path:
    """A root on a disk, wherever the other tests' are."""
    return small_disk / "root"


def test_userxattr_inside_a_user_namespace(disk_root: Path) -> None:
    assert python(PRELUDE + OVERLAY + "run(body)", str(disk_root), inside=USER_NAMESPACE) == "('userxattr', 'index=off')\n"


@pytest.mark.parametrize("given", ["userxattr", "userxattr=on"])
def test_userxattr_is_not_added_where_it_was_given(root: Path, given: str) -> None:
    code = PRELUDE + OVERLAY + f"run(body, mount_options=({given!r},))"
    assert python(code, str(root), inside=USER_NAMESPACE) == f"('{given}', 'index=off')\n"


def test_userxattr_on_tmpfs_inside_a_user_namespace(root: Path) -> None:
    """It bears users' attributes since Linux 6.6."""
    code = PRELUDE + OVERLAY + "from snapfs.kernel.mounting import mount\nos.mkdir(root)\nmount('t', root, 'tmpfs')\nrun(body)"
    assert python(code, str(root), inside=USER_NAMESPACE) == "('userxattr', 'index=off')\n"


async def test_no_userxattr_outside_of_user_namespaces(root: Path) -> None:
    assert (await overlay_of(root)).options[3:] == ("index=off",)


def needs_userxattr(directory: Path) -> bool:
    """As the probe says; it leaves nothing behind."""
    try:
        return probe.needs_userxattr(str(directory))
    finally:
        assert os.listdir(directory) == []
        assert str(directory) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def trial_directory(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a disk, seen as from a user namespace."""
    monkeypatch.setattr(probe, "in_user_namespace", lambda: True)
    (small_disk / "snapshots").mkdir()
    return small_disk / "snapshots"


@pytest.mark.parametrize("known", [True, False])
def test_userxattr_is_tried_on_kernels_without_the_mount_api(
    trial_directory: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The trial mount is a real one, of an option that there is or is not."""
    tried: list[str] = []
    mount = mounting.mount

    def trial_mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
        tried.append(options)
        mount(source, target, kind, flags, options if known else options.replace("userxattr", "nosuchoption"))

    def lacking(_: str) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(mountapi, "fsopen", lacking)
    monkeypatch.setattr(mounting, "mount", trial_mount)
    assert needs_userxattr(trial_directory) is known
    (options,) = tried
    assert "userxattr" in options.split(",")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_no_userxattr_where_the_trial_fails(trial_directory: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As older kernels refuse the option (EINVAL), or a file system without users' attributes a new directory (EIO)."""
    mkdir, set_flag = os.mkdir, mountapi.set_flag

    def failing_mkdir(path: str, mode: int = 0o777) -> None:
        if number == errno.EIO and path.startswith("/proc/self/fd/"):
            raise OSError(number, os.strerror(number), path)
        mkdir(path, mode)

    def failing_set_flag(context: int, key: str) -> None:
        if number == errno.EINVAL and key == "userxattr":
            raise OSError(number, "Unknown parameter 'userxattr'")
        set_flag(context, key)

    monkeypatch.setattr(os, "mkdir", failing_mkdir)
    monkeypatch.setattr(mountapi, "set_flag", failing_set_flag)
    assert needs_userxattr(trial_directory) is False


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize(("version", "expected"), [((5, 10), False), ((5, 11), True), ((6, 0), True)])
def test_userxattr_goes_by_the_version_where_the_trial_tells_nothing(
    trial_directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, version: tuple[int, int], expected: bool
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mounting, "kernel_version", lambda: version)
    monkeypatch.setattr(overlay, "make_overlay", refused)
    assert needs_userxattr(trial_directory) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ("index=off",)),
        (("volatile",), ("volatile", "index=off")),
        (("index=on",), ("index=on",)),
        (("index=off",), ("index=off",)),
        (("index",), ("index",)),
        (("volatile", "index=on", "metacopy=off"), ("volatile", "index=on", "metacopy=off")),
        (("indexes=x",), ("indexes=x", "index=off")),
    ],
)
async def test_index_off_unless_given_in_either_form(root: Path, given: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert (await overlay_of(root, Options(mount_options=given))).options[3:] == expected


async def test_no_index_where_the_kernel_does_not_know_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "overlay_knows", lambda parameter: False)
    assert (await overlay_of(root)).options[3:] == ()


async def test_mount_options_go_on_overlays_only(root: Path) -> None:
    async with open_snapshotter(root, Options(mount_options=("volatile",))) as snapshotter:
        assert (await snapshotter.prepare("b"))[0].options == ("rw", "rbind")
        await snapshotter.commit("base", "b")
        assert (await snapshotter.view("peek", "base"))[0].options == ("ro", "rbind")
        await snapshotter.prepare("m", "base")
        await snapshotter.commit("mid", "m")
        (mount,) = await snapshotter.view("look", "mid")
        assert mount.options[1:] == ("volatile", "index=off")


# -- why there is no rootfs

WHY = """
async def body(s):
    assert not s.features["rootfs"].on
    print(s.features["rootfs"].why)
"""


@pytest.mark.mounts
@pytest.mark.parametrize(
    ("inside", "why"),
    [
        (("setpriv", "--bounding-set", "-sys_admin"), "this container may not mount: give it CAP_SYS_ADMIN"),
        (("unshare", "--user", "--map-root-user"), "a user namespace needs a mount namespace of its own"),
        (("setpriv", "--reuid", "65534", "--clear-groups"), "run it as root, or inside `unshare -Urm`"),
    ],
    ids=["container", "user namespace", "user"],
)
def test_without_the_right_to_mount(open_root: Path, inside: tuple[str, ...], why: str) -> None:
    said = python(PRELUDE + WHY + "run(body)", str(open_root), inside=inside)
    assert why in said
    assert said.endswith(" (Operation not permitted)\n")


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A root that is everybody's to make."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's are for root only
        os.chmod(directory, 0o1777)
        yield Path(directory, "root")


@pytest.mark.mounts
@pytest.mark.parametrize("option", ["nosuch=1", "redirect_dir=maybe"])
async def test_a_mount_option_that_overlayfs_refuses(root: Path, option: str) -> None:
    async with open_snapshotter(root, Options(mount_options=(option,))) as snapshotter:
        feature = snapshotter.features["rootfs"]
    assert not feature.on
    assert feature.why.startswith("overlayfs refuses a mount option: ")
    assert option.partition("=")[0] in feature.why


@pytest.mark.mounts
async def test_a_kernel_without_overlayfs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none to be had; the kernel answers so for a file system that it lacks."""
    fsopen = mountapi.fsopen
    monkeypatch.setattr(mountapi, "fsopen", lambda kind: fsopen(f"no{kind}"))
    async with open_snapshotter(root) as snapshotter:
        feature = snapshotter.features["rootfs"]
    assert not feature.on
    assert feature.why == "this kernel has no overlayfs: modprobe overlay (No such device)"


# -- what a crash left


async def test_a_killed_process_leaves_nothing_that_the_next_start_does_not_clean(root: Path) -> None:
    code = (
        PRELUDE + "async def body(s):\n  await s.prepare('web')\n  await s.prepare('x')\n  os.kill(os.getpid(), 9)\nrun(body)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=False)
    assert done.returncode == -9
    left = set(os.listdir(root / "pool"))
    async with open_snapshotter(root) as snapshotter:
        assert [info.name for info in await snapshotter.walk()] == ["web", "x"]
        assert sorted(os.listdir(root / "snapshots")) == ["1", "2"]
        assert not left & set(os.listdir(root / "pool"))
        await snapshotter.cleanup()
        assert os.listdir(root / "trash") == []


async def test_directories_without_a_record_go_at_the_next_start(root: Path) -> None:
    """A crash between the directory and its record, one in the middle of making it, and one in the middle of a deletion."""
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        await snapshotter.prepare("gone")
        await snapshotter.remove("gone")
    for name in (
        "snapshots/2/fs/deep",
        "snapshots/3/fs",
        "snapshots/17/fs",
        "pool/new-1-1/fs",
        "pool/new-1-2",
        "trash/9-1-1/fs/x",
    ):
        (root / name).mkdir(parents=True)
    async with open_snapshotter(root) as snapshotter:
        assert os.listdir(root / "snapshots") == ["1"]
        assert not [name for name in os.listdir(root / "pool") if name.startswith("new-1-")]
        await snapshotter.prepare("next")
        assert (await snapshotter.stat("next")).id == 3
        await snapshotter.remove("next")  # empties the trash
        assert os.listdir(root / "trash") == []


@pytest.mark.parametrize("async_remove", [False, True])
async def test_records_of_another_root_do_not_cost_the_layers(root: Path, async_remove: bool) -> None:
    """A layer with files and an id that the records never gave out is not abandoned: the records are not its own."""
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        older = (root / "metadata.mdb").read_bytes()
        await snapshotter.prepare("newer")
        (root / "snapshots/2/fs/file").write_text("precious")
    (root / "metadata.mdb").write_bytes(older)
    for _ in range(2):
        with pytest.raises(Damaged, match="2 holds files, but no such snapshot was ever recorded"):
            async with open_snapshotter(root, Options(async_remove=async_remove)):
                pass
    assert (root / "snapshots/2/fs/file").read_text() == "precious"


async def test_foreign_entries_are_moved_aside_by_cleanup_and_never_deleted(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
        snapshots = root / "snapshots"
        for round_ in ("first", "second"):
            for name in ("precious", "007", "1x", "0", "99"):
                (snapshots / name).mkdir()
                (snapshots / name / "file").write_text(round_)
            (snapshots / "a file").write_text(round_)
            (snapshots / "new-dir/fs").mkdir(parents=True)
            assert (await snapshotter.stat("web")).id == 1
            await snapshotter.cleanup()
            assert os.listdir(snapshots) == ["1"]
    lost = root / "lost+found"
    assert sorted(os.listdir(lost)) == sorted(
        name + tail for name in ("precious", "007", "1x", "0", "99", "a file") for tail in ("", "~1")
    )
    assert (lost / "precious/file").read_text() == (lost / "a file").read_text() == "first"
    assert (lost / "precious~1/file").read_text() == (lost / "a file~1").read_text() == "second"


async def test_foreign_entries_survive_a_start(root: Path) -> None:
    await use(root)
    (root / "snapshots/precious").mkdir()
    await use(root)
    assert os.listdir(root / "snapshots") == ["precious"]


async def test_a_record_whose_directory_is_missing_is_damaged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_snapshotter(root) as snapshotter:
        for name, parent in (("base", None), ("mid", "base")):
            await snapshotter.prepare("tmp", parent)
            await snapshotter.commit(name, "tmp")
            await snapshotter.usage(name)
        await snapshotter.prepare("web", "mid")
        await snapshotter.prepare("alone")
        await snapshotter.prepare("fine")
    for number in (1, 4):
        subprocess.run(["rm", "-r", str(root / f"snapshots/{number}")], check=True)
    async with open_snapshotter(root) as snapshotter:
        assert 'snapshot "base" is damaged' in caplog.text
        assert 'snapshot "alone" is damaged' in caplog.text
        assert len(await snapshotter.walk()) == 5  # nothing is guessed or dropped
        for call in (
            snapshotter.mounts("web"),
            snapshotter.mounts("alone"),
            snapshotter.prepare("k", "base"),
            snapshotter.view("k", "base"),
            snapshotter.view("k", "mid"),
            snapshotter.usage("alone"),
            snapshotter.commit("v1", "alone"),
            snapshotter.commit("v1", "fine", parent="base"),
        ):
            with pytest.raises(Damaged, match=f"{root}/snapshots/[14] is missing"):
                await call
        await snapshotter.mounts("fine")
        await snapshotter.remove("alone")
        with pytest.raises(NotFound):
            await snapshotter.stat("alone")
        assert len(await snapshotter.walk()) == 4


async def test_layers_without_their_records_are_refused_and_kept(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
    (root / "snapshots/1/fs/precious").write_text("x")
    (root / "metadata.mdb").unlink()
    with pytest.raises(Damaged, match=r"metadata\.mdb is missing"):
        await use(root)
    assert (root / "snapshots/1/fs/precious").read_text() == "x"
    assert not (root / "metadata.mdb").exists()


async def test_a_newer_schema_is_refused_and_nothing_is_touched(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        await snapshotter.prepare("web")
    (root / "snapshots/2").mkdir()
    store = MetaStore(str(root / "metadata.mdb"))
    with store.environment.env.begin(write=True) as txn:
        txn.put(b"schema", str(SCHEMA + 1).encode(), db=store.tables.meta)
    store.close()
    with pytest.raises(Damaged, match=rf"newer snapfs \(schema {SCHEMA + 1}; this one reads {SCHEMA}\): use that one"):
        await use(root)
    assert sorted(os.listdir(root / "snapshots")) == ["1", "2"]


# -- a store made outside


@asynccontextmanager
async def outside(tmp_path: Path) -> AsyncIterator[MetaStore]:
    store = MetaStore(str(tmp_path / "elsewhere.mdb"))
    try:
        yield store
    finally:
        store.close()


async def test_a_store_made_outside_is_used_and_left_open(tmp_path: Path, root: Path) -> None:
    async with outside(tmp_path) as store:
        async with open_snapshotter(root, metastore=store) as snapshotter:
            await snapshotter.prepare("web")
        assert not (root / "metadata.mdb").exists()
        with store.reading() as reader:  # still open
            assert reader.id_of("web") == 1
        assert len(store.listeners) == 0
        async with open_snapshotter(root, metastore=store) as again:
            assert [info.name for info in await again.walk()] == ["web"]
            await again.prepare("more")
            with pytest.raises(Unavailable, match="closed"):
                await snapshotter.stat("web")
            with pytest.raises(Unavailable, match="closed"):
                await snapshotter.prepare("through the old one")
            assert len(await again.walk()) == 2


async def test_a_store_made_outside_survives_a_root_that_is_refused(tmp_path: Path, root: Path) -> None:
    root.write_text("")
    async with outside(tmp_path) as store:
        with pytest.raises(Unavailable):
            async with open_snapshotter(root, metastore=store):
                pass
        with store.reading() as reader:
            assert reader.ids() == set()


# -- options


async def test_async_remove_leaves_the_files_to_cleanup(root: Path) -> None:
    options = Options(async_remove=True)
    async with open_snapshotter(root, options) as snapshotter:
        await snapshotter.prepare("web")
        (root / "snapshots/1/fs/file").write_text("x")
        await snapshotter.remove("web")
        assert await snapshotter.walk() == []
        assert (root / "snapshots/1/fs/file").read_text() == "x"
        await snapshotter.prepare("web")  # the key is free
        assert (await snapshotter.stat("web")).id == 2
    async with open_snapshotter(root, options) as snapshotter:
        assert (root / "snapshots/1/fs/file").read_text() == "x"  # still
        await snapshotter.cleanup()
        assert os.listdir(root / "snapshots") == ["2"]
        assert os.listdir(root / "trash") == []


async def test_the_upperdir_label_is_shown_and_never_stored(root: Path) -> None:
    async with open_snapshotter(root, Options(upperdir_label=True)) as snapshotter:
        await snapshotter.prepare("web", labels={"a": "b", UPPERDIR_LABEL: "/elsewhere"})
        expected = {"a": "b", UPPERDIR_LABEL: f"{root}/snapshots/1/fs"}
        assert (await snapshotter.stat("web")).labels == expected
        assert [info.labels for info in await snapshotter.walk()] == [expected]
        for selects in (f'labels."{UPPERDIR_LABEL}"~=/fs$/', f'labels."{UPPERDIR_LABEL}"'):
            assert await snapshotter.walk(selects) == [], "as in containerd, filters see what is stored"
        assert [info.labels for info in await snapshotter.walk(f'labels."{UPPERDIR_LABEL}"!=x,labels.a==b')] == [expected]
        assert (await snapshotter.update("web", {"c": "d"})).labels == {"c": "d", UPPERDIR_LABEL: f"{root}/snapshots/1/fs"}
        written_back = await snapshotter.stat("web")
        await snapshotter.update("web", written_back.labels)
        await snapshotter.commit("base", "web", written_back.labels)
        assert (await snapshotter.stat("base")).labels == {"c": "d", UPPERDIR_LABEL: f"{root}/snapshots/1/fs"}
    async with open_snapshotter(root) as snapshotter:
        assert (await snapshotter.stat("base")).labels == {"c": "d"}


BOTH = {UID_MAPPING: "0:1000:10,10:2000:10", GID_MAPPING: "0:3000:20"}


async def committed_base(snapshotter: Snapshotter) -> None:
    await snapshotter.prepare("b")
    await snapshotter.commit("base", "b")


@pytest.mark.mounts
async def test_remap_ids_puts_the_mappings_first_on_every_mount(root: Path) -> None:
    """On a real kernel with idmapped mounts (5.19 for overlayfs), as the tests' machine has it."""
    async with open_snapshotter(root, Options(remap_ids=True)) as snapshotter:
        await committed_base(snapshotter)
        first = (f"uidmap={BOTH[UID_MAPPING]}", f"gidmap={BOTH[GID_MAPPING]}")
        assert (await snapshotter.prepare("lone", None, BOTH))[0].options == (*first, "rw", "rbind")
        assert (await snapshotter.view("peek", "base", BOTH))[0].options == (*first, "ro", "rbind")
        (mount,) = await snapshotter.prepare("web", "base", BOTH)
        assert mount.options[:2] == first
        assert mount.options[2].startswith("workdir=")
        assert (await snapshotter.prepare("plain", "base"))[0].options[0].startswith("workdir=")
        assert (root / "snapshots/2/fs").stat().st_uid == 1000


@pytest.mark.mounts
async def test_mapping_labels_without_remap_ids_are_no_mount_options(root: Path) -> None:
    async with open_snapshotter(root) as snapshotter:
        assert (await snapshotter.prepare("lone", None, BOTH))[0].options == ("rw", "rbind")
        assert (root / "snapshots/1/fs").stat().st_gid == 3000


REMAP = """
async def body(s):
    try:
        mounts = await s.prepare("web", None, {"containerd.io/snapshot/uidmapping": "0:0:1"})
        print("made", mounts[0].options, os.stat(root + "/snapshots/1/fs").st_uid)
    except FailedPrecondition as error:
        print(error)
    await s.prepare("plain")
    print(len(await s.walk()), os.listdir(root + "/trash"))
"""


def test_where_ids_can_not_be_remapped_it_is_said(root: Path) -> None:
    said = python(PRELUDE + REMAP + "run(body, remap_ids=True)", str(root), inside=USER_NAMESPACE).splitlines()
    assert said[0].startswith(f"cannot remap ids: layers in {root} can't be mounted idmapped here")
    assert "slow_chown" in said[0]
    assert said[1:] == ["1 []"]


def test_where_ids_can_not_be_remapped_slow_chown_does_it(root: Path) -> None:
    code = PRELUDE + REMAP + "run(body, remap_ids=True, slow_chown=True)"
    assert python(code, str(root), inside=USER_NAMESPACE) == "made ('rw', 'rbind') 0\n2 []\n"


@pytest.mark.mounts
async def test_slow_chown_changes_the_owners_of_the_upper_layers_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    async with open_snapshotter(root, Options(remap_ids=True, slow_chown=True)) as snapshotter:
        await committed_base(snapshotter)
        (mount,) = await snapshotter.prepare("web", "base", {UID_MAPPING: "0:1000:10", GID_MAPPING: "0:3000:10"})
        assert mount.options[0].startswith("workdir=")  # the layer has the host's ids already
        layer = root / "snapshots/2/fs"
        assert (layer.stat().st_uid, layer.stat().st_gid) == (1000, 3000)
        (layer / "d").mkdir()
        (layer / "d/file").write_text("x")
        (layer / "link").symlink_to("/etc/passwd")
        os.chown(layer / "d", 1000, 3000)
        os.chown(layer / "d/file", 1005, 3009)
        (layer / "d/file").chmod(0o6755)
        os.lchown(layer / "link", 1001, 3001)
        passwd = os.stat("/etc/passwd")
        await snapshotter.update("web", {UID_MAPPING: "0:5000:10", GID_MAPPING: "0:7000:5"})
        owners = {path: (os.lstat(path).st_uid, os.lstat(path).st_gid) for path in (layer, *layer.rglob("*"))}
        assert owners == {
            layer: (5000, 7000),
            layer / "d": (5000, 7000),
            layer / "d/file": (5005, 3009),  # no counterpart for this group: it stays
            layer / "link": (5001, 7001),
        }
        assert stat.S_IMODE((layer / "d/file").stat().st_mode) == 0o6755
        assert os.stat("/etc/passwd") == passwd
        with pytest.raises(InvalidArgument):
            await snapshotter.update("web", {UID_MAPPING: "7:1:1"})
        assert layer.stat().st_uid == 5000


async def test_without_slow_chown_and_idmapped_mounts_only_mapped_snapshots_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    async with open_snapshotter(root, Options(remap_ids=True)) as snapshotter:
        await committed_base(snapshotter)
        for call in (snapshotter.prepare("k", "base", BOTH), snapshotter.view("k", "base", {GID_MAPPING: "0:1:1"})):
            with pytest.raises(FailedPrecondition, match="slow_chown"):
                await call
        await snapshotter.prepare("k", "base", {UID_MAPPING: ""})


MAPPED = {UID_MAPPING: "0:1000:65536", GID_MAPPING: "0:2000:65536"}
OTHERS = {UID_MAPPING: "0:5000:65536", GID_MAPPING: "0:2000:65536"}


async def shifted_base(snapshotter: Snapshotter, labels: Mapping[str, str] | None = None) -> None:
    """``shifted``: a copy of ``base`` whose files have the host's ids, as a containerd makes it that maps ids by itself."""
    await committed_base(snapshotter)
    await snapshotter.prepare("copy", "base", labels)
    os.chown(Path(snapshotter.layers.fs(2)), 1000, 2000)
    await snapshotter.commit("shifted", "copy")


@pytest.mark.mounts
async def test_what_has_the_hosts_ids_already_is_not_mapped_again(root: Path) -> None:
    """As where remap_ids is served and containerd was not told so: all files would be nobody's."""
    async with open_snapshotter(root, Options(remap_ids=True)) as snapshotter:
        await shifted_base(snapshotter)
        before = await snapshotter.walk()
        words = r"\"shifted\" has the host's ids already .*\"remap-ids\".* without remap_ids"
        for make in (snapshotter.prepare, snapshotter.view):
            with pytest.raises(FailedPrecondition, match=words):
                await make("k", "shifted", MAPPED)
        assert await snapshotter.walk() == before
        await snapshotter.prepare("k", "shifted")
        with pytest.raises(FailedPrecondition, match='"remap-ids"'):
            await snapshotter.update("k", MAPPED)
        assert (await snapshotter.stat("k")).labels == {}
        for key, parent, labels in (("on base", "base", MAPPED), ("others", "shifted", OTHERS), ("lone", None, MAPPED)):
            assert (await snapshotter.prepare(key, parent, labels))[0].options[0].startswith("uidmap=")
        await snapshotter.update("shifted", MAPPED)  # it is no longer mounted
        await snapshotter.update("on base", {**MAPPED, "a": "b"})


@pytest.mark.mounts
async def test_root_that_is_root_is_what_any_image_has(root: Path) -> None:
    async with open_snapshotter(root, Options(remap_ids=True)) as snapshotter:
        await committed_base(snapshotter)
        (mount,) = await snapshotter.prepare("web", "base", {UID_MAPPING: "0:0:10", GID_MAPPING: "0:0:1,1:5000:9"})
        assert mount.options[:2] == ("uidmap=0:0:10", "gidmap=0:0:1,1:5000:9")


@pytest.mark.mounts
@pytest.mark.parametrize("options", [Options(), Options(slow_chown=True), Options(remap_ids=True, slow_chown=True)])
async def test_where_no_mount_maps_ids_such_a_copy_is_what_is_wanted(
    root: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "maps_ids", lambda directory: False)
    async with open_snapshotter(root, options) as snapshotter:
        await shifted_base(snapshotter, MAPPED)
        await snapshotter.view("v", "shifted", MAPPED)
        (mount,) = await snapshotter.prepare("web", "shifted", MAPPED)
        assert mount.options[0].startswith("workdir=")
        layer = os.stat(snapshotter.layers.fs((await snapshotter.stat("web")).id))
        assert (layer.st_uid, layer.st_gid) == (1000, 2000)
        await snapshotter.commit("child", "web")
        await snapshotter.prepare("again", "child", MAPPED)


async def test_opening_is_cancelled_cleanly(root: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await use(root)
    assert scope.cancelled_caught
    await use(root)  # not held any more


async def test_somebody_elses_directory_with_snapshots_in_it_is_refused_and_left_alone(root: Path) -> None:
    for name in ("snapshots", "etc"):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    with pytest.raises(Unavailable, match="neither empty nor a root of snapfs"):
        async with open_snapshotter(root):
            pass
    assert root.stat().st_mode & 0o777 == 0o755
    assert sorted(os.listdir(root)) == ["etc", "snapshots"]
