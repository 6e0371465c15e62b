"""Identity: a root has a word of its own, at random, in the records and on ROOT/snapshots, so that records of another root that
were put in their place, by an old backup of the wrong one, say, are known as such: they would have layers go by wrong names.

Whoever has only one of the two, as a root of a version that knew no such word has none, is taken as it is, and gets the other.
"""

from __future__ import annotations

import secrets
from contextlib import suppress

from snapfs.errors import Damaged, Unavailable
from snapfs.names import word
from snapfs.root import imprint
from snapfs.root.layers import Layers
from snapfs.store.metastore import MetaStore


def refuse_foreign(layers: Layers, records: MetaStore) -> None:
    """Raise Damaged where the records are known to be another root's."""
    refuse_other(layers.root, records.path, imprint.read_root_word(_snapshots(layers)), _recorded(records))


def refuse_other(root: str, path: str, noted: str, recorded: str) -> None:
    """Raise Damaged where ROOT/snapshots of ``root`` has the word ``noted``, and the records in ``path`` another: ``recorded``;
    "" for none."""
    if noted and recorded and noted != recorded:
        raise Damaged(
            f"{path} holds the records of another root: put back those that belong to {root}, or have them made anew: snapfs "
            f"check {word(root)} --rebuild"
        )


def note(layers: Layers, records: MetaStore) -> None:
    """Have both say the word, as far as the disk lets: the next start tries again.  Blocks; nobody else may write records."""
    noted, recorded = imprint.read_root_word(_snapshots(layers)), _recorded(records)
    own = noted or recorded or secrets.token_hex(16)
    with suppress(Unavailable, OSError):
        if not recorded:
            records.write_now(lambda writer: writer.put_root_word(own))
        if not noted:
            imprint.write_root_word(_snapshots(layers), own)


def _snapshots(layers: Layers) -> str:
    return f"{layers.held}/snapshots"


def _recorded(records: MetaStore) -> str:
    with records.reading() as reader:
        return reader.root_word()
