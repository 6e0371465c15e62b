"""Telling systemd how a unit of Type=notify is getting on: sd_notify(3), a datagram to $NOTIFY_SOCKET."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Tell systemd ``state`` (``READY=1``, lines of assignments); does nothing where systemd has not asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
