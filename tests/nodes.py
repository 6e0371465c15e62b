"""The tree without a mount: its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from snapfs.tree import Node
from snapfs.tree.node import Directory


def crawl(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """All nodes below ``node`` with the paths by which they were met."""
    yield path, node
    if isinstance(node, Directory):
        with closing(node.entries(0)) as entries:  # type: ignore[type-var]
            children = [(name, child) for _, name, child in entries]
        for name, child in children:
            yield from crawl(child, f"{path}/{name}".lstrip("/"))
