"""Each test has SQLite databases of its own, filled once a run.  As any user, with snapfs and pytest installed:

    pytest examples/pytest/test_shop.py

Copy this file and conftest.py, and put your own databases in place of `fill`.
"""

import sqlite3
from contextlib import closing

import pytest

STOCK = 20_000


def fill(directory):
    """What takes long: once a run.  Several files belong together: two databases, and what else the application has."""
    with closing(sqlite3.connect(directory / "shop.db")) as shop, shop:
        shop.execute("PRAGMA journal_mode = WAL")
        shop.execute("CREATE TABLE purchase (id INTEGER PRIMARY KEY, customer INTEGER, cents INTEGER)")
        shop.executemany("INSERT INTO purchase VALUES (?, ?, ?)", ((n, n % 500, n * 7) for n in range(STOCK)))
    with closing(sqlite3.connect(directory / "customers.db")) as customers, customers:
        customers.execute("CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT)")
        customers.executemany("INSERT INTO customer VALUES (?, ?)", ((n, f"customer {n}") for n in range(500)))
    (directory / "receipts").mkdir()
    (directory / "receipts/1.txt").write_text("0.07\n")


@pytest.fixture
def data(snapshot_of, fresh_copy):
    return fresh_copy(snapshot_of(fill))


@pytest.fixture
def shop(data):
    with closing(sqlite3.connect(data / "shop.db")) as shop:
        shop.execute("ATTACH ? AS customers", (str(data / "customers.db"),))
        yield shop


def rows(shop, table="purchase"):
    return shop.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_delete_everything(shop):
    with shop:
        shop.execute("DELETE FROM purchase")
        shop.execute("DELETE FROM customers.customer")
    assert rows(shop) == rows(shop, "customers.customer") == 0


def test_all_is_there(shop, data):
    assert (rows(shop), rows(shop, "customers.customer")) == (STOCK, 500)
    assert (data / "receipts/1.txt").read_text() == "0.07\n"


def test_drop_it(shop):
    with shop:
        shop.execute("DROP TABLE purchase")
    with pytest.raises(sqlite3.OperationalError):
        rows(shop)


def test_two_copies(snapshot_of, fresh_copy):
    one, two = (fresh_copy(snapshot_of(fill)) for _ in range(2))
    (one / "shop.db").unlink()
    assert (two / "shop.db").exists()


def test_again(data, fresh_copy):
    """`reset` lets it begin anew within a test, at the same path."""
    (data / "shop.db").write_bytes(b"junk" * 1000)
    assert fresh_copy.changes(data) == ["C /shop.db"]
    fresh_copy.reset()
    with closing(sqlite3.connect(data / "shop.db")) as shop:
        assert rows(shop) == STOCK
