"""Archives become layers: exact, as the kernel's overlay then shows them; or they are refused, and all outside is as it was."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs.images import unpacking as unpacking_of_layers
from snapfs.images.limits import Limits
from snapfs.images.lower import Lower
from snapfs.images.tarreader import Stream, TarReader
from snapfs.images.unfit import Unfit
from snapfs.images.unpacking import Left, Owners, Unpacking
from snapfs.kernel.beneath import open_beneath
from snapfs.scan.marks import Marks
from tests.images import Layer, archive_of, packable_tree
from tests.kernel_changes import merged
from tests.trees import everything

pytestmark = pytest.mark.mounts

TRUSTED = "trusted.overlay."


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def unpacked(archive: bytes, top: Path, below: Sequence[Path | str] = (), owners: Owners | None = None, most: int = 0) -> Left:
    """Unpack into the new directory ``top``, on the layers ``below``, the nearest first."""
    aside, limits = top.parent / f"{top.name}-aside", Limits(most, 0, 0)
    top.mkdir()
    aside.mkdir()
    fds = [os.open(each, os.O_RDONLY) for each in (top, aside)]
    unpacking = Unpacking(*fds, lowest=not below, prefix=TRUSTED, owners=owners or Owners())
    try:
        reader = TarReader(Stream(archive[here : here + 5000] for here in range(0, len(archive), 5000)))
        while (entry := reader.next()) is not None:
            unpacking.add(entry, reader)
        unpacking.finish([str(each) for each in below], lambda: limits.refuse_size(unpacking.size))
        return unpacking.left
    finally:
        unpacking.close()
        for fd in fds:
            os.close(fd)
        subprocess.run(["rm", "-rf", aside], check=True)


def kinds(top: Path) -> dict[str, str]:
    """What is in a layer: what files hold, "dir", "opaque", "gone", or where a link leads."""
    found = {}
    for directory, inside, others in os.walk(top):
        for name in [*inside, *others]:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                text = "opaque" if f"{TRUSTED}opaque" in os.listxattr(path) else "dir"
            elif stat.S_ISLNK(status.st_mode):
                text = f"-> {os.readlink(path)}"
            elif stat.S_ISREG(status.st_mode):
                text = path.read_text()
            else:
                text = "gone" if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0 else "special"
            found[str(path.relative_to(top))] = text
    return found


def test_the_nearest_layers_are_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 layers those that are below the one that knows are not looked at."""
    layers = [tmp_path / f"{number}" for number in range(200)]
    for layer in layers:
        (layer / "etc").mkdir(parents=True)
        (layer / "etc/file").touch()
    looked = []

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def noted(*of: object) -> object:
            looked.append(of)
            return call(*of)

        return noted

    for name in ("read", "kind"):
        monkeypatch.setattr(Marks, name, counted(getattr(Marks, name)))
    with Lower([str(layer) for layer in layers], "trusted.overlay.") as lower:
        assert lower.is_directory(b"etc")
        assert lower.file(b"etc/file") is not None
        assert len(looked) < 10
        assert not lower.has(b"etc/other")
        assert len(looked) >= 200
        before = len(looked)
        assert not lower.has(b"etc/another")
        assert len(looked) - before == 200, "each layer's directory is found once"


@pytest.mark.parametrize("seed", range(6))
def test_all_is_in_it_as_the_archive_says(tmp_path: Path, seed: int) -> None:
    tree = packable_tree(tmp_path / "tree", seed, files=150)
    left = unpacked(archive_of(tree), tmp_path / "layer")
    assert (left.foreign, left.bare, left.device) == ("", "", "")
    ours, theirs = everything(tmp_path / "layer"), everything(tree)
    for found in (ours, theirs):
        del found["."]  # the top is as its snapshot has it
        for path, seen in found.items():
            assert isinstance(seen, tuple)
            found[path] = (*seen[:3], seen[3][0] if isinstance(seen[3], tuple) else seen[3], *seen[4:])  # but for holes
    assert ours == theirs


