"""What can be imported from ``snapfs`` itself: all that a caller meets, and none of it before it is asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import get_args, get_type_hints

import pytest

import snapfs
from snapfs import blocking, errors


@pytest.mark.parametrize("name", snapfs.__all__)
def test_each_name_is_there(name: str) -> None:
    assert getattr(snapfs, name) is not None
    assert name in dir(snapfs)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = snapfs.nothing


def test_all_errors_are_there() -> None:
    kinds = {name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}
    assert kinds <= set(snapfs.__all__)


def types_in(hint: object) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in [*hint] if isinstance(hint, list) else get_args(hint):
        yield from types_in(part)


CALLS = {
    f"{door.__module__}.{name}": call
    for door in (snapfs.Snapshotter, blocking.Snapshotter)
    for name, call in vars(door).items()
    if callable(call) and not name.startswith("_")
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_types_of_each_call_are_there(call: Callable[..., object]) -> None:
    found = {kind for hint in get_type_hints(call).values() for kind in types_in(hint) if kind.__module__.startswith("snapfs.")}
    assert {kind.__name__ for kind in found} <= set(snapfs.__all__)


@pytest.mark.parametrize("name", ["Labels", "Ref"])
def test_the_names_of_types_are_there(name: str) -> None:
    assert getattr(snapfs, name)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys; before = set(sys.modules); import snapfs; print(*sorted(set(sys.modules) - before))\n"
        "snapfs.NotFound; print(*sorted(name for name in sys.modules if name.startswith('snapfs')))\n"
        "snapfs.blocking; print('snapfs.blocking' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["__future__ snapfs", "snapfs snapfs.errors", "True"]
