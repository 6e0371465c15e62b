"""What each call means: containerd's snapshotter interface as plain functions over one transaction and the layers.

A function that changes something takes the root and a ``Writer``; it is an ``Operation`` or part of one, and may run several
times (``store/writing.py``).  One that only reads takes a ``Reader``.  Both raise the errors of ``snapfs/errors.py``.  Nothing
here knows trio, and nothing waits but for the disk.

Source of the semantics: containerd's ``core/snapshots`` and its overlay snapshotter.  Where snapfs does better the
docstrings say "better".
"""
