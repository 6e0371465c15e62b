#!/usr/bin/env python3
"""A database fixture: filled once, and each test gets a writable copy of its own within milliseconds.

After `make run` has mounted a tree on /tmp/snapfs/snap, as root:

    python3 examples/database_fixture.py /tmp/snapfs/snap

The first run fills a SQLite data directory and commits it; every later one finds it there.  The tests then drop tables, delete
the database, write junk over it, and don't see each other.  It is the same with any database that has a data directory.

Look at `writable_copy`: mkdir, use, rmdir.  As a fixture of pytest it is

    @pytest.fixture
    def data():
        with writable_copy(Path("/tmp/snapfs/snap"), fill_once(Path("/tmp/snapfs/snap"))) as directory:
            yield directory

A copy takes no space until it is written to; then the kernel copies the file that is written, whole (where the disk's file
system has reflinks, not even that).  So what many files share costs less than one big file.

    ls /tmp/snapfs/snap/committed/shop-1/rootfs      # the data directory, read-only
    rmdir /tmp/snapfs/snap/committed/shop-1          # forget it
    rmdir /tmp/snapfs/snap/active/test-*             # what tests left that were killed
"""

import json
import os
import sqlite3
import statistics
import sys
import time
import unittest
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import ClassVar

BASE = "shop-1"  # count up when what `fill` makes changes
CUSTOMERS, ORDERS = 500, 20_000

_numbers = count(1)


def fill(directory: Path) -> None:
    """Make the data directory that every test begins with: what takes long."""
    with closing(sqlite3.connect(directory / "shop.db")) as shop, shop:
        shop.execute("CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL)")
        shop.execute("CREATE TABLE purchase (id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customer, cents INTEGER)")
        shop.execute("CREATE INDEX purchase_customer ON purchase (customer)")
        shop.executemany("INSERT INTO customer VALUES (?, ?)", ((n, f"customer {n}") for n in range(CUSTOMERS)))
        shop.executemany("INSERT INTO purchase VALUES (?, ?, ?)", ((n, n % CUSTOMERS, n * 7) for n in range(ORDERS)))


def fill_once(tree: Path) -> str:
    """The name of the committed data directory, which is made if it is missing."""
    if not (tree / "committed" / BASE).exists():
        filling = tree / "active" / f"{BASE}-filling-{os.getpid()}"
        filling.mkdir()
        try:
            fill(filling / "rootfs")
            filling.rename(tree / "committed" / BASE)
        except BaseException as error:
            filling.rmdir()
            if not isinstance(error, FileExistsError):  # then another process was faster, which is as good
                raise
    return BASE


@contextmanager
def writable_copy(tree: Path, base: str) -> Iterator[Path]:
    """A directory that begins as ``base``, is written to at will, and is thrown away at the end.

    Whatever has a file open in it must have closed it by then: the rmdir raises EBUSY otherwise.
    """
    key = f"test-{os.getpid()}-{next(_numbers)}"
    (tree / "committed" / base / "active" / key).mkdir()
    try:
        yield tree / "active" / key / "rootfs"
    finally:
        (tree / "active" / key).rmdir()


class ShopTest(unittest.TestCase):
    """What tests look like that use it."""

    tree: Path
    milliseconds: ClassVar[list[float]] = []

    def setUp(self) -> None:
        began = time.perf_counter()
        self.data = self.enterContext(writable_copy(self.tree, fill_once(self.tree)))
        self.shop = self.enterContext(closing(sqlite3.connect(self.data / "shop.db")))
        self.assertEqual(self.rows("purchase"), ORDERS, "what another test destroyed is whole again")
        self.milliseconds.append((time.perf_counter() - began) * 1000)

    def rows(self, table: str) -> int:
        (rows,) = self.shop.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(rows)

    def test_delete_everything(self) -> None:
        with self.shop:
            self.shop.execute("DELETE FROM purchase")
        self.assertEqual(self.rows("purchase"), 0)

    def test_drop_table(self) -> None:
        with self.shop:
            self.shop.execute("DROP TABLE purchase")
        with self.assertRaisesRegex(sqlite3.OperationalError, "no such table"):
            self.rows("purchase")

    def test_lost_file(self) -> None:
        self.shop.close()
        (self.data / "shop.db").unlink()
        self.assertEqual(list(self.data.iterdir()), [])

    def test_junk(self) -> None:
        self.shop.close()
        (self.data / "shop.db").write_bytes(b"junk" * 1000)
        with closing(sqlite3.connect(self.data / "shop.db")) as shop, self.assertRaises(sqlite3.DatabaseError):
            shop.execute("SELECT * FROM customer")

    def test_two_copies_at_once(self) -> None:
        with self.shop:
            self.shop.execute("DELETE FROM customer")
        with writable_copy(self.tree, BASE) as other, closing(sqlite3.connect(other / "shop.db")) as shop:
            self.assertEqual(shop.execute("SELECT count(*) FROM customer").fetchone(), (CUSTOMERS,))
        self.assertEqual(self.rows("customer"), 0)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} TREE, such as /tmp/snapfs/snap")
    tree = ShopTest.tree = Path(sys.argv[1])
    if not (tree / ".snapfs").is_dir():
        sys.exit(f"no snapfs tree is mounted on {tree}; `make run` mounts one on /tmp/snapfs/snap")
    rootfs = json.loads((tree / ".snapfs/options.json").read_text())["features"]["rootfs"]
    if not rootfs["on"]:
        sys.exit(f"the tree has no rootfs: {rootfs['why']}")
    try:
        began = time.perf_counter()
        base = fill_once(tree)
        print(f"committed/{base}: there after {(time.perf_counter() - began) * 1000:.1f} ms")
    except (OSError, sqlite3.Error) as error:
        reasons = (tree / ".snapfs/error_log").read_text().splitlines()
        sys.exit("\n".join([f"the database could not be filled: {error}", *reasons[-1:]]))
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(ShopTest)
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(tests)
    if ShopTest.milliseconds:
        size = (tree / "committed" / base / "rootfs/shop.db").stat().st_size
        taken = statistics.median(ShopTest.milliseconds)
        print(f"from mkdir to an open copy of {size:,} bytes: {taken:.1f} ms (the median of {len(ShopTest.milliseconds)})")
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
