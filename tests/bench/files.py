"""Layers of many files, made quickly, and moved from one layer to the next so that they need not be made again."""

from __future__ import annotations

import os
from pathlib import Path

A_DIRECTORY = 1000  # files in each directory


def make_files(layer: Path, count: int, size: int = 0) -> None:
    """Put so many files of ``size`` bytes into directories below ``layer``."""
    content = b"x" * size
    directory = -1
    for number in range(count):
        if number % A_DIRECTORY == 0:
            if directory >= 0:
                os.close(directory)
            os.mkdir(layer / f"d{number // A_DIRECTORY:04}")
            directory = os.open(layer / f"d{number // A_DIRECTORY:04}", os.O_RDONLY | os.O_DIRECTORY)
        fd = os.open(f"f{number:06}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory)
        if size:
            os.write(fd, content)
        os.close(fd)
    os.close(directory)


def move_files(source: Path, target: Path) -> None:
    """Move all that is in the layer ``source`` to the layer ``target``."""
    for entry in os.listdir(source):
        os.rename(source / entry, target / entry)
