"""Images from and to wherever skopeo(1) knows, by way of an OCI layout in a directory of this process's own."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

from snapfs.images.unfit import Elsewhere, Unfit
from snapfs.names import printable

TRANSPORTS = ("docker", "docker-daemon", "containers-storage", "dir", "ostree", "sif", "tarball")
"""What skopeo knows besides ``oci``, ``oci-archive`` and ``docker-archive``."""

TAG = "image"

_PREFIX = "snapfs-image-"
_OLD = 60.0  # seconds after which a directory that nobody has locked is known to be left by a process that was killed
_OF_OTHERS = "no image found in"  # … manifest list for architecture


@contextlib.contextmanager
def fetched(source: str, *, foreign: bool) -> Iterator[str]:
    """For a block: an OCI layout with the image ``source`` (``docker://host/name:tag``) as TAG, in a directory that nobody
    else can enter.  What is for another machine is fetched only if ``foreign``.  Raises Unfit, and OSError."""
    program = find(source)
    with _private() as layout:
        said = _copied([program, "copy", "--quiet"], source, layout)
        if said and _OF_OTHERS in said:
            if not foreign:
                raise Elsewhere(f"{said}: --force takes what there is")
            said = _copied([program, "copy", "--quiet", "--all"], source, layout)
        if said:
            raise Unfit(f"skopeo can't fetch it: {said}")
        yield layout.removeprefix("oci:").removesuffix(f":{TAG}")


@contextlib.contextmanager
def sent(destination: str) -> Iterator[str]:
    """For a block, which makes it: where an OCI layout with the image TAG is to be, in a directory that nobody else can enter.
    Then the image goes to ``destination``.  Raises Unfit, and OSError."""
    program = find(destination)
    with _private() as layout:
        yield layout.removeprefix("oci:").removesuffix(f":{TAG}")
        said = _copied([program, "copy", "--quiet"], layout, destination)  # what is there has the same digest, and stays
        if said:
            raise Unfit(f"skopeo can't take it there: {said}")


def find(place: str) -> str:
    """Where skopeo is, for images at ``place``.  Raises Unfit."""
    program = shutil.which("skopeo")
    if program is None:
        transport = place.partition(":")[0]
        if transport not in TRANSPORTS:
            raise Unfit(f'"{printable(transport)}" is no transport that is known: {" ".join(("oci", *TRANSPORTS))} are some')
        raise Unfit(f"skopeo is not installed, which knows {transport}: images (Debian: apt-get install skopeo)")
    return program


@contextlib.contextmanager
def _private() -> Iterator[str]:
    """What skopeo calls a layout that can be made in a directory of this process's own."""
    place = os.environ.get("TMPDIR", "/var/tmp")
    _remove_left(place)
    directory = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield f"oci:{directory}/oci:{TAG}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _copied(command: list[str], source: str, destination: str) -> str:
    """Copy the image; "" or what skopeo says of it."""
    done = subprocess.run(
        [*command, "--", source, destination],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=_ends_with_parent,
        check=False,
    )
    return (_said(done.stderr) or f"status {done.returncode}") if done.returncode else ""


def _ends_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _said(stderr: bytes) -> str:
    """The last line of what skopeo has said, without what logs have before it."""
    lines = stderr.decode(errors="replace").strip().splitlines() or [""]
    text = lines[-1].partition('msg="')[2].rstrip('"').replace('\\"', '"') if 'msg="' in lines[-1] else lines[-1]
    return printable(text)[:1000]


def _remove_left(place: str) -> None:
    """Remove what processes of this user that were killed have left in ``place``."""
    for name in os.listdir(place):
        if not name.startswith(_PREFIX):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(f"{place}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if status.st_uid == os.geteuid() and status.st_mtime < time.time() - _OLD:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(f"{place}/{name}")
            finally:
                os.close(fd)
