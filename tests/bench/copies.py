"""What tests get from snapfs.testing: a copy made and removed, beside copytree, cp and, for PostgreSQL, template databases."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from snapfs.testing.making import Copy
from snapfs.testing.session import Session, Wish
from tests.bench.files import make_files
from tests.bench.place import Place, run, settle, timed
from tests.bench.rows import Row, Target, at_most, in_turns
from tests.mounts import loop_mounted

RECIPES = Path(__file__).parents[2] / "examples/pytest"

Use = Callable[[Path], object]


def copies(place: Place) -> Iterator[Row]:
    """A copy of each recipe's base, and of one big file."""
    files = place.size(100_000, 2_000)
    size = place.size(1 << 30, 8 << 20)
    with _session(place.base) as session:

        def beside(what: str, fill: Use, target: Target | None = None, use: Use = lambda copy: None) -> Iterator[Row]:
            return _beside(place, session, what, fill, target, use)

        yield from beside("10 files", lambda base: make_files(base, 10, 1000), at_most(3, absolute=True))
        yield from beside("SQLite, two databases", _recipe("shop").fill, use=_write("shop.db"))
        yield from beside("a git repository of 50 commits", _recipe("git").fill)
        yield from beside(f"{files:,} files", lambda base: make_files(base, files, 20), at_most(0.01))
        yield from beside(_of(size), lambda base: _big(base, size), use=_write("big"))
    with reflinks(place, 3 * size + (1 << 29)) as disk, _session(disk) as session:
        what = f"{_of(size)}, on a disk with reflinks"
        yield from _beside(place, session, what, lambda base: _big(base, size), None, _write("big"))
    yield from _postgresql(place)


def _of(size: int) -> str:
    return f"one file of {size >> 20:,} MiB, of which one byte is written"


def _big(directory: Path, size: int) -> None:
    with (directory / "big").open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def _write(name: str) -> Use:
    def write(copy: Path) -> None:
        with (copy / name).open("r+b") as file:
            file.write(b"S")

    return write


def _recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"test_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for inspect to find its source
    spec.loader.exec_module(module)
    return module


@contextmanager
def _session(directory: Path, wish: Wish = "auto") -> Iterator[Session]:
    """Copies in ``directory``; this process is in a mount namespace of its own already."""
    before, tempfile.tempdir = tempfile.tempdir, str(directory)
    session = Session(wish)
    try:
        session.decide()
        yield session
    finally:
        session.close()
        tempfile.tempdir = before


@contextmanager
def reflinks(place: Place, size: int) -> Iterator[Path]:
    """A disk with reflinks: xfs on a loop device."""
    with place.directory("disk") as directory:
        image = directory / "image"
        image.touch()
        os.truncate(image, max(size, 512 << 20))
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
        with loop_mounted(image, directory / "mounted") as disk:
            yield disk


def _beside(place: Place, session: Session, what: str, fill: Use, target: Target | None, use: Use) -> Iterator[Row]:
    """A copy made, used and removed, beside shutil and cp.  Bigger ones are flushed before, not meanwhile."""
    base = session.snapshot_of(fill)
    settle(base)
    there = base.parents[2] / "theirs"

    def ours() -> float:
        made: list[Copy] = []

        def act() -> None:
            made.append(session.copy_of(base))
            use(made[0].path)
            made[0].remove()

        return timed(act) * 1e3

    def by_copytree() -> float:
        def act() -> None:
            shutil.copytree(base, there, symlinks=True)
            use(there)
            shutil.rmtree(there)

        return timed(act) * 1e3

    def by_cp() -> float:
        seconds = run("cp", "-a", "--reflink=auto", base, there)
        return (seconds + timed(lambda: use(there)) + run("rm", "-rf", there)) * 1e3

    for name, theirs in (("copytree and rmtree", by_copytree), ("cp -a --reflink=auto and rm -rf", by_cp)):
        note = "a copy made, used and removed, in one process; cp and rm are processes; as root; not pinned"
        row = Row(f"a test's copy of {what}", name, "ms", target, note)
        yield in_turns(place.rounds, row, ours, theirs)


def _postgresql(place: Place) -> Iterator[Row]:
    recipe = _recipe("postgres")
    row = Row(
        "a PostgreSQL for a test: a copy, a server, a query, all of it removed",
        "CREATE DATABASE … TEMPLATE in one server, a query, DROP DATABASE",
        "ms",
        None,
        "fsync off; one psql on either side; not pinned",
    )
    if not recipe.PROGRAMS:
        row.missing = "PostgreSQL is not installed"
        yield row
        return
    with ExitStack() as stack:
        directory = place.base
        if len(str(directory)) > 36 or not all(path.stat().st_mode & 0o001 for path in (directory, *directory.parents)):
            # for its sockets the path has to be short, and the user postgres has to get there
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="b-", dir="/tmp")))
            directory.chmod(0o755)
        session = stack.enter_context(_session(directory))
        base = session.snapshot_of(recipe.fill)
        one = session.copy_of(base)
        server = recipe.Server(one.path)

        def ours() -> float:
            def act() -> None:
                copy = session.copy_of(base)
                own = recipe.Server(copy.path)
                own.sql("SELECT count(*) FROM purchase")
                own.stop(signal.SIGQUIT)
                copy.remove()

            return timed(act) * 1e3

        def theirs() -> float:
            def act() -> None:
                words = [f"{recipe.PROGRAMS}/psql", "-h", str(one.path), "-U", "postgres", "-Xq", "-v", "ON_ERROR_STOP=1"]
                within = ["-c", r"\c test", "-c", "SELECT count(*) FROM purchase", "-c", r"\c postgres"]
                run(*words, "-c", "CREATE DATABASE test TEMPLATE shop", *within, "-c", "DROP DATABASE test")

            return timed(act) * 1e3

        try:
            yield in_turns(place.rounds, row, ours, theirs)
        finally:
            server.stop(signal.SIGQUIT)
            one.remove(quietly=True)
