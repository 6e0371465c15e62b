"""Mounting, binding and unmounting by the kernel's mount API, and by mount(2) where a kernel lacks it; all on real mounts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from snapfs.kernel import libc, mountapi, mounting, mounttable, overlay
from snapfs.kernel.mounttable import MountPoint, mount_table
from snapfs.mountoptions import escape
from tests.processes import die_with_parent, own_descriptors

pytestmark = pytest.mark.mounts

MountOverlay = Callable[..., None]
MountBind = Callable[..., None]

both_overlays = pytest.mark.parametrize("mount_overlay", [overlay.mount_overlay, overlay.mount_overlay_classic])
both_binds = pytest.mark.parametrize("mount_bind", [mounting.mount_bind, mounting.mount_bind_classic])

HOSTILE = [
    "a,b",
    "a:b",
    "a\\b",
    "\\",
    "a\\,:\\:b",
    "'\"",
    " a  b ",
    "a\nb\t",
    "ä€",
    "\udcff\udc80",
    "#$;&|*?",
    "a=b,upperdir=c",
]


def unmount_unused(target: str) -> int | None:
    """Unmount ``target`` while a copy of it keeps the overlay; the copy."""
    copy = mounting.detached_copy(target)
    try:
        mounting.unmount(target, mounting.UMOUNT_NOFOLLOW)
    except OSError:
        if copy is not None:
            os.close(copy)
        raise
    return copy


def writers(upper: str) -> list[str]:
    """Where an overlay with the upper directory ``upper`` is mounted so that it can be written."""
    options = (f"upperdir={upper}", f"upperdir={escape(upper)}")
    return [mount.target for mount in mount_table() if "rw" in mount.options and set(options) & set(mount.super_options)]


def descriptors() -> list[str]:
    return sorted(own_descriptors())


def mounts_at(target: Path) -> list[MountPoint]:
    return [mount for mount in mount_table() if mount.target == str(target)]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint.  Whatever the test leaves mounted there is unmounted; open descriptors it may not leave."""
    (target := tmp_path / "target").mkdir()
    before = descriptors()
    try:
        yield target
        assert descriptors() == before
    finally:
        while mounts_at(target):
            mounting.unmount(str(target), mounting.MNT_DETACH)


