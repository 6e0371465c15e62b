"""A daemon that an ordinary user has started: the whole tree, for that user, and programs that stand in a workspace.

Each test is done by alice, who is nobody in particular; bob is another, and root is root.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.command import SNAPFS
from tests.home import Home, home_of, with_workspace
from tests.processes import until
from tests.users import ALICE, alice, bind, bob

pytestmark = [pytest.mark.mounts, pytest.mark.usefixtures("everybodys_fuse", "users")]


@pytest.fixture
def nobody_serves() -> Iterator[Home]:
    """Before the daemon is started."""
    with home_of(alice) as home:
        yield home


@pytest.fixture
def home(nobody_serves: Home) -> Home:
    """With a base, and the workspace ``w`` on it."""
    nobody_serves.daemon.start()
    return with_workspace(nobody_serves)


# -- the tree from every shell


def test_a_whole_life(home: Home) -> None:
    home.sh("mkdir -p site/d; echo page > site/page; ln -s ../page site/d/link; chmod 640 site/page")
    home.sh("mkdir tree/active/s && cp -a site/. tree/active/s/rootfs/")
    home.sh("cd tree/active/s/rootfs/ && tar -cf ../../../../site.tar . && ls -l && find . | sort && cat page")
    home.sh("diff -r site tree/active/s/rootfs/ && mkdir out && tar -C out -xf site.tar && diff -r site out")
    assert home.sh("cd tree; rm active/w/rootfs/file; echo n > active/w/rootfs/n; cat active/w/changes") == "D /file\nA /n\n"
    home.sh("cd tree; rmdir active/w/rootfs/sub; mkdir active/w/rootfs/sub; mv active/w committed/w; ls committed/w/rootfs/sub")
    assert home.sh("ls -A tree/committed/w/rootfs/sub; cat tree/committed/w/rootfs/n") == "n\n"
    home.snapfs("prepare", "k", "--parent", "w")
    home.sh("echo 1 > tree/active/k/rootfs/f")
    home.snapfs("checkpoint", "k", "-m", "one")
    home.sh("echo 2 > tree/active/k/rootfs/f")
    home.snapfs("rollback", "k")
    assert home.sh("cat tree/active/k/rootfs/f") == "1\n"
    home.sh("rmdir tree/active/k; rmdir tree/active/s")
    assert home.mounts() == [str(home.mnt)], "the tree and nothing else"
    assert home.daemon.stop() == 0
    assert home.mounts() == []
    assert home.daemon.said == [f"snapfs: serving {home.root} on {home.mnt}\n"]
    assert os.listdir(home.root / "rootfs") == []


def test_any_two_snapshots(anybody: Home) -> None:
    """What an ordinary user's overlays write into layers is understood, too; git makes the one of the other."""
    home = anybody
    home.sh("cd tree/active/w/rootfs; rm file; echo n > n; mkdir -p sub/d; echo 1 > sub/d/f; ln -s n l")
    home.snapfs("checkpoint", "w")
    home.sh("cd tree/active/w/rootfs; echo m > n; rm -r sub; mkdir sub; echo 2 > sub/f")
    assert home.snapfs("diff", "b", "w") == "D /file\nA /l\nA /n\nA /sub/f\n"
    assert home.snapfs("diff", "--since", "1", "w") == "C /n\nD /sub/d\nA /sub/f\n"
    home.sh("exec 3<>tree/committed/b/compare; echo 'changes w' >&3; cat <&3 > said")
    assert home.sh("cat said") == "A /file\nD /l\nD /n\nD /sub/f\n"
    for old, new in (("b", "w"), ("w@1", "w"), ("w", "b")):
        for kind, name in (("old", old), ("new", new)):
            home.sh(f"rm -rf {kind}; cp -a tree/*/{name}/rootfs/ {kind}; find {kind} -type d -empty -delete")
        home.sh(f"{shlex.join(SNAPFS)} diff -p {old} {new} > patch; cd old; git apply --check ../patch; git apply ../patch")
        home.sh("diff -r old new")