def test_sparse_files_stay_sparse(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.seek(1 << 24)
        out.write(b"end")
    archive = subprocess.run(["tar", "-C", tmp_path, "-S", "-cf", "-", "file"], stdout=subprocess.PIPE, check=True).stdout
    unpacked(archive, tmp_path / "layer")
    assert (tmp_path / "layer/file").read_bytes() == file.read_bytes()
    assert (tmp_path / "layer/file").stat().st_blocks < 100


def test_what_an_entry_replaces(tmp_path: Path) -> None:
    layer = Layer().add("a", None).add("a/b", b"old").add("a", b"file").add("c", b"file").add("c/", None).add("c/d", b"new")
    layer.link("l", "a").add("l", b"no link").add("e", None, 0o700).add("e/f", b"kept").add("e", None, 0o750)
    layer.add("g/h", b"1").link("g", "e").add("g/i", b"through").add("twice", b"1").add("twice", b"2")
    layer.add("new\nline", b"\n").add("./dot/./x", b"dot").link("etc", "/etc").link("up", "../../..")
    unpacked(layer.done(), tmp_path / "layer")
    assert kinds(tmp_path / "layer") == {
        **{"a": "file", "c": "dir", "c/d": "new", "l": "no link", "e": "dir", "e/f": "kept", "e/i": "through", "g": "-> e"},
        **{"twice": "2", "new\nline": "\n", "dot": "dir", "dot/x": "dot", "etc": "-> /etc", "up": "-> ../../.."},
    }
    assert stat.S_IMODE((tmp_path / "layer/e").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Layer().add("../x", b""), "there is a .. in it"),
        (Layer().add("a/../../x", b""), "there is a .. in it"),
        (Layer().add("/etc/x", b""), "absolute path"),
        (Layer().hard("x", "/etc/passwd"), "absolute path"),
        (Layer().hard("x", "../../etc/passwd"), "there is a .. in it"),
        (Layer().hard("x", "nothing"), "which is not there"),
        (Layer().add("d", None).hard("x", "d"), "hard link to a directory"),
        (Layer().hard("x", "."), "hard link to a directory"),
        (Layer().add("x", b"").hard("x", "x"), "hard link to itself"),
        (Layer().link("etc", "/etc").add("etc/x", b""), "leads through the link etc to /etc, out of the layer"),
        (Layer().link("etc", "/etc").hard("x", "etc/passwd"), "out of the layer"),
        (Layer().link("up", "..").add("up/x", b""), "leads through the link up to .., out of the layer"),
        (Layer().add("d", None).link("d/up", "../../etc").add("d/up/x", b""), "out of the layer"),
        (Layer().link("a", "b").link("b", "a").add("a/x", b""), "more than 40 links"),
        (Layer().add("f", b"").add("f/x", b""), "f/x is to be in f, which is no directory"),
        (Layer().link("l", ""), "leads nowhere"),
        (Layer().add("zero", type=tarfile.CHRTYPE), "device 0:0"),
        (Layer().add(".wh.", b""), "whiteout of nothing"),
        (Layer().add(".wh...", b""), "whiteout of nothing"),
        (Layer(tarfile.PAX_FORMAT).add("x", pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"}), "reads as its own"),
        (Layer(tarfile.PAX_FORMAT).add("x", None, pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/"}), "as its own"),
    ],
)
def test_what_is_refused(tmp_path: Path, layer: Layer, why: str) -> None:
    outside = everything(tmp_path), sorted(os.listdir("/etc")), sorted(os.listdir("/"))
    with pytest.raises(Unfit, match=why.replace(".", r"\.")):
        unpacked(layer.done(), tmp_path / "layer")
    shutil.rmtree(tmp_path / "layer")
    assert (everything(tmp_path).keys(), sorted(os.listdir("/etc")), sorted(os.listdir("/"))) == (
        outside[0].keys(),
        *outside[1:],
    )


def test_deep_directories(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 1900)
    layer = (
        Layer(tarfile.PAX_FORMAT).add(f"{deep}/x", b"deep").add("d", b"file").add(f"{deep[:1000]}y".replace("d", "e", 1), b"")
    )
    unpacked(layer.done(), tmp_path / "layer")
    assert (tmp_path / "layer/d").read_bytes() == b"file"
    subprocess.run(["rm", "-rf", tmp_path / "layer"], check=True)


def test_targets_that_are_deep_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in few calls how far the way to one goes."""
    calls = []

    def counted(path: bytes, top: int, flags: int) -> int:
        calls.append(path)
        return open_beneath(path, top, flags)

    monkeypatch.setattr(unpacking_of_layers, "open_beneath", counted)
    layer = Layer(tarfile.PAX_FORMAT).add("/".join(["d"] * 300) + "/x", b"")
    layer.add("/".join(["d"] * 200 + ["e"] * 1500) + "/y", b"")
    with pytest.raises(Unfit, match="is not there"):
        unpacked(layer.hard("h", "/".join(["d"] * 100 + ["f"] * 1500)).done(), tmp_path / "layer")
    assert len(calls) < 50
    subprocess.run(["rm", "-rf", tmp_path / "layer"], check=True)


def test_many_directories_with_few_descriptors(tmp_path: Path) -> None:
    layer = Layer()
    for turn in range(2):
        for number in range(300):
            layer.add(f"{number}/{turn}", b"x")
    unpacked(layer.hard("h", "7/1").done(), tmp_path / "layer")
    assert len(os.listdir(tmp_path / "layer")) == 301


# -- on other layers


def test_whiteouts_before_and_after_what_stands_beside_them(tmp_path: Path) -> None:
    unpacked(Layer().add("f", b"old").add("d/old", b"").add("e/old", b"").add("g", b"").done(), tmp_path / "1")
    layer = Layer().add(".wh.f").add("f", b"new").add("d/new", b"").add(".wh.d").add(".wh.e").add("e", None).add("e/new", b"")
    layer.add("o", None).add("o/x", b"").add("o/.wh..wh..opq").add(".wh.g").add(".wh..wh.plnk", None).add(".wh.n").add(
        "n/x", b""
    )
    unpacked(layer.done(), tmp_path / "2", [tmp_path / "1"])
    assert kinds(tmp_path / "2") == {
        **{"f": "new", "d": "opaque", "d/new": "", "e": "opaque", "e/new": "", "o": "opaque", "o/x": "", "g": "gone"},
        **{"n": "opaque", "n/x": ""},
    }
    unpacked(layer.done(), tmp_path / "alone")
    assert not {"gone", "opaque"} & set(kinds(tmp_path / "alone").values())


def test_directories_that_are_implied_are_as_below(tmp_path: Path) -> None:
    moment = {"mtime": 1234567.5}
    below = Layer(tarfile.PAX_FORMAT).add("d", None, 0o2750, uid=7, gid=8, **moment, pax_headers={"SCHILY.xattr.user.n": "v"})
    unpacked(below.add("f", b"").add("gone", None, 0o700, uid=9).done(), tmp_path / "1")
    os.chmod(tmp_path / "1", 0o711)
    unpacked(Layer().add(".wh.gone").add("d/e/x", b"").done(), tmp_path / "2", [tmp_path / "1"])
    unpacked(
        Layer().add("d/y", b"").add("f/z", b"").add("gone/x", b"").done(), tmp_path / "3", [tmp_path / "2", tmp_path / "1"]
    )
    for number in ("2", "3"):
        found, first = everything(tmp_path / number)["d"], everything(tmp_path / "1")["d"]
        assert found == first
        assert stat.S_IMODE((tmp_path / number).stat().st_mode) == 0o711
    for name in ("2/d/e", "3/f", "3/gone"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755
        assert (tmp_path / name).stat().st_uid == 0


def test_hard_links_to_files_below(tmp_path: Path) -> None:
    below = Layer(tarfile.PAX_FORMAT).add("d/f", b"below", 0o4751, uid=7, mtime=77, pax_headers={"SCHILY.xattr.user.n": "v"})
    unpacked(below.add("other", b"other").link("l", "other").done(), tmp_path / "1")
    layer = Layer().hard("a/x", "d/f").hard("y", "a/x").hard("z", "d/f").hard("n", "other").add("n", b"own").hard("m", "other")
    unpacked(layer.add("other", b"mine").done(), tmp_path / "2", [tmp_path / "1"])
    names = [os.stat(tmp_path / "2" / name) for name in ("a/x", "y", "z", "d/f")]
    assert len({status.st_ino for status in names}) == 1
    assert names[0].st_nlink == 4
    for path in ("d/f", "a/x"):
        assert everything(tmp_path / "2")[path][:2] == everything(tmp_path / "1")["d/f"][:2]  # type: ignore[index]
    assert os.getxattr(tmp_path / "2/y", "user.n") == b"v"
    assert kinds(tmp_path / "2")["n"] == "own"
    assert (kinds(tmp_path / "2")["m"], kinds(tmp_path / "2")["other"]) == ("other", "mine")
    for target, why in (("l", "no regular file"), ("d", "is a directory there"), ("nothing", "is not there")):
        with pytest.raises(Unfit, match=why):
            unpacked(Layer().hard("x", target).done(), tmp_path / f"to-{target}", [tmp_path / "1"])
    with pytest.raises(Unfit, match="what the layer itself deletes"):
        unpacked(Layer().add(".wh.other").hard("x", "other").done(), tmp_path / "deleted", [tmp_path / "1"])


def test_owners_of_somebody_who_has_some(tmp_path: Path) -> None:
    owners = Owners(([range(70_000, 70_010), range(80_000, 80_005)], [range(90_000, 90_001)]))
    layer = Layer().add("d/a", b"", uid=0).add("d/b", b"", uid=10, gid=1).add("d/c", b"", 0o4755, uid=11)
    left = unpacked(layer.done(), tmp_path / "1", owners=owners)
    found = {name: (tmp_path / "1/d" / name).stat() for name in "abc"}
    assert [(status.st_uid, status.st_gid) for status in found.values()] == [(0, 0), (70_009, 90_000), (80_000, 0)]
    assert left.foreign == ""
    left = unpacked(Layer().add("x", b"", 0o6755, gid=2).done(), tmp_path / "2", owners=owners)
    status = (tmp_path / "2/x").stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0o755)
    assert left.foreign == "x"


# -- whatever layers say, the kernel's overlay shows what the OCI says that comes of them

PATHS = ["a", "b", "a/b", "a/c", "b/a", "a/b/c", "a/b/d"]
Step = tuple[str, str]
steps = st.lists(st.tuples(st.sampled_from(["file", "dir", "wh", "opq"]), st.sampled_from(PATHS)), max_size=8)


class Contradiction(Exception):
    """A layer that must be refused."""


def above(step: Step) -> list[str]:
    """The directories that a step implies, the nearest first."""
    kind, path = step
    found = [path] if kind == "opq" else []
    while path := os.path.dirname(path):
        found.append(path)
    return found


def removed(state: dict[str, str], path: str, *, itself: bool = True) -> None:
    for each in [each for each in state if (itself and each == path) or each.startswith(f"{path}/")]:
        del state[each]


def applied(state: dict[str, str], layer: Sequence[Step], number: int) -> dict[str, str]:
    """What shows where ``layer`` is put on what ``state`` shows: whiteouts are of that alone, whenever they come."""
    state, own = dict(state), dict[str, str]()
    for kind, path in layer:
        if kind in ("wh", "opq"):
            removed(state, path, itself=kind == "wh")
    for nth, step in enumerate(layer):
        kind, path = step
        for each in reversed(above(step)):
            if own.get(each, "dir") != "dir":
                raise Contradiction
            if state.get(each, "dir") != "dir":
                removed(state, each)
            own[each] = state[each] = "dir"
        if kind in ("file", "dir"):
            if kind == "file" or state.get(path, "dir") != "dir":
                removed(state, path)
                removed(own, path)
            own[path] = state[path] = "dir" if kind == "dir" else f"{number}.{nth}"
    return state


def tar_of(layer: Sequence[Step], number: int) -> bytes:
    tar = Layer()
    for nth, (kind, path) in enumerate(layer):
        if kind == "file":
            tar.add(path, f"{number}.{nth}".encode())
        elif kind == "dir":
            tar.add(path, None, 0o755)
        else:
            tar.add(f"{path}/.wh..wh..opq" if kind == "opq" else os.path.join(os.path.dirname(path), f".wh.{path[-1]}"))
    return tar.done()


@given(st.lists(steps, min_size=2, max_size=3))
@settings(deadline=None)
def test_what_the_kernel_shows(tars: list[list[Step]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        layers: list[str] = []
        state: dict[str, str] = {}
        for number, layer in enumerate(tars):
            top = Path(base, str(number))
            try:
                state = applied(state, layer, number)
            except Contradiction:
                with pytest.raises(Unfit):
                    unpacked(tar_of(layer, number), top, layers)
                continue
            unpacked(tar_of(layer, number), top, layers)
            layers.insert(0, str(top))
        if len(layers) > 1:
            Path(base, "shown").mkdir()
            with merged(layers, f"{base}/shown", "") as shown:
                assert kinds(Path(shown)) == state


def test_attributes_of_directories_are_not_kept_in_memory(tmp_path: Path) -> None:
    """A directory gets them at the end, and those of its last entry alone."""
    value = "v" * 3_000
    layer = Layer(tarfile.PAX_FORMAT)
    for number in range(600):
        layer.add(f"d{number}", None, pax_headers={"SCHILY.xattr.user.a": value, f"SCHILY.xattr.user.n{number}": "n"})
    layer.add("d0", None, 0o750, uid=7, pax_headers={"SCHILY.xattr.user.b": "last"}).add("d0/f", b"")
    archive = layer.done()
    top, aside = tmp_path / "top", tmp_path / "aside"
    top.mkdir()
    aside.mkdir()
    fds = [os.open(each, os.O_RDONLY) for each in (top, aside)]
    unpacking = Unpacking(*fds, lowest=True, prefix=TRUSTED, owners=Owners())
    reader = TarReader(Stream(archive[here : here + 5000] for here in range(0, len(archive), 5000)))
    tracemalloc.start()
    try:
        while (entry := reader.next()) is not None:
            unpacking.add(entry, reader)
        del entry
        assert tracemalloc.get_traced_memory()[0] < 900_000
        assert unpacking.size > 600 * 3_000, "they count"
        unpacking.finish([], lambda: None)
    finally:
        tracemalloc.stop()
        unpacking.close()
        for fd in fds:
            os.close(fd)
    assert os.listdir(aside) == []
    assert os.getxattr(top / "d599", "user.a") == value.encode()
    assert os.getxattr(top / "d599", "user.n599") == b"n"
    assert os.listxattr(top / "d0") == ["user.b"]
    status = (top / "d0").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o750, 7)


def test_paths_are_remembered_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking_of_layers, "MOST_NAMES", 20)
    below = tmp_path / "below"
    (below / "file").mkdir(parents=True)
    for number, layer in enumerate(
        (
            Layer().add("a" * 10, None).add("b" * 11, None),
            Layer().add("a/" * 8 + "f", b""),
            Layer().add(".wh.aaaaaaaaaa").add(".wh.bbbbbbbbbbb"),
            Layer().hard("x", "a" * 21),
        )
    ):
        with pytest.raises(Unfit, match="take more than 20 bytes"):
            unpacked(layer.done(), tmp_path / f"{number}", [below])
    unpacked(Layer().add("a" * 20, None).add("a" * 20, None, 0o700).add("file", b"").done(), tmp_path / "fits", [below])


def test_what_hard_links_bring_up_counts(tmp_path: Path) -> None:
    """Before it is copied."""
    below = tmp_path / "below"
    below.mkdir()
    (below / "big").write_bytes(os.urandom(100_000))
    os.setxattr(below / "big", "user.a", b"v" * 1000)
    with pytest.raises(Unfit, match="as many as --max-size allows"):
        unpacked(Layer().hard("x", "big").done(), tmp_path / "layer", [below], most=50_000)
    assert (tmp_path / "layer/x").stat().st_size == 0
    unpacked(Layer().hard("x", "big").done(), tmp_path / "fits", [below], most=101_000)
