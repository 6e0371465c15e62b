"""Images from and to wherever skopeo(1) knows, by way of an OCI layout in a directory of this process's own."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from snapfs.images import layouts
from snapfs.images.unfit import Unfit
from snapfs.kernel.beneath import called
from snapfs.kernel.forks import undisturbed
from snapfs.kernel.inside import open_unmounted
from snapfs.names import printable

TRANSPORTS = ("docker", "docker-daemon", "containers-storage", "dir", "ostree", "sif", "tarball")
"""What skopeo knows besides ``oci``, ``oci-archive`` and ``docker-archive``."""

TAG = "image"

_OF_OTHERS = "no image found in"  # … manifest list for architecture
_NAME = re.compile(r'^Error parsing image name "[^"]*": |^initializing source \S+: |^Invalid (source|destination) name \S+: ')
_LOGGED = re.compile(r'msg="(.*)"$')
_UNKNOWN = re.compile(r'unknown transport "([^"]*)"')
_FULL, _LACKS = "no space left on device", "no such file or directory"
_ADVICE = {
    "server gave HTTP response to HTTPS client": ": it has no TLS; ~/.config/containers/registries.conf can say so of it: "
    '[[registry]], location = "HOST:PORT", insecure = true, a line each',
    **dict.fromkeys(
        ("authentication required", "unauthorized: "), ": skopeo login HOST, once, is for a registry that wants a password"
    ),
}
"""What to do, by what is in skopeo's words."""
_FETCHED, _SENT = "snapfs-image-", "snapfs-export-"  # directories of this process's own
_OLD = {_FETCHED: 86_400.0, _SENT: 60.0}
"""Seconds after which what a process that was killed has left is of no more use: what an import had fetched is for the next."""
_EVERY = 0.2  # seconds between two messages of how far it is

PATIENCE = 300.0
"""Seconds after which skopeo is ended that has fetched nothing meanwhile: what it reads may have become a FIFO, say."""


class Unfinished(Unfit):
    """Not all has arrived, or not all is there any more.  What has arrived is kept for the next ``fetched``."""


class Layout(NamedTuple):
    """An OCI layout in the directory ``path``, with the image as TAG; the files ``absent`` in it are empty, for the layers in
    them are known, and were not fetched."""

    path: str
    absent: frozenset[str]


