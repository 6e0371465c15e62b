"""``snapfs backup ROOT FILE``: a copy of a root's records, while a daemon serves it or not."""

from __future__ import annotations

from snapfs.cli.grammar import Given, Verb
from snapfs.cli.place import given_root


def _backup(given: Given) -> int:
    from snapfs.offline.backup import backup

    root, file = given_root(given.arguments[0]), given.arguments[1]
    made = backup(root, file)
    snapshots = f"{made.snapshots} snapshot" + "s" * (made.snapshots != 1)
    print(f"snapfs: wrote the records of {snapshots} to {file}, {made.size} bytes; the layers are not in it")
    return 0


VERBS = {
    "backup": Verb(
        "backup",
        "ROOT FILE",
        (),
        "Write a copy of ROOT's records to FILE: names, kinds, parents, labels and usage of all snapshots, as of one\n"
        "moment, while a daemon serves ROOT or while none does.  The layers, ROOT/snapshots, are not in it.\n"
        "FILE must not exist, nor lie in ROOT; it appears when it is whole.\n\n"
        "To restore: stop the daemon, put FILE in place of ROOT/metadata.mdb.\n"
        "snapfs check ROOT then says what differs: snapshots made since the backup have layers that no record names,\n"
        "and those removed since have records without layers.",
        """
snapfs backup /srv/snapfs /backup/snapfs-records
""",
        _backup,
        at=False,
    )
}