def test_an_editor_and_a_file_manager_and_inotify(home: Home) -> None:
    edit = "printf '%s\\n' '$a' added . w q | ed -s tree/active/w/rootfs/file && cat tree/active/w/rootfs/file"
    assert home.sh(edit) == "base\nadded\n"
    assert "file" in home.sh("gio list tree/active/w/rootfs/")
    assert home.sh(
        "cd tree/active/w; flock rootfs/file true; mkdir -p rootfs/a/b; cd ~; rsync -a tree/active/w/rootfs/ copy/; ls copy"
    )
    watch = """
import ctypes, os
created, watcher = 0x100, ctypes.CDLL(None).inotify_init()
assert ctypes.CDLL(None).inotify_add_watch(watcher, b"tree/active/w/rootfs/", created) > 0
open("tree/active/w/rootfs/new", "w").close()
assert b"new" in os.read(watcher, 4096)"""
    home.does("/usr/bin/python3", "-c", watch)


def test_the_mounts_of_its_own_are_told(home: Home) -> None:
    link = home.rootfs("w")
    assert link == f"/proc/{home.daemon.pid}/root{home.root}/rootfs/2/fs"
    assert json.loads(home.read("active/w/info.json"))["mounted"] == [link]
    options = home.options()
    assert options["window"] == f"/proc/{home.daemon.pid}/root"
    features = options["features"]
    assert isinstance(features, dict)
    assert [features[name]["on"] for name in ("rootfs", "userxattr", "in_use")] == [True] * 3


def test_nobody_else_gets_in(home: Home) -> None:
    target = home.rootfs("w")
    for command in (f"ls {home.mnt}", f"ls {target}", f"ls {target}/sub", f"ls {home.root}/rootfs"):
        assert "Permission denied" in home.does("sh", "-c", command, status=2, who=bob)
    enter = f"nsenter --target {home.daemon.pid} --user --mount --preserve-credentials ls {home.root}"
    assert "nsenter" in home.does("sh", "-c", enter, status=1, who=bob)
    assert home.does("cat", f"{target}/file", who=()) == "base\n", "but root"


def test_who_names_a_tree_that_is_closed_is_told_so(home: Home) -> None:
    for who, whose in ((bob, f" (of user {ALICE})"), ((), f" (of user {ALICE})"), (alice, "")):
        where = home.mnt / "active" if who else home.mnt
        said = home.does(*SNAPFS, "ls", "--at", where, who=who, status=6 if whose else 0)
        closed = f"snapfs: {home.mnt}{whose} is closed to you: allow_other and umask= say who may enter, when it is served\n"
        assert said == closed if whose else said.startswith("NAME")


def test_nobody_else_gets_in_where_all_may_see_the_tree(nobody_serves: Home, tmp_path: Path) -> None:
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    subprocess.run(["mount", "--bind", str(tmp_path / "fuse.conf"), "/etc/fuse.conf"], check=True)
    try:
        nobody_serves.daemon = nobody_serves.another("--allow-other").start()
        home = with_workspace(nobody_serves)
        assert home.does("ls", home.mnt / "active", who=bob) == "w\n"
        assert "Permission denied" in home.does("ls", f"{home.mnt}/active/w/rootfs/", status=2, who=bob)
    finally:
        subprocess.run(["umount", "/etc/fuse.conf"], check=True)


def test_programs_that_go_by_the_path_meet_an_error_in_the_window(home: Home) -> None:
    """Each learns the path in the daemon's namespace, where for it is nothing."""
    into = "cd tree/active/w/rootfs/ && "
    assert "No such file or directory" in home.sh(f"{into} git init . 2>&1", status=128)
    for make in ('mkdir -p "$p/new"', 'echo x > "$p/new"', "python3 -c \"import os; os.makedirs(os.getcwd() + '/deep/er')\""):
        home.does("sh", "-c", f"{into} p=$(pwd -P); ( {make} ) 2>/dev/null || exit 1", status=1)
        home.does("sh", "-c", f"mkdir -p {home.root}/rootfs/9/fs 2>/dev/null", status=1)
    home.sh(f"{into} printf 'all:\\n\\tmkdir -p \"$(CURDIR)/made\"\\n' > Makefile")
    home.sh(f"{into} make 2>&1", status=2)
    home.sh(f"{into} node -e 'fs.mkdirSync(process.cwd() + `/made`, {{recursive: true}})' 2>&1", status=1)
    assert "made" not in home.sh("ls tree/active/w/rootfs/").split()
    database = """
try:
    sqlite3.connect("tree/active/w/rootfs/db").execute("create table t (x)")  # which resolves links itself
except sqlite3.OperationalError as error:
    print(error)"""
    said = home.does("/usr/bin/python3", "-c", f"import sqlite3{database}")
    assert said == "unable to open database file\n"
    vim = "vim -u NONE -es -c 's/$/ by vim/' -c wq"
    assert home.sh(f"{vim} tree/active/w/rootfs/file; cat tree/active/w/rootfs/file") == "base by vim\n"
    home.sh(f"{into} {vim} file || :")
    assert home.read("active/w/rootfs/file") == "base by vim by vim\n"
    home.sh("rmdir tree/active/w")
    assert os.listdir(home.root / "rootfs") == [], "no program has made anything beneath"


