"""Images, made by Python: archives of layers, and OCI layouts of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.trees import make_tree

MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


class Layer:
    """One layer of an image, as a tar."""

    def __init__(self, format: int = tarfile.DEFAULT_FORMAT) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=format)  # noqa: SIM115

    def add(self, name: str, data: bytes | None = b"", mode: int = 0o644, **fields: object) -> Layer:
        """A file; without data a directory; or what the fields of tarfile's TarInfo say."""
        entry = tarfile.TarInfo(name)
        entry.mode, entry.size = mode, len(data or b"")
        if data is None:
            entry.type = tarfile.DIRTYPE
        for field, value in fields.items():
            setattr(entry, field, value)
        self.tar.addfile(entry, io.BytesIO(data or b""))
        return self

    def link(self, name: str, target: str, **fields: object) -> Layer:
        return self.add(name, type=tarfile.SYMTYPE, linkname=target, **fields)  # type: ignore[arg-type]

    def hard(self, name: str, target: str, **fields: object) -> Layer:
        return self.add(name, type=tarfile.LNKTYPE, linkname=target, **fields)  # type: ignore[arg-type]

    def done(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chain_of(tars: Sequence[bytes]) -> list[str]:
    """The chain ids of layers."""
    found: list[str] = []
    for tar in tars:
        found.append(digest_of(f"{found[-1]} {digest_of(tar)}".encode()) if found else digest_of(tar))
    return found


class Layout:
    """An OCI layout in the directory ``top``, which is made."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.blobs = top / "blobs/sha256"
        self.blobs.mkdir(parents=True)
        self.listed: list[dict[str, Any]] = []
        (top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.write()

    def write(self) -> None:
        (self.top / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.listed}))

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        """Keep ``data``; its descriptor."""
        (self.blobs / digest_of(data).partition(":")[2]).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest_of(data), "size": len(data)}

    def document(self, value: object, kind: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), kind)

    def manifest(self, tars: Sequence[bytes], *, packed: bool = False, machine: str = MACHINE) -> dict[str, Any]:
        """Keep an image of these layers; its descriptor."""
        ids = [digest_of(tar) for tar in tars]
        settings = {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}
        config = {"architecture": machine, "os": "linux", "config": settings, "rootfs": {"type": "layers", "diff_ids": ids}}
        kind = "layer.v1.tar+gzip" if packed else "layer.v1.tar"
        stack = [self.blob(gzip.compress(tar, 1, mtime=0) if packed else tar, kind) for tar in tars]
        told = {"schemaVersion": 2, "config": self.document(config, "config.v1+json"), "layers": stack}
        return self.document(told, "manifest.v1+json")

    def add(self, tag: str, tars: Sequence[bytes], *, packed: bool = False, machine: str = MACHINE) -> str:
        """List such an image as ``tag``; the name of its last layer."""
        notes = {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": f"test.local/{tag}"}
        self.listed.append({**self.manifest(tars, packed=packed, machine=machine), "annotations": notes})
        self.write()
        return chain_of(tars)[-1]

    def archive(self, path: Path) -> Path:
        """All of it in an archive."""
        subprocess.run(["tar", "-C", str(self.top), "-cf", str(path), "."], check=True)
        return path


def packable_tree(top: Path, seed: int, *, files: int = 60) -> Path:
    """As ``trees.make_tree``, without what no layer can have: sockets, and attributes that are root's."""
    make_tree(top, seed, files=files)
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            moment = os.stat(directory)
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
                os.utime(directory, ns=(moment.st_atime_ns, moment.st_mtime_ns))
            elif "trusted.mine" in os.listxattr(path, follow_symlinks=False):
                os.removexattr(path, "trusted.mine")
    return top


def archive_of(top: Path) -> bytes:
    """An archive of all that is in the directory ``top``, with all that belongs to it."""
    layer = Layer(tarfile.PAX_FORMAT)
    first: dict[int, str] = {}
    for directory, inside, others in os.walk(top):
        for name in sorted([*inside, *others]):
            path = os.path.join(directory, name)
            entry = layer.tar.gettarinfo(path, os.path.relpath(path, top))
            assert entry is not None, "a socket"
            status = os.lstat(path)
            entry.pax_headers = {"mtime": f"{status.st_mtime_ns // 10**9}.{status.st_mtime_ns % 10**9:09d}"}
            for key in os.listxattr(path, follow_symlinks=False):
                value = os.getxattr(path, key, follow_symlinks=False)
                entry.pax_headers[f"SCHILY.xattr.{key}"] = value.decode(errors="surrogateescape")
            if not entry.isdir() and status.st_ino in first:
                entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, first[status.st_ino], 0
            first.setdefault(status.st_ino, entry.name)
            if entry.isreg():
                with open(path, "rb") as file:
                    layer.tar.addfile(entry, file)
            else:
                layer.tar.addfile(entry)
    return layer.done()
