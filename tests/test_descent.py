"""What snapshots have of those that they stand on: found by few looks at the records, and never as it was before."""

from __future__ import annotations

import hashlib
from random import Random

import msgspec
import pytest

from snapfs import MetaStore
from snapfs.model import Change, Kind
from snapfs.rules.digest import shown
from snapfs.services import descent
from snapfs.services.descent import Descent
from snapfs.store.reading import Reader
from snapfs.store.schema import ImageFile, Record
from snapfs.store.writing import Writer
from tests.records import record


class Looks:
    """How often a parent was looked up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        parent_of = Reader.parent_of

        def counted(reader: Reader, child: Record) -> Record:
            self.count += 1
            return parent_of(reader, child)

        monkeypatch.setattr(Reader, "parent_of", counted)


async def put(store: MetaStore, remembered: Descent, number: int, new: Record) -> None:
    def operation(writer: Writer) -> Change:
        before = writer.record(number)
        was = writer.info(number, before) if before is not None else None
        writer.put(number, new)
        return Change(was, writer.info(number, new))

    remembered.note(await store.write(operation))


def of_layer(dice: Random, number: int, parent: int) -> Record:
    digest = hashlib.sha256(str(dice.random()).encode()).digest()
    return msgspec.structs.replace(
        record(f"s{number}", Kind.COMMITTED, parent),
        diff_id=digest if dice.random() < 0.9 else b"",
        image=ImageFile("0" * 64) if dice.random() < 0.1 else None,
    )


def chain_id_of(reader: Reader, found: Record) -> str | None:
    """As the OCI has it, from the lowest layer on."""
    chain = [found]
    while chain[-1].parent:
        chain.append(reader.parent_of(chain[-1]))
    if not all(each.diff_id for each in chain):
        return None
    words = shown(chain.pop().diff_id)
    while chain:
        words = shown(hashlib.sha256(f"{words} {shown(chain.pop().diff_id)}".encode()).digest())
    return words


@pytest.mark.parametrize("seed", range(5))
async def test_it_is_as_the_records_are(store: MetaStore, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(descent, "REMEMBERED", 7)
    dice, remembered = Random(seed), Descent()
    last = 0
    for _ in range(150):
        if last < 12 or dice.random() < 0.3:
            last += 1
            number = last
        else:
            number = dice.randint(1, last)
        await put(store, remembered, number, of_layer(dice, number, dice.randrange(number)))
        with store.reading() as reader:
            for _ in range(4):
                number = dice.randint(1, last)
                found = reader.record(number)
                assert found is not None
                assert remembered.chain_id(reader, number, found) == chain_id_of(reader, found)
                assert remembered.has_image(reader, found) == bool(reader.with_image(number, found))


async def test_a_long_chain_is_walked_once(store: MetaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, remembered = Looks(monkeypatch), Descent()
    dice = Random(1)
    for number in range(1, 101):
        made = msgspec.structs.replace(of_layer(dice, number, number - 1), diff_id=b"d" * 32, image=None)
        await put(store, remembered, number, made)
    with store.reading() as reader:
        for most in (200, 0):
            looks.count = 0
            for number in (100, 50, 100):
                found = reader.record(number)
                assert found is not None
                assert remembered.chain_id(reader, number, found)
                assert not remembered.has_image(reader, found)
            assert looks.count <= most
