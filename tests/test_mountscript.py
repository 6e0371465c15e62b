"""mount.sh as shells run it, with the mount programs that there are, on real layers: any number of them, below any path."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from snapfs.kernel import mounting
from snapfs.kernel.mounttable import mount_table
from snapfs.model import Kind
from snapfs.mountoptions import PAGE, escape
from snapfs.mountspec import mounts, script

pytestmark = pytest.mark.mounts

SHELLS = ["dash", "bash", "busybox sh"]
PROGRAMS = ["the machine's", "busybox"]
NAMES = [
    "plain",
    'q"q',
    'q"',
    "a,b:c",
    "back\\slash",
    "\\:\\,",
    "new\nline",
    " b l a n k ",
    "#",
    "$x`y`'",
    "ü",
    "a:b,c\\d \"e' f\n#",
]

FIRST = 1_000_001  # an id of seven digits: 500 layers of such have no room in a page, however they are written


class Layers:
    """ROOT/snapshots with some layers, each with a file of the number of its own, and an active snapshot."""

    def __init__(self, snapshots: Path) -> None:
        self.snapshots = snapshots
        self.upper = snapshots / "999/fs"
        for path in (self.upper, snapshots / "999/work"):
            path.mkdir(parents=True)

    def script(self, numbers: Sequence[int], kind: Kind = Kind.ACTIVE) -> str:
        """mount.sh on the layers ``numbers``, the nearest first."""
        for number in numbers:
            layer = self.snapshots / f"{number}/fs"
            if not layer.exists():
                layer.mkdir(parents=True)
                (layer / f"file{number}").touch()
        spec = mounts(
            kind, f"{self.snapshots}/999", [f"{self.snapshots}/{number}" for number in numbers], options=["index=off"]
        )
        return script(spec, str(self.snapshots), 999)


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Layers:
    return Layers(tmp_path_factory.mktemp("layers") / NAMES[-1] / "snapshots")


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A $PATH on which mount and umount are of this kind."""
    if request.param == "busybox":
        (tmp_path / "bin").mkdir()
        for name in ("mount", "umount"):
            (tmp_path / "bin" / name).symlink_to(shutil.which("busybox") or "busybox")
    return f"{tmp_path}/bin:{os.environ['PATH']}"


def run(text: str, shell: str, path: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The script, mounting on ``tmp_path/target``; its temporary files are in ``tmp_path/tmp``, and gone in the end."""
    (tmp_path / "mount.sh").write_text(text)
    for name in ("target", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    environment = {"PATH": path, "TMPDIR": str(tmp_path / "tmp")}
    words = [*shell.split(), str(tmp_path / "mount.sh"), "target"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert os.listdir(tmp_path / "tmp") == []
    return done


def mounted(layers: Layers, numbers: Sequence[int], kind: Kind, shell: str, path: str, tmp_path: Path) -> None:
    """The script mounts these layers and no others; an active one on its upper directory, which the mount table names."""
    target = tmp_path / "target"
    try:
        done = run(layers.script(numbers, kind), shell, path, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert {each.name for each in target.iterdir()} == {f"file{number}" for number in numbers}
        (mount,) = (each for each in mount_table() if each.target == str(target))
        assert ("rw" in mount.options) or kind is Kind.VIEW
        if kind is Kind.ACTIVE:
            (target / f"file{numbers[-1]}").unlink()
            assert os.listdir(layers.upper) == [f"file{numbers[-1]}"]
            (layers.upper / f"file{numbers[-1]}").unlink()
            assert {f"upperdir={layers.upper}", f"upperdir={escape(str(layers.upper))}"} & shown(mount.super_options)
    finally:
        while any(each.target == str(target) for each in mount_table()):
            mounting.unmount(str(target), mounting.MNT_DETACH)


def shown(options: Sequence[str]) -> set[str]:
    """The mount table's options, whose commas in a value are not told from those between two."""
    joined = ",".join(options)
    return {joined[joined.index("upperdir=") : joined.index(",workdir=")]}


@pytest.mark.parametrize("kind", [Kind.ACTIVE, Kind.VIEW])
@pytest.mark.parametrize("count", [2, 12, 128, 400, 500])
@pytest.mark.parametrize("shell", SHELLS)
def test_any_number_of_layers(layers: Layers, program: str, shell: str, count: int, kind: Kind, tmp_path: Path) -> None:
    mounted(layers, range(count, 0, -1), kind, shell, program, tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_as_many_layers_as_the_kernel_takes_with_ids_of_seven_digits(
    layers: Layers, program: str, shell: str, tmp_path: Path
) -> None:
    numbers = range(FIRST + 499, FIRST - 1, -1)
    assert len(":".join(f"{number}/fs" for number in numbers)) > PAGE
    mounted(layers, numbers, Kind.ACTIVE, shell, program, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 12])
def test_any_path(program: str, name: str, count: int, tmp_path: Path) -> None:
    mounted(Layers(tmp_path / name / "snapshots"), range(count, 0, -1), Kind.ACTIVE, "sh", program, tmp_path)


@pytest.mark.parametrize("first", [1, FIRST])
def test_what_fails_says_so_and_leaves_nothing(layers: Layers, first: int, program: str, tmp_path: Path) -> None:
    text = layers.script(range(first + 499, first - 1, -1))
    shutil.rmtree(layers.snapshots / f"{first}")
    for shell in SHELLS:
        done = run(text, shell, program, tmp_path)
        assert done.returncode != 0
        assert "target" in done.stderr
    assert not [each for each in mount_table() if each.target == str(tmp_path / "target")]


def test_paths_that_no_way_has_room_for_are_left_to_snapfs(tmp_path: Path) -> None:
    directory = f"/{'d' * 250}" * 12 + "/snapshots"
    text = script(mounts(Kind.ACTIVE, f"{directory}/9", [f"{directory}/{n}" for n in range(400)]), directory, 9)
    done = run(text, "sh", os.environ["PATH"], tmp_path)
    assert done.returncode == 1
    assert "snapfs mount takes them" in done.stderr


def test_what_is_mounted_in_a_bind_does_not_come_to_be_in_root(program: str, tmp_path: Path) -> None:
    """Where everything is mounted shared, as systemd has it."""
    snapshots = tmp_path / "snapshots"
    (snapshots / "7/fs/d").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "mount.sh").write_text(script(mounts(Kind.ACTIVE, f"{snapshots}/7", []), str(snapshots), 7))
    steps = "mount --make-rshared / && sh mount.sh target && mount -t tmpfs theirs target/d && grep '^theirs ' /proc/mounts"
    words = ["unshare", "-m", "sh", "-c", steps]
    environment = {"PATH": program}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, [line.split()[1] for line in done.stdout.splitlines()]) == ("", [f"{tmp_path}/target/d"])
