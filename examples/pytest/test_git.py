"""Each test has a git repository of its own, with a history and a working tree, made once a run.  As any user:

pytest examples/pytest/test_git.py
"""

import subprocess

import pytest

COMMITS = 50


def git(repository, *words):
    identity = ["-c", "user.name=Alice", "-c", "user.email=alice@example.org", "-c", "commit.gpgSign=false"]
    done = subprocess.run(["git", "-C", repository, *identity, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def fill(directory):
    """What takes long: once a run."""
    git(directory, "init", "-q", "-b", "main")
    for number in range(COMMITS):
        (directory / f"file{number}").write_text(f"{number}\n" * 100)
        git(directory, "add", ".")
        git(directory, "commit", "-q", "-m", f"commit {number}")


@pytest.fixture
def repository(snapshot_of, fresh_copy):
    return fresh_copy(snapshot_of(fill))


def test_rewrite_history(repository):
    git(repository, "reset", "-q", "--hard", "HEAD~10")
    git(repository, "checkout", "-q", "-b", "topic", "HEAD~5")
    (repository / "topic").write_text("new")
    git(repository, "add", "topic")
    git(repository, "commit", "-q", "-m", "topic")
    git(repository, "rebase", "-q", "main")
    git(repository, "gc", "-q", "--prune=now")
    assert git(repository, "rev-list", "--count", "HEAD") == str(COMMITS - 9)


def test_all_is_there(repository):
    assert git(repository, "rev-list", "--count", "HEAD") == str(COMMITS)
    assert git(repository, "status", "--porcelain") == ""


def test_clone_and_push(repository, tmp_path):
    git(tmp_path, "clone", "-q", repository, "clone")
    (tmp_path / "clone/new").write_text("new")
    git(tmp_path / "clone", "add", "new")
    git(tmp_path / "clone", "commit", "-q", "-m", "new")
    git(tmp_path / "clone", "push", "-q", "origin", "HEAD:refs/heads/topic")
    assert git(repository, "branch", "--list", "topic") == "topic"
