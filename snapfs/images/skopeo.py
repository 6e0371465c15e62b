"""skopeo, which speaks with registries and knows the stores of other programs: snapfs has no such protocol of its own."""

from __future__ import annotations

import re
import shutil
import subprocess

from snapfs.errors import InvalidArgument

_MESSAGE = re.compile(r'level=(?:fatal|error) msg="((?:[^"\\]|\\.)*)"')


def find() -> str:
    """Where skopeo is.  Raises InvalidArgument where it isn't installed."""
    found = shutil.which("skopeo")
    if found is None:
        raise InvalidArgument("this takes skopeo, which is not installed: install the package skopeo")
    return found


def copy(source: str, destination: str) -> None:
    """Copy the image ``source`` to ``destination``, both as skopeo has them.  Raises InvalidArgument with what skopeo says."""
    # the image has its layers as they are to be: what is there already has the same digest, and is not sent again
    done = subprocess.run(
        [find(), "copy", "--quiet", source, destination],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = _MESSAGE.findall(done.stderr) or done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        why = re.sub(r"\\(.)", r"\1", said[-1])
        raise InvalidArgument(f"skopeo could not copy the image to {destination}: {why}")
