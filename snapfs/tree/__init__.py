"""The file system over a Snapshotter as plain Python: what the tree looks like and does, with no FUSE in it.

``Tree`` answers for an inode with a node; each kind of node has a room of its own (``kinds``, ``snapshot``, ``labels``,
``daemon``, ``links``), and what a snapshot's directory shows is one table (``attributes``).  Errors are snapfs's own.
"""

from snapfs.tree.node import Attributes, Handle, Node
from snapfs.tree.tree import Tree

__all__ = ["Attributes", "Handle", "Node", "Tree"]
