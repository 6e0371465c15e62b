"""The configuration of an image (OCI's ``config.json``): what is known of it, or the least that there must be."""

from __future__ import annotations

import datetime
import platform
import re
import time
from typing import Any, NamedTuple

ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i386": "386",
    "i686": "386",
    "loongarch64": "loong64",
}
"""Go's words, which images have, by the kernel's; others are the same."""


_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})")


class Step(NamedTuple):
    """How a layer came about: when (seconds since the epoch), and why, in words ("" for none)."""

    created: int
    why: str


def architecture() -> str:
    """This machine's, as images have it: ``amd64``."""
    machine = platform.machine()
    return ARCHITECTURES.get(machine, machine)


def configuration(known: dict[str, Any], diff_ids: list[str], steps: list[Step], latest: int | None = None) -> dict[str, Any]:
    """The configuration of an image whose layers have these ``diff_ids`` and came about by these ``steps``, the lowest first:
    what is ``known`` of it, as it is where it is known with these layers, and else with them.  No time in it is later than
    ``latest``, in seconds since the epoch."""
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    made = {"architecture": architecture(), "os": "linux", **known}
    if rootfs != known.get("rootfs"):
        created = _time(steps[-1].created) if _moment(known.get("created")) is None else known["created"]
        history = _history(known.get("history"), steps)
        made = {"config": {}, **made, "created": created, "rootfs": rootfs, "history": history}
    if isinstance(told := made.get("history"), list):
        made["history"] = [_no_later(each, latest) if isinstance(each, dict) else each for each in told]
    return _no_later(made, latest)


def _no_later(entry: dict[str, Any], latest: int | None) -> dict[str, Any]:
    """``entry`` with the time at which it was created, where that is later than ``latest``."""
    created = _moment(entry.get("created"))
    is_later = latest is not None and created is not None and created > latest
    return {**entry, "created": _time(latest or 0)} if is_later else entry


def _moment(text: Any) -> float | None:
    """The time that ``text`` says as images do (RFC 3339), in seconds since the epoch; None where it says none."""
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        return None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _history(known: Any, steps: list[Step]) -> list[dict[str, Any]]:
    """An entry for each step, besides those that made no layer: the ``known`` ones, and others for the lowest layers, where
    these came without any."""
    found = [each for each in known if isinstance(each, dict)] if isinstance(known, list) else []
    made = sum(not each.get("empty_layer") for each in found)
    if made > len(steps):
        found, made = [], 0
    return [*map(_entry, steps[: len(steps) - made]), *found]


def _entry(step: Step) -> dict[str, Any]:
    return {"created": _time(step.created), "created_by": step.why or "snapfs commit"}


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
