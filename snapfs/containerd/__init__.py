"""containerd's snapshots service over a Snapshotter: gRPC on a Unix socket, as a proxy snapshotter.

Only what was made over the socket (``ORIGIN`` in its record) is listed and can be removed there, since containerd's garbage
collection removes all that it is shown and does not know.
"""

ORIGIN = "containerd"
