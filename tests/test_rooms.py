"""The rooms of the house and which way the arrows point: imports never lead back."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from snapfs.cli import VERBS
from snapfs.snapshotter import Snapshotter

PACKAGE = Path(__file__).parent.parent / "snapfs"

PURE = {"allowance", "errors", "filters", "idmap", "imagejson", "imagenames", "labels", "model", "names", "options"}
PURE |= {"mountoptions", "mountspec"}
DOORS = {"snapshotter", "opening"}
DOORWAYS = {"tree", "fuse", "containerd", "cli"}  # what is built on a Snapshotter

MAY_IMPORT = {
    **dict.fromkeys(PURE, PURE),
    "kernel": PURE | {"kernel"},
    "threads": PURE,
    "store": PURE | {"kernel", "threads", "store"},
    "scan": PURE | {"kernel", "threads", "scan"},
    "applying": PURE | {"kernel", "scan", "applying"},
    "images": PURE | {"kernel", "scan", "images"},
    "root": PURE | {"kernel", "store", "scan", "root"},
    "rules": PURE | {"kernel", "store", "scan", "root", "rules"},
    "services": PURE | {"threads", "kernel", "store", "scan", "root", "rules", "services"},
    "snapshotter": PURE | {"threads", "kernel", "store", "root", "rules", "services"},
    "opening": PURE | {"threads", "kernel", "store", "root", "rules", "services", "snapshotter"},
    "blocking": PURE | DOORS | {"store"},
    "offline": PURE | {"kernel", "store", "scan", "root", "offline"},
    "__init__": PURE | DOORS | {"store", "blocking"},
    "tree": PURE | {"threads", "store", "snapshotter", "tree"},
    "fuse": PURE | DOORS | {"threads", "kernel", "root", "tree", "fuse"},
    "containerd": PURE | {"threads", "kernel", "snapshotter", "containerd"},
    "testing": {"kernel", "scan", "testing"},
    "cli": PURE | DOORS | {"kernel", "scan", "applying", "images", "root", "offline", "fuse", "containerd", "cli"},
}

WITHOUT_TRIO = {*PURE, "kernel", "root", "rules"}

TESTS = Path(__file__).parent
TEST_MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.endswith("_pb2.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> set[str]:
    """The rooms of snapfs that ``module`` imports from, wherever in its text."""
    rooms = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            targets = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "snapfs" else [node.module]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            package, room = [*(target or "").split("."), ""][:2]
            if package == "snapfs" and ((PACKAGE / f"{room}.py").exists() or (room and (PACKAGE / room).is_dir())):
                rooms.add(room)
    return rooms


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_arrows(module: Path) -> None:
    assert imported_rooms(module) <= MAY_IMPORT[room_of(module)]


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in WITHOUT_TRIO], ids=str)
def test_no_trio_below_the_services(module: Path) -> None:
    assert "import trio" not in (PACKAGE / module).read_text()


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) != "threads"], ids=str)
def test_one_place_asks_trio_for_threads(module: Path) -> None:
    assert "to_thread.run_sync(" not in (PACKAGE / module).read_text()


PLAIN_VALUES = {"options", "overlay_options", "features"}  # of a Snapshotter; all its other attributes are its services
CALLS = {name for name in vars(Snapshotter) if not name.startswith("_")}


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in DOORWAYS], ids=str)
def test_nothing_reaches_past_the_snapshotter(module: Path) -> None:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner.strip("_") == "snapshotter":
                assert node.attr in CALLS | PLAIN_VALUES, f"{module}:{node.lineno} reaches for {owner}.{node.attr}"


def imported_modules(module: Path) -> set[Path]:
    """The modules of snapfs that ``module`` imports, for types alone too, and wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "snapfs":
            base = "/".join(str(node.module).split(".")[1:])
            for alias in node.names:
                paths = [Path(base, f"{alias.name}.py"), Path(f"{base}.py"), Path(base, "__init__.py")]
                found.add(next(path for path in paths if (PACKAGE / path).exists()))
    return found


def test_no_circle_of_modules() -> None:
    """Not even one of types.  But for the command, which starts by name what needs the table of its verbs."""
    modules = [module for module in MODULES if room_of(module) != "cli"]
    TopologicalSorter({module: imported_modules(module) for module in modules}).prepare()  # raises CycleError


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_fuse_knows_pyfuse3(module: Path) -> None:
    text = (PACKAGE / module).read_text()
    assert ("import pyfuse3" in text) <= (room_of(module) == "fuse")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_containerd_knows_grpcs_messages(module: Path) -> None:
    text = (PACKAGE / module).read_text()
    assert ("import hpack" in text or "google.protobuf" in text) <= (room_of(module) == "containerd")
    assert "import grpc" not in text, "its threads would stand between a call and the loop"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_one_subject_a_file(module: Path) -> None:
    assert module.stem not in ("utils", "util", "common", "helpers", "misc")
    assert ast.get_docstring(ast.parse((PACKAGE / module).read_text())), "a module says what it is for"


@pytest.mark.parametrize("module", TEST_MODULES, ids=str)
def test_no_module_imports_tests(module: Path) -> None:
    """What test modules share has a room of its own; this reads the text, for some of them is a program in a string."""
    text = (TESTS / module).read_text()
    assert re.findall(r"^.*\b(?:from|import) tests(?:\.| import )(?:test_|conftest).*$", text, re.MULTILINE) == []


@pytest.mark.parametrize("module", [module for module in TEST_MODULES if not module.name.startswith(("test_", "__"))], ids=str)
def test_one_subject_a_room_of_tests(module: Path) -> None:
    assert module.stem not in ("utils", "util", "common", "helpers", "misc")
    assert ast.get_docstring(ast.parse((TESTS / module).read_text())), "a module says what it is for"


def test_every_module_is_on_the_map() -> None:
    """snapfs/README.md names each module in the part about its package, and none that there is not."""
    text = (PACKAGE / "README.md").read_text().replace("`tests/test_rooms.py`", "")
    there = {(module.parent.name, module.name) for module in MODULES}
    named = set(re.findall(r"`(\w+)/(\w+\.py)`", text))
    rooms = text.partition("## The rooms")[2].partition("## Four walks")[0]
    package = ""
    for line in rooms.splitlines():
        package = begun[1] if (begun := re.match(r"`(\w+)/`, ", line)) else "" if line.startswith("The doors") else package
        named |= {(package, name) for name in re.findall(r"`(\w+\.py)`", line)}
    assert named <= there
    left = {(room, name) for room, name in there - named if name not in ("__init__.py", "__main__.py")}
    assert left <= {("cli", f"{module}.py") for module, _ in VERBS.values()}, "a verb is a file of its name; all else is named"
