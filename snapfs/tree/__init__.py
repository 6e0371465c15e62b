"""The file system over a Snapshotter as plain Python: what the tree looks like and does, with no FUSE and no kernel in it.

``Tree`` (``tree``) finds the node of an inode.  Each kind of node has a module (``snapshots``, ``snapshot``, ``kinds``,
``labels``, ``links``, ``daemon``), and what a snapshot's directory shows is one table (``attributes``).  All nodes share a
``State`` (``state``).  What a rename means is said in ``renaming``, what may be deleted in ``deleting``.

Imports lead one way: inodes, texts, handles, logs -> state -> node -> attributes -> the kinds of node -> renaming -> tree.
"""

from snapfs.tree.handles import Handle
from snapfs.tree.node import Attributes, Node
from snapfs.tree.tree import Tree

__all__ = ["Attributes", "Handle", "Node", "Tree"]
