"""What a layer changed against its chain: what the kernel's overlayfs shows is the measure."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from snapfs.kernel import inside
from snapfs.scan.changes import changes
from snapfs.scan.lines import lines
from snapfs.scan.walk import Descriptors
from tests.kernel_changes import (
    Chain,
    compare_with_kernel,
    expected,
    found,
    have_little_wait_in_memory,
    make_comb,
    merged,
    raw,
    said,
)
from tests.processes import die_with_parent, own_descriptors

pytestmark = pytest.mark.mounts

# What the kernel shows


def test_as_the_kernel_shows_it() -> None:
    compare_with_kernel(options="redirect_dir=off,index=off,metacopy=off")


def test_as_the_kernel_shows_it_in_a_user_namespace() -> None:
    code = "from tests.kernel_changes import compare_with_kernel; compare_with_kernel(options='userxattr')"
    subprocess.run(["unshare", "-Urm", sys.executable, "-c", code], check=True, preexec_fn=die_with_parent)


@pytest.mark.parametrize(("many", "held"), [(1, 0), (3, 10**9), (10**9, 0)])
def test_as_the_kernel_shows_it_where_entries_wait_in_a_file(monkeypatch: pytest.MonkeyPatch, many: int, held: int) -> None:
    monkeypatch.setattr("snapfs.scan.changes.MANY", many)
    monkeypatch.setattr("snapfs.scan.changes.HELD", held)
    monkeypatch.setattr("snapfs.scan.changes._HARDLY_ANY", 2)
    have_little_wait_in_memory(monkeypatch)
    compare_with_kernel(options="redirect_dir=off,index=off,metacopy=off")


# Layers made by hand


def test_without_parents_everything_is_added(chain: Chain) -> None:
    layer = chain.layer("a/b/c", "empty/", "D:gone")
    os.mkfifo(layer / "fifo")
    os.symlink("/", layer / "link")
    os.mknod(layer / "null", stat.S_IFCHR, os.makedev(1, 3))
    lines = ["A /a", "A /a/b", "A /a/b/c", "A /empty", "A /fifo", "A /gone", "A /link", "A /null"]
    assert said(chain.layers) == lines, "a device 0:0 hides nothing here, and a bind mount shows it"


def test_what_looks_like_a_whiteout_hides_nothing_in_a_layer_without_parents(chain: Chain) -> None:
    """Once the layer is a lower one, the kernel takes it for a whiteout: a child that makes the name adds it."""
    chain.layer("D:device", "X:x/marked", x="x")
    assert said(chain.layers) == ["A /device", "A /x", "A /x/marked"]
    options = "redirect_dir=off,index=off,metacopy=off"
    with merged(chain.layers, f"{chain.base}/alone", options) as target:
        assert sorted(os.listdir(target)) == ["device", "x"]
    chain.layer()
    with merged(chain.layers, f"{chain.base}/child", options) as target:
        assert os.listdir(target) == ["x"]
        assert not os.path.lexists(f"{target}/x/marked")
    chain.layer("device", "x/marked")
    assert said(chain.layers) == ["A /device", "A /x/marked"]


def test_an_empty_layer_changes_nothing(chain: Chain) -> None:
    chain.layer("a/b")
    chain.layer()
    chain.check()


def test_whiteouts(chain: Chain) -> None:
    chain.layer("file", "dir/below/deep", "kept/file", "hidden")
    chain.layer("D:hidden", "D:never")
    chain.layer("D:file", "D:dir", "D:hidden", "D:never", "D:nothing", "D:kept/file", "D:new/x", "new/y")
    chain.check("D /dir", "D /file", "D /kept/file", "A /new", "A /new/y")


def test_whiteouts_below_directories(chain: Chain) -> None:
    chain.layer("d/file", "d/e/file", "D:d/gone")
    chain.layer("D:d/file", "D:d/e")
    chain.layer("D:d/file", "d/e/file", "D:d/e/other")
    chain.check("A /d/e", "A /d/e/file")


def test_whiteouts_with_an_extended_attribute(chain: Chain) -> None:
    chain.layer("d/a", "d/b", "d/c", "d/empty")
    middle = chain.layer("X:d/a", "d/other", d="x")
    (middle / "d/empty").write_text("")
    chain.layer("X:d/a", "X:d/b", "X:d/nothing", "d/c", d="x")
    assert said(chain.layers) == ["D /d/b", "C /d/c"]  # /d/a was hidden by the middle layer
    chain.layer()  # the kernel reads these in lower layers alone
    chain.layers.pop(0)
    chain.layers.insert(0, chain.layers.pop(0))
    assert said(chain.layers) == ["D /d/b", "C /d/c"]


def test_many_whiteouts_with_an_extended_attribute(chain: Chain) -> None:
    """As many as make it list the lower layer instead of looking names up."""
    names = [f"d/{number:03}" for number in range(200)]
    chain.layer(*names)
    chain.layer(*[f"X:{name}" for name in names[:100]], d="x")
    chain.layer(*names)
    chain.check(*[f"{'A' if number < 100 else 'C'} /{name}" for number, name in enumerate(names)])


def test_the_attribute_counts_only_in_marked_directories_and_on_empty_files(chain: Chain) -> None:
    chain.layer("d/a", "e/b", "root")
    layer = chain.layer("X:d/a", "X:e/b", "X:root", e="x")
    (layer / "e/b").write_text("text")
    assert said(chain.layers) == ["C /d/a", "C /e/b", "C /root"]
    os.setxattr(layer, "trusted.overlay.opaque", b"x")
    assert said(chain.layers) == ["C /d/a", "C /e/b", "D /root"]


@pytest.mark.parametrize("namespace", ["trusted", "user"])
def test_marks_of_the_one_namespace_that_the_mounts_use(chain: Chain, namespace: str) -> None:
    chain.layer("d/a", "e/a", "e/b")
    layer = chain.layer("d/", "e/")
    os.setxattr(layer / "d", f"{namespace}.overlay.opaque", b"y")
    os.setxattr(layer / "e", f"{namespace}.overlay.opaque", b"x")
    (layer / "e/a").write_text("")
    os.setxattr(layer / "e/a", f"{namespace}.overlay.whiteout", b"")
    assert said(chain.layers, f"{namespace}.overlay.") == ["D /d/a", "D /e/a"]
    other = {"trusted": "user", "user": "trusted"}[namespace]
    assert said(chain.layers, f"{other}.overlay.") == ["C /d", "C /e", "C /e/a"], "attributes like any other"


def test_opaque_directories(chain: Chain) -> None:
    chain.layer("d/both", "d/gone", "d/sub/x", "d/sub/y/z", "d/lost/x/y", "d/file/x")
    layer = chain.layer("d/both", "d/new", "d/sub/x", "d/sub/n", "d/file", d="y")
    chain.check("C /d/both", "C /d/file", "D /d/gone", "D /d/lost", "A /d/new", "A /d/sub/n", "C /d/sub/x", "D /d/sub/y")
    os.chmod(layer / "d/sub", 0o700)
    os.chmod(layer / "d", 0o700)
    assert [line for line in said(chain.layers) if line in ("C /d", "C /d/sub")] == ["C /d", "C /d/sub"]


def test_opaque_directories_that_hold_whiteouts(chain: Chain) -> None:
    chain.layer("d/a", "d/b")
    chain.layer("D:d/a", "D:d/c", d="y")
    assert said(chain.layers) == ["D /d/a", "D /d/b"]


def test_opaque_directories_of_the_chain(chain: Chain) -> None:
    chain.layer("d/a", "d/b", "d/sub/x")
    chain.layer("d/b", "d/sub/y", d="y")
    chain.layer("D:d/a", "d/b", "D:d/sub/x", "d/sub/y", "d/c")
    chain.check("C /d/b", "A /d/c", "C /d/sub/y")


def test_an_opaque_mark_of_a_root_means_nothing(chain: Chain) -> None:
    """overlayfs merges the roots without looking."""
    chain.layer("a", "b")
    os.setxattr(chain.layer("c"), "trusted.overlay.opaque", b"y")
    os.setxattr(chain.layer("a"), "trusted.overlay.opaque", b"y")
    chain.check("C /a")


def test_a_whiteout_of_the_chain_hides_below_an_opaque_directory(chain: Chain) -> None:
    chain.layer("d/a", "d/b")
    chain.layer("D:d/a", "d/c")
    chain.layer("d/new", d="y")
    chain.check("D /d/b", "D /d/c", "A /d/new")


def test_an_opaque_mark_has_one_letter(chain: Chain) -> None:
    chain.layer("d/a")
    chain.layer("d/b", d="yes")
    chain.check("A /d/b")


def test_files_over_directories_and_directories_over_files(chain: Chain) -> None:
    chain.layer("dir/a/b", "file", "both/x", "under/x")
    chain.layer("both", "D:under")
    chain.layer("dir", "file/a/b", "both/y", "under/y")
    chain.check("C /both", "A /both/y", "C /dir", "C /file", "A /file/a", "A /file/a/b", "A /under", "A /under/y")


def test_a_file_in_the_chain_ends_the_directory_above_it(chain: Chain) -> None:
    chain.layer("d/low")
    chain.layer("d")
    chain.layer("d/high")
    chain.layer("D:d/low", "D:d/high")
    chain.check("D /d/high")


def test_a_directory_is_changed_by_its_own_attributes_alone(chain: Chain) -> None:
    lower = chain.layer(*[f"{name}/x" for name in ("gid", "mode", "same", "uid", "value", "xattr")])
    os.setxattr(lower / "value", "user.test", b"1")
    layer = chain.layer(*[f"{name}/y" for name in ("gid", "mode", "same", "uid", "value", "xattr")])
    os.chmod(layer / "mode", 0o711)
    os.chown(layer / "uid", 7, -1)
    os.chown(layer / "gid", -1, 7)
    os.setxattr(layer / "value", "user.test", b"2")
    os.setxattr(layer / "xattr", "user.test", b"")
    os.setxattr(layer / "same", "trusted.overlay.origin", b"")
    os.utime(layer / "same", (1, 1))
    changed = [line for name in ("gid", "mode", "uid", "value", "xattr") for line in (f"C /{name}", f"A /{name}/y")]
    chain.check(*sorted([*changed, "A /same/y"], key=lambda line: line[2:]))


def test_a_directory_is_compared_with_the_nearest(chain: Chain) -> None:
    lowest = chain.layer("d/")
    os.chmod(lowest / "d", 0o700)
    chain.layer("d/")
    chain.layer("d/")
    chain.check()


def test_the_root_is_changed_by_its_own_attributes(chain: Chain) -> None:
    chain.layer("a")
    os.chmod(chain.layer("b"), 0o700)
    chain.check("C /", "A /b")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
def test_redirected_directories_are_listed_as_they_are(chain: Chain, which: int, prefix: str) -> None:
    chain.layer("d/o\nld/x")
    chain.layer("d/n\nw/x")
    chain.layer("a", "d/n\nw/y", "e")
    os.setxattr(f"{chain.layers[which]}/d/n\nw", f"{prefix}redirect", b"old")
    lines = list(changes(chain.layers, prefix=prefix))
    assert lines == ["A /a\n", "R /d/n\\nw/\n", "A /d/n\\nw/y\n", "A /e\n"]


def test_redirects_that_do_not_matter(chain: Chain) -> None:
    """In the lowest layer, of opaque directories, of roots, and where the layer does not go: overlayfs does not look either."""
    lowest = chain.layer("low/x", "opaque/x", "out/x")
    middle = chain.layer("out/y", "opaque/y")
    upper = chain.layer("low/y", "opaque/y", "D:out", opaque="y")
    for directory in (lowest / "low", middle / "out", middle, upper / "opaque", upper):
        os.setxattr(directory, "trusted.overlay.redirect", b"z")
    assert said(chain.layers) == ["A /low/y", "D /opaque/x", "C /opaque/y", "D /out"]


def test_a_rename_with_redirect_dir(chain: Chain) -> None:
    """As the kernel makes it; a file renamed with metacopy is said as what it is, since its line needs no contents."""
    chain.layer("old/x", "old/y", "file")
    layer = chain.layer()
    options = "redirect_dir=on,metacopy=on,index=off"
    (chain.base / "work").mkdir()
    with merged(chain.layers, f"{chain.base}/mnt", options, f"{chain.base}/work") as target:
        os.chmod(f"{target}/file", 0o600)
        os.rename(f"{target}/file", f"{target}/renamed")
    assert "trusted.overlay.metacopy" in os.listxattr(layer / "renamed")
    assert set(found(chain.layers)) == expected(chain.layers, str(chain.base), options) == {("D", b"/file"), ("A", b"/renamed")}
    with merged(chain.layers, f"{chain.base}/mnt", options, f"{chain.base}/work") as target:
        os.rename(f"{target}/old", f"{target}/new")
    assert set(found(chain.layers)) == {("D", b"/file"), ("D", b"/old"), ("A", b"/new"), ("R", b"/new/"), ("A", b"/renamed")}


# Lines


def test_order_is_that_of_the_bytes_of_whole_paths(chain: Chain) -> None:
    names = [
        "a/x",
        "a b",
        "a.b/y",
        "a0",
        "a-/x",
        os.fsdecode(b"a\x80/x"),
        "aé",
        "a\uffff",
        "a\U0001f600",
        os.fsdecode(b"a\xff"),
    ]
    chain.layer("a/x")
    chain.layer(*names, "A", "b\x01/x", "b")
    paths = [path for _, path in found(chain.layers)]
    listed = subprocess.run(
        ["sort", "-z"], input=b"\0".join(paths) + b"\0", env={"LC_ALL": "C"}, stdout=subprocess.PIPE, check=True
    )
    assert listed.stdout.split(b"\0")[:-1] == paths
    assert paths.index(b"/a b") < paths.index(b"/a.b/y") < paths.index(b"/a/x") < paths.index(b"/a0")


def test_printf_gives_the_names_back(chain: Chain) -> None:
    """Each byte that a name can have, alone and among others, and text beyond ASCII."""
    layer = chain.layer()
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    names += [b"0" + name + b"12\\c\\0101" for name in names]
    names += ["é€😀\u2028".encode(), "so\u00adft".encode(), "\u0085\u009f".encode(), b"\xed\xb2\x80", b"%s%d", b" x ", b"-n"]
    for name in names:
        Path(os.fsdecode(os.fsencode(layer) + b"/" + name)).touch()
    lines = list(changes(chain.layers))
    assert all(line.isprintable() for line in (line[:-1] for line in lines))
    script = "for path do printf '%b\\0' \"$path\"; done"
    shown = subprocess.check_output(["dash", "-c", script, "dash", *[line[2:-1] for line in lines]])
    assert shown.split(b"\0")[:-1] == sorted(b"/" + name for name in names) == [raw(line)[1] for line in lines]
    assert "A /é€😀\\0342\\0200\\0250\n" in lines
    assert "A /so\\0302\\0255ft\n" in lines
    assert "A /\\n\n" in lines
    assert "A /\\\\\n" in lines
    assert "A /\\0302\\0205\\0302\\0237\n" in lines
    assert "A /\\0355\\0262\\0200\n" in lines


# Bounds


@pytest.mark.parametrize(
    ("levels", "name", "below"), [(3000, "d", 0), (3000, "d", 1), (200, "n" * 255, 0), (200, "n" * 255, 2)]
)
def test_depth_and_length(chain: Chain, levels: int, name: str, below: int) -> None:
    for _ in range(below + 1):
        make_comb(chain.layer(), levels, name)
    before = len(own_descriptors())
    most = asked = lines = 0

    def checkpoint() -> None:
        nonlocal most, asked
        asked += 1
        if asked % 100 == 0:
            most = max(most, len(os.listdir("/proc/self/fd")))

    last = ""
    for line in changes(chain.layers, checkpoint=checkpoint):
        lines += 1
        if line.endswith("/file\n"):
            assert line == f"{'C' if below else 'A'} /{f'{name}/' * levels}file\n"
        last = line
    assert asked == 2 * levels + 1
    assert lines == (1 if below else 2 * levels + 1)
    assert last == (line if below else f"A /z{name[:2]}\n")
    assert most <= before + Descriptors.OPEN + 4
    assert len(own_descriptors()) == before


def test_few_descriptors_for_many_layers(chain: Chain) -> None:
    for number in range(300):
        chain.layer(f"a/b/{number}")
    before = len(own_descriptors())
    assert said(chain.layers) == ["A /a/b/299"]
    lines = changes([*chain.layers[1:], chain.layers[0]], checkpoint=lambda: most.append(len(os.listdir("/proc/self/fd"))))
    most: list[int] = []
    assert list(lines) == ["A /a/b/298\n"]
    assert max(most) <= before + Descriptors.OPEN + 4


@pytest.fixture
def many_files(chain: Chain) -> Path:
    layer = chain.layer()
    for directory in range(250):
        (layer / f"{directory}").mkdir()
        for number in range(40):
            os.close(os.open(f"{layer}/{directory}/{number}", os.O_CREAT | os.O_WRONLY))
    return layer


def test_memory_does_not_grow_with_paths_and_nothing_is_looked_up(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(module: ModuleType, name: str) -> None:
        original: Callable[..., object] = getattr(module, name)

        def asks(*args: object, **options: object) -> object:
            asked.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module, name, asks)

    for name in ("stat", "lstat", "fstat", "getxattr", "listxattr", "open"):
        spy(os, name)
    spy(inside, "open_directory")
    assert sum(1 for _ in changes([str(many_files)])) == 10_250
    assert sorted(asked) == ["listxattr"] * 251 + ["open"] * 2 + ["open_directory"] * 250
    monkeypatch.undo()
    tracemalloc.start()
    try:
        sum(1 for _ in changes([str(many_files)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300_000


@pytest.mark.parametrize("scan", [changes, partial(lines, [])])
def test_memory_on_the_way_down_a_deep_and_wide_tree(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, scan: Callable[..., Iterable[str]]
) -> None:
    """Some kilobytes for each directory, however many names are beside the next, and however long."""
    monkeypatch.setattr("snapfs.scan.changes.HELD", 100)
    monkeypatch.setattr("snapfs.scan.differing.HELD", 100)
    levels, width = 100, 90
    names = [f"z{number:02}".ljust(250, "x") for number in range(width)]
    above = os.open(chain.layer(), os.O_RDONLY)
    os.close(os.open("file", os.O_CREAT, dir_fd=above))
    for _ in range(levels):
        for name in names:
            os.mknod(name, dir_fd=above)
        os.mkdir("a", dir_fd=above)
        below = os.open("a", os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    tracemalloc.start()
    try:
        found = sum(1 for _ in scan(chain.layers))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found >= levels * (width + 1) + 1
    assert peak < levels * 20_000, "the names alone are 22,500 each"


def test_the_checkpoint_stops_it_and_close_lets_go(chain: Chain) -> None:
    chain.layer("a/b/c", "d")
    before = own_descriptors()

    def checkpoint() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise KeyboardInterrupt

    asked: list[None] = []
    lines = changes(chain.layers, checkpoint=checkpoint)
    assert [next(lines), next(lines)] == ["A /a\n", "A /a/b\n"]
    with pytest.raises(KeyboardInterrupt):
        next(lines)
    assert own_descriptors() == before
    lines = changes(chain.layers)
    next(lines)
    assert own_descriptors() != before
    lines.close()
    assert own_descriptors() == before


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_layer(chain: Chain, which: int) -> None:
    chain.layer("a")
    chain.layer("b")
    chain.layers[which] += "-gone"
    with pytest.raises(FileNotFoundError, match="gone"):
        said(chain.layers)


# Layers that change under the scan, and layers that mean harm


@pytest.mark.parametrize("below", [False, True])
def test_what_vanishes_is_left_out(chain: Chain, below: bool) -> None:
    if below:
        chain.layer("a", "b/x", "c/d/x", "e/x", "f")
    layer = chain.layer("a", "b/x", "c/d/x", "e/x", "f")
    lines = changes(chain.layers)
    assert next(lines)[1:] == " /a\n"
    shutil.rmtree(layer / "b")
    shutil.rmtree(layer / "c")
    (layer / "c").write_text("")
    shutil.rmtree(layer / "e")
    os.mkfifo(layer / "e")
    assert [line for line in lines if not line.startswith("A /") or "/x" in line or below] == (["C /f\n"] if below else [])


def test_a_directory_emptied_while_it_is_read(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.layer("a/x", "b")
    layer = chain.layer("a/x", "a/y", "X:z/q", "z/r", z="x")

    def vanishes(fd: int) -> list[str]:
        shutil.rmtree(layer / "z", ignore_errors=True)
        return []

    monkeypatch.setattr("snapfs.scan.marks.list_xattrs", vanishes)
    assert said(chain.layers) == ["C /a/x", "A /a/y"]


@pytest.mark.parametrize("few", [False, True])
def test_symbolic_links_are_never_followed(chain: Chain, monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    """Neither those that were always there nor those that somebody puts in the way, of the layer or of the chain."""
    if few:
        monkeypatch.setattr(Descriptors, "OPEN", 1)
    outside = chain.base / "outside"
    (outside / "c").mkdir(parents=True)
    (outside / "c/secret").write_text("")
    (outside / "secret").write_text("")
    lower = chain.layer("d/c/x", "d/secret", "link2/secret")
    upper = chain.layer("a/b/x", "a/c/x", "d/b", "d/c/secret", "e/secret", "link2/secret")
    os.symlink(outside, upper / "link")
    os.symlink(outside, lower / "e")
    shutil.rmtree(lower / "link2")
    os.symlink(outside, lower / "link2")
    lines = changes(chain.layers)
    assert [next(lines), next(lines)] == ["A /a\n", "A /a/b\n"]
    os.rename(upper / "a/c", upper / "a/old")
    os.symlink(outside, upper / "a/c")
    os.rename(upper / "a", upper / "old")
    os.symlink(outside, upper / "a")
    rest = list(lines)
    assert not [line for line in rest if line.startswith("A /a/") and "secret" in line]
    assert rest[-7:] == [
        "A /d/b\n",
        "A /d/c/secret\n",
        "C /e\n",
        "A /e/secret\n",
        "A /link\n",
        "C /link2\n",
        "A /link2/secret\n",
    ]


def test_only_directories_are_opened(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        layer = chain.layer("d/a", "e/x", "X:e/y", e="x")
        for number, directory in enumerate((layer, layer / "d", layer / "e")):
            os.mkfifo(directory / "fifo")
            os.mknod(directory / "zero", stat.S_IFCHR, os.makedev(1, 5))
            os.symlink("fifo", directory / f"link{number}")
    opened: list[str] = []
    original, inner = os.open, inside.open_directory

    def spy(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        assert flags & os.O_DIRECTORY
        assert flags & os.O_NOFOLLOW
        opened.append(path)
        return original(path, flags, dir_fd=dir_fd)

    def spy_inside(name: str, parent: int) -> int:
        opened.append(name)
        return inner(name, parent)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr(inside, "open_directory", spy_inside)
    assert len(said(chain.layers)) == 11
    again = ["."] * len(chain.layers)  # in a copy of the mount
    assert sorted(opened) == sorted([*chain.layers, *again, "d", "d", "e", "e"])