def test_in_use(home: Home) -> None:
    home.sh(f"cd tree/active/w/rootfs/; ! mv {home.mnt}/active/w {home.mnt}/committed/v 2>/dev/null")
    assert re.search(r"is in use by process \d+ \((sh|mv)\)", home.last_error())
    with sitting(home, "w"):
        home.sh("! mv tree/active/w tree/committed/v 2>/dev/null")
        assert "mounted in another mount namespace, that of process" in home.last_error()
    home.sh("mv tree/active/w tree/committed/v")


def test_mount_sh_enters_by_itself(home: Home) -> None:
    target = home.path / "target"
    home.sh("mkdir target")
    lines = home.read("active/w/mount.sh").splitlines()
    assert lines[-1].startswith("exec ")
    command = shlex.split(lines[-1].removeprefix("exec ").removesuffix(' "$1"'))
    assert command[0] == sys.executable, "which alice need not be able to start from a script, here"
    seen = f"/proc/{home.daemon.pid}/root{target}"
    assert f"others reach it as {seen}\n" in home.does(*command, target)
    assert home.sh(f"cat {seen}/file; echo new > {seen}/new") == "base\n"
    home.sh("! mv tree/active/w tree/committed/v 2>/dev/null")
    assert f"is mounted at {target}: unmount it first" in home.last_error()
    assert home.mounts() == [str(home.mnt)]
    home.snapfs("umount", target)
    home.snapfs("mount", "w", target)
    home.snapfs("umount", "w")
    assert home.sh("ls target; cat tree/active/w/rootfs/new; mv tree/active/w tree/committed/v") == "new\n"


# -- ends


@contextmanager
def sitting(home: Home, key: str) -> Iterator[subprocess.Popen[str]]:
    """Somebody who stands in a workspace, and at its end writes there what was said to it."""
    script = "echo in; read line; echo $line > said; cat file"
    words = home.words(*SNAPFS, "run", key, "--", "sh", "-ec", script)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home.path) as sitter:
        assert sitter.stdin is not None
        assert sitter.stdout is not None
        assert sitter.stdout.readline() == "in\n"
        try:
            yield sitter
            sitter.stdin.write("bye\n")
            sitter.stdin.flush()
            assert sitter.stdout.readline() == "base\n"
        finally:
            sitter.stdin.close()
        assert sitter.wait() == 0


def test_killed(home: Home) -> None:
    home.sh("echo kept > tree/active/w/rootfs/kept")
    home.daemon.stop(signal.SIGKILL)
    until(lambda: home.mounts() == [], "nothing is mounted")
    home.daemon = home.another().start()
    assert home.sh("cat tree/active/w/rootfs/kept; cat tree/active/w/changes") == "kept\nA /kept\n"


