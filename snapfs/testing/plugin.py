"""The plugin for pytest: options, the line that says how copies are made, and the fixtures.

It is loaded for everybody who has snapfs installed: until a test asks for one of the fixtures, or a conftest.py mentions them,
nothing is done, and nothing else of snapfs is imported.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from snapfs.testing.bases import Source
    from snapfs.testing.making import Copy
    from snapfs.testing.session import Session

    SnapshotOf = Callable[..., Path]

_FIXTURES = {"snapshot_of", "fresh_copy", "class_fresh_copy", "module_fresh_copy", "session_fresh_copy"}
_MENTIONED = re.compile(r"\b(snapfs\.testing|snapshot_of|\w*fresh_copy)\b")

_SEARCHED = 5000  # modules of tests that are searched for these, at most

_SHOWN = 100  # lines of changes in a report

_KEPT = "snapfs: a copy is kept"

_session = pytest.StashKey["Session"]()
_told_at_start = pytest.StashKey[bool]()
_run = pytest.StashKey[str]()  # of a controller of xdist: the name that its workers' run has
_of_workers = pytest.StashKey[set[str]]()  # how those made copies, where each had to find out by itself
_live = pytest.StashKey["list[FreshCopy]"]()
_to_keep = pytest.StashKey["list[str]"]()  # where the copies of a test go, when it has ended
_has_failed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("snapfs", "copies of prepared directories")
    ini = "; also an ini option"
    group.addoption(
        "--snapfs",
        choices=("auto", "overlay", "reflink", "copy"),
        help="how copies are made, at best: overlay (from the start), reflink, copy; auto: overlay, if a test wants copies"
        + ini,
    )
    group.addoption(
        "--snapfs-cache",
        metavar="DIR",
        help="keep bases in DIR, relative to where pytest is started, from one run to the next (ini: snapfs_cache, relative to "
        "rootdir)",
    )
    group.addoption("--snapfs-cache-size", metavar="SIZE", help="how much may be there, as 500M (5G) (ini: snapfs_cache_size)")
    group.addoption(
        "--snapfs-keep",
        choices=("no", "failed", "all"),
        help="keep the copies of tests that failed, or of all, beside tmp_path's (ini: snapfs_keep)",
    )
    parser.addini("snapfs", "how copies are made: auto, overlay, reflink, copy", default="auto")
    parser.addini("snapfs_cache", "the directory, relative to rootdir, that keeps bases from one run to the next", default="")
    parser.addini("snapfs_cache_size", "how much may be in snapfs_cache", default="5G")
    parser.addini("snapfs_keep", "which copies are kept: no, failed, all", default="no")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Who says ``overlay`` has it before a conftest.py starts threads."""
    if _asked(early_config) == "overlay" and "PYTEST_XDIST_WORKER" not in os.environ and _runs_tests(early_config):
        _decide(early_config)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_live] = []
    config.stash[_of_workers] = set[str]()
    if _is_worker(config) or not _runs_tests(config) or not (_asked(config) != "auto" or _is_mentioned(config)):
        return
    _decide(config)
    config.stash[_told_at_start] = True
    if _is_controller(config):
        from snapfs.testing import capabilities, entering

        if entering.is_user_namespace():
            capabilities.hand_on()


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"snapfs: {config.stash[_session].told()}"] if config.stash.get(_told_at_start, False) else []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """A namespace is entered before any test runs, and not at all if none wants copies."""
    if _runs_tests(session.config) and any(
        not _FIXTURES.isdisjoint(getattr(item, "fixturenames", ())) for item in session.items
    ):
        _decide(session.config)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    session = config.stash.get(_session, None)
    if session is None or session.how is None or config.stash.get(_told_at_start, False) or config.get_verbosity() < 0:
        return []
    return [f"snapfs: {session.told()}"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    of_workers: set[str] = config.stash[_of_workers]
    for told in sorted(of_workers):
        terminalreporter.write_line(f"snapfs: {told}")
    sections = [section for report in terminalreporter.getreports("passed") for section in report.sections]
    kept = [title.removeprefix(f"{_KEPT}: ") for title, _ in sections if title.startswith(_KEPT)]
    if kept:
        terminalreporter.write_sep("=", "snapfs: copies of tests that passed")
        for path in dict.fromkeys(kept):
            terminalreporter.write_line(path)


def pytest_unconfigure(config: pytest.Config) -> None:
    if session := config.stash.get(_session, None):
        session.close()
    if run := config.stash.get(_run, ""):
        from snapfs.testing import place

        place.remove(place.path_of_run(run))


# -- xdist: one run in several processes


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What a worker has to know."""
    config = node.config
    told: dict[str, object] = {"run": _run_of(config), "cache": _cache_of(config)}
    session = config.stash.get(_session, None)
    if session is not None and session.how is not None:
        told |= {"how": session.how, "why": session.why, "namespace": os.stat("/proc/self/ns/mnt").st_ino}
    node.workerinput["snapfs"] = told


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if told := getattr(node, "workeroutput", {}).get("snapfs"):
        node.config.stash[_of_workers].add(told)


def pytest_sessionfinish(session: pytest.Session) -> None:
    made = session.config.stash.get(_session, None)
    if _is_worker(session.config) and made is not None and made.used and "how" not in _input(session.config):
        session.config.workeroutput["snapfs"] = made.told()  # type: ignore[attr-defined]


# -- the fixtures


class FreshCopy:
    """``fresh_copy(base)``: a directory that begins as the base, or as what a directory or a function makes, and is thrown away
    at the end of the fixture's scope.  No process may have a file open in it by then."""

    def __init__(self, session: Session, name: str, node: pytest.Item | pytest.Collector) -> None:
        self.name = name
        self.node = node
        self.made: list[Copy] = []
        self._session = session

    def __call__(self, base: Source) -> Path:
        self.made.append(self._session.copy_of(base))
        return self.made[-1].path

    def reset(self, copy: Path | None = None) -> None:
        """Let ``copy``, or all copies of this fixture, begin anew, each at the path that it has."""
        from snapfs.testing.making import InUse

        for made in self.made:
            if copy is None or copy == made.path:
                try:
                    made.reset()
                except InUse as error:
                    pytest.fail(str(error.strerror), pytrace=False)

    def changes(self, copy: Path) -> list[str]:
        """What was changed in ``copy`` so far: ``A /added``, ``C /changed``, ``D /deleted``."""
        return [line.rstrip("\n") for made in self.made if made.path == copy for line in made.changes()]

    def remove(self, *, quietly: bool) -> None:
        """Remove all copies; fails the test if one is in use, but not ``quietly``."""
        from snapfs.testing.making import InUse

        used = []
        for made in reversed(self.made):
            try:
                made.remove(quietly=quietly)
            except InUse as error:
                used.append(str(error.strerror))
        if used:
            pytest.fail("\n".join(used), pytrace=False)


@pytest.fixture(scope="session")
def snapshot_of(pytestconfig: pytest.Config) -> SnapshotOf:
    """``snapshot_of(source)``: a directory, to be read only, with what the directory ``source`` holds, or with what ``source``,
    a function, puts into the directory that it is given.  Each is made once a run, whatever the number of xdist's workers; with
    --snapfs-cache once, until the function's source, or one of the files in ``depends=[…]``, has changed."""
    session = _session_of(pytestconfig)

    def snapshot_of(source: Source, *, depends: Iterable[str | os.PathLike[str]] = ()) -> Path:
        return session.snapshot_of(source, depends)

    return snapshot_of


@pytest.fixture
def fresh_copy(request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    """``fresh_copy(base)``: a directory that begins as ``base``, to be written to at will, and is thrown away after the test;
    ``fresh_copy.reset()`` lets all that were made begin anew.  No process may have a file open in it by then."""
    yield from _fresh_copies(request)


@pytest.fixture(scope="class")
def class_fresh_copy(request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    """As ``fresh_copy``; thrown away after the last test of the class."""
    yield from _fresh_copies(request)


@pytest.fixture(scope="module")
def module_fresh_copy(request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    """As ``fresh_copy``; thrown away after the last test of the module."""
    yield from _fresh_copies(request)


@pytest.fixture(scope="session")
def session_fresh_copy(request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    """As ``fresh_copy``; thrown away at the end of the run (with xdist: of the worker)."""
    yield from _fresh_copies(request)


def _fresh_copies(request: pytest.FixtureRequest) -> Iterator[FreshCopy]:
    config, node = request.config, request.node
    made = FreshCopy(_session_of(config), str(request.fixturename), node)
    config.stash[_live].append(made)
    yield made
    config.stash[_live].remove(made)
    cut_short = request.session.exitstatus == pytest.ExitCode.INTERRUPTED
    try:
        for copy, path in zip(made.made, node.stash.get(_to_keep, ()), strict=False):
            copy.keep(path)
    finally:
        made.remove(quietly=cut_short or node.stash.get(_has_failed, False))  # and it has open whatever it has


# -- copies that are kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[object]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if call.when == "teardown" or not (live := item.config.stash.get(_live, [])):
        return
    if report.failed:
        item.stash[_has_failed] = True
    keep = item.config.getoption("snapfs_keep") or item.config.getini("snapfs_keep")
    if not (keep == "all" and call.when == "call") and not (keep in ("all", "failed") and report.failed):
        return
    used = [made for made in live if made.node in item.listchain() and made.name in _fixtures(item)]
    for made in used:
        paths = []
        for copy in made.made:
            path = str(item.config._tmp_path_factory.mktemp(_file_name(item.name)) / "copy")  # type: ignore[attr-defined]
            paths.append(path)
            try:
                if made.node is not item:  # the next test goes on with it
                    copy.keep(path)
                report.sections.append((f"{_KEPT}: {path}", _shortened(copy.changes())))
            except OSError as error:  # whoever else may write in there can cause it
                report.sections.append((f"snapfs: a copy can't be kept: {path}", f"{error}\n"))
        if made.node is item:
            item.stash[_to_keep] = paths


def _shortened(lines: Iterator[str]) -> str:
    shown = "".join(itertools.islice(lines, _SHOWN))
    more = sum(1 for _ in lines)
    return shown + (f"and {more} lines more\n" if more else "") if shown else "it is as it was\n"


def _wants_copies(item: pytest.Item) -> bool:
    return not _FIXTURES.isdisjoint(_fixtures(item))


def _fixtures(item: pytest.Item) -> list[str]:
    """The names of the fixtures that ``item`` has, directly or by others."""
    return getattr(item, "fixturenames", [])


def _file_name(name: str) -> str:
    return re.sub(r"\W", "_", name)[:30]


# -- what this run is


def _asked(config: pytest.Config) -> str:
    given = config.known_args_namespace.snapfs or config.getini("snapfs")
    if given not in ("auto", "overlay", "reflink", "copy"):
        raise pytest.UsageError(f"snapfs = {given}: it is one of auto, overlay, reflink, copy")
    return str(given)


def _runs_tests(config: pytest.Config) -> bool:
    options = config.known_args_namespace
    return not any(getattr(options, name, False) for name in ("help", "version", "collectonly", "showfixtures", "markers"))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _is_controller(config: pytest.Config) -> bool:
    return not _is_worker(config) and getattr(config.option, "dist", "no") != "no"


def _is_mentioned(config: pytest.Config) -> bool:
    """Whether one of the conftest.py that pytest starts with has the name of the plugin, or of a fixture; for xdist, whose
    workers have threads before they collect anything, also whether a module of tests has."""
    files = [getattr(plugin, "__file__", None) or "" for plugin in config.pluginmanager.get_plugins()]
    found: Iterable[str] = [file for file in files if os.path.basename(file) == "conftest.py"]
    if _is_controller(config):
        found = itertools.chain(found, itertools.islice(_test_modules(config), _SEARCHED))
    for file in found:
        with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="replace", opener=_at_once) as text:
            if os.path.isfile(file) and _MENTIONED.search(text.read()):
                return True
    return False


def _at_once(file: str, flags: int) -> int:
    """Open it without waiting for the other end of a pipe."""
    return os.open(file, flags | os.O_NONBLOCK)


def _test_modules(config: pytest.Config) -> Iterator[str]:
    """The files that pytest is going to collect tests from, or more."""
    patterns, left_out = config.getini("python_files"), config.getini("norecursedirs")
    for argument in config.args:
        path = os.path.join(config.invocation_params.dir, argument.partition("::")[0])
        if os.path.isfile(path):
            yield path
        for directory, below, names in os.walk(path):
            below[:] = [name for name in below if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)]
            for name in names:
                if name == "conftest.py" or (name.endswith(".py") and any(fnmatch.fnmatch(name, each) for each in patterns)):
                    yield os.path.join(directory, name)


def _run_of(config: pytest.Config) -> str:
    from snapfs.testing import place

    return config.stash.setdefault(_run, place.new_name())


def _input(config: pytest.Config) -> dict[str, Any]:
    told: dict[str, Any] = getattr(config, "workerinput", {}).get("snapfs", {})
    return told


def _cache_of(config: pytest.Config) -> str | None:
    """The directory of the cache: as pytest's own options are, relative to where it was started, and as its ini options are,
    to rootdir."""
    if given := config.getoption("snapfs_cache"):
        return os.path.join(config.invocation_params.dir, os.path.expanduser(given))
    given = config.getini("snapfs_cache")
    return os.path.join(config.rootpath, os.path.expanduser(given)) if given else None


def _session_of(config: pytest.Config) -> Session:
    """What this process has of the run, made when it is asked for first."""
    if _session in config.stash:
        return config.stash[_session]
    from snapfs.testing import entering
    from snapfs.testing.session import Session

    told = _input(config)
    run = told.get("run", "") if _is_worker(config) else _run_of(config) if _is_controller(config) else ""
    size = config.getoption("snapfs_cache_size") or config.getini("snapfs_cache_size")
    session = config.stash[_session] = Session(
        _asked(config),  # type: ignore[arg-type]
        run=run,
        cache=told["cache"] if _is_worker(config) and "cache" in told else _cache_of(config),
        limit=_bytes(size),
    )
    if "how" in told and entering.join(told["namespace"]):
        session.how, session.why = told["how"], told["why"]
    return session


def _decide(config: pytest.Config) -> None:
    """Find out how copies are made in this process."""
    try:
        _session_of(config).decide()
    except PermissionError as error:
        raise pytest.UsageError(str(error)) from None


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", size.strip())
    if not found:
        raise pytest.UsageError(f"snapfs_cache_size is {size!r}: give it as 500M or 5G")
    return int(found[1]) << 10 * " KMGT".index(found[2] or " ")
