"""The command ``snapfs``.  Each verb has a module of its own, imported when it is called.

A script that lists or makes snapshots in a loop pays for each start, so what those verbs need imports no ``re``, ``json``,
``argparse``, ``enum`` or ``typing``: each of them takes as long as the verb itself.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapfs.cli.grammar import Verb

VERBS = {
    "ls": ("ls", "list snapshots"),
    "images": ("images", "list the names of committed snapshots"),
    "tree": ("tree", "show snapshots below the ones they stand on"),
    "show": ("show", "tell all about a snapshot"),
    "prepare": ("prepare", "make an active snapshot"),
    "view": ("prepare", "make a read-only view"),
    "commit": ("commit", "commit an active snapshot"),
    "rm": ("rm", "remove snapshots"),
    "mount": ("mount", "mount a snapshot's file system"),
    "umount": ("mount", "unmount a snapshot's file system"),
    "adopt": ("adopt", "make a base and a workspace of a directory"),
    "release": ("adopt", "take a workspace away from over a directory"),
    "import": ("importing", "make snapshots of an image's layers"),
    "shell": ("inside", "start a shell that stands in a snapshot"),
    "run": ("inside", "run a command that stands in a snapshot"),
    "diff": ("diff", "show what a snapshot changed"),
    "usage": ("usage", "count what snapshots take on disk"),
    "label": ("label", "show, set and delete labels"),
    "fork": ("workspace", "make a second workspace from a snapshot, as it is now"),
    "checkpoint": ("workspace", "keep the state of a workspace"),
    "rollback": ("workspace", "put a workspace back to a checkpoint"),
    "apply": ("apply", "bring what changed into an ordinary directory, and undo that"),
    "versions": ("versions", "show which checkpoints hold which version of a file"),
    "restore": ("versions", "put one file or directory back as it was at a checkpoint"),
    "export": ("export", "make an image of a snapshot and those below it"),
    "squash": ("squash", "make one layer of many"),
    "events": ("events", "show, or follow, what happens"),
    "prune": ("prune", "remove snapshots by label, age or kind; thin checkpoints"),
    "completion": ("completion", "completion for bash, zsh and fish"),
    "serve": ("serve", "mount a root's tree and serve it"),
    "check": ("check", "look for damage in a root that is not in use, and mend it"),
    "backup": ("backup", "copy a root's records to a file, also while it is served"),
}
"""Module and summary of each verb."""

_OF_FULL_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_OF_THE_DAEMON = ("lmdb", "msgspec", "pyfuse3", "trio")  # which ``pip install --no-deps`` leaves out

HELP = """\
usage: snapfs VERB …            snapfs VERB --help tells more
       snapfs ROOT MOUNTPOINT [-o opt,…]      as mount(8) calls it: serve in the background

Copy-on-write snapshots for overlayfs, as a file system.

{verbs}

The tree is the one that --at or $SNAPFS names, or that you stand in, or the only one that is mounted.  Not named, only
trees that root or you have mounted count.
A snapshot is given by its name, or by its path in the tree: active/web, ./web, /mnt/snapfs/committed/v1.

exit status:
  0    done
  1    refused, or failed: a sentence on standard error says why
  2    wrong usage
  3    there is no such snapshot, label or checkpoint
  4    the key or name is taken
  5    it is in use, or has children
  6    not permitted
  7    no tree is mounted, or its daemon is gone
  8    what is to be changed was changed there, too: nothing was touched
  130  interrupted

examples:
  snapfs serve --detach /srv/snapfs /mnt/snapfs
  snapfs prepare base && cp -a site/. "$(snapfs show --path base)"/rootfs/ && snapfs commit base v1
  snapfs prepare web --parent v1
  snapfs tree
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: those of the process); returns the exit status (``snapfs --help``)."""
    if arguments is None:
        _open_standard_streams()
    if arguments is None and sys.getfilesystemencoding() != "utf-8":  # the names in a tree are UTF-8 in every locale
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors=errors)  # type: ignore[union-attr]
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(given)
        sys.stdout.flush()
        if arguments is None and _is_over():
            os._exit(status)
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter's last flush says nothing
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        from snapfs.cli.refusal import Refusal
        from snapfs.errors import SnapshotError

        said: Exception = error
        if isinstance(error, ModuleNotFoundError) and error.name in _OF_THE_DAEMON:
            said = Refusal(f"{error.name} is not installed, which {given[0]} takes: install snapfs anew, without --no-deps")
        elif isinstance(error, OSError) and error.filename is None and error.errno in _OF_FULL_DISKS:  # /dev/full, say
            said = Refusal(f"cannot write to standard output: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # so that the interpreter's last flush says nothing
        elif not isinstance(error, (Refusal, SnapshotError)):
            if not isinstance(error, FileNotFoundError) or not _has_no_directory():
                raise
            said = Refusal("the directory that this runs in was removed: cd to another one first")
        if "JOURNAL_STREAM" in os.environ:
            import logging

            from snapfs.cli import logs

            logs.say(str(said), logging.ERROR)
        else:
            from snapfs.cli import table

            table.complain(said)
        return said.status if isinstance(said, Refusal) else 1


def _is_over() -> bool:
    """Whether nothing is left of what Python does at its end, which takes it a fifth of its time: no thread goes on, nobody has
    asked to be called then, and nobody looks on."""
    is_watched = sys.getprofile() or sys.gettrace() or sys.flags.inspect
    return not is_watched and "threading" not in sys.modules and "atexit" not in sys.modules


def _open_standard_streams() -> None:
    """Whoever starts this with one of the first three descriptors closed: the next file would get its number, and what is
    written to a standard stream would go there, or the file would be closed as one."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _has_no_directory() -> bool:
    """Whether the working directory is gone, so that no path can be told from where it is."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _run(given: list[str]) -> int:
    word = given[0] if given else "--help"
    if word in ("--help", "-h", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<12}{summary}" for verb, (_, summary) in VERBS.items())), end="")
        return 0 if given else 2
    if word == "--version":
        import snapfs

        print(f"snapfs {snapfs.__version__}")
        return 0
    if word == "_complete":
        from snapfs.cli import completion

        return completion.complete(given[1:])
    if word in VERBS:
        return verb(word).run(given[1:])
    if "/" in word and len(given) > 1:  # mount.fuse3, for mount(8) and /etc/fstab
        return verb("serve").run(["--detach", *given])
    from snapfs.cli import table

    table.complain(f'there is no verb "{word}"; snapfs --help lists them')
    return 2


def verb(word: str) -> Verb:
    """The verb that is called ``word``, which must be one of ``VERBS``; imports its module."""
    module = __import__(f"snapfs.cli.{VERBS[word][0]}", fromlist=["VERBS"])
    found: Verb = module.VERBS[word]
    return found
