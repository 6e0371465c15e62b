"""Directories with all kinds of files: made at random, and all that can be seen of one."""

from __future__ import annotations

import os
import random
import stat
import struct
from pathlib import Path

_NAMES = ("a", "B b", "ü", "new\nline", os.fsdecode(b"\xff\xfe"), "-rf", "%41", "x" * 200, ".hidden", "q\"'\\", "\u202etxt")


def everything(top: Path, *, owners: bool = True) -> dict[str, object]:
    """All that can be seen of what is in ``top``, by path: modes, ``owners``, times, contents, where the holes are, attributes
    with ACLs, and which names are one file."""
    found: dict[str, object] = {}
    inodes: dict[int, str] = {}
    for directory, names, others in os.walk(top):
        names.sort()
        for name in sorted([".", *names, *others]):
            path = os.path.normpath(os.path.join(directory, name))
            own = os.lstat(path)
            content: object = own.st_rdev
            if stat.S_ISREG(own.st_mode):
                content = Path(path).read_bytes(), _holes(path)
            elif stat.S_ISLNK(own.st_mode):
                content = os.readlink(path)
            attributes = {
                each: os.getxattr(path, each, follow_symlinks=False) for each in os.listxattr(path, follow_symlinks=False)
            }
            is_directory = stat.S_ISDIR(own.st_mode)
            one = "" if is_directory else inodes.setdefault(own.st_ino, os.path.relpath(path, top))
            links = 0 if is_directory else own.st_nlink
            whose = (own.st_uid, own.st_gid) if owners else ()
            seen = (own.st_mode, whose, own.st_mtime_ns, content, attributes, one, links)
            found[os.path.relpath(path, top)] = seen
    return found


def _holes(path: str) -> list[int]:
    """Where data begins and ends in a file, which is flushed first, or what waits for the disk would count as data."""
    found: list[int] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        here, end = 0, os.fstat(fd).st_size
        while here < end:
            try:
                here = os.lseek(fd, here, os.SEEK_DATA)
            except OSError:  # a hole up to the end
                break
            found.append(here)
            here = os.lseek(fd, here, os.SEEK_HOLE)
            found.append(here)
    finally:
        os.close(fd)
    return found


def make_tree(top: Path, seed: int, *, files: int = 60) -> Path:
    """Fill ``top``, which is made, with so many files of all kinds, as whoever calls may make them; ``seed`` says which."""
    chance = random.Random(seed)
    top.mkdir()
    directories, regular = [top], list[Path]()
    is_root = os.geteuid() == 0
    for number in range(files):
        path = chance.choice(directories) / f"{number}{chance.choice(_NAMES)}"
        kind = chance.choice(("directory", "file", "file", "file", "hole", "link", "hard", "fifo", "socket", "device"))
        if kind == "directory":
            path.mkdir()
            directories.append(path)
        elif kind == "link":
            os.symlink(chance.choice(("/nowhere", "..", os.fsdecode(b"\xff"), "a" * 300)), path)
        elif kind == "hard" and regular:
            os.link(chance.choice(regular), path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        elif kind == "device" and is_root:
            os.mknod(path, chance.choice((stat.S_IFCHR, stat.S_IFBLK)) | 0o640, os.makedev(7, 90 + number))
        else:
            with path.open("wb") as file:
                if kind == "hole":
                    for _ in range(chance.randrange(3)):
                        file.seek(chance.randrange(1, 50) * 65536)
                        file.write(b"data")
                    file.truncate(file.tell() + chance.randrange(0, 300_000))
                else:
                    file.write(chance.randbytes(chance.choice((0, 1, 5000, 200_000))))
            regular.append(path)
        if kind in ("file", "hole") and chance.random() < 0.3:
            os.setxattr(path, "user.note", chance.randbytes(5))
        if kind in ("file", "directory") and chance.random() < 0.2:
            os.setxattr(path, "system.posix_acl_access", _acl(chance))
        if kind == "directory" and chance.random() < 0.3:
            os.setxattr(path, "system.posix_acl_default", _acl(chance))
        if is_root and chance.random() < 0.4:
            os.chown(path, chance.randrange(70_000), chance.randrange(70_000), follow_symlinks=False)
        if not path.is_symlink():
            os.chmod(path, 0o700 | chance.randrange(0o10000) if path.is_dir() else 0o400 | chance.randrange(0o10000))
    if is_root and regular:
        os.setxattr(chance.choice(regular), "security.capability", struct.pack("<5I", 0x2000001, 1 << 10, 0, 0, 0))
        os.setxattr(chance.choice(regular), "trusted.mine", b"root's")
    for above, inside, others in os.walk(top, topdown=False):  # what is in a directory before it
        for name in sorted([*inside, *others]):
            moment = chance.randrange(10**18), chance.randrange(10**18)
            os.utime(os.path.join(above, name), ns=moment, follow_symlinks=False)
    os.chmod(top, 0o2751)
    os.utime(top, ns=(5, 123456789))
    return top


def _acl(chance: random.Random) -> bytes:
    """Owner, one user, group, mask, others (posix_acl_xattr.h)."""
    entries = [(0x01, 7, 0xFFFFFFFF), (0x02, chance.randrange(8), chance.randrange(70_000)), (0x04, 5, 0xFFFFFFFF)]
    entries += [(0x10, 7, 0xFFFFFFFF), (0x20, chance.randrange(8), 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
