"""The containerds that the tests run with: what Debian's suites have, each unpacked into a folder of the tests' own.

``python -m tests.containerds`` unpacks those that are missing.  Nothing is installed, and the suites that the machine itself
uses stay as they are: apt has the machine's proxy, mirror and keys, but lists and sources of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SUITES = ("bookworm", "trixie", "sid")
BINARIES = ("containerd", "containerd-shim-runc-v2", "ctr")  # they need no more than libc, and any runc
FOLDER = Path(__file__).parent.parent / ".venv/containerd"
MIRROR = "http://deb.debian.org/debian"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def binaries(suite: str) -> Path:
    """The folder of this suite's binaries."""
    found = FOLDER / suite
    assert found.is_dir(), f"containerd of Debian's {suite} is not in {found}: `make .venv/containerd/ready` fetches it"
    return found


def version(suite: str) -> str:
    """``1.7.24``, or the suite's name where its containerd is missing."""
    found = FOLDER / suite / "version"
    return found.read_text() if found.exists() else suite


def main() -> None:
    missing = [suite for suite in SUITES if not (FOLDER / suite).is_dir()]
    if not missing:
        return
    if not shutil.which("apt-get"):
        print(f"No apt-get is here: the tests want {', '.join(BINARIES)} of Debian's suites in {FOLDER}/SUITE")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER) as base:
            fetch(missing, Path(base))
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{error.stderr or error}\nThe tests run with the containerd of Debian's {', '.join(missing)}, "
            "and it is not to be had: see that apt reaches Debian's archive"
        ) from None


def fetch(suites: list[str], base: Path) -> None:
    """Unpack the containerd of each of ``suites``; ``base`` is for what apt keeps meanwhile."""
    for directory in ("lists/partial", "cache/archives/partial"):
        (base / directory).mkdir(parents=True)
    ask = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    mirror = next(iter(said(*ask).split()), MIRROR)
    signed = f"[signed-by={KEYS}] " if KEYS.exists() else ""
    (base / "sources.list").write_text("".join(f"deb {signed}{mirror} {suite} main\n" for suite in suites))
    (base / "status").touch()
    settings = {
        "Dir::Etc::sourcelist": base / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::status": base / "status",
        "Dir::State::lists": base / "lists",
        "Dir::Cache": base / "cache",
        "APT::Sandbox::User": "root",  # its own user may not enter this folder; of no account for other callers
        "APT::Update::Error-Mode": "any",
        "Acquire::Check-Valid-Until": "false",  # an archive that is a copy may be older than its list allows
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    said(*apt, "update")
    for suite in suites:
        place = base / suite
        place.mkdir(0o755)
        said(*apt, "download", f"containerd/{suite}", cwd=place)
        (package,) = place.glob("*.deb")
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
        names = [f"./usr/bin/{name}" for name in BINARIES]
        subprocess.run(["tar", "-x", "--strip-components=3", *names], cwd=place, input=tar, check=True)
        package.unlink()
        found = re.search(r" v?(\d+[.\d]*)", said(str(place / "containerd"), "--version"))
        assert found is not None
        (place / "version").write_text(found[1])
        os.rename(place, FOLDER / suite)
        print(f"containerd {found[1]} of Debian's {suite} is in {FOLDER / suite}")


def said(*command: str, cwd: Path | None = None) -> str:
    """What a command says; CalledProcessError has its words where it fails."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
