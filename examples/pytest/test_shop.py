"""Each test has a database of its own, filled once a session.  As root, with snapfs and pytest installed:

    pytest examples/pytest

Copy the two files of this directory, and put your own database in place of `fill`.
"""

import sqlite3
from contextlib import closing

import pytest


def fill(directory):
    """What takes long: once a session."""
    with closing(sqlite3.connect(directory / "shop.db")) as shop, shop:
        shop.execute("CREATE TABLE purchase (id INTEGER PRIMARY KEY, cents INTEGER)")
        shop.executemany("INSERT INTO purchase VALUES (?, ?)", ((n, n * 7) for n in range(20_000)))


@pytest.fixture
def shop(snapshot_of, fresh_copy):
    with closing(sqlite3.connect(fresh_copy(snapshot_of(fill)) / "shop.db")) as shop:
        yield shop


def rows(shop):
    return shop.execute("SELECT count(*) FROM purchase").fetchone()[0]


def test_delete_everything(shop):
    with shop:
        shop.execute("DELETE FROM purchase")
    assert rows(shop) == 0


def test_all_is_there(shop):
    assert rows(shop) == 20_000


def test_drop_it(shop):
    with shop:
        shop.execute("DROP TABLE purchase")
    with pytest.raises(sqlite3.OperationalError):
        rows(shop)


def test_two_copies(snapshot_of, fresh_copy):
    one, two = (fresh_copy(snapshot_of(fill)) for _ in range(2))
    (one / "shop.db").unlink()
    assert (two / "shop.db").exists()
