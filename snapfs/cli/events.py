"""``snapfs events``: the lines of .snapfs/events."""

from __future__ import annotations

import errno
import json
import os
import select

from snapfs.cli import table
from snapfs.cli.grammar import JSON, Given, Option, Verb
from snapfs.cli.place import find_tree
from snapfs.cli.refusal import refusal


def _events(given: Given) -> int:
    place = find_tree(given.value("at"))
    try:
        with open(place.within.open(f"{place.path}/.snapfs/events", os.O_RDONLY), "rb", buffering=0) as events:
            if given.has("new"):
                events.seek(0, os.SEEK_END)
            more = select.poll()
            more.register(events, select.POLLIN)
            rest = b""
            while True:
                data = events.read(1 << 16)
                if not data:
                    if not given.has("follow") and not given.has("new"):
                        return 0
                    more.poll()
                *lines, rest = (rest + (data or b"")).split(b"\n")
                for line in lines:
                    print(line.decode() if given.has("json") else _said(line), flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, None):
            raise
        raise refusal(error, place.path, "cannot read the events") from None


def _said(line: bytes) -> str:
    try:
        event = json.loads(line)
    except ValueError:  # the stump of a line that was dropped meanwhile
        return ""
    if "missed" in event:
        return f"({event['missed']} events are not kept any more)"
    new = f" -> {event['name']}" if event["name"] else ""
    on = f" on {event['parent']}" if event["parent"] else ""
    return table.printable(f"{event['time'][:23]}Z {event['operation']:<8} {event['key']}{new}{on}")


VERBS = {
    "events": Verb(
        "events",
        "",
        (Option("follow", "go on with what comes, until Ctrl-C", short="-f"), Option("new", "only what comes"), JSON),
        "Show what happened to the snapshots since the daemon started, as far as it is kept.",
        """
snapfs events
snapfs events --new
snapfs events -f --json | jq -c 'select(.operation == "commit")'
""",
        _events,
    )
}