def test_killed_while_somebody_stands_in_a_workspace(home: Home) -> None:
    """The new daemon must not mount the layer that the shell still has; nor take the directory away that it stands on."""
    with sitting(home, "w") as sitter:
        home.daemon.stop(signal.SIGKILL)
        until(lambda: home.mounts() == [], "nothing is mounted")
        home.daemon = home.another().start()
        for refused in ("ls tree/active/w/rootfs/", "mv tree/active/w tree/committed/v"):
            home.sh(f"! {refused} 2>/dev/null")
            assert f"is in use by process {sitter.pid} (sh): end it first" in home.last_error()
    until(lambda: home.does("sh", "-c", "cat tree/active/w/rootfs/said || true") == "bye\n", "it is free")
    home.sh("mv tree/active/w tree/committed/v")


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "<&- >&- 2>&-"])
def test_in_the_background(nobody_serves: Home, closed: str) -> None:
    """Also for whoever starts it without standard input or output."""
    home = nobody_serves
    home.sh(f"{shlex.join([*SNAPFS, 'serve', '--detach', str(home.root), str(home.mnt)])} {closed}")
    try:
        assert home.inside("w", "pwd", status=3).endswith("snapfs ls lists all\n")
        home.sh("mkdir tree/active/w")
        assert home.inside("w", "pwd") == f"{home.root}/rootfs/1/fs\n"
    finally:
        home.sh("fusermount3 -u tree")
    until(lambda: "pid" not in home.does("sh", "-c", f"flock -n {home.root}/lock true || echo pid"), "the daemon has ended")


def test_in_the_background_it_keeps_no_descriptor_of_who_started_it(nobody_serves: Home) -> None:
    """Neither the daemon nor the process that mounts for it: a lock is free when its owner has closed it."""
    home = nobody_serves
    serve = shlex.join([*SNAPFS, "serve", "--detach", str(home.root), str(home.mnt)])
    try:
        home.sh(f"exec 9>held; flock -n 9; {serve}; exec 9>&-; flock -n held true")
    finally:
        home.sh("fusermount3 -u tree")
    until(lambda: "pid" not in home.does("sh", "-c", f"flock -n {home.root}/lock true || echo pid"), "the daemon has ended")


@pytest.mark.parametrize(("does", "words"), [("exit 0", "gave no device"), ("exec sleep 60", "did not answer within 1 s")])
def test_a_program_that_mounts_nothing(nobody_serves: Home, does: str, words: str) -> None:
    """It is told, and the process that mounts ends too."""
    home = nobody_serves
    home.sh(f"mkdir bin; printf '#!/bin/sh\\n{does}\\n' > bin/fusermount3; chmod +x bin/fusermount3")
    patient = "import sys; from snapfs import cli; from snapfs.fuse import outside; outside._PATIENCE = 1; sys.exit(cli.main())"
    serve = (sys.executable, "-c", patient, "serve", home.root, home.mnt)
    path = f"PATH={home.path}/bin:{os.environ['PATH']}"
    assert f"fusermount3 {words}" in home.does("env", path, "timeout", "-sKILL", "20", *serve, status=1)


def test_unmounted(home: Home) -> None:
    home.sh("fusermount3 -u tree")
    assert home.daemon.ended() == 0
    assert home.daemon.last == "snapfs: ended: unmounted\n"


@pytest.mark.parametrize("private", [False, True])
def test_unmounted_while_a_namespace_has_a_copy(nobody_serves: Home, private: bool) -> None:
    """Of a mount that isn't shared, the kernel tells no copy that it was unmounted."""
    home = nobody_serves
    if not private:
        home.daemon.start()
        with_workspace(home)
        with sitting(home, "w"):
            home.sh("fusermount3 -u tree")
            assert home.daemon.ended() == 0
        return
    script = """
set -e
"$@" & daemon=$!
until test -e "$M/README"; do sleep 0.05; done
mkdir "$M/active/w"; touch "$M/active/w/rootfs/file"
mkfifo hold said
"$P" -m snapfs.cli run --at "$M" w sh -c 'echo in > "$0/said"; read x < "$0/hold"; ls' "$PWD" & shell=$!
read x < said
fusermount3 -u "$M"
wait $daemon
echo > hold
wait $shell
"""
    serve = [*SNAPFS, "serve", str(home.root), str(home.mnt)]
    environment = (f"M={home.mnt}", f"P={sys.executable}")
    words = ["unshare", "-m", "--propagation", "private", *alice, "env", *environment, "sh", "-c", script, "sh", *serve]
    done = subprocess.run(words, cwd=home.path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "file\n"), done.stderr
    assert "ended: unmounted" in done.stderr


