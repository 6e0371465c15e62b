"""Each test has a PostgreSQL server of its own: initdb, and what fills it, run once.  As root or as any user:

    pytest examples/pytest/test_postgres.py

PostgreSQL doesn't run as root: then all of it runs as the user postgres.  Where all that tests need is one database in one
server, template databases are faster; examples/pytest/README.md has the figures.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # not in $PATH there
PROGRAMS = os.path.dirname(shutil.which("initdb", path=os.pathsep.join([*map(str, DEBIAN), os.environ["PATH"]])) or "")
pytestmark = pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed (on Debian: apt-get install postgresql)")

WHO = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

QUICK = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB", "-c", "listen_addresses="]


class Server:
    """A server on the data directory ``data``, which has its socket there too."""

    def __init__(self, data):
        self.data = data
        words = [f"{PROGRAMS}/postgres", "-D", data, "-k", data, *QUICK]
        self.process = subprocess.Popen(words, cwd=data, stderr=subprocess.PIPE, text=True, **WHO)
        while not self.is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(self.process.stderr.read())
            time.sleep(0.002)

    def is_ready(self):
        with contextlib.suppress(OSError):
            return "ready" in (self.data / "postmaster.pid").read_text()

    def sql(self, text, database="shop"):
        words = [f"{PROGRAMS}/psql", "-h", self.data, "-U", "postgres", "-d", database, "-X", "-q", "-At"]
        words += ["-v", "ON_ERROR_STOP=1", "-c", text]
        return subprocess.run(words, cwd="/", stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    def stop(self, how):
        self.process.send_signal(how)
        self.process.communicate()


def fill(directory):
    """What takes long: once a run."""
    if WHO:
        shutil.chown(directory, "postgres", "postgres")
    words = [f"{PROGRAMS}/initdb", "-D", directory, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(words, cwd="/", stdout=subprocess.DEVNULL, check=True, **WHO)
    server = Server(directory)
    server.sql("CREATE DATABASE shop", database="postgres")
    server.sql("CREATE TABLE purchase (id integer PRIMARY KEY, cents integer)")
    server.sql("INSERT INTO purchase SELECT n, n * 7 FROM generate_series(1, 20000) AS n")
    server.stop(signal.SIGINT)  # in order, so that a copy has nothing to recover


@pytest.fixture
def server(snapshot_of, fresh_copy):
    server = Server(fresh_copy(snapshot_of(fill)))
    yield server
    server.stop(signal.SIGQUIT)  # at once: its data is thrown away


def test_drop_it(server):
    server.sql("DROP TABLE purchase")
    server.sql("DROP DATABASE shop", database="postgres")


def test_all_is_there(server):
    assert server.sql("SELECT count(*) FROM purchase") == "20000"


def test_settings(server):
    """What a template database can't give: roles and settings of the whole server."""
    server.sql("ALTER SYSTEM SET work_mem = '1MB'")
    server.sql("CREATE ROLE alice LOGIN SUPERUSER")
    assert server.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'alice'") == "1"


def test_no_role_of_another_test(server):
    assert server.sql("SELECT count(*) FROM pg_roles WHERE rolname = 'alice'") == "0"
