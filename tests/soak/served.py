"""``snapfs`` as it is, in a process that can be looked into: on SIGUSR1 it writes a line of JSON, how many objects of which
type there are, to the file named first; on SIGUSR2 all its stacks to standard error."""

from __future__ import annotations

import faulthandler
import gc
import json
import signal
import sys
from collections import Counter

from snapfs.cli import main

if __name__ == "__main__":
    told = open(sys.argv[1], "a")  # noqa: SIM115

    def tell(*_: object) -> None:
        found = Counter(f"{type(its).__module__}.{type(its).__qualname__}" for its in gc.get_objects())
        print(json.dumps(dict(found.most_common(200))), file=told, flush=True)

    signal.signal(signal.SIGUSR1, tell)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    sys.exit(main(sys.argv[2:]))