def test_the_process_that_mounts_was_killed(home: Home) -> None:
    """The tree ends; the next daemon finds a dead mountpoint, and mounts over it no less."""
    children = Path(f"/proc/{home.daemon.pid}/task/{home.daemon.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert home.daemon.ended() == 0
    home.daemon.start()
    assert home.sh("cat tree/active/w/rootfs/file") == "base\n"


# -- where it can't be had


def test_no_userns(nobody_serves: Home) -> None:
    home = nobody_serves
    home.daemon = home.another("--no-userns").start()
    home.sh("mkdir tree/active/w; test ! -e tree/active/w/rootfs; mv tree/active/w tree/committed/v")
    assert "leave out --no-userns" in home.snapfs("run", "v", "--", "true", status=1)
    features = home.options()["features"]
    assert isinstance(features, dict)
    assert "leave out --no-userns" in features["rootfs"]["why"]
    assert home.daemon.stop() == 0


def test_a_root_that_was_filled_in_a_namespace_is_understood_without(nobody_serves: Home) -> None:
    """What was replaced in its layers doesn't come back: not in `changes`, and not for whoever mounts them."""
    home = nobody_serves
    home.daemon = home.another().start()
    home.sh(
        "mkdir tree/active/b; mkdir tree/active/b/rootfs/d; touch tree/active/b/rootfs/d/f; mv tree/active/b tree/committed/b"
    )
    home.sh(
        "mkdir tree/committed/b/active/w; cd tree/active/w/rootfs/; rm -r d; mkdir d; cd; mv tree/active/w tree/committed/v"
    )
    before = home.sh("cat tree/committed/v/changes")
    assert before == "D /d/f\n"
    assert home.daemon.stop() == 0
    home.daemon.arguments = ("--no-userns",)
    home.daemon.start()
    assert home.sh("cat tree/committed/v/changes") == before
    home.sh("mkdir tree/committed/v/view/p")
    assert "userxattr" in home.sh("cat tree/view/p/mounts.json")
    assert home.daemon.stop() == 0


LIMITED = """
import sys
from pathlib import Path
from snapfs.kernel import userns
userns.enter()
Path("/proc/sys/user/" + sys.argv[1]).write_text("0")
"""


@pytest.mark.parametrize("limit", ["max_user_namespaces", "max_mnt_namespaces"])
def test_a_limit_is_named(nobody_serves: Home, limit: str) -> None:
    """As ``sysctl user.max_user_namespaces=0`` leaves it, which a hardened machine has; here for one namespace alone."""
    home = nobody_serves
    said = home.does(sys.executable, "-c", f"{LIMITED}\nprint(userns.why_refused())", limit, cwd=Path("/"))
    assert f"the limit user.{limit} is reached (No space left on device): root can raise it, with sysctl -w" in said


def test_where_it_is_refused_all_else_works(nobody_serves: Home) -> None:
    """A chroot is refused user namespaces, as a container's filter refuses them."""
    home = nobody_serves
    jail = home.path / "jail"
    jail.mkdir()
    subprocess.run(["mount", "--rbind", "/", str(jail)], check=True)
    try:
        subprocess.run(["mount", "--make-rslave", str(jail)], check=True)
        home.daemon.prefix = ("chroot", f"--userspec={ALICE}:{ALICE}", "--groups=", str(jail))
        home.daemon.start()
        refusal = "user namespaces are forbidden here (Operation not permitted)"
        assert home.daemon.said[0].startswith(f"snapfs: there is no rootfs: {refusal}")
        inner = str(jail) + str(home.mnt)
        options = json.loads(home.does("cat", f"{inner}/.snapfs/options.json"))
        assert options["features"]["rootfs"]["why"].startswith(refusal)
        assert options["window"] == ""
        assert refusal in home.does("cat", f"{inner}/README")
        home.sh(f"cd {inner}; mkdir active/w; mv active/w committed/v; cat committed/v/info.json")
        said = home.does(*SNAPFS, "shell", "--at", inner, "v", status=1)
        assert refusal in said
    finally:
        home.daemon.cleanup()
        subprocess.run(["umount", "-R", "-l", str(jail)], check=True)


# -- standing inside


def test_run(anybody: Home) -> None:
    home = anybody
    assert home.inside("w", "cat file; pwd; echo $SNAPFS_WORKSPACE; id -u; echo more > more; exit 7", status=7) == (
        f"base\n{home.root}/rootfs/2/fs\nw\n{ALICE if home.who else 0}\n"
    )
    assert home.sh("cat tree/active/w/changes") == "A /more\n"
    assert home.inside("w", f"ls {home.mnt}/active; cat {home.mnt}/active/w/rootfs/file") == "w\nbase\n", "the tree is there"
    assert home.snapfs("run", "w", "ls", "-a", "sub") == ".\n..\n", "no -- is needed"
    assert "cannot run nonesuch: No such file" in home.snapfs("run", "w", "--", "nonesuch", status=127)
    assert "cannot run ./file: Permission denied" in home.snapfs("run", "w", "--", "./file", status=126)
    assert home.inside("b", "cat file; echo x > file", status=2).endswith("Read-only file system\n"), "a committed one"
    assert 'snapshot "none" does not exist' in home.snapfs("run", "none", "true", status=3)
    assert home.inside("w", "kill -TERM $$", status=-signal.SIGTERM) == ""


def test_what_the_workspace_hides_is_another_directory(anybody: Home) -> None:
    home = anybody
    home.sh("mkdir -p project/sub/deep; echo host > project/file")
    project = home.path / "project"
    assert home.inside("w", "pwd; cat file; echo x > new", "--over", project) == f"{project}\nbase\n"
    words = ("run", "--over", project, "w", "--", "sh", "-c", "pwd; ls -A ..")
    assert home.snapfs(*words, cwd=project / "sub") == f"{project}/sub\nfile\nnew\nsub\n", "where the caller stands"
    assert home.snapfs(*words, cwd=project / "sub/deep").startswith(f"{project}\n"), "or as near as there is"
    assert sorted(os.listdir(project)) == ["file", "sub"], "the directory is as it was"
    victim = home.path / "victim"
    home.sh(f"mkdir victim; rmdir {home.mnt}/active/w/rootfs/sub; ln -s {victim} {home.mnt}/active/w/rootfs/sub")
    assert home.snapfs(*words, cwd=project / "sub").startswith(f"{project}\n"), "not where a link in there leads"
    for wrong in (home.path, home.mnt, home.root, "/"):
        assert "cannot put a workspace over" in home.inside("w", "true", "--over", wrong, status=1)
    assert "Not a directory" in home.inside("w", "true", "--over", project / "file", status=1)


def test_from_one_workspace_to_the_next(home: Home) -> None:
    home.sh("mkdir tree/committed/b/active/other")
    command = f"{shlex.join(SNAPFS)} run"
    assert home.inside("w", f"{command} w -- cat file") == "base\n"
    assert 'from inside of "w": leave that first' in home.inside("w", f"{command} other -- true", status=6)


@pytest.mark.parametrize(
    "meanwhile", ["mv active/w committed/v; ls committed/v/rootfs/", "rmdir active/w", "snapfs checkpoint w"]
)
def test_a_workspace_that_ends_before_anybody_is_inside(anybody: Home, meanwhile: str) -> None:
    """Of what it was a moment ago nothing is found, and nothing runs."""
    script = f"""
import os, sys
from snapfs.cli import inside
from snapfs.cli import main
from snapfs.kernel import userns

def after(act):
    def acting(*arguments):
        assert os.system("cd {anybody.mnt}; {meanwhile}") == 0
        return act(*arguments)
    return acting

inside._fetch = after(inside._fetch) if os.geteuid() else inside._fetch
userns.copy_mounts = userns.copy_mounts if os.geteuid() else after(userns.copy_mounts)
sys.exit(main(["run", "w", "--", "touch", "{anybody.path}/ran"]))
"""
    said = anybody.does(sys.executable, "-c", script.replace("snapfs checkpoint", " ".join([*SNAPFS, "checkpoint"])), status=5)
    assert said.endswith('snapfs: "w" was committed or removed a moment ago: see snapfs ls, and try again\n')
    assert not (anybody.path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "file", "status"),
    [
        ("run w -- touch ran", "rootfs", 5),
        ("diff w", "changes", 3),
        ("mount w t", "mounts.json", 3),
        ("show w", "info.json", 3),
    ],
)
def test_a_workspace_that_ends_before_anything_is_read(anybody: Home, words: str, file: str, status: int) -> None:
    """A checkpoint or a commit of somebody else's takes it away for a moment: that is said, and not which file is missing."""
    script = f"""
import builtins, os, sys
from snapfs.cli import main
from snapfs.cli.within import Within

def before(act):
    def acting(*arguments, **named):
        if "{anybody.mnt}/active/w/{file}" in arguments and os.path.isdir("{anybody.mnt}/active/w"):
            os.rmdir("{anybody.mnt}/active/w")
        return act(*arguments, **named)
    return acting

Within.readlink, Within.open, builtins.open = before(Within.readlink), before(Within.open), before(builtins.open)
sys.exit(main({words.split()}))
"""
    (anybody.path / "t").mkdir()
    said = anybody.does(sys.executable, "-c", script, status=status)
    assert said.endswith('snapfs: "w" was committed or removed a moment ago: see snapfs ls, and try again\n')
    assert not (anybody.path / "ran").exists()