class Layers:
    """``lowers``, each with a file of its own name and one of its own content, ``upper`` and ``work`` in ``directory``."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.lowers = [str(directory / name) for name in names]
        self.upper, self.work = str(directory / "upper"), str(directory / "work")
        for path in (*self.lowers, self.upper, self.work):
            os.makedirs(path)
        for n, lower in enumerate(self.lowers):
            Path(lower, f"file{n}").write_text(str(n))
            Path(lower, "same").write_text(str(n))

    def files(self) -> dict[str, str]:
        """What an overlay of them shows: the nearest is the first."""
        return {"same": "0"} | {f"file{n}": str(n) for n in range(len(self.lowers))}


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "layers", ["one", "two"])


def files(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def refused(number: int, call: Callable[[], object]) -> OSError:
    """The error with which ``call`` fails, ``number``."""
    try:
        call()
    except OSError as error:
        assert error.errno == number, error
        return error
    raise AssertionError(f"it did not fail with {errno.errorcode[number]}")


@both_overlays
def test_an_overlay_shows_the_nearest(mount_overlay: MountOverlay, layers: Layers, target: Path) -> None:
    mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off", "redirect_dir=off"], read_only=False)
    assert files(target) == layers.files()
    (target / "new").write_text("x")
    assert Path(layers.upper, "new").read_text() == "x"
    [mount] = mounts_at(target)
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert "rw" in mount.options
    assert writers(layers.upper) == [str(target)]


@both_overlays
def test_an_overlay_without_an_upper(mount_overlay: MountOverlay, layers: Layers, target: Path) -> None:
    mount_overlay(str(target), layers.lowers, None, None, [], read_only=True)
    assert files(target) == layers.files()
    refused(errno.EROFS, lambda: (target / "new").write_text("x"))
    mounting.unmount(str(target))
    mount_overlay(str(target), layers.lowers, None, None, [], read_only=False)
    refused(errno.EROFS, lambda: (target / "new").write_text("x"))


@both_overlays
def test_read_only_with_an_upper(mount_overlay: MountOverlay, layers: Layers, target: Path) -> None:
    Path(layers.upper, "above").write_text("u")
    mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=True)
    assert files(target) == layers.files() | {"above": "u"}
    refused(errno.EROFS, lambda: (target / "new").write_text("x"))
    refused(errno.EROFS, lambda: (target / "same").unlink())
    refused(errno.EROFS, lambda: os.utime(target))
    assert os.listdir(layers.upper) == ["above"]
    assert writers(layers.upper) == []


@both_overlays
@pytest.mark.parametrize("option", ["index=on", "userxattr", "volatile"])
def test_options_reach_overlayfs(mount_overlay: MountOverlay, option: str, layers: Layers, target: Path) -> None:
    mount_overlay(str(target), layers.lowers, layers.upper, layers.work, [option], read_only=False)
    [mount] = mounts_at(target)
    assert option in ",".join(mount.super_options)  # volatile is shown as fsync=volatile by some


@both_overlays
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_paths(mount_overlay: MountOverlay, name: str, tmp_path: Path, target: Path) -> None:
    """In the layers' directory, at the end of each layer's name, and in the target's."""
    layers = Layers(tmp_path / f"in{name}", [f"one{name}", f"two{name}"])
    os.rename(layers.upper, f"{layers.upper}{name}")
    os.rename(layers.work, f"{layers.work}{name}")
    (inner := target / f"t{name}").mkdir()
    mount_overlay(str(inner), layers.lowers, f"{layers.upper}{name}", f"{layers.work}{name}", ["index=off"], read_only=False)
    try:
        assert files(inner) == layers.files()
        (inner / "new").write_text("x")
        assert Path(f"{layers.upper}{name}", "new").read_text() == "x"
    finally:
        mounting.unmount(str(inner))


@pytest.mark.parametrize("length", [150, 250])
def test_400_layers_with_long_names(length: int, tmp_path: Path, target: Path) -> None:
    """With names of 150 bytes their paths fit the call, with 250 they don't and are given as open files."""
    layers = Layers(tmp_path / "n", [f"{n:0{length}}" for n in range(400)])
    short = len(os.fsencode(layers.lowers[0])) <= mountapi.STRING_MAX
    assert short == (length == 150)
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    assert files(target) == layers.files()
    (target / "file399").unlink()
    assert os.listdir(layers.upper) == ["file399"]


@pytest.mark.parametrize("length", [254, 255, 256, 257])
def test_paths_about_as_long_as_a_string_may_be(length: int, tmp_path: Path, target: Path) -> None:
    layers = Layers(tmp_path / "n", ["x" * (length - len(str(tmp_path / "n/")) - 1), "y"])
    assert len(layers.lowers[0]) == length
    overlay.mount_overlay(str(target), layers.lowers, None, None, [], read_only=True)
    assert files(target) == layers.files()


def test_long_paths_of_upper_and_work(tmp_path: Path, target: Path) -> None:
    layers = Layers(tmp_path / ("d," * 120) / "x", ["one", "two"])
    assert len(layers.upper) > mountapi.STRING_MAX
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    (target / "new").write_text("x")
    assert Path(layers.upper, "new").read_text() == "x"
    assert writers(layers.upper) == [str(target)]


def test_501_layers_are_refused_in_overlayfs_own_words(tmp_path: Path, target: Path) -> None:
    (lower := tmp_path / "lower").mkdir()
    error = refused(
        errno.EINVAL, lambda: overlay.mount_overlay(str(target), [str(lower)] * 501, None, None, [], read_only=True)
    )
    assert error.strerror == "overlay: too many lower directories, limit is 500"
    assert mounts_at(target) == []