@contextlib.contextmanager
def fetched(
    source: str,
    *,
    foreign: bool,
    known: Callable[[list[str]], int],
    wanted: Callable[[int], None],
    told: Callable[[int], None],
) -> Iterator[Layout]:
    """For a block: the image ``source`` (``docker://host/name:tag``), in a directory that nobody else can enter.  What is for
    another machine is fetched only if ``foreign``.  From a registry only those layers are fetched that are not among the
    lowest, of which ``known`` says how many there are already, from the diff ids of all; and that have not arrived before, for
    an import that was interrupted.  ``wanted`` is called before with the bytes that there will be, as far as the image says so,
    and ``told`` with those that have arrived so far; both may raise Unfit.

    Raises Unfit, and OSError; and Unfinished, where the block may raise it, too."""
    program = find(source)
    if source.startswith("dir:"):
        _refuse_what_is_no_file(source.removeprefix("dir:"))
    goes_on = source.startswith("docker:")
    with _private(_FETCHED, keeps=goes_on) as directory:
        layout = f"{directory}/oci"
        absent = _spared(program, source, layout, foreign=foreign, known=known)
        wanted(_size(directory) + _missing(program, source, layout))
        copy = [program, "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]

        def copied(*how: str) -> str:
            command = [*copy, *how, "--", source, f"oci:{layout}:{TAG}"]
            return _ran(command, lambda: told(_size(directory)), lambda: _size(directory), spool=directory)[1]

        said = copied()
        if said and _OF_OTHERS in said:
            _refuse_others(program, source, foreign=foreign)
            said = copied("--all")
        if said:
            _refuse(said, has_some=goes_on and _has_some(directory))
        told(_size(directory))
        yield Layout(layout, absent)


class Lacking(Unfit):
    """What is to be sent is not all there."""


@contextlib.contextmanager
def outgoing(destination: str) -> Iterator[str]:
    """For a block: where an OCI layout with the image TAG may be made, which is to go to ``destination``, in a directory that
    nobody else can enter.  Raises Unfit where it can't go there, for there is no skopeo; OSError."""
    find(destination)
    with _private(_SENT) as directory:
        yield f"{directory}/oci"


def send(layout: str, destination: str, told: Callable[[], None] | None) -> None:
    """Have the image go there; what is there has the same digest, and stays.  ``told`` is called now and then.  Raises Unfit,
    and Lacking where a blob is not in the layout, and not there either."""
    said = _ran([find(destination), "copy", "--quiet", "--", f"oci:{layout}:{TAG}", destination], told)[1]
    if said:
        kind = Lacking if _LACKS in said and layout in said else Unfit
        raise kind(f"skopeo can't take it there: {said}")


def find(place: str) -> str:
    """Where skopeo is, for images at ``place``.  Raises Unfit."""
    program = shutil.which("skopeo")
    if program is None:
        transport = place.partition(":")[0]
        if transport not in TRANSPORTS:
            raise Unfit(_unknown(transport))
        raise Unfit(f"skopeo is not installed, which knows {transport}: images (Debian: apt-get install skopeo)")
    return program


def _refuse_what_is_no_file(path: str) -> None:
    """Raise Unfit where the directory ``path``, which skopeo is to read, has links, FIFOs, devices: it would open them."""
    try:
        files, names = layouts.DirectoryFiles(path), os.listdir(path)
    except OSError:  # skopeo says so
        return
    for name in names:
        found = files.find(name)
        if found is not None:
            os.close(found.fd)


# -- what need not be fetched


def _spared(program: str, source: str, layout: str, *, foreign: bool, known: Callable[[list[str]], int]) -> frozenset[str]:
    """Put in ``layout`` the files for which skopeo need not ask a registry: what has arrived before, and an empty file for
    each layer that is known.  The names of the latter."""
    if not source.startswith("docker:"):
        return frozenset()  # skopeo makes all of it to tell of it, or it is on this machine
    config, said = _asked(program, source, "--config", "--raw")
    if said and _OF_OTHERS in said:
        _refuse_others(program, source, foreign=foreign)
        return frozenset()
    if said:
        _refuse(said, has_some=False)
    diff_ids = layouts.told_of(config, source, foreign=foreign)
    there = known(diff_ids)
    if not there and not any(True for _ in _left(_FETCHED)):
        return frozenset()
    listed, said = _asked(program, source, "--no-tags")
    if said:
        _refuse(said, has_some=False)
    names = [f"blobs/{digest.replace(':', '/')}" for digest in layouts.digests_in(listed)]
    if len(names) != len(diff_ids):
        return frozenset()
    wanted = set(names[there:])
    for directory in {os.path.dirname(name) for name in names}:
        os.makedirs(f"{layout}/{directory}", exist_ok=True)
    absent = frozenset(names) - wanted
    for name in absent:
        os.close(os.open(f"{layout}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    _take_over(wanted, layout)
    return absent


def _missing(program: str, source: str, layout: str) -> int:
    """The bytes of the blobs that are not in ``layout`` yet, where the image's manifest is to be had before they are."""
    if not source.startswith(("docker:", "dir:")):
        return 0  # as above
    manifest, said = _asked(program, source, "--raw")
    if said:
        _refuse(said, has_some=False)
    sizes = layouts.sizes_in(manifest)
    return sum(size for digest, size in sizes.items() if not os.path.exists(f"{layout}/blobs/{digest.replace(':', '/')}"))


def _take_over(wanted: set[str], layout: str) -> None:
    """Move to ``layout`` those of the ``wanted`` blobs that an import has left which did not come to its end.  What they must
    hash to is seen when they are unpacked."""
    for left in _left(_FETCHED):
        taken = 0
        for name in wanted:
            with contextlib.suppress(OSError):
                if os.stat(f"{left}/oci/{name}").st_size:
                    os.rename(f"{left}/oci/{name}", f"{layout}/{name}")
                    taken += 1
        if taken:
            shutil.rmtree(left, ignore_errors=True)


def _refuse_others(program: str, source: str, *, foreign: bool) -> None:
    """Raise Elsewhere, with the machines for which there is an image in the list that ``source`` is; unless ``foreign``."""
    if not foreign:
        layouts.refuse_others(_asked(program, source, "--raw")[0], source)


def _refuse(said: str, *, has_some: bool) -> NoReturn:
    words = f"skopeo can't fetch it: {said}"
    if has_some and _FULL not in said:
        raise Unfinished(f"{words}; what has arrived is kept for the next import of it")
    raise Unfit(words)


# -- directories of this process's own


@contextlib.contextmanager
def _private(prefix: str, *, keeps: bool = False) -> Iterator[str]:
    """A directory of this process's own; ``keeps``: it stays where the block is interrupted, or raises Unfinished."""
    try:
        for left in _left(prefix):
            if os.stat(left).st_mtime < time.time() - _OLD[prefix]:
                shutil.rmtree(left, ignore_errors=True)
        directory = tempfile.mkdtemp(prefix=prefix, dir=layouts.spool())
    except OSError as error:
        raise layouts.no_spool(error) from None
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stays = False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    except (KeyboardInterrupt, Unfinished):
        stays = keeps and _has_some(directory)
        raise
    finally:
        if not stays:
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _left(prefix: str) -> Iterator[str]:
    """The directories that processes of this user have left which did not come to their end; each is locked until the next.
    What is mounted on one of these names is not asked: it may be a user's, and never answer."""
    place = layouts.spool()
    top = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in called(prefix, top):
            with contextlib.suppress(OSError):
                fd = open_unmounted(name, top)
                try:
                    if os.fstat(fd).st_uid == os.geteuid():
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        yield f"{place}/{name}"
                finally:
                    os.close(fd)
    finally:
        os.close(top)


def _files(directory: str) -> Iterator[int]:
    """The sizes of the files in ``directory``, at any depth, as skopeo writes them."""
    for above, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.stat(f"{above}/{name}").st_size


def _size(directory: str) -> int:
    return sum(_files(directory))


def _has_some(directory: str) -> bool:
    return any(_files(f"{directory}/oci/blobs"))


# -- skopeo


def _asked(program: str, source: str, *how: str) -> tuple[bytes, str]:
    """What ``skopeo inspect`` tells of ``source``; and as ``_ran``."""
    return _ran([program, "inspect", *how, "--", source], None, lambda: 0)


def _ran(
    command: list[str], told: Callable[[], None] | None, grown: Callable[[], int] | None = None, spool: str | None = None
) -> tuple[bytes, str]:
    """What the command says on standard output; and "", or what it says of its failure.  ``told`` is called now and then.  The
    command is ended where what ``grown`` gives has been the same for PATIENCE.  Files of its own go to ``spool``."""
    with undisturbed() as blocked:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if spool is None else {**os.environ, "TMPDIR": spool},
            preexec_fn=lambda: _ends_with_parent(blocked),
        )
    size, since = 0, time.monotonic()
    with process:
        try:
            while True:
                try:
                    found, stderr = process.communicate(timeout=_EVERY)
                except subprocess.TimeoutExpired:
                    if told is not None:
                        told()
                    if grown is None:
                        continue
                    before, size = size, grown()
                    since = time.monotonic() if size != before else since
                    if time.monotonic() - since > PATIENCE:
                        process.kill()
                        return b"", f"it has fetched nothing for {PATIENCE:g} seconds, and was ended"
                else:
                    break
        except BaseException:
            process.kill()
            raise
    return found, (_said(stderr) or f"status {process.returncode}") if process.returncode else ""


def _ends_with_parent(before: set[signal.Signals | int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _said(stderr: bytes) -> str:
    """The last line of what skopeo has said, without what logs have before it, and the name that it was given."""
    last = (stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
    logged = _LOGGED.search(last)
    text = last if logged is None else logged[1].replace('\\"', '"')
    text = " ".join(re.split(r"(?:\\[nt]|\s)+", text)).strip()
    unknown = _UNKNOWN.search(text)
    if unknown is not None:
        return _unknown(unknown[1])
    to_do = next((to_do for words, to_do in _ADVICE.items() if words in text), "")
    return printable(_NAME.sub("", text))[:1000] + to_do


def _unknown(transport: str) -> str:
    words = f'"{printable(transport)}" is no transport that is known: {" ".join(("oci", *TRANSPORTS))} are some'
    return f"{words}; an image of a registry is docker://HOST/NAME:TAG, as docker://docker.io/library/alpine:3.20"