JOINING = """
import os, sys
from snapfs.cli import main
from snapfs.kernel import userns

def after(join):
    def joining(*arguments, **named):
        join(*arguments, **named)
        before.update(set() if before else sys.modules)
    return joining

def end(*_):
    print("imported:", *sorted(set(sys.modules) - before) if before else "nothing was joined")
    sys.exit()

before = set()
userns.join = after(userns.join)
os.execvp = end
main(sys.argv[1:])
end()
"""


def test_all_modules_are_imported_before_a_namespace_is_joined(home: Home) -> None:
    """What stands at their place in there may be somebody else's."""
    target = home.path / "target"
    home.sh("mkdir target")
    for words in (
        ["mount", "w", target],
        ["umount", "w"],
        ["mount", "w", target],
        ["umount", target],
        ["umount", "w"],
        ["mount", "w", target / "missing"],
        ["run", "w", "--", "true"],
        ["run", "w", "--over", target, "--", "true"],
        ["run", "w", "--root", "--", "true"],
    ):
        said = home.does(sys.executable, "-c", JOINING, *words)
        assert said.splitlines()[-1] == "imported:", (words, said)


def test_a_tree_that_calls_another_process_its_daemon(home: Home, tmp_path: Path) -> None:
    """The kernel says which process has the tree's device: no other's namespaces are joined, be it the user's own."""
    target = home.path / "target"
    home.sh("mkdir target")
    with subprocess.Popen(home.words("unshare", "-Urm", "sh", "-c", "echo; read _"), stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        script = """
import sys
from snapfs.cli import main
from snapfs.cli.place import MountedTree

options = MountedTree.options
MountedTree.options = lambda place: {**options(place), "pid": int(sys.argv[1])}
sys.exit(main(sys.argv[2:]))
"""
        mounted = home.does("cat", f"/proc/{other.pid}/mountinfo")
        for pid, status, why in (
            (other.pid, 1, "does not serve"),
            (os.getpid(), 6, "is another user's: be that user"),
        ):
            for words in (["mount", "w", str(target)], ["umount", "w"], ["run", "w", "--", "true"]):
                said = home.does(sys.executable, "-c", script, str(pid), *words, status=status)
                assert f"snapfs: process {pid}" in said
                assert why in said
        assert home.does("cat", f"/proc/{other.pid}/mountinfo") == mounted
        other.kill()


def test_what_is_mounted_in_the_tree_is_in_the_daemons_log(nobody_serves: Home, tmp_path: Path) -> None:
    """Though the daemon may not see it in its own namespace."""
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    with ExitStack() as stack:
        bind(stack, tmp_path / "fuse.conf", "/etc/fuse.conf")
        nobody_serves.daemon = nobody_serves.another("--allow-other").start()
        home = with_workspace(nobody_serves)
        process = home.daemon.process
        assert process is not None
        assert process.stderr is not None
        for place in (home.mnt / "active/w", home.mnt / ".snapfs"):
            subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
            stack.callback(subprocess.run, ["umount", str(place)], check=True)
            line = process.stderr.readline()
            assert line == f"snapfs: something is mounted over {place}, and hides what the tree has there: umount {place}\n"


def test_files_of_root_s_in_a_lower_layer(home: Home) -> None:
    """They can be read and removed, but not changed: the kernel can't give a copy an owner that has no number there."""
    layer = home.root / "snapshots/1/fs"
    for name in ("one", "two"):
        (layer / name).write_text("root's\n")
    assert (
        home.inside("w", "stat -c %U one; cat one; rm one; ! echo more 2>/dev/null >> two; cat two")
        == "nobody\nroot's\nroot's\n"
    )
    assert home.read("active/w/changes") == "D /one\n"
    home.sh("mv tree/active/w tree/committed/v; rmdir tree/committed/v")


def test_as_root_of_a_user(home: Home) -> None:
    assert (
        home.inside("w", "id -u; touch made; stat -c %u made; chown 0:0 made; ! chown 1 made 2>/dev/null", "--root") == "0\n0\n"
    )
    assert os.stat(f"{home.rootfs('w')}/made").st_uid == ALICE


def test_a_shell_at_a_terminal(anybody: Home) -> None:
    """It is the process that was started, so the terminal is its own: Ctrl-C ends what runs in it and not the shell, and Ctrl-Z
    stops that."""
    home = anybody
    pid, terminal = pty.fork()
    if pid == 0:
        words = home.words("SHELL=/bin/sh", "PS1=$ ", *SNAPFS, "shell", "w")
        os.execvp(words[0], words)
    seen = bytearray()

    def see(what: bytes) -> bytes:
        while what not in seen:
            seen.extend(os.read(terminal, 4096))
        found = bytes(seen)
        seen.clear()
        return found

    see(b"$ ")
    os.write(terminal, b"tty && sh -c 'cat file; exec sleep 100' && echo not\\ reached\n")  # cat has the terminal by then
    see(b"base\r\n")
    os.write(terminal, b"\x03")
    assert b"not reached" not in see(b"$ ")
    os.write(terminal, b"sh -c 'cat file; exec sed -u s/^/got-/'\n")
    see(b"base\r\n")
    os.write(terminal, b"\x1a")
    assert b"Stopped" in see(b"\r\n$ ")
    os.write(terminal, b"fg\nline\n")
    see(b"got-line\r\n")
    os.write(terminal, b"\x04")
    see(b"$ ")
    os.write(terminal, b"exit 5\n")
    status = os.waitpid(pid, 0)[1]
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5


PROGRAMS = {
    "git": "git init -q . && git add . && git -c user.name=a -c user.email=a@b commit -qm one && git log --oneline",
    "make": "printf 'all:\\n\\tcp file $(CURDIR)/copied\\n' > Makefile && make -s && cmp file copied",
    "venv": "/usr/bin/python3 -m venv --without-pip v && v/bin/python -c 'import sys; assert sys.prefix.endswith(\"/v\")'",
    "node": 'echo \'require("fs").writeFileSync(process.cwd() + "/by-node", "x")\' > t.js && node t.js && cat by-node',
    "sqlite": """/usr/bin/python3 -c '
import os, sqlite3
d = sqlite3.connect(os.getcwd() + "/db")
assert d.execute("pragma journal_mode=wal").fetchone() == ("wal",)
d.execute("create table t (x)"); d.execute("insert into t values (1)"); d.commit()
assert os.path.exists("db-wal")
d.close()'""",
    "bwrap": "bwrap --bind / / --dev /dev --proc /proc --chdir \"$PWD\" sh -c 'echo x > by-bwrap' && cat by-bwrap",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_that_work_inside(anybody: Home, program: str) -> None:
    anybody.inside("w", PROGRAMS[program])
    assert anybody.sh("wc -l < tree/active/w/changes").strip() != "0"


POSTGRESQL = """
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
initdb -D data -U me --auth=trust --no-sync >/dev/null
pg_ctl -D data -w -l log -o "-k $PWD -h '' -c fsync=off" start >/dev/null
psql -h "$PWD" -U me postgres -qAtc 'create table t (x int); insert into t values (42); select x from t'
pg_ctl -D data -w stop >/dev/null
"""


def test_postgresql_inside(home: Home) -> None:
    assert home.inside("w", POSTGRESQL) == "42\n"


def test_postgresql_through_the_window(home: Home) -> None:
    """Its data directory; sockets have short paths."""
    script = POSTGRESQL.replace("data", "tree/active/w/rootfs/data")
    assert home.sh(script) == "42\n"


def test_an_error_of_the_kernel_is_told(home: Home) -> None:
    """Of a daemon that is gone there is no namespace to get into."""
    home.daemon.stop(signal.SIGKILL)
    until(lambda: home.mounts() == [], "nothing is mounted")
    assert "no snapfs tree is mounted" in home.inside("w", "true", status=7)
