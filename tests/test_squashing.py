"""Several layers as one: what the kernel shows of them is the measure."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from snapfs.errors import FailedPrecondition
from snapfs.kernel import mounting
from snapfs.scan.squashing import squash
from snapfs.scan.walk import Descriptors
from tests.disk import make_file_system
from tests.kernel_changes import Chain, make_comb, merged
from tests.kernel_squashing import ACCESS, DEFAULT, OPTIONS, acl, check, compare_squashes_with_kernel, same, squashed, view
from tests.mounts import loop_mounted
from tests.processes import die_with_parent, own_descriptors

pytestmark = pytest.mark.mounts


# What the kernel shows


def test_as_the_kernel_shows_it() -> None:
    compare_squashes_with_kernel(options=OPTIONS)


def test_as_the_kernel_shows_it_in_a_user_namespace() -> None:
    code = "from tests.kernel_squashing import compare_squashes_with_kernel as compare; compare(options='userxattr')"
    subprocess.run(["unshare", "-Urm", sys.executable, "-c", code], check=True, preexec_fn=die_with_parent)


def test_as_the_kernel_shows_it_where_directories_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.scan.squashing.BATCH", 0)
    monkeypatch.setattr("snapfs.scan.squashing.PAUSED", 1)
    monkeypatch.setattr("snapfs.scan.marks.BATCH", 2)
    monkeypatch.setattr(Descriptors, "OPEN", 1)
    compare_squashes_with_kernel(options=OPTIONS)


def refuse_links(monkeypatch: pytest.MonkeyPatch, refused: Callable[[os.stat_result], int]) -> None:
    """Have link(2) of a file of a layer fail with the errno that ``refused`` says, if any, unless the name is taken."""
    original = os.link

    def link(
        source: str, target: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, follow_symlinks: bool
    ) -> None:
        assert not follow_symlinks
        number = 0
        if src_dir_fd is not None and not os.readlink(f"/proc/self/fd/{src_dir_fd}").startswith(("/whole", "/fold")):
            number = refused(os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False))
        if number and not os.access(target, os.F_OK, dir_fd=dst_dir_fd, follow_symlinks=False):
            raise OSError(number, os.strerror(number))
        original(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=False)

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("some", [1, 2])
def test_as_the_kernel_shows_it_where_files_are_copied(monkeypatch: pytest.MonkeyPatch, some: int) -> None:
    """All of them, or half of the inodes."""
    errors = [errno.EMLINK, errno.EPERM, errno.EXDEV]

    def refused(found: os.stat_result) -> int:
        return errors[found.st_ino % 3] if found.st_ino // 3 % some == 0 else 0

    refuse_links(monkeypatch, refused)
    compare_squashes_with_kernel(options=OPTIONS)


# Single cases


def test_whiteouts_of_both_kinds(chain: Chain) -> None:
    chain.layer("d/a", "d/b", "d/c", "e/x/y", "f/a", "g/a")
    chain.layer("X:d/a", "d/new", "D:e", "D:f/a", "X:unmarked/z", "g/b", d="x")
    chain.layer("D:d/b", "e/new", "X:g/a", "D:nothing/x", g="x")
    check(chain.layers, chain.base)
    assert sorted(os.listdir(f"{chain.base}/whole/d")) == ["c", "new"]
    assert os.listdir(f"{chain.base}/whole/unmarked") == [], "the kernel shows none, though the directory is not marked"
    fold = chain.base / "fold2"
    assert [os.lstat(fold / path).st_rdev for path in ("d/a", "d/b", "f/a", "g/a", "nothing/x", "unmarked/z")] == [0] * 6
    assert os.getxattr(fold / "e", "trusted.overlay.opaque") == b"y"
    assert os.listdir(fold / "e") == ["new"]


def test_whiteouts_below_a_directory_that_hides_all(chain: Chain) -> None:
    """They are dropped: the kernel would list them, as files that are not there."""
    chain.layer("d/x", "d/y")
    chain.layer("d/x", "d/z", d="y")
    chain.layer("D:d/x")
    check(chain.layers, chain.base)
    assert os.listdir(f"{chain.base}/fold2/d") == ["z"]


def test_whiteouts_in_a_directory_with_nothing_below(chain: Chain) -> None:
    """The kernel looks for whiteouts in there, for the new directory says that it was copied."""
    chain.layer("other")
    chain.layer("d/x", "d/y")
    chain.layer("D:d/x", "d/z")
    check(chain.layers, chain.base)
    assert not view([chain.base / "fold2", chain.layers[-1]], chain.base).unreal


def test_a_layer_alone_stays_as_it_is(chain: Chain) -> None:
    """It is bind-mounted; once it is a lower layer, the kernel obeys its marks."""
    layer = chain.layer("D:device", "X:x/marked", "d/file", x="x", d="y")
    for name, value in (("redirect", b"e"), ("overlay.opaque", b"y"), ("origin", b"")):
        os.setxattr(layer / "d", f"trusted.overlay.{name}", value)
    os.setxattr(layer / "d/file", "trusted.overlay.metacopy", b"")
    whole = squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    for path in ("", "d", "d/file", "device", "x", "x/marked"):
        old, new = layer / path, Path(whole, path)
        assert {name: os.getxattr(old, name) for name in os.listxattr(old)} == {
            name: os.getxattr(new, name) for name in os.listxattr(new)
        }
    same(view([layer], chain.base), view([whole], chain.base))
    empty = chain.layer()
    (layer / "d/file").unlink()  # which nobody can look at
    Path(whole, "d/file").unlink()
    same(view([empty, layer], chain.base), view([empty, whole], chain.base))


def test_all_kinds_of_files_are_linked(chain: Chain) -> None:
    chain.layer("old/file", "both")
    layer = chain.layer("file", "d/e/")
    os.mkfifo(layer / "fifo", 0o640)
    os.mknod(layer / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(layer / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(layer / "socket", stat.S_IFSOCK | 0o755)
    os.symlink("/nowhere", layer / "d/link")
    os.link(layer / "file", layer / "d/e/file")
    os.link(layer / "fifo", layer / "d/fifo")
    check(chain.layers, chain.base)
    for path in ("file", "fifo", "null", "disk", "socket", "d/link", "d/e/file", "d/fifo"):
        assert os.lstat(layer / path).st_ino == os.lstat(chain.base / "whole" / path).st_ino


def test_links_are_not_followed(chain: Chain) -> None:
    outside = chain.base / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    lower = chain.layer("d/file", "other/file")
    upper = chain.layer("other/x")
    os.symlink(outside, upper / "d")
    os.symlink(outside, lower / "e")
    (upper / "e").mkdir()
    os.symlink(outside / "secret", upper / "e/link")
    check(chain.layers, chain.base)
    assert os.readlink(chain.base / "whole/d") == str(outside)
    assert os.listdir(chain.base / "whole/e") == ["link"]
    assert os.lstat(outside / "secret").st_nlink == 1


def test_directories_are_as_the_nearest(chain: Chain) -> None:
    lower = chain.layer("d/e/file", "plain/")
    upper = chain.layer("d/e/more")
    for number, directory in enumerate((lower, lower / "d", lower / "d/e", lower / "plain", upper, upper / "d", upper / "d/e")):
        os.chown(directory, number, number + 1)
        os.setxattr(directory, DEFAULT, acl(number, 5))
        os.setxattr(directory, ACCESS, acl(number, 3))
        os.setxattr(directory, f"user.{number}", bytes(70))
        os.chmod(directory, 0o7000 | number << 3)
    for directory in (lower / "plain", lower / "d", upper / "d/e"):
        os.utime(directory, ns=(5_000_000_007 * 10**9, 123_456_789))
    check(chain.layers, chain.base)
    assert [os.stat(chain.base / new / "d/e").st_atime_ns for new in ("whole", "fold1")] == [5_000_000_007 * 10**9] * 2


def test_what_the_new_directory_would_hand_down(chain: Chain) -> None:
    """ROOT's own set-group-ID bit and access control lists are none of the layers'."""
    chain.layer("d/file", "e/")
    chain.layer("d/more")
    os.chown(chain.base, 0, 7)
    os.chmod(chain.base, 0o2755)
    os.setxattr(chain.base, DEFAULT, acl(9, 7))
    check(chain.layers, chain.base)
    assert [name for name in os.listxattr(chain.base / "whole/e") if "acl" in name] == []


def test_more_links_than_an_inode_may_have(small_disk: Path) -> None:
    """65,000 on ext4.  There are two copies then, with as many links as there are names."""
    chain = Chain(small_disk)
    chain.layer("old")
    layer = chain.layer("0")
    most = os.pathconf(layer, "PC_LINK_MAX")
    assert most < 70_000, "the test takes another file system"
    for number in range(1, most):
        os.link(layer / "0", layer / f"{number}")
    whole = squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    found = {os.lstat(f"{whole}/{number}").st_ino for number in range(most)}
    assert len(found) == 1
    assert os.stat(layer / "0").st_ino not in found
    again = squashed([whole, chain.layers[1]], f"{chain.base}/again", lowest=True)
    assert os.stat(f"{again}/0").st_nlink == most
    assert Path(again, "7").read_text() == "text"


@pytest.mark.parametrize("flag", ["i", "a"])
def test_immutable_and_append_only_files_are_copied(chain: Chain, flag: str) -> None:
    chain.layer("d/one", "d/two", "d/plain")
    layer = chain.layer("d/new", "e/")
    for directory in (layer, chain.base / "layer0"):
        for name in os.listdir(directory / "d"):
            os.setxattr(directory / "d" / name, "user.x", name.encode())
    os.link(chain.base / "layer0/d/two", chain.base / "layer0/second")
    for path in ("layer0/d/one", "layer0/d/two", "layer1/d/new", "layer1/e"):
        subprocess.run(["chattr", f"+{flag}", chain.base / path], check=True)
    try:
        check(chain.layers, chain.base)
        paths = [chain.base / f"whole/{name}" for name in ("d/one", "d/two", "e")]
        listed = subprocess.check_output(["lsattr", "-d", *paths])
        assert [flag.encode() in line.split()[0] for line in listed.splitlines()] == [True] * 3
        assert os.stat(chain.base / "whole/second").st_nlink == 2
        assert os.stat(chain.base / "whole/d/plain").st_ino == os.stat(chain.base / "layer0/d/plain").st_ino
    finally:
        subprocess.run(["chattr", "-R", f"-{flag}", chain.base], check=False)


def test_copies_keep_holes(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = chain.layer("file")
    with open(layer / "file", "r+b") as file:
        file.seek(1 << 40)
        file.write(b"end")
    chain.layer()
    refuse_links(monkeypatch, lambda found: errno.EPERM)
    whole = squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    found = os.stat(f"{whole}/file")
    assert (found.st_size, found.st_blocks) == ((1 << 40) + 3, os.stat(layer / "file").st_blocks)


def test_subvolumes(tmp_path: Path) -> None:
    """Of btrfs: no file can be linked out of one.  Its directory is an ordinary one in the new layer."""
    make_file_system("btrfs", tmp_path / "image")
    with loop_mounted(tmp_path / "image", tmp_path / "disk") as disk:
        chain = Chain(disk)
        layer = chain.layer("plain")
        subprocess.run(["btrfs", "-q", "subvolume", "create", layer / "sub"], check=True)
        for number in range(50):  # an overlay's inode numbers do not tell of which subvolume a file is
            (layer / f"sub/{number}").mkdir()
            (layer / f"sub/{number}").rmdir()
        (layer / "sub/d").mkdir()
        (layer / "sub/d/one").write_bytes(bytes(range(256)) * 1000)
        os.link(layer / "sub/d/one", layer / "sub/two")
        chain.layer("sub/more", "D:sub/d/gone")
        check(chain.layers, disk)
        assert os.stat(disk / "whole/sub/two").st_nlink == 2
        assert os.stat(disk / "whole/plain").st_ino == os.stat(layer / "plain").st_ino


def test_what_is_mounted_inside_is_not_entered(chain: Chain) -> None:
    lower = chain.layer("d/file", "e/file", "f")
    chain.layer("d/more", "e/file")
    (chain.base / "foreign").write_text("foreign")
    mounting.mount("none", str(lower / "d"), "tmpfs", 0, "")
    mounting.mount(str(chain.base / "foreign"), str(lower / "f"), "", 0x1000)  # MS_BIND
    try:
        (lower / "d/foreign").touch()
        whole = squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    finally:
        mounting.unmount(str(lower / "d"))
        mounting.unmount(str(lower / "f"))
    same(view(chain.layers, chain.base), view([whole], chain.base))
    assert Path(whole, "f").stat().st_ino == (lower / "f").stat().st_ino


@pytest.mark.parametrize("mounted_on", ["f", "d"])
def test_what_is_mounted_inside_where_nobody_may_look_beneath(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, mounted_on: str
) -> None:
    lower = chain.layer("d/file", "f")
    chain.layer("more")
    (chain.base / "foreign").write_text("foreign")
    what = ("none", "tmpfs", 0) if mounted_on == "d" else (str(chain.base / "foreign"), "", 0x1000)
    mounting.mount(what[0], str(lower / mounted_on), what[1], what[2])

    def refused(fd: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("snapfs.kernel.mountapi.copy_tree", refused)
    try:
        with pytest.raises(OSError, match=f"{lower.name}/{mounted_on}|'{mounted_on}'") as caught:
            squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    finally:
        mounting.unmount(str(lower / mounted_on))
    assert caught.value.errno == errno.EBUSY
    assert not os.path.lexists(chain.base / "whole/f") or os.stat(chain.base / "whole/f").st_ino == os.stat(lower / "f").st_ino


# What can't be done


def test_redirects_are_refused(chain: Chain) -> None:
    """And a file whose data is elsewhere; as the kernel makes them."""
    chain.layer("old/x", "file")
    layer = chain.layer()
    (chain.base / "work").mkdir()
    options = "redirect_dir=on,metacopy=on,index=off"
    with merged(chain.layers, f"{chain.base}/mnt", options, f"{chain.base}/work") as target:
        os.rename(f"{target}/old", f"{target}/n\new")
    with pytest.raises(FailedPrecondition) as caught:
        squashed(chain.layers, f"{chain.base}/1", lowest=True)
    why = "was renamed in an overlay with redirect_dir=on: its files are elsewhere"
    why += ", so that this layer can't be merged with others"
    assert str(caught.value) == f"{layer}/n%0Aew {why}"
    assert caught.value.public == f"a directory {why}"
    with merged(chain.layers, f"{chain.base}/mnt", options, f"{chain.base}/work") as target:
        os.rename(f"{target}/n\new", f"{target}/old")
        os.chmod(f"{target}/file", 0o600)
    os.removexattr(layer / "old", "trusted.overlay.redirect")
    with pytest.raises(FailedPrecondition, match="/file was changed in an overlay with metacopy=on") as caught:
        squashed(chain.layers, f"{chain.base}/2", lowest=False)
    assert caught.value.public.startswith("a file was changed")
    (layer / "file").unlink()
    (layer / "file").touch()
    squashed(chain.layers, f"{chain.base}/3", lowest=True)


def test_a_hidden_mark_does_not_matter(chain: Chain) -> None:
    lower = chain.layer("d/x", "file", "low/x")
    os.setxattr(lower / "low", "trusted.overlay.redirect", b"d")
    os.setxattr(lower / "file", "trusted.overlay.metacopy", b"")
    middle = chain.layer("d/y", "file")
    os.setxattr(middle / "d", "trusted.overlay.redirect", b"z")
    chain.layer("d", "file")
    check(chain.layers, chain.base)


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_layer(chain: Chain, which: int) -> None:
    chain.layer("a")
    chain.layer("b")
    missing = chain.layers[which] = chain.layers[which] + "-gone"
    before = own_descriptors()
    with pytest.raises(FileNotFoundError) as caught:
        squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    assert caught.value.filename == missing
    assert own_descriptors() == before


def test_an_owner_that_a_user_namespace_lacks(chain: Chain) -> None:
    """The file can't be linked there (fs.protected_hardlinks), and no copy can belong to the same."""
    layer = chain.layer("mine", "others")
    chain.layer("mine")
    os.chown(layer / "others", 60001, 60001)
    (chain.base / "whole").mkdir()
    call = f"squash({chain.layers}, '{chain.base}/whole', prefix='user.overlay.', lowest=True)"
    code = f"from snapfs.scan.squashing import squash; {call}"
    ran = subprocess.run(["unshare", "-Ur", sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert ran.stderr.decode().endswith(f"OSError: [Errno 22] Invalid argument: '{layer}/others'\n")
    os.chmod(layer / "others", 0o666)  # such a file anybody may link
    subprocess.run(["rm", "-rf", chain.base / "whole"], check=True)
    (chain.base / "whole").mkdir()
    subprocess.run(["unshare", "-Ur", sys.executable, "-c", code], check=True)
    same(view(chain.layers, chain.base), view([chain.base / "whole"], chain.base))


# Bounds


@pytest.mark.parametrize(("levels", "name", "layers"), [(3000, "d", 1), (3000, "d", 3), (200, "n" * 255, 2)])
def test_depth_and_length(chain: Chain, levels: int, name: str, layers: int) -> None:
    for _ in range(layers):
        make_comb(chain.layer(), levels, name)
    before = len(own_descriptors())
    most = asked = 0

    def checkpoint() -> None:
        nonlocal most, asked
        asked += 1
        if asked % 100 == 0:
            most = max(most, len(os.listdir("/proc/self/fd")))

    whole = chain.base / "whole"
    whole.mkdir()
    squash(chain.layers, str(whole), lowest=True, checkpoint=checkpoint)
    assert asked >= 2 * levels + 1
    assert before < most <= before + Descriptors.OPEN + 6
    assert len(own_descriptors()) == before
    words = ["find", "-printf", "%d %f %y %m %T@\n"]
    listed = [sorted(subprocess.check_output(words, cwd=place).splitlines()) for place in (whole, chain.layers[0])]
    assert listed[0][1:] == listed[1][1:]  # but for the top, in which there are other names
    assert len(listed[0]) == 2 * levels + 2


def test_few_descriptors_for_many_layers(chain: Chain) -> None:
    for number in range(500):
        chain.layer(f"a/b/{number}")
    before = len(own_descriptors())
    most: list[int] = []
    (chain.base / "whole").mkdir()
    squash(
        chain.layers,
        f"{chain.base}/whole",
        lowest=True,
        checkpoint=lambda: most.append(len(os.listdir("/proc/self/fd"))),
    )
    assert len(os.listdir(chain.base / "whole/a/b")) == 500
    assert max(most) <= before + Descriptors.OPEN + 6


def test_memory_does_not_grow_with_entries(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of one directory nor those that are hidden."""
    monkeypatch.setattr("snapfs.scan.marks.BATCH", 200)
    monkeypatch.setattr("snapfs.scan.squashing.BATCH", 200)
    peaks = []
    for count in (1_000, 6_000):
        lower, upper = chain.layer(), chain.layer()
        for number in range(count):
            os.mknod(lower / f"{number}")
            if number % 2:
                os.mknod(upper / f"{number}", stat.S_IFCHR)
            if number % 4 == 0:
                os.mkdir(upper / f"d{number}")
        whole = chain.base / f"whole{count}"
        whole.mkdir()
        tracemalloc.start()
        try:
            squash([str(upper), str(lower)], str(whole), lowest=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(os.listdir(whole)) == count // 2 + count // 4
    assert peaks[1] < 1.2 * peaks[0] + 50_000 < 1_000_000, peaks


def test_the_checkpoint_stops_it(chain: Chain) -> None:
    chain.layer("a/b/c", "d")
    chain.layer("a/e")
    before = own_descriptors()
    asked: list[None] = []

    def checkpoint() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise KeyboardInterrupt

    (chain.base / "whole").mkdir()
    with pytest.raises(KeyboardInterrupt):
        squash(chain.layers, f"{chain.base}/whole", lowest=True, checkpoint=checkpoint)
    assert own_descriptors() == before


@pytest.mark.parametrize("copied", [False, True])
def test_only_directories_and_what_is_copied_are_opened(chain: Chain, monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    for number in range(2):
        layer = chain.layer(f"d/{number}", "e/x", "X:e/y", e="x")
        for directory in (layer, layer / "d", layer / "e"):
            os.mkfifo(directory / f"fifo{number}")
            os.mknod(directory / f"zero{number}", stat.S_IFCHR, os.makedev(1, 5))
            os.symlink("fifo", directory / f"link{number}")
    opened: list[str] = []
    original = os.open

    def spy(path: str, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> int:
        was_looked_at = path.startswith("/proc/self/fd/")
        assert flags & os.O_NOFOLLOW or flags & os.O_EXCL or was_looked_at
        if not flags & (os.O_DIRECTORY | os.O_PATH):
            opened.append(os.path.basename(os.readlink(path)) if was_looked_at else path)
        return original(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", spy)
    if copied:
        refuse_links(monkeypatch, lambda found: errno.EPERM)
    squashed(chain.layers, f"{chain.base}/whole", lowest=True)
    assert sorted(opened) == (["0", "0", "1", "1", "x", "x", "y", "y"] if copied else [])
