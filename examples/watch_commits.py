#!/usr/bin/env python3
"""Say each commit as it happens: what a notifier, an uploader or an index of layers would begin with.

After `make run` has mounted a tree on /tmp/snapfs/snap, as root:

    python3 examples/watch_commits.py /tmp/snapfs/snap          # Ctrl-C ends it
    python3 examples/watch_commits.py /tmp/snapfs/snap --all    # begins with what the tree still remembers

and in another shell:

    cd /tmp/snapfs/snap && mkdir active/b && echo hello > active/b/rootfs/hello && mv active/b committed/base

which it tells as `b was committed as base (on nothing), 8192 bytes`.  Where a line of JSON will do, so does

    tail -n 0 -f /tmp/snapfs/snap/.snapfs/events | grep '"operation": "commit"'

Look at `follow`: no read of `events` ever blocks, an empty one means that this is all for now, and poll(2) sleeps until there
is more.  What is read may end within a line.  Whoever falls thousands of lines behind reads `{"missed": 12}` in their place.
"""

import argparse
import errno
import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def follow(path: Path, *, old: bool) -> Iterator[dict[str, Any]]:
    """The events, as they come; first those that are past if ``old``."""
    with path.open("rb", buffering=0) as events:
        if not old:
            events.seek(0, os.SEEK_END)
        more = select.poll()
        more.register(events, select.POLLIN)
        rest = b""
        while True:
            data = events.read(65536)
            if not data:
                more.poll()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                with suppress(ValueError):  # the stump of a line that was dropped meanwhile; the next says how many were
                    yield json.loads(line)


def size(tree: Path, number: int) -> str:
    """What the layer takes.  by-id needs no encoding of names, and stays right if the snapshot is renamed."""
    try:
        usage = json.loads((tree / "by-id" / str(number) / "usage.json").read_text())
    except FileNotFoundError:
        return "already removed"
    return f"{usage['size']} bytes"


def shown(name: str) -> str:
    """``name``, which may hold whatever else a name can, on one line, without what a terminal would obey."""
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Say each commit in a snapfs tree as it happens.")
    parser.add_argument("tree", type=Path, help="where the tree is mounted, such as /tmp/snapfs/snap")
    parser.add_argument("--all", action="store_true", help="begin with what the tree still remembers")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    try:
        for event in follow(given.tree / ".snapfs/events", old=given.all):
            if "missed" in event:
                print(f"({event['missed']} events were missed)", flush=True)
            elif event["operation"] == "commit":
                key, name, on = map(shown, (event["key"], event["name"], event["parent"] or "nothing"))
                print(f"{key} was committed as {name} (on {on}), {size(given.tree, event['id'])}", flush=True)
    except KeyboardInterrupt:
        pass
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"no snapfs tree is mounted on {given.tree}; `make run` mounts one on /tmp/snapfs/snap")
    except OSError as error:
        sys.exit(f"the daemon of {given.tree} has ended" if error.errno == errno.ENOTCONN else str(error))


if __name__ == "__main__":
    main()