def test_a_failure_names_what_failed_and_leaves_nothing(layers: Layers, target: Path) -> None:
    def mount(
        to: Path = target,
        lowers: Sequence[str] = layers.lowers,
        upper: str | None = layers.upper,
        work: str | None = layers.work,
        options: Sequence[str] = (),
    ) -> Callable[[], None]:
        return lambda: overlay.mount_overlay(str(to), lowers, upper, work, options, read_only=False)

    before, open_before = list(mount_table()), descriptors()
    error = refused(errno.EINVAL, mount(options=["nosuchoption=1"]))
    assert (error.strerror, error.filename) == ("overlay: Unknown parameter 'nosuchoption'", str(target))
    error = refused(errno.EINVAL, mount(options=["index=perhaps"]))
    assert error.strerror == "overlay: Bad value for 'index'"
    assert refused(errno.ENOENT, mount(lowers=[*layers.lowers, "/nowhere"])).filename == "/nowhere"
    assert refused(errno.ENOENT, mount(lowers=["/" + "nowhere/" * 40])).filename == "/" + "nowhere/" * 40
    assert refused(errno.ENOENT, mount(upper="/nowhere,x")).filename == "/nowhere,x"
    assert refused(errno.ENOENT, mount(to=target / "nowhere")).filename == str(target / "nowhere")
    refused(errno.EINVAL, mount(work=None))  # an upper needs one
    refused(errno.EINVAL, mount(lowers=layers.lowers[:1], upper=None, work=None))  # as the docstring says
    refused(errno.EINVAL, mount(lowers=[]))
    file = f"{layers.lowers[0]}/same"
    refused(errno.EINVAL, mount(lowers=[file, *layers.lowers]))
    assert list(mount_table()) == before
    assert descriptors() == open_before


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_without_fsopen_mount_2_does_it(number: int, layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsopen(kind: str) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mountapi, "fsopen", fsopen)
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    assert any(option.startswith("lowerdir=/") for option in mounts_at(target)[0].super_options), "not by mount(2)"


def test_which_parameters_overlayfs_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def knows(key: str) -> bool:
        context = mountapi.fsopen("overlay")
        try:
            return mountapi.takes_value(context, key)
        finally:
            os.close(context)

    assert knows("lowerdir+")
    assert knows("upperdir")
    assert not knows("lowerdir-")  # as 6.5 to 6.7 answer for lowerdir+
    monkeypatch.setattr(mountapi, "set_flag", lambda context, key: None)  # as kernels before 6.5 do for any key
    assert not knows("lowerdir+")
    monkeypatch.undo()
    refused(errno.EBADF, lambda: mountapi.takes_value(1 << 20, "lowerdir+"))


def test_without_lowerdir_plus_mount_2_does_it(layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountapi, "takes_value", lambda context, key: False)
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    assert any(option.startswith("lowerdir=/") for option in mounts_at(target)[0].super_options), "not by mount(2)"


