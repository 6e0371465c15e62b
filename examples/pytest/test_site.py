"""Each test has a site of 100,000 files of its own.  As any user:

    pytest examples/pytest/test_site.py --snapfs-cache ~/.cache/snapfs-testing

The files are made in the first run only: --snapfs-cache keeps them until `fill`, or what it calls, has changed.
"""

import os

import pytest

FILES = 100_000


def fill(directory):
    """What takes long: once, for all runs with the cache."""
    for number in range(FILES):
        if number % 1000 == 0:
            section = directory / f"section{number // 1000:03}"
            section.mkdir()
        (section / f"page{number:06}.html").write_text(f"<h1>{number}</h1>\n")


@pytest.fixture
def site(snapshot_of, fresh_copy):
    return fresh_copy(snapshot_of(fill))


def pages(site):
    return sum(len(names) for _, _, names in os.walk(site))


def test_remove_a_section(site, fresh_copy):
    for page in (site / "section000").iterdir():
        page.unlink()
    (site / "section000").rmdir()
    (site / "index.html").write_text("<h1>new</h1>\n")
    assert fresh_copy.changes(site) == ["A /index.html", "D /section000"]


def test_all_is_there(site):
    assert pages(site) == FILES


def test_rewrite_a_page(site):
    (site / "section099/page099999.html").write_text("<h1>changed</h1>\n")
    assert pages(site) == FILES
