"""The text of an overlay's mount options: how long it may be, and how paths are written in it; pure.

Sources: mount(2), the kernel's ``Documentation/filesystems/overlayfs.rst``.
"""

PAGE = 4096
"""Bytes of options that mount(2) takes, the closing NUL among them; it cuts longer ones without a word."""


def escape(path: str) -> str:
    r"""``path`` as overlayfs reads it in its options: a backslash before each ``\``, ``,`` and ``:``."""
    return path.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