def test_without_layers_as_open_files_mount_2_does_it(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlayfs before 6.13; its words are those for a value of the wrong type, which ``index`` gives here."""
    set_descriptor = mountapi.set_descriptor

    def as_before(context: int, key: str, fd: int) -> None:
        try:
            set_descriptor(context, "index", fd)
        except OSError as error:
            assert error.strerror == "overlay: Bad value for 'index'"
            raise OSError(error.errno, error.strerror.replace("index", key)) from None

    monkeypatch.setattr(mountapi, "set_descriptor", as_before)
    layers = Layers(tmp_path / ("x" * 250), ["one", "two"])
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    assert files(target) == layers.files()
    assert any(option.startswith("lowerdir=/") for option in mounts_at(target)[0].super_options), "not by mount(2)"


@pytest.mark.parametrize("name", ["plain", "a,b:c\\d \n\udcff"])
def test_the_fallback_takes_paths_beyond_a_page_from_their_directory(name: str, tmp_path: Path, target: Path) -> None:
    layers = Layers(tmp_path / ("x" * 150) / name, [f"{n}/fs" for n in range(100)])
    assert len("".join(layers.lowers)) > 4 * 4096
    cwd, threads = os.getcwd(), threading.active_count()
    overlay.mount_overlay_classic(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    assert files(target) == layers.files()
    (target / "file99").unlink()
    assert os.listdir(layers.upper) == ["file99"]
    assert os.getcwd() == cwd
    assert threading.active_count() == threads


def test_the_fallback_never_cuts_what_does_not_fit(tmp_path: Path, target: Path) -> None:
    layers = Layers(tmp_path / "n", [f"{n:0150}" for n in range(40)])
    arguments = (str(target), layers.lowers, layers.upper, layers.work, ["index=off"])
    error = refused(errno.E2BIG, lambda: overlay.mount_overlay_classic(*arguments, read_only=False))
    assert "mount(2) takes 4095" in str(error)
    assert mounts_at(target) == []
    overlay.mount_overlay(*arguments, read_only=False)
    assert files(target) == layers.files()


@pytest.mark.parametrize("length", [4095, 4096])
def test_a_page_is_a_page(length: int, layers: Layers, target: Path) -> None:
    """4,095 bytes and their NUL are mounted, one more is refused and not cut; slashes fill them up."""
    options = f"upperdir={layers.upper},workdir={layers.work},lowerdir={':'.join(layers.lowers)}"
    options += "/" * (length - len(options))
    if length == 4095:
        mounting.mount("overlay", str(target), "overlay", 0, options)
        assert files(target) == layers.files()
    else:
        refused(errno.E2BIG, lambda: mounting.mount("overlay", str(target), "overlay", 0, options))
        assert mounts_at(target) == []


@both_binds
def test_a_bind(mount_bind: MountBind, layers: Layers, target: Path) -> None:
    mount_bind(layers.lowers[0], str(target), read_only=False)
    (target / "new").write_text("x")
    assert Path(layers.lowers[0], "new").read_text() == "x"


@both_binds
def test_a_read_only_bind(mount_bind: MountBind, layers: Layers, target: Path) -> None:
    mount_bind(layers.lowers[0], str(target), read_only=True)
    assert (target / "same").read_text() == "0"
    refused(errno.EROFS, lambda: (target / "new").write_text("x"))
    refused(errno.EROFS, lambda: (target / "same").unlink())
    Path(layers.lowers[0], "new").write_text("still writable where it is")


@both_binds
@pytest.mark.parametrize("name", HOSTILE)
def test_binds_of_hostile_paths(mount_bind: MountBind, name: str, tmp_path: Path, target: Path) -> None:
    (source := tmp_path / f"s{name}").mkdir()
    (inner := target / f"t{name}").mkdir()
    (source / "file").write_text("x")
    mount_bind(str(source), str(inner), read_only=True)
    try:
        assert files(inner) == {"file": "x"}
    finally:
        mounting.unmount(str(inner))


@both_binds
@pytest.mark.parametrize("read_only", [False, True])
def test_a_bind_takes_along_what_is_mounted_below(mount_bind: MountBind, read_only: bool, tmp_path: Path, target: Path) -> None:
    """Read-only it is too; the fallback, which can't see to that, leaves it away."""
    (below := tmp_path / "source/below").mkdir(parents=True)
    mounting.mount("tmpfs", str(below), "tmpfs", 0, "size=1m")
    try:
        (below / "file").write_text("x")
        mount_bind(str(tmp_path / "source"), str(target), read_only=read_only)
        try:
            kept = not read_only or mount_bind is mounting.mount_bind
            assert os.listdir(target / "below") == (["file"] if kept else [])
            if read_only:
                refused(errno.EROFS, lambda: (target / "below/new").write_text("x"))
            (below / "new").write_text("x")
        finally:
            mounting.unmount(str(target), mounting.MNT_DETACH)
    finally:
        mounting.unmount(str(below))


def test_a_read_only_bind_is_never_writable(layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is attached is read-only before it is attached."""
    move_mount = mountapi.move_mount
    seen: list[int] = []

    def move(tree: int, to: str) -> None:
        seen.append(os.fstatvfs(tree).f_flag & os.ST_RDONLY)
        move_mount(tree, to)

    monkeypatch.setattr(mountapi, "move_mount", move)
    mounting.mount_bind(layers.lowers[0], str(target), read_only=True)
    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=True)
    assert seen == [os.ST_RDONLY] * 2


@pytest.mark.parametrize("lacking", ["open_tree", "mount_setattr"])
def test_without_the_mount_api_binds_take_mount_2(
    lacking: str, layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*arguments: object, **more: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(mountapi, lacking, lack)
    mounting.mount_bind(layers.lowers[0], str(target), read_only=True)
    refused(errno.EROFS, lambda: (target / "new").write_text("x"))


def test_a_bind_by_mount_2_keeps_the_flags_of_its_source(tmp_path: Path, target: Path) -> None:
    (source := tmp_path / "source").mkdir()
    mounting.mount("tmpfs", str(source), "tmpfs", 2 | 4 | 8 | 1024, "size=1m")  # nosuid, nodev, noexec, noatime
    try:
        mounting.mount_bind_classic(str(source), str(target), read_only=True)
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(mounts_at(target)[0].options)
        mounting.unmount(str(target))
    finally:
        mounting.unmount(str(source))


@both_binds
def test_a_bind_that_fails_leaves_nothing(
    mount_bind: MountBind, layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, open_before = list(mount_table()), descriptors()
    refused(errno.ENOENT, lambda: mount_bind("/nowhere", str(target), read_only=True))
    refused(errno.ENOENT, lambda: mount_bind(layers.upper, str(target / "nowhere"), read_only=True))
    wrong_kind = errno.EINVAL if mount_bind is mounting.mount_bind else errno.ENOTDIR  # the kernel's two words for it
    refused(wrong_kind, lambda: mount_bind(layers.upper, f"{layers.lowers[0]}/same", read_only=True))

    def fail(*arguments: object, **more: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", fail)
    monkeypatch.setattr(mountapi, "mount_setattr", fail)
    refused(errno.EIO, lambda: mount_bind(layers.upper, str(target), read_only=True))
    assert list(mount_table()) == before
    assert descriptors() == open_before


def test_unmount_unused_keeps_the_overlay_until_the_copy_is_closed(layers: Layers, target: Path) -> None:
    """``index=on`` lets one overlay at a time have an upper directory, which tells that it still lives."""
    arguments = (str(target), layers.lowers, layers.upper, layers.work, ["index=on"])
    overlay.mount_overlay(*arguments, read_only=False)
    (target / "new").write_text("x")
    copy = unmount_unused(str(target))
    assert copy is not None
    try:
        assert mounts_at(target) == []
        assert writers(layers.upper) == []
        assert not os.get_inheritable(copy)
        refused(errno.EBUSY, lambda: overlay.mount_overlay(*arguments, read_only=False))
    finally:
        os.close(copy)
    overlay.mount_overlay(*arguments, read_only=False)
    assert (target / "new").read_text() == "x"


def test_unmount_unused_does_not_wait_for_the_disk(tmp_path: Path, target: Path) -> None:
    """A file system of its own with much to write: the copy's close writes it, the unmount does not."""
    (image := tmp_path / "image").touch()
    os.truncate(image, 128 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    (disk := tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)

    def written() -> int:
        """Sectors that the disk has been given so far."""
        device = os.stat(disk).st_dev
        return int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()[6])

    try:
        layers = Layers(disk, ["one", "two"])
        overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
        fd = os.open(disk, os.O_RDONLY)
        mounting.sync_file_system(fd)
        os.close(fd)
        with open(target / "much", "wb") as file:
            for _ in range(32):
                file.write(os.urandom(1 << 20))
        before = written()
        copy = unmount_unused(str(target))
        between = written()
        assert copy is not None
        os.close(copy)
        after = written()
        assert between - before < 16 << 11, "the unmount wrote it"
        assert after - between > 16 << 11, "the close did not write it"
    finally:
        if mounts_at(target):
            mounting.unmount(str(target))
        mounting.unmount(str(disk))


@pytest.mark.parametrize("kind", ["overlay", "bind"])
def test_unmount_unused_leaves_what_is_used(kind: str, layers: Layers, target: Path) -> None:
    if kind == "overlay":
        overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    else:
        mounting.mount_bind(layers.lowers[0], str(target), read_only=False)
    before = descriptors()
    with subprocess.Popen(["sleep", "60"], cwd=target, preexec_fn=die_with_parent) as inside:
        try:
            error = refused(errno.EBUSY, lambda: unmount_unused(str(target)))
            assert error.filename == str(target)
        finally:
            inside.kill()
    with open(target / "same"):
        refused(errno.EBUSY, lambda: unmount_unused(str(target)))
    (target / "below").mkdir()
    mounting.mount("tmpfs", str(target / "below"), "tmpfs", 0, "size=1m")
    try:
        refused(errno.EBUSY, lambda: unmount_unused(str(target)))
    finally:
        mounting.unmount(str(target / "below"))
    assert len(mounts_at(target)) == 1
    assert descriptors() == before
    copy = unmount_unused(str(target))
    assert copy is not None
    os.close(copy)
    assert mounts_at(target) == []


def test_unmount_unused_below_a_shared_mount(layers: Layers, target: Path) -> None:
    """As under systemd: what is mounted below a shared mount is shared too, and its copy is a peer of it."""
    mounting.mount("tmpfs", str(target), "tmpfs", 0, "size=1m")
    mounting.mount("", str(target), "", 1 << 20)  # MS_SHARED
    (inner := target / "inner").mkdir()
    overlay.mount_overlay(str(inner), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    with open(inner / "same"):
        refused(errno.EBUSY, lambda: unmount_unused(str(inner)))
    copy = unmount_unused(str(inner))
    assert copy is not None
    os.close(copy)
    assert mounts_at(inner) == []


@pytest.mark.parametrize("unmount", [unmount_unused, mounting.unmount_unused])
def test_only_what_is_mounted_at_the_path_itself_is_unmounted(
    unmount: Callable[[str], object], layers: Layers, target: Path, tmp_path: Path
) -> None:
    mounting.mount_bind(layers.lowers[0], str(target), read_only=False)
    (link := tmp_path / "link").symlink_to(target)
    (target / "plain").mkdir()
    before = descriptors()
    refused(errno.EINVAL, lambda: unmount(str(link)))
    refused(errno.EINVAL, lambda: unmount(str(target / "plain")))
    refused(errno.ENOENT, lambda: unmount(str(target / "nowhere")))
    assert len(mounts_at(target)) == 1
    assert descriptors() == before


def test_unmount_unused_on_a_kernel_without_copies(layers: Layers, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(path: str, *, recursive: bool = False) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    monkeypatch.setattr(mountapi, "open_tree", lack)
    with open(target / "same"):
        refused(errno.EBUSY, lambda: unmount_unused(str(target)))
    assert unmount_unused(str(target)) is None
    assert mounts_at(target) == []


@pytest.mark.parametrize("kind", ["overlay", "bind"])
def test_expire_takes_two_calls_without_use_in_between(kind: str, layers: Layers, target: Path) -> None:
    if kind == "overlay":
        overlay.mount_overlay(str(target), layers.lowers, layers.upper, layers.work, ["index=off"], read_only=False)
    else:
        mounting.mount_bind(layers.lowers[0], str(target), read_only=True)
    assert mounting.unmount_unused(str(target)) is False
    os.stat(target / "same")
    assert mounting.unmount_unused(str(target)) is False, "the use in between did not count"
    with open(target / "same"):
        refused(errno.EBUSY, lambda: mounting.unmount_unused(str(target)))
    assert mounting.unmount_unused(str(target)) is False
    list(mount_table())
    os.stat(target.parent)  # neither is use
    assert len(mounts_at(target)) == 1
    assert mounting.unmount_unused(str(target)) is True
    assert mounts_at(target) == []


def test_the_root_of_a_user_namespace_may_too(tmp_path: Path) -> None:
    """All of it: overlay (with userxattr), read-only, long paths, the fallback, binds, both unmounts."""
    layers = Layers(tmp_path / "layers", ["one", "two", "x" * 250])
    (tmp_path / "target").mkdir()
    script = f"""
import errno, os
from pathlib import Path
from snapfs.kernel import mounting, overlay, probe
assert probe.in_user_namespace()
target, lowers, upper, work = {str(tmp_path / "target")!r}, {layers.lowers!r}, {layers.upper!r}, {layers.work!r}

def read_only():
    try:
        Path(target, "no").write_text("x")
    except OSError as error:
        return error.errno == errno.EROFS

for mount in (overlay.mount_overlay, overlay.mount_overlay_classic):
    mount(target, lowers, upper, work, ["userxattr", "index=off"], read_only=False)
    assert len(os.listdir(target)) == 4
    Path(target, "same").write_text("changed")
    os.unlink(target + "/same")
    copy = mounting.detached_copy(target)
    assert copy is not None
    mounting.unmount(target)
    os.close(copy)
    os.unlink(upper + "/same")
    mount(target, lowers, upper, work, ["userxattr", "index=off"], read_only=True)
    assert read_only()
    assert not mounting.unmount_unused(target)
    assert mounting.unmount_unused(target)
for bind in (mounting.mount_bind, mounting.mount_bind_classic):
    bind(lowers[0], target, read_only=True)
    assert sorted(os.listdir(target)) == ["file0", "same"] and read_only()
    mounting.unmount(target)
print("done")
"""
    command = ["unshare", "-Urm", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, preexec_fn=die_with_parent)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_400_layers_are_mounted_in_no_time(tmp_path: Path, target: Path) -> None:
    """A look-up waits for it."""
    lowers = [str(tmp_path / f"lower{n}") for n in range(400)]
    for lower in lowers:
        os.mkdir(lower)
    start = time.perf_counter()
    overlay.mount_overlay(str(target), lowers, None, None, [], read_only=True)
    assert time.perf_counter() - start < 1


SHARED = """
import os, subprocess
from pathlib import Path
from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table

subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
subprocess.run(["mount", "--make-rshared", "/"], check=True)
for name in ("layer/d", "new", "classic"):
    os.makedirs(f"/mnt/{name}")
mounting.mount_bind("/mnt/layer", "/mnt/new", read_only=False)
mounting.mount_bind_classic("/mnt/layer", "/mnt/classic", read_only=False)
for name in ("new", "classic"):
    subprocess.run(["mount", "-t", "tmpfs", "theirs", f"/mnt/{name}/d"], check=True)
print(sorted(mount.target for mount in mount_table() if mount.source == "theirs"))
"""


@pytest.mark.mounts
def test_what_is_mounted_within_a_bind_does_not_come_to_be_in_what_was_bound() -> None:
    """Where everything is mounted shared, as systemd has it, users would mount file systems of theirs within ROOT."""
    words = ["unshare", "-m", sys.executable, "-c", SHARED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "['/mnt/classic/d', '/mnt/new/d']\n"


def test_the_id_of_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc tells it, where the kernel doesn't in another way."""
    target, link = tmp_path / "target", tmp_path / "link"
    (tmp_path / "source/below").mkdir(parents=True)
    target.mkdir()
    link.symlink_to(target)
    outside = mounttable.mount_id(str(tmp_path))
    mounting.mount_bind(str(tmp_path / "source"), str(target), read_only=False)
    fd = os.open(target / "below", os.O_PATH)
    try:
        own = next(mount.id for mount in mounttable.mount_table() if mount.target == str(target))
        for told in (True, False):
            if not told:
                monkeypatch.setattr(libc, "mount_number", lambda path: None)
            assert [mounttable.mount_id(str(path)) for path in (target, target / "below", link)] == [own, own, outside]
            assert mounttable.mount_id_of(fd) == own != outside
            with pytest.raises(FileNotFoundError):
                mounttable.mount_id(str(tmp_path / "nothing"))
    finally:
        os.close(fd)
        mounting.unmount(str(target))
